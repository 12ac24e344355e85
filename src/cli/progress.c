/* progress.c - see progress.h. Time left is extrapolated from the phase's mean speed: simple, and steady enough to plan by. */
#include "cli/progress.h"

#include <string.h>

enum { BAR_WIDTH = 24 };
static const int64_t quiet_ns = 500000000, redraw_ns = 100000000;

static void format_duration(double seconds, char *text, size_t room) {
  long s = (long)(seconds + 0.5);
  if (s < 60)
    snprintf(text, room, "%lds", s);
  else if (s < 3600)
    snprintf(text, room, "%ldm%02lds", s / 60, s % 60);
  else
    snprintf(text, room, "%ldh%02ldm", s / 3600, s / 60 % 60);
}

static void erase(struct progress_line *line) {
  if (line->shown) fputs("\r\033[K", stderr);
  line->shown = false;
}

static void draw(struct progress_line *line, int64_t done, int64_t total, int64_t now) {
  double share = total > 0 ? (double)done / (double)total : 0, elapsed = (double)(now - line->started_ns) * 1e-9;
  char left[32] = "?", bar[BAR_WIDTH + 1];
  if (share > 0) format_duration(elapsed * (1 - share) / share, left, sizeof left);
  int filled = (int)(share * BAR_WIDTH);
  for (int i = 0; i < BAR_WIDTH; i++) bar[i] = i < filled ? '#' : '.';
  bar[BAR_WIDTH] = '\0';
  fprintf(stderr, "\r\033[K%s [%s] %3.0f%%, %s left", line->what, bar, 100 * share, left);
  fflush(stderr);
  line->shown = true;
}

static void print_tenth(struct progress_line *line, int64_t done, int64_t total, int64_t now) {
  int tenth = total > 0 ? (int)(10 * done / total) : 0;
  if (tenth <= line->printed_tenth) return;
  line->printed_tenth = tenth;
  char elapsed[32];
  format_duration((double)(now - line->started_ns) * 1e-9, elapsed, sizeof elapsed);
  fprintf(stderr, "%s: %d%% after %s\n", line->what, 10 * tenth, elapsed);
}

static bool report(void *user, const char *what, int64_t done, int64_t total) {
  struct progress_line *line = user;
  int64_t now = time_ns();
  if (done > total) done = total;
  if (strncmp(line->what, what, sizeof line->what - 1) != 0) {
    erase(line);
    snprintf(line->what, sizeof line->what, "%s", what);
    line->started_ns = now;
    line->printed_ns = 0;
    line->printed_tenth = 0;
  }
  bool early = now - line->started_ns < quiet_ns, soon = now - line->printed_ns < redraw_ns;
  if (line->terminal && done >= total) {
    erase(line);
  } else if (line->terminal && !early && !soon) {
    draw(line, done, total, now);
    line->printed_ns = now;
  } else if (!line->terminal && !early) {
    print_tenth(line, done, total, now);
  }
  return !interrupt_requested();
}

void progress_begin(struct progress_line *line) {
  *line = (struct progress_line){.progress = {report, line}, .terminal = terminal_is(stderr)};
}

void progress_end(struct progress_line *line) { erase(line); }
