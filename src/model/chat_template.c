/*
 * chat_template.c - conversations in the forms that models were trained on.
 *
 * Models carry their template as a Jinja program. It is not run: the family is recognised by the control tokens it writes, and
 * the few places where members of a family differ (the default system message, dates, spaces around [INST]) are read from its
 * string literals. A program that differs in other ways renders differently here; --chat-template overrules the recognition.
 *
 * A conversation is written as a row of control tokens and stretches of text. Only the template's own literals are searched for
 * control tokens; messages are encoded as plain text, joined with the literals beside them, because that is how the model saw
 * them: one text, cut by control tokens.
 */
#include "model/chat_template.h"

#include "model/tokenizer_impl.h"

#include <string.h>

static const struct family {
  const char *name;
  const char *mark;       /* in the template text of this family */
  const char *control[4]; /* tokens that the vocabulary must have */
} families[] = {
    [CHAT_UNKNOWN] = {"unknown", NULL, {NULL}},
    [CHAT_CHATML] = {"chatml", "<|im_start|>", {"<|im_start|>", "<|im_end|>"}},
    [CHAT_LLAMA3] = {"llama3", "<|start_header_id|>", {"<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"}},
    [CHAT_GEMMA] = {"gemma", "<start_of_turn>", {"<start_of_turn>", "<end_of_turn>"}},
    [CHAT_MISTRAL] = {"mistral", "[INST]", {NULL}},
};

const char *chat_family_name(enum chat_family family) {
  return (unsigned)family < ARRAY_LENGTH(families) ? families[family].name : families[CHAT_UNKNOWN].name;
}

/* ---- reading the model's template ---- */

/* Where `wanted` first is in the template at or after `from`, or -1. */
static int64_t find_in(struct gguf_string text, int64_t from, const char *wanted) {
  if (from < 0 || (uint64_t)from > text.bytes) return -1;
  const char *found = memmem(text.text + from, (size_t)(text.bytes - (uint64_t)from), wanted, strlen(wanted));
  return found ? found - text.text : -1;
}

static bool has(struct gguf_string text, const char *wanted) { return find_in(text, 0, wanted) >= 0; }

/* Copies template text from `at` up to `stop`, undoing backslashes. False if a closing `quote` comes first (0: none is looked
 * for), the text ends, or it does not fit in `room` with its terminator. */
static bool copy_literal(struct gguf_string text, int64_t at, char quote, const char *stop, char *out, size_t room) {
  size_t written = 0, stop_bytes = strlen(stop);
  for (uint64_t i = (uint64_t)at; i < text.bytes; i++) {
    char c = text.text[i];
    if (text.bytes - i >= stop_bytes && memcmp(text.text + i, stop, stop_bytes) == 0) {
      out[written] = '\0';
      return true;
    }
    if (quote && c == quote) return false;
    if (quote && c == '\\' && i + 1 < text.bytes) {
      c = text.text[++i];
      c = c == 'n' ? '\n' : c == 't' ? '\t' : c;
    }
    if (written + 1 >= room) return false;
    out[written++] = c;
  }
  return false;
}

static char quote_before(struct gguf_string text, int64_t at) {
  char c = at > 0 ? text.text[at - 1] : '\0';
  return c == '\'' || c == '"' ? c : '\0';
}

/* "<|im_start|>system\n...<|im_end|>" inside one string literal (or outside of any) is a default system message: a message of
 * the conversation would have to be joined in between. */
static oscar_status read_default_system(oscar_context *context, struct gguf_string text, struct chat_template *chat) {
  static const char opening[] = "<|im_start|>system";
  for (int64_t at = find_in(text, 0, opening); at >= 0; at = find_in(text, at + 1, opening)) {
    char quote = quote_before(text, at), body[1024];
    if (!copy_literal(text, at + (int64_t)sizeof opening - 1, quote, "<|im_end|>", body, sizeof body)) continue;
    if (body[0] != '\n' || (!quote && strpbrk(body, "{}"))) continue;
    if (strlen(body + 1) >= sizeof chat->default_system)
      return set_error(context, OSCAR_UNSUPPORTED,
                       "the default system message of the chat template has %zu bytes; fewer than %zu are supported",
                       strlen(body + 1), sizeof chat->default_system);
    memcpy(chat->default_system, body + 1, strlen(body));
    return OSCAR_OK;
  }
  return OSCAR_OK;
}

