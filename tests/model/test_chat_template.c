/* Chat templates against Jinja's rendering of the models' own and of published templates (stored ids), control tokens spelled in
 * messages, wrong conversations and wrong files. */
#include "vectors.h"

#include "gguf_writer.h"
#include "model/chat_template.h"
#include "model/reply.h"

#include <jansson.h>

#define CONVERSATION_MESSAGES 16

struct conversation {
  struct chat_message messages[CONVERSATION_MESSAGES];
  int count;
};

/* A file with nothing but a template and, as its vocabulary, the control tokens that templates ask for. */
static struct gguf *template_file(oscar_context *c, struct gguf_writer *w, const char *template, const char *tokenizer_name) {
  static const char *const chatml[] = {"<|im_start|>", "<|im_end|>"};
  static const char *const llama3[] = {"<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"};
  static const char *const gemma[] = {"<start_of_turn>", "<end_of_turn>"};
  static const char *const none[] = {"<s>"};
  const char *const *tokens = none;
  uint64_t count = 1;
  if (strstr(tokenizer_name, "smollm") || strstr(tokenizer_name, "qwen")) tokens = chatml, count = 2;
  if (strstr(tokenizer_name, "llama-bpe")) tokens = llama3, count = 3;
  if (strstr(tokenizer_name, "gemma")) tokens = gemma, count = 2;
  put_head(w, 3, 0, template ? 2 : 1);
  if (template) put_string(w, "tokenizer.chat_template", template);
  put_array(w, "tokenizer.ggml.tokens", GGUF_STRING, count);
  for (uint64_t i = 0; i < count; i++) put_text(w, tokens[i]);
  put_padding(w, 32);
  struct gguf *file;
  assert_ok(c, gguf_parse(c, "made.gguf", w->data, w->bytes, &file));
  return file;
}

static struct chat_template choose(oscar_context *c, const char *template, const char *tokenizer_name, const char *name) {
  struct gguf_writer w = {0};
  struct chat_template chat;
  struct gguf *file = template_file(c, &w, template, tokenizer_name);
  assert_ok(c, chat_template_choose(c, file, name, &chat));
  gguf_close(file);
  writer_free(&w);
  return chat;
}

/* ---- stored truth ---- */

static uint32_t read_conversations(struct vectors *v, struct conversation **conversations) {
  uint32_t count = next_u32(v);
  *conversations = calloc(count, sizeof **conversations);
  assert_non_null(*conversations);
  for (uint32_t i = 0; i < count; i++) {
    struct conversation *conversation = &(*conversations)[i];
    conversation->count = (int)next_u32(v);
    assert_in_range(conversation->count, 1, CONVERSATION_MESSAGES);
    for (int k = 0; k < conversation->count; k++) {
      conversation->messages[k].role = next_text(v);
      conversation->messages[k].content = next_text(v);
    }
  }
  return count;
}

static void free_conversations(struct conversation *conversations, uint32_t count) {
  for (uint32_t i = 0; i < count; i++)
    for (int k = 0; k < conversations[i].count; k++) {
      free((char *)(uintptr_t)conversations[i].messages[k].role);
      free((char *)(uintptr_t)conversations[i].messages[k].content);
    }
  free(conversations);
}

/* Gemma's template would open a turn of a role "system", which its models have never seen: refused here. */
static bool late_system(const struct conversation *conversation) {
  for (int i = 1; i < conversation->count; i++)
    if (strcmp(conversation->messages[i].role, "system") == 0) return true;
  return false;
}

static void compare_case(oscar_context *c, const char *what, const struct chat_template *chat, const struct tokenizer *t,
                         const struct conversation *conversation, bool generation, const uint8_t *truth, uint32_t truth_count) {
  int32_t *ids = NULL;
  int count = 0;
  oscar_status status =
      chat_template_encode(chat, c, t, conversation->messages, conversation->count, NULL, 0, generation, &ids, &count);
  if (truth_count == SAME_AS_BEFORE || (chat->family == CHAT_GEMMA && late_system(conversation))) {
    if (status != OSCAR_INVALID_ARGUMENT) fail_msg("%s: not refused as the template does", what);
    return;
  }
  if (status) fail_msg("%s: %s", what, oscar_last_error(c));
  expect_ids(what, ids, count, truth, truth_count);
  mem_free(c, ids);
}

static void conversations_are_written_as_the_models_templates_write_them(void **state) {
  (void)state;
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 1);
  struct vectors v = vectors_open(c, "chats", ".bin");
  struct conversation *conversations;
  uint32_t n_conversations = read_conversations(&v, &conversations), n_cases = next_u32(&v);
  assert_true(n_conversations > 10 && n_cases > 10);
  for (uint32_t i = 0; i < n_cases; i++) {
    char *name = next_text(&v), *family = next_text(&v), *vocabulary = next_text(&v), *template = next_text(&v);
    struct tokenizer *t = test_tokenizer(c, vocabulary);
    struct chat_template chat = choose(c, template, vocabulary, NULL);
    assert_string_equal(chat_family_name(chat.family), family);
    for (uint32_t k = 0; k < 2 * n_conversations; k++) {
      char what[128];
      uint32_t count;
      const uint8_t *truth = next_ids(&v, &count);
      snprintf(what, sizeof what, "%s, conversation %u, %s generation prompt", name, k / 2, k % 2 ? "with" : "without");
      if (t) compare_case(c, what, &chat, t, &conversations[k / 2], k % 2 == 1, truth, count);
    }
    tokenizer_free(t);
    free(name);
    free(family);
    free(vocabulary);
    free(template);
  }
  free_conversations(conversations, n_conversations);
  vectors_close(&v);
  oscar_context_free(c);
}

