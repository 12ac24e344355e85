/*
 * sessions.c - the service's sessions over HTTP. What a session keeps beside its pages is a JSON text {"model", "kv", "title",
 * "messages"} (docs/formats.md).
 *
 * A session begins to exist with the first request that names it. One that is announced before (POST /v1/sessions) is a name with
 * a title, kept here until then.
 */
#include "server/state.h"

#include "engine/json_text.h"

#include <stdio.h>
#include <string.h>
#include <time.h>

static const char *tier_name(enum session_tier tier) {
  switch (tier) {
  case TIER_DEVICE:
    return "device";
  case TIER_HOST:
    return "host";
  case TIER_DISK:
    return "disk";
  case TIER_RUNNING:
    return "running";
  }
  return "device";
}

/* ---- announced sessions, under the server's lock ---- */

static struct pending_session *find_pending(struct server *server, const char *name) {
  for (int i = 0; i < server->n_pending; i++)
    if (strcmp(server->pending[i].name, name) == 0) return &server->pending[i];
  return NULL;
}

static bool copy_pending(struct server *server, const char *name, struct pending_session *copy) {
  pthread_mutex_lock(&server->lock);
  const struct pending_session *found = find_pending(server, name);
  if (found) *copy = *found;
  pthread_mutex_unlock(&server->lock);
  return found;
}

static bool remove_pending(struct server *server, const char *name) {
  pthread_mutex_lock(&server->lock);
  struct pending_session *found = find_pending(server, name);
  if (found) *found = server->pending[--server->n_pending];
  pthread_mutex_unlock(&server->lock);
  return found;
}

static bool put_pending(struct server *server, const struct pending_session *one) {
  pthread_mutex_lock(&server->lock);
  struct pending_session *found = find_pending(server, one->name);
  if (!found && server->n_pending < MOST_PENDING) found = &server->pending[server->n_pending++];
  if (found) *found = *one;
  pthread_mutex_unlock(&server->lock);
  return found;
}

/* ---- as JSON ---- */

/* The text that is kept, NULL if it is not ours. */
static json_t *about(const struct session_entry *entry) {
  json_t *text = entry->text ? json_loads(entry->text, 0, NULL) : NULL;
  if (json_is_object(text)) return text;
  json_decref(text);
  return NULL;
}

static json_t *entry_json(const struct session_entry *e, bool with_messages) {
  json_t *text = about(e), *title = json_object_get(text, "title"), *messages = json_object_get(text, "messages");
  json_t *entry =
      json_pack("{s:s, s:s, s:O, s:s, s:I, s:I, s:I, s:{s:I, s:I, s:I}, s:b, s:I, s:I}", "id", e->name, "object", "session",
                "title", json_is_string(title) ? title : json_null(), "tier", tier_name(e->tier), "tokens", (json_int_t)e->tokens,
                "exact_pages", (json_int_t)e->exact_pages, "coded_pages", (json_int_t)e->coded_pages, "bytes", "device",
                (json_int_t)e->device_bytes, "host", (json_int_t)e->host_bytes, "disk", (json_int_t)e->disk_bytes, "on_disk",
                e->on_disk, "created", (json_int_t)e->created_at, "used", (json_int_t)e->used_at);
  if (with_messages) json_object_set_new(entry, "messages", json_is_array(messages) ? json_incref(messages) : json_array());
  json_decref(text);
  return entry;
}

static json_t *pending_json(const struct pending_session *p, bool with_messages) {
  json_t *text = json_pack("{s:o}", "title", json_text(p->title, strlen(p->title)));
  struct session_entry entry = {.created_at = p->created_at, .used_at = p->created_at, .text = json_dumps(text, JSON_COMPACT)};
  snprintf(entry.name, sizeof entry.name, "%s", p->name);
  json_t *made = entry_json(&entry, with_messages);
  free(entry.text);
  json_decref(text);
  return made;
}

static void reply_error(struct exchange *ex, const struct service_error *error) {
  struct refusal refusal = {0};
  refuse_service(&refusal, error);
  reply_refusal(ex, &refusal);
}

static void reply_none(struct exchange *ex) {
  struct refusal refusal = {0};
  refuse(&refusal, 404, "not_found", "session", "there is no session '%s'", ex->name);
  reply_refusal(ex, &refusal);
}

/* The session of the path; false: the reply has been made. */
static bool find_session(struct exchange *ex, struct session_entry *entry) {
  struct service_error error = {0};
  if (!session_name_is_valid(ex->name)) {
    reply_none(ex);
    return false;
  }
  const oscar_status status = service_session_find(ex->server->service, ex->name, entry, &error);
  if (status == OSCAR_OK) return true;
  if (status == OSCAR_INVALID_ARGUMENT)
    reply_none(ex);
  else
    reply_error(ex, &error);
  return false;
}

/* The session as it is now. */
static void reply_session(struct exchange *ex, int status, const char *name, bool with_messages) {
  struct session_entry entry = {0};
  struct pending_session pending;
  struct service_error error = {0};
  if (service_session_find(ex->server->service, name, &entry, &error) == OSCAR_OK) {
    reply_json(ex, status, entry_json(&entry, with_messages));
    free(entry.text);
  } else if (copy_pending(ex->server, name, &pending)) {
    reply_json(ex, status, pending_json(&pending, with_messages));
  } else {
    reply_none(ex);
  }
}

