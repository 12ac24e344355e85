/* cli/generate.h - one generation, as `run` and `chat` do it: tokens to a stream as they come, then the numbers. Private. */
#ifndef OSCAR_CLI_GENERATE_H
#define OSCAR_CLI_GENERATE_H

#include "cli/cli.h"
#include "engine/engine.h"

enum stop_reason { STOP_END_OF_TURN, STOP_LIMIT, STOP_CONTEXT_FULL, STOP_INTERRUPTED };

/* The tokens of a raw text: BOS where the model wants it, then the text, in which control tokens count. mem_free(*ids).
 * INVALID_ARGUMENT if there are none. */
oscar_status prompt_ids(struct engine *engine, const char *text, size_t bytes, int32_t **ids, int *count);

struct generation {
  int32_t *ids; /* malloc'ed */
  int count;
  char *text; /* malloc'ed; whatever bytes the tokens stand for, with a zero byte after the end */
  size_t text_bytes;
  enum stop_reason stop;
};

/* Generates up to `limit` tokens from where the session stands; text goes to `stream` (NULL: nowhere) token by token. Ctrl-C ends
 * the generation, not the program. */
oscar_status generate(struct engine *engine, struct session *session, int limit, FILE *stream, struct generation *out);
void generation_free(struct generation *generation);

/* The result of a generation as one JSON object on stdout. */
void print_generation_json(const int32_t *prompt, int n_prompt, const struct generation *generation,
                           const struct session *session);
/* Speeds and cache size, one line on stderr. */
void print_generation_numbers(const struct generation *generation, const struct session *session);

#endif
