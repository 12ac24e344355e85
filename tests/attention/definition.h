/*
 * tests/attention/definition.h - attention over a cache as it is defined, in double precision and knowing nothing of kernels: it
 * keeps every key and value it fed, rounds them to BF16, passes them through oscar_codec_encode and _decode where the reading
 * rule says codes, and sums up. And caches of every kind to compare with it, on every instruction set.
 */
#ifndef OSCAR_TEST_ATTENTION_DEFINITION_H
#define OSCAR_TEST_ATTENTION_DEFINITION_H

#include "failing_alloc.h"

#include <oscar/attention.h>

/* Clang's OpenMP runtime loses blocks of its own when the size of a team changes (seen with libomp 14 in a program of ten lines).
 * Our parallel loops allocate nothing, so nothing of ours is excused by this. */
const char *__lsan_default_suppressions(void);
const char *__lsan_default_suppressions(void) { return "leak:libomp.so"; }

/* ---- what is under test ---- */

enum kind { BF16, SCALE_ZERO, GROUPS_16, GROUPS_32, TWO_CRUMBS, FOUR_CRUMBS, GRADED, GRADED_GROUPS, TURNING };
static const char *const kind_names[] = {"bf16",         "scale and zero",   "groups of 16",
                                         "groups of 32", "2 crumbs",         "4 crumbs",
                                         "graded",       "graded in groups", "log gains and a rotating mean"};

struct setup {
  enum kind kind;
  int layers, kv_heads, group, head_dim, sink, recent;
  int threads;
  oscar_isa isa;
  float key_scale; /* of the standard normal keys; 0: 1 */
  bool filtered;   /* a page filter applies the codecs, the cache has none */
};

struct fixture {
  struct setup setup;
  oscar_context *context;
  oscar_codec_set *codecs;
  oscar_page_filter *filter; /* NULL unless filtered */
  oscar_cache *cache;
  oscar_attention *attention;
};

/* All memory starts as NaN in every float format, so that reading what was never written shows. */
static inline void *poisoned_alloc(void *user, size_t bytes, size_t alignment) {
  (void)user;
  void *p = aligned_alloc(alignment, round_up(bytes, alignment));
  if (p) memset(p, 0xFF, bytes);
  return p;
}
static inline void plain_free(void *user, void *p) {
  (void)user;
  free(p);
}

/* The instruction sets, and above them the page kernels for many rows that some CPUs have. */
enum { VECTOR_TILES = OSCAR_ISA_NEON_DOT + 1, MATRIX_TILES, LEVELS };
#define FOR_EACH_ISA(isa) for (oscar_isa isa = OSCAR_ISA_PORTABLE; isa < (oscar_isa)LEVELS; isa++)

static inline const char *level_name(oscar_isa isa) {
  return isa == (oscar_isa)VECTOR_TILES ? "AVX512-BF16" : isa == (oscar_isa)MATRIX_TILES ? "AMX" : oscar_isa_name(isa);
}

static inline bool available(oscar_isa isa) {
  struct cpu_features cpu;
  cpu_detect(&cpu);
  bool tiles = cpu.avx512_bf16 && cpu.avx512_vbmi;
  if (isa == (oscar_isa)VECTOR_TILES) return tiles;
  if (isa == (oscar_isa)MATRIX_TILES) return tiles && cpu.amx_bf16;
  oscar_context_options options;
  oscar_context_options_default(&options);
  options.isa = isa;
  oscar_context *context;
  if (oscar_context_create(&options, &context) != OSCAR_OK) return false;
  oscar_context_free(context);
  return true;
}

static inline oscar_context *poisoned_context(oscar_isa isa, int threads) {
  oscar_context_options options;
  oscar_context_options_default(&options);
  options.isa = isa > OSCAR_ISA_NEON_DOT ? OSCAR_ISA_AVX512 : isa;
  options.threads = threads ? threads : 1;
  options.alloc = poisoned_alloc;
  options.free = plain_free;
  oscar_context *context = NULL;
  assert_int_equal(oscar_context_create(&options, &context), OSCAR_OK);
  context->cpu.wide_bf16 = isa == (oscar_isa)VECTOR_TILES;
  context->cpu.amx_bf16 = isa == (oscar_isa)MATRIX_TILES;
  return context;
}

