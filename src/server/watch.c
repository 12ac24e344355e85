/*
 * watch.c - clients that have gone, streams that nobody reads, signs of life.
 *
 * MHD does not look at the socket of a suspended connection, and a connection that waits for its turn or for a long prompt is
 * suspended for minutes. So sockets are watched here as well, for nothing but their end, and whoever closes his side gives his
 * place in the queue back at once. An entry is the exchange's number, not its address: the exchange may have ended meanwhile.
 */
#include "server/state.h"

#include <errno.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

enum { TICK_MS = 1000, MOST_EVENTS = 64 };

bool watch_open(struct server *server) {
  server->watch = epoll_create1(EPOLL_CLOEXEC);
  server->wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
  struct epoll_event event = {.events = EPOLLIN, .data.u64 = 0};
  return server->watch >= 0 && server->wake >= 0 && epoll_ctl(server->watch, EPOLL_CTL_ADD, server->wake, &event) == 0;
}

static int socket_of(struct exchange *ex) {
  const union MHD_ConnectionInfo *info = MHD_get_connection_info(ex->connection, MHD_CONNECTION_INFO_CONNECTION_FD);
  return info ? info->connect_fd : -1;
}

void watch_add(struct exchange *ex) {
  /* A connection that stays open has been watched for its request before. */
  struct epoll_event event = {.events = EPOLLRDHUP | EPOLLHUP | EPOLLERR | EPOLLONESHOT, .data.u64 = ex->number};
  int fd = socket_of(ex);
  if (epoll_ctl(ex->server->watch, EPOLL_CTL_ADD, fd, &event) != 0 && errno == EEXIST)
    epoll_ctl(ex->server->watch, EPOLL_CTL_MOD, fd, &event);
}

void watch_remove(struct exchange *ex) { epoll_ctl(ex->server->watch, EPOLL_CTL_DEL, socket_of(ex), NULL); }

void watch_wake(struct server *server) {
  uint64_t one = 1;
  if (write(server->wake, &one, sizeof one) < 0) return; /* full: it is awake */
}

/* The first exchange of the list, from `from` on, that something has to be done about; held. */
static struct exchange *find(struct server *server, uint64_t number) {
  pthread_mutex_lock(&server->lock);
  struct exchange *ex = server->first;
  while (ex && ex->number != number) ex = ex->next;
  if (ex) exchange_hold(ex);
  pthread_mutex_unlock(&server->lock);
  return ex;
}

/* Numbers are given in order and the list has the newest first: the one after `number`, downwards. */
static struct exchange *next_older(struct server *server, uint64_t number) {
  pthread_mutex_lock(&server->lock);
  struct exchange *ex = server->first;
  while (ex && ex->number >= number) ex = ex->next;
  if (ex) exchange_hold(ex);
  pthread_mutex_unlock(&server->lock);
  return ex;
}

static void look_at(struct exchange *ex) {
  const struct server_options *o = &ex->server->options;
  pthread_mutex_lock(&ex->lock);
  const bool full = ex->inquiry && ex->queued_bytes > o->stream_bytes && ex->stage == STAGE_SENDING && !ex->service_done;
  if (ex->stage == STAGE_SENDING && ex->suspended && time_ns() - ex->active_ns >= (int64_t)o->ping_s * 1000000000) {
    ex->ping = true;
    ex->active_ns = time_ns();
    ex->suspended = false;
    MHD_resume_connection(ex->connection);
  }
  pthread_mutex_unlock(&ex->lock);
  if (full) exchange_abandon(ex);
}

static void look_at_all(struct server *server) {
  uint64_t number = UINT64_MAX;
  for (struct exchange *ex; (ex = next_older(server, number));) {
    number = ex->number;
    look_at(ex);
    exchange_release(ex);
  }
}

void *watch_run(void *argument) {
  struct server *server = argument;
  int64_t looked = time_ns();
  for (;;) {
    struct epoll_event events[MOST_EVENTS];
    const int n = epoll_wait(server->watch, events, MOST_EVENTS, TICK_MS);
    bool woken = false;
    for (int i = 0; i < n; i++) {
      if (events[i].data.u64 == 0) {
        uint64_t count;
        woken |= read(server->wake, &count, sizeof count) > 0;
        continue;
      }
      struct exchange *ex = find(server, events[i].data.u64);
      if (!ex) continue;
      exchange_abandon(ex);
      exchange_release(ex);
    }
    pthread_mutex_lock(&server->lock);
    const bool ending = server->ending;
    pthread_mutex_unlock(&server->lock);
    if (ending) return NULL;
    if (!woken && time_ns() - looked < TICK_MS * (int64_t)1000000) continue;
    looked = time_ns();
    look_at_all(server);
  }
}
