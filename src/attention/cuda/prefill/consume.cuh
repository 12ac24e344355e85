/*
 * attention/cuda/prefill/consume.cuh - what the consumers of kernel.cuh do: queries into the space of codes, scores, running
 * softmax, sums, and sums out of that space. Private.
 */
#ifndef OSCAR_ATTENTION_CUDA_PREFILL_CONSUME_CUH
#define OSCAR_ATTENTION_CUDA_PREFILL_CONSUME_CUH

#include "attention/cuda/prefill/data.cuh"

namespace prefill {

/* Which positions the two rows of a lane see: those up to `seen`, and after seen - window. */
struct sight {
  int64_t seen[2], all_from, all_to; /* every row of the group sees positions all_from .. all_to */
  int window;
};

/* -infinity for the scores of a page, first position `first`, that a row does not see. */
template <bool EXACT> __device__ __forceinline__ void hide(float (&s)[32], const sight &sight, int64_t first, int lane) {
  const int q = lane % 4;
#pragma unroll
  for (int j = 0; j < 8; j++)
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int64_t at = first + (EXACT ? 8 * j + 2 * q + i : 32 * (j % 2) + 8 * q + 2 * (j / 2) + i);
#pragma unroll
      for (int h = 0; h < 2; h++)
        if (at > sight.seen[h] || (sight.window && at <= sight.seen[h] - sight.window)) s[4 * j + 2 * h + i] = NONE;
    }
}

/* Scores, times `unit`, to probabilities, in place. Returns whether maxima rose: earlier sums are to be multiplied with `factor`.
 * Lanes of a row need its maximum only then. */
__device__ __forceinline__ bool make_probabilities(float (&s)[32], float unit, float (&m)[2], float (&l)[2], float (&factor)[2]) {
  float largest[2] = {NONE, NONE};
#pragma unroll
  for (int j = 0; j < 8; j++)
#pragma unroll
    for (int h = 0; h < 2; h++) largest[h] = fmaxf(largest[h], fmaxf(s[4 * j + 2 * h], s[4 * j + 2 * h + 1]));
  const bool rose = __any_sync(~0u, largest[0] * unit > m[0] + LAG || largest[1] * unit > m[1] + LAG);
  if (rose)
#pragma unroll
    for (int h = 0; h < 2; h++) {
#pragma unroll
      for (int step = 1; step < 4; step *= 2) largest[h] = fmaxf(largest[h], __shfl_xor_sync(~0u, largest[h], step));
      const float raised = fmaxf(m[h], largest[h] * unit);
      factor[h] = exp2_fast(m[h] - raised);
      m[h] = raised;
      l[h] *= factor[h];
    }
  const float shift[2] = {SHIFT - m[0], SHIFT - m[1]};
#pragma unroll
  for (int j = 0; j < 8; j++)
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const float x = exp2_fast(fmaf(s[4 * j + 2 * h], unit, shift[h])),
                  y = exp2_fast(fmaf(s[4 * j + 2 * h + 1], unit, shift[h]));
      l[h] += x + y;
      s[4 * j + 2 * h] = x, s[4 * j + 2 * h + 1] = y;
    }
  return rose;
}

__device__ __forceinline__ void pack_probabilities(const float (&s)[32], uint32_t (&p)[4][4]) {
#pragma unroll
  for (int k = 0; k < 4; k++)
#pragma unroll
    for (int i = 0; i < 4; i++) p[k][i] = pack_half2(s[8 * k + 2 * i], s[8 * k + 2 * i + 1]);
}

/* From an operand's descriptor to that of its k-th 16 inputs, where they are columns. */
__device__ constexpr int step_of_columns(int k) { return (k / 4 * COLUMN_BYTES + k % 4 * 32) >> 4; }

/* The first 16-column steps of queries stay in registers, where shared memory need not be read for them again and again. */
constexpr int HELD_STEPS = 8;
template <int STEPS> constexpr int HELD = STEPS == 0 ? 1 : STEPS < HELD_STEPS ? STEPS : HELD_STEPS;

/* What the scores of a page are summed up over. STEPS of 16 inputs, of which those from TURNING on are turning pairs; 0: as many
 * as the numbers say. */
