/*
 * device.c - attention over a cache on a GPU: maps, tables and work space in its memory, plans, launches (device.h).
 *
 * A plan depends on page tables, jobs and window alone, not on the layer, so one upload serves all layers of a step.
 */
#include "attention/cuda/device.h"

#include "attention/cuda/decode/line.h"
#include "attention/cuda/decode/rope_tables.h"
#include "attention/cuda/decode/value_map.h"
#include "attention/cuda/plan.h"
#include "attention/cuda/prefill.h"

#include <string.h>

#define FIRST_PAGES 512 /* of a table of angles; it doubles */

/* On an H100, prefill_run takes as long for a tile of its own as decode_run for two to three of the largest that it has for a
 * layer (docs/performance.md), whatever the length of the sequence. */
#define PREFILL_PAYS 3

/* Device memory that only grows; contents are not kept. */
struct space {
  void *memory;
  size_t bytes;
};

struct rope_entry {
  const oscar_rope *rope;
  struct rope_table_sizes sizes;
  struct decode_rope tables;
  struct space fixed, angles; /* series and curves; angles, twice */
  struct space tokens, waves; /* of prefill.h: angles from the centre of a page to its tokens, and what is made with them */
  int64_t wave_pages;
};

/* Tiles of the jobs that one kind of kernel reads for, on the host and on the device. */
struct planned {
  struct plan_job *jobs;
  int n_jobs;
  struct space memory;
  void *host; /* where it is made */
  size_t host_bytes;
  struct plan_result result;
};

/* A plan and what it was made for. One for each window that layers have. */
struct kept_plan {
  int window;
  bool used, valid;
  uint64_t changes; /* of the cache */
  oscar_attention_job *jobs;
  int n_jobs, jobs_room;    /* room of `jobs` and of both kinds' */
  struct planned few, many; /* rows: of decode_run and of prefill_run */
  struct decode_plan few_plan;
  struct prefill_plan many_plan;
};

struct device_attention {
  struct oscar_cuda *cuda;
  oscar_cache *cache;
  const struct cache_geometry *geometry;
  int group;
  int most_rows[2]; /* of a tile, that the kernels of all layers take: without a window, with one */
  float scale;
  struct decode_layer *layers; /* [layers] */
  int *rope_of_layer;          /* [layers] index of its rope; -1: none */
  struct rope_entry *ropes;
  int rope_count;
  struct space maps; /* all maps, and how means turn */
  struct space prepared, parts, rotated;
  bool has_prefill;               /* for the forms of all layers */
  struct prefill_tables *prefill; /* [layers]; NULL without codes */
  struct space prefill_maps, prefill_parts;
  enum attention_way way;
  struct kept_plan plans[STEP_WINDOWS];
  int next_plan;
  oscar_attention_job *step_jobs; /* of device_attention_make_ready */
  int step_jobs_room;
};

static oscar_context *context_of(const struct device_attention *a) { return a->geometry->context; }

static struct decode_shape shape_of(const struct device_attention *a, int window) {
  return (struct decode_shape){.kv_heads = a->geometry->kv_heads,
                               .group = a->group,
                               .head_dim = a->geometry->head_dim,
                               .scale = a->scale,
                               .window = window};
}

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
  size_t keys, values, waves, pairs, curves;
};
static size_t map_bytes(const struct map_sizes *s) { return s->keys + s->values + s->waves + s->pairs + s->curves; }

static const oscar_codec *codec_of(const struct device_attention *a, int layer, int head, oscar_side side) {
  return oscar_codec_set_get(a->geometry->codecs, layer, head, side);
}

static int find_rope(const struct device_attention *a, const oscar_rope *rope) {
  for (int i = 0; i < a->rope_count; i++)
    if (rope_equal(a->ropes[i].rope, rope)) return i;
  return -1;
}

/* decode_layer.turning_pairs */
static int turning_pairs_of(const struct device_attention *a, int layer) {
  const int rope = a->rope_of_layer[layer];
  if (rope < 0) return 0;
  if (a->layers[layer].own_curves) return own_curves_pairs(&codec_of(a, layer, 0, OSCAR_KEYS)->spec);
  int pairs = a->ropes[rope].sizes.fast;
  for (int head = 0; head < a->geometry->kv_heads; head++) {
    const oscar_codec_spec *keys = &codec_of(a, layer, head, OSCAR_KEYS)->spec;
    const int last = keys->rotating_pair[keys->rotating_pairs - 1];
    if (last >= pairs) pairs = last + 1;
  }
  return (int)round_up((size_t)pairs, 8);
}

