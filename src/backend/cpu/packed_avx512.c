/*
 * packed_avx512.c - packed weights (packed.h) with AVX-512 and VNNI: a vector is a group.
 *
 * VPDPBUSD adds up codes times the high and the low bytes of the activations (dot.h). A product takes up to four tokens at a
 * time.
 */
#include "backend/cpu/packed.h"

#include "base/inline.h"
#include "base/transpose16.h"

#include <immintrin.h>

#define LANES     16
#define SUM_VECS  2
#define MOST_SUMS 32
typedef __m512 vec;
typedef __m512i ivec;

INLINE vec vec_zero(void) { return _mm512_setzero_ps(); }
INLINE vec vec_set(float x) { return _mm512_set1_ps(x); }
INLINE vec vec_mul(vec a, vec b) { return _mm512_mul_ps(a, b); }
INLINE vec vec_fma(vec a, vec b, vec c) { return _mm512_fmadd_ps(a, b, c); }
INLINE vec vec_fnma(vec a, vec b, vec c) { return _mm512_fnmadd_ps(a, b, c); }
INLINE vec load_halves(const uint8_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(const void *)p)); }
INLINE vec load_bytes(const uint8_t *p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(const void *)p)));
}
INLINE vec load_signed_bytes(const uint8_t *p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(const void *)p)));
}
INLINE void store_rows(float *p, int rows, vec x) { _mm512_mask_storeu_ps(p, (__mmask16)((1u << rows) - 1), x); }

INLINE ivec ivec_load(const uint8_t *p) { return _mm512_loadu_si512(p); }
INLINE void ivec_store(void *p, ivec x) { _mm512_storeu_si512(p, x); }
INLINE ivec bits_of(vec x) { return _mm512_castps_si512(x); }
INLINE ivec shift_left(ivec x, int n) { return _mm512_slli_epi16(x, (uint8_t)n); }
INLINE ivec shift_right(ivec x, int n) { return _mm512_srli_epi16(x, (uint8_t)n); }
INLINE ivec low_halves(ivec x) { return _mm512_and_si512(x, _mm512_set1_epi8(15)); }
INLINE ivec high_halves(ivec x) { return low_halves(shift_right(x, 4)); }
/* Sets bit 4 where the word has a one. */
INLINE ivec add_fifth(ivec q, const uint8_t *word) {
  uint64_t mask;
  memcpy(&mask, word, sizeof mask);
  return _mm512_mask_add_epi8(q, mask, q, _mm512_set1_epi8(16));
}
/* Bits 4 and 5. */
INLINE ivec add_upper(ivec q, ivec upper) {
  return _mm512_ternarylogic_epi64(q, upper, _mm512_set1_epi8(0x30), 0xF8); /* q | (upper & 0x30) */
}
/* Byte j of every dword. */
INLINE vec byte_of_dwords(ivec q, int j) {
  return _mm512_cvtepi32_ps(_mm512_and_si512(_mm512_srli_epi32(q, (unsigned)(8 * j)), _mm512_set1_epi32(255)));
}

struct active {
  const int8_t *high, *low;
};

INLINE void load_active(const struct act_chunk *x, int column, int columns, struct active *a) {
  (void)columns;
  *a = (struct active){x->high + column, x->low + column};
}

struct sums {
  ivec high, low;
};

INLINE void clear(struct sums *s) { s->high = s->low = _mm512_setzero_si512(); }

INLINE ivec four_bytes(const int8_t *p) {
  int32_t x;
  memcpy(&x, p, sizeof x);
  return _mm512_set1_epi32(x);
}

INLINE void add_quad(ivec q, const struct active *a, int at, struct sums *s) {
  s->high = _mm512_dpbusd_epi32(s->high, q, four_bytes(a->high + at));
  s->low = _mm512_dpbusd_epi32(s->low, q, four_bytes(a->low + at));
}

INLINE vec total(const struct sums *s) { return _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(s->high, 7), s->low)); }

#include "backend/cpu/packed_kernels.h"

/* ---- panels ---- */

/* Made only on CPUs that have AVX512-BF16 too. */
#define BF16_CPU __attribute__((target("avx512bf16")))

/* Pairs of columns, rounded to nearest even, into their places in the blocks of a panel. */
BF16_CPU INLINE void store_pairs(void *out, int64_t cols, int64_t column, int row, int rows, const vec columns[LANES]) {
  (void)cols, (void)row, (void)rows;
  uint16_t *to = (uint16_t *)out + column / PANEL_COLS * PANEL_BLOCK + column % PANEL_COLS * PANEL_ROWS;
  _Alignas(64) static const uint16_t beside[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                   8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  for (int i = 0; i < LANES; i += 2, to += 2 * PANEL_ROWS) {
    __m512bh rounded = _mm512_cvtne2ps_pbh(columns[i + 1], columns[i]);
    __m512i bits;
    memcpy(&bits, &rounded, sizeof bits);
    _mm512_storeu_si512(to, _mm512_permutexvar_epi16(_mm512_load_si512(beside), bits));
  }
}

BF16_CPU INLINE void expand_stripe_of(struct format f, const struct weight *w, int64_t first, int count, uint16_t *out) {
  if (count > 0) {
    expand_group(f, w, first / GROUP_ROWS, count, store_pairs, out);
    return;
  }
  for (int64_t k = 0; k < w->cols; k += 2)
    memset(out + k / PANEL_COLS * PANEL_BLOCK + k % PANEL_COLS * PANEL_ROWS, 0, 2 * STRIPE_ROWS * sizeof *out);
}

#define STRIPE_KERNEL(name)                                                                                                      \
  BF16_CPU static void stripe_##name(const struct weight *w, int64_t first, int count, uint16_t *out) {                          \
    expand_stripe_of(name, w, first, count, out);                                                                                \
  }
STRIPE_KERNEL(Q4_0)
STRIPE_KERNEL(Q4_1)
STRIPE_KERNEL(Q5_0)
STRIPE_KERNEL(Q5_1)
STRIPE_KERNEL(Q8_0)
STRIPE_KERNEL(Q4_K)
STRIPE_KERNEL(Q5_K)
STRIPE_KERNEL(Q6_K)

const struct packed_kernels packed_avx512 = {
    .name = "AVX-512 VNNI", .rows = ALL_TYPES(rows), .f32 = ALL_TYPES(f32), .stripe = ALL_TYPES(stripe)};
