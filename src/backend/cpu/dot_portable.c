/*
 * dot_portable.c - the kernels of dot.h in plain C: for CPUs without vector kernels of ours, and what those are tested against.
 */
#include "backend/cpu/dot.h"

#include "backend/blocks.h"

#define MAX_TOKENS 8 /* tokens for which an unpacked chunk is used before the next is unpacked */

struct unpacked {
  uint8_t q[CHUNK];
  float a[CHUNK_RUNS], m[CHUNK_RUNS];
};
/* `blocks` blocks of the format; with fewer than a chunk the rest of *u is left as it is. */
typedef void unpack_chunk(const uint8_t *in, int blocks, struct unpacked *u);

static void unpack_nibbles(const uint8_t qs[16], uint8_t *q) {
  for (int i = 0; i < 16; i++) {
    q[i] = qs[i] & 15;
    q[i + 16] = qs[i] >> 4;
  }
}

static void add_fifth_bits(const uint8_t qh[4], uint8_t *q) {
  for (int i = 0; i < SMALL_BLOCK; i++) q[i] = (uint8_t)(q[i] | (qh[i / 8] >> (i % 8) & 1) << 4);
}

static void set_runs(struct unpacked *u, int block, float a, float m) {
  u->a[2 * block] = u->a[2 * block + 1] = a;
  u->m[2 * block] = u->m[2 * block + 1] = m;
}

static void unpack_q4_0(const uint8_t *in, int blocks, struct unpacked *u) {
  const struct block_q4_0 *b = (const void *)in;
  for (int i = 0; i < blocks; i++) {
    float d = block_half(b[i].d);
    unpack_nibbles(b[i].qs, u->q + SMALL_BLOCK * i);
    set_runs(u, i, d, -8 * d);
  }
}

static void unpack_q4_1(const uint8_t *in, int blocks, struct unpacked *u) {
  const struct block_q4_1 *b = (const void *)in;
  for (int i = 0; i < blocks; i++) {
    unpack_nibbles(b[i].qs, u->q + SMALL_BLOCK * i);
    set_runs(u, i, block_half(b[i].d), block_half(b[i].m));
  }
}

static void unpack_q5_0(const uint8_t *in, int blocks, struct unpacked *u) {
  const struct block_q5_0 *b = (const void *)in;
  for (int i = 0; i < blocks; i++) {
    float d = block_half(b[i].d);
    unpack_nibbles(b[i].qs, u->q + SMALL_BLOCK * i);
    add_fifth_bits(b[i].qh, u->q + SMALL_BLOCK * i);
    set_runs(u, i, d, -16 * d);
  }
}

static void unpack_q5_1(const uint8_t *in, int blocks, struct unpacked *u) {
  const struct block_q5_1 *b = (const void *)in;
  for (int i = 0; i < blocks; i++) {
    unpack_nibbles(b[i].qs, u->q + SMALL_BLOCK * i);
    add_fifth_bits(b[i].qh, u->q + SMALL_BLOCK * i);
    set_runs(u, i, block_half(b[i].d), block_half(b[i].m));
  }
}

static void unpack_q8_0(const uint8_t *in, int blocks, struct unpacked *u) {
  const struct block_q8_0 *b = (const void *)in;
  for (int i = 0; i < blocks; i++) {
    float d = block_half(b[i].d);
    for (int j = 0; j < SMALL_BLOCK; j++) u->q[SMALL_BLOCK * i + j] = (uint8_t)(b[i].qs[j] + 128);
    set_runs(u, i, d, -128 * d);
  }
}

