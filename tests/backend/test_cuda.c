/*
 * The CUDA backend against the portable CPU backend and against products in double precision. Skipped where there is no GPU.
 */
#include "random_weights.h"

#include "backend/backend.h"
#include "backend/e4m3.h"

#include <oscar/cuda.h>

static const enum weight_form forms[] = {WEIGHTS_BF16, WEIGHTS_FP8};

struct pair {
  enum weight_form form;
  oscar_context *context;
  oscar_cuda *cuda;
  struct backend *cpu, *gpu;
};

static void open_pair(struct pair *p, enum weight_form form) {
  *p = (struct pair){.form = form, .context = test_context(OSCAR_ISA_PORTABLE, 2)};
  assert_ok(p->context, oscar_cuda_create(p->context, NULL, &p->cuda));
  assert_ok(p->context, backend_create_cpu(p->context, &p->cpu));
  assert_ok(p->context, backend_create_cuda(p->context, p->cuda, form, &p->gpu));
}

static size_t allocated(const struct pair *p) {
  oscar_cuda_info info;
  oscar_cuda_describe(p->cuda, &info);
  return info.allocated_bytes;
}

static void close_pair(struct pair *p) {
  assert_ok(p->context, oscar_cuda_wait(p->cuda));
  p->gpu->ops->free(p->gpu);
  p->cpu->ops->free(p->cpu);
  assert_int_equal(allocated(p), 0); /* all of it was counted, and given back */
  oscar_cuda_free(p->cuda);
  oscar_context_free(p->context);
}

/* ---- buffers ---- */

static float *on_gpu(struct pair *p, const float *x, size_t count) {
  float *buffer;
  assert_ok(p->context, p->gpu->ops->buffer_alloc(p->gpu, count + 1, &buffer));
  assert_ok(p->context, p->gpu->ops->upload(p->gpu, buffer, x, count));
  return buffer;
}

static const int32_t *ids_on_gpu(struct pair *p, const int32_t *ids, size_t count) {
  return (const int32_t *)(const void *)on_gpu(p, (const float *)(const void *)ids, count);
}

static float *from_gpu(struct pair *p, const float *buffer, size_t count) {
  float *x = malloc((count + 1) * sizeof *x);
  assert_non_null(x);
  for (size_t i = 0; i < count; i++) x[i] = NAN;
  assert_ok(p->context, p->gpu->ops->download(p->gpu, x, buffer, count));
  return x;
}

static void drop(struct pair *p, const float *buffer) { p->gpu->ops->buffer_free(p->gpu, (float *)(uintptr_t)buffer); }

/* The buffer's contents, after which it is gone. */
static float *take(struct pair *p, float *buffer, size_t count) {
  float *x = from_gpu(p, buffer, count);
  drop(p, buffer);
  return x;
}

static float *copy_of(const float *x, size_t count) {
  float *copy = malloc((count + 1) * sizeof *copy);
  assert_non_null(copy);
  memcpy(copy, x, count * sizeof *x);
  return copy;
}

static void assert_near(const char *what, size_t count, const float *got, const float *expected, double relative,
                        double absolute) {
  for (size_t i = 0; i < count; i++) {
    const double e = (double)expected[i];
    if (!(fabs((double)got[i] - e) <= relative * fabs(e) + absolute))
      fail_msg("%s: element %zu of %zu is %.9g instead of %.9g", what, i, count, (double)got[i], e);
  }
}

/* A weight packed into a buffer of its own. */
static float *packed(struct pair *p, struct weight *w) {
  float *memory;
  const size_t bytes = p->gpu->ops->packed_bytes(p->gpu, w);
  assert_int_equal(bytes % sizeof *memory, 0);
  assert_ok(p->context, p->gpu->ops->weight_check(p->gpu, w));
  assert_ok(p->context, p->gpu->ops->buffer_alloc(p->gpu, bytes / sizeof *memory, &memory));
  assert_ok(p->context, p->gpu->ops->pack(p->gpu, w, memory));
  assert_ptr_equal(w->packed, memory);
  return memory;
}

static float rounded(float x) { return bf16_to_f32(f32_to_bf16(x)); }

/* Elements [rows][cols] as the GPU keeps them. */
static void round_weights(enum weight_form form, int64_t rows, int64_t cols, float *x) {
  for (int64_t r = 0; r < rows; r++, x += cols) {
    uint32_t largest = 0;
    for (int64_t i = 0; i < cols; i++) {
      const uint32_t bits = e4m3_float_bits(fabsf(x[i]));
      if (bits > largest) largest = bits;
    }
    const float scale = e4m3_scale(largest);
    for (int64_t i = 0; i < cols; i++)
      x[i] = form == WEIGHTS_FP8 ? e4m3_to_f32(f32_to_e4m3(x[i] / scale)) * scale : rounded(x[i]);
  }
}

/* ---- weights ---- */

static void check_expansion(struct pair *p, enum weight_type type, int64_t rows, int64_t cols) {
  struct random_weight w = random_weight(type, rows, cols, (uint64_t)(rows + cols));
  const size_t count = (size_t)(rows * cols);
  float *exact = malloc(count * sizeof *exact), *out, *memory = packed(p, &w.weight);
  int32_t *ids = malloc((size_t)rows * sizeof *ids);
  assert_true(exact && ids);
  weight_dequantize(type, (int64_t)count, w.weight.data, exact);
  round_weights(p->form, rows, cols, exact);
  for (int64_t r = 0; r < rows; r++) ids[r] = (int32_t)(rows - 1 - r);
  assert_ok(p->context, p->gpu->ops->buffer_alloc(p->gpu, count, &out));
  const int32_t *there = ids_on_gpu(p, ids, (size_t)rows);
  assert_ok(p->context, p->gpu->ops->embed(p->gpu, &w.weight, (int)rows, there, out));
  drop(p, (const float *)(const void *)there);
  float *got = take(p, out, count);
  for (int64_t r = 0; r < rows; r++)
    for (int64_t c = 0; c < cols; c++) {
      const float expected = exact[ids[r] * cols + c];
      if (got[r * cols + c] != expected)
        fail_msg("%s %lldx%lld, row %d, column %lld: %.9g instead of %.9g", weight_type_name((int)type), (long long)rows,
                 (long long)cols, ids[r], (long long)c, (double)got[r * cols + c], (double)expected);
    }
  drop(p, memory);
  free(got);
  free(ids);
  free(exact);
  random_weight_free(&w);
}