/* 0 .. 4 crumbs per channel, 16 in 16 channels; a mean; an encode matrix far from orthogonal, its decode matrix unrelated. */
static inline oscar_codec *graded_codec(oscar_context *context, uint64_t *seed, int d, int groups, oscar_row_form form,
                                        oscar_rope *rope) {
  static const uint8_t pattern[16] = {4, 3, 2, 2, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0};
  static const float step[5] = {1, 1, .33f, .1f, .03f};
  uint8_t *crumbs = malloc((size_t)d);
  float *steps = malloc(sizeof(float) * (size_t)d), *mean = malloc(sizeof(float) * (size_t)d);
  float *encode = malloc(sizeof(float) * (size_t)(d * d)), *decode = malloc(sizeof(float) * (size_t)(d * d));
  for (int i = 0; i < d; i++) {
    crumbs[i] = pattern[i % 16];
    steps[i] = step[crumbs[i]] * (float)exp(test_uniform(seed) - .5);
    mean[i] = test_normal(seed);
  }
  for (int i = 0; i < d * d; i++) {
    float unit = i / d == i % d ? 1 : 0;
    encode[i] = unit + .3f * test_normal(seed) / sqrtf((float)d);
    decode[i] = unit + .3f * test_normal(seed) / sqrtf((float)d);
  }
  uint16_t pair[OSCAR_MAX_HEAD_DIM / 2];
  float *rotating = malloc(sizeof(float) * (size_t)d);
  for (int i = 0; i < d; i++) rotating[i] = 2 * test_normal(seed);
  for (int i = 0; i < d / 4; i++) pair[i] = (uint16_t)(2 * i); /* every other pair */
  oscar_codec_spec spec = {.head_dim = d,
                           .channels = d,
                           .rope = rope,
                           .rotating_pairs = rope ? d / 4 : 0,
                           .rotating_pair = pair,
                           .rotating_mean = rotating,
                           .form = form,
                           .groups = groups,
                           .crumbs = crumbs,
                           .steps = steps,
                           .mean = mean,
                           .encode = encode,
                           .decode = decode};
  oscar_codec *codec = NULL;
  assert_ok(context, oscar_codec_create(context, &spec, &codec));
  free(crumbs), free(steps), free(mean), free(encode), free(decode), free(rotating);
  return codec;
}

static inline oscar_codec *plain_codec(oscar_context *context, enum kind kind, oscar_side side, int d) {
  uint8_t *crumbs = malloc((size_t)d);
  memset(crumbs, kind == TWO_CRUMBS ? 2 : kind == FOUR_CRUMBS ? 4 : 1, (size_t)d);
  oscar_codec_spec spec = {.head_dim = d,
                           .channels = d,
                           .form = OSCAR_ROW_SCALE_ZERO,
                           .groups = kind == GROUPS_16   ? d / 16
                                     : kind == GROUPS_32 ? d / 32
                                                         : 1,
                           .clip_ratio = side == OSCAR_KEYS ? 0.96f : 0.92f,
                           .crumbs = crumbs};
  oscar_codec *codec = NULL;
  assert_ok(context, oscar_codec_create(context, &spec, &codec));
  free(crumbs);
  return codec;
}

