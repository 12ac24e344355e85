/*
 * codec_rows.c - encoding and decoding as callers see them: a choice of kernels, checks and errors around rows_body.h.
 */
#include "quant/codec.h"

#include <math.h>

#define BLOCK_ROWS 8 /* rows projected together: 32 KiB of stack at the largest head_dim */

const struct row_kernels *row_kernels_for(const struct cpu_features *cpu) {
#ifdef __x86_64__
  if (cpu->avx512) return &row_kernels_avx512;
  if (cpu->avx2) return &row_kernels_avx2;
#endif
  (void)cpu;
  return &row_kernels_portable;
}

void codec_project(const oscar_codec *codec, int64_t position, int n, const float *x, size_t x_stride, float *y) {
  codec->kernels->project(codec, position, n, x, x_stride, y);
}

bool codec_quantize_row(const oscar_codec *codec, float *y, uint8_t *row) { return codec->kernels->quantize_row(codec, y, row); }

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
  for (int t = 0; t < n; t++, rows += codec->row_bytes) {
    if (t % BLOCK_ROWS == 0)
      codec_project(codec, position + t, n - t < BLOCK_ROWS ? n - t : BLOCK_ROWS, x + (size_t)t * x_stride, x_stride, y);
    if (codec_quantize_row(codec, y + (size_t)(t % BLOCK_ROWS) * (size_t)spec->channels, rows)) continue;
    if (!all_finite(x + (size_t)t * x_stride, spec->head_dim))
      return set_error(codec->context, OSCAR_NUMERIC, "encode: row %d holds a number that is not finite", t);
    return set_error(codec->context, OSCAR_NUMERIC, "encode: the values of row %d are too large for 16-bit metadata", t);
  }
  return OSCAR_OK;
}

void oscar_codec_decode(const oscar_codec *codec, int64_t position, int n, const uint8_t *rows, float *x, size_t x_stride) {
  codec->kernels->decode(codec, position, n, rows, x, x_stride);
}
