/*
 * args.c - option tables over getopt_long.
 *
 * getopt_long splits argv (abbreviations and permuted operands included); this file turns a table into what getopt wants, checks
 * the values and writes the help. Every complaint is one line that names the option, the value and what would be right.
 */
#include "cli/args.h"

#include <ctype.h>
#include <errno.h>
#include <getopt.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { MOST_OPTIONS = 64, LONG_ONLY = 256, HELP_COLUMN = 28, HELP_WIDTH = 100 };

struct table {
  const struct option_spec *spec[MOST_OPTIONS];
  void *target[MOST_OPTIONS];
  int count;
};

static void *value_of(const struct table *table, int i) { return (char *)table->target[i] + table->spec[i]->offset; }

/* ---- values ---- */

bool parse_int64(const char *text, int64_t *value) {
  char *end;
  errno = 0;
  long long v = strtoll(text, &end, 10);
  if (end == text || *end || errno) return false;
  *value = v;
  return true;
}

static bool parse_uint64(const char *text, uint64_t *value) {
  char *end;
  errno = 0;
  if (*text < '0' || *text > '9') return false; /* strtoull takes signs and spaces */
  unsigned long long v = strtoull(text, &end, 10);
  if (*end || errno) return false;
  *value = v;
  return true;
}

bool parse_double(const char *text, double *value) {
  char *end;
  double v = strtod(text, &end);
  if (end == text || *end || !isfinite(v)) return false;
  *value = v;
  return true;
}

bool parse_size(const char *text, size_t *value) {
  static const char letters[] = "KMGT";
  char *end;
  if ((*text < '0' || *text > '9') && *text != '.') return false;
  double v = strtod(text, &end);
  if (end == text || !isfinite(v)) return false;
  const char *letter = strchr(letters, toupper((unsigned char)*end));
  if (letter && !*letter) letter = NULL; /* strchr finds the end, too */
  if (letter) {
    v = ldexp(v, 10 * (int)(letter - letters + 1));
    end++;
    if (strcmp(end, "iB") == 0) end += 2;
  }
  if (*end == 'B') end++;
  if (*end || v < 0 || v >= 0x1p63) return false;
  *value = (size_t)v;
  return true;
}

/* The digits at *text, which moves behind them; more than any CPU has are CPU_LIST_ROOM. */
static bool parse_cpu(const char **text, int *cpu) {
  const char *begin = *text;
  for (*cpu = 0; **text >= '0' && **text <= '9'; (*text)++)
    *cpu = *cpu < CPU_LIST_ROOM ? 10 * *cpu + (**text - '0') : CPU_LIST_ROOM;
  if (*cpu > CPU_LIST_ROOM) *cpu = CPU_LIST_ROOM;
  return *text > begin;
}

static int add_cpu(const char *command, const struct option_spec *spec, int cpu, struct cpu_list *list) {
  char allowed[128];
  if (!cpu_is_allowed(cpu))
    return wrong_use("%s: --%s names CPU %d%s, where this process may not run (it may on %s)", command, spec->name, cpu,
                     cpu == CPU_LIST_ROOM ? " or one above" : "", cpu_allowed_text(allowed, sizeof allowed));
  for (int i = 0; i < list->count; i++)
    if (list->cpu[i] == cpu) return wrong_use("%s: --%s names CPU %d twice", command, spec->name, cpu);
  list->cpu[list->count++] = cpu; /* there is room for all different ones */
  return EXIT_DONE;
}

static int store_cpus(const char *command, const struct option_spec *spec, const char *text, struct cpu_list *list) {
  const char *at = text;
  list->count = 0;
  for (int first, last;; at++) {
    bool good = parse_cpu(&at, &first);
    last = first;
    if (good && *at == '-') {
      at++;
      good = parse_cpu(&at, &last) && last >= first;
    }
    if (!good || (*at && *at != ',')) return wrong_use("%s: --%s wants CPUs such as 0-3,6, not '%s'", command, spec->name, text);
    for (int cpu = first; cpu <= last; cpu++) {
      int code = add_cpu(command, spec, cpu, list);
      if (code != EXIT_DONE) return code;
    }
    if (!*at) return EXIT_DONE;
  }
}

