/*
 * attention/cuda/decode/page_ring.cuh - what a warp reads of an item, and the ring in shared memory that the copy engine fills
 * with it ahead of the warp. Private.
 *
 * A slot of the ring holds a coded page of a KV head, or the keys or the values of 16 exact tokens. They come in the order of
 * reading: coded pages, then exact tiles, keys then values; then the same of the next item.
 * Which warp reads what is settled beforehand: so sums have the same bits whenever they are made again.
 */
#ifndef OSCAR_ATTENTION_CUDA_DECODE_PAGE_RING_CUH
#define OSCAR_ATTENTION_CUDA_DECODE_PAGE_RING_CUH

#include "attention/cuda/decode/arguments.cuh"

namespace decode {

constexpr int STAGES = 2; /* of a ring */

struct ring {
  uint8_t *slots; /* [STAGES][slot_bytes] */
  uint64_t *barriers;
  uint8_t *angles; /* [ANGLES_KEPT], where pairs turn: of coded pages in turn, (cos, sin) of the head's pairs */
  int issue_slot, take_slot;
  int content, following; /* of the slots that are filled, in the order of reading: content_of; EMPTY where there is none */
  uint32_t parity;        /* of the barrier at take_slot */
  unsigned coded_before;  /* pages that were read, of items before */
};
constexpr int ANGLES_KEPT = 4;
__host__ __device__ inline int angles_bytes(const arguments &a) { return ANGLES_KEPT * a.angle_bytes; }
__device__ __forceinline__ int place_of_angles(unsigned coded_page) { return (int)(coded_page % ANGLES_KEPT); }
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

/* What a warp reads of an item: `coded` pages, then `exact` tiles of 16 tokens. Lists begin at places of the plan's. */
struct reading {
  int item, head;                    /* item: its number in the block */
  int coded_list, coded;             /* the warp's own */
  int exact_list, exact_from, exact; /* the item's list, tiles of it */
};

/* Where a coded page is, and its number in the sequence. */
struct page_place {
  const uint8_t *memory;
  int number;
};

/* What a warp asks for. Coded pages are looked up 32 at a time, and that well before they are needed: lane i has page i of 32,
 * here and ahead. */
struct asking {
  reading of;
  unsigned next;         /* coded page */
  unsigned coded_before; /* of items before */
  int next_side;         /* of exact tiles: keys, then values of each */
  int exact_unit;        /* of the page of that tile */
  int angle_at;          /* of the head's pair number lane, among those of a page: bytes */
  struct page_place here;
  struct decode_page ahead;
};

/* Of 32 pages from `page` on. */
__device__ __forceinline__ void look_ahead(const arguments &a, asking &asked, int page, int lane) {
  if (page + lane < asked.of.coded) asked.ahead = a.pages[asked.of.coded_list + page + lane];
}
__device__ __forceinline__ struct page_place place_of(const arguments &a, const asking &asked, const struct decode_page &page) {
  return {a.memory + (size_t)page.unit * a.unit_bytes + (size_t)asked.of.head * a.head_bytes, page.number};
}
/* The page that has an exact tile of the item. */
__device__ __forceinline__ const struct decode_page *exact_page(const arguments &a, const reading &r, int tile) {
  return a.pages + r.exact_list + tile * EXACT_TOKENS / 64;
}
__device__ inline const uint8_t *exact_tile(const arguments &a, const asking &asked, int tile, int side) {
  return a.memory + (size_t)asked.exact_unit * a.unit_bytes +
         ((size_t)(asked.of.head * 2 + side) * 64 + (size_t)(tile * EXACT_TOKENS % 64)) * (size_t)a.head_dim * 2;
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
/* Where the angle of the head's pair `i` is among those of a page: in bytes. */
__device__ __forceinline__ int place_of_angle(const arguments &a, int head, int i) {
  return __ldg(a.pairs + head * a.turning_pairs + i) * (int)sizeof(float2);
}
__device__ __forceinline__ void ask_for_angles(const arguments &a, const ring &ring, const asking &asked, int number, int place,
                                               int lane) {
  uint8_t *to = angles_at(a, ring, place) + lane * sizeof(float2);
  const uint8_t *from = (const uint8_t *)a.rope.turns + (size_t)number * (a.rope.pairs * sizeof(float2));
  if (lane < a.turning_pairs) copy_eight_beside(to, from + asked.angle_at);
  for (int i = lane + 32; i < a.turning_pairs; i += 32)
    copy_eight_beside(to += 32 * sizeof(float2), from + place_of_angle(a, asked.of.head, i));
}
__device__ __forceinline__ void ask_for(const arguments &a, const ring &ring, asking &asked, const reading &of, int lane) {
  asked.coded_before += asked.of.coded;
  asked.of = of;
  asked.next = 0, asked.next_side = 0;
  if (of.exact > 0) asked.exact_unit = exact_page(a, of, of.exact_from)->unit;
  if (of.coded == 0) return;
  look_ahead(a, asked, 0, lane);
  asked.here = place_of(a, asked, asked.ahead);
  look_ahead(a, asked, 32, lane);
  if (!a.angle_bytes) return;
  if (lane < a.turning_pairs) asked.angle_at = place_of_angle(a, of.head, lane);
  ask_for_angles(a, ring, asked, __shfl_sync(~0u, asked.here.number, 0), place_of_angles(asked.coded_before), lane);
}

/* The page that `of_lane` has in `here`. */
__device__ __forceinline__ void ask_for_page(const arguments &a, ring &ring, const asking &asked, int of_lane, int lane) {
  copy_of_lane(ring.slots + ring.issue_slot * a.slot_bytes, asked.here.memory, a.page_bytes, ring.barriers + ring.issue_slot,
               of_lane, lane);
  add_slot(a, ring, content_of(asked.of.item, NO_TILE));
}
/* The next coded page, if there is one. */
__device__ __forceinline__ bool ask_for_coded(const arguments &a, ring &ring, asking &asked, int lane) {
  if (asked.next >= (unsigned)asked.of.coded) return false;
  const int of = (int)(asked.next % 32);
  if (of == 0 && asked.next > 0) {
    asked.here = place_of(a, asked, asked.ahead);
    look_ahead(a, asked, (int)asked.next + 32, lane);
  }
  asked.next++;
  if (a.angle_bytes && asked.next < (unsigned)asked.of.coded) /* angles come a page ahead */
    ask_for_angles(a, ring, asked, __shfl_sync(~0u, of == 31 ? asked.ahead.number : asked.here.number, (of + 1) % 32),
                   place_of_angles(asked.coded_before + asked.next), lane);
  ask_for_page(a, ring, asked, of, lane);
  return true;
}
/* The next side of an exact tile, if there is one. */
__device__ __forceinline__ bool ask_for_exact(const arguments &a, ring &ring, asking &asked, int lane) {
  if (asked.next_side == 2 * asked.of.exact) return false;
  const int tile = asked.of.exact_from + asked.next_side / 2;
  copy_of_lane(ring.slots + ring.issue_slot * a.slot_bytes, exact_tile(a, asked, tile, asked.next_side % 2),
               EXACT_TOKENS * a.head_dim * 2, ring.barriers + ring.issue_slot, 0, lane);
  add_slot(a, ring, content_of(asked.of.item, tile));
  asked.next_side++;
  if (asked.next_side % 2 == 0 && asked.next_side < 2 * asked.of.exact) /* of the next tile, before it is needed */
    asked.exact_unit = exact_page(a, asked.of, tile + 1)->unit;
  return true;
}

/* Fills the free slots with what is left to be asked for; after an item, of `after`. By a whole warp. */
__device__ __forceinline__ void fill_ring(const arguments &a, ring &ring, asking &asked, const reading &after, int lane) {
#pragma unroll 1
  while (ring.following == EMPTY) {
    if (ask_for_coded(a, ring, asked, lane)) continue;
    if (ask_for_exact(a, ring, asked, lane)) continue;
    if (asked.of.item == after.item) return;
    ask_for(a, ring, asked, after, lane);
  }
}

__device__ __forceinline__ const uint8_t *wait_for_slot(const arguments &a, const ring &ring) {
  if (PAGES_IN_GROUPS && ring.following == EMPTY) copies_begun();
  copy_wait<STAGES - 1>(ring.barriers + ring.take_slot, ring.parity);
  return ring.slots + ring.take_slot * a.slot_bytes;
}

/* Angles of the page that was waited for, and of the next of the item. */
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
