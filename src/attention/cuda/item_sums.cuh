/*
 * attention/cuda/item_sums.cuh - what a block has of an item, put together and brought out of the space of codes. Private.
 *
 * Each warp has sums of codes and sums of exact values, with maxima of their own. The sum of codes of all warps goes through the
 * map of the values, of which every warp has a share of the inputs, and begins with its own exact sums; what the warps have then
 * is added up. That is the output where the block had the whole item.
 * Else it goes to memory as a part, and the item's last block on the line adds up all parts as they come, which is little more
 * than one pass over them: what would be long has been done by all blocks beside each other.
 */
#ifndef OSCAR_ATTENTION_CUDA_ITEM_SUMS_CUH
#define OSCAR_ATTENTION_CUDA_ITEM_SUMS_CUH

#include "attention/cuda/coded_page.cuh"

namespace decode {

/* Where a warp puts its sums: [4 NT rows][codes_width] and [4 NT rows][head_dim], and (m, l) of every row for each. A row of the
 * former has crumbs, then GAIN_CLASSES; four more keep rows in different banks. */
struct warp_sums {
  float *codes, *exact;
  float2 *code_states, *exact_states;
};
__host__ __device__ inline int codes_width(int crumbs) { return crumbs ? crumbs + GAIN_CLASSES + 4 : 0; }
/* Where they are in a block's shared memory: of warps, so many bytes apart. */
struct sums_layout {
  int codes, of_warp, exact, exact_of_warp;
};
/* at: where they may begin. least: what a warp needs there besides, in their place. 16 rows have their exact sums in the warp's
 * ring, which begins the memory and has `ring` bytes: they would not fit beside it. */
__host__ __device__ inline sums_layout sums_layout_of(int head_dim, int crumbs, int row_tiles, int at, int least, int ring) {
  const int rows = 4 * row_tiles, before = rows * (codes_width(crumbs) + 4) * 4, exact = rows * head_dim * 4;
  const int sums = before + (row_tiles < 4 ? exact : 0), of_warp = ((sums > least ? sums : least) + 15) / 16 * 16;
  return row_tiles < 4 ? sums_layout{at, of_warp, at + before, of_warp} : sums_layout{at, of_warp, 0, ring};
}
template <int NT> __device__ inline warp_sums sums_of_warp(int crumbs, uint8_t *memory, const sums_layout &layout, int warp) {
  float *codes = (float *)(memory + layout.codes + warp * layout.of_warp);
  float2 *states = (float2 *)(codes + 4 * NT * codes_width(crumbs));
  return {codes, (float *)(memory + layout.exact + warp * layout.exact_of_warp), states, states + 4 * NT};
}

/* What the block makes of them, in bytes from its start. inputs [crumbs + groups + 1][4 NT rows]: sums of codes, minus sums of
 * gains, the sum of probabilities; totals [4 NT]: l. */
struct block_sums {
  int inputs, totals, bytes;
};
__host__ __device__ inline block_sums block_sums_of(int crumbs, int row_tiles) {
  block_sums s;
  const int rows = 4 * row_tiles;
  int at = 0;
  s.inputs = at, at += crumbs ? (crumbs + GAIN_CLASSES + 1) * rows * 4 : 0;
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
/* Of codes, where other warps may have some. */
template <int NT> __device__ inline void store_no_codes(const warp_sums &sums, int crumbs, int lane) {
  store_no_states<NT>(sums.code_states, lane);
  for (int i = lane * 4; i < 4 * NT * codes_width(crumbs); i += 128) *(float4 *)(sums.codes + i) = make_float4(0, 0, 0, 0);
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
  int inputs;       /* 0: it has no coded pages */
  int count;        /* of the blocks that have something of the item */
  bool merges;      /* this block the parts of all */
  float *part;      /* this block's */
  float *parts;     /* the item's first */
};

/* Four columns of a few inputs of the map, `first` and those after it that are before `end`. */
template <int D> struct map_part {
  static constexpr int INPUTS = D > 128 ? 6 : 10;
  float4 at[INPUTS];
  template <bool HERE> __device__ __forceinline__ void load(const item_output &o, int first, int end, int column) {
#pragma unroll
    for (int k = 0; k < INPUTS; k++) {
      const float4 *from = (const float4 *)(o.map + (first + k) * D + column);
      at[k] = first + k >= end ? make_float4(0, 0, 0, 0) : HERE ? *from : __ldg(from);
    }
  }
};

template <int NT> __device__ __forceinline__ void add_input(float4 (&sums)[4 * NT], const float *input, const float4 &map) {
#pragma unroll
  for (int n = 0; n < NT; n++) {
    const float4 x = *(const float4 *)(input + 4 * n);
    add_scaled(sums[4 * n], x.x, map), add_scaled(sums[4 * n + 1], x.y, map);
    add_scaled(sums[4 * n + 2], x.z, map), add_scaled(sums[4 * n + 3], x.w, map);
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
 * every thread, so that none waits for another; `meanwhile` is done before that has come. */
template <int D, class F>
__device__ __forceinline__ parts_sum sum_parts(const item_output &o, int first, int end, int element, const F &meanwhile) {
  constexpr int TOGETHER = MOST_PARTS / 2; /* of two shares */
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
    meanwhile();
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
  const int elements = o.tile.rows * (D / 4), thread = threadIdx.x;
  const int two = elements * 2 <= THREADS; /* shares of the parts. No division is in the way of the first look. */
  const int share = two && thread >= elements, begin = o.count * share >> two, end = o.count * (share + 1) >> two;
  float4 *sums = (float4 *)room;
  float2 *states = (float2 *)(sums + elements);
#pragma unroll 1
  for (int first = 0; first < elements; first += THREADS) {
    const int element = first + thread - share * elements;
    const bool mine = element < elements;
    parts_sum sum;
    float *out = o.out;
    if (mine)
      sum = sum_parts<D>(o, begin, end, element, [&]() {
        out = o.out + row_offset(o.tile, element / (D / 4), o.kv_heads, o.group, o.head, D) + element % (D / 4) * 4;
        keep(out);
      });
    if (two) {
      if (mine && share == 1) sums[element] = sum.of, states[element] = make_float2(sum.m, sum.l);
      __syncthreads();
      if (mine && share == 0) add_parts(sum, {states[element].x, states[element].y, sums[element]});
    }
    if (!mine || share > 0) continue;
    const float scale = 1 / sum.l;
    *(float4 *)out = make_float4(sum.of.x * scale, sum.of.y * scale, sum.of.z * scale, sum.of.w * scale);
  }
  __syncthreads(); /* every thread has seen the states */
  for (int part = thread / DECODE_ROWS; part < o.count; part += THREADS / DECODE_ROWS)
    if (thread % DECODE_ROWS < o.tile.rows)
      ((float2 *)(o.parts + (size_t)part * part_floats(D)))[thread % DECODE_ROWS] = make_float2(0, 0);
}

/* What all warps have of an item goes where it belongs: to the output, or to the block's part. By the whole block, after the
 * warps have stored their sums; what is there may be written again after the next __syncthreads. block: room for block_sums.
 * HERE: the map is in shared memory.
 */
template <int D, int NT, int WARPS, bool HERE>
__device__ inline void finish_item(const item_output &o, const page_forms &forms, uint8_t *memory, const sums_layout &sums_at,
                                   uint8_t *block) {
  constexpr int ROWS = 4 * NT;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, rows = o.tile.rows, crumbs = forms.value_crumbs;
  const block_sums layout = block_sums_of(crumbs, NT);
  float *inputs = (float *)(block + layout.inputs), *totals = (float *)(block + layout.totals);
  const warp_sums first = sums_of_warp<NT>(crumbs, memory, sums_at, 0), mine = sums_of_warp<NT>(crumbs, memory, sums_at, warp);
  /* the warp's inputs of the map, in fours, of which some are asked for before others are done */
  const int fours = (o.inputs + 3) / 4;
  const int begin = 4 * begin_of_block(warp, fours, WARPS), end = min(4 * begin_of_block(warp + 1, fours, WARPS), o.inputs);
  map_part<D> map;
  map.template load<HERE>(o, begin, end, min(lane * 4, D - 4));
  __syncthreads();

  /* What sums are multiplied with: a lane finds that of a row of a few warps, and all lanes of a row tell each other. */
  constexpr int STEP = 32 / ROWS, EACH = (WARPS + STEP - 1) / STEP;
  const int row = lane % ROWS;
  float2 states[2][EACH];                                                           /* of codes, of exact ones */
  float m = NONE, l[2] = {0, 0}, factors[2][EACH], of_codes[WARPS], of_exact[ROWS]; /* of_exact: of this warp, by rows */
#pragma unroll
  for (int i = 0; i < EACH; i++) {
    const int of = lane / ROWS + i * STEP;
    states[0][i] = states[1][i] = make_float2(NONE, 0);
    if (WARPS % STEP == 0 || of < WARPS) {
      states[0][i] = *(const float2 *)((const uint8_t *)(first.code_states + row) + of * sums_at.of_warp);
      states[1][i] = *(const float2 *)((const uint8_t *)(first.exact_states + row) + of * sums_at.of_warp);
    }
    m = fmaxf(m, fmaxf(states[0][i].x, states[1][i].x));
  }
#pragma unroll
  for (int step = ROWS; step < 32; step *= 2) m = fmaxf(m, __shfl_xor_sync(~0u, m, step));
#pragma unroll
  for (int i = 0; i < EACH; i++)
#pragma unroll
    for (int kind = 0; kind < 2; kind++) { /* -inf is never subtracted from -inf */
      factors[kind][i] = states[kind][i].x > NONE ? exp2_fast(states[kind][i].x - m) : 0;
      l[kind] += factors[kind][i] * states[kind][i].y;
    }
#pragma unroll
  for (int step = ROWS; step < 32; step *= 2) l[0] += __shfl_xor_sync(~0u, l[0], step), l[1] += __shfl_xor_sync(~0u, l[1], step);
#pragma unroll
  for (int w = 0; w < WARPS; w++) of_codes[w] = __shfl_sync(~0u, factors[0][w / STEP], w % STEP * ROWS + row);
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    of_exact[r] = 0;
#pragma unroll
    for (int i = 0; i < EACH; i++) {
      const float x = __shfl_sync(~0u, factors[1][i], warp % STEP * ROWS + r);
      if (EACH == 1 || warp / STEP == i) of_exact[r] = x;
    }
  }
  if (warp == 0 && lane < rows) {
    totals[lane] = l[0] + l[1];
    if (o.count > 1) leave_numbers((float2 *)o.part + lane, make_float2(m, l[0] + l[1]));
  }
  for (int i = begin + lane / ROWS * 4; i < end; i += 4 * STEP) {
    const uint8_t *from = (const uint8_t *)(first.codes + row * codes_width(crumbs) + i);
    float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll
    for (int w = 0; w < WARPS; w++) add_scaled(sum, of_codes[w], *(const float4 *)(from + w * sums_at.of_warp));
    const auto put = [&](int input, float x) {
      if (input < o.inputs) inputs[input * ROWS + row] = input < crumbs ? x : input == o.inputs - 1 ? l[0] : -x;
    };
    put(i, sum.x), put(i + 1, sum.y), put(i + 2, sum.z), put(i + 3, sum.w);
  }
  __syncwarp();
#pragma unroll 1
  for (int column = lane * 4; column < D; column += 128) {
    float4 sums[ROWS] = {};
#pragma unroll
    for (int r = 0; r < ROWS; r++)
      if (of_exact[r] != 0) add_scaled(sums[r], of_exact[r], *(const float4 *)(mine.exact + r * D + column));
#pragma unroll 1
    for (int i = begin; i < end; i += map_part<D>::INPUTS) {
      if (i > begin || column >= 128) map.template load<HERE>(o, i, end, column);
#pragma unroll
      for (int k = 0; k < map_part<D>::INPUTS; k++) add_input<NT>(sums, inputs + min(i + k, end - 1) * ROWS, map.at[k]);
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++) *(float4 *)(mine.exact + r * D + column) = sums[r];
  }
  __syncthreads();
#pragma unroll 1
  for (int i = threadIdx.x; i < rows * (D / 4); i += WARPS * 32) {
    const int row = i / (D / 4), column = i % (D / 4) * 4;
    const uint8_t *from = (const uint8_t *)(first.exact + row * D + column);
    float4 sum = *(const float4 *)from;
#pragma unroll
    for (int w = 1; w < WARPS; w++) add_scaled(sum, 1, *(const float4 *)(from + w * sums_at.exact_of_warp));
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
