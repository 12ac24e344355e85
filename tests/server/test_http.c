/* The HTTP side: who may ask, what is too much, clients that vanish or do not read, many at once, stopping. */
#include "client.h"

#include <sys/un.h>

#define CHAT         "/v1/chat/completions"
#define SAYS(text)   "{\"messages\":[{\"role\":\"user\",\"content\":\"" text "\"}]}"
#define STREAM(text) "{\"stream\":true,\"messages\":[{\"role\":\"user\",\"content\":\"" text "\"}]}"

static void post(int fd, const char *path, const char *body) {
  char head[512];
  snprintf(head, sizeof head,
           "POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %zu\r\n\r\n", path,
           strlen(body));
  client_send(fd, head);
  client_send(fd, body);
}

/* ---- requests ---- */

static void routes(void **state) {
  (void)state;
  struct fixture f;
  fixture_options(&f);
  fixture_start(&f);
  static const struct {
    const char *method, *path, *head;
    int status;
  } cases[] = {
      {"GET", "/health", "application/json", 200},
      {"HEAD", "/health", "Content-Length: 16", 200},
      {"GET", "/", "Content-Security-Policy: default-src 'none'", 200},
      {"GET", "/page/style.css", "text/css", 200},
      {"GET", "/page/app.js", "text/javascript", 200},
      {"GET", "/page/nothing.js", "application/json", 404},
      {"GET", "/nothing", "application/json", 404},
      {"GET", "/v1/sessions/", "application/json", 404},
      {"GET", CHAT, "Allow: POST, OPTIONS", 405},
      {"PUT", "/v1/sessions/x", "Allow: GET, HEAD, PATCH, DELETE, OPTIONS", 405},
      {"OPTIONS", "/v1/sessions/x", "Allow: GET, HEAD, PATCH, DELETE, OPTIONS", 204},
  };
  for (size_t i = 0; i < ARRAY_LENGTH(cases); i++) {
    struct answer a = ask(&f, cases[i].method, cases[i].path, NULL, NULL);
    if (a.status != cases[i].status) fail_msg("%s %s: %d", cases[i].method, cases[i].path, a.status);
    if (!strcasestr(a.head, cases[i].head)) fail_msg("%s %s: %s", cases[i].method, cases[i].path, a.head);
    if (strcmp(cases[i].method, "HEAD") == 0) assert_string_equal(a.body, "");
    answer_free(&a);
  }
  /* an error speaks as its client does */
  struct answer a = ask(&f, "GET", "/v1/nothing", "anthropic-version: 2023-06-01\r\n", NULL);
  assert_non_null(strstr(a.body, "\"type\":\"not_found_error\""));
  answer_free(&a);
  /* the page is sent once */
  a = ask(&f, "GET", "/", NULL, NULL);
  char etag[64], line[96];
  assert_int_equal(sscanf(strcasestr(a.head, "ETag: "), "%*s %63s", etag), 1);
  answer_free(&a);
  snprintf(line, sizeof line, "If-None-Match: %s\r\n", etag);
  a = ask(&f, "GET", "/", line, NULL);
  assert_int_equal(a.status, 304);
  answer_free(&a);
  fixture_stop(&f);
}