static void recognise(const char *model, const char *system, bool tools) {
  const char *path = test_model(model);
  if (!path) return;
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 1);
  struct chat_template chat;
  struct gguf *file;
  assert_ok(c, gguf_open(c, path, &file));
  assert_ok(c, chat_template_choose(c, file, "auto", &chat));
  assert_int_equal(chat.family, CHAT_CHATML);
  assert_string_equal(chat.default_system, system);
  assert_int_equal(chat_template_has_tools(&chat), tools);
  assert_int_equal(chat_template_choose(c, file, "gemma", &chat), OSCAR_UNSUPPORTED); /* no such control tokens */
  assert_non_null(strstr(oscar_last_error(c), "<start_of_turn>"));
  gguf_close(file);
  oscar_context_free(c);
}

static void the_default_models_own_file_is_recognised(void **state) {
  (void)state;
  recognise("smollm2-135m", "You are a helpful AI assistant named SmolLM, trained by Hugging Face", false);
}

static void the_larger_models_own_files_are_recognised(void **state) {
  (void)state;
  recognise("qwen2.5-coder-0.5b", "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.", true);
  recognise("qwen2.5-coder-1.5b", "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.", true);
  const char *base = test_model("gemma3-270m");
  if (!base) return;
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 1);
  struct chat_template chat;
  struct gguf *file;
  assert_ok(c, gguf_open(c, base, &file)); /* a base model: the tokens are there, a template is not */
  assert_int_equal(chat_template_choose(c, file, NULL, &chat), OSCAR_UNSUPPORTED);
  assert_ok(c, chat_template_choose(c, file, "gemma", &chat));
  assert_int_equal(chat.family, CHAT_GEMMA);
  gguf_close(file);
  oscar_context_free(c);
}

/* ---- tools ---- */

enum { TOOLS = 4, CALLS = 4 };

struct tool_set {
  struct chat_tool tools[TOOLS];
  int count;
};
struct tool_conversation {
  struct chat_message messages[CONVERSATION_MESSAGES];
  struct chat_tool_call calls[CONVERSATION_MESSAGES][CALLS];
  int count;
  uint32_t tools;
};
static struct tool_set tool_sets[TOOLS];
static struct tool_conversation tool_conversations[16];

/* Texts that live until free_kept. */
static char *kept[512];
static size_t n_kept;
static const char *keep(struct vectors *v) {
  assert_true(n_kept < ARRAY_LENGTH(kept));
  return kept[n_kept++] = next_text(v);
}
static void free_kept(void) {
  while (n_kept > 0) free(kept[--n_kept]);
}

static uint32_t read_tool_conversations(struct vectors *v) {
  uint32_t n_sets = next_u32(v);
  assert_in_range(n_sets, 1, TOOLS);
  for (uint32_t i = 0; i < n_sets; i++) {
    tool_sets[i].count = (int)next_u32(v);
    assert_in_range(tool_sets[i].count, 0, TOOLS);
    for (int k = 0; k < tool_sets[i].count; k++) {
      struct chat_tool *tool = &tool_sets[i].tools[k];
      tool->name = keep(v);
      tool->description = keep(v);
      tool->parameters = keep(v);
    }
  }
  uint32_t count = next_u32(v);
  assert_in_range(count, 8, ARRAY_LENGTH(tool_conversations));
  for (uint32_t i = 0; i < count; i++) {
    struct tool_conversation *conversation = &tool_conversations[i];
    conversation->tools = next_u32(v);
    conversation->count = (int)next_u32(v);
    assert_in_range(conversation->count, 1, CONVERSATION_MESSAGES);
    for (int k = 0; k < conversation->count; k++) {
      struct chat_message *message = &conversation->messages[k];
      *message = (struct chat_message){.role = keep(v), .calls = conversation->calls[k]};
      message->content = keep(v);
      message->tool_call_id = keep(v);
      message->n_calls = (int)next_u32(v);
      assert_in_range(message->n_calls, 0, CALLS);
      for (int j = 0; j < message->n_calls; j++) {
        struct chat_tool_call *call = &conversation->calls[k][j];
        call->id = keep(v);
        call->name = keep(v);
        call->arguments = keep(v);
      }
    }
  }
  return count;
}

