/*
 * Files of sessions are written by a thread of their own: nobody waits for a slow disk, and what crosses a write keeps its order.
 *
 * The disk is as slow as a test wants: fsync below stands in the place of the C library's, and waits at a gate.
 */
#include "session_client.h"

#include <errno.h>
#include <stdatomic.h>
#include <sys/stat.h>
#include <sys/syscall.h>

/* ---- the disk ---- */

static struct {
  pthread_mutex_t lock;
  pthread_cond_t changed;
  bool closed, full;
  int waiting;   /* in fsync */
  int synced;    /* files and folders, until now */
  int timed_out; /* nobody opened the gate: a test would hang */
} disk = {.lock = PTHREAD_MUTEX_INITIALIZER, .changed = PTHREAD_COND_INITIALIZER};

int fsync(int fd);
int fsync(int fd) {
  struct timespec until;
  clock_gettime(CLOCK_REALTIME, &until);
  until.tv_sec += 20;
  pthread_mutex_lock(&disk.lock);
  disk.waiting++;
  disk.synced++;
  pthread_cond_broadcast(&disk.changed);
  while (disk.closed && !disk.timed_out)
    if (pthread_cond_timedwait(&disk.changed, &disk.lock, &until) == ETIMEDOUT) disk.timed_out = 1;
  disk.waiting--;
  const bool full = disk.full;
  pthread_mutex_unlock(&disk.lock);
  if (!full) return (int)syscall(SYS_fsync, fd);
  errno = ENOSPC;
  return -1;
}

static void disk_close(void) {
  pthread_mutex_lock(&disk.lock);
  disk.closed = true;
  pthread_mutex_unlock(&disk.lock);
}

static void disk_open(void) {
  pthread_mutex_lock(&disk.lock);
  disk.closed = false;
  pthread_cond_broadcast(&disk.changed);
  pthread_mutex_unlock(&disk.lock);
}

/* Somebody waits for the disk. */
static void disk_wait(void) {
  pthread_mutex_lock(&disk.lock);
  while (!disk.waiting) pthread_cond_wait(&disk.changed, &disk.lock);
  pthread_mutex_unlock(&disk.lock);
}

static void require_slow(void) {
  pthread_mutex_lock(&disk.lock);
  const bool held = disk.closed && disk.waiting == 1 && !disk.timed_out;
  pthread_mutex_unlock(&disk.lock);
  assert_true(held);
}

static int disk_synced(void) {
  pthread_mutex_lock(&disk.lock);
  const int synced = disk.synced;
  pthread_mutex_unlock(&disk.lock);
  return synced;
}

static void disk_be_full(bool full) {
  pthread_mutex_lock(&disk.lock);
  disk.full = full;
  pthread_mutex_unlock(&disk.lock);
}

/* ---- other threads ---- */

typedef oscar_status session_call(struct service *s, const char *name, struct service_error *error);

struct caller {
  pthread_t thread;
  struct service *service;
  session_call *call;
  const char *name;
  atomic_bool returned;
  oscar_status status;
  struct service_error error;
};

static void *make_call(void *arg) {
  struct caller *c = arg;
  c->status = c->call(c->service, c->name, &c->error);
  c->returned = true;
  return NULL;
}

static void call(struct caller *c, struct service *s, session_call *what, const char *name) {
  *c = (struct caller){.service = s, .call = what, .name = name};
  assert_int_equal(pthread_create(&c->thread, NULL, make_call, c), 0);
}

static void join(struct caller *c) {
  assert_int_equal(pthread_join(c->thread, NULL), 0);
  if (c->status != OSCAR_OK) fail_msg("%s", c->error.text);
}

static oscar_status rename_to_other(struct service *s, const char *name, struct service_error *e) {
  return service_session_rename(s, name, "other", e);
}

static bool has_file(const char *name) {
  char path[128];
  struct stat info;
  snprintf(path, sizeof path, "%s/%s.session", folder, name);
  return stat(path, &info) == 0;
}

static struct rig_options options_with_folder(void) {
  struct rig_options o = rig_options(model.path);
  make_folder();
  o.service.folder = folder;
  return o;
}

/* ---- tests ---- */

