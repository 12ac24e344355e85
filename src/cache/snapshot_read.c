/*
 * snapshot_read.c - a file back into a sequence.
 *
 * The file is mapped. Opening checks the header, then everything up to the pages, whose place follows from their sizes; sizes are
 * compared with the file's before anything is believed. Restoring checks all pages first and only then asks the cache for room; a
 * page whose sums are right but whose frames are not (a false file) shows while pages are filled in, and the sequence,
 * which nobody has seen yet, is given back.
 */
#include "base/file.h"
#include "base/team.h"
#include "cache/cuda/store.h"
#include "cache/snapshot_format.h"

#include <errno.h>
#include <stdatomic.h>
#include <string.h>
#include <zstd.h>

#define PAGES_PER_THREAD 4 /* that a GPU's memory gets at a time */

struct oscar_snapshot {
  oscar_context *context;
  struct file_map map; /* empty: somebody else's bytes */
  const uint8_t *data;
  char *name, *text;
  struct snapshot_header header;
  struct snapshot_shape shape;
  const struct snapshot_page *table; /* [pages] */
  const uint8_t **record;            /* [pages] */
  oscar_snapshot_info info;
  char model[65], recipe[65], codecs[33];
};

#define REFUSE(s, status, ...) refuse((s)->context, (s)->name, set_error((s)->context, status, __VA_ARGS__))
static oscar_status refuse(oscar_context *context, const char *name, oscar_status status) {
  return prefix_error(context, status, "%s", name);
}

/* ---- opening ---- */

static oscar_status check_header(oscar_snapshot *s, size_t bytes) {
  const struct snapshot_header *h = &s->header;
  if (bytes < sizeof *h || memcmp(s->data, SNAPSHOT_MAGIC, sizeof h->magic) != 0)
    return REFUSE(s, OSCAR_FORMAT, "not a saved sequence: it does not begin as one");
  memcpy(&s->header, s->data, sizeof *h);
  if (h->byte_order != SNAPSHOT_BYTE_ORDER)
    return REFUSE(s, OSCAR_FORMAT, "the mark of its byte order is %08x; expected %08x", h->byte_order, SNAPSHOT_BYTE_ORDER);
  if (h->version != SNAPSHOT_VERSION)
    return REFUSE(s, OSCAR_UNSUPPORTED, "version %u of the format; this program reads version %d", h->version, SNAPSHOT_VERSION);
  const uint64_t sum = snapshot_checksum(h, offsetof(struct snapshot_header, checksum));
  if (sum != h->checksum)
    return REFUSE(s, OSCAR_FORMAT, "the header is damaged: its checksum is %016llx, the header says %016llx",
                  (unsigned long long)sum, (unsigned long long)h->checksum);
  if (h->file_bytes != bytes)
    return REFUSE(s, OSCAR_FORMAT, "the file has %zu bytes; expected %llu", bytes, (unsigned long long)h->file_bytes);
  return OSCAR_OK;
}

/* Numbers that a checksum does not vouch for: a false file. Bounds keep every later sum far from overflow. */
static oscar_status check_numbers(const oscar_snapshot *s) {
  const struct snapshot_header *h = &s->header;
  const int64_t bytes = (int64_t)h->file_bytes;
  if (bytes < 0 || h->layers < 1 || h->layers > 65536 || h->kv_heads < 1 || h->kv_heads > 65536 || h->head_dim < 16 ||
      h->head_dim > OSCAR_MAX_HEAD_DIM || h->head_dim % 16 != 0 || h->page_tokens != PAGE_TOKENS)
    return REFUSE(s, OSCAR_FORMAT, "%u layers, %u KV heads, head dimension %u, pages of %u tokens: no cache is like that",
                  h->layers, h->kv_heads, h->head_dim, h->page_tokens);
  /* A token takes a byte of its page at the least, an id four. */
  if (h->sink_pages > INT32_MAX || h->recent_pages > INT32_MAX || h->tokens < 0 || h->tokens > bytes || h->ids < h->tokens ||
      h->ids > bytes / 4 || h->text_bytes < 0 || h->text_bytes > bytes)
    return REFUSE(s, OSCAR_FORMAT, "%lld tokens, %lld ids and a text of %lld bytes do not go with a file of %lld bytes",
                  (long long)h->tokens, (long long)h->ids, (long long)h->text_bytes, (long long)bytes);
  if (h->refilled_from < 0 || h->refilled_from > snapshot_pages(h) || h->cold_tokens < 0 ||
      (h->cold_tokens > h->tokens && h->cold_tokens != INT64_MAX))
    return REFUSE(s, OSCAR_FORMAT, "refilled from page %lld and cold up to token %lld, but it has %lld tokens",
                  (long long)h->refilled_from, (long long)h->cold_tokens, (long long)h->tokens);
  return OSCAR_OK;
}

