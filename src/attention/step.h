/*
 * attention/step.h - attention in a step of one token of each of some sequences, where the cache is on a GPU. Private.
 *
 * What changes from step to step (tiles, lists of pages, how much work that is) is uploaded by attention_make_ready, before
 * anything of the step is enqueued; then attention_step enqueues kernels alone, the same ones for every step of as many
 * sequences with the same number `kernels`, so that they can be recorded and replayed.
 */
#ifndef OSCAR_ATTENTION_STEP_H
#define OSCAR_ATTENTION_STEP_H

#include "attention/cuda/decode.h"

#include <oscar/attention.h>

/* The most windows of a step's layers (0, none, counts as one). */
#define STEP_WINDOWS 2
#define STEP_KERNELS (1 << STEP_WINDOWS)

/* sequences [count] have a step of one token open; all layers count as written. windows: those that attention_step will be called
 * with. *kernels: which ones it will take, below STEP_KERNELS. Errors: INVALID_ARGUMENT, NO_MEMORY. */
oscar_status attention_make_ready(oscar_attention *attention, const int *windows, int n_windows, oscar_sequence *const *sequences,
                                  int count, int *kernels);
/* Enters the rows (decode_enter; `rotated` is the callee's) and gives their attention: out [count][query_heads][head_dim]. */
oscar_status attention_step(oscar_attention *attention, int layer, int window, const struct decode_rows *rows, float *out);

#endif
