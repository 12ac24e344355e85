/*
 * ops.c - the element-wise operations of a forward pass.
 *
 * They touch activations only, which are small beside the weights; the loops are written for the compiler's vectorizer, with an
 * exponential of our own because libm's cannot be vectorized in strict C. Threads join in for prompts only.
 */
#include "backend/cpu/cpu.h"
#include "base/team.h"

#include <math.h>

#define PARALLEL_ELEMENTS 65536 /* below this, calling other threads costs more than it saves */

/* body(arg, first, last) over 0 .. n - 1, by all threads if there are enough elements to touch. */
static void spread(struct backend *be, int64_t n, int64_t elements, team_body *body, void *arg) {
  team_split(be->context, elements >= PARALLEL_ELEMENTS ? cpu_of(be)->threads : 1, n, body, arg);
}

static inline uint32_t bits_of(float x) {
  uint32_t u;
  memcpy(&u, &x, sizeof u);
  return u;
}

static inline float from_bits(uint32_t u) {
  float x;
  memcpy(&x, &u, sizeof x);
  return x;
}

/*
 * e^x to about 2 units in the last place, 0 and infinity beyond the range of floats; NaN is for the caller to carry on.
 * x = k ln 2 + r with |r| <= ln 2 / 2, ln 2 in two parts so that r is exact; e^r by its Taylor polynomial, whose first left-out
 * term r^8/8! is 5e-9; 2^k in two factors, because 2^128 alone is no float. Comparisons are of integers: of floats they could
 * trap, which keeps compilers from vectorizing.
 */
static inline float exponential(float x) {
  const int32_t largest = 0x42D00000; /* 104 */
  int32_t magnitude = (int32_t)(bits_of(x) & 0x7FFFFFFFu);
  magnitude = magnitude > largest ? largest : magnitude;
  float bounded = from_bits((bits_of(x) & 0x80000000u) | (uint32_t)magnitude);
  float shifted = bounded * 1.44269504f + 12582912.0f; /* rounds to an integer in the low bits */
  float k = shifted - 12582912.0f;
  float r = bounded - k * 0.693359375f;
  r = r + k * 2.12194440e-4f;
  float p = 1.0f / 5040;
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r * r + r + 1.0f;
  int32_t exponent = (int32_t)(bits_of(shifted) - 0x4B400000u), half = exponent >> 1;
  return p * from_bits((uint32_t)(half + 127) << 23) * from_bits((uint32_t)(exponent - half + 127) << 23);
}

/* Eight sums, which the compiler can keep in vectors without reordering anything. */
static double sum_of_squares(int dim, const float *x) {
  double sums[8] = {0}, total = 0;
  int i = 0;
  for (; i + 8 <= dim; i += 8)
    for (int j = 0; j < 8; j++) sums[j] += (double)x[i + j] * (double)x[i + j];
  for (; i < dim; i++) sums[0] += (double)x[i] * (double)x[i];
  for (int j = 0; j < 8; j++) total += sums[j];
  return total;
}

struct norm {
  int dim;
  float eps;
  const float *x, *weight;
  float *y;
  float *sum; /* add_rms_norm: x again, and */
  const float *add;
};

static void norm_row(const struct norm *n, const float *from, float *to) {
  double squares = sum_of_squares(n->dim, from);
  float factor = (float)(1 / sqrt(squares / n->dim + (double)n->eps));
  for (int i = 0; i < n->dim; i++) to[i] = from[i] * factor * n->weight[i];
}

static void norm_rows(void *arg, int64_t first, int64_t last) {
  const struct norm *n = arg;
  for (int64_t r = first; r < last; r++) norm_row(n, n->x + r * n->dim, n->y + r * n->dim);
}

void cpu_rms_norm(struct backend *be, int64_t rows, int dim, const float *x, const float *weight, float eps, float *y) {
  spread(be, rows, rows * dim, norm_rows, &(struct norm){.dim = dim, .eps = eps, .x = x, .weight = weight, .y = y});
}

static void add_row(int dim, float *restrict x, const float *restrict y) {
  for (int i = 0; i < dim; i++) x[i] += y[i];
}

static void add_and_norm_rows(void *arg, int64_t first, int64_t last) {
  const struct norm *n = arg;
  for (int64_t r = first; r < last; r++) {
    add_row(n->dim, n->sum + r * n->dim, n->add + r * n->dim);
    norm_row(n, n->sum + r * n->dim, n->y + r * n->dim);
  }
}

