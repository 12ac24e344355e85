/*
 * calibrate.c - a text through the exact model, and the codec sets fitted to what its attention saw.
 *
 * The text is cut into windows of the length the model is used at; each is a sequence of its own on a cache that never demotes,
 * fed in chunks. An observer hands every layer's q, k, v and output to the statistics, so one pass serves all KV types; only the
 * proxy value objective needs a second one. Logits are never computed.
 *
 * A set says where it comes from: its provenance holds the hash of the text, the tokens, the window and the settings of the fit.
 */
#include "engine/calibrate.h"
#include "engine/sensitivity.h"

#include <jansson.h>
#include <openssl/evp.h>
#include <oscar/calib.h>
#include <stdlib.h>
#include <string.h>

extern const unsigned char calibration_text_data[];
extern const size_t calibration_text_data_bytes;

enum {
  DEFAULT_WINDOW = 4096,
  SERVED_POSITIONS = 32768, /* that int2 is fitted for, where the model was trained for as many */
  SENSITIVITY_TOKENS = 128, /* run once per layer */
  CHUNK = 512 /* tokens per forward pass: large enough for the matrix products, small enough for activations to stay modest */
};

/* How each fitted KV type is fitted. Of the uniform ones, means are removed per head except in the published recipe; the clips
 * are the reference's (arXiv 2605.17757); with 15 steps instead of 3 a clip costs more than it saves. */
struct recipe {
  const char *kv;
  bool graded; /* oscar_calib_fit_graded with its defaults; else `uniform` */
  oscar_fit_options uniform;
};
static const struct recipe recipes[] = {
    {.kv = "int2", .graded = true},
    {"int2-centred", false, {true, true, OSCAR_VALUES_OUTPUT_MOMENT, 1, 0, 0.96f, 0.92f}},
    {"int2-oscar", false, {false, false, OSCAR_VALUES_OUTPUT_MOMENT, 1, 0, 0.96f, 0.92f}},
    {"int4", false, {true, true, OSCAR_VALUES_OUTPUT_MOMENT, 2, 0, 1.0f, 1.0f}},
};

/* What one KV name, bits and command line included, comes to. */
struct settings {
  const struct recipe *recipe;
  float bits;    /* of graded codes, keys and values on average */
  bool measured; /* graded codes: crumbs spread over layers */
  oscar_fit_options uniform;
};

/* One calibration on its way. */
struct run {
  oscar_context *context;
  struct model *model;
  const struct progress *progress;
  const char *text;
  size_t text_bytes;
  char sha256[65];
  int window, chunk;
  int32_t *ids; /* [count], the windows one after the other, each opened by BOS where the model wants it */
  int64_t count;
  int *lengths; /* [windows] tokens of each */
  int64_t windows;
  int64_t done, total; /* tokens, over all passes */
  oscar_calib *calib;
  oscar_cache *cache;
  struct runner *runner;
  bool graded;   /* a recipe of graded codes is among those to fit: they need more than the plain statistics */
  double *costs; /* [layers] what errors of a layer cost; NULL where nobody wants to know */
};

void calibrate_options_default(struct calibrate_options *options) { *options = (struct calibrate_options){0}; }

const char *calibration_text(size_t *bytes) {
  *bytes = calibration_text_data_bytes;
  return (const char *)calibration_text_data;
}

/* `kv` may end in "@BITS". */
static bool settings_find(const char *kv, struct settings *settings) {
  size_t length = strcspn(kv, "@");
  for (size_t i = 0; i < ARRAY_LENGTH(recipes); i++)
    if (strlen(recipes[i].kv) == length && strncmp(recipes[i].kv, kv, length) == 0) {
      *settings = (struct settings){&recipes[i], kv_type_bits(kv), false, recipes[i].uniform};
      return true;
    }
  return false;
}

/* ---- provenance ---- */

static oscar_status hash_text(struct run *run) {
  unsigned char digest[EVP_MAX_MD_SIZE];
  unsigned int bytes = 0;
  if (EVP_Digest(run->text, run->text_bytes, digest, &bytes, EVP_sha256(), NULL) != 1 || bytes != 32)
    return set_error(run->context, OSCAR_NO_MEMORY, "the SHA-256 of the calibration text could not be computed");
  for (unsigned int i = 0; i < bytes; i++) snprintf(run->sha256 + 2 * i, 3, "%02x", digest[i]);
  return OSCAR_OK;
}

