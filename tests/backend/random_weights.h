/* tests/backend/random_weights.h - weights of every type with random quants and sane scales, ending at a page that must not be
 * read. */
#ifndef OSCAR_TEST_RANDOM_WEIGHTS_H
#define OSCAR_TEST_RANDOM_WEIGHTS_H

#include "support.h"

#include "backend/blocks.h"

#include <sys/mman.h>

static const enum weight_type all_types[] = {WEIGHT_F32,  WEIGHT_F16,  WEIGHT_BF16, WEIGHT_Q4_0, WEIGHT_Q4_1, WEIGHT_Q5_0,
                                             WEIGHT_Q5_1, WEIGHT_Q8_0, WEIGHT_Q4_K, WEIGHT_Q5_K, WEIGHT_Q6_K};

#define LARGEST_SCALE 0.02

struct random_weight {
  struct weight weight;
  void *mapping;
  size_t mapped_bytes;
};

static inline void put_half(uint8_t *at, float value) {
  uint16_t h = f32_to_f16(value);
  at[0] = (uint8_t)h;
  at[1] = (uint8_t)(h >> 8);
}

/* A scale of either sign, LARGEST_SCALE / 2 .. LARGEST_SCALE. */
static inline float random_scale(uint64_t *random) {
  double u = test_uniform(random);
  return (float)((u < 0.5 ? -1 : 1) * (0.5 + fabs(u - 0.5)) * 0.99 * LARGEST_SCALE);
}

/* The numbers of a block that are not codes: the element of a type without codes; the scale; what is added or taken away by the
 * types that have such a minimum. */
struct block_numbers {
  float element, scale, minimum;
};

/* A block of random codes. */
static inline void random_block(enum weight_type type, uint8_t *block, size_t bytes, struct block_numbers numbers,
                                uint64_t *random) {
  uint16_t brain = f32_to_bf16(numbers.element);
  for (size_t i = 0; i < bytes; i++) block[i] = (uint8_t)test_random(random);
  switch (type) {
  case WEIGHT_F32:
    memcpy(block, &numbers.element, sizeof numbers.element);
    break;
  case WEIGHT_F16:
    put_half(block, numbers.element);
    break;
  case WEIGHT_BF16:
    memcpy(block, &brain, sizeof brain);
    break;
  case WEIGHT_Q4_1:
  case WEIGHT_Q5_1:
  case WEIGHT_Q4_K:
  case WEIGHT_Q5_K:
    put_half(block + 2, numbers.minimum);
    put_half(block, numbers.scale);
    break;
  case WEIGHT_Q6_K:
    put_half(block + 208, numbers.scale);
    break;
  default:
    put_half(block, numbers.scale);
  }
}

/* Memory that ends at a page that cannot be read. */
static inline uint8_t *guarded(size_t bytes, void **mapping, size_t *mapped_bytes) {
  size_t page = (size_t)sysconf(_SC_PAGESIZE), mapped = round_up(bytes, page) + page;
  uint8_t *start = mmap(NULL, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  assert_true(start != MAP_FAILED);
  assert_int_equal(mprotect(start + mapped - page, page, PROT_NONE), 0);
  *mapping = start;
  *mapped_bytes = mapped;
  return start + mapped - page - bytes;
}

static inline struct random_weight random_weight(enum weight_type type, int64_t rows, int64_t cols, uint64_t seed) {
  int elements;
  size_t block_bytes;
  assert_true(weight_block(type, &elements, &block_bytes));
  assert_int_equal(cols % elements, 0);
  size_t bytes = (size_t)(rows * (cols / elements)) * block_bytes;
  struct random_weight w = {.weight = {.name = "random", .type = type, .rows = rows, .cols = cols}};
  uint8_t *data = guarded(bytes, &w.mapping, &w.mapped_bytes);
  for (size_t at = 0; at < bytes; at += block_bytes) {
    struct block_numbers numbers = {.element = test_normal(&seed)};
    numbers.scale = random_scale(&seed);
    numbers.minimum = random_scale(&seed);
    random_block(type, data + at, block_bytes, numbers, &seed);
  }
  w.weight.data = data;
  return w;
}

static inline void random_weight_free(struct random_weight *w) { assert_int_equal(munmap(w->mapping, w->mapped_bytes), 0); }

/* The largest |a q| + |m| of an element: what the float part of a kernel adds up. */
static inline double largest_term(enum weight_type type) {
  switch (type) {
  case WEIGHT_Q4_0:
    return (15 + 8) * LARGEST_SCALE;
  case WEIGHT_Q4_1:
    return (15 + 1) * LARGEST_SCALE;
  case WEIGHT_Q5_0:
    return (31 + 16) * LARGEST_SCALE;
  case WEIGHT_Q5_1:
    return (31 + 1) * LARGEST_SCALE;
  case WEIGHT_Q8_0:
    return (255 + 128) * LARGEST_SCALE;
  case WEIGHT_Q4_K:
    return (15 * 63 + 63) * LARGEST_SCALE;
  case WEIGHT_Q5_K:
    return (31 * 63 + 63) * LARGEST_SCALE;
  case WEIGHT_Q6_K:
    return (63 + 32) * 128 * LARGEST_SCALE;
  default:
    return 6; /* normal deviates */
  }
}

static inline double *dequantized(const struct weight *w) {
  size_t count = (size_t)(w->rows * w->cols);
  float *values = malloc(count * sizeof *values);
  double *wide = malloc(count * sizeof *wide);
  assert_non_null(values);
  assert_non_null(wide);
  weight_dequantize(w->type, (int64_t)count, w->data, values);
  for (size_t i = 0; i < count; i++) wide[i] = (double)values[i];
  free(values);
  return wide;
}

static inline float *random_floats(size_t count, uint64_t seed) {
  float *x = malloc((count ? count : 1) * sizeof *x);
  assert_non_null(x);
  for (size_t i = 0; i < count; i++) x[i] = test_normal(&seed);
  return x;
}

#endif
