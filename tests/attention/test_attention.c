/*
 * Attention over a cache, on every instruction set: all shapes, lengths and windows follow the definition. What threads and
 * several jobs in one call have to do with it is in test_threads.c.
 */
#include "definition.h"

/* Feeds a random text in chunks and compares every `stride`-th position and the last. */
static void check_setup(struct setup setup, int tokens, int window, int chunk, int stride) {
  static int portable;
  if (!available(setup.isa)) return;
  /* Kernels in plain C would take half of the time under a sanitizer, where two of five setups do; no list below has a period of
   * five. */
  if (SANITIZED && !test_at_length() && setup.isa == OSCAR_ISA_PORTABLE && portable++ % 5 > 1) return;
  struct fixture f = open_fixture(setup);
  struct text t = random_text(&f, (uint64_t)(tokens + window + chunk), tokens, f.setup.layers - 1);
  float *out = run_text(&f, &t, window, chunk);
  size_t row = (size_t)(f.setup.kv_heads * f.setup.group * f.setup.head_dim);
  for (int position = 0; position < tokens; position += stride) compare(&f, &t, window, position, out + (size_t)position * row);
  compare(&f, &t, window, tokens - 1, out + (size_t)(tokens - 1) * row);
  free(out);
  free_text(&t);
  close_fixture(&f);
}

static void every_group_size_follows_the_definition(void **state) {
  (void)state;
  FOR_EACH_ISA(isa)
  for (int group = 1; group <= 16; group++)
    check_setup((struct setup){.kind = group % 2 ? GRADED : TURNING, .group = group, .sink = 1, .recent = 1, .isa = isa}, 270, 0,
                97, 61);
}

static void every_head_dim_and_codec_follows_the_definition(void **state) {
  (void)state;
  static const int dims[] = {16, 48, 64, 80, 96, 128, 256};
  FOR_EACH_ISA(isa)
  for (size_t i = 0; i < ARRAY_LENGTH(dims); i++)
    for (enum kind kind = BF16; kind <= TURNING; kind++) {
      if (kind == GROUPS_32 && dims[i] % 32) continue;
      struct setup setup = {
          .kind = kind, .kv_heads = dims[i] < 128 ? 2 : 1, .group = 3, .head_dim = dims[i], .sink = 1, .recent = 1, .isa = isa};
      check_setup(setup, 200, 0, 150, 70);
    }
}

static void every_length_around_a_page_boundary_follows_the_definition(void **state) {
  (void)state;
  static const int lengths[] = {1, 2, 15, 63, 64, 65, 127, 128, 129, 192, 193, 257};
  FOR_EACH_ISA(isa)
  for (size_t i = 0; i < ARRAY_LENGTH(lengths); i++) {
    check_setup((struct setup){.kind = SCALE_ZERO, .group = 2, .sink = 1, .recent = 1, .isa = isa}, lengths[i], 0, 64, 31);
    check_setup((struct setup){.kind = GRADED, .group = 2, .sink = 0, .recent = 0, .isa = isa}, lengths[i], 0, 1000, 31);
    check_setup((struct setup){.kind = GRADED, .group = 2, .sink = 2, .recent = 4, .isa = isa}, lengths[i], 0, 100, 31);
  }
}

static void every_window_follows_the_definition(void **state) {
  (void)state;
  static const int windows[] = {1, 2, 17, 63, 64, 65, 100, 128, 200, 399, 400, 5000};
  FOR_EACH_ISA(isa)
  for (size_t i = 0; i < ARRAY_LENGTH(windows); i++)
    for (int chunk = 37; chunk < 600; chunk += 400)
      check_setup((struct setup){.kind = i % 2 ? GRADED : TURNING, .group = 2, .sink = 1, .recent = 1, .isa = isa}, 400,
                  windows[i], chunk, 57);
}

/* Angles are turned from page to page and start over now and then: at no length may they drift. */
static void a_rotating_mean_is_where_it_belongs_after_many_pages(void **state) {
  (void)state;
  FOR_EACH_ISA(isa)
  check_setup((struct setup){.kind = TURNING, .kv_heads = 1, .head_dim = 32, .group = 1, .sink = 1, .recent = 1, .isa = isa},
              4700, 0, 512, 1171);
}

