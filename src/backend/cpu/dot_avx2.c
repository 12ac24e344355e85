/*
 * dot_avx2.c - the kernels of dot.h for AVX2, FMA and F16C.
 *
 * A chunk is two pairs of registers with a and m of its runs and eight registers of 32 weights, unpacked one at a time because
 * there are only sixteen. VPMADDUBSW multiplies unsigned weights with the two bytes of an activation, VPMADDWD with constants
 * 128 and 1 joins the bytes and widens; four lanes then belong to each run of 16. Eight-bit signed weights do not fit that when
 * made unsigned (2 * 255 * 127 overflows 16 bits), so Q8_0 moves the sign to the activation instead.
 */
#include "backend/cpu/dot.h"

#include "base/inline.h"

#include <immintrin.h>

#define LANES        8
#define FLOAT_TOKENS 2
#define READS_ON     false

typedef __m256 vec;
struct scales {
  vec a[2], m[2];
};
typedef void load_scales(const uint8_t *p, struct scales *s);
typedef __m256i load_weights(const uint8_t *p, int j); /* elements 32j .. 32j + 31 of the chunk */
typedef __m256i multiply(__m256i q, __m256i high, __m256i low);
typedef __m256i widen_bytes(__m128i q);
struct format {
  load_scales *scales;
  load_weights *weights;
  multiply *multiply;
  widen_bytes *widen;
  int block_elements;
  size_t block_bytes;
};

/* ---- unpacking ---- */

INLINE __m128i load16(const void *p) { return _mm_loadu_si128((const __m128i *)p); }
INLINE __m256i load32(const void *p) { return _mm256_loadu_si256((const __m256i *)p); }

INLINE __m256i block_words(const uint8_t *p, int stride) {
  __m256i at = _mm256_mullo_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_set1_epi32(stride));
  return _mm256_i32gather_epi32((const int *)(const void *)p, at, 1);
}

/* Eight floats, each for two runs. */
INLINE void twice(__m256 f, __m256 runs[2]) {
  runs[0] = _mm256_permutevar8x32_ps(f, _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3));
  runs[1] = _mm256_permutevar8x32_ps(f, _mm256_setr_epi32(4, 4, 5, 5, 6, 6, 7, 7));
}

/* Eight halves in the low words. */
INLINE __m256 word_floats(__m256i words) {
  __m256i low = _mm256_and_si256(words, _mm256_set1_epi32(0xFFFF));
  __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(low, low), 0x08);
  return _mm256_cvtph_ps(_mm256_castsi256_si128(packed));
}

INLINE void scales_only(const uint8_t *p, int stride, float offset, struct scales *s) {
  __m256 d = word_floats(block_words(p, stride));
  twice(d, s->a);
  twice(_mm256_mul_ps(d, _mm256_set1_ps(offset)), s->m);
}

INLINE void scales_minima(const uint8_t *p, int stride, struct scales *s) {
  __m256i words = block_words(p, stride);
  twice(word_floats(words), s->a);
  twice(word_floats(_mm256_srli_epi32(words, 16)), s->m);
}

INLINE __m256i nibbles(const uint8_t *qs) {
  __m128i v = load16(qs);
  return _mm256_and_si256(_mm256_set_m128i(_mm_srli_epi16(v, 4), v), _mm256_set1_epi8(15));
}

/* 16 in the bytes whose bit of the word is one: each byte looks at its own bit of its own byte of the word. */
INLINE __m256i fifth_bits(const uint8_t *qh) {
  uint32_t word;
  memcpy(&word, qh, sizeof word);
  __m256i byte_of = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
  __m256i bit_of = _mm256_set1_epi64x((long long)0x8040201008040201);
  __m256i bits = _mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32((int)word), byte_of), bit_of);
  return _mm256_and_si256(_mm256_cmpeq_epi8(bits, bit_of), _mm256_set1_epi8(16));
}

INLINE void scales_q4_0(const uint8_t *p, struct scales *s) { scales_only(p, 18, -8, s); }
INLINE void scales_q4_1(const uint8_t *p, struct scales *s) { scales_minima(p, 20, s); }
INLINE void scales_q5_0(const uint8_t *p, struct scales *s) { scales_only(p, 22, -16, s); }
INLINE void scales_q5_1(const uint8_t *p, struct scales *s) { scales_minima(p, 24, s); }
INLINE void scales_q8_0(const uint8_t *p, struct scales *s) { scales_only(p, 34, 0, s); }

INLINE __m256i weights_q4_0(const uint8_t *p, int j) { return nibbles(p + 18 * j + 2); }
INLINE __m256i weights_q4_1(const uint8_t *p, int j) { return nibbles(p + 20 * j + 4); }
INLINE __m256i weights_q5_0(const uint8_t *p, int j) {
  return _mm256_or_si256(nibbles(p + 22 * j + 6), fifth_bits(p + 22 * j + 2));
}
INLINE __m256i weights_q5_1(const uint8_t *p, int j) {
  return _mm256_or_si256(nibbles(p + 24 * j + 8), fifth_bits(p + 24 * j + 4));
}
INLINE __m256i weights_q8_0(const uint8_t *p, int j) { return load32(p + 34 * j + 2); }

