/* openai_chat.c - POST /v1/chat/completions, and the models. */
#include "server/inquiry.h"

#include "engine/json_text.h"

#include <limits.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

/* ---- reading ---- */

static const struct field_rule rules[] = {
    {"messages", FIELD_READ, NULL},
    {"max_tokens", FIELD_READ, NULL},
    {"max_completion_tokens", FIELD_READ, NULL},
    {"n", FIELD_READ, NULL},
    {"stop", FIELD_READ, NULL},
    {"stream_options", FIELD_READ, NULL},
    {"logprobs", FIELD_READ, NULL},
    {"top_logprobs", FIELD_READ, NULL},
    {"response_format", FIELD_READ, NULL},
    {"tools", FIELD_READ, NULL},
    {"tool_choice", FIELD_READ, NULL},
    {"user", FIELD_READ, NULL},
    {"parallel_tool_calls", FIELD_HARMLESS, NULL},
    {"store", FIELD_HARMLESS, NULL},
    {"modalities", FIELD_READ, NULL},
    {"reasoning_effort", FIELD_PLAIN, "none"},
    {"verbosity", FIELD_PLAIN, "medium"},
    {"audio", FIELD_PLAIN, NULL},
    {"prediction", FIELD_HARMLESS, NULL}, /* it could only make the same answer faster */
    {"functions", FIELD_PLAIN, NULL},
    {"function_call", FIELD_PLAIN, "none"},
    {"web_search_options", FIELD_PLAIN, NULL},
    {NULL, FIELD_READ, NULL},
};

static bool read_calls(struct inquiry *g, struct chat_message *message, const struct fields *f) {
  const json_t *calls = NULL;
  if (!field_array(f, "tool_calls", &calls) || !calls) return calls == NULL && f->refusal->status == 0;
  size_t i;
  json_t *call;
  json_array_foreach(calls, i, call) {
    char path[FIELD_PATH], inner[FIELD_PATH];
    struct fields outside, function;
    const char *id = NULL, *name = NULL, *arguments = NULL;
    if (!fields_enter_item(f, "tool_calls", i, call, path, &outside) || !field_text(&outside, "id", &id) ||
        !fields_enter_field(&outside, "function", inner, &function) || !field_needed_text(&function, "name", &name) ||
        !field_needed_text(&function, "arguments", &arguments) || !add_call(g, message, id, name, arguments, &function))
      return false;
  }
  return true;
}

static bool read_message(struct inquiry *g, const struct fields *f) {
  static const struct field_rule message_rules[] = {{"role", FIELD_READ, NULL},
                                                    {"content", FIELD_READ, NULL},
                                                    {"name", FIELD_READ, NULL},
                                                    {"tool_calls", FIELD_READ, NULL},
                                                    {"tool_call_id", FIELD_READ, NULL},
                                                    {"refusal", FIELD_HARMLESS, NULL},
                                                    {"annotations", FIELD_HARMLESS, NULL},
                                                    {"reasoning_content", FIELD_HARMLESS, NULL},
                                                    {"audio", FIELD_PLAIN, NULL},
                                                    {"function_call", FIELD_PLAIN, NULL},
                                                    {NULL, FIELD_READ, NULL}};
  const char *role = NULL, *content = NULL;
  if (!fields_obey(f, message_rules, NULL) || !field_needed_text(f, "role", &role)) return false;
  const char *known = template_role(role);
  if (!known) return field_refuse(f, "role", "must be system, developer, user, assistant or tool, not '%.20s'", role);
  const bool calls = json_array_size(field(f, "tool_calls")) > 0;
  if (calls && strcmp(known, "assistant") != 0) return field_refuse(f, "tool_calls", "belong to messages of the assistant");
  if ((field(f, "content") || !calls) && !parts_text(g, f, "content", "text", &content)) return false;
  struct chat_message *message = add_message(g, known, content, f);
  return message && field_text(f, "name", &message->name) && field_text(f, "tool_call_id", &message->tool_call_id) &&
         read_calls(g, message, f);
}

static bool read_messages(struct inquiry *g, const struct fields *f) {
  const json_t *list = NULL;
  if (!field_needed_array(f, "messages", &list)) return false;
  size_t i;
  json_t *message;
  json_array_foreach(list, i, message) {
    char path[FIELD_PATH];
    struct fields inside;
    if (!fields_enter_item(f, "messages", i, message, path, &inside) || !read_message(g, &inside)) return false;
    json_array_append(g->session_messages, message);
  }
  return true;
}

