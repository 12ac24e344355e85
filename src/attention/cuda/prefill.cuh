/*
 * attention/cuda/prefill.cuh - the kernel behind prefill_run; prefill.cu compiles it for what layers have. Private.
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
 * in the space of the model. Turning means are further inputs of scores, [pairs][cos, sin][64 tokens] beside the keys: their
 * amplitudes are columns of queries.
 */
#ifndef OSCAR_ATTENTION_CUDA_PREFILL_CUH
#define OSCAR_ATTENTION_CUDA_PREFILL_CUH

#include "attention/cuda/decode_data.cuh"
#include "attention/cuda/instructions.cuh"
#include "attention/cuda/prefill.h"
#include "attention/cuda/warpgroup.cuh"

namespace prefill {

constexpr int THREADS = 512, GROUP_THREADS = 128, GROUP_ROWS = 64, PAGE = 64;
constexpr int CONSUMER_REGISTERS = 192, PRODUCER_REGISTERS = 64;
constexpr int MOST_STAGES = 4;
constexpr int COLUMN_BYTES = PAGE * 128; /* of 64 columns of keys or queries */
/* Probabilities are 2^(score - m + SHIFT), and m is raised only where a score exceeds it by more than LAG: they stay far below
 * the largest fp16 number, and those of 2^-20 are still normal ones. */
constexpr float SHIFT = 6, LAG = 8, LEAST = -1e30f, NONE = -INFINITY;

struct arguments {
  const struct prefill_tile *tiles;
  const struct decode_page *pages;
  float *parts; /* [parts][kv_heads] of sums [PREFILL_ROWS][head_dim], then (m, l) [PREFILL_ROWS] */
  const float *q;
  float *out;
  const uint8_t *memory;
  size_t unit_bytes;
  struct prefill_tables tables;
  const uint8_t *waves;    /* prefill_make_waves */
  const float *value_mean; /* of head 0 */
  size_t value_mean_stride;
  int rope_pairs, tile_count, kv_heads, group, window;
  int key_crumbs, value_crumbs, head_bytes, value_offset;
  bool log_gains;
  int stages, key_slot_bytes, value_slot_bytes, query_bytes; /* query_bytes: of a group */
  float scale;
};

/* Shared memory of a block, in bytes from its start. */
struct shared_layout {
  int queries, keys, values, gains, barriers, bytes;
};
__host__ __device__ inline shared_layout shared_layout_of(const arguments &a) {
  shared_layout s;
  int at = 0;
  s.queries = at, at += 2 * a.query_bytes;
  s.keys = at, at += a.stages * a.key_slot_bytes;
  s.values = at, at += a.stages * a.value_slot_bytes;
  s.gains = at, at += 4 * GAIN_CLASSES * PAGE * 2; /* of a warp each */
  s.barriers = at, at += 4 * MOST_STAGES * 8;
  s.bytes = at;
  return s;
}

/* The slots of one side: where its barriers are, and a place in the ring. */
struct ring {
  uint32_t memory, full, empty; /* shared addresses */
  int slot_bytes, stages, slot;
  uint32_t parity;
  __device__ __forceinline__ uint32_t at() const { return memory + slot * slot_bytes; }
  __device__ __forceinline__ void next() {
    if (++slot == stages) slot = 0, parity ^= 1;
  }
  __device__ __forceinline__ void wait_full() const { barrier_wait(full + 8 * slot, parity); }
  __device__ __forceinline__ void wait_empty() const { barrier_wait(empty + 8 * slot, parity ^ 1); }
  /* By each warp. */
  __device__ __forceinline__ void release() const {
    if (threadIdx.x % 32 == 0) barrier_arrive(empty + 8 * slot);
  }
  __device__ __forceinline__ void filled() const {
    writes_visible_to_products();
    __syncwarp();
    if (threadIdx.x % 32 == 0) barrier_arrive(full + 8 * slot);
  }
};

__device__ __forceinline__ void store_16(uint32_t address, uint4 x) {
  asm volatile("st.shared.v4.b32 [%0], {%1,%2,%3,%4};" ::"r"(address), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w) : "memory");
}
__device__ __forceinline__ void store_8(uint32_t address, uint2 x) {
  asm volatile("st.shared.v2.b32 [%0], {%1,%2};" ::"r"(address), "r"(x.x), "r"(x.y) : "memory");
}
__device__ __forceinline__ void store_4(uint32_t address, uint32_t x) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(x) : "memory");
}

__device__ __forceinline__ uint32_t load_4(uint32_t address) {
  uint32_t x;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(x) : "r"(address) : "memory");
  return x;
}

/* ---- producers ---- */

__device__ __forceinline__ uint32_t half2_of(const __half2 &x) { return *reinterpret_cast<const uint32_t *>(&x); }
__device__ __forceinline__ __half2 as_half2(uint32_t x) { return *reinterpret_cast<__half2 *>(&x); }

