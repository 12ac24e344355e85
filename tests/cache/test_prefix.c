/* The prefix tree: who shares what, where a look-up resumes, what eviction gives back, and thousands of random operations. */
#include "support.h"

#include "failing_alloc.h"
#include "prefix_model.h"

static const struct geometry plain = {"prefix", 2, 1, 32, 1, 4, {1, 1}, 0, false};

static void open_texts(struct texts *x, const struct geometry *g) {
  texts_open(x, test_context(OSCAR_ISA_AUTO, 1), g, MODEL_TOKENS, 6, MODEL_TOKENS, 1);
  assert_non_null(x->tree);
}

static void close_texts(struct texts *x) {
  oscar_context *context = x->w.context;
  texts_close(x);
  oscar_context_free(context);
}

static oscar_prefix_stats stats_of(const struct texts *x) {
  oscar_prefix_stats stats;
  oscar_prefix_stats_get(x->tree, &stats);
  return stats;
}

/* Token i of a string: the same for all variants up to `parts`. */
static void fill_text(struct text *text, int64_t length, int64_t parts, int32_t variant) {
  text->length = length;
  for (int64_t i = 0; i < length; i++) text->tokens[i] = (int32_t)i * 7 + (i >= parts ? 100000 * variant : 0);
}

/* A cold sequence in `slot`. */
static struct twin *cold(struct texts *x, size_t slot, int64_t length, int64_t parts, int32_t variant) {
  struct twin *t = x->w.twins[slot] = twin_create(&x->w);
  assert_non_null(t);
  fill_text(&x->text[slot], length, parts, variant);
  assert_true(text_feed(x, slot, (int)length, NULL, NULL));
  return t;
}

static void leave(struct texts *x, size_t slot) {
  twin_free(x->w.twins[slot]);
  x->w.twins[slot] = NULL;
}

static oscar_prefix_match taken(struct texts *x, size_t slot, const struct text *text, int64_t count, oscar_prefix_reuse reuse) {
  oscar_prefix_match m;
  assert_ok(x->w.context, oscar_prefix_match_get(x->tree, text->tokens, count, reuse, &m));
  text_take(x, slot, text->tokens, count, reuse);
  assert_non_null(x->w.twins[slot]);
  return m;
}

static void the_end_of_a_live_or_parked_sequence_is_resumed_at_no_cost(void **state) {
  (void)state;
  for (size_t i = 0; i < ARRAY_LENGTH(geometries); i++)
    for (int parked = 0; parked < 2; parked++)
      for (int ends = 0; ends < 3; ends++) {
        struct texts x;
        open_texts(&x, &geometries[i]);
        const int64_t length = 64 * 11 + (int[]){0, 1, 37}[ends];
        cold(&x, 0, length, 0, 0);
        struct text text = x.text[0];
        text_insert(&x, 0, parked);
        fill_text(&text, length + 100, length, 1);
        for (int reuse = OSCAR_PREFIX_EXACT; reuse <= OSCAR_PREFIX_REFILL; reuse++) {
          oscar_prefix_match m = taken(&x, (size_t)reuse, &text, length + 100, (oscar_prefix_reuse)reuse);
          assert_int_equal(m.known_tokens, length);
          assert_int_equal(m.reused_tokens, length);
          assert_int_equal(m.refill_tokens, 0);
          assert_int_equal(m.compute_tokens, 100);
          assert_true(m.exact);
          assert_true(text_feed(&x, (size_t)reuse, 100, NULL, NULL));
        }
        compare_all(&x.w);
        close_texts(&x);
      }
}

/* What a refill gives is what a cold sequence is after a truncate with refill; what exact gives is what it is after an exact one,
 * or later where the tree has more than one sequence has. */
