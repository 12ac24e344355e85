/* sessions.c - where sessions are, what they are called, and a session to its file and back. */
#include "cli/sessions.h"

#include "base/file.h"
#include "base/user_folder.h"
#include "cli/cli.h"
#include "engine/json_text.h"

#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static const struct option_spec options[] = {
    {"session", 0, OPTION_TEXT, offsetof(struct session_arguments, name), "NAME",
     .help = "goes on with the session of this name, and saves it at the end", .default_text = "none"},
    {"dir", 0, OPTION_TEXT, offsetof(struct session_arguments, folder), "DIR", .help = "the folder of sessions",
     .default_text = "sessions in the user's data folder"},
};

struct option_group session_group(struct session_arguments *arguments) {
  return (struct option_group){"Session", options, (int)ARRAY_LENGTH(options), arguments};
}
struct option_group session_folder_group(struct session_arguments *arguments) {
  return (struct option_group){"Folder", options + 1, (int)ARRAY_LENGTH(options) - 1, arguments};
}

oscar_status sessions_folder(oscar_context *context, const char *given, char *path, size_t room) {
  char data[PATH_MAX];
  oscar_status status = given ? OSCAR_OK : user_folder(context, USER_DATA, data, sizeof data);
  if (status != OSCAR_OK) return prefix_error(context, status, "sessions have no place (see --dir)");
  const int n = given ? snprintf(path, room, "%s", given) : snprintf(path, room, "%s/sessions", data);
  if (n < 0 || (size_t)n >= room) return set_error(context, OSCAR_IO, "the path of the folder of sessions is too long");
  return OSCAR_OK;
}

int session_path(const char *command, const char *name, const char *folder, char *path, size_t room) {
  if (!session_name_is_valid(name)) return wrong_use("%s: '%s' is no name of a session: " SESSION_NAME_RULE, command, name);
  char where[PATH_MAX];
  oscar_context *context;
  oscar_status status = oscar_context_create(NULL, &context);
  if (status != OSCAR_OK) return failed_with(status, NULL);
  status = sessions_folder(context, folder, where, sizeof where);
  int code = status == OSCAR_OK ? EXIT_DONE : failed_with(status, oscar_last_error(context));
  oscar_context_free(context);
  if (code == EXIT_DONE && !session_file_in(where, name, path, room))
    return failed("%s: the path of session %s is too long", command, name);
  return code;
}

bool session_exists(const char *path) { return access(path, F_OK) == 0; }

oscar_status session_file_save(struct engine *engine, struct session *session, json_t *about, const char *path) {
  const char *model = model_geometry_of(engine->model)->name;
  json_t *whole = json_pack("{s:o, s:s}", "model", json_text(model, strlen(model)), "kv", engine->options.kv);
  if (about) json_object_update_missing(whole, about);
  char *text = whole ? json_dumps(whole, JSON_COMPACT | JSON_SORT_KEYS) : NULL;
  json_decref(whole);
  if (!text) return set_error(engine->context, OSCAR_NO_MEMORY, "out of memory for what is saved with a session");
  oscar_status status = file_make_folder_of(engine->context, path);
  interrupt_hold();
  if (status == OSCAR_OK) status = session_save(session, text, path);
  interrupt_release();
  free(text);
  return status;
}

oscar_status session_file_load(struct engine *engine, struct session *session, const char *path, json_t **about) {
  oscar_snapshot *snapshot;
  oscar_status status = oscar_snapshot_open(engine->context, path, &snapshot);
  if (status != OSCAR_OK) return status;
  const oscar_snapshot_info *info = oscar_snapshot_describe(snapshot);
  *about = json_loadb(info->text, info->text_bytes, 0, NULL);
  if (!json_is_object(*about)) {
    json_decref(*about);
    *about = json_object();
  }
  status = *about ? session_restore(session, snapshot)
                  : set_error(engine->context, OSCAR_NO_MEMORY, "out of memory for what was saved with a session");
  oscar_snapshot_close(snapshot);
  if (status != OSCAR_OK) {
    json_decref(*about);
    *about = NULL;
  }
  return status;
}
