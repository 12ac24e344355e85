/*
 * connection.c - what MHD calls: a request arrives in pieces, is checked as early as it can be, and goes to a worker; its reply
 * comes back here.
 */
#include "server/state.h"

#include <netdb.h>
#include <netinet/in.h>
#include <stdio.h>
#include <string.h>
#include <strings.h>

static const struct {
  const char *name;
  enum method method;
} methods[] = {{"GET", METHOD_GET},     {"HEAD", METHOD_GET},      {"POST", METHOD_POST},
               {"PATCH", METHOD_PATCH}, {"DELETE", METHOD_DELETE}, {"OPTIONS", METHOD_OPTIONS}};

static int method_of(const char *name) {
  for (size_t i = 0; i < ARRAY_LENGTH(methods); i++)
    if (strcmp(methods[i].name, name) == 0) return (int)methods[i].method;
  return 0;
}

/* The path with one part for "*", which goes to `name` [room]. */
static bool path_fits(const char *pattern, const char *path, char *name, size_t room) {
  const char *star = strchr(pattern, '*');
  if (!star) return strcmp(pattern, path) == 0;
  const size_t before = (size_t)(star - pattern);
  if (strncmp(pattern, path, before) != 0) return false;
  const size_t part = strcspn(path + before, "/");
  if (part == 0 || part >= room || strcmp(path + before + part, star + 1) != 0) return false;
  snprintf(name, room, "%.*s", (int)part, path + before);
  return true;
}

static const char *allowed_text(int allowed) {
  static const struct {
    int methods;
    const char *text;
  } texts[] = {{METHOD_GET, "GET, HEAD, OPTIONS"},
               {METHOD_POST, "POST, OPTIONS"},
               {METHOD_GET | METHOD_POST, "GET, HEAD, POST, OPTIONS"},
               {METHOD_GET | METHOD_DELETE, "GET, HEAD, DELETE, OPTIONS"},
               {METHOD_GET | METHOD_PATCH | METHOD_DELETE, "GET, HEAD, PATCH, DELETE, OPTIONS"}};
  for (size_t i = 0; i < ARRAY_LENGTH(texts); i++)
    if (texts[i].methods == allowed) return texts[i].text;
  return "OPTIONS";
}

static const char *header(const struct exchange *ex, const char *name) {
  return MHD_lookup_connection_value(ex->connection, MHD_HEADER_KIND, name);
}

/* Finds the route; a preflight has none. false: a refusal. */
static bool choose_route(struct exchange *ex, const char *path, const char *method_name, struct refusal *refusal) {
  const int method = method_of(method_name);
  int count, allowed = 0;
  const struct route *routes = route_list(&count);
  for (int i = 0; i < count; i++) {
    char name[sizeof ex->name] = "";
    if (!path_fits(routes[i].path, path, name, sizeof name)) continue;
    ex->dialect = routes[i].dialect;
    allowed |= (int)routes[i].method;
    if ((int)routes[i].method != method) continue;
    ex->route = &routes[i];
    memcpy(ex->name, name, sizeof name);
  }
  if (ex->dialect == DIALECT_OPENAI && header(ex, "anthropic-version")) ex->dialect = DIALECT_ANTHROPIC;
  if (ex->route || (method == METHOD_OPTIONS && allowed)) {
    if (!ex->route) ex->reply.allow = allowed_text(allowed);
    return true;
  }
  if (!allowed) return refuse(refusal, 404, "not_found", NULL, "there is no endpoint %.200s here", path);
  ex->reply.allow = allowed_text(allowed);
  return refuse(refusal, 405, "method_not_allowed", NULL, "%.200s does not know the method %.20s (it knows %s)", path,
                method_name, ex->reply.allow);
}

static bool check_content(struct exchange *ex, struct refusal *refusal) {
  const char *length = header(ex, "Content-Length"), *coding = header(ex, "Transfer-Encoding"),
             *type = header(ex, "Content-Type");
  if (header(ex, "Content-Encoding") && strcasecmp(header(ex, "Content-Encoding"), "identity") != 0)
    return refuse(refusal, 415, "unsupported_media_type", NULL, "compressed bodies are not read here");
  const bool has_body = coding || (length && strcmp(length, "0") != 0);
  if (length && (strlen(length) > 18 || strtoull(length, NULL, 10) > ex->server->options.body_bytes))
    return refuse(refusal, 413, "too_large", NULL, "the body has %.20s bytes; at most %zu are read", length,
                  ex->server->options.body_bytes);
  /* A form of another site's page could send any other type without asking its user's browser. */
  if (has_body && (!type || strncasecmp(type, "application/json", 16) != 0))
    return refuse(refusal, 415, "unsupported_media_type", NULL, "the body must come as 'Content-Type: application/json'");
  return true;
}

