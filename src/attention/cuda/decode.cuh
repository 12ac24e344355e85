/*
 * attention/cuda/decode.cuh - the kernel behind decode_run; decode.cu compiles it for what layers have. Private.
 *
 * A block takes a stretch of the line of work, item after item (an item is a KV head of a tile), and its warps equal parts of
 * that: first tiles of exact pages, then coded pages. Scores, probabilities and sums never leave the registers of a warp. Each
 * warp has a ring of pages that the copy engine fills ahead of it; warps of a block share what belongs to the query, and put
 * their sums together when the block leaves an item. What blocks have of an item is put together by merge.cu.
 */
#ifndef OSCAR_ATTENTION_CUDA_DECODE_CUH
#define OSCAR_ATTENTION_CUDA_DECODE_CUH

#include "attention/cuda/coded_page.cuh"

namespace decode {

constexpr int STAGES = 2;

struct arguments {
  const struct decode_tile *tiles;
  const struct decode_page *pages;
  const float *q;
  const uint8_t *memory;
  size_t unit_bytes;
  const uint8_t *prepared;
  float *parts;
  struct decode_rope rope;
  struct page_forms forms;
  const int32_t *total_units;
  int tile_count, blocks, kv_heads, group, head_dim, window;
  int head_bytes, value_offset, page_bytes; /* page_bytes: what is copied of a page for one head */
  bool coded, waves;
  float scale;
};

/* Shared memory of a block, in bytes from its start. */
struct shared_layout {
  int barriers, log_gains, key_gains, value_gains, operands, constants, amplitudes, curves, mixing, exact_sums, weights, bytes;
};
/* As many warps as registers and shared memory allow. */
__host__ __device__ constexpr int warps_of(int value_blocks, int row_tiles, bool waves) {
  return value_blocks > 16 ? 4 : value_blocks > 8 ? (waves ? 4 : 6) : row_tiles == 2 ? (waves ? 6 : 8) : waves ? 8 : 12;
}

/* Of a warp's sums: [4 NT rows][stride], then (m, l) of every row. */
__host__ __device__ inline int warp_sums_bytes(const arguments &a, int row_tiles) {
  return row_tiles * 4 * (part_stride(a.head_dim, a.forms.value_crumbs) + 2) * 4;
}

__host__ __device__ inline struct shared_layout shared_layout_of(const arguments &a, int warps, int row_tiles) {
  struct shared_layout s;
  int at = warps * STAGES * a.page_bytes;
  s.barriers = at, at += 8 * (warps * STAGES + 2); /* one for the block, one unused */
  at = (at + 63) / 64 * 64;
  s.log_gains = at, at += 64;
  at = (at + 127) / 128 * 128;
  s.key_gains = at, at += a.coded ? warps * 1280 : 0;  /* [64] of 4 floats, [64] s z */
  s.value_gains = at, at += a.coded ? warps * 512 : 0; /* [16 tokens][q][upper][class] of a word */
  s.operands = at, at += row_tiles * a.forms.key_crumbs / 16 * 128;
  s.constants = at, at += DECODE_ROWS * (int)sizeof(struct row_constants);
  s.amplitudes = at, at += a.waves ? 4 * row_tiles * a.rope.fast * 8 : 0;
  at = (at + 127) / 128 * 128;
  s.curves = at, at += a.waves ? a.rope.curves / 16 * 4096 : 0;
  s.mixing = at, at += a.waves ? a.rope.pairs / 8 * row_tiles * 8 * 512 : 0;
  s.exact_sums = at, at += warps * warp_sums_bytes(a, row_tiles);
  s.weights = at; /* and sums of coded pages, once no weights are needed */
  const int weights = a.waves ? warps * WAVE_PAGES * row_tiles * a.rope.curves / 16 * 256 : 0,
            sums = warps * warp_sums_bytes(a, row_tiles);
  at += weights > sums ? weights : a.coded ? sums : 0;
  s.bytes = at;
  return s;
}

/* ---- the ring of pages of a warp ---- */

struct ring {
  uint8_t *pages; /* [STAGES][page_bytes] */
  uint64_t *barriers;
  uint32_t issued, taken;
};

/* Pages of a list that a warp is to read, looked up 32 at a time. */
struct page_list {
  const struct decode_page *from;
  int count, base;
  struct decode_page mine;
};
__device__ inline void list_start(page_list &list, const struct decode_page *from, int count, int lane) {
  list.from = from, list.count = count, list.base = 0;
  if (lane < count) list.mine = from[lane];
}
__device__ inline int list_unit(page_list &list, int i, int lane) {
  if (i >= list.base + 32) {
    list.base += 32;
    if (list.base + lane < list.count) list.mine = list.from[list.base + lane];
  }
  return __shfl_sync(~0u, list.mine.unit, i - list.base);
}

/* ---- leaving an item ---- */

/* Where a warp puts its sums. */
struct warp_sums {
  float *sums;
  float2 *states;
};
template <int NT> __device__ inline warp_sums sums_of_warp(const arguments &a, uint8_t *memory, int warp) {
  float *at = (float *)(memory + warp * warp_sums_bytes(a, NT));
  return {at, (float2 *)(at + 4 * NT * part_stride(a.head_dim, a.forms.value_crumbs))};
}

/* Maxima are stored less `shift`: what the probabilities were made larger by. */
template <int NT> __device__ inline void store_states(softmax<NT> &state, const warp_sums &to, int lane, float shift) {
#pragma unroll
  for (int n = 0; n < NT; n++) {
#pragma unroll
    for (int step = 4; step < 32; step *= 2) state.l[n] += __shfl_xor_sync(~0u, state.l[n], step);
    if (lane < 4) to.states[n * 4 + lane] = make_float2(state.m[n] - shift, state.l[n]);
  }
}
template <int NT> __device__ inline void store_no_states(const warp_sums &to, int lane) {
  if (lane < 4 * NT) to.states[lane] = make_float2(NONE, 0);
}

/* The sums of all warps, put together, into a part. By the whole block; `width` sums of each row count. */
template <int NT, int WARPS> __device__ inline void store_part(const arguments &a, uint8_t *memory, int width, float *part) {
  const int stride = part_stride(a.head_dim, a.forms.value_crumbs);
  for (int i = threadIdx.x; i < 4 * NT * width / 4; i += WARPS * 32) {
    const int row = i / (width / 4), column = i % (width / 4) * 4;
    float m = NONE;
#pragma unroll
    for (int w = 0; w < WARPS; w++) m = fmaxf(m, sums_of_warp<NT>(a, memory, w).states[row].x);
    float4 sum = {};
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
      const warp_sums from = sums_of_warp<NT>(a, memory, w);
      if (!(from.states[row].x > NONE)) continue;
      const float f = exp2_fast(from.states[row].x - m);
      const float4 x = *(const float4 *)(from.sums + row * stride + column);
      sum.x += f * x.x, sum.y += f * x.y, sum.z += f * x.z, sum.w += f * x.w;
    }
    *(float4 *)(part + 2 * DECODE_ROWS + row * stride + column) = sum;
  }
  if (threadIdx.x < 4 * NT) {
    const int row = threadIdx.x;
    float m = NONE, l = 0;
    for (int w = 0; w < WARPS; w++) m = fmaxf(m, sums_of_warp<NT>(a, memory, w).states[row].x);
    for (int w = 0; w < WARPS; w++) {
      const float2 from = sums_of_warp<NT>(a, memory, w).states[row];
      if (from.x > NONE) l += from.y * exp2_fast(from.x - m);
    }
    ((float2 *)part)[row] = make_float2(m, l);
  }
}

