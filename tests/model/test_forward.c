/*
 * The forward pass on small random models: several sequences in one step against each of them alone, on the CPU to the bit; and a
 * GPU, where there is one, against the CPU.
 */
#include "small_model.h"

#include "model/model.h"

#include <oscar/cuda.h>
#include <oscar/rotation.h>

enum { MOST_JOBS = 80, CHUNK = 256, LENGTH = 1024 };

struct rig {
  oscar_context *context;
  oscar_cuda *cuda; /* NULL: the CPU */
  struct backend *backend;
  struct model *model;
  oscar_codec_set *codecs; /* NULL: BF16 */
  oscar_cache *cache;
  struct runner *runner;
};

/* false: no such device, or the library cannot keep caches there */
static bool open_rig_with(struct rig *r, const char *path, bool coded, bool on_gpu, enum weight_form form, int sequences) {
  *r = (struct rig){.context = test_context(OSCAR_ISA_AUTO, 2)};
  oscar_status status = on_gpu ? oscar_cuda_create(r->context, NULL, &r->cuda) : OSCAR_OK;
  if (status == OSCAR_OK)
    status = on_gpu ? backend_create_cuda(r->context, r->cuda, form, &r->backend) : backend_create_cpu(r->context, &r->backend);
  if (on_gpu && status == OSCAR_UNSUPPORTED) {
    printf("  not on a GPU: %s\n", oscar_last_error(r->context));
    oscar_context_free(r->context);
    return false;
  }
  assert_ok(r->context, status);
  assert_ok(r->context, model_load(r->context, r->backend, path, &r->model));
  oscar_cache_options options;
  model_cache_options(r->model, &options);
  const oscar_codec_set_info info = {options.layers, options.kv_heads, options.head_dim, "int2-hadamard", "", ""};
  const oscar_plain_options plain = {true, 1, 0, 1, 1};
  if (coded) assert_ok(r->context, oscar_codec_set_create_plain(r->context, &info, &plain, &r->codecs));
  options.codecs = r->codecs;
  options.recent_pages = 1;
  options.budget_bytes = oscar_cache_bytes_for(&options, LENGTH, sequences, CHUNK);
  assert_ok(r->context, oscar_cache_create(r->context, &options, &r->cache));
  assert_ok(r->context, runner_create(r->model, r->cache, CHUNK, &r->runner));
  return true;
}

static bool open_rig(struct rig *r, const char *path, bool coded, bool on_gpu, int sequences) {
  return open_rig_with(r, path, coded, on_gpu, WEIGHTS_BF16, sequences);
}

static void close_rig(struct rig *r) {
  runner_free(r->runner);
  oscar_cache_free(r->cache);
  oscar_codec_set_free(r->codecs);
  model_free(r->model);
  r->backend->ops->free(r->backend);
  oscar_cuda_free(r->cuda);
  oscar_context_free(r->context);
}

/* A step of all sequences: so many tokens and outputs each. */
struct step {
  int n[MOST_JOBS], outputs[MOST_JOBS];
};

static int32_t id_at(int sequence, int64_t position) { return (int32_t)((sequence * 7919 + position * 104729) % SMALL_VOCAB); }

static void next_ids(int sequence, const oscar_sequence *s, int n, int32_t *ids) {
  for (int t = 0; t < n; t++) ids[t] = id_at(sequence, oscar_sequence_length(s) + t);
}

/* Logits of all outputs, one after the other; gaps: those of each second job lie elsewhere while the step runs. */
static void run_together(struct rig *r, int count, oscar_sequence **sequences, const struct step *step, bool gaps,
                         float *logits) {
  struct forward_job jobs[MOST_JOBS];
  static int32_t ids[CHUNK];
  static float apart[CHUNK * SMALL_VOCAB];
  int n = 0, rows = 0;
  for (int i = 0; i < count; i++) {
    next_ids(i, sequences[i], step->n[i], ids + n);
    float *to = (gaps && i % 2 ? apart : logits) + rows * SMALL_VOCAB;
    jobs[i] = (struct forward_job){sequences[i], step->n[i], ids + n, step->outputs[i], to};
    n += step->n[i];
    rows += step->outputs[i];
  }
  assert_ok(r->context, runner_forward_all(r->runner, count, jobs));
  rows = 0;
  for (int i = 0; i < count; rows += step->outputs[i++])
    if (gaps && i % 2)
      memcpy(logits + rows * SMALL_VOCAB, apart + rows * SMALL_VOCAB, (size_t)(step->outputs[i] * SMALL_VOCAB) * sizeof *logits);
}

