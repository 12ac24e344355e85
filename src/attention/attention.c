/*
 * attention.c - attention of queries over a cache: who computes what, and how the pieces come together.
 *
 * The queries of a job are cut into tiles: consecutive positions of one page times the query heads of one KV head, at most
 * MAX_ROWS rows. Because a tile lies within a page, the reading rule gives all of its rows the same form of every page. The pages
 * that a tile reads are summed in parts, whose sums are merged in order; where parts begin follows from the tile's page alone, so
 * that a row's result depends neither on the other rows nor on the threads. A tile is one piece of work, or each part is one when
 * there are fewer tiles than the threads can share (decode). Three steps, each a parallel loop:
 *   1  map the queries of tiles that are cut into parts (others are mapped by the thread that reads the pages)
 *   2  read pages: scores, running softmax, sums; a tile in one piece is finished here, a part leaves its sums
 *   3  merge the parts of cut tiles and finish them
 * Tiles of few rows and of many are read by different kernels (kernels.h).
 * Per row the sums are [head_dim] of exact pages and [A, -Z, sum of p] of coded ones (quant/codec.h); finishing adds the product
 * of the latter with the map of the values and divides by the softmax sum. Everything is planned and allocated before the first
 * loop; inside, nothing can fail.
 */
#include "attention/cuda/device.h"
#include "attention/kernels.h"
#include "base/team.h"
#include "cache/view.h"

#include <math.h>
#include <string.h>

#include <oscar/attention.h>

#define MAX_GROUP        16 /* query heads per KV head */
#define FEW_TOKENS       16
#define MIN_PART_PAGES   16 /* a much shorter part costs more in angles and merging than it saves; a power of two */
#define MOST_PARTS       32 /* of a tile, and one more where its first page is not a part's first */
#define PARTS_PER_THREAD 4  /* so that threads finish together although parts take different times */

struct tile {
  const oscar_attention_job *job;
  int kv_head;
  int first, positions; /* of the job's n */
  int64_t position;     /* of `first` in the sequence */
  int64_t page_begin, page_end;
  bool mapped;        /* at least one page is read as codes */
  int64_t part_pages; /* parts begin at multiples of it */
  int parts;          /* of the page range */
  bool cut;           /* each part is a piece, with shared queries and sums: */
  int part;           /* index of the first part's sums */
  int slot;           /* of the queries */
};

struct piece {
  int tile, part; /* part: 0 .. tile.parts - 1; of a tile that is not cut unused */
};

/* What a piece of work collects; slices of one block of floats. */
struct sums {
  struct softmax_state *states; /* [MAX_ROWS] */
  float *out;                   /* [MAX_ROWS][stride] */
};

/* Queries in every form that pages need. */
struct queries {
  float *q;          /* [MAX_ROWS][head_dim] */
  float *mapped;     /* [MAX_ROWS][key rows] */
  uint8_t *prepared; /* [MAX_ROWS][prepared bytes] */
};

struct buffer {
  void *data;
  size_t bytes;
};

struct oscar_attention {
  struct device_attention *device; /* where the cache is on a GPU: then this and the geometry are all there is */
  oscar_cache *cache;
  const struct cache_geometry *geometry;
  const struct attention_kernels *kernels;
  const struct page_kernels *few, *many; /* for tiles of fewer than MANY_ROWS rows, and for the others */
  int query_heads, group;
  float scale;
  struct wave_basis *waves; /* [layers][kv_heads]; NULL when no mean rotates. The arrays follow in the same block. */

  /* Bytes of one row, the largest over all layers; multiples of 64. */
  size_t q_bytes, mapped_bytes, prepared_bytes, out_bytes;
  size_t panel_bytes;
  size_t angle_bytes; /* of the pairs of a head */

  struct buffer threads; /* [threads] of queries, sums, scores, panel, angles: made once */
  struct buffer plan;    /* [tiles] struct tile, [pieces] struct piece */
  struct buffer shared;  /* [cut tiles] of queries, [parts of cut tiles] of sums */
};

struct plan {
  int tiles, pieces, cut_tiles, parts;
  int rows; /* of the largest tile, with those that its kernels write besides */
  struct tile *tile;
  struct piece *piece;
};

/* The layer of a call. */
struct layer {
  int index, window;
  bool coded; /* the cache has codecs */
  struct side_form keys, values;
  int stride; /* floats per row of sums */
};

/* The angles of a head's rotating pairs at the centre of a page. */
struct angles {
  const struct wave_basis *basis; /* NULL: none rotates */
  const oscar_codec_spec *spec;
  int64_t page; /* -1: nowhere yet */
  float *turn;  /* [2 pairs] cos and sin of the angle from one page to the next */
  float *at;    /* [2 pairs] the same of the angle at the centre of `page` */
};

/* ---- memory ---- */

static oscar_status reserve(oscar_context *context, struct buffer *buffer, size_t count, size_t size) {
  if (count && size > SIZE_MAX / count) return set_error(context, OSCAR_NO_MEMORY, "attention: a call of this size overflows");
  if (count * size <= buffer->bytes) return OSCAR_OK;
  void *data = mem_alloc(context, count, size);
  if (!data) return OSCAR_NO_MEMORY;
  mem_free(context, buffer->data);
  *buffer = (struct buffer){data, count * size};
  return OSCAR_OK;
}

