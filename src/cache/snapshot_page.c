/*
 * snapshot_page.c - a page of the cache <-> the parts of its record in a file.
 *
 * Sides follow each other as [layer][KV head][K, V]; of each, `n` rows in canonical form are cut into low and high bytes, or into
 * crumbs, which of the keys are not compressed, and metadata.
 */
#include "cache/cuda/store.h"
#include "cache/snapshot_format.h"
#include "quant/device_form.h"

#include <string.h>
#include <xxhash.h>
#include <zstd.h>

uint64_t snapshot_checksum(const void *data, size_t bytes) { return XXH3_64bits(data, bytes); }

/* A sum of a row of pieces, with nothing to allocate: chain <- sum(chain, sum(piece)). */
static void fold(uint8_t chain[16], const void *data, size_t bytes) {
  uint8_t both[32];
  XXH128_canonical_t sum;
  XXH128_canonicalFromHash(&sum, XXH3_128bits(data, bytes));
  memcpy(both, chain, 16);
  memcpy(both + 16, sum.digest, 16);
  XXH128_canonicalFromHash(&sum, XXH3_128bits(both, sizeof both));
  memcpy(chain, sum.digest, 16);
}

static void fold_codec(uint8_t chain[16], const oscar_codec_spec *spec) {
  const size_t d = (size_t)spec->head_dim, m = (size_t)spec->channels, pairs = (size_t)spec->rotating_pairs;
  const int32_t numbers[] = {spec->head_dim, spec->channels, (int32_t)spec->form, spec->groups, spec->rotating_pairs};
  const float clip = spec->form == OSCAR_ROW_SCALE_ZERO ? spec->clip_ratio : 1;
  fold(chain, numbers, sizeof numbers);
  fold(chain, &clip, sizeof clip);
  fold(chain, spec->crumbs, m);
  fold(chain, spec->steps, m * sizeof(float));
  fold(chain, spec->mean, d * sizeof(float));
  fold(chain, spec->encode, d * m * sizeof(float));
  fold(chain, spec->decode, d * m * sizeof(float));
  if (!spec->rope) return;
  const oscar_rope_spec *rope = oscar_rope_describe(spec->rope);
  const int32_t turn[] = {(int32_t)rope->layout, rope->rotary_dim};
  fold(chain, turn, sizeof turn);
  fold(chain, rope->frequencies, (size_t)rope->rotary_dim / 2 * sizeof(float));
  fold(chain, spec->rotating_pair, pairs * sizeof(uint16_t));
  fold(chain, spec->rotating_mean, 2 * pairs * sizeof(float));
}

void snapshot_codecs_fingerprint(const oscar_codec_set *codecs, uint8_t out[16]) {
  const oscar_codec_set_info *info = oscar_codec_set_describe(codecs);
  memset(out, 0, 16);
  for (int layer = 0; layer < info->layers; layer++)
    for (int head = 0; head < info->kv_heads; head++)
      for (int side = 0; side < 2; side++)
        fold_codec(out, oscar_codec_describe(oscar_codec_set_get(codecs, layer, head, (oscar_side)side)));
}

/* ---- sizes ---- */

static size_t meta_bytes(const struct snapshot_form *f) {
  return (size_t)2 * (size_t)meta_words((int)f->groups, (int)f->meta_values);
}

struct record_shape record_shape_of(const struct snapshot_shape *s, bool coded, int rows) {
  const size_t all = (size_t)s->kv_heads * (size_t)rows;
  if (!coded) {
    const size_t numbers = all * (size_t)s->head_dim * 2 * (size_t)s->layers;
    return (struct record_shape){rows, numbers, {numbers}};
  }
  size_t crumbs[2] = {0, 0}, meta = 0;
  for (int i = 0; i < 2 * s->layers; i++) {
    crumbs[i % 2] += s->forms[i].crumbs / 4;
    meta += meta_bytes(&s->forms[i]);
  }
  return (struct record_shape){rows, crumbs[0] * all, {crumbs[1] * all, meta * all}};
}

size_t record_frames_bound(const struct record_shape *r) {
  size_t bytes = 0;
  for (int k = 0; k < 2 && r->frame_bytes[k]; k++) bytes += ZSTD_compressBound(r->frame_bytes[k]);
  return bytes;
}

size_t snapshot_rows_bytes(const struct snapshot_shape *s) {
  size_t most = 0;
  for (int i = 0; i < 2 * s->layers; i++) {
    const size_t bytes = s->forms[i].crumbs / 4 + meta_bytes(&s->forms[i]);
    if (bytes > most) most = bytes;
  }
  return most * PAGE_TOKENS;
}

/* ---- in memory ---- */

/* Where a side begins; a staging copy has the layers of its form after each other. */
static uint8_t *side_memory(const struct page_place *place, int layer, int head, int side) {
  const oscar_cache *c = place->cache;
  const size_t exact = exact_head_bytes(&c->geometry);
  uint8_t *base = place->staging ? place->staging : page_memory(c, layer, place->page);
  for (int i = 0; place->staging && i < layer; i++) base += page_layer_bytes(c, i, place->coded);
  if (!place->coded) return base + (size_t)head * exact + (size_t)side * (exact / 2);
  return base + (size_t)head * c->layers[layer].head_bytes + (side ? c->layers[layer].side_bytes[0] : 0);
}

size_t page_copy_bytes(const oscar_cache *c, bool coded) {
  size_t bytes = 0;
  for (int layer = 0; layer < c->geometry.layers; layer++) bytes += page_layer_bytes(c, layer, coded);
  return bytes;
}