static void tools_are_written_as_the_models_templates_write_them(void **state) {
  (void)state;
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 1);
  struct vectors v = vectors_open(c, "tools", ".bin");
  uint32_t n_conversations = read_tool_conversations(&v), n_cases = next_u32(&v), compared = 0;
  bool all = true; /* models are fetched that have the vocabularies */
  for (uint32_t i = 0; i < n_cases; i++) {
    char *name = next_text(&v), *family = next_text(&v), *vocabulary = next_text(&v), *template = next_text(&v);
    struct tokenizer *t = test_tokenizer(c, vocabulary);
    struct chat_template chat = choose(c, template, vocabulary, NULL);
    const uint32_t before = compared;
    all = all && t;
    assert_string_equal(chat_family_name(chat.family), family);
    assert_true(chat_template_has_tools(&chat));
    assert_int_equal(chat.thinks, strstr(template, "</think>") != NULL);
    for (uint32_t k = 0; k < n_conversations; k++) {
      const struct tool_conversation *conversation = &tool_conversations[k];
      char what[128];
      uint32_t truth_count;
      const uint8_t *truth = next_ids(&v, &truth_count);
      int32_t *ids = NULL;
      int count = 0;
      const struct tool_set *tools = &tool_sets[conversation->tools];
      /* Hermes' template is for conversations with tools; without, it would offer an empty list. */
      if (!t || (chat.tools == CHAT_TOOLS_HERMES && tools->count == 0)) continue;
      snprintf(what, sizeof what, "%s (%s), conversation %u", name, vocabulary, k);
      oscar_status status = chat_template_encode(&chat, c, t, conversation->messages, conversation->count, tools->tools,
                                                 tools->count, true, &ids, &count);
      compared++;
      bool only_system = conversation->count == 1 && strcmp(conversation->messages[0].role, "system") == 0;
      if (truth_count == SAME_AS_BEFORE || (chat.family == CHAT_MISTRAL && only_system)) { /* the template would drop it */
        if (status != OSCAR_INVALID_ARGUMENT) fail_msg("%s: not refused as the template does", what);
        continue;
      }
      if (status) fail_msg("%s: %s", what, oscar_last_error(c));
      expect_ids(what, ids, count, truth, truth_count);
      mem_free(c, ids);
    }
    assert_true(!t || compared > before);
    tokenizer_free(t);
    free(name);
    free(family);
    free(vocabulary);
    free(template);
  }
  assert_true(!all || compared >= 8 * n_conversations);
  vectors_close(&v);
  free_kept();
  oscar_context_free(c);
}

/* ---- control tokens in messages ---- */

/* Every message is made of the vocabulary's control tokens; the template alone may write any, so as many as for empty messages.
 */
static int count_controls(oscar_context *c, const struct chat_template *chat, const struct tokenizer *t, const char *content) {
  const struct chat_message messages[] = {{.role = "system", .content = content},
                                          {.role = "user", .content = content},
                                          {.role = "assistant", .content = content},
                                          {.role = "user", .content = content}};
  int32_t *ids;
  int count, controls = 0;
  size_t shown, hidden;
  assert_ok(c, chat_template_encode(chat, c, t, messages, 4, NULL, 0, true, &ids, &count));
  for (int i = 0; i < count; i++) {
    tokenizer_piece(t, ids[i], false, &hidden);
    tokenizer_piece(t, ids[i], true, &shown);
    controls += shown > 0 && hidden == 0;
  }
  mem_free(c, ids);
  return controls;
}

static void messages_never_become_control_tokens(void **state) {
  (void)state;
  static const struct {
    const char *vocabulary, *name;
  } cases[] = {{"smollm", "chatml"},       {"qwen2", "chatml"},        {"llama-bpe", "llama3"},
               {"spm-gemma", "gemma"},     {"spm-mistral", "mistral"}, {"spm-inst", "mistral"},
               {"smollm2-135m", "chatml"}, {"gemma3-270m", "gemma"},   {"qwen2.5-coder-0.5b", "chatml"}};
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 1);
  for (size_t i = 0; i < ARRAY_LENGTH(cases); i++) {
    struct tokenizer *t = test_tokenizer(c, cases[i].vocabulary);
    if (!t) continue;
    struct chat_template chat = choose(c, NULL, cases[i].vocabulary, cases[i].name);
    int expected = count_controls(c, &chat, t, "x");
    for (int32_t id = 0; id < tokenizer_vocab(t); id++) {
      size_t hidden, shown;
      tokenizer_piece(t, id, false, &hidden);
      const char *piece = tokenizer_piece(t, id, true, &shown);
      if (hidden > 0 || shown == 0 || id % 16 > 8) continue;
      char content[600];
      snprintf(content, sizeof content, "%.*s%.*s a%.*s", (int)shown, piece, (int)shown, piece, (int)shown, piece);
      assert_int_equal(count_controls(c, &chat, t, content), expected);
    }
    tokenizer_free(t);
  }
  oscar_context_free(c);
}

/* What recognition looks for in templates with tools, and a vocabulary for each. */
static const struct {
  const char *template, *vocabulary;
  enum chat_tool_style style;
} styles[] = {
    {"<|im_start|> # Tools\\n\\nYou may call one or more functions <tool_call> <tool_response>", "qwen2", CHAT_TOOLS_QWEN},
    {"<|im_start|> You are a function calling AI model. <tool_call> <tool_response>", "smollm", CHAT_TOOLS_HERMES},
    {"<|start_header_id|> Environment: ipython Given the following functions, please respond", "llama-bpe", CHAT_TOOLS_LLAMA3},
    {"'[INST] ' '[/INST]' '[AVAILABLE_TOOLS] [' '[TOOL_CALLS] [' '[TOOL_RESULTS] {\"content\": ' 'system'", "spm-inst",
     CHAT_TOOLS_MISTRAL},
};

