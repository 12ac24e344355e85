/*
 * perplexity.c - several caches over the same tokens in one pass.
 *
 * Each cache has its own lane. Per chunk the BF16 lane runs first and leaves logits and probabilities; every other lane's logits
 * are compared with them at once and dropped, so memory does not grow with the number of caches or the text.
 */
#include "engine/logits.h"
#include "eval/eval.h"
#include "eval/lane.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* A lane and what was gathered from it. */
struct track {
  struct lane lane;
  double negative_log_likelihood, divergence_sum, divergence_squares;
  int64_t agreed;
  float *divergences; /* [counted] */
  double bits_per_element;
  size_t cache_bytes;
};

struct evaluation {
  struct model *model;
  oscar_context *context;
  const struct eval_options *options;
  const struct progress *progress;
  int tracks, vocab;
  struct track *track;
  float *logits, *reference, *probabilities; /* [chunk][vocab] */
  double *reference_log_sum, *row_loss, *row_divergence;
  int32_t *reference_best, *row_best; /* [chunk] */
  int64_t fed, scored, counted, counted_room;
};

void eval_options_default(struct eval_options *options) {
  *options = (struct eval_options){.context = 4096, .sink_pages = 1, .recent_pages = 4, .chunk = 256};
}

/* Whether a query at position t reads any page as codes. */
static bool reads_codes(const struct eval_options *o, int64_t t) { return t >= lane_first_coded(o->sink_pages, o->recent_pages); }

static oscar_status open_track(struct evaluation *e, const char *kv, const oscar_codec_set *codecs) {
  const struct eval_options *o = e->options;
  const struct lane_options lane = {o->context, 1, o->sink_pages, o->recent_pages, o->chunk};
  struct track *track = &e->track[e->tracks++];
  oscar_status status = lane_open(e->model, &lane, kv, codecs, &track->lane);
  if (status == OSCAR_OK && !(track->divergences = mem_alloc(e->context, (size_t)e->counted_room, sizeof *track->divergences)))
    status = OSCAR_NO_MEMORY;
  return status;
}

static void close_evaluation(struct evaluation *e) {
  for (int i = 0; e->track && i < e->tracks; i++) {
    lane_close(&e->track[i].lane);
    mem_free(e->context, e->track[i].divergences);
  }
  void *const owned[] = {e->track,    e->logits,         e->reference,      e->probabilities, e->reference_log_sum,
                         e->row_loss, e->row_divergence, e->reference_best, e->row_best};
  for (size_t i = 0; i < ARRAY_LENGTH(owned); i++) mem_free(e->context, owned[i]);
}

static bool allocate(struct evaluation *e) {
  const size_t chunk = (size_t)e->options->chunk, logits = chunk * (size_t)e->vocab;
  return (e->logits = mem_alloc(e->context, logits, sizeof *e->logits)) &&
         (e->reference = mem_alloc(e->context, logits, sizeof *e->reference)) &&
         (e->probabilities = mem_alloc(e->context, logits, sizeof *e->probabilities)) &&
         (e->reference_log_sum = mem_alloc(e->context, chunk, sizeof *e->reference_log_sum)) &&
         (e->row_loss = mem_alloc(e->context, chunk, sizeof *e->row_loss)) &&
         (e->row_divergence = mem_alloc(e->context, chunk, sizeof *e->row_divergence)) &&
         (e->reference_best = mem_alloc(e->context, chunk, sizeof *e->reference_best)) &&
         (e->row_best = mem_alloc(e->context, chunk, sizeof *e->row_best));
}

/* Rows of one chunk through the BF16 lane's logits: log sums, best tokens, probabilities. */
static void summarize_reference(struct evaluation *e, int n) {
  const size_t vocab = (size_t)e->vocab;
#pragma omp parallel for schedule(static) num_threads(e->context->options.threads)
  for (int i = 0; i < n; i++) {
    const float *x = e->reference + (size_t)i * vocab;
    float *p = e->probabilities + (size_t)i * vocab;
    logits_summary(x, e->vocab, &e->reference_log_sum[i], &e->reference_best[i]);
    const float shift = (float)e->reference_log_sum[i];
    for (size_t k = 0; k < vocab; k++) p[k] = expf(x[k] - shift);
    e->row_best[i] = e->reference_best[i];
    e->row_divergence[i] = 0;
  }
}

