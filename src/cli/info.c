/*
 * info.c - `oscar info`: what a model is and what each form of its cache costs on this machine; or what a codec file holds.
 *
 * Sizes are those of the cache itself (oscar_cache_bytes_for), so what is predicted here is what the other commands ask for. A
 * fitted KV type whose codecs are not there yet is counted with scale and zero per row, the form in which it would be fitted.
 *
 * What a run holds in all, once its context is full, is the sum of
 *     the model's file        mapped; all of it but an embedding that is read by rows (model_resident_bytes)
 *     the cache               its whole budget
 *     codecs                  encode, decode and map of every distinct one
 *     buffers                 of a chunk's forward pass, of attention, of the session with its sampler
 *     a draft model           with --draft-model: its weights, its exact cache and its buffers
 *     program and tokenizer   what this process holds now, and what the product library adds once it is used
 * The run that fits codecs holds before that what fitting needs: no session, but an exact cache, statistics and the codecs of all
 * fitted types. With --device cuda the sum is of the GPU's memory, where program and tokenizer are not. tests/cli/test_memory.c
 * holds the sum to what `oscar run` really takes.
 */
#include "cli/memory.h"
#include "cli/models.h"
#include "cli/options.h"

#include "base/file.h"
#include "engine/speculate.h"

#include <jansson.h>
#include <limits.h>
#include <oscar/rotation.h>
#include <string.h>
#include <unistd.h>

enum {
  MOST_TYPES = 16,
  LIBRARY_BYTES = 3 << 20, /* oneDNN's code, its own and what it generates for a model's products (measured with 2.6) */
  TILE_ROWS = 64           /* query rows that a thread of attention works on at a time */
};

struct kv_report {
  const char *name;
  bool fitted_now;   /* sizes are those of the codec file in the cache folder */
  bool fitted_later; /* there is no such file yet: the first run makes it */
  double codec_bytes;
  double bits_per_element; /* of coded pages */
  double token_bytes;      /* that a token adds once it is coded, all layers, K and V */
  double cache_bytes;      /* for `context` tokens of one sequence */
  double total_bytes;      /* with weights, codecs, scratch memory and the program itself */
  double first_run_bytes;  /* the same for a first run that fits codecs; otherwise total_bytes */
  int64_t longest_context; /* that fits into the memory now available */
};

struct model_report {
  const struct model_geometry *geometry;
  const char *fingerprint;
  char backend[256];
  double weight_bytes, model_bytes, scratch_bytes, program_bytes, available_bytes; /* model: in memory */
  double draft_bytes;                                                              /* 0: there is none */
  struct engine_options options;                                                   /* effective */
  int count;
  struct kv_report kv[MOST_TYPES];
};

static const struct usage usage = {
    .command = "info",
    .operands = "MODEL|FILE",
    .min_operands = 0, /* -m is taken too */
    .max_operands = 1,
    .about = "Shows what a model is, the settings in effect, the kernels chosen, and for every form of the cache what a context "
             "costs and how much fits into this machine's memory. Given a codec file, shows what it holds.",
    .examples = "oscar info smollm2-135m\n"
                "oscar info model.gguf -c 32768 --recent 512\n"
                "oscar info my.safetensors --json\n",
};

/* ---- gathering ---- */

/* Crumbs of a channel by the type's name: int8 has 4, int4 2, all int2 forms 1. */
static int crumbs_of(const char *kv) { return (kv[3] - '0') / 2; }

/* A set of the size that graded codes of 2 bits have: one word of metadata a row. */
static oscar_status graded_stand_in(oscar_context *context, const oscar_codec_set_info *info, oscar_codec_set **set) {
  const oscar_codec_spec spec = {.head_dim = info->head_dim, .channels = info->head_dim, .form = OSCAR_ROW_GAIN, .groups = 1};
  oscar_codec *codec = NULL;
  oscar_status status = oscar_codec_create(context, &spec, &codec);
  if (status == OSCAR_OK) status = oscar_codec_set_create(context, info, set);
  for (int i = 0; status == OSCAR_OK && i < info->layers * info->kv_heads * 2; i++)
    status = oscar_codec_set_assign(*set, i / 2 / info->kv_heads, i / 2 % info->kv_heads, (oscar_side)(i % 2), codec);
  oscar_codec_release(codec);
  return status;
}

