/*
 * products.cu - products with weights in BF16 or FP8: few tokens and some tokens through kernels of ours, many through cuBLASLt.
 *
 * Up to a dozen tokens a product is a read of its weights, and weights of a call that share the input are one launch. With few
 * tokens a warp takes a few rows, its lanes vectors of 16 bytes of them; activations stay float. With some tokens it takes 16 or
 * 32 rows and multiplies them with 8 tokens by a tensor core's instruction. With many tokens tensor cores are what counts, and
 * the library knows them best. Except for few tokens activations are rounded to BF16. Small weights that lie after each other in
 * memory (q, k, v of a layer) are given to the library as one, and their results taken apart: alone, none of them would fill the
 * GPU.
 *
 * Kernels of ours take FP8 apart in registers, to what multiplies activations of either kind exactly; the row's scale meets the
 * sum. For the library rows are expanded to BF16 first, so many at a time as a buffer holds. So activations are the same with
 * either form of weights, which FP8 on both sides would make much coarser. What expanding costs a product of many tokens carries;
 * up to EXPANDED_TOKENS weights are read by our kernel instead.
 */
#include "backend/cuda/activations.cuh"
#include "backend/cuda/packed_rows.cuh"

#define WARP         32
#define MOST_SHARING 3

#define MOST_FEW 8 /* tokens that the kernel takes at once */

/* Tiles of the library have 64 rows at least: weights with fewer rows than so many a multiprocessor are better joined, as long as
 * taking the results apart is cheap. */
#define TILE_ROWS     64
#define JOINED_TOKENS 128

/* Where results of weights go: y[i] [n][rows of i], rows `pitch` floats apart. */
struct results {
  float *y[MOST_SHARING];
  int64_t pitch[MOST_SHARING];
};

/* ---- few tokens ---- */

struct few {
  int count, n; /* weights, tokens */
  int64_t cols, padded;
  const void *w[MOST_SHARING];
  const float *bias[MOST_SHARING];
  float *y[MOST_SHARING];
  int64_t pitch[MOST_SHARING];                      /* of y: floats from a token's to the next one's */
  int64_t rows[MOST_SHARING], groups[MOST_SHARING]; /* groups: of rows that a warp takes */
  const void *x;                                    /* float [n][cols] */
};

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

/* The products of ROWS vectors of weights, at column `first`, with all tokens. Rows and tokens that are not there repeat the
 * last. */
template <typename W, int TOKENS, int ROWS, bool VECTORS>
__device__ static void add_products(const struct few &f, const uint4 weights[ROWS], int64_t first, float sums[ROWS][TOKENS]) {
#pragma unroll
  for (int half = 0; half < W::COLS / 8; half++) {
    float w[ROWS][8];
#pragma unroll
    for (int r = 0; r < ROWS; r++) W::eight(weights[r], half, w[r]);
#pragma unroll
    for (int t = 0; t < TOKENS; t++) {
      float x[8];
      load_input<VECTORS>((const float *)f.x + (t < f.n ? t : f.n - 1) * f.cols, first + 8 * half, f.cols, x);
#pragma unroll
      for (int r = 0; r < ROWS; r++)
#pragma unroll
        for (int i = 0; i < 8; i++) sums[r][t] = fmaf(w[r][i], x[i], sums[r][t]);
    }
  }
}

/*
 * ROWS rows for WARPS warps of a block, which share out the columns. The first weights are asked for before the input is there.
 */
template <typename W, int TOKENS, int ROWS, int WARPS, bool VECTORS>
__global__ static void few_tokens(const __grid_constant__ struct few f) {
  enum {
    AHEAD = ROWS >= 4 || W::COLS > 8 ? 2 : 4,
    STEP = WARPS * WARP * W::COLS
  }; /* vectors of a row that are on their way at once; columns of all */
  const int lane = (int)threadIdx.x % WARP, warp = (int)threadIdx.x / WARP % WARPS;
  int64_t group = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) / (WARPS * WARP);
  int i = 0;
  while (i < f.count && group >= f.groups[i]) group -= f.groups[i++];
  if (i == f.count) return; /* all warps of a group together */
  const int64_t first_row = group * ROWS, rows = f.rows[i];
  const uint8_t *w[ROWS]; /* a column is 16 / COLS bytes */
