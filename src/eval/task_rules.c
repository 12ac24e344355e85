/* task_rules.c - the tasks one after the other, then the table of them. */
#include "eval/task_rules.h"

#include <stdio.h>

/* ---- words ---- */

static void draw_digits(struct draw *draw, uint32_t least, char *word) {
  snprintf(word, ANSWER_WORD, "%u", (unsigned)(least + draw_below(draw, 9 * least)));
}

static void draw_id(struct draw *draw, char *word) {
  const uint64_t bits = draw_bits(draw);
  snprintf(word, ANSWER_WORD, "%08x-%04x-%04x", (unsigned)(bits >> 32), (unsigned)(bits >> 16 & 0xFFFF),
           (unsigned)(bits & 0xFFFF));
}

/* ---- multikey and multivalue ---- */

enum { SPREAD_VALUES = 4 };

static void draw_magic_numbers(struct draw *draw, struct group *group) {
  draw_compound(draw, group->key, sizeof group->key);
  for (int i = 0; i < SPREAD_VALUES; i++) draw_digits(draw, 1000000, group->value[i]);
}

static void write_magic_number(struct text *text, const struct group *group, int which) {
  text_add(text, "One of the special magic numbers for %s is: %s.", group->key, group->value[which]);
}

static void ask_one_number(struct text *text, const struct group *group) {
  text_add(text, "What is the special magic number for %s that the text mentions? Answer with the number only.", group->key);
}

static void begin_one_number(struct text *text, const struct group *group) {
  text_add(text, "The special magic number for %s is:", group->key);
}

static void ask_all_numbers(struct text *text, const struct group *group) {
  text_add(
      text,
      "What are all %d special magic numbers for %s that the text mentions? Answer with the numbers only, separated by commas.",
      SPREAD_VALUES, group->key);
}

static void begin_all_numbers(struct text *text, const struct group *group) {
  text_add(text, "The %d special magic numbers for %s are:", SPREAD_VALUES, group->key);
}

/* ---- tracking ---- */

enum { CHAIN_STEPS = 2, NAME_LETTERS = 5 }; /* from the name that is asked to the one that holds the number */

static void draw_name(struct draw *draw, char *name) {
  for (int i = 0; i < NAME_LETTERS; i++) name[i] = (char)('A' + draw_below(draw, 26));
  name[NAME_LETTERS] = '\0';
}

/* The key is set to value 0, that to value 1, the last one to the number. */
static void draw_chain(struct draw *draw, struct group *group) {
  draw_name(draw, group->key);
  for (int i = 0; i < CHAIN_STEPS; i++) draw_name(draw, group->value[i]);
  group->number = 10000 + (int)draw_below(draw, 90000);
}

static void write_assignment(struct text *text, const struct group *group, int which) {
  const int step = CHAIN_STEPS - 1 - which;
  const char *name = step < 0 ? group->key : group->value[step];
  if (which == 0)
    text_add(text, "VAR %s = %d", name, group->number);
  else
    text_add(text, "VAR %s = VAR %s", name, group->value[step + 1]);
}

static void ask_names(struct text *text, const struct group *group) {
  text_add(
      text,
      "Which variable is %s set to, and which one is that set to? Go on until there is a number. Answer in this form only: VAR "
      "%s = VAR name, VAR name = VAR name, VAR name = number",
      group->key, group->key);
}

static void begin_names(struct text *text, const struct group *group) { text_add(text, "VAR %s = VAR", group->key); }

static void write_chain(struct text *text, const struct group *group) {
  for (int i = 0; i < CHAIN_STEPS; i++) text_add(text, "%s %s, VAR %s =", i ? " VAR" : "", group->value[i], group->value[i]);
  text_add(text, " %d", group->number);
}

/* ---- json ---- */

static void draw_pair(struct draw *draw, struct group *group) {
  draw_id(draw, group->key);
  draw_id(draw, group->value[0]);
}

static void write_pair(struct text *text, const struct group *group, int which) {
  (void)which;
  text_add(text, "  \"%s\": \"%s\",\n", group->key, group->value[0]);
}

static void ask_pair(struct text *text, const struct group *group) {
  text_add(text, "What is the value of the key \"%s\" in the JSON object? Answer with the value only.", group->key);
}

static void begin_pair(struct text *text, const struct group *group) {
  text_add(text, "The value of the key \"%s\" is:", group->key);
}

/* ---- code ---- */

enum { FORM_FUNCTION, FORM_MACRO, FORM_CONSTANT, FORMS, IDLE_FORMS = 4 };

/* No verb ends another, no last word begins another: no symbol contains another. */
static const char *const verbs[] = {"apply", "check",  "decode", "emit",   "fetch", "guess", "hash",   "insert",
                                    "join",  "locate", "merge",  "notify", "open",  "parse", "query",  "route",
                                    "split", "trim",   "update", "verify", "wrap",  "yield", "freeze", "bind"};
static const char *const objects[] = {"batch",  "block",  "bucket", "cursor", "device", "entry",  "frame", "group",
                                      "header", "index",  "job",    "key",    "link",   "matrix", "node",  "packet",
                                      "queue",  "record", "socket", "timer",  "layer",  "reply",  "shard", "token"};
