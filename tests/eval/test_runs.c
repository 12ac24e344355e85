/* Both measures end to end on the default model, briefly: numbers are worked out again by the slow way round (no forks, one token
 * at a time), and what must hold between caches is looked at. */
#include "support.h"

#include "eval/eval.h"
#include "eval/generation.h"
#include "eval/lane.h"
#include "eval/prompt.h"
#include "eval/tasks.h"

#include <math.h>

static oscar_context *context;
static struct backend *backend;
static struct model *model;
static oscar_codec_set *sets[2]; /* of kv */
static const char *const kv[] = {"int8", "bf16"};

static int open_model(void **state) {
  (void)state;
  const char *path = test_model("smollm2-135m");
  if (!path) exit(SKIPPED);
  context = test_context(OSCAR_ISA_AUTO, 0);
  assert_ok(context, backend_create_cpu(context, &backend));
  assert_ok(context, model_load(context, backend, path, &model));
  for (int i = 0; i < 2; i++) assert_ok(context, codec_set_obtain(model, kv[i], NULL, NULL, &sets[i]));
  return 0;
}

static int close_model(void **state) {
  (void)state;
  for (int i = 0; i < 2; i++) oscar_codec_set_free(sets[i]);
  model_free(model);
  backend->ops->free(backend);
  oscar_context_free(context);
  return 0;
}

/* Log probability of `token` after the row, in long double. */
static double log_probability(const float *row, int32_t token) {
  const int vocab = model_geometry_of(model)->vocab;
  long double sum = 0;
  for (int i = 0; i < vocab; i++) sum += expl((long double)row[i] - (long double)row[token]);
  return (double)-logl(sum);
}

/* The negative log likelihood of n tokens after a prompt, in a sequence of their own. The prompt is read in two goes, cut at
 * `cut`, and the tokens in one: as many at once go through the same products as where they are compared with. */
static double loss_of(const int32_t *ids, int cut, int count, const int32_t *given, int n) {
  const struct lane_options options = {count + n, 1, 1, 4, 256};
  const size_t vocab = (size_t)model_geometry_of(model)->vocab;
  float *logits = malloc((size_t)n * vocab * sizeof *logits);
  struct lane lane;
  double loss = 0;
  assert_ok(context, lane_open(model, &options, "bf16", NULL, &lane));
  assert_ok(context, oscar_sequence_create(lane.cache, &lane.sequence));
  assert_ok(context, lane_feed(&lane, lane.sequence, ids, cut, logits, NULL));
  assert_ok(context, lane_feed(&lane, lane.sequence, ids + cut, count - cut, logits, NULL));
  if (n > 1) assert_ok(context, lane_forward(&lane, lane.sequence, given, n - 1, n - 1, logits + vocab));
  for (int i = 0; i < n; i++) loss -= log_probability(logits + (size_t)i * vocab, given[i]);
  lane_close(&lane);
  free(logits);
  return loss;
}

/* Reads a prompt in one go and goes on with the n most likely tokens, one by one: their negative log likelihood, and their text
 * [room]. */
static double go_on(const int32_t *ids, int count, int n, char *text, size_t room) {
  const struct lane_options options = {count + n, 1, 1, 4, 256};
  const int vocab = model_geometry_of(model)->vocab;
  float *logits = malloc((size_t)vocab * sizeof *logits);
  struct lane lane;
  double loss = 0;
  assert_ok(context, lane_open(model, &options, "bf16", NULL, &lane));
  assert_ok(context, oscar_sequence_create(lane.cache, &lane.sequence));
  assert_ok(context, lane_feed(&lane, lane.sequence, ids, count, logits, NULL));
  text[0] = '\0';
  for (int i = 0; i < n; i++) {
    int32_t token = 0;
    for (int32_t k = 0; k < vocab; k++)
      if (logits[k] > logits[token]) token = k;
    loss -= log_probability(logits, token);
    size_t bytes;
    const char *piece = tokenizer_piece(model_tokenizer(model), token, false, &bytes);
    snprintf(text + strlen(text), room - strlen(text), "%.*s", (int)bytes, piece);
    assert_ok(context, lane_forward(&lane, lane.sequence, &token, 1, 1, logits));
  }
  lane_close(&lane);
  free(logits);
  return loss;
}