static void resuming_in_the_middle_is_a_truncation_of_a_cold_sequence(void **state) {
  (void)state;
  uint64_t random = 5;
  for (size_t i = 0; i < ARRAY_LENGTH(geometries); i++)
    for (int round = 0; round < 6; round++) {
      struct texts x;
      open_texts(&x, &geometries[i]);
      const int64_t length = 64 * 14 + 20, at = (int64_t)(test_random(&random) % (uint64_t)length);
      cold(&x, 0, length, 0, 0);
      text_insert(&x, 0, false);
      struct text text;
      fill_text(&text, at + 50, at, 1);
      for (int reuse = OSCAR_PREFIX_EXACT; reuse <= OSCAR_PREFIX_REFILL; reuse++) {
        const oscar_rewind mode = reuse == OSCAR_PREFIX_EXACT ? OSCAR_REWIND_EXACT : OSCAR_REWIND_REFILL;
        oscar_prefix_match m = taken(&x, 1, &text, at + 50, (oscar_prefix_reuse)reuse);
        struct twin *t = x.w.twins[1], *same = cold(&x, 2, length, 0, 0);
        text_truncate(&x, 2, at, mode);
        assert_int_equal(m.reused_tokens, same->length);
        assert_int_equal(t->sequence->refilled_from, same->sequence->refilled_from);
        assert_int_equal(t->sequence->cold_tokens, same->sequence->cold_tokens);
        assert_memory_equal(t->tags, same->tags, (size_t)t->length * sizeof t->tags[0]);
        if (mode == OSCAR_REWIND_REFILL && m.refill_tokens > 0)
          assert_int_equal(m.reused_tokens + m.refill_tokens, m.known_tokens);
        fill_text(&x.text[2], at + 50, at, 1);
        for (size_t slot = 1; slot < 3; slot++)
          assert_true(text_feed(&x, slot, (int)(at + 50 - same->length) - 10 * (slot == 1), NULL, NULL));
        assert_true(text_feed(&x, 1, 10, NULL, NULL));
        for (int64_t p = 0; p < page_count(t->length); p++) assert_int_equal(t->coded[p], same->coded[p]);
        assert_memory_equal(t->tags, same->tags, (size_t)t->length * sizeof t->tags[0]);
        compare_all(&x.w);
        leave(&x, 1);
        leave(&x, 2);
      }
      close_texts(&x);
    }
}

/* A system prompt of 4096 tokens, 32 sequences. */
static void a_prompt_that_many_share_is_stored_once(void **state) {
  (void)state;
  const struct geometry g = {"shared", 1, 1, 16, 1, 4, {1, 1}, 0, false};
  enum { PROMPT = 4096, OWN = 200, MANY = 32 };
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 1);
  oscar_codec_set *codecs = geometry_codecs(c, &g);
  oscar_cache_options o = geometry_options(&g, codecs);
  o.budget_bytes = oscar_cache_bytes_for(&o, PROMPT + 64 * 10, MANY, PROMPT);
  oscar_cache *cache;
  oscar_prefix *tree;
  assert_ok(c, oscar_cache_create(c, &o, &cache));
  assert_ok(c, oscar_prefix_create(cache, &tree));
  static int32_t tokens[PROMPT + OWN];
  static float rows[(PROMPT + OWN) * 16];
  for (int i = 0; i < PROMPT; i++) tokens[i] = i * 3;
  oscar_sequence *all[MANY];
  oscar_cache_usage first, last;
  for (int s = 0; s < MANY; s++) {
    oscar_prefix_match m;
    for (int i = 0; i < OWN; i++) tokens[PROMPT + i] = 100000 * (s + 1) + i;
    assert_ok(c, oscar_prefix_take(tree, tokens, PROMPT + OWN, OSCAR_PREFIX_EXACT, &all[s], &m));
    assert_int_equal(m.reused_tokens, s == 0 ? 0 : PROMPT);
    if (s == 0) { /* the prompt, parked: its end can be resumed exactly by all */
      assert_ok(c, oscar_sequence_begin(all[0], PROMPT));
      assert_ok(c, oscar_sequence_write(all[0], 0, rows, rows));
      assert_ok(c, oscar_sequence_commit(all[0]));
      assert_ok(c, oscar_prefix_park(tree, all[0], tokens));
      oscar_cache_usage_get(cache, &first);
      assert_ok(c, oscar_prefix_take(tree, tokens, PROMPT, OSCAR_PREFIX_EXACT, &all[0], &m));
      assert_int_equal(m.reused_tokens, PROMPT);
    }
    assert_ok(c, oscar_sequence_begin(all[s], OWN));
    assert_ok(c, oscar_sequence_write(all[s], 0, rows, rows));
    assert_ok(c, oscar_sequence_commit(all[s]));
    assert_ok(c, oscar_prefix_insert(tree, all[s], tokens));
  }
  assert_ok(c, oscar_cache_check(cache));
  oscar_cache_usage_get(cache, &last);
  /* The prompt: a sink, 58 pages of codes and 5 exact pages, of which the 3 that a sequence demotes are codes as well, once. Each
   * sequence: 4 pages begun of its own; as 200 tokens end in page 67, pages 63 and on are exact. */
  assert_int_equal(first.exact_pages, 1 + 5);
  assert_int_equal(first.coded_pages, 58);
  assert_int_equal(last.coded_pages, 58 + 4);
  assert_int_equal(last.exact_pages, 1 + 5 + MANY * 4);
  oscar_prefix_stats stats;
  oscar_prefix_stats_get(tree, &stats);
  assert_int_equal(stats.known_pages, 64 + MANY * 3);
  assert_int_equal(stats.attached, MANY);
  assert_int_equal(stats.reused_exact_tokens, (int64_t)MANY * PROMPT);
  assert_true(stats.own_bytes <= oscar_prefix_bytes_for(PROMPT + MANY * OWN, MANY + 1));

  /* The same fed cold and inserted afterwards: pages become one. */
  for (int s = 0; s < MANY; s++) oscar_sequence_free(all[s]);
  oscar_prefix_evict(tree, OSCAR_PREFIX_ALL, NULL);
  oscar_cache_usage_get(cache, &last);
  assert_int_equal(last.exact_pages + last.coded_pages, 0);
  for (int s = 0; s < 4; s++) {
    assert_ok(c, oscar_sequence_create(cache, &all[s]));
    for (int i = 0; i < OWN; i++) tokens[PROMPT + i] = 100000 * (s + 1) + i;
    assert_ok(c, oscar_sequence_begin(all[s], PROMPT + OWN));
    assert_ok(c, oscar_sequence_write(all[s], 0, rows, rows));
    assert_ok(c, oscar_sequence_commit(all[s]));
    assert_ok(c, oscar_prefix_insert(tree, all[s], tokens));
  }
  oscar_cache_usage_get(cache, &last);
  assert_int_equal(last.coded_pages, 62);
  assert_int_equal(last.exact_pages, 1 + 1 + 4 * 4); /* the sink, page 63, their own */
  oscar_prefix_stats_get(tree, &stats);
  assert_int_equal(stats.shared_pages, 3 * 64);
  assert_ok(c, oscar_cache_check(cache));
  oscar_cache_free(cache);
  oscar_codec_set_free(codecs);
  oscar_context_free(c);
}

