/*
 * blocks.c - sizes, names and dequantization of weight blocks.
 *
 * This is the definition the fast kernels are tested against, and the path for what is read once (embedding rows, expanding a
 * weight for a product library). Every value is the exact result of its formula rounded once to float: a half has 11 bits, so
 * d s (11 + 6 or 8 bits) and d q (11 + 8) fit a float's 24 bits, and only the last operation can round.
 */
#include "backend/blocks.h"

#include <limits.h>
#include <string.h>

static const struct format {
  int type, elements;
  size_t bytes;
} formats[] = {
    {WEIGHT_F32, 1, 4},
    {WEIGHT_F16, 1, 2},
    {WEIGHT_BF16, 1, 2},
    {WEIGHT_Q4_0, SMALL_BLOCK, sizeof(struct block_q4_0)},
    {WEIGHT_Q4_1, SMALL_BLOCK, sizeof(struct block_q4_1)},
    {WEIGHT_Q5_0, SMALL_BLOCK, sizeof(struct block_q5_0)},
    {WEIGHT_Q5_1, SMALL_BLOCK, sizeof(struct block_q5_1)},
    {WEIGHT_Q8_0, SMALL_BLOCK, sizeof(struct block_q8_0)},
    {WEIGHT_Q4_K, SUPER_BLOCK, sizeof(struct block_q4_k)},
    {WEIGHT_Q5_K, SUPER_BLOCK, sizeof(struct block_q5_k)},
    {WEIGHT_Q6_K, SUPER_BLOCK, sizeof(struct block_q6_k)},
};

/* The bytes per block are part of the file format. */
_Static_assert(sizeof(struct block_q4_0) == 18 && sizeof(struct block_q4_1) == 20, "layout of Q4");
_Static_assert(sizeof(struct block_q5_0) == 22 && sizeof(struct block_q5_1) == 24, "layout of Q5");
_Static_assert(sizeof(struct block_q8_0) == 34 && sizeof(struct block_q4_k) == 144, "layout of Q8_0, Q4_K");
_Static_assert(sizeof(struct block_q5_k) == 176 && sizeof(struct block_q6_k) == 210, "layout of Q5_K, Q6_K");

bool weight_block(enum weight_type type, int *elements, size_t *bytes) {
  for (size_t i = 0; i < ARRAY_LENGTH(formats); i++) {
    if (formats[i].type != (int)type) continue;
    *elements = formats[i].elements;
    *bytes = formats[i].bytes;
    return true;
  }
  return false;
}

/* Also the names of ggml types without code here, so that a message can say what a file holds. Empty: retired numbers. */
const char *weight_type_name(int type) {
  static const char *const names[] = {"F32",     "F16",    "Q4_0",    "Q4_1",  "",       "",      "Q5_0",  "Q5_1",
                                      "Q8_0",    "Q8_1",   "Q2_K",    "Q3_K",  "Q4_K",   "Q5_K",  "Q6_K",  "Q8_K",
                                      "IQ2_XXS", "IQ2_XS", "IQ3_XXS", "IQ1_S", "IQ4_NL", "IQ3_S", "IQ2_S", "IQ4_XS",
                                      "I8",      "I16",    "I32",     "I64",   "F64",    "IQ1_M", "BF16",  "",
                                      "",        "",       "TQ1_0",   "TQ2_0", "",       "",      "",      "MXFP4"};
  if (type < 0 || (size_t)type >= ARRAY_LENGTH(names) || !*names[type]) return "unknown";
  return names[type];
}

static void dequantize_f16(int64_t count, const uint8_t *in, float *out) {
  for (int64_t i = 0; i < count; i++) out[i] = block_half(in + 2 * i);
}

static void dequantize_bf16(int64_t count, const uint8_t *in, float *out) {
  for (int64_t i = 0; i < count; i++) out[i] = bf16_to_f32((uint16_t)(in[2 * i] | in[2 * i + 1] << 8));
}

static void dequantize_q4_0(int64_t blocks, const struct block_q4_0 *b, float *out) {
  for (; blocks > 0; blocks--, b++, out += SMALL_BLOCK) {
    float d = block_half(b->d);
    for (int i = 0; i < 16; i++) {
      out[i] = d * (float)((b->qs[i] & 15) - 8);
      out[i + 16] = d * (float)((b->qs[i] >> 4) - 8);
    }
  }
}

static void dequantize_q4_1(int64_t blocks, const struct block_q4_1 *b, float *out) {
  for (; blocks > 0; blocks--, b++, out += SMALL_BLOCK) {
    float d = block_half(b->d), m = block_half(b->m);
    for (int i = 0; i < 16; i++) {
      out[i] = d * (float)(b->qs[i] & 15) + m;
      out[i + 16] = d * (float)(b->qs[i] >> 4) + m;
    }
  }
}

static uint32_t fifth_bits(const uint8_t qh[4]) {
  return (uint32_t)qh[0] | (uint32_t)qh[1] << 8 | (uint32_t)qh[2] << 16 | (uint32_t)qh[3] << 24;
}

static void dequantize_q5_0(int64_t blocks, const struct block_q5_0 *b, float *out) {
  for (; blocks > 0; blocks--, b++, out += SMALL_BLOCK) {
    float d = block_half(b->d);
    uint32_t high = fifth_bits(b->qh);
    for (int i = 0; i < 16; i++) {
      out[i] = d * (float)((int)((b->qs[i] & 15u) | (high >> i & 1) << 4) - 16);
      out[i + 16] = d * (float)((int)((uint32_t)b->qs[i] >> 4 | (high >> (i + 16) & 1) << 4) - 16);
    }
  }
}

