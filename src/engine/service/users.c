/*
 * users.c - whose turn it is: of the users who wait, the one who has had the fewest tokens lately; of one user's
 * requests, the oldest. A token counts half after HALF_LIFE, so that yesterday's work is no reason to wait.
 */
#include "engine/service/service_private.h"
#include "engine/service/sessions.h"

#include <math.h>
#include <string.h>

#define HALF_LIFE_NS 60e9

static void decay(struct user *user, int64_t now) {
  user->served *= exp2(-(double)(now - user->served_ns) / HALF_LIFE_NS);
  user->served_ns = now;
}

void user_serve(struct user *user, int64_t tokens) {
  decay(user, time_ns());
  user->served += (double)tokens;
}

/* Nobody who waits knows these, and they would not wait longer than a new one. */
static void forget_idle(struct service *s) {
  const int64_t now = time_ns();
  for (struct user **at = &s->users; *at;) {
    struct user *user = *at;
    decay(user, now);
    if (user->requests > 0 || user->served >= 1) {
      at = &user->next;
      continue;
    }
    *at = user->next;
    mem_free(s->context, user);
  }
}

oscar_status user_find(struct service *s, const char *name, struct user **user) {
  if (!name) name = "";
  forget_idle(s);
  for (struct user *u = s->users; u; u = u->next)
    if (strcmp(u->name, name) == 0) {
      u->requests++;
      *user = u;
      return OSCAR_OK;
    }
  const size_t bytes = strlen(name) + 1;
  struct user *u = mem_zalloc(s->context, 1, sizeof *u + bytes);
  if (!u) return OSCAR_NO_MEMORY;
  memcpy(u->name, name, bytes);
  u->served_ns = time_ns();
  u->requests = 1;
  u->next = s->users;
  s->users = u;
  *user = u;
  return OSCAR_OK;
}

void user_release(struct user *user) { user->requests--; }

/* Those that wait are in the order in which they came. */
struct request **users_next(struct service *s, bool (*may_begin)(const struct service *s, struct request *r)) {
  struct request **best = NULL;
  const int64_t now = time_ns();
  for (struct user *u = s->users; u; u = u->next) decay(u, now);
  for (struct request **at = &s->waiting; *at; at = &(*at)->next)
    if (!session_is_busy(s, *at) && (!best || (*at)->user->served < (*best)->user->served) && may_begin(s, *at)) best = at;
  return best;
}

void users_free(struct service *s) {
  while (s->users) {
    struct user *next = s->users->next;
    mem_free(s->context, s->users);
    s->users = next;
  }
}