/* Two fp16 numbers 1 + c / 4, c a crumb, become (c - 3/2) gain; `gain` is four times that. The difference is exact. */
__device__ __forceinline__ uint32_t times_gain(uint32_t crumbs, uint32_t gain) {
  return half2_of(__hmul2(__hsub2(as_half2(crumbs), as_half2(0x3D803D80u)), as_half2(gain)));
}
constexpr uint32_t ONES = 0x3C3C3C3Cu; /* the high bytes of such numbers without their crumbs */

/* Four crumbs in the low two bits of bytes. */
__device__ __forceinline__ uint2 key_numbers(uint32_t crumbs, uint32_t gain) {
  const uint32_t high = (crumbs & 0x03030303u) | ONES;
  return make_uint2(times_gain(__byte_perm(high, 0, 0x1404), gain), times_gain(__byte_perm(high, 0, 0x3424), gain));
}

/* fp16 gains times four of a row: classes 0 and 1, 2 and 3. */
__device__ __forceinline__ uint2 gains_of(uint32_t word, bool log_gains) {
  constexpr uint32_t LOW = 0xBAA8C200u, HIGH = 0x02010000u; /* coded_page.cuh, log_gains_fp16 */
  if (log_gains) {
    const uint32_t eights = permute_bytes(0x80u, 0, word & 0x8888u) & 0x08080808u, select = word & 0x7777u;
    const uint32_t low = __byte_perm(LOW, LOW, select),
                   high = __byte_perm(HIGH + 0x3C3C3C3Cu, HIGH + 0x40404040u, select) + eights;
    return make_uint2(__byte_perm(low, high, 0x5140), __byte_perm(low, high, 0x7362));
  }
  const uint32_t gain = half2_of(__hmul2(as_half2(__byte_perm(word, 0, 0x1010)), as_half2(0x44004400u)));
  return make_uint2(gain, gain);
}
__device__ __forceinline__ uint32_t gain_of_class(uint2 gains, int class_) {
  return __byte_perm(class_ < 2 ? gains.x : gains.y, 0, class_ % 2 ? 0x3232 : 0x1010);
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
__device__ __forceinline__ void store_key_pair(const uint32_t (&row)[2], int pair, uint4 words, const uint2 (&gains)[2]) {
#pragma unroll
  for (int high = 0; high < 2; high++)
#pragma unroll
    for (int class_ = 0; class_ < GAIN_CLASSES; class_++) {
      const uint32_t gain = gain_of_class(gains[high], class_);
      const uint2 x = key_numbers((high ? words.y : words.x) >> 2 * class_, gain),
                  y = key_numbers((high ? words.w : words.z) >> 2 * class_, gain);
      store_16((row[high] ^ class_ % 2 * 16) + (2 * pair + class_ / 2) * COLUMN_BYTES, make_uint4(x.x, x.y, y.x, y.y));
    }
}
/* Four crumbs of a block of a class. */
__device__ __forceinline__ void store_key_quarter(uint32_t slot, int column, uint32_t crumbs, uint32_t gain, int row) {
  store_8(slot + column / 64 * COLUMN_BYTES + swizzled(row, column / 8) + column % 8 * 2, key_numbers(crumbs, gain));
}

/* The rest of a page's words: quant/device_form.h has their order, prefill_key_column that of columns. */
__device__ inline void store_other_keys(uint32_t slot, const uint32_t (&place)[2], const uint32_t *words, int blocks,
                                        const uint2 (&gains)[2], const int (&row)[2], int tile, int lane) {
  const int full = blocks / KEY_CLASSES, over = blocks % KEY_CLASSES, quarter = lane % 4 * 4;
  for (int pair = 1; pair < full / 2; pair++)
    store_key_pair(place, pair, __ldg((const uint4 *)(words + pair * 512) + tile * 32 + lane), gains);
  if (full % 2) {
    const uint2 w = __ldg((const uint2 *)(words + full / 2 * 512 + tile / 2 * 128 + lane * 4 + tile % 2 * 2));
#pragma unroll
    for (int class_ = 0; class_ < GAIN_CLASSES; class_++) {
      const int column = full / 2 * 128 + class_ * 16 + quarter;
      store_key_quarter(slot, column, w.x >> 2 * class_, gain_of_class(gains[0], class_), row[0]);
      store_key_quarter(slot, column, w.y >> 2 * class_, gain_of_class(gains[1], class_), row[1]);
    }
  }
  if (over >= 2) {
    const uint32_t w = __ldg(words + full * 256 + lane * 4 + tile);
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int class_ = 2 * i + 1, column = full * 64 + 16 * i + quarter;
      store_key_quarter(slot, column, w >> 2 * class_, gain_of_class(gains[0], class_), row[0]);
      store_key_quarter(slot, column, w >> (2 * class_ - 2), gain_of_class(gains[1], class_), row[1]);
    }
  }
  if (over % 2) {
    const int class_ = over == 1 ? 3 : 2, column = full * 64 + (over == 1 ? 0 : 32) + quarter;
    const uint32_t w = __ldg(words + full * 256 + (over == 3 ? 128 : 0) + lane * 2 + tile / 2) >> tile % 2 * 4;
    store_key_quarter(slot, column, w, gain_of_class(gains[0], class_), row[0]);
    store_key_quarter(slot, column, w >> 2, gain_of_class(gains[1], class_), row[1]);
  }
}

