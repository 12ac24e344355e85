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
 */
#include "engine/sampler.h"

#include <math.h>

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
  double *weights;              /* [vocab], of the kept ones */
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

/* ---- the filters ---- */

static int collect(struct sampler *s, const float *logits, struct candidate *best) {
  int n = 0;
  for (int i = 0; i < s->vocab; i++) {
    if (!isfinite(logits[i])) continue;
    struct candidate c = {logits[i], i};
    if (n == 0 || better(c, *best)) *best = c;
    s->candidates[n++] = c;
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
  *options = (struct sampler_options){.temperature = 0.8f, .top_k = 40, .top_p = 0.95f, .min_p = 0.05f, .seed = 0};
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
  return OSCAR_OK;
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
  if (!s->weights) {
    sampler_free(s);
    return OSCAR_NO_MEMORY;
  }
  *sampler = s;
  return OSCAR_OK;
}

size_t sampler_bytes(int vocab) { return sizeof(struct sampler) + (size_t)vocab * (sizeof(struct candidate) + sizeof(double)); }

void sampler_free(struct sampler *sampler) {
  if (!sampler) return;
  mem_free(sampler->context, sampler->candidates);
  mem_free(sampler->context, sampler->weights);
  mem_free(sampler->context, sampler);
}

oscar_status sampler_next(struct sampler *s, const float *logits, int32_t *id) {
  struct candidate best = {0};
  int n = collect(s, logits, &best);
  if (n == 0)
    return set_error(s->context, OSCAR_NUMERIC, "none of the %d logits is a finite number: the model's output is broken",
                     s->vocab);
  const struct sampler_options *o = &s->options;
  struct candidate *c = s->candidates;
  if (o->temperature == 0) {
    *id = best.id;
    return OSCAR_OK;
  }
  if (o->top_k > 0 && o->top_k < n) n = keep_top_k(c, n, o->top_k);
  if (o->top_k > 0 && o->top_k <= MOST_RANKED) {
    *id = choose_ranked(s, c, n, best);
  } else if (o->top_p < 1) {
    int kept = keep_ranked(c, n, (double)o->top_p, (double)o->min_p, best);
    *id = draw(s, c + (n - kept), kept, best);
  } else {
    *id = draw(s, c, keep_likely(c, n, (double)o->min_p, best), best);
  }
  return OSCAR_OK;
}

bool sampler_describe(struct sampler *s, struct sampling *sampling) {
  const struct sampler_options *o = &s->options;
  if (o->temperature > 0 && (o->top_k < 1 || o->top_k > MOST_RANKED)) return false;
  *sampling = (struct sampling){.temperature = o->temperature,
                                .top_k = o->top_k,
                                .top_p = o->top_p,
                                .min_p = o->min_p,
                                .random = o->temperature > 0 ? random_unit(s->random) : 0};
  return true;
}
