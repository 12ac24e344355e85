/*
 * library.cu - cuBLASLt: finding it, its algorithms by shape, products.
 *
 * The library sees columns where we see rows. Row-major C [tokens][rows] = X W^T is column-major C' [rows x tokens] = op(A) B
 * with A = W as [cols x rows], transposed, and B = X as [cols x tokens]. Descriptions live on the stack: a product takes no
 * memory.
 */
#include "backend/cuda/library.h"

#include <dlfcn.h>
#include <stdio.h>

#define STRINGIFY(x)   #x
#define SONAME(major)  "libcublasLt.so." STRINGIFY(major)
#define NAME_OF(major) SONAME(major)

/* Where it is when the system's loader does not know it: beside the compiler that built this. */
#ifndef OSCAR_CUDA_LIBRARIES
#define OSCAR_CUDA_LIBRARIES "/usr/local/cuda/lib64"
#endif

template <typename F> static bool find(void *file, const char *name, F *function) {
  *function = (F)dlsym(file, name);
  return *function != NULL;
}

const char *library_open(struct library *l) {
  static const char *const places[] = {NAME_OF(CUBLAS_VER_MAJOR), OSCAR_CUDA_LIBRARIES "/" NAME_OF(CUBLAS_VER_MAJOR)};
  for (size_t i = 0; i < sizeof places / sizeof *places && !l->file; i++) l->file = dlopen(places[i], RTLD_NOW | RTLD_LOCAL);
  if (!l->file) return NAME_OF(CUBLAS_VER_MAJOR) " was not found: it comes with the CUDA toolkit (package libcublas)";
  const bool complete = find(l->file, "cublasLtCreate", &l->create) && find(l->file, "cublasLtDestroy", &l->destroy) &&
                        find(l->file, "cublasLtGetVersion", &l->version) && find(l->file, "cublasLtMatmul", &l->matmul) &&
                        find(l->file, "cublasLtMatmulAlgoGetHeuristic", &l->heuristic) &&
                        find(l->file, "cublasLtMatmulDescInit_internal", &l->description_init) &&
                        find(l->file, "cublasLtMatmulDescSetAttribute", &l->description_set) &&
                        find(l->file, "cublasLtMatrixLayoutInit_internal", &l->layout_init) &&
                        find(l->file, "cublasLtMatmulPreferenceInit_internal", &l->preference_init) &&
                        find(l->file, "cublasLtMatmulPreferenceSetAttribute", &l->preference_set);
  if (!complete) return NAME_OF(CUBLAS_VER_MAJOR) " lacks functions that this build expects";
  if (l->create(&l->handle) != CUBLAS_STATUS_SUCCESS) return "cuBLASLt could not be started";
  return NULL;
}

void library_close(struct library *l) {
  if (l->handle) (void)l->destroy(l->handle);
  if (l->file) (void)dlclose(l->file);
  l->handle = NULL;
  l->file = NULL;
}

void library_describe(const struct library *l, char *text, size_t bytes) {
  const size_t version = l->version(); /* 130100: 13.1.0 */
  snprintf(text, bytes, "cuBLASLt %zu.%zu.%zu", version / 10000, version / 100 % 100, version % 100);
}

/* What the library calls a product: it is filled in place and holds no memory. */
struct description {
  cublasLtMatmulDescOpaque_t product;
  cublasLtMatrixLayoutOpaque_t a, b, c;
};

static bool describe(const struct library *l, const struct product_shape *s, const float *bias, struct description *d) {
  const cublasOperation_t transposed = CUBLAS_OP_T;
  const cublasLtEpilogue_t epilogue = CUBLASLT_EPILOGUE_BIAS;
  const cudaDataType_t bias_type = CUDA_R_32F;
  bool good =
      l->description_init(&d->product, sizeof d->product, CUBLAS_COMPUTE_32F, CUDA_R_32F) == CUBLAS_STATUS_SUCCESS &&
      l->description_set(&d->product, CUBLASLT_MATMUL_DESC_TRANSA, &transposed, sizeof transposed) == CUBLAS_STATUS_SUCCESS;
  if (s->bias)
    good = good &&
           l->description_set(&d->product, CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue, sizeof epilogue) == CUBLAS_STATUS_SUCCESS &&
           l->description_set(&d->product, CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, &bias_type, sizeof bias_type) ==
               CUBLAS_STATUS_SUCCESS &&
           l->description_set(&d->product, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias, sizeof bias) == CUBLAS_STATUS_SUCCESS;
  const uint64_t rows = (uint64_t)s->rows, cols = (uint64_t)s->cols, tokens = (uint64_t)s->tokens;
  return good && l->layout_init(&d->a, sizeof d->a, CUDA_R_16BF, cols, rows, s->cols) == CUBLAS_STATUS_SUCCESS &&
         l->layout_init(&d->b, sizeof d->b, CUDA_R_16BF, cols, tokens, s->cols) == CUBLAS_STATUS_SUCCESS &&
         l->layout_init(&d->c, sizeof d->c, CUDA_R_32F, rows, tokens, s->stride) == CUBLAS_STATUS_SUCCESS;
}

