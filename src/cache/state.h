/*
 * cache/state.h - the structures of a cache and its sequences, and what the files of this room share. Private to the room.
 */
#ifndef OSCAR_CACHE_STATE_H
#define OSCAR_CACHE_STATE_H

#include "cache/arena.h"
#include "cache/view.h"
#include <oscar/prefix.h>

#define TABLE_ENTRIES 64 /* page tables grow by this many entries */

/* What follows from the options alone (plan.c). All sizes are bytes. */
struct cache_plan {
  int32_t run;                                   /* units of an exact page, k */
  size_t page_bytes;                             /* a unit, all layers */
  size_t unit_cost;                              /* page_bytes and the bookkeeping of a unit: what a unit takes from the budget */
  size_t fixed_bytes;                            /* of a cache without units and sequences, scratch included */
  size_t sequence_bytes;                         /* of a sequence without its table */
  int threads;                                   /* that encode; each has scratch_bytes */
  size_t scratch_bytes, scratch_y, scratch_rows; /* in a thread's part: floats at 0, projected at y, canonical rows at rows */
};
/* Errors: INVALID_ARGUMENT, MISMATCH; recorded in `context`. */
oscar_status plan_make(oscar_context *context, const oscar_cache_options *options, struct cache_plan *plan);
/* Bytes of a unit of one layer; *form is set when the layer has codecs. */
size_t plan_layer_bytes(const oscar_cache_options *options, int layer, struct side_form form[2]);
size_t plan_table_bytes(int64_t pages);

struct layer_part {
  uint8_t *memory; /* [units][unit_bytes] */
  size_t unit_bytes;
  struct side_form form[2];
  size_t side_bytes[2], head_bytes; /* of the coded form */
};

struct oscar_cache {
  struct cache_geometry geometry;
  struct cache_plan plan;
  size_t budget_bytes;
  size_t sequences_bytes; /* sequences and tables now */
  size_t prefix_bytes;    /* of the prefix tree for itself, now */
  size_t peak_held_bytes;
  size_t shortfall; /* of the last NO_SPACE */
  int64_t demoted_pages;
  struct arena arena;
  oscar_sequence *sequences; /* intrusive list, so that compaction finds every table */
  oscar_prefix *prefix;      /* or NULL */
  uint8_t *memory, *scratch;
  struct device_store *store; /* where memory is a GPU's (cache/cuda/store.h) */
  uint64_t changes;           /* of any table, counted */
  uint8_t codecs[16];         /* their fingerprint (snapshot_format.h), or zeros */
  struct layer_part layers[];
};

struct page_entry {
  int32_t exact, coded; /* NO_PAGE: not in this form. Both only between begin and commit, for pages the step demotes */
};

struct oscar_sequence {
  oscar_cache *cache;
  oscar_sequence *prev, *next;
  struct prefix_tail *tail; /* what the prefix tree knows of it, or NULL */
  int64_t length;
  int64_t cold_tokens;   /* tokens before which a cold run has the same pages; INT64_MAX: all */
  int64_t refilled_from; /* pages before this one may be read as codes although the rule wants them exact (a refill) */
  int64_t pages, capacity;
  struct page_entry *table; /* [capacity], the open step's pages included */
  int step_tokens;          /* n of the open step, 0: none */
  int step_layers;          /* layers written */
  bool step_failed;
  int64_t demoted_first, demoted_end; /* pages that the open step demotes are among these */
  bool written[];                     /* [layers] in the open step */
};

static inline int64_t pages_of(int64_t tokens) { return (tokens + PAGE_TOKENS - 1) / PAGE_TOKENS; }
static inline int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

