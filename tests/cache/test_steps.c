/* Feeding: the reading rule against its text, chunk sizes against each other, wrong use and bad numbers against the statuses. */
#include "support.h"

/* Every length, token by token, for small windows: the form of each page is what cache.h says. */
static void the_reading_rule_decides_the_form_of_every_page(void **state) {
  (void)state;
  for (int sink = 0; sink <= 2; sink++)
    for (int recent = 0; recent <= 3; recent++) {
      struct geometry g = {"rule", 1, 1, 16, sink, recent, {1, 1}, 0, false};
      struct world w;
      open_world(&w, &g, 1);
      w.twins[0] = twin_create(&w);
      for (int length = 1; length <= 64 * 7 + 2; length++) {
        assert_true(twin_feed(&w, w.twins[0], 1));
        for (int p = 0; p <= (length - 1) / 64; p++) {
          bool coded, exact = p < sink || p + recent >= (length - 1) / 64;
          assert_ok(w.context, oscar_sequence_read_page(w.twins[0]->sequence, p, 0, 0, &coded, NULL, NULL));
          assert_int_equal(coded, !exact);
        }
      }
      compare_all(&w);
      close_world(&w);
    }
}

static void any_chunks_give_the_same_pages(void **state) {
  (void)state;
  const int tokens = 64 * 9 + 17, chunks[] = {1, 7, 64, 500, tokens};
  for (size_t i = 0; i < ARRAY_LENGTH(geometries); i++) {
    struct world w;
    open_world(&w, &geometries[i], 2);
    size_t pages = (size_t)page_count(tokens) * (size_t)(w.g->layers * w.g->kv_heads);
    const size_t bytes = (size_t)2 * PAGE_BUFFER;
    uint8_t *first = calloc(pages, bytes), *now = calloc(1, bytes);
    assert_non_null(first);
    assert_non_null(now);
    for (size_t j = 0; j < ARRAY_LENGTH(chunks); j++) {
      struct twin *t = w.twins[0] = twin_create(&w);
      w.next_tag = 1;
      while (t->length < tokens) {
        int left = tokens - (int)t->length;
        assert_true(twin_feed(&w, t, left < chunks[j] ? left : chunks[j]));
      }
      compare_all(&w);
      size_t index = 0;
      for (int p = 0; p < page_count(tokens); p++)
        for (int layer = 0; layer < w.g->layers; layer++)
          for (int head = 0; head < w.g->kv_heads; head++, index++) {
            bool coded;
            memset(now, 0, bytes);
            assert_ok(w.context, oscar_sequence_read_page(t->sequence, p, layer, head, &coded, now, now + PAGE_BUFFER));
            if (j == 0) memcpy(first + index * bytes, now, bytes);
            assert_memory_equal(first + index * bytes, now, bytes);
          }
      assert_int_equal(index, pages);
      twin_free(t);
      w.twins[0] = NULL;
    }
    free(first);
    free(now);
    close_world(&w);
  }
}

static void an_open_step_shows_each_query_the_form_it_reads(void **state) {
  (void)state;
  for (size_t i = 0; i < ARRAY_LENGTH(geometries); i++) {
    struct world w;
    open_world(&w, &geometries[i], 1);
    struct twin *t = w.twins[0] = twin_create(&w);
    const int steps[] = {3, 61, 1, 300, 1, 83, 64, 1, 130, 513};
    for (size_t j = 0; j < ARRAY_LENGTH(steps); j++) {
      assert_true(twin_begin(&w, t, steps[j]));
      assert_int_equal(sequence_visible(t->sequence, 0), -1);
      for (int layer = 0; layer < w.g->layers; layer++) {
        twin_write(&w, t);
        compare_views(&w, t);
      }
      twin_commit(&w, t);
      assert_int_equal(sequence_visible(t->sequence, 0), t->length);
    }
    compare_all(&w);
    close_world(&w);
  }
}

