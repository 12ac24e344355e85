/*
 * Products with weights: every kernel of every instruction set against double-precision products of the dequantized weights,
 * within bounds derived from the formats; the weights end at a page that cannot be read.
 */
#include "random_weights.h"

#include "backend/cpu/cpu.h"

#if defined(__x86_64__)
extern const struct packed_kernels packed_emulated_avx_vnni;
#endif

/* Instruction sets, and the layouts of weights that each has kernels for. */
static const struct level {
  oscar_isa isa;
  bool packed;
  const struct packed_kernels *kernels; /* in place of those that the backend chose */
  bool vnni, vnni512;                   /* what they need beside the level: AVX-VNNI, or AVX-512 */
} all_levels[] = {{.isa = OSCAR_ISA_PORTABLE},
                  {.isa = OSCAR_ISA_AVX2},
#if defined(__x86_64__)
                  {.isa = OSCAR_ISA_AVX2, .packed = true, .kernels = &packed_avx2},
                  {.isa = OSCAR_ISA_AVX2, .packed = true, .kernels = &packed_avx_vnni, .vnni = true},
                  {.isa = OSCAR_ISA_AVX2, .packed = true, .kernels = &packed_emulated_avx_vnni, .vnni512 = true},
#endif
                  {.isa = OSCAR_ISA_AVX512},
                  {.isa = OSCAR_ISA_AVX512, .packed = true},
                  {.isa = OSCAR_ISA_NEON_DOT}};
static const struct level best_level = {.isa = OSCAR_ISA_AUTO, .packed = true};

struct bench {
  oscar_context *context;
  struct backend *be;
  bool packed; /* weights are packed where the backend wants that */
};

static bool bench_open(struct bench *b, struct level level, int threads) {
  struct cpu_features cpu;
  cpu_detect(&cpu);
  if ((level.vnni && !cpu.avx_vnni) || (level.vnni512 && !cpu_has(&cpu, OSCAR_ISA_AVX512))) return false;
  oscar_context_options options;
  oscar_context_options_default(&options);
  options.isa = level.isa;
  b->packed = level.packed;
  options.threads = threads;
  if (oscar_context_create(&options, &b->context) != OSCAR_OK) return false; /* the CPU lacks it */
  assert_ok(b->context, backend_create_cpu(b->context, &b->be));
  if (level.kernels) cpu_of(b->be)->packed = level.kernels;
  return true;
}

static void bench_close(struct bench *b) {
  b->be->ops->free(b->be);
  oscar_context_free(b->context);
}

/* A weight as this bench's products read it: packed, at the end of a mapping that cannot be read on. */
struct prepared {
  struct weight weight;
  void *mapping;
  size_t mapped_bytes;
};

static struct prepared prepare(const struct bench *b, const struct weight *w) {
  struct prepared p = {.weight = *w};
  size_t bytes = b->packed ? b->be->ops->packed_bytes(b->be, w) : 0;
  if (bytes == 0) return p;
  uint8_t *memory = guarded(bytes, &p.mapping, &p.mapped_bytes);
  memset(memory, 0xEE, bytes);
  b->be->ops->pack(b->be, &p.weight, memory);
  return p;
}

static void prepared_free(struct prepared *p) {
  if (p->mapping) assert_int_equal(munmap(p->mapping, p->mapped_bytes), 0);
}

static const struct dot_kernels *kernels_of(const struct bench *b) { return cpu_of(b->be)->kernels; }

static float *product(struct bench *b, const struct weight *w, const float *bias, int n, const float *x) {
  float *y = malloc((size_t)(n * w->rows) * sizeof *y);
  assert_non_null(y);
  for (int64_t i = 0; i < n * w->rows; i++) y[i] = NAN; /* what is not written shows */
  struct prepared prepared = prepare(b, w);
  const struct weight *pw = &prepared.weight;
  assert_ok(b->context, b->be->ops->matmul(b->be, 1, &pw, &bias, n, x, &y));
  prepared_free(&prepared);
  return y;
}

/* Float roundings (2^-24 each) of a sum whose terms are below largest_term * |x| and of which each meets at most cols/16 + 40
 * additions. */
static double rounding_bound(const struct weight *w, const double *row, const float *x) {
  double magnitude = 0;
  bool exact = weight_is_float(w->type);
  for (int64_t k = 0; k < w->cols; k++) magnitude += fabs((double)x[k]) * (exact ? fabs(row[k]) : largest_term(w->type));
  return magnitude * 0x1p-24 * ((double)w->cols / 16 + 40);
}

/* What the integer kernels may differ by from the exact product: half a step of the activations (the peak that shares their scale
 * / 16256) for each weight, and float roundings. */
static double few_tokens_bound(const struct weight *w, const double *row, const float *x) {
  double steps = 0;
  for (int64_t k = 0; k < w->cols && !weight_is_float(w->type); k += SCALED) {
    int64_t count = w->cols - k < SCALED ? w->cols - k : SCALED;
    double peak = 0, weights = 0;
    for (int64_t i = 0; i < count; i++) {
      peak = fmax(peak, fabs((double)x[k + i]));
      weights += fabs(row[k + i]);
    }
    steps += weights * peak / LARGEST_ACTIVE * 0.5001;
  }
  return steps + rounding_bound(w, row, x);
}