static struct map_sizes map_sizes_of(const struct device_attention *a, int layer) {
  const struct cache_geometry *g = a->geometry;
  const oscar_codec *keys = codec_of(a, layer, 0, OSCAR_KEYS), *values = codec_of(a, layer, 0, OSCAR_VALUES);
  const size_t heads = (size_t)g->kv_heads;
  struct map_sizes sizes = {.keys = heads * (size_t)g->head_dim * (size_t)keys->map_rows * sizeof(float),
                            .values = heads * (size_t)value_map_words(g->head_dim, values->crumbs) * sizeof(uint32_t)};
  sizes.waves = round_up(heads * (size_t)a->layers[layer].turning_pairs * sizeof(uint16_t), 256);
  if (a->layers[layer].own_curves) {
    sizes.pairs = sizes.waves;
    sizes.curves = heads * own_curves_bytes(&keys->spec);
  }
  return sizes;
}

/* The maps of one layer in the order of the device, one after the other. */
static void fill_maps(const struct device_attention *a, int layer, uint8_t *to) {
  const struct cache_geometry *g = a->geometry;
  const struct map_sizes sizes = map_sizes_of(a, layer);
  const int turning = a->layers[layer].turning_pairs;
  const bool own = a->layers[layer].own_curves;
  for (int head = 0; head < g->kv_heads; head++) {
    const oscar_codec *keys = codec_of(a, layer, head, OSCAR_KEYS), *values = codec_of(a, layer, head, OSCAR_VALUES);
    const size_t d = (size_t)g->head_dim, rows = (size_t)keys->map_rows;
    float *transposed = (float *)(void *)to + (size_t)head * d * rows;
    for (size_t row = 0; row < rows; row++)
      for (size_t i = 0; i < d; i++) transposed[i * rows + row] = keys->map[row * d + i];
    value_map_fill(values->map, g->head_dim, values->crumbs, values->spec.groups,
                   (uint32_t *)(void *)(to + sizes.keys) + head * value_map_words(g->head_dim, values->crumbs));
    uint16_t *waves = (uint16_t *)(void *)(to + sizes.keys + sizes.values) + head * turning;
    for (int pair = 0; pair < turning; pair++) waves[pair] = 0xFFFF;
    for (int k = 0; k < keys->spec.rotating_pairs; k++)
      waves[own ? k : keys->spec.rotating_pair[k]] = (uint16_t)(keys->crumbs + keys->spec.groups + 1 + k);
    uint8_t *pairs = to + sizes.keys + sizes.values + sizes.waves, *curves = pairs + sizes.pairs;
    if (own)
      own_curves_fill(&keys->spec, (uint16_t *)(void *)pairs + head * turning,
                      (uint32_t *)(void *)(curves + (size_t)head * own_curves_bytes(&keys->spec)));
  }
}

static oscar_status upload_maps(struct device_attention *a) {
  size_t total = 0, largest = 0;
  for (int layer = 0; layer < a->geometry->layers; layer++) {
    const struct map_sizes sizes = map_sizes_of(a, layer);
    const size_t bytes = map_bytes(&sizes);
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
    struct decode_layer *l = &a->layers[layer];
    fill_maps(a, layer, host);
    status = cuda_upload(a->cuda, to, host, map_bytes(&sizes));
    l->key_map = (const float *)(const void *)to, to += sizes.keys;
    l->value_map = (const uint32_t *)(const void *)to, to += sizes.values;
    l->wave_rows = (const uint16_t *)(const void *)to, to += sizes.waves;
    l->pairs = (const uint16_t *)(const void *)to, to += sizes.pairs;
    l->curves = to, to += sizes.curves;
  }
  mem_free(context_of(a), host);
  return status;
}

/* Codecs of a layer's heads, keys then values. Free with mem_free. */
static const oscar_codec **codecs_of(const struct device_attention *a, int layer) {
  const int heads = a->geometry->kv_heads;
  const oscar_codec **codecs = mem_alloc(context_of(a), 2 * (size_t)heads, sizeof *codecs);
  for (int i = 0; codecs && i < 2 * heads; i++) codecs[i] = codec_of(a, layer, i % heads, i < heads ? OSCAR_KEYS : OSCAR_VALUES);
  return codecs;
}

