/* tests/server/client.h - a server over the fake service, and a client of plain sockets, which can also do what no library would.
 */
#ifndef OSCAR_TEST_SERVER_CLIENT_H
#define OSCAR_TEST_SERVER_CLIENT_H

#include "support.h"

#include "fake_service.h"
#include "server/server.h"

#include <arpa/inet.h>
#include <jansson.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>

struct fixture {
  struct service *service;
  struct server *server;
  struct server_options options;
};

static inline const char *fixture_model(void) {
  static char path[64];
  if (*path) return path;
  snprintf(path, sizeof path, "/tmp/oscar-server-XXXXXX");
  int fd = mkstemp(path);
  assert_true(fd >= 0);
  close(fd);
  fake_model_write(OSCAR_TEST_TOKENIZER, path);
  return path;
}

/* Options with which a test may begin; fixture_start takes them. */
static inline void fixture_options(struct fixture *f) {
  *f = (struct fixture){0};
  server_options_default(&f->options);
  f->options.port = 0;
  f->options.model_path = fixture_model();
  f->options.model_name = "fake";
  f->options.kv = "int2";
  f->options.context = 4096;
  f->options.workers = 2;
}
static inline void fixture_start(struct fixture *f) {
  char error[512];
  f->service = fake_service_create(f->options.model_path);
  if (server_create(&f->options, f->service, &f->server, error, sizeof error) != OSCAR_OK) fail_msg("%s", error);
}
static inline void fixture_stop(struct fixture *f) {
  server_free(f->server);
  service_free(f->service);
}

/* ---- sockets ---- */

static inline int client_connect(const struct fixture *f) {
  struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)server_port(f->server))};
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  int fd = socket(AF_INET, SOCK_STREAM, 0);
  assert_true(fd >= 0);
  assert_int_equal(connect(fd, (struct sockaddr *)&address, sizeof address), 0);
  return fd;
}

static inline void client_send(int fd, const char *text) {
  for (size_t sent = 0, all = strlen(text); sent < all;) {
    ssize_t n = send(fd, text + sent, all - sent, MSG_NOSIGNAL);
    if (n <= 0) return; /* the server has closed, which the answer will tell */
    sent += (size_t)n;
  }
}

/* What comes until `stop` has come, the server closes, or five seconds pass without a byte. malloc'ed. */
static inline char *client_read(int fd, const char *stop) {
  size_t room = 4096, used = 0;
  char *text = calloc(1, room);
  for (struct pollfd p = {.fd = fd, .events = POLLIN}; poll(&p, 1, 5000) == 1;) {
    if (room - used < 4096) text = realloc(text, room *= 2);
    assert_non_null(text);
    ssize_t n = recv(fd, text + used, room - used - 1, 0);
    if (n <= 0) break;
    used += (size_t)n;
    text[used] = '\0';
    if (stop && strstr(text, stop)) break;
  }
  return text;
}

struct answer {
  int status;
  char *head, *body; /* the body without its chunks' sizes */
};

static inline void answer_free(struct answer *a) {
  free(a->head);
  free(a->body);
}

/* Cuts chunks together, in place. */
static inline void dechunk(char *body) {
  char *to = body, *at = body;
  for (;;) {
    char *end;
    unsigned long n = strtoul(at, &end, 16);
    if (end == at || n == 0) break;
    end += 2;
    if (strlen(end) < n) n = strlen(end);
    memmove(to, end, n);
    to += n;
    at = end + n + 2;
  }
  *to = '\0';
}

static inline struct answer answer_of(char *text) {
  struct answer a = {0};
  char *end = strstr(text, "\r\n\r\n");
  if (sscanf(text, "HTTP/1.%*d %d", &a.status) != 1) a.status = 0;
  a.head = end ? strndup(text, (size_t)(end + 2 - text)) : strdup(text);
  a.body = strdup(end ? end + 4 : "");
  if (strcasestr(a.head, "Transfer-Encoding: chunked")) dechunk(a.body);
  free(text);
  return a;
}

