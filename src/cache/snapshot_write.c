/*
 * snapshot_write.c - a sequence into a file, or wherever its bytes are wanted.
 *
 * Pages are cut, compressed and summed by all threads of the context, some at a time, and written in order while the next are
 * made. Header and page table, which need what comes out of that, are written last, into room that was left for them. Of a file
 * the kernel is asked to begin every few MiB, so that the sync at the end finds little left to do; it gets its name when all of
 * it is on disk.
 */
#include "base/file.h"
#include "base/team.h"
#include "cache/snapshot_format.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <time.h>
#include <zstd.h>

#define PAGES_PER_THREAD 4          /* in a lot, */
#define LOT_BYTES        (64 << 20) /* unless they need more than this: then one */
#define HINT_SHIFT       22         /* the disk is asked to begin every 4 MiB */

struct slot {      /* a page of the lot */
  uint8_t *record; /* of the records' block */
  uint8_t *staging;
  struct snapshot_page entry;
};

struct worker {
  uint8_t *rows, *frames; /* frames: before compression */
  ZSTD_CCtx *zstd;
};

struct saving {
  oscar_context *context;
  const oscar_sequence *sequence;
  uint8_t *const *copies; /* [pages], or NULL: pages are in the cache */
  const oscar_snapshot_contents *contents;
  const char *name; /* for errors */
  oscar_snapshot_write *write;
  void *user;
  struct snapshot_header header;
  struct snapshot_form *forms;
  struct snapshot_page *table; /* [pages] */
  struct snapshot_shape shape;
  uint64_t position; /* bytes written */

  int workers, slots;
  size_t frames_room; /* of a page's frames, compressed */
  struct worker *worker;
  uint8_t *block;      /* records and staging copies of all slots */
  struct lot {         /* of pages: the one that is made, and the one before, which is written meanwhile */
    struct slot *slot; /* [slots] */
    int64_t first;     /* page */
    int pages;
  } lots[2], *made, *written;
  team_counter jobs;
  _Atomic bool failed;
  oscar_status status; /* of writing */
};

static oscar_status check_arguments(const oscar_sequence *s, const oscar_snapshot_contents *c) {
  const struct cache_geometry *g = &s->cache->geometry;
  const char *model = c->model ? c->model : "";
  if (s->step_tokens) return set_error(g->context, OSCAR_INVALID_ARGUMENT, "a sequence cannot be saved while a step is open");
  if (g->filter)
    return set_error(g->context, OSCAR_UNSUPPORTED, "a sequence of a cache with a page filter cannot be saved: it has no codes");
  if (c->n_ids < s->length || (c->n_ids > 0 && !c->ids))
    return set_error(g->context, OSCAR_INVALID_ARGUMENT, "%lld token ids for a sequence of %lld tokens", (long long)c->n_ids,
                     (long long)s->length);
  if (strlen(model) > sizeof((struct snapshot_header){0}).model)
    return set_error(g->context, OSCAR_INVALID_ARGUMENT, "the fingerprint of the model has %zu bytes; at most 64 are possible",
                     strlen(model));
  return OSCAR_OK;
}

static oscar_status describe(struct saving *s) {
  const oscar_sequence *q = s->sequence;
  const oscar_cache *c = q->cache;
  const struct cache_geometry *g = &c->geometry;
  struct snapshot_header *h = &s->header;
  *h = (struct snapshot_header){.version = SNAPSHOT_VERSION,
                                .byte_order = SNAPSHOT_BYTE_ORDER,
                                .layers = (uint32_t)g->layers,
                                .kv_heads = (uint32_t)g->kv_heads,
                                .head_dim = (uint32_t)g->head_dim,
                                .sink_pages = (uint32_t)g->sink_pages,
                                .recent_pages = (uint32_t)g->recent_pages,
                                .page_tokens = PAGE_TOKENS,
                                .tokens = q->length,
                                .ids = s->contents->n_ids,
                                .text_bytes = (int64_t)s->contents->text_bytes,
                                .saved_at = (int64_t)time(NULL),
                                .refilled_from = q->refilled_from,
                                .cold_tokens = q->cold_tokens};
  memcpy(h->magic, SNAPSHOT_MAGIC, sizeof h->magic);
  if (s->contents->model) memcpy(h->model, s->contents->model, strlen(s->contents->model));
  const char *recipe = g->codecs ? oscar_codec_set_describe(g->codecs)->recipe : "bf16";
  memcpy(h->recipe, recipe, strlen(recipe)); /* at most 63 bytes */
  memcpy(h->codecs, c->codecs, sizeof h->codecs);
  s->forms = mem_zalloc(s->context, (size_t)g->layers * 2, sizeof *s->forms);
  s->table = s->forms ? mem_zalloc(s->context, (size_t)q->pages, sizeof *s->table) : NULL;
  if (!s->table) return OSCAR_NO_MEMORY;
  for (int i = 0; g->codecs && i < 2 * g->layers; i++) {
    const struct side_form *form = &c->layers[i / 2].form[i % 2];
    s->forms[i] = (struct snapshot_form){(uint32_t)form->crumbs, (uint32_t)form->groups, (uint32_t)form->meta_values,
                                         (uint32_t)form->rotating_pairs};
  }
  s->shape = (struct snapshot_shape){g->layers, g->kv_heads, g->head_dim, s->forms};
  return OSCAR_OK;
}

