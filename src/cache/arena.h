/*
 * cache/arena.h - which units of the arena are free, and who holds the others. Private.
 *
 * The arena knows unit indices only: memory is the cache's. A unit is one coded page over all layers. Units come in blocks of
 * `run`; an exact page is a whole block, coded pages share blocks. A page id is the index of its (first) unit.
 */
#ifndef OSCAR_CACHE_ARENA_H
#define OSCAR_CACHE_ARENA_H

#include "base/base.h"

#define NO_PAGE (-1)

struct unit {
  int32_t refs;  /* of the page that starts here; 0: free, or inside an exact page */
  int32_t twin;  /* the other form of the same content (arena_link_twins), or NO_PAGE */
  int32_t found; /* references that oscar_cache_check has found; meaningless outside it */
};

struct block {
  int32_t prev, next; /* in the list of its fill; NO_PAGE at the ends */
  int32_t used;       /* units in use */
  bool exact;         /* one exact page, else coded pages */
};

struct arena {
  int32_t units, run;
  int32_t blocks; /* whole ones; a shorter last one, for coded pages only, has index `blocks` */
  int32_t used_units, exact_pages, coded_pages;
  struct unit *unit;   /* [units] */
  struct block *block; /* [blocks + 1] */
  int32_t *by_fill;    /* [run]: first block with that many units in use (0: free blocks); full ones are in no list */
};

/* The arrays must be there, uninitialised, and units and run set. */
void arena_init(struct arena *arena);

static inline int32_t arena_block_units(const struct arena *a, int32_t block) {
  return block < a->blocks ? a->run : a->units - a->blocks * a->run;
}
static inline int32_t arena_page_units(const struct arena *a, int32_t page) { return a->block[page / a->run].exact ? a->run : 1; }
static inline bool arena_has_free_block(const struct arena *a) { return a->by_fill[0] != NO_PAGE; }

/* A page with one reference. The caller knows that there is room: a free unit, a free block. */
int32_t arena_take_coded(struct arena *arena);
int32_t arena_take_exact(struct arena *arena);
void arena_retain(struct arena *arena, int32_t page);
void arena_release(struct arena *arena, int32_t page);

/* Remembers that `coded` is the encoding of `exact`, for as long as both live. The link holds no reference. */
void arena_link_twins(struct arena *arena, int32_t exact, int32_t coded);
void arena_unlink_twins(struct arena *arena, int32_t page);

/* Makes a free block when there is none but `run` units are free in all: moves every coded page out of the emptiest block. `copy`
 * moves the bytes. Until arena_evacuate_end(block), arena_forwarded maps the ids that were in the block to the new ones (and
 * every other id to itself), so that page tables can be corrected. */
int32_t arena_evacuate_begin(struct arena *arena, void (*copy)(void *user, int32_t from, int32_t to), void *user);
static inline int32_t arena_forwarded(const struct arena *a, int32_t block, int32_t page) {
  return page != NO_PAGE && page / a->run == block ? a->unit[page].twin : page;
}
void arena_evacuate_end(struct arena *arena, int32_t block);

/* NULL, or what is wrong with the lists, fills and counters; *where is the unit or block. Reference counts are the cache's to
 * check. */
const char *arena_violation(const struct arena *arena, int32_t *where);

#endif
