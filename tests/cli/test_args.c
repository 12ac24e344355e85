/* Option tables: every kind of value, its range and its complaint; what a user sees is compared word for word. */
#include "support.h"

#include "cli/options.h"
#include "cli/progress.h"

#include <signal.h>

struct everything {
  bool flag;
  int small;
  int64_t large;
  uint64_t seed;
  size_t size;
  float ratio;
  const char *text, *word;
  struct cpu_list cpus;
};

static const char *words(int i) {
  static const char *const list[] = {"bf16", "int4", "int2", NULL};
  return list[i];
}

#define AT(field) offsetof(struct everything, field)
static const struct option_spec specs[] = {
    {"flag", 'f', OPTION_FLAG, AT(flag), NULL, .help = "a flag"},
    {"small", 's', OPTION_INT, AT(small), "N", .help = "an int", 0, 640, 64},
    {"large", 0, OPTION_INT64, AT(large), "N", .help = "a long one"},
    {"seed", 0, OPTION_UINT64, AT(seed), "N", .help = "any"},
    {"kv-memory", 0, OPTION_SIZE, AT(size), "SIZE", .help = "bytes"},
    {"ratio", 'r', OPTION_FLOAT, AT(ratio), "X", .help = "a ratio", 0, 1},
    {"text", 0, OPTION_TEXT, AT(text), "TEXT", .help = "text"},
    {"kv", 0, OPTION_TEXT, AT(word), "TYPE", .help = "a word", .choice = words},
    {"cpus", 0, OPTION_CPUS, AT(cpus), "LIST", .help = "CPUs", .default_text = "any"},
};
static const struct usage usage = {"try", "[FILE]", 0, 1, "Tries.", "oscar try x\n"};

/* Runs the parser on words (ended by NULL); what it printed on stderr is in `complaint`. */
static char complaint[1024];
static bool parse(struct everything *e, int *first, int *code, const char *const *given) {
  static char copies[16][128];
  char *argv[17] = {0};
  int argc = 0;
  for (; given[argc]; argc++) {
    snprintf(copies[argc], sizeof copies[argc], "%s", given[argc]);
    argv[argc] = copies[argc];
  }
  struct option_group group = {"Group", specs, (int)ARRAY_LENGTH(specs), e};
  FILE *caught = tmpfile();
  assert_non_null(caught);
  fflush(stderr);
  int saved = dup(2);
  dup2(fileno(caught), 2);
  bool go_on = args_parse(&usage, &group, 1, argc, argv, first, code);
  fflush(stderr);
  dup2(saved, 2);
  close(saved);
  rewind(caught);
  complaint[fread(complaint, 1, sizeof complaint - 1, caught)] = '\0';
  fclose(caught);
  return go_on;
}

#define PARSE(...) parse(&e, &first, &code, (const char *const[]){"try", __VA_ARGS__, NULL})

static void every_kind_of_value_is_read(void **state) {
  (void)state;
  struct everything e = {0};
  int first, code;
  assert_true(PARSE("-f", "file", "-s", "128", "--large=-9000000000", "--seed", "18446744073709551615", "--kv-memory", "1.5G",
                    "--ratio", "0.25", "--text=--odd", "--kv", "int2"));
  assert_int_equal(code, EXIT_DONE);
  assert_int_equal(first, 14); /* of 15 words: the operand has moved to the end */
  assert_true(e.flag);
  assert_int_equal(e.small, 128);
  assert_int_equal(e.large, -9000000000);
  assert_true(e.seed == UINT64_MAX);
  assert_int_equal(e.size, (size_t)3 << 29);
  assert_true(e.ratio == 0.25f);
  assert_string_equal(e.text, "--odd");
  assert_string_equal(e.word, "int2");
  assert_string_equal(complaint, "");
}

static void parsing_can_be_repeated(void **state) {
  (void)state;
  struct everything e = {0};
  int first, code;
  for (int i = 0; i < 3; i++) {
    e.flag = false;
    assert_true(PARSE("x", "-f"));
    assert_true(e.flag);
    assert_int_equal(first, 2);
  }
}

