/*
 * sessions.c - sequences with a name: found, lent to requests, kept after them.
 *
 * A session is one request's at a time. Its sequence then belongs to the answer, and comes back as long as what the answer made
 * of it. A session whose pages have gone for want of room still has its tokens: they are a prompt like any other.
 */
#include "engine/service/store.h"

#include "base/file.h"

#include <dirent.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

/* ---- the list ---- */

static struct session *find(const struct service *s, const char *name) {
  for (struct session *x = s->sessions->first; x; x = x->next)
    if (strcmp(x->name, name) == 0) return x;
  return NULL;
}

void session_touch(struct service *s, struct session *x) {
  x->used = ++s->sessions->clock;
  x->used_at = (int64_t)time(NULL);
}

struct session *session_add(struct service *s, const char *name) {
  struct session *x = mem_zalloc(s->context, 1, sizeof *x);
  if (!x) return NULL;
  snprintf(x->name, sizeof x->name, "%s", name);
  x->created_at = (int64_t)time(NULL);
  session_touch(s, x);
  x->next = s->sessions->first;
  s->sessions->first = x;
  return x;
}

static void drop_pages(struct service *s, struct session *x) {
  if (x->sequence) oscar_sequence_free(x->sequence);
  x->sequence = NULL;
  session_drop_kept(s, x);
  x->tokens = 0;
}

void session_remove(struct service *s, struct session *x) {
  struct session **at = &s->sessions->first;
  while (*at != x) at = &(*at)->next;
  *at = x->next;
  if (x->request) x->request->session = NULL; /* it goes on without */
  if (x->writing) writer_wait(s);
  drop_pages(s, x);
  s->sessions->disk_bytes -= x->file_bytes;
  mem_free(s->context, x->ids);
  mem_free(s->context, x->text);
  mem_free(s->context, x);
}

static void note_change(struct session *x) {
  x->on_disk = x->failed = x->over_limit = false;
  x->version++;
  x->changed_ns = time_ns();
}

oscar_status session_set_text(struct service *s, struct session *x, const char *text) {
  char *copy = mem_strdup(s->context, text);
  if (!copy) return OSCAR_NO_MEMORY;
  mem_free(s->context, x->text);
  x->text = copy;
  note_change(x);
  return OSCAR_OK;
}

/* ---- the folder ---- */

/* NULL, or why this service cannot go on with it. */
static const char *mismatch(const struct service *s, const oscar_snapshot_info *info) {
  const oscar_cache_options *c = &s->cache_options;
  const char *model = model_fingerprint(s->engine->model);
  if (*info->model && strcmp(info->model, model) != 0) return "it was made with another model";
  if (info->layers != c->layers || info->kv_heads != c->kv_heads || info->head_dim != c->head_dim)
    return "it was made with a model of another shape";
  if (info->sink_pages != c->sink_pages || info->recent_pages != c->recent_pages) return "it was made with other windows";
  if ((*info->codecs != '\0') != (c->codecs != NULL) ||
      (c->codecs && strcmp(info->recipe, oscar_codec_set_describe(c->codecs)->recipe) != 0))
    return "it was made with another form of the cache";
  if (info->n_ids > s->context_tokens) return "it has more tokens than there is room for";
  for (int64_t i = 0; i < info->n_ids; i++)
    if (info->ids[i] < 0 || info->ids[i] >= s->vocab) return "it has tokens that this model does not";
  return NULL;
}

static oscar_status enter(struct service *s, const char *name, const oscar_snapshot_info *info) {
  struct session *x = session_add(s, name);
  if (!x) return OSCAR_NO_MEMORY;
  x->n = info->n_ids;
  x->tokens = info->tokens;
  x->created_at = x->used_at = info->saved_at;
  x->used = 0;
  if (info->text_bytes && session_set_text(s, x, info->text) != OSCAR_OK) return OSCAR_NO_MEMORY;
  x->file_bytes = info->file_bytes;
  x->on_disk = true;
  s->sessions->disk_bytes += info->file_bytes;
  return OSCAR_OK;
}

/* The session of a file that is there. Errors: MISMATCH (not this service's), IO, FORMAT, UNSUPPORTED, NO_MEMORY. */
static oscar_status take_file(struct service *s, const char *name, const char *path) {
  oscar_snapshot *snapshot;
  oscar_status status = oscar_snapshot_open(s->context, path, &snapshot);
  if (status != OSCAR_OK) return status;
  const char *wrong = mismatch(s, oscar_snapshot_describe(snapshot));
  status =
      wrong ? set_error(s->context, OSCAR_MISMATCH, "%s: %s", path, wrong) : enter(s, name, oscar_snapshot_describe(snapshot));
  oscar_snapshot_close(snapshot);
  return status;
}