static void weights_are_what_the_host_dequantizes_and_rounds(void **state) {
  (void)state;
  static const int64_t float_cols[] = {1, 7, 8, 15, 33, 64, 201, 520}, block_counts[] = {1, 2, 3, 7, 9};
  for (size_t f = 0; f < ARRAY_LENGTH(forms); f++) {
    struct pair p;
    open_pair(&p, forms[f]);
    for (size_t k = 0; k < ARRAY_LENGTH(all_types); k++) {
      int elements;
      size_t bytes;
      weight_block(all_types[k], &elements, &bytes);
      for (size_t c = 0; c < (elements == 1 ? ARRAY_LENGTH(float_cols) : ARRAY_LENGTH(block_counts)); c++) {
        const int64_t cols = elements == 1 ? float_cols[c] : block_counts[c] * elements;
        check_expansion(&p, all_types[k], 1, cols);
        check_expansion(&p, all_types[k], 67, cols);
      }
    }
    close_pair(&p);
  }
}

/* A model packs a weight a few rows at a time. */
static void parts_of_a_weight_pack_like_the_whole(void **state) {
  (void)state;
  enum { ROWS = 3 * PACKED_ROWS + 5, COLS = 768 };
  for (size_t f = 0; f < ARRAY_LENGTH(forms); f++) {
    struct pair p;
    open_pair(&p, forms[f]);
    struct random_weight w = random_weight(WEIGHT_Q5_K, ROWS, COLS, 3);
    struct weight part = w.weight;
    const size_t floats = p.gpu->ops->packed_bytes(p.gpu, &w.weight) / sizeof(float);
    float *whole = packed(&p, &w.weight), *parts;
    assert_ok(p.context, p.gpu->ops->buffer_alloc(p.gpu, floats, &parts));
    uint8_t *at = (uint8_t *)parts;
    for (int64_t done = 0; done < ROWS; done += part.rows) {
      part.rows = ROWS - done < PACKED_ROWS ? ROWS - done : PACKED_ROWS;
      assert_ok(p.context, p.gpu->ops->pack(p.gpu, &part, at));
      at += p.gpu->ops->packed_bytes(p.gpu, &part);
      part.data = (const uint8_t *)part.data + (size_t)part.rows * (COLS / 256) * 176;
    }
    float *a = take(&p, whole, floats), *b = take(&p, parts, floats);
    assert_memory_equal(a, b, floats * sizeof *a);
    free(b);
    free(a);
    random_weight_free(&w);
    close_pair(&p);
  }
}

static void unusable_weights_are_refused_by_name(void **state) {
  (void)state;
  struct pair p;
  open_pair(&p, WEIGHTS_BF16);
  const uint8_t data[64] = {0};
  float *x = on_gpu(&p, (const float[]){1}, 1);
  struct weight w = {.name = "odd.weight", .type = WEIGHT_Q4_0, .rows = 1, .cols = 33, .data = data};
  const struct weight *pw = &w;
  assert_int_equal(p.gpu->ops->weight_check(p.gpu, &w), OSCAR_FORMAT);
  assert_non_null(strstr(oscar_last_error(p.context), "odd.weight"));
  w.type = (enum weight_type)10;
  assert_int_equal(p.gpu->ops->weight_check(p.gpu, &w), OSCAR_UNSUPPORTED);
  w.type = WEIGHT_F32;
  assert_int_equal(p.gpu->ops->matmul(p.gpu, 1, &pw, NULL, 1, x, &x), OSCAR_INVALID_ARGUMENT); /* not packed */
  assert_non_null(strstr(oscar_last_error(p.context), "odd.weight"));
  drop(&p, x);
  close_pair(&p);
}

/* ---- products ---- */

enum { MOST = 3 };

/* Weights that share an input, packed one after the other as a model does. */
struct shared {
  int count;
  struct random_weight w[MOST];
  float *memory, *bias[MOST], *gpu_bias[MOST];
};

static struct shared make_shared(struct pair *p, int count, enum weight_type type, const int64_t *rows, int64_t cols) {
  struct shared s = {.count = count};
  size_t bytes = 0;
  for (int i = 0; i < count; i++) {
    s.w[i] = random_weight(type, rows[i], cols, (uint64_t)(i + rows[i] * 1000 + cols));
    bytes += round_up(p->gpu->ops->packed_bytes(p->gpu, &s.w[i].weight), 64);
    s.bias[i] = random_floats((size_t)rows[i], (uint64_t)i);
    s.gpu_bias[i] = on_gpu(p, s.bias[i], (size_t)rows[i]);
  }
  assert_ok(p->context, p->gpu->ops->buffer_alloc(p->gpu, bytes / sizeof(float), &s.memory));
  uint8_t *at = (uint8_t *)s.memory;
  for (int i = 0; i < count; i++) {
    assert_ok(p->context, p->gpu->ops->pack(p->gpu, &s.w[i].weight, at));
    at += round_up(p->gpu->ops->packed_bytes(p->gpu, &s.w[i].weight), 64);
  }
  return s;
}

static void free_shared(struct pair *p, struct shared *s) {
  for (int i = 0; i < s->count; i++) {
    drop(p, s->gpu_bias[i]);
    free(s->bias[i]);
    random_weight_free(&s->w[i]);
  }
  drop(p, s->memory);
}

/* y against sums in double of weights as the GPU keeps them (the library sees FP8 expanded to BF16) and inputs as they are, or in
 * BF16. The bound: every product meets at most a sixteenth of the columns in additions that round, or cut off, to 24 bits. */
