/*
 * team.c - the threads of a context (team.h): where they run, starting a run, waiting, sleeping.
 *
 * Threads wait for 32-bit words: a member's `go` changes when a run has work for it, `left` becomes 0 when the last member has
 * finished, `barrier` changes when the last one has arrived. Whoever changes a word wakes sleepers only if there are any. A
 * sleeper counts itself before the kernel compares the word, and the word is changed before the count is read, both in one total
 * order, so that one of the two sees the other.
 */
#include "base/team.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <string.h>

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

/* Nanoseconds of spinning. Between two stretches of a decode step lie norms, activations and planning: up to 20 us. */
#define LEAST_PATIENCE 2000
#define MOST_PATIENCE  50000
#define SPINS          16 /* between looks at the clock */

struct word {
  _Alignas(64) _Atomic uint32_t value;
  _Atomic uint32_t sleepers;
#if !defined(__linux__)
  pthread_mutex_t mutex;
  pthread_cond_t changed;
#endif
};

struct member {
  struct team *team;
  pthread_t thread; /* not of member 0, who is the caller */
  int64_t patience;
  int cpu;        /* the one it runs on; -1: any */
  struct word go; /* the number of runs this member was part of */
};

/* Where a thread that calls the library has been put. */
enum place { OWN_CPU, ALL_CPUS };

struct team {
  int places;   /* members it was made for */
  int threads;  /* members there can be */
  int started;  /* of them with a thread of their own: 1 .. started */
  bool crowded; /* more threads than CPUs: spinning would only keep others from working */
  int members;  /* of this run */
  bool stop;
  team_work *work;
  void *arg;
  enum place place; /* of `caller`, if that is not 0, who might run on the CPUs `before` */
  uint64_t caller;  /* thread_number of it */
  cpu_set_t before;
  struct word left, barrier;
  _Alignas(64) _Atomic int arrived;
  struct member member[]; /* [the context's threads] */
};

/* ---- waiting ---- */

static void word_init(struct word *w) {
  *w = (struct word){0};
#if !defined(__linux__)
  pthread_mutex_init(&w->mutex, NULL);
  pthread_cond_init(&w->changed, NULL);
#endif
}

static void sleep_while(struct word *w, uint32_t old) {
  atomic_fetch_add(&w->sleepers, 1);
#if defined(__linux__)
  while (atomic_load(&w->value) == old) syscall(SYS_futex, &w->value, FUTEX_WAIT_PRIVATE, old, NULL, NULL, 0);
#else
  pthread_mutex_lock(&w->mutex);
  while (atomic_load(&w->value) == old) pthread_cond_wait(&w->changed, &w->mutex);
  pthread_mutex_unlock(&w->mutex);
#endif
  atomic_fetch_sub(&w->sleepers, 1);
}

static void wake(struct word *w) {
  if (atomic_load(&w->sleepers) == 0) return;
#if defined(__linux__)
  syscall(SYS_futex, &w->value, FUTEX_WAKE_PRIVATE, INT32_MAX, NULL, NULL, 0);
#else
  pthread_mutex_lock(&w->mutex);
  pthread_cond_broadcast(&w->changed);
  pthread_mutex_unlock(&w->mutex);
#endif
}

static inline void relax(void) {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("isb" ::: "memory"); /* `yield` takes no time on most of these CPUs */
#endif
}

static bool spin_while(const struct word *w, uint32_t old, int64_t until) {
  do
    for (int i = 0; i < SPINS; i++) {
      if (atomic_load_explicit(&w->value, memory_order_acquire) != old) return true;
      relax();
    }
  while (time_ns() < until);
  return false;
}

/* Returns when the word is no longer `old`. What decides over the patience of the next wait is whether spinning could have ended
 * this one, not whether it did: a patience that is too short would never grow again otherwise. */
static void wait_while(struct word *w, uint32_t old, bool crowded, int64_t *patience) {
  if (atomic_load_explicit(&w->value, memory_order_acquire) != old) return;
  const int64_t begun = time_ns();
  if (!crowded && spin_while(w, old, begun + *patience)) return;
  sleep_while(w, old);
  const bool short_wait = time_ns() - begun < MOST_PATIENCE;
  *patience = short_wait ? *patience * 2 : *patience / 2;
  if (*patience < LEAST_PATIENCE) *patience = LEAST_PATIENCE;
  if (*patience > MOST_PATIENCE) *patience = MOST_PATIENCE;
}

/* ---- CPUs ---- */

/* A CPU that has been taken away since the context was made leaves a thread where it is. */
static void stay_on(const struct member *m) {
  cpu_set_t own;
  CPU_ZERO(&own);
  CPU_SET((size_t)m->cpu, &own);
  sched_setaffinity(0, sizeof own, &own);
}

static void stay_among(const struct team *team) {
  cpu_set_t all;
  CPU_ZERO(&all);
  for (int i = 0; i < team->places; i++) CPU_SET((size_t)team->member[i].cpu, &all);
  sched_setaffinity(0, sizeof all, &all);
}