static oscar_status check_forms(const oscar_snapshot *s) {
  for (int i = 0; i < 2 * s->shape.layers; i++) {
    const struct snapshot_form *f = &s->shape.forms[i];
    const uint32_t most = (uint32_t)s->shape.head_dim * OSCAR_MAX_CRUMBS_PER_CHANNEL;
    if (f->crumbs > most || f->crumbs % 16 != 0 || f->groups > f->crumbs / 16 || f->meta_values > 2 ||
        (f->crumbs == 0) != (s->shape.forms[0].crumbs == 0) || (f->crumbs && !f->groups) || f->rotating_pairs > most)
      return REFUSE(s, OSCAR_FORMAT, "layer %d, %s: rows of %u crumbs in %u groups are not possible", i / 2,
                    i % 2 ? "values" : "keys", f->crumbs, f->groups);
  }
  return OSCAR_OK;
}

/* NULL, or why a page cannot have the form that the table says (sequence.c states which forms there are). */
static const char *form_violation(const oscar_snapshot *s, int64_t p) {
  const struct snapshot_header *h = &s->header;
  const int64_t sinks = h->sink_pages, recent = h->recent_pages;
  if (s->table[p].coded > 1 || s->table[p].zero) return "has no known form";
  const bool coded = s->table[p].coded, codecs = s->shape.forms[0].crumbs != 0;
  if (!codecs) return coded ? "is coded, and there are no codecs" : NULL;
  if ((p < sinks || (p + 1) * PAGE_TOKENS > h->tokens) && coded) return "is coded and has to be exact";
  if (p + recent >= h->tokens / PAGE_TOKENS && p >= h->refilled_from && coded) return "is coded and has to be exact";
  if (p >= sinks && p + recent < (h->tokens - 1) / PAGE_TOKENS && !coded) return "is exact and has to be coded";
  return NULL;
}

static oscar_status check_table(oscar_snapshot *s, size_t at) {
  const size_t end = (size_t)s->header.file_bytes;
  for (int64_t p = 0; p < snapshot_pages(&s->header); p++) {
    const char *wrong = form_violation(s, p);
    if (wrong) return REFUSE(s, OSCAR_FORMAT, "page %lld of %lld %s", (long long)p, (long long)snapshot_pages(&s->header), wrong);
    const bool coded = s->table[p].coded;
    const struct record_shape shape = record_shape_of(&s->shape, coded, rows_of_page(s->header.tokens, p));
    const uint64_t bytes = s->table[p].bytes;
    if (bytes < shape.raw_bytes || bytes - shape.raw_bytes > record_frames_bound(&shape) || bytes > end - at)
      return REFUSE(s, OSCAR_FORMAT, "page %lld has %llu bytes; expected at least %zu, and %zu are left", (long long)p,
                    (unsigned long long)bytes, shape.raw_bytes, end - at);
    s->record[p] = s->data + at;
    at += (size_t)bytes;
    s->info.exact_pages += !coded;
    s->info.coded_pages += coded;
  }
  return at == end ? OSCAR_OK : REFUSE(s, OSCAR_FORMAT, "%zu bytes follow the last page", end - at);
}