static void run_alone(struct rig *r, int count, oscar_sequence **sequences, const struct step *step, float *logits) {
  int32_t ids[CHUNK];
  for (int i = 0; i < count; logits += step->outputs[i++] * SMALL_VOCAB) {
    next_ids(i, sequences[i], step->n[i], ids);
    assert_ok(r->context, runner_forward(r->runner, sequences[i], step->n[i], ids, step->outputs[i], logits, NULL));
  }
}

static int outputs_of(int count, const struct step *step) {
  int rows = 0;
  for (int i = 0; i < count; i++) rows += step->outputs[i];
  return rows;
}

static double relative_distance(const float *a, const float *b, size_t n) {
  double squares = 0, size = 0;
  for (size_t i = 0; i < n; i++) {
    squares += pow((double)a[i] - (double)b[i], 2);
    size += pow((double)a[i], 2);
  }
  return sqrt(squares / size);
}

static void make_sequences(struct rig *r, int count, oscar_sequence **sequences) {
  for (int i = 0; i < count; i++) assert_ok(r->context, oscar_sequence_create(r->cache, &sequences[i]));
}

/* bound 0: the same bits */
static void compare_steps(struct rig *alone, struct rig *together, int count, const struct step *steps, int n_steps,
                          double bound) {
  oscar_sequence *a[MOST_JOBS], *b[MOST_JOBS];
  const size_t room = (size_t)CHUNK * SMALL_VOCAB;
  float *x = malloc(room * sizeof *x), *y = malloc(room * sizeof *y);
  assert_true(x && y);
  make_sequences(alone, count, a);
  make_sequences(together, count, b);
  double worst = 0;
  for (int s = 0; s < n_steps; s++) {
    const size_t floats = (size_t)outputs_of(count, &steps[s]) * SMALL_VOCAB;
    for (size_t i = 0; i < room; i++) x[i] = y[i] = NAN;
    run_alone(alone, count, a, &steps[s], x);
    run_together(together, count, b, &steps[s], s % 2, y);
    if (bound == 0) assert_memory_equal(x, y, floats * sizeof *x);
    const double distance = floats ? relative_distance(x, y, floats) : 0;
    if (!(distance <= bound))
      fail_msg("step %d of %d: logits differ by %.3g of their size (at most %.3g)", s, n_steps, distance, bound);
    worst = fmax(worst, distance);
    for (int i = 0; i < count; i++) assert_int_equal(oscar_sequence_length(a[i]), oscar_sequence_length(b[i]));
  }
  if (bound > 0) printf("  logits differ by %.4f of their size at most\n", worst);
  free(y);
  free(x);
  for (int i = 0; i < count; i++) {
    oscar_sequence_free(a[i]);
    oscar_sequence_free(b[i]);
  }
}

/* Prompts and single tokens beside each other: alone, some products are of few tokens and some of many. */
static const struct step mixed[] = {
    {{70, 1, 130, 5}, {1, 1, 3, 5}}, {{1, 1, 1, 1}, {1, 1, 1, 1}},       {{1, 200, 1, 3}, {1, 0, 1, 2}},
    {{17, 20, 23, 1}, {0, 0, 0, 0}}, {{1, 100, 2, 64}, {1, 100, 2, 64}}, {{1, 1, 1, 200}, {1, 1, 1, 200}},
    {{3, 1, 1, 1}, {0, 1, 0, 1}},
};

static const struct {
  const char *architecture;
  bool tied, coded;
} cases[] = {
    {"llama", true, false}, {"llama", false, true}, {"qwen2", false, true}, {"gemma3", true, true}, {"gemma3", false, false}};

