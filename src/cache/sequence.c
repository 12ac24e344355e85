/*
 * sequence.c - page tables: making, forking, rewinding and reading sequences.
 *
 * A table has an entry per page. Between steps a page has exactly one form: with T the page of the last token, page p is exact if
 * p < sink or p + recent >= T, else it is codes. Two exceptions, both after a rewind only:
 *   - at a length that is a multiple of 64, page T - recent may be codes already; no later query reads it exactly;
 *   - after a refill, pages before `refilled_from` are codes even where the rule wants them exact.
 * Full pages are immutable in either form and shared by reference; the page being filled has one owner and no twin.
 */
#include "cache/cuda/store.h"
#include "cache/state.h"

#include <string.h>

const oscar_cache *sequence_cache(const oscar_sequence *s) { return s->cache; }
int64_t oscar_sequence_length(const oscar_sequence *s) { return s->length; }

void entry_release(oscar_cache *c, struct page_entry *entry) {
  if (entry->exact != NO_PAGE) arena_release(&c->arena, entry->exact);
  if (entry->coded != NO_PAGE) arena_release(&c->arena, entry->coded);
  *entry = (struct page_entry){NO_PAGE, NO_PAGE};
}

/* Another table of the same pages with space for `pages`. On failure the old one stays. */
static oscar_status replace_table(oscar_sequence *s, int64_t pages) {
  size_t old = plan_table_bytes(s->capacity), new = plan_table_bytes(pages);
  struct page_entry *table = mem_resize(s->cache->geometry.context, s->table, old, new);
  if (!table) return OSCAR_NO_MEMORY;
  s->table = table;
  s->capacity = (int64_t)(new / sizeof *table);
  s->cache->sequences_bytes += new - old; /* wraps when shrinking, and comes out right */
  return OSCAR_OK;
}

oscar_status sequence_grow_table(oscar_sequence *s, int64_t pages) {
  return pages > s->capacity ? replace_table(s, pages) : OSCAR_OK;
}

void sequence_drop_pages(oscar_sequence *s, int64_t keep) {
  s->cache->changes++;
  for (int64_t p = keep; p < s->pages; p++) entry_release(s->cache, &s->table[p]);
  s->pages = keep;
  if (s->capacity - keep >= TABLE_ENTRIES) (void)replace_table(s, keep); /* without memory the table stays larger */
}

oscar_status sequence_make(oscar_cache *c, int64_t pages, oscar_sequence **sequence) {
  oscar_context *context = c->geometry.context;
  oscar_sequence *s = mem_zalloc(context, 1, c->plan.sequence_bytes);
  if (!s) return OSCAR_NO_MEMORY;
  s->cache = c;
  s->cold_tokens = INT64_MAX;
  oscar_status status = sequence_grow_table(s, pages);
  if (status != OSCAR_OK) {
    mem_free(context, s);
    return status;
  }
  s->next = c->sequences;
  if (s->next) s->next->prev = s;
  c->sequences = s;
  c->sequences_bytes += c->plan.sequence_bytes;
  *sequence = s;
  return OSCAR_OK;
}

oscar_status oscar_sequence_create(oscar_cache *c, oscar_sequence **sequence) {
  *sequence = NULL;
  if (!cache_has_room(c, 0, c->plan.sequence_bytes)) return cache_full(c, "a new sequence", 0, c->plan.sequence_bytes);
  oscar_status status = sequence_make(c, 0, sequence);
  cache_note_peak(c);
  debug_check(c);
  return status;
}

void oscar_sequence_free(oscar_sequence *s) {
  if (!s) return;
  oscar_cache *c = s->cache;
  if (s->tail) prefix_follow_free(s);
  c->changes++; /* another sequence may come to lie where this one was */
  for (int64_t p = 0; p < s->pages; p++) entry_release(c, &s->table[p]);
  c->sequences_bytes -= c->plan.sequence_bytes + plan_table_bytes(s->capacity);
  if (s->prev)
    s->prev->next = s->next;
  else
    c->sequences = s->next;
  if (s->next) s->next->prev = s->prev;
  mem_free(c->geometry.context, s->table);
  mem_free(c->geometry.context, s);
  debug_check(c);
}

