/*
 * schema.c - a JSON Schema (draft 2020-12, the part that the header names) as a grammar.
 *
 * Every answer that the grammar allows is valid; where the standard leaves more open than a model needs, the grammar takes the
 * narrower side: properties come in the order of the schema, objects whose properties are listed have no others unless
 * additionalProperties says so, and a keyword of one type alone means that type. A keyword that restricts and is not understood
 * is an error that names it and says where, never left out.
 *
 * allOf, and what stands beside $ref or anyOf, is merged into one schema first.
 */
#include "engine/grammar/schema_impl.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
  MOST_REFERENCES = 4096,
  MOST_KEY_BYTES = 256 /* of properties that additional ones must not repeat */
};

static int32_t expression_of(struct schema *s, json_t *schema);

static bool good(const struct schema *s) { return s->b->status == OSCAR_OK; }

#define REFUSE(s, status, format, ...) builder_fail((s)->b, status, "schema at #%s: " format, (s)->path, __VA_ARGS__)

static int32_t no_memory(struct schema *s) { return builder_fail(s->b, OSCAR_NO_MEMORY, "out of memory for a schema"); }

/* A step down of the JSON pointer; what does not fit is cut off, for it is only told. Returns the length before. */
static size_t enter(struct schema *s, const char *keyword, const char *name) {
  const size_t before = s->path_length;
  char step[120];
  size_t n = (size_t)snprintf(step, sizeof step - 2, "/%s%s", keyword, name ? "/" : "");
  for (; name && *name && n < sizeof step - 3; name++) {
    step[n++] = *name == '~' || *name == '/' ? '~' : *name;
    if (*name == '~' || *name == '/') step[n++] = *name == '~' ? '0' : '1';
  }
  step[n] = '\0';
  if (before + n < sizeof s->path) {
    memcpy(s->path + before, step, n + 1);
    s->path_length += n;
  }
  return before;
}

static void leave(struct schema *s, size_t before) {
  s->path_length = before;
  s->path[before] = '\0';
}

static int32_t expression_at(struct schema *s, const char *keyword, const char *name, json_t *schema) {
  const size_t before = enter(s, keyword, name);
  const int32_t e = expression_of(s, schema);
  leave(s, before);
  return e;
}

static int32_t literal(struct schema *s, const char *text) { return expr_literal(s->b, text, strlen(text)); }
static int32_t space(struct schema *s) { return json_space(s->b, s->rules); }
static int32_t gap(struct schema *s) { return json_gap(s->b); }

#define SEQUENCE_OF(s, ...)                                                                                                      \
  expr_sequence((s)->b, (const int32_t[]){__VA_ARGS__}, sizeof((const int32_t[]){__VA_ARGS__}) / sizeof(int32_t))

/* ---- keywords ---- */

static bool is_one_of(const char *word, const char *const *list) {
  for (; *list; list++)
    if (strcmp(word, *list) == 0) return true;
  return false;
}

/* They say something about a value and restrict nothing; words that no draft knows are of this kind, too. */
static bool restricts(const char *keyword) {
  static const char *const known[] = {"$ref",
                                      "type",
                                      "properties",
                                      "required",
                                      "additionalProperties",
                                      "items",
                                      "prefixItems",
                                      "minItems",
                                      "maxItems",
                                      "enum",
                                      "const",
                                      "anyOf",
                                      "oneOf",
                                      "allOf",
                                      "pattern",
                                      "format",
                                      "minLength",
                                      "maxLength",
                                      "minimum",
                                      "maximum",
                                      "exclusiveMinimum",
                                      "exclusiveMaximum",
                                      NULL};
  return is_one_of(keyword, known);
}

static bool is_refused(const char *keyword, const json_t *value) {
  static const char *const refused[] = {"not",
                                        "if",
                                        "then",
                                        "else",
                                        "dependentRequired",
                                        "dependentSchemas",
                                        "dependencies",
                                        "patternProperties",
                                        "propertyNames",
                                        "minProperties",
                                        "maxProperties",
                                        "contains",
                                        "minContains",
                                        "maxContains",
                                        "uniqueItems",
                                        "unevaluatedItems",
                                        "unevaluatedProperties",
                                        "multipleOf",
                                        "additionalItems",
                                        "$dynamicRef",
                                        "$recursiveRef",
                                        NULL};
  return is_one_of(keyword, refused) && !(strcmp(keyword, "uniqueItems") == 0 && json_is_false(value));
}

static bool check_keywords(struct schema *s, json_t *schema) {
  const char *keyword;
  json_t *value;
  json_object_foreach(schema, keyword, value) {
    s->work++;
    if (is_refused(keyword, value)) REFUSE(s, OSCAR_UNSUPPORTED, "the keyword \"%.60s\" is not supported", keyword);
  }
  if (s->work > MOST_WORK)
    REFUSE(s, OSCAR_UNSUPPORTED, "the schema is too large once its parts (more than %d) are merged", MOST_WORK);
  return good(s);
}

int schema_count_restrictions(json_t *schema) {
  int n = 0;
  const char *keyword;
  json_t *value;
  json_object_foreach(schema, keyword, value) n += restricts(keyword);
  return n;
}

