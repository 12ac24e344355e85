/*
 * attention/cuda/item_sums.cuh - what a block has of an item, put together and brought out of the space of codes. Private.
 *
 * Each warp has sums of codes and sums of exact values, with maxima of their own. They become one sum of codes and one of exact
 * values; the former times the map of the values is added to the latter. That is the output where the block had the whole item.
 * Else it goes to memory as a part, and the last block of an item that comes adds up all parts, which is little more than one
 * pass over them: what would be long has been done by all blocks beside each other.
 */
#ifndef OSCAR_ATTENTION_CUDA_ITEM_SUMS_CUH
#define OSCAR_ATTENTION_CUDA_ITEM_SUMS_CUH

#include "attention/cuda/coded_page.cuh"

namespace decode {

/* Where a warp puts its sums: [4 NT rows][crumbs + GAIN_CLASSES] and [4 NT rows][head_dim], and (m, l) of every row for each. */
struct warp_sums {
  float *codes, *exact;
  float2 *code_states, *exact_states;
};
__host__ __device__ inline int codes_width(int crumbs) { return crumbs ? crumbs + GAIN_CLASSES : 0; }
__host__ __device__ inline int warp_sums_bytes(int head_dim, int crumbs, int row_tiles) {
  return row_tiles * 4 * (codes_width(crumbs) + head_dim + 4) * 4;
}
template <int NT> __device__ inline warp_sums sums_of_warp(int head_dim, int crumbs, uint8_t *memory) {
  float *codes = (float *)memory, *exact = codes + 4 * NT * codes_width(crumbs);
  float2 *states = (float2 *)(exact + 4 * NT * head_dim);
  return {codes, exact, states, states + 4 * NT};
}

/* What the block makes of them, in bytes from its start. inputs [crumbs + groups + 1][4 NT rows]: sums of codes, minus sums of
 * gains, the sum of probabilities; exact [4 NT][head_dim]; totals [4 NT]: l. */
struct block_sums {
  int inputs, exact, totals, bytes;
};
__host__ __device__ inline block_sums block_sums_of(int head_dim, int crumbs, int row_tiles) {
  block_sums s;
  const int rows = 4 * row_tiles;
  int at = 0;
  s.inputs = at, at += crumbs ? (crumbs + GAIN_CLASSES + 1) * rows * 4 : 0;
  s.exact = at, at += rows * head_dim * 4;
  s.totals = at, at += rows * 4;
  s.bytes = at;
  return s;
}

/* Maxima are stored less `shift`: what the probabilities were made larger by. */
template <int NT> __device__ inline void store_states(softmax<NT> &state, float2 *to, int lane, float shift) {
#pragma unroll
  for (int n = 0; n < NT; n++) {
#pragma unroll
    for (int step = 4; step < 32; step *= 2) state.l[n] += __shfl_xor_sync(~0u, state.l[n], step);
    if (lane < 4) to[n * 4 + lane] = make_float2(state.m[n] - shift, state.l[n]);
  }
}
template <int NT> __device__ inline void store_no_states(float2 *to, int lane) {
  if (lane < 4 * NT) to[lane] = make_float2(NONE, 0);
}

__device__ __forceinline__ void add_scaled(float4 &sum, float factor, const float4 &x) {
  sum.x += factor * x.x, sum.y += factor * x.y, sum.z += factor * x.z, sum.w += factor * x.w;
}

/* What becomes of an item's sums. */
struct item_output {
  struct decode_tile tile;
  int kv_heads, group, head;
  float *out;
  const float *map;   /* of the KV head: [inputs][head_dim] */
  bool map_is_here;   /* in shared memory */
  bool exact;         /* whether the block has exact tiles */
  int inputs;         /* 0: it has no coded pages */
  int count;          /* of the blocks that have something of the item */
  float *part;        /* this block's */
  const float *parts; /* the item's first */
  uint32_t *arrived;
};

/* Inputs whose columns of the map a lane asks for at a time. */
template <int D> struct map_part {
  static constexpr int TOGETHER = D > 128 ? 6 : 12;
  float4 at[TOGETHER];
};
/* Four columns of every WARPS-th input from `first` on. */
template <int D, int WARPS> __device__ __forceinline__ map_part<D> load_map(const item_output &o, int first, int column) {
  map_part<D> part;
#pragma unroll
  for (int k = 0; k < map_part<D>::TOGETHER; k++)
    part.at[k] = __ldg((const float4 *)(o.map + (size_t)min(first + k * WARPS, o.inputs - 1) * D + column));
  return part;
}

template <int NT> __device__ __forceinline__ void add_input(float4 (&sums)[4 * NT], const float *input, const float4 &map) {
#pragma unroll
  for (int n = 0; n < NT; n++) {
    const float4 x = *(const float4 *)(input + 4 * n);
    add_scaled(sums[4 * n], x.x, map), add_scaled(sums[4 * n + 1], x.y, map);
    add_scaled(sums[4 * n + 2], x.z, map), add_scaled(sums[4 * n + 3], x.w, map);
  }
}

/* The product of `inputs` with a map in shared memory, a warp every WARPS-th of them, into sums of the warp [4 NT][D]. */
template <int D, int NT, int WARPS>
__device__ inline void multiply_map_here(const item_output &o, const float *inputs, float *to) {
  const int warp = threadIdx.x / 32;
#pragma unroll 1
  for (int column = threadIdx.x % 32 * 4; column < D; column += 128) {
    float4 sums[4 * NT] = {};
#pragma unroll 4
    for (int i = warp; i < o.inputs; i += WARPS)
      add_input<NT>(sums, inputs + i * 4 * NT, *(const float4 *)(o.map + i * D + column));
#pragma unroll
    for (int row = 0; row < 4 * NT; row++) *(float4 *)(to + row * D + column) = sums[row];
  }
}
/* The same where it is not, of which `map` is there. */
template <int D, int NT, int WARPS>
__device__ inline void multiply_map(const item_output &o, map_part<D> &map, const float *inputs, float *to) {
  constexpr int TOGETHER = map_part<D>::TOGETHER;
  const int warp = threadIdx.x / 32;
#pragma unroll 1
  for (int column = threadIdx.x % 32 * 4; column < D; column += 128) {
    float4 sums[4 * NT] = {};
#pragma unroll 1
    for (int first = warp; first < o.inputs; first += WARPS * TOGETHER) {
      if (first > warp || column >= 128) map = load_map<D, WARPS>(o, first, column);
#pragma unroll
      for (int k = 0; k < TOGETHER; k++) {
        if (first + k * WARPS >= o.inputs) break;
        add_input<NT>(sums, inputs + (first + k * WARPS) * 4 * NT, map.at[k]);
      }
    }
#pragma unroll
    for (int row = 0; row < 4 * NT; row++) *(float4 *)(to + row * D + column) = sums[row];
  }
}

/* Room for merge_parts in the place of all warps' sums: a state (m, l), later a factor, of every row of every part, and sums. */
__host__ __device__ inline int merge_bytes(int head_dim, int parts, int row_tiles) {
  return 4 * row_tiles * (parts * 8 + head_dim * 4);
}

/* Counts the block's part of an item, by one thread after a barrier of the block: how many came before. */
__device__ __forceinline__ uint32_t arrive(const item_output &o) { return arrive_and_see(o.arrived, (uint32_t)o.count - 1); }
__device__ __forceinline__ bool is_last(const item_output &o, uint32_t came_before) {
  return came_before == (uint32_t)o.count - 1;
}

/* All parts of an item into its output. The threads of a block take the elements of the output, and where there are twice as many
 * or more, shares of the parts, of which the first adds up the others' sums. Over the sums of warps and block. */
template <int D, int WARPS> __device__ inline void merge_parts(const item_output &o, uint8_t *room, uint8_t *block) {
  float *totals = (float *)block;
  constexpr int TOGETHER = 9, THREADS = WARPS * 32;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, rows = o.tile.rows, elements = rows * (D / 4);
  const int shares = elements * 2 <= THREADS ? 2 : 1, share = shares == 1 ? 0 : (int)threadIdx.x / elements;
  const int first = o.count * share / shares, end = o.count * (share + 1) / shares;
  const size_t floats = part_floats(D);
  float4 *sums = (float4 *)room;
  float2 *states = (float2 *)(sums + elements); /* [parts][rows] */
  const auto state_of = [&](int part, int row) {
    return part < o.count ? __ldcg((const float2 *)(o.parts + part * floats) + row) : make_float2(NONE, 0);
  };
  const auto load = [&](int element, int from, float4(&x)[TOGETHER]) {
    const float *at = o.parts + 2 * DECODE_ROWS + element * 4;
#pragma unroll
    for (int k = 0; k < TOGETHER; k++) x[k] = __ldcg((const float4 *)(at + (size_t)min(from + k, o.count - 1) * floats));
  };
  float2 state = state_of(lane, min(warp, rows - 1)); /* asked for before all else: sums need what is made of it */
  float4 x[TOGETHER];
  const int mine = (int)threadIdx.x - share * elements; /* the first element */
  load(min(mine, elements - 1), first, x);
#pragma unroll 1
  for (int row = warp; row < rows; row += WARPS) {
    if (row != warp) state = state_of(lane, row);
    const float2 of_lane = state;
    float m = state.x, l = 0;
#pragma unroll 1
    for (int i = lane + 32; i < o.count; i += 32) {
      state = state_of(i, row);
      states[i * rows + row] = state;
      m = fmaxf(m, state.x);
    }
    m = largest_of_warp(m);
#pragma unroll 1
    for (int i = lane; i < o.count; i += 32) {
      state = i == lane ? of_lane : states[i * rows + row];
      const float factor = state.x > NONE ? exp2_fast(state.x - m) : 0;
      states[i * rows + row].x = factor;
      l += factor * state.y;
    }
    l = sum_of_warp(l);
    if (lane == 0) totals[row] = l;
  }
  __syncthreads();
  const auto write = [&](int element, const float4 &sum) {
    const int row = element / (D / 4), column = element % (D / 4) * 4;
    const float scale = 1 / totals[row];
    *(float4 *)(o.out + row_offset(o.tile, row, o.kv_heads, o.group, o.head, D) + column) =
        make_float4(sum.x * scale, sum.y * scale, sum.z * scale, sum.w * scale);
  };
  float4 sum;
#pragma unroll 1
  for (int element = mine; element < elements && share < shares; element += THREADS) {
    const int row = element / (D / 4);
    sum = make_float4(0, 0, 0, 0);
#pragma unroll 1
    for (int from = first; from < end; from += TOGETHER) {
      if (from > first || element != mine) load(element, from, x);
#pragma unroll
      for (int k = 0; k < TOGETHER; k++)
        if (from + k < end) add_scaled(sum, states[(from + k) * rows + row].x, x[k]);
    }
    if (shares == 1) write(element, sum);
  }
  if (shares == 1) return;
  if (share == 1) sums[mine] = sum;
  __syncthreads();
  if (share > 0) return;
  add_scaled(sum, 1, sums[mine]);
  write(mine, sum);
}

/* What all warps' sums of a row are multiplied with, and the sums of probabilities that come of it. */
template <int WARPS> struct row_states {
  float codes[WARPS], exact[WARPS]; /* factors */
  float m, of_codes, l;             /* of_codes: the part of l that coded pages have */
};
template <int D, int NT, int WARPS>
__device__ __forceinline__ row_states<WARPS> states_of_row(bool coded, bool exact, int crumbs, uint8_t *warps, int bytes, int row) {
  row_states<WARPS> r;
  float2 states[2][WARPS];
  r.m = NONE;
#pragma unroll
  for (int w = 0; w < WARPS; w++) {
    const warp_sums from = sums_of_warp<NT>(D, crumbs, warps + w * bytes);
    states[0][w] = coded ? from.code_states[row] : make_float2(NONE, 0);
    states[1][w] = exact ? from.exact_states[row] : make_float2(NONE, 0);
  }
#pragma unroll
  for (int w = 0; w < WARPS; w++) r.m = fmaxf(r.m, fmaxf(states[0][w].x, states[1][w].x));
  float of_exact = 0;
  r.of_codes = 0;
#pragma unroll
  for (int w = 0; w < WARPS; w++) { /* -inf is never subtracted from -inf */
    r.codes[w] = states[0][w].x > NONE ? exp2_fast(states[0][w].x - r.m) : 0;
    r.exact[w] = states[1][w].x > NONE ? exp2_fast(states[1][w].x - r.m) : 0;
    r.of_codes += r.codes[w] * states[0][w].y;
    of_exact += r.exact[w] * states[1][w].y;
  }
  r.l = r.of_codes + of_exact;
  return r;
}

/* What all warps have of an item goes where it belongs: to the output, or to the block's part. By the whole block, after the warps
 * have stored their sums, each in `bytes` from `warps` on; what is there may be written again after the next __syncthreads, when
 * the part may be counted (arrive). */
template <int D, int NT, int WARPS>
__device__ inline void finish_item(const item_output &o, int crumbs, int groups, uint8_t *warps, int bytes, uint8_t *block) {
  constexpr int ROWS = 4 * NT;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, rows = o.tile.rows;
  const block_sums layout = block_sums_of(D, crumbs, NT);
  float *inputs = (float *)(block + layout.inputs), *exact = (float *)(block + layout.exact);
  float *totals = (float *)(block + layout.totals);
  map_part<D> map;
  if (o.inputs && !o.map_is_here) map = load_map<D, WARPS>(o, warp, min(lane * 4, D - 4));
  __syncthreads();
  const bool has_exact = o.exact || o.inputs == 0;
  const int of_codes = o.inputs ? codes_width(crumbs) / 4 : 0, each = of_codes + (has_exact ? D / 4 : 0);
#pragma unroll 1
  for (int i = threadIdx.x; i < rows * each; i += WARPS * 32) {
    const int row = i / each, at = i % each, coded = at < of_codes, column = (coded ? at : at - of_codes) * 4;
    const row_states<WARPS> states = states_of_row<D, NT, WARPS>(o.inputs > 0, has_exact, crumbs, warps, bytes, row);
    float4 sum = {};
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
      const float factor = coded ? states.codes[w] : states.exact[w];
      const warp_sums from = sums_of_warp<NT>(D, crumbs, warps + w * bytes);
      float4 x = *(const float4 *)(coded ? from.codes + row * codes_width(crumbs) + column : from.exact + row * D + column);
      if (factor == 0) x = make_float4(0, 0, 0, 0); /* a warp that saw nothing has left anything */
      add_scaled(sum, factor, x);
    }
    if (at == 0) {
      totals[row] = states.l;
      if (o.inputs) inputs[(o.inputs - 1) * ROWS + row] = states.of_codes;
      if (o.count > 1) __stcg((float2 *)o.part + row, make_float2(states.m, states.l));
    }
    if (!coded) {
      *(float4 *)(exact + row * D + column) = sum;
      continue;
    }
    const float sign = column < crumbs ? 1 : -1, x[4] = {sum.x, sum.y, sum.z, sum.w};
#pragma unroll
    for (int k = 0; k < 4; k++)
      if (column + k < crumbs + groups) inputs[(column + k) * ROWS + row] = sign * x[k];
  }
  __syncthreads();
  if (o.inputs) {
    float *to = (float *)(warps + warp * bytes);
    if (o.map_is_here)
      multiply_map_here<D, NT, WARPS>(o, inputs, to);
    else
      multiply_map<D, NT, WARPS>(o, map, inputs, to);
    __syncthreads();
  }
#pragma unroll 1
  for (int i = threadIdx.x; i < rows * (D / 4); i += WARPS * 32) {
    const int row = i / (D / 4), column = i % (D / 4) * 4;
    float4 sum = has_exact ? *(const float4 *)(exact + row * D + column) : make_float4(0, 0, 0, 0);
    if (o.inputs)
#pragma unroll
      for (int w = 0; w < WARPS; w++)
        add_scaled(sum, 1, *(const float4 *)((const float *)(warps + w * bytes) + row * D + column));
    if (o.count > 1) {
      __stcg((float4 *)(o.part + 2 * DECODE_ROWS + row * D + column), sum);
      continue;
    }
    const float scale = 1 / totals[row];
    *(float4 *)(o.out + row_offset(o.tile, row, o.kv_heads, o.group, o.head, D) + column) =
        make_float4(sum.x * scale, sum.y * scale, sum.z * scale, sum.w * scale);
  }
}

} // namespace decode

#endif
