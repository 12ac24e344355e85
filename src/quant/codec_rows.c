/*
 * codec_rows.c - encoding and decoding as callers see them: a choice of kernels, checks and errors around rows_body.h.
 */
#include "quant/codec.h"

#include <math.h>

#define BLOCK_ROWS 16 /* rows projected together: 64 KiB of stack at the largest head_dim */

const struct row_kernels *row_kernels_for(const struct cpu_features *cpu) {
#ifdef __x86_64__
  if (cpu->avx512) return &row_kernels_avx512;
  if (cpu->avx2) return &row_kernels_avx2;
#endif
#ifdef __aarch64__
  if (cpu->neon_dot) return &row_kernels_neon;
#endif
  (void)cpu;
  return &row_kernels_portable;
}

void codec_project(const oscar_codec *codec, int64_t position, int n, const float *x, size_t x_stride, float *y) {
  codec->kernels->project(codec, position, n, x, x_stride, y);
}

int codec_quantize(const oscar_codec *codec, int n, float *y, uint8_t *rows) {
  return codec->kernels->quantize(codec, n, y, rows);
}

void codec_decode_row(const oscar_codec *codec, const uint8_t *row, float *y) { codec->kernels->decode_row(codec, row, y); }

static bool all_finite(const float *x, int n) {
  for (int i = 0; i < n; i++)
    if (!isfinite(x[i])) return false;
  return true;
}

oscar_status oscar_codec_encode(const oscar_codec *codec, int64_t position, int n, const float *x, size_t x_stride,
                                uint8_t *rows) {
  const oscar_codec_spec *spec = &codec->spec;
  if (n < 0 || position < 0 || x_stride < (size_t)spec->head_dim)
    return set_error(codec->context, OSCAR_INVALID_ARGUMENT,
                     "encode: %d rows from position %lld with a stride of %zu floats (head_dim is %d)", n, (long long)position,
                     x_stride, spec->head_dim);
  float y[BLOCK_ROWS * OSCAR_MAX_HEAD_DIM];
  for (int first = 0; first < n; first += BLOCK_ROWS) {
    int block = n - first < BLOCK_ROWS ? n - first : BLOCK_ROWS;
    codec_project(codec, position + first, block, x + (size_t)first * x_stride, x_stride, y);
    int done = codec_quantize(codec, block, y, rows + (size_t)first * codec->row_bytes), bad = first + done;
    if (done == block) continue;
    if (!all_finite(x + (size_t)bad * x_stride, spec->head_dim))
      return set_error(codec->context, OSCAR_NUMERIC, "encode: row %d holds a number that is not finite", bad);
    return set_error(codec->context, OSCAR_NUMERIC, "encode: the values of row %d are too large for 16-bit metadata", bad);
  }
  return OSCAR_OK;
}

void oscar_codec_decode(const oscar_codec *codec, int64_t position, int n, const uint8_t *rows, float *x, size_t x_stride) {
  codec->kernels->decode(codec, position, n, rows, x, x_stride);
}