static void bodies(void **state) {
  (void)state;
  struct fixture f;
  fixture_options(&f);
  f.options.body_bytes = 4096;
  fixture_start(&f);
  struct answer a = ask(&f, "POST", CHAT, NULL, "{\"messages\":");
  assert_int_equal(a.status, 400);
  assert_non_null(strstr(a.body, "line 1"));
  answer_free(&a);
  a = ask(&f, "POST", CHAT, NULL, "[]");
  assert_int_equal(a.status, 400);
  answer_free(&a);
  a = ask(&f, "POST", CHAT, NULL, "{\"n\":1,\"n\":2}");
  assert_int_equal(a.status, 400);
  answer_free(&a);
  a = ask(&f, "POST", CHAT, NULL, NULL);
  assert_int_equal(a.status, 400);
  answer_free(&a);
  static const struct {
    const char *request;
    int status;
  } raw[] = {
      {"POST " CHAT
       " HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: text/plain\r\nContent-Length: 2\r\n\r\n{}",
       415},
      {"POST " CHAT " HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: 2\r\n\r\n{}", 415},
      {"POST " CHAT
       " HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Encoding: gzip\r\n"
       "Content-Length: 2\r\n\r\n{}",
       415},
      {"POST " CHAT
       " HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: 9000\r\n\r\n",
       413},
      {"POST " CHAT " HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n"
       "Expect: 100-continue\r\nContent-Length: 5000\r\n\r\n",
       413},
      {"POST " CHAT " HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: -5\r\n\r\n", 400},
      {"POST " CHAT
       " HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 99999999999999999999\r\n\r\n",
       413},
      {"POST " CHAT " HTTP/1.1\r\nContent-Type: application/json\r\n\r\n", 400}, /* no Host */
      {"nonsense\r\n\r\n", 0},
      {"GET /health HTTP/9.9\r\n\r\n", 505},
      {"POST " CHAT
       " HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
       "10\r\n{\"messages\":[{\"r\r\n2a\r\nole\":\"user\",\"content\":\"in two pieces\"}]}  \r\n0\r\n\r\n",
       200},
  };
  for (size_t i = 0; i < ARRAY_LENGTH(raw); i++) {
    int fd = client_connect(&f);
    client_send(fd, raw[i].request);
    a = answer_of(client_read(fd, NULL));
    if (a.status != raw[i].status && raw[i].status)
      fail_msg("%s: %d, not %d: %s", raw[i].request, a.status, raw[i].status, a.body);
    if (raw[i].status == 200) assert_non_null(strstr(a.body, "in two pieces"));
    answer_free(&a);
    close(fd);
  }
  /* chunks without end: the connection goes, the server stays */
  int fd = client_connect(&f);
  client_send(fd, "POST " CHAT
                  " HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n");
  char chunk[1100] = "400\r\n";
  memset(chunk + 5, ' ', 1024);
  strcpy(chunk + 5 + 1024, "\r\n");
  for (int i = 0; i < 64; i++) client_send(fd, chunk);
  free(client_read(fd, NULL));
  close(fd);
  /* too many chunks, with an end: told so */
  fd = client_connect(&f);
  client_send(fd, "POST " CHAT
                  " HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\nTransfer-Encoding: "
                  "chunked\r\n\r\n");
  for (int i = 0; i < 5; i++) client_send(fd, chunk);
  client_send(fd, "0\r\n\r\n");
  a = answer_of(client_read(fd, NULL));
  assert_int_equal(a.status, 413);
  answer_free(&a);
  close(fd);
  a = ask(&f, "GET", "/health", NULL, NULL);
  assert_int_equal(a.status, 200);
  answer_free(&a);
  fixture_stop(&f);
}

/* Whoever writes all of a request before reading hears why it is refused: its connection holds until then. */
static void refused_after_all_was_written(void **state) {
  (void)state;
  enum { BYTES = 12 << 20 };
  static const struct {
    const char *head;
    int status;
  } refused[] = {{"POST " CHAT " HTTP/1.1\r\nContent-Type: application/json\r\n", 413},
                 {"POST " CHAT " HTTP/1.1\r\nContent-Type: text/plain\r\n", 413},
                 {"POST /nowhere HTTP/1.1\r\nContent-Type: application/json\r\n", 404},
                 {"POST " CHAT " HTTP/1.1\r\nContent-Type: application/json\r\nOrigin: https://evil.example\r\n", 403}};
  struct fixture f;
  fixture_options(&f);
  fixture_start(&f);
  char *body = malloc(BYTES + 1);
  assert_non_null(body);
  memset(body, ' ', BYTES);
  body[BYTES] = '\0';
  for (size_t i = 0; i < ARRAY_LENGTH(refused); i++) {
    char head[256];
    snprintf(head, sizeof head, "%sHost: localhost\r\nConnection: close\r\nContent-Length: %d\r\n\r\n", refused[i].head, BYTES);
    int fd = client_connect(&f);
    client_send(fd, head);
    client_send(fd, body);
    assert_int_equal(send(fd, "", 0, MSG_NOSIGNAL), 0);
    struct answer a = answer_of(client_read(fd, NULL));
    if (a.status != refused[i].status) fail_msg("%s: %d", refused[i].head, a.status);
    answer_free(&a);
    close(fd);
  }
  free(body);
  fixture_stop(&f);
}

