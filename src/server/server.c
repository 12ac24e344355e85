/* server.c - starting to listen and stopping in order. */
#include "server/access_log.h"

#include "server/response_store.h"

#include <errno.h>
#include <netdb.h>
#include <netinet/in.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

void server_options_default(struct server_options *o) {
  *o = (struct server_options){
      .host = "127.0.0.1",
      .port = 8080,
      .chat_template = "auto",
      .model_name = "model",
      .kv = "",
      .body_bytes = (size_t)8 << 20,
      .header_bytes = (size_t)64 << 10,
      .stream_bytes = (size_t)1 << 20,
      .connections = 512,
      .address_connections = 128,
      .idle_s = 75,
      .ping_s = 15,
      .stop_s = 10,
      .workers = 4,
      .stored_responses = 256,
      .stored_bytes = (size_t)64 << 20,
  };
  sampler_options_default(&o->sampling);
  /* What the protocols say a request means that does not say. */
  o->sampling.temperature = 1;
  o->sampling.top_k = 0;
  o->sampling.top_p = 1;
  o->sampling.min_p = 0;
}

/* ---- the address ---- */

static oscar_status listen_on(struct server *server, const struct sockaddr *address, socklen_t bytes, int family) {
  const int one = 1;
  server->socket = socket(family, SOCK_STREAM | SOCK_CLOEXEC, 0);
  if (server->socket < 0) return OSCAR_IO;
  if (family != AF_UNIX) setsockopt(server->socket, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
  if (bind(server->socket, address, bytes) == 0 && listen(server->socket, 511) == 0) return OSCAR_OK;
  const int reason = errno;
  close(server->socket);
  server->socket = -1;
  errno = reason;
  return OSCAR_IO;
}

/* What a server left that was killed: a socket at which nobody listens. */
static void remove_dead_socket(const struct sockaddr_un *address) {
  struct stat found;
  if (lstat(address->sun_path, &found) != 0 || !S_ISSOCK(found.st_mode)) return;
  const int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
  if (fd < 0) return;
  if (connect(fd, (const struct sockaddr *)address, sizeof *address) != 0 && errno == ECONNREFUSED) unlink(address->sun_path);
  close(fd);
}

static oscar_status open_unix(struct server *server, char *error, size_t room) {
  const char *path = server->options.unix_socket;
  struct sockaddr_un address = {.sun_family = AF_UNIX};
  if (strlen(path) >= sizeof address.sun_path || strlen(path) + 8 > sizeof server->address) {
    snprintf(error, room, "%s: the path of a Unix socket has at most %zu bytes", path, sizeof address.sun_path - 1);
    return OSCAR_INVALID_ARGUMENT;
  }
  memcpy(address.sun_path, path, strlen(path) + 1);
  remove_dead_socket(&address);
  if (listen_on(server, (struct sockaddr *)&address, sizeof address, AF_UNIX) != OSCAR_OK) {
    snprintf(error, room, "%s: cannot listen: %s", path, strerror(errno));
    return OSCAR_IO;
  }
  snprintf(server->address, sizeof server->address, "unix:%s", path);
  return OSCAR_OK;
}

static oscar_status open_inet(struct server *server, char *error, size_t room) {
  const struct server_options *o = &server->options;
  char port[16];
  snprintf(port, sizeof port, "%d", o->port);
  struct addrinfo hints = {.ai_flags = AI_PASSIVE, .ai_socktype = SOCK_STREAM}, *list = NULL;
  const int failed = getaddrinfo(o->host, port, &hints, &list);
  if (failed) {
    snprintf(error, room, "%s: no such address: %s", o->host, gai_strerror(failed));
    return OSCAR_INVALID_ARGUMENT;
  }
  oscar_status status = OSCAR_IO;
  for (struct addrinfo *a = list; a && status != OSCAR_OK; a = a->ai_next)
    status = listen_on(server, a->ai_addr, a->ai_addrlen, a->ai_family);
  if (status != OSCAR_OK) snprintf(error, room, "%s port %d: cannot listen: %s", o->host, o->port, strerror(errno));
  freeaddrinfo(list);
  if (status != OSCAR_OK) return status;
  struct sockaddr_storage bound;
  socklen_t bytes = sizeof bound;
  getsockname(server->socket, (struct sockaddr *)&bound, &bytes);
  server->port = ntohs(bound.ss_family == AF_INET6 ? ((struct sockaddr_in6 *)(void *)&bound)->sin6_port
                                                   : ((struct sockaddr_in *)(void *)&bound)->sin_port);
  snprintf(server->address, sizeof server->address, strchr(o->host, ':') ? "http://[%.120s]:%d" : "http://%.120s:%d", o->host,
           server->port);
  return OSCAR_OK;
}

/* ---- starting ---- */

static oscar_status open_frontends(struct server *server, char *error, size_t room) {
  const struct server_options *o = &server->options;
  server->frontends = calloc((size_t)o->workers, sizeof *server->frontends);
  if (!server->frontends) return OSCAR_NO_MEMORY;
  oscar_status status = OSCAR_OK;
  for (int i = 0; i < o->workers && status == OSCAR_OK; i++)
    status = frontend_open(o->model_path, o->chat_template, &server->frontends[i], error, room);
  return status;
}

static bool start_threads(struct server *server) {
  const int workers = server->options.workers;
  server->threads = calloc((size_t)workers + 1, sizeof *server->threads);
  if (!server->threads) return false;
  for (int i = 0; i < workers; i++) {
    struct worker_argument *argument = malloc(sizeof *argument);
    if (!argument) return false;
    *argument = (struct worker_argument){server, &server->frontends[i]};
    if (pthread_create(&server->threads[server->n_threads], NULL, worker_run, argument) != 0) {
      free(argument);
      return false;
    }
    server->n_threads++;
  }
  if (pthread_create(&server->threads[server->n_threads], NULL, watch_run, server) != 0) return false;
  server->n_threads++;
  return true;
}

/* MHD's own complaints are about clients: broken requests, sockets that closed. */
static void ignore_log(void *user, const char *format, va_list arguments) { (void)user, (void)format, (void)arguments; }

static bool start_daemon(struct server *server) {
  const struct server_options *o = &server->options;
  server->daemon = MHD_start_daemon(
      MHD_USE_EPOLL_INTERNAL_THREAD | MHD_ALLOW_SUSPEND_RESUME | MHD_USE_ERROR_LOG, 0, NULL, NULL, connection_request, server,
      MHD_OPTION_EXTERNAL_LOGGER, ignore_log, NULL, MHD_OPTION_LISTEN_SOCKET, server->socket, MHD_OPTION_NOTIFY_COMPLETED,
      connection_completed, server, MHD_OPTION_CONNECTION_MEMORY_LIMIT, o->header_bytes, MHD_OPTION_CONNECTION_LIMIT,
      (unsigned)o->connections, MHD_OPTION_PER_IP_CONNECTION_LIMIT, o->unix_socket ? 0U : (unsigned)o->address_connections,
      MHD_OPTION_CONNECTION_TIMEOUT, (unsigned)o->idle_s, MHD_OPTION_STRICT_FOR_CLIENT, 1, MHD_OPTION_END);
  return server->daemon;
}

oscar_status server_create(const struct server_options *options, struct service *service, struct server **made, char *error,
                           size_t error_bytes) {
  *made = NULL;
  json_object_seed(0); /* before threads race to choose one */
  struct server *server = calloc(1, sizeof *server);
  snprintf(error, error_bytes, "out of memory for a server");
  if (!server) return OSCAR_NO_MEMORY;
  server->options = *options;
  server->service = service;
  server->socket = server->watch = server->wake = -1;
  server->started_at = time(NULL);
  pthread_mutex_init(&server->lock, NULL);
  pthread_cond_init(&server->work, NULL);
  pthread_cond_init(&server->quiet, NULL);
  server->responses = response_store_create(options->stored_responses, options->stored_bytes);
  oscar_status status = server->responses && access_open(server) && watch_open(server) ? OSCAR_OK : OSCAR_NO_MEMORY;
  if (status == OSCAR_OK) status = access_log_open(options, &server->log, error, error_bytes);
  if (status == OSCAR_OK) status = open_frontends(server, error, error_bytes);
  if (status == OSCAR_OK)
    status = options->unix_socket ? open_unix(server, error, error_bytes) : open_inet(server, error, error_bytes);
  if (status == OSCAR_OK && (!start_threads(server) || !start_daemon(server))) {
    status = OSCAR_IO;
    snprintf(error, error_bytes, "the threads that answer cannot be started");
  }
  if (status == OSCAR_OK)
    *made = server;
  else
    server_free(server);
  return status;
}

const char *server_address(const struct server *server) { return server->address; }
int server_port(const struct server *server) { return server->port; }
void server_reopen_log(struct server *server) { access_log_reopen(server->log); }

/* ---- stopping ---- */

/* Waits, until `deadline`, for requests that are being answered. Under the lock. */
static void wait_quiet(struct server *server, int64_t deadline) {
  while (server->first && time_ns() < deadline) {
    struct timespec until;
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_nsec += 50000000;
    until.tv_sec += until.tv_nsec / 1000000000;
    until.tv_nsec %= 1000000000;
    pthread_cond_timedwait(&server->quiet, &server->lock, &until);
  }
}

/* Nobody waits for the rest any more; a suspended connection could not be closed. */
static void abandon_all(struct server *server) {
  for (bool more = true; more;) {
    struct exchange *found = NULL;
    pthread_mutex_lock(&server->lock);
    for (struct exchange *ex = server->first; ex && !found; ex = ex->next) {
      pthread_mutex_lock(&ex->lock);
      if (!ex->gone) found = ex;
      pthread_mutex_unlock(&ex->lock);
    }
    if (found) exchange_hold(found);
    pthread_mutex_unlock(&server->lock);
    more = found;
    if (!found) continue;
    exchange_abandon(found);
    exchange_release(found);
  }
}

void server_stop(struct server *server) {
  if (server->stopped) return;
  server->stopped = true;
  const bool started = server->daemon != NULL;
  atomic_store(&server->stopping, true);
  if (started) {
    const int listening = MHD_quiesce_daemon(server->daemon);
    if (listening >= 0) close(listening);
    server->socket = -1;
    if (server->options.unix_socket) unlink(server->options.unix_socket);
    service_drain(server->service); /* and sessions keep what there is of answers */
    pthread_mutex_lock(&server->lock);
    wait_quiet(server, time_ns() + (int64_t)server->options.stop_s * 1000000000);
    pthread_mutex_unlock(&server->lock);
    abandon_all(server);
    MHD_stop_daemon(server->daemon);
    server->daemon = NULL;
  }
  pthread_mutex_lock(&server->lock);
  server->ending = true;
  pthread_cond_broadcast(&server->work);
  pthread_mutex_unlock(&server->lock);
  if (server->wake >= 0) watch_wake(server);
  for (int i = 0; i < server->n_threads; i++) pthread_join(server->threads[i], NULL);
  server->n_threads = 0;
  if (started) service_stop(server->service);
}

void server_free(struct server *server) {
  if (!server) return;
  server_stop(server);
  pthread_mutex_lock(&server->lock);
  while (server->alive) pthread_cond_wait(&server->quiet, &server->lock);
  pthread_mutex_unlock(&server->lock);
  if (server->socket >= 0) close(server->socket);
  if (server->watch >= 0) close(server->watch);
  if (server->wake >= 0) close(server->wake);
  for (int i = 0; server->frontends && i < server->options.workers; i++) frontend_close(&server->frontends[i]);
  free(server->frontends);
  free(server->threads);
  access_close(server);
  access_log_close(server->log);
  response_store_free(server->responses);
  pthread_cond_destroy(&server->work);
  pthread_cond_destroy(&server->quiet);
  pthread_mutex_destroy(&server->lock);
  free(server);
}
