/* coder_cases.h - codec sets and exact pages that hold encoders for other processors against the CPU's: every form, many layouts
 * of crumbs, and rows that break naive quantizers. */
#ifndef OSCAR_CODER_CASES_H
#define OSCAR_CODER_CASES_H

#include "support.h"

#include "quant/device_form.h"

struct coder_case {
  int d, key_channels, value_channels;
  oscar_row_form form;
  int groups, crumbs; /* crumbs of every channel; 0: mixed, as many as channels */
  float clip;
  int pairs, rotary_dim; /* of the keys */
  bool cancels; /* what the sums of the product come to is mostly what rounding leaves of them: codes show their last bits */
};

static const struct coder_case coder_cases[] = {
    {16, 16, 16, OSCAR_ROW_LOG_GAINS, 1, 1, 0, 0, 0, false},
    {32, 32, 32, OSCAR_ROW_LOG_GAINS, 2, 0, 0, 4, 16, false},
    {64, 64, 64, OSCAR_ROW_LOG_GAINS, 4, 0, 0, 32, 64, false},
    {64, 48, 64, OSCAR_ROW_LOG_GAINS, 3, 1, 0, 7, 64, false},
    {80, 80, 80, OSCAR_ROW_LOG_GAINS, 4, 1, 0, 3, 80, false},
    {96, 96, 96, OSCAR_ROW_LOG_GAINS, 4, 0, 0, 48, 96, false},
    {112, 112, 112, OSCAR_ROW_LOG_GAINS, 1, 0, 0, 0, 0, false},
    {128, 128, 128, OSCAR_ROW_LOG_GAINS, 4, 0, 0, 64, 128, false},
    {128, 80, 128, OSCAR_ROW_LOG_GAINS, 4, 0, 0, 64, 128, false},
    {128, 144, 128, OSCAR_ROW_LOG_GAINS, 4, 2, 0, 30, 64, false},
    {256, 240, 256, OSCAR_ROW_LOG_GAINS, 4, 0, 0, 128, 256, false},
    {512, 304, 512, OSCAR_ROW_LOG_GAINS, 1, 1, 0, 255, 510, false},
    {1024, 1024, 1024, OSCAR_ROW_LOG_GAINS, 4, 1, 0, 512, 1024, false},
    {16, 16, 16, OSCAR_ROW_GAIN, 1, 4, 0, 0, 0, false},
    {64, 64, 64, OSCAR_ROW_GAIN, 1, 0, 0, 20, 48, false},
    {112, 112, 112, OSCAR_ROW_GAIN, 7, 0, 0, 0, 0, false},
    {128, 128, 128, OSCAR_ROW_GAIN, 4, 0, 0, 64, 128, false},
    {192, 112, 176, OSCAR_ROW_GAIN, 1, 0, 0, 0, 0, false},
    {512, 512, 512, OSCAR_ROW_GAIN, 2, 1, 0, 0, 0, false},
    {64, 64, 64, OSCAR_ROW_SCALE_ZERO, 1, 1, 0.96f, 32, 64, false},
    {80, 48, 64, OSCAR_ROW_SCALE_ZERO, 1, 3, 0.9f, 0, 0, false},
    {128, 128, 128, OSCAR_ROW_SCALE_ZERO, 1, 1, 0.92f, 0, 0, false},
    {128, 128, 128, OSCAR_ROW_SCALE_ZERO, 8, 2, 1, 0, 0, false},
    {256, 256, 256, OSCAR_ROW_SCALE_ZERO, 16, 4, 0.98f, 0, 0, false},
    {1024, 1024, 1024, OSCAR_ROW_SCALE_ZERO, 4, 1, 0.96f, 0, 0, false},
    {64, 64, 64, OSCAR_ROW_LOG_GAINS, 4, 0, 0, 0, 0, true},
    {128, 128, 112, OSCAR_ROW_LOG_GAINS, 4, 2, 0, 0, 0, true},
    {128, 128, 128, OSCAR_ROW_SCALE_ZERO, 1, 2, 0.92f, 0, 0, true},
    {256, 256, 256, OSCAR_ROW_GAIN, 4, 0, 0, 0, 0, true},
    {512, 512, 400, OSCAR_ROW_LOG_GAINS, 4, 1, 0, 0, 0, true},
};

