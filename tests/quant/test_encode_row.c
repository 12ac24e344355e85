/* What the GPU computes, computed here by the same functions in the order of its kernel, against the CPU's encoder: the same
 * bits, and the same rows refused. */
#include "coder_cases.h"

#include "quant/cuda/encode_row.h"

/* ---- a page as the kernel encodes it ---- */

/* [head_dim][64] */
static void centre(const struct coder *c, int64_t page, const uint16_t *exact, float *x) {
  for (int k = 0; k < c->head_dim; k++)
    for (int t = 0; t < PAGE_TOKENS; t++) x[k * PAGE_TOKENS + t] = bf16_to_f32(exact[t * c->head_dim + k]) - c->mean[k];
  for (int k = 0; k < c->rotating_pairs; k++) {
    float first, second;
    turn_pair(c, page, k, &first, &second);
    for (int t = 0; t < PAGE_TOKENS; t++)
      subtract_pair(c, k, t, first, second, &x[c->rotating_channel[2 * k] * PAGE_TOKENS + t],
                    &x[c->rotating_channel[2 * k + 1] * PAGE_TOKENS + t]);
  }
}

/* [channels][64]; the rows with a number that is not finite are marked. */
static void project(const struct coder *c, const float *x, float *y, bool *bad) {
  memset(y, 0, (size_t)c->channels * PAGE_TOKENS * sizeof *y);
  for (int k = 0; k < c->head_dim; k++)
    for (int i = 0; i < c->channels; i++) {
      const float factor = c->encode[k * c->columns + i], *in = x + k * PAGE_TOKENS;
      float *sums = y + i * PAGE_TOKENS;
      for (int t = 0; t < PAGE_TOKENS; t++) sums[t] = sums[t] + in[t] * factor;
    }
  for (int i = 0; i < c->channels; i++)
    for (int t = 0; t < PAGE_TOKENS; t++) {
      if (!is_finite(y[i * PAGE_TOKENS + t])) bad[t] = true;
      if (c->form == OSCAR_ROW_LOG_GAINS) y[i * PAGE_TOKENS + t] = y[i * PAGE_TOKENS + t] * c->channel[i].inverse_step;
    }
}

static void quantize(const struct coder *c, int t, float *y, uint8_t *codes, uint16_t *meta, bool *bad) {
  if (c->form == OSCAR_ROW_SCALE_ZERO && c->clip_rank < c->channels - 1) clip_row(c, y, PAGE_TOKENS);
  if (c->form == OSCAR_ROW_LOG_GAINS) meta[t] = 0;
  for (int p = 0; p < c->groups; p++) {
    uint16_t stored[2] = {0, 0};
    bool fits = true;
    if (c->form == OSCAR_ROW_LOG_GAINS)
      meta[t] |= (uint16_t)(quantize_log_gain(c, p, y, PAGE_TOKENS, codes, PAGE_TOKENS) << 4 * p);
    else if (c->form == OSCAR_ROW_SCALE_ZERO)
      fits = quantize_scale_zero(c, p, y, PAGE_TOKENS, codes, PAGE_TOKENS, stored);
    else
      fits = quantize_gain(c, p, y, PAGE_TOKENS, codes, PAGE_TOKENS, stored);
    const int words = c->form == OSCAR_ROW_SCALE_ZERO ? 2 : c->form == OSCAR_ROW_GAIN ? 1 : 0;
    for (int v = 0; v < words; v++) meta[(words * p + v) * PAGE_TOKENS + t] = stored[v];
    if (!fits) bad[t] = true;
  }
}

/* y [channels][64] -> a coded side, its words put together from `rows` rows at a time. The first bad row, or 64. */
static int code_rows(const struct coder *c, oscar_side side, float *y, bool *bad, int rows, uint8_t *device) {
  uint8_t *codes = calloc((size_t)c->channels, PAGE_TOKENS);
  uint32_t *out = (uint32_t *)(void *)device;
  for (int t = 0; t < PAGE_TOKENS; t++)
    if (!bad[t]) quantize(c, t, y + t, codes + t, (uint16_t *)(void *)(device + 16 * c->crumbs), bad);
  for (int from = 0; from < PAGE_TOKENS; from += rows) {
    const struct coded_rows coded = {codes + from, PAGE_TOKENS, from, rows};
    for (int w = 0; w < 4 * c->crumbs; w++) {
      const uint32_t bits = side == OSCAR_KEYS ? key_word(c, &coded, w) : value_word(c, &coded, w);
      out[w] = from ? out[w] | bits : bits;
    }
  }
  free(codes);
  int first = 0;
  while (first < PAGE_TOKENS && !bad[first]) first++;
  return first;
}