static void layers_may_be_written_in_any_order(void **state) {
  (void)state;
  struct geometry g = {"order", 3, 1, 16, 0, 0, {1, 1}, 0, false};
  struct world w;
  open_world(&w, &g, 1);
  struct twin *t = w.twins[0] = twin_create(&w);
  assert_true(twin_begin(&w, t, 200));
  for (int i = 0; i < 3; i++) {
    t->layers = (i + 2) % 3; /* 2, 0, 1 */
    twin_write(&w, t);
  }
  twin_commit(&w, t);
  compare_all(&w);
  close_world(&w);
}

static void an_aborted_step_leaves_no_trace(void **state) {
  (void)state;
  for (size_t i = 0; i < ARRAY_LENGTH(geometries); i++) {
    struct world w;
    open_world(&w, &geometries[i], 1);
    struct twin *t = w.twins[0] = twin_create(&w);
    for (int length = 0; length < 1000; length += 111) {
      oscar_cache_usage before = usage_of(&w), after;
      size_t bytes = oscar_sequence_bytes(t->sequence);
      for (int layers = 0; layers <= w.g->layers; layers++) {
        assert_true(twin_begin(&w, t, 400));
        while (t->layers < layers) twin_write(&w, t);
        twin_abort(&w, t);
        after = usage_of(&w);
        assert_int_equal(after.held_bytes, before.held_bytes);
        assert_int_equal(after.free_units, before.free_units);
        assert_int_equal(oscar_sequence_bytes(t->sequence), bytes);
        compare_all(&w);
      }
      assert_true(twin_feed(&w, t, 111));
    }
    close_world(&w);
  }
}

static void numbers_that_are_not_finite_are_named_by_place(void **state) {
  (void)state;
  struct geometry g = {"finite", 2, 3, 16, 0, 0, {1, 1}, 0, false};
  struct world w;
  open_world(&w, &g, 2);
  struct twin *t = w.twins[0] = twin_create(&w);
  assert_true(twin_feed(&w, t, 70));
  const float bad[] = {NAN, INFINITY, -INFINITY, 3.4e38f /* rounds to infinity */, -NAN};
  const size_t heads = 3, d = 16, n = 10;
  float *k = calloc(n * heads * d, sizeof *k), *v = calloc(n * heads * d, sizeof *v);
  assert_non_null(k);
  assert_non_null(v);
  for (size_t i = 0; i < ARRAY_LENGTH(bad); i++) {
    assert_ok(w.context, oscar_sequence_begin(t->sequence, (int)n));
    assert_ok(w.context, oscar_sequence_write(t->sequence, 0, k, v));
    v[(5 * heads + 1) * d + i] = bad[i];
    k[(7 * heads + 2) * d] = bad[i];
    assert_int_equal(oscar_sequence_write(t->sequence, 1, k, v), OSCAR_NUMERIC);
    assert_string_equal(oscar_last_error(w.context), "layer 1, KV head 1, position 75: the value is not finite in BF16");
    v[(5 * heads + 1) * d + i] = 0;
    k[(7 * heads + 2) * d] = 0;
    assert_int_equal(oscar_sequence_write(t->sequence, 1, k, v), OSCAR_INVALID_ARGUMENT);
    assert_int_equal(oscar_sequence_commit(t->sequence), OSCAR_INVALID_ARGUMENT);
    oscar_sequence_abort(t->sequence);
    compare_all(&w);
  }
  /* Finite in BF16, but the scale of the row is beyond fp16: found when the page is demoted. */
  k[(9 * heads + 1) * d] = 1e30f;
  assert_ok(w.context, oscar_sequence_begin(t->sequence, (int)n));
  for (int layer = 0; layer < 2; layer++) assert_ok(w.context, oscar_sequence_write(t->sequence, layer, k, v));
  assert_ok(w.context, oscar_sequence_commit(t->sequence));
  memset(k, 0, n * heads * d * sizeof *k);
  for (int fed = 80; fed < 120; fed += 10) {
    assert_ok(w.context, oscar_sequence_begin(t->sequence, (int)n));
    for (int layer = 0; layer < 2; layer++) assert_ok(w.context, oscar_sequence_write(t->sequence, layer, k, v));
    assert_ok(w.context, oscar_sequence_commit(t->sequence));
  }
  assert_ok(w.context, oscar_sequence_begin(t->sequence, (int)n));
  assert_int_equal(oscar_sequence_write(t->sequence, 0, k, v), OSCAR_NUMERIC);
  assert_string_equal(oscar_last_error(w.context),
                      "layer 0, KV head 1, position 79: the key cannot be encoded: its scale leaves the range of fp16");
  oscar_sequence_abort(t->sequence);
  assert_ok(w.context, oscar_cache_check(w.cache));
  free(k);
  free(v);
  close_world(&w);
}

