/* Every endpoint, with and without streaming, against what the protocols say of the answers. */
#include "client.h"

static struct fixture shared;

static int start(void **state) {
  (void)state;
  fixture_options(&shared);
  fixture_start(&shared);
  return 0;
}
static int stop(void **state) {
  (void)state;
  fixture_stop(&shared);
  unlink(fixture_model());
  return 0;
}

#define CHAT       "/v1/chat/completions"
#define SAYS(text) "\"messages\":[{\"role\":\"user\",\"content\":\"" text "\"}]"
#define TOOLS      "\"tools\":[{\"type\":\"function\",\"function\":{\"name\":\"look\",\"parameters\":{\"type\":\"object\"}}}]"

/* ---- chat ---- */

static void chat_answers(void **state) {
  (void)state;
  json_t *a = ask_json(&shared, "POST", CHAT, "{\"model\":\"fake\"," SAYS("Hello w\xC3\xB6rld") "}", 200);
  assert_text_at(a, "object", "chat.completion");
  assert_text_at(a, "choices.0.message.role", "assistant");
  assert_text_at(a, "choices.0.message.content", "Hello w\xC3\xB6rld");
  assert_text_at(a, "choices.0.finish_reason", "stop");
  assert_number_at(a, "usage.total_tokens",
                   json_integer_value(at(a, "usage.prompt_tokens")) + json_integer_value(at(a, "usage.completion_tokens")));
  assert_number_at(a, "usage.prompt_tokens_details.cached_tokens", 0);
  json_decref(a);
}

/* The texts of a stream's choice joined are the answer of one that does not stream. */
static void chat_streams(void **state) {
  (void)state;
  json_t *events = ask_events(&shared, CHAT,
                              "{" SAYS("Hello, how are you today?") ",\"stream\":true,\"n\":2,"
                                                                    "\"stream_options\":{\"include_usage\":true}}"),
         *event;
  char text[2][256] = {"", ""};
  const char *finish[2] = {"", ""};
  size_t i, n = json_array_size(events);
  assert_text_at(events, "0.choices.0.delta.role", "assistant");
  json_array_foreach(events, i, event) {
    if (i + 2 >= n) break;
    assert_text_at(event, "object", "chat.completion.chunk");
    assert_true(json_is_null(at(event, "usage")));
    json_int_t choice = json_integer_value(at(event, "choices.0.index"));
    assert_true(choice == 0 || choice == 1);
    if (json_is_string(at(event, "choices.0.delta.content"))) strcat(text[choice], text_at(event, "choices.0.delta.content"));
    if (json_is_string(at(event, "choices.0.finish_reason"))) finish[choice] = text_at(event, "choices.0.finish_reason");
  }
  for (int c = 0; c < 2; c++) {
    assert_string_equal(text[c], "Hello, how are you today?");
    assert_string_equal(finish[c], "stop");
  }
  json_t *usage = json_array_get(events, n - 2);
  assert_int_equal(json_array_size(at(usage, "choices")), 0);
  assert_number_at(usage, "usage.completion_tokens", 10);
  assert_string_equal(json_string_value(json_array_get(events, n - 1)), "[DONE]");
  json_decref(events);
}

static void chat_ends(void **state) {
  (void)state;
  json_t *a = ask_json(&shared, "POST", CHAT, "{" SAYS("one two three STOP four") ",\"stop\":[\"STOP\"]}", 200);
  assert_text_at(a, "choices.0.message.content", "one two three ");
  assert_text_at(a, "choices.0.finish_reason", "stop");
  json_decref(a);
  a = ask_json(&shared, "POST", CHAT, "{" SAYS("one two three four five") ",\"max_completion_tokens\":2}", 200);
  assert_text_at(a, "choices.0.message.content", "one two th");
  assert_text_at(a, "choices.0.finish_reason", "length");
  json_decref(a);
}

