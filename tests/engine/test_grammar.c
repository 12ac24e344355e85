/*
 * Grammars against a slow matcher that knows nothing of automata: random grammars are written down in the notation and matched by
 * trying every way; every token of a vocabulary that cuts characters apart is judged at every step of random texts.
 */
#include "grammar_walk.h"

/* ---- random grammars, and all the ways to match them ---- */

enum node_kind { NODE_TEXT, NODE_RANGE, NODE_NOT, NODE_SEQUENCE, NODE_CHOICE, NODE_REPEAT, NODE_RULE };
struct node {
  enum node_kind kind;
  const char *text;     /* TEXT */
  uint32_t first, last; /* RANGE; NOT: any character but these */
  int child[4], n, least, most;
};
enum { RULES = 4, MOST_TEXT = 24 };
struct sample {
  struct node node[400];
  int n, rule[RULES];
  char written[16384];
  size_t length;
  uint64_t random;
};

static unsigned pick(struct sample *s, unsigned n) { return (unsigned)(test_random(&s->random) % n); }
static int new_node(struct sample *s, struct node node) {
  assert_true(s->n < 400);
  s->node[s->n] = node;
  return s->n++;
}

static int terminal(struct sample *s) {
  static const char *const texts[] = {"a", "b", "ab", "ba", "é", "aé", "€", "😀b"};
  static const uint32_t ranges[][2] = {{'a', 'b'}, {0xE0, 0xFC}, {'b', 0xEA}, {0x20AC, 0x20AC}, {0x7F0, 0x1F650}};
  if (pick(s, 2)) return new_node(s, (struct node){.kind = NODE_TEXT, .text = texts[pick(s, 8)]});
  const uint32_t *r = ranges[pick(s, 5)];
  return new_node(s, (struct node){.kind = pick(s, 4) ? NODE_RANGE : NODE_NOT, .first = r[0], .last = r[1]});
}

/* `after`: rules from this one on may be called at the beginning, any rule where something was read before. */
static int expression(struct sample *s, int after, int depth) {
  const unsigned kind = depth == 0 ? 0 : pick(s, 6);
  if (kind <= 1) return terminal(s);
  if (kind == 2 && after < RULES)
    return new_node(s, (struct node){.kind = NODE_RULE, .first = (uint32_t)(after + (int)pick(s, (unsigned)(RULES - after)))});
  if (kind == 3) {
    static const int counts[][2] = {{0, -1}, {1, -1}, {0, 1}, {2, 2}, {1, 3}, {0, 4}, {2, -1}};
    const int *c = counts[pick(s, 7)];
    const int child = expression(s, after, depth - 1);
    return new_node(s, (struct node){.kind = NODE_REPEAT, .child = {child}, .n = 1, .least = c[0], .most = c[1]});
  }
  struct node node = {.kind = kind == 4 ? NODE_CHOICE : NODE_SEQUENCE, .n = 2 + (int)pick(s, 2)};
  for (int i = 0; i < node.n; i++) node.child[i] = expression(s, after, depth - 1);
  return new_node(s, node);
}

/* Something is read, then any rule: recursion that is not on the left; beside a way out. */
static int rule_body(struct sample *s, int rule) {
  const int plain = expression(s, rule + 1, 3), first = terminal(s);
  const int again = new_node(s, (struct node){.kind = NODE_RULE, .first = pick(s, RULES)}), rest = expression(s, rule + 1, 2);
  const int recursion = new_node(s, (struct node){.kind = NODE_SEQUENCE, .child = {first, again, rest}, .n = 3});
  return new_node(s, (struct node){.kind = NODE_CHOICE, .child = {recursion, plain}, .n = 2});
}

static void put(struct sample *s, const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  s->length += (size_t)vsnprintf(s->written + s->length, sizeof s->written - s->length, format, arguments);
  va_end(arguments);
  assert_true(s->length < sizeof s->written);
}

