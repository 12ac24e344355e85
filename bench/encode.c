/*
 * bench/encode.c - encoding a page: 64 rows of one KV head and side, from BF16 to the packed form.
 *
 *   bench_encode [--head-dims D,D,...]
 *
 * One CSV line per instruction set, head dimension, form and side: ns per row. Keys of the graded forms have channels of one to
 * three crumbs and a rotating mean in every pair, as fitted codecs do; their values, and both sides of SCALE_ZERO, have one crumb
 * in every channel. Rows are Gaussian with norms that vary by an octave each way. Medians.
 */
#include "base/sort.h"
#include "quant/page_form.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define REPEATS  255
#define PAGES    8 /* encoded in turn, so that branches are not learnt by heart */
#define MOST_DIM 512

static void *need(size_t bytes) {
  void *p = aligned_alloc(64, round_up(bytes, 64));
  if (!p) exit(1);
  memset(p, 0, round_up(bytes, 64));
  return p;
}

static float uniform(void) {
  static uint64_t seed = 1;
  seed = seed * 6364136223846793005u + 1442695040888963407u;
  return ((float)(seed >> 40) + 0.5f) * 0x1p-24f;
}

static float normal(void) { return sqrtf(-2 * logf(uniform())) * cosf(6.2831853f * uniform()); }

