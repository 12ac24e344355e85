/* terminal.c - whether a stream is a terminal, and how wide it is. */
#include "cli/cli.h"

#include <sys/ioctl.h>
#include <unistd.h>

bool terminal_is(FILE *stream) { return isatty(fileno(stream)) == 1; }

int terminal_columns(FILE *stream) {
  struct winsize size;
  bool known = ioctl(fileno(stream), TIOCGWINSZ, &size) == 0 && size.ws_col > 0;
  return known ? size.ws_col : 80;
}
