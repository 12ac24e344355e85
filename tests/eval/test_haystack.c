/* What must hold for every haystack: it follows from its seed, has the wanted length, and the answers stand in it where they
 * should and nowhere else. The texts are taken apart here by other means than they were made: the statements are searched for and
 * read back, JSON is parsed. A tokenizer made of words stands in for a model; the default model's own is used where it is there.
 */
#include "failing_alloc.h"
#include "support.h"

#include "engine/engine.h"
#include "eval/prompt.h"
#include "eval/text.h"

#include <jansson.h>

/* ---- a tokenizer of words: letters together, everything else one by one; 6 tokens of template ---- */

enum { TEMPLATE = 6 };

static bool letter(char c) { return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z'); }

static oscar_status encode_words(void *user, const char *message, const char *begin, int32_t **ids, int *count) {
  oscar_context *context = user;
  const size_t bytes = strlen(message) + strlen(begin);
  *ids = mem_alloc(context, bytes + TEMPLATE, sizeof **ids);
  if (!*ids) return OSCAR_NO_MEMORY;
  int n = 0;
  for (const char *const *part = (const char *const[]){message, begin, NULL}; *part; part++) {
    for (int i = 0; i < TEMPLATE / 2; i++) (*ids)[n++] = -1 - i;
    for (const char *p = *part; *p;) {
      int32_t hash = 0;
      const char *from = p;
      while (letter(*p)) hash = (int32_t)((uint32_t)hash * 31 + (unsigned char)*p++);
      if (p == from) hash = (unsigned char)*p++;
      (*ids)[n++] = hash & 0x7FFFFFFF;
    }
  }
  *count = n;
  return OSCAR_OK;
}

static int occurrences(const char *text, const char *word) {
  int count = 0;
  for (const char *p = text; (p = strstr(p, word)); p++) count++;
  return count;
}

/* ---- reading the statements back ---- */

static void expect_magic_numbers(const struct haystack *h, const struct haystack_question *q) {
  char key[64], statement[160];
  assert_int_equal(sscanf(strstr(q->text, "for "), "for %63s", key), 1);
  for (int i = 0; i < q->values; i++) {
    snprintf(statement, sizeof statement, "One of the special magic numbers for %s is: %s.", key, q->expected[i]);
    assert_int_equal(occurrences(h->text, statement), 1);
    assert_int_equal(occurrences(h->text, q->expected[i]), 1);
  }
  assert_int_equal(occurrences(h->text, key), q->values);
}

/* Follows every assignment of the text; the names that end at the asked value must be the expected ones. */
static void expect_chain(const struct haystack *h, const struct haystack_question *q) {
  enum { NAMES = 4096 };
  static char name[NAMES][8], value[NAMES][8];
  int names = 0;
  char at[8];
  assert_int_equal(sscanf(strstr(q->text, "variable is "), "variable is %7[A-Z]", at), 1);
  assert_int_equal(occurrences(h->text, at), 1); /* nothing is set to it */
  for (const char *line = h->text; line; line = strchr(line, '\n')) {
    line += *line == '\n';
    char left[8], right[8];
    if (sscanf(line, "VAR %7[A-Z] = VAR %7[A-Z]", left, right) == 2) {
      bool set = false;
      for (int i = 0; i < names; i++) set = set || strcmp(name[i], right) == 0;
      assert_true(set); /* a variable is set before it is read */
    } else if (sscanf(line, "VAR %7[A-Z] = %7[0-9]", left, right) != 2) {
      continue;
    }
    for (int i = 0; i < names; i++) assert_string_not_equal(name[i], left); /* and once */
    assert_true(names < NAMES);
    memcpy(name[names], left, sizeof left);
    memcpy(value[names++], right, sizeof right);
  }
  for (int step = 0; step <= q->values; step++) {
    int i = 0;
    while (i < names && strcmp(name[i], at) != 0) i++;
    assert_true(i < names);
    memcpy(at, value[i], sizeof at);
    if (step < q->values)
      assert_string_equal(at, q->expected[step]);
    else
      assert_true(at[0] >= '0' && at[0] <= '9');
  }
}

static void expect_pair(const struct haystack *h, const struct haystack_question *q) {
  json_error_t error;
  json_t *object = json_loads(strchr(h->text, '{'), JSON_REJECT_DUPLICATES, &error);
  if (!object) fail_msg("not JSON: %s", error.text);
  char key[64];
  assert_int_equal(sscanf(strchr(q->text, '"'), "\"%63[0-9a-f-]\"", key), 1);
  const char *value = json_string_value(json_object_get(object, key));
  assert_non_null(value);
  assert_string_equal(value, q->expected[0]);
  assert_int_equal(occurrences(h->text, value), 1);
  assert_int_equal(occurrences(h->text, key), 1);
  json_decref(object);
}

static void expect_symbol(const struct haystack *h, const struct haystack_question *q) {
  char symbol[64], statement[160];
  const bool function = strstr(q->text, "function");
  assert_int_equal(sscanf(strstr(q->text, function ? "function " : "constant "), "%*s %63[A-Za-z_]", symbol), 1);
  static const char *const forms[] = {"static int %s(void) {\n  return %s;\n}\n", "#define %s %s\n",
                                      "static const int %s = %s;\n"};
  int found = 0;
  for (size_t i = 0; i < ARRAY_LENGTH(forms); i++) {
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wformat-nonliteral"
    snprintf(statement, sizeof statement, forms[i], symbol, q->expected[0]);
#pragma GCC diagnostic pop
    found += occurrences(h->text, statement);
    if (function) assert_true(i > 0 || found == 1);
  }
  assert_int_equal(found, 1);
  assert_int_equal(occurrences(h->text, q->expected[0]), 1);
}

static void expect_answers(enum task task, const struct haystack *h) {
  static void (*const expect[TASK_COUNT])(const struct haystack *, const struct haystack_question *) = {
      [TASK_MULTIKEY] = expect_magic_numbers,
      [TASK_MULTIVALUE] = expect_magic_numbers,
      [TASK_TRACKING] = expect_chain,
      [TASK_JSON] = expect_pair,
      [TASK_CODE] = expect_symbol,
  };
  for (int i = 0; i < h->questions; i++) {
    const struct haystack_question *q = &h->question[i];
    expect[task](h, q);
    assert_true(q->depth >= 0 && q->depth < 1);
    for (int k = 0; k < i; k++) assert_string_not_equal(q->text, h->question[k].text);
    /* what is asked and how the answer begins tell no answer */
    for (int v = 0; v < q->values; v++) assert_true(!strstr(q->text, q->expected[v]) && !strstr(q->begin, q->expected[v]));
  }
}

static void expect_lengths(const struct haystack *h, int tokens) {
  int longest = 0;
  for (int i = 0; i < h->questions; i++) {
    const struct haystack_question *q = &h->question[i];
    assert_true(q->count <= tokens);
    assert_true(q->count >= tokens - tokens / 50 - (tokens < 1024 ? 8 : 0)); /* questions differ by a few tokens */
    assert_true(q->gold_count > 0);
    assert_true(h->common > 0 && h->common < q->count);
    assert_memory_equal(q->ids, h->question[0].ids, (size_t)h->common * sizeof *q->ids);
    if (q->count > longest) longest = q->count;
  }
  assert_true(longest >= tokens - (tokens / 50 > 8 ? tokens / 50 : 8));
}

static void check_haystacks(oscar_context *c, const struct prompt_form *form, const int *lengths, int n_lengths, int seeds,
                            const char *filler) {
  for (enum task task = 0; task < TASK_COUNT; task++)
    for (int l = 0; l < n_lengths; l++)
      for (int seed = 0; seed < seeds; seed++) {
        struct haystack_spec spec = {.task = task,
                                     .tokens = lengths[l],
                                     .questions = haystack_questions(lengths[l]),
                                     .seed = (uint64_t)seed,
                                     .index = seed,
                                     .filler = filler,
                                     .filler_bytes = filler ? strlen(filler) : 0};
        struct haystack h;
        assert_ok(c, haystack_make(c, form, &spec, &h));
        assert_int_equal(h.questions, spec.questions);
        expect_answers(task, &h);
        expect_lengths(&h, lengths[l]);
        haystack_free(c, &h);
      }
}

static void answers_stand_where_they_should_and_nowhere_else(void **state) {
  (void)state;
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 1);
  const struct prompt_form form = {encode_words, c};
  static const int lengths[] = {256, 512, 1000, 2048, 4096, 7777};
  check_haystacks(c, &form, lengths, 6, 6, NULL);
  static const char own[] =
      "The year was 1987, and 7301945 people had come.\nAnother line of it.\n\nA second paragraph; it is short!\n"
      "\n   \nThe third \xC3\xA9t\xC3\xA9, with \"quotes\" and */ a comment's end.\n";
  check_haystacks(c, &form, lengths, 3, 3, own);
  oscar_context_free(c);
}

