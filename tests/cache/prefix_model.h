/*
 * tests/cache/prefix_model.h - a prefix tree beside a list of all strings that ever entered it.
 *
 * What a token's K and V are depends here, as in a model, on all tokens before it, and on whether any of them was computed over
 * codes that the reading rule wants exact. So a page taken from the tree shows which prefix it was made for, and whether a cold
 * run made it.
 *
 * The includer includes model.h, with its REQUIRE, first.
 */
#ifndef OSCAR_TEST_CACHE_PREFIX_MODEL_H
#define OSCAR_TEST_CACHE_PREFIX_MODEL_H

#include "cache/state.h"
#include <oscar/prefix.h>

struct text {
  int64_t length;
  int32_t tokens[MODEL_TOKENS];
  uint64_t tags[MODEL_TOKENS];
};

struct texts {
  struct world w;
  oscar_prefix *tree;
  struct text text[ARRAY_LENGTH(((struct world *)0)->twins)]; /* of the twin in that slot; tags are the twin's */
  struct text **entered;                                      /* [entered_count] everything that was ever inserted */
  size_t entered_count, entered_room;
  bool complete; /* all that was entered must be known: nothing has been evicted or had no room */
  int variants;  /* of each stretch of 32 tokens */
};

/* ---- tokens and their tags ---- */

static inline uint64_t next_tag(uint64_t before, int32_t token, bool deviates) {
  uint64_t z = (before ^ (uint64_t)(uint32_t)token * 2 ^ (uint64_t)deviates) * 0x9E3779B97F4A7C15u + 1;
  return z ^ z >> 31;
}

static inline void cold_tags(const int32_t *tokens, int64_t count, uint64_t *tags) {
  for (int64_t i = 0; i < count; i++) tags[i] = next_tag(i ? tags[i - 1] : 0, tokens[i], false);
}

/* Tokens that continue a string: few variants of each stretch, so that strings often have a prefix in common and part anywhere.
 */
static inline void choose_text(struct texts *x, int32_t *tokens, int64_t from, int64_t to, chooser *choose, void *user) {
  int32_t variant = 0;
  for (int64_t i = from; i < to; i++) {
    if (i == from || i % 32 == 0) variant = (int32_t)choose(user, (uint32_t)x->variants);
    tokens[i] = (int32_t)(i % 32) * 100 + variant;
  }
}

static inline void texts_open(struct texts *x, oscar_context *context, const struct geometry *g, int64_t tokens, int sequences,
                              int chunk, int variants) {
  *x = (struct texts){.complete = true, .variants = variants};
  world_open(&x->w, context, g, tokens, sequences, chunk);
  if (oscar_prefix_create(x->w.cache, &x->tree) != OSCAR_OK) x->tree = NULL; /* too small a budget */
}

static inline void texts_close(struct texts *x) {
  oscar_prefix_free(x->tree);
  world_close(&x->w);
  for (size_t i = 0; i < x->entered_count; i++) free(x->entered[i]);
  free(x->entered);
}

static inline void remember(struct texts *x, const struct text *text, const struct twin *t) {
  if (x->entered_count == x->entered_room) {
    x->entered_room = x->entered_room ? 2 * x->entered_room : 64;
    x->entered = realloc(x->entered, x->entered_room * sizeof *x->entered);
    REQUIRE(x->entered);
  }
  struct text *copy = malloc(sizeof *copy);
  REQUIRE(copy);
  copy->length = t->length;
  memcpy(copy->tokens, text->tokens, (size_t)t->length * sizeof text->tokens[0]);
  memcpy(copy->tags, t->tags, (size_t)t->length * sizeof t->tags[0]);
  x->entered[x->entered_count++] = copy;
}

static inline int64_t common_prefix(const struct text *entered, const int32_t *tokens, int64_t count) {
  int64_t n = 0;
  while (n < count && n < entered->length && tokens[n] == entered->tokens[n]) n++;
  return n;
}

/* ---- operations ---- */

/* Begin to commit of n tokens that are in the text already, or are chosen now. */
static inline bool text_feed(struct texts *x, size_t slot, int n, chooser *choose, void *user) {
  struct twin *t = x->w.twins[slot];
  struct text *text = &x->text[slot];
  const struct geometry *g = x->w.g;
  if (t->length + n > MODEL_TOKENS) return false;
  if (text->length < t->length + n) choose_text(x, text->tokens, text->length, t->length + n, choose, user);
  text->length = t->length + n > text->length ? t->length + n : text->length;
  if (!twin_begin(&x->w, t, n)) return false;
  bool deviates = t->length > 0 && t->deviates[t->length - 1];
  for (int64_t i = t->length; i < t->length + n; i++) {
    for (int64_t p = g->sink_pages; p < page_count(t->length); p++)
      deviates |= t->coded[p] && p <= i / 64 && p + g->recent_pages >= i / 64;
    t->tags[i] = next_tag(i ? t->tags[i - 1] : 0, text->tokens[i], deviates);
  }
  for (int layer = 0; layer < g->layers; layer++) twin_write(&x->w, t);
  twin_commit(&x->w, t);
  return true;
}

