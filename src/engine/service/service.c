/*
 * service.c - the service's thread, and what other threads hand it.
 *
 * The thread goes round: it takes what was submitted, does what was asked for, lets requests in, and runs a step. Other threads
 * leave requests and commands in lists under one lock, which is never held while anything is computed. Who leaves a command waits
 * until the thread has come by: at most a step.
 */
#include "engine/service/service_private.h"
#include "engine/service/sessions.h"

#include <stdlib.h>
#include <string.h>

#define DEFAULT_HOST_BYTES ((size_t)1 << 30)

void service_options_default(struct service_options *options) {
  *options = (struct service_options){
      .max_running = 64, .max_waiting = 256, .host_bytes = DEFAULT_HOST_BYTES, .reuse = OSCAR_PREFIX_REFILL, .candidates = 4};
}

void error_note(const struct service *s, oscar_status status, struct service_error *error) {
  error->status = status;
  snprintf(error->text, sizeof error->text, "%s", status == OSCAR_OK ? "" : oscar_last_error(s->context));
}

/* ---- other threads ---- */

oscar_status service_command(struct service *s, struct command *command) {
  struct shared *shared = &s->shared;
  pthread_mutex_lock(&shared->lock);
  if (shared->stopping) {
    pthread_mutex_unlock(&shared->lock);
    command->error->status = OSCAR_CANCELLED;
    snprintf(command->error->text, sizeof command->error->text, "the service has stopped");
    return OSCAR_CANCELLED;
  }
  *shared->commands_end = command;
  shared->commands_end = &command->next;
  pthread_cond_signal(&shared->work);
  while (!command->done) pthread_cond_wait(&shared->answered, &shared->lock);
  pthread_mutex_unlock(&shared->lock);
  return command->status;
}

void service_cancel(struct service *s, uint64_t id) {
  struct shared *shared = &s->shared;
  pthread_mutex_lock(&shared->lock);
  for (struct request *r = shared->live; r; r = r->live_next)
    if (r->id == id) {
      atomic_store(&r->cancelled, true);
      pthread_cond_signal(&shared->work);
    }
  pthread_mutex_unlock(&shared->lock);
}

/* ---- the service's thread ---- */

void command_answer(struct service *s, struct command *c, oscar_status status) {
  struct shared *shared = &s->shared;
  c->status = status;
  error_note(s, status, c->error);
  stats_publish(s); /* who asked for it finds it counted */
  pthread_mutex_lock(&shared->lock);
  c->done = true;
  pthread_cond_broadcast(&shared->answered);
  pthread_mutex_unlock(&shared->lock);
}

/* Those that were put off first: commands keep their order. */
static void run_commands(struct service *s, struct command *list) {
  struct command **at = &s->put_off;
  while (*at) at = &(*at)->next;
  *at = list;
  for (at = &s->put_off; *at;) {
    struct command *c = *at;
    c->state = COMMAND_RUNS;
    const oscar_status status = c->run(s, c);
    if (c->state == COMMAND_PUT_OFF) {
      at = &c->next;
      continue;
    }
    *at = c->next; /* it is gone once its owner wakes */
    if (c->state == COMMAND_RUNS) command_answer(s, c, status);
  }
}

static void finish_commands(struct service *s) {
  while (s->put_off || writer_is_busy(s)) {
    writer_wait(s);
    run_commands(s, NULL);
  }
}

/* Waits for work, for `ns` at most; 0: for as long as it takes. False: that was the time. */
static bool wait_for_work(struct shared *shared, int64_t ns) {
  if (ns == 0) return pthread_cond_wait(&shared->work, &shared->lock) == 0;
  const int64_t until = time_ns() + ns;
  const struct timespec at = {until / 1000000000, until % 1000000000};
  return pthread_cond_timedwait(&shared->work, &shared->lock, &at) == 0;
}

/* Takes what other threads have left; waits for something if there is nothing to do, or until something is due. False: the
 * service is to stop. */
static bool take_work(struct service *s, bool wait, int64_t due_ns) {
  struct shared *shared = &s->shared;
  pthread_mutex_lock(&shared->lock);
  while (wait && !shared->stopping && !shared->inbox && !shared->commands && !writer_has_written(s))
    wait = wait_for_work(shared, due_ns);
  struct request *inbox = shared->inbox;
  struct command *commands = shared->commands;
  const bool goes_on = !shared->stopping;
  shared->inbox = NULL;
  shared->inbox_end = &shared->inbox;
  shared->commands = NULL;
  shared->commands_end = &shared->commands;
  pthread_mutex_unlock(&shared->lock);
  requests_take(s, inbox);
  writer_take(s);
  run_commands(s, commands);
  return goes_on;
}

