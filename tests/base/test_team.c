/* Teams of threads: every piece of work is done once, whatever the members do meanwhile, sleep or spin; nothing is seen too
 * early; and with CPUs given, everybody is on its own, and OpenMP's threads on any of them. */
#include "support.h"

#include "base/team.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <time.h>

static oscar_context *context_with(int threads) {
  oscar_context_options options;
  oscar_context_options_default(&options);
  options.threads = threads;
  oscar_context *context = NULL;
  assert_int_equal(oscar_context_create(&options, &context), OSCAR_OK);
  return context;
}

static void nap(long ns) { nanosleep(&(struct timespec){0, ns}, NULL); }

/* ---- stretches ---- */

struct stretches {
  int64_t n;
  int *times; /* that each element was visited */
};

static void visit(void *arg, int64_t first, int64_t last) {
  struct stretches *s = arg;
  assert_true(0 <= first && first <= last && last <= s->n);
  for (int64_t i = first; i < last; i++) s->times[i]++;
}

static void every_element_is_visited_once(void **state) {
  (void)state;
  static const int threads[] = {1, 2, 3, 8};
  static const int64_t lengths[] = {0, 1, 2, 3, 7, 64, 1001};
  for (size_t t = 0; t < ARRAY_LENGTH(threads); t++) {
    oscar_context *context = context_with(threads[t]);
    for (int most = -1; most <= 9; most++)
      for (size_t k = 0; k < ARRAY_LENGTH(lengths); k++) {
        int times[1001] = {0};
        struct stretches s = {lengths[k], times};
        team_split(context, most, lengths[k], visit, &s);
        for (int64_t i = 0; i < lengths[k]; i++) assert_int_equal(times[i], 1);
      }
    oscar_context_free(context);
  }
}

/* ---- members, barriers, shared counters ---- */

enum { MOST = 8, PIECES = 50 };

struct phases {
  oscar_context *context;
  uint64_t random;
  _Atomic int present, failures;
  int plain[MOST]; /* written by each member before the barrier, read by all behind it */
  team_counter counter;
  _Atomic int taken[PIECES];
};

static void run_phases(void *arg, int member, int members) {
  struct phases *p = arg;
  atomic_fetch_add(&p->present, 1);
  uint64_t random = p->random + (uint64_t)member;
  if (test_random(&random) % 8 == 0) nap(200000); /* longer than anybody spins */
  p->plain[member] = member + 1;
  team_barrier(p->context, member);
  for (int i = 0; i < members; i++)
    if (p->plain[i] != i + 1) atomic_fetch_add(&p->failures, 1);
  team_barrier(p->context, member);
  p->plain[member] = 0;
  for (int64_t i; (i = team_take(&p->counter)) < PIECES;) atomic_fetch_add(&p->taken[i], 1);
  team_barrier(p->context, member);
  for (int i = 0; i < members; i++)
    if (p->plain[i] != 0) atomic_fetch_add(&p->failures, 1);
}

static void check_runs(int threads, int runs, uint64_t seed) {
  oscar_context *context = context_with(threads);
  for (int r = 0; r < runs; r++) {
    struct phases p = {.context = context, .random = seed + (uint64_t)r};
    int most = 1 + (int)(test_random(&seed) % (uint64_t)(threads + 2)), members = most < threads ? most : threads;
    team_run(context, most, run_phases, &p);
    assert_int_equal(p.present, members);
    assert_int_equal(p.failures, 0);
    for (int i = 0; i < PIECES; i++) assert_int_equal(p.taken[i], 1);
    if (test_random(&seed) % 16 == 0) nap(100000); /* so that the members fall asleep */
  }
  oscar_context_free(context);
}

static void members_meet_at_barriers_and_share_work(void **state) {
  (void)state;
  check_runs(1, 20, 1);
  check_runs(2, 400, 2);
  check_runs(3, 200, 3);
  check_runs(MOST, 100, 4); /* more than there are CPUs */
}

/* The shortest runs one after the other: a wake-up that got lost would hang here. */
static void count_calls(void *arg, int member, int members) {
  (void)member, (void)members;
  atomic_fetch_add((_Atomic int *)arg, 1);
}

static void no_wake_up_is_lost(void **state) {
  (void)state;
  enum { RUNS = 20000 };
  for (int threads = 2; threads <= 4; threads++) {
    oscar_context *context = context_with(threads);
    _Atomic int calls = 0;
    for (int r = 0; r < RUNS; r++) team_run(context, threads, count_calls, &calls);
    assert_int_equal(calls, RUNS * threads);
    oscar_context_free(context);
  }
}

/* ---- contexts beside each other, and without work ---- */

static void *use_context(void *arg) {
  _Atomic int calls = 0;
  oscar_context *context = NULL;
  oscar_context_options options;
  oscar_context_options_default(&options);
  options.threads = 3;
  if (oscar_context_create(&options, &context) != OSCAR_OK) return NULL;
  for (int r = 0; r < 2000; r++) team_run(context, 3, count_calls, &calls);
  oscar_context_free(context);
  if (calls == 3 * 2000) *(bool *)arg = true;
  return NULL;
}

static void contexts_do_not_know_of_each_other(void **state) {
  (void)state;
  pthread_t threads[2];
  bool done[2] = {false, false};
  for (int i = 0; i < 2; i++) assert_int_equal(pthread_create(&threads[i], NULL, use_context, &done[i]), 0);
  for (int i = 0; i < 2; i++) pthread_join(threads[i], NULL);
  assert_true(done[0] && done[1]);
  oscar_context_free(context_with(5)); /* never used: no threads to stop */
}

