/*
 * request.c - a request's life: checked and copied by the thread that submits it, admitted when it is its turn, told of
 * by events, finished.
 */
#include "engine/service/service_private.h"
#include "engine/service/sessions.h"

#include <stdlib.h>
#include <string.h>

void request_options_default(struct request_options *options) {
  *options = (struct request_options){.choices = 1, .logprobs = -1};
  sampler_options_default(&options->sampling);
}

const char *finish_reason_name(enum finish_reason reason) {
  static const char *const names[] = {"stop", "sequence", "length", "cancelled", "error"};
  return (unsigned)reason < ARRAY_LENGTH(names) ? names[reason] : "unknown";
}

/* ---- submitting: on another thread, without the context ---- */

static oscar_status refuse(struct service_error *error, oscar_status status, const char *format, ...) OSCAR_PRINTF(3, 4);
static oscar_status refuse(struct service_error *error, oscar_status status, const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  error->status = status;
  vsnprintf(error->text, sizeof error->text, format, arguments);
  va_end(arguments);
  return status;
}

static oscar_status check_prompt(const struct service *s, const struct request_options *o, struct service_error *error) {
  if (o->n < 1 || !o->ids) return refuse(error, OSCAR_INVALID_ARGUMENT, "the prompt has no tokens");
  for (int i = 0; i < o->n; i++)
    if (o->ids[i] < 0 || o->ids[i] >= s->vocab)
      return refuse(error, OSCAR_INVALID_ARGUMENT, "token %d of the prompt is %d; this model has tokens 0 to %d", i,
                    (int)o->ids[i], s->vocab - 1);
  const int64_t context = s->engine->options.context;
  if (o->n >= context)
    return refuse(error, OSCAR_INVALID_ARGUMENT, "the prompt has %d tokens; the context of %lld has room for at most %lld", o->n,
                  (long long)context, (long long)context - 1);
  if (o->n >= s->context_tokens)
    return refuse(error, OSCAR_INVALID_ARGUMENT,
                  "the prompt has %d tokens and needs %zu bytes of cache; there are %zu, enough for prompts of up to %lld tokens",
                  o->n, room_for_tokens(s, o->n + 1), s->cache_options.budget_bytes, (long long)s->context_tokens - 1);
  return OSCAR_OK;
}

static oscar_status check_options(const struct service *s, const struct request_options *o, struct service_error *error) {
  const int most = s->options.max_running < MOST_CHOICES ? s->options.max_running : MOST_CHOICES;
  const struct sampler_options *p = &o->sampling;
  if (o->choices < 1 || o->choices > most)
    return refuse(error, OSCAR_INVALID_ARGUMENT, "%d answers at once; expected 1 to %d", o->choices, most);
  if (o->max_tokens < 0) return refuse(error, OSCAR_INVALID_ARGUMENT, "at most %d tokens; expected 0 or more", o->max_tokens);
  if (o->logprobs > MOST_RANKED_TOKENS)
    return refuse(error, OSCAR_INVALID_ARGUMENT, "the %d most likely tokens; expected at most %d", o->logprobs,
                  MOST_RANKED_TOKENS);
  if (!(p->temperature >= 0) || p->top_k < 0 || !(p->top_p >= 0 && p->top_p <= 1) || !(p->min_p >= 0 && p->min_p <= 1))
    return refuse(error, OSCAR_INVALID_ARGUMENT,
                  "temperature %g, top-k %d, top-p %g, min-p %g; expected 0 or more, 0 or more, 0 to 1, 0 to 1",
                  (double)p->temperature, p->top_k, (double)p->top_p, (double)p->min_p);
  if (o->session && !session_name_is_valid(o->session))
    return refuse(error, OSCAR_INVALID_ARGUMENT, "'%.80s' is no name of a session: " SESSION_NAME_RULE, o->session);
  if (o->session && o->choices > 1)
    return refuse(error, OSCAR_INVALID_ARGUMENT, "a session keeps one answer; %d were asked for", o->choices);
  return OSCAR_OK;
}

/* NULL stays NULL. */
static bool copy_text(const char *from, char **to) { return !from || (*to = strdup(from)); }

