/* message.c - one-line messages, sizes for people, names of files, and the nearest name to a mistyped one. */
#include "cli/cli.h"

#include <stdarg.h>
#include <string.h>

/* A message is one line whatever was put into it: file names and errors of others may hold control characters. */
static void print_line(const char *prefix, const char *format, va_list arguments) {
  char text[2048];
  vsnprintf(text, sizeof text, format, arguments);
  for (char *p = text; *p; p++)
    if ((unsigned char)*p < ' ' || *p == 0x7F) *p = ' ';
  fflush(stdout);
  fprintf(stderr, "%s%s\n", prefix, text);
}

int failed(const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  print_line("oscar: ", format, arguments);
  va_end(arguments);
  return EXIT_FAILED;
}

int wrong_use(const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  print_line("oscar: ", format, arguments);
  va_end(arguments);
  return EXIT_WRONG_USE;
}

int failed_with(oscar_status status, const char *sentence) {
  if (status == OSCAR_CANCELLED) {
    failed("interrupted");
    return EXIT_INTERRUPTED;
  }
  return failed("%s", sentence && *sentence ? sentence : oscar_status_name(status));
}

void note(const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  print_line("oscar: note: ", format, arguments);
  va_end(arguments);
}

const char *format_bytes(double bytes, char *text, size_t room) {
  static const char *const units[] = {"B", "KiB", "MiB", "GiB", "TiB", "PiB"};
  size_t unit = 0;
  while (bytes >= 1000 && unit + 1 < sizeof units / sizeof *units) {
    bytes /= 1024;
    unit++;
  }
  snprintf(text, room, unit == 0 || bytes >= 100 ? "%.0f %s" : bytes >= 10 ? "%.1f %s" : "%.2f %s", bytes, units[unit]);
  return text;
}

enum { LONGEST_NAME = 63 };

static int least(int a, int b, int c) {
  int m = a < b ? a : b;
  return m < c ? m : c;
}

/* Edit distance with swapped neighbours counted once (optimal string alignment). Names are short: longer ones are cut. */
static int name_distance(const char *a, const char *b) {
  int rows[3][LONGEST_NAME + 1];
  int n = (int)strnlen(a, LONGEST_NAME), m = (int)strnlen(b, LONGEST_NAME);
  int *before = rows[0], *last = rows[1], *row = rows[2];
  for (int j = 0; j <= m; j++) last[j] = j;
  memcpy(before, last, sizeof rows[0]);
  for (int i = 1; i <= n; i++) {
    row[0] = i;
    for (int j = 1; j <= m; j++) {
      row[j] = least(last[j] + 1, row[j - 1] + 1, last[j - 1] + (a[i - 1] != b[j - 1]));
      bool swapped = i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1];
      if (swapped && before[j - 2] + 1 < row[j]) row[j] = before[j - 2] + 1;
    }
    int *oldest = before;
    before = last;
    last = row;
    row = oldest;
  }
  return last[m];
}

const char *nearest_name(const char *word, const char *(*item)(const void *list, int i), const void *list) {
  const char *best = NULL;
  int limit = (int)(strlen(word) / 3) + 1, best_distance = limit + 1;
  for (int i = 0;; i++) {
    const char *name = item(list, i);
    if (!name) return best;
    int distance = name_distance(word, name);
    if (distance < best_distance && distance < (int)strlen(name)) {
      best = name;
      best_distance = distance;
    }
  }
}

const char *last_part(const char *path) {
  const char *slash = strrchr(path, '/');
  return slash && slash[1] ? slash + 1 : path;
}