static void tasks_score_what_a_plain_run_gives(void **state) {
  (void)state;
  struct tasks_options o;
  tasks_options_default(&o);
  o.tasks = 1;
  o.task[0] = TASK_CODE;
  o.lengths = 1;
  o.length[0] = 512;
  o.questions = 3; /* two haystacks: one of 2 questions, one of 1 */
  struct tasks_result r;
  assert_ok(context, eval_tasks(model, &o, 2, kv, sets, NULL, &r));
  assert_int_equal(r.caches, 2); /* bf16 once */
  assert_string_equal(r.kv[0], "bf16");
  assert_string_equal(r.kv[1], "int8");
  assert_int_equal(r.cells, 1);
  const struct task_cell *cell = &r.cell[0];
  assert_true(cell->haystacks == 2 && cell->longest <= 512 && cell->shortest >= 490);

  struct prompt_writer writer;
  assert_ok(context, prompt_writer_open(model, &writer));
  const struct prompt_form form = prompt_writer_form(&writer);
  const struct haystack_spec spec = {.task = TASK_CODE, .tokens = 512, .questions = 2, .seed = o.seed};
  struct haystack h;
  assert_ok(context, haystack_make(context, &form, &spec, &h));
  for (int i = 0; i < 2; i++) {
    assert_string_equal(cell->question[i].asked, h.question[i].text);
    assert_string_equal(cell->question[i].expected, h.question[i].expected[0]);
  }
  /* The second question: the first one and its answer must have left no trace. */
  const struct task_reply *reply = cell->question[1].reply;
  const struct haystack_question *q = &h.question[1];
  char text[1024];
  const double loss = loss_of(q->ids, h.common, q->count, q->gold, q->gold_count);
  printf("  loss %.4f, without forks %.4f, int8 %.4f\n", reply[0].loss, loss, reply[1].loss);
  (void)go_on(q->ids, q->count, 6, text, sizeof text); /* as many as an answer has at least */
  assert_true(strlen(text) > 3);
  assert_memory_equal(reply[0].text, text, strlen(text));
  assert_true(fabs(reply[0].loss - loss) < 0.005 * (1 + loss));
  assert_true(fabs(reply[1].loss - loss) < 0.1 * (1 + loss) && reply[1].loss != reply[0].loss); /* close, and not the same */
  haystack_free(context, &h);

  for (int k = 0; k < 2; k++) {
    const struct task_score *s = &cell->score[k];
    int right = 0, only_bf16 = 0, only_this = 0;
    for (int i = 0; i < 3; i++) {
      const bool bf16 = cell->question[i].reply[0].right, this = cell->question[i].reply[k].right;
      right += this;
      only_bf16 += bf16 && !this;
      only_this += this && !bf16;
    }
    assert_true(s->right == right && s->only_bf16 == only_bf16 && s->only_this == only_this);
    assert_true(s->low <= s->share && s->share <= s->high && s->loss > 0 && s->p > 0 && s->p <= 1);
  }
  assert_true(cell->score[1].cache_bytes < cell->score[0].cache_bytes);
  tasks_result_free(context, &r);
}

static bool stop_at_half(void *user, const char *what, int64_t done, int64_t total) {
  (void)user;
  (void)what;
  return 2 * done < total;
}

static void wrong_options_are_refused_and_ctrl_c_ends_the_work(void **state) {
  (void)state;
  struct tasks_options o;
  tasks_options_default(&o);
  struct tasks_result r;
  assert_int_equal(eval_tasks(model, &o, 2, kv, sets, NULL, &r), OSCAR_INVALID_ARGUMENT);
  o.tasks = o.lengths = o.questions = 1;
  o.length[0] = 100;
  assert_int_equal(eval_tasks(model, &o, 2, kv, sets, NULL, &r), OSCAR_INVALID_ARGUMENT);
  o.length[0] = 384; /* nothing is coded in so short a prompt: pages 0 and 1 to 5 are in the windows */
  assert_int_equal(tasks_options_check(model, &o), OSCAR_INVALID_ARGUMENT);
  o.length[0] = 385;
  assert_ok(context, tasks_options_check(model, &o));
  o.length[0] = 20000; /* more than the model was trained for */
  assert_int_equal(tasks_options_check(model, &o), OSCAR_INVALID_ARGUMENT);
  o.length[0] = 8192; /* all of its context: the answer takes some of it */
  assert_ok(context, tasks_options_check(model, &o));
  o.length[0] = 512;
  const struct progress stopping = {stop_at_half, NULL};
  assert_int_equal(eval_tasks(model, &o, 1, kv, sets, &stopping, &r), OSCAR_CANCELLED);
  assert_true(r.cells == 0 && !r.cell);
  o.lengths = 2; /* the second cell is the one that half of the work falls into: the first is kept */
  o.length[1] = 600;
  assert_int_equal(eval_tasks(model, &o, 1, kv, sets, &stopping, &r), OSCAR_CANCELLED);
  assert_true(r.cells == 1 && r.cell[0].length == 512 && r.cell[0].question[0].reply[0].text);
  tasks_result_free(context, &r);

  struct generation_options g;
  generation_options_default(&g);
  g.tokens = 8192;
  assert_int_equal(generation_options_check(model, &g), OSCAR_INVALID_ARGUMENT);
  g.tokens = 10; /* nothing is coded */
  g.seeds = 1;
  struct generation_result written;
  assert_int_equal(eval_generation(model, &g, 0, kv, sets, NULL, &written), OSCAR_INVALID_ARGUMENT);
  g.sink_pages = g.recent_pages = 0;
  g.tokens = 40;
  assert_int_equal(eval_generation(model, &g, 0, kv, sets, &stopping, &written), OSCAR_CANCELLED);
  assert_true(written.runs == 0 && !written.run);
}

