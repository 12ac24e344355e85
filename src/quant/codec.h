/*
 * quant/codec.h - what cache and kernels see of a codec. Private.
 *
 * Map. A kernel only sees C crumbs c in {0..3}, per group p a scale s_p and offset factor z_p (1 unless the form is SCALE_ZERO),
 * and rows of one matrix, the codec's map [map_rows][head_dim], map_rows = C + groups + 1 + 2 P rounded up to 16 (padding rows
 * are zero; P = rotating_pairs): rows 0 .. C-1           M_c = 4^j step_i D_i          (crumb c is digit j of channel i) rows C
 * .. C+groups-1    m_p = sum over channels i of group p of step_i D_i  (x (4^n_i - 1)/2 unless SCALE_ZERO) row  C+groups mean
 *     then for each rotating pair k of channels (x1, x2), with mean (b1, b2) at position 0:
 *     row  C+groups+1+k       a_k = (b1, b2) in these two channels, zero elsewhere
 *     row  C+groups+1+P+k     b_k = (-b2, b1)
 * Keys:   q.x_t = q.mean + sum_p s_tp ( sum_{c in p} (q.M_c) c_tc - z_tp (q.m_p) ) + sum_k (q.a_k) cos(t f_k) + (q.b_k) sin(t
 * f_k) Values: sum_t p_t x_t = sum_c A_c M_c - sum_p Z_p m_p + (sum_t p_t) mean,  A_c = sum_t p_t s_tp c_tc,  Z_p = sum_t p_t
 * s_tp z_tp so a query becomes q' = q map^T [map_rows] and an output row is [A, -Z, sum p] map.
 */
#ifndef OSCAR_QUANT_CODEC_H
#define OSCAR_QUANT_CODEC_H

#include "quant/rope.h"

/* The inner loops of one instruction set; all give the same numbers (quant/rows_body.h). */
struct row_kernels {
  void (*project)(const oscar_codec *codec, int64_t position, int n, const float *x, size_t x_stride, float *y);
  int (*quantize)(const oscar_codec *codec, int n, float *y, uint8_t *rows);
  /* Form LOG_GAINS: page_encode (quant/page_form.h) of keys, and of values but for the order of their crumbs, which is that of
   * keys. x, y: [head_dim][16] floats. */
  int (*encode_page)(const oscar_codec *codec, int64_t page, const uint16_t *exact, float *x, float *y, uint8_t *packed);
  void (*decode_row)(const oscar_codec *codec, const uint8_t *row, float *y);
  void (*decode)(const oscar_codec *codec, int64_t position, int n, const uint8_t *rows, float *x, size_t x_stride);
};
extern const struct row_kernels row_kernels_portable, row_kernels_avx2, row_kernels_avx512, row_kernels_neon; /* where built */
const struct row_kernels *row_kernels_for(const struct cpu_features *cpu);

struct oscar_codec {
  oscar_context *context;
  const struct row_kernels *kernels;
  int references;
  oscar_codec_spec spec; /* pointers into storage */
  int crumbs;            /* C */
  int map_rows;
  size_t row_bytes;
  float *map;           /* [map_rows][head_dim], 64-byte aligned, in storage */
  int *group_channel;   /* [groups + 1]: group p is channels group_channel[p] .. group_channel[p + 1] - 1; in storage */
  float *levels;        /* [channels] 4^n_i; in storage */
  float *inverse_sigma; /* [channels] codec_gaussian_step(n_i) / step_i: 0 without crumbs; in storage */
  /* What trying gains takes (quant/rows_gains.h), [channels] each, in storage. Without crumbs the last three are 0. */
  float *inverse_steps;  /* 1 / step_i, at most FLT_MAX */
  float *weights;        /* step_i over the power of two that makes the largest of its group 1 .. 2 */
  float *outer_levels;   /* 4^n_i / 2 - 1: the code of the outermost level counted from the middle */
  float *unit_steps;     /* codec_gaussian_step(n_i) */
  int *rotating_channel; /* [rotating_pairs][2]; in storage */
  void *storage;         /* one block for all arrays */
};

