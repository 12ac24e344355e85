/* session.c - `oscar session`: saved sessions, made, tried, listed, looked at, removed. */
#include "cli/models.h"
#include "cli/options.h"
#include "cli/generate.h"
#include "cli/progress.h"
#include "cli/sessions.h"

#include <dirent.h>
#include <errno.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

static const struct usage usage = {
    .command = "session",
    .operands = "save|load|list|info|rm [NAME]",
    .min_operands = 1,
    .max_operands = 2,
    .about =
        "Sessions that 'run' and 'chat' go on with (--session NAME). save: the model reads a text (-p or -f) and what it has "
        "read is kept.\nload: a session is restored, to see whether it suits a model and its options. list: all there are. "
        "info: what one is,\nwith all checksums verified. rm: removes one.",
    .examples = "oscar session save novel -m smollm2-135m -f novel.txt\n"
                "oscar run -m smollm2-135m --session novel -n 100\n"
                "oscar session list\n"
                "oscar session info novel\n",
};

struct request {
  const char *name;
  struct engine_options engine;
  struct session_arguments where;
  struct text_arguments text;
  const char *content; /* that save is to read */
  size_t content_bytes;
  char path[PATH_MAX]; /* of the session */
};

static const struct option_spec text_options[] = {
    {"prompt", 'p', OPTION_TEXT, offsetof(struct text_arguments, prompt), "TEXT", .help = "save: the text"},
    {"file", 'f', OPTION_TEXT, offsetof(struct text_arguments, file), "FILE",
     .help = "save: the text from a file; '-': standard input"},
};

/* ---- save, load: with a model ---- */

typedef oscar_status with_engine(struct engine *engine, struct session *session, struct request *request,
                                 const struct progress *progress);

static void print_size(const char *what, const struct request *r, int64_t tokens, size_t bytes, int64_t ns) {
  char size[32];
  printf("%s %s: %lld tokens, %s, %.1f ms\n", r->name, what, (long long)tokens, format_bytes((double)bytes, size, sizeof size),
         (double)ns / 1e6);
}

static oscar_status save_text(struct engine *engine, struct session *session, struct request *r,
                              const struct progress *progress) {
  int32_t *ids = NULL;
  int count = 0;
  oscar_status status = prompt_ids(engine, r->content, r->content_bytes, &ids, &count);
  if (status == OSCAR_OK) status = session_sync(session, ids, count, progress);
  mem_free(engine->context, ids);
  /* What was read before Ctrl-C is worth keeping. */
  if (status != OSCAR_OK && (status != OSCAR_CANCELLED || session_length(session) == 0)) return status;
  const int64_t begun = time_ns();
  const oscar_status saved = session_file_save(engine, session, NULL, r->path);
  if (saved != OSCAR_OK) return saved;
  const int64_t ns = time_ns() - begun;
  struct stat info = {0};
  (void)stat(r->path, &info); /* its size is for show */
  print_size("saved", r, session_length(session), (size_t)info.st_size, ns);
  return status == OSCAR_OK ? OSCAR_OK : set_error(engine->context, status, "stopped; what had been read is saved");
}

static oscar_status load(struct engine *engine, struct session *session, struct request *r, const struct progress *progress) {
  (void)progress;
  json_t *about;
  const int64_t begun = time_ns();
  oscar_status status = session_file_load(engine, session, r->path, &about);
  if (status != OSCAR_OK) return status;
  json_decref(about);
  print_size("loaded", r, session_length(session), oscar_sequence_bytes(session_sequence(session)), time_ns() - begun);
  return OSCAR_OK;
}

