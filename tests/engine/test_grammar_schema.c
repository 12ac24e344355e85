/*
 * JSON Schemas as grammars. What a grammar allows is checked by a small validator of this file that knows the standard and
 * nothing of grammars: random walks write answers, which are parsed and judged. What should fit and what should not is written
 * down; integers and regular expressions are compared with arithmetic and with PCRE2.
 */
#include "grammar_walk.h"

#include <jansson.h>
#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

/* ---- the validator ---- */

static json_t *find_reference(json_t *root, const char *reference) {
  char copy[200], *rest;
  snprintf(copy, sizeof copy, "%s", reference);
  for (char *step = strtok_r(copy, "/", &rest); (step = strtok_r(NULL, "/", &rest));) root = json_object_get(root, step);
  assert_non_null(root);
  return root;
}

static bool pattern_found(const char *pattern, const char *text, size_t bytes) {
  int code;
  size_t at;
  pcre2_code *compiled =
      pcre2_compile((PCRE2_SPTR)pattern, PCRE2_ZERO_TERMINATED, PCRE2_UTF | PCRE2_DOLLAR_ENDONLY, &code, &at, NULL);
  if (!compiled) fail_msg("PCRE2 does not take %s", pattern);
  pcre2_match_data *data = pcre2_match_data_create_from_pattern(compiled, NULL);
  const int found = pcre2_match(compiled, (PCRE2_SPTR)text, bytes, 0, 0, data, NULL);
  pcre2_match_data_free(data);
  pcre2_code_free(compiled);
  return found >= 0;
}

static bool is_type(json_t *value, const char *type) {
  const json_type t = json_typeof(value);
  if (strcmp(type, "object") == 0) return t == JSON_OBJECT;
  if (strcmp(type, "array") == 0) return t == JSON_ARRAY;
  if (strcmp(type, "string") == 0) return t == JSON_STRING;
  if (strcmp(type, "null") == 0) return t == JSON_NULL;
  if (strcmp(type, "boolean") == 0) return t == JSON_TRUE || t == JSON_FALSE;
  if (strcmp(type, "integer") == 0)
    return t == JSON_INTEGER || (t == JSON_REAL && floor(json_real_value(value)) == json_real_value(value));
  return t == JSON_INTEGER || t == JSON_REAL;
}

static double bound(json_t *schema, const char *keyword, double missing) {
  json_t *value = json_object_get(schema, keyword);
  return value ? json_number_value(value) : missing;
}

static size_t characters(const char *text) {
  size_t n = 0;
  for (; *text; text++) n += ((uint8_t)*text & 0xC0) != 0x80;
  return n;
}

static bool valid(json_t *root, json_t *schema, json_t *value);

static bool valid_object(json_t *root, json_t *schema, json_t *value) {
  json_t *properties = json_object_get(schema, "properties"), *others = json_object_get(schema, "additionalProperties"), *name,
         *part;
  const char *key;
  size_t i;
  json_array_foreach(json_object_get(schema, "required"), i,
                     name) if (!json_object_get(value, json_string_value(name))) return false;
  json_object_foreach(value, key, part) {
    json_t *known = json_object_get(properties, key), *by = known ? known : others;
    if (by && !valid(root, by, part)) return false;
  }
  return true;
}

static bool valid_array(json_t *root, json_t *schema, json_t *value) {
  json_t *prefix = json_object_get(schema, "prefixItems"), *items = json_object_get(schema, "items"), *part;
  size_t i;
  if ((double)json_array_size(value) < bound(schema, "minItems", 0) ||
      (double)json_array_size(value) > bound(schema, "maxItems", 1e9))
    return false;
  json_array_foreach(value, i, part) {
    json_t *by = i < json_array_size(prefix) ? json_array_get(prefix, i) : items;
    if (by && !valid(root, by, part)) return false;
  }
  return true;
}

static bool valid(json_t *root, json_t *schema, json_t *value) {
  json_t *type = json_object_get(schema, "type"), *part;
  size_t i, fits = 0;
  if (json_is_true(schema)) return true;
  if (json_is_false(schema)) return false;
  if (json_object_get(schema, "$ref") &&
      !valid(root, find_reference(root, json_string_value(json_object_get(schema, "$ref"))), value))
    return false;
  json_array_foreach(json_object_get(schema, "allOf"), i, part) if (!valid(root, part, value)) return false;
  json_array_foreach(json_object_get(schema, "anyOf"), i, part) fits += valid(root, part, value);
  if (json_object_get(schema, "anyOf") && fits == 0) return false;
  fits = 0;
  json_array_foreach(json_object_get(schema, "oneOf"), i, part) fits += valid(root, part, value);
  if (json_object_get(schema, "oneOf") && fits != 1) return false;
  fits = 0;
  json_array_foreach(type, i, part) fits += is_type(value, json_string_value(part));
  if (json_is_array(type) ? fits == 0 : type && !is_type(value, json_string_value(type))) return false;
  fits = 0;
  json_array_foreach(json_object_get(schema, "enum"), i, part) fits += (size_t)json_equal(part, value);
  if (json_object_get(schema, "enum") && fits == 0) return false;
  if (json_object_get(schema, "const") && !json_equal(json_object_get(schema, "const"), value)) return false;
  if (json_is_number(value)) {
    const double x = json_number_value(value);
    return x >= bound(schema, "minimum", -INFINITY) && x <= bound(schema, "maximum", INFINITY) &&
           x > bound(schema, "exclusiveMinimum", -INFINITY) && x < bound(schema, "exclusiveMaximum", INFINITY);
  }
  if (json_is_string(value)) {
    const double n = (double)characters(json_string_value(value));
    json_t *pattern = json_object_get(schema, "pattern");
    return n >= bound(schema, "minLength", 0) && n <= bound(schema, "maxLength", 1e9) &&
           (!pattern || pattern_found(json_string_value(pattern), json_string_value(value), json_string_length(value)));
  }
  return json_is_object(value) ? valid_object(root, schema, value) : !json_is_array(value) || valid_array(root, schema, value);
}

/* ---- random walks ---- */

