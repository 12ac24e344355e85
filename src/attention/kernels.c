/* kernels.c - which tables of kernels serve a CPU. */
#include "attention/kernels.h"

#include <stdio.h>

const struct attention_kernels *attention_kernels_for(const struct cpu_features *cpu) {
#if defined(__x86_64__)
  if (cpu_has(cpu, OSCAR_ISA_AVX512)) return &attention_kernels_avx512;
  if (cpu_has(cpu, OSCAR_ISA_AVX2)) return cpu->avx_vnni ? &attention_kernels_avx_vnni : &attention_kernels_avx2;
#elif defined(__aarch64__)
  if (cpu_has(cpu, OSCAR_ISA_NEON_DOT)) return &attention_kernels_neon_dot;
#endif
  (void)cpu;
  return &attention_kernels_portable;
}

const struct page_kernels *page_kernels_for_many(const struct cpu_features *cpu) {
#if defined(__x86_64__)
  if (cpu->amx_bf16 && cpu->avx512_bf16 && cpu->avx512_vbmi) return &page_kernels_amx;
  if (cpu->wide_bf16 && cpu->avx512_vbmi) return &page_kernels_avx512_bf16;
#endif
  (void)cpu;
  return NULL;
}

void attention_kernels_describe(const struct cpu_features *cpu, char *text, size_t bytes) {
  const struct page_kernels *few = &attention_kernels_for(cpu)->pages, *many = page_kernels_for_many(cpu);
  if (many)
    snprintf(text, bytes, "attention: %s kernels, %s for many tokens", few->name, many->name);
  else
    snprintf(text, bytes, "attention: %s kernels", few->name);
}
