/* The kernels of every instruction set on one page, against sums in double precision over the layout page_form.h states. */
#include "support.h"

#include "attention/kernels.h"

static const struct attention_kernels *tables[5];
static int table_count;
static const struct page_kernels *pages[8];
static int page_count;

#if defined(__x86_64__)
extern const struct attention_kernels attention_kernels_emulated_avx_vnni;
#endif

static void add_table(const struct attention_kernels *table) {
  for (int i = 0; i < table_count; i++)
    if (tables[i] == table) return;
  tables[table_count++] = table;
  pages[page_count++] = &table->pages;
}

/* The tables this CPU can run. */
static int find_tables(void **state) {
  (void)state;
  for (int isa = OSCAR_ISA_PORTABLE; isa <= OSCAR_ISA_NEON_DOT; isa++) {
    oscar_context_options options;
    oscar_context_options_default(&options);
    options.isa = (oscar_isa)isa;
    oscar_context *context;
    if (oscar_context_create(&options, &context) != OSCAR_OK) continue;
    add_table(attention_kernels_for(&context->cpu));
    oscar_context_free(context);
  }
#if defined(__x86_64__)
  struct cpu_features cpu;
  cpu_detect(&cpu);
  if (cpu_has(&cpu, OSCAR_ISA_AVX2)) add_table(&attention_kernels_avx2); /* where AVX-VNNI is preferred too */
  if (cpu_has(&cpu, OSCAR_ISA_AVX512)) add_table(&attention_kernels_emulated_avx_vnni);
  if (cpu.avx512_bf16 && cpu.avx512_vbmi) {
    pages[page_count++] = &page_kernels_avx512_bf16;
    pages[page_count++] = &page_kernels_vector_tiles;
  }
  if (cpu.avx512_bf16 && cpu.avx512_vbmi && cpu.amx_bf16) pages[page_count++] = &page_kernels_amx;
#endif
  return 0;
}

/* Kernels that count in BF16 are held to what its 8 bits allow, or the 16 bits of two of them. */
static bool in_bf16(const struct page_kernels *k) { return k->row_block > 1; }
static int rows_written(const struct page_kernels *k, int rows) { return (int)round_up((size_t)rows, (size_t)k->row_block); }
static void begin(const struct page_kernels *k) {
  if (k->begin) k->begin();
}
static void end(const struct page_kernels *k) {
  if (k->end) k->end();
}

static void *aligned(size_t bytes) {
  void *p = aligned_alloc(64, round_up(bytes + 64, 64));
  assert_non_null(p);
  memset(p, 0, bytes);
  return p;
}

static const int row_counts[] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 16, 31, 64};
static const int dims[] = {16, 48, 64, 80, 96, 128, 256};
static const struct side_form forms[] = {
    {16, 1, 1, 0},  {16, 1, 2, 0},  {48, 3, 2, 0},   {64, 1, 2, 0},    {64, 4, 2, 0},    {80, 1, 1, 0},  {80, 5, 1, 0},
    {96, 3, 2, 0},  {96, 2, 1, 0},  {128, 1, 1, 0},  {128, 1, 2, 0},   {128, 4, 1, 0},   {128, 8, 2, 0}, {112, 1, 1, 0},
    {256, 1, 2, 0}, {256, 8, 2, 0}, {512, 1, 2, 0},  {240, 5, 1, 0},   {1024, 32, 2, 0}, {48, 3, 0, 0},  {64, 4, 0, 32},
    {80, 4, 0, 9},  {112, 3, 0, 1}, {128, 4, 0, 64}, {128, 1, 0, 128}, {240, 2, 2, 0}};

static void fill(uint64_t *seed, int n, float scale, float *x) {
  for (int i = 0; i < n; i++) x[i] = scale * test_normal(seed);
}

/* Random codes; scales around 1 and zeros around 1.5, as fp16. */
static uint8_t *random_side(uint64_t *seed, const struct side_form *f) {
  uint8_t *side = aligned(side_bytes(f));
  for (size_t i = 0; i < side_code_bytes(f); i++) side[i] = (uint8_t)test_random(seed);
  uint16_t *meta = (uint16_t *)(void *)(side + side_code_bytes(f));
  for (int i = 0; f->meta_values == 0 && i < PAGE_TOKENS; i++) meta[i] = (uint16_t)test_random(seed);
  for (int i = 0; i < 4 * f->groups * f->meta_values * 16; i++) {
    bool zero = f->meta_values == 2 && i / 16 % 2;
    meta[i] = f32_to_f16((float)(zero ? 3 * test_uniform(seed) : exp(test_uniform(seed) - .5)));
  }
  return side;
}

