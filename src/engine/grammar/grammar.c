/*
 * grammar.c - from expressions over rules to a program over bytes.
 *
 * Expressions are compiled backwards: each is given the instruction that follows it and returns the one it begins with, so that
 * only loops need a second visit. Characters become ranges of bytes here, and nothing after this file knows of UTF-8: a token
 * that ends inside a character is a token like others. A repeated part that is large becomes a rule of its own, so that counts
 * inside counts add up instead of multiplying.
 *
 * A compiled grammar keeps two promises. Whatever is `useful` leads to a sentence, so a text that is a beginning of none is
 * noticed at its first wrong byte. No rule begins with itself, so following calls ends; a grammar that has such a rule is
 * refused.
 */
#include "engine/grammar/grammar_impl.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum expression_kind { EMPTY, LITERAL, BYTES, CHARS, SEQUENCE, CHOICE, REPEAT, CALL };
struct expression {
  uint8_t kind;
  uint32_t first, n; /* of text, ranges or children; CALL: the rule; BYTES: the set */
  int32_t least, most;
};

/* ---- memory and errors ---- */

bool room_for(void **list, size_t *room, size_t count, size_t size) {
  if (count < *room) return true;
  const size_t wanted = count < 16 ? 32 : 2 * count;
  void *grown = realloc(*list, wanted * size);
  if (!grown) return false;
  *list = grown;
  *room = wanted;
  return true;
}

int32_t builder_fail(struct builder *b, oscar_status status, const char *format, ...) {
  if (b->status != OSCAR_OK) return 0;
  b->status = status;
  va_list arguments;
  va_start(arguments, format);
  if (b->error_bytes > 0) vsnprintf(b->error, b->error_bytes, format, arguments);
  va_end(arguments);
  return 0;
}

static int32_t no_memory(struct builder *b) { return builder_fail(b, OSCAR_NO_MEMORY, "out of memory for a grammar"); }

#define ROOM(b, list, room, count) room_for((void **)&(b)->list, &(b)->room, count, sizeof *(b)->list)

void builder_begin(struct builder *b, char *error, size_t error_bytes) {
  *b = (struct builder){.error = error, .error_bytes = error_bytes};
  if (error_bytes > 0) error[0] = '\0';
  (void)expr_choice(b, NULL, 0);   /* expression 0, what failures return */
  (void)rule_new(b, "nothing", 7); /* rule 0 the same: 0 means none */
}

static void builder_free(struct builder *b) {
  for (size_t i = 0; i < b->n_rules; i++) free(b->rules[i].name);
  free(b->rules);
  free(b->expressions);
  free(b->children);
  free(b->ranges);
  free(b->text);
  *b = (struct builder){0};
}

/* ---- expressions ---- */

static int32_t add_expression(struct builder *b, struct expression e) {
  if (b->status != OSCAR_OK) return 0;
  if (!ROOM(b, expressions, expression_room, b->n_expressions)) return no_memory(b);
  if (b->n_expressions >= 4 * (size_t)MOST_GRAMMAR_CODE)
    return builder_fail(b, OSCAR_UNSUPPORTED, "the grammar is too large: more than %d parts", 4 * MOST_GRAMMAR_CODE);
  b->expressions[b->n_expressions] = e;
  return (int32_t)b->n_expressions++;
}

int32_t expr_empty(struct builder *b) { return add_expression(b, (struct expression){.kind = EMPTY}); }

int32_t expr_literal(struct builder *b, const char *text, size_t bytes) {
  if (b->status != OSCAR_OK) return 0;
  if (bytes > MOST_GRAMMAR_CODE || b->n_text + bytes > 16 * (size_t)MOST_GRAMMAR_CODE)
    return builder_fail(b, OSCAR_UNSUPPORTED, "the grammar is too large: a literal of %zu bytes", bytes);
  if (!ROOM(b, text, text_room, b->n_text + bytes)) return no_memory(b);
  if (bytes) memcpy(b->text + b->n_text, text, bytes);
  const struct expression e = {.kind = LITERAL, .first = (uint32_t)b->n_text, .n = (uint32_t)bytes};
  b->n_text += bytes;
  return add_expression(b, e);
}