/* Per 64 crumbs: one channel of three, eight of two and 45 of one, so that no border of four groups splits a channel. */
static int graded_crumbs(int total, uint8_t *crumbs) {
  static const uint8_t first[] = {3, 2, 2, 2, 2, 2, 2, 1}, second[] = {2, 2, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
  int channels = 0;
  for (int i = 0; i < total / 64; i++, channels += (int)sizeof first) memcpy(crumbs + channels, first, sizeof first);
  for (int i = 0; i < total / 64; i++, channels += (int)sizeof second) memcpy(crumbs + channels, second, sizeof second);
  memset(crumbs + channels, 1, (size_t)total / 2);
  return channels + total / 2;
}

static oscar_codec *make_codec(oscar_context *context, int d, oscar_row_form form, oscar_side side) {
  bool graded = form != OSCAR_ROW_SCALE_ZERO && side == OSCAR_KEYS;
  uint8_t crumbs[MOST_DIM];
  uint16_t pair[MOST_DIM / 2];
  float frequencies[MOST_DIM / 2], steps[MOST_DIM], mean[MOST_DIM], *matrix = need(sizeof(float) * MOST_DIM * MOST_DIM);
  memset(crumbs, 1, sizeof crumbs);
  int m = graded ? graded_crumbs(d, crumbs) : d;
  for (int i = 0; i < m; i++) steps[i] = form == OSCAR_ROW_SCALE_ZERO ? 1 : codec_gaussian_step(crumbs[i]);
  for (int i = 0; i < d; i++) mean[i] = 0.1f * normal();
  for (int i = 0; i < d * m; i++) matrix[i] = normal() / sqrtf((float)d);
  for (int i = 0; i < d / 2; i++) {
    frequencies[i] = powf(1e5f, -2 * (float)i / (float)d);
    pair[i] = (uint16_t)i;
  }
  oscar_codec_spec spec = {.head_dim = d,
                           .channels = m,
                           .form = form,
                           .groups = form == OSCAR_ROW_LOG_GAINS ? 4 : 1,
                           .clip_ratio = 0.96f,
                           .crumbs = crumbs,
                           .steps = steps,
                           .mean = mean,
                           .encode = matrix,
                           .decode = matrix};
  oscar_rope *rope = NULL;
  if (graded) {
    oscar_rope_spec rope_spec = {OSCAR_ROPE_HALVES, d, frequencies};
    if (oscar_rope_create(context, &rope_spec, &rope) != OSCAR_OK) exit(1);
    spec.rope = rope;
    spec.rotating_pairs = d / 2;
    spec.rotating_pair = pair;
    spec.rotating_mean = mean;
  }
  oscar_codec *codec = NULL;
  if (oscar_codec_create(context, &spec, &codec) != OSCAR_OK) {
    fprintf(stderr, "%s\n", oscar_last_error(context));
    exit(1);
  }
  oscar_rope_release(rope);
  free(matrix);
  return codec;
}

static double measure(const oscar_codec *codec, oscar_side side, const uint16_t *pages) {
  struct side_form form = side_form_of(codec);
  size_t d = (size_t)codec->spec.head_dim, floats = PAGE_TOKENS * sizeof(float) * d;
  struct encode_scratch scratch = {need(floats), need(floats), need(PAGE_TOKENS * codec->row_bytes)};
  uint8_t *packed = need(side_bytes(&form));
  double times[REPEATS];
  for (int r = 0; r < REPEATS; r++) {
    const uint16_t *exact = pages + (size_t)(r % PAGES) * PAGE_TOKENS * d;
    int64_t start = time_ns();
    if (page_encode(codec, side, 1000 + r, exact, &scratch, packed) != PAGE_TOKENS) exit(1);
    times[r] = (double)(time_ns() - start) / PAGE_TOKENS;
  }
  free(scratch.x), free(scratch.y), free(scratch.rows), free(packed);
  sort_doubles(times, REPEATS);
  return times[REPEATS / 2];
}

static void measure_forms(oscar_context *context, int d, const uint16_t *pages) {
  static const struct {
    const char *name;
    oscar_row_form form;
  } forms[] = {{"log_gains", OSCAR_ROW_LOG_GAINS}, {"gain", OSCAR_ROW_GAIN}, {"scale_zero", OSCAR_ROW_SCALE_ZERO}};
  for (size_t f = 0; f < ARRAY_LENGTH(forms); f++)
    for (int side = OSCAR_KEYS; side <= OSCAR_VALUES; side++) {
      oscar_codec *codec = make_codec(context, d, forms[f].form, (oscar_side)side);
      printf("%s,%d,%s,%s,%.1f\n", oscar_isa_name(oscar_context_isa(context)), d, forms[f].name,
             side == OSCAR_KEYS ? "keys" : "values", measure(codec, (oscar_side)side, pages));
      oscar_codec_release(codec);
    }
}

int main(int argc, char **argv) {
  const char *dims = "64,128";
  if (argc == 3 && !strcmp(argv[1], "--head-dims")) {
    dims = argv[2];
  } else if (argc != 1) {
    fprintf(stderr, "usage: bench_encode [--head-dims D,D,...]\n");
    return 1;
  }
  uint16_t *pages = need(sizeof(uint16_t) * PAGES * PAGE_TOKENS * MOST_DIM);
  printf("instructions,head_dim,form,side,ns_per_row\n");
  for (char *at = (char *)(uintptr_t)dims; *at;) {
    long d = strtol(at, &at, 10);
    if (*at == ',') at++;
    if (d < 64 || d > MOST_DIM || d % 64) {
      fprintf(stderr, "--head-dims: multiples of 64 up to %d\n", MOST_DIM);
      return 1;
    }
    for (int row = 0; row < PAGES * PAGE_TOKENS; row++) {
      float size = exp2f(2 * uniform() - 1);
      for (int i = 0; i < d; i++) pages[row * d + i] = f32_to_bf16(size * normal());
    }
    for (oscar_isa isa = OSCAR_ISA_PORTABLE; isa <= OSCAR_ISA_NEON_DOT; isa++) {
      oscar_context_options options;
      oscar_context_options_default(&options);
      options.isa = isa;
      oscar_context *context = NULL;
      if (oscar_context_create(&options, &context) != OSCAR_OK) continue; /* not on this CPU */
      measure_forms(context, (int)d, pages);
      oscar_context_free(context);
    }
  }
  free(pages);
  return 0;
}