/* What cannot be used is left alone. */
static oscar_status find_file(struct service *s, const char *name) {
  char path[PATH_MAX];
  oscar_status status = session_file_path(s, name, path);
  if (status == OSCAR_OK) status = take_file(s, name, path);
  if (status == OSCAR_OK || status == OSCAR_NO_MEMORY) return status;
  log_line(s->context, OSCAR_LOG_WARNING, "not a session that can be used: %s", oscar_last_error(s->context));
  return OSCAR_OK;
}

oscar_status session_look_for(struct service *s, const char *name, struct session **x) {
  char path[PATH_MAX];
  *x = find(s, name);
  if (*x || !s->folder || !session_name_is_valid(name)) return OSCAR_OK;
  oscar_status status = session_file_path(s, name, path);
  if (status != OSCAR_OK || access(path, F_OK) != 0) return status;
  status = take_file(s, name, path);
  if (status == OSCAR_OK) *x = find(s, name);
  return prefix_error(s->context, status, "there is a session %s that cannot be used here", name);
}

static int by_age(const void *a, const void *b) {
  const struct session *x = *(struct session *const *)a, *y = *(struct session *const *)b;
  return (x->used_at > y->used_at) - (x->used_at < y->used_at);
}

/* The order in which they were used, as far as files tell. */
static oscar_status order_found(struct service *s) {
  size_t n = 0, i = 0;
  for (struct session *x = s->sessions->first; x; x = x->next) n++;
  struct session **all = mem_alloc(s->context, n, sizeof(struct session *));
  if (!all) return OSCAR_NO_MEMORY;
  for (struct session *x = s->sessions->first; x; x = x->next) all[i++] = x;
  qsort(all, n, sizeof(struct session *), by_age);
  for (i = 0; i < n; i++) all[i]->used = ++s->sessions->clock;
  mem_free(s->context, all);
  return OSCAR_OK;
}

static oscar_status find_files(struct service *s) {
  char name[SESSION_NAME_ROOM];
  oscar_status status = OSCAR_OK;
  DIR *folder = opendir(s->folder);
  if (!folder && errno == ENOENT) return OSCAR_OK;
  if (!folder)
    return set_error(s->context, OSCAR_IO, "%s: the folder of sessions cannot be read: %s", s->folder, strerror(errno));
  for (struct dirent *entry; status == OSCAR_OK && (entry = readdir(folder));)
    if (session_name_of_file(entry->d_name, name)) status = find_file(s, name);
  closedir(folder);
  return status == OSCAR_OK ? order_found(s) : status;
}

oscar_status sessions_create(struct service *s) {
  s->sessions = mem_zalloc(s->context, 1, sizeof *s->sessions);
  if (!s->sessions) return OSCAR_NO_MEMORY;
  if (!s->folder) return OSCAR_OK;
  file_remove_abandoned(s->context, s->folder, SESSION_FILE_SUFFIX);
  const oscar_status status = find_files(s);
  return status == OSCAR_OK ? writer_create(s) : status;
}

void sessions_free(struct service *s) {
  if (!s->sessions) return;
  writer_free(s);
  while (s->sessions->first) session_remove(s, s->sessions->first);
  mem_free(s->context, s->sessions);
}

static bool is_unsaved(const struct session *x) {
  return !x->on_disk && !x->failed && !x->over_limit && !x->request && (x->ids || x->file_bytes);
}

/* What changes a session mostly comes in twos, an answer and what was said as text, of which one write is enough. */
#define SETTLED_NS 100000000

bool sessions_tidy(struct service *s, int64_t *due_ns) {
  struct session *found = NULL;
  const int64_t now = time_ns();
  *due_ns = 0;
  if (!s->folder || writer_is_busy(s)) return false; /* it goes on when that is written */
  for (struct session *x = s->sessions->first; x; x = x->next) {
    if (!is_unsaved(x)) continue;
    const int64_t due = x->changed_ns + SETTLED_NS - now;
    if (due <= 0 && (!found || x->used < found->used)) found = x; /* what leaves memory first */
    if (due > 0 && (*due_ns == 0 || due < *due_ns)) *due_ns = due;
  }
  if (!found) return false;
  if (writer_begin(s, found, NULL) != OSCAR_OK && session_write(s, found) != OSCAR_OK) session_tell_failure(s, found);
  return true;
}