static void write_node(struct sample *s, int index) {
  const struct node *n = &s->node[index];
  switch (n->kind) {
  case NODE_TEXT:
    put(s, "\"%s\"", n->text);
    return;
  case NODE_RANGE:
  case NODE_NOT:
    put(s, "[%s\\U%08X-\\U%08X]", n->kind == NODE_NOT ? "^" : "", n->first, n->last);
    return;
  case NODE_RULE:
    put(s, n->first ? "r%u" : "root", n->first);
    return;
  case NODE_REPEAT:
    put(s, "(");
    write_node(s, n->child[0]);
    if (n->most < 0)
      put(s, n->least == 0 ? ")*" : n->least == 1 ? ")+" : "){%d,}", n->least);
    else
      put(s, n->least == 0 && n->most == 1 ? ")?" : n->least == n->most ? "){%d}" : "){%d,%d}", n->least, n->most);
    return;
  case NODE_SEQUENCE:
  case NODE_CHOICE:
    put(s, "(");
    for (int i = 0; i < n->n; i++) {
      if (i > 0) put(s, n->kind == NODE_CHOICE ? " |\n " : " ");
      write_node(s, n->child[i]);
    }
    put(s, ")");
    return;
  }
}

static void make_sample(struct sample *s, uint64_t seed) {
  *s = (struct sample){.random = seed};
  for (int r = 0; r < RULES; r++) s->rule[r] = rule_body(s, r);
  for (int r = RULES - 1; r >= 0; r--) {
    put(s, r ? "r%d ::= " : "root ::= ", r);
    write_node(s, s->rule[r]);
    put(s, " # rule\n");
  }
}

/* Where a match can end, a bit for each position, and whether one can run into the end of the text, more to come. */
struct match {
  uint32_t ends;
  bool runs_out;
};
struct matcher {
  const struct sample *s;
  const uint8_t *text;
  int n;
  struct match known[400][MOST_TEXT + 1];
  bool is_known[400][MOST_TEXT + 1];
};

/* One character by table 3-7 of the Unicode standard: its length, 0 for none, -1 for the beginning of one. */
static int character_at(const uint8_t *t, int left, uint32_t *c) {
  if (left == 0) return -1;
  static const uint8_t rows[][10] = {/* lead, then the ranges of what follows */
                                     {0xC2, 0xDF, 0x80, 0xBF},
                                     {0xE0, 0xE0, 0xA0, 0xBF, 0x80, 0xBF},
                                     {0xE1, 0xEC, 0x80, 0xBF, 0x80, 0xBF},
                                     {0xED, 0xED, 0x80, 0x9F, 0x80, 0xBF},
                                     {0xEE, 0xEF, 0x80, 0xBF, 0x80, 0xBF},
                                     {0xF0, 0xF0, 0x90, 0xBF, 0x80, 0xBF, 0x80, 0xBF},
                                     {0xF1, 0xF3, 0x80, 0xBF, 0x80, 0xBF, 0x80, 0xBF},
                                     {0xF4, 0xF4, 0x80, 0x8F, 0x80, 0xBF, 0x80, 0xBF}};
  *c = t[0];
  if (t[0] < 0x80) return 1;
  for (size_t r = 0; r < ARRAY_LENGTH(rows); r++) {
    if (t[0] < rows[r][0] || t[0] > rows[r][1]) continue;
    const int n = r == 0 ? 2 : r < 5 ? 3 : 4;
    *c = t[0] & (0x7Fu >> n);
    for (int i = 1; i < n; i++) {
      if (i == left) return -1;
      if (t[i] < rows[r][2 * i] || t[i] > rows[r][2 * i + 1]) return 0;
      *c = *c << 6 | (t[i] & 0x3Fu);
    }
    return n;
  }
  return 0;
}

static size_t utf8_of(uint32_t c, uint8_t out[4]) {
  if (c < 0x80) return out[0] = (uint8_t)c, 1;
  if (c < 0x800) return out[0] = (uint8_t)(0xC0 + c / 64), out[1] = (uint8_t)(0x80 + c % 64), 2;
  if (c < 0x10000)
    return out[0] = (uint8_t)(0xE0 + c / 4096), out[1] = (uint8_t)(0x80 + c / 64 % 64), out[2] = (uint8_t)(0x80 + c % 64), 3;
  out[0] = (uint8_t)(0xF0 + c / 262144), out[1] = (uint8_t)(0x80 + c / 4096 % 64);
  return out[2] = (uint8_t)(0x80 + c / 64 % 64), out[3] = (uint8_t)(0x80 + c % 64), 4;
}

