/* Grammars on the vocabularies of real models: answers are valid JSON, masks are what tokens say one by one, and how long a mask
 * takes. Skipped for models that are not fetched. */
#include "grammar_walk.h"

#include "model/tokenizer.h"

#include <jansson.h>
#include <malloc.h>
#include <time.h>

static const char person[] =
    "{\"type\":\"object\",\"properties\":{\"name\":{\"type\":\"string\"},\"age\":{\"type\":\"integer\",\"minimum\":0,\"maximum\":"
    "150},"
    "\"tags\":{\"type\":\"array\",\"items\":{\"type\":\"string\"},\"maxItems\":4},\"kind\":{\"enum\":[\"a\",\"bb\",\"ccc\"]},"
    "\"when\":{\"format\":\"date-time\"},\"address\":{\"type\":\"object\",\"properties\":{\"street\":{\"type\":\"string\","
    "\"maxLength\":40},"
    "\"zip\":{\"type\":\"string\",\"pattern\":\"^[0-9]{5}$\"}},\"required\":[\"street\"],\"additionalProperties\":false},\"x\":{"
    "\"type\":\"number\"},"
    "\"more\":{}},\"required\":[\"name\",\"age\",\"address\"],\"additionalProperties\":false}";

/* Time of this thread alone: tests run beside others. */
static double thread_ms(void) {
  struct timespec now;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return (double)now.tv_sec * 1e3 + (double)now.tv_nsec / 1e6;
}

static int by_time(const void *a, const void *b) {
  return (*(const double *)a > *(const double *)b) - (*(const double *)a < *(const double *)b);
}

/* What the walks below ask of every token at every step, found out once. */
enum { ENDS = 1, BEGINS_CLOSING = 2, HAS_CLOSING = 4 };
static uint8_t *traits_of(const struct token_table *t) {
  uint8_t *traits = calloc((size_t)t->vocab, 1);
  assert_non_null(traits);
  for (int32_t id = 0; id < t->vocab; id++) {
    const char *spelled = t->text + t->offset[id];
    const size_t bytes = t->offset[id + 1] - t->offset[id];
    if (token_ends(t, id)) traits[id] |= ENDS;
    if (strchr("\"}]", *spelled)) traits[id] |= BEGINS_CLOSING;
    if (memchr(spelled, '"', bytes) || memchr(spelled, ']', bytes) || memchr(spelled, '\\', bytes)) traits[id] |= HAS_CLOSING;
  }
  return traits;
}

/* The first token from `id` on that is in the mask; the vocabulary's size: none. */
static int32_t next_allowed(const struct token_table *t, const uint64_t *allowed, int32_t id) {
  while (id < t->vocab) {
    const uint64_t rest = allowed[id / 64] >> (id % 64);
    if (rest) return id + __builtin_ctzll(rest);
    id += 64 - id % 64;
  }
  return t->vocab;
}

/* One answer: any token that is allowed, later on one with a quote or bracket where there is one. False: it got too long. */
static bool answer(const struct grammar *g, const struct token_table *t, const uint8_t *traits, uint64_t *random,
                   uint64_t *allowed, double *ms, int *n_ms, json_t **value) {
  struct grammar_state *s;
  char text[8192];
  size_t n = 0;
  assert_int_equal(grammar_state_create(g, t, &s), OSCAR_OK);
  int32_t *few = malloc((size_t)t->vocab * sizeof *few), *closing = malloc((size_t)t->vocab * sizeof *closing);
  bool done = false;
  for (int step = 0; step < 250 && n + 512 < sizeof text; step++) {
    int n_few = 0, n_closing = 0;
    if (grammar_must_end(s)) {
      done = true;
      break;
    }
    const double begun = thread_ms();
    assert_int_equal(grammar_allowed(s, allowed), OSCAR_OK);
    ms[(*n_ms)++] = thread_ms() - begun;
    for (int32_t id = 0; step % 40 == 7 && id < t->vocab; id++)
      if (grammar_allows(s, id) != bit_of(allowed, id)) fail_msg("token %d differs in the mask", (int)id);
    for (int32_t id = -1; (id = next_allowed(t, allowed, id + 1)) < t->vocab;) {
      if (traits[id] & ENDS) continue;
      few[n_few++] = id;
      if (traits[id] & BEGINS_CLOSING) closing[n_closing++] = id;
    }
    assert_true(n_few > 0);
    const bool close = n_closing > 0 && test_random(random) % 10 < (step < 40 ? 2u : 9u);
    const int32_t id = close ? closing[test_random(random) % (unsigned)n_closing] : few[test_random(random) % (unsigned)n_few];
    memcpy(text + n, t->text + t->offset[id], t->offset[id + 1] - t->offset[id]);
    n += t->offset[id + 1] - t->offset[id];
    assert_int_equal(grammar_accept(s, id), OSCAR_OK);
  }
  json_error_t error;
  if (done && !(*value = json_loadb(text, n, JSON_DECODE_ANY, &error))) fail_msg("%.*s: %s", (int)n, text, error.text);
  free(few);
  free(closing);
  grammar_state_free(s);
  return done;
}

