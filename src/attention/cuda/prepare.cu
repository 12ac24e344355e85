/*
 * prepare.cu - queries into the space of codes (decode_data.cuh): one product with the map of the keys, then whole numbers.
 *
 * A block of threads has a (tile, KV head) and up to 32 columns of the map at a time: a class of crumbs, or columns of the mean
 * and its turning part. Eight warps divide the inputs of the product among themselves.
 */
#include "attention/cuda/decode_data.cuh"
#include "attention/cuda/instructions.cuh"

namespace {

constexpr int COLUMNS = 32, SPLITS = 8, PAIRS = COLUMNS / 2, MAX_CLASS_COLUMNS = 288; /* of 1024 crumbs, whole chunks */

struct arguments {
  const struct decode_tile *tiles;
  const float *q;
  const float *map; /* [kv_heads][head_dim][rows] */
  const uint16_t *wave_rows;
  uint8_t *prepared;
  const float *series;
  int kv_heads, group, head_dim, rows, crumbs, groups, pairs, fast, rotating_pairs, row_tiles;
  bool stores_zero;
  float scale;
};

/* Sums of 32 columns for the 8 rows, left in sums[column][row]. column < 0: nothing. */
__device__ void multiply_columns(const arguments &a, const float *map, const float *q, int column,
                                 float (*parts)[COLUMNS][DECODE_ROWS + 1], float (*sums)[DECODE_ROWS]) {
  const int lane = threadIdx.x % COLUMNS, split = threadIdx.x / COLUMNS;
  const int share = a.head_dim / SPLITS, begin = split * share;
  float sum[DECODE_ROWS] = {0};
  if (column >= 0)
#pragma unroll 4
    for (int k = begin; k < begin + share; k++) {
      const float m = map[(size_t)k * a.rows + column];
      const float4 q0 = *(const float4 *)(q + k * DECODE_ROWS), q1 = *(const float4 *)(q + k * DECODE_ROWS + 4);
      sum[0] += q0.x * m, sum[1] += q0.y * m, sum[2] += q0.z * m, sum[3] += q0.w * m;
      sum[4] += q1.x * m, sum[5] += q1.y * m, sum[6] += q1.z * m, sum[7] += q1.w * m;
    }
#pragma unroll
  for (int r = 0; r < DECODE_ROWS; r++) parts[split][lane][r] = sum[r];
  __syncthreads();
  const int of = threadIdx.x / DECODE_ROWS, row = threadIdx.x % DECODE_ROWS;
  float total = 0;
#pragma unroll
  for (int s = 0; s < SPLITS; s++) total += parts[s][of][row];
  sums[of][row] = total;
  __syncthreads();
}

/* A warp makes one row of a class into bytes. */
__device__ void write_class(const arguments &a, uint8_t *prepared, int class_, int count, const float (*mapped)[DECODE_ROWS]) {
  const int row = threadIdx.x / 32, lane = threadIdx.x % 32, blocks = a.crumbs / 16;
  const struct prepared_layout layout = prepared_layout_of(blocks, a.pairs, a.fast, a.row_tiles);
  if (row >= 4 * a.row_tiles) return;
  float largest = 0;
  for (int i = lane; i < count; i += 32) largest = fmaxf(largest, fabsf(mapped[i][row]));
  largest = largest_of_warp(largest);
  int exponent = 0;
  frexpf(largest * (1 / LARGEST_WHOLE), &exponent);
  exponent = largest > 0 ? max(exponent, -100) : 0;
  const float unit = ldexpf(1, exponent), inverse = ldexpf(1, -exponent);
  uint32_t *words = (uint32_t *)prepared + row / 4 * blocks * 32;
  int sum = 0;
  for (int i = lane; i < count / 4; i += 32) { /* four crumbs of a block */
    const int operand = operand_of_block(blocks, class_, i / 4), to = operand * 32 + row % 4 * 8 + i % 4;
    uint32_t high = 0, low = 0;
#pragma unroll
    for (int k = 0; k < 4; k++) {
      const int whole = __float2int_rn(mapped[4 * i + k][row] * inverse), top = (whole + 64) >> 7;
      sum += whole;
      high |= (uint32_t)(top & 0xFF) << 8 * k;
      low |= (uint32_t)((whole - 128 * top) & 0xFF) << 8 * k;
    }
    words[to] = high;
    words[to + 4] = low;
  }
  sum = sum_of_warp(sum);
  if (lane != 0) return;
  /* the middle of a crumb is 3/2 */
  const long long middle = a.stores_zero ? 0 : (3LL * sum << 2 * class_) >> 1;
  struct row_constants *constants = (struct row_constants *)(prepared + layout.constants) + row;
  const float scaled = ldexpf(unit, -2 * class_);
  constants->unit[class_] = scaled;
  constants->high_offset[class_] = -(WHOLE_FLOAT + (float)(middle >> 7)) * scaled;
  constants->low_offset[class_] = -(WHOLE_FLOAT + (float)(middle & 127)) * scaled;
}

__global__ void __launch_bounds__(COLUMNS *SPLITS) prepare_kernel(const __grid_constant__ arguments a) {
  __shared__ float4 q_rows[256 * DECODE_ROWS / 4];
  __shared__ float parts[SPLITS][COLUMNS][DECODE_ROWS + 1];
  __shared__ float mapped[MAX_CLASS_COLUMNS][DECODE_ROWS];
  const struct decode_tile tile = a.tiles[blockIdx.x / a.kv_heads];
  if (tile.coded_pages == 0) return;
  const int head = blockIdx.x % a.kv_heads, blocks = a.crumbs / 16;
  float *q = (float *)q_rows;
  for (int i = threadIdx.x; i < a.head_dim * DECODE_ROWS; i += blockDim.x) {
    const int row = i / a.head_dim, k = i % a.head_dim;
    q[k * DECODE_ROWS + row] =
        row < tile.rows ? a.q[row_offset(tile, row, a.kv_heads, a.group, head, a.head_dim) + k] * a.scale : 0;
  }
  __syncthreads();
  const struct prepared_layout layout = prepared_layout_of(blocks, a.pairs, a.fast, a.row_tiles);
  uint8_t *prepared = a.prepared + (size_t)blockIdx.x * layout.bytes;
  const float *map = a.map + (size_t)head * a.head_dim * a.rows;
  const int lane = threadIdx.x % COLUMNS;
  if (blockIdx.y < GAIN_CLASSES) {
    const int class_ = blockIdx.y, first = class_begin(blocks, class_) * 16, count = class_begin(blocks, class_ + 1) * 16 - first;
    for (int done = 0; done < count; done += COLUMNS) {
      const int column = done + lane;
      multiply_columns(a, map, q, column < count ? first + column : -1, parts, mapped + done);
    }
    write_class(a, prepared, class_, count, mapped);
    return;
  }
  const int of = threadIdx.x / DECODE_ROWS, row = threadIdx.x % DECODE_ROWS;
  if (blockIdx.y == GAIN_CLASSES) { /* column 0: the mean; 1: what zero points multiply */
    multiply_columns(a, map, q, lane == 0 ? a.crumbs + a.groups : lane == 1 && a.stores_zero ? a.crumbs : -1, parts, mapped);
    if (row >= 4 * a.row_tiles) return;
    struct row_constants *constants = (struct row_constants *)(prepared + layout.constants) + row;
    if (of == 0) constants->mean = mapped[of][row];
    if (of == 1) constants->zero = mapped[of][row];
    return;
  }
  /* a, then b, of 16 pairs */
  const int first = (blockIdx.y - GAIN_CLASSES - 1) * PAIRS, pair = first + lane % PAIRS;
  const int wave = pair < a.pairs ? a.wave_rows[head * a.pairs + pair] : 0xFFFF;
  multiply_columns(a, map, q, wave == 0xFFFF ? -1 : wave + lane / PAIRS * a.rotating_pairs, parts, mapped);
  if (of < PAIRS && first + of < a.fast && row < 4 * a.row_tiles)
    ((float2 *)(prepared + layout.amplitudes))[row * a.fast + first + of] = make_float2(mapped[of][row], mapped[PAIRS + of][row]);
  const int columns = 8 * a.row_tiles;
  for (int i = threadIdx.x; i < PAIRS / 8 * columns * 32; i += COLUMNS * SPLITS) {
    const int k = i / 32 / columns, column = i / 32 % columns, operand_lane = i % 32, odd = column % 2;
    if (first + 8 * k >= a.pairs || first / 8 + k < a.fast / 8) continue;
    uint32_t value[2], rest[2];
#pragma unroll
    for (int reg = 0; reg < 2; reg++) {
      const int mine = 8 * k + 4 * reg + operand_lane % 4;
      const float amplitude[2] = {mapped[mine][column / 2], mapped[PAIRS + mine][column / 2]};
      const float s = a.series[(first + mine) * 16 + odd * 8 + operand_lane / 4];
      const float c = s * amplitude[odd], d = odd ? -s * amplitude[0] : s * amplitude[1];
      value[reg] = pack_half2(c, d);
      rest[reg] = rest_half2(c, d, value[reg]);
    }
    ((uint4 *)(prepared + layout.mixing))[(first / 8 - a.fast / 8) * columns * 32 + i] =
        make_uint4(value[0], value[1], rest[0], rest[1]);
  }
}

} // namespace

