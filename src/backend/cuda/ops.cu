/*
 * ops.cu - the element-wise operations of a forward pass.
 *
 * They touch activations only. While decoding they are all latency: what can be one launch is one (adding and norming; norming
 * and rotating the heads of q and k). A launch that fails is found by the next operation that gives a status.
 */
#include "backend/cuda/activations.cuh"
#include "backend/cuda/cuda_backend.h"
#include "backend/cuda/packed_rows.cuh"
#include "cuda/rotation.cuh"

#include <math.h>
#include <string.h>

/* ---- norms ---- */

template <int THREADS> __device__ static float sum_of_row(float x, float *shared) {
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(~0u, x, step);
  if constexpr (THREADS > 32) {
    const int warp = (int)threadIdx.x / 32, lane = (int)threadIdx.x % 32;
    if (lane == 0) shared[warp] = x;
    __syncthreads();
    x = lane < THREADS / 32 ? shared[lane] : 0;
    for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(~0u, x, step);
  }
  return x;
}

/* THREADS threads for a row. Each looks at elements of its own only, so that y may be x, and `add` may be y. */
template <int THREADS, bool ADD>
__global__ static void norm_rows(int64_t rows, int dim, const float *x, float *sum, const float *add, const float *weight,
                                 float eps, float *y) {
  __shared__ float shared[32];
  const int in_block = (int)blockDim.x / THREADS, thread = (int)threadIdx.x % THREADS;
  const int64_t row = (int64_t)blockIdx.x * in_block + (int)threadIdx.x / THREADS;
  wait_for_input();
  if (row >= rows) return; /* whole warps, and in the case of larger rows none */
  const float *from = x + row * dim;
  float squares = 0;
  for (int i = thread; i < dim; i += THREADS) {
    float v = from[i];
    if (ADD) sum[row * dim + i] = v += add[row * dim + i];
    squares += v * v;
  }
  squares = sum_of_row<THREADS>(squares, shared);
  const float factor = 1 / sqrtf(squares / (float)dim + eps);
  for (int i = thread; i < dim; i += THREADS) y[row * dim + i] = (ADD ? sum : x)[row * dim + i] * factor * weight[i];
}

/*
 * The same of one row a block, in vectors of 4 that stay in registers: thread t has vectors t, t + threads, ... A decoding step
 * waits for it twice a layer, so there is one read of memory after the kernel before: weights come ahead of it. And products that
 * want their input in BF16 find it there: rounded [rows][dim], or NULL.
 */
template <int VECTORS, bool ADD>
__global__ static void norm_row(int dim, const float *x, float *sum, const float *add, const float *weight, float eps, float *y,
                                __nv_bfloat16 *rounded) {
  __shared__ float shared[32];
  const int64_t first = (int64_t)blockIdx.x * dim;
  float4 w[VECTORS], v[VECTORS];
#pragma unroll
  for (int k = 0; k < VECTORS; k++) {
    const int i = 4 * ((int)threadIdx.x + k * (int)blockDim.x);
    if (i < dim) w[k] = __ldg((const float4 *)(weight + i));
  }
  wait_for_input();
  float squares = 0;
#pragma unroll
  for (int k = 0; k < VECTORS; k++) {
    const int i = 4 * ((int)threadIdx.x + k * (int)blockDim.x);
    if (i >= dim) continue;
    v[k] = *(const float4 *)(x + first + i);
    if (ADD) {
      const float4 more = *(const float4 *)(add + first + i);
      v[k] = make_float4(v[k].x + more.x, v[k].y + more.y, v[k].z + more.z, v[k].w + more.w);
      *(float4 *)(sum + first + i) = v[k];
    }
    squares += v[k].x * v[k].x + v[k].y * v[k].y + v[k].z * v[k].z + v[k].w * v[k].w;
  }
  for (int step = 16; step > 0; step /= 2) squares += __shfl_xor_sync(~0u, squares, step);
  const int lane = (int)threadIdx.x % 32;
  if (lane == 0) shared[threadIdx.x / 32] = squares;
  __syncthreads();
  squares = lane < (int)blockDim.x / 32 ? shared[lane] : 0;
  for (int step = 16; step > 0; step /= 2) squares += __shfl_xor_sync(~0u, squares, step);
  const float factor = 1 / sqrtf(squares / (float)dim + eps);
#pragma unroll
  for (int k = 0; k < VECTORS; k++) {
    const int i = 4 * ((int)threadIdx.x + k * (int)blockDim.x);
    if (i >= dim) continue;
    const float4 normed =
        make_float4(v[k].x * factor * w[k].x, v[k].y * factor * w[k].y, v[k].z * factor * w[k].z, v[k].w * factor * w[k].w);
    *(float4 *)(y + first + i) = normed;
    if (rounded) *(uint2 *)(rounded + first + i) = make_uint2(bf16_pair(normed.x, normed.y), bf16_pair(normed.z, normed.w));
  }
}

