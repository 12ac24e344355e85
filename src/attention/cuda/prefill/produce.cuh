/*
 * attention/cuda/prefill/produce.cuh - how pages become operands of kernel.cuh: codes and exact rows to fp16 numbers in slots of
 * shared memory. Private.
 */
#ifndef OSCAR_ATTENTION_CUDA_PREFILL_PRODUCE_CUH
#define OSCAR_ATTENTION_CUDA_PREFILL_PRODUCE_CUH

#include "attention/cuda/prefill/data.cuh"

namespace prefill {

/* The map of a KV head, `chunks` operands of numbers and of what fp16 lost of them, into a slot each. By a group. */
template <int D> __device__ inline void produce_map(const void *map, int head, int chunks, ring &slots) {
  constexpr int BYTES = PREFILL_OPERAND_BYTES(D);
  const uint8_t *from = (const uint8_t *)map + (size_t)head * chunks * 2 * BYTES;
  for (int i = 0; i < 2 * chunks; i++) {
    slots.wait_empty();
    if (threadIdx.x % GROUP_THREADS == 0) {
      slots.expect(BYTES);
      slots.copy(0, from + (size_t)i * BYTES, BYTES);
    }
    slots.filled();
    slots.next();
  }
}

/* What crumbs are multiplied with, in both halves: (c - 3/2) gain is what comes out. Log gains: half_gain_of. Else factor is four
 * times the gain. */
struct gain {
  uint32_t factor, offset;
};

/* For log gains, [p = 0, 2, 4, 6][k + 8] of gains. By the whole block. */
__device__ inline void make_gain_table(uint32_t table) {
  if (threadIdx.x >= 64) return;
  const half_gain gain = half_gain_of(threadIdx.x % 16 - 8, threadIdx.x / 16 * 2);
  store_8(table + threadIdx.x * 8, make_uint2(half2_of(__float2half2_rn(gain.factor)), half2_of(__float2half2_rn(gain.offset))));
}
/* The gain of a class in the metadata of a row, for crumbs at bits `place`. */
template <bool LOG> __device__ __forceinline__ gain gain_of(uint32_t table, uint32_t meta, int class_, int place) {
  if (LOG) {
    const uint2 x = load_8(table + place * 64 + (class_ ? meta >> (4 * class_ - 3) & 0x78 : meta << 3 & 0x78));
    return {x.x, x.y};
  }
  return {half2_of(__hmul2(as_half2(__byte_perm(meta, 0, 0x1010)), as_half2(0x44004400u))), 0};
}

/* The crumbs at bits `place` of both half words, place + 8 with `high`. */
template <bool LOG> __device__ __forceinline__ uint32_t numbers(uint32_t word, int high, int place, const gain &gain) {
  if (LOG)
    return half2_of(
        __hfma2(as_half2((high ? word >> 8 : word) & (0x00030003u << place)), as_half2(gain.factor), as_half2(gain.offset)));
  const uint32_t moved = high ? word >> place : word << (8 - place); /* 1 + c / 4; the difference is exact */
  return half2_of(__hmul2(__hsub2(as_half2((moved & 0x03000300u) | 0x3C003C00u), as_half2(0x3D803D80u)), as_half2(gain.factor)));
}
/* The crumbs at bits `place` of bytes. */
template <bool LOG> __device__ __forceinline__ uint2 key_numbers(uint32_t word, int place, const gain &gain) {
  return make_uint2(numbers<LOG>(word, 0, place, gain), numbers<LOG>(word, 1, place, gain));
}

/* What a thread reads of the keys of a page: tokens 16 tile + g and that + 8, tile and lane its own. */
struct key_words {
  uint4 first; /* the first two blocks of each class */
  uint32_t gains[2];
};
__device__ __forceinline__ key_words load_keys(const uint8_t *page, int blocks, int tile, int lane) {
  key_words k;
  if (blocks >= 8) k.first = __ldg((const uint4 *)page + tile * 32 + lane);
  const uint16_t *meta = (const uint16_t *)(page + 256 * blocks) + tile * 16 + lane / 4;
  k.gains[0] = __ldg(meta);
  k.gains[1] = __ldg(meta + 8);
  return k;
}

/* Two blocks of every class: eight crumbs of a token and class lie together. The eight lanes of two tokens meet all banks. */
template <bool LOG>
__device__ __forceinline__ void store_key_pair(const uint32_t (&row)[2], int pair, uint4 words, uint32_t table,
                                               const uint32_t (&meta)[2]) {
#pragma unroll
  for (int high = 0; high < 2; high++)
#pragma unroll
    for (int class_ = 0; class_ < GAIN_CLASSES; class_++) {
      const gain gain = gain_of<LOG>(table, meta[high], class_, 2 * class_);
      const uint2 x = key_numbers<LOG>(high ? words.y : words.x, 2 * class_, gain),
                  y = key_numbers<LOG>(high ? words.w : words.z, 2 * class_, gain);
      store_16((row[high] ^ class_ % 2 * 16) + (2 * pair + class_ / 2) * COLUMN_BYTES, make_uint4(x.x, x.y, y.x, y.y));
    }
}

/* The rest of a page's words: quant/device_form.h has their order, prefill_key_column that of columns. */
template <bool LOG>
__device__ inline void store_other_keys(uint32_t slot, const uint32_t (&place)[2], const uint32_t *words, int blocks,
                                        uint32_t table, const uint32_t (&meta)[2], const int (&row)[2], int tile, int lane) {
  const int full = blocks / KEY_CLASSES, over = blocks % KEY_CLASSES, quarter = lane % 4 * 4;
  /* four crumbs of a block of a class, in the low two bits of bytes */
  auto store_quarter = [&](int high, int class_, int column, uint32_t crumbs) {
    const gain gain = gain_of<LOG>(table, meta[high], class_, 0);
    store_8(slot + column / 64 * COLUMN_BYTES + swizzled(row[high], column / 8) + column % 8 * 2,
            key_numbers<LOG>(crumbs, 0, gain));
  };
  for (int pair = 1; pair < full / 2; pair++)
    store_key_pair<LOG>(place, pair, __ldg((const uint4 *)(words + pair * 512) + tile * 32 + lane), table, meta);
  if (full % 2) {
    const uint2 w = __ldg((const uint2 *)(words + full / 2 * 512 + tile / 2 * 128 + lane * 4 + tile % 2 * 2));
#pragma unroll
    for (int class_ = 0; class_ < GAIN_CLASSES; class_++) {
      const int column = full / 2 * 128 + class_ * 16 + quarter;
      store_quarter(0, class_, column, w.x >> 2 * class_);
      store_quarter(1, class_, column, w.y >> 2 * class_);
    }
  }
  if (over >= 2) {
    const uint32_t w = __ldg(words + full * 256 + lane * 4 + tile);
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int class_ = 2 * i + 1, column = full * 64 + 16 * i + quarter;
      store_quarter(0, class_, column, w >> 2 * class_);
      store_quarter(1, class_, column, w >> (2 * class_ - 2));
    }
  }
  if (over % 2) {
    const int class_ = over == 1 ? 3 : 2, column = full * 64 + (over == 1 ? 0 : 32) + quarter;
    const uint32_t w = __ldg(words + full * 256 + (over == 3 ? 128 : 0) + lane * 2 + tile / 2) >> tile % 2 * 4;
    store_quarter(0, class_, column, w);
    store_quarter(1, class_, column, w >> 2);
  }
}

