/*
 * eval/tasks.h - finding things in long prompts with each form of the cache, against the BF16 cache on the same prompts. Private.
 *
 * For every task and length, haystacks (eval/haystack.h) are read once per cache; each question and its answer run on a fork of
 * that sequence, so every layer sees the error of the layers below, in the prompt and in the answer. Answers are greedy (ties:
 * lowest id) and end with a token that ends the turn, when nothing more could change the judgement (eval/answer.h), or after
 * twice the tokens of the right answer and 16, at most TASKS_ANSWER. Beside it, the right answer is run teacher-forced: its
 * negative log likelihood still tells forms apart where all answers are right, or none.
 *
 * Questions on one haystack share it, so they are not quite independent, which intervals and p values take them for.
 */
#ifndef OSCAR_TASKS_H
#define OSCAR_TASKS_H

#include "engine/engine.h"
#include "eval/haystack.h"

enum { TASKS_LENGTHS = 16, TASKS_ANSWER = 128 };

struct tasks_options {
  int tasks;
  enum task task[TASK_COUNT];
  int lengths;
  int length[TASKS_LENGTHS]; /* tokens of a prompt; with room for the answer cut off where it would leave the context */
  int questions;             /* per task and length */
  uint64_t seed;
  const char *filler; /* borrowed; NULL: made from lists of words */
  size_t filler_bytes;
  int sink_pages, recent_pages; /* of every quantized cache */
  int chunk;                    /* tokens per forward pass */
};
/* no tasks, no lengths, 100 questions, seed 1, windows of 1 and 4 pages, chunks of 256 */
void tasks_options_default(struct tasks_options *options);

struct task_reply {
  bool right;
  double loss; /* negative log likelihood of the right answer, nats, sum over its tokens */
  char *text;  /* what the model said, as far as it was let */
};
struct task_question {
  int haystack;             /* 0 ... of its cell */
  double depth;             /* see haystack.h */
  char *asked, *expected;   /* the right values separated by ", " */
  int gold_tokens;          /* of the right answer */
  struct task_reply *reply; /* [caches] */
};
struct task_score {
  int right;
  double share, low, high;  /* right of the questions; its 95 % interval */
  double loss;              /* per token of the right answers, nats */
  int only_bf16, only_this; /* questions that one of the two caches got right and the other did not */
  double p;                 /* exact McNemar test of these */
  double bits_per_element;  /* everything counted, after a haystack */
  size_t cache_bytes;       /* the same, in bytes */
};
struct task_cell {
  enum task task;
  int length;            /* as asked for */
  int longest, shortest; /* tokens of the prompts */
  int questions, haystacks;
  struct task_question *question; /* [questions] */
  struct task_score *score;       /* [caches] */
};
struct tasks_result {
  int caches;
  const char **kv;  /* [caches], names borrowed; kv[0] is bf16 */
  char prompts[16]; /* how prompts are written: "chatml", ..., "plain" */
  int cells;
  struct task_cell *cell; /* [cells], tasks outside, lengths inside */
};

/* Whether eval_tasks can run so, before anything expensive is done. Errors: INVALID_ARGUMENT (nothing to do; a length out of
 * range or without room in the model's context, or so short that nothing is coded). */
oscar_status tasks_options_check(const struct model *model, const struct tasks_options *options);

/* kv[i] with its codec set (borrowed). BF16 is always run first; a "bf16" in the list is skipped. Errors: INVALID_ARGUMENT (a
 * length that the task or the model's context has no room for), NO_MEMORY, NUMERIC, CANCELLED: the cells that are complete by
 * then are in *result, which is to be freed; after any other error it is empty. */
oscar_status eval_tasks(struct model *model, const struct tasks_options *options, int count, const char *const *kv,
                        oscar_codec_set *const *sets, const struct progress *progress, struct tasks_result *result);
void tasks_result_free(oscar_context *context, struct tasks_result *result);

#endif
