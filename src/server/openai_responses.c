/*
 * openai_responses.c - POST /v1/responses, GET and DELETE /v1/responses/{id}.
 *
 * A response's output is a list of items: messages and calls. A stream tells of each item when it begins, as it grows and when it
 * is done; every event has a number. What was said is kept as a list of items, so that a next request continues it.
 */
#include "server/inquiry.h"
#include "server/response_store.h"

#include "engine/json_text.h"

#include <limits.h>
#include <stdio.h>
#include <string.h>

/* ---- reading ---- */

static const struct field_rule rules[] = {
    {"input", FIELD_READ, NULL},
    {"instructions", FIELD_READ, NULL},
    {"max_output_tokens", FIELD_READ, NULL},
    {"previous_response_id", FIELD_READ, NULL},
    {"text", FIELD_READ, NULL},
    {"tools", FIELD_READ, NULL},
    {"tool_choice", FIELD_READ, NULL},
    {"store", FIELD_READ, NULL},
    {"include", FIELD_READ, NULL},
    {"top_logprobs", FIELD_READ, NULL},
    {"reasoning", FIELD_READ, NULL},
    {"stop", FIELD_READ, NULL},
    {"user", FIELD_READ, NULL},
    {"stream_options", FIELD_READ, NULL},
    {"parallel_tool_calls", FIELD_HARMLESS, NULL},
    {"max_tool_calls", FIELD_HARMLESS, NULL}, /* of tools that a server runs; there are none */
    {"background", FIELD_PLAIN, NULL},
    {"conversation", FIELD_PLAIN, NULL},
    {"prompt", FIELD_PLAIN, NULL},
    {"truncation", FIELD_PLAIN, "disabled"},
    {"context_management", FIELD_PLAIN, NULL},
    {NULL, FIELD_READ, NULL},
};

static bool read_message(struct inquiry *g, const struct fields *f) {
  const char *role = NULL, *content = NULL;
  if (!field_needed_text(f, "role", &role)) return false;
  const char *known = template_role(role);
  if (!known || strcmp(known, "tool") == 0)
    return field_refuse(f, "role", "must be system, developer, user or assistant, not '%.20s'", role);
  return parts_text(g, f, "content", "input_text,output_text,text", &content) && add_message(g, known, content, f);
}

/* A call belongs to the message of the assistant before it. */
static bool read_call(struct inquiry *g, const struct fields *f) {
  const char *id = NULL, *name = NULL, *arguments = NULL;
  if (!field_needed_text(f, "call_id", &id) || !field_needed_text(f, "name", &name) ||
      !field_needed_text(f, "arguments", &arguments))
    return false;
  struct chat_message *message = g->n_messages ? &g->messages[g->n_messages - 1] : NULL;
  if (!message || strcmp(message->role, "assistant") != 0) message = add_message(g, "assistant", NULL, f);
  return message && add_call(g, message, id, name, arguments, f);
}

static bool read_output(struct inquiry *g, const struct fields *f) {
  const char *id = NULL, *content = NULL;
  if (!field_needed_text(f, "call_id", &id) || !parts_text(g, f, "output", "input_text,output_text,text", &content)) return false;
  struct chat_message *message = add_message(g, "tool", content, f);
  if (message) message->tool_call_id = id;
  return message;
}

static bool read_items(struct inquiry *g, const json_t *items, const char *name, const struct fields *f) {
  size_t i;
  json_t *item;
  json_array_foreach(items, i, item) {
    char path[FIELD_PATH];
    struct fields inside;
    const char *type = "message";
    bool good;
    if (!fields_enter_item(f, name, i, item, path, &inside) || !field_text(&inside, "type", &type)) return false;
    if (strcmp(type, "message") == 0)
      good = read_message(g, &inside);
    else if (strcmp(type, "function_call") == 0)
      good = read_call(g, &inside);
    else if (strcmp(type, "function_call_output") == 0)
      good = read_output(g, &inside);
    else
      good = strcmp(type, "reasoning") == 0 || field_refuse(&inside, "type", "'%.40s' is not supported", type);
    if (!good) return false;
  }
  return true;
}