static struct grammar *grammar_for(const char *schema) {
  struct grammar *g = NULL;
  char error[512] = "";
  if (grammar_of_schema(schema, strlen(schema), &g, error, sizeof error) != OSCAR_OK) fail_msg("%s: %s", schema, error);
  return g;
}

static struct test_vocabulary *json_vocabulary(void) {
  static const char *const pieces[] = {"{\"",   "\":",    "\": ", "\",",      "\", \"",  "\"}",      "\"]",      "},",    "}]",
                                       "]}",    "[\"",    "[{",   "{}",       "[]",      "}}",       "true",     "false", "null",
                                       " null", "tr",     "nul",  "\\u",      "\\n",     "\\\"",     "\\\\",     "\n  ",  "\n",
                                       ",\n ",  "  ",     "0.",   "12",       "-1",      "e+",       "E-",       "00",    "é",
                                       "\xC3",  "\xA9\"", "日",   "\xE6\x97", "😀",       "\xF0\x9F", "\x98\x80", "name",  "na",
                                       "me\"",  "id",     "kind", "\"a\"",    "\"b\"",   "a\":",     "b\":",     "abc",   "2024",
                                       "-0",    ":",      "T1",   "Z\"",      "\\ud83d", "\\ude00",  "d8",       "DC"};
  return vocabulary_make("ab01\"{}[]:, ", 150, pieces, (int)ARRAY_LENGTH(pieces), 17);
}

static bool closes(const struct token_spelling *s) {
  return s->bytes > 0 && (s->text[0] == '"' || s->text[0] == '}' || s->text[0] == ']');
}

/* Any allowed token, later on rather one that closes something. Returns the bytes written; 0: too long. */
static size_t random_answer(const struct grammar *g, const struct test_vocabulary *v, uint64_t *random, char *text, size_t room) {
  struct grammar_state *s;
  uint64_t allowed[64];
  size_t n = 0;
  assert_int_equal(grammar_state_create(g, v->table, &s), OSCAR_OK);
  for (int step = 0;; step++) {
    int32_t few[4096], closing[4096];
    int n_few = 0, n_closing = 0;
    if (step % 7 == 0) {
      check_mask(s, v->table, allowed);
    } else {
      assert_int_equal(grammar_allowed(s, allowed), OSCAR_OK);
    }
    const bool may_end = grammar_may_end(s);
    assert_int_equal(bit_of(allowed, v->end), may_end);
    if (may_end && (step > 60 || test_random(random) % 4 == 0 || grammar_must_end(s))) break;
    for (int32_t id = 0; id < v->end; id++) {
      if (!bit_of(allowed, id)) continue;
      few[n_few++] = id;
      if (closes(&v->spelling[id])) closing[n_closing++] = id;
    }
    if (n_few == 0) fail_msg("a dead end after %.*s", (int)n, text);
    const bool close = n_closing > 0 && test_random(random) % 10 < (step < 20 ? 3u : step < 60 ? 6u : 10u);
    const int32_t id = close ? closing[test_random(random) % (unsigned)n_closing] : few[test_random(random) % (unsigned)n_few];
    assert_int_equal(grammar_accept(s, id), OSCAR_OK);
    if (n + 16 > room || step > 2000) {
      n = 0;
      break;
    }
    memcpy(text + n, v->spelling[id].text, v->spelling[id].bytes);
    n += v->spelling[id].bytes;
  }
  grammar_state_free(s);
  return n;
}

static const char *const schemas[] = {
    "{\"type\":\"object\"}",
    "{\"type\":\"object\",\"properties\":{\"name\":{\"type\":\"string\"},\"id\":{\"type\":\"integer\"},\"kind\":{\"enum\":[\"a\","
    "1,null,2.5,{\"x\":[1,\"y\"]}]}},"
    "\"required\":[\"id\"],\"additionalProperties\":false}",
    "{\"type\":\"object\",\"properties\":{\"a\":{\"type\":\"boolean\"},\"abc\":{\"type\":\"null\"},\"é\":{\"const\":1}},"
    "\"additionalProperties\":{\"type\":\"string\"}}",
    "{\"type\":\"object\",\"properties\":{\"a\":{\"const\":\"x\"}},\"required\":[\"b\",\"a\"],\"additionalProperties\":{\"type\":"
    "\"integer\"}}",
    "{\"type\":\"array\",\"items\":{\"type\":\"integer\",\"minimum\":-5,\"maximum\":120},\"minItems\":2,\"maxItems\":4}",
    "{\"type\":\"array\",\"prefixItems\":[{\"type\":\"string\"},{\"type\":\"integer\"},{\"type\":\"boolean\"}],\"items\":{"
    "\"type\":\"null\"},\"minItems\":1}",
    "{\"type\":\"array\",\"prefixItems\":[{\"type\":\"string\"},{\"type\":\"integer\"}],\"items\":false,\"minItems\":2}",
    "{\"prefixItems\":[{\"type\":\"integer\"},true],\"maxItems\":1}",
    "{\"type\":[\"string\",\"integer\",\"null\"],\"maxLength\":3,\"minLength\":1,\"minimum\":7}",
    "{\"type\":\"string\",\"minLength\":2,\"maxLength\":4}",
    "{\"type\":\"string\",\"pattern\":\"^[a-c]+(-[0-9]{2,3})?$\"}",
    "{\"type\":\"string\",\"pattern\":\"b[^x\\\"]\\\\d|^\\\\s+$|\\\\\\\\\"}",
    "{\"anyOf\":[{\"type\":\"object\",\"properties\":{\"a\":{\"type\":\"integer\"}},\"required\":[\"a\"],"
    "\"additionalProperties\":false},{\"type\":\"number\"},"
    "{\"type\":\"array\",\"items\":{\"$ref\":\"#\"}}]}",
    "{\"oneOf\":[{\"type\":\"string\"},{\"type\":\"boolean\"}]}",
    "{\"$ref\":\"#/$defs/"
    "tree\",\"$defs\":{\"tree\":{\"type\":\"object\",\"properties\":{\"name\":{\"type\":\"string\"},\"kids\":{\"type\":\"array\","
    "\"items\":"
    "{\"$ref\":\"#/$defs/tree\"}}},\"required\":[\"name\"],\"additionalProperties\":false}}}",
    "{\"allOf\":[{\"type\":\"object\",\"properties\":{\"a\":{\"type\":\"integer\",\"minimum\":3}},\"required\":[\"a\"]},{"
    "\"properties\":{\"a\":{\"maximum\":40},\"b\":"
    "{\"type\":\"string\"}},\"required\":[\"b\"]}]}",
    "{\"type\":\"object\",\"properties\":{\"id\":{\"$ref\":\"#/$defs/"
    "n\",\"maximum\":9},\"kind\":{\"type\":\"string\",\"anyOf\":[{\"maxLength\":2},{\"pattern\":\"^b+$\"}]}},"
    "\"$defs\":{\"n\":{\"type\":\"integer\",\"minimum\":0}},\"additionalProperties\":false}",
    "{\"type\":\"integer\",\"exclusiveMinimum\":-13,\"exclusiveMaximum\":1005}",
    "{\"type\":\"number\"}",
    "{\"enum\":[\"x\\\"\\\\\\n\",\"日本\",-1.5e-7,123456789012345678,[],{},[[1],{\"a\":{}}]]}",
    "{}",
    "true",
};

