/*
 * gbnf.c - reads grammars in llama.cpp's notation (GBNF): rules of literals, classes, groups and repetitions.
 *
 * A rule ends where the next one begins, that is before "name ::=", so lines may be broken anywhere.
 */
#include "engine/grammar/grammar_impl.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#define XXH_INLINE_ALL
#include <xxhash.h>

struct reader {
  struct builder *b;
  const char *text, *at, *end;
  int depth;
  struct use {         /* of a rule */
    const char *first; /* where it was first named; NULL if it is defined */
    uint32_t hash;     /* of its name */
  } * uses;            /* [builder's n_rules], the first one unused */
  size_t use_room;
};

static int32_t fail_at(struct reader *r, const char *at, oscar_status status, const char *what) {
  int line = 1, column = 1;
  for (const char *c = r->text; c < at; c++) {
    column = *c == '\n' ? 1 : column + 1;
    line += *c == '\n';
  }
  return builder_fail(r->b, status, "line %d, column %d: %s", line, column, what);
}

static int32_t fail(struct reader *r, const char *what) { return fail_at(r, r->at, OSCAR_FORMAT, what); }
static bool good(const struct reader *r) { return r->b->status == OSCAR_OK; }
static char peek(const struct reader *r) { return r->at < r->end ? *r->at : '\0'; }

static bool skip(struct reader *r, char c) {
  if (peek(r) != c || r->at == r->end) return false;
  r->at++;
  return true;
}

static void skip_space(struct reader *r) {
  while (r->at < r->end && (strchr(" \t\r\n", *r->at) != NULL || *r->at == '#') && *r->at)
    if (*r->at++ == '#')
      while (r->at < r->end && *r->at != '\n') r->at++;
}

static bool in_name(char c) {
  return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '-' || c == '_';
}

static size_t name_length(const struct reader *r) {
  size_t n = 0;
  while (r->at + n < r->end && in_name(r->at[n])) n++;
  return n;
}

/* Whether what comes is "name ::=". */
static bool at_rule(const struct reader *r) {
  struct reader ahead = *r;
  ahead.at += name_length(r);
  if (ahead.at == r->at) return false;
  skip_space(&ahead);
  return ahead.end - ahead.at >= 3 && memcmp(ahead.at, "::=", 3) == 0;
}

/* ---- names ---- */

enum { MOST_NAMED_RULES = 4000 }; /* so that looking through all of them is quick enough */

static int32_t find_rule(struct reader *r, const char *name, size_t bytes) {
  struct builder *b = r->b;
  const uint32_t hash = (uint32_t)XXH3_64bits(name, bytes);
  for (size_t i = 1; i < b->n_rules; i++)
    if (r->uses[i].hash == hash && strlen(b->rules[i].name) == bytes && memcmp(b->rules[i].name, name, bytes) == 0)
      return (int32_t)i;
  if (b->n_rules > MOST_NAMED_RULES) return fail_at(r, name, OSCAR_UNSUPPORTED, "more than 4000 rules");
  const int32_t rule = rule_new(b, name, bytes);
  if (!good(r)) return 0;
  if (!room_for((void **)&r->uses, &r->use_room, (size_t)rule, sizeof *r->uses))
    return builder_fail(b, OSCAR_NO_MEMORY, "out of memory for a grammar");
  r->uses[rule] = (struct use){name, hash};
  return rule;
}

/* ---- characters ---- */

static bool take_hex(struct reader *r, int digits, uint32_t *c) {
  *c = 0;
  for (int i = 0; i < digits; i++) {
    const char h = peek(r);
    const int value = h >= '0' && h <= '9'   ? h - '0'
                      : h >= 'a' && h <= 'f' ? h - 'a' + 10
                      : h >= 'A' && h <= 'F' ? h - 'A' + 10
                                             : -1;
    if (value < 0) return false;
    *c = *c << 4 | (uint32_t)value;
    r->at++;
  }
  return *c <= LAST_CODE_POINT && (*c < 0xD800 || *c > 0xDFFF);
}

