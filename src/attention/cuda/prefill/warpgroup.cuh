/*
 * attention/cuda/prefill/warpgroup.cuh - matrix products of four warps with operands in shared memory (PTX ISA, "asynchronous
 * warpgroup level matrix instructions"; compute capability 9.0 only), and barriers between producers and consumers. Private.
 */
#ifndef OSCAR_ATTENTION_CUDA_PREFILL_WARPGROUP_CUH
#define OSCAR_ATTENTION_CUDA_PREFILL_WARPGROUP_CUH

#include "attention/cuda/instructions.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define HAS_WARPGROUP_PRODUCTS 1
#endif

/* An operand in the 128-byte swizzle: rows of 64 numbers of 16 bits, 128 bytes each; the 16-byte pieces of row r are where their
 * number xor r mod 8 says. Blocks of 8 rows are 1024 bytes and aligned to that; wider operands are several such columns.
 * `across`: from one column to the next, where the long side of the product is the one that lies within rows. */
__device__ __forceinline__ uint64_t operand_descriptor(uint32_t address, uint32_t across) {
  return (uint64_t)((address & 0x3FFFF) >> 4) | (uint64_t)(across >> 4) << 16 | (uint64_t)(1024 >> 4) << 32 | (uint64_t)1 << 62;
}
/* Bytes from the start of such an operand. */
__device__ __forceinline__ int swizzled(int row, int piece) { return row * 128 + ((piece ^ row) & 7) * 16; }

#define SIX16_REGISTERS(c, i)                                                                                                    \
  "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3]), "+f"(c[i + 4]), "+f"(c[i + 5]), "+f"(c[i + 6]), "+f"(c[i + 7]),    \
      "+f"(c[i + 8]), "+f"(c[i + 9]), "+f"(c[i + 10]), "+f"(c[i + 11]), "+f"(c[i + 12]), "+f"(c[i + 13]), "+f"(c[i + 14]),       \
      "+f"(c[i + 15])
#define NAMES_32                                                                                                                 \
  "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}"
#define NAMES_64                                                                                                                 \
  "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,%32,"  \
  "%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63}"

/* c [64][64] (+)= a [64][16] b, both in shared memory; first: c was nothing before. BY_ROWS: b [16][64] has the inputs as rows,
 * else b [64][16]. A lane 4 g + q of warp w has c[4 j + 2 h + i] of row 16 w + g + 8 h, column 8 j + 2 q + i. */
template <bool BY_ROWS> __device__ __forceinline__ void product_64(float (&c)[32], uint64_t a, uint64_t b, bool first) {
#ifdef HAS_WARPGROUP_PRODUCTS
  asm volatile("{\n.reg .pred more;\nsetp.eq.b32 more, %34, 0;\n"
               "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 " NAMES_32 ", %32, %33, more, 1, 1, 0, %35;\n}\n"
               : SIX16_REGISTERS(c, 0), SIX16_REGISTERS(c, 16)
               : "l"(a), "l"(b), "r"((int)first), "n"(BY_ROWS ? 1 : 0));
#endif
}
/* The same with b [64][16] and a in registers, as in mma of each warp's 16 rows. */
__device__ __forceinline__ void product_64(float (&c)[32], const uint32_t (&a)[4], uint64_t b, bool first) {
#ifdef HAS_WARPGROUP_PRODUCTS
  asm volatile("{\n.reg .pred more;\nsetp.eq.b32 more, %37, 0;\n"
               "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 " NAMES_32 ", {%32,%33,%34,%35}, %36, more, 1, 1, 0;\n}\n"
               : SIX16_REGISTERS(c, 0), SIX16_REGISTERS(c, 16)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((int)first));
#endif
}
/* c [64][N] += a [64][16] b, a in registers as in mma of each warp's 16 rows. BY_ROWS: b [16][N] has the inputs as rows, else b
 * [N][16]. */
template <bool BY_ROWS>
__device__ __forceinline__ void product_from_registers(float (&c)[32], const uint32_t (&a)[4], uint64_t b) {
#ifdef HAS_WARPGROUP_PRODUCTS
  asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 " NAMES_32 ", {%32,%33,%34,%35}, %36, 1, 1, 1, %37;\n"
               : SIX16_REGISTERS(c, 0), SIX16_REGISTERS(c, 16)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(BY_ROWS ? 1 : 0));
#endif
}
template <bool BY_ROWS>
__device__ __forceinline__ void product_from_registers(float (&c)[64], const uint32_t (&a)[4], uint64_t b) {
#ifdef HAS_WARPGROUP_PRODUCTS
  asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 " NAMES_64 ", {%64,%65,%66,%67}, %68, 1, 1, 1, %69;\n"
               : SIX16_REGISTERS(c, 0), SIX16_REGISTERS(c, 16), SIX16_REGISTERS(c, 32), SIX16_REGISTERS(c, 48)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(BY_ROWS ? 1 : 0));
#endif
}
/* Before the first product after registers or shared memory changed; after the last of a group; until at most PENDING groups run.
 */
__device__ __forceinline__ void products_begin() {
#ifdef HAS_WARPGROUP_PRODUCTS
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ void products_commit() {
#ifdef HAS_WARPGROUP_PRODUCTS
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}
template <int PENDING> __device__ __forceinline__ void products_wait() {
#ifdef HAS_WARPGROUP_PRODUCTS
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
#endif
}
/* What threads wrote becomes visible to products of warpgroups. */
__device__ __forceinline__ void writes_visible_to_products() {
#ifdef HAS_WARPGROUP_PRODUCTS
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}
template <int REGISTERS> __device__ __forceinline__ void take_registers() {
#ifdef HAS_WARPGROUP_PRODUCTS
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
#endif
}
template <int REGISTERS> __device__ __forceinline__ void give_registers() {
#ifdef HAS_WARPGROUP_PRODUCTS
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
#endif
}
__device__ __forceinline__ void warpgroup_barrier(int number) { asm volatile("bar.sync %0, 128;" ::"r"(number) : "memory"); }

/* ---- barriers in shared memory that count arrivals ---- */

__device__ __forceinline__ void barrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
/* By one thread, before it arrives itself: the barrier waits for bytes that the copy engine brings to shared memory. Copies may
 * begin before, by threads that have not arrived either. */
__device__ __forceinline__ void barrier_expect(uint32_t barrier, int bytes) {
#ifdef HAS_WARPGROUP_PRODUCTS
  asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
#endif
}
__device__ __forceinline__ void copy_for_barrier(uint32_t to, const void *from, int bytes, uint32_t barrier) {
#ifdef HAS_WARPGROUP_PRODUCTS
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to), "l"(from),
               "r"(bytes), "r"(barrier)
               : "memory");
#endif
}
__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
#ifdef HAS_WARPGROUP_PRODUCTS
  asm volatile("{\n"
               ".reg .pred done;\n"
               "again:\n"
               "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
               "@!done bra again;\n"
               "}\n" ::"r"(barrier),
               "r"(parity)
               : "memory");
#endif
}

#endif