/* Llama 3.1 and later begin every system message with two dates. The second is today's where a program can ask for it; the date
 * written in the template is taken, so that the same conversation gives the same tokens tomorrow. */
static void read_dates(struct gguf_string text, struct chat_template *chat) {
  static const char cutoff[] = "Cutting Knowledge Date: ", set_date[] = "set date_string = \"";
  char line[64], date[32] = "26 Jul 2024";
  int64_t at = find_in(text, 0, cutoff), date_at = find_in(text, 0, set_date);
  char quote = quote_before(text, at);
  if (at < 0 || !quote || !copy_literal(text, at, '\0', "\\n", line, sizeof line)) return;
  if (date_at >= 0) copy_literal(text, date_at + (int64_t)sizeof set_date - 1, '\0', "\"", date, sizeof date);
  snprintf(chat->system_preamble, sizeof chat->system_preamble, "%s\nToday Date: %s\n\n", line, date);
}

/* The string literal around the first `mark`. False if there is none or it is longer than expected. */
static bool literal_around(struct gguf_string text, const char *mark, char *out, size_t room) {
  int64_t at = find_in(text, 0, mark), start = at;
  while (start > 0 && at - start < (int64_t)room && !quote_before(text, start)) start--;
  char quote = start >= 0 ? quote_before(text, start) : '\0';
  char stop[2] = {quote, '\0'};
  return at >= 0 && quote && copy_literal(text, start, '\0', stop, out, room);
}

/* Mistral's templates differ in the spaces around [INST] and in where system text goes. */
static void read_mistral(struct gguf_string text, struct chat_template *chat) {
  char open[sizeof chat->mistral.user_open], close[sizeof chat->mistral.user_close];
  snprintf(chat->mistral.user_open, sizeof chat->mistral.user_open, "%s", "[INST] ");
  snprintf(chat->mistral.user_close, sizeof chat->mistral.user_close, "%s", " [/INST]");
  if (text.bytes == 0) return;
  if (literal_around(text, "[INST]", open, sizeof open) && literal_around(text, "[/INST]", close, sizeof close)) {
    snprintf(chat->mistral.user_open, sizeof chat->mistral.user_open, "%s", open);
    snprintf(chat->mistral.user_close, sizeof chat->mistral.user_close, "%s", close);
  }
  int64_t answer_end = find_in(text, find_in(text, 0, "[/INST]"), "+ eos_token"), answer = -1;
  for (int64_t at = find_in(text, 0, "{{"); at >= 0 && at < answer_end; at = find_in(text, at + 1, "{{")) answer = at;
  if (answer >= 0) {
    struct gguf_string expression = {text.text + answer, (uint64_t)(answer_end - answer)};
    if (has(expression, "\" \" +") || has(expression, "' ' +"))
      snprintf(chat->mistral.assistant_open, sizeof chat->mistral.assistant_open, "%s", " ");
    chat->mistral.trims_assistant = has(expression, "trim");
  }
  chat->mistral.system_last = has(text, "loop.last and system_message");
  chat->refuses_system = !has(text, "'system'") && !has(text, "\"system\"");
}

static oscar_status read_details(oscar_context *context, struct gguf_string text, struct chat_template *chat) {
  switch (chat->family) {
  case CHAT_CHATML:
    return read_default_system(context, text, chat);
  case CHAT_LLAMA3:
    read_dates(text, chat);
    return OSCAR_OK;
  case CHAT_GEMMA:
    chat->refuses_system = has(text, "System role not supported");
    return OSCAR_OK;
  case CHAT_MISTRAL:
    read_mistral(text, chat);
    return OSCAR_OK;
  case CHAT_UNKNOWN:
    break;
  }
  return OSCAR_OK;
}

/* ---- choosing ---- */

static bool file_has_token(const struct gguf *file, const char *spelling) {
  size_t bytes = strlen(spelling);
  int64_t count = gguf_array_count(file, "tokenizer.ggml.tokens", GGUF_STRING);
  for (int64_t i = 0; i < count; i++) {
    struct gguf_string s = gguf_array_string(file, "tokenizer.ggml.tokens", i);
    if (s.bytes == bytes && memcmp(s.text, spelling, bytes) == 0) return true;
  }
  return false;
}

