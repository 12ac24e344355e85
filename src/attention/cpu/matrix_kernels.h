/*
 * matrix_kernels.h - attention of many rows on a page as products of BF16 matrices, for CPUs that multiply them in hardware.
 *
 * All products are sums over blocks of 32 of a left matrix, rows of BF16 (queries or probabilities), and a right one, cut into
 * tiles of 32 x 16 with pairs of rows interleaved: element (k, n) of a tile is number k / 2 * 32 + 2 n + k % 2 of its 512.
 *   - An exact page is laid out anew: keys by transposing pairs of channels, values by interleaving tokens.
 *   - Codes need no arithmetic: a crumb, counted from the middle where z is not stored (-1.5 .. 1.5), is one of four BF16
 * numbers. Gains are not part of a product: scores are made per group and then multiplied, probabilities are multiplied before.
 * The rotating mean stays with the vector kernels: as two products it took 1.6 times as long with head dimension 64 and as long
 * with 128 (Sapphire Rapids, AMX).
 * Queries are sums of two BF16 numbers, high and low, which keeps 16 bits of them. Probabilities are one BF16 number: what their
 * rounding adds is far below what codes, or BF16 values, already cost.
 *
 * The including file defines
 *   product(row_blocks, col_blocks, chunks, terms, n, a_stride, b_stride, c, c_stride, add)
 *       c [16 row_blocks][16 col_blocks] (+)= sum over n terms and `chunks` blocks of 32; row_blocks and col_blocks are 1 or 2
 *       and known when it is compiled. Strides in elements: of rows of a and c, of blocks of 32 in b.
 */
#ifndef OSCAR_ATTENTION_MATRIX_KERNELS_H
#define OSCAR_ATTENTION_MATRIX_KERNELS_H

#include "attention/cpu/avx512_vectors.h"

#include "attention/cpu/vector_kernels.h"

#define TILE         512 /* elements of a tile on the right */
#define GROUP_BATCH  4   /* groups whose scores are kept at a time */
#define TOKEN_BLOCKS (PAGE_TOKENS / 16)

struct term {
  const uint16_t *a, *b;
};

INLINE void product(int row_blocks, int col_blocks, int chunks, const struct term *terms, int n, int a_stride, int b_stride,
                    float *c, int c_stride, bool add);

/* product of any number of blocks of rows and columns */
static inline void multiply(int row_blocks, int col_blocks, int chunks, const struct term *terms, int n, int a_stride,
                            int b_stride, float *c, int c_stride, bool add) {
  for (int r = 0; r < row_blocks; r += 2)
    for (int j = 0; j < col_blocks; j += 2) {
      struct term at[3];
      for (int i = 0; i < n; i++) at[i] = (struct term){terms[i].a + r * 16 * a_stride, terms[i].b + j * TILE};
      float *to = c + r * 16 * c_stride + j * 16;
      bool two_rows = r + 1 < row_blocks, two_cols = j + 1 < col_blocks;
      if (two_rows && two_cols)
        product(2, 2, chunks, at, n, a_stride, b_stride, to, c_stride, add);
      else if (two_rows)
        product(2, 1, chunks, at, n, a_stride, b_stride, to, c_stride, add);
      else if (two_cols)
        product(1, 2, chunks, at, n, a_stride, b_stride, to, c_stride, add);
      else
        product(1, 1, chunks, at, n, a_stride, b_stride, to, c_stride, add);
    }
}

static inline int blocks_of_16(int n) { return (n + 15) / 16; }
static inline int blocks_of_32(int n) { return (n + 31) / 32; }

/* ---- where things are: a prepared row, in elements, and the panel, in bytes ---- */

struct prepared_row {
  int q, crumbs; /* of the high parts; the low ones follow after the sizes below */
  int q_size, crumbs_size;
};

static inline struct prepared_row prepared_row(int head_dim, const struct side_form *keys) {
  struct prepared_row p = {.q_size = blocks_of_32(head_dim) * 32};
  p.crumbs = 2 * p.q_size;
  /* The last block of a group may reach 16 elements into what follows it, where tiles are zero. */
  p.crumbs_size = keys ? blocks_of_32(keys->crumbs + 16) * 32 : 0;
  return p;
}

static inline size_t matrix_prepared_bytes(int head_dim, const struct side_form *keys) {
  struct prepared_row p = prepared_row(head_dim, keys);
  return sizeof(uint16_t) * (size_t)(p.crumbs + 2 * p.crumbs_size);
}