static bool copy_lists(const struct request_options *o, struct request *r) {
  r->ids = malloc((size_t)o->n * sizeof *r->ids);
  r->stops = calloc((size_t)o->n_stops + 1, sizeof *r->stops);
  r->bias = malloc(((size_t)o->sampling.n_bias + 1) * sizeof *r->bias);
  if (!r->ids || !r->stops || !r->bias) return false;
  memcpy(r->ids, o->ids, (size_t)o->n * sizeof *r->ids);
  if (o->sampling.n_bias) memcpy(r->bias, o->sampling.bias, (size_t)o->sampling.n_bias * sizeof *r->bias);
  r->sampling.bias = r->bias;
  for (; r->n_stops < o->n_stops; r->n_stops++)
    if (!copy_text(o->stops[r->n_stops], &r->stops[r->n_stops])) return false;
  return true;
}

void request_free(struct request *r) {
  if (!r) return;
  for (int i = 0; r->stops && i < r->n_stops; i++) free(r->stops[i]);
  free(r->stops);
  free(r->bias);
  free(r->ids);
  free(r->user_name);
  free(r->session_name);
  free(r->session_text);
  free(r);
}

static struct request *copy_request(const struct service *s, const struct request_options *o) {
  struct request *r = calloc(1, sizeof *r);
  if (!r) return NULL;
  r->n = o->n;
  r->choices = o->choices;
  r->logprobs = o->logprobs;
  r->sampling = o->sampling;
  r->grammar = o->grammar;
  r->ignore_end = o->ignore_end;
  r->return_tokens = o->return_tokens;
  r->deadline_ns = o->deadline_ns;
  r->observer = o->observer;
  r->observer_user = o->observer_user;
  r->submitted_ns = time_ns();
  r->work = -1;
  const int64_t room = s->context_tokens - o->n;
  r->max_tokens = o->max_tokens > 0 && o->max_tokens < room ? o->max_tokens : room;
  if (copy_lists(o, r) && copy_text(o->user, &r->user_name) && copy_text(o->session, &r->session_name) &&
      copy_text(o->session_text, &r->session_text))
    return r;
  request_free(r);
  return NULL;
}

/* Hands it over, unless the service stops or too many wait. */
static oscar_status enqueue(struct service *s, struct request *r, uint64_t *id, struct service_error *error) {
  struct shared *shared = &s->shared;
  oscar_status status = OSCAR_OK;
  pthread_mutex_lock(&shared->lock);
  if (shared->draining || shared->stopping) {
    status = refuse(error, OSCAR_CANCELLED, "the service has stopped");
  } else if (shared->waiting >= s->options.max_waiting) {
    status = refuse(error, OSCAR_NO_SPACE, "%d requests wait already; no more are taken", shared->waiting);
    shared->stats.refused++;
  } else {
    *id = r->id = ++shared->last_id;
    shared->waiting++;
    r->live_next = shared->live;
    r->live_at = &shared->live;
    if (r->live_next) r->live_next->live_at = &r->live_next;
    shared->live = r;
    *shared->inbox_end = r;
    shared->inbox_end = &r->next;
    pthread_cond_signal(&shared->work);
  }
  pthread_mutex_unlock(&shared->lock);
  return status;
}

oscar_status service_submit(struct service *s, const struct request_options *options, uint64_t *id, struct service_error *error) {
  *id = 0;
  *error = (struct service_error){0};
  oscar_status status = check_prompt(s, options, error);
  if (status == OSCAR_OK) status = check_options(s, options, error);
  if (status != OSCAR_OK) return status;
  struct request *r = copy_request(s, options);
  if (!r) return refuse(error, OSCAR_NO_MEMORY, "out of memory for a request of %d tokens", options->n);
  status = enqueue(s, r, id, error); /* who takes it, the service's thread, frees it */
  if (status != OSCAR_OK) request_free(r);
  return status; /* NOLINT(clang-analyzer-unix.Malloc): it is in the inbox */
}

/* ---- events ---- */

static void tell(const struct request *r, const struct request_event *event) {
  if (r->observer) r->observer(r->observer_user, event);
}