/* Inputs of turning pairs, rows of 64 tokens, go as they are from global memory to the slot. 256 threads of both groups take a
 * piece of 16 bytes of every 32nd row; COUNT pieces each, 0: none, -1: as many as there are. */
template <int COUNT> struct waves {
  uint32_t from[COUNT > 0 ? COUNT : 1], to;
  uint4 pieces[COUNT > 0 ? COUNT : 1];

  __device__ __forceinline__ void start(const arguments &a, int head) {
    if (COUNT == 0) return;
    const int thread = threadIdx.x - 2 * GROUP_THREADS;
    to = (a.key_crumbs + 63) / 64 * COLUMN_BYTES + swizzled(thread / 8, thread % 8);
    if (COUNT > 0)
#pragma unroll
      for (int i = 0; i < COUNT; i++) from[i] = source(a, head, i);
  }
  __device__ __forceinline__ static uint32_t source(const arguments &a, int head, int i) {
    const int thread = threadIdx.x - 2 * GROUP_THREADS, row = i * 32 + thread / 8;
    const int pair = __ldg(a.tables.pairs + head * a.tables.turning_pairs + row / 2);
    return (uint32_t)((pair * 2 + row % 2) * 128 + thread % 8 * 16);
  }
  __device__ __forceinline__ static const uint8_t *page(const arguments &a, int number) {
    return a.waves + (size_t)number * a.rope_pairs * PREFILL_WAVE_BYTES;
  }
  __device__ __forceinline__ void load(const arguments &a, int number) {
#pragma unroll
    for (int i = 0; i < COUNT; i++) pieces[i] = __ldg((const uint4 *)(page(a, number) + from[i]));
  }
  __device__ __forceinline__ void store(const arguments &a, int head, int number, uint32_t slot) const {
    if (COUNT == -1) {
      for (int i = 0; i < a.tables.turning_pairs / 16; i++)
        store_16(slot + to + i * 32 * 128, __ldg((const uint4 *)(page(a, number) + source(a, head, i))));
    } else {
#pragma unroll
      for (int i = 0; i < COUNT; i++) store_16(slot + to + i * 32 * 128, pieces[i]);
    }
  }
};

