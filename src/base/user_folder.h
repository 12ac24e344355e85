/* user_folder.h - the program's folders of a user, by the XDG Base Directory Specification. Private. */
#ifndef OSCAR_USER_FOLDER_H
#define OSCAR_USER_FOLDER_H

#include "base/base.h"

enum user_folder {
  USER_CACHE, /* what can be made again: $XDG_CACHE_HOME/oscar, or ~/.cache/oscar */
  USER_DATA   /* what cannot: $XDG_DATA_HOME/oscar, or ~/.local/share/oscar */
};
/* Its path; it need not be there. Errors: IO (neither variable nor HOME is an absolute path; longer than room - 1 bytes). */
oscar_status user_folder(oscar_context *context, enum user_folder which, char *path, size_t room);

#endif
