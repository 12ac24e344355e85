/* Forks, rewinds and compaction: who shares what, where a rewound sequence resumes, and that bytes survive all of it. */
#include "support.h"

#include "cache/state.h"

static const struct geometry plain = {"sharing", 2, 2, 32, 1, 4, {1, 1}, 0, false};

static struct twin *fed(struct world *w, int slot, int tokens) {
  struct twin *t = w->twins[slot] = twin_create(w);
  assert_non_null(t);
  assert_true(twin_feed(w, t, tokens));
  return t;
}

static void a_fork_copies_only_the_page_being_filled(void **state) {
  (void)state;
  struct world w;
  open_world(&w, &plain, 1);
  struct twin *a = fed(&w, 0, 64 * 10 + 5);
  oscar_cache_usage before = usage_of(&w);
  struct twin *b = w.twins[1] = twin_fork(&w, a);
  assert_non_null(b);
  assert_int_equal(usage_of(&w).exact_pages, before.exact_pages + 1);
  assert_int_equal(usage_of(&w).coded_pages, before.coded_pages);
  compare_all(&w);
  assert_true(twin_feed(&w, a, 30));
  assert_true(twin_feed(&w, b, 200));
  compare_all(&w);
  twin_free(a);
  w.twins[0] = NULL;
  compare_all(&w);

  assert_true(twin_feed(&w, b, 64 - (int)(b->length % 64)));
  before = usage_of(&w);
  w.twins[0] = twin_fork(&w, b); /* nothing is being filled: nothing is copied */
  assert_int_equal(usage_of(&w).coded_pages, before.coded_pages);
  assert_int_equal(usage_of(&w).exact_pages, before.exact_pages);
  assert_int_equal(oscar_sequence_bytes(w.twins[0]->sequence), oscar_sequence_bytes(b->sequence));
  compare_all(&w);
  close_world(&w);
}

static void forks_that_demote_a_page_share_its_codes(void **state) {
  (void)state;
  for (int lockstep = 0; lockstep < 2; lockstep++) {
    struct world w;
    open_world(&w, &plain, 1);
    struct twin *a = fed(&w, 0, 64 * 10), *b = w.twins[1] = twin_fork(&w, a);
    int64_t coded = usage_of(&w).coded_pages, exact = usage_of(&w).exact_pages;
    assert_int_equal(coded, 4); /* 1 .. 4, as page 9 is the last and 5 .. 9 are recent */
    if (lockstep) {
      assert_true(twin_begin(&w, a, 1) && twin_begin(&w, b, 1));
      for (int layer = 0; layer < w.g->layers; layer++) {
        twin_write(&w, a);
        twin_write(&w, b);
        compare_views(&w, a);
        compare_views(&w, b);
      }
      twin_commit(&w, b);
      twin_commit(&w, a);
    } else {
      assert_true(twin_feed(&w, a, 1) && twin_begin(&w, b, 1));
      twin_write(&w, b);
      compare_views(&w, b);
      twin_write(&w, b);
      twin_commit(&w, b);
    }
    assert_int_equal(usage_of(&w).coded_pages, coded + 1);
    assert_int_equal(usage_of(&w).exact_pages, exact + 2 - 1);
    compare_all(&w);
    close_world(&w);
  }
}

/* One of two steps that demote the same page is given up: the other is not disturbed, whichever comes first. */
static void an_aborted_step_does_not_take_shared_codes_away(void **state) {
  (void)state;
  for (int first = 0; first < 2; first++) {
    struct world w;
    open_world(&w, &plain, 1);
    struct twin *a = fed(&w, 0, 64 * 10), *b = w.twins[1] = twin_fork(&w, a);
    assert_true(twin_begin(&w, a, 1) && twin_begin(&w, b, 1));
    for (int layer = 0; layer < w.g->layers; layer++) {
      twin_write(&w, a);
      twin_write(&w, b);
    }
    if (first == 0) twin_abort(&w, b);
    twin_commit(&w, a);
    if (first == 1) twin_abort(&w, b);
    compare_all(&w);
    assert_true(twin_feed(&w, b, 300));
    compare_all(&w);
    close_world(&w);
  }
}