static void *serve(void *arg) {
  struct service *s = arg;
  int64_t due_ns = 0;
  for (bool idle = false; take_work(s, idle, due_ns);) {
    requests_drop_ended(s);
    requests_admit(s);
    idle = !step_run(s) && !sessions_tidy(s, &due_ns);
    stats_publish(s);
  }
  requests_cancel_all(s);
  finish_commands(s);
  sessions_save_all(s);
  stats_publish(s);
  return NULL;
}

/* ---- beginning and end ---- */

/* The most tokens of one sequence that the budget has room for. */
static int64_t tokens_that_fit(const struct service *s, int64_t most) {
  const size_t budget = s->cache_options.budget_bytes;
  int64_t fits = 0;
  while (fits < most) {
    const int64_t tokens = fits + (most - fits + 1) / 2;
    const size_t bytes = room_for_tokens(s, tokens);
    if (bytes && bytes <= budget)
      fits = tokens;
    else
      most = tokens - 1;
  }
  return fits;
}

static oscar_status check_options(const struct service *s) {
  const struct service_options *o = &s->options;
  if (o->max_running < 1 || o->max_waiting < 1 || o->chunk < 0)
    return set_error(s->context, OSCAR_INVALID_ARGUMENT,
                     "%d sequences at a time, %d requests that wait and prompt chunks of %d tokens are not possible",
                     o->max_running, o->max_waiting, o->chunk);
  if (o->speculation != SPECULATION_OFF && (o->candidates < 1 || o->candidates > MOST_GUESSES))
    return set_error(s->context, OSCAR_INVALID_ARGUMENT, "%d candidates at a time; expected 1 to %d", o->candidates,
                     MOST_GUESSES);
  if (o->speculation == SPECULATION_DRAFT && !o->draft_model)
    return set_error(s->context, OSCAR_INVALID_ARGUMENT, "a draft model is to guess, and none is named");
  return OSCAR_OK;
}

static oscar_status copy_options(struct service *s) {
  struct service_options *o = &s->options;
  if (o->folder && !(o->folder = s->folder = mem_strdup(s->context, o->folder))) return OSCAR_NO_MEMORY;
  s->visible = mem_alloc(s->context, (size_t)o->n_visible, sizeof *s->visible);
  if (!s->visible) return OSCAR_NO_MEMORY;
  if (o->n_visible) memcpy(s->visible, o->visible, (size_t)o->n_visible * sizeof *s->visible);
  o->visible = s->visible;
  const int most = s->engine->options.chunk;                               /* tokens of a step */
  if (o->max_running > most / 2) o->max_running = most > 2 ? most / 2 : 1; /* a prompt is to have room beside them */
  s->chunk = o->chunk ? o->chunk : most;
  if (s->chunk > most) s->chunk = most;
  return OSCAR_OK;
}

static oscar_status measure(struct service *s) {
  oscar_cache_usage usage;
  oscar_cache_usage_get(s->engine->cache, &usage);
  oscar_status status =
      engine_cache_options(s->context, s->engine->model, &s->engine->options, s->engine->codecs, &s->cache_options);
  if (status != OSCAR_OK) return status;
  const oscar_cache_options *c = &s->cache_options;
  s->cache_options.budget_bytes = usage.budget_bytes;
  const int64_t far = (int64_t)PAGE_TOKENS * 64 * (c->sink_pages + c->recent_pages + 4); /* whole blocks of page tables */
  s->coded_page_bytes = oscar_cache_bytes_for(c, far - PAGE_TOKENS, 1, 1) - oscar_cache_bytes_for(c, far - 2 * PAGE_TOKENS, 1, 1);
  s->page_bytes = oscar_cache_bytes_for(c, PAGE_TOKENS + 1, 1, 1) - oscar_cache_bytes_for(c, PAGE_TOKENS, 1, 1);
  s->context_tokens = tokens_that_fit(s, s->engine->options.context);
  if (s->context_tokens >= 2) return OSCAR_OK;
  return set_error(s->context, OSCAR_NO_SPACE, "the cache's %zu bytes are too few for a request; the least that would do is %zu",
                   usage.budget_bytes, room_for_tokens(s, 2));
}