static void compare_with_reference(struct evaluation *e, int n) {
  const size_t vocab = (size_t)e->vocab;
#pragma omp parallel for schedule(static) num_threads(e->context->options.threads)
  for (int i = 0; i < n; i++) {
    const size_t row = (size_t)i * vocab;
    double log_sum;
    logits_summary(e->logits + row, e->vocab, &log_sum, &e->row_best[i]);
    e->row_divergence[i] = logits_divergence(e->probabilities + row, e->reference + row, e->reference_log_sum[i], e->logits + row,
                                             log_sum, e->vocab);
    e->row_loss[i] = log_sum;
  }
}

/* Adds the chunk's rows to a track's sums. `ids` are the tokens of the window, `start` the chunk's first position in it. */
static oscar_status gather(struct evaluation *e, struct track *track, const float *logits, const double *log_sums,
                           const int32_t *ids, int start, int n) {
  const struct eval_options *o = e->options;
  int64_t counted = e->counted;
  for (int i = 0; i < n; i++) {
    const int t = start + i;
    if (!isfinite(log_sums[i]))
      return set_error(e->context, OSCAR_NUMERIC, "cache %s gives logits that are not finite at position %d", track->lane.kv, t);
    if (t < o->first_scored) continue;
    if (t + 1 < o->context)
      track->negative_log_likelihood += log_sums[i] - (double)logits[(size_t)i * (size_t)e->vocab + (size_t)ids[t + 1]];
    if (!reads_codes(o, t)) continue;
    const double kl = e->row_divergence[i];
    track->divergence_sum += kl;
    track->divergence_squares += kl * kl;
    track->agreed += e->row_best[i] == e->reference_best[i];
    track->divergences[counted++] = (float)kl;
  }
  return OSCAR_OK;
}

static oscar_status run_chunk(struct evaluation *e, const int32_t *ids, int start, int n) {
  for (int i = 0; i < e->tracks; i++) {
    struct lane *lane = &e->track[i].lane;
    float *logits = i == 0 ? e->reference : e->logits;
    oscar_status status = lane_forward(lane, lane->sequence, ids + start, n, n, logits);
    if (status != OSCAR_OK) return status;
    if (i == 0)
      summarize_reference(e, n);
    else
      compare_with_reference(e, n);
    status = gather(e, &e->track[i], logits, i == 0 ? e->reference_log_sum : e->row_loss, ids, start, n);
    if (status != OSCAR_OK) return status;
  }
  for (int t = start; t < start + n; t++) {
    if (t < e->options->first_scored) continue;
    e->scored += t + 1 < e->options->context;
    e->counted += reads_codes(e->options, t);
  }
  return OSCAR_OK;
}

static oscar_status run_window(struct evaluation *e, const int32_t *ids, int64_t total) {
  const int context = e->options->context;
  oscar_status status = OSCAR_OK;
  for (int i = 0; i < e->tracks && status == OSCAR_OK; i++)
    status = oscar_sequence_create(e->track[i].lane.cache, &e->track[i].lane.sequence);
  for (int start = 0; start < context && status == OSCAR_OK; start += e->options->chunk) {
    if (e->progress && !e->progress->report(e->progress->user, "tokens", e->fed, total))
      return set_error(e->context, OSCAR_CANCELLED, "evaluation was stopped");
    const int n = context - start < e->options->chunk ? context - start : e->options->chunk;
    status = run_chunk(e, ids, start, n);
    e->fed += n;
  }
  for (int i = 0; i < e->tracks; i++) {
    struct track *track = &e->track[i];
    struct lane *lane = &track->lane;
    if (!lane->sequence) continue;
    track->bits_per_element = oscar_sequence_bits_per_element(lane->sequence);
    track->cache_bytes = oscar_sequence_bytes(lane->sequence);
    if (lane->baseline) baseline_measure(lane->baseline, lane->sequence, &track->bits_per_element, &track->cache_bytes);
    oscar_sequence_free(lane->sequence);
    lane->sequence = NULL;
  }
  return status;
}

static int compare_floats(const void *a, const void *b) {
  const float x = *(const float *)a, y = *(const float *)b;
  return (x > y) - (x < y);
}