static struct match match_character(const struct matcher *m, const struct node *n, int at) {
  uint32_t c = 0;
  const int bytes = character_at(m->text + at, m->n - at, &c);
  const bool inverted = n->kind == NODE_NOT;
  if (bytes > 0) return (struct match){(c >= n->first && c <= n->last) != inverted ? 1u << (at + bytes) : 0, false};
  if (bytes == 0) return (struct match){0, false};
  /* Any that begins so? Those of as many bytes as the lead says, with the bits that are there. */
  const int left = m->n - at, lead = left ? m->text[at] : 0, length = left == 0 ? 1 : lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4;
  uint32_t bits = left ? (uint32_t)lead & (0x7Fu >> length) : 0;
  for (int i = 1; i < left; i++) bits = bits << 6 | (m->text[at + i] & 0x3Fu);
  const uint32_t low = left ? bits << 6 * (length - left) : 0, high = left ? low | ((1u << 6 * (length - left)) - 1) : 0x10FFFF;
  for (uint32_t x = low; x <= high && x <= 0x10FFFF; x++) {
    uint8_t encoded[4];
    if ((x >= 0xD800 && x < 0xE000) || (x >= n->first && x <= n->last) == inverted) continue;
    if (utf8_of(x, encoded) > (size_t)left && memcmp(encoded, m->text + at, (size_t)left) == 0) return (struct match){0, true};
  }
  return (struct match){0, false};
}

static struct match match(struct matcher *m, int index, int at);

/* From all positions in `from`. */
static struct match match_from(struct matcher *m, int index, uint32_t from) {
  struct match all = {0};
  for (int at = 0; at <= m->n; at++) {
    if (!(from >> at & 1)) continue;
    const struct match one = match(m, index, at);
    all.ends |= one.ends;
    all.runs_out |= one.runs_out;
  }
  return all;
}

static struct match match_repeat(struct matcher *m, const struct node *n, int at) {
  struct match all = {0};
  uint32_t reached = 1u << at;
  for (int i = 0; i < (n->most < 0 ? n->least + m->n + 1 : n->most) + 1; i++) {
    if (i >= n->least) all.ends |= reached;
    if (n->most >= 0 && i == n->most) break;
    const struct match one = match_from(m, n->child[0], reached);
    all.runs_out |= one.runs_out;
    reached = one.ends;
  }
  return all;
}

static struct match match(struct matcher *m, int index, int at) {
  if (m->is_known[index][at]) return m->known[index][at];
  const struct node *n = &m->s->node[index];
  struct match result = {0};
  if (n->kind == NODE_TEXT) {
    const int length = (int)strlen(n->text), left = m->n - at, both = length < left ? length : left;
    const bool same = memcmp(n->text, m->text + at, (size_t)both) == 0;
    result = (struct match){same && length <= left ? 1u << (at + length) : 0, same && length > left};
  } else if (n->kind == NODE_RANGE || n->kind == NODE_NOT) {
    result = match_character(m, n, at);
  } else if (n->kind == NODE_RULE) {
    result = match(m, m->s->rule[n->first], at);
  } else if (n->kind == NODE_REPEAT) {
    result = match_repeat(m, n, at);
  } else {
    if (n->kind == NODE_SEQUENCE) result.ends = 1u << at;
    for (int i = 0; i < n->n; i++) {
      const struct match one = n->kind == NODE_SEQUENCE ? match_from(m, n->child[i], result.ends) : match(m, n->child[i], at);
      result.runs_out |= one.runs_out;
      result.ends = n->kind == NODE_SEQUENCE ? one.ends : result.ends | one.ends;
    }
  }
  m->is_known[index][at] = true;
  m->known[index][at] = result;
  return result;
}

static enum fit slow_fit(const struct sample *s, const char *text, int n) {
  static struct matcher m;
  memset(m.is_known, 0, sizeof m.is_known);
  m.s = s, m.text = (const uint8_t *)text, m.n = n;
  const struct match whole = match(&m, s->rule[0], 0);
  return whole.ends >> n & 1 ? FITS_SENTENCE : whole.runs_out ? FITS_BEGINNING : FITS_NOT;
}

