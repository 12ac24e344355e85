/* packed.c - sizes of packed weights, and the way into them from a file's blocks (packed.h). */
#include "backend/cpu/packed.h"

#include "backend/blocks.h"

size_t packed_bytes(const struct weight *w) {
  struct packed_form form = packed_form_of(w->type);
  return form.columns ? (size_t)((w->rows + GROUP_ROWS - 1) / GROUP_ROWS) * packed_group_bytes(&form, w->cols) : 0;
}

/* ---- a row's block into its lanes of a unit ---- */

static void put_dwords(const uint8_t *from, int dwords, uint8_t flip, int row, uint8_t *codes) {
  uint32_t flips = flip * 0x01010101u;
  for (int i = 0; i < dwords; i++) {
    uint32_t x;
    memcpy(&x, from + 4 * i, sizeof x);
    x ^= flips;
    memcpy(codes + i * VECTOR + 4 * row, &x, sizeof x);
  }
}

/* Bits of four neighbouring columns at 4 i of the row's word -> bits 4 row .. of the i-th of 8 words of 64 bits, which have zeros
 * there. */
static void put_bits(uint32_t bits, int row, uint8_t *words) {
  for (int i = 0; i < 8; i++) {
    uint64_t word;
    memcpy(&word, words + 8 * i, sizeof word);
    word |= (uint64_t)(bits >> 4 * i & 15) << 4 * row;
    memcpy(words + 8 * i, &word, sizeof word);
  }
}

static void put_halves(const uint8_t *halves, int count, int row, uint8_t *factors) {
  for (int i = 0; i < count; i++) memcpy(factors + i * 2 * GROUP_ROWS + 2 * row, halves + 2 * i, 2);
}

static uint32_t word_of(const uint8_t b[4]) {
  return (uint32_t)b[0] | (uint32_t)b[1] << 8 | (uint32_t)b[2] << 16 | (uint32_t)b[3] << 24;
}

typedef void put_block(const struct packed_form *f, const uint8_t *block, int row, uint8_t *unit);

static void put_q4_0(const struct packed_form *f, const uint8_t *block, int row, uint8_t *unit) {
  const struct block_q4_0 *b = (const void *)block;
  put_dwords(b->qs, 4, 0, row, unit);
  put_halves(b->d, 1, row, unit + packed_part_bytes(f));
}

static void put_q4_1(const struct packed_form *f, const uint8_t *block, int row, uint8_t *unit) {
  const struct block_q4_1 *b = (const void *)block;
  put_dwords(b->qs, 4, 0, row, unit);
  put_halves(b->d, 2, row, unit + packed_part_bytes(f)); /* and m */
}

static void put_q5_0(const struct packed_form *f, const uint8_t *block, int row, uint8_t *unit) {
  const struct block_q5_0 *b = (const void *)block;
  put_dwords(b->qs, 4, 0, row, unit);
  put_bits(word_of(b->qh), row, unit + f->codes);
  put_halves(b->d, 1, row, unit + packed_part_bytes(f));
}

static void put_q5_1(const struct packed_form *f, const uint8_t *block, int row, uint8_t *unit) {
  const struct block_q5_1 *b = (const void *)block;
  put_dwords(b->qs, 4, 0, row, unit);
  put_bits(word_of(b->qh), row, unit + f->codes);
  put_halves(b->d, 2, row, unit + packed_part_bytes(f)); /* and m */
}

static void put_q8_0(const struct packed_form *f, const uint8_t *block, int row, uint8_t *unit) {
  const struct block_q8_0 *b = (const void *)block;
  put_dwords((const uint8_t *)b->qs, 8, 0x80, row, unit);
  put_halves(b->d, 1, row, unit + packed_part_bytes(f));
}

static void put_nibbles_k(const struct packed_form *f, const uint8_t *qs, const uint8_t scales[12], int row, uint8_t *unit) {
  for (int p = 0; p < f->parts; p++, unit += packed_part_bytes(f)) {
    uint8_t *bytes = unit + f->codes + f->fifth_bits + row;
    put_dwords(qs + 32 * p, 8, 0, row, unit);
    for (int run = 0; run < 2; run++) {
      int scale, minimum;
      block_scale_min(scales, 2 * p + run, &scale, &minimum);
      bytes[run * GROUP_ROWS] = (uint8_t)scale;
      bytes[(2 + run) * GROUP_ROWS] = (uint8_t)minimum;
    }
  }
}

