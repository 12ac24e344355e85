/* store.c - a cache's pages on a GPU (cache/cuda/store.h). */
#include "cache/cuda/store.h"

#include "cache/cuda/write.h"
#include "cuda/device.h"
#include "quant/cuda/encode.h"
#include "quant/device_form.h"

#include <string.h>

/* What the open steps of some sequences need on the device: where their tokens go and what they demote. The same in every layer,
 * so it is uploaded once; who writes sequences one by one finds the last few still there. Pages that were complete before the
 * step are demoted in all layers then, by one launch that fills the GPU; those that it completes, layer by layer when their last
 * rows have been written. */
#define KEPT_STEPS 64
struct step_data {
  void *device;
  size_t bytes;
  const oscar_sequence *first; /* of `count`; NULL: nothing */
  int count;
  uint64_t changes; /* of the cache when it was made */
  int tokens, demotions;
  size_t place_bytes; /* where demotions begin */
  bool demoted;       /* in all layers */
};

struct device_store {
  struct oscar_cuda *cuda;
  struct cuda_codecs *codecs; /* NULL: BF16 */
  struct cuda_layer *layers;  /* on the device */
  unsigned long long *bad;    /* on the host, where kernels write if something is wrong: [0] rows of writes, [1] of encoding */
  bool unchecked;             /* rows were written since `bad` was read */
  size_t memory_bytes;
  struct step_data steps[KEPT_STEPS];
  int step;
  struct step_data ready; /* of sequences_make_ready, whose memory stays where it is */
  void *listed;           /* on the host: what a step's data is written to before it is uploaded */
  size_t listed_bytes;
};

static struct oscar_cuda *cuda_of(const oscar_cache *c) { return c->geometry.cuda; }

size_t device_store_bytes(const oscar_cache_options *o) {
  return (size_t)o->layers * sizeof(struct cuda_layer) + (o->codecs ? cuda_codecs_bytes(o->codecs) : 0);
}

oscar_status device_store_create(oscar_cache *c) {
  struct device_store *s = mem_zalloc(c->geometry.context, 1, sizeof *s);
  if (!s) return OSCAR_NO_MEMORY;
  c->store = s;
  s->cuda = cuda_of(c);
  s->memory_bytes = (size_t)c->arena.units * c->plan.page_bytes;
  void *memory;
  oscar_status status = cuda_alloc(s->cuda, s->memory_bytes, &memory);
  c->memory = memory;
  if (status == OSCAR_OK) {
    status = cuda_alloc(s->cuda, (size_t)c->geometry.layers * sizeof *s->layers, &memory);
    s->layers = memory;
  }
  if (status == OSCAR_OK) {
    status = cuda_host_alloc(s->cuda, 2 * sizeof *s->bad, &memory);
    s->bad = memory;
  }
  if (status == OSCAR_OK) s->bad[0] = s->bad[1] = CUDA_BAD_NONE;
  if (status == OSCAR_OK && c->geometry.codecs) status = cuda_codecs_create(s->cuda, c->geometry.codecs, &s->codecs);
  return status;
}

oscar_status device_store_layers(oscar_cache *c) {
  struct device_store *s = c->store;
  const size_t bytes = (size_t)c->geometry.layers * sizeof *s->layers;
  struct cuda_layer *host = mem_zalloc(c->geometry.context, (size_t)c->geometry.layers, sizeof *host);
  if (!host) return OSCAR_NO_MEMORY;
  for (int i = 0; i < c->geometry.layers; i++) {
    const struct layer_part *part = &c->layers[i];
    host[i] = (struct cuda_layer){.memory = part->memory, .unit_bytes = part->unit_bytes, .head_bytes = part->head_bytes};
    for (int side = 0; side < 2; side++) {
      host[i].side_bytes[side] = part->side_bytes[side];
      host[i].form[side] = part->form[side];
    }
  }
  oscar_status status = cuda_upload(s->cuda, s->layers, host, bytes);
  if (status == OSCAR_OK) status = oscar_cuda_wait(s->cuda);
  mem_free(c->geometry.context, host);
  return status;
}

static void free_step(const oscar_cache *c, struct step_data *step) {
  cuda_release(cuda_of(c), step->device, step->bytes);
  *step = (struct step_data){0};
}

void device_store_free(oscar_cache *c) {
  struct device_store *s = c->store;
  if (!s) return;
  cuda_release(s->cuda, c->memory, s->memory_bytes);
  c->memory = NULL;
  cuda_release(s->cuda, s->layers, (size_t)c->geometry.layers * sizeof *s->layers);
  (void)oscar_cuda_wait(s->cuda); /* for who writes to it */
  cuda_host_release(s->bad);
  cuda_codecs_free(s->codecs);
  for (int i = 0; i < KEPT_STEPS; i++) free_step(c, &s->steps[i]);
  free_step(c, &s->ready);
  mem_free(c->geometry.context, s->listed);
  mem_free(c->geometry.context, s);
  c->store = NULL;
}