/* Blocks of 32 that the groups of a side take, each group starting a new one. */
static inline int group_chunks(const struct side_form *f) {
  int chunks = 0;
  for (int g = 0; g < f->groups; g++) chunks += blocks_of_32(form_group_begin(f, g + 1) - form_group_begin(f, g));
  return chunks;
}

struct panel {
  uint16_t *tiles;   /* of a page's keys or values */
  float *sums;       /* [GROUP_BATCH][32][32] */
  float *gains;      /* [groups][64] */
  uint16_t *weights; /* [64][64] probabilities */
};

static inline size_t divide_panel(int head_dim, const struct side_form *keys, const struct side_form *values, uint8_t *memory,
                                  struct panel *panel) {
  size_t tiles = (size_t)blocks_of_32(head_dim) * TOKEN_BLOCKS, groups = 1;
  size_t value_tiles = (size_t)blocks_of_16(head_dim) * 2;
  if (keys) {
    size_t coded = (size_t)group_chunks(keys) * TOKEN_BLOCKS;
    if (coded > tiles) tiles = coded;
    groups = (size_t)keys->groups;
  }
  if (values && (size_t)(2 * values->crumbs / 16) > value_tiles) value_tiles = (size_t)(2 * values->crumbs / 16);
  if (value_tiles > tiles) tiles = value_tiles;
  if (values && (size_t)values->groups > groups) groups = (size_t)values->groups;
  size_t sums = sizeof(float) * GROUP_BATCH * 32 * 32, weights = sizeof(uint16_t) * MAX_ROWS * PAGE_TOKENS;
  size_t tile_bytes = sizeof(uint16_t) * TILE * tiles, gain_bytes = sizeof(float) * PAGE_TOKENS * groups;
  if (panel) {
    panel->tiles = (uint16_t *)(void *)memory;
    panel->sums = (float *)(void *)(memory + tile_bytes);
    panel->gains = (float *)(void *)(memory + tile_bytes + sums);
    panel->weights = (uint16_t *)(void *)(memory + tile_bytes + sums + gain_bytes);
  }
  return tile_bytes + sums + gain_bytes + weights;
}

/* The kernels here take turns with vector kernels in the same panel. */
static inline size_t matrix_panel_bytes(int head_dim, const struct side_form *keys, const struct side_form *values) {
  size_t vectors = panel_bytes(head_dim, keys, values), tiles = divide_panel(head_dim, keys, values, NULL, NULL);
  return vectors > tiles ? vectors : tiles;
}

static inline struct panel panel_at(int head_dim, const struct side_form *keys, const struct side_form *values, float *memory) {
  struct panel panel;
  divide_panel(head_dim, keys, values, (uint8_t *)memory, &panel);
  return panel;
}

/* ---- numbers as two BF16 ---- */

INLINE __m256i to_bf16(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }
INLINE __m512 from_bf16(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }

INLINE void split_bf16(__m512 x, uint16_t *high, uint16_t *low) {
  __m256i h = to_bf16(x);
  _mm256_storeu_si256((__m256i *)(void *)high, h);
  _mm256_storeu_si256((__m256i *)(void *)low, to_bf16(_mm512_sub_ps(x, from_bf16(h))));
}

static inline void split_row(int n, const float *x, uint16_t *high, int low) {
  for (int i = 0; i < n; i += 16) split_bf16(_mm512_loadu_ps(x + i), high + i, high + low + i);
}

static inline void matrix_prepare_queries(const struct query_rows *queries, const struct side_form *keys, uint8_t *prepared) {
  struct prepared_row at = prepared_row(queries->head_dim, keys);
  int rows = queries->rows, d = queries->head_dim;
  memset(prepared, 0, round_up((size_t)rows, 16) * queries->prepared_stride);
  for (int r = 0; r < rows; r++, prepared += queries->prepared_stride) {
    uint16_t *row = (uint16_t *)(void *)prepared;
    split_row(d, queries->q + r * d, row + at.q, at.q_size);
    if (!queries->mapped) continue;
    split_row(keys->crumbs, queries->mapped + r * form_rows(keys), row + at.crumbs, at.crumbs_size);
  }
}

/* ---- exact pages ---- */

