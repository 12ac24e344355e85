/* engine/sensitivity.h - how much a model's answers suffer from errors in the attention of each layer. Private to the room. */
#ifndef OSCAR_SENSITIVITY_H
#define OSCAR_SENSITIVITY_H

#include "engine/engine.h"

enum { SENSITIVITY_OUTPUTS = 64 }; /* predictions compared, at most: the last ones of the text, which have the most context */

/* Tokens run through the model for it, all layers together: for progress. */
int64_t sensitivity_tokens(const struct model *model, int64_t n);

/* costs [layers]: KL divergence of the next token, per unit of squared error that a layer's attention output adds to the residual
 * stream: measured by adding noise of known size to one layer after the other. ids [n] is a text of n >= 2 tokens that fits
 * `runner`; cache is empty. `report` (may be NULL) is called with the tokens of every pass; CANCELLED if it says no. */
oscar_status sensitivity_measure(struct model *model, struct runner *runner, oscar_cache *cache, const int32_t *ids, int n,
                                 bool (*report)(void *user, int tokens), void *user, double *costs);

#endif