/* A and B share an exact page, A has its codes. B rewinds into the page and writes other tokens: A's codes are not B's. */
static void a_page_that_is_rewritten_forgets_its_codes(void **state) {
  (void)state;
  struct world w;
  open_world(&w, &plain, 1);
  struct twin *a = fed(&w, 0, 64 * 10), *b = w.twins[1] = twin_fork(&w, a), *c = w.twins[2] = twin_fork(&w, a);
  assert_true(twin_feed(&w, a, 500));
  int64_t exact = usage_of(&w).exact_pages;
  assert_true(twin_truncate(&w, b, 64 * 10 - 3, OSCAR_REWIND_EXACT)); /* into page 9, shared with c, encoded by a */
  assert_int_equal(b->length, 64 * 10 - 3);
  assert_int_equal(usage_of(&w).exact_pages, exact + 1);
  compare_all(&w);
  twin_free(c);
  w.twins[2] = NULL;
  assert_true(twin_feed(&w, b, 500));
  compare_all(&w);
  close_world(&w);

  /* The same with a page that B holds alone by then: no copy is made, only the link is cut. */
  open_world(&w, &plain, 1);
  a = fed(&w, 0, 64 * 10);
  b = w.twins[1] = twin_fork(&w, a);
  assert_true(twin_feed(&w, a, 500));
  exact = usage_of(&w).exact_pages;
  assert_true(twin_truncate(&w, b, 64 * 9 + 1, OSCAR_REWIND_EXACT));
  assert_int_equal(b->length, 64 * 9 + 1);
  assert_int_equal(usage_of(&w).exact_pages, exact);
  assert_true(twin_feed(&w, b, 500));
  compare_all(&w);
  close_world(&w);
}

static void rewinding_resumes_where_cache_h_says(void **state) {
  (void)state;
  const struct {
    int sink, recent, length, to, exact, refill;
  } cases[] = {
      {1, 4, 64 * 20 + 5, 64 * 20 + 5, 64 * 20 + 5, 64 * 20 + 5}, /* nothing to do */
      {1, 4, 64 * 20 + 5, 64 * 20 + 1, 64 * 20 + 1, 64 * 20 + 1}, /* within the last page */
      {1, 4, 64 * 20 + 1, 64 * 20, 64 * 20, 64 * 20},             /* page 15 is codes and no later query wants it exactly */
      {1, 4, 64 * 20 + 1, 64 * 20 - 1, 64, 64 * 15},              /* here it is wanted */
      {1, 4, 64 * 20 + 5, 64 * 12 + 10, 64, 64 * 8},              /* 8 .. 12 are wanted, all are codes */
      {1, 4, 64 * 20 + 5, 64 * 3 + 10, 64, 64},                   /* 1 .. 3 */
      {1, 4, 64 * 20 + 5, 64, 64, 64},
      {1, 4, 64 * 20 + 5, 40, 40, 40}, /* within the sink */
      {1, 4, 64 * 20 + 5, 0, 0, 0},
      {1, 4, 64 * 6, 64 * 5 + 3, 64 * 5 + 3, 64 * 5 + 3}, /* only page 0 is outside the window, and it is a sink */
      {0, 4, 64 * 20 + 5, 64 * 12 + 10, 0, 64 * 8},
      {2, 0, 64 * 20 + 5, 64 * 12 + 10, 64 * 12, 64 * 12}, /* no window: a page is recomputed exactly from its start */
      {0, 0, 64 * 20 + 5, 64 * 12, 64 * 12, 64 * 12},
      {3, 1, 64 * 20 + 5, 64 * 12 + 10, 64 * 3, 64 * 11},
  };
  for (size_t i = 0; i < ARRAY_LENGTH(cases); i++)
    for (int mode = 0; mode < 2; mode++) {
      struct geometry g = {"rewind", 1, 1, 16, cases[i].sink, cases[i].recent, {1, 1}, 0, false};
      struct world w;
      open_world(&w, &g, 1);
      struct twin *t = fed(&w, 0, cases[i].length);
      assert_true(twin_truncate(&w, t, cases[i].to, mode == 0 ? OSCAR_REWIND_EXACT : OSCAR_REWIND_REFILL));
      assert_int_equal(t->length, mode == 0 ? cases[i].exact : cases[i].refill);
      int64_t resumed = t->length;
      assert_true(twin_truncate(&w, t, resumed, OSCAR_REWIND_REFILL)); /* rewinding to where it is changes nothing */
      assert_int_equal(t->length, resumed);
      if (resumed < cases[i].to) assert_true(twin_feed(&w, t, cases[i].to - (int)resumed));
      assert_true(twin_truncate(&w, t, cases[i].to, OSCAR_REWIND_REFILL));
      assert_int_equal(t->length, cases[i].to);
      compare_all(&w);
      assert_true(twin_feed(&w, t, 300));
      compare_all(&w);
      close_world(&w);
    }
}