#define STATE_BYTES  (round_up(sizeof(struct softmax_state), 32))
#define SCORES_BYTES (sizeof(float) * PAGE_TOKENS)

static size_t queries_bytes(const oscar_attention *a, int rows) {
  return (a->q_bytes + a->mapped_bytes + a->prepared_bytes) * (size_t)rows;
}
static size_t sums_bytes(const oscar_attention *a, int rows) {
  return round_up(STATE_BYTES * (size_t)rows, 64) + a->out_bytes * (size_t)rows;
}
static size_t thread_bytes(const oscar_attention *a) {
  return queries_bytes(a, MAX_ROWS) + 2 * sums_bytes(a, MAX_ROWS) + SCORES_BYTES * MAX_ROWS + a->panel_bytes + 2 * a->angle_bytes;
}

static struct queries queries_at(const oscar_attention *a, int rows, void *block) {
  uint8_t *mapped = (uint8_t *)block + a->q_bytes * (size_t)rows;
  return (struct queries){block, (float *)(void *)mapped, mapped + a->mapped_bytes * (size_t)rows};
}

static struct sums sums_at(int rows, void *block) {
  return (struct sums){block, (float *)(void *)((uint8_t *)block + round_up(STATE_BYTES * (size_t)rows, 64))};
}

static struct queries slot_queries(const oscar_attention *a, const struct plan *plan, int slot) {
  return queries_at(a, plan->rows, (uint8_t *)a->shared.data + (size_t)slot * queries_bytes(a, plan->rows));
}

static struct sums part_sums(const oscar_attention *a, const struct plan *plan, int part) {
  uint8_t *parts = (uint8_t *)a->shared.data + (size_t)plan->cut_tiles * queries_bytes(a, plan->rows);
  return sums_at(plan->rows, parts + (size_t)part * sums_bytes(a, plan->rows));
}

static struct layer describe_layer(const oscar_attention *a, int index, int window) {
  const struct cache_geometry *g = a->geometry;
  struct layer layer = {.index = index, .window = window, .coded = g->codecs != NULL, .stride = g->head_dim};
  if (layer.coded) {
    layer.keys = side_form_of(oscar_codec_set_get(g->codecs, index, 0, OSCAR_KEYS));
    layer.values = side_form_of(oscar_codec_set_get(g->codecs, index, 0, OSCAR_VALUES));
    layer.stride += form_rows(&layer.values);
  }
  return layer;
}

static const struct side_form *keys_form(const struct layer *layer) { return layer->coded ? &layer->keys : NULL; }

static size_t larger(size_t a, size_t b) { return a > b ? a : b; }

static void measure(oscar_attention *a) {
  const struct cache_geometry *g = a->geometry;
  a->q_bytes = sizeof(float) * (size_t)g->head_dim;
  for (int i = 0; i < g->layers; i++) {
    struct layer layer = describe_layer(a, i, 0);
    const struct side_form *keys = layer.coded ? &layer.keys : NULL, *values = layer.coded ? &layer.values : NULL;
    if (keys) {
      a->mapped_bytes = larger(a->mapped_bytes, sizeof(float) * (size_t)form_rows(keys));
      a->angle_bytes = larger(a->angle_bytes, round_up(sizeof(float) * 2 * (size_t)keys->rotating_pairs, 64));
    }
    a->prepared_bytes =
        larger(a->prepared_bytes, larger(a->few->prepared_bytes(g->head_dim, keys), a->many->prepared_bytes(g->head_dim, keys)));
    a->out_bytes = larger(a->out_bytes, sizeof(float) * (size_t)layer.stride);
    a->panel_bytes = larger(
        a->panel_bytes, larger(a->few->panel_bytes(g->head_dim, keys, values), a->many->panel_bytes(g->head_dim, keys, values)));
  }
  a->panel_bytes = round_up(a->panel_bytes, 64);
}

static const oscar_codec_spec *keys_of(const oscar_attention *a, int layer, int kv_head) {
  return oscar_codec_describe(oscar_codec_set_get(a->geometry->codecs, layer, kv_head, OSCAR_KEYS));
}

/* Curves for the means that rotate, of every head. */
static oscar_status make_waves(oscar_attention *a) {
  const struct cache_geometry *g = a->geometry;
  size_t heads = (size_t)g->layers * (size_t)g->kv_heads, bytes = round_up(heads * sizeof *a->waves, 64), first = bytes;
  if (a->angle_bytes == 0) return OSCAR_OK;
  for (int layer = 0; layer < g->layers; layer++)
    for (int head = 0; head < g->kv_heads; head++)
      if (keys_of(a, layer, head)->rotating_pairs > 0) bytes += wave_basis_bytes(keys_of(a, layer, head));
  a->waves = mem_zalloc(g->context, 1, bytes);
  if (!a->waves) return OSCAR_NO_MEMORY;
  uint8_t *memory = (uint8_t *)a->waves + first;
  for (int layer = 0; layer < g->layers; layer++)
    for (int head = 0; head < g->kv_heads; head++) {
      const oscar_codec_spec *spec = keys_of(a, layer, head);
      if (spec->rotating_pairs == 0) continue;
      a->waves[layer * g->kv_heads + head] = wave_basis_make(spec, memory);
      memory += wave_basis_bytes(spec);
    }
  return OSCAR_OK;
}