static bool are_vectors(int dim, const float *x, const float *add, const float *weight, const float *y) {
  return dim % 4 == 0 && (((uintptr_t)x | (uintptr_t)add | (uintptr_t)weight | (uintptr_t)y) & 15) == 0;
}

template <bool ADD>
static void launch_norm(struct cuda_backend *b, int64_t rows, int dim, const float *x, float *sum, const float *add,
                        const float *weight, float eps, float *y) {
  if (rows == 0) return;
  const int vectors = dim / 4, threads = vectors < 1024 ? (vectors + 31) / 32 * 32 : 1024;
  if (dim <= 256) {
    launch(b, norm_rows<32, ADD>, blocks_for((size_t)rows, 8), 256, rows, dim, x, sum, add, weight, eps, y);
  } else if (are_vectors(dim, x, add, weight, y) && vectors <= 4 * threads) {
    const bool rounds = rows > FLOAT_TOKENS && dim % 8 == 0 && (size_t)rows * (size_t)dim * 2 <= b->rounded.bytes;
    launch(b,
           vectors <= threads       ? norm_row<1, ADD>
           : vectors <= 2 * threads ? norm_row<2, ADD>
                                    : norm_row<4, ADD>,
           (unsigned)rows, threads, dim, x, sum, add, weight, eps, y, rounds ? (__nv_bfloat16 *)b->rounded.data : NULL);
    if (rounds) b->normed = {y, rows, dim};
  } else {
    launch(b, norm_rows<1024, ADD>, (unsigned)rows, 1024, rows, dim, x, sum, add, weight, eps, y);
  }
}

void cuda_rms_norm(struct backend *be, int64_t rows, int dim, const float *x, const float *weight, float eps, float *y) {
  launch_norm<false>(cuda_of(be), rows, dim, x, NULL, NULL, weight, eps, y);
}

void cuda_add_rms_norm(struct backend *be, int64_t rows, int dim, float *x, const float *add, const float *weight, float eps,
                       float *y) {
  launch_norm<true>(cuda_of(be), rows, dim, x, x, add, weight, eps, y);
}

/* ---- RoPE ---- */

static void frequencies_free(struct cuda_backend *b, struct rope_frequencies *f) {
  cuda_release(b->cuda, f->on_gpu, (size_t)f->spec.rotary_dim / 2 * sizeof(double));
  mem_free(b->base.context, f->on_host);
  mem_free(b->base.context, f->factors);
  *f = {};
}

void cuda_rope_free(struct cuda_backend *b) {
  for (int i = 0; i < KEPT_ROPES; i++) frequencies_free(b, &b->ropes[i]);
}

