/*
 * Attention over a cache on a GPU against the same over a cache in host memory, on portable kernels, which other tests hold
 * against a definition in double precision. The same numbers go into both; codes are equal to the bit, so only sums differ.
 */
#include "support.h"

#include "attention/cuda/device.h"
#include "attention/step.h"
#include "cache/device_step.h"
#include "cuda/device.h"

#include <oscar/attention.h>

/* Probabilities times gains are fp16 numbers, and in prefill queries, amplitudes and waves too: scores then have errors of 2^-12
 * of theirs. So errors grow with what scores are, and queries here are mostly LARGE_QUERIES times as large as keys and make
 * scores differ by several units; where both have unit variance, TOLERANCE holds for all forms. All outputs together, as relative
 * errors are quoted; and a single one, which may come out small where its values cancel. In prefill each pair that turns adds the
 * roundings of its own, and what a mean takes off these keys, which do not have it, the codes have to bring back. */
#define LARGE_QUERIES          2.5f
#define TOLERANCE              5e-4
#define ROW_TOLERANCE          4e-3
#define WIDE_ROW_TOLERANCE     5e-3   /* of more than eight rows queries are fp16 numbers too */
#define TURNING_TOLERANCE      5.5e-4 /* up to half of the pairs, and log gains: what fits have */
#define MUCH_TURNING_TOLERANCE 7e-4   /* and where three halves of the only gain are rounded */
#define PREFILL_ROW_TOLERANCE  7e-3

/* How many pairs of a head have a mean that turns. Which ones is drawn, but for FIRST. */
enum turning { NO_PAIRS, ONE_PAIR, FEW, FIRST, ODD, HALF, ALL_PAIRS };

struct form {
  oscar_row_form form;
  int groups, key_crumbs, value_crumbs; /* crumbs: of a row; 0 groups: BF16 */
  enum turning turns;
  int value_groups; /* 0: as keys */
};

struct setup {
  int kv_heads, group, head_dim;
  struct form form;
  int sink, recent, window;
  bool unit_queries; /* else LARGE_QUERIES */
};

struct side_of_test {
  oscar_context *context;
  oscar_codec_set *codecs;
  oscar_cache *cache;
  oscar_attention *attention;
};

static int too_far; /* comparisons of a test that failed: all are shown before it does */
static oscar_cuda *gpu;
static oscar_context *gpu_context, *host_context;

/* Random crumbs with a given sum, at most 4 a channel; groups of blocks split no channel, so channels come in sizes that
 * divide 16. */
static void deal_crumbs(int d, int total, uint8_t *crumbs) {
  memset(crumbs, 0, (size_t)d);
  int channel = 0;
  for (int block = 0; block < total / 16; block++) {
    static const uint8_t sizes[3][16] = {
        {4, 4, 4, 4}, {4, 2, 2, 2, 2, 2, 1, 1}, {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1}};
    int left = d - channel, blocks_left = total / 16 - block,
        choice = left >= 16 * blocks_left  ? 2
                 : left >= 8 * blocks_left ? 1
                                           : 0;
    if (choice == 2 && block % 3 == 1) choice = 1;
    for (int i = 0; i < 16 && sizes[choice][i]; i++) crumbs[channel++] = sizes[choice][i];
  }
}

/* Ascending. */
static int draw_pairs(int d, enum turning turning, uint64_t seed, uint16_t *pair) {
  const int
      all = d / 2,
      counts[] = {
          [ONE_PAIR] = 1, [FEW] = all / 4 - 3, [FIRST] = all * 5 / 8, [ODD] = all / 2 + 5, [HALF] = all / 2, [ALL_PAIRS] = all};
  const int among = turning == FIRST ? counts[FIRST] : all;
  int count = 0;
  for (int p = 0; p < among; p++)
    if (test_uniform(&seed) * (among - p) < counts[turning] - count) pair[count++] = (uint16_t)p;
  return count;
}