static void random_grammars_allow_what_a_slow_matcher_does(void **state) {
  (void)state;
  static const char *const more[] = {"é",
                                     "\xC3",
                                     "\xA9"
                                     "a",
                                     "€b",
                                     "\xE2\x82",
                                     "\xAC",
                                     "😀",
                                     "\xF0\x9F",
                                     "\x98\x80"
                                     "b",
                                     "aé\xF0",
                                     "ü€"};
  struct test_vocabulary *v = vocabulary_make("ab", 20, more, (int)ARRAY_LENGTH(more), 3);
  static struct sample s;
  uint64_t random = 99, allowed[64];
  const int grammars = rounds(20, 60);
  int sentences = 0, judged = 0;
  for (int round = 0; round < grammars; round++) {
    char error[256];
    struct grammar *g = NULL;
    make_sample(&s, (uint64_t)round + 1);
    if (grammar_parse(s.written, s.length, &g, error, sizeof error) != OSCAR_OK) fail_msg("%s\n%s", error, s.written);
    for (int text_round = 0; text_round < 3; text_round++) {
      struct grammar_state *at;
      char text[MOST_TEXT + 12];
      int n = 0;
      assert_int_equal(grammar_state_create(g, v->table, &at), OSCAR_OK);
      while (n < 14) {
        const int allowed_count = check_mask(at, v->table, allowed);
        const enum fit now = slow_fit(&s, text, n);
        assert_int_equal(grammar_may_end(at), now == FITS_SENTENCE);
        assert_int_equal(bit_of(allowed, v->end), now == FITS_SENTENCE);
        sentences += now == FITS_SENTENCE;
        for (int32_t id = 0; id < v->end; id++) {
          const size_t bytes = v->spelling[id].bytes;
          if (id < 128 && id != 'a' && id != 'b' && id != 'c') continue; /* bytes that are like c */
          memcpy(text + n, v->spelling[id].text, bytes);
          const bool fits = bytes > 0 && slow_fit(&s, text, n + (int)bytes) != FITS_NOT;
          if (fits != bit_of(allowed, id))
            fail_msg("token %d after \"%.*s\": allowed %d\n%s", (int)id, n, text, !fits, s.written);
          judged++;
        }
        if (allowed_count - (now == FITS_SENTENCE) == 0) {
          assert_true(grammar_must_end(at));
          break;
        }
        assert_false(grammar_must_end(at));
        int32_t id;
        do id = (int32_t)(test_random(&random) % (unsigned)v->end);
        while (!bit_of(allowed, id));
        memcpy(text + n, v->spelling[id].text, v->spelling[id].bytes);
        n += (int)v->spelling[id].bytes;
        assert_int_equal(grammar_accept(at, id), OSCAR_OK);
      }
      grammar_state_free(at);
    }
    grammar_free(g);
  }
  printf("%d tokens judged, %d texts were sentences\n", judged, sentences);
  assert_true(sentences > grammars);
  vocabulary_free_all(v);
}

/* ---- characters ---- */

static struct grammar *parse(const char *text) {
  struct grammar *g = NULL;
  char error[256] = "";
  if (grammar_parse(text, strlen(text), &g, error, sizeof error) != OSCAR_OK) fail_msg("%s: %s", text, error);
  return g;
}

static void ranges_of_characters_are_exact(void **state) {
  (void)state;
  struct test_vocabulary *v = vocabulary_make("a", 0, NULL, 0, 1);
  uint64_t random = 8;
  static const uint32_t edges[] = {0,       0x7F,     0x80, 0x7FF, 0x800,  0xD7FF,  0xE000, 0xFFFF,
                                   0x10000, 0x10FFFF, 0x3F, 0xFFF, 0x1000, 0x3FFFF, 0x40000};
  for (int round = 0; round < 60; round++) {
    uint32_t r[2];
    for (int i = 0; i < 2; i++) do
        r[i] = round < 30 ? edges[test_random(&random) % ARRAY_LENGTH(edges)]
                          : (uint32_t)(test_random(&random) % 0x110000) >> test_random(&random) % 12;
      while (r[i] >= 0xD800 && r[i] < 0xE000);
    const uint32_t first = r[0] < r[1] ? r[0] : r[1], last = r[0] < r[1] ? r[1] : r[0];
    const bool inverted = round % 3 == 2;
    char text[80];
    snprintf(text, sizeof text, "root ::= [%s\\U%08X-\\U%08X]", inverted ? "^" : "", first, last);
    if (inverted && first == 0 && last == 0x10FFFF) continue;
    struct grammar *g = parse(text);
    const uint32_t stride = (uint32_t)rounds(23, 3);
    for (uint32_t c = 0; c <= 0x10FFFF; c += c < 0x3000 || (c & 0xFFF) < 3 || (c & 0xFFF) + stride > 0xFFF ||
                                                     (c + stride >= first && c < first + 2) ||
                                                     (c + stride >= last && c < last + 2)
                                                 ? 1
                                                 : stride) {
      uint8_t bytes[4];
      const size_t n = utf8_of(c, bytes);
      const bool surrogate = c >= 0xD800 && c < 0xE000, inside = !surrogate && (c >= first && c <= last) != inverted;
      if ((grammar_fit(g, v->table, (const char *)bytes, n) == FITS_SENTENCE) != inside) fail_msg("%s: U+%04X", text, c);
    }
    grammar_free(g);
  }
  struct grammar *any = parse("root ::= .");
  static const char *const not_utf8[] = {
      "\x80", "\xC0\x80", "\xC1\xBF", "\xE0\x9F\xBF", "\xF0\x8F\xBF\xBF", "\xF4\x90\x80\x80", "\xF5", "\xED\xA0\x80", "\xFF"};
  for (size_t i = 0; i < ARRAY_LENGTH(not_utf8); i++)
    assert_int_equal(grammar_fit(any, v->table, not_utf8[i], strlen(not_utf8[i])), FITS_NOT);
  grammar_free(any);
  vocabulary_free_all(v);
}

