/* tokens.c - POST /tokenize and /detokenize. */
#include "server/state.h"

#include "engine/json_text.h"

#include <string.h>

static bool parse(struct exchange *ex, const struct field_rule *rules, json_t **body, struct fields *f, struct refusal *refusal) {
  return fields_parse(ex->body.data ? ex->body.data : "", ex->body.bytes, body, f, refusal) && fields_obey(f, rules, NULL) &&
         model_is_served(ex->server, f);
}

static json_t *piece_json(const struct frontend *frontend, int32_t id) {
  size_t bytes;
  const char *piece = frontend_piece(frontend, id, &bytes);
  return json_pack("{s:i, s:o}", "id", id, "piece", json_text(piece, bytes));
}

/* {"content" or "text", "add_special"?: BOS before it, "parse_special"?, "with_pieces"?} -> {"tokens", "count"} */
void tokens_encode(struct exchange *ex, struct frontend *frontend) {
  static const struct field_rule rules[] = {{"content", FIELD_READ, NULL},     {"text", FIELD_READ, NULL},
                                            {"add_special", FIELD_READ, NULL}, {"parse_special", FIELD_READ, NULL},
                                            {"with_pieces", FIELD_READ, NULL}, {"model", FIELD_READ, NULL},
                                            {NULL, FIELD_READ, NULL}};
  struct refusal refusal = {0};
  struct fields f;
  json_t *body = NULL;
  const char *text = NULL;
  bool bos = false, special = true, pieces = false;
  int32_t *ids = NULL;
  int n = 0;
  bool good = parse(ex, rules, &body, &f, &refusal) && field_text(&f, "text", &text) && field_text(&f, "content", &text) &&
              field_flag(&f, "add_special", &bos) && field_flag(&f, "parse_special", &special) &&
              field_flag(&f, "with_pieces", &pieces);
  if (good && !text) good = field_refuse(&f, "content", "is missing");
  if (good && bos && special)
    good = frontend_prompt(frontend, text, strlen(text), "content", &ids, &n, &refusal);
  else
    good = good && frontend_text(frontend, text, strlen(text), special, "content", &ids, &n, &refusal);
  if (good) {
    json_t *list = json_array();
    for (int i = 0; i < n; i++) json_array_append_new(list, pieces ? piece_json(frontend, ids[i]) : json_integer(ids[i]));
    reply_json(ex, 200, json_pack("{s:o, s:i}", "tokens", list, "count", n));
  } else {
    reply_refusal(ex, &refusal);
  }
  free(ids);
  json_decref(body);
}

/* {"tokens": [ids]} -> {"content"} */
void tokens_decode(struct exchange *ex, struct frontend *frontend) {
  static const struct field_rule rules[] = {{"tokens", FIELD_READ, NULL}, {"model", FIELD_READ, NULL}, {NULL, FIELD_READ, NULL}};
  struct refusal refusal = {0};
  struct fields f;
  struct buffer text = {0};
  json_t *body = NULL, *id;
  const json_t *list = NULL;
  size_t i;
  const int vocab = tokenizer_vocab(frontend->tokenizer);
  bool good = parse(ex, rules, &body, &f, &refusal) && field_array(&f, "tokens", &list);
  if (good && !list) good = field_refuse(&f, "tokens", "is missing");
  json_array_foreach(list, i, id) {
    size_t bytes;
    if (!good) break;
    if (!json_is_integer(id) || json_integer_value(id) < 0 || json_integer_value(id) >= vocab)
      good = field_refuse(&f, "tokens", "has no token id of this model at %zu (0 to %d)", i, vocab - 1);
    if (!good) break;
    const char *piece = frontend_piece(frontend, (int32_t)json_integer_value(id), &bytes);
    buffer_add(&text, piece, bytes);
  }
  if (good)
    reply_json(ex, 200, json_pack("{s:o}", "content", json_text(text.data ? text.data : "", text.bytes)));
  else
    reply_refusal(ex, &refusal);
  buffer_free(&text);
  json_decref(body);
}