/* The codecs to count with: the stored ones of a fitted type, else a set of the same size. NULL for bf16. */
static oscar_status codecs_to_count(const struct loaded_model *loaded, const struct kv_type *type, struct kv_report *report,
                                    oscar_codec_set **set) {
  *set = NULL;
  if (type->kind == KV_EXACT) return OSCAR_OK;
  char path[PATH_MAX];
  const char *fingerprint = model_fingerprint(loaded->model);
  const struct model_geometry *g = model_geometry_of(loaded->model);
  if (type->kind == KV_FITTED && rotation_cache_path(loaded->context, fingerprint, type->name, path, sizeof path) == OSCAR_OK &&
      access(path, R_OK) == 0 && oscar_codec_set_load(loaded->context, path, set) == OSCAR_OK) {
    report->fitted_now = true;
    return OSCAR_OK;
  }
  const oscar_codec_set_info info = {g->layers, g->kv_heads, g->head_dim, type->name, "", ""};
  const oscar_plain_options plain = {false, crumbs_of(type->name), 0, 1, 1};
  report->fitted_later = type->kind == KV_FITTED;
  if (type->in_bits) return graded_stand_in(loaded->context, &info, set);
  return oscar_codec_set_create_plain(loaded->context, &info, &plain, set);
}

static double coded_token_bytes(const oscar_codec_set *set) {
  const oscar_codec_set_info *info = oscar_codec_set_describe(set);
  double bytes = 0;
  for (int layer = 0; layer < info->layers; layer++)
    for (int head = 0; head < info->kv_heads; head++)
      for (int side = 0; side < 2; side++)
        bytes += (double)oscar_codec_row_bytes(oscar_codec_set_get(set, layer, head, (oscar_side)side));
  return bytes;
}

/* Rows of the map that kernels use (quant/codec.h). */
static int map_rows_of(const oscar_codec *codec) {
  const oscar_codec_spec *spec = oscar_codec_describe(codec);
  return (int)round_up((size_t)(oscar_codec_crumbs(codec) + spec->groups + 1 + 2 * spec->rotating_pairs), 16);
}

/* Memory of the codecs: each distinct one has a mean, encode and decode matrices and the map that kernels use. A set that stands
 * for one still to be fitted shares a codec that heads will have for themselves. */
static double codec_table_bytes(const oscar_codec_set *set, bool fitted_later) {
  const oscar_codec_set_info *info = oscar_codec_set_describe(set);
  double bytes = 0;
  const oscar_codec *last[2] = {NULL, NULL};
  for (int layer = 0; layer < info->layers; layer++)
    for (int head = 0; head < info->kv_heads; head++)
      for (int side = 0; side < 2; side++) {
        const oscar_codec *codec = oscar_codec_set_get(set, layer, head, (oscar_side)side);
        if (codec == last[side] && !fitted_later) continue; /* shared by the heads */
        last[side] = codec;
        const oscar_codec_spec *spec = oscar_codec_describe(codec);
        size_t map_rows = (size_t)map_rows_of(codec);
        bytes += 4.0 * ((double)map_rows + 2.0 * spec->channels) * spec->head_dim;
      }
  return bytes;
}

/* Attention: per thread a tile's queries (plain, mapped, prepared), sums and scores, and a page expanded to float. */
static double attention_bytes(const oscar_codec_set *set, const struct model_report *model, int threads) {
  double d = model->geometry->head_dim, map_rows = 0;
  if (set) {
    const oscar_codec *codec = oscar_codec_set_get(set, 0, 0, OSCAR_KEYS);
    map_rows = map_rows_of(codec);
  }
  return 4.0 * threads * TILE_ROWS * (2 * d + 3 * map_rows + OSCAR_PAGE_TOKENS + (map_rows > d ? map_rows : d));
}

/* The largest context whose cache fits into `room` bytes, found by doubling and halving; 0 if not even one token does. */
static int64_t longest_context(const oscar_cache_options *options, int chunk, double room) {
  int64_t fits = 0, step = (int64_t)1 << 34;
  for (; step >= 1; step /= 2) {
    size_t bytes = oscar_cache_bytes_for(options, fits + step, 1, chunk);
    if (bytes > 0 && (double)bytes <= room) fits += step;
  }
  return fits;
}