/* What attention in host memory needs besides. */
static oscar_status prepare_host(oscar_attention *a) {
  oscar_context *context = a->geometry->context;
  measure(a);
  oscar_status status = make_waves(a);
  if (status == OSCAR_OK) status = reserve(context, &a->threads, (size_t)oscar_context_threads(context), thread_bytes(a));
  if (status == OSCAR_OK)
    status = reserve(context, &a->plan, (size_t)a->geometry->kv_heads, sizeof(struct tile) + sizeof(struct piece));
  return status;
}

oscar_status oscar_attention_create(oscar_cache *cache, const oscar_attention_options *options, oscar_attention **attention) {
  if (!cache || !attention) return OSCAR_INVALID_ARGUMENT;
  *attention = NULL;
  const struct cache_geometry *g = cache_geometry_of(cache);
  oscar_context *context = g->context;
  if (!options) return set_error(context, OSCAR_INVALID_ARGUMENT, "attention: options are missing");
  int heads = options->query_heads;
  if (heads < 1 || heads % g->kv_heads != 0 || heads / g->kv_heads > MAX_GROUP)
    return set_error(context, OSCAR_INVALID_ARGUMENT,
                     "attention: %d query heads; expected a multiple of the cache's %d KV heads, at most %d for each", heads,
                     g->kv_heads, MAX_GROUP);
  if (!(options->scale >= 0 && isfinite(options->scale)))
    return set_error(context, OSCAR_INVALID_ARGUMENT,
                     "attention: scale %g; expected a positive number, or 0 for 1/sqrt(head_dim)", (double)options->scale);

  oscar_attention *a = mem_zalloc(context, 1, sizeof *a);
  if (!a) return OSCAR_NO_MEMORY;
  a->cache = cache;
  a->geometry = g;
  a->kernels = attention_kernels_for(&context->cpu);
  a->few = &a->kernels->pages;
  a->many = page_kernels_for_many(&context->cpu);
  if (!a->many) a->many = a->few;
  a->query_heads = heads;
  a->group = heads / g->kv_heads;
  a->scale = options->scale > 0 ? options->scale : 1 / sqrtf((float)g->head_dim);
  oscar_status status = g->cuda ? device_attention_create(cache, heads, a->scale, &a->device) : prepare_host(a);
  if (status != OSCAR_OK) {
    oscar_attention_free(a);
    return status;
  }
  *attention = a;
  return OSCAR_OK;
}

void oscar_attention_free(oscar_attention *attention) {
  if (!attention) return;
  oscar_context *context = attention->geometry->context;
  device_attention_free(attention->device);
  mem_free(context, attention->waves);
  mem_free(context, attention->threads.data);
  mem_free(context, attention->plan.data);
  mem_free(context, attention->shared.data);
  mem_free(context, attention);
}

/* ---- planning ---- */

/* The form in which queries of `query_page` read `page`; the other one where the wanted one does not exist. */
static const uint8_t *choose_form(const struct cache_geometry *g, struct page_view view, int64_t page, int64_t query_page,
                                  bool *coded) {
  bool exact = page_reads_exact(g, page, query_page);
  *coded = exact ? !view.exact : view.coded != NULL;
  return *coded ? view.coded : view.exact;
}

static int64_t window_begin(int window, int64_t position) { return window > 0 && position >= window ? position - window + 1 : 0; }

static oscar_status check_job(const oscar_attention *a, const struct layer *layer, const oscar_attention_job *job, int index) {
  oscar_context *context = a->geometry->context;
  if (!job->sequence || !job->q || !job->out)
    return set_error(context, OSCAR_INVALID_ARGUMENT, "attention job %d: sequence, q or out is missing", index);
  if (sequence_cache(job->sequence) != a->cache)
    return set_error(context, OSCAR_INVALID_ARGUMENT, "attention job %d: the sequence belongs to another cache", index);
  int64_t visible = sequence_visible(job->sequence, layer->index);
  if (visible < 0)
    return set_error(context, OSCAR_INVALID_ARGUMENT, "attention job %d: layer %d of the open step has not been written", index,
                     layer->index);
  if (job->n < 1 || job->n > visible)
    return set_error(context, OSCAR_INVALID_ARGUMENT, "attention job %d: %d queries; the sequence has %lld positions", index,
                     job->n, (long long)visible);
  if (a->device) return OSCAR_OK; /* looks at pages where it plans, once for all layers */
  for (int64_t page = window_begin(layer->window, visible - job->n) / PAGE_TOKENS; page * PAGE_TOKENS < visible; page++) {
    struct page_units units = sequence_page_units(job->sequence, layer->index, page);
    if (units.exact == NO_UNIT && units.coded == NO_UNIT)
      return set_error(context, OSCAR_INVALID_ARGUMENT, "attention job %d: page %lld of layer %d holds nothing to read", index,
                       (long long)page, layer->index);
  }
  return OSCAR_OK;
}