static void check_few_tokens(struct bench *b, enum weight_type type, int64_t rows, int64_t cols, int n) {
  struct random_weight w = random_weight(type, rows, cols, (uint64_t)(rows * 1000 + cols));
  float *x = random_floats((size_t)(n * cols), (uint64_t)n);
  double *exact = dequantized(&w.weight);
  float *y = product(b, &w.weight, NULL, n, x);
  for (int t = 0; t < n; t++)
    for (int64_t r = 0; r < rows; r++) {
      double sum = 0;
      for (int64_t k = 0; k < cols; k++) sum += exact[r * cols + k] * (double)x[t * cols + k];
      double bound = few_tokens_bound(&w.weight, exact + r * cols, x + t * cols);
      if (!(fabs((double)y[t * rows + r] - sum) <= bound))
        fail_msg("%s %s %lldx%lld, token %d of %d, row %lld: %.9g instead of %.9g (+-%.3g)",
                 oscar_isa_name(b->context->options.isa), weight_type_name((int)type), (long long)rows, (long long)cols, t, n,
                 (long long)r, (double)y[t * rows + r], sum, bound);
    }
  free(y);
  free(exact);
  free(x);
  random_weight_free(&w);
}

static void every_kernel_agrees_with_double_precision(void **state) {
  (void)state;
  const size_t stride = (size_t)rounds(3, 1); /* of counts of tokens */
  static const int tokens[] = {1, 2, 3, 4, 5, 6, 7, 8, 9};
  for (size_t i = 0; i < ARRAY_LENGTH(all_levels); i++) {
    struct bench b;
    if (!bench_open(&b, all_levels[i], 2)) continue;
    char text[256];
    b.be->ops->describe(b.be, text, sizeof text);
    printf("%s\n", text);
    for (size_t k = 0; k < ARRAY_LENGTH(all_types); k++) {
      if (test_only_threads() && k % 3 != i % 3) continue;
      enum weight_type type = all_types[k];
      int elements;
      size_t bytes;
      weight_block(type, &elements, &bytes);
      static const int64_t float_cols[] = {1, 15, 33, 64, 201}, block_counts[] = {1, 2, 3, 7, 8, 9, 18};
      bool is_float = elements == 1;
      size_t widths = is_float ? ARRAY_LENGTH(float_cols) : ARRAY_LENGTH(block_counts);
      for (size_t c = 0; c < widths; c++)
        for (size_t t = c % stride; t < ARRAY_LENGTH(tokens); t += stride) {
          int64_t cols = is_float ? float_cols[c] : block_counts[c] * elements;
          check_few_tokens(&b, type, 1, cols, tokens[t]);
          check_few_tokens(&b, type, 5, cols, tokens[t]);
        }
      check_few_tokens(&b, type, 67, 1536, 1);
      check_few_tokens(&b, type, 3, 16384, 30); /* activations in several rounds */
    }
    bench_close(&b);
  }
}

/* Kernels that are given the same quantized activations differ by roundings alone. Rows that are not asked for stay as they are.
 */
static void check_against_portable(struct bench *b, enum weight_type type, int64_t cols, int n) {
  enum { ROWS = 7, FIRST = 1, LAST = 6 };
  struct random_weight w = random_weight(type, ROWS, cols, (uint64_t)cols);
  float *x = random_floats((size_t)(n * cols), (uint64_t)n), y[2][9 * ROWS];
  double *exact = dequantized(&w.weight);
  struct dot_input in = {.cols = cols, .n = n, .x = x, .chunks_per_token = (cols + CHUNK - 1) / CHUNK};
  struct act_chunk *chunks = aligned_alloc(64, (size_t)(n * in.chunks_per_token) * sizeof *chunks);
  assert_non_null(chunks);
  for (int t = 0; t < n; t++)
    for (int64_t k = 0; k < cols; k += CHUNK)
      dot_portable.quantize(x + t * cols + k, cols - k < CHUNK ? (int)(cols - k) : CHUNK,
                            chunks + t * in.chunks_per_token + k / CHUNK);
  in.chunks = chunks;
  for (int i = 0; i < 2 * n * ROWS; i++) y[i / (n * ROWS)][i % (n * ROWS)] = NAN;
  dot_portable.rows[type](&w.weight, FIRST, LAST, &in, y[0]);
  kernels_of(b)->rows[type](&w.weight, FIRST, LAST, &in, y[1]);
  for (int i = 0; i < n * ROWS; i++) {
    int r = i % ROWS, t = i / ROWS;
    if (r < FIRST || r >= LAST)
      assert_true(isnan(y[1][i]));
    else if (!(fabs((double)y[1][i] - (double)y[0][i]) <= 2 * rounding_bound(&w.weight, exact + r * cols, x + t * cols)))
      fail_msg("%s %s, %lld columns, token %d of %d, row %d: %.9g, portable %.9g", kernels_of(b)->name,
               weight_type_name((int)type), (long long)cols, t, n, r, (double)y[1][i], (double)y[0][i]);
  }
  free(chunks);
  free(exact);
  free(x);
  random_weight_free(&w);
}

static void every_kernel_agrees_with_the_portable_one(void **state) {
  (void)state;
  for (size_t i = 0; i < ARRAY_LENGTH(all_levels); i++) {
    struct bench b;
    if (!bench_open(&b, all_levels[i], 1)) continue;
    for (size_t k = 0; k < ARRAY_LENGTH(all_types); k++)
      for (int n = 1; n <= 9; n++) {
        int elements;
        size_t bytes;
        weight_block(all_types[k], &elements, &bytes);
        check_against_portable(&b, all_types[k], elements == 1 ? 261 : elements * 11, n);
        check_against_portable(&b, all_types[k], 768, n);
      }
    bench_close(&b);
  }
}

