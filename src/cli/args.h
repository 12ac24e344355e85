/*
 * cli/args.h - options as tables: parsing, checking and the help text come from the same lines. Private.
 *
 * A table says for every option where its value goes (an offset into a struct), so that a group of options can fill a struct of
 * the engine directly and be shared by commands. The default that the help shows is what the struct holds before parsing.
 */
#ifndef OSCAR_CLI_ARGS_H
#define OSCAR_CLI_ARGS_H

#include "base/base.h"
#include "cli/cli.h"
#include <stddef.h>

enum option_type {
  OPTION_FLAG,   /* bool; given: true */
  OPTION_INT,    /* int */
  OPTION_INT64,  /* int64_t */
  OPTION_UINT64, /* uint64_t, any value; `min`, `max` and `multiple` do not apply */
  OPTION_SIZE,   /* size_t, bytes: 1000, 640K, 512M, 1.5G, 2T (powers of 1024) */
  OPTION_FLOAT,  /* float */
  OPTION_TEXT,   /* const char *, borrowed from argv */
  OPTION_CPUS    /* struct cpu_list: 0-3,6; different ones that this process may run on */
};

struct option_spec {
  const char *name; /* "kv-memory" */
  char letter;      /* 'c'; 0: only the long form */
  enum option_type type;
  size_t offset;                /* of the value in the group's target */
  const char *value;            /* what the help calls the argument; NULL for flags */
  const char *help;             /* no full stop, lower case */
  double min, max;              /* of numbers, inclusive; both 0: any */
  int multiple;                 /* integers must be a multiple of it; 0: any */
  const char *(*choice)(int i); /* TEXT: the allowed words until NULL; NULL: any text */
  const char *default_text;     /* help, where the struct's value does not say it; "": show none */
};

struct option_group {
  const char *title;
  const struct option_spec *options;
  int count;
  void *target;
};

struct usage {
  const char *command;            /* "info" */
  const char *operands;           /* "MODEL|FILE", "" if none */
  int min_operands, max_operands; /* checked */
  const char *about;              /* one or more sentences */
  const char *examples;           /* lines, without indentation, each ended with \n */
};

/* Reads argv. true: go on, *first is the index of the first operand (options are moved before operands). false: the command
 * returns *code: EXIT_DONE after --help, EXIT_WRONG_USE after a message. */
bool args_parse(const struct usage *usage, const struct option_group *groups, int n_groups, int argc, char **argv, int *first,
                int *code);
void args_help(const struct usage *usage, const struct option_group *groups, int n_groups, FILE *out);

/* ---- parsing of single values, also for files and prompts; false: not such a number or out of its type's range ---- */
bool parse_int64(const char *text, int64_t *value);
bool parse_size(const char *text, size_t *value);
bool parse_double(const char *text, double *value); /* finite */

#endif
