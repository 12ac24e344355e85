/*
 * cache.c - a cache: its memory, its budget, and where page ids become bytes.
 *
 * Memory is one allocation, cut by layer, and within a layer by unit; a page has the same index in every layer. It is never
 * cleared, so that the process grows with use and not with the budget. Every page a sequence gets comes from cache_take_*, after
 * one question to cache_has_room, which is pure counting (arena.c says why that is enough).
 */
#include "cache/cuda/store.h"
#include "cache/snapshot_format.h"
#include "cuda/device.h"

#include <string.h>

static size_t arena_room(const oscar_cache *c) { return c->budget_bytes - c->plan.fixed_bytes; }

bool cache_has_room(const oscar_cache *c, int64_t units, size_t bytes) {
  if (units > c->arena.units - c->arena.used_units) return false;
  size_t held = held_bytes(c), wanted = (size_t)units * c->plan.unit_cost;
  return bytes <= arena_room(c) && wanted + held <= arena_room(c) - bytes;
}

oscar_status cache_full(oscar_cache *c, const char *what, int64_t units, size_t bytes) {
  size_t wanted;
  if (__builtin_mul_overflow((size_t)units, c->plan.unit_cost, &wanted) || __builtin_add_overflow(wanted, bytes, &wanted))
    wanted = SIZE_MAX;
  const size_t room = arena_room(c) - held_bytes(c);
  c->shortfall = wanted > room ? wanted - room : 1;
  return set_error(c->geometry.context, OSCAR_NO_SPACE, "the cache is full: %s needs %zu bytes, %zu of its %zu are free", what,
                   wanted, room, c->budget_bytes);
}

int64_t cache_free_units(const oscar_cache *c) {
  size_t affordable = (arena_room(c) - held_bytes(c)) / c->plan.unit_cost;
  return min64((int64_t)affordable, c->arena.units - c->arena.used_units);
}

void cache_note_peak(oscar_cache *c) {
  if (held_bytes(c) > c->peak_held_bytes) c->peak_held_bytes = held_bytes(c);
}

int32_t cache_take_coded(oscar_cache *c) { return arena_take_coded(&c->arena); }

static void copy_coded(void *user, int32_t from, int32_t to) {
  const oscar_cache *c = user;
  if (c->store) {
    device_store_copy(c, from, to, false);
    return;
  }
  for (int layer = 0; layer < c->geometry.layers; layer++)
    memcpy(page_memory(c, layer, to), page_memory(c, layer, from), c->layers[layer].unit_bytes);
}

static void compact(oscar_cache *c) {
  c->changes++;
  int32_t block = arena_evacuate_begin(&c->arena, copy_coded, c);
  for (oscar_sequence *s = c->sequences; s; s = s->next)
    for (int64_t p = 0; p < s->pages; p++) s->table[p].coded = arena_forwarded(&c->arena, block, s->table[p].coded);
  if (c->prefix) prefix_follow_compaction(c->prefix, block);
  arena_evacuate_end(&c->arena, block);
}

int32_t cache_take_exact(oscar_cache *c) {
  if (!arena_has_free_block(&c->arena)) compact(c);
  return arena_take_exact(&c->arena);
}

void cache_copy_exact(oscar_cache *c, int32_t from, int32_t to) {
  if (c->store) {
    device_store_copy(c, from, to, true);
    return;
  }
  for (int layer = 0; layer < c->geometry.layers; layer++)
    memcpy(page_memory(c, layer, to), page_memory(c, layer, from), page_layer_bytes(c, layer, false));
}

/* Bookkeeping arrays and page memory for as many units as the budget buys. */
static oscar_status allocate(oscar_cache *c) {
  oscar_context *context = c->geometry.context;
  struct arena *a = &c->arena;
  size_t units = arena_room(c) / c->plan.unit_cost;
  a->units = units < INT32_MAX ? (int32_t)units : INT32_MAX;
  a->run = c->plan.run;
  a->unit = mem_alloc(context, (size_t)a->units, sizeof *a->unit);
  if (!a->unit) return OSCAR_NO_MEMORY;
  a->block = mem_alloc(context, (size_t)(a->units / a->run) + 1, sizeof *a->block);
  if (!a->block) return OSCAR_NO_MEMORY;
  a->by_fill = mem_alloc(context, (size_t)a->run, sizeof *a->by_fill);
  if (!a->by_fill) return OSCAR_NO_MEMORY;
  arena_init(a);
  if (c->geometry.cuda) return device_store_create(c);
  c->scratch = mem_alloc(context, (size_t)c->plan.threads, c->plan.scratch_bytes);
  if (!c->scratch) return OSCAR_NO_MEMORY;
  c->memory = mem_alloc(context, (size_t)a->units, c->plan.page_bytes);
  if (c->memory) mem_advise_large_pages(c->memory, (size_t)a->units * c->plan.page_bytes);
  return c->memory ? OSCAR_OK : OSCAR_NO_MEMORY;
}