/* ---- replies ---- */

static bool add(struct MHD_Response *response, const char *name, const char *value) {
  return MHD_add_response_header(response, name, value) == MHD_YES;
}

static bool add_headers(const struct exchange *ex, struct MHD_Response *response) {
  const struct reply *r = &ex->reply;
  bool good = !r->type || add(response, "Content-Type", r->type);
  if (r->stream) good = good && add(response, "X-Accel-Buffering", "no");
  if (!*r->etag) good = good && add(response, "Cache-Control", "no-store");
  if (*r->etag) good = good && add(response, "ETag", r->etag) && add(response, "Cache-Control", "no-cache");
  if (r->policy)
    good = good && add(response, "Content-Security-Policy", r->policy) && add(response, "Referrer-Policy", "no-referrer");
  good = good && add(response, "X-Content-Type-Options", "nosniff");
  if (r->allow) good = good && add(response, "Allow", r->allow);
  if (r->status == 401) good = good && add(response, "WWW-Authenticate", "Bearer");
  if (r->retry_after) {
    char seconds[16];
    snprintf(seconds, sizeof seconds, "%d", r->retry_after);
    good = good && add(response, "Retry-After", seconds);
  }
  if (ex->server->options.cors) good = good && add(response, "Vary", "Origin");
  if (ex->origin) good = good && add(response, "Access-Control-Allow-Origin", ex->origin);
  return good;
}

/* What a browser asks before it lets another site's page ask. */
static bool add_preflight(const struct exchange *ex, struct MHD_Response *response) {
  const char *headers = header(ex, "Access-Control-Request-Headers");
  bool good = add(response, "Access-Control-Allow-Methods", ex->reply.allow) && add(response, "Access-Control-Max-Age", "600");
  if (headers && strlen(headers) < 1000) good = good && add(response, "Access-Control-Allow-Headers", headers);
  return good;
}

static void stream_freed(void *user) { exchange_release(user); }

static struct MHD_Response *make_response(struct exchange *ex) {
  struct reply *r = &ex->reply;
  if (r->stream) {
    exchange_hold(ex);
    struct MHD_Response *response = MHD_create_response_from_callback(MHD_SIZE_UNKNOWN, 16384, exchange_read, ex, stream_freed);
    if (!response) exchange_release(ex);
    return response;
  }
  if (r->constant)
    return MHD_create_response_from_buffer(r->constant_bytes, (void *)(uintptr_t)r->constant, MHD_RESPMEM_PERSISTENT);
  const size_t bytes = r->body.bytes;
  char *data = buffer_take(&r->body);
  if (!data) return NULL;
  struct MHD_Response *response = MHD_create_response_from_buffer(bytes, data, MHD_RESPMEM_MUST_FREE);
  if (!response) free(data);
  return response;
}

/* Of what is sent as a whole; a stream counts what is taken of it. */
static size_t body_bytes(const struct exchange *ex) {
  const struct reply *r = &ex->reply;
  return r->stream || strcmp(ex->method, "HEAD") == 0 ? 0 : r->constant ? r->constant_bytes : r->body.bytes;
}

static enum MHD_Result send_reply(struct exchange *ex) {
  pthread_mutex_lock(&ex->lock);
  ex->stage = STAGE_SENDING;
  pthread_mutex_unlock(&ex->lock);
  metrics_count(ex->server, ex->route, ex->reply.status);
  ex->body_sent = body_bytes(ex);
  struct MHD_Response *response = make_response(ex);
  if (!response) return MHD_NO;
  bool good = add_headers(ex, response);
  if (good && ex->reply.status == 204 && ex->origin) good = add_preflight(ex, response);
  const enum MHD_Result sent = good ? MHD_queue_response(ex->connection, (unsigned)ex->reply.status, response) : MHD_NO;
  MHD_destroy_response(response);
  return sent;
}

/* ---- requests ---- */

/* What the head of a request tells already: a reply, or nothing and its body is read. */
static bool check_head(struct exchange *ex, const char *path, const char *method) {
  struct refusal refusal = {0};
  bool good = choose_route(ex, path, method, &refusal) && access_origin(ex, &refusal);
  if (good && !ex->route) { /* OPTIONS */
    ex->reply.status = 204;
    ex->reply.constant = "";
    return false;
  }
  good = good && (ex->route->open || access_key(ex, &refusal)) && check_content(ex, &refusal);
  if (good && !ex->route->open && atomic_load(&ex->server->stopping)) {
    refusal.retry_after = 5;
    good = refuse(&refusal, 503, "stopping", NULL, "the server is stopping");
  }
  if (!good) reply_refusal(ex, &refusal);
  return good;
}

