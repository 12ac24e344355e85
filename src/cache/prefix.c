/*
 * prefix.c - the prefix tree: pages of tokens, the pages of the cache that hold them, and the ends of sequences.
 *
 * A node is one page of 64 tokens after those of its parents; a hash table finds the child with given tokens. It refers to pages
 * of the cache as a sequence does, by reference count, in each form that it has: codes for good, the exact form of a sink for
 * good, and that of any other page for as long as it is pinned. A node may have neither (tokens that are known, to be
 * recomputed): when a parked sequence loses its exact pages, how far it went is still worth knowing, because a refill then starts
 * recent_pages before its end, and not before the last codes.
 *
 * A tail is the end of a sequence: which node it has come to, the tokens after it, and pins on the nodes of its recent window.
 * The tail of a live sequence follows it without being told: on commit the window moves on, a rewind shortens it, and with the
 * sequence it goes. So the tree never holds an exact page that only a live sequence wanted for longer than that sequence does.
 * Codes are not asked for when a pin goes: whoever demotes a page links its two forms (arena_link_twins), and the node takes the
 * twin over.
 *
 * Each form is marked cold if it is what a cold run makes, or else comes from a sequence that was refilled before. A cold page
 * replaces one that is not, and equal cold pages of tree and sequence become one.
 *
 * Nodes are in one list by last use, a node always before all that are below it: use moves a node and then its parents to the
 * front. So what comes last is a leaf, and eviction walks the list from there.
 */
#include "cache/prefix.h"

#include <string.h>

#define FIRST_BUCKETS 64

/* ---- memory ---- */

size_t prefix_bucket_bytes(size_t buckets) { return buckets * sizeof(struct prefix_node *); }

/* NO_SPACE or NO_MEMORY: NULL, with the status. */
static void *take_bytes(oscar_cache *c, const char *what, size_t bytes, oscar_status *status) {
  if (!cache_has_room(c, 0, bytes)) {
    *status = cache_full(c, what, 0, bytes);
    return NULL;
  }
  void *memory = mem_zalloc(c->geometry.context, 1, bytes);
  *status = memory ? OSCAR_OK : OSCAR_NO_MEMORY;
  if (!memory) return NULL;
  c->prefix_bytes += bytes;
  cache_note_peak(c);
  return memory;
}

static void give_bytes(oscar_cache *c, void *memory, size_t bytes) {
  mem_free(c->geometry.context, memory);
  c->prefix_bytes -= bytes;
}

oscar_status oscar_prefix_create(oscar_cache *c, oscar_prefix **tree) {
  *tree = NULL;
  if (c->prefix) return set_error(c->geometry.context, OSCAR_INVALID_ARGUMENT, "the cache has a prefix tree already");
  const size_t bytes = sizeof(struct oscar_prefix) + prefix_bucket_bytes(FIRST_BUCKETS);
  if (!cache_has_room(c, 0, bytes)) return cache_full(c, "a prefix tree", 0, bytes);
  oscar_status status;
  oscar_prefix *t = take_bytes(c, "a prefix tree", sizeof *t, &status);
  if (!t) return status;
  t->buckets = take_bytes(c, "a prefix tree", prefix_bucket_bytes(FIRST_BUCKETS), &status);
  if (!t->buckets) {
    give_bytes(c, t, sizeof *t);
    return status;
  }
  t->cache = c;
  t->bucket_count = FIRST_BUCKETS;
  t->root.page = -1;
  t->root.exact = t->root.coded = NO_PAGE;
  c->prefix = t;
  debug_check(c);
  *tree = t;
  return OSCAR_OK;
}

size_t oscar_prefix_bytes_for(int64_t tokens, int sequences) {
  if (tokens < 0 || sequences < 0) return 0;
  const int64_t nodes = tokens / PAGE_TOKENS;
  size_t buckets = FIRST_BUCKETS, of_nodes, of_tails, bytes = sizeof(struct oscar_prefix);
  while (buckets < (size_t)nodes) buckets *= 2;
  if (__builtin_mul_overflow((size_t)nodes, sizeof(struct prefix_node), &of_nodes) ||
      __builtin_mul_overflow((size_t)sequences, sizeof(struct prefix_tail), &of_tails) ||
      __builtin_add_overflow(bytes, of_nodes, &bytes) || __builtin_add_overflow(bytes, of_tails, &bytes) ||
      __builtin_add_overflow(bytes, prefix_bucket_bytes(buckets), &bytes))
    return 0;
  return bytes;
}

