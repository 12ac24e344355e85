/*
 * tests/cross/panels.c - products with many tokens without oneDNN, which is not installed for the processors that the cross
 * tests compile for: all rows are expanded and multiplied in sixteen sums. What the kernels of dot.h expand is tested with it.
 */
#include "backend/cpu/cpu.h"

#include <stdio.h>

void panels_free(struct cpu_backend *cpu) { (void)cpu; }

bool panels_use_bf16(const struct cpu_backend *cpu) {
  (void)cpu;
  return false;
}

void panels_library(char *text, size_t bytes) { snprintf(text, bytes, "plain C"); }

size_t panels_scratch(const struct cpu_backend *cpu, const struct weight *w, int n) {
  (void)cpu;
  (void)n;
  return (size_t)w->cols * sizeof(float);
}

static float product(const float *a, const float *b, int64_t count) {
  float sums[16] = {0}, total = 0;
  int64_t i = 0;
  for (; i + 16 <= count; i += 16)
    for (int j = 0; j < 16; j++) sums[j] += a[i + j] * b[i + j];
  for (; i < count; i++) sums[i % 16] += a[i] * b[i];
  for (int j = 0; j < 16; j++) total += sums[j];
  return total;
}

oscar_status panels_matmul(struct cpu_backend *cpu, int count, const struct weight *const *w, const float *const *bias, int n,
                           const float *x, float *const *y) {
  int64_t cols = w[0]->cols;
  float *row = mem_alloc(cpu->base.context, (size_t)cols, sizeof *row);
  if (!row) return OSCAR_NO_MEMORY;
  for (int i = 0; i < count; i++)
    for (int64_t r = 0; r < w[i]->rows; r++) {
      cpu->kernels->f32[w[i]->type](w[i], r, r + 1, row);
      for (int t = 0; t < n; t++)
        y[i][t * w[i]->rows + r] = product(row, x + t * cols, cols) + (bias && bias[i] ? bias[i][r] : 0);
    }
  mem_free(cpu->base.context, row);
  return OSCAR_OK;
}
