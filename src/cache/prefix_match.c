/*
 * prefix_match.c - look-up: the longest prefix that the tree knows, where a sequence can resume in it, and making that sequence.
 *
 * Going down, one notes how many leading pages have the form that an old page has (codes, or exact for a sink). Where to resume
 * exactly is then looked for from the end: the first position whose recent pages are there exactly. That is the end of a
 * sequence, or of any part of it that its exact pages allow. The page that the position lies in is copied from one that begins
 * with the same tokens: the last page of a live or parked sequence, or a whole exact page.
 *
 * A refill resumes, as sequence.c does, at the start of the first recent page that is not there exactly.
 */
#include "cache/cuda/store.h"
#include "cache/prefix.h"

struct search {
  const oscar_prefix *tree;
  const int32_t *tokens;
  int64_t count;
  bool cold_only;
  struct prefix_node *deepest; /* of the pages matched whole; the root if there is none */
  int64_t old_pages;           /* that have the form of an old page, and are cold if they have to be */
};

struct resume {
  int64_t length;
  struct prefix_node *last; /* of the page before the one that `length` lies in */
  int32_t partial;          /* exact page whose beginning is that of the latter, or NO_PAGE */
  bool partial_cold;
  struct prefix_tail *parked; /* that `partial` belongs to, or NULL */
  int64_t refilled_from;
};

/* From the root that x->deepest is. */
static void walk(struct search *x) {
  const oscar_cache *c = x->tree->cache;
  struct prefix_node *v = x->deepest;
  while ((v->page + 2) * PAGE_TOKENS <= x->count) {
    if (!(v = prefix_child(x->tree, v, x->tokens + (v->page + 1) * PAGE_TOKENS))) return;
    x->deepest = v;
    const bool exact = stays_exact(c, v->page);
    const bool usable = (exact ? v->exact : v->coded) != NO_PAGE && (!x->cold_only || (exact ? v->exact_cold : v->coded_cold));
    if (usable && x->old_pages == v->page) x->old_pages++;
  }
}

static bool has_exact(const struct search *x, const struct prefix_node *v) {
  return v->exact != NO_PAGE && (!x->cold_only || v->exact_cold);
}

/* Whether every page before position `length` is there as a sequence that continues wants it; last: the node of the last whole
 * page. Recent pages before `from` may be codes. */
static bool can_resume(const struct search *x, const struct prefix_node *last, int64_t length, int64_t from) {
  const struct cache_geometry *g = &x->tree->cache->geometry;
  const int64_t whole = last->page + 1;
  int64_t wanted = whole;
  if (demotes_pages(g)) wanted = min64(whole, max64(max64(whole - g->recent_pages, g->sink_pages), from));
  const struct prefix_node *v = last;
  for (; v->page >= wanted; v = v->parent)
    if (!has_exact(x, v)) return false;
  if (x->old_pages >= wanted) return true;
  /* at a page boundary, a page that the next token demotes may be exact yet */
  return length % PAGE_TOKENS == 0 && x->old_pages == wanted - 1 && wanted + g->recent_pages == whole && has_exact(x, v);
}

static int64_t common(const int32_t *a, int64_t a_count, const int32_t *b, int64_t b_count) {
  int64_t n = 0;
  while (n < a_count && n < b_count && a[n] == b[n]) n++;
  return n;
}

/* The page that holds a tail's tokens, or NO_PAGE: a live sequence may have gone on and have it as codes by now. */
static int32_t tail_page(const struct prefix_tail *tail) {
  return tail->filled == 0 ? NO_PAGE : tail->sequence ? tail->sequence->table[tail->node->page + 1].exact : tail->page;
}

/* Takes over where `tail` ends, or before, if that is later than *best. */
static void try_tail(const struct search *x, struct prefix_tail *tail, struct resume *best) {
  const int64_t start = (tail->node->page + 1) * PAGE_TOKENS;
  const int32_t page = tail_page(tail);
  const int64_t n = page == NO_PAGE ? 0 : common(tail->tokens, tail->filled, x->tokens + start, x->count - start);
  const int64_t length = start + n;
  if (length <= best->length) return;
  const oscar_sequence *s = tail->sequence;
  const bool cold = length <= (s ? s->cold_tokens : tail->cold_tokens);
  int64_t from = s ? s->refilled_from : tail->refilled_from;
  if (x->cold_only || length < from * PAGE_TOKENS) from = 0;
  if ((x->cold_only && !cold) || !can_resume(x, tail->node, length, from)) return;
  *best = (struct resume){.length = length,
                          .last = tail->node,
                          .partial = n > 0 ? page : NO_PAGE,
                          .partial_cold = cold,
                          .parked = s ? NULL : tail,
                          .refilled_from = from};
}

