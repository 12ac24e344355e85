/*
 * device.c - attention over a cache on a GPU: maps, tables and work space in its memory, plans, launches (device.h).
 *
 * A plan depends on page tables, jobs and window alone, not on the layer, so one upload serves all layers of a step.
 */
#include "attention/cuda/device.h"

#include "attention/cuda/plan.h"
#include "attention/cuda/rope_tables.h"

#include <string.h>

#define FIRST_PAGES 512 /* of a table of angles; it doubles */

/* Device memory that only grows; contents are not kept. */
struct space {
  void *memory;
  size_t bytes;
};

struct rope_entry {
  const oscar_rope *rope;
  struct rope_table_sizes sizes;
  struct decode_rope tables;
  struct space fixed, angles; /* series and curves; angles and fast angles */
};

/* A plan in device memory and what it was made for. One for each window that layers have. */
struct kept_plan {
  int window;
  bool valid;
  uint64_t changes; /* of the cache */
  oscar_attention_job *jobs;
  int n_jobs, jobs_room;
  struct space space;
  struct decode_plan plan;
  struct plan_result result;
};

struct device_attention {
  struct oscar_cuda *cuda;
  oscar_cache *cache;
  const struct cache_geometry *geometry;
  int group;
  int most_rows; /* of a tile, that the kernels of all layers take */
  float scale;
  struct decode_layer *layers; /* [layers] */
  int *rope_of_layer;          /* [layers] index of its rope; -1: none */
  struct rope_entry *ropes;
  int rope_count;
  struct space maps; /* all maps and rows of waves */
  struct space prepared, parts, rotated;
  struct kept_plan plans[STEP_WINDOWS];
  int next_plan;
  void *host_plan; /* where plans are made */
  size_t host_plan_bytes;
  oscar_attention_job *step_jobs; /* of device_attention_make_ready */
  int step_jobs_room;
};

static oscar_context *context_of(const struct device_attention *a) { return a->geometry->context; }

static void space_free(struct device_attention *a, struct space *space) {
  cuda_release(a->cuda, space->memory, space->bytes);
  *space = (struct space){0};
}

static oscar_status space_reserve(struct device_attention *a, struct space *space, size_t bytes) {
  if (bytes <= space->bytes) return OSCAR_OK;
  const size_t wanted = bytes + bytes / 2;
  oscar_status status = oscar_cuda_wait(a->cuda); /* what is enqueued may still use the old one */
  if (status != OSCAR_OK) return status;
  space_free(a, space);
  status = cuda_alloc(a->cuda, wanted, &space->memory);
  if (status != OSCAR_OK) return status;
  space->bytes = wanted;
  return OSCAR_OK;
}

/* ---- maps ---- */

struct map_sizes {
  size_t keys, values, waves;
};

static const oscar_codec *codec_of(const struct device_attention *a, int layer, int head, oscar_side side) {
  return oscar_codec_set_get(a->geometry->codecs, layer, head, side);
}

static int find_rope(const struct device_attention *a, const oscar_rope *rope) {
  for (int i = 0; i < a->rope_count; i++)
    if (rope_equal(a->ropes[i].rope, rope)) return i;
  return -1;
}

static struct map_sizes map_sizes_of(const struct device_attention *a, int layer) {
  const struct cache_geometry *g = a->geometry;
  const oscar_codec *keys = codec_of(a, layer, 0, OSCAR_KEYS), *values = codec_of(a, layer, 0, OSCAR_VALUES);
  struct map_sizes sizes = {.keys = (size_t)g->kv_heads * (size_t)g->head_dim * (size_t)keys->map_rows * sizeof(float),
                            .values = (size_t)g->kv_heads * (size_t)g->head_dim * (size_t)values->map_rows * sizeof(float)};
  const int rope = a->rope_of_layer[layer];
  if (rope >= 0) sizes.waves = round_up((size_t)g->kv_heads * (size_t)a->ropes[rope].sizes.pairs * sizeof(uint16_t), 256);
  return sizes;
}

