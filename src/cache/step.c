/*
 * step.c - begin, write, commit, abort: the only way tokens get into a sequence.
 *
 * begin takes every page the step needs, so nothing after it can run out: exact pages for the new tokens, and codes for the pages
 * that the step demotes. Until commit such a page has both forms: early queries of a long chunk still read it exactly, later ones
 * as codes. write stores a layer's rows as BF16 and then encodes, from those BF16 values, the demoted pages in that layer; commit
 * releases their exact forms.
 *
 * A page shared by several sequences may be demoted by each. The first to commit links exact and coded form as twins; who comes
 * later takes the twin instead of encoding again, at begin or, when both had a step open, at commit (equal bytes, as encoding is
 * deterministic and its source immutable).
 */
#include "cache/state.h"

#include <omp.h>
#include <string.h>

#define PARALLEL_ELEMENTS 65536 /* below this many, storing rows takes less time than waking threads */

/* ---- begin ---- */

struct need {
  int64_t pages;                      /* of the table */
  int64_t demoted_first, demoted_end; /* candidates */
  int64_t exact, coded;               /* pages to take */
};

/* The encoded twin of an exact page, or NO_PAGE. */
static int32_t twin_of(const oscar_cache *c, int32_t exact) { return exact == NO_PAGE ? NO_PAGE : c->arena.unit[exact].twin; }

/* A page that the step demotes is exact now; refilled or already demoted ones have codes. Pages that the step creates are
 * exact.*/
static struct need step_need(const oscar_sequence *s, int n) {
  const struct cache_geometry *g = &s->cache->geometry;
  int64_t end = s->length + n, before = s->length > 0 ? (s->length - 1) / PAGE_TOKENS : 0;
  struct need need = {.pages = pages_of(end)};
  need.exact = need.pages - s->pages;
  if (!g->codecs) return need;
  need.demoted_end = max64(0, (end - 1) / PAGE_TOKENS - g->recent_pages);
  need.demoted_first = min64(need.demoted_end, max64(g->sink_pages, before - g->recent_pages));
  for (int64_t p = need.demoted_first; p < need.demoted_end; p++)
    need.coded += p >= s->pages || (s->table[p].coded == NO_PAGE && twin_of(s->cache, s->table[p].exact) == NO_PAGE);
  return need;
}

static void take_pages(oscar_sequence *s, const struct need *need) {
  oscar_cache *c = s->cache;
  for (; s->pages < need->pages; s->pages++) s->table[s->pages] = (struct page_entry){NO_PAGE, NO_PAGE};
  for (int64_t p = need->demoted_first; p < need->demoted_end; p++) {
    struct page_entry *entry = &s->table[p];
    if (entry->coded != NO_PAGE) continue;
    entry->coded = twin_of(c, entry->exact);
    if (entry->coded != NO_PAGE)
      arena_retain(&c->arena, entry->coded);
    else
      entry->coded = cache_take_coded(c);
  }
  for (int64_t p = pages_of(s->length); p < need->pages; p++) {
    int32_t page = cache_take_exact(c); /* may move codes: the entry is looked up afterwards */
    s->table[p].exact = page;
  }
}

oscar_status oscar_sequence_begin(oscar_sequence *s, int n) {
  oscar_cache *c = s->cache;
  oscar_context *context = c->geometry.context;
  if (s->step_tokens) return set_error(context, OSCAR_INVALID_ARGUMENT, "a step of this sequence is open already");
  if (n < 1) return set_error(context, OSCAR_INVALID_ARGUMENT, "a step of %d tokens; expected 1 or more", n);
  struct need need = step_need(s, n);
  int64_t units = need.exact * c->plan.run + need.coded;
  size_t bytes = need.pages > s->capacity ? plan_table_bytes(need.pages) - plan_table_bytes(s->capacity) : 0;
  if (!cache_has_room(c, units, bytes)) return cache_full(c, "this step", units, bytes);
  oscar_status status = sequence_grow_table(s, need.pages);
  if (status != OSCAR_OK) return status;
  take_pages(s, &need);
  s->demoted_first = need.demoted_first;
  s->demoted_end = need.demoted_end;
  s->step_tokens = n;
  s->step_layers = 0;
  s->step_failed = false;
  memset(s->written, 0, (size_t)c->geometry.layers * sizeof s->written[0]);
  cache_note_peak(c);
  debug_check(c);
  return OSCAR_OK;
}

