/*
 * oscar/rotation.h - building rotations, and the files they live in.
 *
 * All matrices are row-major [d][d] and act on rows from the right: y = x R.
 * Formulas: OSCAR (arXiv 2605.17757); Hadamard orders 12, 20, 28 by Paley's and Williamson's constructions.
 */
#ifndef OSCAR_ROTATION_H
#define OSCAR_ROTATION_H

#include <oscar/codec.h>
#include <oscar/oscar.h>

#ifdef __cplusplus
extern "C" {
#endif

/* True for 2^k (k >= 0) and 2^k {12, 20, 28}: the orders oscar_hadamard can build. */
OSCAR_API bool oscar_hadamard_exists(int d);
/* H / sqrt(d): orthogonal, entries +-1/sqrt(d); symmetric Sylvester form for powers of two.
 * Errors: UNSUPPORTED for an order that is not built. */
OSCAR_API oscar_status oscar_hadamard(oscar_context *context, int d, float *h);

/* perm[j] = d - 1 - bitreverse(j): column j of X P is column perm[j] of X. d = 8: 7 3 5 1 6 2 4 0.
 * Defined for powers of two; for other orders it is the reversal perm[j] = d - 1 - j. */
OSCAR_API void oscar_bit_reversal(int d, int *perm);

/* R = U H P from an orthogonal U (columns = eigenvectors, ascending eigenvalues). Computed in double. */
OSCAR_API oscar_status oscar_rotation_compose(oscar_context *context, int d, const double *u, float *r);

/* max |R' R - I|, in double. */
OSCAR_API double oscar_rotation_orthogonality(int d, const float *r);

/* ---- published rotation files (PyTorch zip, format v1 and v2), K and V in separate files ---- */

typedef struct oscar_rotation_layer {
  int layer_id;             /* ids may be sparse (hybrid models) */
  int heads;                /* 1: shared by the KV heads of the layer */
  const float *rotation;    /* [heads][d][d], composed, used as it is */
  const float *mean;        /* [heads][d] or NULL (v2 k_mean) */
  const float *q_rotation;  /* [heads][d][d] or NULL (v2: inverse transpose of a non-orthogonal rotation) */
  const float *o_rotation;  /* [heads][d][d] or NULL (v2) */
  const float *eigenvalues; /* [heads][d] ascending, or NULL */
} oscar_rotation_layer;

typedef struct oscar_rotation_file {
  char format_version[32]; /* "1", "2", "identity-v1" */
  char objective[64];
  char source_grouping[32];
  int head_dim;
  int layers; /* entries below, ascending layer_id */
  const oscar_rotation_layer *layer;
} oscar_rotation_file;

/* Nothing in the file is executed: the zip and the few pickle opcodes that such files contain are parsed, anything else is
 * refused by name. Errors: IO, FORMAT, UNSUPPORTED, NO_MEMORY, each naming the file. Free with oscar_rotation_file_free. */
OSCAR_API oscar_status oscar_rotation_file_read(oscar_context *context, const char *path, oscar_rotation_file **file);
OSCAR_API void oscar_rotation_file_free(oscar_context *context, oscar_rotation_file *file);

/* The codec set a pair of published files describes (2 bits, scale and zero, one group of `group` channels; 0: head_dim).
 * A shared rotation serves all kv_heads. MISMATCH unless the layer ids are exactly 0 .. layers-1 of `info` and head_dim agrees.
 */
OSCAR_API oscar_status oscar_codec_set_import(oscar_context *context, const oscar_codec_set_info *info,
                                              const oscar_rotation_file *keys, const oscar_rotation_file *values, int group,
                                              float clip_keys, float clip_values, oscar_codec_set **set);

/* ---- our own file: one safetensors file for a whole codec set ---- */

/* Written to a temporary file beside `path`, synced and renamed: either the whole new file is there or the old one. */
OSCAR_API oscar_status oscar_codec_set_save(const oscar_codec_set *set, const char *path);
/* Errors: IO, FORMAT, UNSUPPORTED, NUMERIC, each naming file and tensor. */
OSCAR_API oscar_status oscar_codec_set_load(oscar_context *context, const char *path, oscar_codec_set **set);

#ifdef __cplusplus
}
#endif
#endif
