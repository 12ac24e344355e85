/*
 * regex.c - regular expressions of ECMAScript's kind, as JSON Schema's `pattern` has them, over the contents of a JSON
 * string.
 *
 * A pattern is looked for anywhere in the string, so what is not anchored may have any characters around it. ^ and $ are
 * understood where they begin and end a whole alternative. What an automaton without memory cannot do (look-around, references
 * back, word boundaries) and Unicode properties are refused by name.
 */
#include "engine/grammar/grammar_impl.h"

#include <string.h>

struct pattern {
  struct builder *b;
  const char *text, *at, *end, *where;
  int depth;
};

static int32_t refuse(struct pattern *p, oscar_status status, const char *what) {
  return builder_fail(p->b, status, "%s: pattern, character %td: %s", p->where, p->at - p->text + 1, what);
}

static bool good(const struct pattern *p) { return p->b->status == OSCAR_OK; }
static bool next_is(const struct pattern *p, const char *text) {
  const size_t n = strlen(text);
  return (size_t)(p->end - p->at) >= n && memcmp(p->at, text, n) == 0;
}
static bool skip(struct pattern *p, const char *text) {
  if (!next_is(p, text)) return false;
  p->at += strlen(text);
  return true;
}

/* The pattern comes from a JSON text that was parsed: its UTF-8 is well-formed. */
static uint32_t take_character(struct pattern *p) {
  const uint8_t lead = (uint8_t)*p->at++;
  uint32_t c = lead < 0x80 ? lead : lead < 0xE0 ? lead & 0x1F : lead < 0xF0 ? lead & 0x0F : lead & 0x07;
  while (p->at < p->end && ((uint8_t)*p->at & 0xC0) == 0x80) c = c << 6 | ((uint8_t)*p->at++ & 0x3F);
  return c;
}

static int hex_digit(char c) {
  return c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : c >= 'A' && c <= 'F' ? c - 'A' + 10 : -1;
}

static bool take_hex(struct pattern *p, int n, uint32_t *c) {
  *c = 0;
  for (int i = 0; i < n; i++) {
    if (p->at + i >= p->end || hex_digit(p->at[i]) < 0) return false;
    *c = *c << 4 | (uint32_t)hex_digit(p->at[i]);
  }
  p->at += n;
  return true;
}

/* ---- escapes ---- */

static void add_named(struct pattern *p, char name, struct char_class *class) {
  static const struct char_range digit[] = {{'0', '9'}}, word[] = {{'0', '9'}, {'A', 'Z'}, {'_', '_'}, {'a', 'z'}};
  /* white space and line terminators of ECMA-262 */
  static const struct char_range space[] = {{9, 13},          {' ', ' '},       {0xA0, 0xA0},     {0x1680, 0x1680},
                                            {0x2000, 0x200A}, {0x2028, 0x2029}, {0x202F, 0x202F}, {0x205F, 0x205F},
                                            {0x3000, 0x3000}, {0xFEFF, 0xFEFF}};
  const char lower = (char)(name | 0x20);
  const struct char_range *ranges = lower == 'd' ? digit : lower == 'w' ? word : space;
  const size_t n = lower == 'd' ? ARRAY_LENGTH(digit) : lower == 'w' ? ARRAY_LENGTH(word) : ARRAY_LENGTH(space);
  struct char_class named = {0};
  for (size_t i = 0; i < n; i++) class_add(p->b, &named, ranges[i].first, ranges[i].last);
  if (name != lower) class_invert(p->b, &named);
  for (size_t i = 0; i < named.n; i++) class_add(p->b, class, named.ranges[i].first, named.ranges[i].last);
  class_free(&named);
}

static bool take_code_point(struct pattern *p, uint32_t *c) {
  if (!skip(p, "{")) {
    if (!take_hex(p, 4, c)) return false;
    uint32_t low;
    const char *before = p->at;
    if (*c >= 0xD800 && *c < 0xDC00 && skip(p, "\\u") && take_hex(p, 4, &low) && low >= 0xDC00 && low < 0xE000)
      *c = 0x10000 + ((*c - 0xD800) << 10) + (low - 0xDC00);
    else
      p->at = before;
    return true;
  }
  *c = 0;
  int n = 0;
  for (; p->at < p->end && hex_digit(*p->at) >= 0 && n < 7; n++) *c = *c << 4 | (uint32_t)hex_digit(*p->at++);
  return n > 0 && *c <= LAST_CODE_POINT && skip(p, "}");
}

