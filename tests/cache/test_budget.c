/* The budget: bytes_for to the byte, usage against arithmetic, memory that follows use, and allocations that fail. */
#include "support.h"

#include "failing_alloc.h"

/* Feeds sequences in lockstep, each step open in all of them at once. `last` is the position from which one longest step goes to
 * the first token of the last page, the dearest moment of a life. */
static oscar_status live(oscar_cache *cache, const struct geometry *g, int64_t tokens, int sequences, int chunk,
                         uint64_t *random) {
  oscar_sequence *all[4] = {NULL};
  oscar_status status = OSCAR_OK;
  float *rows = calloc((size_t)(chunk * g->kv_heads * g->head_dim), sizeof *rows);
  assert_non_null(rows);
  for (int i = 0; i < sequences && status == OSCAR_OK; i++) status = oscar_sequence_create(cache, &all[i]);
  int64_t dearest = (tokens - 1) / 64 * 64 + 1, last = dearest > chunk ? dearest - chunk : 0;
  for (int64_t length = 0; length < tokens && status == OSCAR_OK;) {
    int64_t n = 1 + (int64_t)(test_random(random) % (uint64_t)chunk);
    if (length < last && length + n > last) n = last - length;
    if (length == last) n = dearest - last;
    if (n > tokens - length) n = tokens - length;
    for (int i = 0; i < sequences && status == OSCAR_OK; i++) status = oscar_sequence_begin(all[i], (int)n);
    for (int i = 0; i < sequences && status == OSCAR_OK; i++) {
      for (int layer = 0; layer < g->layers; layer++) assert_int_equal(oscar_sequence_write(all[i], layer, rows, rows), OSCAR_OK);
    }
    for (int i = 0; i < sequences && status == OSCAR_OK; i++) assert_int_equal(oscar_sequence_commit(all[i]), OSCAR_OK);
    assert_int_equal(oscar_cache_check(cache), OSCAR_OK);
    length += n;
  }
  free(rows);
  return status;
}

static void the_budget_is_enough_to_the_byte(void **state) {
  (void)state;
  const int64_t tokens[] = {1, 64, 65, 64 * 7, 64 * 9 + 1, 64 * 70};
  const int chunks[] = {1, 63, 64, 65, 300, 1000}, sequences[] = {1, 3};
  uint64_t random = 3;
  for (size_t i = 0; i < ARRAY_LENGTH(geometries); i++) {
    oscar_context *c = test_context(OSCAR_ISA_AUTO, 1);
    oscar_codec_set *codecs = geometry_codecs(c, &geometries[i]);
    oscar_cache_options o = geometry_options(&geometries[i], codecs);
    for (size_t j = 0; j < ARRAY_LENGTH(tokens) * ARRAY_LENGTH(chunks) * ARRAY_LENGTH(sequences); j++) {
      int64_t n = tokens[j % ARRAY_LENGTH(tokens)];
      int chunk = chunks[j / ARRAY_LENGTH(tokens) % ARRAY_LENGTH(chunks)];
      int count = sequences[j / ARRAY_LENGTH(tokens) / ARRAY_LENGTH(chunks)];
      if (n > 4000 && (i != 5 || chunk < 63)) continue; /* a table of two parts, where that does not take long */
      size_t enough = oscar_cache_bytes_for(&o, n, count, chunk);
      for (size_t less = 0; less < 2; less++) {
        o.budget_bytes = enough - less;
        oscar_cache *cache;
        oscar_status status = oscar_cache_create(c, &o, &cache);
        if (status == OSCAR_OK) status = live(cache, &geometries[i], n, count, chunk, &random);
        if (status != (less ? OSCAR_NO_SPACE : OSCAR_OK))
          fail_msg("%s: %d x %d tokens in chunks of %d, %zu bytes: %s", geometries[i].name, count, (int)n, chunk, o.budget_bytes,
                   oscar_status_name(status));
        oscar_cache_free(cache);
      }
    }
    oscar_codec_set_free(codecs);
    oscar_context_free(c);
  }
}

