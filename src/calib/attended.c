/*
 * attended.c - one dense pass of attention over the text, weighing every key by the harm that an error in it does.
 *
 * The keys and values of the current sequence are kept; every chunk of queries (or a sample of them) is multiplied with all keys
 * before it, softmax is taken, and with the output that the model computed the weight of each (query, key) pair follows from two
 * matrix products (calib.h has the formula). A query's weights are summed into M at once, a key's into `weights`, which are
 * multiplied with the keys when their sequence ends. Memory is that of one sequence.
 *
 * Work is parallel over query heads, then over KV heads; every sum belongs to one iteration and is taken in a fixed order, so the
 * result does not depend on the number of threads.
 */
#include "calib/attended.h"

#include "base/team.h"

#include <cblas.h>
#include <math.h>
#include <omp.h>
#include <string.h>

enum {
  QUERY_ROWS = 64, /* queries looked at together: their scores are one row each */
  KEY_ROWS = 256,  /* keys multiplied with them at a time */
  FIRST_CAPACITY = 1024
};

void oscar_attended_options_default(oscar_attended_options *options) {
  *options = (oscar_attended_options){.sink_pages = 1, .recent_pages = 4, .query_stride = 4};
}

/* ---- memory ---- */

static void free_layer(oscar_context *context, struct attended_layer *l) {
  oscar_rope_release(l->rope);
  void *const owned[] = {l->gram, l->sums, l->heads, l->keys, l->values, l->norms, l->weights, l->value_weights, l->counted};
  for (size_t i = 0; i < ARRAY_LENGTH(owned); i++) mem_free(context, owned[i]);
}

void attended_free(oscar_calib *calib) {
  struct attended *a = calib->attended;
  if (!a) return;
  for (int layer = 0; a->layers && layer < calib->geometry.layers; layer++) free_layer(calib->context, &a->layers[layer]);
  for (int i = 0; i < a->count; i++) mem_free(calib->context, a->tables[i].rows);
  mem_free(calib->context, a->tables);
  mem_free(calib->context, a->layers);
  mem_free(calib->context, a->scratch);
  mem_free(calib->context, a);
  calib->attended = NULL;
}

static double *take(double **block, size_t count) {
  double *part = *block;
  *block += count;
  return part;
}

/* The sums of a layer, once its rope is known. */
static oscar_status make_sums(oscar_calib *calib, struct attended_layer *l) {
  const oscar_calib_geometry *g = &calib->geometry;
  size_t d = (size_t)g->head_dim, r = (size_t)l->rotary_dim, heads = (size_t)g->kv_heads;
  size_t per_head = 3 * d * d + d * r + 3 * d + r;
  l->heads = mem_zalloc(calib->context, heads, sizeof *l->heads);
  l->sums = l->heads ? mem_zalloc(calib->context, r * r + r + heads * per_head, sizeof(double)) : NULL;
  if (!l->sums) return OSCAR_NO_MEMORY;
  double *block = l->sums;
  l->wave_moment = take(&block, r * r);
  l->wave_sum = take(&block, r);
  for (size_t h = 0; h < heads; h++) {
    struct attended_head *head = &l->heads[h];
    head->key_moment = take(&block, d * d);
    head->value_moment = take(&block, d * d);
    head->metric = take(&block, d * d);
    head->key_wave = take(&block, d * r);
    head->key_sum = take(&block, d);
    head->value_sum = take(&block, d);
    head->attended_key = take(&block, d);
    head->attended_wave = take(&block, r);
  }
  return OSCAR_OK;
}

static void *grown(oscar_context *context, void *old, size_t rows, int64_t from, int64_t to, size_t size) {
  uint8_t *block = mem_alloc(context, rows * (size_t)to, size);
  for (size_t i = 0; block && i < rows; i++)
    if (from) memcpy(block + i * (size_t)to * size, (uint8_t *)old + i * (size_t)from * size, (size_t)from * size);
  return block;
}