static const char *choice_item(const void *list, int i) { return ((const struct option_spec *)list)->choice(i); }

static int wrong_choice(const char *command, const struct option_spec *spec, const char *text) {
  char words[512] = "";
  size_t used = 0;
  for (int i = 0; spec->choice(i) && used < sizeof words; i++)
    used += (size_t)snprintf(words + used, sizeof words - used, "%s%s", i ? ", " : "", spec->choice(i));
  const char *near = nearest_name(text, choice_item, spec);
  if (near) return wrong_use("%s: --%s does not know '%s'; did you mean %s? (known: %s)", command, spec->name, text, near, words);
  return wrong_use("%s: --%s does not know '%s' (known: %s)", command, spec->name, text, words);
}

static int wrong_number(const char *command, const struct option_spec *spec, const char *text, const char *what) {
  char range[96] = "", multiple[48] = "";
  if (spec->min != 0 || spec->max != 0) snprintf(range, sizeof range, " from %.15g to %.15g", spec->min, spec->max);
  if (spec->multiple) snprintf(multiple, sizeof multiple, ", a multiple of %d", spec->multiple);
  return wrong_use("%s: --%s wants %s%s%s, not '%s'", command, spec->name, what, range, multiple, text);
}

static bool in_range(const struct option_spec *spec, double v) {
  return (spec->min == 0 && spec->max == 0) || (v >= spec->min && v <= spec->max);
}

static int store_integer(const char *command, const struct option_spec *spec, const char *text, void *value) {
  int64_t v;
  bool good = parse_int64(text, &v) && in_range(spec, (double)v) && (!spec->multiple || v % spec->multiple == 0);
  if (spec->type == OPTION_INT && good) good = v >= INT32_MIN && v <= INT32_MAX;
  if (!good) return wrong_number(command, spec, text, "a whole number");
  if (spec->type == OPTION_INT)
    *(int *)value = (int)v;
  else
    *(int64_t *)value = v;
  return EXIT_DONE;
}

static int store(const char *command, const struct option_spec *spec, const char *text, void *value) {
  double number;
  switch (spec->type) {
  case OPTION_FLAG:
    *(bool *)value = true;
    return EXIT_DONE;
  case OPTION_INT:
  case OPTION_INT64:
    return store_integer(command, spec, text, value);
  case OPTION_UINT64:
    if (parse_uint64(text, value)) return EXIT_DONE;
    return wrong_number(command, spec, text, "a whole number from 0 to 18446744073709551615");
  case OPTION_SIZE:
    if (parse_size(text, value) && in_range(spec, (double)*(size_t *)value)) return EXIT_DONE;
    return wrong_use("%s: --%s wants a size such as 512M or 4G, not '%s'", command, spec->name, text);
  case OPTION_FLOAT:
    if (!parse_double(text, &number) || !in_range(spec, number)) return wrong_number(command, spec, text, "a number");
    *(float *)value = (float)number;
    return EXIT_DONE;
  case OPTION_TEXT:
    for (int i = 0; spec->choice && (!spec->choice(i) || strcmp(spec->choice(i), text) != 0); i++)
      if (!spec->choice(i)) return wrong_choice(command, spec, text);
    *(const char **)value = text;
    return EXIT_DONE;
  case OPTION_CPUS:
    return store_cpus(command, spec, text, value);
  }
  return EXIT_FAILED;
}

/* ---- help ---- */