static inline oscar_codec_set *make_codecs(oscar_context *context, const struct setup *s) {
  if (s->kind == BF16) return NULL;
  oscar_codec_set_info info = {s->layers, s->kv_heads, s->head_dim, "test", "", ""};
  oscar_codec_set *set = NULL;
  oscar_rope *rope = NULL;
  float frequencies[OSCAR_MAX_HEAD_DIM / 2];
  uint64_t seed = 99;
  for (int i = 0; i < s->head_dim / 2; i++) frequencies[i] = (float)pow(10000, -2.0 * i / s->head_dim);
  if (s->kind == TURNING)
    assert_ok(context, oscar_rope_create(context, &(oscar_rope_spec){OSCAR_ROPE_HALVES, s->head_dim, frequencies}, &rope));
  assert_ok(context, oscar_codec_set_create(context, &info, &set));
  for (int layer = 0; layer < s->layers; layer++)
    for (int head = 0; head < s->kv_heads; head++)
      for (int side = 0; side < 2; side++) {
        int blocks = s->head_dim / 16, groups = s->kind == GRADED ? 1 : s->kind == TURNING && blocks > 4 ? 4 : blocks;
        oscar_row_form form = s->kind == TURNING ? OSCAR_ROW_LOG_GAINS : OSCAR_ROW_GAIN;
        oscar_codec *codec = s->kind < GRADED
                                 ? plain_codec(context, s->kind, (oscar_side)side, s->head_dim)
                                 : graded_codec(context, &seed, s->head_dim, groups, form, side == OSCAR_KEYS ? rope : NULL);
        assert_ok(context, oscar_codec_set_assign(set, layer, head, (oscar_side)side, codec));
        oscar_codec_release(codec);
      }
  oscar_rope_release(rope);
  return set;
}

static inline int encode_and_decode(const void *user, int layer, int kv_head, oscar_side side, int head_dim, const float *rows,
                                    float *out) {
  const oscar_codec *codec = oscar_codec_set_get(user, layer, kv_head, side);
  uint8_t *codes = malloc(64 * oscar_codec_row_bytes(codec));
  assert_non_null(codes);
  assert_int_equal(oscar_codec_encode(codec, 0, 64, rows, (size_t)head_dim, codes), OSCAR_OK);
  oscar_codec_decode(codec, 0, 64, codes, out, (size_t)head_dim);
  free(codes);
  return 64;
}

static inline void open_cache(struct fixture *f) {
  const struct setup *s = &f->setup;
  oscar_cache_options cache;
  oscar_cache_options_default(&cache);
  cache.layers = s->layers;
  cache.kv_heads = s->kv_heads;
  cache.head_dim = s->head_dim;
  cache.sink_pages = s->sink;
  cache.recent_pages = s->recent;
  cache.budget_bytes = (size_t)6 << 20;
  if (s->filtered) {
    f->filter = malloc(sizeof *f->filter);
    assert_non_null(f->filter);
    *f->filter = (oscar_page_filter){encode_and_decode, f->codecs, 2};
    cache.filter = f->filter;
  } else {
    cache.codecs = f->codecs;
  }
  assert_ok(f->context, oscar_cache_create(f->context, &cache, &f->cache));
  oscar_attention_options options = {.query_heads = s->kv_heads * s->group};
  assert_ok(f->context, oscar_attention_create(f->cache, &options, &f->attention));
}

static inline struct fixture open_fixture(struct setup setup) {
  struct fixture f = {.setup = setup};
  if (!f.setup.layers) f.setup.layers = 1;
  if (!f.setup.kv_heads) f.setup.kv_heads = 2;
  if (!f.setup.group) f.setup.group = 1;
  if (!f.setup.head_dim) f.setup.head_dim = 64;
  f.context = poisoned_context(setup.isa, setup.threads);
  f.codecs = make_codecs(f.context, &f.setup);
  open_cache(&f);
  return f;
}

static inline void close_fixture(struct fixture *f) {
  oscar_attention_free(f->attention);
  oscar_cache_free(f->cache);
  free(f->filter);
  oscar_codec_set_free(f->codecs);
  oscar_context_free(f->context);
}

/* ---- the text: queries, keys and values of all positions, and what the cache should make of them ---- */

struct text {
  int tokens, layer;
  float *q;                 /* [tokens][query_heads][d] */
  float *k, *v;             /* [tokens][kv_heads][d], as fed */
  float *exact_k, *exact_v; /* rounded to BF16 */
  float *coded_k, *coded_v; /* decode(encode(rounded)), rounded again by a filter; NULL without codecs */
  const bool *only_coded;   /* [pages] pages without an exact form; NULL: the reading rule alone */
};

static inline float *floats(int tokens, int heads, int d) {
  float *x = malloc(sizeof(float) * (size_t)tokens * (size_t)heads * (size_t)d);
  assert_non_null(x);
  return x;
}

