/*
 * The codec against its formulas in double precision, rows computed by hand, the identities its map promises, the reference's
 * wire form, published errors on Gaussian rows, and rows that break naive quantizers.
 */
#include "support.h"

#include "quant/page_form.h"

#include <float.h>

/* ---- slow definitions ---- */

struct row { /* a decoded canonical row: codes and metadata read by the header's sentences */
  int codes[OSCAR_MAX_HEAD_DIM];
  double s[64], z[64];
};

static double half_at(const uint8_t *p) { return (double)f16_to_f32((uint16_t)(p[0] | p[1] << 8)); }

static int crumb_at(const oscar_codec *codec, const uint8_t *row, int c) {
  int quarter = oscar_codec_crumbs(codec) / 4;
  return row[c % quarter] >> 2 * (c / quarter) & 3;
}

static void read_row(const oscar_codec *codec, const uint8_t *bytes, struct row *row) {
  const oscar_codec_spec *spec = oscar_codec_describe(codec);
  int c = 0, values = spec->form == OSCAR_ROW_GAIN ? 1 : 2;
  const uint8_t *word = bytes + oscar_codec_crumbs(codec) / 4;
  for (int i = 0; i < spec->channels; i++) {
    row->codes[i] = 0;
    for (int j = 0, weight = 1; j < spec->crumbs[i]; j++, weight *= 4) row->codes[i] += weight * crumb_at(codec, bytes, c++);
  }
  for (int p = 0; p < spec->groups; p++) {
    if (spec->form == OSCAR_ROW_LOG_GAINS) {
      row->s[p] = pow(2, ((word[p / 2] >> p % 2 * 4 & 15) - 8) / 4.0);
      row->z[p] = 0;
      continue;
    }
    row->s[p] = half_at(word + 2 * p * values);
    row->z[p] = values == 2 ? half_at(word + 2 * p * values + 2) : 0;
  }
}

/* Group of crumb c: the last whose first block of 16 is not behind it. */
static int group_of_crumb(int total, int groups, int c) {
  int p = groups - 1;
  while (p * (total / 16) / groups > c / 16) p--;
  return p;
}

/* Group of each channel by counting crumbs. */
static void groups_of(const oscar_codec_spec *spec, int total, int *group) {
  int c = 0;
  for (int i = 0; i < spec->channels; i++) {
    group[i] = group_of_crumb(total, spec->groups, spec->crumbs[i] ? c : c ? c - 1 : 0);
    c += spec->crumbs[i];
  }
}

/* The mean of a row at a position, its rotating part included. */
static void define_mean(const oscar_codec_spec *spec, int64_t position, double *mean) {
  for (int k = 0; k < spec->head_dim; k++) mean[k] = (double)spec->mean[k];
  for (int k = 0; k < spec->rotating_pairs; k++) {
    const oscar_rope_spec *rope = oscar_rope_describe(spec->rope);
    int pair = spec->rotating_pair[k], halves = rope->layout == OSCAR_ROPE_HALVES;
    double b1 = (double)spec->rotating_mean[2 * k], b2 = (double)spec->rotating_mean[2 * k + 1];
    double angle = (double)rope->frequencies[pair] * (double)position;
    mean[halves ? pair : 2 * pair] += b1 * cos(angle) - b2 * sin(angle);
    mean[halves ? pair + rope->rotary_dim / 2 : 2 * pair + 1] += b1 * sin(angle) + b2 * cos(angle);
  }
}

static double value_of(const oscar_codec_spec *spec, const struct row *row, int group, int i) {
  double offset = spec->form == OSCAR_ROW_SCALE_ZERO ? row->z[group] : (pow(4, spec->crumbs[i]) - 1) / 2;
  return row->s[group] * (double)spec->steps[i] * (row->codes[i] - offset);
}

static void define_decode(const oscar_codec *codec, int64_t position, const uint8_t *bytes, double *x) {
  const oscar_codec_spec *spec = oscar_codec_describe(codec);
  struct row row;
  int group[OSCAR_MAX_HEAD_DIM];
  read_row(codec, bytes, &row);
  groups_of(spec, oscar_codec_crumbs(codec), group);
  define_mean(spec, position, x);
  for (int i = 0; i < spec->channels; i++) {
    double y = spec->crumbs[i] ? value_of(spec, &row, group[i], i) : 0;
    for (int k = 0; k < spec->head_dim; k++) x[k] += y * (double)spec->decode[i * spec->head_dim + k];
  }
}

static void define_project(const oscar_codec_spec *spec, int64_t position, const float *x, double *y) {
  double mean[OSCAR_MAX_HEAD_DIM];
  define_mean(spec, position, mean);
  for (int i = 0; i < spec->channels; i++) {
    y[i] = 0;
    for (int k = 0; k < spec->head_dim; k++) y[i] += ((double)x[k] - mean[k]) * (double)spec->encode[k * spec->channels + i];
  }
}

static int compare_doubles(const void *a, const void *b) {
  double x = *(const double *)a, y = *(const double *)b;
  return (x > y) - (x < y);
}

static void define_clip(double *y, int m, double ratio) {
  double sorted[OSCAR_MAX_HEAD_DIM];
  for (int i = 0; i < m; i++) sorted[i] = fabs(y[i]);
  qsort(sorted, (size_t)m, sizeof *sorted, compare_doubles);
  int rank = (int)floor(ratio * m + 1e-5);
  double tau = sorted[rank < m ? rank : m - 1];
  for (int i = 0; i < m; i++) y[i] = fmax(-tau, fmin(tau, y[i]));
}

/* The gain of group p: RMS in units of sigma, then two least-squares refits. */
static double define_gain(const oscar_codec_spec *spec, const int *group, int p, const double *y) {
  double squares = 0, s;
  int coded = 0;
  for (int i = 0; i < spec->channels; i++) {
    if (group[i] != p || !spec->crumbs[i]) continue;
    squares += pow(y[i] / (double)spec->steps[i] * (double)codec_gaussian_step(spec->crumbs[i]), 2);
    coded++;
  }
  s = sqrt(squares / coded);
  for (int refit = 0; refit < 2; refit++) {
    double yq = 0, qq = 0;
    for (int i = 0; i < spec->channels; i++) {
      if (group[i] != p || !spec->crumbs[i]) continue;
      double levels = pow(4, spec->crumbs[i]), step = (double)spec->steps[i];
      double code = fmax(0, fmin(levels - 1, floor(y[i] / (s * step) + levels / 2))), q = step * (code - (levels - 1) / 2);
      yq += y[i] * q;
      qq += q * q;
    }
    s = yq / qq;
  }
  return s;
}

/* The squared error of group p with a gain. */
static double error_of_gain(const oscar_codec_spec *spec, const int *group, int p, const double *y, double s) {
  double sum = 0;
  for (int i = 0; i < spec->channels; i++) {
    if (group[i] != p) continue;
    double levels = 1 << 2 * spec->crumbs[i], step = (double)spec->steps[i];
    double code = fmax(0, fmin(levels - 1, floor(y[i] / (s * step) + levels / 2)));
    double error = y[i] - (spec->crumbs[i] ? s * step * (code - (levels - 1) / 2) : 0);
    sum += error * error;
  }
  return sum;
}

/* No other of the sixteen gains does better than the stored one, to rounding. */
static void check_log_gain(const oscar_codec_spec *spec, const int *group, int p, const double *y, double stored) {
  double least = INFINITY;
  for (int k = -8; k < 8; k++) least = fmin(least, error_of_gain(spec, group, p, y, pow(2, k / 4.0)));
  assert_true(error_of_gain(spec, group, p, y, stored) <= least * (1 + 1e-4) + 1e-9);
}