static int run_with_engine(struct request *r, with_engine *work) {
  char model[PATH_MAX], error[1024];
  struct engine_options options = r->engine;
  int code = engine_options_resolve("session", &options, model, sizeof model);
  if (code != EXIT_DONE) return code;
  interrupt_watch();
  struct progress_line line;
  progress_begin(&line);
  options.progress = &line.progress;
  struct engine engine;
  struct sampler_options sampling;
  sampler_options_default(&sampling);
  oscar_status status = engine_open(&options, &engine, error, sizeof error);
  if (status == OSCAR_OK) {
    struct session *session = NULL;
    status = session_create(&engine, &sampling, &session);
    if (status == OSCAR_OK) status = work(&engine, session, r, &line.progress);
    if (status != OSCAR_OK) snprintf(error, sizeof error, "%s", oscar_last_error(engine.context));
    session_free(session);
    engine_close(&engine);
  }
  progress_end(&line);
  return status == OSCAR_OK ? EXIT_DONE : failed_with(status, error);
}

static int action_save(struct request *r) {
  if ((r->text.prompt != NULL) == (r->text.file != NULL))
    return wrong_use("session save: give the text with -p TEXT or -f FILE (one of them)");
  char *file = NULL;
  r->content_bytes = r->text.prompt ? strlen(r->text.prompt) : 0;
  if (r->text.file && !read_text(r->text.file, &file, &r->content_bytes)) return EXIT_FAILED;
  r->content = file ? file : r->text.prompt;
  const int code = run_with_engine(r, save_text);
  free(file);
  return code;
}

static int action_load(struct request *r) {
  if (!session_exists(r->path)) return failed("%s: there is no such session", r->path);
  return run_with_engine(r, load);
}

/* ---- list, info, rm: without ---- */

static const char *text_of(const json_t *about, const char *key) {
  const char *text = json_string_value(json_object_get(about, key));
  return text ? text : "?";
}

static void format_date(int64_t seconds, char text[32]) {
  const time_t at = (time_t)seconds;
  struct tm parts;
  if (!localtime_r(&at, &parts) || strftime(text, 32, "%Y-%m-%d %H:%M:%S", &parts) == 0) snprintf(text, 32, "?");
}

static int is_session_file(const struct dirent *entry) {
  char name[SESSION_NAME_ROOM];
  return session_name_of_file(entry->d_name, name);
}

static void list_one(oscar_context *context, const char *folder, const char *file) {
  char path[PATH_MAX], size[32], date[32];
  const int name = (int)(strlen(file) - strlen(SESSION_FILE_SUFFIX));
  oscar_snapshot *snapshot;
  if ((size_t)snprintf(path, sizeof path, "%s/%s", folder, file) >= sizeof path) return;
  if (oscar_snapshot_open(context, path, &snapshot) != OSCAR_OK) {
    printf("%-20.*s cannot be used: %s\n", name, file, oscar_last_error(context));
    return;
  }
  const oscar_snapshot_info *info = oscar_snapshot_describe(snapshot);
  json_t *about = json_loadb(info->text, info->text_bytes, 0, NULL);
  format_date(info->saved_at, date);
  printf("%-20.*s %-28s %8lld %10s  %s\n", name, file, text_of(about, "model"), (long long)info->n_ids,
         format_bytes((double)info->file_bytes, size, sizeof size), date);
  json_decref(about);
  oscar_snapshot_close(snapshot);
}

static int action_list(oscar_context *context, struct request *r) {
  char folder[PATH_MAX];
  struct dirent **files = NULL;
  oscar_status status = sessions_folder(context, r->where.folder, folder, sizeof folder);
  if (status != OSCAR_OK) return failed_with(status, oscar_last_error(context));
  const int n = scandir(folder, &files, is_session_file, alphasort);
  if (n < 0 && errno != ENOENT) return failed("%s: %s", folder, strerror(errno));
  printf("%-20s %-28s %8s %10s  %s\n", "name", "model", "tokens", "size", "saved");
  for (int i = 0; i < n; i++) {
    list_one(context, folder, files[i]->d_name);
    free(files[i]);
  }
  free(files);
  printf("\nSessions are kept in %s\n", folder);
  return EXIT_DONE;
}