static void waits_to_be_told_to_send(void **state) {
  (void)state;
  struct fixture f;
  fixture_options(&f);
  fixture_start(&f);
  int fd = client_connect(&f);
  const char *body = SAYS("hi");
  char head[256];
  snprintf(head, sizeof head,
           "POST " CHAT
           " HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\nExpect: 100-continue\r\n"
           "Content-Length: %zu\r\n\r\n",
           strlen(body));
  client_send(fd, head);
  char *go_on = client_read(fd, "\r\n\r\n");
  assert_int_equal(strncmp(go_on, "HTTP/1.1 100", 12), 0);
  free(go_on);
  client_send(fd, body);
  struct answer a = answer_of(client_read(fd, NULL));
  assert_int_equal(a.status, 200);
  answer_free(&a);
  close(fd);
  fixture_stop(&f);
}

static void keeps_connections(void **state) {
  (void)state;
  struct fixture f;
  fixture_options(&f);
  fixture_start(&f);
  int fd = client_connect(&f);
  for (int i = 0; i < 5; i++) {
    post(fd, CHAT, i % 2 ? STREAM("again") : SAYS("again"));
    char *text = client_read(fd, i % 2 ? "0\r\n\r\n" : "cached_tokens\":0}}}");
    assert_non_null(strstr(text, "HTTP/1.1 200"));
    assert_non_null(strstr(text, "again"));
    free(text);
  }
  close(fd);
  fixture_stop(&f);
}

/* ---- who may ask ---- */

static void keys(void **state) {
  (void)state;
  struct fixture f;
  fixture_options(&f);
  static const char *const list[] = {"first-key", "second"};
  f.options.api_keys = list;
  f.options.n_api_keys = 2;
  fixture_start(&f);
  static const struct {
    const char *headers;
    int status;
  } cases[] = {{NULL, 401},
               {"Authorization: Bearer wrong\r\n", 401},
               {"Authorization: Bearer first\r\n", 401},
               {"Authorization: Basic first-key\r\n", 401},
               {"Authorization: Bearer \r\n", 401},
               {"Authorization: Bearer first-key\r\n", 200},
               {"authorization: bearer second\r\n", 200},
               {"x-api-key: second\r\n", 200}};
  for (size_t i = 0; i < ARRAY_LENGTH(cases); i++) {
    struct answer a = ask(&f, "POST", CHAT, cases[i].headers, SAYS("hi"));
    if (a.status != cases[i].status) fail_msg("%s: %d", cases[i].headers ? cases[i].headers : "no header", a.status);
    if (a.status == 401) assert_non_null(strcasestr(a.head, "WWW-Authenticate: Bearer"));
    answer_free(&a);
  }
  static const char *const closed[] = {"/metrics", "/v1/cache", "/v1/sessions", "/v1/models"}, *const open[] = {"/health", "/",
                                                                                                                "/page/app.js"};
  for (size_t i = 0; i < ARRAY_LENGTH(closed); i++) {
    struct answer a = ask(&f, "GET", closed[i], NULL, NULL);
    assert_int_equal(a.status, 401);
    answer_free(&a);
  }
  for (size_t i = 0; i < ARRAY_LENGTH(open); i++) {
    struct answer a = ask(&f, "GET", open[i], NULL, NULL);
    assert_int_equal(a.status, 200);
    answer_free(&a);
  }
  struct answer a = ask(&f, "POST", "/v1/messages", NULL, "{}");
  assert_non_null(strstr(a.body, "authentication_error"));
  answer_free(&a);
  fixture_stop(&f);
}

