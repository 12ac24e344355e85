/*
 * step.c - a step: the next token of every answer that decodes, and a piece of a prompt that is not computed.
 *
 * Of several prompts the oldest and the one with the least left take turns: so a short one is soon done, and a long one gets half
 * of what there is, however many short ones come after it.
 *
 * Alone, a prompt is cut into pieces of the engine's chunk. Beside running answers pieces are smaller, so that nobody's answer
 * stalls for long: their size follows the time that steps have taken. Tokens of prompts and generated ones round as such
 * (model.h), so that where a prompt is cut, and what runs beside it, leaves no trace.
 *
 * Where a GPU chooses tokens, answers that it can choose for are a call of their own.
 *
 * A step fails whole for want of room and is tried again after something has gone: so answers are preempted between steps only.
 */
#include "engine/service/service_private.h"

/* A step with a prompt beside running answers: the next piece is halved until it would take less than the first, and doubled if
 * one has taken less than the second. A prompt begins with FIRST_CHUNK at most: how deep it begins, and so how long a token of it
 * takes, is not known from the prompt before it. */
#define LONG_STEP_NS  80000000
#define SHORT_STEP_NS 36000000
#define LEAST_CHUNK   8
#define FIRST_CHUNK   32

struct step {
  struct forward_job *jobs;
  struct answer **of; /* whose job it is */
  struct sampling *sampling;
  int32_t *next;
  int count;
  int64_t tokens;
  int feeding;  /* the job that is a piece of a prompt, or -1 */
  int most_fed; /* tokens of a piece, where room is scarce */
  uint64_t fed; /* the age of the answer whose prompt the last piece was of */
};

oscar_status step_create(struct service *s) {
  const size_t most = (size_t)s->options.max_running;
  struct step *step = s->step = mem_zalloc(s->context, 1, sizeof *step);
  if (!step) return OSCAR_NO_MEMORY;
  step->jobs = mem_zalloc(s->context, most, sizeof *step->jobs);
  step->of = step->jobs ? mem_zalloc(s->context, most, sizeof(struct answer *)) : NULL;
  step->sampling = step->of ? mem_zalloc(s->context, most, sizeof *step->sampling) : NULL;
  step->next = step->sampling ? mem_zalloc(s->context, most, sizeof *step->next) : NULL;
  if (!step->next) return OSCAR_NO_MEMORY;
  /* A GPU is so fast beside a prompt that it begins with the engine's chunk. */
  if (s->options.chunk == 0 && s->engine->backend->ops->host_memory && s->chunk > FIRST_CHUNK) s->chunk = FIRST_CHUNK;
  return OSCAR_OK;
}

void step_free(struct service *s) {
  if (!s->step) return;
  mem_free(s->context, s->step->jobs);
  mem_free(s->context, s->step->of);
  mem_free(s->context, s->step->sampling);
  mem_free(s->context, s->step->next);
  mem_free(s->context, s->step);
}

/* ---- what a step is made of ---- */

static void add_job(struct step *step, struct answer *a, int n, int outputs, enum token_kind kind) {
  step->jobs[step->count] = (struct forward_job){
      .sequence = a->sequence, .n = n, .ids = a->ids + oscar_sequence_length(a->sequence), .outputs = outputs, .kind = kind};
  step->of[step->count++] = a;
  step->tokens += n;
}

static struct answer *oldest_that_feeds(const struct service *s) {
  struct answer *found = NULL;
  for (int i = 0; i < s->n_admitted; i++) {
    struct answer *a = s->admitted[i];
    if (a->state == ANSWER_FEEDS && (!found || a->age < found->age)) found = a;
  }
  return found;
}

/* Ends at the end of a page where it can: pieces then have few sizes, for which products are planned. */
static int64_t at_page_end(int64_t from, int64_t n) {
  const int64_t over = (from + n) % PAGE_TOKENS;
  return over < n ? n - over : n;
}

/* Somebody's answer waits for the end of the step, or of the one after it. */
static bool anybody_decodes(const struct service *s) {
  for (int i = 0; i < s->n_admitted; i++)
    if (s->admitted[i]->state == ANSWER_DECODES) return true;
  return false;
}

int64_t answer_left(const struct answer *a) { return a->n - oscar_sequence_length(a->sequence); }

