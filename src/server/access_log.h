/*
 * server/access_log.h - a line for each request: who asked for what, when, and what it took. What was said is never part of it.
 * Private to the room.
 */
#ifndef OSCAR_SERVER_ACCESS_LOG_H
#define OSCAR_SERVER_ACCESS_LOG_H

#include "server/state.h"

struct access_log;
/* As the options say; *log is NULL where there is to be none. Errors: IO (the file, with a sentence), NO_MEMORY. */
oscar_status access_log_open(const struct server_options *options, struct access_log **log, char *error, size_t error_bytes);
/* The line of an exchange that is over. Never waits for the file. `log` may be NULL here and below. */
void access_log_note(struct access_log *log, const struct exchange *exchange);
/* Lines from here on go to the file that has the name now. */
void access_log_reopen(struct access_log *log);
void access_log_close(struct access_log *log); /* after what was noted is written */

#endif
