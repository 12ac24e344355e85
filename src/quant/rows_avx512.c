/* rows_avx512.c - rows_body.h for this instruction set: eight 16-lane registers of sums. */
#define STRIP_ROWS   8
#define ROWS_KERNELS row_kernels_avx512
#include "quant/rows_body.h"
