/*
 * attention/cuda/decode.h - attention of few queries a sequence over a paged cache on a GPU: what is launched, and what it reads.
 * Private; for C and CUDA.
 *
 * Queries come in tiles: at most DECODE_ROWS rows, a row being a (position, query head) pair of one KV head, with all positions
 * in one page, so that the reading rule gives every row the same form of every page. A tile has a list of pages to be read
 * exactly and one of pages to be read as codes; both lists serve all KV heads.
 *
 * The work of a launch is a line, of which every block of threads takes an equal stretch (decode/line.h). What is read by one
 * block is done then; else the blocks leave sums in memory, and the last one on the line puts them together as they come. It
 * waits for blocks that began before it, so any number of them may run at a time.
 */
#ifndef OSCAR_ATTENTION_CUDA_DECODE_H
#define OSCAR_ATTENTION_CUDA_DECODE_H

#include "cache/cuda/write.h"
#include "cuda/device.h"
#include "cuda/rotation.h"

#include <oscar/codec.h>

#include <stdbool.h>

#ifdef __cplusplus
extern "C" {
#endif

#define DECODE_ROWS  16
#define EXACT_TOKENS 16
#define GAIN_CLASSES 4
/* Curves of a mean that turns come in steps, as many as a matrix product takes. Where so few pairs turn, two steps, it is faster
 * to let each have curves of its own. */
#define CURVE_STEP       16
#define CURVE_STEP_BYTES 4096
#define OWN_CURVES_PAIRS 32

struct decode_page {
  int32_t unit;   /* of the arena */
  int32_t number; /* in its sequence: positions 64 number .. 64 number + 63 */
};

struct decode_tile {
  int32_t token;           /* row of q [tokens][query_heads][head_dim] that holds the first position */
  int32_t rows, first_row; /* rows of a KV head from first_row on; row r is position r / group, head r % group */
  int32_t exact_first, exact_pages, coded_first, coded_pages; /* in the list of pages */
  int32_t exact_tiles;                                        /* of 16 tokens, 4 for every page but the last */
  /* on the line (decode/line.h): */
  int32_t begin;        /* units before this tile */
  int32_t units;        /* of one KV head */
  int32_t reading;      /* those of them that what is read is spread over: the first */
  uint32_t work_share;  /* units of work in a unit of these, in 2^-31 */
  uint32_t exact_share; /* exact tiles in a unit of work, in 2^-32 */
  int32_t late;         /* units from here on have decode_line.late_share of work instead */
  int64_t position;     /* of row 0 of the job */
};

struct decode_line {
  int32_t units;  /* of all tiles */
  int32_t length; /* units that blocks share evenly; nothing is on the last ones */
  /* What reading, work_share and late are for the last KV head of the last tile, whose units are all that are left. */
  int32_t last_reading;
  uint32_t last_share;
  int32_t last_late;
  uint32_t late_share;           /* as work_share */
  int32_t blocks, stretch, over; /* of the blocks that have something, number b begins at b stretch + b over / blocks */
};

/* One side of a layer's coded pages. */
struct decode_side {
  int crumbs, groups, form; /* oscar_row_form */
};

/* The turning of a rope, for the rotating means of all layers that use it. Angles are those at the centres of pages. */
struct decode_rope {
  int pairs;          /* of the rope, rounded up to 8; those beyond it turn by 0 */
  int fast;           /* pairs before this have curves of their own (attention/waves.h) */
  int steps;          /* of 16 even curves and 16 odd ones: first 8 polynomials of each kind, then cos and sin of fast pairs */
  int64_t pages;      /* in the table */
  const void *angles; /* [pages][pairs / 8][4] of 4 words of 2 fp16: (cos, sin) of pair 8 i + q, what fp16 lost of it, the same of
                         pair 8 i + 4 + q */
  const float *turns; /* [pages][pairs][cos, sin]: the same angles */
  const float *series;     /* [pairs][16]: even terms, then odd ones; 0 for fast pairs */
  const void *curve_words; /* [steps][even, odd][2 tiles][value, what fp16 lost of it][lane] of 4 words: operand A of tokens
                              from the centre of a page on */
};

struct decode_layer {
  uint8_t *memory; /* of this layer's pages */
  size_t unit_bytes;
  int head_bytes, value_offset; /* coded: of a KV head, and of its values */
  struct decode_side keys, values;
  int key_rows;                   /* of a map */
  const float *key_map;           /* [kv_heads][head_dim][key_rows]: maps of keys (quant/codec.h), transposed */
  const uint32_t *value_map;      /* [kv_heads][value_map_words] (decode/value_map.h) */
  const struct decode_rope *rope; /* on the host; NULL: no rotating mean */
  int rotating_pairs;             /* of the keys */
  bool own_curves;                /* of each pair; else polynomials stand for those that are not fast */
  int turning_pairs;              /* own curves: rotating_pairs and none, a multiple of CURVE_STEP. Else the first pairs of the
                                     rope, up to the last that any head's mean turns in, all fast ones, a multiple of 8 */
  /* On the device, [kv_heads][turning_pairs]: the row of the keys' map that has a of a pair, b is rotating_pairs rows on; 0xFFFF:
   * the pair's mean does not rotate. */
  const uint16_t *wave_rows;
  /* On the device, for own curves. pairs: [kv_heads][turning_pairs], their numbers in the rope. curves: [kv_heads][turning_pairs
   * / CURVE_STEP][cos, sin], then as curve_words of a rope; 0 where there is no pair. */
  const uint16_t *pairs;
  const void *curves;
};
/* Pairs whose cos and sin are curves. */
static inline int curved_pairs(const struct decode_layer *layer) {
  return !layer->rope ? 0 : layer->own_curves ? layer->turning_pairs : layer->rope->fast;
}

struct decode_shape {
  int kv_heads, group, head_dim;
  float scale; /* of scores */
  int window;  /* 0: none */
};

/* On the device but for the numbers. Launches that were recorded read the tiles, pages and units that are there when they are
 * replayed: the numbers are what has to be the same. */
struct decode_plan {
  const struct decode_tile *tiles;
  const struct decode_page *pages;
  const struct decode_line *line;
  int tile_count, rows; /* rows: of the largest tile */
};

/* Work space on the device. */
struct decode_space {
  void *prepared; /* decode_prepared_bytes for each tile and KV head */
  float *parts;   /* decode_part_bytes for each of tiles kv_heads + decode_blocks; all 0, before a launch and after it */
};

/* New tokens, one of each sequence, as products leave them: of each token q, k and v [heads][head_dim]. All on the device but for
 * the numbers. */
struct decode_rows {
  const float *q, *k, *v;
  int64_t q_pitch, kv_pitch;    /* floats from a token's to the next one's, of q; of k, and of v */
  const float *q_norm, *k_norm; /* [head_dim], or NULL */
  float eps;                    /* of the norms */
  struct head_rotation rotation;
  const int32_t *positions;         /* [tokens] */
  const struct write_place *places; /* [tokens] where k and v go */
  unsigned long long *bad;          /* as write_rows says */
  float *rotated;                   /* [tokens][query_heads][head_dim]: q as attention wants it; not q */
};

/* Whether kernels exist for a layer of this form. The reason, where not, is recorded. *rows: how many a tile may have, at most
 * DECODE_ROWS. */
oscar_status decode_check(struct oscar_cuda *cuda, const struct decode_shape *shape, const struct decode_layer *layer, int *rows);
size_t decode_prepared_bytes(const struct decode_layer *layer, int rows); /* rows: of decode_plan */
size_t decode_part_bytes(const struct decode_shape *shape);
int decode_blocks(const struct oscar_cuda *cuda); /* of a launch; where there are fewer units, only so many do something */

/* Maps the queries into the space of codes: q [tokens][query_heads][head_dim] -> prepared. Only where pages are coded. */
oscar_status decode_prepare(struct oscar_cuda *cuda, const struct decode_shape *shape, const struct decode_layer *layer,
                            const struct decode_plan *plan, const float *q, const struct decode_space *space);
/* What comes before decode_run in a step of one token of each sequence, in one launch: q and k normed and rotated, k and v into
 * their exact pages, and what decode_prepare does where pages are coded. The plan, places and pages that are read as codes must
 * be there before the step is enqueued. */
oscar_status decode_enter(struct oscar_cuda *cuda, const struct decode_shape *shape, const struct decode_layer *layer,
                          const struct decode_plan *plan, const struct decode_rows *rows, const struct decode_space *space);
/* Attention to all pages: out [tokens][query_heads][head_dim]. Coded pages are read while the kernel enqueued before may still
 * run: that must be one that does not write them, such as decode_prepare and decode_enter. */
oscar_status decode_run(struct oscar_cuda *cuda, const struct decode_shape *shape, const struct decode_layer *layer,
                        const struct decode_plan *plan, const float *q, const struct decode_space *space, float *out);

#ifdef __cplusplus
}
#endif
#endif