/* Room for `tokens` of the sequence; on failure everything is as it was. */
static oscar_status reserve(oscar_calib *calib, struct attended_layer *l, int64_t tokens) {
  const oscar_calib_geometry *g = &calib->geometry;
  oscar_context *context = calib->context;
  if (tokens <= l->capacity) return OSCAR_OK;
  int64_t to = l->capacity ? l->capacity : FIRST_CAPACITY;
  while (to < tokens) to *= 2;
  size_t kv = (size_t)g->kv_heads, row = (size_t)g->head_dim * sizeof(uint16_t);
  const struct {
    void **array;
    size_t rows, size;
  } arrays[] = {{(void **)&l->keys, kv, row},
                {(void **)&l->values, kv, row},
                {(void **)&l->norms, (size_t)g->query_heads, sizeof(float)},
                {(void **)&l->weights, kv, sizeof(double)},
                {(void **)&l->value_weights, kv, sizeof(double)},
                {(void **)&l->counted, kv, sizeof(double)}};
  void *made[ARRAY_LENGTH(arrays)] = {NULL};
  bool complete = true;
  for (size_t i = 0; complete && i < ARRAY_LENGTH(arrays); i++)
    complete = (made[i] = grown(context, *arrays[i].array, arrays[i].rows, l->capacity, to, arrays[i].size)) != NULL;
  for (size_t i = 0; i < ARRAY_LENGTH(arrays); i++) {
    mem_free(context, complete ? *arrays[i].array : made[i]);
    if (complete) *arrays[i].array = made[i];
  }
  if (complete) l->capacity = to;
  return complete ? OSCAR_OK : OSCAR_NO_MEMORY;
}

oscar_status oscar_calib_attend(oscar_calib *calib, const oscar_attended_options *options) {
  oscar_context *context = calib->context;
  const oscar_calib_geometry *g = &calib->geometry;
  if (calib->attended || calib->tokens[0] > 0)
    return set_error(context, OSCAR_INVALID_ARGUMENT, "calibration: attend must be called once, before the first tokens");
  if (options->sink_pages < 0 || options->recent_pages < 0 || options->query_stride < 1 || !(options->scale >= 0) ||
      !isfinite(options->scale))
    return set_error(
        context, OSCAR_INVALID_ARGUMENT,
        "calibration: sink_pages %d, recent_pages %d, query_stride %d, scale %g; expected 0 or more, and a stride of "
        "1 or more",
        options->sink_pages, options->recent_pages, options->query_stride, (double)options->scale);
  struct attended *a = mem_zalloc(context, 1, sizeof *a);
  if (!a) return OSCAR_NO_MEMORY;
  calib->attended = a;
  a->options = *options;
  if (a->options.scale == 0) a->options.scale = 1 / sqrtf((float)g->head_dim);
  a->layers = mem_zalloc(context, (size_t)g->layers, sizeof *a->layers);
  a->tables = a->layers ? mem_zalloc(context, (size_t)g->layers, sizeof *a->tables) : NULL;
  oscar_status status = a->tables ? OSCAR_OK : OSCAR_NO_MEMORY;
  if (status != OSCAR_OK) attended_free(calib);
  return status;
}

static struct wave_table *find_waves(struct attended *a, const oscar_rope *rope) {
  for (int i = 0; i < a->count; i++)
    if (rope_equal(a->tables[i].rope, rope)) return &a->tables[i];
  a->tables[a->count].rope = rope; /* lives as long as the layer that brought it: as long as the calibration */
  return &a->tables[a->count++];
}

static oscar_status reserve_waves(oscar_context *context, struct wave_table *table, int64_t length) {
  if (!table || length <= table->length) return OSCAR_OK;
  size_t r = (size_t)table->rope->spec.rotary_dim;
  int64_t to = table->length ? table->length : FIRST_CAPACITY;
  while (to < length) to *= 2;
  double *rows = mem_alloc(context, (size_t)to * r, sizeof *rows);
  if (!rows) return OSCAR_NO_MEMORY;
#pragma omp parallel for schedule(static) num_threads(oscar_context_threads(context))
  for (int64_t t = 0; t < to; t++)
    for (size_t i = 0; i < r / 2; i++) {
      double angle = (double)table->rope->spec.frequencies[i] * (double)t;
      rows[(size_t)t * r + i] = cos(angle);
      rows[(size_t)t * r + r / 2 + i] = sin(angle);
    }
  mem_free(context, table->rows);
  table->rows = rows;
  table->length = to;
  return OSCAR_OK;
}