static int encode(const struct coder *c, oscar_side side, int64_t page, const uint16_t *exact, int rows, uint8_t *device) {
  float *x = malloc((size_t)c->head_dim * PAGE_TOKENS * sizeof *x), *y = malloc((size_t)c->head_dim * PAGE_TOKENS * sizeof *y);
  bool bad[PAGE_TOKENS] = {false};
  centre(c, page, exact, x);
  project(c, x, y, bad);
  const int first = code_rows(c, side, y, bad, rows, device);
  free(x);
  free(y);
  return first;
}

/* ---- tests ---- */

static const struct coder *coder_at(const struct coders *coders, int layer, int head, int side) {
  return &coders->coder[coders->place[(layer * CASE_HEADS + head) * 2 + side]];
}

/* The first row that is refused, or 64. */
static int check_page(const oscar_codec *codec, const struct coder *coder, oscar_side side, int64_t page, const uint16_t *exact,
                      int rows) {
  const struct side_form form = side_form_of(codec);
  const size_t bytes = side_bytes(&form);
  uint8_t *expected = malloc(bytes), *got = aligned_alloc(64, round_up(bytes, 64));
  const int done = case_expected(codec, side, page, exact, expected);
  assert_int_equal(encode(coder, side, page, exact, rows, got), done);
  if (done == PAGE_TOKENS) assert_memory_equal(expected, got, bytes);
  free(expected);
  free(got);
  return done;
}

/* The block is filled for where it lies, so its coders are read in place. */
static struct coders fill(const oscar_codec_set *set, void **block) {
  *block = aligned_alloc(64, coders_bytes(set));
  memset(*block, 0xA5, coders_bytes(set));
  return coders_fill(set, *block, (uintptr_t)*block);
}

static void pages_have_the_bits_of_the_cpu(void **state) {
  (void)state;
  const oscar_isa isas[] = {OSCAR_ISA_AUTO, OSCAR_ISA_PORTABLE};
  const int64_t pages[] = {0, 1, 1000, ((int64_t)1 << 40) - 1};
  for (size_t n = 0; n < ARRAY_LENGTH(coder_cases) * 2; n++) {
    const struct coder_case *k = &coder_cases[n / 2];
    if (k->d > 256 && n % 2) continue; /* the slow definition takes long there */
    oscar_context *c = test_context(isas[n % 2], 1);
    uint64_t seed = n;
    oscar_codec_set *set = case_set(c, k, &seed);
    void *block;
    const struct coders coders = fill(set, &block);
    uint16_t *exact = malloc((size_t)PAGE_TOKENS * (size_t)k->d * sizeof *exact);
    for (int place = 0; place < (k->d > 256 ? 1 + (k->d < 1024) : CASE_LAYERS * CASE_HEADS * 2); place++) {
      const int layer = place / 2 / CASE_HEADS, head = place / 2 % CASE_HEADS, side = place % 2;
      case_page(k, exact, &seed);
      check_page(oscar_codec_set_get(set, layer, head, (oscar_side)side), coder_at(&coders, layer, head, side), (oscar_side)side,
                 pages[place / 2 % 4], exact, n % 2 ? 64 : 16);
    }
    free(exact);
    free(block);
    oscar_codec_set_free(set);
    oscar_context_free(c);
  }
}