static void chat_calls_tools(void **state) {
  (void)state;
  json_t *a = ask_json(&shared, "POST", CHAT, "{" SAYS("!call look {\\\"a\\\":[1,2]}") "," TOOLS "}", 200);
  assert_text_at(a, "choices.0.message.content", "I look.");
  assert_text_at(a, "choices.0.message.tool_calls.0.type", "function");
  assert_text_at(a, "choices.0.message.tool_calls.0.function.name", "look");
  assert_text_at(a, "choices.0.message.tool_calls.0.function.arguments", "{\"a\": [1, 2]}");
  assert_true(strncmp(text_at(a, "choices.0.message.tool_calls.0.id"), "call_", 5) == 0);
  assert_text_at(a, "choices.0.finish_reason", "tool_calls");
  json_decref(a);
  /* not offered: text */
  a = ask_json(&shared, "POST", CHAT, "{" SAYS("!call look {}") "," TOOLS ",\"tool_choice\":\"none\"}", 200);
  assert_null(at(a, "choices.0.message.tool_calls"));
  assert_text_at(a, "choices.0.finish_reason", "stop");
  json_decref(a);
  /* must: the grammar's only sentence is a call */
  a = ask_json(&shared, "POST", CHAT,
               "{" SAYS("hi") "," TOOLS ",\"tool_choice\":{\"type\":\"function\",\"function\":{\"name\":\"look\"}}}", 200);
  assert_text_at(a, "choices.0.message.tool_calls.0.function.name", "look");
  assert_true(json_is_null(at(a, "choices.0.message.content")));
  json_decref(a);
  json_t *events = ask_events(&shared, CHAT, "{" SAYS("!call look {}") "," TOOLS ",\"stream\":true}"), *event;
  size_t i;
  int calls = 0;
  json_array_foreach(events, i, event) {
    json_t *call = at(event, "choices.0.delta.tool_calls.0");
    if (!call) continue;
    calls++;
    assert_number_at(call, "index", 0);
    assert_text_at(call, "function.name", "look");
    assert_text_at(call, "function.arguments", "{}");
  }
  assert_int_equal(calls, 1);
  json_decref(events);
  a = ask_json(
      &shared, "POST", CHAT,
      "{\"messages\":[{\"role\":\"user\",\"content\":\"first\"},{\"role\":\"assistant\",\"content\":null,\"tool_calls\":[{\"id\":"
      "\"c1\","
      "\"type\":\"function\",\"function\":{\"name\":\"look\",\"arguments\":\"{}\"}}]},{\"role\":\"tool\",\"tool_call_id\":\"c1\","
      "\"content\":\"seen\"}]," TOOLS "}",
      200);
  assert_text_at(a, "choices.0.message.content", "<tool_response>\nseen\n</tool_response>"); /* Qwen's form of a result */
  json_decref(a);
}

static void chat_thinks(void **state) {
  (void)state;
  json_t *a = ask_json(&shared, "POST", CHAT, "{" SAYS("!think hm|yes") "}", 200);
  assert_text_at(a, "choices.0.message.content", "yes");
  assert_true(strstr(text_at(a, "choices.0.message.reasoning_content"), "hm") != NULL);
  json_decref(a);
}

static void chat_keeps_to_forms(void **state) {
  (void)state;
  json_t *a = ask_json(&shared, "POST", CHAT, "{" SAYS("hi") ",\"response_format\":{\"type\":\"json_object\"}}", 200);
  assert_text_at(a, "choices.0.message.content", "{\"json\":true}");
  json_decref(a);
  a = ask_json(&shared, "POST", CHAT,
               "{" SAYS("hi") ",\"response_format\":{\"type\":\"json_schema\",\"json_schema\":{\"name\":\"x\",\"schema\":{"
                              "\"type\":\"object\"}}}}",
               200);
  assert_text_at(a, "choices.0.message.content", "{\"schema\":{\"type\":\"object\"}}");
  json_decref(a);
  a = ask_json(&shared, "POST", CHAT, "{" SAYS("hi") ",\"grammar\":\"root ::= \\\"yes\\\"\"}", 200);
  assert_text_at(a, "choices.0.message.content", "yes");
  json_decref(a);
}

static void chat_tells_likelihoods(void **state) {
  (void)state;
  json_t *a = ask_json(&shared, "POST", CHAT, "{" SAYS("hi there") ",\"logprobs\":true,\"top_logprobs\":2}", 200);
  assert_int_equal(json_array_size(at(a, "choices.0.logprobs.content")), 2);
  assert_text_at(a, "choices.0.logprobs.content.0.token", "hi th");
  assert_number_at(a, "choices.0.logprobs.content.0.logprob", -0.5);
  assert_number_at(a, "choices.0.logprobs.content.0.bytes.0", 'h');
  assert_int_equal(json_array_size(at(a, "choices.0.logprobs.content.0.top_logprobs")), 2);
  json_decref(a);
  /* a token that is no whole character has its bytes, and a text that is valid */
  a = ask_json(&shared, "POST", CHAT, "{" SAYS("!broken") ",\"logprobs\":true}", 200);
  assert_number_at(a, "choices.0.logprobs.content.0.bytes.0", 0xF0);
  json_decref(a);
}