/* A block of scale one without minimum, so that every product is an integer. */
static void make_integer_blocks(struct random_weight *w) {
  int elements;
  size_t bytes;
  weight_block(w->weight.type, &elements, &bytes);
  uint8_t *data = (uint8_t *)w->mapping + w->mapped_bytes - (size_t)sysconf(_SC_PAGESIZE);
  for (data -= (size_t)(w->weight.rows * (w->weight.cols / elements)) * bytes; w->weight.rows > 0; data += bytes) {
    switch (w->weight.type) {
    case WEIGHT_Q6_K:
      memset(data + 192, 1, 16);
      put_half(data + 208, 1);
      break;
    case WEIGHT_Q4_K:
    case WEIGHT_Q5_K:
      memcpy(data + 4, (const uint8_t[12]){1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1, 1}, 12);
      put_half(data + 2, 0);
      put_half(data, 1);
      break;
    case WEIGHT_Q4_1:
    case WEIGHT_Q5_1:
      put_half(data + 2, 0);
      put_half(data, 1);
      break;
    default:
      put_half(data, 1);
    }
    if (data + bytes == (uint8_t *)w->mapping + w->mapped_bytes - (size_t)sysconf(_SC_PAGESIZE)) break;
  }
}

static void integer_products_are_exact_on_every_instruction_set(void **state) {
  (void)state;
  enum { ROWS = 9, N = 3 };
  for (size_t k = 3; k < ARRAY_LENGTH(all_types); k++) {
    int elements;
    size_t bytes;
    weight_block(all_types[k], &elements, &bytes);
    int cols = elements;
    struct random_weight w = random_weight(all_types[k], ROWS, cols, k);
    make_integer_blocks(&w);
    double *exact = dequantized(&w.weight);
    float x[N * CHUNK];
    uint64_t random = k;
    /* The peak of each run is 16256, so that the step is one; the rest is small, so that sums stay below 2^24. */
    for (int i = 0; i < N * cols; i++) x[i] = i % RUN == i / RUN % RUN ? 16256 : (float)(test_random(&random) % 201) - 100;
    for (size_t i = 0; i < ARRAY_LENGTH(all_levels); i++) {
      struct bench b;
      if (!bench_open(&b, all_levels[i], 1)) continue;
      float *y = product(&b, &w.weight, NULL, N, x);
      for (int t = 0; t < N; t++)
        for (int r = 0; r < ROWS; r++) {
          double sum = 0;
          for (int c = 0; c < cols; c++) sum += exact[r * cols + c] * (double)x[t * cols + c];
          if ((double)y[t * ROWS + r] != sum)
            fail_msg("%s %s: %.9g instead of %.9g", oscar_isa_name(all_levels[i].isa), weight_type_name((int)all_types[k]),
                     (double)y[t * ROWS + r], sum);
        }
      free(y);
      bench_close(&b);
    }
    free(exact);
    random_weight_free(&w);
  }
}

/* All products of a run at their largest, with one sign: integers that are added up in too few bits would saturate or wrap. */
static void the_largest_codes_and_activations_fit(void **state) {
  (void)state;
  enum { ROWS = 9, N = 4, COLS = 2 * CHUNK };
  static const uint8_t bytes[] = {0xFF, 0x80, 0x7F};
  static const float tokens[N][2] = {{1, 1}, {-1, -1}, {-1, -16192.f / 16256}, {16319.f / 16384, 1}}; /* low bytes 0, -64, 63 */
  float x[N * COLS];
  for (int i = 0; i < N * COLS; i++) x[i] = tokens[i / COLS][i % 2];
  for (size_t k = 3; k < ARRAY_LENGTH(all_types); k++)
    for (size_t j = 0; j < ARRAY_LENGTH(bytes); j++) {
      struct random_weight w = random_weight(all_types[k], ROWS, COLS, k);
      memset((uint8_t *)(uintptr_t)w.weight.data, bytes[j], (size_t)ROWS * weight_row_bytes(&w.weight));
      make_integer_blocks(&w);
      double *exact = dequantized(&w.weight);
      for (size_t i = 0; i < ARRAY_LENGTH(all_levels); i++) {
        struct bench b;
        if (!bench_open(&b, all_levels[i], 1)) continue;
        float *y = product(&b, &w.weight, NULL, N, x);
        for (int t = 0; t < N; t++)
          for (int r = 0; r < ROWS; r++) {
            double sum = 0, magnitude = 0;
            for (int c = 0; c < COLS; c++) {
              double term = exact[r * COLS + c] * (double)x[t * COLS + c];
              sum += term;
              magnitude += fabs(term);
            }
            if (!(fabs((double)y[t * ROWS + r] - sum) <= 1e-4 * magnitude))
              fail_msg("%s %s, codes of %#x: %.9g instead of %.9g", oscar_isa_name(all_levels[i].isa),
                       weight_type_name((int)all_types[k]), bytes[j], (double)y[t * ROWS + r], sum);
          }
        free(y);
        bench_close(&b);
      }
      free(exact);
      random_weight_free(&w);
    }
}

static void kernels_are_chosen_by_what_the_cpu_has(void **state) {
  (void)state;
#if defined(__x86_64__)
  struct bench b;
  if (!bench_open(&b, (struct level){.isa = OSCAR_ISA_AVX2}, 1)) skip();
  const struct packed_kernels *chosen[] = {&packed_avx2, &packed_avx_vnni};
  for (int vnni = 0; vnni < 2; vnni++) {
    struct backend *be;
    char text[256];
    b.context->cpu.avx_vnni = vnni;
    assert_ok(b.context, backend_create_cpu(b.context, &be));
    assert_true(cpu_of(be)->packed == chosen[vnni]);
    be->ops->describe(be, text, sizeof text);
    assert_non_null(strstr(text, vnni ? "AVX-VNNI kernels" : "AVX2 kernels"));
    be->ops->free(be);
  }
  bench_close(&b);
#endif
}