/* One character, escaped or not. */
static uint32_t take_character(struct reader *r) {
  uint32_t c = 0;
  if (skip(r, '\\')) {
    const char name = peek(r);
    static const char plain[] = "n\nt\tr\r\\\\\"\"]][[--^^//";
    const char *found = NULL;
    for (size_t i = 0; plain[i]; i += 2)
      if (plain[i] == name) found = &plain[i + 1];
    const int digits = name == 'x' ? 2 : name == 'u' ? 4 : name == 'U' ? 8 : 0;
    if (!found && digits == 0)
      return (uint32_t)fail(r, "this escape is not known; \\n \\t \\r \\\\ \\\" \\[ \\] \\xHH \\uHHHH \\UHHHHHHHH are");
    r->at++;
    if (found) return (uint8_t)*found;
    return take_hex(r, digits, &c) ? c : (uint32_t)fail(r, "an escape without its digits, or not a character");
  }
  const uint8_t lead = (uint8_t)*r->at;
  const int n = lead < 0x80                   ? 1
                : lead >= 0xC2 && lead < 0xE0 ? 2
                : lead >= 0xE0 && lead < 0xF0 ? 3
                : lead >= 0xF0 && lead < 0xF5 ? 4
                                              : 0;
  if (n == 0 || r->end - r->at < n) return (uint32_t)fail(r, "this is not UTF-8");
  c = n == 1 ? lead : lead & (0x7Fu >> n);
  for (int i = 1; i < n; i++) {
    if (((uint8_t)r->at[i] & 0xC0) != 0x80) return (uint32_t)fail(r, "this is not UTF-8");
    c = c << 6 | ((uint8_t)r->at[i] & 0x3F);
  }
  if (c > LAST_CODE_POINT || (c >= 0xD800 && c <= 0xDFFF) || (n == 3 && c < 0x800) || (n == 4 && c < 0x10000))
    return (uint32_t)fail(r, "this is not UTF-8");
  r->at += n;
  return c;
}

static size_t write_utf8(uint32_t c, char out[4]) {
  if (c < 0x80) return out[0] = (char)c, 1;
  const int n = c < 0x800 ? 2 : c < 0x10000 ? 3 : 4;
  for (int i = n - 1; i > 0; i--, c >>= 6) out[i] = (char)(0x80 | (c & 0x3F));
  out[0] = (char)((0xF00u >> n & 0xFF) | c);
  return (size_t)n;
}

static int32_t quoted(struct reader *r) {
  const char *opened = r->at++;
  char *text = malloc((size_t)(r->end - r->at) + 4); /* an escape is longer than what it stands for */
  if (!text) return builder_fail(r->b, OSCAR_NO_MEMORY, "out of memory for a grammar");
  size_t n = 0;
  while (good(r) && r->at < r->end && *r->at != '"') n += write_utf8(take_character(r), text + n);
  if (good(r) && !skip(r, '"')) fail_at(r, opened, OSCAR_FORMAT, "a literal without its closing quote");
  const int32_t e = good(r) ? expr_literal(r->b, text, n) : 0;
  free(text);
  return e;
}

static int32_t bracketed(struct reader *r) {
  const char *opened = r->at++;
  struct char_class class = {0};
  const bool inverted = skip(r, '^');
  while (good(r) && r->at < r->end && *r->at != ']') {
    const uint32_t first = take_character(r);
    uint32_t last = first;
    if (good(r) && r->end - r->at >= 2 && *r->at == '-' && r->at[1] != ']') {
      r->at++;
      last = take_character(r);
    }
    if (good(r) && last < first) fail(r, "a range that goes backwards");
    class_add(r->b, &class, first, last);
  }
  if (good(r) && !skip(r, ']')) fail_at(r, opened, OSCAR_FORMAT, "a class without its ]");
  if (inverted)
    class_invert(r->b, &class);
  else
    class_settle(&class);
  const int32_t e = expr_chars(r->b, class.ranges, class.n);
  class_free(&class);
  return e;
}

static int32_t full_stop(struct reader *r) {
  static const struct char_range all[] = {{0, 0xD7FF}, {0xE000, LAST_CODE_POINT}};
  r->at++;
  return expr_chars(r->b, all, ARRAY_LENGTH(all));
}

/* ---- expressions ---- */

static int32_t alternatives(struct reader *r);

static int32_t group(struct reader *r) {
  const char *opened = r->at++;
  if (++r->depth > MOST_GRAMMAR_DEPTH) return fail_at(r, opened, OSCAR_UNSUPPORTED, "parentheses are nested too deeply");
  const int32_t e = alternatives(r);
  r->depth--;
  if (good(r) && !skip(r, ')')) return fail_at(r, opened, OSCAR_FORMAT, "a group without its )");
  return e;
}

static int32_t atom(struct reader *r) {
  const size_t name = name_length(r);
  switch (peek(r)) {
  case '"':
    return quoted(r);
  case '[':
    return bracketed(r);
  case '.':
    return full_stop(r);
  case '(':
    return group(r);
  default:
    break;
  }
  if (name == 0) return fail(r, "expected a literal, a class, a group or the name of a rule");
  const int32_t rule = find_rule(r, r->at, name);
  r->at += name;
  return expr_call(r->b, rule);
}

