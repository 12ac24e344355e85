/* process.c - posix_spawn and a polling wait; polling, because the caller watches files grow and has a user who may cancel. */
#include "cli/process.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <spawn.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static void sleep_ms(long ms) {
  struct timespec t = {ms / 1000, ms % 1000 * 1000000};
  nanosleep(&t, NULL);
}

static bool has_ended(pid_t child, int *wait_status) {
  pid_t ended = waitpid(child, wait_status, WNOHANG);
  return ended == child || (ended < 0 && errno != EINTR);
}

static void end(pid_t child) {
  int wait_status;
  kill(child, SIGTERM);
  for (int i = 0; i < 40; i++) {
    if (has_ended(child, &wait_status)) return;
    sleep_ms(50);
  }
  kill(child, SIGKILL);
  while (waitpid(child, &wait_status, 0) < 0 && errno == EINTR) continue;
}

/* The environment with one variable replaced; the strings are not copied. */
static char **make_environment(oscar_context *context, const char *setting) {
  size_t count = 0, kept = 0;
  while (environ[count]) count++;
  char **list = mem_alloc(context, count + 2, sizeof *list);
  if (!list) return NULL;
  size_t name_bytes = setting ? (size_t)(strchr(setting, '=') - setting) + 1 : 0;
  for (size_t i = 0; i < count; i++)
    if (!setting || strncmp(environ[i], setting, name_bytes) != 0) list[kept++] = environ[i];
  if (setting) list[kept++] = (char *)(uintptr_t)setting;
  list[kept] = NULL;
  return list;
}

static int start(const char *const *argv, char **environment, const char *log_path, pid_t *child) {
  posix_spawn_file_actions_t actions;
  int error = posix_spawn_file_actions_init(&actions);
  if (error) return error;
  error = posix_spawn_file_actions_addopen(&actions, STDIN_FILENO, "/dev/null", O_RDONLY, 0);
  if (!error)
    error = posix_spawn_file_actions_addopen(&actions, STDOUT_FILENO, log_path, O_WRONLY | O_CREAT | O_TRUNC | O_APPEND, 0666);
  if (!error) error = posix_spawn_file_actions_adddup2(&actions, STDOUT_FILENO, STDERR_FILENO);
  if (!error) error = posix_spawnp(child, argv[0], &actions, NULL, (char *const *)(uintptr_t)argv, environment);
  posix_spawn_file_actions_destroy(&actions);
  return error;
}

oscar_status process_run(oscar_context *context, const char *const *argv, const char *setting, const char *log_path,
                         bool (*tick)(void *user), void *user, int *exit_code) {
  char **environment = make_environment(context, setting);
  if (!environment) return OSCAR_NO_MEMORY;
  pid_t child;
  int error = start(argv, environment, log_path, &child), wait_status = 0;
  mem_free(context, environment);
  if (error == ENOENT) {
    *exit_code = PROCESS_NOT_FOUND;
    return OSCAR_OK;
  }
  if (error) return set_error(context, OSCAR_IO, "%s: cannot be started: %s", argv[0], strerror(error));
  bool ended = false, wanted = true;
  while (wanted && !ended) {
    ended = has_ended(child, &wait_status);
    wanted = tick(user); /* once more after the end: a Ctrl-C may have ended the program before it was seen here */
    if (wanted && !ended) sleep_ms(50);
  }
  if (!ended) end(child);
  if (!wanted) return set_error(context, OSCAR_CANCELLED, "%s: cancelled", argv[0]);
  *exit_code = WIFSIGNALED(wait_status) ? 128 + WTERMSIG(wait_status) : WEXITSTATUS(wait_status);
  return OSCAR_OK;
}
