/*
 * tests/engine/fake_model.h - a model without weights, in place of the one that calibration and the rotation store call: bytes
 * are tokens, and attention inputs are made up from token, position and layer. It runs in microseconds, counts what is asked of
 * it and can be told to break.
 *
 * The functions below have the names of the real ones; the linker takes them before it looks into the libraries.
 */
#ifndef OSCAR_FAKE_MODEL_H
#define OSCAR_FAKE_MODEL_H

#include "engine/calibrate.h"
#include "support.h"

enum { FAKE_LAYERS = 2, FAKE_QUERY_HEADS = 4, FAKE_KV_HEADS = 2, FAKE_DIM = 16, FAKE_CONTEXT = 100 };

struct model {
  oscar_context *context;
  struct model_geometry geometry;
  char fingerprint[65];
  int32_t bos; /* -1: none */
  bool broken; /* the last layer gives NaN */

  int64_t fed;           /* tokens run through it, all calls without logits */
  int probes;            /* calls with logits */
  int sequences, open;   /* made, not yet freed */
  int longest;           /* tokens in one sequence */
  int largest_chunk;     /* tokens in one call */
  int without_bos;       /* sequences that did not begin with it */
  int32_t first_ids[64]; /* of the sequences, in their order */
};
struct oscar_cache {
  oscar_context *context;
};
struct oscar_sequence {
  oscar_context *context;
  int64_t length;
};
struct runner {
  struct model *model;
};
static struct model *fake; /* the one in use: cache and tokenizer calls do not say which */

static void fake_model_init(struct model *model, oscar_context *context) {
  *model = (struct model){.context = context, .bos = -1};
  model->geometry = (struct model_geometry){.name = "Fake",
                                            .layers = FAKE_LAYERS,
                                            .query_heads = FAKE_QUERY_HEADS,
                                            .kv_heads = FAKE_KV_HEADS,
                                            .head_dim = FAKE_DIM,
                                            .vocab = 256,
                                            .context_trained = FAKE_CONTEXT};
  memset(model->fingerprint, 'a', 64);
  fake = model;
}

oscar_context *model_context(const struct model *m) { return m->context; }
const struct model_geometry *model_geometry_of(const struct model *m) { return &m->geometry; }
const char *model_fingerprint(const struct model *m) { return m->fingerprint; }
const struct tokenizer *model_tokenizer(const struct model *m) { return (const struct tokenizer *)(const void *)m; }
void model_cache_options(const struct model *m, oscar_cache_options *options) {
  *options =
      (oscar_cache_options){.layers = m->geometry.layers, .kv_heads = m->geometry.kv_heads, .head_dim = m->geometry.head_dim};
}

int model_layer_window(const struct model *m, int layer) {
  (void)m, (void)layer;
  return 0;
}
oscar_status model_layer_rope(const struct model *m, int layer, oscar_rope **rope) {
  float frequencies[FAKE_DIM / 2];
  (void)layer;
  for (int i = 0; i < FAKE_DIM / 2; i++) frequencies[i] = (float)pow(100, -2.0 * i / FAKE_DIM);
  return oscar_rope_create(m->context, &(oscar_rope_spec){OSCAR_ROPE_HALVES, FAKE_DIM, frequencies}, rope);
}
oscar_status model_output_gram(const struct model *m, int layer, float *gram) {
  (void)m;
  for (int i = 0; i < FAKE_QUERY_HEADS * FAKE_DIM * FAKE_DIM; i++)
    gram[i] = i / FAKE_DIM % FAKE_DIM == i % FAKE_DIM ? (float)(layer + 1) : 0;
  return OSCAR_OK;
}

int32_t tokenizer_bos(const struct tokenizer *tokenizer) { return ((const struct model *)(const void *)tokenizer)->bos; }
bool tokenizer_adds_bos(const struct tokenizer *tokenizer) { return tokenizer_bos(tokenizer) >= 0; }
oscar_status tokenizer_encode(const struct tokenizer *tokenizer, const char *text, size_t bytes, bool parse_special,
                              int32_t **ids, int *count) {
  assert_false(parse_special); /* text, not a conversation */
  *ids = mem_alloc(((const struct model *)(const void *)tokenizer)->context, bytes, sizeof **ids);
  if (!*ids) return OSCAR_NO_MEMORY;
  for (size_t i = 0; i < bytes; i++) (*ids)[i] = (unsigned char)text[i];
  *count = (int)bytes;
  return OSCAR_OK;
}

