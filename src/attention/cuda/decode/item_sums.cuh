/*
 * attention/cuda/decode/item_sums.cuh - what a block has of an item, put together and brought out of the space of codes. Private.
 *
 * Each warp has sums of codes and sums of exact values, with maxima of their own. Threads add up what all warps have; then the
 * sums of codes go through the map of the values, of which every warp makes 16 channels at a time, and exact ones are added. That
 * is the output where the block had the whole item.
 * Else it goes to memory as a part, and the item's last block on the line adds up all parts as they come, which is little more
 * than one pass over them: what would be long has been done by all blocks beside each other.
 */
#ifndef OSCAR_ATTENTION_CUDA_DECODE_ITEM_SUMS_CUH
#define OSCAR_ATTENTION_CUDA_DECODE_ITEM_SUMS_CUH

#include "attention/cuda/decode/arguments.cuh"
#include "attention/cuda/decode/running_softmax.cuh"
#include "attention/cuda/decode/value_map.h"

namespace decode {

/* Where a warp puts its sums: [4 NT rows][codes_width] and [4 NT rows][head_dim], and (m, l) of every row for each. A row of the
 * former has crumbs, then GAIN_CLASSES; four more, where there is room for them, keep rows in different banks. */
struct warp_sums {
  float *codes, *exact;
  float2 *code_states, *exact_states;
};
__host__ __device__ inline int codes_width(int crumbs, int row_tiles) {
  return crumbs ? crumbs + GAIN_CLASSES + (row_tiles < 4 ? 4 : 0) : 0;
}
/* Where they are in a block's shared memory: of warps, so many bytes apart. */
struct sums_layout {
  int codes, of_warp, exact, exact_of_warp;
};
/* at: where they may begin. least: what a warp needs there besides, in their place. 16 rows have their exact sums in the warp's
 * ring, which begins the memory and has `ring` bytes: they would not fit beside it. */
__host__ __device__ inline sums_layout sums_layout_of(int head_dim, int crumbs, int row_tiles, int at, int least, int ring) {
  const int rows = 4 * row_tiles, before = rows * (codes_width(crumbs, row_tiles) + 4) * 4, exact = rows * head_dim * 4;
  const int sums = before + (row_tiles < 4 ? exact : 0), of_warp = ((sums > least ? sums : least) + 15) / 16 * 16;
  return row_tiles < 4 ? sums_layout{at, of_warp, at + before, of_warp} : sums_layout{at, of_warp, 0, ring};
}
template <int NT> __device__ inline warp_sums sums_of_warp(int crumbs, uint8_t *memory, const sums_layout &layout, int warp) {
  float *codes = (float *)(memory + layout.codes + warp * layout.of_warp);
  float2 *states = (float2 *)(codes + 4 * NT * codes_width(crumbs, NT));
  return {codes, (float *)(memory + layout.exact + warp * layout.exact_of_warp), states, states + 4 * NT};
}

/* A row's exact sums lie so that lanes which have the same channels of different rows meet different banks. */
template <int D> __device__ __forceinline__ int exact_place(int row, int channel) { return row * D + (channel ^ row % 4 * 8); }

/* What the block makes of them, in bytes from its start. inputs: of the map (value_map.h), as operands B: [step][NT][32 lanes] of
 * two words, of a row of 4 in two columns, as numbers of BF16 and what those lost of them; totals [4 NT]: l. */
struct block_sums {
  int inputs, totals, bytes;
};
__host__ __device__ inline block_sums block_sums_of(int crumbs, int row_tiles) {
  block_sums s;
  int at = 0;
  s.inputs = at, at += crumbs ? value_map_steps(crumbs) * row_tiles * 32 * 8 : 0;
  s.totals = at, at += 4 * row_tiles * 4;
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
  for (int i = lane * 4; i < 4 * NT * codes_width(crumbs, NT); i += 128) *(float4 *)(sums.codes + i) = make_float4(0, 0, 0, 0);
}

__device__ __forceinline__ void add_scaled(float4 &sum, float factor, const float4 &x) {
  sum.x += factor * x.x, sum.y += factor * x.y, sum.z += factor * x.z, sum.w += factor * x.w;
}

/* What becomes of an item's sums. */
struct item_output {
  const struct decode_tile &tile;
  int kv_heads, group, head;
  float *out;
  const uint4 *map; /* of the KV head (value_map.h) */
  int steps;        /* of the map; 0: the item has no coded pages */
  bool shared;      /* other blocks have something of the item, too */
  float *part;      /* this block's */
};

/* Of a tile of the map: numbers of all lanes, then what they lost. The gains of its inputs are those of warp_sums. */
constexpr int MAP_STEP = VALUE_MAP_STEP_WORDS / VALUE_MAP_LANE_WORDS;
static_assert(VALUE_MAP_GROUPS == GAIN_CLASSES && GAIN_CLASSES == 4, "gains are one four of the inputs");
/* Of some steps of a tile of the map, the numbers, or what they lost. */
template <int STEPS> struct map_part {
  uint4 of[STEPS];
  __device__ __forceinline__ void load(const uint4 *tile, bool lost, int first, int steps, int lane) {
#pragma unroll
    for (int k = 0; k < STEPS; k++)
      if (first + k < steps) of[k] = tile[(first + k) * MAP_STEP + lost * (MAP_STEP / 2) + lane];
  }
};
__device__ __forceinline__ void multiply_map(float (&sums)[4], const uint4 &map, const uint2 &inputs) {
  mma_bf16(sums, map.x, map.y, map.z, map.w, inputs.x, inputs.y);
}

/* Room for merge_parts in the place of all warps' sums: sums, and (m, l), of every four elements of the output. Not in the first
 * warp's, whose exact sums another warp may still read when parts have come. */
__host__ __device__ inline int merge_bytes(int head_dim, int row_tiles) { return 4 * row_tiles * (head_dim / 4) * (16 + 8); }
__host__ __device__ inline int merge_place(const sums_layout &sums, int row_tiles) {
  return sums.codes + (row_tiles < 4 ? sums.of_warp : 0);
}

/* Sums of parts, (m, l) of the row and four elements of it. m is at least LEAST_MAXIMUM, so -inf is not subtracted from -inf. */
constexpr float LEAST_MAXIMUM = -1e30f;
struct parts_sum {
  float m, l;
  float4 of;
};
__device__ __forceinline__ void add_parts(parts_sum &sum, const parts_sum &other) {
  const float m = fmaxf(sum.m, other.m), mine = exp2_fast(sum.m - m), others = exp2_fast(other.m - m);
  parts_sum both = {m, mine * sum.l + others * other.l, {0, 0, 0, 0}};
  add_scaled(both.of, mine, sum.of);
  add_scaled(both.of, others, other.of);
  sum = both;
}

/* An item whose parts a block puts together. */
struct item_parts {
  int rows, token, first_row, head; /* of the tile; its KV head */
  int first, count;                 /* of parts; 0: there is no such item */
};
constexpr int PARTS_TOGETHER = MOST_PARTS / 2; /* of two shares */
/* Parts of an item from `parts` on, `count` of them, as soon as they are there; the sums are made zero again. Everything is asked
 * for at once, and by every thread, so that none waits for another; `meanwhile` is done before that has come. */
template <int D, class F>
__device__ __forceinline__ parts_sum sum_parts(float *parts, int count, int element, const F &meanwhile) {
  const size_t floats = part_floats(D);
  float *states = parts + element / (D / 4) * 2, *sums = parts + 2 * DECODE_ROWS + element * 4;
  parts_sum all = {LEAST_MAXIMUM, 0, {0, 0, 0, 0}};
#pragma unroll 1
  for (int before = 0; before < count;
       before += PARTS_TOGETHER, states += PARTS_TOGETHER * floats, sums += PARTS_TOGETHER * floats) {
    const int left = count - before;
    float2 state[PARTS_TOGETHER];
    float4 x[PARTS_TOGETHER];
#pragma unroll
    for (int k = 0; k < PARTS_TOGETHER; k++)
      if (k < left) state[k] = look_at_numbers((const float2 *)(states + k * floats));
#pragma unroll
    for (int k = 0; k < PARTS_TOGETHER; k++)
      if (k < left) x[k] = look_at_numbers((const float4 *)(sums + k * floats));
    meanwhile();
    for (bool have_all = false; !have_all;) {
      have_all = true;
#pragma unroll
      for (int k = 0; k < PARTS_TOGETHER; k++) {
        if (k >= left || (have_come(state[k]) && have_come(x[k]))) continue;
        state[k] = look_at_numbers((const float2 *)(states + k * floats));
        x[k] = look_at_numbers((const float4 *)(sums + k * floats));
        have_all = false;
      }
    }
    parts_sum some = {LEAST_MAXIMUM, 0, {0, 0, 0, 0}};
#pragma unroll
    for (int k = 0; k < PARTS_TOGETHER; k++) {
      if (k < left)
        *(float4 *)(sums + k * floats) = make_float4(0, 0, 0, 0);
      else
        state[k] = make_float2(NONE, 0), x[k] = make_float4(0, 0, 0, 0);
      some.m = fmaxf(some.m, state[k].x);
    }
#pragma unroll
    for (int k = 0; k < PARTS_TOGETHER; k++) {
      const float factor = exp2_fast(state[k].x - some.m);
      some.l += factor * state[k].y;
      add_scaled(some.of, factor, x[k]);
    }
    if (before == 0)
      all = some;
    else
      add_parts(all, some);
  }
  return all;
}
/* All parts of an item into its output, after which their memory is zero. The threads of a block take the elements of the output,
 * and where there are twice as many or more, shares of the parts. `room` is over the warps' sums. */
template <int D, int WARPS> __device__ inline void merge_parts(const arguments &a, const item_parts &o, uint8_t *room) {
  constexpr int THREADS = WARPS * 32;
  const int elements = o.rows * (D / 4), thread = threadIdx.x;
  const int two = elements * 2 <= THREADS; /* shares of the parts. No division is in the way of the first look. */
  const int share = two && thread >= elements, begin = o.count * share >> two, end = o.count * (share + 1) >> two;
  float *parts = a.parts + o.first * part_floats(D);
  float4 *sums = (float4 *)room;
  float2 *states = (float2 *)(sums + elements);
#pragma unroll 1
  for (int first = 0; first < elements; first += THREADS) {
    const int element = first + thread - share * elements;
    const bool mine = element < elements;
    parts_sum sum;
    float *out = a.out;
    if (mine)
      sum = sum_parts<D>(parts + begin * part_floats(D), end - begin, element, [&]() {
        out =
            a.out + row_offset(o.token, o.first_row + element / (D / 4), a.kv_heads, a.group, o.head, D) + element % (D / 4) * 4;
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
  if (!two) __syncthreads(); /* every thread has seen the states */
  for (int part = thread / DECODE_ROWS; part < o.count; part += THREADS / DECODE_ROWS)
    if (thread % DECODE_ROWS < o.rows)
      ((float2 *)(parts + (size_t)part * part_floats(D)))[thread % DECODE_ROWS] = make_float2(0, 0);
}

/* What sums of the warps are to be multiplied with, by kinds: those of codes, exact ones. Lane ROWS i + r has those of row r of
 * warps i, i + STEP, ..; l: of all warps. */
template <int NT, int WARPS> struct warp_factors {
  static constexpr int ROWS = 4 * NT, STEP = 32 / ROWS, EACH = (WARPS + STEP - 1) / STEP;
  float of[2][EACH], m, l[2];
  __device__ __forceinline__ void make(const warp_sums &first, int of_warp, int lane) {
    float2 states[2][EACH];
    m = NONE;
#pragma unroll
    for (int i = 0; i < EACH; i++) {
      const int warp = lane / ROWS + i * STEP;
      states[0][i] = states[1][i] = make_float2(NONE, 0);
      if (WARPS % STEP == 0 || warp < WARPS) {
        states[0][i] = *(const float2 *)((const uint8_t *)(first.code_states + lane % ROWS) + warp * of_warp);
        states[1][i] = *(const float2 *)((const uint8_t *)(first.exact_states + lane % ROWS) + warp * of_warp);
      }
      m = fmaxf(m, fmaxf(states[0][i].x, states[1][i].x));
    }
#pragma unroll
    for (int step = ROWS; step < 32; step *= 2) m = fmaxf(m, __shfl_xor_sync(~0u, m, step));
#pragma unroll
    for (int kind = 0; kind < 2; kind++) {
      l[kind] = 0;
#pragma unroll
      for (int i = 0; i < EACH; i++) { /* -inf is never subtracted from -inf */
        of[kind][i] = states[kind][i].x > NONE ? exp2_fast(states[kind][i].x - m) : 0;
        l[kind] += of[kind][i] * states[kind][i].y;
      }
    }
#pragma unroll
    for (int step = ROWS; step < 32; step *= 2)
      l[0] += __shfl_xor_sync(~0u, l[0], step), l[1] += __shfl_xor_sync(~0u, l[1], step);
  }
  __device__ __forceinline__ float get(int kind, int warp, int row) const {
    return __shfl_sync(~0u, of[kind][warp / STEP], warp % STEP * ROWS + row);
  }
};

/* What all warps have of an item goes where it belongs: to the output, or to the block's part. By the whole block, after the
 * warps have stored their sums; what is there may be written again after the next __syncthreads. block: room for block_sums.
 * This runs once an item and not in a loop, so what counts is how many instructions it has: products of matrices have the least.
 */
template <class T>
__device__ inline void finish_item(const item_output &o, const page_forms &forms, uint8_t *memory, const sums_layout &sums_at,
                                   uint8_t *block) {
  constexpr int D = T::D, NT = T::NT, WARPS = T::WARPS, ROWS = 4 * NT, TILES = D / 16;
  constexpr int MOST_TOGETHER = NT == 1 ? 9 : NT == 2 ? 2 : 1; /* steps of the map, as registers allow */
  constexpr int TOGETHER = T::VALUE_BLOCKS + 1 < MOST_TOGETHER ? T::VALUE_BLOCKS + 1 : MOST_TOGETHER;
  constexpr int CHAINS = NT == 1 ? 2 : 1; /* of products for the same sums */
  const int thread = thread_now(), warp = thread / 32, lane = thread % 32, g = lane / 4, q = lane % 4;
  const int crumbs = T::ANY_VALUES ? forms.value_crumbs : 16 * T::VALUE_BLOCKS; /* where there are codes */
  const int steps = !T::CODED ? 0 : T::ANY_VALUES || o.steps == 0 ? o.steps : T::VALUE_BLOCKS + 1;
  const block_sums layout = block_sums_of(forms.value_crumbs, NT);
  uint2 *inputs = (uint2 *)(block + layout.inputs);
  float *totals = (float *)(block + layout.totals);
  const warp_sums first = sums_of_warp<NT>(forms.value_crumbs, memory, sums_at, 0);
  map_part<TOGETHER> numbers;
  if (steps > 0 && warp < TILES) numbers.load(o.map + warp * steps * MAP_STEP, false, 0, steps, lane);
  __syncthreads();

  warp_factors<NT, WARPS> factors;
  factors.make(first, sums_at.of_warp, lane);
  if (warp == 0 && lane < ROWS) {
    const float l = factors.l[0] + factors.l[1];
    totals[lane] = l;
    if (o.shared && lane < o.tile.rows) leave_numbers((float2 *)o.part + lane, make_float2(factors.m, l));
  }
  /* A thread adds up fours of one row: of exact sums, in the place of the first warp's, and of inputs of the map. */
  const int row = lane % 4 + 4 * (lane / 8 % NT);
  const auto four_of = [](int i) { return i / (8 * NT) * 2 + i / 4 % 2; };
  float of_warp[WARPS];
#pragma unroll
  for (int w = 0; w < WARPS; w++) of_warp[w] = factors.get(1, w, row);
#pragma unroll 1
  for (int i = (WARPS - 1 - warp) * 32 + lane; i < ROWS * D / 4; i += WARPS * 32) {
    uint8_t *at = (uint8_t *)(first.exact + exact_place<D>(row, four_of(i) * 4));
    float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll
    for (int w = 0; w < WARPS; w++) /* where there are none, there may be anything */
      if (of_warp[w] > 0) add_scaled(sum, of_warp[w], *(const float4 *)(at + w * sums_at.exact_of_warp));
    *(float4 *)at = sum;
  }
  if (steps > 0) {
#pragma unroll
    for (int w = 0; w < WARPS; w++) of_warp[w] = factors.get(0, w, row);
    const float l = __shfl_sync(~0u, factors.l[0], row);
    const float *from = first.codes + row * codes_width(crumbs, NT);
#pragma unroll 1
    for (int i = thread; i < steps * 4 * ROWS; i += WARPS * 32) {
      const int four = four_of(i), more = four - crumbs / 4;
      float4 sum = make_float4(more == 1 ? l : 0, 0, 0, 0);
      if (more <= 0) {
#pragma unroll
        for (int w = 0; w < WARPS; w++)
          add_scaled(sum, of_warp[w], *(const float4 *)((const uint8_t *)(from + four * 4) + w * sums_at.of_warp));
        if (more == 0) sum = make_float4(-sum.x, -sum.y, -sum.z, -sum.w);
      }
      const uint2 number = {pack_bf162(sum.x, sum.y), pack_bf162(sum.z, sum.w)};
      uint2 *to = inputs + (four / 4 * NT + row / 4) * 32 + row % 4 * 8 + four % 4;
      to[0] = number;
      to[4] = make_uint2(pack_bf162(sum.x - low_bf16(number.x), sum.y - high_bf16(number.x)),
                         pack_bf162(sum.z - low_bf16(number.y), sum.w - high_bf16(number.y)));
    }
  }
  __syncthreads();
#pragma unroll 1
  for (int tile = warp; tile < TILES; tile += WARPS) {
    float sums[NT][2][CHAINS][4] = {};
#pragma unroll 1
    for (int from = 0; from < steps; from += TOGETHER) {
      map_part<TOGETHER> lost;
      lost.load(o.map + tile * steps * MAP_STEP, true, from, steps, lane);
      if (tile != warp || from > 0) numbers.load(o.map + tile * steps * MAP_STEP, false, from, steps, lane);
#pragma unroll
      for (int k = 0; k < TOGETHER; k++) {
        if (from + k >= steps) break;
#pragma unroll
        for (int n = 0; n < NT; n++) {
          const uint2 x = inputs[((from + k) * NT + n) * 32 + lane];
          multiply_map(sums[n][0][k % CHAINS], numbers.of[k], x);
          multiply_map(sums[n][1][k % CHAINS], lost.of[k], x);
        }
      }
    }
#pragma unroll
    for (int n = 0; n < NT; n++) {
      const int row = 4 * n + q, channel = tile * 16 + g;
      float x[2];
#pragma unroll
      for (int h = 0; h < 2; h++) x[h] = first.exact[exact_place<D>(row, channel + 8 * h)];
#pragma unroll
      for (int c = 0; c < 2 * CHAINS; c++)
#pragma unroll
        for (int h = 0; h < 2; h++) x[h] += sums[n][c / CHAINS][c % CHAINS][2 * h] + sums[n][c / CHAINS][c % CHAINS][2 * h + 1];
      if (row >= o.tile.rows) continue;
      if (o.shared) {
        float *to = o.part + 2 * DECODE_ROWS + row * D + channel;
        leave_number(to, x[0]), leave_number(to + 8, x[1]);
        continue;
      }
      float *to = o.out + row_offset(o.tile, row, o.kv_heads, o.group, o.head, D) + channel;
      const float scale = 1 / totals[row];
      to[0] = x[0] * scale, to[8] = x[1] * scale;
    }
  }
}

} // namespace decode

#endif