/* Words of `text` from column `at` on, wrapped and indented to it. */
static void print_wrapped(FILE *out, const char *text, int at) {
  int column = at;
  while (*text) {
    int word = (int)strcspn(text, " \n");
    if (column > at && column + 1 + word > HELP_WIDTH) {
      fprintf(out, "\n%*s", at, "");
      column = at;
    }
    if (column > at) column += fprintf(out, " ");
    column += fprintf(out, "%.*s", word, text);
    text += word;
    while (*text == ' ' || *text == '\n') text++;
  }
  fputc('\n', out);
}

static void default_of(const struct option_spec *spec, const void *value, char *text, size_t room) {
  text[0] = '\0';
  if (spec->default_text) {
    snprintf(text, room, "%s", spec->default_text);
    return;
  }
  switch (spec->type) {
  case OPTION_FLAG:
  case OPTION_CPUS: /* default_text says it */
    return;
  case OPTION_INT:
    snprintf(text, room, "%d", *(const int *)value);
    return;
  case OPTION_INT64:
    snprintf(text, room, "%lld", (long long)*(const int64_t *)value);
    return;
  case OPTION_UINT64:
    snprintf(text, room, "%llu", (unsigned long long)*(const uint64_t *)value);
    return;
  case OPTION_SIZE:
    format_bytes((double)*(const size_t *)value, text, room);
    return;
  case OPTION_FLOAT:
    snprintf(text, room, "%g", (double)*(const float *)value);
    return;
  case OPTION_TEXT:
    if (*(const char *const *)value) snprintf(text, room, "%s", *(const char *const *)value);
    return;
  }
}

static void print_option(FILE *out, const struct option_spec *spec, const void *value) {
  char left[96], fallback[128], text[512];
  char letter[8] = "    ";
  if (spec->letter) snprintf(letter, sizeof letter, "-%c, ", spec->letter);
  snprintf(left, sizeof left, "  %s--%s%s%s", letter, spec->name, spec->value ? " " : "", spec->value ? spec->value : "");
  default_of(spec, value, fallback, sizeof fallback);
  snprintf(text, sizeof text, "%s%s%s%s", spec->help, *fallback ? " (default: " : "", fallback, *fallback ? ")" : "");
  int printed = fprintf(out, "%s", left);
  if (printed > HELP_COLUMN - 2) {
    fputc('\n', out);
    printed = 0;
  }
  fprintf(out, "%*s", HELP_COLUMN - printed, "");
  print_wrapped(out, text, HELP_COLUMN);
}

void args_help(const struct usage *usage, const struct option_group *groups, int n_groups, FILE *out) {
  fprintf(out, "Usage: oscar %s [options]%s%s\n\n", usage->command, *usage->operands ? " " : "", usage->operands);
  print_wrapped(out, usage->about, 0);
  for (int g = 0; g < n_groups; g++) {
    fprintf(out, "\n%s\n", groups[g].title);
    for (int i = 0; i < groups[g].count; i++) {
      const struct option_spec *spec = &groups[g].options[i];
      print_option(out, spec, (const char *)groups[g].target + spec->offset);
    }
  }
  fprintf(out, "\nExamples\n");
  for (const char *line = usage->examples; *line;) {
    int length = (int)strcspn(line, "\n");
    fprintf(out, "  %.*s\n", length, line);
    line += length + (line[length] == '\n');
  }
}

/* ---- parsing ---- */

static const char *option_item(const void *list, int i) {
  const struct table *table = list;
  return i < table->count ? table->spec[i]->name : i == table->count ? "help" : NULL;
}

/* getopt_long has refused the argument before optind, or the letter in optopt. */
static int wrong_option(const char *command, const struct table *table, const char *argument) {
  if (strncmp(argument, "--", 2) != 0)
    return wrong_use("%s: unknown option -%c ('oscar %s --help' lists the options)", command, optopt, command);
  char word[64];
  snprintf(word, sizeof word, "%.*s", (int)strcspn(argument + 2, "="), argument + 2);
  int alike = 0;
  for (int i = 0; option_item(table, i); i++) {
    const char *name = option_item(table, i);
    if (strcmp(name, word) == 0) return wrong_use("%s: --%s takes no value", command, word);
    alike += strncmp(name, word, strlen(word)) == 0;
  }
  if (alike > 1) return wrong_use("%s: --%s is short for more than one option; write it in full", command, word);
  const char *near = nearest_name(word, option_item, table);
  if (near) return wrong_use("%s: unknown option --%s; did you mean --%s?", command, word, near);
  return wrong_use("%s: unknown option --%s ('oscar %s --help' lists the options)", command, word, command);
}