void device_store_copy(const oscar_cache *c, int32_t from, int32_t to, bool exact) {
  for (int layer = 0; layer < c->geometry.layers; layer++)
    (void)cuda_copy(cuda_of(c), page_memory(c, layer, to), page_memory(c, layer, from), page_layer_bytes(c, layer, !exact));
}

/* ---- writing ---- */

/* The list may be written again as soon as it was uploaded: uploads copy it first. */
static oscar_status reserve_list(const oscar_cache *c, size_t bytes) {
  struct device_store *s = c->store;
  if (bytes <= s->listed_bytes) return OSCAR_OK;
  mem_free(c->geometry.context, s->listed);
  s->listed_bytes = 0;
  s->listed = mem_alloc(c->geometry.context, 2 * bytes, 1);
  if (!s->listed) return OSCAR_NO_MEMORY;
  s->listed_bytes = 2 * bytes;
  return OSCAR_OK;
}

static oscar_status reserve_step(const oscar_cache *c, struct step_data *step, size_t bytes) {
  struct device_store *s = c->store;
  if (bytes <= step->bytes) return OSCAR_OK;
  oscar_status status = oscar_cuda_wait(s->cuda); /* the old memory may still be read */
  if (status != OSCAR_OK) return status;
  free_step(c, step);
  status = cuda_alloc(s->cuda, 2 * bytes, &step->device);
  if (status == OSCAR_OK) step->bytes = 2 * bytes;
  return status;
}

static void list_step(const oscar_sequence *s, struct step_data *step, struct write_place *places,
                      struct cuda_demotion *demotions) {
  for (int i = 0; i < s->step_tokens; i++) {
    const int64_t position = s->length + i;
    places[step->tokens++] = (struct write_place){s->table[position / PAGE_TOKENS].exact, (int32_t)(position % PAGE_TOKENS)};
  }
  for (int64_t page = s->demoted_first; page < s->demoted_end; page++) {
    const struct page_entry *entry = &s->table[page];
    if (entry_is_being_encoded(s->cache, entry))
      demotions[step->demotions++] = (struct cuda_demotion){.exact = entry->exact, .coded = entry->coded, .page = page};
  }
}

/* Whether every page that the steps demote was complete before them. */
static bool demotes_complete_pages(oscar_sequence *const *sequences, int count) {
  for (int i = 0; i < count; i++)
    if (sequences[i]->demoted_end > sequences[i]->demoted_first && sequences[i]->demoted_end * PAGE_TOKENS > sequences[i]->length)
      return false;
  return true;
}

static const struct cuda_demotion *demotions_of(const struct step_data *step) {
  return (const struct cuda_demotion *)(const void *)((const uint8_t *)step->device + step->place_bytes);
}

static oscar_status demote_layers(const oscar_cache *c, const struct step_data *step, int begin, int end) {
  struct device_store *store = c->store;
  if (step->demotions == 0) return OSCAR_OK;
  return cuda_encode(store->codecs, store->layers, begin, end, c->geometry.kv_heads, demotions_of(step), step->demotions,
                     store->bad + 1);
}

static bool is_of(const struct step_data *step, oscar_sequence *const *sequences, int count) {
  return step->first == sequences[0] && step->count == count && step->changes == sequences[0]->cache->changes;
}

/* Places of tokens, then demotions. */
static oscar_status fill_step(struct step_data *step, oscar_sequence *const *sequences, int count) {
  const oscar_cache *c = sequences[0]->cache;
  struct device_store *store = c->store;
  size_t tokens = 0, demotions = 0;
  for (int i = 0; i < count; i++) {
    tokens += (size_t)sequences[i]->step_tokens;
    demotions += (size_t)(sequences[i]->demoted_end - sequences[i]->demoted_first);
  }
  const size_t place_bytes = round_up(tokens * sizeof(struct write_place), 16);
  step->first = NULL;
  const size_t bytes = place_bytes + demotions * sizeof(struct cuda_demotion);
  oscar_status status = reserve_list(c, bytes);
  if (status == OSCAR_OK) status = reserve_step(c, step, bytes);
  if (status != OSCAR_OK) return status;
  step->place_bytes = place_bytes;
  step->tokens = step->demotions = 0;
  for (int i = 0; i < count; i++)
    list_step(sequences[i], step, store->listed, (struct cuda_demotion *)(void *)((uint8_t *)store->listed + place_bytes));
  status =
      cuda_upload(store->cuda, step->device, store->listed, place_bytes + (size_t)step->demotions * sizeof(struct cuda_demotion));
  store->unchecked = true;
  step->demoted = demotes_complete_pages(sequences, count);
  if (status == OSCAR_OK && step->demoted) status = demote_layers(c, step, 0, c->geometry.layers);
  if (status != OSCAR_OK) return status;
  step->first = sequences[0];
  step->count = count;
  step->changes = c->changes;
  return OSCAR_OK;
}

