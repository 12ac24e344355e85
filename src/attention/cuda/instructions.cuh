/*
 * attention/cuda/instructions.cuh - the instructions that kernels use by name (PTX ISA). Private.
 */
#ifndef OSCAR_ATTENTION_CUDA_INSTRUCTIONS_H
#define OSCAR_ATTENTION_CUDA_INSTRUCTIONS_H

#include "cuda/launch.cuh"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>

/* c [16][8] += a [16][32] b [32][8], bytes: a without a sign, b with one */
__device__ __forceinline__ void mma_bytes(int (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                          uint32_t b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
/* d = c + a b */
__device__ __forceinline__ void mma_bytes_from(int (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                               uint32_t b1, const int (&c)[4]) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
      : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]));
}
/* The same of 16 inputs. */
__device__ __forceinline__ void mma_bytes_half(int (&c)[4], uint32_t a0, uint32_t a1, uint32_t b0) {
  asm("mma.sync.aligned.m16n8k16.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a0), "r"(a1), "r"(b0));
}
/* c [16][8] += a [16][16] b [16][8] */
__device__ __forceinline__ void mma_fp16(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                         uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
/* The same of 8 inputs. */
__device__ __forceinline__ void mma_fp16_half(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t b0) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(b0));
}
__device__ __forceinline__ void mma_bf16(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                         uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
/* An 8 x 8 matrix of 16-bit numbers, lane 4 g + q holding columns 2q and 2q + 1 of row g, transposed. */
__device__ __forceinline__ uint32_t transpose_8x8(uint32_t x) {
  uint32_t y;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}
/* Over the 32 lanes of a warp; every lane gets the result. Not for NaNs: numbers are compared as integers in the same order,
 * which takes one instruction. */
__device__ __forceinline__ int in_order(int bits) { return bits >= 0 ? bits : bits ^ 0x7FFFFFFF; }
__device__ __forceinline__ float largest_of_warp(float x) {
  return __int_as_float(in_order(__reduce_max_sync(~0u, in_order(__float_as_int(x)))));
}
template <typename T> __device__ __forceinline__ T sum_of_warp(T x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(~0u, x, step);
  return x;
}
/* Bytes of x by the nibbles of `select`; the eighth bit of a nibble asks for its byte's sign, eight times. */
__device__ __forceinline__ uint32_t permute_bytes(uint32_t x, uint32_t y, uint32_t select) {
  uint32_t z;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(z) : "r"(x), "r"(y), "r"(select));
  return z;
}
/* (x & MASK) | bits in one instruction, which has room for one constant: `bits` comes from register_of. */
template <uint32_t MASK> __device__ __forceinline__ uint32_t and_or(uint32_t x, uint32_t bits) {
  uint32_t y;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(y) : "r"(x), "n"(MASK), "r"(bits));
  return y;
}
__device__ __forceinline__ uint32_t register_of(uint32_t constant) {
  uint32_t y;
  asm volatile("mov.u32 %0, %1;" : "=r"(y) : "r"(constant));
  return y;
}
/* The thread's number in its block, asked for where it is written, so that nothing made of it takes registers before. */
__device__ __forceinline__ int thread_now() {
  int x;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(x));
  return x;
}
/* A load that stays where it is, and what makes one stay that is only there to have something near. */
__device__ __forceinline__ int load_now(const void *from) {
  int x;
  asm volatile("ld.global.ca.b32 %0, [%1];" : "=r"(x) : "l"(from));
  return x;
}
__device__ __forceinline__ void keep(int x) { asm volatile("" ::"r"(x)); }
__device__ __forceinline__ void keep(const void *x) { asm volatile("" ::"l"(x)); }
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ uint32_t multiply_half2(uint32_t a, uint32_t b) {
  uint32_t y;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
  return y;
}
/* low and high as fp16 */
__device__ __forceinline__ uint32_t pack_half2(float low, float high) {
  uint32_t y;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}
__device__ __forceinline__ uint32_t pack_bf162(float low, float high) {
  uint32_t y;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}
__device__ __forceinline__ uint32_t half2_of(const __half2 &x) { return *reinterpret_cast<const uint32_t *>(&x); }
__device__ __forceinline__ __half2 as_half2(uint32_t x) { return *reinterpret_cast<__half2 *>(&x); }
__device__ __forceinline__ float2 unpack_half2(uint32_t x) { return __half22float2(as_half2(x)); }
__device__ __forceinline__ float low_bf16(uint32_t x) { return __uint_as_float(x << 16); }
__device__ __forceinline__ float high_bf16(uint32_t x) { return __uint_as_float(x & 0xFFFF0000u); }
/* What fp16 loses of two numbers, as fp16. */
__device__ __forceinline__ uint32_t rest_half2(float low, float high, uint32_t rounded) {
  float2 r = unpack_half2(rounded);
  return pack_half2(low - r.x, high - r.y);
}

/* Numbers that a block leaves for another of the launch, in memory that was zero: what is not has come. So neither waits for a
 * fence or a count, each 32-bit word tells of itself, and zero is left as -0. */
