/* waves.c - curves of the rotating mean on a page, and how slow pairs are made of polynomials (waves.h). */
#include "attention/waves.h"

#include <math.h>
#include <string.h>

/* The number of pairs before the first from which on all are slow. */
static int count_fast(const oscar_codec_spec *spec) {
  const float *frequencies = spec->rope->spec.frequencies;
  int fast = spec->rotating_pairs;
  while (fast > 0 && fabs((double)frequencies[spec->rotating_pair[fast - 1]]) * ROPE_CENTRE <= SLOW_ANGLE) fast--;
  return fast;
}

size_t wave_basis_bytes(const oscar_codec_spec *spec) {
  int fast = count_fast(spec), curves = WAVE_TERMS + 2 * fast;
  size_t floats = (size_t)(spec->rotating_pairs - fast + 1) * WAVE_TERMS + (size_t)curves * PAGE_TOKENS;
  return round_up(floats * sizeof(float), 64);
}

/* Coefficients of cos(angle x) at even places and of sin(angle x) at odd ones: discrete cosine sums over the zeros of T_NODES.
 * For angles up to SLOW_ANGLE, what these sums fold back lies far below a float's precision. */
enum { NODES = 48 };

static void make_nodes(double nodes[WAVE_TERMS][NODES]) { /* T_j at the zeros */
  const double pi = acos(-1);
  for (int j = 0; j < WAVE_TERMS; j++)
    for (int i = 0; i < NODES; i++) nodes[j][i] = cos(j * (pi * (i + .5) / NODES));
}

static void make_series(double angle, double nodes[WAVE_TERMS][NODES], float *series) {
  double curve[2][NODES];
  for (int i = 0; i < NODES; i++) {
    double x = angle * nodes[1][i];
    curve[0][i] = cos(x);
    curve[1][i] = sin(x);
  }
  for (int j = 0; j < WAVE_TERMS; j++) {
    double sum = 0;
    for (int i = 0; i < NODES; i++) sum += curve[j % 2][i] * nodes[j][i];
    series[j] = (float)(sum * (j ? 2 : 1) / NODES);
  }
}

static void make_polynomials(float *curve) {
  for (int t = 0; t < PAGE_TOKENS; t++) {
    double x = (t - ROPE_CENTRE) / ROPE_CENTRE, previous = x, value = 1; /* T_-1 = T_1, T_0 */
    for (int j = 0; j < WAVE_TERMS; j++) {
      curve[(j % 2 * (WAVE_TERMS / 2) + j / 2) * PAGE_TOKENS + t] = (float)value;
      double next = 2 * x * value - previous;
      previous = value;
      value = next;
    }
  }
}

struct wave_basis wave_basis_make(const oscar_codec_spec *spec, void *memory) {
  struct wave_basis w = {.pairs = spec->rotating_pairs, .fast = count_fast(spec)};
  w.curves = WAVE_TERMS + 2 * w.fast;
  w.curve = memory;
  w.terms = w.curve + w.curves * PAGE_TOKENS;
  memset(w.terms, 0, sizeof *w.terms * (size_t)(WAVE_TERMS * wave_term_rows(&w)));
  make_polynomials(w.curve);
  double nodes[WAVE_TERMS][NODES];
  make_nodes(nodes);
  for (int k = 0; k < w.pairs; k++) {
    int pair = spec->rotating_pair[k];
    if (k >= w.fast) {
      make_series((double)spec->rope->spec.frequencies[pair] * ROPE_CENTRE, nodes, w.terms + (k - w.fast) * WAVE_TERMS);
    } else {
      const float *table = rope_cosines(spec->rope, pair);
      memcpy(w.curve + (WAVE_TERMS + k) * PAGE_TOKENS, table, PAGE_TOKENS * sizeof *table);
      memcpy(w.curve + (WAVE_TERMS + w.fast + k) * PAGE_TOKENS, table + PAGE_TOKENS, PAGE_TOKENS * sizeof *table);
    }
  }
  return w;
}
