/*
 * engine/service/sessions.h - sequences with a name, and the tiers that they live in. Private to engine/service/.
 *
 * A session has a sequence, the tokens it stands for and a text of its owner's. It is on the device, in host memory or in a file,
 * and while a request of it runs the sequence is the request's. All of this is the service's thread's.
 */
#ifndef OSCAR_SERVICE_SESSIONS_H
#define OSCAR_SERVICE_SESSIONS_H

#include "engine/service/service_private.h"

oscar_status sessions_create(struct service *s);
void sessions_free(struct service *s);
/* Some of what can wait until nothing else is to be done; false: there was nothing. *due_ns: when there will be, from now on; 0:
 * not before something happens. */
bool sessions_tidy(struct service *s, int64_t *due_ns);
void sessions_save_all(struct service *s); /* at the end, on this thread */

/* ---- writer.c ---- */
bool writer_is_busy(const struct service *s);
bool writer_has_written(const struct service *s); /* under the lock */
void writer_take(struct service *s);              /* back what has been written, if anything has */
void writer_wait(struct service *s);              /* until it is not busy */
void sessions_count(const struct service *s, struct service_stats *stats);

/* ---- for requests ---- */
/* Another request has the session that this one names. */
bool session_is_busy(const struct service *s, const struct request *r);
/* Tokens of the prompt that its session has pages for, as far as that can be told now. */
int64_t session_knows(const struct service *s, const struct request *r);
/* The answer gets the sequence of the session that the request names, cut to what it has in common with the prompt; none where
 * the tree knows more, or there is no session. The session is the request's until session_end. Errors: NO_SPACE, NO_MEMORY. */
oscar_status session_begin(struct service *s, struct request *r, struct answer *a, int64_t *reused, int64_t *refilled);
/* The session takes the sequence of the finished answer, and its tokens; false: there is no session. */
bool session_keep(struct service *s, struct answer *a);
void session_end(struct service *s, struct request *r);

/* ---- for room ---- */
/* A session that nobody uses leaves the device. Its pages may be shared: how much that gives is seen by trying again. */
bool sessions_make_room(struct service *s);
size_t sessions_device_bytes(const struct service *s); /* of sessions that could leave */
/* Makes room for so many bytes in host memory; false: there is not so much. */
bool sessions_host_room(struct service *s, size_t bytes);

/* ---- tiers.c: pages in host memory ---- */
oscar_status pages_keep(struct service *s, const oscar_sequence *sequence, const int32_t *ids, int64_t n, const char *text,
                        struct kept_pages *kept);
oscar_status pages_restore(struct service *s, const struct kept_pages *kept, oscar_sequence **sequence);

#endif