/* What was computed after a refill is not what a cold run computes: an exact rewind goes back before it. */
static void an_exact_rewind_goes_back_before_a_refill(void **state) {
  (void)state;
  struct world w;
  open_world(&w, &plain, 1);
  struct twin *t = fed(&w, 0, 64 * 20);
  assert_true(twin_truncate(&w, t, 64 * 12, OSCAR_REWIND_REFILL));
  assert_int_equal(t->length, 64 * 8);
  assert_true(twin_feed(&w, t, 64 * 6));
  w.twins[1] = twin_fork(&w, t);
  for (int i = 0; i < 2; i++) { /* the fork knows it, too */
    assert_true(twin_truncate(&w, w.twins[i], 64 * 14, OSCAR_REWIND_EXACT));
    assert_int_equal(w.twins[i]->length, 64);
    assert_true(twin_feed(&w, w.twins[i], 64 * 3));
    assert_true(twin_truncate(&w, w.twins[i], 64 * 4 - 1, OSCAR_REWIND_EXACT)); /* and is clean again */
    assert_int_equal(w.twins[i]->length, 64 * 4 - 1);
  }
  compare_all(&w);
  close_world(&w);
}

static void a_sequence_rewound_and_fed_again_equals_a_cold_one(void **state) {
  (void)state;
  const int tokens = 64 * 11 + 20;
  uint64_t random = 7;
  for (size_t i = 0; i < ARRAY_LENGTH(geometries); i++) {
    struct world w;
    open_world(&w, &geometries[i], 1);
    struct twin *t = fed(&w, 0, tokens); /* tags 1, 2, ... */
    for (int round = 0; round < 10; round++) {
      int64_t to = (int64_t)(test_random(&random) % (uint64_t)tokens);
      assert_true(twin_truncate(&w, t, to, OSCAR_REWIND_EXACT));
      while (t->length < tokens) {
        w.next_tag = (uint64_t)t->length + 1;
        int64_t n = 1 + (int64_t)(test_random(&random) % 100);
        assert_true(twin_feed(&w, t, (int)min64(n, tokens - t->length)));
      }
      for (int p = 0; p < page_count(tokens); p++) {
        bool cold = geometry_demotes(w.g) && p >= w.g->sink_pages && p + w.g->recent_pages < (tokens - 1) / 64;
        assert_int_equal(t->coded[p], cold);
        assert_int_equal(t->tags[p * 64], p * 64 + 1);
      }
      compare_all(&w);
    }
    close_world(&w);
  }
}

/* Two sequences whose pages lie in the same blocks; one goes, and short sequences take every block that is free. From then on an
 * exact page needs compaction, and room ends only when units do. */
static void scattered_codes_move_when_an_exact_page_needs_a_block(void **state) {
  (void)state;
  for (size_t i = 0; i < ARRAY_LENGTH(geometries); i++) {
    const struct geometry *g = &geometries[i];
    if (g->crumbs[0] == 0) continue;
    struct world w;
    world_open(&w, test_context(OSCAR_ISA_AUTO, 1), g, 64 * 24, 2, 100);
    for (int s = 0; s < 2; s++) w.twins[s] = twin_create(&w);
    for (int n = 0; n < 24; n++)
      for (int s = 0; s < 2; s++) assert_true(twin_feed(&w, w.twins[s], 64));
    const struct page_entry *table = w.twins[1]->sequence->table;
    int32_t before[24], moved = 0;
    for (int p = 0; p < 24; p++) before[p] = table[p].coded;
    twin_free(w.twins[0]);
    w.twins[0] = NULL;

    oscar_sequence *shorts[1024];
    int count = 0;
    for (; count < 1024; count++) {
      if (oscar_sequence_create(w.cache, &shorts[count]) != OSCAR_OK) break;
      if (oscar_sequence_begin(shorts[count], 1) != OSCAR_OK) break;
      assert_ok(w.context, oscar_cache_check(w.cache));
    }
    assert_true(usage_of(&w).free_units <= w.run);
    for (int p = 0; p < 24; p++) moved += table[p].coded != before[p];
    if (w.run > 1) assert_true(moved > 0);
    compare_all(&w);
    close_world(&w);
  }
}