/* A missing value: the option is the argument just before optind, or the letter. */
static int missing_value(const char *command, const char *argument) {
  if (strncmp(argument, "--", 2) == 0) return wrong_use("%s: %s wants a value", command, argument);
  return wrong_use("%s: -%c wants a value", command, optopt);
}

static void fill_table(const struct option_group *groups, int n_groups, struct table *table) {
  table->count = 0;
  for (int g = 0; g < n_groups; g++)
    for (int i = 0; i < groups[g].count && table->count < MOST_OPTIONS; i++) {
      table->spec[table->count] = &groups[g].options[i];
      table->target[table->count++] = groups[g].target;
    }
}

/* What getopt wants: [count + 2] long options, and letters. Option i is reported as LONG_ONLY + i by its long form. */
static void fill_getopt(const struct table *table, struct option *longs, char *letters) {
  *letters++ = ':'; /* a missing value is told apart from an unknown option */
  for (int i = 0; i < table->count; i++) {
    bool argument = table->spec[i]->type != OPTION_FLAG;
    longs[i] = (struct option){table->spec[i]->name, argument ? required_argument : no_argument, NULL, LONG_ONLY + i};
    if (table->spec[i]->letter) {
      *letters++ = table->spec[i]->letter;
      if (argument) *letters++ = ':';
    }
  }
  longs[table->count] = (struct option){"help", no_argument, NULL, 'h'};
  longs[table->count + 1] = (struct option){0};
  *letters++ = 'h';
  *letters = '\0';
}

static int option_index(const struct table *table, int reported) {
  if (reported >= LONG_ONLY) return reported - LONG_ONLY;
  for (int i = 0; i < table->count; i++)
    if (table->spec[i]->letter == reported) return i;
  return -1;
}

static bool operands_fit(const struct usage *usage, int count, int *code) {
  if (count >= usage->min_operands && count <= usage->max_operands) return true;
  if (count < usage->min_operands)
    *code = wrong_use("%s: %s is missing ('oscar %s --help')", usage->command, usage->operands, usage->command);
  else
    *code = wrong_use("%s: too many arguments (%d, at most %d); text with spaces needs quotes", usage->command, count,
                      usage->max_operands);
  return false;
}

bool args_parse(const struct usage *usage, const struct option_group *groups, int n_groups, int argc, char **argv, int *first,
                int *code) {
  struct table table;
  struct option longs[MOST_OPTIONS + 2];
  char letters[2 * MOST_OPTIONS + 4];
  fill_table(groups, n_groups, &table);
  fill_getopt(&table, longs, letters);

  opterr = 0;
  optind = 0; /* glibc and musl: start over, whatever was parsed before */
  *code = EXIT_DONE;
  for (int reported; (reported = getopt_long(argc, argv, letters, longs, NULL)) != -1;) {
    if (reported == 'h') {
      /* defaults are shown as they were before the command line changed them: help goes first or not at all */
      args_help(usage, groups, n_groups, stdout);
      return false;
    }
    if (reported == '?')
      *code = wrong_option(usage->command, &table, argv[optind - 1]);
    else if (reported == ':')
      *code = missing_value(usage->command, argv[optind - 1]);
    else {
      int i = option_index(&table, reported);
      *code = i < 0 ? EXIT_FAILED : store(usage->command, table.spec[i], optarg, value_of(&table, i));
    }
    if (*code != EXIT_DONE) return false;
  }
  *first = optind;
  return operands_fit(usage, argc - optind, code);
}
