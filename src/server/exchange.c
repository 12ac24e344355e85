/*
 * exchange.c - a request and its answer, between threads.
 *
 * A streamed body is pulled: MHD asks for bytes when the client has taken what there was. The reader takes the events that wait,
 * writes them in the client's dialect, and when there are none suspends the connection, under the lock that the observer appends
 * under: no event can slip in between. What waits is what a client has not read; its limit is options.stream_bytes.
 */
#include "server/state.h"

#include "engine/json_text.h"
#include "server/access_log.h"
#include "server/inquiry.h"

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

struct exchange *exchange_create(struct server *server, struct MHD_Connection *connection) {
  struct exchange *ex = calloc(1, sizeof *ex);
  if (!ex) return NULL;
  ex->server = server;
  ex->connection = connection;
  ex->key = -1;
  ex->arrived_ns = ex->ended_ns = ex->active_ns = time_ns();
  atomic_init(&ex->references, 1);
  pthread_mutex_init(&ex->lock, NULL);
  pthread_mutex_lock(&server->lock);
  ex->number = ++server->exchanges;
  ex->next = server->first;
  if (server->first) server->first->previous = ex;
  server->first = ex;
  server->alive++;
  pthread_mutex_unlock(&server->lock);
  return ex;
}

void exchange_hold(struct exchange *ex) { atomic_fetch_add(&ex->references, 1); }

void exchange_release(struct exchange *ex) {
  if (atomic_fetch_sub(&ex->references, 1) > 1) return;
  struct server *server = ex->server;
  access_log_note(server->log, ex);
  queued_events_free(ex);
  inquiry_free(ex->inquiry);
  atomic_fetch_sub(&server->body_bytes, ex->body.room);
  buffer_free(&ex->body);
  buffer_free(&ex->reply.body);
  buffer_free(&ex->out);
  free(ex->origin_text);
  free(ex->path);
  pthread_mutex_destroy(&ex->lock);
  free(ex);
  pthread_mutex_lock(&server->lock);
  server->alive--;
  pthread_cond_broadcast(&server->quiet);
  pthread_mutex_unlock(&server->lock);
}

/* ---- replies ---- */

void reply_json(struct exchange *ex, int status, json_t *value) {
  ex->reply.status = status;
  ex->reply.type = "application/json";
  buffer_free(&ex->reply.body);
  buffer_json(&ex->reply.body, value);
  buffer_text(&ex->reply.body, "\n");
  if (!ex->reply.body.failed) return;
  static const char nothing[] = "{\"error\":{\"message\":\"the server is out of memory\",\"type\":\"server_error\"}}\n";
  buffer_free(&ex->reply.body);
  ex->reply.status = 500;
  ex->reply.constant = nothing;
  ex->reply.constant_bytes = sizeof nothing - 1;
}

static const char *anthropic_type(int status) {
  switch (status) {
  case 401:
    return "authentication_error";
  case 403:
    return "permission_error";
  case 404:
    return "not_found_error";
  case 408:
    return "timeout_error";
  case 413:
    return "request_too_large";
  case 429:
    return "rate_limit_error";
  case 503:
    return "overloaded_error";
  default:
    return status < 500 ? "invalid_request_error" : "api_error";
  }
}

static const char *openai_type(int status) {
  switch (status) {
  case 401:
    return "authentication_error";
  case 403:
    return "permission_error";
  case 408:
    return "timeout_error";
  case 429:
    return "rate_limit_error";
  default:
    return status < 500 ? "invalid_request_error" : "server_error";
  }
}

json_t *refusal_json(enum dialect dialect, const struct refusal *r) {
  json_t *message = json_text(r->text, strlen(r->text));
  if (dialect == DIALECT_ANTHROPIC)
    return json_pack("{s:s, s:{s:s, s:o}}", "type", "error", "error", "type", anthropic_type(r->status), "message", message);
  json_t *field_name = *r->field ? json_text(r->field, strlen(r->field)) : json_null();
  return json_pack("{s:{s:o, s:s, s:o, s:s?}}", "error", "message", message, "type", openai_type(r->status), "param", field_name,
                   "code", r->code);
}

void reply_refusal(struct exchange *ex, const struct refusal *r) {
  reply_json(ex, r->status, refusal_json(ex->dialect, r));
  ex->reply.stream = false;
  ex->reply.retry_after = r->retry_after;
}