/* A request of the session that is written, one of another and one of none; then all is in files as it was last. */
static void nobody_waits_for_a_slow_disk(void **state) {
  (void)state;
  struct rig r;
  struct talk expected, a = {.n = 0}, b = {.n = 0};
  struct client c;
  struct service_stats stats;
  const struct rig_options o = options_with_folder(), plain = rig_options(model.path);
  rig_open(&r, &plain);
  expected = (struct talk){.n = 0};
  for (int i = 0; i < 3; i++) say(r.service, "a", &expected, 100 + 50 * i, 70, (uint64_t)i);
  rig_close(&r);
  rig_open(&r, &o);
  disk_close();
  say(r.service, "a", &a, 100, 70, 0);
  disk_wait();
  say(r.service, "a", &a, 150, 70, 1);
  require_slow();
  say(r.service, "b", &b, 100, 70, 0);
  client_submit(r.service, &c, client_options(a.ids, 90, 20));
  client_wait(&c);
  client_clear(&c);
  require_slow();
  assert_false(entry_of(r.service, "a").on_disk || entry_of(r.service, "b").on_disk);
  assert_false(has_file("a") || has_file("b"));
  service_stats_get(r.service, &stats);
  assert_true(stats.host_bytes > 100000); /* the copy */
  disk_open();
  while (!entry_of(r.service, "a").on_disk || !entry_of(r.service, "b").on_disk) usleep(1000);
  service_stats_get(r.service, &stats);
  assert_int_equal(stats.host_bytes, 0);
  rig_close(&r);
  rig_open(&r, &o);
  assert_int_equal(entry_of(r.service, "a").tokens, a.n - 1);
  assert_int_equal(entry_of(r.service, "b").tokens, b.n - 1);
  const int before = a.n;
  assert_int_equal(say(r.service, "a", &a, 200, 70, 2).reused_exact, before - 1);
  assert_memory_equal(a.ids, expected.ids, (size_t)expected.n * sizeof *a.ids);
  rig_close(&r);
  remove_folder();
}

static void commands_that_cross_a_write_wait_for_it(void **state) {
  (void)state;
  struct rig r;
  struct talk t = {.n = 0}, u = {.n = 0};
  struct caller save, other, end;
  const struct rig_options o = options_with_folder();
  rig_open(&r, &o);
  disk_close();
  say(r.service, "a", &t, 200, 50, 1);
  disk_wait();
  call(&save, r.service, service_session_save, "a");
  usleep(20000);
  call(&other, r.service, rename_to_other, "a");
  usleep(20000);
  say(r.service, "b", &u, 100, 20, 2);
  require_slow();
  assert_false(save.returned || other.returned);
  disk_open();
  join(&save);
  join(&other);
  assert_true(has_file("other") && !has_file("a"));
  assert_true(exists(r.service, "other") && !exists(r.service, "a"));
  /* One that ends while it is written has no file afterwards, now or later. */
  assert_done(service_session_save(r.service, "b", &error));
  disk_close();
  assert_done(service_session_annotate(r.service, "b", "another text", &error));
  u.n = 0;
  say(r.service, "c", &u, 100, 20, 2);
  disk_wait();
  call(&end, r.service, service_session_delete, "b");
  call(&other, r.service, service_session_delete, "c");
  usleep(20000);
  require_slow();
  disk_open();
  join(&end);
  join(&other);
  assert_false(has_file("b") || has_file("c"));
  rig_close(&r);
  assert_true(has_file("other") && !has_file("a") && !has_file("b") && !has_file("c"));
  remove_folder();
}

static void *open_soon(void *arg) {
  (void)arg;
  usleep(200000);
  disk_open();
  return NULL;
}

static void stopping_waits_for_what_is_written(void **state) {
  (void)state;
  struct rig r;
  struct talk t[3] = {{.n = 0}};
  struct caller save;
  pthread_t opener;
  char name[3][2] = {"a", "b", "c"};
  const struct rig_options o = options_with_folder();
  rig_open(&r, &o);
  disk_close();
  for (int i = 0; i < 3; i++) say(r.service, name[i], &t[i], 100, 50, (uint64_t)i);
  disk_wait();
  say(r.service, "a", &t[0], 50, 50, 7);
  call(&save, r.service, service_session_save, "c");
  usleep(20000);
  assert_int_equal(pthread_create(&opener, NULL, open_soon, NULL), 0);
  rig_close(&r);
  pthread_join(opener, NULL);
  join(&save);
  rig_open(&r, &o);
  for (int i = 0; i < 3; i++) assert_int_equal(entry_of(r.service, name[i]).tokens, t[i].n - 1);
  rig_close(&r);
  remove_folder();
}