template <int STEPS_, int TURNING_> struct score_steps { static constexpr int STEPS = STEPS_, TURNING = TURNING_; };
struct step_numbers {
  int steps, turning;
};
template <class S>
__device__ __forceinline__ void begin_scores(float (&s)[32], const uint32_t (&held)[HELD<S::STEPS>][4], uint32_t queries,
                                             uint32_t keys, step_numbers numbers) {
  const uint64_t a = operand_descriptor(queries, 16), b = operand_descriptor(keys, 16);
  if (S::STEPS) {
    constexpr int WAVES = (S::TURNING + 3) / 4 * COLUMN_BYTES;
#pragma unroll
    for (int k = 0; k < S::STEPS; k++) {
      const int offset = step_of_columns(k);
      const int waves = (WAVES + (k - S::TURNING) * 2048) >> 4;
      if (k >= S::TURNING && k < HELD<S::STEPS>)
        product_from_registers<true>(s, held[k], b + waves);
      else if (k >= S::TURNING)
        product_64<true>(s, a + offset, b + waves, false);
      else if (k < HELD<S::STEPS>)
        product_64(s, held[k], b + offset, k == 0);
      else
        product_64<false>(s, a + offset, b + offset, false);
    }
  } else {
    for (int k = 0; k < numbers.turning; k++) {
      const int offset = step_of_columns(k);
      product_64<false>(s, a + offset, b + offset, k == 0);
    }
    for (int k = numbers.turning; k < numbers.steps; k++)
      product_64<true>(s, a + step_of_columns(k),
                       b + (((numbers.turning + 3) / 4 * COLUMN_BYTES + (k - numbers.turning) * 2048) >> 4), false);
  }
  products_commit();
}
template <bool EXACT, int N>
__device__ __forceinline__ void begin_sums(float (&o)[N], const uint32_t (&p)[4][4], uint32_t values) {
  const uint64_t b = operand_descriptor(values, EXACT ? COLUMN_BYTES : 16);
#pragma unroll
  for (int k = 0; k < 4; k++) product_from_registers<EXACT>(o, p[k], b + ((EXACT ? 16 * 128 * k : 32 * k) >> 4));
  products_commit();
}

/* Reads `pages` pages of one form, at least one. The scores of a page are under way while the probabilities of the one before are
 * multiplied with its values. */
template <bool EXACT, class S, int N>
__device__ __forceinline__ void consume(ring &keys, ring &values, uint32_t queries, step_numbers numbers,
                                        const struct decode_page *list, int pages, const sight &sight, float unit, float (&o)[N],
                                        float (&m)[2], float (&l)[2]) {
  constexpr int STEPS = S::STEPS;
  const int lane = threadIdx.x % 32;
  float s[32] = {}, factor[2];
  uint32_t p[4][4], held[HELD<STEPS>][4];
  if (STEPS)
#pragma unroll
    for (int k = 0; k < HELD<STEPS>; k++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int row = threadIdx.x % GROUP_THREADS / 32 * 16 + lane / 4 + i % 2 * 8, piece = 2 * k + i / 2;
        held[k][i] = load_4(queries + piece / 8 * COLUMN_BYTES + swizzled(row, piece) + lane % 4 * 4);
      }
  auto hide_some = [&](int page) {
    if (!EXACT && sight.window == 0) return;
    const int64_t first = (int64_t)__ldg(&list[page].number) * PAGE;
    if (first < sight.all_from || first + PAGE - 1 > sight.all_to) hide<EXACT>(s, sight, first, lane);
  };
  keys.wait_full();
  products_begin();
  begin_scores<S>(s, held, queries, keys.at(), numbers);
  products_wait<0>();
  keys.release();
  keys.next();
  hide_some(0);
  if (make_probabilities(s, unit, m, l, factor))
#pragma unroll
    for (int j = 0; j < N; j++) o[j] *= factor[j / 2 % 2];
  pack_probabilities(s, p);
#pragma unroll 1
  for (int page = 1; page < pages; page++) {
    keys.wait_full();
    products_begin();
    begin_scores<S>(s, held, queries, keys.at(), numbers);
    values.wait_full();
    begin_sums<EXACT>(o, p, values.at());
    products_wait<1>();
    keys.release();
    keys.next();
    hide_some(page);
    const bool rose = make_probabilities(s, unit, m, l, factor);
    products_wait<0>();
    values.release();
    values.next();
    if (rose)
#pragma unroll
      for (int j = 0; j < N; j++) o[j] *= factor[j / 2 % 2];
    pack_probabilities(s, p);
  }
  values.wait_full();
  products_begin();
  begin_sums<EXACT>(o, p, values.at());
  products_wait<0>();
  values.release();
  values.next();
}

