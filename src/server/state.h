/*
 * server/state.h - what the files of this room share: the server, an exchange (one request and its answer), the hand-over between
 * the thread of bytes, the workers, and the service's observer. Private to the room.
 *
 * Whose an exchange is at a time: the thread of bytes has it while the request arrives and while an answer is sent; a worker has
 * it between, its connection is suspended then. The service's thread only appends to `events`, under `lock`. References: the
 * connection's, the queue of work's, the service's until EVENT_DONE, a response's that streams.
 */
#ifndef OSCAR_SERVER_STATE_H
#define OSCAR_SERVER_STATE_H

#include "server/buffer.h"
#include "server/frontend.h"
#include "server/json_fields.h"
#include "server/server.h"

#include <microhttpd.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>

enum dialect { DIALECT_OPENAI, DIALECT_ANTHROPIC };
enum method { METHOD_GET = 1, METHOD_POST = 2, METHOD_PATCH = 4, METHOD_DELETE = 8, METHOD_OPTIONS = 16 };

struct exchange;
struct inquiry;

/* One endpoint and method. `path` may have one part "*", which is the exchange's `name`. */
struct route {
  const char *path;
  enum method method;
  enum dialect dialect;
  bool open; /* without an API key, and answered at once by the thread of bytes: nothing that waits */
  void (*handle)(struct exchange *exchange, struct frontend *frontend); /* frontend NULL if open */
};
const struct route *route_list(int *count);

struct reply {
  int status;
  const char *type; /* of the content */
  struct buffer body;
  const char *constant; /* bytes that live as long as the program, instead of body */
  size_t constant_bytes;
  bool stream;                /* the body is what `inquiry` writes */
  char etag[24];              /* "": none */
  const char *policy, *allow; /* NULL: none */
  int retry_after;
};

struct queued_event; /* a copy of struct request_event (inquiry.c) */

enum stage {
  STAGE_RECEIVING, /* the body is not all there */
  STAGE_WORKING,   /* a worker has it, or the service and nothing can be sent yet */
  STAGE_READY,     /* `reply` can be sent */
  STAGE_SENDING    /* it is being sent */
};

struct exchange {
  struct server *server;
  struct exchange *next, *previous; /* of the server's list, under its lock, while there is a connection */
  struct exchange *next_work;
  atomic_int references;
  uint64_t number;
  /* the request */
  struct MHD_Connection *connection;
  const struct route *route;
  enum dialect dialect;
  char name[80];      /* what stands for "*" in the route's path */
  int key;            /* whose: the number of the API key; -1: nobody's */
  const char *origin; /* to be allowed in the answer (CORS), or NULL */
  char *origin_text;
  struct buffer body;
  bool refused;         /* the reply is there before the body is */
  size_t skipped_bytes; /* of the body, then */
  int64_t arrived_ns;
  /* for the access log */
  char client[64], method[16]; /* an address, "unix" */
  char *path;                  /* without what follows '?'; NULL: memory was out */
  int64_t arrived_at_ns;       /* since 1970 */
  int64_t submitted_ns, ended_ns;
  size_t body_sent;
  struct request_usage usage; /* if has_usage; the service's thread's until EVENT_DONE */
  bool has_usage;
  /* shared; under lock */
  pthread_mutex_t lock;
  enum stage stage;
  bool suspended;
  bool gone;         /* nobody reads the answer any more */
  bool closed;       /* and there is no connection */
  bool incomplete;   /* an event could not be kept */
  bool ping;         /* a sign of life is due */
  bool finishing;    /* a worker does what comes after the answer (sessions), */
  bool finished;     /* or has done it */
  bool service_done; /* no event follows */
  uint64_t request;  /* the service's; 0: none */
  struct queued_event *first_event, *last_event;
  size_t queued_bytes;
  int64_t active_ns; /* something was sent or the stream began */
  /* the answer */
  struct reply reply;
  struct inquiry *inquiry; /* NULL: no model is asked */
  bool submitted;          /* the service has it, and events will tell of it */
  struct buffer out;       /* of a stream: written, [sent ..) not yet taken */
  size_t sent;
  bool stream_ended;
};

struct answered {
  int route, status;
  int64_t count;
};
enum { MOST_ANSWERED = 512 };

struct pending_session {
  char name[SESSION_NAME_ROOM], title[256];
  int64_t created_at;
};
enum { MOST_PENDING = 256 };

struct response_store;

struct server {
  struct server_options options;
  struct service *service;
  struct MHD_Daemon *daemon;
  int socket, port;
  char address[160];
  int64_t started_at;         /* seconds since 1970 */
  struct frontend *frontends; /* [options.workers] */
  pthread_t *threads;         /* [options.workers + 1], the last watches */
  int n_threads;
  unsigned char (*keys)[32]; /* digests, [options.n_api_keys] */
  char (*key_names)[SESSION_NAME_ROOM];
  struct access_log *log; /* or NULL */
  int watch, wake;        /* epoll, eventfd */
  atomic_bool stopping;   /* new requests are refused */
  bool stopped;
  atomic_size_t body_bytes; /* that all requests hold */
  struct response_store *responses;