oscar_status oscar_sequence_fork(const oscar_sequence *s, oscar_sequence **copy) {
  *copy = NULL;
  oscar_cache *c = s->cache;
  if (s->step_tokens)
    return set_error(c->geometry.context, OSCAR_INVALID_ARGUMENT, "a sequence cannot be forked while a step is open");
  bool partial = s->length % PAGE_TOKENS != 0;
  int64_t units = partial ? c->plan.run : 0;
  size_t bytes = c->plan.sequence_bytes + plan_table_bytes(s->pages);
  if (!cache_has_room(c, units, bytes)) return cache_full(c, "the copy of a sequence", units, bytes);
  oscar_sequence *f;
  oscar_status status = sequence_make(c, s->pages, &f);
  if (status != OSCAR_OK) return status;

  f->length = s->length;
  f->cold_tokens = s->cold_tokens;
  f->refilled_from = s->refilled_from;
  int64_t shared = s->pages - partial;
  for (int64_t p = 0; p < shared; p++) {
    f->table[p] = s->table[p];
    arena_retain(&c->arena, f->table[p].exact != NO_PAGE ? f->table[p].exact : f->table[p].coded);
  }
  f->pages = shared; /* pages may move while one is taken: only complete entries count */
  if (partial) {
    int32_t page = cache_take_exact(c);
    cache_copy_exact(c, s->table[shared].exact, page);
    f->table[shared] = (struct page_entry){page, NO_PAGE};
    f->pages++;
  }
  cache_note_peak(c);
  debug_check(c);
  *copy = f;
  return OSCAR_OK;
}

size_t oscar_sequence_bytes(const oscar_sequence *s) {
  const struct cache_plan *plan = &s->cache->plan;
  int64_t units = 0;
  for (int64_t p = 0; p < s->pages; p++)
    units += (s->table[p].exact != NO_PAGE ? plan->run : 0) + (s->table[p].coded != NO_PAGE ? 1 : 0);
  return plan->sequence_bytes + plan_table_bytes(s->capacity) + (size_t)units * plan->unit_cost;
}

double oscar_sequence_bits_per_element(const oscar_sequence *s) {
  const struct cache_geometry *g = &s->cache->geometry;
  if (s->length == 0) return 0;
  return 8.0 * (double)oscar_sequence_bytes(s) / (2.0 * (double)s->length * g->layers * g->kv_heads * g->head_dim);
}

/* ---- rewinding ---- */

int64_t sequence_first_gone(const oscar_sequence *s, int64_t length, int64_t from) {
  const struct cache_geometry *g = &s->cache->geometry;
  int64_t first = max64(max64(length / PAGE_TOKENS - g->recent_pages, g->sink_pages), from);
  for (int64_t p = first; p < pages_of(length); p++)
    if (s->table[p].exact == NO_PAGE) return p;
  return -1;
}

/* The latest position at or before `length` that a cold run would have come to with the pages that are there. With any page gone
 * that is the end of the sinks, or, when recent_pages is 0, the start of the page. */
static int64_t resume_exact(const oscar_sequence *s, int64_t length) {
  int64_t resume = min64(length, s->cold_tokens);
  while (sequence_first_gone(s, resume, 0) >= 0) resume = (resume - 1) / PAGE_TOKENS * PAGE_TOKENS;
  return resume;
}

/* Pages before the last refill do not count as gone: what was computed after it read them as codes, too. */
static int64_t resume_refill(const oscar_sequence *s, int64_t length) {
  int64_t gone = sequence_first_gone(s, length, length >= s->refilled_from * PAGE_TOKENS ? s->refilled_from : 0);
  return gone < 0 ? length : gone * PAGE_TOKENS;
}

/* Cuts to `length`; the page that becomes partial gets one owner. */
static oscar_status cut(oscar_sequence *s, int64_t length) {
  oscar_cache *c = s->cache;
  c->changes++;
  int64_t keep = pages_of(length), freed = 0;
  struct page_entry *partial = length % PAGE_TOKENS ? &s->table[keep - 1] : NULL;
  if (partial && c->arena.unit[partial->exact].refs > 1) {
    for (int64_t p = keep; p < s->pages; p++) {
      int32_t page = s->table[p].exact != NO_PAGE ? s->table[p].exact : s->table[p].coded;
      if (c->arena.unit[page].refs == 1) freed += arena_page_units(&c->arena, page);
    }
    int64_t units = max64(0, c->plan.run - freed);
    if (!cache_has_room(c, units, 0)) return cache_full(c, "a copy of the shared page that a sequence is cut in", units, 0);
  }
  sequence_drop_pages(s, keep);
  s->length = length;
  if (!partial) return OSCAR_OK;
  partial = &s->table[keep - 1];
  if (c->arena.unit[partial->exact].refs > 1) {
    int32_t page = cache_take_exact(c);
    cache_copy_exact(c, partial->exact, page);
    arena_release(&c->arena, partial->exact);
    partial->exact = page;
    cache_note_peak(c);
  }
  arena_unlink_twins(&c->arena, partial->exact); /* it will hold something else than what was encoded */
  return OSCAR_OK;
}