/* The first control token of the family that the file lacks, or NULL. */
static const char *missing_token(const struct gguf *file, const struct family *family) {
  for (size_t i = 0; i < ARRAY_LENGTH(family->control) && family->control[i]; i++)
    if (!file_has_token(file, family->control[i])) return family->control[i];
  return NULL;
}

static enum chat_family recognise(const struct gguf *file, struct gguf_string text) {
  for (enum chat_family f = CHAT_CHATML; f <= CHAT_MISTRAL; f++)
    if (has(text, families[f].mark) && !missing_token(file, &families[f])) {
      /* Llama 2 and Mistral v7 write [INST] too, but their system text elsewhere */
      if (f == CHAT_MISTRAL && (has(text, "<<SYS>>") || has(text, "[SYSTEM_PROMPT]"))) continue;
      return f;
    }
  return CHAT_UNKNOWN;
}

oscar_status chat_template_choose(oscar_context *context, const struct gguf *file, const char *name,
                                  struct chat_template *chosen) {
  static const char names[] = "chatml, llama3, gemma or mistral";
  struct gguf_string text = {"", 0};
  bool present = gguf_get_string(file, "tokenizer.chat_template", &text);
  *chosen = (struct chat_template){.family = CHAT_UNKNOWN};
  if (!name || strcmp(name, "auto") == 0) {
    chosen->family = recognise(file, text);
    if (chosen->family == CHAT_UNKNOWN)
      return set_error(
          context, OSCAR_UNSUPPORTED,
          "%s: %s; choose one with --chat-template %s (a base model has none and is best used without)", gguf_path(file),
          present ? "the model's chat template is not one that is known here" : "the model has no chat template", names);
    return read_details(context, text, chosen);
  }
  for (enum chat_family f = CHAT_CHATML; f <= CHAT_MISTRAL; f++)
    if (strcmp(name, families[f].name) == 0) chosen->family = f;
  if (chosen->family == CHAT_UNKNOWN)
    return set_error(context, OSCAR_INVALID_ARGUMENT, "there is no chat template \"%s\"; --chat-template takes %s", name, names);
  const char *missing = missing_token(file, &families[chosen->family]);
  if (missing)
    return set_error(context, OSCAR_UNSUPPORTED, "%s: the chat template %s needs the token %s, which the vocabulary lacks",
                     gguf_path(file), name, missing);
  bool own = has(text, families[chosen->family].mark);
  return read_details(context, own ? text : (struct gguf_string){"", 0}, chosen);
}

/* ---- writing ---- */

/* The first failure stays in `status`; writing after it does nothing. */
struct writer {
  oscar_context *context;
  const struct tokenizer *tokenizer;
  struct id_list ids;
  char *text; /* not yet encoded */
  size_t bytes, capacity;
  oscar_status status;
};

static void write_text_bytes(struct writer *w, const char *text, size_t bytes) {
  if (w->status) return;
  if (bytes > w->capacity - w->bytes) {
    size_t capacity = 2 * (w->bytes + bytes) + 256;
    char *grown = mem_resize(w->context, w->text, w->bytes, capacity);
    if (!grown) {
      w->status = OSCAR_NO_MEMORY;
      return;
    }
    w->text = grown;
    w->capacity = capacity;
  }
  memcpy(w->text + w->bytes, text, bytes);
  w->bytes += bytes;
}

static void write_text(struct writer *w, const char *text) { write_text_bytes(w, text, strlen(text)); }

/* A space prefix (SentencePiece) separates a text from a token before it; a template that writes the space has it already. */
static void flush(struct writer *w) {
  if (w->status || w->bytes == 0) return;
  bool space_prefix = w->tokenizer->space_prefix && w->text[0] != ' ';
  w->status = tokenizer_append_text(w->tokenizer, w->text, w->bytes, space_prefix, &w->ids);
  w->bytes = 0;
}

static void write_id(struct writer *w, int32_t id) {
  flush(w);
  if (!w->status) w->status = id_list_add(w->context, &w->ids, id);
}

/* The template's own words: control tokens in them are control tokens. */
static void write_literal(struct writer *w, const char *text) {
  const struct tokenizer *t = w->tokenizer;
  for (size_t left = strlen(text), length; left > 0; text += length, left -= length) {
    int32_t id = token_trie_match(&t->special, text, left, &length);
    if (id >= 0 && t->vocabulary.type[id] == TOKEN_CONTROL) {
      write_id(w, id);
    } else {
      length = 1;
      write_text_bytes(w, text, 1);
    }
  }
}