/* A whole number, also as 3.0; UINT of a count. false if it is missing; an error if it is none. */
static bool whole_number(struct schema *s, json_t *schema, const char *keyword, int64_t least, int64_t *number) {
  json_t *value = json_object_get(schema, keyword);
  if (!value) return false;
  if (json_is_integer(value)) {
    *number = json_integer_value(value);
  } else if (json_is_real(value) && floor(json_real_value(value)) == json_real_value(value) &&
             fabs(json_real_value(value)) < 0x1p53) {
    *number = (int64_t)json_real_value(value);
  } else {
    REFUSE(s, json_is_real(value) ? OSCAR_UNSUPPORTED : OSCAR_FORMAT, "\"%s\" has to be a whole number", keyword);
    return false;
  }
  if (*number < least) REFUSE(s, OSCAR_FORMAT, "\"%s\" is %lld, which is too small", keyword, (long long)*number);
  return good(s);
}

/* ---- types ---- */

static int type_named(const char *name) {
  static const char *const names[] = {"object", "array", "string", "integer", "number", "boolean", "null"};
  for (int i = 0; i < 7; i++)
    if (name && strcmp(name, names[i]) == 0) return 1 << i;
  return 0;
}

int schema_types_listed(struct schema *s, json_t *type) {
  int types = type_named(json_string_value(type));
  size_t i;
  json_t *name;
  json_array_foreach(type, i, name) {
    const int one = type_named(json_string_value(name));
    if (!one) types = 0;
    if (!one) break;
    types |= one;
  }
  if (!types)
    REFUSE(s, OSCAR_FORMAT, "\"type\" has to be one or several of %s", "object, array, string, integer, number, boolean, null");
  return types & NUMBER ? types & ~INTEGER : types;
}

int schema_types_of(struct schema *s, json_t *schema) {
  static const struct {
    const char *keyword;
    int types;
  } about[] = {{"properties", OBJECT}, {"required", OBJECT},          {"additionalProperties", OBJECT},
               {"items", ARRAY},       {"prefixItems", ARRAY},        {"minItems", ARRAY},
               {"maxItems", ARRAY},    {"pattern", STRING},           {"format", STRING},
               {"minLength", STRING},  {"maxLength", STRING},         {"minimum", INTEGER},
               {"maximum", INTEGER},   {"exclusiveMinimum", INTEGER}, {"exclusiveMaximum", INTEGER}};
  json_t *type = json_object_get(schema, "type");
  if (type) return schema_types_listed(s, type);
  int types = 0;
  for (size_t i = 0; i < ARRAY_LENGTH(about); i++)
    if (json_object_get(schema, about[i].keyword)) types |= about[i].types;
  return types ? types : ANY_TYPE;
}

bool schema_has_type(json_t *value, int types) {
  switch (json_typeof(value)) {
  case JSON_OBJECT:
    return types & OBJECT;
  case JSON_ARRAY:
    return types & ARRAY;
  case JSON_STRING:
    return types & STRING;
  case JSON_INTEGER:
    return types & (INTEGER | NUMBER);
  case JSON_REAL:
    return types & NUMBER;
  case JSON_TRUE:
  case JSON_FALSE:
    return types & BOOLEAN;
  case JSON_NULL:
    return types & NULLS;
  }
  return false;
}

/* ---- constants ---- */

static int32_t scalar(struct schema *s, json_t *value) {
  char *text = NULL;
  for (size_t digits = 15; digits <= 17; digits++) { /* the shortest that is read as the same number */
    free(text);
    text = json_dumps(value, JSON_ENCODE_ANY | JSON_REAL_PRECISION(digits));
    if (!text) return no_memory(s);
    if (!json_is_real(value) || strtod(text, NULL) == json_real_value(value)) break;
  }
  const int32_t e = literal(s, text);
  free(text);
  return e;
}

static int32_t constant(struct schema *s, json_t *value) {
  if (!json_is_object(value) && !json_is_array(value)) return scalar(s, value);
  if (++s->depth > MOST_GRAMMAR_DEPTH)
    return REFUSE(s, OSCAR_UNSUPPORTED, "values are nested more than %d deep", MOST_GRAMMAR_DEPTH);
  struct expr_list parts = {0};
  const char *name;
  json_t *part;
  size_t i;
  const bool object = json_is_object(value);
  bool first = true;
  expr_list_add(s->b, &parts, literal(s, object ? "{" : "["));
  json_object_foreach(value, name, part) {
    json_t *key = json_string(name);
    if (!key) no_memory(s);
    if (!first) expr_list_add(s->b, &parts, SEQUENCE_OF(s, gap(s), literal(s, ",")));
    if (key)
      expr_list_add(s->b, &parts, SEQUENCE_OF(s, space(s), scalar(s, key), gap(s), literal(s, ":"), gap(s), constant(s, part)));
    json_decref(key);
    first = false;
  }
  json_array_foreach(value, i, part) {
    if (i > 0) expr_list_add(s->b, &parts, SEQUENCE_OF(s, gap(s), literal(s, ",")));
    expr_list_add(s->b, &parts, SEQUENCE_OF(s, space(s), constant(s, part)));
  }
  expr_list_add(s->b, &parts, SEQUENCE_OF(s, space(s), literal(s, object ? "}" : "]")));
  s->depth--;
  return expr_list_sequence(s->b, &parts);
}

