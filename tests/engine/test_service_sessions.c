/* Sessions: going on, going back, other names, and from the device to host memory to files and back, bit for bit. */
#include "session_client.h"

#include <sys/stat.h>

/* Three turns without interruption: what others are compared with. */
static void three_turns(const struct rig_options *o, struct talk *t) {
  struct rig r;
  *t = (struct talk){.n = 0};
  rig_open(&r, o);
  for (int i = 0; i < 3; i++) say(r.service, "a", t, 100 + 50 * i, 70, (uint64_t)i);
  rig_close(&r);
}

static void a_session_goes_on_without_computing_again(void **state) {
  (void)state;
  struct rig r;
  struct talk t = {.n = 0};
  const struct rig_options o = rig_options(model.path);
  rig_open(&r, &o);
  say(r.service, "chat", &t, 200, 50, 1);
  const int before = t.n;
  struct request_usage usage = say(r.service, "chat", &t, 30, 50, 2);
  assert_int_equal(usage.computed, 31); /* and the newest token, which had not been run */
  assert_int_equal(usage.reused_exact, before - 1);
  struct session_entry e = entry_of(r.service, "chat");
  assert_int_equal(e.tier, TIER_DEVICE);
  assert_int_equal(e.tokens, t.n - 1);
  int32_t *ids;
  int n;
  assert_done(service_session_tokens(r.service, "chat", &ids, &n, &error));
  assert_int_equal(n, t.n);
  assert_memory_equal(ids, t.ids, (size_t)n * sizeof *ids);
  free(ids);
  /* Back to the middle of the second turn, and on with something else. */
  t.n = before + 10;
  usage = say(r.service, "chat", &t, 20, 30, 3);
  assert_true(usage.reused_exact > 0);
  assert_int_equal(entry_of(r.service, "chat").tokens, t.n - 1);
  /* Something else altogether. */
  t.n = 0;
  usage = say(r.service, "chat", &t, 150, 20, 99);
  assert_int_equal(usage.reused_exact, 0);
  assert_int_equal(entry_of(r.service, "chat").tokens, t.n - 1);
  rig_close(&r);
}

/* The vocabulary is "a", "b" and "ab" (small_model.h), and ids that spell nothing and are only themselves. */
static void the_same_text_in_other_tokens_is_not_computed_again(void **state) {
  (void)state;
  enum { PROMPT = 200, ANSWER = 50, A = 0, B = 1, AB = 2 };
  static const struct {
    int32_t in_its_place[2];
    bool spells_it;
  } cases[] = {{{A, B}, true}, {{A, A}, false}, {{A, 9}, false}, {{9, B}, false}};
  const struct rig_options o = rig_options(model.path);
  for (size_t i = 0; i < ARRAY_LENGTH(cases); i++) {
    struct rig r;
    struct talk t = {.n = 0}, other = {.n = 0};
    rig_open(&r, &o);
    some_ids(1, PROMPT, t.ids);
    t.ids[PROMPT - 5] = AB;
    t.n = PROMPT;
    say(r.service, "chat", &t, 0, ANSWER, 0);
    memcpy(other.ids, t.ids, (PROMPT - 5) * sizeof *t.ids);
    memcpy(other.ids + PROMPT - 5, cases[i].in_its_place, sizeof cases[i].in_its_place);
    memcpy(other.ids + PROMPT - 3, t.ids + PROMPT - 4, (ANSWER + 4) * sizeof *t.ids);
    other.n = t.n + 1;
    const struct request_usage usage = say(r.service, "chat", &other, 30, ANSWER, 2);
    if (cases[i].spells_it) {
      assert_int_equal(usage.prompt_tokens, t.n + 30);
      assert_int_equal(usage.reused_exact, t.n - 1);
      assert_int_equal(usage.computed, 31);
    } else {
      assert_int_equal(usage.prompt_tokens, t.n + 31);
      assert_true(usage.reused_exact < PROMPT - 4);
    }
    rig_close(&r);
  }
}