oscar_status oscar_calib_describe_layer(oscar_calib *calib, int layer, oscar_rope *rope, int window, const float *output_gram) {
  oscar_context *context = calib->context;
  const oscar_calib_geometry *g = &calib->geometry;
  size_t d = (size_t)g->head_dim, size = (size_t)g->query_heads * d * d;
  if (!calib->attended) return set_error(context, OSCAR_INVALID_ARGUMENT, "calibration: describe_layer comes after attend");
  if (layer < 0 || layer >= g->layers || window < 0 || calib->attended->layers[layer].sums)
    return set_error(context, OSCAR_INVALID_ARGUMENT,
                     "calibration: layer %d, window %d: expected layer 0 to %d, described once, and a window of 0 or more", layer,
                     window, g->layers - 1);
  if (rope && rope->spec.rotary_dim > g->head_dim)
    return set_error(context, OSCAR_INVALID_ARGUMENT, "calibration: a rope over %d channels of a head of %d",
                     rope->spec.rotary_dim, g->head_dim);
  for (size_t i = 0; output_gram && i < size; i++)
    if (!isfinite(output_gram[i]))
      return set_error(context, OSCAR_NUMERIC, "calibration: output_gram of layer %d, head %zu is not finite", layer,
                       i / (d * d));
  struct attended_layer *l = &calib->attended->layers[layer];
  l->gram = mem_alloc(context, size, sizeof *l->gram);
  if (!l->gram) return OSCAR_NO_MEMORY;
  for (size_t i = 0; i < size; i++) l->gram[i] = output_gram ? output_gram[i] : i / d % d == i % d ? 1.0f : 0.0f;
  l->rope = oscar_rope_retain(rope);
  l->waves = rope ? find_waves(calib->attended, rope) : NULL;
  l->rotary_dim = rope ? rope->spec.rotary_dim : 0;
  l->window = window;
  oscar_status status = make_sums(calib, l);
  if (status != OSCAR_OK) {
    free_layer(context, l);
    *l = (struct attended_layer){0};
  }
  return status;
}

/* ---- plain sums ---- */

/* Scratch of one thread while it weighs; merging and plain sums take it as doubles [KEY_ROWS][d]. */
struct weighing {
  float *queries, *outputs, *projected; /* [QUERY_ROWS][d] */
  float *rows;                          /* [KEY_ROWS][d] keys or values */
  float *tile;                          /* [QUERY_ROWS][KEY_ROWS] */
  float *scores;                        /* [QUERY_ROWS][stride] */
};

static size_t weighing_floats(size_t d, size_t stride) {
  return 3 * QUERY_ROWS * d + KEY_ROWS * d + QUERY_ROWS * KEY_ROWS + QUERY_ROWS * stride;
}
static size_t plain_floats(size_t d) { return 2 * KEY_ROWS * d; }

static oscar_status reserve_scratch(oscar_calib *calib, int64_t tokens) {
  struct attended *a = calib->attended;
  size_t d = (size_t)calib->geometry.head_dim, wanted = weighing_floats(d, (size_t)tokens);
  if (wanted < plain_floats(d)) wanted = plain_floats(d);
  if (wanted <= a->scratch_floats) return OSCAR_OK;
  float *scratch = mem_alloc(calib->context, wanted * (size_t)oscar_context_threads(calib->context), sizeof *scratch);
  if (!scratch) return OSCAR_NO_MEMORY;
  mem_free(calib->context, a->scratch);
  a->scratch = scratch;
  a->scratch_floats = wanted;
  return OSCAR_OK;
}

static float *thread_scratch(const struct attended *a) { return a->scratch + (size_t)omp_get_thread_num() * a->scratch_floats; }

static void load_rows(const uint16_t *from, size_t count, float *to) {
  for (size_t i = 0; i < count; i++) to[i] = bf16_to_f32(from[i]);
}

/* sum += rows [n][d] */
static void add_rows(int n, int d, const double *rows, double *sum) {
  for (int t = 0; t < n; t++)
    for (int i = 0; i < d; i++) sum[i] += rows[(size_t)t * (size_t)d + (size_t)i];
}