/* The sums themselves, whose last bits codes seldom show. */
static void projections_have_the_bits_of_the_cpu(void **state) {
  (void)state;
  const int64_t pages[] = {0, 5, 1000, ((int64_t)1 << 40) - 1};
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 1);
  uint64_t seed = 2;
  for (size_t n = 0; n < ARRAY_LENGTH(coder_cases) * 4; n++) {
    const struct coder_case *k = &coder_cases[n / 4];
    if (k->d > (n % 4 ? 64 : 256)) continue;
    const size_t d = (size_t)k->d, floats = PAGE_TOKENS * d * sizeof(float);
    oscar_codec_set *set = case_set(c, k, &seed);
    const oscar_codec *codec = oscar_codec_set_get(set, 0, 0, OSCAR_KEYS);
    void *block;
    const struct coders coders = fill(set, &block);
    uint16_t *exact = malloc(PAGE_TOKENS * d * sizeof *exact);
    float *x = malloc(floats), *y = malloc(floats), *rows = malloc(floats), *expected = malloc(floats);
    bool bad[PAGE_TOKENS] = {false};
    case_page(k, exact, &seed);
    for (size_t i = 0; i < PAGE_TOKENS * d; i++) rows[i] = bf16_to_f32(exact[i]);
    codec_project(codec, pages[n % 4] * PAGE_TOKENS, PAGE_TOKENS, rows, d, expected);
    struct coder plain = coders.coder[0];
    plain.form = OSCAR_ROW_GAIN; /* y as it is, not divided by the steps */
    centre(&plain, pages[n % 4], exact, x);
    project(&plain, x, y, bad);
    for (int t = 0; t < PAGE_TOKENS; t++)
      for (int i = 0; i < plain.channels; i++)
        assert_int_equal(float_bits(y[i * PAGE_TOKENS + t]), float_bits(expected[t * plain.channels + i]));
    free(exact);
    free(x);
    free(y);
    free(rows);
    free(expected);
    free(block);
    oscar_codec_set_free(set);
  }
  oscar_context_free(c);
}

/* Rows [64][channels] that are coded once, then moved to where two codes meet, or next to it. The least and the largest of a row
 * stay, so that a scale and zero do. */
static void move_to_borders(const oscar_codec *codec, float *y, uint64_t *seed) {
  const oscar_codec_spec *spec = &codec->spec;
  const size_t m = (size_t)spec->channels;
  float copy[OSCAR_MAX_HEAD_DIM];
  uint8_t row[2 * OSCAR_MAX_HEAD_DIM + 64];
  for (int t = 0; t < PAGE_TOKENS; t++, y += m) {
    memcpy(copy, y, m * sizeof *copy);
    assert_true(codec_quantize_row(codec, copy, row));
    const uint8_t *meta = row + codec->crumbs / 4;
    float least = y[0], largest = y[0];
    for (size_t i = 0; i < m; i++) least = fminf(least, y[i]), largest = fmaxf(largest, y[i]);
    for (int p = 0; p < spec->groups; p++) {
      const int at = 2 * p * codec_meta_values(codec);
      const float stored = f16_to_f32((uint16_t)(meta[at] | meta[at + 1] << 8));
      const float s = spec->form == OSCAR_ROW_LOG_GAINS ? log_gain((uint16_t)(meta[0] | meta[1] << 8), p) : stored;
      const float z = spec->form == OSCAR_ROW_SCALE_ZERO ? f16_to_f32((uint16_t)(meta[at + 2] | meta[at + 3] << 8)) + 0.5f : 0;
      for (int i = codec->group_channel[p]; i < codec->group_channel[p + 1]; i++) {
        const float offset = spec->form == OSCAR_ROW_SCALE_ZERO ? z : codec->levels[i] / 2;
        const float code = (float)(test_random(seed) % (uint64_t)codec->levels[i]);
        float border = (code - offset) * s * spec->steps[i];
        for (uint64_t n = test_random(seed) % 3; n > 0; n--) border = nextafterf(border, test_random(seed) % 2 ? 1e30f : -1e30f);
        if (y[i] > least && y[i] < largest && border > least && border < largest) y[i] = border;
      }
    }
  }
}