oscar_status oscar_sequence_truncate(oscar_sequence *s, int64_t length, oscar_rewind mode, int64_t *resume) {
  oscar_context *context = s->cache->geometry.context;
  if (s->step_tokens) return set_error(context, OSCAR_INVALID_ARGUMENT, "a sequence cannot be truncated while a step is open");
  if (length < 0 || length > s->length)
    return set_error(context, OSCAR_INVALID_ARGUMENT, "a sequence of %lld tokens cannot be truncated to %lld",
                     (long long)s->length, (long long)length);
  if (mode != OSCAR_REWIND_EXACT && mode != OSCAR_REWIND_REFILL)
    return set_error(context, OSCAR_INVALID_ARGUMENT, "%d is not a rewind mode", (int)mode);

  int64_t at = mode == OSCAR_REWIND_EXACT ? resume_exact(s, length) : resume_refill(s, length);
  if (s->tail) prefix_follow_cut(s, at);
  oscar_status status = cut(s, at);
  if (status != OSCAR_OK) return status;
  if (sequence_first_gone(s, at, 0) < 0) { /* whatever follows reads every page as the rule wants it */
    s->refilled_from = 0;
    if (at <= s->cold_tokens) s->cold_tokens = INT64_MAX;
  } else if (at < length) {
    s->refilled_from = at / PAGE_TOKENS;
    s->cold_tokens = min64(s->cold_tokens, at);
  }
  debug_check(s->cache);
  *resume = at;
  return OSCAR_OK;
}

/* ---- reading ---- */

static bool is_written(const oscar_sequence *s, int layer) { return layer == EVERY_LAYER || s->written[layer]; }

int64_t sequence_visible(const oscar_sequence *s, int layer) {
  if (s->step_tokens == 0) return s->length;
  return is_written(s, layer) ? s->length + s->step_tokens : -1;
}

struct page_units sequence_page_units(const oscar_sequence *s, int layer, int64_t page) {
  const struct page_entry *entry = &s->table[page];
  bool encoded = is_written(s, layer) || !entry_is_being_encoded(s->cache, entry);
  return (struct page_units){entry->exact, encoded ? entry->coded : NO_UNIT};
}

struct page_view sequence_page(const oscar_sequence *s, int layer, int64_t page) {
  const struct page_units units = sequence_page_units(s, layer, page);
  struct page_view view = {NULL, NULL};
  if (units.exact != NO_UNIT) view.exact = page_memory(s->cache, layer, units.exact);
  if (units.coded != NO_UNIT) view.coded = page_memory(s->cache, layer, units.coded);
  return view;
}

oscar_status oscar_sequence_read_page(const oscar_sequence *s, int page, int layer, int kv_head, bool *coded, void *k, void *v) {
  const struct cache_geometry *g = &s->cache->geometry;
  if (page < 0 || page >= pages_of(s->length) || layer < 0 || layer >= g->layers || kv_head < 0 || kv_head >= g->kv_heads)
    return set_error(g->context, OSCAR_INVALID_ARGUMENT,
                     "page %d, layer %d, head %d: the sequence has %lld pages, %d layers, %d KV heads", page, layer, kv_head,
                     (long long)pages_of(s->length), g->layers, g->kv_heads);
  struct page_entry entry = s->table[page];
  *coded = entry.exact == NO_PAGE;
  void *out[2] = {k, v};
  size_t side_exact = exact_head_bytes(g) / 2;
  size_t rows = (size_t)min64(PAGE_TOKENS, s->length - (int64_t)page * PAGE_TOKENS), filled = side_exact / PAGE_TOKENS * rows;
  for (int side = 0; side < 2; side++) {
    if (!out[side]) continue;
    if (g->cuda) {
      oscar_status status = device_store_read(s, entry, layer, kv_head, (oscar_side)side, out[side]);
      if (status != OSCAR_OK) return status;
      if (!*coded) memset((uint8_t *)out[side] + filled, 0, side_exact - filled);
    } else if (*coded && g->filter) {
      memcpy(out[side], coded_memory(s->cache, layer, entry.coded, kv_head, (oscar_side)side), side_exact);
    } else if (*coded) {
      page_unpack(&s->cache->layers[layer].form[side], (oscar_side)side,
                  coded_memory(s->cache, layer, entry.coded, kv_head, (oscar_side)side), out[side]);
    } else {
      memcpy(out[side], exact_memory(s->cache, layer, entry.exact, kv_head) + (size_t)side * side_exact, filled);
      memset((uint8_t *)out[side] + filled, 0, side_exact - filled);
    }
  }
  return OSCAR_OK;
}