/* ---- the notation ---- */

static void the_notation_means_what_it_says(void **state) {
  (void)state;
  struct test_vocabulary *v = vocabulary_make("a", 0, NULL, 0, 1);
  static const struct {
    const char *grammar, *yes[6], *no[6];
  } cases[] = {
      {"root ::= \"yes\" | \"no\" [0-9]{2,4} (\",\" ws number)* # comment\nws ::= \" \"?\nnumber ::= [0-9]+",
       {"yes", "no12", "no1234", "no123,4", "no12, 55,6"},
       {"no1", "no12345", "yes,1", "no12,", "ye", ""}},
      {"root ::= \"\\n\\t\\r\\\\\\\"\\x41\\u00e9\\U0001F600\"", {"\n\t\r\\\"Aé😀"}, {"\n\t\r\\\"Aé", "x"}},
      {"root ::= [\\]\\-^a-c\\\\x]", {"]", "-", "^", "b", "\\", "x"}, {"d", "[", "ab", ""}},
      {"root ::= [^\\n\"]+", {"ab", "é", "a b"}, {"a\n", "\"", ""}},
      {"root ::= [a-]", {"a", "-"}, {"b", ""}},
      {"root::=a|b\na::=\"1\"\nb::=\"2\"", {"1", "2"}, {"12", ""}},
      {"root ::= (\n \"a\"\n | \"b\" # c\n)\n{2}", {"ab", "bb"}, {"a", "aba"}},
      {"root ::= \"a\"{,2} \"b\"{1,}", {"b", "aabbb"}, {"aaab", "aa"}},
      {"root ::= \"a\"{0} \"b\"", {"b"}, {"ab"}},
      {"root ::= \"\" | \"x\" root", {"", "x", "xxx"}, {"y"}},
      {"root ::= \"(\" root \")\" root | ", {"", "()", "(())()"}, {"(", ")", "(()"}},
      {"root ::= expr\nexpr ::= term ([-+*/] term)*\nterm ::= [0-9]+ | \"(\" expr \")\"", {"1", "(1+2)*3"}, {"1+", "(1", "()"}},
      {"root ::= (\"\"* (\"a\"?)*)* \"b\"", {"b", "aab"}, {"a"}},
      {"root ::= x x x\nx ::= y?\ny ::= \"a\"", {"", "a", "aaa"}, {"aaaa"}},
      {"root ::= \"a\" | dead \"b\"\ndead ::= \"x\" dead", {"a"}, {"x", "b"}},
      {"a-b_1 ::= \"q\"\nroot ::= a-b_1+", {"q", "qq"}, {""}},
  };
  for (size_t i = 0; i < ARRAY_LENGTH(cases); i++) {
    struct grammar *g = parse(cases[i].grammar);
    for (int k = 0; k < 6 && cases[i].yes[k]; k++)
      if (grammar_fit(g, v->table, cases[i].yes[k], strlen(cases[i].yes[k])) != FITS_SENTENCE)
        fail_msg("%s refuses \"%s\"", cases[i].grammar, cases[i].yes[k]);
    for (int k = 0; k < 6 && cases[i].no[k]; k++)
      if (grammar_fit(g, v->table, cases[i].no[k], strlen(cases[i].no[k])) == FITS_SENTENCE)
        fail_msg("%s takes \"%s\"", cases[i].grammar, cases[i].no[k]);
    grammar_free(g);
  }
  /* what leads nowhere is never begun */
  struct grammar *g = parse("root ::= \"a\" | \"x\" dead\ndead ::= \"x\" dead");
  assert_int_equal(grammar_fit(g, v->table, "x", 1), FITS_NOT);
  grammar_free(g);
  vocabulary_free_all(v);
}