/* Nibbles and scales of Q4_K and Q5_K: 32 bytes hold 64 elements, the low halves first. */
static void unpack_super(const uint8_t d[2], const uint8_t dmin[2], const uint8_t scales[12], const uint8_t qs[128],
                         struct unpacked *u) {
  float df = block_half(d), mf = block_half(dmin);
  for (int r = 0; r < 8; r++) {
    int scale, minimum;
    block_scale_min(scales, r, &scale, &minimum);
    set_runs(u, r, df * (float)scale, -mf * (float)minimum);
    for (int l = 0; l < 32; l++) u->q[32 * r + l] = qs[32 * (r / 2) + l] >> (r % 2 ? 4 : 0) & 15;
  }
}

static void unpack_q4_k(const uint8_t *in, int blocks, struct unpacked *u) {
  (void)blocks;
  const struct block_q4_k *b = (const void *)in;
  unpack_super(b->d, b->dmin, b->scales, b->qs, u);
}

static void unpack_q5_k(const uint8_t *in, int blocks, struct unpacked *u) {
  (void)blocks;
  const struct block_q5_k *b = (const void *)in;
  unpack_super(b->d, b->dmin, b->scales, b->qs, u);
  for (int r = 0; r < 8; r++)
    for (int l = 0; l < 32; l++) u->q[32 * r + l] = (uint8_t)(u->q[32 * r + l] | (b->qh[l] >> r & 1) << 4);
}

static void unpack_q6_k(const uint8_t *in, int blocks, struct unpacked *u) {
  (void)blocks;
  const struct block_q6_k *b = (const void *)in;
  for (int i = 0; i < CHUNK; i++) {
    int half = i / 128, quarter = i / 32 % 4, l = i % 32;
    int low = b->ql[64 * half + 32 * (quarter & 1) + l] >> (quarter < 2 ? 0 : 4) & 15;
    int high = b->qh[32 * half + l] >> (2 * quarter) & 3;
    u->q[i] = (uint8_t)(low | high << 4);
  }
  float d = block_half(b->d);
  for (int r = 0; r < CHUNK_RUNS; r++) {
    u->a[r] = d * (float)b->scales[r];
    u->m[r] = -32 * u->a[r];
  }
}

static float dot_chunk(const struct unpacked *u, int runs, const struct act_chunk *x) {
  float total = 0;
  for (int r = 0; r < runs; r++) {
    const uint8_t *q = u->q + RUN * r;
    const int8_t *high = x->high + RUN * r, *low = x->low + RUN * r;
    int32_t sum = 0;
    for (int i = 0; i < RUN; i++) sum += q[i] * (128 * high[i] + low[i]);
    total += u->a[r] * x->scale[r] * (float)sum + u->m[r] * x->sum[r];
  }
  return total;
}

static void dot_row(unpack_chunk *unpack, const uint8_t *row, int block_elements, size_t block_bytes, const struct dot_input *in,
                    int t0, int n, float *y, int64_t y_stride) {
  struct unpacked u;
  float total[MAX_TOKENS] = {0};
  int chunk_blocks = CHUNK / block_elements;
  int64_t blocks = in->cols / block_elements;
  for (int64_t c = 0; c < in->chunks_per_token; c++) {
    int64_t left = blocks - c * chunk_blocks;
    int here = left < chunk_blocks ? (int)left : chunk_blocks;
    unpack(row + (size_t)c * (size_t)chunk_blocks * block_bytes, here, &u);
    for (int t = 0; t < n; t++)
      total[t] += dot_chunk(&u, here * block_elements / RUN, in->chunks + (t0 + t) * in->chunks_per_token + c);
  }
  for (int t = 0; t < n; t++) y[(t0 + t) * y_stride] = total[t];
}

static void dot_rows_of(unpack_chunk *unpack, const struct weight *w, int64_t first, int64_t last, const struct dot_input *in,
                        float *y) {
  int elements = 1;
  size_t bytes = 0, row_bytes = weight_row_bytes(w);
  weight_block(w->type, &elements, &bytes);
  for (int64_t r = first; r < last; r++)
    for (int t = 0; t < in->n; t += MAX_TOKENS)
      dot_row(unpack, (const uint8_t *)w->data + (size_t)r * row_bytes, elements, bytes, in, t,
              in->n - t < MAX_TOKENS ? in->n - t : MAX_TOKENS, y + r, w->rows);
}

