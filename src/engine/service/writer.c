/*
 * writer.c - sessions into their files, by a thread of its own: a disk may be slow, and nobody's answer waits for it.
 *
 * The service's thread hands over what the file is to hold, as it is at that moment: a copy of the pages on the device, or of the
 * bytes in host memory; of a session that is nowhere else, its file itself, which gets another text. The writer compresses, sums,
 * writes, syncs and renames, with a context of its own, and touches nothing that is the service's. What came of it is taken back
 * by the service's thread. A session that has changed meanwhile has a file that is older than it is, and is written again.
 *
 * One file is written at a time, so copies take no more than the largest session does; they count as host memory. Commands that a
 * file under way would cross (save, another name, the end of the session) are put off until it is written.
 */
#include "engine/service/store.h"

#include "base/file.h"

#include <stdlib.h>
#include <string.h>

struct write_job {
  struct session *session;
  uint64_t version;        /* of the session */
  struct command *asked;   /* who waits for it, or NULL */
  oscar_capture *pages;    /* or */
  uint8_t *kept;           /* [kept_bytes] a snapshot, or neither: the file */
  size_t kept_bytes, held; /* held: host memory that all of it takes */
  char *text;
  char *folder;
  char path[PATH_MAX];
  /* what came of it */
  size_t file_bytes;
  struct service_error error;
};

struct writer {
  oscar_context *context; /* its own */
  pthread_t thread;
  pthread_cond_t begin; /* with the service's lock */
  bool started, ending, written;
  struct write_job *job; /* set by the service's thread, the writer's until it is written */
};

/* ---- the writer's thread ---- */

static oscar_status copy_snapshot(oscar_context *context, const struct write_job *job) {
  oscar_snapshot *from;
  oscar_status status = job->kept ? oscar_snapshot_open_bytes(context, job->path, job->kept, job->kept_bytes, &from)
                                  : oscar_snapshot_open(context, job->path, &from);
  if (status != OSCAR_OK) return status;
  status = oscar_snapshot_copy(from, job->text, job->text ? strlen(job->text) : 0, job->path);
  oscar_snapshot_close(from);
  return status;
}

static void write_file(oscar_context *context, struct write_job *job) {
  oscar_status status = file_make_folders(context, job->folder);
  if (status == OSCAR_OK) status = job->pages ? oscar_capture_save(job->pages, context, job->path) : copy_snapshot(context, job);
  if (status == OSCAR_OK) status = session_file_look(context, job->path, &job->file_bytes);
  job->error.status = status;
  if (status != OSCAR_OK) snprintf(job->error.text, sizeof job->error.text, "%s", oscar_last_error(context));
}

static void *write_files(void *arg) {
  struct service *s = arg;
  struct writer *w = s->sessions->writer;
  pthread_mutex_lock(&s->shared.lock);
  while (!w->ending) {
    if (!w->job || w->written) {
      pthread_cond_wait(&w->begin, &s->shared.lock);
      continue;
    }
    pthread_mutex_unlock(&s->shared.lock);
    write_file(w->context, w->job);
    pthread_mutex_lock(&s->shared.lock);
    w->written = true;
    pthread_cond_signal(&s->shared.work);
  }
  pthread_mutex_unlock(&s->shared.lock);
  return NULL;
}

/* ---- beginning and end ---- */

oscar_status writer_create(struct service *s) {
  struct writer *w = s->sessions->writer = mem_zalloc(s->context, 1, sizeof *w);
  if (!w) return OSCAR_NO_MEMORY;
  pthread_cond_init(&w->begin, NULL);
  oscar_context_options options;
  oscar_context_options_default(&options);
  options.threads = s->engine->options.threads;
  if (oscar_context_create(&options, &w->context) != OSCAR_OK)
    return set_error(s->context, OSCAR_NO_MEMORY, "out of memory for the writer of sessions");
  w->started = pthread_create(&w->thread, NULL, write_files, s) == 0;
  return w->started ? OSCAR_OK : set_error(s->context, OSCAR_NO_MEMORY, "the writer of sessions cannot be started");
}

void writer_free(struct service *s) {
  struct writer *w = s->sessions->writer;
  if (!w) return;
  writer_wait(s);
  if (w->started) {
    pthread_mutex_lock(&s->shared.lock);
    w->ending = true;
    pthread_cond_signal(&w->begin);
    pthread_mutex_unlock(&s->shared.lock);
    pthread_join(w->thread, NULL);
  }
  oscar_context_free(w->context);
  pthread_cond_destroy(&w->begin);
  mem_free(s->context, w);
  s->sessions->writer = NULL;
}

/* ---- handing over ---- */