static int32_t enumeration(struct schema *s, json_t *schema) {
  json_t *values = json_object_get(schema, "enum"), *only = json_object_get(schema, "const"),
         *type = json_object_get(schema, "type");
  const char *keyword = values ? "enum" : "const";
  if (values && !json_is_array(values)) return REFUSE(s, OSCAR_FORMAT, "\"%s\" has to be a list of values", keyword);
  if (schema_count_restrictions(schema) > 1 + (type != NULL) + (values && only))
    return REFUSE(s, OSCAR_UNSUPPORTED, "\"%s\" beside keywords other than \"type\" is not supported", keyword);
  const int types = type ? schema_types_listed(s, type) : ANY_TYPE;
  struct expr_list ways = {0};
  size_t i;
  json_t *value;
  if (!values && schema_has_type(only, types)) expr_list_add(s->b, &ways, constant(s, only));
  json_array_foreach(values, i, value) {
    if (good(s) && schema_has_type(value, types) && (!only || json_equal(value, only)))
      expr_list_add(s->b, &ways, constant(s, value));
  }
  return expr_list_choice(s->b, &ways);
}

/* ---- strings and numbers ---- */

static const char *format_pattern(const char *format) {
#define DATE                                                                                                                     \
  "(\\d{4}-((0[13578]|1[02])-(0[1-9]|[12]\\d|3[01])|(0[469]|11)-(0[1-9]|[12]\\d|30)|02-(0[1-9]|1\\d|2[0-8]))|"                   \
  "(\\d\\d(0[48]|[2468][048]|[13579][26])|([02468][048]|[13579][26])00)-02-29)"
#define TIME  "([01]\\d|2[0-3]):[0-5]\\d:[0-5]\\d(\\.\\d{1,9})?(Z|[+-]([01]\\d|2[0-3]):[0-5]\\d)"
#define LABEL "[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
#define OCTET "(25[0-5]|2[0-4]\\d|1\\d\\d|[1-9]?\\d)"
  static const struct {
    const char *name, *pattern;
  } formats[] = {{"date", "^" DATE "$"}, /* RFC 3339 */
                 {"time", "^" TIME "$"},
                 {"date-time", "^" DATE "T" TIME "$"},
                 {"uuid", "^[0-9a-fA-F]{8}-([0-9a-fA-F]{4}-){3}[0-9a-fA-F]{12}$"},
                 {"ipv4", "^(" OCTET "\\.){3}" OCTET "$"},
                 {"hostname", "^" LABEL "(\\." LABEL "){0,3}$"},
                 {"email", "^[A-Za-z0-9_+-]{1,16}(\\.[A-Za-z0-9_+-]{1,15}){0,2}@" LABEL "(\\." LABEL "){1,3}$"}};
  for (size_t i = 0; i < ARRAY_LENGTH(formats); i++)
    if (strcmp(formats[i].name, format) == 0) return formats[i].pattern;
  return NULL;
}

static int32_t string_of(struct schema *s, json_t *schema) {
  json_t *pattern = json_object_get(schema, "pattern"), *format = json_object_get(schema, "format");
  int64_t least = 0, most = -1;
  const bool counted = (int)whole_number(s, schema, "minLength", 0, &least) | (int)whole_number(s, schema, "maxLength", 0, &most);
  if ((pattern && !json_is_string(pattern)) || (format && !json_is_string(format)))
    return REFUSE(s, OSCAR_FORMAT, "\"%s\" has to be a string", pattern && !json_is_string(pattern) ? "pattern" : "format");
  if ((pattern != NULL) + (format != NULL) + counted > 1)
    return REFUSE(s, OSCAR_UNSUPPORTED, "\"%s\" together with %s is not supported", pattern ? "pattern" : "format",
                  "another keyword for strings");
  const int32_t quote = literal(s, "\"");
  char where[sizeof s->path + 16];
  snprintf(where, sizeof where, "schema at #%s", s->path);
  if (pattern)
    return SEQUENCE_OF(s, quote, json_pattern(s->b, json_string_value(pattern), json_string_length(pattern), where), quote);
  if (format) {
    const char *known = format_pattern(json_string_value(format));
    if (!known) return REFUSE(s, OSCAR_UNSUPPORTED, "the format \"%.60s\" is not supported", json_string_value(format));
    return SEQUENCE_OF(s, quote, json_pattern(s->b, known, strlen(known), where), quote);
  }
  if (!counted) return any_string(s->b, s->rules);
  if (most >= 0 && most < least) return REFUSE(s, OSCAR_FORMAT, "\"%s\" is more than \"maxLength\"", "minLength");
  if (least > MOST_REPETITIONS || most > MOST_REPETITIONS)
    return REFUSE(s, OSCAR_UNSUPPORTED, "lengths above %d are not supported", MOST_REPETITIONS);
  return SEQUENCE_OF(s, quote, expr_repeat(s->b, any_character(s->b, s->rules), least, most), quote);
}

static int32_t integer_of(struct schema *s, json_t *schema) {
  int64_t least = INT64_MIN, most = INT64_MAX, other;
  const bool bounded =
      (int)whole_number(s, schema, "minimum", INT64_MIN, &least) | (int)whole_number(s, schema, "maximum", INT64_MIN, &most);
  bool exclusive = false;
  if (whole_number(s, schema, "exclusiveMinimum", INT64_MIN, &other)) {
    exclusive = true;
    if (other >= least) least = other < INT64_MAX ? other + 1 : other;
  }
  if (whole_number(s, schema, "exclusiveMaximum", INT64_MIN, &other)) {
    exclusive = true;
    if (other <= most) most = other > INT64_MIN ? other - 1 : other;
  }
  if (!bounded && !exclusive) return any_integer(s->b, s->rules);
  if (least < -MOST_JSON_INTEGER) least = -MOST_JSON_INTEGER;
  if (most > MOST_JSON_INTEGER) most = MOST_JSON_INTEGER;
  if (least > most) return REFUSE(s, OSCAR_FORMAT, "no integer is within %s", "\"minimum\" and \"maximum\" (of 18 digits)");
  return json_integer_range(s->b, least, most);
}

