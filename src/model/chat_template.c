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
#include "model/chat_private.h"

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

bool template_has(struct gguf_string text, const char *wanted) { return find_in(text, 0, wanted) >= 0; }

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

bool template_literal(struct gguf_string text, const char *mark, char *out, size_t room) {
  int64_t at = find_in(text, 0, mark), start = at;
  while (start > 0 && at - start < (int64_t)room && !quote_before(text, start)) start--;
  char quote = start >= 0 ? quote_before(text, start) : '\0';
  char stop[2] = {quote, '\0'};
  return at >= 0 && quote && copy_literal(text, start, '\0', stop, out, room);
}

/* The expression that writes an assistant's message: up to "+ eos_token", with the content in it. Empty if there is none. */
static struct gguf_string mistral_answer(struct gguf_string text) {
  int64_t end = find_in(text, 0, "[/INST]");
  while ((end = find_in(text, end, "+ eos_token")) >= 0) {
    int64_t start = -1;
    for (int64_t at = find_in(text, 0, "{{"); at >= 0 && at < end; at = find_in(text, at + 1, "{{")) start = at;
    struct gguf_string expression = {text.text + start, (uint64_t)(end - start)};
    if (start >= 0 && template_has(expression, "content")) return expression;
    end++;
  }
  return (struct gguf_string){"", 0};
}

/* Mistral's templates differ in the spaces around [INST] and in where system text goes. */
static void read_mistral(struct gguf_string text, struct chat_template *chat) {
  char open[sizeof chat->mistral.user_open], close[sizeof chat->mistral.user_close];
  snprintf(chat->mistral.user_open, sizeof chat->mistral.user_open, "%s", "[INST] ");
  snprintf(chat->mistral.user_close, sizeof chat->mistral.user_close, "%s", " [/INST]");
  if (text.bytes == 0) return;
  if (template_literal(text, "[INST]", open, sizeof open) && template_literal(text, "[/INST]", close, sizeof close)) {
    snprintf(chat->mistral.user_open, sizeof chat->mistral.user_open, "%s", open);
    snprintf(chat->mistral.user_close, sizeof chat->mistral.user_close, "%s", close);
  }
  struct gguf_string expression = mistral_answer(text);
  if (expression.bytes) {
    if (template_has(expression, "\" \" +") || template_has(expression, "' ' +"))
      snprintf(chat->mistral.assistant_open, sizeof chat->mistral.assistant_open, "%s", " ");
    chat->mistral.trims_assistant = template_has(expression, "trim");
  }
  chat->mistral.system_last = template_has(text, "loop.last and system_message");
  chat->refuses_system = !template_has(text, "'system'") && !template_has(text, "\"system\"");
}

static oscar_status read_details(oscar_context *context, struct gguf_string text, struct chat_template *chat) {
  chat_tools_read(text, chat);
  chat->thinks = template_has(text, "</think>");
  chat->opens_thinking = template_has(text, "<|im_start|>assistant\\n<think>\\n'");
  switch (chat->family) {
  case CHAT_CHATML:
    chat->writes_bos = template_has(text, "bos_token");
    return read_default_system(context, text, chat);
  case CHAT_LLAMA3:
    read_dates(text, chat);
    return OSCAR_OK;
  case CHAT_GEMMA:
    chat->refuses_system = template_has(text, "System role not supported");
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
    if (template_has(text, families[f].mark) && !missing_token(file, &families[f])) {
      /* Llama 2 and Mistral v7 write [INST] too, but their system text elsewhere */
      if (f == CHAT_MISTRAL && (template_has(text, "<<SYS>>") || template_has(text, "[SYSTEM_PROMPT]"))) continue;
      return f;
    }
  return CHAT_UNKNOWN;
}

/* A model may have a second template, for conversations with tools. */
static oscar_status read_templates(oscar_context *context, const struct gguf *file, struct gguf_string text,
                                   struct chat_template *chat) {
  struct gguf_string for_tools;
  oscar_status status = read_details(context, text, chat);
  if (!status && !chat_template_has_tools(chat) && gguf_get_string(file, "tokenizer.chat_template.tool_use", &for_tools))
    chat_tools_read(for_tools, chat);
  return status;
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
    return read_templates(context, file, text, chosen);
  }
  for (enum chat_family f = CHAT_CHATML; f <= CHAT_MISTRAL; f++)
    if (strcmp(name, families[f].name) == 0) chosen->family = f;
  if (chosen->family == CHAT_UNKNOWN)
    return set_error(context, OSCAR_INVALID_ARGUMENT, "there is no chat template \"%s\"; --chat-template takes %s", name, names);
  const char *missing = missing_token(file, &families[chosen->family]);
  if (missing)
    return set_error(context, OSCAR_UNSUPPORTED, "%s: the chat template %s needs the token %s, which the vocabulary lacks",
                     gguf_path(file), name, missing);
  bool own = template_has(text, families[chosen->family].mark);
  return own ? read_templates(context, file, text, chosen) : read_details(context, (struct gguf_string){"", 0}, chosen);
}

