/*
 * check.c - every invariant of a cache, walked. Slow (all tables, all units) and meant for tests and debug builds.
 */
#include "cache/state.h"

#include <stdlib.h>

#define VIOLATED(context, ...) set_error(context, OSCAR_INVALID_ARGUMENT, "cache invariant violated: " __VA_ARGS__)

bool check_count_page(const struct arena *a, int32_t page, bool exact) {
  if (page == NO_PAGE) return true;
  if (page < 0 || page >= a->units || a->block[page / a->run].exact != exact || (exact && page % a->run != 0)) return false;
  a->unit[page].found++;
  return true;
}

/* NULL, or how the forms of page p contradict the reading rule (sequence.c states what may be there). */
static const char *form_violation(const oscar_sequence *s, int64_t p) {
  const struct cache_geometry *g = &s->cache->geometry;
  struct page_entry e = s->table[p];
  bool exact = e.exact != NO_PAGE, coded = e.coded != NO_PAGE, both = exact && coded;
  if (!exact && !coded) return "has neither form";
  if (p >= pages_of(s->length)) return exact ? NULL : "is to be written and is not exact";
  if (both && (s->step_tokens == 0 || p < s->demoted_first || p >= s->demoted_end)) return "has both forms";
  if (!demotes_pages(g)) return exact ? NULL : "is coded without codecs";
  if (p < g->sink_pages) return exact ? NULL : "is a sink and not exact";
  if (p + g->recent_pages >= s->length / PAGE_TOKENS && p >= s->refilled_from && !exact) return "is recent and not exact";
  if (p + g->recent_pages < (s->length - 1) / PAGE_TOKENS && exact) return "is old and still exact";
  return NULL;
}

static oscar_status check_sequence(const oscar_sequence *s) {
  const oscar_cache *c = s->cache;
  oscar_context *context = c->geometry.context;
  if (s->pages != pages_of(s->length + s->step_tokens) || s->pages > s->capacity || s->capacity % TABLE_ENTRIES != 0)
    return VIOLATED(context, "a sequence of %lld + %d tokens has %lld pages in a table of %lld", (long long)s->length,
                    s->step_tokens, (long long)s->pages, (long long)s->capacity);
  for (int64_t p = 0; p < s->pages; p++) {
    struct page_entry e = s->table[p];
    if (!check_count_page(&c->arena, e.exact, true) || !check_count_page(&c->arena, e.coded, false))
      return VIOLATED(context, "page %lld of a sequence has ids %d and %d, which are no such pages", (long long)p, e.exact,
                      e.coded);
    const char *wrong = form_violation(s, p);
    if (wrong) return VIOLATED(context, "page %lld of a sequence of %lld tokens %s", (long long)p, (long long)s->length, wrong);
    bool filling = (p + 1) * PAGE_TOKENS > s->length;
    if (filling && (c->arena.unit[e.exact].refs != 1 || c->arena.unit[e.exact].twin != NO_PAGE))
      return VIOLATED(context, "page %lld of a sequence of %lld tokens is being filled and shared", (long long)p,
                      (long long)s->length);
  }
  return OSCAR_OK;
}

static oscar_status check_counts(const oscar_cache *c) {
  oscar_context *context = c->geometry.context;
  size_t bytes = 0;
  const oscar_sequence *before = NULL;
  for (int32_t u = 0; u < c->arena.units; u++) c->arena.unit[u].found = 0;
  for (const oscar_sequence *s = c->sequences; s; before = s, s = s->next) {
    if (s->prev != before || s->cache != c) return VIOLATED(context, "the list of sequences is broken");
    oscar_status status = check_sequence(s);
    if (status != OSCAR_OK) return status;
    bytes += c->plan.sequence_bytes + plan_table_bytes(s->capacity);
  }
  if (c->prefix) {
    oscar_status status = prefix_check(c->prefix);
    if (status != OSCAR_OK) return status;
  }
  for (int32_t u = 0; u < c->arena.units; u++)
    if (c->arena.unit[u].found != c->arena.unit[u].refs)
      return VIOLATED(context, "unit %d counts %d references and tables and the prefix tree hold %d", u, c->arena.unit[u].refs,
                      c->arena.unit[u].found);
  if (bytes != c->sequences_bytes)
    return VIOLATED(context, "sequences take %zu bytes and %zu are counted", bytes, c->sequences_bytes);
  return OSCAR_OK;
}

oscar_status oscar_cache_check(const oscar_cache *c) {
  oscar_context *context = c->geometry.context;
  int32_t where = NO_PAGE;
  const char *wrong = arena_violation(&c->arena, &where);
  if (wrong) return VIOLATED(context, "%s (at %d)", wrong, where);
  if (c->plan.fixed_bytes + held_bytes(c) > c->budget_bytes || held_bytes(c) > c->peak_held_bytes)
    return VIOLATED(context, "%zu + %zu bytes are held of a budget of %zu, with a peak of %zu", c->plan.fixed_bytes,
                    held_bytes(c), c->budget_bytes, c->peak_held_bytes);
  return check_counts(c);
}

#ifdef OSCAR_DEBUG
void debug_check(const oscar_cache *c) {
  if (oscar_cache_check(c) == OSCAR_OK) return;
  log_line(c->geometry.context, OSCAR_LOG_ERROR, "%s", oscar_last_error(c->geometry.context));
  abort();
}
#endif
