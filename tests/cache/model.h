/*
 * tests/cache/model.h - a cache beside a model of it that is too simple to be wrong: for every sequence, an array with the tag of
 * each token. A tag makes the token's K and V rows; forms of pages follow from the text of cache.h by loops over positions; codes
 * come from oscar_codec_encode, or from a page filter that mixes rows.
 *
 * The includer defines REQUIRE(condition), which does not return when the condition is false.
 */
#ifndef OSCAR_TEST_CACHE_MODEL_H
#define OSCAR_TEST_CACHE_MODEL_H

#include "base/base.h"
#include "cache/view.h"

#include <stdlib.h>
#include <string.h>

/* ---- geometries ---- */

struct geometry {
  const char *name;
  int layers, kv_heads, head_dim, sink_pages, recent_pages;
  int crumbs[2]; /* per channel, in even and odd layers; 0: BF16; below 0: a page filter */
  int group;     /* channels of a metadata group, 0: one group */
  bool gain;     /* else scale and zero */
};

static const struct geometry geometries[] = {
    {"bf16", 2, 2, 32, 1, 4, {0, 0}, 0, false},
    {"int2, d = 64", 2, 2, 64, 1, 4, {1, 1}, 0, false},
    {"int2, d = 128", 2, 1, 128, 1, 2, {1, 1}, 0, false},
    {"int8, groups", 2, 2, 32, 1, 2, {4, 4}, 16, false},
    {"no recent pages", 2, 2, 32, 1, 0, {1, 1}, 0, false},
    {"no sinks, gains", 3, 1, 32, 0, 2, {1, 1}, 0, true},
    {"no windows", 1, 2, 16, 0, 0, {1, 1}, 0, false},
    {"2 and 8 bits", 3, 2, 32, 2, 1, {1, 4}, 0, false},
    {"filter", 2, 2, 32, 1, 2, {-1, -1}, 0, false},
    {"filter, no windows", 3, 1, 32, 0, 0, {-1, -1}, 0, false},
};

/* Whether pages turn into another form. */
static inline bool geometry_demotes(const struct geometry *g) { return g->crumbs[0] != 0; }

/* A filter in which every row depends on its own place, on another row and on all other arguments. */
static inline int mix_rows(const void *user, int layer, int kv_head, oscar_side side, int head_dim, const float *rows,
                           float *out) {
  const float shift = *(const float *)user + (float)(layer * 16 + kv_head * 2 + (int)side);
  for (int row = 0; row < PAGE_TOKENS; row++)
    for (int i = 0; i < head_dim; i++)
      out[row * head_dim + i] = rows[row * head_dim + i] + 3 * rows[(PAGE_TOKENS - 1 - row) * head_dim + i] + shift;
  return PAGE_TOKENS;
}
static const float mix_shift = 0.3f;
static const oscar_page_filter mixing_filter = {mix_rows, &mix_shift, 2.5};

/* NULL for a geometry without codecs. */
static inline oscar_codec_set *geometry_codecs(oscar_context *c, const struct geometry *g) {
  if (g->crumbs[0] <= 0) return NULL;
  oscar_codec_set_info info = {g->layers, g->kv_heads, g->head_dim, "test", "", ""};
  oscar_codec_set *set = NULL;
  REQUIRE(oscar_codec_set_create(c, &info, &set) == OSCAR_OK);
  for (int layer = 0; layer < g->layers; layer++)
    for (int side = 0; side < 2; side++) {
      uint8_t crumbs[OSCAR_MAX_HEAD_DIM];
      memset(crumbs, g->crumbs[layer % 2], sizeof crumbs);
      oscar_codec_spec spec = {.head_dim = g->head_dim,
                               .channels = g->head_dim,
                               .form = g->gain ? OSCAR_ROW_GAIN : OSCAR_ROW_SCALE_ZERO,
                               .groups = g->group ? g->head_dim / g->group : 1,
                               .clip_ratio = side == 0 ? 1.0f : 0.9f,
                               .crumbs = crumbs};
      oscar_codec *codec = NULL;
      REQUIRE(oscar_codec_create(c, &spec, &codec) == OSCAR_OK);
      for (int head = 0; head < g->kv_heads; head++)
        REQUIRE(oscar_codec_set_assign(set, layer, head, (oscar_side)side, codec) == OSCAR_OK);
      oscar_codec_release(codec);
    }
  return set;
}

