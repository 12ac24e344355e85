/*
 * json.c - the parts of JSON (RFC 8259) as rules, for schemas and for JSON as such.
 *
 * A model must come to an end, so what JSON leaves open is bounded where no text of use is lost: white space is nothing or one
 * space, or a line's end with indentation where a line may be broken well; numbers have at most 18 digits before the point and 17
 * behind it, and exponents two. Strings hold no raw control characters, no escape that is half of a surrogate pair and no \u0000,
 * which parsers refuse.
 */
#include "engine/grammar/grammar_impl.h"

#include <stdio.h>
#include <string.h>

enum { MOST_SPACES = 32, MOST_TABS = 8 }; /* of indentation */

static int32_t ascii_class(struct builder *b, const char *pairs) {
  struct char_range ranges[8];
  size_t n = 0;
  for (; pairs[2 * n]; n++) ranges[n] = (struct char_range){(uint8_t)pairs[2 * n], (uint8_t)pairs[2 * n + 1]};
  return expr_chars(b, ranges, n);
}

static int32_t literal(struct builder *b, const char *text) { return expr_literal(b, text, strlen(text)); }

static int32_t make_rule(struct builder *b, const char *name, int32_t expression) {
  const int32_t rule = rule_new(b, name, strlen(name));
  rule_define(b, rule, expression);
  return rule;
}

#define SEQUENCE_OF(b, ...)                                                                                                      \
  expr_sequence(b, (const int32_t[]){__VA_ARGS__}, sizeof((const int32_t[]){__VA_ARGS__}) / sizeof(int32_t))
#define CHOICE_OF(b, ...) expr_choice(b, (const int32_t[]){__VA_ARGS__}, sizeof((const int32_t[]){__VA_ARGS__}) / sizeof(int32_t))

int32_t json_gap(struct builder *b) { return expr_repeat(b, literal(b, " "), 0, 1); }

int32_t json_space(struct builder *b, struct json_rules *rules) {
  if (!rules->space) {
    const int32_t spaces = expr_repeat(b, literal(b, " "), 0, MOST_SPACES), tabs = expr_repeat(b, literal(b, "\t"), 1, MOST_TABS);
    const int32_t line = SEQUENCE_OF(b, literal(b, "\n"), CHOICE_OF(b, spaces, tabs));
    rules->space = make_rule(b, "white space", CHOICE_OF(b, json_gap(b), line));
  }
  return expr_call(b, rules->space);
}

/* ---- strings ---- */

/* \uXXXX: four digits that are no half of a pair and not all zero, or a pair. */
static int32_t unicode_escape(struct builder *b) {
  const int32_t hex = ascii_class(b, "09afAF"), more = ascii_class(b, "19afAF"), zero = literal(b, "0");
  const int32_t free_first = ascii_class(b, "19acefACEF"), d = ascii_class(b, "ddDD");
  const int32_t plain = CHOICE_OF(b, SEQUENCE_OF(b, free_first, hex, hex, hex), SEQUENCE_OF(b, d, ascii_class(b, "07"), hex, hex),
                                  SEQUENCE_OF(b, zero, more, hex, hex), SEQUENCE_OF(b, zero, zero, more, hex),
                                  SEQUENCE_OF(b, zero, zero, zero, more));
  const int32_t pair =
      SEQUENCE_OF(b, d, ascii_class(b, "89abAB"), hex, hex, literal(b, "\\u"), d, ascii_class(b, "cfCF"), hex, hex);
  return SEQUENCE_OF(b, literal(b, "u"), CHOICE_OF(b, plain, pair));
}

static int32_t raw_character(struct builder *b) {
  static const struct char_range raw[] = {{0x20, 0x21}, {0x23, 0x5B}, {0x5D, 0x7E}, {0x80, 0xD7FF}, {0xE000, LAST_CODE_POINT}};
  return expr_chars(b, raw, ARRAY_LENGTH(raw));
}

static int32_t escaped_character(struct builder *b) {
  const int32_t letter = ascii_class(b, "\"\"\\\\//bbffnnrr"), tab = literal(b, "t");
  return SEQUENCE_OF(b, literal(b, "\\"), CHOICE_OF(b, letter, tab, unicode_escape(b)));
}

int32_t any_character(struct builder *b, struct json_rules *rules) {
  if (!rules->character) rules->character = make_rule(b, "character", CHOICE_OF(b, raw_character(b), escaped_character(b)));
  return expr_call(b, rules->character);
}

