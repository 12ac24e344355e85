/* bias.c - a list of tokens and what is added to their logits, from the command line. */
#include "cli/bias.h"

#include <ctype.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

struct reader {
  oscar_context *context;
  const struct tokenizer *tokenizer;
  const char *at;
};

static oscar_status wrong(const struct reader *r, const char *what) {
  return set_error(r->context, OSCAR_INVALID_ARGUMENT, "--logit-bias: %s at '%.40s'; expected TOKEN=BIAS, by commas", what,
                   r->at);
}

static char escaped(char c) { return c == 'n' ? '\n' : c == 't' ? '\t' : c == 'r' ? '\r' : c; }

/* The text between quotes, as long as its spelling at most. */
static oscar_status read_quoted(struct reader *r, char *text, size_t *bytes) {
  const char *begin = r->at;
  *bytes = 0;
  for (r->at++; *r->at && *r->at != *begin; r->at++) {
    const bool escape = *r->at == '\\' && r->at[1];
    r->at += escape;
    text[(*bytes)++] = escape ? escaped(*r->at) : *r->at;
  }
  if (*r->at) {
    r->at++;
    return OSCAR_OK;
  }
  r->at = begin;
  return wrong(r, "a quote without its end");
}

static oscar_status one_token(const struct reader *r, const char *text, size_t bytes, int32_t *id) {
  int32_t *ids;
  int count;
  const oscar_status status = tokenizer_encode(r->tokenizer, text, bytes, true, &ids, &count);
  if (status != OSCAR_OK) return status;
  if (count == 1) *id = ids[0];
  mem_free(r->context, ids);
  if (count == 1) return OSCAR_OK;
  return set_error(r->context, OSCAR_INVALID_ARGUMENT, "--logit-bias: '%.*s' is %d tokens of this model, not one", (int)bytes,
                   text, count);
}

static oscar_status read_token(struct reader *r, int32_t *id) {
  if (*r->at == '"' || *r->at == '\'') {
    char *text = mem_alloc(r->context, strlen(r->at), 1);
    size_t bytes;
    if (!text) return OSCAR_NO_MEMORY;
    oscar_status status = read_quoted(r, text, &bytes);
    if (status == OSCAR_OK) status = one_token(r, text, bytes, id);
    mem_free(r->context, text);
    return status;
  }
  if (!isdigit((unsigned char)*r->at)) return wrong(r, "no number of a token and no text in quotes");
  char *end;
  const long number = strtol(r->at, &end, 10);
  const int vocab = tokenizer_vocab(r->tokenizer);
  if (number >= vocab) {
    char what[96];
    snprintf(what, sizeof what, "no token of this model, which has 0 to %d,", vocab - 1);
    return wrong(r, what);
  }
  *id = (int32_t)number;
  r->at = end;
  return OSCAR_OK;
}

static oscar_status read_one(struct reader *r, struct token_bias *bias) {
  const oscar_status status = read_token(r, &bias->id);
  if (status != OSCAR_OK) return status;
  if (*r->at != '=') return wrong(r, "no '='");
  char *end;
  const double value = strtod(r->at + 1, &end);
  if (end == r->at + 1 || isspace((unsigned char)r->at[1]) || !(value >= -100 && value <= 100))
    return wrong(r, "no bias from -100 to 100");
  r->at = end;
  bias->bias = value <= -100 ? -INFINITY : (float)value;
  if (!*r->at) return OSCAR_OK;
  if (*r->at != ',' || !r->at[1]) return wrong(r, "no further token");
  r->at++;
  return OSCAR_OK;
}

oscar_status bias_read(oscar_context *context, const char *text, const struct tokenizer *tokenizer, struct token_bias **list,
                       int *count) {
  *list = NULL;
  *count = 0;
  if (!text) return OSCAR_OK;
  size_t most = 1;
  for (const char *c = text; *c; c++) most += *c == ',';
  struct token_bias *read = calloc(most, sizeof *read);
  if (!read) return set_error(context, OSCAR_NO_MEMORY, "out of memory for a bias of %zu tokens", most);
  struct reader reader = {context, tokenizer, text};
  oscar_status status = *text ? OSCAR_OK : wrong(&reader, "nothing");
  while (status == OSCAR_OK && *reader.at) status = read_one(&reader, &read[(*count)++]);
  if (status == OSCAR_OK) {
    *list = read;
    return OSCAR_OK;
  }
  free(read);
  *count = 0;
  return status;
}
