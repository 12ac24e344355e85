/*
 * tiers.c - where sessions are: on the device, in host memory, in files.
 *
 * Pages in host memory are the bytes of a snapshot (oscar/snapshot.h), so they come back bit for bit, and a session leaves host
 * memory for its file by having them written. What has to make room is always what has not been used for longest.
 */
#include "engine/service/store.h"

#include "base/file.h"

#include <errno.h>
#include <string.h>
#include <unistd.h>

/* ---- pages in host memory ---- */

struct memory_sink {
  oscar_context *context;
  struct kept_pages *kept;
};

/* In large pages: taking small ones would take longer than the copying. */
static bool set_room(oscar_context *context, struct kept_pages *kept, size_t room) {
  uint8_t *bytes = mem_alloc(context, room, 1);
  if (!bytes) return false;
  mem_advise_large_pages(bytes, room);
  if (kept->n) memcpy(bytes, kept->bytes, kept->n);
  mem_free(context, kept->bytes);
  kept->bytes = bytes;
  kept->room = room;
  return true;
}

static bool write_memory(void *user, uint64_t offset, const void *data, size_t bytes) {
  const struct memory_sink *sink = user;
  struct kept_pages *kept = sink->kept;
  const size_t end = (size_t)offset + bytes;
  if (end > kept->room && !set_room(sink->context, kept, end + end / 4)) {
    errno = ENOMEM;
    return false;
  }
  memcpy(kept->bytes + offset, data, bytes);
  if (end > kept->n) kept->n = end;
  return true;
}

oscar_status pages_keep(struct service *s, const oscar_sequence *sequence, const int32_t *ids, int64_t n, const char *text,
                        struct kept_pages *kept) {
  const oscar_snapshot_contents contents = {
      .model = model_fingerprint(s->engine->model), .ids = ids, .n_ids = n, .text = text, .text_bytes = text ? strlen(text) : 0};
  struct memory_sink sink = {s->context, kept};
  *kept = (struct kept_pages){.device_bytes = oscar_sequence_bytes(sequence), .tokens = oscar_sequence_length(sequence)};
  (void)set_room(s->context, kept, oscar_sequence_capture_bytes(sequence, &contents)); /* about as much as it takes, or more */
  const oscar_status status = oscar_sequence_save_to(sequence, &contents, write_memory, &sink);
  if (status == OSCAR_OK) {
    if (kept->room > kept->n) (void)set_room(s->context, kept, kept->n);
    return OSCAR_OK;
  }
  mem_free(s->context, kept->bytes);
  *kept = (struct kept_pages){0};
  return status;
}

oscar_status pages_restore(struct service *s, const struct kept_pages *kept, oscar_sequence **sequence) {
  oscar_snapshot *snapshot;
  oscar_status status = oscar_snapshot_open_bytes(s->context, "pages in host memory", kept->bytes, kept->n, &snapshot);
  if (status != OSCAR_OK) return status;
  status = oscar_snapshot_restore(snapshot, s->engine->cache, model_fingerprint(s->engine->model), sequence);
  oscar_snapshot_close(snapshot);
  return status;
}

/* ---- files ---- */

oscar_status session_file_path(const struct service *s, const char *name, char *path) {
  if (!s->folder)
    return set_error(s->context, OSCAR_UNSUPPORTED, "session %s cannot be kept in a file: the service has no folder for them",
                     name);
  if (!session_file_in(s->folder, name, path, PATH_MAX))
    return set_error(s->context, OSCAR_INVALID_ARGUMENT, "the path of session %s is too long", name);
  return OSCAR_OK;
}

void session_delete_file(struct service *s, struct session *session) {
  char path[PATH_MAX];
  if (session->file_bytes && session_file_path(s, session->name, path) == OSCAR_OK) (void)unlink(path);
  s->sessions->disk_bytes -= session->file_bytes;
  session->file_bytes = 0;
  session->on_disk = false;
}

static struct session *oldest(const struct service *s, bool (*has)(const struct session *session)) {
  struct session *found = NULL;
  for (struct session *x = s->sessions->first; x; x = x->next)
    if (!x->request && !x->busy && has(x) && (!found || x->used < found->used)) found = x;
  return found;
}

static bool has_file(const struct session *x) { return x->file_bytes > 0 && !x->writing; }
static bool has_sequence(const struct session *x) { return x->sequence != NULL; }
static bool has_kept(const struct session *x) { return x->kept.bytes != NULL; }

/* x was just written, and stays. */
static void keep_disk_limit(struct service *s, struct session *written) {
  struct session *x;
  written->busy = true;
  while (s->options.disk_bytes && s->sessions->disk_bytes > s->options.disk_bytes && (x = oldest(s, has_file))) {
    session_delete_file(s, x);
    x->over_limit = true;
    s->stats.dropped++;
    if (!x->sequence && !x->kept.bytes) session_remove(s, x);
  }
  written->busy = false;
}