/* BLOCKS of 16 crumbs; 0: as many as there are. Inputs of turning pairs lie in memory as they do in a slot, and the copy engine
 * brings them: every thread has a run of them, neighbours those of different warps. */
template <int BLOCKS, bool LOG>
__device__ inline void produce_coded_keys(const arguments &a, const struct decode_tile &tile, int head, ring &keys,
                                          uint32_t table) {
  const int warp = threadIdx.x % GROUP_THREADS / 32, lane = threadIdx.x % 32, blocks = BLOCKS ? BLOCKS : a.key_crumbs / 16;
  const int row[2] = {prefill_token_column(warp * 16 + lane / 4), prefill_token_column(warp * 16 + 8 + lane / 4)};
  const int place[2] = {swizzled(row[0], lane % 4 * 2), swizzled(row[1], lane % 4 * 2)};
  const uint8_t *base = a.memory + (size_t)head * a.head_bytes;
  const struct decode_page *list = a.pages + tile.coded_first;
  struct decode_page entry = list[0];
  const uint8_t *page = base + (size_t)entry.unit * a.unit_bytes;
  const uint32_t waves = (uint32_t)((a.key_crumbs + 63) / 64 * COLUMN_BYTES);
  const int run_index = lane * 4 + warp, turning = a.tables.turning_pairs;
  struct wave_run run = {};
  if (run_index < turning) run = a.tables.runs[head * turning + run_index];
  const uint32_t run_to = waves + run.to * PREFILL_WAVE_BYTES;
  const uint8_t *run_from = a.waves + run.from * PREFILL_WAVE_BYTES;
  key_words words = load_keys(page, blocks, warp, lane);
#pragma unroll 1
  for (int i = 0; i < tile.coded_pages; i++) {
    const struct decode_page entry_next = list[min(i + 1, tile.coded_pages - 1)];
    const uint8_t *page_next = base + (size_t)entry_next.unit * a.unit_bytes;
    const key_words words_next = load_keys(page_next, blocks, warp, lane);
    keys.wait_empty();
    const uint32_t places[2] = {keys.at() + place[0], keys.at() + place[1]};
    if (threadIdx.x % GROUP_THREADS == 0 && turning > 0) keys.expect(turning * PREFILL_WAVE_BYTES);
    if (run.pairs > 0) keys.copy(run_to, run_from + (size_t)entry.number * a.wave_bytes, run.pairs * PREFILL_WAVE_BYTES);
    if (blocks >= 8) store_key_pair<LOG>(places, 0, words.first, table, words.gains);
    if (blocks != 8)
      store_other_keys<LOG>(keys.at(), places, (const uint32_t *)page, blocks, table, words.gains, row, warp, lane);
    keys.filled();
    keys.next();
    page = page_next, entry = entry_next, words = words_next;
  }
}