static int32_t number_of(struct schema *s, json_t *schema) {
  static const char *const bounds[] = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"};
  for (size_t i = 0; i < ARRAY_LENGTH(bounds); i++)
    if (json_object_get(schema, bounds[i]))
      return REFUSE(s, OSCAR_UNSUPPORTED, "\"%s\" is supported for the type integer only", bounds[i]);
  return any_number(s->b, s->rules);
}

/* ---- arrays ---- */

static int32_t call_to(struct schema *s, const char *name, int32_t expression) {
  const int32_t rule = rule_new(s->b, name, strlen(name));
  rule_define(s->b, rule, expression);
  return expr_call(s->b, rule);
}

static int32_t after_comma(struct schema *s, int32_t element) {
  return SEQUENCE_OF(s, gap(s), literal(s, ","), space(s), element);
}

/* From the end: what may follow element i of those that have schemas of their own. */
static int32_t array_of(struct schema *s, json_t *schema) {
  json_t *items = json_object_get(schema, "items"), *prefix = json_object_get(schema, "prefixItems");
  int64_t least = 0, most = -1;
  (void)whole_number(s, schema, "minItems", 0, &least);
  (void)whole_number(s, schema, "maxItems", 0, &most);
  if (json_is_array(items))
    return REFUSE(s, OSCAR_UNSUPPORTED, "\"%s\" as a list is of older drafts; use \"prefixItems\"", "items");
  if (prefix && !json_is_array(prefix)) return REFUSE(s, OSCAR_FORMAT, "\"%s\" has to be a list of schemas", "prefixItems");
  const int64_t n = (int64_t)json_array_size(prefix);
  if (json_is_false(items) && (most < 0 || most > n)) most = n;
  if (most >= 0 && most < least)
    return REFUSE(s, OSCAR_FORMAT, "at least %lld items, but at most %lld", (long long)least, (long long)most);
  if (least > MOST_REPETITIONS || most > MOST_REPETITIONS)
    return REFUSE(s, OSCAR_UNSUPPORTED, "more than %d items cannot be counted", MOST_REPETITIONS);
  const int64_t own = most >= 0 && most < n ? most : n; /* that can occur */
  int32_t rest = expr_empty(s->b);
  if (most < 0 || most > n) {
    const int32_t item = call_to(s, "item", items ? expression_at(s, "items", NULL, items) : any_value(s->b, s->rules));
    const int64_t first = own == 0; /* has no comma before it */
    rest =
        expr_repeat(s->b, after_comma(s, item), least - n - first > 0 ? least - n - first : 0, most < 0 ? -1 : most - n - first);
    if (first) rest = SEQUENCE_OF(s, space(s), item, rest);
    if (first && least == 0) rest = expr_repeat(s->b, rest, 0, 1);
  }
  for (int64_t i = own - 1; i >= 0 && good(s); i--) {
    char name[24];
    snprintf(name, sizeof name, "%lld", (long long)i);
    const int32_t element = expression_at(s, "prefixItems", name, json_array_get(prefix, (size_t)i));
    rest = SEQUENCE_OF(s, i > 0 ? after_comma(s, element) : SEQUENCE_OF(s, space(s), element), rest);
    if (i >= least) rest = expr_repeat(s->b, rest, 0, 1);
    rest = call_to(s, "items", rest);
  }
  return SEQUENCE_OF(s, literal(s, "["), rest, space(s), literal(s, "]"));
}

/* ---- objects ---- */

static uint32_t first_character(const char *text, size_t *bytes) {
  const uint8_t lead = (uint8_t)text[0];
  *bytes = lead < 0x80 ? 1 : lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4;
  uint32_t c = *bytes == 1 ? lead : lead & (0x7Fu >> *bytes);
  for (size_t i = 1; i < *bytes; i++) c = c << 6 | ((uint8_t)text[i] & 0x3F);
  return c;
}

/* Characters of a key that are not escaped, but for some. */
static int32_t key_character(struct schema *s, const struct char_class *but) {
  struct char_class class = {0};
  for (size_t i = 0; i < but->n; i++) class_add(s->b, &class, but->ranges[i].first, but->ranges[i].last);
  class_add(s->b, &class, 0, 0x1F);
  class_add(s->b, &class, '"', '"');
  class_add(s->b, &class, '\\', '\\');
  class_add(s->b, &class, 0x7F, 0x7F);
  class_invert(s->b, &class);
  const int32_t e = expr_chars(s->b, class.ranges, class.n);
  class_free(&class);
  return e;
}

/* The end of a key, quote included, that makes it none of names [n], sorted, of which the first `at` bytes were read: a
 * character that none of them goes on with, and then anything; or a character of some, and then an end for those. */
static int32_t other_key(struct schema *s, const char *const *names, size_t n, size_t at, int32_t anything) {
  struct expr_list ways = {0};
  struct char_class taken = {0};
  size_t i = 0;
  for (; i < n && names[i][at] == '\0'; i++) continue;
  if (i == 0) expr_list_add(s->b, &ways, literal(s, "\""));
  while (i < n) {
    size_t bytes, end = i + 1;
    const uint32_t c = first_character(names[i] + at, &bytes);
    while (end < n && strncmp(names[end] + at, names[i] + at, bytes) == 0) end++;
    class_add(s->b, &taken, c, c);
    expr_list_add(
        s->b, &ways,
        SEQUENCE_OF(s, expr_literal(s->b, names[i] + at, bytes), other_key(s, names + i, end - i, at + bytes, anything)));
    i = end;
  }
  expr_list_add(s->b, &ways, SEQUENCE_OF(s, key_character(s, &taken), anything));
  class_free(&taken);
  return expr_list_choice(s->b, &ways);
}