/* ---- write ---- */

/* Rounds a row to BF16, to nearest even; false if a result is not finite. Branch-free so that it becomes vector code. */
static bool store_row(const float *x, int n, uint16_t *out) {
  uint32_t finite = 1;
  for (int i = 0; i < n; i++) {
    uint32_t u;
    memcpy(&u, &x[i], sizeof u);
    uint32_t rounded = (u + 0x7FFFu + (u >> 16 & 1)) >> 16;
    finite &= ((u & 0x7F800000u) != 0x7F800000u) & ((rounded & 0x7F80u) != 0x7F80u);
    out[i] = (uint16_t)rounded;
  }
  return finite;
}

/* Rows of the step into their exact pages. Returns the least 2 * (token * kv_heads + head) + side that is not finite, or
 * INT64_MAX. */
static int64_t store_rows(const oscar_sequence *s, int layer, const float *k, const float *v) {
  const oscar_cache *c = s->cache;
  const struct cache_geometry *g = &c->geometry;
  const int d = g->head_dim, heads = g->kv_heads;
  const int64_t rows = (int64_t)s->step_tokens * heads;
  int64_t bad = INT64_MAX;
#pragma omp parallel for num_threads(g->context->options.threads) schedule(static)                                               \
    reduction(min                                                                                                                \
              : bad) if (rows * d > PARALLEL_ELEMENTS)
  for (int64_t i = 0; i < rows; i++) {
    int64_t position = s->length + i / heads;
    int32_t page = s->table[position / PAGE_TOKENS].exact;
    uint16_t *out = (uint16_t *)(void *)exact_memory(c, layer, page, (int)(i % heads)) + position % PAGE_TOKENS * d;
    if (!store_row(v + i * d, d, out + PAGE_TOKENS * d)) bad = min64(bad, 2 * i + 1);
    if (!store_row(k + i * d, d, out)) bad = min64(bad, 2 * i);
  }
  return bad;
}

struct scratch {
  float *x, *y;
  uint8_t *rows;
};

static struct scratch scratch_of(const oscar_cache *c, int thread) {
  uint8_t *base = c->scratch + (size_t)thread * c->plan.scratch_bytes;
  return (struct scratch){(float *)(void *)base, (float *)(void *)(base + c->plan.scratch_y), base + c->plan.scratch_rows};
}

/* One side of one head of a page. Returns the row that cannot be encoded, or PAGE_TOKENS. */
static int encode_side(const oscar_codec *codec, const struct side_form *form, oscar_side side, int64_t page,
                       const uint16_t *exact, struct scratch t, uint8_t *packed) {
  const size_t d = (size_t)codec->spec.head_dim, channels = (size_t)codec->spec.channels;
  for (size_t i = 0; i < PAGE_TOKENS * d; i++) t.x[i] = bf16_to_f32(exact[i]);
  codec_project(codec, page * PAGE_TOKENS, PAGE_TOKENS, t.x, d, t.y);
  for (int row = 0; row < PAGE_TOKENS; row++)
    if (!codec_quantize_row(codec, t.y + (size_t)row * channels, t.rows + (size_t)row * codec->row_bytes)) return row;
  page_pack(form, side, t.rows, packed);
  return PAGE_TOKENS;
}

/* Encodes what the step demotes in one layer. Returns the least 2 * (position * kv_heads + head) + side that cannot be encoded,
 * or INT64_MAX. */
static int64_t encode_pages(const oscar_sequence *s, int layer) {
  const oscar_cache *c = s->cache;
  const struct cache_geometry *g = &c->geometry;
  const struct layer_part *part = &c->layers[layer];
  const int heads = g->kv_heads;
  const int64_t jobs = (s->demoted_end - s->demoted_first) * heads * 2;
  int64_t bad = INT64_MAX;
#pragma omp parallel for num_threads(c->plan.threads) schedule(dynamic) reduction(min : bad) if (jobs > 1)
  for (int64_t i = 0; i < jobs; i++) {
    oscar_side side = (oscar_side)(i % 2);
    int head = (int)(i / 2 % heads);
    int64_t page = s->demoted_first + i / 2 / heads;
    const struct page_entry *entry = &s->table[page];
    if (!entry_is_being_encoded(c, entry)) continue;
    const uint16_t *exact = (const uint16_t *)(const void *)exact_memory(c, layer, entry->exact, head);
    if (side == OSCAR_VALUES) exact += PAGE_TOKENS * g->head_dim;
    int row = encode_side(oscar_codec_set_get(g->codecs, layer, head, side), &part->form[side], side, page, exact,
                          scratch_of(c, omp_get_thread_num()), coded_memory(c, layer, entry->coded, head, side));
    if (row < PAGE_TOKENS) bad = min64(bad, 2 * ((page * PAGE_TOKENS + row) * heads + head) + side);
  }
  return bad;
}