static void check_quantized(struct level level, const float *x, int count, const struct act_chunk *plain) {
  struct bench b;
  if (!bench_open(&b, level, 1)) return;
  struct act_chunk other;
  kernels_of(&b)->quantize(x, count, &other);
  assert_memory_equal(plain->high, other.high, sizeof other.high);
  assert_memory_equal(plain->low, other.low, sizeof other.low);
  for (int r = 0; r < CHUNK_RUNS; r++) {
    assert_true(plain->scale[r] == other.scale[r] || (isnan(plain->scale[r]) && isnan(other.scale[r])));
    assert_true(plain->sum[r] == other.sum[r] || (isnan(plain->sum[r]) && isnan(other.sum[r])));
  }
  bench_close(&b);
}

static void activations_are_quantized_to_the_same_bits_everywhere(void **state) {
  (void)state;
  float *x = random_floats(CHUNK, 5);
  x[3] = 1e30f, x[40] = 0, x[70] = -1e-20f, x[90] = nanf("0x12345"), x[130] = -INFINITY;
  for (int i = 160; i < 192; i++) x[i] = i % 2 ? 1e-40f : 0; /* below what is worth scaling */
  static const int counts[] = {1, 17, 100, 255, CHUNK};
  for (size_t i = 0; i < ARRAY_LENGTH(counts); i++) {
    struct act_chunk plain;
    dot_portable.quantize(x, counts[i], &plain);
    for (int k = 0; k < CHUNK; k++) {
      int v = 128 * plain.high[k] + plain.low[k];
      float scale = plain.scale[k / RUN], value = k < counts[i] ? x[k] : 0;
      if (isnan(scale)) {
        assert_true(k / SCALED == 90 / SCALED || k / SCALED == 130 / SCALED);
        assert_true(isnan(plain.sum[k / RUN]));
      } else {
        assert_true(abs(v) <= LARGEST_ACTIVE && plain.low[k] >= -64 && plain.low[k] <= 63);
        assert_true(fabs((double)scale * v - (double)value) <= 0.5001 * (double)scale + 1e-30);
      }
    }
    for (size_t k = 0; k < ARRAY_LENGTH(all_levels); k++) check_quantized(all_levels[k], x, counts[i], &plain);
  }
  free(x);
}

/* Element (row, column) of a stripe is in the block of its 32 columns, at its pair of columns, at its row. */
static void check_stripes(expand_stripe *expand, const struct weight *w, int64_t step, const double *exact) {
  size_t blocks = (size_t)(w->cols + PANEL_COLS - 1) / PANEL_COLS;
  uint16_t *out = malloc(blocks * PANEL_BLOCK * sizeof *out);
  assert_non_null(out);
  for (int64_t first = 0; first < w->rows + STRIPE_ROWS; first += step) {
    int count = first >= w->rows ? 0 : w->rows - first < STRIPE_ROWS ? (int)(w->rows - first) : STRIPE_ROWS;
    memset(out, 0xAB, blocks * PANEL_BLOCK * sizeof *out);
    expand(w, first, count, out);
    for (int64_t k = 0; k < (int64_t)blocks * PANEL_COLS; k++)
      for (int r = 0; r < PANEL_ROWS; r++) {
        uint16_t bits = out[k / PANEL_COLS * PANEL_BLOCK + (k % PANEL_COLS / 2 * PANEL_ROWS + r) * 2 + k % 2];
        float expected = r < count && k < w->cols ? (float)exact[(first + r) * w->cols + k] : 0;
        if (r >= STRIPE_ROWS)
          assert_int_equal(bits, 0xABAB); /* another stripe's */
        else
          assert_true(bf16_to_f32(bits) == bf16_to_f32(f32_to_bf16(expected)));
      }
  }
  free(out);
}

static void expanded_weights_equal_the_definition_bit_for_bit(void **state) {
  (void)state;
  enum { ROWS = 70 };
  for (size_t i = 0; i < ARRAY_LENGTH(all_levels); i++) {
    struct bench b;
    if (!bench_open(&b, all_levels[i], 1)) continue;
    const struct cpu_backend *cpu = cpu_of(b.be);
    for (size_t k = 0; k < ARRAY_LENGTH(all_types); k++) {
      enum weight_type type = all_types[k];
      int elements;
      size_t bytes;
      weight_block(type, &elements, &bytes);
      int64_t cols = elements == 1 ? 37 : elements * 3;
      struct random_weight w = random_weight(type, ROWS, cols, k);
      double *exact = dequantized(&w.weight);
      float *out = malloc((size_t)(ROWS * cols + 1) * sizeof *out);
      assert_non_null(out);
      struct prepared p = prepare(&b, &w.weight);
      const bool packed = p.weight.packed != NULL; /* whose rows begin at groups */
      const int64_t step = packed ? 2 * GROUP_ROWS : 23;
      expand_f32 *expand = packed ? cpu->packed->f32[type] : cpu->kernels->f32[type];
      expand_stripe *stripe = packed ? cpu->packed->stripe[type] : cpu->kernels->stripe[type];
      for (int64_t first = 0; first < ROWS; first += step) {
        int64_t last = first + step < ROWS ? first + step : ROWS;
        out[(last - first) * cols] = 42; /* the next number, which is not theirs */
        expand(&p.weight, first, last, out);
        for (int64_t j = 0; j < (last - first) * cols; j++) assert_true((double)out[j] == exact[first * cols + j]);
        assert_true(out[(last - first) * cols] == 42);
      }
      if (stripe && cpu->base.context->cpu.avx512_bf16) check_stripes(stripe, &p.weight, packed ? GROUP_ROWS : 19, exact);
      prepared_free(&p);
      free(out);
      free(exact);
      random_weight_free(&w);
    }
    bench_close(&b);
  }
}

