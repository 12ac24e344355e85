/*
 * page_form.c - canonical rows <-> the packed form of a page (quant/page_form.h).
 *
 * Both forms hold the same crumbs; only their order differs. Packing goes through a block of 16 tokens x 16 crumbs, one byte
 * each, which is a 64-byte vector of either side: a key vector takes a token's 16 crumbs per lane, a value vector a crumb's 16
 * tokens.
 */
#include "quant/page_form.h"

#define TILE_TOKENS 16
#define TILES       (PAGE_TOKENS / TILE_TOKENS)

typedef uint8_t block[16][16]; /* [token in tile][crumb in group of 16] */

static size_t row_bytes_of(const struct side_form *f) { return (size_t)f->crumbs / 4 + (size_t)2 * (size_t)side_meta_words(f); }

static void read_rows(const uint8_t *rows, size_t row_bytes, int quarter, int first_crumb, block b) {
  for (int c = 0; c < 16; c++) {
    int byte = (first_crumb + c) % quarter, shift = (first_crumb + c) / quarter * 2;
    for (int t = 0; t < 16; t++) b[t][c] = rows[(size_t)t * row_bytes + (size_t)byte] >> shift & 3;
  }
}

/* The crumb bytes of the rows are zero before the first block. */
static void write_rows(uint8_t *rows, size_t row_bytes, int quarter, int first_crumb, block b) {
  for (int c = 0; c < 16; c++) {
    int byte = (first_crumb + c) % quarter, shift = (first_crumb + c) / quarter * 2;
    for (int t = 0; t < 16; t++) {
      uint8_t *to = rows + (size_t)t * row_bytes + byte;
      *to = (uint8_t)(*to | b[t][c] << shift);
    }
  }
}

static uint8_t four(uint8_t a, uint8_t b, uint8_t c, uint8_t d) { return (uint8_t)(a | b << 2 | c << 4 | d << 6); }

static void pack_keys(block b, uint8_t *vector) {
  for (int t = 0; t < 16; t++)
    for (int k = 0; k < 4; k++) vector[4 * t + k] = four(b[t][k], b[t][4 + k], b[t][8 + k], b[t][12 + k]);
}

static void pack_values(block b, uint8_t *vector) {
  for (int c = 0; c < 16; c++)
    for (int k = 0; k < 4; k++) vector[4 * c + k] = four(b[k][c], b[4 + k][c], b[8 + k][c], b[12 + k][c]);
}

static void unpack_keys(const uint8_t *vector, block b) {
  for (int t = 0; t < 16; t++)
    for (int c = 0; c < 16; c++) b[t][c] = vector[4 * t + c % 4] >> c / 4 * 2 & 3;
}

static void unpack_values(const uint8_t *vector, block b) {
  for (int t = 0; t < 16; t++)
    for (int c = 0; c < 16; c++) b[t][c] = vector[4 * c + t % 4] >> t / 4 * 2 & 3;
}

void page_pack(const struct side_form *f, oscar_side side, const uint8_t *canonical, uint8_t *packed) {
  size_t row_bytes = row_bytes_of(f);
  int quarter = f->crumbs / 4, words = side_meta_words(f);
  uint8_t *meta = packed + side_code_bytes(f);
  for (int tile = 0; tile < TILES; tile++) {
    const uint8_t *rows = canonical + (size_t)tile * TILE_TOKENS * row_bytes;
    for (int c = 0; c < f->crumbs; c += 16, packed += 64) {
      block b;
      read_rows(rows, row_bytes, quarter, c, b);
      if (side == OSCAR_KEYS)
        pack_keys(b, packed);
      else
        pack_values(b, packed);
    }
    for (int v = 0; v < words; v++)
      for (int t = 0; t < TILE_TOKENS; t++) {
        const uint8_t *from = rows + (size_t)t * row_bytes + quarter + 2 * v;
        *meta++ = from[0];
        *meta++ = from[1];
      }
  }
}

void page_unpack(const struct side_form *f, oscar_side side, const uint8_t *packed, uint8_t *canonical) {
  size_t row_bytes = row_bytes_of(f);
  int quarter = f->crumbs / 4, words = side_meta_words(f);
  const uint8_t *meta = packed + side_code_bytes(f);
  for (int tile = 0; tile < TILES; tile++) {
    uint8_t *rows = canonical + (size_t)tile * TILE_TOKENS * row_bytes;
    for (int t = 0; t < TILE_TOKENS; t++)
      for (int i = 0; i < quarter; i++) rows[(size_t)t * row_bytes + (size_t)i] = 0;
    for (int c = 0; c < f->crumbs; c += 16, packed += 64) {
      block b;
      if (side == OSCAR_KEYS)
        unpack_keys(packed, b);
      else
        unpack_values(packed, b);
      write_rows(rows, row_bytes, quarter, c, b);
    }
    for (int v = 0; v < words; v++)
      for (int t = 0; t < TILE_TOKENS; t++) {
        uint8_t *to = rows + (size_t)t * row_bytes + quarter + 2 * v;
        to[0] = *meta++;
        to[1] = *meta++;
      }
  }
}
