/*
 * inquiry.c - a request to the service, its events copied by the service's thread and taken by others, and what is collected
 * of its answer.
 */
#include "server/inquiry.h"

#include "engine/json_text.h"

#include <stdio.h>
#include <string.h>
#include <sys/random.h>
#include <time.h>

/* ---- lifetime ---- */

static const char letters[] = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789";

void make_id(const char *prefix, char *id, size_t room) {
  unsigned char bytes[24];
  if (getrandom(bytes, sizeof bytes, 0) != (ssize_t)sizeof bytes) memset(bytes, 0, sizeof bytes);
  size_t used = (size_t)snprintf(id, room, "%s", prefix);
  for (size_t i = 0; i < sizeof bytes && used + 1 < room; i++) id[used++] = letters[bytes[i] % (sizeof letters - 1)];
  id[used] = '\0';
}

uint64_t random_seed(void) {
  uint64_t seed = 0;
  return getrandom(&seed, sizeof seed, 0) == (ssize_t)sizeof seed ? seed : (uint64_t)time_ns();
}

struct inquiry *inquiry_create(struct server *server, const struct answer_form *form, json_t *body) {
  struct inquiry *g = calloc(1, sizeof *g);
  if (!g) {
    json_decref(body);
    return NULL;
  }
  g->server = server;
  g->form = form;
  g->body = body;
  g->created = time(NULL);
  g->session_messages = json_array();
  make_id(form->id_prefix, g->id, sizeof g->id);
  request_options_default(&g->options);
  g->options.sampling = server->options.sampling;
  g->options.sampling.seed = random_seed();
  return g;
}

void *inquiry_keep(struct inquiry *g, void *pointer) {
  if (!pointer) return NULL;
  if ((g->n_kept & (g->n_kept - 1)) == 0) { /* full at powers of two */
    void **larger = realloc(g->kept, (g->n_kept ? 2 * (size_t)g->n_kept : 1) * sizeof *larger);
    if (!larger) {
      free(pointer);
      return NULL;
    }
    g->kept = larger;
  }
  g->kept[g->n_kept++] = pointer;
  return pointer;
}

static void choices_free(struct inquiry *g) {
  for (int i = 0; g->choices && i < g->options.choices; i++) {
    struct choice *c = &g->choices[i];
    buffer_free(&c->text);
    buffer_free(&c->reasoning);
    json_decref(c->calls);
    json_decref(c->logprobs);
    reply_parser_free(c->parser);
    free(c->stopped_by);
  }
  free(g->choices);
}

void inquiry_free(struct inquiry *g) {
  if (!g) return;
  choices_free(g);
  for (int i = 0; i < g->n_kept; i++) free(g->kept[i]);
  free((void *)g->kept);
  free(g->messages);
  free(g->tools);
  free(g->ids);
  free((void *)g->stops);
  free(g->bias);
  grammar_free(g->grammar);
  free(g->user);
  free(g->session_text);
  json_decref(g->session_messages);
  json_decref(g->echo);
  json_decref(g->conversation);
  json_decref(g->output);
  oscar_context_free(g->parsing);
  json_decref(g->body);
  free(g);
}

/* ---- copies of events ---- */

struct queued_event {
  struct queued_event *next;
  struct request_event event; /* what it points to is in `storage` */
  struct request_usage usage;
  size_t bytes;
  char storage[]; /* token_report[], ranked_token[], then texts */
};

static size_t text_bytes(const char *text) { return text ? strlen(text) + 1 : 0; }

static char *put(char **at, const char *text, size_t bytes) {
  char *to = *at;
  if (bytes) memcpy(to, text, bytes);
  to[bytes] = '\0';
  *at += bytes + 1;
  return to;
}

