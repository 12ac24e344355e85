/*
 * backend/cuda/library.h - cuBLASLt, loaded when a GPU is used. Private, CUDA C++.
 *
 * It is not linked: the program also runs where CUDA is not installed, and says so when a GPU is asked for.
 */
#ifndef OSCAR_CUDA_LIBRARY_H
#define OSCAR_CUDA_LIBRARY_H

#include <cublasLt.h>
#include <stddef.h>
#include <stdint.h>

/* C [tokens][stride], of which `rows` = X [tokens][cols] W^T (+ bias): one product's shape. */
struct product_shape {
  int64_t rows, cols, tokens;
  int64_t stride; /* of tokens in C, floats */
  int alignment;  /* of C, bytes: 4, 8 or 16 */
  bool bias;
};

/* The algorithm of a shape, chosen by the library's heuristic at the first product of that shape. */
struct product_plan {
  struct product_shape shape; /* tokens == 0: free */
  bool possible;
  cublasLtMatmulAlgo_t algorithm;
};
#define KEPT_PLANS 512 /* a model has about six shapes; prompts end in chunks of any length */

struct library {
  void *file; /* of dlopen */
  cublasLtHandle_t handle;
  struct product_plan *plans; /* [KEPT_PLANS], by a hash of the shape; the caller's memory */
  decltype(&cublasLtCreate) create;
  decltype(&cublasLtDestroy) destroy;
  decltype(&cublasLtGetVersion) version;
  decltype(&cublasLtMatmul) matmul;
  decltype(&cublasLtMatmulAlgoGetHeuristic) heuristic;
  decltype(&cublasLtMatmulDescInit_internal) description_init;
  decltype(&cublasLtMatmulDescSetAttribute) description_set;
  decltype(&cublasLtMatrixLayoutInit_internal) layout_init;
  decltype(&cublasLtMatmulPreferenceInit_internal) preference_init;
  decltype(&cublasLtMatmulPreferenceSetAttribute) preference_set;
};

/* NULL, or what went wrong, in words. */
const char *library_open(struct library *library);
void library_close(struct library *library);
/* "cuBLASLt 13.1.0" */
void library_describe(const struct library *library, char *text, size_t bytes);

struct product_memory {
  const void *weights, *x; /* BF16, 16-byte aligned, cols a multiple of 8 */
  const float *bias;       /* [rows] or NULL */
  float *y;
  void *workspace;
  size_t workspace_bytes;
};
/* Enqueues the product. *possible: the library can do this shape; if not, nothing was done. A status other than SUCCESS: it
 * failed. */
cublasStatus_t library_multiply(struct library *library, const struct product_shape *shape, const struct product_memory *memory,
                                cudaStream_t stream, bool *possible);

#endif
