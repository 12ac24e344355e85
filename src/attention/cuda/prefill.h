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
  /* Operands B of m16n8k16: [kv_heads][tiles of 8 columns][head_dim / 16][lane] of two words of values and two of what fp16 lost
   * of them. Keys: columns as above, in one tile more the mean and seven of 0; values: inputs are crumbs, columns channels. */
  const void *keys, *values;
  const float *scales; /* [kv_heads][2]: what the operands of keys and of values are to be multiplied with, powers of two */
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
  size_t keys, values, scales, runs; /* bytes, multiples of 16 */
};
/* A layer's codecs: one of each KV head, [kv_heads]. */
struct prefill_table_sizes prefill_table_sizes_of(int kv_heads, const oscar_codec *const *keys, const oscar_codec *const *values);
/* One after the other, in host memory; wave_pairs: prefill_wave_pairs of the rope. */
void prefill_tables_fill(int kv_heads, const oscar_codec *const *keys, const oscar_codec *const *values, int wave_pairs,
                         void *memory);

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