static void refused(const char *text, oscar_status status, const char *said) {
  struct grammar *g = (struct grammar *)&g;
  char error[256] = "";
  const oscar_status got = grammar_parse(text, strlen(text), &g, error, sizeof error);
  if (got != status || !strstr(error, said))
    fail_msg("%.60s: %s: \"%s\", expected \"%s\"", text, oscar_status_name(got), error, said);
  assert_null(g);
}

static void wrong_grammars_are_refused_with_their_place(void **state) {
  (void)state;
  refused("", OSCAR_FORMAT, "no rule root");
  refused("rot ::= \"a\"", OSCAR_FORMAT, "no rule root");
  refused("root ::= \"a", OSCAR_FORMAT, "line 1, column 10");
  refused("root ::= \"a\"\n  | [a", OSCAR_FORMAT, "line 2, column 5");
  refused("root ::= [z-a]", OSCAR_FORMAT, "backwards");
  refused("root ::= (\"a\"", OSCAR_FORMAT, "without its )");
  refused("root ::= \"a\")", OSCAR_FORMAT, "without its (");
  refused("root ::= \"\\q\"", OSCAR_FORMAT, "escape");
  refused("root ::= \"\\x4\"", OSCAR_FORMAT, "escape");
  refused("root ::= \"\\uD800\"", OSCAR_FORMAT, "escape");
  refused("root ::= \"\\U00110000\"", OSCAR_FORMAT, "escape");
  refused("root ::= \"\xFF\"", OSCAR_FORMAT, "UTF-8");
  refused("root ::= other", OSCAR_FORMAT, "no rule other");
  refused("root ::= \"a\"\nroot ::= \"b\"", OSCAR_FORMAT, "line 2, column 1: this rule was defined before");
  refused("root ::= \"a\"{3,2}", OSCAR_FORMAT, "backwards");
  refused("root ::= \"a\"{,}", OSCAR_FORMAT, "{n,m}");
  refused("root ::= \"a\"{1,100000000}", OSCAR_UNSUPPORTED, "repetitions");
  refused("root ::= \"a\"{99999999999999999999}", OSCAR_UNSUPPORTED, "repetitions");
  refused("root ::= * \"a\"", OSCAR_FORMAT, "expected");
  refused("root = \"a\"", OSCAR_FORMAT, "expected a rule");
  refused("root ::= root \"a\" | \"b\"", OSCAR_UNSUPPORTED, "left recursion: root");
  refused("root ::= \"x\" a\na ::= b?  c\nb ::= \"q\"\nc ::= (\"z\"? a) \"y\" | \"k\"", OSCAR_UNSUPPORTED, "left recursion");
  refused("root ::= \"x\"? root", OSCAR_FORMAT, "cannot be ended");
  refused("root ::= \"x\" root", OSCAR_FORMAT, "cannot be ended");
  refused("root ::= root", OSCAR_FORMAT, "cannot be ended");
  refused("root ::= [^\\x00-\\U0010FFFF]", OSCAR_FORMAT, "cannot be ended");
}

/* ---- what is written to do harm ---- */

/* Masks that are shared among the places of a long count, against tokens one by one, all along it: far from its end, where tokens
 * reach it, and at it. */
static void long_counts_allow_what_they_say(void **state) {
  (void)state;
  static const char *const texts[] = {
      "root ::= \"\\\"\" [^\"\\\\]{0,60} \"\\\"\"",
      "root ::= \"[\" item{40,80} \"]\"\nitem ::= \"a\"? \"b\" | \"c\"",
      "root ::= part \".\" part?\npart ::= ([a-c]{3,50} \",\"){20,40} \"c\"",
      "root ::= (\"a\"?){50} \"b\" | [a-b]{30} \"c\"{90}",
      "root ::= ([ab]{17} [bc]{0,20}){1,2} (\"ab\" | \"b\"){19,} \"c\"",
      "root ::= \"[\" ([ab] | \"c\" [ab])* \"]\" part{2} \"c\"\npart ::= (\"a\" [bc] | \"b\"){45} \",\"",
  };
  static const char *const more[] = {"abababababab", "bbbbbbbbbbbb", "cccccccccccc", "b\"", "c]", ",", ".c"};
  struct test_vocabulary *v = vocabulary_make("abc\"],.", 250, more, (int)ARRAY_LENGTH(more), 8);
  uint64_t random = 6, *allowed = calloc(((size_t)v->n + 63) / 64, sizeof *allowed);
  for (size_t i = 0; i < ARRAY_LENGTH(texts); i++) {
    struct grammar *g;
    char error[256];
    if (grammar_parse(texts[i], strlen(texts[i]), &g, error, sizeof error) != OSCAR_OK) fail_msg("%s", error);
    assert_true(g->n_stretches > 0);
    for (int round = 0; round < 8; round++) {
      struct grammar_state *s;
      assert_int_equal(grammar_state_create(g, v->table, &s), OSCAR_OK);
      for (int step = 0; step < 300 && !grammar_must_end(s); step++) {
        const int n = check_mask(s, v->table, allowed);
        assert_true(n > 0);
        int left = (int)(test_random(&random) % (unsigned)n), id = 0;
        while (!bit_of(allowed, id) || left-- > 0) id++;
        /* Most ways lead to the end of the count, not past it. */
        if (token_ends(v->table, id) || (round % 2 && strchr("\"],.", v->spelling[id].text[0]) && n > 1)) continue;
        assert_int_equal(grammar_accept(s, id), OSCAR_OK);
      }
      grammar_state_free(s);
    }
    grammar_free(g);
  }
  free(allowed);
  vocabulary_free_all(v);
}