/* Codes may differ from the definition in double only where the argument of floor is within rounding of an integer. */
static void assert_code(double argument, double top, int code) {
  double low = fmax(0, fmin(top, floor(argument - 2e-4))), high = fmax(0, fmin(top, floor(argument + 2e-4)));
  if (code != (int)low && code != (int)high) fail_msg("code %d for %.7f", code, argument);
}

static long gains_seen, gains_off;

/* The row a codec wrote against the formulas, metadata included. */
static void check_row(const oscar_codec *codec, int64_t position, const float *x, const uint8_t *bytes) {
  const oscar_codec_spec *spec = oscar_codec_describe(codec);
  struct row row;
  double y[OSCAR_MAX_HEAD_DIM];
  int group[OSCAR_MAX_HEAD_DIM];
  read_row(codec, bytes, &row);
  groups_of(spec, oscar_codec_crumbs(codec), group);
  define_project(spec, position, x, y);
  if (spec->form == OSCAR_ROW_SCALE_ZERO) define_clip(y, spec->channels, (double)spec->clip_ratio);
  for (int p = 0; p < spec->groups; p++) {
    double low = INFINITY, high = -INFINITY;
    for (int i = 0; i < spec->channels; i++) {
      if (group[i] != p || !spec->crumbs[i]) continue;
      double t = y[i] / (double)spec->steps[i];
      low = fmin(low, t), high = fmax(high, t);
    }
    if (spec->form == OSCAR_ROW_SCALE_ZERO) {
      double s = fmax(high - low, 1e-8) / (pow(4, spec->crumbs[0]) - 1);
      assert_true(fabs(row.s[p] - s) <= s * 0x1.01p-11);
      assert_true(fabs(row.z[p] + low / s) <= fmax(fabs(low / s) * 0x1.02p-11, 1e-6));
    } else if (spec->form == OSCAR_ROW_LOG_GAINS) {
      check_log_gain(spec, group, p, y, row.s[p]);
    } else {
      /* a code on the edge of two, decided otherwise in float, moves the refitted gain: rare and small */
      double s = define_gain(spec, group, p, y), off = fabs(row.s[p] / s - 1);
      assert_true(off < 0.05);
      gains_seen++;
      gains_off += off > 0x1.1p-11;
    }
  }
  for (int i = 0; i < spec->channels; i++) {
    if (!spec->crumbs[i]) continue;
    double t = y[i] / (row.s[group[i]] * (double)spec->steps[i]), levels = pow(4, spec->crumbs[i]);
    assert_code(spec->form == OSCAR_ROW_SCALE_ZERO ? t + row.z[group[i]] + 0.5 : t + levels / 2, levels - 1, row.codes[i]);
  }
}

/* ---- codecs to test with ---- */

static float *random_matrix(int rows, int columns, uint64_t *seed) {
  float *a = malloc((size_t)(rows * columns) * sizeof *a);
  for (int i = 0; i < rows * columns; i++) a[i] = test_normal(seed) / sqrtf((float)rows);
  return a;
}

/* Mixed crumbs 0..4, as many as channels, every group's run of channels keeping its own: crumbs wander within a group. */
static void mixed_crumbs(uint8_t *crumbs, int m, int groups, uint64_t *seed) {
  int run = m / groups;
  memset(crumbs, 1, (size_t)m);
  for (int k = 0; k < 8 * m; k++) {
    int first = (int)(test_random(seed) % (uint64_t)groups) * run;
    int from = first + (int)(test_random(seed) % (uint64_t)run), to = first + (int)(test_random(seed) % (uint64_t)run);
    if (from == to || crumbs[from] == 0 || crumbs[to] == 4) continue;
    crumbs[from]--;
    crumbs[to]++;
  }
}

/* One crumb each, and one more from the first channel on, round and round, until C is a multiple of 16. */
static void filled_crumbs(uint8_t *crumbs, int m) {
  memset(crumbs, 1, (size_t)m);
  for (int c = m; c % 16; c++) crumbs[(c - m) % m]++;
}

enum { FILLED = 9 };
struct variant {
  int d, m;
  oscar_row_form form;
  int groups, crumbs; /* crumbs 0: mixed, C = m; FILLED: filled_crumbs */
  float clip;
  int pairs, rotary_dim; /* of a rotating mean; a layout each */
};

enum { POSITION = 64 * 1000 + 59 }; /* of the first row: the fifth is on another page */

static const struct variant variants[] = {
    {16, 16, OSCAR_ROW_SCALE_ZERO, 1, 1, 1, 0, 0},
    {64, 64, OSCAR_ROW_SCALE_ZERO, 1, 1, 0.96f, 0, 0},
    {128, 128, OSCAR_ROW_SCALE_ZERO, 1, 1, 0.92f, 0, 0},
    {128, 128, OSCAR_ROW_SCALE_ZERO, 4, 1, 0.96f, 0, 0},
    {128, 128, OSCAR_ROW_SCALE_ZERO, 8, 1, 1, 0, 0},
    {128, 128, OSCAR_ROW_SCALE_ZERO, 1, 2, 0.98f, 0, 0},
    {64, 64, OSCAR_ROW_SCALE_ZERO, 4, 4, 1, 0, 0},
    {96, 96, OSCAR_ROW_SCALE_ZERO, 1, 3, 1, 0, 0},
    {80, 48, OSCAR_ROW_SCALE_ZERO, 3, 1, 0.9f, 0, 0},
    {1024, 1024, OSCAR_ROW_SCALE_ZERO, 1, 1, 0.96f, 0, 0},
    {16, 16, OSCAR_ROW_GAIN, 1, 1, 0, 0, 0},
    {128, 128, OSCAR_ROW_GAIN, 1, 1, 0, 0, 0},
    {128, 128, OSCAR_ROW_GAIN, 1, 0, 0, 0, 0},
    {128, 128, OSCAR_ROW_GAIN, 4, 0, 0, 0, 0},
    {64, 64, OSCAR_ROW_GAIN, 2, 2, 0, 0, 0},
    {64, 48, OSCAR_ROW_GAIN, 1, 0, 0, 0, 0},
    {192, 112, OSCAR_ROW_GAIN, 1, 0, 0, 0, 0},
    {256, 256, OSCAR_ROW_GAIN, 1, 4, 0, 0, 0},
    {48, 16, OSCAR_ROW_GAIN, 1, 3, 0, 0, 0},
    {112, 112, OSCAR_ROW_GAIN, 7, 0, 0, 0, 0},
    {16, 16, OSCAR_ROW_LOG_GAINS, 1, 1, 0, 0, 0},
    {64, 64, OSCAR_ROW_LOG_GAINS, 4, 0, 0, 32, 64},
    {80, 80, OSCAR_ROW_LOG_GAINS, 4, 1, 0, 3, 80}, /* five blocks: groups of 1, 1, 1 and 2 */
    {128, 128, OSCAR_ROW_LOG_GAINS, 4, 0, 0, 64, 128},
    {128, 96, OSCAR_ROW_LOG_GAINS, 3, 0, 0, 1, 32},
    {128, 128, OSCAR_ROW_LOG_GAINS, 4, 2, 0, 0, 0},
    {64, 5, OSCAR_ROW_LOG_GAINS, 1, FILLED, 0, 0, 0},
    {256, 250, OSCAR_ROW_LOG_GAINS, 2, FILLED, 0, 0, 0},
    {512, 512, OSCAR_ROW_LOG_GAINS, 1, 4, 0, 0, 0},
    {64, 64, OSCAR_ROW_GAIN, 1, 0, 0, 20, 48},
    {64, 64, OSCAR_ROW_SCALE_ZERO, 1, 1, 0.96f, 32, 64},
};

