/*
 * base/team.h - the threads of a context, for the short parallel stretches of a forward pass. Private.
 *
 * A decode step is a few hundred stretches of some microseconds each. Threads that sleep between them spend more time waking up
 * than working; threads that never sleep ruin a machine they share. So a waiting thread spins first, for as long as its patience
 * allows, and sleeps then; patience halves after a wait that was too long for any spinning, and doubles after a short one that
 * had to sleep. On a quiet machine decoding spins through, and where other programs have taken a CPU away, or work comes rarely,
 * nearly all waits sleep.
 *
 * The team belongs to the context, which one thread at a time uses: that thread is member 0 of every run. The others are made at
 * the first run that has use for them; if they cannot be, runs have fewer members. Long loops (calibration, evaluation) and
 * oneDNN use OpenMP, whose waits need no such care there.
 *
 * A team may have a CPU for each member. Its own threads stay on theirs for good. The caller cannot: OpenMP makes threads when it
 * likes, and each gets the CPUs of the one that makes it, so that all of them would share the caller's. Therefore the caller
 * moves: to its CPU when a run begins, and among all CPUs of the team when OpenMP is about to work.
 */
#ifndef OSCAR_TEAM_H
#define OSCAR_TEAM_H

#include "base/base.h"

/* What every member of a run does. It must not start another run of the same context. */
typedef void team_work(void *arg, int member, int members);

/* Runs `work` on min(most, the context's threads) members, and returns when all have finished. */
void team_run(oscar_context *context, int most, team_work *work, void *arg);

/* Inside a run: returns when all members have arrived. What they wrote before is seen by all. */
void team_barrier(oscar_context *context, int member);

/* Inside a run: the next piece of work, counted from 0. Starts at 0 and is shared by the members. */
typedef struct {
  _Alignas(64) _Atomic int64_t next;
} team_counter;
int64_t team_take(team_counter *counter);

/* Calls body(arg, first, last) on equal stretches of 0 .. n - 1, one for each of min(most, threads, n) members. */
typedef void team_body(void *arg, int64_t first, int64_t last);
void team_split(oscar_context *context, int most, int64_t n, team_body *body, void *arg);

/* Outside of runs, before each parallel region of OpenMP or call of a library that has some: the caller may run on all CPUs of
 * the team, so that the threads that OpenMP makes may too. Nothing happens where the team has no CPUs. */
void team_before_openmp(oscar_context *context);

/* For the context: a team in memory of team_bytes, 64-byte aligned; it has no threads yet. `cpus` has one for each thread, or is
 * NULL, and is not kept. Stopped, it has no threads any more, and a caller that it has moved is where it was. */
size_t team_bytes(int threads);
struct team *team_make(int threads, const int *cpus, void *memory);
void team_stop(struct team *team);

#endif