static oscar_status upload_prefill(struct device_attention *a, int layer, uint8_t *to, const oscar_codec *const *codecs,
                                   const struct prefill_table_sizes *sizes) {
  const int heads = a->geometry->kv_heads;
  uint8_t *host = mem_alloc(context_of(a), prefill_table_bytes(sizes), 1);
  if (!host) return OSCAR_NO_MEMORY;
  const int rope = a->rope_of_layer[layer];
  prefill_tables_fill(heads, codecs, codecs + heads, rope < 0 ? 0 : prefill_wave_pairs(a->ropes[rope].sizes.pairs), host);
  oscar_status status = cuda_upload(a->cuda, to, host, prefill_table_bytes(sizes));
  mem_free(context_of(a), host);
  a->prefill[layer] = prefill_tables_at(sizes, to);
  return status;
}

/* Tables of all layers, if all have kernels. */
static oscar_status make_prefill(struct device_attention *a) {
  const struct cache_geometry *g = a->geometry;
  const struct decode_shape shape = shape_of(a, 0);
  struct prefill_table_sizes *sizes = mem_zalloc(context_of(a), (size_t)g->layers, sizeof *sizes);
  oscar_status status = sizes ? OSCAR_OK : OSCAR_NO_MEMORY;
  size_t total = 0;
  a->has_prefill = sizes != NULL;
  for (int layer = 0; layer < g->layers && a->has_prefill; layer++) {
    if (g->codecs) {
      const oscar_codec **codecs = codecs_of(a, layer);
      if (!codecs) {
        status = OSCAR_NO_MEMORY;
        break;
      }
      sizes[layer] = prefill_table_sizes_of(g->kv_heads, codecs, codecs + g->kv_heads);
      mem_free(context_of(a), codecs);
      total += round_up(prefill_table_bytes(&sizes[layer]), 256);
    }
    a->has_prefill = prefill_serves(a->cuda, &shape, &a->layers[layer], &sizes[layer]);
  }
  if (status == OSCAR_OK && a->has_prefill && g->codecs) {
    a->prefill = mem_zalloc(context_of(a), (size_t)g->layers, sizeof *a->prefill);
    status = a->prefill ? cuda_alloc(a->cuda, total, &a->prefill_maps.memory) : OSCAR_NO_MEMORY;
    if (status == OSCAR_OK) a->prefill_maps.bytes = total;
    uint8_t *to = a->prefill_maps.memory;
    for (int layer = 0; layer < g->layers && status == OSCAR_OK; layer++) {
      const oscar_codec **codecs = codecs_of(a, layer);
      status = codecs ? upload_prefill(a, layer, to, codecs, &sizes[layer]) : OSCAR_NO_MEMORY;
      mem_free(context_of(a), codecs);
      to += round_up(prefill_table_bytes(&sizes[layer]), 256);
    }
  }
  mem_free(context_of(a), sizes);
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
                                       .steps = entry->sizes.steps,
                                       .series = entry->fixed.memory,
                                       .curve_words = (uint8_t *)entry->fixed.memory + entry->sizes.series};
  return OSCAR_OK;
}

/* Angles of pages 0 .. last. */
static oscar_status extend_angles(struct device_attention *a, struct rope_entry *entry, int64_t last) {
  if (last < entry->tables.pages) return OSCAR_OK;
  int64_t pages = entry->tables.pages ? entry->tables.pages : FIRST_PAGES;
  while (pages <= last) pages *= 2;
  const size_t angles = entry->sizes.angles * (size_t)pages, turns = entry->sizes.turns * (size_t)pages;
  uint8_t *host = mem_alloc(context_of(a), angles + turns, 1);
  if (!host) return OSCAR_NO_MEMORY;
  rope_angles_fill(entry->rope, &entry->sizes, 0, pages, (uint32_t *)(void *)host, (float *)(void *)(host + angles));
  oscar_status status = oscar_cuda_wait(a->cuda);
  if (status == OSCAR_OK) {
    space_free(a, &entry->angles);
    entry->tables.pages = 0;
    status = cuda_alloc(a->cuda, angles + turns, &entry->angles.memory);
  }
  if (status == OSCAR_OK) {
    entry->angles.bytes = angles + turns;
    status = cuda_upload(a->cuda, entry->angles.memory, host, angles + turns);
  }
  mem_free(context_of(a), host);
  if (status != OSCAR_OK) return status;
  entry->tables.pages = pages;
  entry->tables.angles = entry->angles.memory;
  entry->tables.turns = (const float *)(const void *)((uint8_t *)entry->angles.memory + angles);
  return OSCAR_OK;
}