static void origins(void **state) {
  (void)state;
  struct fixture f;
  fixture_options(&f);
  f.options.cors = "https://a.example,https://b.example";
  fixture_start(&f);
  struct answer a = ask(&f, "POST", CHAT, "Origin: https://b.example\r\n", SAYS("hi"));
  assert_int_equal(a.status, 200);
  assert_non_null(strcasestr(a.head, "Access-Control-Allow-Origin: https://b.example"));
  assert_non_null(strcasestr(a.head, "Vary: Origin"));
  answer_free(&a);
  a = ask(
      &f, "OPTIONS", CHAT,
      "Origin: https://a.example\r\nAccess-Control-Request-Method: POST\r\nAccess-Control-Request-Headers: content-type,x-b\r\n",
      NULL);
  assert_int_equal(a.status, 204);
  assert_non_null(strcasestr(a.head, "Access-Control-Allow-Methods: POST"));
  assert_non_null(strcasestr(a.head, "Access-Control-Allow-Headers: content-type,x-b"));
  answer_free(&a);
  static const char *const others[] = {"Origin: https://evil.example\r\n", "Origin: null\r\n",
                                       "Origin: https://a.example.evil\r\n"};
  for (size_t i = 0; i < ARRAY_LENGTH(others); i++) {
    a = ask(&f, "POST", CHAT, others[i], SAYS("hi"));
    assert_int_equal(a.status, 403);
    assert_null(strcasestr(a.head, "Access-Control-Allow-Origin"));
    answer_free(&a);
  }
  /* a name of somebody's that points here */
  static const struct {
    const char *host;
    int status;
  } hosts[] = {{"evil.example:8080", 403},
               {"127.0.0.1.evil.example", 403},
               {"127.evil.example:8080", 403},
               {"127.0.0.1:8080", 200},
               {"[::1]:8080", 200}};
  for (size_t i = 0; i < ARRAY_LENGTH(hosts); i++) {
    char request[128];
    snprintf(request, sizeof request, "GET /v1/cache HTTP/1.1\r\nHost: %s\r\nConnection: close\r\n\r\n", hosts[i].host);
    int fd = client_connect(&f);
    client_send(fd, request);
    a = answer_of(client_read(fd, NULL));
    if (a.status != hosts[i].status) fail_msg("%s: %d", hosts[i].host, a.status);
    answer_free(&a);
    close(fd);
  }
  a = ask(&f, "POST", CHAT, "Origin: http://localhost\r\n", SAYS("hi")); /* our own page: "Host: localhost" */
  assert_int_equal(a.status, 200);
  answer_free(&a);
  fixture_stop(&f);
}

/* ---- limits ---- */

static void too_many_connections(void **state) {
  (void)state;
  struct fixture f;
  fixture_options(&f);
  f.options.address_connections = 4;
  fixture_start(&f);
  int fds[4];
  for (int i = 0; i < 4; i++) {
    fds[i] = client_connect(&f);
    client_send(fds[i], "GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n");
    free(client_read(fds[i], "ok\"}"));
  }
  int fifth = client_connect(&f);
  client_send(fifth, "GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n");
  char *text = client_read(fifth, "ok\"}");
  assert_null(strstr(text, "200"));
  free(text);
  close(fifth);
  for (int i = 0; i < 4; i++) close(fds[i]);
  usleep(200000);
  struct answer a = ask(&f, "GET", "/health", NULL, NULL);
  assert_int_equal(a.status, 200);
  answer_free(&a);
  fixture_stop(&f);
}

static void idle_and_heads(void **state) {
  (void)state;
  struct fixture f;
  fixture_options(&f);
  f.options.idle_s = 1;
  f.options.header_bytes = 8192;
  fixture_start(&f);
  int fd = client_connect(&f);
  client_send(fd, "GET /health HT"); /* and no more */
  const int64_t begun = time_ns();
  free(client_read(fd, NULL));
  assert_true(time_ns() - begun < (int64_t)4000000000);
  close(fd);
  char *head = malloc(65536);
  assert_non_null(head);
  strcpy(head, "GET /health HTTP/1.1\r\nHost: localhost\r\nX-Long: ");
  size_t n = strlen(head);
  memset(head + n, 'a', 40000);
  strcpy(head + n + 40000, "\r\n\r\n");
  fd = client_connect(&f);
  client_send(fd, head);
  struct answer a = answer_of(client_read(fd, NULL));
  assert_true(a.status == 431 || a.status == 413 || a.status == 0);
  answer_free(&a);
  close(fd);
  free(head);
  fixture_stop(&f);
}

static void answers_in_time(void **state) {
  (void)state;
  struct fixture f;
  fixture_options(&f);
  f.options.request_s = 1;
  fixture_start(&f);
  struct answer a = ask(&f, "POST", CHAT, NULL, SAYS("!wait"));
  assert_int_equal(a.status, 408);
  answer_free(&a);
  a = ask(&f, "POST", "/v1/messages", NULL,
          "{\"max_tokens\":9,\"stream\":true,\"messages\":[{\"role\":\"user\",\"content\":\"!wait\"}]}");
  assert_non_null(strstr(a.body, "timeout_error"));
  answer_free(&a);
  fixture_stop(&f);
}

/* ---- clients ---- */