static inline void matrix_score_exact(const struct query_rows *queries, const uint16_t *keys, float *scores, float *panel) {
  int d = queries->head_dim, chunks = blocks_of_32(d), stride = (int)(queries->prepared_stride / sizeof(uint16_t));
  struct prepared_row at = prepared_row(d, NULL);
  uint16_t *tiles = (uint16_t *)(void *)panel;
  for (int i = 0; i < chunks; i++) {
    __mmask16 pairs = (__mmask16)(d - 32 * i >= 32 ? 0xFFFF : 0xFF);
    for (int block = 0; block < TOKEN_BLOCKS; block++) {
      __m512i x[16];
      for (int t = 0; t < 16; t++) x[t] = _mm512_maskz_loadu_epi32(pairs, keys + (block * 16 + t) * d + 32 * i);
      transpose(x);
      for (int pair = 0; pair < 16; pair++) _mm512_store_si512(tiles + (i * TOKEN_BLOCKS + block) * TILE + 32 * pair, x[pair]);
    }
  }
  const uint16_t *q = (const uint16_t *)(const void *)queries->prepared + at.q;
  const struct term terms[] = {{q, tiles}, {q + at.q_size, tiles}};
  multiply(blocks_of_16(queries->rows), TOKEN_BLOCKS, chunks, terms, 2, stride, TOKEN_BLOCKS * TILE, scores, PAGE_TOKENS, false);
}

/* Probabilities, times gains if given, as BF16; rows up to the next multiple of 16 are zero. Returns their number of blocks. */
static inline int round_weights(int rows, const float *p, const float *gains, uint16_t *weights) {
  __m512 gain[TOKEN_BLOCKS];
  for (int v = 0; v < TOKEN_BLOCKS; v++) gain[v] = gains ? _mm512_loadu_ps(gains + 16 * v) : _mm512_set1_ps(1);
  for (int r = 0; r < rows; r++)
    for (int v = 0; v < TOKEN_BLOCKS; v += 2) {
      __m512 x = _mm512_mul_ps(_mm512_loadu_ps(p + r * PAGE_TOKENS + 16 * v), gain[v]);
      __m512 y = _mm512_mul_ps(_mm512_loadu_ps(p + r * PAGE_TOKENS + 16 * v + 16), gain[v + 1]);
      _mm512_store_si512(weights + r * PAGE_TOKENS + 16 * v, (__m512i)_mm512_cvtne2ps_pbh(y, x));
    }
  int blocks = blocks_of_16(rows);
  memset(weights + rows * PAGE_TOKENS, 0, sizeof *weights * (size_t)((blocks * 16 - rows) * PAGE_TOKENS));
  return blocks;
}

/* Tokens 2 i and 2 i + 1 of 32 channels, interleaved: what goes into row i % 16 of two tiles beside each other. */
static inline void matrix_accumulate_exact(int rows, int head_dim, int tokens, const float *p, const uint16_t *values, float *out,
                                           int stride, float *panel) {
  struct panel at = panel_at(head_dim, NULL, NULL, panel);
  const __m512i order = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5, 36, 4,
                                         35, 3, 34, 2, 33, 1, 32, 0);
  int blocks = head_dim / 16;
  for (int j = 0; j < blocks; j += 2) {
    __mmask32 channels = j + 1 < blocks ? 0xFFFFFFFFu : 0xFFFFu;
    for (int i = 0; i < PAGE_TOKENS / 2; i++) {
      const uint16_t *from = values + 2 * i * head_dim + 16 * j;
      __m512i x = _mm512_maskz_loadu_epi16(2 * i < tokens ? channels : 0, from);
      __m512i y = _mm512_maskz_loadu_epi16(2 * i + 1 < tokens ? channels : 0, from + head_dim);
      uint16_t *to = at.tiles + (i / 16 * blocks + j) * TILE + i % 16 * 32;
      _mm512_store_si512(to, _mm512_permutex2var_epi16(x, order, y));
      if (j + 1 < blocks)
        _mm512_store_si512(to + TILE, _mm512_permutex2var_epi16(x, _mm512_add_epi16(order, _mm512_set1_epi16(16)), y));
    }
  }
  const struct term term = {at.weights, at.tiles};
  int row_blocks = round_weights(rows, p, NULL, at.weights);
  multiply(row_blocks, blocks, 2, &term, 1, PAGE_TOKENS, blocks * TILE, out, stride, true);
}

/* ---- coded pages ---- */

/* 64 bytes of codes, as page_form.h has them -> 8 rows of a tile: row i holds crumbs 2 i and 2 i + 1 of what a lane holds 16 of,
 * which are at bits 2 j of bytes k and k + 1, j = i / 2, k = 2 (i % 2). */
