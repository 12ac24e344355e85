/*
 * attention/cuda/page_ring.cuh - what a warp reads of an item, and the ring in shared memory that the copy engine fills with it
 * ahead of the warp. Private.
 *
 * A slot of the ring holds a coded page of a KV head, with angles behind it where pairs turn, or the keys or the values of 16 exact tokens. They come in the order of
 * reading: coded pages, then exact tiles, keys then values; then the same of the next item.
 */
#ifndef OSCAR_ATTENTION_CUDA_PAGE_RING_CUH
#define OSCAR_ATTENTION_CUDA_PAGE_RING_CUH

#include "attention/cuda/coded_page.cuh"

namespace decode {

struct ring {
  uint8_t *slots; /* [stages][slot_bytes] */
  uint64_t *barriers;
  int issue_slot, take_slot, filled;
  uint32_t parity; /* of the barrier at take_slot */
};

/* What a warp reads of an item: `coded` pages, then `exact` tiles of 16 tokens. Lists begin at places of the plan's. */
struct reading {
  int item, head;                    /* item: its number in the block */
  int coded_list, coded;             /* the warp's own */
  int exact_list, exact_from, exact; /* the item's list, tiles of it */
};

/* What a warp asks for: of coded + 2 exact slots of `of`, `next` is the first that is not yet asked for. Coded pages are looked up
 * 32 at a time, and that well before they are needed: lane i has page i of 32, here and ahead. */
struct asking {
  reading of;
  int next;
  struct decode_page here, ahead;
};

__device__ inline void look_up(const arguments &a, asking &asked, int page) {
  if (page < asked.of.coded) asked.ahead = a.pages[asked.of.coded_list + page];
}
__device__ inline void ask_for(const arguments &a, asking &asked, const reading &of, int lane) {
  asked.of = of;
  asked.next = 0;
  look_up(a, asked, lane);
  asked.here = asked.ahead;
  look_up(a, asked, 32 + lane);
}

__device__ inline const uint8_t *exact_tile(const arguments &a, const reading &r, int tile, int side) {
  const int unit = a.pages[r.exact_list + tile * EXACT_TOKENS / 64].unit;
  return a.memory + (size_t)unit * a.unit_bytes +
         ((size_t)(r.head * 2 + side) * 64 + (size_t)(tile * EXACT_TOKENS % 64)) * (size_t)a.head_dim * 2;
}

template <int STAGES> __device__ __forceinline__ void asked_one(ring &ring, asking &asked) {
  ring.issue_slot = ring.issue_slot + 1 == STAGES ? 0 : ring.issue_slot + 1;
  ring.filled++, asked.next++;
}

/* The next coded page of `asked`, which has one, into a free slot; after it, where pairs turn, their angles on that page. */
template <int STAGES>
__device__ __forceinline__ void ask_for_page(const arguments &a, ring &ring, asking &asked, int lane) {
  const int of = asked.next % 32;
  if (of == 0 && asked.next > 0) {
    asked.here = asked.ahead;
    look_up(a, asked, asked.next + 32 + lane);
  }
  const uint8_t *from = a.memory + (size_t)asked.here.unit * a.unit_bytes + (size_t)asked.of.head * a.head_bytes;
  const uint8_t *angles = (const uint8_t *)a.rope.turns + (size_t)asked.here.number * a.angle_bytes;
  copy_two(ring.slots + ring.issue_slot * a.slot_bytes, from, a.page_bytes, angles, a.angle_bytes, ring.barriers + ring.issue_slot,
           of, lane);
  asked_one<STAGES>(ring, asked);
}

/* Fills the free slots with what is left to be asked for; after an item, of `after`. By a whole warp. exact: whether exact pages
 * may be read already. */
template <int STAGES>
__device__ __forceinline__ void fill_ring(const arguments &a, ring &ring, asking &asked, const reading &after, bool exact,
                                          int lane) {
#pragma unroll 1
  while (ring.filled < STAGES) {
    const int slot = asked.next - asked.of.coded;
    if (slot == 2 * asked.of.exact) {
      if (asked.of.item == after.item) return;
      ask_for(a, asked, after, lane);
    } else if (slot < 0) {
      ask_for_page<STAGES>(a, ring, asked, lane);
    } else {
      if (!exact) return;
      copy_page(ring.slots + ring.issue_slot * a.slot_bytes, exact_tile(a, asked.of, asked.of.exact_from + slot / 2, slot % 2),
                EXACT_TOKENS * a.head_dim * 2, ring.barriers + ring.issue_slot, lane);
      asked_one<STAGES>(ring, asked);
    }
  }
}
/* The same where one slot is free, and most often a coded page is next. */
template <int STAGES>
__device__ __forceinline__ void fill_slot(const arguments &a, ring &ring, asking &asked, const reading &after, int lane) {
  if (asked.next < asked.of.coded)
    ask_for_page<STAGES>(a, ring, asked, lane);
  else
    fill_ring<STAGES>(a, ring, asked, after, true, lane);
}

template <int STAGES> __device__ __forceinline__ const uint8_t *wait_for_slot(const arguments &a, const ring &ring) {
  for (int i = ring.filled; i < STAGES; i++) copy_none();
  copy_wait<STAGES - 1>(ring.barriers + ring.take_slot, ring.parity);
  return ring.slots + ring.take_slot * a.slot_bytes;
}

/* What was waited for is not needed any more. By a whole warp. */
template <int STAGES> __device__ __forceinline__ void leave_slot(ring &ring) {
  __syncwarp();
  ring.filled--;
  if (++ring.take_slot == STAGES) ring.take_slot = 0, ring.parity ^= 1;
}

} // namespace decode

#endif