/* Codes that move while another sequence still holds their exact form: that one takes them over all the same. */
static void codes_that_have_moved_are_still_shared(void **state) {
  (void)state;
  struct geometry g = {"moved", 2, 2, 32, 0, 4, {1, 1}, 0, true};
  struct world w;
  world_open(&w, test_context(OSCAR_ISA_AUTO, 1), &g, 64 * 24, 3, 64);
  struct twin *a = w.twins[0] = twin_create(&w), *other = w.twins[1] = twin_create(&w);
  for (int n = 0; n < 12; n++) {
    assert_true(twin_feed(&w, a, 64));
    assert_true(twin_feed(&w, other, 64));
  }
  struct twin *b = w.twins[2] = twin_fork(&w, a);
  for (int n = 0; n < 4; n++) {
    assert_true(twin_feed(&w, a, 64)); /* demotes a page that b holds exactly, */
    assert_true(twin_feed(&w, other, 64));
  }
  twin_free(other); /* whose codes now lie scattered */
  w.twins[1] = NULL;
  int32_t before[11];
  bool moved = false;
  for (int p = 7; p < 11; p++) before[p] = a->sequence->table[p].coded;
  oscar_sequence *shorts[256];
  int count = 0;
  do assert_ok(w.context, oscar_sequence_create(w.cache, &shorts[count]));
  while (oscar_sequence_begin(shorts[count++], 1) == OSCAR_OK);
  for (int p = 7; p < 11; p++) moved |= before[p] != a->sequence->table[p].coded;
  assert_true(moved);
  assert_ok(w.context, oscar_cache_check(w.cache));
  while (count > 0) oscar_sequence_free(shorts[--count]);
  int64_t coded = usage_of(&w).coded_pages;
  for (int n = 0; n < 4; n++) assert_true(twin_feed(&w, b, 64));
  assert_int_equal(usage_of(&w).coded_pages, coded);
  compare_all(&w);
  close_world(&w);
}

/* A full cache in which a sequence is cut within a shared page: what it drops makes room for the copy. */
static void a_cut_drops_pages_before_it_copies_one(void **state) {
  (void)state;
  struct world w;
  world_open(&w, test_context(OSCAR_ISA_AUTO, 1), &plain, 64 * 8, 1, 64 * 8);
  struct twin *a = fed(&w, 0, 64 * 4);
  struct twin *b = w.twins[1] = twin_fork(&w, a);
  assert_non_null(b);
  assert_true(twin_feed(&w, a, 64 + 1));
  for (int i = 2; i < 8 && usage_of(&w).free_units > w.run; i++) fed(&w, i, 1);
  assert_true(usage_of(&w).free_units < w.run);
  int64_t resume;
  /* b has nothing of its own to drop: no room, and nothing changes */
  assert_false(twin_truncate(&w, b, 64 * 4 - 1, OSCAR_REWIND_EXACT));
  assert_int_equal(oscar_sequence_truncate(b->sequence, 64 * 4 - 1, OSCAR_REWIND_EXACT, &resume), OSCAR_NO_SPACE);
  assert_non_null(strstr(oscar_last_error(w.context), "full"));
  compare_all(&w);
  assert_true(twin_truncate(&w, a, 64 * 4 - 1, OSCAR_REWIND_EXACT));
  assert_int_equal(a->length, 64 * 4 - 1);
  compare_all(&w);
  close_world(&w);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(a_fork_copies_only_the_page_being_filled),
      cmocka_unit_test(forks_that_demote_a_page_share_its_codes),
      cmocka_unit_test(an_aborted_step_does_not_take_shared_codes_away),
      cmocka_unit_test(a_page_that_is_rewritten_forgets_its_codes),
      cmocka_unit_test(rewinding_resumes_where_cache_h_says),
      cmocka_unit_test(an_exact_rewind_goes_back_before_a_refill),
      cmocka_unit_test(a_sequence_rewound_and_fed_again_equals_a_cold_one),
      cmocka_unit_test(scattered_codes_move_when_an_exact_page_needs_a_block),
      cmocka_unit_test(codes_that_have_moved_are_still_shared),
      cmocka_unit_test(a_cut_drops_pages_before_it_copies_one),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
