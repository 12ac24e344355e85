/*
 * diagnose.c - the diagnostics of a whole model on a text.
 *
 * A window runs once through the exact model. Only the sampled queries are kept on the way; its keys and values stand in the
 * exact cache's pages afterwards, in the very form from which a quantized cache would code them. Then every head is measured
 * against every KV type.
 */
#include "eval/diagnostics.h"

#include "eval/spectra.h"

#include <string.h>

/* One run of eval_diagnose. */
struct diagnosis {
  struct model *model;
  oscar_context *context;
  const struct diagnose_options *options;
  const struct progress *progress;
  const struct model_geometry *geometry;
  struct diagnose_result *result;
  oscar_codec_set **sets; /* [result->count] */
  oscar_cache *cache;
  struct runner *runner;
  struct spectra *spectra;
  int samples_room, samples, start; /* start: position of the chunk that runs */
  int *positions;                   /* [samples] of the window */
  float *queries;                   /* [layers][samples_room][query_heads][d] */
  float *q, *k, *v;                 /* of one KV head: [samples][group][d], [context][d] */
  int64_t windows, fed, heads_done;
};

void diagnose_options_default(struct diagnose_options *options) {
  *options = (struct diagnose_options){.context = 4096, .stride = 16, .sink_pages = 1, .recent_pages = 4, .chunk = 256};
}

static bool is_sample(const struct diagnose_options *o, int t) {
  return t % o->stride == o->stride - 1 && t / OSCAR_PAGE_TOKENS > o->sink_pages + o->recent_pages;
}

/* ---- the window through the model ---- */

static size_t query_row(const struct diagnosis *x) { return (size_t)x->geometry->query_heads * (size_t)x->geometry->head_dim; }

static oscar_status keep_queries(void *user, int layer, int n, const float *q, const float *k, const float *v, float *o) {
  (void)k, (void)v, (void)o;
  struct diagnosis *x = user;
  const size_t row = query_row(x);
  int sample = 0;
  while (sample < x->samples && x->positions[sample] < x->start) sample++;
  for (; sample < x->samples && x->positions[sample] < x->start + n; sample++)
    memcpy(x->queries + ((size_t)layer * (size_t)x->samples_room + (size_t)sample) * row,
           q + (size_t)(x->positions[sample] - x->start) * row, row * sizeof *q);
  return OSCAR_OK;
}

static oscar_status report(const struct diagnosis *x, const char *what, int64_t done, int64_t total) {
  if (!x->progress || x->progress->report(x->progress->user, what, done, total)) return OSCAR_OK;
  return set_error(x->context, OSCAR_CANCELLED, "the diagnostics were stopped");
}

static oscar_status feed(struct diagnosis *x, oscar_sequence *sequence, const int32_t *ids) {
  const struct diagnose_options *o = x->options;
  const struct forward_observer observer = {keep_queries, x};
  for (int start = 0; start < o->context; start += o->chunk) {
    oscar_status status = report(x, "tokens for diagnostics", x->fed, x->windows * o->context);
    if (status != OSCAR_OK) return status;
    const int n = o->context - start < o->chunk ? o->context - start : o->chunk;
    x->start = start;
    if ((status = runner_forward(x->runner, sequence, n, ids + start, 0, NULL, &observer)) != OSCAR_OK) return status;
    x->fed += n;
  }
  return OSCAR_OK;
}

/* ---- its heads ---- */

static void widen(int n, const uint16_t *from, float *to) {
  for (int i = 0; i < n; i++) to[i] = bf16_to_f32(from[i]);
}

/* Exact keys and values of one KV head from the cache's pages into x->k and x->v. */
static oscar_status read_rows(struct diagnosis *x, const oscar_sequence *sequence, int layer, int kv_head) {
  const int d = x->geometry->head_dim, context = x->options->context;
  uint16_t *page = mem_alloc(x->context, (size_t)2 * OSCAR_PAGE_TOKENS * (size_t)d, sizeof *page);
  if (!page) return OSCAR_NO_MEMORY;
  uint16_t *values = page + (size_t)OSCAR_PAGE_TOKENS * (size_t)d;
  oscar_status status = OSCAR_OK;
  for (int first = 0; first < context && status == OSCAR_OK; first += OSCAR_PAGE_TOKENS) {
    const int rows = context - first < OSCAR_PAGE_TOKENS ? context - first : OSCAR_PAGE_TOKENS;
    bool coded = false;
    status = oscar_sequence_read_page(sequence, first / OSCAR_PAGE_TOKENS, layer, kv_head, &coded, page, values);
    if (status != OSCAR_OK) break;
    widen(rows * d, page, x->k + (size_t)first * (size_t)d);
    widen(rows * d, values, x->v + (size_t)first * (size_t)d);
  }
  mem_free(x->context, page);
  return status;
}