/* BLOCKS of 16 crumbs; 0: as many as there are. */
template <int BLOCKS, int WAVES>
__device__ inline void produce_coded_keys(const arguments &a, const struct decode_tile &tile, int head, ring &keys) {
  const int warp = threadIdx.x % GROUP_THREADS / 32, lane = threadIdx.x % 32, blocks = BLOCKS ? BLOCKS : a.key_crumbs / 16;
  const int row[2] = {prefill_token_column(warp * 16 + lane / 4), prefill_token_column(warp * 16 + 8 + lane / 4)};
  const int place[2] = {swizzled(row[0], lane % 4 * 2), swizzled(row[1], lane % 4 * 2)};
  const uint8_t *base = a.memory + (size_t)head * a.head_bytes;
  const struct decode_page *list = a.pages + tile.coded_first;
  struct decode_page entry = list[0];
  const uint8_t *page = base + (size_t)entry.unit * a.unit_bytes;
  waves<WAVES> waves;
  waves.start(a, head);
  key_words words = load_keys(page, blocks, warp, lane);
  waves.load(a, entry.number);
#pragma unroll 1
  for (int i = 0; i < tile.coded_pages; i++) {
    const struct decode_page entry_next = list[min(i + 1, tile.coded_pages - 1)];
    const uint8_t *page_next = base + (size_t)entry_next.unit * a.unit_bytes;
    const key_words words_next = load_keys(page_next, blocks, warp, lane);
    const uint2 gains[2] = {gains_of(words.gains[0], a.log_gains), gains_of(words.gains[1], a.log_gains)};
    keys.wait_empty();
    const uint32_t places[2] = {keys.at() + place[0], keys.at() + place[1]};
    waves.store(a, head, entry.number, keys.at());
    waves.load(a, entry_next.number);
    if (blocks >= 8) store_key_pair(places, 0, words.first, gains);
    if (blocks != 8) store_other_keys(keys.at(), places, (const uint32_t *)page, blocks, gains, row, warp, lane);
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

/* Gains of a page, [class][column of a token], of two tokens from `at` on. */
__device__ __forceinline__ void store_value_gains(uint32_t at, uint32_t words, bool log_gains) {
  const uint2 a = gains_of(words & 0xFFFF, log_gains), b = gains_of(words >> 16, log_gains);
  store_4(at, __byte_perm(a.x, b.x, 0x5410));
  store_4(at + PAGE * 2, __byte_perm(a.x, b.x, 0x7632));
  store_4(at + 2 * PAGE * 2, __byte_perm(a.y, b.y, 0x5410));
  store_4(at + 3 * PAGE * 2, __byte_perm(a.y, b.y, 0x7632));
}

/* row: where crumb g of a block, tokens of half 0, begin; gains: of the tokens of this lane, class 0. */
template <int BLOCKS>
__device__ __forceinline__ void store_values(uint32_t row, uint32_t gains, const value_words<BLOCKS> &v, int warp) {
#pragma unroll
  for (int i = 0; i < BLOCKS / 4; i++) {
    const int block = warp + 4 * i, class_ = block * GAIN_CLASSES / BLOCKS;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const uint32_t word = half ? v.words[i].y : v.words[i].x;
      uint4 gain;
      asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4];"
                   : "=r"(gain.x), "=r"(gain.y), "=r"(gain.z), "=r"(gain.w)
                   : "r"(gains + class_ * PAGE * 2 + half * 16)
                   : "memory");
      const uint32_t of[4] = {gain.x, gain.y, gain.z, gain.w};
#pragma unroll
      for (int j = 0; j < 2; j++) {
        uint32_t x[4];
#pragma unroll
        for (int k = 0; k < 4; k++) {
          const int at = 4 * k + 2 * j; /* of the lower crumb's two bits; they are to be bits 8 and 9 */
          const uint32_t crumbs = at <= 8 ? word << (8 - at) : word >> (at - 8);
          x[k] = times_gain((crumbs & 0x03000300u) | 0x3C003C00u, of[k]);
        }
        store_16((row ^ half * 16) + block * 2048 + j * 1024, make_uint4(x[0], x[1], x[2], x[3]));
      }
    }
  }
}

template <int BLOCKS, int WAVES>
__device__ inline void produce_coded_values(const arguments &a, const struct decode_tile &tile, int head, ring &keys,
                                            ring &values, uint32_t gains) {
  const int warp = threadIdx.x % GROUP_THREADS / 32, lane = threadIdx.x % 32;
  const uint8_t *base = a.memory + (size_t)head * a.head_bytes + a.value_offset;
  const struct decode_page *list = a.pages + tile.coded_first;
  const uint32_t row = swizzled(lane / 4, lane % 4 * 2), of_warp = gains + warp * GAIN_CLASSES * PAGE * 2,
                 of_lane = of_warp + lane % 4 * 32, of_tokens = of_warp + prefill_token_column(2 * lane) * 2;
  struct decode_page entry = list[0];
  waves<WAVES> waves;
  waves.start(a, head);
  value_words<BLOCKS> words = load_values<BLOCKS>(base + (size_t)entry.unit * a.unit_bytes, warp, lane);
  waves.load(a, entry.number);
#pragma unroll 1
  for (int i = 0; i < tile.coded_pages; i++) {
    const struct decode_page entry_next = list[min(i + 1, tile.coded_pages - 1)];
    const value_words<BLOCKS> words_next = load_values<BLOCKS>(base + (size_t)entry_next.unit * a.unit_bytes, warp, lane);
    if (WAVES) {
      keys.wait_empty();
      waves.store(a, head, entry.number, keys.at());
      waves.load(a, entry_next.number);
      keys.filled();
      keys.next();
    }
    __syncwarp();
    store_value_gains(of_tokens, words.gains, a.log_gains);
    __syncwarp();
    values.wait_empty();
    store_values<BLOCKS>(values.at() + row, of_lane, words, warp);
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
                                     ring &slots, ring *also) {
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
      if (part == 0) {
        slots.wait_empty();
        if (also) { /* keys have no columns from this group here, but their barrier counts it */
          also->wait_empty();
          also->filled();
          also->next();
        }
      }
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

/* ---- consumers ---- */

/* Which positions the two rows of a lane see: those up to `seen`, and after seen - window. */
struct sight {
  int64_t seen[2], all_from, all_to; /* every row of the group sees positions all_from .. all_to */
  int window;
};

/* -infinity for the scores of a page, first position `first`, that a row does not see. */
template <bool EXACT> __device__ __forceinline__ void hide(float (&s)[32], const sight &sight, int64_t first, int lane) {
  const int q = lane % 4;
#pragma unroll
  for (int j = 0; j < 8; j++)
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int64_t at = first + (EXACT ? 8 * j + 2 * q + i : 32 * (j % 2) + 8 * q + 2 * (j / 2) + i);
#pragma unroll
      for (int h = 0; h < 2; h++)
        if (at > sight.seen[h] || (sight.window && at <= sight.seen[h] - sight.window)) s[4 * j + 2 * h + i] = NONE;
    }
}

/* Scores to probabilities, in place. Returns whether maxima rose: earlier sums are to be multiplied with `factor`. */
__device__ __forceinline__ bool make_probabilities(float (&s)[32], float (&m)[2], float (&l)[2], float (&factor)[2]) {
  float largest[2] = {NONE, NONE};
#pragma unroll
  for (int j = 0; j < 8; j++)
#pragma unroll
    for (int h = 0; h < 2; h++) largest[h] = fmaxf(largest[h], fmaxf(s[4 * j + 2 * h], s[4 * j + 2 * h + 1]));
#pragma unroll
  for (int h = 0; h < 2; h++)
#pragma unroll
    for (int step = 1; step < 4; step *= 2) largest[h] = fmaxf(largest[h], __shfl_xor_sync(~0u, largest[h], step));
  const bool rose = __any_sync(~0u, largest[0] > m[0] + LAG || largest[1] > m[1] + LAG);
  if (rose)
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const float raised = fmaxf(m[h], largest[h]);
      factor[h] = exp2_fast(m[h] - raised);
      m[h] = raised;
      l[h] *= factor[h];
    }
  const float shift[2] = {SHIFT - m[0], SHIFT - m[1]};
#pragma unroll
  for (int j = 0; j < 8; j++)
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const float x = exp2_fast(s[4 * j + 2 * h] + shift[h]), y = exp2_fast(s[4 * j + 2 * h + 1] + shift[h]);
      l[h] += x + y;
      s[4 * j + 2 * h] = x, s[4 * j + 2 * h + 1] = y;
    }
  return rose;
}