/* Bits are compared: equal bits are what matters. */
static bool frequencies_are_of(const struct rope_frequencies *f, const struct rope_spec *spec) {
  if (!f->on_gpu || f->spec.rotary_dim != spec->rotary_dim || !f->factors != !spec->factors) return false;
  if (memcmp(&f->spec.base, &spec->base, sizeof spec->base) != 0) return false;
  if (memcmp(&f->spec.linear_scale, &spec->linear_scale, sizeof spec->linear_scale) != 0) return false;
  return !spec->factors || memcmp(f->factors, spec->factors, (size_t)spec->rotary_dim / 2 * sizeof(float)) == 0;
}

static oscar_status frequencies_make(struct cuda_backend *b, const struct rope_spec *spec, struct rope_frequencies *f) {
  oscar_context *context = b->base.context;
  const size_t pairs = (size_t)spec->rotary_dim / 2;
  f->spec = *spec;
  f->on_host = (double *)mem_alloc(context, pairs, sizeof *f->on_host);
  if (!f->on_host) return OSCAR_NO_MEMORY;
  if (spec->factors) {
    f->factors = (float *)mem_alloc(context, pairs, sizeof *f->factors);
    if (!f->factors) return OSCAR_NO_MEMORY;
    memcpy(f->factors, spec->factors, pairs * sizeof *f->factors);
  }
  for (size_t i = 0; i < pairs; i++) {
    f->on_host[i] = (double)spec->linear_scale * pow((double)spec->base, -2.0 * (double)i / spec->rotary_dim);
    if (spec->factors) f->on_host[i] /= (double)spec->factors[i];
  }
  oscar_status status = cuda_alloc(b->cuda, pairs * sizeof *f->on_gpu, (void **)&f->on_gpu);
  return status == OSCAR_OK ? cuda_upload(b->cuda, f->on_gpu, f->on_host, pairs * sizeof *f->on_gpu) : status;
}

/* Kept from the first time that a setting is asked for; a model has one or two. */
static oscar_status frequencies_find(struct cuda_backend *b, const struct rope_spec *spec, const double **on_gpu) {
  for (int i = 0; i < KEPT_ROPES; i++)
    if (frequencies_are_of(&b->ropes[i], spec)) {
      *on_gpu = b->ropes[i].on_gpu;
      return OSCAR_OK;
    }
  struct rope_frequencies *f = &b->ropes[b->next_rope];
  frequencies_free(b, f);
  oscar_status status = frequencies_make(b, spec, f);
  if (status != OSCAR_OK) {
    frequencies_free(b, f);
    return status;
  }
  b->next_rope = (b->next_rope + 1) % KEPT_ROPES;
  *on_gpu = f->on_gpu;
  return OSCAR_OK;
}

#define MOST_TENSORS 4
struct rotation {
  struct head_rotation head;
  int count, all_heads, head_dim;
  float eps;
  int heads[MOST_TENSORS];
  const float *norm[MOST_TENSORS];
  float *x[MOST_TENSORS];
};

/* A warp for a head of a token. */
template <int TURNS>
__global__ static void rotate_heads(const __grid_constant__ struct rotation r, int64_t n, const int32_t *positions) {
  const int64_t warp = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) / 32;
  const int lane = (int)threadIdx.x % 32;
  const int64_t token = warp / r.all_heads;
  wait_for_input();
  if (token >= n) return;
  int head = (int)(warp % r.all_heads), tensor = 0;
  while (head >= r.heads[tensor]) head -= r.heads[tensor++];
  float *x = r.x[tensor] + (token * r.heads[tensor] + head) * r.head_dim;
  rotate_head(x, r.norm[tensor], r.eps, r.head_dim, r.head, turns_at<TURNS>(r.head, positions[token], lane), lane,
              [x](int i, float value) { x[i] = value; });
}

