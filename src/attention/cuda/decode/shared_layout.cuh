/*
 * attention/cuda/decode/shared_layout.cuh - what a block has in shared memory, and where. Private.
 */
#ifndef OSCAR_ATTENTION_CUDA_DECODE_SHARED_LAYOUT_CUH
#define OSCAR_ATTENTION_CUDA_DECODE_SHARED_LAYOUT_CUH

#include "attention/cuda/decode/block_work.cuh"
#include "attention/cuda/decode/page_gains.cuh"
#include "attention/cuda/decode/turning_mean.cuh"

namespace decode {

/* Barriers of the block's copies, after those of its rings: queries, and curves, of two items in turn; the map. */
enum block_copy { QUERIES, CURVES = QUERIES + 2, MAP = CURVES + 2, BLOCK_COPIES };
/* Shared memory of a block, in bytes from its start. A warp has sums.of_warp bytes from sums.codes on for weights of curves (of a
 * mean that turns) and the gains of a page, and in their place its sums, when it is done with an item. Queries and curves of the
 * next item are `next_prepared` and `next_curves` bytes on from those of this one; 0: they come when this one is done with. */
struct shared_layout {
  int angles, barriers, works, log_gains, constant_gains, prepared, next_prepared, curves, next_curves, map, gains_of_warp, block,
      bytes;
  sums_layout sums;
};
__host__ __device__ inline prepared_layout prepared_of(const arguments &a, int row_tiles) {
  return prepared_layout_of(a.forms.key_crumbs / 16, a.turning_pairs, a.fast, row_tiles);
}
__host__ __device__ inline int curve_bytes(const arguments &a) {
  return (a.turns == BY_WAVES ? a.rope.steps : a.turns == BY_PAIRS ? a.turning_pairs / CURVE_STEP : 0) * CURVE_STEP_BYTES;
}

__host__ __device__ inline int map_bytes(const arguments &a) { return value_map_words(a.head_dim, a.forms.value_crumbs) * 4; }

__host__ __device__ inline struct shared_layout shared_layout_of(const arguments &a, int warps, int row_tiles) {
  struct shared_layout s;
  int at = warps * STAGES * a.slot_bytes;
  s.angles = at, at += warps * angles_bytes(a);
  s.barriers = at, at += 8 * (warps * STAGES + BLOCK_COPIES);
  s.works = at, at += warps * (int)sizeof(struct warp_work);
  at = (at + 63) / 64 * 64;
  s.log_gains = at, at += row_tiles == 4 ? HALF_GAIN_TABLE_BYTES : 64;
  at = (at + 127) / 128 * 128;
  s.constant_gains = at, at += CONSTANT_GAINS_BYTES;
  const int prepared = a.coded ? (prepared_of(a, row_tiles).bytes + 127) / 128 * 128 : 0;
  s.prepared = at, at += prepared;
  s.next_prepared = a.copies_ahead ? prepared : 0, at += s.next_prepared;
  s.curves = at, at += curve_bytes(a);
  s.next_curves = a.copies_ahead && a.turns == BY_PAIRS ? curve_bytes(a) : 0, at += s.next_curves;
  s.gains_of_warp = a.turns == BY_WAVES ? WAVE_PAGES * row_tiles * a.rope.steps * 32 * WEIGHT_WORDS * 4 : 0;
  const int reading = s.gains_of_warp + (a.coded ? gains_bytes(a.forms) : 0);
  s.sums = sums_layout_of(a.head_dim, a.forms.value_crumbs, row_tiles, at, reading, STAGES * a.slot_bytes);
  const int all = warps * s.sums.of_warp;
  const int merging = merge_place(s.sums, row_tiles) - at + merge_bytes(a.head_dim, row_tiles);
  s.block = at += ((all > merging ? all : merging) + 15) / 16 * 16;
  at += block_sums_of(a.forms.value_crumbs, row_tiles).bytes;
  s.map = at = (at + 127) / 128 * 128;
  s.bytes = at + (a.map_is_here ? map_bytes(a) : 0);
  return s;
}

} // namespace decode

#endif
