/*
 * cli/cli.h - what the commands of the program share: the command table's entry, exit codes, messages, small helpers. Private.
 *
 * A command is one file with one function `int command_NAME(int argc, char **argv)`; argv[0] is its name. It returns an exit code
 * and has printed at most one line `oscar: ...` on stderr when that is not EXIT_DONE. Results go to stdout, all else to stderr.
 */
#ifndef OSCAR_CLI_H
#define OSCAR_CLI_H

#include <oscar/oscar.h>
#include <stdio.h>

struct command {
  const char *name, *summary;
  int (*run)(int argc, char **argv);
};

int command_bench(int argc, char **argv);
int command_calibrate(int argc, char **argv);
int command_chat(int argc, char **argv);
int command_eval(int argc, char **argv);
int command_fetch(int argc, char **argv);
int command_import(int argc, char **argv);
int command_info(int argc, char **argv);
int command_run(int argc, char **argv);
int command_serve(int argc, char **argv);
int command_session(int argc, char **argv);

enum exit_code { EXIT_DONE = 0, EXIT_FAILED = 1, EXIT_WRONG_USE = 2, EXIT_INTERRUPTED = 130 };

/* ---- messages (message.c): one line "oscar: ..." on stderr; the exit code comes back, so that `return failed(...)` reads well
 * ---- */
int failed(const char *format, ...) OSCAR_PRINTF(1, 2);
int wrong_use(const char *format, ...) OSCAR_PRINTF(1, 2);
/* A status with its sentence (oscar_last_error or engine_open's text): CANCELLED is EXIT_INTERRUPTED, everything else
 * EXIT_FAILED. */
int failed_with(oscar_status status, const char *sentence);
/* One line on stderr without effect on the exit code: "oscar: note: ...". */
void note(const char *format, ...) OSCAR_PRINTF(1, 2);

/* "1.4 GiB", "640 KiB", "12 B"; the result is `text`. */
const char *format_bytes(double bytes, char *text, size_t room);
/* The candidate most like `word` (a few wrong, missing, doubled or swapped letters), or NULL if none is near. Candidates come
 * from item(list, i) for i = 0, 1, ... until it gives NULL. */
const char *nearest_name(const char *word, const char *(*item)(const void *list, int i), const void *list);
/* The name of a file without its folders, for texts that should not name this machine's. */
const char *last_part(const char *path);

/* ---- terminal (terminal.c) ---- */
bool terminal_is(FILE *stream);
int terminal_columns(FILE *stream); /* 80 when unknown */

/* ---- Ctrl-C (interrupt.c) ---- */
/* From here on the first SIGINT or SIGTERM only sets a mark, which progress reports and loops look at; a second one ends the
 * program at once with EXIT_INTERRUPTED. */
void interrupt_watch(void);
bool interrupt_requested(void);
/* Between these a second signal waits: a file that is being written is finished, and nothing of it left lying about. */
void interrupt_hold(void);
void interrupt_release(void);
/* From here on SIGHUP only sets a mark; hangup_taken tells of it once. */
void hangup_watch(void);
bool hangup_taken(void);
/* A conversation goes on after an interrupted answer. */
void interrupt_clear(void);

/* ---- text from outside (input.c) ---- */
/* A whole file, or standard input for "-"; malloc'ed, with a zero byte after the end. false: the message has been printed. */
bool read_text(const char *path, char **text, size_t *bytes);

#endif
