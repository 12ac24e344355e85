/* engine/service/store.h - sessions as sessions.c, session_commands.c, tiers.c and writer.c keep them. Private to these. */
#ifndef OSCAR_SERVICE_STORE_H
#define OSCAR_SERVICE_STORE_H

#include "engine/service/sessions.h"

#include <limits.h>

/* On the device (sequence), in host memory (kept) or in its file alone; its file may be there besides. */
struct session {
  struct session *next;
  char name[SESSION_NAME_ROOM];
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
  bool writing;            /* the writer has a copy of it */
  struct request *request; /* that has it */
  int64_t created_at, used_at;
  int64_t changed_ns; /* time_ns of the last change that its file does not have */
  uint64_t used;      /* counts up with each use */
  uint64_t version;   /* and this with each change that its file does not have */
};

struct session_store {
  struct session *first;
  uint64_t clock;
  size_t host_bytes, disk_bytes;
  size_t written_bytes;  /* of host memory, copies that are being written */
  struct writer *writer; /* NULL: there is no folder */
};

/* ---- sessions.c ---- */
struct session *session_add(struct service *s, const char *name); /* NULL: NO_MEMORY */
void session_remove(struct service *s, struct session *session);  /* with all that it has but its file */
void session_touch(struct service *s, struct session *session);   /* it is used */
oscar_status session_set_text(struct service *s, struct session *session, const char *text);
/* A session by name, one that another program has put into the folder since included; NULL: there is none. What is there and
 * cannot be used is an error: it must not be overwritten. */
oscar_status session_look_for(struct service *s, const char *name, struct session **session);
enum session_tier session_tier_of(const struct session *session);

/* ---- tiers.c ---- */
oscar_status session_file_path(const struct service *s, const char *name, char *path); /* [PATH_MAX] */
/* What its file holds beside the pages; borrowed from it. */
oscar_snapshot_contents session_contents(const struct service *s, const struct session *session);
/* Of a session that has tokens alone. */
oscar_status session_empty_sequence(struct service *s, oscar_sequence **sequence);
/* Into its file, on this thread. */
oscar_status session_write(struct service *s, struct session *session);
/* Bytes of a file that has just been written, which is opened to see that it can be. */
oscar_status session_file_look(oscar_context *context, const char *path, size_t *bytes);
/* What came of writing it as it was at `version`; the error is the context's. Over the limit of files the oldest go, and this one
 * may be among them, with its session. */
oscar_status session_written(struct service *s, struct session *session, uint64_t version, oscar_status status, size_t bytes);
void session_tell_failure(const struct service *s, const struct session *session);
/* Whether host memory has room for a copy of so many bytes, after sessions have gone from it whose files are there. */
bool sessions_copy_room(struct service *s, size_t bytes);
void session_delete_file(struct service *s, struct session *session);
void session_drop_kept(struct service *s, struct session *session);
oscar_status session_get_ids(struct service *s, struct session *session);
/* Onto the device, if it has pages anywhere. */
oscar_status session_bring(struct service *s, struct session *session);

/* ---- writer.c ---- */
oscar_status writer_create(struct service *s);
void writer_free(struct service *s); /* waits */
/* While it is not busy: the session as it is now goes into its file by another thread. `asked` is answered then, unless this is
 * an error. NO_SPACE, NO_MEMORY: there is no room for a copy. */
oscar_status writer_begin(struct service *s, struct session *session, struct command *asked);

#endif