/* ---- pages ---- */

/* Matches are rare here and cost time where they are found: only long ones are looked for, in a small table. */
static ZSTD_CCtx *make_compressor(void) {
  ZSTD_CCtx *zstd = ZSTD_createCCtx();
  if (!zstd) return NULL;
  ZSTD_CCtx_setParameter(zstd, ZSTD_c_compressionLevel, 1);
  ZSTD_CCtx_setParameter(zstd, ZSTD_c_minMatch, 7);
  ZSTD_CCtx_setParameter(zstd, ZSTD_c_hashLog, 8);
  return zstd;
}

static oscar_status make_workers(struct saving *s) {
  const oscar_cache *c = s->sequence->cache;
  const struct record_shape exact = record_shape_of(&s->shape, false, PAGE_TOKENS),
                            coded = record_shape_of(&s->shape, true, PAGE_TOKENS);
  const size_t frames = (size_t)max64((int64_t)record_unpacked_bytes(&exact), (int64_t)record_unpacked_bytes(&coded));
  s->workers = (int)max64(1, min64(s->context->options.threads, s->sequence->pages));
  s->frames_room = record_frames_bound(&exact);
  if (s->frames_room < record_frames_bound(&coded)) s->frames_room = record_frames_bound(&coded);
  s->worker = mem_zalloc(s->context, (size_t)s->workers, sizeof *s->worker);
  if (!s->worker) return OSCAR_NO_MEMORY;
  for (int i = 0; i < s->workers; i++) {
    struct worker *w = &s->worker[i];
    w->rows = mem_alloc(s->context, snapshot_rows_bytes(&s->shape), 1);
    w->frames = w->rows ? mem_alloc(s->context, frames, 1) : NULL;
    if (!w->frames) return OSCAR_NO_MEMORY;
    if (!(w->zstd = make_compressor())) return set_error(s->context, OSCAR_NO_MEMORY, "out of memory for compression");
  }
  const size_t raw = exact.raw_bytes > coded.raw_bytes ? exact.raw_bytes : coded.raw_bytes;
  const size_t record = round_up(raw + s->frames_room, 64),
               staging = c->store && !s->copies ? round_up(page_staging_bytes(c), 64) : 0, bytes = record + staging;
  const int64_t most = max64(s->workers, min64((int64_t)s->workers * PAGES_PER_THREAD, LOT_BYTES / (int64_t)bytes));
  s->slots = (int)min64(most, s->sequence->pages);
  const size_t slots = 2 * (size_t)s->slots;
  struct slot *slot = s->lots[0].slot = mem_zalloc(s->context, slots, sizeof *slot);
  s->block = slot ? mem_alloc(s->context, slots, bytes) : NULL;
  if (!s->block) return OSCAR_NO_MEMORY;
  mem_advise_large_pages(s->block, slots * bytes); /* taking small ones would take longer than the copying */
  for (size_t i = 0; i < slots; i++) {
    slot[i].record = s->block + i * bytes;
    if (staging) slot[i].staging = slot[i].record + record;
  }
  s->lots[1].slot = slot + s->slots;
  s->made = &s->lots[0], s->written = &s->lots[1];
  return OSCAR_OK;
}

static struct page_place place_of(const struct saving *s, int i) {
  const int64_t p = s->made->first + i;
  const struct page_entry *entry = &s->sequence->table[p];
  const bool coded = entry->exact == NO_PAGE;
  return (struct page_place){s->sequence->cache, coded, coded ? entry->coded : entry->exact,
                             s->copies ? s->copies[p] : s->made->slot[i].staging};
}

