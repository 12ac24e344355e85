/*
 * generation.c - writing and measuring long texts.
 *
 * The BF16 lane stays open: it writes the first texts and reads every text again to say how likely it is. One other lane at a
 * time is open beside it.
 */
#include "eval/generation.h"

#include "engine/logits.h"
#include "eval/eval.h"
#include "eval/lane.h"
#include "eval/prompt.h"
#include "eval/repetition.h"
#include "eval/statistics.h"
#include "eval/text.h"

#include <math.h>
#include <string.h>

enum { SCORED_ROWS = 64 }; /* rows of logits at once */

static const char *const own_prompts[] = {
    "Write a long story about a lighthouse keeper who finds an old map. Describe every place and every person on the way.",
    "Explain in great detail how a steam engine works, from the fire to the wheels, one part after the other.",
    "Write the diary of a sailor for thirty days at sea, one entry for each day.",
    "Describe twenty towns of an imaginary country, one paragraph for each, every one different from the others.",
};

struct prompt_ids {
  int32_t *ids;
  int count;
};

struct writing {
  struct model *model;
  oscar_context *context;
  const struct generation_options *options;
  struct generation_result *result;
  int vocab;
  struct prompt_ids *prompt; /* [prompts] */
  int longest;               /* tokens of a prompt */
  int32_t *ends;             /* [n_ends] tokens that are not allowed */
  int n_ends;
  int32_t *written, *bf16; /* [texts][tokens], of the run at work and of run 0 */
  int32_t *before;         /* [longest + tokens], the prompt and what was written so far: penalties look at it */
  float *logits;           /* [vocab] */
  float *rows;             /* [SCORED_ROWS][vocab] */
  struct lane exact;
  struct lane_progress progress;
};

void generation_options_default(struct generation_options *options) {
  *options = (struct generation_options){.tokens = 1024, .seeds = 2, .sink_pages = 1, .recent_pages = 4, .chunk = 256};
  sampler_options_default(&options->sampling);
  options->sampling.seed = 1;
}

oscar_status generation_options_check(const struct model *model, const struct generation_options *o) {
  enum { MOST_TOKENS = 1 << 16, MOST_TEXTS = 1 << 10 }; /* repetition takes time of order n * n */
  oscar_context *context = model_context(model);
  const int64_t trained = model_geometry_of(model)->context_trained;
  if (o->tokens < 1 || o->tokens > MOST_TOKENS || o->chunk < 1)
    return set_error(context, OSCAR_INVALID_ARGUMENT, "texts of %d tokens in chunks of %d; expected 1 to %d and at least 1",
                     o->tokens, o->chunk, MOST_TOKENS);
  if (o->seeds < 1 || o->seeds > MOST_TEXTS || o->prompts < 0 || o->prompts > MOST_TEXTS)
    return set_error(context, OSCAR_INVALID_ARGUMENT, "%d prompts with %d seeds; expected at most %d of each", o->prompts,
                     o->seeds, MOST_TEXTS);
  if (o->tokens >= trained)
    return set_error(context, OSCAR_INVALID_ARGUMENT, "texts of %d tokens; this model was trained for %lld, prompt included",
                     o->tokens, (long long)trained);
  return OSCAR_OK;
}

const char *written_measure_name(enum written_measure measure) {
  static const char *const names[WRITTEN_MEASURES] = {
      [WRITTEN_REPEATED_4] = "repeated_4", [WRITTEN_DISTINCT_1] = "distinct_1", [WRITTEN_DISTINCT_2] = "distinct_2",
      [WRITTEN_LONGEST] = "longest",       [WRITTEN_LOOPING] = "looping",       [WRITTEN_LIKELIHOOD] = "likelihood"};
  return names[measure];
}

/* ---- one text ---- */

