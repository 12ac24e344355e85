/*
 * avx512_bf16.c - attention of many rows with AVX512-BF16: vectors of 16 pairs of BF16 products.
 *
 * Where such a product takes as long as one of floats (AMD), sums over values take half the time in BF16, but scores, which need
 * both halves of a query, do not: those of codes are faster in bytes. The table for such CPUs takes each from where it is faster.
 * The other table is what AMX does, product by product, and there to test that.
 */
#include "attention/cpu/avx512_vectors.h"

#include "attention/cpu/coded_kernels.h"

#include "attention/cpu/matrix_kernels.h"

#define PRODUCT_ROWS 8

/* Rows in blocks of PRODUCT_ROWS, whose sums stay in registers while both operands go by. */
INLINE void product(int row_blocks, int col_blocks, int chunks, const struct term *terms, int n, int a_stride, int b_stride,
                    float *c, int c_stride, bool add) {
  for (int r = 0; r < 16 * row_blocks; r += PRODUCT_ROWS, c += PRODUCT_ROWS * c_stride) {
    __m512 sum[PRODUCT_ROWS][2];
#pragma GCC unroll 8
    for (int i = 0; i < PRODUCT_ROWS; i++)
#pragma GCC unroll 2
      for (int j = 0; j < col_blocks; j++) sum[i][j] = add ? _mm512_loadu_ps(c + i * c_stride + 16 * j) : _mm512_setzero_ps();
    for (int chunk = 0; chunk < chunks; chunk++)
      for (int t = 0; t < n; t++) {
        const uint16_t *a = terms[t].a + r * a_stride + chunk * 32, *b = terms[t].b + chunk * b_stride;
        for (int k = 0; k < 16; k++) {
          __m512bh y[2];
#pragma GCC unroll 2
          for (int j = 0; j < col_blocks; j++) y[j] = (__m512bh)_mm512_load_si512(b + j * TILE + 32 * k);
#pragma GCC unroll 8
          for (int i = 0; i < PRODUCT_ROWS; i++) {
            int pair;
            memcpy(&pair, a + i * a_stride + 2 * k, sizeof pair);
            __m512bh x = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 2
            for (int j = 0; j < col_blocks; j++) sum[i][j] = _mm512_dpbf16_ps(sum[i][j], x, y[j]);
          }
        }
      }
#pragma GCC unroll 8
    for (int i = 0; i < PRODUCT_ROWS; i++)
#pragma GCC unroll 2
      for (int j = 0; j < col_blocks; j++) _mm512_storeu_ps(c + i * c_stride + 16 * j, sum[i][j]);
  }
}

const struct page_kernels page_kernels_avx512_bf16 = {
    .name = "AVX512-BF16",
    .row_block = 16,
    .panel_bytes = matrix_panel_bytes,
    .prepared_bytes = prepared_bytes,
    .prepare_queries = prepare_queries,
    .score_exact = score_exact,
    .score_coded = score_coded,
    .score_waves = score_waves,
    .accumulate_exact = matrix_accumulate_exact,
    .accumulate_coded = matrix_accumulate_coded,
};

const struct page_kernels page_kernels_vector_tiles = MATRIX_KERNELS("tiles in AVX512-BF16", NULL, NULL);
