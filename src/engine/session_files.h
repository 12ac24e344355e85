/*
 * engine/session_files.h - what sessions are called, and their files: NAME.session in a folder, each a snapshot
 * (oscar/snapshot.h) whose text is a JSON object (docs/formats.md). The program and the service keep the same ones. Private.
 */
#ifndef OSCAR_SESSION_FILES_H
#define OSCAR_SESSION_FILES_H

#include "base/base.h"

#define SESSION_FILE_SUFFIX ".session"
#define SESSION_NAME_BYTES  64
#define SESSION_NAME_ROOM   (SESSION_NAME_BYTES + 1)
#define SESSION_NAME_RULE   "1 to 64 letters, digits, '.', '_' and '-', a letter or digit first"

bool session_name_is_valid(const char *name);
/* A file's name without its end; false: it is no session's. */
bool session_name_of_file(const char *file, char name[SESSION_NAME_ROOM]);
/* The path of a session's file; false: longer than room - 1 bytes. */
bool session_file_in(const char *folder, const char *name, char *path, size_t room);

#endif
