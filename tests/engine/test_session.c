/*
 * Sessions on the default model: cutting a prompt into chunks, continuing, going back. Products round differently for one token
 * and for many, so different cuts agree within a bound, and the forms of the pages exactly. The bound: logits of this model
 * differ by 0.06 to 0.36 (root mean square) when transformers runs it in bfloat16 instead of float32 (tests/model/data); codes
 * add steps of their own where a value lies near a threshold. 0.5 is asked of 2-bit caches, 0.36 of BF16.
 */
#include "support.h"

#include "engine/engine.h"
#include "engine/speculate.h"

enum { TOKENS = 700 };

struct fixture {
  oscar_context *context;
  struct backend *backend;
  struct model *model;
  oscar_codec_set *codecs;
  int32_t *ids; /* [TOKENS] */
};

static bool open_fixture(struct fixture *f) {
  const char *path = test_model("smollm2-135m");
  if (!path) return false;
  *f = (struct fixture){.context = test_context(OSCAR_ISA_AUTO, 0)};
  assert_ok(f->context, backend_create_cpu(f->context, &f->backend));
  assert_ok(f->context, model_load(f->context, f->backend, path, &f->model));
  assert_ok(f->context, codec_set_obtain(f->model, "int2-hadamard", NULL, NULL, &f->codecs));
  size_t bytes;
  int count;
  const char *text = calibration_text(&bytes);
  assert_ok(f->context, tokenizer_encode(model_tokenizer(f->model), text, bytes < 8000 ? bytes : 8000, false, &f->ids, &count));
  assert_true(count >= TOKENS);
  return true;
}

static void close_fixture(struct fixture *f) {
  mem_free(f->context, f->ids);
  oscar_codec_set_free(f->codecs);
  model_free(f->model);
  f->backend->ops->free(f->backend);
  oscar_context_free(f->context);
}

struct stream {
  oscar_cache *cache;
  struct runner *runner;
  oscar_sequence *sequence;
  float *logits;
};

static struct stream open_stream(struct fixture *f, const oscar_codec_set *codecs) {
  struct stream s = {0};
  oscar_cache_options options;
  model_cache_options(f->model, &options);
  options.codecs = codecs;
  options.budget_bytes = oscar_cache_bytes_for(&options, TOKENS, 1, TOKENS);
  assert_ok(f->context, oscar_cache_create(f->context, &options, &s.cache));
  assert_ok(f->context, runner_create(f->model, s.cache, TOKENS, &s.runner));
  assert_ok(f->context, oscar_sequence_create(s.cache, &s.sequence));
  s.logits = malloc((size_t)model_geometry_of(f->model)->vocab * sizeof(float));
  assert_non_null(s.logits);
  return s;
}

static void close_stream(struct stream *s) {
  free(s->logits);
  runner_free(s->runner);
  oscar_cache_free(s->cache);
}

static double rms_distance(const float *a, const float *b, int n) {
  double sum = 0;
  for (int i = 0; i < n; i++) sum += ((double)a[i] - (double)b[i]) * ((double)a[i] - (double)b[i]);
  return sqrt(sum / n);
}

/* Every day a prompt has two pages of codes, and token by token only its last quarter is fed. */
static void check_chunks(struct fixture *f, const oscar_codec_set *codecs, double bound) {
  static const int chunks[] = {300, 64, 7, 1};
  const int vocab = model_geometry_of(f->model)->vocab, tokens = test_at_length() ? TOKENS : 460;
  struct stream whole = open_stream(f, codecs);
  assert_ok(f->context, runner_forward(whole.runner, whole.sequence, tokens, f->ids, 1, whole.logits, NULL));
  for (size_t c = 0; c < ARRAY_LENGTH(chunks); c++) {
    struct stream cut = open_stream(f, codecs);
    for (int done = 0; done < tokens;) {
      int n = chunks[c] == 1 && !test_at_length() && done == 0 ? tokens * 3 / 4 : chunks[c];
      if (n > tokens - done) n = tokens - done;
      assert_ok(f->context, runner_forward(cut.runner, cut.sequence, n, f->ids + done, done + n == tokens, cut.logits, NULL));
      done += n;
    }
    for (int page = 0; page <= (tokens - 1) / OSCAR_PAGE_TOKENS; page++) {
      bool a, b;
      assert_ok(f->context, oscar_sequence_read_page(whole.sequence, page, 0, 0, &a, NULL, NULL));
      assert_ok(f->context, oscar_sequence_read_page(cut.sequence, page, 0, 0, &b, NULL, NULL));
      assert_int_equal(a, b);
      assert_int_equal(a, codecs && page >= 1 && page + 4 < (tokens - 1) / OSCAR_PAGE_TOKENS);
    }
    double rms = rms_distance(whole.logits, cut.logits, vocab);
    printf("  chunks of %d: logits differ by %.4f (rms)\n", chunks[c], rms);
    assert_true(rms < bound);
    close_stream(&cut);
  }
  close_stream(&whole);
}

