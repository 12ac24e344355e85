/* request_fields.c - what all dialects have in common: how to sample, when to stop, what the answer must look like. */
#include "server/inquiry.h"

#include <errno.h>
#include <limits.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

enum { MOST_STOPS = 16, MOST_CHOICES = 16, MOST_STOP_BYTES = 1024, MOST_BIAS = 4096 };

const struct field_rule common_rules[] = {
    {"model", FIELD_READ, NULL},
    {"temperature", FIELD_READ, NULL},
    {"top_p", FIELD_READ, NULL},
    {"top_k", FIELD_READ, NULL},
    {"min_p", FIELD_READ, NULL},
    {"seed", FIELD_READ, NULL},
    {"repetition_penalty", FIELD_READ, NULL},
    {"repeat_penalty", FIELD_READ, NULL},
    {"repeat_last_n", FIELD_READ, NULL},
    {"presence_penalty", FIELD_READ, NULL},
    {"frequency_penalty", FIELD_READ, NULL},
    {"logit_bias", FIELD_READ, NULL},
    {"stream", FIELD_READ, NULL},
    {"session", FIELD_READ, NULL},
    {"ignore_eos", FIELD_READ, NULL},
    {"grammar", FIELD_READ, NULL},
    {"service_tier", FIELD_HARMLESS, NULL},
    {"metadata", FIELD_HARMLESS, NULL},
    {"prompt_cache_key", FIELD_HARMLESS, NULL},
    {"prompt_cache_retention", FIELD_HARMLESS, NULL},
    {"safety_identifier", FIELD_HARMLESS, NULL},
    {NULL, FIELD_READ, NULL},
};

bool model_is_served(const struct server *server, const struct fields *f) {
  const char *name = NULL;
  if (!field_text(f, "model", &name)) return false;
  if (!name || strcmp(name, server->options.model_name) == 0 || in_list(server->options.aliases, name)) return true;
  return refuse(f->refusal, 404, "model_not_found", "model",
                "there is no model '%.100s' here; this server has '%s' (--alias names more)", name, server->options.model_name);
}

/* {"token id": bias} */
static bool read_bias(struct inquiry *g, const struct fields *f) {
  const json_t *map = NULL;
  if (!field_object(f, "logit_bias", &map) || !map) return map == NULL && f->refusal->status == 0;
  if (json_object_size(map) > MOST_BIAS) return field_refuse(f, "logit_bias", "has more than %d tokens", MOST_BIAS);
  g->bias = calloc(json_object_size(map) + 1, sizeof *g->bias);
  if (!g->bias) return refuse_memory(f->refusal);
  const int vocab = tokenizer_vocab(g->server->frontends[0].tokenizer);
  const char *key;
  json_t *value;
  int n = 0;
  json_object_foreach((json_t *)(uintptr_t)map, key, value) {
    char *end;
    errno = 0;
    const long id = strtol(key, &end, 10);
    if (*end || end == key || errno || id < 0 || id >= vocab)
      return field_refuse(f, "logit_bias", "names '%.20s', which is no token id of this model (0 to %d)", key, vocab - 1);
    const double bias = json_number_value(value);
    if (!json_is_number(value) || !(bias >= -100 && bias <= 100))
      return field_refuse(f, "logit_bias", "wants numbers from -100 to 100 (token %ld)", id);
    g->bias[n++] = (struct token_bias){(int32_t)id, bias <= -100 ? -INFINITY : (float)bias};
  }
  g->options.sampling.bias = g->bias;
  g->options.sampling.n_bias = n;
  return true;
}

static bool read_sampling(struct inquiry *g, const struct fields *f) {
  struct sampler_options *s = &g->options.sampling;
  int64_t seed = 0;
  const bool seeded = field(f, "seed") != NULL;
  bool good = field_float(f, "temperature", 0, 100, &s->temperature) && field_float(f, "top_p", 0, 1, &s->top_p) &&
              field_int(f, "top_k", -1, INT_MAX, &s->top_k) && field_float(f, "min_p", 0, 1, &s->min_p) &&
              field_integer(f, "seed", INT64_MIN, INT64_MAX, &seed) &&
              field_float(f, "repetition_penalty", 0, 100, &s->repeat_penalty) &&
              field_float(f, "repeat_penalty", 0, 100, &s->repeat_penalty) &&
              field_float(f, "presence_penalty", -2, 2, &s->presence_penalty) &&
              field_float(f, "frequency_penalty", -2, 2, &s->frequency_penalty);
  s->penalty_window = -1;
  good = good && field_int(f, "repeat_last_n", -1, INT_MAX, &s->penalty_window);
  if (s->top_k < 0) s->top_k = 0; /* -1 is all, too */
  if (good && seeded) s->seed = (uint64_t)seed;
  return good && read_bias(g, f);
}

static bool read_grammar(struct inquiry *g, const struct fields *f) {
  const char *text = NULL;
  if (!field_text(f, "grammar", &text) || !text) return text == NULL && f->refusal->status == 0;
  char error[384] = "";
  const oscar_status status = grammar_parse(text, strlen(text), &g->grammar, error, sizeof error);
  if (status == OSCAR_NO_MEMORY) return refuse_memory(f->refusal);
  return status == OSCAR_OK || field_refuse(f, "grammar", "cannot be used: %s", error);
}

