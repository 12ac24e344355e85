/* openai_completions.c - POST /v1/completions: a raw text goes on. */
#include "server/inquiry.h"

#include "engine/json_text.h"

#include <limits.h>
#include <string.h>

static const struct field_rule rules[] = {
    {"prompt", FIELD_READ, NULL},   {"max_tokens", FIELD_READ, NULL},
    {"n", FIELD_READ, NULL},        {"best_of", FIELD_READ, NULL},
    {"stop", FIELD_READ, NULL},     {"stream_options", FIELD_READ, NULL},
    {"logprobs", FIELD_READ, NULL}, {"response_format", FIELD_READ, NULL},
    {"user", FIELD_READ, NULL},     {"echo", FIELD_PLAIN, NULL},
    {"suffix", FIELD_PLAIN, ""},    {NULL, FIELD_READ, NULL},
};

static bool read_ids(struct inquiry *g, const json_t *list, const struct fields *f) {
  const int vocab = tokenizer_vocab(g->server->frontends[0].tokenizer);
  const size_t n = json_array_size(list);
  g->ids = calloc(n, sizeof *g->ids);
  if (!g->ids) return refuse_memory(f->refusal);
  for (size_t i = 0; i < n; i++) {
    const json_t *id = json_array_get(list, i);
    if (!json_is_integer(id) || json_integer_value(id) < 0 || json_integer_value(id) >= vocab)
      return field_refuse(f, "prompt", "has no token id of this model at %zu (0 to %d)", i, vocab - 1);
    g->ids[i] = (int32_t)json_integer_value(id);
  }
  g->options.n = (int)n;
  return true;
}

/* A text, token ids, or a list of one of these. */
static bool read_prompt(struct inquiry *g, const struct fields *f, struct frontend *frontend) {
  const json_t *prompt = field(f, "prompt");
  if (!prompt) return field_refuse(f, "prompt", "is missing");
  const json_t *first = json_array_get(prompt, 0);
  if (json_is_string(first) || json_is_array(first)) {
    if (json_array_size(prompt) != 1) return field_refuse(f, "prompt", "holds several prompts: send a request for each");
    prompt = first;
    first = json_array_get(prompt, 0);
  }
  if (json_is_integer(first)) return read_ids(g, prompt, f);
  if (!json_is_string(prompt)) return field_refuse(f, "prompt", "must be a string or a list of token ids");
  json_array_append_new(g->session_messages, json_pack("{s:s, s:O}", "role", "user", "content", prompt));
  return frontend_prompt(frontend, json_string_value(prompt), json_string_length(prompt), "prompt", &g->ids, &g->options.n,
                         f->refusal) &&
         (g->options.n > 0 || field_refuse(f, "prompt", "is empty"));
}

static bool read_completion(struct inquiry *g, const struct fields *f, struct frontend *frontend) {
  int best = 0;
  bool good = fields_obey(f, rules, common_rules) && read_common(g, f) && read_stream(g, f) && read_stops(g, f, "stop") &&
              field_int(f, "n", 1, 16, &g->options.choices) && field_int(f, "best_of", 1, 16, &best);
  g->options.max_tokens = 16; /* OpenAI's */
  if (good && best && best != g->options.choices)
    return field_refuse(f, "best_of", "must be n: this server returns all it makes");
  return good && field_int(f, "max_tokens", 1, INT_MAX, &g->options.max_tokens) && field_text(f, "user", &g->options.user) &&
         field_int(f, "logprobs", 0, 20, &g->options.logprobs) && read_format(g, f, "response_format", true) &&
         read_prompt(g, f, frontend);
}

/* ---- writing ---- */

static const char *finish_word(const struct choice *c) { return c->reason == FINISH_LENGTH ? "length" : "stop"; }

