/*
 * avx2.c - attention on a page with AVX2, FMA and F16C.
 *
 * A coded page is expanded to a panel of floats as in portable.c, 8 crumbs at a time with one shift and mask, and multiplied by
 * the blocked matrix products: without a byte dot product of two registers' width, integers would not be faster.
 */
#include "attention/kernels.h"

#include <immintrin.h>

#define LANES      8
#define BLOCK_VECS 2
typedef __m256 vec;

#define VEC static inline __attribute__((always_inline)) vec
VEC vec_zero(void) { return _mm256_setzero_ps(); }
VEC vec_set(float x) { return _mm256_set1_ps(x); }
VEC vec_load(const float *p) { return _mm256_loadu_ps(p); }
VEC vec_add(vec a, vec b) { return _mm256_add_ps(a, b); }
VEC vec_sub(vec a, vec b) { return _mm256_sub_ps(a, b); }
VEC vec_mul(vec a, vec b) { return _mm256_mul_ps(a, b); }
VEC vec_max(vec a, vec b) { return _mm256_max_ps(a, b); }
VEC vec_fma(vec a, vec b, vec c) { return _mm256_fmadd_ps(a, b, c); }
VEC vec_round(vec a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
VEC vec_zero_below(vec a, vec x, vec limit) { return _mm256_and_ps(a, _mm256_cmp_ps(x, limit, _CMP_NLT_UQ)); }
/* a 2^n for a in [0.5, 2) and n in -126 .. 0 */
VEC vec_times_power_of_two(vec a, vec n) {
  __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return _mm256_mul_ps(a, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
}
VEC vec_load_bf16(const void *p) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(p)), 16)); }
/* Lane i of the result is the sum of the lanes of x[i]. */
VEC vec_sums(const vec x[LANES]) {
  vec a = _mm256_hadd_ps(_mm256_hadd_ps(x[0], x[1]), _mm256_hadd_ps(x[2], x[3]));
  vec b = _mm256_hadd_ps(_mm256_hadd_ps(x[4], x[5]), _mm256_hadd_ps(x[6], x[7]));
  return _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
}
static inline void vec_store(float *p, vec a) { _mm256_storeu_ps(p, a); }
static inline float vec_total(vec a) {
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}
static inline float vec_highest(vec a) {
  __m128 x = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}

/* 8 x 8 dwords */
static inline void transpose(__m256i x[8]) {
  __m256i a[8], b[8];
  for (int i = 0; i < 8; i += 2) {
    a[i] = _mm256_unpacklo_epi32(x[i], x[i + 1]);
    a[i + 1] = _mm256_unpackhi_epi32(x[i], x[i + 1]);
  }
  for (int i = 0; i < 8; i += 4)
    for (int j = 0; j < 2; j++) {
      b[i + 2 * j] = _mm256_unpacklo_epi64(a[i + j], a[i + 2 + j]);
      b[i + 2 * j + 1] = _mm256_unpackhi_epi64(a[i + j], a[i + 2 + j]);
    }
  for (int i = 0; i < 4; i++) {
    x[i] = _mm256_permute2x128_si256(b[i], b[i + 4], 0x20);
    x[i + 4] = _mm256_permute2x128_si256(b[i], b[i + 4], 0x31);
  }
}

/* keys [64][d] BF16 -> panel [d][64]: pairs of elements are transposed as dwords, then parted. */
static void transpose_keys(int d, const uint16_t *keys, float *panel) {
  const __m256i high = _mm256_set1_epi32((int)0xFFFF0000u);
  for (int token = 0; token < 64; token += 8)
    for (int i = 0; i < d; i += 16) {
      __m256i x[8];
      for (int t = 0; t < 8; t++) x[t] = _mm256_loadu_si256((const __m256i *)(const void *)(keys + (token + t) * d + i));
      transpose(x);
      for (int pair = 0; pair < 8; pair++) {
        float *out = panel + (i + 2 * pair) * 64 + token;
        vec_store(out, _mm256_castsi256_ps(_mm256_slli_epi32(x[pair], 16)));
        vec_store(out + 64, _mm256_castsi256_ps(_mm256_and_si256(x[pair], high)));
      }
    }
}

#include "attention/cpu/vector_kernels.h"