struct answer *answer_nearly_fed(const struct service *s) {
  struct answer *found = NULL;
  for (int i = 0; i < s->n_admitted; i++) {
    struct answer *a = s->admitted[i];
    if (a->state == ANSWER_FEEDS && (!found || answer_left(a) < answer_left(found))) found = a;
  }
  return found;
}

static void add_feeding(struct service *s, struct step *step) {
  struct answer *a = oldest_that_feeds(s);
  if (!a) return;
  if (a->age == step->fed) a = answer_nearly_fed(s);
  int64_t most = anybody_decodes(s) ? a->chunk : s->engine->options.chunk;
  if (most > s->engine->options.chunk - step->tokens) most = s->engine->options.chunk - step->tokens;
  if (step->most_fed && most > step->most_fed) most = step->most_fed;
  if (most < 1) return;
  const int64_t from = oscar_sequence_length(a->sequence), prompt = a->n - a->generated;
  const int64_t end = from < prompt ? prompt : a->n - 1; /* the newest token of an answer is a step of its own */
  const int64_t n = end - from <= most ? end - from : at_page_end(from, most);
  step->feeding = step->count;
  add_job(step, a, (int)n, from + n == a->n, from < prompt ? TOKENS_OF_PROMPT : TOKENS_GENERATED);
}

/* drawn: what a GPU chooses tokens for; else everything else, a piece of a prompt included. */
static void make_step(struct service *s, bool drawn) {
  struct step *step = s->step;
  const bool draws = runner_can_sample(s->engine->runner);
  step->count = 0;
  step->tokens = 0;
  step->feeding = -1;
  for (int i = 0; i < s->n_admitted; i++) {
    struct answer *a = s->admitted[i];
    if (a->state != ANSWER_DECODES || (draws && a->n_guesses == 0 && answer_can_be_drawn(a)) != drawn) continue;
    add_job(step, a, 1 + a->n_guesses, 1 + a->n_guesses, TOKENS_GENERATED);
  }
  if (!drawn) add_feeding(s, step);
}

/* Where the logits of `count` jobs from `first` on go. */
static oscar_status place_logits(struct service *s, int first, int count) {
  struct forward_job *jobs = s->step->jobs + first;
  int rows = 0;
  for (int i = 0; i < count; i++) rows += jobs[i].outputs;
  if (rows > s->logit_rows) {
    const int room = rows > 2 * s->logit_rows ? rows : 2 * s->logit_rows;
    float *logits = mem_alloc(s->context, (size_t)room * (size_t)s->vocab, sizeof *logits);
    if (!logits) return OSCAR_NO_MEMORY;
    mem_free(s->context, s->logits);
    s->logits = logits;
    s->logit_rows = room;
  }
  float *to = s->logits;
  for (int i = 0; i < count; i++) {
    jobs[i].logits = jobs[i].outputs ? to : NULL;
    if (jobs[i].outputs) to += (size_t)jobs[i].outputs * (size_t)s->vocab;
  }
  return OSCAR_OK;
}

static oscar_status forward(struct service *s, bool drawn) {
  struct step *step = s->step;
  if (drawn) {
    for (int i = 0; i < step->count; i++) step->sampling[i] = step->of[i]->drawn;
    return runner_sample_all(s->engine->runner, step->count, step->jobs, step->sampling, step->next);
  }
  const oscar_status status = place_logits(s, 0, step->count);
  if (status != OSCAR_OK) return status;
  return runner_forward_all(s->engine->runner, step->count, step->jobs);
}

/* ---- what comes of it ---- */

static void note_fed(struct service *s, const struct step *step) {
  struct answer *a = step->of[step->feeding];
  user_serve(a->request->user, step->jobs[step->feeding].n);
  s->step->fed = a->age;
  answer_insert(s, a);
}

/* The prompt, or what of an answer had to be computed again, is there as far as this job went. */
static void finish_feeding(struct service *s, struct answer *a, const struct forward_job *job) {
  if (a->generated > 0) {
    if (oscar_sequence_length(a->sequence) == a->n - 1) a->state = ANSWER_DECODES;
    return;
  }
  if (!job->outputs) return;
  a->state = ANSWER_DECODES;
  answers_fork(s, a, job->logits);
  answer_choose(s, a, job->logits);
}