static void a_budget_too_small_for_a_page_is_refused_with_the_least(void **state) {
  (void)state;
  for (size_t i = 0; i < ARRAY_LENGTH(geometries); i++) {
    oscar_context *c = test_context(OSCAR_ISA_AUTO, 1);
    oscar_codec_set *codecs = geometry_codecs(c, &geometries[i]);
    oscar_cache_options o = geometry_options(&geometries[i], codecs);
    oscar_cache *cache;
    const size_t budgets[] = {0, 1, 1000, oscar_cache_bytes_for(&o, 1, 1, 1) - 1};
    for (size_t j = 0; j < ARRAY_LENGTH(budgets); j++) {
      o.budget_bytes = budgets[j];
      assert_int_equal(oscar_cache_create(c, &o, &cache), OSCAR_NO_SPACE);
      assert_null(cache);
      const char *least = strstr(oscar_last_error(c), "least that would do is ");
      assert_non_null(least);
      o.budget_bytes = (size_t)strtoull(least + 23, NULL, 10);
      assert_ok(c, oscar_cache_create(c, &o, &cache));
      oscar_cache_free(cache);
    }
    oscar_codec_set_free(codecs);
    oscar_context_free(c);
  }
}

static void wrong_options_are_refused(void **state) {
  (void)state;
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 1), *other = test_context(OSCAR_ISA_AUTO, 1);
  struct geometry g = geometries[1];
  oscar_codec_set *codecs = geometry_codecs(c, &g), *gap;
  const oscar_cache_options good = geometry_options(&g, codecs);
  oscar_cache *cache;
  oscar_cache_options o;
  oscar_cache_options_default(&o);
  assert_int_equal(o.sink_pages, 1);
  assert_int_equal(o.recent_pages, 4);
#define REFUSED(status, change)                                                                                                  \
  do {                                                                                                                           \
    o = good;                                                                                                                    \
    o.budget_bytes = 1 << 30;                                                                                                    \
    change;                                                                                                                      \
    assert_int_equal(oscar_cache_create(c, &o, &cache), status);                                                                 \
    assert_null(cache);                                                                                                          \
    assert_string_not_equal(oscar_last_error(c), "");                                                                            \
    assert_int_equal(oscar_cache_bytes_for(&o, 100, 1, 100), 0);                                                                 \
  } while (0)
  REFUSED(OSCAR_INVALID_ARGUMENT, o.layers = 0);
  REFUSED(OSCAR_INVALID_ARGUMENT, o.layers = 1 << 20);
  REFUSED(OSCAR_INVALID_ARGUMENT, o.kv_heads = -1);
  REFUSED(OSCAR_INVALID_ARGUMENT, o.head_dim = 0);
  REFUSED(OSCAR_INVALID_ARGUMENT, o.head_dim = 24);
  REFUSED(OSCAR_INVALID_ARGUMENT, o.head_dim = 2048);
  REFUSED(OSCAR_INVALID_ARGUMENT, o.sink_pages = -1);
  REFUSED(OSCAR_INVALID_ARGUMENT, o.recent_pages = -1);
  REFUSED(OSCAR_MISMATCH, o.layers++);
  REFUSED(OSCAR_MISMATCH, o.kv_heads++);
  REFUSED(OSCAR_MISMATCH, o.head_dim += 16);
  REFUSED(OSCAR_INVALID_ARGUMENT, o.filter = &mixing_filter); /* beside codecs */
  const oscar_page_filter wrong[] = {{NULL, NULL, 2}, {mix_rows, NULL, 0}, {mix_rows, NULL, -1}, {mix_rows, NULL, (double)NAN}};
  for (size_t i = 0; i < ARRAY_LENGTH(wrong); i++) REFUSED(OSCAR_INVALID_ARGUMENT, (o.codecs = NULL, o.filter = &wrong[i]));
  oscar_codec_set_info info = {g.layers, g.kv_heads, g.head_dim, "gap", "", ""};
  assert_ok(c, oscar_codec_set_create(other, &info, &gap));
  REFUSED(OSCAR_INVALID_ARGUMENT, o.codecs = gap);
  o = good;
  assert_int_equal(oscar_cache_bytes_for(&o, 0, 1, 1), 0);
  assert_int_equal(oscar_cache_bytes_for(&o, 1, 0, 1), 0);
  assert_int_equal(oscar_cache_bytes_for(&o, 1, 1, 0), 0);
  assert_int_equal(oscar_cache_bytes_for(&o, INT64_MAX, 1, 1), 0);
  assert_int_equal(oscar_cache_bytes_for(&o, INT64_MAX / 4096, 2000, 1), 0);
  assert_true(oscar_cache_bytes_for(&o, 1 << 20, 1, 512) > 0);
  oscar_codec_set_free(gap);
  oscar_codec_set_free(codecs);
  oscar_context_free(other);
  oscar_context_free(c);
}