/* The maps of one layer in the order of the device, one after the other. */
static void fill_maps(const struct device_attention *a, int layer, uint8_t *to) {
  const struct cache_geometry *g = a->geometry;
  const struct map_sizes sizes = map_sizes_of(a, layer);
  const int rope = a->rope_of_layer[layer];
  for (int head = 0; head < g->kv_heads; head++) {
    const oscar_codec *keys = codec_of(a, layer, head, OSCAR_KEYS), *values = codec_of(a, layer, head, OSCAR_VALUES);
    const size_t d = (size_t)g->head_dim, rows = (size_t)keys->map_rows, value_rows = (size_t)values->map_rows;
    float *transposed = (float *)(void *)to + (size_t)head * d * rows;
    for (size_t row = 0; row < rows; row++)
      for (size_t i = 0; i < d; i++) transposed[i * rows + row] = keys->map[row * d + i];
    memcpy((float *)(void *)(to + sizes.keys) + (size_t)head * d * value_rows, values->map, d * value_rows * sizeof(float));
    if (rope < 0) continue;
    uint16_t *waves = (uint16_t *)(void *)(to + sizes.keys + sizes.values) + (size_t)head * (size_t)a->ropes[rope].sizes.pairs;
    for (int pair = 0; pair < a->ropes[rope].sizes.pairs; pair++) waves[pair] = 0xFFFF;
    for (int k = 0; k < keys->spec.rotating_pairs; k++)
      waves[keys->spec.rotating_pair[k]] = (uint16_t)(keys->crumbs + keys->spec.groups + 1 + k);
  }
}

static oscar_status upload_maps(struct device_attention *a) {
  size_t total = 0, largest = 0;
  for (int layer = 0; layer < a->geometry->layers; layer++) {
    const struct map_sizes sizes = map_sizes_of(a, layer);
    const size_t bytes = sizes.keys + sizes.values + sizes.waves;
    total += bytes;
    if (bytes > largest) largest = bytes;
  }
  oscar_status status = cuda_alloc(a->cuda, total, &a->maps.memory);
  if (status != OSCAR_OK) return status;
  a->maps.bytes = total;
  uint8_t *host = mem_alloc(context_of(a), largest, 1), *to = a->maps.memory;
  if (!host) return OSCAR_NO_MEMORY;
  for (int layer = 0; layer < a->geometry->layers && status == OSCAR_OK; layer++) {
    const struct map_sizes sizes = map_sizes_of(a, layer);
    const size_t bytes = sizes.keys + sizes.values + sizes.waves;
    fill_maps(a, layer, host);
    status = cuda_upload(a->cuda, to, host, bytes);
    a->layers[layer].keys.map = (const float *)(const void *)to;
    a->layers[layer].values.map = (const float *)(const void *)(to + sizes.keys);
    a->layers[layer].wave_rows = (const uint16_t *)(const void *)(to + sizes.keys + sizes.values);
    to += bytes;
  }
  mem_free(context_of(a), host);
  return status;
}

/* ---- ropes ---- */

static oscar_status make_rope(struct device_attention *a, const oscar_rope *rope) {
  oscar_status status;
  struct rope_entry *entry = &a->ropes[a->rope_count];
  *entry = (struct rope_entry){.rope = rope};
  entry->sizes = rope_table_sizes_of(context_of(a), rope, &status);
  if (status != OSCAR_OK) return status;
  const size_t bytes = entry->sizes.series + entry->sizes.curve_words;
  uint8_t *host = mem_alloc(context_of(a), bytes, 1);
  if (!host) return OSCAR_NO_MEMORY;
  status = rope_tables_fill(context_of(a), rope, &entry->sizes, (float *)(void *)host,
                            (uint32_t *)(void *)(host + entry->sizes.series));
  if (status == OSCAR_OK) status = cuda_alloc(a->cuda, bytes, &entry->fixed.memory);
  if (status == OSCAR_OK) {
    entry->fixed.bytes = bytes;
    status = cuda_upload(a->cuda, entry->fixed.memory, host, bytes);
  }
  mem_free(context_of(a), host);
  if (status != OSCAR_OK) return status;
  a->rope_count++;
  entry->tables = (struct decode_rope){.pairs = entry->sizes.pairs,
                                       .fast = entry->sizes.fast,
                                       .curves = entry->sizes.curves,
                                       .series = entry->fixed.memory,
                                       .curve_words = (uint8_t *)entry->fixed.memory + entry->sizes.series};
  return OSCAR_OK;
}

