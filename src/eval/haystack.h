/*
 * eval/haystack.h - prompts of a wanted length in which something has to be found. Private.
 *
 * The idea is RULER's (Hsieh et al., arXiv 2404.06654): retrieval that is hard because the text is full of things of the same
 * form as the one asked for. Texts, words and rules are ours. A haystack carries several questions, so that it is read once and
 * asked often; everything follows from the seed.
 *
 *     multikey    "One of the special magic numbers for amber-kettle is: 4816203." woven into prose, a key every 64 tokens; the
 *                 number of one key is asked
 *     multivalue  the same with 4 numbers for every key, apart from each other, a key every 256 tokens; all 4 are asked
 *     tracking    "VAR QXZPA = 41802", "VAR LMTEB = VAR QXZPA", "VAR WODRI = VAR LMTEB": chains of 3 names woven into prose,
 *                 one every 128 tokens; the steps from the last name of a chain to its number are asked, one after the other
 *     json        a JSON object of random ids from end to end; the value of one key is asked
 *     code        a C file of small functions and constants from end to end; what one of them returns or is
 *
 * What is right is said in eval/answer.h; the shape is DIGITS for multikey, multivalue and code, NAME for tracking, ID for json.
 */
#ifndef OSCAR_HAYSTACK_H
#define OSCAR_HAYSTACK_H

#include "base/base.h"
#include "eval/answer.h"

enum task { TASK_MULTIKEY, TASK_MULTIVALUE, TASK_TRACKING, TASK_JSON, TASK_CODE, TASK_COUNT };
const char *task_name(enum task task);
enum word_shape task_shape(enum task task);

/* How a message becomes a prompt: the ids of a user's message, the answer opened and begun with `begin` (may be empty),
 * mem_alloc'ed for the caller. */
struct prompt_form {
  oscar_status (*encode)(void *user, const char *message, const char *begin, int32_t **ids, int *count);
  void *user;
};

enum { HAYSTACK_QUESTIONS = 32, HAYSTACK_LEAST = 256, HAYSTACK_MOST = 1 << 17, HAYSTACK_MISSING = 8 };
/* Questions that a haystack of so many tokens can carry: one per 256 tokens, 1 to HAYSTACK_QUESTIONS. */
int haystack_questions(int tokens);

struct haystack_spec {
  enum task task;
  int tokens;    /* of the longest prompt: at most so many, at least 98 % or HAYSTACK_MISSING less */
  int questions; /* 1 to haystack_questions(tokens) */
  uint64_t seed;
  int index;          /* haystacks of one seed, task and length differ by it */
  const char *filler; /* prose around what is to be found (borrowed); NULL: made from lists of words */
  size_t filler_bytes;
};

struct haystack_question {
  char *text, *begin; /* what is asked; how the answer is begun for the model */
  int values;
  char expected[ANSWER_VALUES][ANSWER_WORD];
  double
      depth; /* where the first thing that belongs to the answer is written: 0 at the beginning of the haystack, 1 at its end */
  int32_t *ids; /* [count] the whole prompt, `begin` included */
  int count;
  int32_t *gold; /* [gold_count] the right answer, in the order of the haystack */
  int gold_count;
};

struct haystack {
  char *text;
  int questions;
  struct haystack_question question[HAYSTACK_QUESTIONS];
  int common; /* tokens that all prompts begin with; less than any prompt has */
};

/* Errors: INVALID_ARGUMENT (a length out of range or too short for the task's texts, an empty filler), NO_MEMORY, those of the
 * form. Nothing is left to free on failure. */
oscar_status haystack_make(oscar_context *context, const struct prompt_form *form, const struct haystack_spec *spec,
                           struct haystack *haystack);
void haystack_free(oscar_context *context, struct haystack *haystack);

#endif