static int action_info(oscar_context *context, struct request *r) {
  oscar_snapshot *snapshot;
  oscar_status status = oscar_snapshot_open(context, r->path, &snapshot);
  if (status != OSCAR_OK) return failed_with(status, oscar_last_error(context));
  const oscar_snapshot_info *i = oscar_snapshot_describe(snapshot);
  json_t *about = json_loadb(i->text, i->text_bytes, 0, NULL);
  char size[32], date[32];
  format_date(i->saved_at, date);
  printf("file        %s\nsize        %s\nsaved       %s\n", r->path, format_bytes((double)i->file_bytes, size, sizeof size),
         date);
  printf("model       %s (%d layers, %d KV heads, head dimension %d)\n", text_of(about, "model"), i->layers, i->kv_heads,
         i->head_dim);
  printf("fingerprint %s\n", *i->model ? i->model : "none");
  printf("cache       %s%s%s\n", text_of(about, "kv"), *i->codecs ? ", codecs " : "", i->codecs);
  printf("windows     %d first and %d latest tokens\n", i->sink_pages * PAGE_TOKENS, i->recent_pages * PAGE_TOKENS);
  printf("tokens      %lld (%lld of them in the cache: %lld exact and %lld coded pages)\n", (long long)i->n_ids,
         (long long)i->tokens, (long long)i->exact_pages, (long long)i->coded_pages);
  if (json_is_array(json_object_get(about, "messages")))
    printf("messages    %zu\n", json_array_size(json_object_get(about, "messages")));
  json_decref(about);
  status = oscar_snapshot_check(snapshot);
  oscar_snapshot_close(snapshot);
  if (status != OSCAR_OK) return failed_with(status, oscar_last_error(context));
  printf("checksums   all right\n");
  return EXIT_DONE;
}

/* A damaged session can be removed as well: it is enough that the file begins as one. */
static int action_rm(oscar_context *context, struct request *r) {
  bool is;
  oscar_status status = oscar_snapshot_is_one(context, r->path, &is);
  if (status != OSCAR_OK) return failed_with(status, oscar_last_error(context));
  if (!is) return failed("%s: not removed: this is not a saved session", r->path);
  return unlink(r->path) == 0 ? EXIT_DONE : failed("%s: %s", r->path, strerror(errno));
}

static int without_model(int (*action)(oscar_context *context, struct request *request), struct request *r) {
  oscar_context *context;
  oscar_status status = oscar_context_create(NULL, &context);
  if (status != OSCAR_OK) return failed_with(status, NULL);
  int code = action(context, r);
  oscar_context_free(context);
  return code;
}

static const char *action_name(const void *list, int i) {
  (void)list;
  static const char *const names[] = {"save", "load", "list", "info", "rm"};
  return (size_t)i < ARRAY_LENGTH(names) ? names[i] : NULL;
}

static int dispatch(const char *action, struct request *r) {
  if (strcmp(action, "save") == 0) return action_save(r);
  if (strcmp(action, "load") == 0) return action_load(r);
  if (strcmp(action, "info") == 0) return without_model(action_info, r);
  return without_model(action_rm, r);
}

int command_session(int argc, char **argv) {
  struct request r = {0};
  engine_options_default(&r.engine);
  const struct option_group groups[] = {model_group(&r.engine),
                                        {"Text", text_options, (int)ARRAY_LENGTH(text_options), &r.text},
                                        session_folder_group(&r.where),
                                        cache_group(&r.engine)};
  int first, code;
  if (!args_parse(&usage, groups, (int)ARRAY_LENGTH(groups), argc, argv, &first, &code)) return code;
  const char *action = argv[first];
  int known = 0;
  while (action_name(NULL, known) && strcmp(action_name(NULL, known), action) != 0) known++;
  if (!action_name(NULL, known)) return wrong_use("session: '%s'; expected save, load, list, info or rm", action);
  const bool listing = strcmp(action, "list") == 0;
  if (listing != (argc - first == 1))
    return wrong_use(listing ? "session list: it takes no name" : "session %s: which session? Give its name", action);
  if (listing) return without_model(action_list, &r);
  r.name = argv[first + 1];
  code = session_path("session", r.name, r.where.folder, r.path, sizeof r.path);
  return code == EXIT_DONE ? dispatch(action, &r) : code;
}
