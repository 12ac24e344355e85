/*
 * rows_gains.h - the gains and codes of a tile of 16 rows, form LOG_GAINS. A part of rows_body.h.
 *
 * Rows are the lanes of vectors: each has gains of its own, sums need no additions across lanes, and every number of a row is the
 * same whatever the vector width. In units of gain times step, a magnitude a = |y| / (s step) is coded with the error
 *     d = a - min(floor(a), L/2 - 1) - 1/2        L = 4^n levels, of which L/2 lie on each side
 * and the squared error of a group is s^2 times the sum of (step d)^2.
 *
 * Most of the sixteen gains need not be tried. Of the errors s step d, those of two kinds only grow as the gain moves away:
 *     s smaller   |y| beyond the outermost level:   |y| - s step (L - 1)/2
 *     s larger    |y| before the innermost level:   s step / 2 - |y|
 * so once their squares alone are more than the least error found, no gain further that way does better. The search tries four
 * gains around the root mean square, then goes on each way until that bound ends it: it finds what trying all sixteen would. The
 * bounds are taken 1/64 lower than they come out, far more than sums of 1024 floats lose (1024 * 2^-24), so rounding cannot end
 * it early, and what is found depends neither on where the search began nor on the other rows of a vector.
 */

#define NEAR_GAINS 4
/* A magnitude beyond the outermost level of any gain whose square still sums within float. */
#define MOST_MAGNITUDE 0x1p40f

/* One group of a vector of rows. */
struct gain_search {
  int n;
  const float *magnitudes; /* [n][TILE_ROWS] |t_i|, t_i = y_i / step_i, from this vector's first lane on */
  const float *weights, *outer_levels;
  vec least, best; /* the least squared error so far, and its gain's number */
};

/* |t_i| of the group's channels, t_i in place of y_i, and a gain's number (not whole) to begin with: that of the root mean
 * square, through a logarithm that is 0.09 off at most. */
static inline vec begin_search(const oscar_codec *codec, int first, int last, float *y, float *magnitudes) {
  vec squares = vec_set(0);
  float coded = 0;
  for (int i = first; i < last; i++) {
    vec t = vec_mul(vec_load(y + (size_t)i * TILE_ROWS), vec_set(codec->inverse_steps[i]));
    vec magnitude = vec_min(vec_abs(t), vec_set(MOST_MAGNITUDE)), unit = vec_mul(magnitude, vec_set(codec->unit_steps[i]));
    vec_store(y + (size_t)i * TILE_ROWS, t);
    vec_store(magnitudes + (size_t)i * TILE_ROWS, magnitude);
    squares = vec_add(squares, vec_mul(unit, unit));
    coded += codec->unit_steps[i] > 0;
  }
  vec bits = vec_of_bits(vec_mul(squares, vec_set(1 / coded))); /* log2 of a float is nearly its bits / 2^23 - 127 */
  return vec_sub(vec_mul(bits, vec_set(0x1p-22f)), vec_set(2 * 127 - LOG_GAIN_BIAS));
}

/* Squared errors with `count` gains: those numbered first, first + 1, ... in each lane. */
static inline __attribute__((always_inline)) void gain_errors(const struct gain_search *g, vec first, int count, vec *errors) {
  const vec half = vec_set(0.5f);
  vec inverse[NEAR_GAINS];
#pragma GCC unroll 4
  for (int j = 0; j < count; j++) {
    inverse[j] = vec_look_up(inverse_log_gain_table, vec_add(first, vec_set((float)j)));
    errors[j] = vec_set(0);
  }
  for (int i = 0; i < g->n; i++) {
    vec magnitude = vec_load(g->magnitudes + (size_t)i * TILE_ROWS);
    vec weight = vec_set(g->weights[i]), outer = vec_set(g->outer_levels[i]);
#pragma GCC unroll 4
    for (int j = 0; j < count; j++) {
      vec a = vec_mul(magnitude, inverse[j]);
      vec e = vec_mul(vec_sub(vec_sub(a, vec_floor(vec_min(a, outer))), half), weight);
      errors[j] = vec_add(errors[j], vec_mul(e, e));
    }
  }
#pragma GCC unroll 4
  for (int j = 0; j < count; j++) {
    vec s = vec_look_up(log_gain_table, vec_add(first, vec_set((float)j)));
    errors[j] = vec_mul(errors[j], vec_mul(s, s));
  }
}

/* What the squared errors of the gain `low` and all below it exceed. */
static inline vec bound_below(const struct gain_search *g, vec low) {
  const vec zero = vec_set(0), inverse = vec_look_up(inverse_log_gain_table, low), s = vec_look_up(log_gain_table, low);
  vec sum = zero;
  for (int i = 0; i < g->n; i++) {
    vec outermost = vec_set(g->outer_levels[i] + 0.5f);
    vec beyond = vec_max(vec_sub(vec_mul(vec_load(g->magnitudes + (size_t)i * TILE_ROWS), inverse), outermost), zero);
    vec e = vec_mul(beyond, vec_set(g->weights[i]));
    sum = vec_add(sum, vec_mul(e, e));
  }
  return vec_mul(vec_mul(sum, vec_mul(s, s)), vec_set(1 - 1.0f / 64));
}

