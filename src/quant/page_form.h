/*
 * quant/page_form.h - the CPU form of a coded page (64 tokens of one KV head, one side). Private; canonical rows are exchanged.
 *
 * Tokens go in tiles of 16. A tile of keys wants 16 tokens beside each other (a dot product per token), a tile of values 16
 * crumbs beside each other (a sum per crumb); both are 64-byte vectors of 16 lanes x 4 bytes whose bytes unpack with shifts and
 * masks into the operand of a byte dot product or, shifted by 8k + 2j, into 16 integers. keys    [tile 0..3][C/16][lane = token
 * in tile][4 bytes]: byte k of a lane, bits 2j, is crumb 16 g + 4 j + k of that token values  [tile 0..3][C/16][lane = crumb in
 * group g][4 bytes]: byte k, bits 2j, is that crumb of token 4 j + k of the tile metadata, after the codes of the side: [tile
 * 0..3][word of a row, in canonical order][16 tokens]. Bytes of a side: 64 (C/4) + 64 * 2 * words: the same as 64 canonical rows.
 */
#ifndef OSCAR_PAGE_FORM_H
#define OSCAR_PAGE_FORM_H

#include "quant/codec.h"

struct side_form { /* what a kernel needs to know of a side; the same for all heads of a layer */
  int crumbs;      /* C */
  int groups;
  int meta_values;    /* per group: 1: s, 2: s and z, fp16; 0: one word for all groups, their log gains (oscar/codec.h) */
  int rotating_pairs; /* of the mean; keys only */
};

static inline struct side_form side_form_of(const oscar_codec *codec) {
  return (struct side_form){codec->crumbs, codec->spec.groups, codec_meta_values(codec), codec->spec.rotating_pairs};
}
/* 16-bit words of metadata in a row. */
static inline int side_meta_words(const struct side_form *f) { return meta_words(f->groups, f->meta_values); }
static inline size_t side_code_bytes(const struct side_form *f) { return (size_t)PAGE_TOKENS * (size_t)f->crumbs / 4; }
static inline size_t side_meta_bytes(const struct side_form *f) { return (size_t)PAGE_TOKENS * 2 * (size_t)side_meta_words(f); }
static inline size_t side_bytes(const struct side_form *f) { return side_code_bytes(f) + side_meta_bytes(f); }

/* canonical: [64][row_bytes]; packed: side_bytes(f) bytes, 64-byte aligned. */
void page_pack(const struct side_form *f, oscar_side side, const uint8_t *canonical, uint8_t *packed);
void page_unpack(const struct side_form *f, oscar_side side, const uint8_t *packed, uint8_t *canonical);

/* A lane of packed keys, a dword in each of `blocks` vectors, 16 dwords apart -> the crumb bytes of its row, `blocks` dwords. */
void lane_to_row(int blocks, const uint32_t *lane, uint8_t *row);

/* Encodes a page: exact [64][head_dim] BF16, its first row at position 64 `page` -> packed. The same as oscar_codec_encode and
 * page_pack. Returns the first row that cannot be encoded, or 64. Fit for parallel regions. */
struct encode_scratch {
  float *x, *y;  /* [64][head_dim], [64][channels] */
  uint8_t *rows; /* [64][row_bytes] */
};
int page_encode(const oscar_codec *codec, oscar_side side, int64_t page, const uint16_t *exact,
                const struct encode_scratch *scratch, uint8_t *packed);

#endif