/* Of the calling thread; unlike a pthread_t it is never that of a later thread, too. */
static uint64_t thread_number(void) {
  static _Atomic uint64_t numbers;
  static _Thread_local uint64_t own;
  if (own == 0) own = atomic_fetch_add(&numbers, 1) + 1;
  return own;
}

static void place_caller(struct team *team, enum place place) {
  if (team->member[0].cpu < 0) return;
  const bool known = team->caller == thread_number();
  if (known && team->place == place) return;
  if (!known) {
    team->caller = thread_number();
    sched_getaffinity(0, sizeof team->before, &team->before);
  }
  team->place = place;
  if (place == OWN_CPU)
    stay_on(&team->member[0]);
  else
    stay_among(team);
}

static void release_caller(const struct team *team) {
  if (team->caller != 0 && team->caller == thread_number()) sched_setaffinity(0, sizeof team->before, &team->before);
}

void team_before_openmp(oscar_context *context) { place_caller(context->team, ALL_CPUS); }

/* ---- members ---- */

static void leave(struct team *team) {
  if (atomic_fetch_sub(&team->left.value, 1) == 1) wake(&team->left);
}

static void *member_main(void *arg) {
  struct member *m = arg;
  struct team *team = m->team;
  if (m->cpu >= 0) stay_on(m);
  for (uint32_t seen = 0;; seen++) {
    wait_while(&m->go, seen, team->crowded, &m->patience);
    if (team->stop) return NULL;
    team->work(team->arg, (int)(m - team->member), team->members);
    leave(team);
  }
}

/* Signals are for the program's own threads. */
static bool member_start(struct member *m) {
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  bool started = pthread_create(&m->thread, NULL, member_main, m) == 0;
  pthread_sigmask(SIG_SETMASK, &before, NULL);
  return started;
}

size_t team_bytes(int threads) { return sizeof(struct team) + (size_t)threads * sizeof(struct member); }

struct team *team_make(int threads, const int *cpus, void *memory) {
  struct team *team = memory;
  memset(team, 0, team_bytes(threads));
  team->places = team->threads = threads;
  team->crowded = threads > cpu_available();
  word_init(&team->left);
  word_init(&team->barrier);
  for (int i = 0; i < threads; i++) {
    team->member[i].team = team;
    team->member[i].patience = MOST_PATIENCE;
    team->member[i].cpu = cpus ? cpus[i] : -1;
    word_init(&team->member[i].go);
  }
  return team;
}

/* Without a thread for each member, the run is done by those there are, and nobody tries again. */
static void start(struct team *team) {
  while (team->started < team->threads - 1 && member_start(&team->member[team->started + 1])) team->started++;
  team->threads = team->started + 1;
}

static void call(struct member *m) {
  atomic_fetch_add(&m->go.value, 1);
  wake(&m->go);
}

void team_stop(struct team *team) {
  team->stop = true;
  for (int i = 1; i <= team->started; i++) call(&team->member[i]);
  for (int i = 1; i <= team->started; i++) pthread_join(team->member[i].thread, NULL);
  release_caller(team);
}

/* ---- runs ---- */

void team_run(oscar_context *context, int most, team_work *work, void *arg) {
  struct team *team = context->team;
  place_caller(team, OWN_CPU);
  if (most > 1 && team->started < team->threads - 1) start(team);
  int members = most > team->threads ? team->threads : most;
  if (members <= 1) {
    team->members = 1;
    work(arg, 0, 1);
    return;
  }
  team->members = members;
  team->work = work;
  team->arg = arg;
  atomic_store(&team->left.value, (uint32_t)members - 1);
  for (int i = 1; i < members; i++) call(&team->member[i]);
  work(arg, 0, members);
  for (uint32_t left; (left = atomic_load(&team->left.value)) != 0;)
    wait_while(&team->left, left, team->crowded, &team->member[0].patience);
}

void team_barrier(oscar_context *context, int member) {
  struct team *team = context->team;
  if (team->members == 1) return;
  uint32_t round = atomic_load(&team->barrier.value);
  if (atomic_fetch_add(&team->arrived, 1) == team->members - 1) {
    atomic_store(&team->arrived, 0);
    atomic_fetch_add(&team->barrier.value, 1);
    wake(&team->barrier);
  } else {
    wait_while(&team->barrier, round, team->crowded, &team->member[member].patience);
  }
}

int64_t team_take(team_counter *counter) { return atomic_fetch_add_explicit(&counter->next, 1, memory_order_relaxed); }

struct split {
  int64_t n;
  team_body *body;
  void *arg;
};

static void split_part(void *arg, int member, int members) {
  const struct split *s = arg;
  s->body(s->arg, s->n * member / members, s->n * (member + 1) / members);
}

void team_split(oscar_context *context, int most, int64_t n, team_body *body, void *arg) {
  if (n < most) most = (int)n;
  if (n > 0) team_run(context, most, split_part, &(struct split){n, body, arg});
}