/* On a GPU all queries of a call are one array, and so are the outputs. */
static oscar_status check_follows(const oscar_attention *a, const oscar_attention_job *job, int index) {
  const oscar_attention_job *before = job - 1;
  const size_t floats = (size_t)before->n * (size_t)a->query_heads * (size_t)a->geometry->head_dim;
  if (job->q == before->q + floats && job->out == before->out + floats) return OSCAR_OK;
  return set_error(a->geometry->context, OSCAR_INVALID_ARGUMENT,
                   "attention job %d: on a GPU, q and out must follow those of the job before it", index);
}

static int tile_rows(const oscar_attention *a, const struct tile *tile) { return tile->positions * a->group; }

/* Rows that kernels are given. Those for many may do few rows in another order, so that where many is asked for, rows of zeros
 * that see nothing make up for what is missing. */
static int kernel_rows(const oscar_attention *a, const struct tile *tile) {
  const int rows = tile_rows(a, tile);
  return tile->job->rounding == OSCAR_ATTENTION_AS_MANY && rows < MANY_ROWS ? MANY_ROWS : rows;
}

/* A job of few tokens is a newest token and guesses of those after it (engine/speculate.h), unless it says something else. */
static bool is_few(const oscar_attention_job *job) {
  return job->rounding == OSCAR_ATTENTION_BY_NUMBER ? job->n <= FEW_TOKENS : job->rounding == OSCAR_ATTENTION_AS_FEW;
}

static const struct page_kernels *pages_of(const oscar_attention *a, const struct tile *tile) {
  if (is_few(tile->job)) return a->few;
  return tile->job->rounding == OSCAR_ATTENTION_AS_MANY || tile_rows(a, tile) >= MANY_ROWS ? a->many : a->few;
}

/* Positions of a tile: a power of two, so that tiles at multiples of it never cross a page. */
static int tile_positions(int group) {
  int positions = PAGE_TOKENS;
  while (positions * group > MAX_ROWS) positions /= 2;
  return positions;
}

static size_t count_tiles(const oscar_attention *a, const struct layer *layer, const oscar_attention_job *job) {
  int64_t end = sequence_visible(job->sequence, layer->index), begin = end - job->n, step = tile_positions(a->group);
  return (size_t)((end + step - 1) / step - begin / step) * (size_t)a->geometry->kv_heads;
}

static bool reads_codes(const oscar_attention *a, const struct layer *layer, const struct tile *tile) {
  if (!layer->coded) return false;
  for (int64_t page = tile->page_begin; page < tile->page_end; page++) {
    bool coded;
    choose_form(a->geometry, sequence_page(tile->job->sequence, layer->index, page), page, tile->position / PAGE_TOKENS, &coded);
    if (coded) return true;
  }
  return false;
}

/* The parts of a tile: as long as its page says. */
static void set_parts(struct tile *tile) {
  tile->part_pages = MIN_PART_PAGES;
  while (tile->page_end > MOST_PARTS * tile->part_pages) tile->part_pages *= 2;
  tile->parts = (int)((tile->page_end - 1) / tile->part_pages - tile->page_begin / tile->part_pages + 1);
}

/* The tiles of a job, those with the longest history first. Returns their number; *pages grows by the pages they read. */
static int plan_tiles(const oscar_attention *a, const struct layer *layer, const oscar_attention_job *job, struct tile *tiles,
                      int64_t *pages) {
  int64_t end = sequence_visible(job->sequence, layer->index), begin = end - job->n, step = tile_positions(a->group);
  int count = 0;
  for (int64_t last = end; last > begin;) {
    int64_t first = (last - 1) / step * step;
    if (first < begin) first = begin;
    struct tile tile = {.job = job,
                        .first = (int)(first - begin),
                        .positions = (int)(last - first),
                        .position = first,
                        .page_begin = window_begin(layer->window, first) / PAGE_TOKENS,
                        .page_end = first / PAGE_TOKENS + 1};
    tile.mapped = reads_codes(a, layer, &tile);
    set_parts(&tile);
    for (tile.kv_head = 0; tile.kv_head < a->geometry->kv_heads; tile.kv_head++) tiles[count++] = tile;
    *pages += (tile.page_end - tile.page_begin) * a->geometry->kv_heads;
    last = first;
  }
  return count;
}

static int64_t part_begin(const struct tile *tile, int part) {
  const int64_t begin = (tile->page_begin / tile->part_pages + part) * tile->part_pages;
  return begin > tile->page_begin ? begin : tile->page_begin;
}
static int64_t part_end(const struct tile *tile, int part) {
  const int64_t end = (tile->page_begin / tile->part_pages + part + 1) * tile->part_pages;
  return end < tile->page_end ? end : tile->page_end;
}

/* Decides which tiles are cut: those that are more than a thread's fair share, of which there are less than
 * threads * PARTS_PER_THREAD. */