static void rows_on_borders_have_the_codes_of_the_cpu(void **state) {
  (void)state;
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 1);
  uint64_t seed = 6;
  for (size_t n = 0; n < ARRAY_LENGTH(coder_cases) * 5; n++) {
    const struct coder_case *k = &coder_cases[n / 5];
    if (k->d > 128) continue;
    oscar_codec_set *set = case_set(c, k, &seed);
    const oscar_codec *codec = oscar_codec_set_get(set, 0, 0, OSCAR_KEYS);
    const struct side_form form = side_form_of(codec);
    const int m = codec->spec.channels;
    void *block;
    const struct coders coders = fill(set, &block);
    float *y = case_floats((size_t)(PAGE_TOKENS * m), 1, &seed), *columns = malloc((size_t)(PAGE_TOKENS * m) * sizeof *columns);
    uint8_t *rows = malloc(side_bytes(&form)), *expected = malloc(side_bytes(&form)),
            *got = aligned_alloc(64, round_up(side_bytes(&form), 64));
    bool bad[PAGE_TOKENS] = {false};
    for (int i = 0; i < PAGE_TOKENS * m; i++) y[i] *= codec->spec.steps[i % m];
    move_to_borders(codec, y, &seed);
    for (int i = 0; i < PAGE_TOKENS * m; i++)
      columns[i % m * PAGE_TOKENS + i / m] = k->form == OSCAR_ROW_LOG_GAINS ? y[i] * codec->inverse_steps[i % m] : y[i];
    assert_int_equal(codec_quantize(codec, PAGE_TOKENS, y, rows), PAGE_TOKENS);
    page_to_device(&form, OSCAR_KEYS, rows, expected);
    assert_int_equal(code_rows(coders.coder, OSCAR_KEYS, columns, bad, 64, got), PAGE_TOKENS);
    assert_memory_equal(expected, got, side_bytes(&form));
    free(y);
    free(columns);
    free(rows);
    free(expected);
    free(got);
    free(block);
    oscar_codec_set_free(set);
  }
  oscar_context_free(c);
}

static void the_same_rows_are_refused(void **state) {
  (void)state;
  const uint16_t wrong[] = {0x7F80, 0xFF80, 0x7FC0, 0x7F7F, 0xFF7F}; /* Inf, -Inf, NaN, and the largest numbers */
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 1);
  uint64_t seed = 3;
  for (size_t n = 0; n < ARRAY_LENGTH(coder_cases); n++) {
    const struct coder_case *k = &coder_cases[n];
    if (k->d > 256) continue;
    oscar_codec_set *set = case_set(c, k, &seed);
    void *block;
    const struct coders coders = fill(set, &block);
    uint16_t *exact = malloc((size_t)PAGE_TOKENS * (size_t)k->d * sizeof *exact);
    for (size_t i = 0; i < 2 * ARRAY_LENGTH(wrong); i++) {
      case_page(k, exact, &seed);
      exact[test_random(&seed) % (uint64_t)(PAGE_TOKENS * k->d)] = wrong[i / 2];
      exact[test_random(&seed) % (uint64_t)(PAGE_TOKENS * k->d)] = wrong[i / 2];
      check_page(oscar_codec_set_get(set, 1, 0, (oscar_side)(i % 2)), coder_at(&coders, 1, 0, (int)(i % 2)), (oscar_side)(i % 2),
                 7, exact, 64);
    }
    free(exact);
    free(block);
    oscar_codec_set_free(set);
  }
  oscar_context_free(c);
}

/* Numbers near each other, small whole ones of both signs or one, or a lone one: times a power of two down to the subnormal ones.
 */
static uint16_t edge_number(int kind, bool here, int exponent, uint64_t *seed) {
  const float near = 1 + (float)(test_random(seed) % 3) * 0x1p-7f, grid = (float)(test_random(seed) % 9) - 4;
  const float x = kind == 0 ? near : kind == 1 ? grid / 2 : kind == 2 ? fabsf(grid) : here ? grid : 0;
  return f32_to_bf16(ldexpf(x, exponent));
}

static oscar_codec_set *edge_set(oscar_context *c, int n, uint64_t *seed) {
  const oscar_row_form forms[] = {OSCAR_ROW_GAIN, OSCAR_ROW_SCALE_ZERO, OSCAR_ROW_LOG_GAINS};
  const oscar_codec_set_info info = {1, 1, 64, "test", "", ""};
  uint8_t crumbs[64];
  float steps[64];
  memset(crumbs, 1 + n / 3 % 4, sizeof crumbs);
  for (int i = 0; i < 64; i++)
    steps[i] = n % 5 < 2 ? 1 : (float)exp2(n % 5 == 3 ? -148 * test_uniform(seed) : 40 * test_uniform(seed) - 20);
  const oscar_codec_spec spec = {.head_dim = 64,
                                 .channels = 64,
                                 .form = forms[n % 3],
                                 .groups = 1 << n / 12 % 3,
                                 .clip_ratio = n % 2 ? 1 : 0.95f,
                                 .crumbs = crumbs,
                                 .steps = steps};
  oscar_codec *codec = NULL;
  oscar_codec_set *set = NULL;
  assert_ok(c, oscar_codec_create(c, &spec, &codec));
  assert_ok(c, oscar_codec_set_create(c, &info, &set));
  for (int side = 0; side < 2; side++) assert_ok(c, oscar_codec_set_assign(set, 0, 0, (oscar_side)side, codec));
  oscar_codec_release(codec);
  return set;
}

