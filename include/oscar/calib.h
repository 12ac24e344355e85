/*
 * oscar/calib.h - statistics gathered while a model runs, and the codecs fitted to them.
 *
 * Feed oscar_calib_add with what each layer's attention saw and gave; fit when the text is done. Everything is accumulated in
 * double and memory does not grow with the text:
 *   query second moment   S_K = 1/(n g) sum over tokens and the g query heads of a KV head of q' q   (after RoPE, uncentred)
 *   output second moment  S_V = 1/(n g) sum of o' o, o = softmax(q k'/sqrt(d)) v                    (exact V'S'SV)
 *   key and value means   after RoPE
 *   proxy                 S_V' = 1/n sum_t w_t v_t' v_t, w_t = k_t S_K k_t', normalised to mean 1: needs S_K first, hence a
 *                         second pass over the same text (oscar_calib_begin_proxy)
 * Source: arXiv 2605.17757 sections 3-4 and its public code (proxy).
 *
 * On request (oscar_calib_attend) also what errors of coded keys and values do to a layer's output. With p_qj the attention of
 * query q to a key j that it would read as codes, v_j its value, o_q the output and W_O the head's part of the output
 * projection, an error dk_j of the key moves the projected output by p_qj W_O (v_j - o_q) (q . dk_j) to first order. Hence
 *   key metric            M = sum_q (sum_j w_qj) q q',  w_qj = p_qj^2 |W_O (v_j - o_q)|^2     (q scaled as in the scores)
 *   attended key mean     mean of the keys with the weights sum_q w_qj
 * and plain sums of keys and values after the sink, and of keys with the cosines and sines of their positions, from which the
 * part of the keys that turns with RoPE, and what remains, follow (oscar_calib_fit_graded).
 */
#ifndef OSCAR_CALIB_H
#define OSCAR_CALIB_H

#include <oscar/codec.h>
#include <oscar/oscar.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct oscar_calib oscar_calib;

typedef struct oscar_calib_geometry {
  int layers, query_heads, kv_heads, head_dim; /* query_heads is a multiple of kv_heads */
} oscar_calib_geometry;

OSCAR_API oscar_status oscar_calib_create(oscar_context *context, const oscar_calib_geometry *geometry, oscar_calib **calib);
OSCAR_API void oscar_calib_free(oscar_calib *calib);

/* One layer's view of n tokens: q, o [n][query_heads][head_dim]; k, v [n][kv_heads][head_dim]; q and k after RoPE.
 * Layers may come in any order; every layer must see the same tokens. Errors: INVALID_ARGUMENT, NUMERIC (non-finite; names the
 * layer). */
OSCAR_API oscar_status oscar_calib_add(oscar_calib *calib, int layer, int n, const float *q, const float *k, const float *v,
                                       const float *o);

/* ---- what errors of coded keys and values do ---- */

typedef struct oscar_attended_options {
  float scale;                  /* of the scores; 0: 1/sqrt(head_dim) */
  int sink_pages, recent_pages; /* the reading rule (cache.h): which keys a query reads as codes */
  int query_stride;             /* every so manieth position's queries are looked at: the pass costs 1/stride of a dense one */
} oscar_attended_options;
/* scale 0, windows 1 and 4, stride 4 */
OSCAR_API void oscar_attended_options_default(oscar_attended_options *options);
/* Before the first oscar_calib_add. Keys and values of the current sequence are kept (BF16) from then on: 4 bytes per layer, KV
 * head, channel and token of the longest sequence. Errors: INVALID_ARGUMENT, NO_MEMORY. */
OSCAR_API oscar_status oscar_calib_attend(oscar_calib *calib, const oscar_attended_options *options);
/* After oscar_calib_attend, before the layer's first tokens. rope (retained; NULL: none) is how its keys were rotated, window > 0
 * the sliding window of its attention (0: none), output_gram [query_heads][d][d] is W_O' W_O of every head's part (copied; NULL:
 * the identity). Errors: INVALID_ARGUMENT, NUMERIC, NO_MEMORY. */
OSCAR_API oscar_status oscar_calib_describe_layer(oscar_calib *calib, int layer, oscar_rope *rope, int window,
                                                  const float *output_gram);
/* The next tokens begin a new sequence at position 0 (as the first ones do). Does nothing without oscar_calib_attend. */
OSCAR_API void oscar_calib_begin_sequence(oscar_calib *calib);

/* From here on oscar_calib_add gathers the proxy value statistic instead (same text again). */
OSCAR_API oscar_status oscar_calib_begin_proxy(oscar_calib *calib);

/* Tokens seen by layer 0 in the first pass. */
OSCAR_API int64_t oscar_calib_tokens(const oscar_calib *calib);