/* The tree follows a live sequence: exact pages that the sequence gives up are not kept. */
static void a_live_sequence_costs_no_pages_in_the_tree(void **state) {
  (void)state;
  struct texts x;
  open_texts(&x, &plain);
  struct twin *t = cold(&x, 0, 64 * 8 + 5, 0, 0);
  text_insert(&x, 0, false);
  assert_int_equal(stats_of(&x).page_bytes, 0);
  for (int n = 0; n < 12; n++) {
    fill_text(&x.text[0], t->length + 40, 0, 0);
    assert_true(text_feed(&x, 0, 40, NULL, NULL));
    assert_int_equal(stats_of(&x).page_bytes, 0);
    if (n % 3 == 0) text_insert(&x, 0, false);
    assert_int_equal(stats_of(&x).page_bytes, 0);
  }
  assert_int_equal(usage_of(&x.w).exact_pages, 1 + 5);
  const int64_t end = page_count(t->length) * 64;
  fill_text(&x.text[0], end, 0, 0);
  assert_true(text_feed(&x, 0, (int)(end - t->length), NULL, NULL));
  text_insert(&x, 0, false);
  text_truncate(&x, 0, end - 3, OSCAR_REWIND_EXACT); /* into a page that tree and sequence have: no copy */
  assert_int_equal(t->length, end - 3);
  assert_int_equal(usage_of(&x.w).exact_pages, 1 + 5);
  assert_int_equal(stats_of(&x).page_bytes, 0);
  check_end(&x, 0);
  compare_all(&x.w);
  leave(&x, 0);
  assert_int_equal(usage_of(&x.w).exact_pages, 1); /* the sink */
  close_texts(&x);
}

