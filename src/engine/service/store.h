/* engine/service/store.h - sessions as sessions.c and tiers.c keep them. Private to these. */
#ifndef OSCAR_SERVICE_STORE_H
#define OSCAR_SERVICE_STORE_H

#include "engine/service/sessions.h"

#include <limits.h>

/* On the device (sequence), in host memory (kept) or in its file alone; its file may be there besides. */
struct session {
  struct session *next;
  char name[72];
  char *text;        /* or NULL */
  int32_t *ids;      /* [n]; NULL: the file has them */
  int64_t n, tokens; /* tokens: that there are pages for */
  oscar_sequence *sequence;
  struct kept_pages kept;
  size_t file_bytes;       /* 0: no file */
  bool on_disk;            /* the file is as new as the session */
  bool failed;             /* to be written: not tried again until it changes */
  bool over_limit;         /* its file went for want of room: not written again until it is used */
  bool busy;               /* with being moved: it does not make room for itself */
  struct request *request; /* that has it */
  int64_t created_at, used_at;
  uint64_t used; /* counts up with each use */
};

struct session_store {
  struct session *first;
  uint64_t clock;
  size_t host_bytes, disk_bytes;
};

/* ---- sessions.c ---- */
void session_remove(struct service *s, struct session *session); /* with all that it has but its file */

/* ---- tiers.c ---- */
oscar_status session_file_path(const struct service *s, const char *name, char *path); /* [PATH_MAX] */
/* Into its file. Over the limit of files the oldest go, and this one may be among them, with its session. */
oscar_status session_write(struct service *s, struct session *session);
void session_delete_file(struct service *s, struct session *session);
void session_drop_kept(struct service *s, struct session *session);
oscar_status session_get_ids(struct service *s, struct session *session);
/* Onto the device, if it has pages anywhere. */
oscar_status session_bring(struct service *s, struct session *session);

#endif