/* Sums over the chunk's keys and values of one head from position `first` on. */
static void add_plain(const oscar_calib *calib, const struct attended_layer *l, int h, int64_t first, int64_t end,
                      double *scratch) {
  int d = calib->geometry.head_dim, r = l->rotary_dim;
  struct attended_head *head = &l->heads[h];
  size_t ds = (size_t)d;
  double *rows = scratch;
  for (int64_t t = first; t < end; t += KEY_ROWS) {
    int n = (int)(end - t < KEY_ROWS ? end - t : KEY_ROWS);
    size_t at = ((size_t)h * (size_t)l->capacity + (size_t)t) * ds, count = (size_t)n * ds;
    for (size_t i = 0; i < count; i++) rows[i] = (double)bf16_to_f32(l->values[at + i]);
    cblas_dsyrk(CblasRowMajor, CblasLower, CblasTrans, d, n, 1, rows, d, 1, head->value_moment, d);
    add_rows(n, d, rows, head->value_sum);
    for (size_t i = 0; i < count; i++) rows[i] = (double)bf16_to_f32(l->keys[at + i]);
    cblas_dsyrk(CblasRowMajor, CblasLower, CblasTrans, d, n, 1, rows, d, 1, head->key_moment, d);
    add_rows(n, d, rows, head->key_sum);
    if (r == 0) continue;
    const double *waves = l->waves->rows + (size_t)t * (size_t)r;
    cblas_dgemm(CblasRowMajor, CblasTrans, CblasNoTrans, d, r, n, 1, rows, d, waves, r, 1, head->key_wave, r);
    if (h > 0) continue;
    cblas_dsyrk(CblasRowMajor, CblasLower, CblasTrans, r, n, 1, waves, r, 1, l->wave_moment, r);
    add_rows(n, r, waves, l->wave_sum);
  }
}

/* ---- the sequence ---- */

static void append(const oscar_calib *calib, struct attended_layer *l, int n, const float *k, const float *v) {
  const oscar_calib_geometry *g = &calib->geometry;
  size_t d = (size_t)g->head_dim;
  for (int t = 0; t < n; t++)
    for (int h = 0; h < g->kv_heads; h++) {
      size_t from = ((size_t)t * (size_t)g->kv_heads + (size_t)h) * d;
      size_t to = ((size_t)h * (size_t)l->capacity + (size_t)(l->length + t)) * d;
      for (size_t i = 0; i < d; i++) {
        l->keys[to + i] = f32_to_bf16(k[from + i]);
        l->values[to + i] = f32_to_bf16(v[from + i]);
      }
    }
  for (int h = 0; h < g->kv_heads; h++) {
    size_t at = (size_t)h * (size_t)l->capacity + (size_t)l->length;
    memset(l->weights + at, 0, (size_t)n * sizeof *l->weights);
    memset(l->value_weights + at, 0, (size_t)n * sizeof *l->value_weights);
    memset(l->counted + at, 0, (size_t)n * sizeof *l->counted);
  }
}

/* norms[j] = v_j G v_j' of the chunk's values for one query head. */
static void add_norms(const oscar_calib *calib, const struct attended_layer *l, int query_head, int n, struct weighing *w) {
  const oscar_calib_geometry *g = &calib->geometry;
  int d = g->head_dim, kv_head = query_head / (g->query_heads / g->kv_heads);
  size_t ds = (size_t)d;
  const float *gram = l->gram + (size_t)query_head * ds * ds;
  for (int t = 0; t < n; t += QUERY_ROWS) {
    int rows = n - t < QUERY_ROWS ? n - t : QUERY_ROWS;
    size_t at = (size_t)(l->length + t);
    load_rows(l->values + ((size_t)kv_head * (size_t)l->capacity + at) * ds, (size_t)rows * ds, w->queries);
    cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, rows, d, d, 1, w->queries, d, gram, d, 0, w->projected, d);
    for (int i = 0; i < rows; i++)
      l->norms[(size_t)query_head * (size_t)l->capacity + at + (size_t)i] =
          cblas_sdot(d, w->queries + (size_t)i * ds, 1, w->projected + (size_t)i * ds, 1);
  }
}