/* Angles of pages 0 .. last. */
static oscar_status extend_angles(struct device_attention *a, struct rope_entry *entry, int64_t last) {
  if (last < entry->tables.pages) return OSCAR_OK;
  int64_t pages = entry->tables.pages ? entry->tables.pages : FIRST_PAGES;
  while (pages <= last) pages *= 2;
  const size_t angles = entry->sizes.angles * (size_t)pages, fast = entry->sizes.fast_angles * (size_t)pages;
  uint8_t *host = mem_alloc(context_of(a), angles + fast, 1);
  if (!host) return OSCAR_NO_MEMORY;
  rope_angles_fill(entry->rope, &entry->sizes, 0, pages, (uint32_t *)(void *)host, (float *)(void *)(host + angles));
  oscar_status status = oscar_cuda_wait(a->cuda);
  if (status == OSCAR_OK) {
    space_free(a, &entry->angles);
    entry->tables.pages = 0;
    status = cuda_alloc(a->cuda, angles + fast, &entry->angles.memory);
  }
  if (status == OSCAR_OK) {
    entry->angles.bytes = angles + fast;
    status = cuda_upload(a->cuda, entry->angles.memory, host, angles + fast);
  }
  mem_free(context_of(a), host);
  if (status != OSCAR_OK) return status;
  entry->tables.pages = pages;
  entry->tables.angles = entry->angles.memory;
  entry->tables.fast_angles = (const float *)(const void *)((uint8_t *)entry->angles.memory + angles);
  return OSCAR_OK;
}

/* ---- creation ---- */

static struct decode_side side_of(const oscar_codec *codec) {
  return (struct decode_side){
      .crumbs = codec->crumbs, .groups = codec->spec.groups, .form = (int)codec->spec.form, .rows = codec->map_rows};
}

static oscar_status describe_layers(struct device_attention *a) {
  const struct cache_geometry *g = a->geometry;
  oscar_status status = OSCAR_OK;
  for (int layer = 0; layer < g->layers && status == OSCAR_OK; layer++) {
    const struct layer_memory memory = cache_layer_memory(a->cache, layer);
    struct decode_layer *l = &a->layers[layer];
    *l = (struct decode_layer){.memory = memory.memory, .unit_bytes = memory.unit_bytes};
    a->rope_of_layer[layer] = -1;
    if (g->codecs) {
      const oscar_codec *keys = codec_of(a, layer, 0, OSCAR_KEYS);
      l->head_bytes = (int)memory.head_bytes;
      l->value_offset = (int)memory.side_bytes[0];
      l->keys = side_of(keys);
      l->values = side_of(codec_of(a, layer, 0, OSCAR_VALUES));
      l->rotating_pairs = keys->spec.rotating_pairs;
      if (l->rotating_pairs > 0 && find_rope(a, keys->spec.rope) < 0) status = make_rope(a, keys->spec.rope);
      if (l->rotating_pairs > 0) a->rope_of_layer[layer] = find_rope(a, keys->spec.rope);
    }
    if (a->rope_of_layer[layer] >= 0) l->rope = &a->ropes[a->rope_of_layer[layer]].tables;
    const struct decode_shape shape = {.kv_heads = g->kv_heads, .group = a->group, .head_dim = g->head_dim, .scale = a->scale};
    int rows = DECODE_ROWS;
    if (status == OSCAR_OK) status = decode_check(a->cuda, &shape, l, &rows);
    if (rows < a->most_rows) a->most_rows = rows;
  }
  return status;
}