/* What the squared errors of the gain `high` and all above it exceed. */
static inline vec bound_above(const struct gain_search *g, vec high) {
  const vec zero = vec_set(0), inverse = vec_look_up(inverse_log_gain_table, high), s = vec_look_up(log_gain_table, high);
  vec sum = zero;
  for (int i = 0; i < g->n; i++) {
    vec before = vec_max(vec_sub(vec_set(0.5f), vec_mul(vec_load(g->magnitudes + (size_t)i * TILE_ROWS), inverse)), zero);
    vec e = vec_mul(before, vec_set(g->weights[i]));
    sum = vec_add(sum, vec_mul(e, e));
  }
  return vec_mul(vec_mul(sum, vec_mul(s, s)), vec_set(1 - 1.0f / 64));
}

/* Goes on from the gains next below and next above those tried, until no lane can gain. A lane that comes to an end of the table
 * stays there: trying that gain again changes nothing. */
static inline void widen_search(struct gain_search *g, vec low, vec high) {
  const vec zero = vec_set(0), one = vec_set(1), last = vec_set(15), never = vec_set(INFINITY);
  vec error;
  for (;; low = vec_sub(low, one)) {
    vec lowest = vec_max(low, zero);
    if (!vec_any_not_above(vec_if_below(low, zero, never, bound_below(g, lowest)), g->least)) break;
    gain_errors(g, lowest, 1, &error);
    g->best = vec_if_below(g->least, error, g->best, lowest); /* the smaller gain on ties */
    g->least = vec_min(g->least, error);
  }
  for (;; high = vec_add(high, one)) {
    vec highest = vec_min(high, last);
    if (!vec_any_not_above(vec_if_below(last, high, never, bound_above(g, highest)), g->least)) break;
    gain_errors(g, highest, 1, &error);
    g->best = vec_if_below(error, g->least, highest, g->best);
    g->least = vec_min(g->least, error);
  }
}

/* The numbers of the best gains of a group. */
static inline vec find_gains(const oscar_codec *codec, int first, int last, float *y, float *magnitudes) {
  /* From two below the start: the bound above is the weaker one, but rows with a few large numbers want less than their RMS. */
  vec begin = vec_sub(begin_search(codec, first, last, y, magnitudes), vec_set(1.5f)), errors[NEAR_GAINS];
  vec low = vec_floor(vec_min(vec_max(begin, vec_set(0)), vec_set(16 - NEAR_GAINS)));
  struct gain_search g = {last - first,           magnitudes + (size_t)first * TILE_ROWS,
                          codec->weights + first, codec->outer_levels + first,
                          vec_set(INFINITY),      low};
  gain_errors(&g, low, NEAR_GAINS, errors);
  for (int j = 0; j < NEAR_GAINS; j++) {
    g.best = vec_if_below(errors[j], g.least, vec_add(low, vec_set((float)j)), g.best);
    g.least = vec_min(errors[j], g.least);
  }
  widen_search(&g, vec_sub(low, vec_set(1)), vec_add(low, vec_set(NEAR_GAINS)));
  return g.best;
}

/* t [channels] of a group -> crumbs, from crumb c on, as words of 16 in the order of packed keys (quant/page_form.h). */
static inline void write_codes(const oscar_codec *codec, int first, int last, int c, const float *t, vec gain, uint32_t *words) {
  const vec inverse = vec_look_up(inverse_log_gain_table, gain), zero = vec_set(0), one = vec_set(1);
  ivec word = ivec_set(0);
  for (int i = first; i < last; i++) {
    vec half_levels = vec_add(vec_set(codec->outer_levels[i]), one), top = vec_sub(vec_add(half_levels, half_levels), one);
    vec u = vec_add(vec_mul(vec_load(t + (size_t)i * TILE_ROWS), inverse), half_levels);
    ivec code = ivec_truncate(vec_min(vec_max(u, zero), top)); /* once u is not below 0, truncation is floor */
    for (int j = 0; j < codec->spec.crumbs[i]; j++, c++) {
      ivec crumb = ivec_and(ivec_shift_right(code, 2 * j), ivec_set(3));
      word = ivec_or(word, ivec_shift_left(crumb, c % 4 * 8 + c / 4 % 4 * 2));
      if (c % 16 < 15) continue;
      ivec_store(words + (size_t)(c / 16) * TILE_ROWS, word);
      word = ivec_set(0);
    }
  }
}

/* The first n rows of y [channels][TILE_ROWS], finite, -> words [C/16][TILE_ROWS] and gains [TILE_ROWS], the words of metadata. y
 * and magnitudes (of the same shape) are clobbered. */
static void quantize_tile(const oscar_codec *codec, int n, float *y, float *magnitudes, uint32_t *words, uint32_t *gains) {
  for (int lane = 0; lane < n; lane += LANES) {
    ivec meta = ivec_set(0);
    for (int p = 0; p < codec->spec.groups; p++) {
      int first = codec->group_channel[p], last = codec->group_channel[p + 1];
      vec gain = find_gains(codec, first, last, y + lane, magnitudes + lane);
      write_codes(codec, first, last, group_begin(codec->crumbs, codec->spec.groups, p), y + lane, gain, words + lane);
      meta = ivec_or(meta, ivec_shift_left(ivec_truncate(gain), 4 * p));
    }
    ivec_store(gains + lane, meta);
  }
}
