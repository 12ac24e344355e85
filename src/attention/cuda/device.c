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

/* What the current plan was made for; its jobs are kept beside it. */
struct plan_key {
  uint64_t changes;
  int window, n_jobs;
  bool valid;
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
  struct space plan, prepared, parts;
  void *host_plan; /* where it is made */
  size_t host_plan_bytes;
  struct plan_key key;
  oscar_attention_job *key_jobs;
  int key_jobs_room;
  struct decode_plan current;
  struct plan_result result;
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
  struct space *const spaces[] = {&a->maps, &a->plan, &a->prepared, &a->parts};
  for (size_t i = 0; i < ARRAY_LENGTH(spaces); i++) space_free(a, spaces[i]);
  for (int i = 0; a->ropes && i < a->rope_count; i++) {
    space_free(a, &a->ropes[i].fixed);
    space_free(a, &a->ropes[i].angles);
  }
  mem_free(context_of(a), a->host_plan);
  mem_free(context_of(a), a->key_jobs);
  mem_free(context_of(a), a->ropes);
  mem_free(context_of(a), a->rope_of_layer);
  mem_free(context_of(a), a->layers);
  mem_free(context_of(a), a);
}

/* ---- plans ---- */

static bool plan_is_current(const struct device_attention *a, int window, const oscar_attention_job *jobs, int n_jobs) {
  const struct plan_key *key = &a->key;
  if (!key->valid || key->changes != cache_changes(a->cache) || key->window != window || key->n_jobs != n_jobs) return false;
  for (int i = 0; i < n_jobs; i++)
    if (a->key_jobs[i].sequence != jobs[i].sequence || a->key_jobs[i].n != jobs[i].n) return false;
  return true;
}

static oscar_status keep_key(struct device_attention *a, int window, const oscar_attention_job *jobs, int n_jobs) {
  if (n_jobs > a->key_jobs_room) {
    oscar_attention_job *copy = mem_alloc(context_of(a), (size_t)n_jobs, sizeof *copy);
    if (!copy) return OSCAR_NO_MEMORY;
    mem_free(context_of(a), a->key_jobs);
    a->key_jobs = copy;
    a->key_jobs_room = n_jobs;
  }
  memcpy(a->key_jobs, jobs, (size_t)n_jobs * sizeof *jobs);
  a->key = (struct plan_key){.changes = cache_changes(a->cache), .window = window, .n_jobs = n_jobs, .valid = true};
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

static oscar_status make_plan(struct device_attention *a, int layer, int window, const oscar_attention_job *jobs, int n_jobs) {
  const struct cache_geometry *g = a->geometry;
  a->key.valid = false;
  const struct plan_bounds bound = plan_bound(a->group, a->most_rows, layer, jobs, n_jobs);
  const size_t tile_bytes = round_up(bound.tiles * sizeof(struct decode_tile), 256);
  const size_t bytes = tile_bytes + bound.pages * sizeof(struct decode_page);
  oscar_status status = reserve_host(a, bytes);
  if (status == OSCAR_OK) status = space_reserve(a, &a->plan, bytes);
  if (status != OSCAR_OK) return status;
  struct decode_tile *tiles = a->host_plan;
  struct decode_page *pages = (struct decode_page *)(void *)((uint8_t *)a->host_plan + tile_bytes);
  const struct plan_result r = plan_fill(g, a->group, a->most_rows, layer, window, jobs, n_jobs, tiles, pages);
  if (r.missing >= 0)
    return set_error(context_of(a), OSCAR_INVALID_ARGUMENT, "attention job %d: page %lld of layer %d holds nothing to read",
                     r.missing_job, (long long)r.missing, layer);
  if (r.units > INT32_MAX / 2 || (size_t)r.tiles * (size_t)g->kv_heads > INT32_MAX / 4)
    return set_error(context_of(a), OSCAR_INVALID_ARGUMENT, "attention: too many queries in one call");
  uint8_t *memory = a->plan.memory;
  status = cuda_upload(a->cuda, memory, a->host_plan, tile_bytes + (size_t)r.pages * sizeof *pages);
  if (status != OSCAR_OK) return status;
  a->result = r;
  a->current = (struct decode_plan){.tiles = (const struct decode_tile *)(const void *)memory,
                                    .pages = (const struct decode_page *)(const void *)(memory + tile_bytes),
                                    .tile_count = r.tiles,
                                    .rows = r.rows,
                                    .total_units = (int)r.units,
                                    .coded = r.coded};
  return keep_key(a, window, jobs, n_jobs);
}

static oscar_status reserve_space(struct device_attention *a, const struct decode_shape *shape, const struct decode_layer *layer,
                                  struct decode_space *space) {
  const size_t items = (size_t)a->result.tiles * (size_t)shape->kv_heads;
  oscar_status status = OSCAR_OK;
  if (a->result.coded) status = space_reserve(a, &a->prepared, items * decode_prepared_bytes(layer));
  if (status == OSCAR_OK)
    status = space_reserve(a, &a->parts, (2 * items + (size_t)decode_most_blocks(a->cuda)) * decode_part_bytes(shape, layer));
  *space = (struct decode_space){a->prepared.memory, a->parts.memory};
  return status;
}

oscar_status device_attention_run(struct device_attention *a, int layer, int window, const oscar_attention_job *jobs,
                                  int n_jobs) {
  const struct cache_geometry *g = a->geometry;
  oscar_status status = plan_is_current(a, window, jobs, n_jobs) ? OSCAR_OK : make_plan(a, layer, window, jobs, n_jobs);
  if (status != OSCAR_OK) return status;
  const struct decode_shape shape = {
      .kv_heads = g->kv_heads, .group = a->group, .head_dim = g->head_dim, .scale = a->scale, .window = window};
  const struct decode_layer *l = &a->layers[layer];
  struct decode_space space;
  status = reserve_space(a, &shape, l, &space);
  if (status == OSCAR_OK && l->rope) status = extend_angles(a, &a->ropes[a->rope_of_layer[layer]], a->result.last_page);
  if (status == OSCAR_OK && a->result.coded) status = decode_prepare(a->cuda, &shape, l, &a->current, jobs[0].q, &space);
  if (status == OSCAR_OK) status = decode_run(a->cuda, &shape, l, &a->current, jobs[0].q, &space);
  if (status == OSCAR_OK) status = decode_merge(a->cuda, &shape, l, &a->current, &space, jobs[0].out);
  return status;
}