static inline float *random_floats(uint64_t *seed, int tokens, int heads, int d, float scale) {
  float *x = floats(tokens, heads, d);
  for (int i = 0; i < tokens * heads * d; i++) x[i] = scale * test_normal(seed);
  return x;
}

static inline float *rounded(const float *x, int n) {
  float *y = floats(n, 1, 1);
  for (int i = 0; i < n; i++) y[i] = bf16_to_f32(f32_to_bf16(x[i]));
  return y;
}

static inline float *through_codec(const struct fixture *f, int tokens, int layer, oscar_side side, const float *x) {
  if (!f->codecs) return NULL;
  int heads = f->setup.kv_heads, d = f->setup.head_dim;
  float *y = floats(tokens, heads, d);
  for (int head = 0; head < heads; head++) {
    const oscar_codec *codec = oscar_codec_set_get(f->codecs, layer, head, side);
    uint8_t *rows = malloc((size_t)tokens * oscar_codec_row_bytes(codec));
    assert_ok(f->context, oscar_codec_encode(codec, 0, tokens, x + head * d, (size_t)(heads * d), rows));
    oscar_codec_decode(codec, 0, tokens, rows, y + head * d, (size_t)(heads * d));
    free(rows);
  }
  for (int i = 0; f->setup.filtered && i < tokens * heads * d; i++) y[i] = bf16_to_f32(f32_to_bf16(y[i]));
  return y;
}

static inline struct text complete_text(const struct fixture *f, struct text t) {
  int n = t.tokens * f->setup.kv_heads * f->setup.head_dim;
  t.exact_k = rounded(t.k, n);
  t.exact_v = rounded(t.v, n);
  t.coded_k = through_codec(f, t.tokens, t.layer, OSCAR_KEYS, t.exact_k);
  t.coded_v = through_codec(f, t.tokens, t.layer, OSCAR_VALUES, t.exact_v);
  return t;
}

static inline struct text random_text(const struct fixture *f, uint64_t seed, int tokens, int layer) {
  const struct setup *s = &f->setup;
  float scale = s->key_scale > 0 ? s->key_scale : 1;
  struct text t = {.tokens = tokens, .layer = layer};
  t.q = random_floats(&seed, tokens, s->kv_heads * s->group, s->head_dim, 1);
  t.k = random_floats(&seed, tokens, s->kv_heads, s->head_dim, scale);
  t.v = random_floats(&seed, tokens, s->kv_heads, s->head_dim, 1);
  return complete_text(f, t);
}

static inline void free_text(struct text *t) {
  free(t->q), free(t->k), free(t->v), free(t->exact_k), free(t->exact_v), free(t->coded_k), free(t->coded_v);
}

/* out [query_heads][d] of the query at `position` */
static inline void define(const struct fixture *f, const struct text *t, int window, int position, double *out) {
  const struct setup *s = &f->setup;
  int d = s->head_dim, heads = s->kv_heads * s->group, begin = window > 0 && position >= window ? position - window + 1 : 0;
  double *scores = malloc(sizeof(double) * (size_t)(position + 1));
  for (int head = 0; head < heads; head++) {
    const float *q = t->q + ((size_t)position * (size_t)heads + (size_t)head) * (size_t)d;
    double max = -INFINITY, sum = 0, *o = out + head * d;
    for (int i = 0; i < d; i++) o[i] = 0;
    for (int pass = 0; pass < 2; pass++)
      for (int x = begin; x <= position; x++) {
        int page = x / 64, query_page = position / 64;
        bool exact = !f->codecs || page < s->sink || page + s->recent >= query_page;
        if (f->codecs && t->only_coded && t->only_coded[page]) exact = false;
        size_t row = ((size_t)x * (size_t)s->kv_heads + (size_t)(head / s->group)) * (size_t)d;
        const float *k = (exact ? t->exact_k : t->coded_k) + row, *v = (exact ? t->exact_v : t->coded_v) + row;
        if (pass == 0) {
          scores[x] = 0;
          for (int i = 0; i < d; i++) scores[x] += (double)q[i] * (double)k[i] / sqrt(d);
          if (scores[x] > max) max = scores[x];
        } else {
          double p = exp(scores[x] - max);
          sum += p;
          for (int i = 0; i < d; i++) o[i] += p * (double)v[i];
        }
      }
    for (int i = 0; i < d; i++) o[i] /= sum;
  }
  free(scores);
}

