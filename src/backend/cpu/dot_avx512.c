/*
 * dot_avx512.c - the kernels of dot.h for AVX-512 with VNNI.
 *
 * A chunk is four registers of 64 unsigned weights in their natural order and two of 16 floats, a and m of its runs. VPDPBUSD
 * leaves four lanes for each run of 16 elements; they stay apart until the end of the row, so that a product costs no shuffles
 * but one, which spreads four of the run scales over a register.
 *
 * Loads of small blocks take whole chunks: the last chunk of a row may read on into the next row (its values meet zero
 * activations and masked scales), and only at the end of the tensor it is copied first.
 */
#include "backend/cpu/dot.h"

#include "base/inline.h"
#include "base/transpose16.h"

#include <immintrin.h>

#define LANES        16
#define FLOAT_TOKENS 4
#define READS_ON     true

typedef __m512 vec;
struct chunk {
  __m512i q[4];
  vec a, m;
};
typedef void load_chunk(const uint8_t *p, struct chunk *c);
/* A format: its loader and its blocks. */
struct format {
  load_chunk *load;
  int block_elements;
  size_t block_bytes;
};

/* ---- unpacking ---- */

INLINE __m128i load16(const void *p) { return _mm_loadu_si128((const __m128i *)p); }
INLINE __m256i load32(const void *p) { return _mm256_loadu_si256((const __m256i *)p); }

/* The first words of eight blocks `stride` bytes apart: two halves each. */
INLINE __m256i block_words(const uint8_t *p, int stride) {
  __m256i at = _mm256_mullo_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_set1_epi32(stride));
  return _mm256_i32gather_epi32((const int *)(const void *)p, at, 1);
}

/* Eight halves in the low words -> floats, each for two runs. */
INLINE __m512 run_floats(__m256i words) {
  __m256 f = _mm256_cvtph_ps(_mm256_cvtepi32_epi16(words));
  __m512i twice = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
  return _mm512_permutexvar_ps(twice, _mm512_castps256_ps512(f));
}

/* a = d, m = offset d: formats without a minimum */
INLINE void load_scales(const uint8_t *p, int stride, float offset, struct chunk *c) {
  c->a = run_floats(block_words(p, stride));
  c->m = _mm512_mul_ps(c->a, _mm512_set1_ps(offset));
}

/* a = d, m = the half after it */
INLINE void load_scales_minima(const uint8_t *p, int stride, struct chunk *c) {
  __m256i words = block_words(p, stride);
  c->a = run_floats(words);
  c->m = run_floats(_mm256_srli_epi32(words, 16));
}

/* Nibbles of two small blocks. */
INLINE __m512i load_nibbles(const uint8_t *qs0, const uint8_t *qs1) {
  __m512i v = _mm512_broadcast_i32x4(load16(qs0));
  v = _mm512_mask_broadcast_i32x4(v, 0xFF00, load16(qs1));
  v = _mm512_srlv_epi64(v, _mm512_setr_epi64(0, 0, 4, 4, 0, 0, 4, 4));
  return _mm512_and_si512(v, _mm512_set1_epi8(15));
}

/* Sets bit 4 where the words of two blocks have a one. */
INLINE __m512i add_fifth_bits(__m512i q, const uint8_t *qh0, const uint8_t *qh1) {
  uint32_t low, high;
  memcpy(&low, qh0, sizeof low);
  memcpy(&high, qh1, sizeof high);
  return _mm512_mask_add_epi8(q, (__mmask64)((uint64_t)high << 32 | low), q, _mm512_set1_epi8(16));
}

INLINE void load_q4_0(const uint8_t *p, struct chunk *c) {
  load_scales(p, 18, -8, c);
  for (int j = 0; j < 4; j++) c->q[j] = load_nibbles(p + 36 * j + 2, p + 36 * j + 20);
}

