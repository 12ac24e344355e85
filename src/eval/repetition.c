/* repetition.c - see repetition.h. */
#include "eval/repetition.h"

#include <stdlib.h>
#include <string.h>

enum { GRAM = 4 };

struct gram {
  int32_t id[GRAM]; /* what is beyond its length is 0 */
};

/* Any order does: equal ones only have to come together. */
static int compare_grams(const void *a, const void *b) { return memcmp(a, b, sizeof(struct gram)); }

/* Different n-grams over all; `grams` has room for one per token. */
static double distinct_share(const int32_t *ids, int count, int n, struct gram *grams) {
  const int all = count - n + 1;
  if (all < 1) return 1;
  memset(grams, 0, (size_t)all * sizeof *grams);
  for (int i = 0; i < all; i++) memcpy(grams[i].id, ids + i, (size_t)n * sizeof *ids);
  qsort(grams, (size_t)all, sizeof *grams, compare_grams);
  int different = 1;
  for (int i = 1; i < all; i++) different += compare_grams(&grams[i - 1], &grams[i]) != 0;
  return (double)different / all;
}

/* length[j] = tokens that end both at i and at j < i and are the same; from the row of i - 1, so j runs down. */
static int longest_repeat(const int32_t *ids, int n, int *length) {
  int longest = 0;
  memset(length, 0, (size_t)n * sizeof *length);
  for (int i = 1; i < n; i++)
    for (int j = i - 1; j >= 0; j--) {
      length[j] = ids[i] != ids[j] ? 0 : j > 0 ? length[j - 1] + 1 : 1;
      if (length[j] > longest) longest = length[j];
    }
  return longest;
}

static void find_loop(const int32_t *ids, int n, struct repetition *r) {
  for (int period = 1; period * LOOP_TIMES <= n; period++) {
    int same = 0;
    while (same < n - period && ids[n - 1 - same] == ids[n - 1 - same - period]) same++;
    if (same + period < LOOP_TIMES * period || same + period < LOOP_TOKENS) continue;
    r->loop_period = period;
    r->loop_tokens = same + period;
    return;
  }
}

oscar_status repetition_of(oscar_context *context, const int32_t *ids, int n, struct repetition *result) {
  *result = (struct repetition){0};
  struct gram *grams = mem_alloc(context, (size_t)n, sizeof *grams);
  int *length = mem_alloc(context, (size_t)n, sizeof *length);
  const bool enough = grams && length;
  if (enough) {
    result->repeated_4 = 1 - distinct_share(ids, n, GRAM, grams);
    result->distinct_1 = distinct_share(ids, n, 1, grams);
    result->distinct_2 = distinct_share(ids, n, 2, grams);
    result->longest = longest_repeat(ids, n, length);
    find_loop(ids, n, result);
  }
  mem_free(context, grams);
  mem_free(context, length);
  return enough ? OSCAR_OK : OSCAR_NO_MEMORY;
}