/* Waves of pages 0 .. last. */
static oscar_status extend_waves(struct device_attention *a, struct rope_entry *entry, int64_t last) {
  if (last < entry->wave_pages) return OSCAR_OK;
  const size_t page_bytes = (size_t)prefill_wave_pairs(entry->sizes.pairs) * PREFILL_SHIFTS * PREFILL_WAVE_BYTES;
  oscar_status status = OSCAR_OK;
  if (!entry->tokens.memory) {
    const int turning = entry->rope->spec.rotary_dim / 2;
    const size_t bytes = (size_t)entry->sizes.pairs * 2 * PAGE_TOKENS * sizeof(float);
    float *host = mem_zalloc(context_of(a), bytes, 1);
    if (!host) return OSCAR_NO_MEMORY;
    memcpy(host, entry->rope->table, (size_t)turning * 2 * PAGE_TOKENS * sizeof(float));
    status = cuda_alloc(a->cuda, bytes, &entry->tokens.memory);
    if (status == OSCAR_OK) {
      entry->tokens.bytes = bytes;
      status = cuda_upload(a->cuda, entry->tokens.memory, host, bytes);
    }
    mem_free(context_of(a), host);
    if (status != OSCAR_OK) return status;
  }
  entry->wave_pages = 0;
  status = space_reserve(a, &entry->waves, (size_t)(last + 1) * page_bytes);
  if (status != OSCAR_OK) return status;
  int64_t pages = (int64_t)(entry->waves.bytes / page_bytes);
  if (pages > entry->tables.pages) pages = entry->tables.pages;
  status = prefill_make_waves(a->cuda, &entry->tables, entry->tokens.memory, 0, pages, entry->waves.memory);
  if (status == OSCAR_OK) entry->wave_pages = pages;
  return status;
}

/* ---- creation ---- */

static struct decode_side side_of(const oscar_codec *codec) {
  return (struct decode_side){.crumbs = codec->crumbs, .groups = codec->spec.groups, .form = (int)codec->spec.form};
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
      l->key_rows = keys->map_rows;
      l->values = side_of(codec_of(a, layer, 0, OSCAR_VALUES));
      l->rotating_pairs = keys->spec.rotating_pairs;
      if (l->rotating_pairs > 0 && find_rope(a, keys->spec.rope) < 0) status = make_rope(a, keys->spec.rope);
      if (l->rotating_pairs > 0) a->rope_of_layer[layer] = find_rope(a, keys->spec.rope);
    }
    if (a->rope_of_layer[layer] >= 0) {
      l->rope = &a->ropes[a->rope_of_layer[layer]].tables;
      l->own_curves = has_own_curves(&codec_of(a, layer, 0, OSCAR_KEYS)->spec);
      l->turning_pairs = turning_pairs_of(a, layer);
    }
    for (int windowed = 0; windowed < 2 && status == OSCAR_OK; windowed++) {
      const struct decode_shape shape = shape_of(a, windowed);
      int rows = DECODE_ROWS;
      status = decode_check(a->cuda, &shape, l, &rows);
      if (rows < a->most_rows[windowed]) a->most_rows[windowed] = rows;
    }
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
  a->most_rows[0] = a->most_rows[1] = DECODE_ROWS;
  a->layers = mem_zalloc(g->context, (size_t)g->layers, sizeof *a->layers);
  a->rope_of_layer = a->layers ? mem_zalloc(g->context, (size_t)g->layers, sizeof *a->rope_of_layer) : NULL;
  a->ropes = a->rope_of_layer ? mem_zalloc(g->context, (size_t)g->layers, sizeof *a->ropes) : NULL;
  oscar_status status = a->ropes ? describe_layers(a) : OSCAR_NO_MEMORY;
  if (status == OSCAR_OK && g->codecs) status = upload_maps(a);
  if (status == OSCAR_OK) status = make_prefill(a);
  if (status != OSCAR_OK) {
    device_attention_free(a);
    return status;
  }
  *attention = a;
  return OSCAR_OK;
}

