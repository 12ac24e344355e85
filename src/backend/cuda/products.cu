/*
 * products.cu - products with BF16 weights: few tokens and some tokens through kernels of ours, many through cuBLASLt.
 *
 * Up to a dozen tokens a product is a read of its weights, and weights of a call that share the input are one launch. With few
 * tokens a warp takes a few rows, its lanes vectors of 8 columns of them; activations stay float. With some tokens it takes 16
 * rows and multiplies them with 8 tokens by a tensor core's instruction. With many tokens tensor cores are what counts, and the
 * library knows them best. Except for few tokens activations are rounded to BF16. Small weights that lie after each other in
 * memory (q, k, v of a layer) are given to the library as one, and their results taken apart: alone, none of them would fill the
 * GPU.
 */
#include "backend/cuda/activations.cuh"
#include "backend/cuda/cuda_backend.h"

#define WARP         32
#define MOST_SHARING 3

#define MOST_FEW 8 /* tokens that the kernel takes at once */

/* Tiles of the library have 64 rows at least: weights with fewer rows than so many a multiprocessor are better joined, as long as
 * taking the results apart is cheap. */
#define TILE_ROWS     64
#define JOINED_TOKENS 128

/* ---- few tokens ---- */

struct few {
  int count, n; /* weights, tokens */
  int64_t cols, padded;
  const __nv_bfloat16 *w[MOST_SHARING];
  const float *bias[MOST_SHARING];
  float *y[MOST_SHARING];
  int64_t rows[MOST_SHARING], groups[MOST_SHARING]; /* groups: of rows that a warp takes */
  const float *x;
};

/* Eight weights of a row, read once and not kept. */
__device__ static uint4 load_weights(const __nv_bfloat16 *at) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(at));
  return v;
}

/* Columns first .. first + 7 of an input; past `cols` they are zero. VECTORS: cols is a multiple of 8 and x is aligned. */
template <bool VECTORS> __device__ static void load_input(const float *x, int64_t first, int64_t cols, float out[8]) {
  if constexpr (VECTORS) {
    const float4 a = *(const float4 *)(x + first), b = *(const float4 *)(x + first + 4);
    out[0] = a.x, out[1] = a.y, out[2] = a.z, out[3] = a.w, out[4] = b.x, out[5] = b.y, out[6] = b.z, out[7] = b.w;
  } else {
#pragma unroll
    for (int i = 0; i < 8; i++) out[i] = first + i < cols ? x[first + i] : 0;
  }
}

__device__ static float dot_of(uint4 w, const float x[8], float sum) {
  const uint32_t words[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    sum = fmaf(__uint_as_float(words[i] << 16), x[2 * i], sum);
    sum = fmaf(__uint_as_float(words[i] & 0xFFFF0000u), x[2 * i + 1], sum);
  }
  return sum;
}

/* The products of ROWS vectors of weights, at column `first`, with all tokens. Rows and tokens that are not there repeat the
 * last. */
template <int TOKENS, int ROWS, bool VECTORS>
__device__ static void add_products(const struct few &f, const uint4 weights[ROWS], int64_t first, float sums[ROWS][TOKENS]) {
#pragma unroll
  for (int t = 0; t < TOKENS; t++) {
    float x[8];
    load_input<VECTORS>(f.x + (t < f.n ? t : f.n - 1) * f.cols, first, f.cols, x);
#pragma unroll
    for (int r = 0; r < ROWS; r++) sums[r][t] = dot_of(weights[r], x, sums[r][t]);
  }
}

/*
 * ROWS rows for WARPS warps of a block, which share out the columns. The first weights are asked for before the input is there.
 */
template <int TOKENS, int ROWS, int WARPS, bool VECTORS> __global__ static void few_tokens(const __grid_constant__ struct few f) {
  enum {
    AHEAD = ROWS >= 4 ? 2 : 4,
    STEP = WARPS * WARP * 8
  }; /* vectors of a row that are on their way at once; columns of all */
  const int lane = (int)threadIdx.x % WARP, warp = (int)threadIdx.x / WARP % WARPS;
  int64_t group = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) / (WARPS * WARP);
  int i = 0;
  while (i < f.count && group >= f.groups[i]) group -= f.groups[i++];
  if (i == f.count) return; /* all warps of a group together */
  const int64_t first_row = group * ROWS, rows = f.rows[i];
  const __nv_bfloat16 *w[ROWS];