/* ---- weighing ---- */

/* Keys that a query at t reads as codes: [*first, *end). */
static void coded_range(const oscar_attended_options *o, int window, int64_t t, int64_t *first, int64_t *end) {
  *first = (int64_t)o->sink_pages * PAGE_TOKENS;
  if (window > 0 && t - window + 1 > *first) *first = t - window + 1;
  *end = (t / PAGE_TOKENS - o->recent_pages) * PAGE_TOKENS;
}

/* e^x for x <= 0 to a relative error of 2e-7, and 0 below -87; branch-free, so that compilers make vectors of it. */
static inline float exp_negative(float x) {
  float clamped = x < -87.0f ? -87.0f : x;
  float n = (clamped * 1.44269504f + 12582912.0f) - 12582912.0f; /* 1.5 2^23: rounds to a whole number */
  float r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
  float y = 1 + r * (1 + r * (0.5f + r * (1.f / 6 + r * (1.f / 24 + r * (1.f / 120 + r * (1.f / 720))))));
  union {
    int32_t i;
    float f;
  } power = {.i = ((int32_t)n + 127) << 23};
  return x < -87.0f ? 0 : y * power.f;
}

/* scores [rows][stride] = softmax over the keys each query sees. */
static void soften(const struct attended_layer *l, int rows, const int64_t *positions, int64_t keys, size_t stride,
                   float *scores) {
  for (int r = 0; r < rows; r++) {
    float *s = scores + (size_t)r * stride, max = -INFINITY;
    int64_t first = l->window > 0 && positions[r] >= l->window ? positions[r] - l->window + 1 : 0, end = positions[r] + 1;
    for (int64_t j = first; j < end; j++) max = s[j] > max ? s[j] : max;
    for (int64_t j = first; j < end; j++) s[j] = exp_negative(s[j] - max);
    double sum = 0;
    for (int64_t j = first; j < end; j++) sum += (double)s[j];
    float inverse = (float)(1 / sum);
    for (int64_t j = first; j < end; j++) s[j] *= inverse;
    memset(s, 0, (size_t)first * sizeof *s);
    memset(s + end, 0, (size_t)(keys - end) * sizeof *s);
  }
}

/* What one query head gathers of a chunk: the caller's, added up over the heads of a group afterwards. */
struct gathered {
  double *key_weights;   /* [keys] sum over queries of w */
  double *value_weights; /* [keys] sum over queries of p^2 */
  float *query_rows;     /* [queries][d] q sqrt(sum_j w_qj) */
};

/* A block of queries at `positions` against all keys before them. */
static void weigh_block(const oscar_calib *calib, const struct attended_layer *l, int query_head, int rows,
                        const int64_t *positions, const struct weighing *w, float *query_rows, double *key_weights,
                        double *value_weights) {
  const oscar_calib_geometry *g = &calib->geometry;
  const struct attended *a = calib->attended;
  int d = g->head_dim, kv_head = query_head / (g->query_heads / g->kv_heads);
  size_t ds = (size_t)d, capacity = (size_t)l->capacity, at = (size_t)kv_head * capacity * ds;
  int64_t keys = positions[rows - 1] + 1;
  size_t stride = (size_t)keys;
  const float *gram = l->gram + (size_t)query_head * ds * ds, *norms = l->norms + (size_t)query_head * capacity;
  float own[QUERY_ROWS];
  double total[QUERY_ROWS] = {0};

  for (int64_t j = 0; j < keys; j += KEY_ROWS) {
    int n = (int)(keys - j < KEY_ROWS ? keys - j : KEY_ROWS);
    load_rows(l->keys + at + (size_t)j * ds, (size_t)n * ds, w->rows);
    cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, rows, n, d, a->options.scale, w->queries, d, w->rows, d, 0,
                w->scores + j, (int)stride);
  }
  soften(l, rows, positions, keys, stride, w->scores);
  cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, rows, d, d, 1, w->outputs, d, gram, d, 0, w->projected, d);
  for (int r = 0; r < rows; r++) own[r] = cblas_sdot(d, w->outputs + (size_t)r * ds, 1, w->projected + (size_t)r * ds, 1);

  int64_t first, end, last_end;
  coded_range(&a->options, l->window, positions[0], &first, &end); /* `first` only grows with the position */
  coded_range(&a->options, l->window, positions[rows - 1], &end, &last_end);
  for (int64_t j = first; j < last_end; j += KEY_ROWS) {
    int n = (int)(last_end - j < KEY_ROWS ? last_end - j : KEY_ROWS);
    load_rows(l->values + at + (size_t)j * ds, (size_t)n * ds, w->rows);
    cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, rows, n, d, -2, w->projected, d, w->rows, d, 0, w->tile, KEY_ROWS);
    for (int r = 0; r < rows; r++) {
      int64_t from, to;
      coded_range(&a->options, l->window, positions[r], &from, &to);
      from = from > j ? from - j : 0;
      to = to - j < n ? to - j : n;
      const float *p = w->scores + (size_t)r * stride + j, *cross = w->tile + (size_t)r * KEY_ROWS;
      for (int64_t i = from; i < to; i++) {
        float square = p[i] * p[i], distance = norms[j + i] + cross[i] + own[r];
        double weight = (double)(square * (distance > 0 ? distance : 0));
        key_weights[j + i] += weight;
        total[r] += weight;
        value_weights[j + i] += (double)square;
      }
    }
  }
  for (int r = 0; r < rows; r++) {
    float root = (float)sqrt(total[r]) * a->options.scale;
    for (size_t i = 0; i < ds; i++) query_rows[(size_t)r * ds + i] = root * w->queries[(size_t)r * ds + i];
  }
}