static void sequences_share_steps_without_a_trace(void **state) {
  (void)state;
  for (size_t c = 0; c < ARRAY_LENGTH(cases); c++) {
    struct small_model m;
    struct rig alone, together;
    small_model_make(&m, cases[c].architecture, cases[c].tied, c + 1);
    assert_true(open_rig(&alone, m.path, cases[c].coded, false, 4));
    assert_true(open_rig(&together, m.path, cases[c].coded, false, 4));
    compare_steps(&alone, &together, 4, mixed, (int)ARRAY_LENGTH(mixed), 0);
    close_rig(&together);
    close_rig(&alone);
    small_model_free(&m);
  }
}

static void many_sequences_decode_together(void **state) {
  (void)state;
  struct small_model m;
  struct rig alone, together;
  struct step steps[4] = {0};
  for (int s = 0; s < 4; s++)
    for (int i = 0; i < MOST_JOBS; i++) steps[s].n[i] = 1 + (i * (s + 3) % 5 == 0) * 2, steps[s].outputs[i] = (i + s) % 3 > 0;
  small_model_make(&m, "llama", true, 5);
  assert_true(open_rig(&alone, m.path, false, false, MOST_JOBS));
  assert_true(open_rig(&together, m.path, false, false, MOST_JOBS));
  compare_steps(&alone, &together, MOST_JOBS, steps, 4, 0);
  close_rig(&together);
  close_rig(&alone);
  small_model_free(&m);
}

/* What a step cannot do changes none of its sequences. */
static void a_step_that_fails_changes_nothing(void **state) {
  (void)state;
  struct small_model m;
  struct rig r;
  static int32_t ids[CHUNK];
  oscar_sequence *s[3];
  small_model_make(&m, "llama", true, 5);
  assert_true(open_rig(&r, m.path, false, false, 2));
  make_sequences(&r, 3, s);
  struct forward_job jobs[3] = {{s[0], 100, ids, 0, NULL}, {s[1], 100, ids, 0, NULL}, {s[2], 50, ids, 0, NULL}};
  assert_int_equal(runner_forward_all(r.runner, 0, jobs), OSCAR_INVALID_ARGUMENT);
  assert_ok(r.context, runner_forward_all(r.runner, 2, jobs));
  jobs[2].n = 57; /* one more than a chunk */
  assert_int_equal(runner_forward_all(r.runner, 3, jobs), OSCAR_INVALID_ARGUMENT);
  assert_non_null(strstr(oscar_last_error(r.context), "257 tokens of 3 sequences"));
  jobs[2].n = 2;
  ids[1] = SMALL_VOCAB;
  assert_int_equal(runner_forward_all(r.runner, 3, jobs), OSCAR_INVALID_ARGUMENT);
  ids[1] = 0;
  jobs[2].sequence = s[1]; /* twice */
  assert_int_equal(runner_forward_all(r.runner, 3, jobs), OSCAR_INVALID_ARGUMENT);
  jobs[2].sequence = s[2];
  oscar_status status = OSCAR_OK;
  int64_t length = 100;
  for (; status == OSCAR_OK; length += 100) status = runner_forward_all(r.runner, 2, jobs); /* until the cache is full */
  assert_int_equal(status, OSCAR_NO_SPACE);
  length -= 100;
  assert_int_equal(oscar_sequence_length(s[0]), length);
  assert_int_equal(oscar_sequence_length(s[1]), length);
  assert_int_equal(oscar_sequence_length(s[2]), 0);
  assert_ok(r.context, oscar_cache_check(r.cache));
  close_rig(&r);
  small_model_free(&m);
}

/* An observer sees what the layers see, and what it writes into o counts. */
struct seen {
  int calls, n;
  double q, k, v, o;
};

static oscar_status watch(void *user, int layer, int n, const float *q, const float *k, const float *v, float *o) {
  struct seen *s = user;
  s->calls++;
  s->n += n;
  for (int i = 0; i < n * SMALL_HEADS * SMALL_HEAD_DIM; i++) s->q += fabs((double)q[i]), s->o += fabs((double)o[i]);
  for (int i = 0; i < n * SMALL_KV_HEADS * SMALL_HEAD_DIM; i++) s->k += fabs((double)k[i]), s->v += fabs((double)v[i]);
  if (layer == 1) memset(o, 0, (size_t)(n * SMALL_HEADS * SMALL_HEAD_DIM) * sizeof *o);
  return OSCAR_OK;
}

