/*
 * cli/sessions.h - sessions that were saved, by name (engine/session_files.h), those of `oscar serve` among them. Their text is a
 * JSON object: "model" (its name), "kv" (the form of the cache), and of a conversation "messages" and "title". Private.
 */
#ifndef OSCAR_CLI_SESSIONS_H
#define OSCAR_CLI_SESSIONS_H

#include "cli/args.h"
#include "engine/engine.h"
#include "engine/session_files.h"
#include <jansson.h>

struct session_arguments {
  const char *name, *folder; /* NULL: none; the user's data folder */
};
/* --session, --dir */
struct option_group session_group(struct session_arguments *arguments);
/* --dir */
struct option_group session_folder_group(struct session_arguments *arguments);

/* The folder of sessions: `given`, or $XDG_DATA_HOME/oscar/sessions, or ~/.local/share/oscar/sessions. */
oscar_status sessions_folder(oscar_context *context, const char *given, char *path, size_t room);
/* The file of a session; it need not be there. EXIT_DONE, or the exit code after a message. */
int session_path(const char *command, const char *name, const char *folder, char *path, size_t room);
bool session_exists(const char *path);

/* With what `about` has (NULL: nothing; borrowed) beside model and kv. The folder is made if it is not there. */
oscar_status session_file_save(struct engine *engine, struct session *session, json_t *about, const char *path);
/* *about: the text of the file, never NULL after OSCAR_OK, an empty object if it has none; json_decref it. */
oscar_status session_file_load(struct engine *engine, struct session *session, const char *path, json_t **about);

#endif