oscar_status device_attention_create(oscar_cache *cache, int query_heads, float scale, struct device_attention **attention) {
  const struct cache_geometry *g = cache_geometry_of(cache);
  *attention = NULL;
  struct device_attention *a = mem_zalloc(g->context, 1, sizeof *a);
  if (!a) return OSCAR_NO_MEMORY;
  a->cuda = g->cuda;
  a->cache = cache;
  a->geometry = g;
  a->group = query_heads / g->kv_heads;
  a->scale = scale;
  a->most_rows = DECODE_ROWS;
  a->layers = mem_zalloc(g->context, (size_t)g->layers, sizeof *a->layers);
  a->rope_of_layer = a->layers ? mem_zalloc(g->context, (size_t)g->layers, sizeof *a->rope_of_layer) : NULL;
  a->ropes = a->rope_of_layer ? mem_zalloc(g->context, (size_t)g->layers, sizeof *a->ropes) : NULL;
  oscar_status status = a->ropes ? describe_layers(a) : OSCAR_NO_MEMORY;
  if (status == OSCAR_OK && g->codecs) status = upload_maps(a);
  if (status != OSCAR_OK) {
    device_attention_free(a);
    return status;
  }
  *attention = a;
  return OSCAR_OK;
}

void device_attention_free(struct device_attention *a) {
  if (!a) return;
  struct space *const spaces[] = {&a->maps, &a->prepared, &a->parts, &a->rotated};
  for (size_t i = 0; i < ARRAY_LENGTH(spaces); i++) space_free(a, spaces[i]);
  for (int i = 0; a->ropes && i < a->rope_count; i++) {
    space_free(a, &a->ropes[i].fixed);
    space_free(a, &a->ropes[i].angles);
  }
  mem_free(context_of(a), a->host_plan);
  for (int i = 0; i < STEP_WINDOWS; i++) {
    space_free(a, &a->plans[i].space);
    mem_free(context_of(a), a->plans[i].jobs);
  }
  mem_free(context_of(a), a->step_jobs);
  mem_free(context_of(a), a->ropes);
  mem_free(context_of(a), a->rope_of_layer);
  mem_free(context_of(a), a->layers);
  mem_free(context_of(a), a);
}

/* ---- plans ---- */

static bool plan_is_current(const struct device_attention *a, const struct kept_plan *kept, int window,
                            const oscar_attention_job *jobs, int n_jobs) {
  if (!kept->valid || kept->changes != cache_changes(a->cache) || kept->window != window || kept->n_jobs != n_jobs) return false;
  for (int i = 0; i < n_jobs; i++)
    if (kept->jobs[i].sequence != jobs[i].sequence || kept->jobs[i].n != jobs[i].n) return false;
  return true;
}

static oscar_status keep_jobs(struct device_attention *a, struct kept_plan *kept, const oscar_attention_job *jobs, int n_jobs) {
  if (n_jobs > kept->jobs_room) {
    oscar_attention_job *copy = mem_alloc(context_of(a), (size_t)n_jobs, sizeof *copy);
    if (!copy) return OSCAR_NO_MEMORY;
    mem_free(context_of(a), kept->jobs);
    kept->jobs = copy;
    kept->jobs_room = n_jobs;
  }
  memcpy(kept->jobs, jobs, (size_t)n_jobs * sizeof *jobs);
  kept->n_jobs = n_jobs;
  return OSCAR_OK;
}

static oscar_status reserve_host(struct device_attention *a, size_t bytes) {
  if (bytes <= a->host_plan_bytes) return OSCAR_OK;
  mem_free(context_of(a), a->host_plan);
  a->host_plan_bytes = 0;
  a->host_plan = mem_alloc(context_of(a), bytes + bytes / 2, 1);
  if (!a->host_plan) return OSCAR_NO_MEMORY;
  a->host_plan_bytes = bytes + bytes / 2;
  return OSCAR_OK;
}