enum { CASE_LAYERS = 2, CASE_HEADS = 2 };

static inline float *case_floats(size_t n, double scale, uint64_t *seed) {
  float *x = malloc((n ? n : 1) * sizeof *x);
  for (size_t i = 0; i < n; i++) x[i] = (float)(scale * (double)test_normal(seed));
  return x;
}

/* Crumbs 0 to 4, as many in all as channels, exchanged within each group's channels alone. */
static inline void case_crumbs(const struct coder_case *k, int channels, uint8_t *crumbs, uint64_t *seed) {
  memset(crumbs, k->crumbs ? k->crumbs : 1, (size_t)channels);
  for (int n = 0; n < 8 * channels && !k->crumbs; n++) {
    const int p = (int)(test_random(seed) % (uint64_t)k->groups), first = group_begin(channels, k->groups, p);
    const uint64_t run = (uint64_t)(group_begin(channels, k->groups, p + 1) - first);
    const int from = first + (int)(test_random(seed) % run), to = first + (int)(test_random(seed) % run);
    if (from == to || crumbs[from] == 0 || crumbs[to] == 4) continue;
    crumbs[from]--;
    crumbs[to]++;
  }
}

static inline oscar_codec *case_codec(oscar_context *c, const struct coder_case *k, oscar_side side, oscar_rope *rope,
                                      uint64_t *seed) {
  const int d = k->d, wanted = side == OSCAR_KEYS ? k->key_channels : k->value_channels, m = wanted < d ? wanted : d;
  uint8_t crumbs[OSCAR_MAX_HEAD_DIM];
  float steps[OSCAR_MAX_HEAD_DIM];
  uint16_t pair[OSCAR_MAX_HEAD_DIM / 2];
  case_crumbs(k, m, crumbs, seed);
  for (int i = 0; i < m; i++)
    steps[i] = (crumbs[i] ? codec_gaussian_step(crumbs[i]) : 1) * (float)(0.9 + 0.2 * test_uniform(seed));
  for (int i = 0; i < k->pairs; i++) pair[i] = (uint16_t)(i + k->rotary_dim / 2 - k->pairs);
  float *encode = case_floats((size_t)(d * m), 1 / sqrt(d), seed), *decode = case_floats((size_t)(d * m), 1 / sqrt(d), seed);
  float *mean = case_floats((size_t)d, k->cancels ? 0 : 0.5, seed), *rotating = case_floats((size_t)k->pairs * 2, 1, seed);
  for (int i = 0; k->cancels && i < d * m; i++)
    if (i / m % 2) encode[i] = -encode[i - m] * (1 + 0x1p-20f * test_normal(seed));
  for (int i = 0; k->cancels && i < m; i++) steps[i] *= 0x1p-20f;
  const bool turns = side == OSCAR_KEYS && k->pairs > 0;
  const oscar_codec_spec spec = {.head_dim = d,
                                 .channels = m,
                                 .form = k->form,
                                 .groups = k->groups,
                                 .clip_ratio = k->clip,
                                 .crumbs = crumbs,
                                 .steps = steps,
                                 .mean = mean,
                                 .encode = encode,
                                 .decode = decode,
                                 .rope = turns ? rope : NULL,
                                 .rotating_pairs = turns ? k->pairs : 0,
                                 .rotating_pair = pair,
                                 .rotating_mean = rotating};
  oscar_codec *codec = NULL;
  assert_ok(c, oscar_codec_create(c, &spec, &codec));
  free(encode);
  free(decode);
  free(mean);
  free(rotating);
  return codec;
}