static struct queued_event *copy_event(const struct request_event *e) {
  size_t ranked = 0, bytes = e->bytes + 1 + text_bytes(e->stopped_by) + text_bytes(e->error);
  for (int i = 0; i < e->n_tokens; i++) {
    ranked += (size_t)e->tokens[i].n_ranked;
    bytes += e->tokens[i].bytes + 1;
  }
  bytes += sizeof(struct queued_event) + (size_t)e->n_tokens * sizeof *e->tokens + ranked * sizeof(struct ranked_token);
  struct queued_event *q = malloc(bytes);
  if (!q) return NULL;
  *q = (struct queued_event){.event = *e, .bytes = bytes};
  struct token_report *tokens = (struct token_report *)(void *)q->storage;
  struct ranked_token *ranks = (struct ranked_token *)(void *)(tokens + e->n_tokens);
  char *at = (char *)(ranks + ranked);
  for (int i = 0; i < e->n_tokens; i++) {
    tokens[i] = e->tokens[i];
    tokens[i].text = put(&at, e->tokens[i].text, e->tokens[i].bytes);
    tokens[i].ranked = ranks;
    if (e->tokens[i].n_ranked) memcpy(ranks, e->tokens[i].ranked, (size_t)e->tokens[i].n_ranked * sizeof *ranks);
    ranks += e->tokens[i].n_ranked;
  }
  q->event.tokens = tokens;
  q->event.text = put(&at, e->text, e->bytes);
  if (e->stopped_by) q->event.stopped_by = put(&at, e->stopped_by, strlen(e->stopped_by));
  if (e->error) q->event.error = put(&at, e->error, strlen(e->error));
  if (e->usage) {
    q->usage = *e->usage;
    q->event.usage = &q->usage;
  }
  return q;
}

void queued_events_free(struct exchange *ex) {
  for (struct queued_event *q = ex->first_event, *next; q; q = next) {
    next = q->next;
    free(q);
  }
  ex->first_event = ex->last_event = NULL;
  ex->queued_bytes = 0;
}

bool events_waiting(const struct exchange *ex) { return ex->first_event; }

void exchange_observe(void *user, const struct request_event *event) {
  struct exchange *ex = user;
  const bool done = event->kind == EVENT_DONE;
  struct queued_event *copy = copy_event(event);
  pthread_mutex_lock(&ex->lock);
  const size_t before = ex->queued_bytes, limit = ex->server->options.stream_bytes;
  if (done) {
    ex->service_done = true;
    if ((ex->has_usage = event->usage)) ex->usage = *event->usage;
  }
  if (!copy) ex->gone = ex->incomplete = true; /* an answer with a gap is none */
  if (copy && (!ex->gone || inquiry_has_more_to_do(ex->inquiry))) {
    if (ex->last_event)
      ex->last_event->next = copy;
    else
      ex->first_event = copy;
    ex->last_event = copy;
    ex->queued_bytes += copy->bytes;
    copy = NULL;
  }
  const bool full = before <= limit && ex->queued_bytes > limit;
  if (ex->stage == STAGE_SENDING && ex->suspended) {
    ex->suspended = false;
    MHD_resume_connection(ex->connection);
  }
  const bool whole = done && !ex->gone && !ex->inquiry->stream, left = exchange_is_left(ex);
  if (whole) ex->finishing = true;
  pthread_mutex_unlock(&ex->lock);
  free(copy);
  if (full) watch_wake(ex->server);
  if (whole || left) work_push(ex);
  if (done) exchange_release(ex);
}

/* ---- taking events ---- */

static json_t *piece_json(const char *text, size_t bytes, float logprob) {
  json_t *list = json_array();
  for (size_t i = 0; i < bytes; i++) json_array_append_new(list, json_integer((unsigned char)text[i]));
  return json_pack("{s:o, s:o, s:o}", "token", json_text(text, bytes), "logprob", json_number((double)logprob), "bytes", list);
}

static json_t *token_json(const struct inquiry *g, const struct token_report *token) {
  json_t *one = piece_json(token->text, token->bytes, token->logprob), *ranked = json_array();
  for (int i = 0; i < token->n_ranked; i++) {
    size_t bytes;
    const char *piece = frontend_piece(&g->server->frontends[0], token->ranked[i].id, &bytes);
    json_array_append_new(ranked, piece_json(piece, bytes, token->ranked[i].logprob));
  }
  json_object_set_new(one, "top_logprobs", ranked);
  return one;
}

/* What a parser says of the text. */
struct taking {
  struct inquiry *g;
  struct choice *choice;
  struct buffer *out; /* NULL: nothing is written */
  json_t *logprobs;   /* of the event's tokens, until somebody takes them */
};

static void say(struct taking *t, const char *text, size_t bytes) {
  buffer_add(&t->choice->text, text, bytes);
  if (!t->out) return;
  t->g->form->text(t->g, t->choice, text, bytes, t->logprobs, t->out);
  t->logprobs = NULL;
}