/* ---- CPUs ---- */

enum { MOST_CPUS = 4 };

/* The last of those that the calling thread may run on, in falling order, so that none is where it would be anyway. */
static int some_cpus(int *cpus) {
  int count = 0;
  for (int cpu = CPU_LIST_ROOM - 1; cpu >= 0 && count < MOST_CPUS; cpu--)
    if (cpu_is_allowed(cpu)) cpus[count++] = cpu;
  return count;
}

static oscar_context *pinned_context(int threads, const int *cpus, int n_cpus) {
  oscar_context_options options;
  oscar_context_options_default(&options);
  options.threads = threads;
  options.cpus = cpus;
  options.n_cpus = n_cpus;
  oscar_context *context = NULL;
  assert_int_equal(oscar_context_create(&options, &context), OSCAR_OK);
  return context;
}

static cpu_set_t set_of(const int *cpus, int count) {
  cpu_set_t set;
  CPU_ZERO(&set);
  for (int i = 0; i < count; i++) CPU_SET((size_t)cpus[i], &set);
  return set;
}

static bool may_run_on(const cpu_set_t *wanted) {
  cpu_set_t set;
  return sched_getaffinity(0, sizeof set, &set) == 0 && CPU_EQUAL(&set, wanted);
}

struct pinned {
  oscar_context *context;
  const int *cpus;
  int threads;
  _Atomic int astray, runs;
};

static void look_where_it_runs(void *arg, int member, int members) {
  (void)members;
  struct pinned *p = arg;
  const cpu_set_t own = set_of(p->cpus + member, 1);
  if (!may_run_on(&own) || sched_getcpu() != p->cpus[member]) atomic_fetch_add(&p->astray, 1);
  atomic_fetch_add(&p->runs, 1);
}

/* GCC's runtime leaves its threads where the one that makes them is; LLVM's moves them to where the process was at first. */
#if defined(__clang__)
#define OPENMP_INHERITS false
#else
#define OPENMP_INHERITS true
#endif

/* A run and a region of OpenMP, in turn, because OpenMP may make its threads anew whenever it likes. */
static void *run_and_use_openmp(void *arg) {
  struct pinned *p = arg;
  const cpu_set_t all = set_of(p->cpus, p->threads);
  for (int i = 0; i < 6; i++) {
    team_run(p->context, p->threads, look_where_it_runs, p);
    team_before_openmp(p->context);
    atomic_fetch_add(&p->astray, !may_run_on(&all));
    if (!OPENMP_INHERITS) continue;
    int astray = 0;
#pragma omp parallel num_threads(1 + (p->threads + i) % 3) reduction(+ : astray)
    astray += !may_run_on(&all);
    atomic_fetch_add(&p->astray, astray);
  }
  return NULL;
}

static void *run_once(void *arg) {
  struct pinned *p = arg;
  team_run(p->context, p->threads, look_where_it_runs, p);
  return NULL;
}

/* In a thread of its own: an OpenMP runtime that had threads before the context was made keeps them where they are. */
static void on_a_new_thread(void *(*work)(void *), void *arg) {
  pthread_t thread;
  assert_int_equal(pthread_create(&thread, NULL, work, arg), 0);
  assert_int_equal(pthread_join(thread, NULL), 0);
}

static void each_member_stays_on_its_cpu_and_openmp_on_all_of_them(void **state) {
  (void)state;
  int cpus[MOST_CPUS], count = some_cpus(cpus);
  for (int threads = 1; threads <= count; threads++) {
    struct pinned p = {.context = pinned_context(threads, cpus, count), .cpus = cpus, .threads = threads};
    on_a_new_thread(run_and_use_openmp, &p);
    on_a_new_thread(run_once, &p);
    on_a_new_thread(run_once, &p); /* the context has moved on to another thread, which may look like the last one */
    assert_int_equal(p.astray, 0);
    assert_int_equal(p.runs, 8 * threads);
    oscar_context_free(p.context);
  }
}

static void who_frees_a_context_is_where_he_was(void **state) {
  (void)state;
  cpu_set_t before;
  int cpus[MOST_CPUS], count = some_cpus(cpus);
  assert_int_equal(sched_getaffinity(0, sizeof before, &before), 0);
  struct pinned p = {.context = pinned_context(0, cpus, count), .cpus = cpus, .threads = count};
  assert_int_equal(oscar_context_threads(p.context), count);
  assert_true(may_run_on(&before)); /* making a context moves nobody */
  team_run(p.context, count, look_where_it_runs, &p);
  const cpu_set_t own = set_of(cpus, 1);
  assert_true(may_run_on(&own));
  assert_int_equal(p.astray, 0);
  oscar_context_free(p.context);
  assert_true(may_run_on(&before));

  oscar_context *anywhere = context_with(2);
  _Atomic int calls = 0;
  team_run(anywhere, 2, count_calls, &calls);
  team_before_openmp(anywhere);
  assert_true(may_run_on(&before));
  oscar_context_free(anywhere);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(every_element_is_visited_once),
      cmocka_unit_test(members_meet_at_barriers_and_share_work),
      cmocka_unit_test(no_wake_up_is_lost),
      cmocka_unit_test(contexts_do_not_know_of_each_other),
      cmocka_unit_test(each_member_stays_on_its_cpu_and_openmp_on_all_of_them),
      cmocka_unit_test(who_frees_a_context_is_where_he_was),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