void cpu_add_rms_norm(struct backend *be, int64_t rows, int dim, float *x, const float *add, const float *weight, float eps,
                      float *y) {
  struct norm norm = {.dim = dim, .eps = eps, .weight = weight, .y = y, .sum = x, .add = add};
  spread(be, rows, rows * dim, add_and_norm_rows, &norm);
}

/* ---- RoPE ---- */

void rope_table_free(oscar_context *context, struct rope_table *table) {
  scratch_free(context, &table->positions);
  scratch_free(context, &table->factors);
  scratch_free(context, &table->cosines);
  scratch_free(context, &table->sines);
}

/* Bits of floats are compared: equal bits are what matters, and NaN must not defeat it. */
static bool rope_table_holds(const struct rope_table *table, const struct rope_spec *spec, int n, const int32_t *positions) {
  const struct rope_spec *old = &table->spec;
  if (table->count != n || old->rotary_dim != spec->rotary_dim || !old->factors != !spec->factors) return false;
  if (memcmp(&old->base, &spec->base, sizeof old->base) != 0) return false;
  if (memcmp(&old->linear_scale, &spec->linear_scale, sizeof old->linear_scale) != 0) return false;
  if (spec->factors && memcmp(old->factors, spec->factors, (size_t)spec->rotary_dim / 2 * sizeof(float)) != 0) return false;
  return memcmp(table->positions.data, positions, (size_t)n * sizeof *positions) == 0;
}

/* Angles in double: at position 100,000 a float angle would be wrong by 0.004. */
static void rope_angles(void *arg, int64_t first, int64_t last) {
  const struct rope_table *table = arg;
  const struct rope_spec *spec = &table->spec;
  const int32_t *positions = table->positions.data;
  float *cosines = table->cosines.data, *sines = table->sines.data;
  int pairs = spec->rotary_dim / 2;
  for (int64_t t = first; t < last; t++)
    for (int i = 0; i < pairs; i++) {
      double angle = (double)spec->linear_scale * positions[t] * pow((double)spec->base, -2.0 * i / spec->rotary_dim);
      if (spec->factors) angle /= (double)spec->factors[i];
      cosines[t * pairs + i] = (float)cos(angle);
      sines[t * pairs + i] = (float)sin(angle);
    }
}

static oscar_status rope_table_fill(struct cpu_backend *cpu, const struct rope_spec *spec, int n, const int32_t *positions) {
  struct rope_table *table = &cpu->rope;
  if (rope_table_holds(table, spec, n, positions)) return OSCAR_OK;
  oscar_context *context = cpu->base.context;
  size_t pairs = (size_t)spec->rotary_dim / 2, angles = (size_t)n * pairs;
  table->count = 0;
  oscar_status status = scratch_reserve(context, &table->positions, (size_t)n, sizeof *positions);
  if (status == OSCAR_OK) status = scratch_reserve(context, &table->factors, pairs, sizeof(float));
  if (status == OSCAR_OK) status = scratch_reserve(context, &table->cosines, angles, sizeof(float));
  if (status == OSCAR_OK) status = scratch_reserve(context, &table->sines, angles, sizeof(float));
  if (status != OSCAR_OK) return status;
  memcpy(table->positions.data, positions, (size_t)n * sizeof *positions);
  table->spec = *spec;
  if (spec->factors) table->spec.factors = memcpy(table->factors.data, spec->factors, pairs * sizeof(float));
  table->count = n;
  spread(&cpu->base, n, (int64_t)angles * 16, rope_angles, table); /* an angle takes as long as 16 elements of other loops */
  return OSCAR_OK;
}

/* Pairs `step` apart, `next` from one pair to the next. */
static void rotate_head(int pairs, int step, int next, const float *cosines, const float *sines, float *x) {
  for (int i = 0; i < pairs; i++) {
    float re = x[i * next], im = x[i * next + step];
    x[i * next] = re * cosines[i] - im * sines[i];
    x[i * next + step] = re * sines[i] + im * cosines[i];
  }
}

struct rotation {
  const struct rope_spec *spec;
  const struct rope_table *table;
  int heads, head_dim;
  float *x;
};

