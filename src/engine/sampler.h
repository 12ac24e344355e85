/* engine/sampler.h - choosing the next token: temperature, top-k, top-p, min-p, a seed. Private. */
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
};
struct sampler;
/* llama.cpp's defaults: temp 0.8, top-k 40, top-p 0.95, min-p 0.05 */
void sampler_options_default(struct sampler_options *options);
oscar_status sampler_create(oscar_context *context, const struct sampler_options *options, int vocab, struct sampler **sampler);
void sampler_free(struct sampler *sampler);
size_t sampler_bytes(int vocab); /* that a sampler holds */
/* logits [vocab]; filters in the order top-k, top-p, min-p, temperature (llama.cpp's); the same seed and logits give the same ids
 * on every machine that computes the same logits. Greedy ties: lowest id. Errors: NUMERIC if no logit is finite. */
oscar_status sampler_next(struct sampler *sampler, const float *logits, int32_t *id);
/* The next choice for who makes it in its place, with the random number that it takes; false, and nothing is taken, where it has
 * to be made here: many candidates are not ranked elsewhere. The token is the one that sampler_next would give. */
bool sampler_describe(struct sampler *sampler, struct sampling *sampling);

#endif