static bool beyond_emulation(const struct variant *v) { return EMULATED && !test_at_length() && v->d > 256; }

static oscar_codec *make_variant(oscar_context *c, const struct variant *v, uint64_t *seed) {
  float *encode = random_matrix(v->d, v->m, seed), *decode = random_matrix(v->m, v->d, seed),
        *mean = random_matrix(1, v->d, seed);
  uint8_t crumbs[OSCAR_MAX_HEAD_DIM];
  float steps[OSCAR_MAX_HEAD_DIM];
  memset(crumbs, v->crumbs, sizeof crumbs);
  if (!v->crumbs) mixed_crumbs(crumbs, v->m, v->groups, seed);
  if (v->crumbs == FILLED) filled_crumbs(crumbs, v->m);
  for (int i = 0; i < v->m; i++)
    steps[i] = (crumbs[i] ? codec_gaussian_step(crumbs[i]) : 1) * (float)(0.9 + 0.2 * test_uniform(seed));
  uint16_t pair[OSCAR_MAX_HEAD_DIM / 2];
  float frequencies[OSCAR_MAX_HEAD_DIM / 2], *rotating = random_matrix(1, 2 * v->pairs + 1, seed);
  oscar_rope *rope = NULL;
  for (int i = 0; i < v->rotary_dim / 2; i++) frequencies[i] = (float)pow(10000, -2.0 * i / v->rotary_dim);
  for (int k = 0; k < v->pairs; k++) pair[k] = (uint16_t)(k + v->rotary_dim / 2 - v->pairs);
  if (v->pairs) {
    const oscar_rope_layout layout = v->pairs % 2 ? OSCAR_ROPE_ADJACENT : OSCAR_ROPE_HALVES;
    assert_ok(c, oscar_rope_create(c, &(oscar_rope_spec){layout, v->rotary_dim, frequencies}, &rope));
  }
  oscar_codec_spec spec = {.head_dim = v->d,
                           .channels = v->m,
                           .form = v->form,
                           .groups = v->groups,
                           .clip_ratio = v->clip,
                           .crumbs = crumbs,
                           .steps = steps,
                           .mean = mean,
                           .encode = encode,
                           .decode = decode,
                           .rope = rope,
                           .rotating_pairs = v->pairs,
                           .rotating_pair = pair,
                           .rotating_mean = rotating};
  oscar_codec *codec = NULL;
  assert_ok(c, oscar_codec_create(c, &spec, &codec));
  oscar_rope_release(rope); /* the codec has its own reference */
  free(rotating);
  free(encode);
  free(decode);
  free(mean);
  return codec;
}

/* Runs `check` on every variant with `rows` encoded rows. */
static void for_each_variant(uint64_t seed, int rows,
                             void (*check)(const oscar_codec *codec, int rows, const float *x, const uint8_t *coded)) {
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 1);
  for (size_t n = 0; n < ARRAY_LENGTH(variants); n++) {
    oscar_codec *codec = make_variant(c, &variants[n], &seed);
    float *x = random_matrix(rows, variants[n].d, &seed);
    for (int i = 0; i < rows * variants[n].d; i++) x[i] *= 3 * sqrtf((float)rows);
    uint8_t *coded = malloc((size_t)rows * oscar_codec_row_bytes(codec));
    assert_ok(c, oscar_codec_encode(codec, POSITION, rows, x, (size_t)variants[n].d, coded));
    check(codec, rows, x, coded);
    free(x);
    free(coded);
    oscar_codec_release(codec);
  }
  oscar_context_free(c);
}

/* ---- tests ---- */

static void check_rows(const oscar_codec *codec, int rows, const float *x, const uint8_t *coded) {
  for (int t = 0; t < rows; t++)
    check_row(codec, POSITION + t, x + t * oscar_codec_describe(codec)->head_dim,
              coded + (size_t)t * oscar_codec_row_bytes(codec));
}

static void codes_and_metadata_follow_the_formulas(void **state) {
  (void)state;
  for_each_variant(1, 21, check_rows);
  assert_true(gains_seen > 200 && gains_off * 50 < gains_seen);
}

static void check_decoding(const oscar_codec *codec, int rows, const float *x, const uint8_t *coded) {
  (void)x;
  int d = oscar_codec_describe(codec)->head_dim;
  size_t stride = (size_t)d + 5;
  float *back = malloc((size_t)rows * stride * sizeof *back);
  for (size_t i = 0; i < (size_t)rows * stride; i++) back[i] = -77;
  oscar_codec_decode(codec, POSITION, rows, coded, back, stride);
  for (int t = 0; t < rows; t++) {
    double truth[OSCAR_MAX_HEAD_DIM];
    define_decode(codec, POSITION + t, coded + (size_t)t * oscar_codec_row_bytes(codec), truth);
    for (int k = 0; k < d; k++) assert_true(fabs((double)back[(size_t)t * stride + (size_t)k] - truth[k]) < 2e-4);
    for (size_t k = (size_t)d; k < stride; k++) assert_true(back[(size_t)t * stride + k] == -77);
  }
  free(back);
}

static void decoding_follows_the_formula_with_stored_metadata(void **state) {
  (void)state;
  for_each_variant(2, 13, check_decoding);
}

/* q.x_t and sum p_t x_t through the map, in double from the stored map, against the decoded rows. */
static void check_map(const oscar_codec *codec, int rows, const float *x, const uint8_t *coded) {
  (void)x;
  const oscar_codec_spec *spec = oscar_codec_describe(codec);
  int d = spec->head_dim, C = oscar_codec_crumbs(codec), pairs = spec->rotating_pairs, used = C + spec->groups + 1 + 2 * pairs;
  assert_int_equal(codec->map_rows % 16, 0);
  assert_true(codec->map_rows >= used && codec->map_rows < used + 16);
  for (int r = used; r < codec->map_rows; r++)
    for (int k = 0; k < d; k++) assert_true(codec->map[r * d + k] == 0);
  uint64_t seed = 99;
  double q[OSCAR_MAX_HEAD_DIM], p[64], size = 0;
  double *mapped = calloc((size_t)codec->map_rows, sizeof *mapped), *sums = calloc((size_t)codec->map_rows, sizeof *sums);
  for (int k = 0; k < d; k++) q[k] = (double)test_normal(&seed);
  for (int r = 0; r < codec->map_rows; r++)
    for (int k = 0; k < d; k++) mapped[r] += q[k] * (double)codec->map[r * d + k];

  double expected[OSCAR_MAX_HEAD_DIM] = {0};
  for (int t = 0; t < rows; t++) {
    const uint8_t *bytes = coded + (size_t)t * oscar_codec_row_bytes(codec);
    struct row row;
    double truth[OSCAR_MAX_HEAD_DIM], score = mapped[C + spec->groups], direct = 0, norm = 0;
    read_row(codec, bytes, &row);
    define_decode(codec, POSITION + t, bytes, truth);
    p[t] = test_uniform(&seed);
    for (int c = 0; c < C; c++) {
      double s = row.s[group_of_crumb(C, spec->groups, c)];
      score += s * mapped[c] * crumb_at(codec, bytes, c);
      sums[c] += p[t] * s * crumb_at(codec, bytes, c);
    }
    for (int g = 0; g < spec->groups; g++) {
      double z = spec->form == OSCAR_ROW_SCALE_ZERO ? row.z[g] : 1;
      score -= row.s[g] * z * mapped[C + g];
      sums[C + g] -= p[t] * row.s[g] * z;
    }
    sums[C + spec->groups] += p[t];
    for (int k = 0; k < pairs; k++) {
      double angle = (double)oscar_rope_describe(spec->rope)->frequencies[spec->rotating_pair[k]] * (POSITION + t);
      score += mapped[C + spec->groups + 1 + k] * cos(angle) + mapped[C + spec->groups + 1 + pairs + k] * sin(angle);
    }
    for (int k = 0; k < d; k++) {
      direct += q[k] * truth[k];
      norm += truth[k] * truth[k];
      expected[k] += p[t] * truth[k];
    }
    assert_true(fabs(score - direct) <= 1e-5 * sqrt(norm * d));
    size += norm;
  }
  for (int k = 0; k < d && pairs == 0; k++) { /* values do not rotate */
    double out = 0;
    for (int r = 0; r < codec->map_rows; r++) out += sums[r] * (double)codec->map[r * d + k];
    assert_true(fabs(out - expected[k]) <= 1e-5 * sqrt(size));
  }
  free(mapped);
  free(sums);
}