/* After a refill a page is not what a cold run makes: exact look-ups do not get it, and a cold one takes its place. */
static void what_a_refill_computed_is_not_taken_for_cold(void **state) {
  (void)state;
  struct texts x;
  open_texts(&x, &plain);
  cold(&x, 0, 64 * 14, 0, 0);
  text_insert(&x, 0, false);
  leave(&x, 0);
  struct text text;
  fill_text(&text, 64 * 20 + 9, 64 * 12 + 3, 1);
  oscar_prefix_match m = taken(&x, 1, &text, text.length, OSCAR_PREFIX_REFILL);
  assert_int_equal(m.reused_tokens, 64 * 8);
  assert_int_equal(m.refill_tokens, 64 * 4);
  assert_int_equal(m.known_tokens, 64 * 12); /* what follows of page 12 is there as no exact page */
  assert_false(m.exact);
  assert_true(text_feed(&x, 1, (int)(text.length - 64 * 8), NULL, NULL));
  text_insert(&x, 1, true);
  m = taken(&x, 2, &text, text.length, OSCAR_PREFIX_EXACT);
  assert_int_equal(m.reused_tokens, 64); /* the sink */
  m = taken(&x, 3, &text, text.length, OSCAR_PREFIX_REFILL);
  assert_int_equal(m.reused_tokens, text.length);
  assert_int_equal(m.refill_tokens, 0);
  assert_false(m.exact);
  assert_true(x.w.twins[3]->deviates[text.length - 1]);
  leave(&x, 3);
  assert_true(text_feed(&x, 2, (int)(text.length - 64), NULL, NULL));
  text_insert(&x, 2, true);
  assert_int_equal(stats_of(&x).superseded_parked, 1);
  m = taken(&x, 2, &text, text.length, OSCAR_PREFIX_EXACT);
  assert_int_equal(m.reused_tokens, text.length);
  close_texts(&x);
}

/* Whole pages behind a refill whose codes are cold: an exact look-up wants their exact form cold as well. */
static void exact_forms_computed_after_a_refill_are_not_taken_for_cold(void **state) {
  (void)state;
  struct texts x;
  open_texts(&x, &plain);
  cold(&x, 0, 64 * 14, 0, 0);
  text_insert(&x, 0, false);
  leave(&x, 0);
  struct text text;
  fill_text(&text, 64 * 9 + 20, 64 * 14, 0);
  taken(&x, 1, &text, text.length, OSCAR_PREFIX_REFILL);
  assert_int_equal(x.w.twins[1]->length, 64 * 5);
  assert_true(text_feed(&x, 1, 64 * 4, NULL, NULL));
  x.text[1].length = 64 * 9;
  text_insert(&x, 1, true); /* its recent pages 5 .. 8 lie in nodes with cold codes */
  oscar_prefix_match m = taken(&x, 1, &text, 64 * 9, OSCAR_PREFIX_REFILL);
  assert_int_equal(m.reused_tokens, 64 * 9);
  assert_false(m.exact);
  for (int64_t end = 64 * 9 - 5; end <= 64 * 9 + 20; end += 5) {
    assert_ok(x.w.context, oscar_prefix_match_get(x.tree, text.tokens, end, OSCAR_PREFIX_EXACT, &m));
    assert_int_equal(m.reused_tokens, 64);
  }
  close_texts(&x);
}

/* A short turn after a refill, parked: pages before the refill may stay codes, and the next turn costs nothing. */
static void a_sequence_parked_soon_after_a_refill_resumes_at_its_end(void **state) {
  (void)state;
  struct texts x;
  open_texts(&x, &plain);
  cold(&x, 0, 64 * 14, 0, 0);
  text_insert(&x, 0, false);
  leave(&x, 0);
  struct text text;
  fill_text(&text, 64 * 10 + 9, 64 * 10, 1);
  taken(&x, 1, &text, text.length, OSCAR_PREFIX_REFILL);
  assert_int_equal(x.w.twins[1]->length, 64 * 6);
  assert_true(text_feed(&x, 1, (int)(text.length - 64 * 6), NULL, NULL));
  text_truncate(&x, 1, 64 * 9 + 30, OSCAR_REWIND_REFILL);
  assert_int_equal(x.w.twins[1]->length, 64 * 9 + 30);
  x.text[1].length = 64 * 9 + 30;
  text_insert(&x, 1, true);
  oscar_prefix_match m = taken(&x, 1, &text, text.length, OSCAR_PREFIX_REFILL);
  assert_int_equal(m.reused_tokens, 64 * 9 + 30);
  assert_int_equal(m.refill_tokens, 0);
  assert_false(m.exact);
  assert_int_equal(x.w.twins[1]->refilled_from, 6);
  close_texts(&x);
}