/* After the backslash. Into the class; *c is the character, or UINT32_MAX if it is a class by itself. */
static void take_escape(struct pattern *p, bool in_class, struct char_class *class, uint32_t *c) {
  static const char controls[] = "t\tn\nr\rf\fv\v";
  *c = UINT32_MAX;
  if (p->at == p->end) {
    refuse(p, OSCAR_FORMAT, "a backslash at the end");
    return;
  }
  const char name = *p->at;
  if (strchr("dDwWsS", name) && name) {
    p->at++;
    add_named(p, name, class);
    return;
  }
  if (name == 'p' || name == 'P') {
    refuse(p, OSCAR_UNSUPPORTED, "Unicode properties are not supported");
    return;
  }
  if ((name == 'b' && !in_class) || name == 'B') {
    refuse(p, OSCAR_UNSUPPORTED, "word boundaries are not supported");
    return;
  }
  if ((name >= '1' && name <= '9') || name == 'k') {
    refuse(p, OSCAR_UNSUPPORTED, "references back are not supported");
    return;
  }
  p->at++;
  const char *control = name ? strchr(controls, name) : NULL;
  if (control && (control - controls) % 2 == 0)
    *c = (uint8_t)control[1];
  else if (name == 'b')
    *c = 8;
  else if (name == '0')
    *c = 0;
  else if (name == 'c' && p->at < p->end && ((*p->at | 0x20) >= 'a' && (*p->at | 0x20) <= 'z'))
    *c = (uint32_t)(*p->at++ & 0x1F);
  else if (name == 'x' ? !take_hex(p, 2, c) : name == 'u' && !take_code_point(p, c))
    refuse(p, OSCAR_FORMAT, "an escape without its digits");
  else if (name != 'x' && name != 'u') {
    p->at--;
    *c = take_character(p);
    if ((*c | 0x20) >= 'a' && (*c | 0x20) <= 'z') refuse(p, OSCAR_UNSUPPORTED, "this escape is not known");
  }
  if (good(p)) class_add(p->b, class, *c, *c);
}

/* ---- [classes] ---- */

static uint32_t take_class_item(struct pattern *p, struct char_class *class) {
  uint32_t c;
  if (skip(p, "\\")) {
    take_escape(p, true, class, &c);
  } else {
    c = take_character(p);
    class_add(p->b, class, c, c);
  }
  return c;
}

static int32_t bracket_class(struct pattern *p) {
  struct char_class class = {0};
  const bool inverted = skip(p, "^");
  while (good(p) && p->at < p->end && *p->at != ']') {
    const uint32_t first = take_class_item(p, &class);
    if (p->end - p->at < 2 || *p->at != '-' || p->at[1] == ']' || first == UINT32_MAX) continue;
    p->at++;
    const uint32_t last = take_class_item(p, &class);
    if (last == UINT32_MAX)
      class_add(p->b, &class, '-', '-'); /* [a-\d]: no range */
    else if (last < first)
      refuse(p, OSCAR_FORMAT, "a range that goes backwards");
    else
      class_add(p->b, &class, first, last);
  }
  if (good(p) && !skip(p, "]")) refuse(p, OSCAR_FORMAT, "a class without its ]");
  if (inverted)
    class_invert(p->b, &class);
  else
    class_settle(&class);
  const int32_t e = good(p) ? json_chars(p->b, &class) : 0;
  class_free(&class);
  return e;
}

static int32_t chars_but(struct pattern *p, const char *excluded) {
  struct char_class class = {0};
  for (; *excluded; excluded++) class_add(p->b, &class, (uint8_t)*excluded, (uint8_t)*excluded);
  if (class.n) class_add(p->b, &class, 0x2028, 0x2029);
  class_invert(p->b, &class);
  const int32_t e = json_chars(p->b, &class);
  class_free(&class);
  return e;
}

/* ---- the rest ---- */

static int32_t alternatives(struct pattern *p, bool whole);

static int32_t group(struct pattern *p) {
  if (next_is(p, "?=") || next_is(p, "?!") || next_is(p, "?<=") || next_is(p, "?<!"))
    return refuse(p, OSCAR_UNSUPPORTED, "look-around is not supported");
  if (skip(p, "?<")) {
    while (p->at < p->end && *p->at != '>') p->at++;
    if (!skip(p, ">")) return refuse(p, OSCAR_FORMAT, "a group's name without its >");
  } else if (skip(p, "?") && !skip(p, ":")) {
    return refuse(p, OSCAR_UNSUPPORTED, "this kind of group is not supported");
  }
  if (++p->depth > MOST_GRAMMAR_DEPTH) return refuse(p, OSCAR_UNSUPPORTED, "parentheses are nested too deeply");
  const int32_t e = alternatives(p, false);
  p->depth--;
  return good(p) && !skip(p, ")") ? refuse(p, OSCAR_FORMAT, "a group without its )") : e;
}