/* ---- the hash table ---- */

uint64_t prefix_hash(uint64_t parent, const int32_t *tokens) {
  uint64_t hash = parent;
  for (int i = 0; i < PAGE_TOKENS; i++) {
    hash = (hash ^ (uint32_t)tokens[i]) * 0x9E3779B97F4A7C15u; /* 2^64 over the golden ratio (Knuth, 6.4) */
    hash ^= hash >> 29;
  }
  return hash;
}

static struct prefix_node **bucket_of(const oscar_prefix *t, uint64_t hash) { return &t->buckets[hash & (t->bucket_count - 1)]; }

struct prefix_node *prefix_child(const oscar_prefix *t, const struct prefix_node *parent, const int32_t *tokens) {
  const uint64_t hash = prefix_hash(parent->hash, tokens);
  struct prefix_node *v = *bucket_of(t, hash);
  while (v && !(v->hash == hash && v->parent == parent && memcmp(v->tokens, tokens, sizeof v->tokens) == 0))
    v = v->next_in_bucket;
  return v;
}

/* Another number of buckets, if there is room: without it the table stays as it is, slower or larger than it should be. */
static void rehash(oscar_prefix *t, size_t count) {
  oscar_cache *c = t->cache;
  const size_t old_bytes = prefix_bucket_bytes(t->bucket_count), bytes = prefix_bucket_bytes(count);
  if (bytes > old_bytes && !cache_has_room(c, 0, bytes - old_bytes)) return;
  struct prefix_node **old = t->buckets, **buckets = mem_zalloc(c->geometry.context, 1, bytes);
  if (!buckets) return;
  t->buckets = buckets;
  t->bucket_count = count;
  for (struct prefix_node *v = t->newest; v; v = v->older) {
    struct prefix_node **bucket = bucket_of(t, v->hash);
    v->next_in_bucket = *bucket;
    *bucket = v;
  }
  mem_free(c->geometry.context, old);
  c->prefix_bytes += bytes - old_bytes; /* wraps when shrinking, and comes out right */
  cache_note_peak(c);
}

/* ---- use ---- */

static void unlink_use(oscar_prefix *t, struct prefix_node *v) {
  *(v->newer ? &v->newer->older : &t->newest) = v->older;
  *(v->older ? &v->older->newer : &t->oldest) = v->newer;
}

static void link_use(oscar_prefix *t, struct prefix_node *v) {
  v->newer = NULL;
  v->older = t->newest;
  *(t->newest ? &t->newest->newer : &t->oldest) = v;
  t->newest = v;
}

void prefix_touch(oscar_prefix *t, struct prefix_node *v) {
  for (; v != &t->root; v = v->parent) {
    unlink_use(t, v);
    link_use(t, v);
  }
}

static void unlink_parked(oscar_prefix *t, struct prefix_tail *tail) {
  *(tail->newer ? &tail->newer->older : &t->newest_parked) = tail->older;
  *(tail->older ? &tail->older->newer : &t->oldest_parked) = tail->newer;
}

static void link_parked(oscar_prefix *t, struct prefix_tail *tail) {
  tail->newer = NULL;
  tail->older = t->newest_parked;
  *(t->newest_parked ? &t->newest_parked->newer : &t->oldest_parked) = tail;
  t->newest_parked = tail;
}

void prefix_touch_parked(oscar_prefix *t, struct prefix_tail *tail) {
  unlink_parked(t, tail);
  link_parked(t, tail);
}

/* ---- nodes ---- */

static oscar_status add_node(oscar_prefix *t, struct prefix_node *parent, const int32_t *tokens, struct prefix_node **node) {
  oscar_status status;
  struct prefix_node *v = take_bytes(t->cache, "a page of the prefix tree", sizeof *v, &status);
  if (!v) return status;
  memcpy(v->tokens, tokens, sizeof v->tokens);
  v->parent = parent;
  v->page = parent->page + 1;
  v->exact = v->coded = NO_PAGE;
  v->hash = prefix_hash(parent->hash, tokens);
  v->next_sibling = parent->first_child;
  if (v->next_sibling) v->next_sibling->previous_sibling = v;
  parent->first_child = v;
  struct prefix_node **bucket = bucket_of(t, v->hash);
  v->next_in_bucket = *bucket;
  *bucket = v;
  link_use(t, v);
  if ((size_t)++t->stats.known_pages > t->bucket_count) rehash(t, 2 * t->bucket_count);
  *node = v;
  return OSCAR_OK;
}

