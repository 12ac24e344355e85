/*
 * attention/cuda/decode/line.h - the line of work of a launch of decode attention (decode.h): how long its tiles are on it, and
 * what of a tile is where. Private; for C and CUDA.
 *
 * The line has tile after tile, and of a tile KV head after KV head: the items. Every block of threads takes an equal stretch of
 * the line, whatever items it touches. A coded page is one unit of work and an exact tile of 16 tokens EXACT_WEIGHT, about what
 * they have in bytes. Tiles are spread over the item evenly, with coded pages between them, so that any stretch has its share of
 * both: exact tiles take longer where a warp has several, since but one of them is on its way at a time.
 *
 * To come to another item costs a block as much as ITEM_WEIGHT units, so items are laid such that stretches end where they do,
 * if that makes no stretch much longer: each item is a whole number of stretches, or each stretch a whole number of items. Then a
 * unit of the line is less than a unit of work. Blocks that are left over share the last item with those that have it.
 * The last blocks of a launch begin late, on multiprocessors that were busy putting parts together, as many as there are items.
 * Where all of those blocks that have something have it of the last item, it is LATE_WORK units of work less than what others
 * have of that. Else every item is followed by ITEM_WEIGHT units that nothing is on, and the whole line by LATE_WEIGHT, since the
 * last block's multiprocessor was the last to be free.
 */
#ifndef OSCAR_ATTENTION_CUDA_DECODE_LINE_H
#define OSCAR_ATTENTION_CUDA_DECODE_LINE_H

#include "attention/cuda/decode.h"

#include <stdbool.h>
#include <stdint.h>

#ifdef __CUDACC__
#define LINE_BOTH_SIDES __host__ __device__
#else
#define LINE_BOTH_SIDES
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define EXACT_WEIGHT  2 /* line_place_of takes it as 2 */
#define ITEM_WEIGHT   24
#define LATE_WEIGHT   8
#define LATE_WORK     12
#define MOST_LONGER   48 /* units of work that a stretch may be longer so as to end where an item does */
#define LEAST_STRETCH 16 /* units of work, where the longest item still has LEAST_PARTS parts: two for each of 8 warps */
#define LEAST_PARTS   8
#define LEAST_SHARE   4  /* units of work of a warp */
#define MOST_PARTS    20 /* of an item that a block puts together in one look */

/* Lays tiles, of which the pages and exact tiles are set and at least one of the latter is there, for so many blocks. false:
 * there is too much for one launch. */
bool line_lay(struct decode_tile *tiles, int count, int kv_heads, int blocks, struct decode_line *line);

/* Exact tiles that begin before a unit of work of the item; the first begins it. */
LINE_BOTH_SIDES static inline int exact_before(const struct decode_tile *tile, int work) {
  return work > 0 ? (int)((uint64_t)(uint32_t)(work - 1) * tile->exact_share >> 32) + 1 : 0;
}
/* How many coded pages and exact tiles of a tile begin before a unit of the line, counted from where the item begins. late_share:
 * of the line. */
struct line_place {
  int coded, exact;
};
LINE_BOTH_SIDES static inline struct line_place line_place_of(const struct decode_tile *tile, uint32_t late_share, int unit) {
  struct line_place place = {tile->coded_pages, tile->exact_tiles};
  if (unit >= tile->reading) return place;
  const int late = unit > tile->late ? unit - tile->late : 0;
  const int work = (int)(((uint64_t)(uint32_t)(unit - late) * tile->work_share + (uint64_t)(uint32_t)late * late_share) >> 31);
  place.exact = exact_before(tile, work);
  place.coded = work - EXACT_WEIGHT * place.exact;
  /* in the middle of a tile */
  if (work > 0 && exact_before(tile, work - 1) < place.exact) place.coded += EXACT_WEIGHT - 1;
  return place;
}

/* Where the i-th of N equal stretches of U units begins, i U / N. */
LINE_BOTH_SIDES static inline int begin_of_block(int block, int units, int blocks) {
  return block * (units / blocks) + block * (units % blocks) / blocks;
}
/* The same of a block of threads on the line, and which block has a unit of it: in the quotient nothing is lost that would make
 * it another whole number. */
LINE_BOTH_SIDES static inline int begin_on_line(const struct decode_line *line, int block) {
  return block * line->stretch + (line->over > 0 ? block * line->over / line->blocks : 0);
}
LINE_BOTH_SIDES static inline int block_on_line(const struct decode_line *line, int unit) {
  if (line->over == 0) return unit / line->stretch;
  return (int)((((double)unit + 1) * line->blocks - 1) / line->length);
}
/* How a block's pages and tiles are shared by its warps where these have at least LEAST_SHARE units of work each and tiles are
 * not most of it: equal numbers of units, and of tiles. What the shares before one have. */
LINE_BOTH_SIDES static inline bool shares_are_equal(int coded, int exact, int shares) {
  const int all = coded + EXACT_WEIGHT * exact;
  return all >= LEAST_SHARE * shares && EXACT_WEIGHT * ((exact + shares - 1) / shares) <= all / shares;
}
LINE_BOTH_SIDES static inline struct line_place before_share(int coded, int exact, int share, int shares) {
  const int tiles = exact - begin_of_block(shares - share, exact, shares);
  const struct line_place before = {begin_of_block(share, coded + EXACT_WEIGHT * exact, shares) - EXACT_WEIGHT * tiles, tiles};
  return before;
}

/* Whether tiles of up to 16 rows are sooner done with than tiles of up to 8, where so many blocks run at a time: pages that are
 * read, of all tiles and KV heads, with each. */
bool line_wide_pays(int64_t pages_of_8, int64_t pages_of_16, int blocks);

#ifdef __cplusplus
}
#endif
#endif
