/*
 * attention/cuda/prefill.h - attention of many queries a sequence over a paged cache on a GPU. Private; for C and CUDA.
 *
 * Tiles, lists of pages and layers are those of decode.h, but a tile has up to PREFILL_ROWS rows, and a KV head of it is one
 * block's work from its queries to its outputs. Where that leaves too few blocks, tiles are cut into parts that share the rows
 * and divide the pages; what they sum up is put together by another launch. The kernel needs matrix instructions of compute
 * capability 9.0; prefill_serves says whether a layer and a GPU have it, and where they have not, decode kernels do prompts too.
 */
#ifndef OSCAR_ATTENTION_CUDA_PREFILL_H
#define OSCAR_ATTENTION_CUDA_PREFILL_H

#include "attention/cuda/decode.h"
#include "quant/device_form.h"

#ifdef __cplusplus
extern "C" {
#endif

#define PREFILL_ROWS       128
#define PREFILL_MOST_PARTS 32 /* of a tile */

struct prefill_tile {
  struct decode_tile of;      /* with the pages of this part; without the line of work */
  int32_t part, parts, first; /* first: number of the tile's first part among those of all tiles that are cut */
};
/* On the device but for the numbers. */
struct prefill_plan {
  const struct prefill_tile *tiles;
  const struct decode_page *pages;
  int tile_count, part_count; /* parts of tiles that are cut */
};

/* Where a number is in an operand of PREFILL_SIDE rows that lies in shared memory, or in memory to be copied there: in bytes. 64
 * columns lie together, and the 16-byte pieces of row r are where their number xor r mod 8 says (prefill/warpgroup.cuh). */
#define PREFILL_SIDE                   64 /* of a product: tokens of a page, columns of queries, crumbs */
#define PREFILL_OPERAND_BYTES(columns) (((columns) + 63) / 64 * (PREFILL_SIDE * 128))
ON_BOTH static inline int prefill_operand_place(int row, int column) {
  return column / 64 * (PREFILL_SIDE * 128) + row * 128 + ((column % 64 / 8 ^ row) & 7) * 16 + column % 8 * 2;
}

/* What prefill needs of a layer's codecs besides decode_layer: maps as operands of matrix products, and how means turn. On the
 * device. Columns of keys: their crumbs (prefill_key_column), then cos and sin of turning_pairs pairs of the rope, which are
 * others in every head: those that its mean turns in, and as many more of amplitude 0 as make the number that of all heads and a
 * multiple of PREFILL_STEP_PAIRS. */
#define PREFILL_STEP_PAIRS(head_dim) ((head_dim) > 64 ? 16 : 8)
/* Pairs that follow each other in columns and waves, to be copied together: `pairs` of them to the column of pair `to`, from pair
 * `from` of the waves of a page. */
struct wave_run {
  uint8_t to, pairs; /* 0 pairs: none */
  uint16_t from;
};
struct prefill_tables {
  int key_columns, turning_pairs;
  /* Operands of PREFILL_SIDE rows and head_dim columns (prefill_operand_place): fp16 numbers, then what fp16 lost of them, in
   * turn. keys [kv_heads][columns as above / 64, and zeros]: a row is what makes a column of a query of its channels. values
   * [kv_heads][crumbs / 64]: rows are crumbs, columns channels. */
  const void *keys, *values;
  const float *scales;      /* [kv_heads][2]: what the operands of keys and of values are to be multiplied with, powers of two */
  const float *key_means;   /* [kv_heads][head_dim]: what makes a query's score with the mean */
  const float *value_means; /* [kv_heads][head_dim]: what is added for coded values */
  const struct wave_run *runs; /* [kv_heads][turning_pairs], those of 0 pairs last */
};

/* Where a crumb of a key is among the columns: in the order in which threads find crumbs in the words of a page, so that what a
 * thread writes lies together. */
ON_BOTH static inline int prefill_key_column(int blocks, int crumb) {
  const int in_word = crumb % 2 * 2 + crumb % 4 / 2; /* low bytes of half words, then high ones */
  const int block = crumb / 16, class_ = class_of_block(blocks, block), i = block - class_begin(blocks, class_);
  const int full = blocks / KEY_CLASSES, over = blocks % KEY_CLASSES;
  if (i < full / 2 * 2) return i / 2 * 128 + class_ / 2 * 64 + crumb % 16 / 4 * 16 + class_ % 2 * 8 + i % 2 * 4 + in_word;
  const int in_block = crumb % 16 / 4 * 4 + in_word;
  if (i < full) return full / 2 * 128 + class_ * 16 + in_block;
  return full * 64 + (over == 1 ? 0 : class_ == 1 ? 0 : class_ == 3 ? 16 : 32) + in_block;
}
/* Where a token of a coded page is among the columns of scores: words of values have eight tokens that are neighbours there. */
ON_BOTH static inline int prefill_token_column(int token) {
  return token % 8 / 2 * 16 + token / 32 * 8 + token % 32 / 8 * 2 + token % 2;
}

struct prefill_table_sizes {
  int key_columns, turning_pairs;
  size_t keys, values, scales, means, runs; /* bytes, multiples of 16; means: of keys, and as many of values */
};
static inline size_t prefill_table_bytes(const struct prefill_table_sizes *s) {
  return s->keys + s->values + s->scales + 2 * s->means + s->runs;
}
/* A layer's codecs: one of each KV head, [kv_heads]. */
struct prefill_table_sizes prefill_table_sizes_of(int kv_heads, const oscar_codec *const *keys, const oscar_codec *const *values);
/* prefill_table_bytes of host memory; wave_pairs: prefill_wave_pairs of the rope. */
void prefill_tables_fill(int kv_heads, const oscar_codec *const *keys, const oscar_codec *const *values, int wave_pairs,
                         void *memory);
/* Where they are in that memory, or in a copy of it on the device. */
struct prefill_tables prefill_tables_at(const struct prefill_table_sizes *sizes, void *memory);

/* cos, then sin, of a pair's angle at all tokens of a page, in the order of columns of scores and with the pieces of a row where
 * operands have them: what turning pairs add to keys. Where pieces are depends on the number of the row, so a pair lies there
 * once for each number mod 4 of the place among columns that it may come to: the shift s is for places p + s of pair p. waves:
 * fp16 [pages][PREFILL_SHIFTS][prefill_wave_pairs][2][64]; pages first .. first + count - 1 of it are made from the angles of
 * `rope` and token_angles [pairs][2][64], cos and sin of angles from the centre of a page to its tokens. */
#define PREFILL_WAVE_BYTES 256 /* of a page, shift and pair */
#define PREFILL_SHIFTS     4
static inline int prefill_wave_pairs(int rope_pairs) { return (rope_pairs + 15) / 16 * 16; }
oscar_status prefill_make_waves(struct oscar_cuda *cuda, const struct decode_rope *rope, const float *token_angles, int64_t first,
                                int64_t count, void *waves);

/* Whether there is a kernel for this layer on this GPU. tables may be NULL where pages have no codes. */
bool prefill_serves(const struct oscar_cuda *cuda, const struct decode_shape *shape, const struct decode_layer *layer,
                    const struct prefill_table_sizes *sizes);
/* Sums of a part, for all KV heads. */
size_t prefill_part_bytes(const struct decode_shape *shape);
/* out [tokens][query_heads][head_dim]. waves: of the pages that are read; NULL where no mean turns. parts: prefill_part_bytes for
 * each part. Blocks take tiles in the order of the plan, so the longest should come first. */
oscar_status prefill_run(struct oscar_cuda *cuda, const struct decode_shape *shape, const struct decode_layer *layer,
                         const struct prefill_tables *tables, const struct prefill_plan *plan, const void *waves, float *parts,
                         const float *q, float *out);

#ifdef __cplusplus
}
#endif
#endif