static void free_plan(struct device_attention *a, struct kept_plan *kept) {
  struct planned *const kinds[] = {&kept->few, &kept->many};
  for (size_t i = 0; i < ARRAY_LENGTH(kinds); i++) {
    space_free(a, &kinds[i]->memory);
    mem_free(context_of(a), kinds[i]->host);
    mem_free(context_of(a), kinds[i]->jobs);
  }
  mem_free(context_of(a), kept->jobs);
}

void device_attention_free(struct device_attention *a) {
  if (!a) return;
  struct space *const spaces[] = {&a->maps, &a->prefill_maps, &a->prefill_parts, &a->prepared, &a->parts, &a->rotated};
  for (size_t i = 0; i < ARRAY_LENGTH(spaces); i++) space_free(a, spaces[i]);
  for (int i = 0; a->ropes && i < a->rope_count; i++) {
    space_free(a, &a->ropes[i].fixed);
    space_free(a, &a->ropes[i].angles);
    space_free(a, &a->ropes[i].tokens);
    space_free(a, &a->ropes[i].waves);
  }
  for (int i = 0; i < STEP_WINDOWS; i++) free_plan(a, &a->plans[i]);
  mem_free(context_of(a), a->step_jobs);
  mem_free(context_of(a), a->prefill);
  mem_free(context_of(a), a->ropes);
  mem_free(context_of(a), a->rope_of_layer);
  mem_free(context_of(a), a->layers);
  mem_free(context_of(a), a);
}

/* ---- plans ---- */

static bool plan_is_current(const struct device_attention *a, const struct kept_plan *kept, const oscar_attention_job *jobs,
                            int n_jobs) {
  if (!kept->valid || kept->changes != cache_changes(a->cache) || kept->n_jobs != n_jobs) return false;
  for (int i = 0; i < n_jobs; i++)
    if (kept->jobs[i].sequence != jobs[i].sequence || kept->jobs[i].n != jobs[i].n) return false;
  return true;
}

static oscar_status reserve_jobs(struct device_attention *a, struct kept_plan *kept, int n_jobs) {
  if (n_jobs <= kept->jobs_room) return OSCAR_OK;
  const size_t room = 2 * (size_t)n_jobs;
  oscar_attention_job *jobs = mem_alloc(context_of(a), room, sizeof *jobs);
  struct plan_job *few = mem_alloc(context_of(a), room, sizeof *few), *many = mem_alloc(context_of(a), room, sizeof *many);
  mem_free(context_of(a), kept->jobs);
  mem_free(context_of(a), kept->few.jobs);
  mem_free(context_of(a), kept->many.jobs);
  kept->jobs = jobs, kept->few.jobs = few, kept->many.jobs = many;
  kept->jobs_room = jobs && few && many ? (int)room : 0;
  return kept->jobs_room ? OSCAR_OK : OSCAR_NO_MEMORY;
}

/* Whether prefill_run is sooner done with a job. */
static bool prefill_pays(const struct device_attention *a, int n) {
  if (a->way != ATTENTION_BY_COST) return a->way == ATTENTION_PREFILL;
  const int64_t rows = (int64_t)n * a->group, of_decode = a->most_rows[0] > 8 ? a->most_rows[0] : 8;
  return PREFILL_PAYS * ((rows + PREFILL_ROWS - 1) / PREFILL_ROWS) <= (rows + of_decode - 1) / of_decode;
}

/* Which jobs are whose. */
static void divide_jobs(const struct device_attention *a, struct kept_plan *kept, const oscar_attention_job *jobs, int n_jobs) {
  kept->few.n_jobs = kept->many.n_jobs = 0;
  for (int i = 0, token = 0; i < n_jobs; token += jobs[i++].n) {
    struct planned *to = a->has_prefill && prefill_pays(a, jobs[i].n) ? &kept->many : &kept->few;
    to->jobs[to->n_jobs++] = (struct plan_job){jobs[i].sequence, jobs[i].n, token};
  }
}

static oscar_status reserve_host(struct device_attention *a, struct planned *p, size_t bytes) {
  if (bytes <= p->host_bytes) return OSCAR_OK;
  mem_free(context_of(a), p->host);
  p->host_bytes = 0;
  p->host = mem_alloc(context_of(a), bytes + bytes / 2, 1);
  if (!p->host) return OSCAR_NO_MEMORY;
  p->host_bytes = bytes + bytes / 2;
  return OSCAR_OK;
}

