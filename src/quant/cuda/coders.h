/*
 * quant/cuda/coders.h - what encoding on a GPU takes of a codec set, as one block of memory that is copied there. Private; for C
 * and CUDA. The block is made in plain C, so that tests read it without a GPU.
 */
#ifndef OSCAR_QUANT_CUDA_CODERS_H
#define OSCAR_QUANT_CUDA_CODERS_H

#include <oscar/codec.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Columns of encode matrices are padded to a multiple of this with zeros. */
#define CODER_COLUMNS 32

struct coder_channel {
  float step, inverse_step, weight, outer_level, levels, inverse_sigma; /* as in struct oscar_codec */
};

/* One codec. Pointers are addresses where the block is read. */
struct coder {
  int head_dim, channels, columns, groups, crumbs, rotating_pairs;
  oscar_row_form form;
  int clip_rank;                       /* SCALE_ZERO: tau is the clip_rank-th smallest |y|, from 0; channels - 1: no clip */
  int rope_pairs;                      /* of the whole rope */
  const float *encode;                 /* [head_dim][columns] */
  const float *mean;                   /* [head_dim] */
  const struct coder_channel *channel; /* [channels] */
  const int *group_channel;            /* [groups + 1] */
  const uint16_t *crumb_source;        /* [crumbs] 4 * channel + digit */
  const float *gains, *inverse_gains;  /* [16] log_gain_table, inverse_log_gain_table */
  const int *rotating_channel;         /* [rotating_pairs][2] */
  const uint16_t *rotating_pair;       /* [rotating_pairs] */
  const float *rotating_mean;          /* [rotating_pairs][2] */
  const float *rope_table;             /* as in struct oscar_rope */
  const double *rope_pages, *rope_centres;
};

/* A codec or rope that stands in many places is in the block once. */
struct coders {
  const struct coder *coder;
  const int32_t *place; /* [layers][kv_heads][2 sides]: which coder */
};

/* Bytes of the block of a complete set (oscar_codec_set_check). */
size_t coders_bytes(const oscar_codec_set *set);
/* Fills the block, 64-byte aligned, for readers to whom it is at `address`. */
struct coders coders_fill(const oscar_codec_set *set, void *block, uintptr_t address);

#ifdef __cplusplus
}
#endif
#endif