static double meta_value(const struct side_form *f, const uint8_t *side, int token, int group, int value) {
  if (f->meta_values == 0 && value == 0) {
    const uint8_t *word = side + side_code_bytes(f) + 2 * token;
    return pow(2, (((word[0] | word[1] << 8) >> 4 * group & 15) - 8) / 4.0);
  }
  if (value == 1 && f->meta_values != 2) return 1;
  size_t at = side_code_bytes(f) + 2 * (size_t)(((token / 16 * f->groups + group) * f->meta_values + value) * 16 + token % 16);
  return (double)f16_to_f32((uint16_t)(side[at] | side[at + 1] << 8));
}

/* First crumb of a group: block p (C/16) div groups. */
static int begin_of(const struct side_form *f, int group) { return group * (f->crumbs / 16) / f->groups * 16; }

static int group_of(const struct side_form *f, int c) {
  int group = 0;
  while (begin_of(f, group + 1) <= c) group++;
  return group;
}

/* "byte k of a lane, bits 2j, is crumb 16 g + 4 j + k of that token" */
static int key_crumb(const struct side_form *f, const uint8_t *side, int token, int c) {
  int g = c / 16, j = c % 16 / 4, k = c % 4;
  return side[((token / 16 * (f->crumbs / 16) + g) * 16 + token % 16) * 4 + k] >> 2 * j & 3;
}

/* "byte k, bits 2j, is that crumb of token 4 j + k of the tile" */
static int value_crumb(const struct side_form *f, const uint8_t *side, int token, int c) {
  int j = token % 16 / 4, k = token % 4;
  return side[((token / 16 * (f->crumbs / 16) + c / 16) * 16 + c % 16) * 4 + k] >> 2 * j & 3;
}

/* The largest difference, relative to the root mean square of the truth. */
static double relative_error(int rows, int n, const float *x, int stride, const double *truth) {
  double worst = 0, energy = 0;
  for (int r = 0; r < rows; r++)
    for (int i = 0; i < n; i++) {
      double e = fabs((double)x[r * stride + i] - truth[r * n + i]);
      if (!(e <= worst)) worst = e;
      energy += truth[r * n + i] * truth[r * n + i];
    }
  return worst / (sqrt(energy / (rows * n)) + 1e-300);
}

static void check(double error, double bound, const char *what, const char *isa, int rows, int size) {
  if (!(error <= bound))
    fail_msg("%s on %s, %d rows, size %d: relative error %g, expected at most %g", what, isa, rows, size, error, bound);
}

