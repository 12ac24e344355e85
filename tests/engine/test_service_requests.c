/* Requests one by one: text and stop strings, choices, limits, cancelling, prompts that begin alike, whose turn it is. */
#include "service_client.h"

#include "engine/service/service_private.h"

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

/* ---- text ---- */

static void text_goes_out_in_whole_characters(void **state) {
  (void)state;
  oscar_context *context = test_context(OSCAR_ISA_AUTO, 1);
  static const struct {
    const char *bytes, *ready; /* of the text so far */
  } cases[] = {{"a", "a"},
               {"\xC3", ""},
               {"\xC3\xA4", "\xC3\xA4"},
               {"x\xE2\x82", "x"},
               {"x\xE2\x82\xAC", "x\xE2\x82\xAC"},
               {"\xF0\x9F\x98", ""},
               {"\xF0\x9F\x98\x80", "\xF0\x9F\x98\x80"},
               {"\xFF", "\xEF\xBF\xBD"},
               {"\xE2"
                "b",
                "\xEF\xBF\xBD"
                "b"},
               {"\xED\xA0\x80", "\xEF\xBF\xBD\xEF\xBF\xBD\xEF\xBF\xBD"}, /* a surrogate */
               {"\xC0\xAF", "\xEF\xBF\xBD\xEF\xBF\xBD"},                 /* a longer form */
               {"\x80", "\xEF\xBF\xBD"}};
  for (size_t i = 0; i < ARRAY_LENGTH(cases); i++) {
    struct text_buffer text = {0};
    size_t n;
    assert_ok(context, text_append(context, &text, cases[i].bytes, strlen(cases[i].bytes)));
    char *out = text_characters(context, text.bytes, text_ready(&text, NULL, 0), &n);
    assert_string_equal(out, cases[i].ready);
    assert_int_equal(n, strlen(out));
    mem_free(context, out);
    mem_free(context, text.bytes);
  }
  oscar_context_free(context);
}

static void what_may_become_a_stop_string_is_held(void **state) {
  (void)state;
  oscar_context *context = test_context(OSCAR_ISA_AUTO, 1);
  char stop1[] = "</end>", stop2[] = "\n\n", stop3[] = "\xE2\x82\xAC";
  char *const stops[] = {stop1, stop2, stop3};
  static const struct {
    const char *bytes;
    size_t ready, at;
    int which;
  } cases[] = {{"hello", 5, SIZE_MAX, 0},
               {"hello <", 6, SIZE_MAX, 0},
               {"hello </en", 6, SIZE_MAX, 0},
               {"hello </ex", 10, SIZE_MAX, 0},
               {"a\n", 1, SIZE_MAX, 0},
               {"a\nb", 3, SIZE_MAX, 0},
               {"a\n\nb", 0, 1, 1},
               {"x</end>y\n\n", 0, 1, 0},
               {"\xE2\x82", 0, SIZE_MAX, 0},
               {"p\xE2\x82\xAC", 0, 1, 2},
               {"<<</end>", 0, 2, 0}};
  for (size_t i = 0; i < ARRAY_LENGTH(cases); i++) {
    struct text_buffer text = {0};
    int which = -1;
    assert_ok(context, text_append(context, &text, cases[i].bytes, strlen(cases[i].bytes)));
    assert_int_equal(text_find_stop(&text, stops, 3, &which), cases[i].at);
    if (cases[i].at != SIZE_MAX)
      assert_int_equal(which, cases[i].which);
    else
      assert_int_equal(text_ready(&text, stops, 3), cases[i].ready);
    mem_free(context, text.bytes);
  }
  oscar_context_free(context);
}

/* Only tokens that have a text: "a", "b", "ab". */
static struct token_bias *letters_only(struct request_options *options) {
  static struct token_bias bias[SMALL_VOCAB];
  for (int i = 3; i < SMALL_VOCAB; i++) bias[i - 3] = (struct token_bias){i, -INFINITY};
  options->sampling.bias = bias;
  options->sampling.n_bias = SMALL_VOCAB - 3;
  return bias;
}

