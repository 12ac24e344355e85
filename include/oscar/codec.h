/*
 * oscar/codec.h - how one row (one token, one KV head, K or V) becomes codes and back.
 *
 * One shape covers every 2-bit method (and INT4, INT8): a mean, an encode matrix E and a decode matrix D,
 * and for each of the m channels of y = (x - mean) E a number n_i of crumbs (2-bit digits) and a step.
 * C = sum of n_i is the number of crumbs of a row; it is a multiple of 16 and what a row costs besides metadata.
 *
 *   form GAIN        u_i = clamp(floor(y_i / (s step_i) + 4^n_i / 2), 0, 4^n_i - 1)
 *                    y_i ~ s step_i (u_i - (4^n_i - 1) / 2)                       metadata: s, one fp16 per group
 *   form SCALE_ZERO  u_i = clamp(floor(y_i / (s step_i) + z + 0.5), 0, 4^n_i - 1)
 *                    y_i ~ s step_i (u_i - z)                                     metadata: s and z, fp16, per group
 *   form LOG_GAINS   as GAIN with s = 2^(k/4), k = -8 .. 7, per group of at most four   metadata: one 16-bit word a row,
 *                    k + 8 of group p in bits 4p .. 4p+3
 *
 * and x ~ y D + mean. Codes are always computed with s and z as stored (rounded to fp16), so that encoder and
 * decoder agree. OSCAR as published is E = R, D = R transposed, n_i = 1, step_i = 1, form SCALE_ZERO.
 *
 * Keys may have a mean that turns with the position t of the row, as RoPE turns the bias of a key (oscar_rope below): for
 * each of `rotating_pairs` pairs of channels of x, RoPE_t of (b1, b2) is subtracted besides `mean`, and added back.
 *
 * Canonical row (files, tests, exchange), oscar_codec_row_bytes() long:
 *   crumbs    C/4 bytes. The crumbs of channel 0 come first (least significant digit first), then those of
 *             channel 1, ... Crumb c is in byte c mod (C/4), bits 2*(c div (C/4)) and the next.
 *   metadata  GAIN: groups x fp16 s. SCALE_ZERO: groups x (fp16 s, fp16 z). LOG_GAINS: one word. Little-endian.
 * A group is a run of consecutive crumbs: of the C/16 blocks of 16 crumbs group p has those from p (C/16) div groups up to the
 * first of the next group. groups is at most C/16, and no channel is split.
 */
#ifndef OSCAR_CODEC_H
#define OSCAR_CODEC_H

#include <oscar/oscar.h>