/* The first n held bytes, and the tokens since the last time. */
static oscar_status tell_text(struct service *s, struct answer *a, size_t n) {
  const struct request *r = a->request;
  struct request_event event = {.kind = EVENT_TEXT, .choice = a->choice, .text = "", .n_tokens = a->n_reports};
  if (n == 0 && a->n_reports == 0) return OSCAR_OK;
  char *text = text_characters(s->context, a->held.bytes, n, &event.bytes);
  if (!text) return OSCAR_NO_MEMORY;
  for (int i = 0; i < a->n_reports; i++) a->reports[i].ranked = a->ranked + (size_t)i * MOST_RANKED_TOKENS;
  event.text = text;
  event.tokens = a->n_reports ? a->reports : NULL;
  tell(r, &event);
  mem_free(s->context, text);
  text_drop(&a->held, n);
  a->n_reports = 0;
  return OSCAR_OK;
}

static void tell_done(struct request *r) {
  r->usage.total_ns = time_ns() - r->submitted_ns;
  tell(r, &(struct request_event){.kind = EVENT_DONE, .usage = &r->usage});
}

/* ---- the end ---- */

static void answer_clear(struct service *s, struct answer *a) {
  answer_guesses_end(a);
  if (a->sequence) oscar_sequence_free(a->sequence);
  kept_free(s, &a->kept);
  sampler_free(a->sampler);
  if (a->grammar) grammar_state_free(a->grammar);
  mem_free(s->context, a->ids);
  mem_free(s->context, a->held.bytes);
  mem_free(s->context, a->reports);
  mem_free(s->context, a->ranked);
  *a = (struct answer){.state = ANSWER_FINISHED};
}

static void leave_live(struct service *s, struct request *r, bool waited) {
  struct shared *shared = &s->shared;
  pthread_mutex_lock(&shared->lock);
  *r->live_at = r->live_next;
  if (r->live_next) r->live_next->live_at = r->live_at;
  shared->waiting -= waited;
  pthread_mutex_unlock(&shared->lock);
}

/* All answers are finished. `waited`: it was never admitted. */
static void request_end(struct service *s, struct request *r, bool waited) {
  session_end(s, r);
  leave_live(s, r, waited);
  stats_publish(s); /* who is told that it is done finds it counted */
  tell_done(r);
  for (int i = 0; r->answers && i < r->choices; i++) answer_clear(s, &r->answers[i]);
  mem_free(s->context, r->answers);
  if (r->user) user_release(r->user);
  request_free(r);
}

/* Keeps what was computed for those who begin alike. */
static void answer_park(struct service *s, struct answer *a) {
  if (!a->sequence || !s->tree) return;
  if (oscar_prefix_park(s->tree, a->sequence, a->ids) == OSCAR_OK) a->sequence = NULL;
}

void answer_insert(struct service *s, struct answer *a) {
  /* Without room the tree knows less, and no harm is done. */
  if (s->tree) (void)oscar_prefix_insert(s->tree, a->sequence, a->ids);
}

static void leave_admitted(struct service *s, const struct answer *a) {
  int to = 0;
  for (int i = 0; i < s->n_admitted; i++)
    if (s->admitted[i] != a) s->admitted[to++] = s->admitted[i];
  s->n_admitted = to;
}

void answer_finish(struct service *s, struct answer *a, enum finish_reason reason, const char *stopped_by, oscar_status status) {
  struct request *r = a->request;
  struct service_error error;
  error_note(s, status, &error);
  struct request_usage usage = r->usage;
  usage.generated = a->generated;
  usage.guessed = a->guessed;
  usage.accepted = a->accepted;
  usage.total_ns = time_ns() - r->submitted_ns;
  if (reason != FINISH_SEQUENCE && tell_text(s, a, a->held.n) != OSCAR_OK && reason != FINISH_ERROR) {
    reason = FINISH_ERROR;
    error_note(s, status = OSCAR_NO_MEMORY, &error);
  }
  a->state = ANSWER_FINISHED;
  leave_admitted(s, a);
  for (int i = 0; i < r->choices; i++) /* for this one's prompt */
    if (r->answers[i].state == ANSWER_WAITS) r->answers[i].state = ANSWER_AWAY;
  if (answer_settle(s, a) == OSCAR_OK && !session_keep(s, a)) answer_park(s, a);
  answer_guesses_end(a);
  if (a->sequence) oscar_sequence_free(a->sequence);
  a->sequence = NULL;
  kept_free(s, &a->kept);
  s->stats.finished[reason]++;
  tell(r, &(struct request_event){.kind = EVENT_FINISHED,
                                  .choice = a->choice,
                                  .reason = reason,
                                  .stopped_by = stopped_by,
                                  .status = status,
                                  .error = reason == FINISH_ERROR ? error.text : NULL,
                                  .usage = &usage});
  if (++r->finished == r->choices) request_end(s, r, false);
}

