/*
 * tests/engine/session_client.h - a folder for sessions, conversations that go on in one, and what is known of a session.
 */
#ifndef OSCAR_TEST_SESSION_CLIENT_H
#define OSCAR_TEST_SESSION_CLIENT_H

#include "service_client.h"

#include <dirent.h>
#include <limits.h>

static struct small_model model;
static struct service_error error;
static char folder[64];

static inline int make_model(void **state) {
  (void)state;
  small_model_make(&model, "llama", false, 11);
  return 0;
}
static inline int free_model(void **state) {
  (void)state;
  small_model_free(&model);
  return 0;
}

static inline void make_folder(void) {
  snprintf(folder, sizeof folder, "/tmp/oscar-sessions-XXXXXX");
  assert_non_null(mkdtemp(folder));
}
static inline void remove_folder(void) {
  char path[PATH_MAX];
  DIR *d = opendir(folder);
  for (struct dirent *e; (e = readdir(d));) {
    snprintf(path, sizeof path, "%s/%.200s", folder, e->d_name);
    if (e->d_name[0] != '.') assert_int_equal(unlink(path), 0);
  }
  closedir(d);
  assert_int_equal(rmdir(folder), 0);
}

/* A conversation: ids so far. */
struct talk {
  int32_t ids[2048];
  int n;
};

/* `more` new tokens, and an answer of `answer`. */
static inline struct request_usage say(struct service *s, const char *session, struct talk *t, int more, int answer,
                                       uint64_t seed) {
  struct client c;
  some_ids(seed, more, t->ids + t->n);
  t->n += more;
  struct request_options options = client_options(t->ids, t->n, answer);
  options.session = session;
  client_submit(s, &c, options);
  client_wait(&c);
  if (c.answers[0].reason == FINISH_ERROR) fail_msg("%s", c.answers[0].error);
  assert_int_equal(c.answers[0].n, answer);
  memcpy(t->ids + t->n, c.answers[0].ids, (size_t)answer * sizeof *t->ids);
  t->n += answer;
  const struct request_usage usage = c.usage;
  client_clear(&c);
  return usage;
}

static inline struct session_entry entry_of(struct service *s, const char *name) {
  struct session_entry entry;
  if (service_session_find(s, name, &entry, &error) != OSCAR_OK) fail_msg("%s", error.text);
  free(entry.text);
  entry.text = NULL;
  return entry;
}

static inline bool exists(struct service *s, const char *name) {
  struct session_entry entry;
  const oscar_status status = service_session_find(s, name, &entry, &error);
  assert_true(status == OSCAR_OK || status == OSCAR_INVALID_ARGUMENT);
  free(entry.text);
  return status == OSCAR_OK;
}

#define assert_done(call)                                                                                                        \
  do {                                                                                                                           \
    if ((call) != OSCAR_OK) fail_msg("%s: %s", #call, error.text);                                                               \
  } while (0)

#endif
