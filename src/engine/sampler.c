/*
 * sampler.c - from logits to a token.
 *
 * Top-k, top-p and min-p each keep a beginning of the list of tokens ordered by logit (equal logits: lower id first), so the
 * result is the shortest of the three beginnings. A vocabulary is never sorted: top-k streams through a heap of k, top-p makes a
 * heap (linear time) and pops it until a filter ends the list. Temperature acts last, on the kept ones.
 *
 * Same ids on every machine: the generator is integer arithmetic, the order of candidates is total, and the exponential is
 * written out in IEEE additions and multiplications, because those of C libraries differ in the last bit.
 * Logits that are not finite are never chosen.
 *
 * Bias and penalties change copies of the logits, which the list of candidates is anyway: it is filled with all of the
 * vocabulary, so that a token is found by its id, changed where something is to change, and only then cut down to what may be
 * chosen. Times that a token came before are counted in the weights, which nothing else uses until then.
 */
#include "engine/sampler.h"

#include <math.h>
#include <string.h>

struct candidate {
  float logit;
  int32_t id;
};

struct sampler {
  oscar_context *context;
  struct sampler_options options;
  int vocab;
  uint64_t random[4];
  struct candidate *candidates; /* [vocab] */
  double *weights;              /* [vocab], of the kept ones; before that, times that tokens came before */
  struct token_bias *bias;      /* [options.n_bias] */
};

/* ---- random numbers: xoshiro256++ 1.0 seeded by splitmix64 (Blackman and Vigna, https://prng.di.unimi.it) ---- */

static void random_seed(uint64_t random[4], uint64_t seed) {
  for (int i = 0; i < 4; i++) {
    uint64_t z = seed += 0x9E3779B97F4A7C15u;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    random[i] = z ^ z >> 31;
  }
}

static uint64_t rotate_left(uint64_t x, int by) { return x << by | x >> (64 - by); }

static uint64_t random_next(uint64_t s[4]) {
  uint64_t result = rotate_left(s[0] + s[3], 23) + s[0], shifted = s[1] << 17;
  s[2] ^= s[0];
  s[3] ^= s[1];
  s[1] ^= s[2];
  s[0] ^= s[3];
  s[2] ^= shifted;
  s[3] = rotate_left(s[3], 45);
  return result;
}

/* [0, 1), a multiple of 2^-53 */
static double random_unit(uint64_t s[4]) { return (double)(random_next(s) >> 11) * 0x1p-53; }

/* ---- a heap of candidates: nothing comes before the one on top ---- */

typedef bool before_fn(struct candidate a, struct candidate b);

static bool better(struct candidate a, struct candidate b) { return a.logit > b.logit || (a.logit == b.logit && a.id < b.id); }
static bool worse(struct candidate a, struct candidate b) { return better(b, a); }

static inline void sift_down(struct candidate *heap, int count, int at, before_fn *before) {
  struct candidate moved = heap[at];
  for (int child; (child = 2 * at + 1) < count; at = child) {
    if (child + 1 < count && before(heap[child + 1], heap[child])) child++;
    if (!before(heap[child], moved)) break;
    heap[at] = heap[child];
  }
  heap[at] = moved;
}

static inline void make_heap(struct candidate *heap, int count, before_fn *before) {
  for (int i = count / 2 - 1; i >= 0; i--) sift_down(heap, count, i, before);
}

/* Moves the best of `count` behind the others. */
static struct candidate pop_best(struct candidate *heap, int count) {
  struct candidate best = heap[0];
  heap[0] = heap[count - 1];
  heap[count - 1] = best;
  sift_down(heap, count - 1, 0, better);
  return best;
}

/* ---- what changes logits ---- */

static bool is_penalized(const struct sampler_options *o) {
  return o->penalty_window != 0 &&
         ((o->repeat_penalty != 0 && o->repeat_penalty != 1) || o->presence_penalty != 0 || o->frequency_penalty != 0);
}

/* A token that came before, so many times. Repetition: CTRL (Keskar and others, arXiv 1909.05858) with llama.cpp's rule for
 * negative logits; presence and frequency: OpenAI's API reference. */
