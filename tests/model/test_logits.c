/*
 * The forward pass against `transformers` in float32 (stored by tools/make_logit_vectors.py).
 *
 * Tolerance. Our products round activations to about 8 bits (single tokens, int8 blocks) or to BF16 (prompts). The same library's
 * own bfloat16 run of the same weights is a measure of what such rounding does to a given prompt: its distance from float32, root
 * mean square over the vocabulary, is stored with each prompt, and over all prompts together ours must not be larger. Greedy
 * decoding must give the same 64 tokens, or part from them only where the reference's two best logits are less than 0.25 apart.
 */
#include "support.h"

#include "model/model.h"

#include <jansson.h>

#define CLOSE_CALL 0.25

struct loaded {
  oscar_context *context;
  struct backend *backend;
  struct model *model;
  oscar_cache *cache;
  struct runner *runner;
  float *logits;
};

static void open_model(struct loaded *l, const char *path) {
  *l = (struct loaded){.context = test_context(OSCAR_ISA_AUTO, 0)};
  assert_ok(l->context, backend_create_cpu(l->context, &l->backend));
  assert_ok(l->context, model_load(l->context, l->backend, path, &l->model));
  oscar_cache_options cache;
  model_cache_options(l->model, &cache);
  cache.budget_bytes = oscar_cache_bytes_for(&cache, 1024, 1, 512);
  assert_ok(l->context, oscar_cache_create(l->context, &cache, &l->cache));
  assert_ok(l->context, runner_create(l->model, l->cache, 512, &l->runner));
  l->logits = malloc((size_t)model_geometry_of(l->model)->vocab * sizeof *l->logits);
  assert_non_null(l->logits);
}

static void close_model(struct loaded *l) {
  free(l->logits);
  runner_free(l->runner);
  oscar_cache_free(l->cache);
  model_free(l->model);
  l->backend->ops->free(l->backend);
  oscar_context_free(l->context);
}

static int32_t best_of(const float *logits, int vocab) {
  int32_t best = 0;
  for (int i = 1; i < vocab; i++)
    if (logits[i] > logits[best]) best = i;
  return best;
}

static int read_ids(const json_t *array, int32_t *ids, int room) {
  int n = (int)json_array_size(array);
  assert_true(n > 0 && n <= room);
  for (int i = 0; i < n; i++) ids[i] = (int32_t)json_integer_value(json_array_get(array, (size_t)i));
  return n;
}

struct distances { /* sums of squares over the prompts */
  double ours, allowed;
};

static void check_prompt(struct loaded *l, const json_t *entry, struct distances *sums) {
  int32_t ids[256], *encoded;
  const char *text = json_string_value(json_object_get(entry, "prompt"));
  const int n = read_ids(json_object_get(entry, "ids"), ids, 256), vocab = model_geometry_of(l->model)->vocab;
  int count;
  assert_ok(l->context, tokenizer_encode(model_tokenizer(l->model), text, strlen(text), true, &encoded, &count));
  assert_int_equal(count, n);
  assert_memory_equal(encoded, ids, (size_t)n * sizeof *ids);
  mem_free(l->context, encoded);

  oscar_sequence *sequence;
  assert_ok(l->context, oscar_sequence_create(l->cache, &sequence));
  assert_ok(l->context, runner_forward(l->runner, sequence, n, ids, 1, l->logits, NULL));
  const json_t *at = json_object_get(entry, "logit_ids"), *expected = json_object_get(entry, "logits");
  double squares = 0;
  for (size_t i = 0; i < json_array_size(at); i++) {
    double e = (double)l->logits[json_integer_value(json_array_get(at, i))] - json_number_value(json_array_get(expected, i));
    squares += e * e;
  }
  const double rms = sqrt(squares / (double)json_array_size(at)), allowed = json_number_value(json_object_get(entry, "bf16_rms"));
  printf("  %-24.24s rms %.4f, bfloat16 run %.4f", text, rms, allowed);

  const json_t *greedy = json_object_get(entry, "greedy"), *gaps = json_object_get(entry, "gaps");
  size_t step = 0;
  for (; step < json_array_size(greedy); step++) {
    int32_t id = best_of(l->logits, vocab);
    if (id != json_integer_value(json_array_get(greedy, step))) break;
    assert_ok(l->context, runner_forward(l->runner, sequence, 1, &id, 1, l->logits, NULL));
  }
  if (step < json_array_size(greedy)) {
    double gap = json_number_value(json_array_get(gaps, step));
    printf("; parts at token %zu where the reference's best two are %.3f apart\n", step, gap);
    assert_true(gap < CLOSE_CALL);
  } else {
    printf("; the same %zu tokens\n", step);
  }
  sums->ours += rms * rms;
  sums->allowed += allowed * allowed;
  oscar_sequence_free(sequence);
}

static void matches_the_reference(const char *name) {
  const char *path = test_model(name);
  if (!path) skip();
  char file[512];
  snprintf(file, sizeof file, "%s/%s.logits.json", OSCAR_TEST_DATA, name);
  json_t *root = json_load_file(file, 0, NULL), *entry;
  assert_non_null(root);
  struct loaded l;
  open_model(&l, path);
  size_t i;
  struct distances sums = {0};
  json_array_foreach(json_object_get(root, "prompts"), i, entry) check_prompt(&l, entry, &sums);
  printf("  together %.4f of %.4f\n", sqrt(sums.ours), sqrt(sums.allowed));
  assert_true(sums.ours <= sums.allowed);
  close_model(&l);
  json_decref(root);
}

static void smollm2_matches_the_reference(void **state) {
  (void)state;
  matches_the_reference("smollm2-135m");
}

static void qwen_05b_matches_the_reference(void **state) {
  (void)state;
  matches_the_reference("qwen2.5-coder-0.5b");
}

int main(int argc, char **argv) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(smollm2_matches_the_reference)};
  const struct CMUnitTest larger[] = {cmocka_unit_test(qwen_05b_matches_the_reference)};
  if (test_larger(argc, argv)) return cmocka_run_group_tests(larger, NULL, NULL);
  return cmocka_run_group_tests(tests, NULL, NULL);
}