int32_t expr_chars(struct builder *b, const struct char_range *ranges, size_t n) {
  if (b->status != OSCAR_OK) return 0;
  if (!ROOM(b, ranges, ranges_room, b->n_ranges + n)) return no_memory(b);
  if (n) memcpy(b->ranges + b->n_ranges, ranges, n * sizeof *ranges);
  const struct expression e = {.kind = CHARS, .first = (uint32_t)b->n_ranges, .n = (uint32_t)n};
  b->n_ranges += n;
  return add_expression(b, e);
}

static int32_t add_parent(struct builder *b, enum expression_kind kind, const int32_t *parts, size_t n) {
  if (b->status != OSCAR_OK) return 0;
  if (n == 1) return parts[0];
  if (!ROOM(b, children, children_room, b->n_children + n)) return no_memory(b);
  if (n) memcpy(b->children + b->n_children, parts, n * sizeof *parts);
  const struct expression e = {.kind = (uint8_t)kind, .first = (uint32_t)b->n_children, .n = (uint32_t)n};
  b->n_children += n;
  return add_expression(b, e);
}

int32_t expr_sequence(struct builder *b, const int32_t *parts, size_t n) { return add_parent(b, SEQUENCE, parts, n); }
int32_t expr_choice(struct builder *b, const int32_t *parts, size_t n) { return add_parent(b, CHOICE, parts, n); }

int32_t expr_repeat(struct builder *b, int32_t part, int64_t least, int64_t most) {
  if (least > MOST_REPETITIONS || most > MOST_REPETITIONS)
    return builder_fail(b, OSCAR_UNSUPPORTED, "a count of %lld; at most %d repetitions can be counted",
                        (long long)(least > most ? least : most), MOST_REPETITIONS);
  if (most >= 0 && most < least)
    return builder_fail(b, OSCAR_FORMAT, "at least %lld but at most %lld: nothing can be both", (long long)least,
                        (long long)most);
  return add_expression(
      b, (struct expression){.kind = REPEAT, .first = (uint32_t)part, .least = (int32_t)least, .most = (int32_t)most});
}

int32_t expr_call(struct builder *b, int32_t rule) {
  return add_expression(b, (struct expression){.kind = CALL, .first = (uint32_t)rule});
}

void expr_list_add(struct builder *b, struct expr_list *list, int32_t part) {
  if (!room_for((void **)&list->parts, &list->room, list->n, sizeof *list->parts)) {
    no_memory(b);
    return;
  }
  list->parts[list->n++] = part;
}

static int32_t list_into(struct builder *b, enum expression_kind kind, struct expr_list *list) {
  const int32_t e = add_parent(b, kind, list->parts, list->n);
  free(list->parts);
  *list = (struct expr_list){0};
  return e;
}

int32_t expr_list_sequence(struct builder *b, struct expr_list *list) { return list_into(b, SEQUENCE, list); }
int32_t expr_list_choice(struct builder *b, struct expr_list *list) { return list_into(b, CHOICE, list); }

int32_t rule_new(struct builder *b, const char *name, size_t bytes) {
  if (b->status != OSCAR_OK) return 0;
  if (b->n_rules >= MOST_GRAMMAR_RULES)
    return builder_fail(b, OSCAR_UNSUPPORTED, "the grammar is too large: more than %d rules", MOST_GRAMMAR_RULES);
  if (!ROOM(b, rules, rule_room, b->n_rules)) return no_memory(b);
  char *copy = malloc(bytes + 1);
  if (!copy) return no_memory(b);
  memcpy(copy, name, bytes);
  copy[bytes] = '\0';
  b->rules[b->n_rules] = (struct rule){.name = copy};
  return (int32_t)b->n_rules++;
}

void rule_define(struct builder *b, int32_t rule, int32_t expression) {
  if (b->status == OSCAR_OK) b->rules[rule].expression = expression;
}

/* ---- instructions ---- */

static int32_t emit(struct builder *b, struct instruction in) {
  struct grammar *g = b->grammar;
  if (b->status != OSCAR_OK) return 0;
  if (g->n_code >= MOST_GRAMMAR_CODE)
    return builder_fail(b, OSCAR_UNSUPPORTED, "the grammar is too large: more than %d instructions", MOST_GRAMMAR_CODE);
  if (!room_for((void **)&g->code, &b->code_room, (size_t)g->n_code, sizeof *g->code)) return no_memory(b);
  g->code[g->n_code] = in;
  return g->n_code++;
}

static int32_t emit_split(struct builder *b, int32_t next, int32_t other) {
  return emit(b, (struct instruction){.kind = SPLIT, .next = next, .other = other});
}

