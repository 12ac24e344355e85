/* backend/cpu/cpu.h - the state of the CPU backend, and what its files offer each other. Private. */
#ifndef OSCAR_CPU_H
#define OSCAR_CPU_H

#include "backend/cpu/packed.h"

/* Memory that only grows; contents are not kept. */
struct scratch {
  void *data;
  size_t bytes;
};
oscar_status scratch_reserve(oscar_context *context, struct scratch *scratch, size_t count, size_t size);
void scratch_free(oscar_context *context, struct scratch *scratch);

/* Cosines and sines of the positions of one forward pass, which all layers ask for: [positions][rotary_dim/2] each. */
struct rope_table {
  struct rope_spec spec; /* factors: own copy below */
  int count;             /* 0: nothing computed */
  struct scratch positions, factors, cosines, sines;
};

struct panels;
struct cpu_backend {
  struct backend base;
  int threads;
  const struct dot_kernels *kernels;
  const struct packed_kernels *packed; /* NULL: weights are read as they are */
  struct scratch activations;
  struct rope_table rope;
  struct panels *panels; /* made at the first product with many tokens */
};

static inline struct cpu_backend *cpu_of(struct backend *be) { return (struct cpu_backend *)(void *)be; }

/* The kernels for a weight in the layout it has. */
static inline dot_rows *rows_kernel(const struct cpu_backend *cpu, const struct weight *w) {
  return w->packed ? cpu->packed->rows[w->type] : cpu->kernels->rows[w->type];
}
static inline expand_f32 *f32_kernel(const struct cpu_backend *cpu, const struct weight *w) {
  return w->packed ? cpu->packed->f32[w->type] : cpu->kernels->f32[w->type];
}
static inline expand_stripe *stripe_kernel(const struct cpu_backend *cpu, const struct weight *w) {
  return w->packed ? cpu->packed->stripe[w->type] : cpu->kernels->stripe[w->type];
}

/* products.c */
oscar_status cpu_weight_check(struct backend *be, const struct weight *w);
oscar_status cpu_embed(struct backend *be, const struct weight *w, int n, const int32_t *ids, float *y);
oscar_status cpu_matmul(struct backend *be, int count, const struct weight *const *w, const float *const *bias, int n,
                        const float *x, float *const *y);
oscar_status cpu_feed_forward(struct backend *be, const struct feed_forward *weights, int n, const float *x, float *between,
                              float *y);

/* panels.c: as the matmul of the table, through oneDNN; arguments are checked */
oscar_status panels_matmul(struct cpu_backend *cpu, int count, const struct weight *const *w, const float *const *bias, int n,
                           const float *x, float *const *y);
/* Bytes that panels_matmul holds for n tokens of this weight: the panel, and results that are not made in place. */
size_t panels_scratch(const struct cpu_backend *cpu, const struct weight *w, int n);
void panels_free(struct cpu_backend *cpu);
bool panels_use_bf16(const struct cpu_backend *cpu);
void panels_library(char *text, size_t bytes);

/* ops.c */
void cpu_rms_norm(struct backend *be, int64_t rows, int dim, const float *x, const float *weight, float eps, float *y);
void cpu_add_rms_norm(struct backend *be, int64_t rows, int dim, float *x, const float *add, const float *weight, float eps,
                      float *y);
oscar_status cpu_rope(struct backend *be, const struct rope_spec *spec, int n, int head_dim, const int32_t *positions, float eps,
                      int count, const struct heads *tensors);
void cpu_add(struct backend *be, size_t count, float *x, const float *y);
void cpu_scale(struct backend *be, size_t count, float *x, float factor);
void cpu_silu_mul(struct backend *be, size_t count, float *gate, const float *up);
void cpu_gelu_mul(struct backend *be, size_t count, float *gate, const float *up);
void rope_table_free(oscar_context *context, struct rope_table *table);

#endif