static void make_records(struct saving *s, struct worker *w) {
  for (int64_t i; (i = team_take(&s->jobs)) < s->made->pages;) {
    struct slot *slot = &s->made->slot[i];
    const struct page_place place = place_of(s, (int)i);
    const int rows = rows_of_page(s->sequence->length, s->made->first + i);
    const struct record_shape shape = record_shape_of(&s->shape, place.coded, rows);
    page_split(&s->shape, &place, shape.rows, w->rows, slot->record, w->frames);
    size_t bytes = shape.raw_bytes;
    const uint8_t *frame = w->frames;
    for (int k = 0; k < 2 && shape.frame_bytes[k]; frame += shape.frame_bytes[k++]) {
      const size_t room = s->frames_room - (bytes - shape.raw_bytes);
      const size_t packed = ZSTD_compress2(w->zstd, slot->record + bytes, room, frame, shape.frame_bytes[k]);
      if (ZSTD_isError(packed)) { /* memory: everything else has been seen to */
        s->failed = true;
        return;
      }
      bytes += packed;
    }
    slot->entry = (struct snapshot_page){place.coded, 0, bytes, snapshot_checksum(slot->record, bytes)};
  }
}

/* ---- the file ---- */

static oscar_status put(struct saving *s, const void *data, size_t bytes) {
  errno = 0;
  if (bytes && !s->write(s->user, s->position, data, bytes))
    return set_error(s->context, errno == ENOMEM ? OSCAR_NO_MEMORY : OSCAR_IO, "%s: cannot be written: %s", s->name,
                     strerror(errno));
  s->position += bytes;
  return OSCAR_OK;
}

static oscar_status put_lot(struct saving *s, const struct lot *lot) {
  oscar_status status = OSCAR_OK;
  for (int i = 0; i < lot->pages && status == OSCAR_OK; i++) {
    s->table[lot->first + i] = lot->slot[i].entry;
    status = put(s, lot->slot[i].record, (size_t)lot->slot[i].entry.bytes);
  }
  return status;
}

/* The caller's thread writes the lot before, then helps the others. */
static void make_and_write(void *arg, int member, int members) {
  (void)members;
  struct saving *s = arg;
  if (member == 0) s->status = put_lot(s, s->written);
  make_records(s, &s->worker[member]);
}

static oscar_status next_lot(struct saving *s) {
  oscar_status status = OSCAR_OK;
  for (int i = 0; i < s->made->pages && s->sequence->cache->store && !s->copies && status == OSCAR_OK; i++) {
    const struct page_place place = place_of(s, i);
    status = page_copy(&place);
  }
  if (status != OSCAR_OK) return status;
  s->jobs = (team_counter){0};
  team_run(s->context, s->workers, make_and_write, s);
  if (s->status == OSCAR_OK && s->failed) return set_error(s->context, OSCAR_NO_MEMORY, "out of memory for compression");
  return s->status;
}

/* Everything before the pages. The first time it only takes its room: the page table is still empty. */
static oscar_status put_front(struct saving *s) {
  const oscar_snapshot_contents *c = s->contents;
  static const uint8_t zeros[8] = {0};
  oscar_status status = put(s, &s->header, sizeof s->header);
  if (status == OSCAR_OK) status = put(s, s->forms, snapshot_forms_bytes(&s->header));
  if (status == OSCAR_OK) status = put(s, c->text, c->text_bytes);
  if (status == OSCAR_OK) status = put(s, zeros, round_up(c->text_bytes, 8) - c->text_bytes);
  const size_t ids = (size_t)c->n_ids * sizeof *c->ids;
  if (status == OSCAR_OK) status = put(s, c->ids, ids);
  if (status == OSCAR_OK) status = put(s, zeros, round_up(ids, 8) - ids);
  return status == OSCAR_OK ? put(s, s->table, (size_t)s->sequence->pages * sizeof *s->table) : status;
}

/* The checksum of the sections is that of their bytes one after the other: they are read back. */
static oscar_status finish_front(struct saving *s, size_t front) {
  s->header.file_bytes = s->position;
  s->position = 0;
  uint8_t *sections = mem_alloc(s->context, front, 1);
  if (!sections) return OSCAR_NO_MEMORY;
  uint8_t *at = sections;
  const oscar_snapshot_contents *c = s->contents;
  memset(sections, 0, front);
  const size_t ids = (size_t)c->n_ids * sizeof *c->ids, table = (size_t)s->sequence->pages * sizeof *s->table;
  memcpy(at, s->forms, snapshot_forms_bytes(&s->header)), at += snapshot_forms_bytes(&s->header);
  if (c->text_bytes) memcpy(at, c->text, c->text_bytes);
  at += round_up(c->text_bytes, 8);
  if (ids) memcpy(at, c->ids, ids);
  at += round_up(ids, 8);
  if (table) memcpy(at, s->table, table);
  s->header.sections = snapshot_checksum(sections, front);
  s->header.checksum = snapshot_checksum(&s->header, offsetof(struct snapshot_header, checksum));
  oscar_status status = put(s, &s->header, sizeof s->header);
  if (status == OSCAR_OK) status = put(s, sections, front);
  mem_free(s->context, sections);
  return status;
}