INLINE void unpack_bf16(bool centred, const uint8_t *codes, uint16_t *tile) {
  const uint64_t low = centred ? 0xC00000C0 : 0x40008000, high = centred ? 0x3F3FBFBF : 0x40403F00;
  const __m512i table = _mm512_set4_epi32(0, 0, (int)(uint32_t)high, (int)(uint32_t)low);
  const __m512i packed = _mm512_loadu_si512(codes);
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++) {
    uint64_t bit = (uint64_t)(2 * (i / 2) + 16 * (i % 2)), pair = bit | bit << 8 | (bit + 8) << 16 | (bit + 8) << 24;
    uint64_t select = pair | (pair + 0x20202020) << 32; /* each crumb twice, of two lanes */
    __m512i x = _mm512_multishift_epi64_epi8(_mm512_set1_epi64((long long)select), packed);
    x = _mm512_ternarylogic_epi32(x, _mm512_set1_epi8(3), _mm512_set1_epi16(0x0400), 0xEA); /* (x & 3) | 4 at odd bytes */
    _mm512_store_si512(tile + 32 * i, _mm512_shuffle_epi8(table, x));
  }
}

static inline void load_gains(const struct side_form *f, const uint8_t *side, float *gains) {
  const __m512 log_gains = _mm512_loadu_ps(log_gain_table);
  for (int g = 0; g < f->groups; g++)
    for (int block = 0; block < TOKEN_BLOCKS; block++) {
      __m256i words = _mm256_loadu_si256((const __m256i *)(const void *)tile_meta(f, side, block, f->meta_values ? g : 0, 0));
      __m512i wide = _mm512_srli_epi32(_mm512_cvtepu16_epi32(words), (unsigned)(4 * g));
      _mm512_storeu_ps(gains + g * PAGE_TOKENS + block * 16,
                       f->meta_values ? _mm512_cvtph_ps(words) : _mm512_permutexvar_ps(wide, log_gains));
    }
}

INLINE __m512 load_zeros(const struct side_form *f, const uint8_t *side, int group, int block) {
  return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(const void *)tile_meta(f, side, block, group, 1)));
}

/* scores of 32 rows and tokens += the sums of `groups` groups from `first` on, times their gains */
static inline void add_groups(const struct query_rows *queries, const struct side_form *f, const uint8_t *keys, int row,
                              int block, int first, int groups, const struct panel *panel, float *scores) {
  int width = form_rows(f);
  for (int half = 0; half < 2; half++, block++) {
    __m512 gain[GROUP_BATCH], zero[GROUP_BATCH];
    for (int g = 0; g < groups; g++) {
      gain[g] = _mm512_loadu_ps(panel->gains + (first + g) * PAGE_TOKENS + block * 16);
      zero[g] = f->meta_values == 2 ? load_zeros(f, keys, first + g, block) : _mm512_setzero_ps();
    }
    for (int r = 0; r < 32 && row + r < queries->rows; r++) {
      const float *mapped = queries->mapped + (row + r) * width;
      float *to = scores + (row + r) * PAGE_TOKENS + block * 16;
      __m512 score = first ? _mm512_loadu_ps(to) : _mm512_set1_ps(mapped[f->crumbs + f->groups]);
      for (int g = 0; g < groups; g++) {
        __m512 sum = _mm512_loadu_ps(panel->sums + (g * 32 + r) * 32 + half * 16);
        if (f->meta_values == 2) sum = _mm512_fnmadd_ps(zero[g], _mm512_set1_ps(mapped[f->crumbs + first + g]), sum);
        score = _mm512_fmadd_ps(gain[g], sum, score);
      }
      _mm512_storeu_ps(to, score);
    }
  }
}

