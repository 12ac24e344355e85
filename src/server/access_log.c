/*
 * access_log.c - a line for each request.
 *
 * Lines are made where an exchange ends, which may be the service's thread, and written by a thread of the log's own: a disk or a
 * pipe that is stuck holds up nobody. What waits is limited; what is too much is dropped, and a line says how many were. Each
 * line is written as a whole, at once, at the end of the file, so several programs may share one.
 */
#include "server/access_log.h"

#include "engine/json_text.h"

#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define MOST_WAITING ((size_t)1 << 20) /* bytes */

struct access_log {
  enum access_log_form form;
  char *path; /* NULL: standard error */
  int file;   /* the thread's */
  pthread_t thread;
  pthread_mutex_t lock; /* for what follows */
  pthread_cond_t work;
  struct buffer waiting; /* whole lines */
  int64_t dropped;
  bool reopen, closing;
};

/* ---- the thread ---- */

static int open_file(const char *path) { return open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0640); }

/* A file that cannot be opened again leaves lines to go where they went. */
static void open_again(struct access_log *log) {
  const int file = open_file(log->path);
  if (file < 0) {
    fprintf(stderr, "oscar: note: the access log %s cannot be opened again: %s\n", log->path, strerror(errno));
    return;
  }
  close(log->file);
  log->file = file;
}

/* False: not all of it could be written. */
static bool write_all(int file, const char *data, size_t bytes) {
  while (bytes) {
    const ssize_t n = write(file, data, bytes);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) return false;
    data += n;
    bytes -= (size_t)n;
  }
  return true;
}

static int64_t count_lines(const char *data, size_t bytes) {
  int64_t lines = 0;
  for (size_t i = 0; i < bytes; i++) lines += data[i] == '\n';
  return lines;
}

/* A line of its own, of a kind that readers of the others skip: it begins with '#', or is an object of another shape. */
static void tell_dropped(const struct access_log *log, int64_t dropped, int64_t *lost) {
  char line[96];
  const int n = snprintf(line, sizeof line,
                         log->form == ACCESS_LOG_JSON ? "{\"dropped_lines\":%lld}\n" : "# %lld lines could not be written\n",
                         (long long)dropped);
  if (!write_all(log->file, line, (size_t)n)) *lost = dropped;
}

static void *write_lines(void *arg) {
  struct access_log *log = arg;
  pthread_mutex_lock(&log->lock);
  for (;;) {
    while (!log->waiting.bytes && !log->reopen && !log->closing) pthread_cond_wait(&log->work, &log->lock);
    if (!log->waiting.bytes && !log->reopen) break;
    struct buffer lines = log->waiting;
    const bool reopen = log->reopen;
    const int64_t dropped = log->dropped;
    int64_t lost = 0;
    log->waiting = (struct buffer){0};
    log->reopen = false;
    log->dropped = 0;
    pthread_mutex_unlock(&log->lock);
    if (reopen) open_again(log);
    if (dropped) tell_dropped(log, dropped, &lost);
    if (!write_all(log->file, lines.data, lines.bytes)) lost += count_lines(lines.data, lines.bytes);
    buffer_free(&lines);
    pthread_mutex_lock(&log->lock);
    log->dropped += lost;
  }
  pthread_mutex_unlock(&log->lock);
  return NULL;
}

/* ---- lines ---- */

struct line {
  char time[40], client[64];
  const char *user, *method, *path; /* user NULL: nobody's key */
  int status;                       /* 0: there was no answer */
  const struct request_usage *usage;
  double first_ms, total_ms; /* first_ms NAN: there was no token */
  size_t bytes;
};

/* To the millisecond, in UTC. */
static void spell_time(int64_t ns, char *text, size_t room) {
  const time_t seconds = (time_t)(ns / 1000000000);
  struct tm parts;
  char date[32];
  gmtime_r(&seconds, &parts);
  strftime(date, sizeof date, "%Y-%m-%dT%H:%M:%S", &parts);
  snprintf(text, room, "%s.%03dZ", date, (int)(ns % 1000000000 / 1000000));
}

static double tenths(double ms) { return round(ms * 10) / 10; }

static void describe(const struct exchange *ex, struct line *line) {
  const struct server *server = ex->server;
  *line = (struct line){.user = ex->key >= 0 ? server->key_names[ex->key] : NULL,
                        .method = ex->method,
                        .path = ex->path ? ex->path : "",
                        .status = ex->stage == STAGE_SENDING ? ex->reply.status : 0,
                        .usage = ex->has_usage ? &ex->usage : NULL,
                        .first_ms = (double)NAN,
                        .total_ms = tenths((double)(ex->ended_ns - ex->arrived_ns) * 1e-6),
                        .bytes = ex->body_sent};
  if (line->usage && ex->usage.first_token_ns)
    line->first_ms = tenths((double)(ex->submitted_ns - ex->arrived_ns + ex->usage.first_token_ns) * 1e-6);
  spell_time(ex->arrived_at_ns, line->time, sizeof line->time);
  snprintf(line->client, sizeof line->client, "%s", ex->client);
}

