/*
 * attention/cuda/decode/prepare.cu - queries into the space of codes (data.cuh): one product with the map of the keys, then whole
 * numbers.
 *
 * A block of threads has eight rows of a KV head, those of a tile, of two where tiles have at most four, or half of those of a
 * tile of 16, and up to 32 columns of the map at a time: a class of crumbs, or columns of the mean and its turning part. Eight
 * warps divide the inputs of the product among themselves. What does not depend on the kernel before, the first columns and the
 * turning of heads, is there before that has ended.
 *
 * decode_enter takes queries before norms and RoPE: every block norms and rotates its rows, one each warp, which takes less than
 * a launch between would. Another block of every (tile, KV head) writes them, for exact pages, and the new rows of k and v.
 */
#include "attention/cuda/decode/data.cuh"
#include "attention/cuda/instructions.cuh"
#include "cache/cuda/rounding.cuh"
#include "cuda/rotation.cuh"

namespace {

constexpr int COLUMNS = 32, SPLITS = 8, PAIRS = COLUMNS / 2, MAX_CLASS_COLUMNS = 288; /* of 1024 crumbs, whole chunks */
constexpr float LARGEST_FP16 = 65504;
constexpr int ROWS = SPLITS; /* of a block: a warp has a row, or a part of the inputs */

struct arguments {
  const struct decode_tile *tiles;
  const float *q;
  const float *map; /* [kv_heads][head_dim][rows] */
  const uint16_t *wave_rows;
  uint8_t *prepared;
  const float *series;
  int kv_heads, group, head_dim, rows, crumbs, groups, pairs, fast, rotating_pairs, row_tiles;
  int tile_count, log_rows; /* log_rows: of the rows of a tile, 4 row_tiles */
  bool stores_zero;
  float scale;
  /* of decode_enter */
  struct decode_rows rows_in;
  uint8_t *memory; /* of the layer's pages */
  size_t unit_bytes;
};

/* Blocks are [KV heads][what of the map][rows of all tiles, ROWS each]. Where one of a block's rows belongs: */
struct row_place {
  int tile, row; /* tile: of all; row: of the tile */
  bool there;    /* such a tile */
};
__device__ __forceinline__ row_place place_of_row(const arguments &a, int row) {
  const int of_all = (int)blockIdx.x * ROWS + row, tile = of_all >> a.log_rows;
  return {tile, of_all & ((1 << a.log_rows) - 1), tile < a.tile_count};
}
/* Tiles that a block has rows of, and rows of a tile that it has at most. */
__host__ __device__ __forceinline__ int tiles_together(const arguments &a) { return a.row_tiles == 1 ? 2 : 1; }
__host__ __device__ __forceinline__ int rows_together(const arguments &a) { return ROWS / tiles_together(a); }
/* Of a tile and the block's KV head. */
__device__ __forceinline__ uint8_t *prepared_of(const arguments &a, const prepared_layout &layout, int tile) {
  return a.prepared + ((size_t)tile * a.kv_heads + blockIdx.z) * layout.bytes;
}

/* A warp's part of a column of the map, of heads of D channels; column < 0: nothing. */
template <int D> struct column_part { float at[D / SPLITS]; };
template <int D> __device__ __forceinline__ column_part<D> load_column(const arguments &a, const float *map, int column) {
  const int begin = threadIdx.x / COLUMNS * (D / SPLITS);
  column_part<D> part;
#pragma unroll
  for (int i = 0; i < D / SPLITS; i++) part.at[i] = column >= 0 ? __ldg(map + (size_t)(begin + i) * a.rows + column) : 0;
  return part;
}

/* Sums of 32 columns for the 8 rows, left in sums[column][row]. */
template <int D>
__device__ __forceinline__ void multiply_columns(const column_part<D> &column, const float *q, float (*parts)[COLUMNS][ROWS + 1],
                                                 float (*sums)[ROWS]) {
  const int lane = threadIdx.x % COLUMNS, split = threadIdx.x / COLUMNS;
  const int begin = split * (D / SPLITS);
  float sum[ROWS] = {0};
#pragma unroll
  for (int i = 0; i < D / SPLITS; i++) {
    const float m = column.at[i];
    const float4 q0 = *(const float4 *)(q + (begin + i) * ROWS), q1 = *(const float4 *)(q + (begin + i) * ROWS + 4);
    sum[0] += q0.x * m, sum[1] += q0.y * m, sum[2] += q0.z * m, sum[3] += q0.w * m;
    sum[4] += q1.x * m, sum[5] += q1.y * m, sum[6] += q1.z * m, sum[7] += q1.w * m;
  }
#pragma unroll
  for (int r = 0; r < ROWS; r++) parts[split][lane][r] = sum[r];
  __syncthreads();
  const int of = threadIdx.x / ROWS, row = threadIdx.x % ROWS;
  float total = 0;
#pragma unroll
  for (int s = 0; s < SPLITS; s++) total += parts[s][of][row];
  sums[of][row] = total;
  __syncthreads();
}

/* A warp makes one row of a class into fp16 numbers, for tiles of 16 rows: as they are where there are four gains, else in a unit
 * of their own. */
__device__ void write_wide_class(const arguments &a, const prepared_layout &layout, int class_, int count,
                                 const float (*mapped)[ROWS]) {
  const int of_block = threadIdx.x / 32, lane = threadIdx.x % 32, blocks = a.crumbs / 16;
  const row_place place = place_of_row(a, of_block);
  if (!place.there) return;
  uint8_t *prepared = prepared_of(a, layout, place.tile);
  const bool plain = a.groups == GAIN_CLASSES;
  float scale = 1, unit = 1;
  if (!plain) {
    float largest = 0;
    for (int i = lane; i < count; i += 32) largest = fmaxf(largest, fabsf(mapped[i][of_block]));
    int exponent;
    frexpf(largest_of_warp(largest), &exponent);
    exponent = max(exponent - 14, -100);
    scale = ldexpf(1, -exponent), unit = ldexpf(1, exponent);
  }
  const int row = place.row % 8, column = row % 4 * 2 + row / 4;
  uint32_t *words = (uint32_t *)prepared + place.row / 8 * blocks * 64 + column * 8;
  float sum = 0;
  for (int i = lane; i < count / 4; i += 32) { /* four crumbs of a block */
    float x[4];
#pragma unroll
    for (int k = 0; k < 4; k++) x[k] = fminf(fmaxf(mapped[4 * i + k][of_block] * scale, -LARGEST_FP16), LARGEST_FP16);
    uint32_t *to = words + operand_of_block(blocks, class_, i / 4) * 64 + i % 4 * 2;
#pragma unroll
    for (int k = 0; k < 2; k++) { /* crumbs 0 and 2, 1 and 3 */
      const uint32_t packed = pack_half2(x[k], x[k + 2]);
      const float2 rounded = unpack_half2(packed);
      sum += rounded.x + rounded.y;
      to[k] = packed;
    }
  }
  if (plain) return;
  sum = sum_of_warp(sum);
  if (lane != 0) return;
  struct row_constants *constants = (struct row_constants *)(prepared + layout.constants) + place.row;
  constants->unit[class_] = unit;
  constants->offset[class_] = -1.5f * 0x1p-24f * sum; /* the middle of a crumb is 3/2 */
}

/* A warp makes one row of a class into bytes. */
__device__ void write_class(const arguments &a, const prepared_layout &layout, int class_, int count,
                            const float (*mapped)[ROWS]) {
  const int of_block = threadIdx.x / 32, lane = threadIdx.x % 32, blocks = a.crumbs / 16;
  const row_place place = place_of_row(a, of_block);
  const int row = place.row;
  if (!place.there || row >= 4 * a.row_tiles) return;
  uint8_t *prepared = prepared_of(a, layout, place.tile);
  float largest = 0;
  for (int i = lane; i < count; i += 32) largest = fmaxf(largest, fabsf(mapped[i][of_block]));
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
      const int whole = __float2int_rn(mapped[4 * i + k][of_block] * inverse), top = (whole + 64) >> 7;
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
  constants->offset[class_] = -(HIGH_FLOAT + LOW_FLOAT + 128 * (float)(middle >> 7)) * scaled; /* whole 128ths: exact */
  const int low = LOW_BITS - (int)(middle & 127);
  *(int4 *)constants->begin[class_] = make_int4(HIGH_BITS, low, HIGH_BITS, low);
}

/* The way from (cos, sin) of 16 pairs from `first` on to weights of polynomials, for the rows of a tile, from `first_row` of the
 * block's on. */
__device__ void write_mixing(const arguments &a, const prepared_layout &layout, int first, uint8_t *prepared, int first_row,
                             const float (*mapped)[ROWS]) {
  const int columns = 8 * a.row_tiles;
  for (int i = threadIdx.x; i < PAIRS / 8 * columns * 32; i += COLUMNS * SPLITS) {
    const int k = i / 32 / columns, column = i / 32 % columns, operand_lane = i % 32, odd = column % 2;
    if (first + 8 * k >= a.pairs || first / 8 + k < a.fast / 8) continue;
    uint32_t value[2], rest[2];
#pragma unroll
    for (int reg = 0; reg < 2; reg++) {
      const int mine = 8 * k + 4 * reg + operand_lane % 4;
      const float amplitude[2] = {mapped[mine][first_row + column / 2], mapped[PAIRS + mine][first_row + column / 2]};
      const float s = a.series[(first + mine) * 16 + odd * 8 + operand_lane / 4];
      const float c = s * amplitude[odd], d = odd ? -s * amplitude[0] : s * amplitude[1];
      value[reg] = pack_half2(c, d);
      rest[reg] = rest_half2(c, d, value[reg]);
    }
    ((uint4 *)(prepared + layout.mixing))[(first / 8 - a.fast / 8) * columns * 32 + i] =
        make_uint4(value[0], value[1], rest[0], rest[1]);
  }
}

/* ---- rows ---- */

/* Of heads of D channels. */
template <int D> using turns = lane_turns<(D + 63) / 64>;

/* A row of a tile as it came. */
template <int D>
__device__ __forceinline__ const float *new_query(const arguments &a, const struct decode_tile &tile, int row, int head) {
  const int r = tile.first_row + row;
  return a.rows_in.q + (size_t)(tile.token + r / a.group) * a.rows_in.q_pitch + (size_t)(head * a.group + r % a.group) * D;
}

/* The warp's row of the block's queries -> q [D][ROWS], scaled; zeros where there is none (NULL). */
template <bool ENTER, int D>
__device__ __forceinline__ void bring_query(const arguments &a, const float *from, const turns<D> &turned, float *q) {
  const int lane = threadIdx.x % 32;
  const float scale = a.scale;
  float *to = q + threadIdx.x / 32;
  if (!from)
    for (int i = lane; i < D; i += 32) to[i * ROWS] = 0;
  else if (ENTER)
    rotate_head(from, a.rows_in.q_norm, a.rows_in.eps, D, a.rows_in.rotation, turned, lane,
                [to, scale](int i, float x) { to[i * ROWS] = x * scale; });
  else
    for (int i = lane; i < D; i += 32) to[i * ROWS] = from[i] * scale;
}

/* The block's rows of the tile, from `first` on, as they go on: queries as they are, and keys and values, once for all tiles of a
 * token, in BF16. */
template <int D>
__device__ __forceinline__ void write_rows_of(const arguments &a, const struct decode_tile &tile, int head, int first,
                                              const turns<D> &turned) {
  const struct decode_rows &in = a.rows_in;
  const int end = min(first + rows_together(a), tile.rows);
  const int lane = threadIdx.x % 32, all = end + (tile.first_row + first == 0 ? 2 : 0);
  const size_t kv_row = (size_t)tile.token * in.kv_pitch + (size_t)head * D;
  const struct write_place place = in.places[tile.token];
  for (int row = first + threadIdx.x / 32; row < all; row += SPLITS) {
    if (row < end) {
      float *to = in.rotated + row_offset(tile, row, a.kv_heads, a.group, head, D);
      rotate_head(new_query<D>(a, tile, row, head), in.q_norm, in.eps, D, in.rotation, turned, lane,
                  [to](int i, float x) { to[i] = x; });
      continue;
    }
    const int side = row - end;
    uint16_t *to =
        (uint16_t *)(a.memory + (size_t)place.unit * a.unit_bytes) + (((size_t)head * 2 + side) * PAGE_TOKENS + place.place) * D;
    bool finite = true;
    if (side == 0)
      rotate_head(in.k + kv_row, in.k_norm, in.eps, D, in.rotation, turned, lane,
                  [to, &finite](int i, float x) { to[i] = (uint16_t)rounded_bf16(x, finite); });
    else
      for (int i = lane; i < D; i += 32) to[i] = (uint16_t)rounded_bf16(in.v[kv_row + i], finite);
    if (!__all_sync(~0u, finite) && lane == 0)
      atomicMin(in.bad, 2ull * ((unsigned long long)tile.token * a.kv_heads + head) + (unsigned)side);
  }
}

/* ---- the kernel ---- */

/* The columns of the map that the block begins with, those of this lane; -1: none. Blocks of a (tile, KV head) are, in order,
 * classes of crumbs; the mean (lane 0) and what zero points multiply (lane 1); a, then b, of 16 pairs each. */
__device__ int first_column(const arguments &a, int head, int lane) {
  const int blocks = a.crumbs / 16, of = (int)blockIdx.y;
  if (of < GAIN_CLASSES) {
    const int first = class_begin(blocks, of) * 16, count = class_begin(blocks, of + 1) * 16 - first;
    return lane < count ? first + lane : -1;
  }
  if (of == GAIN_CLASSES) return lane == 0 ? a.crumbs + a.groups : lane == 1 && a.stores_zero ? a.crumbs : -1;
  const int pair = (of - GAIN_CLASSES - 1) * PAIRS + lane % PAIRS;
  const int wave = pair < a.pairs ? a.wave_rows[head * a.pairs + pair] : 0xFFFF;
  return wave == 0xFFFF ? -1 : wave + lane / PAIRS * a.rotating_pairs;
}

/* ENTER: decode_enter; the last block for each of a block's tiles writes its rows. So many blocks of a multiprocessor that those
 * of eight sequences, or sixteen, run at once: they are short, and a second turn takes as long as the first. */
template <bool ENTER, int D>
__global__ void __launch_bounds__(COLUMNS *SPLITS, D <= 128 ? 5 : 3) prepare_kernel(const __grid_constant__ arguments a) {
  __shared__ float4 q_rows[D * ROWS / 4];
  __shared__ float parts[SPLITS][COLUMNS][ROWS + 1];
  __shared__ float mapped[MAX_CLASS_COLUMNS][ROWS];
  /* Attention begins to read coded pages now; what writes them comes long before decode_enter, but may come just before
   * decode_prepare. */
  if (ENTER) start_kernel_after();
  const int head = blockIdx.z, blocks = a.crumbs / 16, lane = threadIdx.x % COLUMNS;
  const int writer = ENTER ? (int)blockIdx.y - (int)gridDim.y + tiles_together(a) : -1; /* of which tile; < 0: it maps */
  const row_place place = place_of_row(a, writer >= 0 ? writer * rows_together(a) : (int)threadIdx.x / 32);
  struct decode_tile tile = {};
  if (place.there) tile = a.tiles[place.tile];
  turns<D> turned;
  if (ENTER && place.there) turned = turns_at<(D + 63) / 64>(a.rows_in.rotation, a.rows_in.positions[tile.token], lane);
  if (writer >= 0) {
    wait_for_kernel_before();
    if (place.there) write_rows_of<D>(a, tile, head, place.row, turned);
    return;
  }
  const float *from = nullptr;
  if (place.there && place.row < tile.rows)
    from = ENTER ? new_query<D>(a, tile, place.row, head) : a.q + row_offset(tile, place.row, a.kv_heads, a.group, head, D);
  const float *map = a.map + (size_t)head * D * a.rows;
  column_part<D> column = load_column<D>(a, map, first_column(a, head, lane));
  float *q = (float *)q_rows;
  wait_for_kernel_before();
  if (!ENTER) start_kernel_after();
  bring_query<ENTER, D>(a, from, turned, q);
  if (!__syncthreads_or(tile.coded_pages > 0)) return;
  const struct prepared_layout layout = prepared_layout_of(blocks, a.pairs, a.fast, a.row_tiles);
  if (blockIdx.y < GAIN_CLASSES) {
    const int class_ = blockIdx.y, first = class_begin(blocks, class_) * 16, count = class_begin(blocks, class_ + 1) * 16 - first;
    for (int done = 0; done < count; done += COLUMNS) {
      if (done > 0) column = load_column<D>(a, map, done + lane < count ? first + done + lane : -1);
      multiply_columns<D>(column, q, parts, mapped + done);
    }
    if (a.row_tiles == 4)
      write_wide_class(a, layout, class_, count, mapped);
    else
      write_class(a, layout, class_, count, mapped);
    return;
  }
  const int of = threadIdx.x / ROWS, of_block = threadIdx.x % ROWS;
  const row_place to = place_of_row(a, of_block);
  const bool is_row = to.there && to.row < 4 * a.row_tiles;
  multiply_columns<D>(column, q, parts, mapped);
  if (blockIdx.y == GAIN_CLASSES) {
    if (!is_row) return;
    struct row_constants *constants = (struct row_constants *)(prepared_of(a, layout, to.tile) + layout.constants) + to.row;
    if (of == 0) constants->mean = mapped[of][of_block];
    if (of == 1) constants->zero = mapped[of][of_block];
    return;
  }
  const int first = (blockIdx.y - GAIN_CLASSES - 1) * PAIRS; /* of 16 pairs */
  if (of < PAIRS && first + of < a.fast && is_row)
    ((float2 *)(prepared_of(a, layout, to.tile) + layout.amplitudes))[to.row * a.fast + first + of] =
        make_float2(mapped[of][of_block], mapped[PAIRS + of][of_block]);
  if (a.pairs == a.fast) return;
  for (int row = 0; row < ROWS; row += rows_together(a)) {
    const row_place tile = place_of_row(a, row);
    if (tile.there) write_mixing(a, layout, first, prepared_of(a, layout, tile.tile), row, mapped);
  }
}

} // namespace

