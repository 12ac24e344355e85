/* user_folder.c - where a user's files of the program are. */
#include "base/user_folder.h"

#include <stdio.h>
#include <stdlib.h>

static const struct {
  const char *kind, *variable, *in_home;
} folders[] = {
    [USER_CACHE] = {"cache", "XDG_CACHE_HOME", ".cache"},
    [USER_DATA] = {"data", "XDG_DATA_HOME", ".local/share"},
};

oscar_status user_folder(oscar_context *context, enum user_folder which, char *path, size_t room) {
  const char *kind = folders[which].kind, *base = getenv(folders[which].variable), *home = getenv("HOME");
  int n;
  if (base && base[0] == '/') /* relative ones are to be ignored, says the specification */
    n = snprintf(path, room, "%s/oscar", base);
  else if (home && home[0] == '/')
    n = snprintf(path, room, "%s/%s/oscar", home, folders[which].in_home);
  else
    return set_error(context, OSCAR_IO, "there is no %s folder: neither %s nor HOME is an absolute path", kind,
                     folders[which].variable);
  if (n < 0 || (size_t)n >= room)
    return set_error(context, OSCAR_IO, "the path of the %s folder is longer than %zu bytes", kind, room - 1);
  return OSCAR_OK;
}
