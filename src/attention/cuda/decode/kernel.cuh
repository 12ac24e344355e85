/*
 * attention/cuda/decode/kernel.cuh - the kernel behind decode_run; heads_128.cu and its like compile it for what layers have.
 * Private.
 *
 * A block takes a stretch of the line of work, item after item (an item is a KV head of a tile), and its warps equal parts of
 * that: first coded pages, then tiles of exact pages. Scores, probabilities and sums never leave the registers of a warp. Each
 * warp has a ring of pages that the copy engine fills ahead of it, from one item into the next; warps of a block share what
 * belongs to the query, and put their sums together when the block leaves an item (item_sums.cuh), the only time when they wait
 * for each other.
 */
#ifndef OSCAR_ATTENTION_CUDA_DECODE_KERNEL_CUH
#define OSCAR_ATTENTION_CUDA_DECODE_KERNEL_CUH

#include "attention/cuda/decode/coded_page.cuh"
#include "attention/cuda/decode/exact_page.cuh"

namespace decode {

/* ---- items ---- */

template <class T> __device__ __forceinline__ bool is_coded(const item_work &work) { return T::CODED && work.coded; }
__device__ inline const uint32_t *map_of(const arguments &a, int head) {
  return a.value_map + (size_t)head * value_map_words(a.head_dim, a.forms.value_crumbs);
}
/* What becomes of the item. */
__device__ inline item_output output_of(const arguments &a, const item_work &work, const uint8_t *map_here) {
  const int part = work.item.tile * a.kv_heads + work.item.head + blockIdx.x;
  return {work.tile,
          a.kv_heads,
          a.group,
          work.item.head,
          a.out,
          (const uint4 *)(a.map_is_here ? map_here : (const uint8_t *)map_of(a, work.item.head)),
          work.coded ? value_map_steps(a.forms.value_crumbs) : 0,
          work.first < work.last,
          a.parts + part * part_floats(a.head_dim)};
}
/* The item's last block on the line puts its parts together. */
__device__ inline item_parts parts_of(const arguments &a, const item_work &work) {
  const int count = work.first < work.last && work.last == (int)blockIdx.x ? work.last - work.first + 1 : 0;
  const struct decode_tile &tile = work.tile;
  return {tile.rows, tile.token, tile.first_row, work.item.head, work.item.tile * a.kv_heads + work.item.head + work.first,
          count};
}

/* Copies for items of the block, and which turn each barrier is at: a bit of `parities`. */
struct block_copies {
  uint8_t *memory;
  uint64_t *barriers;
  uint32_t parities;
};
__device__ __forceinline__ void wait_for_copy(block_copies &c, int copy) {
  end_block_copy(c.barriers + copy, c.parities >> copy & 1);
  c.parities ^= 1u << copy;
}
template <class T>
__device__ __forceinline__ void begin_queries(const arguments &a, const line_item &item, const shared_layout &layout, int place,
                                              const block_copies &c) {
  const int index = item.tile * a.kv_heads + item.head, bytes = prepared_of(a, T::NT).bytes;
  begin_block_copy(c.memory + layout.prepared + place * layout.next_prepared, a.prepared + (size_t)index * bytes, bytes,
                   c.barriers + QUERIES + place);
}
__device__ __forceinline__ void begin_curves(const arguments &a, int head, const shared_layout &layout, int place,
                                             const block_copies &c) {
  if (a.turns == BY_PAIRS)
    begin_block_copy(c.memory + layout.curves + place * layout.next_curves, a.curves + (size_t)head * curve_bytes(a),
                     curve_bytes(a), c.barriers + CURVES + place);
}
/* Of the first item it comes when its queries have, since sooner it would slow down what the kernel before still does; but not
 * where a stretch of so few units would soon wait for it. */
constexpr int FEW_UNITS = 32;
__device__ __forceinline__ void begin_map(const arguments &a, int head, const shared_layout &layout, const block_copies &c) {
  if (a.map_is_here) begin_block_copy(c.memory + layout.map, map_of(a, head), map_bytes(a), c.barriers + MAP);
}

template <class T> __global__ void __launch_bounds__(T::WARPS * 32, 1) kernel(const __grid_constant__ arguments given) {
  const arguments a = known_arguments<T>(given);
  constexpr int WARPS = T::WARPS, NT = T::NT;
  extern __shared__ __align__(128) uint8_t memory[];
  start_kernel_after();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  /* asked for together, with what of the tile lies elsewhere */
  const int probe = probe_of(a, 0, a.tile_count, lane), early = load_now(&a.tiles[min(lane, a.tile_count - 1)].token);
  const struct decode_line line = *a.line;
  const shared_layout layout = shared_layout_of(a, T::WARPS, NT);
  uint64_t *barriers = (uint64_t *)(memory + layout.barriers);
  ring ring = {memory + warp * STAGES * a.slot_bytes,
               barriers + warp * STAGES,
               memory + layout.angles + warp * angles_bytes(a),
               0,
               0,
               EMPTY,
               EMPTY,
               0,
               0};
  block_copies copies = {memory, barriers + WARPS * STAGES, 0};
  if (lane == 0) /* of the warp that begins copies */
#pragma unroll
    for (int i = 0; i < STAGES; i++) copies_init(ring.barriers + i);
  if (threadIdx.x == 0)
    for (int i = 0; i < BLOCK_COPIES; i++) copies_init(copies.barriers + i);
  copies_visible();
  __syncwarp();
  int unit = begin_on_line(&line, blockIdx.x);
  const int end = min(begin_on_line(&line, blockIdx.x + 1), line.units);
  if (unit >= end) return; /* before a copy begins that nobody would wait for */
  line_item item = item_of(a, unit, probe, lane);
  keep(early);
  const struct decode_tile tile = tile_of(a, line, item);
  if (unit - item.begin >= tile.reading) { /* all of the item is others' */
    item = item_after(a, item, tile.units);
    unit = item.begin;
    if (unit >= end) return;
  }
  warp_work *works = (warp_work *)(memory + layout.works) + warp;
  find_work<WARPS>(a, line, item, unit, end, 0, warp, works);
  asking asked = {};
  ask_for(a, ring, asked, works->readings[0], lane);
  /* The kernel before may write exact pages and queries, but nothing that is asked for here. More than a page each would come at
   * the cost of what that kernel still reads. */
  ask_for_coded(a, ring, asked, lane);
  if (a.turns == BY_WAVES) begin_block_copy(memory + layout.curves, a.rope.curve_words, curve_bytes(a), copies.barriers + CURVES);
  const bool few_pages = works->items[0].stop - unit < FEW_UNITS;
  if (is_coded<T>(works->items[0])) {
    begin_curves(a, item.head, layout, 0, copies);
    if (few_pages) begin_map(a, item.head, layout, copies);
  }
  find_blocks(line, works->items[0]);
  if constexpr (T::CODED) {
    store_constant_gains(memory + layout.constant_gains);
    if (T::WIDE)
      make_half_gains((uint32_t *)(memory + layout.log_gains));
    else if (threadIdx.x < 16)
      ((float *)(memory + layout.log_gains))[threadIdx.x] = exp2f(((int)threadIdx.x - 8) * 0.25f);
  }
  __syncthreads(); /* barriers of the block are there */
  /* A second page is asked for when the first is there; but the warp that asks for queries does not wait for that. */
  if (!PAGES_IN_GROUPS && warp > 0 && asked.next > 0) {
    wait_for_slot(a, ring);
    ask_for_coded(a, ring, asked, lane);
  }
  wait_for_kernel_before(); /* also for the end of its use of work space */
  if (is_coded<T>(works->items[0])) begin_queries<T>(a, item, layout, 0, copies);
  if (a.turns == BY_WAVES) wait_for_copy(copies, CURVES);
  for (int number = 0;; number++) {
    const item_work &work = works->items[number % 2];
    const reading &mine = works->readings[number % 2];
    const int place = a.copies_ahead ? number % 2 : 0;
    fill_ring(a, ring, asked, mine, lane);
    near_queries<T> near;
    near.load(a, work.tile, mine, lane);
    const bool more = work.stop < end;
    if (more) {
      const struct decode_line line = *a.line; /* again: to keep it takes registers */
      const line_item next = item_after(a, work.item, work.tile.units);
      find_work<WARPS>(a, line, next, next.begin, end, number + 1, warp, works);
      find_blocks(line, works->items[(number + 1) % 2]);
      const item_work &after = works->items[(number + 1) % 2];
      if (a.copies_ahead && after.coded) {
        begin_queries<T>(a, next, layout, place ^ 1, copies);
        begin_curves(a, next.head, layout, place ^ 1, copies);
      }
    }
    /* the ring of 16 rows has their sums between items */
    const reading &after = works->readings[(more && !T::WIDE ? number + 1 : number) % 2];
    const warp_sums sums = sums_of_warp<NT>(a.forms.value_crumbs, memory, layout.sums, warp);
    const bool coded = is_coded<T>(work);
    if (!coded) store_no_states<NT>(sums.code_states, lane);
    if constexpr (T::CODED)
      if (coded) {
        wait_for_copy(copies, QUERIES + place);
        if (a.turns == BY_PAIRS) wait_for_copy(copies, CURVES + place);
        if (number == 0 && !few_pages) begin_map(a, work.item.head, layout, copies);
        read_coded<T>(a, work.tile, mine, asked, after, memory, layout, place, ring);
      }
    near.are_kept();
    read_exact<T>(a, work.tile, mine, asked, after, ring, sums);
    if (coded && a.map_is_here) wait_for_copy(copies, MAP);
    finish_item<T>(output_of(a, work, memory + layout.map), a.forms, memory, layout.sums, memory + layout.block);
    if (number == 0) works->parts = parts_of(a, work); /* what begins in a block and is others' too ends in another */
    if (!more) break;
    hand_to_copies(); /* what comes is copied over what has been read here */
    __syncthreads();
    const item_work &coming = works->items[(number + 1) % 2];
    if (!is_coded<T>(coming)) continue;
    begin_map(a, coming.item.head, layout, copies);
    if (a.copies_ahead) continue;
    begin_queries<T>(a, coming.item, layout, 0, copies);
    begin_curves(a, coming.item.head, layout, 0, copies);
  }
  /* Parts of the first item are put together when nothing else is left to be read. Those before this block's are of blocks that
   * began before it. */
  __syncwarp();
  if (works->parts.count > 0) merge_parts<T::D, WARPS>(a, works->parts, memory + merge_place(layout.sums, NT));
}

} // namespace decode

#endif
