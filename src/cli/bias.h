/* cli/bias.h - --logit-bias of `run` and `chat`. Private. */
#ifndef OSCAR_CLI_BIAS_H
#define OSCAR_CLI_BIAS_H

#include "engine/sampler.h"
#include "model/tokenizer.h"

/* The list that `text` spells: TOKEN=BIAS by commas. A token is its number, or a text in quotes that is one token, where \n, \t,
 * \r, \\, \" and \' stand for these characters. A bias is a number from -100 to 100, added to the logit; -100 forbids the token.
 * The list is malloc'ed and belongs to the caller; of a text that is NULL it is NULL. INVALID_ARGUMENT (the context's error says
 * what is wrong and where), NO_MEMORY. */
oscar_status bias_read(oscar_context *context, const char *text, const struct tokenizer *tokenizer, struct token_bias **list,
                       int *count);

#endif
