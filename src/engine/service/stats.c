/* stats.c - the numbers of a service: counted by its thread, copied under the lock for others to read. */
#include "engine/service/service_private.h"
#include "engine/service/sessions.h"

#include <math.h>

/* Steps of the square root of ten from a millisecond on: 1 ms, 3.2 ms, ... 3162 s, then the rest. */
static void histogram_init(struct histogram *h) {
  for (int i = 0; i < SERVICE_BUCKETS - 1; i++) h->upper[i] = 1e-3 * pow(10, 0.5 * i);
  h->upper[SERVICE_BUCKETS - 1] = INFINITY;
}

void stats_init(struct service_stats *stats) {
  histogram_init(&stats->queue);
  histogram_init(&stats->first_token);
  histogram_init(&stats->between_tokens);
  histogram_init(&stats->step);
}

void histogram_note(struct histogram *h, int64_t ns) {
  const double seconds = (double)ns * 1e-9;
  int i = 0;
  while (seconds > h->upper[i]) i++;
  h->count[i]++;
  h->sum += seconds;
}

void stats_publish(struct service *s) {
  struct service_stats *stats = &s->stats;
  stats->running = s->n_admitted;
  stats->prefilling = 0;
  for (int i = 0; i < s->n_admitted; i++) stats->prefilling += s->admitted[i]->state == ANSWER_FEEDS;
  oscar_cache_usage_get(s->engine->cache, &stats->cache);
  if (s->tree) oscar_prefix_stats_get(s->tree, &stats->prefix);
  stats->demoted_pages = stats->cache.demoted_pages;
  stats->evicted_leaves = stats->prefix.evicted_pages;
  stats->evicted_parked = stats->prefix.evicted_parked;
  sessions_count(s, stats);
  stats->host_bytes += s->kept_bytes;
  pthread_mutex_lock(&s->shared.lock);
  stats->waiting = s->shared.waiting;
  stats->refused = s->shared.stats.refused; /* counted by those who are */
  s->shared.stats = *stats;
  pthread_mutex_unlock(&s->shared.lock);
}

void service_stats_get(struct service *s, struct service_stats *stats) {
  pthread_mutex_lock(&s->shared.lock);
  *stats = s->shared.stats;
  pthread_mutex_unlock(&s->shared.lock);
}