#pragma unroll
  for (int r = 0; r < ROWS; r++) w[r] = f.w[i] + (first_row + r < rows ? first_row + r : rows - 1) * f.padded;

  float sums[ROWS][TOKENS] = {};
  int64_t at = (warp * WARP + lane) * 8;
  bool waited = false;
  for (; at + (AHEAD - 1) * STEP < f.padded; at += AHEAD * STEP) {
    uint4 weights[AHEAD][ROWS];
#pragma unroll
    for (int a = 0; a < AHEAD; a++)
#pragma unroll
      for (int r = 0; r < ROWS; r++) weights[a][r] = load_weights(w[r] + at + a * STEP);
    if (!waited) wait_for_input();
    waited = true;
#pragma unroll
    for (int a = 0; a < AHEAD; a++) add_products<TOKENS, ROWS, VECTORS>(f, weights[a], at + a * STEP, sums);
  }
  for (; at < f.padded; at += STEP) {
    uint4 weights[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; r++) weights[r] = load_weights(w[r] + at);
    if (!waited) wait_for_input();
    waited = true;
    add_products<TOKENS, ROWS, VECTORS>(f, weights, at, sums);
  }
  if (!waited) wait_for_input(); /* results may lie where kernels before this still read */

  __shared__ float shared[WARPS > 1 ? WARPS : 1][ROWS * TOKENS];
#pragma unroll
  for (int r = 0; r < ROWS; r++)
#pragma unroll
    for (int t = 0; t < TOKENS; t++) {
#pragma unroll
      for (int step = WARP / 2; step > 0; step /= 2) sums[r][t] += __shfl_xor_sync(~0u, sums[r][t], step);
      if (WARPS > 1 && lane == 0) shared[warp][r * TOKENS + t] = sums[r][t];
    }
  if (WARPS > 1) {
    __syncthreads();
    if (warp > 0) return;
  }
#pragma unroll
  for (int r = 0; r < ROWS; r++)
#pragma unroll
    for (int t = 0; t < TOKENS; t++) {
      const int64_t row = first_row + r;
      if (lane != (r * TOKENS + t) % WARP || row >= rows || t >= f.n) continue;
      float sum = sums[r][t];
      if (WARPS > 1)
        for (int k = 1; k < WARPS; k++) sum += shared[k][r * TOKENS + t];
      f.y[i][t * rows + row] = sum + (f.bias[i] ? f.bias[i][row] : 0);
    }
}

#define FEW_THREADS 128

template <int TOKENS, int ROWS, int WARPS> static void launch_few(const struct cuda_backend *b, struct few *f) {
  const bool vectors = f->cols == f->padded && ((uintptr_t)f->x & 15) == 0;
  int64_t groups = 0;
  for (int i = 0; i < f->count; i++) groups += f->groups[i] = (f->rows[i] + ROWS - 1) / ROWS;
  const unsigned blocks = blocks_for((size_t)groups * WARPS * WARP, FEW_THREADS);
  launch(b, vectors ? few_tokens<TOKENS, ROWS, WARPS, true> : few_tokens<TOKENS, ROWS, WARPS, false>, blocks, FEW_THREADS, *f);
}

/* More rows for a warp are fewer reads of the input; fewer make more warps, which small weights need. So do warps that share rows
 * where there are columns enough for them. */
template <int TOKENS> static void launch_rows(const struct cuda_backend *b, struct few *f) {
  int64_t rows = 0;
  for (int i = 0; i < f->count; i++) rows += f->rows[i];
  const int64_t warps = 16 * (int64_t)b->cuda->info.multiprocessors;
  if (f->padded >= 2048 && rows >= 8 * warps)
    launch_few<TOKENS, 4, 4>(b, f);
  else if (f->padded >= 2048)
    launch_few<TOKENS, 2, 4>(b, f);
  else if (rows >= 4 * warps && TOKENS > 1)
    launch_few<TOKENS, 4, 1>(b, f);
  else if (rows >= 2 * warps)
    launch_few<TOKENS, 2, 1>(b, f);
  else
    launch_few<TOKENS, 1, 1>(b, f);
}

static struct few describe_few(int count, const struct weight *const *w, const float *const *bias, int first, int n,
                               const float *x, float *const *y) {
  struct few f = {};
  f.count = count;
  f.n = n;
  f.cols = w[0]->cols;
  f.padded = packed_cols(w[0]);
  f.x = x + first * f.cols;
  for (int i = 0; i < count; i++) {
    f.w[i] = packed_of(w[i]);
    f.bias[i] = bias ? bias[i] : NULL;
    f.rows[i] = w[i]->rows;
    f.y[i] = y[i] + first * w[i]->rows;
  }
  return f;
}