oscar_status cuda_rope_on_device(struct backend *be, const struct rope_spec *spec, int head_dim, struct head_rotation *rotation) {
  if (spec->rotary_dim < 2 || spec->rotary_dim % 2 || spec->rotary_dim > head_dim)
    return set_error(be->context, OSCAR_INVALID_ARGUMENT,
                     "RoPE over %d of %d dimensions is not possible: expected an even number, at most all", spec->rotary_dim,
                     head_dim);
  if (head_dim > OSCAR_MAX_HEAD_DIM)
    return set_error(be->context, OSCAR_INVALID_ARGUMENT, "RoPE of heads of %d dimensions; at most %d", head_dim,
                     OSCAR_MAX_HEAD_DIM);
  rotation->pairs = spec->rotary_dim / 2;
  rotation->step = spec->kind == ROPE_NEOX ? rotation->pairs : 1;
  rotation->next = spec->kind == ROPE_NEOX ? 1 : 2;
  return frequencies_find(cuda_of(be), spec, &rotation->frequencies);
}

oscar_status cuda_rope(struct backend *be, const struct rope_spec *spec, int n, int head_dim, const int32_t *positions, float eps,
                       int count, const struct heads *tensors) {
  struct cuda_backend *b = cuda_of(be);
  struct rotation r = {};
  oscar_status status = cuda_rope_on_device(be, spec, head_dim, &r.head);
  if (status != OSCAR_OK) return status;
  if (count < 1 || count > MOST_TENSORS)
    return set_error(be->context, OSCAR_INVALID_ARGUMENT, "RoPE of %d tensors at once; expected 1 to %d", count, MOST_TENSORS);
  if (n == 0) return OSCAR_OK;
  r.count = count;
  r.head_dim = head_dim;
  r.eps = eps;
  for (int i = 0; i < count; i++) {
    r.heads[i] = tensors[i].count;
    r.norm[i] = tensors[i].norm;
    r.x[i] = tensors[i].x;
    r.all_heads += tensors[i].count;
  }
  launch(b, r.head.pairs <= 32 * USUAL_TURNS ? rotate_heads<USUAL_TURNS> : rotate_heads<MOST_TURNS>,
         blocks_for((size_t)n * (size_t)r.all_heads * 32, 128), 128, r, (int64_t)n, positions);
  return cuda_launched(b->cuda, "rotating heads");
}

/* ---- element by element ---- */

struct adding {
  __device__ float operator()(float x, float y) const { return x + y; }
};
struct scaling {
  float factor;
  __device__ float operator()(float x, float) const { return x * factor; }
};
/* Four elements a thread; y may be NULL where the operation does not look at it. */
template <typename F> __global__ static void change_elements(size_t count, float *x, const float *y, F f) {
  const size_t i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * 4;
  wait_for_input();
  if (i + 4 <= count && (((uintptr_t)x | (uintptr_t)y) & 15) == 0) {
    float4 a = *(const float4 *)(x + i), b = y ? *(const float4 *)(y + i) : make_float4(0, 0, 0, 0);
    *(float4 *)(x + i) = make_float4(f(a.x, b.x), f(a.y, b.y), f(a.z, b.z), f(a.w, b.w));
    return;
  }
  for (size_t k = i; k < i + 4 && k < count; k++) x[k] = f(x[k], y ? y[k] : 0);
}

template <typename F> static void launch_elements(struct backend *be, size_t count, float *x, const float *y, F f) {
  if (count > 0) launch(cuda_of(be), change_elements<F>, blocks_for((count + 3) / 4, 256), 256, count, x, y, f);
}

void cuda_add(struct backend *be, size_t count, float *x, const float *y) { launch_elements(be, count, x, y, adding{}); }
void cuda_scale(struct backend *be, size_t count, float *x, float factor) {
  launch_elements(be, count, x, NULL, scaling{factor});
}
void cuda_silu_mul(struct backend *be, size_t count, float *gate, const float *up) {
  launch_elements(be, count, gate, up, silu{});
}
void cuda_gelu_mul(struct backend *be, size_t count, float *gate, const float *up) {
  launch_elements(be, count, gate, up, gelu{});
}