static json_t *uniform_to_json(const oscar_fit_options *fit) {
  return json_pack("{s:b, s:b, s:s, s:i, s:i, s:f, s:f}", "per_head", (int)fit->per_head, "remove_means", (int)fit->remove_means,
                   "value_objective", fit->objective == OSCAR_VALUES_PROXY ? "proxy" : "output-moment", "crumbs_per_channel",
                   fit->crumbs_per_channel, "group", fit->group, "clip_keys", (double)fit->clip_keys, "clip_values",
                   (double)fit->clip_values);
}

static json_t *graded_to_json(float bits, bool measured) {
  oscar_graded_options o;
  oscar_attended_options a;
  oscar_graded_options_default(&o);
  oscar_attended_options_default(&a);
  enum { METHOD = 4 }; /* raised whenever the same settings come to give other codecs */
  return json_pack("{s:i, s:f, s:s, s:i, s:i, s:i, s:s, s:s, s:b, s:f, s:i, s:f, s:b, s:i}", "method", METHOD, "bits",
                   (double)bits, "layers", measured ? "measured" : "equal", "sink_pages", a.sink_pages, "recent_pages",
                   a.recent_pages, "query_stride", a.query_stride, "key_gains", o.key_form == OSCAR_ROW_LOG_GAINS ? "log" : "one",
                   "value_gains", o.value_form == OSCAR_ROW_LOG_GAINS ? "log" : "one", "rotating_mean", (int)o.rotating_mean,
                   "rotating_share", (double)o.rotating_share, "positions", SERVED_POSITIONS, "ridge", (double)o.ridge,
                   "unbiased_values", (int)o.unbiased_values, "mixing", o.mixing);
}

static json_t *fit_to_json(const struct settings *s) {
  return s->recipe->graded ? graded_to_json(s->bits, s->measured) : uniform_to_json(&s->uniform);
}

enum { PROVENANCE_FLAGS = JSON_COMPACT | JSON_SORT_KEYS | JSON_REAL_PRECISION(7) }; /* what a float holds: .96 stays .96 */

/* JSON text, freed with free(); NULL when out of memory. */
static char *provenance_of(const struct run *run, const struct settings *settings) {
  json_t *root = json_pack("{s:s, s:s, s:s, s:I, s:I, s:i, s:o*}", "program", "oscar", "version", oscar_version(), "text_sha256",
                           run->sha256, "text_bytes", (json_int_t)run->text_bytes, "tokens",
                           (json_int_t)oscar_calib_tokens(run->calib), "window", run->window, "fit", fit_to_json(settings));
  if (!root) return NULL;
  char *text = json_dumps(root, PROVENANCE_FLAGS);
  json_decref(root);
  return text;
}

/* Compared as text, in which numbers have been rounded on both sides. */
static bool same_fit(const json_t *stored, const struct settings *settings) {
  json_t *fit = fit_to_json(settings);
  char *a = json_dumps(stored, PROVENANCE_FLAGS), *b = json_dumps(fit, PROVENANCE_FLAGS);
  bool same = a && b && strcmp(a, b) == 0;
  free(a);
  free(b);
  json_decref(fit);
  return same;
}

/* The proxy objective and measured layers are choices of the command line for the same recipes: fits with them are current too.
 */
bool calibrate_is_current(const char *kv, const oscar_codec_set_info *info) {
  struct settings settings;
  if (!settings_find(kv, &settings) || strcmp(info->recipe, kv) != 0) return false;
  json_t *root = json_loads(info->provenance, 0, NULL);
  const json_t *fit = json_object_get(root, "fit");
  bool current = root && same_fit(fit, &settings);
  settings.uniform.objective = OSCAR_VALUES_PROXY;
  settings.measured = true;
  current = current || (root && same_fit(fit, &settings));
  json_decref(root);
  return current;
}

/* ---- the text as windows of tokens ---- */