static void a_stop_string_ends_an_answer(void **state) {
  (void)state;
  struct rig r;
  struct client whole, cut;
  int32_t ids[40];
  some_ids(1, 40, ids);
  const struct rig_options o = rig_options(model.path);
  rig_open(&r, &o);
  struct request_options options = client_options(ids, 40, 60);
  letters_only(&options);
  options.sampling.temperature = 1;
  options.sampling.seed = 7;
  client_submit(r.service, &whole, options);
  client_wait(&whole);
  assert_int_equal(whole.answers[0].reason, FINISH_LENGTH);
  const char *text = whole.answers[0].text;
  assert_true(strlen(text) >= 60);
  /* Six characters from the middle of the text, wherever they are first. */
  char stop[7] = {0};
  memcpy(stop, text + 30, 6);
  const char *const stops[] = {"zzz", stop};
  options.stops = stops;
  options.n_stops = 2;
  client_submit(r.service, &cut, options);
  client_wait(&cut);
  assert_int_equal(cut.answers[0].reason, FINISH_SEQUENCE);
  assert_string_equal(cut.answers[0].stopped_by, stop);
  const size_t at = (size_t)(strstr(text, stop) - text);
  assert_int_equal(cut.answers[0].bytes, at);
  assert_memory_equal(cut.answers[0].text ? cut.answers[0].text : "", text, at);
  client_clear(&whole);
  client_clear(&cut);
  rig_close(&r);
}

/* ---- choices ---- */

static void choices_are_what_seeds_give(void **state) {
  (void)state;
  struct rig r;
  struct client together, alone[4];
  int32_t ids[300];
  some_ids(2, 300, ids);
  const struct rig_options o = rig_options(model.path);
  rig_open(&r, &o);
  struct request_options options = client_options(ids, 300, 50);
  options.sampling = (struct sampler_options){.temperature = 1, .top_p = 1, .seed = 40};
  options.choices = 4;
  client_submit(r.service, &together, options);
  client_wait(&together);
  assert_int_equal(together.usage.computed, 300);
  assert_int_equal(together.usage.generated, 200);
  for (int i = 0; i < 4; i++) {
    options.choices = 1;
    options.sampling.seed = 40 + (uint64_t)i;
    client_submit(r.service, &alone[i], options);
    client_wait(&alone[i]);
    assert_int_equal(alone[i].answers[0].n, 50);
    assert_memory_equal(alone[i].answers[0].ids, together.answers[i].ids, 50 * sizeof(int32_t));
  }
  assert_true(memcmp(together.answers[0].ids, together.answers[1].ids, 50 * sizeof(int32_t)) != 0);
  for (int i = 0; i < 4; i++) client_clear(&alone[i]);
  client_clear(&together);
  rig_close(&r);
}

/* ---- limits ---- */

static void limits_are_kept_and_named(void **state) {
  (void)state;
  struct rig r;
  struct client c;
  struct service_error error;
  static int32_t ids[2000];
  some_ids(3, 2000, ids);
  struct rig_options o = rig_options(model.path);
  o.budget_tokens = 300;
  rig_open(&r, &o);
  struct request_options options = client_options(ids, 1024, 10);
  assert_int_equal(client_try(r.service, &c, options, &error), OSCAR_INVALID_ARGUMENT);
  assert_non_null(strstr(error.text, "context of 1024"));
  options.n = 0;
  assert_int_equal(client_try(r.service, &c, options, &error), OSCAR_INVALID_ARGUMENT);
  options.n = 1000;
  assert_int_equal(client_try(r.service, &c, options, &error), OSCAR_INVALID_ARGUMENT);
  assert_non_null(strstr(error.text, "bytes of cache"));
  options.n = 10;
  ids[4] = SMALL_VOCAB;
  assert_int_equal(client_try(r.service, &c, options, &error), OSCAR_INVALID_ARGUMENT);
  assert_non_null(strstr(error.text, "token 4 of the prompt is 300"));
  ids[4] = 4;
  options.choices = 17;
  assert_int_equal(client_try(r.service, &c, options, &error), OSCAR_INVALID_ARGUMENT);
  options.choices = 1;
  options.session = "no/session";
  assert_int_equal(client_try(r.service, &c, options, &error), OSCAR_INVALID_ARGUMENT);
  options.session = NULL;
  /* As many as there is room for: it ends because of its length. */
  options.max_tokens = 0;
  client_submit(r.service, &c, options);
  client_wait(&c);
  assert_int_equal(c.answers[0].reason, FINISH_LENGTH);
  assert_true(c.answers[0].n > 100);
  client_clear(&c);
  rig_close(&r);
}