static float penalized(const struct sampler_options *o, float logit, double times) {
  if (o->repeat_penalty != 0) logit = logit > 0 ? logit / o->repeat_penalty : logit * o->repeat_penalty;
  return (float)((double)logit - (double)o->presence_penalty - times * (double)o->frequency_penalty);
}

/* Each token once, whatever the length of the window. */
static void penalize(struct sampler *s, const int32_t *window, int64_t n) {
  for (int64_t i = 0; i < n; i++) s->weights[window[i]] = 0;
  for (int64_t i = 0; i < n; i++) s->weights[window[i]]++;
  for (int64_t i = 0; i < n; i++) {
    double *times = &s->weights[window[i]];
    if (*times == 0) continue;
    float *logit = &s->candidates[window[i]].logit;
    *logit = penalized(&s->options, *logit, *times);
    *times = 0;
  }
}

static void change_logits(struct sampler *s, const float *logits, const int32_t *window, int64_t n) {
  for (int i = 0; i < s->vocab; i++) s->candidates[i] = (struct candidate){logits[i], i};
  for (int i = 0; i < s->options.n_bias; i++) s->candidates[s->bias[i].id].logit += s->bias[i].bias;
  penalize(s, window, n);
}

/* ---- the filters ---- */

/* Puts a candidate behind the n that there are. */
static inline int collect_one(struct sampler *s, int n, struct candidate c, struct candidate *best) {
  if (!isfinite(c.logit)) return n;
  if (n == 0 || better(c, *best)) *best = c;
  s->candidates[n] = c;
  return n + 1;
}

static int collect(struct sampler *s, const float *logits, struct candidate *best) {
  int n = 0;
  for (int i = 0; i < s->vocab; i++) n = collect_one(s, n, (struct candidate){logits[i], i}, best);
  return n;
}

/* After change_logits: n never passes i. */
static int collect_changed(struct sampler *s, struct candidate *best) {
  int n = 0;
  for (int i = 0; i < s->vocab; i++) n = collect_one(s, n, s->candidates[i], best);
  return n;
}

/* logits NULL: the changed ones */
static int collect_allowed(struct sampler *s, const float *logits, const uint64_t *allowed, struct candidate *best) {
  int n = 0;
  for (int first = 0; first < s->vocab; first += 64)
    for (uint64_t left = allowed[first / 64]; left; left &= left - 1) {
      const int id = first + __builtin_ctzll(left);
      if (id >= s->vocab) break;
      n = collect_one(s, n, (struct candidate){logits ? logits[id] : s->candidates[id].logit, id}, best);
    }
  return n;
}

/* Relative to the best one, whose weight is 1. */
static double weight(struct candidate c, struct candidate best) {
  return sampling_exponential((double)c.logit - (double)best.logit);
}

/* Moves the k best of n to the front: a heap of the best so far, with the one to be replaced next on top. */
static int keep_top_k(struct candidate *c, int n, int k) {
  make_heap(c, k, worse);
  for (int i = k; i < n; i++) {
    if (!better(c[i], c[0])) continue;
    c[0] = c[i];
    sift_down(c, k, 0, worse);
  }
  return k;
}

/* Min-p alone needs no order. Moves the kept ones to the front. */
static int keep_likely(struct candidate *c, int n, double min_p, struct candidate best) {
  int kept = 0;
  for (int i = 0; i < n; i++)
    if (weight(c[i], best) >= min_p) c[kept++] = c[i];
  return kept;
}

/* Top-p and min-p together. Moves the kept ones to the end, best last. */
static int keep_ranked(struct candidate *c, int n, double top_p, double min_p, struct candidate best) {
  double total = 0, sum = 0;
  for (int i = 0; i < n; i++) total += weight(c[i], best);
  make_heap(c, n, better);
  int kept = 0;
  while (kept < n && (kept == 0 || sum < top_p * total)) {
    double w = weight(pop_best(c, n - kept), best);
    if (kept > 0 && w < min_p) break;
    kept++;
    sum += w;
  }
  return kept;
}

