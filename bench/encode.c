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
#include "encode_codecs.h"

#define REPEATS 255
#define PAGES   8 /* encoded in turn, so that branches are not learnt by heart */

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
  for (size_t f = 0; f < ARRAY_LENGTH(bench_forms); f++)
    for (int side = OSCAR_KEYS; side <= OSCAR_VALUES; side++) {
      oscar_codec *codec = make_codec(context, d, bench_forms[f].form, (oscar_side)side);
      printf("%s,%d,%s,%s,%.1f\n", oscar_isa_name(oscar_context_isa(context)), d, bench_forms[f].name,
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
    fill_rows((int)d, PAGES * PAGE_TOKENS, pages);
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