/* What a thread reads of the values of a page: of blocks warp, warp + 4, ..., and gains of tokens 2 lane and 2 lane + 1. */
template <int BLOCKS> struct value_words {
  uint2 words[BLOCKS / 4];
  uint32_t gains;
};
template <int BLOCKS> __device__ __forceinline__ value_words<BLOCKS> load_values(const uint8_t *values, int warp, int lane) {
  value_words<BLOCKS> v;
#pragma unroll
  for (int i = 0; i < BLOCKS / 4; i++) v.words[i] = __ldg((const uint2 *)values + (warp + 4 * i) * 32 + lane);
  v.gains = __ldg((const uint32_t *)(values + 256 * BLOCKS) + lane);
  return v;
}

/* The gains of a lane's two tokens, [a warp's blocks][factors, offsets][column of a token]: crumbs are at bits 4 (k % 2) of
 * tokens 8 k to 8 k + 7 when words have been moved for them. */
template <int BLOCKS, bool LOG>
__device__ __forceinline__ void store_value_gains(uint32_t at, uint32_t table, uint32_t meta, int warp, int lane) {
#pragma unroll
  for (int i = 0; i < BLOCKS / 4; i++) {
    const int class_ = (warp + 4 * i) * GAIN_CLASSES / BLOCKS, place = lane / 4 % 2 * 4;
    const gain a = gain_of<LOG>(table, meta & 0xFFFF, class_, place), b = gain_of<LOG>(table, meta >> 16, class_, place);
    store_4(at + 2 * i * PAGE * 2, __byte_perm(a.factor, b.factor, 0x5410));
    if (LOG) store_4(at + (2 * i + 1) * PAGE * 2, __byte_perm(a.offset, b.offset, 0x5410));
  }
}

/* row: where crumb g of a block, tokens of half 0, begin; gains: of the tokens of this lane, its warp's first block. */
template <int BLOCKS, bool LOG>
__device__ __forceinline__ void store_values(uint32_t row, uint32_t gains, const value_words<BLOCKS> &v, int warp) {
#pragma unroll
  for (int i = 0; i < BLOCKS / 4; i++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const uint32_t word = half ? v.words[i].y : v.words[i].x;
      const uint4 f = load_16(gains + 2 * i * PAGE * 2 + half * 16);
      const uint4 o = LOG ? load_16(gains + (2 * i + 1) * PAGE * 2 + half * 16) : f;
      const gain of[4] = {{f.x, o.x}, {f.y, o.y}, {f.z, o.z}, {f.w, o.w}};
#pragma unroll
      for (int j = 0; j < 2; j++) {
        uint32_t x[4];
#pragma unroll
        for (int k = 0; k < 4; k++)
          x[k] = LOG ? numbers<LOG>(word >> 2 * j, k / 2, k % 2 * 4, of[k]) : numbers<LOG>(word, k / 2, k % 2 * 4 + 2 * j, of[k]);
        store_16((row ^ half * 16) + (warp + 4 * i) * 2048 + j * 1024, make_uint4(x[0], x[1], x[2], x[3]));
      }
    }
}

