/*
 * baselines.c - see baselines.h. A quantizer works on groups of 32, which never cross a page (64 tokens) or a head (a multiple of
 * 32 channels); encoding and decoding happen in one go, group by group, and nothing is packed.
 */
#include "eval/baselines.h"

#include "cache/view.h"
#include "engine/engine.h"

#include <math.h>
#include <oscar/rotation.h>
#include <string.h>

struct baseline {
  oscar_page_filter filter;
  float *rotation; /* [2][head_dim][head_dim]: Hadamard matrix and transpose; NULL without rotation */
};

static bool fits_f16(uint16_t h) { return (h & 0x7C00u) != 0x7C00u; }

/* ---- KIVI ---- */

/* The published code keeps -minimum / scale instead of the minimum, which overflows when a group is nearly constant; the minimum
 * itself takes the same 16 bits. Codes are those of scale and minimum as stored. */
bool kivi_quantize(const float *x, size_t stride, struct kivi_group *group) {
  float min = x[0], max = x[0];
  for (size_t i = 0; i < BASELINE_GROUP; i++) {
    if (!isfinite(x[i * stride])) return false;
    min = fminf(min, x[i * stride]);
    max = fmaxf(max, x[i * stride]);
  }
  group->minimum = f32_to_f16(min);
  group->scale = f32_to_f16((max - min) / 3);
  if (!fits_f16(group->minimum) || !fits_f16(group->scale)) return false;
  const float scale = f16_to_f32(group->scale), minimum = f16_to_f32(group->minimum);
  for (size_t i = 0; i < BASELINE_GROUP; i++) {
    const float q = scale > 0 ? rintf((x[i * stride] - minimum) / scale) : 0;
    group->codes[i] = (uint8_t)fminf(fmaxf(q, 0), 3);
  }
  return true;
}

void kivi_dequantize(const struct kivi_group *group, float *x, size_t stride) {
  const float scale = f16_to_f32(group->scale), minimum = f16_to_f32(group->minimum);
  for (size_t i = 0; i < BASELINE_GROUP; i++) x[i * stride] = scale * (float)group->codes[i] + minimum;
}

static int kivi_apply(const void *user, int layer, int kv_head, oscar_side side, int head_dim, const float *rows, float *out) {
  (void)user, (void)layer, (void)kv_head;
  const int d = head_dim, along_tokens = side == OSCAR_KEYS;
  const int height = along_tokens ? BASELINE_GROUP : 1, width = along_tokens ? 1 : BASELINE_GROUP; /* of a group */
  const size_t stride = along_tokens ? (size_t)d : 1;
  for (int row = 0; row < OSCAR_PAGE_TOKENS; row += height)
    for (int channel = 0; channel < d; channel += width) {
      struct kivi_group group;
      if (!kivi_quantize(rows + row * d + channel, stride, &group)) return row;
      kivi_dequantize(&group, out + row * d + channel, stride);
    }
  return OSCAR_PAGE_TOKENS;
}

/* ---- q4_0 ---- */

/* As quantize_row_q4_0_ref in ggml/src/ggml-quants.c: the number of the largest magnitude (the first one on ties) becomes code 0,
 * and codes are made with d before it is rounded to fp16. */
bool q4_0_quantize(const float *x, struct block_q4_0 *block) {
  float largest = 0;
  for (int i = 0; i < BASELINE_GROUP; i++) {
    if (!isfinite(x[i])) return false;
    if (fabsf(x[i]) > fabsf(largest)) largest = x[i];
  }
  const float d = largest / -8;
  const uint16_t stored = f32_to_f16(d);
  if (!fits_f16(stored)) return false;
  block->d[0] = (uint8_t)stored;
  block->d[1] = (uint8_t)(stored >> 8);
  const float inverse = f16_to_f32(stored) != 0 ? 1 / d : 0; /* 1 / d may overflow where d is 0 in fp16 and codes mean nothing */
  uint8_t codes[BASELINE_GROUP];
  for (int i = 0; i < BASELINE_GROUP; i++) {
    const int q = (int)(x[i] * inverse + 8.5f);
    codes[i] = (uint8_t)(q < 15 ? q : 15);
  }
  for (int i = 0; i < BASELINE_GROUP / 2; i++) block->qs[i] = (uint8_t)(codes[i] | codes[i + BASELINE_GROUP / 2] << 4);
  return true;
}

static bool q4_0_row(const float *x, int d, float *out) {
  for (int i = 0; i < d; i += BASELINE_GROUP) {
    struct block_q4_0 block;
    if (!q4_0_quantize(x + i, &block)) return false;
    weight_dequantize(WEIGHT_Q4_0, BASELINE_GROUP, &block, out + i);
  }
  return true;
}

static int q4_0_apply(const void *user, int layer, int kv_head, oscar_side side, int head_dim, const float *rows, float *out) {
  (void)user, (void)layer, (void)kv_head, (void)side;
  for (int row = 0; row < OSCAR_PAGE_TOKENS; row++)
    if (!q4_0_row(rows + row * head_dim, head_dim, out + row * head_dim)) return row;
  return OSCAR_PAGE_TOKENS;
}

