/*
 * Attention by several threads, for several sequences at once and over a filter that has threads of its own: nobody's result
 * depends on who else is there.
 */
#include "definition.h"

/* The portable kernels would take most of the time, and they share with the others what is looked at here: every day they stand
 * in only where there are no others. */
static bool looked_at(oscar_isa isa) {
  if (isa != OSCAR_ISA_PORTABLE || test_at_length()) return available(isa);
  return !available(OSCAR_ISA_AVX2) && !available(OSCAR_ISA_NEON_DOT);
}

static void threads_change_only_roundings(void **state) {
  (void)state;
  enum { TOKENS = 1500 };
  FOR_EACH_ISA(isa) {
    if (!looked_at(isa)) continue;
    float *out[3];
    static const int threads[3] = {1, 2, 5};
    for (int i = 0; i < 3; i++) {
      struct fixture f = open_fixture(
          (struct setup){.kind = GRADED, .kv_heads = 1, .group = 4, .sink = 1, .recent = 2, .isa = isa, .threads = threads[i]});
      struct text t = random_text(&f, 11, TOKENS, 0);
      oscar_sequence *sequence = NULL;
      assert_ok(f.context, oscar_sequence_create(f.cache, &sequence));
      out[i] = floats(TOKENS, 4, 64);
      feed(&f, sequence, &t, 0, 0, TOKENS - 3, out[i]);
      for (int x = TOKENS - 3; x < TOKENS; x++) { /* decode: one tile, cut into parts */
        feed(&f, sequence, &t, 0, x, 1, out[i] + x * 4 * 64);
        compare(&f, &t, 0, x, out[i] + x * 4 * 64);
      }
      float windowed[4 * 64];
      oscar_attention_job job = {sequence, 1, t.q + (TOKENS - 1) * 4 * 64, windowed, OSCAR_ATTENTION_BY_NUMBER};
      assert_ok(f.context, oscar_attention_run(f.attention, 0, 1111, &job, 1));
      compare(&f, &t, 1111, TOKENS - 1, windowed);
      enum { MANY = 20 }; /* a short prompt over a long history: two tiles of 16 and 4 positions, 64 rows and 16, in parts */
      float many[MANY * 4 * 64];
      oscar_attention_job short_prompt = {sequence, MANY, t.q + (TOKENS - MANY) * 4 * 64, many, OSCAR_ATTENTION_BY_NUMBER};
      assert_ok(f.context, oscar_attention_run(f.attention, 0, 0, &short_prompt, 1));
      for (int x = 0; x < MANY; x++) compare(&f, &t, 0, TOKENS - MANY + x, many + x * 4 * 64);
      free_text(&t);
      close_fixture(&f);
    }
    for (int i = 1; i < 3; i++)
      assert_true(difference(out[i], out[0], (size_t)TOKENS * 4 * 64) <= (isa > OSCAR_ISA_NEON_DOT ? bound(isa) : 5e-5));
    for (int i = 0; i < 3; i++) free(out[i]);
  }
}

/* A step of a token and guesses gives each of them the bits that it gets in a step of its own, whatever else is in the call:
 * pages begin and are demoted inside of steps, tiles are cut into parts, windows begin at other pages from one position to the
 * next, and the rows are as many as would be a prompt's. */