bool writer_is_busy(const struct service *s) { return s->sessions->writer && s->sessions->writer->job; }

static void free_job(struct service *s, struct write_job *job) {
  s->sessions->written_bytes -= job->held;
  oscar_capture_free(job->pages);
  mem_free(s->context, job->kept);
  mem_free(s->context, job->text);
  mem_free(s->context, job->folder);
  mem_free(s->context, job);
}

static oscar_status hold(struct service *s, struct write_job *job, size_t bytes) {
  if (!sessions_copy_room(s, bytes))
    return set_error(s->context, OSCAR_NO_SPACE, "host memory has no room for %zu bytes that are to be written", bytes);
  job->held = bytes;
  s->sessions->written_bytes += bytes;
  return OSCAR_OK;
}

static oscar_status copy_pages(struct service *s, const struct session *x, const oscar_sequence *sequence,
                               struct write_job *job) {
  const oscar_snapshot_contents contents = session_contents(s, x);
  const oscar_status status = hold(s, job, oscar_sequence_capture_bytes(sequence, &contents));
  return status == OSCAR_OK ? oscar_sequence_capture(sequence, &contents, &job->pages) : status;
}

static oscar_status copy_tokens(struct service *s, const struct session *x, struct write_job *job) {
  oscar_sequence *empty;
  oscar_status status = session_empty_sequence(s, &empty);
  if (status != OSCAR_OK) return status;
  status = copy_pages(s, x, empty, job);
  oscar_sequence_free(empty);
  return status;
}

static oscar_status copy_kept(struct service *s, const struct session *x, struct write_job *job) {
  const oscar_status status = hold(s, job, x->kept.n);
  if (status != OSCAR_OK) return status;
  if (!(job->kept = mem_alloc(s->context, x->kept.n, 1))) return OSCAR_NO_MEMORY;
  memcpy(job->kept, x->kept.bytes, x->kept.n);
  job->kept_bytes = x->kept.n;
  return OSCAR_OK;
}

/* What the file is made of, as in session_write. */
static oscar_status fill_job(struct service *s, const struct session *x, struct write_job *job) {
  oscar_status status = session_file_path(s, x->name, job->path);
  if (status != OSCAR_OK) return status;
  if (!(job->folder = mem_strdup(s->context, s->folder))) return OSCAR_NO_MEMORY;
  if (x->text && !(job->text = mem_strdup(s->context, x->text))) return OSCAR_NO_MEMORY;
  if (x->sequence) return copy_pages(s, x, x->sequence, job);
  if (x->ids && x->tokens == 0) return copy_tokens(s, x, job);
  return x->kept.bytes ? copy_kept(s, x, job) : OSCAR_OK;
}

oscar_status writer_begin(struct service *s, struct session *x, struct command *asked) {
  struct writer *w = s->sessions->writer;
  struct write_job *job = mem_zalloc(s->context, 1, sizeof *job);
  if (!job) return OSCAR_NO_MEMORY;
  job->session = x;
  job->version = x->version;
  job->asked = asked;
  const oscar_status status = fill_job(s, x, job);
  if (status != OSCAR_OK) {
    free_job(s, job);
    return status;
  }
  x->writing = true;
  pthread_mutex_lock(&s->shared.lock);
  w->job = job;
  w->written = false;
  pthread_cond_signal(&w->begin);
  pthread_mutex_unlock(&s->shared.lock);
  return OSCAR_OK;
}

/* ---- taking back ---- */

void writer_take(struct service *s) {
  struct writer *w = s->sessions->writer;
  if (!w) return;
  pthread_mutex_lock(&s->shared.lock);
  struct write_job *job = w->written ? w->job : NULL;
  if (job) w->job = NULL, w->written = false;
  pthread_mutex_unlock(&s->shared.lock);
  if (!job) return;
  struct session *x = job->session;
  oscar_status status = job->error.status;
  if (status != OSCAR_OK) set_error(s->context, status, "%s", job->error.text);
  x->writing = false;
  status = session_written(s, x, job->version, status, job->file_bytes);
  if (status != OSCAR_OK && !job->asked) session_tell_failure(s, x);
  if (job->asked) command_answer(s, job->asked, status);
  free_job(s, job);
}

bool writer_has_written(const struct service *s) { return s->sessions->writer && s->sessions->writer->written; }

void writer_wait(struct service *s) {
  struct writer *w = s->sessions->writer;
  if (!w) return;
  pthread_mutex_lock(&s->shared.lock);
  while (w->job && !w->written) pthread_cond_wait(&s->shared.work, &s->shared.lock);
  pthread_mutex_unlock(&s->shared.lock);
  writer_take(s);
}