static void hostile_grammars_end_soon(void **state) {
  (void)state;
  const size_t bytes = MOST_GRAMMAR_BYTES;
  char *text = malloc(bytes + 1), error[256];
  struct grammar *g;
  /* parentheses */
  strcpy(text, "root ::= ");
  memset(text + 9, '(', bytes - 9);
  assert_int_equal(grammar_parse(text, bytes, &g, error, sizeof error), OSCAR_UNSUPPORTED);
  assert_non_null(strstr(error, "nested"));
  /* one literal of a megabyte */
  memset(text + 9, 'a', bytes - 9);
  text[9] = text[bytes - 1] = '"';
  assert_int_equal(grammar_parse(text, bytes, &g, error, sizeof error), OSCAR_OK);
  grammar_free(g);
  assert_int_equal(grammar_parse(text, bytes + 1, &g, error, sizeof error), OSCAR_UNSUPPORTED);
  /* many alternatives, many uses of undefined rules, many rules */
  for (size_t i = 9; i < bytes; i++) text[i] = "|x"[i % 2];
  assert_int_equal(grammar_parse(text, bytes, &g, error, sizeof error), OSCAR_FORMAT);
  size_t n = 0;
  for (int i = 0; n + 64 < bytes && i < 40000; i++) n += (size_t)sprintf(text + n, "r%d::=r%d\n", i, i + 1);
  assert_int_equal(grammar_parse(text, n, &g, error, sizeof error), OSCAR_UNSUPPORTED);
  /* counts in counts are not multiplied */
  g = parse("root ::= (((\"ab\"{1000}){1000}){1000}){1000}");
  assert_true(g->n_code < 20000);
  grammar_free(g);
  refused("root ::= [a-é]{100000} [b-é]{100000} [c-é]{100000} [d-é]{100000} [e-é]{100000} [f-é]{100000} [g-é]{100000} "
          "[h-é]{100000} [i-é]{100000} [j-é]{100000} [k-é]{100000}",
          OSCAR_UNSUPPORTED, "too large");
  free(text);
  /* ambiguity that grows while it runs: an error, or an answer, and soon */
  static const char *const growing[] = {
      "root ::= ((\"a\"?){1000}){1000}",
      "root ::= \"a\" root? root? root? | \"b\"",
      "root ::= x*\nx ::= \"a\" x x | \"a\" x | \"a\"",
      "root ::= [ab]* \"a\" [ab]{60} \"c\"",
      "root ::= (\"a\"* \"a\"*)* (\"a\"* (\"a\"* \"a\"*)*)* \"b\"",
  };
  struct test_vocabulary *v = vocabulary_make("ab", 200, (const char *const[]){"aaaaaaaa", "aaaaaaaaaaaa", "abababab"}, 3, 1);
  uint64_t allowed[64];
  for (size_t i = 0; i < ARRAY_LENGTH(growing); i++) {
    g = parse(growing[i]);
    struct grammar_state *s;
    const int64_t begun = time_ns();
    oscar_status status = grammar_state_create(g, v->table, &s);
    int steps = 0;
    for (; status == OSCAR_OK && steps < 300; steps++) {
      status = grammar_allowed(s, allowed);
      if (status == OSCAR_OK && bit_of(allowed, 'a')) status = grammar_accept(s, 'a');
    }
    printf("%s: %s after %d steps, %.0f ms\n", growing[i], oscar_status_name(status), steps, (double)(time_ns() - begun) / 1e6);
    assert_true(status == OSCAR_OK || status == OSCAR_UNSUPPORTED || status == OSCAR_NO_SPACE);
    grammar_state_free(s);
    grammar_free(g);
  }
  vocabulary_free_all(v);
}

