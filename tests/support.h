/* tests/support.h - what tests share: cmocka with its includes, a context, paths of models and reference material, a generator.
 */
#ifndef OSCAR_TEST_SUPPORT_H
#define OSCAR_TEST_SUPPORT_H

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include "base/base.h"

#define SKIPPED 77 /* exit status CTest shows as skipped */

/* A context with quiet logging; fails the test if it cannot be made. */
static inline oscar_context *test_context(oscar_isa isa, int threads) {
  oscar_context_options options;
  oscar_context_options_default(&options);
  options.isa = isa;
  options.threads = threads;
  oscar_context *context = NULL;
  assert_int_equal(oscar_context_create(&options, &context), OSCAR_OK);
  return context;
}

#define assert_ok(context, call)                                                                                                 \
  do {                                                                                                                           \
    oscar_status status_ = (call);                                                                                               \
    if (status_ != OSCAR_OK) fail_msg("%s: %s: %s", #call, oscar_status_name(status_), oscar_last_error(context));               \
  } while (0)

/* splitmix64: small, seedable, good enough for tests */
static inline uint64_t test_random(uint64_t *state) {
  uint64_t z = (*state += 0x9E3779B97F4A7C15u);
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}
static inline double test_uniform(uint64_t *state) { return ((double)(test_random(state) >> 11) + 0.5) * 0x1p-53; }
static inline float test_normal(uint64_t *state) {
  double u = test_uniform(state), v = test_uniform(state);
  return (float)(sqrt(-2 * log(u)) * cos(6.283185307179586 * v));
}

/* The file of a fetched model ("smollm2-135m", ...) in the user's cache folder, or NULL with a printed reason. */
static inline const char *test_model(const char *name) {
  static char path[4096];
  const char *base = getenv("XDG_CACHE_HOME"), *home = getenv("HOME");
  if (base && *base)
    snprintf(path, sizeof path, "%s/oscar/models/%s.gguf", base, name);
  else
    snprintf(path, sizeof path, "%s/.cache/oscar/models/%s.gguf", home ? home : "", name);
  if (access(path, R_OK) == 0) return path;
  printf("skipped: model %s is not fetched (%s)\n", name, path);
  return NULL;
}

/* Whether the tests that need a larger model are asked for: oscar_test_larger in tests/CMakeLists.txt registers a program once
 * more, with an argument such as "logits_larger". */
static inline bool test_larger(int argc, char **argv) { return argc > 1 && strstr(argv[1], "_larger"); }

/* Whether tests may take their time (`./test long`): then they leave out nothing. Every day they run what fails when the code is
 * wrong, but not at each size and in each combination. */
static inline bool test_at_length(void) { return getenv("OSCAR_TEST_LONG") != NULL; }
static inline int rounds(int every_day, int at_length) { return test_at_length() ? at_length : every_day; }

/* Whether a sanitizer watches. Plain C takes five times as long then, so that there a test may leave out repetitions that the
 * release build has. */
#if defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
#define SANITIZED true
#endif
#endif
#ifndef SANITIZED
#define SANITIZED false
#endif

/* Whether it is races that are looked for, every day: then a test leaves out what runs on one thread, as others run that. */
#if defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define THREADS_WATCHED true
#endif
#endif
#ifndef THREADS_WATCHED
#define THREADS_WATCHED false
#endif
static inline bool test_only_threads(void) { return THREADS_WATCHED && !test_at_length(); }

/* Whether an emulator runs the test (tests/cross), which then leaves out sizes beyond any model's heads. */
#ifndef EMULATED
#define EMULATED false
#endif

/* A file of the optional reference material beside the checkout, or NULL with a printed reason. */
static inline const char *test_reference(const char *name) {
  static char path[4096];
  snprintf(path, sizeof path, "%s/../shared/%s", OSCAR_SOURCE_DIR, name);
  if (access(path, R_OK) == 0) return path;
  printf("skipped: reference file %s is not there\n", name);
  return NULL;
}

#endif