static oscar_codec *make_codec(oscar_context *context, uint64_t *seed, int d, const struct form *form, oscar_side side,
                               oscar_rope *rope) {
  static const float step[5] = {1, 1, .33f, .1f, .03f};
  const int total = side == OSCAR_KEYS ? form->key_crumbs : form->value_crumbs;
  uint8_t *crumbs = malloc((size_t)d);
  uint16_t pair[OSCAR_MAX_HEAD_DIM / 2];
  float *steps = malloc(4 * (size_t)d), *mean = malloc(4 * (size_t)d), *rotating = malloc(4 * (size_t)d);
  float *encode = malloc(4 * (size_t)(d * d)), *decode = malloc(4 * (size_t)(d * d));
  deal_crumbs(d, total, crumbs);
  if (form->form == OSCAR_ROW_SCALE_ZERO)
    for (int i = 0; i < d; i++) crumbs[i] = (uint8_t)(total / d);
  for (int i = 0; i < d; i++) {
    steps[i] = form->form == OSCAR_ROW_SCALE_ZERO ? 1 : step[crumbs[i]] * (float)exp(test_uniform(seed) - .5);
    mean[i] = test_normal(seed);
    rotating[i] = 2 * test_normal(seed);
  }
  for (int i = 0; i < d * d; i++) {
    float unit = i / d == i % d ? 1 : 0;
    encode[i] = unit + .3f * test_normal(seed) / sqrtf((float)d);
    decode[i] = unit + .3f * test_normal(seed) / sqrtf((float)d);
  }
  const int pairs = rope ? draw_pairs(d, form->turns, *seed, pair) : 0;
  oscar_codec_spec spec = {.head_dim = d,
                           .channels = d,
                           .form = form->form,
                           .groups = side == OSCAR_VALUES && form->value_groups ? form->value_groups : form->groups,
                           .clip_ratio = .96f,
                           .crumbs = crumbs,
                           .steps = steps,
                           .mean = mean,
                           .encode = encode,
                           .decode = decode,
                           .rope = rope,
                           .rotating_pairs = pairs,
                           .rotating_pair = pair,
                           .rotating_mean = rotating};
  oscar_codec *codec = NULL;
  assert_ok(context, oscar_codec_create(context, &spec, &codec));
  free(crumbs), free(steps), free(mean), free(rotating), free(encode), free(decode);
  return codec;
}

static oscar_codec_set *make_codecs(oscar_context *context, const struct setup *s) {
  if (s->form.groups == 0) return NULL;
  oscar_codec_set_info info = {1, s->kv_heads, s->head_dim, "test", "", ""};
  oscar_codec_set *set = NULL;
  oscar_rope *rope = NULL;
  float frequencies[OSCAR_MAX_HEAD_DIM / 2];
  uint64_t seed = 99;
  for (int i = 0; i < s->head_dim / 2; i++) frequencies[i] = (float)pow(1e6, -2.0 * i / s->head_dim);
  if (s->form.turns)
    assert_ok(context, oscar_rope_create(context, &(oscar_rope_spec){OSCAR_ROPE_HALVES, s->head_dim, frequencies}, &rope));
  assert_ok(context, oscar_codec_set_create(context, &info, &set));
  for (int head = 0; head < s->kv_heads; head++)
    for (int side = 0; side < 2; side++) {
      oscar_codec *codec = make_codec(context, &seed, s->head_dim, &s->form, (oscar_side)side, side == OSCAR_KEYS ? rope : NULL);
      assert_ok(context, oscar_codec_set_assign(set, 0, head, (oscar_side)side, codec));
      oscar_codec_release(codec);
    }
  oscar_rope_release(rope);
  return set;
}

static struct side_of_test open_side(const struct setup *s, bool on_gpu, size_t budget) {
  struct side_of_test t = {.context = on_gpu ? gpu_context : host_context};
  t.codecs = make_codecs(t.context, s);
  oscar_cache_options options;
  oscar_cache_options_default(&options);
  options.layers = 1;
  options.kv_heads = s->kv_heads;
  options.head_dim = s->head_dim;
  options.sink_pages = s->sink;
  options.recent_pages = s->recent;
  options.codecs = t.codecs;
  options.cuda = on_gpu ? gpu : NULL;
  options.budget_bytes = budget;
  assert_ok(t.context, oscar_cache_create(t.context, &options, &t.cache));
  assert_ok(t.context,
            oscar_attention_create(t.cache, &(oscar_attention_options){.query_heads = s->kv_heads * s->group}, &t.attention));
  return t;
}

static void close_side(struct side_of_test *t) {
  oscar_attention_free(t->attention);
  oscar_cache_free(t->cache);
  oscar_codec_set_free(t->codecs);
}