static void coded_scores_follow_their_definition(void **state) {
  (void)state;
  uint64_t seed = 1;
  double worst[ARRAY_LENGTH(pages)] = {0};
  for (size_t i = 0; i < ARRAY_LENGTH(forms); i++) {
    const struct side_form *f = forms + i;
    int width = form_rows(f);
    uint8_t *side = random_side(&seed, f);
    float *mapped = aligned(sizeof(float) * MAX_ROWS * (size_t)width), *q = aligned(sizeof(float) * MAX_ROWS * 16);
    float *scores = aligned(sizeof(float) * MAX_ROWS * PAGE_TOKENS);
    double *truth = aligned(sizeof(double) * MAX_ROWS * PAGE_TOKENS);
    fill(&seed, MAX_ROWS * width, 1, mapped);
    for (int r = 0; r < MAX_ROWS; r++) {
      for (int c = 0; c < f->crumbs; c++) mapped[r * width + c] *= c % 7 == 3 ? 16 : 1; /* digits weigh up to 4^j */
      for (int p = 0; p < f->groups && f->meta_values < 2; p++) { /* as a map has it: crumbs are counted from 1.5 */
        double sum = 0;
        for (int c = begin_of(f, p); c < begin_of(f, p + 1); c++) sum += (double)mapped[r * width + c];
        mapped[r * width + f->crumbs + p] = (float)(1.5 * sum);
      }
    }
    for (int r = 0; r < MAX_ROWS; r++)
      for (int t = 0; t < PAGE_TOKENS; t++) {
        const float *row = mapped + r * width;
        double score = (double)row[f->crumbs + f->groups];
        for (int p = 0; p < f->groups; p++) {
          double dot = 0;
          for (int c = begin_of(f, p); c < begin_of(f, p + 1); c++) dot += (double)row[c] * key_crumb(f, side, t, c);
          score += meta_value(f, side, t, p, 0) * (dot - meta_value(f, side, t, p, 1) * (double)row[f->crumbs + p]);
        }
        truth[r * PAGE_TOKENS + t] = score;
      }
    for (int k = 0; k < page_count; k++)
      for (size_t n = 0; n < ARRAY_LENGTH(row_counts); n++) {
        int rows = row_counts[n];
        size_t stride = pages[k]->prepared_bytes(16, f);
        uint8_t *prepared = aligned((size_t)rows_written(pages[k], rows) * stride);
        float *panel = aligned(pages[k]->panel_bytes(16, f, NULL));
        struct query_rows queries = {rows, 16, q, mapped, prepared, stride};
        begin(pages[k]);
        pages[k]->prepare_queries(&queries, f, prepared);
        memset(scores, 0xFF, sizeof(float) * MAX_ROWS * PAGE_TOKENS);
        pages[k]->score_coded(&queries, f, side, scores, panel);
        end(pages[k]);
        double error = relative_error(rows, PAGE_TOKENS, scores, PAGE_TOKENS, truth);
        check(error, k > 0 ? 6e-4 : 1e-5, "coded scores", pages[k]->name, rows, f->crumbs);
        if (error > worst[k]) worst[k] = error;
        free(prepared), free(panel);
      }
    free(side), free(mapped), free(q), free(scores), free(truth);
  }
  for (int k = 0; k < page_count; k++)
    printf("  %s: largest error of a coded score %.2g of the scores' rms\n", pages[k]->name, worst[k]);
}

/* Without a stored z only A - 1.5 Z is defined (kernels.h): a row of sums with that in the place of A, and no Z. */
static void centre(const struct side_form *f, double *row) {
  for (int c = 0; c < f->crumbs; c++) row[c] += 1.5 * row[f->crumbs + group_of(f, c)];
  for (int g = 0; g < f->groups; g++) row[f->crumbs + g] = 0;
}

static void coded_values_follow_their_definition(void **state) {
  (void)state;
  uint64_t seed = 2;
  double worst[ARRAY_LENGTH(pages)] = {0};
  for (size_t i = 0; i < ARRAY_LENGTH(forms); i++) {
    const struct side_form *f = forms + i;
    int width = form_rows(f), stride = width + 16;
    uint8_t *side = random_side(&seed, f);
    float *p = aligned(sizeof(float) * MAX_ROWS * PAGE_TOKENS);
    float *out = aligned(sizeof(float) * MAX_ROWS * (size_t)stride);
    double *truth = aligned(sizeof(double) * MAX_ROWS * (size_t)width);
    for (int r = 0; r < MAX_ROWS; r++)
      for (int t = 0; t < PAGE_TOKENS; t++) /* flat rows, peaked rows, rows without a token */
        p[r * PAGE_TOKENS + t] = r % 8 == 7 ? 0 : (float)exp((r % 3 * 4 + 1) * -test_uniform(&seed));
    for (int r = 0; r < MAX_ROWS; r++)
      for (int t = 0; t < PAGE_TOKENS; t++) {
        double weight = (double)p[r * PAGE_TOKENS + t], *row = truth + r * width;
        for (int c = 0; c < f->crumbs; c++)
          row[c] += weight * meta_value(f, side, t, group_of(f, c), 0) * value_crumb(f, side, t, c);
        for (int g = 0; g < f->groups; g++)
          row[f->crumbs + g] -= weight * meta_value(f, side, t, g, 0) * meta_value(f, side, t, g, 1);
        row[f->crumbs + f->groups] += weight;
      }
    for (int r = 0; r < MAX_ROWS && f->meta_values < 2; r++) centre(f, truth + r * width);
    for (int k = 0; k < page_count; k++) {
      float *panel = aligned(pages[k]->panel_bytes(16, NULL, f));
      const size_t stride_of_counts = (size_t)rounds(2, 1);
      for (size_t n = (i + (size_t)k) % stride_of_counts; n < ARRAY_LENGTH(row_counts); n += stride_of_counts) {
        int rows = row_counts[n], written = rows_written(pages[k], rows);
        for (int twice = 0; twice < 2; twice++) { /* adds to what is there */
          memset(out, 0, sizeof(float) * MAX_ROWS * (size_t)stride);
          for (int r = 0; r < MAX_ROWS; r++)
            for (int c = width; c < stride; c++) out[r * stride + c] = 7;
          begin(pages[k]);
          for (int j = 0; j <= twice; j++) pages[k]->accumulate_coded(rows, f, p, side, out, stride, panel);
          end(pages[k]);
          for (int r = rows; r < MAX_ROWS; r++)
            for (int c = 0; r >= written && c < width; c++) assert_true(out[r * stride + c] == 0);
          for (int r = 0; r < MAX_ROWS; r++)
            for (int c = width; c < stride; c++) assert_true(out[r * stride + c] == 7);
          for (int r = 0; r < rows; r++)
            for (int c = 0; c < width; c++) out[r * stride + c] /= 1 + (float)twice;
          if (f->meta_values < 2)
            for (int r = 0; r < rows; r++) {
              double row[2048];
              for (int c = 0; c < width; c++) row[c] = (double)out[r * stride + c];
              centre(f, row);
              for (int c = 0; c < width; c++) out[r * stride + c] = (float)row[c];
            }
          double error = relative_error(rows, width, out, stride, truth);
          check(error, in_bf16(pages[k]) ? 2e-2 : k > 0 ? 4e-4 : 2e-5, "coded values", pages[k]->name, rows, f->crumbs);
          if (error > worst[k]) worst[k] = error;
        }
      }
      free(panel);
    }
    free(side), free(p), free(out), free(truth);
  }
  for (int k = 0; k < page_count; k++)
    printf("  %s: largest error of a coded sum %.2g of the sums' rms\n", pages[k]->name, worst[k]);
}