static void sessions_come_back_bit_for_bit(void **state) {
  (void)state;
  struct rig r;
  struct talk expected, t[6] = {{.n = 0}};
  struct service_stats stats;
  struct rig_options o = rig_options(model.path);
  three_turns(&o, &expected);
  make_folder();
  o.service.folder = folder;
  o.budget_tokens = 700; /* of one, and six are to be kept */
  o.service.host_bytes = 700000;
  rig_open(&r, &o);
  char name[6][2] = {"a", "b", "c", "d", "e", "f"};
  for (int i = 0; i < 3; i++) {
    for (int k = 0; k < 6; k++) say(r.service, name[k], &t[k], 100 + 50 * i, 70, (uint64_t)i);
    if (i == 1) assert_done(service_session_load(r.service, "c", &error));
  }
  service_stats_get(r.service, &stats);
  printf("  %lld moved to host memory, %lld to files, %lld brought back\n", (long long)stats.moved_to_host,
         (long long)stats.moved_to_disk, (long long)stats.brought_back);
  assert_true(stats.moved_to_host > 0 && stats.moved_to_disk > 0 && stats.brought_back > 0);
  assert_int_equal(stats.dropped, 0);
  assert_true(stats.host_bytes <= o.service.host_bytes);
  for (int k = 0; k < 6; k++) assert_memory_equal(t[k].ids, expected.ids, (size_t)expected.n * sizeof(int32_t));
  rig_close(&r);
  remove_folder();
}

static void sessions_outlive_the_service(void **state) {
  (void)state;
  struct rig r;
  struct talk expected, t[3] = {{.n = 0}};
  struct rig_options o = rig_options(model.path);
  three_turns(&o, &expected);
  make_folder();
  o.service.folder = folder;
  for (int i = 0; i < 3; i++) {
    rig_open(&r, &o);
    for (int k = 0; k < 3; k++) {
      char name[] = {(char)('a' + k), '\0'};
      if (i > 0) {
        const struct session_entry e = entry_of(r.service, name);
        assert_int_equal(e.tier, TIER_DISK);
        assert_int_equal(e.tokens, t[k].n - 1);
        assert_true(e.on_disk && e.disk_bytes > 0);
      }
      const int before = t[k].n;
      const struct request_usage usage = say(r.service, name, &t[k], 100 + 50 * i, 70, (uint64_t)i);
      if (i > 0 && k == 0) assert_int_equal(usage.reused_exact, before - 1);
    }
    rig_close(&r);
  }
  for (int k = 0; k < 3; k++) assert_memory_equal(t[k].ids, expected.ids, (size_t)expected.n * sizeof(int32_t));
  /* What is no session of this model is left alone. */
  char path[128];
  snprintf(path, sizeof path, "%s/bad.session", folder);
  FILE *f = fopen(path, "wb");
  fputs("this is not a session", f);
  fclose(f);
  snprintf(path, sizeof path, "%s/b.session", folder);
  assert_int_equal(truncate(path, 1000), 0);
  rig_open(&r, &o);
  assert_true(exists(r.service, "a") && exists(r.service, "c") && !exists(r.service, "b") && !exists(r.service, "bad"));
  struct session_entry *entries;
  int count;
  assert_done(service_sessions(r.service, &entries, &count, &error));
  assert_int_equal(count, 2);
  service_sessions_free(entries, count);
  rig_close(&r);
  struct stat info;
  snprintf(path, sizeof path, "%s/bad.session", folder);
  assert_int_equal(stat(path, &info), 0);
  assert_int_equal(info.st_size, 21);
  remove_folder();
}

/* As another program would put it there. */
static void copy_session(const char *from, const char *to) {
  char path[128], temporary[128];
  static char bytes[4 << 20];
  snprintf(path, sizeof path, "%s/%s.session", folder, from);
  FILE *f = fopen(path, "rb");
  assert_non_null(f);
  const size_t n = fread(bytes, 1, sizeof bytes, f);
  fclose(f);
  snprintf(temporary, sizeof temporary, "%s/temporary", folder);
  f = fopen(temporary, "wb");
  assert_int_equal(fwrite(bytes, 1, n, f), n);
  fclose(f);
  snprintf(path, sizeof path, "%s/%s.session", folder, to);
  assert_int_equal(rename(temporary, path), 0);
}

