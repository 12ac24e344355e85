/*
 * avx512.c - attention on a page with AVX-512 and VNNI.
 *
 * Coded pages are never expanded: a shift and a mask turn 64 bytes of a page into 64 crumbs, which one byte dot product
 * multiplies with 4 x 16 of a row. The other operand, queries or probabilities, is a 16-bit integer in two signed bytes, x ~ step
 * (256 high + low),  step = max |x| / 32512, so every crumb costs two byte products, and a block of rows shares one unpacking.
 * Errors of rounding x, at most step / 2 each, mostly share a crumb's mean of 1.5; that part is taken out: for keys with a shift
 * that is known in advance, for values by summing Z over the rounded weights too.
 */
#include "attention/kernels.h"

#include <immintrin.h>

#define LANES      16
#define BLOCK_VECS 4
typedef __m512 vec;

#define VEC static inline __attribute__((always_inline)) vec
VEC vec_zero(void) { return _mm512_setzero_ps(); }
VEC vec_set(float x) { return _mm512_set1_ps(x); }
VEC vec_load(const float *p) { return _mm512_loadu_ps(p); }
VEC vec_add(vec a, vec b) { return _mm512_add_ps(a, b); }
VEC vec_sub(vec a, vec b) { return _mm512_sub_ps(a, b); }
VEC vec_mul(vec a, vec b) { return _mm512_mul_ps(a, b); }
VEC vec_max(vec a, vec b) { return _mm512_max_ps(a, b); }
VEC vec_fma(vec a, vec b, vec c) { return _mm512_fmadd_ps(a, b, c); }
VEC vec_round(vec a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
VEC vec_times_power_of_two(vec a, vec n) { return _mm512_scalef_ps(a, n); }
VEC vec_zero_below(vec a, vec x, vec limit) { return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, limit, _CMP_NLT_UQ), a); }
VEC vec_load_bf16(const void *p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(p)), 16));
}
/* Lane i of the result is the sum of the lanes of x[i]: three rounds of interleave and add. */
VEC vec_sums(const vec x[LANES]) {
  vec y[4], z[2];
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    const vec *q = x + 4 * i;
    vec a = _mm512_add_ps(_mm512_unpacklo_ps(q[0], q[1]), _mm512_unpackhi_ps(q[0], q[1]));
    vec b = _mm512_add_ps(_mm512_unpacklo_ps(q[2], q[3]), _mm512_unpackhi_ps(q[2], q[3]));
    __m512d c = _mm512_castps_pd(a), d = _mm512_castps_pd(b);
    y[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(c, d)), _mm512_castpd_ps(_mm512_unpackhi_pd(c, d)));
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; i++)
    z[i] = _mm512_add_ps(_mm512_shuffle_f32x4(y[2 * i], y[2 * i + 1], 0x88), _mm512_shuffle_f32x4(y[2 * i], y[2 * i + 1], 0xDD));
  return _mm512_add_ps(_mm512_shuffle_f32x4(z[0], z[1], 0x88), _mm512_shuffle_f32x4(z[0], z[1], 0xDD));
}
static inline void vec_store(float *p, vec a) { _mm512_storeu_ps(p, a); }
static inline float vec_total(vec a) { return _mm512_reduce_add_ps(a); }
static inline float vec_highest(vec a) { return _mm512_reduce_max_ps(a); }

/* 16 x 16 dwords */
static inline void transpose(__m512i x[16]) {
  __m512i a[16], b[16];
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
    a[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
  }
  /* b[4 g + c] holds in its 128-bit lane l column 4 l + c of rows 4 g .. 4 g + 3 */
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; j++) {
      b[i + 2 * j] = _mm512_unpacklo_epi64(a[i + j], a[i + 2 + j]);
      b[i + 2 * j + 1] = _mm512_unpackhi_epi64(a[i + j], a[i + 2 + j]);
    }
  for (int c = 0; c < 4; c++) {
    __m512i even0 = _mm512_shuffle_i32x4(b[c], b[4 + c], 0x88), odd0 = _mm512_shuffle_i32x4(b[c], b[4 + c], 0xDD);
    __m512i even1 = _mm512_shuffle_i32x4(b[8 + c], b[12 + c], 0x88), odd1 = _mm512_shuffle_i32x4(b[8 + c], b[12 + c], 0xDD);
    x[c] = _mm512_shuffle_i32x4(even0, even1, 0x88);
    x[8 + c] = _mm512_shuffle_i32x4(even0, even1, 0xDD);
    x[4 + c] = _mm512_shuffle_i32x4(odd0, odd1, 0x88);
    x[12 + c] = _mm512_shuffle_i32x4(odd0, odd1, 0xDD);
  }
}