static float *random_floats(size_t n, uint64_t *seed, float scale) {
  float *x = malloc(n * sizeof *x);
  assert_non_null(x);
  for (size_t i = 0; i < n; i++) x[i] = scale * test_normal(seed);
  return x;
}

static void *on_device(const void *host, size_t bytes) {
  void *memory;
  assert_ok(gpu_context, cuda_alloc(gpu, bytes, &memory));
  assert_ok(gpu_context, cuda_upload(gpu, memory, host, bytes));
  return memory;
}

/* Coded pages of both are the same bits. */
static void compare_pages(const oscar_sequence *host, const oscar_sequence *device, const struct setup *s) {
  const int pages = (int)((oscar_sequence_length(host) + 63) / 64);
  const size_t bytes = 64 * 1024 * 4;
  uint8_t *a[2] = {calloc(bytes, 1), calloc(bytes, 1)}, *b[2] = {calloc(bytes, 1), calloc(bytes, 1)};
  for (int page = 0; page<pages; page += pages> 8 ? 3 : 1)
    for (int head = 0; head < s->kv_heads; head++) {
      bool coded[2];
      assert_ok(host_context, oscar_sequence_read_page(host, page, 0, head, &coded[0], a[0], a[1]));
      assert_ok(gpu_context, oscar_sequence_read_page(device, page, 0, head, &coded[1], b[0], b[1]));
      assert_int_equal(coded[0], coded[1]);
      for (int side = 0; side < 2; side++) assert_memory_equal(a[side], b[side], bytes);
    }
  for (int i = 0; i < 2; i++) free(a[i]), free(b[i]);
}

static double prefill_tolerance(const struct form *form) {
  if (form->turns == NO_PAIRS) return TOLERANCE;
  const bool much = form->turns == FIRST || form->turns == ODD || form->turns == ALL_PAIRS;
  return much || form->form != OSCAR_ROW_LOG_GAINS ? MUCH_TURNING_TOLERANCE : TURNING_TOLERANCE;
}

/* Relative errors of one way to compute. */
struct errors {
  double all, row, squared, norm;
};
static const enum attention_way ways[] = {ATTENTION_DECODE, ATTENTION_DECODE_WIDE, ATTENTION_PREFILL, ATTENTION_BY_COST};
static const char *const way_names[] = {"decode", "wide", "prefill", "by cost", "step"};
enum { STEP = ARRAY_LENGTH(ways), ALL_WAYS }; /* STEP: attention_step, where every sequence has one token */

static void add_errors(struct errors *e, const struct setup *s, size_t rows, const float *expected, const float *out, int step) {
  for (size_t row = 0; row < rows; row++) {
    double error = 0, norm = 0;
    for (int i = 0; i < s->head_dim; i++) {
      const size_t x = row * (size_t)s->head_dim + (size_t)i;
      error += pow((double)out[x] - (double)expected[x], 2);
      norm += pow((double)expected[x], 2);
    }
    const double relative = sqrt(error / norm);
    if (isnan(relative)) fail_msg("row %zu of step %d was not computed", row, step);
    e->squared += error;
    e->norm += norm;
    e->row = fmax(e->row, relative);
  }
  e->all = sqrt(e->squared / e->norm);
}

/* The open steps of one token each by attention_step: rows on the device, already normed and rotated. */
static void run_step(const struct side_of_test *side, const struct setup *s, oscar_sequence **sequences, int count,
                     const float *q, const float *k, const float *v, float *out) {
  const int32_t positions[64] = {0}; /* nothing is rotated */
  struct device_step step;
  int32_t *there = on_device(positions, sizeof positions);
  attention_choose(side->attention, s->group > 8 ? ATTENTION_DECODE_WIDE : ATTENTION_BY_COST);
  assert_ok(side->context, sequences_make_ready(sequences, count, &step));
  int kernels;
  assert_ok(side->context, attention_make_ready(side->attention, &s->window, 1, sequences, count, &kernels));
  assert_in_range(kernels, 0, STEP_KERNELS - 1);
  const int64_t kv = s->kv_heads * s->head_dim;
  const struct decode_rows rows = {.q = q,
                                   .k = k,
                                   .v = v,
                                   .q_pitch = kv * s->group,
                                   .kv_pitch = kv,
                                   .positions = there,
                                   .places = step.places,
                                   .bad = step.bad};
  assert_ok(side->context, attention_step(side->attention, 0, s->window, &rows, out));
  sequences_note_written(sequences, count);
  assert_ok(side->context, oscar_cuda_wait(gpu));
  cuda_release(gpu, there, sizeof positions);
}

