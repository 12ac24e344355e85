/* models.c - from the name a user types to the file of a model, and to the model. */
#include "cli/models.h"

#include "attention/kernels.h"
#include "base/user_folder.h"
#include "cli/catalogue.h"
#include "cli/options.h"

#include <limits.h>
#include <string.h>
#include <unistd.h>

static bool names_a_file(const char *given) {
  size_t length = strlen(given);
  return strchr(given, '/') || (length > 5 && strcmp(given + length - 5, ".gguf") == 0) || access(given, F_OK) == 0;
}

oscar_status models_folder(oscar_context *context, char *path, size_t room) {
  oscar_status status = user_folder(context, USER_CACHE, path, room);
  if (status != OSCAR_OK) return status;
  size_t used = strlen(path);
  if ((size_t)snprintf(path + used, room - used, "/models") < room - used) return OSCAR_OK;
  return set_error(context, OSCAR_IO, "the path of the folder of models is too long");
}

const char *model_name(const void *list, int i) {
  (void)list;
  int count;
  const struct catalogue_model *models = catalogue_list(&count);
  return i < count ? models[i].name : NULL;
}

static int model_is_not_here(const char *name) {
  if (catalogue_find(name)) return failed("model '%s' is not here yet: 'oscar fetch %s' gets it", name, name);
  const char *near = nearest_name(name, model_name, NULL);
  if (near) return failed("no model '%s': there is no such file; did you mean %s of the catalogue?", name, near);
  return failed("no model '%s': there is no such file, and the catalogue ('oscar fetch --list') does not have it", name);
}

static int locate_fetched(oscar_context *context, const char *name, char *path, size_t room) {
  char folder[PATH_MAX];
  oscar_status status = models_folder(context, folder, sizeof folder);
  if (status != OSCAR_OK) return failed_with(status, oscar_last_error(context));
  if ((size_t)snprintf(path, room, "%s/%s.gguf", folder, name) >= room) return failed("%s: the path is too long", path);
  return access(path, R_OK) == 0 ? EXIT_DONE : model_is_not_here(name);
}

int model_locate(const char *given, char *path, size_t room) {
  if (names_a_file(given)) {
    if (access(given, R_OK) != 0) return failed("%s: there is no such model file, or it cannot be read", given);
    if ((size_t)snprintf(path, room, "%s", given) >= room) return failed("%s: the path is too long", given);
    return EXIT_DONE;
  }
  oscar_context *context;
  oscar_status status = oscar_context_create(NULL, &context);
  if (status != OSCAR_OK) return failed_with(status, NULL);
  int code = locate_fetched(context, given, path, room);
  oscar_context_free(context);
  return code;
}

int engine_options_resolve(const char *command, struct engine_options *options, char *path, size_t room) {
  if (!options->model_path)
    return wrong_use("%s: which model? -m NAME ('oscar fetch --list' shows names) or -m FILE.gguf", command);
  if (!device_is_known(options->device))
    return wrong_use("%s: --device wants cpu, cuda, or cuda:N for GPU N, not '%s'", command, options->device);
  if (options->weights && strcmp(options->device, "cpu") == 0)
    return wrong_use("%s: --weights %s is for GPUs (--device cuda): the CPU multiplies with those of the file", command,
                     options->weights);
  if (options->cpus.count && options->threads > options->cpus.count)
    return wrong_use("%s: %d threads, but --cpus names only %d to pin them to", command, options->threads, options->cpus.count);
  int code = model_locate(options->model_path, path, room);
  if (code == EXIT_DONE) options->model_path = path;
  return code;
}

/* More are rarely right, and cost most when they are wrong. */
enum { DEFAULT_GUESSES = 8 };

int speculation_resolve(const char *command, const struct speculation_arguments *arguments, struct engine_options *options,
                        char *path, size_t room) {
  const char *how = arguments->how ? arguments->how : arguments->draft_model ? "draft" : "off";
  const bool drafts = strcmp(how, "draft") == 0;
  if (drafts && !arguments->draft_model)
    return wrong_use("%s: --speculate draft wants a smaller model of the same vocabulary: --draft-model NAME|FILE", command);
  if (!drafts && arguments->draft_model) return wrong_use("%s: --draft-model is for --speculate draft, not %s", command, how);
  const bool off = strcmp(how, "off") == 0;
  if (off && arguments->guesses) return wrong_use("%s: --guesses is for --speculate lookup or draft", command);
  if (off) return EXIT_DONE;
  options->guesses = arguments->guesses ? arguments->guesses : DEFAULT_GUESSES;
  if (!drafts) return EXIT_DONE;
  int code = model_locate(arguments->draft_model, path, room);
  if (code == EXIT_DONE) options->draft_path = path;
  return code;
}

int loaded_model_open(const struct engine_options *options, struct loaded_model *loaded) {
  *loaded = (struct loaded_model){0};
  const oscar_context_options context = engine_context_options(options);
  oscar_status status = oscar_context_create(&context, &loaded->context);
  if (status == OSCAR_OK)
    status = device_open(loaded->context, options->device, options->weights, &loaded->cuda, &loaded->backend);
  if (status == OSCAR_OK) status = model_load(loaded->context, loaded->backend, options->model_path, &loaded->model);
  if (status == OSCAR_OK) return EXIT_DONE;
  int code = failed_with(status, oscar_last_error(loaded->context));
  loaded_model_close(loaded);
  return code;
}

void loaded_model_close(struct loaded_model *loaded) {
  model_free(loaded->model);
  if (loaded->backend) loaded->backend->ops->free(loaded->backend);
  oscar_cuda_free(loaded->cuda);
  oscar_context_free(loaded->context);
  *loaded = (struct loaded_model){0};
}

void loaded_model_describe(const struct loaded_model *loaded, char *text, size_t bytes) {
  loaded->backend->ops->describe(loaded->backend, text, bytes);
  if (loaded->cuda) return; /* attention is there too */
  size_t used = strlen(text);
  if (used + 2 >= bytes) return;
  memcpy(text + used, "; ", 3);
  attention_kernels_describe(&loaded->context->cpu, text + used + 2, bytes - used - 2);
}