/* The n candidates from worst to best, when there are few: top-p, min-p and the draw as a GPU does them. */
static int32_t choose_ranked(struct sampler *s, struct candidate *c, int n, struct candidate best) {
  const struct sampler_options *o = &s->options;
  make_heap(c, n, better);
  for (int left = n; left > 1; left--) (void)pop_best(c, left);
  for (int rank = 0; rank < n; rank++) s->weights[rank] = weight(c[n - 1 - rank], best);
  const int kept = sampling_keep(n, s->weights, (double)o->top_p, (double)o->min_p);
  for (int rank = 0; rank < kept; rank++)
    s->weights[rank] = sampling_exponential(((double)c[n - 1 - rank].logit - (double)best.logit) / (double)o->temperature);
  return c[n - 1 - sampling_draw(kept, s->weights, random_unit(s->random))].id;
}

static int32_t draw(struct sampler *s, const struct candidate *c, int count, struct candidate best) {
  double total = 0;
  for (int i = 0; i < count; i++) {
    s->weights[i] = sampling_exponential(((double)c[i].logit - (double)best.logit) / (double)s->options.temperature);
    total += s->weights[i];
  }
  double target = random_unit(s->random) * total;
  for (int i = 0; i < count; i++) {
    target -= s->weights[i];
    if (target < 0) return c[i].id;
  }
  return best.id; /* rounding of the sum left a rest that belongs to nobody */
}

/* ---- interface ---- */

void sampler_options_default(struct sampler_options *options) {
  *options = (struct sampler_options){
      .temperature = 0.8f, .top_k = 40, .top_p = 0.95f, .min_p = 0.05f, .repeat_penalty = 1, .penalty_window = 64};
}

/* Bounds far beyond what is of use, so that no sum or product of finite logits leaves the range of a float. */
static const float least_repeat_penalty = 0.01f, most_repeat_penalty = 100, most_penalty = 1000, most_bias = 1e6f;

static oscar_status check_bias(oscar_context *context, const struct sampler_options *o, int vocab) {
  if (o->n_bias < 0 || (o->n_bias > 0 && !o->bias))
    return set_error(context, OSCAR_INVALID_ARGUMENT, "a bias of %d tokens without a list of them", o->n_bias);
  for (int i = 0; i < o->n_bias; i++) {
    const struct token_bias *b = &o->bias[i];
    if (b->id < 0 || b->id >= vocab)
      return set_error(context, OSCAR_INVALID_ARGUMENT, "a bias for token %d; this vocabulary has tokens 0 to %d", (int)b->id,
                       vocab - 1);
    if (!(fabsf(b->bias) <= most_bias) && b->bias != -INFINITY)
      return set_error(context, OSCAR_INVALID_ARGUMENT,
                       "the bias of token %d is %g, expected -%g to %g, or minus infinity to forbid it", (int)b->id,
                       (double)b->bias, (double)most_bias, (double)most_bias);
  }
  return OSCAR_OK;
}

static oscar_status check_changes(oscar_context *context, const struct sampler_options *o, int vocab) {
  if (o->repeat_penalty != 0 && !(o->repeat_penalty >= least_repeat_penalty && o->repeat_penalty <= most_repeat_penalty))
    return set_error(context, OSCAR_INVALID_ARGUMENT, "the repeat penalty is %g, expected 0 (none) or %g to %g",
                     (double)o->repeat_penalty, (double)least_repeat_penalty, (double)most_repeat_penalty);
  if (!(fabsf(o->presence_penalty) <= most_penalty))
    return set_error(context, OSCAR_INVALID_ARGUMENT, "the presence penalty is %g, expected -%g to %g",
                     (double)o->presence_penalty, (double)most_penalty, (double)most_penalty);
  if (!(fabsf(o->frequency_penalty) <= most_penalty))
    return set_error(context, OSCAR_INVALID_ARGUMENT, "the frequency penalty is %g, expected -%g to %g",
                     (double)o->frequency_penalty, (double)most_penalty, (double)most_penalty);
  if (o->penalty_window < -1)
    return set_error(context, OSCAR_INVALID_ARGUMENT, "the penalty window is %d tokens, expected -1 (all) or more",
                     o->penalty_window);
  return check_bias(context, o, vocab);
}