/* What would change the answer and is not done is refused, with its name. */
static void chat_refuses(void **state) {
  (void)state;
  static const struct {
    const char *body, *param;
  } cases[] = {
      {"{" SAYS("x") ",\"temprature\":1}", "temprature"},
      {"{" SAYS("x") ",\"temperature\":-1}", "temperature"},
      {"{" SAYS("x") ",\"temperature\":\"hot\"}", "temperature"},
      {"{" SAYS("x") ",\"top_p\":1.5}", "top_p"},
      {"{" SAYS("x") ",\"n\":17}", "n"},
      {"{" SAYS("x") ",\"n\":1.5}", "n"},
      {"{" SAYS("x") ",\"max_tokens\":0}", "max_tokens"},
      {"{" SAYS("x") ",\"stop\":[\"\"]}", "stop"},
      {"{" SAYS("x") ",\"logit_bias\":{\"99999\":1}}", "logit_bias"},
      {"{" SAYS("x") ",\"logit_bias\":{\"1\":101}}", "logit_bias"},
      {"{" SAYS("x") ",\"top_logprobs\":1}", "top_logprobs"},
      {"{" SAYS("x") ",\"functions\":[{}]}", "functions"},
      {"{" SAYS("x") ",\"modalities\":[\"audio\"]}", "modalities"},
      {"{" SAYS("x") ",\"reasoning_effort\":\"high\"}", "reasoning_effort"},
      {"{" SAYS("x") ",\"response_format\":{\"type\":\"xml\"}}", "response_format.type"},
      {"{" SAYS("x") ",\"response_format\":{\"type\":\"json_schema\",\"json_schema\":{\"name\":\"x\"}}}",
       "response_format.json_schema.schema"},
      {"{" SAYS("x") ",\"grammar\":\"nothing\"}", "grammar"},
      {"{" SAYS("x") ",\"grammar\":\"root ::= \\\"a\\\"\",\"response_format\":{\"type\":\"json_object\"}}", "response_format"},
      {"{" SAYS("x") "," TOOLS ",\"response_format\":{\"type\":\"json_object\"}}", "tools"},
      {"{" SAYS("x") ",\"tool_choice\":\"required\"}", "tool_choice"},
      {"{" SAYS("x") ",\"tools\":[{\"type\":\"function\",\"function\":{}}]}", "tools[0].function.name"},
      {"{" SAYS("x") ",\"session\":\"../x\"}", "session"},
      {"{" SAYS("x") ",\"stream_options\":{\"other\":true}}", "stream_options.other"},
      {"{}", "messages"},
      {"{\"messages\":[]}", "messages"},
      {"{\"messages\":[{\"role\":\"cook\",\"content\":\"x\"}]}", "messages[0].role"},
      {"{\"messages\":[{\"role\":\"user\"}]}", "messages[0].content"},
      {"{\"messages\":[{\"role\":\"user\",\"content\":[{\"type\":\"image_url\",\"image_url\":{}}]}]}",
       "messages[0].content[0].type"},
      {"{\"messages\":[{\"role\":\"assistant\",\"tool_calls\":[{\"function\":{\"name\":\"f\",\"arguments\":\"[]\"}}]}]}",
       "messages[0].tool_calls[0].function.arguments"},
  };
  for (size_t i = 0; i < ARRAY_LENGTH(cases); i++) {
    json_t *a = ask_json(&shared, "POST", CHAT, cases[i].body, 400);
    if (strcmp(text_at(a, "error.param"), cases[i].param) != 0)
      fail_msg("%s: names %s: %s", cases[i].body, text_at(a, "error.param"), text_at(a, "error.message"));
    assert_text_at(a, "error.type", "invalid_request_error");
    json_decref(a);
  }
  json_t *a = ask_json(&shared, "POST", CHAT, "{" SAYS("x") ",\"model\":\"other\"}", 404);
  assert_text_at(a, "error.code", "model_not_found");
  json_decref(a);
}

