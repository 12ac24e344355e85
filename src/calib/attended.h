/*
 * calib/attended.h - sums that tell what errors of coded keys and values do to a layer's output. Private.
 *
 * Symmetric matrices keep their lower triangle up to date. R is the layer's rotary_dim (0 without a rope), and the wave of a
 * position t is the vector [R] of cos(t f_i), then sin(t f_i), for the pairs i.
 */
#ifndef OSCAR_CALIB_ATTENDED_H
#define OSCAR_CALIB_ATTENDED_H

#include "calib/calib.h"
#include "quant/rope.h"

/* Over keys and values after the sink: plain sums. Over all queries looked at and the keys they read as codes: weighted ones. */
struct attended_head {
  double *key_moment;    /* [d][d] sum k'k */
  double *key_wave;      /* [d][R] sum k' wave */
  double *key_sum;       /* [d] */
  double *value_moment;  /* [d][d] */
  double *value_sum;     /* [d] */
  double *metric;        /* [d][d] M */
  double *attended_key;  /* [d] sum of weight * k */
  double *attended_wave; /* [R] sum of weight * wave */
  double attended;       /* sum of the weights */
};

/* The waves of positions 0 .. length - 1, shared by the layers that turn alike. */
struct wave_table {
  const oscar_rope *rope;
  int64_t length;
  double *rows; /* [length][R] */
};

struct attended_layer {
  oscar_rope *rope;
  struct wave_table *waves; /* NULL without a rope */
  int rotary_dim;           /* R */
  int window;
  float *gram; /* [query_heads][d][d] */

  double *wave_moment;         /* [R][R], positions after the sink */
  double *wave_sum;            /* [R] */
  int64_t tokens;              /* after the sink */
  struct attended_head *heads; /* [kv_heads] */
  double *sums;                /* the block behind all of the above */

  /* the current sequence */
  int64_t length, capacity;
  uint16_t *keys, *values; /* [kv_heads][capacity][d] BF16 */
  float *norms;            /* [query_heads][capacity] v W_O'W_O v' */
  double *weights;         /* [kv_heads][capacity] sum over queries of w_qj so far */
  double *value_weights;   /* [kv_heads][capacity] sum over queries of p_qj^2 so far */
  double *counted;         /* [kv_heads][capacity] of `weights`, what has been added to the sums */
};

struct attended {
  oscar_attended_options options;
  struct attended_layer *layers; /* [layers] */
  struct wave_table *tables;     /* [layers], the first `count` in use */
  int count;
  float *scratch; /* [threads] of scratch_floats */
  size_t scratch_floats;
};

void attended_free(oscar_calib *calib);
oscar_status attended_add(oscar_calib *calib, int layer, int n, const float *q, const float *k, const float *v, const float *o);
oscar_status attended_get(const oscar_calib *calib, oscar_calib_statistic which, int layer, int kv_head, double *out);
/* Adds what the current sequences' keys have been weighed with to the sums. */
void attended_close_sequences(const oscar_calib *calib);
/* Rows of the layer's last sequence drawn in proportion to their weight (keys) or to what attention takes from them (values): at
 * most `most`, [*count][d], with their positions. The same every time. */
void attended_sample(const oscar_calib *calib, int layer, int kv_head, oscar_side side, int most, int *count, float *rows,
                     int64_t *positions);

#endif
