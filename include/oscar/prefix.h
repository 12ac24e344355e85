/*
 * oscar/prefix.h - the prefix tree of a cache: a text that has been processed is not processed again.
 *
 * The tree maps pages of tokens (64 token ids) to pages of the cache. It is filled from sequences, with prompts and generated
 * text alike; a page that several sequences with the same prefix have made is stored once. A look-up of a token string finds the
 * longest prefix that the tree knows and makes a sequence that continues there.
 *
 * Continuing at a position wants, by the reading rule (cache.h), the recent_pages pages before it exactly (BF16), and the page
 * that it lies in. The tree has them where a sequence ends that is still alive, or that has been parked when it was finished: the
 * next turn of a conversation resumes there and nothing is computed again. Elsewhere older pages are there as codes only, and
 * the look-up may
 *     OSCAR_PREFIX_EXACT    resume earlier, where what follows equals a cold run (often the end of the sinks)
 *     OSCAR_PREFIX_REFILL   resume recent_pages pages before the end of the known prefix and compute these again over codes: at
 *                           most 64 recent_pages + 63 tokens, as OSCAR_REWIND_REFILL does
 *     OSCAR_PREFIX_OFF      use nothing
 * Where an exact resume point is as late as the other, OSCAR_PREFIX_REFILL takes it.
 *
 * Everything that the tree holds counts in the cache's budget: pages that it alone refers to, and its own memory, which is
 * oscar_prefix_bytes_for. It never takes from a sequence: after OSCAR_NO_SPACE the owner of the cache may ask it to give back,
 *     oscar_prefix_evict(tree, oscar_cache_shortfall(cache), &freed)    and try again, until that frees nothing
 * Pages of a GPU are handled as those of host memory are.
 *
 * A tree is used by the thread that uses its cache.
 */
#ifndef OSCAR_PREFIX_H
#define OSCAR_PREFIX_H

#include <oscar/cache.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct oscar_prefix oscar_prefix;

typedef enum oscar_prefix_reuse { OSCAR_PREFIX_OFF, OSCAR_PREFIX_EXACT, OSCAR_PREFIX_REFILL } oscar_prefix_reuse;

/* A cache has one tree at most; it is freed with the cache, if not before. Errors: INVALID_ARGUMENT (there is one), NO_SPACE,
 * NO_MEMORY. */
OSCAR_API oscar_status oscar_prefix_create(oscar_cache *cache, oscar_prefix **tree);
/* Sequences stay as they are; parked ones go. */
OSCAR_API void oscar_prefix_free(oscar_prefix *tree);

/* Bytes of the budget that a tree takes for itself (token ids, links, tables; not pages) when it knows `tokens` distinct tokens
 * and has `sequences` sequences inserted or parked. 0 if a number is below 0 or the result exceeds size_t. */
OSCAR_API size_t oscar_prefix_bytes_for(int64_t tokens, int sequences);

/* Tells the tree what the sequence holds; may be called at any time but within a step, and often: only pages that were not there
 * at the last call are looked at. tokens: [length of the sequence] ids. The tree then follows the sequence by itself when it
 * decodes, is rewound or freed. Pages that the tree has already, as a cold run has them, replace the sequence's own.
 * Errors: INVALID_ARGUMENT, NO_SPACE, NO_MEMORY (the pages before the first that did not fit are in the tree). */
OSCAR_API oscar_status oscar_prefix_insert(oscar_prefix *tree, oscar_sequence *sequence, const int32_t *tokens);

/* Inserts a finished sequence and keeps its end: exact recent pages and the page being filled. The sequence belongs to the tree
 * then and must not be used any more. Errors: as insert; the sequence is still the caller's. */
OSCAR_API oscar_status oscar_prefix_park(oscar_prefix *tree, oscar_sequence *sequence, const int32_t *tokens);

typedef struct oscar_prefix_match {
  int64_t known_tokens;   /* the prefix of the string that the tree knows */
  int64_t reused_tokens;  /* length of the sequence that take makes */
  int64_t refill_tokens;  /* the next so many are known, and are computed again over codes; 0 where it resumes exactly */
  int64_t compute_tokens; /* the rest: count - reused - refill */
  bool exact;             /* what is computed from there on equals a cold run */
  size_t bytes;           /* of the budget that take needs */
} oscar_prefix_match;

/* What take would do now. tokens: [count], count >= 0. To have logits of the last token, a prompt is looked up without it. */
OSCAR_API oscar_status oscar_prefix_match_get(const oscar_prefix *tree, const int32_t *tokens, int64_t count,
                                              oscar_prefix_reuse reuse, oscar_prefix_match *match);
/* Makes the sequence, with the first match->reused_tokens tokens in it (an empty one if nothing can be used); the caller feeds
 * the others. match may be NULL. The string becomes the most recently used one, also when there is NO_SPACE.
 * Errors: INVALID_ARGUMENT, NO_SPACE, NO_MEMORY. */
OSCAR_API oscar_status oscar_prefix_take(oscar_prefix *tree, const int32_t *tokens, int64_t count, oscar_prefix_reuse reuse,
                                         oscar_sequence **sequence, oscar_prefix_match *match);

#define OSCAR_PREFIX_ALL SIZE_MAX

/* Frees at least `bytes` of the budget if it can, the least recently used first: the exact pages of parked sequences, then pages
 * at the ends of texts, from the end on. What a sequence uses stays with it and frees nothing but memory of the tree's own; the
 * tree forgets that only if the rest is not enough, and with it there is enough, or for OSCAR_PREFIX_ALL. *freed (may be NULL):
 * bytes. */
OSCAR_API void oscar_prefix_evict(oscar_prefix *tree, size_t bytes, size_t *freed);

typedef struct oscar_prefix_stats {
  /* now */
  int64_t known_pages; /* of token ids */
  int64_t held_pages;  /* of them, those that there is a page of the cache for; others are known to be recomputed */
  int64_t attached;    /* sequences that have been inserted and are alive */
  int64_t parked;      /* sequences */
  size_t own_bytes;    /* what oscar_prefix_bytes_for predicts */
  size_t page_bytes;   /* pages that only the tree refers to: what evicting all gives back, with own_bytes */
  /* since the tree was made */
  int64_t takes, hits;          /* a hit reuses at least one token */
  int64_t reused_exact_tokens;  /* reused by takes that resumed exactly */
  int64_t reused_refill_tokens; /* reused by takes that had to refill */
  int64_t refilled_tokens;      /* known, and computed again by those */
  int64_t computed_tokens;      /* the rest of what was looked up */
  int64_t shared_pages;         /* of sequences, replaced by a page that was there */
  int64_t evicted_parked;       /* parked sequences that were cut to their codes */
  int64_t evicted_exact;        /* exact pages besides, which a live sequence has of its own, computed after a refill */
  int64_t evicted_pages;        /* pages at the ends of texts */
  int64_t evicted_unheld;       /* the same, without a page of the cache */
  int64_t forgotten_in_use;     /* pages and sequences that stayed with a sequence in use */
  int64_t superseded_parked;    /* parked sequences that ended as one that was parked later */
} oscar_prefix_stats;
OSCAR_API void oscar_prefix_stats_get(const oscar_prefix *tree, oscar_prefix_stats *stats);

#ifdef __cplusplus
}
#endif
#endif