static void plan_pieces(int threads, int64_t pages, struct plan *plan) {
  const int64_t share = threads > 1 ? pages / (threads * PARTS_PER_THREAD) : pages;
  for (int i = 0; i < plan->tiles; i++) {
    struct tile *tile = plan->tile + i;
    tile->cut = tile->parts > 1 && tile->page_end - tile->page_begin > share;
    for (int part = 0; part < (tile->cut ? tile->parts : 1); part++) plan->piece[plan->pieces++] = (struct piece){i, part};
    if (!tile->cut) continue;
    tile->slot = plan->cut_tiles++;
    tile->part = plan->parts;
    plan->parts += tile->parts;
  }
}

/* The last allocation is the only one that can turn an empty buffer into a full one: a failed call leaves as many blocks as it
 * found. */
static oscar_status make_plan(oscar_attention *a, const struct layer *layer, const oscar_attention_job *jobs, int n_jobs,
                              struct plan *plan) {
  oscar_context *context = a->geometry->context;
  int threads = oscar_context_threads(context);
  *plan = (struct plan){0};
  size_t tiles = 0;
  for (int i = 0; i < n_jobs; i++) tiles += count_tiles(a, layer, jobs + i);
  if (tiles > INT32_MAX / 2) return set_error(context, OSCAR_INVALID_ARGUMENT, "attention: too many queries in one call");
  size_t pieces = tiles + (size_t)threads * PARTS_PER_THREAD * (MOST_PARTS + 1);
  oscar_status status = reserve(context, &a->plan, 1, tiles * sizeof(struct tile) + pieces * sizeof(struct piece));
  if (status != OSCAR_OK) return status;
  plan->tile = a->plan.data;
  plan->piece = (struct piece *)(void *)(plan->tile + tiles);

  int64_t pages = 0;
  for (int i = 0; i < n_jobs; i++) plan->tiles += plan_tiles(a, layer, jobs + i, plan->tile + plan->tiles, &pages);
  for (int i = 0; i < plan->tiles; i++) {
    const struct tile *tile = plan->tile + i;
    int rows = (int)round_up((size_t)kernel_rows(a, tile), (size_t)pages_of(a, tile)->row_block);
    if (rows > plan->rows) plan->rows = rows;
  }
  plan_pieces(threads, pages, plan);
  size_t queries = (size_t)plan->cut_tiles * queries_bytes(a, plan->rows), sums = (size_t)plan->parts * sums_bytes(a, plan->rows);
  return reserve(context, &a->shared, 1, queries + sums);
}

/* ---- work on a tile ---- */

/* Row r of a tile is query head r % group of position r / group. */
static size_t query_offset(const oscar_attention *a, const struct tile *tile, int row) {
  size_t position = (size_t)(tile->first + row / a->group), head = (size_t)(tile->kv_head * a->group + row % a->group);
  return (position * (size_t)a->query_heads + head) * (size_t)a->geometry->head_dim;
}

static struct query_rows rows_of(const oscar_attention *a, const struct layer *layer, const struct tile *tile,
                                 struct queries queries) {
  return (struct query_rows){.rows = kernel_rows(a, tile),
                             .head_dim = a->geometry->head_dim,
                             .q = queries.q,
                             .mapped = tile->mapped ? queries.mapped : NULL,
                             .prepared = queries.prepared,
                             .prepared_stride = pages_of(a, tile)->prepared_bytes(a->geometry->head_dim, keys_form(layer))};
}

static void map_queries(const oscar_attention *a, const struct layer *layer, const struct tile *tile, struct queries queries) {
  const int d = a->geometry->head_dim, there = tile_rows(a, tile), rows = kernel_rows(a, tile);
  for (int r = 0; r < there; r++) {
    const float *q = tile->job->q + query_offset(a, tile, r);
    for (int i = 0; i < d; i++) queries.q[r * d + i] = q[i] * a->scale;
  }
  memset(queries.q + there * d, 0, sizeof *queries.q * (size_t)((rows - there) * d));
  if (tile->mapped) {
    const oscar_codec *codec = oscar_codec_set_get(a->geometry->codecs, layer->index, tile->kv_head, OSCAR_KEYS);
    a->kernels->multiply_transposed(rows, codec->map_rows, d, queries.q, codec->map, queries.mapped);
  }
  struct query_rows all = rows_of(a, layer, tile, queries);
  pages_of(a, tile)->prepare_queries(&all, keys_form(layer), queries.prepared);
}

/* ---- the rotating mean ---- */

/* Pages after which turns start over from an exact angle, as at the beginning of a part: they round by 1e-7 each. */
enum { ANCHOR_PAGES = MIN_PART_PAGES };

static struct angles angles_of(const oscar_attention *a, const struct layer *layer, const struct tile *tile, void *memory) {
  if (!tile->mapped || layer->keys.rotating_pairs == 0) return (struct angles){0};
  struct angles angles = {.page = -1,
                          .basis = a->waves + layer->index * a->geometry->kv_heads + tile->kv_head,
                          .spec = keys_of(a, layer->index, tile->kv_head),
                          .turn = memory,
                          .at = (float *)(void *)((uint8_t *)memory + a->angle_bytes)};
  for (int k = 0, n = angles.basis->pairs; k < n; k++)
    rope_page_turn(angles.spec->rope, angles.spec->rotating_pair[k], angles.turn + k, angles.turn + n + k);
  return angles;
}