static void check_result(const struct pair *p, const struct shared *s, int i, bool biased, int n, const float *x,
                         enum cuda_product way, const float *y) {
  const struct weight *w = &s->w[i].weight;
  const size_t count = (size_t)(w->rows * w->cols);
  float *exact = malloc(count * sizeof *exact), *inputs = copy_of(x, (size_t)(n * w->cols));
  assert_non_null(exact);
  weight_dequantize(w->type, (int64_t)count, w->data, exact);
  round_weights(p->form, w->rows, w->cols, exact);
  for (size_t k = 0; k < count && way == PRODUCT_LIBRARY; k++) exact[k] = rounded(exact[k]);
  for (int64_t k = 0; k < n * w->cols && way != PRODUCT_FEW; k++) inputs[k] = rounded(inputs[k]);
  for (int t = 0; t < n; t++)
    for (int64_t r = 0; r < w->rows; r++) {
      double sum = biased ? (double)s->bias[i][r] : 0, size = fabs(sum);
      for (int64_t k = 0; k < w->cols; k++) {
        const double term = (double)exact[r * w->cols + k] * (double)inputs[t * w->cols + k];
        sum += term;
        size += fabs(term);
      }
      /* The choice is the backend's: inputs and FP8 weights may have been rounded to BF16 or not. */
      const double unsure = way == PRODUCT_BY_SHAPE ? 0x1p-7 * size : 0;
      const double bound = size * 0x1p-23 * ((double)w->cols / 16 + 40) + unsure, got = (double)y[t * w->rows + r];
      if (!(fabs(got - sum) <= bound))
        fail_msg("%s in %s, way %d, %lldx%lld (%d of %d)%s, token %d of %d, row %lld: %.9g instead of %.9g (+-%.3g)",
                 weight_type_name((int)w->type), p->form == WEIGHTS_FP8 ? "FP8" : "BF16", (int)way, (long long)w->rows,
                 (long long)w->cols, i, s->count, biased ? " + bias" : "", t, n, (long long)r, got, sum, bound);
    }
  free(inputs);
  free(exact);
}

static void check_products(struct pair *p, const struct shared *s, enum cuda_product way, bool biased, int n) {
  const int64_t cols = s->w[0].weight.cols;
  float *x = random_floats((size_t)(n * cols), (uint64_t)n), *there = on_gpu(p, x, (size_t)(n * cols)), *y[MOST];
  const struct weight *w[MOST];
  const float *bias[MOST];
  for (int i = 0; i < s->count; i++) {
    w[i] = &s->w[i].weight;
    bias[i] = biased ? s->gpu_bias[i] : NULL;
    assert_ok(p->context, p->gpu->ops->buffer_alloc(p->gpu, (size_t)(n * w[i]->rows), &y[i]));
    assert_ok(p->context, p->gpu->ops->reserve(p->gpu, w[i], n));
  }
  const size_t before = allocated(p);
  backend_cuda_choose(p->gpu, way);
  assert_ok(p->context, p->gpu->ops->matmul(p->gpu, s->count, w, biased || n % 2 ? bias : NULL, n, there, y));
  if (way == PRODUCT_BY_SHAPE) assert_int_equal(allocated(p), before); /* reserve had taken all */
  backend_cuda_choose(p->gpu, PRODUCT_BY_SHAPE);
  for (int i = 0; i < s->count; i++) {
    float *got = take(p, y[i], (size_t)(n * w[i]->rows));
    check_result(p, s, i, biased, n, x, way, got);
    free(got);
  }
  drop(p, there);
  free(x);
}

static void products_agree_with_double_precision(void **state) {
  (void)state;
  static const int tokens[] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 17, 33, 65};
  static const int64_t shapes[][2] = {{1, 1}, {5, 15}, {63, 33}, {64, 64}, {67, 201}, {192, 576}, {130, 1536}};
  for (size_t f = 0; f < ARRAY_LENGTH(forms); f++) {
    struct pair p;
    open_pair(&p, forms[f]);
    for (size_t k = 0; k < ARRAY_LENGTH(shapes); k++) {
      struct shared s = make_shared(&p, 1, WEIGHT_BF16, &shapes[k][0], shapes[k][1]);
      for (size_t t = 0; t < ARRAY_LENGTH(tokens); t++)
        for (enum cuda_product way = PRODUCT_BY_SHAPE; way <= PRODUCT_LIBRARY; way++) {
          check_products(&p, &s, way, false, tokens[t]);
          check_products(&p, &s, way, true, tokens[t]);
        }
      free_shared(&p, &s);
    }
    close_pair(&p);
  }
}

/* Logits of many tokens: FP8 is expanded in parts. */
static void weights_that_are_expanded_in_parts_agree_with_double_precision(void **state) {
  (void)state;
  const int64_t rows = 34003, cols = 2048;
  struct pair p;
  open_pair(&p, WEIGHTS_FP8);
  struct shared s = make_shared(&p, 1, WEIGHT_F16, &rows, cols);
  check_products(&p, &s, PRODUCT_LIBRARY, true, 3);
  free_shared(&p, &s);
  close_pair(&p);
}

/* FP8 of more bytes than what is multiplied with activations as they are: these are rounded first. With fewer rows and more than
 * two blocks of 16 for each multiprocessor of an H100. */
static void fp8_weights_with_rounded_activations_agree_with_double_precision(void **state) {
  (void)state;
  static const int64_t rows[] = {4096 + 3, 9001}, cols[] = {2064, 1032};
  static const int tokens[] = {9, 16, 21};
  struct pair p;
  open_pair(&p, WEIGHTS_FP8);
  for (size_t k = 0; k < ARRAY_LENGTH(rows); k++) {
    struct shared s = make_shared(&p, 1, WEIGHT_F16, &rows[k], cols[k]);
    for (size_t t = 0; t < ARRAY_LENGTH(tokens); t++) check_products(&p, &s, PRODUCT_SOME, t % 2, tokens[t]);
    free_shared(&p, &s);
  }
  close_pair(&p);
}