static void too_many_that_wait_are_refused(void **state) {
  (void)state;
  struct rig r;
  struct client clients[40];
  struct service_error error;
  struct service_stats stats;
  int32_t ids[20];
  int refused = 0;
  some_ids(3, 20, ids);
  struct rig_options o = rig_options(model.path);
  o.service.max_waiting = 4;
  o.service.max_running = 1;
  rig_open(&r, &o);
  struct request_options options = client_options(ids, 20, 100);
  for (int i = 0; i < 40; i++)
    if (client_try(r.service, &clients[i], options, &error) != OSCAR_OK) {
      assert_int_equal(error.status, OSCAR_NO_SPACE);
      client_clear(&clients[i]);
      refused++;
    }
  assert_true(refused > 0);
  for (int i = 0; i < 40; i++)
    if (clients[i].id) {
      client_wait(&clients[i]);
      client_clear(&clients[i]);
    }
  service_stats_get(r.service, &stats);
  assert_int_equal(stats.refused, refused);
  assert_int_equal(stats.requests, 40 - refused);
  rig_close(&r);
}

static void requests_can_be_cancelled_at_any_moment(void **state) {
  (void)state;
  enum { COUNT = 30 };
  struct rig r;
  struct client clients[COUNT];
  static int32_t ids[COUNT][600];
  struct service_stats stats;
  struct rig_options o = rig_options(model.path);
  o.budget_tokens = 900;
  o.service.max_running = 4;
  rig_open(&r, &o);
  uint64_t random = 9;
  for (int i = 0; i < COUNT; i++) {
    const int n = 1 + (int)(test_random(&random) % 600);
    some_ids((uint64_t)i, n, ids[i]);
    struct request_options options = client_options(ids[i], n, 200);
    if (i % 5 == 4) options.choices = 3;
    if (i % 7 == 6) options.deadline_ns = time_ns() + (int64_t)(test_random(&random) % 300000000);
    client_submit(r.service, &clients[i], options);
  }
  for (int i = 0; i < COUNT; i++) {
    const int which = (int)(test_random(&random) % COUNT);
    if (i % 3 == 0) client_wait_tokens(&clients[which], (int)(test_random(&random) % 20));
    service_cancel(r.service, clients[which].id);
    if (i % 4 == 0) usleep((unsigned)(test_random(&random) % 20000));
  }
  for (int i = 0; i < COUNT; i += 2) service_cancel(r.service, clients[i].id);
  service_cancel(r.service, 123456);
  for (int i = 0; i < COUNT; i++) client_wait(&clients[i]);
  service_stats_get(r.service, &stats);
  assert_true(stats.finished[FINISH_CANCELLED] > 0);
  assert_int_equal(stats.finished[FINISH_ERROR], 0);
  for (int i = 0; i < COUNT; i++) client_clear(&clients[i]);
  rig_close(&r);
}

static void a_deadline_ends_what_waits_and_what_runs(void **state) {
  (void)state;
  struct rig r;
  struct client running, waiting;
  int32_t ids[20];
  some_ids(3, 20, ids);
  struct rig_options o = rig_options(model.path);
  o.service.max_running = 1;
  rig_open(&r, &o);
  struct request_options options = client_options(ids, 20, 0);
  options.deadline_ns = time_ns() + 200000000;
  client_submit(r.service, &running, options);
  options.deadline_ns = time_ns() + 50000000;
  client_submit(r.service, &waiting, options);
  client_wait(&waiting);
  client_wait(&running);
  assert_int_equal(waiting.answers[0].reason, FINISH_CANCELLED);
  assert_int_equal(waiting.answers[0].n, 0);
  assert_true(running.answers[0].reason == FINISH_CANCELLED || running.answers[0].reason == FINISH_LENGTH);
  client_clear(&running);
  client_clear(&waiting);
  rig_close(&r);
}