/* ---- states ---- */

static void states_are_copied_and_kept_after_an_error(void **state) {
  (void)state;
  struct test_vocabulary *v = vocabulary_make("abc", 40, NULL, 0, 4);
  struct grammar *g = parse("root ::= \"ab\" (\"c\" | \"d\" root)");
  struct grammar_state *s, *copy;
  assert_int_equal(grammar_state_create(g, v->table, &s), OSCAR_OK);
  assert_int_equal(grammar_accept(s, 'b'), OSCAR_INVALID_ARGUMENT);
  assert_int_equal(grammar_accept(s, -1), OSCAR_INVALID_ARGUMENT);
  assert_int_equal(grammar_accept(s, v->n), OSCAR_INVALID_ARGUMENT);
  assert_int_equal(grammar_accept(s, v->end), OSCAR_INVALID_ARGUMENT);
  assert_int_equal(grammar_accept(s, v->end - 1), OSCAR_INVALID_ARGUMENT); /* no text */
  assert_int_equal(grammar_accept(s, 'a'), OSCAR_OK);
  assert_int_equal(grammar_state_copy(s, &copy), OSCAR_OK);
  assert_int_equal(grammar_accept(s, 'b'), OSCAR_OK);
  assert_int_equal(grammar_accept(s, 'c'), OSCAR_OK);
  assert_true(grammar_may_end(s) && grammar_must_end(s));
  assert_false(grammar_may_end(copy));
  assert_true(grammar_allows(copy, 'b'));
  assert_false(grammar_allows(copy, 'c'));
  assert_true(grammar_allows(s, v->end));
  assert_int_equal(grammar_accept(s, v->end), OSCAR_OK);
  assert_false(grammar_allows(s, v->end)); /* it has ended */
  uint64_t allowed[64];
  assert_int_equal(check_mask(s, v->table, allowed), 0);
  grammar_state_free(s);
  assert_int_equal(grammar_accept(copy, 'b'), OSCAR_OK);
  grammar_state_free(copy);
  grammar_state_free(NULL);
  grammar_free(g);
  grammar_free(NULL);
  vocabulary_free_all(v);
}

/* Millions of situations: what is not in use is forgotten, what is in use is not. */
static void memory_is_bounded(void **state) {
  (void)state;
  struct test_vocabulary *v = vocabulary_make("ab", 200, NULL, 0, 4);
  struct grammar *g = parse("root ::= [ab]* \"a\" [ab]{18} \"c\"");
  struct grammar_state *s, *early;
  uint64_t random = 2, allowed[64];
  char text[40000];
  assert_int_equal(grammar_state_create(g, v->table, &s), OSCAR_OK);
  for (int i = 0; i < 30; i++) assert_int_equal(grammar_accept(s, "ab"[i % 2]), OSCAR_OK);
  assert_int_equal(grammar_state_copy(s, &early), OSCAR_OK);
  for (int i = 0; i < 40000; i++) {
    text[i] = "ab"[test_random(&random) % 2];
    assert_int_equal(grammar_accept(s, text[i]), OSCAR_OK);
    if (i % 8 == 0) assert_int_equal(grammar_allowed(s, allowed), OSCAR_OK);
    if (i > 20 && i % 97 == 0) assert_int_equal(bit_of(allowed, 'c'), i % 8 == 0 ? text[i - 18] == 'a' : bit_of(allowed, 'c'));
  }
  assert_true(grammar_allows(early, 'c') == ("ab"[(30 - 19) % 2] == 'a'));
  check_mask(early, v->table, allowed);
  check_mask(s, v->table, allowed);
  grammar_state_free(s);
  grammar_state_free(early);
  grammar_free(g);
  vocabulary_free_all(v);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(random_grammars_allow_what_a_slow_matcher_does),
      cmocka_unit_test(ranges_of_characters_are_exact),
      cmocka_unit_test(the_notation_means_what_it_says),
      cmocka_unit_test(wrong_grammars_are_refused_with_their_place),
      cmocka_unit_test(long_counts_allow_what_they_say),
      cmocka_unit_test(hostile_grammars_end_soon),
      cmocka_unit_test(states_are_copied_and_kept_after_an_error),
      cmocka_unit_test(memory_is_bounded),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
