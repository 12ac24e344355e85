/* cli/process.h - running another program without a shell, with its output in a file. Private. */
#ifndef OSCAR_PROCESS_H
#define OSCAR_PROCESS_H

#include "base/base.h"

/*
 * Runs argv (looked up in PATH, NULL-terminated) and waits for its end. Input is empty; output and errors go to the file
 * `log_path`. `setting` ("NAME=value") replaces that variable in the program's environment; it may be NULL.
 * `tick` is called about 20 times a second; when it returns false the program is ended (SIGTERM, after two seconds SIGKILL).
 * The program stays in the caller's process group, so that Ctrl-C in a terminal reaches both.
 * *exit_code: as a shell gives it, 128 + n for signal n, PROCESS_NOT_FOUND if there is no such program.
 * Errors: CANCELLED (tick said so, also right after the end), IO (cannot be started), NO_MEMORY.
 */
enum { PROCESS_NOT_FOUND = 127 };
oscar_status process_run(oscar_context *context, const char *const *argv, const char *setting, const char *log_path,
                         bool (*tick)(void *user), void *user, int *exit_code);

#endif
