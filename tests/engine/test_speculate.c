/*
 * Guesses change the speed and nothing else: sessions of small random models give the same tokens with lookup, with drafts and
 * without either, greedy and sampled, over page boundaries, demotions and windows, whatever is done with the session in between.
 * Lookup against a search through the text; drafts against drafts that begin anew; what is refused; memory that runs out.
 */
#include "failing_alloc.h"
#include "model/small_model.h"

#include "engine/engine.h"
#include "engine/speculate.h"

#include <unistd.h>

enum { CONTEXT = 1100, PROMPT = 40, LONG_PROMPT = 960 };

/* ---- lookup ---- */

/* The newest place that the last `length` tokens came before, by looking everywhere. */
static int64_t search(const int32_t *ids, int64_t n, int shortest, int longest) {
  for (int length = longest; length >= shortest; length--)
    for (int64_t p = n - 1; p >= length; p--)
      if (memcmp(ids + p - length, ids + n - length, (size_t)length * sizeof *ids) == 0) return p;
  return 0;
}

static void check_guesses(const struct lookup *l, const int32_t *ids, int64_t n, int shortest, int longest) {
  int32_t guesses[MOST_GUESSES];
  const int64_t place = n > shortest ? search(ids, n, shortest, longest) : 0;
  const int got = lookup_guess(l, ids, n, MOST_GUESSES, guesses);
  assert_int_equal(got, place ? MOST_GUESSES : 0);
  for (int i = 0; i < got; i++) assert_int_equal(guesses[i], ids[place + i % (n - place)]);
}

static void lookup_finds_what_a_search_finds(void **state) {
  (void)state;
  static const int lengths[][2] = {{1, 1}, {2, 3}, {1, 8}, {4, 4}};
  enum { TOKENS = 1000 };
  oscar_context *context = test_context(OSCAR_ISA_AUTO, 1);
  uint64_t random = 3;
  static int32_t ids[TOKENS];
  for (size_t c = 0; c < ARRAY_LENGTH(lengths); c++) {
    struct lookup *l;
    assert_ok(context, lookup_create(context, lengths[c][0], lengths[c][1], &l));
    for (int64_t n = 0; n < TOKENS;) { /* steps of several tokens, and now and then back */
      const int64_t back = test_random(&random) % 40 ? 0 : (int64_t)(test_random(&random) % 200);
      n = n > back ? n - back : 0;
      for (int more = 1 + (int)(test_random(&random) % 20); more > 0 && n < TOKENS; more--)
        ids[n++] = (int32_t)(test_random(&random) % 3); /* few n-grams: no bucket is ever full */
      assert_ok(context, lookup_extend(l, ids, n));
      check_guesses(l, ids, n, lengths[c][0], lengths[c][1]);
    }
    assert_int_equal(lookup_guess(l, ids, TOKENS, 0, NULL), 0);
    lookup_free(l);
  }
  oscar_context_free(context);
}

/* Of many different n-grams nearly all are kept, in the memory that is said, and what is found is never a collision. */
static void lookup_keeps_long_texts(void **state) {
  (void)state;
  enum { TOKENS = 60000 };
  oscar_context *context = test_context(OSCAR_ISA_AUTO, 1);
  int32_t *ids = malloc(2 * TOKENS * sizeof *ids), guess;
  assert_non_null(ids);
  uint64_t random = 11;
  for (int i = 0; i < TOKENS; i++) ids[i] = ids[TOKENS + i] = (int32_t)(test_random(&random) % 50000);
  struct lookup *l;
  assert_ok(context, lookup_create(context, 2, 3, &l));
  int right = 0;
  for (int64_t n = 1; n < 2 * TOKENS; n++) {
    assert_ok(context, lookup_extend(l, ids, n));
    const int got = lookup_guess(l, ids, n, 1, &guess);
    if (n > TOKENS + 3) right += got == 1 && guess == ids[n];
    if (n < TOKENS) assert_true(got == 0 || search(ids, n, 2, 3) > 0);
  }
  printf("  %d of %d places found again, %zu bytes\n", right, TOKENS - 4, lookup_bytes(l));
  assert_true(right > TOKENS - TOKENS / 50);
  assert_in_range(lookup_bytes(l), 2 * TOKENS * 2 * 8, 2 * TOKENS * 2 * 16 + 4096);
  lookup_free(l);
  free(ids);
  oscar_context_free(context);
}