static int by_text(const void *a, const void *b) { return strcmp(*(const char *const *)a, *(const char *const *)b); }

/* Keys that hold what is escaped cannot be repeated by keys without escapes. */
static bool needs_escape(const char *name) {
  for (; *name; name++)
    if ((uint8_t)*name < 0x20 || *name == '"' || *name == '\\' || *name == 0x7F) return true;
  return false;
}

static int32_t additional_key(struct schema *s, json_t *properties) {
  const size_t room = json_object_size(properties);
  const char **names = malloc((room + 1) * sizeof *names), *name;
  if (!names) return no_memory(s);
  size_t n = 0;
  json_t *value;
  json_object_foreach(properties, name, value) {
    if (needs_escape(name)) continue;
    if (strlen(name) > MOST_KEY_BYTES)
      REFUSE(s, OSCAR_UNSUPPORTED, "names of more than %d bytes beside \"additionalProperties\" are not supported",
             MOST_KEY_BYTES);
    names[n++] = name;
  }
  qsort(names, n, sizeof *names, by_text);
  const int32_t any = expr_repeat(s->b, key_character(s, &(const struct char_class){0}), 0, -1);
  const int32_t anything = call_to(s, "key", SEQUENCE_OF(s, any, literal(s, "\"")));
  const int32_t e = good(s) ? SEQUENCE_OF(s, literal(s, "\""), other_key(s, names, n, 0, anything)) : 0;
  free(names);
  return e;
}

static bool is_required(json_t *required, const char *name) {
  size_t i;
  json_t *one;
  json_array_foreach(required, i, one) {
    if (json_is_string(one) && strcmp(json_string_value(one), name) == 0) return true;
  }
  return false;
}

/* The properties, and those that are required without being described. Belongs to the caller. */
static json_t *all_properties(struct schema *s, json_t *schema, json_t *others) {
  json_t *described = json_object_get(schema, "properties"), *required = json_object_get(schema, "required");
  if (described && !json_is_object(described)) REFUSE(s, OSCAR_FORMAT, "\"%s\" has to be an object of schemas", "properties");
  if (required && !json_is_array(required)) REFUSE(s, OSCAR_FORMAT, "\"%s\" has to be a list of names", "required");
  json_t *all = good(s) ? json_object() : NULL;
  if (all && described && json_object_update(all, described) != 0) no_memory(s);
  size_t i;
  json_t *name;
  json_array_foreach(required, i, name) {
    if (!all || !good(s)) break;
    if (!json_is_string(name))
      REFUSE(s, OSCAR_FORMAT, "\"%s\" has to be a list of names", "required");
    else if (!json_object_get(all, json_string_value(name)) &&
             (others ? json_object_set(all, json_string_value(name), others)
                     : json_object_set_new(all, json_string_value(name), json_true())) != 0)
      no_memory(s);
  }
  s->work += (int)(json_object_size(all) * (1 + json_array_size(required) / 64)); /* is_required looks through the list */
  if (s->work > MOST_WORK) REFUSE(s, OSCAR_UNSUPPORTED, "the schema is too large: more than %d steps", MOST_WORK);
  return all;
}

static int32_t pair(struct schema *s, const char *name, json_t *schema) {
  json_t *key = json_string(name);
  if (!key) return no_memory(s);
  const int32_t e = SEQUENCE_OF(s, scalar(s, key), gap(s), literal(s, ":"), gap(s), expression_at(s, "properties", name, schema));
  json_decref(key);
  return call_to(s, name, e);
}

/* What is between the braces. From the last property to the first: `some` is one from here on with all after it, `rest` what
 * follows a property, comma included. Both are rules, so that what comes after an optional property is there once. */
static int32_t members(struct schema *s, json_t *properties, json_t *required, int32_t additional) {
  const size_t n = json_object_size(properties);
  struct expr_list pairs = {0};
  bool *needed = malloc((n + 1) * sizeof *needed), all_optional = true;
  if (!needed) return no_memory(s);
  const char *name;
  json_t *value;
  json_object_foreach(properties, name, value) {
    needed[pairs.n] = is_required(required, name);
    expr_list_add(s->b, &pairs, pair(s, name, value));
    if (!good(s)) break;
  }
  int32_t rest = additional ? expr_repeat(s->b, after_comma(s, additional), 0, -1) : expr_empty(s->b);
  int32_t some = additional ? SEQUENCE_OF(s, additional, rest) : expr_choice(s->b, NULL, 0);
  for (size_t i = pairs.n; i > 0 && good(s); i--) {
    const int32_t here = SEQUENCE_OF(s, pairs.parts[i - 1], call_to(s, "members", rest));
    all_optional = all_optional && !needed[i - 1];
    some = call_to(s, "members", needed[i - 1] ? here : expr_choice(s->b, (const int32_t[]){here, some}, 2));
    rest = expr_repeat(s->b, after_comma(s, some), all_optional ? 0 : 1, 1);
  }
  free(needed);
  free(pairs.parts);
  return expr_repeat(s->b, SEQUENCE_OF(s, space(s), some), all_optional ? 0 : 1, 1);
}