static void put_q4_k(const struct packed_form *f, const uint8_t *block, int row, uint8_t *unit) {
  const struct block_q4_k *b = (const void *)block;
  put_nibbles_k(f, b->qs, b->scales, row, unit);
  put_halves(b->d, 2, row, unit + packed_unit_bytes(f) - f->factors); /* and dmin */
}

static void put_q5_k(const struct packed_form *f, const uint8_t *block, int row, uint8_t *unit) {
  const struct block_q5_k *b = (const void *)block;
  put_nibbles_k(f, b->qs, b->scales, row, unit);
  for (int run = 0; run < 8; run++) {
    uint32_t bits = 0;
    for (int i = 0; i < 32; i++) bits |= (uint32_t)(b->qh[i] >> run & 1) << i;
    put_bits(bits, row, unit + (size_t)(run / 2) * packed_part_bytes(f) + f->codes + run % 2 * VECTOR);
  }
  put_halves(b->d, 2, row, unit + packed_unit_bytes(f) - f->factors); /* and dmin */
}

static void put_q6_k(const struct packed_form *f, const uint8_t *block, int row, uint8_t *unit) {
  const struct block_q6_k *b = (const void *)block;
  for (int half = 0; half < 2; half++)
    for (int run = 0; run < 2; run++, unit += packed_part_bytes(f)) {
      uint8_t *bytes = unit + f->codes + row;
      for (int i = 0; i < 4; i++) {
        int column = 16 * run + 4 * i;
        put_dwords(b->ql + 64 * half + column, 1, 0, row, unit + 3 * i * VECTOR);
        put_dwords(b->ql + 64 * half + 32 + column, 1, 0, row, unit + (3 * i + 1) * VECTOR);
        put_dwords(b->qh + 32 * half + column, 1, 0, row, unit + (3 * i + 2) * VECTOR);
      }
      for (int quarter = 0; quarter < 4; quarter++)
        memcpy(bytes + quarter * GROUP_ROWS, b->scales + 8 * half + 2 * quarter + run, 1);
    }
  put_halves(b->d, 1, row, unit);
}

void pack_groups(const struct weight *w, int64_t first, int64_t last, uint8_t *packed) {
  static put_block *const put[WEIGHT_TYPES] = {
      [WEIGHT_Q4_0] = put_q4_0, [WEIGHT_Q4_1] = put_q4_1, [WEIGHT_Q5_0] = put_q5_0, [WEIGHT_Q5_1] = put_q5_1,
      [WEIGHT_Q8_0] = put_q8_0, [WEIGHT_Q4_K] = put_q4_k, [WEIGHT_Q5_K] = put_q5_k, [WEIGHT_Q6_K] = put_q6_k,
  };
  const struct packed_form form = packed_form_of(w->type);
  if (!form.columns) return;
  const int64_t units = w->cols / form.columns;
  const size_t row_bytes = weight_row_bytes(w), block_bytes = row_bytes / (size_t)units, unit_bytes = packed_unit_bytes(&form);
  uint8_t *unit = packed + (size_t)first * packed_group_bytes(&form, w->cols);
  for (int64_t row = first * GROUP_ROWS; row < last * GROUP_ROWS; row += GROUP_ROWS)
    for (int64_t u = 0; u < units; u++, unit += unit_bytes) {
      const uint8_t *block = (const uint8_t *)w->data + (size_t)row * row_bytes + (size_t)u * block_bytes;
      const bool whole = row + GROUP_ROWS <= w->rows;
      const int rows = whole ? GROUP_ROWS : (int)(w->rows - row);
      if (!whole || form.fifth_bits) memset(unit, 0, unit_bytes);
      for (int r = 0; r < rows; r++) put[w->type](&form, block + (size_t)r * row_bytes, r, unit);
    }
}
