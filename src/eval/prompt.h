/* eval/prompt.h - messages as the model's own chat template has them, or as plain text where it has none. Private. */
#ifndef OSCAR_PROMPT_H
#define OSCAR_PROMPT_H

#include "eval/haystack.h"
#include "model/model.h"

struct prompt_writer {
  oscar_context *context;
  const struct tokenizer *tokenizer;
  struct chat_template chat; /* CHAT_UNKNOWN: plain text, an empty line between message and answer */
};
/* Errors: those of chat_template_choose, but for a template that is missing or not known. */
oscar_status prompt_writer_open(const struct model *model, struct prompt_writer *writer);
/* The form works as long as the writer stays where it is. */
struct prompt_form prompt_writer_form(struct prompt_writer *writer);
const char *prompt_writer_name(const struct prompt_writer *writer); /* "chatml", ..., "plain" */

#endif
