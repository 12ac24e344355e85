/*
 * weights.cu - weights on the GPU: blocks of a file expanded to BF16 or to FP8 when a model is loaded, FP8 expanded to BF16, and
 * rows of the embedding.
 *
 * A thread makes one element, with the operations of weight_dequantize in its order and without contraction, so that every
 * element is exactly what the host gives, rounded to BF16 (to nearest even), or divided by its row's scale and rounded to E4M3.
 * Reading the file and the way to the GPU take longer than that.
 */
#include "backend/cuda/packed_rows.cuh"

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

/* Rows of a weight as the file has them. */
struct raw_rows {
  const uint8_t *data;
  int64_t rows, cols;
  int elements, block_bytes;
};

template <int TYPE> __device__ static float raw_element(const struct raw_rows &raw, int64_t row, int64_t col) {
  const uint8_t *of_row = raw.data + row * (raw.cols / raw.elements) * raw.block_bytes;
  return element<TYPE>(of_row + col / raw.elements * raw.block_bytes, (int)(col % raw.elements));
}

/* To BF16; one block of threads makes 256 columns of a row. */
template <int TYPE> __global__ static void expand_rows(const __grid_constant__ struct raw_rows raw, int64_t padded, void *out) {
  const int64_t row = blockIdx.x, col = (int64_t)blockIdx.y * blockDim.x + threadIdx.x;
  if (col >= padded) return;
  const float x = col < raw.cols ? raw_element<TYPE>(raw, row, col) : 0;
  ((__nv_bfloat16 *)out)[row * padded + col] = __float2bfloat16_rn(x);
}

/* To FP8; one block of threads makes a row, twice: the scale comes first. Past the last row there are scales to the end of the
 * group, zeros. */
template <int TYPE> __global__ static void quantize_rows(const __grid_constant__ struct raw_rows raw, int64_t padded, void *out) {
  const int64_t row = blockIdx.x;
  __shared__ uint32_t shared;
  if (threadIdx.x == 0) shared = 0;
  __syncthreads();
  uint32_t largest = 0; /* of the bits without the sign: those of NaN and infinity are larger than all others */
  for (int64_t col = threadIdx.x; row < raw.rows && col < raw.cols; col += blockDim.x)
    largest = max(largest, __float_as_uint(raw_element<TYPE>(raw, row, col)) & 0x7FFFFFFFu);
  atomicMax(&shared, largest);
  __syncthreads();
  const float scale = e4m3_scale(shared);
  if (threadIdx.x == 0) *fp8_rows::scale_at(out, row, padded) = row < raw.rows ? scale : 0;
  if (row >= raw.rows) return;
  uint8_t *codes = fp8_rows::row(out, row, padded);
  for (int64_t col = threadIdx.x; col < padded; col += blockDim.x)
    codes[col] = col < raw.cols ? f32_to_e4m3(raw_element<TYPE>(raw, row, col) / scale) : 0;
}

typedef void pack_kernel(const struct raw_rows, int64_t, void *);

struct pack_kernels {
  pack_kernel *bf16, *fp8;
};
template <int TYPE> static struct pack_kernels kernels_for(void) { return {expand_rows<TYPE>, quantize_rows<TYPE>}; }

static struct pack_kernels kernels_of(enum weight_type type) {
  switch (type) {
  case WEIGHT_F32:
    return kernels_for<WEIGHT_F32>();
  case WEIGHT_F16:
    return kernels_for<WEIGHT_F16>();
  case WEIGHT_BF16:
    return kernels_for<WEIGHT_BF16>();
  case WEIGHT_Q4_0:
    return kernels_for<WEIGHT_Q4_0>();
  case WEIGHT_Q4_1:
    return kernels_for<WEIGHT_Q4_1>();
  case WEIGHT_Q5_0:
    return kernels_for<WEIGHT_Q5_0>();
  case WEIGHT_Q5_1:
    return kernels_for<WEIGHT_Q5_1>();
  case WEIGHT_Q8_0:
    return kernels_for<WEIGHT_Q8_0>();
  case WEIGHT_Q4_K:
    return kernels_for<WEIGHT_Q4_K>();
  case WEIGHT_Q5_K:
    return kernels_for<WEIGHT_Q5_K>();
  case WEIGHT_Q6_K:
    return kernels_for<WEIGHT_Q6_K>();
  }
  return {};
}