/* ---- the families ---- */

/* What a template is given besides its own words. */
struct conversation {
  const struct chat_message *messages;
  int count;
  const struct chat_tool *tools;
  int n_tools;
  bool generation;
};

static bool is_role(const struct chat_message *message, const char *role) { return chat_is_role(message, role); }

static void chatml_turn(struct writer *w, const char *role, const char *content) {
  write_literal(w, "<|im_start|>");
  write_text(w, role);
  write_text(w, "\n");
  write_text(w, content);
  write_literal(w, "<|im_end|>\n");
}

/* Reasoning of earlier turns is not shown again. */
static const char *without_thoughts(const struct chat_template *chat, const struct conversation *c, int at) {
  const char *content = chat_content(&c->messages[at]);
  if (!chat->thinks || at + 1 == c->count) return content;
  static const char end[] = "</think>";
  const char *kept = content;
  for (const char *found = strstr(content, end); found; found = strstr(kept, end)) kept = found + sizeof end - 1;
  return kept == content ? content : kept + strspn(kept, "\n");
}

/* The turns in front of the others: a system message of the model's own, tools. Returns how many messages it took. */
static int chatml_begin(struct writer *w, const struct chat_template *chat, const struct conversation *c) {
  bool system = is_role(&c->messages[0], "system");
  if (c->n_tools > 0 && chat->tools == CHAT_TOOLS_QWEN) {
    const char *content = system ? chat_content(&c->messages[0]) : chat->default_system;
    write_literal(w, "<|im_start|>system\n");
    write_text(w, content);
    write_qwen_tools(w, chat, system || content[0], c->tools, c->n_tools);
    write_literal(w, "<|im_end|>\n");
    return system;
  }
  if (c->n_tools > 0)
    write_hermes_tools(w, c->tools, c->n_tools);
  else if (chat->default_system[0] && !system)
    chatml_turn(w, "system", chat->default_system);
  return 0;
}

static void write_chatml(struct writer *w, const struct chat_template *chat, const struct conversation *c) {
  if ((w->tokenizer->adds_bos || chat->writes_bos) && w->tokenizer->bos >= 0) write_id(w, w->tokenizer->bos);
  for (int i = chatml_begin(w, chat, c); i < c->count; i++) {
    struct chat_message message = c->messages[i];
    if (is_role(&message, "tool")) {
      write_chatml_result(w, chat, c->messages, c->count, i);
      continue;
    }
    if (is_role(&message, "assistant")) message.content = without_thoughts(chat, c, i);
    if (message.n_calls > 0)
      write_chatml_calls(w, chat, &message);
    else
      chatml_turn(w, message.role, chat_content(&message));
  }
  if (c->generation) write_literal(w, chat->opens_thinking ? "<|im_start|>assistant\n<think>\n" : "<|im_start|>assistant\n");
}

static void llama3_header(struct writer *w, const char *role) {
  write_literal(w, "<|start_header_id|>");
  write_text(w, role);
  write_literal(w, "<|end_header_id|>\n\n");
}

/* The system turn and, with tools, the first turn of the user, which shows them. Returns how many messages it took. */
static int llama3_begin(struct writer *w, const struct chat_template *chat, const struct conversation *c) {
  int taken = 0;
  bool system = is_role(&c->messages[0], "system");
  if (system || chat->system_preamble[0]) {
    llama3_header(w, "system");
    if (c->n_tools > 0) write_text(w, "Environment: ipython\n");
    write_text(w, chat->system_preamble);
    if (system) write_trimmed(w, chat_content(&c->messages[taken++]));
    write_literal(w, "<|eot_id|>");
  }
  if (c->n_tools > 0 && taken < c->count) {
    llama3_header(w, "user");
    write_llama3_tools(w, c->tools, c->n_tools);
    write_trimmed(w, chat_content(&c->messages[taken++]));
    write_literal(w, "<|eot_id|>");
  }
  return taken;
}