static void let_go(oscar_prefix *t, int32_t *page) {
  if (*page != NO_PAGE) arena_release(&t->cache->arena, *page);
  *page = NO_PAGE;
}

/* Of a leaf without tails. */
static void remove_node(oscar_prefix *t, struct prefix_node *v) {
  let_go(t, &v->exact);
  let_go(t, &v->coded);
  *(v->previous_sibling ? &v->previous_sibling->next_sibling : &v->parent->first_child) = v->next_sibling;
  if (v->next_sibling) v->next_sibling->previous_sibling = v->previous_sibling;
  struct prefix_node **link = bucket_of(t, v->hash);
  while (*link != v) link = &(*link)->next_in_bucket;
  *link = v->next_in_bucket;
  unlink_use(t, v);
  give_bytes(t->cache, v, sizeof *v);
  /* a quarter, so that a tree that goes up and down by a node does not do this each time */
  if ((size_t)--t->stats.known_pages < t->bucket_count / 4 && t->bucket_count > FIRST_BUCKETS) rehash(t, t->bucket_count / 2);
}

static void drop_exact(oscar_prefix *t, struct prefix_node *v) {
  struct arena *a = &t->cache->arena;
  const int32_t twin = a->unit[v->exact].twin;
  if (twin != NO_PAGE && twin != v->coded && (v->coded == NO_PAGE || (v->exact_cold && !v->coded_cold))) {
    let_go(t, &v->coded);
    arena_retain(a, twin);
    v->coded = twin;
    v->coded_cold = v->exact_cold;
  }
  let_go(t, &v->exact);
}

static void unpin(oscar_prefix *t, struct prefix_node *v) {
  if (--v->pins == 0 && v->exact != NO_PAGE) drop_exact(t, v);
}

/* One form of a page in a node and in a sequence. */
static void merge_form(oscar_prefix *t, int32_t *in_tree, bool *tree_cold, int32_t *in_sequence, bool cold) {
  struct arena *a = &t->cache->arena;
  if (*in_tree == *in_sequence) {
    *tree_cold |= cold;
  } else if (*in_tree != NO_PAGE && *tree_cold) {
    if (!cold) return;
    arena_retain(a, *in_tree);
    arena_release(a, *in_sequence);
    *in_sequence = *in_tree;
    t->cache->changes++;
    t->stats.shared_pages++;
  } else if (*in_tree == NO_PAGE || cold) {
    let_go(t, in_tree);
    arena_retain(a, *in_sequence);
    *in_tree = *in_sequence;
    *tree_cold = cold;
  }
}

static void merge(oscar_prefix *t, struct prefix_node *v, oscar_sequence *s) {
  struct arena *a = &t->cache->arena;
  struct page_entry *entry = &s->table[v->page];
  const bool cold = (v->page + 1) * PAGE_TOKENS <= s->cold_tokens;
  if (entry->exact != NO_PAGE && (v->pins > 0 || stays_exact(t->cache, v->page)))
    merge_form(t, &v->exact, &v->exact_cold, &entry->exact, cold);
  if (entry->coded != NO_PAGE) merge_form(t, &v->coded, &v->coded_cold, &entry->coded, cold);
  /* whoever demotes the exact form later need not encode it */
  if (v->exact != NO_PAGE && v->coded != NO_PAGE && v->exact_cold && v->coded_cold && a->unit[v->exact].twin == NO_PAGE &&
      a->unit[v->coded].twin == NO_PAGE)
    arena_link_twins(a, v->exact, v->coded);
}

/* ---- tails ---- */

/* The first page that a sequence of this length holds exactly for its recent window; none where pages stay exact anyway. */
static int64_t window_start(const oscar_cache *c, int64_t length) {
  const struct cache_geometry *g = &c->geometry;
  if (!demotes_pages(g)) return INT64_MAX;
  return max64(g->sink_pages, length > 0 ? (length - 1) / PAGE_TOKENS - g->recent_pages : 0);
}

