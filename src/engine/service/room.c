/*
 * room.c - the budget: what goes when it is exhausted, and how what went comes back.
 *
 * In this order: ends of texts that the tree alone holds, sessions that nobody uses, the youngest answer. What the first two give
 * up costs somebody a recomputation or a copy later; an answer that is preempted keeps its pages in host memory where there is
 * room for them, and its tokens in any case.
 */
#include "engine/service/service_private.h"
#include "engine/service/sessions.h"

#include <string.h>

size_t room_for_tokens(const struct service *s, int64_t tokens) {
  return oscar_cache_bytes_for(&s->cache_options, tokens, 1, s->engine->options.chunk);
}

bool room_make(struct service *s) {
  size_t freed = 0;
  if (s->tree) oscar_prefix_evict(s->tree, oscar_cache_shortfall(s->engine->cache), &freed);
  return freed > 0 || sessions_make_room(s);
}

bool room_after(struct service *s, oscar_status status) { return status == OSCAR_NO_SPACE && room_make(s); }

bool room_is_there(struct service *s, size_t bytes) {
  oscar_cache_usage usage;
  oscar_cache_usage_get(s->engine->cache, &usage);
  size_t room = usage.budget_bytes > usage.held_bytes ? usage.budget_bytes - usage.held_bytes : 0;
  if (s->tree) {
    oscar_prefix_stats tree;
    oscar_prefix_stats_get(s->tree, &tree);
    room += tree.page_bytes;
  }
  room += sessions_device_bytes(s);
  /* Each of those that run will want another page before it gives one back. */
  return room >= bytes + (size_t)s->n_admitted * (s->page_bytes + s->coded_page_bytes);
}

/* ---- going ---- */

void kept_free(struct service *s, struct kept_pages *kept) {
  if (kept->bytes) s->kept_bytes -= kept->n;
  mem_free(s->context, kept->bytes);
  *kept = (struct kept_pages){0};
}

/* Its pages as they are, where host memory has room. */
static bool keep_pages(struct service *s, struct answer *a) {
  const size_t device_bytes = oscar_sequence_bytes(a->sequence);
  if (!sessions_host_room(s, device_bytes)) return false;
  if (pages_keep(s, a->sequence, a->ids, a->n, NULL, &a->kept) != OSCAR_OK) return false;
  s->kept_bytes += a->kept.n;
  a->kept.device_bytes = device_bytes;
  return true;
}

void answer_preempt(struct service *s, struct answer *a) {
  const bool kept = keep_pages(s, a);
  s->stats.preempted_kept += kept;
  s->stats.preempted_recomputed += !kept;
  a->request->usage.preempted++;
  if (!kept) answer_insert(s, a);
  oscar_sequence_free(a->sequence);
  a->sequence = NULL;
  a->preempted = true;
  a->state = ANSWER_AWAY;
}

bool youngest_preempt(struct service *s, int least) {
  struct answer *youngest = NULL;
  int there = 0;
  for (int i = 0; i < s->n_admitted; i++) {
    struct answer *a = s->admitted[i];
    if (!a->sequence) continue;
    there++;
    if (!youngest || a->age > youngest->age) youngest = a;
  }
  if (there < least) return false;
  answer_preempt(s, youngest);
  return true;
}

/* ---- coming ---- */

static oscar_status take_known(struct service *s, const int32_t *ids, int64_t n, oscar_sequence **sequence,
                               oscar_prefix_match *match) {
  oscar_status status;
  do {
    *match = (oscar_prefix_match){.compute_tokens = n, .exact = true};
    status = s->tree ? oscar_prefix_take(s->tree, ids, n, s->options.reuse, sequence, match)
                     : oscar_sequence_create(s->engine->cache, sequence);
  } while (room_after(s, status));
  return status;
}

static void note_reuse(struct service *s, const struct answer *a, int64_t reused, int64_t refilled) {
  struct request *r = a->request;
  s->stats.prompt_tokens += a->n - r->n; /* a session's tokens took the place of others */
  r->usage.prompt_tokens = a->n;
  r->usage.reused_exact = reused;
  r->usage.refilled = refilled;
  r->usage.computed = a->n - reused - refilled;
  s->stats.reused_exact += reused;
  s->stats.refilled += refilled;
  s->stats.computed += r->usage.computed;
}

oscar_status answer_begin(struct service *s, struct answer *a) {
  oscar_prefix_match match;
  int64_t reused = 0, refilled = 0;
  struct request *r = a->request;
  oscar_status status = session_begin(s, r, a, &reused, &refilled);
  if (status != OSCAR_OK) return status;
  if (!a->sequence) {
    status = take_known(s, a->ids, a->n - 1, &a->sequence, &match);
    if (status != OSCAR_OK) return status;
    reused = match.reused_tokens;
    refilled = match.refill_tokens;
  }
  note_reuse(s, a, reused, refilled);
  return OSCAR_OK;
}

static bool is_complete(const struct answer *a) { return a->generated > 0 && oscar_sequence_length(a->sequence) == a->n - 1; }

oscar_status answer_return(struct service *s, struct answer *a) {
  oscar_prefix_match match;
  oscar_status status;
  if (a->kept.bytes) {
    do status = pages_restore(s, &a->kept, &a->sequence);
    while (room_after(s, status));
  } else
    status = take_known(s, a->ids, a->n - 1, &a->sequence, &match);
  if (status != OSCAR_OK) return status;
  kept_free(s, &a->kept);
  s->stats.returned += a->preempted;
  a->preempted = false;
  a->state = is_complete(a) ? ANSWER_DECODES : ANSWER_FEEDS;
  answer_insert(s, a);
  return OSCAR_OK;
}