/* Enough rows for warps that take several of them, and columns for every stage of the loops. */
static void large_weights_agree_with_double_precision(void **state) {
  (void)state;
  static const int64_t rows[] = {4096 + 3, 5003, 9001, 17003}, cols[] = {264, 1032, 256, 272};
  static const int tokens[] = {1, 2, 3, 4, 8, 11, 24, 40, 130};
  for (size_t f = 0; f < ARRAY_LENGTH(forms); f++) {
    struct pair p;
    open_pair(&p, forms[f]);
    for (size_t k = 0; k < ARRAY_LENGTH(rows); k++) {
      struct shared s = make_shared(&p, 1, WEIGHT_F16, &rows[k], cols[k]);
      for (size_t t = 0; t < ARRAY_LENGTH(tokens); t++)
        for (enum cuda_product way = PRODUCT_FEW; way <= PRODUCT_LIBRARY; way++)
          if (tokens[t] <= 40 || way == PRODUCT_LIBRARY) check_products(&p, &s, way, t % 2, tokens[t]);
      free_shared(&p, &s);
    }
    close_pair(&p);
  }
}

static void weights_that_share_an_input_agree_with_double_precision(void **state) {
  (void)state;
  static const int64_t rows[][MOST] = {{576, 192, 192}, {64, 64, 64}, {1, 130, 7}, {512, 512, 0}};
  static const int64_t cols[] = {576, 128, 33, 256};
  static const int tokens[] = {1, 3, 5, 16, 128, 129};
  for (size_t f = 0; f < ARRAY_LENGTH(forms); f++) {
    struct pair p;
    open_pair(&p, forms[f]);
    for (size_t k = 0; k < ARRAY_LENGTH(rows); k++) {
      struct shared s = make_shared(&p, rows[k][2] ? 3 : 2, WEIGHT_F32, rows[k], cols[k]);
      for (size_t t = 0; t < ARRAY_LENGTH(tokens); t++)
        for (enum cuda_product way = PRODUCT_BY_SHAPE; way <= PRODUCT_LIBRARY; way++) {
          check_products(&p, &s, way, true, tokens[t]);
          check_products(&p, &s, way, false, tokens[t]);
        }
      free_shared(&p, &s);
    }
    close_pair(&p);
  }
}

/* Products with the rows of w, [rows], with ones as input. */
static float *row_sums(struct pair *p, const struct weight *w, int n, enum cuda_product way) {
  const size_t count = (size_t)(n * w->cols);
  float *x = malloc(count * sizeof *x), *y;
  assert_non_null(x);
  for (size_t i = 0; i < count; i++) x[i] = 1;
  float *there = on_gpu(p, x, count);
  assert_ok(p->context, p->gpu->ops->buffer_alloc(p->gpu, (size_t)(n * w->rows), &y));
  backend_cuda_choose(p->gpu, way);
  assert_ok(p->context, p->gpu->ops->matmul(p->gpu, 1, &w, NULL, n, there, &y));
  backend_cuda_choose(p->gpu, PRODUCT_BY_SHAPE);
  drop(p, there);
  free(x);
  return take(p, y, (size_t)(n * w->rows));
}

/* A broken model is not made to look sound; zeros, the smallest and the largest numbers are not broken. */
static void odd_rows_are_kept_or_show(void **state) {
  (void)state;
  enum { ROWS = 7, COLS = 48, N = 20 };
  static const struct {
    float at_3, elsewhere;
    bool finite;
  } rows[ROWS] = {{0, 0, true},          {NAN, 1, false},       {INFINITY, 1, false}, {-INFINITY, 0, false},
                  {1e-38f, -0.0f, true}, {1e37f, -1e36f, true}, {1, 1e-6f, true}};
  float data[ROWS][COLS];
  for (int r = 0; r < ROWS; r++)
    for (int c = 0; c < COLS; c++) data[r][c] = c == 3 ? rows[r].at_3 : rows[r].elsewhere;
  for (size_t f = 0; f < ARRAY_LENGTH(forms); f++) {
    struct pair p;
    open_pair(&p, forms[f]);
    struct weight w = {.name = "odd", .type = WEIGHT_F32, .rows = ROWS, .cols = COLS, .data = data};
    float *memory = packed(&p, &w);
    for (enum cuda_product way = PRODUCT_FEW; way <= PRODUCT_LIBRARY; way++) {
      float *y = row_sums(&p, &w, N, way);
      for (int i = 0; i < N * ROWS; i++) {
        const int r = i % ROWS;
        const double expected = (double)rows[r].at_3 + (COLS - 1) * (double)rows[r].elsewhere;
        assert_int_equal(isfinite(y[i]) != 0, rows[r].finite);
        if (rows[r].finite) assert_true(fabs((double)y[i] - expected) <= 0x1p-4 * (fabs(expected) + 1e-35));
      }
      free(y);
    }
    drop(&p, memory);
    close_pair(&p);
  }
}

/* Embedding and output. */
static void fine_weights_stay_in_bf16(void **state) {
  (void)state;
  enum { ROWS = 70, COLS = 256 };
  struct pair p;
  open_pair(&p, WEIGHTS_FP8);
  struct random_weight fine = random_weight(WEIGHT_F32, ROWS, COLS, 1), other = random_weight(WEIGHT_F32, ROWS, COLS, 1);
  fine.weight.fine = true;
  assert_int_equal(p.gpu->ops->packed_bytes(p.gpu, &fine.weight), ROWS * COLS * 2);
  assert_int_equal(p.gpu->ops->packed_bytes(p.gpu, &other.weight), ROWS * COLS + 128 * sizeof(float));
  float *memory = packed(&p, &fine.weight), *more = packed(&p, &other.weight);
  double *exact = dequantized(&fine.weight);
  for (enum cuda_product way = PRODUCT_FEW; way <= PRODUCT_LIBRARY; way++) {
    float *y = row_sums(&p, &fine.weight, 5, way);
    for (int i = 0; i < 5 * ROWS; i++) {
      double sum = 0;
      for (int c = 0; c < COLS; c++) sum += (double)rounded((float)exact[i % ROWS * COLS + c]);
      assert_true(fabs((double)y[i] - sum) < 1e-4);
    }
    free(y);
  }
  const struct weight *both[] = {&fine.weight, &other.weight};
  float *x = on_gpu(&p, (const float[COLS]){1}, COLS), *y[] = {x, x};
  assert_int_equal(p.gpu->ops->matmul(p.gpu, 2, both, NULL, 1, x, y), OSCAR_INVALID_ARGUMENT);
  drop(&p, x);
  drop(&p, memory);
  drop(&p, more);
  free(exact);
  random_weight_free(&fine);
  random_weight_free(&other);
  close_pair(&p);
}

