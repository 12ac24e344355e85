/*
 * cli/progress.h - progress of long work on stderr. Private.
 *
 * On a terminal: one line that is rewritten, with the share done and the time left. Elsewhere: a line at about every tenth. Work
 * that is over within half a second prints nothing. Ctrl-C (interrupt_watch) makes the next report cancel the work.
 */
#ifndef OSCAR_CLI_PROGRESS_H
#define OSCAR_CLI_PROGRESS_H

#include "cli/cli.h"
#include "engine/engine.h"

struct progress_line {
  struct progress progress; /* pass &line.progress to the engine */
  bool terminal, shown;     /* shown: the line is on the screen and not ended */
  char what[64];            /* of the phase now running */
  int64_t started_ns, printed_ns;
  int printed_tenth;
};

/* The struct must stay where it is while the work runs. */
void progress_begin(struct progress_line *line);
/* Takes a half-drawn line off the screen; call before printing anything else. */
void progress_end(struct progress_line *line);

#endif
