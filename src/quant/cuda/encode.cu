/*
 * encode.cu - demotion on a GPU (quant/cuda/encode.h).
 *
 * A block encodes one side of one head of one page, ROWS rows at a time: all 64 where they fit into shared memory, which is up to
 * 256 channels. It holds them as columns [channel][row] and goes through what rows_body.h does on the CPU:
 *     exact rows less their mean       threads are rows
 *     times the encode matrix          a warp has 2048 / ROWS columns of it, a thread 8 rows x 8 columns of the result
 *     gains, scales, codes             a thread has one group of one row (quant/cuda/encode_row.h)
 *     words of the device form         a thread gathers the 16 crumbs of a word
 * The product takes most of the time. Its sums are 64 independent chains per thread, each in the order of the inputs, one
 * multiplication and one addition at a time: what the CPU computes, so that pages are the same bytes everywhere. Fused operations
 * would take half as long and give other codes. The matrix comes through a ring of slabs in shared memory that belongs to the
 * warp, so warps wait for each other only where the whole tile changes hands. The result takes the place of the rows.
 */
#include "quant/cuda/encode.h"

#include "quant/cuda/encode_row.h"

#include <cuda_pipeline_primitives.h>
#include <cuda_runtime.h>

struct cuda_codecs {
  struct oscar_cuda *cuda;
  void *memory; /* on the device: quant/cuda/coders.h */
  size_t bytes;
  struct coders coders;
  int layers, kv_heads, head_dim, channels; /* channels: the most of any codec */
  size_t shared_bytes;                      /* of a block */
};

struct encode_call {
  const struct coder *coder;
  const int32_t *place;
  const struct cuda_layer *layers;
  const struct cuda_demotion *jobs;
  unsigned long long *bad;
  int layer, kv_heads, n; /* layer: the first */
};

/* ---- shapes ---- */

/* ROWS rows at a time by THREADS threads. Slabs of the matrix have DEPTH of its rows. */
template <int ROWS, int THREADS> struct shape {
  static constexpr int columns = 2048 / ROWS, depth = ROWS == 64 ? 8 : 4, stages = ROWS == 64 ? 3 : 2;
  static constexpr int slab = columns * depth, ring = slab * stages; /* floats of a warp */
  static constexpr int code_stride = ROWS + 4;                       /* spreads channels over banks */
};

/* The tile, then what different stages keep beside it: turned means, rings of slabs, or codes and gains. */
template <int ROWS, int THREADS> static size_t shared_bytes_of(int d, int channels) {
  typedef shape<ROWS, THREADS> s;
  const size_t rings = sizeof(float) * s::ring * (THREADS / 32), codes = (size_t)channels * s::code_stride + ROWS * 4;
  return sizeof(float) * ROWS * (size_t)d + (rings > codes ? rings : codes);
}

/* ---- rows ---- */