static inline oscar_cache_options geometry_options(const struct geometry *g, const oscar_codec_set *codecs) {
  return (oscar_cache_options){.layers = g->layers,
                               .kv_heads = g->kv_heads,
                               .head_dim = g->head_dim,
                               .sink_pages = g->sink_pages,
                               .recent_pages = g->recent_pages,
                               .codecs = codecs,
                               .filter = g->crumbs[0] < 0 ? &mixing_filter : NULL};
}

/* ---- tokens ---- */

/* A row of a token, [head_dim]: numbers with more bits than BF16 has. */
static inline void token_row(uint64_t tag, int layer, int head, int side, int d, float *row) {
  uint64_t state = tag * 0x9E3779B97F4A7C15u + (uint64_t)(layer * 64 + head * 2 + side);
  for (int i = 0; i < d; i++) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    row[i] = (float)((int32_t)(state >> 32)) * 0x1p-30f;
  }
}

/* [n][kv_heads][head_dim] of one side, to be freed. */
static inline float *token_rows(const struct geometry *g, const uint64_t *tags, int n, int layer, int side) {
  float *rows = malloc(sizeof *rows * (size_t)n * (size_t)(g->kv_heads * g->head_dim));
  REQUIRE(rows);
  for (int t = 0; t < n; t++)
    for (int head = 0; head < g->kv_heads; head++)
      token_row(tags[t], layer, head, side, g->head_dim, rows + (t * g->kv_heads + head) * g->head_dim);
  return rows;
}

/* What a page of `filled` tokens holds, as BF16 [64][head_dim] with zeros after them, and (if it is full) in its coded form. */
static inline size_t reference_page(const struct geometry *g, const oscar_codec_set *codecs, const uint64_t *tags, int filled,
                                    int layer, int head, int side, bool coded, uint8_t *out) {
  size_t d = (size_t)g->head_dim;
  float *rows = calloc(PAGE_TOKENS * d, sizeof *rows);
  uint16_t *bf16 = malloc(PAGE_TOKENS * d * sizeof *bf16);
  REQUIRE(rows && bf16);
  for (int t = 0; t < filled; t++) token_row(tags[t], layer, head, side, g->head_dim, rows + (size_t)t * d);
  for (size_t i = 0; i < PAGE_TOKENS * d; i++) rows[i] = bf16_to_f32(bf16[i] = f32_to_bf16(rows[i]));
  size_t bytes = PAGE_TOKENS * d * sizeof *bf16;
  if (coded && !codecs) {
    float *mixed = malloc(PAGE_TOKENS * d * sizeof *mixed);
    REQUIRE(mixed);
    mix_rows(&mix_shift, layer, head, (oscar_side)side, g->head_dim, rows, mixed);
    for (size_t i = 0; i < PAGE_TOKENS * d; i++) bf16[i] = f32_to_bf16(mixed[i]);
    memcpy(out, bf16, bytes);
    free(mixed);
  } else if (coded) {
    const oscar_codec *codec = oscar_codec_set_get(codecs, layer, head, (oscar_side)side);
    bytes = PAGE_TOKENS * oscar_codec_row_bytes(codec);
    REQUIRE(oscar_codec_encode(codec, 0, PAGE_TOKENS, rows, d, out) == OSCAR_OK);
  } else {
    memcpy(out, bf16, bytes);
  }
  free(bf16);
  free(rows);
  return bytes;
}

/* ---- a sequence and its model ---- */

#define MODEL_TOKENS 2048
#define PAGE_BUFFER  (2 * PAGE_TOKENS * 128)