/* Few different sets occur, the latest most often. */
static int32_t emit_set(struct builder *b, const struct byte_set *set, int32_t next) {
  struct grammar *g = b->grammar;
  int i = g->n_sets - 1;
  while (i >= 0 && memcmp(&g->sets[i], set, sizeof *set) != 0) i--;
  if (i < 0) {
    if (g->n_sets > 4096) return builder_fail(b, OSCAR_UNSUPPORTED, "the grammar has too many different classes of characters");
    if (!room_for((void **)&g->sets, &b->set_room, (size_t)g->n_sets, sizeof *g->sets)) return no_memory(b);
    i = g->n_sets++;
    g->sets[i] = *set;
  }
  return emit(b, (struct instruction){.kind = BYTE_IN, .set = (uint16_t)i, .next = next});
}

static int32_t emit_bytes(struct builder *b, int first, int last, int32_t next) {
  struct byte_set set = {0};
  byte_set_add(&set, first, last);
  return emit_set(b, &set, next);
}

/* One of several ways; so_far -1: none yet. */
static int32_t either(struct builder *b, int32_t so_far, int32_t way) { return so_far < 0 ? way : emit_split(b, way, so_far); }

/* ---- UTF-8: code points of so many bytes whose encodings differ byte by byte within independent ranges ---- */

static int encode(uint32_t c, uint8_t out[4]) {
  if (c < 0x80) return out[0] = (uint8_t)c, 1;
  if (c < 0x800) return out[0] = (uint8_t)(0xC0 | c >> 6), out[1] = (uint8_t)(0x80 | (c & 0x3F)), 2;
  if (c < 0x10000)
    return out[0] = (uint8_t)(0xE0 | c >> 12), out[1] = (uint8_t)(0x80 | (c >> 6 & 0x3F)), out[2] = (uint8_t)(0x80 | (c & 0x3F)),
           3;
  out[0] = (uint8_t)(0xF0 | c >> 18);
  out[1] = (uint8_t)(0x80 | (c >> 12 & 0x3F));
  out[2] = (uint8_t)(0x80 | (c >> 6 & 0x3F));
  out[3] = (uint8_t)(0x80 | (c & 0x3F));
  return 4;
}

static int32_t emit_block(struct builder *b, uint32_t first, uint32_t last, int32_t next) {
  uint8_t low[4] = {0}, high[4] = {0};
  const int n = encode(first, low);
  (void)encode(last, high);
  for (int i = n - 1; i >= 0; i--) next = emit_bytes(b, low[i], high[i], next);
  return next;
}

/* Cuts a range until the last bytes that differ run through all of their values. */
static int32_t emit_range(struct builder *b, uint32_t first, uint32_t last, int32_t next, int32_t so_far) {
  static const uint32_t most_of_length[] = {0x7F, 0x7FF, 0xFFFF};
  for (int i = 0; i < 3; i++)
    if (first <= most_of_length[i] && last > most_of_length[i]) {
      so_far = emit_range(b, first, most_of_length[i], next, so_far);
      return emit_range(b, most_of_length[i] + 1, last, next, so_far);
    }
  for (uint32_t bits = 6; last > 0x7F && bits <= 18; bits += 6) {
    const uint32_t mask = ((uint32_t)1 << bits) - 1;
    if ((first & ~mask) == (last & ~mask)) break;
    if (first & mask) {
      so_far = emit_range(b, first, first | mask, next, so_far);
      return emit_range(b, (first | mask) + 1, last, next, so_far);
    }
    if ((last & mask) != mask) {
      so_far = emit_range(b, first, (last & ~mask) - 1, next, so_far);
      return emit_range(b, last & ~mask, last, next, so_far);
    }
  }
  return either(b, so_far, emit_block(b, first, last, next));
}

/* Characters of one byte are one set. */
static int32_t emit_chars(struct builder *b, const struct char_range *ranges, size_t n, int32_t next) {
  struct byte_set single = {0};
  int32_t entry = -1;
  for (size_t i = 0; i < n; i++) {
    const uint32_t first = ranges[i].first, last = ranges[i].last;
    if (first < 0x80) byte_set_add(&single, (int)first, last < 0x7F ? (int)last : 0x7F);
    if (last >= 0x80) entry = emit_range(b, first < 0x80 ? 0x80 : first, last, next, entry);
  }
  if (entry >= 0 && !(single.bits[0] | single.bits[1])) return entry;
  return either(b, entry, emit_set(b, &single, next));
}