/* Whoever goes, before the first word or after, gives his place back. */
static void vanishing(void **state) {
  (void)state;
  struct fixture f;
  fixture_options(&f);
  fixture_start(&f);
  static const char *const bodies[] = {SAYS("!wait"), STREAM("!wait"), STREAM("!slow 1000 20")};
  for (size_t i = 0; i < ARRAY_LENGTH(bodies); i++) {
    int fd = client_connect(&f);
    post(fd, CHAT, bodies[i]);
    wait_for(fake_service_running(f.service) == 1);
    if (i > 0) free(client_read(fd, "data: "));
    close(fd);
    wait_for(fake_service_running(f.service) == 0);
    assert_int_equal(fake_service_cancelled(f.service), (int)i + 1);
  }
  /* reset instead of closed */
  int fd = client_connect(&f);
  post(fd, CHAT, STREAM("!wait"));
  wait_for(fake_service_running(f.service) == 1);
  struct linger now = {.l_onoff = 1};
  setsockopt(fd, SOL_SOCKET, SO_LINGER, &now, sizeof now);
  close(fd);
  wait_for(fake_service_running(f.service) == 0);
  fixture_stop(&f);
}

/* What the session keeps last: {"role", "content"}; NULL: no answer. */
static json_t *last_kept(const struct fixture *f, const char *name) {
  struct session_entry entry = {0};
  struct service_error error;
  if (service_session_find(f->service, name, &entry, &error) != OSCAR_OK) return NULL;
  json_t *text = json_loads(entry.text, 0, NULL), *messages = json_object_get(text, "messages");
  json_t *last = json_incref(json_array_get(messages, json_array_size(messages) - 1));
  json_decref(text);
  free(entry.text);
  if (strcmp(text_at(last, "role"), "assistant") == 0) return last;
  json_decref(last);
  return NULL;
}

static bool has_kept(const struct fixture *f, const char *name, const char *begin) {
  json_t *last = last_kept(f, name);
  const bool has = last && strncmp(text_at(last, "content"), begin, strlen(begin)) == 0;
  json_decref(last);
  return has;
}

/* A client that leaves has had enough of the answer: its session keeps what there is of it. So it does when the server stops. */
static void sessions_keep_what_there_is(void **state) {
  (void)state;
  struct fixture f;
  fixture_options(&f);
  f.options.stop_s = 2;
  fixture_start(&f);
  static const char *const bodies[] = {
      "{\"session\":\"a\",\"stream\":true,\"messages\":[{\"role\":\"user\",\"content\":\"!slow 1000 20\"}]}",
      "{\"session\":\"b\",\"messages\":[{\"role\":\"user\",\"content\":\"!slow 1000 20\"}]}",
      "{\"session\":\"c\",\"stream\":true,\"messages\":[{\"role\":\"user\",\"content\":\"!wait\"}]}"};
  static const char *const names[] = {"a", "b", "c"};
  for (int i = 0; i < 3; i++) {
    int fd = client_connect(&f);
    post(fd, CHAT, bodies[i]);
    wait_for(fake_service_running(f.service) == 1);
    if (i == 0) free(client_read(fd, "word"));
    if (i == 1) usleep(200000);
    close(fd);
    wait_for(fake_service_running(f.service) == 0);
    if (i < 2) wait_for(has_kept(&f, names[i], "word "));
  }
  usleep(50000);
  assert_false(has_kept(&f, "c", "")); /* nothing was said: there is no answer */
  /* A request that has taken the session up since says what it holds. */
  int old = client_connect(&f);
  post(old, CHAT, bodies[0]);
  free(client_read(old, "word"));
  json_decref(
      ask_json(&f, "POST", CHAT, "{\"session\":\"a\",\"messages\":[{\"role\":\"user\",\"content\":\"something else\"}]}", 200));
  close(old);
  wait_for(fake_service_running(f.service) == 0);
  usleep(50000);
  assert_true(has_kept(&f, "a", "something else"));
  int fd = client_connect(&f);
  post(fd, CHAT, bodies[0]);
  free(client_read(fd, "word"));
  server_stop(f.server);
  close(fd);
  assert_true(has_kept(&f, "a", "word "));
  fixture_stop(&f);
}

/* ---- the access log ---- */

/* Its lines, once there are so many. */
static char *log_of(const char *path, int lines) {
  static char text[1 << 16];
  int n = 0;
  for (int tries = 0; tries < 1000; tries++) {
    FILE *f = fopen(path, "rb");
    const size_t bytes = f ? fread(text, 1, sizeof text - 1, f) : 0;
    if (f) fclose(f);
    text[bytes] = '\0';
    n = 0;
    for (const char *c = text; *c; c++) n += *c == '\n';
    if (n >= lines) break;
    usleep(10000);
  }
  assert_int_equal(n, lines);
  return text;
}