/* d, dmin and the packed scales of Q4_K and Q5_K (backend/blocks.h), four numbers at a time in the bytes of 32-bit words. */
INLINE void scales_super(const uint8_t *p, struct scales *s) {
  uint32_t d, w[3];
  memcpy(&d, p, sizeof d);
  memcpy(w, p + 4, sizeof w);
  uint32_t scale0 = w[0] & 0x3F3F3F3Fu, scale1 = (w[2] & 0x0F0F0F0Fu) | (w[0] >> 2 & 0x30303030u);
  uint32_t minimum0 = w[1] & 0x3F3F3F3Fu, minimum1 = (w[2] >> 4 & 0x0F0F0F0Fu) | (w[1] >> 2 & 0x30303030u);
  __m128 both = _mm_cvtph_ps(_mm_cvtsi32_si128((int)d));
  __m256 scale = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_setr_epi32((int)scale0, (int)scale1, 0, 0)));
  __m256 minimum = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_setr_epi32((int)minimum0, (int)minimum1, 0, 0)));
  __m256 dmin = _mm256_broadcastss_ps(_mm_movehdup_ps(both));
  twice(_mm256_mul_ps(_mm256_broadcastss_ps(both), scale), s->a);
  twice(_mm256_mul_ps(_mm256_sub_ps(_mm256_setzero_ps(), dmin), minimum), s->m);
}

INLINE __m256i super_nibbles(const uint8_t *qs, int j) {
  __m256i v = load32(qs + 32 * (j / 2));
  return _mm256_and_si256(j % 2 ? _mm256_srli_epi16(v, 4) : v, _mm256_set1_epi8(15));
}

INLINE __m256i weights_q4_k(const uint8_t *p, int j) { return super_nibbles(p + 16, j); }

INLINE __m256i weights_q5_k(const uint8_t *p, int j) {
  __m256i high = load32(p + 16); /* bit j goes to bit 4 */
  high = j < 4 ? _mm256_slli_epi16(high, 4 - j) : _mm256_srli_epi16(high, j - 4);
  return _mm256_or_si256(super_nibbles(p + 48, j), _mm256_and_si256(high, _mm256_set1_epi8(16)));
}

INLINE void scales_q6_k(const uint8_t *p, struct scales *s) {
  uint16_t d;
  memcpy(&d, p + 208, sizeof d);
  __m256 scale = _mm256_broadcastss_ps(_mm_cvtph_ps(_mm_cvtsi32_si128(d)));
  __m128i runs = load16(p + 192);
  s->a[0] = _mm256_mul_ps(scale, _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(runs)));
  s->a[1] = _mm256_mul_ps(scale, _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(runs, 8))));
  for (int i = 0; i < 2; i++) s->m[i] = _mm256_mul_ps(s->a[i], _mm256_set1_ps(-32));
}

INLINE __m256i weights_q6_k(const uint8_t *p, int j) {
  int half = j / 4, quarter = j % 4;
  __m256i low = load32(p + 64 * half + 32 * (quarter & 1)), high = load32(p + 128 + 32 * half);
  if (quarter >= 2) low = _mm256_srli_epi16(low, 4);
  high = quarter < 2 ? _mm256_slli_epi16(high, 4 - 2 * quarter) : _mm256_srli_epi16(high, 2 * quarter - 4);
  return _mm256_or_si256(_mm256_and_si256(low, _mm256_set1_epi8(15)), _mm256_and_si256(high, _mm256_set1_epi8(0x30)));
}

/* ---- products ---- */

INLINE __m256i join_bytes(__m256i high, __m256i low) {
  return _mm256_add_epi32(_mm256_madd_epi16(high, _mm256_set1_epi16(128)), _mm256_madd_epi16(low, _mm256_set1_epi16(1)));
}

INLINE __m256i multiply_unsigned(__m256i q, __m256i high, __m256i low) {
  return join_bytes(_mm256_maddubs_epi16(q, high), _mm256_maddubs_epi16(q, low));
}

/* |q| reaches 128, as an unsigned byte; activations stay within +-127, so that changing their sign is exact. */
INLINE __m256i multiply_signed(__m256i q, __m256i high, __m256i low) {
  __m256i magnitude = _mm256_abs_epi8(q);
  return join_bytes(_mm256_maddubs_epi16(magnitude, _mm256_sign_epi8(high, q)),
                    _mm256_maddubs_epi16(magnitude, _mm256_sign_epi8(low, q)));
}

INLINE __m256i widen_unsigned(__m128i q) { return _mm256_cvtepu8_epi32(q); }
INLINE __m256i widen_signed(__m128i q) { return _mm256_cvtepi8_epi32(q); }