/* ---- exact pages ---- */

/* Tiles of 16 tokens, `from` to `to` - 1, of one warp. Scores and sums as for codes, with BF16 operands from global memory: a
 * lane's 16 bytes are eight channels of a token, in whatever order of inputs both operands agree on. Queries and probabilities
 * come as two BF16 numbers each, in neighbouring columns. */
template <int D, int NT>
__device__ inline void read_exact(const arguments &a, const struct decode_tile &tile, int head, int from, int to,
                                  const warp_sums &sums) {
  constexpr int STEPS = D / 32, CHUNKS = (D + 63) / 64;
  const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
  softmax<NT> state;
  float acc[NT][CHUNKS * 4][4] = {};
  int64_t seen[NT]; /* the last position that this lane's row sees */
#pragma unroll
  for (int n = 0; n < NT; n++) {
    state.m[n] = NONE, state.l[n] = 0;
    const int row = n * 4 + q;
    seen[n] = row < tile.rows ? tile.position + (tile.first_row + row) / a.group : -1;
  }
  const int64_t last = tile.position + (tile.first_row + tile.rows - 1) / a.group;
  uint32_t operand[NT][STEPS][4];
#pragma unroll
  for (int n = 0; n < NT; n++) {
    const int row = n * 4 + g / 2;
    const float *mine = a.q + row_offset(tile, row < tile.rows ? row : 0, a.kv_heads, a.group, head, D);
    const float scale = row < tile.rows ? a.scale : 0;
#pragma unroll
    for (int j = 0; j < STEPS; j++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const float2 x = *(const float2 *)(mine + 32 * j + 8 * q + 2 * i);
        uint32_t packed = pack_bf162(x.x * scale, x.y * scale);
        if (g % 2) packed = pack_bf162(x.x * scale - low_bf16(packed), x.y * scale - high_bf16(packed));
        operand[n][j][i] = packed;
      }
  }
  for (int i = from; i < to; i++) {
    const struct decode_page page = a.pages[tile.exact_first + i / 4];
    const uint16_t *keys =
        (const uint16_t *)(a.memory + (size_t)page.unit * a.unit_bytes) + (size_t)head * 2 * 64 * D + i % 4 * 16 * D;
    const uint16_t *values = keys + 64 * D;
    const int64_t position = (int64_t)page.number * 64 + i % 4 * 16;
    float s[NT][4] = {};
    uint4 v[CHUNKS][4];
    {
      uint4 low[STEPS], high[STEPS];
#pragma unroll
      for (int j = 0; j < STEPS; j++) {
        low[j] = *(const uint4 *)(keys + g * D + 32 * j + 8 * q);
        high[j] = *(const uint4 *)(keys + (g + 8) * D + 32 * j + 8 * q);
      }
#pragma unroll
      for (int chunk = 0; chunk < CHUNKS; chunk++)
#pragma unroll
        for (int j = 0; j < 4; j++) {
          const int token = 2 * q + j % 2 + j / 2 * 8, channel = 8 * (g + 8 * chunk);
          v[chunk][j] = make_uint4(0, 0, 0, 0); /* what lies behind the last position may be anything */
          if (position + token <= last && (D % 64 == 0 || channel < D))
            v[chunk][j] = *(const uint4 *)(values + token * D + channel);
        }
#pragma unroll
      for (int j = 0; j < STEPS; j++)
#pragma unroll
        for (int n = 0; n < NT; n++) {
          mma_bf16(s[n], low[j].x, high[j].x, low[j].y, high[j].y, operand[n][j][0], operand[n][j][1]);
          mma_bf16(s[n], low[j].z, high[j].z, low[j].w, high[j].w, operand[n][j][2], operand[n][j][3]);
        }
    }
    float score[NT][2], largest[NT], factor[NT];
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
      for (int j = 0; j < 2; j++) {
        const int64_t at = position + g + 8 * j;
        const bool visible = at <= seen[n] && (a.window == 0 || at > seen[n] - a.window);
        score[n][j] = visible ? s[n][2 * j] + s[n][2 * j + 1] : NONE;
      }
#pragma unroll
    for (int n = 0; n < NT; n++) largest[n] = fmaxf(score[n][0], score[n][1]);
    if (raise_maxima<NT>(largest, state, factor)) {
#pragma unroll
      for (int n = 0; n < NT; n++)
#pragma unroll
        for (int b = 0; b < CHUNKS * 4; b++)
#pragma unroll
          for (int j = 0; j < 4; j++) acc[n][b][j] *= factor[n];
    }
    uint32_t p[NT][2];
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
      for (int j = 0; j < 2; j++) {
        const float x = score[n][j] > NONE ? exp2_fast(score[n][j] - state.m[n]) : 0;
        state.l[n] += x;
        const uint32_t rounded = pack_bf162(x, 0);
        p[n][j] = transpose_8x8(pack_bf162(x, x - low_bf16(rounded)));
      }
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; chunk++) {
      const uint32_t *v0 = &v[chunk][0].x, *v1 = &v[chunk][1].x, *v2 = &v[chunk][2].x, *v3 = &v[chunk][3].x;
#pragma unroll
      for (int b = 0; b < 4; b++)
#pragma unroll
        for (int n = 0; n < NT; n++)
          mma_bf16(acc[n][chunk * 4 + b], __byte_perm(v0[b], v1[b], 0x5410), __byte_perm(v0[b], v1[b], 0x7632),
                   __byte_perm(v2[b], v3[b], 0x5410), __byte_perm(v2[b], v3[b], 0x7632), p[n][0], p[n][1]);
    }
  }
  store_states<NT>(state, sums, lane, 0);
  const int stride = part_stride(D, a.forms.value_crumbs);