INLINE void load_q4_1(const uint8_t *p, struct chunk *c) {
  load_scales_minima(p, 20, c);
  for (int j = 0; j < 4; j++) c->q[j] = load_nibbles(p + 40 * j + 4, p + 40 * j + 24);
}

INLINE void load_q5_0(const uint8_t *p, struct chunk *c) {
  load_scales(p, 22, -16, c);
  for (int j = 0; j < 4; j++)
    c->q[j] = add_fifth_bits(load_nibbles(p + 44 * j + 6, p + 44 * j + 28), p + 44 * j + 2, p + 44 * j + 24);
}

INLINE void load_q5_1(const uint8_t *p, struct chunk *c) {
  load_scales_minima(p, 24, c);
  for (int j = 0; j < 4; j++)
    c->q[j] = add_fifth_bits(load_nibbles(p + 48 * j + 8, p + 48 * j + 32), p + 48 * j + 4, p + 48 * j + 28);
}

INLINE void load_q8_0(const uint8_t *p, struct chunk *c) {
  load_scales(p, 34, -128, c);
  for (int j = 0; j < 4; j++) {
    __m512i v = _mm512_castsi256_si512(load32(p + 68 * j + 2));
    v = _mm512_inserti64x4(v, load32(p + 68 * j + 36), 1);
    c->q[j] = _mm512_xor_si512(v, _mm512_set1_epi8((char)0x80)); /* + 128 */
  }
}

/* d, dmin and the packed scales of Q4_K and Q5_K (backend/blocks.h), four numbers at a time in the bytes of 32-bit words. */
INLINE void load_super_scales(const uint8_t *p, struct chunk *c) {
  uint32_t d, s[3];
  memcpy(&d, p, sizeof d);
  memcpy(s, p + 4, sizeof s);
  uint32_t scale0 = s[0] & 0x3F3F3F3Fu, scale1 = (s[2] & 0x0F0F0F0Fu) | (s[0] >> 2 & 0x30303030u);
  uint32_t minimum0 = s[1] & 0x3F3F3F3Fu, minimum1 = (s[2] >> 4 & 0x0F0F0F0Fu) | (s[1] >> 2 & 0x30303030u);
  __m128i bytes = _mm_setr_epi32((int)scale0, (int)scale1, (int)minimum0, (int)minimum1);
  __m512 numbers = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes)); /* 8 scales, 8 minima */
  __m512 both = _mm512_castps128_ps512(_mm_cvtph_ps(_mm_cvtsi32_si128((int)d)));
  __m512 factors = _mm512_permutexvar_ps(_mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1), both);
  factors = _mm512_mask_sub_ps(factors, 0xFF00, _mm512_setzero_ps(), factors);
  numbers = _mm512_mul_ps(numbers, factors);
  c->a = _mm512_permutexvar_ps(_mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7), numbers);
  c->m = _mm512_permutexvar_ps(_mm512_setr_epi32(8, 8, 9, 9, 10, 10, 11, 11, 12, 12, 13, 13, 14, 14, 15, 15), numbers);
}

/* 32 bytes -> 64 elements, the low halves first */
INLINE __m512i load_super_nibbles(const uint8_t *qs) {
  __m512i v = _mm512_srlv_epi64(_mm512_broadcast_i64x4(load32(qs)), _mm512_setr_epi64(0, 0, 0, 0, 4, 4, 4, 4));
  return _mm512_and_si512(v, _mm512_set1_epi8(15));
}

INLINE void load_q4_k(const uint8_t *p, struct chunk *c) {
  load_super_scales(p, c);
  for (int j = 0; j < 4; j++) c->q[j] = load_super_nibbles(p + 16 + 32 * j);
}

/* (bits & mask) | q */
INLINE __m512i merge_bits(__m512i q, __m512i bits, char mask) {
  return _mm512_ternarylogic_epi64(q, bits, _mm512_set1_epi8(mask), 0xF8);
}

