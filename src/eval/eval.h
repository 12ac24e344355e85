/*
 * eval/eval.h - what a quantized cache costs: perplexity and KL divergence against the BF16 cache, side by side over the same
 * tokens. Private.
 *
 * The text is cut into independent windows of `context` tokens. Every cache reads the same chunks in turn, teacher-forced, so
 * each layer sees the error of the layers below, as in real use. Per position with logits a (BF16) and b (run), p = softmax(a), q
 * = softmax(b): KL = sum_i p_i (log p_i - log q_i)   in nats KL and top-1 count only positions that read coded history by the
 * reading rule; perplexity is over every scored position.
 */
#ifndef OSCAR_EVAL_H
#define OSCAR_EVAL_H

#include "engine/engine.h"

struct eval_options {
  int context;                  /* tokens per window */
  int64_t tokens;               /* at most so many; 0: as many whole windows as the text has */
  int first_scored;             /* positions before this one are read but not scored; default 0 */
  int sink_pages, recent_pages; /* of every quantized cache */
  int chunk;                    /* tokens per forward pass */
};
/* 4096 tokens, all of the text, windows of 1 and 4 pages, chunks of 256 */
void eval_options_default(struct eval_options *options);

struct eval_run {
  const char *kv;
  double ppl, ppl_ratio;                     /* over scored positions; ratio to BF16 */
  double kld_mean, kld_se, kld_p99, kld_max; /* nats, over counted positions; standard error of the mean */
  double top1;                               /* share of counted positions with the same most likely token */
  double bits_per_element;                   /* everything counted, at the end of a window; of a baseline what it says */
  size_t cache_bytes;                        /* the same, in bytes */
};
struct eval_result {
  int context;
  int64_t tokens;  /* fed, per cache */
  int64_t scored;  /* positions with a next token in their window */
  int64_t counted; /* positions that read coded history */
  int runs;
  struct eval_run *run; /* [runs], run[0] is bf16; freed with eval_result_free */
};

/* kv[i] with its codec set (borrowed; NULL for bf16 and types for evaluation only). BF16 is always run first; a "bf16" in the
 * list is skipped. Errors: INVALID_ARGUMENT (text shorter than a window; a context in which no position reads coded history),
 * NO_MEMORY, NUMERIC, CANCELLED. */
oscar_status eval_perplexity(struct model *model, const struct eval_options *options, const int32_t *ids, int64_t n_ids,
                             int count, const char *const *kv, oscar_codec_set *const *sets, const struct progress *progress,
                             struct eval_result *result);
void eval_result_free(oscar_context *context, struct eval_result *result);

#endif