struct refusal {
  int kv_head, row;
  oscar_side side;
  bool infinite; /* gives back a number that BF16 does not hold, instead of saying so */
};

static int refuse(const void *user, int layer, int kv_head, oscar_side side, int head_dim, const float *rows, float *out) {
  (void)layer;
  const struct refusal *r = user;
  memcpy(out, rows, sizeof *out * (size_t)(64 * head_dim));
  if (kv_head != r->kv_head || side != r->side) return 64;
  if (!r->infinite) return r->row;
  out[r->row * head_dim + 3] = 3.4e38f; /* rounds to infinity */
  return 64;
}

static void what_a_filter_refuses_is_named_by_place(void **state) {
  (void)state;
  const struct refusal refusals[] = {
      {1, 0, OSCAR_KEYS, false}, {0, 63, OSCAR_VALUES, false}, {1, 17, OSCAR_VALUES, true}, {0, 0, OSCAR_KEYS, true}};
  for (size_t i = 0; i < ARRAY_LENGTH(refusals); i++) {
    oscar_context *c = test_context(OSCAR_ISA_AUTO, 2);
    const oscar_page_filter filter = {refuse, &refusals[i], 1};
    oscar_cache_options o = {.layers = 1, .kv_heads = 2, .head_dim = 16, .recent_pages = 1, .filter = &filter};
    o.budget_bytes = oscar_cache_bytes_for(&o, 1000, 1, 1000);
    oscar_cache *cache;
    oscar_sequence *s;
    assert_ok(c, oscar_cache_create(c, &o, &cache));
    assert_ok(c, oscar_sequence_create(cache, &s));
    float *rows = calloc((size_t)(300 * 2 * 16), sizeof *rows);
    assert_non_null(rows);
    assert_ok(c, oscar_sequence_begin(s, 128));
    assert_ok(c, oscar_sequence_write(s, 0, rows, rows)); /* nothing to demote */
    assert_ok(c, oscar_sequence_commit(s));
    assert_ok(c, oscar_sequence_begin(s, 300));
    assert_int_equal(oscar_sequence_write(s, 0, rows, rows), OSCAR_NUMERIC);
    char expected[128];
    snprintf(expected, sizeof expected, "layer 0, KV head %d, position %d: the %s cannot be encoded", refusals[i].kv_head,
             refusals[i].row, refusals[i].side == OSCAR_KEYS ? "key" : "value");
    assert_memory_equal(oscar_last_error(c), expected, strlen(expected));
    oscar_sequence_abort(s);
    assert_int_equal(oscar_sequence_length(s), 128);
    assert_ok(c, oscar_cache_check(cache));
    free(rows);
    oscar_cache_free(cache);
    oscar_context_free(c);
  }
}

static void the_largest_bf16_number_is_kept(void **state) {
  (void)state;
  struct world w;
  struct geometry g = {"largest", 1, 1, 16, 1, 4, {0, 0}, 0, false};
  open_world(&w, &g, 1);
  struct twin *t = w.twins[0] = twin_create(&w);
  float k[16] = {0x1.fep127f, -0x1.fep127f, 0x1p-149f, -0.0f}, v[16] = {0};
  assert_ok(w.context, oscar_sequence_begin(t->sequence, 1));
  assert_ok(w.context, oscar_sequence_write(t->sequence, 0, k, v));
  assert_ok(w.context, oscar_sequence_commit(t->sequence));
  uint16_t read[64 * 16];
  bool coded;
  assert_ok(w.context, oscar_sequence_read_page(t->sequence, 0, 0, 0, &coded, read, NULL));
  for (int i = 0; i < 16; i++) assert_int_equal(read[i], f32_to_bf16(k[i]));
  for (int i = 16; i < 64 * 16; i++) assert_int_equal(read[i], 0);
  close_world(&w);
}

