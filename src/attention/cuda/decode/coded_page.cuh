/*
 * attention/cuda/decode/coded_page.cuh - what a warp does with coded pages: gains, scores, the turning mean, sums. Private.
 *
 * Operands are swapped: the long side of a matrix product, 16 rows, are tokens (scores: byte_scores.cuh, of 16 rows of queries
 * wide_scores.cuh) or crumbs (sums: value_sums.cuh), and the 8 columns are rows of queries, so little of it is idle.
 *
 * A lane, 4 g + q, ends up with scores of tokens g and g + 8 of a tile for row q of four, and with sums of the same row, so the
 * running softmax (running_softmax.cuh) needs no exchange but for maxima.
 */
#ifndef OSCAR_ATTENTION_CUDA_DECODE_CODED_PAGE_CUH
#define OSCAR_ATTENTION_CUDA_DECODE_CODED_PAGE_CUH

#include "attention/cuda/decode/byte_scores.cuh"
#include "attention/cuda/decode/shared_layout.cuh"
#include "attention/cuda/decode/traits.cuh"
#include "attention/cuda/decode/turning_mean.cuh"
#include "attention/cuda/decode/value_sums.cuh"
#include "attention/cuda/decode/wide_scores.cuh"

#include <type_traits>

namespace decode {

/* The coded pages of `c`. place: of the item's queries and curves, 0 or 1. */
template <class T>
__device__ inline void read_coded(const arguments &a, const struct decode_tile &tile, const reading &c, asking &asked,
                                  const reading &after, uint8_t *memory, const shared_layout &layout, int place, ring &ring) {
  constexpr int NT = T::NT, BLOCKS = T::VALUE_BLOCKS, COLUMN_TILES = column_tiles_of(NT);
  constexpr bool ANY = T::ANY, WIDE = T::WIDE;
  constexpr int STEPS = ANY ? 0 : T::STEPS;
  /* tiles whose products are begun before gains are made, as registers allow */
  constexpr int EARLY_TILES = T::FORM != FOUR_LOG_GAINS || WIDE ? 0 : NT == 1 ? 2 : 1;
  constexpr bool BEGINS_EARLY = !WIDE && !ANY; /* scores, before the page is there; likewise */
  /* what fp16 lost of turned amplitudes and of curves: a part of the error that heads of more channels bear */
  constexpr bool KEEP_LOST = ANY || T::D <= 64;
  /* so that probabilities times gains of up to 2^1.75 stay fp16 numbers */
  constexpr float SLACK = T::FORM == FOUR_LOG_GAINS ? 2 : 0;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
  uint8_t *own = memory + layout.sums.codes + warp * layout.sums.of_warp;
  const warp_sums to_sums = sums_of_warp<NT>(a.forms.value_crumbs, memory, layout.sums, warp);
  if (!page_is_next(ring, c.item)) {
    store_no_codes<NT>(to_sums, a.forms.value_crumbs, lane);
    return;
  }
  const struct decode_page *pages = a.pages + c.coded_list;
  const page_forms &forms = a.forms;
  const how_it_turns turns = ANY ? (how_it_turns)a.turns : T::TURNS;
  const bool waves = turns == BY_WAVES;
  const int blocks = ANY ? forms.key_crumbs / 16 : T::KEY_BLOCKS, steps = ANY ? a.rope.steps : STEPS;
  const prepared_layout prepared = prepared_of(a, NT);
  const uint8_t *queries = memory + layout.prepared + place * layout.next_prepared;
  const struct row_constants *constants = (const struct row_constants *)(queries + prepared.constants);
  const float2 *amplitudes = (const float2 *)(queries + prepared.amplitudes);
  const uint4 *mixing = (const uint4 *)(queries + prepared.mixing);
  typename std::conditional<WIDE, wide_queries<T::FORM, T::KEY_BLOCKS>, byte_queries<T::FORM, T::KEY_BLOCKS, NT>>::type mapped;
  mapped.load((const uint32_t *)queries, constants, lane);
  const uint32_t sixteen = register_of(0x41800000u);
  float zero[NT];
  coded_maxima<NT> maxima;
  softmax<NT> state;
#pragma unroll
  for (int n = 0; n < NT; n++) {
    const struct row_constants &row = constants[n * 4 + q];
    zero[n] = row.zero;
    maxima.m[n] = 0, maxima.base[n] = row.mean + PROBABILITY_SHIFT, maxima.limit[n] = NONE;
    state.l[n] = 0;
  }
  float acc[COLUMN_TILES][BLOCKS][4] = {}, middle[COLUMN_TILES][4] = {}, zeros[NT] = {};
  const auto scale_acc = [&](const float(&factor)[NT]) {
#pragma unroll
    for (int c = 0; c < COLUMN_TILES; c++)
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const float of_column = factor[row_tile_of<NT>(c, j % 2)];
#pragma unroll
        for (int b = 0; b < BLOCKS; b++) acc[c][b][j] *= of_column;
        middle[c][j] *= of_column;
      }
  };
  int exponent = T::FORM == FOUR_LOG_GAINS || (ANY && forms.value_form == OSCAR_ROW_LOG_GAINS) ? 0 : -126;
  const page_gains gains = page_gains_of(own + layout.gains_of_warp, (const float *)(memory + layout.log_gains));
  const uint8_t *curves = memory + layout.curves + place * layout.next_curves;
  uint32_t *weights = (uint32_t *)own;
  const int64_t oldest = ANY && a.window ? tile.position + tile.first_row / a.group - a.window + 1 : 0; /* that any row sees */