static oscar_status report_kv(const struct loaded_model *loaded, const struct kv_type *type, const struct model_report *model,
                              struct kv_report *report) {
  *report = (struct kv_report){.name = type->name};
  const struct model_geometry *g = model->geometry;
  double elements = 2.0 * g->layers * g->kv_heads * g->head_dim;
  oscar_codec_set *set;
  oscar_status status = codecs_to_count(loaded, type, report, &set);
  if (status != OSCAR_OK) return status;
  oscar_cache_options cache;
  status = engine_cache_options(loaded->context, loaded->model, &model->options, set, &cache);
  if (status != OSCAR_OK) {
    oscar_codec_set_free(set);
    return status;
  }
  report->token_bytes = set ? coded_token_bytes(set) : 2 * elements;
  report->bits_per_element = 8 * report->token_bytes / elements;
  report->cache_bytes = (double)oscar_cache_bytes_for(&cache, model->options.context, 1, model->options.chunk);
  double fixed = model->model_bytes + model->scratch_bytes + model->program_bytes + model->draft_bytes;
  fixed += attention_bytes(set, model, oscar_context_threads(loaded->context));
  if (set) report->codec_bytes = codec_table_bytes(set, report->fitted_later);
  fixed += report->codec_bytes;
  report->total_bytes = fixed + report->cache_bytes;
  double room = model->available_bytes - fixed;
  report->longest_context = longest_context(&cache, model->options.chunk, room);
  oscar_codec_set_free(set);
  return OSCAR_OK;
}

/* What fitting takes at its end, when all sets are there. */
static void report_first_runs(const struct loaded_model *loaded, struct model_report *r) {
  double fitting = r->model_bytes + r->program_bytes + (double)model_scratch_bytes(loaded->model, r->options.chunk, 0) +
                   (double)calibrate_bytes(loaded->model);
  if (loaded->cuda) fitting = 0; /* that is in the host's memory */
  for (int i = 0; !loaded->cuda && i < r->count; i++)
    fitting += kv_type_find(r->kv[i].name)->kind == KV_FITTED ? r->kv[i].codec_bytes : 0;
  for (int i = 0; i < r->count; i++) {
    struct kv_report *kv = &r->kv[i];
    kv->first_run_bytes = kv->fitted_later && fitting > kv->total_bytes ? fitting : kv->total_bytes;
  }
}

static oscar_status report_draft(const struct loaded_model *loaded, struct model_report *report) {
  const struct engine_options *o = &report->options;
  struct draft *draft;
  if (o->guesses == 0 || !o->draft_path) return OSCAR_OK;
  oscar_status status = draft_create(loaded->model, o->draft_path, DRAFT_KV, o->context, 1, &draft);
  if (status != OSCAR_OK) return status;
  report->draft_bytes = (double)draft_bytes(draft);
  draft_free(draft);
  return OSCAR_OK;
}

/* On a GPU its memory is what counts: what is free, and what the model already takes. The program is in the host's. */
static void report_gpu(const struct loaded_model *loaded, struct model_report *report) {
  oscar_cuda_info gpu;
  oscar_cuda_describe(loaded->cuda, &gpu);
  report->program_bytes = 0;
  report->model_bytes = (double)model_packed_bytes(loaded->model);
  report->available_bytes = (double)backend_cuda_free_bytes(loaded->backend) + (double)gpu.allocated_bytes;
}

