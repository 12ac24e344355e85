/*
 * server/frontend.h - between texts and tokens: the model's tokenizer and chat template, opened from its file. Private.
 *
 * A frontend is used by one thread at a time; every worker has its own. frontend_piece alone may be called by any.
 */
#ifndef OSCAR_SERVER_FRONTEND_H
#define OSCAR_SERVER_FRONTEND_H

#include "engine/grammar.h"
#include "model/chat_template.h"
#include "server/json_fields.h"

struct frontend {
  oscar_context *context;
  struct tokenizer *tokenizer;
  struct chat_template chat;
  bool has_chat;     /* else the reason why not is */
  char no_chat[256]; /* here */
};
/* A model without a chat template that is known can be served: only its conversations are refused. */
oscar_status frontend_open(const char *model_path, const char *chat_template, struct frontend *frontend, char *error,
                           size_t error_bytes);
void frontend_close(struct frontend *frontend);

/* The ids are malloc'ed. special: control tokens spelled in the text count. A refusal names `field`. */
bool frontend_text(struct frontend *frontend, const char *text, size_t bytes, bool special, const char *field, int32_t **ids,
                   int *n, struct refusal *refusal);
bool frontend_prompt(struct frontend *frontend, const char *text, size_t bytes, const char *field, int32_t **ids, int *n,
                     struct refusal *refusal); /* the same with BOS where the model wants it */
bool frontend_conversation(struct frontend *frontend, const struct chat_message *messages, int n_messages,
                           const struct chat_tool *tools, int n_tools, const char *field, int32_t **ids, int *n,
                           struct refusal *refusal);
/* What an answer must be that calls one of the tools, the one of that name if it is not NULL. */
bool frontend_call_grammar(struct frontend *frontend, const struct chat_tool *tools, int n_tools, const char *name,
                           struct grammar **grammar, struct refusal *refusal);

const char *frontend_piece(const struct frontend *frontend, int32_t id, size_t *bytes);

#endif