static void run_observed(struct rig *r, struct seen *seen, float *logits) {
  enum { N = 40 };
  int32_t ids[N];
  oscar_sequence *s;
  const struct forward_observer observer = {watch, seen};
  *seen = (struct seen){0};
  make_sequences(r, 1, &s);
  next_ids(0, s, N, ids);
  assert_ok(r->context, runner_forward(r->runner, s, N, ids, 1, logits, &observer));
  assert_int_equal(seen->calls, SMALL_LAYERS);
  assert_int_equal(seen->n, SMALL_LAYERS * N);
  oscar_sequence_free(s);
}

/* The bound: weights and activations in BF16 are each good to 2^-8 of their size at worst, in about 20 products one after the
 * other. */
#define GPU_BOUND 0.03

static void a_gpu_gives_what_the_cpu_gives(void **state) {
  (void)state;
  if (oscar_cuda_count() == 0) skip();
  for (size_t c = 0; c < ARRAY_LENGTH(cases); c++) {
    struct small_model m;
    struct rig cpu, gpu;
    small_model_make(&m, cases[c].architecture, cases[c].tied, c + 1);
    if (!open_rig(&gpu, m.path, cases[c].coded, true, 4)) {
      small_model_free(&m);
      continue;
    }
    assert_true(open_rig(&cpu, m.path, cases[c].coded, false, 4));
    printf("%s%s, %s\n", cases[c].architecture, cases[c].tied ? ", tied" : "", cases[c].coded ? "2 bits" : "BF16");
    /* Codes are steps: a value beside a threshold makes one of its own. */
    const double bound = cases[c].coded ? 10 * GPU_BOUND : GPU_BOUND;
    compare_steps(&cpu, &gpu, 4, mixed, (int)ARRAY_LENGTH(mixed), bound);
    compare_steps(&gpu, &gpu, 1, mixed, 2, bound);
    struct seen host, device;
    float expected[SMALL_VOCAB], got[SMALL_VOCAB];
    run_observed(&cpu, &host, expected);
    run_observed(&gpu, &device, got);
    assert_true(relative_distance(expected, got, SMALL_VOCAB) < bound);
    assert_true(fabs(host.q - device.q) < 0.01 * host.q && fabs(host.k - device.k) < 0.01 * host.k);
    assert_true(fabs(host.v - device.v) < 0.01 * host.v && fabs(host.o - device.o) < 0.03 * host.o);
    close_rig(&cpu);
    close_rig(&gpu);
    small_model_free(&m);
  }
}

/* A weight in FP8 is off by 2.6 % of its size, and so is a product; what the twenty products of random layers make of it was 12
 * and 13 % when it was measured. */
static void fp8_weights_give_about_the_same(void **state) {
  (void)state;
  if (oscar_cuda_count() == 0) skip();
  for (size_t c = 0; c < ARRAY_LENGTH(cases); c++) {
    struct small_model m;
    struct rig bf16, fp8;
    small_model_make(&m, cases[c].architecture, cases[c].tied, c + 1);
    if (open_rig(&bf16, m.path, false, true, 4)) {
      assert_true(open_rig_with(&fp8, m.path, false, true, WEIGHTS_FP8, 4));
      assert_true(model_packed_bytes(fp8.model) < model_packed_bytes(bf16.model));
      printf("%s%s, FP8\n", cases[c].architecture, cases[c].tied ? ", tied" : "");
      compare_steps(&bf16, &fp8, 4, mixed, (int)ARRAY_LENGTH(mixed), 0.2);
      close_rig(&fp8);
      close_rig(&bf16);
    }
    small_model_free(&m);
  }
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(sequences_share_steps_without_a_trace), cmocka_unit_test(many_sequences_decode_together),
      cmocka_unit_test(a_step_that_fails_changes_nothing),     cmocka_unit_test(a_gpu_gives_what_the_cpu_gives),
      cmocka_unit_test(fp8_weights_give_about_the_same),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