static oscar_status write_tokens(struct writing *w, struct lane *lane, const struct prompt_ids *prompt, struct sampler *sampler,
                                 int32_t *ids) {
  oscar_status status = OSCAR_OK;
  memcpy(w->before, prompt->ids, (size_t)prompt->count * sizeof *ids);
  for (int i = 0; i < w->options->tokens && status == OSCAR_OK; i++) {
    for (int k = 0; k < w->n_ends; k++) w->logits[w->ends[k]] = -INFINITY;
    status = sampler_choose(sampler, w->logits, w->before, prompt->count + i, NULL, &ids[i]);
    if (status != OSCAR_OK) return prefix_error(w->context, status, "cache %s", lane->kv);
    w->before[prompt->count + i] = ids[i];
    if (i + 1 < w->options->tokens) status = lane_forward(lane, lane->sequence, &ids[i], 1, 1, w->logits);
    if (status == OSCAR_OK) status = lane_progress_add(w->context, &w->progress, 1);
  }
  return status;
}

static oscar_status write_text(struct writing *w, struct lane *lane, const struct prompt_ids *prompt, uint64_t seed, int32_t *ids,
                               struct written_run *run) {
  struct sampler_options sampling = w->options->sampling;
  sampling.seed = seed;
  struct sampler *sampler = NULL;
  oscar_status status = sampler_create(w->context, &sampling, w->vocab, &sampler);
  if (status == OSCAR_OK) status = oscar_sequence_create(lane->cache, &lane->sequence);
  if (status == OSCAR_OK) status = lane_feed(lane, lane->sequence, prompt->ids, prompt->count, w->logits, NULL);
  if (status == OSCAR_OK) status = write_tokens(w, lane, prompt, sampler, ids);
  if (status == OSCAR_OK) {
    run->bits_per_element = oscar_sequence_bits_per_element(lane->sequence);
    run->cache_bytes = oscar_sequence_bytes(lane->sequence);
  }
  oscar_sequence_free(lane->sequence);
  lane->sequence = NULL;
  sampler_free(sampler);
  return status;
}

/* ---- how likely the exact model finds it ---- */

static oscar_status row_likelihood(const struct writing *w, const float *row, int32_t token, double *sum) {
  double log_sum;
  int32_t best;
  logits_summary(row, w->vocab, &log_sum, &best);
  *sum += (double)row[token] - log_sum;
  return isfinite(*sum) ? OSCAR_OK
                        : set_error(w->context, OSCAR_NUMERIC, "cache %s gives logits that are not finite", w->exact.kv);
}

/* The rows of logits after ids[0 .. n - 2] say how likely ids[1 .. n - 1] are; the first token is judged by w->logits. */
static oscar_status add_likelihoods(struct writing *w, const int32_t *ids, int n, double *sum) {
  const int most = SCORED_ROWS < w->exact.chunk ? SCORED_ROWS : w->exact.chunk;
  oscar_status status = row_likelihood(w, w->logits, ids[0], sum);
  for (int done = 0; done < n - 1 && status == OSCAR_OK;) {
    const int left = n - 1 - done, step = left < most ? left : most;
    status = lane_forward(&w->exact, w->exact.sequence, ids + done, step, step, w->rows);
    for (int i = 0; i < step && status == OSCAR_OK; i++)
      status = row_likelihood(w, w->rows + (size_t)i * (size_t)w->vocab, ids[done + i + 1], sum);
    if (status == OSCAR_OK) status = lane_progress_add(w->context, &w->progress, 0);
    done += step;
  }
  return status;
}

static oscar_status likelihood_of(struct writing *w, const struct prompt_ids *prompt, const int32_t *ids, int n, double *mean) {
  double sum = 0;
  struct lane *lane = &w->exact;
  oscar_status status = oscar_sequence_create(lane->cache, &lane->sequence);
  if (status == OSCAR_OK) status = lane_feed(lane, lane->sequence, prompt->ids, prompt->count, w->logits, NULL);
  if (status == OSCAR_OK) status = add_likelihoods(w, ids, n, &sum);
  oscar_sequence_free(lane->sequence);
  lane->sequence = NULL;
  *mean = sum / n;
  return status;
}

/* ---- measuring ---- */

static int first_difference(const int32_t *a, const int32_t *b, int n) {
  int same = 0;
  while (same < n && a[same] == b[same]) same++;
  return same;
}