static void stopping_cancels_what_is_left(void **state) {
  (void)state;
  struct rig r;
  struct client clients[12];
  struct service_error error;
  int32_t ids[200];
  some_ids(3, 200, ids);
  struct rig_options o = rig_options(model.path);
  o.service.max_running = 3;
  rig_open(&r, &o);
  for (int i = 0; i < 12; i++) client_submit(r.service, &clients[i], client_options(ids, 200, 0));
  client_wait_tokens(&clients[0], 2);
  service_stop(r.service);
  for (int i = 0; i < 12; i++) {
    assert_true(clients[i].done);
    assert_int_equal(clients[i].answers[0].reason, FINISH_CANCELLED);
    client_clear(&clients[i]);
  }
  assert_int_equal(client_try(r.service, &clients[0], client_options(ids, 20, 1), &error), OSCAR_CANCELLED);
  client_clear(&clients[0]);
  rig_close(&r);
}

/* ---- prompts that begin alike ---- */

static void a_shared_beginning_is_computed_once(void **state) {
  (void)state;
  enum { COUNT = 32, SHARED = 800, OWN = 20 };
  struct rig r;
  struct client clients[COUNT];
  static int32_t ids[COUNT][SHARED + OWN];
  struct service_stats stats;
  struct rig_options o = rig_options(model.path);
  o.service.max_running = COUNT;
  rig_open(&r, &o);
  for (int i = 0; i < COUNT; i++) {
    some_ids(1, SHARED, ids[i]);
    some_ids(100 + (uint64_t)i, OWN, ids[i] + SHARED);
    client_submit(r.service, &clients[i], client_options(ids[i], SHARED + OWN, 20));
  }
  for (int i = 0; i < COUNT; i++) client_wait(&clients[i]);
  service_stats_get(r.service, &stats);
  /* What is not shared is the window of exact pages, which only the end of a sequence has. */
  printf("  %lld tokens computed of %d, %lld reused\n", (long long)stats.computed, COUNT * (SHARED + OWN),
         (long long)stats.reused_exact);
  assert_int_equal(stats.computed + stats.reused_exact + stats.refilled, COUNT * (SHARED + OWN));
  assert_true(stats.prefix.known_pages < 20 + COUNT);
  for (int i = 0; i < COUNT; i++) client_clear(&clients[i]);
  rig_close(&r);
}

/* ---- turns ---- */

struct turn {
  struct client client;
  int *order;
  int which, at;
};
static int turns_taken;
static int turn_order[64];

static void note_turn(void *user, const struct request_event *e) {
  struct turn *t = user;
  if (e->kind == EVENT_DONE) turn_order[turns_taken++] = t->which;
  client_observe(&t->client, e);
}

/* One user has asked for a lot before the other asks for a little: the other need not wait for all of it. */
static void users_take_turns(void **state) {
  (void)state;
  struct rig r;
  static struct turn turns[10];
  struct service_error error;
  int32_t ids[100];
  some_ids(3, 100, ids);
  struct rig_options o = rig_options(model.path);
  o.service.max_running = 1;
  rig_open(&r, &o);
  turns_taken = 0;
  for (int i = 0; i < 10; i++) {
    struct request_options options = client_options(ids, 100, 20);
    options.user = i < 8 ? "many" : "few";
    options.observer = note_turn;
    options.observer_user = &turns[i];
    client_init(&turns[i].client);
    turns[i].client.choices = 1;
    turns[i].which = i;
    assert_int_equal(service_submit(r.service, &options, &turns[i].client.id, &error), OSCAR_OK);
  }
  for (int i = 0; i < 10; i++) client_wait(&turns[i].client);
  int first = 0;
  while (turn_order[first] < 8) first++;
  assert_true(first <= 2);                /* the first of "few" is among the first three */
  for (int i = 0, last = -1; i < 10; i++) /* and each user's come in order */
    if (turn_order[i] < 8) {
      assert_true(turn_order[i] > last);
      last = turn_order[i];
    }
  for (int i = 0; i < 10; i++) client_clear(&turns[i].client);
  rig_close(&r);
}

/* ---- short prompts and long ones ---- */

enum { LONG_PROMPT = 2000, SHORT_PROMPT = 50, SHORT_PROMPTS = 40 };

static struct rig_options options_for_long_prompts(void) {
  struct rig_options o = rig_options(model.path);
  o.context = 2048;
  o.chunk = 64;
  return o;
}