template <int BLOCKS, bool LOG>
__device__ inline void produce_coded_values(const arguments &a, const struct decode_tile &tile, int head, ring &values,
                                            uint32_t gains, uint32_t table) {
  const int warp = threadIdx.x % GROUP_THREADS / 32, lane = threadIdx.x % 32;
  const uint8_t *base = a.memory + (size_t)head * a.head_bytes + a.value_offset;
  const struct decode_page *list = a.pages + tile.coded_first;
  const uint32_t row = swizzled(lane / 4, lane % 4 * 2), of_warp = gains + warp * 2 * 2 * PAGE * 2,
                 of_lane = of_warp + lane % 4 * 32, of_tokens = of_warp + prefill_token_column(2 * lane) * 2;
  struct decode_page entry = list[0];
  value_words<BLOCKS> words = load_values<BLOCKS>(base + (size_t)entry.unit * a.unit_bytes, warp, lane);
#pragma unroll 1
  for (int i = 0; i < tile.coded_pages; i++) {
    const struct decode_page entry_next = list[min(i + 1, tile.coded_pages - 1)];
    const value_words<BLOCKS> words_next = load_values<BLOCKS>(base + (size_t)entry_next.unit * a.unit_bytes, warp, lane);
    __syncwarp();
    store_value_gains<BLOCKS, LOG>(of_tokens, table, words.gains, warp, lane);
    __syncwarp();
    values.wait_empty();
    store_values<BLOCKS, LOG>(values.at() + row, of_lane, words, warp);
    values.filled();
    values.next();
    words = words_next, entry = entry_next;
  }
}

__device__ __forceinline__ uint32_t fp16_of_bf16(uint32_t x) { return pack_half2(low_bf16(x), high_bf16(x)); }

/* Exact pages of one side: rows of head_dim channels, pieces of 8, a quarter of a thread's pieces at a time. What lies behind
 * `last`, the last position that the tile sees, may be anything: it becomes 0. */
template <int D>
__device__ inline void produce_exact(const arguments &a, const struct decode_tile &tile, int head, int side, int64_t last,
                                     ring &slots) {
  constexpr int PIECES = PAGE * D / 8 / GROUP_THREADS, TOGETHER = PIECES / 2, OF_ROW = D / 8, OF_STEP = GROUP_THREADS / OF_ROW;
  const int thread = threadIdx.x % GROUP_THREADS;
  const uint32_t place =
      thread % OF_ROW / 8 * COLUMN_BYTES + swizzled(thread / OF_ROW, thread % OF_ROW); /* rows 8 on are alike */
  const uint8_t *base = a.memory + ((size_t)head * 2 + side) * PAGE * D * 2;
  const struct decode_page *list = a.pages + tile.exact_first;
  uint4 now[TOGETHER], next[TOGETHER];
  struct decode_page page = list[0];
#pragma unroll
  for (int k = 0; k < TOGETHER; k++)
    next[k] = __ldg((const uint4 *)(base + (size_t)page.unit * a.unit_bytes) + k * GROUP_THREADS + thread);
  for (int i = 0; i < tile.exact_pages; i++) {
    const struct decode_page following = list[min(i + 1, tile.exact_pages - 1)];
    const int visible = (int)min((int64_t)PAGE, last - (int64_t)page.number * PAGE + 1);
#pragma unroll
    for (int part = 0; part < 2; part++) {
      const struct decode_page &from = part ? following : page;
#pragma unroll
      for (int k = 0; k < TOGETHER; k++) {
        now[k] = next[k];
        next[k] = __ldg((const uint4 *)(base + (size_t)from.unit * a.unit_bytes) + ((part ^ 1) * TOGETHER + k) * GROUP_THREADS +
                        thread);
      }
      if (part == 0) slots.wait_empty();
#pragma unroll
      for (int k = 0; k < TOGETHER; k++) {
        const uint4 x =
            make_uint4(fp16_of_bf16(now[k].x), fp16_of_bf16(now[k].y), fp16_of_bf16(now[k].z), fp16_of_bf16(now[k].w));
        store_16(slots.at() + place + (part * TOGETHER + k) * OF_STEP * 128, x);
      }
    }
    if (visible < PAGE)
      for (int k = 0; k < PIECES; k++)
        if (k * OF_STEP + thread / OF_ROW >= visible) store_16(slots.at() + place + k * OF_STEP * 128, make_uint4(0, 0, 0, 0));
    slots.filled();
    slots.next();
    page = following;
  }
}

} // namespace prefill

#endif
