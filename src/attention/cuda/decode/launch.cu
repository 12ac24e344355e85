/* attention/cuda/decode/launch.cu - which kernel serves a layer, and its launch (attention/cuda/decode.h, kernel.cuh). */
#include "attention/cuda/decode/kernel.cuh"
#include "attention/cuda/decode/variant.cuh"

#include <initializer_list>

namespace {

using decode::variant;

const variant *variant_of(int head_dim) {
  for (const variant *v : {&decode::variant_64, &decode::variant_96, &decode::variant_128, &decode::variant_256})
    if (v->head_dim == head_dim) return v;
  return nullptr;
}

decode::how_it_turns turns_of(const struct decode_layer *layer) {
  return !layer->rope ? decode::STAYS : layer->own_curves ? decode::BY_PAIRS : decode::BY_WAVES;
}

/* Which of the usual kernels does, or form NO_CODES. */
struct usual {
  int form, kind; /* form < 0: none does */
};
usual usual_of(const variant &v, const struct decode_layer *layer, int window) {
  constexpr usual NONE_DOES = {-1, 0};
  const struct decode_side &keys = layer->keys, &values = layer->values;
  if (values.crumbs == 0) return {decode::NO_CODES, 0};
  if (window || keys.crumbs != 16 * v.blocks || values.crumbs != 16 * v.blocks || !has_usual_gains(*layer)) return NONE_DOES;
  const int form = keys.form == OSCAR_ROW_LOG_GAINS ? decode::FOUR_LOG_GAINS : decode::ONE_GAIN;
  const decode::how_it_turns turns = turns_of(layer);
  if (turns == decode::BY_PAIRS && layer->rope->pairs != v.head_dim / 2) return NONE_DOES;
  const int steps = turns == decode::BY_WAVES ? layer->rope->steps : layer->turning_pairs / CURVE_STEP;
  for (int kind = 0; kind < decode::USUAL_KINDS; kind++)
    if (decode::USUAL_TURNS[kind] == turns && decode::USUAL_STEPS[kind] == steps) return {form, kind};
  return NONE_DOES;
}

/* Of a head dimension, for tiles of so many times 4 rows; NULL: there is none. */
const void *usual_kernel(const variant &v, const usual &u, int row_tiles) {
  const bool wide = row_tiles == 4;
  if (u.form == decode::NO_CODES) return wide ? v.wide_no_codes : v.no_codes[row_tiles - 1];
  if (wide) return u.kind < decode::WIDE_KINDS ? v.wide[u.form][u.kind] : nullptr;
  return v.usual[u.form][u.kind][row_tiles - 1];
}

struct choice {
  const void *kernel;
  int warps; /* of a block */
};

/* The compute capability that a kernel was compiled for, which has its warps of a block: the device's may be a later one. */
int capability_of(const struct oscar_cuda *cuda, const void *kernel) {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess ? attributes.ptxVersion : cuda->info.capability;
}

/* kernel NULL: there is none for so many rows. */
choice choose(const struct oscar_cuda *cuda, const struct decode_shape *shape, const struct decode_layer *layer, int row_tiles) {
  const variant &v = *variant_of(shape->head_dim);
  const usual u = usual_of(v, layer, shape->window);
  if (u.form >= 0) {
    const void *kernel = usual_kernel(v, u, row_tiles);
    if (!kernel) return {};
    return {kernel, decode::warps_of(v.blocks, row_tiles, decode::USUAL_TURNS[u.kind], decode::USUAL_STEPS[u.kind], false,
                                     capability_of(cuda, kernel))};
  }
  if (row_tiles == 4) return {};
  const bool usual_values = layer->values.crumbs == 16 * v.blocks;
  const void *kernel = usual_values ? v.any_keys[row_tiles - 1] : v.any[row_tiles - 1];
  return {kernel, decode::warps_of(usual_values ? v.blocks : decode::MOST_VALUE_BLOCKS, row_tiles, decode::STAYS, 0, true,
                                   capability_of(cuda, kernel))};
}

decode::arguments arguments_of(const struct decode_shape *shape, const struct decode_layer *layer) {
  decode::arguments a = {};
  a.memory = layer->memory;
  a.unit_bytes = layer->unit_bytes;
  a.kv_heads = shape->kv_heads;
  a.group = shape->group;
  a.head_dim = shape->head_dim;
  a.window = shape->window;
  a.head_bytes = layer->head_bytes;
  a.value_offset = layer->value_offset;
  a.value_map = layer->value_map;
  a.coded = layer->values.crumbs > 0;
  a.page_bytes = a.coded ? layer->head_bytes : 0;
  a.turns = turns_of(layer);
  if (layer->rope) a.rope = *layer->rope;
  a.angle_bytes = a.turns == decode::BY_PAIRS ? layer->turning_pairs * 8 : 0;
  const int tile_bytes = EXACT_TOKENS * a.head_dim * 2;
  a.slot_bytes = a.page_bytes > tile_bytes ? a.page_bytes : tile_bytes;
  a.forms = {layer->keys.crumbs,   layer->keys.groups,   layer->keys.form,
             layer->values.crumbs, layer->values.groups, layer->values.form};
  a.pairs = layer->pairs;
  a.curves = (const uint8_t *)layer->curves;
  a.turning_pairs = layer->turning_pairs;
  a.fast = curved_pairs(layer);
  a.scale = shape->scale * LOG2_E;
  return a;
}

bool groups_fit(const struct decode_side *side) {
  const int blocks = side->crumbs / 16;
  if (side->form == OSCAR_ROW_SCALE_ZERO) return side->groups == 1;
  if (side->groups > GAIN_CLASSES) return false;
  for (int p = 0; p < GAIN_CLASSES; p++) { /* a class lies in one group */
    const int group = side->groups == GAIN_CLASSES ? p : p * side->groups / GAIN_CLASSES, first = class_begin(blocks, p),
              last = class_begin(blocks, p + 1);
    if (first == last) continue;
    if (first < group * blocks / side->groups || last > (group + 1) * blocks / side->groups) return false;
  }
  return true;
}

} // namespace

