/*
 * attention/cuda/decode.cuh - the kernel behind decode_run; decode.cu compiles it for what layers have. Private.
 *
 * A block takes a stretch of the line of work, item after item (an item is a KV head of a tile), and its warps equal parts of
 * that: first coded pages, then tiles of exact pages. Scores, probabilities and sums never leave the registers of a warp. Each
 * warp has a ring of pages that the copy engine fills ahead of it, from one item into the next; warps of a block share what
 * belongs to the query, and put their sums together when the block leaves an item (item_sums.cuh), the only time when they wait
 * for each other.
 */
#ifndef OSCAR_ATTENTION_CUDA_DECODE_CUH
#define OSCAR_ATTENTION_CUDA_DECODE_CUH

#include "attention/cuda/block_work.cuh"
#include "attention/cuda/exact_page.cuh"
#include "attention/cuda/wide_scores.cuh"

#include <type_traits>

namespace decode {

/* Where a multiprocessor has 100 KB of shared memory instead of 160 or more. */
__host__ __device__ constexpr bool has_little_memory(int capability) {
  return capability == 86 || capability == 89 || capability >= 120;
}
/* Warps of a block, of which a multiprocessor has one: as many as registers and shared memory allow. turns, steps: of a mean
 * that turns; any: kernels for any form. */
__host__ __device__ constexpr int warps_of(int value_blocks, int row_tiles, how_it_turns turns, int steps, bool any,
                                           int capability) {
  int warps = value_blocks > 6 ? 8 : 12;
  if (value_blocks > 16)
    warps = 4;
  else if (value_blocks > 8)
    warps = turns != STAYS || any ? 4 : 6;
  else if (any)
    warps = row_tiles == 2 ? 6 : 8;
  else if (row_tiles > 1)
    warps = turns == BY_WAVES && steps > 1 ? 6 : 8;
  return has_little_memory(capability) ? warps * 5 / 8 : warps;
}

/* What is known when a kernel is compiled. */
template <int D_, int KEY_BLOCKS_, int VALUE_BLOCKS_, int NT_, int FORM_, bool ANY_VALUES_, how_it_turns TURNS_, int STEPS_>
struct traits {
  static constexpr int D = D_, KEY_BLOCKS = KEY_BLOCKS_, VALUE_BLOCKS = VALUE_BLOCKS_, NT = NT_;
  static constexpr int FORM = FORM_;
  static constexpr bool ANY = FORM_ == ANY_FORM;  /* and any number of blocks of keys, a window, or waves */
  static constexpr bool ANY_VALUES = ANY_VALUES_; /* any number of blocks of values, up to VALUE_BLOCKS */
  static constexpr how_it_turns TURNS = TURNS_;   /* the mean; ANY: in whatever way */
  static constexpr int STEPS = STEPS_;            /* of its curves; ANY: as many as there are */
  static constexpr bool WIDE = NT_ == 4;          /* 16 rows */
#ifdef __CUDA_ARCH__
  static constexpr int WARPS = warps_of(VALUE_BLOCKS_, NT_, TURNS_, STEPS_, ANY, __CUDA_ARCH__ / 10);
#else
  static constexpr int WARPS = 1; /* the host asks for those of its device */
#endif
  /* of pages, where not ANY */
  static constexpr int GROUPS = FORM == FOUR_LOG_GAINS ? GAIN_CLASSES : 1;
  static constexpr int ROW_FORM = FORM == FOUR_LOG_GAINS ? OSCAR_ROW_LOG_GAINS : OSCAR_ROW_GAIN;
  static constexpr int KEY_BYTES = 256 * KEY_BLOCKS + 128, VALUE_BYTES = 256 * VALUE_BLOCKS + 128;
};

/* Barriers of the block's copies, after those of its rings: queries, and curves, of two items in turn; the map. */
enum block_copy { QUERIES, CURVES = QUERIES + 2, MAP = CURVES + 2, BLOCK_COPIES };
/* Shared memory of a block, in bytes from its start. A warp has sums.of_warp bytes from sums.codes on for weights of curves (of a
 * mean that turns) and the gains of a page, and in their place its sums, when it is done with an item. Queries and curves of the
 * next item are `next_prepared` and `next_curves` bytes on from those of this one; 0: they come when this one is done with. */
struct shared_layout {
  int angles, barriers, works, log_gains, constant_gains, prepared, next_prepared, curves, next_curves, map, gains_of_warp, block,
      bytes;
  sums_layout sums;
};
__host__ __device__ inline prepared_layout prepared_of(const arguments &a, int row_tiles) {
  return prepared_layout_of(a.forms.key_crumbs / 16, a.turning_pairs, a.fast, row_tiles);
}
__host__ __device__ inline int curve_bytes(const arguments &a) {
  return (a.turns == BY_WAVES ? a.rope.steps : a.turns == BY_PAIRS ? a.turning_pairs / CURVE_STEP : 0) * CURVE_STEP_BYTES;
}

__host__ __device__ inline int map_bytes(const arguments &a) { return value_map_words(a.head_dim, a.forms.value_crumbs) * 4; }

__host__ __device__ inline struct shared_layout shared_layout_of(const arguments &a, int warps, int row_tiles) {
  struct shared_layout s;
  int at = warps * STAGES * a.slot_bytes;
  s.angles = at, at += warps * angles_bytes(a);
  s.barriers = at, at += 8 * (warps * STAGES + BLOCK_COPIES);
  s.works = at, at += warps * (int)sizeof(struct warp_work);
  at = (at + 63) / 64 * 64;
  s.log_gains = at, at += row_tiles == 4 ? HALF_GAIN_TABLE_BYTES : 64;
  at = (at + 127) / 128 * 128;
  s.constant_gains = at, at += CONSTANT_GAINS_BYTES;
  const int prepared = a.coded ? (prepared_of(a, row_tiles).bytes + 127) / 128 * 128 : 0;
  s.prepared = at, at += prepared;
  s.next_prepared = a.copies_ahead ? prepared : 0, at += s.next_prepared;
  s.curves = at, at += curve_bytes(a);
  s.next_curves = a.copies_ahead && a.turns == BY_PAIRS ? curve_bytes(a) : 0, at += s.next_curves;
  s.gains_of_warp = a.turns == BY_WAVES ? WAVE_PAGES * row_tiles * a.rope.steps * 32 * WEIGHT_WORDS * 4 : 0;
  const int reading = s.gains_of_warp + (a.coded ? gains_bytes(a.forms) : 0);
  s.sums = sums_layout_of(a.head_dim, a.forms.value_crumbs, row_tiles, at, reading, STAGES * a.slot_bytes);
  const int all = warps * s.sums.of_warp;
  const int merging = merge_place(s.sums, row_tiles) - at + merge_bytes(a.head_dim, row_tiles);
  s.block = at += ((all > merging ? all : merging) + 15) / 16 * 16;
  at += block_sums_of(a.forms.value_crumbs, row_tiles).bytes;
  s.map = at = (at + 127) / 128 * 128;
  s.bytes = at + (a.map_is_here ? map_bytes(a) : 0);
  return s;
}

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

/* ---- items ---- */

__device__ inline const uint32_t *map_of(const arguments &a, int head) {
  return a.value_map + (size_t)head * value_map_words(a.head_dim, a.forms.value_crumbs);
}
/* What becomes of the item. */
__device__ inline item_output output_of(const arguments &a, const item_work &work, const uint8_t *map_here) {
  const int part = work.item.tile * a.kv_heads + work.item.head + blockIdx.x;
  return {work.tile,
          a.kv_heads,
          a.group,
          work.item.head,
          a.out,
          (const uint4 *)(a.map_is_here ? map_here : (const uint8_t *)map_of(a, work.item.head)),
          work.coded ? value_map_steps(a.forms.value_crumbs) : 0,
          work.first < work.last,
          a.parts + part * part_floats(a.head_dim)};
}
/* The item's last block on the line puts its parts together. */
__device__ inline item_parts parts_of(const arguments &a, const item_work &work) {
  const int count = work.first < work.last && work.last == (int)blockIdx.x ? work.last - work.first + 1 : 0;
  const struct decode_tile &tile = work.tile;
  return {tile.rows, tile.token, tile.first_row, work.item.head, work.item.tile * a.kv_heads + work.item.head + work.first,
          count};
}

/* The arguments, with what is known when the kernel is compiled in its place: that takes no registers. Kernels for usual forms
 * whose mean turns are for nothing else. */
template <class T> __device__ __forceinline__ arguments known_arguments(const arguments &given) {
  arguments a = given;
  if constexpr (!T::ANY && T::TURNS != BY_PAIRS) a.angle_bytes = 0;
  if constexpr (!T::ANY && T::TURNS != STAYS) {
    a.coded = true;
    a.turns = T::TURNS;
    a.head_dim = T::D;
    a.window = 0;
    a.forms = {16 * T::KEY_BLOCKS, T::GROUPS, T::ROW_FORM, 16 * T::VALUE_BLOCKS, T::GROUPS, T::ROW_FORM};
    a.value_offset = T::KEY_BYTES;
    a.head_bytes = a.page_bytes = T::KEY_BYTES + T::VALUE_BYTES;
    a.slot_bytes = max(T::KEY_BYTES + T::VALUE_BYTES, EXACT_TOKENS * T::D * 2);
    if (T::TURNS == BY_PAIRS)
      a.rope.pairs = T::D / 2, a.turning_pairs = a.fast = T::STEPS * CURVE_STEP, a.angle_bytes = a.turning_pairs * 8;
    if (T::TURNS == BY_WAVES) a.rope.steps = T::STEPS;
  }
  return a;
}

/* Copies for items of the block, and which turn each barrier is at: a bit of `parities`. */
struct block_copies {
  uint8_t *memory;
  uint64_t *barriers;
  uint32_t parities;
};
__device__ __forceinline__ void wait_for_copy(block_copies &c, int copy) {
  end_block_copy(c.barriers + copy, c.parities >> copy & 1);
  c.parities ^= 1u << copy;
}
template <class T>
__device__ __forceinline__ void begin_queries(const arguments &a, const line_item &item, const shared_layout &layout, int place,
                                              const block_copies &c) {
  const int index = item.tile * a.kv_heads + item.head, bytes = prepared_of(a, T::NT).bytes;
  begin_block_copy(c.memory + layout.prepared + place * layout.next_prepared, a.prepared + (size_t)index * bytes, bytes,
                   c.barriers + QUERIES + place);
}
__device__ __forceinline__ void begin_curves(const arguments &a, int head, const shared_layout &layout, int place,
                                             const block_copies &c) {
  if (a.turns == BY_PAIRS)
    begin_block_copy(c.memory + layout.curves + place * layout.next_curves, a.curves + (size_t)head * curve_bytes(a),
                     curve_bytes(a), c.barriers + CURVES + place);
}
/* Of the first item it comes when its queries have, since sooner it would slow down what the kernel before still does; but not
 * where a stretch of so few units would soon wait for it. */
constexpr int FEW_UNITS = 32;
__device__ __forceinline__ void begin_map(const arguments &a, int head, const shared_layout &layout, const block_copies &c) {
  if (a.map_is_here) begin_block_copy(c.memory + layout.map, map_of(a, head), map_bytes(a), c.barriers + MAP);
}

template <class T> __global__ void __launch_bounds__(T::WARPS * 32, 1) kernel(const __grid_constant__ arguments given) {
  const arguments a = known_arguments<T>(given);
  constexpr int WARPS = T::WARPS, NT = T::NT;
  extern __shared__ __align__(128) uint8_t memory[];
  start_kernel_after();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  /* asked for together, with what of the tile lies elsewhere */
  const int probe = probe_of(a, 0, a.tile_count, lane), early = load_now(&a.tiles[min(lane, a.tile_count - 1)].token);
  const struct decode_line line = *a.line;
  const shared_layout layout = shared_layout_of(a, T::WARPS, NT);
  uint64_t *barriers = (uint64_t *)(memory + layout.barriers);
  ring ring = {memory + warp * STAGES * a.slot_bytes,
               barriers + warp * STAGES,
               memory + layout.angles + warp * angles_bytes(a),
               0,
               0,
               EMPTY,
               EMPTY,
               0,
               0};
  block_copies copies = {memory, barriers + WARPS * STAGES, 0};
  if (lane == 0) /* of the warp that begins copies */
#pragma unroll
    for (int i = 0; i < STAGES; i++) copies_init(ring.barriers + i);
  if (threadIdx.x == 0)
    for (int i = 0; i < BLOCK_COPIES; i++) copies_init(copies.barriers + i);
  copies_visible();
  __syncwarp();
  int unit = begin_on_line(&line, blockIdx.x);
  const int end = min(begin_on_line(&line, blockIdx.x + 1), line.units);
  if (unit >= end) return; /* before a copy begins that nobody would wait for */
  line_item item = item_of(a, unit, probe, lane);
  keep(early);
  const struct decode_tile tile = tile_of(a, line, item);
  if (unit - item.begin >= tile.reading) { /* all of the item is others' */
    item = item_after(a, item, tile.units);
    unit = item.begin;
    if (unit >= end) return;
  }
  warp_work *works = (warp_work *)(memory + layout.works) + warp;
  find_work<WARPS>(a, line, item, unit, end, 0, warp, works);
  asking asked = {};
  ask_for(a, ring, asked, works->readings[0], lane);
  /* The kernel before may write exact pages and queries, but nothing that is asked for here. More than a page each would come at
   * the cost of what that kernel still reads. */
  ask_for_coded(a, ring, asked, lane);
  if (a.turns == BY_WAVES) begin_block_copy(memory + layout.curves, a.rope.curve_words, curve_bytes(a), copies.barriers + CURVES);
  const bool few_pages = works->items[0].stop - unit < FEW_UNITS;
  if (works->items[0].coded) {
    begin_curves(a, item.head, layout, 0, copies);
    if (few_pages) begin_map(a, item.head, layout, copies);
  }
  find_blocks(line, works->items[0]);
  store_constant_gains(memory + layout.constant_gains);
  if (T::WIDE)
    make_half_gains((uint32_t *)(memory + layout.log_gains));
  else if (threadIdx.x < 16)
    ((float *)(memory + layout.log_gains))[threadIdx.x] = exp2f(((int)threadIdx.x - 8) * 0.25f);
  __syncthreads(); /* barriers of the block are there */
  /* A second page is asked for when the first is there; but the warp that asks for queries does not wait for that. */
  if (!PAGES_IN_GROUPS && warp > 0 && asked.next > 0) {
    wait_for_slot(a, ring);
    ask_for_coded(a, ring, asked, lane);
  }
  wait_for_kernel_before(); /* also for the end of its use of work space */
  if (works->items[0].coded) begin_queries<T>(a, item, layout, 0, copies);
  if (a.turns == BY_WAVES) wait_for_copy(copies, CURVES);
  for (int number = 0;; number++) {
    const item_work &work = works->items[number % 2];
    const reading &mine = works->readings[number % 2];
    const int place = a.copies_ahead ? number % 2 : 0;
    fill_ring(a, ring, asked, mine, lane);
    near_queries<T> near;
    near.load(a, work.tile, mine, lane);
    const bool more = work.stop < end;
    if (more) {
      const struct decode_line line = *a.line; /* again: to keep it takes registers */
      const line_item next = item_after(a, work.item, work.tile.units);
      find_work<WARPS>(a, line, next, next.begin, end, number + 1, warp, works);
      find_blocks(line, works->items[(number + 1) % 2]);
      const item_work &after = works->items[(number + 1) % 2];
      if (a.copies_ahead && after.coded) {
        begin_queries<T>(a, next, layout, place ^ 1, copies);
        begin_curves(a, next.head, layout, place ^ 1, copies);
      }
    }
    /* the ring of 16 rows has their sums between items */
    const reading &after = works->readings[(more && !T::WIDE ? number + 1 : number) % 2];
    const warp_sums sums = sums_of_warp<NT>(a.forms.value_crumbs, memory, layout.sums, warp);
    if (work.coded) {
      wait_for_copy(copies, QUERIES + place);
      if (a.turns == BY_PAIRS) wait_for_copy(copies, CURVES + place);
      if (number == 0 && !few_pages) begin_map(a, work.item.head, layout, copies);
      read_coded<T>(a, work.tile, mine, asked, after, memory, layout, place, ring);
    } else {
      store_no_states<NT>(sums.code_states, lane);
    }
    near.are_kept();
    read_exact<T>(a, work.tile, mine, asked, after, ring, sums);
    if (work.coded && a.map_is_here) wait_for_copy(copies, MAP);
    finish_item<T>(output_of(a, work, memory + layout.map), a.forms, memory, layout.sums, memory + layout.block);
    if (number == 0) works->parts = parts_of(a, work); /* what begins in a block and is others' too ends in another */
    if (!more) break;
    hand_to_copies(); /* what comes is copied over what has been read here */
    __syncthreads();
    const item_work &coming = works->items[(number + 1) % 2];
    if (!coming.coded) continue;
    begin_map(a, coming.item.head, layout, copies);
    if (a.copies_ahead) continue;
    begin_queries<T>(a, coming.item, layout, 0, copies);
    begin_curves(a, coming.item.head, layout, 0, copies);
  }
  /* Parts of the first item are put together when nothing else is left to be read. Those before this block's are of blocks that
   * began before it. */
  __syncwarp();
  if (works->parts.count > 0) merge_parts<T::D, WARPS>(a, works->parts, memory + merge_place(layout.sums, NT));
}

} // namespace decode

#endif