static void try_model(const char *name) {
  const char *path = test_model(name);
  if (!path) skip();
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 1);
  struct gguf *file;
  struct tokenizer *tokenizer;
  struct token_table *t;
  struct grammar *g;
  char error[256];
  assert_ok(c, gguf_open(c, path, &file));
  assert_ok(c, tokenizer_create(c, file, &tokenizer));
  const int32_t eos = tokenizer_eos(tokenizer);
  double begun = thread_ms();
  assert_int_equal(token_table_create(tokenizer, NULL, 0, &t), OSCAR_OK);
  printf("%s: a table of %d tokens in %.0f ms", name, t->vocab, thread_ms() - begun);
  begun = thread_ms();
  assert_int_equal(grammar_of_schema(person, sizeof person - 1, &g, error, sizeof error), OSCAR_OK);
  printf(", a schema in %.2f ms\n", thread_ms() - begun);
  uint64_t *allowed = malloc(((size_t)t->vocab + 63) / 64 * sizeof *allowed), random = 5;
  double *ms = malloc(40 * 250 * sizeof *ms);
  uint8_t *traits = traits_of(t);
  int n = 0, finished = 0;
  for (int round = 0; round < 40; round++) {
    json_t *value = NULL;
    if (!answer(g, t, traits, &random, allowed, ms, &n, &value)) continue;
    finished++;
    assert_true(json_is_string(json_object_get(value, "name")));
    assert_in_range(json_integer_value(json_object_get(value, "age")), 0, 150);
    assert_true(json_is_string(json_object_get(json_object_get(value, "address"), "street")));
    json_decref(value);
  }
  assert_true(finished > 5);
  const double first = ms[0];
  qsort(ms, (size_t)n, sizeof *ms, by_time);
  double sum = 0;
  for (int i = 0; i < n; i++) sum += ms[i];
  printf("%s: %d masks: the first %.2f ms, mean %.3f, median %.4f, 90 of 100 %.4f, 99 of 100 %.3f, the slowest %.2f\n", name, n,
         first, sum / n, ms[n / 2], ms[n * 9 / 10], ms[n * 99 / 100], ms[n - 1]);
  grammar_free(g);
  token_table_free(t);
  free(traits);

  static const char control[] = "root ::= \"<|im_start|>\" | \"<|endoftext|>\"";
  /* a control token is text only where it is named */
  assert_int_equal(grammar_parse(control, sizeof control - 1, &g, error, sizeof error), OSCAR_OK);
  const int32_t start = tokenizer_find(tokenizer, "<|im_start|>");
  assert_true(start >= 0 && eos >= 0);
  for (int visible = 0; visible < 2; visible++) {
    struct grammar_state *s;
    assert_int_equal(token_table_create(tokenizer, &start, visible, &t), OSCAR_OK);
    assert_int_equal(grammar_state_create(g, t, &s), OSCAR_OK);
    assert_int_equal(grammar_allowed(s, allowed), OSCAR_OK);
    assert_int_equal(bit_of(allowed, start), visible);
    assert_false(bit_of(allowed, eos));
    assert_int_equal(grammar_allows(s, start), visible);
    grammar_state_free(s);
    token_table_free(t);
  }
  grammar_free(g);
  free(allowed);
  free(ms);
  tokenizer_free(tokenizer);
  gguf_close(file);
  oscar_context_free(c);
}

/* ---- long counts ---- */

static size_t held_bytes(void) {
  const struct mallinfo2 info = mallinfo2();
  return info.uordblks + info.hblkhd;
}

/* One answer as long as it gets: a token that closes something is taken only where nothing else is allowed. Returns its bytes. */
static size_t long_answer(const struct grammar *g, const struct token_table *t, uint64_t *random, char *text, size_t room,
                          double *ms, int most, int *n_ms) {
  struct grammar_state *s;
  size_t n = 0;
  uint64_t *allowed = malloc(((size_t)t->vocab + 63) / 64 * sizeof *allowed);
  int32_t *open = malloc((size_t)t->vocab * sizeof *open), *all = malloc((size_t)t->vocab * sizeof *all);
  uint8_t *traits = traits_of(t);
  assert_int_equal(grammar_state_create(g, t, &s), OSCAR_OK);
  for (*n_ms = 0; *n_ms < most && !grammar_must_end(s) && n + 512 < room; (*n_ms)++) {
    int n_open = 0, n_all = 0;
    const double begun = thread_ms();
    assert_int_equal(grammar_allowed(s, allowed), OSCAR_OK);
    ms[*n_ms] = thread_ms() - begun;
    for (int32_t id = -1; (id = next_allowed(t, allowed, id + 1)) < t->vocab;) {
      if (traits[id] & ENDS) continue;
      all[n_all++] = id;
      if (!(traits[id] & HAS_CLOSING)) open[n_open++] = id;
    }
    assert_true(n_all > 0);
    const int32_t id = n_open ? open[test_random(random) % (unsigned)n_open] : all[test_random(random) % (unsigned)n_all];
    memcpy(text + n, t->text + t->offset[id], t->offset[id + 1] - t->offset[id]);
    n += t->offset[id + 1] - t->offset[id];
    assert_int_equal(grammar_accept(s, id), OSCAR_OK);
  }
  assert_true(grammar_must_end(s));
  grammar_state_free(s);
  free(allowed);
  free(open);
  free(all);
  free(traits);
  return n;
}