static void unlink_tail(struct prefix_tail *tail) {
  *(tail->previous ? &tail->previous->next : &tail->node->tails) = tail->next;
  if (tail->next) tail->next->previous = tail->previous;
}

static void link_tail(struct prefix_tail *tail, struct prefix_node *v) {
  tail->node = v;
  tail->previous = NULL;
  tail->next = v->tails;
  if (tail->next) tail->next->previous = tail;
  v->tails = tail;
}

static oscar_status attach(oscar_prefix *t, oscar_sequence *s) {
  oscar_status status;
  struct prefix_tail *tail = take_bytes(t->cache, "the end of a sequence in the prefix tree", sizeof *tail, &status);
  if (!tail) return status;
  tail->sequence = s;
  tail->page = NO_PAGE;
  tail->pinned_from = window_start(t->cache, s->length);
  link_tail(tail, &t->root);
  s->tail = tail;
  t->stats.attached++;
  return OSCAR_OK;
}

static void remove_tail(oscar_prefix *t, struct prefix_tail *tail) {
  unlink_tail(tail);
  for (struct prefix_node *v = tail->node; v->page >= tail->pinned_from; v = v->parent) unpin(t, v);
  if (tail->sequence) {
    tail->sequence->tail = NULL;
    t->stats.attached--;
  } else {
    unlink_parked(t, tail);
    let_go(t, &tail->page);
    t->stats.parked--;
  }
  give_bytes(t->cache, tail, sizeof *tail);
}

void prefix_follow_free(oscar_sequence *s) { remove_tail(s->cache->prefix, s->tail); }

void prefix_follow_commit(oscar_sequence *s) {
  oscar_prefix *t = s->cache->prefix;
  struct prefix_tail *tail = s->tail;
  const int64_t start = window_start(s->cache, s->length);
  if (start <= tail->pinned_from) return;
  for (struct prefix_node *v = tail->node; v->page >= tail->pinned_from; v = v->parent)
    if (v->page < start) {
      unpin(t, v);
      merge(t, v, s); /* codes that are not the twin of what was in the node */
    }
  tail->pinned_from = start;
}

void prefix_follow_cut(oscar_sequence *s, int64_t length) {
  struct prefix_tail *tail = s->tail;
  struct prefix_node *v = tail->node;
  const int64_t whole = length / PAGE_TOKENS;
  if (length >= (v->page + 1) * PAGE_TOKENS + tail->filled) { /* only what the tree has not been told of is cut */
    tail->pinned_from = min64(tail->pinned_from, v->page + 1);
    return;
  }
  if (v->page >= whole) {
    unlink_tail(tail);
    for (; v->page >= whole; v = v->parent) {
      if (v->page == whole) memcpy(tail->tokens, v->tokens, sizeof v->tokens);
      if (v->page >= tail->pinned_from) unpin(s->cache->prefix, v);
    }
    link_tail(tail, v);
  }
  tail->filled = (int32_t)(length % PAGE_TOKENS);
  tail->pinned_from = min64(tail->pinned_from, v->page + 1);
}

void prefix_follow_compaction(oscar_prefix *t, int32_t block) {
  for (struct prefix_node *v = t->newest; v; v = v->older) v->coded = arena_forwarded(&t->cache->arena, block, v->coded);
}

/* ---- insert and park ---- */

static oscar_status insert(oscar_prefix *t, oscar_sequence *s, const int32_t *tokens) {
  const int64_t whole = s->length / PAGE_TOKENS;
  oscar_status status = s->tail ? OSCAR_OK : attach(t, s);
  if (status != OSCAR_OK) return status;
  struct prefix_tail *tail = s->tail;
  prefix_follow_commit(s);
  struct prefix_node *v = tail->node;
  while (v->page + 1 < whole) {
    const int32_t *page = tokens + (v->page + 1) * PAGE_TOKENS;
    struct prefix_node *child = prefix_child(t, v, page);
    if (!child && (status = add_node(t, v, page, &child)) != OSCAR_OK) break;
    v = child;
    v->pins += v->page >= tail->pinned_from;
    merge(t, v, s);
  }
  if (v != tail->node) {
    unlink_tail(tail);
    link_tail(tail, v);
    prefix_touch(t, v);
  }
  tail->filled = v->page + 1 == whole ? (int32_t)(s->length % PAGE_TOKENS) : 0;
  memcpy(tail->tokens, tokens + whole * PAGE_TOKENS, (size_t)tail->filled * sizeof *tokens);
  return status;
}