/* The same with a whole exact page that begins as the string goes on. */
static void try_child(const struct search *x, struct prefix_node *child, struct resume *best) {
  const int64_t start = child->page * PAGE_TOKENS;
  if (!has_exact(x, child)) return;
  const int64_t length = start + common(child->tokens, PAGE_TOKENS, x->tokens + start, x->count - start);
  if (length == start || length <= best->length || !can_resume(x, child->parent, length, 0)) return;
  *best = (struct resume){.length = length, .last = child->parent, .partial = child->exact, .partial_cold = child->exact_cold};
}

static struct resume resume_exactly(const struct search *x) {
  struct resume best = {.length = -1, .partial = NO_PAGE};
  for (struct prefix_node *v = x->deepest;; v = v->parent) {
    if (can_resume(x, v, (v->page + 1) * PAGE_TOKENS, 0))
      best = (struct resume){.length = (v->page + 1) * PAGE_TOKENS, .last = v, .partial = NO_PAGE};
    for (struct prefix_tail *tail = v->tails; tail; tail = tail->next) try_tail(x, tail, &best);
    for (struct prefix_node *child = v == x->deepest ? v->first_child : NULL; child; child = child->next_sibling)
      try_child(x, child, &best);
    if (best.length >= 0) return best; /* at the root at the latest */
  }
}

/* How far the tree knows the string. Tokens behind the last page matched whole count where a page for them is there exactly. */
static int64_t known_tokens(const struct search *x) {
  const struct prefix_node *v = x->deepest;
  const int64_t start = (v->page + 1) * PAGE_TOKENS;
  int64_t most = 0;
  for (const struct prefix_tail *tail = v->tails; tail; tail = tail->next)
    if (tail_page(tail) != NO_PAGE) most = max64(most, common(tail->tokens, tail->filled, x->tokens + start, x->count - start));
  for (const struct prefix_node *child = v->first_child; child; child = child->next_sibling)
    if (child->exact != NO_PAGE) most = max64(most, common(child->tokens, PAGE_TOKENS, x->tokens + start, x->count - start));
  return start + most;
}

/* *end: what is recomputed up to there counts as refilled. */
static struct resume resume_by_refill(const struct search *x, int64_t known, int64_t *end) {
  const struct cache_geometry *g = &x->tree->cache->geometry;
  const int64_t matched = x->deepest->page + 1, whole = min64(matched, x->old_pages + g->recent_pages);
  const int64_t wanted = max64(whole - g->recent_pages, min64(g->sink_pages, whole));
  struct prefix_node *v = x->deepest, *last;
  while (v->page >= whole) v = v->parent;
  for (last = v; v->page >= wanted; v = v->parent)
    if (v->exact == NO_PAGE) last = v->parent;
  const int64_t first = last->page + 1;
  *end = whole == matched ? known : min64(known, whole * PAGE_TOKENS + PAGE_TOKENS - 1);
  return (struct resume){.length = first * PAGE_TOKENS, .last = last, .partial = NO_PAGE, .refilled_from = first};
}

static size_t bytes_to_take(const oscar_cache *c, const struct resume *r, int64_t *units, size_t *bytes) {
  *units = r->partial == NO_PAGE ? 0 : c->plan.run;
  *bytes = c->plan.sequence_bytes + plan_table_bytes(pages_of(r->length));
  return *bytes + (size_t)*units * c->plan.unit_cost;
}

/* A node's form in a sequence that resumes at `length`. */
static struct page_entry entry_of(const oscar_cache *c, const struct prefix_node *v, int64_t length, bool cold_only, bool *cold) {
  const bool old = !stays_exact(c, v->page) && v->page + c->geometry.recent_pages < (length - 1) / PAGE_TOKENS;
  const bool exact = !old && v->exact != NO_PAGE && (v->exact_cold || !cold_only);
  *cold = exact ? v->exact_cold : v->coded_cold;
  return exact ? (struct page_entry){v->exact, NO_PAGE} : (struct page_entry){NO_PAGE, v->coded};
}

/* The tokens before which all pages are those of a cold run. */
static int64_t cold_before(const struct search *x, const struct resume *r) {
  int64_t tokens = r->partial != NO_PAGE && !r->partial_cold ? (r->last->page + 1) * PAGE_TOKENS : INT64_MAX;
  for (const struct prefix_node *v = r->last; v->page >= 0; v = v->parent) {
    bool cold;
    (void)entry_of(x->tree->cache, v, r->length, x->cold_only, &cold);
    if (!cold) tokens = v->page * PAGE_TOKENS;
  }
  return tokens;
}

