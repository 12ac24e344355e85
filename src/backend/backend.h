/*
 * backend/backend.h - every operation of a forward pass other than attention, behind one table. Private.
 *
 * The forward pass (model/forward.c) is written once over this table; cpu/ and cuda/ implement it. Buffers are of the backend
 * (device memory on a GPU), and so is all that an operation is given a pointer to, ids and positions too: the caller moves data
 * with upload and download only. All activations are float, row-major, [tokens][features]. Shapes are in the comments; n is the
 * number of tokens. Operations of a GPU are enqueued: what goes wrong there is found by the next download.
 */
#ifndef OSCAR_BACKEND_H
#define OSCAR_BACKEND_H

#include "backend/sampling.h"
#include "base/base.h"
#include "cuda/rotation.h"

#include <oscar/cuda.h>

/* Element types of weights, with GGUF's numbering and block layouts (ggml-common.h of ggml is the reference). */
enum weight_type {
  WEIGHT_F32 = 0,
  WEIGHT_F16 = 1,
  WEIGHT_Q4_0 = 2,
  WEIGHT_Q4_1 = 3,
  WEIGHT_Q5_0 = 6,
  WEIGHT_Q5_1 = 7,
  WEIGHT_Q8_0 = 8,
  WEIGHT_Q4_K = 12,
  WEIGHT_Q5_K = 13,
  WEIGHT_Q6_K = 14,
  WEIGHT_BF16 = 30
};

/* Rows of a weight that any backend's layout keeps together, or a part of them. */
#define PACKED_ROWS 64

/*
 * What a GPU keeps the elements of weights as: BF16; or E4M3 with a scale for every row (backend/e4m3.h), which is half the bytes
 * and within 2^-4 of an element, 2.6 % of a weight's size.
 */
enum weight_form { WEIGHTS_BF16, WEIGHTS_FP8 };

/* y = x W^T: W has `rows` output features of `cols` input features each, blocks of a row contiguous. */
struct weight {
  const char *name;
  enum weight_type type;
  int64_t rows, cols;
  const void *data;   /* in the mapped file; NULL: absent */
  const void *packed; /* the same in the backend's own layout, which products read instead; NULL: they read `data` */
  bool fine;          /* stays in BF16 where a GPU keeps others in FP8 */
};

enum rope_kind {
  ROPE_NORMAL, /* pairs (2i, 2i+1): llama */
  ROPE_NEOX    /* pairs (i, i + rotary_dim/2): qwen2, gemma */
};
struct rope_spec {
  enum rope_kind kind;
  int rotary_dim;           /* first rotary_dim of head_dim are rotated */
  float base, linear_scale; /* angle = linear_scale * position * base^(-2i/rotary_dim) / (factors ? factors[i] : 1) */
  const float *factors;     /* [rotary_dim/2] in host memory, or NULL (llama-3 long context) */
};

/* x [n][count][head_dim], and what every head is normed with before it is rotated: [head_dim], or NULL. */
struct heads {
  int count;
  const float *norm;
  float *x;
};

enum activation { ACTIVATION_SILU, ACTIVATION_GELU };
struct feed_forward {
  const struct weight *gate, *up, *down; /* gate and up have as many rows */
  enum activation activation;
};

/* The CPU rounds products of few tokens (integer kernels) and of many (BF16 or float panels) differently. By number is fastest;
 * who wants results that do not depend on how tokens were put together says which. */
enum product_rounding { ROUND_BY_NUMBER, ROUND_AS_FEW, ROUND_AS_MANY };

struct backend;
struct backend_recording; /* operations that were enqueued, to be enqueued again at once */
struct backend_ops {
  const char *name; /* "cpu" */
  bool host_memory; /* buffers are host memory: a host pointer may stand where a buffer is expected, and the other way round */
  void (*free)(struct backend *be);
  /* One line for `oscar info`: kernels chosen, threads, product library. */
  void (*describe)(const struct backend *be, char *text, size_t bytes);

  /* Memory that products of n tokens with this weight take besides their buffers. */
  size_t (*product_scratch)(const struct backend *be, const struct weight *w, int n);
  /* Makes room for products of up to n tokens with this weight, alone or with others that share its input, where the backend must
   * not take memory during a step. */
  oscar_status (*reserve)(struct backend *be, const struct weight *w, int n);

  oscar_status (*buffer_alloc)(struct backend *be, size_t floats, float **buffer);
  void (*buffer_free)(struct backend *be, float *buffer);
  oscar_status (*upload)(struct backend *be, float *to, const float *from_host, size_t floats);
  oscar_status (*download)(struct backend *be, float *to_host, const float *from, size_t floats);

