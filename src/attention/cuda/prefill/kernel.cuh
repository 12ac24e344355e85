/*
 * attention/cuda/prefill/kernel.cuh - the kernel behind prefill_run; launch.cu compiles it for what layers have. Private.
 *
 * A block has a tile of 128 rows and a KV head, and four groups of four warps. Two of them consume: each has 64 rows, whose
 * scores, probabilities and sums stay in its registers. One produces keys and one values: they turn a page into fp16 operands of
 * matrix products in a ring of slots in shared memory, gains applied, so consumers do the same with coded pages as with exact
 * ones. Nothing of the history is ever expanded in global memory.
 *
 *   keys     [64 tokens][columns]          queries [64 rows][columns]
 *   values   coded [crumbs][64 tokens], exact [64 tokens][head_dim]
 *
 * Coded pages come first, with queries in the space of codes. Then sums are brought out of it, and exact pages are added to them
 * in the space of the model. The maps in and out of that space come through the same slots, as if they were exact pages. Turning
 * means are further inputs of scores, [pairs of the head][cos, sin][64 tokens] beside the keys: their amplitudes are columns of
 * queries.
 */
#ifndef OSCAR_ATTENTION_CUDA_PREFILL_KERNEL_CUH
#define OSCAR_ATTENTION_CUDA_PREFILL_KERNEL_CUH

#include "attention/cuda/prefill/consume.cuh"
#include "attention/cuda/prefill/produce.cuh"

namespace prefill {

/* What is known when a kernel is compiled: CRUMBS of values, and, where keys have as many, STEPS of 16 inputs of scores; 0: keys
 * of any number of crumbs. */
template <int D_, int CRUMBS_, int STEPS_> struct traits { static constexpr int D = D_, CRUMBS = CRUMBS_, STEPS = STEPS_; };

template <class T>
__device__ inline void consume_tile(const arguments &a, const struct prefill_tile &part, int head, int group, uint32_t queries,
                                    ring &keys, ring &values) {
  constexpr int D = T::D;
  const struct decode_tile &tile = part.of;
  if (group * GROUP_ROWS >= tile.rows) return; /* barriers do not count it */
  const lane_rows rows = lane_rows_of<D>(a, tile, head, group);
  const int last_row = min((group + 1) * GROUP_ROWS, tile.rows) - 1;
  sight sight;
  sight.window = a.window;
  sight.all_to = tile.position + (tile.first_row + group * GROUP_ROWS) / a.group;
  sight.all_from = a.window ? tile.position + (tile.first_row + last_row) / a.group - a.window + 1 : 0;
#pragma unroll
  for (int h = 0; h < 2; h++) sight.seen[h] = rows.there[h] ? tile.position + (tile.first_row + rows.row[h]) / a.group : -1;
  float m[2] = {LEAST, LEAST}, l[2] = {0, 0}, o[D / 2] = {};
  if (tile.coded_pages > 0) {
    float sums[T::CRUMBS / 2] = {}, mean[2];
    map_queries<D>(a, rows, head, queries, keys, mean);
    writes_visible_to_products();
    warpgroup_barrier(1 + group);
    consume<false, score_steps<T::STEPS, T::CRUMBS / 16>>(keys, values, queries, {a.tables.key_columns / 16, a.key_crumbs / 16},
                                                          a.pages + tile.coded_first, tile.coded_pages, sight, a.code_unit, sums,
                                                          m, l);
    map_sums<D, T::CRUMBS>(a, head, sums, mean, values, m, l, o);
    warpgroup_barrier(1 + group); /* all have read their last scores */
  }
  if (tile.exact_pages > 0) {
    store_queries<D>(a, rows, queries);
    writes_visible_to_products();
    warpgroup_barrier(1 + group);
    consume<true, score_steps<D / 16, D / 16>>(keys, values, queries, {D / 16, D / 16}, a.pages + tile.exact_first,
                                               tile.exact_pages, sight, 1, o, m, l);
  }
  store_rows<D>(a, part, head, rows, o, m, l);
}

template <class T> __global__ void __launch_bounds__(THREADS, 1) kernel(const __grid_constant__ arguments a) {
#ifdef HAS_WARPGROUP_PRODUCTS
  extern __shared__ __align__(1024) uint8_t unaligned[];
  uint8_t *memory = unaligned + (1024 - shared_address(unaligned) % 1024) % 1024;
  const shared_layout layout = shared_layout_of(a);
  const uint32_t base = shared_address(memory), barriers = base + layout.barriers;
  const int index = blockIdx.x, head = index / a.tile_count, group = threadIdx.x / GROUP_THREADS;
  const struct prefill_tile part = a.tiles[index % a.tile_count];
  const struct decode_tile &tile = part.of;
  const int64_t last = tile.position + (tile.first_row + tile.rows - 1) / a.group;
  if (threadIdx.x == 0) {
    const int readers = tile.rows > GROUP_ROWS ? 8 : 4;
    for (int i = 0; i < a.stages; i++) {
      barrier_init(barriers + 8 * i, 4);                       /* warps that fill keys */
      barrier_init(barriers + 8 * (MOST_STAGES + i), readers); /* warps that have read them */
      barrier_init(barriers + 8 * (2 * MOST_STAGES + i), 4);   /* the same of values */
      barrier_init(barriers + 8 * (3 * MOST_STAGES + i), readers);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  if (a.log_gains) make_gain_table(base + layout.gain_table);
  __syncthreads();
  ring keys = {base + layout.keys, barriers, barriers + 8 * MOST_STAGES, a.key_slot_bytes, a.stages, 0, 0};
  ring values = {
      base + layout.values, barriers + 16 * MOST_STAGES, barriers + 24 * MOST_STAGES, a.value_slot_bytes, a.stages, 0, 0};
  if (group < 2) {
    take_registers<CONSUMER_REGISTERS>();
    consume_tile<T>(a, part, head, group, base + layout.queries + group * a.query_bytes, keys, values);
  } else {
    give_registers<PRODUCER_REGISTERS>();
    if (group == 2) {
      if (tile.coded_pages > 0) produce_map<T::D>(a.tables.keys, head, a.map_chunks, keys);
      if (tile.coded_pages > 0 && a.log_gains)
        produce_coded_keys<T::STEPS ? T::CRUMBS / 16 : 0, true>(a, tile, head, keys, base + layout.gain_table);
      else if (tile.coded_pages > 0)
        produce_coded_keys<T::STEPS ? T::CRUMBS / 16 : 0, false>(a, tile, head, keys, 0);
      if (tile.exact_pages > 0) produce_exact<T::D>(a, tile, head, 0, last, keys);
    } else {
      if (tile.coded_pages > 0 && a.log_gains)
        produce_coded_values<T::CRUMBS / 16, true>(a, tile, head, values, base + layout.gains, base + layout.gain_table);
      else if (tile.coded_pages > 0)
        produce_coded_values<T::CRUMBS / 16, false>(a, tile, head, values, base + layout.gains, 0);
      if (tile.coded_pages > 0) produce_map<T::D>(a.tables.values, head, T::CRUMBS / PAGE, values);
      if (tile.exact_pages > 0) produce_exact<T::D>(a, tile, head, 1, last, values);
    }
  }
#endif
}

} // namespace prefill

#endif
