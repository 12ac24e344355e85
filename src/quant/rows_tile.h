/*
 * rows_tile.h - 16 rows side by side, and their projection. A part of rows_body.h.
 *
 * A tile is [channels][TILE_ROWS]: a row is a lane. What belongs to a channel (its mean, its column of the encode matrix) is then
 * one number for a whole vector, and the rotating mean of neighbouring positions lies in tables in the order of lanes.
 */

/* ---- rows to lanes and back ---- */

/* A square of LANES rows x LANES channels, transposed, less the mean. */
static inline void store_square(vec square[LANES], const float *mean, float *tile) {
  vec_transpose(square);
  for (int i = 0; i < LANES; i++) vec_store(tile + (size_t)i * TILE_ROWS, vec_sub(square[i], vec_set(mean[i])));
}

/* x [n][x_stride], n <= TILE_ROWS -> x - mean. Lanes beyond n repeat the last row. */
static void load_tile(int d, int n, const float *x, size_t x_stride, const float *mean, float *tile) {
  vec square[LANES];
  for (int lane = 0; lane < TILE_ROWS; lane += LANES)
    for (int k = 0; k < d; k += LANES) {
      for (int r = 0; r < LANES; r++) square[r] = vec_load(x + (size_t)smaller(lane + r, n - 1) * x_stride + k);
      store_square(square, mean + k, tile + (size_t)k * TILE_ROWS + lane);
    }
}

/* The same of TILE_ROWS rows in BF16. */
static void load_exact_tile(int d, const uint16_t *exact, const float *mean, float *tile) {
  vec square[LANES];
  for (int lane = 0; lane < TILE_ROWS; lane += LANES)
    for (int k = 0; k < d; k += LANES) {
      for (int r = 0; r < LANES; r++) square[r] = vec_load_bf16(exact + (size_t)(lane + r) * (size_t)d + k);
      store_square(square, mean + k, tile + (size_t)k * TILE_ROWS + lane);
    }
}

/* y [n][channels] -> a tile; lanes beyond n repeat the last row. */
static void gather_tile(int channels, int n, const float *y, float *tile) {
  for (int i = 0; i < channels; i++)
    for (int r = 0; r < TILE_ROWS; r++) tile[i * TILE_ROWS + r] = y[smaller(r, n - 1) * channels + i];
}

/* The first n rows of a tile -> y [n][channels]. */
static void scatter_tile(int channels, int n, const float *tile, float *y) {
  vec square[LANES];
  int whole = n / LANES * LANES, i = 0;
  for (; i + LANES <= channels; i += LANES)
    for (int lane = 0; lane < whole; lane += LANES) {
      for (int k = 0; k < LANES; k++) square[k] = vec_load(tile + (i + k) * TILE_ROWS + lane);
      vec_transpose(square);
      for (int r = 0; r < LANES; r++) vec_store(y + (lane + r) * channels + i, square[r]);
    }
  for (int r = 0; r < n; r++)
    for (int k = r < whole ? i : 0; k < channels; k++) y[r * channels + k] = tile[k * TILE_ROWS + r];
}

/* The first row with a number that is not finite, or TILE_ROWS. Zero times such a number is NaN. */
static int first_bad_row(int channels, const float *tile) {
  float sums[TILE_ROWS];
  int bad = 0;
  for (int lane = 0; lane < TILE_ROWS; lane += LANES) {
    vec sum = vec_set(0);
    for (int i = 0; i < channels; i++) sum = vec_add(sum, vec_mul(vec_load(tile + (size_t)i * TILE_ROWS + lane), vec_set(0)));
    vec_store(sums + lane, sum);
  }
  while (bad < TILE_ROWS && sums[bad] == 0) bad++;
  return bad;
}

/* ---- the product ---- */

#define TILE_VECS (TILE_ROWS / LANES)

/* y [columns][TILE_ROWS] of `columns` columns of the matrix [n][stride], kept in registers while the inputs x [n][TILE_ROWS] go
 * by. */
static inline __attribute__((always_inline)) void multiply_columns(int columns, const float *x, int n, const float *matrix,
                                                                   size_t stride, float *y) {
  vec sums[TILE_COLUMNS][TILE_VECS];
  for (int j = 0; j < columns; j++)
    for (int v = 0; v < TILE_VECS; v++) sums[j][v] = vec_set(0);
  for (int k = 0; k < n; k++, x += TILE_ROWS, matrix += stride) {
    vec in[TILE_VECS];
#pragma GCC unroll 4
    for (int v = 0; v < TILE_VECS; v++) in[v] = vec_load(x + v * LANES);
#pragma GCC unroll 16
    for (int j = 0; j < columns; j++) {
      vec factor = vec_set(matrix[j]);
#pragma GCC unroll 4
      for (int v = 0; v < TILE_VECS; v++) sums[j][v] = vec_add(sums[j][v], vec_mul(in[v], factor));
    }
  }
  for (int j = 0; j < columns; j++)
    for (int v = 0; v < TILE_VECS; v++) vec_store(y + j * TILE_ROWS + v * LANES, sums[j][v]);
}

