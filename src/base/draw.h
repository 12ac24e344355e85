/* base/draw.h - random draws that are the same on every machine: splitmix64 (Steele, Lea and Flood, OOPSLA 2014). Private. */
#ifndef OSCAR_DRAW_H
#define OSCAR_DRAW_H

#include <math.h>
#include <stdint.h>

struct draw {
  uint64_t state;
};

static inline uint64_t draw_bits(struct draw *draw) {
  uint64_t z = draw->state += 0x9E3779B97F4A7C15u;
  z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
  z = (z ^ z >> 27) * 0x94D049BB133111EBu;
  return z ^ z >> 31;
}

/* A stream of its own for every combination of a seed and three numbers. */
static inline struct draw draw_begin(uint64_t seed, uint64_t a, uint64_t b, uint64_t c) {
  struct draw draw = {seed};
  const uint64_t parts[] = {a, b, c};
  for (int i = 0; i < 3; i++) draw.state = draw_bits(&draw) ^ parts[i];
  return draw;
}

/* 0 to n - 1; n up to 2^32. The bias is below n / 2^32. */
static inline uint32_t draw_below(struct draw *draw, uint32_t n) { return (uint32_t)((draw_bits(draw) >> 32) * n >> 32); }

/* 0 to below 1 */
static inline double draw_unit(struct draw *draw) { return (double)(draw_bits(draw) >> 11) * 0x1p-53; }

/* Mean 0, variance 1 (Box and Muller, 1958). */
static inline double draw_normal(struct draw *draw) {
  const double radius = sqrt(-2 * log(1 - draw_unit(draw)));
  return radius * cos(6.283185307179586 * draw_unit(draw));
}

#endif