static oscar_status check_sections(oscar_snapshot *s) {
  const struct snapshot_header *h = &s->header;
  const size_t pages = (size_t)snapshot_pages(h), text_at = sizeof *h + snapshot_forms_bytes(h),
               ids_at = text_at + round_up((size_t)h->text_bytes, 8), table_at = ids_at + round_up((size_t)h->ids * 4, 8),
               pages_at = table_at + pages * sizeof *s->table;
  if (pages_at > h->file_bytes)
    return REFUSE(s, OSCAR_FORMAT, "its sections would end at byte %zu of %llu", pages_at, (unsigned long long)h->file_bytes);
  const uint64_t sum = snapshot_checksum(s->data + sizeof *h, pages_at - sizeof *h);
  if (sum != h->sections)
    return REFUSE(s, OSCAR_FORMAT,
                  "the forms, text, token ids or page table are damaged: their checksum is %016llx, expected %016llx",
                  (unsigned long long)sum, (unsigned long long)h->sections);
  s->shape = (struct snapshot_shape){(int)h->layers, (int)h->kv_heads, (int)h->head_dim, (const void *)(s->data + sizeof *h)};
  s->table = (const void *)(s->data + table_at);
  oscar_status status = check_forms(s);
  if (status != OSCAR_OK) return status;
  s->record = mem_alloc(s->context, pages, sizeof *s->record);
  s->text = s->record ? mem_alloc(s->context, (size_t)h->text_bytes + 1, 1) : NULL;
  if (!s->text) return OSCAR_NO_MEMORY;
  memcpy(s->text, s->data + text_at, (size_t)h->text_bytes);
  s->text[h->text_bytes] = '\0';
  s->info.ids = (const void *)(s->data + ids_at);
  return check_table(s, pages_at);
}

static void fill_info(oscar_snapshot *s) {
  const struct snapshot_header *h = &s->header;
  memcpy(s->model, h->model, sizeof h->model);
  memcpy(s->recipe, h->recipe, sizeof h->recipe);
  for (int i = 0; i < 16 && s->shape.forms[0].crumbs; i++) snprintf(s->codecs + 2 * i, 3, "%02x", h->codecs[i]);
  oscar_snapshot_info *info = &s->info;
  info->layers = s->shape.layers, info->kv_heads = s->shape.kv_heads, info->head_dim = s->shape.head_dim;
  info->sink_pages = (int)h->sink_pages, info->recent_pages = (int)h->recent_pages;
  info->tokens = h->tokens, info->n_ids = h->ids, info->saved_at = h->saved_at;
  info->model = s->model, info->recipe = s->recipe, info->codecs = s->codecs;
  info->text = s->text, info->text_bytes = (size_t)h->text_bytes;
  info->file_bytes = (size_t)h->file_bytes;
}

oscar_status snapshot_parse(oscar_context *context, const char *name, const uint8_t *data, size_t bytes,
                            oscar_snapshot **snapshot) {
  *snapshot = NULL;
  oscar_snapshot *s = mem_zalloc(context, 1, sizeof *s);
  if (!s) return OSCAR_NO_MEMORY;
  s->context = context;
  s->data = data;
  s->name = mem_strdup(context, name);
  oscar_status status = s->name ? check_header(s, bytes) : OSCAR_NO_MEMORY;
  if (status == OSCAR_OK) status = check_numbers(s);
  if (status == OSCAR_OK) status = check_sections(s);
  if (status != OSCAR_OK) {
    oscar_snapshot_close(s);
    return status;
  }
  fill_info(s);
  *snapshot = s;
  return OSCAR_OK;
}

oscar_status oscar_snapshot_open_bytes(oscar_context *context, const char *name, const void *data, size_t bytes,
                                       oscar_snapshot **snapshot) {
  *snapshot = NULL;
  if (!data || (uintptr_t)data % 8 != 0)
    return set_error(context, OSCAR_INVALID_ARGUMENT, "%s: the bytes of a snapshot have to be aligned to 8", name);
  return snapshot_parse(context, name, data, bytes, snapshot);
}