/* keys [64][d] BF16 -> panel [d][64]: pairs of elements are transposed as dwords, then parted. */
static void transpose_keys(int d, const uint16_t *keys, float *panel) {
  const __m512i upper = _mm512_set1_epi32((int)0xFFFF0000u);
  for (int token = 0; token < 64; token += 16)
    for (int i = 0; i < d; i += 32) {
      int pairs = d - i >= 32 ? 16 : 8;
      __m512i x[16];
      for (int t = 0; t < 16; t++) x[t] = _mm512_maskz_loadu_epi32((__mmask16)((1u << pairs) - 1), keys + (token + t) * d + i);
      transpose(x);
      for (int pair = 0; pair < pairs; pair++) {
        float *out = panel + (i + 2 * pair) * 64 + token;
        vec_store(out, _mm512_castsi512_ps(_mm512_slli_epi32(x[pair], 16)));
        vec_store(out + 64, _mm512_castsi512_ps(_mm512_and_si512(x[pair], upper)));
      }
    }
}

#include "attention/cpu/vector_kernels.h"

#define CODED_ROWS 4         /* rows that share one unpacking: 4 x 2 vectors x 2 terms = 16 sums in registers */
#define LARGEST    32512.f   /* 127 * 256: the largest number of two signed bytes whose low byte is -128 .. 127 */
#define NEGLIGIBLE 0x1p-100f /* a row whose largest number is below is taken as zero: 1 / step would overflow */

INLINE vec load_f16(const uint16_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(const void *)p)); }
INLINE __m512i load_codes(const uint8_t *p) { return _mm512_load_si512(p); }
/* The four crumbs of each lane at step j of its bytes. */
INLINE __m512i crumbs_at(__m512i codes, int j) {
  return _mm512_and_si512(_mm512_srli_epi32(codes, (unsigned)(2 * j)), _mm512_set1_epi8(3));
}
INLINE __m512i broadcast_dword(const void *p) {
  int x;
  memcpy(&x, p, sizeof x);
  return _mm512_set1_epi32(x);
}
INLINE vec join(__m512i high, __m512i low) { return _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(high, 8), low)); }

/* Writes 16 numbers as two bytes each and returns the integers they stand for. */
INLINE vec split(vec x, uint8_t *high, uint8_t *low) {
  __m512i whole = _mm512_cvtps_epi32(x);
  __m512i h = _mm512_srai_epi32(_mm512_add_epi32(whole, _mm512_set1_epi32(128)), 8);
  __m512i l = _mm512_sub_epi32(whole, _mm512_slli_epi32(h, 8));
  _mm_storeu_si128((__m128i *)(void *)high, _mm512_cvtepi32_epi8(h));
  _mm_storeu_si128((__m128i *)(void *)low, _mm512_cvtepi32_epi8(l));
  return _mm512_cvtepi32_ps(whole);
}

/* ---- keys ---- */

/* A prepared row: [C] high bytes, [C] low bytes, then per group the step and the shift. */
static size_t prepared_bytes(const struct side_form *keys) {
  return round_up((size_t)(2 * keys->crumbs) + 2 * sizeof(float) * (size_t)keys->groups, 64);
}

static void prepare_queries(const struct side_form *keys, int rows, const float *mapped, uint8_t *prepared) {
  int width = form_rows(keys), per_group = keys->crumbs / keys->groups;
  for (int r = 0; r < rows; r++) {
    uint8_t *high = prepared + (size_t)r * prepared_bytes(keys), *low = high + keys->crumbs;
    float *steps = (float *)(void *)(low + keys->crumbs), *shifts = steps + keys->groups;
    for (int group = 0; group < keys->groups; group++) {
      const float *q = mapped + r * width + group * per_group;
      vec largest = vec_zero(), error = vec_zero();
      for (int c = 0; c < per_group; c += 16) largest = vec_max(largest, _mm512_abs_ps(vec_load(q + c)));
      float max = vec_highest(largest), inverse = max < NEGLIGIBLE ? 0 : LARGEST / max, step = max / LARGEST;
      for (int c = 0; c < per_group; c += 16) {
        vec x = vec_load(q + c);
        vec whole = split(vec_mul(x, vec_set(inverse)), high + group * per_group + c, low + group * per_group + c);
        error = vec_add(error, _mm512_fmsub_ps(whole, vec_set(step), x));
      }
      steps[group] = step;
      shifts[group] = -1.5f * vec_total(error);
    }
  }
}

