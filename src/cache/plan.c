/*
 * plan.c - from options to sizes: the units, their cost, and what a whole life of sequences needs.
 *
 * The budget pays for: the cache itself and its encoding scratch (fixed), for every unit in use its pages and bookkeeping
 * (unit_cost), and for every sequence itself and its table. Bookkeeping is charged with the unit it belongs to, so a budget
 * needs no second look at how many units it bought: free units = (budget - fixed - sequences) / unit_cost - used.
 */
#include "cache/cuda/store.h"
#include "cache/state.h"

#include <math.h>

#define MAX_LAYERS 65536
#define MAX_HEADS  65536

void oscar_cache_options_default(oscar_cache_options *options) {
  *options = (oscar_cache_options){.sink_pages = 1, .recent_pages = 4};
}

static oscar_status check_options(oscar_context *c, const oscar_cache_options *o) {
  if (o->layers < 1 || o->layers > MAX_LAYERS)
    return set_error(c, OSCAR_INVALID_ARGUMENT, "layers is %d; expected 1 to %d", o->layers, MAX_LAYERS);
  if (o->kv_heads < 1 || o->kv_heads > MAX_HEADS)
    return set_error(c, OSCAR_INVALID_ARGUMENT, "kv_heads is %d; expected 1 to %d", o->kv_heads, MAX_HEADS);
  if (o->head_dim < 16 || o->head_dim > OSCAR_MAX_HEAD_DIM || o->head_dim % 16 != 0)
    return set_error(c, OSCAR_INVALID_ARGUMENT, "head_dim is %d; expected a multiple of 16 up to %d", o->head_dim,
                     OSCAR_MAX_HEAD_DIM);
  if (o->sink_pages < 0 || o->recent_pages < 0)
    return set_error(c, OSCAR_INVALID_ARGUMENT, "sink_pages is %d and recent_pages %d; expected 0 or more", o->sink_pages,
                     o->recent_pages);
  return OSCAR_OK;
}

static oscar_status check_codecs(oscar_context *c, const oscar_cache_options *o) {
  const oscar_codec_set_info *info = oscar_codec_set_describe(o->codecs);
  if (info->layers != o->layers || info->kv_heads != o->kv_heads || info->head_dim != o->head_dim)
    return set_error(c, OSCAR_MISMATCH,
                     "the codec set is for %d layers, %d KV heads, head dimension %d; the cache has %d, %d and %d", info->layers,
                     info->kv_heads, info->head_dim, o->layers, o->kv_heads, o->head_dim);
  oscar_status status = oscar_codec_set_check(o->codecs);
  const oscar_codec *any = oscar_codec_set_get(o->codecs, 0, 0, OSCAR_KEYS);
  if (status == OSCAR_OK || (any && any->context == c)) return status;
  return set_error(c, status, "%s", any ? oscar_last_error(any->context) : "the codec set has unassigned places");
}

static oscar_status check_filter(oscar_context *c, const oscar_cache_options *o) {
  if (o->codecs) return set_error(c, OSCAR_INVALID_ARGUMENT, "codecs and a page filter are given; expected one of them");
  if (!o->filter->apply) return set_error(c, OSCAR_INVALID_ARGUMENT, "the page filter has no function to apply");
  if (!(o->filter->bits_per_element > 0 && isfinite(o->filter->bits_per_element)))
    return set_error(c, OSCAR_INVALID_ARGUMENT, "the page filter says %g bits per element; expected a positive number",
                     o->filter->bits_per_element);
  return OSCAR_OK;
}

static size_t exact_layer_bytes(const oscar_cache_options *o) {
  return (size_t)2 * 2 * PAGE_TOKENS * (size_t)o->head_dim * (size_t)o->kv_heads;
}

size_t plan_layer_bytes(const oscar_cache_options *o, int layer, struct side_form form[2]) {
  if (!o->codecs) return exact_layer_bytes(o);
  size_t bytes = 0;
  for (int side = 0; side < 2; side++) {
    form[side] = side_form_of(oscar_codec_set_get(o->codecs, layer, 0, (oscar_side)side));
    bytes += side_bytes(&form[side]);
  }
  return bytes * (size_t)o->kv_heads;
}

size_t plan_table_bytes(int64_t pages) { return round_up((size_t)pages, TABLE_ENTRIES) * sizeof(struct page_entry); }

/* Scratch of one encoding thread: [64][head_dim] floats, [64][channels] floats, [64][row_bytes] canonical rows. A filter has as
 * many channels as head_dim, no rows, and is called by one thread. */