static inline void text_truncate(struct texts *x, size_t slot, int64_t length, oscar_rewind mode) {
  struct twin *t = x->w.twins[slot];
  const int64_t want = twin_resume(&x->w, t, length, mode);
  int64_t resume;
  oscar_status status = oscar_sequence_truncate(t->sequence, length, mode, &resume);
  if (status != OSCAR_OK) {
    REQUIRE(status == OSCAR_NO_SPACE && oscar_cache_shortfall(x->w.cache) > 0);
    return;
  }
  REQUIRE(resume == want);
  twin_cut(&x->w, t, length, want);
  x->text[slot].length = want;
}

static inline void text_insert(struct texts *x, size_t slot, bool park) {
  struct twin *t = x->w.twins[slot];
  int32_t *exactly = malloc(sizeof *exactly * (size_t)(t->length + 1)); /* so that reading beyond is seen */
  REQUIRE(exactly);
  memcpy(exactly, x->text[slot].tokens, sizeof *exactly * (size_t)t->length);
  remember(x, &x->text[slot], t);
  oscar_status status = (park ? oscar_prefix_park : oscar_prefix_insert)(x->tree, t->sequence, exactly);
  free(exactly);
  if (status != OSCAR_OK) {
    REQUIRE(status == OSCAR_NO_SPACE && oscar_cache_shortfall(x->w.cache) > 0);
    x->complete = false;
  } else if (park) {
    free(t);
    x->w.twins[slot] = NULL;
  }
}

/* Which of the ways it may have been computed a page of `filled` tokens of a taken sequence comes from: t->tags is filled in. */
static inline void identify_page(struct texts *x, struct twin *t, const int32_t *tokens, int64_t p, bool cold_only) {
  static uint8_t have[PAGE_BUFFER], want[PAGE_BUFFER];
  const int filled = (int)(t->length - p * 64 < 64 ? t->length - p * 64 : 64);
  bool coded;
  REQUIRE(oscar_sequence_read_page(t->sequence, (int)p, 0, 0, &coded, have, NULL) == OSCAR_OK);
  t->coded[p] = coded;
  uint64_t *tags = t->tags + p * 64;
  size_t bytes = reference_page(x->w.g, x->w.codecs, tags, filled, 0, 0, 0, coded, want); /* cold ones are there to begin with */
  bool same = memcmp(have, want, bytes) == 0;
  for (size_t i = 0; i < x->entered_count && !same && !cold_only; i++) {
    const struct text *e = x->entered[i];
    if (common_prefix(e, tokens, p * 64 + filled) < p * 64 + filled) continue;
    bytes = reference_page(x->w.g, x->w.codecs, e->tags + p * 64, filled, 0, 0, 0, coded, want);
    if ((same = memcmp(have, want, bytes) == 0)) memcpy(tags, e->tags + p * 64, (size_t)filled * sizeof *tags);
  }
  REQUIRE(same);
  compare_page(&x->w, t, p);
}

static inline void check_taken(struct texts *x, struct twin *t, const int32_t *tokens, const oscar_prefix_match *m,
                               oscar_prefix_reuse reuse) {
  const struct geometry *g = x->w.g;
  static uint64_t cold[MODEL_TOKENS];
  t->length = m->reused_tokens;
  t->refilled_from = t->sequence->refilled_from;
  cold_tags(tokens, t->length, cold);
  memcpy(t->tags, cold, (size_t)t->length * sizeof cold[0]);
  bool deviates = false;
  for (int64_t p = 0; p < page_count(t->length); p++) {
    identify_page(x, t, tokens, p, reuse == OSCAR_PREFIX_EXACT);
    /* the form that a cold run of this length has; codes early only where the rule of sequence.c allows them */
    const int64_t last = (t->length - 1) / 64;
    const bool old = geometry_demotes(g) && p >= g->sink_pages && p + g->recent_pages < last;
    const bool early = t->length % 64 == 0 && p + g->recent_pages == last && geometry_demotes(g) && p >= g->sink_pages;
    if (!(early || (p < t->refilled_from && p >= g->sink_pages))) REQUIRE(t->coded[p] == old);
    for (int64_t i = p * 64; i < t->length && i < p * 64 + 64; i++) {
      deviates |= t->tags[i] != cold[i];
      t->deviates[i] = deviates;
    }
  }
  const bool whole_window = all_wanted_exact(g, t, t->length, 0);
  REQUIRE(t->refilled_from == 0 || !whole_window);
  REQUIRE(t->refilled_from > 0 || whole_window);
  REQUIRE(m->exact == (!deviates && whole_window));
  REQUIRE(reuse != OSCAR_PREFIX_EXACT || m->exact);
}