static oscar_status note_text(struct writing *w, const int32_t *ids, struct written_text *text) {
  const struct tokenizer *tokenizer = model_tokenizer(w->model);
  struct text spelled = {.context = w->context};
  for (int i = 0; i < w->options->tokens; i++) {
    size_t bytes;
    const char *piece = tokenizer_piece(tokenizer, ids[i], false, &bytes);
    text_add_bytes(&spelled, piece, bytes);
  }
  text->text = spelled.data;
  return spelled.failed ? OSCAR_NO_MEMORY : OSCAR_OK;
}

static oscar_status measure_text(struct writing *w, const struct prompt_ids *prompt, const int32_t *ids,
                                 struct written_text *text) {
  const int n = w->options->tokens;
  struct repetition r;
  oscar_status status = repetition_of(w->context, ids, n, &r);
  if (status == OSCAR_OK) status = note_text(w, ids, text);
  if (status == OSCAR_OK) status = likelihood_of(w, prompt, ids, n, &text->measure[WRITTEN_LIKELIHOOD]);
  text->measure[WRITTEN_REPEATED_4] = r.repeated_4;
  text->measure[WRITTEN_DISTINCT_1] = r.distinct_1;
  text->measure[WRITTEN_DISTINCT_2] = r.distinct_2;
  text->measure[WRITTEN_LONGEST] = r.longest;
  text->measure[WRITTEN_LOOPING] = r.loop_period > 0;
  return status;
}

/* ---- one cache ---- */

static oscar_status write_texts(struct writing *w, struct lane *lane, struct written_run *run) {
  const struct generation_options *o = w->options;
  for (int i = 0; i < w->result->texts; i++) {
    struct written_text *text = &run->text[i];
    int32_t *ids = w->written + (size_t)i * (size_t)o->tokens;
    text->prompt = i / o->seeds;
    text->seed = o->sampling.seed + (uint64_t)(i % o->seeds);
    oscar_status status = write_text(w, lane, &w->prompt[text->prompt], text->seed, ids, run);
    if (status == OSCAR_OK) status = measure_text(w, &w->prompt[text->prompt], ids, text);
    if (status != OSCAR_OK) return status;
  }
  return OSCAR_OK;
}

static void compare_texts(struct writing *w, struct written_run *run) {
  const int n = w->options->tokens, texts = w->result->texts;
  double sum = 0;
  for (int i = 0; i < texts; i++) {
    const size_t at = (size_t)i * (size_t)n;
    run->text[i].differs_at = first_difference(w->written + at, w->bf16 + at, n);
    sum += run->text[i].differs_at;
  }
  run->differs_at = sum / texts;
}

static oscar_status run_cache(struct writing *w, int index, const char *kv, const oscar_codec_set *codecs) {
  const struct generation_options *o = w->options;
  const struct lane_options options = {(int64_t)w->longest + o->tokens, 1, o->sink_pages, o->recent_pages, o->chunk};
  struct written_run *run = &w->result->run[index];
  struct lane quantized = {0}, *lane = index == 0 ? &w->exact : &quantized;
  run->kv = kv;
  run->text = mem_zalloc(w->context, (size_t)w->result->texts, sizeof *run->text);
  if (!run->text) return OSCAR_NO_MEMORY;
  oscar_status status = lane_open(w->model, &options, kv, codecs, lane);
  if (status == OSCAR_OK) status = write_texts(w, lane, run);
  if (status == OSCAR_OK && index == 0)
    memcpy(w->bf16, w->written, (size_t)w->result->texts * (size_t)o->tokens * sizeof *w->bf16);
  if (status == OSCAR_OK) compare_texts(w, run);
  lane_close(&quantized);
  return status;
}

/* ---- summaries ---- */

/* Of texts by prompt and seed: the root of the mean variance between the seeds of a prompt. */
static double pooled_deviation(const double *x, int prompts, int seeds) {
  double variances = 0;
  for (int i = 0; i < prompts; i++) {
    const double deviation = deviation_of(x + (size_t)i * (size_t)seeds, seeds);
    variances += deviation * deviation;
  }
  return sqrt(variances / prompts);
}