size_t decode_prepared_bytes(const struct decode_layer *layer) {
  const struct decode_rope *rope = layer->rope;
  return (size_t)prepared_layout_of(layer->keys.crumbs / 16, rope ? rope->pairs : 0, rope ? rope->fast : 0, 2).bytes;
}

oscar_status decode_prepare(struct oscar_cuda *cuda, const struct decode_shape *shape, const struct decode_layer *layer,
                            const struct decode_plan *plan, const float *q, const struct decode_space *space) {
  const int pairs = layer->rope ? layer->rope->pairs : 0;
  arguments a = {};
  a.tiles = plan->tiles;
  a.q = q;
  a.map = layer->keys.map;
  a.wave_rows = layer->wave_rows;
  a.prepared = (uint8_t *)space->prepared;
  a.kv_heads = shape->kv_heads;
  a.group = shape->group;
  a.head_dim = shape->head_dim;
  a.rows = layer->keys.rows;
  a.crumbs = layer->keys.crumbs;
  a.groups = layer->keys.groups;
  a.pairs = pairs;
  a.fast = layer->rope ? layer->rope->fast : 0;
  a.series = layer->rope ? layer->rope->series : nullptr;
  a.row_tiles = plan->rows > 4 ? 2 : 1;
  a.rotating_pairs = layer->rotating_pairs;
  a.stores_zero = layer->keys.form == OSCAR_ROW_SCALE_ZERO;
  a.scale = shape->scale * LOG2_E;
  const dim3 grid((unsigned)(plan->tile_count * shape->kv_heads), (unsigned)(GAIN_CLASSES + 1 + (pairs + PAIRS - 1) / PAIRS));
  prepare_kernel<<<grid, COLUMNS * SPLITS, 0, (cudaStream_t)cuda->stream>>>(a);
  return cuda_launched(cuda, "mapping queries");
}