/* Impossible requests at the limits of the types. */
static void a_step_of_two_billion_tokens_is_no_space(void **state) {
  (void)state;
  for (size_t i = 0; i < ARRAY_LENGTH(geometries); i++) {
    struct world w;
    open_world(&w, &geometries[i], 1);
    struct twin *t = w.twins[0] = twin_create(&w);
    assert_true(twin_feed(&w, t, 500));
    assert_int_equal(oscar_sequence_begin(t->sequence, INT32_MAX), OSCAR_NO_SPACE);
    compare_all(&w);
    close_world(&w);
  }
}

static void usage_adds_up(void **state) {
  (void)state;
  struct geometry g = {"usage", 3, 2, 128, 1, 4, {1, 1}, 0, false};
  struct world w;
  open_world(&w, &g, 1);
  assert_true(usage_of(&w).coded_bits_per_element == 2.25); /* 2 bits and 32 of scale and zero for 128 elements */
  assert_int_equal(usage_of(&w).held_bytes, 0);
  assert_int_equal(w.run, 8);
  int64_t units = usage_of(&w).free_units;
  struct twin *t = w.twins[0] = twin_create(&w);
  assert_true(oscar_sequence_bits_per_element(t->sequence) == 0);
  assert_true(twin_feed(&w, t, 64 * 20));
  w.twins[1] = twin_create(&w);
  assert_true(twin_feed(&w, w.twins[1], 100));
  oscar_cache_usage u = usage_of(&w);
  assert_int_equal(u.exact_pages, 1 + 5 + 2);
  assert_int_equal(u.coded_pages, 14);
  assert_in_range(units - u.free_units, 8 * 8 + 14, 8 * 8 + 14 + 1);
  assert_int_equal(u.held_bytes, oscar_sequence_bytes(t->sequence) + oscar_sequence_bytes(w.twins[1]->sequence));
  assert_true(u.peak_held_bytes > u.held_bytes && u.peak_held_bytes <= u.budget_bytes);
  double bits = (6 * 8 * 2.25 + 14 * 2.25) / 20, measured = oscar_sequence_bits_per_element(t->sequence);
  assert_true(measured > bits && measured < bits * 1.01);
  close_world(&w);

  struct geometry bf16 = {"usage", 3, 2, 128, 1, 4, {0, 0}, 0, false};
  open_world(&w, &bf16, 1);
  assert_true(usage_of(&w).coded_bits_per_element == 16);
  close_world(&w);

  struct geometry filtered = {"usage", 3, 2, 128, 1, 4, {-1, -1}, 0, false};
  open_world(&w, &filtered, 1);
  assert_true(usage_of(&w).coded_bits_per_element == mixing_filter.bits_per_element);
  t = w.twins[0] = twin_create(&w);
  assert_true(twin_feed(&w, t, 64 * 20));
  assert_int_equal(usage_of(&w).exact_pages, 6);
  assert_int_equal(usage_of(&w).coded_pages, 14);
  measured = oscar_sequence_bits_per_element(t->sequence);
  assert_true(measured > 16 && measured < 16 * 1.01); /* nothing is saved */
  close_world(&w);
}