bool refuse_service(struct refusal *r, const struct service_error *error) {
  switch (error->status) {
  case OSCAR_NO_SPACE:
    r->retry_after = 1;
    return refuse(r, 429, "queue_full", NULL, "%s", error->text);
  case OSCAR_CANCELLED:
    r->retry_after = 5;
    return refuse(r, 503, "stopping", NULL, "%s", error->text);
  case OSCAR_INVALID_ARGUMENT:
  case OSCAR_UNSUPPORTED:
    return refuse(r, 400, NULL, NULL, "%s", error->text);
  default:
    return refuse(r, 500, NULL, NULL, "%s", error->text);
  }
}

/* ---- going on ---- */

/* Under the lock. */
static void resume(struct exchange *ex) {
  if (!ex->suspended) return;
  ex->suspended = false;
  MHD_resume_connection(ex->connection);
}

void exchange_ready(struct exchange *ex) {
  pthread_mutex_lock(&ex->lock);
  ex->stage = STAGE_READY;
  ex->active_ns = time_ns();
  resume(ex);
  pthread_mutex_unlock(&ex->lock);
}

void exchange_abandon(struct exchange *ex) {
  pthread_mutex_lock(&ex->lock);
  ex->gone = true;
  const uint64_t request = ex->service_done ? 0 : ex->request;
  resume(ex);
  pthread_mutex_unlock(&ex->lock);
  if (request) service_cancel(ex->server->service, request);
}

bool exchange_is_left(struct exchange *ex) {
  if (!ex->closed || !ex->service_done || ex->finishing || ex->incomplete) return false;
  return ex->finishing = inquiry_has_more_to_do(ex->inquiry);
}

void exchange_close(struct exchange *ex) {
  exchange_abandon(ex); /* an answer that is whole already is not disturbed */
  pthread_mutex_lock(&ex->lock);
  ex->closed = true;
  ex->ended_ns = time_ns();
  const bool left = exchange_is_left(ex);
  pthread_mutex_unlock(&ex->lock);
  if (left) work_push(ex);
}

/* ---- the body of a stream ---- */

enum progress_made { SOMETHING, NOTHING, THE_END, BROKEN };

/* Writes what there is to say into `out`, which is empty. */
static enum progress_made write_more(struct exchange *ex) {
  struct inquiry *g = ex->inquiry;
  pthread_mutex_lock(&ex->lock);
  const bool gone = ex->gone, ping = ex->ping, finished = ex->finished;
  ex->ping = false;
  pthread_mutex_unlock(&ex->lock);
  if (gone) return BROKEN;
  if (ex->stream_ended) return THE_END;
  if (!g->done && inquiry_take(ex, &ex->out) && inquiry_has_more_to_do(g)) {
    pthread_mutex_lock(&ex->lock);
    ex->finishing = true;
    pthread_mutex_unlock(&ex->lock);
    work_push(ex);
  }
  if (g->done && (finished || !inquiry_has_more_to_do(g))) {
    inquiry_end(g, &ex->out);
    ex->stream_ended = true;
  }
  if (ex->out.failed) return BROKEN;
  if (ex->out.bytes) return SOMETHING;
  if (ping) buffer_text(&ex->out, g->form->ping);
  return ping ? SOMETHING : NOTHING;
}

ssize_t exchange_read(void *user, uint64_t position, char *to, size_t most) {
  (void)position;
  struct exchange *ex = user;
  while (ex->sent == ex->out.bytes) {
    ex->out.bytes = ex->sent = 0;
    const enum progress_made made = write_more(ex);
    if (made == SOMETHING) break;
    if (made == THE_END) return MHD_CONTENT_READER_END_OF_STREAM;
    if (made == BROKEN) return MHD_CONTENT_READER_END_WITH_ERROR;
    pthread_mutex_lock(&ex->lock);
    const bool wait = !events_waiting(ex) && !ex->gone && !ex->ping && !(ex->inquiry->done && ex->finished);
    if (wait) {
      ex->suspended = true;
      MHD_suspend_connection(ex->connection);
    }
    pthread_mutex_unlock(&ex->lock);
    if (wait) return 0;
  }
  const size_t n = ex->out.bytes - ex->sent < most ? ex->out.bytes - ex->sent : most;
  memcpy(to, ex->out.data + ex->sent, n);
  ex->sent += n;
  ex->body_sent += n;
  pthread_mutex_lock(&ex->lock);
  ex->active_ns = time_ns();
  pthread_mutex_unlock(&ex->lock);
  return (ssize_t)n;
}
