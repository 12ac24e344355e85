/* rows_avx2.c - rows_body.h for this instruction set: eight 8-lane registers of sums. */
#define STRIP_ROWS   4
#define ROWS_KERNELS row_kernels_avx2
#include "quant/rows_body.h"