/* What Python's str.strip(), and so Jinja's trim, takes for space. */
static bool is_space(uint32_t c) {
  return (c >= 0x09 && c <= 0x0D) || (c >= 0x1C && c <= 0x20) || c == 0x85 || c == 0xA0 || c == 0x1680 ||
         (c >= 0x2000 && c <= 0x200A) || c == 0x2028 || c == 0x2029 || c == 0x202F || c == 0x205F || c == 0x3000;
}

static void write_trimmed(struct writer *w, const char *text) {
  size_t bytes = strlen(text), start = 0, end = 0;
  bool begun = false;
  for (size_t at = 0; at < bytes;) {
    size_t length = utf8_character(text + at, bytes - at);
    bool space = length > 0 && is_space(utf8_code_point(text + at, length));
    at += length ? length : 1;
    if (space && !begun) start = at;
    if (space) continue;
    begun = true;
    end = at;
  }
  if (begun) write_text_bytes(w, text + start, end - start);
}

/* ---- the families ---- */

static bool is_role(const struct chat_message *message, const char *role) { return strcmp(message->role, role) == 0; }

static void chatml_turn(struct writer *w, const char *role, const char *content) {
  write_literal(w, "<|im_start|>");
  write_text(w, role);
  write_text(w, "\n");
  write_text(w, content);
  write_literal(w, "<|im_end|>\n");
}

static void write_chatml(struct writer *w, const struct chat_template *chat, const struct chat_message *messages, int count,
                         bool generation) {
  if (w->tokenizer->adds_bos) write_id(w, w->tokenizer->bos);
  if (chat->default_system[0] && !is_role(&messages[0], "system")) chatml_turn(w, "system", chat->default_system);
  for (int i = 0; i < count; i++) chatml_turn(w, messages[i].role, messages[i].content);
  if (generation) write_literal(w, "<|im_start|>assistant\n");
}

static void llama3_header(struct writer *w, const char *role) {
  write_literal(w, "<|start_header_id|>");
  write_text(w, role);
  write_literal(w, "<|end_header_id|>\n\n");
}

static void write_llama3(struct writer *w, const struct chat_template *chat, const struct chat_message *messages, int count,
                         bool generation) {
  if (w->tokenizer->bos >= 0) write_id(w, w->tokenizer->bos);
  if (chat->system_preamble[0] && !is_role(&messages[0], "system")) {
    llama3_header(w, "system");
    write_text(w, chat->system_preamble);
    write_literal(w, "<|eot_id|>");
  }
  for (int i = 0; i < count; i++) {
    llama3_header(w, messages[i].role);
    if (i == 0 && is_role(&messages[0], "system")) write_text(w, chat->system_preamble);
    write_trimmed(w, messages[i].content);
    write_literal(w, "<|eot_id|>");
  }
  if (generation) llama3_header(w, "assistant");
}

/* System text goes in front of the first user message. */
static void write_gemma(struct writer *w, const struct chat_message *messages, int count, bool generation) {
  if (w->tokenizer->bos >= 0) write_id(w, w->tokenizer->bos);
  int first = is_role(&messages[0], "system");
  for (int i = first; i < count; i++) {
    write_literal(w, is_role(&messages[i], "assistant") ? "<start_of_turn>model\n" : "<start_of_turn>user\n");
    if (first && i == first) {
      write_text(w, messages[0].content);
      write_text(w, "\n\n");
    }
    write_trimmed(w, messages[i].content);
    write_literal(w, "<end_of_turn>\n");
  }
  if (generation) write_literal(w, "<start_of_turn>model\n");
}

static void write_mistral(struct writer *w, const struct chat_template *chat, const struct chat_message *messages, int count) {
  if (w->tokenizer->bos >= 0) write_id(w, w->tokenizer->bos);
  int first = is_role(&messages[0], "system");
  for (int i = first; i < count; i++) {
    const char *content = messages[i].content;
    if (is_role(&messages[i], "assistant")) {
      write_text(w, chat->mistral.assistant_open);
      if (chat->mistral.trims_assistant)
        write_trimmed(w, content);
      else
        write_text(w, content);
      if (w->tokenizer->eos >= 0) write_id(w, w->tokenizer->eos);
      continue;
    }
    write_literal(w, chat->mistral.user_open);
    if (first && i == (chat->mistral.system_last ? count - 1 : first)) {
      write_text(w, messages[0].content);
      write_text(w, "\n\n");
    }
    write_text(w, content);
    write_literal(w, chat->mistral.user_close);
  }
}

