/*
 * oscar/attention.h - attention of queries over a cache, directly on codes.
 *
 *   out = softmax(scale q K' over the positions the reading rule shows) V
 *
 * Exact and coded keys share one softmax. Scale, zero and gain are applied outside the dot products; nothing of the history is
 * expanded in memory beyond one page per thread. See cache.h for the reading rule.
 */
#ifndef OSCAR_ATTENTION_H
#define OSCAR_ATTENTION_H

#include <oscar/cache.h>
#include <oscar/oscar.h>

#ifdef __cplusplus
extern "C" {
#endif

/* CPUs have kernels for few queries and for many, which round differently. By number is the fastest for those of one job: up to
 * 16 are few. Whoever wants results that do not depend on how queries were put together says which. What else is in the call, and
 * how many threads there are, never counts. A GPU chooses by number always. */
typedef enum oscar_attention_rounding {
  OSCAR_ATTENTION_BY_NUMBER,
  OSCAR_ATTENTION_AS_FEW,
  OSCAR_ATTENTION_AS_MANY
} oscar_attention_rounding;

/* Queries of one sequence: the last n positions written (with an open step: positions length+step-n .. length+step-1, else
 * length-n .. length-1). For a cache on a GPU q and out are in its memory, and those of a call's jobs follow each other. */
typedef struct oscar_attention_job {
  const oscar_sequence *sequence;
  int n;          /* >= 1 */
  const float *q; /* [n][query_heads][head_dim], after RoPE */
  float *out;     /* [n][query_heads][head_dim] */
  oscar_attention_rounding rounding;
} oscar_attention_job;

typedef struct oscar_attention_options {
  int query_heads; /* a multiple of kv_heads, at most 16 per KV head */
  float scale;     /* of the scores; 0: 1/sqrt(head_dim) */
} oscar_attention_options;

/* Holds the scratch memory of attention calls on one cache; grows to what the largest call needs. */
typedef struct oscar_attention oscar_attention;

/* Errors: INVALID_ARGUMENT, NO_MEMORY. */
OSCAR_API oscar_status oscar_attention_create(oscar_cache *cache, const oscar_attention_options *options,
                                              oscar_attention **attention);
OSCAR_API void oscar_attention_free(oscar_attention *attention);

/* window > 0: a query at t sees positions > t - window only; 0: all. Errors: INVALID_ARGUMENT (job outside the sequence, layer
 * not written yet), NO_MEMORY. */
OSCAR_API oscar_status oscar_attention_run(oscar_attention *attention, int layer, int window, const oscar_attention_job *jobs,
                                           int n_jobs);

#ifdef __cplusplus
}
#endif
#endif