size_t decode_prepared_bytes(const struct decode_layer *layer, int rows) {
  return (size_t)prepared_layout_of(layer->keys.crumbs / 16, layer->turning_pairs, curved_pairs(layer), row_tiles_of(rows)).bytes;
}

static arguments arguments_of(const struct decode_shape *shape, const struct decode_layer *layer, const struct decode_plan *plan,
                              const struct decode_space *space) {
  arguments a = {};
  a.tiles = plan->tiles;
  a.map = layer->key_map;
  a.wave_rows = layer->wave_rows;
  a.prepared = (uint8_t *)space->prepared;
  a.kv_heads = shape->kv_heads;
  a.group = shape->group;
  a.head_dim = shape->head_dim;
  a.rows = layer->key_rows;
  a.crumbs = layer->keys.crumbs;
  a.groups = layer->keys.groups;
  a.pairs = layer->turning_pairs;
  a.fast = curved_pairs(layer);
  a.series = layer->rope ? layer->rope->series : nullptr;
  a.row_tiles = row_tiles_of(plan->rows);
  a.log_rows = a.row_tiles == 1 ? 2 : a.row_tiles == 2 ? 3 : 4;
  a.tile_count = plan->tile_count;
  a.rotating_pairs = layer->rotating_pairs;
  a.stores_zero = layer->keys.form == OSCAR_ROW_SCALE_ZERO;
  a.scale = shape->scale * LOG2_E;
  return a;
}