/* Of a request that was never admitted. */
static void end_waiting(struct service *s, struct request *r, enum finish_reason reason, oscar_status status) {
  struct service_error error;
  error_note(s, status, &error);
  for (int i = 0; i < r->choices; i++) {
    s->stats.finished[reason]++;
    tell(r, &(struct request_event){.kind = EVENT_FINISHED,
                                    .choice = i,
                                    .reason = reason,
                                    .status = status,
                                    .error = reason == FINISH_ERROR ? error.text : NULL,
                                    .usage = &r->usage});
  }
  request_end(s, r, true);
}

/* The answers that are left; the last one ends the request. */
static void finish_all(struct service *s, struct request *r, enum finish_reason reason, oscar_status status) {
  const int choices = r->choices;
  struct answer *answers = r->answers;
  for (int i = 0, left = choices - r->finished; left > 0 && i < choices; i++) {
    if (answers[i].state == ANSWER_FINISHED) continue;
    left--;
    answer_finish(s, &answers[i], reason, NULL, status);
  }
}

static bool has_ended(const struct request *r, int64_t now) {
  return atomic_load(&r->cancelled) || (r->deadline_ns && now >= r->deadline_ns);
}

void requests_drop_ended(struct service *s) {
  const int64_t now = time_ns();
  for (struct request **at = &s->waiting; *at;) {
    struct request *r = *at;
    if (!has_ended(r, now)) {
      at = &r->next;
      continue;
    }
    *at = r->next;
    end_waiting(s, r, FINISH_CANCELLED, OSCAR_OK);
  }
  for (int i = 0; i < s->n_admitted;)
    if (has_ended(s->admitted[i]->request, now)) {
      finish_all(s, s->admitted[i]->request, FINISH_CANCELLED, OSCAR_OK);
      i = 0; /* others have moved up */
    } else
      i++;
}

void requests_cancel_all(struct service *s) {
  while (s->n_admitted) finish_all(s, s->admitted[0]->request, FINISH_CANCELLED, OSCAR_OK);
  while (s->waiting) {
    struct request *r = s->waiting;
    s->waiting = r->next;
    end_waiting(s, r, FINISH_CANCELLED, OSCAR_OK);
  }
}

/* ---- the beginning ---- */

void requests_take(struct service *s, struct request *inbox) {
  struct request **end = &s->waiting;
  while (*end) end = &(*end)->next;
  for (struct request *r = inbox, *next; r; r = next) {
    next = r->next;
    r->next = NULL;
    s->stats.requests++;
    r->usage.prompt_tokens = r->n;
    s->stats.prompt_tokens += r->n;
    const oscar_status status = user_find(s, r->user_name, &r->user);
    if (status != OSCAR_OK) {
      end_waiting(s, r, FINISH_ERROR, status);
      continue;
    }
    *end = r;
    end = &r->next;
  }
}

static oscar_status make_grammar(struct service *s, struct answer *a, const struct grammar *grammar) {
  oscar_status status = OSCAR_OK;
  if (!s->table) status = token_table_create(s->tokenizer, s->options.visible, s->options.n_visible, &s->table);
  if (status == OSCAR_OK) status = grammar_state_create(grammar, s->table, &a->grammar);
  return status == OSCAR_OK
             ? status
             : set_error(s->context, status, "the grammar of an answer cannot be followed: %s", oscar_status_name(status));
}

static oscar_status make_answer(struct service *s, struct request *r, int choice) {
  struct answer *a = &r->answers[choice];
  *a = (struct answer){.request = r,
                       .choice = choice,
                       .state = ANSWER_WAITS,
                       .age = ++s->last_age,
                       .chunk = s->chunk,
                       .n = r->n,
                       .room = r->n + 64,
                       .certain = INT64_MAX};
  struct sampler_options sampling = r->sampling;
  sampling.seed += (uint64_t)choice;
  a->ids = mem_alloc(s->context, (size_t)a->room, sizeof *a->ids);
  if (!a->ids) return OSCAR_NO_MEMORY;
  memcpy(a->ids, r->ids, (size_t)r->n * sizeof *a->ids);
  oscar_status status = sampler_create(s->context, &sampling, s->vocab, &a->sampler);
  if (status == OSCAR_OK) status = answer_guesses_begin(s, a);
  return status == OSCAR_OK && r->grammar ? make_grammar(s, a, r->grammar) : status;
}