/* Feeds tokens begin .. begin + n - 1 of one layer (all others get the same) and attends with them. */
static inline void feed(struct fixture *f, oscar_sequence *sequence, const struct text *t, int window, int begin, int n,
                        float *out) {
  const struct setup *s = &f->setup;
  size_t row = (size_t)(s->kv_heads * s->head_dim), query_row = row * (size_t)s->group;
  assert_ok(f->context, oscar_sequence_begin(sequence, n));
  for (int layer = 0; layer < s->layers; layer++)
    assert_ok(f->context, oscar_sequence_write(sequence, layer, t->k + (size_t)begin * row, t->v + (size_t)begin * row));
  oscar_attention_job job = {sequence, n, t->q + (size_t)begin * query_row, out, OSCAR_ATTENTION_BY_NUMBER};
  assert_ok(f->context, oscar_attention_run(f->attention, t->layer, window, &job, 1));
  assert_ok(f->context, oscar_sequence_commit(sequence));
}

/* Outputs of all positions, fed in chunks. */
static inline float *run_text(struct fixture *f, const struct text *t, int window, int chunk) {
  int heads = f->setup.kv_heads * f->setup.group, d = f->setup.head_dim;
  float *out = floats(t->tokens, heads, d);
  oscar_sequence *sequence = NULL;
  assert_ok(f->context, oscar_sequence_create(f->cache, &sequence));
  for (int begin = 0; begin < t->tokens; begin += chunk) {
    int n = t->tokens - begin < chunk ? t->tokens - begin : chunk;
    feed(f, sequence, t, window, begin, n, out + (size_t)begin * (size_t)(heads * d));
  }
  oscar_sequence_free(sequence);
  return out;
}

/* Kernels work on rounded queries and probabilities where the instruction set has byte products (cpu/coded_kernels.h), and on
 * probabilities of 8 bits where it multiplies BF16 (cpu/matrix_kernels.h). */
static inline double bound(oscar_isa isa) { return isa > OSCAR_ISA_NEON_DOT ? 1.2e-2 : isa == OSCAR_ISA_PORTABLE ? 5e-5 : 1e-3; }
static double worst_error[LEVELS];

static inline void compare(const struct fixture *f, const struct text *t, int window, int position, const float *out) {
  const struct setup *s = &f->setup;
  int n = s->kv_heads * s->group * s->head_dim;
  double *truth = malloc(sizeof(double) * (size_t)n), worst = 0, energy = 0;
  define(f, t, window, position, truth);
  for (int i = 0; i < n; i++) {
    double error = fabs((double)out[i] - truth[i]);
    if (!(error <= worst)) worst = error;
    energy += truth[i] * truth[i];
  }
  double relative = worst / sqrt(energy / n);
  if (!(relative <= bound(s->isa)))
    fail_msg("%s, %s, %d heads a KV head, head_dim %d, window %d, position %d: relative error %g", level_name(s->isa),
             kind_names[s->kind], s->group, s->head_dim, window, position, relative);
  if (relative > worst_error[s->isa]) worst_error[s->isa] = relative;
  free(truth);
}

static inline double difference(const float *x, const float *y, size_t n) {
  double worst = 0, energy = 0;
  for (size_t i = 0; i < n; i++) {
    double e = fabs((double)x[i] - (double)y[i]);
    if (!(e <= worst)) worst = e;
    energy += (double)y[i] * (double)y[i];
  }
  return worst / sqrt(energy / (double)n);
}

static inline int print_errors(void **state) {
  (void)state;
  FOR_EACH_ISA(isa) printf("%s: largest error %.2g of the outputs' rms\n", level_name(isa), worst_error[isa]);
  return 0;
}

#endif