static void dequantize_q5_1(int64_t blocks, const struct block_q5_1 *b, float *out) {
  for (; blocks > 0; blocks--, b++, out += SMALL_BLOCK) {
    float d = block_half(b->d), m = block_half(b->m);
    uint32_t high = fifth_bits(b->qh);
    for (int i = 0; i < 16; i++) {
      out[i] = d * (float)((b->qs[i] & 15u) | (high >> i & 1) << 4) + m;
      out[i + 16] = d * (float)((uint32_t)b->qs[i] >> 4 | (high >> (i + 16) & 1) << 4) + m;
    }
  }
}

static void dequantize_q8_0(int64_t blocks, const struct block_q8_0 *b, float *out) {
  for (; blocks > 0; blocks--, b++, out += SMALL_BLOCK) {
    float d = block_half(b->d);
    for (int i = 0; i < SMALL_BLOCK; i++) out[i] = d * (float)b->qs[i];
  }
}

static void dequantize_q4_k(int64_t blocks, const struct block_q4_k *b, float *out) {
  for (; blocks > 0; blocks--, b++) {
    float d = block_half(b->d), dmin = block_half(b->dmin);
    for (int r = 0; r < 8; r++, out += 32) {
      int scale, minimum, shift = 4 * (r & 1);
      block_scale_min(b->scales, r, &scale, &minimum);
      float step = d * (float)scale, base = dmin * (float)minimum;
      const uint8_t *qs = b->qs + 32 * (r / 2);
      for (int i = 0; i < 32; i++) out[i] = step * (float)(qs[i] >> shift & 15) - base;
    }
  }
}

static void dequantize_q5_k(int64_t blocks, const struct block_q5_k *b, float *out) {
  for (; blocks > 0; blocks--, b++) {
    float d = block_half(b->d), dmin = block_half(b->dmin);
    for (int r = 0; r < 8; r++, out += 32) {
      int scale, minimum, shift = 4 * (r & 1);
      block_scale_min(b->scales, r, &scale, &minimum);
      float step = d * (float)scale, base = dmin * (float)minimum;
      const uint8_t *qs = b->qs + 32 * (r / 2);
      for (int i = 0; i < 32; i++) out[i] = step * (float)((qs[i] >> shift & 15) | (b->qh[i] >> r & 1) << 4) - base;
    }
  }
}

static void dequantize_q6_k(int64_t blocks, const struct block_q6_k *b, float *out) {
  for (; blocks > 0; blocks--, b++) {
    float d = block_half(b->d);
    for (int r = 0; r < 8; r++, out += 32) { /* 32 elements: quarter k of half h, two scales */
      int h = r / 4, k = r & 3;
      const uint8_t *ql = b->ql + 64 * h + 32 * (k & 1), *qh = b->qh + 32 * h;
      float steps[2] = {d * (float)b->scales[2 * r], d * (float)b->scales[2 * r + 1]};
      for (int i = 0; i < 32; i++) {
        int q = (ql[i] >> (k < 2 ? 0 : 4) & 15) | (qh[i] >> 2 * k & 3) << 4;
        out[i] = steps[i / 16] * (float)(q - 32);
      }
    }
  }
}

oscar_status weight_check_layout(struct backend *be, const struct weight *w, bool has_kernels) {
  int elements;
  size_t bytes;
  if (!weight_block(w->type, &elements, &bytes) || !has_kernels)
    return set_error(be->context, OSCAR_UNSUPPORTED, "tensor %s has type %s, for which the %s backend has no kernels", w->name,
                     weight_type_name((int)w->type), be->ops->name);
  if (!w->data || w->rows < 1 || w->cols < 1 || w->rows > INT_MAX || w->cols > INT_MAX)
    return set_error(be->context, OSCAR_FORMAT, "tensor %s of %lld x %lld is empty, absent or too large", w->name,
                     (long long)w->rows, (long long)w->cols);
  if (w->cols % elements)
    return set_error(be->context, OSCAR_FORMAT, "tensor %s has rows of %lld elements, not a multiple of the %d of a %s block",
                     w->name, (long long)w->cols, elements, weight_type_name((int)w->type));
  return OSCAR_OK;
}

void weight_dequantize(enum weight_type type, int64_t count, const void *blocks, float *out) {
  int64_t small = count / SMALL_BLOCK, super = count / SUPER_BLOCK;
  switch (type) {
  case WEIGHT_F32:
    memcpy(out, blocks, (size_t)count * sizeof *out);
    break;
  case WEIGHT_F16:
    dequantize_f16(count, blocks, out);
    break;
  case WEIGHT_BF16:
    dequantize_bf16(count, blocks, out);
    break;
  case WEIGHT_Q4_0:
    dequantize_q4_0(small, blocks, out);
    break;
  case WEIGHT_Q4_1:
    dequantize_q4_1(small, blocks, out);
    break;
  case WEIGHT_Q5_0:
    dequantize_q5_0(small, blocks, out);
    break;
  case WEIGHT_Q5_1:
    dequantize_q5_1(small, blocks, out);
    break;
  case WEIGHT_Q8_0:
    dequantize_q8_0(small, blocks, out);
    break;
  case WEIGHT_Q4_K:
    dequantize_q4_k(super, blocks, out);
    break;
  case WEIGHT_Q5_K:
    dequantize_q5_k(super, blocks, out);
    break;
  case WEIGHT_Q6_K:
    dequantize_q6_k(super, blocks, out);
    break;
  }
}