/* y [columns][TILE_ROWS] = matrix [n][columns] transposed * x [n][TILE_ROWS]. Blocks begin anywhere: the last overlaps the one
 * before it where the columns are no multiple. */
static void multiply_tile(const float *x, int n, const float *matrix, int columns, float *y) {
  size_t stride = (size_t)columns;
  for (int j = 0; j < columns && columns >= TILE_COLUMNS; j += TILE_COLUMNS) {
    int first = smaller(j, columns - TILE_COLUMNS);
    multiply_columns(TILE_COLUMNS, x, n, matrix + first, stride, y + (size_t)first * TILE_ROWS);
  }
  for (int j = 0; j < columns && columns < TILE_COLUMNS; j++)
    multiply_columns(1, x, n, matrix + j, stride, y + (size_t)j * TILE_ROWS);
}

/* ---- projection ---- */

/* What the rotating mean of each pair is at the centre of a page. */
struct turned_mean {
  float first[OSCAR_MAX_HEAD_DIM / 2], second[OSCAR_MAX_HEAD_DIM / 2];
};

static void turn_mean(const oscar_codec *codec, int64_t page, struct turned_mean *turned) {
  const oscar_codec_spec *spec = &codec->spec;
  float cosines[OSCAR_MAX_HEAD_DIM / 2], sines[OSCAR_MAX_HEAD_DIM / 2];
  if (spec->rotating_pairs == 0) return;
  rope_page_angles(spec->rope, spec->rotating_pairs, spec->rotating_pair, page, cosines, sines);
  for (int k = 0; k < spec->rotating_pairs; k++) {
    const float *b = spec->rotating_mean + 2 * k;
    turned->first[k] = b[0] * cosines[k] - b[1] * sines[k];
    turned->second[k] = b[0] * sines[k] + b[1] * cosines[k];
  }
}

/* x [head_dim][TILE_ROWS] less the rotating mean at `place` of the page and those after it. The angle of a row is that of its
 * page plus that of its place in it (quant/rope.h). */
static void subtract_turned(const oscar_codec *codec, const struct turned_mean *turned, int place, float *x) {
  const oscar_codec_spec *spec = &codec->spec;
  float tail[2][TILE_ROWS] = {0}; /* of a table, where the tile goes on beyond the page */
  for (int k = 0; k < spec->rotating_pairs; k++) {
    const float *cosines = rope_cosines(spec->rope, spec->rotating_pair[k]) + place, *sines = cosines + PAGE_TOKENS;
    if (place > PAGE_TOKENS - TILE_ROWS) {
      memcpy(tail[0], cosines, (size_t)(PAGE_TOKENS - place) * sizeof(float));
      memcpy(tail[1], sines, (size_t)(PAGE_TOKENS - place) * sizeof(float));
      cosines = tail[0], sines = tail[1];
    }
    const int *channel = codec->rotating_channel + 2 * k;
    float *one = x + (size_t)channel[0] * TILE_ROWS, *other = x + (size_t)channel[1] * TILE_ROWS;
    vec b1 = vec_set(turned->first[k]), b2 = vec_set(turned->second[k]);
    for (int lane = 0; lane < TILE_ROWS; lane += LANES) {
      vec c = vec_load(cosines + lane), s = vec_load(sines + lane);
      vec_store(one + lane, vec_sub(vec_load(one + lane), vec_sub(vec_mul(b1, c), vec_mul(b2, s))));
      vec_store(other + lane, vec_sub(vec_load(other + lane), vec_add(vec_mul(b1, s), vec_mul(b2, c))));
    }
  }
}

static void project(const oscar_codec *codec, int64_t position, int n, const float *x, size_t x_stride, float *y) {
  const oscar_codec_spec *spec = &codec->spec;
  const int d = spec->head_dim, m = spec->channels;
  float centred[OSCAR_MAX_HEAD_DIM * TILE_ROWS], projected[OSCAR_MAX_HEAD_DIM * TILE_ROWS];
  struct turned_mean turned;
  for (int first = 0, rows; first < n; first += rows, position += rows) {
    int place = (int)(position % PAGE_TOKENS);
    rows = smaller(smaller(TILE_ROWS, n - first), PAGE_TOKENS - place); /* of one page */
    if (first == 0 || place == 0) turn_mean(codec, position / PAGE_TOKENS, &turned);
    load_tile(d, rows, x + (size_t)first * x_stride, x_stride, spec->mean, centred);
    subtract_turned(codec, &turned, place, centred);
    multiply_tile(centred, d, spec->encode, m, projected);
    scatter_tile(m, rows, projected, y + (size_t)first * (size_t)m);
  }
}
