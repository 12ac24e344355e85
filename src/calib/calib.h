/*
 * calib/calib.h - the accumulators of a calibration, shared by the file that fills them and the file that fits. Private.
 *
 * Everything is a plain sum; averages are taken on reading. Of the symmetric moments only the lower triangle is kept up to date.
 */
#ifndef OSCAR_CALIB_ROOM_H
#define OSCAR_CALIB_ROOM_H

#include "base/base.h"
#include <oscar/calib.h>

struct attended; /* attended.h */

struct oscar_calib {
  oscar_context *context;
  oscar_calib_geometry geometry;
  int64_t *tokens;           /* [layers], first pass */
  int64_t *proxy_tokens;     /* [layers], second pass; NULL before oscar_calib_begin_proxy */
  double *query_moment;      /* [layers][kv_heads][d][d] */
  double *output_moment;     /* [layers][kv_heads][d][d] */
  double *proxy_moment;      /* [layers][kv_heads][d][d], sum of w v'v; NULL before oscar_calib_begin_proxy */
  double *proxy_weight;      /* [layers][kv_heads], sum of w; NULL before oscar_calib_begin_proxy */
  double *key_sum;           /* [layers][kv_heads][d] */
  double *value_sum;         /* [layers][kv_heads][d] */
  double *tile;              /* [CALIB_TILE_ROWS][d], scratch */
  double *product;           /* [CALIB_TILE_ROWS][d], scratch */
  struct attended *attended; /* NULL before oscar_calib_attend */
};

/* Rows converted to double and multiplied at a time: 256 rows of 128 doubles are 256 KB, what a core's L2 cache holds. */
enum { CALIB_TILE_ROWS = 256 };

/* INVALID_ARGUMENT, with the layer, unless every layer has seen the same positive number of tokens (in both passes if `proxy`).
 */
oscar_status calib_check_complete(const oscar_calib *calib, bool proxy);

/* INVALID_ARGUMENT unless the set to be made has the geometry of the statistics. */
oscar_status calib_check_info(const oscar_calib *calib, const oscar_codec_set_info *info);

#endif
