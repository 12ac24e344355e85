/* attention/cuda/prefill/launch.cu - which kernel serves a layer, and its launch (attention/cuda/prefill.h, kernel.cuh). */
#include "attention/cuda/prefill/kernel.cuh"

namespace {

using prefill::arguments;

/* Kernels without codes use those of the same head dimension. Steps are known where keys have as many crumbs as values, however
 * many pairs turn; 0 is for the others, whose products wait for each other. */
struct variant {
  int head_dim, value_crumbs, steps;
  const void *kernel;
};
#define KERNEL(d, crumbs, steps)                                                                                                 \
  { d, crumbs, steps, (const void *)&prefill::kernel<prefill::traits<d, crumbs, steps>> }
const variant variants[] = {KERNEL(64, 64, 4),    KERNEL(64, 64, 5),    KERNEL(64, 64, 6),    KERNEL(64, 64, 7),
                            KERNEL(64, 64, 8),    KERNEL(64, 64, 0),    KERNEL(64, 128, 8),   KERNEL(64, 128, 9),
                            KERNEL(64, 128, 10),  KERNEL(64, 128, 11),  KERNEL(64, 128, 12),  KERNEL(64, 128, 0),
                            KERNEL(128, 128, 8),  KERNEL(128, 128, 10), KERNEL(128, 128, 12), KERNEL(128, 128, 14),
                            KERNEL(128, 128, 16), KERNEL(128, 128, 0)};

const variant *variant_of(const struct decode_shape *shape, const struct decode_layer *layer, int key_columns) {
  for (const variant &v : variants)
    if (v.head_dim == shape->head_dim && (layer->values.crumbs == 0 || v.value_crumbs == layer->values.crumbs) &&
        (layer->values.crumbs == 0 || v.steps == 0 || (layer->keys.crumbs == v.value_crumbs && 16 * v.steps == key_columns)))
      return &v;
  return nullptr;
}

int columns_of(int n) { return (n + 63) / 64; }

arguments arguments_of(const struct oscar_cuda *cuda, const struct decode_shape *shape, const struct decode_layer *layer,
                       int key_columns, int turning_pairs) {
  arguments a = {};
  const int width = key_columns > shape->head_dim ? key_columns : shape->head_dim;
  a.memory = layer->memory;
  a.unit_bytes = layer->unit_bytes;
  a.tables.key_columns = key_columns;
  a.tables.turning_pairs = turning_pairs;
  a.kv_heads = shape->kv_heads, a.group = shape->group, a.window = shape->window;
  a.key_crumbs = layer->keys.crumbs, a.value_crumbs = layer->values.crumbs;
  a.head_bytes = layer->head_bytes, a.value_offset = layer->value_offset;
  a.log_gains = layer->keys.form == OSCAR_ROW_LOG_GAINS;
  a.scale = shape->scale * LOG2_E;
  a.map_chunks = columns_of(key_columns);
  a.code_unit = a.log_gains ? 1 / LOG_UNIT : 1;
  a.query_bytes = columns_of(width) * prefill::COLUMN_BYTES;
  const int coded = columns_of(layer->keys.crumbs) * prefill::COLUMN_BYTES + 2 * turning_pairs * 128,
            exact = columns_of(shape->head_dim) * prefill::COLUMN_BYTES;
  a.key_slot_bytes = coded > exact ? coded : exact;
  a.value_slot_bytes =
      columns_of(layer->values.crumbs > shape->head_dim ? layer->values.crumbs : shape->head_dim) * prefill::COLUMN_BYTES;
  for (a.stages = prefill::MOST_STAGES; a.stages > 1; a.stages--)
    if ((size_t)prefill::shared_layout_of(a).bytes + 1024 <= cuda->shared_bytes) break;
  return a;
}

/* Parts of cut tiles put together: a block for a tile's KV head and 8 rows, a warp for each row. */
constexpr int MERGED_ROWS = 8;
__global__ void __launch_bounds__(MERGED_ROWS * 32) merge_kernel(const __grid_constant__ arguments a, int head_dim) {
  const struct prefill_tile tile = a.tiles[blockIdx.x / a.kv_heads];
  const int head = blockIdx.x % a.kv_heads, row = blockIdx.y * MERGED_ROWS + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (tile.parts == 1 || tile.part > 0 || row >= tile.of.rows) return;
  const size_t stride = (size_t)a.kv_heads * prefill::part_floats_of(head_dim);
  const float *first = a.parts + (size_t)tile.first * stride + (size_t)head * prefill::part_floats_of(head_dim);
  const float2 *states = (const float2 *)(first + PREFILL_ROWS * head_dim) + row;
  float m = prefill::LEAST, l = 0;
  for (int i = 0; i < tile.parts; i++) m = fmaxf(m, states[i * (stride / 2)].x);
  for (int i = 0; i < tile.parts; i++) l += states[i * (stride / 2)].y * exp2_fast(states[i * (stride / 2)].x - m);
  float *to = a.out + row_offset(tile.of, row, a.kv_heads, a.group, head, head_dim);
  for (int column = 2 * lane; column < head_dim; column += 64) {
    float2 sum = {0, 0};
    for (int i = 0; i < tile.parts; i++) {
      const float factor = exp2_fast(states[i * (stride / 2)].x - m);
      const float2 x = *(const float2 *)(first + i * stride + row * head_dim + column);
      sum.x += x.x * factor, sum.y += x.y * factor;
    }
    *(float2 *)(to + column) = make_float2(sum.x / l, sum.y / l);
  }
}

/* A block for each page and pair, a thread for each token. Rows of a slot are 2 place, cos, and 2 place + 1, sin. */
__global__ void waves_kernel(const uint4 *angles, int pairs, const float *tokens, int64_t first, uint8_t *waves) {
  const int pair = blockIdx.x, token = threadIdx.x, column = prefill_token_column(token);
  const int64_t page = first + blockIdx.y;
  uint8_t *to = waves + ((size_t)page * PREFILL_SHIFTS * gridDim.x + pair) * PREFILL_WAVE_BYTES + column % 8 * 2;
  float2 centre = make_float2(0, 0), x = centre; /* pairs beyond the rope's */
  if (pair < pairs) {
    const uint4 words = angles[((size_t)page * (pairs / 8) + pair / 8) * 4 + pair % 4];
    const float2 value = unpack_half2(pair % 8 < 4 ? words.x : words.z), rest = unpack_half2(pair % 8 < 4 ? words.y : words.w);
    centre = make_float2(value.x + rest.x, value.y + rest.y);
    x = make_float2(tokens[pair * 128 + token], tokens[pair * 128 + 64 + token]);
  }
  const __half cosine = __float2half_rn(centre.x * x.x - centre.y * x.y), sine = __float2half_rn(centre.y * x.x + centre.x * x.y);
#pragma unroll
  for (int shift = 0; shift < PREFILL_SHIFTS; shift++, to += gridDim.x * PREFILL_WAVE_BYTES) {
    const int row = 2 * ((pair + shift) % PREFILL_SHIFTS);
    *(__half *)(to + swizzled(row, column / 8) - row * 128) = cosine;
    *(__half *)(to + swizzled(row + 1, column / 8) - row * 128) = sine;
  }
}

} // namespace