static oscar_status summarize(oscar_context *context, struct generation_result *r) {
  const int n = r->texts;
  double *values = mem_alloc(context, (size_t)n, sizeof *values), *differences = mem_alloc(context, (size_t)n, sizeof *values);
  const bool enough = values && differences;
  for (int i = 0; enough && i < r->runs; i++)
    for (int m = 0; m < WRITTEN_MEASURES; m++) {
      const struct written_summary *bf16 = &r->run[0].summary[m];
      for (int k = 0; k < n; k++) {
        values[k] = r->run[i].text[k].measure[m];
        differences[k] = values[k] - r->run[0].text[k].measure[m];
      }
      struct written_summary *s = &r->run[i].summary[m];
      s->mean = mean_of(values, n);
      s->deviation = pooled_deviation(values, r->prompts, r->seeds);
      s->shift = bf16->deviation > 0 ? (s->mean - bf16->mean) / bf16->deviation : (double)NAN;
      s->p = sign_flip_p(differences, n);
    }
  mem_free(context, values);
  mem_free(context, differences);
  return enough ? OSCAR_OK : OSCAR_NO_MEMORY;
}

static double seeds_differ_at(const struct writing *w) {
  const int n = w->options->tokens, seeds = w->options->seeds;
  double sum = 0;
  int pairs = 0;
  for (int i = 0; i < w->result->texts; i++) {
    if (i % seeds == 0) continue;
    sum += first_difference(w->bf16 + (size_t)(i - 1) * (size_t)n, w->bf16 + (size_t)i * (size_t)n, n);
    pairs++;
  }
  return pairs ? sum / pairs : (double)NAN;
}

/* ---- the whole ---- */

static oscar_status encode_prompts(struct writing *w) {
  struct generation_result *r = w->result;
  const char *const *prompts = w->options->prompts ? w->options->prompt : own_prompts;
  struct prompt_writer writer;
  oscar_status status = prompt_writer_open(w->model, &writer);
  if (status != OSCAR_OK) return status;
  const struct prompt_form form = prompt_writer_form(&writer);
  snprintf(r->form, sizeof r->form, "%s", prompt_writer_name(&writer));
  w->prompt = mem_zalloc(w->context, (size_t)r->prompts, sizeof *w->prompt);
  if (!w->prompt) return OSCAR_NO_MEMORY;
  for (int i = 0; i < r->prompts && status == OSCAR_OK; i++) {
    status = form.encode(form.user, prompts[i], "", &w->prompt[i].ids, &w->prompt[i].count);
    if (w->prompt[i].count > w->longest) w->longest = w->prompt[i].count;
  }
  const int64_t context = model_geometry_of(w->model)->context_trained;
  if (status == OSCAR_OK && (int64_t)w->longest + w->options->tokens > context)
    return set_error(w->context, OSCAR_INVALID_ARGUMENT,
                     "a prompt of %d tokens and %d to generate; this model was trained for %lld", w->longest, w->options->tokens,
                     (long long)context);
  const int64_t coded = lane_first_coded(w->options->sink_pages, w->options->recent_pages);
  if (status == OSCAR_OK && (int64_t)w->longest + w->options->tokens <= coded)
    return set_error(
        w->context, OSCAR_INVALID_ARGUMENT,
        "with %d tokens of prompt and %d to generate nothing is read as codes: with these windows it takes more than "
        "%lld together",
        w->longest, w->options->tokens, (long long)coded);
  return status;
}

static oscar_status list_ends(struct writing *w) {
  const struct tokenizer *tokenizer = model_tokenizer(w->model);
  w->ends = mem_alloc(w->context, (size_t)w->vocab, sizeof *w->ends);
  if (!w->ends) return OSCAR_NO_MEMORY;
  for (int32_t id = 0; id < w->vocab; id++)
    if (tokenizer_is_end(tokenizer, id)) w->ends[w->n_ends++] = id;
  return OSCAR_OK;
}