/* What the heuristic may assume: operands at multiples of 16 bytes, the result at a multiple of the shape's. */
static bool prefer(const struct library *l, const struct product_shape *s, size_t workspace,
                   cublasLtMatmulPreferenceOpaque_t *preference) {
  const uint32_t operands = 16, result = (uint32_t)s->alignment;
  const uint64_t bytes = workspace;
  return l->preference_init(preference, sizeof *preference) == CUBLAS_STATUS_SUCCESS &&
         l->preference_set(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &bytes, sizeof bytes) == CUBLAS_STATUS_SUCCESS &&
         l->preference_set(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, &operands, sizeof operands) ==
             CUBLAS_STATUS_SUCCESS &&
         l->preference_set(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, &operands, sizeof operands) ==
             CUBLAS_STATUS_SUCCESS &&
         l->preference_set(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, &result, sizeof result) ==
             CUBLAS_STATUS_SUCCESS &&
         l->preference_set(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, &result, sizeof result) ==
             CUBLAS_STATUS_SUCCESS;
}

static bool same_shape(const struct product_shape *a, const struct product_shape *b) {
  return a->rows == b->rows && a->cols == b->cols && a->tokens == b->tokens && a->stride == b->stride &&
         a->alignment == b->alignment && a->bias == b->bias;
}

static struct product_plan *place_of(const struct library *l, const struct product_shape *s) {
  uint64_t hash = (uint64_t)s->rows * 0x9E3779B97F4A7C15u + (uint64_t)s->cols;
  hash = hash * 0x9E3779B97F4A7C15u + (uint64_t)s->tokens;
  hash = hash * 0x9E3779B97F4A7C15u + (uint64_t)s->stride;
  hash = hash * 0x9E3779B97F4A7C15u + (uint64_t)(s->alignment * 2 + s->bias);
  return &l->plans[(hash * 0x9E3779B97F4A7C15u) >> 40 & (KEPT_PLANS - 1)];
}

static void plan(const struct library *l, const struct product_shape *s, struct description *d, size_t workspace,
                 struct product_plan *p) {
  cublasLtMatmulPreferenceOpaque_t preference;
  cublasLtMatmulHeuristicResult_t found;
  int count = 0;
  p->shape = *s;
  p->possible =
      prefer(l, s, workspace, &preference) &&
      l->heuristic(l->handle, &d->product, &d->a, &d->b, &d->c, &d->c, &preference, 1, &found, &count) == CUBLAS_STATUS_SUCCESS &&
      count == 1 && found.state == CUBLAS_STATUS_SUCCESS;
  if (p->possible) p->algorithm = found.algo;
}

cublasStatus_t library_multiply(struct library *l, const struct product_shape *s, const struct product_memory *m,
                                cudaStream_t stream, bool *possible) {
  struct description d;
  *possible = false;
  if (!describe(l, s, m->bias, &d)) return CUBLAS_STATUS_SUCCESS;
  struct product_plan *p = place_of(l, s);
  if (!same_shape(&p->shape, s)) plan(l, s, &d, m->workspace_bytes, p);
  *possible = p->possible;
  if (!p->possible) return CUBLAS_STATUS_SUCCESS;
  const float one = 1, zero = 0;
  return l->matmul(l->handle, &d.product, &one, m->weights, &d.a, m->x, &d.b, &zero, m->y, &d.c, m->y, &d.c, &p->algorithm,
                   m->workspace, m->workspace_bytes, stream);
}