extern "C" oscar_status prefill_make_waves(struct oscar_cuda *cuda, const struct decode_rope *rope, const float *token_angles,
                                           int64_t first, int64_t count, void *waves) {
  for (int64_t done = 0, n; done < count; done += n) {
    n = count - done < 32768 ? count - done : 32768;
    waves_kernel<<<dim3((unsigned)prefill_wave_pairs(rope->pairs), (unsigned)n), 64, 0, (cudaStream_t)cuda->stream>>>(
        (const uint4 *)rope->angles, rope->pairs, token_angles, first + done, (uint8_t *)waves);
  }
  return cuda_launched(cuda, "making waves");
}

extern "C" bool prefill_serves(const struct oscar_cuda *cuda, const struct decode_shape *shape, const struct decode_layer *layer,
                               const struct prefill_table_sizes *sizes) {
  if (cuda->info.capability != 90) return false;
  const bool coded = layer->values.crumbs > 0;
  if (coded && !has_usual_gains(*layer)) return false;
  const variant *v = variant_of(shape, layer, coded ? sizes->key_columns : 0);
  if (!v) return false;
  cudaFuncAttributes attributes; /* a kernel of another architecture's code is there, but empty */
  if (cudaFuncGetAttributes(&attributes, v->kernel) != cudaSuccess) {
    (void)cudaGetLastError();
    return false;
  }
  const arguments a = arguments_of(cuda, shape, layer, coded ? sizes->key_columns : 0, coded ? sizes->turning_pairs : 0);
  return attributes.binaryVersion == 90 && a.stages > 1;
}

extern "C" size_t prefill_part_bytes(const struct decode_shape *shape) {
  return (size_t)shape->kv_heads * prefill::part_floats_of(shape->head_dim) * sizeof(float);
}

extern "C" oscar_status prefill_run(struct oscar_cuda *cuda, const struct decode_shape *shape, const struct decode_layer *layer,
                                    const struct prefill_tables *tables, const struct prefill_plan *plan, const void *waves,
                                    float *parts, const float *q, float *out) {
  const bool coded = layer->values.crumbs > 0;
  const variant *v = variant_of(shape, layer, coded ? tables->key_columns : 0);
  arguments a = arguments_of(cuda, shape, layer, coded ? tables->key_columns : 0, coded ? tables->turning_pairs : 0);
  if (coded) {
    a.tables = *tables;
    a.waves = (const uint8_t *)waves;
    a.wave_bytes = layer->rope ? (size_t)prefill_wave_pairs(layer->rope->pairs) * PREFILL_SHIFTS * PREFILL_WAVE_BYTES : 0;
  }
  a.tiles = plan->tiles, a.pages = plan->pages, a.tile_count = plan->tile_count;
  a.parts = parts, a.q = q, a.out = out;
  const int bytes = prefill::shared_layout_of(a).bytes + 1024;
  oscar_status status = cuda_result(cuda, cudaFuncSetAttribute(v->kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
                                    "asking for shared memory");
  if (status != OSCAR_OK) return status;
  void *arguments[] = {&a};
  status = cuda_result(cuda,
                       cudaLaunchKernel(v->kernel, dim3((unsigned)(plan->tile_count * shape->kv_heads)), dim3(prefill::THREADS),
                                        arguments, (size_t)bytes, (cudaStream_t)cuda->stream),
                       "attention of a prompt");
  if (status != OSCAR_OK || plan->part_count == 0) return status;
  merge_kernel<<<dim3((unsigned)(plan->tile_count * shape->kv_heads), PREFILL_ROWS / MERGED_ROWS), MERGED_ROWS * 32, 0,
                 (cudaStream_t)cuda->stream>>>(a, shape->head_dim);
  return cuda_launched(cuda, "merging attention of a prompt");
}
