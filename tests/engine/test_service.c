/*
 * The service on a small random model: answers together are those of each alone, to the bit, whatever is in the way.
 */
#include "service_client.h"

static struct small_model model;

static int make_model(void **state) {
  (void)state;
  small_model_make(&model, "llama", false, 11);
  return 0;
}
static int free_model(void **state) {
  (void)state;
  small_model_free(&model);
  return 0;
}

/* ---- many requests ---- */

enum { MANY = 24, EVERY_DAY = 12, LONGEST = 700 };

struct work {
  int32_t ids[LONGEST];
  struct request_options options;
};

/* Prompts of all lengths, some with a beginning in common, some sampled. */
static void make_work(struct work *work) {
  static int32_t shared[LONGEST];
  uint64_t random = 5;
  some_ids(77, LONGEST, shared);
  for (int i = 0; i < MANY; i++) {
    const int n = 1 + (int)(test_random(&random) % (i % 3 == 0 ? LONGEST : 150)), answer = 1 + (int)(test_random(&random) % 60);
    some_ids(1000 + (uint64_t)i, n, work[i].ids);
    if (i % 4 == 0) memcpy(work[i].ids, shared, (size_t)(n * 2 / 3) * sizeof *shared);
    work[i].options = client_options(work[i].ids, n, answer);
    if (i % 5 == 1) work[i].options.sampling = (struct sampler_options){.temperature = 1, .top_k = 20, .top_p = 0.9f, .seed = 3};
    if (i % 6 == 2) work[i].options.logprobs = 3;
    if (i % 7 == 3) work[i].options.choices = 2;
  }
}

static void compare_answers(const struct client *a, const struct client *b, int which, const char *how) {
  for (int i = 0; i < a->choices; i++) {
    const struct client_answer *x = &a->answers[i], *y = &b->answers[i];
    if (y->reason == FINISH_ERROR) fail_msg("%s: request %d: %s", how, which, y->error);
    assert_int_equal(x->reason, y->reason);
    assert_int_equal(x->n, y->n);
    for (int t = 0; t < x->n; t++)
      if (x->ids[t] != y->ids[t] || memcmp(&x->logprobs[t], &y->logprobs[t], sizeof(float)) != 0)
        fail_msg("%s: request %d, answer %d: token %d of %d is %d, alone it is %d", how, which, i, t, x->n, y->ids[t], x->ids[t]);
    assert_string_equal(x->text ? x->text : "", y->text ? y->text : "");
  }
}

static void run_alone(const struct rig_options *options, struct work *work, int count, struct client *clients) {
  for (int i = 0; i < count; i++) {
    struct rig r;
    rig_open(&r, options);
    client_submit(r.service, &clients[i], work[i].options);
    client_wait(&clients[i]);
    rig_close(&r);
  }
}

static void run_together(const struct rig_options *options, struct work *work, int count, const struct client *alone,
                         uint64_t seed, const char *how, struct service_stats *stats) {
  struct client clients[MANY];
  int order[MANY];
  struct rig r;
  for (int i = 0; i < count; i++) order[i] = i;
  for (int i = count - 1; i > 0 && seed; i--) {
    const int j = (int)(test_random(&seed) % (uint64_t)(i + 1)), kept = order[i];
    order[i] = order[j];
    order[j] = kept;
  }
  rig_open(&r, options);
  for (int i = 0; i < count; i++) client_submit(r.service, &clients[order[i]], work[order[i]].options);
  for (int i = 0; i < count; i++) client_wait(&clients[i]);
  service_stats_get(r.service, stats);
  rig_close(&r);
  for (int i = 0; i < count; i++) compare_answers(&alone[i], &clients[i], i, how);
  for (int i = 0; i < count; i++) client_clear(&clients[i]);
  printf("  %s: %lld steps, %lld preempted (%lld kept), %lld pages evicted, %lld tokens reused\n", how, (long long)stats->steps,
         (long long)(stats->preempted_kept + stats->preempted_recomputed), (long long)stats->preempted_kept,
         (long long)stats->evicted_leaves, (long long)stats->reused_exact);
}