/* All types against the portable CPU: weights and activations in BF16 are each good to 2^-8 at worst. */
static void products_agree_with_the_portable_cpu(void **state) {
  (void)state;
  enum { ROWS = 96, COLS = 512, N = 12 };
  struct pair p;
  open_pair(&p, WEIGHTS_BF16);
  for (size_t k = 0; k < ARRAY_LENGTH(all_types); k++) {
    struct shared s = make_shared(&p, 1, all_types[k], (const int64_t[]){ROWS}, COLS);
    const struct weight *w = &s.w[0].weight;
    struct weight plain = *w;
    const struct weight *on_cpu = &plain;
    plain.packed = NULL;
    for (int n = 1; n <= N; n += N - 1) {
      float *x = random_floats((size_t)n * COLS, k), *there = on_gpu(&p, x, (size_t)n * COLS), *y, expected[N * ROWS];
      float *to = expected;
      assert_ok(p.context, p.gpu->ops->buffer_alloc(p.gpu, (size_t)n * ROWS, &y));
      assert_ok(p.context, p.gpu->ops->matmul(p.gpu, 1, &w, NULL, n, there, &y));
      assert_ok(p.context, p.cpu->ops->matmul(p.cpu, 1, &on_cpu, NULL, n, x, &to));
      float *got = take(&p, y, (size_t)n * ROWS);
      double squares = 0, size = 0;
      for (int i = 0; i < n * ROWS; i++) {
        squares += pow((double)got[i] - (double)expected[i], 2);
        size += pow((double)expected[i], 2);
      }
      if (!(sqrt(squares / size) < 0x1p-8))
        fail_msg("%s, %d tokens: results differ by %.3g of their size", weight_type_name((int)w->type), n, sqrt(squares / size));
      free(got);
      drop(&p, there);
      free(x);
    }
    free_shared(&p, &s);
  }
  close_pair(&p);
}

/* Results of a token one after the other: against double precision, as products whose results are apart. */
static void results_may_lie_together(void **state) {
  (void)state;
  static const int64_t shapes[][4] = {{5, 3, 7, 15}, {192, 64, 64, 576}, {64, 67, 64, 200}}; /* rows, then columns */
  static const int tokens[] = {1, 3, 8, 9, 17, 40, 130};
  for (size_t f = 0; f < ARRAY_LENGTH(forms); f++) {
    struct pair p;
    open_pair(&p, forms[f]);
    for (size_t k = 0; k < ARRAY_LENGTH(shapes) * 2; k++) {
      struct shared s = make_shared(&p, 3, WEIGHT_BF16, shapes[k / 2], shapes[k / 2][3]);
      const bool biased = k % 2;
      const struct weight *const w[] = {&s.w[0].weight, &s.w[1].weight, &s.w[2].weight};
      const int64_t cols = w[0]->cols, pitch = w[0]->rows + w[1]->rows + w[2]->rows;
      for (size_t t = 0; t < ARRAY_LENGTH(tokens) * (PRODUCT_LIBRARY + 1); t++) {
        const int n = tokens[t / (PRODUCT_LIBRARY + 1)];
        const enum cuda_product way = (enum cuda_product)(t % (PRODUCT_LIBRARY + 1));
        float *x = random_floats((size_t)(n * cols), t), *there = on_gpu(&p, x, (size_t)(n * cols)), *y;
        const float *const bias[] = {s.gpu_bias[0], NULL, s.gpu_bias[2]};
        assert_ok(p.context, p.gpu->ops->buffer_alloc(p.gpu, (size_t)(n * pitch), &y));
        backend_cuda_choose(p.gpu, way);
        assert_ok(p.context, p.gpu->ops->matmul_together(p.gpu, 3, w, biased ? bias : NULL, n, there, y));
        backend_cuda_choose(p.gpu, PRODUCT_BY_SHAPE);
        float *all = take(&p, y, (size_t)(n * pitch)), *part = malloc((size_t)(n * pitch) * sizeof *part);
        assert_non_null(part);
        for (int64_t i = 0, first = 0; i < 3; first += w[i++]->rows) {
          for (int64_t row = 0; row < n; row++)
            memcpy(part + row * w[i]->rows, all + row * pitch + first, (size_t)w[i]->rows * sizeof *part);
          check_result(&p, &s, (int)i, biased && bias[i], n, x, way, part);
        }
        free(part);
        free(all);
        drop(&p, there);
        free(x);
      }
      free_shared(&p, &s);
    }
    close_pair(&p);
  }
}

/* The whole block against its parts. Gate and up may come from another product than apart, so that some of what is rounded to
 * BF16 between may be rounded the other way: 2^-8 of every term. */