static size_t prepared_bytes(const struct side_form *keys) {
  (void)keys;
  return 0;
}

static void prepare_queries(const struct side_form *keys, int rows, const float *mapped, uint8_t *prepared) {
  (void)keys, (void)rows, (void)mapped, (void)prepared;
}

INLINE vec load_f16(const uint16_t *p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)p)); }
INLINE __m256i load_codes(const uint8_t *p) { return _mm256_loadu_si256((const __m256i *)(const void *)p); }
INLINE vec crumbs_at(__m256i codes, int shift) {
  return _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srli_epi32(codes, shift), _mm256_set1_epi32(3)));
}

/* panel [C + groups + 1][64] */
static void expand_keys(const struct side_form *f, const uint8_t *side, float *panel) {
  int blocks = f->crumbs / 16, per_group = blocks / f->groups;
  for (int tile = 0; tile < 4; tile++)
    for (int half = 0; half < 16; half += 8) {
      float *out = panel + tile * 16 + half;
      for (int group = 0; group < f->groups; group++) {
        vec s = load_f16(tile_meta(f, side, tile, group, 0) + half);
        vec z = f->meta_values == 2 ? load_f16(tile_meta(f, side, tile, group, 1) + half) : vec_set(1);
        vec_store(out + (f->crumbs + group) * 64, vec_sub(vec_zero(), vec_mul(s, z)));
        for (int block = group * per_group; block < (group + 1) * per_group; block++) {
          __m256i codes = load_codes(side + ((tile * blocks + block) * 16 + half) * 4);
#pragma GCC unroll 16
          for (int c = 0; c < 16; c++)
            vec_store(out + (block * 16 + c) * 64, vec_mul(s, crumbs_at(codes, c % 4 * 8 + c / 4 * 2)));
        }
      }
      vec_store(out + (f->crumbs + f->groups) * 64, vec_set(1));
    }
}

static void score_coded(const struct query_rows *queries, const struct side_form *form, const uint8_t *keys, float *scores,
                        float *panel) {
  expand_keys(form, keys, panel);
  memset(scores, 0, sizeof *scores * (size_t)queries->rows * PAGE_TOKENS);
  multiply_add(queries->rows, PAGE_TOKENS, form->crumbs + form->groups + 1, queries->mapped, form_rows(form), panel, scores,
               PAGE_TOKENS);
}

/* panel [64][form_rows] */
static void expand_values(const struct side_form *f, const uint8_t *side, float *panel) {
  int width = form_rows(f), blocks = f->crumbs / 16, per_group = blocks / f->groups;
  for (int tile = 0; tile < 4; tile++) {
    float *rows = panel + tile * 16 * width;
    for (int t = 0; t < 16; t++) {
      memset(rows + t * width + f->crumbs, 0, sizeof *rows * (size_t)(width - f->crumbs));
      rows[t * width + f->crumbs + f->groups] = 1;
    }
    for (int group = 0; group < f->groups; group++) {
      float s[16], z[16];
      for (int half = 0; half < 16; half += 8) {
        vec_store(s + half, load_f16(tile_meta(f, side, tile, group, 0) + half));
        vec_store(z + half, f->meta_values == 2 ? load_f16(tile_meta(f, side, tile, group, 1) + half) : vec_set(1));
      }
      for (int t = 0; t < 16; t++) rows[t * width + f->crumbs + group] = -s[t] * z[t];
      for (int i = group * per_group * 2; i < (group + 1) * per_group * 2; i++) {
        __m256i codes = load_codes(side + tile * blocks * 64 + i * 32);
#pragma GCC unroll 16
        for (int t = 0; t < 16; t++)
          vec_store(rows + t * width + i * 8, vec_mul(vec_set(s[t]), crumbs_at(codes, t % 4 * 8 + t / 4 * 2)));
      }
    }
  }
}

static void accumulate_coded(int rows, const struct side_form *form, const float *p, const uint8_t *values, float *out,
                             int stride, float *panel) {
  expand_values(form, values, panel);
  multiply_add(rows, form_rows(form), PAGE_TOKENS, p, PAGE_TOKENS, panel, out, stride);
}

const struct attention_kernels attention_kernels_avx2 = {
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
