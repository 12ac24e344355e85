/*
 * metrics.c - numbers: /metrics for Prometheus (text format 0.0.4, prometheus.io/docs/instrumenting/exposition_formats),
 * /v1/cache for pages, /health.
 */
#include "server/state.h"

#include "engine/json_text.h"

#include <math.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

/* ---- counting answers ---- */

void metrics_count(struct server *server, const struct route *route, int status) {
  int count;
  const struct route *routes = route_list(&count);
  const int index = route ? (int)(route - routes) : -1;
  pthread_mutex_lock(&server->lock);
  int i = 0;
  while (i < server->n_answered && (server->answered[i].route != index || server->answered[i].status != status)) i++;
  if (i == server->n_answered && i < MOST_ANSWERED) server->answered[server->n_answered++] = (struct answered){index, status, 0};
  if (i < server->n_answered) server->answered[i].count++;
  pthread_mutex_unlock(&server->lock);
}

static const char *method_name(enum method method) {
  switch (method) {
  case METHOD_GET:
    return "GET";
  case METHOD_POST:
    return "POST";
  case METHOD_PATCH:
    return "PATCH";
  case METHOD_DELETE:
    return "DELETE";
  case METHOD_OPTIONS:
    return "OPTIONS";
  }
  return "";
}

/* ---- the text ---- */

static void head(struct buffer *out, const char *name, const char *type, const char *help) {
  buffer_format(out, "# HELP oscar_%s %s\n# TYPE oscar_%s %s\n", name, help, name, type);
}

static void number(struct buffer *out, const char *name, const char *labels, double value) {
  buffer_format(out, "oscar_%s%s %.17g\n", name, labels, value);
}

static void one(struct buffer *out, const char *name, const char *type, const char *help, double value) {
  head(out, name, type, help);
  number(out, name, "", value);
}

static void histogram_text(struct buffer *out, const char *name, const char *help, const struct histogram *h) {
  int64_t below = 0;
  head(out, name, "histogram", help);
  for (int i = 0; i < SERVICE_BUCKETS; i++) {
    below += h->count[i];
    if (isfinite(h->upper[i])) buffer_format(out, "oscar_%s_bucket{le=\"%.9g\"} %lld\n", name, h->upper[i], (long long)below);
  }
  buffer_format(out, "oscar_%s_bucket{le=\"+Inf\"} %lld\noscar_%s_sum %.17g\noscar_%s_count %lld\n", name, (long long)below, name,
                h->sum, name, (long long)below);
}

static void cache_text(struct buffer *out, const struct service_stats *s) {
  one(out, "cache_budget_bytes", "gauge", "Bytes that the cache may hold.", (double)s->cache.budget_bytes);
  one(out, "cache_peak_bytes", "gauge", "Most bytes that the cache has held.", (double)s->cache.peak_held_bytes);
  one(out, "cache_bits_per_element", "gauge", "Of a coded page, metadata included.", s->cache.coded_bits_per_element);
  one(out, "cache_free_units", "gauge", "Units of one coded page that are free.", (double)s->cache.free_units);
  head(out, "cache_held_bytes", "gauge", "Bytes held, by tier.");
  number(out, "cache_held_bytes", "{tier=\"device\"}", (double)s->cache.held_bytes);
  number(out, "cache_held_bytes", "{tier=\"host\"}", (double)s->host_bytes);
  number(out, "cache_held_bytes", "{tier=\"disk\"}", (double)s->disk_bytes);
  head(out, "cache_pages", "gauge", "Pages on the device, by form.");
  number(out, "cache_pages", "{form=\"exact\"}", (double)s->cache.exact_pages);
  number(out, "cache_pages", "{form=\"coded\"}", (double)s->cache.coded_pages);
  one(out, "cache_demoted_pages_total", "counter", "Pages that turned from exact into codes.", (double)s->demoted_pages);
  head(out, "cache_evictions_total", "counter", "What went to make room, by what it was.");
  number(out, "cache_evictions_total", "{reason=\"prefix_pages\"}", (double)s->evicted_leaves);
  number(out, "cache_evictions_total", "{reason=\"prefix_ends\"}", (double)s->evicted_parked);
  number(out, "cache_evictions_total", "{reason=\"sessions_to_host\"}", (double)s->moved_to_host);
  number(out, "cache_evictions_total", "{reason=\"sessions_to_disk\"}", (double)s->moved_to_disk);
  number(out, "cache_evictions_total", "{reason=\"sessions_dropped\"}", (double)s->dropped);
  one(out, "sessions_brought_back_total", "counter", "Sessions moved back onto the device.", (double)s->brought_back);
  head(out, "sessions", "gauge", "Sessions, by tier.");
  number(out, "sessions", "{tier=\"device\"}", s->sessions_device);
  number(out, "sessions", "{tier=\"host\"}", s->sessions_host);
  number(out, "sessions", "{tier=\"disk\"}", s->sessions_disk);
}