/* The mean's part is sum over pairs of a cos(w t) + b sin(w t) at the tokens' positions t, whatever the kernels make of it. */
static void waves_follow_their_definition(void **state) {
  (void)state;
  static const struct {
    int rotary_dim, pairs;
    double base; /* frequencies base^(-2 i / rotary_dim), as models have them; 0: all kinds of them in no order */
  } cases[] = {{64, 32, 1e5},   {128, 64, 1e6}, {128, 64, 1e4}, {128, 5, 1e6},
               {256, 128, 1e4}, {64, 9, 0},     {128, 64, 0},   {16, 8, 2}};
  oscar_context *context = test_context(OSCAR_ISA_AUTO, 1);
  uint64_t seed = 8;
  double worst[ARRAY_LENGTH(pages)] = {0};
  for (size_t i = 0; i < ARRAY_LENGTH(cases); i++) {
    int pairs = cases[i].pairs, d = cases[i].rotary_dim;
    float frequencies[128], mean[256] = {0}, encode[256 * 16] = {0};
    uint16_t pair[128];
    for (int k = 0; k < d / 2; k++)
      frequencies[k] = cases[i].base > 0 ? (float)pow(cases[i].base, -2.0 * k / d) : (float)exp(-8 * test_uniform(&seed));
    for (int k = 0; k < pairs; k++) pair[k] = (uint16_t)(k + (k > pairs / 2 ? d / 2 - pairs : 0));
    oscar_rope *rope = NULL;
    assert_ok(context, oscar_rope_create(context, &(oscar_rope_spec){OSCAR_ROPE_HALVES, d, frequencies}, &rope));
    oscar_codec *codec = NULL;
    oscar_codec_spec spec = {.head_dim = d,
                             .channels = 16,
                             .groups = 1,
                             .clip_ratio = 1,
                             .encode = encode,
                             .decode = encode,
                             .rope = rope,
                             .rotating_pairs = pairs,
                             .rotating_pair = pair,
                             .rotating_mean = mean};
    assert_ok(context, oscar_codec_create(context, &spec, &codec));
    struct side_form f = side_form_of(codec);
    void *memory = aligned(wave_basis_bytes(oscar_codec_describe(codec)));
    struct wave_basis basis = wave_basis_make(oscar_codec_describe(codec), memory);
    assert_int_equal(basis.pairs, pairs);
    if (cases[i].base > 1e3 && pairs >= 32) assert_true(basis.fast <= pairs / 3);

    int width = form_rows(&f), first = form_rotating_row(&f);
    float *q = aligned(sizeof(float) * (size_t)(MAX_ROWS * d)), *mapped = aligned(sizeof(float) * (size_t)(MAX_ROWS * width));
    float *scores = aligned(sizeof(float) * MAX_ROWS * PAGE_TOKENS), angle[256];
    double *truth = aligned(sizeof(double) * MAX_ROWS * PAGE_TOKENS);
    static const int64_t at_page[] = {0, 1, 77, 12345};
    const size_t stride_of_counts = (size_t)rounds(2, 1);
    for (size_t n = i % stride_of_counts; n < ARRAY_LENGTH(row_counts) * ARRAY_LENGTH(at_page); n += stride_of_counts) {
      int rows = row_counts[n % ARRAY_LENGTH(row_counts)];
      int64_t page = at_page[n / ARRAY_LENGTH(row_counts)];
      fill(&seed, MAX_ROWS * width, 1, mapped);
      for (int k = 0; k < pairs; k++) rope_page_angle(rope, pair[k], page, angle + k, angle + pairs + k);
      for (int r = 0; r < rows; r++)
        for (int t = 0; t < PAGE_TOKENS; t++) {
          double sum = 3;
          for (int k = 0; k < pairs; k++) {
            double x = (double)frequencies[pair[k]] * (double)(page * PAGE_TOKENS + t);
            sum += (double)mapped[r * width + first + k] * cos(x) + (double)mapped[r * width + first + pairs + k] * sin(x);
          }
          truth[r * PAGE_TOKENS + t] = sum;
        }
      for (int k = 0; k < page_count; k++) {
        size_t stride = pages[k]->prepared_bytes(d, &f);
        uint8_t *prepared = aligned((size_t)rows_written(pages[k], rows) * stride);
        float *panel = aligned(pages[k]->panel_bytes(d, &f, NULL));
        struct query_rows queries = {rows, d, q, mapped, prepared, stride};
        for (int j = 0; j < MAX_ROWS * PAGE_TOKENS; j++) scores[j] = 3;
        begin(pages[k]);
        pages[k]->prepare_queries(&queries, &f, prepared);
        pages[k]->score_waves(&queries, &f, &basis, angle, scores, panel);
        end(pages[k]);
        double error = relative_error(rows, PAGE_TOKENS, scores, PAGE_TOKENS, truth);
        check(error, in_bf16(pages[k]) ? 6e-5 : 8e-6, "waves", pages[k]->name, rows, pairs);
        if (error > worst[k]) worst[k] = error;
        for (int j = rows_written(pages[k], rows) * PAGE_TOKENS; j < MAX_ROWS * PAGE_TOKENS; j++) assert_true(scores[j] == 3);
        free(prepared), free(panel);
      }
    }
    free(memory), free(q), free(mapped), free(scores), free(truth);
    oscar_codec_release(codec);
    oscar_rope_release(rope);
  }
  oscar_context_free(context);
  for (int k = 0; k < page_count; k++) printf("  %s: largest error %.2g of the waves' rms\n", pages[k]->name, worst[k]);
}