/* What a look-up must say, by the list of strings alone. */
static inline void check_match(const struct texts *x, const int32_t *tokens, int64_t count, const oscar_prefix_match *m,
                               oscar_prefix_reuse reuse) {
  const struct geometry *g = x->w.g;
  int64_t longest = 0, whole = 0;
  for (size_t i = 0; i < x->entered_count; i++) {
    const int64_t n = common_prefix(x->entered[i], tokens, count), pages = x->entered[i]->length / 64 * 64;
    longest = n > longest ? n : longest;
    if ((n < pages ? n : pages) / 64 > whole) whole = (n < pages ? n : pages) / 64;
  }
  REQUIRE(m->known_tokens <= longest && m->reused_tokens <= m->known_tokens);
  REQUIRE(m->reused_tokens + m->refill_tokens + m->compute_tokens == count);
  REQUIRE(m->refill_tokens >= 0 && m->refill_tokens <= 64 * g->recent_pages + 63);
  REQUIRE(m->reused_tokens + m->refill_tokens <= m->known_tokens);
  if (reuse == OSCAR_PREFIX_OFF) REQUIRE(m->known_tokens == 0);
  if (reuse == OSCAR_PREFIX_EXACT) REQUIRE(m->refill_tokens == 0);
  if (!x->complete || reuse == OSCAR_PREFIX_OFF) return;
  REQUIRE(m->known_tokens >= whole * 64);
  REQUIRE(m->reused_tokens >= 64 * (whole < g->sink_pages ? whole : g->sink_pages));
  if (!geometry_demotes(g)) REQUIRE(m->reused_tokens == m->known_tokens);
}

static inline void text_take(struct texts *x, size_t slot, const int32_t *tokens, int64_t count, oscar_prefix_reuse reuse) {
  int32_t *exactly = malloc(sizeof *exactly * (size_t)(count + 1));
  REQUIRE(exactly);
  memcpy(exactly, tokens, sizeof *exactly * (size_t)count);
  oscar_prefix_match m, again;
  REQUIRE(oscar_prefix_match_get(x->tree, exactly, count, reuse, &m) == OSCAR_OK);
  check_match(x, tokens, count, &m, reuse);
  struct picture before = picture_of(&x->w);
  oscar_sequence *sequence;
  oscar_status status = oscar_prefix_take(x->tree, exactly, count, reuse, &sequence, &again);
  free(exactly);
  if (status != OSCAR_OK) {
    REQUIRE(status == OSCAR_NO_SPACE && !sequence);
    REQUIRE(m.bytes > 0 && oscar_cache_shortfall(x->w.cache) <= m.bytes);
    require_unchanged(&x->w, &before);
    return;
  }
  REQUIRE(again.known_tokens == m.known_tokens && again.reused_tokens == m.reused_tokens && again.exact == m.exact);
  REQUIRE(picture_of(&x->w).usage.held_bytes == before.usage.held_bytes + m.bytes);
  struct twin *t = x->w.twins[slot] = calloc(1, sizeof *t);
  REQUIRE(t);
  t->sequence = sequence;
  REQUIRE(oscar_sequence_length(sequence) == m.reused_tokens);
  check_taken(x, t, tokens, &m, reuse);
  x->text[slot].length = count;
  memcpy(x->text[slot].tokens, tokens, (size_t)count * sizeof *tokens);
}

/* The end of a live sequence that was just inserted, looked up. */
static inline void check_end(struct texts *x, size_t slot) {
  const struct twin *t = x->w.twins[slot];
  oscar_prefix_match m;
  const bool cold = (t->length == 0 || !t->deviates[t->length - 1]) && all_wanted_exact(x->w.g, t, t->length, 0);
  for (int exact = 0; exact <= cold; exact++) {
    REQUIRE(oscar_prefix_match_get(x->tree, x->text[slot].tokens, t->length, exact ? OSCAR_PREFIX_EXACT : OSCAR_PREFIX_REFILL,
                                   &m) == OSCAR_OK);
    REQUIRE(m.reused_tokens == t->length && m.compute_tokens == 0 && m.refill_tokens == 0);
  }
}

