/*
 * eval/repetition.h - how much a text of tokens repeats itself. Private.
 *
 * Looping is how models that lost their way show it in long texts (Holtzman et al., arXiv 1904.09751); distinct-n is from Li et
 * al., arXiv 1510.03055. All measures depend on the length of the text: compare texts of one length.
 */
#ifndef OSCAR_REPETITION_H
#define OSCAR_REPETITION_H

#include "base/base.h"

enum { LOOP_TIMES = 3, LOOP_TOKENS = 32 };

struct repetition {
  double repeated_4; /* share of the 4-grams that occurred before: 1 - different ones / all */
  double distinct_1; /* different tokens / all */
  double distinct_2; /* different pairs / all */
  int longest;       /* tokens of the longest stretch that occurs twice; the two may overlap */
  int loop_period;   /* the text ends in at least LOOP_TIMES repetitions of so many tokens, LOOP_TOKENS in all; 0: it does not */
  int loop_tokens;   /* of these repetitions */
};
/* Of n >= 0 tokens; shares of nothing are 0 repeated and 1 distinct. Time is of order n * n. Errors: NO_MEMORY. */
oscar_status repetition_of(oscar_context *context, const int32_t *ids, int n, struct repetition *result);

#endif
