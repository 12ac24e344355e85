/* Answers taken apart: published forms of calls and of reasoning, malformed ones, every way to cut an answer, random bytes. */
#include "failing_alloc.h"

#include "model/reply.h"

enum { LOG_ROOM = 1 << 16 };

/* What a sink saw, written down: kinds in runs, and the text itself. */
struct log {
  char shown[LOG_ROOM], text[LOG_ROOM];
  size_t shown_bytes, text_bytes;
  enum reply_kind last;
  bool open;
  int stop_after; /* deltas until the sink refuses; negative: never */
};

static void put(struct log *log, const char *text, size_t bytes) {
  assert_true(log->shown_bytes + bytes < LOG_ROOM);
  memcpy(log->shown + log->shown_bytes, text, bytes);
  log->shown_bytes += bytes;
  log->shown[log->shown_bytes] = '\0';
}

static oscar_status note(void *user, const struct reply_delta *delta) {
  static const char *const names[] = {
      [REPLY_CONTENT] = "C(", [REPLY_REASONING] = "R(", [REPLY_CALL] = "F(", [REPLY_MARKUP] = "M("};
  struct log *log = user;
  if (log->stop_after == 0) return OSCAR_CANCELLED;
  log->stop_after--;
  assert_true(log->text_bytes + delta->bytes < LOG_ROOM);
  memcpy(log->text + log->text_bytes, delta->text, delta->bytes);
  log->text_bytes += delta->bytes;
  if (delta->kind == REPLY_CALL) {
    char line[1024];
    int bytes = snprintf(line, sizeof line, "%sF(%s %s%s%s)", log->open ? ")" : "", delta->name, delta->arguments,
                         delta->id ? " " : "", delta->id ? delta->id : "");
    put(log, line, (size_t)bytes < sizeof line ? (size_t)bytes : sizeof line - 1);
    log->open = false;
    return OSCAR_OK;
  }
  assert_true(delta->bytes > 0);
  assert_null(delta->name);
  if (!log->open || log->last != delta->kind) {
    if (log->open) put(log, ")", 1);
    put(log, names[delta->kind], 2);
  }
  log->open = true;
  log->last = delta->kind;
  put(log, delta->text, delta->bytes);
  return OSCAR_OK;
}

/* In pieces of `step` bytes (0: cut once, at `cut`). */
static void parse(oscar_context *c, const struct chat_template *chat, const char *text, size_t bytes, size_t step, size_t cut,
                  struct log *log) {
  struct reply_parser *parser;
  log->shown_bytes = log->text_bytes = 0;
  log->shown[0] = '\0';
  log->open = false;
  log->stop_after = -1;
  assert_ok(c, reply_parser_create(chat, c, true, &parser));
  for (size_t at = 0; at < bytes;) {
    size_t piece = step ? step : at == 0 && cut > 0 ? cut : bytes - at;
    if (piece > bytes - at) piece = bytes - at;
    assert_ok(c, reply_feed(parser, text + at, piece, note, log));
    at += piece;
  }
  assert_ok(c, reply_end(parser, note, log));
  if (log->open) put(log, ")", 1);
  reply_parser_free(parser);
  assert_int_equal(log->text_bytes, bytes);
  assert_memory_equal(log->text, text, bytes);
}

static const struct chat_template qwen = {.family = CHAT_CHATML, .tools = CHAT_TOOLS_QWEN},
                                  thinking = {.family = CHAT_CHATML, .tools = CHAT_TOOLS_QWEN, .thinks = true},
                                  opened = {.family = CHAT_CHATML,
                                            .tools = CHAT_TOOLS_QWEN,
                                            .thinks = true,
                                            .opens_thinking = true},
                                  llama = {.family = CHAT_LLAMA3, .tools = CHAT_TOOLS_LLAMA3},
                                  mistral = {.family = CHAT_MISTRAL, .tools = CHAT_TOOLS_MISTRAL}, gemma = {.family = CHAT_GEMMA};