static oscar_status choose_window(struct run *run, const struct calibrate_options *options) {
  int64_t trained = model_geometry_of(run->model)->context_trained;
  run->window = options->window ? options->window : (int)(trained < DEFAULT_WINDOW ? trained : DEFAULT_WINDOW);
  if (run->window < 2 || run->window > trained)
    return set_error(run->context, OSCAR_INVALID_ARGUMENT,
                     "calibration: a window of %d tokens; expected 2 to %lld, the context the model was trained for", run->window,
                     (long long)trained);
  run->chunk = run->window < CHUNK ? run->window : CHUNK;
  return OSCAR_OK;
}

/* run->ids: `wanted` of the text's tokens as windows, BOS at the beginning of each if `bos` is a token. Windows lie one after the
 * other when all tokens are wanted, else at equal distances, so that a short fit sees every kind of text there is. A shorter
 * window comes first: fits look at rows of the last one. */
static oscar_status cut_windows(struct run *run, const int32_t *ids, int64_t count, int64_t wanted, int32_t bos) {
  int64_t per_window = bos >= 0 ? run->window - 1 : run->window, windows = (wanted + per_window - 1) / per_window;
  run->ids = mem_alloc(run->context, (size_t)(wanted + windows), sizeof *run->ids);
  run->lengths = run->ids ? mem_alloc(run->context, (size_t)windows, sizeof *run->lengths) : NULL;
  if (!run->lengths) return OSCAR_NO_MEMORY;
  for (int64_t done = 0; run->windows < windows; run->windows++) {
    int64_t n = run->windows == 0 ? wanted - (windows - 1) * per_window : per_window;
    int64_t first = wanted == count ? done : windows > 1 ? (count - n) * run->windows / (windows - 1) : 0;
    int64_t before = run->count;
    if (bos >= 0) run->ids[run->count++] = bos;
    memcpy(run->ids + run->count, ids + first, (size_t)n * sizeof *ids);
    run->count += n;
    run->lengths[run->windows] = (int)(run->count - before);
    done += n;
  }
  return OSCAR_OK;
}

static oscar_status tokenize(struct run *run, const struct calibrate_options *options) {
  const struct tokenizer *tokenizer = model_tokenizer(run->model);
  int32_t *ids = NULL;
  int count = 0;
  oscar_status status = tokenizer_encode(tokenizer, run->text, run->text_bytes, false, &ids, &count);
  if (status != OSCAR_OK) return status;
  int wanted = options->max_tokens > 0 && count > options->max_tokens ? options->max_tokens : count;
  if (count > 0)
    status = cut_windows(run, ids, count, wanted, tokenizer_adds_bos(tokenizer) ? tokenizer_bos(tokenizer) : -1);
  else
    status = set_error(run->context, OSCAR_INVALID_ARGUMENT, "calibration: the text has no tokens");
  mem_free(run->context, ids);
  return status;
}

/* ---- passes ---- */

static oscar_status observe(void *user, int layer, int n, const float *q, const float *k, const float *v, float *o) {
  return oscar_calib_add(user, layer, n, q, k, v, o);
}

static oscar_status report(const struct run *run) {
  if (!run->progress || run->progress->report(run->progress->user, "calibration", run->done, run->total)) return OSCAR_OK;
  return set_error(run->context, OSCAR_CANCELLED, "calibration stopped after %lld of %lld tokens", (long long)run->done,
                   (long long)run->total);
}

static oscar_status run_window(struct run *run, const int32_t *ids, int64_t count) {
  const struct forward_observer observer = {observe, run->calib};
  oscar_sequence *sequence = NULL;
  oscar_status status = oscar_sequence_create(run->cache, &sequence);
  oscar_calib_begin_sequence(run->calib);
  for (int64_t i = 0; status == OSCAR_OK && i < count; i += run->chunk) {
    if ((status = report(run)) != OSCAR_OK) break;
    int n = (int)(count - i < run->chunk ? count - i : run->chunk);
    status = runner_forward(run->runner, sequence, n, ids + i, 0, NULL, &observer);
    run->done += n;
  }
  if (sequence) oscar_sequence_free(sequence);
  return status;
}

