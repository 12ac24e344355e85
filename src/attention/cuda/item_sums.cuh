/*
 * attention/cuda/item_sums.cuh - what a block has of an item, put together and brought out of the space of codes. Private.
 *
 * Each warp has sums of codes and sums of exact values, with maxima of their own. They become one sum of codes and one of exact
 * values; the former times the map of the values is added to the latter. That is the output where the block had the whole item.
 * Else it goes to memory as a part, and the item's last block on the line adds up all parts as they come, which is little more
 * than one pass over them: what would be long has been done by all blocks beside each other.
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
  const float *map; /* of the KV head: [inputs][head_dim] */
  bool map_is_here; /* in shared memory */
  bool exact;       /* whether the block has exact tiles */
  int inputs;       /* 0: it has no coded pages */
  int count;        /* of the blocks that have something of the item */
  bool merges;      /* this block the parts of all */
  float *part;      /* this block's */
  float *parts;     /* the item's first */
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
  constexpr int TOGETHER = 6;
  const int warp = threadIdx.x / 32;
#pragma unroll 1
  for (int column = threadIdx.x % 32 * 4; column < D; column += 128) {
    float4 sums[4 * NT] = {};
#pragma unroll 1
    for (int first = warp; first < o.inputs; first += WARPS * TOGETHER) {
      float4 map[TOGETHER];
#pragma unroll
      for (int k = 0; k < TOGETHER; k++)
        map[k] =
            first + k * WARPS < o.inputs ? *(const float4 *)(o.map + (first + k * WARPS) * D + column) : make_float4(0, 0, 0, 0);
#pragma unroll
      for (int k = 0; k < TOGETHER; k++) add_input<NT>(sums, inputs + min(first + k * WARPS, o.inputs - 1) * 4 * NT, map[k]);
    }
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

/* Room for merge_parts in the place of all warps' sums: sums, and (m, l), of every four elements of the output. */
__host__ __device__ inline int merge_bytes(int head_dim, int row_tiles) { return 4 * row_tiles * (head_dim / 4) * (16 + 8); }

/* Sums of parts, (m, l) of the row and four elements of it. */
struct parts_sum {
  float m, l;
  float4 of;
};
__device__ __forceinline__ void add_parts(parts_sum &sum, const parts_sum &other) {
  const float m = fmaxf(sum.m, other.m), mine = sum.m > NONE ? exp2_fast(sum.m - m) : 0,
              others = other.m > NONE ? exp2_fast(other.m - m) : 0;
  parts_sum both = {m, mine * sum.l + others * other.l, {0, 0, 0, 0}};
  add_scaled(both.of, mine, sum.of);
  add_scaled(both.of, others, other.of);
  sum = both;
}
/* Parts `first` to `end` - 1, as soon as they are there; the sums are made zero again. Everything is asked for at once, and by
 * every thread, so that none waits for another. */
template <int D> __device__ __forceinline__ parts_sum sum_parts(const item_output &o, int first, int end, int element) {
  constexpr int TOGETHER = 9;
  const size_t floats = part_floats(D);
  float *states = o.parts + element / (D / 4) * 2, *sums = o.parts + 2 * DECODE_ROWS + element * 4;
  parts_sum all = {NONE, 0, {0, 0, 0, 0}};
#pragma unroll 1
  for (int from = first; from < end; from += TOGETHER) {
    float2 state[TOGETHER];
    float4 x[TOGETHER];
#pragma unroll
    for (int k = 0; k < TOGETHER; k++) state[k] = look_at_numbers((const float2 *)(states + min(from + k, end - 1) * floats));
#pragma unroll
    for (int k = 0; k < TOGETHER; k++) x[k] = look_at_numbers((const float4 *)(sums + min(from + k, end - 1) * floats));
    for (bool have_all = false; !have_all;) {
      have_all = true;
#pragma unroll
      for (int k = 0; k < TOGETHER; k++) {
        if (have_come(state[k]) && have_come(x[k])) continue;
        state[k] = look_at_numbers((const float2 *)(states + min(from + k, end - 1) * floats));
        x[k] = look_at_numbers((const float4 *)(sums + min(from + k, end - 1) * floats));
        have_all = false;
      }
    }
#pragma unroll
    for (int k = 0; k < TOGETHER; k++)
      if (from + k < end) *(float4 *)(sums + (from + k) * floats) = make_float4(0, 0, 0, 0);
    parts_sum some = {NONE, 0, {0, 0, 0, 0}};
#pragma unroll
    for (int k = 0; k < TOGETHER; k++) some.m = fmaxf(some.m, state[k].x);
#pragma unroll
    for (int k = 0; k < TOGETHER; k++) { /* -inf is never subtracted from -inf */
      const float factor = from + k < end && state[k].x > NONE ? exp2_fast(state[k].x - some.m) : 0;
      some.l += factor * state[k].y;
      add_scaled(some.of, factor, x[k]);
    }
    add_parts(all, some);
  }
  return all;
}
/* All parts of an item into its output, after which their memory is zero. The threads of a block take the elements of the output,
 * and where there are twice as many or more, shares of the parts. Over the warps' sums. */
template <int D, int WARPS> __device__ inline void merge_parts(const item_output &o, uint8_t *room) {
  constexpr int THREADS = WARPS * 32;
  const int elements = o.tile.rows * (D / 4), shares = elements * 2 <= THREADS ? 2 : 1;
  const int share = shares == 1 ? 0 : (int)threadIdx.x / elements, half = o.count * share / shares;
  float4 *sums = (float4 *)room;
  float2 *states = (float2 *)(sums + elements);
#pragma unroll 1
  for (int first = 0; first < elements; first += THREADS) {
    const int element = first + (int)threadIdx.x - share * elements;
    const bool mine = share < shares && element < elements;
    parts_sum sum;
    if (mine) sum = sum_parts<D>(o, half, o.count * (share + 1) / shares, element);
    if (shares == 2) {
      if (mine && share == 1) sums[element] = sum.of, states[element] = make_float2(sum.m, sum.l);
      __syncthreads();
      if (share == 0) add_parts(sum, {states[element].x, states[element].y, sums[element]});
    }
    if (!mine || share > 0) continue;
    const int row = element / (D / 4), column = element % (D / 4) * 4;
    const float scale = 1 / sum.l;
    *(float4 *)(o.out + row_offset(o.tile, row, o.kv_heads, o.group, o.head, D) + column) =
        make_float4(sum.of.x * scale, sum.of.y * scale, sum.of.z * scale, sum.of.w * scale);
  }
  __syncthreads(); /* every thread has seen the states */
  for (int i = threadIdx.x; i < o.count * o.tile.rows; i += THREADS)
    ((float2 *)(o.parts + (size_t)(i / o.tile.rows) * part_floats(D)))[i % o.tile.rows] = make_float2(0, 0);
}

/* What all warps have of an item goes where it belongs: to the output, or to the block's part. By the whole block, after the
 * warps have stored their sums, each in `bytes` from `warps` on; what is there may be written again after the next __syncthreads.
 */
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
  const bool has_codes = o.inputs > 0, has_exact = o.exact || !has_codes;
  /* A warp has a row of the sums of codes, or of exact ones. */
#pragma unroll 1
  for (int task = warp; task < (has_codes && has_exact ? 2 * rows : rows); task += WARPS) {
    const bool coded = has_codes && task < rows;
    const int row = task < rows ? task : task - rows, width = coded ? crumbs : D;
    const warp_sums from = sums_of_warp<NT>(D, crumbs, warps);
    float2 state = make_float2(NONE, 0); /* of a lane's warp: codes, then exact ones */
    if (lane < WARPS ? has_codes : lane < 2 * WARPS && has_exact)
      state = *(const float2 *)((const uint8_t *)((lane < WARPS ? from.code_states : from.exact_states) + row) +
                                lane % WARPS * bytes);
    const float m = largest_of_warp(state.x), of_lane = state.x > NONE ? exp2_fast(state.x - m) : 0, l = of_lane * state.y;
    float factors[WARPS];
#pragma unroll
    for (int w = 0; w < WARPS; w++) factors[w] = __shfl_sync(~0u, of_lane, coded ? w : WARPS + w);
    const uint8_t *mine = (const uint8_t *)(coded ? from.codes + row * codes_width(crumbs) : from.exact + row * D);
    const auto sum_at = [&](int column) {
      float x[WARPS], sum = 0;
#pragma unroll
      for (int w = 0; w < WARPS; w++) x[w] = *(const float *)(mine + w * bytes + column * 4);
#pragma unroll
      for (int w = 0; w < WARPS; w++) /* a warp that saw nothing has left anything */
        if (factors[w] != 0) sum += factors[w] * x[w];
      return sum;
    };
#pragma unroll 2
    for (int column = lane; column < width; column += 32) {
      const float sum = sum_at(column);
      (coded ? inputs + column * ROWS : exact + row * D + column)[coded ? row : 0] = sum;
    }
    if (coded && lane < groups) inputs[(crumbs + lane) * ROWS + row] = -sum_at(crumbs + lane);
    if (task >= rows) continue;
    const float of_codes = sum_of_warp(lane < WARPS ? l : 0), all = sum_of_warp(l);
    if (lane > 0) continue;
    totals[row] = all;
    if (has_codes) inputs[(o.inputs - 1) * ROWS + row] = of_codes;
    if (o.count > 1) leave_numbers((float2 *)o.part + row, make_float2(m, all));
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
      leave_numbers((float4 *)(o.part + 2 * DECODE_ROWS + row * D + column), sum);
      continue;
    }
    const float scale = 1 / totals[row];
    *(float4 *)(o.out + row_offset(o.tile, row, o.kv_heads, o.group, o.head, D) + column) =
        make_float4(sum.x * scale, sum.y * scale, sum.z * scale, sum.w * scale);
  }
}

} // namespace decode

#endif