static void files_of_other_programs_are_taken_up_or_left_alone(void **state) {
  (void)state;
  struct rig r;
  struct talk t = {.n = 0}, old;
  struct client c;
  char path[128];
  struct stat info;
  struct rig_options o = rig_options(model.path);
  make_folder();
  o.service.folder = folder;
  rig_open(&r, &o);
  say(r.service, "a", &t, 200, 50, 1);
  assert_done(service_session_save(r.service, "a", &error));
  assert_false(exists(r.service, "late"));
  copy_session("a", "late"); /* while the service runs */
  assert_int_equal(service_session_fork(r.service, "a", "late", &error), OSCAR_INVALID_ARGUMENT);
  assert_int_equal(entry_of(r.service, "late").tokens, t.n - 1);
  old = t;
  assert_int_equal(say(r.service, "late", &old, 30, 20, 2).reused_exact, t.n - 1);
  copy_session("a", "other");
  rig_close(&r);
  /* One that the service has not touched yet is replaced by a longer one. */
  rig_open(&r, &o);
  assert_int_equal(entry_of(r.service, "other").tokens, t.n - 1);
  say(r.service, "a", &t, 100, 50, 3);
  assert_done(service_session_save(r.service, "a", &error));
  copy_session("a", "other");
  old = t;
  say(r.service, "other", &old, 30, 20, 4);
  say(r.service, "a", &t, 30, 20, 4);
  assert_memory_equal(t.ids, old.ids, (size_t)t.n * sizeof *t.ids);
  /* What cannot be used is not overwritten. */
  snprintf(path, sizeof path, "%s/bad.session", folder);
  FILE *f = fopen(path, "wb");
  fputs("this is not a session", f);
  fclose(f);
  assert_false(exists(r.service, "bad"));
  assert_int_equal(service_session_rename(r.service, "a", "bad", &error), OSCAR_FORMAT);
  struct request_options options = client_options(t.ids, t.n, 5);
  options.session = "bad";
  client_submit(r.service, &c, options);
  client_wait(&c);
  assert_int_equal(c.answers[0].reason, FINISH_ERROR);
  assert_non_null(strstr(c.answers[0].error, "there is a session bad that cannot be used here"));
  client_clear(&c);
  rig_close(&r);
  assert_int_equal(stat(path, &info), 0);
  assert_int_equal(info.st_size, 21);
  remove_folder();
}

static void sessions_are_forked_renamed_annotated_and_deleted(void **state) {
  (void)state;
  struct rig r;
  struct talk t = {.n = 0}, copy;
  struct session_entry e;
  struct rig_options o = rig_options(model.path);
  make_folder();
  o.service.folder = folder;
  rig_open(&r, &o);
  say(r.service, "one", &t, 200, 50, 1);
  assert_done(service_session_annotate(r.service, "one", "{\"x\": 1}", &error));
  assert_done(service_session_fork(r.service, "one", "two", &error));
  assert_int_equal(service_session_fork(r.service, "one", "two", &error), OSCAR_INVALID_ARGUMENT);
  assert_int_equal(service_session_fork(r.service, "none", "three", &error), OSCAR_INVALID_ARGUMENT);
  copy = t;
  assert_int_equal(say(r.service, "two", &copy, 10, 20, 5).reused_exact, t.n - 1);
  assert_int_equal(say(r.service, "one", &t, 10, 20, 5).reused_exact, 249);
  assert_memory_equal(t.ids, copy.ids, (size_t)t.n * sizeof(int32_t));
  assert_done(service_session_save(r.service, "two", &error));
  assert_true(entry_of(r.service, "two").on_disk);
  assert_done(service_session_rename(r.service, "two", "second", &error));
  assert_int_equal(service_session_rename(r.service, "second", "one", &error), OSCAR_INVALID_ARGUMENT);
  assert_int_equal(service_session_rename(r.service, "second", "../x", &error), OSCAR_INVALID_ARGUMENT);
  assert_false(exists(r.service, "two"));
  assert_done(service_session_annotate(r.service, "second", "later", &error));
  rig_close(&r);
  rig_open(&r, &o);
  assert_done(service_session_find(r.service, "second", &e, &error));
  assert_string_equal(e.text, "later");
  free(e.text);
  /* With another text and nothing else, from file to file. */
  assert_done(service_session_annotate(r.service, "second", "and longer than it was before", &error));
  assert_done(service_session_save(r.service, "second", &error));
  assert_done(service_session_delete(r.service, "one", &error));
  assert_int_equal(service_session_delete(r.service, "one", &error), OSCAR_INVALID_ARGUMENT);
  rig_close(&r);
  rig_open(&r, &o);
  assert_false(exists(r.service, "one"));
  assert_done(service_session_find(r.service, "second", &e, &error));
  assert_string_equal(e.text, "and longer than it was before");
  free(e.text);
  assert_int_equal(say(r.service, "second", &copy, 10, 20, 6).reused_exact, 279);
  rig_close(&r);
  remove_folder();
}

