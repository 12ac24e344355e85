/*
 * attention/cuda/decode/block_work.cuh - what of the line (line.h) a block has, item after item, and each of its warps. Private.
 */
#ifndef OSCAR_ATTENTION_CUDA_DECODE_BLOCK_WORK_CUH
#define OSCAR_ATTENTION_CUDA_DECODE_BLOCK_WORK_CUH

#include "attention/cuda/decode/item_sums.cuh"
#include "attention/cuda/decode/line.h"
#include "attention/cuda/decode/page_ring.cuh"

namespace decode {

/* The item that has a unit of the line. */
struct line_item {
  int tile, head, begin; /* begin: its first unit */
};
/* What a block has of an item. */
struct item_work {
  struct decode_tile tile;
  line_item item;
  int stop;        /* the unit of the line after it */
  bool coded;      /* whether it has coded pages */
  int first, last; /* of the blocks that have something of it */
};
/* Of this item and the next, in turn: and what the warp reads of them. */
struct warp_work {
  item_work items[2];
  reading readings[2];
  item_parts parts; /* to be put together */
};

/* Where a lane looks among `count` tiles from `low` on: the first unit of one of 32. */
__device__ inline int probe_of(const arguments &a, int low, int count, int lane) {
  return a.tiles[low + min(lane * ((count + 31) / 32), count - 1)].begin;
}
/* By a whole warp. probe: of all tiles. */
__device__ inline line_item item_of(const arguments &a, int unit, int probe, int lane) {
  int low = 0, count = a.tile_count;
  while (count > 1) {
    const int step = (count + 31) / 32;
    const int before = __popc(__ballot_sync(~0u, lane * step < count && probe <= unit)) - 1;
    low += before * step;
    count = min(step, count - before * step);
    probe = probe_of(a, low, count, lane);
  }
  const int begin = a.tiles[low].begin, units = a.tiles[low].units, head = min((unit - begin) / units, a.kv_heads - 1);
  return {low, head, begin + head * units};
}

/* The tile of an item, as it is for that. */
__device__ inline struct decode_tile tile_of(const arguments &a, const struct decode_line &line, const line_item &item) {
  struct decode_tile tile = a.tiles[item.tile];
  if (item.tile == a.tile_count - 1 && item.head == a.kv_heads - 1) {
    tile.units = line.units - item.begin;
    tile.reading = line.last_reading;
    tile.work_share = line.last_share;
    tile.late = line.last_late;
  }
  return tile;
}

/* The item after one of so many units. */
__device__ inline line_item item_after(const arguments &a, const line_item &item, int units) {
  const bool same = item.head + 1 < a.kv_heads;
  return {same ? item.tile : item.tile + 1, same ? item.head + 1 : 0, item.begin + units};
}

/* `number`: of the item in the block; `unit` to `end` - 1 of the line are the block's. Its warps have equal stretches of that. */
template <int WARPS>
__device__ inline void find_work(const arguments &a, const struct decode_line &line, const line_item &item, int unit, int end,
                                 int number, int warp, warp_work *works) {
  item_work w;
  w.tile = tile_of(a, line, item);
  w.item = item;
  w.stop = min(end, item.begin + w.tile.units);
  const int first = unit - item.begin, units = min(w.stop - item.begin, w.tile.reading) - first;
  /* Lanes 0 to 3 look where the warp's and the block's stretches begin and end. */
  const int lane = threadIdx.x % 32, cut = lane < 2 ? warp + lane : lane == 2 ? 0 : WARPS;
  const struct line_place place = line_place_of(&w.tile, line.late_share, first + begin_of_block(cut, units, WARPS));
  const auto coded_at = [&](int of) { return __shfl_sync(~0u, place.coded, of); };
  const auto exact_at = [&](int of) { return __shfl_sync(~0u, place.exact, of); };
  struct line_place from = {coded_at(0), exact_at(0)}, to = {coded_at(1), exact_at(1)};
  const struct line_place begin = {coded_at(2), exact_at(2)};
  const int coded = coded_at(3) - begin.coded, exact = exact_at(3) - begin.exact, all = coded + EXACT_WEIGHT * exact;
  w.coded = w.tile.coded_pages > 0;
  if (all <= EXACT_WEIGHT * WARPS) { /* no warp has an exact tile and pages besides: first tiles, then pages */
    const auto before = [&](int of_block) {
      return line_place{begin.coded + max(of_block - EXACT_WEIGHT * exact, 0),
                        begin.exact + min((of_block + EXACT_WEIGHT - 1) / EXACT_WEIGHT, exact)};
    };
    from = before(begin_of_block(warp, all, WARPS)), to = before(begin_of_block(warp + 1, all, WARPS));
  } else if (shares_are_equal(coded, exact, WARPS)) {
    /* those of a scheduler come after each other, so that none has more than another */
    const int share = WARPS % 4 == 0 ? warp % 4 * (WARPS / 4) + warp / 4 : warp;
    const auto before = [&](int shares) {
      const struct line_place place = before_share(coded, exact, shares, WARPS);
      return line_place{begin.coded + place.coded, begin.exact + place.exact};
    };
    from = before(share), to = before(share + 1);
  }
  works->items[number % 2] = w;
  works->readings[number % 2] = {number,
                                 item.head,
                                 w.tile.coded_first + from.coded,
                                 to.coded - from.coded,
                                 w.tile.exact_first,
                                 from.exact,
                                 to.exact - from.exact};
  __syncwarp();
}
/* Which blocks have something of the item. */
__device__ inline void find_blocks(const struct decode_line &line, item_work &work) {
  work.first = block_on_line(&line, work.item.begin);
  work.last = block_on_line(&line, work.item.begin + work.tile.reading - 1);
  __syncwarp();
}

} // namespace decode

#endif
