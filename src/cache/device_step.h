/*
 * cache/device_step.h - a step of sequences whose rows kernels of other rooms write, where the cache is on a GPU. Private.
 *
 * sequences_make_ready comes after begin and before anything of the step is enqueued: it uploads where rows go, to the same place
 * for steps of as many tokens unless memory had to grow, and demotes what the step demotes, in all layers. Then the rows are
 * written by who knows the places, and sequences_note_written says so before commit.
 */
#ifndef OSCAR_CACHE_DEVICE_STEP_H
#define OSCAR_CACHE_DEVICE_STEP_H

#include "cache/cuda/write.h"

#include <oscar/cache.h>

/* On the device. */
struct device_step {
  const struct write_place *places; /* [tokens of all sequences] */
  unsigned long long *bad;          /* what commit looks at (write_rows) */
};

/* Open steps of different sequences of one cache, that demote only pages which were complete before them: as steps of one token
 * do. Errors: INVALID_ARGUMENT, NO_MEMORY. */
oscar_status sequences_make_ready(oscar_sequence *const *sequences, int count, struct device_step *step);
void sequences_note_written(oscar_sequence *const *sequences, int count);

#endif