static void lookup_survives_failed_allocations(void **state) {
  (void)state;
  struct failing_alloc f;
  oscar_context *context = failing_context(&f);
  struct lookup *l;
  static int32_t ids[20000];
  for (int i = 0; i < 20000; i++) ids[i] = i % 97;
  assert_int_equal(lookup_create(context, 0, 3, &l), OSCAR_INVALID_ARGUMENT);
  assert_int_equal(lookup_create(context, 3, 2, &l), OSCAR_INVALID_ARGUMENT);
  assert_int_equal(lookup_create(context, 2, 9, &l), OSCAR_INVALID_ARGUMENT);
  sweep_allocations(context, &f, lookup_create(context, 2, 3, &l));
  assert_ok(context, lookup_extend(l, ids, 200));
  sweep_allocations(context, &f, lookup_extend(l, ids, 20000));
  check_guesses(l, ids, 20000, 2, 3);
  lookup_free(l);
  failing_context_free(context, &f);
}

/* ---- how many guesses ---- */

static void guesses_follow_what_was_accepted(void **state) {
  (void)state;
  struct guess_rate rate;
  guess_rate_start(&rate, 0.4f);
  assert_int_equal(guess_rate_next(&rate, 0), 0);
  int before = guess_rate_next(&rate, 15);
  assert_in_range(before, 1, 2);
  for (int i = 0; i < 20; i++) {
    const int k = guess_rate_next(&rate, 15);
    assert_true(k >= before); /* more and more while all are right */
    before = k;
    guess_rate_note(&rate, k, k);
  }
  assert_true(before >= 8);
  assert_int_equal(guess_rate_next(&rate, 3), 3);
  int tried = 0;
  for (int i = 0; i < 1000; i++) {
    const int k = guess_rate_next(&rate, 15);
    if (i >= 500) tried += k;
    if (k) guess_rate_note(&rate, k, 0);
  }
  assert_in_range(tried, 5, 12); /* it still tries, one in 65 */
  for (int i = 0; i < 300; i++) {
    const int k = guess_rate_next(&rate, 15);
    if (k) guess_rate_note(&rate, k, k);
  }
  assert_true(guess_rate_next(&rate, 15) >= 8); /* and comes back */
  guess_rate_start(&rate, 0);
  assert_int_equal(guess_rate_next(&rate, 15), 15);
}

/* ---- sessions ---- */

struct setting {
  oscar_isa isa;
  const char *kv;
  int sink, recent; /* tokens */
  int64_t context;
  int threads; /* 0: 1 */
  bool long_prompt;
  int guesses;
  const char *draft; /* NULL: lookup */
};

static void open_small(struct engine *e, const char *path, const struct setting *s) {
  *e = (struct engine){.context = test_context(s->isa, s->threads ? s->threads : 1)};
  engine_options_default(&e->options);
  e->options.kv = s->kv;
  e->options.sink_tokens = s->sink;
  e->options.recent_tokens = s->recent;
  e->options.context = s->context;
  e->options.chunk = 64;
  e->options.guesses = s->guesses;
  oscar_cache_options cache;
  assert_ok(e->context, backend_create_cpu(e->context, &e->backend));
  assert_ok(e->context, model_load(e->context, e->backend, path, &e->model));
  assert_ok(e->context, codec_set_obtain(e->model, s->kv, NULL, NULL, &e->codecs));
  assert_ok(e->context, engine_cache_options(e->context, e->model, &e->options, e->codecs, &cache));
  cache.budget_bytes = oscar_cache_bytes_for(&cache, s->context, 1, e->options.chunk);
  assert_ok(e->context, oscar_cache_create(e->context, &cache, &e->cache));
  assert_ok(e->context, runner_create(e->model, e->cache, e->options.chunk, &e->runner));
  if (s->guesses && s->draft) assert_ok(e->context, draft_create(e->model, s->draft, "bf16", s->context, 1, &e->draft));
}

static void prompt_of(int n, int32_t *ids) {
  for (int i = 0; i < n; i++) ids[i] = 3 + i * 29 % (SMALL_VOCAB - 3);
}