static bool read_input(struct inquiry *g, const struct fields *f) {
  const char *instructions = NULL, *previous = NULL;
  const json_t *input = field(f, "input");
  if (!field_text(f, "instructions", &instructions) || !field_text(f, "previous_response_id", &previous)) return false;
  if (instructions && *instructions && !add_message(g, "system", instructions, f)) return false;
  g->conversation = json_array();
  if (previous) {
    json_t *items = NULL;
    if (!response_store_get(g->server->responses, previous, NULL, &items))
      return refuse(f->refusal, 404, "previous_response_not_found", "previous_response_id",
                    "previous_response_id: the response '%.60s' is not kept here (any more)", previous);
    json_array_extend(g->conversation, items);
    json_decref(items);
  }
  if (json_is_string(input))
    json_array_append_new(g->conversation, json_pack("{s:s, s:s, s:O}", "type", "message", "role", "user", "content", input));
  else if (json_is_array(input) && json_array_size(input) > 0)
    json_array_extend(g->conversation, (json_t *)(uintptr_t)input);
  else
    return field_refuse(f, "input", input ? "must be a string or a list of items" : "is missing");
  json_array_extend(g->session_messages, g->conversation);
  return read_items(g, g->conversation, "input", f);
}

static bool read_tool_choice(struct inquiry *g, const struct fields *f) {
  const json_t *value = field(f, "tool_choice");
  const char *word = json_string_value(value);
  if (!value || (word && strcmp(word, "auto") == 0)) return f->refusal->status == 0;
  g->tool_use = word && strcmp(word, "none") == 0 ? TOOLS_NONE : TOOLS_REQUIRED;
  if (word && (strcmp(word, "none") == 0 || strcmp(word, "required") == 0)) return true;
  struct fields choice;
  const char *type = NULL;
  if (word) return field_refuse(f, "tool_choice", "must be none, auto, required or a function, not '%.40s'", word);
  if (!fields_enter(f, value, "tool_choice", &choice) || !field_needed_text(&choice, "type", &type)) return false;
  if (strcmp(type, "function") != 0) return field_refuse(&choice, "type", "must be function, not '%.40s'", type);
  return field_needed_text(&choice, "name", &g->tool_name);
}

static bool read_text(struct inquiry *g, const struct fields *f) {
  static const struct field_rule text_rules[] = {
      {"format", FIELD_READ, NULL}, {"verbosity", FIELD_PLAIN, "medium"}, {NULL, FIELD_READ, NULL}};
  struct fields text;
  if (!field(f, "text")) return f->refusal->status == 0;
  return fields_enter(f, field(f, "text"), "text", &text) && fields_obey(&text, text_rules, NULL) &&
         read_format(g, &text, "format", false);
}

static bool read_include(struct inquiry *g, const struct fields *f) {
  const json_t *list = NULL;
  int top = 0;
  if (!field_array(f, "include", &list) || !field_int(f, "top_logprobs", 0, 20, &top)) return false;
  for (size_t i = 0; i < json_array_size(list); i++) {
    const char *word = json_string_value(json_array_get(list, i));
    if (word && strcmp(word, "message.output_text.logprobs") == 0)
      g->options.logprobs = top;
    else if (!word || strcmp(word, "reasoning.encrypted_content") != 0)
      return field_refuse(f, "include", "may hold message.output_text.logprobs only, not '%.60s'", word ? word : "");
  }
  return g->options.logprobs >= 0 || !top || field_refuse(f, "top_logprobs", "needs message.output_text.logprobs in include");
}

static bool read_reasoning(const struct fields *f) {
  static const struct field_rule reasoning_rules[] = {{"effort", FIELD_PLAIN, "none"},
                                                      {"summary", FIELD_HARMLESS, NULL},
                                                      {"generate_summary", FIELD_HARMLESS, NULL},
                                                      {NULL, FIELD_READ, NULL}};
  struct fields reasoning;
  if (!field(f, "reasoning")) return f->refusal->status == 0;
  return fields_enter(f, field(f, "reasoning"), "reasoning", &reasoning) && fields_obey(&reasoning, reasoning_rules, NULL);
}