static int group_of(const struct diagnosis *x) { return x->geometry->query_heads / x->geometry->kv_heads; }

static void pick_queries(struct diagnosis *x, int layer, int kv_head) {
  const size_t row = query_row(x), of_group = (size_t)group_of(x) * (size_t)x->geometry->head_dim;
  const float *from = x->queries + (size_t)layer * (size_t)x->samples_room * row + (size_t)kv_head * of_group;
  for (int i = 0; i < x->samples; i++) memcpy(x->q + (size_t)i * of_group, from + (size_t)i * row, of_group * sizeof *x->q);
}

static oscar_status measure_head(struct diagnosis *x, int layer, int kv_head) {
  struct diagnose_result *r = x->result;
  const struct diagnose_options *o = x->options;
  const int group = group_of(x), sink = o->sink_pages * OSCAR_PAGE_TOKENS;
  const struct head_view view = {.tokens = o->context,
                                 .head_dim = r->head_dim,
                                 .group = group,
                                 .samples = x->samples,
                                 .positions = x->positions,
                                 .q = x->q,
                                 .k = x->k,
                                 .v = x->v,
                                 .window = model_layer_window(x->model, layer),
                                 .sink_pages = o->sink_pages,
                                 .recent_pages = o->recent_pages};
  const size_t behind_sink = (size_t)sink * (size_t)r->head_dim;
  spectra_add(x->spectra, layer * r->kv_heads + kv_head, x->samples * group, x->q, o->context - sink, x->k + behind_sink,
              x->v + behind_sink);
  for (int i = 0; i < r->count; i++) {
    struct head_sums *sums =
        r->sums + ((size_t)i * (size_t)r->layers + (size_t)layer) * (size_t)r->query_heads + (size_t)kv_head * (size_t)group;
    oscar_status status = diagnose_head(x->context, &view, oscar_codec_set_get(x->sets[i], layer, kv_head, OSCAR_KEYS),
                                        oscar_codec_set_get(x->sets[i], layer, kv_head, OSCAR_VALUES), sums);
    if (status != OSCAR_OK) return prefix_error(x->context, status, "%s, layer %d, KV head %d", r->kv[i], layer, kv_head);
  }
  return OSCAR_OK;
}

static oscar_status measure(struct diagnosis *x, const oscar_sequence *sequence) {
  const struct diagnose_result *r = x->result;
  const int64_t total = x->windows * r->layers * r->kv_heads;
  for (int layer = 0; layer < r->layers; layer++)
    for (int h = 0; h < r->kv_heads; h++) {
      oscar_status status = report(x, "heads measured", x->heads_done++, total);
      if (status == OSCAR_OK) status = read_rows(x, sequence, layer, h);
      if (status != OSCAR_OK) return status;
      pick_queries(x, layer, h);
      if ((status = measure_head(x, layer, h)) != OSCAR_OK) return status;
    }
  return OSCAR_OK;
}

static oscar_status run_window(struct diagnosis *x, const int32_t *ids) {
  oscar_sequence *sequence = NULL;
  oscar_status status = oscar_sequence_create(x->cache, &sequence);
  if (status != OSCAR_OK) return status;
  status = feed(x, sequence, ids);
  if (status == OSCAR_OK) status = measure(x, sequence);
  oscar_sequence_free(sequence);
  return status;
}

/* ---- before and after ---- */

