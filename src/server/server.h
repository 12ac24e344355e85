/*
 * server/server.h - a service spoken to over HTTP: OpenAI's and Anthropic's endpoints, sessions, numbers, a page. Private.
 *
 * One thread moves bytes (libmicrohttpd over epoll); connections that wait for a model's words are suspended and cost a socket
 * and their buffers. A few workers read requests, run chat templates and tokenizers, and whatever may wait for the service; the
 * service's own thread only puts what a step gave into queues of the requests. So 64 or 1000 slow readers need no threads, a long
 * prompt holds up one worker, and nobody who stops reading holds up the model: his queue has a limit, and when it is reached his
 * request is cancelled. One more thread watches for clients that have gone.
 *
 * docs/serving.md is the user's view.
 */
#ifndef OSCAR_SERVER_H
#define OSCAR_SERVER_H

#include "engine/sampler.h"
#include "engine/service.h"

enum access_log_form { ACCESS_LOG_OFF, ACCESS_LOG_TEXT, ACCESS_LOG_JSON };

struct server_options {
  const char *host;            /* default "127.0.0.1" */
  int port;                    /* default 8080; 0: any free one */
  const char *unix_socket;     /* a path instead of host and port; NULL: none */
  const char *const *api_keys; /* [n_api_keys]; none: everybody may ask */
  const char *const
      *api_key_names; /* [n_api_keys] what the access log calls them; NULL, and NULL among them: key-1, key-2, ... */
  int n_api_keys;
  enum access_log_form access_log; /* a line for each request; default off */
  const char *access_log_file;     /* it is added to; NULL: standard error */
  const char *cors;                /* origins, by commas, whose pages may ask; "*": all; NULL: only our own page */

  const char *model_path;          /* GGUF, for tokenizer and chat template */
  const char *chat_template;       /* "auto" or a name */
  const char *model_name;          /* what clients call it */
  const char *aliases;             /* other names, by commas; "*": any; NULL: none */
  const char *kv;                  /* form of the cache, shown */
  int64_t context;                 /* tokens, shown */
  struct sampler_options sampling; /* of requests that do not say */

  size_t body_bytes;       /* of a request; default 8 MiB */
  size_t header_bytes;     /* and of what a connection buffers; default 64 KiB */
  size_t stream_bytes;     /* of a stream that are not read yet; default 1 MiB */
  int connections;         /* default 512 */
  int address_connections; /* of one address; default 128 */
  int idle_s;              /* of a connection that neither sends nor reads; default 75 */
  int request_s;           /* for a whole answer; 0: no limit */
  int ping_s;              /* a stream without words says so often that it lives; default 15 */
  int stop_s;              /* that streams get to end when the server stops; default 10 */
  int workers;             /* default 4 */
  int stored_responses;    /* of /v1/responses; default 256 */
  size_t stored_bytes;     /* of them together; default 64 MiB */
};
void server_options_default(struct server_options *options);

struct server;
/* Listens and answers. The service must outlive the server. Errors: INVALID_ARGUMENT, IO (the address), NO_MEMORY, those of
 * opening the model's tokenizer. */
oscar_status server_create(const struct server_options *options, struct service *service, struct server **server, char *error,
                           size_t error_bytes);
/* "http://127.0.0.1:8080" or "unix:/path" */
const char *server_address(const struct server *server);
int server_port(const struct server *server); /* 0: a Unix socket */
/* Lines of the access log go to the file that has the name now: after it was renamed, a new one. */
void server_reopen_log(struct server *server);
/* No new connections, new requests are refused (503), the service is stopped, running answers end as cancelled. */
void server_stop(struct server *server);
void server_free(struct server *server); /* stops, too */

#endif