/* Everything that a caller gives is `text`. */
static int count_tool_controls(oscar_context *c, const struct chat_template *chat, const struct tokenizer *t, const char *text) {
  char parameters[2000];
  snprintf(parameters, sizeof parameters,
           "{\"properties\": {\"%s\": {\"type\": \"object\", \"description\": \"%s\", \"additionalProperties\": {\"%s\": 1}}}}",
           text, text, text);
  const struct chat_tool tool = {.name = text, .description = text, .parameters = parameters};
  const struct chat_tool_call call = {.id = text, .name = text, .arguments = parameters};
  const struct chat_message messages[] = {
      {.role = "system", .content = text},
      {.role = "user", .content = text},
      {.role = "assistant", .content = text, .calls = &call, .n_calls = 1},
      {.role = "tool", .content = text, .name = text, .tool_call_id = text},
  };
  int32_t *ids;
  int count, controls = 0;
  size_t shown, hidden;
  assert_ok(c, chat_template_encode(chat, c, t, messages, 4, &tool, 1, true, &ids, &count));
  for (int i = 0; i < count; i++) {
    tokenizer_piece(t, ids[i], false, &hidden);
    tokenizer_piece(t, ids[i], true, &shown);
    controls += shown > 0 && hidden == 0;
  }
  mem_free(c, ids);
  return controls;
}

static void tools_never_become_control_tokens(void **state) {
  (void)state;
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 1);
  for (size_t i = 0; i < ARRAY_LENGTH(styles); i++) {
    struct tokenizer *t = test_tokenizer(c, styles[i].vocabulary);
    struct chat_template chat = choose(c, styles[i].template, styles[i].vocabulary, NULL);
    assert_int_equal(chat.tools, styles[i].style);
    int expected = count_tool_controls(c, &chat, t, "x"), seen = 0;
    for (int32_t id = 0; id < tokenizer_vocab(t); id++) {
      size_t hidden, shown;
      tokenizer_piece(t, id, false, &hidden);
      const char *piece = tokenizer_piece(t, id, true, &shown);
      if (hidden > 0 || shown == 0) continue;
      char text[300];
      snprintf(text, sizeof text, "%.*s%.*s a%.*s", (int)shown, piece, (int)shown, piece, (int)shown, piece);
      assert_int_equal(count_tool_controls(c, &chat, t, text), expected);
      seen++;
    }
    assert_true(seen > 2);
    tokenizer_free(t);
  }
  oscar_context_free(c);
}

static oscar_status take_call(void *user, const struct reply_delta *delta) {
  char *seen = user;
  if (delta->kind == REPLY_CONTENT) strcat(seen, "content ");
  if (delta->kind == REPLY_CALL) snprintf(seen + strlen(seen), 100, "%s(%s)", delta->name, delta->arguments);
  return OSCAR_OK;
}

/* A form, with arguments for its schema, is a call to the parser of replies. */
static void forms_of_calls_are_what_replies_are_searched_for(void **state) {
  (void)state;
  static const struct chat_tool tools[] = {{.name = "a\"b", .parameters = "{\"type\": \"object\", \"properties\": {}}"},
                                           {.name = "c"}};
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 1);
  struct chat_tool_forms *forms;
  for (size_t i = 0; i < ARRAY_LENGTH(styles); i++) {
    struct chat_template chat = choose(c, styles[i].template, styles[i].vocabulary, NULL);
    assert_ok(c, chat_tool_forms_create(&chat, c, tools, 2, NULL, &forms));
    assert_int_equal(forms->n_forms, 2);
    for (int k = 0; k < 2; k++) {
      char text[500] = "", seen[200] = "";
      for (int part = 0; part < forms->forms[k].n_parts; part++) {
        const struct chat_form_part *p = &forms->forms[k].parts[part];
        assert_true(!p->literal != !p->schema);
        strcat(text, p->literal ? p->literal : "{\"x\": 1}");
        if (p->schema) assert_string_equal(p->schema, k == 0 ? tools[0].parameters : "{\"type\":\"object\"}");
      }
      struct reply_parser *parser;
      assert_ok(c, reply_parser_create(&chat, c, true, &parser));
      assert_ok(c, reply_feed(parser, text, strlen(text), take_call, seen));
      assert_ok(c, reply_end(parser, take_call, seen));
      reply_parser_free(parser);
      assert_string_equal(seen, k == 0 ? "a\"b({\"x\": 1})" : "c({\"x\": 1})");
    }
    chat_tool_forms_free(c, forms);
    assert_ok(c, chat_tool_forms_create(&chat, c, tools, 2, "c", &forms));
    assert_int_equal(forms->n_forms, 1);
    chat_tool_forms_free(c, forms);
    assert_int_equal(chat_tool_forms_create(&chat, c, tools, 2, "d", &forms), OSCAR_INVALID_ARGUMENT);
    assert_non_null(strstr(oscar_last_error(c), "\"d\""));
    assert_int_equal(chat_tool_forms_create(&chat, c, tools, 0, NULL, &forms), OSCAR_INVALID_ARGUMENT);
  }
  struct chat_template gemma = choose(c, NULL, "spm-gemma", "gemma");
  assert_int_equal(chat_tool_forms_create(&gemma, c, tools, 2, NULL, &forms), OSCAR_UNSUPPORTED);
  chat_tool_forms_free(c, NULL);
  oscar_context_free(c);
}