__device__ __forceinline__ float not_zero(float x) { return x == 0 ? -0.0f : x; }
__device__ __forceinline__ void leave_number(float *to, float x) {
  asm volatile("st.relaxed.gpu.global.f32 [%0], %1;" ::"l"(to), "f"(not_zero(x)) : "memory");
}
__device__ __forceinline__ void leave_numbers(float2 *to, const float2 &x) {
  asm volatile("st.relaxed.gpu.global.v2.f32 [%0], {%1, %2};" ::"l"(to), "f"(not_zero(x.x)), "f"(not_zero(x.y)) : "memory");
}
__device__ __forceinline__ float4 look_at_numbers(const float4 *from) {
  float4 x;
  asm volatile("ld.relaxed.gpu.global.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
               : "l"(from)
               : "memory");
  return x;
}
__device__ __forceinline__ float2 look_at_numbers(const float2 *from) {
  float2 x;
  asm volatile("ld.relaxed.gpu.global.v2.f32 {%0, %1}, [%2];" : "=f"(x.x), "=f"(x.y) : "l"(from) : "memory");
  return x;
}
__device__ __forceinline__ bool have_come(const float4 &x) {
  return __float_as_uint(x.x) != 0 && __float_as_uint(x.y) != 0 && __float_as_uint(x.z) != 0 && __float_as_uint(x.w) != 0;
}
__device__ __forceinline__ bool have_come(const float2 &x) { return __float_as_uint(x.x) != 0 && __float_as_uint(x.y) != 0; }

/* ---- copies from global to shared memory that run beside the warp ---- */

__device__ __forceinline__ uint32_t shared_address(const void *p) { return (uint32_t)__cvta_generic_to_shared(p); }

/* A few bytes, by all lanes of a warp; they are waited for by groups, as many as copies_begun was called. */
__device__ __forceinline__ void copy_beside(uint8_t *to, const uint8_t *from, int bytes, int lane) {
  for (int i = lane * 16; i < bytes; i += 512)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to + i)), "l"(from + i) : "memory");
}
/* Eight bytes, by one lane; the rest is as above. */
__device__ __forceinline__ void copy_eight_beside(uint8_t *to, const uint8_t *from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(shared_address(to)), "l"(from) : "memory");
}
__device__ __forceinline__ void copies_begun() { asm volatile("cp.async.commit_group;" ::: "memory"); }
/* All groups but the last PENDING ones are there for the warp. */
template <int PENDING> __device__ __forceinline__ void groups_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
  __syncwarp();
}

#if __CUDA_ARCH__ >= 900
constexpr bool PAGES_IN_GROUPS = false; /* whether copies of pages are in those groups, too */
/* The copy engine writes and counts bytes at a barrier. */
__device__ __forceinline__ void copies_init(uint64_t *barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(barrier)) : "memory");
}
__device__ __forceinline__ void copies_visible() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
/* Asked by one warp, all lanes, for what lane `of` has. bytes: a multiple of 16. */
__device__ __forceinline__ void copy_of_lane(void *to, const void *from, int bytes, uint64_t *barrier, int of, int lane) {
  if (lane == of) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared_address(to)),
        "l"(from), "r"(bytes), "r"(shared_address(barrier))
        : "memory");
  }
}
/* Memory that was written or read by ordinary instructions is handed to the copy engine. */
__device__ __forceinline__ void hand_to_copies() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
/* By the whole block: begun, and waited for. */
__device__ __forceinline__ void begin_block_copy(void *to, const void *from, int bytes, uint64_t *barrier) {
  if (threadIdx.x < 32) copy_of_lane(to, from, bytes, barrier, 0, (int)threadIdx.x);
}
__device__ __forceinline__ void end_block_copy(uint64_t *barrier, uint32_t parity);
template <int PENDING> __device__ __forceinline__ void copy_wait(uint64_t *barrier, uint32_t parity) {
  asm volatile("{\n"
               ".reg .pred done;\n"
               "again:\n"
               "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
               "@!done bra again;\n"
               "}\n" ::"r"(shared_address(barrier)),
               "r"(parity)
               : "memory");
}
__device__ __forceinline__ void end_block_copy(uint64_t *barrier, uint32_t parity) { copy_wait<0>(barrier, parity); }
#else
constexpr bool PAGES_IN_GROUPS = true;
__device__ __forceinline__ void copies_init(uint64_t *) {}
__device__ __forceinline__ void hand_to_copies() {}
__device__ __forceinline__ void begin_block_copy(void *to, const void *from, int bytes, uint64_t *) {
  for (int i = threadIdx.x * 16; i < bytes; i += blockDim.x * 16)
    *(uint4 *)((char *)to + i) = *(const uint4 *)((const char *)from + i);
}
__device__ __forceinline__ void end_block_copy(uint64_t *, uint32_t) { __syncthreads(); }
__device__ __forceinline__ void copies_visible() {}
__device__ __forceinline__ void copy_of_lane(uint8_t *to, const uint8_t *from, int bytes, uint64_t *, int of, int lane) {
  copy_beside(to, (const uint8_t *)__shfl_sync(~0u, (unsigned long long)from, of), bytes, lane);
}
template <int PENDING> __device__ __forceinline__ void copy_wait(uint64_t *, uint32_t) { groups_wait<PENDING>(); }
#endif

#endif