static void the_map_gives_scores_and_sums_of_decoded_rows(void **state) {
  (void)state;
  for_each_variant(3, 17, check_map);
}

/* NULL where this CPU has not got it. */
static oscar_context *context_with(oscar_isa isa) {
  oscar_context_options options;
  oscar_context_options_default(&options);
  options.isa = isa;
  options.threads = 1;
  oscar_context *context = NULL;
  if (oscar_context_create(&options, &context) == OSCAR_OK) return context;
  print_message("skipped: this CPU has no %s\n", oscar_isa_name(isa));
  return NULL;
}

static void codes_do_not_depend_on_the_instruction_set(void **state) {
  (void)state;
  oscar_context *portable = test_context(OSCAR_ISA_PORTABLE, 1);
  for (oscar_isa isa = OSCAR_ISA_AVX2; isa <= OSCAR_ISA_NEON_DOT; isa++) {
    oscar_context *wide = context_with(isa);
    for (size_t n = 0; wide && n < ARRAY_LENGTH(variants); n++) {
      if (beyond_emulation(&variants[n])) continue;
      uint64_t seed = n, same = n;
      oscar_codec *a = make_variant(portable, &variants[n], &seed), *b = make_variant(wide, &variants[n], &same);
      assert_ptr_not_equal(a->kernels, b->kernels);
      int rows = variants[n].d < 512 ? 100 : rounds(20, 100);
      size_t bytes = (size_t)rows * oscar_codec_row_bytes(a), d = (size_t)variants[n].d, count = (size_t)rows * d;
      float *x = random_matrix(rows, variants[n].d, &seed), *back = malloc(2 * count * sizeof *back);
      uint8_t *first = malloc(bytes), *second = malloc(bytes);
      assert_ok(portable, oscar_codec_encode(a, 0, rows, x, d, first));
      assert_ok(wide, oscar_codec_encode(b, 0, rows, x, d, second));
      assert_memory_equal(first, second, bytes);
      oscar_codec_decode(a, 0, rows, first, back, d);
      oscar_codec_decode(b, 0, rows, first, back + count, d);
      assert_memory_equal(back, back + count, count * sizeof *back);
      free(x);
      free(back);
      free(first);
      free(second);
      oscar_codec_release(a);
      oscar_codec_release(b);
    }
    if (wide) print_message("compared with portable C: %s\n", oscar_isa_name(isa));
    oscar_context_free(wide);
  }
  oscar_context_free(portable);
}

/* A page of BF16 rows against its rows one by one, packed; and the first of two rows that are not finite is named. */
static void check_page(const oscar_codec *codec, uint64_t *seed) {
  const oscar_codec_spec *spec = oscar_codec_describe(codec);
  const struct side_form form = side_form_of(codec);
  const int d = spec->head_dim;
  const size_t count = (size_t)(PAGE_TOKENS * d), row_bytes = oscar_codec_row_bytes(codec);
  float *x = malloc(count * sizeof *x);
  uint16_t *exact = malloc(count * sizeof *exact);
  uint8_t *rows = malloc(PAGE_TOKENS * row_bytes), *expected = aligned_alloc(64, round_up(side_bytes(&form), 64)),
          *packed = aligned_alloc(64, round_up(side_bytes(&form), 64));
  struct encode_scratch scratch = {malloc(count * sizeof(float)), malloc((size_t)(PAGE_TOKENS * spec->channels) * sizeof(float)),
                                   malloc(PAGE_TOKENS * row_bytes)};
  for (int t = 0; t < PAGE_TOKENS; t++) {
    float size = exp2f((float)(6 * test_uniform(seed)) - 3);
    for (int k = t * d; k < (t + 1) * d; k++) {
      exact[k] = f32_to_bf16(size * test_normal(seed));
      x[k] = bf16_to_f32(exact[k]);
    }
  }
  assert_ok(codec->context, oscar_codec_encode(codec, (int64_t)77 * PAGE_TOKENS, PAGE_TOKENS, x, (size_t)d, rows));
  for (int side = OSCAR_KEYS; side <= OSCAR_VALUES; side++) {
    page_pack(&form, (oscar_side)side, rows, expected);
    memset(packed, 0xA5, side_bytes(&form));
    assert_int_equal(page_encode(codec, (oscar_side)side, 77, exact, &scratch, packed), PAGE_TOKENS);
    assert_memory_equal(packed, expected, side_bytes(&form));
  }
  exact[50 * d + 3] = f32_to_bf16(INFINITY);
  exact[37 * d + d - 1] = f32_to_bf16(NAN);
  assert_int_equal(page_encode(codec, OSCAR_KEYS, 77, exact, &scratch, packed), 37);
  free(x), free(exact), free(rows), free(expected), free(packed);
  free(scratch.x), free(scratch.y), free(scratch.rows);
}

static void a_page_is_encoded_as_its_rows_are(void **state) {
  (void)state;
  for (oscar_isa isa = OSCAR_ISA_PORTABLE; isa <= OSCAR_ISA_NEON_DOT; isa++) {
    oscar_context *c = context_with(isa);
    uint64_t seed = 9;
    for (size_t n = 0; c && n < ARRAY_LENGTH(variants); n++) {
      if (beyond_emulation(&variants[n])) continue;
      oscar_codec *codec = make_variant(c, &variants[n], &seed);
      check_page(codec, &seed);
      oscar_codec_release(codec);
    }
    oscar_context_free(c);
  }
}

/* ---- log gains: all sixteen tried, in float as the header says ---- */

static float code_of(const oscar_codec_spec *spec, int i, float t, int gain) {
  float levels = (float)(1 << 2 * spec->crumbs[i]), u = floorf(t * inverse_log_gain_table[gain] + levels / 2);
  return fmaxf(0, fminf(levels - 1, u));
}

/* The power of two at or below the largest step of a group. */
static float unit_of_group(const oscar_codec_spec *spec, const int *group, int p) {
  float unit = 0;
  for (int i = 0; i < spec->channels; i++)
    if (group[i] == p && spec->crumbs[i] > 0 && spec->steps[i] > unit) unit = spec->steps[i];
  return exp2f(floorf(log2f(unit)));
}

/* The squared error of a group over its unit's square. The magnitude's code is counted from the middle, so that a number on the
 * border of two codes has the error that both have. */