static bool read_tools(struct inquiry *g, const struct fields *f) {
  const json_t *tools = NULL;
  if (!field_array(f, "tools", &tools) || !tools) return tools == NULL && f->refusal->status == 0;
  size_t i;
  json_t *tool;
  json_array_foreach(tools, i, tool) {
    char path[FIELD_PATH], inner[FIELD_PATH];
    struct fields outside, function;
    const char *type = NULL, *name = NULL, *description = NULL;
    if (!fields_enter_item(f, "tools", i, tool, path, &outside) || !field_needed_text(&outside, "type", &type)) return false;
    if (strcmp(type, "function") != 0) return field_refuse(&outside, "type", "must be function, not '%.40s'", type);
    if (!fields_enter_field(&outside, "function", inner, &function) || !field_needed_text(&function, "name", &name) ||
        !field_text(&function, "description", &description) ||
        !add_tool(g, name, description, field(&function, "parameters"), &function))
      return false;
  }
  return true;
}

/* "none", "auto", "required", {"type": "function", "function": {"name"}} */
static bool read_tool_choice(struct inquiry *g, const struct fields *f) {
  const json_t *value = field(f, "tool_choice");
  const char *word = json_string_value(value);
  if (!value) return f->refusal->status == 0;
  if (word && strcmp(word, "auto") == 0) return true;
  g->tool_use = TOOLS_REQUIRED;
  if (word && strcmp(word, "required") == 0) return true;
  if (word && strcmp(word, "none") == 0) {
    g->tool_use = TOOLS_NONE;
    return true;
  }
  char inner[FIELD_PATH];
  struct fields choice, function;
  if (word) return field_refuse(f, "tool_choice", "must be none, auto, required or a function, not '%.40s'", word);
  return fields_enter(f, value, "tool_choice", &choice) && fields_enter_field(&choice, "function", inner, &function) &&
         field_needed_text(&function, "name", &g->tool_name);
}

static bool read_logprobs(struct inquiry *g, const struct fields *f) {
  bool wanted = false;
  int top = 0;
  if (!field_flag(f, "logprobs", &wanted) || !field_int(f, "top_logprobs", 0, 20, &top)) return false;
  if (top && !wanted) return field_refuse(f, "top_logprobs", "needs logprobs to be true");
  if (wanted) g->options.logprobs = top;
  return true;
}

static bool read_modalities(const struct fields *f) {
  const json_t *list = NULL;
  if (!field_array(f, "modalities", &list)) return false;
  for (size_t i = 0; i < json_array_size(list); i++) {
    const char *word = json_string_value(json_array_get(list, i));
    if (!word || strcmp(word, "text") != 0) return field_refuse(f, "modalities", "may hold text only");
  }
  return true;
}

static bool read_chat(struct inquiry *g, const struct fields *f, struct frontend *frontend) {
  return fields_obey(f, rules, common_rules) && read_common(g, f) && read_stream(g, f) && read_stops(g, f, "stop") &&
         field_int(f, "n", 1, 16, &g->options.choices) && field_int(f, "max_tokens", 1, INT_MAX, &g->options.max_tokens) &&
         field_int(f, "max_completion_tokens", 1, INT_MAX, &g->options.max_tokens) && field_text(f, "user", &g->options.user) &&
         read_logprobs(g, f) && read_modalities(f) && read_format(g, f, "response_format", true) && read_tools(g, f) &&
         read_tool_choice(g, f) && read_messages(g, f) && encode_conversation(g, frontend, f->refusal);
}

/* ---- writing ---- */

static const char *finish_word(const struct choice *c) {
  if (c->reason == FINISH_LENGTH) return "length";
  return c->calls ? "tool_calls" : "stop";
}

/* delta is taken */
static void write_chunk(struct inquiry *g, const struct choice *c, json_t *delta, json_t *logprobs, const char *finish,
                        struct buffer *out) {
  json_t *choice =
      json_pack("{s:i, s:o, s:o, s:s?}", "index", c->index, "delta", delta, "logprobs",
                logprobs ? json_pack("{s:O, s:n}", "content", logprobs, "refusal") : json_null(), "finish_reason", finish);
  json_t *chunk =
      json_pack("{s:s, s:s, s:I, s:s, s:s, s:[o]}", "id", g->id, "object", "chat.completion.chunk", "created",
                (json_int_t)g->created, "model", g->server->options.model_name, "system_fingerprint", "oscar", "choices", choice);
  if (g->include_usage) json_object_set_new(chunk, "usage", json_null());
  write_data(out, chunk);
}

static void chat_begin(struct inquiry *g, struct buffer *out) {
  for (int i = 0; i < g->options.choices; i++)
    write_chunk(g, &g->choices[i], json_pack("{s:s, s:s}", "role", "assistant", "content", ""), NULL, NULL, out);
}

static void chat_text(struct inquiry *g, struct choice *c, const char *text, size_t bytes, json_t *logprobs, struct buffer *out) {
  write_chunk(g, c, json_pack("{s:o}", "content", json_text(text, bytes)), logprobs, NULL, out);
  json_decref(logprobs);
}