static void random_answers_are_valid(void **state) {
  (void)state;
  struct test_vocabulary *v = json_vocabulary();
  uint64_t random = 31;
  for (size_t i = 0; i < ARRAY_LENGTH(schemas); i++) {
    struct grammar *g = grammar_for(schemas[i]);
    json_t *schema = json_loads(schemas[i], JSON_DECODE_ANY, NULL);
    int judged = 0;
    for (int round = 0; round < 25; round++) {
      static char text[16384];
      const size_t n = random_answer(g, v, &random, text, sizeof text);
      if (n == 0) continue;
      json_error_t error;
      json_t *value = json_loadb(text, n, JSON_DECODE_ANY, &error);
      if (!value) fail_msg("%s\n%.*s: %s", schemas[i], (int)n, text, error.text);
      if (!valid(schema, schema, value)) fail_msg("%s\n%.*s", schemas[i], (int)n, text);
      json_decref(value);
      judged++;
    }
    assert_true(judged > 5);
    json_decref(schema);
    grammar_free(g);
  }
  vocabulary_free_all(v);
}

/* ---- what fits and what does not ---- */

static void what_fits_is_taken(void **state) {
  (void)state;
  static const struct {
    const char *schema, *yes[8], *no[8];
  } cases[] = {
      {"{\"type\":\"object\",\"properties\":{\"a\":{\"type\":\"integer\"},\"b\":{\"type\":\"string\"},\"c\":{\"type\":\"null\"}},"
       "\"required\":[\"b\"]}",
       {"{\"b\":\"\"}", "{\"a\":1,\"b\":\"x\"}", "{\"b\":\"x\",\"c\":null}", "{ \"a\" : -7 , \"b\" : \"x\" }",
        "{\n  \"b\": \"é\\u00e9\\n\"\n}"},
       {"{}", "{\"a\":1}", "{\"b\":\"x\",\"a\":1}", "{\"b\":\"x\",}", "{\"b\":\"x\",\"d\":1}", "{\"b\":\"\n\"}",
        "{   \"b\":\"\"}", " {\"b\":\"\"}"}},
      {"{\"type\":\"object\",\"properties\":{\"a\":{\"type\":\"integer\"},\"b\":{\"type\":\"integer\"}}}",
       {"{}", "{ }", "{\"a\":1}", "{\"b\":1}", "{\"a\":0,\"b\":10}"},
       {"{,\"b\":1}", "{\"a\":01}", "{\"a\":1.5}", "{\"a\":-0}", "{\"a\":+1}"}},
      {"{\"type\":\"object\",\"properties\":{\"ab\":{\"type\":\"integer\"},\"ac\":{\"type\":\"integer\"}},"
       "\"additionalProperties\":{\"type\":\"null\"}}",
       {"{\"x\":null}", "{\"a\":null}", "{\"abc\":null}", "{\"\":null}", "{\"ab\":1,\"é\":null,\"ad\":null}"},
       {"{\"ab\":null}", "{\"ac\":null}", "{\"x\":null,\"ab\":1}", "{\"x\":1}", "{\"\\u0061b\":null}"}},
      {"{\"type\":\"object\",\"additionalProperties\":false}", {"{}"}, {"{\"a\":1}"}},
      {"{\"type\":\"number\"}", {"0", "-0", "-1.5", "1e5", "2E-3", "10.25e+7"}, {"01", ".5", "1.", "1e", "+1", "NaN", "--1"}},
      {"{\"type\":\"string\"}",
       {"\"\"", "\"\\\\\\\"\\/\\b\\f\\n\\r\\t\"", "\"\\ud83D\\uDe00\"", "\"\\u0001\"", "\"\xF0\x9F\x98\x80\""},
       {"\"", "\"\t\"", "\"\\ud83d\"", "\"\\ude00\"", "\"\\u0000\"", "\"\\x41\"", "\"\xC3\"", "\"\x7F\""}},
      {"{\"type\":\"string\",\"minLength\":2,\"maxLength\":2}",
       {"\"ab\"", "\"é日\"", "\"\\n\\u00e9\"", "\"\\ud83d\\ude00x\""},
       {"\"a\"", "\"abc\"", "\"\""}},
      {"{\"format\":\"date\"}",
       {"\"2024-02-29\"", "\"2000-02-29\"", "\"2023-12-31\"", "\"1999-04-30\""},
       {"\"2023-02-29\"", "\"1900-02-29\"", "\"2023-04-31\"", "\"2023-13-01\"", "\"2023-00-10\"", "\"23-01-01\""}},
      {"{\"format\":\"date-time\"}",
       {"\"2024-02-29T23:59:59Z\"", "\"2024-01-01T00:00:00.123+05:30\""},
       {"\"2024-01-01T24:00:00Z\"", "\"2024-01-01 00:00:00Z\"", "\"2024-01-01T00:00:00\""}},
      {"{\"format\":\"uuid\"}",
       {"\"123e4567-e89b-12d3-a456-426614174000\""},
       {"\"123e4567e89b12d3a456426614174000\"", "\"g23e4567-e89b-12d3-a456-426614174000\""}},
      {"{\"format\":\"ipv4\"}", {"\"127.0.0.1\"", "\"255.255.255.255\""}, {"\"256.0.0.1\"", "\"1.2.3\"", "\"01.2.3.4\""}},
      {"{\"type\":\"array\",\"maxItems\":0}", {"[]", "[ ]"}, {"[1]"}},
      {"{\"type\":\"array\",\"prefixItems\":[{\"const\":1},{\"const\":2},{\"const\":3}],\"items\":{\"const\":9},\"minItems\":2,"
       "\"maxItems\":5}",
       {"[1,2]", "[1,2,3]", "[1, 2, 3, 9]", "[1,2,3,9,9]"},
       {"[]", "[1]", "[1,2,9]", "[1,2,3,9,9,9]", "[,1,2]"}},
      {"{\"anyOf\":[{\"type\":\"string\"},{\"type\":\"null\"}],\"description\":\"x\",\"default\":null}",
       {"null", "\"x\""},
       {"1", "nul"}},
      {"{\"type\":\"boolean\",\"enum\":[true,1,\"a\"]}", {"true"}, {"1", "\"a\"", "false"}},
      {"{\"enum\":[0.1,1e300,-3]}", {"0.1", "-3"}, {"0.10", "0.10000000000000001"}},
      {"{\"$ref\":\"#/$defs/a~1b%20c\",\"$defs\":{\"a/b c\":{\"const\":5}}}", {"5"}, {"6"}},
      {"{\"type\":\"string\",\"pattern\":\"a\\\"b\\n\"}", {"\"xa\\\"b\\ny\"", "\"a\\\"b\\n\""}, {"\"a\\\"b\"", "\"a\""}},
      {"{\"type\":\"object\",\"required\":[\"x\"]}", {"{\"x\":1}", "{\"x\":[],\"y\":{}}"}, {"{}", "{\"y\":1}"}},
  };
  struct test_vocabulary *v = json_vocabulary();
  for (size_t i = 0; i < ARRAY_LENGTH(cases); i++) {
    struct grammar *g = grammar_for(cases[i].schema);
    for (int k = 0; k < 8 && cases[i].yes[k]; k++)
      if (grammar_fit(g, v->table, cases[i].yes[k], strlen(cases[i].yes[k])) != FITS_SENTENCE)
        fail_msg("%s refuses %s", cases[i].schema, cases[i].yes[k]);
    for (int k = 0; k < 8 && cases[i].no[k]; k++)
      if (grammar_fit(g, v->table, cases[i].no[k], strlen(cases[i].no[k])) == FITS_SENTENCE)
        fail_msg("%s takes %s", cases[i].schema, cases[i].no[k]);
    grammar_free(g);
  }
  vocabulary_free_all(v);
}