/* Read access for reports and tests: averaged statistics, [head_dim][head_dim] / [head_dim], row-major, per (layer, KV head). */
typedef enum oscar_calib_statistic {
  OSCAR_CALIB_QUERY_MOMENT,
  OSCAR_CALIB_OUTPUT_MOMENT,
  OSCAR_CALIB_PROXY_MOMENT,
  OSCAR_CALIB_KEY_MEAN,
  OSCAR_CALIB_VALUE_MEAN,
  OSCAR_CALIB_KEY_METRIC,       /* M, a sum */
  OSCAR_CALIB_ATTENDED_KEY_MEAN /* zero where nothing was attended as codes */
} oscar_calib_statistic;
OSCAR_API oscar_status oscar_calib_get(const oscar_calib *calib, oscar_calib_statistic which, int layer, int kv_head,
                                       double *out);

typedef enum oscar_value_objective { OSCAR_VALUES_OUTPUT_MOMENT, OSCAR_VALUES_PROXY } oscar_value_objective;

typedef struct oscar_fit_options {
  bool per_head;                   /* one rotation per KV head; else one per layer (moments averaged over its heads) */
  bool remove_means;               /* subtract key and value means */
  oscar_value_objective objective; /* PROXY needs the second pass */
  int crumbs_per_channel;          /* 1, 2 or 4 */
  int group;                       /* channels per (scale, zero); 0: head_dim */
  float clip_keys, clip_values;    /* ratios */
} oscar_fit_options;

/* per head, means removed, output moment, 1 crumb, group = head_dim, clips .96 / .92 */
OSCAR_API void oscar_fit_options_default(oscar_fit_options *options);

/* R = U H P per side from LAPACK's eigenvectors (ascending). `info` gives recipe, fingerprint and provenance; its geometry must
 * be that of calib. Degenerate statistics (rank-deficient, zero) still give an orthogonal R. Deterministic.
 * Errors: INVALID_ARGUMENT (no tokens; proxy missing), UNSUPPORTED (no Hadamard of this order), NO_MEMORY. */
OSCAR_API oscar_status oscar_calib_fit(const oscar_calib *calib, const oscar_codec_set_info *info,
                                       const oscar_fit_options *options, oscar_codec_set **set);

/* ---- graded codes ---- */

typedef struct oscar_graded_options {
  float bits; /* of codes per element, keys and values of all layers on average; values have 2 or more. 1.25 .. 6 */
  /* [layers] what a unit of squared error of a layer's projected output costs. Keys of layers then get crumbs by what they are
   * worth, but none so few that an exact page would need more units than with the same codes in all layers (cache.h). NULL: all
   * layers get the same. */
  const double *layer_costs;
  oscar_row_form key_form, value_form; /* LOG_GAINS (up to four gains a row) or GAIN (one) */
  bool rotating_mean;                  /* where a rope was described */
  float rotating_share;                /* 0 .. 1: of its pairs, those that are kept: in every head the ones without which codes
                                          would lose most. 1: all pairs, 0: none */
  int64_t positions;                   /* that the codec is for: statistics of keys are averaged over windows that
                                          begin at 0 to here (their keys follow from those of the text). 0: as in the text */
  float ridge;                         /* added to M, in units of its mean diagonal */
  bool unbiased_values;                /* values scaled by 1/(1 - D), D the relative error of their codes */
  int mixing;                          /* channels of equal crumbs are mixed by Hadamards of at most this order, a power of two */
} oscar_graded_options;

/* 2 bits, the same in all layers, LOG_GAINS, rotating mean in half of the pairs, positions as in the text, ridge 0.05,
 * unbiased, mixing 8 */
OSCAR_API void oscar_graded_options_default(oscar_graded_options *options);

/* Keys: with B = M^(1/2) and V the eigenvectors of B C B, C the covariance of the keys (less their rotating part), E = B V and
 * D = V' B^-1: in these coordinates errors weigh alike, and channels get crumbs in the order of what each next one saves.
 * Values: Hadamard; where there is more than one crumb per channel, the largest principal directions get them. Values have 2
 * bits while the average is at most 2 1/4, then as many as keys. Deterministic. Statistics without information (no
 * query read codes, constant keys, dead channels) still give a codec that can be used.
 * Errors: INVALID_ARGUMENT (no oscar_calib_attend, no tokens, options), UNSUPPORTED, NUMERIC, NO_MEMORY. */
OSCAR_API oscar_status oscar_calib_fit_graded(const oscar_calib *calib, const oscar_codec_set_info *info,
                                              const oscar_graded_options *options, oscar_codec_set **set);

#ifdef __cplusplus
}
#endif
#endif
