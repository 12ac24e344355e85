/*
 * model/chat_template.h - turning a conversation into the text a model was trained on. Private.
 * Templates of the common families are recognised from the model's own (Jinja) template text and control tokens; others are
 * refused, with the flag that chooses one.
 */
#ifndef OSCAR_CHAT_TEMPLATE_H
#define OSCAR_CHAT_TEMPLATE_H

#include "model/gguf.h"
#include "model/tokenizer.h"

enum chat_family { CHAT_UNKNOWN, CHAT_CHATML, CHAT_LLAMA3, CHAT_GEMMA, CHAT_MISTRAL };
struct chat_message {
  const char *role, *content;
}; /* "system", "user", "assistant" */

struct chat_template {
  enum chat_family family;
  char default_system[256];  /* the model's own default system message; "" if none */
  char system_preamble[256]; /* what the template puts before any system text (Llama 3.1: dates); "" if nothing */
  bool refuses_system;       /* the template knows no system messages */
  struct {
    char user_open[16], user_close[16], assistant_open[8]; /* "[INST] ", " [/INST]", "" or " " */
    bool system_last, trims_assistant;                     /* system text goes before the last user message, not the first */
  } mistral;
};
/* name: "chatml", "llama3", "gemma", "mistral", or NULL / "auto" to recognise. Errors: INVALID_ARGUMENT (unknown name),
 * UNSUPPORTED (not recognised: says which flag and names exist). */
oscar_status chat_template_choose(oscar_context *context, const struct gguf *file, const char *name,
                                  struct chat_template *chosen);
const char *chat_family_name(enum chat_family family);

/* The conversation as text with control tokens spelled out (encode with parse_special for the template's parts only):
 * returns token ids directly, so that text inside messages can never become a control token. add_generation_prompt opens the
 * assistant's turn. The ids include BOS where the model wants it. */
oscar_status chat_template_encode(const struct chat_template *chat, oscar_context *context, const struct tokenizer *tokenizer,
                                  const struct chat_message *messages, int n_messages, bool add_generation_prompt, int32_t **ids,
                                  int *count);
#endif