static void cut_into_layers(oscar_cache *c, const oscar_cache_options *options) {
  uint8_t *memory = c->memory;
  for (int layer = 0; layer < options->layers; layer++) {
    struct layer_part *part = &c->layers[layer];
    *part = (struct layer_part){.memory = memory};
    part->unit_bytes = plan_layer_bytes(options, layer, part->form);
    for (int side = 0; side < 2; side++)
      part->side_bytes[side] = options->codecs ? side_bytes(&part->form[side]) : exact_head_bytes(&c->geometry) / 2;
    part->head_bytes = part->side_bytes[0] + part->side_bytes[1];
    memory += (size_t)c->arena.units * part->unit_bytes;
  }
}

static oscar_status check_cuda(oscar_context *context, const oscar_cache_options *options) {
  if (options->cuda->context != context)
    return set_error(context, OSCAR_INVALID_ARGUMENT, "the handle of the GPU belongs to another context");
  if (options->filter) return set_error(context, OSCAR_INVALID_ARGUMENT, "a cache on a GPU cannot have a page filter");
  return OSCAR_OK;
}

oscar_status oscar_cache_create(oscar_context *context, const oscar_cache_options *options, oscar_cache **cache) {
  *cache = NULL;
  struct cache_plan plan;
  oscar_status status = plan_make(context, options, &plan);
  if (status == OSCAR_OK && options->cuda) status = check_cuda(context, options);
  if (status != OSCAR_OK) return prefix_error(context, status, "cache");
  size_t least = oscar_cache_bytes_for(options, 1, 1, 1);
  if (options->budget_bytes < least)
    return set_error(context, OSCAR_NO_SPACE, "a budget of %zu bytes is too small for one page; the least that would do is %zu",
                     options->budget_bytes, least);

  oscar_cache *c = mem_zalloc(context, 1, sizeof *c + (size_t)options->layers * sizeof c->layers[0]);
  if (!c) return OSCAR_NO_MEMORY;
  c->geometry = (struct cache_geometry){.context = context,
                                        .layers = options->layers,
                                        .kv_heads = options->kv_heads,
                                        .head_dim = options->head_dim,
                                        .sink_pages = options->sink_pages,
                                        .recent_pages = options->recent_pages,
                                        .codecs = options->codecs,
                                        .filter = options->filter,
                                        .cuda = options->cuda};
  c->plan = plan;
  c->budget_bytes = options->budget_bytes;
  status = allocate(c);
  if (status != OSCAR_OK) {
    oscar_cache_free(c);
    return status;
  }
  cut_into_layers(c, options);
  if (c->store && (status = device_store_layers(c)) != OSCAR_OK) {
    oscar_cache_free(c);
    return status;
  }
  if (options->codecs) snapshot_codecs_fingerprint(options->codecs, c->codecs);
  debug_check(c);
  *cache = c;
  return OSCAR_OK;
}

void oscar_cache_free(oscar_cache *c) {
  if (!c) return;
  oscar_context *context = c->geometry.context;
  oscar_prefix_free(c->prefix);
  while (c->sequences) oscar_sequence_free(c->sequences);
  if (c->geometry.cuda)
    device_store_free(c);
  else
    mem_free(context, c->memory);
  mem_free(context, c->scratch);
  mem_free(context, c->arena.by_fill);
  mem_free(context, c->arena.block);
  mem_free(context, c->arena.unit);
  mem_free(context, c);
}

void oscar_cache_usage_get(const oscar_cache *c, oscar_cache_usage *usage) {
  const struct cache_geometry *g = &c->geometry;
  double elements = 2.0 * PAGE_TOKENS * g->layers * g->kv_heads * g->head_dim;
  *usage = (oscar_cache_usage){.budget_bytes = c->budget_bytes,
                               .held_bytes = held_bytes(c),
                               .peak_held_bytes = c->peak_held_bytes,
                               .exact_pages = c->arena.exact_pages,
                               .coded_pages = c->arena.coded_pages,
                               .free_units = cache_free_units(c),
                               .demoted_pages = c->demoted_pages,
                               .coded_bits_per_element =
                                   g->filter ? g->filter->bits_per_element : 8.0 * (double)c->plan.page_bytes / elements};
}

size_t oscar_cache_shortfall(const oscar_cache *c) { return c->shortfall; }

const struct cache_geometry *cache_geometry_of(const oscar_cache *cache) { return &cache->geometry; }
uint64_t cache_changes(const oscar_cache *cache) { return cache->changes; }

struct layer_memory cache_layer_memory(const oscar_cache *cache, int layer) {
  const struct layer_part *part = &cache->layers[layer];
  return (struct layer_memory){.memory = part->memory,
                               .unit_bytes = part->unit_bytes,
                               .head_bytes = part->head_bytes,
                               .side_bytes = {part->side_bytes[0], part->side_bytes[1]},
                               .form = {part->form[0], part->form[1]}};
}