static struct weighing weighing_at(size_t d, float *scratch) {
  struct weighing w;
  w.queries = scratch;
  w.outputs = w.queries + QUERY_ROWS * d;
  w.projected = w.outputs + QUERY_ROWS * d;
  w.rows = w.projected + QUERY_ROWS * d;
  w.tile = w.rows + KEY_ROWS * d;
  w.scores = w.tile + QUERY_ROWS * KEY_ROWS;
  return w;
}

/* The positions of a chunk whose queries are looked at: those with coded keys, every query_stride-th. */
static int choose_positions(const struct attended *a, int64_t begin, int n, int64_t *positions) {
  const oscar_attended_options *o = &a->options;
  int count = 0;
  for (int64_t t = begin; t < begin + n; t++)
    if (t % o->query_stride == o->query_stride / 2 && t / PAGE_TOKENS > o->sink_pages + o->recent_pages) positions[count++] = t;
  return count;
}

static void weigh_head(const oscar_calib *calib, const struct attended_layer *l, int query_head, int count,
                       const int64_t *positions, int64_t begin, const float *q, const float *o, struct gathered *out,
                       float *scratch) {
  const oscar_calib_geometry *g = &calib->geometry;
  size_t d = (size_t)g->head_dim;
  struct weighing w = weighing_at(d, scratch);
  for (int i = 0; i < count; i += QUERY_ROWS) {
    int rows = count - i < QUERY_ROWS ? count - i : QUERY_ROWS;
    for (int r = 0; r < rows; r++) {
      size_t from = ((size_t)(positions[i + r] - begin) * (size_t)g->query_heads + (size_t)query_head) * d;
      memcpy(w.queries + (size_t)r * d, q + from, d * sizeof *q);
      memcpy(w.outputs + (size_t)r * d, o + from, d * sizeof *o);
    }
    weigh_block(calib, l, query_head, rows, positions + i, &w, out->query_rows + (size_t)i * d, out->key_weights,
                out->value_weights);
  }
}

/* M, key weights and value errors of one KV head from what its query heads gathered. */
static void merge_group(const oscar_calib *calib, const struct attended_layer *l, int kv_head, int count, int64_t keys,
                        const struct gathered *gathered, double *scratch) {
  const oscar_calib_geometry *g = &calib->geometry;
  int d = g->head_dim, group = g->query_heads / g->kv_heads;
  struct attended_head *head = &l->heads[kv_head];
  double *weights = l->weights + (size_t)kv_head * (size_t)l->capacity,
         *value_weights = l->value_weights + (size_t)kv_head * (size_t)l->capacity;
  for (const struct gathered *from = gathered + kv_head * group; from < gathered + (kv_head + 1) * group; from++) {
    for (int64_t j = 0; j < keys; j++) weights[j] += from->key_weights[j];
    for (int64_t j = 0; j < keys; j++) value_weights[j] += from->value_weights[j];
    for (int t = 0; t < count; t += KEY_ROWS) {
      int n = count - t < KEY_ROWS ? count - t : KEY_ROWS;
      for (int i = 0; i < n * d; i++) scratch[i] = (double)from->query_rows[t * d + i];
      cblas_dsyrk(CblasRowMajor, CblasLower, CblasTrans, d, n, 1, scratch, d, 1, head->metric, d);
    }
  }
}