static const struct {
  const struct chat_template *chat;
  const char *text, *expected;
} cases[] = {
    {&qwen, "", ""},
    {&qwen, "Hello\n", "C(Hello\n)"},
    {&qwen, " \n a < b <tool>", "C( \n a < b <tool>)"},
    {&qwen, "<tool_call>\n{\"name\": \"f\", \"arguments\": {\"a\":[1,0.1]}}\n</tool_call>",
     "F(f {\"a\": [1, 0.1]})M(\n</tool_call>)"},
    {&qwen,
     "I look.\n<tool_call>\n{\"name\": \"f\", \"arguments\": {}}\n</tool_call>\n<tool_call>\n{\"name\": \"g\", \"arguments\": "
     "{\"s\": \"}</tool_call>\\\"{\"}}\n</tool_call>\n",
     "C(I look.)F(f {})M(\n</tool_call>)F(g {\"s\": \"}</tool_call>\\\"{\"})M(\n</tool_call>\n)"},
    {&qwen, "a\n\n<tool_call>{\"name\":\"f\",\"arguments\":{}}</tool_call> b", "C(a\n)F(f {})M(</tool_call>)C( b)"},
    {&qwen, "<tool_call>\n{\"name\": \"f\", \"parameters\": {\"x\": null}}", "F(f {\"x\": null})"}, /* no closing mark */
    {&qwen, "a\n<tool_call>\n{\"name\": \"f\", \"arguments\": {\"x\"",
     "C(a\n<tool_call>\n{\"name\": \"f\", \"arguments\": {\"x\")"},
    {&qwen, "<tool_call>\nf(1)\n</tool_call>", "C(<tool_call>\nf(1)\n</tool_call>)"},
    {&qwen, "<tool_call>{\"name\": 1, \"arguments\": {}}</tool_call>",
     "C(<tool_call>{\"name\": 1, \"arguments\": {}}</tool_call>)"},
    {&qwen, "<tool_call>{\"name\": \"f\", \"arguments\": 3}", "C(<tool_call>{\"name\": \"f\", \"arguments\": 3})"},
    {&qwen, "<tool_call>{]<tool_call>{\"name\":\"f\",\"arguments\":{}}", "C(<tool_call>{])F(f {})"},
    {&qwen, "x<tool_call><tool_call>{\"name\":\"f\",\"arguments\":{}}", "C(x<tool_call>)F(f {})"},
    {&qwen, "<tool_call>{'name': 'f'}", "C(<tool_call>{'name': 'f'})"},
    {&qwen, "<tool_cal", "C(<tool_cal)"},
    {&qwen, "<think>a</think>b", "C(<think>a</think>b)"},
    {&thinking, "<think>\nHm.\n\nYes <b>.\n</think>\n\nHello", "M(<think>\n)R(Hm.\n\nYes <b>.)M(\n</think>\n\n)C(Hello)"},
    {&thinking, "\n<think>\n\n</think>\n\n<tool_call>\n{\"name\":\"f\",\"arguments\":{}}", "M(\n<think>\n\n</think>\n\n)F(f {})"},
    {&thinking, "<think>never\n\n\n</thi", "M(<think>)R(never\n\n\n</thi)"},
    {&thinking, "no <think>x</think>", "C(no <think>x</think>)"},
    {&thinking, "<think>a</think><think>b</think>", "M(<think>)R(a)M(</think>)C(<think>b</think>)"},
    {&opened, "\nHm <tool_call>\n</think>\n\nHi", "M(\n)R(Hm <tool_call>)M(\n</think>\n\n)C(Hi)"},
    {&llama, "{\"name\": \"f\", \"parameters\": {\"q\": \"x\"}}", "F(f {\"q\": \"x\"})"},
    {&llama, "<|python_tag|>{\"name\": \"f\", \"parameters\": {}}; {\"name\": \"g\", \"parameters\": {}}", "F(f {})M(;)F(g {})"},
    {&llama, "<|python_tag|>print(1)", "C(<|python_tag|>print(1))"},
    {&llama, "{\"city\": \"Paris\"} is JSON", "C({\"city\": \"Paris\"} is JSON)"},
    {&llama, "So: {\"name\": \"f\", \"parameters\": {}}", "C(So: {\"name\": \"f\", \"parameters\": {}})"},
    {&llama, "{\"name\": \"f\", \"parameters\": {}", "C({\"name\": \"f\", \"parameters\": {})"},
    {&mistral,
     "[TOOL_CALLS] [{\"name\": \"f\", \"arguments\": {\"a\": 1}, \"id\": \"abcdefghi\"}, {\"name\": \"g\", \"arguments\": {}}]",
     "F(f {\"a\": 1} abcdefghi)F(g {})"},
    {&mistral, "[TOOL_CALLS][]", "C([TOOL_CALLS][])"},
    {&mistral, "[TOOL_CALLS][{\"name\": \"f\", \"arguments\": {}}, 1]",
     "C([TOOL_CALLS][{\"name\": \"f\", \"arguments\": {}}, 1])"},
    {&mistral, "[TOOL] is [TOOL_CALLS", "C([TOOL] is [TOOL_CALLS)"},
    {&gemma, "<tool_call>{\"name\":\"f\",\"arguments\":{}}", "C(<tool_call>{\"name\":\"f\",\"arguments\":{}})"},
};