/* {"tokens", "token_logprobs", "top_logprobs", "text_offset"}: this endpoint's form of the list. *offset: characters so far. */
static json_t *logprobs_json(const json_t *list, int64_t *offset) {
  if (!list) return json_null();
  json_t *tokens = json_array(), *values = json_array(), *top = json_array(), *offsets = json_array(), *one;
  size_t i, k;
  json_array_foreach(list, i, one) {
    json_t *token = json_object_get(one, "token"), *ranked = json_object(), *r;
    json_array_foreach(json_object_get(one, "top_logprobs"), k, r) {
      json_object_set(ranked, json_string_value(json_object_get(r, "token")), json_object_get(r, "logprob"));
    }
    json_array_append(tokens, token);
    json_array_append(values, json_object_get(one, "logprob"));
    json_array_append_new(top, ranked);
    json_array_append_new(offsets, json_integer(*offset));
    for (const char *at = json_string_value(token); *at; at++) *offset += ((unsigned char)*at & 0xC0) != 0x80;
  }
  return json_pack("{s:o, s:o, s:o, s:o}", "tokens", tokens, "token_logprobs", values, "top_logprobs", top, "text_offset",
                   offsets);
}

static json_t *chunk_json(struct inquiry *g, json_t *choices) {
  return json_pack("{s:s, s:s, s:I, s:s, s:s, s:o}", "id", g->id, "object", "text_completion", "created", (json_int_t)g->created,
                   "model", g->server->options.model_name, "system_fingerprint", "oscar", "choices", choices);
}

static void write_chunk(struct inquiry *g, struct choice *c, const char *text, size_t bytes, json_t *logprobs, const char *finish,
                        struct buffer *out) {
  int64_t offset = (int64_t)c->block_start;
  json_t *values = logprobs_json(logprobs, &offset);
  c->block_start = (size_t)offset;
  json_t *chunk = chunk_json(g, json_pack("[{s:i, s:o, s:o, s:s?}]", "index", c->index, "text", json_text(text, bytes),
                                          "logprobs", values, "finish_reason", finish));
  if (g->include_usage) json_object_set_new(chunk, "usage", json_null());
  write_data(out, chunk);
}

static void completion_begin(struct inquiry *g, struct buffer *out) { (void)g, (void)out; }

static void completion_text(struct inquiry *g, struct choice *c, const char *text, size_t bytes, json_t *logprobs,
                            struct buffer *out) {
  write_chunk(g, c, text, bytes, logprobs, NULL, out);
  json_decref(logprobs);
}

static void completion_call(struct inquiry *g, struct choice *c, const json_t *call, struct buffer *out) {
  (void)g, (void)c, (void)call, (void)out; /* a raw text has no calls */
}

static void completion_finish(struct inquiry *g, struct choice *c, struct buffer *out) {
  write_chunk(g, c, "", 0, NULL, finish_word(c), out);
}

static void completion_end(struct inquiry *g, struct buffer *out) {
  if (g->include_usage) {
    json_t *chunk = chunk_json(g, json_array());
    json_object_set_new(chunk, "usage", openai_usage(g));
    write_data(out, chunk);
  }
  buffer_text(out, "data: [DONE]\n\n");
}

static void completion_fail(struct inquiry *g, const struct refusal *refusal, struct buffer *out) {
  (void)g;
  write_data(out, refusal_json(DIALECT_OPENAI, refusal));
  buffer_text(out, "data: [DONE]\n\n");
}

static json_t *completion_whole(struct inquiry *g) {
  json_t *choices = json_array();
  for (int i = 0; i < g->options.choices; i++) {
    const struct choice *c = &g->choices[i];
    int64_t offset = 0;
    json_array_append_new(choices, json_pack("{s:i, s:o, s:o, s:s}", "index", i, "text",
                                             json_text(c->text.data ? c->text.data : "", c->text.bytes), "logprobs",
                                             logprobs_json(c->logprobs, &offset), "finish_reason", finish_word(c)));
  }
  json_t *whole = chunk_json(g, choices);
  json_object_set_new(whole, "usage", openai_usage(g));
  return whole;
}

static const struct answer_form completion_form = {
    .id_prefix = "cmpl-",
    .ping = ": ping\n\n",
    .begin = completion_begin,
    .text = completion_text,
    .call = completion_call,
    .finish = completion_finish,
    .end = completion_end,
    .fail = completion_fail,
    .whole = completion_whole,
};

void openai_completions(struct exchange *ex, struct frontend *frontend) {
  inquiry_run(ex, frontend, &completion_form, read_completion);
}

struct inquiry *openai_completions_parse(struct server *server, struct frontend *frontend, const char *body, size_t bytes,
                                         struct refusal *refusal) {
  return inquiry_parse(server, frontend, &completion_form, read_completion, body, bytes, refusal);
}
