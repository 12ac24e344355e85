/*
 * attention/cuda/page_ring.cuh - what a warp reads of an item, and the ring in shared memory that the copy engine fills with it
 * ahead of the warp. Private.
 *
 * A slot of the ring holds a coded page of a KV head, or the keys or the values of 16 exact tokens. They come in the order of
 * reading: coded pages, then exact tiles, keys then values; then the same of the next item.
 *
 * Warps of a block advance at different speeds, and wait for each other at the end of an item. So a warp has only most of its
 * coded pages for its own. The block's last ones and its exact tiles are a queue, from which warps take when they have a free
 * slot.
 */
#ifndef OSCAR_ATTENTION_CUDA_PAGE_RING_CUH
#define OSCAR_ATTENTION_CUDA_PAGE_RING_CUH

#include "attention/cuda/coded_page.cuh"

namespace decode {

constexpr int STAGES = 2;        /* of a ring */
constexpr int QUEUED_PAGES = 16; /* coded pages of a block's stretch of an item that are in the queue, at most; at most 32 */

struct ring {
  uint8_t *slots; /* [STAGES][slot_bytes] */
  uint64_t *barriers;
  uint8_t *angles; /* of pages, where pairs turn: [OWN_ANGLES], of the warp's own pages in turn, then [STAGES] of queued ones */
  int *queues;     /* [2], of items in turn: what was taken of them */
  int issue_slot, take_slot;
  int content, following; /* of the slots that are filled, in the order of reading: content_of; EMPTY where there is none */
  uint32_t parity;        /* of the barrier at take_slot */
  unsigned own_before;    /* pages of the warp's own that were read, of items before */
};
constexpr int OWN_ANGLES = 4;
__host__ __device__ inline int angles_bytes(const arguments &a) { return (OWN_ANGLES + STAGES) * a.angle_bytes; }
__device__ __forceinline__ int place_of_angles(unsigned own_page) { return (int)(own_page % OWN_ANGLES); }
constexpr int EMPTY = -1;
/* tile: from the first of the item on; NO_TILE: a coded page. item: its number in the block. */
constexpr int NO_TILE = -1;
__device__ __forceinline__ int content_of(int item, int tile) { return 2 * (tile + 1) + (item & 1); }
/* Whether a coded page of the item is next. */
__device__ __forceinline__ bool page_is_next(const ring &ring, int item) { return ring.content == content_of(item, NO_TILE); }
/* The exact tile of the item that is next, or NO_TILE. */
__device__ __forceinline__ int next_tile(const ring &ring, int item) {
  return ring.content != EMPTY && (ring.content & 1) == (item & 1) ? (ring.content >> 1) - 1 : NO_TILE;
}

/* What a warp reads of an item. Lists begin at places of the plan's. */
struct reading {
  int item, head;                    /* item: its number in the block */
  int coded_list, coded;             /* pages that are the warp's own */
  int queue_list, queued;            /* the block's: coded pages in the queue */
  int exact_list, exact_from, exact; /* and tiles, after them: of the item's list, from which on, how many */
};

/* Where a coded page is, and its number in the sequence. */
struct page_place {
  const uint8_t *memory;
  int number;
};

/* What a warp asks for. Coded pages are looked up 32 at a time, and that well before they are needed: lane i has page i of 32,
 * here and ahead, which are the queue's where `here` has the last of the warp's own. */
struct asking {
  reading of;
  unsigned next;           /* of the warp's own pages */
  unsigned own_before;     /* own pages of items before */
  int values;              /* the tile whose keys were asked for last; NO_TILE: its values were too */
  bool in_queue, has_done; /* in_queue: here are the queue's */
  struct page_place here;
  struct decode_page ahead;
};

/* Of 32 pages from `page` of the warp's own on, or of the queue's, if there are none. */
__device__ __forceinline__ void look_ahead(const arguments &a, asking &asked, int page, int lane) {
  const bool own = page < asked.of.coded;
  const int at = own ? page + lane : lane, count = own ? asked.of.coded : asked.of.queued;
  if (at < count) asked.ahead = a.pages[(own ? asked.of.coded_list : asked.of.queue_list) + at];
}
__device__ __forceinline__ struct page_place place_of(const arguments &a, const asking &asked, const struct decode_page &page) {
  return {a.memory + (size_t)page.unit * a.unit_bytes + (size_t)asked.of.head * a.head_bytes, page.number};
}
__device__ inline const uint8_t *exact_tile(const arguments &a, const reading &r, int tile, int side) {
  const int unit = a.pages[r.exact_list + tile * EXACT_TOKENS / 64].unit;
  return a.memory + (size_t)unit * a.unit_bytes +
         ((size_t)(r.head * 2 + side) * 64 + (size_t)(tile * EXACT_TOKENS % 64)) * (size_t)a.head_dim * 2;
}

/* After copies were begun into a free slot. */
__device__ __forceinline__ void add_slot(const arguments &a, ring &ring, int content) {
  if (a.angle_bytes || PAGES_IN_GROUPS) copies_begun();
  ring.issue_slot ^= 1;
  if (ring.content == EMPTY)
    ring.content = content;
  else
    ring.following = content;
}
__device__ __forceinline__ uint8_t *angles_at(const arguments &a, const ring &ring, int place) {
  return ring.angles + place * a.angle_bytes;
}
__device__ __forceinline__ void ask_for_angles(const arguments &a, const ring &ring, int number, int place, int lane) {
  copy_beside(angles_at(a, ring, place), (const uint8_t *)a.rope.turns + (size_t)number * a.angle_bytes, a.angle_bytes, lane);
}
__device__ __forceinline__ void ask_for(const arguments &a, const ring &ring, asking &asked, const reading &of, int lane) {
  asked.own_before += asked.of.coded;
  asked.of = of;
  asked.next = 0, asked.values = NO_TILE, asked.in_queue = asked.has_done = false;
  look_ahead(a, asked, 0, lane);
  if (of.coded == 0) return;
  asked.here = place_of(a, asked, asked.ahead);
  look_ahead(a, asked, 32, lane);
  if (a.angle_bytes) ask_for_angles(a, ring, __shfl_sync(~0u, asked.here.number, 0), place_of_angles(asked.own_before), lane);
}

/* The page that `of_lane` has in `here`. */
__device__ __forceinline__ void ask_for_page(const arguments &a, ring &ring, const asking &asked, int of_lane, int lane) {
  copy_of_lane(ring.slots + ring.issue_slot * a.slot_bytes, asked.here.memory, a.page_bytes, ring.barriers + ring.issue_slot,
               of_lane, lane);
  add_slot(a, ring, content_of(asked.of.item, NO_TILE));
}
/* The next of the warp's own pages, if there is one. */
__device__ __forceinline__ bool ask_for_own_page(const arguments &a, ring &ring, asking &asked, int lane) {
  if (asked.next >= (unsigned)asked.of.coded) return false;
  const int of = (int)(asked.next % 32);
  if (of == 0 && asked.next > 0) {
    asked.here = place_of(a, asked, asked.ahead);
    look_ahead(a, asked, (int)asked.next + 32, lane);
  }
  asked.next++;
  if (a.angle_bytes && asked.next < (unsigned)asked.of.coded) /* angles come a page ahead */
    ask_for_angles(a, ring, __shfl_sync(~0u, of == 31 ? asked.ahead.number : asked.here.number, (of + 1) % 32),
                   place_of_angles(asked.own_before + asked.next), lane);
  ask_for_page(a, ring, asked, of, lane);
  return true;
}
__device__ __forceinline__ void ask_for_side(const arguments &a, ring &ring, const asking &asked, int tile, int side, int lane) {
  uint64_t *barrier = ring.barriers + ring.issue_slot;
  copy_of_lane(ring.slots + ring.issue_slot * a.slot_bytes, exact_tile(a, asked.of, tile, side), EXACT_TOKENS * a.head_dim * 2,
               barrier, 0, lane);
  add_slot(a, ring, content_of(asked.of.item, tile));
}
/* What is next in the queue, or begun of it; false: nothing. */
__device__ __forceinline__ bool ask_for_queued(const arguments &a, ring &ring, asking &asked, int lane) {
  if (asked.values != NO_TILE) {
    ask_for_side(a, ring, asked, asked.values, 1, lane);
    asked.values = NO_TILE;
    return true;
  }
  if (asked.has_done) return false;
  if (!asked.in_queue) {
    asked.in_queue = true;
    asked.here = place_of(a, asked, asked.ahead);
  }
  int place = 0;
  if (lane == 0) place = atomicAdd(ring.queues + (asked.of.item & 1), 1);
  place = __shfl_sync(~0u, place, 0);
  if (place < asked.of.queued) {
    if (a.angle_bytes) ask_for_angles(a, ring, __shfl_sync(~0u, asked.here.number, place), OWN_ANGLES + ring.issue_slot, lane);
    ask_for_page(a, ring, asked, place, lane);
    return true;
  }
  const int tile = place - asked.of.queued;
  if (tile >= asked.of.exact) {
    asked.has_done = true;
    return false;
  }
  asked.values = asked.of.exact_from + tile;
  ask_for_side(a, ring, asked, asked.values, 0, lane);
  return true;
}

/* Fills the free slots with what is left to be asked for; after an item, of `after`. By a whole warp. queued: whether the queue
 * may be asked already. */
__device__ __forceinline__ void fill_ring(const arguments &a, ring &ring, asking &asked, const reading &after, bool queued,
                                          int lane) {
#pragma unroll 1
  while (ring.following == EMPTY) {
    if (ask_for_own_page(a, ring, asked, lane)) continue;
    if (!queued) return;
    if (ask_for_queued(a, ring, asked, lane)) continue;
    if (asked.of.item == after.item) return;
    ask_for(a, ring, asked, after, lane);
  }
}
/* The same where one slot is free, and most often a page of the warp's own is next. */
__device__ __forceinline__ void fill_slot(const arguments &a, ring &ring, asking &asked, const reading &after, int lane) {
  if (!ask_for_own_page(a, ring, asked, lane)) fill_ring(a, ring, asked, after, true, lane);
}

__device__ __forceinline__ const uint8_t *wait_for_slot(const arguments &a, const ring &ring) {
  if (PAGES_IN_GROUPS && ring.following == EMPTY) copies_begun();
  copy_wait<STAGES - 1>(ring.barriers + ring.take_slot, ring.parity);
  return ring.slots + ring.take_slot * a.slot_bytes;
}

/* Angles of the page that was waited for, and where it and the next are the warp's own, those of the next. */
__device__ __forceinline__ void wait_for_angles(const ring &ring) {
  if (ring.following == EMPTY)
    groups_wait<0>();
  else
    groups_wait<1>();
}
/* What was waited for is not needed any more. By a whole warp. */
__device__ __forceinline__ void leave_slot(ring &ring) {
  __syncwarp();
  ring.content = ring.following, ring.following = EMPTY;
  ring.take_slot ^= 1;
  if (ring.take_slot == 0) ring.parity ^= 1;
}

} // namespace decode

#endif