static void finish_track(const struct evaluation *e, struct track *track, double bf16_loss, struct eval_run *out) {
  const double n = (double)e->counted, scored = (double)e->scored;
  const double mean = track->divergence_sum / n, variance = track->divergence_squares / n - mean * mean;
  qsort(track->divergences, (size_t)e->counted, sizeof *track->divergences, compare_floats);
  int64_t p99 = (int64_t)ceil(0.99 * n) - 1;
  *out = (struct eval_run){
      .kv = track->lane.kv,
      .ppl = exp(track->negative_log_likelihood / scored),
      .ppl_ratio = exp((track->negative_log_likelihood - bf16_loss) / scored),
      .kld_mean = mean,
      .kld_se = e->counted > 1 ? sqrt(fmax(variance, 0) / (n - 1)) : 0,
      .kld_p99 = (double)track->divergences[p99 < 0 ? 0 : p99],
      .kld_max = (double)track->divergences[e->counted - 1],
      .top1 = (double)track->agreed / n,
      .bits_per_element = track->bits_per_element,
      .cache_bytes = track->cache_bytes,
  };
}

static oscar_status check_arguments(oscar_context *context, const struct eval_options *o, int64_t n_ids, int64_t *windows) {
  if (o->context < 2 || o->chunk < 1 || o->first_scored < 0)
    return set_error(context, OSCAR_INVALID_ARGUMENT, "windows of %d tokens in chunks of %d; expected at least 2 and 1",
                     o->context, o->chunk);
  if (!reads_codes(o, o->context - 1) || o->first_scored >= o->context)
    return set_error(context, OSCAR_INVALID_ARGUMENT,
                     "in a context of %d tokens no scored position reads coded history: with these windows it needs more than %d",
                     o->context, (o->sink_pages + o->recent_pages + 1) * OSCAR_PAGE_TOKENS);
  int64_t tokens = o->tokens > 0 && o->tokens < n_ids ? o->tokens : n_ids;
  *windows = tokens / o->context;
  if (*windows == 0)
    return set_error(context, OSCAR_INVALID_ARGUMENT, "the text has %lld tokens to use; one window needs %d", (long long)tokens,
                     o->context);
  return OSCAR_OK;
}

static oscar_status open_tracks(struct evaluation *e, int count, const char *const *kv, oscar_codec_set *const *sets) {
  e->track = mem_zalloc(e->context, (size_t)count + 1, sizeof *e->track);
  if (!e->track || !allocate(e)) return OSCAR_NO_MEMORY;
  oscar_status status = open_track(e, "bf16", NULL);
  for (int i = 0; i < count && status == OSCAR_OK; i++)
    if (strcmp(kv[i], "bf16") != 0) status = open_track(e, kv[i], sets[i]);
  return status;
}

oscar_status eval_perplexity(struct model *model, const struct eval_options *options, const int32_t *ids, int64_t n_ids,
                             int count, const char *const *kv, oscar_codec_set *const *sets, const struct progress *progress,
                             struct eval_result *result) {
  *result = (struct eval_result){0};
  struct evaluation e = {.model = model, .context = model_context(model), .options = options, .progress = progress};
  int64_t windows;
  oscar_status status = check_arguments(e.context, options, n_ids, &windows);
  if (status != OSCAR_OK) return status;
  e.vocab = model_geometry_of(model)->vocab;
  e.counted_room = windows * options->context;
  status = open_tracks(&e, count, kv, sets);
  const int64_t total = windows * options->context;
  for (int64_t w = 0; w < windows && status == OSCAR_OK; w++) status = run_window(&e, ids + w * options->context, total);
  if (status == OSCAR_OK && progress) progress->report(progress->user, "tokens", total, total);
  if (status == OSCAR_OK && !(result->run = mem_alloc(e.context, (size_t)e.tracks, sizeof *result->run)))
    status = OSCAR_NO_MEMORY;
  if (status == OSCAR_OK) {
    result->context = options->context;
    result->tokens = e.fed;
    result->scored = e.scored;
    result->counted = e.counted;
    result->runs = e.tracks;
    for (int i = 0; i < e.tracks; i++) finish_track(&e, &e.track[i], e.track[0].negative_log_likelihood, &result->run[i]);
  }
  close_evaluation(&e);
  return status;
}

void eval_result_free(oscar_context *context, struct eval_result *result) {
  mem_free(context, result->run);
  *result = (struct eval_result){0};
}