static void wrong_use_gets_one_line_that_names_the_right_one(void **state) {
  (void)state;
  static const struct {
    const char *words[4], *line;
  } cases[] = {
      {{"try", "--kv-memry", "4G"}, "oscar: try: unknown option --kv-memry; did you mean --kv-memory?\n"},
      {{"try", "--qqqqqq"}, "oscar: try: unknown option --qqqqqq ('oscar try --help' lists the options)\n"},
      {{"try", "-z"}, "oscar: try: unknown option -z ('oscar try --help' lists the options)\n"},
      {{"try", "--s", "4"}, "oscar: try: --s is short for more than one option; write it in full\n"},
      {{"try", "--flag=yes"}, "oscar: try: --flag takes no value\n"},
      {{"try", "--text"}, "oscar: try: --text wants a value\n"},
      {{"try", "-s"}, "oscar: try: -s wants a value\n"},
      {{"try", "--small", "65"}, "oscar: try: --small wants a whole number from 0 to 640, a multiple of 64, not '65'\n"},
      {{"try", "--small", "704"}, "oscar: try: --small wants a whole number from 0 to 640, a multiple of 64, not '704'\n"},
      {{"try", "--small", "6x"}, "oscar: try: --small wants a whole number from 0 to 640, a multiple of 64, not '6x'\n"},
      {{"try", "--large", "99999999999999999999"}, "oscar: try: --large wants a whole number, not '99999999999999999999'\n"},
      {{"try", "--seed", "-1"}, "oscar: try: --seed wants a whole number from 0 to 18446744073709551615, not '-1'\n"},
      {{"try", "-r", "nan"}, "oscar: try: --ratio wants a number from 0 to 1, not 'nan'\n"},
      {{"try", "-r", "1.01"}, "oscar: try: --ratio wants a number from 0 to 1, not '1.01'\n"},
      {{"try", "--kv-memory", "-4G"}, "oscar: try: --kv-memory wants a size such as 512M or 4G, not '-4G'\n"},
      {{"try", "--kv", "nit2"}, "oscar: try: --kv does not know 'nit2'; did you mean int2? (known: bf16, int4, int2)\n"},
      {{"try", "--kv", "weird"}, "oscar: try: --kv does not know 'weird' (known: bf16, int4, int2)\n"},
      {{"try", "a", "b"}, "oscar: try: too many arguments (2, at most 1); text with spaces needs quotes\n"},
      {{"try", "-s", "a\nb"}, "oscar: try: --small wants a whole number from 0 to 640, a multiple of 64, not 'a b'\n"},
  };
  for (size_t i = 0; i < ARRAY_LENGTH(cases); i++) {
    struct everything e = {0};
    int first, code;
    assert_false(parse(&e, &first, &code, cases[i].words));
    assert_int_equal(code, EXIT_WRONG_USE);
    assert_string_equal(complaint, cases[i].line);
  }
}

/* The first and the last CPU that this process may run on; others depend on the machine. */
static void cpus_are_lists_of_numbers_and_ranges(void **state) {
  (void)state;
  struct everything e = {0};
  int first, code, low = 0, high = CPU_LIST_ROOM - 1;
  while (!cpu_is_allowed(low)) low++;
  while (!cpu_is_allowed(high)) high--;
  char given[64];
  snprintf(given, sizeof given, "%d", low);
  assert_true(PARSE("--cpus", given));
  assert_int_equal(e.cpus.count, 1);
  assert_int_equal(e.cpus.cpu[0], low);
  if (high > low) { /* an order of one's own is kept */
    snprintf(given, sizeof given, "%d-%d,%d", high, high, low);
    assert_true(PARSE("--cpus", given));
    assert_int_equal(e.cpus.count, 2);
    assert_int_equal(e.cpus.cpu[0], high);
    assert_int_equal(e.cpus.cpu[1], low);
  }
  if (cpu_is_allowed(low + 1)) {
    snprintf(given, sizeof given, "%d-%d", low, low + 1);
    assert_true(PARSE("--cpus", given));
    assert_int_equal(e.cpus.count, 2);
    assert_int_equal(e.cpus.cpu[1], low + 1);
  }

  char line[256], allowed[128];
  static const char *const bad[] = {"", ",", "0,", ",0", "0-", "-1", "1-0", "0x3", "0-1-2", "0 ", "all", "0;1", "+0"};
  for (size_t i = 0; i < ARRAY_LENGTH(bad); i++) {
    /* What is before the fault may be refused first, where CPU 0 is not allowed. */
    if (!cpu_is_allowed(0) && bad[i][0] == '0' && strchr(bad[i], ',')) continue;
    assert_false(PARSE("--cpus", bad[i]));
    assert_int_equal(code, EXIT_WRONG_USE);
    snprintf(line, sizeof line, "oscar: try: --cpus wants CPUs such as 0-3,6, not '%s'\n", bad[i]);
    assert_string_equal(complaint, line);
  }
  snprintf(given, sizeof given, "%d,%d", low, low);
  assert_false(PARSE("--cpus", given));
  snprintf(line, sizeof line, "oscar: try: --cpus names CPU %d twice\n", low);
  assert_string_equal(complaint, line);
  snprintf(given, sizeof given, "%d", high + 1);
  assert_false(PARSE("--cpus", given));
  snprintf(line, sizeof line, "oscar: try: --cpus names CPU %d%s, where this process may not run (it may on %s)\n", high + 1,
           high + 1 == CPU_LIST_ROOM ? " or one above" : "", cpu_allowed_text(allowed, sizeof allowed));
  assert_string_equal(complaint, line);
  assert_false(PARSE("--cpus", "99999999999999999999"));
  snprintf(line, sizeof line, "oscar: try: --cpus names CPU 1024 or one above, where this process may not run (it may on %s)\n",
           allowed);
  assert_string_equal(complaint, line);
}