static void few_tokens_get_the_bits_of_single_ones(void **state) {
  (void)state;
  enum { TOKENS = 1700, FIRST = 1500, STEP = 16, GROUP = 6, WIDTH = GROUP * 64 };
  static const int windows[] = {0, 1024, 1111};
  FOR_EACH_ISA(isa) {
    if (!looked_at(isa)) continue;
    for (size_t w = 0; w < ARRAY_LENGTH(windows); w += (size_t)rounds(2, 1)) {
      struct fixture f = open_fixture(
          (struct setup){.kind = GRADED, .kv_heads = 1, .group = GROUP, .sink = 1, .recent = 2, .isa = isa, .threads = 2});
      struct text t = random_text(&f, 17, TOKENS, 0);
      oscar_sequence *single = NULL, *together = NULL;
      float *a = floats(TOKENS, GROUP, 64), *b = floats(TOKENS, GROUP, 64), other[WIDTH];
      assert_ok(f.context, oscar_sequence_create(f.cache, &single));
      assert_ok(f.context, oscar_sequence_create(f.cache, &together));
      feed(&f, single, &t, 0, 0, FIRST, a);
      feed(&f, together, &t, 0, 0, FIRST, b);
      for (int x = FIRST, n = 1; x < TOKENS; x += n) {
        n = TOKENS - x < 1 + x % STEP ? TOKENS - x : 1 + x % STEP;
        const oscar_attention_job jobs[2] = {{.sequence = single, .n = 1, .q = t.q, .out = other},
                                             {.sequence = together,
                                              .n = n,
                                              .q = t.q + (size_t)x * WIDTH,
                                              .out = b + (size_t)x * WIDTH,
                                              .rounding = OSCAR_ATTENTION_AS_FEW}};
        assert_ok(f.context, oscar_sequence_begin(together, n));
        for (int layer = 0; layer < f.setup.layers; layer++)
          assert_ok(f.context, oscar_sequence_write(together, layer, t.k + (size_t)x * 64, t.v + (size_t)x * 64));
        assert_ok(f.context, oscar_attention_run(f.attention, t.layer, windows[w], jobs, 2));
        assert_ok(f.context, oscar_sequence_commit(together));
        for (int i = x; i < x + n; i++) feed(&f, single, &t, windows[w], i, 1, a + (size_t)i * WIDTH);
        assert_memory_equal(a + (size_t)x * WIDTH, b + (size_t)x * WIDTH, (size_t)n * WIDTH * sizeof *a);
      }
      free(a);
      free(b);
      free_text(&t);
      close_fixture(&f);
    }
  }
}

/* Sequences of different lengths in one call, twice in it even, get what each gets alone. */
static void jobs_do_not_disturb_each_other(void **state) {
  (void)state;
  enum { JOBS = 4 };
  static const int lengths[JOBS] = {1, 700, 65, 300}, queries[JOBS] = {1, 1, 20, 3};
  FOR_EACH_ISA(isa) {
    if (!available(isa)) continue;
    struct fixture f =
        open_fixture((struct setup){.kind = SCALE_ZERO, .group = 5, .sink = 1, .recent = 1, .isa = isa, .threads = 3});
    struct text texts[JOBS];
    oscar_attention_job jobs[JOBS + 1];
    oscar_sequence *sequences[JOBS];
    for (int i = 0; i < JOBS; i++) {
      texts[i] = random_text(&f, (uint64_t)i, lengths[i], 0);
      assert_ok(f.context, oscar_sequence_create(f.cache, &sequences[i]));
      float *ignored = floats(lengths[i], 10, 64);
      feed(&f, sequences[i], &texts[i], 0, 0, lengths[i], ignored);
      free(ignored);
      int n = queries[i];
      jobs[i] = (oscar_attention_job){
          .sequence = sequences[i], .n = n, .q = texts[i].q + (size_t)(lengths[i] - n) * 640, .out = floats(n, 10, 64)};
    }
    jobs[JOBS] = jobs[1];
    jobs[JOBS].out = floats(1, 10, 64);
    assert_ok(f.context, oscar_attention_run(f.attention, 0, 0, jobs, JOBS + 1));
    assert_true(difference(jobs[JOBS].out, jobs[1].out, 640) <= 1e-12);
    for (int i = 0; i < JOBS; i++)
      for (int x = 0; x < queries[i]; x++) {
        int position = lengths[i] - queries[i] + x;
        if (i == 2 && position < 64) texts[i].only_coded = NULL;
        compare(&f, &texts[i], 0, position, jobs[i].out + x * 640);
      }
    assert_ok(f.context, oscar_attention_run(f.attention, 0, 0, NULL, 0));
    for (int i = 0; i < JOBS; i++) {
      oscar_sequence_free(sequences[i]);
      free(jobs[i].out);
      free_text(&texts[i]);
    }
    free(jobs[JOBS].out);
    close_fixture(&f);
  }
}

/* Two ways to the same numbers: codes read by their own kernels, and the decoded codes read as BF16. Rounding the latter moves a
 * number by up to 2^-9 of itself, so outputs may differ by about as much of theirs. */