static oscar_status matmul_few(struct cuda_backend *b, int count, const struct weight *const *w, const float *const *bias, int n,
                               const float *x, float *const *y) {
  for (int done = 0; done < n; done += MOST_FEW) {
    struct few f = describe_few(count, w, bias, done, n - done < MOST_FEW ? n - done : MOST_FEW, x, y);
    if (f.n == 1)
      launch_rows<1>(b, &f);
    else if (f.n == 2)
      launch_rows<2>(b, &f);
    else if (f.n <= 4)
      launch_rows<4>(b, &f);
    else
      launch_rows<8>(b, &f);
  }
  return cuda_launched(b->cuda, "multiplying few tokens");
}

/* ---- some tokens ---- */

#define TILE        16 /* rows of an instruction */
#define TILE_TOKENS 8
#define PIECE       32 /* columns of a row that four lanes load at once: two instructions */
#define SOME_WARPS  8  /* of a block, which share out the columns */
#define MOST_SOME   16

__device__ static uint32_t bf16_pair(float a, float b) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(a, b);
  return *(const uint32_t *)&pair;
}

/* sums [16 rows][8 tokens] += weights [16][16 columns] inputs' [16][8] */
__device__ static void multiply_tile(float sums[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                     uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

/* Weights of two rows that are on their way to a lane: so many pieces of each, beginning at its column `at`; zeros behind the
 * end. */
enum { SOME_AHEAD = 4 };
__device__ static void load_pieces(const __nv_bfloat16 *low, const __nv_bfloat16 *high, int64_t at, int64_t end,
                                   uint4 weights[SOME_AHEAD][2]) {
#pragma unroll
  for (int a = 0; a < SOME_AHEAD; a++, at += PIECE) {
    weights[a][0] = at < end ? load_weights(low + at) : make_uint4(0, 0, 0, 0);
    weights[a][1] = at < end ? load_weights(high + at) : make_uint4(0, 0, 0, 0);
  }
}

/*
 * TILES times 8 tokens. With g = lane / 4 and t = lane % 4 the instruction wants of a lane, at columns 2t and 2t + 8 of 16, pairs
 * of rows g and g + 8 and of token g. The order of columns is free as long as rows and tokens have the same, so a lane takes
 * columns 8t .. 8t + 7 of 32, which it loads at once, as those of two instructions.
 */
template <int TILES, bool VECTORS>
__device__ static void multiply_pieces(const struct few &f, const uint4 weights[SOME_AHEAD][2], int64_t at, int g,
                                       float sums[TILES][4]) {
#pragma unroll
  for (int a = 0; a < SOME_AHEAD; a++, at += PIECE)
#pragma unroll
    for (int k = 0; k < TILES; k++) {
      const int token = k * TILE_TOKENS + g;
      float x[8] = {};
      if (at < f.padded && token < f.n) load_input<VECTORS>(f.x + token * f.cols, at, f.cols, x);
      const uint4 l = weights[a][0], h = weights[a][1];
      multiply_tile(sums[k], l.x, h.x, l.y, h.y, bf16_pair(x[0], x[1]), bf16_pair(x[2], x[3]));
      multiply_tile(sums[k], l.z, h.z, l.w, h.w, bf16_pair(x[4], x[5]), bf16_pair(x[6], x[7]));
    }
}

template <int TILES, bool VECTORS> __global__ static void some_tokens(const __grid_constant__ struct few f) {
  enum { STEP = SOME_WARPS * SOME_AHEAD * PIECE }; /* columns of all warps */
  __shared__ float shared[SOME_WARPS][TILES * TILE_TOKENS][TILE];
  const int lane = (int)threadIdx.x % WARP, warp = (int)threadIdx.x / WARP, g = lane / 4, t = lane % 4;
  int64_t group = blockIdx.x;
  int i = 0;
  while (i < f.count && group >= f.groups[i]) group -= f.groups[i++];
  if (i == f.count) return;
  const int64_t first_row = group * TILE, rows = f.rows[i];
  const __nv_bfloat16 *low = f.w[i] + (first_row + g < rows ? first_row + g : rows - 1) * f.padded;
  const __nv_bfloat16 *high = f.w[i] + (first_row + g + 8 < rows ? first_row + g + 8 : rows - 1) * f.padded;

  /* A warp's lanes go through the loop together: the instruction needs all of them. Keeping the next pieces on their way too was
   * slower (more registers, fewer warps). */
  float sums[TILES][4] = {};
  bool waited = false;
  for (int64_t first = warp * SOME_AHEAD * PIECE; first < f.padded; first += STEP) {
    uint4 weights[SOME_AHEAD][2];
    load_pieces(low, high, first + t * 8, f.padded, weights);
    if (!waited) wait_for_input();
    waited = true;
    multiply_pieces<TILES, VECTORS>(f, weights, first + t * 8, g, sums);
  }
  if (!waited) wait_for_input(); /* results may lie where kernels before this still read */

#pragma unroll
  for (int k = 0; k < TILES; k++)
#pragma unroll
    for (int c = 0; c < 4; c++) shared[warp][k * TILE_TOKENS + 2 * t + c % 2][g + c / 2 * 8] = sums[k][c];
  __syncthreads();
  for (int k = (int)threadIdx.x; k < TILES * TILE_TOKENS * TILE; k += SOME_WARPS * WARP) {
    const int token = k / TILE, r = k % TILE;
    const int64_t row = first_row + r;
    if (token >= f.n || row >= rows) continue;
    float sum = 0;
#pragma unroll
    for (int other = 0; other < SOME_WARPS; other++) sum += shared[other][token][r];
    f.y[i][token * rows + row] = sum + (f.bias[i] ? f.bias[i][row] : 0);
  }
}

static oscar_status matmul_some(struct cuda_backend *b, int count, const struct weight *const *w, const float *const *bias, int n,
                                const float *x, float *const *y) {
  for (int done = 0; done < n; done += MOST_SOME) {
    struct few f = describe_few(count, w, bias, done, n - done < MOST_SOME ? n - done : MOST_SOME, x, y);
    const bool vectors = f.cols == f.padded && ((uintptr_t)f.x & 15) == 0;
    int64_t groups = 0;
    for (int i = 0; i < count; i++) groups += f.groups[i] = (f.rows[i] + TILE - 1) / TILE;
    if (f.n <= TILE_TOKENS)
      launch(b, vectors ? some_tokens<1, true> : some_tokens<1, false>, (unsigned)groups, SOME_WARPS * WARP, f);
    else
      launch(b, vectors ? some_tokens<2, true> : some_tokens<2, false>, (unsigned)groups, SOME_WARPS * WARP, f);
  }
  return cuda_launched(b->cuda, "multiplying some tokens");
}

/* ---- many tokens ---- */

/* Inputs of a product: x, or what an activation makes of a gate x and its `up`. */
struct plain {
  __device__ float operator()(float x, float) const { return x; }
};

/* out [n][padded] = f(x, up) in BF16, x and up [n][cols]; zeros behind */
template <typename F>
__global__ static void round_inputs(int64_t cols, int64_t padded, size_t count, const float *x, const float *up, F f,
                                    __nv_bfloat16 *out) {
  const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
  wait_for_input();
  if (i >= count) return;
  const int64_t token = (int64_t)(i / (size_t)padded), col = (int64_t)(i % (size_t)padded), at = token * cols + col;
  out[i] = __float2bfloat16_rn(col < cols ? f(x[at], up ? up[at] : 0) : 0);
}

/* The same where rows need no padding: four numbers a thread. */
template <typename F> __global__ static void round_vectors(size_t vectors, const float4 *x, const float4 *up, F f, uint2 *out) {
  const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
  wait_for_input();
  if (i >= vectors) return;
  const float4 v = x[i], u = up ? up[i] : make_float4(0, 0, 0, 0);
  out[i] = make_uint2(bf16_pair(f(v.x, u.x), f(v.y, u.y)), bf16_pair(f(v.z, u.z), f(v.w, u.w)));
}

template <typename F>
static oscar_status round_to_bf16(struct cuda_backend *b, const struct weight *w, int n, const float *x, const float *up, F f) {
  const int64_t padded = packed_cols(w);
  const size_t count = (size_t)n * (size_t)padded;
  oscar_status status = device_scratch_reserve(b, &b->rounded, count * sizeof(__nv_bfloat16));
  if (status != OSCAR_OK) return status;
  if (padded == w->cols && (((uintptr_t)x | (uintptr_t)up) & 15) == 0)
    launch(b, round_vectors<F>, blocks_for(count / 4, 256), 256, count / 4, (const float4 *)x, (const float4 *)up, f,
           (uint2 *)b->rounded.data);
  else
    launch(b, round_inputs<F>, blocks_for(count, 256), 256, w->cols, padded, count, x, up, f, (__nv_bfloat16 *)b->rounded.data);
  return cuda_launched(b->cuda, "rounding activations");
}

/* One product of rounded activations. *possible as library_multiply says. */
static oscar_status multiply(struct cuda_backend *b, const struct weight *w, int64_t rows, const float *bias, int n, float *y,
                             bool *possible) {
  const uintptr_t place = (uintptr_t)y | (uintptr_t)(rows * (int64_t)sizeof *y);
  const struct product_shape shape = {rows, packed_cols(w), n, place & 4 ? 4 : place & 8 ? 8 : 16, bias != NULL};
  const struct product_memory memory = {w->packed, b->rounded.data, bias, y, b->workspace.data, b->workspace.bytes};
  const cublasStatus_t result = library_multiply(&b->library, &shape, &memory, b->stream, possible);
  if (result == CUBLAS_STATUS_SUCCESS) return OSCAR_OK;
  return set_error(b->base.context, OSCAR_UNSUPPORTED, "GPU %d: %s: cuBLASLt could not multiply (status %d)",
                   b->cuda->info.ordinal, w->name, (int)result);
}

struct joined {
  int count, n;
  int64_t all_rows, rows[MOST_SHARING];
  const float *bias[MOST_SHARING], *from;
  float *y[MOST_SHARING];
};

/* y[i] [n][rows[i]] = its columns of from [n][all_rows] + bias[i] */
__global__ static void take_apart(const __grid_constant__ struct joined j) {
  int64_t row = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
  wait_for_input();
  if (row >= j.all_rows) return;
  const float value = j.from[blockIdx.y * j.all_rows + row];
  int i = 0;
  while (row >= j.rows[i]) row -= j.rows[i++];
  j.y[i][blockIdx.y * j.rows[i] + row] = value + (j.bias[i] ? j.bias[i][row] : 0);
}

static bool is_small(const struct cuda_backend *b, const struct weight *w) {
  return w->rows < TILE_ROWS * (int64_t)b->cuda->info.multiprocessors;
}

static bool can_be_joined(const struct cuda_backend *b, int count, const struct weight *const *w, int n) {
  int64_t all_rows = 0;
  bool small = false;
  for (int i = 0; i < count; i++) {
    small = small || is_small(b, w[i]);
    if (i > 0 && packed_of(w[i]) != packed_of(w[i - 1]) + w[i - 1]->rows * packed_cols(w[i - 1])) return false;
    all_rows += w[i]->rows;
  }
  return small && count > 1 && n <= JOINED_TOKENS && (size_t)(n * all_rows) * sizeof(float) <= b->joined.bytes;
}

static oscar_status multiply_joined(struct cuda_backend *b, int count, const struct weight *const *w, const float *const *bias,
                                    int n, float *const *y, bool *possible) {
  struct joined j = {};
  j.count = count;
  j.n = n;
  j.from = (const float *)b->joined.data;
  for (int i = 0; i < count; i++) {
    j.rows[i] = w[i]->rows;
    j.all_rows += w[i]->rows;
    j.bias[i] = bias ? bias[i] : NULL;
    j.y[i] = y[i];
  }
  oscar_status status = multiply(b, w[0], j.all_rows, NULL, n, (float *)b->joined.data, possible);
  if (status != OSCAR_OK || !*possible) return status;
  launch(b, take_apart, dim3(blocks_for((size_t)j.all_rows, 256), (unsigned)n), 256, j);
  return cuda_launched(b->cuda, "taking results apart");
}

static oscar_status matmul_library(struct cuda_backend *b, int count, const struct weight *const *w, const float *const *bias,
                                   int n, const float *x, float *const *y) {
  bool possible = false;
  oscar_status status = round_to_bf16(b, w[0], n, x, NULL, plain{});
  if (status == OSCAR_OK && can_be_joined(b, count, w, n)) {
    status = multiply_joined(b, count, w, bias, n, y, &possible);
    if (status != OSCAR_OK || possible) return status;
  }
  for (int i = 0; i < count && status == OSCAR_OK; i++) {
    const float *of_rows = bias ? bias[i] : NULL;
    status = multiply(b, w[i], w[i]->rows, of_rows, n, y[i], &possible);
    if (status == OSCAR_OK && !possible) status = matmul_few(b, 1, w + i, &of_rows, n, x, y + i);
  }
  return status;
}

/* ---- the operation ---- */

/* What is fastest (bench_cuda_products, H100): up to 8 tokens kernels of ours; up to 16 if the weights are small, when the
 * library's launches take longer than its products. */
#define FEW_TOKENS  2
#define SOME_TOKENS 8
#define SMALL_BYTES ((size_t)8 << 20)

static enum cuda_product way_of(const struct cuda_backend *b, int count, const struct weight *const *w, int n) {
  size_t bytes = 0;
  for (int i = 0; i < count; i++) bytes += cuda_packed_bytes(&b->base, w[i]);
  if (b->way != PRODUCT_BY_SHAPE) return b->way;
  if (n <= FEW_TOKENS) return PRODUCT_FEW;
  return n <= SOME_TOKENS || (n <= MOST_SOME && bytes < SMALL_BYTES) ? PRODUCT_SOME : PRODUCT_LIBRARY;
}

static size_t rounded_bytes(const struct weight *w, int n) { return (size_t)n * (size_t)packed_cols(w) * sizeof(__nv_bfloat16); }

size_t cuda_product_scratch(const struct backend *be, const struct weight *w, int n) {
  return cuda_of(be)->workspace.bytes + rounded_bytes(w, n);
}

oscar_status cuda_reserve(struct backend *be, const struct weight *w, int n) {
  struct cuda_backend *b = cuda_of(be);
  oscar_status status = device_scratch_reserve(b, &b->rounded, rounded_bytes(w, n));
  if (status != OSCAR_OK || !is_small(b, w)) return status;
  const size_t tokens = n < JOINED_TOKENS ? (size_t)n : JOINED_TOKENS;
  return device_scratch_reserve(b, &b->joined, tokens * MOST_SHARING * (size_t)w->rows * sizeof(float));
}

static oscar_status check(struct cuda_backend *b, int count, const struct weight *const *w, int n) {
  oscar_context *context = b->base.context;
  if (count < 1 || count > MOST_SHARING || n < 0)
    return set_error(context, OSCAR_INVALID_ARGUMENT, "a product of %d weights with %d tokens is not possible", count, n);
  for (int i = 0; i < count; i++) {
    if (!w[i]->packed) return set_error(context, OSCAR_INVALID_ARGUMENT, "tensor %s is not in the GPU's memory", w[i]->name);
    if (w[i]->cols != w[0]->cols)
      return set_error(context, OSCAR_INVALID_ARGUMENT, "%s has %lld columns, but shares its input with %s, which has %lld",
                       w[i]->name, (long long)w[i]->cols, w[0]->name, (long long)w[0]->cols);
  }
  return OSCAR_OK;
}

oscar_status cuda_matmul(struct backend *be, int count, const struct weight *const *w, const float *const *bias, int n,
                         const float *x, float *const *y) {
  struct cuda_backend *b = cuda_of(be);
  oscar_status status = check(b, count, w, n);
  if (status != OSCAR_OK || n == 0) return status;
  const enum cuda_product way = way_of(b, count, w, n);
  if (way == PRODUCT_LIBRARY) return matmul_library(b, count, w, bias, n, x, y);
  return way == PRODUCT_FEW ? matmul_few(b, count, w, bias, n, x, y) : matmul_some(b, count, w, bias, n, x, y);
}

oscar_status cuda_matmul_gated(struct backend *be, const struct weight *w, enum activation activation, int n, float *gate,
                               const float *up, float *y) {
  struct cuda_backend *b = cuda_of(be);
  oscar_status status = check(b, 1, &w, n);
  if (status != OSCAR_OK || n == 0) return status;
  const enum cuda_product way = way_of(b, 1, &w, n);
  bool possible = false;
  if (way == PRODUCT_LIBRARY) {
    status = activation == ACTIVATION_SILU ? round_to_bf16(b, w, n, gate, up, silu{}) : round_to_bf16(b, w, n, gate, up, gelu{});
    if (status == OSCAR_OK) status = multiply(b, w, w->rows, NULL, n, y, &possible);
    if (status != OSCAR_OK || possible) return status;
  }
  const size_t count = (size_t)n * (size_t)w->cols;
  if (activation == ACTIVATION_SILU)
    cuda_silu_mul(be, count, gate, up);
  else
    cuda_gelu_mul(be, count, gate, up);
  return way == PRODUCT_SOME ? matmul_some(b, 1, &w, NULL, n, gate, &y) : matmul_few(b, 1, &w, NULL, n, gate, &y);
}