static void eviction_takes_parked_ends_first_and_then_the_oldest_leaves(void **state) {
  (void)state;
  struct texts x;
  open_texts(&x, &plain);
  struct text text[3];
  for (int i = 0; i < 3; i++) {
    cold(&x, 0, 64 * 16 + 10, 64 * 4, i);
    text[i] = x.text[0];
    text_insert(&x, 0, true);
  }
  assert_int_equal(stats_of(&x).parked, 3);
  size_t freed;
  oscar_prefix_evict(x.tree, 1, &freed); /* the oldest, whole */
  oscar_prefix_stats s = stats_of(&x);
  assert_int_equal(s.evicted_parked, 1);
  assert_int_equal(s.evicted_pages, 0);
  assert_int_equal(s.parked, 2);
  /* it resumes by a refill before its end now: that it went to page 16 is known */
  oscar_prefix_match m;
  assert_ok(x.w.context, oscar_prefix_match_get(x.tree, text[0].tokens, text[0].length, OSCAR_PREFIX_REFILL, &m));
  assert_int_equal(m.known_tokens, 64 * 16);
  assert_int_equal(m.reused_tokens, 64 * 12);                     /* pages 12 .. 15 were exact */
  m = taken(&x, 0, &text[1], text[1].length, OSCAR_PREFIX_EXACT); /* used: not the next */
  assert_int_equal(m.reused_tokens, text[1].length);
  leave(&x, 0);
  oscar_prefix_evict(x.tree, 1, &freed);
  assert_ok(x.w.context, oscar_prefix_match_get(x.tree, text[1].tokens, text[1].length, OSCAR_PREFIX_EXACT, &m));
  assert_int_equal(m.reused_tokens, text[1].length);
  oscar_prefix_evict(x.tree, 1, &freed);
  assert_int_equal(stats_of(&x).evicted_parked, 3);

  /* Leaves: those of text 0 are the oldest, and go from its end. */
  oscar_prefix_evict(x.tree, 1, &freed);
  s = stats_of(&x);
  assert_true(s.evicted_pages + s.evicted_unheld == 1);
  const struct text *kept = &text[1];
  taken(&x, 0, kept, kept->length, OSCAR_PREFIX_REFILL);
  while (stats_of(&x).evicted_pages < 8 + 8) oscar_prefix_evict(x.tree, 1, &freed);
  assert_ok(x.w.context, oscar_prefix_match_get(x.tree, text[0].tokens, text[0].length, OSCAR_PREFIX_REFILL, &m));
  assert_int_equal(m.known_tokens, 64 * 4); /* what text 1 shares with it */
  assert_ok(x.w.context, oscar_prefix_match_get(x.tree, kept->tokens, kept->length, OSCAR_PREFIX_REFILL, &m));
  assert_int_equal(m.known_tokens, 64 * 16);
  /* what a sequence uses frees nothing, and stays */
  oscar_prefix_evict(x.tree, (size_t)1 << 30, &freed);
  assert_ok(x.w.context, oscar_prefix_match_get(x.tree, kept->tokens, kept->length, OSCAR_PREFIX_REFILL, &m));
  assert_int_equal(m.known_tokens, 64 * 12);
  assert_int_equal(stats_of(&x).page_bytes, 0);
  assert_int_equal(stats_of(&x).forgotten_in_use, 0);
  oscar_prefix_evict(x.tree, OSCAR_PREFIX_ALL, &freed);
  assert_int_equal(stats_of(&x).known_pages, 0);
  assert_int_equal(stats_of(&x).forgotten_in_use, 12);
  compare_all(&x.w);
  leave(&x, 0);
  assert_int_equal(usage_of(&x.w).held_bytes, stats_of(&x).own_bytes);
  assert_int_equal(stats_of(&x).own_bytes, oscar_prefix_bytes_for(0, 0));
  close_texts(&x);
}

/* Codes that a sequence made which is not in the tree: pages that the tree gives up exactly are known by them. */
static void codes_of_others_are_taken_over(void **state) {
  (void)state;
  struct texts x;
  open_texts(&x, &plain);
  cold(&x, 0, 64 * 10, 0, 0);
  struct text text;
  fill_text(&text, 64 * 16, 0, 0);
  text_insert(&x, 0, true);
  taken(&x, 0, &text, 64 * 10, OSCAR_PREFIX_EXACT);
  x.text[0] = text;
  assert_true(text_feed(&x, 0, 64 * 6, NULL, NULL));
  assert_int_equal(usage_of(&x.w).coded_pages, 10); /* 1 .. 10, of which the tree knows 1 .. 4 */
  oscar_prefix_evict(x.tree, OSCAR_PREFIX_ALL / 2, NULL);
  oscar_prefix_match m;
  assert_ok(x.w.context, oscar_prefix_match_get(x.tree, text.tokens, 64 * 10, OSCAR_PREFIX_REFILL, &m));
  assert_int_equal(m.known_tokens, 64 * 10);
  assert_int_equal(stats_of(&x).held_pages, 10);
  assert_int_equal(stats_of(&x).page_bytes, 0);
  close_texts(&x);
}

