/* rows_portable.c - rows_body.h for this instruction set: eight 4-lane registers of sums. */
#define STRIP_ROWS   2
#define ROWS_KERNELS row_kernels_portable
#include "quant/rows_body.h"
