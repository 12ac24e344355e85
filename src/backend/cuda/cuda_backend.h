/* backend/cuda/cuda_backend.h - the state of the CUDA backend, and what its files offer each other. Private, CUDA C++. */
#ifndef OSCAR_CUDA_BACKEND_H
#define OSCAR_CUDA_BACKEND_H

extern "C" {
#include "backend/backend.h"
}
#include "backend/cuda/library.h"
#include "cuda/launch.cuh"

#include <cuda_bf16.h>
#include <cuda_runtime.h>

/* Memory that only grows; contents are not kept. */
struct device_scratch {
  void *data;
  size_t bytes;
};

/* A buffer that was given out. */
struct device_block {
  struct device_block *next;
  void *memory;
  size_t bytes;
};

/* Rows x [rows][dim] of floats that are there in BF16, too. */
struct rounded_rows {
  const float *x; /* NULL: none */
  int64_t rows;
  int dim;
};

/* What a position is multiplied with to give the angle of a pair, [rotary_dim/2], of a setting that was asked for. */
#define KEPT_ROPES 8
struct rope_frequencies {
  struct rope_spec spec;
  float *factors;  /* host: a copy of spec.factors, or NULL */
  double *on_host; /* of on_gpu; NULL: this place is free */
  double *on_gpu;
};

struct cuda_backend {
  struct backend base;
  struct oscar_cuda *cuda;
  cudaStream_t stream;
  struct device_block *blocks;
  struct library library;
  struct device_scratch workspace; /* of the library */
  enum weight_form form;           /* of weights that are not fine */
  struct device_scratch rounded;   /* activations in BF16, */
  struct rounded_rows normed;      /* of these if a norm left them there just now */
  struct device_scratch joined;    /* results of weights that were multiplied as one */
  struct device_scratch samples;   /* candidates of rows that are sampled */
  struct device_scratch expanded;  /* rows of an FP8 weight in BF16 */
  struct device_scratch raw;       /* blocks of a weight as the file has them, while it is packed */
  struct rope_frequencies ropes[KEPT_ROPES];
  int next_rope;
  enum cuda_product way; /* of products; BY_SHAPE but in tests and benchmarks */
};

static inline struct cuda_backend *cuda_of(struct backend *be) { return (struct cuda_backend *)(void *)be; }
static inline const struct cuda_backend *cuda_of(const struct backend *be) {
  return (const struct cuda_backend *)(const void *)be;
}

oscar_status device_scratch_reserve(struct cuda_backend *b, struct device_scratch *scratch, size_t bytes);
void device_scratch_free(struct cuda_backend *b, struct device_scratch *scratch);

/* Blocks of `threads` for so many of anything. */
static inline unsigned blocks_for(size_t count, int threads) {
  return (unsigned)((count + (size_t)threads - 1) / (size_t)threads);
}

/* What went wrong with a launch is found by cuda_launched. Whatever the kernel writes, what norms left is not sure any more. */
template <typename... P, typename... A>
static inline void launch(struct cuda_backend *b, void (*kernel)(P...), dim3 grid, int threads, const A &...arguments) {
  b->normed = {};
  (void)launch_kernel(b->cuda, kernel, grid, threads, 0, arguments...);
}
/* The second dimension of a grid. */
#define MOST_GRID_ROWS 65535

/*
 * Rows of a weight on the GPU are padded with zeros to 16 bytes, so that every row can be read in vectors and the library always
 * gets its favourite alignment. In BF16 a weight is [rows][packed_cols]. In FP8 it is groups of PACKED_ROWS rows, of which the
 * last may have fewer: scales, float [PACKED_ROWS], then codes [rows of the group][packed_cols] (packed_rows.cuh).
 */
static inline enum weight_form form_of(const struct cuda_backend *b, const struct weight *w) {
  return w->fine ? WEIGHTS_BF16 : b->form;
}
static inline int64_t packed_cols(const struct cuda_backend *b, const struct weight *w) {
  return (int64_t)round_up((size_t)w->cols, form_of(b, w) == WEIGHTS_FP8 ? 16 : 8);
}

/* weights.cu */
oscar_status cuda_weight_check(struct backend *be, const struct weight *w);
size_t cuda_packed_bytes(const struct backend *be, const struct weight *w);
oscar_status cuda_pack(struct backend *be, struct weight *w, void *memory);
oscar_status cuda_embed(struct backend *be, const struct weight *w, int n, const int32_t *ids, float *y);
/* out [count][packed_cols] = rows first .. first + count - 1 of an FP8 weight in BF16 */
oscar_status cuda_expand(struct cuda_backend *b, const struct weight *w, int64_t first, int64_t count, void *out);

/* products.cu: products of up to so many tokens read activations as they are; of more they may be rounded to BF16 before. */
#define FLOAT_TOKENS 8
size_t cuda_product_scratch(const struct backend *be, const struct weight *w, int n);
oscar_status cuda_reserve(struct backend *be, const struct weight *w, int n);
oscar_status cuda_matmul(struct backend *be, int count, const struct weight *const *w, const float *const *bias, int n,
                         const float *x, float *const *y);
oscar_status cuda_matmul_together(struct backend *be, int count, const struct weight *const *w, const float *const *bias, int n,
                                  const float *x, float *y);
oscar_status cuda_feed_forward(struct backend *be, const struct feed_forward *weights, int n, const float *x, float *between,
                               float *y);
/* ops.cu */
void cuda_rms_norm(struct backend *be, int64_t rows, int dim, const float *x, const float *weight, float eps, float *y);
void cuda_add_rms_norm(struct backend *be, int64_t rows, int dim, float *x, const float *add, const float *weight, float eps,
                       float *y);
oscar_status cuda_rope(struct backend *be, const struct rope_spec *spec, int n, int head_dim, const int32_t *positions, float eps,
                       int count, const struct heads *tensors);
oscar_status cuda_rope_on_device(struct backend *be, const struct rope_spec *spec, int head_dim, struct head_rotation *rotation);
void cuda_rope_free(struct cuda_backend *b);
void cuda_add(struct backend *be, size_t count, float *x, const float *y);
void cuda_scale(struct backend *be, size_t count, float *x, float factor);
void cuda_silu_mul(struct backend *be, size_t count, float *gate, const float *up);
void cuda_gelu_mul(struct backend *be, size_t count, float *gate, const float *up);

/* sample.cu */
oscar_status cuda_reserve_samples(struct backend *be, int rows, int vocab);
oscar_status cuda_sample(struct backend *be, int rows, int vocab, const float *logits, const struct sampling *each, int32_t *ids);

#endif