/* Tokens up to `n` or the end of the context, with things done to the session in between. Returns how many there are. */
static int run_script(struct engine *e, const struct sampler_options *sampling, int n_prompt, int n, bool disturbed, int32_t *out,
                      struct session_timings *timings) {
  int32_t prompt[CONTEXT];
  struct session *s;
  int count = 0;
  prompt_of(n_prompt, prompt);
  assert_ok(e->context, session_create(e, sampling, &s));
  assert_ok(e->context, session_feed(s, prompt, n_prompt, NULL));
  while (count < n) {
    bool end;
    if (disturbed && count % 101 == 57) { /* the text goes on otherwise */
      int64_t held;
      const int32_t *tokens = session_tokens(s, &held);
      memcpy(prompt, tokens, (size_t)held * sizeof *prompt);
      prompt[held - 1 - count % 3] = 7;
      assert_ok(e->context, session_sync(s, prompt, (int)held, NULL));
    }
    if (disturbed && count % 101 == 91) assert_ok(e->context, session_feed(s, prompt, 2, NULL));
    const oscar_status status = session_next(s, &out[count], &end);
    if (status == OSCAR_NO_SPACE) break;
    assert_ok(e->context, status);
    if (end) assert_ok(e->context, session_feed(s, &out[count], 1, NULL));
    count++;
  }
  *timings = *session_timings_of(s);
  session_free(s);
  assert_ok(e->context, oscar_cache_check(e->cache));
  return count;
}

static const struct sampler_options samplings[] = {
    {.temperature = 0, .top_p = 1},
    {.temperature = 0.6f, .top_k = 40, .top_p = 0.95f, .min_p = 0.05f, .seed = 9},
    {.temperature = 0.3f, .top_p = 0.9f, .seed = 4},
};

static void compare(const char *path, struct setting setting, int guesses, const char *draft, bool disturbed) {
  static int32_t want[CONTEXT], got[CONTEXT];
  const int n_prompt = setting.long_prompt ? LONG_PROMPT : PROMPT;
  for (size_t i = 0; i < ARRAY_LENGTH(samplings); i += setting.long_prompt ? (size_t)rounds(2, 1) : 2) {
    struct engine e;
    struct session_timings plain, guessed;
    setting.guesses = 0;
    open_small(&e, path, &setting);
    const int n = run_script(&e, &samplings[i], n_prompt, CONTEXT, disturbed, want, &plain);
    engine_close(&e);
    setting.guesses = guesses;
    setting.draft = draft;
    open_small(&e, path, &setting);
    assert_int_equal(run_script(&e, &samplings[i], n_prompt, CONTEXT, disturbed, got, &guessed), n);
    engine_close(&e);
    for (int t = 0; t < n; t++)
      if (want[t] != got[t]) fail_msg("%s, sampling %zu: token %d is %d instead of %d", setting.kv, i, t, got[t], want[t]);
    assert_int_equal(guessed.decoded_tokens, plain.decoded_tokens);
    printf("  %s %s %d guesses, sampling %zu: %d tokens, %lld of %lld guesses right\n", setting.kv, draft ? "draft" : "lookup",
           guesses, i, n, (long long)guessed.accepted, (long long)guessed.guessed);
    if (i == 0) assert_true(guessed.accepted > (draft ? 5 : 20)); /* a random model soon goes in circles */
  }
}

static const oscar_isa levels[] = {OSCAR_ISA_PORTABLE, OSCAR_ISA_AVX2, OSCAR_ISA_AVX512, OSCAR_ISA_NEON_DOT};

static bool has_level(oscar_isa isa) {
  struct cpu_features cpu;
  cpu_detect(&cpu);
  return cpu_has(&cpu, isa);
}

static void answers_are_those_without_lookup(void **state) {
  (void)state;
  static const struct setting settings[] = {
      {.kv = "int2-hadamard",
       .sink = 64,
       .recent = 128,
       .context = 1100,
       .long_prompt = true}, /* into the second part of tiles */
      {.kv = "bf16", .sink = 64, .recent = 256, .context = 200, .threads = 2},
      {.kv = "int2-hadamard", .sink = 0, .recent = 64, .context = 300},
      {.kv = "int2-hadamard", .sink = 64, .recent = 0, .context = 200},
  };
  struct small_model m;
  small_model_make(&m, "qwen2", true, 5);
  for (size_t l = 0; l < ARRAY_LENGTH(levels); l++) {
    if (!has_level(levels[l])) continue;
    for (size_t i = 0; i < ARRAY_LENGTH(settings); i++) {
      struct setting s = settings[i];
      s.isa = levels[l];
      if (test_only_threads() && s.threads < 2) continue;
      if (s.isa == OSCAR_ISA_PORTABLE && i != 3) continue; /* slow */
      if (SANITIZED && !test_at_length() && s.isa == OSCAR_ISA_AVX2 && i % 2 == 0 && has_level(OSCAR_ISA_AVX512)) continue;
      compare(m.path, s, i == 1 ? 4 : MOST_GUESSES, NULL, i == 2);
    }
  }
  small_model_free(&m);
}