/* What a response repeats of its request, with what was meant where it did not say. */
static json_t *echo_of(const struct inquiry *g) {
  static const char *const names[] = {
      "instructions", "max_output_tokens", "previous_response_id", "tools", "tool_choice", "metadata", "user"};
  json_t *echo =
      json_pack("{s:n, s:n, s:n, s:[], s:s, s:{}, s:n, s:b, s:f, s:f, s:s, s:{s:n, s:n}, s:{s:{s:s}}, s:b, s:i}", "instructions",
                "max_output_tokens", "previous_response_id", "tools", "tool_choice", "auto", "metadata", "user",
                "parallel_tool_calls", 1, "temperature", (double)g->options.sampling.temperature, "top_p",
                (double)g->options.sampling.top_p, "truncation", "disabled", "reasoning", "effort", "summary", "text", "format",
                "type", "text", "store", g->store, "top_logprobs", g->options.logprobs > 0 ? g->options.logprobs : 0);
  for (size_t i = 0; i < ARRAY_LENGTH(names); i++) {
    json_t *value = json_object_get(g->body, names[i]);
    if (value && !json_is_null(value)) json_object_set(echo, names[i], value);
  }
  json_t *format = json_object_get(json_object_get(g->body, "text"), "format");
  if (json_is_object(format)) json_object_set(json_object_get(echo, "text"), "format", format);
  return echo;
}

static bool read_response(struct inquiry *g, const struct fields *f, struct frontend *frontend) {
  g->store = true;
  bool good = fields_obey(f, rules, common_rules) && read_common(g, f) && read_stream(g, f) && read_stops(g, f, "stop") &&
              field_int(f, "max_output_tokens", 1, INT_MAX, &g->options.max_tokens) && field_flag(f, "store", &g->store) &&
              field_text(f, "user", &g->options.user) && read_include(g, f) && read_reasoning(f) && read_text(g, f) &&
              read_flat_tools(g, f, "function", NULL, "parameters") && read_tool_choice(g, f) && read_input(g, f) &&
              encode_conversation(g, frontend, f->refusal);
  if (!good) return false;
  g->echo = echo_of(g);
  g->output = json_array();
  return (g->echo && g->output) || refuse_memory(f->refusal);
}

/* ---- writing ---- */

enum { NO_ITEM, MESSAGE_ITEM };

/* Items are told apart by the response's id and their place in it. */
static json_t *item_id(const struct inquiry *g, const char *kind, int place) {
  return json_sprintf("%s_%s_%d", kind, g->id + strlen("resp_"), place);
}

static json_t *part_json(const char *text, size_t bytes, json_t *logprobs) {
  return json_pack("{s:s, s:o, s:[], s:o}", "type", "output_text", "text", json_text(bytes ? text : "", bytes), "annotations",
                   "logprobs", logprobs ? json_incref(logprobs) : json_array());
}

static json_t *message_item(const struct inquiry *g, int place, const char *status, json_t *content) {
  return json_pack("{s:o, s:s, s:s, s:s, s:o}", "id", item_id(g, "msg", place), "type", "message", "status", status, "role",
                   "assistant", "content", content);
}

static json_t *call_item(const struct inquiry *g, int place, const char *status, const json_t *call, bool with_arguments) {
  return json_pack("{s:o, s:s, s:s, s:O, s:O, s:o}", "id", item_id(g, "fc", place), "type", "function_call", "status", status,
                   "call_id", json_object_get(call, "id"), "name", json_object_get(call, "name"), "arguments",
                   with_arguments ? json_incref(json_object_get(call, "arguments")) : json_string(""));
}

static json_t *usage_json(const struct inquiry *g) {
  const struct request_usage *u = &g->usage;
  return json_pack("{s:I, s:{s:I, s:I}, s:I, s:{s:I}, s:I}", "input_tokens", (json_int_t)u->prompt_tokens, "input_tokens_details",
                   "cached_tokens", (json_int_t)u->reused_exact, "cache_write_tokens", (json_int_t)0, "output_tokens",
                   (json_int_t)u->generated, "output_tokens_details", "reasoning_tokens", (json_int_t)0, "total_tokens",
                   (json_int_t)(u->prompt_tokens + u->generated));
}

