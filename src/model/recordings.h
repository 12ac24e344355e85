/*
 * model/recordings.h - recorded steps of a runner. Private; plain C, needs no GPU.
 *
 * A step of one token of each of n sequences, sampled or not, is the same kernels every time: the caller has a number for every
 * such kind of step, and a recording belongs to a kind. The first step of a kind runs directly: with it everything is loaded and
 * made that is made once. The second is recorded. A recording that does not hold any more, because memory has moved, is made
 * again. The least recently used one goes when there are too many.
 */
#ifndef OSCAR_RECORDINGS_H
#define OSCAR_RECORDINGS_H

#include "backend/backend.h"

#define KEPT_RECORDINGS 24

struct kept_recording {
  int kind;      /* 0: free */
  uint64_t used; /* when, counted in steps */
  struct backend_recording *recording;
};
struct recordings {
  struct kept_recording kept[KEPT_RECORDINGS];
  uint64_t steps;
};

enum step_way { STEP_DIRECT, STEP_RECORD, STEP_REPLAY };
/* How the next step of the kind (at least 1) is run, and the place of its recording: to be replayed, or to be put there. */
enum step_way recordings_choose(struct recordings *recordings, struct backend *backend, int kind, struct kept_recording **kept);
void recordings_free(struct recordings *recordings, struct backend *backend);

#endif