/* ---- expressions into instructions ---- */

static int32_t emit_expression(struct builder *b, int32_t index, int32_t next);

static int32_t emit_choice(struct builder *b, struct expression e, int32_t next) {
  int32_t entry = -1;
  for (uint32_t i = e.n; i > 0 && b->status == OSCAR_OK; i--)
    entry = either(b, entry, emit_expression(b, b->children[e.first + i - 1], next));
  return entry >= 0 ? entry : emit_set(b, &(const struct byte_set){0}, next);
}

/* What is repeated more than a few times and is no single instruction is called. */
static int32_t repeated_part(struct builder *b, struct expression e) {
  const struct expression part = b->expressions[e.first];
  const int32_t copies = e.most < 0 ? e.least + 1 : e.most;
  if (copies <= 2 || part.kind == CALL || part.kind == EMPTY) return (int32_t)e.first;
  if (part.kind == CHARS) {
    uint32_t last = 0;
    for (uint32_t i = 0; i < part.n; i++)
      if (b->ranges[part.first + i].last > last) last = b->ranges[part.first + i].last;
    if (last < 0x80) return (int32_t)e.first;
  }
  const int32_t rule = rule_new(b, "a repeated part", 15);
  rule_define(b, rule, (int32_t)e.first);
  return expr_call(b, rule);
}

enum { LONG_STRETCH = 16 }; /* most counts are short, and so are most tokens */

/* The code from `first` on is so many copies. Parts of repeated parts are rules of their own, so stretches do not overlap. */
static void note_stretch(struct builder *b, int32_t first, int32_t copies) {
  struct grammar *g = b->grammar;
  if (b->status != OSCAR_OK || copies < LONG_STRETCH || g->n_code == first) return;
  if (!room_for((void **)&g->stretches, &b->stretch_room, (size_t)g->n_stretches, sizeof *g->stretches))
    no_memory(b);
  else
    g->stretches[g->n_stretches++] = (struct stretch){first, (g->n_code - first) / copies, copies};
}

static int32_t emit_repeat(struct builder *b, struct expression e, int32_t next) {
  const int32_t part = repeated_part(b, e);
  int32_t entry = next;
  if (e.most < 0) {
    entry = emit_split(b, 0, next);
    const int32_t body = emit_expression(b, part, entry);
    if (b->status == OSCAR_OK) b->grammar->code[entry].next = body;
  }
  int32_t first = b->grammar->n_code;
  for (int32_t i = e.least; i < e.most && b->status == OSCAR_OK; i++)
    entry = emit_split(b, emit_expression(b, part, entry), next);
  note_stretch(b, first, e.most - e.least);
  first = b->grammar->n_code;
  for (int32_t i = 0; i < e.least && b->status == OSCAR_OK; i++) entry = emit_expression(b, part, entry);
  note_stretch(b, first, e.least);
  return entry;
}

/* The depth of expressions is bounded by those who parse them. */
static int32_t emit_expression(struct builder *b, int32_t index, int32_t next) {
  if (b->status != OSCAR_OK) return 0;
  const struct expression e = b->expressions[index];
  switch ((enum expression_kind)e.kind) {
  case EMPTY:
    return next;
  case LITERAL:
    for (uint32_t i = e.n; i > 0; i--) {
      const uint8_t byte = (uint8_t)b->text[e.first + i - 1];
      next = emit_bytes(b, byte, byte, next);
    }
    return next;
  case BYTES: {
    struct byte_set set;
    memcpy(&set, b->text + e.first, sizeof set);
    return emit_set(b, &set, next);
  }
  case CHARS:
    return emit_chars(b, b->ranges + e.first, e.n, next);
  case SEQUENCE:
    for (uint32_t i = e.n; i > 0; i--) next = emit_expression(b, b->children[e.first + i - 1], next);
    return next;
  case CHOICE:
    return emit_choice(b, e, next);
  case REPEAT:
    return emit_repeat(b, e, next);
  case CALL:
    return emit(b, (struct instruction){.kind = CALL_RULE, .next = next, .other = (int32_t)e.first});
  }
  return 0;
}

int32_t expr_bytes(struct builder *b, const struct byte_set *set) {
  const int32_t e = expr_literal(b, (const char *)set, sizeof *set);
  if (b->status == OSCAR_OK) b->expressions[e].kind = BYTES;
  return e;
}