static oscar_status prepare(struct writing *w) {
  const size_t tokens = (size_t)w->result->texts * (size_t)w->options->tokens, vocab = (size_t)w->vocab;
  w->written = mem_alloc(w->context, tokens, sizeof *w->written);
  w->bf16 = mem_alloc(w->context, tokens, sizeof *w->bf16);
  w->logits = mem_alloc(w->context, vocab, sizeof *w->logits);
  w->rows = mem_alloc(w->context, vocab * SCORED_ROWS, sizeof *w->rows);
  if (!w->written || !w->bf16 || !w->logits || !w->rows) return OSCAR_NO_MEMORY;
  oscar_status status = list_ends(w);
  if (status == OSCAR_OK) status = encode_prompts(w);
  if (status != OSCAR_OK) return status;
  w->before = mem_alloc(w->context, (size_t)w->longest + (size_t)w->options->tokens, sizeof *w->before);
  return w->before ? OSCAR_OK : OSCAR_NO_MEMORY;
}

static void close_writing(struct writing *w) {
  lane_close(&w->exact);
  for (int i = 0; w->prompt && i < w->result->prompts; i++) mem_free(w->context, w->prompt[i].ids);
  void *const owned[] = {w->prompt, w->ends, w->before, w->written, w->bf16, w->logits, w->rows};
  for (size_t i = 0; i < ARRAY_LENGTH(owned); i++) mem_free(w->context, owned[i]);
}

static oscar_status run_caches(struct writing *w, int count, const char *const *kv, oscar_codec_set *const *sets) {
  struct generation_result *r = w->result;
  const char **ordered_kv = mem_alloc(w->context, (size_t)count + 1, sizeof *ordered_kv);
  const oscar_codec_set **ordered_sets = mem_alloc(w->context, (size_t)count + 1, sizeof *ordered_sets);
  r->run = mem_zalloc(w->context, (size_t)count + 1, sizeof *r->run);
  oscar_status status = ordered_kv && ordered_sets && r->run ? OSCAR_OK : OSCAR_NO_MEMORY;
  if (status == OSCAR_OK) r->runs = lane_order(count, kv, sets, ordered_kv, ordered_sets);
  w->progress.total = (int64_t)r->runs * r->texts * r->tokens;
  for (int i = 0; i < r->runs && status == OSCAR_OK; i++) status = run_cache(w, i, ordered_kv[i], ordered_sets[i]);
  mem_free(w->context, ordered_kv);
  mem_free(w->context, ordered_sets);
  return status;
}

oscar_status eval_generation(struct model *model, const struct generation_options *options, int count, const char *const *kv,
                             oscar_codec_set *const *sets, const struct progress *progress, struct generation_result *result) {
  *result = (struct generation_result){0};
  struct writing w = {.model = model,
                      .context = model_context(model),
                      .options = options,
                      .result = result,
                      .vocab = model_geometry_of(model)->vocab,
                      .progress = {.progress = progress, .what = "tokens"}};
  oscar_status status = generation_options_check(model, options);
  if (status != OSCAR_OK) return status;
  result->tokens = options->tokens;
  result->seeds = options->seeds;
  result->prompts = options->prompts ? options->prompts : (int)ARRAY_LENGTH(own_prompts);
  result->texts = result->prompts * result->seeds;
  status = prepare(&w);
  if (status == OSCAR_OK) status = run_caches(&w, count, kv, sets);
  if (status == OSCAR_OK) status = summarize(w.context, result);
  if (status == OSCAR_OK) result->seeds_differ_at = seeds_differ_at(&w);
  close_writing(&w);
  if (status != OSCAR_OK) generation_result_free(model_context(model), result);
  return status;
}

void generation_result_free(oscar_context *context, struct generation_result *result) {
  for (int i = 0; i < result->runs; i++) {
    struct written_run *run = &result->run[i];
    for (int k = 0; run->text && k < result->texts; k++) mem_free(context, run->text[k].text);
    mem_free(context, run->text);
  }
  mem_free(context, result->run);
  *result = (struct generation_result){0};
}