static void greedy_texts_have_the_likelihood_of_their_tokens(void **state) {
  (void)state;
  static const char *const prompt[] = {"Write a list of colours."};
  struct generation_options o;
  generation_options_default(&o);
  o.tokens = 40;
  o.seeds = 1;
  o.sink_pages = o.recent_pages = 0;
  o.prompts = 1;
  o.prompt = prompt;
  o.sampling.temperature = 0;
  struct generation_result r;
  assert_ok(context, eval_generation(model, &o, 2, kv, sets, NULL, &r));
  assert_true(r.runs == 2 && r.texts == 1 && isnan(r.seeds_differ_at));
  assert_true(r.run[0].differs_at == 40);
  assert_true((r.run[1].differs_at == 40) == (strcmp(r.run[0].text[0].text, r.run[1].text[0].text) == 0));
  assert_true(isnan(r.run[1].summary[WRITTEN_LIKELIHOOD].shift) && r.run[1].summary[WRITTEN_LIKELIHOOD].p == 1);

  struct prompt_writer writer;
  assert_ok(context, prompt_writer_open(model, &writer));
  const struct prompt_form form = prompt_writer_form(&writer);
  int32_t *ids;
  int count;
  assert_ok(context, form.encode(form.user, prompt[0], "", &ids, &count));
  char text[1024];
  const double loss = go_on(ids, count, 40, text, sizeof text);
  assert_string_equal(text, r.run[0].text[0].text);
  assert_true(fabs(r.run[0].text[0].measure[WRITTEN_LIKELIHOOD] + loss / 40) < 0.005 * (1 + loss / 40));
  mem_free(context, ids);
  generation_result_free(context, &r);
}

static void seeds_make_texts_and_the_same_seeds_make_the_same(void **state) {
  (void)state;
  static const char *const prompt[] = {"Tell me a story.", "Describe a town."};
  struct generation_options o;
  generation_options_default(&o);
  o.tokens = 30;
  o.sink_pages = o.recent_pages = 0;
  o.prompts = 2;
  o.prompt = prompt;
  struct generation_result a, b;
  assert_ok(context, eval_generation(model, &o, 0, kv, sets, NULL, &a));
  assert_ok(context, eval_generation(model, &o, 0, kv, sets, NULL, &b));
  assert_true(a.runs == 1 && a.texts == 4 && a.seeds == 2);
  for (int i = 0; i < 4; i++) {
    const struct written_text *text = &a.run[0].text[i];
    assert_int_equal(text->prompt, i / 2);
    assert_int_equal(text->seed, 1 + i % 2);
    assert_string_equal(text->text, b.run[0].text[i].text);
    assert_true(text->differs_at == 30 && text->measure[WRITTEN_LIKELIHOOD] == b.run[0].text[i].measure[WRITTEN_LIKELIHOOD]);
  }
  assert_true(a.seeds_differ_at < 30);
  const struct written_summary *s = &a.run[0].summary[WRITTEN_LIKELIHOOD];
  double mean = 0, variance = 0;
  for (int i = 0; i < 4; i++) mean += a.run[0].text[i].measure[WRITTEN_LIKELIHOOD] / 4;
  for (int i = 0; i < 4; i += 2) /* of two numbers: half their difference squared; then the mean over the prompts */
    variance += pow(a.run[0].text[i].measure[WRITTEN_LIKELIHOOD] - a.run[0].text[i + 1].measure[WRITTEN_LIKELIHOOD], 2) / 2 / 2;
  assert_true(fabs(s->mean - mean) < 1e-12 && fabs(s->deviation - sqrt(variance)) < 1e-12);
  generation_result_free(context, &a);
  generation_result_free(context, &b);
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(tasks_score_what_a_plain_run_gives),
                                     cmocka_unit_test(wrong_options_are_refused_and_ctrl_c_ends_the_work),
                                     cmocka_unit_test(greedy_texts_have_the_likelihood_of_their_tokens),
                                     cmocka_unit_test(seeds_make_texts_and_the_same_seeds_make_the_same)};
  return cmocka_run_group_tests(tests, open_model, close_model);
}
