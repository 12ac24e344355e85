/*
 * forward.c - the forward pass, written once over the backend's table of operations.
 *
 * A runner owns the activations of one stream of chunks. Per layer: normed input -> q, k, v -> RoPE -> K and V into the cache ->
 * attention over the cache -> output product -> feed-forward. The residual stream stays in float. Shapes are [tokens][features].
 * Only the last `outputs` tokens go through the output product, in slices, so that a large vocabulary does not size a buffer of
 * its own.
 */
#include "model/model_private.h"

#include "base/team.h"

#include <math.h>

/* Rows of logits computed per product: enough for the product library, small enough that dequantized panels dominate. */
#define LOGIT_ROWS 256

struct runner {
  struct model *model;
  oscar_cache *cache;
  oscar_attention *attention;
  int max_chunk;
  float *x, *h, *q, *k, *v, *o, *gate, *up; /* max_chunk rows each */
  float *logits;                            /* LOGIT_ROWS rows; only where buffers are not host memory */
  int32_t *positions;
};

struct buffer_size {
  float **buffer;
  size_t floats;
};

static int chunk_buffers(struct runner *r, const struct model_geometry *g, int n, struct buffer_size sizes[8]) {
  const size_t rows = (size_t)n, e = (size_t)g->embedding, f = (size_t)g->feed_forward;
  const size_t q = (size_t)g->query_heads * (size_t)g->head_dim, kv = (size_t)g->kv_heads * (size_t)g->head_dim;
  const struct buffer_size all[8] = {{&r->x, rows * e},  {&r->h, rows * e}, {&r->q, rows * q},    {&r->k, rows * kv},
                                     {&r->v, rows * kv}, {&r->o, rows * q}, {&r->gate, rows * f}, {&r->up, rows * f}};
  for (int i = 0; i < 8; i++) sizes[i] = all[i];
  return 8;
}

size_t model_scratch_bytes(const struct model *m, int n, int outputs) {
  struct runner layout = {0};
  struct buffer_size sizes[8];
  size_t floats = 0;
  int count = chunk_buffers(&layout, &m->parameters.geometry, n, sizes);
  for (int i = 0; i < count; i++) floats += sizes[i].floats;
  const struct layer_weights *w = m->weights.layers;
  const struct weight *const products[] = {&w->q, &w->k, &w->v, &w->output, &w->gate, &w->up, &w->down};
  size_t largest = 0;
  for (size_t i = 0; i < ARRAY_LENGTH(products); i++) {
    size_t bytes = m->backend->ops->product_scratch(m->backend, products[i], n);
    if (bytes > largest) largest = bytes;
  }
  return 4 * (floats + (size_t)outputs * (size_t)m->parameters.geometry.vocab) + largest;
}

oscar_status runner_create(struct model *model, oscar_cache *cache, int max_chunk, struct runner **runner) {
  *runner = NULL;
  oscar_context *context = model->context;
  struct backend *be = model->backend;
  const struct model_geometry *g = &model->parameters.geometry;
  if (max_chunk < 1) return set_error(context, OSCAR_INVALID_ARGUMENT, "a chunk of %d tokens; expected at least 1", max_chunk);
  struct runner *r = mem_zalloc(context, 1, sizeof *r);
  if (!r) return OSCAR_NO_MEMORY;
  r->model = model;
  r->cache = cache;
  r->max_chunk = max_chunk;
  struct buffer_size sizes[8];
  int count = chunk_buffers(r, g, max_chunk, sizes);
  oscar_status status = OSCAR_OK;
  for (int i = 0; i < count && status == OSCAR_OK; i++) status = be->ops->buffer_alloc(be, sizes[i].floats, sizes[i].buffer);
  if (status == OSCAR_OK && !be->ops->host_memory)
    status = be->ops->buffer_alloc(be, (size_t)LOGIT_ROWS * (size_t)g->vocab, &r->logits);
  const oscar_attention_options attention = {.query_heads = g->query_heads};
  if (status == OSCAR_OK) status = oscar_attention_create(cache, &attention, &r->attention);
  if (status == OSCAR_OK && !(r->positions = mem_alloc(context, (size_t)max_chunk, sizeof *r->positions)))
    status = OSCAR_NO_MEMORY;
  if (status != OSCAR_OK) {
    runner_free(r);
    return status;
  }
  *runner = r;
  return OSCAR_OK;
}

void runner_free(struct runner *r) {
  if (!r) return;
  struct backend *be = r->model->backend;
  struct buffer_size sizes[8];
  int count = chunk_buffers(r, &r->model->parameters.geometry, r->max_chunk, sizes);
  for (int i = 0; i < count; i++)
    if (*sizes[i].buffer) be->ops->buffer_free(be, *sizes[i].buffer);
  if (r->logits) be->ops->buffer_free(be, r->logits);
  oscar_attention_free(r->attention);
  mem_free(r->model->context, r->positions);
  mem_free(r->model->context, r);
}