  const column_gains of_columns = column_gains_of<NT>(gains, memory + layout.constant_gains, lane);
  const uint32_t *of_row = (const uint32_t *)(g < GAIN_CLASSES ? (const uint8_t *)gains.values : memory + layout.constant_gains) +
                           q * 4 + g % GAIN_CLASSES;
  int number = waves ? pages[min(g, c.coded - 1)].number : 0;
  lane_amplitudes<STEPS, NT> turning;
  if (turns == BY_PAIRS) turning.load(amplitudes, a.turning_pairs / CURVE_STEP, lane);
  const int content = content_of(c.item, NO_TILE);
  turned_scores<NT> turned; /* of this page, and of the next if `knows_next` */
  bool knows_next = false;
  int i = 0;
  bool had_page;
#pragma unroll 1
  do {
#pragma unroll 1
    do { /* as long as there are coded pages to ask for */
      if (waves && i % WAVE_PAGES == 0) {
        __syncwarp();
        make_weights<STEPS, NT>(a.rope, a.turning_pairs, amplitudes, mixing, number, weights, lane);
        number = pages[min(i + WAVE_PAGES + g, c.coded - 1)].number;
        __syncwarp();
      }
      float s[4][NT][2], largest[NT];
      /* With the mean. */
      const auto begin_scores = [&]() {
#pragma unroll
        for (int t = 0; t < 4; t++)
#pragma unroll
          for (int n = 0; n < NT; n++) s[t][n][0] = s[t][n][1] = maxima.base[n];
        if (turns == BY_PAIRS && NT > 1) {
          wait_for_angles(ring);
          turn_pairs<STEPS, NT, KEEP_LOST>(a, curves, turning, angles_at(a, ring, place_of_angles(ring.coded_before + i)),
                                           maxima.base, lane, turned);
#pragma unroll
          for (int t = 0; t < 4; t++)
#pragma unroll
            for (int n = 0; n < NT; n++)
#pragma unroll
              for (int j = 0; j < 2; j++) s[t][n][j] = turned.of[n][t][j];
        } else if (turns == BY_PAIRS) {
          const auto add_turned = [&](int page) {
#pragma unroll
            for (int t = 0; t < 4; t++)
#pragma unroll
              for (int j = 0; j < 2; j++) s[t][0][j] += turned.of[page][t][j];
          };
          if (!knows_next) {
            const int first = place_of_angles(ring.coded_before + i);
            knows_next = i + 1 < c.coded;
            wait_for_angles(ring);
            const int other = knows_next ? place_of_angles(ring.coded_before + i + 1) : first;
            turn_pairs<STEPS, NT, KEEP_LOST>(a, curves, turning, angles_at(a, ring, g % 2 ? other : first), maxima.base, lane,
                                             turned);
            add_turned(0);
          } else {
            knows_next = false;
            add_turned(1);
          }
        }
      };
      if (BEGINS_EARLY) begin_scores();
      const uint8_t *page = wait_for_slot(a, ring);
      const int value_offset = ANY ? a.value_offset : 256 * T::KEY_BLOCKS + 128;
      const uint16_t *value_meta = (const uint16_t *)(page + value_offset + (ANY ? 16 * forms.value_crumbs : 256 * BLOCKS));
      const int before = exponent;
      const void *key_gains = gains.keys;
      uint32_t factors[2] = {0, 0};
      int sums[EARLY_TILES ? EARLY_TILES : 1][NT][GAIN_CLASSES][4];
      if constexpr (T::FORM == FOUR_LOG_GAINS && WIDE) {
        key_half_gains of_keys;
        of_keys.load(page + 256 * T::KEY_BLOCKS, lane);
        const uint32_t of_values = ((const uint32_t *)value_meta)[lane];
        of_keys.store(gains, memory + layout.log_gains, lane);
        expand_value_log_gains(gains, of_values, lane);
      } else if (T::FORM == FOUR_LOG_GAINS) { /* made while the first products are under way */
        key_log_gains of_keys;
        of_keys.load(page + 256 * T::KEY_BLOCKS, lane);
        const uint32_t of_values = ((const uint32_t *)value_meta)[lane];
        if constexpr (EARLY_TILES > 0)
#pragma unroll
          for (int t = 0; t < EARLY_TILES; t++) sum_keys(blocks, (const uint32_t *)page, t, mapped, lane, sums[t]);
        of_keys.store(gains, sixteen, lane);
        expand_value_log_gains(gains, of_values, lane);
      } else if (T::FORM == ONE_GAIN) {
        key_gains = page + 256 * T::KEY_BLOCKS;
        scale_value_gains<NT>(value_meta, exponent, factors, lane);
      } else {
        expand_key_gains(forms, gains, page, lane);
        expand_value_gains(forms, gains, value_meta, exponent, lane);
      }
      __syncwarp();
      if (T::FORM != FOUR_LOG_GAINS && exponent != before) {
        float factor[NT];
#pragma unroll
        for (int n = 0; n < NT; n++) factor[n] = ldexpf(1, max(before - exponent, -126));
        scale_acc(factor);
      }

      float of_crumbs[WIDE ? 4 : 1][2][4];
      if constexpr (WIDE) sum_wide((const uint32_t *)page, mapped, key_gains, lane, of_crumbs);
      if (!BEGINS_EARLY) begin_scores();
      if (waves)
        score_waves<STEPS, NT>(curves, steps, weights + (i % WAVE_PAGES * NT * 32 + lane) * steps * WEIGHT_WORDS, lane, s);
      if constexpr (WIDE) add_wide(of_crumbs, mapped, key_gains, lane, s);
#pragma unroll
      for (int t = 0; t < 4; t++) {
        if constexpr (!WIDE) {
          if (t >= EARLY_TILES) sum_keys(blocks, (const uint32_t *)page, t, mapped, lane, sums[0]);
          scale_sums(sums[t < EARLY_TILES ? t : 0], t, mapped, key_gains, lane, s[t]);
        }
        if (ANY && forms.key_form == OSCAR_ROW_SCALE_ZERO)
#pragma unroll
          for (int n = 0; n < NT; n++)
#pragma unroll
            for (int j = 0; j < 2; j++) s[t][n][j] -= gains.key_zeros[t * 16 + g + 8 * j] * zero[n];
      }
      if (ANY && a.window) {
        const int64_t first = (int64_t)pages[i].number * 64;
        if (first < oldest + tile.rows)
#pragma unroll
          for (int t = 0; t < 4; t++)
#pragma unroll
            for (int n = 0; n < NT; n++)
#pragma unroll
              for (int j = 0; j < 2; j++) {
                const int64_t seen = tile.position + (tile.first_row + n * 4 + q) / a.group;
                if (first + t * 16 + g + 8 * j <= seen - a.window) s[t][n][j] = NONE;
              }
      }
#pragma unroll
      for (int n = 0; n < NT; n++) {
        largest[n] = fmaxf(s[0][n][0], s[0][n][1]);
#pragma unroll
        for (int t = 1; t < 4; t++) largest[n] = fmaxf(largest[n], fmaxf(s[t][n][0], s[t][n][1]));
      }
      float factor[NT];
      if (raise_coded_maxima<NT>(largest, SLACK, maxima, s, factor)) {
        scale_acc(factor);
#pragma unroll
        for (int n = 0; n < NT; n++) zeros[n] *= factor[n], state.l[n] *= factor[n];
      }
      tile_probabilities<NT> p[4];
#pragma unroll
      for (int t = 0; t < 4; t++) {
        float x[2][NT];
#pragma unroll
        for (int j = 0; j < 2; j++)
#pragma unroll
          for (int n = 0; n < NT; n++) {
            x[j][n] = exp2_fast(s[t][n][j]);
            if (T::FORM != FOUR_LOG_GAINS) state.l[n] += x[j][n];
          }
        if (ANY && forms.value_form == OSCAR_ROW_SCALE_ZERO)
#pragma unroll
          for (int j = 0; j < 2; j++) {
            const int token = t * 16 + g + 8 * j;
            const float sz =
                __half2float(__ushort_as_half(value_meta[token])) * __half2float(__ushort_as_half(value_meta[64 + token]));
#pragma unroll
            for (int n = 0; n < NT; n++) zeros[n] = fmaf(x[j][n], sz, zeros[n]);
          }
#pragma unroll
        for (int k = 0; k < NT; k++)
          p[t].words[k] = transpose_8x8(NT == 1 ? pack_half2(x[0][0], x[1][0])
                                                : pack_half2(x[k % 2][k / 2 * 2], x[k % 2][NT == 1 ? 0 : k / 2 * 2 + 1]));
      }
      sum_values<T::FORM, BLOCKS, T::ANY_VALUES, NT>(forms, (const uint32_t *)(page + value_offset), value_meta, factors,
                                                     of_columns, of_row, p, lane, acc, middle);
      leave_slot(ring);
      i++;
      had_page = ask_for_coded(a, ring, asked, lane);
    } while (had_page && ring.content == content);
    if (!had_page) fill_ring(a, ring, asked, after, lane);
  } while (ring.content == content);
  ring.coded_before += c.coded;
  /* of row n of the lane's, from both columns where there is but one */
  const auto sum_of_tokens = [&](int n) {
    if (T::FORM == FOUR_LOG_GAINS) return middle[n / 2][n % 2] + 16 * middle[n / 2][NT == 1 ? 3 : 2 + n % 2];
    return NT == 1 ? middle[0][0] + middle[0][1] : middle[n / 2][n % 2];
  };
  if (T::FORM == FOUR_LOG_GAINS) { /* sums of probabilities are those of row 4 */
#pragma unroll
    for (int n = 0; n < NT; n++) {
      const float l = __shfl_sync(~0u, sum_of_tokens(n), 16 + q);
      state.l[n] = g == 0 ? l : 0;
    }
  }
#pragma unroll
  for (int n = 0; n < NT; n++) state.m[n] = maxima.limit[n] > NONE ? maxima.m[n] : NONE;
  store_states<NT>(state, to_sums.code_states, lane, PROBABILITY_SHIFT);
  const int stride = codes_width(forms.value_crumbs, NT);
  const float low = ldexpf(1, 24 + exponent), high = ldexpf(1, 22 + exponent), one = ldexpf(1, exponent);
#pragma unroll
  for (int b = 0; b < BLOCKS; b++) {
    if (T::ANY_VALUES && b >= forms.value_crumbs / 16) continue;
#pragma unroll
    for (int n = 0; n < NT; n++) {
      const float(&of)[4] = acc[n / 2][b];
      float *to = to_sums.codes + (4 * n + q) * stride + b * 16 + g;
      to[0] = (NT == 1 ? of[0] + of[1] : of[n % 2]) * low;
      to[8] = (NT == 1 ? of[2] + of[3] : of[2 + n % 2]) * high;
    }
  }
  /* the sum of probabilities times gains of every group: that of any of its classes */
#pragma unroll
  for (int n = 0; n < NT; n++) {
    float *to = to_sums.codes + (n * 4 + q) * stride + forms.value_crumbs;
    if (ANY && forms.value_form == OSCAR_ROW_SCALE_ZERO) {
#pragma unroll
      for (int step = 4; step < 32; step *= 2) zeros[n] += __shfl_xor_sync(~0u, zeros[n], step);
      if (g < GAIN_CLASSES) to[g] = g == 0 ? zeros[n] : 0;
    } else {
      const float x = sum_of_tokens(n) * (T::FORM == FOUR_LOG_GAINS ? 1 : one); /* of class g, where g < 4 */
      float group = 0;
#pragma unroll
      for (int p = 0; p < GAIN_CLASSES; p++) {
        const float of_class = __shfl_sync(~0u, x, 4 * p + q);
        if ((forms.value_groups == GAIN_CLASSES ? p : p * forms.value_groups / GAIN_CLASSES) == g) group = of_class;
      }
      if (g < GAIN_CLASSES) to[g] = group;
    }
  }
}

} // namespace decode

#endif