oscar_status oscar_snapshot_open(oscar_context *context, const char *path, oscar_snapshot **snapshot) {
  *snapshot = NULL;
  struct file_map map;
  oscar_status status = file_map_open(context, path, &map);
  if (status != OSCAR_OK) return status;
  status = snapshot_parse(context, path, map.data, map.bytes, snapshot);
  if (status == OSCAR_OK)
    (*snapshot)->map = map;
  else
    file_map_close(&map);
  return status;
}

oscar_status oscar_snapshot_is_one(oscar_context *context, const char *path, bool *is) {
  char begin[sizeof((struct snapshot_header *)NULL)->magic];
  *is = false;
  FILE *file = fopen(path, "rbe");
  if (!file) return set_error(context, OSCAR_IO, "%s: %s", path, strerror(errno));
  const size_t n = fread(begin, 1, sizeof begin, file);
  const int error = ferror(file) ? errno : 0;
  fclose(file);
  if (error) return set_error(context, OSCAR_IO, "%s: %s", path, strerror(error));
  *is = n == sizeof begin && memcmp(begin, SNAPSHOT_MAGIC, sizeof begin) == 0;
  return OSCAR_OK;
}

void oscar_snapshot_close(oscar_snapshot *s) {
  if (!s) return;
  file_map_close(&s->map);
  mem_free(s->context, s->record);
  mem_free(s->context, s->text);
  mem_free(s->context, s->name);
  mem_free(s->context, s);
}

const oscar_snapshot_info *oscar_snapshot_describe(const oscar_snapshot *s) { return &s->info; }

/* ---- pages ---- */

struct worker {
  uint8_t *rows, *frames; /* frames: decompressed */
  ZSTD_DCtx *zstd;
};

struct reading {
  const oscar_snapshot *s;
  oscar_sequence *sequence; /* NULL: pages are only looked at */
  int workers, slots;
  struct worker *worker;
  uint8_t *staging; /* [slots][staging_bytes], for a GPU */
  size_t staging_bytes;
  int64_t first, end;
  team_counter jobs;
  _Atomic int64_t bad; /* the least page that is wrong, or INT64_MAX */
};

static void note_bad(struct reading *r, int64_t page) {
  int64_t least = atomic_load(&r->bad);
  while (page < least && !atomic_compare_exchange_weak(&r->bad, &least, page)) {}
}

static void check_sums(void *arg, int member, int members) {
  (void)member, (void)members;
  struct reading *r = arg;
  for (int64_t p; (p = team_take(&r->jobs)) < r->end;)
    if (snapshot_checksum(r->s->record[p], (size_t)r->s->table[p].bytes) != r->s->table[p].checksum) note_bad(r, p);
}

static struct page_place place_of(const struct reading *r, int64_t p) {
  const struct page_entry *entry = &r->sequence->table[p];
  const bool coded = entry->exact == NO_PAGE;
  return (struct page_place){r->sequence->cache, coded, coded ? entry->coded : entry->exact,
                             r->staging ? r->staging + (size_t)(p - r->first) * r->staging_bytes : NULL};
}

static void read_pages(void *arg, int member, int members) {
  (void)members;
  struct reading *r = arg;
  const oscar_snapshot *s = r->s;
  struct worker *w = &r->worker[member];
  for (int64_t p; (p = r->first + team_take(&r->jobs)) < r->end;) {
    const struct record_shape shape = record_shape_of(&s->shape, s->table[p].coded, rows_of_page(s->header.tokens, p));
    const size_t bytes = record_unpacked_bytes(&shape); /* of all frames: the library takes what is one after the other at once */
    const size_t unpacked = ZSTD_decompressDCtx(w->zstd, w->frames, bytes, s->record[p] + shape.raw_bytes,
                                                (size_t)s->table[p].bytes - shape.raw_bytes);
    if (ZSTD_isError(unpacked) || unpacked != bytes) {
      note_bad(r, p);
    } else if (r->sequence) {
      const struct page_place place = place_of(r, p);
      if (place.staging && shape.rows < PAGE_TOKENS) memset(place.staging, 0, r->staging_bytes);
      page_join(&s->shape, &place, shape.rows, w->rows, s->record[p], w->frames);
    }
  }
}

