/*
 * hadamard.c - Hadamard matrices of order 2^k and 2^k {12, 20, 28}.
 *
 * Sylvester's matrix of order 2^k has the sign (-1)^popcount(i & j). The other orders are its Kronecker product with a base
 * matrix made from the quadratic residues of a prime q (R. Paley, "On orthogonal matrices", 1933). With Q_ij = chi(i - j) and S =
 * [[0, 1], [-1, Q]]: q = 3 mod 4: Q is skew and S + I is Hadamard of order q + 1: 12 (q = 11) and 20 (q = 19); q = 1 mod 4: with
 * S = [[0, 1], [1, Q]], S x [[1, 1], [1, -1]] + I x [[1, -1], [-1, -1]] is one of order 2(q + 1): 28 (q = 13).
 */
#include "rotation/hadamard.h"

#include <math.h>

static bool is_power_of_two(int d) { return d > 0 && (d & (d - 1)) == 0; }

/* The base order of d: 1, 12, 20 or 28; 0 if d is not a power of two times one of them. */
static int base_order(int d) {
  static const int orders[] = {1, 12, 20, 28};
  for (size_t i = 0; i < ARRAY_LENGTH(orders); i++)
    if (d > 0 && d % orders[i] == 0 && is_power_of_two(d / orders[i])) return orders[i];
  return 0;
}

/* The quadratic character of a modulo a prime q: 0, +1 for squares, -1 for the rest. */
static int character(int a, int q) {
  a = (a % q + q) % q;
  if (a == 0) return 0;
  for (int x = 1; x <= q / 2; x++)
    if (x * x % q == a) return 1;
  return -1;
}

/* Entry of the bordered residue matrix S of order q + 1. */
static int bordered(int q, int i, int j) {
  if (i == 0) return j == 0 ? 0 : 1;
  if (j == 0) return q % 4 == 3 ? -1 : 1;
  return character(i - j, q);
}

static int base_sign(int order, int i, int j) {
  static const int sum[2][2] = {{1, 1}, {1, -1}}, difference[2][2] = {{1, -1}, {-1, -1}};
  if (order == 1) return 1;
  if (order == 28) return i / 2 == j / 2 ? difference[i % 2][j % 2] : bordered(13, i / 2, j / 2) * sum[i % 2][j % 2];
  return i == j ? 1 : bordered(order - 1, i, j);
}

bool oscar_hadamard_exists(int d) { return base_order(d) != 0; }

oscar_status hadamard_signs(oscar_context *context, int d, int8_t *signs) {
  int order = base_order(d);
  if (!order)
    return set_error(context, OSCAR_UNSUPPORTED, "no Hadamard matrix of order %d: orders are 2^k, 12 2^k, 20 2^k and 28 2^k", d);
  int8_t base[28 * 28];
  for (int i = 0; i < order; i++)
    for (int j = 0; j < order; j++) base[i * order + j] = (int8_t)base_sign(order, i, j);
  for (int i = 0; i < d; i++)
    for (int j = 0; j < d; j++) {
      int sylvester = __builtin_parity((unsigned)(i / order & j / order)) ? -1 : 1;
      *signs++ = (int8_t)(sylvester * base[i % order * order + j % order]);
    }
  return OSCAR_OK;
}

oscar_status oscar_hadamard(oscar_context *context, int d, float *h) {
  size_t n = d > 0 ? (size_t)d * (size_t)d : 1;
  int8_t *signs = mem_alloc(context, n, 1);
  if (!signs) return OSCAR_NO_MEMORY;
  oscar_status status = hadamard_signs(context, d, signs);
  float scale = (float)(1 / sqrt((double)d));
  for (size_t i = 0; status == OSCAR_OK && i < n; i++) h[i] = (float)signs[i] * scale;
  mem_free(context, signs);
  return status;
}