/* Several sequences of different lengths, then steps of different sizes for all of them in one call. errors: of each way. */
static void compare(const struct setup *s, const int *lengths, int sequences, const int *steps, int n_steps,
                    struct errors *errors) {
  uint64_t seed = 7;
  const size_t kv = (size_t)(s->kv_heads * s->head_dim), q_width = kv * (size_t)s->group;
  struct side_of_test sides[2] = {open_side(s, false, (size_t)256 << 20), open_side(s, true, (size_t)256 << 20)};
  oscar_sequence *sequence[2][64];
  for (int i = 0; i < sequences; i++)
    for (int side = 0; side < 2; side++)
      assert_ok(sides[side].context, oscar_sequence_create(sides[side].cache, &sequence[side][i]));
  for (int step = -1; step < n_steps; step++) {
    size_t total = 0;
    int tokens[64];
    for (int i = 0; i < sequences; i++) total += (size_t)(tokens[i] = step < 0 ? lengths[i] : steps[step]);
    if (total == 0) continue;
    float *k = random_floats(total * kv, &seed, 1), *v = random_floats(total * kv, &seed, 1);
    float *q = random_floats(total * q_width, &seed, s->unit_queries ? 1 : LARGE_QUERIES),
          *out[2] = {malloc(4 * total * q_width), malloc(4 * total * q_width)};
    float *dk = on_device(k, 4 * total * kv), *dv = on_device(v, 4 * total * kv), *dq = on_device(q, 4 * total * q_width),
          *dout = on_device(q, 4 * total * q_width);
    oscar_attention_job jobs[2][64];
    size_t at = 0;
    int n_jobs = 0;
    const bool enters = step >= 0 && steps[step] == 1;
    for (int i = 0; i < sequences; i++) {
      if (tokens[i] == 0) continue;
      for (int side = 0; side < 2; side++) {
        assert_ok(sides[side].context, oscar_sequence_begin(sequence[side][i], tokens[i]));
        if (side == 0 || !enters)
          assert_ok(sides[side].context,
                    oscar_sequence_write(sequence[side][i], 0, (side ? dk : k) + at * kv, (side ? dv : v) + at * kv));
        jobs[side][n_jobs] = (oscar_attention_job){sequence[side][i], tokens[i], (side ? dq : q) + at * q_width,
                                                   (side ? dout : out[0]) + at * q_width, OSCAR_ATTENTION_BY_NUMBER};
      }
      at += (size_t)tokens[i];
      n_jobs++;
    }
    assert_ok(host_context, oscar_attention_run(sides[0].attention, 0, s->window, jobs[0], n_jobs));
    if (enters) {
      run_step(&sides[1], s, sequence[1], sequences, dq, dk, dv, dout);
      assert_ok(gpu_context, cuda_download(gpu, out[1], dout, 4 * total * q_width));
      add_errors(&errors[STEP], s, total * (size_t)(s->kv_heads * s->group), out[0], out[1], step);
    }
    for (size_t way = 0; way < ARRAY_LENGTH(ways); way++) {
      attention_choose(sides[1].attention, ways[way]);
      memset(out[1], 0xFF, 4 * total * q_width);
      assert_ok(gpu_context, cuda_upload(gpu, dout, out[1], 4 * total * q_width));
      assert_ok(gpu_context, oscar_attention_run(sides[1].attention, 0, s->window, jobs[1], n_jobs));
      assert_ok(gpu_context, cuda_download(gpu, out[1], dout, 4 * total * q_width));
      add_errors(&errors[way], s, total * (size_t)(s->kv_heads * s->group), out[0], out[1], step);
    }
    for (int i = 0; i < sequences; i++)
      for (int side = 0; side < 2 && tokens[i]; side++) assert_ok(sides[side].context, oscar_sequence_commit(sequence[side][i]));
    cuda_release(gpu, dk, 4 * total * kv), cuda_release(gpu, dv, 4 * total * kv);
    cuda_release(gpu, dq, 4 * total * q_width), cuda_release(gpu, dout, 4 * total * q_width);
    free(k), free(v), free(q), free(out[0]), free(out[1]);
  }
  for (int i = 0; i < sequences; i++) compare_pages(sequence[0][i], sequence[1][i], s);
  for (int side = 0; side < 2; side++) close_side(&sides[side]);
}