/* Rows row0 .. row0 + ROWS - 1 of exact [64][d], less the mean -> x [d][ROWS]. */
template <int ROWS, int THREADS>
static __device__ void load_rows(const struct coder &c, const uint16_t *exact, int row0, float *x) {
  for (int i = threadIdx.x; i < ROWS * (c.head_dim / 16); i += THREADS) {
    const int row = i % ROWS, channel = i / ROWS * 16;
    const uint4 *from = (const uint4 *)(exact + (size_t)(row0 + row) * c.head_dim + channel);
    const uint4 low = from[0], high = from[1];
    const unsigned int pairs[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
    const float *mean = c.mean + channel;
    float *to = x + channel * ROWS + row;
#pragma unroll
    for (int j = 0; j < 8; j++) {
      to[2 * j * ROWS] = __uint_as_float(pairs[j] << 16) - mean[2 * j];
      to[(2 * j + 1) * ROWS] = __uint_as_float(pairs[j] & 0xFFFF0000u) - mean[2 * j + 1];
    }
  }
}

/* turned: [2][rotating_pairs] */
template <int THREADS> static __device__ void turn_mean(const struct coder &c, int64_t page, float *turned) {
  for (int k = threadIdx.x; k < c.rotating_pairs; k += THREADS) turn_pair(&c, page, k, &turned[k], &turned[c.rotating_pairs + k]);
}

template <int ROWS, int THREADS>
static __device__ void subtract_turned(const struct coder &c, const float *turned, int row0, float *x) {
  for (int i = threadIdx.x; i < ROWS * c.rotating_pairs; i += THREADS) {
    const int row = i % ROWS, k = i / ROWS;
    subtract_pair(&c, k, row0 + row, turned[k], turned[c.rotating_pairs + k], &x[c.rotating_channel[2 * k] * ROWS + row],
                  &x[c.rotating_channel[2 * k + 1] * ROWS + row]);
  }
}

/* ---- the product ---- */

/* Slab number `slab` of the warp's columns of the matrix, into its place in the ring. */
template <int ROWS, int THREADS>
static __device__ __forceinline__ void fetch_slab(const struct coder &c, int column, int slab, float *ring) {
  typedef shape<ROWS, THREADS> s;
  float *to = ring + slab % s::stages * s::slab;
#pragma unroll
  for (int i = 0; i < s::slab / 128; i++) {
    const int place = (i * 32 + threadIdx.x % 32) * 4, k = place / s::columns, j = column + place % s::columns;
    const bool inside = j < c.columns;
    const float *from = c.encode + (size_t)(slab * s::depth + k) * c.columns + (inside ? j : 0);
    __pipeline_memcpy_async(to + place, from, 16, inside ? 0 : 16);
  }
}

/* sums [8 rows][8 columns] of the thread: rows 4 g .. 4 g + 3 of each half, g = lane mod (ROWS/8); columns from `column` on. */
template <int ROWS, int THREADS>
static __device__ __forceinline__ void multiply(const struct coder &c, int column, const float *x, float *ring,
                                                float sums[8][8]) {
  typedef shape<ROWS, THREADS> s;
  const int lane = threadIdx.x % 32, row = lane % (ROWS / 8) * 4, own = lane / (ROWS / 8) * 8;
  const int slabs = c.head_dim / s::depth;
#pragma unroll
  for (int i = 0; i < s::stages - 1; i++) {
    fetch_slab<ROWS, THREADS>(c, column, i, ring);
    __pipeline_commit();
  }
  for (int slab = 0; slab < slabs; slab++) {
    __pipeline_wait_prior(s::stages - 2);
    __syncwarp(); /* all lanes' parts have come, and all are done with the slab before */
    if (slab + s::stages - 1 < slabs) fetch_slab<ROWS, THREADS>(c, column, slab + s::stages - 1, ring);
    __pipeline_commit();
    const float *matrix = ring + slab % s::stages * s::slab + own, *in = x + slab * s::depth * ROWS + row;
#pragma unroll
    for (int k = 0; k < s::depth; k++) {
      float a[8], b[8];
      *(float4 *)a = *(const float4 *)(in + k * ROWS);
      *(float4 *)(a + 4) = *(const float4 *)(in + k * ROWS + ROWS / 2);
      *(float4 *)b = *(const float4 *)(matrix + k * s::columns);
      *(float4 *)(b + 4) = *(const float4 *)(matrix + k * s::columns + 4);
#pragma unroll
      for (int r = 0; r < 8; r++)
#pragma unroll
        for (int j = 0; j < 8; j++) sums[r][j] = __fadd_rn(sums[r][j], __fmul_rn(a[r], b[j]));
    }
  }
}

/* sums -> y [channels][ROWS], divided by the steps where gains are tried; rows with a number that is not finite are marked. */
template <int ROWS, int THREADS>
static __device__ __forceinline__ void store_sums(const struct coder &c, int column, const float sums[8][8], float *y,
                                                  unsigned int *bad) {
  const int lane = threadIdx.x % 32, row = lane % (ROWS / 8) * 4;
  column += lane / (ROWS / 8) * 8;
  unsigned int wrong = 0;
#pragma unroll
  for (int j = 0; j < 8; j++) {
    if (column + j >= c.channels) continue;
    const float factor = c.channel[column + j].inverse_step;
    float out[8];
#pragma unroll
    for (int r = 0; r < 8; r++) {
      wrong |= is_finite(sums[r][j]) ? 0 : 1u << r;
      out[r] = c.form == OSCAR_ROW_LOG_GAINS ? __fmul_rn(sums[r][j], factor) : sums[r][j];
    }
    *(float4 *)(y + (column + j) * ROWS + row) = *(const float4 *)out;
    *(float4 *)(y + (column + j) * ROWS + ROWS / 2 + row) = *(const float4 *)(out + 4);
  }
  for (int r = 0; wrong && r < 8; r++)
    if (wrong >> r & 1) atomicOr(&bad[row + r % 4 + r / 4 * (ROWS / 2)], 1u);
}

/* x [head_dim][ROWS] -> y [channels][ROWS] in the same memory. */
template <int ROWS, int THREADS>
static __device__ void project(const struct coder &c, float *x, float *rings, unsigned int *bad) {
  typedef shape<ROWS, THREADS> s;
  const int warp = threadIdx.x / 32, column = warp * s::columns;
  float sums[8][8];
#pragma unroll
  for (int r = 0; r < 8; r++)
#pragma unroll
    for (int j = 0; j < 8; j++) sums[r][j] = 0;
  if (column < c.channels) multiply<ROWS, THREADS>(c, column, x, rings + warp * s::ring, sums);
  __syncthreads();
  if (column < c.channels) store_sums<ROWS, THREADS>(c, column, sums, x, bad);
  __syncthreads();
}

/* ---- codes ---- */

/* y -> codes [channels][code_stride] and metadata, `meta` being that of the first row. Groups of rows marked bad are not coded.
 */
template <int ROWS, int THREADS>
static __device__ void quantize(const struct coder &c, float *y, uint8_t *codes, uint8_t *gains, uint16_t *meta,
                                unsigned int *bad) {
  const int stride = shape<ROWS, THREADS>::code_stride;
  if (c.form == OSCAR_ROW_SCALE_ZERO && c.clip_rank < c.channels - 1) {
    for (int row = threadIdx.x; row < ROWS; row += THREADS) clip_row(&c, y + row, ROWS);
    __syncthreads();
  }
  for (int i = threadIdx.x; i < ROWS * c.groups; i += THREADS) {
    const int row = i % ROWS, p = i / ROWS;
    uint16_t stored[2] = {0, 0};
    bool fits = true;
    if (c.form == OSCAR_ROW_LOG_GAINS) {
      gains[p * ROWS + row] = (uint8_t)quantize_log_gain(&c, p, y + row, ROWS, codes + row, stride);
    } else if (c.form == OSCAR_ROW_SCALE_ZERO) {
      fits = quantize_scale_zero(&c, p, y + row, ROWS, codes + row, stride, stored);
      meta[2 * p * PAGE_TOKENS + row] = stored[0];
      meta[(2 * p + 1) * PAGE_TOKENS + row] = stored[1];
    } else {
      fits = quantize_gain(&c, p, y + row, ROWS, codes + row, stride, stored);
      meta[p * PAGE_TOKENS + row] = stored[0];
    }
    if (!fits) atomicOr(&bad[row], 1u);
  }
  __syncthreads();
  if (c.form != OSCAR_ROW_LOG_GAINS) return;
  for (int row = threadIdx.x; row < ROWS; row += THREADS) {
    unsigned int word = 0;
    for (int p = 0; p < c.groups; p++) word |= (unsigned int)gains[p * ROWS + row] << 4 * p;
    meta[row] = (uint16_t)word;
  }
}

/* Codes of rows from row0 on -> words of the device form. Later rows are added to the words of the first. */
template <int ROWS, int THREADS>
static __device__ void write_words(const struct coder &c, int side, const uint8_t *codes, int row0, uint32_t *words) {
  const struct coded_rows rows = {codes, shape<ROWS, THREADS>::code_stride, ROWS == PAGE_TOKENS ? 0 : row0, ROWS};
  for (int w = threadIdx.x; w < 4 * c.crumbs; w += THREADS) {
    const uint32_t bits = side == OSCAR_KEYS ? key_word(&c, &rows, w) : value_word(&c, &rows, w);
    words[w] = row0 == 0 ? bits : words[w] | bits;
  }
}

/* ---- the kernel ---- */

extern __shared__ float4 shared_memory[];

template <int ROWS, int THREADS, int BLOCKS>
static __global__ void __launch_bounds__(THREADS, BLOCKS) encode_pages(const struct encode_call call) {
  __shared__ struct coder c;
  __shared__ unsigned int bad[ROWS];
  const int job = (int)(blockIdx.x % (unsigned int)call.n);
  const unsigned int place = blockIdx.x / (unsigned int)call.n + (unsigned int)call.layer * (unsigned int)call.kv_heads * 2;
  const int side = (int)(place % 2), head = (int)(place / 2) % call.kv_heads, layer = (int)(place / 2) / call.kv_heads;
  const struct cuda_demotion demotion = call.jobs[job];
  const struct cuda_layer *at = &call.layers[layer];
  if (threadIdx.x == 0) c = call.coder[call.place[place]];
  __syncthreads();
  const size_t exact_bytes = (size_t)2 * PAGE_TOKENS * c.head_dim; /* of a side */
  const uint16_t *exact =
      (const uint16_t *)(at->memory + (size_t)demotion.exact * at->unit_bytes + (size_t)(2 * head + side) * exact_bytes);
  uint8_t *coded = at->memory + (size_t)demotion.coded * at->unit_bytes + (size_t)head * at->head_bytes +
                   (side == OSCAR_VALUES ? at->side_bytes[0] : 0);
  float *x = (float *)shared_memory, *beside = x + ROWS * c.head_dim;
  uint8_t *gains = (uint8_t *)beside, *codes = gains + 4 * ROWS;
  for (int row0 = 0; row0 < PAGE_TOKENS; row0 += ROWS) {
    for (int row = threadIdx.x; row < ROWS; row += THREADS) bad[row] = 0;
    load_rows<ROWS, THREADS>(c, exact, row0, x);
    turn_mean<THREADS>(c, demotion.page, beside);
    __syncthreads();
    if (c.rotating_pairs > 0) {
      subtract_turned<ROWS, THREADS>(c, beside, row0, x);
      __syncthreads();
    }
    project<ROWS, THREADS>(c, x, beside, bad);
    quantize<ROWS, THREADS>(c, x, codes, gains, (uint16_t *)(coded + 16 * (size_t)c.crumbs) + row0, bad);
    write_words<ROWS, THREADS>(c, side, codes, row0, (uint32_t *)coded);
    for (int row = threadIdx.x; row < ROWS; row += THREADS)
      if (bad[row])
        atomicMin(call.bad, (unsigned long long)layer << 48 | (unsigned long long)job << 22 |
                                (unsigned long long)(row0 + row) << 16 | (unsigned long long)head << 1 | (unsigned int)side);
    if (ROWS < PAGE_TOKENS) __syncthreads();
  }
}

/* ---- which kernel ---- */

/* Blocks of a multiprocessor are what registers hold: 64 sums and as many numbers besides. */
struct variant {
  int most_channels, threads; /* of a head: d and channels */
  size_t (*shared_bytes)(int d, int channels);
  void (*kernel)(const struct encode_call call);
};
static const struct variant variants[] = {
    {64, 64, shared_bytes_of<64, 64>, encode_pages<64, 64, 8>},
    {128, 128, shared_bytes_of<64, 128>, encode_pages<64, 128, 4>},
    {256, 256, shared_bytes_of<64, 256>, encode_pages<64, 256, 2>},
    {OSCAR_MAX_HEAD_DIM, 256, shared_bytes_of<16, 256>, encode_pages<16, 256, 1>},
};

static const struct variant *variant_for(int d) {
  const struct variant *v = variants;
  while (v->most_channels < d) v++;
  return v;
}

static oscar_status allow_shared(struct cuda_codecs *codecs) {
  const struct variant *v = variant_for(codecs->head_dim);
  codecs->shared_bytes = v->shared_bytes(codecs->head_dim, codecs->channels);
  if (codecs->shared_bytes + 1024 > codecs->cuda->shared_bytes) /* that a block has besides */
    return set_error(codecs->cuda->context, OSCAR_UNSUPPORTED,
                     "encoding heads of %d channels takes %zu bytes of shared memory, of which GPU %d has %zu for a block",
                     codecs->head_dim, codecs->shared_bytes, codecs->cuda->info.ordinal, codecs->cuda->shared_bytes);
  return cuda_result(codecs->cuda,
                     cudaFuncSetAttribute(v->kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)codecs->shared_bytes),
                     "setting the shared memory of the encoder");
}

