/*
 * portable.c - attention on a page in plain C: what every other instruction set is tested against.
 *
 * A coded page is expanded to one panel of floats with scale, offset and mean as further rows, so that scores and sums are one
 * matrix product each:
 *     keys    panel [C + groups + 1][64]     s c,  -s z,  1    scores = mapped panel
 *     values  panel [64][form_rows]          s c,  -s z,  1    out += p panel
 */
#include "attention/kernels.h"

#include <math.h>
#include <string.h>

static size_t panel_bytes(int head_dim, const struct side_form *keys, const struct side_form *values) {
  int width = head_dim;
  if (keys && form_rows(keys) > width) width = form_rows(keys);
  if (values && form_rows(values) > width) width = form_rows(values);
  return sizeof(float) * PAGE_TOKENS * (size_t)width;
}

static size_t prepared_bytes(int head_dim, const struct side_form *keys) {
  (void)head_dim, (void)keys;
  return 0;
}

static void prepare_queries(const struct query_rows *queries, const struct side_form *keys, uint8_t *prepared) {
  (void)queries, (void)keys, (void)prepared;
}

static void multiply_transposed(int rows, int n, int k, const float *a, const float *b, float *out) {
  for (int r = 0; r < rows; r++)
    for (int j = 0; j < n; j++) {
      float sum[16] = {0};
      for (int i = 0; i < k; i += 16)
        for (int l = 0; l < 16; l++) sum[l] += a[r * k + i + l] * b[j * k + i + l];
      float total = 0;
      for (int l = 0; l < 16; l++) total += sum[l];
      out[r * n + j] = total;
    }
}

static void multiply_add(int rows, int n, int k, const float *a, int a_stride, const float *b, float *out, int out_stride) {
  for (int r = 0; r < rows; r++) {
    float *restrict o = out + r * out_stride;
    for (int i = 0; i < k; i++) {
      const float x = a[r * a_stride + i], *restrict y = b + i * n;
      for (int j = 0; j < n; j++) o[j] += x * y[j];
    }
  }
}

static void score_exact(const struct query_rows *queries, const uint16_t *keys, float *scores, float *panel) {
  int d = queries->head_dim;
  for (int i = 0; i < PAGE_TOKENS * d; i++) panel[i] = bf16_to_f32(keys[i]);
  multiply_transposed(queries->rows, PAGE_TOKENS, d, queries->q, panel, scores);
}

static void accumulate_exact(int rows, int head_dim, int tokens, const float *p, const uint16_t *values, float *out, int stride,
                             float *panel) {
  for (int i = 0; i < tokens * head_dim; i++) panel[i] = bf16_to_f32(values[i]);
  multiply_add(rows, head_dim, tokens, p, PAGE_TOKENS, panel, out, stride);
}

static float scale_of(const struct side_form *f, const uint8_t *side, int token, int group) {
  if (f->meta_values == 0) return log_gain(tile_meta(f, side, token / 16, 0, 0)[token % 16], group);
  return f16_to_f32(tile_meta(f, side, token / 16, group, 0)[token % 16]);
}

static float zero_of(const struct side_form *f, const uint8_t *side, int token, int group) {
  return f->meta_values == 2 ? f16_to_f32(tile_meta(f, side, token / 16, group, 1)[token % 16]) : 1;
}

static void expand_keys(const struct side_form *f, const uint8_t *side, float *panel) {
  int blocks = f->crumbs / 16;
  for (int token = 0; token < PAGE_TOKENS; token++) {
    float s = 0;
    for (int block = 0, group = 0; block < blocks; block++) {
      if (block * 16 == form_group_begin(f, group)) s = scale_of(f, side, token, group++);
      const uint8_t *lane = side + ((token / 16 * blocks + block) * 16 + token % 16) * 4;
      for (int c = 0; c < 16; c++) panel[(block * 16 + c) * PAGE_TOKENS + token] = s * (float)(lane[c % 4] >> c / 4 * 2 & 3);
    }
    for (int group = 0; group < f->groups; group++)
      panel[(f->crumbs + group) * PAGE_TOKENS + token] = -scale_of(f, side, token, group) * zero_of(f, side, token, group);
    panel[(f->crumbs + f->groups) * PAGE_TOKENS + token] = 1;
  }
}

