/*
 * lookup.c - prompt lookup: a table of where every few tokens were last followed by something.
 *
 * For each length of n-gram there is a table of buckets of four places. A place p stands for the tokens before p, of which ids[p]
 * is what followed. Nothing of the text is kept: to tell two n-grams of a bucket apart, and to be sure of what was found, the
 * text itself is looked at, so a collision costs time only. The newest place of an n-gram takes the older one's; where a bucket
 * is full, the oldest goes. The newest n-gram of all is followed by nothing yet and comes in with the next token.
 *
 * Tables are doubled with the text, up to a limit. A text that does not end as what was told before began is taken in anew.
 */
#include "engine/speculate.h"

#include <string.h>

enum {
  LENGTHS = 8, /* of n-grams, at most */
  WAYS = 4,    /* places of a bucket: 16 bytes */
  FEWEST_BUCKETS = 256,
  MOST_BUCKETS = 1 << 18,
  REMEMBERED = 64 /* tokens before the end of what was told, to know it again */
};

struct lookup {
  oscar_context *context;
  int shortest, longest;
  int64_t told;
  int32_t end[REMEMBERED]; /* token i of the text in end[i % REMEMBERED], the last ones told */
  size_t buckets;          /* of each length, a power of two */
  int32_t *places;         /* [longest - shortest + 1][buckets][WAYS]; 0: none, as nothing comes before place 0 */
};

static size_t table_places(const struct lookup *l, size_t buckets) {
  return (size_t)(l->longest - l->shortest + 1) * buckets * WAYS;
}

oscar_status lookup_create(oscar_context *context, int shortest, int longest, struct lookup **lookup) {
  *lookup = NULL;
  if (shortest < 1 || shortest > longest || longest > LENGTHS)
    return set_error(context, OSCAR_INVALID_ARGUMENT, "a lookup by %d to %d tokens; expected 1 to %d", shortest, longest,
                     LENGTHS);
  struct lookup *l = mem_zalloc(context, 1, sizeof *l);
  if (!l) return OSCAR_NO_MEMORY;
  *l = (struct lookup){.context = context, .shortest = shortest, .longest = longest, .buckets = FEWEST_BUCKETS};
  l->places = mem_zalloc(context, table_places(l, l->buckets), sizeof *l->places);
  if (!l->places) {
    lookup_free(l);
    return OSCAR_NO_MEMORY;
  }
  *lookup = l;
  return OSCAR_OK;
}

void lookup_free(struct lookup *l) {
  if (!l) return;
  mem_free(l->context, l->places);
  mem_free(l->context, l);
}

size_t lookup_bytes(const struct lookup *l) { return sizeof *l + table_places(l, l->buckets) * sizeof *l->places; }

/* The bucket of the n-gram before place p. */
static int32_t *bucket_of(const struct lookup *l, int length, const int32_t *ids, int64_t p) {
  uint64_t hash = (uint64_t)length;
  for (int i = 1; i <= length; i++) hash = (hash ^ (uint32_t)ids[p - i]) * 0x9E3779B97F4A7C15u; /* 2^64 over the golden ratio */
  hash ^= hash >> 32;
  return l->places + ((size_t)(length - l->shortest) * l->buckets + (hash & (l->buckets - 1))) * WAYS;
}

static bool same_before(const int32_t *ids, int64_t p, int64_t q, int length) {
  return memcmp(ids + p - length, ids + q - length, (size_t)length * sizeof *ids) == 0;
}

static void add_place(struct lookup *l, int length, const int32_t *ids, int64_t p) {
  int32_t *bucket = bucket_of(l, length, ids, p);
  int at = 0; /* the oldest, or one that is free */
  for (int way = 0; way < WAYS; way++) {
    if (bucket[way] && same_before(ids, bucket[way], p, length)) {
      bucket[way] = (int32_t)p;
      return;
    }
    if (bucket[way] < bucket[at]) at = way;
  }
  bucket[at] = (int32_t)p;
}

static void take_in(struct lookup *l, const int32_t *ids, int64_t from, int64_t to) {
  for (int64_t p = from; p < to; p++) {
    for (int length = l->shortest; length <= l->longest && length <= p; length++) add_place(l, length, ids, p);
    l->end[p % REMEMBERED] = ids[p];
  }
  l->told = to;
}

/* Whether the text begins with what was told, as far as its end tells. */
static bool goes_on(const struct lookup *l, const int32_t *ids, int64_t n) {
  if (n < l->told) return false;
  for (int64_t i = l->told > REMEMBERED ? l->told - REMEMBERED : 0; i < l->told; i++)
    if (ids[i] != l->end[i % REMEMBERED]) return false;
  return true;
}

static void forget(struct lookup *l) {
  memset(l->places, 0, table_places(l, l->buckets) * sizeof *l->places);
  l->told = 0;
}

/* At least half of the places are free; the tables are empty afterwards if they grew. */
static oscar_status grow(struct lookup *l, int64_t n) {
  size_t buckets = l->buckets;
  while (buckets < MOST_BUCKETS && (int64_t)(buckets * WAYS) < 2 * n) buckets *= 2;
  if (buckets == l->buckets) return OSCAR_OK;
  int32_t *places = mem_zalloc(l->context, table_places(l, buckets), sizeof *places);
  if (!places) return OSCAR_NO_MEMORY;
  mem_free(l->context, l->places);
  l->places = places;
  l->buckets = buckets;
  l->told = 0;
  return OSCAR_OK;
}

oscar_status lookup_extend(struct lookup *l, const int32_t *ids, int64_t n) {
  if (n > INT32_MAX) return set_error(l->context, OSCAR_INVALID_ARGUMENT, "a lookup in more than 2^31 tokens");
  oscar_status status = grow(l, n);
  if (status != OSCAR_OK) return status;
  if (!goes_on(l, ids, n)) forget(l);
  take_in(l, ids, l->told, n);
  return OSCAR_OK;
}

/* The newest place that the last `length` tokens came before; 0: none. */
static int64_t find(const struct lookup *l, int length, const int32_t *ids, int64_t n) {
  if (length > n) return 0;
  const int32_t *bucket = bucket_of(l, length, ids, n);
  for (int way = 0; way < WAYS; way++)
    if (bucket[way] && bucket[way] < n && same_before(ids, bucket[way], n, length)) return bucket[way];
  return 0;
}

int lookup_guess(const struct lookup *l, const int32_t *ids, int64_t n, int most, int32_t *guesses) {
  int64_t place = 0;
  for (int length = l->longest; length >= l->shortest && place == 0; length--) place = find(l, length, ids, n);
  if (place == 0) return 0;
  for (int i = 0; i < most; i++) guesses[i] = place + i < n ? ids[place + i] : guesses[place + i - n];
  return most > 0 ? most : 0;
}