static float float_error(const oscar_codec_spec *spec, const int *group, int p, const float *y, int gain, float unit) {
  float sum = 0;
  for (int i = 0; i < spec->channels; i++) {
    if (group[i] != p || !spec->crumbs[i]) continue;
    float inverse = fminf(1 / spec->steps[i], FLT_MAX), magnitude = fminf(fabsf(y[i] * inverse), 0x1p40f);
    float a = magnitude * inverse_log_gain_table[gain], outermost = (float)(1 << 2 * spec->crumbs[i]) / 2 - 1;
    float e = (a - floorf(fminf(a, outermost)) - 0.5f) * (spec->steps[i] / unit);
    sum += e * e;
  }
  return sum * (log_gain_table[gain] * log_gain_table[gain]);
}

static void check_gains(const oscar_codec *codec, const float *y, const uint8_t *bytes) {
  const oscar_codec_spec *spec = oscar_codec_describe(codec);
  const int total = oscar_codec_crumbs(codec);
  const unsigned word = bytes[total / 4] | (unsigned)bytes[total / 4 + 1] << 8;
  int group[OSCAR_MAX_HEAD_DIM];
  double exact[OSCAR_MAX_HEAD_DIM];
  struct row row;
  read_row(codec, bytes, &row);
  groups_of(spec, total, group);
  for (int i = 0; i < spec->channels; i++) exact[i] = (double)y[i];
  for (int p = 0; p < spec->groups; p++) {
    float least = INFINITY, unit = unit_of_group(spec, group, p);
    int best = 0, stored = (int)(word >> 4 * p & 15);
    for (int gain = 0; gain < 16; gain++) {
      float error = float_error(spec, group, p, y, gain, unit);
      if (error >= least) continue;
      least = error;
      best = gain;
    }
    assert_int_equal(stored, best);
    check_log_gain(spec, group, p, exact, row.s[p]);
    for (int i = 0; i < spec->channels; i++) {
      if (group[i] != p || !spec->crumbs[i]) continue;
      float t = y[i] * fminf(1 / spec->steps[i], FLT_MAX);
      assert_int_equal(row.codes[i], (int)code_of(spec, i, t, best));
    }
  }
}

/* Row r of many kinds, so that a vector of rows holds several: gains from below the table to above it, tails, spikes, rows on
 * levels and on borders, zero, next to nothing and next to infinity. */
static void odd_row(const oscar_codec_spec *spec, int r, float *y, uint64_t *seed) {
  float size = exp2f((float)(12 * test_uniform(seed)) - 6), gain = log_gain_table[test_random(seed) % 16];
  for (int i = 0; i < spec->channels; i++) {
    float z = test_normal(seed), step = spec->steps[i], sign = z < 0 ? -1.0f : 1.0f;
    switch (r % 11) {
    case 0:
      y[i] = size * z;
      break;
    case 1:
      y[i] = size * z * z * z;
      break;
    case 2:
      y[i] = test_random(seed) % 16 ? 0 : size * sign;
      break;
    case 3:
      y[i] = gain * step * ((float)(test_random(seed) % 4) - 1.5f);
      break;
    case 4:
      y[i] = gain * step * ((float)(test_random(seed) % 5) - 2);
      break;
    case 5:
      y[i] = 0;
      break;
    case 6:
      y[i] = 1e-30f * z;
      break;
    case 7:
      y[i] = 1e30f * z;
      break;
    case 8:
      y[i] = FLT_MAX * sign;
      break;
    case 9:
      y[i] = i % 5 ? step * z : 40 * step * z;
      break;
    default:
      y[i] = size * sign;
    }
  }
}

static void the_gain_is_the_best_of_all_sixteen(void **state) {
  (void)state;
  enum { ROWS = 110 };
  for (oscar_isa isa = OSCAR_ISA_PORTABLE; isa <= OSCAR_ISA_NEON_DOT; isa++) {
    oscar_context *c = context_with(isa);
    uint64_t seed = 10;
    for (size_t n = 0; c && n < ARRAY_LENGTH(variants); n++) {
      if (variants[n].form != OSCAR_ROW_LOG_GAINS || beyond_emulation(&variants[n])) continue;
      oscar_codec *codec = make_variant(c, &variants[n], &seed);
      const oscar_codec_spec *spec = oscar_codec_describe(codec);
      size_t m = (size_t)spec->channels, row_bytes = oscar_codec_row_bytes(codec);
      float *y = malloc(ROWS * m * sizeof *y);
      uint8_t *rows = malloc(ROWS * row_bytes);
      for (int round = 0; round < 2; round++) {
        for (int r = 0; r < ROWS; r++) odd_row(spec, r, y + (size_t)r * m, &seed);
        assert_int_equal(codec_quantize(codec, ROWS, y, rows), ROWS);
        for (size_t r = 0; r < ROWS; r++) check_gains(codec, y + r * m, rows + r * row_bytes);
        y[70 * m + m / 2] = -INFINITY;
        assert_int_equal(codec_quantize(codec, ROWS, y, rows), 70);
      }
      free(y), free(rows);
      oscar_codec_release(codec);
    }
    oscar_context_free(c);
  }
}

static void a_row_does_not_depend_on_the_rows_beside_it(void **state) {
  (void)state;
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 1);
  uint64_t seed = 4;
  for (size_t n = 0; n < ARRAY_LENGTH(variants); n++) {
    oscar_codec *codec = make_variant(c, &variants[n], &seed);
    size_t bytes = oscar_codec_row_bytes(codec), d = (size_t)variants[n].d;
    float *x = random_matrix(19, variants[n].d, &seed), *wide = calloc(19 * (d + 3), sizeof *wide);
    uint8_t *together = malloc(19 * bytes), *alone = malloc(bytes);
    for (size_t t = 0; t < 19; t++) memcpy(wide + t * (d + 3), x + t * d, d * sizeof *x);
    assert_ok(c, oscar_codec_encode(codec, POSITION, 19, wide, d + 3, together));
    for (size_t t = 0; t < 19; t++) {
      assert_ok(c, oscar_codec_encode(codec, POSITION + (int64_t)t, 1, x + t * d, d, alone));
      assert_memory_equal(alone, together + t * bytes, bytes);
    }
    free(x);
    free(wide);
    free(together);
    free(alone);
    oscar_codec_release(codec);
  }
  oscar_context_free(c);
}

static oscar_codec *plain_codec(oscar_context *c, int d, oscar_row_form form, int groups, float clip) {
  oscar_codec_spec spec = {.head_dim = d, .channels = d, .form = form, .groups = groups, .clip_ratio = clip};
  oscar_codec *codec = NULL;
  assert_ok(c, oscar_codec_create(c, &spec, &codec));
  return codec;
}

/* Worked on paper. Channels 0..15 are -3 -2 -1 0 1 2 3 then zeros: range 6, scale 2 (0x4000), zero 1.5 (0x3E00); x/2 + 1.5 + .5:
 * .5 1 1.5 2 2.5 3 3.5 -> codes 0 1 1 2 2 3 3 then 2. Byte i holds channels i, i+4, i+8, i+12. */
