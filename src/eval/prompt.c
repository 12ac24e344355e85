/* prompt.c - see prompt.h. The beginning of the answer is encoded by itself: it follows a control token or a line's end. */
#include "eval/prompt.h"

#include "eval/text.h"

#include <string.h>

oscar_status prompt_writer_open(const struct model *model, struct prompt_writer *writer) {
  *writer = (struct prompt_writer){.context = model_context(model), .tokenizer = model_tokenizer(model)};
  oscar_status status = chat_template_choose(writer->context, model_file(model), NULL, &writer->chat);
  if (status != OSCAR_UNSUPPORTED) return status;
  writer->chat = (struct chat_template){.family = CHAT_UNKNOWN};
  return OSCAR_OK;
}

const char *prompt_writer_name(const struct prompt_writer *writer) {
  return writer->chat.family == CHAT_UNKNOWN ? "plain" : chat_family_name(writer->chat.family);
}

static oscar_status encode_plain(const struct prompt_writer *w, const char *message, int32_t **ids, int *count) {
  struct text text = {.context = w->context};
  const int32_t bos = tokenizer_bos(w->tokenizer);
  const int first = tokenizer_adds_bos(w->tokenizer) && bos >= 0;
  int32_t *body = NULL;
  text_add(&text, "%s\n\n", message);
  oscar_status status =
      text.failed ? OSCAR_NO_MEMORY : tokenizer_encode(w->tokenizer, text.data, text.bytes, false, &body, count);
  text_free(&text);
  if (status != OSCAR_OK || !first) {
    *ids = body;
    return status;
  }
  *ids = mem_alloc(w->context, (size_t)*count + 1, sizeof **ids);
  if (*ids) {
    (*ids)[0] = bos;
    memcpy(*ids + 1, body, (size_t)*count * sizeof *body);
    ++*count;
  }
  mem_free(w->context, body);
  return *ids ? OSCAR_OK : OSCAR_NO_MEMORY;
}

static oscar_status append_text(const struct prompt_writer *w, const char *text, int32_t **ids, int *count) {
  int32_t *more = NULL;
  int more_count = 0;
  oscar_status status = tokenizer_encode(w->tokenizer, text, strlen(text), false, &more, &more_count);
  if (status != OSCAR_OK) return status;
  const size_t old = (size_t)*count * sizeof **ids, added = (size_t)more_count * sizeof *more;
  int32_t *longer = mem_resize(w->context, *ids, old, old + added);
  if (longer) {
    memcpy((char *)longer + old, more, added);
    *ids = longer;
    *count += more_count;
  }
  mem_free(w->context, more);
  return longer ? OSCAR_OK : OSCAR_NO_MEMORY;
}

static oscar_status encode(void *user, const char *message, const char *begin, int32_t **ids, int *count) {
  const struct prompt_writer *w = user;
  const struct chat_message turn = {.role = "user", .content = message};
  *ids = NULL;
  oscar_status status = w->chat.family == CHAT_UNKNOWN
                            ? encode_plain(w, message, ids, count)
                            : chat_template_encode(&w->chat, w->context, w->tokenizer, &turn, 1, NULL, 0, true, ids, count);
  if (status == OSCAR_OK && *begin) status = append_text(w, begin, ids, count);
  if (status != OSCAR_OK) {
    mem_free(w->context, *ids);
    *ids = NULL;
  }
  return status;
}

struct prompt_form prompt_writer_form(struct prompt_writer *writer) {
  return (struct prompt_form){encode, writer};
}
