/*
 * eval/diagnostics.h - where a quantized cache errs: per layer and query head, the error of logits and attention outputs against
 * the same queries over the exact cache. Private.
 *
 * Everything is measured on the exact model's q, k, v: no layer sees the error of another (eval_perplexity measures that). K and
 * V are coded and decoded with the head's codecs where the reading rule says so: a query at position t, in page T = t/64, reads
 * page p as codes if p >= sink_pages and p + recent_pages < T. With s_j the scaled logit of a visible key j, e_j its change when
 * the key is coded (0 for exact keys), p = softmax(s), p' = softmax(s + e), v'_j the value as read, all sums over the sampled
 * queries, and J the coded keys of a query:
 *
 *   logit SNR   = sum of (s_j - mean of s over J)^2 over j in J  /  sum of e_j^2 over j in J
 *   output SNR  = sum of |o|^2 / sum of |o' - o|^2, o = sum p_j v_j, and with
 *     keys only   o' = sum p'_j v_j
 *     values only o' = sum p_j v'_j
 *     both        o' = sum p'_j v'_j
 *   coded mass  = mean over the queries of the sum of p_j over J
 *
 * SNRs are given in dB, 10 log10 of the ratio. Only queries with at least one coded key count. The sums of several heads are
 * added to speak of a layer.
 */
#ifndef OSCAR_DIAGNOSTICS_H
#define OSCAR_DIAGNOSTICS_H

#include "engine/engine.h"

/* ---- one head: arrays and codecs, no model ---- */

/* What `group` query heads that share a KV head saw in one sequence. */
struct head_view {
  int tokens, head_dim, group;
  int samples;
  const int *positions; /* [samples] of the queries, ascending, < tokens */
  const float *q;       /* [samples][group][head_dim], after RoPE */
  const float *k, *v;   /* [tokens][head_dim], as an exact cache holds them */
  float scale;          /* of the logits; 0: 1/sqrt(head_dim) */
  int window;           /* > 0: a query at t sees positions > t - window only */
  int sink_pages, recent_pages;
};

struct head_sums {
  int64_t queries, pairs; /* with coded keys; of query and coded key */
  double logit_signal, logit_error;
  double output_signal, output_error_keys, output_error_values, output_error_both;
  double coded_mass;
};
/* Adds this view's sums to sums[0 .. group-1]. Errors: NO_MEMORY, NUMERIC (a row that cannot be coded). */
oscar_status diagnose_head(oscar_context *context, const struct head_view *view, const oscar_codec *keys,
                           const oscar_codec *values, struct head_sums *sums);

void head_sums_add(struct head_sums *to, const struct head_sums *from);

/* Of a head, a layer, a model. NAN where nothing was measured, INFINITY where there is no error. */
struct head_errors {
  double logit_snr, output_snr_keys, output_snr_values, output_snr_both; /* dB */
  double coded_mass;                                                     /* 0 .. 1 */
};
struct head_errors head_errors_of(const struct head_sums *sums);

/* ---- a model and a text ---- */

/* Eigenvalues, descending, per layer and KV head, over the sampled queries and the keys and values behind the sink pages. */
enum spectrum {
  SPECTRUM_QUERIES, /* M = mean of q'q, not centred, over all query heads of the KV head */
  SPECTRUM_KEYS,    /* C = covariance of k */
  SPECTRUM_LOGITS,  /* C (M + 0.05 trace(M)/d I): what each axis of the keys contributes to the logits; graded codes go by it */
  SPECTRUM_VALUES,  /* covariance of v */
  SPECTRA
};

struct diagnose_options {
  int context;    /* tokens per window */
  int64_t tokens; /* at most so many; 0: one window */
  int stride;     /* every stride-th position is a sample: stride-1, 2 stride-1, ... */
  int sink_pages, recent_pages, chunk;
};
/* 4096 tokens, one window, every 16th position, windows of 1 and 4 pages, chunks of 256 */
void diagnose_options_default(struct diagnose_options *options);

struct diagnose_result {
  int layers, query_heads, kv_heads, head_dim;
  int64_t tokens;         /* fed */
  int64_t samples;        /* positions that were sampled and read coded keys in a layer that sees everything */
  int count;              /* KV types, without bf16 */
  const char **kv;        /* [count], the caller's strings */
  struct head_sums *sums; /* [count][layers][query_heads] */
  double *crumbs;         /* [count][layers][head_dim] of key channel i, mean over the KV heads */
  double *eigenvalues;    /* [SPECTRA][layers][kv_heads][head_dim] */
};
/* The sums of a layer's heads. */
struct head_sums diagnose_layer(const struct diagnose_result *result, int kv, int layer);

/* kv[i] with its codec set (borrowed); "bf16" is skipped. Errors: INVALID_ARGUMENT (a text shorter than a window, a context in
 * which no sample reads coded history, nothing to compare), NO_MEMORY, NUMERIC, CANCELLED. */
oscar_status eval_diagnose(struct model *model, const struct diagnose_options *options, const int32_t *ids, int64_t n_ids,
                           int count, const char *const *kv, oscar_codec_set *const *sets, const struct progress *progress,
                           struct diagnose_result *result);
void diagnose_result_free(oscar_context *context, struct diagnose_result *result);

#endif