static size_t text_bytes(const struct session *x) { return x->text ? strlen(x->text) : 0; }

oscar_snapshot_contents session_contents(const struct service *s, const struct session *x) {
  return (oscar_snapshot_contents){
      .model = model_fingerprint(s->engine->model), .ids = x->ids, .n_ids = x->n, .text = x->text, .text_bytes = text_bytes(x)};
}

static oscar_status save_sequence(struct service *s, const struct session *x, const oscar_sequence *sequence, const char *path) {
  const oscar_snapshot_contents contents = session_contents(s, x);
  return oscar_sequence_save(sequence, &contents, path);
}

oscar_status session_empty_sequence(struct service *s, oscar_sequence **sequence) {
  oscar_status status;
  do status = oscar_sequence_create(s->engine->cache, sequence);
  while (room_after(s, status));
  return status;
}

/* A session without pages: its tokens, none of which has been run. */
static oscar_status write_tokens(struct service *s, const struct session *x, const char *path) {
  oscar_sequence *empty;
  oscar_status status = session_empty_sequence(s, &empty);
  if (status != OSCAR_OK) return status;
  status = save_sequence(s, x, empty, path);
  oscar_sequence_free(empty);
  return status;
}

/* What the pages are in, host memory or the file. */
static oscar_status open_pages(struct service *s, const struct session *x, oscar_snapshot **snapshot) {
  char path[PATH_MAX];
  if (x->kept.bytes) return oscar_snapshot_open_bytes(s->context, x->name, x->kept.bytes, x->kept.n, snapshot);
  const oscar_status status = session_file_path(s, x->name, path);
  return status == OSCAR_OK ? oscar_snapshot_open(s->context, path, snapshot) : status;
}

static oscar_status write_file(struct service *s, const struct session *x, const char *path) {
  oscar_snapshot *snapshot;
  if (x->sequence) return save_sequence(s, x, x->sequence, path);
  if (x->ids && x->tokens == 0) return write_tokens(s, x, path);
  oscar_status status = open_pages(s, x, &snapshot);
  if (status != OSCAR_OK) return status;
  status = oscar_snapshot_copy(snapshot, x->text, text_bytes(x), path);
  oscar_snapshot_close(snapshot);
  return status;
}

/* The file is there; the session may have changed since it was handed to the writer. */
static oscar_status note_file(struct service *s, struct session *x, uint64_t version, size_t bytes) {
  s->sessions->disk_bytes += bytes - x->file_bytes; /* wraps when it shrinks, and comes out right */
  x->file_bytes = bytes;
  x->on_disk = x->version == version;
  keep_disk_limit(s, x);
  if (s->options.disk_bytes == 0 || s->sessions->disk_bytes <= s->options.disk_bytes) return OSCAR_OK;
  if (x->sequence || x->kept.bytes || x->request) session_delete_file(s, x);
  return set_error(s->context, OSCAR_NO_SPACE, "session %s has a file of %zu bytes; all together may have %zu", x->name, bytes,
                   s->options.disk_bytes);
}

oscar_status session_written(struct service *s, struct session *x, uint64_t version, oscar_status status, size_t bytes) {
  if (status == OSCAR_OK) status = note_file(s, x, version, bytes);
  if (x->version == version) x->failed = status != OSCAR_OK;
  return status;
}

void session_tell_failure(const struct service *s, const struct session *x) {
  log_line(s->context, OSCAR_LOG_WARNING, "session %s is not in a file: %s", x->name, oscar_last_error(s->context));
}

oscar_status session_file_look(oscar_context *context, const char *path, size_t *bytes) {
  oscar_snapshot *written;
  const oscar_status status = oscar_snapshot_open(context, path, &written);
  if (status != OSCAR_OK) return status;
  *bytes = oscar_snapshot_describe(written)->file_bytes;
  oscar_snapshot_close(written);
  return OSCAR_OK;
}

oscar_status session_write(struct service *s, struct session *x) {
  char path[PATH_MAX];
  size_t bytes = 0;
  if (x->writing) writer_wait(s); /* of two writers of one file the later one's would stay */
  if (x->on_disk) return OSCAR_OK;
  oscar_status status = session_file_path(s, x->name, path);
  if (status == OSCAR_OK) status = file_make_folders(s->context, s->folder);
  if (status == OSCAR_OK) status = write_file(s, x, path);
  if (status == OSCAR_OK) status = session_file_look(s->context, path, &bytes);
  return session_written(s, x, x->version, status, bytes);
}

/* ---- from tier to tier ---- */

void session_drop_kept(struct service *s, struct session *x) {
  if (!x->kept.bytes) return;
  s->sessions->host_bytes -= x->kept.n;
  mem_free(s->context, x->kept.bytes);
  x->kept = (struct kept_pages){0};
}

static void drop_ids(struct service *s, struct session *x) {
  mem_free(s->context, x->ids); /* the file has them */
  x->ids = NULL;
}