static oscar_status report_model(const struct loaded_model *loaded, const struct engine_options *options,
                                 struct model_report *report) {
  *report = (struct model_report){.geometry = model_geometry_of(loaded->model), .options = *options};
  struct engine_options *o = &report->options;
  if (o->context == 0) o->context = report->geometry->context_trained;
  o->chunk = engine_chunk(o->chunk, loaded->cuda);
  if (o->context < o->chunk) o->chunk = (int)o->context;
  report->fingerprint = model_fingerprint(loaded->model);
  report->weight_bytes = (double)model_weight_bytes(loaded->model);
  report->model_bytes = (double)model_resident_bytes(loaded->model);
  report->program_bytes = memory_besides(options->model_path) - (double)model_packed_bytes(loaded->model) + LIBRARY_BYTES;
  if (loaded->cuda) report_gpu(loaded, report);
  report->scratch_bytes =
      (double)model_scratch_bytes(loaded->model, o->chunk, 0) + (double)session_bytes(loaded->model, o->context, o->guesses);
  if (!loaded->cuda) report->available_bytes = memory_available();
  loaded_model_describe(loaded, report->backend, sizeof report->backend);

  oscar_cache_options defaults;
  model_cache_options(loaded->model, &defaults);
  if (o->sink_tokens < 0) o->sink_tokens = defaults.sink_pages * OSCAR_PAGE_TOKENS;
  if (o->recent_tokens < 0) o->recent_tokens = defaults.recent_pages * OSCAR_PAGE_TOKENS;

  int count;
  const struct kv_type *types = kv_type_list(&count);
  oscar_status status = report_draft(loaded, report);
  for (int i = 0; status == OSCAR_OK && i < count; i++)
    if (types[i].kind != KV_EVALUATION) status = report_kv(loaded, &types[i], report, &report->kv[report->count++]);
  if (status == OSCAR_OK) report_first_runs(loaded, report);
  return status;
}

/* ---- printing ---- */

static void print_model(const struct loaded_model *loaded, const struct model_report *r) {
  const struct model_geometry *g = r->geometry;
  const struct engine_options *o = &r->options;
  char a[32], b[32];
  printf("Model        %s (%s), %.1f M parameters, %s\n", g->name, g->architecture, (double)g->parameters * 1e-6,
         format_bytes(r->weight_bytes, a, sizeof a));
  printf("             %d layers, %d query and %d KV heads of %d, embedding %d, vocabulary %d, trained for %lld tokens\n",
         g->layers, g->query_heads, g->kv_heads, g->head_dim, g->embedding, g->vocab, (long long)g->context_trained);
  printf("Fingerprint  %s\n", r->fingerprint);
  printf("Kernels      %s, %d threads; %s\n", oscar_isa_name(oscar_context_isa(loaded->context)),
         oscar_context_threads(loaded->context), r->backend);
  printf("Settings     --ctx %lld --sink %d --recent %d --chunk %d\n", (long long)o->context, o->sink_tokens, o->recent_tokens,
         o->chunk);
  printf("Memory       %s available now\n", format_bytes(r->available_bytes, a, sizeof a));
  printf("             in all = cache and its codecs, %s of the model, ", format_bytes(r->model_bytes, a, sizeof a));
  printf("%s of buffers, ", format_bytes(r->scratch_bytes, a, sizeof a));
  printf("%s of program and tokenizer\n", format_bytes(r->program_bytes, a, sizeof a));
  if (r->draft_bytes > 0)
    printf("             and %s of the draft model with its cache\n", format_bytes(r->draft_bytes, a, sizeof a));
  putchar('\n');
  printf("%-14s %9s %12s %12s %12s %14s\n", "--kv", "bits", "per token", "cache", "in all", "tokens that fit");
  for (int i = 0; i < r->count; i++) {
    const struct kv_report *kv = &r->kv[i];
    printf("%-14s %9.3f %10.0f B %12s", kv->name, kv->bits_per_element, kv->token_bytes,
           format_bytes(kv->cache_bytes, a, sizeof a));
    printf(" %12s %14lld", format_bytes(kv->total_bytes, b, sizeof b), (long long)kv->longest_context);
    if (kv->fitted_now) printf("  fitted");
    if (kv->fitted_later) printf("  first run, which fits codecs: %s", format_bytes(kv->first_run_bytes, a, sizeof a));
    putchar('\n');
  }
}

static json_t *kv_json(const struct kv_report *kv) {
  return json_pack("{s:s, s:f, s:f, s:I, s:I, s:I, s:I, s:b}", "kv", kv->name, "coded_bits_per_element", kv->bits_per_element,
                   "coded_bytes_per_token", kv->token_bytes, "cache_bytes", (json_int_t)kv->cache_bytes, "total_bytes",
                   (json_int_t)kv->total_bytes, "first_run_bytes", (json_int_t)kv->first_run_bytes, "longest_context",
                   (json_int_t)kv->longest_context, "fitted", kv->fitted_now);
}

