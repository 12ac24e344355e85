/* models.c - from the name a user types to the file of a model, and to the model. */
#include "cli/models.h"

#include <limits.h>
#include <string.h>
#include <unistd.h>

static bool names_a_file(const char *given) {
  size_t length = strlen(given);
  return strchr(given, '/') || (length > 5 && strcmp(given + length - 5, ".gguf") == 0) || access(given, F_OK) == 0;
}

int model_locate(const char *given, char *path, size_t room) {
  if (names_a_file(given)) {
    if (access(given, R_OK) != 0) return failed("%s: there is no such model file, or it cannot be read", given);
    if ((size_t)snprintf(path, room, "%s", given) >= room) return failed("%s: the path is too long", given);
    return EXIT_DONE;
  }
  char folder[PATH_MAX];
  oscar_context *context;
  oscar_status status = oscar_context_create(NULL, &context);
  if (status != OSCAR_OK) return failed_with(status, NULL);
  int code = EXIT_DONE;
  status = user_cache_folder(context, folder, sizeof folder);
  if (status != OSCAR_OK)
    code = failed_with(status, oscar_last_error(context));
  else if ((size_t)snprintf(path, room, "%s/models/%s.gguf", folder, given) >= room)
    code = failed("%s: the path is too long", path);
  else if (access(path, R_OK) != 0)
    code = failed("model '%s' is not here: 'oscar fetch %s' gets it, 'oscar fetch --list' shows what there is", given, given);
  oscar_context_free(context);
  return code;
}

int engine_options_resolve(const char *command, struct engine_options *options, char *path, size_t room) {
  if (!options->model_path)
    return wrong_use("%s: which model? -m NAME ('oscar fetch --list' shows names) or -m FILE.gguf", command);
  int code = model_locate(options->model_path, path, room);
  if (code == EXIT_DONE) options->model_path = path;
  return code;
}

int loaded_model_open(const char *path, int threads, struct loaded_model *loaded) {
  *loaded = (struct loaded_model){0};
  const oscar_context_options options = {.threads = threads};
  oscar_status status = oscar_context_create(&options, &loaded->context);
  if (status == OSCAR_OK) status = backend_create_cpu(loaded->context, &loaded->backend);
  if (status == OSCAR_OK) status = model_load(loaded->context, loaded->backend, path, &loaded->model);
  if (status == OSCAR_OK) return EXIT_DONE;
  int code = failed_with(status, oscar_last_error(loaded->context));
  loaded_model_close(loaded);
  return code;
}

void loaded_model_close(struct loaded_model *loaded) {
  model_free(loaded->model);
  if (loaded->backend) loaded->backend->ops->free(loaded->backend);
  oscar_context_free(loaded->context);
  *loaded = (struct loaded_model){0};
}