/* One page on. */
static void turn(struct angles *angles) {
  int n = angles->basis->pairs;
  float *restrict cosines = angles->at, *restrict sines = angles->at + n;
  const float *restrict c = angles->turn, *restrict s = angles->turn + n;
  for (int k = 0; k < n; k++) {
    float cosine = cosines[k] * c[k] - sines[k] * s[k];
    sines[k] = sines[k] * c[k] + cosines[k] * s[k];
    cosines[k] = cosine;
  }
  angles->page++;
}

/* Brings the angles to a page: by turns from the anchor before it, wherever the reading began, so that a page's angles are always
 * the same bits. */
static void turn_to(struct angles *angles, int64_t page) {
  const int64_t anchor = page / ANCHOR_PAGES * ANCHOR_PAGES;
  float *cosines = angles->at, *sines = angles->at + angles->basis->pairs;
  if (angles->page < anchor || angles->page > page) {
    for (int k = 0; k < angles->basis->pairs; k++)
      rope_page_angle(angles->spec->rope, angles->spec->rotating_pair[k], anchor, cosines + k, sines + k);
    angles->page = anchor;
  }
  while (angles->page < page) turn(angles);
}

static void clear_sums(const struct layer *layer, int rows, struct sums sums) {
  for (int r = 0; r < rows; r++) sums.states[r] = (struct softmax_state){.max = -INFINITY};
  memset(sums.out, 0, sizeof *sums.out * (size_t)rows * (size_t)layer->stride);
}

/* The tokens of a page that each row sees. */
static void set_ranges(const oscar_attention *a, const struct layer *layer, const struct tile *tile, int64_t page,
                       struct softmax_state *states) {
  for (int i = 0; i < tile->positions; i++) {
    int64_t position = tile->position + i, base = page * PAGE_TOKENS;
    int64_t hi = position + 1 - base, lo = window_begin(layer->window, position) - base;
    for (int r = i * a->group; r < (i + 1) * a->group; r++) {
      states[r].lo = lo <= 0 ? 0 : lo < PAGE_TOKENS ? (int)lo : PAGE_TOKENS;
      states[r].hi = hi < PAGE_TOKENS ? (int)hi : PAGE_TOKENS;
    }
  }
  for (int r = tile_rows(a, tile); r < kernel_rows(a, tile); r++) states[r].lo = states[r].hi = 0;
}

static void rescale_rows(int rows, int stride, const struct softmax_state *states, float *out) {
  for (int r = 0; r < rows; r++) {
    float factor = states[r].rescale;
    if (factor == 1) continue;
    for (int i = 0; i < stride; i++) out[r * stride + i] *= factor;
  }
}

/* One head's part of a page, in the form a tile reads. */
struct page_part {
  const uint8_t *keys, *values;
  bool coded;
};

static struct page_part find_page(const oscar_attention *a, const struct layer *layer, const struct tile *tile, int64_t page) {
  const struct cache_geometry *g = a->geometry;
  struct page_part part;
  struct page_view view = sequence_page(tile->job->sequence, layer->index, page);
  const uint8_t *form = choose_form(g, view, page, tile->position / PAGE_TOKENS, &part.coded);
  part.coded = part.coded && layer->coded; /* what a filter leaves is BF16, laid out as an exact page */
  size_t key_bytes = exact_head_bytes(g) / 2, value_bytes = key_bytes;
  if (part.coded) {
    key_bytes = side_bytes(&layer->keys);
    value_bytes = side_bytes(&layer->values);
  }
  part.keys = form + (size_t)tile->kv_head * (key_bytes + value_bytes);
  part.values = part.keys + key_bytes;
  return part;
}

/* Brings a coded page closer while the one before it is worked on: at a few kilobytes each, in places of their own, pages end
 * before the CPU has seen where their reads go. */
static void prefetch_page(const struct layer *layer, struct page_part part) {
  if (!part.coded) return;
  size_t bytes = side_bytes(&layer->keys) + side_bytes(&layer->values);
  for (size_t i = 0; i < bytes; i += 64) __builtin_prefetch(part.keys + i, 0, 2);
}

/* Rows of a tile, from the page on that their sums have come to. `tokens`: of the page, that any of them sees. */
static void read_rows(const oscar_attention *a, const struct layer *layer, const struct tile *tile, struct page_part part,
                      const struct query_rows *queries, const struct angles *angles, int tokens, struct sums sums, float *scores,
                      float *panel) {
  const struct page_kernels *pages = pages_of(a, tile);
  int d = a->geometry->head_dim, stride = layer->stride;
  if (part.coded) {
    pages->score_coded(queries, &layer->keys, part.keys, scores, panel);
    if (angles->basis) pages->score_waves(queries, &layer->keys, angles->basis, angles->at, scores, panel);
  } else
    pages->score_exact(queries, (const uint16_t *)(const void *)part.keys, scores, panel);
  a->kernels->softmax(queries->rows, scores, sums.states);
  rescale_rows(queries->rows, stride, sums.states, sums.out);
  if (part.coded)
    pages->accumulate_coded(queries->rows, &layer->values, scores, part.values, sums.out + d, stride, panel);
  else
    pages->accumulate_exact(queries->rows, d, tokens, scores, (const uint16_t *)(const void *)part.values, sums.out, stride,
                            panel);
}