static void chat_reasoning(struct inquiry *g, struct choice *c, const char *text, size_t bytes, struct buffer *out) {
  write_chunk(g, c, json_pack("{s:o}", "reasoning_content", json_text(text, bytes)), NULL, NULL, out);
}

static void chat_call(struct inquiry *g, struct choice *c, const json_t *call, struct buffer *out) {
  json_t *delta = json_pack("{s:[{s:i, s:O, s:s, s:{s:O, s:O}}]}", "tool_calls", "index", c->calls_written++, "id",
                            json_object_get(call, "id"), "type", "function", "function", "name", json_object_get(call, "name"),
                            "arguments", json_object_get(call, "arguments"));
  write_chunk(g, c, delta, NULL, NULL, out);
}

static void chat_finish(struct inquiry *g, struct choice *c, struct buffer *out) {
  write_chunk(g, c, json_object(), NULL, finish_word(c), out);
}

static void chat_end(struct inquiry *g, struct buffer *out) {
  if (g->include_usage)
    write_data(out, json_pack("{s:s, s:s, s:I, s:s, s:s, s:[], s:o}", "id", g->id, "object", "chat.completion.chunk", "created",
                              (json_int_t)g->created, "model", g->server->options.model_name, "system_fingerprint", "oscar",
                              "choices", "usage", openai_usage(g)));
  buffer_text(out, "data: [DONE]\n\n");
}

static void chat_fail(struct inquiry *g, const struct refusal *refusal, struct buffer *out) {
  (void)g;
  write_data(out, refusal_json(DIALECT_OPENAI, refusal));
  buffer_text(out, "data: [DONE]\n\n");
}

static json_t *chat_whole(struct inquiry *g) {
  json_t *choices = json_array();
  for (int i = 0; i < g->options.choices; i++) {
    const struct choice *c = &g->choices[i];
    json_t *logprobs = c->logprobs ? json_pack("{s:O, s:n}", "content", c->logprobs, "refusal") : json_null();
    json_array_append_new(choices, json_pack("{s:i, s:o, s:o, s:s}", "index", i, "message", choice_message(c), "logprobs",
                                             logprobs, "finish_reason", finish_word(c)));
  }
  return json_pack("{s:s, s:s, s:I, s:s, s:s, s:o, s:o}", "id", g->id, "object", "chat.completion", "created",
                   (json_int_t)g->created, "model", g->server->options.model_name, "system_fingerprint", "oscar", "choices",
                   choices, "usage", openai_usage(g));
}

static const struct answer_form chat_form = {
    .id_prefix = "chatcmpl-",
    .call_prefix = "call_",
    .ping = ": ping\n\n",
    .begin = chat_begin,
    .text = chat_text,
    .reasoning = chat_reasoning,
    .call = chat_call,
    .finish = chat_finish,
    .end = chat_end,
    .fail = chat_fail,
    .whole = chat_whole,
};

void openai_chat(struct exchange *ex, struct frontend *frontend) { inquiry_run(ex, frontend, &chat_form, read_chat); }

struct inquiry *openai_chat_parse(struct server *server, struct frontend *frontend, const char *body, size_t bytes,
                                  struct refusal *refusal) {
  return inquiry_parse(server, frontend, &chat_form, read_chat, body, bytes, refusal);
}

/* ---- models ---- */

static json_t *model_json(const struct server *server) {
  char date[32];
  const time_t started = (time_t)server->started_at;
  struct tm utc;
  gmtime_r(&started, &utc);
  strftime(date, sizeof date, "%Y-%m-%dT%H:%M:%SZ", &utc);
  const struct server_options *o = &server->options;
  return json_pack("{s:s, s:s, s:I, s:s, s:s, s:s, s:s, s:I, s:I, s:s}", "id", o->model_name, "object", "model", "created",
                   (json_int_t)server->started_at, "owned_by", "oscar", "type", "model", "display_name", o->model_name,
                   "created_at", date, "context_length", (json_int_t)o->context, "vocabulary",
                   (json_int_t)tokenizer_vocab(server->frontends[0].tokenizer), "kv", o->kv);
}

void openai_models(struct exchange *ex, struct frontend *frontend) {
  (void)frontend;
  const char *name = ex->server->options.model_name;
  reply_json(ex, 200,
             json_pack("{s:s, s:[o], s:b, s:s, s:s}", "object", "list", "data", model_json(ex->server), "has_more", 0, "first_id",
                       name, "last_id", name));
}

void openai_model(struct exchange *ex, struct frontend *frontend) {
  (void)frontend;
  const struct server_options *o = &ex->server->options;
  struct refusal refusal = {0};
  if (strcmp(ex->name, o->model_name) == 0 || in_list(o->aliases, ex->name)) {
    reply_json(ex, 200, model_json(ex->server));
    return;
  }
  refuse(&refusal, 404, "model_not_found", "model", "there is no model '%s' here; this server has '%s'", ex->name, o->model_name);
  reply_refusal(ex, &refusal);
}
