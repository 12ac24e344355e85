/*
 * packed_avx2.c - packed weights (packed.h) with AVX2, FMA and F16C: a group is two vectors.
 *
 * Byte products would have to be kept from saturating 16 bits, in another way for every number of bits. Here codes are widened to
 * words instead, those of even columns and those of odd ones, and VPMADDWD multiplies them with activations that are words too,
 * 128 high + low (dot.h): the same number of multiplications, since one does what the high and the low bytes need two for, and
 * half the sums to keep. 2 * 255 * 16256 is far from what 32 bits hold.
 */
#include "backend/cpu/packed_avx2_vectors.h"

#define SUM_VECS 1

/* Words of even and of odd columns, in twos: those of columns 4 i and 4 i + 2 of block b are at 2 i of words[b][0]. */
struct active {
  _Alignas(32) int16_t words[CHUNK / SCALED][2][SCALED / 2];
};

/* 128 high + low of the upper bytes of words. */
INLINE ivec join_upper(ivec high, ivec low) {
  return _mm256_add_epi16(_mm256_slli_epi16(_mm256_srai_epi16(high, 8), 7), _mm256_srai_epi16(low, 8));
}

INLINE void load_active(const struct act_chunk *x, int column, int columns, struct active *a) {
  for (int k = 0; k < columns; k += SCALED) {
    ivec high = ivec_load((const uint8_t *)x->high + column + k), low = ivec_load((const uint8_t *)x->low + column + k);
    ivec_store(a->words[k / SCALED][0], join_upper(shift_left(high, 8), shift_left(low, 8)));
    ivec_store(a->words[k / SCALED][1], join_upper(high, low));
  }
  __asm__("" : "+m"(*a)); /* a dword is loaded into all lanes at once: compilers would take it out of the registers stored */
}

struct sums {
  ivec all;
};

INLINE void clear(struct sums *s) { s->all = _mm256_setzero_si256(); }

INLINE void add_quad(ivec q, const struct active *a, int at, struct sums *s) {
  const int16_t(*words)[SCALED / 2] = a->words[at / SCALED];
  const int i = at % SCALED / 2;
  ivec even = _mm256_and_si256(q, _mm256_set1_epi16(255)), odd = shift_right(q, 8);
  ivec products =
      _mm256_add_epi32(_mm256_madd_epi16(even, ivec_dword(words[0] + i)), _mm256_madd_epi16(odd, ivec_dword(words[1] + i)));
  s->all = _mm256_add_epi32(s->all, products);
  __asm__("" : "+x"(s->all)); /* added in this order: GCC would keep dozens of products, on the stack, for a shallower tree */
}

INLINE vec total(const struct sums *s) { return _mm256_cvtepi32_ps(s->all); }

#include "backend/cpu/packed_kernels.h"

const struct packed_kernels packed_avx2 = {.name = "AVX2", .rows = ALL_TYPES(rows), .f32 = ALL_TYPES(f32)};