static void score_coded(const struct query_rows *queries, const struct side_form *form, const uint8_t *keys, float *scores,
                        float *panel) {
  expand_keys(form, keys, panel);
  memset(scores, 0, sizeof *scores * (size_t)queries->rows * PAGE_TOKENS);
  multiply_add(queries->rows, PAGE_TOKENS, form->crumbs + form->groups + 1, queries->mapped, form_rows(form), panel, scores,
               PAGE_TOKENS);
}

static void expand_values(const struct side_form *f, const uint8_t *side, float *panel) {
  int width = form_rows(f), blocks = f->crumbs / 16;
  for (int token = 0; token < PAGE_TOKENS; token++) {
    float *row = panel + token * width, s = 0;
    memset(row + f->crumbs, 0, sizeof *row * (size_t)(width - f->crumbs));
    for (int block = 0, group = 0; block < blocks; block++) {
      if (block * 16 == form_group_begin(f, group)) s = scale_of(f, side, token, group++);
      const uint8_t *lanes = side + (token / 16 * blocks + block) * 64 + token % 4;
      for (int c = 0; c < 16; c++) row[block * 16 + c] = s * (float)(lanes[c * 4] >> token % 16 / 4 * 2 & 3);
    }
    for (int group = 0; group < f->groups; group++)
      row[f->crumbs + group] = -scale_of(f, side, token, group) * zero_of(f, side, token, group);
    row[f->crumbs + f->groups] = 1;
  }
}

static void accumulate_coded(int rows, const struct side_form *form, const float *p, const uint8_t *values, float *out,
                             int stride, float *panel) {
  expand_values(form, values, panel);
  multiply_add(rows, form_rows(form), PAGE_TOKENS, p, PAGE_TOKENS, panel, out, stride);
}

static void score_waves(const struct query_rows *queries, const struct side_form *form, const struct wave_basis *basis,
                        const float *angle, float *scores, float *panel) {
  int pairs = basis->pairs, fast = basis->fast;
  for (int r = 0; r < queries->rows; r++) {
    const float *from = queries->mapped + r * form_rows(form) + form_rotating_row(form);
    float *weights = panel;
    memset(weights, 0, sizeof *weights * (size_t)basis->curves);
    for (int k = 0; k < pairs; k++) {
      float c = angle[k], s = angle[pairs + k];
      float a = from[k] * c + from[pairs + k] * s, b = from[pairs + k] * c - from[k] * s;
      if (k < fast) {
        weights[WAVE_TERMS + k] = a;
        weights[WAVE_TERMS + fast + k] = b;
        continue;
      }
      const float *terms = basis->terms + (k - fast) * WAVE_TERMS;
      for (int j = 0; j < WAVE_TERMS; j++) weights[j % 2 * (WAVE_TERMS / 2) + j / 2] += (j % 2 ? b : a) * terms[j];
    }
    multiply_add(1, PAGE_TOKENS, basis->curves, weights, basis->curves, basis->curve, scores + r * PAGE_TOKENS, PAGE_TOKENS);
  }
}

static void softmax(int rows, float *scores, struct softmax_state *states) {
  for (int r = 0; r < rows; r++) {
    float *s = scores + r * PAGE_TOKENS;
    struct softmax_state *state = states + r;
    float max = state->max, sum = 0;
    for (int t = state->lo; t < state->hi; t++) max = s[t] > max ? s[t] : max;
    bool any = max > -INFINITY; /* never subtract -inf from -inf */
    for (int t = 0; t < PAGE_TOKENS; t++) {
      s[t] = any && t >= state->lo && t < state->hi ? expf(s[t] - max) : 0;
      sum += s[t];
    }
    state->rescale = any ? expf(state->max - max) : 1;
    state->sum = state->sum * state->rescale + sum;
    state->max = max;
  }
}

const struct attention_kernels attention_kernels_portable = ATTENTION_KERNELS("portable");