/* ---- oneOf ---- */

/* Alternatives of which any two may stand together; their shared parts are at #/$defs. */
static const char *const alternatives[] = {
    "true",
    "false",
    "{\"type\":\"null\"}",
    "{\"type\":\"boolean\"}",
    "{\"type\":\"integer\"}",
    "{\"type\":\"integer\",\"minimum\":5}",
    "{\"type\":\"integer\",\"exclusiveMaximum\":5}",
    "{\"type\":\"integer\",\"maximum\":5}",
    "{\"type\":\"number\"}",
    "{\"minimum\":3,\"maximum\":4}",
    "{\"type\":\"string\",\"maxLength\":2}",
    "{\"type\":\"string\",\"minLength\":3,\"maxLength\":5}",
    "{\"minLength\":1,\"maxLength\":3}",
    "{\"type\":[\"string\",\"null\"]}",
    "{\"const\":\"a\"}",
    "{\"const\":\"abc\"}",
    "{\"const\":4}",
    "{\"const\":4.0}",
    "{\"const\":{\"a\":1}}",
    "{\"enum\":[\"b\",\"abcd\",7,null]}",
    "{\"type\":\"string\",\"enum\":[\"b\",7]}",
    "{\"type\":\"array\",\"items\":{\"const\":1},\"maxItems\":1}",
    "{\"type\":\"array\",\"items\":{\"const\":1},\"minItems\":2,\"maxItems\":3}",
    "{\"type\":\"object\",\"properties\":{\"a\":{\"type\":\"integer\"}}}",
    "{\"type\":\"object\",\"properties\":{\"a\":{\"type\":\"integer\"}},\"required\":[\"a\"]}",
    "{\"type\":\"object\",\"properties\":{\"b\":{\"type\":\"integer\"}},\"required\":[\"b\"]}",
    "{\"properties\":{\"b\":{\"type\":\"integer\"}},\"required\":[\"b\"]}",
    "{\"type\":\"object\",\"properties\":{\"a\":{\"type\":\"null\"},\"b\":{\"const\":2}},\"required\":[\"a\"]}",
    "{\"type\":\"object\",\"properties\":{\"a\":{\"const\":1}},\"required\":[\"a\"],\"additionalProperties\":{\"type\":\"null\"}"
    "}",
    "{\"type\":\"object\",\"required\":[\"b\"],\"additionalProperties\":{\"const\":2}}",
    "{\"type\":\"object\",\"additionalProperties\":false}",
    "{\"$ref\":\"#/$defs/cat\"}",
    "{\"$ref\":\"#/$defs/dog\"}",
    "{\"$ref\":\"#/$defs/cat\",\"required\":[\"b\"]}",
    "{\"allOf\":[{\"$ref\":\"#/$defs/dog\"},{\"properties\":{\"b\":{\"const\":1}}}]}",
    "{\"anyOf\":[{\"$ref\":\"#/$defs/cat\"},{\"type\":\"null\"}]}",
    "{\"anyOf\":[{\"$ref\":\"#/$defs/dog\"},{\"const\":\"dog\"}]}",
    "{\"oneOf\":[{\"type\":\"null\"},{\"type\":\"boolean\"}]}",
    "{\"type\":\"object\",\"properties\":{\"a\":{\"$ref\":\"#/$defs/cat\"}},\"required\":[\"a\"]}",
    "{\"type\":\"object\",\"properties\":{\"a\":{\"$ref\":\"#/$defs/dog\"}},\"required\":[\"a\"]}",
};
static const char kinds[] = "\"$defs\":{\"cat\":{\"type\":\"object\",\"properties\":{\"kind\":{\"const\":\"cat\"},\"b\":{"
                            "\"type\":\"integer\"}},\"required\":["
                            "\"kind\"]},\"dog\":{\"type\":\"object\",\"properties\":{\"kind\":{\"enum\":[\"dog\",\"wolf\"]},"
                            "\"b\":{\"type\":\"integer\"}},"
                            "\"required\":[\"kind\"]}}";