static oscar_status find_step(oscar_sequence *const *sequences, int count, struct step_data **out) {
  struct device_store *store = sequences[0]->cache->store;
  *out = &store->ready;
  if (is_of(*out, sequences, count)) return OSCAR_OK;
  for (int i = 0; i < KEPT_STEPS; i++) {
    *out = &store->steps[i];
    if (is_of(*out, sequences, count)) return OSCAR_OK;
  }
  *out = &store->steps[store->step = (store->step + 1) % KEPT_STEPS];
  return fill_step(*out, sequences, count);
}

oscar_status device_store_write(oscar_sequence *const *sequences, int count, int layer, const float *k, const float *v) {
  const oscar_cache *c = sequences[0]->cache;
  struct device_store *store = c->store;
  const struct cache_geometry *g = &c->geometry;
  struct step_data *step;
  oscar_status status = find_step(sequences, count, &step);
  if (status != OSCAR_OK) return status;
  const struct layer_part *part = &c->layers[layer];
  store->unchecked = true;
  status = write_rows(store->cuda, part->memory, part->unit_bytes, g->kv_heads, g->head_dim, step->tokens, step->device, k, v,
                      store->bad);
  return status == OSCAR_OK && !step->demoted ? demote_layers(c, step, layer, layer + 1) : status;
}

oscar_status device_store_make_ready(oscar_sequence *const *sequences, int count, struct device_step *out) {
  const oscar_cache *c = sequences[0]->cache;
  struct device_store *store = c->store;
  if (!demotes_complete_pages(sequences, count))
    return set_error(c->geometry.context, OSCAR_INVALID_ARGUMENT,
                     "a step demotes pages that it fills: its rows have to be written layer by layer");
  oscar_status status = fill_step(&store->ready, sequences, count);
  *out = (struct device_step){store->ready.device, store->bad};
  return status;
}

oscar_status device_store_check(const oscar_cache *c) {
  struct device_store *s = c->store;
  if (!s->unchecked) return OSCAR_OK;
  oscar_status status = oscar_cuda_wait(s->cuda);
  if (status != OSCAR_OK) return status;
  s->unchecked = false;
  const unsigned long long bad[2] = {s->bad[0], s->bad[1]};
  if (bad[0] == CUDA_BAD_NONE && bad[1] == CUDA_BAD_NONE) return OSCAR_OK;
  s->bad[0] = s->bad[1] = CUDA_BAD_NONE;
  return set_error(c->geometry.context, OSCAR_NUMERIC, "a %s that was written to the cache %s",
                   (bad[0] != CUDA_BAD_NONE ? bad[0] : bad[1]) % 2 ? "value" : "key",
                   bad[0] != CUDA_BAD_NONE ? "is not finite in BF16" : "cannot be encoded: its scale leaves the range of fp16");
}

/* ---- reading ---- */

oscar_status device_store_read(const oscar_sequence *s, struct page_entry entry, int layer, int kv_head, oscar_side side,
                               void *out) {
  const oscar_cache *c = s->cache;
  const size_t exact_side = exact_head_bytes(&c->geometry) / 2;
  if (entry.exact != NO_PAGE)
    return cuda_download(cuda_of(c), out, exact_memory(c, layer, entry.exact, kv_head) + (size_t)side * exact_side, exact_side);
  const struct side_form *form = &c->layers[layer].form[side];
  uint8_t *copy = mem_alloc(c->geometry.context, side_bytes(form), 1);
  if (!copy) return OSCAR_NO_MEMORY;
  oscar_status status = cuda_download(cuda_of(c), copy, coded_memory(c, layer, entry.coded, kv_head, side), side_bytes(form));
  if (status == OSCAR_OK) page_from_device(form, side, copy, out);
  mem_free(c->geometry.context, copy);
  return status;
}

oscar_status device_store_download(const oscar_cache *c, int32_t unit, bool coded, void *out) {
  struct cuda_part parts[32];
  oscar_status status = OSCAR_OK;
  uint8_t *at = out;
  for (int layer = 0, n = 0; layer < c->geometry.layers && status == OSCAR_OK; layer++) {
    parts[n] = (struct cuda_part){at, page_memory(c, layer, unit), page_layer_bytes(c, layer, coded)};
    at += parts[n++].bytes;
    if (n < (int)ARRAY_LENGTH(parts) && layer + 1 < c->geometry.layers) continue;
    status = cuda_download_parts(cuda_of(c), parts, n);
    n = 0;
  }
  return status;
}

oscar_status device_store_upload(const oscar_cache *c, int layer, int32_t unit, const void *from, size_t bytes) {
  return cuda_upload(cuda_of(c), page_memory(c, layer, unit), from, bytes);
}