static const float *vector_of(const struct weight *w) { return w->data; }

static oscar_status product(struct backend *be, const struct weight *w, int n, const float *x, float *y) {
  const float *no_bias = NULL;
  return be->ops->matmul(be, 1, &w, &no_bias, n, x, &y);
}

static oscar_status project_qkv(const struct runner *r, const struct layer_weights *w, const struct rope_spec *rope, int n) {
  const struct model *m = r->model;
  struct backend *be = m->backend;
  const struct model_geometry *g = &m->parameters.geometry;
  const float eps = m->parameters.norm_eps;
  const struct weight *weights[3] = {&w->q, &w->k, &w->v};
  const float *bias[3] = {vector_of(&w->q_bias), vector_of(&w->k_bias), vector_of(&w->v_bias)};
  float *const out[3] = {r->q, r->k, r->v};
  oscar_status status = be->ops->matmul(be, 3, weights, bias, n, r->h, out);
  if (status != OSCAR_OK) return status;
  if (w->q_norm.data) {
    be->ops->rms_norm(be, (int64_t)n * g->query_heads, g->head_dim, r->q, vector_of(&w->q_norm), eps, r->q);
    be->ops->rms_norm(be, (int64_t)n * g->kv_heads, g->head_dim, r->k, vector_of(&w->k_norm), eps, r->k);
  }
  status = be->ops->rope(be, rope, n, g->query_heads, g->head_dim, r->positions, r->q);
  if (status == OSCAR_OK) status = be->ops->rope(be, rope, n, g->kv_heads, g->head_dim, r->positions, r->k);
  return status;
}

static oscar_status attention_block(const struct runner *r, oscar_sequence *sequence, int layer, int n,
                                    const struct forward_observer *observer) {
  const struct model *m = r->model;
  struct backend *be = m->backend;
  const struct layer_weights *w = &m->weights.layers[layer];
  const struct model_geometry *g = &m->parameters.geometry;
  const float eps = m->parameters.norm_eps;
  const int window = layer_window(m->architecture, &m->parameters, layer);
  const struct rope_spec *rope = window ? &m->parameters.window_rope : &m->parameters.rope;

  be->ops->rms_norm(be, n, g->embedding, r->x, vector_of(&w->attention_norm), eps, r->h);
  oscar_status status = project_qkv(r, w, rope, n);
  if (status == OSCAR_OK) status = oscar_sequence_write(sequence, layer, r->k, r->v);
  if (status != OSCAR_OK) return status;
  const oscar_attention_job job = {.sequence = sequence, .n = n, .q = r->q, .out = r->o};
  status = oscar_attention_run(r->attention, layer, window, &job, 1);
  if (status == OSCAR_OK && observer) {
    team_before_openmp(m->context); /* which observers use */
    status = observer->attention(observer->user, layer, n, r->q, r->k, r->v, r->o);
  }
  if (status == OSCAR_OK) status = product(be, &w->output, n, r->o, r->h);
  if (status != OSCAR_OK) return status;
  if (w->post_attention_norm.data) be->ops->rms_norm(be, n, g->embedding, r->h, vector_of(&w->post_attention_norm), eps, r->h);
  be->ops->add(be, (size_t)n * (size_t)g->embedding, r->x, r->h);
  return OSCAR_OK;
}

static oscar_status feed_forward_block(const struct runner *r, int layer, int n) {
  const struct model *m = r->model;
  struct backend *be = m->backend;
  const struct layer_weights *w = &m->weights.layers[layer];
  const struct model_geometry *g = &m->parameters.geometry;
  const float eps = m->parameters.norm_eps;
  const struct weight *weights[2] = {&w->gate, &w->up};
  const float *const no_bias[2] = {NULL, NULL};
  float *const out[2] = {r->gate, r->up};

  be->ops->rms_norm(be, n, g->embedding, r->x, vector_of(&w->feed_forward_norm), eps, r->h);
  oscar_status status = be->ops->matmul(be, 2, weights, no_bias, n, r->h, out);
  if (status != OSCAR_OK) return status;
  const size_t count = (size_t)n * (size_t)g->feed_forward;
  if (m->architecture->activation == ACTIVATION_SILU)
    be->ops->silu_mul(be, count, r->gate, r->up);
  else
    be->ops->gelu_mul(be, count, r->gate, r->up);
  status = product(be, &w->down, n, r->gate, r->h);
  if (status != OSCAR_OK) return status;
  if (w->post_feed_forward_norm.data)
    be->ops->rms_norm(be, n, g->embedding, r->h, vector_of(&w->post_feed_forward_norm), eps, r->h);
  be->ops->add(be, (size_t)n * (size_t)g->embedding, r->x, r->h);
  return OSCAR_OK;
}

