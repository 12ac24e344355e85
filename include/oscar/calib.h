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
  OSCAR_CALIB_VALUE_MEAN
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

#ifdef __cplusplus
}
#endif
#endif
