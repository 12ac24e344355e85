/* cli/models.h - from the name a user types to a model's file, and to the model. Private. */
#ifndef OSCAR_CLI_MODELS_H
#define OSCAR_CLI_MODELS_H

#include "cli/cli.h"
#include "engine/engine.h"

struct speculation_arguments;

/* Where fetched models are kept. Errors: IO (no cache folder, path too long). */
oscar_status models_folder(oscar_context *context, char *path, size_t room);

/* Name i of the catalogue, NULL past its end; `list` is ignored (for nearest_name). */
const char *model_name(const void *list, int i);

/* The file of a model given as a path or as a catalogue name: itself if it has a '/' or ends in ".gguf" or exists, else
 * <cache folder>/models/NAME.gguf. EXIT_DONE, or the exit code after a message that says how to fetch it. */
int model_locate(const char *given, char *path, size_t room);

/* What model_group and cache_group cannot check by themselves: there are CPUs for all threads; weights of a GPU were asked for
 * with a GPU; a model was given and is there; options->model_path becomes its file, kept in `path`. EXIT_DONE, or the exit code
 * after a message. */
int engine_options_resolve(const char *command, struct engine_options *options, char *path, size_t room);

/* What speculation_group was given, as options of the engine; the file of a draft model is kept in `path`. EXIT_DONE, or the exit
 * code after a message. */
int speculation_resolve(const char *command, const struct speculation_arguments *arguments, struct engine_options *options,
                        char *path, size_t room);

/* A model without a cache: for commands that look at it or fit codecs to it. */
struct loaded_model {
  oscar_context *context;
  oscar_cuda *cuda; /* NULL: the CPU */
  struct backend *backend;
  struct model *model;
};
/* The model of options->model_path, a file, on their device and with their threads. EXIT_DONE, or the exit code after a message;
 * everything is freed then. */
int loaded_model_open(const struct engine_options *options, struct loaded_model *loaded);
void loaded_model_close(struct loaded_model *loaded);
/* What computes it: the backend's kernels and attention's, separated by "; ". */
void loaded_model_describe(const struct loaded_model *loaded, char *text, size_t bytes);

#endif
