/* kernels.c - which table of kernels serves an instruction set. */
#include "attention/kernels.h"

const struct attention_kernels *attention_kernels_for(oscar_isa isa) {
#if defined(__x86_64__)
  if (isa == OSCAR_ISA_AVX512) return &attention_kernels_avx512;
  if (isa == OSCAR_ISA_AVX2) return &attention_kernels_avx2;
#endif
  (void)isa;
  return &attention_kernels_portable;
}
