/*
 * Attention over a cache, on every instruction set, against a definition in double precision that knows nothing of kernels: it
 * keeps every key and value it fed, rounds them to BF16, passes them through oscar_codec_encode and _decode where the reading
 * rule says codes, and sums up.
 */
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
static void *poisoned_alloc(void *user, size_t bytes, size_t alignment) {
  (void)user;
  void *p = aligned_alloc(alignment, round_up(bytes, alignment));
  if (p) memset(p, 0xFF, bytes);
  return p;
}
static void plain_free(void *user, void *p) {
  (void)user;
  free(p);
}

/* The instruction sets, and above them the page kernels for many rows that some CPUs have. */
enum { VECTOR_TILES = OSCAR_ISA_NEON_DOT + 1, MATRIX_TILES, LEVELS };
#define FOR_EACH_ISA(isa) for (oscar_isa isa = OSCAR_ISA_PORTABLE; isa < (oscar_isa)LEVELS; isa++)

static const char *level_name(oscar_isa isa) {
  return isa == (oscar_isa)VECTOR_TILES ? "AVX512-BF16" : isa == (oscar_isa)MATRIX_TILES ? "AMX" : oscar_isa_name(isa);
}

static bool available(oscar_isa isa) {
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

static oscar_context *poisoned_context(oscar_isa isa, int threads) {
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
static oscar_codec *graded_codec(oscar_context *context, uint64_t *seed, int d, int groups, oscar_row_form form,
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

static oscar_codec *plain_codec(oscar_context *context, enum kind kind, oscar_side side, int d) {
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

static oscar_codec_set *make_codecs(oscar_context *context, const struct setup *s) {
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

static int encode_and_decode(const void *user, int layer, int kv_head, oscar_side side, int head_dim, const float *rows,
                             float *out) {
  const oscar_codec *codec = oscar_codec_set_get(user, layer, kv_head, side);
  uint8_t *codes = malloc(64 * oscar_codec_row_bytes(codec));
  assert_non_null(codes);
  assert_int_equal(oscar_codec_encode(codec, 0, 64, rows, (size_t)head_dim, codes), OSCAR_OK);
  oscar_codec_decode(codec, 0, 64, codes, out, (size_t)head_dim);
  free(codes);
  return 64;
}

static void open_cache(struct fixture *f) {
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

static struct fixture open_fixture(struct setup setup) {
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

static void close_fixture(struct fixture *f) {
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

static float *floats(int tokens, int heads, int d) {
  float *x = malloc(sizeof(float) * (size_t)tokens * (size_t)heads * (size_t)d);
  assert_non_null(x);
  return x;
}

static float *random_floats(uint64_t *seed, int tokens, int heads, int d, float scale) {
  float *x = floats(tokens, heads, d);
  for (int i = 0; i < tokens * heads * d; i++) x[i] = scale * test_normal(seed);
  return x;
}

static float *rounded(const float *x, int n) {
  float *y = floats(n, 1, 1);
  for (int i = 0; i < n; i++) y[i] = bf16_to_f32(f32_to_bf16(x[i]));
  return y;
}

static float *through_codec(const struct fixture *f, int tokens, int layer, oscar_side side, const float *x) {
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

static struct text complete_text(const struct fixture *f, struct text t) {
  int n = t.tokens * f->setup.kv_heads * f->setup.head_dim;
  t.exact_k = rounded(t.k, n);
  t.exact_v = rounded(t.v, n);
  t.coded_k = through_codec(f, t.tokens, t.layer, OSCAR_KEYS, t.exact_k);
  t.coded_v = through_codec(f, t.tokens, t.layer, OSCAR_VALUES, t.exact_v);
  return t;
}

static struct text random_text(const struct fixture *f, uint64_t seed, int tokens, int layer) {
  const struct setup *s = &f->setup;
  float scale = s->key_scale > 0 ? s->key_scale : 1;
  struct text t = {.tokens = tokens, .layer = layer};
  t.q = random_floats(&seed, tokens, s->kv_heads * s->group, s->head_dim, 1);
  t.k = random_floats(&seed, tokens, s->kv_heads, s->head_dim, scale);
  t.v = random_floats(&seed, tokens, s->kv_heads, s->head_dim, 1);
  return complete_text(f, t);
}

static void free_text(struct text *t) {
  free(t->q), free(t->k), free(t->v), free(t->exact_k), free(t->exact_v), free(t->coded_k), free(t->coded_v);
}

/* out [query_heads][d] of the query at `position` */
static void define(const struct fixture *f, const struct text *t, int window, int position, double *out) {
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
static void feed(struct fixture *f, oscar_sequence *sequence, const struct text *t, int window, int begin, int n, float *out) {
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
static float *run_text(struct fixture *f, const struct text *t, int window, int chunk) {
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
static double bound(oscar_isa isa) { return isa > OSCAR_ISA_NEON_DOT ? 1.2e-2 : isa == OSCAR_ISA_PORTABLE ? 5e-5 : 1e-3; }
static double worst_error[LEVELS];

static void compare(const struct fixture *f, const struct text *t, int window, int position, const float *out) {
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

/* Feeds a random text in chunks and compares every `stride`-th position and the last. */
static void check_setup(struct setup setup, int tokens, int window, int chunk, int stride) {
  if (!available(setup.isa)) return;
  struct fixture f = open_fixture(setup);
  struct text t = random_text(&f, (uint64_t)(tokens + window + chunk), tokens, f.setup.layers - 1);
  float *out = run_text(&f, &t, window, chunk);
  size_t row = (size_t)(f.setup.kv_heads * f.setup.group * f.setup.head_dim);
  for (int position = 0; position < tokens; position += stride) compare(&f, &t, window, position, out + (size_t)position * row);
  compare(&f, &t, window, tokens - 1, out + (size_t)(tokens - 1) * row);
  free(out);
  free_text(&t);
  close_fixture(&f);
}

static void every_group_size_follows_the_definition(void **state) {
  (void)state;
  FOR_EACH_ISA(isa)
  for (int group = 1; group <= 16; group++)
    check_setup((struct setup){.kind = group % 2 ? GRADED : TURNING, .group = group, .sink = 1, .recent = 1, .isa = isa}, 270, 0,
                97, 61);
}

static void every_head_dim_and_codec_follows_the_definition(void **state) {
  (void)state;
  static const int dims[] = {16, 48, 64, 80, 96, 128, 256};
  FOR_EACH_ISA(isa)
  for (size_t i = 0; i < ARRAY_LENGTH(dims); i++)
    for (enum kind kind = BF16; kind <= TURNING; kind++) {
      if (kind == GROUPS_32 && dims[i] % 32) continue;
      struct setup setup = {
          .kind = kind, .kv_heads = dims[i] < 128 ? 2 : 1, .group = 3, .head_dim = dims[i], .sink = 1, .recent = 1, .isa = isa};
      check_setup(setup, 200, 0, 150, 70);
    }
}

static void every_length_around_a_page_boundary_follows_the_definition(void **state) {
  (void)state;
  static const int lengths[] = {1, 2, 15, 63, 64, 65, 127, 128, 129, 192, 193, 257};
  FOR_EACH_ISA(isa)
  for (size_t i = 0; i < ARRAY_LENGTH(lengths); i++) {
    check_setup((struct setup){.kind = SCALE_ZERO, .group = 2, .sink = 1, .recent = 1, .isa = isa}, lengths[i], 0, 64, 31);
    check_setup((struct setup){.kind = GRADED, .group = 2, .sink = 0, .recent = 0, .isa = isa}, lengths[i], 0, 1000, 31);
    check_setup((struct setup){.kind = GRADED, .group = 2, .sink = 2, .recent = 4, .isa = isa}, lengths[i], 0, 100, 31);
  }
}

static void every_window_follows_the_definition(void **state) {
  (void)state;
  static const int windows[] = {1, 2, 17, 63, 64, 65, 100, 128, 200, 399, 400, 5000};
  FOR_EACH_ISA(isa)
  for (size_t i = 0; i < ARRAY_LENGTH(windows); i++)
    for (int chunk = 37; chunk < 600; chunk += 400)
      check_setup((struct setup){.kind = i % 2 ? GRADED : TURNING, .group = 2, .sink = 1, .recent = 1, .isa = isa}, 400,
                  windows[i], chunk, 57);
}

/* Angles are turned from page to page and start over now and then: at no length may they drift. */
static void a_rotating_mean_is_where_it_belongs_after_many_pages(void **state) {
  (void)state;
  FOR_EACH_ISA(isa)
  check_setup((struct setup){.kind = TURNING, .kv_heads = 1, .head_dim = 32, .group = 1, .sink = 1, .recent = 1, .isa = isa},
              4700, 0, 512, 1171);
}

static void every_layer_reads_its_own_pages(void **state) {
  (void)state;
  FOR_EACH_ISA(isa)
  check_setup((struct setup){.kind = GRADED, .layers = 3, .kv_heads = 3, .group = 2, .sink = 1, .recent = 1, .isa = isa}, 300, 0,
              77, 50);
}

/* Scores of several hundreds: the softmax is all but one token, which may sit anywhere. */
static void huge_scores_leave_one_token(void **state) {
  (void)state;
  FOR_EACH_ISA(isa) {
    if (!available(isa)) continue;
    for (int where = 0; where < 4; where++) {
      struct fixture f =
          open_fixture((struct setup){.kind = where % 2 ? SCALE_ZERO : GRADED, .group = 2, .sink = 1, .recent = 1, .isa = isa});
      uint64_t seed = (uint64_t)where;
      int tokens = 400, target = (int[]){0, 399, 150, 70}[where];
      struct text t = {.tokens = tokens};
      t.q = random_floats(&seed, tokens, 4, 64, 1);
      t.k = random_floats(&seed, tokens, 2, 64, .1f);
      t.v = random_floats(&seed, tokens, 2, 64, 1);
      for (int head = 0; head < 2; head++)
        for (int i = 0; i < 64; i++) {
          t.k[(target * 2 + head) * 64 + i] = 100 * (i % 2 ? 1.f : -1.f);
          for (int g = 0; g < 2; g++) t.q[(399 * 4 + head * 2 + g) * 64 + i] = i % 2 ? 1.f : -1.f;
        }
      t = complete_text(&f, t);
      float *out = run_text(&f, &t, 0, 400);
      compare(&f, &t, 0, 399, out + 399 * 4 * 64);
      free(out);
      free_text(&t);
      close_fixture(&f);
    }
  }
}

static double difference(const float *x, const float *y, size_t n) {
  double worst = 0, energy = 0;
  for (size_t i = 0; i < n; i++) {
    double e = fabs((double)x[i] - (double)y[i]);
    if (!(e <= worst)) worst = e;
    energy += (double)y[i] * (double)y[i];
  }
  return worst / sqrt(energy / (double)n);
}

/* Only the order of sums may differ: tiles and blocks of rows are cut elsewhere. */
static void chunks_change_only_roundings(void **state) {
  (void)state;
  static const int chunks[] = {1, 7, 64, 500};
  enum { TOKENS = 600 };
  FOR_EACH_ISA(isa) {
    if (!available(isa)) continue;
    struct fixture f = open_fixture((struct setup){.kind = GRADED, .group = 3, .sink = 1, .recent = 2, .isa = isa});
    struct text t = random_text(&f, 7, TOKENS, 0);
    float *whole = run_text(&f, &t, 0, TOKENS);
    double worst = 0;
    for (size_t i = 0; i < ARRAY_LENGTH(chunks); i++) {
      float *out = run_text(&f, &t, 0, chunks[i]);
      double x = difference(out, whole, (size_t)TOKENS * 6 * 64);
      if (!(x <= worst)) worst = x;
      free(out);
    }
    printf("  %s: chunks differ by at most %.2g of the outputs' rms\n", level_name(isa), worst);
    assert_true(worst <= (isa > OSCAR_ISA_NEON_DOT ? bound(isa) : 5e-5)); /* few rows are not rounded to BF16 */
    free(whole);
    free_text(&t);
    close_fixture(&f);
  }
}

static void threads_change_only_roundings(void **state) {
  (void)state;
  enum { TOKENS = 1500 };
  FOR_EACH_ISA(isa) {
    if (!available(isa)) continue;
    float *out[3];
    static const int threads[3] = {1, 2, 5};
    for (int i = 0; i < 3; i++) {
      struct fixture f = open_fixture(
          (struct setup){.kind = GRADED, .kv_heads = 1, .group = 4, .sink = 1, .recent = 2, .isa = isa, .threads = threads[i]});
      struct text t = random_text(&f, 11, TOKENS, 0);
      oscar_sequence *sequence = NULL;
      assert_ok(f.context, oscar_sequence_create(f.cache, &sequence));
      out[i] = floats(TOKENS, 4, 64);
      feed(&f, sequence, &t, 0, 0, TOKENS - 3, out[i]);
      for (int x = TOKENS - 3; x < TOKENS; x++) { /* decode: one tile, cut into parts */
        feed(&f, sequence, &t, 0, x, 1, out[i] + x * 4 * 64);
        compare(&f, &t, 0, x, out[i] + x * 4 * 64);
      }
      float windowed[4 * 64];
      oscar_attention_job job = {sequence, 1, t.q + (TOKENS - 1) * 4 * 64, windowed, OSCAR_ATTENTION_BY_NUMBER};
      assert_ok(f.context, oscar_attention_run(f.attention, 0, 1111, &job, 1));
      compare(&f, &t, 1111, TOKENS - 1, windowed);
      enum { MANY = 20 }; /* a short prompt over a long history: two tiles of 16 and 4 positions, 64 rows and 16, in parts */
      float many[MANY * 4 * 64];
      oscar_attention_job short_prompt = {sequence, MANY, t.q + (TOKENS - MANY) * 4 * 64, many, OSCAR_ATTENTION_BY_NUMBER};
      assert_ok(f.context, oscar_attention_run(f.attention, 0, 0, &short_prompt, 1));
      for (int x = 0; x < MANY; x++) compare(&f, &t, 0, TOKENS - MANY + x, many + x * 4 * 64);
      free_text(&t);
      close_fixture(&f);
    }
    for (int i = 1; i < 3; i++)
      assert_true(difference(out[i], out[0], (size_t)TOKENS * 4 * 64) <= (isa > OSCAR_ISA_NEON_DOT ? bound(isa) : 5e-5));
    for (int i = 0; i < 3; i++) free(out[i]);
  }
}

/* Sequences of different lengths in one call, twice in it even, get what each gets alone. */
static void jobs_do_not_disturb_each_other(void **state) {
  (void)state;
  enum { JOBS = 4 };
  static const int lengths[JOBS] = {1, 700, 65, 300}, queries[JOBS] = {1, 1, 20, 3};
  FOR_EACH_ISA(isa) {
    if (!available(isa)) continue;
    struct fixture f =
        open_fixture((struct setup){.kind = SCALE_ZERO, .group = 5, .sink = 1, .recent = 1, .isa = isa, .threads = 3});
    struct text texts[JOBS];
    oscar_attention_job jobs[JOBS + 1];
    oscar_sequence *sequences[JOBS];
    for (int i = 0; i < JOBS; i++) {
      texts[i] = random_text(&f, (uint64_t)i, lengths[i], 0);
      assert_ok(f.context, oscar_sequence_create(f.cache, &sequences[i]));
      float *ignored = floats(lengths[i], 10, 64);
      feed(&f, sequences[i], &texts[i], 0, 0, lengths[i], ignored);
      free(ignored);
      int n = queries[i];
      jobs[i] = (oscar_attention_job){
          .sequence = sequences[i], .n = n, .q = texts[i].q + (size_t)(lengths[i] - n) * 640, .out = floats(n, 10, 64)};
    }
    jobs[JOBS] = jobs[1];
    jobs[JOBS].out = floats(1, 10, 64);
    assert_ok(f.context, oscar_attention_run(f.attention, 0, 0, jobs, JOBS + 1));
    assert_true(difference(jobs[JOBS].out, jobs[1].out, 640) <= 1e-12);
    for (int i = 0; i < JOBS; i++)
      for (int x = 0; x < queries[i]; x++) {
        int position = lengths[i] - queries[i] + x;
        if (i == 2 && position < 64) texts[i].only_coded = NULL;
        compare(&f, &texts[i], 0, position, jobs[i].out + x * 640);
      }
    assert_ok(f.context, oscar_attention_run(f.attention, 0, 0, NULL, 0));
    for (int i = 0; i < JOBS; i++) {
      oscar_sequence_free(sequences[i]);
      free(jobs[i].out);
      free_text(&texts[i]);
    }
    free(jobs[JOBS].out);
    close_fixture(&f);
  }
}

/* After a rewind that refills, pages the rule wants exact exist as codes only and are read as codes. */
static void pages_without_their_exact_form_are_read_as_codes(void **state) {
  (void)state;
  FOR_EACH_ISA(isa) {
    if (!available(isa)) continue;
    struct fixture f = open_fixture((struct setup){.kind = SCALE_ZERO, .group = 2, .sink = 1, .recent = 2, .isa = isa});
    struct text t = random_text(&f, 5, 1000, 0);
    bool only_coded[16] = {false};
    t.only_coded = only_coded;
    oscar_sequence *sequence = NULL;
    float *out = floats(1000, 4, 64);
    assert_ok(f.context, oscar_sequence_create(f.cache, &sequence));
    feed(&f, sequence, &t, 0, 0, 1000, out);
    int64_t resume = -1;
    assert_ok(f.context, oscar_sequence_truncate(sequence, 600, OSCAR_REWIND_REFILL, &resume));
    assert_in_range(resume, 0, 600);
    int pages = (int)(resume + 63) / 64, fallbacks = 0;
    for (int page = 0; page < pages; page++) {
      assert_ok(f.context, oscar_sequence_read_page(sequence, page, 0, 0, &only_coded[page], NULL, NULL));
      if (only_coded[page] && page + 2 >= resume / 64) fallbacks++;
    }
    assert_true(fallbacks > 0);
    int begin = (int)resume, n = 700 - begin;
    feed(&f, sequence, &t, 0, begin, n, out);
    for (int x = 0; x < n; x += 13) compare(&f, &t, 0, begin + x, out + x * 256);
    free(out);
    free_text(&t);
    close_fixture(&f);
  }
}

/* Two ways to the same numbers: codes read by their own kernels, and the decoded codes read as BF16. Rounding the latter moves a
 * number by up to 2^-9 of itself, so outputs may differ by about as much of theirs. */
static void a_filter_that_encodes_and_decodes_gives_what_the_codec_gives(void **state) {
  (void)state;
  enum { TOKENS = 700 };
  static const enum kind kinds[] = {SCALE_ZERO, GROUPS_32, FOUR_CRUMBS, GRADED};
  FOR_EACH_ISA(isa) {
    if (!available(isa)) continue;
    double worst = 0;
    for (size_t i = 0; i < ARRAY_LENGTH(kinds); i++) {
      struct setup setup = {
          .kind = kinds[i], .layers = 2, .group = 3, .sink = 1, .recent = 1, .isa = isa, .threads = 2, .key_scale = .5f};
      float *out[2];
      for (int filtered = 0; filtered < 2; filtered++) {
        setup.filtered = filtered;
        struct fixture f = open_fixture(setup);
        struct text t = random_text(&f, 21, TOKENS, 1);
        out[filtered] = run_text(&f, &t, 0, 150);
        for (int position = 0; position < TOKENS; position += 23) compare(&f, &t, 0, position, out[filtered] + position * 384);
        free_text(&t);
        close_fixture(&f);
      }
      assert_memory_equal(out[0], out[1], sizeof(float) * 192 * 384); /* until page 3 all is exact */
      double x = difference(out[1] + 192 * 384, out[0] + 192 * 384, (size_t)(TOKENS - 192) * 384);
      assert_true(x > 0); /* other kernels did read it */
      if (!(x <= worst)) worst = x;
      free(out[0]), free(out[1]);
    }
    printf("  %s: filter and codec differ by at most %.2g of the outputs' rms\n", level_name(isa), worst);
    assert_true(worst <= (isa > OSCAR_ISA_NEON_DOT ? 0x1p-6 : 0x1p-7));
  }
}

/* Softmax does not see a constant added to all keys; the codec that subtracts it as its mean gives the same codes. Keys and mean
 * are multiples of 1/16 so that BF16 holds them and their sums exactly. */
static void adding_the_key_mean_changes_nothing(void **state) {
  (void)state;
  enum { TOKENS = 500, D = 64 };
  FOR_EACH_ISA(isa) {
    if (!available(isa)) continue;
    float mean[D], *out[2];
    uint64_t seed = 3;
    for (int i = 0; i < D; i++) mean[i] = (float)(int)(test_random(&seed) % 129) / 16 - 4;
    for (int with = 0; with < 2; with++) {
      struct fixture f = {
          .setup = {
              .kind = SCALE_ZERO, .layers = 1, .kv_heads = 1, .group = 4, .head_dim = D, .sink = 1, .recent = 1, .isa = isa}};
      f.context = poisoned_context(isa, 2);
      oscar_codec_set_info info = {1, 1, D, "test", "", ""};
      assert_ok(f.context, oscar_codec_set_create(f.context, &info, &f.codecs));
      for (int side = 0; side < 2; side++) {
        oscar_codec_spec spec = {.head_dim = D,
                                 .channels = D,
                                 .form = OSCAR_ROW_SCALE_ZERO,
                                 .groups = 1,
                                 .clip_ratio = 1,
                                 .mean = with && side == OSCAR_KEYS ? mean : NULL};
        oscar_codec *codec = NULL;
        assert_ok(f.context, oscar_codec_create(f.context, &spec, &codec));
        assert_ok(f.context, oscar_codec_set_assign(f.codecs, 0, 0, (oscar_side)side, codec));
        oscar_codec_release(codec);
      }
      open_cache(&f);
      seed = 4;
      struct text t = {.tokens = TOKENS};
      t.q = random_floats(&seed, TOKENS, 4, D, 1);
      t.k = floats(TOKENS, 1, D);
      t.v = random_floats(&seed, TOKENS, 1, D, 1);
      for (int i = 0; i < TOKENS * D; i++) t.k[i] = (float)(int)(test_random(&seed) % 65) / 16 - 2 + (with ? mean[i % D] : 0);
      out[with] = run_text(&f, &t, 0, 100);
      free_text(&t);
      close_fixture(&f);
    }
    assert_true(difference(out[1], out[0], (size_t)TOKENS * 4 * D) <= 2 * bound(isa));
    free(out[0]), free(out[1]);
  }
}

static void wrong_arguments_are_refused_by_name(void **state) {
  (void)state;
  struct fixture f = open_fixture((struct setup){.kind = SCALE_ZERO, .layers = 2, .group = 2, .sink = 1, .recent = 1});
  struct text t = random_text(&f, 1, 100, 0);
  float *out = floats(200, 4, 64);
  oscar_attention *a = NULL;
  assert_int_equal(oscar_attention_create(f.cache, NULL, &a), OSCAR_INVALID_ARGUMENT);
  assert_int_equal(oscar_attention_create(NULL, NULL, &a), OSCAR_INVALID_ARGUMENT);
  static const int wrong_heads[] = {0, -2, 3, 34};
  for (size_t i = 0; i < ARRAY_LENGTH(wrong_heads); i++) {
    oscar_attention_options options = {.query_heads = wrong_heads[i]};
    assert_int_equal(oscar_attention_create(f.cache, &options, &a), OSCAR_INVALID_ARGUMENT);
    assert_non_null(strstr(oscar_last_error(f.context), "KV heads"));
    assert_null(a);
  }
  static const float wrong_scales[] = {-1, NAN, INFINITY};
  for (size_t i = 0; i < ARRAY_LENGTH(wrong_scales); i++) {
    oscar_attention_options options = {.query_heads = 4, .scale = wrong_scales[i]};
    assert_int_equal(oscar_attention_create(f.cache, &options, &a), OSCAR_INVALID_ARGUMENT);
    assert_non_null(strstr(oscar_last_error(f.context), "scale"));
  }

  oscar_sequence *sequence = NULL;
  assert_ok(f.context, oscar_sequence_create(f.cache, &sequence));
  oscar_attention_job job = {sequence, 1, t.q, out, OSCAR_ATTENTION_BY_NUMBER};
  assert_int_equal(oscar_attention_run(f.attention, 0, 0, &job, 1), OSCAR_INVALID_ARGUMENT); /* empty */
  feed(&f, sequence, &t, 0, 0, 100, out);
  assert_ok(f.context, oscar_attention_run(f.attention, 0, 0, &job, 1));
  assert_int_equal(oscar_attention_run(f.attention, 2, 0, &job, 1), OSCAR_INVALID_ARGUMENT);
  assert_int_equal(oscar_attention_run(f.attention, -1, 0, &job, 1), OSCAR_INVALID_ARGUMENT);
  assert_int_equal(oscar_attention_run(f.attention, 0, -1, &job, 1), OSCAR_INVALID_ARGUMENT);
  assert_int_equal(oscar_attention_run(f.attention, 0, 0, NULL, 1), OSCAR_INVALID_ARGUMENT);
  assert_int_equal(oscar_attention_run(f.attention, 0, 0, &job, -1), OSCAR_INVALID_ARGUMENT);
  job.n = 101;
  assert_int_equal(oscar_attention_run(f.attention, 0, 0, &job, 1), OSCAR_INVALID_ARGUMENT);
  assert_non_null(strstr(oscar_last_error(f.context), "100 positions"));
  job.n = 0;
  assert_int_equal(oscar_attention_run(f.attention, 0, 0, &job, 1), OSCAR_INVALID_ARGUMENT);
  job = (oscar_attention_job){.sequence = sequence, .n = 1, .out = out};
  assert_int_equal(oscar_attention_run(f.attention, 0, 0, &job, 1), OSCAR_INVALID_ARGUMENT);

  job.q = t.q;
  assert_ok(f.context, oscar_sequence_begin(sequence, 1));
  assert_ok(f.context, oscar_sequence_write(sequence, 1, t.k, t.v));
  assert_int_equal(oscar_attention_run(f.attention, 0, 0, &job, 1), OSCAR_INVALID_ARGUMENT);
  assert_non_null(strstr(oscar_last_error(f.context), "has not been written"));
  assert_ok(f.context, oscar_attention_run(f.attention, 1, 0, &job, 1));
  oscar_sequence_abort(sequence);

  struct fixture other = open_fixture((struct setup){.kind = BF16, .group = 2});
  assert_int_equal(oscar_attention_run(other.attention, 0, 0, &job, 1), OSCAR_INVALID_ARGUMENT);
  assert_non_null(strstr(oscar_last_error(other.context), "another cache"));
  close_fixture(&other);
  oscar_attention_free(NULL);
  free(out);
  free_text(&t);
  close_fixture(&f);
}

static void every_failed_allocation_is_survived(void **state) {
  (void)state;
  struct failing_alloc failing;
  struct fixture f = {.setup = {.kind = GRADED, .layers = 1, .kv_heads = 1, .group = 2, .head_dim = 64, .sink = 1, .recent = 1}};
  f.context = failing_context(&failing);
  f.context->options.threads = 4; /* so that tiles are cut; the library itself allocates outside of parallel loops only */
  f.codecs = make_codecs(f.context, &f.setup);
  open_cache(&f);
  oscar_attention_free(f.attention);
  oscar_attention_options options = {.query_heads = 2};
  sweep_allocations(f.context, &failing, oscar_attention_create(f.cache, &options, &f.attention));
  f.setup.isa = oscar_context_isa(f.context);
  struct text t = random_text(&f, 1, 1500, 0);
  oscar_sequence *sequence = NULL;
  assert_ok(f.context, oscar_sequence_create(f.cache, &sequence));
  assert_ok(f.context, oscar_sequence_begin(sequence, 1500));
  assert_ok(f.context, oscar_sequence_write(sequence, 0, t.k, t.v));
  assert_ok(f.context, oscar_sequence_commit(sequence));
  float *out = floats(200, 2, 64);
  for (int n = 1; n <= 200; n += 199) {
    oscar_attention_job job = {sequence, n, t.q + (1500 - n) * 128, out, OSCAR_ATTENTION_BY_NUMBER};
    sweep_allocations(f.context, &failing, oscar_attention_run(f.attention, 0, 0, &job, 1));
    compare(&f, &t, 0, 1499, out + (n - 1) * 128);
  }
  free(out);
  free_text(&t);
  oscar_sequence_free(sequence);
  oscar_attention_free(f.attention);
  oscar_cache_free(f.cache);
  oscar_codec_set_free(f.codecs);
  failing_context_free(f.context, &failing);
}

static int print_errors(void **state) {
  (void)state;
  FOR_EACH_ISA(isa) printf("%s: largest error %.2g of the outputs' rms\n", level_name(isa), worst_error[isa]);
  return 0;
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(every_group_size_follows_the_definition),
      cmocka_unit_test(every_head_dim_and_codec_follows_the_definition),
      cmocka_unit_test(every_length_around_a_page_boundary_follows_the_definition),
      cmocka_unit_test(every_window_follows_the_definition),
      cmocka_unit_test(a_rotating_mean_is_where_it_belongs_after_many_pages),
      cmocka_unit_test(every_layer_reads_its_own_pages),
      cmocka_unit_test(huge_scores_leave_one_token),
      cmocka_unit_test(chunks_change_only_roundings),
      cmocka_unit_test(threads_change_only_roundings),
      cmocka_unit_test(jobs_do_not_disturb_each_other),
      cmocka_unit_test(pages_without_their_exact_form_are_read_as_codes),
      cmocka_unit_test(a_filter_that_encodes_and_decodes_gives_what_the_codec_gives),
      cmocka_unit_test(adding_the_key_mean_changes_nothing),
      cmocka_unit_test(wrong_arguments_are_refused_by_name),
      cmocka_unit_test(every_failed_allocation_is_survived),
  };
  return cmocka_run_group_tests(tests, NULL, print_errors);
}
