/*
 * merge.cu - what blocks of decode.cuh left of each item, put together and brought out of the space of codes.
 *
 * A block has 32 columns of the output of a tile's KV head. It adds up the sums of codes of all parts, whole, since every column
 * needs them, then multiplies them with its columns of the map of the values; those are asked for before the parts are there.
 */
#include "attention/cuda/decode_data.cuh"
#include "attention/cuda/instructions.cuh"

namespace {

constexpr int THREADS = 512, COLUMNS = 32, MOST_PARTS = 384, TOGETHER = 6;
constexpr float NONE = -INFINITY;

struct arguments {
  const struct decode_tile *tiles;
  const float *parts;
  const float *map; /* [kv_heads][rows][head_dim] */
  float *out;
  const int32_t *total_units;
  int blocks, kv_heads, group, head_dim, crumbs, groups, rows;
};

struct shared_layout {
  int map, factors, totals, exact, sums, partial, bytes;
};
/* In bytes. `sums` [inputs][DECODE_ROWS]: crumbs, minus sums of gains, the sum of probabilities. */
__host__ __device__ inline shared_layout shared_layout_of(int crumbs) {
  shared_layout s;
  const int width = crumbs + GAIN_CLASSES + 1, elements = DECODE_ROWS * (crumbs + GAIN_CLASSES) / 4;
  int at = 0;
  s.map = at, at += width * COLUMNS * 4;
  s.factors = at, at += MOST_PARTS * DECODE_ROWS * 4;
  s.totals = at, at += 2 * DECODE_ROWS * 4;
  s.exact = at, at += DECODE_ROWS * COLUMNS * 4;
  s.sums = at, at += width * DECODE_ROWS * 4;
  const int merging = (elements > THREADS ? elements : THREADS) * 16, product = THREADS / COLUMNS * DECODE_ROWS * COLUMNS * 4;
  s.partial = at, at += merging > product ? merging : product;
  s.bytes = at;
  return s;
}

/* Four neighbouring sums of parts `first`, `first + step`, ... below `parts`, each times its factor. */
__device__ float4 add_parts(const float *at, size_t floats, int first, int step, int parts, const float *factors, int row) {
  float4 sum = {};
  for (int part = first; part < parts; part += step * TOGETHER) {
    float4 x[TOGETHER];
#pragma unroll
    for (int k = 0; k < TOGETHER; k++) x[k] = __ldcg((const float4 *)(at + (size_t)min(part + k * step, parts - 1) * floats));
#pragma unroll
    for (int k = 0; k < TOGETHER; k++) {
      const float f = part + k * step < parts ? factors[(part + k * step) * DECODE_ROWS + row] : 0;
      if (f == 0) continue; /* a part that saw nothing holds anything */
      sum.x += f * x[k].x, sum.y += f * x[k].y, sum.z += f * x[k].z, sum.w += f * x[k].w;
    }
  }
  return sum;
}

__global__ void __launch_bounds__(THREADS) merge_kernel(const __grid_constant__ arguments a) {
  extern __shared__ __align__(16) uint8_t memory[];
  start_kernel_after();
  const shared_layout layout = shared_layout_of(a.crumbs);
  float *map = (float *)(memory + layout.map), *factors = (float *)(memory + layout.factors),
        *totals = (float *)(memory + layout.totals);
  float *exact_sums = (float *)(memory + layout.exact), *sums = (float *)(memory + layout.sums),
        *partial = (float *)(memory + layout.partial);
  const int index = blockIdx.x, head = index % a.kv_heads, column0 = blockIdx.y * COLUMNS,
            columns = min(COLUMNS, a.head_dim - column0);
  const struct decode_tile tile = a.tiles[index / a.kv_heads];
  const int begin = tile.begin + head * tile.units, exact_units = EXACT_WEIGHT * tile.exact_tiles, rows = tile.rows;
  const bool coded = tile.units > exact_units;
  const int inputs = coded ? a.crumbs + a.groups + 1 : 0;
  for (int i = threadIdx.x; i < inputs * (columns / 4); i += THREADS) {
    const int k = i / (columns / 4), c = i % (columns / 4) * 4;
    *(float4 *)(map + k * COLUMNS + c) = __ldg((const float4 *)(a.map + ((size_t)head * a.rows + k) * a.head_dim + column0 + c));
  }
  const int total_units = *a.total_units, blocks = working_blocks(total_units, a.blocks);
  const int first_block = block_of_unit(begin, total_units, blocks);
  const int exact_parts = block_of_unit(begin + exact_units - 1, total_units, blocks) - first_block + 1;
  const int first_coded = coded ? block_of_unit(begin + exact_units, total_units, blocks) : 0;
  const int coded_parts = coded ? block_of_unit(begin + tile.units - 1, total_units, blocks) - first_coded + 1 : 0;
  const int parts = exact_parts + coded_parts, stride = part_stride(a.head_dim, a.crumbs);
  const size_t floats = part_floats(a.head_dim, a.crumbs);
  const float *exact_from = a.parts + (size_t)(2 * index + first_block) * floats;
  const float *coded_from = a.parts + (size_t)(2 * index + 1 + first_coded) * floats;
  wait_for_kernel_before();

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (warp < rows) {
    float m = NONE, l[2] = {0, 0};
    for (int i = lane; i < parts; i += 32)
      m = fmaxf(m, __ldcg((i < exact_parts ? exact_from + i * floats : coded_from + (i - exact_parts) * floats) + 2 * warp));
    m = largest_of_warp(m);
    for (int i = lane; i < parts; i += 32) {
      const float2 from =
          __ldcg((const float2 *)(i < exact_parts ? exact_from + i * floats : coded_from + (i - exact_parts) * floats) + warp);
      const float factor = from.x > NONE ? exp2_fast(from.x - m) : 0;
      factors[i * DECODE_ROWS + warp] = factor;
      if (factor > 0) l[i >= exact_parts] += from.y * factor;
    }
    l[0] = sum_of_warp(l[0]), l[1] = sum_of_warp(l[1]);
    if (lane == 0) totals[warp] = l[0] + l[1], totals[DECODE_ROWS + warp] = l[1];
  }
  __syncthreads();
  const int width = a.crumbs + GAIN_CLASSES, elements = coded ? rows * width / 4 : 0;
  const int splits = elements ? max(min(THREADS / elements, coded_parts), 1) : 0;
  for (int i = threadIdx.x; i < elements * splits; i += THREADS) {
    const int element = i % elements, split = i / elements, row = element / (width / 4), column = element % (width / 4) * 4;
    ((float4 *)partial)[i] = add_parts(coded_from + 2 * DECODE_ROWS + row * stride + column, floats, split, splits, coded_parts,
                                       factors + exact_parts * DECODE_ROWS, row);
  }
  for (int i = (int)threadIdx.x - (THREADS - DECODE_ROWS * COLUMNS / 4); i >= 0 && i < rows * (columns / 4); i += THREADS) {
    const int row = i / (columns / 4), column = i % (columns / 4) * 4;
    *(float4 *)(exact_sums + row * COLUMNS + column) =
        add_parts(exact_from + 2 * DECODE_ROWS + row * stride + column0 + column, floats, 0, 1, exact_parts, factors, row);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < elements; i += THREADS) {
    const int row = i / (width / 4), column = i % (width / 4) * 4;
    float4 sum = {};
    for (int split = 0; split < splits; split++) {
      const float4 x = ((const float4 *)partial)[split * elements + i];
      sum.x += x.x, sum.y += x.y, sum.z += x.z, sum.w += x.w;
    }
    const float sign = column < a.crumbs ? 1 : -1, x[4] = {sum.x, sum.y, sum.z, sum.w};
#pragma unroll
    for (int k = 0; k < 4; k++)
      if (column + k < a.crumbs + a.groups) sums[(column + k) * DECODE_ROWS + row] = sign * x[k];
  }
  if (coded && threadIdx.x < rows) sums[(a.crumbs + a.groups) * DECODE_ROWS + threadIdx.x] = totals[DECODE_ROWS + threadIdx.x];
  __syncthreads();
  /* a warp has every 16th input, a lane a column */
  float out[DECODE_ROWS] = {};
  for (int k = warp; k < inputs; k += THREADS / 32) {
    const float m = map[k * COLUMNS + lane];
#pragma unroll
    for (int row = 0; row < DECODE_ROWS; row++)
      if (row < rows) out[row] += sums[k * DECODE_ROWS + row] * m;
  }
#pragma unroll
  for (int row = 0; row < DECODE_ROWS; row++)
    if (row < rows) partial[(warp * DECODE_ROWS + row) * COLUMNS + lane] = out[row];
  __syncthreads();
  if (threadIdx.x >= rows * COLUMNS || lane >= columns) return;
  const int row = warp;
  float sum = exact_sums[row * COLUMNS + lane];
#pragma unroll
  for (int w = 0; w < THREADS / 32; w++) sum += partial[(w * DECODE_ROWS + row) * COLUMNS + lane];
  a.out[row_offset(tile, row, a.kv_heads, a.group, head, a.head_dim) + column0 + lane] = sum / totals[row];
}

} // namespace

oscar_status decode_merge(struct oscar_cuda *cuda, const struct decode_shape *shape, const struct decode_layer *layer,
                          const struct decode_plan *plan, const struct decode_space *space, float *out) {
  arguments a = {};
  a.tiles = plan->tiles;
  a.parts = space->parts;
  a.map = layer->values.map;
  a.out = out;
  a.total_units = plan->total_units;
  a.blocks = decode_most_blocks(cuda);
  a.kv_heads = shape->kv_heads, a.group = shape->group, a.head_dim = shape->head_dim;
  a.crumbs = layer->values.crumbs, a.groups = layer->values.groups, a.rows = layer->values.rows;
  const int bytes = shared_layout_of(a.crumbs).bytes;
  oscar_status status =
      cuda_result(cuda, cudaFuncSetAttribute((const void *)merge_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
                  "asking for shared memory");
  if (status != OSCAR_OK) return status;
  const dim3 grid((unsigned)(plan->tile_count * shape->kv_heads), (unsigned)((shape->head_dim + COLUMNS - 1) / COLUMNS));
  void *arguments[] = {&a};
  return launch_early(cuda, (const void *)merge_kernel, grid, THREADS, bytes, arguments, "merging attention");
}