static oscar_status look_up(const oscar_prefix *t, const int32_t *tokens, int64_t count, oscar_prefix_reuse reuse,
                            struct search *x, struct resume *r, oscar_prefix_match *match) {
  oscar_context *context = t->cache->geometry.context;
  struct prefix_node *root = (struct prefix_node *)&t->root;
  *x = (struct search){.tree = t, .tokens = tokens, .count = count, .cold_only = reuse == OSCAR_PREFIX_EXACT, .deepest = root};
  *r = (struct resume){.partial = NO_PAGE, .last = root};
  *match = (oscar_prefix_match){.exact = true};
  if (count < 0) return set_error(context, OSCAR_INVALID_ARGUMENT, "%lld tokens to look up", (long long)count);
  if (reuse != OSCAR_PREFIX_OFF && reuse != OSCAR_PREFIX_EXACT && reuse != OSCAR_PREFIX_REFILL)
    return set_error(context, OSCAR_INVALID_ARGUMENT, "%d is not a way to reuse a prefix", (int)reuse);
  if (reuse != OSCAR_PREFIX_OFF) {
    walk(x);
    match->known_tokens = known_tokens(x);
    *r = resume_exactly(x);
  }
  if (reuse == OSCAR_PREFIX_REFILL) {
    int64_t end;
    const struct resume refill = resume_by_refill(x, match->known_tokens, &end);
    if (refill.length > r->length) {
      *r = refill;
      match->refill_tokens = end - refill.length;
    }
    match->exact = r->refilled_from == 0 && cold_before(x, r) == INT64_MAX;
  }
  int64_t units;
  size_t bytes;
  match->reused_tokens = r->length;
  match->compute_tokens = count - r->length - match->refill_tokens;
  match->bytes = bytes_to_take(t->cache, r, &units, &bytes);
  return OSCAR_OK;
}

oscar_status oscar_prefix_match_get(const oscar_prefix *t, const int32_t *tokens, int64_t count, oscar_prefix_reuse reuse,
                                    oscar_prefix_match *match) {
  struct search x;
  struct resume r;
  return look_up(t, tokens, count, reuse, &x, &r, match);
}

static oscar_status make_sequence(const struct search *x, const struct resume *r, oscar_sequence **sequence) {
  oscar_cache *c = x->tree->cache;
  int64_t units;
  size_t bytes;
  (void)bytes_to_take(c, r, &units, &bytes);
  if (!cache_has_room(c, units, bytes)) return cache_full(c, "a sequence from the prefix tree", units, bytes);
  oscar_sequence *s;
  oscar_status status = sequence_make(c, pages_of(r->length), &s);
  if (status != OSCAR_OK) return status;
  s->length = r->length;
  s->cold_tokens = cold_before(x, r);
  for (const struct prefix_node *v = r->last; v->page >= 0; v = v->parent) {
    bool cold;
    struct page_entry *entry = &s->table[v->page];
    *entry = entry_of(c, v, r->length, x->cold_only, &cold);
    arena_retain(&c->arena, entry->exact != NO_PAGE ? entry->exact : entry->coded);
  }
  s->pages = r->last->page + 1; /* codes may move while a page is taken: only complete entries count */
  if (r->partial != NO_PAGE) {
    const int32_t page = cache_take_exact(c);
    cache_copy_exact(c, r->partial, page);
    s->table[s->pages++] = (struct page_entry){page, NO_PAGE};
  }
  if (sequence_first_gone(s, s->length, 0) >= 0) {
    s->refilled_from = r->refilled_from;
    s->cold_tokens = min64(s->cold_tokens, s->length);
  }
  cache_note_peak(c);
  *sequence = s;
  return OSCAR_OK;
}

static void count_take(oscar_prefix_stats *stats, const oscar_prefix_match *match) {
  stats->takes++;
  stats->hits += match->reused_tokens > 0;
  *(match->refill_tokens > 0 ? &stats->reused_refill_tokens : &stats->reused_exact_tokens) += match->reused_tokens;
  stats->refilled_tokens += match->refill_tokens;
  stats->computed_tokens += match->compute_tokens;
}

oscar_status oscar_prefix_take(oscar_prefix *t, const int32_t *tokens, int64_t count, oscar_prefix_reuse reuse,
                               oscar_sequence **sequence, oscar_prefix_match *match) {
  *sequence = NULL;
  struct search x;
  struct resume r;
  oscar_prefix_match found;
  oscar_status status = look_up(t, tokens, count, reuse, &x, &r, &found);
  if (status != OSCAR_OK) return status;
  prefix_touch(t, x.deepest);
  if (r.parked) prefix_touch_parked(t, r.parked);
  status = make_sequence(&x, &r, sequence);
  debug_check(t->cache);
  if (status != OSCAR_OK) return status;
  count_take(&t->stats, &found);
  if (match) *match = found;
  return OSCAR_OK;
}