size_t oscar_cache_bytes_for(const oscar_cache_options *options, int64_t tokens, int sequences, int chunk) {
  assert_null(options->codecs);
  assert_int_equal(sequences, 1);
  assert_true(tokens <= FAKE_CONTEXT && chunk <= tokens);
  return 1;
}
oscar_status oscar_cache_create(oscar_context *context, const oscar_cache_options *options, oscar_cache **cache) {
  assert_int_equal(options->budget_bytes, 1);
  *cache = mem_alloc(context, 1, sizeof **cache);
  if (!*cache) return OSCAR_NO_MEMORY;
  (*cache)->context = context;
  return OSCAR_OK;
}
void oscar_cache_free(oscar_cache *cache) {
  if (cache) mem_free(cache->context, cache);
}

oscar_status oscar_sequence_create(oscar_cache *cache, oscar_sequence **sequence) {
  *sequence = mem_zalloc(cache->context, 1, sizeof **sequence);
  if (!*sequence) return OSCAR_NO_MEMORY;
  (*sequence)->context = cache->context;
  fake->sequences++;
  fake->open++;
  return OSCAR_OK;
}
void oscar_sequence_free(oscar_sequence *sequence) {
  if (!sequence) return;
  fake->open--;
  mem_free(sequence->context, sequence);
}

oscar_status runner_create(struct model *model, oscar_cache *cache, int max_chunk, struct runner **runner) {
  (void)cache;
  assert_true(max_chunk <= FAKE_CONTEXT);
  *runner = mem_alloc(model->context, 1, sizeof **runner);
  if (!*runner) return OSCAR_NO_MEMORY;
  (*runner)->model = model;
  return OSCAR_OK;
}
void runner_free(struct runner *runner) {
  if (runner) mem_free(runner->model->context, runner);
}

enum { FAKE_ROW = FAKE_QUERY_HEADS * FAKE_DIM };

static void fake_rows(uint64_t seed, int n, const int32_t *ids, int64_t start, int width, float *rows) {
  for (int t = 0; t < n; t++) {
    uint64_t state = seed ^ (uint64_t)ids[t] << 32 ^ (uint64_t)(start + t);
    for (int i = 0; i < width; i++) rows[t * width + i] = test_normal(&state);
  }
}

oscar_status runner_forward(struct runner *runner, oscar_sequence *sequence, int n, const int32_t *ids, int outputs,
                            float *logits, const struct forward_observer *observer) {
  static float q[FAKE_CONTEXT * FAKE_ROW], k[FAKE_CONTEXT * FAKE_ROW], v[FAKE_CONTEXT * FAKE_ROW], o[FAKE_CONTEXT * FAKE_ROW];
  struct model *m = runner->model;
  float heard = 0; /* of the outputs, by what follows: noise in them shows in the logits */
  if (sequence->length == 0 && m->sequences <= 64) m->first_ids[m->sequences - 1] = ids[0];
  if (sequence->length == 0 && m->bos >= 0 && ids[0] != m->bos) m->without_bos++;
  for (int layer = 0; layer < FAKE_LAYERS; layer++) {
    uint64_t seed = (uint64_t)layer * 4 + 1000;
    fake_rows(seed, n, ids, sequence->length, FAKE_ROW, q);
    fake_rows(seed + 1, n, ids, sequence->length, FAKE_KV_HEADS * FAKE_DIM, k);
    fake_rows(seed + 2, n, ids, sequence->length, FAKE_KV_HEADS * FAKE_DIM, v);
    fake_rows(seed + 3, n, ids, sequence->length, FAKE_ROW, o);
    if (m->broken && layer == FAKE_LAYERS - 1) k[3] = NAN;
    oscar_status status = observer ? observer->attention(observer->user, layer, n, q, k, v, o) : OSCAR_OK;
    if (status != OSCAR_OK) return status;
    for (int i = 0; i < n * FAKE_ROW; i++) heard += o[i] * (float)(layer + 1);
  }
  assert_int_equal(logits != NULL, outputs > 0);
  for (int i = 0; i < outputs * m->geometry.vocab; i++) logits[i] = sinf((float)i + heard);
  if (outputs) m->probes++; /* what was measured of the layers is counted apart from the text */
  if (outputs) return OSCAR_OK;
  m->fed += n;
  sequence->length += n;
  if (sequence->length > m->longest) m->longest = (int)sequence->length;
  if (n > m->largest_chunk) m->largest_chunk = n;
  return OSCAR_OK;
}

#endif