static void exact_pages_follow_their_definition(void **state) {
  (void)state;
  uint64_t seed = 3;
  for (size_t i = 0; i < ARRAY_LENGTH(dims); i++) {
    int d = dims[i], stride = d + 32;
    float *q = aligned(sizeof(float) * (size_t)(MAX_ROWS * d)), *p = aligned(sizeof(float) * MAX_ROWS * PAGE_TOKENS);
    float *scores = aligned(sizeof(float) * MAX_ROWS * PAGE_TOKENS), *out = aligned(sizeof(float) * (size_t)(MAX_ROWS * stride));
    uint16_t *page = aligned(sizeof(uint16_t) * (size_t)(PAGE_TOKENS * d));
    double *score_truth = aligned(sizeof(double) * MAX_ROWS * PAGE_TOKENS),
           *out_truth = aligned(sizeof(double) * (size_t)(MAX_ROWS * d));
    fill(&seed, MAX_ROWS * d, 1, q);
    fill(&seed, MAX_ROWS * PAGE_TOKENS, 1, p);
    for (int j = 0; j < PAGE_TOKENS * d; j++) page[j] = f32_to_bf16(test_normal(&seed));
    int tokens = (int)i * 9 + 1;
    for (int j = tokens * d; j < PAGE_TOKENS * d; j++) page[j] = 0x7FC0; /* NaN where nothing was written */
    for (int r = 0; r < MAX_ROWS; r++)
      for (int t = 0; t < tokens; t++)
        for (int j = 0; j < d; j++) {
          double x = (double)bf16_to_f32(page[t * d + j]);
          score_truth[r * tokens + t] += (double)q[r * d + j] * x;
          out_truth[r * d + j] += (double)p[r * PAGE_TOKENS + t] * x;
        }
    for (int k = 0; k < page_count; k++)
      for (size_t n = 0; n < ARRAY_LENGTH(row_counts); n++) {
        int rows = row_counts[n], written = rows_written(pages[k], rows);
        size_t prepared_stride = pages[k]->prepared_bytes(d, NULL);
        uint8_t *prepared = aligned((size_t)written * prepared_stride);
        float *panel = aligned(pages[k]->panel_bytes(d, NULL, NULL));
        struct query_rows queries = {rows, d, q, NULL, prepared, prepared_stride};
        memset(out, 0, sizeof(float) * (size_t)(MAX_ROWS * stride));
        begin(pages[k]);
        pages[k]->prepare_queries(&queries, NULL, prepared);
        pages[k]->score_exact(&queries, page, scores, panel);
        pages[k]->accumulate_exact(rows, d, tokens, p, page, out, stride, panel);
        end(pages[k]);
        check(relative_error(rows, tokens, scores, PAGE_TOKENS, score_truth), in_bf16(pages[k]) ? 6e-5 : 4e-6, "exact scores",
              pages[k]->name, rows, d);
        check(relative_error(rows, d, out, stride, out_truth), in_bf16(pages[k]) ? 2e-2 : 4e-6, "exact values", pages[k]->name,
              rows, d);
        for (int r = 0; r < MAX_ROWS; r++)
          for (int c = r < written ? d : 0; c < stride; c++) assert_true(out[r * stride + c] == 0);
        free(prepared), free(panel);
      }
    free(q), free(p), free(scores), free(out), free(page), free(score_truth), free(out_truth);
  }
}