static void sizes_are_powers_of_1024(void **state) {
  (void)state;
  static const struct {
    const char *text;
    size_t bytes;
  } good[] = {{"0", 0},
              {"1000", 1000},
              {"1k", 1024},
              {"1KiB", 1024},
              {"512M", 512u << 20},
              {"4GB", (size_t)4 << 30},
              {"0.5T", (size_t)1 << 39},
              {"10B", 10}};
  static const char *const bad[] = {"", "M", "-1", "1Q", "1MM", "1e400", "nan", "inf", "9999999999T", " 1", "1 "};
  size_t value;
  for (size_t i = 0; i < ARRAY_LENGTH(good); i++) {
    assert_true(parse_size(good[i].text, &value));
    assert_int_equal(value, good[i].bytes);
  }
  for (size_t i = 0; i < ARRAY_LENGTH(bad); i++) assert_false(parse_size(bad[i], &value));
}

static void help_shows_every_option_with_range_defaults_and_examples(void **state) {
  (void)state;
  struct everything e = {.small = 64, .size = 1 << 20, .word = "int2"};
  struct option_group group = {"Group", specs, (int)ARRAY_LENGTH(specs), &e};
  char text[4096];
  FILE *out = tmpfile();
  args_help(&usage, &group, 1, out);
  rewind(out);
  text[fread(text, 1, sizeof text - 1, out)] = '\0';
  fclose(out);
  for (size_t i = 0; i < ARRAY_LENGTH(specs); i++) {
    char name[32];
    snprintf(name, sizeof name, "--%s", specs[i].name);
    assert_non_null(strstr(text, name));
  }
  assert_non_null(strstr(text, "an int (default: 64)"));
  assert_non_null(strstr(text, "a word (default: int2)"));
  assert_non_null(strstr(text, "  oscar try x\n"));
}

static void shared_groups_fit_together_without_a_clash(void **state) {
  (void)state;
  struct engine_options engine = {.kv = "int2"};
  struct sampler_options sampler = {0};
  struct text_arguments text = {0};
  struct output_arguments output = {0};
  struct option_group groups[] = {model_group(&engine), cache_group(&engine), sampling_group(&sampler), text_group(&text),
                                  output_group(&output)};
  bool letters[256] = {['h'] = true};
  for (size_t g = 0; g < ARRAY_LENGTH(groups); g++)
    for (int i = 0; i < groups[g].count; i++) {
      unsigned char letter = (unsigned char)groups[g].options[i].letter;
      assert_true(!letter || !letters[letter]);
      letters[letter] = true;
    }
  char *argv[] = {"try",         "-m", "tiny",   "-c", "8192", "--kv",  "int4",   "--sink", "128",
                  "--kv-memory", "1G", "--temp", "0",  "-p",   "Hello", "--json", NULL};
  int first, code;
  assert_true(args_parse(&usage, groups, (int)ARRAY_LENGTH(groups), 16, argv, &first, &code));
  assert_string_equal(engine.model_path, "tiny");
  assert_int_equal(engine.context, 8192);
  assert_string_equal(engine.kv, "int4");
  assert_int_equal(engine.sink_tokens, 128);
  assert_int_equal(engine.kv_memory_bytes, 1 << 30);
  assert_string_equal(text.prompt, "Hello");
  assert_true(output.json);
}

static const char *name_item(const void *list, int i) { return ((const char *const *)list)[i]; }

static void the_nearest_name_is_near_or_none(void **state) {
  (void)state;
  static const char *const names[] = {"info", "run", "chat", "calibrate", "fetch", NULL};
  assert_string_equal(nearest_name("calibarte", name_item, names), "calibrate");
  assert_string_equal(nearest_name("rnu", name_item, names), "run");
  assert_string_equal(nearest_name("feth", name_item, names), "fetch");
  assert_null(nearest_name("quantize", name_item, names));
  assert_null(nearest_name("", name_item, names));
}

static void progress_goes_on_until_an_interrupt(void **state) {
  (void)state;
  struct progress_line line;
  progress_begin(&line);
  for (int i = 0; i <= 100; i++) assert_true(line.progress.report(line.progress.user, "counting", i, 100));
  interrupt_watch();
  raise(SIGINT);
  assert_true(interrupt_requested());
  assert_false(line.progress.report(line.progress.user, "counting", 1, 100));
  interrupt_clear();
  assert_true(line.progress.report(line.progress.user, "counting", 2, 100));
  progress_end(&line);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(every_kind_of_value_is_read),
      cmocka_unit_test(parsing_can_be_repeated),
      cmocka_unit_test(wrong_use_gets_one_line_that_names_the_right_one),
      cmocka_unit_test(cpus_are_lists_of_numbers_and_ranges),
      cmocka_unit_test(sizes_are_powers_of_1024),
      cmocka_unit_test(help_shows_every_option_with_range_defaults_and_examples),
      cmocka_unit_test(shared_groups_fit_together_without_a_clash),
      cmocka_unit_test(the_nearest_name_is_near_or_none),
      cmocka_unit_test(progress_goes_on_until_an_interrupt),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