static const char *const aspects[] = {"bound",  "cost",    "depth", "epoch",  "factor", "gap",   "height", "interval",
                                      "jitter", "kind",    "limit", "margin", "number", "order", "period", "rank",
                                      "salt",   "timeout", "usage", "weight", "quota",  "share", "volume", "zone"};
#define PICK(draw, list) (list)[draw_below(draw, ARRAY_LENGTH(list))]

static void draw_symbol(struct draw *draw, struct group *group) {
  const char *verb = PICK(draw, verbs), *object = PICK(draw, objects), *aspect = PICK(draw, aspects);
  snprintf(group->key, sizeof group->key, "%s_%s_%s", verb, object, aspect);
  group->number = (int)draw_below(draw, FORMS * IDLE_FORMS);
  if (group->number % FORMS == FORM_MACRO)
    for (char *c = group->key; *c; c++)
      if (*c != '_') *c = (char)(*c - 'a' + 'A');
  draw_digits(draw, 100000, group->value[0]);
}

/* A function beside the symbol that returns no number: most of a source file is not what one is looking for. */
static void write_idle_code(struct text *text, const struct group *group, int form) {
  const char *k = group->key;
  if (form == 1) text_add(text, "static void reset_%s(struct state *s) {\n  s->count = 0;\n  s->ready = false;\n}\n\n", k);
  if (form == 2) text_add(text, "static bool has_%s(const struct state *s) { return s->ready && s->count > 0; }\n\n", k);
}

static void write_symbol(struct text *text, const struct group *group, int which) {
  (void)which;
  const char *key = group->key, *value = group->value[0];
  switch (group->number % FORMS) {
  case FORM_FUNCTION:
    text_add(text, "static int %s(void) {\n  return %s;\n}\n\n", key, value);
    write_idle_code(text, group, group->number / FORMS);
    break;
  case FORM_MACRO:
    text_add(text, "#define %s %s\n\n", key, value);
    break;
  default:
    text_add(text, "static const int %s = %s;\n\n", key, value);
    break;
  }
}

static void ask_symbol(struct text *text, const struct group *group) {
  if (group->number % FORMS == FORM_FUNCTION)
    text_add(text, "What number does the function %s return? Answer with the number only.", group->key);
  else
    text_add(text, "What number is the constant %s? Answer with the number only.", group->key);
}

static void begin_symbol(struct text *text, const struct group *group) {
  if (group->number % FORMS == FORM_FUNCTION)
    text_add(text, "The function %s returns:", group->key);
  else
    text_add(text, "The constant %s is:", group->key);
}

/* ---- the table ---- */

#define MAGIC_INTRODUCTION "The text below hides special magic numbers. Read it carefully; a question about them follows.\n\n"

const struct task_rules task_rules_of[TASK_COUNT] = {
    [TASK_MULTIKEY] = {.name = "multikey",
                       .shape = WORD_DIGITS,
                       .values = 1,
                       .statements = 1,
                       .tokens_per_group = 64,
                       .separator = " ",
                       .introduction = MAGIC_INTRODUCTION,
                       .draw_group = draw_magic_numbers,
                       .write_statement = write_magic_number,
                       .write_question = ask_one_number,
                       .write_begin = begin_one_number},
    [TASK_MULTIVALUE] = {.name = "multivalue",
                         .shape = WORD_DIGITS,
                         .values = SPREAD_VALUES,
                         .statements = SPREAD_VALUES,
                         .tokens_per_group = 256,
                         .separator = " ",
                         .introduction = MAGIC_INTRODUCTION,
                         .draw_group = draw_magic_numbers,
                         .write_statement = write_magic_number,
                         .write_question = ask_all_numbers,
                         .write_begin = begin_all_numbers},
    [TASK_TRACKING] = {.name = "tracking",
                       .shape = WORD_NAME,
                       .values = CHAIN_STEPS,
                       .statements = CHAIN_STEPS + 1,
                       .tokens_per_group = 128,
                       .separator = "\n",
                       .introduction = "The text below sets variables, to a number or to another variable. Keep track of them; a "
                                       "question follows.\n\n",
                       .draw_group = draw_chain,
                       .write_statement = write_assignment,
                       .write_question = ask_names,
                       .write_begin = begin_names,
                       .write_answer = write_chain},
    [TASK_JSON] = {.name = "json",
                   .shape = WORD_ID,
                   .values = 1,
                   .statements = 1,
                   .introduction = "Below is a JSON object. A question about it follows.\n\n",
                   .opening = "{\n",
                   .comment_open = "  \"comment\": \"",
                   .comment_close = "\"\n}\n",
                   .draw_group = draw_pair,
                   .write_statement = write_pair,
                   .write_question = ask_pair,
                   .write_begin = begin_pair},
    [TASK_CODE] = {.name = "code",
                   .shape = WORD_DIGITS,
                   .values = 1,
                   .statements = 1,
                   .introduction = "Below is a C file. A question about it follows.\n\n",
                   .opening = "struct state {\n  int count;\n  bool ready;\n};\n\n",
                   .comment_open = "/* ",
                   .comment_close = " */\n",
                   .draw_group = draw_symbol,
                   .write_statement = write_symbol,
                   .write_question = ask_symbol,
                   .write_begin = begin_symbol},
};