#ifdef __cplusplus
extern "C" {
#endif

#define OSCAR_MAX_HEAD_DIM           1024
#define OSCAR_MAX_CRUMBS_PER_CHANNEL 4

#define OSCAR_MAX_LOG_GAINS 4

typedef enum oscar_row_form { OSCAR_ROW_GAIN = 0, OSCAR_ROW_SCALE_ZERO = 1, OSCAR_ROW_LOG_GAINS = 2 } oscar_row_form;

/* ---- rotary position embedding: which channels turn together, and how fast ---- */

typedef enum oscar_rope_layout {
  OSCAR_ROPE_ADJACENT = 0, /* pair i is channels 2i and 2i + 1 (llama) */
  OSCAR_ROPE_HALVES = 1    /* pair i is channels i and i + rotary_dim/2 (qwen2, gemma) */
} oscar_rope_layout;

/* At position t pair i turns by the angle t * frequencies[i]: (x1, x2) -> (x1 cos - x2 sin, x1 sin + x2 cos). */
typedef struct oscar_rope_spec {
  oscar_rope_layout layout;
  int rotary_dim;           /* even, 2 .. OSCAR_MAX_HEAD_DIM: the first rotary_dim channels of a head turn */
  const float *frequencies; /* [rotary_dim/2] radians per position */
} oscar_rope_spec;

/* Reference counted like a codec; the codecs of a model share one. Errors: INVALID_ARGUMENT, NUMERIC, NO_MEMORY. */
typedef struct oscar_rope oscar_rope;
OSCAR_API oscar_status oscar_rope_create(oscar_context *context, const oscar_rope_spec *spec, oscar_rope **rope);
OSCAR_API oscar_rope *oscar_rope_retain(oscar_rope *rope);
OSCAR_API void oscar_rope_release(oscar_rope *rope);
OSCAR_API const oscar_rope_spec *oscar_rope_describe(const oscar_rope *rope);

/* ---- codecs ---- */

/* All arrays are copied. */
typedef struct oscar_codec_spec {
  int head_dim;                  /* d, a multiple of 16 up to OSCAR_MAX_HEAD_DIM */
  int channels;                  /* m <= d */
  oscar_row_form form;           /* SCALE_ZERO requires the same n_i in all channels */
  int groups;                    /* metadata groups in a row; at most OSCAR_MAX_LOG_GAINS in form LOG_GAINS */
  float clip_ratio;              /* SCALE_ZERO: tau = the floor(ratio m)-th smallest |y| (0-based, capped at m - 1) over the
                                    whole row, y <- clamp(y, -tau, tau). 1: no clip. Ignored by GAIN. */
  const uint8_t *crumbs;         /* [channels] n_i in 0..4; NULL: 1 everywhere */
  const float *steps;            /* [channels] > 0; NULL: 1 everywhere */
  const float *mean;             /* [head_dim]; NULL: zero */
  const float *encode;           /* [head_dim][channels]; NULL: identity (channels == head_dim) */
  const float *decode;           /* [channels][head_dim]; NULL: encode transposed (orthogonal encode) */
  oscar_rope *rope;              /* retained; NULL: no rotating mean */
  int rotating_pairs;            /* 0 without a rope, else 1 .. rotary_dim/2 */
  const uint16_t *rotating_pair; /* [rotating_pairs] ascending pair numbers */
  const float *rotating_mean;    /* [rotating_pairs][2] (b1, b2) at position 0 */
} oscar_codec_spec;

typedef struct oscar_codec oscar_codec;

/* The codec is reference counted: _create gives one reference, _release takes one back.
 * Errors: INVALID_ARGUMENT (names the field), NUMERIC (non-finite input), NO_MEMORY. */
OSCAR_API oscar_status oscar_codec_create(oscar_context *context, const oscar_codec_spec *spec, oscar_codec **codec);
OSCAR_API oscar_codec *oscar_codec_retain(oscar_codec *codec);
OSCAR_API void oscar_codec_release(oscar_codec *codec);

/* The spec with every pointer set (no NULLs), valid as long as the codec. */
OSCAR_API const oscar_codec_spec *oscar_codec_describe(const oscar_codec *codec);
OSCAR_API int oscar_codec_crumbs(const oscar_codec *codec);       /* C */
OSCAR_API size_t oscar_codec_row_bytes(const oscar_codec *codec); /* canonical bytes of a row, metadata included */

/* rows: x [n][x_stride] floats (first head_dim of each stride) -> [n][row_bytes] canonical. x is not modified. The rows are at
 * positions position .. position + n - 1 of their sequence, which matters to codecs with a rotating mean only.
 * Errors: INVALID_ARGUMENT; NUMERIC when a row holds a non-finite number or a metadata value leaves the range of fp16 (the row is
 * named). */
OSCAR_API oscar_status oscar_codec_encode(const oscar_codec *codec, int64_t position, int n, const float *x, size_t x_stride,
                                          uint8_t *rows);
/* [n][row_bytes] canonical -> x [n][x_stride]. Cannot fail. */
OSCAR_API void oscar_codec_decode(const oscar_codec *codec, int64_t position, int n, const uint8_t *rows, float *x,
                                  size_t x_stride);

/* ---- the codecs of a whole model ---- */

typedef enum oscar_side { OSCAR_KEYS = 0, OSCAR_VALUES = 1 } oscar_side;

typedef struct oscar_codec_set oscar_codec_set;

typedef struct oscar_codec_set_info {
  int layers, kv_heads, head_dim;
  const char *recipe;      /* "int2", "int2-oscar", ... ; at most 63 bytes; never NULL */
  const char *fingerprint; /* of the model it was fitted to; "" when it fits any model of this geometry */
  const char *provenance;  /* JSON text: calibration text hash, tokens, settings; "" if unknown */
} oscar_codec_set_info;

/* An empty set (strings are copied). Assign every (layer, head, side) before use; a codec may be assigned many times
 * (a reference is taken each time). Errors: INVALID_ARGUMENT, NO_MEMORY. */
OSCAR_API oscar_status oscar_codec_set_create(oscar_context *context, const oscar_codec_set_info *info, oscar_codec_set **set);
OSCAR_API void oscar_codec_set_free(oscar_codec_set *set);
OSCAR_API oscar_status oscar_codec_set_assign(oscar_codec_set *set, int layer, int kv_head, oscar_side side, oscar_codec *codec);
/* NULL if unassigned or out of range. */
OSCAR_API const oscar_codec *oscar_codec_set_get(const oscar_codec_set *set, int layer, int kv_head, oscar_side side);
OSCAR_API const oscar_codec_set_info *oscar_codec_set_describe(const oscar_codec_set *set);
/* OSCAR_INVALID_ARGUMENT, naming the first gap, unless every place is assigned and, within a layer and side, all heads have
 * the same crumbs, form, groups, rope and number of rotating pairs (what lets one kernel serve a layer), and values do not
 * rotate. */
OSCAR_API oscar_status oscar_codec_set_check(const oscar_codec_set *set);

/* Sets that need no data. `rotate`: Hadamard (order head_dim), else none. `crumbs_per_channel`: 1, 2 or 4 (2, 4, 8 bits).
 * group: channels a (scale, zero) pair covers, a power of two from 16 to head_dim, or head_dim. No mean. */
typedef struct oscar_plain_options {
  bool rotate;
  int crumbs_per_channel;
  int group;                    /* 0: head_dim */
  float clip_keys, clip_values; /* ratios; 1: none */
} oscar_plain_options;
OSCAR_API oscar_status oscar_codec_set_create_plain(oscar_context *context, const oscar_codec_set_info *info,
                                                    const oscar_plain_options *options, oscar_codec_set **set);

#ifdef __cplusplus
}
#endif
#endif
