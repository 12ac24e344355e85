/*
 * rows_body.h - rows to codes and back: the one source that rows_portable.c, rows_avx2.c, rows_avx512.c and rows_neon.c compile,
 * each for its instruction set. It defines the kernels named by ROWS_KERNELS from vectors of LANES numbers (vec_..., ivec_...),
 * with blocks of TILE_COLUMNS columns and strips of STRIP_ROWS rows (what the registers hold). Private.
 *
 * Encoding is a matrix product and a quantizer. Both take tiles of 16 rows, transposed: a row is a lane of vectors. The product
 * accumulates every output over the inputs in ascending order, one multiplication and one addition each; the quantizer of log
 * gains (rows_gains.h) sums over a group in the same way, the others in sixteen fixed partial sums of a row: so the numbers are
 * the same whatever the blocking, the vector width and the compiler, and codes do not depend on the machine. The quantizers round
 * metadata first and compute codes from what the decoder will read.
 */
#include "quant/page_form.h"

#include <float.h>
#include <math.h>
#include <string.h>

#define TILE_ROWS  16
#define MAX_CRUMBS (OSCAR_MAX_HEAD_DIM * OSCAR_MAX_CRUMBS_PER_CHANNEL)
#define BLOCK_ROWS 8 /* decoded rows sharing one pass over a matrix; a multiple of STRIP_ROWS */

static int smaller(int a, int b) { return a < b ? a : b; }

#include "quant/rows_tile.h"

#include "quant/rows_gains.h"

/* ---- metadata ---- */

static void store_word(uint8_t *to, uint16_t h) {
  to[0] = (uint8_t)(h & 0xFF);
  to[1] = (uint8_t)(h >> 8);
}

static uint16_t load_word(const uint8_t *from) { return (uint16_t)(from[0] | from[1] << 8); }

static bool f16_finite(uint16_t h) { return (h & 0x7C00) != 0x7C00; }

/* The smallest fp16 number not below x >= 0 (infinity above 65504). */
static uint16_t f16_at_least(float x) {
  uint16_t h = f32_to_f16(x);
  return f16_to_f32(h) < x ? (uint16_t)(h + 1) : h;
}

/* ---- SCALE_ZERO ---- */

static uint32_t magnitude_bits(float x) {
  uint32_t u;
  memcpy(&u, &x, sizeof u);
  return u & 0x7FFFFFFFu;
}

/* The rank-th smallest |y| (from 0). Magnitudes order like their bits, so it is found bit by bit: the smallest value that more
 * than `rank` of them do not exceed. The number of steps does not depend on the data. */
static float magnitude_of_rank(const float *y, int m, int rank) {
  uint32_t bits[OSCAR_MAX_HEAD_DIM], found = 0;
  for (int i = 0; i < m; i++) bits[i] = magnitude_bits(y[i]);
  for (uint32_t bit = 1u << 30; bit; bit >>= 1) {
    uint32_t limit = found + (bit - 1);
    int below = 0;
    for (int i = 0; i < m; i++) below += bits[i] <= limit;
    if (below <= rank) found += bit;
  }
  float x;
  memcpy(&x, &found, sizeof x);
  return x;
}

static void clip(float *y, int m, float ratio) {
  /* In float, so that decimal ratios keep their meaning: 0.9f * 160 is 144, while the double product falls just short of it. */
  int rank = smaller((int)(ratio * (float)m), m - 1);
  if (rank == m - 1) return;
  float tau = magnitude_of_rank(y, m, rank);
  for (int i = 0; i < m; i++) y[i] = y[i] < -tau ? -tau : y[i] > tau ? tau : y[i];
}

