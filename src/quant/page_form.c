/*
 * page_form.c - canonical rows <-> the packed form of a page (quant/page_form.h).
 *
 * Both forms hold the same crumbs; only their order differs. Four crumbs c .. c + 3, c a multiple of four, are the same two bits
 * of four consecutive bytes both in a canonical row and in a lane of packed keys, so a row and its lanes of keys are exchanged
 * four crumbs at a time. A vector of values is that of keys transposed: 16 lanes of 16 crumbs each.
 */
#include "quant/page_form.h"

#include <string.h>

#define TILE_TOKENS 16
#define TILES       (PAGE_TOKENS / TILE_TOKENS)

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "byte k of a lane is bits 8k .. 8k + 7 here");

static size_t row_bytes_of(const struct side_form *f) { return (size_t)f->crumbs / 4 + (size_t)2 * (size_t)side_meta_words(f); }

/* A tile's rows and lanes: `words` [blocks][16 tokens] are the crumb bytes of rows, four at a time; lanes as in the packed form.
 * Inner loops run over tokens, so that compilers make vectors of them. */
static void words_to_lanes(int blocks, const uint32_t *restrict words, uint32_t *restrict lanes) {
  int word = 0, shift = 0; /* of four crumbs: their word is the number modulo blocks, their shift the quotient doubled */
  for (int g = 0; g < blocks; g++) {
    uint32_t *out = lanes + (size_t)g * TILE_TOKENS;
    memset(out, 0, TILE_TOKENS * sizeof *out);
    for (int j = 0; j < 4; j++) {
      const uint32_t *in = words + (size_t)word * TILE_TOKENS;
      for (int t = 0; t < TILE_TOKENS; t++) out[t] |= (in[t] >> shift & 0x03030303) << 2 * j;
      if (++word == blocks) word = 0, shift += 2;
    }
  }
}

static void lanes_to_words(int blocks, const uint32_t *restrict lanes, uint32_t *restrict words) {
  int word = 0, shift = 0;
  memset(words, 0, (size_t)blocks * TILE_TOKENS * sizeof *words);
  for (int g = 0; g < blocks; g++) {
    const uint32_t *in = lanes + (size_t)g * TILE_TOKENS;
    for (int j = 0; j < 4; j++) {
      uint32_t *out = words + (size_t)word * TILE_TOKENS;
      for (int t = 0; t < TILE_TOKENS; t++) out[t] |= (in[t] >> 2 * j & 0x03030303) << shift;
      if (++word == blocks) word = 0, shift += 2;
    }
  }
}

void lane_to_row(int blocks, const uint32_t *lane, uint8_t *row) {
  for (int b = 0; b < blocks; b++) {
    uint32_t word = 0;
    for (int j = 0; j < 4; j++) {
      int four = b + j * blocks;
      word |= (lane[four / 4 * TILE_TOKENS] >> four % 4 * 2 & 0x03030303) << 2 * j;
    }
    memcpy(row + (size_t)b * 4, &word, sizeof word);
  }
}

/* Lanes whose numbers differ by `distance` alone exchange the crumbs that `mask` and `mask << shift` choose. */
static void exchange(uint32_t v[16], int distance, int shift, uint32_t mask) {
  for (int lane = 0; lane < 16; lane++) {
    if (lane & distance) continue;
    uint32_t *a = v + lane, *b = v + lane + distance, differ = (*a >> shift ^ *b) & mask;
    *a ^= differ << shift;
    *b ^= differ;
  }
}

/* Keys <-> values: crumb c of lane t becomes crumb t of lane c, one bit of their numbers at a time. Crumb 4 j + k lies in bits
 * 8 k + 2 j, so bits 0 and 1 of its number move it by 8 and 16, bits 2 and 3 by 2 and 4. */
static void transpose_crumbs(uint32_t v[16]) {
  exchange(v, 1, 8, 0x00FF00FF);
  exchange(v, 2, 16, 0x0000FFFF);
  exchange(v, 4, 2, 0x33333333);
  exchange(v, 8, 4, 0x0F0F0F0F);
}

static void transpose_side(const struct side_form *f, uint32_t *codes) {
  for (int v = 0; v < TILES * f->crumbs / 16; v++) transpose_crumbs(codes + (size_t)v * 16);
}

