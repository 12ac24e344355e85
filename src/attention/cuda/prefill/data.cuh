/*
 * attention/cuda/prefill/data.cuh - what producers and consumers of kernel.cuh share: arguments, shared memory, rings of slots.
 * Private.
 */
#ifndef OSCAR_ATTENTION_CUDA_PREFILL_DATA_CUH
#define OSCAR_ATTENTION_CUDA_PREFILL_DATA_CUH

#include "attention/cuda/decode/data.cuh"
#include "attention/cuda/instructions.cuh"
#include "attention/cuda/prefill.h"
#include "attention/cuda/prefill/warpgroup.cuh"

namespace prefill {

constexpr int THREADS = 512, GROUP_THREADS = 128, GROUP_ROWS = 64, PAGE = 64;
constexpr int CONSUMER_REGISTERS = 192, PRODUCER_REGISTERS = 64;
constexpr int MOST_STAGES = 4;
constexpr int COLUMN_BYTES = PAGE * 128; /* of 64 columns of keys or queries */
/* Probabilities are 2^(score - m + SHIFT), and m is raised only where a score exceeds it by more than LAG: they stay far below
 * the largest fp16 number, and those of 2^-20 are still normal ones. */
constexpr float SHIFT = 6, LAG = 8, LEAST = -1e30f, NONE = -INFINITY;

constexpr int GAIN_TABLE_BYTES = 4 * 16 * 8; /* make_gain_table */

struct arguments {
  const struct prefill_tile *tiles;
  const struct decode_page *pages;
  float *parts; /* [parts][kv_heads] of sums [PREFILL_ROWS][head_dim], then (m, l) [PREFILL_ROWS] */
  const float *q;
  float *out;
  const uint8_t *memory;
  size_t unit_bytes;
  struct prefill_tables tables;
  const uint8_t *waves; /* prefill_make_waves */
  size_t wave_bytes;    /* of a page */
  int tile_count, kv_heads, group, window;
  int key_crumbs, value_crumbs, head_bytes, value_offset;
  int map_chunks; /* of PAGE columns of keys, that queries are brought into */
  bool log_gains;
  int stages, key_slot_bytes, value_slot_bytes, query_bytes; /* query_bytes: of a group */
  float scale, code_unit; /* scores and sums of coded pages are to be multiplied with code_unit */
};

/* Shared memory of a block, in bytes from its start. */
struct shared_layout {
  int queries, keys, values, gains, gain_table, barriers, bytes;
};
__host__ __device__ inline shared_layout shared_layout_of(const arguments &a) {
  shared_layout s;
  int at = 0;
  s.queries = at, at += 2 * a.query_bytes;
  s.keys = at, at += a.stages * a.key_slot_bytes;
  s.values = at, at += a.stages * a.value_slot_bytes;
  s.gains = at, at += 4 * 2 * 2 * PAGE * 2; /* of a warp each: of two blocks, factors and offsets */
  s.gain_table = at, at += GAIN_TABLE_BYTES;
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
  /* By one thread, before its warp has filled the slot: the slot is full only when the copy engine has brought so much. */
  __device__ __forceinline__ void expect(int bytes) const { barrier_expect(full + 8 * slot, bytes); }
  /* By any thread, before its warp has filled the slot. */
  __device__ __forceinline__ void copy(uint32_t offset, const void *from, int bytes) const {
    copy_for_barrier(at() + offset, from, bytes, full + 8 * slot);
  }
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

__device__ __forceinline__ uint4 load_16(uint32_t address) {
  uint4 x;
  asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "r"(address) : "memory");
  return x;
}
__device__ __forceinline__ uint2 load_8(uint32_t address) {
  uint2 x;
  asm volatile("ld.shared.v2.b32 {%0,%1}, [%2];" : "=r"(x.x), "=r"(x.y) : "r"(address) : "memory");
  return x;
}
__device__ __forceinline__ uint32_t load_4(uint32_t address) {
  uint32_t x;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(x) : "r"(address) : "memory");
  return x;
}

} // namespace prefill

#endif
