/* engine/sampler.h - choosing the next token: penalties, a bias, temperature, top-k, top-p, min-p, a seed; likelihoods. Private.
 */
#ifndef OSCAR_SAMPLER_H
#define OSCAR_SAMPLER_H

#include "backend/sampling.h"
#include "base/base.h"

struct sampler_options {
  float temperature; /* 0: greedy */
  int top_k;         /* 0: all */
  float top_p;       /* 1: all */
  float min_p;       /* 0: all */
  uint64_t seed;
  /* Of tokens that came before, as llama.cpp and OpenAI define them. */
  float repeat_penalty;                      /* logits above 0 are divided by it, others multiplied; 0 and 1: none */
  int penalty_window;                        /* how many tokens before count for these three, prompt included; -1: all, 0: none */
  float presence_penalty, frequency_penalty; /* subtracted once, and for every time */
  const struct token_bias *bias;             /* [n_bias], added to logits first (twice if named twice); copied */
  int n_bias;
};
struct token_bias {
  int32_t id;
  float bias; /* -INFINITY forbids the token */
};
/* A token and the natural logarithm of its probability. */
struct ranked_token {
  int32_t id;
  float logprob;
};
struct sampler;
/* llama.cpp's defaults: temp 0.8, top-k 40, top-p 0.95, min-p 0.05, a window of 64 tokens and no penalty */
void sampler_options_default(struct sampler_options *options);
oscar_status sampler_create(oscar_context *context, const struct sampler_options *options, int vocab, struct sampler **sampler);
void sampler_free(struct sampler *sampler);
size_t sampler_bytes(int vocab); /* that a sampler holds */
/* logits [vocab]; filters in the order top-k, top-p, min-p, temperature (llama.cpp's); the same seed and logits give the same ids
 * on every machine that computes the same logits. Greedy ties: lowest id. Errors: NUMERIC if no logit is finite. */
oscar_status sampler_next(struct sampler *sampler, const float *logits, int32_t *id);
/* The same with what came before, before [n_before], and with the tokens that are allowed, a bit each (engine/grammar.h) or NULL:
 * all. In this order: bias, penalties, the allowed ones, filters. NUMERIC too if no allowed token has a finite logit,
 * INVALID_ARGUMENT if a token that counts is not in the vocabulary. sampler_next is this with nothing before, so without
 * penalties. */
oscar_status sampler_choose(struct sampler *sampler, const float *logits, const int32_t *before, int64_t n_before,
                            const uint64_t *allowed, int32_t *id);
/* Of the distribution that logits [vocab] stand for, without any option: the logprob of `id`, and the n most likely tokens, most
 * likely first; equal ones: lower id first. n is meant to be small. Logits that are not finite have no part: a logprob of
 * -INFINITY; where fewer than n are finite, the last ranked ones have id -1. */
void sampler_rank(int vocab, const float *logits, int32_t id, float *logprob, int n, struct ranked_token *ranked);
/* The next choice for who makes it in its place, with the random number that it takes; false, and nothing is taken, where it has
 * to be made here: many candidates are not ranked elsewhere, and neither bias nor penalties are known there. The token is the one
 * that sampler_next would give. */
bool sampler_describe(struct sampler *sampler, struct sampling *sampling);

#endif