#pragma unroll
  for (int n = 0; n < NT; n++)
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; chunk++) {
      const int channel = 8 * (g + 8 * chunk);
      if (D % 64 != 0 && channel >= D) continue;
      float *to = sums.sums + (n * 4 + q) * stride + channel;
#pragma unroll
      for (int b = 0; b < 4; b++)
        *(float2 *)(to + 2 * b) =
            make_float2(acc[n][chunk * 4 + b][0] + acc[n][chunk * 4 + b][1], acc[n][chunk * 4 + b][2] + acc[n][chunk * 4 + b][3]);
    }
}

/* ---- coded pages, a stretch of a tile's list ---- */

/* What is known when a kernel is compiled. */
template <int D_, int KEY_BLOCKS_, int VALUE_BLOCKS_, int NT_, bool ANY_, bool ANY_VALUES_, int STEPS_> struct traits {
  static constexpr int D = D_, KEY_BLOCKS = KEY_BLOCKS_, VALUE_BLOCKS = VALUE_BLOCKS_, NT = NT_;
  static constexpr bool ANY = ANY_;               /* any number of blocks of keys, any form, a window, or waves */
  static constexpr bool ANY_VALUES = ANY_VALUES_; /* any number of blocks of values, up to VALUE_BLOCKS */
  static constexpr int STEPS = STEPS_; /* of 16 curves of a mean that turns; 0: it does not; ANY: as many as there are */
  static constexpr int WARPS = warps_of(VALUE_BLOCKS_, NT_, ANY_ || STEPS_ > 0);
};