static void a_filter_that_encodes_and_decodes_gives_what_the_codec_gives(void **state) {
  (void)state;
  enum { TOKENS = 700 };
  static const enum kind kinds[] = {SCALE_ZERO, GROUPS_32, FOUR_CRUMBS, GRADED};
  FOR_EACH_ISA(isa) {
    if (!looked_at(isa)) continue;
    double worst = 0;
    for (size_t i = 0; i < ARRAY_LENGTH(kinds); i++) {
      struct setup setup = {
          .kind = kinds[i], .layers = 2, .group = 3, .sink = 1, .recent = 1, .isa = isa, .threads = 2, .key_scale = .5f};
      float *out[2];
      for (int filtered = 0; filtered < 2; filtered++) {
        setup.filtered = filtered;
        struct fixture f = open_fixture(setup);
        struct text t = random_text(&f, 21, TOKENS, 1);
        out[filtered] = run_text(&f, &t, 0, 150);
        for (int position = 0; position < TOKENS; position += 23) compare(&f, &t, 0, position, out[filtered] + position * 384);
        free_text(&t);
        close_fixture(&f);
      }
      assert_memory_equal(out[0], out[1], sizeof(float) * 192 * 384); /* until page 3 all is exact */
      double x = difference(out[1] + 192 * 384, out[0] + 192 * 384, (size_t)(TOKENS - 192) * 384);
      assert_true(x > 0); /* other kernels did read it */
      if (!(x <= worst)) worst = x;
      free(out[0]), free(out[1]);
    }
    printf("  %s: filter and codec differ by at most %.2g of the outputs' rms\n", level_name(isa), worst);
    assert_true(worst <= (isa > OSCAR_ISA_NEON_DOT ? 0x1p-6 : 0x1p-7));
  }
}

static void every_failed_allocation_is_survived(void **state) {
  (void)state;
  struct failing_alloc failing;
  struct fixture f = {.setup = {.kind = GRADED, .layers = 1, .kv_heads = 1, .group = 2, .head_dim = 64, .sink = 1, .recent = 1}};
  f.context = failing_context(&failing);
  f.context->options.threads = 4; /* so that tiles are cut; the library itself allocates outside of parallel loops only */
  f.codecs = make_codecs(f.context, &f.setup);
  open_cache(&f);
  oscar_attention_free(f.attention);
  oscar_attention_options options = {.query_heads = 2};
  sweep_allocations(f.context, &failing, oscar_attention_create(f.cache, &options, &f.attention));
  f.setup.isa = oscar_context_isa(f.context);
  struct text t = random_text(&f, 1, 1500, 0);
  oscar_sequence *sequence = NULL;
  assert_ok(f.context, oscar_sequence_create(f.cache, &sequence));
  assert_ok(f.context, oscar_sequence_begin(sequence, 1500));
  assert_ok(f.context, oscar_sequence_write(sequence, 0, t.k, t.v));
  assert_ok(f.context, oscar_sequence_commit(sequence));
  float *out = floats(200, 2, 64);
  for (int n = 1; n <= 200; n += 199) {
    oscar_attention_job job = {sequence, n, t.q + (1500 - n) * 128, out, OSCAR_ATTENTION_BY_NUMBER};
    sweep_allocations(f.context, &failing, oscar_attention_run(f.attention, 0, 0, &job, 1));
    compare(&f, &t, 0, 1499, out + (n - 1) * 128);
  }
  free(out);
  free_text(&t);
  oscar_sequence_free(sequence);
  oscar_attention_free(f.attention);
  oscar_cache_free(f.cache);
  oscar_codec_set_free(f.codecs);
  failing_context_free(f.context, &failing);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(threads_change_only_roundings),
      cmocka_unit_test(few_tokens_get_the_bits_of_single_ones),
      cmocka_unit_test(jobs_do_not_disturb_each_other),
      cmocka_unit_test(a_filter_that_encodes_and_decodes_gives_what_the_codec_gives),
      cmocka_unit_test(every_failed_allocation_is_survived),
  };
  return cmocka_run_group_tests(tests, NULL, print_errors);
}