/* Takes the object over. */
static int print_json(json_t *object) {
  int code = EXIT_DONE;
  if (!object || json_dumpf(object, stdout, JSON_INDENT(2) | JSON_REAL_PRECISION(9)) != 0)
    code = failed("the JSON could not be written");
  else
    putchar('\n');
  json_decref(object);
  return code;
}

static int print_model_json(const struct loaded_model *loaded, const struct model_report *r) {
  const struct model_geometry *g = r->geometry;
  json_t *types = json_array();
  for (int i = 0; i < r->count; i++) json_array_append_new(types, kv_json(&r->kv[i]));
  json_t *model =
      json_pack("{s:s%, s:s, s:s, s:I, s:I, s:i, s:i, s:i, s:i, s:i, s:i, s:i, s:I}", "name", g->name, strlen(g->name),
                "architecture", g->architecture, "fingerprint", r->fingerprint, "parameters", (json_int_t)g->parameters,
                "weight_bytes", (json_int_t)r->weight_bytes, "layers", g->layers, "query_heads", g->query_heads, "kv_heads",
                g->kv_heads, "head_dim", g->head_dim, "embedding", g->embedding, "feed_forward", g->feed_forward, "vocabulary",
                g->vocab, "context_trained", (json_int_t)g->context_trained);
  json_t *settings =
      json_pack("{s:I, s:i, s:i, s:i, s:i, s:s, s:s}", "context", (json_int_t)r->options.context, "sink", r->options.sink_tokens,
                "recent", r->options.recent_tokens, "chunk", r->options.chunk, "threads", oscar_context_threads(loaded->context),
                "isa", oscar_isa_name(oscar_context_isa(loaded->context)), "backend", r->backend);
  return print_json(json_pack("{s:o, s:o, s:I, s:I, s:I, s:I, s:I, s:o}", "model", model, "settings", settings, "model_bytes",
                              (json_int_t)r->model_bytes, "scratch_bytes", (json_int_t)r->scratch_bytes, "program_bytes",
                              (json_int_t)r->program_bytes, "draft_bytes", (json_int_t)r->draft_bytes, "available_bytes",
                              (json_int_t)r->available_bytes, "kv", types));
}

static int info_model(const struct engine_options *options, bool json) {
  struct loaded_model loaded;
  struct model_report report;
  int code = loaded_model_open(options, &loaded);
  if (code != EXIT_DONE) return code;
  oscar_status status = report_model(&loaded, options, &report);
  if (status != OSCAR_OK)
    code = failed_with(status, oscar_last_error(loaded.context));
  else if (json)
    code = print_model_json(&loaded, &report);
  else
    print_model(&loaded, &report);
  loaded_model_close(&loaded);
  return code;
}

/* ---- codec files ---- */

static int print_set(const oscar_codec_set *set, const char *path, bool json) {
  const oscar_codec_set_info *info = oscar_codec_set_describe(set);
  double bytes = coded_token_bytes(set), bits = 8 * bytes / (2.0 * info->layers * info->kv_heads * info->head_dim);
  if (json)
    return print_json(json_pack("{s:s, s:s, s:s, s:s, s:i, s:i, s:i, s:f, s:f}", "file", path, "recipe", info->recipe,
                                "fingerprint", info->fingerprint, "provenance", info->provenance, "layers", info->layers,
                                "kv_heads", info->kv_heads, "head_dim", info->head_dim, "coded_bytes_per_token", bytes,
                                "coded_bits_per_element", bits));
  printf("Codecs       %s: %s\n", info->recipe, path);
  printf("Geometry     %d layers, %d KV heads of %d\n", info->layers, info->kv_heads, info->head_dim);
  printf("Fitted to    %s\n", *info->fingerprint ? info->fingerprint : "any model of this geometry");
  printf("Size         %.3f bits per element, %.0f bytes per token\n", bits, bytes);
  printf("Provenance   %s\n", *info->provenance ? info->provenance : "unknown");
  return EXIT_DONE;
}