static void feed_forward_agrees_with_its_parts(void **state) {
  (void)state;
  static const int64_t shapes[][2] = {{201, 67}, {576, 192}, {256, 64}}; /* between, outside */
  static const int tokens[] = {0, 1, 4, 8, 11, 40, 200};
  for (size_t f = 0; f < ARRAY_LENGTH(forms); f++) {
    struct pair p;
    open_pair(&p, forms[f]);
    for (size_t k = 0; k < ARRAY_LENGTH(shapes); k++) {
      const int64_t inner = shapes[k][0], outer = shapes[k][1], inputs[] = {inner, inner};
      struct shared s = make_shared(&p, 2, WEIGHT_BF16, inputs, outer), d = make_shared(&p, 1, WEIGHT_BF16, &outer, inner);
      const struct weight *const both[] = {&s.w[0].weight, &s.w[1].weight}, *const down = &d.w[0].weight;
      float *exact = malloc((size_t)(inner * outer) * sizeof *exact);
      assert_non_null(exact);
      weight_dequantize(down->type, inner * outer, down->data, exact);
      for (size_t t = 0; t < ARRAY_LENGTH(tokens) * 2; t++) {
        const int n = tokens[t / 2];
        const size_t count = (size_t)n * (size_t)inner, results = (size_t)n * (size_t)outer;
        const struct feed_forward all = {both[0], both[1], down, t % 2 ? ACTIVATION_GELU : ACTIVATION_SILU};
        float *x = random_floats(results + 1, t), *there = on_gpu(&p, x, results + 1), *apart[2], *between, *y;
        for (int i = 0; i < 2; i++) assert_ok(p.context, p.gpu->ops->buffer_alloc(p.gpu, count + 1, &apart[i]));
        assert_ok(p.context, p.gpu->ops->buffer_alloc(p.gpu, 2 * count + 1, &between));
        assert_ok(p.context, p.gpu->ops->buffer_alloc(p.gpu, results + 1, &y));
        assert_ok(p.context, p.gpu->ops->matmul(p.gpu, 2, both, NULL, n, there, apart));
        if (t % 2)
          p.gpu->ops->gelu_mul(p.gpu, count, apart[0], apart[1]);
        else
          p.gpu->ops->silu_mul(p.gpu, count, apart[0], apart[1]);
        assert_ok(p.context, p.gpu->ops->matmul(p.gpu, 1, &down, NULL, n, apart[0], &y));
        float *expected = take(&p, y, results), *gated = take(&p, apart[0], count);
        assert_ok(p.context, p.gpu->ops->feed_forward(p.gpu, &all, n, there, between, there)); /* over its input */
        float *got = take(&p, there, results);
        for (int64_t row = 0; row < n; row++)
          for (int64_t c = 0; c < outer; c++) {
            double size = 0;
            for (int64_t i = 0; i < inner; i++) size += fabs((double)exact[c * inner + i] * (double)gated[row * inner + i]);
            assert_true(fabs((double)got[row * outer + c] - (double)expected[row * outer + c]) <= 0x1p-8 * size);
          }
        drop(&p, between);
        drop(&p, apart[1]);
        free(got);
        free(gated);
        free(expected);
        free(x);
      }
      free(exact);
      free_shared(&p, &d);
      free_shared(&p, &s);
    }
    close_pair(&p);
  }
}

/* A product after a norm has the bits that it has of the same numbers from elsewhere, and what came into their place meanwhile
 * counts. */
static void products_of_normed_rows_have_the_same_bits(void **state) {
  (void)state;
  static const int64_t dims[] = {201, 264, 576, 4096};
  static const int tokens[] = {1, 8, 9, 40};
  for (size_t f = 0; f < ARRAY_LENGTH(forms); f++) {
    struct pair p;
    open_pair(&p, forms[f]);
    for (size_t k = 0; k < ARRAY_LENGTH(dims); k++) {
      const int64_t dim = dims[k], rows = 33;
      struct shared s = make_shared(&p, 1, WEIGHT_BF16, &rows, dim);
      const struct weight *const w = &s.w[0].weight;
      for (size_t t = 0; t < ARRAY_LENGTH(tokens); t++) {
        const int n = tokens[t];
        const size_t count = (size_t)n * (size_t)dim, results = (size_t)(n * rows);
        float *x = random_floats(count, 1), *scale = random_floats((size_t)dim, 2), *other = random_floats(count, 3);
        float *there = on_gpu(&p, x, count), *normed = on_gpu(&p, x, count), *gpu_scale = on_gpu(&p, scale, (size_t)dim), *y[4];
        for (int i = 0; i < 4; i++) assert_ok(p.context, p.gpu->ops->buffer_alloc(p.gpu, results, &y[i]));
        assert_ok(p.context, p.gpu->ops->reserve(p.gpu, w, n));
        p.gpu->ops->add_rms_norm(p.gpu, n, (int)dim, there, normed, gpu_scale, 1e-6f, normed);
        assert_ok(p.context, p.gpu->ops->matmul(p.gpu, 1, &w, NULL, n, normed, &y[0]));
        float *as_floats = take(&p, normed, count);
        float *copied = on_gpu(&p, as_floats, count);
        assert_ok(p.context, p.gpu->ops->matmul(p.gpu, 1, &w, NULL, n, copied, &y[1]));
        float *first = take(&p, y[0], results), *second = take(&p, y[1], results);
        assert_memory_equal(first, second, results * sizeof *first);

        assert_ok(p.context, p.gpu->ops->upload(p.gpu, copied, other, count));
        assert_ok(p.context, p.gpu->ops->matmul(p.gpu, 1, &w, NULL, n, copied, &y[2]));
        assert_ok(p.context, p.gpu->ops->upload(p.gpu, there, x, count));
        p.gpu->ops->rms_norm(p.gpu, n, (int)dim, there, gpu_scale, 1e-6f, there);
        assert_ok(p.context, p.gpu->ops->upload(p.gpu, there, other, count));
        assert_ok(p.context, p.gpu->ops->matmul(p.gpu, 1, &w, NULL, n, there, &y[3]));
        free(first), free(second);
        first = take(&p, y[2], results), second = take(&p, y[3], results);
        assert_memory_equal(first, second, results * sizeof *first);
        drop(&p, gpu_scale);
        drop(&p, copied);
        drop(&p, there);
        free(first), free(second), free(as_floats), free(x), free(scale), free(other);
      }
      free_shared(&p, &s);
    }
    close_pair(&p);
  }
}

/* ---- the other operations ---- */

