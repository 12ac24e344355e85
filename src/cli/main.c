/* main.c - the program: finds the command, runs it, and makes sure that what it printed has arrived. */
#include "cli/cli.h"

#include "base/base.h"
#include "engine/openmp.h"

#include <errno.h>
#include <string.h>
#ifdef __linux__
#include <sys/prctl.h>
#endif

static const struct command commands[] = {
    {"run", "continue a text", command_run},
    {"chat", "talk with a model", command_chat},
    {"serve", "a model over HTTP, for many at once", command_serve},
    {"session", "keep what a model has read or said, and go on later", command_session},
    {"calibrate", "fit the codecs of a model and keep them in a file", command_calibrate},
    {"import", "make a codec file of published rotation files", command_import},
    {"eval", "what each form of the cache costs in quality and saves in memory", command_eval},
    {"bench", "prompt and decode speed, beside the memory's", command_bench},
    {"info", "what a model or a rotation file is, and what its cache will need", command_info},
    {"fetch", "get a model into the cache folder", command_fetch},
};

static const char *command_name(const void *list, int i) {
  (void)list;
  return (size_t)i < ARRAY_LENGTH(commands) ? commands[i].name : NULL;
}

static void print_help(FILE *out) {
  fprintf(out, "Usage: oscar COMMAND [options]\n\nLLM inference with a 2-bit KV cache.\n\nCommands\n");
  for (size_t i = 0; i < ARRAY_LENGTH(commands); i++) fprintf(out, "  %-11s %s\n", commands[i].name, commands[i].summary);
  fprintf(out, "\n'oscar COMMAND --help' shows the options of a command, with examples; 'oscar --version' the version.\n");
}

static const struct command *find_command(const char *name) {
  for (size_t i = 0; i < ARRAY_LENGTH(commands); i++)
    if (strcmp(commands[i].name, name) == 0) return &commands[i];
  return NULL;
}

static int unknown_command(const char *name) {
  const char *near = nearest_name(name, command_name, NULL);
  if (near) return wrong_use("there is no command '%s'; did you mean '%s'?", name, near);
  return wrong_use("there is no command '%s' ('oscar --help' lists them)", name);
}

static int help_on(const char *name) {
  const struct command *command = find_command(name);
  if (!command) return unknown_command(name);
  char text[64], option[] = "--help";
  snprintf(text, sizeof text, "%s", name);
  char *argv[] = {text, option, NULL};
  return command->run(2, argv);
}

static int dispatch(int argc, char **argv) {
  if (argc < 2) {
    print_help(stderr);
    return EXIT_WRONG_USE;
  }
  const char *first = argv[1];
  if (strcmp(first, "--version") == 0 || strcmp(first, "version") == 0) {
    printf("oscar %s\n", oscar_version());
    return EXIT_DONE;
  }
  if (strcmp(first, "--help") == 0 || strcmp(first, "-h") == 0 || strcmp(first, "help") == 0) {
    if (argc > 2) return help_on(argv[2]);
    print_help(stdout);
    return EXIT_DONE;
  }
  if (*first == '-') return wrong_use("'%s' must come after a command ('oscar --help' lists them)", first);
  const struct command *command = find_command(first);
  return command ? command->run(argc - 1, argv + 1) : unknown_command(first);
}

int main(int argc, char **argv) {
  openmp_limit_spinning(argv);
#ifdef __linux__
  prctl(PR_SET_NAME, "oscar"); /* of the second start, which was "exe" */
#endif
  int code = dispatch(argc, argv);
  errno = 0;
  bool arrived = fflush(stdout) == 0 && !ferror(stdout);
  if (!arrived && code == EXIT_DONE) code = failed("the output cannot be written: %s", strerror(errno));
  return code;
}