/* A sequence that was refilled has recent pages of its own; cold ones that it pins in the tree go when room is wanted. */
static void cold_pages_pinned_by_a_refilled_sequence_can_be_evicted(void **state) {
  (void)state;
  struct texts x;
  open_texts(&x, &plain);
  cold(&x, 0, 64 * 14, 0, 0);
  text_insert(&x, 0, false);
  leave(&x, 0);
  struct text text;
  fill_text(&text, 64 * 9, 0, 0);
  taken(&x, 0, &text, 64 * 9, OSCAR_PREFIX_REFILL);
  assert_true(text_feed(&x, 0, 64 * 4, NULL, NULL));
  text_insert(&x, 0, false);
  cold(&x, 1, 64 * 9, 0, 0);
  text_insert(&x, 1, false);
  leave(&x, 1);
  const size_t alone = stats_of(&x).page_bytes;
  size_t freed;
  oscar_prefix_evict(x.tree, 1, &freed);
  assert_int_equal(stats_of(&x).evicted_exact, 1);
  assert_true(freed > 0 && stats_of(&x).page_bytes == alone - freed);
  for (int i = 0; i < 3; i++) oscar_prefix_evict(x.tree, 1, &freed);
  assert_int_equal(stats_of(&x).evicted_exact, 4);
  assert_int_equal(stats_of(&x).evicted_pages, 0);
  compare_all(&x.w);
  close_texts(&x);
}

static void evicting_all_gives_all_back(void **state) {
  (void)state;
  struct texts x;
  uint64_t random = 9;
  texts_open(&x, test_context(OSCAR_ISA_AUTO, 1), &plain, MODEL_TOKENS, 6, MODEL_TOKENS, 3);
  const size_t empty = usage_of(&x.w).held_bytes;
  for (int round = 0; round < 3; round++) {
    for (int n = 0; n < 300; n++) operate_texts(&x, choose_random, &random);
    for (size_t s = 0; s < ARRAY_LENGTH(x.w.twins); s++)
      if (x.w.twins[s]) leave(&x, s);
    oscar_prefix_evict(x.tree, OSCAR_PREFIX_ALL, NULL);
    assert_int_equal(usage_of(&x.w).held_bytes, empty);
    assert_int_equal(usage_of(&x.w).exact_pages + usage_of(&x.w).coded_pages, 0);
    assert_ok(x.w.context, oscar_cache_check(x.w.cache));
  }
  close_texts(&x);
}

/* The owner's loop: a step that had no room has it once the tree gave back what was missing. */
static void what_is_evicted_for_a_shortfall_is_enough(void **state) {
  (void)state;
  for (size_t i = 0; i < ARRAY_LENGTH(geometries); i++) {
    struct texts x;
    texts_open(&x, test_context(OSCAR_ISA_AUTO, 1), &geometries[i], 64 * 16, 2, 64, 1);
    assert_non_null(x.tree);
    int evictions = 0;
    for (int s = 0; s < 12; s++) {
      oscar_sequence *sequence;
      while (oscar_sequence_create(x.w.cache, &sequence) != OSCAR_OK)
        oscar_prefix_evict(x.tree, oscar_cache_shortfall(x.w.cache), NULL);
      struct twin *t = x.w.twins[0] = calloc(1, sizeof *t);
      assert_non_null(t);
      t->sequence = sequence;
      fill_text(&x.text[0], 64 * 14, 64 * 2, s);
      while (t->length < 64 * 14) {
        if (text_feed(&x, 0, 50 < 64 * 14 - t->length ? 50 : (int)(64 * 14 - t->length), NULL, NULL)) continue;
        size_t freed;
        const size_t missing = oscar_cache_shortfall(x.w.cache);
        oscar_prefix_evict(x.tree, missing, &freed);
        assert_true(freed >= missing);
        evictions++;
      }
      while (oscar_prefix_park(x.tree, t->sequence, x.text[0].tokens) != OSCAR_OK)
        oscar_prefix_evict(x.tree, oscar_cache_shortfall(x.w.cache), NULL);
      free(t);
      x.w.twins[0] = NULL;
      assert_ok(x.w.context, oscar_cache_check(x.w.cache));
    }
    assert_true(evictions > 0);
    assert_int_equal(stats_of(&x).forgotten_in_use, 0); /* there was always something else */
    close_texts(&x);
  }
}

