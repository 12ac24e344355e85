/*
 * quant/codec.h - what cache and kernels see of a codec. Private.
 *
 * Map. A kernel only sees C crumbs c in {0..3}, per group p a scale s_p and offset factor z_p (z_p = 1 in form GAIN), and rows of
 * one matrix, the codec's map [map_rows][head_dim], map_rows = C + groups + 1 rounded up to 16 (padding rows are zero):
 *     rows 0 .. C-1           M_c = 4^j step_i D_i          (crumb c is digit j of channel i)
 *     rows C .. C+groups-1    m_p = sum over channels i of group p of step_i D_i  (x (4^n_i - 1)/2 in form GAIN)
 *     row  C+groups           mean
 * Keys:   q.x_t = q.mean + sum_p s_tp ( sum_{c in p} (q.M_c) c_tc - z_tp (q.m_p) )
 * Values: sum_t p_t x_t = sum_c A_c M_c - sum_p Z_p m_p + (sum_t p_t) mean,  A_c = sum_t p_t s_tp c_tc,  Z_p = sum_t p_t s_tp
 * z_tp so a query becomes q' = q map^T [map_rows] and an output row is [A, -Z, sum p] map.
 */
#ifndef OSCAR_QUANT_CODEC_H
#define OSCAR_QUANT_CODEC_H

#include "base/base.h"
#include <oscar/codec.h>

struct oscar_codec {
  oscar_context *context;
  int references;
  oscar_codec_spec spec; /* pointers into storage of this object */
  int crumbs;            /* C */
  int map_rows;
  size_t row_bytes;
  float *map; /* [map_rows][head_dim], 64-byte aligned */
};

/* Metadata values per group: 1 (GAIN) or 2 (SCALE_ZERO), fp16 each. */
static inline int codec_meta_values(const oscar_codec *codec) { return codec->spec.form == OSCAR_ROW_GAIN ? 1 : 2; }

/* Parts of encoding, exposed so that tests can hold each against its definition. */
/* y [n][channels] = (x - mean) E, blocked for speed, accumulated in float. */
void codec_project(const oscar_codec *codec, int n, const float *x, size_t x_stride, float *y);
/* One projected row -> canonical row. y is clobbered. false: non-finite y, or metadata out of fp16 range. */
bool codec_quantize_row(const oscar_codec *codec, float *y, uint8_t *row);

#endif