/* ---- checking ---- */

static oscar_status check_messages(oscar_context *context, const struct chat_template *chat, const struct chat_message *messages,
                                   int count) {
  const char *family = chat_family_name(chat->family);
  if (count < 1) return set_error(context, OSCAR_INVALID_ARGUMENT, "the conversation has no messages");
  for (int i = 0; i < count; i++) {
    if (!messages[i].role || !messages[i].content)
      return set_error(context, OSCAR_INVALID_ARGUMENT, "message %d has no role or no content", i + 1);
    if (!is_role(&messages[i], "system") && !is_role(&messages[i], "user") && !is_role(&messages[i], "assistant"))
      return set_error(context, OSCAR_INVALID_ARGUMENT, "message %d has the role \"%.40s\"; system, user and assistant are known",
                       i + 1, messages[i].role);
  }
  int system = is_role(&messages[0], "system");
  if (system && chat->refuses_system)
    return set_error(context, OSCAR_INVALID_ARGUMENT, "the model's %s template has no place for a system message", family);
  if (chat->family != CHAT_GEMMA && chat->family != CHAT_MISTRAL) return OSCAR_OK;
  if (system && count == 1)
    return set_error(context, OSCAR_INVALID_ARGUMENT,
                     "the %s template puts the system message into a user message, and there is none", family);
  for (int i = system; i < count; i++) {
    const char *expected = (i - system) % 2 == 0 ? "user" : "assistant";
    if (!is_role(&messages[i], expected))
      return set_error(context, OSCAR_INVALID_ARGUMENT,
                       "message %d has the role %s where the %s template needs %s: after an optional system message, user and "
                       "assistant take turns",
                       i + 1, messages[i].role, family, expected);
  }
  return OSCAR_OK;
}

/* A file's template and vocabulary were checked together, but a caller may bring another tokenizer. */
static oscar_status check_tokenizer(oscar_context *context, const struct chat_template *chat, const struct tokenizer *tokenizer) {
  const struct family *family = &families[chat->family];
  for (size_t i = 0; i < ARRAY_LENGTH(family->control) && family->control[i]; i++) {
    int32_t id = tokenizer_find(tokenizer, family->control[i]);
    if (id < 0 || tokenizer->vocabulary.type[id] != TOKEN_CONTROL)
      return set_error(context, OSCAR_UNSUPPORTED, "the chat template %s needs the control token %s, which the vocabulary lacks",
                       family->name, family->control[i]);
  }
  return OSCAR_OK;
}

oscar_status chat_template_encode(const struct chat_template *chat, oscar_context *context, const struct tokenizer *tokenizer,
                                  const struct chat_message *messages, int n_messages, bool add_generation_prompt, int32_t **ids,
                                  int *count) {
  if (chat->family <= CHAT_UNKNOWN || chat->family > CHAT_MISTRAL)
    return set_error(context, OSCAR_INVALID_ARGUMENT, "no chat template was chosen");
  oscar_status status = check_messages(context, chat, messages, n_messages);
  if (!status) status = check_tokenizer(context, chat, tokenizer);
  if (status) return status;
  struct writer w = {.context = context, .tokenizer = tokenizer};
  switch (chat->family) {
  case CHAT_CHATML:
    write_chatml(&w, chat, messages, n_messages, add_generation_prompt);
    break;
  case CHAT_LLAMA3:
    write_llama3(&w, chat, messages, n_messages, add_generation_prompt);
    break;
  case CHAT_GEMMA:
    write_gemma(&w, messages, n_messages, add_generation_prompt);
    break;
  case CHAT_MISTRAL: /* [/INST] is what opens the assistant's turn */
    write_mistral(&w, chat, messages, n_messages);
    break;
  case CHAT_UNKNOWN:
    break;
  }
  flush(&w);
  mem_free(context, w.text);
  if (w.status) {
    mem_free(context, w.ids.ids);
    return w.status;
  }
  *ids = w.ids.ids;
  *count = (int)w.ids.count;
  return OSCAR_OK;
}