static void service_refuses(void **state) {
  (void)state;
  static const struct {
    const char *body;
    int status;
    const char *head;
  } cases[] = {{"{" SAYS("!full") "}", 429, "Retry-After: 1"},
               {"{" SAYS("!stopping") ",\"stream\":true}", 503, "Retry-After: 5"},
               {"{" SAYS("!impossible") "}", 400, "application/json"},
               {"{" SAYS("!error") "}", 500, "application/json"}};
  for (size_t i = 0; i < ARRAY_LENGTH(cases); i++) {
    struct answer a = ask(&shared, "POST", CHAT, NULL, cases[i].body);
    assert_int_equal(a.status, cases[i].status);
    assert_non_null(strcasestr(a.head, cases[i].head));
    answer_free(&a);
  }
  json_t *events = ask_events(&shared, CHAT, "{" SAYS("!error") ",\"stream\":true}");
  size_t n = json_array_size(events);
  assert_text_at(json_array_get(events, n - 2), "error.message", "no logit is finite");
  json_decref(events);
}

/* ---- completions ---- */

static void completions(void **state) {
  (void)state;
  json_t *a = ask_json(&shared, "POST", "/v1/completions", "{\"prompt\":\"abcdefgh\",\"logprobs\":1}", 200);
  assert_text_at(a, "object", "text_completion");
  assert_text_at(a, "choices.0.text", "abcdefgh");
  assert_text_at(a, "choices.0.logprobs.tokens.1", "fgh");
  assert_number_at(a, "choices.0.logprobs.text_offset.1", 5);
  assert_number_at(a, "choices.0.logprobs.token_logprobs.0", -0.5);
  json_decref(a);
  a = ask_json(&shared, "POST", "/v1/completions", "{\"prompt\":[64,65,66]}", 200); /* ids of the vocabulary's bytes */
  assert_number_at(a, "usage.prompt_tokens", 3);
  json_decref(a);
  a = ask_json(&shared, "POST", "/v1/completions", "{\"prompt\":[\"one\"]}", 200);
  json_decref(a);
  static const char *const wrong[] = {"{}",
                                      "{\"prompt\":[\"a\",\"b\"]}",
                                      "{\"prompt\":\"a\",\"echo\":true}",
                                      "{\"prompt\":\"a\",\"suffix\":\"b\"}",
                                      "{\"prompt\":\"a\",\"best_of\":3}",
                                      "{\"prompt\":[-1]}",
                                      "{\"prompt\":\"\"}",
                                      "{\"prompt\":7}"};
  for (size_t i = 0; i < ARRAY_LENGTH(wrong); i++) json_decref(ask_json(&shared, "POST", "/v1/completions", wrong[i], 400));
  json_t *events = ask_events(&shared, "/v1/completions", "{\"prompt\":\"abcdefgh\",\"stream\":true,\"logprobs\":0}");
  assert_text_at(events, "0.choices.0.text", "abcde");
  assert_text_at(events, "1.choices.0.text", "fgh");
  assert_number_at(events, "1.choices.0.logprobs.text_offset.0", 5);
  assert_text_at(events, "2.choices.0.finish_reason", "stop");
  json_decref(events);
}

/* ---- Anthropic ---- */

#define MESSAGES "/v1/messages"

static void messages_answer(void **state) {
  (void)state;
  json_t *a = ask_json(&shared, "POST", MESSAGES,
                       "{\"max_tokens\":50,\"system\":[{\"type\":\"text\",\"text\":\"Be brief.\"}]," SAYS("hi there") "}", 200);
  assert_text_at(a, "type", "message");
  assert_text_at(a, "content.0.type", "text");
  assert_text_at(a, "content.0.text", "hi there");
  assert_text_at(a, "stop_reason", "end_turn");
  assert_number_at(a, "usage.output_tokens", 2);
  json_decref(a);
  a = ask_json(&shared, "POST", MESSAGES, "{\"max_tokens\":1," SAYS("hi there") "}", 200);
  assert_text_at(a, "stop_reason", "max_tokens");
  json_decref(a);
  a = ask_json(&shared, "POST", MESSAGES, "{\"max_tokens\":9,\"stop_sequences\":[\"END\"]," SAYS("hi END there") "}", 200);
  assert_text_at(a, "stop_reason", "stop_sequence");
  assert_text_at(a, "stop_sequence", "END");
  json_decref(a);
  a = ask_json(&shared, "POST", MESSAGES,
               "{\"max_tokens\":99,\"tools\":[{\"name\":\"look\",\"input_schema\":{\"type\":\"object\"}}]," SAYS(
                   "!call look {\\\"a\\\":1}") "}",
               200);
  assert_text_at(a, "content.1.type", "tool_use");
  assert_text_at(a, "content.1.name", "look");
  assert_number_at(a, "content.1.input.a", 1);
  assert_text_at(a, "stop_reason", "tool_use");
  json_decref(a);
  a = ask_json(
      &shared, "POST", MESSAGES,
      "{\"max_tokens\":99,\"tools\":[{\"name\":\"look\",\"input_schema\":{\"type\":\"object\"}}],\"messages\":[{\"role\":"
      "\"user\",\"content\":"
      "\"q\"},{\"role\":\"assistant\",\"content\":[{\"type\":\"text\",\"text\":\"t\"},{\"type\":\"tool_use\",\"id\":\"x\","
      "\"name\":\"look\","
      "\"input\":{}}]},{\"role\":\"user\",\"content\":[{\"type\":\"tool_result\",\"tool_use_id\":\"x\",\"content\":\"seen\"}]}]}",
      200);
  assert_text_at(a, "content.0.text", "<tool_response>\nseen\n</tool_response>");
  json_decref(a);
  a = ask_json(&shared, "POST", MESSAGES "/count_tokens", "{" SAYS("hi there") "}", 200);
  assert_number_at(a, "input_tokens", 20);
  json_decref(a);
}