/* ---- codecs on the device ---- */

size_t cuda_codecs_bytes(const oscar_codec_set *set) { return coders_bytes(set); }

static int most_channels(const oscar_codec_set *set) {
  const oscar_codec_set_info *info = oscar_codec_set_describe(set);
  int most = 0;
  for (int place = 0; place < info->layers * info->kv_heads * 2; place++) {
    const oscar_codec *codec =
        oscar_codec_set_get(set, place / 2 / info->kv_heads, place / 2 % info->kv_heads, (oscar_side)(place % 2));
    const int channels = oscar_codec_describe(codec)->channels;
    most = channels > most ? channels : most;
  }
  return most;
}

static oscar_status upload(struct cuda_codecs *codecs, const oscar_codec_set *set) {
  oscar_status status = cuda_alloc(codecs->cuda, codecs->bytes, &codecs->memory);
  if (status != OSCAR_OK) return status;
  void *block = mem_zalloc(codecs->cuda->context, 1, codecs->bytes);
  if (!block) return OSCAR_NO_MEMORY;
  codecs->coders = coders_fill(set, block, (uintptr_t)codecs->memory);
  status = cuda_upload(codecs->cuda, codecs->memory, block, codecs->bytes);
  mem_free(codecs->cuda->context, block);
  return status;
}