static void matrix_products_follow_their_definition(void **state) {
  (void)state;
  uint64_t seed = 4;
  enum { N = 144, K = 80 };
  float *a = aligned(sizeof(float) * MAX_ROWS * K), *b = aligned(sizeof(float) * N * K), *c = aligned(sizeof(float) * N * K);
  float *out = aligned(sizeof(float) * MAX_ROWS * N);
  double *truth = aligned(sizeof(double) * MAX_ROWS * N);
  fill(&seed, MAX_ROWS * K, 1, a);
  fill(&seed, N * K, 1, b);
  for (int n = 0; n < N; n++)
    for (int k = 0; k < K; k++) c[k * N + n] = b[n * K + k];
  for (int r = 0; r < MAX_ROWS; r++)
    for (int n = 0; n < N; n++)
      for (int k = 0; k < K; k++) truth[r * N + n] += (double)a[r * K + k] * (double)b[n * K + k];
  for (int k = 0; k < table_count; k++)
    for (int rows = 1; rows <= MAX_ROWS; rows++) {
      tables[k]->multiply_transposed(rows, N, K, a, b, out);
      check(relative_error(rows, N, out, N, truth), 4e-6, "product with a transpose", tables[k]->pages.name, rows, N);
      memset(out, 0, sizeof(float) * MAX_ROWS * N);
      tables[k]->multiply_add(rows, N, K, a, K, c, out, N);
      check(relative_error(rows, N, out, N, truth), 4e-6, "product", tables[k]->pages.name, rows, N);
    }
  free(a), free(b), free(c), free(out), free(truth);
}