static oscar_status write_all(struct saving *s) {
  oscar_status status = put_front(s);
  const size_t front = (size_t)s->position - sizeof s->header;
  for (int64_t first = 0; first < s->sequence->pages && status == OSCAR_OK; first += s->written->pages) {
    s->made->first = first;
    s->made->pages = (int)min64(s->slots, s->sequence->pages - first);
    status = next_lot(s);
    struct lot *made = s->made;
    s->made = s->written, s->written = made;
  }
  if (status == OSCAR_OK) status = put_lot(s, s->written);
  return status == OSCAR_OK ? finish_front(s, front) : status;
}

static void free_parts(struct saving *s) {
  for (int i = 0; s->worker && i < s->workers; i++) {
    mem_free(s->context, s->worker[i].rows);
    mem_free(s->context, s->worker[i].frames);
    ZSTD_freeCCtx(s->worker[i].zstd);
  }
  mem_free(s->context, s->block);
  mem_free(s->context, s->lots[0].slot);
  mem_free(s->context, s->worker);
  mem_free(s->context, s->table);
  mem_free(s->context, s->forms);
}

static oscar_status save(struct saving *s) {
  oscar_status status = describe(s);
  if (status == OSCAR_OK) status = make_workers(s);
  if (status == OSCAR_OK) status = write_all(s);
  free_parts(s);
  return status;
}

oscar_status oscar_sequence_save_to(const oscar_sequence *sequence, const oscar_snapshot_contents *contents,
                                    oscar_snapshot_write *write, void *user) {
  struct saving s = {.context = sequence->cache->geometry.context,
                     .sequence = sequence,
                     .contents = contents,
                     .name = "the snapshot",
                     .write = write,
                     .user = user};
  const oscar_status status = check_arguments(sequence, contents);
  return status == OSCAR_OK ? save(&s) : status;
}

bool snapshot_write_file(void *user, uint64_t offset, const void *data, size_t bytes) {
  struct file_writer *writer = user;
  if (ftello(writer->stream) != (off_t)offset && fseeko(writer->stream, (off_t)offset, SEEK_SET) != 0) return false;
  if (fwrite(data, 1, bytes, writer->stream) != bytes) return false;
#ifdef SYNC_FILE_RANGE_WRITE
  if (offset >> HINT_SHIFT != (offset + bytes) >> HINT_SHIFT)
    (void)sync_file_range(fileno(writer->stream), 0, 0, SYNC_FILE_RANGE_WRITE);
#endif
  return true;
}

static oscar_status save_file(const struct saving *given, const char *path) {
  struct saving s = *given;
  struct file_writer writer;
  oscar_status status = file_writer_open(s.context, path, &writer);
  if (status != OSCAR_OK) return status;
  s.name = path;
  s.write = snapshot_write_file;
  s.user = &writer;
  status = save(&s);
  if (status == OSCAR_OK) return file_writer_commit(s.context, &writer);
  file_writer_abort(s.context, &writer);
  return status;
}

oscar_status oscar_sequence_save(const oscar_sequence *sequence, const oscar_snapshot_contents *contents, const char *path) {
  const struct saving s = {.context = sequence->cache->geometry.context, .sequence = sequence, .contents = contents};
  const oscar_status status = check_arguments(sequence, contents);
  return status == OSCAR_OK ? save_file(&s, path) : status;
}

/* ---- for later ---- */

/* One block of memory holds all: this, a sequence that is in no list and whose table tells forms alone, where its pages are, its
 * contents, the pages. What is read of the cache besides, geometry, codecs and forms of layers, never changes. */
struct oscar_capture {
  oscar_context *context;
  size_t bytes;
  oscar_snapshot_contents contents;
  uint8_t **pages; /* [sequence->pages] */
  oscar_sequence *sequence;
};

#define APART 64 /* bytes, that every part and page begins at a multiple of */

static size_t text_room(const char *text) { return round_up(text ? strlen(text) + 1 : 0, APART); }

