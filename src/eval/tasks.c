/*
 * tasks.c - running haystacks through several caches.
 *
 * Cell by cell (one task at one length) the haystacks are made first; then one lane at a time is open and reads all of them, so
 * that the memory of one cache is enough. The lane holds a haystack's common beginning; a fork of it takes the question and gives
 * the first logits of the answer, a fork of that takes the right answer, and the fork itself goes on with its own.
 */
#include "eval/tasks.h"

#include "engine/logits.h"
#include "eval/eval.h"
#include "eval/lane.h"
#include "eval/prompt.h"
#include "eval/statistics.h"
#include "eval/text.h"

#include <math.h>
#include <string.h>

enum { GOLD_ROWS = 16 }; /* rows of logits at once; more would only cost memory */

struct run {
  struct model *model;
  oscar_context *context;
  const struct tasks_options *options;
  struct prompt_form form;
  int vocab;
  float *logits; /* [vocab], after the newest token */
  float *rows;   /* [GOLD_ROWS][vocab] */
  struct haystack *haystack;
  struct task_cell *cell; /* the one at work */
  struct lane_progress progress;
};

void tasks_options_default(struct tasks_options *options) {
  *options = (struct tasks_options){.questions = 100, .seed = 1, .sink_pages = 1, .recent_pages = 4, .chunk = 256};
}

/* Tokens that a prompt may have, with room for the answer. */
static int prompt_room(const struct model *model, int length) {
  const int64_t room = model_geometry_of(model)->context_trained - TASKS_ANSWER;
  return length < room ? length : (int)room;
}

oscar_status tasks_options_check(const struct model *model, const struct tasks_options *o) {
  oscar_context *context = model_context(model);
  if (o->tasks < 1 || o->lengths < 1 || o->questions < 1 || o->chunk < 1)
    return set_error(context, OSCAR_INVALID_ARGUMENT,
                     "%d tasks, %d lengths, %d questions, chunks of %d tokens; expected at least 1 of each", o->tasks, o->lengths,
                     o->questions, o->chunk);
  const int64_t coded = lane_first_coded(o->sink_pages, o->recent_pages);
  for (int i = 0; i < o->lengths; i++) {
    const int length = o->length[i];
    if (length < HAYSTACK_LEAST || length > HAYSTACK_MOST)
      return set_error(context, OSCAR_INVALID_ARGUMENT, "prompts of %d tokens; expected %d to %d", length, HAYSTACK_LEAST,
                       HAYSTACK_MOST);
    if (length <= coded)
      return set_error(context, OSCAR_INVALID_ARGUMENT,
                       "in a prompt of %d tokens nothing is read as codes: with these windows it takes more than %lld", length,
                       (long long)coded);
    if (prompt_room(model, length) < length - length / 50)
      return set_error(context, OSCAR_INVALID_ARGUMENT,
                       "prompts of %d tokens and %d for the answer; this model was trained for %lld", length, TASKS_ANSWER,
                       (long long)model_geometry_of(model)->context_trained);
  }
  return OSCAR_OK;
}

/* ---- one answer ---- */

static oscar_status check_finite(const struct lane *lane, double log_sum) {
  if (isfinite(log_sum)) return OSCAR_OK;
  return set_error(lane->context, OSCAR_NUMERIC, "cache %s gives logits that are not finite", lane->kv);
}

/* Adds to *loss what the row of logits says about the token. */
static oscar_status add_loss(const struct run *r, const struct lane *lane, const float *row, int32_t token, double *loss) {
  double log_sum;
  int32_t best;
  logits_summary(row, r->vocab, &log_sum, &best);
  *loss += log_sum - (double)row[token];
  return check_finite(lane, log_sum);
}

/* The right answer after `asked`, whose last token gave r->logits. */
static oscar_status score_gold(struct run *r, struct lane *lane, const oscar_sequence *asked, const struct haystack_question *q,
                               double *loss) {
  *loss = 0;
  oscar_status status = add_loss(r, lane, r->logits, q->gold[0], loss);
  oscar_sequence *fork = NULL;
  if (status == OSCAR_OK) status = oscar_sequence_fork(asked, &fork);
  for (int done = 0; done < q->gold_count - 1 && status == OSCAR_OK;) {
    int n = q->gold_count - 1 - done;
    if (n > GOLD_ROWS) n = GOLD_ROWS;
    if (n > lane->chunk) n = lane->chunk;
    status = lane_forward(lane, fork, q->gold + done, n, n, r->rows);
    for (int i = 0; i < n && status == OSCAR_OK; i++)
      status = add_loss(r, lane, r->rows + (size_t)i * (size_t)r->vocab, q->gold[done + i + 1], loss);
    done += n;
  }
  oscar_sequence_free(fork);
  return status;
}

