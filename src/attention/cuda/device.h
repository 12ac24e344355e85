/*
 * attention/cuda/device.h - attention over a cache in the memory of a GPU, behind oscar/attention.h. Private.
 */
#ifndef OSCAR_ATTENTION_CUDA_DEVICE_H
#define OSCAR_ATTENTION_CUDA_DEVICE_H

#include "attention/step.h"
#include "cache/view.h"
#include "cuda/device.h"

#include <oscar/attention.h>

struct device_attention;

/* scale > 0. Errors: UNSUPPORTED (no kernel for a form, named), NO_MEMORY. */
oscar_status device_attention_create(oscar_cache *cache, int query_heads, float scale, struct device_attention **attention);
void device_attention_free(struct device_attention *attention);
/* The jobs have been checked; their q, and out, follow each other in memory. */
oscar_status device_attention_run(struct device_attention *attention, int layer, int window, const oscar_attention_job *jobs,
                                  int n_jobs);
/* As attention_make_ready and attention_step. */
oscar_status device_attention_make_ready(struct device_attention *attention, const int *windows, int n_windows,
                                         oscar_sequence *const *sequences, int count, int *kernels);
oscar_status device_attention_step(struct device_attention *attention, int layer, int window, const struct decode_rows *rows,
                                   float *out);

/* Which kernels read for jobs from here on: for tests and benchmarks. ATTENTION_DECODE: tiles of 8
 * rows; ATTENTION_DECODE_WIDE, ATTENTION_PREFILL: those of 16 rows and those for prompts wherever there are such. */
enum attention_way { ATTENTION_BY_COST, ATTENTION_DECODE, ATTENTION_DECODE_WIDE, ATTENTION_PREFILL };
void device_attention_choose(struct device_attention *attention, enum attention_way way);
/* The same of an attention object over a cache on a GPU. */
void attention_choose(oscar_attention *attention, enum attention_way way);

#endif