/* ---- titles ---- */

/* The beginning of a text, on one line, in whole characters. */
static void begin_of(const char *text, char *title, size_t room) {
  size_t n = strcspn(text, "\n");
  const size_t most = room - 1 < 80 ? room - 1 : 80;
  if (n > most) {
    n = most;
    while (n > 0 && ((unsigned char)text[n] & 0xC0) == 0x80) n--;
  }
  snprintf(title, room, "%.*s", (int)n, text);
}

static const char *first_words(const json_t *messages) {
  size_t i, k;
  json_t *message, *part;
  json_array_foreach(messages, i, message) {
    const char *role = json_string_value(json_object_get(message, "role"));
    json_t *content = json_object_get(message, "content");
    if (!role || strcmp(role, "user") != 0) continue;
    if (json_is_string(content)) return json_string_value(content);
    json_array_foreach(content, k, part) {
      if (json_is_string(json_object_get(part, "text"))) return json_string_value(json_object_get(part, "text"));
    }
  }
  return "";
}

void session_title(struct server *server, const char *name, const json_t *messages, char *title, size_t room) {
  struct session_entry entry = {0};
  struct pending_session pending;
  struct service_error error = {0};
  title[0] = '\0';
  if (service_session_find(server->service, name, &entry, &error) == OSCAR_OK) {
    json_t *text = about(&entry);
    const char *known = json_string_value(json_object_get(text, "title"));
    if (known) snprintf(title, room, "%s", known);
    json_decref(text);
    free(entry.text);
    remove_pending(server, name);
  } else if (copy_pending(server, name, &pending)) {
    snprintf(title, room, "%s", pending.title);
  }
  if (!*title) begin_of(first_words(messages), title, room);
}

bool session_holds(struct server *server, const char *name, const json_t *messages) {
  struct session_entry entry = {0};
  struct service_error error = {0};
  if (service_session_find(server->service, name, &entry, &error) != OSCAR_OK) return false;
  json_t *text = about(&entry);
  const bool same = json_equal(json_object_get(text, "messages"), messages);
  json_decref(text);
  free(entry.text);
  return same;
}

/* ---- endpoints ---- */

void sessions_list(struct exchange *ex, struct frontend *frontend) {
  (void)frontend;
  struct server *server = ex->server;
  struct session_entry *entries = NULL;
  struct service_error error = {0};
  int count = 0;
  if (service_sessions(server->service, &entries, &count, &error) != OSCAR_OK) {
    reply_error(ex, &error);
    return;
  }
  json_t *list = json_array();
  pthread_mutex_lock(&server->lock);
  for (int i = server->n_pending - 1; i >= 0; i--) {
    bool exists = false;
    for (int k = 0; k < count; k++) exists |= strcmp(entries[k].name, server->pending[i].name) == 0;
    if (!exists) json_array_append_new(list, pending_json(&server->pending[i], false));
  }
  pthread_mutex_unlock(&server->lock);
  for (int i = 0; i < count; i++) json_array_append_new(list, entry_json(&entries[i], false));
  service_sessions_free(entries, count);
  reply_json(ex, 200, json_pack("{s:s, s:o}", "object", "list", "data", list));
}

void sessions_get(struct exchange *ex, struct frontend *frontend) {
  (void)frontend;
  reply_session(ex, 200, ex->name, true);
}

/* {"id"?, "title"?}; false: a refusal. Names are checked. */
static bool read_names(struct exchange *ex, json_t **body, const char **id, const char **title, struct refusal *refusal) {
  static const struct field_rule rules[] = {{"id", FIELD_READ, NULL}, {"title", FIELD_READ, NULL}, {NULL, FIELD_READ, NULL}};
  struct fields f;
  if (!fields_parse(ex->body.data ? ex->body.data : "", ex->body.bytes, body, &f, refusal) || !fields_obey(&f, rules, NULL) ||
      !field_text(&f, "id", id) || !field_text(&f, "title", title))
    return false;
  if (*id && !session_name_is_valid(*id)) return field_refuse(&f, "id", "must be " SESSION_NAME_RULE);
  if (*title && strlen(*title) >= sizeof ex->server->pending[0].title)
    return field_refuse(&f, "title", "has more than %zu bytes", sizeof ex->server->pending[0].title - 1);
  return true;
}

static bool is_taken(struct server *server, const char *name) {
  struct session_entry entry = {0};
  struct pending_session pending;
  struct service_error error = {0};
  const bool taken = service_session_find(server->service, name, &entry, &error) == OSCAR_OK;
  free(entry.text);
  return taken || copy_pending(server, name, &pending);
}