static void who_asks_hears_of_a_full_disk(void **state) {
  (void)state;
  struct rig r;
  struct talk t = {.n = 0};
  struct rig_options o = options_with_folder();
  for (int i = 0; i < 2; i++) {
    t.n = 0;
    rig_open(&r, &o);
    disk_be_full(true);
    say(r.service, "a", &t, 200, 50, 1);
    assert_int_equal(service_session_save(r.service, "a", &error), OSCAR_IO);
    assert_non_null(strstr(error.text, "No space left on device"));
    assert_false(entry_of(r.service, "a").on_disk || has_file("a"));
    const int before = t.n;
    assert_int_equal(say(r.service, "a", &t, 50, 50, 2).reused_exact, before - 1);
    disk_be_full(false);
    assert_done(service_session_save(r.service, "a", &error));
    assert_true(entry_of(r.service, "a").on_disk && has_file("a"));
    assert_done(service_session_delete(r.service, "a", &error));
    rig_close(&r);
    o.service.host_bytes = 0; /* no room for copies: the service's thread writes */
  }
  remove_folder();
}

/* Sessions in host memory and in files, which get other texts. */
static void sessions_are_written_from_wherever_they_are(void **state) {
  (void)state;
  struct rig r;
  struct talk t[4] = {{.n = 0}};
  struct session_entry e;
  char name[4][2] = {"a", "b", "c", "d"};
  struct rig_options o = options_with_folder();
  o.budget_tokens = 700;
  disk_close(); /* so that they leave the device before they are written */
  rig_open(&r, &o);
  for (int i = 0; i < 4; i++) say(r.service, name[i], &t[i], 400, 50, (uint64_t)i);
  disk_wait();
  require_slow();
  assert_int_equal(entry_of(r.service, "b").tier, TIER_HOST);
  disk_open();
  for (int i = 0; i < 4; i++) assert_done(service_session_annotate(r.service, name[i], "a text", &error));
  for (int i = 0; i < 4; i++) assert_done(service_session_save(r.service, name[i], &error));
  rig_close(&r);
  rig_open(&r, &o);
  for (int i = 0; i < 4; i++) {
    assert_int_equal(entry_of(r.service, name[i]).tier, TIER_DISK);
    assert_done(service_session_annotate(r.service, name[i], "a longer text", &error));
    assert_done(service_session_save(r.service, name[i], &error));
  }
  rig_close(&r);
  rig_open(&r, &o);
  for (int i = 0; i < 4; i++) {
    assert_done(service_session_find(r.service, name[i], &e, &error));
    assert_string_equal(e.text, "a longer text");
    free(e.text);
    const int before = t[i].n;
    assert_int_equal(say(r.service, name[i], &t[i], 20, 10, 5).reused_exact, before - 1);
  }
  rig_close(&r);
  remove_folder();
}

/* A file and its folder are synced once, if both come soon after each other: of some tries, once is enough. */
static void an_answer_and_its_text_are_one_write(void **state) {
  (void)state;
  struct rig r;
  struct talk t = {.n = 0};
  const struct rig_options o = options_with_folder();
  bool once = false;
  rig_open(&r, &o);
  for (int i = 0; i < 10 && !once; i++) {
    const int before = disk_synced();
    say(r.service, "a", &t, 20, 5, (uint64_t)i);
    assert_done(service_session_annotate(r.service, "a", i % 2 ? "a text" : "another", &error));
    while (!entry_of(r.service, "a").on_disk) usleep(1000);
    once = disk_synced() - before == 2;
  }
  assert_true(once);
  rig_close(&r);
  remove_folder();
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(nobody_waits_for_a_slow_disk),
      cmocka_unit_test(commands_that_cross_a_write_wait_for_it),
      cmocka_unit_test(stopping_waits_for_what_is_written),
      cmocka_unit_test(who_asks_hears_of_a_full_disk),
      cmocka_unit_test(sessions_are_written_from_wherever_they_are),
      cmocka_unit_test(an_answer_and_its_text_are_one_write),
  };
  return cmocka_run_group_tests(tests, make_model, free_model);
}