/* Kernels for few rows add up in another order for two than for ten. So where few means that results must not depend on how many
 * there are, the rows of a position, which are always as many, go alone. */
static void read_page(const oscar_attention *a, const struct layer *layer, const struct tile *tile, int64_t page,
                      struct page_part part, const struct query_rows *queries, struct angles *angles, struct sums sums,
                      float *scores, float *panel) {
  const int rows = is_few(tile->job) ? a->group : queries->rows;
  set_ranges(a, layer, tile, page, sums.states);
  if (part.coded && angles->basis) turn_to(angles, page);
  for (int r = 0; r < queries->rows; r += rows) {
    struct query_rows some = *queries;
    some.rows = rows;
    some.q += (size_t)r * (size_t)some.head_dim;
    if (some.mapped) some.mapped += (size_t)r * (size_t)form_rows(&layer->keys);
    some.prepared += (size_t)r * some.prepared_stride;
    const int last = rows == queries->rows ? tile_rows(a, tile) - 1 : r + rows - 1;
    read_rows(a, layer, tile, part, &some, angles, sums.states[last].hi,
              (struct sums){sums.states + r, sums.out + r * layer->stride}, scores, panel);
  }
}

static void finish_tile(const oscar_attention *a, const struct layer *layer, const struct tile *tile, struct sums sums) {
  int rows = tile_rows(a, tile), d = a->geometry->head_dim;
  if (tile->mapped) {
    const oscar_codec *codec = oscar_codec_set_get(a->geometry->codecs, layer->index, tile->kv_head, OSCAR_VALUES);
    a->kernels->multiply_add(rows, d, codec->map_rows, sums.out + d, layer->stride, codec->map, sums.out, layer->stride);
  }
  for (int r = 0; r < rows; r++) {
    float *out = tile->job->out + query_offset(a, tile, r), inverse = 1 / sums.states[r].sum;
    for (int i = 0; i < d; i++) out[i] = sums.out[r * layer->stride + i] * inverse;
  }
}

/* into += from, brought to the larger of the two maxima */
static void merge_sums(const struct layer *layer, int rows, struct sums into, struct sums from) {
  for (int r = 0; r < rows; r++) {
    struct softmax_state *x = into.states + r, *y = from.states + r;
    if (!(y->max > -INFINITY)) continue; /* a part in which the row saw nothing: -inf must not meet -inf */
    float max = x->max > y->max ? x->max : y->max, fx = expf(x->max - max), fy = expf(y->max - max);
    x->sum = x->sum * fx + y->sum * fy;
    x->max = max;
    float *a = into.out + r * layer->stride, *b = from.out + r * layer->stride;
    for (int i = 0; i < layer->stride; i++) a[i] = a[i] * fx + b[i] * fy;
  }
}

/* The sums of one part's pages. */
static void read_part(const oscar_attention *a, const struct layer *layer, const struct tile *tile, int part,
                      const struct query_rows *queries, struct angles *angles, struct sums sums, float *scores, float *panel) {
  const int64_t begin = part_begin(tile, part), end = part_end(tile, part);
  clear_sums(layer, queries->rows, sums);
  struct page_part here = find_page(a, layer, tile, begin), next = here;
  for (int64_t page = begin; page < end; page++, here = next) {
    if (page + 1 < end) prefetch_page(layer, next = find_page(a, layer, tile, page + 1));
    read_page(a, layer, tile, page, here, queries, angles, sums, scores, panel);
  }
}

static void run_piece(const oscar_attention *a, const struct layer *layer, const struct plan *plan, struct piece piece,
                      uint8_t *memory) {
  const struct tile *tile = plan->tile + piece.tile;
  uint8_t *own = memory + queries_bytes(a, MAX_ROWS), *next = own + sums_bytes(a, MAX_ROWS);
  float *scores = (float *)(void *)(next + sums_bytes(a, MAX_ROWS)), *panel = scores + MAX_ROWS * PAGE_TOKENS;
  struct sums sums = tile->cut ? part_sums(a, plan, tile->part + piece.part) : sums_at(MAX_ROWS, own);
  struct queries mapped = tile->cut ? slot_queries(a, plan, tile->slot) : queries_at(a, MAX_ROWS, memory);
  const struct page_kernels *pages = pages_of(a, tile);
  if (pages->begin) pages->begin();
  if (!tile->cut) map_queries(a, layer, tile, mapped);
  struct query_rows queries = rows_of(a, layer, tile, mapped);
  struct angles angles = angles_of(a, layer, tile, (uint8_t *)panel + a->panel_bytes);
  read_part(a, layer, tile, piece.part, &queries, &angles, sums, scores, panel);
  for (int part = 1; part < tile->parts && !tile->cut; part++) {
    struct sums more = sums_at(MAX_ROWS, next);
    read_part(a, layer, tile, part, &queries, &angles, more, scores, panel);
    merge_sums(layer, queries.rows, sums, more);
  }
  if (pages->end) pages->end();
  if (!tile->cut) finish_tile(a, layer, tile, sums);
}