static bool take_number(struct reader *r, int64_t *n) {
  const char *before = r->at;
  *n = 0;
  for (; r->at < r->end && *r->at >= '0' && *r->at <= '9'; r->at++)
    if (*n <= INT32_MAX) *n = 10 * *n + (*r->at - '0');
  return r->at > before;
}

/* {n}, {n,}, {n,m} or {,m} */
static bool take_counts(struct reader *r, int64_t *least, int64_t *most) {
  skip_space(r);
  const bool some = take_number(r, least);
  *most = *least;
  skip_space(r);
  if (skip(r, ',')) {
    skip_space(r);
    if (!take_number(r, most)) *most = -1;
    if (!some && *most < 0) return false;
    skip_space(r);
  } else if (!some) {
    return false;
  }
  return skip(r, '}');
}

static int32_t repeated(struct reader *r) {
  int32_t e = atom(r);
  for (int suffixes = 0; good(r); suffixes++) {
    const char *before = r->at;
    int64_t least = 0, most = -1;
    skip_space(r);
    const char *sign = r->at;
    if (skip(r, '*'))
      most = -1;
    else if (skip(r, '+'))
      least = 1;
    else if (skip(r, '?'))
      most = 1;
    else if (!skip(r, '{')) {
      r->at = before;
      return e;
    } else if (!take_counts(r, &least, &most))
      return fail_at(r, sign, OSCAR_FORMAT, "expected {n}, {n,} or {n,m}");
    if (least > MOST_REPETITIONS || most > MOST_REPETITIONS)
      return fail_at(r, sign, OSCAR_UNSUPPORTED, "at most 100000 repetitions can be counted");
    if (most >= 0 && most < least) return fail_at(r, sign, OSCAR_FORMAT, "a count that goes backwards");
    if (suffixes > MOST_GRAMMAR_DEPTH) return fail_at(r, sign, OSCAR_UNSUPPORTED, "too many repetitions of one part");
    e = expr_repeat(r->b, e, least, most);
  }
  return 0;
}

static int32_t sequence(struct reader *r) {
  struct expr_list parts = {0};
  for (skip_space(r); good(r) && r->at < r->end && *r->at != '|' && *r->at != ')' && !at_rule(r); skip_space(r))
    expr_list_add(r->b, &parts, repeated(r));
  return expr_list_sequence(r->b, &parts);
}

static int32_t alternatives(struct reader *r) {
  struct expr_list ways = {0};
  do expr_list_add(r->b, &ways, sequence(r));
  while (good(r) && skip(r, '|'));
  return expr_list_choice(r->b, &ways);
}

static void read_rule(struct reader *r) {
  const char *name = r->at;
  if (!at_rule(r)) {
    fail(r, "expected a rule: name ::= ...");
    return;
  }
  const int32_t rule = find_rule(r, name, name_length(r));
  if (!good(r)) return;
  if (!r->uses[rule].first) {
    fail_at(r, name, OSCAR_FORMAT, "this rule was defined before");
    return;
  }
  r->at += name_length(r);
  skip_space(r);
  r->at += 3;
  rule_define(r->b, rule, alternatives(r));
  if (good(r)) r->uses[rule].first = NULL;
  if (good(r) && r->at < r->end && !at_rule(r)) fail(r, "a ) without its (");
}

static void check_uses(struct reader *r) {
  for (size_t i = 1; good(r) && i < r->b->n_rules; i++)
    if (r->uses[i].first) {
      char what[160];
      snprintf(what, sizeof what, "there is no rule %.100s", r->b->rules[i].name);
      fail_at(r, r->uses[i].first, OSCAR_FORMAT, what);
    }
}

oscar_status grammar_parse(const char *text, size_t bytes, struct grammar **grammar, char *error, size_t error_bytes) {
  struct builder b;
  builder_begin(&b, error, error_bytes);
  struct reader r = {.b = &b, .text = text, .at = text, .end = text + bytes};
  if (bytes > MOST_GRAMMAR_BYTES)
    builder_fail(&b, OSCAR_UNSUPPORTED, "a grammar of %zu bytes; at most %d are read", bytes, MOST_GRAMMAR_BYTES);
  int32_t root = 0;
  for (skip_space(&r); good(&r) && r.at < r.end; skip_space(&r)) read_rule(&r);
  for (size_t i = 1; good(&r) && i < b.n_rules; i++)
    if (strcmp(b.rules[i].name, "root") == 0) root = (int32_t)i;
  if (good(&r) && root == 0) builder_fail(&b, OSCAR_FORMAT, "there is no rule root, where a grammar begins");
  check_uses(&r);
  const oscar_status status = builder_finish(&b, root, grammar);
  free(r.uses);
  return status;
}
