/* tests/cache/support.h - the model for cmocka programs. */
#ifndef OSCAR_TEST_CACHE_SUPPORT_H
#define OSCAR_TEST_CACHE_SUPPORT_H

#include "../support.h"

#define REQUIRE(condition) assert_true(condition)
#include "model.h"

/* A world with ample room. */
static inline void open_world(struct world *w, const struct geometry *g, int threads) {
  world_open(w, test_context(OSCAR_ISA_AUTO, threads), g, MODEL_TOKENS, 4, MODEL_TOKENS);
}

static inline void close_world(struct world *w) {
  world_close(w);
  oscar_context_free(w->context);
}

static inline uint32_t choose_random(void *user, uint32_t below) { return (uint32_t)(test_random(user) % below); }

static inline oscar_cache_usage usage_of(const struct world *w) {
  oscar_cache_usage usage;
  oscar_cache_usage_get(w->cache, &usage);
  return usage;
}

#endif