void sessions_make(struct exchange *ex, struct frontend *frontend) {
  (void)frontend;
  json_t *body = NULL;
  const char *id = NULL, *title = "";
  struct refusal refusal = {0};
  bool good = read_names(ex, &body, &id, &title, &refusal);
  if (good && !id) good = refuse(&refusal, 400, NULL, "id", "id is missing");
  if (good && is_taken(ex->server, id)) good = refuse(&refusal, 409, "exists", "id", "there is a session '%s' already", id);
  if (good) {
    struct pending_session one = {.created_at = time(NULL)};
    snprintf(one.name, sizeof one.name, "%s", id);
    snprintf(one.title, sizeof one.title, "%s", title);
    good = put_pending(ex->server, &one) ||
           refuse(&refusal, 429, "too_many", NULL, "%d sessions are announced that nobody has used; use or delete some",
                  MOST_PENDING);
  }
  if (good)
    reply_session(ex, 201, id, true);
  else
    reply_refusal(ex, &refusal);
  json_decref(body);
}

/* A new title goes into the text that is kept. */
static oscar_status retitle(struct exchange *ex, const struct session_entry *entry, const char *title,
                            struct service_error *error) {
  json_t *text = about(entry);
  if (!text) text = json_pack("{s:[]}", "messages");
  json_object_set_new(text, "title", json_text(title, strlen(title)));
  char *dump = json_dumps(text, JSON_COMPACT);
  json_decref(text);
  const oscar_status status = dump ? service_session_annotate(ex->server->service, ex->name, dump, error) : OSCAR_NO_MEMORY;
  free(dump);
  return status;
}

/* An announced session changes here. */
static void change_pending(struct exchange *ex, struct pending_session *one, const char *id, const char *title) {
  if (title) snprintf(one->title, sizeof one->title, "%s", title);
  remove_pending(ex->server, one->name);
  if (id) snprintf(one->name, sizeof one->name, "%s", id);
  put_pending(ex->server, one);
  reply_session(ex, 200, one->name, true);
}

void sessions_change(struct exchange *ex, struct frontend *frontend) {
  (void)frontend;
  json_t *body = NULL;
  const char *id = NULL, *title = NULL;
  struct refusal refusal = {0};
  struct session_entry entry = {0};
  struct pending_session pending;
  struct service_error error = {0};
  if (!read_names(ex, &body, &id, &title, &refusal) ||
      (id && strcmp(id, ex->name) != 0 && is_taken(ex->server, id) &&
       !refuse(&refusal, 409, "exists", "id", "there is a session '%s' already", id))) {
    reply_refusal(ex, &refusal);
  } else if (copy_pending(ex->server, ex->name, &pending)) {
    change_pending(ex, &pending, id, title);
  } else if (find_session(ex, &entry)) {
    oscar_status status = title ? retitle(ex, &entry, title, &error) : OSCAR_OK;
    if (status == OSCAR_OK && id && strcmp(id, ex->name) != 0)
      status = service_session_rename(ex->server->service, ex->name, id, &error);
    if (status == OSCAR_OK)
      reply_session(ex, 200, id ? id : ex->name, true);
    else
      reply_error(ex, &error);
  }
  free(entry.text);
  json_decref(body);
}

void sessions_delete(struct exchange *ex, struct frontend *frontend) {
  (void)frontend;
  struct session_entry entry = {0};
  struct service_error error = {0};
  const bool pending = remove_pending(ex->server, ex->name);
  if (!pending && !find_session(ex, &entry)) return;
  free(entry.text);
  if (!pending && service_session_delete(ex->server->service, ex->name, &error) != OSCAR_OK)
    reply_error(ex, &error);
  else
    reply_json(ex, 200, json_pack("{s:s, s:s, s:b}", "id", ex->name, "object", "session", "deleted", 1));
}

typedef oscar_status session_action(struct service *service, const char *name, struct service_error *error);

static void act(struct exchange *ex, session_action *action) {
  struct session_entry entry = {0};
  struct service_error error = {0};
  if (!find_session(ex, &entry)) return;
  free(entry.text);
  if (action(ex->server->service, ex->name, &error) == OSCAR_OK)
    reply_session(ex, 200, ex->name, false);
  else
    reply_error(ex, &error);
}

void sessions_save(struct exchange *ex, struct frontend *frontend) {
  (void)frontend;
  act(ex, service_session_save);
}

void sessions_load(struct exchange *ex, struct frontend *frontend) {
  (void)frontend;
  act(ex, service_session_load);
}

void sessions_fork(struct exchange *ex, struct frontend *frontend) {
  (void)frontend;
  json_t *body = NULL;
  const char *id = NULL, *title = NULL;
  struct refusal refusal = {0};
  struct session_entry entry = {0};
  struct service_error error = {0};
  bool good = read_names(ex, &body, &id, &title, &refusal);
  if (good && !id) good = refuse(&refusal, 400, NULL, "id", "id is missing: the name of the copy");
  if (good && is_taken(ex->server, id)) good = refuse(&refusal, 409, "exists", "id", "there is a session '%s' already", id);
  if (!good) {
    reply_refusal(ex, &refusal);
  } else if (find_session(ex, &entry)) {
    if (service_session_fork(ex->server->service, ex->name, id, &error) == OSCAR_OK)
      reply_session(ex, 201, id, true);
    else
      reply_error(ex, &error);
  }
  free(entry.text);
  json_decref(body);
}
