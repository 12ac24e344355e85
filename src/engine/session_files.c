/* session_files.c - the rule for names of sessions, and names of files from them and back. */
#include "engine/session_files.h"

#include <stdio.h>
#include <string.h>

static bool is_letter_or_digit(char c) { return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9'); }

bool session_name_is_valid(const char *name) {
  size_t n = 0;
  for (; name[n] && n <= SESSION_NAME_BYTES; n++)
    if (!is_letter_or_digit(name[n]) && (n == 0 || !strchr("._-", name[n]))) return false;
  return n >= 1 && n <= SESSION_NAME_BYTES;
}

bool session_name_of_file(const char *file, char name[SESSION_NAME_ROOM]) {
  const size_t end = strlen(SESSION_FILE_SUFFIX), bytes = strlen(file);
  if (bytes <= end || bytes - end > SESSION_NAME_BYTES || strcmp(file + bytes - end, SESSION_FILE_SUFFIX) != 0) return false;
  memcpy(name, file, bytes - end);
  name[bytes - end] = '\0';
  return session_name_is_valid(name);
}

bool session_file_in(const char *folder, const char *name, char *path, size_t room) {
  return (size_t)snprintf(path, room, "%s/%s" SESSION_FILE_SUFFIX, folder, name) < room;
}
