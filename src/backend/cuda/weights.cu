/*
 * weights.cu - weights on the GPU: blocks of a file expanded to BF16 when a model is loaded, and rows of the embedding.
 *
 * A thread makes one element, with the operations of weight_dequantize in its order and without contraction, so that every
 * element is exactly what the host gives, rounded to BF16 (to nearest even). Reading the file and the way to the GPU take longer
 * than that.
 */
#include "backend/cuda/cuda_backend.h"

extern "C" {
#include "backend/blocks.h"
}

#include <cuda_fp16.h>

/* ---- elements of blocks ---- */

__device__ static float half_at(const uint8_t *bytes) {
  return __half2float(__ushort_as_half((unsigned short)(bytes[0] | bytes[1] << 8)));
}

/* a q + m and a q - m, each operation rounded */
__device__ static float scaled_and_raised(float a, int q, float m) { return __fadd_rn(__fmul_rn(a, (float)q), m); }
__device__ static float scaled_and_lowered(float a, int q, float m) { return __fsub_rn(__fmul_rn(a, (float)q), m); }

__device__ static int nibble(const uint8_t *qs, int i) { return qs[i & 15] >> (i < 16 ? 0 : 4) & 15; }
__device__ static int fifth_bit(const uint8_t *qh, int i) { return qh[i / 8] >> (i % 8) & 1; }

__device__ static float q4_0(const uint8_t *b, int i) { return half_at(b) * (float)(nibble(b + 2, i) - 8); }
__device__ static float q4_1(const uint8_t *b, int i) { return scaled_and_raised(half_at(b), nibble(b + 4, i), half_at(b + 2)); }
__device__ static float q5_0(const uint8_t *b, int i) {
  return half_at(b) * (float)((nibble(b + 6, i) | fifth_bit(b + 2, i) << 4) - 16);
}
__device__ static float q5_1(const uint8_t *b, int i) {
  return scaled_and_raised(half_at(b), nibble(b + 8, i) | fifth_bit(b + 4, i) << 4, half_at(b + 2));
}
__device__ static float q8_0(const uint8_t *b, int i) { return half_at(b) * (float)(int8_t)b[2 + i]; }

/* block_scale_min of blocks.h */
__device__ static void scale_and_minimum(const uint8_t *scales, int r, int *scale, int *minimum) {
  if (r < 4) {
    *scale = scales[r] & 63;
    *minimum = scales[r + 4] & 63;
  } else {
    *scale = (scales[r + 4] & 15) | (scales[r - 4] >> 6) << 4;
    *minimum = scales[r + 4] >> 4 | (scales[r] >> 6) << 4;
  }
}

/* Element i of a Q4_K or Q5_K block, given its code. */
__device__ static float super_element(const uint8_t *b, int i, int q) {
  int scale, minimum;
  scale_and_minimum(b + 4, i / 32, &scale, &minimum);
  return scaled_and_lowered(__fmul_rn(half_at(b), (float)scale), q, __fmul_rn(half_at(b + 2), (float)minimum));
}
__device__ static int super_nibble(const uint8_t *qs, int i) { return qs[i / 64 * 32 + i % 32] >> (i & 32 ? 4 : 0) & 15; }

__device__ static float q4_k(const uint8_t *b, int i) { return super_element(b, i, super_nibble(b + 16, i)); }
__device__ static float q5_k(const uint8_t *b, int i) {
  return super_element(b, i, super_nibble(b + 48, i) | (b[16 + i % 32] >> (i / 32) & 1) << 4);
}
__device__ static float q6_k(const uint8_t *b, int i) {
  const int half = i / 128, quarter = i / 32 & 3, l = i % 32;
  const int low = b[64 * half + 32 * (quarter & 1) + l] >> (quarter < 2 ? 0 : 4) & 15;
  const int high = b[128 + 32 * half + l] >> 2 * quarter & 3;
  return __fmul_rn(__fmul_rn(half_at(b + 208), (float)(int8_t)b[192 + i / 16]), (float)((low | high << 4) - 32));
}

__device__ static float f32_at(const uint8_t *b) {
  return __uint_as_float((uint32_t)b[0] | (uint32_t)b[1] << 8 | (uint32_t)b[2] << 16 | (uint32_t)b[3] << 24);
}
__device__ static float bf16_at(const uint8_t *b) { return __uint_as_float((uint32_t)(b[0] | b[1] << 8) << 16); }

template <int TYPE> __device__ static float element(const uint8_t *block, int i) {
  if constexpr (TYPE == WEIGHT_F32) return f32_at(block);
  if constexpr (TYPE == WEIGHT_F16) return half_at(block);
  if constexpr (TYPE == WEIGHT_BF16) return bf16_at(block);
  if constexpr (TYPE == WEIGHT_Q4_0) return q4_0(block, i);
  if constexpr (TYPE == WEIGHT_Q4_1) return q4_1(block, i);
  if constexpr (TYPE == WEIGHT_Q5_0) return q5_0(block, i);
  if constexpr (TYPE == WEIGHT_Q5_1) return q5_1(block, i);
  if constexpr (TYPE == WEIGHT_Q8_0) return q8_0(block, i);
  if constexpr (TYPE == WEIGHT_Q4_K) return q4_k(block, i);
  if constexpr (TYPE == WEIGHT_Q5_K) return q5_k(block, i);
  if constexpr (TYPE == WEIGHT_Q6_K) return q6_k(block, i);
  return 0;
}