oscar_status cuda_codecs_create(struct oscar_cuda *cuda, const oscar_codec_set *set, struct cuda_codecs **codecs) {
  *codecs = NULL;
  oscar_status status = oscar_codec_set_check(set);
  if (status != OSCAR_OK) return status;
  const oscar_codec_set_info *info = oscar_codec_set_describe(set);
  if (info->layers > CUDA_MOST_LAYERS || info->kv_heads > CUDA_MOST_KV_HEADS)
    return set_error(cuda->context, OSCAR_INVALID_ARGUMENT, "codec set: %d layers of %d KV heads are more than a GPU takes here",
                     info->layers, info->kv_heads);
  struct cuda_codecs *c = (struct cuda_codecs *)mem_zalloc(cuda->context, 1, sizeof *c);
  if (!c) return OSCAR_NO_MEMORY;
  c->cuda = cuda;
  c->bytes = coders_bytes(set);
  c->layers = info->layers;
  c->kv_heads = info->kv_heads;
  c->head_dim = info->head_dim;
  c->channels = most_channels(set);
  status = allow_shared(c);
  if (status == OSCAR_OK) status = upload(c, set);
  if (status != OSCAR_OK) {
    cuda_codecs_free(c);
    return status;
  }
  *codecs = c;
  return OSCAR_OK;
}