static void messages_stream(void **state) {
  (void)state;
  json_t *events = ask_events(
             &shared, MESSAGES,
             "{\"max_tokens\":99,\"stream\":true,\"tools\":[{\"name\":\"look\",\"input_schema\":{\"type\":\"object\"}}]," SAYS(
                 "!call look {\\\"a\\\":1}") "}"),
         *event;
  static const char *const order[] = {"message_start",       "ping",
                                      "content_block_start", "content_block_delta",
                                      "content_block_delta", "content_block_stop",
                                      "content_block_start", "content_block_delta",
                                      "content_block_stop",  "message_delta",
                                      "message_stop"};
  size_t i;
  assert_int_equal(json_array_size(events), ARRAY_LENGTH(order));
  json_array_foreach(events, i, event) { assert_text_at(event, "type", order[i]); }
  assert_number_at(events, "2.index", 0);
  assert_number_at(events, "6.index", 1);
  assert_text_at(events, "6.content_block.name", "look");
  assert_text_at(events, "7.delta.partial_json", "{\"a\": 1}");
  assert_text_at(events, "9.delta.stop_reason", "tool_use");
  json_decref(events);
  events = ask_events(&shared, MESSAGES, "{\"max_tokens\":99,\"stream\":true," SAYS("!error") "}");
  assert_text_at(json_array_get(events, json_array_size(events) - 1), "error.type", "api_error");
  json_decref(events);
  events = ask_events(
      &shared, MESSAGES,
      "{\"max_tokens\":99,\"stream\":true,\"thinking\":{\"type\":\"enabled\",\"budget_tokens\":1024}," SAYS("!think hm|yes") "}");
  assert_text_at(events, "2.content_block.type", "thinking");
  json_decref(events);
}

static void messages_refuse(void **state) {
  (void)state;
  static const struct {
    const char *body, *word;
  } cases[] = {
      {"{" SAYS("x") "}", "max_tokens"},
      {"{\"max_tokens\":1}", "messages"},
      {"{\"max_tokens\":1,\"messages\":[{\"role\":\"system\",\"content\":\"x\"}]}", "messages[0].role"},
      {"{\"max_tokens\":1,\"messages\":[{\"role\":\"user\",\"content\":[{\"type\":\"image\"}]}]}", "messages[0].content[0].type"},
      {"{\"max_tokens\":1,\"messages\":[{\"role\":\"user\",\"content\":\"x\"},{\"role\":\"assistant\",\"content\":\"y\"}]}",
       "assistant"},
      {"{\"max_tokens\":1,\"tools\":[{\"type\":\"bash_20250124\",\"name\":\"bash\"}]," SAYS("x") "}", "tools[0].type"},
      {"{\"max_tokens\":1,\"mcp_servers\":[{}]," SAYS("x") "}", "mcp_servers"}};
  for (size_t i = 0; i < ARRAY_LENGTH(cases); i++) {
    json_t *a = ask_json(&shared, "POST", MESSAGES, cases[i].body, 400);
    assert_text_at(a, "type", "error");
    assert_text_at(a, "error.type", "invalid_request_error");
    if (!strstr(text_at(a, "error.message"), cases[i].word)) fail_msg("%s: %s", cases[i].body, text_at(a, "error.message"));
    json_decref(a);
  }
}

/* ---- responses ---- */

#define RESPONSES "/v1/responses"