/* The service computes this many prompts. */
static void wait_prefilling(struct service *s, int prompts) {
  struct service_stats stats;
  do {
    usleep(500);
    service_stats_get(s, &stats);
  } while (stats.prefilling < prompts);
}

static int answered(struct client *c) {
  pthread_mutex_lock(&c->lock);
  const int n = c->answers[0].n;
  pthread_mutex_unlock(&c->lock);
  return n;
}

static void a_short_prompt_does_not_wait_for_a_long_one(void **state) {
  (void)state;
  static int32_t long_ids[LONG_PROMPT], ids[SHORT_PROMPT];
  struct client slow, quick, alone[2];
  const struct rig_options o = options_for_long_prompts();
  some_ids(1, LONG_PROMPT, long_ids);
  some_ids(2, SHORT_PROMPT, ids);
  struct request_options of_long = client_options(long_ids, LONG_PROMPT, 8), of_short = client_options(ids, SHORT_PROMPT, 8);
  for (int i = 0; i < 2; i++) {
    struct rig r;
    rig_open(&r, &o);
    client_submit(r.service, &alone[i], i ? of_short : of_long);
    client_wait(&alone[i]);
    rig_close(&r);
  }
  for (int users = 1; users <= 2; users++) {
    struct rig r;
    rig_open(&r, &o);
    of_long.user = "a";
    of_short.user = users == 1 ? "a" : "b";
    client_submit(r.service, &slow, of_long);
    wait_prefilling(r.service, 1);
    client_submit(r.service, &quick, of_short);
    client_wait_tokens(&quick, 1);
    assert_int_equal(answered(&slow), 0);
    client_wait(&quick);
    client_wait(&slow);
    assert_memory_equal(quick.answers[0].ids, alone[1].answers[0].ids, 8 * sizeof(int32_t));
    assert_memory_equal(slow.answers[0].ids, alone[0].answers[0].ids, 8 * sizeof(int32_t));
    client_clear(&quick);
    client_clear(&slow);
    rig_close(&r);
  }
  for (int i = 0; i < 2; i++) client_clear(&alone[i]);
}

/* Where there is room for the long one alone, in the end: the short one has gone by then. */
static void a_short_prompt_does_not_wait_for_room(void **state) {
  (void)state;
  static int32_t long_ids[LONG_PROMPT], ids[SHORT_PROMPT];
  struct client slow, quick;
  struct rig r;
  struct rig_options o = options_for_long_prompts();
  o.kv = "bf16";
  o.budget_tokens = LONG_PROMPT + 400; /* what the tree knows takes room, too */
  rig_open(&r, &o);
  some_ids(1, LONG_PROMPT, long_ids);
  some_ids(2, SHORT_PROMPT, ids);
  client_submit(r.service, &slow, client_options(long_ids, LONG_PROMPT, 8));
  wait_prefilling(r.service, 1);
  client_submit(r.service, &quick, client_options(ids, SHORT_PROMPT, 8));
  client_wait(&quick);
  assert_int_equal(answered(&slow), 0);
  client_wait(&slow);
  assert_int_equal(quick.answers[0].reason, FINISH_LENGTH);
  assert_int_equal(slow.answers[0].reason, FINISH_LENGTH);
  client_clear(&quick);
  client_clear(&slow);
  rig_close(&r);
}

/* What its session holds is no work, also where there is no tree to ask. */
static void the_next_turn_of_a_session_is_short(void **state) {
  (void)state;
  enum { TURN = 1500, MORE = 20 };
  static int32_t long_ids[LONG_PROMPT], ids[TURN + MORE];
  struct client slow, quick;
  struct rig r;
  struct rig_options o = options_for_long_prompts();
  o.service.reuse = OSCAR_PREFIX_OFF;
  rig_open(&r, &o);
  some_ids(1, LONG_PROMPT, long_ids);
  some_ids(2, TURN + MORE, ids);
  struct request_options of_session = client_options(ids, TURN, 1);
  of_session.session = "chat";
  client_submit(r.service, &quick, of_session);
  client_wait(&quick);
  client_clear(&quick);
  client_submit(r.service, &slow, client_options(long_ids, LONG_PROMPT, 1));
  wait_prefilling(r.service, 1);
  of_session.n = TURN + MORE;
  client_submit(r.service, &quick, of_session);
  client_wait(&quick);
  assert_int_equal(answered(&slow), 0);
  assert_true(quick.usage.computed <= MORE + 1);
  client_wait(&slow);
  client_clear(&quick);
  client_clear(&slow);
  rig_close(&r);
}