static void plan_scratch(const oscar_cache_options *o, struct cache_plan *plan) {
  size_t channels = o->filter ? (size_t)o->head_dim : 0, row_bytes = 0;
  for (int layer = 0; o->codecs && layer < o->layers; layer++)
    for (int head = 0; head < o->kv_heads; head++)
      for (int side = 0; side < 2; side++) {
        const oscar_codec *codec = oscar_codec_set_get(o->codecs, layer, head, (oscar_side)side);
        if ((size_t)codec->spec.channels > channels) channels = (size_t)codec->spec.channels;
        if (codec->row_bytes > row_bytes) row_bytes = codec->row_bytes;
      }
  if (o->codecs) plan->threads = oscar_codec_set_get(o->codecs, 0, 0, OSCAR_KEYS)->context->options.threads;
  plan->scratch_y = PAGE_TOKENS * sizeof(float) * (size_t)o->head_dim;
  plan->scratch_rows = plan->scratch_y + PAGE_TOKENS * sizeof(float) * channels;
  plan->scratch_bytes = plan->scratch_rows + PAGE_TOKENS * row_bytes;
}

oscar_status plan_make(oscar_context *c, const oscar_cache_options *o, struct cache_plan *plan) {
  *plan = (struct cache_plan){.run = 1, .threads = 1};
  oscar_status status = check_options(c, o);
  if (status == OSCAR_OK && o->filter) status = check_filter(c, o);
  if (status == OSCAR_OK && o->codecs) status = check_codecs(c, o);
  if (status != OSCAR_OK) return status;

  struct side_form form[2];
  for (int layer = 0; layer < o->layers; layer++) {
    size_t bytes = plan_layer_bytes(o, layer, form);
    int32_t run = (int32_t)((exact_layer_bytes(o) + bytes - 1) / bytes);
    if (run > plan->run) plan->run = run;
    plan->page_bytes += bytes;
  }
  if (o->codecs || o->filter) plan_scratch(o, plan);
  /* A block per unit is more than there are (one per run), by bytes where a unit has kilobytes. */
  plan->unit_cost = plan->page_bytes + sizeof(struct unit) + sizeof(struct block);
  plan->fixed_bytes = sizeof(struct oscar_cache) + (size_t)o->layers * sizeof(struct layer_part) + sizeof(struct block) +
                      (size_t)plan->run * sizeof(int32_t) +
                      (o->cuda ? device_store_bytes(o) : (size_t)plan->threads * plan->scratch_bytes);
  plan->sequence_bytes = sizeof(struct oscar_sequence) + (size_t)o->layers * sizeof(bool);
  return OSCAR_OK;
}

/*
 * The most units a sequence holds at once. Within a step from length L to L', with T the page of the last token before it and
 * T' of the last one after it, it holds
 *     exactly    every sink page, and the pages from T - recent to T' (what the step demotes is released at its end)
 *     as codes   the pages from the sink to T' - recent - 1
 * which grows with T' and with T' - T: the worst step is the longest that ends on the first token of the last page.
 */
static bool peak_units(const oscar_cache_options *o, const struct cache_plan *plan, int64_t tokens, int chunk, int64_t *units) {
  int64_t last = (tokens - 1) / PAGE_TOKENS, before = max64(last * PAGE_TOKENS + 1 - chunk, 0);
  int64_t exact = last + 1, coded = 0;
  if (o->codecs || o->filter) {
    int64_t first_recent = before > 0 ? (before - 1) / PAGE_TOKENS - o->recent_pages : 0;
    exact = min64(o->sink_pages, last + 1) + max64(0, last + 1 - max64(o->sink_pages, first_recent));
    coded = max64(0, last - o->recent_pages - o->sink_pages);
  }
  return !__builtin_mul_overflow(exact, (int64_t)plan->run, units) && !__builtin_add_overflow(*units, coded, units);
}

size_t oscar_cache_bytes_for(const oscar_cache_options *o, int64_t tokens, int sequences, int chunk) {
  if (tokens < 1 || sequences < 1 || chunk < 1) return 0;
  struct oscar_context silent = {0};
  struct cache_plan plan;
  int64_t units;
  size_t pages, each, bytes;
  if (plan_make(&silent, o, &plan) != OSCAR_OK || !peak_units(o, &plan, tokens, chunk, &units) ||
      __builtin_mul_overflow((size_t)units, plan.unit_cost, &pages) ||
      __builtin_add_overflow(pages, plan.sequence_bytes + plan_table_bytes((tokens - 1) / PAGE_TOKENS + 1), &each) ||
      __builtin_mul_overflow(each, (size_t)sequences, &bytes) || __builtin_add_overflow(bytes, plan.fixed_bytes, &bytes))
    return 0;
  return bytes;
}