/* A tokenizer whose tokens are these, all of them control tokens, and bytes. */
static struct tokenizer *tokenizer_of(oscar_context *c, const char *const *controls, uint64_t count) {
  struct gguf_writer w = {0};
  struct gguf *file;
  struct tokenizer *t;
  put_head(&w, 3, 0, 5);
  put_string(&w, "tokenizer.ggml.model", "gpt2");
  put_string(&w, "tokenizer.ggml.pre", "gpt-2");
  put_array(&w, "tokenizer.ggml.tokens", GGUF_STRING, count + 1);
  for (uint64_t i = 0; i < count; i++) put_text(&w, controls[i]);
  put_text(&w, "<tool_call>");
  put_array(&w, "tokenizer.ggml.token_type", GGUF_INT32, count + 1);
  for (uint64_t i = 0; i <= count; i++) put_u32(&w, i < count ? 3 : 4);
  put_array(&w, "tokenizer.ggml.merges", GGUF_STRING, 0);
  put_padding(&w, 32);
  assert_ok(c, gguf_parse(c, "made.gguf", w.data, w.bytes, &file));
  assert_ok(c, tokenizer_create(c, file, &t));
  gguf_close(file);
  writer_free(&w);
  return t;
}

static void marks_that_are_control_tokens_are_visible(void **state) {
  (void)state;
  static const char *const controls[] = {"<|im_start|>", "<|im_end|>", "[TOOL_CALLS]", "<|python_tag|>",
                                         "<think>",      "</think>",   "</tool_call>"};
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 1);
  struct tokenizer *t = tokenizer_of(c, controls, ARRAY_LENGTH(controls));
  struct chat_template chat = {.family = CHAT_MISTRAL, .tools = CHAT_TOOLS_MISTRAL};
  int32_t ids[8];
  assert_int_equal(chat_template_visible(&chat, t, ids, 8), 1);
  assert_int_equal(ids[0], 2);
  chat.tools = CHAT_TOOLS_LLAMA3;
  assert_int_equal(chat_template_visible(&chat, t, ids, 8), 1);
  assert_int_equal(ids[0], 3);
  chat.tools = CHAT_TOOLS_QWEN; /* <tool_call> is text anyway */
  chat.thinks = true;
  assert_int_equal(chat_template_visible(&chat, t, ids, 8), 3);
  assert_int_equal(ids[0], 6);
  assert_int_equal(ids[1], 4);
  assert_int_equal(ids[2], 5);
  assert_int_equal(chat_template_visible(&chat, t, ids, 2), 2);
  chat = (struct chat_template){.family = CHAT_GEMMA};
  assert_int_equal(chat_template_visible(&chat, t, ids, 8), 0);
  tokenizer_free(t);
  oscar_context_free(c);
}

/* ---- refusals ---- */

static void wrong_conversations_are_refused_with_the_reason(void **state) {
  (void)state;
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 1);
  struct tokenizer *chatml_tokens = test_tokenizer(c, "smollm"), *gemma_tokens = test_tokenizer(c, "spm-gemma");
  struct chat_template chatml = choose(c, NULL, "smollm", "chatml"), gemma = choose(c, NULL, "spm-gemma", "gemma");
  struct chat_template unchosen = {.family = CHAT_UNKNOWN};
  int32_t *ids;
  int count;
  const struct chat_message user = {.role = "user", .content = "a"}, system = {.role = "system", .content = "a"},
                            tool = {.role = "tool", .content = "a"}, empty = {.role = "user"},
                            robot = {.role = "robot", .content = "a"};
  const struct chat_message twice[] = {
      {.role = "user", .content = "a"}, {.role = "assistant", .content = "b"}, {.role = "assistant", .content = "c"}};
#define REFUSED(chat, tokens, messages, n, status, word)                                                                         \
  do {                                                                                                                           \
    assert_int_equal(chat_template_encode(&chat, c, tokens, messages, n, NULL, 0, true, &ids, &count), status);                  \
    if (!strstr(oscar_last_error(c), word)) fail_msg("no \"%s\" in: %s", word, oscar_last_error(c));                             \
  } while (0)
  REFUSED(chatml, chatml_tokens, &user, 0, OSCAR_INVALID_ARGUMENT, "no messages");
  REFUSED(chatml, chatml_tokens, &tool, 1, OSCAR_UNSUPPORTED, "defines no tools");
  REFUSED(chatml, chatml_tokens, &robot, 1, OSCAR_INVALID_ARGUMENT, "\"robot\"");
  REFUSED(chatml, chatml_tokens, &empty, 1, OSCAR_INVALID_ARGUMENT, "no content");
  REFUSED(chatml, gemma_tokens, &user, 1, OSCAR_UNSUPPORTED, "<|im_start|>");
  REFUSED(gemma, gemma_tokens, &system, 1, OSCAR_INVALID_ARGUMENT, "user message");
  REFUSED(gemma, gemma_tokens, twice, 3, OSCAR_INVALID_ARGUMENT, "message 3 has the role assistant");
  REFUSED(unchosen, gemma_tokens, &user, 1, OSCAR_INVALID_ARGUMENT, "chosen");