void page_pack(const struct side_form *f, oscar_side side, const uint8_t *canonical, uint8_t *packed) {
  size_t row_bytes = row_bytes_of(f);
  int blocks = f->crumbs / 16, words = side_meta_words(f);
  uint32_t *codes = (uint32_t *)(void *)packed;
  uint8_t *meta = packed + side_code_bytes(f);
  uint32_t words_of_tile[OSCAR_MAX_HEAD_DIM * OSCAR_MAX_CRUMBS_PER_CHANNEL];
  for (int tile = 0; tile < TILES; tile++) {
    const uint8_t *rows = canonical + (size_t)tile * TILE_TOKENS * row_bytes;
    for (int t = 0; t < TILE_TOKENS; t++)
      for (int b = 0; b < blocks; b++) memcpy(&words_of_tile[b * TILE_TOKENS + t], rows + (size_t)t * row_bytes + 4 * b, 4);
    words_to_lanes(blocks, words_of_tile, codes + (size_t)tile * (size_t)blocks * TILE_TOKENS);
  }
  if (side == OSCAR_VALUES) transpose_side(f, codes);
  for (int tile = 0; tile < TILES; tile++)
    for (int v = 0; v < words; v++)
      for (int t = 0; t < TILE_TOKENS; t++, meta += 2)
        memcpy(meta, canonical + (size_t)(tile * TILE_TOKENS + t) * row_bytes + 4 * blocks + 2 * v, 2);
}

void page_unpack(const struct side_form *f, oscar_side side, const uint8_t *packed, uint8_t *canonical) {
  size_t row_bytes = row_bytes_of(f);
  int blocks = f->crumbs / 16, words = side_meta_words(f);
  const uint8_t *meta = packed + side_code_bytes(f);
  uint32_t vectors[OSCAR_MAX_HEAD_DIM * OSCAR_MAX_CRUMBS_PER_CHANNEL]; /* one tile */
  uint32_t words_of_tile[OSCAR_MAX_HEAD_DIM * OSCAR_MAX_CRUMBS_PER_CHANNEL];
  for (int tile = 0; tile < TILES; tile++) {
    memcpy(vectors, packed + (size_t)tile * (size_t)blocks * 64, (size_t)blocks * 64);
    for (int g = 0; g < blocks && side == OSCAR_VALUES; g++) transpose_crumbs(vectors + (size_t)g * 16);
    uint8_t *rows = canonical + (size_t)tile * TILE_TOKENS * row_bytes;
    lanes_to_words(blocks, vectors, words_of_tile);
    for (int t = 0; t < TILE_TOKENS; t++)
      for (int b = 0; b < blocks; b++) memcpy(rows + (size_t)t * row_bytes + 4 * b, &words_of_tile[b * TILE_TOKENS + t], 4);
    for (int v = 0; v < words; v++)
      for (int t = 0; t < TILE_TOKENS; t++, meta += 2) memcpy(rows + (size_t)t * row_bytes + 4 * blocks + 2 * v, meta, 2);
  }
}

int page_encode(const oscar_codec *codec, oscar_side side, int64_t page, const uint16_t *exact,
                const struct encode_scratch *scratch, uint8_t *packed) {
  const struct side_form form = side_form_of(codec);
  const size_t d = (size_t)codec->spec.head_dim;
  if (codec->spec.form == OSCAR_ROW_LOG_GAINS) {
    int done = codec->kernels->encode_page(codec, page, exact, scratch->x, scratch->y, packed);
    if (side == OSCAR_VALUES && done == PAGE_TOKENS) transpose_side(&form, (uint32_t *)(void *)packed);
    return done;
  }
  for (size_t i = 0; i < PAGE_TOKENS * d; i++) scratch->x[i] = bf16_to_f32(exact[i]);
  codec_project(codec, page * PAGE_TOKENS, PAGE_TOKENS, scratch->x, d, scratch->y);
  int done = codec_quantize(codec, PAGE_TOKENS, scratch->y, scratch->rows);
  if (done == PAGE_TOKENS) page_pack(&form, side, scratch->rows, packed);
  return done;
}