__device__ __forceinline__ void pack_probabilities(const float (&s)[32], uint32_t (&p)[4][4]) {
#pragma unroll
  for (int k = 0; k < 4; k++)
#pragma unroll
    for (int i = 0; i < 4; i++) p[k][i] = pack_half2(s[8 * k + 2 * i], s[8 * k + 2 * i + 1]);
}

/* The first 16-column steps of queries stay in registers, where shared memory need not be read for them again and again. */
constexpr int HELD_STEPS = 8;
template <int STEPS> constexpr int HELD = STEPS == 0 ? 1 : STEPS < HELD_STEPS ? STEPS : HELD_STEPS;

/* What the scores of a page are summed up over. STEPS of 16 inputs, of which those from TURNING on are turning pairs; 0: as many
 * as the numbers say. */
template <int STEPS_, int TURNING_> struct score_steps { static constexpr int STEPS = STEPS_, TURNING = TURNING_; };
struct step_numbers {
  int steps, turning;
};
template <class S>
__device__ __forceinline__ void begin_scores(float (&s)[32], const uint32_t (&held)[HELD<S::STEPS>][4], uint32_t queries,
                                             uint32_t keys, step_numbers numbers) {
  const uint64_t a = operand_descriptor(queries, 16), b = operand_descriptor(keys, 16);
  if (S::STEPS) {
    constexpr int WAVES = (S::TURNING + 3) / 4 * COLUMN_BYTES;
#pragma unroll
    for (int k = 0; k < S::STEPS; k++) {
      const int offset = (k / 4 * COLUMN_BYTES + k % 4 * 32) >> 4;
      if (k >= S::TURNING)
        product_64<true>(s, a + offset, b + ((WAVES + (k - S::TURNING) * 2048) >> 4), false);
      else if (k < HELD<S::STEPS>)
        product_64(s, held[k], b + offset, k == 0);
      else
        product_64<false>(s, a + offset, b + offset, false);
    }
  } else {
    for (int k = 0; k < numbers.turning; k++) {
      const int offset = (k / 4 * COLUMN_BYTES + k % 4 * 32) >> 4;
      product_64<false>(s, a + offset, b + offset, k == 0);
    }
    for (int k = numbers.turning; k < numbers.steps; k++)
      product_64<true>(s, a + ((k / 4 * COLUMN_BYTES + k % 4 * 32) >> 4),
                       b + (((numbers.turning + 3) / 4 * COLUMN_BYTES + (k - numbers.turning) * 2048) >> 4), false);
  }
  products_commit();
}
template <bool EXACT, int N>
__device__ __forceinline__ void begin_sums(float (&o)[N], const uint32_t (&p)[4][4], uint32_t values) {
  const uint64_t b = operand_descriptor(values, EXACT ? COLUMN_BYTES : 16);
#pragma unroll
  for (int k = 0; k < 4; k++) product_from_registers<EXACT>(o, p[k], b + ((EXACT ? 16 * 128 * k : 32 * k) >> 4));
  products_commit();
}