/* y = x m, with m [d][d] */
static void multiply_row(int d, const float *x, const float *m, float *y) {
  memset(y, 0, sizeof *y * (size_t)d);
  for (int i = 0; i < d; i++)
    for (int j = 0; j < d; j++) y[j] += x[i] * m[i * d + j];
}

static int q4_0_hadamard_apply(const void *user, int layer, int kv_head, oscar_side side, int head_dim, const float *rows,
                               float *out) {
  (void)layer, (void)kv_head, (void)side;
  const int d = head_dim;
  const float *rotation = user, *inverse = rotation + d * d;
  float rotated[OSCAR_MAX_HEAD_DIM], decoded[OSCAR_MAX_HEAD_DIM];
  for (int row = 0; row < OSCAR_PAGE_TOKENS; row++) {
    multiply_row(d, rows + row * d, rotation, rotated);
    if (!q4_0_row(rotated, d, decoded)) return row;
    multiply_row(d, decoded, inverse, out + row * d);
  }
  return OSCAR_PAGE_TOKENS;
}

/* ---- by name ---- */

static const struct {
  const char *kv;
  double bits_per_element;
  int (*apply)(const void *user, int layer, int kv_head, oscar_side side, int head_dim, const float *rows, float *out);
  bool rotated;
} baselines[] = {
    {"int2-kivi", 2 + 32.0 / BASELINE_GROUP, kivi_apply, false},
    {"q4_0", 8.0 * sizeof(struct block_q4_0) / BASELINE_GROUP, q4_0_apply, false},
    {"q4_0-hadamard", 8.0 * sizeof(struct block_q4_0) / BASELINE_GROUP, q4_0_hadamard_apply, true},
};

static oscar_status make_rotation(oscar_context *context, int d, float **rotation) {
  const size_t elements = (size_t)d * (size_t)d;
  float *m = *rotation = mem_alloc(context, 2 * elements, sizeof *m);
  if (!m) return OSCAR_NO_MEMORY;
  oscar_status status = oscar_hadamard(context, d, m);
  for (int i = 0; status == OSCAR_OK && i < d; i++)
    for (int j = 0; j < d; j++) m[elements + (size_t)(j * d + i)] = m[i * d + j];
  return status;
}

oscar_status baseline_create(oscar_context *context, const char *kv, int head_dim, struct baseline **baseline) {
  *baseline = NULL;
  const struct kv_type *type = kv_type_find(kv);
  if (!type || type->kind != KV_EVALUATION) return OSCAR_OK;
  size_t which = 0;
  while (which < ARRAY_LENGTH(baselines) && strcmp(baselines[which].kv, kv) != 0) which++;
  if (which == ARRAY_LENGTH(baselines)) return set_error(context, OSCAR_UNSUPPORTED, "KV type %s has no quantizer", kv);
  if (head_dim % BASELINE_GROUP != 0)
    return set_error(context, OSCAR_UNSUPPORTED, "KV type %s quantizes groups of %d channels; head_dim is %d", kv, BASELINE_GROUP,
                     head_dim);
  struct baseline *b = mem_zalloc(context, 1, sizeof *b);
  if (!b) return OSCAR_NO_MEMORY;
  oscar_status status = baselines[which].rotated ? make_rotation(context, head_dim, &b->rotation) : OSCAR_OK;
  if (status != OSCAR_OK) {
    baseline_free(context, b);
    return status;
  }
  b->filter = (oscar_page_filter){baselines[which].apply, b->rotation, baselines[which].bits_per_element};
  *baseline = b;
  return OSCAR_OK;
}

void baseline_free(oscar_context *context, struct baseline *baseline) {
  if (!baseline) return;
  mem_free(context, baseline->rotation);
  mem_free(context, baseline);
}

const oscar_page_filter *baseline_filter(const struct baseline *baseline) { return baseline ? &baseline->filter : NULL; }

void baseline_measure(const struct baseline *baseline, const oscar_sequence *sequence, double *bits_per_element, size_t *bytes) {
  const struct cache_geometry *g = cache_geometry_of(sequence_cache(sequence));
  const int64_t length = oscar_sequence_length(sequence);
  double bits = 0; /* of one channel over all tokens */
  for (int64_t first = 0; first < length; first += OSCAR_PAGE_TOKENS) {
    const int64_t left = length - first, tokens = left < OSCAR_PAGE_TOKENS ? left : OSCAR_PAGE_TOKENS;
    bool coded = false;
    (void)oscar_sequence_read_page(sequence, (int)(first / OSCAR_PAGE_TOKENS), 0, 0, &coded, NULL, NULL); /* the page is there */
    bits += (double)tokens * (coded ? baseline->filter.bits_per_element : 16);
  }
  *bits_per_element = length > 0 ? bits / (double)length : 0;
  *bytes = (size_t)(bits / 8 * 2 * g->layers * g->kv_heads * g->head_dim);
}