static void wrong_use_is_refused_and_changes_nothing(void **state) {
  (void)state;
  struct world w;
  open_world(&w, &geometries[1], 1);
  struct twin *t = w.twins[0] = twin_create(&w);
  oscar_sequence *s = t->sequence, *copy;
  int64_t resume;
  bool coded;
  assert_true(twin_feed(&w, t, 100));
  float *row = calloc((size_t)(w.g->kv_heads * w.g->head_dim), sizeof *row);
  assert_int_equal(oscar_sequence_begin(s, 0), OSCAR_INVALID_ARGUMENT);
  assert_int_equal(oscar_sequence_begin(s, -1), OSCAR_INVALID_ARGUMENT);
  assert_int_equal(oscar_sequence_write(s, 0, row, row), OSCAR_INVALID_ARGUMENT);
  assert_int_equal(oscar_sequence_commit(s), OSCAR_INVALID_ARGUMENT);
  oscar_sequence_abort(s); /* nothing to abort */
  assert_int_equal(oscar_sequence_truncate(s, 101, OSCAR_REWIND_EXACT, &resume), OSCAR_INVALID_ARGUMENT);
  assert_int_equal(oscar_sequence_truncate(s, -1, OSCAR_REWIND_EXACT, &resume), OSCAR_INVALID_ARGUMENT);
  assert_int_equal(oscar_sequence_truncate(s, 1, (oscar_rewind)7, &resume), OSCAR_INVALID_ARGUMENT);
  assert_int_equal(oscar_sequence_read_page(s, 2, 0, 0, &coded, NULL, NULL), OSCAR_INVALID_ARGUMENT);
  assert_int_equal(oscar_sequence_read_page(s, -1, 0, 0, &coded, NULL, NULL), OSCAR_INVALID_ARGUMENT);
  assert_int_equal(oscar_sequence_read_page(s, 0, 2, 0, &coded, NULL, NULL), OSCAR_INVALID_ARGUMENT);
  assert_int_equal(oscar_sequence_read_page(s, 0, 0, 2, &coded, NULL, NULL), OSCAR_INVALID_ARGUMENT);
  compare_all(&w);

  assert_ok(w.context, oscar_sequence_begin(s, 1));
  assert_int_equal(oscar_sequence_begin(s, 1), OSCAR_INVALID_ARGUMENT);
  assert_int_equal(oscar_sequence_fork(s, &copy), OSCAR_INVALID_ARGUMENT);
  assert_null(copy);
  assert_int_equal(oscar_sequence_truncate(s, 1, OSCAR_REWIND_EXACT, &resume), OSCAR_INVALID_ARGUMENT);
  assert_int_equal(oscar_sequence_write(s, 2, row, row), OSCAR_INVALID_ARGUMENT);
  assert_int_equal(oscar_sequence_write(s, -1, row, row), OSCAR_INVALID_ARGUMENT);
  assert_ok(w.context, oscar_sequence_write(s, 1, row, row));
  assert_int_equal(oscar_sequence_write(s, 1, row, row), OSCAR_INVALID_ARGUMENT);
  assert_int_equal(oscar_sequence_commit(s), OSCAR_INVALID_ARGUMENT); /* a layer is missing */
  oscar_sequence_abort(s);
  compare_all(&w);
  free(row);
  close_world(&w);
}

/* Rows of several sequences in one call lie where those of single calls do; a sequence of another cache is refused before any is
 * written. */