void cuda_codecs_free(struct cuda_codecs *codecs) {
  if (!codecs) return;
  cuda_release(codecs->cuda, codecs->memory, codecs->bytes);
  mem_free(codecs->cuda->context, codecs);
}

/* ---- encoding ---- */

oscar_status cuda_encode(struct cuda_codecs *codecs, const struct cuda_layer *layers, int layer_begin, int layer_end,
                         int kv_heads, const struct cuda_demotion *jobs, int n, unsigned long long *bad) {
  struct oscar_cuda *cuda = codecs->cuda;
  if (layer_begin < 0 || layer_end > codecs->layers || layer_begin > layer_end || kv_heads != codecs->kv_heads || n < 0 ||
      n > CUDA_MOST_JOBS)
    return set_error(cuda->context, OSCAR_INVALID_ARGUMENT,
                     "encode: %d pages in layers %d to %d of %d KV heads; the codecs have %d of %d", n, layer_begin,
                     layer_end - 1, kv_heads, codecs->layers, codecs->kv_heads);
  if (n == 0) return OSCAR_OK;
  const struct variant *v = variant_for(codecs->head_dim);
  struct encode_call call = {codecs->coders.coder, codecs->coders.place, layers, jobs, bad, layer_begin, kv_heads, n};
  /* A grid has at most 2^31 - 1 blocks: one launch, but for absurd numbers of pages. */
  const long long layer_blocks = 2LL * kv_heads * n;
  for (long long together; call.layer < layer_end; call.layer += (int)together) {
    together = 0x7FFFFFFF / layer_blocks;
    together = together < layer_end - call.layer ? together : layer_end - call.layer;
    if (together == 0)
      return set_error(cuda->context, OSCAR_INVALID_ARGUMENT, "encode: %d pages of %d KV heads at once", n, kv_heads);
    v->kernel<<<(unsigned int)(together * layer_blocks), v->threads, codecs->shared_bytes, (cudaStream_t)cuda->stream>>>(call);
    oscar_status status = cuda_launched(cuda, "encoding pages");
    if (status != OSCAR_OK) return status;
  }
  return OSCAR_OK;
}
