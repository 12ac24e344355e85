/*
 * guess_rate.c - how many guesses pay, and how many are possible.
 *
 * If each guess is right with probability a when those before it were, a step with k guesses gives 1 + a + ... + a^k tokens on
 * average, and takes 1 + k c steps of one token, c being what a guess costs. The k with the most tokens for its time is chosen.
 * Where that is 0, one guess is tried now and then, less often the longer none was right.
 */
#include "cache/view.h"
#include "engine/speculate.h"

/* A further row of a step, in steps of one token (docs/performance.md): by bench_steps on a CPU; by the tables of products on a
 * GPU, where those of 8 tokens take 1.1 times those of one. */
#define ROW_COST_CPU 0.4f
#define ROW_COST_GPU 0.02f

#define FOLLOWS       0.1f /* of what was, a new guess takes so much */
#define SHORTEST_REST 4
#define LONGEST_REST  64

int guesses_possible(const struct model *model, const oscar_sequence *sequence, int most) {
  const struct cache_geometry *g = cache_geometry_of(sequence_cache(sequence));
  const int64_t length = oscar_sequence_length(sequence), page = length / OSCAR_PAGE_TOKENS;
  const int shared = model_backend(model)->shared_tokens;
  if (most > MOST_GUESSES) most = MOST_GUESSES;
  if (most > shared - 1) most = shared - 1;
  const bool next_demotes = demotes_pages(g) && page - g->recent_pages >= g->sink_pages;
  const int left = (int)((page + 1) * OSCAR_PAGE_TOKENS - length) - 1;
  if (next_demotes && most > left) most = left;
  return most > 0 ? most : 0;
}

float guess_cost(const struct model *model, const struct draft *draft) {
  const float row = model_backend(model)->ops->host_memory ? ROW_COST_CPU : ROW_COST_GPU;
  return draft ? row + draft_cost(draft) : row;
}

void guess_rate_start(struct guess_rate *rate, float cost) { *rate = (struct guess_rate){.accepted = 0.5f, .cost = cost}; }

int guess_rate_next(struct guess_rate *rate, int most) {
  if (rate->rest > 0) {
    rate->rest--;
    return 0;
  }
  float tokens = 1, likely = 1, best = 1;
  int guesses = 0;
  for (int k = 1; k <= most; k++) {
    likely *= rate->accepted;
    tokens += likely;
    const float speed = tokens / (1 + (float)k * rate->cost);
    if (speed > best) best = speed, guesses = k;
  }
  return guesses > 0 || most < 1 ? guesses : 1;
}

void guess_rate_note(struct guess_rate *rate, int guessed, int accepted) {
  for (int i = 0; i < accepted; i++) rate->accepted += FOLLOWS * (1 - rate->accepted);
  if (accepted < guessed) rate->accepted -= FOLLOWS * rate->accepted;
  if (guessed > 0 && rate->accepted > rate->cost) rate->rests = 0;
  if (guessed == 0 || rate->accepted > rate->cost) return; /* one guess gives 1 + accepted tokens for 1 + cost */
  rate->rests = accepted > 0 ? SHORTEST_REST : rate->rests == 0 ? SHORTEST_REST : rate->rests * 2;
  if (rate->rests > LONGEST_REST) rate->rests = LONGEST_REST;
  rate->rest = rate->rests;
}
