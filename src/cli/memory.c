/* memory.c - how much memory this machine still has for us: the kernel's estimate, cut down to what a control group leaves. */
#include "cli/memory.h"

#include <stdlib.h>
#include <string.h>

/* One number in a file, or `otherwise` ("max" and a missing file mean no limit). */
static double number_in(const char *path, double otherwise) {
  char text[64] = "";
  FILE *file = fopen(path, "re");
  if (!file) return otherwise;
  size_t n = fread(text, 1, sizeof text - 1, file);
  fclose(file);
  char *end;
  text[n] = '\0';
  double value = strtod(text, &end);
  return end == text ? otherwise : value;
}

static double kernel_estimate(void) {
  char line[128];
  long long kib = 0;
  FILE *file = fopen("/proc/meminfo", "re");
  if (!file) return 0;
  while (kib == 0 && fgets(line, sizeof line, file))
    if (strncmp(line, "MemAvailable:", 13) == 0) kib = strtoll(line + 13, NULL, 10);
  fclose(file);
  return 1024.0 * (double)kib;
}

double memory_available(void) {
  double available = kernel_estimate();
  double limit = number_in("/sys/fs/cgroup/memory.max", 0);
  double left = limit - number_in("/sys/fs/cgroup/memory.current", 0);
  return limit > 0 && left < available ? left : available;
}

double memory_besides(const char *path) {
  char line[4352], mapped[4096];
  if (!realpath(path, mapped)) return 0;
  FILE *maps = fopen("/proc/self/smaps", "re");
  if (!maps) return 0;
  double bytes = 0;
  bool counts = false;
  while (fgets(line, sizeof line, maps)) {
    /* A mapping begins with its addresses in lower-case digits, its fields with a name in capitals. */
    if (!(line[0] >= 'A' && line[0] <= 'Z'))
      counts = !strstr(line, mapped);
    else if (counts && strncmp(line, "Rss:", 4) == 0)
      bytes += 1024.0 * (double)strtoll(line + 4, NULL, 10);
  }
  fclose(maps);
  return bytes;
}
