/* bench/encode_codecs.h - codecs as fitted ones are shaped, and rows, for the benchmarks of encoding. */
#ifndef OSCAR_BENCH_ENCODE_CODECS_H
#define OSCAR_BENCH_ENCODE_CODECS_H

#include "quant/page_form.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MOST_DIM 512

static void *need(size_t bytes) {
  void *p = aligned_alloc(64, round_up(bytes, 64));
  if (!p) exit(1);
  memset(p, 0, round_up(bytes, 64));
  return p;
}

static float uniform(void) {
  static uint64_t seed = 1;
  seed = seed * 6364136223846793005u + 1442695040888963407u;
  return ((float)(seed >> 40) + 0.5f) * 0x1p-24f;
}

static float normal(void) { return sqrtf(-2 * logf(uniform())) * cosf(6.2831853f * uniform()); }

/* Per 64 crumbs: one channel of three, eight of two and 45 of one, so that no border of four groups splits a channel. */
static int graded_crumbs(int total, uint8_t *crumbs) {
  static const uint8_t first[] = {3, 2, 2, 2, 2, 2, 2, 1}, second[] = {2, 2, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
  int channels = 0;
  for (int i = 0; i < total / 64; i++, channels += (int)sizeof first) memcpy(crumbs + channels, first, sizeof first);
  for (int i = 0; i < total / 64; i++, channels += (int)sizeof second) memcpy(crumbs + channels, second, sizeof second);
  memset(crumbs + channels, 1, (size_t)total / 2);
  return channels + total / 2;
}

/* turning: quarters of the pairs of channels that have a mean that turns, other ones in every head. Where half of them turn, two
 * and two are neighbours; in fits it is two or three. */
static oscar_codec *make_turning_codec(oscar_context *context, int d, oscar_row_form form, oscar_side side, int turning,
                                       int head) {
  bool graded = form != OSCAR_ROW_SCALE_ZERO && side == OSCAR_KEYS;
  uint8_t crumbs[MOST_DIM];
  uint16_t pair[MOST_DIM / 2];
  float frequencies[MOST_DIM / 2], steps[MOST_DIM], mean[MOST_DIM], *matrix = need(sizeof(float) * MOST_DIM * MOST_DIM);
  memset(crumbs, 1, sizeof crumbs);
  int m = graded ? graded_crumbs(d, crumbs) : d;
  for (int i = 0; i < m; i++) steps[i] = form == OSCAR_ROW_SCALE_ZERO ? 1 : codec_gaussian_step(crumbs[i]);
  for (int i = 0; i < d; i++) mean[i] = 0.1f * normal();
  for (int i = 0; i < d * m; i++) matrix[i] = normal() / sqrtf((float)d);
  int pairs = 0;
  for (int i = 0; i < d / 2; i++) {
    frequencies[i] = powf(1e5f, -2 * (float)i / (float)d);
    if ((i / 2 + head) * turning % 4 < turning) pair[pairs++] = (uint16_t)i;
  }
  oscar_codec_spec spec = {.head_dim = d,
                           .channels = m,
                           .form = form,
                           .groups = form == OSCAR_ROW_LOG_GAINS ? 4 : 1,
                           .clip_ratio = 0.96f,
                           .crumbs = crumbs,
                           .steps = steps,
                           .mean = mean,
                           .encode = matrix,
                           .decode = matrix};
  oscar_rope *rope = NULL;
  if (pairs > 0) {
    oscar_rope_spec rope_spec = {OSCAR_ROPE_HALVES, d, frequencies};
    if (oscar_rope_create(context, &rope_spec, &rope) != OSCAR_OK) exit(1);
    spec.rope = rope;
    spec.rotating_pairs = pairs;
    spec.rotating_pair = pair;
    spec.rotating_mean = mean;
  }
  oscar_codec *codec = NULL;
  if (oscar_codec_create(context, &spec, &codec) != OSCAR_OK) {
    fprintf(stderr, "%s\n", oscar_last_error(context));
    exit(1);
  }
  oscar_rope_release(rope);
  free(matrix);
  return codec;
}

static inline oscar_codec *make_codec(oscar_context *context, int d, oscar_row_form form, oscar_side side) {
  return make_turning_codec(context, d, form, side, form != OSCAR_ROW_SCALE_ZERO && side == OSCAR_KEYS ? 4 : 0, 0);
}

/* Rows [rows][d] in BF16: Gaussian, with norms that vary by an octave each way. */
static inline void fill_rows(int d, int rows, uint16_t *exact) {
  for (int row = 0; row < rows; row++) {
    float size = exp2f(2 * uniform() - 1);
    for (int i = 0; i < d; i++) exact[row * d + i] = f32_to_bf16(size * normal());
  }
}

static const struct {
  const char *name;
  oscar_row_form form;
} bench_forms[] = {{"log_gains", OSCAR_ROW_LOG_GAINS}, {"gain", OSCAR_ROW_GAIN}, {"scale_zero", OSCAR_ROW_SCALE_ZERO}};

#endif