/* Rules appear while rules are compiled: repeated parts. Calls hold the rule's number until all have an entry. */
static void emit_rules(struct builder *b) {
  for (size_t r = 0; r < b->n_rules && b->status == OSCAR_OK; r++) {
    const int32_t end = emit(b, (struct instruction){.kind = RETURN});
    b->rules[r].entry = emit_expression(b, b->rules[r].expression, end);
  }
  if (b->status != OSCAR_OK) return;
  for (int32_t i = 0; i < b->grammar->n_code; i++) {
    struct instruction *in = &b->grammar->code[i];
    if (in->kind == CALL_RULE) in->other = b->rules[in->other].entry;
  }
}

/* ---- what is true of instructions, from the ends of rules backwards ---- */

struct spread { /* who refers to an instruction, as lists over one array */
  int32_t *first, *user;
  int32_t *waiting;
  int32_t n_waiting;
};

static void spread_free(struct spread *s) {
  free(s->first);
  free(s->user);
  free(s->waiting);
}

static bool spread_begin(const struct grammar *g, struct spread *s) {
  const size_t n = (size_t)g->n_code;
  *s = (struct spread){calloc(n + 2, sizeof *s->first), malloc((2 * n + 1) * sizeof *s->user),
                       malloc((n + 1) * sizeof *s->waiting), 0};
  if (!s->first || !s->user || !s->waiting) return false;
  for (size_t i = 0; i < n; i++) {
    const struct instruction *in = &g->code[i];
    if (in->kind != RETURN) s->first[in->next + 2]++;
    if (in->kind == SPLIT || in->kind == CALL_RULE) s->first[in->other + 2]++;
  }
  for (size_t i = 2; i < n + 2; i++) s->first[i] += s->first[i - 1];
  for (size_t i = 0; i < n; i++) {
    const struct instruction *in = &g->code[i];
    if (in->kind != RETURN) s->user[s->first[in->next + 1]++] = (int32_t)i;
    if (in->kind == SPLIT || in->kind == CALL_RULE) s->user[s->first[in->other + 1]++] = (int32_t)i;
  }
  return true;
}

/* Marks what reaches the end of its rule; over bytes, or with nothing read (bytes_pass false). Linear in the program. */
static bool mark_reaching(const struct grammar *g, bool bytes_pass, bool *reaches) {
  struct spread s;
  const bool made = spread_begin(g, &s);
  for (int32_t i = 0; made && i < g->n_code; i++) {
    reaches[i] = g->code[i].kind == RETURN;
    if (reaches[i]) s.waiting[s.n_waiting++] = i;
  }
  while (made && s.n_waiting > 0) {
    const int32_t at = s.waiting[--s.n_waiting];
    for (int32_t k = s.first[at]; k < s.first[at + 1]; k++) {
      const int32_t i = s.user[k];
      const struct instruction *in = &g->code[i];
      static const struct byte_set nothing = {0};
      const bool now = in->kind == SPLIT ? reaches[in->next] || reaches[in->other]
                       : in->kind == CALL_RULE
                           ? reaches[in->next] && reaches[in->other]
                           : bytes_pass && reaches[in->next] && memcmp(&g->sets[in->set], &nothing, sizeof nothing) != 0;
      if (!now || reaches[i]) continue;
      reaches[i] = true;
      s.waiting[s.n_waiting++] = i;
    }
  }
  spread_free(&s);
  return made;
}

/* ---- left recursion: a rule that calls itself before anything is read ---- */

struct search {
  const struct grammar *g;
  const bool *skipped; /* instructions that reach the end of their rule with nothing read */
  uint8_t *color;      /* of instructions that begin rules: 1 being followed, 2 done */
  bool *is_entry;
  uint32_t *seen; /* the entry from which an instruction was last looked at, + 1 */
  struct frame {
    int32_t entry;
    size_t first_call, n_calls; /* still to follow, in `calls` */
  } * frames;
  size_t n_frames, frame_room;
  int32_t *calls, *look;
  size_t n_calls, call_room, look_room;
};