/* Reads `pages` pages of one form, at least one. The scores of a page are under way while the probabilities of the one before are
 * multiplied with its values. */
template <bool EXACT, class S, int N>
__device__ __forceinline__ void consume(ring &keys, ring &values, uint32_t queries, step_numbers numbers,
                                        const struct decode_page *list, int pages, const sight &sight, float (&o)[N],
                                        float (&m)[2], float (&l)[2]) {
  constexpr int STEPS = S::STEPS;
  const int lane = threadIdx.x % 32;
  float s[32] = {}, factor[2];
  uint32_t p[4][4], held[HELD<STEPS>][4];
  if (STEPS)
#pragma unroll
    for (int k = 0; k < HELD<STEPS>; k++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int row = threadIdx.x % GROUP_THREADS / 32 * 16 + lane / 4 + i % 2 * 8, piece = 2 * k + i / 2;
        held[k][i] = load_4(queries + piece / 8 * COLUMN_BYTES + swizzled(row, piece) + lane % 4 * 4);
      }
  auto hide_some = [&](int page) {
    if (!EXACT && sight.window == 0) return;
    const int64_t first = (int64_t)__ldg(&list[page].number) * PAGE;
    if (first < sight.all_from || first + PAGE - 1 > sight.all_to) hide<EXACT>(s, sight, first, lane);
  };
  keys.wait_full();
  products_begin();
  begin_scores<S>(s, held, queries, keys.at(), numbers);
  products_wait<0>();
  keys.release();
  keys.next();
  hide_some(0);
  if (make_probabilities(s, m, l, factor))
#pragma unroll
    for (int j = 0; j < N; j++) o[j] *= factor[j / 2 % 2];
  pack_probabilities(s, p);
#pragma unroll 1
  for (int page = 1; page < pages; page++) {
    keys.wait_full();
    products_begin();
    begin_scores<S>(s, held, queries, keys.at(), numbers);
    values.wait_full();
    begin_sums<EXACT>(o, p, values.at());
    products_wait<1>();
    keys.release();
    keys.next();
    hide_some(page);
    const bool rose = make_probabilities(s, m, l, factor);
    products_wait<0>();
    values.release();
    values.next();
    if (rose)
#pragma unroll
      for (int j = 0; j < N; j++) o[j] *= factor[j / 2 % 2];
    pack_probabilities(s, p);
  }
  values.wait_full();
  products_begin();
  begin_sums<EXACT>(o, p, values.at());
  products_wait<0>();
  values.release();
  values.next();
}

/* A group without rows lets pages pass. */
__device__ inline void let_pass(ring &keys, ring &values, int pages) {
  for (int i = 0; i < pages; i++) {
    keys.wait_full();
    keys.release();
    keys.next();
    values.wait_full();
    values.release();
    values.next();
  }
}

/* The two rows of a lane, as numbers of rows of the tile; where they are in q and out. */
struct lane_rows {
  int row[2];
  bool there[2];
  size_t offset[2];
};
template <int D>
__device__ inline lane_rows lane_rows_of(const arguments &a, const struct decode_tile &tile, int head, int group) {
  lane_rows r;
#pragma unroll
  for (int h = 0; h < 2; h++) {
    r.row[h] = group * GROUP_ROWS + threadIdx.x % GROUP_THREADS / 32 * 16 + threadIdx.x % 32 / 4 + 8 * h;
    r.there[h] = r.row[h] < tile.rows;
    r.offset[h] = row_offset(tile, r.there[h] ? r.row[h] : 0, a.kv_heads, a.group, head, D);
  }
  return r;
}

/* Channels 16 k .. 16 k + 15 of a warp's 16 queries, scaled, as operand A; rest: what fp16 lost. */
__device__ __forceinline__ void load_queries(const arguments &a, const lane_rows &rows, int k, uint32_t (&value)[4],
                                             uint32_t (&rest)[4]) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int h = i % 2, channel = 16 * k + i / 2 * 8 + threadIdx.x % 4 * 2;
    float2 x = *(const float2 *)(a.q + rows.offset[h] + channel);
    x.x = rows.there[h] ? x.x * a.scale : 0, x.y = rows.there[h] ? x.y * a.scale : 0;
    value[i] = pack_half2(x.x, x.y);
    rest[i] = rest_half2(x.x, x.y, value[i]);
  }
}