/* Whatever two are put together: answers fit exactly one, or the grammar is refused. */
static void answers_fit_exactly_one(void **state) {
  (void)state;
  struct test_vocabulary *v = json_vocabulary();
  uint64_t random = 8;
  int taken = 0, refused = 0, judged = 0;
  for (size_t i = 0; i < ARRAY_LENGTH(alternatives); i++)
    for (size_t k = i; k < ARRAY_LENGTH(alternatives); k++) {
      char schema[2048], error[512];
      static char text[16384];
      struct grammar *g;
      snprintf(schema, sizeof schema, "{\"oneOf\":[%s,%s],%s}", alternatives[i], alternatives[k], kinds);
      const oscar_status status = grammar_of_schema(schema, strlen(schema), &g, error, sizeof error);
      if (status != OSCAR_OK) {
        /* FORMAT: nothing fits at all, such as false and false */
        if (status != OSCAR_UNSUPPORTED && status != OSCAR_FORMAT) fail_msg("%s: %s", schema, error);
        refused++;
        continue;
      }
      taken++;
      json_t *whole = json_loads(schema, 0, NULL);
      assert_non_null(whole);
      for (int round = 0; round < 12; round++) {
        const size_t n = random_answer(g, v, &random, text, sizeof text);
        if (n == 0) continue;
        json_t *value = json_loadb(text, n, JSON_DECODE_ANY, NULL);
        if (!valid(whole, whole, value)) fail_msg("%s\n%.*s", schema, (int)n, text);
        json_decref(value);
        judged++;
      }
      json_decref(whole);
      grammar_free(g);
    }
  printf("  %d pairs taken, %d refused, %d answers judged\n", taken, refused, judged);
  assert_true(taken > 300 && refused > 100 && judged > 2000);
  vocabulary_free_all(v);
}

static void what_tells_alternatives_apart_is_seen(void **state) {
  (void)state;
  static const struct {
    const char *one, *other;
    bool apart;
  } cases[] = {
      {"{\"type\":\"string\"}", "{\"type\":\"null\"}", true},
      {"{\"type\":\"string\"}", "{\"type\":[\"integer\",\"array\"]}", true},
      {"{\"type\":\"integer\"}", "{\"type\":\"number\"}", false},
      {"{\"type\":\"string\"}", "{\"format\":\"date\"}", false},
      {"{\"type\":\"string\"}", "{\"properties\":{\"a\":true}}", false}, /* without a type a string is valid, too */
      {"{\"const\":\"a\"}", "{\"const\":\"b\"}", true},
      {"{\"const\":\"a\"}", "{\"enum\":[\"b\",\"c\"]}", true},
      {"{\"const\":\"a\"}", "{\"enum\":[\"b\",\"a\"]}", false},
      {"{\"const\":1}", "{\"const\":1.0}", false},
      {"{\"const\":[1]}", "{\"const\":[1.0]}", false},
      {"{\"const\":\"auto\"}", "{\"type\":\"string\"}", false},
      {"{\"const\":\"auto\"}", "{\"type\":\"string\",\"maxLength\":3}", true},
      {"{\"enum\":[1,2]}", "{\"type\":\"integer\",\"minimum\":3}", true},
      {"{\"type\":\"integer\",\"maximum\":4}", "{\"type\":\"integer\",\"minimum\":5}", true},
      {"{\"type\":\"integer\",\"maximum\":5}", "{\"type\":\"integer\",\"minimum\":5}", false},
      {"{\"type\":\"integer\",\"exclusiveMaximum\":5}", "{\"type\":\"integer\",\"minimum\":5}", true},
      {"{\"type\":\"integer\",\"maximum\":5}", "{\"type\":\"integer\",\"exclusiveMinimum\":5}", true},
      {"{\"type\":\"string\",\"maxLength\":3}", "{\"type\":\"string\",\"minLength\":4}", true},
      {"{\"type\":\"array\",\"maxItems\":1}", "{\"type\":\"array\",\"minItems\":2}", true},
      {"{\"type\":\"array\",\"maxItems\":2}", "{\"type\":\"array\",\"minItems\":2}", false},
      {"{\"$ref\":\"#/$defs/cat\"}", "{\"$ref\":\"#/$defs/dog\"}", true},
      {"{\"$ref\":\"#/$defs/cat\"}", "{\"$ref\":\"#/$defs/cat\"}", false},
      {"{\"type\":\"object\",\"properties\":{\"kind\":{\"const\":\"cat\"}}}", "{\"$ref\":\"#/$defs/dog\"}",
       false}, /* it may be left out */
      {"{\"type\":\"object\",\"properties\":{\"a\":true},\"required\":[\"a\"]}",
       "{\"type\":\"object\",\"properties\":{\"b\":true},\"required\":[\"b\"]}", true}, /* neither writes the other's */
      {"{\"type\":\"object\",\"required\":[\"a\"]}", "{\"type\":\"object\",\"required\":[\"b\"]}", false},
      {"{\"type\":\"object\",\"required\":[\"a\"]}", "{\"type\":\"object\",\"additionalProperties\":false}", true},
      {"{\"anyOf\":[{\"type\":\"string\"},{\"type\":\"integer\"}]}", "{\"type\":[\"null\",\"boolean\"]}", true},
      {"{\"anyOf\":[{\"type\":\"string\"},{\"type\":\"null\"}]}", "{\"type\":[\"null\",\"boolean\"]}", false},
      {"true", "{\"type\":\"string\"}", false},
      {"false", "{\"type\":\"string\"}", true},
  };
  for (size_t i = 0; i < ARRAY_LENGTH(cases); i++)
    for (int turned = 0; turned < 2; turned++) {
      char schema[1024], error[512] = "";
      struct grammar *g = NULL;
      snprintf(schema, sizeof schema, "{\"oneOf\":[%s,%s],%s}", turned ? cases[i].other : cases[i].one,
               turned ? cases[i].one : cases[i].other, kinds);
      const oscar_status status = grammar_of_schema(schema, strlen(schema), &g, error, sizeof error);
      if ((status == OSCAR_OK) != cases[i].apart) fail_msg("%s: %s", schema, error);
      if (status != OSCAR_OK && !strstr(error, "schema at #: \"oneOf\": what fits alternative ")) fail_msg("%s", error);
      grammar_free(g);
    }
  /* Keywords beside it hold for each: here they tell what is written. Many constants are a matter of moments. */
  static const char beside[] =
      "{\"type\":\"object\",\"properties\":{\"a\":{\"type\":\"integer\"}},\"oneOf\":[{\"properties\":{\"k\":{"
      "\"const\":1}},\"required\":[\"k\"]},{\"properties\":{\"k\":{\"const\":2}},\"required\":[\"k\"]}]}";
  grammar_free(grammar_for(beside));
  char *many = malloc(1 << 16);
  size_t n = (size_t)sprintf(many, "{\"oneOf\":[");
  for (int i = 0; i < 300; i++) n += (size_t)sprintf(many + n, "%s{\"const\":\"v%d\",\"title\":\"x\"}", i ? "," : "", i);
  sprintf(many + n, "]}");
  grammar_free(grammar_for(many));
  free(many);
}

