/*
 * eval/eval.h - what a quantized cache costs: perplexity and KL divergence against the BF16 cache, side by side over the same
 * tokens. Private.
 */
#ifndef OSCAR_EVAL_H
#define OSCAR_EVAL_H

#include "engine/engine.h"

struct eval_options {
  int context;    /* tokens per independent window */
  int64_t tokens; /* total; 0: as many whole windows as the text has */
  int sink_pages, recent_pages;
  int chunk;    /* tokens per forward pass, default 256 */
  bool add_bos; /* as the model does */
};
struct eval_run {
  const char *kv;
  double ppl, ppl_ratio;                     /* over all scored positions; ratio to BF16 */
  double kld_mean, kld_se, kld_p99, kld_max; /* nats, KL(BF16 || run), over counted positions */
  double top1;                               /* share of counted positions with the same most likely token */
  double bits_per_element;                   /* everything counted, at the end of a window */
  size_t cache_bytes;
};
struct eval_result {
  int context;
  int64_t tokens;  /* fed */
  int64_t scored;  /* positions with a next token */
  int64_t counted; /* of these, positions that see coded history (page > sink_pages + recent_pages, by the reading rule) */
  int runs;
  struct eval_run *run; /* [runs], run[0] is bf16 */
};
/* kv[i] with its codec set (NULL for bf16). BF16 is always run, first. Result arrays are freed with eval_result_free. */
oscar_status eval_perplexity(struct model *model, const struct eval_options *options, const int32_t *ids, int64_t n_ids,
                             int count, const char *const *kv, oscar_codec_set *const *sets, const struct progress *progress,
                             struct eval_result *result);
void eval_result_free(oscar_context *context, struct eval_result *result);

#endif