static int64_t resident_bytes(void) {
  FILE *f = fopen("/proc/self/statm", "r");
  long long size, resident = -1;
  if (f && fscanf(f, "%lld %lld", &size, &resident) != 2) resident = -1;
  if (f) fclose(f);
  return resident < 0 ? -1 : resident * sysconf(_SC_PAGESIZE);
}

static void memory_grows_with_use_and_not_with_the_budget(void **state) {
  (void)state;
  struct geometry g = {"large", 16, 8, 128, 1, 4, {1, 1}, 0, false};
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 1);
  oscar_codec_set *codecs = geometry_codecs(c, &g);
  oscar_cache_options o = geometry_options(&g, codecs);
  o.budget_bytes = (size_t)1 << 30;
  int64_t before = resident_bytes();
  if (before < 0) skip();
  oscar_cache *cache;
  assert_ok(c, oscar_cache_create(c, &o, &cache));
  oscar_sequence *s;
  assert_ok(c, oscar_sequence_create(cache, &s));
  assert_ok(c, oscar_sequence_begin(s, 1000));
  assert_true(resident_bytes() - before < 64 << 20);
  oscar_cache_free(cache);
  oscar_codec_set_free(codecs);
  oscar_context_free(c);
}

static void fail_every_allocation(struct geometry g) {
  struct failing_alloc f;
  oscar_context *c = failing_context(&f);
  oscar_codec_set *codecs = geometry_codecs(c, &g);
  oscar_cache_options o = geometry_options(&g, codecs);
  o.budget_bytes = oscar_cache_bytes_for(&o, 64 * 200, 2, 64 * 200);
  oscar_cache *cache;
  oscar_sequence *s, *copy;
  sweep_allocations(c, &f, oscar_cache_create(c, &o, &cache));
  sweep_allocations(c, &f, oscar_sequence_create(cache, &s));
  int n = 64 * 100 + 5;
  sweep_allocations(c, &f, oscar_sequence_begin(s, n));
  float *rows = calloc((size_t)(n * g.kv_heads * g.head_dim), sizeof *rows);
  assert_non_null(rows);
  f.until_failure = 0; /* from here to commit nothing is allocated */
  for (int layer = 0; layer < g.layers; layer++) assert_ok(c, oscar_sequence_write(s, layer, rows, rows));
  assert_ok(c, oscar_sequence_commit(s));
  f.until_failure = -1;
  sweep_allocations(c, &f, oscar_sequence_fork(s, &copy));
  assert_ok(c, oscar_cache_check(cache));

  /* Giving table space back is a favour: without memory rewinding and aborting still work. */
  int64_t resume;
  f.until_failure = 0;
  assert_ok(c, oscar_sequence_truncate(copy, 10, OSCAR_REWIND_EXACT, &resume));
  assert_int_equal(resume, 10);
  assert_ok(c, oscar_sequence_begin(copy, n));
  oscar_sequence_abort(copy);
  assert_ok(c, oscar_cache_check(cache));
  f.until_failure = -1;
  assert_int_equal(oscar_sequence_length(copy), 10);
  oscar_sequence_free(copy);
  free(rows);
  oscar_cache_free(cache);
  oscar_codec_set_free(codecs);
  failing_context_free(c, &f);
}

static void every_failed_allocation_is_survived(void **state) {
  (void)state;
  fail_every_allocation((struct geometry){"failing", 2, 2, 16, 1, 1, {1, 1}, 0, false});
  fail_every_allocation((struct geometry){"failing filter", 2, 2, 16, 1, 1, {-1, -1}, 0, false});
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(the_budget_is_enough_to_the_byte),
      cmocka_unit_test(a_budget_too_small_for_a_page_is_refused_with_the_least),
      cmocka_unit_test(wrong_options_are_refused),
      cmocka_unit_test(a_step_of_two_billion_tokens_is_no_space),
      cmocka_unit_test(usage_adds_up),
      cmocka_unit_test(memory_grows_with_use_and_not_with_the_budget),
      cmocka_unit_test(every_failed_allocation_is_survived),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
