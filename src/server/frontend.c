/* frontend.c - see frontend.h. */
#include "server/frontend.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

oscar_status frontend_open(const char *model_path, const char *chat_template, struct frontend *f, char *error,
                           size_t error_bytes) {
  *f = (struct frontend){0};
  oscar_context_options options;
  oscar_context_options_default(&options);
  options.threads = 1;
  oscar_status status = oscar_context_create(&options, &f->context);
  if (status != OSCAR_OK) {
    snprintf(error, error_bytes, "out of memory for a tokenizer");
    return status;
  }
  struct gguf *file = NULL;
  status = gguf_open(f->context, model_path, &file);
  if (status == OSCAR_OK) status = tokenizer_create(f->context, file, &f->tokenizer);
  if (status == OSCAR_OK) {
    const oscar_status chosen = chat_template_choose(f->context, file, chat_template, &f->chat);
    f->has_chat = chosen == OSCAR_OK;
    if (!f->has_chat) snprintf(f->no_chat, sizeof f->no_chat, "%.250s", oscar_last_error(f->context));
    if (chosen == OSCAR_INVALID_ARGUMENT || chosen == OSCAR_NO_MEMORY) status = chosen;
  }
  gguf_close(file);
  if (status == OSCAR_OK) return OSCAR_OK;
  snprintf(error, error_bytes, "%s", oscar_last_error(f->context));
  frontend_close(f);
  return status;
}

void frontend_close(struct frontend *f) {
  tokenizer_free(f->tokenizer);
  oscar_context_free(f->context);
  *f = (struct frontend){0};
}

/* A failed encoding is the client's mistake unless memory is out. */
static bool refuse_status(const struct frontend *f, oscar_status status, const char *field, struct refusal *refusal) {
  if (status == OSCAR_NO_MEMORY) return refuse_memory(refusal);
  return refuse(refusal, 400, NULL, field, "%s: %s", field, oscar_last_error(f->context));
}

/* ids of the context's memory become the caller's, behind `before` (-1: nothing). */
static bool hand_over(struct frontend *f, int32_t before, int32_t *from, int count, int32_t **ids, int *n,
                      struct refusal *refusal) {
  const int first = before >= 0;
  *ids = malloc(((size_t)count + 1) * sizeof **ids);
  if (*ids) {
    (*ids)[0] = before;
    if (count) memcpy(*ids + first, from, (size_t)count * sizeof **ids);
    *n = count + first;
  }
  mem_free(f->context, from);
  return *ids || refuse_memory(refusal);
}

bool frontend_text(struct frontend *f, const char *text, size_t bytes, bool special, const char *field, int32_t **ids, int *n,
                   struct refusal *refusal) {
  int32_t *found = NULL;
  int count = 0;
  oscar_status status = tokenizer_encode(f->tokenizer, text, bytes, special, &found, &count);
  if (status != OSCAR_OK) return refuse_status(f, status, field, refusal);
  return hand_over(f, -1, found, count, ids, n, refusal);
}

bool frontend_prompt(struct frontend *f, const char *text, size_t bytes, const char *field, int32_t **ids, int *n,
                     struct refusal *refusal) {
  int32_t *found = NULL;
  int count = 0;
  oscar_status status = tokenizer_encode(f->tokenizer, text, bytes, true, &found, &count);
  if (status != OSCAR_OK) return refuse_status(f, status, field, refusal);
  const int32_t bos = tokenizer_adds_bos(f->tokenizer) ? tokenizer_bos(f->tokenizer) : -1;
  return hand_over(f, bos, found, count, ids, n, refusal);
}

bool frontend_conversation(struct frontend *f, const struct chat_message *messages, int n_messages, const struct chat_tool *tools,
                           int n_tools, const char *field, int32_t **ids, int *n, struct refusal *refusal) {
  if (!f->has_chat)
    return refuse(refusal, 400, "no_chat_template", field, "this model is served without conversations: %s", f->no_chat);
  int32_t *found = NULL;
  int count = 0;
  oscar_status status =
      chat_template_encode(&f->chat, f->context, f->tokenizer, messages, n_messages, tools, n_tools, true, &found, &count);
  if (status != OSCAR_OK) return refuse_status(f, status, field, refusal);
  return hand_over(f, -1, found, count, ids, n, refusal);
}

static bool grammar_of_calls(const struct chat_tool_forms *from, struct grammar **grammar, struct refusal *refusal) {
  struct grammar_form *forms = calloc((size_t)from->n_forms + 1, sizeof *forms);
  struct grammar_part(*parts)[3] = calloc((size_t)from->n_forms + 1, sizeof *parts);
  char error[512] = "";
  oscar_status status = forms && parts ? OSCAR_OK : OSCAR_NO_MEMORY;
  for (int i = 0; i < from->n_forms && status == OSCAR_OK; i++) {
    forms[i] = (struct grammar_form){parts[i], from->forms[i].n_parts};
    for (int p = 0; p < from->forms[i].n_parts; p++)
      parts[i][p] = (struct grammar_part){from->forms[i].parts[p].literal, from->forms[i].parts[p].schema};
  }
  if (status == OSCAR_OK) status = grammar_of_forms(forms, from->n_forms, grammar, error, sizeof error);
  free(forms);
  free(parts);
  if (status == OSCAR_OK) return true;
  if (status == OSCAR_NO_MEMORY) return refuse_memory(refusal);
  return refuse(refusal, 400, "invalid_schema", "tools", "tools: calls of these parameters cannot be enforced: %s", error);
}

bool frontend_call_grammar(struct frontend *f, const struct chat_tool *tools, int n_tools, const char *name,
                           struct grammar **grammar, struct refusal *refusal) {
  struct chat_tool_forms *forms = NULL;
  oscar_status status = chat_tool_forms_create(&f->chat, f->context, tools, n_tools, name, &forms);
  if (status != OSCAR_OK) return refuse_status(f, status, name ? "tool_choice" : "tools", refusal);
  bool good = grammar_of_calls(forms, grammar, refusal);
  chat_tool_forms_free(f->context, forms);
  return good;
}

const char *frontend_piece(const struct frontend *f, int32_t id, size_t *bytes) {
  return tokenizer_piece(f->tokenizer, id, true, bytes);
}