static oscar_status make_workers(struct reading *r) {
  const oscar_snapshot *s = r->s;
  const struct record_shape exact = record_shape_of(&s->shape, false, PAGE_TOKENS),
                            coded = record_shape_of(&s->shape, true, PAGE_TOKENS);
  const size_t frames = (size_t)max64((int64_t)record_unpacked_bytes(&exact), (int64_t)record_unpacked_bytes(&coded));
  r->workers = (int)max64(1, min64(s->context->options.threads, snapshot_pages(&s->header)));
  r->worker = mem_zalloc(s->context, (size_t)r->workers, sizeof *r->worker);
  if (!r->worker) return OSCAR_NO_MEMORY;
  for (int i = 0; i < r->workers; i++) {
    struct worker *w = &r->worker[i];
    w->rows = mem_alloc(s->context, snapshot_rows_bytes(&s->shape), 1);
    w->frames = w->rows ? mem_alloc(s->context, frames, 1) : NULL;
    if (!w->frames) return OSCAR_NO_MEMORY;
    if (!(w->zstd = ZSTD_createDCtx())) return set_error(s->context, OSCAR_NO_MEMORY, "out of memory for decompression");
  }
  return OSCAR_OK;
}

static oscar_status make_staging(struct reading *r, const oscar_cache *c) {
  r->slots = (int)max64(1, min64((int64_t)r->workers * PAGES_PER_THREAD, snapshot_pages(&r->s->header)));
  r->staging_bytes = round_up(page_staging_bytes(c), 64);
  r->staging = mem_alloc(r->s->context, (size_t)r->slots, r->staging_bytes);
  if (r->staging) mem_advise_large_pages(r->staging, (size_t)r->slots * r->staging_bytes);
  return r->staging ? OSCAR_OK : OSCAR_NO_MEMORY;
}

static void free_parts(struct reading *r) {
  for (int i = 0; r->worker && i < r->workers; i++) {
    mem_free(r->s->context, r->worker[i].rows);
    mem_free(r->s->context, r->worker[i].frames);
    ZSTD_freeDCtx(r->worker[i].zstd);
  }
  mem_free(r->s->context, r->staging);
  mem_free(r->s->context, r->worker);
}

static oscar_status damaged(const struct reading *r, const char *how) {
  return REFUSE(r->s, OSCAR_FORMAT, "page %lld of %lld (%s) is damaged: %s", (long long)r->bad,
                (long long)snapshot_pages(&r->s->header), r->s->table[r->bad].coded ? "coded" : "exact", how);
}

static oscar_status check_all_sums(struct reading *r) {
  r->end = snapshot_pages(&r->s->header);
  r->jobs = (team_counter){0};
  team_run(r->s->context, r->workers, check_sums, r);
  return r->bad == INT64_MAX ? OSCAR_OK : damaged(r, "it does not have the checksum of the page table");
}

static oscar_status read_all(struct reading *r) {
  const int64_t pages = snapshot_pages(&r->s->header);
  oscar_status status = OSCAR_OK;
  for (r->first = 0; r->first < pages && status == OSCAR_OK; r->first = r->end) {
    r->end = r->staging ? min64(pages, r->first + r->slots) : pages;
    r->jobs = (team_counter){0};
    team_run(r->s->context, r->workers, read_pages, r);
    if (r->bad != INT64_MAX) return damaged(r, "what it holds compressed cannot be read");
    for (int64_t p = r->first; p < r->end && r->staging && status == OSCAR_OK; p++) {
      const struct page_place place = place_of(r, p);
      status = page_upload(&place);
    }
  }
  return status;
}

oscar_status oscar_snapshot_check(const oscar_snapshot *s) {
  struct reading r = {.s = s, .bad = INT64_MAX};
  oscar_status status = make_workers(&r);
  if (status == OSCAR_OK) status = check_all_sums(&r);
  if (status == OSCAR_OK) status = read_all(&r);
  free_parts(&r);
  return status;
}

/* ---- restoring ---- */