/* Lists the rules that the one at `entry` may begin with. */
static bool find_first_calls(struct search *s, int32_t entry) {
  const struct grammar *g = s->g;
  size_t n = 0;
  if (!room_for((void **)&s->look, &s->look_room, 0, sizeof *s->look)) return false;
  s->look[n++] = entry;
  while (n > 0) {
    const int32_t at = s->look[--n];
    if (s->seen[at] == (uint32_t)entry + 1) continue;
    s->seen[at] = (uint32_t)entry + 1;
    const struct instruction *in = &g->code[at];
    if (!in->useful || in->kind == BYTE_IN || in->kind == RETURN) continue;
    if (!room_for((void **)&s->look, &s->look_room, n + 2, sizeof *s->look)) return false;
    if (in->kind == SPLIT) {
      s->look[n++] = in->next;
      s->look[n++] = in->other;
      continue;
    }
    if (!room_for((void **)&s->calls, &s->call_room, s->n_calls, sizeof *s->calls)) return false;
    s->calls[s->n_calls++] = in->other;
    if (s->skipped[in->other]) s->look[n++] = in->next;
  }
  return true;
}

static bool push_frame(struct search *s, int32_t entry) {
  if (!room_for((void **)&s->frames, &s->frame_room, s->n_frames, sizeof *s->frames)) return false;
  const size_t first = s->n_calls;
  if (!find_first_calls(s, entry)) return false;
  s->frames[s->n_frames++] = (struct frame){entry, first, s->n_calls - first};
  s->color[entry] = 1;
  return true;
}

/* The entry of a rule on a cycle, -1 if there is none, -2 without memory. Depth first, over the rules that each begins with. */
static int32_t follow_first_calls(struct search *s, int32_t start) {
  if (s->color[start] == 0 && !push_frame(s, start)) return -2;
  while (s->n_frames > 0) {
    struct frame *frame = &s->frames[s->n_frames - 1];
    if (frame->n_calls == 0) {
      s->color[frame->entry] = 2;
      s->n_calls = frame->first_call;
      s->n_frames--;
      continue;
    }
    const int32_t called = s->calls[frame->first_call + --frame->n_calls];
    if (s->color[called] == 1) return called;
    if (s->color[called] == 0 && !push_frame(s, called)) return -2;
  }
  return -1;
}

static const char *rule_at(const struct builder *b, int32_t entry) {
  for (size_t r = 1; r < b->n_rules; r++)
    if (b->rules[r].entry == entry) return b->rules[r].name;
  return "?";
}

static void refuse_left_recursion(struct builder *b, const bool *skipped) {
  const size_t n = (size_t)(b->grammar->n_code ? b->grammar->n_code : 1);
  struct search s = {.g = b->grammar, .skipped = skipped, .color = calloc(n, 1), .seen = calloc(n, sizeof *s.seen)};
  int32_t found = s.color && s.seen ? -1 : -2;
  for (size_t r = 0; r < b->n_rules && found == -1; r++)
    if (b->grammar->code[b->rules[r].entry].useful) found = follow_first_calls(&s, b->rules[r].entry);
  if (found == -2) no_memory(b);
  if (found >= 0)
    builder_fail(b, OSCAR_UNSUPPORTED,
                 "left recursion: %s can begin with itself and would never end; write a list as x (\",\" x)* instead",
                 rule_at(b, found));
  free(s.color);
  free(s.seen);
  free(s.frames);
  free(s.calls);
  free(s.look);
}

/* ---- classes of bytes ---- */

/* Splits classes by one set after the other. */
static bool class_bytes(struct grammar *g) {
  int classes = 1;
  memset(g->class_of, 0, sizeof g->class_of);
  for (int i = 0; i < g->n_sets; i++) {
    int inside[256], n = 0;
    bool has_other[256] = {false};
    for (int c = 0; c < classes; c++) inside[c] = -1;
    for (int byte = 0; byte < 256; byte++)
      if (!byte_set_has(&g->sets[i], byte)) has_other[g->class_of[byte]] = true;
    for (int byte = 0; byte < 256; byte++) {
      const int c = g->class_of[byte];
      if (!byte_set_has(&g->sets[i], byte) || !has_other[c]) continue;
      if (inside[c] < 0) inside[c] = classes + n++;
      g->class_of[byte] = (uint8_t)inside[c];
    }
    classes += n;
  }
  g->n_classes = classes;
  g->set_has = calloc((size_t)(g->n_sets ? g->n_sets : 1) * (size_t)classes, sizeof *g->set_has);
  if (!g->set_has) return false;
  for (int i = 0; i < g->n_sets; i++)
    for (int byte = 0; byte < 256; byte++)
      if (byte_set_has(&g->sets[i], byte)) g->set_has[i * classes + g->class_of[byte]] = true;
  return true;
}

/* ---- the whole ---- */