/* Layers with a window, whose pages begin elsewhere from one position of a step to the next. */
static void answers_are_those_without_lookup_in_windows(void **state) {
  (void)state;
  const struct setting s = {.isa = OSCAR_ISA_AUTO, .kv = "int2-hadamard", .sink = 64, .recent = 128, .context = 300};
  struct small_model m;
  small_model_make(&m, "gemma3", true, 6);
  compare(m.path, s, MOST_GUESSES, NULL, false);
  compare(m.path, s, 7, NULL, true);
  small_model_free(&m);
}

static void answers_are_those_without_a_draft(void **state) {
  (void)state;
  const struct setting s = {.isa = OSCAR_ISA_AUTO, .kv = "int2-hadamard", .sink = 64, .recent = 64, .context = 300};
  struct small_model m;
  small_model_make(&m, "llama", true, 7);
  compare(m.path, s, 5, m.path, false); /* itself, with an exact cache */
  compare(m.path, s, MOST_GUESSES, m.path, true);
  small_model_free(&m);
}

/* At every length of a text: the most guesses that are possible, and back to any of them. One more would enter a page whose first
 * token demotes another. */
static void any_guess_can_be_taken_back(void **state) {
  (void)state;
  const struct setting s = {.isa = OSCAR_ISA_AUTO, .kv = "int2-hadamard", .sink = 64, .recent = 64, .context = 400};
  struct small_model m;
  struct engine e;
  oscar_sequence *sequence;
  int32_t ids[1 + MOST_GUESSES] = {0};
  small_model_make(&m, "llama", true, 9);
  open_small(&e, m.path, &s);
  assert_ok(e.context, oscar_sequence_create(e.cache, &sequence));
  for (int64_t length = 0; length < 300; length++) {
    int64_t resume;
    const int k = guesses_possible(e.model, sequence, 99), left = (int)(63 - length % 64);
    const bool demotes = length / 64 >= 2; /* entering the next page demotes the one before this, not the sink */
    assert_int_equal(k, demotes && left < MOST_GUESSES ? left : MOST_GUESSES);
    assert_int_equal(guesses_possible(e.model, sequence, 1), k > 0);
    assert_ok(e.context, runner_forward(e.runner, sequence, 1 + k, ids, 0, NULL, NULL));
    const int64_t to = length + 1 + (k ? length % k : 0);
    assert_ok(e.context, oscar_sequence_truncate(sequence, to, OSCAR_REWIND_EXACT, &resume));
    assert_int_equal(resume, to);
    assert_ok(e.context, oscar_sequence_truncate(sequence, length + 1, OSCAR_REWIND_EXACT, &resume));
    assert_int_equal(resume, length + 1);
  }
  engine_close(&e);
  small_model_free(&m);
}

/* What is saved in the middle of confirmed guesses is what would be saved without any. */
static void a_session_is_saved_as_without_guesses(void **state) {
  (void)state;
  struct setting s = {.isa = OSCAR_ISA_AUTO, .kv = "int2-hadamard", .sink = 64, .recent = 64, .context = CONTEXT};
  struct small_model m;
  small_model_make(&m, "llama", true, 8);
  char path[] = "/tmp/oscar_guesses_XXXXXX";
  const int fd = mkstemp(path);
  assert_true(fd >= 0);
  close(fd);
  int32_t want[CONTEXT], prompt[PROMPT], id;
  struct session_timings timings;
  struct engine e, plain;
  bool end;
  prompt_of(PROMPT, prompt);
  open_small(&plain, m.path, &s);
  run_script(&plain, &samplings[0], PROMPT, 120, false, want, &timings);
  s.guesses = 9;
  open_small(&e, m.path, &s);
  for (int stop = 90; stop < 100; stop++) {
    struct session *first, *second;
    oscar_snapshot *snapshot;
    assert_ok(e.context, session_create(&e, &samplings[0], &first));
    assert_ok(e.context, session_feed(first, prompt, PROMPT, NULL));
    for (int i = 0; i < stop; i++) assert_ok(e.context, session_next(first, &id, &end));
    assert_ok(e.context, session_save(first, "", path));
    assert_ok(e.context, session_next(first, &id, &end)); /* and it goes on */
    assert_int_equal(id, want[stop]);
    session_free(first);
    assert_ok(plain.context, oscar_snapshot_open(plain.context, path, &snapshot));
    assert_int_equal(oscar_snapshot_describe(snapshot)->n_ids, PROMPT + stop);
    assert_int_equal(oscar_snapshot_describe(snapshot)->tokens, PROMPT + stop - 1);
    assert_ok(plain.context, session_create(&plain, &samplings[0], &second));
    assert_ok(plain.context, session_restore(second, snapshot));
    for (int i = stop; i < stop + 20; i++) {
      assert_ok(plain.context, session_next(second, &id, &end));
      assert_int_equal(id, want[i]);
    }
    session_free(second);
    oscar_snapshot_close(snapshot);
  }
  engine_close(&e);
  engine_close(&plain);
  unlink(path);
  small_model_free(&m);
}

