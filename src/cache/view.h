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
};
const struct cache_geometry *cache_geometry_of(const oscar_cache *cache);
const oscar_cache *sequence_cache(const oscar_sequence *sequence);

/* Positions readable in `layer` now: committed tokens, plus those of the open step once the layer has been written; -1 if a step
 * is open and the layer has not been written. */
int64_t sequence_visible(const oscar_sequence *sequence, int layer);

struct page_view {
  const uint8_t *exact; /* NULL: no exact form */
  const uint8_t *coded; /* NULL: no coded form (or not encoded in this layer yet) */
};
struct page_view sequence_page(const oscar_sequence *sequence, int layer, int64_t page);

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
