/*
 * cache/view.h - what attention sees of a sequence in one layer. Private.
 *
 * An exact page of a layer: for each KV head K [64][head_dim] then V [64][head_dim], BF16.
 * A coded page of a layer: for each KV head the packed keys (side_bytes), then the packed values (quant/page_form.h); with a
 * filter, which has no codes, as an exact page.
 * Every side starts on a 64-byte boundary.
 */
#ifndef OSCAR_CACHE_VIEW_H
#define OSCAR_CACHE_VIEW_H

#include "quant/page_form.h"
#include <oscar/cache.h>

struct cache_geometry {
  oscar_context *context;
  int layers, kv_heads, head_dim, sink_pages, recent_pages;
  const oscar_codec_set *codecs;   /* NULL: BF16 */
  const oscar_page_filter *filter; /* NULL: none; not both */
  oscar_cuda *cuda;                /* pages are in its memory; NULL: in the host's */
};
const struct cache_geometry *cache_geometry_of(const oscar_cache *cache);
const oscar_cache *sequence_cache(const oscar_sequence *sequence);

/* Instead of a layer: as if the open step had been written to all of them. */
#define EVERY_LAYER (-1)

/* Positions readable in `layer` now: committed tokens, plus those of the open step once the layer has been written; -1 if a step
 * is open and the layer has not been written. */
int64_t sequence_visible(const oscar_sequence *sequence, int layer);

struct page_view {
  const uint8_t *exact; /* NULL: no exact form */
  const uint8_t *coded; /* NULL: no coded form (or not encoded in this layer yet) */
};
struct page_view sequence_page(const oscar_sequence *sequence, int layer, int64_t page);

/* The same as units of the arena, which is what a page has where memory is a GPU's: NO_UNIT for a form that is not there. */
#define NO_UNIT (-1)
struct page_units {
  int32_t exact, coded;
};
struct page_units sequence_page_units(const oscar_sequence *sequence, int layer, int64_t page);
/* Changes with every step and every other change of any sequence: what was made from page tables holds as long as it is the same.
 */
uint64_t cache_changes(const oscar_cache *cache);

/* Where a layer's pages are. Page u: memory + u unit_bytes. Of head h, exact: + h exact_head_bytes; coded: + h head_bytes. */
struct layer_memory {
  uint8_t *memory;
  size_t unit_bytes, head_bytes, side_bytes[2];
  struct side_form form[2];
};
struct layer_memory cache_layer_memory(const oscar_cache *cache, int layer);

/* The reading rule. A page that the rule wants exact but that exists as codes only (a refill after a rewind) is read as codes. */
static inline bool page_reads_exact(const struct cache_geometry *g, int64_t page, int64_t query_page) {
  return page < g->sink_pages || page + g->recent_pages >= query_page;
}

/* Whether pages turn into another form at all. */
static inline bool demotes_pages(const struct cache_geometry *g) { return g->codecs || g->filter; }

static inline size_t exact_head_bytes(const struct cache_geometry *g) {
  return (size_t)2 * 2 * PAGE_TOKENS * (size_t)g->head_dim;
}

#endif
