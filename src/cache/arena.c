/*
 * arena.c - units, blocks, reference counts, compaction.
 *
 * An exact page needs `run` consecutive units, a coded page one. To let both draw on one pool without either running out because
 * of fragmentation, the units are cut into blocks of `run` once and for all: an exact page is a block, coded pages fill the
 * fullest block that has room. When an exact page finds no free block although `run` units are free in total, the coded pages of
 * the emptiest block move to the others. That always succeeds: with m units used in the emptiest block and F >= run free in all,
 * F - (run - m) >= m are free outside it. So "is there room" is a question of counting, for any mix of pages:
 *
 *     x exact and y coded pages fit  <=>  x * run + y <= free units
 *
 * Units of a shorter last block are given out first: no exact page can use them. Freed blocks go to the head of their list and
 * are taken first, so memory that was never touched stays so for as long as possible.
 */
#include "cache/arena.h"

static void unlink_block(struct arena *a, int32_t index) {
  struct block *b = &a->block[index];
  if (b->prev != NO_PAGE)
    a->block[b->prev].next = b->next;
  else
    a->by_fill[b->used] = b->next;
  if (b->next != NO_PAGE) a->block[b->next].prev = b->prev;
}

static void link_block(struct arena *a, int32_t index) {
  struct block *b = &a->block[index];
  b->prev = NO_PAGE;
  b->next = a->by_fill[b->used];
  if (b->next != NO_PAGE) a->block[b->next].prev = index;
  a->by_fill[b->used] = index;
}

/* The only place where a fill changes: keeps the lists and the count of used units. */
static void set_fill(struct arena *a, int32_t index, int32_t used) {
  struct block *b = &a->block[index];
  bool listed = index < a->blocks;
  if (listed && b->used < a->run) unlink_block(a, index);
  a->used_units += used - b->used;
  b->used = used;
  if (listed && b->used < a->run) link_block(a, index);
}

void arena_init(struct arena *a) {
  a->blocks = a->units / a->run;
  a->used_units = a->exact_pages = a->coded_pages = 0;
  for (int32_t i = 0; i < a->units; i++) a->unit[i] = (struct unit){.twin = NO_PAGE};
  for (int32_t i = 0; i < a->run; i++) a->by_fill[i] = NO_PAGE;
  for (int32_t i = a->blocks; i >= 0; i--) {
    a->block[i] = (struct block){NO_PAGE, NO_PAGE, 0, false};
    if (i < a->blocks) link_block(a, i);
  }
}

/* The block a coded page should go to. */
static int32_t block_for_coded(const struct arena *a) {
  if (a->block[a->blocks].used < arena_block_units(a, a->blocks)) return a->blocks;
  for (int32_t fill = a->run - 1; fill > 0; fill--)
    if (a->by_fill[fill] != NO_PAGE) return a->by_fill[fill];
  return a->by_fill[0];
}

int32_t arena_take_coded(struct arena *a) {
  int32_t block = block_for_coded(a), page = block * a->run;
  while (a->unit[page].refs != 0) page++;
  a->unit[page].refs = 1;
  set_fill(a, block, a->block[block].used + 1);
  a->coded_pages++;
  return page;
}

int32_t arena_take_exact(struct arena *a) {
  int32_t block = a->by_fill[0], page = block * a->run;
  a->unit[page].refs = 1;
  set_fill(a, block, a->run);
  a->block[block].exact = true;
  a->exact_pages++;
  return page;
}

void arena_retain(struct arena *a, int32_t page) { a->unit[page].refs++; }

void arena_release(struct arena *a, int32_t page) {
  if (--a->unit[page].refs > 0) return;
  arena_unlink_twins(a, page);
  int32_t block = page / a->run;
  if (a->block[block].exact) {
    a->block[block].exact = false;
    a->exact_pages--;
    set_fill(a, block, 0);
  } else {
    a->coded_pages--;
    set_fill(a, block, a->block[block].used - 1);
  }
}

void arena_link_twins(struct arena *a, int32_t exact, int32_t coded) {
  a->unit[exact].twin = coded;
  a->unit[coded].twin = exact;
}

void arena_unlink_twins(struct arena *a, int32_t page) {
  int32_t twin = a->unit[page].twin;
  if (twin == NO_PAGE) return;
  a->unit[twin].twin = NO_PAGE;
  a->unit[page].twin = NO_PAGE;
}

int32_t arena_evacuate_begin(struct arena *a, void (*copy)(void *user, int32_t from, int32_t to), void *user) {
  int32_t fill = 1;
  while (a->by_fill[fill] == NO_PAGE) fill++;
  int32_t block = a->by_fill[fill], first = block * a->run;
  unlink_block(a, block); /* so that nothing moves into it */
  for (int32_t from = first; from < first + a->run; from++) {
    if (a->unit[from].refs == 0) continue;
    int32_t to = arena_take_coded(a);
    copy(user, from, to);
    a->unit[to] = a->unit[from];
    if (a->unit[to].twin != NO_PAGE) a->unit[a->unit[to].twin].twin = to;
    a->unit[from] = (struct unit){.twin = to};
  }
  return block;
}

void arena_evacuate_end(struct arena *a, int32_t block) {
  struct block *b = &a->block[block];
  for (int32_t i = block * a->run; i < (block + 1) * a->run; i++) a->unit[i].twin = NO_PAGE;
  a->used_units -= b->used; /* taken twice while they moved */
  a->coded_pages -= b->used;
  b->used = 0;
  link_block(a, block);
}

static const char *list_violation(const struct arena *a, int32_t *where) {
  int32_t listed = 0, expected = 0;
  for (int32_t i = 0; i < a->blocks; i++) expected += a->block[i].used < a->run;
  for (int32_t fill = 0; fill < a->run; fill++) {
    int32_t before = NO_PAGE;
    for (int32_t i = a->by_fill[fill]; i != NO_PAGE; before = i, i = a->block[i].next) {
      *where = i;
      if (i < 0 || i >= a->blocks) return "a list leads to a block that does not exist";
      if (a->block[i].used != fill) return "a block is in the list of another fill";
      if (a->block[i].prev != before) return "a list of blocks has a broken back link";
      if (++listed > expected) return "a list of blocks has a cycle or holds a full block";
    }
  }
  *where = NO_PAGE;
  return listed == expected ? NULL : "a block with room is in no list";
}

const char *arena_violation(const struct arena *a, int32_t *where) {
  int64_t used = 0, exact = 0, coded = 0;
  for (int32_t i = 0; i <= a->blocks; i++) {
    const struct block *b = &a->block[i];
    int32_t first = i * a->run, units = arena_block_units(a, i), held = 0;
    *where = i;
    for (int32_t u = first; u < first + units; u++) {
      int32_t twin = a->unit[u].twin;
      if (a->unit[u].refs < 0) return "a reference count is negative";
      held += a->unit[u].refs > 0;
      if (twin == NO_PAGE) continue;
      if (a->unit[u].refs == 0) return "a free unit has a twin";
      if (twin < 0 || twin >= a->units || a->unit[twin].twin != u) return "a twin does not point back";
      if (b->exact == a->block[twin / a->run].exact) return "twins have the same form";
    }
    if (b->exact) {
      if (units != a->run || b->used != a->run || held != 1 || a->unit[first].refs == 0)
        return "an exact page does not fill its block";
      exact++;
    } else {
      if (b->used != held) return "a block counts other units than are held in it";
      coded += held;
    }
    used += b->used;
  }
  if (used != a->used_units || exact != a->exact_pages || coded != a->coded_pages) return "the counters of the arena are wrong";
  return list_violation(a, where);
}