static int32_t object_of(struct schema *s, json_t *schema) {
  json_t *others = json_object_get(schema, "additionalProperties"), *required = json_object_get(schema, "required");
  const bool open = others ? !json_is_false(others) : !json_object_get(schema, "properties");
  if (open && !others && !required) return any_object(s->b, s->rules);
  json_t *properties = all_properties(s, schema, others);
  int32_t additional = 0, e = 0;
  if (good(s) && open) {
    const int32_t value = others ? expression_at(s, "additionalProperties", NULL, others) : any_value(s->b, s->rules);
    additional = call_to(s, "additional", SEQUENCE_OF(s, additional_key(s, properties), gap(s), literal(s, ":"), gap(s), value));
  }
  if (good(s)) e = SEQUENCE_OF(s, literal(s, "{"), members(s, properties, required, additional), space(s), literal(s, "}"));
  json_decref(properties);
  return e;
}

/* ---- references ---- */

static int hex_value(char c) {
  return c >= '0' && c <= '9' ? c - '0' : (c | 0x20) >= 'a' && (c | 0x20) <= 'f' ? (c | 0x20) - 'a' + 10 : -1;
}

/* One step of a JSON pointer (RFC 6901, in a URI fragment) into name; returns what is behind it. */
static const char *pointer_step(const char *at, char *name, size_t room) {
  size_t n = 0;
  for (; *at && *at != '/'; at++) {
    char c = *at;
    if (c == '~' && (at[1] == '0' || at[1] == '1')) c = *++at == '0' ? '~' : '/';
    if (c == '%' && hex_value(at[1]) >= 0 && hex_value(at[2]) >= 0) {
      c = (char)(hex_value(at[1]) * 16 + hex_value(at[2]));
      at += 2;
    }
    if (n + 1 < room) name[n++] = c;
  }
  name[n] = '\0';
  return at;
}

json_t *schema_resolve(struct schema *s, json_t *reference) {
  const char *text = json_string_value(reference);
  if (!text || text[0] != '#' || (text[1] && text[1] != '/')) {
    REFUSE(s, OSCAR_UNSUPPORTED, "$ref %.100s: only references into the schema itself (#/$defs/...) are supported",
           text ? text : "");
    return NULL;
  }
  json_t *target = s->root;
  for (const char *at = text + 1; target && *at;) {
    char name[512];
    at = pointer_step(at + 1, name, sizeof name);
    target = json_is_array(target) ? json_array_get(target, (size_t)strtoul(name, NULL, 10)) : json_object_get(target, name);
  }
  if (!target) REFUSE(s, OSCAR_FORMAT, "$ref %.100s leads nowhere", text);
  return target;
}

/* One rule for each target, so that references may go in circles. */
static int32_t reference(struct schema *s, json_t *schema) {
  json_t *target = schema_resolve(s, json_object_get(schema, "$ref"));
  if (!target) return 0;
  for (size_t i = 0; i < s->n_references; i++)
    if (s->references[i].target == target) return expr_call(s->b, s->references[i].rule);
  if (s->n_references >= MOST_REFERENCES)
    return REFUSE(s, OSCAR_UNSUPPORTED, "more than %d references to different places", MOST_REFERENCES);
  if (!room_for((void **)&s->references, &s->reference_room, s->n_references, sizeof *s->references)) return no_memory(s);
  const char *name = json_string_value(json_object_get(schema, "$ref"));
  const int32_t rule = rule_new(s->b, name, strlen(name));
  s->references[s->n_references++] = (struct reference){target, rule};
  rule_define(s->b, rule, expression_of(s, target));
  return expr_call(s->b, rule);
}

/* ---- merging ---- */

static json_t *intersect_types(struct schema *s, json_t *a, json_t *b) {
  static const char *const names[] = {"object", "array", "string", "integer", "number", "boolean", "null"};
  int x = schema_types_listed(s, a), y = schema_types_listed(s, b);
  if (x & NUMBER) x |= INTEGER;
  if (y & NUMBER) y |= INTEGER;
  const int both = x & y;
  json_t *list = json_array();
  for (int i = 0; i < 7; i++)
    if (both >> i & 1 && json_array_append_new(list, json_string(names[i])) != 0) no_memory(s);
  if (good(s) && both == 0) REFUSE(s, OSCAR_FORMAT, "the types of what is merged have nothing in %s", "common");
  return list;
}

static json_t *unite_lists(json_t *a, json_t *b) {
  json_t *list = json_is_array(a) ? json_copy(a) : NULL;
  if (list && (!json_is_array(b) || json_array_extend(list, b) != 0)) {
    json_decref(list);
    return NULL;
  }
  return list;
}

/* A property that both describe is bound by both. */
static json_t *unite_properties(json_t *a, json_t *b) {
  json_t *all = json_is_object(a) ? json_copy(a) : NULL;
  const char *name;
  json_t *value;
  if (!all) return NULL;
  json_object_foreach(b, name, value) {
    json_t *there = json_object_get(all, name);
    if (there && !json_equal(there, value))
      (void)json_object_set_new(all, name, json_pack("{s:[O,O]}", "allOf", there, value));
    else
      (void)json_object_set(all, name, value);
  }
  return all;
}

