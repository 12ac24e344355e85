/*
 * session_commands.c - what other threads ask of sessions: lists, copies, other names, into files and back, ends.
 *
 * Each is a command that the service's thread runs between steps (service.c), so it sees sessions as nobody changes them.
 */
#include "engine/service/store.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

static oscar_status find_named(struct service *s, const char *name, struct session **x) {
  const oscar_status status = session_look_for(s, name, x);
  if (status == OSCAR_OK && !*x) return set_error(s->context, OSCAR_INVALID_ARGUMENT, "there is no session '%.80s'", name);
  return status == OSCAR_OK || status == OSCAR_NO_MEMORY ? status : OSCAR_INVALID_ARGUMENT;
}

static oscar_status find_unused(struct service *s, const char *name, struct session **x) {
  const oscar_status status = find_named(s, name, x);
  if (status != OSCAR_OK || !(*x)->request) return status;
  return set_error(s->context, OSCAR_INVALID_ARGUMENT, "session %s is in use: wait until its request is finished", name);
}

static oscar_status check_new_name(struct service *s, const char *name) {
  if (!session_name_is_valid(name))
    return set_error(s->context, OSCAR_INVALID_ARGUMENT, "'%.80s' is no name of a session: " SESSION_NAME_RULE, name);
  struct session *x;
  const oscar_status status = session_look_for(s, name, &x);
  if (status != OSCAR_OK || !x) return status;
  return set_error(s->context, OSCAR_INVALID_ARGUMENT, "there is a session %s already", name);
}

static oscar_status describe(struct service *s, const struct session *x, struct session_entry *entry) {
  const oscar_cache_options *c = &s->cache_options;
  const struct answer *a = x->request && x->request->answers ? &x->request->answers[0] : NULL;
  const oscar_sequence *sequence = a ? a->sequence : x->sequence;
  const int64_t tokens = sequence ? oscar_sequence_length(sequence) : x->tokens, pages = (tokens + PAGE_TOKENS - 1) / PAGE_TOKENS;
  int64_t exact = c->sink_pages + c->recent_pages + 1;
  if (!c->codecs || exact > pages) exact = pages;
  *entry = (struct session_entry){.tier = session_tier_of(x),
                                  .on_disk = x->on_disk,
                                  .tokens = sequence || x->tokens ? tokens : 0,
                                  .exact_pages = exact,
                                  .coded_pages = pages - exact,
                                  .device_bytes = sequence ? oscar_sequence_bytes(sequence) : 0,
                                  .host_bytes = x->kept.n,
                                  .disk_bytes = x->file_bytes,
                                  .created_at = x->created_at,
                                  .used_at = x->used_at};
  memcpy(entry->name, x->name, sizeof entry->name);
  entry->text = strdup(x->text ? x->text : "");
  return entry->text ? OSCAR_OK : set_error(s->context, OSCAR_NO_MEMORY, "out of memory for the text of session %s", x->name);
}

struct session_list {
  struct session_entry *entries;
  int count;
};

static int newest_first(const void *a, const void *b) {
  const struct session_entry *x = a, *y = b;
  if (x->used_at != y->used_at) return x->used_at > y->used_at ? -1 : 1;
  return strcmp(x->name, y->name);
}

static oscar_status list_command(struct service *s, struct command *command) {
  struct session_list *list = command->out;
  size_t n = 0;
  for (struct session *x = s->sessions->first; x; x = x->next) n++;
  list->entries = calloc(n + 1, sizeof *list->entries);
  if (!list->entries) return set_error(s->context, OSCAR_NO_MEMORY, "out of memory for a list of %zu sessions", n);
  for (struct session *x = s->sessions->first; x; x = x->next) {
    const oscar_status status = describe(s, x, &list->entries[list->count]);
    if (status != OSCAR_OK) return status;
    list->count++;
  }
  qsort(list->entries, n, sizeof *list->entries, newest_first);
  return OSCAR_OK;
}