/* The pages of this warp, begun while the block is busy with something else. */
struct coded_stretch {
  const struct decode_page *pages;
  int count, next;
  page_list list;
};

__device__ inline coded_stretch begin_coded(const arguments &a, const struct decode_tile &tile, int head, int from, int to,
                                            ring &ring) {
  const int lane = threadIdx.x % 32;
  coded_stretch c;
  c.count = max(to - from, 0);
  c.pages = a.pages + tile.coded_first + from;
  c.next = 0;
  list_start(c.list, c.pages, c.count, lane);
  const uint8_t *base = a.memory + (size_t)head * a.head_bytes;
#pragma unroll
  for (int i = 0; i < STAGES; i++) {
    if (c.next < c.count) {
      const int unit = list_unit(c.list, c.next, lane), slot = ring.issued % STAGES;
      copy_page(ring.pages + slot * a.page_bytes, base + (size_t)unit * a.unit_bytes, a.page_bytes, ring.barriers + slot, lane);
      ring.issued++, c.next++;
    } else {
      copy_none();
    }
  }
  return c;
}

/* What belongs to the queries, into shared memory. By the whole block; `parity` is that of the block's barrier. */
template <class T>
__device__ inline void load_queries(const arguments &a, const uint8_t *prepared, uint8_t *memory, const shared_layout &layout,
                                    uint64_t *barrier, uint32_t &parity) {
  constexpr int NT = T::NT, THREADS = T::WARPS * 32;
  const bool waves = T::ANY ? a.waves : T::STEPS > 0;
  const int blocks = T::ANY ? a.forms.key_crumbs / 16 : T::KEY_BLOCKS, fast = waves ? a.rope.fast : 0;
  const prepared_layout at = prepared_layout_of(blocks, waves ? a.rope.pairs : 0, fast, NT);
  if (waves) begin_block_copy(memory + layout.mixing, prepared + at.mixing, at.mixing_bytes, barrier);
  for (int i = threadIdx.x; i < NT * blocks * 8; i += THREADS)
    ((uint4 *)(memory + layout.operands))[i] = ((const uint4 *)prepared)[i];
  for (int i = threadIdx.x; i < 4 * NT * (int)sizeof(struct row_constants) / 16; i += THREADS)
    ((uint4 *)(memory + layout.constants))[i] = ((const uint4 *)(prepared + at.constants))[i];
  for (int i = threadIdx.x; i < 4 * NT * fast; i += THREADS)
    ((float2 *)(memory + layout.amplitudes))[i] = ((const float2 *)(prepared + at.amplitudes))[i];
  if (waves) {
    end_block_copy(barrier, parity);
    parity ^= 1;
  }
}