static void each_request_has_a_line(void **state) {
  (void)state;
  struct fixture f;
  char path[] = "/tmp/oscar-access-XXXXXX", older[64], date[64], client[64], rest[512];
  const char *const keys[] = {"secret-one", "secret-two"}, *const names[] = {"alice", NULL};
  close(mkstemp(path));
  snprintf(older, sizeof older, "%s.1", path);
  fixture_options(&f);
  f.options.api_keys = keys;
  f.options.api_key_names = names;
  f.options.n_api_keys = 2;
  f.options.access_log = ACCESS_LOG_TEXT;
  f.options.access_log_file = path;
  fixture_start(&f);
  struct answer a = ask(&f, "GET", "/v1/models?secret=query", "Authorization: Bearer secret-two\r\n", NULL);
  char want[600];
  snprintf(want, sizeof want, "key-2 GET /v1/models 200 %zu - - - - ", strlen(a.body));
  answer_free(&a);
  char *log = log_of(path, 1);
  assert_int_equal(sscanf(log, "%63s %63s %511[^\n]", date, client, rest), 3);
  assert_string_equal(client, "127.0.0.1");
  int year, month, day, hour, minute, second, ms;
  assert_int_equal(sscanf(date, "%4d-%2d-%2dT%2d:%2d:%2d.%3dZ", &year, &month, &day, &hour, &minute, &second, &ms), 7);
  assert_true(strlen(date) == 24 && year >= 2024);
  assert_memory_equal(rest, want, strlen(want));
  /* the answer's numbers, of a stream and of a whole one; nothing of what was said or of keys */
  static const char *const bodies[] = {SAYS("!long 3"), STREAM("!long 3")};
  for (int i = 0; i < 2; i++) {
    a = ask(&f, "POST", CHAT, "Authorization: Bearer secret-one\r\n", bodies[i]);
    assert_int_equal(a.status, 200);
    log = log_of(path, 2 + i);
    size_t bytes;
    int prompt, cached, generated;
    double total;
    log[strlen(log) - 1] = '\0';
    log = strrchr(log, '\n') + 1;
    assert_int_equal(
        sscanf(log, "%*s 127.0.0.1 alice POST " CHAT " 200 %zu %d %d %d - %lf", &bytes, &prompt, &cached, &generated, &total), 5);
    assert_int_equal(bytes, strlen(a.body));
    assert_true(prompt > 10 && cached == 0 && generated == 3 && total > 0 && total < 10000);
    answer_free(&a);
  }
  /* refusals, a path that would break the line, a client that leaves */
  a = ask(&f, "GET", "/v1/models", NULL, NULL);
  answer_free(&a);
  a = ask(&f, "GET", "/a%20b%0ac%25", "Authorization: Bearer secret-one\r\n", NULL);
  answer_free(&a);
  int fd = client_connect(&f);
  client_send(fd, "POST " CHAT " HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer secret-one\r\n"
                  "Content-Type: application/json\r\nContent-Length: 51\r\n\r\n" SAYS("!wait") "         ");
  wait_for(fake_service_running(f.service) == 1);
  close(fd);
  log = log_of(path, 6);
  assert_non_null(strstr(log, " 127.0.0.1 - GET /v1/models 401 "));
  assert_non_null(strstr(log, " - GET /a%20b%0Ac%25 404 "));
  assert_non_null(strstr(log, " alice POST " CHAT " - - "));
  assert_true(!strstr(log, "secret") && !strstr(log, "!long") && !strstr(log, "word"));
  /* rotated: what comes then is in a file of the old name */
  assert_int_equal(rename(path, older), 0);
  server_reopen_log(f.server);
  wait_for(access(path, F_OK) == 0);
  a = ask(&f, "GET", "/health", NULL, NULL);
  answer_free(&a);
  assert_non_null(strstr(log_of(path, 1), " - GET /health 200 16 - - - - "));
  log_of(older, 6);
  fixture_stop(&f);
  unlink(path);
  unlink(older);
}