/* In memory: total units, tiles, pages, at places that follow from how many tiles there may be. */
static oscar_status make_plan(struct device_attention *a, struct kept_plan *kept, int layer, int window,
                              const oscar_attention_job *jobs, int n_jobs) {
  const struct cache_geometry *g = a->geometry;
  kept->valid = false;
  kept->window = window;
  const struct plan_bounds bound = plan_bound(a->group, a->most_rows, layer, jobs, n_jobs);
  const size_t tiles_at = 256, pages_at = tiles_at + round_up(bound.tiles * sizeof(struct decode_tile), 256);
  const size_t bytes = pages_at + bound.pages * sizeof(struct decode_page);
  oscar_status status = reserve_host(a, bytes);
  if (status == OSCAR_OK) status = space_reserve(a, &kept->space, bytes);
  if (status != OSCAR_OK) return status;
  uint8_t *host = a->host_plan, *device = kept->space.memory;
  struct decode_page *pages = (struct decode_page *)(void *)(host + pages_at);
  const struct plan_result r =
      plan_fill(g, a->group, a->most_rows, layer, window, jobs, n_jobs, (struct decode_tile *)(void *)(host + tiles_at), pages);
  if (r.missing >= 0)
    return set_error(context_of(a), OSCAR_INVALID_ARGUMENT, "attention job %d: page %lld of layer %d holds nothing to read",
                     r.missing_job, (long long)r.missing, layer == EVERY_LAYER ? 0 : layer);
  if (r.units > INT32_MAX / 2 || (size_t)r.tiles * (size_t)g->kv_heads > INT32_MAX / 4)
    return set_error(context_of(a), OSCAR_INVALID_ARGUMENT, "attention: too many queries in one call");
  *(int32_t *)(void *)host = (int32_t)r.units;
  status = cuda_upload(a->cuda, device, host, pages_at + (size_t)r.pages * sizeof *pages);
  if (status == OSCAR_OK) status = keep_jobs(a, kept, jobs, n_jobs);
  if (status != OSCAR_OK) return status;
  kept->result = r;
  kept->plan = (struct decode_plan){.tiles = (const struct decode_tile *)(const void *)(device + tiles_at),
                                    .pages = (const struct decode_page *)(const void *)(device + pages_at),
                                    .total_units = (const int32_t *)(const void *)device,
                                    .tile_count = r.tiles,
                                    .rows = r.rows};
  kept->changes = cache_changes(a->cache);
  kept->valid = true;
  return OSCAR_OK;
}

/* The place of a window's plan: its own, else one that is free or the next in turn. */
static struct kept_plan *place_of(struct device_attention *a, int window) {
  for (int i = 0; i < STEP_WINDOWS; i++)
    if (a->plans[i].space.memory && a->plans[i].window == window) return &a->plans[i];
  struct kept_plan *next = &a->plans[a->next_plan];
  a->next_plan = (a->next_plan + 1) % STEP_WINDOWS;
  return next;
}

static oscar_status find_plan(struct device_attention *a, int layer, int window, const oscar_attention_job *jobs, int n_jobs,
                              struct kept_plan **kept) {
  *kept = place_of(a, window);
  return plan_is_current(a, *kept, window, jobs, n_jobs) ? OSCAR_OK : make_plan(a, *kept, layer, window, jobs, n_jobs);
}

/* ---- running ---- */

static struct decode_shape shape_of(const struct device_attention *a, int window) {
  return (struct decode_shape){.kv_heads = a->geometry->kv_heads,
                               .group = a->group,
                               .head_dim = a->geometry->head_dim,
                               .scale = a->scale,
                               .window = window};
}

static struct decode_space space_of(const struct device_attention *a) {
  return (struct decode_space){a->prepared.memory, a->parts.memory};
}

static oscar_status reserve_space(struct device_attention *a, int layer, const struct plan_result *plan, bool coded) {
  const struct decode_shape shape = shape_of(a, 0);
  const size_t items = (size_t)plan->tiles * (size_t)shape.kv_heads;
  oscar_status status = OSCAR_OK;
  if (coded) status = space_reserve(a, &a->prepared, items * decode_prepared_bytes(&a->layers[layer]));
  if (status != OSCAR_OK) return status;
  return space_reserve(a, &a->parts,
                       (2 * items + (size_t)decode_most_blocks(a->cuda)) * decode_part_bytes(&shape, &a->layers[layer]));
}

