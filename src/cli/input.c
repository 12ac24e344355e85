/* input.c - a whole text from a file or from standard input. */
#include "cli/cli.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

static bool read_stream(FILE *stream, char **text, size_t *bytes) {
  size_t room = 1 << 16, used = 0;
  char *buffer = malloc(room);
  while (buffer) {
    used += fread(buffer + used, 1, room - used - 1, stream);
    if (used + 1 < room) break;
    char *larger = room > SIZE_MAX / 2 ? NULL : realloc(buffer, room * 2);
    if (!larger) free(buffer);
    buffer = larger;
    room *= 2;
  }
  if (!buffer) {
    errno = ENOMEM;
    return false;
  }
  if (ferror(stream)) {
    free(buffer);
    return false;
  }
  buffer[used] = '\0';
  *text = buffer;
  *bytes = used;
  return true;
}

bool read_text(const char *path, char **text, size_t *bytes) {
  *text = NULL;
  *bytes = 0;
  bool standard = strcmp(path, "-") == 0;
  FILE *stream = standard ? stdin : fopen(path, "rbe");
  bool done = stream && read_stream(stream, text, bytes);
  int why = errno;
  if (stream && !standard) fclose(stream);
  if (!done) failed("%s: cannot be read: %s", standard ? "standard input" : path, strerror(why));
  return done;
}