static void norms_agree_with_the_cpu(void **state) {
  (void)state;
  static const int dims[] = {1, 3, 64, 128, 256, 257, 576, 1536, 2049, 4096, 8200};
  static const int64_t rows[] = {0, 1, 9, 130};
  struct pair p;
  open_pair(&p, WEIGHTS_BF16);
  for (size_t d = 0; d < ARRAY_LENGTH(dims); d++)
    for (size_t k = 0; k < ARRAY_LENGTH(rows); k++) {
      const int dim = dims[d];
      const size_t count = (size_t)(rows[k] * dim);
      float *x = random_floats(count, 1), *add = random_floats(count, 2), *weight = random_floats((size_t)dim, 3);
      float *gx = on_gpu(&p, x, count), *gadd = on_gpu(&p, add, count), *gweight = on_gpu(&p, weight, (size_t)dim);
      float *gy = on_gpu(&p, x, count), *y = copy_of(x, count);
      p.cpu->ops->rms_norm(p.cpu, rows[k], dim, y, weight, 1e-5f, y);
      p.gpu->ops->rms_norm(p.gpu, rows[k], dim, gy, gweight, 1e-5f, gy); /* in place */
      float *got = take(&p, gy, count);
      assert_near("rms_norm", count, got, y, 1e-6, 0);
      free(got);
      p.cpu->ops->add_rms_norm(p.cpu, rows[k], dim, x, add, weight, 1e-5f, add);
      p.gpu->ops->add_rms_norm(p.gpu, rows[k], dim, gx, gadd, gweight, 1e-5f, gadd);
      float *sum = take(&p, gx, count), *normed = take(&p, gadd, count);
      assert_memory_equal(sum, x, count * sizeof *x);
      assert_near("add_rms_norm", count, normed, add, 1e-6, 0);
      free(normed);
      free(sum);
      drop(&p, gweight);
      free(weight);
      free(add);
      free(y);
      free(x);
    }
  close_pair(&p);
}

static void check_rope(struct pair *p, const struct rope_spec *spec, int n, int head_dim, int32_t first, int q_heads,
                       int kv_heads, bool normed) {
  const int counts[2] = {q_heads, kv_heads};
  int32_t *positions = malloc((size_t)n * sizeof *positions);
  assert_non_null(positions);
  for (int t = 0; t < n; t++) positions[t] = first + 3 * t;
  const int32_t *there = ids_on_gpu(p, positions, (size_t)n);
  float *norm = random_floats((size_t)head_dim, 5), *gnorm = on_gpu(p, norm, (size_t)head_dim);
  struct heads host[2], device[2];
  for (int i = 0; i < 2; i++) {
    const size_t count = (size_t)(n * counts[i] * head_dim);
    float *x = random_floats(count, (uint64_t)i);
    host[i] = (struct heads){counts[i], normed ? norm : NULL, x};
    device[i] = (struct heads){counts[i], normed ? gnorm : NULL, on_gpu(p, x, count)};
  }
  assert_ok(p->context, p->cpu->ops->rope(p->cpu, spec, n, head_dim, positions, 1e-6f, 2, host));
  assert_ok(p->context, p->gpu->ops->rope(p->gpu, spec, n, head_dim, there, 1e-6f, 2, device));
  for (int i = 0; i < 2; i++) {
    const size_t count = (size_t)(n * counts[i] * head_dim);
    float *got = take(p, device[i].x, count);
    assert_near("rope", count, got, host[i].x, 2e-6, 2e-6);
    free(got);
    free(host[i].x);
  }
  drop(p, (const float *)(const void *)there);
  drop(p, gnorm);
  free(norm);
  free(positions);
}

static void rope_agrees_with_the_cpu(void **state) {
  (void)state;
  struct pair p;
  open_pair(&p, WEIGHTS_BF16);
  float factors[64];
  for (int i = 0; i < 64; i++) factors[i] = 1 + (float)i / 8;
  for (int kind = ROPE_NORMAL; kind <= ROPE_NEOX; kind++)
    for (int normed = 0; normed < 2; normed++) {
      const enum rope_kind k = (enum rope_kind)kind;
      check_rope(&p, &(struct rope_spec){k, 64, 10000, 1, NULL}, 5, 64, 0, 3, 1, normed);
      check_rope(&p, &(struct rope_spec){k, 128, 1e6f, 1, NULL}, 1, 128, 131071, 32, 8, normed);
      check_rope(&p, &(struct rope_spec){k, 128, 1e6f, 0.125f, factors}, 300, 128, 7, 4, 2, normed);
      check_rope(&p, &(struct rope_spec){k, 32, 10000, 1, NULL}, 2, 80, 100, 2, 2, normed);
      check_rope(&p, &(struct rope_spec){k, 2, 10000, 1, NULL}, 2, 2, 1, 1, 1, normed);
      check_rope(&p, &(struct rope_spec){k, 256, 10000, 1, NULL}, 9, 256, 40000, 4, 1, normed);
      factors[3] += 0.5f; /* the same array with other contents */
      check_rope(&p, &(struct rope_spec){k, 128, 1e6f, 0.125f, factors}, 3, 128, 7, 4, 2, normed);
    }
  float *x = on_gpu(&p, factors, 64);
  const struct heads tensor = {1, NULL, x};
  static const int dims[] = {-2, 0, 3, 66};
  for (size_t i = 0; i < ARRAY_LENGTH(dims); i++) {
    const struct rope_spec spec = {ROPE_NEOX, dims[i], 10000, 1, NULL};
    assert_int_equal(p.gpu->ops->rope(p.gpu, &spec, 1, 64, NULL, 0, 1, &tensor), OSCAR_INVALID_ARGUMENT);
  }
  drop(&p, x);
  close_pair(&p);
}