static json_t *response_json(const struct inquiry *g, const char *status) {
  const bool cut = strcmp(status, "incomplete") == 0;
  json_t *response = json_pack(
      "{s:s, s:s, s:I, s:s, s:s, s:O, s:n, s:o, s:o}", "id", g->id, "object", "response", "created_at", (json_int_t)g->created,
      "status", status, "model", g->server->options.model_name, "output", g->output, "error", "incomplete_details",
      cut ? json_pack("{s:s}", "reason", "max_output_tokens") : json_null(), "usage", g->done ? usage_json(g) : json_null());
  json_object_update_missing(response, g->echo);
  return response;
}

static void tell(struct inquiry *g, const char *type, json_t *event, struct buffer *out) {
  json_object_set_new(event, "type", json_string(type));
  json_object_set_new(event, "sequence_number", json_integer(g->sequence++));
  write_event(out, type, event);
}

static void response_begin(struct inquiry *g, struct buffer *out) {
  tell(g, "response.created", json_pack("{s:o}", "response", response_json(g, "in_progress")), out);
  tell(g, "response.in_progress", json_pack("{s:o}", "response", response_json(g, "in_progress")), out);
}

static json_t *place_json(const struct inquiry *g, const struct choice *c) {
  return json_pack("{s:o, s:i, s:i}", "item_id", item_id(g, "msg", c->block), "output_index", c->block, "content_index", 0);
}

static void open_message(struct inquiry *g, struct choice *c, struct buffer *out) {
  c->block_kind = MESSAGE_ITEM;
  tell(g, "response.output_item.added",
       json_pack("{s:i, s:o}", "output_index", c->block, "item", message_item(g, c->block, "in_progress", json_array())), out);
  json_t *part = place_json(g, c);
  json_object_set_new(part, "part", part_json("", 0, NULL));
  tell(g, "response.content_part.added", part, out);
}

static void close_message(struct inquiry *g, struct choice *c, struct buffer *out) {
  if (c->block_kind != MESSAGE_ITEM) return;
  const char *text = c->text.data ? c->text.data + c->block_start : "";
  const size_t bytes = c->text.bytes - c->block_start;
  json_t *done = place_json(g, c), *part = place_json(g, c);
  json_object_set_new(done, "text", json_text(text, bytes));
  json_object_set_new(done, "logprobs", c->logprobs ? json_incref(c->logprobs) : json_array());
  tell(g, "response.output_text.done", done, out);
  json_object_set_new(part, "part", part_json(text, bytes, c->logprobs));
  tell(g, "response.content_part.done", part, out);
  const char *status = c->finished && c->reason == FINISH_LENGTH ? "incomplete" : "completed";
  json_t *item = message_item(g, c->block, status, json_pack("[o]", part_json(text, bytes, c->logprobs)));
  json_array_append(g->output, item);
  tell(g, "response.output_item.done", json_pack("{s:i, s:o}", "output_index", c->block, "item", item), out);
  c->block_kind = NO_ITEM;
  c->block_start = c->text.bytes;
  c->block++;
  json_decref(c->logprobs);
  c->logprobs = NULL;
}

static void response_text(struct inquiry *g, struct choice *c, const char *text, size_t bytes, json_t *logprobs,
                          struct buffer *out) {
  if (c->block_kind == NO_ITEM) {
    c->block_start = c->text.bytes - bytes;
    open_message(g, c, out);
  }
  if (logprobs) {
    if (!c->logprobs) c->logprobs = json_array();
    json_array_extend(c->logprobs, logprobs);
  }
  json_t *delta = place_json(g, c);
  json_object_set_new(delta, "delta", json_text(text, bytes));
  json_object_set_new(delta, "logprobs", logprobs ? logprobs : json_array());
  tell(g, "response.output_text.delta", delta, out);
}