/* Memory of a chunk's weighing: released when the chunk is done. */
struct chunk {
  int64_t *positions;
  int count;
  struct gathered *gathered; /* [query_heads] */
  double *key_weights;       /* [query_heads][2][keys]: of keys, of values */
  float *query_rows;         /* [query_heads][count][d] */
};

static void chunk_free(oscar_context *context, struct chunk *c) {
  mem_free(context, c->query_rows);
  mem_free(context, c->key_weights);
  mem_free(context, c->gathered);
  mem_free(context, c->positions);
}

static oscar_status chunk_make(oscar_calib *calib, int64_t begin, int n, struct chunk *c) {
  oscar_context *context = calib->context;
  size_t heads = (size_t)calib->geometry.query_heads, keys = (size_t)(begin + n), d = (size_t)calib->geometry.head_dim;
  *c = (struct chunk){.positions = mem_alloc(context, (size_t)n, sizeof *c->positions)};
  if (!c->positions) return OSCAR_NO_MEMORY;
  c->count = choose_positions(calib->attended, begin, n, c->positions);
  c->gathered = mem_zalloc(context, heads, sizeof *c->gathered);
  c->key_weights = c->gathered ? mem_zalloc(context, heads * 2 * keys, sizeof *c->key_weights) : NULL;
  c->query_rows = c->key_weights ? mem_alloc(context, heads * (size_t)c->count * d, sizeof *c->query_rows) : NULL;
  if (!c->query_rows) {
    chunk_free(context, c);
    return OSCAR_NO_MEMORY;
  }
  for (size_t h = 0; h < heads; h++) {
    c->gathered[h].key_weights = c->key_weights + h * 2 * keys;
    c->gathered[h].value_weights = c->gathered[h].key_weights + keys;
    c->gathered[h].query_rows = c->query_rows + h * (size_t)c->count * d;
  }
  return OSCAR_OK;
}

static int64_t after_sink(const struct attended *a, int64_t begin, int64_t end) {
  int64_t sink = (int64_t)a->options.sink_pages * PAGE_TOKENS, first = begin > sink ? begin : sink;
  return first < end ? first : end;
}

oscar_status attended_add(oscar_calib *calib, int layer, int n, const float *q, const float *k, const float *v, const float *o) {
  const oscar_calib_geometry *g = &calib->geometry;
  struct attended *a = calib->attended;
  struct attended_layer *l = &a->layers[layer];
  int threads = oscar_context_threads(calib->context);
  oscar_status status = l->sums ? OSCAR_OK : oscar_calib_describe_layer(calib, layer, NULL, 0, NULL);
  if (status == OSCAR_OK) status = reserve(calib, l, l->length + n);
  if (status == OSCAR_OK) status = reserve_waves(calib->context, l->waves, l->length + n);
  if (status == OSCAR_OK) status = reserve_scratch(calib, l->length + n);
  struct chunk c;
  if (status == OSCAR_OK) status = chunk_make(calib, l->length, n, &c);
  if (status != OSCAR_OK) return status;

  size_t d = (size_t)g->head_dim;
  int64_t begin = l->length, end = begin + n, first = after_sink(a, begin, end);
  append(calib, l, n, k, v);
#pragma omp parallel num_threads(threads)
  {
    float *scratch = thread_scratch(a);
    struct weighing w = weighing_at(d, scratch);
#pragma omp for schedule(dynamic)
    for (int h = 0; h < g->query_heads; h++) {
      add_norms(calib, l, h, n, &w);
      if (c.count) weigh_head(calib, l, h, c.count, c.positions, begin, q, o, &c.gathered[h], scratch);
    }
#pragma omp for schedule(dynamic)
    for (int h = 0; h < g->kv_heads; h++) {
      add_plain(calib, l, h, first, end, (double *)(void *)scratch);
      if (c.count) merge_group(calib, l, h, c.count, end, c.gathered, (double *)(void *)scratch);
    }
  }
  l->tokens += end - first;
  l->length = end;
  chunk_free(calib->context, &c);
  return OSCAR_OK;
}