#undef REFUSED
  tokenizer_free(chatml_tokens);
  tokenizer_free(gemma_tokens);
  oscar_context_free(c);
}

static void wrong_tools_are_refused_with_the_reason(void **state) {
  (void)state;
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 1);
  struct tokenizer *qwen_tokens = test_tokenizer(c, "qwen2"), *llama_tokens = test_tokenizer(c, "llama-bpe");
  struct chat_template plain = choose(c, NULL, "qwen2", "chatml"), qwen = choose(c, styles[0].template, "qwen2", NULL),
                       llama = choose(c, styles[2].template, "llama-bpe", NULL);
  assert_false(chat_template_has_tools(&plain));
  const struct chat_message user = {.role = "user", .content = "a"}, system = {.role = "system", .content = "a"};
  const struct chat_tool_call calls[] = {
      {.name = "f", .arguments = "{"}, {.name = "f", .arguments = "[1]"}, {.arguments = "{}"}, {.name = "f"}};
  const struct chat_message broken = {.role = "assistant", .calls = calls, .n_calls = 1},
                            list = {.role = "assistant", .calls = calls + 1, .n_calls = 1},
                            nameless = {.role = "assistant", .calls = calls + 2, .n_calls = 1},
                            two = {.role = "assistant", .calls = calls, .n_calls = 2},
                            empty = {.role = "assistant", .calls = calls + 3, .n_calls = 1},
                            called = {.role = "user", .content = "a", .calls = calls + 3, .n_calls = 1};
  const struct chat_tool good = {.name = "f"}, bad = {.name = "f", .parameters = "nothing"}, unnamed = {.description = "d"},
                         bytes = {.name = "f", .description = "\xff"};
  const struct {
    const struct chat_template *chat;
    const struct tokenizer *tokenizer;
    const struct chat_message *message;
    const struct chat_tool *tool;
    oscar_status status;
    const char *word;
  } wrong[] = {
      {&plain, qwen_tokens, &user, &good, OSCAR_UNSUPPORTED, "defines no tools"},
      {&plain, qwen_tokens, &empty, NULL, OSCAR_UNSUPPORTED, "calls of tools"},
      {&qwen, qwen_tokens, &user, &bad, OSCAR_INVALID_ARGUMENT, "parameters of \"f\""},
      {&qwen, qwen_tokens, &user, &unnamed, OSCAR_INVALID_ARGUMENT, "tool 1 has no name"},
      {&qwen, qwen_tokens, &user, &bytes, OSCAR_INVALID_ARGUMENT, "UTF-8"},
      {&qwen, qwen_tokens, &broken, NULL, OSCAR_INVALID_ARGUMENT, "arguments of \"f\""},
      {&qwen, qwen_tokens, &list, NULL, OSCAR_INVALID_ARGUMENT, "not a JSON object"},
      {&qwen, qwen_tokens, &nameless, NULL, OSCAR_INVALID_ARGUMENT, "names no tool"},
      {&qwen, qwen_tokens, &called, NULL, OSCAR_INVALID_ARGUMENT, "only an assistant"},
      {&llama, llama_tokens, &two, NULL, OSCAR_INVALID_ARGUMENT, "one call a message"},
      {&llama, llama_tokens, &system, &good, OSCAR_INVALID_ARGUMENT, "first user message"},
      {&qwen, qwen_tokens, &empty, &good, OSCAR_OK, ""},
  };
  for (size_t i = 0; i < ARRAY_LENGTH(wrong); i++) {
    int32_t *ids = NULL;
    int count;
    assert_int_equal(chat_template_encode(wrong[i].chat, c, wrong[i].tokenizer, wrong[i].message, 1, wrong[i].tool,
                                          wrong[i].tool != NULL, true, &ids, &count),
                     wrong[i].status);
    if (!strstr(oscar_last_error(c), wrong[i].word)) fail_msg("no \"%s\" in: %s", wrong[i].word, oscar_last_error(c));
    mem_free(c, ids);
  }
  tokenizer_free(qwen_tokens);
  tokenizer_free(llama_tokens);
  oscar_context_free(c);
}