/* However many come. */
static void a_long_prompt_does_not_wait_for_short_ones(void **state) {
  (void)state;
  enum { EACH = 300, LONGER = 1800 };
  static int32_t long_ids[LONGER], ids[SHORT_PROMPTS][EACH];
  struct client slow, quick[SHORT_PROMPTS];
  struct rig r;
  int done = 0;
  const struct rig_options o = options_for_long_prompts();
  rig_open(&r, &o);
  some_ids(1, LONGER, long_ids);
  client_submit(r.service, &slow, client_options(long_ids, LONGER, 1));
  wait_prefilling(r.service, 1);
  for (int i = 0; i < SHORT_PROMPTS; i++) {
    some_ids(10 + (uint64_t)i, EACH, ids[i]);
    client_submit(r.service, &quick[i], client_options(ids[i], EACH, 1));
  }
  client_wait(&slow);
  for (int i = 0; i < SHORT_PROMPTS; i++) done += answered(&quick[i]) > 0;
  printf("  %d of %d short prompts are done before the long one\n", done, SHORT_PROMPTS);
  assert_true(done >= 2 && done <= LONGER / EACH + 2);
  for (int i = 0; i < SHORT_PROMPTS; i++) client_wait(&quick[i]);
  for (int i = 0; i < SHORT_PROMPTS; i++) client_clear(&quick[i]);
  client_clear(&slow);
  rig_close(&r);
}

/* One that begins as the prompt that is computed waits until that is as far, and no longer. */
static void what_is_computed_already_is_waited_for(void **state) {
  (void)state;
  enum { SHARED = 800, OWN = 20 };
  static int32_t long_ids[LONG_PROMPT], ids[SHARED + OWN];
  struct client slow, quick;
  struct rig r;
  const struct rig_options o = options_for_long_prompts();
  rig_open(&r, &o);
  some_ids(1, LONG_PROMPT, long_ids);
  memcpy(ids, long_ids, SHARED * sizeof *ids);
  some_ids(2, OWN, ids + SHARED);
  client_submit(r.service, &slow, client_options(long_ids, LONG_PROMPT, 1));
  wait_prefilling(r.service, 1);
  client_submit(r.service, &quick, client_options(ids, SHARED + OWN, 1));
  client_wait(&quick);
  assert_int_equal(answered(&slow), 0);
  printf("  %lld tokens computed of %d\n", (long long)quick.usage.computed, SHARED + OWN);
  assert_true(quick.usage.computed < (SHARED + OWN) * 2 / 3);
  client_wait(&slow);
  client_clear(&quick);
  client_clear(&slow);
  rig_close(&r);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(text_goes_out_in_whole_characters),
      cmocka_unit_test(what_may_become_a_stop_string_is_held),
      cmocka_unit_test(a_stop_string_ends_an_answer),
      cmocka_unit_test(choices_are_what_seeds_give),
      cmocka_unit_test(limits_are_kept_and_named),
      cmocka_unit_test(too_many_that_wait_are_refused),
      cmocka_unit_test(requests_can_be_cancelled_at_any_moment),
      cmocka_unit_test(a_deadline_ends_what_waits_and_what_runs),
      cmocka_unit_test(stopping_cancels_what_is_left),
      cmocka_unit_test(a_shared_beginning_is_computed_once),
      cmocka_unit_test(users_take_turns),
      cmocka_unit_test(a_short_prompt_does_not_wait_for_a_long_one),
      cmocka_unit_test(a_short_prompt_does_not_wait_for_room),
      cmocka_unit_test(the_next_turn_of_a_session_is_short),
      cmocka_unit_test(a_long_prompt_does_not_wait_for_short_ones),
      cmocka_unit_test(what_is_computed_already_is_waited_for),
  };
  return cmocka_run_group_tests(tests, make_model, free_model);
}
