/* Any bytes as the body of a request, in every dialect: it is refused with a status and a sentence, or it is a request whose
 * parts are within their limits. The first byte chooses the dialect. */
#include "fake_service.h"
#include "server/inquiry.h"
#include "server/response_store.h"

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static struct server server;
static struct frontend frontend;

int LLVMFuzzerInitialize(int *argc, char ***argv);
int LLVMFuzzerInitialize(int *argc, char ***argv) {
  (void)argc, (void)argv;
  char path[] = "/tmp/oscar-fuzz-XXXXXX", error[512];
  int fd = mkstemp(path);
  if (fd < 0) abort();
  close(fd);
  fake_model_write(OSCAR_TEST_TOKENIZER, path);
  server_options_default(&server.options);
  server.options.model_name = "fake";
  server.frontends = &frontend;
  server.responses = response_store_create(4, 1 << 20);
  if (frontend_open(path, "auto", &frontend, error, sizeof error) != OSCAR_OK || !server.responses) abort();
  unlink(path);
  json_t *items = json_loads("[{\"type\":\"message\",\"role\":\"user\",\"content\":\"x\"}]", 0, NULL);
  response_store_put(server.responses, "resp_1", items, items);
  json_decref(items);
  return 0;
}

typedef struct inquiry *parse(struct server *server, struct frontend *frontend, const char *body, size_t bytes,
                              struct refusal *refusal);

static void check(const struct inquiry *g) {
  const struct request_options *o = &g->options;
  if (!g->ids || o->n < 1 || o->choices < 1 || o->choices > 16 || o->max_tokens < 0 || o->logprobs < -1 || o->logprobs > 20)
    abort();
  for (int i = 0; i < o->n; i++)
    if (g->ids[i] < 0 || g->ids[i] >= tokenizer_vocab(frontend.tokenizer)) abort();
  if (g->session && !session_name_is_valid(g->session)) abort();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes) {
  static parse *const dialects[] = {openai_chat_parse, openai_completions_parse, responses_parse, anthropic_parse};
  if (bytes < 1) return 0;
  char *body = malloc(bytes); /* exactly as long as it is, so that reading past the end is seen */
  if (!body) abort();
  memcpy(body, data + 1, bytes - 1);
  struct refusal refusal = {0};
  struct inquiry *g = dialects[data[0] % ARRAY_LENGTH(dialects)](&server, &frontend, body, bytes - 1, &refusal);
  if (g)
    check(g);
  else if (refusal.status < 400 || refusal.status > 599 || !*refusal.text)
    abort();
  json_t *told = g ? NULL : refusal_json(data[0] % 2 ? DIALECT_ANTHROPIC : DIALECT_OPENAI, &refusal);
  if (!g && !told) abort();
  json_decref(told);
  inquiry_free(g);
  free(body);
  return 0;
}