/* ---- cache.c ---- */
static inline size_t held_bytes(const oscar_cache *cache) {
  return (size_t)cache->arena.used_units * cache->plan.unit_cost + cache->sequences_bytes + cache->prefix_bytes;
}
/* Whether `units` more and `bytes` more of sequences and tables fit into the budget. */
bool cache_has_room(const oscar_cache *cache, int64_t units, size_t bytes);
/* NO_SPACE with a sentence that says what was wanted for what. */
oscar_status cache_full(oscar_cache *cache, const char *what, int64_t units, size_t bytes);
int64_t cache_free_units(const oscar_cache *cache);
void cache_note_peak(oscar_cache *cache);
/* A page; the caller has asked cache_has_room. take_exact compacts if it must. */
int32_t cache_take_coded(oscar_cache *cache);
int32_t cache_take_exact(oscar_cache *cache);
void cache_copy_exact(oscar_cache *cache, int32_t from, int32_t to);
static inline uint8_t *page_memory(const oscar_cache *cache, int layer, int32_t page) {
  return cache->layers[layer].memory + (size_t)page * cache->layers[layer].unit_bytes;
}
/* Bytes of a page in one layer. */
static inline size_t page_layer_bytes(const oscar_cache *cache, int layer, bool coded) {
  return coded ? cache->layers[layer].unit_bytes : (size_t)cache->geometry.kv_heads * exact_head_bytes(&cache->geometry);
}
static inline uint8_t *exact_memory(const oscar_cache *cache, int layer, int32_t page, int kv_head) {
  return page_memory(cache, layer, page) + (size_t)kv_head * exact_head_bytes(&cache->geometry);
}
static inline uint8_t *coded_memory(const oscar_cache *cache, int layer, int32_t page, int kv_head, oscar_side side) {
  const struct layer_part *part = &cache->layers[layer];
  return page_memory(cache, layer, page) + (size_t)kv_head * part->head_bytes + (side == OSCAR_VALUES ? part->side_bytes[0] : 0);
}

/* ---- sequence.c ---- */
/* An empty sequence with a table for `pages`. NO_MEMORY; the budget is the caller's to check. */
oscar_status sequence_make(oscar_cache *cache, int64_t pages, oscar_sequence **sequence);
/* The first page >= from that continuing at `length` reads exactly (or fills up) and that is codes only; -1 if there is none. */
int64_t sequence_first_gone(const oscar_sequence *sequence, int64_t length, int64_t from);
void entry_release(oscar_cache *cache, struct page_entry *entry);
/* Forgets the pages from `keep` on and gives table space back where that can be done. */
void sequence_drop_pages(oscar_sequence *sequence, int64_t keep);
/* The table with room for `pages`. NO_MEMORY; the budget is the caller's to check (plan_table_bytes). */
oscar_status sequence_grow_table(oscar_sequence *sequence, int64_t pages);
/* Whether the open step has reserved this page's codes and encodes them, layer by layer (else they were there before). */
static inline bool entry_is_being_encoded(const oscar_cache *cache, const struct page_entry *entry) {
  return entry->exact != NO_PAGE && entry->coded != NO_PAGE && cache->arena.unit[entry->exact].twin != entry->coded;
}

/* ---- prefix.c: the tree keeps up with what changes elsewhere. Nothing here can fail. ---- */
void prefix_follow_commit(oscar_sequence *sequence);
/* Before the sequence is cut to `length`, so that pages of which only the tree has another reference need no copy. */
void prefix_follow_cut(oscar_sequence *sequence, int64_t length);
void prefix_follow_free(oscar_sequence *sequence);
/* Coded pages of a block have moved. */
void prefix_follow_compaction(oscar_prefix *tree, int32_t block);
/* ---- prefix_check.c ---- */
/* Counts the tree's references as oscar_cache_check does those of tables. */
oscar_status prefix_check(const oscar_prefix *tree);

/* ---- check.c ---- */
/* Counts a reference; false if the page is not one of that form. */
bool check_count_page(const struct arena *arena, int32_t page, bool exact);
#ifdef OSCAR_DEBUG
void debug_check(const oscar_cache *cache);
#else
static inline void debug_check(const oscar_cache *cache) { (void)cache; }
#endif

#endif