static void a_prompt_can_be_cut_anywhere(void **state) {
  (void)state;
  struct fixture f;
  if (!open_fixture(&f)) skip();
  check_chunks(&f, NULL, 0.36);
  check_chunks(&f, f.codecs, 0.5);
  close_fixture(&f);
}

static struct engine open_guessing(const char *kv, int64_t context, size_t kv_memory, int guesses) {
  struct engine_options options;
  engine_options_default(&options);
  options.model_path = test_model("smollm2-135m");
  options.kv = kv;
  options.context = context;
  options.kv_memory_bytes = kv_memory;
  options.guesses = guesses;
  struct engine engine;
  char error[1024];
  if (engine_open(&options, &engine, error, sizeof error) != OSCAR_OK) fail_msg("%s", error);
  return engine;
}

static struct engine open_engine(const char *kv, int64_t context, size_t kv_memory) {
  return open_guessing(kv, context, kv_memory, 0);
}

static void decode(struct engine *e, struct session *s, int n, int32_t *ids) {
  for (int i = 0; i < n; i++) {
    bool end;
    assert_ok(e->context, session_next(s, &ids[i], &end));
    if (end) fail_msg("the model ended at token %d; choose another prompt", i);
  }
}

static void a_saved_session_goes_on_alike(void **state) {
  (void)state;
  struct fixture f;
  if (!open_fixture(&f)) skip();
  char path[] = "/tmp/oscar_session_XXXXXX";
  const int fd = mkstemp(path);
  assert_true(fd >= 0);
  close(fd);
  const struct sampler_options greedy = {.temperature = 0, .top_p = 1};
  struct engine engine = open_engine("int2-hadamard", 1024, 0);
  struct session *s, *other;
  oscar_snapshot *snapshot;
  int32_t want[16], got[16];
  assert_ok(engine.context, session_create(&engine, &greedy, &s));
  assert_ok(engine.context, session_feed(s, f.ids, 600, NULL));
  decode(&engine, s, 4, want);
  assert_ok(engine.context, session_save(s, "about", path));
  decode(&engine, s, 12, want);
  session_free(s);
  engine_close(&engine);

  engine = open_engine("int2-hadamard", 1024, 0); /* as another run of the program */
  assert_ok(engine.context, session_create(&engine, &greedy, &other));
  assert_ok(engine.context, session_feed(other, f.ids + 50, 600, NULL)); /* takes the room that the saved one needs */
  assert_ok(engine.context, oscar_snapshot_open(engine.context, path, &snapshot));
  assert_string_equal(oscar_snapshot_describe(snapshot)->text, "about");
  assert_ok(engine.context, session_restore(other, snapshot));
  assert_int_equal(session_length(other), 604);
  const int64_t before = session_timings_of(other)->prompt_tokens;
  decode(&engine, other, 12, got);
  assert_int_equal(session_timings_of(other)->prompt_tokens, before); /* nothing was read again */
  assert_memory_equal(got, want, 12 * sizeof *got);
  oscar_snapshot_close(snapshot);
  session_free(other);
  engine_close(&engine);

  engine = open_engine("int2-hadamard", 500, 0);
  assert_ok(engine.context, session_create(&engine, &greedy, &other));
  assert_ok(engine.context, oscar_snapshot_open(engine.context, path, &snapshot));
  assert_int_equal(session_restore(other, snapshot), OSCAR_INVALID_ARGUMENT);
  oscar_snapshot_close(snapshot);
  session_free(other);
  engine_close(&engine);
  unlink(path);
  close_fixture(&f);
}

static void a_session_goes_back_and_on(void **state) {
  (void)state;
  struct fixture f;
  if (!open_fixture(&f)) skip();
  struct engine engine = open_engine("int2-hadamard", 2048, 0);
  const struct sampler_options greedy = {.temperature = 0, .top_p = 1};
  struct session *s;
  assert_ok(engine.context, session_create(&engine, &greedy, &s));
  int32_t id;
  bool end;
  assert_int_equal(session_next(s, &id, &end), OSCAR_INVALID_ARGUMENT); /* nothing fed */
  int32_t first[8], again[8], conversation[TOKENS + 8];
  assert_ok(engine.context, session_feed(s, f.ids, 600, NULL));
  decode(&engine, s, 8, first);
  assert_int_equal(session_length(s), 608);

  /* The same tokens again: kept, and the answer is the same. */
  assert_ok(engine.context, session_sync(s, f.ids, 600, NULL));
  assert_int_equal(session_length(s), 600);
  decode(&engine, s, 8, again);
  assert_memory_equal(first, again, sizeof first);

  /* A conversation that continues with what was answered feeds only what is new: the pending token and the 40 after it. */
  memcpy(conversation, f.ids, 600 * sizeof *conversation);
  memcpy(conversation + 600, again, sizeof again);
  memcpy(conversation + 608, f.ids + 600, 40 * sizeof *conversation);
  int64_t before = session_timings_of(s)->prompt_tokens;
  assert_ok(engine.context, session_sync(s, conversation, 648, NULL));
  assert_int_equal(session_timings_of(s)->prompt_tokens - before, 41);
  assert_int_equal(session_length(s), 648);

  /* Far back, into coded history: some recent pages are read again, never more than recent pages + the page itself. */
  before = session_timings_of(s)->prompt_tokens;
  assert_ok(engine.context, session_sync(s, f.ids, 500, NULL));
  assert_int_equal(session_length(s), 500);
  assert_true(session_timings_of(s)->prompt_tokens - before <= 5 * OSCAR_PAGE_TOKENS);
  decode(&engine, s, 4, again);
  session_free(s);
  engine_close(&engine);
  close_fixture(&f);
}