static oscar_status take_delta(void *user, const struct reply_delta *delta) {
  struct taking *t = user;
  char id[48];
  switch (delta->kind) {
  case REPLY_CONTENT:
    if (delta->bytes) say(t, delta->text, delta->bytes);
    return OSCAR_OK;
  case REPLY_REASONING:
    buffer_add(&t->choice->reasoning, delta->text, delta->bytes);
    if (t->out && t->g->form->reasoning && delta->bytes)
      t->g->form->reasoning(t->g, t->choice, delta->text, delta->bytes, t->out);
    return OSCAR_OK;
  case REPLY_CALL:
    break;
  case REPLY_MARKUP:
    return OSCAR_OK;
  }
  make_id(t->g->form->call_prefix, id, sizeof id);
  json_t *call =
      json_pack("{s:s, s:s, s:s}", "id", delta->id ? delta->id : id, "name", delta->name, "arguments", delta->arguments);
  if (!t->choice->calls) t->choice->calls = json_array();
  if (!call || json_array_append_new(t->choice->calls, call) != 0) return OSCAR_NO_MEMORY;
  if (t->out) t->g->form->call(t->g, t->choice, call, t->out);
  return OSCAR_OK;
}

static void take_failure(struct inquiry *g, oscar_status status, const char *text) {
  if (g->status != OSCAR_OK) return;
  g->status = status;
  snprintf(g->error, sizeof g->error, "%s", text ? text : oscar_status_name(status));
}

static void take_text(struct taking *t, const struct request_event *e) {
  struct choice *c = t->choice;
  if (t->g->options.logprobs >= 0 && e->n_tokens) {
    t->logprobs = json_array();
    for (int i = 0; i < e->n_tokens; i++) json_array_append_new(t->logprobs, token_json(t->g, &e->tokens[i]));
    if (!c->logprobs) c->logprobs = json_array();
    if (!t->out) json_array_extend(c->logprobs, t->logprobs);
  }
  oscar_status status = OSCAR_OK;
  if (c->parser)
    status = reply_feed(c->parser, e->text, e->bytes, take_delta, t);
  else if (e->bytes)
    say(t, e->text, e->bytes);
  if (status != OSCAR_OK) take_failure(t->g, status, "the answer cannot be taken apart");
  if (t->out && t->logprobs) say(t, "", 0); /* tokens without text yet, or whose text is no content */
  json_decref(t->logprobs);
  t->logprobs = NULL;
}

static void take_finish(struct taking *t, const struct request_event *e) {
  struct choice *c = t->choice;
  if (c->parser && reply_end(c->parser, take_delta, t) != OSCAR_OK) take_failure(t->g, OSCAR_NO_MEMORY, "out of memory");
  c->finished = true;
  c->reason = e->reason;
  if (e->stopped_by) c->stopped_by = strdup(e->stopped_by);
  if (e->reason == FINISH_ERROR) take_failure(t->g, e->status, e->error);
  if (e->reason == FINISH_CANCELLED) t->g->cancelled = true;
  if (t->out && e->reason != FINISH_ERROR && e->reason != FINISH_CANCELLED) t->g->form->finish(t->g, c, t->out);
}

static void take(struct inquiry *g, const struct request_event *e, struct buffer *out) {
  if (e->kind == EVENT_DONE) {
    if (e->usage) g->usage = *e->usage;
    g->done = true;
    return;
  }
  if (e->choice < 0 || e->choice >= g->options.choices || g->choices[e->choice].finished) return;
  struct taking taking = {.g = g, .choice = &g->choices[e->choice], .out = out};
  if (e->kind == EVENT_TEXT)
    take_text(&taking, e);
  else
    take_finish(&taking, e);
}

bool inquiry_take(struct exchange *ex, struct buffer *out) {
  struct inquiry *g = ex->inquiry;
  pthread_mutex_lock(&ex->lock);
  struct queued_event *first = ex->first_event;
  ex->first_event = ex->last_event = NULL;
  ex->queued_bytes = 0;
  pthread_mutex_unlock(&ex->lock);
  for (struct queued_event *q = first, *next; q; q = next) {
    next = q->next;
    take(g, &q->event, out);
    free(q);
  }
  return g->done;
}

/* ---- the beginning and the end ---- */