static void expect_close(const char *what, const struct setup *s, const int *lengths, int sequences, const int *steps,
                         int n_steps) {
  struct errors errors[ALL_WAYS] = {{0}};
  compare(s, lengths, sequences, steps, n_steps, errors);
  for (size_t way = 0; way < ALL_WAYS; way++) {
    if (way == STEP && errors[way].norm == 0) continue; /* no such step */
    print_message("%-18s %-8s heads %d x %2d, d %3d, crumbs %3d/%3d, form %d groups %d%s: relative error %.2e, of a row %.2e\n",
                  what, way_names[way], s->kv_heads, s->group, s->head_dim, s->form.key_crumbs, s->form.value_crumbs,
                  (int)s->form.form, s->form.groups, s->form.turns ? ", turning" : "", errors[way].all, errors[way].row);
    const bool few = way == STEP || ways[way] == ATTENTION_DECODE, wide = way != STEP && ways[way] == ATTENTION_DECODE_WIDE;
    if (!(errors[way].all < (few || wide || s->unit_queries ? TOLERANCE : prefill_tolerance(&s->form)))) too_far++;
    if (!(errors[way].row < (few ? ROW_TOLERANCE : wide ? WIDE_ROW_TOLERANCE : PREFILL_ROW_TOLERANCE))) too_far++;
  }
}

#define LOG OSCAR_ROW_LOG_GAINS

static void group_sizes_agree(void **state) {
  too_far = 0;
  (void)state;
  const int lengths[] = {1000, 64, 333}, steps[] = {1, 1, 3};
  for (int group = 1; group <= 16; group++) {
    const struct setup s = {.kv_heads = 2,
                            .group = group,
                            .head_dim = 64,
                            .form = {LOG, 4, 64, 64, group % 2 ? NO_PAIRS : HALF, 0},
                            .sink = 1,
                            .recent = 2};
    expect_close("group", &s, lengths, 3, steps, 3);
  }
  assert_int_equal(too_far, 0);
}

static void head_dimensions_and_layouts_agree(void **state) {
  too_far = 0;
  (void)state;
  const int lengths[] = {700, 63}, steps[] = {1, 2};
  static const struct {
    int d;
    struct form form;
  } cases[] = {
      {128, {LOG, 4, 128, 128, HALF, 0}},
      {128, {LOG, 4, 128, 128, NO_PAIRS, 0}},
      {128, {LOG, 4, 128, 128, ALL_PAIRS, 0}},
      {96, {LOG, 4, 96, 96, ALL_PAIRS, 0}},
      {256, {LOG, 4, 256, 256, FEW, 0}},
      {128, {LOG, 4, 96, 128, ALL_PAIRS, 0}},
      {128, {OSCAR_ROW_GAIN, 1, 128, 128, ALL_PAIRS, 0}},
      {64, {LOG, 4, 64, 64, HALF, 0}},
      {96, {LOG, 4, 96, 96, HALF, 0}},
      {256, {LOG, 4, 256, 256, HALF, 0}},
      {128, {LOG, 4, 96, 128, HALF, 0}},
      {128, {LOG, 4, 80, 128, HALF, 0}},
      {128, {LOG, 4, 112, 128, NO_PAIRS, 0}},
      {128, {LOG, 4, 64, 128, HALF, 0}},
      {128, {LOG, 2, 32, 128, NO_PAIRS, 4}},
      {128, {LOG, 3, 48, 128, NO_PAIRS, 4}},
      {128, {LOG, 1, 16, 128, NO_PAIRS, 4}},
      {128, {LOG, 2, 128, 128, NO_PAIRS, 0}},
      {128, {LOG, 4, 128, 128, NO_PAIRS, 2}},
      {128, {LOG, 4, 144, 160, HALF, 0}},
      {128, {LOG, 4, 160, 128, HALF, 0}},
      {128, {LOG, 4, 176, 144, HALF, 0}},
      {128, {LOG, 4, 256, 256, HALF, 0}},
      {64, {LOG, 4, 112, 80, HALF, 0}},
      {64, {OSCAR_ROW_GAIN, 1, 64, 64, HALF, 0}},
      {128, {OSCAR_ROW_GAIN, 1, 128, 128, HALF, 0}},
      {128, {OSCAR_ROW_GAIN, 2, 128, 128, NO_PAIRS, 0}},
      {128, {OSCAR_ROW_SCALE_ZERO, 1, 128, 128, NO_PAIRS, 0}},
      {64, {OSCAR_ROW_SCALE_ZERO, 1, 128, 128, NO_PAIRS, 0}},
      {64, {OSCAR_ROW_SCALE_ZERO, 1, 256, 256, NO_PAIRS, 0}},
      {128, {OSCAR_ROW_SCALE_ZERO, 1, 512, 512, NO_PAIRS, 0}},
      {256, {OSCAR_ROW_GAIN, 1, 256, 256, NO_PAIRS, 0}},
      {64, {LOG, 0, 0, 0, NO_PAIRS, 0}},
      {96, {LOG, 0, 0, 0, NO_PAIRS, 0}},
      {128, {LOG, 0, 0, 0, NO_PAIRS, 0}},
      {256, {LOG, 0, 0, 0, NO_PAIRS, 0}},
  };
  for (size_t i = 0; i < ARRAY_LENGTH(cases); i++) {
    struct setup s = {.kv_heads = 2, .group = 4, .head_dim = cases[i].d, .form = cases[i].form, .sink = 1, .recent = 4};
    expect_close("layout", &s, lengths, 2, steps, 2);
    for (s.group = 7; s.group < 16; s.group += 5) expect_close("layout", &s, lengths, 2, steps, 1);
  }
  assert_int_equal(too_far, 0);
}