static void two_requests_of_a_session_follow_each_other(void **state) {
  (void)state;
  struct rig r;
  struct client c[3];
  int32_t ids[300];
  some_ids(1, 300, ids);
  const struct rig_options o = rig_options(model.path);
  rig_open(&r, &o);
  for (int i = 0; i < 3; i++) {
    struct request_options options = client_options(ids, 100 + 100 * i, 100);
    options.session = "x";
    client_submit(r.service, &c[i], options);
  }
  client_wait_tokens(&c[0], 1);
  assert_int_equal(c[1].answers[0].n, 0);
  const struct session_entry e = entry_of(r.service, "x");
  assert_true(e.tier == TIER_RUNNING || c[2].done);
  if (!c[2].done) assert_int_equal(service_session_fork(r.service, "x", "y", &error), OSCAR_INVALID_ARGUMENT);
  for (int i = 0; i < 3; i++) client_wait(&c[i]);
  assert_int_equal(entry_of(r.service, "x").tokens, 399);
  for (int i = 0; i < 3; i++) client_clear(&c[i]);
  rig_close(&r);
}

/* Deleted while it runs: the answer goes on, the session is gone. */
static void a_running_session_can_be_deleted(void **state) {
  (void)state;
  struct rig r;
  struct client c;
  int32_t ids[300];
  some_ids(1, 300, ids);
  const struct rig_options o = rig_options(model.path);
  rig_open(&r, &o);
  struct request_options options = client_options(ids, 300, 200);
  options.session = "x";
  client_submit(r.service, &c, options);
  client_wait_tokens(&c, 1);
  assert_done(service_session_delete(r.service, "x", &error));
  client_wait(&c);
  assert_int_equal(c.answers[0].reason, FINISH_LENGTH);
  assert_false(exists(r.service, "x"));
  client_clear(&c);
  rig_close(&r);
}

static void files_stay_within_their_limit(void **state) {
  (void)state;
  struct rig r;
  struct talk t = {.n = 0};
  struct service_stats stats;
  struct rig_options o = rig_options(model.path);
  make_folder();
  o.service.folder = folder;
  rig_open(&r, &o);
  say(r.service, "first", &t, 200, 50, 1);
  assert_done(service_session_save(r.service, "first", &error));
  const size_t bytes = entry_of(r.service, "first").disk_bytes;
  rig_close(&r);
  o.service.disk_bytes = 3 * bytes + bytes / 2;
  rig_open(&r, &o);
  for (int i = 0; i < 5; i++) {
    char name[16];
    t.n = 0;
    snprintf(name, sizeof name, "s%d", i);
    say(r.service, name, &t, 200, 50, 10 + (uint64_t)i);
    assert_done(service_session_save(r.service, name, &error));
  }
  service_stats_get(r.service, &stats);
  assert_true(stats.disk_bytes <= o.service.disk_bytes);
  assert_int_equal(stats.dropped, 3);
  assert_false(exists(r.service, "first"));
  rig_close(&r);
  remove_folder();
}

static void names_are_checked(void **state) {
  (void)state;
  static const char *const good[] = {"a", "A9", "x.y-z_1", "0123456789012345678901234567890123456789012345678901234567890123"};
  static const char *const bad[] = {
      "", ".a", "-a", "_a", "a/b", "a b", "\xC3\xA4", "..", "01234567890123456789012345678901234567890123456789012345678901234"};
  for (size_t i = 0; i < ARRAY_LENGTH(good); i++) assert_true(session_name_is_valid(good[i]));
  for (size_t i = 0; i < ARRAY_LENGTH(bad); i++) assert_false(session_name_is_valid(bad[i]));
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(a_session_goes_on_without_computing_again),
      cmocka_unit_test(the_same_text_in_other_tokens_is_not_computed_again),
      cmocka_unit_test(sessions_come_back_bit_for_bit),
      cmocka_unit_test(sessions_outlive_the_service),
      cmocka_unit_test(files_of_other_programs_are_taken_up_or_left_alone),
      cmocka_unit_test(sessions_are_forked_renamed_annotated_and_deleted),
      cmocka_unit_test(two_requests_of_a_session_follow_each_other),
      cmocka_unit_test(a_running_session_can_be_deleted),
      cmocka_unit_test(files_stay_within_their_limit),
      cmocka_unit_test(names_are_checked),
  };
  return cmocka_run_group_tests(tests, make_model, free_model);
}