static void answers_are_taken_apart_wherever_they_are_cut(void **state) {
  (void)state;
  static struct log log;
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 1);
  for (size_t i = 0; i < ARRAY_LENGTH(cases); i++) {
    size_t bytes = strlen(cases[i].text);
    for (size_t cut = 0; cut <= bytes; cut++) {
      parse(c, cases[i].chat, cases[i].text, bytes, 0, cut, &log);
      assert_string_equal(log.shown, cases[i].expected);
    }
    for (size_t step = 1; step < 6; step++) {
      parse(c, cases[i].chat, cases[i].text, bytes, step, 0, &log);
      assert_string_equal(log.shown, cases[i].expected);
    }
  }
  oscar_context_free(c);
}

/* Content is given as soon as it cannot become a mark. */
static void content_does_not_wait(void **state) {
  (void)state;
  static struct log log;
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 1);
  struct reply_parser *parser;
  static const char *const pieces[] = {"Hel", "lo <", "b", "\n", "x"}, *const after[] = {"C(Hel", "C(Hello ", "C(Hello <b",
                                                                                         "C(Hello <b", "C(Hello <b\nx"};
  log = (struct log){.stop_after = -1};
  assert_ok(c, reply_parser_create(&qwen, c, true, &parser));
  for (size_t i = 0; i < ARRAY_LENGTH(pieces); i++) {
    assert_ok(c, reply_feed(parser, pieces[i], strlen(pieces[i]), note, &log));
    assert_string_equal(log.shown, after[i]);
  }
  log.stop_after = 0; /* what a sink says is passed on */
  assert_int_equal(reply_feed(parser, "y", 1, note, &log), OSCAR_CANCELLED);
  reply_parser_free(parser);
  assert_ok(c, reply_parser_create(&qwen, c, false, &parser)); /* no tools were offered */
  log = (struct log){.stop_after = -1};
  assert_ok(c, reply_feed(parser, "<tool_call>", 11, note, &log));
  assert_string_equal(log.shown, "C(<tool_call>");
  reply_parser_free(parser);
  reply_parser_free(NULL);
  oscar_context_free(c);
}

static void random_answers_are_the_same_in_any_pieces(void **state) {
  (void)state;
  static const char *const parts[] = {"<tool_call>",
                                      "</tool_call>",
                                      "<think>",
                                      "</think>",
                                      "\n",
                                      "\n\n",
                                      " ",
                                      "{",
                                      "}",
                                      "[",
                                      "]",
                                      "\"",
                                      "\\",
                                      "{\"name\":\"f\",\"arguments\":{}}",
                                      ",",
                                      "\"name\": \"g\"",
                                      "\"arguments\": {\"a\": 1}",
                                      "<|python_tag|>",
                                      "[TOOL_CALLS]",
                                      ";",
                                      "text",
                                      "<",
                                      "[TOOL",
                                      "\xff",
                                      "é",
                                      "                                                                "};
  static const struct chat_template *const chats[] = {&qwen, &thinking, &opened, &llama, &mistral, &gemma};
  static struct log whole, pieces;
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 1);
  uint64_t seed = 11;
  for (int round = 0; round < 20000; round++) {
    char text[1024] = "";
    for (uint64_t n = test_random(&seed) % 14; n > 0; n--) strcat(text, parts[test_random(&seed) % ARRAY_LENGTH(parts)]);
    const struct chat_template *chat = chats[test_random(&seed) % ARRAY_LENGTH(chats)];
    size_t bytes = strlen(text);
    parse(c, chat, text, bytes, 0, 0, &whole);
    parse(c, chat, text, bytes, 1 + test_random(&seed) % 7, 0, &pieces);
    assert_string_equal(pieces.shown, whole.shown);
  }
  oscar_context_free(c);
}

static oscar_status parse_scarce(oscar_context *c, struct log *log) {
  static const char text[] = "<think>a</think>b\n<tool_call>\n{\"name\": \"f\", \"arguments\": {\"a\": \"bcd\"}}\n</tool_call>";
  struct reply_parser *parser;
  *log = (struct log){.stop_after = -1};
  oscar_status status = reply_parser_create(&thinking, c, true, &parser);
  for (size_t at = 0; at < sizeof text - 1 && !status; at++) status = reply_feed(parser, text + at, 1, note, log);
  if (!status) status = reply_end(parser, note, log);
  reply_parser_free(parser);
  return status;
}

static void memory_may_run_out(void **state) {
  (void)state;
  static struct log log;
  struct failing_alloc memory;
  oscar_context *c = failing_context(&memory);
  sweep_allocations(c, &memory, parse_scarce(c, &log));
  assert_non_null(strstr(log.shown, "F(f {\"a\": \"bcd\"})"));
  failing_context_free(c, &memory);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(answers_are_taken_apart_wherever_they_are_cut),
      cmocka_unit_test(content_does_not_wait),
      cmocka_unit_test(random_answers_are_the_same_in_any_pieces),
      cmocka_unit_test(memory_may_run_out),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