struct twin {
  oscar_sequence *sequence;
  int64_t length;
  uint64_t tags[MODEL_TOKENS];
  bool coded[MODEL_TOKENS / PAGE_TOKENS + 1]; /* form of each page */
  bool deviates[MODEL_TOKENS];                /* the token was computed over codes that the rule wants exact, or after such */
  int64_t refilled_from;
  int step;     /* tokens of the open step */
  int layers;   /* written in it: 0 .. layers-1 */
  bool doubled; /* views of the step have been compared */
};

struct world {
  oscar_context *context;
  const struct geometry *g;
  oscar_codec_set *codecs;
  oscar_cache *cache;
  struct twin *twins[8];
  uint64_t next_tag;
  int run; /* units of an exact page */
};

static inline int64_t page_count(int64_t tokens) { return (tokens + 63) / 64; }

/* Whether continuing at `length` wants page p exactly. */
static inline bool wants_exact(const struct geometry *g, int64_t p, int64_t length) {
  return p < page_count(length) && (p < g->sink_pages || p + g->recent_pages >= length / 64);
}

static inline bool all_wanted_exact(const struct geometry *g, const struct twin *t, int64_t length, int64_t from) {
  for (int64_t p = from; p < page_count(length); p++)
    if (wants_exact(g, p, length) && t->coded[p]) return false;
  return true;
}

static inline void world_open(struct world *w, oscar_context *context, const struct geometry *g, int64_t tokens, int sequences,
                              int chunk) {
  *w = (struct world){.context = context, .g = g, .next_tag = 1, .run = 1};
  w->codecs = geometry_codecs(context, g);
  oscar_cache_options o = geometry_options(g, w->codecs);
  o.budget_bytes = oscar_cache_bytes_for(&o, tokens, sequences, chunk);
  REQUIRE(o.budget_bytes > 0);
  REQUIRE(oscar_cache_create(context, &o, &w->cache) == OSCAR_OK);
  for (int layer = 0; w->codecs && layer < g->layers; layer++) {
    size_t exact = 256 * (size_t)g->head_dim, unit = 0;
    for (int side = 0; side < 2; side++)
      unit += 64 * oscar_codec_row_bytes(oscar_codec_set_get(w->codecs, layer, 0, (oscar_side)side));
    int run = (int)((exact + unit - 1) / unit);
    if (run > w->run) w->run = run;
  }
}

static inline void world_close(struct world *w) {
  oscar_cache_free(w->cache);
  oscar_codec_set_free(w->codecs);
  for (size_t i = 0; i < ARRAY_LENGTH(w->twins); i++) free(w->twins[i]);
}

/* Compares one page with the model, in every layer and head. */
static inline void compare_page(const struct world *w, const struct twin *t, int64_t p) {
  static uint8_t want[PAGE_BUFFER], k[PAGE_BUFFER], v[PAGE_BUFFER];
  int filled = (int)(t->length - p * 64 < 64 ? t->length - p * 64 : 64);
  for (int layer = 0; layer < w->g->layers; layer++)
    for (int head = 0; head < w->g->kv_heads; head++) {
      bool coded;
      REQUIRE(oscar_sequence_read_page(t->sequence, (int)p, layer, head, &coded, k, v) == OSCAR_OK);
      REQUIRE(coded == t->coded[p]);
      size_t bytes = reference_page(w->g, w->codecs, t->tags + p * 64, filled, layer, head, 0, coded, want);
      REQUIRE(memcmp(k, want, bytes) == 0);
      bytes = reference_page(w->g, w->codecs, t->tags + p * 64, filled, layer, head, 1, coded, want);
      REQUIRE(memcmp(v, want, bytes) == 0);
    }
}

static inline void compare_all(const struct world *w) {
  REQUIRE(oscar_cache_check(w->cache) == OSCAR_OK);
  for (size_t i = 0; i < ARRAY_LENGTH(w->twins); i++) {
    const struct twin *t = w->twins[i];
    if (!t) continue;
    REQUIRE(oscar_sequence_length(t->sequence) == t->length);
    for (int64_t p = 0; p < page_count(t->length); p++) compare_page(w, t, p);
  }
}