template <class T>
__device__ inline void read_coded(const arguments &a, const struct decode_tile &tile, int head, coded_stretch &c, uint8_t *memory,
                                  const shared_layout &layout, ring &ring) {
  constexpr int NT = T::NT, BLOCKS = T::VALUE_BLOCKS;
  constexpr bool ANY = T::ANY;
  constexpr int STEPS = ANY ? 0 : T::STEPS;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, q = lane % 4, mine = c.count;
  const page_forms &forms = a.forms;
  const uint8_t *base = a.memory + (size_t)head * a.head_bytes;
  const bool waves = ANY ? a.waves : T::STEPS > 0, log_gains = !ANY && forms.key_form == OSCAR_ROW_LOG_GAINS;
  const int blocks = ANY ? forms.key_crumbs / 16 : T::KEY_BLOCKS, steps = ANY ? waves ? a.rope.curves / 16 : 0 : STEPS;
  const uint32_t *operand_words = (const uint32_t *)(memory + layout.operands);
  const struct row_constants *constants = (const struct row_constants *)(memory + layout.constants);
  const float2 *amplitudes = (const float2 *)(memory + layout.amplitudes);
  const uint4 *mixing = (const uint4 *)(memory + layout.mixing);
  query_operands<T::KEY_BLOCKS, NT> operands;
  operands.load(operand_words, lane);
  const int whole[4] = {WHOLE_BITS, WHOLE_BITS, WHOLE_BITS, WHOLE_BITS};
  score_scales<NT> scales;
  float mean[NT], zero[NT];
  softmax<NT> state;
#pragma unroll
  for (int n = 0; n < NT; n++) {
    const struct row_constants &row = constants[n * 4 + q];
#pragma unroll
    for (int p = 0; p < GAIN_CLASSES; p++)
      scales.unit[n][p] = row.unit[p], scales.high[n][p] = row.high_offset[p], scales.low[n][p] = row.low_offset[p];
    mean[n] = row.mean, zero[n] = row.zero;
    state.m[n] = NONE, state.l[n] = 0;
  }
  float acc[BLOCKS][4] = {}, middle[4] = {}, zeros[NT] = {};
  int exponent = forms.value_form == OSCAR_ROW_LOG_GAINS ? 0 : -126;
  const page_gains gains = {(float *)(memory + layout.key_gains) + warp * 320,
                            (float *)(memory + layout.key_gains) + warp * 320 + 256,
                            (__half *)(memory + layout.value_gains) + warp * 256, (const float *)(memory + layout.log_gains)};
  const uint8_t *curves = memory + layout.curves;
  uint32_t *weights = (uint32_t *)(memory + layout.weights) + warp * WAVE_PAGES * NT * 32 * steps * 2;
  const int64_t oldest = ANY && a.window ? tile.position + tile.first_row / a.group - a.window + 1 : 0; /* that any row sees */

#pragma unroll 1
  for (int i = 0; i < mine; i++) {
    if (waves && i % WAVE_PAGES == 0) {
      __syncwarp();
      const int number = __shfl_sync(~0u, c.list.mine.number, min(i + g, mine - 1) - c.list.base);
      make_weights<STEPS, NT>(a.rope, amplitudes, mixing, number, weights, lane);
      __syncwarp();
    }
    const int slot = ring.taken % STAGES;
    copy_wait<STAGES - 1>(ring.barriers + slot, ring.taken / STAGES & 1);
    const uint8_t *page = ring.pages + slot * a.page_bytes;
    const int value_offset = ANY ? a.value_offset : 256 * T::KEY_BLOCKS + 128;
    const uint16_t *value_meta = (const uint16_t *)(page + value_offset + (ANY ? 16 * forms.value_crumbs : 256 * BLOCKS));
    const int before = exponent;
    if (log_gains) {
      expand_key_log_gains(gains, page + 256 * T::KEY_BLOCKS, lane);
      expand_value_log_gains(gains, (const uint8_t *)value_meta, lane);
    } else {
      expand_key_gains(forms, gains, page, lane);
      expand_value_gains(forms, gains, value_meta, exponent, lane);
    }
    __syncwarp();
    if (exponent != before) {
      const float factor = ldexpf(1, max(before - exponent, -126));
#pragma unroll
      for (int b = 0; b < BLOCKS; b++)
#pragma unroll
        for (int j = 0; j < 4; j++) acc[b][j] *= factor;
#pragma unroll
      for (int j = 0; j < 4; j++) middle[j] *= factor;
    }

    float s[4][NT][2], largest[NT];
#pragma unroll
    for (int t = 0; t < 4; t++) {
#pragma unroll
      for (int n = 0; n < NT; n++) s[t][n][0] = s[t][n][1] = mean[n];
      score_tile<T::KEY_BLOCKS, NT>(blocks, (const uint32_t *)page, t, operands, whole, scales, gains.keys, lane, s[t]);
      if (waves) score_curves<STEPS, NT>(curves, steps, t, weights + (i % WAVE_PAGES * NT * 32 + lane) * steps * 2, lane, s[t]);
      if (ANY && forms.key_form == OSCAR_ROW_SCALE_ZERO)
#pragma unroll
        for (int n = 0; n < NT; n++)
#pragma unroll
          for (int j = 0; j < 2; j++) s[t][n][j] -= gains.key_zeros[t * 16 + g + 8 * j] * zero[n];
    }
    if (ANY && a.window) {
      const int64_t first = (int64_t)c.pages[i].number * 64;
      if (first < oldest + tile.rows)
#pragma unroll
        for (int t = 0; t < 4; t++)
#pragma unroll
          for (int n = 0; n < NT; n++)
#pragma unroll
            for (int j = 0; j < 2; j++) {
              const int64_t seen = tile.position + (tile.first_row + n * 4 + q) / a.group;
              if (first + t * 16 + g + 8 * j <= seen - a.window) s[t][n][j] = NONE;
            }
    }
#pragma unroll
    for (int n = 0; n < NT; n++) {
      largest[n] = NONE;
#pragma unroll
      for (int t = 0; t < 4; t++) largest[n] = fmaxf(largest[n], fmaxf(s[t][n][0], s[t][n][1]));
    }
    float factor[NT];
    if (raise_maxima<NT>(largest, state, factor)) {
      const float other = factor[NT - 1];
#pragma unroll
      for (int b = 0; b < BLOCKS; b++) acc[b][0] *= factor[0], acc[b][1] *= other, acc[b][2] *= factor[0], acc[b][3] *= other;
      middle[0] *= factor[0], middle[1] *= other;
#pragma unroll
      for (int n = 0; n < NT; n++) zeros[n] *= factor[n];
    }
    uint32_t p[4][2];
    float shift[NT]; /* without a maximum all is masked, and exp2(-inf - 0) is 0 */
#pragma unroll
    for (int n = 0; n < NT; n++) shift[n] = !ANY || state.m[n] > NONE ? PROBABILITY_SHIFT - state.m[n] : 0;
#pragma unroll
    for (int t = 0; t < 4; t++)
#pragma unroll
      for (int j = 0; j < 2; j++) {
        float x[2] = {0, 0};
#pragma unroll
        for (int n = 0; n < NT; n++) {
          x[n] = exp2_fast(s[t][n][j] + shift[n]);
          state.l[n] += x[n];
        }
        if (ANY && forms.value_form == OSCAR_ROW_SCALE_ZERO) {
          const int token = t * 16 + g + 8 * j;
          const float sz =
              __half2float(__ushort_as_half(value_meta[token])) * __half2float(__ushort_as_half(value_meta[64 + token]));
#pragma unroll
          for (int n = 0; n < NT; n++) zeros[n] = fmaf(x[n], sz, zeros[n]);
        }
        p[t][j] = transpose_8x8(pack_half2(x[0], x[1]));
      }
    sum_values<BLOCKS, T::ANY_VALUES, NT>(forms, (const uint32_t *)(page + value_offset), gains.values, p, lane, acc, middle);
    __syncwarp();
    ring.taken++;
    if (c.next < mine) {
      const int unit_next = list_unit(c.list, c.next, lane), slot_next = ring.issued % STAGES;
      copy_page(ring.pages + slot_next * a.page_bytes, base + (size_t)unit_next * a.unit_bytes, a.page_bytes,
                ring.barriers + slot_next, lane);
      ring.issued++, c.next++;
    } else {
      copy_none();
    }
  }
  if (waves) __syncthreads(); /* sums and weights share memory */
  const warp_sums sums = sums_of_warp<NT>(a, memory + layout.weights, warp);
  store_states<NT>(state, sums, lane, PROBABILITY_SHIFT);
  const int stride = part_stride(a.head_dim, forms.value_crumbs);
  const float low = ldexpf(1, 24 + exponent), high = ldexpf(1, 22 + exponent), one = ldexpf(1, exponent);
#pragma unroll
  for (int b = 0; b < BLOCKS; b++) {
    if (T::ANY_VALUES && b >= forms.value_crumbs / 16) continue;
    float *to = sums.sums + q * stride + b * 16 + g;
    to[0] = acc[b][0] * low;
    to[8] = acc[b][2] * high;
    if (NT == 2) to[4 * stride] = acc[b][1] * low, to[4 * stride + 8] = acc[b][3] * high;
  }
  /* the sum of probabilities times gains of every group: that of any of its classes */
#pragma unroll
  for (int n = 0; n < NT; n++) {
    float *to = sums.sums + (n * 4 + q) * stride + forms.value_crumbs;
    if (ANY && forms.value_form == OSCAR_ROW_SCALE_ZERO) {
#pragma unroll
      for (int step = 4; step < 32; step *= 2) zeros[n] += __shfl_xor_sync(~0u, zeros[n], step);
      if (g < GAIN_CLASSES) to[g] = g == 0 ? zeros[n] : 0;
    } else {
      float x = middle[n] * one; /* of class g, where g < 4 */
      float group = 0;
#pragma unroll
      for (int p = 0; p < GAIN_CLASSES; p++) {
        const float of_class = __shfl_sync(~0u, x, 4 * p + q);
        if ((forms.value_groups == GAIN_CLASSES ? p : p * forms.value_groups / GAIN_CLASSES) == g) group = of_class;
      }
      if (g < GAIN_CLASSES) to[g] = group;
    }
  }
}