static oscar_status run_pass(struct run *run) {
  oscar_status status = OSCAR_OK;
  const int32_t *ids = run->ids;
  for (int64_t w = 0; status == OSCAR_OK && w < run->windows; ids += run->lengths[w++])
    status = run_window(run, ids, run->lengths[w]);
  return status;
}

/* Asks the statistics to weigh keys by what attention does with them. */
static oscar_status describe_layers(struct run *run) {
  const struct model_geometry *g = model_geometry_of(run->model);
  oscar_attended_options attended;
  oscar_attended_options_default(&attended);
  float *gram = mem_alloc(run->context, (size_t)g->query_heads * (size_t)g->head_dim * (size_t)g->head_dim, sizeof *gram);
  oscar_status status = gram ? oscar_calib_attend(run->calib, &attended) : OSCAR_NO_MEMORY;
  for (int layer = 0; status == OSCAR_OK && layer < g->layers; layer++) {
    oscar_rope *rope = NULL;
    status = model_layer_rope(run->model, layer, &rope);
    if (status == OSCAR_OK) status = model_output_gram(run->model, layer, gram);
    if (status == OSCAR_OK)
      status = oscar_calib_describe_layer(run->calib, layer, rope, model_layer_window(run->model, layer), gram);
    oscar_rope_release(rope);
  }
  mem_free(run->context, gram);
  return status;
}

static oscar_status open_machinery(struct run *run) {
  const struct model_geometry *g = model_geometry_of(run->model);
  const oscar_calib_geometry geometry = {g->layers, g->query_heads, g->kv_heads, g->head_dim};
  oscar_status status = oscar_calib_create(run->context, &geometry, &run->calib);
  if (status != OSCAR_OK) return status;
  if (run->graded && (status = describe_layers(run)) != OSCAR_OK) return status;
  oscar_cache_options cache;
  model_cache_options(run->model, &cache);
  cache.budget_bytes = oscar_cache_bytes_for(&cache, run->window, 1, run->chunk);
  status = oscar_cache_create(run->context, &cache, &run->cache);
  return status == OSCAR_OK ? runner_create(run->model, run->cache, run->chunk, &run->runner) : status;
}

/* ---- layers ---- */

static bool report_layer(void *user, int tokens) {
  struct run *run = user;
  bool go_on = report(run) == OSCAR_OK;
  run->done += tokens;
  return go_on;
}

static int sensitivity_length(const struct run *run) {
  int64_t n = run->lengths[run->windows - 1] < run->chunk ? run->lengths[run->windows - 1] : run->chunk;
  return n < SENSITIVITY_TOKENS ? (int)n : SENSITIVITY_TOKENS;
}

static oscar_status measure_layers(struct run *run) {
  run->costs = mem_zalloc(run->context, (size_t)model_geometry_of(run->model)->layers, sizeof *run->costs);
  if (!run->costs) return OSCAR_NO_MEMORY;
  const int n = sensitivity_length(run);
  const int32_t *last = run->ids + run->count - run->lengths[run->windows - 1]; /* a whole window, if there is one */
  return sensitivity_measure(run->model, run->runner, run->cache, last, n, report_layer, run, run->costs);
}

/* ---- fits ---- */

static oscar_status fit_one(const struct run *run, const char *kv, bool proxy, oscar_codec_set **set) {
  const struct model_geometry *g = model_geometry_of(run->model);
  struct settings settings;
  if (!settings_find(kv, &settings)) return OSCAR_INVALID_ARGUMENT; /* calibrate_model has looked */
  if (proxy) settings.uniform.objective = OSCAR_VALUES_PROXY;
  settings.measured = run->costs != NULL;
  char *provenance = provenance_of(run, &settings);
  if (!provenance) return set_error(run->context, OSCAR_NO_MEMORY, "out of memory writing the provenance of a fit");
  const oscar_codec_set_info info = {g->layers, g->kv_heads, g->head_dim, kv, model_fingerprint(run->model), provenance};
  oscar_status status;
  if (settings.recipe->graded) {
    oscar_graded_options graded;
    oscar_graded_options_default(&graded);
    graded.bits = settings.bits;
    graded.positions = g->context_trained < SERVED_POSITIONS ? g->context_trained : SERVED_POSITIONS;
    graded.layer_costs = run->costs;
    status = oscar_calib_fit_graded(run->calib, &info, &graded, set);
  } else {
    status = oscar_calib_fit(run->calib, &info, &settings.uniform, set);
  }
  free(provenance);
  return status;
}