static int answer_room(const struct haystack_question *q) {
  const int room = 2 * q->gold_count + 16;
  return room < TASKS_ANSWER ? room : TASKS_ANSWER;
}

/* Goes on greedily from r->logits until the answer is decided. */
static oscar_status answer(struct run *r, struct lane *lane, oscar_sequence *sequence, const struct haystack_question *q,
                           struct task_reply *reply) {
  const struct tokenizer *tokenizer = model_tokenizer(r->model);
  const enum word_shape shape = task_shape(r->cell->task);
  const int room = answer_room(q);
  struct text said = {.context = r->context};
  struct answer_state state = {false, false};
  oscar_status status = OSCAR_OK;
  for (int n = 1; status == OSCAR_OK && !state.decided; n++) {
    double log_sum;
    int32_t token;
    logits_summary(r->logits, r->vocab, &log_sum, &token);
    status = check_finite(lane, log_sum);
    const bool end = tokenizer_is_end(tokenizer, token);
    size_t bytes = 0;
    const char *piece = tokenizer_piece(tokenizer, token, false, &bytes);
    if (!end) text_add_bytes(&said, piece, bytes);
    state = answer_judge(shape, text_string(&said), said.bytes, end || n == room, q->values, q->expected);
    if (status == OSCAR_OK && !state.decided) status = lane_forward(lane, sequence, &token, 1, 1, r->logits);
  }
  reply->right = state.right;
  reply->text = mem_strdup(r->context, text_string(&said));
  if (status == OSCAR_OK && (said.failed || !reply->text)) status = OSCAR_NO_MEMORY;
  text_free(&said);
  return status;
}

static oscar_status ask(struct run *r, struct lane *lane, const struct haystack *h, const struct haystack_question *q,
                        struct task_reply *reply) {
  oscar_sequence *fork = NULL;
  oscar_status status = oscar_sequence_fork(lane->sequence, &fork);
  if (status == OSCAR_OK) status = lane_feed(lane, fork, q->ids + h->common, q->count - h->common, r->logits, NULL);
  if (status == OSCAR_OK) status = score_gold(r, lane, fork, q, &reply->loss);
  if (status == OSCAR_OK) status = answer(r, lane, fork, q, reply);
  if (status == OSCAR_OK) status = lane_progress_add(r->context, &r->progress, TASKS_ANSWER);
  oscar_sequence_free(fork);
  return status;
}

/* ---- one cache over the haystacks of a cell ---- */

static oscar_status read_haystack(struct run *r, struct lane *lane, int cache, int index, int first_question) {
  const struct haystack *h = &r->haystack[index];
  struct task_score *score = &r->cell->score[cache];
  oscar_status status = oscar_sequence_create(lane->cache, &lane->sequence);
  if (status == OSCAR_OK) status = lane_feed(lane, lane->sequence, h->question[0].ids, h->common, NULL, &r->progress);
  if (status == OSCAR_OK) status = lane_progress_add(r->context, &r->progress, r->cell->length - h->common);
  if (status == OSCAR_OK) {
    score->bits_per_element = oscar_sequence_bits_per_element(lane->sequence);
    score->cache_bytes = oscar_sequence_bytes(lane->sequence);
  }
  for (int i = 0; i < h->questions && status == OSCAR_OK; i++)
    status = ask(r, lane, h, &h->question[i], &r->cell->question[first_question + i].reply[cache]);
  oscar_sequence_free(lane->sequence);
  lane->sequence = NULL;
  return status;
}

static oscar_status run_cache(struct run *r, int cache, const char *kv, const oscar_codec_set *codecs) {
  const struct tasks_options *o = r->options;
  /* A haystack, the question on it, the right answer on that. */
  const struct lane_options options = {(int64_t)r->cell->longest + TASKS_ANSWER, 3, o->sink_pages, o->recent_pages, o->chunk};
  struct lane lane;
  oscar_status status = lane_open(r->model, &options, kv, codecs, &lane);
  for (int i = 0, asked = 0; i < r->cell->haystacks && status == OSCAR_OK; i++) {
    status = read_haystack(r, &lane, cache, i, asked);
    asked += r->haystack[i].questions;
  }
  lane_close(&lane);
  return status;
}