/* The characters are not called here: a string is where most tokens fit, and there every step counts. */
int32_t any_string(struct builder *b, struct json_rules *rules) {
  if (!rules->string) {
    const int32_t characters = expr_repeat(b, CHOICE_OF(b, raw_character(b), escaped_character(b)), 0, -1);
    rules->string = make_rule(b, "string", SEQUENCE_OF(b, literal(b, "\""), characters, literal(b, "\"")));
  }
  return expr_call(b, rules->string);
}

/* A character as its escape, for those that JSON does not take as they are. */
static int32_t escape_of(struct builder *b, uint32_t c) {
  static const char letters[] = "\"\"\\\\\bb\ff\nn\rr\tt";
  char text[8];
  for (size_t i = 0; letters[i]; i += 2)
    if (c == (uint8_t)letters[i]) {
      snprintf(text, sizeof text, "\\%c", letters[i + 1]);
      return literal(b, text);
    }
  snprintf(text, sizeof text, "\\u%04x", (unsigned)c);
  return literal(b, text);
}

static bool is_raw(uint32_t c) { return c >= 0x20 && c != '"' && c != '\\' && c != 0x7F; }

int32_t json_chars(struct builder *b, const struct char_class *class) {
  struct char_class raw = {0};
  struct expr_list ways = {0};
  for (size_t i = 0; i < class->n; i++) {
    const uint32_t first = class->ranges[i].first, last = class->ranges[i].last;
    for (uint32_t c = first; c <= last && c < 0x80; c++) {
      if (is_raw(c))
        class_add(b, &raw, c, c);
      else if (c != 0)
        expr_list_add(b, &ways, escape_of(b, c));
    }
    if (last >= 0x80) class_add(b, &raw, first < 0x80 ? 0x80 : first, last);
  }
  class_settle(&raw);
  if (raw.n) expr_list_add(b, &ways, expr_chars(b, raw.ranges, raw.n));
  class_free(&raw);
  return expr_list_choice(b, &ways);
}

/* ---- numbers ---- */

static int32_t digits(struct builder *b, int64_t least, int64_t most) {
  return expr_repeat(b, ascii_class(b, "09"), least, most);
}

static int32_t whole_part(struct builder *b) {
  return CHOICE_OF(b, literal(b, "0"), SEQUENCE_OF(b, ascii_class(b, "19"), digits(b, 0, 17)));
}

int32_t any_integer(struct builder *b, struct json_rules *rules) {
  if (!rules->integer) {
    const int32_t negative = SEQUENCE_OF(b, literal(b, "-"), ascii_class(b, "19"), digits(b, 0, 17));
    rules->integer = make_rule(b, "integer", CHOICE_OF(b, whole_part(b), negative));
  }
  return expr_call(b, rules->integer);
}

int32_t any_number(struct builder *b, struct json_rules *rules) {
  if (!rules->number) {
    const int32_t sign = expr_repeat(b, literal(b, "-"), 0, 1);
    const int32_t fraction = expr_repeat(b, SEQUENCE_OF(b, literal(b, "."), digits(b, 1, 17)), 0, 1);
    const int32_t exponent =
        SEQUENCE_OF(b, ascii_class(b, "eeEE"), expr_repeat(b, ascii_class(b, "++--"), 0, 1), digits(b, 1, 2));
    rules->number = make_rule(b, "number", SEQUENCE_OF(b, sign, whole_part(b), fraction, expr_repeat(b, exponent, 0, 1)));
  }
  return expr_call(b, rules->number);
}

static int32_t digit_between(struct builder *b, char first, char last) {
  return expr_chars(b, &(const struct char_range){(uint8_t)first, (uint8_t)last}, 1);
}

