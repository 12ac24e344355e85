/* lane.c - see lane.h. */
#include "eval/lane.h"

#include <string.h>

int lane_order(int count, const char *const *kv, oscar_codec_set *const *sets, const char **ordered_kv,
               const oscar_codec_set **ordered_sets) {
  int ordered = 1;
  ordered_kv[0] = "bf16";
  ordered_sets[0] = NULL;
  for (int i = 0; i < count; i++) {
    if (strcmp(kv[i], "bf16") == 0) continue;
    ordered_kv[ordered] = kv[i];
    ordered_sets[ordered++] = sets[i];
  }
  return ordered;
}

/* By the reading rule page `sink_pages` is the first that can be codes, for queries `recent_pages` + 1 pages later. */
int64_t lane_first_coded(int sink_pages, int recent_pages) {
  return ((int64_t)sink_pages + recent_pages + 1) * OSCAR_PAGE_TOKENS;
}

oscar_status lane_open(struct model *model, const struct lane_options *options, const char *kv, const oscar_codec_set *codecs,
                       struct lane *lane) {
  oscar_context *context = model_context(model);
  *lane = (struct lane){.kv = kv, .context = context, .chunk = options->chunk};
  oscar_cache_options cache;
  model_cache_options(model, &cache);
  cache.codecs = codecs;
  oscar_status status = baseline_create(context, kv, cache.head_dim, &lane->baseline);
  cache.filter = baseline_filter(lane->baseline);
  cache.sink_pages = options->sink_pages;
  cache.recent_pages = options->recent_pages;
  cache.budget_bytes = oscar_cache_bytes_for(&cache, options->tokens, options->sequences, options->chunk);
  if (status == OSCAR_OK) status = oscar_cache_create(context, &cache, &lane->cache);
  if (status == OSCAR_OK) status = runner_create(model, lane->cache, options->chunk, &lane->runner);
  return status;
}

void lane_close(struct lane *lane) {
  runner_free(lane->runner);
  oscar_cache_free(lane->cache); /* with its sequences */
  if (lane->baseline) baseline_free(lane->context, lane->baseline);
  *lane = (struct lane){0};
}

oscar_status lane_forward(struct lane *lane, oscar_sequence *sequence, const int32_t *ids, int n, int outputs, float *logits) {
  oscar_status status = runner_forward(lane->runner, sequence, n, ids, outputs, logits, NULL);
  return status == OSCAR_OK ? status : prefix_error(lane->context, status, "cache %s", lane->kv);
}

oscar_status lane_progress_add(oscar_context *context, struct lane_progress *progress, int64_t tokens) {
  progress->done += tokens;
  const struct progress *p = progress->progress;
  if (!p || p->report(p->user, progress->what, progress->done, progress->total)) return OSCAR_OK;
  return set_error(context, OSCAR_CANCELLED, "evaluation was stopped");
}

oscar_status lane_feed(struct lane *lane, oscar_sequence *sequence, const int32_t *ids, int n, float *logits,
                       struct lane_progress *progress) {
  oscar_status status = OSCAR_OK;
  for (int done = 0; done < n && status == OSCAR_OK;) {
    const int left = n - done, step = left < lane->chunk ? left : lane->chunk;
    const bool wanted = logits && step == left;
    status = lane_forward(lane, sequence, ids + done, step, wanted, logits);
    if (status == OSCAR_OK && progress) status = lane_progress_add(lane->context, progress, step);
    done += step;
  }
  return status;
}