static void write_llama3(struct writer *w, const struct chat_template *chat, const struct conversation *c) {
  if (w->tokenizer->bos >= 0) write_id(w, w->tokenizer->bos);
  for (int i = llama3_begin(w, chat, c); i < c->count; i++) {
    const struct chat_message *message = &c->messages[i];
    bool result = is_role(message, "tool");
    llama3_header(w, result ? "ipython" : message->role);
    if (result)
      write_llama3_result(w, message);
    else if (message->n_calls > 0)
      write_llama3_call(w, &message->calls[0]);
    else
      write_trimmed(w, chat_content(message));
    write_literal(w, "<|eot_id|>");
  }
  if (c->generation) llama3_header(w, "assistant");
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

/* Tools stand before the last message of the user, and before any that says the same. */
static bool mistral_shows_tools(const struct conversation *c, const struct chat_message *message) {
  int last = c->count - 1;
  while (last >= 0 && !is_role(&c->messages[last], "user")) last--;
  return c->n_tools > 0 && last >= 0 && strcmp(chat_content(&c->messages[last]), chat_content(message)) == 0;
}

static void mistral_user(struct writer *w, const struct chat_template *chat, const struct conversation *c, int at,
                         const char *system) {
  if (mistral_shows_tools(c, &c->messages[at])) write_mistral_tools(w, chat, c->tools, c->n_tools);
  write_literal(w, chat->mistral.user_open);
  if (system && at == (chat->mistral.system_last ? c->count - 1 : 1)) {
    write_text(w, system);
    write_text(w, "\n\n");
  }
  write_text(w, chat_content(&c->messages[at]));
  write_literal(w, chat->mistral.user_close);
}

static void write_mistral(struct writer *w, const struct chat_template *chat, const struct conversation *c) {
  if (w->tokenizer->bos >= 0) write_id(w, w->tokenizer->bos);
  const char *system = is_role(&c->messages[0], "system") ? chat_content(&c->messages[0]) : NULL;
  for (int i = system != NULL; i < c->count; i++) {
    const struct chat_message *message = &c->messages[i];
    if (is_role(message, "user")) {
      mistral_user(w, chat, c, i, system);
    } else if (is_role(message, "tool")) {
      write_mistral_result(w, chat, message);
    } else if (message->n_calls > 0) {
      write_mistral_calls(w, chat, message);
    } else {
      write_text(w, chat->mistral.assistant_open);
      if (chat->mistral.trims_assistant)
        write_trimmed(w, chat_content(message));
      else
        write_text(w, chat_content(message));
      if (w->tokenizer->eos >= 0) write_id(w, w->tokenizer->eos);
    }
  }
}

/* ---- checking ---- */

static oscar_status check_calls(oscar_context *context, const struct chat_template *chat, const struct chat_message *message,
                                int number) {
  if (!is_role(message, "assistant"))
    return set_error(context, OSCAR_INVALID_ARGUMENT, "message %d has calls of tools, which only an assistant makes", number);
  for (int i = 0; i < message->n_calls; i++)
    if (!message->calls[i].name)
      return set_error(context, OSCAR_INVALID_ARGUMENT, "call %d of message %d names no tool", i + 1, number);
  if (chat->tools == CHAT_TOOLS_LLAMA3 && message->n_calls > 1)
    return set_error(context, OSCAR_INVALID_ARGUMENT, "message %d has %d calls; the llama3 template has one call a message",
                     number, message->n_calls);
  return OSCAR_OK;
}

static oscar_status check_message(oscar_context *context, const struct chat_template *chat, const struct chat_message *message,
                                  int number) {
  bool result = message->role && is_role(message, "tool"), calls = message->n_calls > 0;
  if (!message->role || (!message->content && !calls))
    return set_error(context, OSCAR_INVALID_ARGUMENT, "message %d has no role or no content", number);
  if (!result && !is_role(message, "system") && !is_role(message, "user") && !is_role(message, "assistant"))
    return set_error(context, OSCAR_INVALID_ARGUMENT,
                     "message %d has the role \"%.40s\"; system, user, assistant and tool are known", number, message->role);
  if ((result || calls) && !chat_template_has_tools(chat))
    return set_error(context, OSCAR_UNSUPPORTED, "message %d has %s, and the model's chat template (%s) defines no tools", number,
                     result ? "the role \"tool\"" : "calls of tools", chat_family_name(chat->family));
  return calls ? check_calls(context, chat, message, number) : OSCAR_OK;
}

static oscar_status check_tools(oscar_context *context, const struct chat_template *chat, const struct conversation *c) {
  if (c->n_tools <= 0) return OSCAR_OK;
  if (!chat_template_has_tools(chat))
    return set_error(context, OSCAR_UNSUPPORTED, "the model's chat template (%s) defines no tools; ask without them",
                     chat_family_name(chat->family));
  for (int i = 0; i < c->n_tools; i++)
    if (!c->tools[i].name) return set_error(context, OSCAR_INVALID_ARGUMENT, "tool %d has no name", i + 1);
  if (chat->tools == CHAT_TOOLS_LLAMA3 && c->count == is_role(&c->messages[0], "system"))
    return set_error(context, OSCAR_INVALID_ARGUMENT,
                     "the llama3 template puts tools into the first user message, and there is none");
  return OSCAR_OK;
}

/* Gemma and Mistral: after an optional system message, user and assistant take turns; calls and results stand between. */
static oscar_status check_turns(oscar_context *context, const struct chat_template *chat, const struct conversation *c) {
  const char *family = chat_family_name(chat->family);
  int system = is_role(&c->messages[0], "system");
  if (system && c->count == 1)
    return set_error(context, OSCAR_INVALID_ARGUMENT,
                     "the %s template puts the system message into a user message, and there is none", family);
  for (int i = system, turn = 0; i < c->count; i++) {
    if (is_role(&c->messages[i], "tool") || c->messages[i].n_calls > 0) continue;
    const char *expected = turn++ % 2 == 0 ? "user" : "assistant";
    if (!is_role(&c->messages[i], expected))
      return set_error(context, OSCAR_INVALID_ARGUMENT,
                       "message %d has the role %s where the %s template needs %s: after an optional system message, user and "
                       "assistant take turns",
                       i + 1, c->messages[i].role, family, expected);
  }
  return OSCAR_OK;
}

static oscar_status check_messages(oscar_context *context, const struct chat_template *chat, const struct conversation *c) {
  if (c->count < 1) return set_error(context, OSCAR_INVALID_ARGUMENT, "the conversation has no messages");
  for (int i = 0; i < c->count; i++) {
    oscar_status status = check_message(context, chat, &c->messages[i], i + 1);
    if (status) return status;
  }
  if (is_role(&c->messages[0], "system") && chat->refuses_system)
    return set_error(context, OSCAR_INVALID_ARGUMENT, "the model's %s template has no place for a system message",
                     chat_family_name(chat->family));
  oscar_status status = check_tools(context, chat, c);
  if (status || (chat->family != CHAT_GEMMA && chat->family != CHAT_MISTRAL)) return status;
  return check_turns(context, chat, c);
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
                                  const struct chat_message *messages, int n_messages, const struct chat_tool *tools, int n_tools,
                                  bool add_generation_prompt, int32_t **ids, int *count) {
  if (chat->family <= CHAT_UNKNOWN || chat->family > CHAT_MISTRAL)
    return set_error(context, OSCAR_INVALID_ARGUMENT, "no chat template was chosen");
  const struct conversation c = {messages, n_messages, tools, n_tools, add_generation_prompt};
  oscar_status status = check_messages(context, chat, &c);
  if (!status) status = check_tokenizer(context, chat, tokenizer);
  if (status) return status;
  struct writer w = {.context = context, .tokenizer = tokenizer};
  switch (chat->family) {
  case CHAT_CHATML:
    write_chatml(&w, chat, &c);
    break;
  case CHAT_LLAMA3:
    write_llama3(&w, chat, &c);
    break;
  case CHAT_GEMMA:
    write_gemma(&w, messages, n_messages, add_generation_prompt);
    break;
  case CHAT_MISTRAL: /* [/INST] is what opens the assistant's turn */
    write_mistral(&w, chat, &c);
    break;
  case CHAT_UNKNOWN:
    break;
  }
  write_flush(&w);
  mem_free(context, w.text);
  if (w.status) {
    mem_free(context, w.ids.ids);
    return w.status;
  }
  *ids = w.ids.ids;
  *count = (int)w.ids.count;
  return OSCAR_OK;
}