/* The step of the uniform quantizer with 4^crumbs levels that has the least squared error on a unit Gaussian (crumbs 1 .. 4), and
 * that error (crumbs 0 .. 4; 1 without crumbs). Minimised numerically over the closed form of the error; the first three agree
 * with the tables of J. Max, "Quantizing for minimum distortion", 1960. */
float codec_gaussian_step(int crumbs);
float codec_gaussian_error(int crumbs);

/* Metadata values per group: 1 (GAIN) or 2 (SCALE_ZERO), fp16 each; 0 (LOG_GAINS): all groups share one word. */
static inline int codec_meta_values(const oscar_codec *codec) {
  return codec->spec.form == OSCAR_ROW_GAIN ? 1 : codec->spec.form == OSCAR_ROW_SCALE_ZERO ? 2 : 0;
}
/* 16-bit words of metadata in a row. */
static inline int meta_words(int groups, int meta_values) { return meta_values ? groups * meta_values : 1; }

/* First crumb of group p of `groups` over C crumbs; p = groups gives C. */
static inline int group_begin(int crumbs, int groups, int p) { return p * (crumbs / 16) / groups * 16; }

/* The gain that the 4 bits of group p in a row's word of log gains stand for. */
#define LOG_GAIN_BIAS 8
extern const float log_gain_table[16], inverse_log_gain_table[16]; /* 2^((i - LOG_GAIN_BIAS)/4), and 1 over that */
static inline float log_gain(uint16_t word, int p) { return log_gain_table[word >> 4 * p & 15]; }

/* Parts of encoding, exposed so that tests can hold each against its definition. */
/* y [n][channels] = (x - mean) E, the mean with its rotating part at the row's position, blocked for speed, accumulated in float
 * in the order of the inputs: a row's y does not depend on the rows beside it nor on the instruction set. */
void codec_project(const oscar_codec *codec, int64_t position, int n, const float *x, size_t x_stride, float *y);
/* n projected rows [n][channels] -> canonical rows. y is clobbered (clipped). Returns the number of the first row with a
 * non-finite y or metadata out of fp16 range (`rows` is unspecified then), or n. Needs no memory and touches no shared state: fit
 * for parallel regions.
 *
 * SCALE_ZERO. With t_i = y_i / step_i after the clip, low and high their extremes in a group, in fp32 (the reference's formulas):
 *     s = max(high - low, 1e-8) / (4^n - 1),  z = -low / s,  both rounded to fp16
 * as long as s is a normal fp16 number (>= 2^-14) and |z| rounds to at most 65504. Otherwise (constant or nearly constant groups,
 * where the reference divides by zero or stores infinities) s is raised to the next fp16 number >= max(s, 2^-24, max|t| / 65504)
 * and z = -low / (s as stored): the group then decodes with fp16 relative accuracy of its largest value.
 * GAIN. s starts as the RMS of y_i / sigma_i, sigma_i = step_i / codec_gaussian_step(n_i), and is refitted twice to the codes it
 * gives, by least squares of y. A group whose s rounds to 0 gets the codes 4^n_i / 2 and decodes to zero.
 * LOG_GAINS. Of the sixteen gains, per group, the one whose codes have the least squared error in y; the smallest on ties. Errors
 * are summed in fp32 over the channels in ascending order; codes are those of y_i (1/step_i) (1/s) in place of quotients. */
int codec_quantize(const oscar_codec *codec, int n, float *y, uint8_t *rows);
static inline bool codec_quantize_row(const oscar_codec *codec, float *y, uint8_t *row) {
  return codec_quantize(codec, 1, y, row) == 1;
}

/* Canonical row -> the y [channels] its codes stand for. */
void codec_decode_row(const oscar_codec *codec, const uint8_t *row, float *y);

oscar_context *codec_set_context(const oscar_codec_set *set);

#endif
