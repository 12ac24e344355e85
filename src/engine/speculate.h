/*
 * engine/speculate.h - guessing the next tokens of a text, so that one step of the model confirms several. Private.
 *
 * The sequence runs its newest token and k guesses in one step of k + 1 tokens with logits of all. The sampler goes through these
 * rows in order, as it would have without guesses; while what it chooses is the guess, the next row is that of the next token. The
 * rest is rewound (oscar_sequence_truncate), which is exact: guesses lie in exact pages. So answers are those without speculation:
 * the same tokens for the same seed, on the CPU bit for bit.
 */
#ifndef OSCAR_SPECULATE_H
#define OSCAR_SPECULATE_H

#include "model/model.h"

#define MOST_GUESSES 15

/* ---- prompt lookup: what followed the last time that the newest tokens came in this order ---- */
struct lookup;
/* Finds by the last `longest` .. `shortest` tokens (3 and 2 are usual, 1 <= shortest <= longest <= 8). */
oscar_status lookup_create(oscar_context *context, int shortest, int longest, struct lookup **lookup);
void lookup_free(struct lookup *lookup);
/* The text is now ids [n]; what was told before is its beginning, or after a rewind shares one with it. Takes time by the new
 * tokens only. */
oscar_status lookup_extend(struct lookup *lookup, const int32_t *ids, int64_t n);
/* At most `most` guesses of what follows; returns how many. */
int lookup_guess(const struct lookup *lookup, const int32_t *ids, int64_t n, int most, int32_t *guesses);
size_t lookup_bytes(const struct lookup *lookup);

/* ---- a draft model: a smaller model with the same vocabulary guesses greedily ---- */
struct draft; /* the model, its cache (BF16 or coded as asked) and its runner */
/* Errors: those of loading a model; MISMATCH (another vocabulary: number of tokens or the text of one differs). */
oscar_status draft_create(struct model *model, const char *draft_path, const char *kv, int64_t context, int sequences,
                          struct draft **draft);
void draft_free(struct draft *draft);
/* A text's place in it. */
struct draft_text;
oscar_status draft_text_create(struct draft *draft, struct draft_text **text);
void draft_text_free(struct draft_text *text);
/* Guesses for several texts in shared steps: ids[i] [n[i]] are whole texts, guesses[i] has room for most[i], and count[i] is set.
 * Each catches up with its text first (a rewind if guesses were wrong), which is a prompt the first time. */
oscar_status draft_guess(struct draft *draft, int texts, struct draft_text *const *text, const int32_t *const *ids,
                         const int64_t *n, const int *most, int32_t *const *guesses, int *count);

/* How many guesses pay: follows what was accepted lately. 0 .. most. */
struct guess_rate {
  float accepted; /* mean of the share accepted; starts at 0.5 */
  int rest;       /* steps without a guess before it tries again */
};
int guess_rate_next(struct guess_rate *rate, int most);
void guess_rate_note(struct guess_rate *rate, int guessed, int accepted);

#endif