/* From a budget in which hardly anything fits to one in which most does: everything that can run out does so somewhere. */
static void a_budget_that_ends_anywhere_is_survived(void **state) {
  (void)state;
  const struct geometry g = {"budget", 1, 1, 16, 1, 2, {1, 1}, 0, false};
  const uint64_t stride = (uint64_t)rounds(3, 1); /* coprime to the four lengths that take turns */
  for (uint64_t round = 0; round < 120; round += stride) {
    struct texts x;
    uint64_t random = round + 1000;
    texts_open(&x, test_context(OSCAR_ISA_AUTO, 1), &g, 64 + 64 * (int64_t)(round / 4), 1, 1 + 33 * (int)(round % 4), 2);
    for (int n = 0; n < 250 && x.tree; n++) {
      operate_texts(&x, choose_random, &random);
      assert_ok(x.w.context, oscar_cache_check(x.w.cache));
    }
    compare_all(&x.w);
    close_texts(&x);
  }
}

static void wrong_use_is_refused(void **state) {
  (void)state;
  struct texts x, other;
  open_texts(&x, &plain);
  open_texts(&other, &plain);
  oscar_prefix *second;
  assert_int_equal(oscar_prefix_create(x.w.cache, &second), OSCAR_INVALID_ARGUMENT);
  assert_null(second);
  struct twin *t = cold(&x, 0, 100, 0, 0);
  assert_int_equal(oscar_prefix_insert(other.tree, t->sequence, x.text[0].tokens), OSCAR_INVALID_ARGUMENT);
  assert_true(twin_begin(&x.w, t, 1));
  assert_int_equal(oscar_prefix_insert(x.tree, t->sequence, x.text[0].tokens), OSCAR_INVALID_ARGUMENT);
  assert_int_equal(oscar_prefix_park(x.tree, t->sequence, x.text[0].tokens), OSCAR_INVALID_ARGUMENT);
  twin_abort(&x.w, t);
  oscar_sequence *sequence;
  assert_int_equal(oscar_prefix_take(x.tree, x.text[0].tokens, -1, OSCAR_PREFIX_EXACT, &sequence, NULL), OSCAR_INVALID_ARGUMENT);
  assert_int_equal(oscar_prefix_take(x.tree, x.text[0].tokens, 1, (oscar_prefix_reuse)7, &sequence, NULL),
                   OSCAR_INVALID_ARGUMENT);
  assert_null(sequence);
  assert_ok(x.w.context, oscar_prefix_take(x.tree, NULL, 0, OSCAR_PREFIX_REFILL, &sequence, NULL));
  assert_int_equal(oscar_sequence_length(sequence), 0);
  assert_ok(x.w.context, oscar_prefix_park(x.tree, sequence, NULL)); /* nothing to keep */
  assert_int_equal(stats_of(&x).parked, 0);
  oscar_prefix_free(NULL);
  assert_int_equal(oscar_prefix_bytes_for(-1, 0), 0);
  assert_int_equal(oscar_prefix_bytes_for(0, -1), 0);
  assert_int_equal(oscar_prefix_bytes_for(INT64_MAX, 1), 0);
  close_texts(&other);
  close_texts(&x);
}

static void every_failed_allocation_is_survived(void **state) {
  (void)state;
  struct failing_alloc f;
  struct texts x;
  oscar_context *c = failing_context(&f);
  texts_open(&x, c, &plain, MODEL_TOKENS, 4, MODEL_TOKENS, 1);
  oscar_prefix_free(x.tree);
  sweep_allocations(c, &f, oscar_prefix_create(x.w.cache, &x.tree));
  struct twin *t = cold(&x, 0, 64 * 20 + 7, 0, 0);
  /* what was inserted before a failure stays, so that live allocations grow; no sweep */
  for (long n = 0;; n++) {
    f.until_failure = n % 3;
    oscar_status status = oscar_prefix_insert(x.tree, t->sequence, x.text[0].tokens);
    f.until_failure = -1;
    assert_ok(c, oscar_cache_check(x.w.cache));
    if (status == OSCAR_OK) break;
    assert_int_equal(status, OSCAR_NO_MEMORY);
    assert_true(n < 100);
  }
  remember(&x, &x.text[0], t);
  oscar_sequence *sequence;
  sweep_allocations(c, &f, oscar_prefix_take(x.tree, x.text[0].tokens, t->length, OSCAR_PREFIX_REFILL, &sequence, NULL));
  f.until_failure = 0; /* what follows, and eviction, needs no memory */
  assert_ok(c, oscar_prefix_park(x.tree, t->sequence, x.text[0].tokens));
  oscar_prefix_evict(x.tree, 1 << 20, NULL);
  assert_ok(c, oscar_cache_check(x.w.cache));
  oscar_prefix_evict(x.tree, OSCAR_PREFIX_ALL, NULL);
  assert_ok(c, oscar_cache_check(x.w.cache));
  f.until_failure = -1;
  free(t);
  x.w.twins[0] = NULL;
  oscar_sequence_free(sequence);
  texts_close(&x);
  failing_context_free(c, &f);
}

