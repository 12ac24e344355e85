/*
 * anthropic.c - POST /v1/messages and /v1/messages/count_tokens.
 *
 * An answer is a list of blocks: thinking, text, tool_use. A stream opens and closes them; the next begins where the kind
 * changes.
 */
#include "server/inquiry.h"

#include "engine/json_text.h"

#include <limits.h>
#include <stdio.h>
#include <string.h>

/* ---- reading ---- */

static const struct field_rule rules[] = {
    {"messages", FIELD_READ, NULL},
    {"system", FIELD_READ, NULL},
    {"max_tokens", FIELD_READ, NULL},
    {"stop_sequences", FIELD_READ, NULL},
    {"tools", FIELD_READ, NULL},
    {"tool_choice", FIELD_READ, NULL},
    {"thinking", FIELD_READ, NULL},
    {"output_config", FIELD_READ, NULL},
    {"cache_control", FIELD_HARMLESS, NULL}, /* every prefix is kept */
    {"inference_geo", FIELD_HARMLESS, NULL},
    {"diagnostics", FIELD_HARMLESS, NULL},
    {"speed", FIELD_PLAIN, "standard"},
    {"container", FIELD_PLAIN, NULL},
    {"mcp_servers", FIELD_PLAIN, NULL},
    {"context_management", FIELD_PLAIN, NULL},
    {NULL, FIELD_READ, NULL},
};

/* A result's text goes to the template as a message of its own, in the order of the blocks. */
static bool read_result(struct inquiry *g, const struct fields *f) {
  const char *id = NULL, *content = "";
  if (!field_needed_text(f, "tool_use_id", &id)) return false;
  if (field(f, "content") && !parts_text(g, f, "content", "text", &content)) return false;
  struct chat_message *message = add_message(g, "tool", content, f);
  if (message) message->tool_call_id = id;
  return message;
}

static bool read_use(struct inquiry *g, struct chat_message *message, const struct fields *f) {
  const char *id = NULL, *name = NULL;
  const json_t *input = NULL;
  if (!field_needed_text(f, "id", &id) || !field_needed_text(f, "name", &name) || !field_object(f, "input", &input)) return false;
  char *arguments = inquiry_keep(g, input ? json_dumps(input, JSON_COMPACT) : strdup("{}"));
  return arguments ? add_call(g, message, id, name, arguments, f) : refuse_memory(f->refusal);
}

/* The blocks of one message: texts of a kind are joined. */
static bool read_blocks(struct inquiry *g, const json_t *blocks, const char *role, const struct fields *f) {
  const bool assistant = strcmp(role, "assistant") == 0;
  struct buffer text = {0};
  int own = -1; /* the message that texts and calls belong to; results come before it */
  bool good = true;
  size_t i;
  json_t *block;
  json_array_foreach(blocks, i, block) {
    char path[FIELD_PATH];
    struct fields inside;
    const char *type = NULL, *piece = NULL;
    good = fields_enter_item(f, "content", i, block, path, &inside) && field_needed_text(&inside, "type", &type);
    if (!good) break;
    if (strcmp(type, "text") == 0) {
      good = field_needed_text(&inside, "text", &piece);
      if (good) buffer_text(&text, piece);
    } else if (!assistant && strcmp(type, "tool_result") == 0) {
      good = read_result(g, &inside);
    } else if (assistant && strcmp(type, "tool_use") == 0) {
      if (own < 0 && add_message(g, role, NULL, &inside)) own = g->n_messages - 1;
      good = own >= 0 && read_use(g, &g->messages[own], &inside);
    } else if (!assistant || (strcmp(type, "thinking") != 0 && strcmp(type, "redacted_thinking") != 0)) {
      good = field_refuse(&inside, "type", "'%.40s' is not supported in a message of the %s", type, role);
    }
    if (!good) break;
  }
  const bool said = text.bytes > 0;
  char *joined = good ? inquiry_keep(g, buffer_take(&text)) : NULL;
  buffer_free(&text);
  if (!good) return false;
  if (!joined) return refuse_memory(f->refusal);
  if (own >= 0)
    g->messages[own].content = said ? joined : NULL;
  else if (said || (g->n_messages && strcmp(g->messages[g->n_messages - 1].role, "tool") != 0) || !g->n_messages)
    return add_message(g, role, joined, f);
  return true;
}