/* Every head has pairs of its own, as many as the other. */
static void pairs_of_heads_agree(void **state) {
  too_far = 0;
  (void)state;
  const int lengths[] = {900, 63, 4200}, steps[] = {1, 2};
  for (int d = 64; d <= 128; d *= 2)
    for (enum turning turns = ONE_PAIR; turns <= ALL_PAIRS; turns++) {
      const struct setup s = {.kv_heads = 3, .group = 4, .head_dim = d, .form = {LOG, 4, d, d, turns, 0}, .sink = 1, .recent = 2};
      expect_close("pairs", &s, lengths, 3, steps, 2);
    }
  assert_int_equal(too_far, 0);
}

static void lengths_and_windows_agree(void **state) {
  too_far = 0;
  (void)state;
  const struct form form = {LOG, 4, 128, 128, HALF, 0};
  static const int lengths[8][3] = {{0, 0, 0},       {1, 5, 16},     {63, 64, 65},     {320, 321, 384},
                                    {385, 448, 449}, {3000, 1, 700}, {4096, 4097, 17}, {9000, 0, 0}};
  const int steps[] = {1, 1, 8};
  for (int i = 0; i < 8; i++)
    for (int windows = 0; windows < 2; windows++) {
      struct setup s = {.kv_heads = 3,
                        .group = 4,
                        .head_dim = 128,
                        .form = form,
                        .sink = i % 2,
                        .recent = 1 + i % 4,
                        .window = windows ? 450 : 0};
      expect_close(windows ? "lengths, a window" : "lengths", &s, lengths[i], i == 7 ? 1 : 3, steps, 3);
    }
  assert_int_equal(too_far, 0);
}

/* Of all forms that have kernels for prompts. */
static void queries_of_unit_variance_agree(void **state) {
  too_far = 0;
  (void)state;
  const int lengths[] = {3000, 700}, steps[] = {1, 2};
  for (int d = 64; d <= 128; d *= 2)
    for (int one_gain = 0; one_gain < 2; one_gain++)
      for (enum turning turns = NO_PAIRS; turns <= ALL_PAIRS; turns++) {
        const struct form form = {one_gain ? OSCAR_ROW_GAIN : LOG, one_gain ? 1 : 4, d, d, turns, 0};
        const struct setup s = {
            .kv_heads = 2, .group = 12, .head_dim = d, .form = form, .sink = 1, .recent = 4, .unit_queries = true};
        expect_close("unit queries", &s, lengths, 2, steps, 2);
      }
  assert_int_equal(too_far, 0);
}

static void many_short_sequences_agree(void **state) {
  too_far = 0;
  (void)state;
  int lengths[40];
  uint64_t seed = 5;
  for (int i = 0; i < 40; i++) lengths[i] = (int)(exp(test_uniform(&seed) * 7.5));
  const int steps[] = {1, 1};
  struct setup s = {.kv_heads = 2, .group = 4, .head_dim = 64, .form = {LOG, 4, 64, 64, HALF, 0}, .sink = 1, .recent = 2};
  expect_close("40 sequences", &s, lengths, 40, steps, 2);
  assert_int_equal(too_far, 0);
}

