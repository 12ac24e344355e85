/* base/sort.h - numbers in ascending order. Private. */
#ifndef OSCAR_BASE_SORT_H
#define OSCAR_BASE_SORT_H

#include <stddef.h>

void sort_doubles(double *x, size_t n); /* no NaN among them */

#endif