static bool wants_proxy(const struct calibrate_options *options, const char *kv) {
  return options->proxy_values && strcmp(kv, "int2-oscar") == 0;
}

static oscar_status calibrate(struct run *run, const struct calibrate_options *options, int count, const char *const *kv,
                              oscar_codec_set **sets) {
  bool proxy = false;
  struct settings settings;
  for (int i = 0; i < count; i++) {
    proxy = proxy || wants_proxy(options, kv[i]);
    run->graded = run->graded || (settings_find(kv[i], &settings) && settings.recipe->graded);
  }
  oscar_status status = choose_window(run, options);
  if (status == OSCAR_OK) status = hash_text(run);
  if (status == OSCAR_OK) status = tokenize(run, options);
  if (status == OSCAR_OK) status = open_machinery(run);
  if (status != OSCAR_OK) return status;
  run->total = proxy ? 2 * run->count : run->count;
  const bool layers = run->graded && options->measure_layers;
  if (layers) run->total += sensitivity_tokens(run->model, sensitivity_length(run));
  if ((status = run_pass(run)) != OSCAR_OK) return status;
  if (layers && (status = measure_layers(run)) != OSCAR_OK) return status;
  if (proxy) {
    status = oscar_calib_begin_proxy(run->calib);
    if (status == OSCAR_OK) status = run_pass(run);
  }
  for (int i = 0; status == OSCAR_OK && i < count; i++) status = fit_one(run, kv[i], wants_proxy(options, kv[i]), &sets[i]);
  return status == OSCAR_OK ? report(run) : status;
}

oscar_status calibrate_model(struct model *model, const struct calibrate_options *options, const struct progress *progress,
                             int count, const char *const *kv, oscar_codec_set **sets) {
  oscar_context *context = model_context(model);
  for (int i = 0; i < count; i++) sets[i] = NULL;
  struct settings settings;
  for (int i = 0; i < count; i++)
    if (!settings_find(kv[i], &settings))
      return set_error(context, OSCAR_INVALID_ARGUMENT, "calibration: KV type \"%s\" is not one that is fitted", kv[i]);
  struct run run = {.context = context, .model = model, .progress = progress};
  run.text = options->text;
  run.text_bytes = options->text_bytes;
  if (!run.text) run.text = calibration_text(&run.text_bytes);

  oscar_status status = calibrate(&run, options, count, kv, sets);
  runner_free(run.runner);
  if (run.cache) oscar_cache_free(run.cache);
  oscar_calib_free(run.calib);
  mem_free(context, run.costs);
  mem_free(context, run.lengths);
  mem_free(context, run.ids);
  for (int i = 0; status != OSCAR_OK && i < count; i++) {
    if (sets[i]) oscar_codec_set_free(sets[i]);
    sets[i] = NULL;
  }
  return status;
}

size_t calibrate_bytes(const struct model *model) {
  const struct model_geometry *g = model_geometry_of(model);
  const int64_t window = g->context_trained < DEFAULT_WINDOW ? g->context_trained : DEFAULT_WINDOW;
  oscar_cache_options cache;
  model_cache_options(model, &cache);
  const size_t d = (size_t)g->head_dim, heads = (size_t)g->kv_heads, queries = (size_t)g->query_heads, tokens = (size_t)window;
  /* two plain moments; of graded codes four more, the sequence's keys, values, norms and weights, and W_O'W_O: calib/attended.h
   */
  size_t layer = 6 * heads * d * d * sizeof(double) + tokens * (heads * (4 * d + 3 * sizeof(double)) + queries * sizeof(float)) +
                 queries * d * d * sizeof(float);
  return oscar_cache_bytes_for(&cache, window, 1, CHUNK) + (size_t)g->layers * layer;
}