/* The two rows of a lane, as numbers of rows of the tile; where they are in q and out. */
struct lane_rows {
  int row[2];
  bool there[2];
  size_t offset[2];
};
template <int D>
__device__ inline lane_rows lane_rows_of(const arguments &a, const struct decode_tile &tile, int head, int group) {
  lane_rows r;
#pragma unroll
  for (int h = 0; h < 2; h++) {
    r.row[h] = group * GROUP_ROWS + threadIdx.x % GROUP_THREADS / 32 * 16 + threadIdx.x % 32 / 4 + 8 * h;
    r.there[h] = r.row[h] < tile.rows;
    r.offset[h] = row_offset(tile, r.there[h] ? r.row[h] : 0, a.kv_heads, a.group, head, D);
  }
  return r;
}

/* Numbers of a warp's 16 rows as operand A, and what fp16 lost of them, of STEPS times 16 columns. */
template <int STEPS> struct row_operand { uint32_t value[STEPS][4], rest[STEPS][4]; };

/* Of channels 16 k + 8 (i / 2) + 2 q and the next, row i % 2 of a lane: its queries, scaled. */
__device__ __forceinline__ float2 load_query(const arguments &a, const lane_rows &rows, int k, int i) {
  const int h = i % 2, channel = 16 * k + i / 2 * 8 + threadIdx.x % 4 * 2;
  const float2 x = *(const float2 *)(a.q + rows.offset[h] + channel);
  return rows.there[h] ? make_float2(x.x * a.scale, x.y * a.scale) : make_float2(0, 0);
}

/* Adds the product of `rows`, steps first to first + COUNT - 1 of them, with the next two slots: numbers of an operand, and what
 * fp16 lost of them. BY_ROWS: as in products. */
template <bool BY_ROWS, int COUNT, int STEPS, int N>
__device__ __forceinline__ void multiply_map(float (&sums)[N], const row_operand<STEPS> &rows, int first, ring &slots) {
  const auto step = [&](const uint32_t(&a)[4], uint32_t slot, int k) {
    if constexpr (BY_ROWS)
      product_from_registers<true>(sums, a, operand_descriptor(slot, COLUMN_BYTES) + (16 * 128 * k >> 4));
    else
      product_from_registers<false>(sums, a, operand_descriptor(slot, 16) + step_of_columns(k));
  };
  slots.wait_full();
  products_begin();
#pragma unroll
  for (int k = 0; k < COUNT; k++) step(rows.value[first + k], slots.at(), k);
#pragma unroll
  for (int k = 0; k < COUNT; k++) step(rows.rest[first + k], slots.at(), k);
  products_commit();
  ring lost = slots;
  lost.next();
  lost.wait_full();
#pragma unroll
  for (int k = 0; k < COUNT; k++) step(rows.value[first + k], lost.at(), k);
  products_commit();
  products_wait<1>();
  slots.release();
  products_wait<0>();
  lost.release();
  slots = lost;
  slots.next();
}

/* Queries in the space of codes, as operand A of scores; returns what the mean adds to the scores of a lane's rows. */
template <int D>
__device__ inline void map_queries(const arguments &a, const lane_rows &rows, int head, uint32_t to, ring &slots,
                                   float (&mean)[2]) {
  constexpr int STEPS = D / 16;
  const int lane = threadIdx.x % 32;
  const float *of_mean = a.tables.key_means + head * D + lane % 4 * 2, scale = a.tables.scales[2 * head];
  row_operand<STEPS> queries;
  mean[0] = mean[1] = 0;
#pragma unroll
  for (int k = 0; k < STEPS; k++)
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float2 x = load_query(a, rows, k, i), m = __ldg((const float2 *)(of_mean + 16 * k + i / 2 * 8));
      queries.value[k][i] = pack_half2(x.x, x.y);
      queries.rest[k][i] = rest_half2(x.x, x.y, queries.value[k][i]);
      mean[i % 2] += x.x * m.x + x.y * m.y;
    }
#pragma unroll
  for (int h = 0; h < 2; h++)
#pragma unroll
    for (int step = 1; step < 4; step *= 2) mean[h] += __shfl_xor_sync(~0u, mean[h], step);
#pragma unroll 1
  for (int chunk = 0; chunk < a.map_chunks; chunk++) {
    float x[32] = {};
    multiply_map<false, STEPS>(x, queries, 0, slots);
#pragma unroll
    for (int j = 0; j < 8; j++) {
      const float unit = PAGE * chunk + 8 * j < a.key_crumbs ? scale : scale / a.code_unit;
#pragma unroll
      for (int h = 0; h < 2; h++)
        store_4(to + chunk * COLUMN_BYTES + swizzled(rows.row[h] % GROUP_ROWS, j) + lane % 4 * 4,
                pack_half2(x[4 * j + 2 * h] * unit, x[4 * j + 2 * h + 1] * unit));
    }
  }
}