size_t oscar_sequence_capture_bytes(const oscar_sequence *q, const oscar_snapshot_contents *c) {
  size_t bytes = round_up(sizeof(struct oscar_capture), APART) + round_up(sizeof *q, APART) + text_room(c->model) +
                 round_up((size_t)c->n_ids * sizeof *c->ids, APART) + round_up(c->text_bytes, APART) +
                 round_up((size_t)q->pages * sizeof(uint8_t *), APART) + round_up((size_t)q->pages * sizeof *q->table, APART);
  for (int64_t i = 0; i < q->pages; i++) bytes += page_copy_bytes(q->cache, q->table[i].exact == NO_PAGE);
  return bytes;
}

size_t oscar_capture_bytes(const oscar_capture *capture) { return capture->bytes; }

static void *take_room(uint8_t **at, size_t bytes) {
  void *taken = *at;
  *at += round_up(bytes, APART);
  return taken;
}

static const void *take_copy(uint8_t **at, const void *from, size_t bytes) {
  return bytes ? memcpy(take_room(at, bytes), from, bytes) : NULL;
}

/* Everything but the pages, which begin at *at then. */
static void copy_contents(oscar_capture *capture, const oscar_sequence *q, const oscar_snapshot_contents *c, uint8_t **at) {
  const size_t table = (size_t)q->pages * sizeof *q->table;
  capture->sequence = take_room(at, sizeof *q);
  *capture->sequence = (oscar_sequence){.cache = q->cache,
                                        .length = q->length,
                                        .cold_tokens = q->cold_tokens,
                                        .refilled_from = q->refilled_from,
                                        .pages = q->pages};
  capture->sequence->table = take_room(at, table);
  if (table) memcpy(capture->sequence->table, q->table, table);
  capture->pages = take_room(at, (size_t)q->pages * sizeof *capture->pages);
  capture->contents = (oscar_snapshot_contents){.model = take_copy(at, c->model, c->model ? strlen(c->model) + 1 : 0),
                                                .ids = take_copy(at, c->ids, (size_t)c->n_ids * sizeof *c->ids),
                                                .n_ids = c->n_ids,
                                                .text = take_copy(at, c->text, c->text_bytes),
                                                .text_bytes = c->text_bytes};
}

struct copying {
  const oscar_sequence *from;
  oscar_capture *to;
  oscar_status status;
};

static void copy_pages(void *arg, int64_t first, int64_t end) {
  struct copying *c = arg;
  for (int64_t i = first; i < end && c->status == OSCAR_OK; i++) {
    const struct page_entry *entry = &c->from->table[i];
    const bool coded = entry->exact == NO_PAGE;
    const struct page_place place = {c->from->cache, coded, coded ? entry->coded : entry->exact, c->to->pages[i]};
    const oscar_status status = page_copy(&place);
    if (status != OSCAR_OK) c->status = status; /* of a GPU's alone, which has one thread here */
  }
}

oscar_status oscar_sequence_capture(const oscar_sequence *sequence, const oscar_snapshot_contents *contents,
                                    oscar_capture **made) {
  oscar_context *context = sequence->cache->geometry.context;
  *made = NULL;
  const oscar_status status = check_arguments(sequence, contents);
  if (status != OSCAR_OK) return status;
  const size_t bytes = oscar_sequence_capture_bytes(sequence, contents);
  uint8_t *at = mem_alloc(context, bytes, 1);
  if (!at) return OSCAR_NO_MEMORY;
  mem_advise_large_pages(at, bytes); /* taking small ones would take longer than the copying */
  oscar_capture *capture = take_room(&at, sizeof *capture);
  *capture = (oscar_capture){.context = context, .bytes = bytes};
  copy_contents(capture, sequence, contents, &at);
  for (int64_t i = 0; i < sequence->pages; i++)
    capture->pages[i] = take_room(&at, page_copy_bytes(sequence->cache, sequence->table[i].exact == NO_PAGE));
  struct copying copying = {sequence, capture, OSCAR_OK};
  if (sequence->cache->store)
    copy_pages(&copying, 0, sequence->pages);
  else
    team_split(context, context->options.threads, sequence->pages, copy_pages, &copying);
  if (copying.status == OSCAR_OK)
    *made = capture;
  else
    oscar_capture_free(capture);
  return copying.status;
}

oscar_status oscar_capture_save(const oscar_capture *capture, oscar_context *context, const char *path) {
  const struct saving s = {
      .context = context, .sequence = capture->sequence, .copies = capture->pages, .contents = &capture->contents};
  return save_file(&s, path);
}

void oscar_capture_free(oscar_capture *capture) {
  if (capture) mem_free(capture->context, capture);
}