oscar_status device_attention_run(struct device_attention *a, int layer, int window, const oscar_attention_job *jobs,
                                  int n_jobs) {
  struct kept_plan *kept;
  oscar_status status = find_plan(a, layer, window, jobs, n_jobs, &kept);
  if (status != OSCAR_OK) return status;
  const struct decode_shape shape = shape_of(a, window);
  const struct decode_layer *l = &a->layers[layer];
  const bool coded = kept->result.coded && a->geometry->codecs;
  status = reserve_space(a, layer, &kept->result, coded);
  if (status == OSCAR_OK && l->rope) status = extend_angles(a, &a->ropes[a->rope_of_layer[layer]], kept->result.last_page);
  const struct decode_space space = space_of(a);
  if (status == OSCAR_OK && coded) status = decode_prepare(a->cuda, &shape, l, &kept->plan, jobs[0].q, &space);
  if (status == OSCAR_OK) status = decode_run(a->cuda, &shape, l, &kept->plan, jobs[0].q, &space);
  if (status == OSCAR_OK) status = decode_merge(a->cuda, &shape, l, &kept->plan, &space, jobs[0].out);
  return status;
}

/* ---- steps ---- */

static oscar_status list_jobs(struct device_attention *a, oscar_sequence *const *sequences, int count) {
  if (count > a->step_jobs_room) {
    mem_free(context_of(a), a->step_jobs);
    a->step_jobs_room = 0;
    a->step_jobs = mem_alloc(context_of(a), (size_t)count, sizeof *a->step_jobs);
    if (!a->step_jobs) return OSCAR_NO_MEMORY;
    a->step_jobs_room = count;
  }
  for (int i = 0; i < count; i++) a->step_jobs[i] = (oscar_attention_job){.sequence = sequences[i], .n = 1};
  return OSCAR_OK;
}

oscar_status device_attention_make_ready(struct device_attention *a, const int *windows, int n_windows,
                                         oscar_sequence *const *sequences, int count) {
  const struct cache_geometry *g = a->geometry;
  oscar_status status = list_jobs(a, sequences, count);
  if (status == OSCAR_OK)
    status =
        space_reserve(a, &a->rotated, (size_t)count * (size_t)(g->kv_heads * a->group) * (size_t)g->head_dim * sizeof(float));
  for (int i = 0; i < n_windows && status == OSCAR_OK; i++) {
    struct kept_plan *kept;
    status = find_plan(a, EVERY_LAYER, windows[i], a->step_jobs, count, &kept);
    for (int layer = 0; layer < g->layers && status == OSCAR_OK; layer++)
      status = reserve_space(a, layer, &kept->result, g->codecs != NULL);
    for (int rope = 0; rope < a->rope_count && status == OSCAR_OK; rope++)
      status = extend_angles(a, &a->ropes[rope], kept->result.last_page);
  }
  return status;
}

oscar_status device_attention_step(struct device_attention *a, int layer, int window, const struct decode_rows *rows,
                                   float *out) {
  const struct decode_shape shape = shape_of(a, window);
  const struct decode_layer *l = &a->layers[layer];
  const struct kept_plan *kept = place_of(a, window);
  if (!kept->valid || kept->changes != cache_changes(a->cache))
    return set_error(context_of(a), OSCAR_INVALID_ARGUMENT, "attention with window %d was not made ready for this step", window);
  struct decode_rows entered = *rows;
  entered.rotated = a->rotated.memory;
  const struct decode_space space = space_of(a);
  oscar_status status = decode_enter(a->cuda, &shape, l, &kept->plan, &entered, &space);
  if (status == OSCAR_OK) status = decode_run(a->cuda, &shape, l, &kept->plan, entered.rotated, &space);
  if (status == OSCAR_OK) status = decode_merge(a->cuda, &shape, l, &kept->plan, &space, out);
  return status;
}
