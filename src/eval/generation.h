/*
 * eval/generation.h - long texts written with each form of the cache, against those of the BF16 cache. Private.
 *
 * Every cache continues every prompt with every seed for the same number of tokens (ends of a turn are not allowed before that:
 * what is measured depends on the length). A cache that damages long texts makes them repeat themselves, drift into what the
 * exact model finds unlikely, or leave the path of the BF16 text of the same seed early. How much of a difference is only chance
 * is what BF16's own texts say: with another seed they differ, too.
 */
#ifndef OSCAR_GENERATION_H
#define OSCAR_GENERATION_H

#include "engine/engine.h"
#include "engine/sampler.h"

struct generation_options {
  int tokens;                      /* of a text */
  int seeds;                       /* texts of a prompt */
  struct sampler_options sampling; /* its seed is the first one */
  int prompts;                     /* 0: prompts of our own */
  const char *const *prompt;       /* [prompts] user messages, borrowed */
  int sink_pages, recent_pages;    /* of every quantized cache */
  int chunk;                       /* tokens per forward pass */
};
/* 1024 tokens, 2 seeds from 1, llama.cpp's sampling, windows of 1 and 4 pages, chunks of 256 */
void generation_options_default(struct generation_options *options);

/* What is measured of a text; see eval/repetition.h. */
enum written_measure {
  WRITTEN_REPEATED_4,
  WRITTEN_DISTINCT_1,
  WRITTEN_DISTINCT_2,
  WRITTEN_LONGEST,    /* tokens */
  WRITTEN_LOOPING,    /* 1: it ends in a loop */
  WRITTEN_LIKELIHOOD, /* mean log likelihood per token under the model with the BF16 cache, all tokens allowed; nats */
  WRITTEN_MEASURES
};
const char *written_measure_name(enum written_measure measure); /* "repeated_4" */

struct written_text {
  int prompt;
  uint64_t seed;
  char *text;
  double measure[WRITTEN_MEASURES];
  int differs_at; /* first token unlike the BF16 text of the same prompt and seed; `tokens` if none */
};
struct written_summary {
  double mean;
  double deviation; /* standard deviation between seeds, pooled over prompts; NAN with one seed */
  double shift;     /* (mean - BF16's mean) / BF16's deviation; NAN if that is 0 or NAN */
  double p;         /* sign-flip test of the differences from the BF16 text of the same prompt and seed */
};
struct written_run {
  const char *kv;
  struct written_text *text; /* [texts], prompts outside, seeds inside */
  struct written_summary summary[WRITTEN_MEASURES];
  double differs_at;       /* mean */
  double bits_per_element; /* everything counted, at the end of a text */
  size_t cache_bytes;
};
struct generation_result {
  int tokens, seeds, prompts, texts; /* texts = prompts * seeds */
  char form[16];                     /* how prompts are written: "chatml", ..., "plain" */
  double seeds_differ_at; /* mean first token at which BF16 texts of one prompt and two seeds differ; NAN with one seed */
  int runs;
  struct written_run *run; /* [runs], run[0] is bf16 */
};

/* Whether eval_generation can run so, as far as can be said before the prompts are encoded. Errors: INVALID_ARGUMENT. */
oscar_status generation_options_check(const struct model *model, const struct generation_options *options);

/* kv[i] with its codec set (borrowed). BF16 is always run first; a "bf16" in the list is skipped. Errors: INVALID_ARGUMENT
 * (numbers out of range, no room in the model's context, or too few tokens for anything to be coded), NO_MEMORY, NUMERIC,
 * CANCELLED. */
oscar_status eval_generation(struct model *model, const struct generation_options *options, int count, const char *const *kv,
                             oscar_codec_set *const *sets, const struct progress *progress, struct generation_result *result);
void generation_result_free(oscar_context *context, struct generation_result *result);

#endif
