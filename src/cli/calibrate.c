/* calibrate.c - `oscar calibrate`: fits the codecs of one KV type to a model and keeps them in a file. */
#include "cli/models.h"
#include "cli/options.h"
#include "cli/progress.h"

#include "base/file.h"

#include <limits.h>
#include <oscar/rotation.h>
#include <stdlib.h>
#include <string.h>

struct calibrate_arguments {
  const char *text, *output, *recipe, *values, *layers;
  float bits;
  int tokens, window;
  char kv[32]; /* the recipe with its bits */
};

static const char *recipe_name(int i) {
  int count;
  const struct kv_type *types = kv_type_list(&count);
  for (int t = 0; t < count; t++)
    if (types[t].kind == KV_FITTED && i-- == 0) return types[t].name;
  return NULL;
}

static const char *objective_name(int i) {
  static const char *const names[] = {"output", "proxy"};
  return i < (int)ARRAY_LENGTH(names) ? names[i] : NULL;
}

static const char *layers_name(int i) {
  static const char *const names[] = {"equal", "measured"};
  return i < (int)ARRAY_LENGTH(names) ? names[i] : NULL;
}

#define AT(field) offsetof(struct calibrate_arguments, field)
static const struct option_spec options[] = {
    {"file", 'f', OPTION_TEXT, AT(text), "TEXT", .help = "the text to learn from; '-': standard input",
     .default_text = "the one that ships with the program"},
    {"output", 'o', OPTION_TEXT, AT(output), "FILE", .help = "where the codecs go",
     .default_text = "the user's cache folder, where every command finds them"},
    {"recipe", 0, OPTION_TEXT, AT(recipe), "TYPE", .help = "the KV type to fit: int2, int2-centred, int2-oscar, int4",
     .choice = recipe_name},
    {"bits", 0, OPTION_FLOAT, AT(bits), "B",
     .help = "bits of the codes of int2 per element, keys and values of all layers on average", KV_LEAST_BITS, KV_MOST_BITS,
     .default_text = "2"},
    {"values", 0, OPTION_TEXT, AT(values), "NAME",
     .help =
         "what the values of int2-oscar are fitted to: 'output' (exact second moment of the attention output) or 'proxy' (the "
         "statistic of the published code, one more pass)",
     .choice = objective_name},
    {"layers", 0, OPTION_TEXT, AT(layers), "NAME",
     .help = "how int2's crumbs for keys are spread over layers: 'equal', or 'measured', by what errors in each layer cost the "
             "model's predictions (one short pass per layer)",
     .choice = layers_name},
    {"tokens", 0, OPTION_INT, AT(tokens), "N", .help = "most tokens to use", 1, 1 << 30, .default_text = "the whole text"},
    {"window", 0, OPTION_INT, AT(window), "N", .help = "tokens of an independent sequence", 64, 1 << 20,
     .default_text = "4096, or what the model was trained for"},
};

static const struct usage usage = {
    .command = "calibrate",
    .operands = "",
    .about =
        "Runs a text through a model with an exact cache, gathers what its attention does, and fits rotations to it. The other "
        "commands do this by themselves on first use; calibrate is for a text, a recipe or a place of your own.",
    .examples = "oscar calibrate -m smollm2-135m\n"
                "oscar calibrate -m model.gguf -f my-domain.txt --tokens 20000 -o my.safetensors\n"
                "oscar run -m model.gguf --rotation my.safetensors -p 'Once'\n",
};

static int check(const struct calibrate_arguments *a) {
  bool proxy = strcmp(a->values, "proxy") == 0;
  if (proxy && strcmp(a->recipe, "int2-oscar") != 0)
    return wrong_use("calibrate: --values proxy belongs to --recipe int2-oscar, not to %s", a->recipe);
  return EXIT_DONE;
}

/* Where the file goes, with its folder made if it is ours. */
static oscar_status output_path(const struct loaded_model *loaded, const struct calibrate_arguments *a, char *path, size_t room) {
  oscar_context *context = loaded->context;
  if (a->output) {
    if ((size_t)snprintf(path, room, "%s", a->output) < room) return OSCAR_OK;
    return set_error(context, OSCAR_INVALID_ARGUMENT, "%s: the path is too long", a->output);
  }
  oscar_status status = rotation_cache_path(context, model_fingerprint(loaded->model), a->kv, path, room);
  return status == OSCAR_OK ? file_make_folder_of(context, path) : status;
}

/* A fit takes a while: a place that cannot be written is better found before it. */
static oscar_status try_to_write(oscar_context *context, const char *path) {
  struct file_writer writer;
  oscar_status status = file_writer_open(context, path, &writer);
  if (status == OSCAR_OK) file_writer_abort(context, &writer);
  return status;
}

static oscar_status fit(const struct loaded_model *loaded, struct calibrate_arguments *a, const char *text, size_t bytes,
                        char *path, size_t room) {
  struct calibrate_options calibration;
  calibrate_options_default(&calibration);
  if (text) {
    calibration.text = text;
    calibration.text_bytes = bytes;
  }
  if (a->tokens) calibration.max_tokens = a->tokens;
  if (a->window) calibration.window = a->window;
  calibration.measure_layers = strcmp(a->layers, "measured") == 0;
  calibration.proxy_values = strcmp(a->values, "proxy") == 0;

  struct progress_line line;
  oscar_codec_set *set = NULL;
  const char *kv = a->kv;
  oscar_status status = kv_type_with_bits(loaded->context, a->recipe, a->bits, a->kv, sizeof a->kv);
  if (status == OSCAR_OK) status = output_path(loaded, a, path, room);
  if (status == OSCAR_OK) status = try_to_write(loaded->context, path);
  if (status != OSCAR_OK) return status;
  progress_begin(&line);
  status = calibrate_model(loaded->model, &calibration, &line.progress, 1, &kv, &set);
  progress_end(&line);
  if (status == OSCAR_OK) status = oscar_codec_set_save(set, path);
  oscar_codec_set_free(set);
  return status;
}

int command_calibrate(int argc, char **argv) {
  struct engine_options engine;
  engine_options_default(&engine);
  struct calibrate_arguments a = {.recipe = "int2", .values = "output", .layers = "equal"};
  const struct option_group groups[] = {model_group(&engine), {"Calibration", options, (int)ARRAY_LENGTH(options), &a}};
  int first, code;
  if (!args_parse(&usage, groups, (int)ARRAY_LENGTH(groups), argc, argv, &first, &code)) return code;
  char model_path[PATH_MAX], path[PATH_MAX];
  if ((code = check(&a)) != EXIT_DONE) return code;
  if ((code = engine_options_resolve("calibrate", &engine, model_path, sizeof model_path)) != EXIT_DONE) return code;

  char *text = NULL;
  size_t bytes = 0;
  struct loaded_model loaded;
  if (a.text && !read_text(a.text, &text, &bytes)) return EXIT_FAILED;
  interrupt_watch();
  code = loaded_model_open(&engine, &loaded);
  if (code == EXIT_DONE) {
    oscar_status status = fit(&loaded, &a, text, bytes, path, sizeof path);
    if (status == OSCAR_OK)
      printf("%s codecs of %s: %s\n", a.kv, model_geometry_of(loaded.model)->name, path);
    else
      code = failed_with(status, oscar_last_error(loaded.context));
    loaded_model_close(&loaded);
  }
  free(text);
  return code;
}