static void prefix_text(struct buffer *out, const struct service_stats *s) {
  head(out, "prompt_tokens_total", "counter", "Prompt tokens, by where their keys and values came from.");
  number(out, "prompt_tokens_total", "{source=\"reused\"}", (double)s->reused_exact);
  number(out, "prompt_tokens_total", "{source=\"refilled\"}", (double)s->refilled);
  number(out, "prompt_tokens_total", "{source=\"computed\"}", (double)s->computed);
  one(out, "prefix_known_pages", "gauge", "Pages of token ids that the prefix tree knows.", (double)s->prefix.known_pages);
  one(out, "prefix_held_pages", "gauge", "Of them, those that there is a page of the cache for.", (double)s->prefix.held_pages);
  one(out, "prefix_parked_sequences", "gauge", "Ends of finished sequences that the tree keeps.", (double)s->prefix.parked);
  one(out, "prefix_bytes", "gauge", "Bytes that the tree alone holds.", (double)(s->prefix.own_bytes + s->prefix.page_bytes));
  one(out, "prefix_lookups_total", "counter", "Prompts looked up.", (double)s->prefix.takes);
  one(out, "prefix_hits_total", "counter", "Of them, those that reused a token or more.", (double)s->prefix.hits);
  one(out, "prefix_shared_pages_total", "counter", "Pages replaced by one that was there.", (double)s->prefix.shared_pages);
  head(out, "prefix_reused_tokens_total", "counter", "Tokens reused, by how what follows was resumed.");
  number(out, "prefix_reused_tokens_total", "{resume=\"exact\"}", (double)s->prefix.reused_exact_tokens);
  number(out, "prefix_reused_tokens_total", "{resume=\"refill\"}", (double)s->prefix.reused_refill_tokens);
}

static void work_text(struct buffer *out, const struct service_stats *s) {
  one(out, "requests_running", "gauge", "Requests that generate.", s->running);
  one(out, "requests_waiting", "gauge", "Requests in the queue.", s->waiting);
  one(out, "requests_prefilling", "gauge", "Requests whose prompt is being processed.", s->prefilling);
  one(out, "requests_total", "counter", "Requests accepted.", (double)s->requests);
  one(out, "requests_refused_total", "counter", "Requests refused because too many waited.", (double)s->refused);
  head(out, "answers_total", "counter", "Answers, by why they ended.");
  for (int i = 0; i <= FINISH_ERROR; i++) {
    char label[48];
    snprintf(label, sizeof label, "{reason=\"%s\"}", finish_reason_name((enum finish_reason)i));
    number(out, "answers_total", label, (double)s->finished[i]);
  }
  head(out, "preemptions_total", "counter", "Sequences that had to wait again, by what became of their pages.");
  number(out, "preemptions_total", "{pages=\"kept\"}", (double)s->preempted_kept);
  number(out, "preemptions_total", "{pages=\"recomputed\"}", (double)s->preempted_recomputed);
  one(out, "preempted_returned_total", "counter", "Of them, those that went on.", (double)s->returned);
  one(out, "generated_tokens_total", "counter", "Tokens generated.", (double)s->generated);
  one(out, "guessed_tokens_total", "counter", "Tokens guessed ahead.", (double)s->guessed);
  one(out, "accepted_tokens_total", "counter", "Of them, those that were right.", (double)s->accepted);
  one(out, "steps_total", "counter", "Steps of the model.", (double)s->steps);
  one(out, "attention_read_bytes_total", "counter", "Bytes of the cache that attention read.", s->attention_bytes);
  one(out, "attention_seconds_total", "counter", "Seconds that it took (on a GPU: of whole steps).", s->attention_s);
  histogram_text(out, "queue_seconds", "From a request to its turn.", &s->queue);
  histogram_text(out, "first_token_seconds", "From a request to its first token.", &s->first_token);
  histogram_text(out, "between_tokens_seconds", "Between tokens of an answer.", &s->between_tokens);
  histogram_text(out, "step_seconds", "A step of the model.", &s->step);
}

static void http_text(struct buffer *out, struct server *server) {
  int count;
  const struct route *routes = route_list(&count);
  head(out, "http_requests_total", "counter", "Requests answered, by endpoint and status.");
  pthread_mutex_lock(&server->lock);
  for (int i = 0; i < server->n_answered; i++) {
    const struct answered *a = &server->answered[i];
    const bool known = a->route >= 0 && a->route < count;
    buffer_format(out, "oscar_http_requests_total{method=\"%s\",endpoint=\"%s\",status=\"%d\"} %lld\n",
                  known ? method_name(routes[a->route].method) : "other", known ? routes[a->route].path : "other", a->status,
                  (long long)a->count);
  }
  int connections = 0;
  for (const struct exchange *ex = server->first; ex; ex = ex->next) connections++;
  pthread_mutex_unlock(&server->lock);
  one(out, "http_requests_open", "gauge", "Requests that are being answered.", connections);
  head(out, "info", "gauge", "What is served.");
  buffer_text(out, "oscar_info{version=\"");
  buffer_text(out, oscar_version());
  buffer_text(out, "\",kv=\"");
  buffer_text(out, server->options.kv);
  buffer_text(out, "\"} 1\n");
  one(out, "start_time_seconds", "gauge", "When the server started, in seconds since 1970.", (double)server->started_at);
}