static bool read_messages(struct inquiry *g, const struct fields *f) {
  const json_t *list = NULL;
  if (!field_needed_array(f, "messages", &list)) return false;
  size_t i;
  json_t *message;
  json_array_foreach(list, i, message) {
    char path[FIELD_PATH];
    struct fields inside;
    const char *role = NULL;
    if (!fields_enter_item(f, "messages", i, message, path, &inside) || !field_needed_text(&inside, "role", &role)) return false;
    if (strcmp(role, "user") != 0 && strcmp(role, "assistant") != 0)
      return field_refuse(&inside, "role", "must be user or assistant, not '%.20s'", role);
    const json_t *content = field(&inside, "content");
    if (json_is_array(content) && !read_blocks(g, content, role, &inside)) return false;
    if (json_is_string(content) && !add_message(g, role, json_string_value(content), &inside)) return false;
    if (!json_is_array(content) && !json_is_string(content))
      return field_refuse(&inside, "content", content ? "must be a string or a list of blocks" : "is missing");
    json_array_append(g->session_messages, message);
  }
  return strcmp(g->messages[g->n_messages - 1].role, "assistant") != 0 ||
         field_refuse(f, "messages", "must not end with the assistant: answers are not begun for it here");
}

static bool read_system(struct inquiry *g, const struct fields *f) {
  const char *text = NULL;
  if (!field(f, "system")) return f->refusal->status == 0;
  if (!parts_text(g, f, "system", "text", &text)) return false;
  json_array_append_new(g->session_messages, json_pack("{s:s, s:s}", "role", "system", "content", text));
  return !*text || add_message(g, "system", text, f);
}

static bool read_tool_choice(struct inquiry *g, const struct fields *f) {
  struct fields choice;
  const char *type = NULL;
  if (!field(f, "tool_choice")) return f->refusal->status == 0;
  if (!fields_enter(f, field(f, "tool_choice"), "tool_choice", &choice) || !field_needed_text(&choice, "type", &type))
    return false;
  if (strcmp(type, "auto") == 0) return true;
  g->tool_use = strcmp(type, "none") == 0 ? TOOLS_NONE : TOOLS_REQUIRED;
  if (strcmp(type, "none") == 0 || strcmp(type, "any") == 0) return true;
  if (strcmp(type, "tool") != 0) return field_refuse(&choice, "type", "must be auto, any, tool or none, not '%.20s'", type);
  return field_needed_text(&choice, "name", &g->tool_name);
}

static bool read_thinking(struct inquiry *g, const struct fields *f, const struct frontend *frontend) {
  struct fields thinking;
  const char *type = NULL;
  if (!field(f, "thinking")) return f->refusal->status == 0;
  if (!fields_enter(f, field(f, "thinking"), "thinking", &thinking) || !field_needed_text(&thinking, "type", &type)) return false;
  if (strcmp(type, "disabled") == 0) return true;
  g->thinking = frontend->chat.thinks;
  return g->thinking || field_refuse(&thinking, "type", "must be disabled: this model does not think before it answers");
}

static bool read_output(struct inquiry *g, const struct fields *f) {
  static const struct field_rule output_rules[] = {
      {"format", FIELD_READ, NULL}, {"effort", FIELD_PLAIN, "high"}, {NULL, FIELD_READ, NULL}};
  struct fields output;
  if (!field(f, "output_config")) return f->refusal->status == 0;
  return fields_enter(f, field(f, "output_config"), "output_config", &output) && fields_obey(&output, output_rules, NULL) &&
         read_format(g, &output, "format", false);
}

static bool read_metadata(struct inquiry *g, const struct fields *f) {
  struct fields metadata;
  if (!field(f, "metadata")) return f->refusal->status == 0;
  return fields_enter(f, field(f, "metadata"), "metadata", &metadata) && field_text(&metadata, "user_id", &g->options.user);
}