/* Clients write a whole request before they read, and one whose connection breaks in between does not hear why it was refused:
 * the body is read to its end first, without keeping it. Not for those who ask before they send it, and not without bound. */
static bool refusal_waits(const struct exchange *ex) {
  const char *length = header(ex, "Content-Length");
  if (header(ex, "Expect")) return false;
  if (!length) return header(ex, "Transfer-Encoding");
  return strlen(length) <= 18 && strtoull(length, NULL, 10) <= 2 * ex->server->options.body_bytes;
}

/* A body that becomes too large while it comes is refused like one that said so; one that does not end then loses its connection.
 */
static enum MHD_Result take_body(struct exchange *ex, const char *upload, size_t *bytes) {
  struct server *server = ex->server;
  const size_t limit = server->options.body_bytes, room = ex->body.room;
  if (!ex->refused && ex->body.bytes + *bytes <= limit) {
    buffer_add(&ex->body, upload, *bytes);
    const size_t all = atomic_fetch_add(&server->body_bytes, ex->body.room - room) + ex->body.room - room;
    *bytes = 0;
    return ex->body.failed || all > 8 * limit ? MHD_NO : MHD_YES;
  }
  if (!ex->refused) {
    struct refusal refusal = {0};
    refuse(&refusal, 413, "too_large", NULL, "the body has more than %zu bytes", limit);
    reply_refusal(ex, &refusal);
    ex->refused = true;
  }
  ex->skipped_bytes += *bytes;
  *bytes = 0;
  return ex->skipped_bytes > 2 * limit ? MHD_NO : MHD_YES;
}

static enum MHD_Result body_is_complete(struct exchange *ex) {
  if (ex->refused) return send_reply(ex);
  if (ex->route->open) {
    ex->route->handle(ex, NULL);
    return send_reply(ex);
  }
  watch_add(ex);
  pthread_mutex_lock(&ex->lock);
  ex->stage = STAGE_WORKING;
  ex->suspended = true;
  MHD_suspend_connection(ex->connection);
  pthread_mutex_unlock(&ex->lock);
  work_push(ex);
  return MHD_YES;
}

/* For the access log. */
static void note_request(struct exchange *ex, const char *path, const char *method) {
  const union MHD_ConnectionInfo *info = MHD_get_connection_info(ex->connection, MHD_CONNECTION_INFO_CLIENT_ADDRESS);
  const struct sockaddr *address = info ? info->client_addr : NULL;
  struct timespec now;
  const bool inet = address && (address->sa_family == AF_INET || address->sa_family == AF_INET6);
  const socklen_t bytes = inet && address->sa_family == AF_INET ? sizeof(struct sockaddr_in) : sizeof(struct sockaddr_in6);
  if (!inet || getnameinfo(address, bytes, ex->client, sizeof ex->client, NULL, 0, NI_NUMERICHOST) != 0)
    snprintf(ex->client, sizeof ex->client, "unix");
  clock_gettime(CLOCK_REALTIME, &now);
  ex->arrived_at_ns = (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
  snprintf(ex->method, sizeof ex->method, "%s", method);
  ex->path = strndup(path, 1024);
}

enum MHD_Result connection_request(void *user, struct MHD_Connection *connection, const char *url, const char *method,
                                   const char *version, const char *upload, size_t *bytes, void **state) {
  (void)version;
  struct exchange *ex = *state;
  if (!ex) {
    ex = *state = exchange_create(user, connection);
    if (!ex) return MHD_NO;
    note_request(ex, url, method);
    ex->refused = !check_head(ex, url, method);
    return ex->refused && !refusal_waits(ex) ? send_reply(ex) : MHD_YES;
  }
  if (*bytes) return take_body(ex, upload, bytes);
  pthread_mutex_lock(&ex->lock);
  const enum stage stage = ex->stage;
  const bool gone = ex->gone;
  pthread_mutex_unlock(&ex->lock);
  if (gone) return MHD_NO;
  if (stage == STAGE_RECEIVING) return body_is_complete(ex);
  return stage == STAGE_READY ? send_reply(ex) : MHD_YES;
}

void connection_completed(void *user, struct MHD_Connection *connection, void **state, enum MHD_RequestTerminationCode code) {
  (void)connection, (void)code;
  struct server *server = user;
  struct exchange *ex = *state;
  if (!ex) return;
  *state = NULL;
  watch_remove(ex);
  pthread_mutex_lock(&server->lock);
  if (ex->previous)
    ex->previous->next = ex->next;
  else
    server->first = ex->next;
  if (ex->next) ex->next->previous = ex->previous;
  pthread_cond_broadcast(&server->quiet);
  pthread_mutex_unlock(&server->lock);
  exchange_close(ex);
  exchange_release(ex);
}