static oscar_status make_parts(struct service *s) {
  oscar_status status = check_options(s);
  if (status == OSCAR_OK) status = copy_options(s);
  if (status == OSCAR_OK) status = measure(s);
  if (status != OSCAR_OK) return status;
  s->admitted = mem_zalloc(s->context, (size_t)s->options.max_running, sizeof(struct answer *));
  s->allowed = s->admitted ? mem_zalloc(s->context, ((size_t)s->vocab + 63) / 64, sizeof *s->allowed) : NULL;
  if (!s->allowed) return OSCAR_NO_MEMORY;
  if (s->options.reuse != OSCAR_PREFIX_OFF && (status = oscar_prefix_create(s->engine->cache, &s->tree)) != OSCAR_OK)
    return status;
  status = step_create(s);
  if (status == OSCAR_OK) status = guesses_create(s);
  return status == OSCAR_OK ? sessions_create(s) : status;
}

static void free_parts(struct service *s) {
  sessions_free(s);
  guesses_free(s);
  step_free(s);
  users_free(s);
  oscar_prefix_free(s->tree);
  if (s->table) token_table_free(s->table);
  mem_free(s->context, s->logits);
  mem_free(s->context, s->allowed);
  mem_free(s->context, s->admitted);
  mem_free(s->context, s->visible);
  mem_free(s->context, s->folder);
  pthread_cond_destroy(&s->shared.answered);
  pthread_cond_destroy(&s->shared.work);
  pthread_mutex_destroy(&s->shared.lock);
  mem_free(s->context, s);
}

oscar_status service_create(struct engine *engine, const struct service_options *options, struct service **service) {
  *service = NULL;
  struct service *s = mem_zalloc(engine->context, 1, sizeof *s);
  if (!s) return OSCAR_NO_MEMORY;
  s->engine = engine;
  s->context = engine->context;
  s->options = *options;
  s->tokenizer = model_tokenizer(engine->model);
  s->vocab = model_geometry_of(engine->model)->vocab;
  s->shared.inbox_end = &s->shared.inbox;
  s->shared.commands_end = &s->shared.commands;
  pthread_mutex_init(&s->shared.lock, NULL);
  pthread_condattr_t monotonic; /* as time_ns */
  pthread_condattr_init(&monotonic);
  pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
  pthread_cond_init(&s->shared.work, &monotonic);
  pthread_condattr_destroy(&monotonic);
  pthread_cond_init(&s->shared.answered, NULL);
  stats_init(&s->stats);
  oscar_status status = make_parts(s);
  if (status == OSCAR_OK) {
    stats_publish(s);
    s->started = pthread_create(&s->thread, NULL, serve, s) == 0;
    if (!s->started) status = set_error(s->context, OSCAR_NO_MEMORY, "the service's thread cannot be started");
  }
  if (status != OSCAR_OK) {
    free_parts(s);
    return status;
  }
  *service = s;
  return OSCAR_OK;
}

static oscar_status cancel_all(struct service *s, struct command *command) {
  (void)command;
  requests_cancel_all(s);
  return OSCAR_OK;
}

void service_drain(struct service *s) {
  struct service_error error;
  struct command command = {.run = cancel_all, .error = &error};
  pthread_mutex_lock(&s->shared.lock);
  s->shared.draining = true;
  pthread_mutex_unlock(&s->shared.lock);
  (void)service_command(s, &command); /* which a service that has stopped refuses */
}

void service_stop(struct service *s) {
  struct shared *shared = &s->shared;
  pthread_mutex_lock(&shared->lock);
  const bool first = !shared->stopping;
  shared->stopping = true;
  pthread_cond_signal(&shared->work);
  while (!first && !shared->ended) pthread_cond_wait(&shared->answered, &shared->lock);
  pthread_mutex_unlock(&shared->lock);
  if (!first) return;
  pthread_join(s->thread, NULL);
  pthread_mutex_lock(&shared->lock);
  shared->ended = true;
  pthread_cond_broadcast(&shared->answered);
  pthread_mutex_unlock(&shared->lock);
}

void service_free(struct service *s) {
  if (!s) return;
  service_stop(s);
  free_parts(s);
}