static oscar_status check_cache(const oscar_snapshot *s, const oscar_cache *c, const char *model) {
  const struct cache_geometry *g = &c->geometry;
  const oscar_snapshot_info *i = &s->info;
  if (g->context != s->context) return set_error(s->context, OSCAR_INVALID_ARGUMENT, "the cache belongs to another context");
  if (model && *model && *i->model && strcmp(model, i->model) != 0)
    return REFUSE(s, OSCAR_MISMATCH, "saved with another model: its fingerprint is %.16s..., that of this model is %.16s...",
                  i->model, model);
  if (i->layers != g->layers || i->kv_heads != g->kv_heads || i->head_dim != g->head_dim)
    return REFUSE(s, OSCAR_MISMATCH,
                  "saved from a cache of %d layers, %d KV heads, head dimension %d; this one has %d, %d and %d", i->layers,
                  i->kv_heads, i->head_dim, g->layers, g->kv_heads, g->head_dim);
  if (i->sink_pages != g->sink_pages || i->recent_pages != g->recent_pages)
    return REFUSE(s, OSCAR_MISMATCH, "saved with windows of %lld first and %lld latest tokens; this cache has %lld and %lld",
                  (long long)i->sink_pages * PAGE_TOKENS, (long long)i->recent_pages * PAGE_TOKENS,
                  (long long)g->sink_pages * PAGE_TOKENS, (long long)g->recent_pages * PAGE_TOKENS);
  const char *recipe = g->filter ? "a page filter" : g->codecs ? oscar_codec_set_describe(g->codecs)->recipe : "bf16";
  if (g->filter || (*i->codecs != '\0') != (g->codecs != NULL))
    return REFUSE(s, OSCAR_MISMATCH, "saved from a cache of form %s; this one is %s", i->recipe, recipe);
  if (!g->codecs) return OSCAR_OK;
  if (memcmp(c->codecs, s->header.codecs, sizeof c->codecs) != 0)
    return REFUSE(s, OSCAR_MISMATCH,
                  "saved with other codecs (%s, fingerprint %s) than this cache's (%s): codes would mean something else",
                  i->recipe, i->codecs, recipe);
  for (int k = 0; k < 2 * g->layers; k++) {
    const struct side_form *f = &c->layers[k / 2].form[k % 2];
    const struct snapshot_form *saved = &s->shape.forms[k];
    if ((uint32_t)f->crumbs != saved->crumbs || (uint32_t)f->groups != saved->groups ||
        (uint32_t)f->meta_values != saved->meta_values || (uint32_t)f->rotating_pairs != saved->rotating_pairs)
      return REFUSE(s, OSCAR_FORMAT, "layer %d: the forms of its rows are not those of the codecs it names", k / 2);
  }
  return OSCAR_OK;
}

static oscar_status check_room(const oscar_snapshot *s, oscar_cache *c) {
  const int64_t units = s->info.exact_pages * c->plan.run + s->info.coded_pages;
  const size_t bytes = c->plan.sequence_bytes + plan_table_bytes(snapshot_pages(&s->header));
  if (cache_has_room(c, units, bytes)) return OSCAR_OK;
  return refuse(s->context, s->name, cache_full(c, "the saved sequence", units, bytes));
}

static oscar_status take_pages(const oscar_snapshot *s, oscar_cache *c, oscar_sequence **sequence) {
  const int64_t pages = snapshot_pages(&s->header);
  oscar_status status = sequence_make(c, pages, sequence);
  if (status != OSCAR_OK) return status;
  oscar_sequence *q = *sequence;
  c->changes++;
  for (int64_t p = 0; p < pages; p++) {
    const bool coded = s->table[p].coded;
    const int32_t page = coded ? cache_take_coded(c) : cache_take_exact(c); /* may move codes of entries that are counted */
    q->table[p] = coded ? (struct page_entry){NO_PAGE, page} : (struct page_entry){page, NO_PAGE};
    q->pages = p + 1;
  }
  q->length = s->header.tokens;
  q->refilled_from = s->header.refilled_from;
  q->cold_tokens = s->header.cold_tokens;
  return OSCAR_OK;
}