/* Scale and zero as stored, by the rule of quant/codec.h. false: the scale leaves fp16. */
static bool scale_and_zero(float low, float high, float levels, uint16_t *scale, uint16_t *zero) {
  float s = fmaxf(high - low, 1e-8f) / (levels - 1);
  *scale = f32_to_f16(s);
  *zero = f32_to_f16(-low / s);
  if (s >= 0x1p-14f && f16_finite(*zero)) return f16_finite(*scale);
  float largest = fmaxf(fabsf(low), fabsf(high));
  *scale = f16_at_least(fmaxf(fmaxf(s, 0x1p-24f), largest / 65504.0f));
  *zero = f32_to_f16(-low / f16_to_f32(*scale));
  return f16_finite(*scale) && f16_finite(*zero);
}

static uint8_t clamp_floor(float u, float top) { /* once u is not below 0, truncation is floor */
  return (uint8_t)(int)(u < 0 ? 0 : u > top ? top : u);
}

static bool quantize_scale_zero(const oscar_codec *codec, int first, int last, const float *y, uint8_t *codes, uint8_t *meta) {
  int n = last - first;
  float t[OSCAR_MAX_HEAD_DIM], levels = codec->levels[first];
  for (int i = 0; i < n; i++) t[i] = y[first + i] / codec->spec.steps[first + i];
  float low = INFINITY, high = -INFINITY;
  for (int i = 0; i < n; i++) {
    low = t[i] < low ? t[i] : low;
    high = t[i] > high ? t[i] : high;
  }
  uint16_t scale, zero;
  if (!isfinite(high - low) || !scale_and_zero(low, high, levels, &scale, &zero)) return false;
  store_word(meta, scale);
  store_word(meta + 2, zero);
  float s = f16_to_f32(scale), z = f16_to_f32(zero), top = levels - 1;
  for (int i = 0; i < n; i++) codes[first + i] = clamp_floor(t[i] / s + z + 0.5f, top);
  return true;
}

/* ---- GAIN ---- */

/* Sixteen partial sums in a fixed order: the same number whatever the vector width. In double, so that neither small steps nor
 * large values leave the range. */
static double dot(const float *a, const float *b, int n) {
  double lanes[16] = {0}, sum = 0;
  int i = 0;
  for (; i + 16 <= n; i += 16)
    for (int j = 0; j < 16; j++) lanes[j] += (double)a[i + j] * (double)b[i + j];
  for (; i < n; i++) lanes[i % 16] += (double)a[i] * (double)b[i];
  for (int j = 0; j < 16; j++) sum += lanes[j];
  return sum;
}

struct group { /* one group of a row being quantized */
  int n;
  const float *y, *steps, *levels, *inverse_sigma;
  float t[OSCAR_MAX_HEAD_DIM], q[OSCAR_MAX_HEAD_DIM];
};

/* Root mean square of y_i / sigma_i over the coded channels. */
static float first_gain(struct group *g) {
  int coded = 0;
  for (int i = 0; i < g->n; i++) {
    g->q[i] = g->y[i] * g->inverse_sigma[i];
    coded += g->inverse_sigma[i] > 0;
  }
  return (float)sqrt(dot(g->q, g->q, g->n) / coded);
}

static void gain_codes(const struct group *g, float s, uint8_t *codes) {
  float divisor = s > 0 ? s : FLT_MAX; /* s = 0: all t are next to nothing, and the code is the one above the middle */
  for (int i = 0; i < g->n; i++) codes[i] = clamp_floor(g->t[i] / divisor + g->levels[i] / 2, g->levels[i] - 1);
}

/* The s that minimises sum (y_i - s q_i)^2 for the values q_i the codes stand for. A coded channel's q_i is never 0. */
static float least_squares_gain(struct group *g, const uint8_t *codes) {
  for (int i = 0; i < g->n; i++) g->q[i] = g->steps[i] * ((float)codes[i] - (g->levels[i] - 1) / 2);
  return (float)(dot(g->y, g->q, g->n) / dot(g->q, g->q, g->n));
}

