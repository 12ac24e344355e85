/*
 * products.c - products with weights: few tokens through the integer kernels here, many through panels.c; embedding rows.
 *
 * All weights of a call are one run of bytes that the threads divide into equal stretches of whole rows: reading them is what a
 * product with few tokens costs. Which thread computes a row does not change it, so results do not depend on their number.
 */
#include "backend/cpu/cpu.h"

#include <limits.h>
#include <omp.h>

/*
 * From this many tokens on, expanding the weights for oneDNN is faster than more rounds of the integer kernels. Measured with
 * bench_products on Sapphire Rapids, two threads.
 */
#define MANY_TOKENS_BF16 25
#define MANY_TOKENS_F32  49

/* Products smaller than this are done before a second thread has woken up. */
#define THREADED_BYTES 32768

oscar_status cpu_weight_check(struct backend *be, const struct weight *w) {
  int elements;
  size_t bytes;
  if (!weight_block(w->type, &elements, &bytes) || !cpu_of(be)->kernels->rows[w->type])
    return set_error(be->context, OSCAR_UNSUPPORTED, "tensor %s has type %s, for which the cpu backend has no kernels", w->name,
                     weight_type_name((int)w->type));
  if (!w->data || w->rows < 1 || w->cols < 1 || w->rows > INT_MAX || w->cols > INT_MAX)
    return set_error(be->context, OSCAR_FORMAT, "tensor %s of %lld x %lld is empty, absent or too large", w->name,
                     (long long)w->rows, (long long)w->cols);
  if (w->cols % elements)
    return set_error(be->context, OSCAR_FORMAT, "tensor %s has rows of %lld elements, not a multiple of the %d of a %s block",
                     w->name, (long long)w->cols, elements, weight_type_name((int)w->type));
  return OSCAR_OK;
}

oscar_status cpu_embed(struct backend *be, const struct weight *w, int n, const int32_t *ids, float *y) {
  oscar_status status = cpu_weight_check(be, w);
  if (status != OSCAR_OK) return status;
  for (int t = 0; t < n; t++)
    if (ids[t] < 0 || ids[t] >= w->rows)
      return set_error(be->context, OSCAR_INVALID_ARGUMENT, "token id %d is not a row of %s, which has %lld", ids[t], w->name,
                       (long long)w->rows);
  expand_f32 *expand = cpu_of(be)->kernels->f32[w->type];
  for (int t = 0; t < n; t++) expand(w, ids[t], ids[t] + 1, y + t * w->cols);
  return OSCAR_OK;
}

/* First row of this weight, which begins at byte `offset` of the call, at or after byte `at`. */
static int64_t row_at(const struct weight *w, size_t offset, size_t at) {
  size_t row_bytes = weight_row_bytes(w);
  if (at <= offset) return 0;
  size_t row = (at - offset + row_bytes - 1) / row_bytes;
  return row < (size_t)w->rows ? (int64_t)row : w->rows;
}

static void add_bias(const float *bias, int64_t rows, int64_t first, int64_t last, int n, float *y) {
  for (int t = 0; t < n; t++)
    for (int64_t r = first; r < last; r++) y[t * rows + r] += bias[r];
}

static size_t all_bytes(int count, const struct weight *const *w) {
  size_t total = 0;
  for (int i = 0; i < count; i++) total += (size_t)w[i]->rows * weight_row_bytes(w[i]);
  return total;
}

/* The stretch `part` of `parts` of all weights. */
static void dot_part(const struct cpu_backend *cpu, int count, const struct weight *const *w, const float *const *bias,
                     const struct dot_input *in, float *const *y, int part, int parts) {
  size_t total = all_bytes(count, w), offset = 0;
  size_t share = total / (size_t)parts;
  size_t begin = share * (size_t)part, end = part == parts - 1 ? total : begin + share;
  for (int i = 0; i < count; i++) {
    int64_t first = row_at(w[i], offset, begin), last = row_at(w[i], offset, end);
    offset += (size_t)w[i]->rows * weight_row_bytes(w[i]);
    if (first >= last) continue;
    cpu->kernels->rows[w[i]->type](w[i], first, last, in, y[i]);
    if (bias && bias[i]) add_bias(bias[i], w[i]->rows, first, last, in->n, y[i]);
  }
}

static oscar_status few_tokens(struct cpu_backend *cpu, int count, const struct weight *const *w, const float *const *bias, int n,
                               const float *x, float *const *y) {
  struct dot_input in = {.cols = w[0]->cols, .n = n, .x = x, .chunks_per_token = (w[0]->cols + CHUNK - 1) / CHUNK};
  bool quantized = false;
  for (int i = 0; i < count; i++) quantized = quantized || !weight_is_float(w[i]->type);
  int64_t chunks = quantized ? n * in.chunks_per_token : 0;
  oscar_status status = scratch_reserve(cpu->base.context, &cpu->activations, (size_t)chunks, sizeof(struct act_chunk));
  if (status != OSCAR_OK) return status;
  struct act_chunk *activations = cpu->activations.data;
  in.chunks = activations;
#pragma omp parallel num_threads(cpu->threads) if (all_bytes(count, w) >= THREADED_BYTES)
  {
#pragma omp for schedule(static)
    for (int64_t c = 0; c < chunks; c++) {
      int64_t token = c / in.chunks_per_token, at = c % in.chunks_per_token * CHUNK;
      int here = in.cols - at < CHUNK ? (int)(in.cols - at) : CHUNK;
      cpu->kernels->quantize(x + token * in.cols + at, here, activations + c);
    }
    dot_part(cpu, count, w, bias, &in, y, omp_get_thread_num(), omp_get_num_threads());
  }
  return OSCAR_OK;
}

oscar_status cpu_matmul(struct backend *be, int count, const struct weight *const *w, const float *const *bias, int n,
                        const float *x, float *const *y) {
  struct cpu_backend *cpu = cpu_of(be);
  if (count < 1 || n < 0)
    return set_error(be->context, OSCAR_INVALID_ARGUMENT, "a product of %d weights with %d tokens is not possible", count, n);
  for (int i = 0; i < count; i++) {
    oscar_status status = cpu_weight_check(be, w[i]);
    if (status != OSCAR_OK) return status;
    if (w[i]->cols != w[0]->cols)
      return set_error(be->context, OSCAR_INVALID_ARGUMENT, "%s has %lld columns, but shares its input with %s, which has %lld",
                       w[i]->name, (long long)w[i]->cols, w[0]->name, (long long)w[0]->cols);
  }
  if (n == 0) return OSCAR_OK;
  bool many = n >= (panels_use_bf16(cpu) ? MANY_TOKENS_BF16 : MANY_TOKENS_F32);
  return many ? panels_matmul(cpu, count, w, bias, n, x, y) : few_tokens(cpu, count, w, bias, n, x, y);
}
