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
#include "base/team.h"
#include "cache/cuda/store.h"
#include "cache/state.h"

#include <stdatomic.h>
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
  if (!demotes_pages(g)) return need;
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
  c->changes++;
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

/* What all members of a run share when rows of a layer are written. `bad`: the least 2 * (token * kv_heads + head) + side that
 * cannot be, or INT64_MAX. */
struct writing {
  const oscar_sequence *s;
  int layer;
  const float *k, *v;
  _Atomic int64_t bad;
  team_counter jobs;
};

static void note_bad(struct writing *w, int64_t bad) {
  int64_t least = atomic_load(&w->bad);
  while (bad < least && !atomic_compare_exchange_weak(&w->bad, &least, bad)) {}
}

/* Rows first .. last - 1 of the step into their exact pages. */
static void store_rows(void *arg, int64_t first, int64_t last) {
  struct writing *w = arg;
  const oscar_sequence *s = w->s;
  const oscar_cache *c = s->cache;
  const int d = c->geometry.head_dim, heads = c->geometry.kv_heads;
  for (int64_t i = first; i < last; i++) {
    int64_t position = s->length + i / heads;
    int32_t page = s->table[position / PAGE_TOKENS].exact;
    uint16_t *out = (uint16_t *)(void *)exact_memory(c, w->layer, page, (int)(i % heads)) + position % PAGE_TOKENS * d;
    if (!store_row(w->v + i * d, d, out + PAGE_TOKENS * d)) note_bad(w, 2 * i + 1);
    if (!store_row(w->k + i * d, d, out)) note_bad(w, 2 * i);
  }
}

static int64_t encode_jobs(const oscar_sequence *s) {
  return (s->demoted_end - s->demoted_first) * s->cache->geometry.kv_heads * 2;
}

static struct encode_scratch scratch_of(const oscar_cache *c, int thread) {
  uint8_t *base = c->scratch + (size_t)thread * c->plan.scratch_bytes;
  return (struct encode_scratch){(float *)(void *)base, (float *)(void *)(base + c->plan.scratch_y), base + c->plan.scratch_rows};
}

/* Encodes one side of one head of a page in a cache with a filter, whose coded form is BF16. Returns the row that cannot be
 * encoded, or PAGE_TOKENS. */
static int filter_side(const struct cache_geometry *g, int layer, int head, oscar_side side, const uint16_t *exact,
                       struct encode_scratch t, uint16_t *out) {
  const int d = g->head_dim;
  for (int i = 0; i < PAGE_TOKENS * d; i++) t.x[i] = bf16_to_f32(exact[i]);
  const int refused = g->filter->apply(g->filter->user, layer, head, side, d, t.x, t.y);
  for (int row = 0; row < refused && row < PAGE_TOKENS; row++)
    if (!store_row(t.y + row * d, d, out + row * d)) return row;
  return refused;
}

/* Encodes what the step demotes in one layer; a job is one side of one head of one page. */
static void encode_pages(void *arg, int member, int members) {
  (void)members;
  struct writing *w = arg;
  const oscar_sequence *s = w->s;
  const oscar_cache *c = s->cache;
  const struct cache_geometry *g = &c->geometry;
  const int heads = g->kv_heads;
  const struct encode_scratch scratch = scratch_of(c, member);
  for (int64_t i; (i = team_take(&w->jobs)) < encode_jobs(s);) {
    oscar_side side = (oscar_side)(i % 2);
    int head = (int)(i / 2 % heads);
    int64_t page = s->demoted_first + i / 2 / heads;
    const struct page_entry *entry = &s->table[page];
    if (!entry_is_being_encoded(c, entry)) continue;
    const uint16_t *exact = (const uint16_t *)(const void *)exact_memory(c, w->layer, entry->exact, head);
    if (side == OSCAR_VALUES) exact += PAGE_TOKENS * g->head_dim;
    uint8_t *coded = coded_memory(c, w->layer, entry->coded, head, side);
    int row = g->filter ? filter_side(g, w->layer, head, side, exact, scratch, (uint16_t *)(void *)coded)
                        : page_encode(oscar_codec_set_get(g->codecs, w->layer, head, side), side, page, exact, &scratch, coded);
    if (row < PAGE_TOKENS) note_bad(w, 2 * ((page * PAGE_TOKENS + row) * heads + head) + side);
  }
}

static oscar_status refuse_row(oscar_sequence *s, int layer, int64_t bad, int64_t base, const char *why) {
  const int heads = s->cache->geometry.kv_heads;
  s->step_failed = true;
  return set_error(s->cache->geometry.context, OSCAR_NUMERIC, "layer %d, KV head %d, position %lld: the %s %s", layer,
                   (int)(bad / 2 % heads), (long long)(base + bad / 2 / heads), bad % 2 ? "value" : "key", why);
}