static void every_layer_reads_its_own_pages(void **state) {
  (void)state;
  FOR_EACH_ISA(isa)
  check_setup((struct setup){.kind = GRADED, .layers = 3, .kv_heads = 3, .group = 2, .sink = 1, .recent = 1, .isa = isa}, 300, 0,
              77, 50);
}

/* Scores of several hundreds: the softmax is all but one token, which may sit anywhere. */
static void huge_scores_leave_one_token(void **state) {
  (void)state;
  FOR_EACH_ISA(isa) {
    if (!available(isa)) continue;
    for (int where = 0; where < 4; where++) {
      struct fixture f =
          open_fixture((struct setup){.kind = where % 2 ? SCALE_ZERO : GRADED, .group = 2, .sink = 1, .recent = 1, .isa = isa});
      uint64_t seed = (uint64_t)where;
      int tokens = 400, target = (int[]){0, 399, 150, 70}[where];
      struct text t = {.tokens = tokens};
      t.q = random_floats(&seed, tokens, 4, 64, 1);
      t.k = random_floats(&seed, tokens, 2, 64, .1f);
      t.v = random_floats(&seed, tokens, 2, 64, 1);
      for (int head = 0; head < 2; head++)
        for (int i = 0; i < 64; i++) {
          t.k[(target * 2 + head) * 64 + i] = 100 * (i % 2 ? 1.f : -1.f);
          for (int g = 0; g < 2; g++) t.q[(399 * 4 + head * 2 + g) * 64 + i] = i % 2 ? 1.f : -1.f;
        }
      t = complete_text(&f, t);
      float *out = run_text(&f, &t, 0, 400);
      compare(&f, &t, 0, 399, out + 399 * 4 * 64);
      free(out);
      free_text(&t);
      close_fixture(&f);
    }
  }
}

/* Only the order of sums may differ: tiles and blocks of rows are cut elsewhere. */
static void chunks_change_only_roundings(void **state) {
  (void)state;
  static const int chunks[] = {1, 7, 64, 500};
  enum { TOKENS = 600 };
  FOR_EACH_ISA(isa) {
    if (!available(isa)) continue;
    struct fixture f = open_fixture((struct setup){.kind = GRADED, .group = 3, .sink = 1, .recent = 2, .isa = isa});
    struct text t = random_text(&f, 7, TOKENS, 0);
    float *whole = run_text(&f, &t, 0, TOKENS);
    double worst = 0;
    for (size_t i = 0; i < ARRAY_LENGTH(chunks); i++) {
      float *out = run_text(&f, &t, 0, chunks[i]);
      double x = difference(out, whole, (size_t)TOKENS * 6 * 64);
      if (!(x <= worst)) worst = x;
      free(out);
    }
    printf("  %s: chunks differ by at most %.2g of the outputs' rms\n", level_name(isa), worst);
    assert_true(worst <= (isa > OSCAR_ISA_NEON_DOT ? bound(isa) : 5e-5)); /* few rows are not rounded to BF16 */
    free(whole);
    free_text(&t);
    close_fixture(&f);
  }
}

/* After a rewind that refills, pages the rule wants exact exist as codes only and are read as codes. */
static void pages_without_their_exact_form_are_read_as_codes(void **state) {
  (void)state;
  FOR_EACH_ISA(isa) {
    if (!available(isa)) continue;
    struct fixture f = open_fixture((struct setup){.kind = SCALE_ZERO, .group = 2, .sink = 1, .recent = 2, .isa = isa});
    struct text t = random_text(&f, 5, 1000, 0);
    bool only_coded[16] = {false};
    t.only_coded = only_coded;
    oscar_sequence *sequence = NULL;
    float *out = floats(1000, 4, 64);
    assert_ok(f.context, oscar_sequence_create(f.cache, &sequence));
    feed(&f, sequence, &t, 0, 0, 1000, out);
    int64_t resume = -1;
    assert_ok(f.context, oscar_sequence_truncate(sequence, 600, OSCAR_REWIND_REFILL, &resume));
    assert_in_range(resume, 0, 600);
    int pages = (int)(resume + 63) / 64, fallbacks = 0;
    for (int page = 0; page < pages; page++) {
      assert_ok(f.context, oscar_sequence_read_page(sequence, page, 0, 0, &only_coded[page], NULL, NULL));
      if (only_coded[page] && page + 2 >= resume / 64) fallbacks++;
    }
    assert_true(fallbacks > 0);
    int begin = (int)resume, n = 700 - begin;
    feed(&f, sequence, &t, 0, begin, n, out);
    for (int x = 0; x < n; x += 13) compare(&f, &t, 0, begin + x, out + x * 256);
    free(out);
    free_text(&t);
    close_fixture(&f);
  }
}