oscar_status decode_check(struct oscar_cuda *cuda, const struct decode_shape *shape, const struct decode_layer *layer,
                          int *rows) {
  const variant *v = variant_of(shape->head_dim);
  if (!v || layer->values.crumbs > 16 * decode::MOST_VALUE_BLOCKS)
    return set_error(
        cuda->context, OSCAR_UNSUPPORTED,
        "attention on a GPU: head dimension %d with %d crumbs of values; there are kernels for 64, 96, 128 and 256, and up "
        "to 512 crumbs",
        shape->head_dim, layer->values.crumbs);
  *rows = 4;
  if (layer->keys.crumbs > 1024)
    return set_error(cuda->context, OSCAR_UNSUPPORTED, "attention on a GPU: keys of %d crumbs; at most 1024", layer->keys.crumbs);
  if (layer->values.crumbs > 0 && (!groups_fit(&layer->keys) || !groups_fit(&layer->values)))
    return set_error(cuda->context, OSCAR_UNSUPPORTED,
                     "attention on a GPU: rows with %d and %d groups of metadata; at most 4 gains, or one scale and zero",
                     layer->keys.groups, layer->values.groups);
  const decode::arguments a = arguments_of(shape, layer);
  for (int row_tiles = 1; row_tiles <= DECODE_ROWS / 4; row_tiles *= 2) {
    const choice chosen = choose(cuda, shape, layer, row_tiles);
    if (!chosen.kernel) continue;
    const int bytes = decode::shared_layout_of(a, chosen.warps, row_tiles).bytes;
    if ((size_t)bytes <= cuda->shared_bytes)
      *rows = 4 * row_tiles;
    else if (row_tiles == 1)
      return set_error(
          cuda->context, OSCAR_UNSUPPORTED,
          "attention on a GPU: a page of %d bytes and a rotating mean of %d pairs need %d bytes of shared memory, %zu are there",
          a.page_bytes, a.turning_pairs, bytes, cuda->shared_bytes);
  }
  return OSCAR_OK;
}

size_t decode_part_bytes(const struct decode_shape *shape) { return part_floats(shape->head_dim) * sizeof(float); }

int decode_blocks(const struct oscar_cuda *cuda) { return cuda->info.multiprocessors; }

oscar_status decode_run(struct oscar_cuda *cuda, const struct decode_shape *shape, const struct decode_layer *layer,
                        const struct decode_plan *plan, const float *q, const struct decode_space *space, float *out) {
  const int row_tiles = row_tiles_of(plan->rows);
  const choice chosen = choose(cuda, shape, layer, row_tiles);
  decode::arguments a = arguments_of(shape, layer);
  a.tiles = plan->tiles;
  a.pages = plan->pages;
  a.tile_count = plan->tile_count;
  a.line = plan->line;
  a.q = q;
  a.prepared = (const uint8_t *)space->prepared;
  a.parts = space->parts;
  a.out = out;
  const bool wanted[3][2] = {{a.coded, a.coded}, {a.coded, false}, {false, false}}; /* as much as there is room for */
  int bytes = 0;
  for (const auto &each : wanted) {
    a.map_is_here = each[0], a.copies_ahead = each[1];
    bytes = decode::shared_layout_of(a, chosen.warps, row_tiles).bytes;
    if ((size_t)bytes <= cuda->shared_bytes) break;
  }
  oscar_status status = cuda_result(cuda, cudaFuncSetAttribute(chosen.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
                                    "asking for shared memory");
  if (status != OSCAR_OK) return status;
  void *arguments[] = {&a};
  return launch_early(cuda, chosen.kernel, dim3((unsigned)decode_blocks(cuda)), chosen.warps * 32, bytes, arguments, "attention");
}
