/*
 * attention/cuda/decode/exact_page.cuh - what a warp does with pages of BF16: scores, sums. Private.
 */
#ifndef OSCAR_ATTENTION_CUDA_DECODE_EXACT_PAGE_CUH
#define OSCAR_ATTENTION_CUDA_DECODE_EXACT_PAGE_CUH

#include "attention/cuda/decode/item_sums.cuh"
#include "attention/cuda/decode/page_ring.cuh"

namespace decode {

/* Two numbers in BF16, or what BF16 loses of them. */
__device__ __forceinline__ uint32_t pack_or_rest(float low, float high, bool rest) {
  const uint32_t packed = pack_bf162(low, high);
  return rest ? pack_bf162(low - low_bf16(packed), high - high_bf16(packed)) : packed;
}

/* A word of every 32 bytes of a tile's queries, asked for early by a warp that has exact tiles, so that they are near when
 * read_exact comes to them. */
template <class T> struct near_queries {
  static constexpr int IN_ROW = T::D / 8, WORDS = T::WIDE ? 0 : (4 * T::NT * IN_ROW + 31) / 32; /* no registers are left */
  int words[WORDS ? WORDS : 1];
  __device__ __forceinline__ void load(const arguments &a, const struct decode_tile &tile, const reading &r, int lane) {
#pragma unroll
    for (int i = 0; i < WORDS; i++) {
      const int at = lane + 32 * i, row = at / IN_ROW;
      words[i] = 0;
      if (r.exact > 0 && row < tile.rows)
        words[i] = load_now(a.q + row_offset(tile, row, a.kv_heads, a.group, r.head, T::D) + at % IN_ROW * 8);
    }
  }
  __device__ __forceinline__ void are_kept() const {
#pragma unroll
    for (int i = 0; i < WORDS; i++) keep(words[i]);
  }
};

/* The exact tiles of `r`, 16 tokens each. Scores and sums as for codes, with BF16 operands: a lane's 16 bytes
 * are eight channels of a token, in whatever order of inputs both operands agree on. Queries and probabilities come as two BF16
 * numbers each: in neighbouring columns of four rows, else in two products. */
template <class T>
__device__ inline void read_exact(const arguments &a, const struct decode_tile &tile, const reading &r, asking &asked,
                                  const reading &after, ring &ring, const warp_sums &sums) {
  constexpr int D = T::D, NT = T::NT, STEPS = D / 32, CHUNKS = (D + 63) / 64;
  constexpr int COLUMN_TILES = column_tiles_of(NT), PRODUCTS = NT == 1 ? 1 : 2;
  const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
  if (next_tile(ring, r.item) == NO_TILE) {
    store_no_states<NT>(sums.exact_states, lane);
    return;
  }
  int number = exact_page(a, r, r.exact_from)->number; /* of the next tile's page */
  softmax<NT> state;
  float acc[COLUMN_TILES][CHUNKS * 4][4] = {};
  int64_t seen[NT]; /* the last position that this lane's row sees */
#pragma unroll
  for (int n = 0; n < NT; n++) {
    state.m[n] = NONE, state.l[n] = 0;
    const int row = n * 4 + q;
    seen[n] = row < tile.rows ? tile.position + (tile.first_row + row) / a.group : -1;
  }
  const int64_t last = tile.position + (tile.first_row + tile.rows - 1) / a.group;
  uint32_t operand[COLUMN_TILES][PRODUCTS][STEPS][4];
#pragma unroll
  for (int c = 0; c < COLUMN_TILES; c++) {
    const int row = 8 * c + row_of_column<NT>(g);
    const float *mine = a.q + row_offset(tile, row < tile.rows ? row : 0, a.kv_heads, a.group, r.head, D);
    const float scale = row < tile.rows ? a.scale : 0;
#pragma unroll
    for (int j = 0; j < STEPS; j++)
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        const float4 x = *(const float4 *)(mine + 32 * j + 8 * q + 2 * i);
#pragma unroll
        for (int k = 0; k < PRODUCTS; k++) {
          const bool rest = NT == 1 ? g % 2 : k;
          operand[c][k][j][i] = pack_or_rest(x.x * scale, x.y * scale, rest);
          operand[c][k][j][i + 1] = pack_or_rest(x.z * scale, x.w * scale, rest);
        }
      }
  }
  for (int i; (i = next_tile(ring, r.item)) != NO_TILE;) {
    const int64_t position = (int64_t)number * 64 + i % 4 * 16;
    number = exact_page(a, r, min(i + 1, r.exact_from + r.exact - 1))->number;
    float s[COLUMN_TILES][4] = {};
    const uint16_t *keys = (const uint16_t *)wait_for_slot(a, ring);
#pragma unroll
    for (int j = 0; j < STEPS; j++) {
      const uint4 low = *(const uint4 *)(keys + g * D + 32 * j + 8 * q),
                  high = *(const uint4 *)(keys + (g + 8) * D + 32 * j + 8 * q);
#pragma unroll
      for (int c = 0; c < COLUMN_TILES; c++)
#pragma unroll
        for (int k = 0; k < PRODUCTS; k++) {
          const uint32_t(&of)[4] = operand[c][k][j];
          mma_bf16(s[c], low.x, high.x, low.y, high.y, of[0], of[1]);
          mma_bf16(s[c], low.z, high.z, low.w, high.w, of[2], of[3]);
        }
    }
    leave_slot(ring);
    fill_ring(a, ring, asked, after, lane);
    float score[NT][2], largest[NT], factor[NT];
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
      for (int j = 0; j < 2; j++) {
        const int64_t at = position + g + 8 * j;
        const bool visible = at <= seen[n] && (a.window == 0 || at > seen[n] - a.window);
        score[n][j] = !visible ? NONE : NT == 1 ? s[0][2 * j] + s[0][2 * j + 1] : s[n / 2][2 * j + n % 2];
      }
#pragma unroll
    for (int n = 0; n < NT; n++) largest[n] = fmaxf(score[n][0], score[n][1]);
    if (raise_maxima<NT>(largest, 0, state, factor)) {
#pragma unroll
      for (int c = 0; c < COLUMN_TILES; c++)
#pragma unroll
        for (int b = 0; b < CHUNKS * 4; b++)
#pragma unroll
          for (int j = 0; j < 4; j++) acc[c][b][j] *= factor[row_tile_of<NT>(c, j % 2)];
    }
    float x[NT][2];
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
      for (int j = 0; j < 2; j++) {
        x[n][j] = score[n][j] > NONE ? exp2_fast(score[n][j] - state.m[n]) : 0;
        state.l[n] += x[n][j];
      }
    uint32_t p[COLUMN_TILES][PRODUCTS][2];
#pragma unroll
    for (int c = 0; c < COLUMN_TILES; c++)
#pragma unroll
      for (int j = 0; j < 2; j++) {
        const float even = x[row_tile_of<NT>(c, 0)][j], odd = x[row_tile_of<NT>(c, 1)][j];
        const uint32_t rounded = pack_bf162(even, odd);
        p[c][0][j] = transpose_8x8(NT == 1 ? pack_bf162(even, even - low_bf16(rounded)) : rounded);
        if (NT > 1) p[c][PRODUCTS - 1][j] = transpose_8x8(pack_bf162(even - low_bf16(rounded), odd - high_bf16(rounded)));
      }
    const uint16_t *values = (const uint16_t *)wait_for_slot(a, ring);
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; chunk++) {
      uint4 v[4];
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const int token = 2 * q + j % 2 + j / 2 * 8, channel = 8 * (g + 8 * chunk);
        v[j] = make_uint4(0, 0, 0, 0); /* what lies behind the last position may be anything */
        if (position + token <= last && (D % 64 == 0 || channel < D)) v[j] = *(const uint4 *)(values + token * D + channel);
      }
      const uint32_t *v0 = &v[0].x, *v1 = &v[1].x, *v2 = &v[2].x, *v3 = &v[3].x;
#pragma unroll
      for (int b = 0; b < 4; b++)
#pragma unroll
        for (int c = 0; c < COLUMN_TILES; c++)
#pragma unroll
          for (int k = 0; k < PRODUCTS; k++)
            mma_bf16(acc[c][chunk * 4 + b], __byte_perm(v0[b], v1[b], 0x5410), __byte_perm(v0[b], v1[b], 0x7632),
                     __byte_perm(v2[b], v3[b], 0x5410), __byte_perm(v2[b], v3[b], 0x7632), p[c][k][0], p[c][k][1]);
    }
    leave_slot(ring);
    fill_ring(a, ring, asked, after, lane);
  }
  store_states<NT>(state, sums.exact_states, lane, 0);
#pragma unroll
  for (int n = 0; n < NT; n++)
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; chunk++) {
      const int channel = 8 * (g + 8 * chunk);
      if (D % 64 != 0 && channel >= D) continue;
      float *to = sums.exact + exact_place<D>(n * 4 + q, channel);
#pragma unroll
      for (int b = 0; b < 4; b++) {
        const float(&of)[4] = acc[n / 2][chunk * 4 + b];
        *(float2 *)(to + 2 * b) = NT == 1 ? make_float2(of[0] + of[1], of[2] + of[3]) : make_float2(of[n % 2], of[2 + n % 2]);
      }
    }
}

} // namespace decode

#endif