oscar_status service_sessions(struct service *s, struct session_entry **entries, int *count, struct service_error *error) {
  struct session_list list = {0};
  struct command command = {.run = list_command, .out = &list, .error = error};
  const oscar_status status = service_command(s, &command);
  if (status != OSCAR_OK) {
    service_sessions_free(list.entries, list.count);
    list = (struct session_list){0};
  }
  *entries = list.entries;
  *count = list.count;
  return status;
}

void service_sessions_free(struct session_entry *entries, int count) {
  for (int i = 0; i < count; i++) free(entries[i].text);
  free(entries);
}

static oscar_status find_command(struct service *s, struct command *command) {
  struct session *x;
  const oscar_status status = find_named(s, command->name, &x);
  return status == OSCAR_OK ? describe(s, x, command->out) : status;
}

oscar_status service_session_find(struct service *s, const char *name, struct session_entry *entry, struct service_error *error) {
  struct command command = {.run = find_command, .name = name, .out = entry, .error = error};
  *entry = (struct session_entry){0};
  return service_command(s, &command);
}

struct token_list {
  int32_t *ids;
  int n;
};

static oscar_status tokens_command(struct service *s, struct command *command) {
  struct token_list *list = command->out;
  struct session *x;
  oscar_status status = find_named(s, command->name, &x);
  if (status == OSCAR_OK) status = session_get_ids(s, x);
  if (status != OSCAR_OK) return status;
  const struct answer *a = x->request && x->request->answers ? &x->request->answers[0] : NULL;
  const int32_t *ids = a && a->ids ? a->ids : x->ids;
  list->n = (int)(a && a->ids ? a->n : x->n);
  list->ids = malloc((size_t)list->n * sizeof *list->ids + 1);
  if (!list->ids) return set_error(s->context, OSCAR_NO_MEMORY, "out of memory for %d tokens", list->n);
  if (list->n) memcpy(list->ids, ids, (size_t)list->n * sizeof *list->ids);
  return OSCAR_OK;
}

oscar_status service_session_tokens(struct service *s, const char *name, int32_t **ids, int *n, struct service_error *error) {
  struct token_list list = {0};
  struct command command = {.run = tokens_command, .name = name, .out = &list, .error = error};
  const oscar_status status = service_command(s, &command);
  *ids = list.ids;
  *n = list.n;
  return status;
}

/* Until the writer is done. */
static oscar_status put_off(struct command *command) {
  command->state = COMMAND_PUT_OFF;
  return OSCAR_OK;
}

static oscar_status save_command(struct service *s, struct command *command) {
  char path[PATH_MAX];
  struct session *x;
  oscar_status status = session_file_path(s, command->name, path);
  if (status == OSCAR_OK) status = find_unused(s, command->name, &x);
  if (status != OSCAR_OK || x->on_disk) return status;
  if (!x->ids && !x->kept.bytes && !x->file_bytes)
    return set_error(s->context, OSCAR_INVALID_ARGUMENT, "session %s holds nothing that could be saved", x->name);
  if (writer_is_busy(s)) return put_off(command);
  if (writer_begin(s, x, command) != OSCAR_OK) return session_write(s, x);
  command->state = COMMAND_HANDED_ON;
  return OSCAR_OK;
}

oscar_status service_session_save(struct service *s, const char *name, struct service_error *error) {
  struct command command = {.run = save_command, .name = name, .error = error};
  return service_command(s, &command);
}

/* Onto the device, for somebody who asks for it now: answers under way give way, too. */
static oscar_status bring_now(struct service *s, struct session *x) {
  oscar_status status;
  do status = session_bring(s, x);
  while (status == OSCAR_NO_SPACE && youngest_preempt(s, 1));
  return status;
}

static oscar_status load_command(struct service *s, struct command *command) {
  struct session *x;
  const oscar_status status = find_named(s, command->name, &x);
  if (status != OSCAR_OK || x->request) return status;
  session_touch(s, x);
  return bring_now(s, x);
}