/* It begins; errors end it. NO_SPACE: it cannot begin now, and is as it was. */
static oscar_status request_begin(struct service *s, struct request *r) {
  r->answers = mem_zalloc(s->context, (size_t)r->choices, sizeof *r->answers);
  oscar_status status = r->answers ? OSCAR_OK : OSCAR_NO_MEMORY;
  for (int i = 0; i < r->choices && status == OSCAR_OK; i++) status = make_answer(s, r, i);
  if (status == OSCAR_OK) status = answer_begin(s, &r->answers[0]);
  if (status == OSCAR_OK) {
    for (int i = 0; i < r->choices; i++) s->admitted[s->n_admitted++] = &r->answers[i];
    r->answers[0].state = ANSWER_FEEDS;
    return OSCAR_OK;
  }
  for (int i = 0; r->answers && i < r->choices; i++) answer_clear(s, &r->answers[i]);
  mem_free(s->context, r->answers);
  r->answers = NULL;
  return status;
}

static void admit(struct service *s, struct request **at) {
  struct request *r = *at;
  *at = r->next;
  r->next = NULL;
  const oscar_status status = request_begin(s, r);
  if (status == OSCAR_NO_SPACE) {
    r->next = s->waiting;
    s->waiting = r;
    return;
  }
  r->usage.queued_ns = time_ns() - r->submitted_ns;
  histogram_note(&s->stats.queue, r->usage.queued_ns);
  if (status != OSCAR_OK) {
    end_waiting(s, r, FINISH_ERROR, status);
    return;
  }
  pthread_mutex_lock(&s->shared.lock);
  s->shared.waiting--;
  pthread_mutex_unlock(&s->shared.lock);
}

static struct answer *oldest(const struct service *s, enum answer_state state) {
  struct answer *found = NULL;
  for (int i = 0; i < s->n_admitted; i++)
    if (s->admitted[i]->state == state && (!found || s->admitted[i]->age < found->age)) found = s->admitted[i];
  return found;
}

/* Whether anything is on the device, so that waiting for room makes sense. */
static bool anything_runs(const struct service *s) { return oldest(s, ANSWER_FEEDS) || oldest(s, ANSWER_DECODES); }

/* Bytes that a prompt will take beside what is there already. */
static size_t bytes_wanted(const struct service *s, const int32_t *ids, int64_t n) {
  size_t bytes = room_for_tokens(s, n + PAGE_TOKENS < s->context_tokens ? n + PAGE_TOKENS : s->context_tokens);
  oscar_prefix_match match;
  if (!s->tree || oscar_prefix_match_get(s->tree, ids, n - 1, s->options.reuse, &match) != OSCAR_OK) return bytes;
  const size_t shared = (size_t)(match.reused_tokens / PAGE_TOKENS) * s->coded_page_bytes;
  return shared < bytes ? bytes - shared : 0;
}

/* ---- whose prompt ---- */

static bool anybody(const struct service *s, struct request *r) {
  (void)s, (void)r;
  return true;
}

static int64_t work_of(const struct service *s, struct request *r) {
  oscar_prefix_match match;
  if (r->work >= 0) return r->work;
  int64_t known = session_knows(s, r);
  if (s->tree && oscar_prefix_match_get(s->tree, r->ids, r->n - 1, s->options.reuse, &match) == OSCAR_OK &&
      match.reused_tokens > known)
    known = match.reused_tokens;
  return r->work = r->n - known;
}

/* Tokens that the request has in common with a prompt that is computed, and that are not there yet. */
static int64_t soon_known(const struct request *r, const struct answer *a) {
  int64_t same = 0;
  while (same < r->n && same < a->n && r->ids[same] == a->ids[same]) same++;
  return same - oscar_sequence_length(a->sequence);
}

/* Beside prompts that are computed only one begins that has no more than half of what the shortest of them has left; so they are
 * few, and who waits for it waits little. One that would be spared half of its work by waiting waits. */
