/*
 * interrupt.c - Ctrl-C, and SIGHUP of a server. The marks are the only variables of the program that are not reached through an
 * argument: a signal handler has no other way to speak.
 */
#include "cli/cli.h"

#include <signal.h>
#include <unistd.h>

static volatile sig_atomic_t requested, held, again, hangup;

static void on_signal(int number) {
  (void)number;
  if (requested && !held) _exit(EXIT_INTERRUPTED);
  if (requested) again = 1;
  requested = 1;
}

void interrupt_watch(void) {
  /* SA_RESTART: reading a line at a prompt goes on; waiting loops look at the mark. */
  struct sigaction action = {.sa_handler = on_signal, .sa_flags = SA_RESTART};
  sigemptyset(&action.sa_mask);
  sigaction(SIGINT, &action, NULL);
  sigaction(SIGTERM, &action, NULL);
}

static void on_hangup(int number) {
  (void)number;
  hangup = 1;
}

void hangup_watch(void) {
  struct sigaction action = {.sa_handler = on_hangup, .sa_flags = SA_RESTART};
  sigemptyset(&action.sa_mask);
  sigaction(SIGHUP, &action, NULL);
}

bool hangup_taken(void) {
  const bool taken = hangup != 0;
  if (taken) hangup = 0;
  return taken;
}

bool interrupt_requested(void) { return requested != 0; }
void interrupt_clear(void) { requested = 0; }

void interrupt_hold(void) { held = 1; }
void interrupt_release(void) {
  held = 0;
  if (again) _exit(EXIT_INTERRUPTED);
}