static void lines_can_be_json(void **state) {
  (void)state;
  struct fixture f;
  char path[] = "/tmp/oscar-access-XXXXXX";
  close(mkstemp(path));
  fixture_options(&f);
  f.options.access_log = ACCESS_LOG_JSON;
  f.options.access_log_file = path;
  fixture_start(&f);
  struct answer a = ask(&f, "POST", CHAT, NULL, SAYS("some words"));
  answer_free(&a);
  log_of(path, 1); /* a line is there when its exchange is over, not when its client is */
  a = ask(&f, "HEAD", "/a%22b%ff", NULL, NULL);
  answer_free(&a);
  char *log = log_of(path, 2), *end = strchr(log, '\n');
  json_t *line = json_loadb(log, (size_t)(end - log), 0, NULL);
  assert_text_at(line, "client", "127.0.0.1");
  assert_text_at(line, "method", "POST");
  assert_text_at(line, "path", CHAT);
  assert_number_at(line, "status", 200);
  assert_number_at(line, "generated_tokens", 2);
  assert_number_at(line, "cached_tokens", 0);
  assert_true(json_is_null(at(line, "user")) && json_is_null(at(line, "first_token_ms")));
  assert_true(json_number_value(at(line, "total_ms")) >= 0 && json_integer_value(at(line, "prompt_tokens")) > 2);
  assert_int_equal(json_object_size(line), 12);
  json_decref(line);
  line = json_loads(end + 1, 0, NULL);
  assert_text_at(line, "path", "/a\"b\xEF\xBF\xBD");
  assert_number_at(line, "status", 404);
  assert_number_at(line, "bytes", 0);
  assert_true(json_is_null(at(line, "prompt_tokens")));
  json_decref(line);
  fixture_stop(&f);
  unlink(path);
  /* a file that cannot be */
  char error[512];
  f.options.access_log_file = "/nonexistent/folder/log";
  f.service = fake_service_create(f.options.model_path);
  assert_int_equal(server_create(&f.options, f.service, &f.server, error, sizeof error), OSCAR_IO);
  assert_non_null(strstr(error, "/nonexistent/folder/log: the access log cannot be opened"));
  service_free(f.service);
}

/* A client that stops reading does not stop others, and loses its answer when what waits for it is too much. */
static void not_reading(void **state) {
  (void)state;
  struct fixture f;
  fixture_options(&f);
  f.options.stream_bytes = 65536;
  fixture_start(&f);
  int fd = socket(AF_INET, SOCK_STREAM, 0), small = 4096;
  setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &small, sizeof small);
  struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)server_port(f.server))};
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  assert_int_equal(connect(fd, (struct sockaddr *)&address, sizeof address), 0);
  post(fd, CHAT, STREAM("!long 1000000"));
  wait_for(fake_service_cancelled(f.service) == 1);
  struct answer a = ask(&f, "POST", CHAT, NULL, SAYS("others go on"));
  assert_int_equal(a.status, 200);
  answer_free(&a);
  close(fd);
  fixture_stop(&f);
}

/* A silent stream says that it lives. */
static void pings(void **state) {
  (void)state;
  struct fixture f;
  fixture_options(&f);
  f.options.ping_s = 1;
  fixture_start(&f);
  int fd = client_connect(&f);
  post(fd, CHAT, STREAM("!wait"));
  char *text = client_read(fd, ": ping\n\n");
  assert_non_null(strstr(text, ": ping\n\n"));
  free(text);
  close(fd);
  fixture_stop(&f);
}

/* 100 slow streams at once over one thread of bytes; every one is whole, and their words come as they are said. */
static void many_streams(void **state) {
  (void)state;
  enum { STREAMS = 100, WORDS = 20 };
  struct fixture f;
  fixture_options(&f);
  fixture_start(&f);
  int fds[STREAMS];
  for (int i = 0; i < STREAMS; i++) {
    fds[i] = client_connect(&f);
    post(fds[i], CHAT, STREAM("!slow 20 20"));
  }
  wait_for(fake_service_running(f.service) > STREAMS / 2);
  struct answer a = ask(&f, "GET", "/health", NULL, NULL);
  assert_int_equal(a.status, 200);
  answer_free(&a);
  for (int i = 0; i < STREAMS; i++) {
    char *text = client_read(fds[i], "[DONE]"), *from = text;
    int words = 0;
    for (; (from = strstr(from, "\"content\":\"word \"")); from++) words++;
    assert_int_equal(words, WORDS);
    free(text);
    close(fds[i]);
  }
  fixture_stop(&f);
}

/* ---- stopping ---- */