static void a_row_worked_by_hand(void **state) {
  (void)state;
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 1);
  oscar_codec *codec = plain_codec(c, 16, OSCAR_ROW_SCALE_ZERO, 1, 1);
  const float x[16] = {-3, -2, -1, 0, 1, 2, 3};
  const uint8_t expected[8] = {
      0 | 2 << 2 | 0xA0, 1 | 3 << 2 | 0xA0, 1 | 3 << 2 | 0xA0, 2 | 2 << 2 | 0xA0, 0x00, 0x40, 0x00, 0x3E};
  const float decoded[16] = {-3, -1, -1, 1, 1, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1};
  uint8_t row[8];
  float back[16];
  assert_int_equal(oscar_codec_row_bytes(codec), 8);
  assert_ok(c, oscar_codec_encode(codec, 0, 1, x, 16, row));
  assert_memory_equal(row, expected, 8);
  oscar_codec_decode(codec, 0, 1, row, back, 16);
  assert_memory_equal(back, decoded, sizeof decoded);
  oscar_codec_release(codec);

  /* Clip .75: rank 12 of the magnitudes 1..16 is 13, so 14, 15, 16 are cut to it: -13 .. 13. */
  codec = plain_codec(c, 16, OSCAR_ROW_SCALE_ZERO, 1, 0.75f);
  float alternating[16];
  for (int i = 0; i < 16; i++) alternating[i] = (float)(i % 2 ? i + 1 : -(i + 1));
  assert_ok(c, oscar_codec_encode(codec, 0, 1, alternating, 16, row));
  assert_int_equal(row[4] | row[5] << 8, f32_to_f16(26.0f / 3));
  assert_int_equal(row[6] | row[7] << 8, f32_to_f16(1.5f));
  oscar_codec_release(codec);

  /* GAIN: +-1 with one crumb: codes 2 and 1 (middle levels +-s/2) or 3 and 0 (+-1.5 s). The RMS start s = .9957 takes |t| = 1.004
   * to 3 and 0; least squares then s = 1/1.5 = .6667, which keeps them. */
  codec = plain_codec(c, 16, OSCAR_ROW_GAIN, 1, 0);
  float signs[16];
  for (int i = 0; i < 16; i++) signs[i] = i % 3 ? 1 : -1;
  assert_ok(c, oscar_codec_encode(codec, 0, 1, signs, 16, row));
  assert_int_equal(row[4] | row[5] << 8, f32_to_f16(2.0f / 3));
  for (int i = 0; i < 16; i++) assert_int_equal(crumb_at(codec, row, i), i % 3 ? 3 : 0);
  oscar_codec_release(codec);
  oscar_context_free(c);
}

/* tau is one of the row's magnitudes, exactly; quantizing leaves the clipped row behind. */
static void the_clip_is_exact(void **state) {
  (void)state;
  static const float ratios[] = {0.01f, 0.5f, 0.75f, 0.9f, 0.92f, 0.96f, 0.98f, 0.995f, 1};
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 1);
  uint64_t seed = 8;
  for (size_t n = 0; n < ARRAY_LENGTH(ratios); n++)
    for (int d = 16; d <= 1024; d += d < 160 ? 16 : 432) {
      oscar_codec *codec = plain_codec(c, d, OSCAR_ROW_SCALE_ZERO, 1, ratios[n]);
      for (int ties = 0; ties < 2; ties++) {
        float y[1024];
        double truth[1024];
        uint8_t row[512];
        for (int i = 0; i < d; i++) y[i] = ties ? (float)((int)(test_random(&seed) % 7) - 3) : test_normal(&seed);
        for (int i = 0; i < d; i++) truth[i] = (double)y[i];
        define_clip(truth, d, (double)ratios[n]);
        assert_true(codec_quantize_row(codec, y, row));
        for (int i = 0; i < d; i++) assert_true((double)y[i] == truth[i]);
      }
      oscar_codec_release(codec);
    }
  oscar_context_free(c);
}

/* The reference's wire form: byte i holds channels i, i + d/4, i + d/2, i + 3d/4, low bits first; scale and zero interleaved. */
static void the_reference_wire_form_is_the_canonical_row(void **state) {
  (void)state;
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 1);
  for (int groups = 1; groups <= 4; groups *= 4) {
    oscar_codec *codec = plain_codec(c, 128, OSCAR_ROW_SCALE_ZERO, groups, 1);
    assert_int_equal(oscar_codec_row_bytes(codec), 32 + 4 * groups);
    uint64_t seed = 5;
    float x[128];
    int codes[128];
    for (int i = 0; i < 128; i++) codes[i] = (int)(test_random(&seed) & 3);
    for (int g = 0; g < groups; g++) codes[g * 128 / groups] = 0, codes[g * 128 / groups + 1] = 3;
    for (int i = 0; i < 128; i++) x[i] = (float)(codes[i] - 1) * (float)(1 << i / (128 / groups)); /* scale 2^g, zero 1 */
    uint8_t row[48];
    assert_ok(c, oscar_codec_encode(codec, 0, 1, x, 128, row));
    for (int i = 0; i < 32; i++)
      assert_int_equal(row[i], codes[i] | codes[i + 32] << 2 | codes[i + 64] << 4 | codes[i + 96] << 6);
    for (int g = 0; g < groups; g++) {
      assert_int_equal(row[32 + 4 * g] | row[33 + 4 * g] << 8, 0x3C00 + (g << 10));
      assert_int_equal(row[34 + 4 * g] | row[35 + 4 * g] << 8, 0x3C00);
    }
    oscar_codec_release(codec);
  }
  oscar_context_free(c);
}

/* METHOD: relative squared errors of Gaussian rows of 128. */
static void gaussian_rows_have_the_published_errors(void **state) {
  (void)state;
  static const struct {
    oscar_row_form form;
    float clip;
    double error;
  } table[] = {{OSCAR_ROW_SCALE_ZERO, 1, .251},     {OSCAR_ROW_SCALE_ZERO, 0.98f, .198}, {OSCAR_ROW_SCALE_ZERO, 0.96f, .156},
               {OSCAR_ROW_SCALE_ZERO, 0.92f, .127}, {OSCAR_ROW_SCALE_ZERO, 0.90f, .122}, {OSCAR_ROW_GAIN, 0, .1166}};
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 1);
  for (size_t n = 0; n < ARRAY_LENGTH(table); n++) {
    oscar_codec *codec = plain_codec(c, 128, table[n].form, 1, table[n].clip);
    uint64_t seed = 6;
    double error = 0, energy = 0;
    for (int t = 0; t < 8000; t++) {
      float x[128], back[128];
      uint8_t row[64];
      for (int i = 0; i < 128; i++) x[i] = test_normal(&seed);
      assert_ok(c, oscar_codec_encode(codec, 0, 1, x, 128, row));
      oscar_codec_decode(codec, 0, 1, row, back, 128);
      for (int i = 0; i < 128; i++) {
        error += (double)(x[i] - back[i]) * (double)(x[i] - back[i]);
        energy += (double)x[i] * (double)x[i];
      }
    }
    print_message("form %d clip %.2f: relative squared error %.4f, published %.4f\n", (int)table[n].form, (double)table[n].clip,
                  error / energy, table[n].error);
    assert_true(fabs(error / energy / table[n].error - 1) < 0.02);
    oscar_codec_release(codec);
  }
  oscar_context_free(c);
}

/* The constants against the definition of the error, integrated numerically. */
static void gaussian_steps_minimise_the_error(void **state) {
  (void)state;
  for (int n = 1; n <= 4; n++) {
    double step = (double)codec_gaussian_step(n), levels = pow(4, n), errors[3];
    for (int side = -1; side <= 1; side++) {
      double s = step * (1 + 0.01 * side), sum = 0, h = 1e-4;
      for (double x = h / 2; x < 12; x += h) {
        double code = fmin(floor(x / s), levels / 2 - 1);
        sum += h * pow(x - s * (code + 0.5), 2) * exp(-x * x / 2) * 2 / sqrt(6.283185307179586);
      }
      errors[side + 1] = sum;
    }
    assert_true(errors[1] < errors[0] && errors[1] < errors[2]);
    assert_true(fabs(errors[1] / (double)codec_gaussian_error(n) - 1) < 1e-4);
  }
  assert_true(codec_gaussian_error(0) == 1);
}