static json_t *merged_value(struct schema *s, const char *keyword, json_t *a, json_t *b) {
  static const char *const larger[] = {"minimum", "exclusiveMinimum", "minLength", "minItems", NULL};
  static const char *const smaller[] = {"maximum", "exclusiveMaximum", "maxLength", "maxItems", NULL};
  if (json_equal(a, b)) return json_incref(a);
  if (strcmp(keyword, "type") == 0) return intersect_types(s, a, b);
  if (strcmp(keyword, "required") == 0 || strcmp(keyword, "allOf") == 0) return unite_lists(a, b);
  if (strcmp(keyword, "properties") == 0) return unite_properties(a, b);
  const bool up = is_one_of(keyword, larger), down = is_one_of(keyword, smaller);
  if ((up || down) && json_is_number(a) && json_is_number(b))
    return json_incref((json_number_value(a) > json_number_value(b)) == up ? a : b);
  REFUSE(s, OSCAR_UNSUPPORTED, "two schemas with different \"%.60s\" cannot be merged", keyword);
  return NULL;
}

/* additionalProperties is about the properties beside it, so those of another schema must be among them. */
static void check_closed(struct schema *s, json_t *closed, json_t *other) {
  json_t *known = json_object_get(closed, "properties");
  const char *name;
  json_t *value;
  if (!json_object_get(closed, "additionalProperties") || json_is_true(json_object_get(closed, "additionalProperties"))) return;
  json_object_foreach(json_object_get(other, "properties"), name, value) {
    if (!json_object_get(known, name))
      REFUSE(s, OSCAR_UNSUPPORTED, "\"additionalProperties\" of one schema and \"%.60s\" of another cannot be merged", name);
  }
}

/* Both at once; kept to the end. NULL after an error. */
static json_t *merge(struct schema *s, json_t *a, json_t *b) {
  if (json_is_true(a)) return b;
  if (json_is_true(b)) return a;
  if (!json_is_object(a) || !json_is_object(b)) return json_is_false(a) ? a : b;
  check_closed(s, a, b);
  check_closed(s, b, a);
  json_t *merged = good(s) ? json_copy(a) : NULL;
  const char *keyword;
  json_t *value;
  json_object_foreach(b, keyword, value) {
    s->work++;
    json_t *there = json_object_get(a, keyword);
    if (!merged || (there && !restricts(keyword) && !is_refused(keyword, value))) continue;
    json_t *both = there ? merged_value(s, keyword, there, value) : json_incref(value);
    if (good(s) && (!both || json_object_set(merged, keyword, both) != 0))
      REFUSE(s, OSCAR_FORMAT, "\"%.60s\" cannot be merged", keyword);
    json_decref(both);
  }
  s->work += (int)json_object_size(merged);
  if (merged && json_array_append_new(s->made, merged) != 0) no_memory(s);
  return good(s) ? merged : NULL;
}

/* The schema without some keyword; kept to the end. */
static json_t *without(struct schema *s, json_t *schema, const char *keyword) {
  json_t *copy = json_copy(schema);
  if (!copy || json_array_append_new(s->made, copy) != 0) {
    no_memory(s);
    return NULL;
  }
  (void)json_object_del(copy, keyword);
  s->work += (int)json_object_size(copy);
  return copy;
}

/* A reference with keywords beside it: the target with them. */
static int32_t reference_and_more(struct schema *s, json_t *schema) {
  json_t *target = schema_resolve(s, json_object_get(schema, "$ref")), *rest = target ? without(s, schema, "$ref") : NULL;
  json_t *both = rest ? merge(s, rest, target) : NULL;
  return both ? expression_of(s, both) : 0;
}

static int32_t all_of(struct schema *s, json_t *schema) {
  json_t *list = json_object_get(schema, "allOf"), *part, *both = without(s, schema, "allOf");
  if (!json_is_array(list)) return REFUSE(s, OSCAR_FORMAT, "\"%s\" has to be a list of schemas", "allOf");
  size_t i;
  json_array_foreach(list, i, part) {
    json_t *target = json_object_get(part, "$ref") ? schema_resolve(s, json_object_get(part, "$ref")) : NULL;
    if (good(s) && target) part = merge(s, without(s, part, "$ref"), target);
    if (good(s) && both) both = merge(s, both, part);
  }
  return good(s) && both ? expression_of(s, both) : 0;
}

/* Whether an answer could fit two of the alternatives of oneOf. One that is written for any of them fits that one; that it fits
 * no other has to be seen. */
static bool check_exclusive(struct schema *s, json_t *ways) {
  for (size_t i = 0; i < json_array_size(ways); i++)
    for (size_t k = 0; k < json_array_size(ways) && good(s); k++)
      if (i != k && !schema_excludes(s, json_array_get(ways, i), json_array_get(ways, k)) && good(s))
        REFUSE(
            s, OSCAR_UNSUPPORTED,
            "\"oneOf\": what fits alternative %zu may fit %zu, too; what tells them apart is another type, a required property "
            "with another \"const\" or \"enum\", other bounds, or required properties that the others do not have; if it does "
            "not "
            "matter, write \"anyOf\"",
            i, k);
  return good(s);
}

/* The alternatives, each with the keywords beside them; kept to the end. */
static json_t *alternatives(struct schema *s, json_t *schema, const char *keyword) {
  json_t *list = json_object_get(schema, keyword), *rest = without(s, schema, keyword), *part, *ways = json_array();
  if (!rest || !ways || json_array_append_new(s->made, ways) != 0) {
    no_memory(s);
    return NULL;
  }
  const bool alone = schema_count_restrictions(rest) == 0;
  size_t i;
  json_array_foreach(list, i, part) {
    char name[24];
    snprintf(name, sizeof name, "%zu", i);
    const size_t before = enter(s, keyword, name);
    json_t *both = alone ? part : merge(s, rest, part);
    if (good(s) && json_array_append(ways, both) != 0) no_memory(s);
    leave(s, before);
  }
  return good(s) ? ways : NULL;
}