static bool may_overtake(const struct service *s, struct request *r) {
  const int64_t work = work_of(s, r);
  if (2 * work > answer_left(answer_nearly_fed(s))) return false;
  for (int i = 0; i < s->n_admitted; i++) {
    const struct answer *a = s->admitted[i];
    if (a->state == ANSWER_FEEDS && 2 * soon_known(r, a) > work) return false;
  }
  return true;
}

/* Those that were preempted come first, the oldest first of them. Else one prompt is computed at a time, since the next one may
 * begin alike, and then finds it done; but a short one does not wait for a long one (step.c: they take turns). */
void requests_admit(struct service *s) {
  for (struct answer *a; (a = oldest(s, ANSWER_AWAY));) {
    const bool must_feed = !a->kept.bytes;
    if (must_feed && oldest(s, ANSWER_FEEDS)) return;
    const size_t bytes = must_feed ? bytes_wanted(s, a->ids, a->n) : a->kept.device_bytes;
    if (anything_runs(s) && !room_is_there(s, bytes)) return;
    const oscar_status status = answer_return(s, a);
    if (status == OSCAR_NO_SPACE && anything_runs(s)) return;
    if (status != OSCAR_OK) answer_finish(s, a, FINISH_ERROR, NULL, status);
  }
  for (;;) {
    struct request **next = users_next(s, oldest(s, ANSWER_FEEDS) ? may_overtake : anybody);
    if (!next || s->n_admitted + (*next)->choices > s->options.max_running) return;
    if (anything_runs(s) && !room_is_there(s, bytes_wanted(s, (*next)->ids, (*next)->n))) return;
    const int before = s->n_admitted;
    const struct request *first = *next;
    admit(s, next);
    if (s->n_admitted > before || s->waiting != first) continue;
    if (anything_runs(s)) return; /* there was no room after all */
    struct request *r = s->waiting;
    s->waiting = r->next;
    end_waiting(s, r, FINISH_ERROR, OSCAR_NO_SPACE);
  }
}

/* ---- tokens ---- */

oscar_status answer_reserve(struct service *s, struct answer *a, int64_t tokens) {
  if (a->n + tokens <= a->room) return OSCAR_OK;
  const int64_t room = (a->n + tokens) * 3 / 2 + 64;
  int32_t *ids = mem_resize(s->context, a->ids, (size_t)a->room * sizeof *ids, (size_t)room * sizeof *ids);
  if (!ids) return OSCAR_NO_MEMORY;
  a->ids = ids;
  a->room = room;
  return OSCAR_OK;
}

static oscar_status push_token(struct service *s, struct answer *a, int32_t id) {
  const oscar_status status = answer_reserve(s, a, 1);
  if (status == OSCAR_OK) a->ids[a->n++] = id;
  return status;
}

static oscar_status make_report_room(struct service *s, struct answer *a) {
  if (a->n_reports < a->reports_room) return OSCAR_OK;
  const size_t old = (size_t)a->reports_room, room = 2 * old + 4;
  struct token_report *reports = mem_resize(s->context, a->reports, old * sizeof *reports, room * sizeof *reports);
  if (!reports) return OSCAR_NO_MEMORY;
  a->reports = reports;
  const size_t row = MOST_RANKED_TOKENS * sizeof *a->ranked;
  struct ranked_token *ranked = mem_resize(s->context, a->ranked, old * row, room * row);
  if (!ranked) return OSCAR_NO_MEMORY;
  a->ranked = ranked;
  a->reports_room = (int)room;
  return OSCAR_OK;
}

static oscar_status report_token(struct service *s, struct answer *a, int32_t id, const char *text, size_t bytes,
                                 const float *logits) {
  const struct request *r = a->request;
  if (r->logprobs < 0 && !r->return_tokens) return OSCAR_OK;
  const oscar_status status = make_report_room(s, a);
  if (status != OSCAR_OK) return status;
  struct token_report *report = &a->reports[a->n_reports];
  *report = (struct token_report){.id = id, .text = text, .bytes = bytes};
  if (r->logprobs >= 0 && logits) {
    report->n_ranked = r->logprobs;
    sampler_rank(s->vocab, logits, id, &report->logprob, r->logprobs, a->ranked + (size_t)a->n_reports * MOST_RANKED_TOKENS);
  }
  a->n_reports++;
  return OSCAR_OK;
}