static void exponentials_are_within_two_units_of_libm(void **state) {
  (void)state;
  for (int k = 0; k < table_count; k++) {
    double worst = 0;
    for (int i = 0; i < 20000; i++) {
      float scores[PAGE_TOKENS], x[PAGE_TOKENS];
      for (int t = 0; t < PAGE_TOKENS; t++) x[t] = scores[t] = t ? -(float)(i * 63 + t - 1) * 7e-5f : 0;
      struct softmax_state s = {.max = -INFINITY, .hi = PAGE_TOKENS};
      tables[k]->softmax(1, scores, &s);
      for (int t = 0; t < PAGE_TOKENS; t++) {
        double truth = exp((double)x[t]);
        if (x[t] < -87.33f) {
          assert_true((double)scores[t] <= truth * 1.0001);
          continue;
        }
        double error = fabs((double)scores[t] - truth) / (ldexp(1, ilogb(truth)) * 0x1p-23);
        if (!(error <= worst)) worst = error;
      }
    }
    printf("  %s: e^x within %.2f ulp\n", tables[k]->pages.name, worst);
    assert_true(worst <= 2);
  }
}

static void softmax_carries_max_and_sum_over_pages(void **state) {
  (void)state;
  enum { PAGES = 6 };
  uint64_t seed = 5;
  for (int k = 0; k < table_count; k++)
    for (int trial = 0; trial < 200; trial++) {
      float scores[PAGES][PAGE_TOKENS], p[PAGE_TOKENS];
      int lo[PAGES], hi[PAGES];
      double max = -INFINITY, sum = 0, weighted = 0;
      for (int page = 0; page < PAGES; page++) {
        lo[page] = (int)(test_random(&seed) % 65);
        hi[page] = trial == 0 ? 0 : (int)(test_random(&seed) % 65); /* ranges may be empty; in trial 0 all are */
        for (int t = 0; t < PAGE_TOKENS; t++) {
          bool seen = t >= lo[page] && t < hi[page];
          scores[page][t] = (float)(trial % 5) * 30 * test_normal(&seed);
          if (seen && (double)scores[page][t] > max) max = (double)scores[page][t];
        }
      }
      struct softmax_state s = {.max = -INFINITY};
      double carried = 0;
      for (int page = 0; page < PAGES; page++) {
        for (int t = lo[page]; t < hi[page]; t++) {
          double e = exp((double)scores[page][t] - max);
          sum += e, weighted += e * (page * 64 + t);
        }
        for (int t = 0; t < PAGE_TOKENS; t++) p[t] = t >= lo[page] && t < hi[page] ? scores[page][t] : NAN;
        s.lo = lo[page], s.hi = hi[page];
        tables[k]->softmax(1, p, &s);
        carried *= (double)s.rescale;
        for (int t = 0; t < PAGE_TOKENS; t++) {
          if (t < lo[page] || t >= hi[page]) assert_true(p[t] == 0);
          carried += (double)p[t] * (page * 64 + t);
        }
      }
      if (isinf(max)) {
        assert_true(isinf(s.max) && s.sum == 0 && carried == 0);
        continue;
      }
      assert_true((double)s.max == max);
      assert_true(fabs((double)s.sum - sum) <= 1e-6 * sum);
      assert_true(fabs(carried - weighted) <= 2e-6 * weighted + 1e-6);
    }
}

static void tables_are_chosen_by_what_the_cpu_has(void **state) {
  (void)state;
  struct cpu_features cpu = {0};
  assert_true(attention_kernels_for(&cpu) == &attention_kernels_portable);
#if defined(__x86_64__)
  cpu.avx_vnni = true;
  assert_true(attention_kernels_for(&cpu) == &attention_kernels_portable);
  cpu.avx2 = cpu.fma = cpu.f16c = true;
  assert_true(attention_kernels_for(&cpu) == &attention_kernels_avx_vnni);
  cpu.avx_vnni = false;
  assert_true(attention_kernels_for(&cpu) == &attention_kernels_avx2);
  cpu.avx512 = cpu.avx_vnni = true;
  assert_true(attention_kernels_for(&cpu) == &attention_kernels_avx512);
#endif
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(coded_scores_follow_their_definition),    cmocka_unit_test(coded_values_follow_their_definition),
      cmocka_unit_test(waves_follow_their_definition),           cmocka_unit_test(exact_pages_follow_their_definition),
      cmocka_unit_test(matrix_products_follow_their_definition), cmocka_unit_test(exponentials_are_within_two_units_of_libm),
      cmocka_unit_test(softmax_carries_max_and_sum_over_pages),  cmocka_unit_test(tables_are_chosen_by_what_the_cpu_has),
  };
  return cmocka_run_group_tests(tests, find_tables, NULL);
}