static oscar_status check_sequence(const oscar_prefix *t, const oscar_sequence *s) {
  oscar_context *context = t->cache->geometry.context;
  if (s->cache != t->cache)
    return set_error(context, OSCAR_INVALID_ARGUMENT, "the sequence belongs to another cache than the tree");
  if (s->step_tokens)
    return set_error(context, OSCAR_INVALID_ARGUMENT, "a sequence cannot enter the prefix tree while a step is open");
  return OSCAR_OK;
}

oscar_status oscar_prefix_insert(oscar_prefix *t, oscar_sequence *s, const int32_t *tokens) {
  oscar_status status = check_sequence(t, s);
  if (status == OSCAR_OK) status = insert(t, s, tokens);
  debug_check(t->cache);
  return status;
}

/* The parked tail that ends as `tail` does, or NULL. */
static struct prefix_tail *find_parked(const struct prefix_tail *tail) {
  for (struct prefix_tail *other = tail->node->tails; other; other = other->next)
    if (!other->sequence && other != tail && other->filled == tail->filled &&
        memcmp(other->tokens, tail->tokens, (size_t)tail->filled * sizeof tail->tokens[0]) == 0)
      return other;
  return NULL;
}

/* Turns the tail of a live sequence, which knows all of it, into a parked one. */
static void park(oscar_prefix *t, oscar_sequence *s) {
  struct prefix_tail *tail = s->tail, *same = find_parked(tail);
  tail->cold_tokens = s->cold_tokens;
  tail->refilled_from = s->refilled_from;
  if (tail->filled > 0) {
    tail->page = s->table[s->pages - 1].exact;
    arena_retain(&t->cache->arena, tail->page);
  }
  s->tail = NULL;
  tail->sequence = NULL;
  t->stats.attached--;
  t->stats.parked++;
  link_parked(t, tail);
  if (!same) return;
  /* Of two that end in the same way the one that a cold run would have made stays, or else the later one. */
  const bool older_is_better = same->cold_tokens == INT64_MAX && tail->cold_tokens != INT64_MAX;
  if (older_is_better) prefix_touch_parked(t, same);
  remove_tail(t, older_is_better ? tail : same);
  t->stats.superseded_parked++;
}

oscar_status oscar_prefix_park(oscar_prefix *t, oscar_sequence *s, const int32_t *tokens) {
  oscar_status status = check_sequence(t, s);
  if (status == OSCAR_OK && s->length > 0) status = insert(t, s, tokens);
  if (status != OSCAR_OK) {
    debug_check(t->cache);
    return status;
  }
  if (s->length > 0) {
    prefix_touch(t, s->tail->node);
    park(t, s);
  }
  oscar_sequence_free(s);
  return OSCAR_OK;
}

/* ---- eviction ---- */

static int32_t units_to_free(const oscar_prefix *t, int32_t page) {
  const struct arena *a = &t->cache->arena;
  return page != NO_PAGE && a->unit[page].refs == 1 ? arena_page_units(a, page) : 0;
}

/* Whether cutting a parked sequence to its codes frees a page, if need be with others that end near it. */
static bool parked_frees(const oscar_prefix *t, const struct prefix_tail *tail) {
  if (units_to_free(t, tail->page) > 0) return true;
  for (const struct prefix_node *v = tail->node; v->page >= tail->pinned_from; v = v->parent)
    if (units_to_free(t, v->exact) > 0) return true;
  return false;
}

static bool is_held(const struct prefix_node *v) { return v->exact != NO_PAGE || v->coded != NO_PAGE; }

/* Whether a live sequence ends here, or others use all that the node has. */
static bool node_in_use(const oscar_prefix *t, const struct prefix_node *v) {
  for (const struct prefix_tail *tail = v->tails; tail; tail = tail->next)
    if (tail->sequence) return true;
  return is_held(v) && units_to_free(t, v->exact) + units_to_free(t, v->coded) == 0;
}