/* Queries in the space of codes, as operand A of scores; returns what the mean adds to the scores of a lane's rows. */
template <int D>
__device__ inline void map_queries(const arguments &a, const lane_rows &rows, int head, uint32_t to, float (&mean)[2]) {
  constexpr int STEPS = D / 16;
  const int lane = threadIdx.x % 32, tiles = a.tables.key_columns / 8;
  const uint4 *map = (const uint4 *)a.tables.keys + (size_t)head * (tiles + 1) * STEPS * 32 + lane;
  const float scale = a.tables.scales[2 * head];
  uint32_t value[STEPS][4], rest[STEPS][4];
#pragma unroll
  for (int k = 0; k < STEPS; k++) load_queries(a, rows, k, value[k], rest[k]);
#pragma unroll 1
  for (int tile = 0; tile <= tiles; tile++) {
    uint4 b[STEPS];
    float c[4] = {}, d[4] = {};
#pragma unroll
    for (int k = 0; k < STEPS; k++) b[k] = __ldg(map + (tile * STEPS + k) * 32);
#pragma unroll
    for (int k = 0; k < STEPS; k++) {
      mma_fp16(c, value[k][0], value[k][1], value[k][2], value[k][3], b[k].x, b[k].y);
      mma_fp16(d, rest[k][0], rest[k][1], rest[k][2], rest[k][3], b[k].x, b[k].y);
      mma_fp16(d, value[k][0], value[k][1], value[k][2], value[k][3], b[k].z, b[k].w);
    }
#pragma unroll
    for (int i = 0; i < 4; i++) c[i] = (c[i] + d[i]) * scale;
    if (tile == tiles) { /* its first column is the mean */
      mean[0] = __shfl_sync(~0u, c[0], lane / 4 * 4);
      mean[1] = __shfl_sync(~0u, c[2], lane / 4 * 4);
      return;
    }
    const uint32_t at = to + tile / 8 * COLUMN_BYTES + lane % 4 * 4;
#pragma unroll
    for (int h = 0; h < 2; h++) store_4(at + swizzled(rows.row[h] % GROUP_ROWS, tile % 8), pack_half2(c[2 * h], c[2 * h + 1]));
  }
}

template <int D> __device__ inline void store_queries(const arguments &a, const lane_rows &rows, uint32_t to) {
#pragma unroll
  for (int k = 0; k < D / 16; k++) {
    uint32_t value[4], rest[4];
    load_queries(a, rows, k, value, rest);
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int piece = 2 * k + i / 2;
      store_4(to + piece / 8 * COLUMN_BYTES + swizzled(rows.row[i % 2] % GROUP_ROWS, piece) + threadIdx.x % 4 * 4, value[i]);
    }
  }
}

/* Sums of codes, over l, out of their space: `out` is what a softmax with the same maxima and weight 2^SHIFT would have summed
 * up, so m and l are made those. */
template <int D, int CRUMBS>
__device__ inline void map_sums(const arguments &a, int head, const float (&sums)[CRUMBS / 2], const float (&mean)[2],
                                float (&m)[2], float (&l)[2], float (&out)[D / 2]) {
  constexpr int STEPS = CRUMBS / 16;
  const int lane = threadIdx.x % 32;
  const uint4 *map = (const uint4 *)a.tables.values + (size_t)head * (D / 8) * STEPS * 32 + lane;
  const float *value_mean = a.value_mean + head * a.value_mean_stride + lane % 4 * 2;
  const float scale = a.tables.scales[2 * head + 1];
  float inverse[2], weight[2];
#pragma unroll
  for (int h = 0; h < 2; h++) {
#pragma unroll
    for (int step = 1; step < 4; step *= 2) l[h] += __shfl_xor_sync(~0u, l[h], step);
    inverse[h] = l[h] > 0 ? 1 / l[h] : 0;
    weight[h] = l[h] > 0 ? exp2_fast(SHIFT) : 0;
    m[h] = l[h] > 0 ? m[h] - SHIFT + __log2f(l[h]) + mean[h] : LEAST;
    l[h] = lane % 4 == 0 ? weight[h] : 0; /* lanes add theirs up in the end */
  }
  uint32_t value[STEPS][4], rest[STEPS][4];
#pragma unroll
  for (int k = 0; k < STEPS; k++)
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float x = sums[8 * k + 2 * i] * inverse[i % 2], y = sums[8 * k + 2 * i + 1] * inverse[i % 2];
      value[k][i] = pack_half2(x, y);
      rest[k][i] = rest_half2(x, y, value[k][i]);
    }
#pragma unroll
  for (int tile = 0; tile < D / 8; tile++) {
    float c[4] = {}, d[4] = {};
#pragma unroll
    for (int k = 0; k < STEPS; k++) {
      const uint4 b = __ldg(map + (tile * STEPS + k) * 32);
      mma_fp16(c, value[k][0], value[k][1], value[k][2], value[k][3], b.x, b.y);
      mma_fp16(d, rest[k][0], rest[k][1], rest[k][2], rest[k][3], b.x, b.y);
      mma_fp16(d, value[k][0], value[k][1], value[k][2], value[k][3], b.z, b.w);
    }
    const float2 plus = __ldg((const float2 *)(value_mean + tile * 8));
#pragma unroll
    for (int h = 0; h < 2; h++) {
      out[4 * tile + 2 * h] = ((c[2 * h] + d[2 * h]) * scale + plus.x) * weight[h];
      out[4 * tile + 2 * h + 1] = ((c[2 * h + 1] + d[2 * h + 1]) * scale + plus.y) * weight[h];
    }
  }
}