static void answers_together_are_those_of_each_alone(void **state) {
  (void)state;
  static struct work work[MANY];
  struct client alone[MANY];
  struct service_stats stats;
  const int many = rounds(EVERY_DAY, MANY);
  make_work(work);
  struct rig_options options = rig_options(model.path);
  run_alone(&options, work, many, alone);
  run_together(&options, work, many, alone, 0, "in order", &stats);
  assert_int_equal(stats.requests, many);
  assert_true(stats.reused_exact > 0);
  run_together(&options, work, many, alone, 1, "shuffled", &stats);
  options.threads = 1;
  options.chunk = 50;
  options.service.max_running = 3;
  run_together(&options, work, many, alone, 2, "another chunk", &stats);
  options = rig_options(model.path);
  options.budget_tokens = 800;
  run_together(&options, work, many, alone, 3, "little room", &stats);
  assert_true(stats.evicted_leaves > 0);
  options.service.host_bytes = 0;
  run_together(&options, work, many, alone, 4, "no room elsewhere", &stats);
  options.service.speculation = SPECULATION_LOOKUP;
  run_together(&options, work, many, alone, 7, "with guesses", &stats);
  assert_true(stats.accepted > 0);
  options.service.speculation = SPECULATION_OFF;
  options.service.reuse = OSCAR_PREFIX_OFF;
  run_together(&options, work, many, alone, 5, "nothing reused", &stats);
  assert_int_equal(stats.reused_exact, 0);
  options.kv = "bf16";
  options.service.reuse = OSCAR_PREFIX_EXACT;
  for (int i = 0; i < many; i++) client_clear(&alone[i]);
  run_alone(&options, work, many, alone);
  run_together(&options, work, many, alone, 6, "bf16", &stats);
  for (int i = 0; i < many; i++) client_clear(&alone[i]);
}

/* Short prompts with long answers: they all begin, and then they need more than there is. */
static void preempted_answers_come_back(void **state) {
  (void)state;
  static struct work work[MANY];
  struct client alone[MANY];
  struct service_stats stats;
  const int count = rounds(5, 8);
  for (int i = 0; i < count; i++) {
    const int n = 5 + 13 * i;
    some_ids(500 + (uint64_t)i, n, work[i].ids);
    work[i].options = client_options(work[i].ids, n, 400 - 20 * i);
    if (i % 3 == 1) work[i].options.sampling = (struct sampler_options){.temperature = 1, .top_k = 20, .top_p = 0.9f, .seed = 3};
  }
  struct rig_options options = rig_options(model.path);
  run_alone(&options, work, count, alone);
  options.budget_tokens = 900;
  run_together(&options, work, count, alone, 1, "kept in host memory", &stats);
  assert_true(stats.preempted_kept > 0 && stats.preempted_recomputed == 0);
  assert_int_equal(stats.returned, stats.preempted_kept);
  options.service.host_bytes = 0;
  run_together(&options, work, count, alone, 2, "computed again", &stats);
  assert_true(stats.preempted_recomputed > 0 && stats.preempted_kept == 0);
  options.service.host_bytes = (size_t)1 << 30;
  options.service.speculation = SPECULATION_LOOKUP;
  run_together(&options, work, count, alone, 4, "with guesses", &stats);
  printf("  %lld guessed, %lld right\n", (long long)stats.guessed, (long long)stats.accepted);
  assert_true(stats.accepted > 0);
  options.service.speculation = SPECULATION_DRAFT;
  options.service.draft_model = model.path;
  run_together(&options, work, count, alone, 5, "with a draft", &stats);
  printf("  %lld guessed, %lld right\n", (long long)stats.guessed, (long long)stats.accepted);
  assert_true(stats.accepted > 0);
  options.service.speculation = SPECULATION_OFF;
  options.service.host_bytes = 0;
  options.service.reuse = OSCAR_PREFIX_OFF;
  run_together(&options, work, count, alone, 3, "computed again from nothing", &stats);
  for (int i = 0; i < count; i++) client_clear(&alone[i]);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(answers_together_are_those_of_each_alone),
      cmocka_unit_test(preempted_answers_come_back),
  };
  return cmocka_run_group_tests(tests, make_model, free_model);
}