static void response_call(struct inquiry *g, struct choice *c, const json_t *call, struct buffer *out) {
  close_message(g, c, out);
  tell(g, "response.output_item.added",
       json_pack("{s:i, s:o}", "output_index", c->block, "item", call_item(g, c->block, "in_progress", call, false)), out);
  tell(g, "response.function_call_arguments.delta",
       json_pack("{s:o, s:i, s:O}", "item_id", item_id(g, "fc", c->block), "output_index", c->block, "delta",
                 json_object_get(call, "arguments")),
       out);
  tell(g, "response.function_call_arguments.done",
       json_pack("{s:o, s:i, s:O, s:O}", "item_id", item_id(g, "fc", c->block), "output_index", c->block, "name",
                 json_object_get(call, "name"), "arguments", json_object_get(call, "arguments")),
       out);
  json_t *item = call_item(g, c->block, "completed", call, true);
  json_array_append(g->output, item);
  tell(g, "response.output_item.done", json_pack("{s:i, s:o}", "output_index", c->block, "item", item), out);
  c->block++;
}

static void response_finish(struct inquiry *g, struct choice *c, struct buffer *out) { close_message(g, c, out); }

/* The response as it is in the end, kept if that is wanted. */
static json_t *keep(struct inquiry *g) {
  const char *status = g->choices[0].reason == FINISH_LENGTH ? "incomplete" : "completed";
  json_t *response = response_json(g, status);
  if (!g->store || !response) return response;
  json_array_extend(g->conversation, g->output);
  response_store_put(g->server->responses, g->id, response, g->conversation);
  return response;
}

static void response_end(struct inquiry *g, struct buffer *out) {
  json_t *response = keep(g);
  const char *type = g->choices[0].reason == FINISH_LENGTH ? "response.incomplete" : "response.completed";
  tell(g, type, json_pack("{s:o}", "response", response), out);
}

static void response_fail(struct inquiry *g, const struct refusal *refusal, struct buffer *out) {
  json_t *response = response_json(g, "failed");
  json_object_set_new(
      response, "error",
      json_pack("{s:s, s:o}", "code", "server_error", "message", json_text(refusal->text, strlen(refusal->text))));
  tell(g, "response.failed", json_pack("{s:o}", "response", response), out);
}

static json_t *response_whole(struct inquiry *g) {
  struct choice *c = &g->choices[0];
  const char *status = c->reason == FINISH_LENGTH ? "incomplete" : "completed";
  json_t *call;
  size_t i;
  if (c->text.bytes || !c->calls)
    json_array_append_new(
        g->output, message_item(g, c->block++, status, json_pack("[o]", part_json(c->text.data, c->text.bytes, c->logprobs))));
  json_array_foreach(c->calls, i, call) { json_array_append_new(g->output, call_item(g, c->block++, "completed", call, true)); }
  return keep(g);
}

static const struct answer_form response_form = {
    .id_prefix = "resp_",
    .call_prefix = "call_",
    .ping = ": ping\n\n",
    .begin = response_begin,
    .text = response_text,
    .call = response_call,
    .finish = response_finish,
    .end = response_end,
    .fail = response_fail,
    .whole = response_whole,
};

void responses_make(struct exchange *ex, struct frontend *frontend) { inquiry_run(ex, frontend, &response_form, read_response); }

struct inquiry *responses_parse(struct server *server, struct frontend *frontend, const char *body, size_t bytes,
                                struct refusal *refusal) {
  return inquiry_parse(server, frontend, &response_form, read_response, body, bytes, refusal);
}

static void not_kept(struct exchange *ex) {
  struct refusal refusal = {0};
  refuse(&refusal, 404, "not_found", NULL, "the response '%s' is not kept here (any more)", ex->name);
  reply_refusal(ex, &refusal);
}

void responses_get(struct exchange *ex, struct frontend *frontend) {
  (void)frontend;
  json_t *response = NULL;
  if (response_store_get(ex->server->responses, ex->name, &response, NULL))
    reply_json(ex, 200, response);
  else
    not_kept(ex);
}

void responses_delete(struct exchange *ex, struct frontend *frontend) {
  (void)frontend;
  if (response_store_remove(ex->server->responses, ex->name))
    reply_json(ex, 200, json_pack("{s:s, s:s, s:b}", "id", ex->name, "object", "response", "deleted", 1));
  else
    not_kept(ex);
}