/* Host memory -> file. False: there is no folder, or the file cannot be written. */
static bool leave_host(struct service *s, struct session *x) {
  if (!s->folder) return false;
  if (!x->on_disk && session_write(s, x) != OSCAR_OK) {
    log_line(s->context, OSCAR_LOG_WARNING, "session %s stays in memory: %s", x->name, oscar_last_error(s->context));
    return false;
  }
  session_drop_kept(s, x);
  drop_ids(s, x);
  s->stats.moved_to_disk++;
  return true;
}

static size_t host_bytes(const struct service *s) { return s->kept_bytes + s->sessions->host_bytes + s->sessions->written_bytes; }

bool sessions_host_room(struct service *s, size_t bytes) {
  if (bytes > s->options.host_bytes) return false;
  while (host_bytes(s) > s->options.host_bytes - bytes) {
    struct session *x = oldest(s, has_kept);
    if (!x || !leave_host(s, x)) return false;
  }
  return true;
}

static bool has_kept_and_file(const struct session *x) { return has_kept(x) && x->on_disk; }

bool sessions_copy_room(struct service *s, size_t bytes) {
  struct session *x;
  if (bytes > s->options.host_bytes) return false;
  while (host_bytes(s) > s->options.host_bytes - bytes && (x = oldest(s, has_kept_and_file))) leave_host(s, x);
  return host_bytes(s) <= s->options.host_bytes - bytes;
}

static void free_sequence(struct session *x) {
  oscar_sequence_free(x->sequence);
  x->sequence = NULL;
}

/* Device -> host memory, or a file where that has no room. A session without either keeps its tokens, which are computed again.
 */
static void leave_device(struct service *s, struct session *x) {
  if (sessions_host_room(s, oscar_sequence_bytes(x->sequence)) &&
      pages_keep(s, x->sequence, x->ids, x->n, x->text, &x->kept) == OSCAR_OK) {
    s->sessions->host_bytes += x->kept.n;
    s->stats.moved_to_host++;
    free_sequence(x);
    return;
  }
  if (s->folder && (x->on_disk || session_write(s, x) == OSCAR_OK)) {
    free_sequence(x);
    drop_ids(s, x);
    s->stats.moved_to_disk++;
    return;
  }
  free_sequence(x);
  x->tokens = 0;
  s->stats.dropped++;
}

bool sessions_make_room(struct service *s) {
  struct session *x = oldest(s, has_sequence);
  if (!x) return false;
  leave_device(s, x);
  return true;
}

size_t sessions_device_bytes(const struct service *s) {
  size_t bytes = 0;
  for (const struct session *x = s->sessions->first; x; x = x->next)
    if (!x->request && x->sequence) bytes += oscar_sequence_bytes(x->sequence);
  return bytes;
}

/* The file may be another program's of meanwhile: what it says counts. */
static oscar_status copy_ids(struct service *s, struct session *x, const oscar_snapshot_info *info) {
  int32_t *ids = NULL;
  if (info->n_ids && !(ids = mem_alloc(s->context, (size_t)info->n_ids, sizeof *ids))) return OSCAR_NO_MEMORY;
  if (ids) memcpy(ids, info->ids, (size_t)info->n_ids * sizeof *ids);
  mem_free(s->context, x->ids);
  x->ids = ids;
  x->n = info->n_ids;
  x->tokens = info->tokens;
  return OSCAR_OK;
}

static oscar_status restore(struct service *s, const oscar_snapshot *snapshot, struct session *x) {
  oscar_status status;
  do status = oscar_snapshot_restore(snapshot, s->engine->cache, model_fingerprint(s->engine->model), &x->sequence);
  while (room_after(s, status));
  return status;
}

oscar_status session_get_ids(struct service *s, struct session *x) {
  oscar_snapshot *snapshot;
  if (x->ids || !x->file_bytes) return OSCAR_OK;
  oscar_status status = open_pages(s, x, &snapshot);
  if (status != OSCAR_OK) return status;
  status = copy_ids(s, x, oscar_snapshot_describe(snapshot));
  oscar_snapshot_close(snapshot);
  return status;
}

oscar_status session_bring(struct service *s, struct session *x) {
  oscar_snapshot *snapshot;
  if (x->sequence || (!x->kept.bytes && !x->file_bytes)) return OSCAR_OK;
  const bool before = x->busy;
  oscar_status status = open_pages(s, x, &snapshot);
  if (status != OSCAR_OK) return status;
  x->busy = true; /* so that it does not make room for itself */
  if (!x->kept.bytes) status = copy_ids(s, x, oscar_snapshot_describe(snapshot));
  if (status == OSCAR_OK) status = restore(s, snapshot, x);
  x->busy = before;
  oscar_snapshot_close(snapshot);
  if (status != OSCAR_OK) return status;
  session_drop_kept(s, x);
  s->stats.brought_back++;
  return OSCAR_OK;
}