static void rotate_tokens(void *arg, int64_t first, int64_t last) {
  const struct rotation *r = arg;
  const struct rope_spec *spec = r->spec;
  const float *cosines = r->table->cosines.data, *sines = r->table->sines.data;
  int pairs = spec->rotary_dim / 2, step = spec->kind == ROPE_NEOX ? pairs : 1, next = spec->kind == ROPE_NEOX ? 1 : 2;
  for (int64_t t = first; t < last; t++)
    for (int h = 0; h < r->heads; h++)
      rotate_head(pairs, step, next, cosines + t * pairs, sines + t * pairs, r->x + (t * r->heads + h) * r->head_dim);
}

oscar_status cpu_rope(struct backend *be, const struct rope_spec *spec, int n, int head_dim, const int32_t *positions, float eps,
                      int count, const struct heads *tensors) {
  struct cpu_backend *cpu = cpu_of(be);
  if (spec->rotary_dim < 2 || spec->rotary_dim % 2 || spec->rotary_dim > head_dim)
    return set_error(be->context, OSCAR_INVALID_ARGUMENT,
                     "RoPE over %d of %d dimensions is not possible: expected an even number, at most all", spec->rotary_dim,
                     head_dim);
  if (n == 0) return OSCAR_OK;
  oscar_status status = rope_table_fill(cpu, spec, n, positions);
  for (int i = 0; i < count && status == OSCAR_OK; i++) {
    const struct heads *t = &tensors[i];
    if (t->norm) cpu_rms_norm(be, (int64_t)n * t->count, head_dim, t->x, t->norm, eps, t->x);
    struct rotation rotation = {spec, &cpu->rope, t->count, head_dim, t->x};
    spread(be, n, (int64_t)n * t->count * head_dim, rotate_tokens, &rotation);
  }
  return status;
}

/* ---- element by element ---- */

struct elements {
  float *x;
  const float *y;
  float factor;
};

static void spread_elements(struct backend *be, size_t count, team_body *body, struct elements e) {
  spread(be, (int64_t)count, (int64_t)count, body, &e);
}

static void add_elements(void *arg, int64_t first, int64_t last) {
  const struct elements *e = arg;
  float *restrict x = e->x;
  const float *restrict y = e->y;
  for (int64_t i = first; i < last; i++) x[i] += y[i];
}

void cpu_add(struct backend *be, size_t count, float *x, const float *y) {
  spread_elements(be, count, add_elements, (struct elements){.x = x, .y = y});
}

static void scale_elements(void *arg, int64_t first, int64_t last) {
  const struct elements *e = arg;
  for (int64_t i = first; i < last; i++) e->x[i] *= e->factor;
}

void cpu_scale(struct backend *be, size_t count, float *x, float factor) {
  spread_elements(be, count, scale_elements, (struct elements){.x = x, .factor = factor});
}

/* x sigmoid(x); for large negative x, x / (1 + inf) is 0; NaN stays in the numerator. */
static void silu_elements(void *arg, int64_t first, int64_t last) {
  const struct elements *e = arg;
  float *restrict gate = e->x;
  const float *restrict up = e->y;
  for (int64_t i = first; i < last; i++) gate[i] = gate[i] / (1.0f + exponential(-gate[i])) * up[i];
}

void cpu_silu_mul(struct backend *be, size_t count, float *gate, const float *up) {
  spread_elements(be, count, silu_elements, (struct elements){.x = gate, .y = up});
}

/* x (1 + tanh(u)) / 2 = x / (1 + e^(-2u)) with u = sqrt(2/pi) (x + 0.044715 x^3) (Hendrycks and Gimpel, arXiv 1606.08415). */
static void gelu_elements(void *arg, int64_t first, int64_t last) {
  const struct elements *e = arg;
  float *restrict gate = e->x;
  const float *restrict up = e->y;
  const float factor = -1.5957691216f; /* -2 sqrt(2/pi) */
  for (int64_t i = first; i < last; i++) {
    float x = gate[i];
    gate[i] = x / (1.0f + exponential(factor * (x + 0.044715f * x * x * x))) * up[i];
  }
}

void cpu_gelu_mul(struct backend *be, size_t count, float *gate, const float *up) {
  spread_elements(be, count, gelu_elements, (struct elements){.x = gate, .y = up});
}