static void integer_ranges_are_exact(void **state) {
  (void)state;
  struct test_vocabulary *v = json_vocabulary();
  uint64_t random = 4;
  static const int64_t far[][2] = {
      {-MOST_JSON_INTEGER, MOST_JSON_INTEGER}, {999999999, 1000000001}, {-1000000000000, -999999999998}, {123456789, 987654321}};
  for (int round = 0; round < 150; round++) {
    int64_t low = (int64_t)(test_random(&random) % 2600) - 1300,
            high = low + (int64_t)(test_random(&random) % (round % 2 ? 30 : 2500));
    if (round < 4) low = far[round][0], high = far[round][1];
    char schema[160], text[32];
    snprintf(schema, sizeof schema, "{\"type\":\"integer\",\"minimum\":%lld,\"maximum\":%lld}", (long long)low, (long long)high);
    struct grammar *g = grammar_for(schema);
    const int64_t ends[] = {low, high};
    for (int k = 0; k < 6; k++) {
      const int64_t x = ends[k / 3] + k % 3 - 1;
      const int n = snprintf(text, sizeof text, "%lld", (long long)x);
      assert_int_equal(grammar_fit(g, v->table, text, (size_t)n) == FITS_SENTENCE, x >= low && x <= high);
    }
    for (int64_t x = -1500; x <= 4000; x += 1 + (round % 2) * 7) {
      const int n = snprintf(text, sizeof text, "%lld", (long long)x);
      if ((grammar_fit(g, v->table, text, (size_t)n) == FITS_SENTENCE) != (x >= low && x <= high))
        fail_msg("%s: %s", schema, text);
    }
    assert_int_equal(grammar_fit(g, v->table, "-0", 2) == FITS_SENTENCE, false);
    assert_int_equal(grammar_fit(g, v->table, "007", 3) == FITS_SENTENCE, false);
    grammar_free(g);
  }
  vocabulary_free_all(v);
}

/* ---- regular expressions ---- */

static void append(char *text, const char *more) {
  assert_true(strlen(text) + strlen(more) < 400);
  strcat(text, more);
}

static void random_pattern(char *text, uint64_t *random, int depth) {
  static const char *const atoms[] = {"a",           "b",     "[ab]",          "[^a]",    ".", "\\\\d", "\\\\w", "\\\\W",
                                      "[a-c1\\\\-]", "\\\\.", "[^\\\\d\\\\s]", "\\\\x61", "1", "\\\\n", "-"};
  static const char *const counts[] = {"", "", "", "*", "+", "?", "{2}", "{1,2}", "{0,1}", "{2,}", "*?", "+?"};
  const unsigned n = 1 + (unsigned)(test_random(random) % 3);
  for (unsigned i = 0; i < n; i++) {
    if (depth > 0 && test_random(random) % 3 == 0) {
      append(text, test_random(random) % 2 ? "(" : "(?:");
      random_pattern(text, random, depth - 1);
      if (test_random(random) % 2) {
        append(text, "|");
        random_pattern(text, random, depth - 1);
      }
      append(text, ")");
    } else {
      append(text, atoms[test_random(random) % ARRAY_LENGTH(atoms)]);
    }
    append(text, counts[test_random(random) % ARRAY_LENGTH(counts)]);
  }
}

static void patterns_match_what_pcre_matches(void **state) {
  (void)state;
  struct test_vocabulary *v = json_vocabulary();
  uint64_t random = 12;
  int matched = 0, all = 0;
  for (int round = 0; round < 250; round++) {
    char pattern[512] = "", schema[600];
    for (int way = 0; way < 1 + round % 2; way++) {
      if (way) append(pattern, "|");
      if (test_random(&random) % 3) append(pattern, "^");
      random_pattern(pattern, &random, 2);
      if (test_random(&random) % 3) append(pattern, "$");
    }
    snprintf(schema, sizeof schema, "{\"type\":\"string\",\"pattern\":\"%s\"}", pattern);
    json_t *parsed = json_loads(schema, 0, NULL);
    struct grammar *g = grammar_for(schema);
    const char *plain = json_string_value(json_object_get(parsed, "pattern"));
    for (int k = 0; k < 40; k++) {
      static const char *const letters[] = {"a", "b", "c", "1", "-", ".", "é", " ", "\n", "\""};
      char text[64] = "";
      const unsigned n = (unsigned)(test_random(&random) % 8);
      for (unsigned i = 0; i < n; i++) strcat(text, letters[test_random(&random) % (k % 2 ? 4 : 10)]);
      json_t *string = json_string(text);
      char *quoted = json_dumps(string, JSON_ENCODE_ANY);
      const bool want = pattern_found(plain, text, strlen(text));
      if ((grammar_fit(g, v->table, quoted, strlen(quoted)) == FITS_SENTENCE) != want)
        fail_msg("%s: %s: %d", plain, quoted, !want);
      matched += want;
      all++;
      free(quoted);
      json_decref(string);
    }
    json_decref(parsed);
    grammar_free(g);
  }
  printf("%d of %d strings matched\n", matched, all);
  assert_true(matched > all / 10 && matched < all * 9 / 10);
  vocabulary_free_all(v);
}