static oscar_status check_arguments(oscar_context *context, const struct diagnose_options *o, int64_t n_ids, int64_t *windows) {
  if (o->context < 2 || o->chunk < 1 || o->stride < 1 || o->sink_pages < 0 || o->recent_pages < 0)
    return set_error(context, OSCAR_INVALID_ARGUMENT,
                     "diagnostics of windows of %d tokens in chunks of %d at every %d-th position; expected at least 2, 1 and 1",
                     o->context, o->chunk, o->stride);
  bool any = false;
  for (int t = o->context - 1; t >= 0 && !any; t--) any = is_sample(o, t);
  if (!any)
    return set_error(context, OSCAR_INVALID_ARGUMENT,
                     "in a context of %d tokens none of the sampled positions (every %d-th) reads coded history: with these "
                     "windows that begins at %d",
                     o->context, o->stride, (o->sink_pages + o->recent_pages + 1) * OSCAR_PAGE_TOKENS);
  const int64_t wanted = o->tokens > 0 ? o->tokens : o->context, tokens = wanted < n_ids ? wanted : n_ids;
  *windows = tokens / o->context;
  if (*windows == 0)
    return set_error(context, OSCAR_INVALID_ARGUMENT, "the text has %lld tokens to use; one window needs %d", (long long)tokens,
                     o->context);
  return OSCAR_OK;
}

static bool allocate_result(oscar_context *context, const struct model_geometry *g, int room, struct diagnose_result *r) {
  const size_t layers = (size_t)g->layers, d = (size_t)g->head_dim, n = (size_t)room;
  r->layers = g->layers;
  r->query_heads = g->query_heads;
  r->kv_heads = g->kv_heads;
  r->head_dim = g->head_dim;
  return (r->kv = mem_zalloc(context, n, sizeof *r->kv)) &&
         (r->sums = mem_zalloc(context, n * layers * (size_t)g->query_heads, sizeof *r->sums)) &&
         (r->crumbs = mem_zalloc(context, n * layers * d, sizeof *r->crumbs)) &&
         (r->eigenvalues = mem_zalloc(context, SPECTRA * layers * (size_t)g->kv_heads * d, sizeof *r->eigenvalues));
}

static bool allocate_window(struct diagnosis *x) {
  const struct model_geometry *g = x->geometry;
  const size_t d = (size_t)g->head_dim, context = (size_t)x->options->context, samples = (size_t)x->samples_room;
  return (x->positions = mem_alloc(x->context, samples, sizeof *x->positions)) &&
         (x->queries = mem_alloc(x->context, (size_t)g->layers * samples * query_row(x), sizeof *x->queries)) &&
         (x->q = mem_alloc(x->context, samples * (size_t)group_of(x) * d, sizeof *x->q)) &&
         (x->k = mem_alloc(x->context, context * d, sizeof *x->k)) && (x->v = mem_alloc(x->context, context * d, sizeof *x->v));
}

static void choose_samples(struct diagnosis *x) {
  for (int t = 0; t < x->options->context; t++)
    if (is_sample(x->options, t)) x->positions[x->samples++] = t;
}

static oscar_status open_model(struct diagnosis *x) {
  const struct diagnose_options *o = x->options;
  oscar_cache_options cache;
  model_cache_options(x->model, &cache);
  cache.budget_bytes = oscar_cache_bytes_for(&cache, o->context, 1, o->chunk);
  oscar_status status = oscar_cache_create(x->context, &cache, &x->cache);
  if (status == OSCAR_OK) status = runner_create(x->model, x->cache, o->chunk, &x->runner);
  if (status == OSCAR_OK)
    status = spectra_create(x->context, x->geometry->layers * x->geometry->kv_heads, x->geometry->head_dim, &x->spectra);
  return status;
}

static oscar_status take_types(struct diagnosis *x, int count, const char *const *kv, oscar_codec_set *const *sets) {
  struct diagnose_result *r = x->result;
  for (int i = 0; i < count; i++) {
    if (!sets[i]) continue; /* bf16 */
    r->kv[r->count] = kv[i];
    x->sets[r->count++] = sets[i];
  }
  if (r->count == 0) return set_error(x->context, OSCAR_INVALID_ARGUMENT, "diagnostics: no KV type to compare with bf16");
  return OSCAR_OK;
}