oscar_status cuda_weight_check(struct backend *be, const struct weight *w) {
  return weight_check_layout(be, w, kernels_of(w->type).bf16 != NULL);
}

size_t cuda_packed_bytes(const struct backend *be, const struct weight *w) {
  const struct cuda_backend *b = cuda_of(be);
  const size_t rows = (size_t)w->rows, padded = (size_t)packed_cols(b, w);
  if (form_of(b, w) == WEIGHTS_BF16) return rows * padded * sizeof(__nv_bfloat16);
  return rows * padded + round_up(rows, PACKED_ROWS) * sizeof(float);
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
  const int64_t padded = packed_cols(b, w);
  const struct raw_rows raw = {(const uint8_t *)b->raw.data, w->rows, w->cols, elements, (int)block_bytes};
  const struct pack_kernels kernels = kernels_of(w->type);
  if (form_of(b, w) == WEIGHTS_FP8)
    kernels.fp8<<<(unsigned)round_up((size_t)w->rows, PACKED_ROWS), 256, 0, b->stream>>>(raw, padded, memory);
  else
    kernels.bf16<<<dim3((unsigned)w->rows, blocks_for((size_t)padded, 256)), 256, 0, b->stream>>>(raw, padded, memory);
  w->packed = memory;
  return cuda_launched(b->cuda, "expanding weights");
}

/* ---- FP8 to BF16 ---- */

/* A thread expands a vector. What reads `out` may be one launch behind. */
__global__ static void expand_codes(const void *weights, int64_t first, unsigned vectors, int64_t padded, uint4 *out) {
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x, of_row = (unsigned)(padded / fp8_rows::COLS);
  if (i >= vectors) {
    wait_for_input();
    return;
  }
  const int64_t row = first + i / of_row;
  const float scale = *fp8_rows::scale_at(weights, row, padded);
  const uint4 codes = load_weights(fp8_rows::row(weights, row, padded) + i % of_row * fp8_rows::COLS);
  uint32_t pairs[fp8_rows::COLS / 2];
#pragma unroll
  for (int half = 0; half < 2; half++) {
    float x[8];
    fp8_rows::eight(codes, half, x);
#pragma unroll
    for (int k = 0; k < 4; k++)
      pairs[4 * half + k] = bf16_pair(x[2 * k] * E4M3_FP16_FACTOR * scale, x[2 * k + 1] * E4M3_FP16_FACTOR * scale);
  }
  wait_for_input();
  out[2 * i] = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
  out[2 * i + 1] = make_uint4(pairs[4], pairs[5], pairs[6], pairs[7]);
}

oscar_status cuda_expand(struct cuda_backend *b, const struct weight *w, int64_t first, int64_t count, void *out) {
  const int64_t padded = packed_cols(b, w);
  const unsigned vectors = (unsigned)(count * padded / fp8_rows::COLS);
  launch(b, expand_codes, blocks_for(vectors, 256), 256, w->packed, first, vectors, padded, (uint4 *)out);
  return cuda_launched(b->cuda, "expanding weights");
}

/* ---- the embedding ---- */

template <typename W>
__global__ static void embed_rows(const void *table, int64_t rows, int cols, int64_t padded, const int32_t *ids, float *y) {
  wait_for_input();
  const int32_t id = ids[blockIdx.x];
  const bool known = id >= 0 && id < rows;
  for (int i = (int)threadIdx.x; i < cols; i += (int)blockDim.x)
    y[(int64_t)blockIdx.x * cols + i] = known ? W::element(table, id, i, padded) : __uint_as_float(0x7FC00000u);
}

oscar_status cuda_embed(struct backend *be, const struct weight *w, int n, const int32_t *ids, float *y) {
  struct cuda_backend *b = cuda_of(be);
  if (!w->packed) return set_error(be->context, OSCAR_INVALID_ARGUMENT, "tensor %s is not in the GPU's memory", w->name);
  if (n == 0) return OSCAR_OK;
  launch(b, form_of(b, w) == WEIGHTS_FP8 ? embed_rows<fp8_rows> : embed_rows<bf16_rows>, (unsigned)n, 256, w->packed, w->rows,
         (int)w->cols, packed_cols(b, w), ids, y);
  return cuda_launched(b->cuda, "reading the embedding");
}