template <int D> __device__ inline void store_queries(const arguments &a, const lane_rows &rows, uint32_t to) {
#pragma unroll
  for (int k = 0; k < D / 16; k++)
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float2 x = load_query(a, rows, k, i);
      const int piece = 2 * k + i / 2;
      store_4(to + piece / 8 * COLUMN_BYTES + swizzled(rows.row[i % 2] % GROUP_ROWS, piece) + threadIdx.x % 4 * 4,
              pack_half2(x.x, x.y));
    }
}

/* Sums of codes, over l, out of their space: `out` is what a softmax with the same maxima and weight 2^SHIFT would have summed
 * up, so m and l are made those. */
template <int D, int CRUMBS>
__device__ inline void map_sums(const arguments &a, int head, const float (&sums)[CRUMBS / 2], const float (&mean)[2],
                                ring &slots, float (&m)[2], float (&l)[2], float (&out)[D / 2]) {
  constexpr int STEPS = CRUMBS / 16, OF_SLOT = PAGE / 16;
  const int lane = threadIdx.x % 32;
  const float *value_mean = a.tables.value_means + head * D + lane % 4 * 2;
  const float scale = a.tables.scales[2 * head + 1];
  float inverse[2], weight[2];
#pragma unroll
  for (int h = 0; h < 2; h++) {
#pragma unroll
    for (int step = 1; step < 4; step *= 2) l[h] += __shfl_xor_sync(~0u, l[h], step);
    inverse[h] = l[h] > 0 ? a.code_unit / l[h] : 0;
    weight[h] = l[h] > 0 ? exp2_fast(SHIFT) : 0;
    m[h] = l[h] > 0 ? m[h] - SHIFT + __log2f(l[h]) + mean[h] : LEAST;
    l[h] = lane % 4 == 0 ? weight[h] : 0; /* lanes add theirs up in the end */
  }
  row_operand<STEPS> of_codes;
#pragma unroll
  for (int k = 0; k < STEPS; k++)
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float x = sums[8 * k + 2 * i] * inverse[i % 2], y = sums[8 * k + 2 * i + 1] * inverse[i % 2];
      of_codes.value[k][i] = pack_half2(x, y);
      of_codes.rest[k][i] = rest_half2(x, y, of_codes.value[k][i]);
    }
#pragma unroll
  for (int j = 0; j < D / 2; j++) out[j] = 0;
#pragma unroll
  for (int first = 0; first < STEPS; first += OF_SLOT) multiply_map<true, OF_SLOT>(out, of_codes, first, slots);
#pragma unroll
  for (int tile = 0; tile < D / 8; tile++) {
    const float2 plus = __ldg((const float2 *)(value_mean + tile * 8));
#pragma unroll
    for (int h = 0; h < 2; h++) {
      out[4 * tile + 2 * h] = (out[4 * tile + 2 * h] * scale + plus.x) * weight[h];
      out[4 * tile + 2 * h + 1] = (out[4 * tile + 2 * h + 1] * scale + plus.y) * weight[h];
    }
  }
}

__host__ __device__ constexpr int part_floats_of(int head_dim) { return PREFILL_ROWS * (head_dim + 2); }

/* Outputs, or where the tile is cut what its part sums up. */
template <int D>
__device__ inline void store_rows(const arguments &a, const struct prefill_tile &tile, int head, const lane_rows &rows,
                                  const float (&o)[D / 2], const float (&m)[2], float (&l)[2]) {
  float *part = a.parts + (size_t)((tile.first + tile.part) * a.kv_heads + head) * part_floats_of(D);
  const int q = threadIdx.x % 4;
#pragma unroll
  for (int h = 0; h < 2; h++) {
#pragma unroll
    for (int step = 1; step < 4; step *= 2) l[h] += __shfl_xor_sync(~0u, l[h], step);
    if (!rows.there[h]) continue;
    const float factor = tile.parts > 1 ? 1 : 1 / l[h];
    float *to = (tile.parts > 1 ? part + rows.row[h] * D : a.out + rows.offset[h]) + q * 2;
#pragma unroll
    for (int k = 0; k < D / 8; k++)
      *(float2 *)(to + 8 * k) = make_float2(o[4 * k + 2 * h] * factor, o[4 * k + 2 * h + 1] * factor);
    if (tile.parts > 1 && q == 0) ((float2 *)(part + PREFILL_ROWS * D))[rows.row[h]] = make_float2(m[h], l[h]);
  }
}

} // namespace prefill

#endif
