/*
 * bench/page_kernels.c - the arithmetic of attention on one page that lies in the CPU's caches, kernel by kernel.
 *
 *   bench_page_kernels [--head-dim D] [--rows R,R,...] [--groups G] [--isa portable|avx2|avx512|neon-dot]
 *
 * One CSV line per table of kernels, number of rows and kernel: ns for the page, and what that is per row and token. The codec is
 * a fitted one's form: D crumbs, G log gains, every pair of the keys turning. `exact` is scores, softmax and sums of an exact
 * page, `coded` the same of a coded one. Medians.
 */
#include "attention/kernels.h"
#include "base/sort.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define REPEATS 31
#define CALLS   20

struct setup {
  int rows, head_dim;
  struct side_form keys, values;
  struct query_rows queries;
  struct wave_basis basis;
  float *angle, *scores, *p, *out, *panel, *mapped;
  uint8_t *side;
  uint16_t *exact;
  struct softmax_state *states;
  int stride;
};

static void *need(size_t bytes) {
  void *p = aligned_alloc(64, round_up(bytes, 64));
  if (!p) exit(1);
  memset(p, 0, round_up(bytes, 64));
  return p;
}

static float random_float(void) {
  static uint64_t seed = 1;
  seed = seed * 6364136223846793005u + 1442695040888963407u;
  return (float)(int32_t)(seed >> 32) * 0x1p-31f;
}

enum kernel { SCORE_EXACT, SUM_EXACT, SCORE_CODED, WAVES, SUM_CODED, SOFTMAX, KERNELS };
static const char *const names[KERNELS] = {"score_exact", "accumulate_exact", "score_coded",
                                           "score_waves", "accumulate_coded", "softmax"};

static void call(enum kernel kernel, const struct attention_kernels *k, const struct page_kernels *pages, struct setup *s) {
  if (kernel == SCORE_EXACT)
    pages->score_exact(&s->queries, s->exact, s->scores, s->panel);
  else if (kernel == SUM_EXACT)
    pages->accumulate_exact(s->rows, s->head_dim, PAGE_TOKENS, s->p, s->exact, s->out, s->stride, s->panel);
  else if (kernel == SCORE_CODED)
    pages->score_coded(&s->queries, &s->keys, s->side, s->scores, s->panel);
  else if (kernel == WAVES)
    pages->score_waves(&s->queries, &s->keys, &s->basis, s->angle, s->scores, s->panel);
  else if (kernel == SUM_CODED)
    pages->accumulate_coded(s->rows, &s->values, s->p, s->side, s->out, s->stride, s->panel);
  else
    k->softmax(s->rows, s->scores, s->states);
}

static double time_kernel(enum kernel kernel, const struct attention_kernels *k, const struct page_kernels *pages,
                          struct setup *s) {
  double times[REPEATS];
  for (int r = 0; r < REPEATS; r++) {
    memset(s->out, 0, sizeof(float) * MAX_ROWS * (size_t)s->stride);
    int64_t start = time_ns();
    for (int i = 0; i < CALLS; i++) call(kernel, k, pages, s);
    times[r] = (double)(time_ns() - start) / CALLS;
  }
  sort_doubles(times, REPEATS);
  return times[REPEATS / 2];
}

static void print_line(const char *table, const struct setup *s, const char *kernel, double ns) {
  printf("%s,%d,%s,%.0f,%.3f\n", table, s->rows, kernel, ns, ns / s->rows / PAGE_TOKENS);
}

static void measure(const struct attention_kernels *k, const struct page_kernels *pages, struct setup *s) {
  size_t stride = pages->prepared_bytes(s->head_dim, &s->keys), panel = pages->panel_bytes(s->head_dim, &s->keys, &s->values);
  uint8_t *prepared = need(MAX_ROWS * stride);
  s->panel = need(panel);
  s->queries.prepared = prepared;
  s->queries.prepared_stride = stride;
  if (pages->begin) pages->begin();
  pages->prepare_queries(&s->queries, &s->keys, prepared);
  double ns[KERNELS];
  for (enum kernel kernel = 0; kernel < KERNELS; kernel++) {
    ns[kernel] = time_kernel(kernel, k, pages, s);
    print_line(pages->name, s, names[kernel], ns[kernel]);
  }
  print_line(pages->name, s, "exact", ns[SCORE_EXACT] + ns[SOFTMAX] + ns[SUM_EXACT]);
  print_line(pages->name, s, "coded", ns[SCORE_CODED] + ns[WAVES] + ns[SOFTMAX] + ns[SUM_CODED]);
  if (pages->end) pages->end();
  free(s->panel), free(prepared);
}

/* A whole number up to 4096; anything else is -1, which no option takes. */
static int number(const char *text) {
  char *end;
  long value = strtol(text, &end, 10);
  return *text && !*end && value >= 0 && value <= 4096 ? (int)value : -1;
}

/* -1: none of that name */
static int isa_named(const char *name) {
  for (int isa = OSCAR_ISA_AUTO; isa <= OSCAR_ISA_NEON_DOT; isa++)
    if (strcmp(name, oscar_isa_name((oscar_isa)isa)) == 0) return isa;
  return -1;
}