#define ROWS(format)                                                                                                             \
  static void rows_##format(const struct weight *w, int64_t first, int64_t last, const struct dot_input *in, float *y) {         \
    dot_rows_of(unpack_##format, w, first, last, in, y);                                                                         \
  }
ROWS(q4_0)
ROWS(q4_1)
ROWS(q5_0)
ROWS(q5_1)
ROWS(q8_0)
ROWS(q4_k)
ROWS(q5_k)
ROWS(q6_k)

/* Float weights: a stretch of the row becomes floats, then meets every token. Sixteen sums, so that the order of additions is
 * the same however the compiler vectorizes. */
static void rows_float(const struct weight *w, int64_t first, int64_t last, const struct dot_input *in, float *y) {
  size_t element_bytes = w->type == WEIGHT_F32 ? 4 : 2, row_bytes = weight_row_bytes(w);
  float values[CHUNK], sums[MAX_TOKENS][RUN];
  for (int64_t r = first; r < last; r++) {
    const uint8_t *row = (const uint8_t *)w->data + (size_t)r * row_bytes;
    for (int t0 = 0; t0 < in->n; t0 += MAX_TOKENS) {
      int n = in->n - t0 < MAX_TOKENS ? in->n - t0 : MAX_TOKENS;
      memset(sums, 0, sizeof sums);
      for (int64_t k = 0; k < in->cols; k += CHUNK) {
        int count = in->cols - k < CHUNK ? (int)(in->cols - k) : CHUNK;
        weight_dequantize(w->type, count, row + (size_t)k * element_bytes, values);
        for (int t = 0; t < n; t++) {
          const float *x = in->x + (t0 + t) * in->cols + k;
          for (int i = 0; i < count; i++) sums[t][i % RUN] += values[i] * x[i];
        }
      }
      for (int t = 0; t < n; t++) {
        float total = 0;
        for (int i = 0; i < RUN; i++) total += sums[t][i];
        y[(t0 + t) * w->rows + r] = total;
      }
    }
  }
}

static void expand_any(const struct weight *w, int64_t first, int64_t last, float *out) {
  weight_dequantize(w->type, (last - first) * w->cols, (const uint8_t *)w->data + (size_t)first * weight_row_bytes(w), out);
}

static void quantize(const float *x, int count, struct act_chunk *chunk) { quantize_chunk_inline(x, count, chunk); }

const struct dot_kernels dot_portable = {
    .name = "portable",
    .many_tokens = 4,
    .quantize = quantize,
    .rows = {[WEIGHT_F32] = rows_float,
             [WEIGHT_F16] = rows_float,
             [WEIGHT_BF16] = rows_float,
             [WEIGHT_Q4_0] = rows_q4_0,
             [WEIGHT_Q4_1] = rows_q4_1,
             [WEIGHT_Q5_0] = rows_q5_0,
             [WEIGHT_Q5_1] = rows_q5_1,
             [WEIGHT_Q8_0] = rows_q8_0,
             [WEIGHT_Q4_K] = rows_q4_k,
             [WEIGHT_Q5_K] = rows_q5_k,
             [WEIGHT_Q6_K] = rows_q6_k},
    .f32 = {[WEIGHT_F32] = expand_any,
            [WEIGHT_F16] = expand_any,
            [WEIGHT_BF16] = expand_any,
            [WEIGHT_Q4_0] = expand_any,
            [WEIGHT_Q4_1] = expand_any,
            [WEIGHT_Q5_0] = expand_any,
            [WEIGHT_Q5_1] = expand_any,
            [WEIGHT_Q8_0] = expand_any,
            [WEIGHT_Q4_K] = expand_any,
            [WEIGHT_Q5_K] = expand_any,
            [WEIGHT_Q6_K] = expand_any},
};