static bool read_session(struct inquiry *g, const struct fields *f) {
  if (!field_text(f, "session", &g->session)) return false;
  if (g->session && !session_name_is_valid(g->session)) return field_refuse(f, "session", "must be " SESSION_NAME_RULE);
  return true;
}

bool read_common(struct inquiry *g, const struct fields *f) {
  return model_is_served(g->server, f) && read_sampling(g, f) && read_session(g, f) &&
         field_flag(f, "ignore_eos", &g->options.ignore_end) && field_flag(f, "stream", &g->stream) && read_grammar(g, f);
}

bool read_stream(struct inquiry *g, const struct fields *f) {
  static const struct field_rule rules[] = {
      {"include_usage", FIELD_READ, NULL}, {"include_obfuscation", FIELD_HARMLESS, NULL}, {NULL, FIELD_READ, NULL}};
  const json_t *options = NULL;
  struct fields inside;
  if (!field_object(f, "stream_options", &options) || !options) return options == NULL && f->refusal->status == 0;
  return fields_enter(f, options, "stream_options", &inside) && fields_obey(&inside, rules, NULL) &&
         field_flag(&inside, "include_usage", &g->include_usage);
}

bool read_stops(struct inquiry *g, const struct fields *f, const char *name) {
  const json_t *value = field(f, name);
  if (!value) return f->refusal->status == 0;
  const size_t n = json_is_string(value) ? 1 : json_array_size(value);
  if ((!json_is_string(value) && !json_is_array(value)) || n > MOST_STOPS)
    return field_refuse(f, name, "must be a string or a list of at most %d", MOST_STOPS);
  g->stops = calloc(n + 1, sizeof *g->stops);
  if (!g->stops) return refuse_memory(f->refusal);
  for (size_t i = 0; i < n; i++) {
    const char *text = json_string_value(json_is_string(value) ? value : json_array_get(value, i));
    if (!text || !*text || strlen(text) > MOST_STOP_BYTES)
      return field_refuse(f, name, "must hold strings of 1 to %d bytes", MOST_STOP_BYTES);
    g->stops[i] = text;
  }
  g->options.stops = g->stops;
  g->options.n_stops = (int)n;
  return true;
}

/* ---- forms of answers ---- */

static bool one_grammar(struct inquiry *g, const struct fields *f, const char *name) {
  return !g->grammar || field_refuse(f, name, "and a grammar, or a tool that must be called, cannot both be obeyed");
}

bool obey_schema(struct inquiry *g, const json_t *schema, const struct fields *f, const char *name) {
  if (!one_grammar(g, f, name)) return false;
  char *text = json_dumps(schema, JSON_COMPACT | JSON_ENCODE_ANY);
  if (!text) return refuse_memory(f->refusal);
  char error[384] = "";
  const oscar_status status = grammar_of_schema(text, strlen(text), &g->grammar, error, sizeof error);
  free(text);
  if (status == OSCAR_NO_MEMORY) return refuse_memory(f->refusal);
  return status == OSCAR_OK || field_refuse(f, name, "has a schema that cannot be enforced: %s", error);
}

bool obey_json(struct inquiry *g, const struct fields *f, const char *name) {
  if (!one_grammar(g, f, name)) return false;
  return grammar_of_json(&g->grammar) == OSCAR_OK || refuse_memory(f->refusal);
}

bool read_format(struct inquiry *g, const struct fields *f, const char *name, bool nested) {
  static const struct field_rule rules[] = {{"type", FIELD_READ, NULL},       {"json_schema", FIELD_READ, NULL},
                                            {"schema", FIELD_READ, NULL},     {"name", FIELD_HARMLESS, NULL},
                                            {"strict", FIELD_HARMLESS, NULL}, {"description", FIELD_HARMLESS, NULL},
                                            {NULL, FIELD_READ, NULL}};
  const json_t *format = NULL;
  struct fields inside, schema;
  const char *type = NULL;
  char path[FIELD_PATH];
  if (!field_object(f, name, &format) || !format) return format == NULL && f->refusal->status == 0;
  if (!fields_enter(f, format, name, &inside) || !fields_obey(&inside, rules, NULL) || !field_needed_text(&inside, "type", &type))
    return false;
  if (strcmp(type, "text") == 0) return true;
  if (strcmp(type, "json_object") == 0) return obey_json(g, f, name);
  if (strcmp(type, "json_schema") != 0) return field_refuse(&inside, "type", "must be text, json_object or json_schema");
  schema = inside;
  if (nested) {
    if (!fields_enter_field(&inside, "json_schema", path, &schema) || !fields_obey(&schema, rules, NULL)) return false;
  }
  const json_t *text = NULL;
  if (!field(&schema, "schema")) return field_refuse(&schema, "schema", "is missing");
  return field_object(&schema, "schema", &text) && obey_schema(g, text, &schema, "schema");
}