/* Memory for tiles (and what comes before them), and pages behind them; *pages: where they begin. */
static oscar_status reserve_plan(struct device_attention *a, struct planned *p, size_t tile_bytes, size_t pages,
                                 size_t *page_offset) {
  *page_offset = round_up(tile_bytes, 256);
  const size_t bytes = *page_offset + pages * sizeof(struct decode_page);
  const oscar_status status = reserve_host(a, p, bytes);
  return status == OSCAR_OK ? space_reserve(a, &p->memory, bytes) : status;
}

static oscar_status upload_plan(struct device_attention *a, struct planned *p, size_t tile_bytes, size_t page_offset) {
  const uint8_t *host = p->host;
  uint8_t *memory = p->memory.memory;
  const size_t page_bytes = (size_t)p->result.pages * sizeof(struct decode_page);
  /* one copy, unless much lies between */
  if (page_offset - tile_bytes < 4096) return cuda_upload(a->cuda, memory, host, page_offset + page_bytes);
  oscar_status status = cuda_upload(a->cuda, memory, host, tile_bytes);
  return status == OSCAR_OK ? cuda_upload(a->cuda, memory + page_offset, host + page_offset, page_bytes) : status;
}

static oscar_status too_many(struct device_attention *a) {
  return set_error(context_of(a), OSCAR_INVALID_ARGUMENT, "attention: too many queries in one call");
}

/* Lists the pages of the jobs' tiles, which go to `tiles`. */
static oscar_status fill_plan(struct device_attention *a, struct planned *p, int most_rows, int layer, int window,
                              struct decode_tile *tiles, struct decode_page *pages) {
  const struct plan_result r = plan_fill(a->geometry, a->group, most_rows, layer, window, p->jobs, p->n_jobs, tiles, pages);
  p->result = r;
  if (r.missing >= 0)
    return set_error(context_of(a), OSCAR_INVALID_ARGUMENT, "attention: page %lld of layer %d of a job holds nothing to read",
                     (long long)r.missing, layer == EVERY_LAYER ? 0 : layer);
  return (size_t)r.tiles * (size_t)a->geometry->kv_heads > INT32_MAX / 4 ? too_many(a) : OSCAR_OK;
}

/* In memory: the line, tiles, pages, at places that follow from how many tiles there may be. */
static oscar_status plan_few(struct device_attention *a, struct kept_plan *kept, int layer, int window) {
  struct planned *p = &kept->few;
  const size_t tiles_at = 256;
  const int blocks = decode_blocks(a->cuda);
  int most_rows = a->most_rows[window > 0];
  if (a->way == ATTENTION_DECODE)
    most_rows = most_rows < 8 ? most_rows : 8;
  else if (a->way != ATTENTION_DECODE_WIDE)
    most_rows = plan_rows(a->group, a->geometry->kv_heads, blocks, most_rows, layer, window, p->jobs, p->n_jobs);
  const struct plan_bounds bound = plan_bound(a->group, most_rows, layer, p->jobs, p->n_jobs);
  size_t page_offset;
  oscar_status status = reserve_plan(a, p, tiles_at + bound.tiles * sizeof(struct decode_tile), bound.pages, &page_offset);
  if (status != OSCAR_OK) return status;
  uint8_t *host = p->host, *memory = p->memory.memory;
  struct decode_tile *tiles = (struct decode_tile *)(void *)(host + tiles_at);
  status = fill_plan(a, p, most_rows, layer, window, tiles, (struct decode_page *)(void *)(host + page_offset));
  if (status != OSCAR_OK) return status;
  if (!line_lay(tiles, p->result.tiles, a->geometry->kv_heads, blocks, (struct decode_line *)(void *)host)) return too_many(a);
  kept->few_plan = (struct decode_plan){.tiles = (const struct decode_tile *)(const void *)(memory + tiles_at),
                                        .pages = (const struct decode_page *)(const void *)(memory + page_offset),
                                        .line = (const struct decode_line *)(const void *)memory,
                                        .tile_count = p->result.tiles,
                                        .rows = p->result.rows};
  return upload_plan(a, p, tiles_at + (size_t)p->result.tiles * sizeof(struct decode_tile), page_offset);
}