void metrics_text(struct exchange *ex, struct frontend *frontend) {
  (void)frontend;
  struct service_stats stats;
  service_stats_get(ex->server->service, &stats);
  struct buffer *out = &ex->reply.body;
  ex->reply.status = 200;
  ex->reply.type = "text/plain; version=0.0.4; charset=utf-8";
  cache_text(out, &stats);
  prefix_text(out, &stats);
  work_text(out, &stats);
  http_text(out, ex->server);
}

/* ---- for pages ---- */

static json_t *sessions_json(struct server *server) {
  struct session_entry *entries = NULL;
  struct service_error error = {0};
  int count = 0;
  json_t *list = json_array();
  static const char *const tiers[] = {"device", "host", "disk", "running"};
  if (service_sessions(server->service, &entries, &count, &error) != OSCAR_OK) return list;
  for (int i = 0; i < count; i++) {
    const struct session_entry *e = &entries[i];
    json_array_append_new(list,
                          json_pack("{s:s, s:s, s:I, s:I, s:I, s:{s:I, s:I, s:I}}", "id", e->name, "tier", tiers[e->tier],
                                    "tokens", (json_int_t)e->tokens, "exact_pages", (json_int_t)e->exact_pages, "coded_pages",
                                    (json_int_t)e->coded_pages, "bytes", "device", (json_int_t)e->device_bytes, "host",
                                    (json_int_t)e->host_bytes, "disk", (json_int_t)e->disk_bytes));
  }
  service_sessions_free(entries, count);
  return list;
}

void cache_picture(struct exchange *ex, struct frontend *frontend) {
  (void)frontend;
  struct server *server = ex->server;
  struct service_stats s;
  service_stats_get(server->service, &s);
  struct timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  json_t *whole =
      json_pack("{s:s, s:f, s:s, s:s, s:I}", "object", "cache", "time", (double)now.tv_sec + (double)now.tv_nsec * 1e-9, "model",
                server->options.model_name, "kv", server->options.kv, "context", (json_int_t)server->options.context);
  json_object_set_new(whole, "bytes",
                      json_pack("{s:I, s:I, s:I, s:I, s:I}", "budget", (json_int_t)s.cache.budget_bytes, "held",
                                (json_int_t)s.cache.held_bytes, "peak", (json_int_t)s.cache.peak_held_bytes, "host",
                                (json_int_t)s.host_bytes, "disk", (json_int_t)s.disk_bytes));
  json_object_set_new(whole, "pages",
                      json_pack("{s:I, s:I, s:I}", "exact", (json_int_t)s.cache.exact_pages, "coded",
                                (json_int_t)s.cache.coded_pages, "free_units", (json_int_t)s.cache.free_units));
  json_object_set_new(whole, "bits_per_element", json_number(s.cache.coded_bits_per_element));
  json_object_set_new(whole, "prefix",
                      json_pack("{s:I, s:I, s:I, s:I, s:I, s:I}", "known_pages", (json_int_t)s.prefix.known_pages, "held_pages",
                                (json_int_t)s.prefix.held_pages, "parked", (json_int_t)s.prefix.parked, "bytes",
                                (json_int_t)(s.prefix.own_bytes + s.prefix.page_bytes), "lookups", (json_int_t)s.prefix.takes,
                                "hits", (json_int_t)s.prefix.hits));
  json_object_set_new(whole, "tokens",
                      json_pack("{s:I, s:I, s:I, s:I, s:I, s:I, s:I}", "prompt", (json_int_t)s.prompt_tokens, "reused",
                                (json_int_t)s.reused_exact, "refilled", (json_int_t)s.refilled, "computed",
                                (json_int_t)s.computed, "generated", (json_int_t)s.generated, "guessed", (json_int_t)s.guessed,
                                "accepted", (json_int_t)s.accepted));
  json_object_set_new(whole, "requests",
                      json_pack("{s:i, s:i, s:i, s:I, s:I}", "running", s.running, "waiting", s.waiting, "prefilling",
                                s.prefilling, "total", (json_int_t)s.requests, "refused", (json_int_t)s.refused));
  json_object_set_new(whole, "demoted_pages", json_integer(s.demoted_pages));
  json_object_set_new(whole, "attention",
                      json_pack("{s:o, s:o}", "bytes", json_number(s.attention_bytes), "seconds", json_number(s.attention_s)));
  json_object_set_new(whole, "sessions", sessions_json(server));
  reply_json(ex, 200, whole);
}

void health(struct exchange *ex, struct frontend *frontend) {
  (void)frontend;
  const bool stopping = atomic_load(&ex->server->stopping);
  reply_json(ex, stopping ? 503 : 200, json_pack("{s:s}", "status", stopping ? "stopping" : "ok"));
}