static oscar_status check_options(oscar_context *context, const struct sampler_options *o, int vocab) {
  if (vocab < 1) return set_error(context, OSCAR_INVALID_ARGUMENT, "a vocabulary of %d tokens, expected at least 1", vocab);
  if (!(o->temperature >= 0 && isfinite(o->temperature)))
    return set_error(context, OSCAR_INVALID_ARGUMENT, "temperature is %g, expected 0 or more", (double)o->temperature);
  if (o->top_k < 0) return set_error(context, OSCAR_INVALID_ARGUMENT, "top-k is %d, expected 0 (all) or more", o->top_k);
  if (!(o->top_p >= 0 && o->top_p <= 1))
    return set_error(context, OSCAR_INVALID_ARGUMENT, "top-p is %g, expected 0 to 1", (double)o->top_p);
  if (!(o->min_p >= 0 && o->min_p <= 1))
    return set_error(context, OSCAR_INVALID_ARGUMENT, "min-p is %g, expected 0 to 1", (double)o->min_p);
  return check_changes(context, o, vocab);
}

oscar_status sampler_create(oscar_context *context, const struct sampler_options *options, int vocab, struct sampler **sampler) {
  *sampler = NULL;
  oscar_status status = check_options(context, options, vocab);
  if (status) return status;
  struct sampler *s = mem_zalloc(context, 1, sizeof *s);
  if (!s) return OSCAR_NO_MEMORY;
  s->context = context;
  s->options = *options;
  s->vocab = vocab;
  random_seed(s->random, options->seed);
  s->candidates = mem_alloc(context, (size_t)vocab, sizeof *s->candidates);
  s->weights = s->candidates ? mem_alloc(context, (size_t)vocab, sizeof *s->weights) : NULL;
  s->bias = s->weights ? mem_alloc(context, (size_t)options->n_bias, sizeof *s->bias) : NULL;
  if (!s->bias) {
    sampler_free(s);
    return OSCAR_NO_MEMORY;
  }
  if (options->n_bias > 0) memcpy(s->bias, options->bias, (size_t)options->n_bias * sizeof *s->bias);
  s->options.bias = s->bias;
  *sampler = s;
  return OSCAR_OK;
}

size_t sampler_bytes(int vocab) { return sizeof(struct sampler) + (size_t)vocab * (sizeof(struct candidate) + sizeof(double)); }

void sampler_free(struct sampler *sampler) {
  if (!sampler) return;
  mem_free(sampler->context, sampler->candidates);
  mem_free(sampler->context, sampler->weights);
  mem_free(sampler->context, sampler->bias);
  mem_free(sampler->context, sampler);
}

/* The end of what came before that penalties look at. */
static oscar_status penalty_window(struct sampler *s, const int32_t **before, int64_t *n) {
  const int64_t most = s->options.penalty_window;
  if (!is_penalized(&s->options)) *n = 0;
  if (most >= 0 && *n > most) {
    *before += *n - most;
    *n = most;
  }
  for (int64_t i = 0; i < *n; i++)
    if ((*before)[i] < 0 || (*before)[i] >= s->vocab)
      return set_error(s->context, OSCAR_INVALID_ARGUMENT, "token %d came before; this vocabulary has tokens 0 to %d",
                       (int)(*before)[i], s->vocab - 1);
  return OSCAR_OK;
}

static bool some_finite(const struct sampler *s, const float *logits) {
  for (int i = 0; i < s->vocab; i++)
    if (isfinite(logits[i])) return true;
  return false;
}

static oscar_status nothing_to_choose(struct sampler *s, const float *logits) {
  if (some_finite(s, logits))
    return set_error(s->context, OSCAR_NUMERIC, "no token is left to choose: those with a finite logit are forbidden");
  return set_error(s->context, OSCAR_NUMERIC, "none of the %d logits is a finite number: the model's output is broken", s->vocab);
}

