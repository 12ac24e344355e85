/*
 * cache/prefix.h - the structures of the prefix tree, and what the files about it share. Private to the room.
 */
#ifndef OSCAR_CACHE_PREFIX_H
#define OSCAR_CACHE_PREFIX_H

#include "cache/state.h"
#include <oscar/prefix.h>

/* A page of tokens after those of its parents. It holds a reference to each form that it has. */
struct prefix_node {
  struct prefix_node *parent, *first_child, *previous_sibling, *next_sibling;
  struct prefix_node *next_in_bucket;
  struct prefix_node *older, *newer; /* by last use; a node is newer than all below it */
  struct prefix_tail *tails;
  uint64_t hash;   /* of the tokens from the root to here */
  int64_t page;    /* its number in a sequence; -1: the root */
  int32_t exact;   /* or NO_PAGE. A page that turns into codes is held exactly only while pins > 0 */
  int32_t coded;   /* or NO_PAGE. Neither: tokens that are known to be recomputed */
  bool exact_cold; /* the form is what a cold run makes; else it was computed after a refill */
  bool coded_cold;
  int32_t pins;  /* tails whose recent pages include this one */
  int32_t found; /* pins that oscar_cache_check has found, -1 before it came by; meaningless outside it */
  int32_t tokens[PAGE_TOKENS];
};

/* The end of a sequence: of a live one that was inserted, which it follows, or of a parked one. */
struct prefix_tail {
  struct prefix_node *node;            /* of the last whole page that the tree knows of the sequence */
  struct prefix_tail *previous, *next; /* of the node */
  struct prefix_tail *older, *newer;   /* of parked ones, by last use */
  oscar_sequence *sequence;            /* NULL: parked */
  int64_t pinned_from;                 /* nodes from this page to `node` are pinned */
  int64_t cold_tokens, refilled_from;  /* of a parked sequence, as in struct oscar_sequence */
  int32_t page;                        /* of a parked sequence: the page that was being filled, or NO_PAGE */
  int32_t filled;                      /* tokens known in the page after `node`'s */
  int32_t tokens[PAGE_TOKENS];
};

struct oscar_prefix {
  oscar_cache *cache;
  struct prefix_node root;
  struct prefix_node **buckets; /* [bucket_count], a power of two */
  size_t bucket_count;
  struct prefix_node *newest, *oldest;
  struct prefix_tail *newest_parked, *oldest_parked;
  oscar_prefix_stats stats; /* what is counted; what is computed stays 0 */
};

/* Whether a page never turns into codes. */
static inline bool stays_exact(const oscar_cache *c, int64_t page) {
  return !demotes_pages(&c->geometry) || page < c->geometry.sink_pages;
}

uint64_t prefix_hash(uint64_t parent, const int32_t *tokens);
/* NULL: the tree does not know that page. */
struct prefix_node *prefix_child(const oscar_prefix *tree, const struct prefix_node *parent, const int32_t *tokens);
/* Makes `node` and its parents, and a parked tail, the most recently used. */
void prefix_touch(oscar_prefix *tree, struct prefix_node *node);
void prefix_touch_parked(oscar_prefix *tree, struct prefix_tail *tail);
size_t prefix_bucket_bytes(size_t buckets);

#endif