/* tight: 0, a new life every 100 operations, of which everything is remembered for a while; 1, ample room; 2 and 3, little. */
static void random_operations(const struct geometry *g, int tight, int operations, uint64_t random) {
  struct texts x;
  oscar_context *context = test_context(OSCAR_ISA_AUTO, 1);
  texts_open(&x, context, g, tight < 2 ? MODEL_TOKENS : 500, tight == 3 ? 2 : 5, 400, 2 + tight % 2);
  assert_non_null(x.tree);
  for (int n = 0; n < operations; n++) {
    if (tight == 0 && n % 100 == 0) {
      for (size_t s = 0; s < ARRAY_LENGTH(x.w.twins); s++)
        if (x.w.twins[s]) leave(&x, s);
      oscar_prefix_evict(x.tree, OSCAR_PREFIX_ALL, NULL);
      while (x.entered_count > 0) free(x.entered[--x.entered_count]);
      x.complete = true;
    }
    operate_texts(&x, choose_random, &random);
    assert_ok(context, oscar_cache_check(x.w.cache));
    if (n % 500 == 499) compare_all(&x.w);
  }
  compare_all(&x.w);
  for (size_t s = 0; s < ARRAY_LENGTH(x.w.twins); s++)
    if (x.w.twins[s]) leave(&x, s);
  oscar_prefix_evict(x.tree, OSCAR_PREFIX_ALL, NULL);
  assert_int_equal(usage_of(&x.w).held_bytes, oscar_prefix_bytes_for(0, 0));
  texts_close(&x);
  oscar_context_free(context);
}

static void random_operations_agree_with_the_list_of_strings(void **state) {
  (void)state;
  for (size_t i = 0; i < ARRAY_LENGTH(geometries); i++) /* what takes time is the reference encoder */
    for (int tight = 0; tight < 4; tight++)
      random_operations(&geometries[i], tight, geometries[i].head_dim < 64 ? rounds(400, 1000) : rounds(100, 200),
                        i * 4 + (uint64_t)tight + 100);
}

/* The smallest pages, for as many operations as that allows. */
static void so_do_many_more_on_small_pages(void **state) {
  (void)state;
  for (int recent = 1; recent <= 4; recent++) {
    const struct geometry g = {"small", 1, 1, 16, recent % 2, recent, {1, 1}, 0, true};
    for (int tight = 0; tight < 4; tight++) random_operations(&g, tight, rounds(1000, 3000), (uint64_t)(recent * 4 + tight));
  }
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(the_end_of_a_live_or_parked_sequence_is_resumed_at_no_cost),
      cmocka_unit_test(resuming_in_the_middle_is_a_truncation_of_a_cold_sequence),
      cmocka_unit_test(a_prompt_that_many_share_is_stored_once),
      cmocka_unit_test(a_live_sequence_costs_no_pages_in_the_tree),
      cmocka_unit_test(what_a_refill_computed_is_not_taken_for_cold),
      cmocka_unit_test(exact_forms_computed_after_a_refill_are_not_taken_for_cold),
      cmocka_unit_test(a_sequence_parked_soon_after_a_refill_resumes_at_its_end),
      cmocka_unit_test(eviction_takes_parked_ends_first_and_then_the_oldest_leaves),
      cmocka_unit_test(codes_of_others_are_taken_over),
      cmocka_unit_test(cold_pages_pinned_by_a_refilled_sequence_can_be_evicted),
      cmocka_unit_test(evicting_all_gives_all_back),
      cmocka_unit_test(what_is_evicted_for_a_shortfall_is_enough),
      cmocka_unit_test(a_budget_that_ends_anywhere_is_survived),
      cmocka_unit_test(wrong_use_is_refused),
      cmocka_unit_test(every_failed_allocation_is_survived),
      cmocka_unit_test(random_operations_agree_with_the_list_of_strings),
      cmocka_unit_test(so_do_many_more_on_small_pages),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