static bool uses_bf16(const struct bench *b) {
  char text[256];
  b->be->ops->describe(b->be, text, sizeof text);
  return strstr(text, "BF16") != NULL;
}

/*
 * Many tokens: BF16 rounds both factors, each by at most 2^-8 of itself (F32: sums only). The largest error of a result is
 * 2^-7 of the sum of magnitudes; rounding errors are independent, so that together they stay below 2^-8 of the root sum of
 * squares.
 */
static void check_many_tokens(struct bench *b, enum weight_type type, int64_t rows, int64_t cols, int n, int64_t row_step) {
  struct random_weight w = random_weight(type, rows, cols, 11);
  float *x = random_floats((size_t)(n * cols), 12);
  double *exact = dequantized(&w.weight);
  float *y = product(b, &w.weight, NULL, n, x);
  bool bf16 = uses_bf16(b);
  double unit = bf16 ? 0x1p-7 * 1.01 : 0x1p-24 * (double)(cols + 8), errors = 0, squares = 0;
  for (int t = 0; t < n; t++)
    for (int64_t r = 0; r < rows; r += row_step) {
      double sum = 0, magnitude = 0;
      for (int64_t k = 0; k < cols; k++) {
        double term = exact[r * cols + k] * (double)x[t * cols + k];
        sum += term;
        magnitude += fabs(term);
        squares += term * term;
      }
      double error = (double)y[t * rows + r] - sum;
      errors += error * error;
      if (!(fabs(error) <= magnitude * unit))
        fail_msg("%s %s %lldx%lld, token %d of %d, row %lld: %.9g instead of %.9g", oscar_isa_name(b->context->options.isa),
                 weight_type_name((int)type), (long long)rows, (long long)cols, t, n, (long long)r, (double)y[t * rows + r], sum);
    }
  if (bf16) assert_true(sqrt(errors) <= 0x1p-8 * sqrt(squares));
  free(y);
  free(exact);
  free(x);
  random_weight_free(&w);
}

static void many_tokens_agree_with_double_precision(void **state) {
  (void)state;
  for (size_t i = 0; i < ARRAY_LENGTH(all_levels); i++) {
    struct bench b;
    if (!bench_open(&b, all_levels[i], 2)) continue;
    for (size_t k = 0; k < ARRAY_LENGTH(all_types); k++) {
      if (test_only_threads() && k % 3 != i % 3) continue;
      int elements;
      size_t bytes;
      weight_block(all_types[k], &elements, &bytes);
      check_many_tokens(&b, all_types[k], 1, elements == 1 ? 5 : elements, 64, 1);
      check_many_tokens(&b, all_types[k], 131, elements == 1 ? 37 : elements * 3, 65, 1);
    }
    check_many_tokens(&b, WEIGHT_Q4_K, 192, 512, 33, 1);
    check_many_tokens(&b, WEIGHT_Q4_1, 100, 576, 512, 1);
    bench_close(&b);
  }
}

/* oneDNN multiplies BF16 also where it is slow, so that a CPU with AMX can be stood in for. */
static bool bench_open_bf16(struct bench *b, int threads) {
  if (!bench_open(b, best_level, threads)) return false;
  b->context->cpu.amx_bf16 = true;
  if (uses_bf16(b)) return true;
  bench_close(b);
  return false;
}

static void bf16_products_keep_their_bound(void **state) {
  (void)state;
  struct bench b;
  if (!bench_open_bf16(&b, 2)) skip();
  for (size_t k = 0; k < ARRAY_LENGTH(all_types); k++) {
    int elements;
    size_t bytes;
    weight_block(all_types[k], &elements, &bytes);
    check_many_tokens(&b, all_types[k], 1, elements == 1 ? 5 : elements, 64, 1);
    check_many_tokens(&b, all_types[k], 131, elements == 1 ? 37 : elements * 3, 65, 1);
  }
  check_many_tokens(&b, WEIGHT_Q4_1, 100, 576, 512, 1);
  check_many_tokens(&b, WEIGHT_Q8_0, 1100, 8192, 64, 61);
  bench_close(&b);
}

/* As many tokens at a time as a panel is multiplied with, and a few more, which are a product of their own. */
enum { MOST_TOGETHER = 512, MORE = 9 };

/* Each token's row has the bits that it has among all, in whatever company, by any number of threads. */
static void check_company(struct bench *b, enum weight_type type, int64_t rows, int64_t cols, int step, int small_step) {
  struct random_weight w = random_weight(type, rows, cols, 21);
  float *x = random_floats((size_t)((MOST_TOGETHER + MORE) * cols), 22);
  b->be->rounding = ROUND_AS_MANY;
  float *all = product(b, &w.weight, NULL, MOST_TOGETHER + MORE, x);
  uint64_t random = 23;
  for (int n = 1; n <= MOST_TOGETHER; n += n < 72 ? small_step : step) { /* past the largest blocks of tokens in smaller steps */
    const int64_t first = (int64_t)(test_random(&random) % (uint64_t)(MOST_TOGETHER + MORE - n + 1));
    cpu_of(b->be)->threads = 1 + n % 2;
    float *some = product(b, &w.weight, NULL, n, x + first * cols);
    for (int64_t i = 0; i < n * rows; i++)
      if (memcmp(&some[i], &all[first * rows + i], sizeof *some) != 0)
        fail_msg("%s %s %lldx%lld: token %lld, row %lld of %d: %.9g, among all %.9g", oscar_isa_name(b->context->options.isa),
                 weight_type_name((int)type), (long long)rows, (long long)cols, (long long)(first + i / rows),
                 (long long)(i % rows), n, (double)some[i], (double)all[first * rows + i]);
    free(some);
  }
  free(all);
  free(x);
  random_weight_free(&w);
}