static void check_program(struct builder *b, int32_t start) {
  struct grammar *g = b->grammar;
  bool *reaches = malloc((size_t)(g->n_code ? g->n_code : 1) * sizeof *reaches);
  if (!reaches || !mark_reaching(g, true, reaches)) {
    free(reaches);
    no_memory(b);
    return;
  }
  for (int32_t i = 0; i < g->n_code; i++) g->code[i].useful = reaches[i];
  g->start = b->rules[start].entry;
  if (!g->code[g->start].useful)
    builder_fail(b, OSCAR_FORMAT, "no text fits: whatever is begun cannot be ended");
  else if (!mark_reaching(g, false, reaches))
    no_memory(b);
  else
    refuse_left_recursion(b, reaches);
  free(reaches);
}

oscar_status builder_finish(struct builder *b, int32_t start, struct grammar **grammar) {
  *grammar = NULL;
  struct grammar *g = b->grammar = calloc(1, sizeof *g);
  if (g) g->cache = calloc(1, sizeof *g->cache);
  if (!g || !g->cache) no_memory(b);
  if (g && g->cache) (void)pthread_mutex_init(&g->cache->lock, NULL);
  if (b->status == OSCAR_OK) emit_rules(b);
  if (b->status == OSCAR_OK) check_program(b, start);
  if (b->status == OSCAR_OK && !class_bytes(g)) no_memory(b);
  const oscar_status status = b->status;
  if (status == OSCAR_OK)
    *grammar = g;
  else
    grammar_free(g);
  builder_free(b);
  return status;
}

void grammar_free(struct grammar *grammar) {
  if (!grammar) return;
  if (grammar->cache) {
    automata_free(grammar->cache->automata);
    (void)pthread_mutex_destroy(&grammar->cache->lock);
  }
  free(grammar->cache);
  free(grammar->code);
  free(grammar->sets);
  free(grammar->stretches);
  free(grammar->set_has);
  free(grammar);
}

/* ---- classes of characters ---- */

void class_add(struct builder *b, struct char_class *class, uint32_t first, uint32_t last) {
  if (!room_for((void **)&class->ranges, &class->room, class->n + 1, sizeof *class->ranges)) { /* one stays free */
    no_memory(b);
    return;
  }
  class->ranges[class->n++] = (struct char_range){first, last};
}

static int by_first(const void *a, const void *b) {
  const struct char_range *x = a, *y = b;
  return (x->first > y->first) - (x->first < y->first);
}

static void join_ranges(struct char_class *class) {
  size_t n = 0;
  if (class->n) qsort(class->ranges, class->n, sizeof *class->ranges, by_first);
  for (size_t i = 0; i < class->n; i++) {
    struct char_range r = class->ranges[i];
    if (n > 0 && r.first <= class->ranges[n - 1].last + 1) {
      if (r.last > class->ranges[n - 1].last) class->ranges[n - 1].last = r.last;
    } else {
      class->ranges[n++] = r;
    }
  }
  class->n = n;
}

void class_settle(struct char_class *class) {
  join_ranges(class);
  size_t n = class->n;
  for (size_t i = 0; i < n; i++) {
    struct char_range *r = &class->ranges[i];
    if (r->last < 0xD800 || r->first > 0xDFFF) continue;
    if (r->first < 0xD800 && r->last > 0xDFFF) { /* class_add left room for one */
      class->ranges[class->n++] = (struct char_range){0xE000, r->last};
      r->last = 0xD7FF;
    } else if (r->first < 0xD800) {
      r->last = 0xD7FF;
    } else if (r->last > 0xDFFF) {
      r->first = 0xE000;
    } else {
      *r = class->ranges[--class->n];
      if (class->n < n) n = class->n;
      i--;
    }
  }
  join_ranges(class);
}

void class_invert(struct builder *b, struct char_class *class) {
  join_ranges(class);
  struct char_class rest = {0};
  uint32_t next = 0;
  for (size_t i = 0; i < class->n; i++) {
    if (class->ranges[i].first > next) class_add(b, &rest, next, class->ranges[i].first - 1);
    next = class->ranges[i].last + 1;
  }
  if (next <= LAST_CODE_POINT) class_add(b, &rest, next, LAST_CODE_POINT);
  free(class->ranges);
  *class = rest;
  class_settle(class);
}

void class_free(struct char_class *class) {
  free(class->ranges);
  *class = (struct char_class){0};
}