  pthread_mutex_t lock; /* for what follows */
  pthread_cond_t work, quiet;
  struct exchange *first; /* that have a connection */
  struct exchange *first_work, *last_work;
  uint64_t exchanges;
  int alive;   /* exchanges that are not freed */
  bool ending; /* workers and the watch leave */
  struct answered answered[MOST_ANSWERED];
  int n_answered;
  struct pending_session pending[MOST_PENDING];
  int n_pending;
};

/* ---- exchange.c ---- */
struct exchange *exchange_create(struct server *server, struct MHD_Connection *connection);
void exchange_release(struct exchange *exchange);
void exchange_hold(struct exchange *exchange);
/* Replies; the body is made in the client's dialect. */
void reply_json(struct exchange *exchange, int status, json_t *value); /* takes the reference */
void reply_refusal(struct exchange *exchange, const struct refusal *refusal);
json_t *refusal_json(enum dialect dialect, const struct refusal *refusal);
/* What a call of the service left, as a refusal. */
bool refuse_service(struct refusal *refusal, const struct service_error *error);
/* The reply can be sent: the connection goes on. Called by workers. */
void exchange_ready(struct exchange *exchange);
/* Nobody reads any more: its request is cancelled. Not from the service's thread. */
void exchange_abandon(struct exchange *exchange);
/* There is no connection any more: what its session keeps of the answer is seen to when the service is done with it. */
void exchange_close(struct exchange *exchange);
/* Under the lock: a worker has to finish what nobody reads any more. True once. */
bool exchange_is_left(struct exchange *exchange);
/* For MHD's reader of a streamed body. */
ssize_t exchange_read(void *user, uint64_t position, char *to, size_t most);
/* The service's thread. */
void exchange_observe(void *user, const struct request_event *event);

/* ---- worker.c ---- */
void work_push(struct exchange *exchange); /* takes a reference for the queue */
void *worker_run(void *argument);          /* struct worker_argument *, freed */
struct worker_argument {
  struct server *server;
  struct frontend *frontend;
};

/* ---- watch.c ---- */
bool watch_open(struct server *server);
void watch_add(struct exchange *exchange);
void watch_remove(struct exchange *exchange);
void watch_wake(struct server *server); /* to look at queues now */
void *watch_run(void *server);

/* ---- connection.c ---- */
enum MHD_Result connection_request(void *user, struct MHD_Connection *connection, const char *url, const char *method,
                                   const char *version, const char *upload, size_t *bytes, void **state);
void connection_completed(void *user, struct MHD_Connection *connection, void **state, enum MHD_RequestTerminationCode code);

/* ---- access.c: who may ask ---- */
bool access_open(struct server *server);
void access_close(struct server *server);
/* What Authorization or x-api-key say; false: a refusal. */
bool access_key(struct exchange *exchange, struct refusal *refusal);
/* Host and Origin: ours, one that is allowed, or none; false: a refusal. */
bool access_origin(struct exchange *exchange, struct refusal *refusal);

/* ---- endpoints ---- */
void openai_chat(struct exchange *exchange, struct frontend *frontend);
void openai_completions(struct exchange *exchange, struct frontend *frontend);
void openai_models(struct exchange *exchange, struct frontend *frontend);
void openai_model(struct exchange *exchange, struct frontend *frontend);
void responses_make(struct exchange *exchange, struct frontend *frontend);
void responses_get(struct exchange *exchange, struct frontend *frontend);
void responses_delete(struct exchange *exchange, struct frontend *frontend);
void anthropic_messages(struct exchange *exchange, struct frontend *frontend);
void anthropic_count(struct exchange *exchange, struct frontend *frontend);
void tokens_encode(struct exchange *exchange, struct frontend *frontend);
void tokens_decode(struct exchange *exchange, struct frontend *frontend);
void sessions_list(struct exchange *exchange, struct frontend *frontend);
void sessions_make(struct exchange *exchange, struct frontend *frontend);
void sessions_get(struct exchange *exchange, struct frontend *frontend);
void sessions_change(struct exchange *exchange, struct frontend *frontend);
void sessions_delete(struct exchange *exchange, struct frontend *frontend);
void sessions_save(struct exchange *exchange, struct frontend *frontend);
void sessions_load(struct exchange *exchange, struct frontend *frontend);
void sessions_fork(struct exchange *exchange, struct frontend *frontend);
void cache_picture(struct exchange *exchange, struct frontend *frontend);
void metrics_text(struct exchange *exchange, struct frontend *frontend);
void metrics_count(struct server *server, const struct route *route, int status);
void health(struct exchange *exchange, struct frontend *frontend);
void page_file(struct exchange *exchange, struct frontend *frontend);

/* ---- what endpoints share ---- */
/* The model's name, one of its aliases, or none given; false: a refusal (404). */
bool model_is_served(const struct server *server, const struct fields *fields);
bool in_list(const char *list, const char *word); /* words by commas; "*" has all */
/* "chatcmpl-" and 24 random letters and digits. */
void make_id(const char *prefix, char *id, size_t room);
uint64_t random_seed(void);

/* sessions.c: the title of a session, for the text that is kept with it: as it was, else the one it was announced with, else the
 * beginning of what the user said first. */
void session_title(struct server *server, const char *name, const json_t *messages, char *title, size_t room);
/* Whether what it keeps is these messages: no other request has taken it up since. */
bool session_holds(struct server *server, const char *name, const json_t *messages);

#endif