static bool quantize_gain(const oscar_codec *codec, int first, int last, const float *y, uint8_t *codes, uint8_t *meta) {
  enum { REFITS = 2 }; /* a third changes nothing that can be measured */
  struct group g;
  g.n = last - first;
  g.y = y + first;
  g.steps = codec->spec.steps + first;
  g.levels = codec->levels + first;
  g.inverse_sigma = codec->inverse_sigma + first;
  for (int i = 0; i < g.n; i++) g.t[i] = g.y[i] / g.steps[i];
  float s = first_gain(&g);
  for (int k = 0; k < REFITS && s > 0 && isfinite(s); k++) {
    gain_codes(&g, s, codes + first);
    s = least_squares_gain(&g, codes + first);
  }
  uint16_t stored = f32_to_f16(s);
  if (!f16_finite(stored)) return false;
  store_word(meta, stored);
  gain_codes(&g, f16_to_f32(stored), codes + first);
  return true;
}

/* ---- LOG_GAINS ---- */

static int quantize_log_gains(const oscar_codec *codec, int n, const float *y, uint8_t *rows) {
  const int m = codec->spec.channels;
  float tile[OSCAR_MAX_HEAD_DIM * TILE_ROWS], magnitudes[OSCAR_MAX_HEAD_DIM * TILE_ROWS];
  uint32_t words[MAX_CRUMBS / 16 * TILE_ROWS], gains[TILE_ROWS];
  for (int first = 0; first < n; first += TILE_ROWS) {
    int block = smaller(TILE_ROWS, n - first);
    gather_tile(m, block, y + (size_t)first * (size_t)m, tile);
    int bad = first_bad_row(m, tile);
    if (bad < block) return first + bad;
    quantize_tile(codec, block, tile, magnitudes, words, gains);
    for (int r = 0; r < block; r++, rows += codec->row_bytes) {
      lane_to_row(codec->crumbs / 16, words + r, rows);
      store_word(rows + codec->crumbs / 4, (uint16_t)gains[r]);
    }
  }
  return n;
}

/* A page, in the order of packed keys. */
static int encode_page(const oscar_codec *codec, int64_t page, const uint16_t *exact, float *x, float *y, uint8_t *packed) {
  const oscar_codec_spec *spec = &codec->spec;
  const struct side_form form = side_form_of(codec);
  const size_t words = (size_t)codec->crumbs / 16 * TILE_ROWS;
  struct turned_mean turned;
  turn_mean(codec, page, &turned);
  for (int row = 0; row < PAGE_TOKENS; row += TILE_ROWS) {
    uint32_t gains[TILE_ROWS], *tile = (uint32_t *)(void *)packed + (size_t)(row / TILE_ROWS) * words;
    uint8_t *meta = packed + side_code_bytes(&form) + 2 * row;
    load_exact_tile(spec->head_dim, exact + (size_t)row * (size_t)spec->head_dim, spec->mean, x);
    subtract_turned(codec, &turned, row, x);
    multiply_tile(x, spec->head_dim, spec->encode, spec->channels, y);
    int bad = first_bad_row(spec->channels, y);
    if (bad < TILE_ROWS) return row + bad;
    quantize_tile(codec, TILE_ROWS, y, x, tile, gains);
    for (int r = 0; r < TILE_ROWS; r++) store_word(meta + 2 * r, (uint16_t)gains[r]);
  }
  return PAGE_TOKENS;
}

/* ---- a row ---- */

/* codes [channels] -> the C/4 bytes of the canonical row. Crumb c is in byte c mod (C/4), bits 2 (c div (C/4)) and the next. */
static void write_crumbs(const oscar_codec *codec, const uint8_t *codes, uint8_t *row) {
  const oscar_codec_spec *spec = &codec->spec;
  uint8_t crumbs[MAX_CRUMBS];
  int c = 0, quarter = codec->crumbs / 4;
  for (int i = 0; i < spec->channels; i++)
    for (int j = 0; j < spec->crumbs[i]; j++) crumbs[c++] = codes[i] >> 2 * j & 3;
  for (int b = 0; b < quarter; b++)
    row[b] = (uint8_t)(crumbs[b] | crumbs[b + quarter] << 2 | crumbs[b + 2 * quarter] << 4 | crumbs[b + 3 * quarter] << 6);
}