static void unknown_templates_are_refused_with_the_choices(void **state) {
  (void)state;
  static const char llama2[] = "{{ bos_token + '[INST] <<SYS>>' + system + '<</SYS>> ' + content + ' [/INST]' }}";
  char longer[1200] = "<|im_start|>system\n";
  memset(longer + strlen(longer), 'a', 600);
  strcat(longer, "<|im_end|>");
  const struct {
    const char *template, *tokens, *name;
    oscar_status status;
    const char *word;
  } cases[] = {
      {NULL, "smollm", NULL, OSCAR_UNSUPPORTED, "--chat-template chatml, llama3, gemma or mistral"},
      {"### User: {{ text }}", "smollm", "auto", OSCAR_UNSUPPORTED, "not one that is known"},
      {"<start_of_turn>user", "smollm", NULL, OSCAR_UNSUPPORTED, "--chat-template"}, /* the vocabulary has no such token */
      {llama2, "spm", NULL, OSCAR_UNSUPPORTED, "--chat-template"},
      {NULL, "smollm", "alpaca", OSCAR_INVALID_ARGUMENT, "\"alpaca\""},
      {NULL, "smollm", "llama3", OSCAR_UNSUPPORTED, "<|start_header_id|>"},
      {longer, "smollm", NULL, OSCAR_UNSUPPORTED, "600 bytes"},
  };
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 1);
  for (size_t i = 0; i < ARRAY_LENGTH(cases); i++) {
    struct gguf_writer w = {0};
    struct chat_template chat;
    struct gguf *file = template_file(c, &w, cases[i].template, cases[i].tokens);
    assert_int_equal(chat_template_choose(c, file, cases[i].name, &chat), cases[i].status);
    if (!strstr(oscar_last_error(c), cases[i].word)) fail_msg("no \"%s\" in: %s", cases[i].word, oscar_last_error(c));
    gguf_close(file);
    writer_free(&w);
  }
  assert_string_equal(chat_family_name((enum chat_family)99), "unknown");
  oscar_context_free(c);
}

static void a_second_template_may_define_the_tools(void **state) {
  (void)state;
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 1);
  struct gguf_writer w = {0};
  struct gguf *file;
  struct chat_template chat;
  put_head(&w, 3, 0, 3);
  put_string(&w, "tokenizer.chat_template", "<|im_start|>");
  put_string(&w, "tokenizer.chat_template.tool_use", styles[1].template);
  put_array(&w, "tokenizer.ggml.tokens", GGUF_STRING, 2);
  put_text(&w, "<|im_start|>");
  put_text(&w, "<|im_end|>");
  put_padding(&w, 32);
  assert_ok(c, gguf_parse(c, "made.gguf", w.data, w.bytes, &file));
  assert_ok(c, chat_template_choose(c, file, NULL, &chat));
  assert_int_equal(chat.tools, CHAT_TOOLS_HERMES);
  gguf_close(file);
  writer_free(&w);
  oscar_context_free(c);
}

static void any_template_text_is_read_without_harm(void **state) {
  (void)state;
  static const char *const parts[] = {"<|im_start|>system",
                                      "\\n",
                                      "\n",
                                      "'",
                                      "\"",
                                      "<|im_end|>",
                                      "\\",
                                      "[INST]",
                                      " [/INST] ",
                                      "{{",
                                      "}}",
                                      " + eos_token",
                                      "aaa",
                                      "Cutting Knowledge Date: ",
                                      "set date_string = \"",
                                      "\\\\n",
                                      "loop.last and system_message",
                                      "'[AVAILABLE_TOOLS] ['",
                                      "[TOOL_CALLS]",
                                      "'[TOOL_RESULTS] {\"content\": '"};
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 1);
  static const char *const tokens[] = {"smollm", "llama-bpe", "spm"};
  static const char *const names[] = {"chatml", "llama3", "mistral"};
  uint64_t seed = 7;
  for (int i = 0; i < 20000; i++) {
    char template[512] = "";
    if (i % 3 == 1) strcpy(template, "<|start_header_id|>");
    for (uint64_t n = test_random(&seed) % 12; n > 0; n--) strcat(template, parts[test_random(&seed) % ARRAY_LENGTH(parts)]);
    struct gguf_writer w = {0};
    struct chat_template chat;
    struct gguf *file = template_file(c, &w, template, tokens[i % 3]);
    assert_ok(c, chat_template_choose(c, file, names[i % 3], &chat));
    gguf_close(file);
    writer_free(&w);
  }
  oscar_context_free(c);
}

static void any_allocation_may_fail(void **state) {
  (void)state;
  static const struct chat_message messages[] = {{.role = "system", .content = "Be brief."},
                                                 {.role = "user", .content = "a\n\nb 2024"},
                                                 {.role = "assistant", .content = " c "},
                                                 {.role = "user", .content = "d"}};
  struct scarce memory = {.left = 1000};
  oscar_context *c = scarce_context(&memory);
  struct tokenizer *t = test_tokenizer(c, "spm-gemma");
  struct chat_template chat = choose(c, NULL, "spm-gemma", "gemma");
  int live = memory.live, allowed = 0, count;
  oscar_status status = OSCAR_NO_MEMORY;
  for (; status != OSCAR_OK && allowed < 500; allowed++) {
    int32_t *ids = NULL;
    memory.left = allowed;
    status = chat_template_encode(&chat, c, t, messages, 4, NULL, 0, true, &ids, &count);
    assert_true(status == OSCAR_OK || status == OSCAR_NO_MEMORY);
    if (!status) mem_free(c, ids);
    assert_int_equal(memory.live, live);
  }
  assert_true(allowed > 5 && allowed < 500);
  memory.left = 1000;
  tokenizer_free(t);
  oscar_context_free(c);
  assert_int_equal(memory.live, 0);
}