static void a_token_does_not_depend_on_how_many_are_multiplied_with_it(void **state) {
  (void)state;
  static const struct level levels[] = {{.isa = OSCAR_ISA_PORTABLE}, {.isa = OSCAR_ISA_AUTO, .packed = true}};
  for (size_t i = 0; i <= ARRAY_LENGTH(levels); i++) {
    struct bench b;
    const bool bf16 = i == ARRAY_LENGTH(levels);
    if (bf16 ? !bench_open_bf16(&b, 2) : !bench_open(&b, levels[i], 2)) continue;
    check_company(&b, WEIGHT_F32, 64, 576, rounds(89, 17), rounds(5, 1));
    check_company(&b, WEIGHT_Q8_0, 96, 1536, rounds(149, 41), 13);
    check_company(&b, WEIGHT_BF16, 131, 37, rounds(89, 29), rounds(5, 1));
    bench_close(&b);
  }
}

static void weights_larger_than_a_panel_are_multiplied_in_parts(void **state) {
  (void)state;
  for (size_t i = 0; i < ARRAY_LENGTH(all_levels); i++) {
    struct bench b;
    if (all_levels[i].isa == OSCAR_ISA_PORTABLE || !bench_open(&b, all_levels[i], 2)) continue;
    check_many_tokens(&b, WEIGHT_Q8_0, 1100, 8192, 64, 61);
    bench_close(&b);
    if (test_only_threads()) break;
  }
}

static void all_weights_of_a_call_share_the_input_and_take_their_own_bias(void **state) {
  (void)state;
  enum { N = 70, COLS = 512, COUNT = 4 };
  static const enum weight_type types[COUNT] = {WEIGHT_Q4_K, WEIGHT_F32, WEIGHT_Q6_K, WEIGHT_Q4_1};
  static const int64_t rows[COUNT] = {37, 1, 130, 5};
  static const int tokens[] = {1, 3, N};
  struct bench b;
  assert_true(bench_open(&b, best_level, 2));
  struct random_weight w[COUNT];
  struct prepared prepared[COUNT];
  const struct weight *pointers[COUNT];
  float *bias[COUNT], *together[COUNT], *x = random_floats(N * COLS, 3);
  const float *given[COUNT];
  for (int i = 0; i < COUNT; i++) {
    w[i] = random_weight(types[i], rows[i], COLS, (uint64_t)i);
    prepared[i] = prepare(&b, &w[i].weight);
    pointers[i] = &prepared[i].weight;
    bias[i] = random_floats((size_t)rows[i], 9);
    given[i] = i == 2 ? NULL : bias[i];
    together[i] = malloc((size_t)(N * rows[i]) * sizeof(float));
    assert_non_null(together[i]);
  }
  for (size_t k = 0; k < ARRAY_LENGTH(tokens); k++) {
    int n = tokens[k];
    assert_ok(b.context, b.be->ops->matmul(b.be, COUNT, pointers, given, n, x, together));
    for (int i = 0; i < COUNT; i++) {
      float *alone = product(&b, pointers[i], NULL, n, x);
      for (int64_t j = 0; j < n * rows[i]; j++)
        assert_true(together[i][j] == (given[i] ? alone[j] + bias[i][j % rows[i]] : alone[j]));
      free(alone);
    }
  }
  for (int i = 0; i < COUNT; i++) {
    free(bias[i]);
    free(together[i]);
    prepared_free(&prepared[i]);
    random_weight_free(&w[i]);
  }
  free(x);
  bench_close(&b);
}

static void results_do_not_depend_on_threads_or_neighbouring_tokens(void **state) {
  (void)state;
  enum { ROWS = 177, N = 9 };
  for (size_t i = 0; i < ARRAY_LENGTH(all_levels); i++) {
    struct bench one, two;
    if (!bench_open(&one, all_levels[i], 1)) continue;
    assert_true(bench_open(&two, all_levels[i], 3));
    const int n = all_levels[i].isa == OSCAR_ISA_PORTABLE ? 3 : N; /* few for its kernels */
    for (size_t k = 0; k < ARRAY_LENGTH(all_types); k++) {
      int64_t cols = 768;
      struct random_weight w = random_weight(all_types[k], ROWS, cols, k);
      float *x = random_floats((size_t)(n * cols), 8);
      float *a = product(&one, &w.weight, NULL, n, x), *b = product(&two, &w.weight, NULL, n, x);
      assert_memory_equal(a, b, (size_t)(n * ROWS) * sizeof *a);
      for (int t = 0; t < n; t++) {
        float *alone = product(&one, &w.weight, NULL, 1, x + t * cols);
        assert_memory_equal(alone, a + t * ROWS, (size_t)ROWS * sizeof *a);
        free(alone);
      }
      free(a);
      free(b);
      free(x);
      random_weight_free(&w);
    }
    bench_close(&one);
    bench_close(&two);
  }
}

static const float not_finite[] = {NAN, INFINITY, -INFINITY};

static bool is_finite(float x) { return !isnan(x) && !isinf(x); }

static void non_finite_activations_reach_the_results_of_their_token(void **state) {
  (void)state;
  enum { N = 3, ROWS = 3, BAD_TOKEN = 1 };
  for (size_t i = 0; i < ARRAY_LENGTH(all_levels); i++) {
    struct bench b;
    if (!bench_open(&b, all_levels[i], 1)) continue;
    for (size_t k = 0; k < ARRAY_LENGTH(all_types); k++)
      for (size_t j = 0; j < ARRAY_LENGTH(not_finite); j++) {
        struct random_weight w = random_weight(all_types[k], ROWS, 256, k);
        float *x = random_floats((size_t)N * 256, 8);
        x[BAD_TOKEN * 256 + 100] = not_finite[j];
        float *y = product(&b, &w.weight, NULL, N, x);
        for (int t = 0; t < N; t++)
          for (int r = 0; r < ROWS; r++) assert_true(is_finite(y[t * ROWS + r]) == (t != BAD_TOKEN));
        free(y);
        free(x);
        random_weight_free(&w);
      }
    bench_close(&b);
  }
}