static void sequences_written_together_are_those_written_alone(void **state) {
  (void)state;
  enum { COUNT = 3, MOST_TOKENS = 200 };
  const struct geometry *g = &geometries[1];
  const size_t width = (size_t)(g->kv_heads * g->head_dim);
  const int steps[4][COUNT] = {{1, 130, 64}, {200, 3, 1}, {1, 1, 1}, {64, 190, 65}};
  struct world w, other;
  open_world(&w, g, 2);
  open_world(&other, g, 1);
  oscar_sequence *together[COUNT], *alone[COUNT], *stranger;
  uint64_t seed = 1;
  for (int i = 0; i < COUNT; i++) {
    assert_ok(w.context, oscar_sequence_create(w.cache, &together[i]));
    assert_ok(w.context, oscar_sequence_create(w.cache, &alone[i]));
  }
  float *x = malloc(sizeof *x * width * COUNT * MOST_TOKENS);
  assert_non_null(x);
  for (int step = 0; step < 4; step++) {
    for (size_t i = 0; i < width * COUNT * MOST_TOKENS; i++) x[i] = test_normal(&seed);
    for (int i = 0; i < COUNT; i++) {
      assert_ok(w.context, oscar_sequence_begin(together[i], steps[step][i]));
      assert_ok(w.context, oscar_sequence_begin(alone[i], steps[step][i]));
    }
    for (int layer = 0; layer < g->layers; layer++) {
      assert_ok(w.context, oscar_sequences_write(together, COUNT, layer, x, x + 1));
      assert_int_equal(oscar_sequences_write(together, COUNT, layer, x, x + 1), OSCAR_INVALID_ARGUMENT);
      size_t row = 0;
      for (int i = 0; i < COUNT; row += (size_t)steps[step][i++])
        assert_ok(w.context, oscar_sequence_write(alone[i], layer, x + row * width, x + row * width + 1));
    }
    for (int i = 0; i < COUNT; i++) {
      assert_ok(w.context, oscar_sequence_commit(together[i]));
      assert_ok(w.context, oscar_sequence_commit(alone[i]));
    }
  }
  uint8_t *pages[2][2];
  for (int i = 0; i < 4; i++) assert_non_null(pages[i / 2][i % 2] = calloc(1, PAGE_BUFFER));
  for (int i = 0; i < COUNT; i++)
    for (int p = 0; p < page_count((int)oscar_sequence_length(alone[i])); p++)
      for (int place = 0; place < g->layers * g->kv_heads; place++) {
        bool coded[2];
        for (int which = 0; which < 2; which++)
          assert_ok(w.context, oscar_sequence_read_page(which ? alone[i] : together[i], p, place / g->kv_heads,
                                                        place % g->kv_heads, &coded[which], pages[which][0], pages[which][1]));
        assert_int_equal(coded[0], coded[1]);
        for (int side = 0; side < 2; side++) assert_memory_equal(pages[0][side], pages[1][side], PAGE_BUFFER);
      }
  assert_ok(other.context, oscar_sequence_create(other.cache, &stranger));
  assert_ok(other.context, oscar_sequence_begin(stranger, 1));
  assert_ok(w.context, oscar_sequence_begin(together[0], 1));
  assert_int_equal(oscar_sequences_write((oscar_sequence *[]){together[0], stranger}, 2, 0, x, x), OSCAR_INVALID_ARGUMENT);
  assert_int_equal(sequence_visible(together[0], 0), -1);
  for (int i = 0; i < 4; i++) free(pages[i / 2][i % 2]);
  free(x);
  close_world(&other);
  close_world(&w);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(the_reading_rule_decides_the_form_of_every_page),
      cmocka_unit_test(any_chunks_give_the_same_pages),
      cmocka_unit_test(an_open_step_shows_each_query_the_form_it_reads),
      cmocka_unit_test(layers_may_be_written_in_any_order),
      cmocka_unit_test(an_aborted_step_leaves_no_trace),
      cmocka_unit_test(numbers_that_are_not_finite_are_named_by_place),
      cmocka_unit_test(what_a_filter_refuses_is_named_by_place),
      cmocka_unit_test(the_largest_bf16_number_is_kept),
      cmocka_unit_test(wrong_use_is_refused_and_changes_nothing),
      cmocka_unit_test(sequences_written_together_are_those_written_alone),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