/* Of steps whose rows kernels enter, what cannot be stored is found by commit. */
static void numbers_that_cannot_be_are_found(void **state) {
  (void)state;
  enum { SEQUENCES = 3 };
  for (int coded = 0; coded < 2; coded++) {
    const struct setup s = {
        .kv_heads = 2, .group = 4, .head_dim = 64, .form = {LOG, coded ? 4 : 0, 64, 64, NO_PAIRS, 0}, .sink = 1, .recent = 1};
    struct side_of_test side = open_side(&s, true, (size_t)64 << 20);
    const size_t kv = SEQUENCES * 2 * 64, q = 4 * kv;
    uint64_t seed = 5;
    oscar_sequence *sequences[SEQUENCES];
    for (int i = 0; i < SEQUENCES; i++) assert_ok(gpu_context, oscar_sequence_create(side.cache, &sequences[i]));
    float *rows = random_floats(kv, &seed, 1), *queries = random_floats(q, &seed, 1);
    float *dq = on_device(queries, 4 * q), *dout = on_device(queries, 4 * q), *good = on_device(rows, 4 * kv);
    static const float broken[] = {NAN, INFINITY, -INFINITY, 3.4e38f}; /* the last is not finite in BF16 */
    for (int round = 0; round < 200; round++) {
      const bool breaks = round % 10 == 9;
      rows[77] = breaks ? broken[round / 10 % 4] : 1;
      float *bad = on_device(rows, 4 * kv);
      for (int i = 0; i < SEQUENCES; i++) assert_ok(gpu_context, oscar_sequence_begin(sequences[i], 1));
      run_step(&side, &s, sequences, SEQUENCES, dq, round % 20 == 9 ? bad : good, round % 20 == 19 ? bad : good, dout);
      if (breaks) {
        assert_int_equal(oscar_sequence_commit(sequences[0]), OSCAR_NUMERIC);
        assert_non_null(strstr(oscar_last_error(gpu_context), round % 20 == 9 ? "a key" : "a value"));
      }
      for (int i = 0; i < SEQUENCES; i++) {
        if (breaks)
          oscar_sequence_abort(sequences[i]);
        else
          assert_ok(gpu_context, oscar_sequence_commit(sequences[i]));
      }
      cuda_release(gpu, bad, 4 * kv);
    }
    for (int i = 0; i < SEQUENCES; i++) assert_int_equal(oscar_sequence_length(sequences[i]), 180);
    assert_ok(gpu_context, oscar_cache_check(side.cache));
    struct device_step step;
    assert_int_equal(sequences_make_ready(sequences, SEQUENCES, &step), OSCAR_INVALID_ARGUMENT); /* no step is open */
    cuda_release(gpu, dq, 4 * q), cuda_release(gpu, dout, 4 * q), cuda_release(gpu, good, 4 * kv);
    free(rows), free(queries);
    close_side(&side);
  }
}

int main(void) {
  assert_int_equal(oscar_context_create(NULL, &gpu_context), OSCAR_OK);
  if (oscar_cuda_create(gpu_context, NULL, &gpu) != OSCAR_OK) {
    fprintf(stderr, "skipped: %s\n", oscar_last_error(gpu_context));
    oscar_context_free(gpu_context);
    return 77;
  }
  const oscar_context_options options = {.isa = OSCAR_ISA_PORTABLE};
  assert_int_equal(oscar_context_create(&options, &host_context), OSCAR_OK);
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(group_sizes_agree),
      cmocka_unit_test(head_dimensions_and_layouts_agree),
      cmocka_unit_test(pairs_of_heads_agree),
      cmocka_unit_test(lengths_and_windows_agree),
      cmocka_unit_test(queries_of_unit_variance_agree),
      cmocka_unit_test(many_short_sequences_agree),
      cmocka_unit_test(numbers_that_cannot_be_are_found),
  };
  const int failed = cmocka_run_group_tests(tests, NULL, NULL);
  oscar_cuda_free(gpu);
  oscar_context_free(host_context);
  oscar_context_free(gpu_context);
  return failed;
}
