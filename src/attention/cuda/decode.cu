/* decode.cu - which kernel serves a layer, and its launch (decode.h, decode.cuh). */
#include "attention/cuda/decode.cuh"

namespace {

typedef void decode_kernel(const decode::arguments);

struct variant {
  int head_dim, blocks; /* of values; any: at most so many */
  bool any;
  const void *kernels[2];
};

#define VARIANT(d, blocks, any)                                                                                                  \
  {                                                                                                                              \
    d, blocks, any, { (const void *)&decode::kernel<d, blocks, any, 1>, (const void *)&decode::kernel<d, blocks, any, 2> }       \
  }

const variant variants[] = {
    VARIANT(64, 4, false), VARIANT(96, 6, false), VARIANT(128, 8, false), VARIANT(256, 16, false),
    VARIANT(64, 32, true), VARIANT(96, 32, true), VARIANT(128, 32, true), VARIANT(256, 32, true),
};

/* Without codes the kernel of the head dimension does: it has nothing to unpack. */
const variant *variant_of(int head_dim, int blocks) {
  for (const variant &v : variants)
    if (v.head_dim == head_dim && (blocks == 0 || (v.any ? blocks <= v.blocks : blocks == v.blocks))) return &v;
  return nullptr;
}

decode::arguments arguments_of(const struct decode_shape *shape, const struct decode_layer *layer) {
  decode::arguments a = {};
  a.memory = layer->memory;
  a.unit_bytes = layer->unit_bytes;
  a.value_map = layer->values.map;
  a.kv_heads = shape->kv_heads;
  a.group = shape->group;
  a.head_dim = shape->head_dim;
  a.window = shape->window;
  a.head_bytes = layer->head_bytes;
  a.value_offset = layer->value_offset;
  a.coded = layer->values.crumbs > 0;
  a.page_bytes = a.coded ? layer->head_bytes : 0;
  a.key_crumbs = layer->keys.crumbs, a.key_groups = layer->keys.groups, a.key_form = layer->keys.form;
  a.value_crumbs = layer->values.crumbs, a.value_groups = layer->values.groups, a.value_form = layer->values.form;
  a.value_rows = layer->values.rows;
  a.waves = layer->rope != nullptr;
  if (layer->rope) a.rope = *layer->rope;
  a.scale = shape->scale * 1.44269504088896341f;
  return a;
}

bool groups_fit(const struct decode_side *side) {
  const int blocks = side->crumbs / 16;
  if (side->form == OSCAR_ROW_SCALE_ZERO) return side->groups == 1;
  if (side->groups > GAIN_CLASSES) return false;
  for (int p = 0; p < GAIN_CLASSES; p++) { /* a class lies in one group */
    const int group = p * side->groups / GAIN_CLASSES, first = class_begin(blocks, p), last = class_begin(blocks, p + 1);
    if (first == last) continue;
    if (first < group * blocks / side->groups || last > (group + 1) * blocks / side->groups) return false;
  }
  return true;
}

} // namespace

oscar_status decode_check(struct oscar_cuda *cuda, const struct decode_shape *shape, const struct decode_layer *layer,
                          int *rows) {
  const variant *v = variant_of(shape->head_dim, layer->values.crumbs / 16);
  if (!v)
    return set_error(
        cuda->context, OSCAR_UNSUPPORTED,
        "attention on a GPU: head dimension %d with %d crumbs of values; there are kernels for 64, 96, 128 and 256, and up "
        "to 512 crumbs",
        shape->head_dim, layer->values.crumbs);
  *rows = DECODE_ROWS;
  if (layer->values.crumbs == 0) return OSCAR_OK;
  if (layer->keys.crumbs > 1024)
    return set_error(cuda->context, OSCAR_UNSUPPORTED, "attention on a GPU: keys of %d crumbs; at most 1024", layer->keys.crumbs);
  if (!groups_fit(&layer->keys) || !groups_fit(&layer->values))
    return set_error(cuda->context, OSCAR_UNSUPPORTED,
                     "attention on a GPU: rows with %d and %d groups of metadata; at most 4 gains, or one scale and zero",
                     layer->keys.groups, layer->values.groups);
  const decode::arguments a = arguments_of(shape, layer);
  for (int row_tiles = 1; row_tiles <= 2; row_tiles++) {
    const int bytes = decode::shared_layout_of(a, decode::warps_of(v->blocks, row_tiles), row_tiles).bytes;
    if ((size_t)bytes + 1024 <= cuda->shared_bytes)
      *rows = 4 * row_tiles;
    else if (row_tiles == 1)
      return set_error(
          cuda->context, OSCAR_UNSUPPORTED,
          "attention on a GPU: a page of %d bytes and a rotating mean of %d pairs need %d bytes of shared memory, %zu are there",
          a.page_bytes, a.rope.pairs, bytes, cuda->shared_bytes);
  }
  return OSCAR_OK;
}

size_t decode_part_bytes(const struct decode_shape *shape, const struct decode_layer *layer) {
  return decode::part_floats(arguments_of(shape, layer)) * sizeof(float);
}

int decode_blocks(const struct oscar_cuda *cuda) { return cuda->info.multiprocessors; }

oscar_status decode_run(struct oscar_cuda *cuda, const struct decode_shape *shape, const struct decode_layer *layer,
                        const struct decode_plan *plan, const float *q, const struct decode_space *space, float *out) {
  const variant *v = variant_of(shape->head_dim, layer->values.crumbs / 16);
  const int row_tiles = plan->rows > 4 ? 2 : 1, warps = decode::warps_of(v->blocks, row_tiles);
  decode::arguments a = arguments_of(shape, layer);
  a.tiles = plan->tiles;
  a.pages = plan->pages;
  a.tile_count = plan->tile_count;
  a.total_units = plan->total_units;
  a.q = q;
  a.out = out;
  a.prepared = (const uint8_t *)space->prepared;
  a.parts = space->parts;
  a.done = space->done;
  const int bytes = decode::shared_layout_of(a, warps, row_tiles).bytes;
  oscar_status status =
      cuda_result(cuda, cudaFuncSetAttribute(v->kernels[row_tiles - 1], cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
                  "asking for shared memory");
  if (status != OSCAR_OK) return status;
  void *arguments[] = {&a};
  return cuda_result(cuda,
                     cudaLaunchKernel(v->kernels[row_tiles - 1], dim3((unsigned)decode_blocks(cuda)),
                                      dim3((unsigned)(warps * 32)), arguments, (size_t)bytes, (cudaStream_t)cuda->stream),
                     "attention");
}