#pragma unroll
  for (int r = 0; r < ROWS; r++) w[r] = W::row(f.w[i], first_row + r < rows ? first_row + r : rows - 1, f.padded);

  float sums[ROWS][TOKENS] = {};
  int64_t at = (warp * WARP + lane) * W::COLS;
  bool waited = false;
  for (; at + (AHEAD - 1) * STEP < f.padded; at += AHEAD * STEP) {
    uint4 weights[AHEAD][ROWS];
#pragma unroll
    for (int a = 0; a < AHEAD; a++)
#pragma unroll
      for (int r = 0; r < ROWS; r++) weights[a][r] = load_weights(w[r] + (at + a * STEP) * 16 / W::COLS);
    if (!waited) wait_for_input();
    waited = true;
#pragma unroll
    for (int a = 0; a < AHEAD; a++) add_products<W, TOKENS, ROWS, VECTORS>(f, weights[a], at + a * STEP, sums);
  }
  for (; at < f.padded; at += STEP) {
    uint4 weights[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; r++) weights[r] = load_weights(w[r] + at * 16 / W::COLS);
    if (!waited) wait_for_input();
    waited = true;
    add_products<W, TOKENS, ROWS, VECTORS>(f, weights, at, sums);
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
      f.y[i][t * f.pitch[i] + row] = sum * W::scale_of_eights(f.w[i], row, f.padded) + (f.bias[i] ? f.bias[i][row] : 0);
    }
}

#define FEW_THREADS 128

template <typename W, int TOKENS, int ROWS, int WARPS> static void launch_few(struct cuda_backend *b, struct few *f) {
  const bool vectors = f->cols == f->padded && ((uintptr_t)f->x & 15) == 0;
  int64_t groups = 0;
  for (int i = 0; i < f->count; i++) groups += f->groups[i] = (f->rows[i] + ROWS - 1) / ROWS;
  const unsigned blocks = blocks_for((size_t)groups * WARPS * WARP, FEW_THREADS);
  launch(b, vectors ? few_tokens<W, TOKENS, ROWS, WARPS, true> : few_tokens<W, TOKENS, ROWS, WARPS, false>, blocks, FEW_THREADS,
         *f);
}

/* More rows for a warp are fewer reads of the input, of which FP8 needs more for a byte; fewer make more warps, which small
 * weights need. So do warps that share rows where there are columns enough for them. */
template <typename W, int TOKENS> static void launch_rows(struct cuda_backend *b, struct few *f) {
  int64_t rows = 0;
  for (int i = 0; i < f->count; i++) rows += f->rows[i];
  const int64_t warps = 16 * (int64_t)b->cuda->info.multiprocessors;
  if (f->padded >= 2048 && (rows >= 8 * warps || W::COLS > 8))
    launch_few<W, TOKENS, 4, 4>(b, f);
  else if (f->padded >= 2048)
    launch_few<W, TOKENS, 2, 4>(b, f);
  else if (rows >= 4 * warps && TOKENS > 1)
    launch_few<W, TOKENS, 4, 1>(b, f);
  else if (rows >= 2 * warps)
    launch_few<W, TOKENS, 2, 1>(b, f);
  else
    launch_few<W, TOKENS, 1, 1>(b, f);
}

/* Without the input. */
static struct few describe_few(const struct cuda_backend *b, int count, const struct weight *const *w, const float *const *bias,
                               int first, int n, const struct results *to) {
  struct few f = {};
  f.count = count;
  f.n = n;
  f.cols = w[0]->cols;
  f.padded = packed_cols(b, w[0]);
  for (int i = 0; i < count; i++) {
    f.w[i] = w[i]->packed;
    f.bias[i] = bias ? bias[i] : NULL;
    f.rows[i] = w[i]->rows;
    f.pitch[i] = to->pitch[i];
    f.y[i] = to->y[i] + first * to->pitch[i];
  }
  return f;
}

template <typename W> static void launch_tokens(struct cuda_backend *b, struct few *f) {
  if (f->n == 1)
    launch_rows<W, 1>(b, f);
  else if (f->n == 2)
    launch_rows<W, 2>(b, f);
  else if (f->n <= 4)
    launch_rows<W, 4>(b, f);
  else
    launch_rows<W, 8>(b, f);
}

static oscar_status matmul_few(struct cuda_backend *b, int count, const struct weight *const *w, const float *const *bias, int n,
                               const float *x, const struct results *to) {
  for (int done = 0; done < n; done += MOST_FEW) {
    struct few f = describe_few(b, count, w, bias, done, n - done < MOST_FEW ? n - done : MOST_FEW, to);
    f.x = x + done * f.cols;
    if (form_of(b, w[0]) == WEIGHTS_FP8)
      launch_tokens<fp8_rows>(b, &f);
    else
      launch_tokens<bf16_rows>(b, &f);
  }
  return cuda_launched(b->cuda, "multiplying few tokens");
}

/* ---- some tokens ---- */

#define TILE         16 /* rows of an instruction */
#define TILE_TOKENS  8
#define SOME_WARPS   8  /* of a block, which share out the columns */
#define MOST_FLOAT   16 /* tokens that the kernel takes at once where it reads activations as they are */
#define MOST_ROUNDED 64 /* tokens that it takes at once where they were rounded before */