/* Streams get an end, what waits an answer, and new connections nothing. */
static void stopping(void **state) {
  (void)state;
  struct fixture f;
  fixture_options(&f);
  f.options.stop_s = 2;
  fixture_start(&f);
  int stream = client_connect(&f), whole = client_connect(&f), silent = client_connect(&f), stuck = client_connect(&f);
  post(stream, CHAT, STREAM("!slow 1000 20"));
  post(whole, CHAT, SAYS("!wait"));
  client_send(silent, "GET /hea");
  post(stuck, "/v1/messages", "{\"max_tokens\":9,\"stream\":true,\"messages\":[{\"role\":\"user\",\"content\":\"!wait\"}]}");
  free(client_read(stream, "word"));
  wait_for(fake_service_running(f.service) == 3);
  server_stop(f.server);
  struct answer a = answer_of(client_read(whole, NULL));
  assert_int_equal(a.status, 503);
  answer_free(&a);
  char *text = client_read(stream, NULL);
  assert_non_null(strstr(text, "the server is stopping"));
  assert_non_null(strstr(text, "[DONE]"));
  free(text);
  text = client_read(stuck, NULL);
  assert_non_null(strstr(text, "overloaded_error"));
  free(text);
  close(stream);
  close(whole);
  close(silent);
  close(stuck);
  fixture_stop(&f);
}

static void addresses(void **state) {
  (void)state;
  struct fixture f, second;
  fixture_options(&f);
  fixture_start(&f);
  second = f;
  second.options.port = server_port(f.server);
  char error[512];
  struct server *server;
  assert_int_equal(server_create(&second.options, f.service, &server, error, sizeof error), OSCAR_IO);
  assert_non_null(strstr(error, "cannot listen"));
  second.options.host = "no such host";
  assert_int_equal(server_create(&second.options, f.service, &server, error, sizeof error), OSCAR_INVALID_ARGUMENT);
  second.options.host = "127.0.0.1";
  second.options.model_path = "/no/such/model.gguf";
  assert_int_equal(server_create(&second.options, f.service, &server, error, sizeof error), OSCAR_IO);
  fixture_stop(&f);
}

/* A Unix socket: one that a killed server left is taken over, one that is in use or something else is not. */
static void unix_sockets(void **state) {
  (void)state;
  struct fixture f, second;
  char error[512], path[] = "/tmp/oscar-socket-XXXXXX";
  struct server *server;
  int fd = mkstemp(path);
  assert_true(fd >= 0);
  close(fd);
  fixture_options(&f);
  f.options.unix_socket = path;
  f.service = fake_service_create(f.options.model_path);
  assert_int_equal(server_create(&f.options, f.service, &server, error, sizeof error), OSCAR_IO); /* a file of somebody's */
  assert_int_equal(access(path, F_OK), 0);
  unlink(path);
  struct sockaddr_un address = {.sun_family = AF_UNIX};
  snprintf(address.sun_path, sizeof address.sun_path, "%s", path);
  fd = socket(AF_UNIX, SOCK_STREAM, 0);
  assert_int_equal(bind(fd, (struct sockaddr *)&address, sizeof address), 0);
  close(fd); /* and the socket stays */
  if (server_create(&f.options, f.service, &f.server, error, sizeof error) != OSCAR_OK) fail_msg("%s", error);
  second = f;
  assert_int_equal(server_create(&second.options, f.service, &server, error, sizeof error), OSCAR_IO);
  assert_non_null(strstr(error, "cannot listen"));
  fd = socket(AF_UNIX, SOCK_STREAM, 0);
  assert_int_equal(connect(fd, (struct sockaddr *)&address, sizeof address), 0);
  client_send(fd, "GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
  struct answer a = answer_of(client_read(fd, NULL));
  assert_int_equal(a.status, 200);
  answer_free(&a);
  close(fd);
  fixture_stop(&f);
  assert_int_equal(access(path, F_OK), -1);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(routes),
      cmocka_unit_test(bodies),
      cmocka_unit_test(refused_after_all_was_written),
      cmocka_unit_test(waits_to_be_told_to_send),
      cmocka_unit_test(keeps_connections),
      cmocka_unit_test(keys),
      cmocka_unit_test(origins),
      cmocka_unit_test(too_many_connections),
      cmocka_unit_test(idle_and_heads),
      cmocka_unit_test(answers_in_time),
      cmocka_unit_test(vanishing),
      cmocka_unit_test(sessions_keep_what_there_is),
      cmocka_unit_test(each_request_has_a_line),
      cmocka_unit_test(lines_can_be_json),
      cmocka_unit_test(not_reading),
      cmocka_unit_test(pings),
      cmocka_unit_test(many_streams),
      cmocka_unit_test(stopping),
      cmocka_unit_test(addresses),
      cmocka_unit_test(unix_sockets),
  };
  const int failed = cmocka_run_group_tests(tests, NULL, NULL);
  unlink(fixture_model());
  return failed;
}
