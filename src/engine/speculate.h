/*
 * engine/speculate.h - guessing the next tokens of a text, so that one step of the model confirms several. Private.
 *
 * The sequence runs its newest token and k guesses in one step of k + 1 tokens with logits of all. The sampler goes through these
 * rows in order, as it would have without guesses; while what it chooses is the guess, the next row is that of the next token.
 * The rest is rewound (oscar_sequence_truncate, OSCAR_REWIND_REFILL), which is exact for as many guesses as guesses_possible
 * says: then *resume is the length asked for. So answers are those without speculation: the same tokens for the same seed, on the
 * CPU bit for bit.
 */
#ifndef OSCAR_SPECULATE_H
#define OSCAR_SPECULATE_H

#include "model/model.h"

#define MOST_GUESSES 15

/* At most `most`: how many guesses the next step of a sequence can have beside its newest token so that each token gets the bits
 * it gets alone and any of them can be rewound. Guesses may not enter a page whose first token demotes another: codes do not
 * become exact again. The caller looks after the context and the chunk. */
int guesses_possible(const struct model *model, const oscar_sequence *sequence, int most);

/* ---- prompt lookup: what followed the last time that the newest tokens came in this order (engine/lookup.c) ---- */
struct lookup;
enum { LOOKUP_SHORTEST = 2, LOOKUP_LONGEST = 3 }; /* what sessions take */
/* Finds by the last `longest` .. `shortest` tokens (3 and 2 are usual, 1 <= shortest <= longest <= 8). */
oscar_status lookup_create(oscar_context *context, int shortest, int longest, struct lookup **lookup);
void lookup_free(struct lookup *lookup);
/* The text is now ids [n]; what was told before is its beginning, or after a rewind shares one with it. Takes time by the new
 * tokens only, after a rewind by all. On NO_MEMORY the lookup knows what it knew before. */
oscar_status lookup_extend(struct lookup *lookup, const int32_t *ids, int64_t n);
/* At most `most` guesses of what follows ids [n], the text as it was told; returns how many. What was found is compared with the
 * text, so that a guess always follows the same tokens somewhere. A place less than `most` tokens before the end goes round. */
int lookup_guess(const struct lookup *lookup, const int32_t *ids, int64_t n, int most, int32_t *guesses);
/* 8 to 16 bytes for a token and each length, up to 2^20 places of each: then the oldest are forgotten. */
size_t lookup_bytes(const struct lookup *lookup);

/* ---- a draft model: a smaller model with the same vocabulary guesses greedily (engine/draft.c) ---- */
struct draft;           /* the model, its cache (BF16 or coded as asked) and its runner */
#define DRAFT_KV "bf16" /* what sessions take: its cache is small, and exact pages can always be cut back */
/* `context` tokens of each of `sequences` texts, cut to what the draft model was trained for. Errors: those of loading a model;
 * MISMATCH (another vocabulary: number of tokens or the text of one differs). */
oscar_status draft_create(struct model *model, const char *draft_path, const char *kv, int64_t context, int sequences,
                          struct draft **draft);
void draft_free(struct draft *draft);
/* That it holds: weights, cache, buffers. */
size_t draft_bytes(const struct draft *draft);
/* What a step of it costs, in steps of the model: by the weights that each reads. */
float draft_cost(const struct draft *draft);
/* A text's place in it. There may be `sequences` of them, and all are freed before the draft. */
struct draft_text;
oscar_status draft_text_create(struct draft *draft, struct draft_text **text);
void draft_text_free(struct draft_text *text);
/* Guesses for several texts in shared steps: ids[i] [n[i]] are whole texts, guesses[i] has room for most[i], and count[i] is set.
 * Each catches up with its text first (a rewind if guesses were wrong), which is a prompt the first time. A text longer than the
 * draft's context gets none. After an error no text has any, and each catches up the next time. */
oscar_status draft_guess(struct draft *draft, int texts, struct draft_text *const *text, const int32_t *const *ids,
                         const int64_t *n, const int *most, int32_t *const *guesses, int *count);

/* ---- how many guesses pay (engine/guess_rate.c) ---- */
/* Follows what was accepted lately, and what guesses cost. */
struct guess_rate {
  float accepted;  /* how likely a guess is right if those before it were; starts at 0.5 */
  float cost;      /* of a guess, in steps of one token */
  int rest, rests; /* steps without a guess before it tries again; how long the last rest was */
};
/* What a guess costs with this model: a row more in its step, and with a draft (NULL: lookup) a step of that. */
float guess_cost(const struct model *model, const struct draft *draft);
void guess_rate_start(struct guess_rate *rate, float cost);
/* 0 .. most, for the next step. */
int guess_rate_next(struct guess_rate *rate, int most);
/* Of a step with guesses. */
void guess_rate_note(struct guess_rate *rate, int guessed, int accepted);

#endif