static oscar_status plan_many(struct device_attention *a, struct kept_plan *kept, int layer, int window) {
  struct planned *p = &kept->many;
  const int blocks = a->cuda->info.multiprocessors;
  const struct plan_bounds bound = plan_bound(a->group, PREFILL_ROWS, layer, p->jobs, p->n_jobs);
  /* Tiles are cut only where there are fewer than a few times the blocks. */
  const size_t most = bound.tiles + PREFILL_MOST_PARTS * 4 * (size_t)blocks;
  size_t page_offset;
  oscar_status status = reserve_plan(a, p, most * sizeof(struct prefill_tile), bound.pages, &page_offset);
  if (status != OSCAR_OK) return status;
  struct decode_tile *tiles = mem_alloc(context_of(a), bound.tiles, sizeof *tiles);
  if (!tiles) return OSCAR_NO_MEMORY;
  uint8_t *host = p->host, *memory = p->memory.memory;
  status = fill_plan(a, p, PREFILL_ROWS, layer, window, tiles, (struct decode_page *)(void *)(host + page_offset));
  int parts = 1;
  if (status == OSCAR_OK) {
    int64_t pages = 0;
    for (int i = 0; i < p->result.tiles; i++)
      if (tiles[i].coded_pages + tiles[i].exact_pages > pages) pages = tiles[i].coded_pages + tiles[i].exact_pages;
    if (p->result.tiles < 4 * blocks) parts = plan_parts(p->result.tiles, a->geometry->kv_heads, pages, blocks);
    plan_cut(p->result.tiles, parts, tiles, p->host);
    status = upload_plan(a, p, (size_t)(p->result.tiles * parts) * sizeof(struct prefill_tile), page_offset);
  }
  mem_free(context_of(a), tiles);
  kept->many_plan = (struct prefill_plan){.tiles = p->memory.memory,
                                          .pages = (const struct decode_page *)(const void *)(memory + page_offset),
                                          .tile_count = p->result.tiles * parts,
                                          .part_count = parts > 1 ? p->result.tiles * parts : 0};
  return status;
}

/* The place of a window's plan: its own, else one that is free or the next in turn. */
static struct kept_plan *place_of(struct device_attention *a, int window) {
  for (int i = 0; i < STEP_WINDOWS; i++)
    if (a->plans[i].used && a->plans[i].window == window) return &a->plans[i];
  struct kept_plan *next = &a->plans[a->next_plan];
  a->next_plan = (a->next_plan + 1) % STEP_WINDOWS;
  next->window = window;
  next->used = true;
  next->valid = false;
  return next;
}

/* The plan of the jobs, made if it is not there. */
static oscar_status find_plan(struct device_attention *a, int layer, int window, const oscar_attention_job *jobs, int n_jobs,
                              struct kept_plan **found) {
  struct kept_plan *kept = *found = place_of(a, window);
  if (plan_is_current(a, kept, jobs, n_jobs)) return OSCAR_OK;
  kept->valid = false;
  oscar_status status = reserve_jobs(a, kept, n_jobs);
  if (status != OSCAR_OK) return status;
  divide_jobs(a, kept, jobs, n_jobs);
  kept->few.result = kept->many.result = (struct plan_result){.last_page = -1};
  if (kept->few.n_jobs > 0) status = plan_few(a, kept, layer, window);
  if (status == OSCAR_OK && kept->many.n_jobs > 0) status = plan_many(a, kept, layer, window);
  if (status != OSCAR_OK) return status;
  memcpy(kept->jobs, jobs, (size_t)n_jobs * sizeof *jobs);
  kept->n_jobs = n_jobs;
  kept->changes = cache_changes(a->cache);
  kept->valid = true;
  return OSCAR_OK;
}

/* ---- running ---- */

static struct decode_space space_of(const struct device_attention *a) {
  return (struct decode_space){a->prepared.memory, a->parts.memory};
}

static oscar_status reserve_space(struct device_attention *a, int layer, const struct plan_result *plan, bool coded) {
  const struct decode_shape shape = shape_of(a, 0);
  const size_t items = (size_t)plan->tiles * (size_t)shape.kv_heads;
  oscar_status status = OSCAR_OK;
  if (coded) status = space_reserve(a, &a->prepared, items * decode_prepared_bytes(&a->layers[layer], plan->rows));
  const size_t before = a->parts.bytes;
  if (status == OSCAR_OK)
    status = space_reserve(a, &a->parts, (items + (size_t)decode_blocks(a->cuda)) * decode_part_bytes(&shape));
  if (status != OSCAR_OK || a->parts.bytes == before) return status;
  status = cuda_clear(a->cuda, a->parts.memory, a->parts.bytes);
  if (status != OSCAR_OK) space_free(a, &a->parts); /* what is not zero would be taken for sums */
  return status;
}