static void responses_answer(void **state) {
  (void)state;
  json_t *a = ask_json(&shared, "POST", RESPONSES,
                       "{\"input\":\"hi there\",\"instructions\":\"Be brief.\",\"metadata\":{\"k\":\"v\"}}", 200);
  assert_text_at(a, "object", "response");
  assert_text_at(a, "status", "completed");
  assert_text_at(a, "output.0.type", "message");
  assert_text_at(a, "output.0.content.0.type", "output_text");
  assert_text_at(a, "output.0.content.0.text", "hi there");
  assert_text_at(a, "metadata.k", "v");
  assert_text_at(a, "instructions", "Be brief.");
  char path[128], body[256];
  snprintf(path, sizeof path, RESPONSES "/%s", text_at(a, "id"));
  json_t *again = ask_json(&shared, "GET", path, NULL, 200);
  assert_true(json_equal(a, again));
  json_decref(again);
  /* the conversation goes on: its tokens are in the next prompt */
  snprintf(body, sizeof body, "{\"input\":\"and now\",\"previous_response_id\":\"%s\"}", text_at(a, "id"));
  json_t *next = ask_json(&shared, "POST", RESPONSES, body, 200),
         *alone = ask_json(&shared, "POST", RESPONSES, "{\"input\":\"and now\"}", 200);
  assert_text_at(next, "output.0.content.0.text", "and now");
  assert_true(json_integer_value(at(next, "usage.input_tokens")) > json_integer_value(at(alone, "usage.input_tokens")) + 10);
  json_decref(next);
  json_decref(alone);
  json_decref(ask_json(&shared, "DELETE", path, NULL, 200));
  json_decref(ask_json(&shared, "GET", path, NULL, 404));
  json_decref(ask_json(&shared, "DELETE", path, NULL, 404));
  next = ask_json(&shared, "POST", RESPONSES, body, 404);
  assert_text_at(next, "error.param", "previous_response_id");
  json_decref(next);
  json_decref(a);
  a = ask_json(&shared, "POST", RESPONSES, "{\"input\":\"hi there\",\"store\":false,\"max_output_tokens\":1}", 200);
  assert_text_at(a, "status", "incomplete");
  assert_text_at(a, "incomplete_details.reason", "max_output_tokens");
  snprintf(path, sizeof path, RESPONSES "/%s", text_at(a, "id"));
  json_decref(ask_json(&shared, "GET", path, NULL, 404));
  json_decref(a);
  a = ask_json(
      &shared, "POST", RESPONSES,
      "{\"input\":\"x\",\"text\":{\"format\":{\"type\":\"json_schema\",\"name\":\"n\",\"schema\":{\"type\":\"object\"}}}}", 200);
  assert_text_at(a, "output.0.content.0.text", "{\"schema\":{\"type\":\"object\"}}");
  json_decref(a);
}

#define FLAT_TOOLS "\"tools\":[{\"type\":\"function\",\"name\":\"look\",\"parameters\":{\"type\":\"object\"}}]"

static void responses_call(void **state) {
  (void)state;
  json_t *a = ask_json(&shared, "POST", RESPONSES, "{\"input\":\"!call look {}\"," FLAT_TOOLS "}", 200);
  assert_text_at(a, "output.1.type", "function_call");
  assert_text_at(a, "output.1.name", "look");
  assert_text_at(a, "output.1.arguments", "{}");
  json_decref(a);
  a = ask_json(&shared, "POST", RESPONSES,
               "{\"input\":[{\"role\":\"user\",\"content\":[{\"type\":\"input_text\",\"text\":\"q\"}]},{\"type\":\"function_"
               "call\",\"call_id\":\"c\","
               "\"name\":\"look\",\"arguments\":\"{}\"},{\"type\":\"function_call_output\",\"call_id\":\"c\",\"output\":\"seen\"}"
               "]," FLAT_TOOLS "}",
               200);
  assert_text_at(a, "output.0.content.0.text", "<tool_response>\nseen\n</tool_response>");
  json_decref(a);
  static const char *const wrong[] = {"{}",
                                      "{\"input\":7}",
                                      "{\"input\":\"x\",\"tools\":[{\"type\":\"web_search\"}]}",
                                      "{\"input\":\"x\",\"background\":true}",
                                      "{\"input\":\"x\",\"truncation\":\"auto\"}",
                                      "{\"input\":[{\"type\":\"item_reference\",\"id\":\"x\"}]}"};
  for (size_t i = 0; i < ARRAY_LENGTH(wrong); i++) json_decref(ask_json(&shared, "POST", RESPONSES, wrong[i], 400));
}