oscar_status oscar_snapshot_restore(const oscar_snapshot *s, oscar_cache *c, const char *model, oscar_sequence **sequence) {
  *sequence = NULL;
  struct reading r = {.s = s, .bad = INT64_MAX};
  oscar_status status = check_cache(s, c, model);
  if (status == OSCAR_OK) status = check_room(s, c); /* before all that takes time: who is refused makes room and comes again */
  if (status == OSCAR_OK) status = make_workers(&r);
  if (status == OSCAR_OK && c->store) status = make_staging(&r, c);
  if (status == OSCAR_OK) status = check_all_sums(&r);
  if (status == OSCAR_OK) status = take_pages(s, c, &r.sequence);
  if (status == OSCAR_OK) status = read_all(&r);
  if (status == OSCAR_OK && c->store) status = oscar_cuda_wait(c->geometry.cuda);
  free_parts(&r);
  if (status != OSCAR_OK) {
    oscar_sequence_free(r.sequence);
    return status;
  }
  cache_note_peak(c);
  debug_check(c);
  *sequence = r.sequence;
  return OSCAR_OK;
}

/* ---- copying ---- */

/* Header, forms, text, ids and page table with another text, and where the pages begin. */
static uint8_t *make_front(const oscar_snapshot *s, const void *text, size_t text_bytes, size_t *bytes) {
  struct snapshot_header h = s->header;
  const size_t forms = snapshot_forms_bytes(&h), ids = round_up((size_t)h.ids * sizeof(int32_t), 8),
               table = (size_t)snapshot_pages(&h) * sizeof *s->table,
               before = sizeof h + forms + round_up((size_t)h.text_bytes, 8);
  *bytes = sizeof h + forms + round_up(text_bytes, 8) + ids + table;
  uint8_t *front = mem_zalloc(s->context, 1, *bytes), *at = front;
  if (!front) return NULL;
  h.file_bytes = h.file_bytes - (before + ids + table) + *bytes;
  h.text_bytes = (int64_t)text_bytes;
  at += sizeof h;
  memcpy(at, s->data + sizeof h, forms), at += forms;
  if (text_bytes) memcpy(at, text, text_bytes);
  at += round_up(text_bytes, 8);
  memcpy(at, s->data + before, ids + table);
  h.sections = snapshot_checksum(front + sizeof h, *bytes - sizeof h);
  h.checksum = snapshot_checksum(&h, offsetof(struct snapshot_header, checksum));
  memcpy(front, &h, sizeof h);
  return front;
}

static oscar_status copy(const oscar_snapshot *s, const void *text, size_t text_bytes, const char *name,
                         oscar_snapshot_write *write, void *user) {
  size_t bytes;
  uint8_t *front = make_front(s, text, text_bytes, &bytes);
  if (!front) return OSCAR_NO_MEMORY;
  const int64_t pages = snapshot_pages(&s->header);
  const uint8_t *first = pages ? s->record[0] : NULL;
  const size_t rest = pages ? (size_t)(s->data + s->header.file_bytes - first) : 0;
  errno = 0;
  const bool written = write(user, 0, front, bytes) && (rest == 0 || write(user, bytes, first, rest));
  const int why = errno;
  mem_free(s->context, front);
  if (written) return OSCAR_OK;
  return set_error(s->context, why == ENOMEM ? OSCAR_NO_MEMORY : OSCAR_IO, "%s: cannot be written: %s", name, strerror(why));
}

oscar_status oscar_snapshot_copy_to(const oscar_snapshot *s, const void *text, size_t text_bytes, oscar_snapshot_write *write,
                                    void *user) {
  return copy(s, text, text_bytes, "the snapshot", write, user);
}

oscar_status oscar_snapshot_copy(const oscar_snapshot *s, const void *text, size_t text_bytes, const char *path) {
  struct file_writer writer;
  oscar_status status = file_writer_open(s->context, path, &writer);
  if (status != OSCAR_OK) return status;
  status = copy(s, text, text_bytes, path, snapshot_write_file, &writer);
  if (status == OSCAR_OK) return file_writer_commit(s->context, &writer);
  file_writer_abort(s->context, &writer);
  return status;
}