/* What attention would see of the open step in its last written layer: every form that some query of the step reads. */
static inline void compare_views(const struct world *w, struct twin *t) {
  static uint8_t want[PAGE_BUFFER], packed[PAGE_BUFFER];
  int layer = t->layers - 1, head = w->g->kv_heads - 1;
  int64_t end = t->length + t->step;
  const struct cache_geometry *g = cache_geometry_of(w->cache);
  REQUIRE(sequence_visible(t->sequence, layer) == end);
  for (int other = t->layers; other < w->g->layers; other++) REQUIRE(sequence_visible(t->sequence, other) == -1);
  for (int64_t p = 0; p < page_count(end); p++) {
    struct page_view view = sequence_page(t->sequence, layer, p);
    bool was_coded = p < page_count(t->length) && t->coded[p];
    for (int64_t q = t->length / 64 > p ? t->length / 64 : p; q <= (end - 1) / 64; q++) {
      bool exact = !geometry_demotes(w->g) || page_reads_exact(g, p, q);
      REQUIRE(exact && !was_coded ? view.exact != NULL : view.coded != NULL);
    }
    int filled = (int)(end - p * 64 < 64 ? end - p * 64 : 64);
    size_t side_size = 64 * 2 * (size_t)w->g->head_dim;
    for (int side = 0; view.exact && side < 2; side++) {
      reference_page(w->g, w->codecs, t->tags + p * 64, filled, layer, head, side, false, want);
      REQUIRE(memcmp(view.exact + (size_t)(2 * head + side) * side_size, want, side_size / 64 * (size_t)filled) == 0);
    }
    for (int side = 0; view.coded && !w->codecs && side < 2; side++) {
      reference_page(w->g, w->codecs, t->tags + p * 64, filled, layer, head, side, true, want);
      REQUIRE(memcmp(view.coded + (size_t)(2 * head + side) * side_size, want, side_size) == 0);
    }
    const uint8_t *at = view.coded;
    for (int side = 0; view.coded && w->codecs && side < 2; side++) {
      /* heads follow each other, keys then values in each; all heads of a layer have the same size */
      struct side_form form[2];
      for (int i = 0; i < 2; i++) form[i] = side_form_of(oscar_codec_set_get(w->codecs, layer, head, (oscar_side)i));
      if (side == 0) at += (size_t)head * (side_bytes(&form[0]) + side_bytes(&form[1]));
      page_unpack(&form[side], (oscar_side)side, at, packed);
      at += side_bytes(&form[side]);
      size_t bytes = reference_page(w->g, w->codecs, t->tags + p * 64, filled, layer, head, side, true, want);
      REQUIRE(memcmp(packed, want, bytes) == 0);
    }
  }
}

/* ---- operations, on cache and model alike; NO_SPACE must leave the cache as it was ---- */

struct picture {
  oscar_cache_usage usage;
};

static inline struct picture picture_of(const struct world *w) {
  struct picture p;
  oscar_cache_usage_get(w->cache, &p.usage);
  return p;
}

static inline void require_unchanged(const struct world *w, const struct picture *before) {
  struct picture now = picture_of(w);
  REQUIRE(now.usage.held_bytes == before->usage.held_bytes && now.usage.free_units == before->usage.free_units);
  REQUIRE(now.usage.peak_held_bytes == before->usage.peak_held_bytes);
  REQUIRE(now.usage.exact_pages == before->usage.exact_pages && now.usage.coded_pages == before->usage.coded_pages);
}

static inline struct twin *twin_create(struct world *w) {
  struct picture before = picture_of(w);
  struct twin *t = calloc(1, sizeof *t);
  REQUIRE(t);
  oscar_status status = oscar_sequence_create(w->cache, &t->sequence);
  if (status == OSCAR_OK) return t;
  REQUIRE(status == OSCAR_NO_SPACE);
  require_unchanged(w, &before);
  free(t);
  return NULL;
}