/* Of n candidates by the filters. */
static int32_t choose(struct sampler *s, int n, struct candidate best) {
  const struct sampler_options *o = &s->options;
  struct candidate *c = s->candidates;
  if (o->temperature == 0) return best.id;
  if (o->top_k > 0 && o->top_k < n) n = keep_top_k(c, n, o->top_k);
  if (o->top_k > 0 && o->top_k <= MOST_RANKED) return choose_ranked(s, c, n, best);
  if (o->top_p < 1) {
    int kept = keep_ranked(c, n, (double)o->top_p, (double)o->min_p, best);
    return draw(s, c + (n - kept), kept, best);
  }
  return draw(s, c, keep_likely(c, n, (double)o->min_p, best), best);
}

oscar_status sampler_choose(struct sampler *s, const float *logits, const int32_t *before, int64_t n_before,
                            const uint64_t *allowed, int32_t *id) {
  oscar_status status = penalty_window(s, &before, &n_before);
  if (status != OSCAR_OK) return status;
  const bool changed = s->options.n_bias > 0 || n_before > 0;
  if (changed) change_logits(s, logits, before, n_before);
  struct candidate best = {0};
  int n;
  if (allowed)
    n = collect_allowed(s, changed ? NULL : logits, allowed, &best);
  else
    n = changed ? collect_changed(s, &best) : collect(s, logits, &best);
  if (n == 0) return nothing_to_choose(s, logits);
  *id = choose(s, n, best);
  return OSCAR_OK;
}

oscar_status sampler_next(struct sampler *s, const float *logits, int32_t *id) {
  return sampler_choose(s, logits, NULL, 0, NULL, id);
}

bool sampler_describe(struct sampler *s, struct sampling *sampling) {
  const struct sampler_options *o = &s->options;
  if (o->n_bias > 0 || is_penalized(o)) return false;
  if (o->temperature > 0 && (o->top_k < 1 || o->top_k > MOST_RANKED)) return false;
  *sampling = (struct sampling){.temperature = o->temperature,
                                .top_k = o->top_k,
                                .top_p = o->top_p,
                                .min_p = o->min_p,
                                .random = o->temperature > 0 ? random_unit(s->random) : 0};
  return true;
}

/* ---- likelihoods ---- */

/* Puts a token where it belongs among the `count` best so far, of which n are wanted. Few are, so that a list kept in order
 * is enough; almost every token is turned away by the first line. logprob holds the logit for now. */
static int insert_ranked(struct ranked_token *ranked, int count, int n, struct ranked_token token) {
  if (count == n && (n == 0 || token.logprob <= ranked[n - 1].logprob)) return count; /* equal ones: this id is higher */
  int at = count < n ? count : n - 1;
  for (; at > 0 && ranked[at - 1].logprob < token.logprob; at--) ranked[at] = ranked[at - 1];
  ranked[at] = token;
  return count < n ? count + 1 : n;
}

/* log(sum of e^logit), the largest taken out so that nothing overflows; of logits that are finite. */
static double log_sum(int vocab, const float *logits) {
  double best = -INFINITY, sum = 0;
  for (int i = 0; i < vocab; i++)
    if (isfinite(logits[i]) && (double)logits[i] > best) best = (double)logits[i];
  for (int i = 0; i < vocab; i++)
    if (isfinite(logits[i])) sum += sampling_exponential((double)logits[i] - best);
  return best + log(sum);
}

void sampler_rank(int vocab, const float *logits, int32_t id, float *logprob, int n, struct ranked_token *ranked) {
  const double total = log_sum(vocab, logits);
  *logprob = isfinite(logits[id]) ? (float)((double)logits[id] - total) : -INFINITY;
  int count = 0;
  for (int i = 0; n > 0 && i < vocab; i++)
    if (isfinite(logits[i])) count = insert_ranked(ranked, count, n, (struct ranked_token){i, logits[i]});
  for (int i = 0; i < count; i++) ranked[i].logprob = (float)((double)ranked[i].logprob - total);
  for (int i = count; i < n; i++) ranked[i] = (struct ranked_token){-1, -INFINITY};
}