static void responses_stream(void **state) {
  (void)state;
  json_t *events = ask_events(&shared, RESPONSES, "{\"input\":\"!call look {}\",\"stream\":true," FLAT_TOOLS "}"), *event;
  static const char *const order[] = {"response.created",
                                      "response.in_progress",
                                      "response.output_item.added",
                                      "response.content_part.added",
                                      "response.output_text.delta",
                                      "response.output_text.delta",
                                      "response.output_text.done",
                                      "response.content_part.done",
                                      "response.output_item.done",
                                      "response.output_item.added",
                                      "response.function_call_arguments.delta",
                                      "response.function_call_arguments.done",
                                      "response.output_item.done",
                                      "response.completed"};
  size_t i;
  json_array_foreach(events, i, event) {
    assert_text_at(event, "type", i < ARRAY_LENGTH(order) ? order[i] : "nothing more");
    assert_number_at(event, "sequence_number", i);
  }
  assert_int_equal(json_array_size(events), ARRAY_LENGTH(order));
  assert_text_at(events, "6.text", "I look.");
  json_t *response = at(events, "13.response");
  assert_text_at(response, "output.0.content.0.text", "I look.");
  assert_text_at(response, "output.1.arguments", "{}");
  assert_true(strcmp(text_at(events, "2.item.id"), text_at(response, "output.0.id")) == 0);
  char path[128];
  snprintf(path, sizeof path, RESPONSES "/%s", text_at(response, "id"));
  json_t *kept = ask_json(&shared, "GET", path, NULL, 200);
  assert_true(json_equal(kept, response));
  json_decref(kept);
  json_decref(events);
  events = ask_events(&shared, RESPONSES, "{\"input\":\"!error\",\"stream\":true}");
  event = json_array_get(events, json_array_size(events) - 1);
  assert_text_at(event, "type", "response.failed");
  assert_text_at(event, "response.status", "failed");
  json_decref(events);
}

/* ---- tokens, models, numbers ---- */

static void tokens(void **state) {
  (void)state;
  json_t *a = ask_json(&shared, "POST", "/tokenize", "{\"content\":\"hi there <|im_end|>\"}", 200);
  json_t *back = json_pack("{s:O}", "tokens", at(a, "tokens"));
  char *body = json_dumps(back, 0);
  json_t *text = ask_json(&shared, "POST", "/v1/detokenize", body, 200);
  assert_text_at(text, "content", "hi there <|im_end|>");
  json_t *plain = ask_json(&shared, "POST", "/v1/tokenize", "{\"content\":\"hi there <|im_end|>\",\"parse_special\":false}", 200);
  assert_true(json_integer_value(at(plain, "count")) > json_integer_value(at(a, "count")));
  json_decref(plain);
  json_decref(text);
  json_decref(back);
  json_decref(a);
  free(body);
  json_decref(ask_json(&shared, "POST", "/detokenize", "{\"tokens\":[100000]}", 400));
  json_decref(ask_json(&shared, "POST", "/tokenize", "{}", 400));
  a = ask_json(&shared, "GET", "/v1/models", NULL, 200);
  assert_text_at(a, "data.0.id", "fake");
  assert_number_at(a, "data.0.context_length", 4096);
  json_decref(a);
  json_decref(ask_json(&shared, "GET", "/v1/models/fake", NULL, 200));
  json_decref(ask_json(&shared, "GET", "/v1/models/other", NULL, 404));
}

/* Every line is a comment or `name{labels} number`, every name has its type said before, histograms are cumulative. */
static void metrics(void **state) {
  (void)state;
  json_decref(ask_json(&shared, "POST", CHAT, "{" SAYS("hi") "}", 200));
  struct answer a = ask(&shared, "GET", "/metrics", NULL, NULL);
  assert_int_equal(a.status, 200);
  assert_non_null(strstr(a.head, "text/plain; version=0.0.4"));
  char type[128] = "";
  double below = -1;
  for (char *line = strtok(a.body, "\n"); line; line = strtok(NULL, "\n")) {
    char name[128];
    double value;
    if (sscanf(line, "# TYPE %127s", type) == 1 || strncmp(line, "# HELP oscar_", 13) == 0) {
      below = -1;
      continue;
    }
    const char *number = strrchr(line, ' ');
    assert_non_null(number);
    assert_int_equal(sscanf(number, "%lf", &value), 1);
    snprintf(name, sizeof name, "%.*s", (int)strcspn(line, "{ "), line);
    if (strncmp(name, type, strlen(type)) != 0) fail_msg("%s has no type", line);
    if (strstr(line, "_bucket{")) {
      assert_true(value >= below);
      below = value;
    }
    if (strstr(line, "first_token_seconds_count")) assert_true(value == below && value > 0);
    if (strstr(line, "endpoint=\"/v1/chat/completions\",status=\"200\"")) assert_true(value >= 1);
  }
  answer_free(&a);
  json_t *cache = ask_json(&shared, "GET", "/v1/cache", NULL, 200);
  assert_number_at(cache, "bytes.budget", 1 << 20);
  assert_number_at(cache, "bits_per_element", 2.125);
  json_decref(cache);
}