/* The text says everything twice, so that lookup has much to find; pages are demoted meanwhile. */
static void guesses_change_the_speed_alone(void **state) {
  (void)state;
  enum { ANSWER = 80 };
  static const struct sampler_options samplings[] = {
      {.temperature = 0, .top_p = 1}, {.temperature = 0.7f, .top_k = 40, .top_p = 0.95f, .min_p = 0.05f, .seed = 2}};
  const int answer = rounds(ANSWER / 2, ANSWER);
  struct fixture f;
  if (!open_fixture(&f)) skip();
  memcpy(f.ids + 300, f.ids, 250 * sizeof *f.ids);
  for (size_t i = 0; i < ARRAY_LENGTH(samplings); i++) {
    int32_t answers[2][ANSWER];
    for (int guesses = 0; guesses <= MOST_GUESSES; guesses += MOST_GUESSES) {
      struct engine engine = open_guessing("int2-hadamard", 1024, 0, guesses);
      struct session *s;
      assert_ok(engine.context, session_create(&engine, &samplings[i], &s));
      assert_ok(engine.context, session_feed(s, f.ids, 550, NULL));
      decode(&engine, s, answer, answers[guesses > 0]);
      if (guesses)
        printf("  %lld of %lld guesses right\n", (long long)session_timings_of(s)->accepted,
               (long long)session_timings_of(s)->guessed);
      if (guesses && i == 0) assert_true(session_timings_of(s)->accepted > 0);
      session_free(s);
      engine_close(&engine);
    }
    assert_memory_equal(answers[0], answers[1], (size_t)answer * sizeof *answers[0]);
  }
  close_fixture(&f);
}

static void limits_are_named(void **state) {
  (void)state;
  struct fixture f;
  if (!open_fixture(&f)) skip();
  const struct sampler_options greedy = {.temperature = 0, .top_p = 1};
  struct engine engine = open_engine("bf16", 100, 0);
  struct session *s;
  int32_t id;
  bool end;
  assert_ok(engine.context, session_create(&engine, &greedy, &s));
  assert_int_equal(session_feed(s, f.ids, 101, NULL), OSCAR_INVALID_ARGUMENT);
  assert_non_null(strstr(oscar_last_error(engine.context), "context of 100"));
  assert_ok(engine.context, session_feed(s, f.ids, 100, NULL));
  assert_int_equal(session_next(s, &id, &end), OSCAR_NO_SPACE);
  session_free(s);
  engine_close(&engine);

  /* A budget below what the prompt needs: the error says so, the session stays usable for what fits. */
  oscar_cache_options cache;
  model_cache_options(f.model, &cache);
  engine = open_engine("bf16", 2048, oscar_cache_bytes_for(&cache, 256, 1, 256));
  assert_ok(engine.context, session_create(&engine, &greedy, &s));
  assert_int_equal(session_feed(s, f.ids, 600, NULL), OSCAR_NO_SPACE);
  assert_ok(engine.context, session_sync(s, f.ids, 200, NULL));
  assert_ok(engine.context, session_next(s, &id, &end));
  session_free(s);
  engine_close(&engine);

  struct engine_options options;
  engine_options_default(&options);
  options.model_path = test_model("smollm2-135m");
  char error[1024];
  options.kv = "int3";
  assert_int_equal(engine_open(&options, &engine, error, sizeof error), OSCAR_INVALID_ARGUMENT);
  options.kv = "bf16";
  options.guesses = MOST_GUESSES + 1;
  assert_int_equal(engine_open(&options, &engine, error, sizeof error), OSCAR_INVALID_ARGUMENT);
  options.guesses = 0;
  options.context = 1 << 30;
  assert_int_equal(engine_open(&options, &engine, error, sizeof error), OSCAR_INVALID_ARGUMENT);
  options.context = 0;
  options.recent_tokens = 100;
  assert_int_equal(engine_open(&options, &engine, error, sizeof error), OSCAR_INVALID_ARGUMENT);
  options.recent_tokens = -1;
  options.kv_memory_bytes = 1000;
  assert_int_equal(engine_open(&options, &engine, error, sizeof error), OSCAR_NO_SPACE);
  options.kv_memory_bytes = 0;
  options.model_path = "/nonexistent.gguf";
  assert_int_equal(engine_open(&options, &engine, error, sizeof error), OSCAR_IO);
  close_fixture(&f);
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(a_prompt_can_be_cut_anywhere), cmocka_unit_test(a_session_goes_back_and_on),
                                     cmocka_unit_test(a_saved_session_goes_on_alike),
                                     cmocka_unit_test(guesses_change_the_speed_alone), cmocka_unit_test(limits_are_named)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