/* Numbers of n digits, leading zeros included, from low to high: the first digit decides, or leaves the question to the rest. */
static int32_t same_length(struct builder *b, const char *low, const char *high, int n) {
  if (n == 0) return expr_empty(b);
  bool low_is_least = true, high_is_most = true;
  for (int i = 1; i < n; i++) {
    low_is_least = low_is_least && low[i] == '0';
    high_is_most = high_is_most && high[i] == '9';
  }
  if (low[0] == high[0]) return SEQUENCE_OF(b, digit_between(b, low[0], low[0]), same_length(b, low + 1, high + 1, n - 1));
  struct expr_list ways = {0};
  static const char nines[] = "999999999999999999", zeros[] = "000000000000000000";
  char first = low[0], last = high[0];
  if (!low_is_least) {
    expr_list_add(b, &ways, SEQUENCE_OF(b, digit_between(b, first, first), same_length(b, low + 1, nines, n - 1)));
    first++;
  }
  if (!high_is_most) {
    expr_list_add(b, &ways, SEQUENCE_OF(b, digit_between(b, last, last), same_length(b, zeros, high + 1, n - 1)));
    last--;
  }
  if (first <= last) expr_list_add(b, &ways, SEQUENCE_OF(b, digit_between(b, first, last), digits(b, n - 1, n - 1)));
  return expr_list_choice(b, &ways);
}

/* 0 <= least <= most, without leading zeros */
static int32_t natural_range(struct builder *b, int64_t least, int64_t most) {
  struct expr_list ways = {0};
  int64_t power = 10; /* the first number with one digit more */
  for (int n = 1; n <= 18; n++, power *= n <= 18 ? 10 : 1) {
    const int64_t from = least > power / 10 || n == 1 ? least : power / 10, to = most < power - 1 ? most : power - 1;
    if (from > to) continue;
    char low[24], high[24];
    snprintf(low, sizeof low, "%lld", (long long)from);
    snprintf(high, sizeof high, "%lld", (long long)to);
    expr_list_add(b, &ways, same_length(b, low, high, n));
  }
  return expr_list_choice(b, &ways);
}

int32_t json_integer_range(struct builder *b, int64_t least, int64_t most) {
  struct expr_list ways = {0};
  if (least < 0) {
    const int64_t to = most < -1 ? -most : 1;
    if (-least >= to) expr_list_add(b, &ways, SEQUENCE_OF(b, literal(b, "-"), natural_range(b, to, -least)));
  }
  if (most >= 0) expr_list_add(b, &ways, natural_range(b, least > 0 ? least : 0, most));
  return expr_list_choice(b, &ways);
}

/* ---- any value ---- */

/* "a" ("," "a")*, between what opens and closes it, or nothing between them */
static int32_t enclosed(struct builder *b, struct json_rules *rules, const char *open, int32_t element, const char *close) {
  const int32_t space = json_space(b, rules);
  const int32_t more = expr_repeat(b, SEQUENCE_OF(b, json_gap(b), literal(b, ","), space, element), 0, -1);
  const int32_t filled = expr_repeat(b, SEQUENCE_OF(b, space, element, more), 0, 1);
  return SEQUENCE_OF(b, literal(b, open), filled, space, literal(b, close));
}

int32_t any_object(struct builder *b, struct json_rules *rules) {
  if (!rules->object && b->status == OSCAR_OK) { /* after an error nothing is made, and nothing called again */
    rules->object = rule_new(b, "object", 6);
    const int32_t member = SEQUENCE_OF(b, any_string(b, rules), json_gap(b), literal(b, ":"), json_gap(b), any_value(b, rules));
    rule_define(b, rules->object, enclosed(b, rules, "{", member, "}"));
  }
  return expr_call(b, rules->object);
}

int32_t any_array(struct builder *b, struct json_rules *rules) {
  if (!rules->array && b->status == OSCAR_OK) {
    rules->array = rule_new(b, "array", 5);
    rule_define(b, rules->array, enclosed(b, rules, "[", any_value(b, rules), "]"));
  }
  return expr_call(b, rules->array);
}

int32_t any_value(struct builder *b, struct json_rules *rules) {
  if (!rules->value && b->status == OSCAR_OK) {
    rules->value = rule_new(b, "value", 5);
    rule_define(b, rules->value,
                CHOICE_OF(b, any_object(b, rules), any_array(b, rules), any_string(b, rules), any_number(b, rules),
                          literal(b, "true"), literal(b, "false"), literal(b, "null")));
  }
  return expr_call(b, rules->value);
}

oscar_status grammar_of_json(struct grammar **grammar) {
  struct builder b;
  struct json_rules rules = {0};
  char unused[256];
  builder_begin(&b, unused, sizeof unused);
  const int32_t root = rule_new(&b, "root", 4);
  rule_define(&b, root, any_object(&b, &rules));
  return builder_finish(&b, root, grammar);
}