INLINE void load_q5_k(const uint8_t *p, struct chunk *c) {
  load_super_scales(p, c);
  __m512i high = _mm512_broadcast_i64x4(load32(p + 16));
  for (int j = 0; j < 4; j++) {
    /* bits 2j and 2j + 1 go to bit 4; a rotation to the left by a negative number is one to the right */
    long long first = (4 - 2 * j) & 63, second = (3 - 2 * j) & 63;
    __m512i turn = _mm512_setr_epi64(first, first, first, first, second, second, second, second);
    c->q[j] = merge_bits(load_super_nibbles(p + 48 + 32 * j), _mm512_rolv_epi64(high, turn), 0x10);
  }
}

INLINE void load_q6_k(const uint8_t *p, struct chunk *c) {
  __m512i mask = _mm512_set1_epi8(15);
  __m512i first = _mm512_setr_epi64(4, 4, 4, 4, 2, 2, 2, 2), second = _mm512_setr_epi64(0, 0, 0, 0, 62, 62, 62, 62);
  for (int h = 0; h < 2; h++) {
    __m512i low = _mm512_loadu_si512(p + 64 * h), high = _mm512_broadcast_i64x4(load32(p + 128 + 32 * h));
    c->q[2 * h] = merge_bits(_mm512_and_si512(low, mask), _mm512_rolv_epi64(high, first), 0x30);
    c->q[2 * h + 1] = merge_bits(_mm512_and_si512(_mm512_srli_epi64(low, 4), mask), _mm512_rolv_epi64(high, second), 0x30);
  }
  uint16_t d;
  memcpy(&d, p + 208, sizeof d);
  __m512 scale = _mm512_broadcastss_ps(_mm_cvtph_ps(_mm_cvtsi32_si128(d)));
  c->a = _mm512_mul_ps(scale, _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load16(p + 192))));
  c->m = _mm512_mul_ps(c->a, _mm512_set1_ps(-32));
}

#define FORMAT(name, elements, bytes) static const struct format name = {load_##name, elements, bytes}
FORMAT(q4_0, 32, 18);
FORMAT(q4_1, 32, 20);
FORMAT(q5_0, 32, 22);
FORMAT(q5_1, 32, 24);
FORMAT(q8_0, 32, 34);
FORMAT(q4_k, 256, 144);
FORMAT(q5_k, 256, 176);
FORMAT(q6_k, 256, 210);

/* The runs of groups that are not there have no scales. */
INLINE void load_groups(struct format f, const uint8_t *p, int groups, struct chunk *c) {
  f.load(p, c);
  if (groups == ALL_GROUPS) return;
  __mmask16 mask = (__mmask16)((1u << 2 * groups) - 1);
  c->a = _mm512_maskz_mov_ps(mask, c->a);
  c->m = _mm512_maskz_mov_ps(mask, c->m);
}

/* ---- products ---- */

INLINE __m512i spread(int quarter) {
  return _mm512_add_epi32(_mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3), _mm512_set1_epi32(4 * quarter));
}

INLINE vec vec_zero(void) { return _mm512_setzero_ps(); }
INLINE vec vec_add(vec a, vec b) { return _mm512_add_ps(a, b); }
INLINE vec vec_fma(vec a, vec b, vec c) { return _mm512_fmadd_ps(a, b, c); }
INLINE void vec_store(float *out, vec v) { _mm512_storeu_ps(out, v); }
INLINE float vec_sum(vec v) { return _mm512_reduce_add_ps(v); }

/* Two sums a token keep the chain of additions short; which one a product enters depends on its place only. */
INLINE void accumulate_token(const struct chunk *c, int quarters, const struct act_chunk *x, vec sums[2]) {
  vec scale = _mm512_mul_ps(c->a, _mm512_load_ps(x->scale));
  for (int j = 0; j < quarters; j++) {
    __m512i dot = _mm512_dpbusd_epi32(_mm512_setzero_si512(), c->q[j], _mm512_load_si512(x->high + 64 * j));
    dot = _mm512_dpbusd_epi32(_mm512_slli_epi32(dot, 7), c->q[j], _mm512_load_si512(x->low + 64 * j));
    sums[j & 1] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), _mm512_permutexvar_ps(spread(j), scale), sums[j & 1]);
  }
  sums[1] = _mm512_fmadd_ps(c->m, _mm512_load_ps(x->sum), sums[1]);
}

