/*
 * prefix_check.c - the invariants of a prefix tree, walked as part of oscar_cache_check.
 */
#include "cache/prefix.h"

#include <string.h>

#define VIOLATED(t, ...)                                                                                                         \
  set_error((t)->cache->geometry.context, OSCAR_INVALID_ARGUMENT, "cache invariant violated: prefix tree: " __VA_ARGS__)

static const char *node_violation(const oscar_prefix *t, const struct prefix_node *v) {
  const struct arena *a = &t->cache->arena;
  const struct prefix_node *first = v->parent->first_child;
  if (!check_count_page(a, v->exact, true) || !check_count_page(a, v->coded, false)) return "has ids that are no such pages";
  if (v->page != v->parent->page + 1 || v->hash != prefix_hash(v->parent->hash, v->tokens))
    return "is not the child of its parent";
  if (prefix_child(t, v->parent, v->tokens) != v) return "is not found";
  if (v->previous_sibling ? v->previous_sibling->next_sibling != v : first != v) return "is not among the children of its parent";
  if (v->exact != NO_PAGE && v->pins == 0 && !stays_exact(t->cache, v->page)) return "is exact without need";
  if (v->coded != NO_PAGE && stays_exact(t->cache, v->page)) return "is coded and should never be";
  if (v->newer ? v->newer->older != v : t->newest != v) return "is lost in the list by use";
  if (v->parent != &t->root && v->parent->found < 0) return "was used after its parent";
  return NULL;
}

static const char *tail_violation(const oscar_prefix *t, const struct prefix_tail *tail) {
  const struct arena *a = &t->cache->arena;
  const oscar_sequence *s = tail->sequence;
  if (tail->previous ? tail->previous->next != tail : tail->node->tails != tail) return "is lost in the list of its node";
  if (tail->filled < 0 || tail->filled >= PAGE_TOKENS) return "has a whole page of tokens";
  if (s) {
    if (s->tail != tail || s->cache != t->cache) return "belongs to a sequence that does not know it";
    if (s->length < (tail->node->page + 1) * PAGE_TOKENS + tail->filled) return "is longer than its sequence";
    return tail->page == NO_PAGE ? NULL : "holds a page of a live sequence";
  }
  if ((tail->filled > 0) != (tail->page != NO_PAGE)) return "is parked without its page";
  if (!check_count_page(a, tail->page, true)) return "has an id that is no such page";
  if (tail->page != NO_PAGE && a->unit[tail->page].refs != 1) return "shares the page that was being filled";
  return NULL;
}

struct counts {
  int64_t nodes, attached, parked;
};

/* The pins of a tail are counted when its node's turn comes, and so after all nodes above it had theirs. */
static oscar_status check_tails(const oscar_prefix *t, const struct prefix_node *v, struct counts *counts) {
  for (const struct prefix_tail *tail = v->tails; tail; tail = tail->next) {
    const char *wrong = tail->node == v ? tail_violation(t, tail) : "belongs to another node";
    if (wrong) return VIOLATED(t, "the tail of a sequence after page %lld %s", (long long)v->page, wrong);
    for (struct prefix_node *pinned = tail->node; pinned->page >= tail->pinned_from; pinned = pinned->parent) pinned->found++;
    *(tail->sequence ? &counts->attached : &counts->parked) += 1;
  }
  return OSCAR_OK;
}

oscar_status prefix_check(const oscar_prefix *t) {
  struct counts counts = {0};
  for (struct prefix_node *v = t->newest; v; v = v->older) v->found = -1;
  oscar_status status = check_tails(t, &t->root, &counts);
  for (struct prefix_node *v = t->newest; v && status == OSCAR_OK; v = v->older) {
    const char *wrong = node_violation(t, v);
    if (wrong) return VIOLATED(t, "page %lld %s", (long long)v->page, wrong);
    v->found = 0;
    status = check_tails(t, v, &counts);
    counts.nodes++;
  }
  if (status != OSCAR_OK) return status;
  int64_t parked = 0;
  for (const struct prefix_tail *tail = t->newest_parked; tail; tail = tail->older) parked++;
  if (counts.nodes != t->stats.known_pages || counts.attached != t->stats.attached || counts.parked != t->stats.parked ||
      parked != counts.parked)
    return VIOLATED(t, "%lld pages, %lld live and %lld parked sequences, and others are counted", (long long)counts.nodes,
                    (long long)counts.attached, (long long)counts.parked);
  for (const struct prefix_node *v = t->newest; v; v = v->older)
    if (v->pins != v->found)
      return VIOLATED(t, "page %lld counts %d pins and there are %d", (long long)v->page, v->pins, v->found);
  const size_t bytes = sizeof *t + prefix_bucket_bytes(t->bucket_count) + (size_t)counts.nodes * sizeof(struct prefix_node) +
                       (size_t)(counts.attached + counts.parked) * sizeof(struct prefix_tail);
  if (bytes != t->cache->prefix_bytes) return VIOLATED(t, "%zu bytes, and %zu are counted", bytes, t->cache->prefix_bytes);
  return OSCAR_OK;
}