/* A word without spaces, controls and what is no ASCII: those are %XX. */
static void put_word(struct buffer *out, const char *word) {
  if (!*word) word = "-";
  for (const unsigned char *c = (const unsigned char *)word; *c; c++)
    buffer_format(out, *c > ' ' && *c < 127 && *c != '%' ? "%c" : "%%%02X", *c);
  buffer_text(out, " ");
}

static void put_text(struct buffer *out, const struct line *line) {
  put_word(out, line->time);
  put_word(out, line->client);
  put_word(out, line->user ? line->user : "-");
  put_word(out, line->method);
  put_word(out, line->path);
  if (line->status)
    buffer_format(out, "%d %zu ", line->status, line->bytes);
  else
    buffer_text(out, "- - ");
  if (line->usage)
    buffer_format(out, "%lld %lld %lld ", (long long)line->usage->prompt_tokens, (long long)line->usage->reused_exact,
                  (long long)line->usage->generated);
  else
    buffer_text(out, "- - - ");
  if (isnan(line->first_ms))
    buffer_text(out, "- ");
  else
    buffer_format(out, "%.1f ", line->first_ms);
  buffer_format(out, "%.1f\n", line->total_ms);
}

static json_t *number_or_null(bool there, int64_t value) { return there ? json_integer(value) : json_null(); }

static void put_json(struct buffer *out, const struct line *line) {
  const struct request_usage none = {0}, *u = line->usage ? line->usage : &none;
  json_t *object = json_pack(
      "{s:s, s:s, s:s?, s:o, s:o, s:o, s:o, s:o, s:o, s:o, s:o, s:f}", "time", line->time, "client", line->client, "user",
      line->user, "method", json_text(line->method, strlen(line->method)), "path", json_text(line->path, strlen(line->path)),
      "status", number_or_null(line->status, line->status), "bytes", number_or_null(line->status, (int64_t)line->bytes),
      "prompt_tokens", number_or_null(line->usage, u->prompt_tokens), "cached_tokens",
      number_or_null(line->usage, u->reused_exact), "generated_tokens", number_or_null(line->usage, u->generated),
      "first_token_ms", isnan(line->first_ms) ? json_null() : json_real(line->first_ms), "total_ms", line->total_ms);
  char *text = object ? json_dumps(object, JSON_COMPACT | JSON_REAL_PRECISION(12)) : NULL;
  if (text) buffer_format(out, "%s\n", text);
  free(text);
  json_decref(object);
}

void access_log_note(struct access_log *log, const struct exchange *ex) {
  if (!log) return;
  struct line line;
  struct buffer text = {0};
  describe(ex, &line);
  (log->form == ACCESS_LOG_JSON ? put_json : put_text)(&text, &line);
  pthread_mutex_lock(&log->lock);
  if (text.failed || !text.bytes || log->waiting.failed || log->waiting.bytes + text.bytes > MOST_WAITING)
    log->dropped++;
  else
    buffer_add(&log->waiting, text.data, text.bytes);
  pthread_cond_signal(&log->work);
  pthread_mutex_unlock(&log->lock);
  buffer_free(&text);
}

/* ---- beginning and end ---- */

static void free_parts(struct access_log *log) {
  if (log->path && log->file >= 0) close(log->file);
  buffer_free(&log->waiting);
  pthread_cond_destroy(&log->work);
  pthread_mutex_destroy(&log->lock);
  free(log->path);
  free(log);
}

oscar_status access_log_open(const struct server_options *options, struct access_log **opened, char *error, size_t error_bytes) {
  *opened = NULL;
  if (options->access_log == ACCESS_LOG_OFF) return OSCAR_OK;
  struct access_log *log = calloc(1, sizeof *log);
  if (!log) return OSCAR_NO_MEMORY;
  log->form = options->access_log;
  log->file = STDERR_FILENO;
  pthread_mutex_init(&log->lock, NULL);
  pthread_cond_init(&log->work, NULL);
  oscar_status status = OSCAR_OK;
  if (options->access_log_file && !(log->path = strdup(options->access_log_file))) status = OSCAR_NO_MEMORY;
  if (log->path && (log->file = open_file(log->path)) < 0) {
    snprintf(error, error_bytes, "%s: the access log cannot be opened: %s", log->path, strerror(errno));
    status = OSCAR_IO;
  }
  if (status == OSCAR_OK && pthread_create(&log->thread, NULL, write_lines, log) != 0) status = OSCAR_NO_MEMORY;
  if (status == OSCAR_OK)
    *opened = log;
  else
    free_parts(log);
  return status;
}

void access_log_reopen(struct access_log *log) {
  if (!log || !log->path) return;
  pthread_mutex_lock(&log->lock);
  log->reopen = true;
  pthread_cond_signal(&log->work);
  pthread_mutex_unlock(&log->lock);
}

void access_log_close(struct access_log *log) {
  if (!log) return;
  pthread_mutex_lock(&log->lock);
  log->closing = true;
  pthread_cond_signal(&log->work);
  pthread_mutex_unlock(&log->lock);
  pthread_join(log->thread, NULL);
  free_parts(log);
}
