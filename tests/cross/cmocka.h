/*
 * tests/cross/cmocka.h - the few of cmocka's macros that the tests of kernels use, for processors that no cmocka is installed
 * for. A failed check ends the program. Where the environment variable ONLY is set, the tests that it names are run alone,
 * and those that EXCEPT names are left out.
 */
#ifndef OSCAR_CROSS_CMOCKA_H
#define OSCAR_CROSS_CMOCKA_H

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define EMULATED true /* qemu computes every float with integers */

struct CMUnitTest {
  const char *name;
  void (*run)(void **state);
};

#define cmocka_unit_test(function)                                                                                               \
  { #function, function }

#define fail_msg(...)                                                                                                            \
  do {                                                                                                                           \
    printf("FAILED %s:%d: ", __FILE__, __LINE__);                                                                                \
    printf(__VA_ARGS__);                                                                                                         \
    putchar('\n');                                                                                                               \
    exit(1);                                                                                                                     \
  } while (0)

#define assert_true(condition)                                                                                                   \
  do {                                                                                                                           \
    if (!(condition)) fail_msg("%s", #condition);                                                                                \
  } while (0)
#define assert_non_null(pointer)         assert_true((pointer) != NULL)
#define assert_null(pointer)             assert_true((pointer) == NULL)
#define assert_int_equal(a, b)           assert_true((intmax_t)(a) == (intmax_t)(b))
#define assert_ptr_equal(a, b)           assert_true((a) == (b))
#define assert_ptr_not_equal(a, b)       assert_true((a) != (b))
#define assert_memory_equal(a, b, bytes) assert_true(memcmp(a, b, bytes) == 0)
#define print_message                    printf

/* In the function of a test itself, not in what that calls. */
#define skip()                                                                                                                   \
  do {                                                                                                                           \
    puts("  skipped");                                                                                                           \
    return;                                                                                                                      \
  } while (0)

#define cmocka_run_group_tests(tests, setup, teardown) run_tests(tests, sizeof(tests) / sizeof((tests)[0]), setup)
static inline int run_tests(const struct CMUnitTest *tests, size_t count, int (*setup)(void **state)) {
  void *state = NULL;
  const char *only = getenv("ONLY"), *except = getenv("EXCEPT");
  size_t passed = 0;
  if (setup && setup(&state) != 0) return 1;
  for (size_t i = 0; i < count; i++) {
    if ((only && !strstr(only, tests[i].name)) || (except && strstr(except, tests[i].name))) continue;
    printf("%s\n", tests[i].name);
    tests[i].run(&state);
    passed++;
  }
  printf("%zu tests passed\n", passed);
  return 0;
}

#endif