static void read_codes(const oscar_codec *codec, const uint8_t *row, uint8_t *codes) {
  const oscar_codec_spec *spec = &codec->spec;
  int c = 0, quarter = codec->crumbs / 4;
  for (int i = 0; i < spec->channels; i++) {
    codes[i] = 0;
    for (int j = 0; j < spec->crumbs[i]; j++, c++)
      codes[i] = (uint8_t)(codes[i] | (row[c % quarter] >> 2 * (c / quarter) & 3) << 2 * j);
  }
}

static bool all_finite(const float *x, int n) {
  bool finite = true;
  for (int i = 0; i < n; i++) finite &= magnitude_bits(x[i]) < 0x7F800000u;
  return finite;
}

static bool quantize_row(const oscar_codec *codec, float *y, uint8_t *row) {
  const oscar_codec_spec *spec = &codec->spec;
  if (!all_finite(y, spec->channels)) return false;
  bool (*quantize_group)(const oscar_codec *, int, int, const float *, uint8_t *, uint8_t *) = quantize_gain;
  if (spec->form == OSCAR_ROW_SCALE_ZERO) {
    clip(y, spec->channels, spec->clip_ratio);
    quantize_group = quantize_scale_zero;
  }
  uint8_t codes[OSCAR_MAX_HEAD_DIM];
  uint8_t *meta = row + codec->crumbs / 4;
  for (int p = 0; p < spec->groups; p++, meta += 2 * codec_meta_values(codec))
    if (!quantize_group(codec, codec->group_channel[p], codec->group_channel[p + 1], y, codes, meta)) return false;
  write_crumbs(codec, codes, row);
  return true;
}

static int quantize(const oscar_codec *codec, int n, float *y, uint8_t *rows) {
  if (codec->spec.form == OSCAR_ROW_LOG_GAINS) return quantize_log_gains(codec, n, y, rows);
  int done = 0;
  while (done < n && quantize_row(codec, y + (size_t)done * (size_t)codec->spec.channels, rows + (size_t)done * codec->row_bytes))
    done++;
  return done;
}

/* ---- decoding ---- */

/* Sixteen floats as one value: operators on it are per lane, and the compiler splits it into what the instruction set has. */
typedef float lanes16 __attribute__((vector_size(64)));

/* STRIP_ROWS rows x 16 columns, kept in registers while the inputs go by: out [][16] += in [][n] * matrix [n][columns]. */
static void strip(const float *in, size_t in_stride, int n, const float *matrix, size_t columns, float out[STRIP_ROWS][16]) {
  lanes16 sums[STRIP_ROWS], row;
  memcpy(sums, out, sizeof sums);
  for (int k = 0; k < n; k++, matrix += columns) {
    memcpy(&row, matrix, sizeof row);
#pragma GCC unroll 8
    for (int r = 0; r < STRIP_ROWS; r++) sums[r] += in[(size_t)r * in_stride + (size_t)k] * row;
  }
  memcpy(out, sums, sizeof sums);
}

static float column_sum(const float *in, int n, const float *matrix, size_t columns, float start) {
  for (int k = 0; k < n; k++) start += in[k] * matrix[(size_t)k * columns];
  return start;
}

/* out [BLOCK_ROWS][columns] = start [columns] + in [BLOCK_ROWS][n] * matrix [n][columns]; the first `rows` rows are stored. */
static void multiply_block(int rows, const float *in, int n, const float *matrix, int columns, const float *start, float *out,
                           size_t out_stride) {
  size_t c = (size_t)columns;
  int whole = columns / 16 * 16;
  for (int j = 0; j < whole; j += 16) {
    for (int r = 0; r < rows; r += STRIP_ROWS) {
      float sums[STRIP_ROWS][16];
      for (int i = 0; i < STRIP_ROWS; i++) memcpy(sums[i], start + j, sizeof sums[i]);
      strip(in + (size_t)r * (size_t)n, (size_t)n, n, matrix + j, c, sums);
      for (int i = 0; i < STRIP_ROWS && r + i < rows; i++)
        memcpy(out + (size_t)(r + i) * out_stride + j, sums[i], sizeof sums[i]);
    }
  }
  for (int j = whole; j < columns; j++)
    for (int r = 0; r < rows; r++)
      out[(size_t)r * out_stride + (size_t)j] = column_sum(in + (size_t)r * (size_t)n, n, matrix + j, c, start[j]);
}