static void any_allocation_for_tools_may_fail(void **state) {
  (void)state;
  static const struct chat_tool tools[] = {
      {.name = "f", .description = "d", .parameters = "{\"properties\": {\"a\": {\"type\": [\"string\"]}}}"}, {.name = "g"}};
  static const struct chat_tool_call call = {.id = "123456789", .name = "f", .arguments = "{\"a\": \"b\"}"};
  static const struct chat_message messages[] = {{.role = "user", .content = "a"},
                                                 {.role = "assistant", .calls = &call, .n_calls = 1},
                                                 {.role = "tool", .content = "c", .tool_call_id = "123456789"}};
  for (size_t i = 0; i < ARRAY_LENGTH(styles); i++) {
    struct scarce memory = {.left = 1000};
    oscar_context *c = scarce_context(&memory);
    struct tokenizer *t = test_tokenizer(c, styles[i].vocabulary);
    struct chat_template chat = choose(c, styles[i].template, styles[i].vocabulary, NULL);
    int live = memory.live, allowed = 0, count;
    oscar_status status = OSCAR_NO_MEMORY;
    for (; status != OSCAR_OK && allowed < 500; allowed++) {
      int32_t *ids = NULL;
      memory.left = allowed;
      status = chat_template_encode(&chat, c, t, messages, 3, tools, 2, true, &ids, &count);
      assert_true(status == OSCAR_OK || status == OSCAR_NO_MEMORY);
      if (!status) mem_free(c, ids);
      assert_int_equal(memory.live, live);
    }
    assert_true(allowed > 5 && allowed < 500);
    status = OSCAR_NO_MEMORY;
    for (allowed = 0; status != OSCAR_OK && allowed < 100; allowed++) {
      struct chat_tool_forms *forms;
      memory.left = allowed;
      status = chat_tool_forms_create(&chat, c, tools, 2, NULL, &forms);
      assert_true(status == OSCAR_OK || status == OSCAR_NO_MEMORY);
      if (!status) chat_tool_forms_free(c, forms);
      assert_int_equal(memory.live, live);
    }
    assert_true(allowed > 4 && allowed < 100);
    memory.left = 1000;
    tokenizer_free(t);
    oscar_context_free(c);
    assert_int_equal(memory.live, 0);
  }
}

/* jansson has an allocator of its own, and where its lexer gets nothing it reports bad syntax. */
static long json_left, json_live;
static void *json_scarce_alloc(size_t bytes) {
  if (json_left-- <= 0) return NULL;
  json_live++;
  return malloc(bytes);
}
static void json_scarce_free(void *block) {
  json_live -= block != NULL;
  free(block);
}

static void memory_for_json_may_run_out(void **state) {
  (void)state;
  static const struct chat_tool tool = {
      .name = "f", .description = "d", .parameters = "{\"properties\": {\"a\": {\"type\": [\"string\", \"integer\"]}}}"};
  static const struct chat_message user = {.role = "user", .content = "a"};
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 1);
  for (size_t i = 0; i < ARRAY_LENGTH(styles); i++) {
    struct tokenizer *t = test_tokenizer(c, styles[i].vocabulary);
    struct chat_template chat = choose(c, styles[i].template, styles[i].vocabulary, NULL);
    json_set_alloc_funcs(json_scarce_alloc, json_scarce_free);
    oscar_status status = OSCAR_NO_MEMORY;
    long allowed = 0;
    for (; status != OSCAR_OK && allowed < 200; allowed++) {
      int32_t *ids = NULL;
      int count;
      json_left = allowed;
      status = chat_template_encode(&chat, c, t, &user, 1, &tool, 1, true, &ids, &count);
      assert_true(status == OSCAR_OK || status == OSCAR_NO_MEMORY || status == OSCAR_INVALID_ARGUMENT);
      mem_free(c, ids);
      assert_int_equal(json_live, 0);
    }
    json_set_alloc_funcs(malloc, free);
    assert_true(allowed > 5 && allowed < 200);
    tokenizer_free(t);
  }
  oscar_context_free(c);
}

int main(int argc, char **argv) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(conversations_are_written_as_the_models_templates_write_them),
      cmocka_unit_test(tools_are_written_as_the_models_templates_write_them),
      cmocka_unit_test(the_default_models_own_file_is_recognised),
      cmocka_unit_test(messages_never_become_control_tokens),
      cmocka_unit_test(tools_never_become_control_tokens),
      cmocka_unit_test(forms_of_calls_are_what_replies_are_searched_for),
      cmocka_unit_test(marks_that_are_control_tokens_are_visible),
      cmocka_unit_test(wrong_conversations_are_refused_with_the_reason),
      cmocka_unit_test(wrong_tools_are_refused_with_the_reason),
      cmocka_unit_test(a_second_template_may_define_the_tools),
      cmocka_unit_test(unknown_templates_are_refused_with_the_choices),
      cmocka_unit_test(any_template_text_is_read_without_harm),
      cmocka_unit_test(any_allocation_may_fail),
      cmocka_unit_test(any_allocation_for_tools_may_fail),
      cmocka_unit_test(memory_for_json_may_run_out),
  };
  const struct CMUnitTest larger[] = {cmocka_unit_test(the_larger_models_own_files_are_recognised)};
  if (test_larger(argc, argv)) return cmocka_run_group_tests(larger, NULL, NULL);
  return cmocka_run_group_tests(tests, NULL, NULL);
}