static int32_t any_of(struct schema *s, json_t *schema, const char *keyword) {
  json_t *way;
  size_t i;
  if (!json_is_array(json_object_get(schema, keyword)))
    return REFUSE(s, OSCAR_FORMAT, "\"%s\" has to be a list of schemas", keyword);
  json_t *ways = alternatives(s, schema, keyword);
  struct expr_list written = {0};
  json_array_foreach(ways, i, way) {
    char name[24];
    snprintf(name, sizeof name, "%zu", i);
    if (good(s)) expr_list_add(s->b, &written, expression_at(s, keyword, name, way));
  }
  if (good(s) && strcmp(keyword, "oneOf") == 0) check_exclusive(s, ways);
  return expr_list_choice(s->b, &written);
}

/* ---- a schema ---- */

static int32_t typed(struct schema *s, json_t *schema) {
  const int types = schema_types_of(s, schema);
  if (types == ANY_TYPE && schema_count_restrictions(schema) == 0) return any_value(s->b, s->rules);
  struct expr_list ways = {0};
  if (types & OBJECT) expr_list_add(s->b, &ways, object_of(s, schema));
  if (types & ARRAY) expr_list_add(s->b, &ways, array_of(s, schema));
  if (types & STRING) expr_list_add(s->b, &ways, string_of(s, schema));
  if (types & INTEGER) expr_list_add(s->b, &ways, integer_of(s, schema));
  if (types & NUMBER) expr_list_add(s->b, &ways, number_of(s, schema));
  if (types & BOOLEAN) expr_list_add(s->b, &ways, literal(s, "true"));
  if (types & BOOLEAN) expr_list_add(s->b, &ways, literal(s, "false"));
  if (types & NULLS) expr_list_add(s->b, &ways, literal(s, "null"));
  return expr_list_choice(s->b, &ways);
}

static int32_t dispatch(struct schema *s, json_t *schema) {
  json_t *ref = json_object_get(schema, "$ref");
  if (ref) return schema_count_restrictions(schema) == 1 ? reference(s, schema) : reference_and_more(s, schema);
  if (json_object_get(schema, "allOf")) return all_of(s, schema);
  if (json_object_get(schema, "anyOf")) return any_of(s, schema, "anyOf");
  if (json_object_get(schema, "oneOf")) return any_of(s, schema, "oneOf");
  if (json_object_get(schema, "enum") || json_object_get(schema, "const")) return enumeration(s, schema);
  return typed(s, schema);
}

static int32_t expression_of(struct schema *s, json_t *schema) {
  if (!good(s)) return 0;
  if (json_is_true(schema)) return any_value(s->b, s->rules);
  if (json_is_false(schema)) return expr_choice(s->b, NULL, 0);
  if (!json_is_object(schema)) return REFUSE(s, OSCAR_FORMAT, "a schema has to be %s", "an object, true or false");
  if (!check_keywords(s, schema)) return 0;
  if (++s->depth > MOST_GRAMMAR_DEPTH)
    return REFUSE(s, OSCAR_UNSUPPORTED, "schemas are nested more than %d deep", MOST_GRAMMAR_DEPTH);
  const int32_t e = dispatch(s, schema);
  s->depth--;
  return e;
}

int32_t schema_expression(struct builder *b, struct json_rules *rules, const char *schema, size_t bytes) {
  if (bytes > MOST_GRAMMAR_BYTES)
    return builder_fail(b, OSCAR_UNSUPPORTED, "a schema of %zu bytes; at most %d are read", bytes, MOST_GRAMMAR_BYTES);
  json_error_t error;
  struct schema s = {.b = b, .rules = rules, .root = json_loadb(schema, bytes, JSON_DECODE_ANY, &error), .made = json_array()};
  int32_t e = 0;
  if (!s.root)
    builder_fail(b, OSCAR_FORMAT, "the schema is not JSON: line %d, column %d: %s", error.line, error.column, error.text);
  else if (!s.made)
    no_memory(&s);
  else
    e = expression_of(&s, s.root);
  free(s.references);
  json_decref(s.root);
  json_decref(s.made);
  return e;
}

oscar_status grammar_of_schema(const char *schema, size_t bytes, struct grammar **grammar, char *error, size_t error_bytes) {
  struct builder b;
  struct json_rules rules = {0};
  builder_begin(&b, error, error_bytes);
  const int32_t root = rule_new(&b, "the schema", 10);
  rule_define(&b, root, schema_expression(&b, &rules, schema, bytes));
  return builder_finish(&b, root, grammar);
}

oscar_status grammar_of_forms(const struct grammar_form *forms, int n_forms, struct grammar **grammar, char *error,
                              size_t error_bytes) {
  struct builder b;
  struct json_rules rules = {0};
  struct expr_list ways = {0};
  builder_begin(&b, error, error_bytes);
  for (int i = 0; i < n_forms; i++) {
    struct expr_list parts = {0};
    for (int k = 0; k < forms[i].n_parts; k++) {
      const struct grammar_part *part = &forms[i].parts[k];
      expr_list_add(&b, &parts,
                    part->literal ? expr_literal(&b, part->literal, strlen(part->literal))
                                  : schema_expression(&b, &rules, part->schema, strlen(part->schema)));
    }
    expr_list_add(&b, &ways, expr_list_sequence(&b, &parts));
  }
  const int32_t root = rule_new(&b, "the forms", 9);
  rule_define(&b, root, expr_list_choice(&b, &ways));
  return builder_finish(&b, root, grammar);
}