/* ---- the end of a sequence ---- */

static void close_head(const oscar_calib *calib, const struct attended_layer *l, int h) {
  size_t d = (size_t)calib->geometry.head_dim, row = (size_t)h * (size_t)l->capacity;
  struct attended_head *head = &l->heads[h];
  for (int64_t j = 0; j < l->length; j++) {
    double weight = l->weights[row + (size_t)j] - l->counted[row + (size_t)j];
    if (weight == 0) continue;
    const uint16_t *key = l->keys + (row + (size_t)j) * d;
    for (size_t i = 0; i < d; i++) head->attended_key[i] += weight * (double)bf16_to_f32(key[i]);
    const double *wave = l->waves ? l->waves->rows + (size_t)j * (size_t)l->rotary_dim : NULL;
    for (int i = 0; i < l->rotary_dim; i++) head->attended_wave[i] += weight * wave[i];
    head->attended += weight;
    l->counted[row + (size_t)j] = l->weights[row + (size_t)j];
  }
}

void attended_close_sequences(const oscar_calib *calib) {
  const struct attended *a = calib->attended;
  const int heads = calib->geometry.kv_heads, places = calib->geometry.layers * heads;
  team_before_openmp(calib->context);
#pragma omp parallel for schedule(dynamic) num_threads(oscar_context_threads(calib->context))
  for (int place = 0; place < places; place++)
    if (a->layers[place / heads].sums) close_head(calib, &a->layers[place / heads], place % heads);
}

void oscar_calib_begin_sequence(oscar_calib *calib) {
  if (!calib->attended) return;
  attended_close_sequences(calib);
  for (int layer = 0; layer < calib->geometry.layers; layer++) calib->attended->layers[layer].length = 0;
}

/* Places at equal distances along the cumulated weights: a row is drawn as often as its weight says. */
void attended_sample(const oscar_calib *calib, int layer, int kv_head, oscar_side side, int most, int *count, float *rows,
                     int64_t *positions) {
  const struct attended_layer *l = &calib->attended->layers[layer];
  size_t d = (size_t)calib->geometry.head_dim, row = (size_t)kv_head * (size_t)l->capacity;
  const double *weights = (side == OSCAR_KEYS ? l->weights : l->value_weights) + row;
  const uint16_t *from = (side == OSCAR_KEYS ? l->keys : l->values) + row * d;
  double total = 0, passed = 0;
  for (int64_t j = 0; j < l->length; j++) total += weights[j];
  *count = 0;
  for (int64_t j = 0; total > 0 && j < l->length; j++) {
    passed += weights[j];
    for (; *count < most && passed >= (*count + 0.5) * total / most; ++*count) {
      load_rows(from + (size_t)j * d, d, rows + (size_t)*count * d);
      positions[*count] = j;
    }
  }
}

oscar_status attended_get(const oscar_calib *calib, oscar_calib_statistic which, int layer, int kv_head, double *out) {
  size_t d = (size_t)calib->geometry.head_dim;
  if (!calib->attended || !calib->attended->layers[layer].sums)
    return set_error(calib->context, OSCAR_INVALID_ARGUMENT, "calibration: this statistic needs oscar_calib_attend");
  attended_close_sequences(calib);
  const struct attended_head *head = &calib->attended->layers[layer].heads[kv_head];
  if (which == OSCAR_CALIB_KEY_METRIC)
    for (size_t i = 0; i < d; i++)
      for (size_t j = 0; j <= i; j++) out[i * d + j] = out[j * d + i] = head->metric[i * d + j];
  else
    for (size_t i = 0; i < d; i++) out[i] = head->attended > 0 ? head->attended_key[i] / head->attended : 0;
  return OSCAR_OK;
}