INLINE void accumulate(struct format f, const uint8_t *p, int groups, const struct act_chunk *x, int64_t x_stride, const int n,
                       vec sums[][2]) {
  struct chunk c;
  load_groups(f, p, groups, &c);
  for (int t = 0; t < n; t++) accumulate_token(&c, (groups + 1) / 2, x + t * x_stride, sums[t]);
}

/* ---- expansion ---- */

/* Functions for panels of BF16, which are made only on CPUs that have AVX512-BF16 too. */
#define BF16_CPU __attribute__((target("avx512bf16")))

/* Round to nearest even; subnormal numbers become zero. */
BF16_CPU INLINE __m256i to_bf16(__m512 x) {
  __m256bh rounded = _mm512_cvtneps_pbh(x);
  __m256i bits;
  memcpy(&bits, &rounded, sizeof bits);
  return bits;
}

INLINE void store_f32(void *out, int64_t at, __m512 x) { _mm512_storeu_ps((float *)out + at, x); }
BF16_CPU INLINE void store_bf16(void *out, int64_t at, __m512 x) {
  _mm256_storeu_si256((__m256i *)(void *)((uint16_t *)out + at), to_bf16(x));
}
typedef void store_run(void *out, int64_t at, __m512 x);

/* a q + m is one rounding of the exact value: weight_dequantize gives the same bits. */
INLINE void expand_groups(const struct chunk *c, int groups, store_run *store, void *out) {
  for (int r = 0; r < SMALL_BLOCK / RUN * groups; r++) {
    __m512i lane = _mm512_set1_epi32(r);
    const uint8_t *bytes = (const uint8_t *)c->q;
    __m512 q = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(load16(bytes + RUN * r)));
    store(out, RUN * r, _mm512_fmadd_ps(q, _mm512_permutexvar_ps(lane, c->a), _mm512_permutexvar_ps(lane, c->m)));
  }
}

INLINE void expand_chunk(struct format f, const uint8_t *p, int groups, float *out) {
  struct chunk c;
  load_groups(f, p, groups, &c);
  expand_groups(&c, groups, store_f32, out);
}

/* ---- float weights ---- */

INLINE vec load_f32(const void *p) { return _mm512_loadu_ps(p); }
INLINE vec load_f16(const void *p) { return _mm512_cvtph_ps(load32(p)); }
INLINE vec load_bf16(const void *p) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load32(p)), 16)); }

#include "backend/cpu/dot_kernels.h"

/* ---- panels of BF16 ---- */

/* 16 rows of up to CHUNK columns into their places in the blocks of a panel. */
INLINE void store_tile(uint16_t tile[STRIPE_ROWS][CHUNK], int blocks, uint16_t *out) {
  for (int b = 0; b < blocks; b++, out += PANEL_BLOCK) {
    __m512i v[STRIPE_ROWS];
    for (int i = 0; i < STRIPE_ROWS; i++) v[i] = _mm512_load_si512(tile[i] + PANEL_COLS * b);
    transpose(v);
    for (int i = 0; i < PANEL_COLS / 2; i++) _mm512_storeu_si512(out + 2 * PANEL_ROWS * i, v[i]);
  }
}

