/*
 * eval/baselines.h - published cache quantizers that have no codec here, to compare with under the same reading rule. Private.
 *
 *   int2-kivi      KIVI (arXiv 2402.02750): x = scale q + minimum, q of 2 bits, scale and minimum in fp16 for each group of 32:
 *                  32 tokens of a channel for keys, 32 channels of a token for values; 2 + 32/32 = 3 bits per element
 *   q4_0           llama.cpp: blocks of 32 channels of a token, x = d (q - 8), q of 4 bits, d in fp16; 4.5 bits per element
 *   q4_0-hadamard  the same between a Hadamard rotation of the head and its inverse
 *
 * They are page filters (oscar/cache.h): what a decoder would give back is kept as BF16, and sizes are what the quantizer says.
 */
#ifndef OSCAR_EVAL_BASELINES_H
#define OSCAR_EVAL_BASELINES_H

#include "backend/blocks.h"
#include <oscar/cache.h>

struct baseline;
/* *baseline stays NULL for a KV type that has codecs or is exact. Errors: UNSUPPORTED (a head_dim that cannot be cut into groups
 * of 32 or that has no Hadamard matrix), NO_MEMORY. */
oscar_status baseline_create(oscar_context *context, const char *kv, int head_dim, struct baseline **baseline);
void baseline_free(oscar_context *context, struct baseline *baseline);
/* For oscar_cache_options; NULL for NULL. Lives as long as the baseline. */
const oscar_page_filter *baseline_filter(const struct baseline *baseline);

/* What the quantizer would make of a sequence of a cache with its filter: exact tokens at 16 bits, the others as it says. */
void baseline_measure(const struct baseline *baseline, const oscar_sequence *sequence, double *bits_per_element, size_t *bytes);

/* ---- the quantizers, exposed for tests ---- */

enum { BASELINE_GROUP = 32 };

struct kivi_group {
  uint16_t scale, minimum; /* fp16 */
  uint8_t codes[BASELINE_GROUP];
};
/* 32 numbers `stride` apart. false if one is not finite or scale or minimum leave the range of fp16. */
bool kivi_quantize(const float *x, size_t stride, struct kivi_group *group);
void kivi_dequantize(const struct kivi_group *group, float *x, size_t stride);

/* 32 numbers in a row; weight_dequantize is the inverse. false if one is not finite or d leaves the range of fp16. */
bool q4_0_quantize(const float *x, struct block_q4_0 *block);

#endif
