/* serve_fake.c - a server over the service that repeats its users, for clients to be tested against: prints its address and
 * serves until standard input ends. serve_fake STORED_MODEL FOLDER [API_KEY] */
#include "fake_service.h"
#include "server/server.h"

#include <stdio.h>
#include <stdlib.h>

int main(int argc, char **argv) {
  if (argc != 3 && argc != 4) return 2;
  char path[4096], error[512];
  snprintf(path, sizeof path, "%s/model.gguf", argv[2]);
  fake_model_write(argv[1], path);
  struct service *service = fake_service_create(path);
  struct server_options options;
  server_options_default(&options);
  options.port = 0;
  options.model_path = path;
  options.model_name = "fake";
  options.kv = "int2";
  options.context = 4096;
  const char *const key = argc == 4 ? argv[3] : NULL;
  options.api_keys = &key;
  options.n_api_keys = argc == 4;
  struct server *server;
  if (server_create(&options, service, &server, error, sizeof error) != OSCAR_OK) {
    fprintf(stderr, "%s\n", error);
    return 1;
  }
  printf("%s\n", server_address(server));
  fflush(stdout);
  while (getchar() != EOF) continue;
  server_free(server);
  service_free(service);
  return 0;
}