/* logits [outputs][vocab] of the last `outputs` rows of x */
static oscar_status output_block(const struct runner *r, int n, int outputs, float *logits) {
  const struct model *m = r->model;
  struct backend *be = m->backend;
  const struct model_geometry *g = &m->parameters.geometry;
  const size_t e = (size_t)g->embedding, vocab = (size_t)g->vocab;
  const float *last = r->x + (size_t)(n - outputs) * e;
  be->ops->rms_norm(be, outputs, g->embedding, last, vector_of(&m->weights.output_norm), m->parameters.norm_eps, r->h);
  for (int done = 0; done < outputs; done += LOGIT_ROWS) {
    int rows = outputs - done < LOGIT_ROWS ? outputs - done : LOGIT_ROWS;
    float *host = logits + (size_t)done * vocab, *to = be->ops->host_memory ? host : r->logits;
    oscar_status status = product(be, &m->weights.output, rows, r->h + (size_t)done * e, to);
    if (status == OSCAR_OK && to != host) status = be->ops->download(be, host, to, (size_t)rows * vocab);
    if (status != OSCAR_OK) return status;
  }
  return OSCAR_OK;
}

/* x = rows of the embedding */
static oscar_status embedding_block(const struct runner *r, int n, const int32_t *ids) {
  const struct model *m = r->model;
  const struct weight *table = &m->weights.embedding;
  oscar_status status = OSCAR_OK;
  for (int done = 0; done < n && status == OSCAR_OK; done += EMBEDDED_TOKENS) {
    int rows = n - done < EMBEDDED_TOKENS ? n - done : EMBEDDED_TOKENS;
    status = m->backend->ops->embed(m->backend, table, rows, ids + done, r->x + (size_t)done * (size_t)table->cols);
    if (embedding_is_read_by_rows(m)) gguf_release(m->file, table->data, embedding_bytes(m));
  }
  return status;
}

static oscar_status run_layers(const struct runner *r, oscar_sequence *sequence, int n, const int32_t *ids, int outputs,
                               float *logits, const struct forward_observer *observer) {
  const struct model *m = r->model;
  struct backend *be = m->backend;
  oscar_status status = embedding_block(r, n, ids);
  if (status != OSCAR_OK) return status;
  if (m->architecture->scaled_embedding) {
    size_t count = (size_t)n * (size_t)m->parameters.geometry.embedding;
    be->ops->scale(be, count, r->x, sqrtf((float)m->parameters.geometry.embedding));
  }
  for (int layer = 0; layer < m->parameters.geometry.layers; layer++) {
    if ((status = attention_block(r, sequence, layer, n, observer)) != OSCAR_OK) return status;
    if ((status = feed_forward_block(r, layer, n)) != OSCAR_OK) return status;
  }
  return outputs ? output_block(r, n, outputs, logits) : OSCAR_OK;
}

oscar_status runner_forward(struct runner *r, oscar_sequence *sequence, int n, const int32_t *ids, int outputs, float *logits,
                            const struct forward_observer *observer) {
  oscar_context *context = r->model->context;
  const int vocab = r->model->parameters.geometry.vocab;
  if (n < 1 || n > r->max_chunk || outputs < 0 || outputs > n)
    return set_error(context, OSCAR_INVALID_ARGUMENT, "a step of %d tokens with %d outputs; expected 1 to %d tokens", n, outputs,
                     r->max_chunk);
  for (int i = 0; i < n; i++)
    if (ids[i] < 0 || ids[i] >= vocab)
      return set_error(context, OSCAR_INVALID_ARGUMENT, "token id %d is outside the vocabulary of %d", ids[i], vocab);
  const int64_t start = oscar_sequence_length(sequence);
  if (start + n > INT32_MAX) return set_error(context, OSCAR_INVALID_ARGUMENT, "a sequence of more than 2^31 tokens");
  for (int i = 0; i < n; i++) r->positions[i] = (int32_t)(start + i);

  oscar_status status = oscar_sequence_begin(sequence, n);
  if (status != OSCAR_OK) return status;
  status = run_layers(r, sequence, n, ids, outputs, logits, observer);
  if (status == OSCAR_OK) status = oscar_sequence_commit(sequence);
  if (status != OSCAR_OK) oscar_sequence_abort(sequence);
  team_before_openmp(context); /* with which callers look at the logits */
  return status;
}