/* ---- scores ---- */

static void score_cache(struct task_cell *cell, int cache) {
  struct task_score *s = &cell->score[cache];
  double loss = 0, tokens = 0;
  for (int i = 0; i < cell->questions; i++) {
    const struct task_question *q = &cell->question[i];
    const bool right = q->reply[cache].right, bf16 = q->reply[0].right;
    s->right += right;
    s->only_bf16 += bf16 && !right;
    s->only_this += right && !bf16;
    loss += q->reply[cache].loss;
    tokens += q->gold_tokens;
  }
  s->share = (double)s->right / cell->questions;
  s->loss = loss / tokens;
  wilson_interval(s->right, cell->questions, &s->low, &s->high);
  s->p = mcnemar_p(s->only_bf16, s->only_this);
}

/* ---- a cell ---- */

static oscar_status note_question(oscar_context *context, const struct haystack_question *q, int haystack, int caches,
                                  struct task_question *out) {
  struct text expected = {.context = context};
  for (int i = 0; i < q->values; i++) text_add(&expected, "%s%s", i ? ", " : "", q->expected[i]);
  *out = (struct task_question){.haystack = haystack, .depth = q->depth, .gold_tokens = q->gold_count, .expected = expected.data};
  out->asked = mem_strdup(context, q->text);
  out->reply = mem_zalloc(context, (size_t)caches, sizeof *out->reply);
  return expected.failed || !out->asked || !out->reply ? OSCAR_NO_MEMORY : OSCAR_OK;
}

/* Questions are shared out evenly; where that leaves some over, the first haystacks have one more. */
static int first_question(const struct task_cell *cell, int haystack) {
  return (int)(((int64_t)cell->questions * haystack + cell->haystacks - 1) / cell->haystacks);
}

static oscar_status make_haystack(struct run *r, int index, int caches, int tokens) {
  const struct tasks_options *o = r->options;
  struct task_cell *cell = r->cell;
  const int asked = first_question(cell, index);
  const struct haystack_spec spec = {cell->task, tokens,         first_question(cell, index + 1) - asked, o->seed, index,
                                     o->filler,  o->filler_bytes};
  struct haystack *h = &r->haystack[index];
  oscar_status status = haystack_make(r->context, &r->form, &spec, h);
  for (int i = 0; i < h->questions && status == OSCAR_OK; i++) {
    const struct haystack_question *q = &h->question[i];
    if (q->count > cell->longest) cell->longest = q->count;
    if (cell->shortest == 0 || q->count < cell->shortest) cell->shortest = q->count;
    status = note_question(r->context, q, index, caches, &cell->question[asked + i]);
  }
  return status;
}

static oscar_status make_cell(struct run *r, int caches) {
  struct task_cell *cell = r->cell;
  const int tokens = prompt_room(r->model, cell->length);
  oscar_status status = OSCAR_OK;
  cell->question = mem_zalloc(r->context, (size_t)cell->questions, sizeof *cell->question);
  cell->score = mem_zalloc(r->context, (size_t)caches, sizeof *cell->score);
  r->haystack = mem_zalloc(r->context, (size_t)cell->haystacks, sizeof *r->haystack);
  if (!cell->question || !cell->score || !r->haystack) return OSCAR_NO_MEMORY;
  for (int i = 0; i < cell->haystacks && status == OSCAR_OK; i++) status = make_haystack(r, i, caches, tokens);
  return status;
}

static void free_haystacks(struct run *r) {
  for (int i = 0; r->haystack && i < r->cell->haystacks; i++) haystack_free(r->context, &r->haystack[i]);
  mem_free(r->context, r->haystack);
  r->haystack = NULL;
}

static oscar_status run_cell(struct run *r, const struct tasks_result *result, const oscar_codec_set *const *sets) {
  oscar_status status = make_cell(r, result->caches);
  for (int i = 0; i < result->caches && status == OSCAR_OK; i++) {
    status = run_cache(r, i, result->kv[i], sets[i]);
    if (status == OSCAR_OK) score_cache(r->cell, i);
  }
  free_haystacks(r);
  return status;
}