/* ---- drafts ---- */

/* Writes a copy of the file in which two tokens have changed places. */
static void respell(const char *from, char *to) {
  static const char tokens[] = "\1\0\0\0\0\0\0\0a\1\0\0\0\0\0\0\0b";
  static char bytes[4 << 20];
  FILE *file = fopen(from, "rb");
  assert_non_null(file);
  const size_t n = fread(bytes, 1, sizeof bytes, file);
  fclose(file);
  char *at = memmem(bytes, n, tokens, sizeof tokens - 1);
  assert_non_null(at);
  at[8] = 'b';
  at[sizeof tokens - 2] = 'a';
  const int fd = mkstemps(to, 5);
  assert_true(fd >= 0);
  assert_int_equal(write(fd, bytes, n), n);
  close(fd);
}

static void other_vocabularies_are_refused(void **state) {
  (void)state;
  struct small_model m;
  struct engine e;
  struct draft *draft;
  char other[] = "/tmp/oscar-other-XXXXXX.gguf";
  small_model_make(&m, "llama", true, 1);
  respell(m.path, other);
  open_small(&e, m.path, &(struct setting){.kv = "bf16", .sink = 64, .recent = 64, .context = 100});
  assert_int_equal(draft_create(e.model, other, "bf16", 100, 1, &draft), OSCAR_MISMATCH);
  assert_non_null(strstr(oscar_last_error(e.context), "token 0 of the draft model is \"b\", of the model \"a\""));
  assert_null(draft);
  assert_int_equal(draft_create(e.model, "/nonexistent.gguf", "bf16", 100, 1, &draft), OSCAR_IO);
  assert_int_equal(draft_create(e.model, m.path, "int3", 100, 1, &draft), OSCAR_INVALID_ARGUMENT);
  assert_int_equal(draft_create(e.model, m.path, "bf16", 0, 1, &draft), OSCAR_INVALID_ARGUMENT);
  if (test_model("smollm2-135m")) {
    assert_int_equal(draft_create(e.model, test_model("smollm2-135m"), "bf16", 100, 1, &draft), OSCAR_MISMATCH);
    assert_non_null(strstr(oscar_last_error(e.context), "for one of 3"));
  }
  engine_close(&e);
  unlink(other);
  small_model_free(&m);
}

enum { TEXTS = 3, DRAFT_CONTEXT = 400 };