/* rows [n][stride] += the rotating mean at positions position .. position + n - 1, n <= BLOCK_ROWS. The angle of a row is
 * that of its page plus that of its place in it (quant/rope.h). */
static void add_rotating_mean(const oscar_codec *codec, int64_t position, int n, float *rows, size_t stride) {
  const oscar_codec_spec *spec = &codec->spec;
  for (int k = 0; k < spec->rotating_pairs; k++) {
    const int *channel = codec->rotating_channel + 2 * k;
    const float *b = spec->rotating_mean + 2 * k, *table = rope_cosines(spec->rope, spec->rotating_pair[k]);
    float b1 = 0, b2 = 0, cosine, sine;
    for (int r = 0; r < n; r++) {
      int place = (int)((position + r) % PAGE_TOKENS);
      if (r == 0 || place == 0) {
        rope_page_angle(spec->rope, spec->rotating_pair[k], (position + r) / PAGE_TOKENS, &cosine, &sine);
        b1 = b[0] * cosine - b[1] * sine;
        b2 = b[0] * sine + b[1] * cosine;
      }
      float c = table[place], s = table[PAGE_TOKENS + place], *row = rows + (size_t)r * stride;
      row[channel[0]] += b1 * c - b2 * s;
      row[channel[1]] += b1 * s + b2 * c;
    }
  }
}

/* Scale and offset factor of group p; the offset is in units of the steps where it is one for all channels. */
static float scale_of_group(const oscar_codec *codec, const uint8_t *meta, int p) {
  if (codec->spec.form == OSCAR_ROW_LOG_GAINS) return log_gain(load_word(meta), p);
  return f16_to_f32(load_word(meta + 2 * p * codec_meta_values(codec)));
}

static void decode_row(const oscar_codec *codec, const uint8_t *row, float *y) {
  const oscar_codec_spec *spec = &codec->spec;
  uint8_t codes[OSCAR_MAX_HEAD_DIM];
  read_codes(codec, row, codes);
  const uint8_t *meta = row + codec->crumbs / 4;
  for (int p = 0; p < spec->groups; p++) {
    float s = scale_of_group(codec, meta, p),
          z = spec->form == OSCAR_ROW_SCALE_ZERO ? f16_to_f32(load_word(meta + 4 * p + 2)) : 0;
    for (int i = codec->group_channel[p]; i < codec->group_channel[p + 1]; i++) {
      float offset = spec->form == OSCAR_ROW_SCALE_ZERO ? z : (codec->levels[i] - 1) / 2;
      y[i] = s * spec->steps[i] * ((float)codes[i] - offset);
    }
  }
}

static void decode(const oscar_codec *codec, int64_t position, int n, const uint8_t *rows, float *x, size_t x_stride) {
  const oscar_codec_spec *spec = &codec->spec;
  size_t m = (size_t)spec->channels;
  float y[BLOCK_ROWS * OSCAR_MAX_HEAD_DIM] = {0};
  for (int first = 0; first < n; first += BLOCK_ROWS) {
    int block = smaller(BLOCK_ROWS, n - first);
    float *out = x + (size_t)first * x_stride;
    for (int r = 0; r < block; r++, rows += codec->row_bytes) decode_row(codec, rows, y + (size_t)r * m);
    multiply_block(block, y, spec->channels, spec->decode, spec->head_dim, spec->mean, out, x_stride);
    add_rotating_mean(codec, position + first, block, out, x_stride);
  }
}

const struct row_kernels ROWS_KERNELS = {project, quantize, encode_page, decode_row, decode};
