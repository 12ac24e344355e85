/* worker.c - the threads that read requests, and do what may wait for the service. */
#include "server/inquiry.h"

#include <stdlib.h>

void work_push(struct exchange *ex) {
  struct server *server = ex->server;
  exchange_hold(ex);
  ex->next_work = NULL;
  pthread_mutex_lock(&server->lock);
  if (server->last_work)
    server->last_work->next_work = ex;
  else
    server->first_work = ex;
  server->last_work = ex;
  pthread_cond_signal(&server->work);
  pthread_mutex_unlock(&server->lock);
}

static struct exchange *next(struct server *server) {
  pthread_mutex_lock(&server->lock);
  while (!server->first_work && !server->ending) pthread_cond_wait(&server->work, &server->lock);
  struct exchange *ex = server->first_work;
  if (ex) {
    server->first_work = ex->next_work;
    if (!server->first_work) server->last_work = NULL;
  }
  pthread_mutex_unlock(&server->lock);
  return ex;
}

/* A stream waits for what comes after its last word, an answer that does not stream for its whole text. Of one that nobody reads
 * any more the rest of the events is still there. */
static void after_the_answer(struct exchange *ex) {
  pthread_mutex_lock(&ex->lock);
  const bool closed = ex->closed;
  pthread_mutex_unlock(&ex->lock);
  if (closed) {
    inquiry_take(ex, NULL);
    inquiry_finish(ex->inquiry);
    return;
  }
  if (!ex->inquiry->stream) {
    inquiry_take(ex, NULL);
    inquiry_finish(ex->inquiry);
    inquiry_reply(ex);
    exchange_ready(ex);
    return;
  }
  inquiry_finish(ex->inquiry);
  pthread_mutex_lock(&ex->lock);
  ex->finished = true;
  if (ex->suspended) {
    ex->suspended = false;
    MHD_resume_connection(ex->connection);
  }
  pthread_mutex_unlock(&ex->lock);
}

static void begin(struct exchange *ex, struct frontend *frontend) {
  ex->route->handle(ex, frontend);
  /* What the model was asked has been read: the rest of the exchange does without. */
  atomic_fetch_sub(&ex->server->body_bytes, ex->body.room);
  buffer_free(&ex->body);
  if (!ex->submitted) exchange_ready(ex);
}

void *worker_run(void *argument) {
  const struct worker_argument a = *(struct worker_argument *)argument;
  free(argument);
  for (struct exchange *ex; (ex = next(a.server));) {
    if (ex->inquiry)
      after_the_answer(ex);
    else
      begin(ex, a.frontend);
    exchange_release(ex);
  }
  return NULL;
}