/* The scale of the first block of a row, or its minimum; of float weights, the first element. */
static void put_non_finite(struct random_weight *w, int64_t row, bool minimum, float value) {
  int elements;
  size_t bytes;
  weight_block(w->weight.type, &elements, &bytes);
  size_t last_page = (size_t)sysconf(_SC_PAGESIZE), row_bytes = (size_t)(w->weight.cols / elements) * bytes;
  uint8_t *block = (uint8_t *)w->mapping + w->mapped_bytes - last_page - (size_t)(w->weight.rows - row) * row_bytes;
  uint16_t brain = f32_to_bf16(value);
  if (w->weight.type == WEIGHT_F32)
    memcpy(block, &value, sizeof value);
  else if (w->weight.type == WEIGHT_BF16)
    memcpy(block, &brain, sizeof brain);
  else
    put_half(block + (w->weight.type == WEIGHT_Q6_K ? 208 : minimum ? 2 : 0), value);
}

static bool has_minimum(enum weight_type type) {
  return type == WEIGHT_Q4_1 || type == WEIGHT_Q5_1 || type == WEIGHT_Q4_K || type == WEIGHT_Q5_K;
}

static void non_finite_weights_reach_the_results_of_their_row(void **state) {
  (void)state;
  enum { N = 3, ROWS = 5, BAD_ROW = 2 };
  for (size_t i = 0; i < ARRAY_LENGTH(all_levels); i++) {
    struct bench b;
    if (!bench_open(&b, all_levels[i], 1)) continue;
    for (size_t k = 0; k < ARRAY_LENGTH(all_types); k++)
      for (size_t j = 0; j < ARRAY_LENGTH(not_finite) * (has_minimum(all_types[k]) ? 2 : 1); j++) {
        int64_t cols = 512;
        struct random_weight w = random_weight(all_types[k], ROWS, cols, k);
        put_non_finite(&w, BAD_ROW, j >= ARRAY_LENGTH(not_finite), not_finite[j % ARRAY_LENGTH(not_finite)]);
        float *x = random_floats((size_t)(N * cols), 8);
        float *y = product(&b, &w.weight, NULL, N, x);
        for (int t = 0; t < N; t++)
          for (int r = 0; r < ROWS; r++) assert_true(is_finite(y[t * ROWS + r]) == (r != BAD_ROW));
        free(y);
        free(x);
        random_weight_free(&w);
      }
    bench_close(&b);
  }
}

static void embedding_rows_are_dequantized(void **state) {
  (void)state;
  enum { ROWS = 12, N = 4 };
  static const int32_t ids[N] = {11, 0, 5, 5};
  for (size_t i = 0; i < ARRAY_LENGTH(all_levels); i++) {
    struct bench b;
    if (!bench_open(&b, all_levels[i], 1)) continue;
    for (size_t k = 0; k < ARRAY_LENGTH(all_types); k++) {
      int64_t cols = 512;
      struct random_weight w = random_weight(all_types[k], ROWS, cols, k);
      double *exact = dequantized(&w.weight);
      float *y = malloc((size_t)(N * cols) * sizeof *y);
      assert_non_null(y);
      assert_ok(b.context, b.be->ops->embed(b.be, &w.weight, N, ids, y));
      for (int t = 0; t < N; t++)
        for (int64_t c = 0; c < cols; c++) assert_true((double)y[t * cols + c] == exact[ids[t] * cols + c]);
      assert_int_equal(b.be->ops->embed(b.be, &w.weight, 1, (const int32_t[]){ROWS}, y), OSCAR_INVALID_ARGUMENT);
      assert_int_equal(b.be->ops->embed(b.be, &w.weight, 1, (const int32_t[]){-1}, y), OSCAR_INVALID_ARGUMENT);
      free(y);
      free(exact);
      random_weight_free(&w);
    }
    bench_close(&b);
  }
}

