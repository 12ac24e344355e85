/* import.c - `oscar import`: a published pair of rotation files, checked against a model, becomes a codec file. */
#include "engine/json_text.h"
#include "cli/models.h"
#include "cli/options.h"

#include <limits.h>
#include <oscar/rotation.h>
#include <stdlib.h>
#include <string.h>

struct import_arguments {
  const char *keys, *values, *output;
  float clip_keys, clip_values;
  int group;
};

#define AT(field) offsetof(struct import_arguments, field)
static const struct option_spec options[] = {
    {"keys", 0, OPTION_TEXT, AT(keys), "FILE", .help = "the rotations of the keys, a .pt file of format 1 or 2"},
    {"values", 0, OPTION_TEXT, AT(values), "FILE", .help = "those of the values"},
    {"output", 'o', OPTION_TEXT, AT(output), "FILE", .help = "where the codecs go"},
    {"clip-keys", 0, OPTION_FLOAT, AT(clip_keys), "R", .help = "share of a row's key channels that is not clipped", 0.01, 1},
    {"clip-values", 0, OPTION_FLOAT, AT(clip_values), "R", .help = "the same for values", 0.01, 1},
    {"group", 0, OPTION_INT, AT(group), "N", .help = "channels with a scale and zero of their own, a power of two from 16 on", 16,
     1 << 16, .default_text = "all of a head"},
};

static const struct usage usage = {
    .command = "import",
    .operands = "",
    .about =
        "Turns rotation files as the OSCAR reference publishes them, one for keys and one for values, into a codec file of type "
        "int2-oscar for one model. Nothing in the files is executed. Files for another number of layers or head dimension are "
        "refused.",
    .examples = "oscar import -m model.gguf --keys k_rotation.pt --values v_rotation.pt -o published.safetensors\n"
                "oscar run -m model.gguf --kv int2-oscar --rotation published.safetensors -p 'Once'\n",
};

static int check(const struct import_arguments *a) {
  if (!a->keys || !a->values) return wrong_use("import: which files? --keys FILE --values FILE");
  if (!a->output) return wrong_use("import: where to? -o FILE");
  return EXIT_DONE;
}

/* JSON, freed with free(); NULL when out of memory. */
static char *provenance_of(const struct import_arguments *a, const oscar_rotation_file *keys, const oscar_rotation_file *values) {
  json_t *root = json_pack("{s:s, s:s, s:{s:o, s:o, s:o, s:o, s:f, s:f, s:i}}", "program", "oscar", "version", oscar_version(),
                           "import", "keys", json_text(last_part(a->keys), strlen(last_part(a->keys))), "values",
                           json_text(last_part(a->values), strlen(last_part(a->values))), "key_objective",
                           json_text(keys->objective, strlen(keys->objective)), "value_objective",
                           json_text(values->objective, strlen(values->objective)), "clip_keys", (double)a->clip_keys,
                           "clip_values", (double)a->clip_values, "group", a->group);
  char *text = root ? json_dumps(root, JSON_COMPACT | JSON_SORT_KEYS | JSON_REAL_PRECISION(7)) : NULL;
  json_decref(root);
  return text;
}

static oscar_status make_set(const struct loaded_model *loaded, const struct import_arguments *a, const oscar_rotation_file *keys,
                             const oscar_rotation_file *values, oscar_codec_set **set) {
  const struct model_geometry *g = model_geometry_of(loaded->model);
  char *provenance = provenance_of(a, keys, values);
  if (!provenance) return set_error(loaded->context, OSCAR_NO_MEMORY, "out of memory writing the provenance of an import");
  const oscar_codec_set_info info = {g->layers, g->kv_heads, g->head_dim, "int2-oscar", model_fingerprint(loaded->model),
                                     provenance};
  oscar_status status = oscar_codec_set_import(loaded->context, &info, keys, values, a->group, a->clip_keys, a->clip_values, set);
  free(provenance);
  if (status == OSCAR_OK) return oscar_codec_set_check(*set);
  return prefix_error(loaded->context, status, "%s and %s for %s", last_part(a->keys), last_part(a->values), g->name);
}

static oscar_status import(const struct loaded_model *loaded, const struct import_arguments *a) {
  oscar_context *context = loaded->context;
  oscar_rotation_file *keys = NULL, *values = NULL;
  oscar_codec_set *set = NULL;
  oscar_status status = oscar_rotation_file_read(context, a->keys, &keys);
  if (status == OSCAR_OK) status = oscar_rotation_file_read(context, a->values, &values);
  if (status == OSCAR_OK) status = make_set(loaded, a, keys, values, &set);
  if (status == OSCAR_OK) status = oscar_codec_set_save(set, a->output);
  oscar_codec_set_free(set);
  oscar_rotation_file_free(context, values);
  oscar_rotation_file_free(context, keys);
  return status;
}

int command_import(int argc, char **argv) {
  struct engine_options engine;
  engine_options_default(&engine);
  struct import_arguments a = {.clip_keys = 0.96f, .clip_values = 0.92f};
  const struct option_group groups[] = {model_group(&engine), {"Import", options, (int)ARRAY_LENGTH(options), &a}};
  int first, code;
  if (!args_parse(&usage, groups, (int)ARRAY_LENGTH(groups), argc, argv, &first, &code)) return code;
  char model_path[PATH_MAX];
  if ((code = check(&a)) != EXIT_DONE) return code;
  if ((code = engine_options_resolve("import", &engine, model_path, sizeof model_path)) != EXIT_DONE) return code;
  struct loaded_model loaded;
  if ((code = loaded_model_open(&engine, &loaded)) != EXIT_DONE) return code;
  oscar_status status = import(&loaded, &a);
  if (status == OSCAR_OK)
    printf("int2-oscar codecs of %s: %s\n", model_geometry_of(loaded.model)->name, a.output);
  else
    code = failed_with(status, oscar_last_error(loaded.context));
  loaded_model_close(&loaded);
  return code;
}