#define FORMAT(name, sign, elements, bytes)                                                                                      \
  static const struct format name = {scales_##name, weights_##name, multiply_##sign, widen_##sign, elements, bytes}
#define scales_q4_k scales_super
#define scales_q5_k scales_super
FORMAT(q4_0, unsigned, 32, 18);
FORMAT(q4_1, unsigned, 32, 20);
FORMAT(q5_0, unsigned, 32, 22);
FORMAT(q5_1, unsigned, 32, 24);
FORMAT(q8_0, signed, 32, 34);
FORMAT(q4_k, unsigned, 256, 144);
FORMAT(q5_k, unsigned, 256, 176);
FORMAT(q6_k, unsigned, 256, 210);

INLINE vec vec_zero(void) { return _mm256_setzero_ps(); }
INLINE vec vec_add(vec a, vec b) { return _mm256_add_ps(a, b); }
INLINE vec vec_fma(vec a, vec b, vec c) { return _mm256_fmadd_ps(a, b, c); }
INLINE void vec_store(float *out, vec v) { _mm256_storeu_ps(out, v); }
INLINE float vec_sum(vec v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

/* All groups, those that are not there being zeros. */
INLINE void accumulate(struct format f, const uint8_t *p, int groups, const struct act_chunk *x, int64_t x_stride, const int n,
                       vec sums[][2]) {
  (void)groups;
  struct scales s;
  __m256 scale[4][2];
  f.scales(p, &s);
  for (int t = 0; t < n; t++)
    for (int i = 0; i < 2; i++) {
      const struct act_chunk *xt = x + t * x_stride;
      scale[t][i] = _mm256_mul_ps(s.a[i], _mm256_load_ps(xt->scale + 8 * i));
      sums[t][i] = _mm256_fmadd_ps(s.m[i], _mm256_load_ps(xt->sum + 8 * i), sums[t][i]);
    }
#pragma GCC unroll 8
  for (int j = 0; j < ALL_GROUPS; j++) {
    __m256i q = f.weights(p, j);
    __m256i spread = _mm256_add_epi32(_mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1), _mm256_set1_epi32(2 * (j & 3)));
    for (int t = 0; t < n; t++) {
      const struct act_chunk *xt = x + t * x_stride;
      __m256 dot = _mm256_cvtepi32_ps(f.multiply(q, load32(xt->high + 32 * j), load32(xt->low + 32 * j)));
      sums[t][j & 1] = _mm256_fmadd_ps(dot, _mm256_permutevar8x32_ps(scale[t][j / 4], spread), sums[t][j & 1]);
    }
  }
}

/* ---- expansion ---- */

/* 32 weights of a format with unsigned ones; a q + m is one rounding of the exact value, as in weight_dequantize. */
INLINE void expand_group(__m256i q, const float *a, const float *m, widen_bytes *widen, float *out) {
  __m128i halves[2] = {_mm256_castsi256_si128(q), _mm256_extracti128_si256(q, 1)};
  for (int i = 0; i < 2; i++) {
    __m256 ai = _mm256_broadcast_ss(a + i), mi = _mm256_broadcast_ss(m + i);
    __m256 low = _mm256_cvtepi32_ps(widen(halves[i])), high = _mm256_cvtepi32_ps(widen(_mm_srli_si128(halves[i], 8)));
    _mm256_storeu_ps(out + 16 * i, _mm256_fmadd_ps(low, ai, mi));
    _mm256_storeu_ps(out + 16 * i + 8, _mm256_fmadd_ps(high, ai, mi));
  }
}

INLINE void expand_chunk(struct format f, const uint8_t *p, int groups, float *out) {
  struct scales s;
  float a[CHUNK_RUNS], m[CHUNK_RUNS];
  f.scales(p, &s);
  for (int i = 0; i < 2; i++) {
    _mm256_storeu_ps(a + 8 * i, s.a[i]);
    _mm256_storeu_ps(m + 8 * i, s.m[i]);
  }
  for (int j = 0; j < groups; j++) expand_group(f.weights(p, j), a + 2 * j, m + 2 * j, f.widen, out + 32 * j);
}

/* ---- float weights ---- */

INLINE vec load_f32(const void *p) { return _mm256_loadu_ps(p); }
INLINE vec load_f16(const void *p) { return _mm256_cvtph_ps(load16(p)); }
INLINE vec load_bf16(const void *p) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load16(p)), 16)); }

#include "backend/cpu/dot_kernels.h"

static void quantize(const float *x, int count, struct act_chunk *chunk) { quantize_chunk_inline(x, count, chunk); }

const struct dot_kernels dot_avx2 = {
    .name = "AVX2",
    .many_tokens = 24,
    .quantize = quantize,
    .rows = ALL_TYPES(rows),
    .f32 = ALL_TYPES(f32),
};