/* Softmax does not see a constant added to all keys; the codec that subtracts it as its mean gives the same codes. Keys and mean
 * are multiples of 1/16 so that BF16 holds them and their sums exactly. */
static void adding_the_key_mean_changes_nothing(void **state) {
  (void)state;
  enum { TOKENS = 500, D = 64 };
  FOR_EACH_ISA(isa) {
    if (!available(isa)) continue;
    float mean[D], *out[2];
    uint64_t seed = 3;
    for (int i = 0; i < D; i++) mean[i] = (float)(int)(test_random(&seed) % 129) / 16 - 4;
    for (int with = 0; with < 2; with++) {
      struct fixture f = {
          .setup = {
              .kind = SCALE_ZERO, .layers = 1, .kv_heads = 1, .group = 4, .head_dim = D, .sink = 1, .recent = 1, .isa = isa}};
      f.context = poisoned_context(isa, 1);
      oscar_codec_set_info info = {1, 1, D, "test", "", ""};
      assert_ok(f.context, oscar_codec_set_create(f.context, &info, &f.codecs));
      for (int side = 0; side < 2; side++) {
        oscar_codec_spec spec = {.head_dim = D,
                                 .channels = D,
                                 .form = OSCAR_ROW_SCALE_ZERO,
                                 .groups = 1,
                                 .clip_ratio = 1,
                                 .mean = with && side == OSCAR_KEYS ? mean : NULL};
        oscar_codec *codec = NULL;
        assert_ok(f.context, oscar_codec_create(f.context, &spec, &codec));
        assert_ok(f.context, oscar_codec_set_assign(f.codecs, 0, 0, (oscar_side)side, codec));
        oscar_codec_release(codec);
      }
      open_cache(&f);
      seed = 4;
      struct text t = {.tokens = TOKENS};
      t.q = random_floats(&seed, TOKENS, 4, D, 1);
      t.k = floats(TOKENS, 1, D);
      t.v = random_floats(&seed, TOKENS, 1, D, 1);
      for (int i = 0; i < TOKENS * D; i++) t.k[i] = (float)(int)(test_random(&seed) % 65) / 16 - 2 + (with ? mean[i % D] : 0);
      out[with] = run_text(&f, &t, 0, 100);
      free_text(&t);
      close_fixture(&f);
    }
    assert_true(difference(out[1], out[0], (size_t)TOKENS * 4 * D) <= 2 * bound(isa));
    free(out[0]), free(out[1]);
  }
}