static bool same(const struct haystack *a, const struct haystack *b) {
  if (strcmp(a->text, b->text) != 0 || a->common != b->common) return false;
  for (int i = 0; i < a->questions; i++) {
    const struct haystack_question *p = &a->question[i], *q = &b->question[i];
    if (p->count != q->count || memcmp(p->ids, q->ids, (size_t)p->count * sizeof *p->ids) != 0) return false;
    if (p->gold_count != q->gold_count || memcmp(p->gold, q->gold, (size_t)p->gold_count * sizeof *p->gold) != 0) return false;
    if (memcmp(p->expected, q->expected, sizeof p->expected) != 0) return false;
  }
  return true;
}

static void the_seed_decides_everything(void **state) {
  (void)state;
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 1);
  const struct prompt_form form = {encode_words, c};
  for (enum task task = 0; task < TASK_COUNT; task++) {
    const struct haystack_spec spec = {.task = task, .tokens = 1500, .questions = 4, .seed = 7};
    struct haystack_spec other_seed = spec, other_index = spec;
    other_seed.seed = 8;
    other_index.index = 1;
    struct haystack a, b, d, e;
    assert_ok(c, haystack_make(c, &form, &spec, &a));
    assert_ok(c, haystack_make(c, &form, &spec, &b));
    assert_ok(c, haystack_make(c, &form, &other_seed, &d));
    assert_ok(c, haystack_make(c, &form, &other_index, &e));
    assert_true(same(&a, &b) && !same(&a, &d) && !same(&a, &e) && !same(&d, &e));
    haystack_free(c, &a);
    haystack_free(c, &b);
    haystack_free(c, &d);
    haystack_free(c, &e);
  }
  oscar_context_free(c);
}