static inline void matrix_score_coded(const struct query_rows *queries, const struct side_form *f, const uint8_t *keys,
                                      float *scores, float *memory) {
  struct panel panel = panel_at(queries->head_dim, f, NULL, memory);
  struct prepared_row at = prepared_row(queries->head_dim, f);
  int blocks = f->crumbs / 16, stride = (int)(queries->prepared_stride / sizeof(uint16_t));
  uint16_t *tile = panel.tiles;
  for (int g = 0; g < f->groups; g++)
    for (int b = form_group_begin(f, g) / 16, end = form_group_begin(f, g + 1) / 16; b < end; b += 2)
      for (int t = 0; t < TOKEN_BLOCKS; t++, tile += TILE) {
        const uint8_t *codes = keys + (t * blocks + b) * 64;
        if (f->meta_values == 2) {
          unpack_bf16(false, codes, tile);
          if (b + 1 < end) unpack_bf16(false, codes + 64, tile + TILE / 2);
        } else {
          unpack_bf16(true, codes, tile);
          if (b + 1 < end) unpack_bf16(true, codes + 64, tile + TILE / 2);
        }
        if (b + 1 == end) memset(tile + TILE / 2, 0, sizeof *tile * TILE / 2);
      }
  load_gains(f, keys, panel.gains);

  int row_blocks = blocks_of_16(queries->rows);
  for (int r = 0; r < row_blocks; r += 2)
    for (int t = 0; t < TOKEN_BLOCKS; t += 2) {
      const uint16_t *q = (const uint16_t *)(const void *)queries->prepared + r * 16 * stride + at.crumbs;
      const uint16_t *tiles = panel.tiles + t * TILE;
      for (int first = 0, groups; first < f->groups; first += groups) {
        groups = f->groups - first < GROUP_BATCH ? f->groups - first : GROUP_BATCH;
        for (int g = 0; g < groups; g++) {
          int begin = form_group_begin(f, first + g), chunks = blocks_of_32(form_group_begin(f, first + g + 1) - begin);
          const struct term terms[] = {{q + begin, tiles}, {q + begin + at.crumbs_size, tiles}};
          multiply(row_blocks - r < 2 ? 1 : 2, 2, chunks, terms, 2, stride, TOKEN_BLOCKS * TILE, panel.sums + g * 32 * 32, 32,
                   false);
          tiles += chunks * TOKEN_BLOCKS * TILE;
        }
        add_groups(queries, f, keys, r * 16, t, first, groups, &panel, scores);
      }
    }
}

static inline void matrix_accumulate_coded(int rows, const struct side_form *f, const float *p, const uint8_t *values, float *out,
                                           int stride, float *memory) {
  struct panel panel = panel_at(16, NULL, f, memory);
  int blocks = f->crumbs / 16;
  for (int t = 0; t < TOKEN_BLOCKS; t++)
    for (int b = 0; b < blocks; b++) {
      const uint8_t *codes = values + (t * blocks + b) * 64;
      uint16_t *tile = panel.tiles + (t / 2 * blocks + b) * TILE + t % 2 * (TILE / 2);
      if (f->meta_values == 2)
        unpack_bf16(false, codes, tile);
      else
        unpack_bf16(true, codes, tile);
    }
  load_gains(f, values, panel.gains);
  for (int g = 0; g < f->groups; g++) {
    int begin = form_group_begin(f, g), end = form_group_begin(f, g + 1);
    int row_blocks = round_weights(rows, p, panel.gains + g * PAGE_TOKENS, panel.weights);
    const struct term term = {panel.weights, panel.tiles + begin / 16 * TILE};
    multiply(row_blocks, (end - begin) / 16, 2, &term, 1, PAGE_TOKENS, blocks * TILE, out + begin, stride, true);
    for (int r = 0; f->meta_values == 2 && r < rows; r++) {
      __m512 z = _mm512_setzero_ps();
      for (int block = 0; block < TOKEN_BLOCKS; block++) {
        const uint16_t *w = panel.weights + r * PAGE_TOKENS + block * 16;
        z = _mm512_fmadd_ps(from_bf16(_mm256_loadu_si256((const __m256i *)(const void *)w)), load_zeros(f, values, g, block), z);
      }
      out[r * stride + f->crumbs + g] -= _mm512_reduce_add_ps(z);
    }
  }
  for (int r = 0; r < rows; r++) {
    const float *x = p + r * PAGE_TOKENS;
    __m512 sum = _mm512_add_ps(_mm512_add_ps(_mm512_loadu_ps(x), _mm512_loadu_ps(x + 16)),
                               _mm512_add_ps(_mm512_loadu_ps(x + 32), _mm512_loadu_ps(x + 48)));
    out[r * stride + f->crumbs + f->groups] += _mm512_reduce_add_ps(sum);
  }
}

/* Their table; `before` and `after` are what a thread calls around them, or NULL. */
#define MATRIX_KERNELS(label, before, after)                                                                                     \
  {                                                                                                                              \
    .name = (label), .row_block = 16, .begin = (before), .end = (after), .panel_bytes = matrix_panel_bytes,                      \
    .prepared_bytes = matrix_prepared_bytes, .prepare_queries = matrix_prepare_queries, .score_exact = matrix_score_exact,       \
    .score_coded = matrix_score_coded, .score_waves = score_waves, .accumulate_exact = matrix_accumulate_exact,                  \
    .accumulate_coded = matrix_accumulate_coded                                                                                  \
  }

#endif