static void constant_rows_decode_to_themselves(void **state) {
  (void)state;
  static const float values[] = {0, 1, -1, 1e-3f, -1e-5f, 3e-7f, 100, -12345, 6e6f, -4e9f, 65504, 1e-12f};
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 1);
  for (int groups = 1; groups <= 2; groups++) {
    oscar_codec *codec = plain_codec(c, 32, OSCAR_ROW_SCALE_ZERO, groups, 1);
    for (size_t n = 0; n < ARRAY_LENGTH(values); n++)
      for (int nearly = 0; nearly < 2; nearly++) {
        float x[32], back[32];
        uint8_t row[16];
        for (int i = 0; i < 32; i++) x[i] = values[n] * (nearly && i % 2 ? 1 + 0x1p-20f : 1);
        assert_ok(c, oscar_codec_encode(codec, 0, 1, x, 32, row));
        oscar_codec_decode(codec, 0, 1, row, back, 32);
        /* to half an fp16 unit, or half the smallest fp16 number */
        for (int i = 0; i < 32; i++) assert_true(fabsf(back[i] - x[i]) <= fmaxf(fabsf(x[i]) * 0x1.01p-10f, 0x1p-24f));
      }
    oscar_codec_release(codec);
  }
  oscar_context_free(c);
}

static void a_small_spread_on_a_large_offset_stays_bounded(void **state) {
  (void)state;
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 1);
  oscar_codec *codec = plain_codec(c, 64, OSCAR_ROW_SCALE_ZERO, 1, 1);
  uint64_t seed = 7;
  for (double spread = 1e-9; spread < 1e4; spread *= 10) {
    float x[64], back[64];
    uint8_t row[20];
    for (int i = 0; i < 64; i++) x[i] = (float)(500 + spread * test_uniform(&seed));
    assert_ok(c, oscar_codec_encode(codec, 0, 1, x, 64, row));
    oscar_codec_decode(codec, 0, 1, row, back, 64);
    /* half a step, and the zero's rounding to fp16 (500 2^-11), which may also move the code by as much */
    for (int i = 0; i < 64; i++) assert_true((double)fabsf(back[i] - x[i]) <= spread / 6 * 1.01 + (500 + spread) * 0x1p-10);
  }
  oscar_codec_release(codec);
  oscar_context_free(c);
}

static void zero_rows_have_defined_codes(void **state) {
  (void)state;
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 1);
  oscar_codec *codec = plain_codec(c, 32, OSCAR_ROW_GAIN, 2, 0);
  float x[32] = {0}, back[32];
  uint8_t row[12];
  for (int i = 16; i < 32; i++) x[i] = i % 2 ? 2.0f : -2.0f; /* the first group is zero, the second is not */
  assert_ok(c, oscar_codec_encode(codec, 0, 1, x, 32, row));
  for (int i = 0; i < 16; i++) assert_int_equal(crumb_at(codec, row, i), 2);
  assert_int_equal(row[8] | row[9], 0);
  oscar_codec_decode(codec, 0, 1, row, back, 32);
  for (int i = 0; i < 32; i++) assert_true(fabsf(back[i] - x[i]) < 2e-3f);
  for (int i = 0; i < 32; i++) x[i] = 1e-30f; /* below what a gain can say: decodes to zero */
  assert_ok(c, oscar_codec_encode(codec, 0, 1, x, 32, row));
  oscar_codec_decode(codec, 0, 1, row, back, 32);
  for (int i = 0; i < 32; i++) assert_true(back[i] == 0);
  oscar_codec_release(codec);
  oscar_context_free(c);
}

static void broken_rows_are_named(void **state) {
  (void)state;
  static const float broken[] = {NAN, INFINITY, -INFINITY, 3e38f, 1e12f};
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 1);
  for (int form = 0; form < 2; form++) {
    oscar_codec *codec = plain_codec(c, 16, (oscar_row_form)form, 1, 0.9f);
    for (size_t n = 0; n < ARRAY_LENGTH(broken); n++) {
      float x[11 * 16];
      uint8_t rows[11 * 8];
      for (int i = 0; i < 11 * 16; i++) x[i] = (float)i;
      for (int i = 0; i < 8; i++) x[9 * 16 + 2 * i] = isfinite(broken[n]) && i % 2 ? -broken[n] : broken[n];
      assert_int_equal(oscar_codec_encode(codec, 0, 11, x, 16, rows), OSCAR_NUMERIC);
      assert_non_null(strstr(oscar_last_error(c), "row 9"));
    }
    assert_int_equal(oscar_codec_encode(codec, 0, 1, broken, 15, NULL), OSCAR_INVALID_ARGUMENT);
    assert_int_equal(oscar_codec_encode(codec, 0, -1, broken, 16, NULL), OSCAR_INVALID_ARGUMENT);
    oscar_codec_release(codec);
  }
  oscar_context_free(c);
}

static void wrong_specs_are_refused_by_field(void **state) {
  (void)state;
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 1);
  uint8_t crumbs[32], five[32] = {5}, uneven[32] = {2};
  float steps[32], matrix[32 * 32], nan_mean[32] = {NAN};
  memset(crumbs, 1, sizeof crumbs);
  memset(uneven + 1, 1, 31);
  uneven[31] = 0;
  for (int i = 0; i < 32; i++) steps[i] = 1;
  for (int i = 0; i < 32 * 32; i++) matrix[i] = 1;
  const oscar_codec_spec good = {.head_dim = 32,
                                 .channels = 32,
                                 .form = OSCAR_ROW_GAIN,
                                 .groups = 1,
                                 .clip_ratio = 1,
                                 .crumbs = crumbs,
                                 .steps = steps,
                                 .encode = matrix,
                                 .decode = matrix};
  oscar_codec *codec = NULL;
#define REFUSED(status, word, ...)                                                                                               \
  do {                                                                                                                           \
    oscar_codec_spec spec = good;                                                                                                \
    __VA_ARGS__;                                                                                                                 \
    assert_int_equal(oscar_codec_create(c, &spec, &codec), status);                                                              \
    assert_null(codec);                                                                                                          \
    assert_non_null(strstr(oscar_last_error(c), word));                                                                          \
  } while (0)
  REFUSED(OSCAR_INVALID_ARGUMENT, "head_dim", spec.head_dim = 24);
  REFUSED(OSCAR_INVALID_ARGUMENT, "head_dim", spec.head_dim = 1040);
  REFUSED(OSCAR_INVALID_ARGUMENT, "head_dim", spec.head_dim = -16);
  REFUSED(OSCAR_INVALID_ARGUMENT, "channels", spec.channels = 33);
  REFUSED(OSCAR_INVALID_ARGUMENT, "channels", spec.channels = 0);
  REFUSED(OSCAR_INVALID_ARGUMENT, "form", spec.form = (oscar_row_form)7);
  REFUSED(OSCAR_INVALID_ARGUMENT, "groups", spec.groups = 0);
  REFUSED(OSCAR_INVALID_ARGUMENT, "groups", spec.groups = 4);
  REFUSED(OSCAR_INVALID_ARGUMENT, "log gains", spec.form = OSCAR_ROW_LOG_GAINS; spec.groups = 5);
  REFUSED(OSCAR_INVALID_ARGUMENT, "clip_ratio", spec.form = OSCAR_ROW_SCALE_ZERO; spec.clip_ratio = 0);
  REFUSED(OSCAR_INVALID_ARGUMENT, "clip_ratio", spec.form = OSCAR_ROW_SCALE_ZERO; spec.clip_ratio = 1.5f);
  REFUSED(OSCAR_INVALID_ARGUMENT, "clip_ratio", spec.form = OSCAR_ROW_SCALE_ZERO; spec.clip_ratio = NAN);
  REFUSED(OSCAR_INVALID_ARGUMENT, "crumbs[0]", spec.crumbs = five);
  REFUSED(OSCAR_INVALID_ARGUMENT, "multiple of 16", spec.channels = 17);
  REFUSED(OSCAR_INVALID_ARGUMENT, "SCALE_ZERO", spec.form = OSCAR_ROW_SCALE_ZERO; spec.crumbs = uneven);
  REFUSED(OSCAR_INVALID_ARGUMENT, "identity", spec.channels = 16; spec.encode = NULL);
  REFUSED(OSCAR_INVALID_ARGUMENT, "steps[3]", steps[3] = 0);
  REFUSED(OSCAR_INVALID_ARGUMENT, "steps[3]", steps[3] = -1);
  REFUSED(OSCAR_NUMERIC, "steps[3]", steps[3] = INFINITY);
  steps[3] = 1;
  REFUSED(OSCAR_NUMERIC, "mean[0]", spec.mean = nan_mean);
  REFUSED(OSCAR_NUMERIC, "encode[5]", matrix[5] = NAN);
  matrix[5] = 1;
  REFUSED(OSCAR_NUMERIC, "map", steps[0] = 3e38f; matrix[0] = 1e30f);
  steps[0] = matrix[0] = 1;
  /* a border of two groups inside channel 15, which holds crumbs 15 and 16 */
  uint8_t split[32];
  memset(split, 1, sizeof split);
  split[15] = 2;
  split[31] = 0;
  REFUSED(OSCAR_INVALID_ARGUMENT, "splits a channel", spec.groups = 2; spec.crumbs = split);