static inline struct twin *twin_fork(struct world *w, const struct twin *of) {
  struct picture before = picture_of(w);
  oscar_sequence *copy;
  oscar_status status = oscar_sequence_fork(of->sequence, &copy);
  if (status != OSCAR_OK) {
    REQUIRE(status == OSCAR_NO_SPACE && copy == NULL);
    REQUIRE(before.usage.free_units <= w->run); /* a copied page, or tables that do not fit beside one */
    require_unchanged(w, &before);
    return NULL;
  }
  struct twin *t = malloc(sizeof *t);
  REQUIRE(t);
  *t = *of;
  t->sequence = copy;
  return t;
}

static inline void twin_free(struct twin *t) {
  oscar_sequence_free(t->sequence);
  free(t);
}

/* false: no space, or more tokens than the model has room for. */
static inline bool twin_begin(struct world *w, struct twin *t, int n) {
  int64_t end = t->length + n;
  if (end > MODEL_TOKENS) return false;
  struct picture before = picture_of(w);
  oscar_status status = oscar_sequence_begin(t->sequence, n);
  if (status != OSCAR_OK) {
    int64_t units = (page_count(end) - page_count(t->length)) * w->run + 1;
    for (int64_t p = w->g->sink_pages; geometry_demotes(w->g) && p + w->g->recent_pages < (end - 1) / 64; p++)
      units += p >= page_count(t->length) || !t->coded[p];
    REQUIRE(status == OSCAR_NO_SPACE && before.usage.free_units < units);
    require_unchanged(w, &before);
    return false;
  }
  for (int i = 0; i < n; i++) t->tags[t->length + i] = w->next_tag++;
  t->step = n;
  t->layers = 0;
  return true;
}

static inline void twin_write(struct world *w, struct twin *t) {
  float *k = token_rows(w->g, t->tags + t->length, t->step, t->layers, 0);
  float *v = token_rows(w->g, t->tags + t->length, t->step, t->layers, 1);
  REQUIRE(oscar_sequence_write(t->sequence, t->layers, k, v) == OSCAR_OK);
  free(k);
  free(v);
  t->layers++;
}

static inline void twin_commit(struct world *w, struct twin *t) {
  REQUIRE(oscar_sequence_commit(t->sequence) == OSCAR_OK);
  const struct geometry *g = w->g;
  for (int64_t i = t->length; i < t->length + t->step; i++) {
    t->deviates[i] = i > 0 && t->deviates[i - 1];
    /* pages that are codes before the step and that this token wants exactly */
    for (int64_t p = g->sink_pages; p < page_count(t->length); p++)
      if (t->coded[p] && p <= i / 64 && p + g->recent_pages >= i / 64) t->deviates[i] = true;
  }
  for (int64_t p = page_count(t->length); p < page_count(t->length + t->step); p++) t->coded[p] = false;
  t->length += t->step;
  t->step = 0;
  for (int64_t p = g->sink_pages; geometry_demotes(g) && p + g->recent_pages < (t->length - 1) / 64; p++) t->coded[p] = true;
}

static inline void twin_abort(struct world *w, struct twin *t) {
  (void)w;
  oscar_sequence_abort(t->sequence);
  t->step = 0;
}

/* Begin to commit; false: no space. */
static inline bool twin_feed(struct world *w, struct twin *t, int n) {
  if (!twin_begin(w, t, n)) return false;
  for (int layer = 0; layer < w->g->layers; layer++) twin_write(w, t);
  twin_commit(w, t);
  return true;
}

/* Where a rewind to `length` resumes. */
static inline int64_t twin_resume(const struct world *w, const struct twin *t, int64_t length, oscar_rewind mode) {
  const struct geometry *g = w->g;
  int64_t want = length;
  if (mode == OSCAR_REWIND_EXACT) {
    while (want > 0 && (t->deviates[want - 1] || !all_wanted_exact(g, t, want, 0))) want--;
  } else {
    int64_t from = length >= t->refilled_from * 64 ? t->refilled_from : 0;
    for (int64_t p = page_count(length) - 1; p >= from; p--)
      if (wants_exact(g, p, length) && t->coded[p]) want = p * 64;
  }
  return want;
}