static bool prepare_choices(struct inquiry *g, const struct frontend *frontend, struct refusal *refusal) {
  g->choices = calloc((size_t)g->options.choices, sizeof *g->choices);
  if (!g->choices) return refuse_memory(refusal);
  const bool calls = g->n_tools > 0 && g->tool_use != TOOLS_NONE;
  const bool parse = g->n_messages > 0 && (calls || frontend->chat.thinks);
  if (parse && !g->parsing) {
    oscar_context_options options;
    oscar_context_options_default(&options);
    options.threads = 1;
    if (oscar_context_create(&options, &g->parsing) != OSCAR_OK) return refuse_memory(refusal);
  }
  for (int i = 0; i < g->options.choices; i++) {
    g->choices[i].index = i;
    if (parse && reply_parser_create(&frontend->chat, g->parsing, calls, &g->choices[i].parser) != OSCAR_OK)
      return refuse_memory(refusal);
  }
  return true;
}

/* What docs/formats.md says of a session, from the request, and from the answer if it is there. */
static char *session_text(struct inquiry *g) {
  char title[256];
  json_t *messages = json_copy(g->session_messages);
  session_title(g->server, g->session, messages, title, sizeof title);
  if (g->done) json_array_append_new(messages, choice_message(&g->choices[0]));
  const struct server_options *o = &g->server->options;
  json_t *whole = json_pack("{s:s, s:s, s:o, s:o}", "model", o->model_name, "kv", o->kv, "title", json_text(title, strlen(title)),
                            "messages", messages);
  char *text = whole ? json_dumps(whole, JSON_COMPACT) : NULL;
  json_decref(whole);
  return text;
}

static bool complete_options(struct exchange *ex, struct inquiry *g, struct refusal *refusal) {
  const struct server *server = g->server;
  struct request_options *o = &g->options;
  o->grammar = g->grammar;
  o->ids = g->ids;
  o->observer = exchange_observe;
  o->observer_user = ex;
  if (server->options.request_s) o->deadline_ns = ex->arrived_ns + (int64_t)server->options.request_s * 1000000000;
  /* Whoever shares a key cannot take the turns of another key's users. */
  char user[320] = "";
  if (ex->key >= 0 || o->user) snprintf(user, sizeof user, "%d/%.256s", ex->key, o->user ? o->user : "");
  if (*user && !(g->user = strdup(user))) return refuse_memory(refusal);
  o->user = g->user;
  o->session = g->session;
  if (!g->session) return true;
  g->session_text = session_text(g);
  o->session_text = g->session_text;
  return g->session_text || refuse_memory(refusal);
}

void inquiry_submit(struct exchange *ex, struct inquiry *g, const struct frontend *frontend) {
  struct refusal refusal = {0};
  struct service_error error = {0};
  ex->inquiry = g;
  if (!prepare_choices(g, frontend, &refusal) || !complete_options(ex, g, &refusal)) {
    reply_refusal(ex, &refusal);
    return;
  }
  if (g->stream) ex->reply = (struct reply){.status = 200, .type = "text/event-stream", .stream = true};
  ex->submitted = true;
  ex->submitted_ns = time_ns();
  exchange_hold(ex); /* the service's */
  uint64_t id;
  if (service_submit(g->server->service, &g->options, &id, &error) != OSCAR_OK) {
    ex->submitted = false;
    refuse_service(&refusal, &error);
    reply_refusal(ex, &refusal);
    exchange_release(ex);
    return;
  }
  pthread_mutex_lock(&ex->lock);
  ex->request = id;
  const bool gone = ex->gone && !ex->service_done;
  pthread_mutex_unlock(&ex->lock);
  if (gone) service_cancel(g->server->service, id);
  if (!g->stream) return;
  inquiry_begin(ex, &ex->out);
  exchange_ready(ex);
}

struct inquiry *inquiry_parse(struct server *server, struct frontend *frontend, const struct answer_form *form,
                              read_request *read, const char *body, size_t bytes, struct refusal *refusal) {
  json_t *parsed;
  struct fields fields;
  if (!fields_parse(body, bytes, &parsed, &fields, refusal)) {
    json_decref(parsed);
    return NULL;
  }
  struct inquiry *g = inquiry_create(server, form, parsed);
  if (!g) refuse_memory(refusal);
  if (g && read(g, &fields, frontend)) return g;
  inquiry_free(g);
  return NULL;
}