/* ---- sessions ---- */

static void sessions(void **state) {
  (void)state;
  json_t *a = ask_json(&shared, "POST", "/v1/sessions", "{\"id\":\"trip\",\"title\":\"To the sea\"}", 201);
  assert_text_at(a, "title", "To the sea");
  assert_number_at(a, "tokens", 0);
  json_decref(a);
  json_decref(ask_json(&shared, "POST", "/v1/sessions", "{\"id\":\"trip\"}", 409));
  json_decref(ask_json(&shared, "POST", "/v1/sessions", "{\"id\":\"a/b\"}", 400));
  json_decref(ask_json(&shared, "POST", CHAT, "{" SAYS("Where is it?") ",\"session\":\"trip\"}", 200));
  a = ask_json(&shared, "GET", "/v1/sessions/trip", NULL, 200);
  assert_text_at(a, "title", "To the sea");
  assert_text_at(a, "messages.0.content", "Where is it?");
  assert_text_at(a, "messages.1.role", "assistant");
  assert_text_at(a, "messages.1.content", "Where is it?");
  assert_true(json_integer_value(at(a, "tokens")) > 0);
  json_decref(a);
  /* a stream keeps them too, before its end is told; the title is what was said first */
  json_decref(ask_events(&shared, CHAT, "{" SAYS("A long way\\nto go") ",\"session\":\"other\",\"stream\":true}"));
  a = ask_json(&shared, "GET", "/v1/sessions/other", NULL, 200);
  assert_text_at(a, "title", "A long way");
  assert_text_at(a, "messages.1.content", "A long way\nto go");
  json_decref(a);
  a = ask_json(&shared, "GET", "/v1/sessions", NULL, 200);
  assert_int_equal(json_array_size(at(a, "data")), 2);
  json_decref(a);
  a = ask_json(&shared, "POST", "/v1/sessions/trip/save", NULL, 200);
  assert_true(json_is_true(at(a, "on_disk")));
  json_decref(a);
  json_decref(ask_json(&shared, "POST", "/v1/sessions/trip/load", NULL, 200));
  a = ask_json(&shared, "POST", "/v1/sessions/trip/fork", "{\"id\":\"trip2\"}", 201);
  assert_text_at(a, "messages.0.content", "Where is it?");
  json_decref(a);
  json_decref(ask_json(&shared, "POST", "/v1/sessions/trip/fork", "{\"id\":\"other\"}", 409));
  a = ask_json(&shared, "PATCH", "/v1/sessions/trip2", "{\"id\":\"trip3\",\"title\":\"Home\"}", 200);
  assert_text_at(a, "id", "trip3");
  assert_text_at(a, "title", "Home");
  json_decref(a);
  json_decref(ask_json(&shared, "DELETE", "/v1/sessions/trip3", NULL, 200));
  json_decref(ask_json(&shared, "GET", "/v1/sessions/trip3", NULL, 404));
  json_decref(ask_json(&shared, "DELETE", "/v1/sessions/trip3", NULL, 404));
  json_decref(ask_json(&shared, "POST", "/v1/sessions/none/save", NULL, 404));
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(chat_answers),
      cmocka_unit_test(chat_streams),
      cmocka_unit_test(chat_ends),
      cmocka_unit_test(chat_calls_tools),
      cmocka_unit_test(chat_thinks),
      cmocka_unit_test(chat_keeps_to_forms),
      cmocka_unit_test(chat_tells_likelihoods),
      cmocka_unit_test(chat_refuses),
      cmocka_unit_test(service_refuses),
      cmocka_unit_test(completions),
      cmocka_unit_test(messages_answer),
      cmocka_unit_test(messages_stream),
      cmocka_unit_test(messages_refuse),
      cmocka_unit_test(responses_answer),
      cmocka_unit_test(responses_call),
      cmocka_unit_test(responses_stream),
      cmocka_unit_test(tokens),
      cmocka_unit_test(metrics),
      cmocka_unit_test(sessions),
  };
  return cmocka_run_group_tests(tests, start, stop);
}
