/*
 * backend.c - the CPU backend: its state, its table of operations, its buffers.
 *
 * Device memory is host memory, so that buffers, upload and download are plain copies. Kernels are chosen once, from the
 * context's features (already cut down to a forced instruction set).
 */
#include "backend/cpu/cpu.h"
#include "base/team.h"

#include <stdio.h>
#include <string.h>

oscar_status scratch_reserve(oscar_context *context, struct scratch *scratch, size_t count, size_t size) {
  size_t bytes;
  if (__builtin_mul_overflow(count, size, &bytes)) bytes = SIZE_MAX; /* refused by mem_alloc */
  if (bytes <= scratch->bytes) return OSCAR_OK;
  void *data = mem_alloc(context, bytes, 1);
  if (!data) return OSCAR_NO_MEMORY;
  mem_free(context, scratch->data);
  *scratch = (struct scratch){data, bytes};
  return OSCAR_OK;
}

void scratch_free(oscar_context *context, struct scratch *scratch) {
  mem_free(context, scratch->data);
  *scratch = (struct scratch){0};
}

static void cpu_free(struct backend *be) {
  if (!be) return;
  struct cpu_backend *cpu = cpu_of(be);
  oscar_context *context = be->context;
  panels_free(cpu);
  rope_table_free(context, &cpu->rope);
  scratch_free(context, &cpu->activations);
  mem_free(context, cpu);
}

static void cpu_describe(const struct backend *be, char *text, size_t bytes) {
  const struct cpu_backend *cpu = (const struct cpu_backend *)(const void *)be;
  char library[32];
  panels_library(library, sizeof library);
  snprintf(text, bytes, "cpu: %s kernels, %d thread%s; %s in %s for many tokens",
           cpu->packed ? cpu->packed->name : cpu->kernels->name, cpu->threads, cpu->threads == 1 ? "" : "s", library,
           panels_use_bf16(cpu) ? "BF16" : "F32");
}

static size_t cpu_product_scratch(const struct backend *be, const struct weight *w, int n) {
  return panels_scratch((const struct cpu_backend *)(const void *)be, w, n);
}

/* Memory grows with the first product that needs it. */
static oscar_status cpu_reserve(struct backend *be, const struct weight *w, int n) {
  (void)be, (void)w, (void)n;
  return OSCAR_OK;
}

static size_t cpu_packed_bytes(const struct backend *be, const struct weight *w) {
  return ((const struct cpu_backend *)(const void *)be)->packed ? packed_bytes(w) : 0;
}

struct packing {
  const struct weight *w;
  uint8_t *packed;
};

static void pack_part(void *arg, int64_t first, int64_t last) {
  const struct packing *p = arg;
  pack_groups(p->w, first, last, p->packed);
}

static oscar_status cpu_pack(struct backend *be, struct weight *w, void *memory) {
  struct packing packing = {w, memory};
  team_split(be->context, cpu_of(be)->threads, (w->rows + GROUP_ROWS - 1) / GROUP_ROWS, pack_part, &packing);
  w->packed = memory;
  return OSCAR_OK;
}

static oscar_status cpu_buffer_alloc(struct backend *be, size_t floats, float **buffer) {
  *buffer = mem_alloc(be->context, floats, sizeof **buffer);
  return *buffer ? OSCAR_OK : OSCAR_NO_MEMORY;
}

static void cpu_buffer_free(struct backend *be, float *buffer) { mem_free(be->context, buffer); }

static oscar_status cpu_copy(struct backend *be, float *to, const float *from, size_t floats) {
  (void)be;
  if (floats > 0) memcpy(to, from, floats * sizeof *to);
  return OSCAR_OK;
}

static const struct backend_ops cpu_ops = {
    .name = "cpu",
    .host_memory = true,
    .free = cpu_free,
    .describe = cpu_describe,
    .product_scratch = cpu_product_scratch,
    .reserve = cpu_reserve,
    .buffer_alloc = cpu_buffer_alloc,
    .buffer_free = cpu_buffer_free,
    .upload = cpu_copy,
    .download = cpu_copy,
    .weight_check = cpu_weight_check,
    .packed_bytes = cpu_packed_bytes,
    .pack = cpu_pack,
    .embed = cpu_embed,
    .matmul = cpu_matmul,
    .feed_forward = cpu_feed_forward,
    .rms_norm = cpu_rms_norm,
    .add_rms_norm = cpu_add_rms_norm,
    .rope = cpu_rope,
    .add = cpu_add,
    .scale = cpu_scale,
    .silu_mul = cpu_silu_mul,
    .gelu_mul = cpu_gelu_mul,
};

static const struct dot_kernels *choose_kernels(const struct cpu_features *cpu) {
#if defined(__x86_64__)
  if (cpu_has(cpu, OSCAR_ISA_AVX512)) return &dot_avx512;
  if (cpu_has(cpu, OSCAR_ISA_AVX2)) return &dot_avx2;
#elif defined(__aarch64__)
  if (cpu_has(cpu, OSCAR_ISA_NEON_DOT)) return &dot_neon;
#endif
  (void)cpu;
  return &dot_portable;
}

/* NULL: weights are read as the file has them. */
static const struct packed_kernels *choose_packed(const struct cpu_features *cpu) {
#if defined(__x86_64__)
  if (cpu_has(cpu, OSCAR_ISA_AVX512)) return &packed_avx512;
  if (cpu_has(cpu, OSCAR_ISA_AVX2)) return cpu->avx_vnni ? &packed_avx_vnni : &packed_avx2;
#endif
  (void)cpu;
  return NULL;
}

oscar_status backend_create_cpu(oscar_context *context, struct backend **backend) {
  *backend = NULL;
  struct cpu_backend *cpu = mem_zalloc(context, 1, sizeof *cpu);
  if (!cpu) return OSCAR_NO_MEMORY;
  cpu->threads = context->options.threads;
  cpu->kernels = choose_kernels(&context->cpu);
  cpu->base = (struct backend){.ops = &cpu_ops, .context = context, .shared_tokens = cpu->kernels->many_tokens - 1};
  cpu->packed = choose_packed(&context->cpu);
  *backend = &cpu->base;
  return OSCAR_OK;
}