/* What both endpoints read. */
static bool read_counted(struct inquiry *g, const struct fields *f, struct frontend *frontend) {
  return fields_obey(f, rules, common_rules) && read_common(g, f) && read_thinking(g, f, frontend) && read_output(g, f) &&
         read_system(g, f) && read_flat_tools(g, f, "custom", "custom", "input_schema") && read_tool_choice(g, f) &&
         read_messages(g, f) && encode_conversation(g, frontend, f->refusal);
}

static bool read_message_request(struct inquiry *g, const struct fields *f, struct frontend *frontend) {
  if (json_is_object(f->object) && !field(f, "max_tokens")) return field_refuse(f, "max_tokens", "is missing");
  return field_int(f, "max_tokens", 1, INT_MAX, &g->options.max_tokens) && read_stops(g, f, "stop_sequences") &&
         read_metadata(g, f) && read_counted(g, f, frontend);
}

/* ---- writing ---- */

enum block_kind { BLOCK_NONE, BLOCK_TEXT, BLOCK_THINKING };

static const char *stop_word(const struct choice *c) {
  if (c->reason == FINISH_LENGTH) return "max_tokens";
  if (c->reason == FINISH_SEQUENCE) return "stop_sequence";
  return c->calls ? "tool_use" : "end_turn";
}

static json_t *usage_json(const struct inquiry *g) {
  const struct request_usage *u = &g->usage;
  return json_pack("{s:I, s:I, s:I, s:I}", "input_tokens", (json_int_t)(u->prompt_tokens - u->reused_exact),
                   "cache_creation_input_tokens", (json_int_t)0, "cache_read_input_tokens", (json_int_t)u->reused_exact,
                   "output_tokens", (json_int_t)u->generated);
}

static json_t *message_json(const struct inquiry *g, json_t *content, const char *stop, const char *sequence, json_t *usage) {
  return json_pack("{s:s, s:s, s:s, s:s, s:o, s:s?, s:s?, s:o}", "id", g->id, "type", "message", "role", "assistant", "model",
                   g->server->options.model_name, "content", content, "stop_reason", stop, "stop_sequence", sequence, "usage",
                   usage);
}

static void message_begin(struct inquiry *g, struct buffer *out) {
  json_t *usage = json_pack("{s:i, s:i, s:i, s:i}", "input_tokens", g->options.n, "cache_creation_input_tokens", 0,
                            "cache_read_input_tokens", 0, "output_tokens", 0);
  write_event(out, "message_start",
              json_pack("{s:s, s:o}", "type", "message_start", "message", message_json(g, json_array(), NULL, NULL, usage)));
  write_event(out, "ping", json_pack("{s:s}", "type", "ping"));
}

static void close_block(struct choice *c, struct buffer *out) {
  if (c->block_kind == BLOCK_NONE) return;
  c->block_kind = BLOCK_NONE;
  write_event(out, "content_block_stop", json_pack("{s:s, s:i}", "type", "content_block_stop", "index", c->block++));
}

/* takes `block` */
static void open_block(struct choice *c, json_t *block, struct buffer *out) {
  write_event(out, "content_block_start",
              json_pack("{s:s, s:i, s:o}", "type", "content_block_start", "index", c->block, "content_block", block));
}

static void write_delta(const struct choice *c, json_t *delta, struct buffer *out) {
  write_event(out, "content_block_delta",
              json_pack("{s:s, s:i, s:o}", "type", "content_block_delta", "index", c->block, "delta", delta));
}

static void message_text(struct inquiry *g, struct choice *c, const char *text, size_t bytes, json_t *logprobs,
                         struct buffer *out) {
  (void)g;
  json_decref(logprobs);
  if (bytes == 0) return;
  if (c->block_kind != BLOCK_TEXT) {
    close_block(c, out);
    open_block(c, json_pack("{s:s, s:s}", "type", "text", "text", ""), out);
    c->block_kind = BLOCK_TEXT;
  }
  write_delta(c, json_pack("{s:s, s:o}", "type", "text_delta", "text", json_text(text, bytes)), out);
}