static void wrong_arguments_are_refused_by_name(void **state) {
  (void)state;
  struct fixture f = open_fixture((struct setup){.kind = SCALE_ZERO, .layers = 2, .group = 2, .sink = 1, .recent = 1});
  struct text t = random_text(&f, 1, 100, 0);
  float *out = floats(200, 4, 64);
  oscar_attention *a = NULL;
  assert_int_equal(oscar_attention_create(f.cache, NULL, &a), OSCAR_INVALID_ARGUMENT);
  assert_int_equal(oscar_attention_create(NULL, NULL, &a), OSCAR_INVALID_ARGUMENT);
  static const int wrong_heads[] = {0, -2, 3, 34};
  for (size_t i = 0; i < ARRAY_LENGTH(wrong_heads); i++) {
    oscar_attention_options options = {.query_heads = wrong_heads[i]};
    assert_int_equal(oscar_attention_create(f.cache, &options, &a), OSCAR_INVALID_ARGUMENT);
    assert_non_null(strstr(oscar_last_error(f.context), "KV heads"));
    assert_null(a);
  }
  static const float wrong_scales[] = {-1, NAN, INFINITY};
  for (size_t i = 0; i < ARRAY_LENGTH(wrong_scales); i++) {
    oscar_attention_options options = {.query_heads = 4, .scale = wrong_scales[i]};
    assert_int_equal(oscar_attention_create(f.cache, &options, &a), OSCAR_INVALID_ARGUMENT);
    assert_non_null(strstr(oscar_last_error(f.context), "scale"));
  }

  oscar_sequence *sequence = NULL;
  assert_ok(f.context, oscar_sequence_create(f.cache, &sequence));
  oscar_attention_job job = {sequence, 1, t.q, out, OSCAR_ATTENTION_BY_NUMBER};
  assert_int_equal(oscar_attention_run(f.attention, 0, 0, &job, 1), OSCAR_INVALID_ARGUMENT); /* empty */
  feed(&f, sequence, &t, 0, 0, 100, out);
  assert_ok(f.context, oscar_attention_run(f.attention, 0, 0, &job, 1));
  assert_int_equal(oscar_attention_run(f.attention, 2, 0, &job, 1), OSCAR_INVALID_ARGUMENT);
  assert_int_equal(oscar_attention_run(f.attention, -1, 0, &job, 1), OSCAR_INVALID_ARGUMENT);
  assert_int_equal(oscar_attention_run(f.attention, 0, -1, &job, 1), OSCAR_INVALID_ARGUMENT);
  assert_int_equal(oscar_attention_run(f.attention, 0, 0, NULL, 1), OSCAR_INVALID_ARGUMENT);
  assert_int_equal(oscar_attention_run(f.attention, 0, 0, &job, -1), OSCAR_INVALID_ARGUMENT);
  job.n = 101;
  assert_int_equal(oscar_attention_run(f.attention, 0, 0, &job, 1), OSCAR_INVALID_ARGUMENT);
  assert_non_null(strstr(oscar_last_error(f.context), "100 positions"));
  job.n = 0;
  assert_int_equal(oscar_attention_run(f.attention, 0, 0, &job, 1), OSCAR_INVALID_ARGUMENT);
  job = (oscar_attention_job){.sequence = sequence, .n = 1, .out = out};
  assert_int_equal(oscar_attention_run(f.attention, 0, 0, &job, 1), OSCAR_INVALID_ARGUMENT);

  job.q = t.q;
  assert_ok(f.context, oscar_sequence_begin(sequence, 1));
  assert_ok(f.context, oscar_sequence_write(sequence, 1, t.k, t.v));
  assert_int_equal(oscar_attention_run(f.attention, 0, 0, &job, 1), OSCAR_INVALID_ARGUMENT);
  assert_non_null(strstr(oscar_last_error(f.context), "has not been written"));
  assert_ok(f.context, oscar_attention_run(f.attention, 1, 0, &job, 1));
  oscar_sequence_abort(sequence);

  struct fixture other = open_fixture((struct setup){.kind = BF16, .group = 2});
  assert_int_equal(oscar_attention_run(other.attention, 0, 0, &job, 1), OSCAR_INVALID_ARGUMENT);
  assert_non_null(strstr(oscar_last_error(other.context), "another cache"));
  close_fixture(&other);
  oscar_attention_free(NULL);
  free(out);
  free_text(&t);
  close_fixture(&f);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(every_group_size_follows_the_definition),
      cmocka_unit_test(every_head_dim_and_codec_follows_the_definition),
      cmocka_unit_test(every_length_around_a_page_boundary_follows_the_definition),
      cmocka_unit_test(every_window_follows_the_definition),
      cmocka_unit_test(a_rotating_mean_is_where_it_belongs_after_many_pages),
      cmocka_unit_test(every_layer_reads_its_own_pages),
      cmocka_unit_test(huge_scores_leave_one_token),
      cmocka_unit_test(chunks_change_only_roundings),
      cmocka_unit_test(pages_without_their_exact_form_are_read_as_codes),
      cmocka_unit_test(adding_the_key_mean_changes_nothing),
      cmocka_unit_test(wrong_arguments_are_refused_by_name),
  };
  return cmocka_run_group_tests(tests, NULL, print_errors);
}
