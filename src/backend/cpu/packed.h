/*
 * backend/cpu/packed.h - weights laid out for products with few tokens: 16 rows beside each other. Private.
 *
 * In a file, a row's blocks follow each other, each with its scales inside; a vector then holds many columns of one row, and for
 * every few columns its sums must meet other scales. With 16 rows side by side a vector's lane is a row from start to end: scales
 * are vectors, sums need no shuffling, one load of codes serves two dozen instructions fewer. It costs a pass over the weights
 * when a model is opened, after which the file's pages are not needed any more; sizes are those of the file but for Q4_K and
 * Q5_K, whose 6-bit scales become bytes (+2.8 % and +2.3 %).
 *
 * A group is 16 rows (those past the last row are zeros), a unit 32 columns, or 256 of the super-block formats. Everything lies
 * in the order in which a product reads it, because memory is fast in that order only: groups, their units, the parts of a unit
 * (4 of a super-block, otherwise 1), and behind the parts the unit's factors, [16] d and where there are minima [16] dmin or m,
 * fp16. With r a row of the group, a part has
 *
 *   codes       vectors of 64 bytes, [16 rows][4 bytes]: a dword of every row's code bytes as the file has them (blocks.h), whose
 *               bytes are neighbouring columns.
 *               Q8_0: 8 vectors, bytes + 128
 *               Q4_0, Q4_1, Q5_0, Q5_1: 4 vectors; low halves are columns 4 i .., high halves 16 + 4 i ..
 *               Q4_K, Q5_K, part p: 8 vectors; low halves are columns 64 p + 4 i .., high halves 32 further
 *               Q6_K, part 2 h + s, i = 0 .. 3: of columns 128 h + 16 s + 4 i .. and of those 32 further, ql; of both and of
 * those 64 and 96 further, qh fifth bits  for every four columns in order 8 bytes, bit 4 r + j being that of column j of row r: 8
 * of them for every 32 columns scales      Q4_K, Q5_K: [2 runs][16] scales, [2 runs][16] minima, bytes Q6_K: [4 quarters of
 * h][16] scales, signed bytes
 */
#ifndef OSCAR_CPU_PACKED_H
#define OSCAR_CPU_PACKED_H

#include "backend/cpu/dot.h"

#define GROUP_ROWS 16
#define VECTOR     64 /* bytes */

struct packed_form { /* of a unit of a group: columns, and bytes */
  int columns;       /* 0: weights of this type stay as they are */
  int parts;
  size_t codes, fifth_bits, scales; /* of a part */
  size_t factors;
};
static inline struct packed_form packed_form_of(enum weight_type type) {
  const size_t half = 2 * GROUP_ROWS;
  switch ((int)type) {
  case WEIGHT_Q4_0:
    return (struct packed_form){32, 1, 4 * VECTOR, 0, 0, half};
  case WEIGHT_Q4_1:
    return (struct packed_form){32, 1, 4 * VECTOR, 0, 0, 2 * half};
  case WEIGHT_Q5_0:
    return (struct packed_form){32, 1, 4 * VECTOR, VECTOR, 0, half};
  case WEIGHT_Q5_1:
    return (struct packed_form){32, 1, 4 * VECTOR, VECTOR, 0, 2 * half};
  case WEIGHT_Q8_0:
    return (struct packed_form){32, 1, 8 * VECTOR, 0, 0, half};
  case WEIGHT_Q4_K:
    return (struct packed_form){256, 4, 8 * VECTOR, 0, VECTOR, 2 * half};
  case WEIGHT_Q5_K:
    return (struct packed_form){256, 4, 8 * VECTOR, 2 * VECTOR, VECTOR, 2 * half};
  case WEIGHT_Q6_K:
    return (struct packed_form){256, 4, 12 * VECTOR, 0, VECTOR, half};
  default:
    return (struct packed_form){0};
  }
}

static inline size_t packed_part_bytes(const struct packed_form *f) { return f->codes + f->fifth_bits + f->scales; }
static inline size_t packed_unit_bytes(const struct packed_form *f) {
  return (size_t)f->parts * packed_part_bytes(f) + f->factors;
}
static inline size_t packed_group_bytes(const struct packed_form *f, int64_t cols) {
  return (size_t)(cols / f->columns) * packed_unit_bytes(f);
}

/* All groups; 0 for a weight that stays as it is. */
size_t packed_bytes(const struct weight *w);
/* Groups first .. last - 1 of w->data to their places in `packed`. */
void pack_groups(const struct weight *w, int64_t first, int64_t last, uint8_t *packed);

/* Kernels on w->packed. Rows begin and end at a group, or end at the last row. */
struct packed_kernels {
  const char *name;
  dot_rows *rows[WEIGHT_TYPES];
  expand_f32 *f32[WEIGHT_TYPES];
  expand_stripe *stripe[WEIGHT_TYPES]; /* as in struct dot_kernels */
};
extern const struct packed_kernels packed_avx2, packed_avx_vnni, packed_avx512;

#endif