static void activations_agree_with_the_cpu(void **state) {
  (void)state;
  enum { COUNT = 200003 };
  static const float limits[] = {0, 3e38f, -3e38f, 1e10f, -1e10f, -88, -104, -120};
  struct pair p;
  open_pair(&p, WEIGHTS_BF16);
  float *x = malloc(COUNT * sizeof *x), *up = malloc(COUNT * sizeof *up);
  assert_true(x && up);
  for (int i = 0; i < COUNT; i++) {
    x[i] = i < 8 ? limits[i] : (float)(i - COUNT / 2) * 0.0011f;
    up[i] = i % 2 ? 1 : -0.5f;
  }
  for (int gelu = 0; gelu < 2; gelu++) {
    float *host = copy_of(x, COUNT), *device = on_gpu(&p, x, COUNT), *gup = on_gpu(&p, up, COUNT);
    if (gelu) {
      p.cpu->ops->gelu_mul(p.cpu, COUNT, host, up);
      p.gpu->ops->gelu_mul(p.gpu, COUNT, device, gup);
    } else {
      p.cpu->ops->silu_mul(p.cpu, COUNT, host, up);
      p.gpu->ops->silu_mul(p.gpu, COUNT, device, gup);
    }
    float *got = take(&p, device, COUNT);
    /* Where e^-2u is large, its exponent is good to 2^-24 of itself. */
    assert_near(gelu ? "gelu" : "silu", COUNT, got, host, gelu ? 3e-5 : 2e-6, 1e-12);
    drop(&p, gup);
    free(got);
    free(host);
  }
  float *bad = on_gpu(&p, (const float[]){NAN}, 1);
  p.gpu->ops->silu_mul(p.gpu, 1, bad, bad);
  float *got = take(&p, bad, 1);
  assert_true(isnan(got[0]));
  free(got);
  free(up);
  free(x);
  close_pair(&p);
}

static void add_and_scale_touch_every_element_once(void **state) {
  (void)state;
  static const size_t counts[] = {0, 1, 3, 17, 70001};
  struct pair p;
  open_pair(&p, WEIGHTS_BF16);
  for (size_t k = 0; k < ARRAY_LENGTH(counts); k++)
    for (size_t shift = 0; shift < 2; shift++) { /* off the alignment of vectors too */
      const size_t n = counts[k];
      float *x = random_floats(n + 2, 1), *y = random_floats(n + 2, 2), *gx = on_gpu(&p, x, n + 2), *gy = on_gpu(&p, y, n + 2);
      p.gpu->ops->add(p.gpu, n, gx + shift, gy + shift);
      p.gpu->ops->scale(p.gpu, n, gx + shift, 0.5f);
      float *got = take(&p, gx, n + 2);
      for (size_t i = 0; i < n + 2; i++) assert_true(got[i] == (i >= shift && i < n + shift ? (x[i] + y[i]) * 0.5f : x[i]));
      drop(&p, gy);
      free(got);
      free(y);
      free(x);
    }
  close_pair(&p);
}

static void ids_outside_the_table_show(void **state) {
  (void)state;
  enum { ROWS = 5, COLS = 40 };
  static const int32_t ids[] = {ROWS, 2, -1};
  for (size_t f = 0; f < ARRAY_LENGTH(forms); f++) {
    struct pair p;
    open_pair(&p, forms[f]);
    struct random_weight w = random_weight(WEIGHT_F32, ROWS, COLS, 1);
    float *memory = packed(&p, &w.weight), *y;
    const int32_t *there = ids_on_gpu(&p, ids, 3);
    assert_ok(p.context, p.gpu->ops->buffer_alloc(p.gpu, (size_t)3 * COLS, &y));
    assert_ok(p.context, p.gpu->ops->embed(p.gpu, &w.weight, 3, there, y));
    float *got = take(&p, y, (size_t)3 * COLS);
    for (int i = 0; i < 3 * COLS; i++) assert_int_equal(isnan(got[i]) != 0, i / COLS != 1);
    free(got);
    drop(&p, (const float *)(const void *)there);
    drop(&p, memory);
    random_weight_free(&w);
    close_pair(&p);
  }
}

static void the_description_names_gpu_and_library(void **state) {
  (void)state;
  struct pair p;
  char text[200];
  open_pair(&p, WEIGHTS_BF16);
  oscar_cuda_info info;
  oscar_cuda_describe(p.cuda, &info);
  p.gpu->ops->describe(p.gpu, text, sizeof text);
  printf("%s\n", text);
  assert_non_null(strstr(text, info.name));
  assert_non_null(strstr(text, "cuBLASLt"));
  assert_string_equal(p.gpu->ops->name, "cuda");
  assert_true(backend_cuda_free_bytes(p.gpu) > 0);
  close_pair(&p);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(the_description_names_gpu_and_library),
      cmocka_unit_test(weights_are_what_the_host_dequantizes_and_rounds),
      cmocka_unit_test(parts_of_a_weight_pack_like_the_whole),
      cmocka_unit_test(unusable_weights_are_refused_by_name),
      cmocka_unit_test(products_agree_with_double_precision),
      cmocka_unit_test(large_weights_agree_with_double_precision),
      cmocka_unit_test(weights_that_are_expanded_in_parts_agree_with_double_precision),
      cmocka_unit_test(fp8_weights_with_rounded_activations_agree_with_double_precision),
      cmocka_unit_test(weights_that_share_an_input_agree_with_double_precision),
      cmocka_unit_test(odd_rows_are_kept_or_show),
      cmocka_unit_test(fine_weights_stay_in_bf16),
      cmocka_unit_test(products_agree_with_the_portable_cpu),
      cmocka_unit_test(results_may_lie_together),
      cmocka_unit_test(feed_forward_agrees_with_its_parts),
      cmocka_unit_test(products_of_normed_rows_have_the_same_bits),
      cmocka_unit_test(norms_agree_with_the_cpu),
      cmocka_unit_test(rope_agrees_with_the_cpu),
      cmocka_unit_test(activations_agree_with_the_cpu),
      cmocka_unit_test(add_and_scale_touch_every_element_once),
      cmocka_unit_test(ids_outside_the_table_show),
  };
  if (oscar_cuda_count() == 0) {
    printf("skipped: there is no GPU, or no CUDA in this build\n");
    return SKIPPED;
  }
  return cmocka_run_group_tests(tests, NULL, NULL);
}