static void rows_at_the_edges_have_the_bits_of_the_cpu(void **state) {
  (void)state;
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 1);
  uint64_t seed = 4;
  int refused = 0;
  for (int n = 0; n < 60; n++) {
    oscar_codec_set *set = edge_set(c, n, &seed);
    void *block;
    const struct coders coders = fill(set, &block);
    uint16_t exact[PAGE_TOKENS * 64];
    for (int exponent = -135; exponent < 128; exponent += 24)
      for (int kind = 0; kind < 4; kind++) {
        for (int i = 0; i < PAGE_TOKENS * 64; i++) exact[i] = edge_number(kind, i % 64 == i / 64, exponent, &seed);
        refused += check_page(oscar_codec_set_get(set, 0, 0, OSCAR_KEYS), coders.coder, OSCAR_KEYS, 5, exact, 64) < PAGE_TOKENS;
      }
    free(block);
    oscar_codec_set_free(set);
  }
  assert_in_range(refused, 60 * 11 * 4 / 20, 60 * 11 * 4 / 2);
  oscar_context_free(c);
}

static void words_of_keys_have_the_crumbs_that_belong_there(void **state) {
  (void)state;
  for (int blocks = 1; blocks <= 256; blocks = blocks < 20 ? blocks + 1 : blocks + 59)
    for (int word = 0; word < 64 * blocks; word++)
      for (int slot = 0; slot < 4; slot++) {
        const struct key_slot at = key_slot_of(blocks, word, slot);
        assert_in_range(at.crumb, 0, 16 * blocks - 4);
        for (int j = 0; j < 4; j++) {
          const struct crumb_place place = place_of_key_crumb(blocks, at.token, at.crumb + j);
          assert_int_equal(place.word, word);
          assert_int_equal(place.shift, 8 * j + 2 * slot);
        }
      }
}

static void a_shared_codec_is_in_the_block_once(void **state) {
  (void)state;
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 1);
  uint64_t seed = 5;
  oscar_codec_set *set = case_set(c, &coder_cases[2], &seed);
  void *block;
  const struct coders coders = fill(set, &block);
  assert_int_equal(coders.place[7], coders.place[1]);
  for (int place = 0; place < 7; place++) assert_int_equal(coders.place[place], place);
  for (int place = 2; place < 7; place += 2) assert_ptr_equal(coders.coder[place].rope_table, coders.coder[0].rope_table);
  free(block);
  oscar_codec_set_free(set);
  oscar_context_free(c);
}

static void halves_are_those_of_the_cpu(void **state) {
  (void)state;
  for (uint32_t h = 0; h < 0x10000; h++) {
    if (!half_is_finite((uint16_t)h)) continue;
    assert_int_equal(float_bits(half_value((uint16_t)h)), float_bits(f16_to_f32((uint16_t)h)));
  }
  for (uint64_t u = 0; u < (uint64_t)1 << 32; u += 65521) {
    const float x = bits_float((uint32_t)u);
    assert_int_equal(half_bits(x), f32_to_f16(x));
  }
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(pages_have_the_bits_of_the_cpu),
      cmocka_unit_test(projections_have_the_bits_of_the_cpu),
      cmocka_unit_test(rows_on_borders_have_the_codes_of_the_cpu),
      cmocka_unit_test(the_same_rows_are_refused),
      cmocka_unit_test(rows_at_the_edges_have_the_bits_of_the_cpu),
      cmocka_unit_test(words_of_keys_have_the_crumbs_that_belong_there),
      cmocka_unit_test(a_shared_codec_is_in_the_block_once),
      cmocka_unit_test(halves_are_those_of_the_cpu),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
