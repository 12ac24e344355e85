/*
 * model/chat_private.h - what the files of chat templates share: looking into the template's text, writing ids, JSON as models
 * saw it. Private to chat_*.c and reply.c.
 */
#ifndef OSCAR_CHAT_PRIVATE_H
#define OSCAR_CHAT_PRIVATE_H

#include "model/chat_template.h"
#include "model/tokenizer_impl.h"

#include <jansson.h>
#include <string.h>

/* ---- the model's template (chat_template.c) ---- */
bool template_has(struct gguf_string text, const char *wanted);
/* The string literal around the first `mark`. False if there is none or it is longer than expected. */
bool template_literal(struct gguf_string text, const char *mark, char *out, size_t room);

/* ---- writing (chat_writer.c) ---- */
/* The first failure stays in `status`; writing after it does nothing. */
struct writer {
  oscar_context *context;
  const struct tokenizer *tokenizer;
  struct id_list ids;
  char *text; /* not yet encoded */
  size_t bytes, capacity;
  oscar_status status;
};
void write_text_bytes(struct writer *w, const char *text, size_t bytes);
void write_text(struct writer *w, const char *text);
/* Without what Jinja's trim takes away at both ends. */
void write_trimmed(struct writer *w, const char *text);
/* The template's own words: control tokens in them are control tokens. */
void write_literal(struct writer *w, const char *text);
void write_id(struct writer *w, int32_t id);
/* Encodes what was written as text. */
void write_flush(struct writer *w);
/* As Python's json.dumps(value, ensure_ascii=False, indent=indent or None) writes it. */
void write_json(struct writer *w, const json_t *value, int indent);
/* A text that must be the JSON of an object (NULL or "": an empty one). The caller owns it; NULL: the error is set in w->status
 * and names `what` of `whose`. */
json_t *write_parse(struct writer *w, const char *text, const char *what, const char *whose);

/* ---- tools (chat_tools.c) ---- */
void chat_tools_read(struct gguf_string text, struct chat_template *chat);
static inline bool chat_is_role(const struct chat_message *message, const char *role) {
  return message->role && strcmp(message->role, role) == 0;
}
static inline const char *chat_content(const struct chat_message *message) { return message->content ? message->content : ""; }
/* chatml: the rest of the system turn, after its text; turns of results and of calls. */
void write_qwen_tools(struct writer *w, const struct chat_template *chat, bool after_text, const struct chat_tool *tools,
                      int n_tools);
void write_hermes_tools(struct writer *w, const struct chat_tool *tools, int n_tools);
void write_chatml_calls(struct writer *w, const struct chat_template *chat, const struct chat_message *message);
void write_chatml_result(struct writer *w, const struct chat_template *chat, const struct chat_message *messages, int count,
                         int at);
void write_llama3_tools(struct writer *w, const struct chat_tool *tools, int n_tools);
void write_llama3_call(struct writer *w, const struct chat_tool_call *call);
void write_llama3_result(struct writer *w, const struct chat_message *message);
void write_mistral_tools(struct writer *w, const struct chat_template *chat, const struct chat_tool *tools, int n_tools);
void write_mistral_calls(struct writer *w, const struct chat_template *chat, const struct chat_message *message);
void write_mistral_result(struct writer *w, const struct chat_template *chat, const struct chat_message *message);

#endif