/* Scores of a block of rows: sum over groups of s (step dot + shift - z b), plus the mean. */
INLINE void score_block(int rows, const struct side_form *f, const float *mapped, const uint8_t *prepared, const uint8_t *keys,
                        float *scores) {
  int blocks = f->crumbs / 16, per_group = blocks / f->groups, width = form_rows(f);
  size_t prepared_stride = prepared_bytes(f);
  for (int tile = 0; tile < 4; tile += 2) {
    vec total[CODED_ROWS][2];
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++) total[r][0] = total[r][1] = vec_set(mapped[r * width + f->crumbs + f->groups]);
    for (int group = 0; group < f->groups; group++) {
      __m512i high[CODED_ROWS][2], low[CODED_ROWS][2];
#pragma GCC unroll 4
      for (int r = 0; r < rows; r++) high[r][0] = high[r][1] = low[r][0] = low[r][1] = _mm512_setzero_si512();
      for (int block = group * per_group; block < (group + 1) * per_group; block++) {
        __m512i codes0 = load_codes(keys + (tile * blocks + block) * 64);
        __m512i codes1 = load_codes(keys + ((tile + 1) * blocks + block) * 64);
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
          __m512i c0 = crumbs_at(codes0, j), c1 = crumbs_at(codes1, j);
#pragma GCC unroll 4
          for (int r = 0; r < rows; r++) {
            const uint8_t *q = prepared + (size_t)r * prepared_stride + block * 16 + j * 4;
            __m512i h = broadcast_dword(q), l = broadcast_dword(q + f->crumbs);
            high[r][0] = _mm512_dpbusd_epi32(high[r][0], c0, h);
            high[r][1] = _mm512_dpbusd_epi32(high[r][1], c1, h);
            low[r][0] = _mm512_dpbusd_epi32(low[r][0], c0, l);
            low[r][1] = _mm512_dpbusd_epi32(low[r][1], c1, l);
          }
        }
      }
#pragma GCC unroll 2
      for (int i = 0; i < 2; i++) {
        vec s = load_f16(tile_meta(f, keys, tile + i, group, 0));
        vec z = f->meta_values == 2 ? load_f16(tile_meta(f, keys, tile + i, group, 1)) : vec_set(1);
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) {
          const float *steps = (const float *)(const void *)(prepared + (size_t)r * prepared_stride + 2 * f->crumbs);
          vec dot = vec_fma(join(high[r][i], low[r][i]), vec_set(steps[group]), vec_set(steps[f->groups + group]));
          dot = _mm512_fnmadd_ps(z, vec_set(mapped[r * width + f->crumbs + group]), dot);
          total[r][i] = vec_fma(s, dot, total[r][i]);
        }
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++) {
      vec_store(scores + r * PAGE_TOKENS + tile * 16, total[r][0]);
      vec_store(scores + r * PAGE_TOKENS + tile * 16 + 16, total[r][1]);
    }
  }
}

/* Rows are cut into blocks of equal size as far as that goes: 5 are 3 and 2, not 4 and 1. */
static int next_block(int rows) {
  int blocks = (rows + CODED_ROWS - 1) / CODED_ROWS;
  return (rows + blocks - 1) / blocks;
}

static void score_coded(const struct query_rows *queries, const struct side_form *form, const uint8_t *keys, float *scores,
                        float *panel) {
  (void)panel;
  size_t stride = prepared_bytes(form);
  for (int r = 0, n; r < queries->rows; r += n) {
    const float *mapped = queries->mapped + r * form_rows(form);
    const uint8_t *prepared = queries->prepared + (size_t)r * stride;
    float *out = scores + r * PAGE_TOKENS;
    n = next_block(queries->rows - r);
    switch (n) {
    case 1:
      score_block(1, form, mapped, prepared, keys, out);
      break;
    case 2:
      score_block(2, form, mapped, prepared, keys, out);
      break;
    case 3:
      score_block(3, form, mapped, prepared, keys, out);
      break;
    default:
      score_block(4, form, mapped, prepared, keys, out);
      break;
    }
  }
}

/* ---- values ---- */

struct weights { /* of one row and one group: p s of 64 tokens */
  uint8_t high[PAGE_TOKENS], low[PAGE_TOKENS];
  float step;
};