__host__ __device__ constexpr int part_floats_of(int head_dim) { return PREFILL_ROWS * (head_dim + 2); }

/* Outputs, or where the tile is cut what its part sums up. */
template <int D>
__device__ inline void store_rows(const arguments &a, const struct prefill_tile &tile, int head, const lane_rows &rows,
                                  const float (&o)[D / 2], const float (&m)[2], float (&l)[2]) {
  float *part = a.parts + (size_t)((tile.first + tile.part) * a.kv_heads + head) * part_floats_of(D);
  const int q = threadIdx.x % 4;
#pragma unroll
  for (int h = 0; h < 2; h++) {
#pragma unroll
    for (int step = 1; step < 4; step *= 2) l[h] += __shfl_xor_sync(~0u, l[h], step);
    if (!rows.there[h]) continue;
    const float factor = tile.parts > 1 ? 1 : 1 / l[h];
    float *to = (tile.parts > 1 ? part + rows.row[h] * D : a.out + rows.offset[h]) + q * 2;
#pragma unroll
    for (int k = 0; k < D / 8; k++)
      *(float2 *)(to + 8 * k) = make_float2(o[4 * k + 2 * h] * factor, o[4 * k + 2 * h + 1] * factor);
    if (tile.parts > 1 && q == 0) ((float2 *)(part + PREFILL_ROWS * D))[rows.row[h]] = make_float2(m[h], l[h]);
  }
}

/* What is known when a kernel is compiled: CRUMBS of values, and, where keys have as many, STEPS of 16 inputs of scores; 0: keys
 * of any number of crumbs. */
template <int D_, int CRUMBS_, int STEPS_> struct traits {
  static constexpr int D = D_, CRUMBS = CRUMBS_, STEPS = STEPS_;
  static constexpr int WAVES = STEPS ? (STEPS - CRUMBS / 16) / 2 : -1;
};

template <class T>
__device__ inline void consume_tile(const arguments &a, const struct prefill_tile &part, int head, int group, uint32_t queries,
                                    ring &keys, ring &values) {
  constexpr int D = T::D;
  const struct decode_tile &tile = part.of;
  if (group * GROUP_ROWS >= tile.rows) {
    let_pass(keys, values, tile.coded_pages + tile.exact_pages);
    return;
  }
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
    map_queries<D>(a, rows, head, queries, mean);
    writes_visible_to_products();
    warpgroup_barrier(1 + group);
    consume<false, score_steps<T::STEPS, T::CRUMBS / 16>>(keys, values, queries, {a.tables.key_columns / 16, a.key_crumbs / 16},
                                                          a.pages + tile.coded_first, tile.coded_pages, sight, sums, m, l);
    map_sums<D, T::CRUMBS>(a, head, sums, mean, m, l, o);
    warpgroup_barrier(1 + group); /* all have read their last scores */
  }
  if (tile.exact_pages > 0) {
    store_queries<D>(a, rows, queries);
    writes_visible_to_products();
    warpgroup_barrier(1 + group);
    consume<true, score_steps<D / 16, D / 16>>(keys, values, queries, {D / 16, D / 16}, a.pages + tile.exact_first,
                                               tile.exact_pages, sight, o, m, l);
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
  const bool both = T::WAVES != 0; /* groups of producers fill keys */
  if (threadIdx.x == 0) {
    for (int i = 0; i < a.stages; i++) {
      barrier_init(barriers + 8 * i, both ? 8 : 4);          /* warps that fill keys */
      barrier_init(barriers + 8 * (MOST_STAGES + i), 8);     /* warps that have read them */
      barrier_init(barriers + 8 * (2 * MOST_STAGES + i), 4); /* the same of values */
      barrier_init(barriers + 8 * (3 * MOST_STAGES + i), 8);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
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
      if (tile.coded_pages > 0) produce_coded_keys<T::STEPS ? T::CRUMBS / 16 : 0, T::WAVES>(a, tile, head, keys);
      if (tile.exact_pages > 0) produce_exact<T::D>(a, tile, head, 0, last, keys, nullptr);
    } else {
      if (tile.coded_pages > 0) produce_coded_values<T::CRUMBS / 16, T::WAVES>(a, tile, head, keys, values, base + layout.gains);
      if (tile.exact_pages > 0) produce_exact<T::D>(a, tile, head, 1, last, values, both ? &keys : nullptr);
    }
  }
#endif
}

} // namespace prefill

#endif
