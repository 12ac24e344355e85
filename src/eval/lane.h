/*
 * eval/lane.h - one cache of an evaluation: what it takes to run tokens through the model with the history in one form. Private.
 *
 * Every measure compares forms of the cache by running tokens through several lanes of one model.
 */
#ifndef OSCAR_LANE_H
#define OSCAR_LANE_H

#include "engine/engine.h"
#include "eval/baselines.h"

struct lane_options {
  int64_t tokens; /* of a sequence, at most */
  int sequences;  /* at once, at most; memory that is not used is not touched */
  int sink_pages, recent_pages;
  int chunk; /* tokens per forward pass, at most */
};

/* The first position whose query reads a page as codes: earlier ones say nothing about a quantized cache. */
int64_t lane_first_coded(int sink_pages, int recent_pages);

struct lane {
  const char *kv; /* borrowed */
  oscar_context *context;
  int chunk;
  struct baseline *baseline; /* of a type for evaluation only; else NULL */
  oscar_cache *cache;
  struct runner *runner;
  oscar_sequence *sequence; /* the one at work: whoever makes it frees it, or lane_close does */
};

/* The caches of an evaluation: BF16 first and once, then the others of kv [count] with their codecs; both lists have room for
 * count + 1. Returns how many there are. */
int lane_order(int count, const char *const *kv, oscar_codec_set *const *sets, const char **ordered_kv,
               const oscar_codec_set **ordered_sets);

/* `codecs` (borrowed) are those of the KV type, NULL where it has none. On failure the lane can still be closed.
 * Errors: those of oscar_cache_create and runner_create. */
oscar_status lane_open(struct model *model, const struct lane_options *options, const char *kv, const oscar_codec_set *codecs,
                       struct lane *lane);
void lane_close(struct lane *lane);

/* One forward pass over n tokens, 1 to the lane's chunk; logits [outputs][vocab]. Errors: those of runner_forward, with the
 * lane's name in front. */
oscar_status lane_forward(struct lane *lane, oscar_sequence *sequence, const int32_t *ids, int n, int outputs, float *logits);

/* Work that is counted in tokens over many sequences. */
struct lane_progress {
  const struct progress *progress; /* NULL: nobody is told */
  const char *what;
  int64_t done, total;
};
/* Counts `tokens` as done and reports. Errors: CANCELLED. */
oscar_status lane_progress_add(oscar_context *context, struct lane_progress *progress, int64_t tokens);

/* Appends n tokens in chunks and counts them (`progress` NULL: does not); logits [vocab] after the last one, NULL: none. Errors:
 * those of lane_forward; CANCELLED, with the chunks that were done appended. */
oscar_status lane_feed(struct lane *lane, oscar_sequence *sequence, const int32_t *ids, int n, float *logits,
                       struct lane_progress *progress);

#endif
