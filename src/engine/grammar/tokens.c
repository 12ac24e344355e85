/*
 * tokens.c - the spellings of a vocabulary as a tree of bytes, so that a grammar is asked once for what many tokens have
 * in common.
 *
 * The tree is an array in preorder: what begins with the spelling of a node is what follows it up to `end`, so a beginning that
 * does not fit is left behind with one jump, and a walk over all of it is a loop over arrays.
 */
#include "engine/grammar/grammar_impl.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

struct sort_key {
  const uint8_t *text;
  uint32_t bytes;
  int32_t id;
};

/* By bytes, a beginning before what it begins, then by id. */
static int by_spelling(const void *a, const void *b) {
  const struct sort_key *x = a, *y = b;
  const uint32_t both = x->bytes < y->bytes ? x->bytes : y->bytes;
  const int order = both ? memcmp(x->text, y->text, both) : 0;
  if (order != 0) return order;
  if (x->bytes != y->bytes) return x->bytes < y->bytes ? -1 : 1;
  return (x->id > y->id) - (x->id < y->id);
}

void token_table_free(struct token_table *t) {
  if (!t) return;
  free(t->byte);
  free(t->depth);
  free(t->end);
  free(t->first_token);
  free(t->order);
  free(t->text);
  free(t->offset);
  free(t->ends);
  free(t);
}

/* Copies the spellings; those of tokens that end a turn are no text. */
static bool copy_spellings(struct token_table *t, const struct token_spelling *spellings) {
  size_t bytes = 0;
  for (int i = 0; i < t->vocab; i++) bytes += spellings[i].bytes;
  t->text = malloc(bytes + 1);
  t->offset = malloc(((size_t)t->vocab + 1) * sizeof *t->offset);
  t->ends = calloc(((size_t)t->vocab + 63) / 64, sizeof *t->ends);
  if (!t->text || !t->offset || !t->ends) return false;
  uint32_t at = 0;
  for (int i = 0; i < t->vocab; i++) {
    const size_t n = spellings[i].ends || spellings[i].bytes > UINT16_MAX ? 0 : spellings[i].bytes;
    t->offset[i] = at;
    if (n) memcpy(t->text + at, spellings[i].text, n);
    at += (uint32_t)n;
    if (spellings[i].ends) t->ends[i / 64] |= (uint64_t)1 << i % 64;
  }
  t->offset[t->vocab] = at;
  return true;
}

static struct sort_key *sorted_keys(const struct token_table *t, int *n) {
  struct sort_key *keys = malloc(((size_t)t->vocab + 1) * sizeof *keys);
  *n = 0;
  for (int i = 0; keys && i < t->vocab; i++)
    if (t->offset[i + 1] > t->offset[i])
      keys[(*n)++] = (struct sort_key){(const uint8_t *)t->text + t->offset[i], t->offset[i + 1] - t->offset[i], i};
  if (keys) qsort(keys, (size_t)*n, sizeof *keys, by_spelling);
  return keys;
}

static uint32_t common_bytes(const struct sort_key *a, const struct sort_key *b) {
  uint32_t n = 0;
  while (n < a->bytes && n < b->bytes && a->text[n] == b->text[n]) n++;
  return n;
}

/* Each spelling adds nodes for what it has beyond the one before it. */
static bool plant(struct token_table *t, const struct sort_key *keys, int n) {
  size_t nodes = 1;
  for (int i = 0; i < n; i++) nodes += keys[i].bytes - (i > 0 ? common_bytes(&keys[i - 1], &keys[i]) : 0);
  if (nodes > INT32_MAX - 2) return false;
  t->byte = malloc(nodes);
  t->depth = malloc(nodes * sizeof *t->depth);
  t->end = malloc(nodes * sizeof *t->end);
  t->first_token = malloc((nodes + 1) * sizeof *t->first_token);
  t->order = malloc(((size_t)n + 1) * sizeof *t->order);
  int32_t *path = malloc(((size_t)UINT16_MAX + 2) * sizeof *path); /* open nodes by depth */
  const bool made = t->byte && t->depth && t->end && t->first_token && t->order && path;
  int32_t node = 0;
  uint32_t open = 0;
  for (int i = -1; made && i < n; i++) { /* -1: the root */
    const uint32_t shared = i > 0 ? common_bytes(&keys[i - 1], &keys[i]) : 0, bytes = i < 0 ? 0 : keys[i].bytes;
    for (; i >= 0 && open > shared; open--) t->end[path[open]] = node;
    for (uint32_t d = i < 0 ? 0 : shared + 1; d <= bytes; d++) {
      t->byte[node] = d ? keys[i].text[d - 1] : 0;
      t->depth[node] = (uint16_t)d;
      t->first_token[node] = i < 0 ? 0 : i;
      path[d] = node++;
      open = d;
    }
    if (i >= 0) t->order[i] = keys[i].id;
    if ((int)bytes > t->most_bytes) t->most_bytes = (int)bytes;
  }
  for (int64_t d = open; made && d >= 0; d--) t->end[path[d]] = node;
  if (made) t->first_token[node] = n;
  t->n_nodes = node;
  free(path);
  return made;
}

oscar_status token_table_build(int vocab, const struct token_spelling *spellings, struct token_table **table) {
  static atomic_uint_fast64_t serials;
  *table = NULL;
  struct token_table *t = calloc(1, sizeof *t);
  if (!t) return OSCAR_NO_MEMORY;
  t->vocab = vocab;
  t->serial = atomic_fetch_add(&serials, 1) + 1;
  int n;
  struct sort_key *keys = copy_spellings(t, spellings) ? sorted_keys(t, &n) : NULL;
  const bool made = keys && plant(t, keys, n);
  free(keys);
  if (!made) {
    token_table_free(t);
    return OSCAR_NO_MEMORY;
  }
  *table = t;
  return OSCAR_OK;
}

oscar_status token_table_create(const struct tokenizer *tokenizer, const int32_t *visible, int n_visible,
                                struct token_table **table) {
  const int vocab = tokenizer_vocab(tokenizer);
  *table = NULL;
  struct token_spelling *spellings = calloc((size_t)vocab, sizeof *spellings);
  if (!spellings) return OSCAR_NO_MEMORY;
  for (int32_t id = 0; id < vocab; id++) {
    spellings[id].text = tokenizer_piece(tokenizer, id, false, &spellings[id].bytes);
    spellings[id].ends = tokenizer_is_end(tokenizer, id);
  }
  for (int i = 0; i < n_visible; i++) {
    struct token_spelling *s = &spellings[visible[i]];
    s->text = tokenizer_piece(tokenizer, visible[i], true, &s->bytes);
    s->ends = false;
  }
  const oscar_status status = token_table_build(vocab, spellings, table);
  free(spellings);
  return status;
}