/* ---- the line of work ---- */

/* The item that has a unit of the line. */
struct line_item {
  int tile, head, begin; /* begin: its first unit */
};
__device__ inline line_item item_of(const arguments &a, int unit) {
  int low = 0, high = a.tile_count - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (a.tiles[middle].begin <= unit)
      low = middle;
    else
      high = middle - 1;
  }
  const int begin = a.tiles[low].begin, units = a.tiles[low].units, head = (unit - begin) / units;
  return {low, head, begin + head * units};
}

template <class T> __global__ void __launch_bounds__(T::WARPS * 32, 1) kernel(const __grid_constant__ arguments a) {
  constexpr int WARPS = T::WARPS, NT = T::NT;
  extern __shared__ __align__(128) uint8_t memory[];
  start_kernel_after();
  const int total_units = *a.total_units, blocks = working_blocks(total_units, a.blocks);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const shared_layout layout = shared_layout_of(a, WARPS, NT);
  uint64_t *barriers = (uint64_t *)(memory + layout.barriers), *block_barrier = barriers + WARPS * STAGES;
  ring ring = {memory + warp * STAGES * a.page_bytes, barriers + warp * STAGES, 0, 0};
  uint32_t parity = 0;
  if (lane == 0)
#pragma unroll
    for (int i = 0; i < STAGES; i++) copies_init(ring.barriers + i);
  if (threadIdx.x == 0) copies_init(block_barrier);
  copies_visible();
  __syncthreads();
  if ((int)blockIdx.x >= blocks) return; /* before a copy begins that nobody would wait for */
  if (threadIdx.x < 16) ((float *)(memory + layout.log_gains))[threadIdx.x] = exp2f(((int)threadIdx.x - 8) * 0.25f);
  if (a.waves) begin_block_copy(memory + layout.curves, a.rope.curve_words, a.rope.curves / 16 * 4096, block_barrier);

  bool waited = false; /* for what the kernel before leaves: mapped queries, and the end of its use of work space */
  int unit = (int)((long long)total_units * blockIdx.x / blocks);
  const int end = (int)((long long)total_units * (blockIdx.x + 1) / blocks);
  while (unit < end) {
    const line_item item = item_of(a, unit);
    const struct decode_tile tile = a.tiles[item.tile];
    const int stop = min(end, item.begin + tile.units), first = unit - item.begin, last = stop - item.begin;
    const int exact_units = EXACT_WEIGHT * tile.exact_tiles, index = item.tile * a.kv_heads + item.head;
    /* Blocks share out bytes, warps of a block time: to a warp a tile of 16 exact tokens and a coded page are about the same. */
    const int exact_first = (min(first, exact_units) + EXACT_WEIGHT - 1) / EXACT_WEIGHT;
    const int exact_count = (min(last, exact_units) + EXACT_WEIGHT - 1) / EXACT_WEIGHT - exact_first;
    const int coded_first = max(first, exact_units) - exact_units,
              coded_count = max(last, exact_units) - exact_units - coded_first;
    const int from = (exact_count + coded_count) * warp / WARPS, to = (exact_count + coded_count) * (warp + 1) / WARPS;
    const int exact_from = exact_first + min(from, exact_count), exact_to = exact_first + min(to, exact_count);
    coded_stretch stretch =
        begin_coded(a, tile, item.head, coded_first + max(from - exact_count, 0), coded_first + max(to - exact_count, 0), ring);
    if (!waited) {
      wait_for_kernel_before();
      if (a.waves) {
        end_block_copy(block_barrier, parity);
        parity ^= 1;
        __syncthreads(); /* all have seen the end of this copy before the next begins */
      }
    }
    waited = true;
    if (last > exact_units) {
      const bool waves = T::ANY ? a.waves : T::STEPS > 0;
      const prepared_layout prepared =
          prepared_layout_of(a.forms.key_crumbs / 16, waves ? a.rope.pairs : 0, waves ? a.rope.fast : 0, NT);
      load_queries<T>(a, a.prepared + (size_t)index * prepared.bytes, memory, layout, block_barrier, parity);
      __syncthreads();
    }
    const warp_sums exact_sums = sums_of_warp<NT>(a, memory + layout.exact_sums, warp);
    if (exact_from < exact_to)
      read_exact<T::D, NT>(a, tile, item.head, exact_from, exact_to, exact_sums);
    else if (first < exact_units)
      store_no_states<NT>(exact_sums, lane);
    if (last > exact_units) read_coded<T>(a, tile, item.head, stretch, memory, layout, ring);
    __syncthreads();
    const size_t floats = part_floats(T::D, a.forms.value_crumbs);
    if (first < exact_units)
      store_part<NT, WARPS>(a, memory + layout.exact_sums, T::D, a.parts + (size_t)(2 * index + blockIdx.x) * floats);
    if (last > exact_units)
      store_part<NT, WARPS>(a, memory + layout.weights, a.forms.value_crumbs + GAIN_CLASSES,
                            a.parts + (size_t)(2 * index + 1 + blockIdx.x) * floats);
    if (stop < end) __syncthreads();
    unit = stop;
  }
}

} // namespace decode

#endif