static oscar_status refuse_row(oscar_sequence *s, int layer, int64_t bad, int64_t base, const char *why) {
  const int heads = s->cache->geometry.kv_heads;
  s->step_failed = true;
  return set_error(s->cache->geometry.context, OSCAR_NUMERIC, "layer %d, KV head %d, position %lld: the %s %s", layer,
                   (int)(bad / 2 % heads), (long long)(base + bad / 2 / heads), bad % 2 ? "value" : "key", why);
}

oscar_status oscar_sequence_write(oscar_sequence *s, int layer, const float *k, const float *v) {
  const struct cache_geometry *g = &s->cache->geometry;
  if (s->step_tokens == 0) return set_error(g->context, OSCAR_INVALID_ARGUMENT, "write without a step: call begin first");
  if (s->step_failed) return set_error(g->context, OSCAR_INVALID_ARGUMENT, "this step has failed and must be aborted");
  if (layer < 0 || layer >= g->layers)
    return set_error(g->context, OSCAR_INVALID_ARGUMENT, "layer %d; the cache has layers 0 to %d", layer, g->layers - 1);
  if (s->written[layer])
    return set_error(g->context, OSCAR_INVALID_ARGUMENT, "layer %d has been written in this step already", layer);
  int64_t bad = store_rows(s, layer, k, v);
  if (bad != INT64_MAX) return refuse_row(s, layer, bad, s->length, "is not finite in BF16");
  bad = encode_pages(s, layer);
  if (bad != INT64_MAX) return refuse_row(s, layer, bad, 0, "cannot be encoded: its scale leaves the range of fp16");
  s->written[layer] = true;
  s->step_layers++;
  debug_check(s->cache);
  return OSCAR_OK;
}

/* ---- commit and abort ---- */

/* Leaves the page as codes only, and the codes to those who still share the exact form. */
static void demote(oscar_cache *c, struct page_entry *entry) {
  struct arena *a = &c->arena;
  int32_t twin = twin_of(c, entry->exact);
  if (twin == NO_PAGE) {
    arena_link_twins(a, entry->exact, entry->coded);
  } else if (twin != entry->coded) {
    arena_retain(a, twin);
    arena_release(a, entry->coded);
    entry->coded = twin;
  }
  arena_release(a, entry->exact);
  entry->exact = NO_PAGE;
}

oscar_status oscar_sequence_commit(oscar_sequence *s) {
  const struct cache_geometry *g = &s->cache->geometry;
  if (s->step_tokens == 0) return set_error(g->context, OSCAR_INVALID_ARGUMENT, "commit without a step: call begin first");
  if (s->step_failed) return set_error(g->context, OSCAR_INVALID_ARGUMENT, "this step has failed and must be aborted");
  if (s->step_layers != g->layers)
    return set_error(g->context, OSCAR_INVALID_ARGUMENT, "commit after %d of %d layers have been written", s->step_layers,
                     g->layers);
  for (int64_t p = s->demoted_first; p < s->demoted_end; p++)
    if (s->table[p].exact != NO_PAGE) demote(s->cache, &s->table[p]);
  s->length += s->step_tokens;
  s->step_tokens = 0;
  debug_check(s->cache);
  return OSCAR_OK;
}

void oscar_sequence_abort(oscar_sequence *s) {
  if (s->step_tokens == 0) return;
  oscar_cache *c = s->cache;
  int64_t keep = pages_of(s->length);
  for (int64_t p = s->demoted_first; p < min64(s->demoted_end, keep); p++) {
    struct page_entry *entry = &s->table[p];
    if (entry->exact == NO_PAGE || entry->coded == NO_PAGE) continue;
    arena_release(&c->arena, entry->coded);
    entry->coded = NO_PAGE;
  }
  s->step_tokens = 0;
  sequence_drop_pages(s, keep);
  debug_check(c);
}