#undef REFUSED
  assert_ok(c, oscar_codec_create(c, &good, &codec));
  oscar_codec_release(codec);
  oscar_context_free(c);
}

static void wrong_ropes_and_rotating_means_are_refused(void **state) {
  (void)state;
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 1);
  float frequencies[16] = {1, .1f}, mean[32] = {0};
  uint16_t pair[16] = {0, 1};
  oscar_rope *rope = NULL, *wide = NULL;
  oscar_codec *codec = NULL;
  assert_int_equal(oscar_rope_create(c, &(oscar_rope_spec){OSCAR_ROPE_HALVES, 3, frequencies}, &rope), OSCAR_INVALID_ARGUMENT);
  assert_int_equal(oscar_rope_create(c, &(oscar_rope_spec){OSCAR_ROPE_HALVES, 0, frequencies}, &rope), OSCAR_INVALID_ARGUMENT);
  assert_int_equal(oscar_rope_create(c, &(oscar_rope_spec){(oscar_rope_layout)2, 4, frequencies}, &rope), OSCAR_INVALID_ARGUMENT);
  frequencies[1] = NAN;
  assert_int_equal(oscar_rope_create(c, &(oscar_rope_spec){OSCAR_ROPE_HALVES, 4, frequencies}, &rope), OSCAR_NUMERIC);
  assert_null(rope);
  frequencies[1] = .1f;
  assert_ok(c, oscar_rope_create(c, &(oscar_rope_spec){OSCAR_ROPE_HALVES, 4, frequencies}, &rope));
  assert_ok(c, oscar_rope_create(c, &(oscar_rope_spec){OSCAR_ROPE_HALVES, 32, frequencies}, &wide));
  const oscar_codec_spec good = {.head_dim = 16,
                                 .channels = 16,
                                 .form = OSCAR_ROW_LOG_GAINS,
                                 .groups = 1,
                                 .rope = rope,
                                 .rotating_pairs = 2,
                                 .rotating_pair = pair,
                                 .rotating_mean = mean};
#define REFUSED(status, word, ...)                                                                                               \
  do {                                                                                                                           \
    oscar_codec_spec spec = good;                                                                                                \
    __VA_ARGS__;                                                                                                                 \
    assert_int_equal(oscar_codec_create(c, &spec, &codec), status);                                                              \
    assert_non_null(strstr(oscar_last_error(c), word));                                                                          \
  } while (0)
  REFUSED(OSCAR_INVALID_ARGUMENT, "rotating pairs", spec.rope = NULL);
  REFUSED(OSCAR_INVALID_ARGUMENT, "rotating pairs", spec.rotating_pairs = 3);
  REFUSED(OSCAR_INVALID_ARGUMENT, "rotating pairs", spec.rotating_pairs = 0);
  REFUSED(OSCAR_INVALID_ARGUMENT, "rotating pairs", spec.rope = wide);
  REFUSED(OSCAR_INVALID_ARGUMENT, "rotating_pair[1]", pair[1] = 2);
  REFUSED(OSCAR_INVALID_ARGUMENT, "rotating_pair[1]", pair[1] = 0);
  pair[1] = 1;
  REFUSED(OSCAR_NUMERIC, "rotating_mean[3]", mean[3] = INFINITY);
  mean[3] = 0;
#undef REFUSED
  assert_ok(c, oscar_codec_create(c, &good, &codec));
  oscar_rope_release(rope);
  oscar_rope_release(wide);
  assert_int_equal(oscar_rope_describe(oscar_codec_describe(codec)->rope)->rotary_dim, 4);
  oscar_codec_release(codec);
  oscar_context_free(c);
}

static void a_description_has_no_null(void **state) {
  (void)state;
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 1);
  oscar_codec *codec = plain_codec(c, 16, OSCAR_ROW_GAIN, 1, 1);
  const oscar_codec_spec *spec = oscar_codec_describe(codec);
  for (int i = 0; i < 16; i++) {
    assert_int_equal(spec->crumbs[i], 1);
    assert_true(spec->steps[i] == 1 && spec->mean[i] == 0);
    for (int k = 0; k < 16; k++) assert_true(spec->encode[16 * i + k] == (i == k) && spec->decode[16 * i + k] == (i == k));
  }
  oscar_codec *again = oscar_codec_retain(codec);
  assert_ptr_equal(again, codec);
  oscar_codec_release(codec);
  assert_int_equal(oscar_codec_crumbs(again), 16);
  oscar_codec_release(again);
  oscar_context_free(c);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(codes_and_metadata_follow_the_formulas),
      cmocka_unit_test(decoding_follows_the_formula_with_stored_metadata),
      cmocka_unit_test(the_map_gives_scores_and_sums_of_decoded_rows),
      cmocka_unit_test(codes_do_not_depend_on_the_instruction_set),
      cmocka_unit_test(a_page_is_encoded_as_its_rows_are),
      cmocka_unit_test(the_gain_is_the_best_of_all_sixteen),
      cmocka_unit_test(a_row_does_not_depend_on_the_rows_beside_it),
      cmocka_unit_test(a_row_worked_by_hand),
      cmocka_unit_test(the_clip_is_exact),
      cmocka_unit_test(the_reference_wire_form_is_the_canonical_row),
      cmocka_unit_test(gaussian_rows_have_the_published_errors),
      cmocka_unit_test(gaussian_steps_minimise_the_error),
      cmocka_unit_test(constant_rows_decode_to_themselves),
      cmocka_unit_test(a_small_spread_on_a_large_offset_stays_bounded),
      cmocka_unit_test(zero_rows_have_defined_codes),
      cmocka_unit_test(broken_rows_are_named),
      cmocka_unit_test(wrong_specs_are_refused_by_field),
      cmocka_unit_test(wrong_ropes_and_rotating_means_are_refused),
      cmocka_unit_test(a_description_has_no_null),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