static void evict_parked(oscar_prefix *t, size_t stop) {
  for (struct prefix_tail *tail = t->oldest_parked, *newer; tail && held_bytes(t->cache) > stop; tail = newer) {
    newer = tail->newer;
    if (!parked_frees(t, tail)) continue;
    remove_tail(t, tail);
    t->stats.evicted_parked++;
  }
}

/* Exact pages that only the tree has and that live sequences pin: they have one of their own, computed after a refill. */
static void evict_pinned(oscar_prefix *t, size_t stop) {
  for (struct prefix_node *v = t->oldest; v && held_bytes(t->cache) > stop; v = v->newer)
    if (v->pins > 0 && units_to_free(t, v->exact) > 0) {
      drop_exact(t, v);
      t->stats.evicted_exact++;
    }
}

static void evict_leaves(oscar_prefix *t, size_t stop) {
  for (struct prefix_node *v = t->oldest, *newer; v && held_bytes(t->cache) > stop; v = newer) {
    newer = v->newer;
    if (v->first_child || node_in_use(t, v)) continue;
    for (; v->tails; t->stats.evicted_parked++) remove_tail(t, v->tails); /* without pages of their own */
    *(is_held(v) ? &t->stats.evicted_pages : &t->stats.evicted_unheld) += 1;
    remove_node(t, v);
  }
}

/* Leaves with their tails, used by sequences or not. */
static void forget_leaves(oscar_prefix *t, size_t stop) {
  for (struct prefix_node *v = t->oldest, *newer; v && held_bytes(t->cache) > stop; v = newer) {
    newer = v->newer;
    if (v->first_child) continue;
    for (; v->tails; t->stats.forgotten_in_use++) remove_tail(t, v->tails);
    t->stats.forgotten_in_use++;
    remove_node(t, v);
  }
  for (; t->root.tails && held_bytes(t->cache) > stop; t->stats.forgotten_in_use++) remove_tail(t, t->root.tails);
}

static size_t units_held_alone(const oscar_prefix *t) {
  size_t units = 0;
  for (const struct prefix_node *v = t->newest; v; v = v->older)
    units += (size_t)(units_to_free(t, v->exact) + units_to_free(t, v->coded));
  for (const struct prefix_tail *tail = t->newest_parked; tail; tail = tail->older) units += (size_t)units_to_free(t, tail->page);
  return units;
}

/* What forgetting everything would give back. */
static size_t bytes_to_free(const oscar_prefix *t) {
  const size_t own = t->cache->prefix_bytes - sizeof *t - prefix_bucket_bytes(t->bucket_count);
  return own + units_held_alone(t) * t->cache->plan.unit_cost;
}

void oscar_prefix_evict(oscar_prefix *t, size_t bytes, size_t *freed) {
  const size_t before = held_bytes(t->cache), stop = bytes < before ? before - bytes : 0;
  evict_parked(t, stop);
  evict_pinned(t, stop);
  evict_leaves(t, stop);
  if (held_bytes(t->cache) > stop && (bytes == OSCAR_PREFIX_ALL || held_bytes(t->cache) - stop <= bytes_to_free(t)))
    forget_leaves(t, stop);
  if (freed) *freed = before - held_bytes(t->cache);
  debug_check(t->cache);
}

void oscar_prefix_free(oscar_prefix *t) {
  if (!t) return;
  oscar_cache *c = t->cache;
  forget_leaves(t, 0);
  while (t->root.tails) remove_tail(t, t->root.tails);
  while (t->oldest) remove_node(t, t->oldest);
  c->prefix = NULL;
  give_bytes(c, t->buckets, prefix_bucket_bytes(t->bucket_count));
  give_bytes(c, t, sizeof *t);
  debug_check(c);
}

void oscar_prefix_stats_get(const oscar_prefix *t, oscar_prefix_stats *stats) {
  *stats = t->stats;
  for (const struct prefix_node *v = t->newest; v; v = v->older) stats->held_pages += is_held(v);
  stats->own_bytes = t->cache->prefix_bytes;
  stats->page_bytes = units_held_alone(t) * t->cache->plan.unit_cost;
}