/* ---- refusals ---- */

static void refused(const char *schema, oscar_status status, const char *said) {
  struct grammar *g = (struct grammar *)&g;
  char error[512] = "";
  const oscar_status got = grammar_of_schema(schema, strlen(schema), &g, error, sizeof error);
  if (got != status || !strstr(error, said))
    fail_msg("%.100s: %s: \"%s\", expected \"%s\"", schema, oscar_status_name(got), error, said);
  assert_null(g);
}

static void wrong_schemas_are_refused_with_their_place(void **state) {
  (void)state;
  refused("{", OSCAR_FORMAT, "not JSON: line 1");
  refused("[]", OSCAR_FORMAT, "an object, true or false");
  refused("false", OSCAR_FORMAT, "no text fits");
  refused("{\"type\":\"strin\"}", OSCAR_FORMAT, "\"type\"");
  refused("{\"type\":[]}", OSCAR_FORMAT, "\"type\"");
  refused("{\"type\":\"object\",\"properties\":{\"a/b\":{\"items\":{\"not\":{}}}}}", OSCAR_UNSUPPORTED,
          "#/properties/a~1b/items: the keyword \"not\"");
  static const char *const keywords[] = {
      "if",          "patternProperties", "propertyNames",         "minProperties",     "contains",
      "uniqueItems", "multipleOf",        "unevaluatedProperties", "dependentRequired", "$dynamicRef"};
  for (size_t i = 0; i < ARRAY_LENGTH(keywords); i++) {
    char schema[80];
    snprintf(schema, sizeof schema, "{\"%s\":true}", keywords[i]);
    refused(schema, OSCAR_UNSUPPORTED, keywords[i]);
  }
  refused("{\"type\":\"number\",\"minimum\":1}", OSCAR_UNSUPPORTED, "\"minimum\"");
  refused("{\"type\":\"integer\",\"minimum\":1.5}", OSCAR_UNSUPPORTED, "\"minimum\"");
  refused("{\"type\":\"integer\",\"minimum\":\"1\"}", OSCAR_FORMAT, "\"minimum\"");
  refused("{\"type\":\"integer\",\"minimum\":5,\"maximum\":4}", OSCAR_FORMAT, "no integer");
  refused("{\"type\":\"string\",\"minLength\":5,\"maxLength\":4}", OSCAR_FORMAT, "minLength");
  refused("{\"type\":\"string\",\"maxLength\":100000000}", OSCAR_UNSUPPORTED, "lengths above");
  refused("{\"type\":\"string\",\"maxLength\":-1}", OSCAR_FORMAT, "too small");
  refused("{\"type\":\"array\",\"minItems\":3,\"maxItems\":1}", OSCAR_FORMAT, "at most 1");
  refused("{\"type\":\"array\",\"items\":[{}]}", OSCAR_UNSUPPORTED, "prefixItems");
  refused("{\"format\":\"regex\"}", OSCAR_UNSUPPORTED, "\"regex\"");
  refused("{\"pattern\":\"a\",\"maxLength\":3}", OSCAR_UNSUPPORTED, "\"pattern\" together");
  refused("{\"enum\":[1],\"minimum\":0}", OSCAR_UNSUPPORTED, "\"enum\" beside");
  refused("{\"enum\":[]}", OSCAR_FORMAT, "no text fits");
  refused("{\"$ref\":\"#/$defs/x\"}", OSCAR_FORMAT, "leads nowhere");
  refused("{\"$ref\":\"http://x/y\"}", OSCAR_UNSUPPORTED, "$ref");
  refused("{\"$ref\":\"#\"}", OSCAR_FORMAT, "no text fits");
  refused("{\"anyOf\":[{\"type\":\"null\"},{\"$ref\":\"#\"}]}", OSCAR_UNSUPPORTED, "left recursion");
  refused("{\"allOf\":[{\"$ref\":\"#\"}]}", OSCAR_UNSUPPORTED, "nested");
  refused("{\"allOf\":[{\"type\":\"string\"},{\"type\":\"null\"}]}", OSCAR_FORMAT, "types");
  refused("{\"allOf\":[{\"pattern\":\"a\"},{\"pattern\":\"b\"}]}", OSCAR_UNSUPPORTED, "\"pattern\"");
  refused("{\"allOf\":[{\"properties\":{\"a\":{}},\"additionalProperties\":false},{\"properties\":{\"b\":{}}}]}",
          OSCAR_UNSUPPORTED, "additionalProperties");
  static const char *const patterns[][2] = {{"(?=a)", "look-around"},
                                            {"(?<!a)", "look-around"},
                                            {"\\\\bx", "boundaries"},
                                            {"(a)\\\\1", "references"},
                                            {"\\\\p{L}", "properties"},
                                            {"a**", "repeat"},
                                            {"*a", "repeat"},
                                            {"(a", ")"},
                                            {"a)", ")"},
                                            {"[a", "]"},
                                            {"[b-a]", "backwards"},
                                            {"a{3,2}", "count"},
                                            {"a{1,100000000}", "count"},
                                            {"a^b", "^ and $"},
                                            {"(a$)", "^ and $"},
                                            {"\\\\", "backslash"}};
  for (size_t i = 0; i < ARRAY_LENGTH(patterns); i++) {
    char schema[80];
    snprintf(schema, sizeof schema, "{\"pattern\":\"%s\"}", patterns[i][0]);
    struct grammar *g;
    char error[512] = "";
    const oscar_status status = grammar_of_schema(schema, strlen(schema), &g, error, sizeof error);
    if (status == OSCAR_OK || !strstr(error, patterns[i][1]) || !strstr(error, "pattern, character"))
      fail_msg("%s: %d %s", schema, status, error);
  }
}