static void merge_tile(const oscar_attention *a, const struct layer *layer, const struct plan *plan, const struct tile *tile) {
  struct sums sums = part_sums(a, plan, tile->part);
  for (int i = 1; i < tile->parts; i++) merge_sums(layer, tile_rows(a, tile), sums, part_sums(a, plan, tile->part + i));
  finish_tile(a, layer, tile, sums);
}

struct execution {
  const oscar_attention *a;
  const struct layer *layer;
  const struct plan *plan;
  team_counter to_map, to_read, to_merge;
};

/* The next tile that is cut into parts, or NULL. */
static const struct tile *take_cut_tile(const struct plan *plan, team_counter *counter) {
  for (int64_t i; (i = team_take(counter)) < plan->tiles;)
    if (plan->tile[i].cut) return plan->tile + i;
  return NULL;
}

static void execute(void *arg, int member, int members) {
  (void)members;
  struct execution *e = arg;
  oscar_context *context = e->a->geometry->context;
  const struct plan *plan = e->plan;
  uint8_t *memory = (uint8_t *)e->a->threads.data + (size_t)member * thread_bytes(e->a);
  const struct tile *tile;
  if (plan->cut_tiles) {
    while ((tile = take_cut_tile(plan, &e->to_map))) map_queries(e->a, e->layer, tile, slot_queries(e->a, plan, tile->slot));
    team_barrier(context, member);
  }
  for (int64_t i; (i = team_take(&e->to_read)) < plan->pieces;) run_piece(e->a, e->layer, plan, plan->piece[i], memory);
  if (plan->cut_tiles) {
    team_barrier(context, member);
    while ((tile = take_cut_tile(plan, &e->to_merge))) merge_tile(e->a, e->layer, plan, tile);
  }
}

void attention_choose(oscar_attention *attention, enum attention_way way) {
  if (attention->device) device_attention_choose(attention->device, way);
}

oscar_status oscar_attention_run(oscar_attention *attention, int layer, int window, const oscar_attention_job *jobs, int n_jobs) {
  if (!attention) return OSCAR_INVALID_ARGUMENT;
  const struct cache_geometry *g = attention->geometry;
  if (layer < 0 || layer >= g->layers)
    return set_error(g->context, OSCAR_INVALID_ARGUMENT, "attention: layer %d; the cache has %d", layer, g->layers);
  if (window < 0)
    return set_error(g->context, OSCAR_INVALID_ARGUMENT, "attention: window %d; expected 0 (all) or a length", window);
  if (n_jobs < 0 || (n_jobs && !jobs))
    return set_error(g->context, OSCAR_INVALID_ARGUMENT, "attention: %d jobs without a list of them", n_jobs);
  if (n_jobs == 0) return OSCAR_OK;

  struct layer described = describe_layer(attention, layer, window);
  for (int i = 0; i < n_jobs; i++) {
    oscar_status status = check_job(attention, &described, jobs + i, i);
    if (status == OSCAR_OK && attention->device && i > 0) status = check_follows(attention, jobs + i, i);
    if (status != OSCAR_OK) return status;
  }
  if (attention->device) return device_attention_run(attention->device, layer, window, jobs, n_jobs);
  struct plan plan;
  oscar_status status = make_plan(attention, &described, jobs, n_jobs, &plan);
  struct execution execution = {.a = attention, .layer = &described, .plan = &plan};
  int threads = oscar_context_threads(g->context);
  if (status == OSCAR_OK) team_run(g->context, plan.pieces < threads ? plan.pieces : threads, execute, &execution);
  return status;
}

/* ---- steps on a GPU ---- */

oscar_status attention_make_ready(oscar_attention *attention, const int *windows, int n_windows, oscar_sequence *const *sequences,
                                  int count, int *kernels) {
  oscar_context *context = attention->geometry->context;
  if (!attention->device || n_windows < 1 || n_windows > STEP_WINDOWS || count < 1)
    return set_error(context, OSCAR_INVALID_ARGUMENT, "attention: a step of %d sequences with %d windows on a GPU", count,
                     n_windows);
  for (int i = 0; i < count; i++)
    if (sequence_cache(sequences[i]) != attention->cache ||
        sequence_visible(sequences[i], EVERY_LAYER) != oscar_sequence_length(sequences[i]) + 1)
      return set_error(context, OSCAR_INVALID_ARGUMENT, "attention: sequence %d has no step of one token open in this cache", i);
  return device_attention_make_ready(attention->device, windows, n_windows, sequences, count, kernels);
}

oscar_status attention_step(oscar_attention *attention, int layer, int window, const struct decode_rows *rows, float *out) {
  return device_attention_step(attention->device, layer, window, rows, out);
}