static void what_cannot_be_made_is_refused(void **state) {
  (void)state;
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 1);
  const struct prompt_form form = {encode_words, c};
  struct haystack h;
  struct haystack_spec spec = {.task = TASK_MULTIKEY, .tokens = 100, .questions = 1};
  assert_int_equal(haystack_make(c, &form, &spec, &h), OSCAR_INVALID_ARGUMENT);
  spec.tokens = 1024;
  spec.questions = 5; /* one per 256 tokens */
  assert_int_equal(haystack_make(c, &form, &spec, &h), OSCAR_INVALID_ARGUMENT);
  spec.questions = 4;
  spec.filler = " \n\n \n";
  spec.filler_bytes = 5;
  assert_int_equal(haystack_make(c, &form, &spec, &h), OSCAR_INVALID_ARGUMENT);
  assert_non_null(strstr(oscar_last_error(c), "empty"));
  assert_null(h.text);
  oscar_context_free(c);
}

static void every_allocation_may_fail(void **state) {
  (void)state;
  struct failing_alloc f;
  oscar_context *c = failing_context(&f);
  const struct prompt_form form = {encode_words, c};
  static const char own[] = "A line.\n\nAnother one, which is longer.\n";
  for (enum task task = 0; task < TASK_COUNT; task++) {
    const struct haystack_spec spec = {task, 512, 2, 3, 0, task % 2 ? own : NULL, task % 2 ? sizeof own - 1 : 0};
    struct haystack h;
    sweep_allocations(c, &f, haystack_make(c, &form, &spec, &h));
    haystack_free(c, &h);
  }
  failing_context_free(c, &f);
}

static void filler_shuffles_all_paragraphs_before_it_repeats(void **state) {
  (void)state;
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 1);
  static const char source[] = "one\n\ntwo\nstill two\n\n\n  \nthree\n";
  struct text text = {.context = c};
  struct draw draw = draw_begin(3, 0, 0, 0);
  assert_ok(c, filler_write(&text, source, strlen(source), &draw, 3000));
  assert_true(text.bytes >= 3000 && text.bytes < 3020);
  const int ones = occurrences(text.data, "one\n\n"), twos = occurrences(text.data, "two\nstill two\n\n"),
            threes = occurrences(text.data, "three\n\n");
  assert_true(abs(ones - twos) <= 1 && abs(ones - threes) <= 1);
  text_clear(&text);
  assert_ok(c, filler_write(&text, NULL, 0, &draw, 20000));
  assert_true(text.bytes >= 20000 && text.bytes < 21000 && strcspn(text.data, "0123456789-") == text.bytes);
  text_free(&text);
  oscar_context_free(c);
}

static void prompts_of_a_model_have_the_wanted_length(void **state) {
  (void)state;
  const char *path = test_model("smollm2-135m");
  if (!path) skip();
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 0);
  struct backend *backend;
  struct model *model;
  assert_ok(c, backend_create_cpu(c, &backend));
  assert_ok(c, model_load(c, backend, path, &model));
  struct prompt_writer writer;
  assert_ok(c, prompt_writer_open(model, &writer));
  assert_string_equal(prompt_writer_name(&writer), "chatml");
  const struct prompt_form form = prompt_writer_form(&writer);
  static const int lengths[] = {256, 512, 2048, 5000};
  check_haystacks(c, &form, lengths, 4, 2, NULL);
  static const int prose[] = {4096};
  check_haystacks(c, &form, prose, 1, 1, calibration_text(&(size_t){0}));

  /* plain text, where there is no template: the same rules */
  writer.chat = (struct chat_template){.family = CHAT_UNKNOWN};
  check_haystacks(c, &form, lengths, 2, 1, NULL);
  model_free(model);
  backend->ops->free(backend);
  oscar_context_free(c);
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(answers_stand_where_they_should_and_nowhere_else),
                                     cmocka_unit_test(the_seed_decides_everything),
                                     cmocka_unit_test(what_cannot_be_made_is_refused),
                                     cmocka_unit_test(every_allocation_may_fail),
                                     cmocka_unit_test(filler_shuffles_all_paragraphs_before_it_repeats),
                                     cmocka_unit_test(prompts_of_a_model_have_the_wanted_length)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