/* Every place has a codec of its own, but for the last head's values, which has the first's. */
static inline oscar_codec_set *case_set(oscar_context *c, const struct coder_case *k, uint64_t *seed) {
  const oscar_codec_set_info info = {CASE_LAYERS, CASE_HEADS, k->d, "test", "", ""};
  oscar_codec_set *set = NULL;
  oscar_rope *rope = NULL;
  float frequencies[OSCAR_MAX_HEAD_DIM / 2];
  assert_ok(c, oscar_codec_set_create(c, &info, &set));
  for (int i = 0; i < k->rotary_dim / 2; i++) frequencies[i] = (float)pow(10000, -2.0 * i / k->rotary_dim);
  const oscar_rope_layout layout = k->pairs % 2 ? OSCAR_ROPE_ADJACENT : OSCAR_ROPE_HALVES;
  if (k->pairs) assert_ok(c, oscar_rope_create(c, &(oscar_rope_spec){layout, k->rotary_dim, frequencies}, &rope));
  for (int place = 0; place < CASE_LAYERS * CASE_HEADS * 2; place++) {
    const int layer = place / 2 / CASE_HEADS, head = place / 2 % CASE_HEADS;
    oscar_codec *codec = NULL;
    if (place == CASE_LAYERS * CASE_HEADS * 2 - 1)
      codec = oscar_codec_retain((oscar_codec *)oscar_codec_set_get(set, 0, 0, OSCAR_VALUES));
    else
      codec = case_codec(c, k, (oscar_side)(place % 2), rope, seed);
    assert_ok(c, oscar_codec_set_assign(set, layer, head, (oscar_side)(place % 2), codec));
    oscar_codec_release(codec);
  }
  oscar_rope_release(rope);
  assert_ok(c, oscar_codec_set_check(set));
  return set;
}

/* A side of an exact page [64][d]. Among normal rows of many sizes: constant rows, zeros, a lone spike, subnormal and huge ones.
 */
static inline void case_page(const struct coder_case *k, uint16_t *exact, uint64_t *seed) {
  const int d = k->d;
  for (int t = 0; t < PAGE_TOKENS; t++) {
    const int kind = (int)(test_random(seed) % 16);
    const float size = (float)exp2(kind < 6 ? 0 : 12 * (test_uniform(seed) - 0.5));
    for (int i = 0; i < d; i++) {
      float x = size * test_normal(seed);
      if (kind == 10) x = size;
      if (kind == 11) x = 0;
      if (kind == 12) x = i == t % d ? 100 * size : 0;
      if (kind == 13) x *= 0x1p-130f;
      if (kind == 14) x *= 1000;
      exact[t * d + i] = k->cancels && i % 2 ? exact[t * d + i - 1] : f32_to_bf16(x);
    }
  }
}

/* What the CPU makes of it, in the device form; returns the first row that cannot be encoded, or 64. */
static inline int case_expected(const oscar_codec *codec, oscar_side side, int64_t page, const uint16_t *exact, uint8_t *device) {
  const struct side_form form = side_form_of(codec);
  const size_t d = (size_t)codec->spec.head_dim, bytes = side_bytes(&form);
  struct encode_scratch scratch = {aligned_alloc(64, PAGE_TOKENS * d * 4), aligned_alloc(64, PAGE_TOKENS * d * 4),
                                   aligned_alloc(64, round_up(bytes, 64))};
  uint8_t *packed = aligned_alloc(64, round_up(bytes, 64)), *canonical = malloc(bytes);
  const int done = page_encode(codec, side, page, exact, &scratch, packed);
  if (done == PAGE_TOKENS) {
    page_unpack(&form, side, packed, canonical);
    page_to_device(&form, side, canonical, device);
  }
  free(scratch.x);
  free(scratch.y);
  free(scratch.rows);
  free(packed);
  free(canonical);
  return done;
}

#endif