BF16_CPU INLINE void expand_stripe_of(struct format f, const struct weight *w, int64_t first, int count, uint16_t *out) {
  size_t row_bytes = (size_t)(w->cols / f.block_elements) * f.block_bytes;
  size_t chunk_bytes = (size_t)(CHUNK / f.block_elements) * f.block_bytes;
  const uint8_t *data = w->data, *end = data + (size_t)w->rows * row_bytes;
  _Alignas(64) uint16_t tile[STRIPE_ROWS][CHUNK];
  struct chunk c;
  if (count < STRIPE_ROWS) memset(tile, 0, sizeof tile);
  for (int64_t k = 0; k * CHUNK < w->cols; k++, out += CHUNK / PANEL_COLS * PANEL_BLOCK) {
    int here = w->cols - k * CHUNK < CHUNK ? (int)(w->cols - k * CHUNK) : CHUNK;
    for (int i = 0; i < count; i++) {
      const uint8_t *p = data + (size_t)(first + i) * row_bytes + (size_t)k * chunk_bytes;
      if (f.block_elements == CHUNK || here == CHUNK) {
        load_groups(f, p, ALL_GROUPS, &c);
        expand_groups(&c, ALL_GROUPS, store_bf16, tile[i]);
      } else {
        uint8_t copy[PART_BYTES];
        load_groups(f, part_of_chunk(f, p, here / SMALL_BLOCK, end, copy), here / SMALL_BLOCK, &c);
        expand_groups(&c, here / SMALL_BLOCK, store_bf16, tile[i]);
      }
    }
    store_tile(tile, here / PANEL_COLS, out);
  }
}

BF16_CPU INLINE void expand_float_stripe(load_floats *load, size_t element_bytes, const struct weight *w, int64_t first,
                                         int count, uint16_t *out) {
  size_t row_bytes = weight_row_bytes(w);
  _Alignas(64) uint16_t tile[STRIPE_ROWS][CHUNK];
  memset(tile, 0, sizeof tile);
  for (int64_t k = 0; k < w->cols; k += CHUNK, out += CHUNK / PANEL_COLS * PANEL_BLOCK) {
    int here = w->cols - k < CHUNK ? (int)(w->cols - k) : CHUNK;
    int blocks = (here + PANEL_COLS - 1) / PANEL_COLS;
    for (int i = 0; i < count; i++)
      for (int j = 0; j < blocks * PANEL_COLS; j += LANES) {
        const uint8_t *p = (const uint8_t *)w->data + (size_t)(first + i) * row_bytes + (size_t)(k + j) * element_bytes;
        store_bf16(tile[i], j, load_some(load, element_bytes, p, here - j));
      }
    store_tile(tile, blocks, out);
  }
}

#define QUANTIZED_STRIPES(name)                                                                                                  \
  BF16_CPU static void stripe_##name(const struct weight *w, int64_t first, int count, uint16_t *out) {                          \
    expand_stripe_of(name, w, first, count, out);                                                                                \
  }
#define FLOAT_STRIPES(name, element_bytes)                                                                                       \
  BF16_CPU static void stripe_##name(const struct weight *w, int64_t first, int count, uint16_t *out) {                          \
    expand_float_stripe(load_##name, element_bytes, w, first, count, out);                                                       \
  }
EACH_QUANTIZED(QUANTIZED_STRIPES)
EACH_FLOAT(FLOAT_STRIPES)

INLINE __mmask16 part_mask(size_t left) { return left >= LANES ? 0xFFFF : (__mmask16)((1u << left) - 1); }

static void quantize(const float *x, int count, struct act_chunk *chunk) { quantize_chunk_inline(x, count, chunk); }

BF16_CPU static void round_bf16(const float *x, size_t count, uint16_t *out) {
  for (size_t k = 0; k < count; k += 16) {
    __mmask16 mask = part_mask(count - k);
    _mm256_mask_storeu_epi16(out + k, mask, to_bf16(_mm512_maskz_loadu_ps(mask, x + k)));
  }
}

const struct dot_kernels dot_avx512 = {
    .name = "AVX-512 VNNI",
    .many_tokens = 32,
    .quantize = quantize,
    .rows = ALL_TYPES(rows),
    .f32 = ALL_TYPES(f32),
    .stripe = ALL_TYPES(stripe),
    .round_bf16 = round_bf16,
};