static inline void twin_cut(struct world *w, struct twin *t, int64_t length, int64_t resume) {
  t->length = resume;
  if (all_wanted_exact(w->g, t, resume, 0))
    t->refilled_from = 0;
  else if (resume < length)
    t->refilled_from = resume / 64;
}

static inline bool twin_truncate(struct world *w, struct twin *t, int64_t length, oscar_rewind mode) {
  const int64_t want = twin_resume(w, t, length, mode);
  struct picture before = picture_of(w);
  int64_t resume = -1;
  oscar_status status = oscar_sequence_truncate(t->sequence, length, mode, &resume);
  if (status != OSCAR_OK) {
    REQUIRE(status == OSCAR_NO_SPACE && before.usage.free_units < w->run);
    require_unchanged(w, &before);
    return false;
  }
  REQUIRE(resume == want && oscar_sequence_length(t->sequence) == want);
  twin_cut(w, t, length, want);
  return true;
}

/* ---- a run of operations chosen by `choose` (a number below its argument) ---- */

typedef uint32_t chooser(void *user, uint32_t below);

static inline int choose_tokens(chooser *choose, void *user) {
  switch (choose(user, 5)) {
  case 0:
    return 1;
  case 4:
    return 64; /* keeps to page boundaries, where forks share everything */
  case 1:
    return 1 + (int)choose(user, 8);
  case 2:
    return 1 + (int)choose(user, 128);
  default:
    return 1 + (int)choose(user, 400);
  }
}

static inline void operate_on(struct world *w, struct twin **slot, chooser *choose, void *user) {
  struct twin *t = *slot;
  if (t->step > 0) {
    uint32_t what = choose(user, 8);
    if (what == 0) {
      twin_abort(w, t);
    } else if (t->layers < w->g->layers) {
      twin_write(w, t);
      if (what == 1) compare_views(w, t);
    } else {
      twin_commit(w, t);
    }
    return;
  }
  switch (choose(user, 16)) {
  case 0:
  case 9: {
    size_t free_slot = 0;
    while (free_slot < ARRAY_LENGTH(w->twins) && w->twins[free_slot]) free_slot++;
    if (free_slot < ARRAY_LENGTH(w->twins)) w->twins[free_slot] = twin_fork(w, t);
    break;
  }
  case 1:
    twin_free(t);
    *slot = NULL;
    break;
  case 2:
    twin_truncate(w, t, (int64_t)choose(user, (uint32_t)t->length + 1), OSCAR_REWIND_EXACT);
    break;
  case 3:
    twin_truncate(w, t, (int64_t)choose(user, (uint32_t)t->length + 1), OSCAR_REWIND_REFILL);
    break;
  case 4: {
    int64_t back = (int64_t)choose(user, choose(user, 2) ? 8 : 200); /* as speculative decoding and edits do */
    twin_truncate(w, t, t->length > back ? t->length - back : 0, choose(user, 2) ? OSCAR_REWIND_EXACT : OSCAR_REWIND_REFILL);
    break;
  }
  case 5:
    if (t->length > 0) compare_page(w, t, (int64_t)choose(user, (uint32_t)page_count(t->length)));
    break;
  case 6:
  case 7:
  case 8:
    twin_begin(w, t, choose_tokens(choose, user));
    break;
  default:
    twin_feed(w, t, choose_tokens(choose, user));
    break;
  }
}

static inline void operate(struct world *w, chooser *choose, void *user) {
  struct twin **slot = &w->twins[choose(user, ARRAY_LENGTH(w->twins))];
  if (*slot)
    operate_on(w, slot, choose, user);
  else if (choose(user, 2))
    *slot = twin_create(w);
}

#endif