size_t page_staging_bytes(const oscar_cache *c) {
  const size_t exact = page_copy_bytes(c, false), coded = page_copy_bytes(c, true);
  return exact > coded ? exact : coded;
}

oscar_status page_copy(const struct page_place *place) {
  const oscar_cache *c = place->cache;
  if (c->store) return device_store_download(c, place->page, place->coded, place->staging);
  for (int layer = 0; layer < c->geometry.layers; layer++)
    memcpy(side_memory(place, layer, 0, 0), page_memory(c, layer, place->page), page_layer_bytes(c, layer, place->coded));
  return OSCAR_OK;
}

oscar_status page_upload(const struct page_place *place) {
  oscar_status status = OSCAR_OK;
  for (int layer = 0; layer < place->cache->geometry.layers && status == OSCAR_OK; layer++)
    status = device_store_upload(place->cache, layer, place->page, side_memory(place, layer, 0, 0),
                                 page_layer_bytes(place->cache, layer, place->coded));
  return status;
}

/* ---- cutting and joining rows ---- */

static void split_numbers(const uint16_t *restrict from, size_t n, uint8_t *restrict low, uint8_t *restrict high) {
  for (size_t i = 0; i < n; i++) {
    low[i] = (uint8_t)from[i];
    high[i] = (uint8_t)(from[i] >> 8);
  }
}

static void join_numbers(uint16_t *restrict to, size_t n, const uint8_t *restrict low, const uint8_t *restrict high) {
  for (size_t i = 0; i < n; i++) to[i] = (uint16_t)(low[i] | high[i] << 8);
}

/* n rows of `crumbs` bytes, a multiple of four, and `meta` bytes, a multiple of two, into two arrays, and back. Small copies of a
 * size that is not known before would each be a call. */
static void cut_rows(const uint8_t *rows, int n, size_t crumbs, size_t meta, uint8_t *to_crumbs, uint8_t *to_meta) {
  for (int t = 0; t < n; t++, rows += crumbs + meta, to_crumbs += crumbs, to_meta += meta) {
    for (size_t i = 0; i < crumbs; i += 4) memcpy(to_crumbs + i, rows + i, 4);
    for (size_t i = 0; i < meta; i += 2) memcpy(to_meta + i, rows + crumbs + i, 2);
  }
}

static void join_rows(uint8_t *rows, int n, size_t crumbs, size_t meta, const uint8_t *from_crumbs, const uint8_t *from_meta) {
  for (int t = 0; t < n; t++, rows += crumbs + meta, from_crumbs += crumbs, from_meta += meta) {
    for (size_t i = 0; i < crumbs; i += 4) memcpy(rows + i, from_crumbs + i, 4);
    for (size_t i = 0; i < meta; i += 2) memcpy(rows + crumbs + i, from_meta + i, 2);
  }
}

void page_split(const struct snapshot_shape *s, const struct page_place *place, int n, uint8_t *rows, uint8_t *raw,
                uint8_t *frames) {
  const size_t numbers = (size_t)n * (size_t)s->head_dim;
  uint8_t *second = frames + record_shape_of(s, place->coded, n).frame_bytes[0];
  for (int i = 0; i < s->layers * s->kv_heads * 2; i++) {
    const int side = i % 2, head = i / 2 % s->kv_heads, layer = i / 2 / s->kv_heads;
    const uint8_t *memory = side_memory(place, layer, head, side);
    if (!place->coded) {
      split_numbers((const uint16_t *)(const void *)memory, numbers, raw, frames);
      raw += numbers, frames += numbers;
      continue;
    }
    const struct side_form *form = &place->cache->layers[layer].form[side];
    const size_t crumbs = (size_t)form->crumbs / 4, meta = (size_t)2 * (size_t)side_meta_words(form);
    if (place->cache->store)
      page_from_device(form, (oscar_side)side, memory, rows);
    else
      page_unpack(form, (oscar_side)side, memory, rows);
    uint8_t **to = side == 0 ? &raw : &frames;
    cut_rows(rows, n, crumbs, meta, *to, second);
    *to += (size_t)n * crumbs, second += (size_t)n * meta;
  }
}

void page_join(const struct snapshot_shape *s, const struct page_place *place, int n, uint8_t *rows, const uint8_t *raw,
               const uint8_t *frames) {
  const size_t numbers = (size_t)n * (size_t)s->head_dim;
  const uint8_t *second = frames + record_shape_of(s, place->coded, n).frame_bytes[0];
  for (int i = 0; i < s->layers * s->kv_heads * 2; i++) {
    const int side = i % 2, head = i / 2 % s->kv_heads, layer = i / 2 / s->kv_heads;
    uint8_t *memory = side_memory(place, layer, head, side);
    if (!place->coded) {
      join_numbers((uint16_t *)(void *)memory, numbers, raw, frames);
      raw += numbers, frames += numbers;
      continue;
    }
    const struct side_form *form = &place->cache->layers[layer].form[side];
    const size_t crumbs = (size_t)form->crumbs / 4, meta = (size_t)2 * (size_t)side_meta_words(form);
    const uint8_t **from = side == 0 ? &raw : &frames;
    join_rows(rows, n, crumbs, meta, *from, second);
    *from += (size_t)n * crumbs, second += (size_t)n * meta;
    if (place->cache->store)
      page_to_device(form, (oscar_side)side, rows, memory);
    else
      page_pack(form, (oscar_side)side, rows, memory);
  }
}