static struct session *first_unsaved(const struct service *s) {
  struct session *x = s->sessions->first;
  while (x && !is_unsaved(x)) x = x->next;
  return x;
}

/* Each that cannot be written is then one that has failed. */
void sessions_save_all(struct service *s) {
  if (!s->folder) return;
  for (struct session *x = s->sessions->first; x; x = x->next) x->failed = false;
  for (struct session *x; (x = first_unsaved(s));)
    if (session_write(s, x) != OSCAR_OK) session_tell_failure(s, x);
}

enum session_tier session_tier_of(const struct session *x) {
  return x->request ? TIER_RUNNING : x->sequence ? TIER_DEVICE : x->kept.bytes || !x->file_bytes ? TIER_HOST : TIER_DISK;
}

void sessions_count(const struct service *s, struct service_stats *stats) {
  int count[TIER_RUNNING + 1] = {0};
  for (const struct session *x = s->sessions->first; x; x = x->next) count[session_tier_of(x)]++;
  stats->sessions_device = count[TIER_DEVICE] + count[TIER_RUNNING];
  stats->sessions_host = count[TIER_HOST];
  stats->sessions_disk = count[TIER_DISK];
  stats->host_bytes = s->sessions->host_bytes + s->sessions->written_bytes;
  stats->disk_bytes = s->sessions->disk_bytes;
}

/* ---- for requests ---- */

bool session_is_busy(const struct service *s, const struct request *r) {
  const struct session *x = r->session_name ? find(s, r->session_name) : NULL;
  return x && x->request && x->request != r;
}

/* Of those that it has pages for. */
static int64_t common_tokens(const struct session *x, const int32_t *ids, int64_t n) {
  int64_t same = 0;
  while (x->ids && same < n && same < x->n && same < x->tokens && ids[same] == x->ids[same]) same++;
  return same;
}

int64_t session_knows(const struct service *s, const struct request *r) {
  const struct session *x = r->session_name ? find(s, r->session_name) : NULL;
  if (!x) return 0;
  if (x->ids) return common_tokens(x, r->ids, r->n - 1);
  return x->tokens < r->n ? x->tokens : 0; /* the file's tokens are not read for this */
}

/* Bytes of tokens that are compared with others: what is left of the newest. */
struct spelling {
  const int32_t *ids;
  int64_t at, n;
  const char *bytes;
  size_t left;
};

/* The next token's bytes, once those before it are used up. A control token has none and is only itself. */
static void spell_on(const struct service *s, struct spelling *x) {
  if (x->left == 0 && x->at < x->n) x->bytes = tokenizer_piece(s->tokenizer, x->ids[x->at++], false, &x->left);
}

/* Where the prompt goes on after it has spelled all that the session holds, at the end of a token; 0: it does not. */
static int64_t spelled_until(const struct service *s, const struct session *x, const int32_t *ids, int64_t n, int64_t same) {
  struct spelling held = {.ids = x->ids, .at = same, .n = x->n}, asked = {.ids = ids, .at = same, .n = n};
  while (held.at < held.n || held.left) {
    const bool between = held.left == 0 && asked.left == 0;
    if (asked.at == asked.n && asked.left == 0) return 0;
    spell_on(s, &held);
    spell_on(s, &asked);
    if (held.left == 0 || asked.left == 0) { /* a control token */
      if (!between || held.ids[held.at - 1] != asked.ids[asked.at - 1]) return 0;
      held.left = asked.left = 0;
      continue;
    }
    const size_t bytes = held.left < asked.left ? held.left : asked.left;
    if (memcmp(held.bytes, asked.bytes, bytes) != 0) return 0;
    held.bytes += bytes;
    asked.bytes += bytes;
    held.left -= bytes;
    asked.left -= bytes;
  }
  return asked.left == 0 && asked.at < asked.n ? asked.at : 0;
}

/* The tokens of an answer are the model's choice. Its text, sent back in the next prompt, may become others; where it spells the
 * same, the session's tokens take their place, and nothing of it is computed again. Returns the tokens that both begin with. */
static int64_t keep_tokens(struct service *s, const struct session *x, struct answer *a) {
  struct request *r = a->request;
  const int64_t same = common_tokens(x, a->ids, a->n - 1);
  if (same == x->n) return same;
  const int64_t from = spelled_until(s, x, a->ids, a->n, same), n = x->n + a->n - from, more = n - a->n;
  if (from == 0 || n >= s->context_tokens || (more > 0 && answer_reserve(s, a, more) != OSCAR_OK)) return same;
  memmove(a->ids + x->n, a->ids + from, (size_t)(a->n - from) * sizeof *a->ids);
  memcpy(a->ids + same, x->ids + same, (size_t)(x->n - same) * sizeof *a->ids);
  a->n = n;
  if (r->max_tokens > s->context_tokens - n) r->max_tokens = s->context_tokens - n;
  return x->n;
}