static json_t *measure_long(const char *what, const char *schema, const struct token_table *t) {
  enum { MOST = 60000, ROOM = 1 << 20 };
  struct grammar *g;
  char error[256], *text = malloc(ROOM);
  double *ms = malloc(MOST * sizeof *ms), sum = 0;
  uint64_t random = 3;
  int n;
  const size_t before = held_bytes();
  const double begun = thread_ms();
  assert_int_equal(grammar_of_schema(schema, strlen(schema), &g, error, sizeof error), OSCAR_OK);
  const double compiled = thread_ms() - begun;
  const size_t compact = held_bytes() - before, bytes = long_answer(g, t, &random, text, ROOM, ms, MOST, &n);
  const size_t walked = held_bytes() - before;
  json_t *value = json_loadb(text, bytes, JSON_DECODE_ANY, NULL);
  assert_non_null(value);
  qsort(ms, (size_t)n, sizeof *ms, by_time);
  for (int i = 0; i < n; i++) sum += ms[i];
  printf("%s: compiled in %.1f ms, %.2f MiB; %d tokens: mean %.4f ms a mask, 99 of 100 %.4f, the slowest %.2f, then %.2f MiB\n",
         what, compiled, (double)compact / 0x1p20, n, sum / n, ms[n * 99 / 100], ms[n - 1], (double)walked / 0x1p20);
  assert_true(compiled < 2000 && sum / n < 2); /* of one CPU, a sanitizer's included */
  grammar_free(g);
  free(text);
  free(ms);
  return value;
}

static void long_counts_cost_little(void **state) {
  (void)state;
  const char *path = test_model("smollm2-135m");
  if (!path) skip();
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 1);
  struct gguf *file;
  struct tokenizer *tokenizer;
  struct token_table *t;
  assert_ok(c, gguf_open(c, path, &file));
  assert_ok(c, tokenizer_create(c, file, &tokenizer));
  assert_int_equal(token_table_create(tokenizer, NULL, 0, &t), OSCAR_OK);
  json_t *value = measure_long("a string of 10,000", "{\"type\":\"string\",\"minLength\":9000,\"maxLength\":10000}", t);
  size_t n = 0;
  for (const char *at = json_string_value(value); *at; at++) n += ((unsigned char)*at & 0xC0) != 0x80;
  assert_true(n >= 9000 && n <= 10000);
  json_decref(value);
  value = measure_long("a string of 100,000", "{\"type\":\"string\",\"maxLength\":100000}", t);
  json_decref(value);
  value = measure_long(
      "1,000 integers",
      "{\"type\":\"array\",\"items\":{\"type\":\"integer\",\"maximum\":99,\"minimum\":0},\"minItems\":1000,\"maxItems\":1000}",
      t);
  assert_int_equal(json_array_size(value), 1000);
  json_decref(value);
  value = measure_long(
      "1,000 objects",
      "{\"type\":\"array\",\"minItems\":1000,\"maxItems\":1000,\"items\":{\"type\":\"object\",\"properties\":{\"name\":{"
      "\"type\":\"string\",\"maxLength\":20},\"age\":{\"type\":\"integer\",\"minimum\":0,\"maximum\":150},\"kind\":{"
      "\"enum\":[\"a\",\"bb\",\"ccc\"]}},\"required\":[\"name\",\"age\",\"kind\"]}}",
      t);
  assert_int_equal(json_array_size(value), 1000);
  json_decref(value);
  token_table_free(t);
  tokenizer_free(tokenizer);
  gguf_close(file);
  oscar_context_free(c);
}

static void a_small_vocabulary(void **state) {
  (void)state;
  try_model("smollm2-135m");
}
static void a_large_vocabulary(void **state) {
  (void)state;
  try_model("qwen2.5-coder-0.5b");
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(a_small_vocabulary), cmocka_unit_test(a_large_vocabulary),
                                     cmocka_unit_test(long_counts_cost_little)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