static oscar_status run_few(struct device_attention *a, int layer, const struct decode_shape *shape, const struct kept_plan *kept,
                            const float *q, float *out) {
  const struct decode_layer *l = &a->layers[layer];
  const bool coded = kept->few.result.coded && a->geometry->codecs;
  oscar_status status = reserve_space(a, layer, &kept->few.result, coded);
  const struct decode_space space = space_of(a);
  if (status == OSCAR_OK && coded) status = decode_prepare(a->cuda, shape, l, &kept->few_plan, q, &space);
  return status == OSCAR_OK ? decode_run(a->cuda, shape, l, &kept->few_plan, q, &space, out) : status;
}

static int64_t last_page_of(const struct kept_plan *kept) {
  return kept->few.result.last_page > kept->many.result.last_page ? kept->few.result.last_page : kept->many.result.last_page;
}

oscar_status device_attention_run(struct device_attention *a, int layer, int window, const oscar_attention_job *jobs,
                                  int n_jobs) {
  struct kept_plan *kept;
  oscar_status status = find_plan(a, layer, window, jobs, n_jobs, &kept);
  if (status != OSCAR_OK) return status;
  const struct decode_shape shape = shape_of(a, window);
  const struct decode_layer *l = &a->layers[layer];
  const struct planned *many = &kept->many;
  struct rope_entry *rope = l->rope ? &a->ropes[a->rope_of_layer[layer]] : NULL;
  if (rope) status = extend_angles(a, rope, last_page_of(kept));
  if (status == OSCAR_OK && rope && many->result.coded) status = extend_waves(a, rope, many->result.last_page);
  if (status == OSCAR_OK && kept->many_plan.part_count > 0 && many->n_jobs > 0)
    status = space_reserve(a, &a->prefill_parts, (size_t)kept->many_plan.part_count * prefill_part_bytes(&shape));
  if (status == OSCAR_OK && many->n_jobs > 0)
    status = prefill_run(a->cuda, &shape, l, a->prefill ? &a->prefill[layer] : NULL, &kept->many_plan,
                         rope ? rope->waves.memory : NULL, a->prefill_parts.memory, jobs[0].q, jobs[0].out);
  if (status == OSCAR_OK && kept->few.n_jobs > 0) status = run_few(a, layer, &shape, kept, jobs[0].q, jobs[0].out);
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
                                         oscar_sequence *const *sequences, int count, int *kernels) {
  const struct cache_geometry *g = a->geometry;
  *kernels = 0;
  oscar_status status = list_jobs(a, sequences, count);
  if (status == OSCAR_OK)
    status =
        space_reserve(a, &a->rotated, (size_t)count * (size_t)(g->kv_heads * a->group) * (size_t)g->head_dim * sizeof(float));
  for (int i = 0; i < n_windows && status == OSCAR_OK; i++) {
    struct kept_plan *kept;
    status = find_plan(a, EVERY_LAYER, windows[i], a->step_jobs, count, &kept);
    if (status == OSCAR_OK && kept->many.n_jobs > 0)
      status = set_error(context_of(a), OSCAR_INVALID_ARGUMENT, "attention of single tokens by the kernels for prompts");
    if (kept->few.result.rows > 8) *kernels |= 1 << i;
    for (int layer = 0; layer < g->layers && status == OSCAR_OK; layer++)
      status = reserve_space(a, layer, &kept->few.result, g->codecs != NULL);
    for (int rope = 0; rope < a->rope_count && status == OSCAR_OK; rope++)
      status = extend_angles(a, &a->ropes[rope], last_page_of(kept));
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
  oscar_status status = decode_enter(a->cuda, &shape, l, &kept->few_plan, &entered, &space);
  return status == OSCAR_OK ? decode_run(a->cuda, &shape, l, &kept->few_plan, entered.rotated, &space, out) : status;
}

void device_attention_choose(struct device_attention *a, enum attention_way way) {
  a->way = way;
  for (int i = 0; i < STEP_WINDOWS; i++) a->plans[i].valid = false;
}