static int32_t atom(struct pattern *p) {
  if (skip(p, "(")) return group(p);
  if (skip(p, "[")) return bracket_class(p);
  if (skip(p, ".")) return chars_but(p, "\n\r");
  if (next_is(p, "^") || next_is(p, "$"))
    return refuse(p, OSCAR_UNSUPPORTED, "^ and $ are supported at the beginning and end of a whole alternative");
  if (next_is(p, "*") || next_is(p, "+") || next_is(p, "?")) return refuse(p, OSCAR_FORMAT, "nothing to repeat");
  struct char_class class = {0};
  uint32_t c;
  if (skip(p, "\\")) {
    take_escape(p, false, &class, &c);
  } else {
    c = take_character(p);
    class_add(p->b, &class, c, c);
  }
  class_settle(&class);
  const int32_t e = good(p) ? json_chars(p->b, &class) : 0;
  class_free(&class);
  return e;
}

static int64_t take_number(struct pattern *p) {
  int64_t n = 0;
  while (p->at < p->end && *p->at >= '0' && *p->at <= '9') {
    n = 10 * n + (*p->at++ - '0');
    if (n > INT32_MAX) n = INT32_MAX;
  }
  return n;
}

/* {n}, {n,} or {n,m}; anything else that begins with a brace is itself, as in ECMAScript. */
static bool take_counts(struct pattern *p, int64_t *least, int64_t *most) {
  const char *before = p->at;
  if (skip(p, "{") && p->at < p->end && *p->at >= '0' && *p->at <= '9') {
    *least = *most = take_number(p);
    if (skip(p, ",")) *most = p->at < p->end && *p->at != '}' ? take_number(p) : -1;
    if (skip(p, "}")) return true;
  }
  p->at = before;
  return false;
}

static int32_t repeated(struct pattern *p) {
  int32_t e = atom(p);
  int64_t least = 1, most = 1;
  if (!good(p)) return 0;
  if (skip(p, "*"))
    least = 0, most = -1;
  else if (skip(p, "+"))
    most = -1;
  else if (skip(p, "?"))
    least = 0;
  else if (!take_counts(p, &least, &most))
    return e;
  (void)skip(p, "?"); /* lazy: the same strings */
  const bool fits = least <= MOST_REPETITIONS && most <= MOST_REPETITIONS && (most < 0 || most >= least);
  if (!fits) return refuse(p, OSCAR_UNSUPPORTED, "this count is backwards, or more than 100000");
  if (next_is(p, "*") || next_is(p, "+") || next_is(p, "?")) return refuse(p, OSCAR_FORMAT, "nothing to repeat");
  return expr_repeat(p->b, e, least, most);
}

static int32_t anything(struct pattern *p) { return expr_repeat(p->b, chars_but(p, ""), 0, -1); }

/* Up to | or ) or the end. `whole`: of the pattern, so that anchors count. */
static int32_t alternative(struct pattern *p, bool whole) {
  struct expr_list parts = {0};
  bool anchored = false;
  if (whole && !skip(p, "^")) expr_list_add(p->b, &parts, anything(p));
  while (good(p) && p->at < p->end && *p->at != '|' && *p->at != ')' && !anchored) {
    if (whole && *p->at == '$' && (p->at + 1 == p->end || p->at[1] == '|'))
      anchored = skip(p, "$");
    else
      expr_list_add(p->b, &parts, repeated(p));
  }
  if (whole && !anchored) expr_list_add(p->b, &parts, anything(p));
  return expr_list_sequence(p->b, &parts);
}

static int32_t alternatives(struct pattern *p, bool whole) {
  struct expr_list ways = {0};
  do expr_list_add(p->b, &ways, alternative(p, whole));
  while (good(p) && skip(p, "|"));
  return expr_list_choice(p->b, &ways);
}

int32_t json_pattern(struct builder *b, const char *pattern, size_t bytes, const char *where) {
  struct pattern p = {.b = b, .text = pattern, .at = pattern, .end = pattern + bytes, .where = where};
  const int32_t e = alternatives(&p, true);
  return good(&p) && p.at < p.end ? refuse(&p, OSCAR_FORMAT, "a ) without its (") : e;
}