/* ---- the whole ---- */

static void free_cell(oscar_context *context, struct task_cell *cell, int caches) {
  for (int i = 0; cell->question && i < cell->questions; i++) {
    struct task_question *q = &cell->question[i];
    for (int k = 0; q->reply && k < caches; k++) mem_free(context, q->reply[k].text);
    mem_free(context, q->reply);
    mem_free(context, q->asked);
    mem_free(context, q->expected);
  }
  mem_free(context, cell->question);
  mem_free(context, cell->score);
}

static oscar_status list_cells(struct run *r, struct tasks_result *result) {
  const struct tasks_options *o = r->options;
  result->cell = mem_zalloc(r->context, (size_t)o->tasks * (size_t)o->lengths, sizeof *result->cell);
  if (!result->cell) return OSCAR_NO_MEMORY;
  for (int t = 0; t < o->tasks; t++)
    for (int l = 0; l < o->lengths; l++) {
      const int per_haystack = haystack_questions(o->length[l]);
      struct task_cell *cell = &result->cell[result->cells++];
      *cell = (struct task_cell){.task = o->task[t], .length = o->length[l], .questions = o->questions};
      cell->haystacks = (o->questions + per_haystack - 1) / per_haystack;
      /* A haystack counts as its length, a question with its answer as TASKS_ANSWER: fewer tokens, but slower ones. */
      const int64_t tokens = (int64_t)cell->haystacks * cell->length + (int64_t)cell->questions * TASKS_ANSWER;
      r->progress.total += tokens * result->caches;
    }
  return OSCAR_OK;
}

static oscar_status run_cells(struct run *r, struct prompt_writer *writer, const oscar_codec_set *const *sets,
                              struct tasks_result *result) {
  r->form = prompt_writer_form(writer);
  snprintf(result->prompts, sizeof result->prompts, "%s", prompt_writer_name(writer));
  oscar_status status = list_cells(r, result);
  for (int i = 0; i < result->cells && status == OSCAR_OK; i++) {
    r->cell = &result->cell[i];
    status = run_cell(r, result, sets);
    if (status == OSCAR_OK) continue;
    free_cell(r->context, r->cell, result->caches);
    result->cells = i; /* those that are complete */
  }
  return status;
}

oscar_status eval_tasks(struct model *model, const struct tasks_options *options, int count, const char *const *kv,
                        oscar_codec_set *const *sets, const struct progress *progress, struct tasks_result *result) {
  *result = (struct tasks_result){0};
  struct run r = {.model = model, .context = model_context(model), .options = options, .vocab = model_geometry_of(model)->vocab};
  r.progress = (struct lane_progress){.progress = progress, .what = "tokens"};
  struct prompt_writer writer;
  oscar_status status = tasks_options_check(model, options);
  if (status == OSCAR_OK) status = prompt_writer_open(model, &writer);
  if (status != OSCAR_OK) return status;
  const oscar_codec_set **own_sets = mem_alloc(r.context, (size_t)count + 1, sizeof *own_sets);
  result->kv = mem_alloc(r.context, (size_t)count + 1, sizeof *result->kv);
  r.logits = mem_alloc(r.context, (size_t)r.vocab, sizeof *r.logits);
  r.rows = mem_alloc(r.context, (size_t)r.vocab * GOLD_ROWS, sizeof *r.rows);
  status = own_sets && result->kv && r.logits && r.rows ? OSCAR_OK : OSCAR_NO_MEMORY;
  if (status == OSCAR_OK) result->caches = lane_order(count, kv, sets, result->kv, own_sets);
  if (status == OSCAR_OK) status = run_cells(&r, &writer, own_sets, result);
  mem_free(r.context, own_sets);
  mem_free(r.context, r.logits);
  mem_free(r.context, r.rows);
  if (status != OSCAR_OK && !(status == OSCAR_CANCELLED && result->cells > 0)) tasks_result_free(r.context, result);
  return status;
}

void tasks_result_free(oscar_context *context, struct tasks_result *result) {
  for (int i = 0; i < result->cells; i++) free_cell(context, &result->cell[i], result->caches);
  mem_free(context, result->cell);
  mem_free(context, result->kv);
  *result = (struct tasks_result){0};
}