/* Returns Z, the sum of the rounded weights times z. */
INLINE float prepare_weights(const struct side_form *f, const uint8_t *values, int group, const float *p,
                             struct weights *weights) {
  vec w[4], largest = vec_zero(), offset = vec_zero();
  for (int tile = 0; tile < 4; tile++) {
    w[tile] = vec_mul(vec_load(p + tile * 16), load_f16(tile_meta(f, values, tile, group, 0)));
    largest = vec_max(largest, _mm512_abs_ps(w[tile]));
  }
  float max = vec_highest(largest), inverse = max < NEGLIGIBLE ? 0 : LARGEST / max;
  weights->step = max / LARGEST;
  for (int tile = 0; tile < 4; tile++) {
    vec whole = split(vec_mul(w[tile], vec_set(inverse)), weights->high + tile * 16, weights->low + tile * 16);
    vec z = f->meta_values == 2 ? load_f16(tile_meta(f, values, tile, group, 1)) : vec_set(1);
    offset = vec_fma(whole, z, offset);
  }
  return vec_total(offset) * weights->step;
}

/* out[row][16 n crumbs] += weights times crumbs; `codes` is the first block in tile 0. */
INLINE void value_block(int rows, int n, int tile_bytes, const uint8_t *codes, const struct weights *weights, float *out,
                        int stride) {
  __m512i high[CODED_ROWS][2], low[CODED_ROWS][2];
#pragma GCC unroll 4
  for (int r = 0; r < rows; r++) high[r][0] = high[r][1] = low[r][0] = low[r][1] = _mm512_setzero_si512();
  for (int tile = 0; tile < 4; tile++) {
    __m512i packed[2];
#pragma GCC unroll 2
    for (int i = 0; i < n; i++) packed[i] = load_codes(codes + tile * tile_bytes + i * 64);
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
      __m512i c[2];
#pragma GCC unroll 2
      for (int i = 0; i < n; i++) c[i] = crumbs_at(packed[i], j);
#pragma GCC unroll 4
      for (int r = 0; r < rows; r++) {
        __m512i h = broadcast_dword(weights[r].high + tile * 16 + j * 4), l = broadcast_dword(weights[r].low + tile * 16 + j * 4);
#pragma GCC unroll 2
        for (int i = 0; i < n; i++) {
          high[r][i] = _mm512_dpbusd_epi32(high[r][i], c[i], h);
          low[r][i] = _mm512_dpbusd_epi32(low[r][i], c[i], l);
        }
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
    for (int i = 0; i < n; i++) {
      float *o = out + r * stride + i * 16;
      vec_store(o, vec_fma(join(high[r][i], low[r][i]), vec_set(weights[r].step), vec_load(o)));
    }
}

INLINE void accumulate_block(int rows, const struct side_form *f, const float *p, const uint8_t *values, float *out, int stride) {
  int blocks = f->crumbs / 16, per_group = blocks / f->groups;
  for (int group = 0; group < f->groups; group++) {
    struct weights weights[CODED_ROWS];
    for (int r = 0; r < rows; r++)
      out[r * stride + f->crumbs + group] -= prepare_weights(f, values, group, p + r * PAGE_TOKENS, weights + r);
    int block = group * per_group, end = block + per_group;
    for (; block + 2 <= end; block += 2)
      value_block(rows, 2, blocks * 64, values + block * 64, weights, out + block * 16, stride);
    if (block < end) value_block(rows, 1, blocks * 64, values + block * 64, weights, out + block * 16, stride);
  }
  for (int r = 0; r < rows; r++) {
    const float *x = p + r * PAGE_TOKENS;
    vec sum = vec_add(vec_add(vec_load(x), vec_load(x + 16)), vec_add(vec_load(x + 32), vec_load(x + 48)));
    out[r * stride + f->crumbs + f->groups] += vec_total(sum);
  }
}

static void accumulate_coded(int rows, const struct side_form *form, const float *p, const uint8_t *values, float *out,
                             int stride, float *panel) {
  (void)panel;
  for (int r = 0, n; r < rows; r += n) {
    n = next_block(rows - r);
    switch (n) {
    case 1:
      accumulate_block(1, form, p + r * PAGE_TOKENS, values, out + r * stride, stride);
      break;
    case 2:
      accumulate_block(2, form, p + r * PAGE_TOKENS, values, out + r * stride, stride);
      break;
    case 3:
      accumulate_block(3, form, p + r * PAGE_TOKENS, values, out + r * stride, stride);
      break;
    default:
      accumulate_block(4, form, p + r * PAGE_TOKENS, values, out + r * stride, stride);
      break;
    }
  }
}

const struct attention_kernels attention_kernels_avx512 = {
    .prepared_bytes = prepared_bytes,
    .prepare_queries = prepare_queries,
    .score_exact = score_exact,
    .score_coded = score_coded,
    .softmax = softmax,
    .accumulate_exact = accumulate_exact,
    .accumulate_coded = accumulate_coded,
    .multiply_transposed = multiply_transposed,
    .multiply_add = multiply_add,
};