/* Texts that grow, go back and begin anew, guessed together in one draft, against each alone in a draft that reads it anew. */
static void drafts_catch_up(void **state) {
  (void)state;
  struct small_model m;
  struct engine e;
  struct draft *draft, *anew;
  struct draft_text *text[TEXTS];
  static int32_t ids[TEXTS][DRAFT_CONTEXT];
  int64_t n[TEXTS] = {1, 70, 200};
  uint64_t random = 2;
  int same = 0, all = 0;
  small_model_make(&m, "llama", true, 3);
  open_small(&e, m.path, &(struct setting){.kv = "bf16", .sink = 64, .recent = 64, .context = 100});
  assert_ok(e.context, draft_create(e.model, m.path, "int2-hadamard", DRAFT_CONTEXT, TEXTS, &draft));
  assert_ok(e.context, draft_create(e.model, m.path, "int2-hadamard", DRAFT_CONTEXT, 1, &anew));
  assert_true(draft_cost(draft) == 1 && draft_bytes(draft) > 0);
  for (int i = 0; i < TEXTS; i++) {
    assert_ok(e.context, draft_text_create(draft, &text[i]));
    for (int t = 0; t < DRAFT_CONTEXT; t++) ids[i][t] = (int32_t)(test_random(&random) % SMALL_VOCAB);
  }
  for (int round = 0; round < 60; round++) {
    int32_t guesses[TEXTS][MOST_GUESSES], fresh[MOST_GUESSES], *to[TEXTS], *to_fresh = fresh;
    const int32_t *from[TEXTS];
    int most[TEXTS], count[TEXTS], fresh_count;
    for (int i = 0; i < TEXTS; i++) {
      from[i] = ids[i], to[i] = guesses[i];
      most[i] = (int)(test_random(&random) % 6);
    }
    assert_ok(e.context, draft_guess(draft, TEXTS, text, from, n, most, to, count));
    for (int i = 0; i < TEXTS; i++) {
      assert_int_equal(count[i], n[i] + most[i] <= DRAFT_CONTEXT ? most[i] : 0);
      if (round % 10 == 9 && count[i] > 0) {
        struct draft_text *other;
        assert_ok(e.context, draft_text_create(anew, &other));
        assert_ok(e.context, draft_guess(anew, 1, &other, &from[i], &n[i], &most[i], &to_fresh, &fresh_count));
        assert_int_equal(fresh_count, count[i]);
        for (int k = 0; k < fresh_count; k++) same += fresh[k] == guesses[i][k];
        all += fresh_count;
        draft_text_free(other);
      }
      const int kind = (int)(test_random(&random) % 12);
      const int right = count[i] ? (int)(test_random(&random) % (unsigned)(count[i] + 1)) : 0;
      if (kind == 0) n[i] = 1 + (int64_t)(test_random(&random) % (unsigned)n[i]); /* back */
      if (n[i] + right + 1 > DRAFT_CONTEXT) n[i] = 1;
      for (int k = 0; k < right; k++) ids[i][n[i]++] = guesses[i][k]; /* some guesses were right */
      ids[i][n[i]++] = (int32_t)(test_random(&random) % SMALL_VOCAB);
    }
  }
  printf("  %d of %d guesses are those of a draft that begins anew\n", same, all);
  assert_true(all > 20 &&
              same >= all - all / 10); /* products of few and of many tokens round differently, and refills read codes */
  const int none = TEXTS + 1;
  assert_int_equal(draft_guess(draft, none, text, NULL, n, NULL, NULL, NULL), OSCAR_INVALID_ARGUMENT);
  for (int i = 0; i < TEXTS; i++) draft_text_free(text[i]);
  draft_free(draft);
  draft_free(anew);
  engine_close(&e);
  small_model_free(&m);
}

static void drafts_survive_failed_allocations(void **state) {
  (void)state;
  struct small_model m;
  struct failing_alloc f;
  small_model_make(&m, "llama", true, 4);
  oscar_context *context = failing_context(&f);
  struct backend *backend;
  struct model *model;
  struct draft *draft;
  struct draft_text *text;
  int32_t ids[80], guesses[4], *to = guesses;
  const int32_t *from = ids;
  const int64_t n = 80;
  const int most = 4;
  int count;
  for (int i = 0; i < 80; i++) ids[i] = i;
  assert_ok(context, backend_create_cpu(context, &backend));
  assert_ok(context, model_load(context, backend, m.path, &model));
  sweep_allocations(context, &f, draft_create(model, m.path, "bf16", 100, 1, &draft));
  sweep_allocations(context, &f, draft_text_create(draft, &text));
  long failed = 0;
  for (long passing = 0;; passing++) { /* buffers of steps stay, so that not all comes back */
    f.until_failure = passing;
    const oscar_status status = draft_guess(draft, 1, &text, &from, &n, &most, &to, &count);
    f.until_failure = -1;
    if (status == OSCAR_OK) break;
    assert_int_equal(status, OSCAR_NO_MEMORY);
    assert_int_equal(count, 0);
    failed++;
  }
  assert_true(failed > 0);
  assert_int_equal(count, 4);
  draft_text_free(text);
  draft_free(draft);
  model_free(model);
  backend->ops->free(backend);
  failing_context_free(context, &f);
  small_model_free(&m);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(lookup_finds_what_a_search_finds),
      cmocka_unit_test(lookup_keeps_long_texts),
      cmocka_unit_test(lookup_survives_failed_allocations),
      cmocka_unit_test(guesses_follow_what_was_accepted),
      cmocka_unit_test(answers_are_those_without_lookup),
      cmocka_unit_test(answers_are_those_without_lookup_in_windows),
      cmocka_unit_test(answers_are_those_without_a_draft),
      cmocka_unit_test(any_guess_can_be_taken_back),
      cmocka_unit_test(a_session_is_saved_as_without_guesses),
      cmocka_unit_test(other_vocabularies_are_refused),
      cmocka_unit_test(drafts_catch_up),
      cmocka_unit_test(drafts_survive_failed_allocations),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