static oscar_status check_write(const oscar_sequence *s, int layer) {
  const struct cache_geometry *g = &s->cache->geometry;
  if (s->step_tokens == 0) return set_error(g->context, OSCAR_INVALID_ARGUMENT, "write without a step: call begin first");
  if (s->step_failed) return set_error(g->context, OSCAR_INVALID_ARGUMENT, "this step has failed and must be aborted");
  if (layer < 0 || layer >= g->layers)
    return set_error(g->context, OSCAR_INVALID_ARGUMENT, "layer %d; the cache has layers 0 to %d", layer, g->layers - 1);
  if (s->written[layer])
    return set_error(g->context, OSCAR_INVALID_ARGUMENT, "layer %d has been written in this step already", layer);
  return OSCAR_OK;
}

static oscar_status write_on_host(oscar_sequence *s, int layer, const float *k, const float *v) {
  const struct cache_geometry *g = &s->cache->geometry;
  struct writing w = {.s = s, .layer = layer, .k = k, .v = v, .bad = INT64_MAX};
  const int64_t rows = (int64_t)s->step_tokens * g->kv_heads;
  const int threads = g->context->options.threads;
  team_split(g->context, rows * g->head_dim > PARALLEL_ELEMENTS ? threads : 1, rows, store_rows, &w);
  if (w.bad != INT64_MAX) return refuse_row(s, layer, w.bad, s->length, "is not finite in BF16");
  if (encode_jobs(s) > 0) team_run(g->context, s->cache->plan.threads, encode_pages, &w);
  if (w.bad != INT64_MAX) return refuse_row(s, layer, w.bad, 0, "cannot be encoded: its scale leaves the range of fp16");
  return OSCAR_OK;
}

/* That rows of all of them may be written to the layer. */
static oscar_status check_writes(oscar_sequence *const *sequences, int count, int layer) {
  const oscar_cache *c = sequences[0]->cache;
  for (int i = 0; i < count; i++) {
    if (sequences[i]->cache != c)
      return set_error(c->geometry.context, OSCAR_INVALID_ARGUMENT, "sequence %d belongs to another cache than the first", i);
    oscar_status status = check_write(sequences[i], layer);
    if (status != OSCAR_OK) return status;
  }
  return OSCAR_OK;
}

static void note_written(oscar_sequence *s, int layer) {
  s->written[layer] = true;
  s->step_layers++;
}

oscar_status oscar_sequences_write(oscar_sequence *const *sequences, int count, int layer, const float *k, const float *v) {
  if (count < 1) return OSCAR_OK;
  oscar_cache *c = sequences[0]->cache;
  const size_t width = (size_t)c->geometry.kv_heads * (size_t)c->geometry.head_dim;
  oscar_status status = check_writes(sequences, count, layer);
  if (status != OSCAR_OK) return status;
  status = c->store ? device_store_write(sequences, count, layer, k, v) : OSCAR_OK;
  for (size_t i = 0, row = 0; i < (size_t)count && status == OSCAR_OK; row += (size_t)sequences[i++]->step_tokens) {
    if (!c->store && (status = write_on_host(sequences[i], layer, k + row * width, v + row * width)) != OSCAR_OK) break;
    note_written(sequences[i], layer);
  }
  debug_check(c);
  return status;
}

/* ---- rows that kernels of other rooms write ---- */

oscar_status sequences_make_ready(oscar_sequence *const *sequences, int count, struct device_step *step) {
  if (count < 1 || !sequences[0]->cache->store) return OSCAR_INVALID_ARGUMENT;
  for (int layer = 0; layer < sequences[0]->cache->geometry.layers; layer++) {
    oscar_status status = check_writes(sequences, count, layer);
    if (status != OSCAR_OK) return status;
  }
  return device_store_make_ready(sequences, count, step);
}

void sequences_note_written(oscar_sequence *const *sequences, int count) {
  for (int i = 0; i < count; i++)
    for (int layer = 0; layer < sequences[i]->cache->geometry.layers; layer++) note_written(sequences[i], layer);
}

oscar_status oscar_sequence_write(oscar_sequence *s, int layer, const float *k, const float *v) {
  return oscar_sequences_write(&s, 1, layer, k, v);
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
  oscar_status status = g->cuda ? device_store_check(s->cache) : OSCAR_OK;
  if (status != OSCAR_OK) {
    s->step_failed = true;
    return status;
  }
  s->cache->changes++;
  for (int64_t p = s->demoted_first; p < s->demoted_end; p++) {
    if (s->table[p].exact == NO_PAGE) continue;
    demote(s->cache, &s->table[p]);
    s->cache->demoted_pages++;
  }
  s->length += s->step_tokens;
  s->step_tokens = 0;
  if (s->tail) prefix_follow_commit(s);
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