  /* Whether every product with this weight can be done (type known, cols a multiple of the block). Names the tensor if not. */
  oscar_status (*weight_check)(struct backend *be, const struct weight *w);
  /* The bytes that a weight takes in the layout this backend would rather read; 0: `data` is fine. pack fills them (64-byte
   * aligned, part of a buffer of the caller's) and points the weight at them. A weight may be packed in parts of PACKED_ROWS rows
   * or multiples, one after the other. */
  size_t (*packed_bytes)(const struct backend *be, const struct weight *w);
  oscar_status (*pack)(struct backend *be, struct weight *w, void *memory);
  /* y [n][w->cols] = rows `ids` of w, dequantized; reads `data` if buffers are host memory, else `packed`. Ids outside the table
   * are INVALID_ARGUMENT on the host and rows of NaN on a GPU. */
  oscar_status (*embed)(struct backend *be, const struct weight *w, int n, const int32_t *ids, float *y);
  /* For each of `count` weights that share the input: y[i] [n][w[i]->rows] = x [n][cols] W_i^T (+ bias[i], float [rows], may be
   * NULL). n == 1 (and small n) reads the blocks as they are with integer dot products; large n goes through a product library.
   */
  oscar_status (*matmul)(struct backend *be, int count, const struct weight *const *w, const float *const *bias, int n,
                         const float *x, float *const *y);
  /* A feed-forward block: y [n][down->rows] = (activation(x gate^T) * (x up^T)) down^T, which is matmul, silu_mul or gelu_mul,
   * and matmul, on the host with the same bits. between: [n][2 gate->rows], what it holds then is not said. y may be x. */
  oscar_status (*feed_forward)(struct backend *be, const struct feed_forward *weights, int n, const float *x, float *between,
                               float *y);
  /* y = x / sqrt(mean(x^2) + eps) * weight, over rows of `dim` floats (also per head: rows = n * heads). y may be x. */
  void (*rms_norm)(struct backend *be, int64_t rows, int dim, const float *x, const float *weight, float eps, float *y);
  /* x += add, then y = rms_norm(x): the same bits as the two of them. y may be `add`. */
  void (*add_rms_norm)(struct backend *be, int64_t rows, int dim, float *x, const float *add, const float *weight, float eps,
                       float *y);
  /* Norms and rotates the heads of `count` tensors in place for positions [n]. */
  oscar_status (*rope)(struct backend *be, const struct rope_spec *spec, int n, int head_dim, const int32_t *positions, float eps,
                       int count, const struct heads *tensors);
  void (*add)(struct backend *be, size_t count, float *x, const float *y);          /* x += y */
  void (*scale)(struct backend *be, size_t count, float *x, float factor);          /* x *= factor */
  void (*silu_mul)(struct backend *be, size_t count, float *gate, const float *up); /* gate = silu(gate) * up */
  void (*gelu_mul)(struct backend *be, size_t count, float *gate, const float *up); /* gate = gelu_tanh(gate) * up */

  /* ---- GPUs only ---- */
  /* matmul whose results of a token lie one after the other: y [n][rows of all weights]. */
  oscar_status (*matmul_together)(struct backend *be, int count, const struct weight *const *w, const float *const *bias, int n,
                                  const float *x, float *y);
  /* ids [rows], one for each row of logits [rows][vocab], chosen as each [rows] says; -1 where no logit is finite. reserve makes
   * room for so many rows at once. */
  oscar_status (*reserve_samples)(struct backend *be, int rows, int vocab);
  oscar_status (*sample)(struct backend *be, int rows, int vocab, const float *logits, const struct sampling *each, int32_t *ids);
  /* The same rotation for kernels of other rooms. Valid like a recording. */
  oscar_status (*rope_on_device)(struct backend *be, const struct rope_spec *spec, int head_dim, struct head_rotation *rotation);
  /* Between begin and end whatever is enqueued on the handle's stream is not done but recorded: kernels and their arguments, not
   * what memory holds. No upload, download or taking of memory is possible meanwhile. end gives NULL and a status if recording
   * failed, of which all that was recorded is forgotten. */
  oscar_status (*record_begin)(struct backend *be);
  oscar_status (*record_end)(struct backend *be, struct backend_recording **recording);
  /* Whether everything that it refers to is still where it was: no memory of the GPU has been given back since. */
  bool (*recording_holds)(const struct backend *be, const struct backend_recording *recording);
  oscar_status (*replay)(struct backend *be, const struct backend_recording *recording);
  void (*recording_free)(struct backend *be, struct backend_recording *recording);
};

struct backend {
  const struct backend_ops *ops;
  oscar_context *context;
  oscar_cuda *cuda; /* where its buffers are; NULL: in host memory */
  /* Tokens of different sequences may share products of so many: on the CPU as long as each gets the bits that it gets alone. */
  int shared_tokens;
  enum product_rounding rounding; /* of the products that follow. A GPU chooses by number always */
};

oscar_status backend_create_cpu(oscar_context *context, struct backend **backend);
/* form: of weights that are not `fine`. The handle is borrowed and must outlive the backend. Errors: UNSUPPORTED (a build without
 * CUDA, no product library), NO_MEMORY. */
oscar_status backend_create_cuda(oscar_context *context, oscar_cuda *cuda, enum weight_form form, struct backend **backend);
/* Bytes of the GPU's memory that nothing has taken. */
size_t backend_cuda_free_bytes(const struct backend *backend);
/* Bytes a second at which the GPU reads a large buffer, the best of a few times: the ceiling of decoding. */
oscar_status backend_cuda_read_speed(struct backend *backend, double *bytes_per_s);
/* How products are made from here on: for tests and benchmarks. */
enum cuda_product { PRODUCT_BY_SHAPE, PRODUCT_FEW, PRODUCT_SOME, PRODUCT_LIBRARY };
void backend_cuda_choose(struct backend *backend, enum cuda_product way);

/* ---- block formats, shared by loader, backends and tests ---- */
/* elements of a block and its bytes; false for a type this build does not know */
bool weight_block(enum weight_type type, int *elements, size_t *bytes);
const char *weight_type_name(int type);
/* What every backend's weight_check asks; has_kernels: whether this one has them for the weight's type. */
oscar_status weight_check_layout(struct backend *be, const struct weight *w, bool has_kernels);
/* count: a multiple of the block; exact to float rounding of the published formulas */
void weight_dequantize(enum weight_type type, int64_t count, const void *blocks, float *out);

#endif