static bool is_visible(const struct service *s, int32_t id) {
  for (int i = 0; i < s->options.n_visible; i++)
    if (s->visible[i] == id) return true;
  return false;
}

static void note_times(struct service *s, struct answer *a) {
  struct request *r = a->request;
  const int64_t now = time_ns();
  if (r->usage.first_token_ns == 0) {
    r->usage.first_token_ns = now - r->submitted_ns;
    histogram_note(&s->stats.first_token, r->usage.first_token_ns);
  }
  if (a->last_token_ns) histogram_note(&s->stats.between_tokens, now - a->last_token_ns);
  a->last_token_ns = now;
}

/* The token is part of the answer: its text goes out. *stop: a stop string, or NULL. */
static oscar_status add_token(struct service *s, struct answer *a, int32_t id, const float *logits, const char **stop) {
  struct request *r = a->request;
  size_t bytes;
  const char *piece = tokenizer_piece(s->tokenizer, id, is_visible(s, id), &bytes);
  oscar_status status = push_token(s, a, id);
  if (status != OSCAR_OK) return status;
  a->generated++;
  r->usage.generated++;
  s->stats.generated++;
  user_serve(r->user, 1);
  if (a->grammar && (status = grammar_accept(a->grammar, id)) != OSCAR_OK)
    return set_error(s->context, status, "token %d does not keep to the grammar", (int)id);
  status = text_append(s->context, &a->held, piece, bytes);
  if (status == OSCAR_OK) status = report_token(s, a, id, piece, bytes, logits);
  if (status != OSCAR_OK) return status;
  int which = 0;
  const size_t at = text_find_stop(&a->held, r->stops, r->n_stops, &which);
  if (at != SIZE_MAX) *stop = r->stops[which];
  return tell_text(s, a, at != SIZE_MAX ? at : text_ready(&a->held, r->stops, r->n_stops));
}

bool answer_take(struct service *s, struct answer *a, int32_t id, const float *logits) {
  const struct request *r = a->request;
  const char *stop = NULL;
  note_times(s, a);
  if (!r->ignore_end && tokenizer_is_end(s->tokenizer, id)) {
    answer_finish(s, a, FINISH_STOP, NULL, OSCAR_OK);
    return false;
  }
  const oscar_status status = add_token(s, a, id, logits, &stop);
  if (status != OSCAR_OK)
    answer_finish(s, a, FINISH_ERROR, NULL, status);
  else if (stop)
    answer_finish(s, a, FINISH_SEQUENCE, stop, OSCAR_OK);
  else if (a->grammar && grammar_must_end(a->grammar))
    answer_finish(s, a, FINISH_STOP, NULL, OSCAR_OK);
  else if (a->generated >= r->max_tokens)
    answer_finish(s, a, FINISH_LENGTH, NULL, OSCAR_OK);
  else
    return true;
  return false;
}

bool answer_choose(struct service *s, struct answer *a, const float *logits) {
  int32_t id;
  oscar_status status = OSCAR_OK;
  if (a->grammar && (status = grammar_allowed(a->grammar, s->allowed)) != OSCAR_OK)
    set_error(s->context, status, "the grammar cannot say which tokens may come next: %s", oscar_status_name(status));
  if (status == OSCAR_OK) status = sampler_choose(a->sampler, logits, a->ids, a->n, a->grammar ? s->allowed : NULL, &id);
  if (status == OSCAR_OK) return answer_take(s, a, id, logits);
  answer_finish(s, a, FINISH_ERROR, NULL, status);
  return false;
}

bool answer_can_be_drawn(struct answer *a) {
  if (a->grammar || a->request->logprobs >= 0) return false;
  if (!a->is_drawn) a->is_drawn = sampler_describe(a->sampler, &a->drawn);
  return a->is_drawn;
}

void answers_fork(struct service *s, struct answer *first, const float *logits) {
  struct request *r = first->request;
  for (int i = 1; i < r->choices; i++) {
    struct answer *a = &r->answers[i];
    if (a->state != ANSWER_WAITS) continue;
    oscar_status status;
    do status = oscar_sequence_fork(first->sequence, &a->sequence);
    while (room_after(s, status));
    a->state = status == OSCAR_OK ? ANSWER_DECODES : ANSWER_AWAY; /* which computes the prompt once more */
    if (status == OSCAR_OK) answer_choose(s, a, logits);
  }
}