/* What the tree knows of the prompt, in tokens that need not be computed. */
static int64_t tree_knows(const struct service *s, const struct answer *a) {
  oscar_prefix_match match;
  if (!s->tree || oscar_prefix_match_get(s->tree, a->ids, a->n - 1, s->options.reuse, &match) != OSCAR_OK) return 0;
  return match.reused_tokens;
}

/* Cuts the sequence to what the prompt has of it. */
static oscar_status rewind_to(struct service *s, struct session *x, int64_t length, int64_t *reused, int64_t *refilled) {
  const oscar_rewind mode = s->options.reuse == OSCAR_PREFIX_REFILL ? OSCAR_REWIND_REFILL : OSCAR_REWIND_EXACT;
  oscar_status status;
  *reused = length;
  *refilled = 0;
  if (length == x->tokens) return OSCAR_OK;
  do status = oscar_sequence_truncate(x->sequence, length, mode, reused);
  while (room_after(s, status));
  if (status == OSCAR_OK && mode == OSCAR_REWIND_REFILL) *refilled = length - *reused;
  return status;
}

/* The session's sequence for the answer, as far as it serves it. */
static oscar_status lend(struct service *s, struct session *x, struct answer *a, int64_t *reused, int64_t *refilled) {
  oscar_status status = session_get_ids(s, x);
  if (status != OSCAR_OK) return status;
  int64_t same = x->ids ? keep_tokens(s, x, a) : 0;
  if (same > x->tokens) same = x->tokens;
  if (same == 0 || (same < x->tokens && tree_knows(s, a) >= same)) return OSCAR_OK;
  status = session_bring(s, x);
  if (status != OSCAR_OK || !x->sequence) return status;
  same = common_tokens(x, a->ids, a->n - 1); /* the file may be a newer one */
  status = rewind_to(s, x, same, reused, refilled);
  if (status != OSCAR_OK || (same < x->tokens && tree_knows(s, a) > *reused)) {
    *reused = *refilled = 0;
    return status;
  }
  a->sequence = x->sequence;
  x->sequence = NULL;
  return OSCAR_OK;
}

oscar_status session_begin(struct service *s, struct request *r, struct answer *a, int64_t *reused, int64_t *refilled) {
  if (!r->session_name) return OSCAR_OK;
  struct session *x;
  oscar_status status = session_look_for(s, r->session_name, &x);
  if (status != OSCAR_OK) return status;
  if (!x && !(x = session_add(s, r->session_name))) return OSCAR_NO_MEMORY;
  x->request = r;
  r->session = x;
  session_touch(s, x);
  status = r->session_text ? session_set_text(s, x, r->session_text) : OSCAR_OK;
  if (status == OSCAR_OK) status = lend(s, x, a, reused, refilled);
  if (status == OSCAR_FORMAT || status == OSCAR_IO || status == OSCAR_MISMATCH) { /* a file that was damaged meanwhile */
    log_line(s->context, OSCAR_LOG_WARNING, "session %s begins anew: %s", x->name, oscar_last_error(s->context));
    status = OSCAR_OK;
  }
  if (status == OSCAR_OK) drop_pages(s, x); /* what the answer did not get, it does not need */
  return status;
}

bool session_keep(struct service *s, struct answer *a) {
  struct session *x = a->request->session;
  if (!x) return false;
  if (a->sequence) answer_insert(s, a);
  mem_free(s->context, x->ids);
  x->ids = a->ids;
  x->n = a->n;
  x->tokens = a->sequence ? oscar_sequence_length(a->sequence) : a->kept.tokens;
  x->sequence = a->sequence;
  x->kept = a->kept;
  if (a->kept.bytes) {
    s->kept_bytes -= a->kept.n;
    s->sessions->host_bytes += a->kept.n;
  }
  a->ids = NULL;
  a->sequence = NULL;
  a->kept = (struct kept_pages){0};
  note_change(x);
  session_touch(s, x);
  return true;
}

void session_end(struct service *s, struct request *r) {
  struct session *x = r->session;
  r->session = NULL;
  if (!x) return;
  x->request = NULL;
  session_touch(s, x);
  if (!x->ids && !x->file_bytes) session_remove(s, x); /* it was made for nothing */
}