oscar_status service_session_load(struct service *s, const char *name, struct service_error *error) {
  struct command command = {.run = load_command, .name = name, .error = error};
  return service_command(s, &command);
}

/* On the device, where the copy shares pages. */
static oscar_status fork_command(struct service *s, struct command *command) {
  struct session *x, *copy;
  oscar_sequence *sequence = NULL;
  oscar_status status = find_unused(s, command->name, &x);
  if (status == OSCAR_OK) status = check_new_name(s, command->other);
  if (status == OSCAR_OK) status = session_get_ids(s, x);
  if (status == OSCAR_OK) status = bring_now(s, x);
  if (status != OSCAR_OK) return status;
  x->busy = true;
  do status = x->sequence ? oscar_sequence_fork(x->sequence, &sequence) : OSCAR_OK;
  while (status == OSCAR_NO_SPACE && (room_make(s) || youngest_preempt(s, 1)));
  x->busy = false;
  if (status != OSCAR_OK) return status;
  copy = session_add(s, command->other);
  int32_t *ids = copy ? mem_alloc(s->context, (size_t)x->n, sizeof *ids) : NULL;
  if (!ids || (x->text && session_set_text(s, copy, x->text) != OSCAR_OK)) {
    if (sequence) oscar_sequence_free(sequence);
    mem_free(s->context, ids);
    if (copy) session_remove(s, copy);
    return OSCAR_NO_MEMORY;
  }
  if (x->n) memcpy(ids, x->ids, (size_t)x->n * sizeof *ids);
  copy->ids = ids;
  copy->n = x->n;
  copy->tokens = x->tokens;
  copy->sequence = sequence;
  return OSCAR_OK;
}

oscar_status service_session_fork(struct service *s, const char *name, const char *copy, struct service_error *error) {
  struct command command = {.run = fork_command, .name = name, .other = copy, .error = error};
  return service_command(s, &command);
}

static oscar_status rename_command(struct service *s, struct command *command) {
  char from[PATH_MAX], to[PATH_MAX];
  struct session *x;
  oscar_status status = find_named(s, command->name, &x);
  if (status == OSCAR_OK) status = check_new_name(s, command->other);
  if (status == OSCAR_OK && x->writing) return put_off(command);
  if (status == OSCAR_OK && x->file_bytes) status = session_file_path(s, x->name, from);
  if (status == OSCAR_OK && x->file_bytes) status = session_file_path(s, command->other, to);
  if (status != OSCAR_OK) return status;
  if (x->file_bytes && rename(from, to) != 0)
    return set_error(s->context, OSCAR_IO, "%s: cannot be renamed to %s: %s", from, to, strerror(errno));
  snprintf(x->name, sizeof x->name, "%s", command->other);
  return OSCAR_OK;
}

oscar_status service_session_rename(struct service *s, const char *name, const char *to, struct service_error *error) {
  struct command command = {.run = rename_command, .name = name, .other = to, .error = error};
  return service_command(s, &command);
}

static oscar_status annotate_command(struct service *s, struct command *command) {
  struct session *x;
  const oscar_status status = find_named(s, command->name, &x);
  return status == OSCAR_OK ? session_set_text(s, x, command->other) : status;
}

oscar_status service_session_annotate(struct service *s, const char *name, const char *text, struct service_error *error) {
  struct command command = {.run = annotate_command, .name = name, .other = text, .error = error};
  return service_command(s, &command);
}

static oscar_status delete_command(struct service *s, struct command *command) {
  struct session *x;
  const oscar_status status = find_named(s, command->name, &x);
  if (status != OSCAR_OK) return status;
  if (x->writing) return put_off(command);
  session_delete_file(s, x);
  session_remove(s, x);
  return OSCAR_OK;
}

oscar_status service_session_delete(struct service *s, const char *name, struct service_error *error) {
  struct command command = {.run = delete_command, .name = name, .error = error};
  return service_command(s, &command);
}