/* ---- packing ---- */

/* rows of a weight as the file has them to out [rows][packed_cols]; one block of threads makes 256 columns of a row */
template <int TYPE>
__global__ static void expand_rows(const uint8_t *raw, int64_t cols, int64_t padded, int elements, int block_bytes,
                                   __nv_bfloat16 *out) {
  const int64_t row = blockIdx.x, col = (int64_t)blockIdx.y * blockDim.x + threadIdx.x;
  if (col >= padded) return;
  const uint8_t *of_row = raw + row * (cols / elements) * block_bytes;
  const float x = col < cols ? element<TYPE>(of_row + col / elements * block_bytes, (int)(col % elements)) : 0;
  out[row * padded + col] = __float2bfloat16_rn(x);
}

typedef void expand_kernel(const uint8_t *, int64_t, int64_t, int, int, __nv_bfloat16 *);

static expand_kernel *kernel_of(enum weight_type type) {
  switch (type) {
  case WEIGHT_F32:
    return expand_rows<WEIGHT_F32>;
  case WEIGHT_F16:
    return expand_rows<WEIGHT_F16>;
  case WEIGHT_BF16:
    return expand_rows<WEIGHT_BF16>;
  case WEIGHT_Q4_0:
    return expand_rows<WEIGHT_Q4_0>;
  case WEIGHT_Q4_1:
    return expand_rows<WEIGHT_Q4_1>;
  case WEIGHT_Q5_0:
    return expand_rows<WEIGHT_Q5_0>;
  case WEIGHT_Q5_1:
    return expand_rows<WEIGHT_Q5_1>;
  case WEIGHT_Q8_0:
    return expand_rows<WEIGHT_Q8_0>;
  case WEIGHT_Q4_K:
    return expand_rows<WEIGHT_Q4_K>;
  case WEIGHT_Q5_K:
    return expand_rows<WEIGHT_Q5_K>;
  case WEIGHT_Q6_K:
    return expand_rows<WEIGHT_Q6_K>;
  }
  return NULL;
}

oscar_status cuda_weight_check(struct backend *be, const struct weight *w) {
  return weight_check_layout(be, w, kernel_of(w->type) != NULL);
}

size_t cuda_packed_bytes(const struct backend *be, const struct weight *w) {
  (void)be;
  return (size_t)w->rows * (size_t)packed_cols(w) * sizeof(__nv_bfloat16);
}

oscar_status cuda_pack(struct backend *be, struct weight *w, void *memory) {
  struct cuda_backend *b = cuda_of(be);
  int elements = 1;
  size_t block_bytes = 0;
  oscar_status status = cuda_weight_check(be, w);
  if (status != OSCAR_OK) return status;
  weight_block(w->type, &elements, &block_bytes);
  const size_t bytes = (size_t)w->rows * (size_t)(w->cols / elements) * block_bytes;
  status = device_scratch_reserve(b, &b->raw, bytes);
  if (status == OSCAR_OK) status = cuda_upload(b->cuda, b->raw.data, w->data, bytes);
  if (status != OSCAR_OK) return status;
  const int64_t padded = packed_cols(w);
  const dim3 grid((unsigned)w->rows, blocks_for((size_t)padded, 256));
  kernel_of(w->type)<<<grid, 256, 0, b->stream>>>((const uint8_t *)b->raw.data, w->cols, padded, elements, (int)block_bytes,
                                                  (__nv_bfloat16 *)memory);
  w->packed = memory;
  return cuda_launched(b->cuda, "expanding weights");
}

/* ---- the embedding ---- */

__global__ static void embed_rows(const __nv_bfloat16 *table, int64_t rows, int cols, int64_t padded, const int32_t *ids,
                                  float *y) {
  wait_for_input();
  const int32_t id = ids[blockIdx.x];
  const bool known = id >= 0 && id < rows;
  for (int i = (int)threadIdx.x; i < cols; i += (int)blockDim.x)
    y[(int64_t)blockIdx.x * cols + i] = known ? __bfloat162float(table[id * padded + i]) : __uint_as_float(0x7FC00000u);
}

oscar_status cuda_embed(struct backend *be, const struct weight *w, int n, const int32_t *ids, float *y) {
  struct cuda_backend *b = cuda_of(be);
  if (!w->packed) return set_error(be->context, OSCAR_INVALID_ARGUMENT, "tensor %s is not in the GPU's memory", w->name);
  if (n == 0) return OSCAR_OK;
  launch(b, embed_rows, (unsigned)n, 256, packed_of(w), w->rows, (int)w->cols, packed_cols(w), ids, y);
  return cuda_launched(b->cuda, "reading the embedding");
}