static void message_reasoning(struct inquiry *g, struct choice *c, const char *text, size_t bytes, struct buffer *out) {
  if (!g->thinking) return; /* not asked for */
  if (c->block_kind != BLOCK_THINKING) {
    close_block(c, out);
    open_block(c, json_pack("{s:s, s:s, s:s}", "type", "thinking", "thinking", "", "signature", ""), out);
    c->block_kind = BLOCK_THINKING;
  }
  write_delta(c, json_pack("{s:s, s:o}", "type", "thinking_delta", "thinking", json_text(text, bytes)), out);
}

static void message_call(struct inquiry *g, struct choice *c, const json_t *call, struct buffer *out) {
  (void)g;
  close_block(c, out);
  open_block(c,
             json_pack("{s:s, s:O, s:O, s:{}}", "type", "tool_use", "id", json_object_get(call, "id"), "name",
                       json_object_get(call, "name"), "input"),
             out);
  write_delta(c, json_pack("{s:s, s:O}", "type", "input_json_delta", "partial_json", json_object_get(call, "arguments")), out);
  write_event(out, "content_block_stop", json_pack("{s:s, s:i}", "type", "content_block_stop", "index", c->block++));
}

static void message_finish(struct inquiry *g, struct choice *c, struct buffer *out) {
  (void)g;
  close_block(c, out);
}

static void message_end(struct inquiry *g, struct buffer *out) {
  const struct choice *c = &g->choices[0];
  write_event(out, "message_delta",
              json_pack("{s:s, s:{s:s, s:s?}, s:o}", "type", "message_delta", "delta", "stop_reason", stop_word(c),
                        "stop_sequence", c->stopped_by, "usage", usage_json(g)));
  write_event(out, "message_stop", json_pack("{s:s}", "type", "message_stop"));
}

static void message_fail(struct inquiry *g, const struct refusal *refusal, struct buffer *out) {
  (void)g;
  write_event(out, "error", refusal_json(DIALECT_ANTHROPIC, refusal));
}

static json_t *message_whole(struct inquiry *g) {
  const struct choice *c = &g->choices[0];
  json_t *content = json_array(), *call;
  size_t i;
  if (g->thinking && c->reasoning.bytes)
    json_array_append_new(content, json_pack("{s:s, s:o, s:s}", "type", "thinking", "thinking",
                                             json_text(c->reasoning.data, c->reasoning.bytes), "signature", ""));
  if (c->text.bytes)
    json_array_append_new(content, json_pack("{s:s, s:o}", "type", "text", "text", json_text(c->text.data, c->text.bytes)));
  json_array_foreach(c->calls, i, call) {
    json_t *input = json_loads(json_string_value(json_object_get(call, "arguments")), 0, NULL);
    json_array_append_new(content, json_pack("{s:s, s:O, s:O, s:o}", "type", "tool_use", "id", json_object_get(call, "id"),
                                             "name", json_object_get(call, "name"), "input", input ? input : json_object()));
  }
  return message_json(g, content, stop_word(c), c->stopped_by, usage_json(g));
}

static const struct answer_form message_form = {
    .id_prefix = "msg_",
    .call_prefix = "toolu_",
    .ping = "event: ping\ndata: {\"type\":\"ping\"}\n\n",
    .begin = message_begin,
    .text = message_text,
    .reasoning = message_reasoning,
    .call = message_call,
    .finish = message_finish,
    .end = message_end,
    .fail = message_fail,
    .whole = message_whole,
};

void anthropic_messages(struct exchange *ex, struct frontend *frontend) {
  inquiry_run(ex, frontend, &message_form, read_message_request);
}

struct inquiry *anthropic_parse(struct server *server, struct frontend *frontend, const char *body, size_t bytes,
                                struct refusal *refusal) {
  return inquiry_parse(server, frontend, &message_form, read_message_request, body, bytes, refusal);
}

void anthropic_count(struct exchange *ex, struct frontend *frontend) {
  struct refusal refusal = {0};
  struct inquiry *g = inquiry_parse(ex->server, frontend, &message_form, read_counted, ex->body.data ? ex->body.data : "",
                                    ex->body.bytes, &refusal);
  if (g)
    reply_json(ex, 200, json_pack("{s:i}", "input_tokens", g->options.n));
  else
    reply_refusal(ex, &refusal);
  inquiry_free(g);
}
