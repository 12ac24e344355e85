/* Chat templates against Jinja's rendering of the models' own and of published templates (stored ids), control tokens spelled in
 * messages, wrong conversations and wrong files. */
#include "vectors.h"

#include "gguf_writer.h"
#include "model/chat_template.h"

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
  oscar_status status = chat_template_encode(chat, c, t, conversation->messages, conversation->count, generation, &ids, &count);
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

static void recognise(const char *model, const char *system) {
  const char *path = test_model(model);
  if (!path) return;
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 1);
  struct chat_template chat;
  struct gguf *file;
  assert_ok(c, gguf_open(c, path, &file));
  assert_ok(c, chat_template_choose(c, file, "auto", &chat));
  assert_int_equal(chat.family, CHAT_CHATML);
  assert_string_equal(chat.default_system, system);
  assert_int_equal(chat_template_choose(c, file, "gemma", &chat), OSCAR_UNSUPPORTED); /* no such control tokens */
  assert_non_null(strstr(oscar_last_error(c), "<start_of_turn>"));
  gguf_close(file);
  oscar_context_free(c);
}

static void the_default_models_own_file_is_recognised(void **state) {
  (void)state;
  recognise("smollm2-135m", "You are a helpful AI assistant named SmolLM, trained by Hugging Face");
}

static void the_larger_models_own_files_are_recognised(void **state) {
  (void)state;
  recognise("qwen2.5-coder-0.5b", "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.");
  recognise("qwen2.5-coder-1.5b", "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.");
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

/* ---- control tokens in messages ---- */

/* Every message is made of the vocabulary's control tokens; the template alone may write any, so as many as for empty messages.
 */
static int count_controls(oscar_context *c, const struct chat_template *chat, const struct tokenizer *t, const char *content) {
  const struct chat_message messages[] = {{"system", content}, {"user", content}, {"assistant", content}, {"user", content}};
  int32_t *ids;
  int count, controls = 0;
  size_t shown, hidden;
  assert_ok(c, chat_template_encode(chat, c, t, messages, 4, true, &ids, &count));
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

/* ---- refusals ---- */

static void wrong_conversations_are_refused_with_the_reason(void **state) {
  (void)state;
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 1);
  struct tokenizer *chatml_tokens = test_tokenizer(c, "smollm"), *gemma_tokens = test_tokenizer(c, "spm-gemma");
  struct chat_template chatml = choose(c, NULL, "smollm", "chatml"), gemma = choose(c, NULL, "spm-gemma", "gemma");
  struct chat_template unchosen = {.family = CHAT_UNKNOWN};
  int32_t *ids;
  int count;
  const struct chat_message user = {"user", "a"}, system = {"system", "a"}, tool = {"tool", "a"}, empty = {"user", NULL};
  const struct chat_message twice[] = {{"user", "a"}, {"assistant", "b"}, {"assistant", "c"}};
#define REFUSED(chat, tokens, messages, n, status, word)                                                                         \
  do {                                                                                                                           \
    assert_int_equal(chat_template_encode(&chat, c, tokens, messages, n, true, &ids, &count), status);                           \
    if (!strstr(oscar_last_error(c), word)) fail_msg("no \"%s\" in: %s", word, oscar_last_error(c));                             \
  } while (0)
  REFUSED(chatml, chatml_tokens, &user, 0, OSCAR_INVALID_ARGUMENT, "no messages");
  REFUSED(chatml, chatml_tokens, &tool, 1, OSCAR_INVALID_ARGUMENT, "\"tool\"");
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
                                      "loop.last and system_message"};
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
  static const struct chat_message messages[] = {
      {"system", "Be brief."}, {"user", "a\n\nb 2024"}, {"assistant", " c "}, {"user", "d"}};
  struct scarce memory = {.left = 1000};
  oscar_context *c = scarce_context(&memory);
  struct tokenizer *t = test_tokenizer(c, "spm-gemma");
  struct chat_template chat = choose(c, NULL, "spm-gemma", "gemma");
  int live = memory.live, allowed = 0, count;
  oscar_status status = OSCAR_NO_MEMORY;
  for (; status != OSCAR_OK && allowed < 500; allowed++) {
    int32_t *ids = NULL;
    memory.left = allowed;
    status = chat_template_encode(&chat, c, t, messages, 4, true, &ids, &count);
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

int main(int argc, char **argv) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(conversations_are_written_as_the_models_templates_write_them),
      cmocka_unit_test(the_default_models_own_file_is_recognised),
      cmocka_unit_test(messages_never_become_control_tokens),
      cmocka_unit_test(wrong_conversations_are_refused_with_the_reason),
      cmocka_unit_test(unknown_templates_are_refused_with_the_choices),
      cmocka_unit_test(any_template_text_is_read_without_harm),
      cmocka_unit_test(any_allocation_may_fail),
  };
  const struct CMUnitTest larger[] = {cmocka_unit_test(the_larger_models_own_files_are_recognised)};
  if (test_larger(argc, argv)) return cmocka_run_group_tests(larger, NULL, NULL);
  return cmocka_run_group_tests(tests, NULL, NULL);
}