static inline void text_evict(struct texts *x, size_t bytes) {
  const struct picture before = picture_of(&x->w);
  oscar_prefix_stats stats;
  oscar_prefix_stats_get(x->tree, &stats);
  size_t freed;
  oscar_prefix_evict(x->tree, bytes, &freed);
  const struct picture after = picture_of(&x->w);
  REQUIRE(freed == before.usage.held_bytes - after.usage.held_bytes);
  if (bytes <= stats.page_bytes) REQUIRE(freed >= bytes);
  if (bytes > 0) x->complete = false;
}

static inline size_t free_slot(const struct world *w) {
  size_t slot = 0;
  while (slot < ARRAY_LENGTH(w->twins) && w->twins[slot]) slot++;
  return slot;
}

/* A string to look up: one that was entered, mostly a long one, cut somewhere or not, and continued. */
static inline int64_t choose_query(struct texts *x, int32_t *tokens, chooser *choose, void *user) {
  int64_t count = 0;
  for (int tries = 0; tries < 3 && x->entered_count > 0; tries++) {
    const struct text *of = x->entered[choose(user, (uint32_t)x->entered_count)];
    if (of->length < count) continue;
    count = of->length;
    memcpy(tokens, of->tokens, (size_t)count * sizeof *tokens);
  }
  if (choose(user, 2)) count = (int64_t)choose(user, (uint32_t)count + 1);
  int64_t more = choose(user, 2) ? (int64_t)choose(user, 200) : 64 - count % 64; /* ends of pages are special */
  if (count + more > MODEL_TOKENS) more = MODEL_TOKENS - count;
  choose_text(x, tokens, count, count + more, choose, user);
  return count + more;
}

static inline void feed_or_evict(struct texts *x, size_t slot, int n, chooser *choose, void *user) {
  struct twin *t = x->w.twins[slot];
  if (t->length + n > MODEL_TOKENS || text_feed(x, slot, n, choose, user)) return;
  oscar_prefix_evict(x->tree, oscar_cache_shortfall(x->w.cache), NULL); /* as an engine does it */
  x->complete = false;
}

static inline void operate_texts(struct texts *x, chooser *choose, void *user) {
  static int32_t query[MODEL_TOKENS];
  struct world *w = &x->w;
  const size_t slot = choose(user, ARRAY_LENGTH(w->twins)), other = free_slot(w);
  struct twin *t = w->twins[slot];
  if (!t) {
    if (choose(user, 5)) {
      const int64_t count = choose_query(x, query, choose, user);
      const uint32_t reuse = choose(user, 16);
      text_take(x, slot, query, count, reuse == 0 ? OSCAR_PREFIX_OFF : reuse < 7 ? OSCAR_PREFIX_EXACT : OSCAR_PREFIX_REFILL);
    } else if ((w->twins[slot] = twin_create(w))) {
      x->text[slot].length = 0;
    }
    return;
  }
  switch (choose(user, 16)) {
  case 0:
    if (choose(user, 4) == 0)
      text_evict(x, choose(user, 2) ? choose(user, 1 << 14) : choose(user, 8) ? choose(user, 1 << 18) : OSCAR_PREFIX_ALL);
    break;
  case 1:
    if (other == ARRAY_LENGTH(w->twins)) break;
    w->twins[other] = twin_fork(w, t);
    x->text[other] = x->text[slot];
    break;
  case 2:
    twin_free(t);
    w->twins[slot] = NULL;
    break;
  case 3: { /* as speculative decoding and edits do */
    const int64_t back = (int64_t)choose(user, choose(user, 2) ? 8 : 200);
    text_truncate(x, slot, t->length > back ? t->length - back : 0, choose(user, 2) ? OSCAR_REWIND_EXACT : OSCAR_REWIND_REFILL);
    break;
  }
  case 4:
    text_truncate(x, slot, (int64_t)choose(user, (uint32_t)t->length + 1),
                  choose(user, 2) ? OSCAR_REWIND_EXACT : OSCAR_REWIND_REFILL);
    break;
  case 5:
  case 6:
    text_insert(x, slot, true);
    break;
  case 7:
  case 8:
    text_insert(x, slot, false);
    if (x->complete) check_end(x, slot);
    break;
  case 9:
    feed_or_evict(x, slot, 64 - (int)(t->length % 64), choose, user);
    break;
  default: /* what is left of the text it was taken for, or anything */
    feed_or_evict(x, slot,
                  choose(user, 2) && x->text[slot].length > t->length ? (int)(x->text[slot].length - t->length)
                                                                      : choose_tokens(choose, user),
                  choose, user);
    break;
  }
}

#endif