int main(int argc, char **argv) {
  int d = 128, groups = 4;
  const char *rows = "1,6,48,64";
  oscar_context_options options;
  oscar_context_options_default(&options);
  for (int i = 1; i < argc; i += 2) {
    const char *value = i + 1 < argc ? argv[i + 1] : "";
    if (!strcmp(argv[i], "--head-dim"))
      d = number(value);
    else if (!strcmp(argv[i], "--groups"))
      groups = number(value);
    else if (!strcmp(argv[i], "--rows"))
      rows = value;
    else if (!strcmp(argv[i], "--isa") && isa_named(value) >= 0)
      options.isa = (oscar_isa)isa_named(value);
    else {
      fprintf(stderr, "usage: bench_page_kernels [--head-dim D] [--rows R,R,...] [--groups 1..4] [--isa NAME]\n");
      return 1;
    }
  }
  if (d < 16 || d > 512 || d % 16 || groups < 1 || groups > 4) {
    fprintf(stderr, "--head-dim: a multiple of 16 up to 512; --groups: 1 .. 4\n");
    return 1;
  }
  oscar_context *context = NULL;
  if (oscar_context_create(&options, &context) != OSCAR_OK) {
    fprintf(stderr, "this CPU lacks %s\n", oscar_isa_name(options.isa));
    return 1;
  }
  float frequencies[256], *mean = need(sizeof(float) * (size_t)d);
  uint16_t pair[256];
  for (int i = 0; i < d / 2; i++) {
    frequencies[i] = (float)pow(1e6, -2.0 * i / d);
    pair[i] = (uint16_t)i;
  }
  oscar_rope *rope = NULL;
  oscar_codec *codec = NULL;
  oscar_rope_spec rope_spec = {OSCAR_ROPE_HALVES, d, frequencies};
  if (oscar_rope_create(context, &rope_spec, &rope) != OSCAR_OK) return 1;
  oscar_codec_spec spec = {.head_dim = d,
                           .channels = d,
                           .form = OSCAR_ROW_LOG_GAINS,
                           .groups = groups,
                           .clip_ratio = 1,
                           .rope = rope,
                           .rotating_pairs = d / 2,
                           .rotating_pair = pair,
                           .rotating_mean = mean};
  if (oscar_codec_create(context, &spec, &codec) != OSCAR_OK) {
    fprintf(stderr, "%s\n", oscar_last_error(context));
    return 1;
  }
  struct setup s = {.head_dim = d, .keys = side_form_of(codec)};
  s.values = s.keys;
  s.values.rotating_pairs = 0;
  s.basis = wave_basis_make(oscar_codec_describe(codec), need(wave_basis_bytes(oscar_codec_describe(codec))));
  s.stride = d + form_rows(&s.values);
  size_t width = (size_t)form_rows(&s.keys);
  float *q = need(sizeof(float) * MAX_ROWS * (size_t)d);
  s.mapped = need(sizeof(float) * MAX_ROWS * width);
  s.angle = need(sizeof(float) * (size_t)d);
  s.scores = need(sizeof(float) * MAX_ROWS * PAGE_TOKENS);
  s.p = need(sizeof(float) * MAX_ROWS * PAGE_TOKENS);
  s.out = need(sizeof(float) * MAX_ROWS * (size_t)s.stride);
  s.side = need(side_bytes(&s.keys));
  s.exact = need(sizeof(uint16_t) * (size_t)(PAGE_TOKENS * d));
  s.states = need(sizeof *s.states * MAX_ROWS);
  for (int i = 0; i < MAX_ROWS * d; i++) q[i] = random_float();
  for (size_t i = 0; i < MAX_ROWS * width; i++) s.mapped[i] = random_float();
  for (int i = 0; i < MAX_ROWS * PAGE_TOKENS; i++) s.p[i] = fabsf(random_float());
  for (int i = 0; i < PAGE_TOKENS * d; i++) s.exact[i] = f32_to_bf16(random_float());
  for (size_t i = 0; i < side_bytes(&s.keys); i++) s.side[i] = (uint8_t)(int)(random_float() * 128);
  for (int k = 0; k < d / 2; k++) rope_page_angle(rope, k, 7, s.angle + k, s.angle + d / 2 + k);

  printf("# head dimension %d, %d gains, %d turning pairs of which %d have curves of their own\n", d, groups, d / 2,
         s.basis.fast);
  printf("kernels,rows,kernel,ns,ns_per_row_and_token\n");
  for (char *at = (char *)(uintptr_t)rows; *at;) {
    s.rows = (int)strtol(at, &at, 10);
    if (*at == ',') at++;
    if (s.rows < 1 || s.rows > MAX_ROWS) {
      fprintf(stderr, "--rows: numbers from 1 to %d\n", MAX_ROWS);
      return 1;
    }
    for (int r = 0; r < MAX_ROWS; r++) s.states[r] = (struct softmax_state){.max = 100, .sum = 1, .hi = PAGE_TOKENS};
    s.queries = (struct query_rows){.rows = s.rows, .head_dim = d, .q = q, .mapped = s.mapped};
    const struct attention_kernels *kernels = attention_kernels_for(&context->cpu);
    const struct page_kernels *many = page_kernels_for_many(&context->cpu);
    measure(kernels, &kernels->pages, &s);
    if (many && s.rows >= MANY_ROWS) measure(kernels, many, &s);
  }
  free(q), free(s.mapped), free(s.angle), free(s.scores), free(s.p), free(s.out), free(s.side), free(s.exact), free(s.states);
  free(s.basis.curve), free(mean);
  oscar_codec_release(codec);
  oscar_rope_release(rope);
  oscar_context_free(context);
  return 0;
}