static void finish_job(struct service *s, struct step *step, int i, bool drawn) {
  struct answer *a = step->of[i];
  if (i == step->feeding) {
    note_fed(s, step);
    finish_feeding(s, a, &step->jobs[i]);
    return;
  }
  if (!drawn && a->n_guesses > 0) {
    guesses_look_at(s, a, step->jobs[i].logits);
    return;
  }
  if (oscar_sequence_length(a->sequence) % PAGE_TOKENS == 0) answer_insert(s, a);
  a->is_drawn = false;
  if (drawn)
    answer_take(s, a, step->next[i], NULL);
  else
    answer_choose(s, a, step->jobs[i].logits);
}

/* One job of a step alone. */
static oscar_status run_alone(struct service *s, int i, bool drawn) {
  struct step *step = s->step;
  struct runner *runner = s->engine->runner;
  oscar_status status = drawn ? OSCAR_OK : place_logits(s, i, 1);
  if (status != OSCAR_OK) return status;
  do
    status = drawn ? runner_sample_all(runner, 1, &step->jobs[i], &step->sampling[i], &step->next[i])
                   : runner_forward_all(runner, 1, &step->jobs[i]);
  while (room_after(s, status));
  return status;
}

/* Where the step as a whole failed: each job alone. Those that fail again end their answers. */
static void run_each(struct service *s, bool drawn) {
  struct step *step = s->step;
  for (int i = 0; i < step->count; i++) {
    const oscar_status status = run_alone(s, i, drawn);
    if (status == OSCAR_OK)
      finish_job(s, step, i, drawn);
    else if (status != OSCAR_NO_SPACE) /* else it is tried again in the next step */
      answer_finish(s, step->of[i], FINISH_ERROR, NULL, status);
  }
}

/* Something goes so that the step can be tried again: what nobody uses, else the youngest answer. False: the answer that is left
 * does not fit alone, although it was admitted. */
static bool make_way(struct service *s) {
  if (room_make(s) || youngest_preempt(s, 2)) return true;
  struct step *step = s->step;
  if (step->feeding < 0 || step->jobs[step->feeding].n == 1) return false;
  step->most_fed = step->jobs[step->feeding].n / 2;
  return true;
}

/* By what a step with a piece of `fed` tokens has taken. On a GPU the next prompt begins where this one is. */
static void adapt_chunk(struct service *s, struct answer *a, int64_t ns, int fed) {
  if (s->options.chunk) return;
  if (ns < SHORT_STEP_NS && fed >= a->chunk - PAGE_TOKENS && 2 * a->chunk <= s->engine->options.chunk) a->chunk *= 2;
  for (; ns > LONG_STEP_NS && a->chunk >= 2 * LEAST_CHUNK; ns /= 2) a->chunk /= 2;
  if (!s->engine->backend->ops->host_memory) s->chunk = a->chunk;
}

/* Of steps that decode only: each reads all that its sequences hold. A GPU tells the time of the step as a whole. */
static void note_attention(struct service *s, const struct step *step, int64_t ns) {
  const bool host = s->engine->backend->ops->host_memory;
  for (int i = 0; i < step->count; i++) s->stats.attention_bytes += (double)oscar_sequence_bytes(step->jobs[i].sequence);
  s->stats.attention_s += (double)(host ? runner_attention_ns(s->engine->runner) : ns) * 1e-9;
}

static bool run(struct service *s, bool drawn) {
  struct step *step = s->step;
  oscar_status status;
  int64_t begun;
  step->most_fed = 0;
  do {
    make_step(s, drawn);
    if (step->count == 0) return false;
    begun = time_ns();
    status = forward(s, drawn);
  } while (status == OSCAR_NO_SPACE && make_way(s));
  if (status != OSCAR_OK && step->count > 1) {
    run_each(s, drawn);
    return true;
  }
  if (status != OSCAR_OK) {
    answer_finish(s, step->of[0], FINISH_ERROR, NULL, status);
    return true;
  }
  const int64_t ns = time_ns() - begun;
  s->stats.steps++;
  histogram_note(&s->stats.step, ns);
  if (step->feeding < 0) note_attention(s, step, ns);
  if (step->feeding > 0) adapt_chunk(s, step->of[step->feeding], ns, step->jobs[step->feeding].n);
  for (int i = 0; i < step->count; i++) finish_job(s, step, i, drawn);
  return true;
}

bool step_run(struct service *s) {
  const bool draws = runner_can_sample(s->engine->runner);
  guesses_make(s, s->engine->options.chunk / 2);
  const bool drew = draws && run(s, true), ran = run(s, false);
  return drew || ran;
}