template <bool ENTER> static oscar_status launch(struct oscar_cuda *cuda, const arguments &a, int blocks, const char *what) {
  void (*kernel)(const arguments) = a.head_dim == 64    ? prepare_kernel<ENTER, 64>
                                    : a.head_dim == 96  ? prepare_kernel<ENTER, 96>
                                    : a.head_dim == 128 ? prepare_kernel<ENTER, 128>
                                                        : prepare_kernel<ENTER, 256>;
  const dim3 grid((unsigned)(((a.tile_count << a.log_rows) + ROWS - 1) / ROWS), (unsigned)blocks, (unsigned)a.kv_heads);
  return cuda_result(cuda, launch_kernel(cuda, kernel, grid, COLUMNS * SPLITS, 0, a), what);
}

/* Blocks that map the queries of the same tiles of a KV head. */
static int mapping_blocks(const arguments &a) { return GAIN_CLASSES + 1 + (a.pairs + PAIRS - 1) / PAIRS; }

oscar_status decode_prepare(struct oscar_cuda *cuda, const struct decode_shape *shape, const struct decode_layer *layer,
                            const struct decode_plan *plan, const float *q, const struct decode_space *space) {
  arguments a = arguments_of(shape, layer, plan, space);
  a.q = q;
  return launch<false>(cuda, a, mapping_blocks(a), "mapping queries");
}

oscar_status decode_enter(struct oscar_cuda *cuda, const struct decode_shape *shape, const struct decode_layer *layer,
                          const struct decode_plan *plan, const struct decode_rows *rows, const struct decode_space *space) {
  arguments a = arguments_of(shape, layer, plan, space);
  a.rows_in = *rows;
  a.memory = layer->memory;
  a.unit_bytes = layer->unit_bytes;
  const bool coded = layer->keys.crumbs > 0;
  return launch<true>(cuda, a, tiles_together(a) + (coded ? mapping_blocks(a) : 0), "entering rows");
}