static int print_published(const oscar_rotation_file *file, const char *path, bool json) {
  const oscar_rotation_layer *first = file->layers ? &file->layer[0] : NULL;
  double worst = 0;
  for (int i = 0; i < file->layers; i++)
    for (int h = 0; h < file->layer[i].heads; h++) {
      size_t at = (size_t)h * (size_t)file->head_dim * (size_t)file->head_dim;
      double off = oscar_rotation_orthogonality(file->head_dim, file->layer[i].rotation + at);
      if (off > worst) worst = off;
    }
  if (json)
    return print_json(json_pack("{s:s, s:s, s:s, s:s, s:i, s:i, s:i, s:b, s:f}", "file", path, "format_version",
                                file->format_version, "objective", file->objective, "source_grouping", file->source_grouping,
                                "head_dim", file->head_dim, "layers", file->layers, "heads", first ? first->heads : 0, "means",
                                first && first->mean, "orthogonality", worst));
  printf("Rotations    format %s, objective %s, grouped by %s: %s\n", file->format_version, file->objective,
         file->source_grouping, path);
  printf("Geometry     %d layers, head_dim %d, %s per layer%s\n", file->layers, file->head_dim,
         first && first->heads > 1 ? "one rotation per KV head" : "one rotation", first && first->mean ? ", with means" : "");
  printf("Orthogonal   to %.1e\n", worst);
  return EXIT_DONE;
}

enum file_kind { FILE_MODEL, FILE_PUBLISHED, FILE_CODECS };

/* By the first bytes: GGUF models say so, PyTorch files are zips, safetensors files start with a length. */
static oscar_status kind_of(oscar_context *context, const char *path, enum file_kind *kind) {
  struct file_map map;
  oscar_status status = file_map_open(context, path, &map);
  if (status != OSCAR_OK) return status;
  *kind = map.bytes >= 4 && memcmp(map.data, "GGUF", 4) == 0 ? FILE_MODEL
          : map.bytes >= 2 && memcmp(map.data, "PK", 2) == 0 ? FILE_PUBLISHED
                                                             : FILE_CODECS;
  file_map_close(&map);
  return OSCAR_OK;
}

static int info_codecs(oscar_context *context, const char *path, bool json) {
  oscar_codec_set *set = NULL;
  oscar_status status = oscar_codec_set_load(context, path, &set);
  if (status == OSCAR_OK) status = oscar_codec_set_check(set);
  int code = status == OSCAR_OK ? print_set(set, path, json) : failed_with(status, oscar_last_error(context));
  oscar_codec_set_free(set);
  return code;
}

static int info_published(oscar_context *context, const char *path, bool json) {
  oscar_rotation_file *file = NULL;
  oscar_status status = oscar_rotation_file_read(context, path, &file);
  if (status != OSCAR_OK) return failed_with(status, oscar_last_error(context));
  int code = print_published(file, path, json);
  oscar_rotation_file_free(context, file);
  return code;
}

static int info_file(const struct engine_options *options, bool json) {
  oscar_context *context;
  enum file_kind kind;
  oscar_status status = oscar_context_create(NULL, &context);
  if (status != OSCAR_OK) return failed_with(status, NULL);
  status = kind_of(context, options->model_path, &kind);
  int code;
  if (status != OSCAR_OK)
    code = failed_with(status, oscar_last_error(context));
  else if (kind == FILE_MODEL)
    code = info_model(options, json);
  else if (kind == FILE_PUBLISHED)
    code = info_published(context, options->model_path, json);
  else
    code = info_codecs(context, options->model_path, json);
  oscar_context_free(context);
  return code;
}

int command_info(int argc, char **argv) {
  struct engine_options engine;
  struct output_arguments output = {0};
  struct speculation_arguments speculation;
  engine_options_default(&engine);
  const struct option_group groups[] = {model_group(&engine), window_group(&engine), speculation_group(&speculation),
                                        output_group(&output)};
  int first, code;
  if (!args_parse(&usage, groups, (int)ARRAY_LENGTH(groups), argc, argv, &first, &code)) return code;
  if (first < argc && engine.model_path) return wrong_use("info: give the model once, as '%s' or with -m", argv[first]);
  if (first < argc) engine.model_path = argv[first];
  char path[PATH_MAX], draft_path[PATH_MAX];
  if ((code = engine_options_resolve("info", &engine, path, sizeof path)) != EXIT_DONE) return code;
  if ((code = speculation_resolve("info", &speculation, &engine, draft_path, sizeof draft_path)) != EXIT_DONE) return code;
  return info_file(&engine, output.json);
}