/* sums [16 rows][8 tokens] += weights [16][16 columns] inputs' [16][8] */
__device__ static void multiply_tile(float sums[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                     uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

/* Where a token's columns first .. first + 7 come from: float [n][cols], in vectors or not, or BF16 [n][padded]. */
enum some_input { INPUT_VECTORS, INPUT_NUMBERS, INPUT_BF16 };

template <int INPUT> __device__ static void load_pairs(const struct few &f, int token, int64_t first, uint32_t out[4]) {
  if constexpr (INPUT == INPUT_BF16) {
    const uint4 v = *(const uint4 *)((const __nv_bfloat16 *)f.x + token * f.padded + first);
    out[0] = v.x, out[1] = v.y, out[2] = v.z, out[3] = v.w;
  } else {
    float x[8];
    load_input<INPUT == INPUT_VECTORS>((const float *)f.x + token * f.cols, first, f.cols, x);
#pragma unroll
    for (int i = 0; i < 4; i++) out[i] = bf16_pair(x[2 * i], x[2 * i + 1]);
  }
}

/*
 * What a block's warps do with TILED times 16 rows and TILES times 8 tokens. A piece is what four lanes load at once of a row.
 * AHEAD of them are on their way to a warp: for a lane, of row g = lane / 4 of each tile and of row g + 8.
 */
template <typename W, int TILED> struct some_pieces {
  enum { COLS = 4 * W::COLS, AHEAD = 4 / TILED };
  const uint8_t *rows[TILED][2]; /* a column is 16 / W::COLS bytes */
  uint4 weights[AHEAD][TILED][2];

  /* Rows that are not there repeat the last. */
  __device__ void begin(const void *w, int64_t first_row, int g, int64_t count, int64_t padded) {
#pragma unroll
    for (int k = 0; k < TILED * 2; k++) {
      const int64_t row = first_row + 8 * k + g;
      rows[k / 2][k % 2] = W::row(w, row < count ? row : count - 1, padded);
    }
  }
  /* The lane's column is `at`; zeros behind the end. */
  __device__ void load(int64_t at, int64_t end) {
#pragma unroll
    for (int a = 0; a < AHEAD; a++, at += COLS)
#pragma unroll
      for (int k = 0; k < TILED * 2; k++)
        weights[a][k / 2][k % 2] = at < end ? load_weights(rows[k / 2][k % 2] + at * 16 / W::COLS) : make_uint4(0, 0, 0, 0);
  }
  /*
   * With t = lane % 4 the instruction wants of a lane, at columns 2t and 2t + 8 of 16, pairs of rows g and g + 8 and of token g.
   * The order of columns is free as long as rows and tokens have the same, so the columns of a lane's vector are those of COLS /
   * 4 instructions.
   */
  template <int TILES, int INPUT>
  __device__ void multiply(const struct few &f, int64_t at, int g, float sums[TILED][TILES][4]) const {
#pragma unroll
    for (int a = 0; a < AHEAD; a++, at += COLS) {
      uint32_t w[TILED][2][W::COLS / 2];
#pragma unroll
      for (int k = 0; k < TILED * 2; k++) W::pairs(weights[a][k / 2][k % 2], w[k / 2][k % 2]);
#pragma unroll
      for (int k = 0; k < TILES; k++)
#pragma unroll
        for (int half = 0; half < W::COLS / 8; half++) {
          const int token = k * TILE_TOKENS + g;
          uint32_t x[4] = {};
          if (at < f.padded && token < f.n) load_pairs<INPUT>(f, token, at + 8 * half, x);
#pragma unroll
          for (int r = 0; r < TILED; r++) {
            const uint32_t *low = w[r][0] + 4 * half, *high = w[r][1] + 4 * half;
            multiply_tile(sums[r][k], low[0], high[0], low[1], high[1], x[0], x[1]);
            multiply_tile(sums[r][k], low[2], high[2], low[3], high[3], x[2], x[3]);
          }
        }
    }
  }
};

/* BLOCKS: so many of them a multiprocessor shall hold at least. */
template <typename W, int TILED, int TILES, int INPUT, int BLOCKS>
__global__ static void __launch_bounds__(SOME_WARPS *WARP, BLOCKS) some_tokens(const __grid_constant__ struct few f) {
  typedef struct some_pieces<W, TILED> pieces;
  enum { STEP = SOME_WARPS * pieces::AHEAD * pieces::COLS, PITCH = TILE + 4 }; /* columns of all warps; no conflicts of banks */
  __shared__ float shared[SOME_WARPS][TILES * TILE_TOKENS][PITCH];
  const int lane = (int)threadIdx.x % WARP, warp = (int)threadIdx.x / WARP, g = lane / 4, t = lane % 4;
  int64_t group = blockIdx.x;
  int i = 0;
  while (i < f.count && group >= f.groups[i]) group -= f.groups[i++];
  if (i == f.count) return;
  const int64_t first_row = group * TILED * TILE, rows = f.rows[i];

  /* A warp's lanes go through the loop together: the instruction needs all of them. Keeping the next pieces on their way too was
   * slower (more registers, fewer warps). */
  pieces p;
  p.begin(f.w[i], first_row, g, rows, f.padded);
  float sums[TILED][TILES][4] = {};
  bool waited = false;
  for (int64_t first = warp * pieces::AHEAD * pieces::COLS; first < f.padded; first += STEP) {
    const int64_t at = first + t * W::COLS;
    p.load(at, f.padded);
    if (!waited) wait_for_input();
    waited = true;
    p.template multiply<TILES, INPUT>(f, at, g, sums);
  }
  if (!waited) wait_for_input(); /* results may lie where kernels before this still read */

#pragma unroll
  for (int tile = 0; tile < TILED; tile++) {
    if (tile > 0) __syncthreads();
#pragma unroll
    for (int k = 0; k < TILES; k++)
#pragma unroll
      for (int c = 0; c < 4; c++) shared[warp][k * TILE_TOKENS + 2 * t + c % 2][g + c / 2 * 8] = sums[tile][k][c];
    __syncthreads();
    for (int k = (int)threadIdx.x; k < TILES * TILE_TOKENS * TILE; k += SOME_WARPS * WARP) {
      const int token = k / TILE, r = k % TILE;
      const int64_t row = first_row + tile * TILE + r;
      if (token >= f.n || row >= rows) continue;
      float sum = 0;
#pragma unroll
      for (int other = 0; other < SOME_WARPS; other++) sum += shared[other][token][r];
      f.y[i][token * f.pitch[i] + row] = sum * W::scale_of_pairs(f.w[i], row, f.padded) + (f.bias[i] ? f.bias[i][row] : 0);
    }
  }
}

template <typename W, int TILED, int TILES, int INPUT, int BLOCKS>
static void launch_some(struct cuda_backend *b, struct few *f) {
  int64_t groups = 0;
  for (int i = 0; i < f->count; i++) groups += f->groups[i] = (f->rows[i] + TILED * TILE - 1) / (TILED * TILE);
  launch(b, some_tokens<W, TILED, TILES, INPUT, BLOCKS>, (unsigned)groups, SOME_WARPS * WARP, *f);
}

template <typename W> static void launch_floats(struct cuda_backend *b, struct few *f) {
  const bool vectors = f->cols == f->padded && ((uintptr_t)f->x & 15) == 0;
  if (f->n <= TILE_TOKENS && vectors)
    launch_some<W, 1, 1, INPUT_VECTORS, 2>(b, f);
  else if (f->n <= TILE_TOKENS)
    launch_some<W, 1, 1, INPUT_NUMBERS, 2>(b, f);
  else if (vectors)
    launch_some<W, 1, 2, INPUT_VECTORS, 2>(b, f);
  else
    launch_some<W, 1, 2, INPUT_NUMBERS, 2>(b, f);
}

/* With activations that were rounded; FP8 only. More rows for a block are fewer reads of the tokens; where there are fewer rows
 * than so for two blocks on every multiprocessor, a block either has less of them or all registers. */
static void launch_rounded(struct cuda_backend *b, struct few *f) {
  int64_t rows = 0;
  for (int i = 0; i < f->count; i++) rows += f->rows[i];
  const bool alone = rows <= 2 * TILE * (int64_t)b->cuda->info.multiprocessors;
  if (f->n <= 2 * TILE_TOKENS && alone)
    launch_some<fp8_rows, 1, 2, INPUT_BF16, 2>(b, f);
  else if (f->n <= 2 * TILE_TOKENS)
    launch_some<fp8_rows, 2, 2, INPUT_BF16, 2>(b, f);
  else if (f->n <= 4 * TILE_TOKENS && alone)
    launch_some<fp8_rows, 2, 4, INPUT_BF16, 1>(b, f);
  else if (f->n <= 4 * TILE_TOKENS)
    launch_some<fp8_rows, 2, 4, INPUT_BF16, 2>(b, f);
  else
    launch_some<fp8_rows, 2, 8, INPUT_BF16, 1>(b, f);
}

static oscar_status some_floats(struct cuda_backend *b, int count, const struct weight *const *w, const float *const *bias, int n,
                                const float *x, const struct results *to) {
  for (int done = 0; done < n; done += MOST_FLOAT) {
    struct few f = describe_few(b, count, w, bias, done, n - done < MOST_FLOAT ? n - done : MOST_FLOAT, to);
    f.x = x + done * f.cols;
    if (form_of(b, w[0]) == WEIGHTS_FP8)
      launch_floats<fp8_rows>(b, &f);
    else
      launch_floats<bf16_rows>(b, &f);
  }
  return cuda_launched(b->cuda, "multiplying some tokens");
}

static oscar_status some_rounded(struct cuda_backend *b, int count, const struct weight *const *w, const float *const *bias,
                                 int n, const struct results *to) {
  for (int done = 0; done < n; done += MOST_ROUNDED) {
    struct few f = describe_few(b, count, w, bias, done, n - done < MOST_ROUNDED ? n - done : MOST_ROUNDED, to);
    f.x = (const __nv_bfloat16 *)b->rounded.data + done * f.padded;
    launch_rounded(b, &f);
  }
  return cuda_launched(b->cuda, "multiplying some tokens");
}

/* ---- many tokens ---- */

/* Inputs of a product: x, or what an activation makes of a gate x and its `up`. */
struct plain {
  __device__ float operator()(float x, float) const { return x; }
};

/* out [n][padded] = f(x, up) in BF16, x and up [n][cols], rows `pitch` floats apart; zeros behind. A block has columns of a
 * token. */
template <typename F>
__global__ static void round_inputs(int64_t cols, int64_t padded, int64_t pitch, const float *x, const float *up, F f,
                                    __nv_bfloat16 *out) {
  const int64_t token = blockIdx.y, col = (int64_t)blockIdx.x * blockDim.x + threadIdx.x, at = token * pitch + col;
  wait_for_input();
  if (col < padded) out[token * padded + col] = __float2bfloat16_rn(col < cols ? f(x[at], up ? up[at] : 0) : 0);
}

/* The same where rows need no padding: four numbers a thread. */
template <typename F>
__global__ static void round_vectors(int64_t cols, int64_t pitch, const float *x, const float *up, F f, __nv_bfloat16 *out) {
  const int64_t token = blockIdx.y, col = 4 * ((int64_t)blockIdx.x * blockDim.x + threadIdx.x), at = token * pitch + col;
  wait_for_input();
  if (col >= cols) return;
  const float4 v = *(const float4 *)(x + at), u = up ? *(const float4 *)(up + at) : make_float4(0, 0, 0, 0);
  *(uint2 *)(out + token * cols + col) = make_uint2(bf16_pair(f(v.x, u.x), f(v.y, u.y)), bf16_pair(f(v.z, u.z), f(v.w, u.w)));
}

template <typename F>
static oscar_status round_to_bf16(struct cuda_backend *b, const struct weight *w, int n, int64_t pitch, const float *x,
                                  const float *up, F f) {
  const int64_t padded = packed_cols(b, w);
  oscar_status status = device_scratch_reserve(b, &b->rounded, (size_t)n * (size_t)padded * sizeof(__nv_bfloat16));
  const bool vectors = padded == w->cols && pitch % 4 == 0 && (((uintptr_t)x | (uintptr_t)up) & 15) == 0;
  for (int done = 0; done < n && status == OSCAR_OK; done += MOST_GRID_ROWS) {
    const unsigned rows = (unsigned)(n - done < MOST_GRID_ROWS ? n - done : MOST_GRID_ROWS);
    const float *const from = x + done * pitch, *const beside = up ? up + done * pitch : NULL;
    __nv_bfloat16 *const to = (__nv_bfloat16 *)b->rounded.data + done * padded;
    if (vectors)
      launch(b, round_vectors<F>, dim3(blocks_for((size_t)padded / 4, 256), rows), 256, w->cols, pitch, from, beside, f, to);
    else
      launch(b, round_inputs<F>, dim3(blocks_for((size_t)padded, 256), rows), 256, w->cols, padded, pitch, from, beside, f, to);
    status = cuda_launched(b->cuda, "rounding activations");
  }
  return status;
}

/* The input of a product in BF16: as the norm that made it left it, or rounded now. */
static oscar_status round_input(struct cuda_backend *b, const struct weight *w, int n, const float *x) {
  const struct rounded_rows normed = b->normed;
  b->normed = {};
  if (normed.x == x && normed.rows == n && normed.dim == w->cols && packed_cols(b, w) == w->cols) return OSCAR_OK;
  return round_to_bf16(b, w, n, w->cols, x, NULL, plain{});
}

/* One product of rounded activations with `rows` rows of w in BF16. *possible as library_multiply says. */
static oscar_status multiply_rows(struct cuda_backend *b, const struct weight *w, const void *weights, int64_t rows,
                                  const float *bias, int n, int64_t stride, float *y, bool *possible) {
  const uintptr_t place = (uintptr_t)y | (uintptr_t)(stride * (int64_t)sizeof *y);
  const struct product_shape shape = {rows, packed_cols(b, w), n, stride, place & 4 ? 4 : place & 8 ? 8 : 16, bias != NULL};
  const struct product_memory memory = {weights, b->rounded.data, bias, y, b->workspace.data, b->workspace.bytes};
  const cublasStatus_t result = library_multiply(&b->library, &shape, &memory, b->stream, possible);
  if (result == CUBLAS_STATUS_SUCCESS) return OSCAR_OK;
  return set_error(b->base.context, OSCAR_UNSUPPORTED, "GPU %d: %s: cuBLASLt could not multiply (status %d)",
                   b->cuda->info.ordinal, w->name, (int)result);
}

/* Of FP8 weights: bytes in BF16 that are there at a time, unless a group of rows is more. Far larger ones than the weights of a
 * layer are few (logits), and parts of this size still fill a GPU. */
#define EXPANDED_BYTES ((size_t)128 << 20)

/* All rows if they fit; else parts of about the same size. */
static int64_t expanded_rows(const struct cuda_backend *b, const struct weight *w) {
  const size_t row_bytes = (size_t)packed_cols(b, w) * sizeof(__nv_bfloat16), all = (size_t)w->rows;
  const size_t most =
      EXPANDED_BYTES / row_bytes > PACKED_ROWS ? EXPANDED_BYTES / row_bytes / PACKED_ROWS * PACKED_ROWS : PACKED_ROWS;
  if (all <= most) return w->rows;
  const size_t parts = (all + most - 1) / most;
  return (int64_t)round_up((all + parts - 1) / parts, PACKED_ROWS);
}

static size_t expanded_bytes(const struct cuda_backend *b, const struct weight *w) {
  return (size_t)expanded_rows(b, w) * (size_t)packed_cols(b, w) * sizeof(__nv_bfloat16);
}

static oscar_status multiply_expanded(struct cuda_backend *b, const struct weight *w, const float *bias, int n, int64_t pitch,
                                      float *y, bool *possible) {
  const int64_t step = expanded_rows(b, w);
  oscar_status status = device_scratch_reserve(b, &b->expanded, expanded_bytes(b, w));
  *possible = true;
  for (int64_t first = 0; first < w->rows && status == OSCAR_OK && *possible; first += step) {
    const int64_t rows = w->rows - first < step ? w->rows - first : step;
    status = cuda_expand(b, w, first, rows, b->expanded.data);
    if (status == OSCAR_OK)
      status = multiply_rows(b, w, b->expanded.data, rows, bias ? bias + first : NULL, n, pitch, y + first, possible);
  }
  return status;
}

/* One product of rounded activations. */
static oscar_status multiply(struct cuda_backend *b, const struct weight *w, const float *bias, int n, int64_t pitch, float *y,
                             bool *possible) {
  if (form_of(b, w) == WEIGHTS_FP8) return multiply_expanded(b, w, bias, n, pitch, y, possible);
  return multiply_rows(b, w, w->packed, w->rows, bias, n, pitch, y, possible);
}

struct joined {
  int count, n;
  int64_t all_rows, rows[MOST_SHARING];
  const float *bias[MOST_SHARING], *from;
  struct results to;
};

/* Results of weights = their columns of from [n][all_rows] + bias[i] */
__global__ static void take_apart(const __grid_constant__ struct joined j) {
  int64_t row = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
  wait_for_input();
  if (row >= j.all_rows) return;
  const float value = j.from[blockIdx.y * j.all_rows + row];
  int i = 0;
  while (row >= j.rows[i]) row -= j.rows[i++];
  j.to.y[i][blockIdx.y * j.to.pitch[i] + row] = value + (j.bias[i] ? j.bias[i][row] : 0);
}

static bool is_small(const struct cuda_backend *b, const struct weight *w) {
  return w->rows < TILE_ROWS * (int64_t)b->cuda->info.multiprocessors;
}

static int64_t rows_of_all(int count, const struct weight *const *w) {
  int64_t rows = 0;
  for (int i = 0; i < count; i++) rows += w[i]->rows;
  return rows;
}

/* Whether weights are one to the library. */
static bool lie_together(const struct cuda_backend *b, int count, const struct weight *const *w) {
  if (form_of(b, w[0]) != WEIGHTS_BF16 || count < 2) return false;
  for (int i = 1; i < count; i++)
    if (w[i]->packed != (const uint8_t *)w[i - 1]->packed + cuda_packed_bytes(&b->base, w[i - 1])) return false;
  return true;
}

/* Whether they are better multiplied as one, though results have to be taken apart. */
static bool can_be_joined(const struct cuda_backend *b, int count, const struct weight *const *w, int n) {
  bool small = false;
  for (int i = 0; i < count; i++) small = small || is_small(b, w[i]);
  return small && n <= JOINED_TOKENS && lie_together(b, count, w) &&
         (size_t)(n * rows_of_all(count, w)) * sizeof(float) <= b->joined.bytes;
}

/* Whether results go where one product puts them. */
static bool stay_together(const struct cuda_backend *b, int count, const struct weight *const *w, const float *const *bias,
                          const struct results *to) {
  if (!lie_together(b, count, w)) return false;
  const int64_t all_rows = rows_of_all(count, w);
  for (int i = 0; i < count; i++)
    if ((bias && bias[i]) || to->pitch[i] != all_rows || (i > 0 && to->y[i] != to->y[i - 1] + w[i - 1]->rows)) return false;
  return true;
}

static oscar_status multiply_joined(struct cuda_backend *b, int count, const struct weight *const *w, const float *const *bias,
                                    int n, const struct results *to, bool *possible) {
  struct joined j = {};
  j.count = count;
  j.n = n;
  j.all_rows = rows_of_all(count, w);
  j.from = (const float *)b->joined.data;
  j.to = *to;
  for (int i = 0; i < count; i++) {
    j.rows[i] = w[i]->rows;
    j.bias[i] = bias ? bias[i] : NULL;
  }
  oscar_status status = multiply_rows(b, w[0], w[0]->packed, j.all_rows, NULL, n, j.all_rows, (float *)b->joined.data, possible);
  if (status != OSCAR_OK || !*possible) return status;
  launch(b, take_apart, dim3(blocks_for((size_t)j.all_rows, 256), (unsigned)n), 256, j);
  return cuda_launched(b->cuda, "taking results apart");
}

static oscar_status matmul_library(struct cuda_backend *b, int count, const struct weight *const *w, const float *const *bias,
                                   int n, const float *x, const struct results *to) {
  bool possible = false;
  oscar_status status = round_input(b, w[0], n, x);
  if (status != OSCAR_OK) return status;
  if (stay_together(b, count, w, bias, to))
    status = multiply_rows(b, w[0], w[0]->packed, to->pitch[0], NULL, n, to->pitch[0], to->y[0], &possible);
  else if (can_be_joined(b, count, w, n))
    status = multiply_joined(b, count, w, bias, n, to, &possible);
  if (possible) return status;
  for (int i = 0; i < count && status == OSCAR_OK; i++) {
    const float *of_rows = bias ? bias[i] : NULL;
    const struct results of_this = {{to->y[i]}, {to->pitch[i]}};
    status = multiply(b, w[i], of_rows, n, to->pitch[i], to->y[i], &possible);
    if (status == OSCAR_OK && !possible) status = matmul_few(b, 1, w + i, &of_rows, n, x, &of_this);
  }
  return status;
}

/* ---- the operation ---- */

/* What is fastest (bench_cuda_products, H100): up to 8 tokens kernels of ours; up to 16 if the weights are small, when the
 * library's launches take longer than its products; with FP8 until expanding the weights pays. Of FP8 the kernel for few tokens
 * is behind from 2 tokens on. */
#define FEW_TOKENS      2
#define SMALL_BYTES     ((size_t)8 << 20)
#define EXPANDED_TOKENS 128

/* Some tokens whose activations are read as they are: rounding them is another launch. */
static bool are_read_as_floats(const struct cuda_backend *b, int count, const struct weight *const *w, int n) {
  size_t bytes = 0;
  for (int i = 0; i < count; i++) bytes += cuda_packed_bytes(&b->base, w[i]);
  return n <= FLOAT_TOKENS || (n <= MOST_FLOAT && bytes < SMALL_BYTES);
}

/* Of 16 rows each, one or two blocks for every multiprocessor: then the kernel for some tokens, whose warps share rows, reads FP8
 * faster for one token too. */
static bool are_one_wave(const struct cuda_backend *b, int count, const struct weight *const *w) {
  const int64_t wave = TILE * (int64_t)b->cuda->info.multiprocessors;
  int64_t rows = 0;
  for (int i = 0; i < count; i++) rows += w[i]->rows;
  return rows >= wave && rows <= 2 * wave;
}

static enum cuda_product way_of(const struct cuda_backend *b, int count, const struct weight *const *w, int n) {
  const bool fp8 = form_of(b, w[0]) == WEIGHTS_FP8;
  if (b->way != PRODUCT_BY_SHAPE) return b->way;
  if (fp8 && n == 1 && !are_one_wave(b, count, w)) return PRODUCT_FEW;
  if (!fp8 && n <= FEW_TOKENS) return PRODUCT_FEW;
  const bool some = fp8 ? n <= EXPANDED_TOKENS : are_read_as_floats(b, count, w, n);
  return some ? PRODUCT_SOME : PRODUCT_LIBRARY;
}

static oscar_status matmul_some(struct cuda_backend *b, int count, const struct weight *const *w, const float *const *bias, int n,
                                const float *x, const struct results *to) {
  if (form_of(b, w[0]) == WEIGHTS_BF16 || are_read_as_floats(b, count, w, n)) return some_floats(b, count, w, bias, n, x, to);
  oscar_status status = round_input(b, w[0], n, x);
  return status == OSCAR_OK ? some_rounded(b, count, w, bias, n, to) : status;
}

static size_t rounded_bytes(const struct cuda_backend *b, const struct weight *w, int n) {
  return (size_t)n * (size_t)packed_cols(b, w) * sizeof(__nv_bfloat16);
}

static bool is_expanded(const struct cuda_backend *b, const struct weight *w, int n) {
  return form_of(b, w) == WEIGHTS_FP8 && n > EXPANDED_TOKENS;
}

size_t cuda_product_scratch(const struct backend *be, const struct weight *w, int n) {
  const struct cuda_backend *b = cuda_of(be);
  return b->workspace.bytes + rounded_bytes(b, w, n) + (is_expanded(b, w, n) ? expanded_bytes(b, w) : 0);
}

oscar_status cuda_reserve(struct backend *be, const struct weight *w, int n) {
  struct cuda_backend *b = cuda_of(be);
  oscar_status status = device_scratch_reserve(b, &b->rounded, rounded_bytes(b, w, n));
  if (status == OSCAR_OK && is_expanded(b, w, n)) status = device_scratch_reserve(b, &b->expanded, expanded_bytes(b, w));
  if (status != OSCAR_OK || form_of(b, w) != WEIGHTS_BF16 || !is_small(b, w)) return status;
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
    if (w[i]->fine != w[0]->fine)
      return set_error(context, OSCAR_INVALID_ARGUMENT, "%s shares its input with %s, which may be of another form", w[i]->name,
                       w[0]->name);
  }
  return OSCAR_OK;
}

static oscar_status matmul_to(struct cuda_backend *b, int count, const struct weight *const *w, const float *const *bias, int n,
                              const float *x, const struct results *to) {
  const oscar_status status = check(b, count, w, n);
  if (status != OSCAR_OK || n == 0) return status;
  const enum cuda_product way = way_of(b, count, w, n);
  if (way == PRODUCT_LIBRARY) return matmul_library(b, count, w, bias, n, x, to);
  return way == PRODUCT_FEW ? matmul_few(b, count, w, bias, n, x, to) : matmul_some(b, count, w, bias, n, x, to);
}

oscar_status cuda_matmul(struct backend *be, int count, const struct weight *const *w, const float *const *bias, int n,
                         const float *x, float *const *y) {
  struct results to = {};
  for (int i = 0; i < count && i < MOST_SHARING; i++) to.y[i] = y[i], to.pitch[i] = w[i]->rows;
  return matmul_to(cuda_of(be), count, w, bias, n, x, &to);
}

oscar_status cuda_matmul_together(struct backend *be, int count, const struct weight *const *w, const float *const *bias, int n,
                                  const float *x, float *y) {
  struct results to = {};
  for (int i = 0; i < count && i < MOST_SHARING; y += w[i++]->rows) to.y[i] = y, to.pitch[i] = rows_of_all(count, w);
  return matmul_to(cuda_of(be), count, w, bias, n, x, &to);
}

/* Whether a product's input is rounded to BF16 by a launch of its own. */
static bool is_rounded(const struct cuda_backend *b, const struct weight *w, int n) {
  const enum cuda_product way = way_of(b, 1, &w, n);
  return way == PRODUCT_LIBRARY || (way == PRODUCT_SOME && form_of(b, w) == WEIGHTS_FP8 && !are_read_as_floats(b, 1, &w, n));
}

/* y [n][w->rows] = activation(gate) * up times W^T, with rows of gate and up `pitch` floats apart. *possible: by such a product.
 */
static oscar_status matmul_gated_rounded(struct cuda_backend *b, const struct weight *w, enum activation activation, int n,
                                         int64_t pitch, const float *gate, const float *up, float *y, bool *possible) {
  const struct results to = {{y}, {w->rows}};
  oscar_status status = activation == ACTIVATION_SILU ? round_to_bf16(b, w, n, pitch, gate, up, silu{})
                                                      : round_to_bf16(b, w, n, pitch, gate, up, gelu{});
  *possible = true;
  if (status != OSCAR_OK) return status;
  if (way_of(b, 1, &w, n) == PRODUCT_SOME) return some_rounded(b, 1, &w, NULL, n, &to);
  return multiply(b, w, NULL, n, w->rows, y, possible);
}

oscar_status cuda_feed_forward(struct backend *be, const struct feed_forward *f, int n, const float *x, float *between,
                               float *y) {
  struct cuda_backend *b = cuda_of(be);
  const struct weight *const both[] = {f->gate, f->up};
  const int64_t rows = f->gate->rows;
  const size_t count = (size_t)n * (size_t)rows;
  oscar_status status = check(b, 2, both, n);
  if (status == OSCAR_OK) status = check(b, 1, &f->down, n);
  if (status != OSCAR_OK || n == 0) return status;
  const bool rounded = is_rounded(b, f->down, n);
  const bool together = rounded && way_of(b, 2, both, n) == PRODUCT_LIBRARY && lie_together(b, 2, both);
  const int64_t pitch = together ? 2 * rows : rows;
  float *const gate = between, *const up = between + (together ? (size_t)rows : count);
  const struct results to = {{gate, up}, {pitch, pitch}};
  status = matmul_to(b, 2, both, NULL, n, x, &to);
  bool possible = false;
  if (status == OSCAR_OK && rounded) status = matmul_gated_rounded(b, f->down, f->activation, n, pitch, gate, up, y, &possible);
  if (status != OSCAR_OK || possible) return status;
  float *const apart[] = {between, between + count};
  if (together) status = cuda_matmul(be, 2, both, NULL, n, x, apart); /* what is left takes rows without gaps */
  if (status != OSCAR_OK) return status;
  if (f->activation == ACTIVATION_SILU)
    cuda_silu_mul(be, count, apart[0], apart[1]);
  else
    cuda_gelu_mul(be, count, apart[0], apart[1]);
  return cuda_matmul(be, 1, &f->down, NULL, n, apart[0], &y);
}