static void unusable_weights_are_refused_by_name(void **state) {
  (void)state;
  struct bench b;
  assert_true(bench_open(&b, best_level, 1));
  float zeros[512] = {0}, out[4];
  const struct {
    struct weight weight;
    oscar_status expected;
  } cases[] = {
      {{.name = "blk.0.q", .type = (enum weight_type)10, .rows = 1, .cols = 256, .data = zeros}, OSCAR_UNSUPPORTED},
      {{.name = "blk.0.q", .type = (enum weight_type)9999, .rows = 1, .cols = 256, .data = zeros}, OSCAR_UNSUPPORTED},
      {{.name = "blk.0.q", .type = (enum weight_type) - 1, .rows = 1, .cols = 256, .data = zeros}, OSCAR_UNSUPPORTED},
      {{.name = "blk.0.q", .type = WEIGHT_Q4_K, .rows = 1, .cols = 288, .data = zeros}, OSCAR_FORMAT},
      {{.name = "blk.0.q", .type = WEIGHT_Q4_0, .rows = 1, .cols = 33, .data = zeros}, OSCAR_FORMAT},
      {{.name = "blk.0.q", .type = WEIGHT_F32, .rows = 0, .cols = 4, .data = zeros}, OSCAR_FORMAT},
      {{.name = "blk.0.q", .type = WEIGHT_F32, .rows = 4, .cols = 4}, OSCAR_FORMAT},
      {{.name = "blk.0.q", .type = WEIGHT_F32, .rows = 4, .cols = (int64_t)1 << 40, .data = zeros}, OSCAR_FORMAT},
  };
  for (size_t i = 0; i < ARRAY_LENGTH(cases); i++) {
    const struct weight *w = &cases[i].weight;
    float *y = out;
    assert_int_equal(b.be->ops->weight_check(b.be, w), cases[i].expected);
    assert_non_null(strstr(oscar_last_error(b.context), "blk.0.q"));
    assert_int_equal(b.be->ops->matmul(b.be, 1, &w, NULL, 1, zeros, &y), cases[i].expected);
  }
  const struct weight narrow = {.name = "narrow", .type = WEIGHT_F32, .rows = 4, .cols = 4, .data = zeros};
  const struct weight wide = {.name = "wide", .type = WEIGHT_F32, .rows = 4, .cols = 8, .data = zeros};
  const struct weight *both[] = {&narrow, &wide};
  float *ys[] = {out, out};
  assert_int_equal(b.be->ops->matmul(b.be, 2, both, NULL, 1, zeros, ys), OSCAR_INVALID_ARGUMENT);
  assert_non_null(strstr(oscar_last_error(b.context), "wide"));
  assert_ok(b.context, b.be->ops->matmul(b.be, 1, both, NULL, 0, zeros, ys));
  bench_close(&b);
}

/* ---- memory running out ---- */

struct budget {
  int left, live;
};
static void *budget_alloc(void *user, size_t bytes, size_t alignment) {
  struct budget *budget = user;
  if (budget->left == 0) return NULL;
  budget->left--;
  budget->live++;
  return aligned_alloc(alignment, round_up(bytes, alignment));
}
static void budget_free(void *user, void *pointer) {
  ((struct budget *)user)->live--;
  free(pointer);
}

static oscar_status use_backend(oscar_context *context, const struct weight *w, int n, const float *x, float *y) {
  struct backend *be;
  oscar_status status = backend_create_cpu(context, &be);
  if (status != OSCAR_OK) return status;
  float *buffer;
  status = be->ops->buffer_alloc(be, 100, &buffer);
  if (status == OSCAR_OK) be->ops->buffer_free(be, buffer);
  if (status == OSCAR_OK) status = be->ops->matmul(be, 1, &w, NULL, 1, x, &y);
  if (status == OSCAR_OK) status = be->ops->matmul(be, 1, &w, NULL, n, x, &y);
  if (status == OSCAR_NO_MEMORY) {
    ((struct budget *)context->options.alloc_user)->left = 1000; /* the backend goes on when there is memory again */
    assert_ok(context, be->ops->matmul(be, 1, &w, NULL, n, x, &y));
  }
  be->ops->free(be);
  return status;
}

static void check_budgets(bool bf16) {
  enum { N = 33, ROWS = 320, COLS = 8192 }; /* more than a panel */
  struct random_weight w = random_weight(WEIGHT_Q4_K, ROWS, COLS, 1);
  float *x = random_floats(N * COLS, 8), *y = malloc(N * ROWS * sizeof *y);
  assert_non_null(y);
  oscar_status status = OSCAR_NO_MEMORY;
  for (int allowed = 0; status == OSCAR_NO_MEMORY; allowed++) {
    assert_true(allowed < 100);
    struct budget budget = {.left = 1};
    oscar_context_options options;
    oscar_context_options_default(&options);
    options.threads = 2;
    options.alloc = budget_alloc;
    options.free = budget_free;
    options.alloc_user = &budget;
    oscar_context *context;
    assert_int_equal(oscar_context_create(&options, &context), OSCAR_OK);
    context->cpu.amx_bf16 = context->cpu.wide_bf16 = bf16;
    budget.left = allowed;
    status = use_backend(context, &w.weight, N, x, y);
    if (status != OSCAR_OK) assert_non_null(strstr(oscar_last_error(context), "memory"));
    oscar_context_free(context);
    assert_int_equal(budget.live, 0);
  }
  assert_int_equal(status, OSCAR_OK);
  free(y);
  free(x);
  random_weight_free(&w);
}

static void running_out_of_memory_is_survived(void **state) {
  (void)state;
  check_budgets(false);
  check_budgets(true);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(every_kernel_agrees_with_double_precision),
      cmocka_unit_test(every_kernel_agrees_with_the_portable_one),
      cmocka_unit_test(integer_products_are_exact_on_every_instruction_set),
      cmocka_unit_test(the_largest_codes_and_activations_fit),
      cmocka_unit_test(kernels_are_chosen_by_what_the_cpu_has),
      cmocka_unit_test(activations_are_quantized_to_the_same_bits_everywhere),
      cmocka_unit_test(expanded_weights_equal_the_definition_bit_for_bit),
      cmocka_unit_test(many_tokens_agree_with_double_precision),
      cmocka_unit_test(bf16_products_keep_their_bound),
      cmocka_unit_test(a_token_does_not_depend_on_how_many_are_multiplied_with_it),
      cmocka_unit_test(weights_larger_than_a_panel_are_multiplied_in_parts),
      cmocka_unit_test(all_weights_of_a_call_share_the_input_and_take_their_own_bias),
      cmocka_unit_test(results_do_not_depend_on_threads_or_neighbouring_tokens),
      cmocka_unit_test(non_finite_activations_reach_the_results_of_their_token),
      cmocka_unit_test(non_finite_weights_reach_the_results_of_their_row),
      cmocka_unit_test(embedding_rows_are_dequantized),
      cmocka_unit_test(unusable_weights_are_refused_by_name),
      cmocka_unit_test(running_out_of_memory_is_survived),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