/* One request on a connection of its own. headers: lines ended by \r\n, or NULL. */
static inline struct answer ask(const struct fixture *f, const char *method, const char *path, const char *headers,
                                const char *body) {
  int fd = client_connect(f);
  size_t room = strlen(path) + (headers ? strlen(headers) : 0) + (body ? strlen(body) : 0) + 512;
  char *text = malloc(room);
  assert_non_null(text);
  snprintf(text, room, "%s %s HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n%s", method, path, headers ? headers : "");
  if (body)
    snprintf(text + strlen(text), room - strlen(text), "Content-Type: application/json\r\nContent-Length: %zu\r\n\r\n%s",
             strlen(body), body);
  else
    strcat(text, "\r\n");
  client_send(fd, text);
  free(text);
  struct answer a = answer_of(client_read(fd, NULL));
  close(fd);
  return a;
}

/* The same; the body as JSON, the status checked. */
static inline json_t *ask_json(const struct fixture *f, const char *method, const char *path, const char *body, int status) {
  struct answer a = ask(f, method, path, NULL, body);
  if (a.status != status) fail_msg("%s %s: %d, not %d: %s", method, path, a.status, status, a.body);
  json_error_t error;
  json_t *value = json_loads(a.body, 0, &error);
  if (!value) fail_msg("%s %s: no JSON (%s): %s", method, path, error.text, a.body);
  answer_free(&a);
  return value;
}

/* A value inside: "choices.0.message.content"; NULL if it is not there. */
static inline json_t *at(json_t *value, const char *path) {
  char word[64];
  while (value && *path) {
    size_t n = strcspn(path, ".");
    snprintf(word, sizeof word, "%.*s", (int)n, path);
    value = json_is_array(value) ? json_array_get(value, (size_t)atoi(word)) : json_object_get(value, word);
    path += n + (path[n] == '.');
  }
  return value;
}
static inline const char *text_at(json_t *value, const char *path) {
  const char *text = json_string_value(at(value, path));
  return text ? text : "(none)";
}
#define assert_text_at(value, path, wanted) assert_string_equal(text_at(value, path), wanted)
#define assert_number_at(value, path, wanted)                                                                                    \
  do {                                                                                                                           \
    assert_true(json_is_number(at(value, path)));                                                                                \
    assert_true(json_number_value(at(value, path)) == (double)(wanted));                                                         \
  } while (0)

/* The events of a stream: their data as a list; "event:" lines must say the type. "[DONE]" becomes a string. */
static inline json_t *events_of(const char *body) {
  json_t *list = json_array();
  char type[64] = "";
  for (const char *line = body; *line;) {
    size_t n = strcspn(line, "\n");
    if (strncmp(line, "event: ", 7) == 0) snprintf(type, sizeof type, "%.*s", (int)n - 7, line + 7);
    if (strncmp(line, "data: ", 6) == 0) {
      json_t *data = strncmp(line + 6, "[DONE]", 6) == 0 ? json_string("[DONE]") : json_loadb(line + 6, n - 6, 0, NULL);
      if (!data) fail_msg("no JSON: %.*s", (int)n, line);
      if (*type) assert_string_equal(type, text_at(data, "type"));
      json_array_append_new(list, data);
      type[0] = '\0';
    }
    line += n + (line[n] == '\n');
  }
  return list;
}
static inline json_t *ask_events(const struct fixture *f, const char *path, const char *body) {
  struct answer a = ask(f, "POST", path, NULL, body);
  if (a.status != 200) fail_msg("%s: %d: %s", path, a.status, a.body);
  assert_non_null(strcasestr(a.head, "Content-Type: text/event-stream"));
  json_t *events = events_of(a.body);
  answer_free(&a);
  return events;
}

/* Waits at most ten seconds. */
#define wait_for(condition)                                                                                                      \
  do {                                                                                                                           \
    int tries_ = 0;                                                                                                              \
    while (!(condition) && tries_++ < 1000) usleep(10000);                                                                       \
    assert_true(condition);                                                                                                      \
  } while (0)

#endif