void inquiry_run(struct exchange *ex, struct frontend *frontend, const struct answer_form *form, read_request *read) {
  struct refusal refusal = {0};
  struct inquiry *g =
      inquiry_parse(ex->server, frontend, form, read, ex->body.data ? ex->body.data : "", ex->body.bytes, &refusal);
  if (g)
    inquiry_submit(ex, g, frontend);
  else
    reply_refusal(ex, &refusal);
}

void inquiry_begin(struct exchange *ex, struct buffer *out) { ex->inquiry->form->begin(ex->inquiry, out); }

bool inquiry_has_more_to_do(const struct inquiry *g) { return g->session != NULL; }

/* Of an answer that was cancelled, what there is of it is kept; it may be nothing. */
static bool has_said_something(const struct choice *c) { return c->text.bytes || c->reasoning.bytes || c->calls; }

void inquiry_finish(struct inquiry *g) {
  if (!g->session || (g->cancelled && !has_said_something(&g->choices[0]))) return;
  struct service_error error;
  /* A session that was deleted meanwhile keeps nothing, and one that another request has taken up what that said. */
  if (!session_holds(g->server, g->session, g->session_messages)) return;
  char *text = session_text(g);
  if (text) service_session_annotate(g->server->service, g->session, text, &error);
  free(text);
}

bool inquiry_succeeded(const struct inquiry *g, struct refusal *refusal) {
  if (g->status == OSCAR_NO_SPACE) return refuse(refusal, 503, "no_space", NULL, "%s", g->error);
  if (g->status != OSCAR_OK) return refuse(refusal, 500, NULL, NULL, "%s", g->error);
  if (!g->cancelled) return true;
  if (g->options.deadline_ns && time_ns() >= g->options.deadline_ns)
    return refuse(refusal, 408, "timeout", NULL, "the answer took longer than the %d seconds that this server gives it",
                  g->server->options.request_s);
  refusal->retry_after = 5;
  return refuse(refusal, 503, "stopping", NULL, "the answer was cancelled: the server is stopping");
}

void inquiry_end(struct inquiry *g, struct buffer *out) {
  struct refusal refusal = {0};
  if (inquiry_succeeded(g, &refusal))
    g->form->end(g, out);
  else
    g->form->fail(g, &refusal, out);
}

void inquiry_reply(struct exchange *ex) {
  struct inquiry *g = ex->inquiry;
  struct refusal refusal = {0};
  if (inquiry_succeeded(g, &refusal))
    reply_json(ex, 200, g->form->whole(g));
  else
    reply_refusal(ex, &refusal);
}

/* ---- shared by forms ---- */

json_t *choice_message(const struct choice *c) {
  json_t *content = c->text.bytes || !c->calls ? json_text(c->text.data ? c->text.data : "", c->text.bytes) : json_null();
  json_t *message = json_pack("{s:s, s:o}", "role", "assistant", "content", content);
  if (c->reasoning.bytes) json_object_set_new(message, "reasoning_content", json_text(c->reasoning.data, c->reasoning.bytes));
  if (!c->calls) return message;
  json_t *calls = json_array(), *call;
  size_t i;
  json_array_foreach(c->calls, i, call) {
    json_array_append_new(calls,
                          json_pack("{s:O, s:s, s:{s:O, s:O}}", "id", json_object_get(call, "id"), "type", "function", "function",
                                    "name", json_object_get(call, "name"), "arguments", json_object_get(call, "arguments")));
  }
  json_object_set_new(message, "tool_calls", calls);
  return message;
}

json_t *openai_usage(const struct inquiry *g) {
  const struct request_usage *u = &g->usage;
  return json_pack("{s:I, s:I, s:I, s:{s:I}}", "prompt_tokens", (json_int_t)u->prompt_tokens, "completion_tokens",
                   (json_int_t)u->generated, "total_tokens", (json_int_t)(u->prompt_tokens + u->generated),
                   "prompt_tokens_details", "cached_tokens", (json_int_t)u->reused_exact);
}

void write_data(struct buffer *out, json_t *value) {
  buffer_text(out, "data: ");
  buffer_json(out, value);
  buffer_text(out, "\n\n");
}

void write_event(struct buffer *out, const char *type, json_t *value) {
  buffer_text(out, "event: ");
  buffer_text(out, type);
  buffer_text(out, "\n");
  write_data(out, value);
}