/* Nested, repeated and merged beyond reason: refused, and soon. */
static void hostile_schemas_end_soon(void **state) {
  (void)state;
  const size_t room = MOST_GRAMMAR_BYTES;
  char *text = malloc(room + 1);
  size_t n = 0;
  for (int i = 0; i < 1000; i++) n += (size_t)sprintf(text + n, "{\"items\":");
  n += (size_t)sprintf(text + n, "{}");
  for (int i = 0; i < 1000; i++) text[n++] = '}';
  text[n] = '\0';
  refused(text, OSCAR_UNSUPPORTED, "nested");
  /* each doubles the one before it when merged */
  static const char *const doubling[] = {"allOf", "anyOf"};
  struct grammar *g = NULL;
  char error[512];
  int64_t begun;
  for (int way = 0; way < 2; way++) {
    n = (size_t)sprintf(text, "{\"$ref\":\"#/$defs/d40\",\"maxItems\":99,\"$defs\":{\"d0\":{\"minItems\":1}");
    for (int i = 1; i <= 40; i++)
      n += (size_t)sprintf(
          text + n, ",\"d%d\":{\"%s\":[{\"$ref\":\"#/$defs/d%d\",\"minItems\":%d},{\"$ref\":\"#/$defs/d%d\",\"maxItems\":90}]}",
          i, doubling[way], i - 1, i, i - 1);
    sprintf(text + n, "}}");
    begun = time_ns();
    const oscar_status status = grammar_of_schema(text, strlen(text), &g, error, sizeof error);
    printf("merged 2^40 ways by %s: %s, %.0f ms\n", doubling[way], oscar_status_name(status), (double)(time_ns() - begun) / 1e6);
    assert_true(status == OSCAR_UNSUPPORTED || (way == 0 && status == OSCAR_OK));
    grammar_free(g);
  }
  /* many optional properties, many enumerated values */
  n = (size_t)sprintf(text, "{\"type\":\"object\",\"properties\":{");
  for (int i = 0; i < 3000; i++) n += (size_t)sprintf(text + n, "%s\"property%d\":{\"type\":\"string\"}", i ? "," : "", i);
  sprintf(text + n, "},\"additionalProperties\":true}");
  begun = time_ns();
  g = grammar_for(text);
  struct test_vocabulary *v = json_vocabulary();
  assert_int_equal(grammar_fit(g, v->table, "{\"property7\":\"\",\"property2999\":\"x\",\"property30000\":1}", 53),
                   FITS_SENTENCE);
  assert_int_equal(grammar_fit(g, v->table, "{\"property7\":\"\",\"property6\":\"x\"}", 32), FITS_NOT);
  printf("3000 optional properties: %.0f ms\n", (double)(time_ns() - begun) / 1e6);
  grammar_free(g);
  vocabulary_free_all(v);
  free(text);
}

/* ---- forms ---- */

static void forms_are_words_around_schemas(void **state) {
  (void)state;
  const struct grammar_part call[] = {{.literal = "<call>{\"name\": \"add\", \"arguments\": "},
                                      {.schema = "{\"type\":\"object\",\"properties\":{\"x\":{\"type\":\"integer\"}},"
                                                 "\"required\":[\"x\"],\"additionalProperties\":false}"},
                                      {.literal = "}</call>"}};
  const struct grammar_part words[] = {{.literal = "no"}};
  const struct grammar_form forms[] = {{call, 3}, {words, 1}};
  struct grammar *g;
  char error[256];
  struct test_vocabulary *v = json_vocabulary();
  assert_int_equal(grammar_of_forms(forms, 2, &g, error, sizeof error), OSCAR_OK);
  static const char *const yes[] = {"no", "<call>{\"name\": \"add\", \"arguments\": {\"x\": 4}}</call>"};
  static const char *const no[] = {"", "non", "<call>{\"name\": \"add\", \"arguments\": {}}</call>"};
  for (size_t i = 0; i < 2; i++) assert_int_equal(grammar_fit(g, v->table, yes[i], strlen(yes[i])), FITS_SENTENCE);
  for (size_t i = 0; i < 3; i++) assert_int_not_equal(grammar_fit(g, v->table, no[i], strlen(no[i])), FITS_SENTENCE);
  grammar_free(g);
  assert_int_equal(grammar_of_forms(forms, 0, &g, error, sizeof error), OSCAR_FORMAT);
  const struct grammar_part broken[] = {{.schema = "{\"not\":{}}"}};
  assert_int_equal(grammar_of_forms(&(const struct grammar_form){broken, 1}, 1, &g, error, sizeof error), OSCAR_UNSUPPORTED);
  assert_non_null(strstr(error, "not"));
  assert_int_equal(grammar_of_json(&g), OSCAR_OK);
  assert_int_equal(grammar_fit(g, v->table, "{\"a\": [1, {\"b\": null}], \"c\": \"\"}", 32), FITS_SENTENCE);
  assert_int_equal(grammar_fit(g, v->table, "[1]", 3), FITS_NOT);
  grammar_free(g);
  vocabulary_free_all(v);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(random_answers_are_valid),
      cmocka_unit_test(what_fits_is_taken),
      cmocka_unit_test(answers_fit_exactly_one),
      cmocka_unit_test(what_tells_alternatives_apart_is_seen),
      cmocka_unit_test(integer_ranges_are_exact),
      cmocka_unit_test(patterns_match_what_pcre_matches),
      cmocka_unit_test(wrong_schemas_are_refused_with_their_place),
      cmocka_unit_test(hostile_schemas_end_soon),
      cmocka_unit_test(forms_are_words_around_schemas),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
