/*
 * tests/failing_alloc.h - a context whose allocator fails at a chosen call, and the sweep over all of them.
 *
 *   struct failing_alloc f;
 *   oscar_context *c = failing_context(&f);
 *   sweep_allocations(c, &f, oscar_codec_create(c, &spec, &codec));    codec is made: the last round succeeded
 *
 * Each round lets one more allocation pass. A round that fails must say NO_MEMORY, leave a sentence and give everything back.
 * failing_context_free checks that nothing is left once the test has freed what it made.
 */
#ifndef OSCAR_FAILING_ALLOC_H
#define OSCAR_FAILING_ALLOC_H

#include "support.h"

struct failing_alloc {
  long until_failure; /* allocations that still pass; negative: all do */
  long failures;      /* allocations refused so far */
  long live;          /* blocks handed out and not given back */
};

static inline void *failing_alloc_alloc(void *user, size_t bytes, size_t alignment) {
  struct failing_alloc *f = user;
  if (f->until_failure == 0) {
    f->failures++;
    return NULL; /* and so does every later call: memory does not come back by itself */
  }
  if (f->until_failure > 0) f->until_failure--;
  void *block = aligned_alloc(alignment, round_up(bytes ? bytes : 1, alignment));
  if (block) f->live++;
  return block;
}

static inline void failing_alloc_free(void *user, void *block) {
  struct failing_alloc *f = user;
  if (block) f->live--;
  free(block);
}

static inline oscar_context *failing_context(struct failing_alloc *f) {
  *f = (struct failing_alloc){.until_failure = -1};
  oscar_context_options options;
  oscar_context_options_default(&options);
  options.threads = 1;
  options.alloc = failing_alloc_alloc;
  options.free = failing_alloc_free;
  options.alloc_user = f;
  oscar_context *context = NULL;
  assert_int_equal(oscar_context_create(&options, &context), OSCAR_OK);
  return context;
}

static inline void failing_context_free(oscar_context *context, struct failing_alloc *f) {
  f->until_failure = -1;
  assert_int_equal(f->live, 1); /* the context itself */
  oscar_context_free(context);
  assert_int_equal(f->live, 0);
}

/* Evaluates `call` (an oscar_status) with 0, 1, 2 ... allocations passing until it succeeds. */
#define sweep_allocations(context, f, call)                                                                                      \
  do {                                                                                                                           \
    long live_ = (f)->live;                                                                                                      \
    for (long n_ = 0;; n_++) {                                                                                                   \
      long failures_ = (f)->failures;                                                                                            \
      (f)->until_failure = n_;                                                                                                   \
      (context)->error[0] = '\0';                                                                                                \
      oscar_status status_ = (call);                                                                                             \
      (f)->until_failure = -1;                                                                                                   \
      if (status_ == OSCAR_OK) {                                                                                                 \
        assert_int_equal((f)->failures, failures_); /* a failed allocation may not pass unnoticed */                             \
        break;                                                                                                                   \
      }                                                                                                                          \
      if (status_ != OSCAR_NO_MEMORY)                                                                                            \
        fail_msg("%s with %ld allocations: %s: %s", #call, n_, oscar_status_name(status_), oscar_last_error(context));           \
      assert_string_not_equal(oscar_last_error(context), "");                                                                    \
      assert_int_equal((f)->live, live_);                                                                                        \
    }                                                                                                                            \
  } while (0)

#endif