/* Mean crumbs of each key channel over the heads of a layer. */
static void describe_crumbs(struct diagnosis *x) {
  struct diagnose_result *r = x->result;
  for (int i = 0; i < r->count; i++)
    for (int layer = 0; layer < r->layers; layer++) {
      double *to = r->crumbs + ((size_t)i * (size_t)r->layers + (size_t)layer) * (size_t)r->head_dim;
      for (int h = 0; h < r->kv_heads; h++) {
        const oscar_codec_spec *spec = oscar_codec_describe(oscar_codec_set_get(x->sets[i], layer, h, OSCAR_KEYS));
        for (int c = 0; c < spec->channels; c++) to[c] += (double)spec->crumbs[c] / r->kv_heads;
      }
    }
}

static oscar_status describe_spectra(struct diagnosis *x) {
  struct diagnose_result *r = x->result;
  const size_t places = (size_t)r->layers * (size_t)r->kv_heads, d = (size_t)r->head_dim;
  for (size_t place = 0; place < places; place++) {
    double *to[SPECTRA];
    for (size_t s = 0; s < SPECTRA; s++) to[s] = r->eigenvalues + (s * places + place) * d;
    oscar_status status = spectra_eigenvalues(x->spectra, (int)place, to[SPECTRUM_QUERIES], to[SPECTRUM_KEYS],
                                              to[SPECTRUM_LOGITS], to[SPECTRUM_VALUES]);
    if (status != OSCAR_OK) return status;
  }
  return OSCAR_OK;
}

static oscar_status run(struct diagnosis *x, const int32_t *ids, int count, const char *const *kv, oscar_codec_set *const *sets) {
  x->samples_room = x->options->context / x->options->stride + 1;
  x->sets = mem_alloc(x->context, (size_t)count + 1, sizeof *x->sets);
  if (!x->sets || !allocate_result(x->context, x->geometry, count + 1, x->result) || !allocate_window(x)) return OSCAR_NO_MEMORY;
  oscar_status status = take_types(x, count, kv, sets);
  if (status == OSCAR_OK) status = open_model(x);
  if (status != OSCAR_OK) return status;
  choose_samples(x);
  for (int64_t w = 0; w < x->windows && status == OSCAR_OK; w++) status = run_window(x, ids + w * x->options->context);
  if (status != OSCAR_OK) return status;
  x->result->tokens = x->fed;
  x->result->samples = x->windows * x->samples;
  describe_crumbs(x);
  status = describe_spectra(x);
  return status == OSCAR_OK ? report(x, "heads measured", x->heads_done, x->heads_done) : status;
}

oscar_status eval_diagnose(struct model *model, const struct diagnose_options *options, const int32_t *ids, int64_t n_ids,
                           int count, const char *const *kv, oscar_codec_set *const *sets, const struct progress *progress,
                           struct diagnose_result *result) {
  *result = (struct diagnose_result){0};
  struct diagnosis x = {.model = model,
                        .context = model_context(model),
                        .options = options,
                        .progress = progress,
                        .geometry = model_geometry_of(model),
                        .result = result};
  oscar_status status = check_arguments(x.context, options, n_ids, &x.windows);
  if (status != OSCAR_OK) return status;
  status = run(&x, ids, count, kv, sets);
  runner_free(x.runner);
  oscar_cache_free(x.cache);
  spectra_free(x.spectra);
  void *const owned[] = {(void *)x.sets, x.positions, x.queries, x.q, x.k, x.v};
  for (size_t i = 0; i < ARRAY_LENGTH(owned); i++) mem_free(x.context, owned[i]);
  if (status != OSCAR_OK) diagnose_result_free(x.context, result);
  return status;
}

void diagnose_result_free(oscar_context *context, struct diagnose_result *result) {
  mem_free(context, (void *)result->kv);
  mem_free(context, result->sums);
  mem_free(context, result->crumbs);
  mem_free(context, result->eigenvalues);
  *result = (struct diagnose_result){0};
}

struct head_sums diagnose_layer(const struct diagnose_result *r, int kv, int layer) {
  struct head_sums sums = {0};
  const struct head_sums *heads = r->sums + ((size_t)kv * (size_t)r->layers + (size_t)layer) * (size_t)r->query_heads;
  for (int h = 0; h < r->query_heads; h++) head_sums_add(&sums, &heads[h]);
  return sums;
}
