/*
 * forward.c - the forward pass, written once over the backend's table of operations.
 *
 * A runner owns the activations of one stream of steps. A step is the next tokens of one sequence or of several, one after the
 * other in the same rows. Per layer: normed input -> q, k, v -> RoPE -> K and V into the cache -> attention over the cache ->
 * output product -> feed-forward. The residual stream stays in float. Shapes are [tokens][features]. Only tokens whose logits are
 * wanted go through the output product, in slices, so that a large vocabulary does not size a buffer of its own.
 *
 * Products round differently for few tokens and for many, so which tokens share one is decided here: with a backend whose results
 * depend on it, sequences share products only while all of them get the bits that they would get alone (spans). Where jobs say
 * what their tokens are, all of a kind share one product of that kind's rounding.
 *
 * On a GPU nothing waits between the upload of a step's ids and positions and the download of its logits. While decoding, when
 * every sequence has one token, all that changes from step to step is uploaded first and the kernels after it are the same ones:
 * they are recorded and replayed (model/recordings.h), and rotating heads and writing rows belong to attention's first kernel.
 */
#include "model/model_private.h"

#include "attention/step.h"
#include "base/team.h"
#include "cache/device_step.h"
#include "model/recordings.h"

#include <math.h>
#include <string.h>

/* Rows of logits computed per product: enough for the product library, small enough that dequantized panels dominate. */
#define LOGIT_ROWS 256

/* Rows of activations that go through products together. */
struct span {
  int first, n;
  enum product_rounding rounding;
};

/* Activations where the host can read them, for observers: rows of q, k, v and o. */
struct host_rows {
  float *q, *k, *v, *o;
};

struct runner {
  struct model *model;
  oscar_cache *cache;
  oscar_attention *attention;
  int max_chunk;
  float *x, *h, *qkv, *o, *between;     /* max_chunk rows each */
  float *q, *k, *v;                     /* in qkv: one after the other, all rows each; a step that decodes has its rows whole */
  float *logits;                        /* LOGIT_ROWS rows at most; only where buffers are not host memory */
  int32_t *tokens;                      /* [2 max_chunk]: ids of a step, then its positions */
  float *device_tokens;                 /* the same as a buffer, where buffers are not host memory */
  float *device_sampling, *device_next; /* there: [max_chunk] struct sampling, and what is chosen */
  struct host_rows observed;            /* made for the first observer there */
  int windows[STEP_WINDOWS], n_windows; /* that layers have */
  struct recordings recordings;
  bool records;

  /* of the step that runs */
  const struct forward_job *jobs;
  int count, n;                         /* jobs; tokens of all */
  const int32_t *ids, *positions;       /* [n], in the backend's memory */
  struct span *spans, *output_spans;    /* room for a span per job each */
  int n_spans, n_output_spans, outputs; /* outputs: rows of logits of all */
  oscar_attention_job *attention_jobs;
  oscar_sequence **sequences; /* of the jobs */
  int room;                   /* jobs that there is room for */
  bool decodes;               /* one token of each sequence, on a GPU, without an observer */
  struct device_step places;
  struct head_rotation rotations[STEP_WINDOWS]; /* of layers without a window, and with one */
  const struct sampling *sampling;              /* [count], or NULL: logits are wanted */
  int64_t host_ns, waited_ns, attention_ns;
};

struct buffer_size {
  float **buffer;
  size_t floats;
};

enum { CHUNK_BUFFERS = 5 };

static size_t query_width(const struct model_geometry *g) { return (size_t)g->query_heads * (size_t)g->head_dim; }
static size_t kv_width(const struct model_geometry *g) { return (size_t)g->kv_heads * (size_t)g->head_dim; }

static void chunk_buffers(struct runner *r, const struct model_geometry *g, int n, struct buffer_size sizes[CHUNK_BUFFERS]) {
  const size_t rows = (size_t)n, e = (size_t)g->embedding, q = query_width(g);
  const struct buffer_size all[CHUNK_BUFFERS] = {{&r->x, rows * e},
                                                 {&r->h, rows * e},
                                                 {&r->qkv, rows * (q + 2 * kv_width(g))},
                                                 {&r->o, rows * q},
                                                 {&r->between, rows * 2 * (size_t)g->feed_forward}};
  for (int i = 0; i < CHUNK_BUFFERS; i++) sizes[i] = all[i];
}

static int logit_rows(int max_chunk) { return max_chunk < LOGIT_ROWS ? max_chunk : LOGIT_ROWS; }

size_t model_scratch_bytes(const struct model *m, int n, int outputs) {
  struct runner layout = {0};
  struct buffer_size sizes[CHUNK_BUFFERS];
  size_t floats = 0;
  chunk_buffers(&layout, &m->parameters.geometry, n, sizes);
  for (int i = 0; i < CHUNK_BUFFERS; i++) floats += sizes[i].floats;
  const struct layer_weights *w = m->weights.layers;
  const struct weight *const products[] = {&w->q, &w->k, &w->v, &w->output, &w->gate, &w->up, &w->down};
  size_t largest = 0;
  for (size_t i = 0; i < ARRAY_LENGTH(products); i++) {
    size_t bytes = m->backend->ops->product_scratch(m->backend, products[i], n);
    if (bytes > largest) largest = bytes;
  }
  if (!m->backend->ops->host_memory) outputs += logit_rows(n);
  return 4 * (floats + (size_t)outputs * (size_t)m->parameters.geometry.vocab) + largest;
}

/* Room for the descriptions of so many jobs. */
static oscar_status make_room(struct runner *r, int count) {
  if (count <= r->room) return OSCAR_OK;
  oscar_context *context = r->model->context;
  struct span *spans = mem_alloc(context, 2 * (size_t)count, sizeof *spans);
  oscar_attention_job *jobs = spans ? mem_alloc(context, (size_t)count, sizeof *jobs) : NULL;
  oscar_sequence **sequences = jobs ? mem_alloc(context, (size_t)count, sizeof(oscar_sequence *)) : NULL;
  if (!sequences) {
    mem_free(context, jobs);
    mem_free(context, spans);
    return OSCAR_NO_MEMORY;
  }
  mem_free(context, r->spans);
  mem_free(context, r->attention_jobs);
  mem_free(context, r->sequences);
  r->sequences = sequences;
  r->spans = spans;
  r->output_spans = spans + count;
  r->attention_jobs = jobs;
  r->room = count;
  return OSCAR_OK;
}

/* Everything that a step takes from the backend is taken before the first. */
static oscar_status make_buffers(struct runner *r) {
  const struct model *m = r->model;
  struct backend *be = m->backend;
  const struct model_geometry *g = &m->parameters.geometry;
  struct buffer_size sizes[CHUNK_BUFFERS];
  chunk_buffers(r, g, r->max_chunk, sizes);
  oscar_status status = OSCAR_OK;
  for (int i = 0; i < CHUNK_BUFFERS && status == OSCAR_OK; i++)
    status = be->ops->buffer_alloc(be, sizes[i].floats, sizes[i].buffer);
  if (status == OSCAR_OK) {
    r->q = r->qkv;
    r->k = r->q + (size_t)r->max_chunk * query_width(g);
    r->v = r->k + (size_t)r->max_chunk * kv_width(g);
  }
  if (status == OSCAR_OK && !be->ops->host_memory)
    status = be->ops->buffer_alloc(be, (size_t)logit_rows(r->max_chunk) * (size_t)m->parameters.geometry.vocab, &r->logits);
  if (status == OSCAR_OK && !be->ops->host_memory)
    status = be->ops->buffer_alloc(be, 2 * (size_t)r->max_chunk, &r->device_tokens);
  if (status == OSCAR_OK && !be->ops->host_memory)
    status = be->ops->buffer_alloc(be, (size_t)r->max_chunk * sizeof(struct sampling) / sizeof(float), &r->device_sampling);
  if (status == OSCAR_OK && !be->ops->host_memory) status = be->ops->buffer_alloc(be, (size_t)r->max_chunk, &r->device_next);
  if (status == OSCAR_OK && !be->ops->host_memory)
    status = be->ops->reserve_samples(be, logit_rows(r->max_chunk), m->parameters.geometry.vocab);
  for (int layer = 0; layer < m->parameters.geometry.layers; layer++) {
    const struct layer_weights *w = &m->weights.layers[layer];
    const struct weight *const products[] = {&w->q, &w->k, &w->v, &w->output, &w->gate, &w->up, &w->down};
    for (size_t i = 0; i < ARRAY_LENGTH(products) && status == OSCAR_OK; i++)
      status = be->ops->reserve(be, products[i], r->max_chunk);
  }
  if (status == OSCAR_OK) status = be->ops->reserve(be, &m->weights.output, logit_rows(r->max_chunk));
  return status;
}

static void list_windows(struct runner *r) {
  const struct model *m = r->model;
  for (int layer = 0; layer < m->parameters.geometry.layers; layer++) {
    const int window = layer_window(m->architecture, &m->parameters, layer);
    int i = 0;
    while (i < r->n_windows && r->windows[i] != window) i++;
    if (i == r->n_windows && i < STEP_WINDOWS) r->windows[r->n_windows++] = window;
  }
}

oscar_status runner_create(struct model *model, oscar_cache *cache, int max_chunk, struct runner **runner) {
  *runner = NULL;
  oscar_context *context = model->context;
  if (max_chunk < 1) return set_error(context, OSCAR_INVALID_ARGUMENT, "a chunk of %d tokens; expected at least 1", max_chunk);
  struct runner *r = mem_zalloc(context, 1, sizeof *r);
  if (!r) return OSCAR_NO_MEMORY;
  r->model = model;
  r->cache = cache;
  r->max_chunk = max_chunk;
  r->records = true;
  list_windows(r);
  const oscar_attention_options attention = {.query_heads = model->parameters.geometry.query_heads};
  oscar_status status = make_buffers(r);
  if (status == OSCAR_OK) status = oscar_attention_create(cache, &attention, &r->attention);
  if (status == OSCAR_OK) status = make_room(r, 1);
  if (status == OSCAR_OK && !(r->tokens = mem_alloc(context, 2 * (size_t)max_chunk, sizeof *r->tokens))) status = OSCAR_NO_MEMORY;
  if (status != OSCAR_OK) {
    runner_free(r);
    return status;
  }
  *runner = r;
  return OSCAR_OK;
}

void runner_free(struct runner *r) {
  if (!r) return;
  oscar_context *context = r->model->context;
  struct backend *be = r->model->backend;
  struct buffer_size sizes[CHUNK_BUFFERS];
  recordings_free(&r->recordings, be);
  chunk_buffers(r, &r->model->parameters.geometry, r->max_chunk, sizes);
  for (int i = 0; i < CHUNK_BUFFERS; i++)
    if (*sizes[i].buffer) be->ops->buffer_free(be, *sizes[i].buffer);
  if (r->logits) be->ops->buffer_free(be, r->logits);
  float *const others[] = {r->device_tokens, r->device_sampling, r->device_next};
  for (size_t i = 0; i < ARRAY_LENGTH(others); i++)
    if (others[i]) be->ops->buffer_free(be, others[i]);
  oscar_attention_free(r->attention);
  mem_free(context, r->observed.q);
  mem_free(context, r->tokens);
  mem_free(context, r->spans);
  mem_free(context, r->attention_jobs);
  mem_free(context, r->sequences);
  mem_free(context, r);
}

void runner_record(struct runner *r, bool records) { r->records = records; }
int64_t runner_host_ns(const struct runner *r) { return r->host_ns; }
int64_t runner_attention_ns(const struct runner *r) { return r->attention_ns; }

/* ---- products ---- */

/* Weights that share an input, and where their results go. */
struct products {
  int count;
  const struct weight *weights[3];
  const float *bias[3];
  float *out[3];
};

static oscar_status multiply(struct backend *be, const struct products *p, const struct span *spans, int n_spans,
                             const float *x) {
  oscar_status status = OSCAR_OK;
  for (int s = 0; s < n_spans && status == OSCAR_OK; s++) {
    float *out[3];
    be->rounding = spans[s].rounding;
    for (int i = 0; i < p->count; i++) out[i] = p->out[i] + (size_t)spans[s].first * (size_t)p->weights[i]->rows;
    status = be->ops->matmul(be, p->count, p->weights, p->bias, spans[s].n,
                             x + (size_t)spans[s].first * (size_t)p->weights[0]->cols, out);
  }
  return status;
}

static oscar_status multiply_one(const struct runner *r, const struct weight *w, const float *x, float *y) {
  const struct products p = {1, {w}, {NULL}, {y}};
  return multiply(r->model->backend, &p, r->spans, r->n_spans, x);
}

/* Adds rows that one job needs: to the last span while all in it stay as they would be alone, else as a span of its own. */
static void add_rows(struct span *spans, int *count, int n, int shared_tokens, enum product_rounding rounding) {
  if (n == 0) return;
  struct span *last = *count > 0 ? &spans[*count - 1] : NULL;
  if (last && last->rounding == rounding && (rounding != ROUND_BY_NUMBER || last->n + n <= shared_tokens))
    last->n += n;
  else
    spans[(*count)++] = (struct span){last ? last->first + last->n : 0, n, rounding};
}

/* Of a job's rows; of its logits, which are few rows of the largest product, it is that of few whatever the tokens are. */
static enum product_rounding rounding_of(enum token_kind kind) {
  return kind == TOKENS_OF_PROMPT ? ROUND_AS_MANY : kind == TOKENS_GENERATED ? ROUND_AS_FEW : ROUND_BY_NUMBER;
}
static enum product_rounding logits_rounding_of(enum token_kind kind) {
  return kind == TOKENS_BY_NUMBER ? ROUND_BY_NUMBER : ROUND_AS_FEW;
}
static oscar_attention_rounding attention_rounding_of(enum token_kind kind) {
  return kind == TOKENS_OF_PROMPT   ? OSCAR_ATTENTION_AS_MANY
         : kind == TOKENS_GENERATED ? OSCAR_ATTENTION_AS_FEW
                                    : OSCAR_ATTENTION_BY_NUMBER;
}

/* ---- layers ---- */

/* q, k, v of the normed input in h */
static oscar_status project_qkv(const struct runner *r, int layer) {
  const struct layer_weights *w = &r->model->weights.layers[layer];
  struct backend *be = r->model->backend;
  const struct products p = {
      3, {&w->q, &w->k, &w->v}, {vector_of(&w->q_bias), vector_of(&w->k_bias), vector_of(&w->v_bias)}, {r->q, r->k, r->v}};
  if (r->decodes) return be->ops->matmul_together(be, p.count, p.weights, p.bias, r->n, r->h, r->qkv);
  return multiply(be, &p, r->spans, r->n_spans, r->h);
}

/* RoPE, K and V into the cache, attention in o */
static oscar_status attend(struct runner *r, int layer, int window) {
  const struct model *m = r->model;
  struct backend *be = m->backend;
  const struct layer_weights *w = &m->weights.layers[layer];
  const struct model_geometry *g = &m->parameters.geometry;
  const struct rope_spec *rope = window ? &m->parameters.window_rope : &m->parameters.rope;
  const struct heads rotated[2] = {{g->query_heads, vector_of(&w->q_norm), r->q}, {g->kv_heads, vector_of(&w->k_norm), r->k}};
  oscar_status status = be->ops->rope(be, rope, r->n, g->head_dim, r->positions, m->parameters.norm_eps, 2, rotated);
  if (status == OSCAR_OK) status = oscar_sequences_write(r->sequences, r->count, layer, r->k, r->v);
  if (status != OSCAR_OK) return status;
  const int64_t begun = time_ns();
  status = oscar_attention_run(r->attention, layer, window, r->attention_jobs, r->count);
  if (be->ops->host_memory) r->attention_ns += time_ns() - begun;
  return status;
}

/* The same of a step that decodes, whose rows stay as the products left them. */
static oscar_status attend_decoding(const struct runner *r, int layer, int window) {
  const struct model *m = r->model;
  const struct layer_weights *w = &m->weights.layers[layer];
  const size_t q = query_width(&m->parameters.geometry), kv = kv_width(&m->parameters.geometry);
  const struct decode_rows rows = {.q = r->qkv,
                                   .k = r->qkv + q,
                                   .v = r->qkv + q + kv,
                                   .q_pitch = (int64_t)(q + 2 * kv),
                                   .kv_pitch = (int64_t)(q + 2 * kv),
                                   .q_norm = vector_of(&w->q_norm),
                                   .k_norm = vector_of(&w->k_norm),
                                   .eps = m->parameters.norm_eps,
                                   .rotation = r->rotations[window != 0],
                                   .positions = r->positions,
                                   .places = r->places.places,
                                   .bad = r->places.bad};
  return attention_step(r->attention, layer, window, &rows, r->o);
}

/* One block of memory, rows for max_chunk tokens. */
static oscar_status make_host_rows(struct runner *r) {
  const struct model_geometry *g = &r->model->parameters.geometry;
  const size_t q = query_width(g), kv = kv_width(g), n = (size_t)r->max_chunk;
  if (r->observed.q) return OSCAR_OK;
  float *all = mem_alloc(r->model->context, n * (2 * q + 2 * kv), sizeof *all);
  if (!all) return OSCAR_NO_MEMORY;
  r->observed = (struct host_rows){all, all + n * 2 * q, all + n * (2 * q + kv), all + n * q};
  return OSCAR_OK;
}

static oscar_status observe(struct runner *r, int layer, const struct forward_observer *observer) {
  struct backend *be = r->model->backend;
  team_before_openmp(r->model->context); /* which observers use */
  if (be->ops->host_memory) return observer->attention(observer->user, layer, r->n, r->q, r->k, r->v, r->o);
  const struct model_geometry *g = &r->model->parameters.geometry;
  const size_t q = (size_t)r->n * query_width(g), kv = (size_t)r->n * kv_width(g);
  const struct host_rows *host = &r->observed;
  oscar_status status = make_host_rows(r);
  if (status == OSCAR_OK) status = be->ops->download(be, host->q, r->q, q);
  if (status == OSCAR_OK) status = be->ops->download(be, host->k, r->k, kv);
  if (status == OSCAR_OK) status = be->ops->download(be, host->v, r->v, kv);
  if (status == OSCAR_OK) status = be->ops->download(be, host->o, r->o, q);
  if (status == OSCAR_OK) status = observer->attention(observer->user, layer, r->n, host->q, host->k, host->v, host->o);
  return status == OSCAR_OK ? be->ops->upload(be, r->o, host->o, q) : status;
}

/* From the normed input in h to the input of the feed-forward block in h, with what attention gives added to x. */
static oscar_status attention_block(struct runner *r, int layer, const struct forward_observer *observer) {
  const struct model *m = r->model;
  struct backend *be = m->backend;
  const struct layer_weights *w = &m->weights.layers[layer];
  const struct model_geometry *g = &m->parameters.geometry;
  const float eps = m->parameters.norm_eps;
  const int window = layer_window(m->architecture, &m->parameters, layer);

  oscar_status status = project_qkv(r, layer);
  if (status == OSCAR_OK) status = r->decodes ? attend_decoding(r, layer, window) : attend(r, layer, window);
  if (status == OSCAR_OK && observer) status = observe(r, layer, observer);
  if (status == OSCAR_OK) status = multiply_one(r, &w->output, r->o, r->h);
  if (status != OSCAR_OK) return status;
  if (w->post_attention_norm.data) be->ops->rms_norm(be, r->n, g->embedding, r->h, vector_of(&w->post_attention_norm), eps, r->h);
  be->ops->add_rms_norm(be, r->n, g->embedding, r->x, r->h, vector_of(&w->feed_forward_norm), eps, r->h);
  return OSCAR_OK;
}

/* From the normed input in h to the input of the next layer in h; after the last layer x is all that counts. */
static oscar_status feed_forward_block(const struct runner *r, int layer) {
  const struct model *m = r->model;
  struct backend *be = m->backend;
  const struct layer_weights *w = &m->weights.layers[layer];
  const struct model_geometry *g = &m->parameters.geometry;
  const float eps = m->parameters.norm_eps;
  const struct feed_forward weights = {&w->gate, &w->up, &w->down, m->architecture->activation};
  oscar_status status = OSCAR_OK;
  for (int s = 0; s < r->n_spans && status == OSCAR_OK; s++) {
    float *rows = r->h + (size_t)r->spans[s].first * (size_t)g->embedding;
    be->rounding = r->spans[s].rounding;
    status = be->ops->feed_forward(be, &weights, r->spans[s].n, rows, r->between, rows);
  }
  if (status != OSCAR_OK) return status;
  if (w->post_feed_forward_norm.data)
    be->ops->rms_norm(be, r->n, g->embedding, r->h, vector_of(&w->post_feed_forward_norm), eps, r->h);
  if (layer + 1 < g->layers)
    be->ops->add_rms_norm(be, r->n, g->embedding, r->x, r->h, vector_of(&w[1].attention_norm), eps, r->h);
  else
    be->ops->add(be, (size_t)r->n * (size_t)g->embedding, r->x, r->h);
  return OSCAR_OK;
}

/* ---- logits ---- */

/* The rows of x whose logits are wanted, normed and after each other in h. Rows that follow each other are one call. */
static void norm_outputs(const struct runner *r) {
  const struct model *m = r->model;
  const size_t e = (size_t)m->parameters.geometry.embedding;
  size_t end = 0, first = 0, rows = 0, to = 0; /* rows [first, first + rows) are to go to `to` */
  for (int i = 0; i <= r->count; i++) {
    const size_t outputs = i < r->count ? (size_t)r->jobs[i].outputs : 0;
    if (i < r->count) end += (size_t)r->jobs[i].n;
    if (outputs > 0 && first + rows == end - outputs) {
      rows += outputs;
      continue;
    }
    if (i < r->count && outputs == 0) continue;
    if (rows > 0)
      m->backend->ops->rms_norm(m->backend, (int64_t)rows, (int)e, r->x + first * e, vector_of(&m->weights.output_norm),
                                m->parameters.norm_eps, r->h + to * e);
    to += rows;
    first = end - outputs;
    rows = outputs;
  }
}

/* Where row `row` of the step's logits goes, and how many rows from it on lie there one after the other, at most `rows`. */
static float *logits_at(const struct runner *r, int row, int rows, int *together) {
  const size_t vocab = (size_t)r->model->parameters.geometry.vocab;
  int i = 0;
  for (; row >= r->jobs[i].outputs; i++) row -= r->jobs[i].outputs;
  float *at = r->jobs[i].logits + (size_t)row * vocab;
  for (*together = r->jobs[i].outputs - row; *together < rows; *together += r->jobs[i].outputs) {
    do i++;
    while (r->jobs[i].outputs == 0);
    if (r->jobs[i].logits != at + (size_t)*together * vocab) break;
  }
  if (*together > rows) *together = rows;
  return at;
}

static oscar_status download_logits(struct runner *r, int first, int rows) {
  struct backend *be = r->model->backend;
  const size_t vocab = (size_t)r->model->parameters.geometry.vocab;
  const int64_t begun = time_ns();
  oscar_status status = OSCAR_OK;
  for (int done = 0, together; done < rows && status == OSCAR_OK; done += together) {
    float *to = logits_at(r, first + done, rows - done, &together);
    status = be->ops->download(be, to, r->logits + (size_t)done * vocab, (size_t)together * vocab);
  }
  r->waited_ns += time_ns() - begun;
  return status;
}

/* Tokens of rows first .. first + rows - 1, whose logits have just been computed. */
static oscar_status sample_rows(const struct runner *r, int first, int rows) {
  struct backend *be = r->model->backend;
  const struct sampling *each = (const struct sampling *)(const void *)r->device_sampling;
  return be->ops->sample(be, rows, r->model->parameters.geometry.vocab, r->logits, each + first,
                         (int32_t *)(void *)r->device_next + first);
}

/* next [count] */
static oscar_status download_next(struct runner *r, int32_t *next) {
  struct backend *be = r->model->backend;
  const int64_t begun = time_ns();
  oscar_status status = be->ops->download(be, (float *)(void *)next, r->device_next, (size_t)r->count);
  r->waited_ns += time_ns() - begun;
  for (int i = 0; i < r->count && status == OSCAR_OK; i++)
    if (next[i] < 0)
      status =
          set_error(r->model->context, OSCAR_NUMERIC, "none of the %d logits is a finite number: the model's output is broken",
                    r->model->parameters.geometry.vocab);
  return status;
}

/* Rows first .. first + rows - 1 of the step's logits, which products on the host write where they are wanted. */
static oscar_status output_rows(struct runner *r, int first, int rows) {
  const struct model *m = r->model;
  struct backend *be = m->backend;
  const size_t e = (size_t)m->parameters.geometry.embedding;
  const float *no_bias = NULL;
  const struct weight *w = &m->weights.output;
  oscar_status status = OSCAR_OK;
  if (!be->ops->host_memory) {
    float *to = r->logits;
    status = be->ops->matmul(be, 1, &w, &no_bias, rows, r->h + (size_t)first * e, &to);
    if (status == OSCAR_OK && r->sampling) return sample_rows(r, first, rows);
    return status == OSCAR_OK && !r->decodes ? download_logits(r, first, rows) : status; /* else after all of the step */
  }
  for (int done = 0, together; done < rows && status == OSCAR_OK; done += together) {
    float *to = logits_at(r, first + done, rows - done, &together);
    status = be->ops->matmul(be, 1, &w, &no_bias, together, r->h + (size_t)(first + done) * e, &to);
  }
  return status;
}

static oscar_status output_block(struct runner *r) {
  norm_outputs(r);
  oscar_status status = OSCAR_OK;
  for (int s = 0; s < r->n_output_spans; s++) {
    r->model->backend->rounding = r->output_spans[s].rounding;
    for (int done = 0; done < r->output_spans[s].n && status == OSCAR_OK; done += LOGIT_ROWS) {
      const int left = r->output_spans[s].n - done;
      status = output_rows(r, r->output_spans[s].first + done, left < LOGIT_ROWS ? left : LOGIT_ROWS);
    }
  }
  return status;
}

/* ---- steps ---- */

/* x = rows of the embedding */
static oscar_status embedding_block(const struct runner *r) {
  const struct model *m = r->model;
  const struct backend_ops *ops = m->backend->ops;
  const struct weight *table = &m->weights.embedding;
  if (!ops->host_memory) return ops->embed(m->backend, table, r->n, r->ids, r->x);
  oscar_status status = OSCAR_OK;
  for (int done = 0; done < r->n && status == OSCAR_OK; done += EMBEDDED_TOKENS) {
    int rows = r->n - done < EMBEDDED_TOKENS ? r->n - done : EMBEDDED_TOKENS;
    status = ops->embed(m->backend, table, rows, r->ids + done, r->x + (size_t)done * (size_t)table->cols);
    if (embedding_is_read_by_rows(m)) gguf_release(m->file, table->data, embedding_bytes(m));
  }
  return status;
}

static oscar_status run_layers(struct runner *r, const struct forward_observer *observer) {
  const struct model *m = r->model;
  struct backend *be = m->backend;
  const struct model_geometry *g = &m->parameters.geometry;
  oscar_status status = embedding_block(r);
  if (status != OSCAR_OK) return status;
  if (m->architecture->scaled_embedding)
    be->ops->scale(be, (size_t)r->n * (size_t)g->embedding, r->x, sqrtf((float)g->embedding));
  be->ops->rms_norm(be, r->n, g->embedding, r->x, vector_of(&m->weights.layers[0].attention_norm), m->parameters.norm_eps, r->h);
  for (int layer = 0; layer < g->layers; layer++) {
    if ((status = attention_block(r, layer, observer)) != OSCAR_OK) return status;
    if ((status = feed_forward_block(r, layer)) != OSCAR_OK) return status;
  }
  return r->outputs ? output_block(r) : OSCAR_OK;
}

static oscar_status check_job(const struct runner *r, const struct forward_job *job) {
  oscar_context *context = r->model->context;
  const int vocab = r->model->parameters.geometry.vocab;
  if (job->n < 1 || job->n > r->max_chunk || job->outputs < 0 || job->outputs > job->n)
    return set_error(context, OSCAR_INVALID_ARGUMENT, "a step of %d tokens with %d outputs; expected 1 to %d tokens", job->n,
                     job->outputs, r->max_chunk);
  for (int i = 0; i < job->n; i++)
    if (job->ids[i] < 0 || job->ids[i] >= vocab)
      return set_error(context, OSCAR_INVALID_ARGUMENT, "token id %d is outside the vocabulary of %d", job->ids[i], vocab);
  if (oscar_sequence_length(job->sequence) + job->n > INT32_MAX)
    return set_error(context, OSCAR_INVALID_ARGUMENT, "a sequence of more than 2^31 tokens");
  return OSCAR_OK;
}

static oscar_status check_step(const struct runner *r, int count, const struct forward_job *jobs) {
  oscar_context *context = r->model->context;
  int64_t n = 0;
  if (count < 1) return set_error(context, OSCAR_INVALID_ARGUMENT, "a step of %d sequences; expected at least 1", count);
  for (int i = 0; i < count; i++) {
    oscar_status status = check_job(r, &jobs[i]);
    if (status != OSCAR_OK) return status;
    n += jobs[i].n;
  }
  if (n <= r->max_chunk) return OSCAR_OK;
  return set_error(context, OSCAR_INVALID_ARGUMENT, "a step of %lld tokens of %d sequences; expected at most %d", (long long)n,
                   count, r->max_chunk);
}

/* Which rows are whose. */
static void lay_out(struct runner *r, int count, const struct forward_job *jobs) {
  const struct model_geometry *g = &r->model->parameters.geometry;
  const size_t width = query_width(g);
  const int shared = r->model->backend->shared_tokens;
  r->jobs = jobs;
  r->count = count;
  r->n = r->outputs = r->n_spans = r->n_output_spans = 0;
  for (int i = 0; i < count; i++) {
    const struct forward_job *job = &jobs[i];
    r->sequences[i] = job->sequence;
    r->attention_jobs[i] = (oscar_attention_job){.sequence = job->sequence,
                                                 .n = job->n,
                                                 .q = r->q + (size_t)r->n * width,
                                                 .out = r->o + (size_t)r->n * width,
                                                 .rounding = attention_rounding_of(job->kind)};
    add_rows(r->spans, &r->n_spans, job->n, shared, rounding_of(job->kind));
    add_rows(r->output_spans, &r->n_output_spans, job->outputs, shared, logits_rounding_of(job->kind));
    r->n += job->n;
    r->outputs += job->outputs;
  }
}

static oscar_status place_tokens(struct runner *r) {
  struct backend *be = r->model->backend;
  int32_t *ids = r->tokens, *positions = r->tokens + r->n;
  for (int i = 0; i < r->count; i++) {
    const struct forward_job *job = &r->jobs[i];
    const int64_t start = oscar_sequence_length(job->sequence);
    memcpy(ids, job->ids, (size_t)job->n * sizeof *ids);
    ids += job->n;
    for (int t = 0; t < job->n; t++) *positions++ = (int32_t)(start + t);
  }
  const int32_t *there = be->ops->host_memory ? r->tokens : (const int32_t *)(const void *)r->device_tokens;
  r->ids = there;
  r->positions = there + r->n;
  if (be->ops->host_memory) return OSCAR_OK;
  return be->ops->upload(be, r->device_tokens, (const float *)(const void *)r->tokens, 2 * (size_t)r->n);
}

/* ---- decoding on a GPU ---- */

/* What the kernels of the step will read, uploaded; nothing of it has been enqueued. kernels: of attention_make_ready. */
static oscar_status make_ready(struct runner *r, int *kernels) {
  const struct hyperparameters *p = &r->model->parameters;
  struct backend *be = r->model->backend;
  oscar_status status = sequences_make_ready(r->sequences, r->count, &r->places);
  if (status == OSCAR_OK) status = attention_make_ready(r->attention, r->windows, r->n_windows, r->sequences, r->count, kernels);
  for (int i = 0; i < r->n_windows && status == OSCAR_OK; i++) {
    const bool windowed = r->windows[i] != 0;
    status = be->ops->rope_on_device(be, windowed ? &p->window_rope : &p->rope, p->geometry.head_dim, &r->rotations[windowed]);
  }
  return status;
}

static oscar_status record(struct runner *r, struct kept_recording *kept) {
  struct backend *be = r->model->backend;
  oscar_status status = be->ops->record_begin(be);
  if (status != OSCAR_OK) return status;
  status = run_layers(r, NULL);
  const oscar_status ended = be->ops->record_end(be, &kept->recording);
  if (status == OSCAR_OK) return ended;
  be->ops->recording_free(be, kept->recording); /* of a part of the step */
  kept->recording = NULL;
  return status;
}

static oscar_status decode(struct runner *r) {
  struct backend *be = r->model->backend;
  struct kept_recording *kept;
  int kernels = 0;
  oscar_status status = make_ready(r, &kernels);
  if (status != OSCAR_OK) return status;
  const int kind = (2 * r->count + (r->sampling != NULL)) * STEP_KERNELS + kernels;
  const enum step_way way = r->records && r->outputs == r->n ? recordings_choose(&r->recordings, be, kind, &kept) : STEP_DIRECT;
  if (way == STEP_DIRECT) status = run_layers(r, NULL);
  if (way == STEP_RECORD) status = record(r, kept);
  if (way != STEP_DIRECT && status == OSCAR_OK) status = be->ops->replay(be, kept->recording);
  if (status == OSCAR_OK) sequences_note_written(r->sequences, r->count);
  return status == OSCAR_OK && r->outputs > 0 && !r->sampling ? download_logits(r, 0, r->outputs) : status;
}

static oscar_status place_sampling(struct runner *r) {
  struct backend *be = r->model->backend;
  return be->ops->upload(be, r->device_sampling, (const float *)(const void *)r->sampling,
                         (size_t)r->count * sizeof *r->sampling / sizeof(float));
}

/* sampling, next: NULL where logits are wanted. */
static oscar_status run_step(struct runner *r, int count, const struct forward_job *jobs, const struct forward_observer *observer,
                             const struct sampling *sampling, int32_t *next) {
  const int64_t started = time_ns();
  r->waited_ns = r->attention_ns = 0;
  oscar_status status = check_step(r, count, jobs);
  if (status == OSCAR_OK) status = make_room(r, count);
  if (status != OSCAR_OK) return status;
  lay_out(r, count, jobs);
  r->sampling = sampling;
  r->decodes = !r->model->backend->ops->host_memory && !observer && r->n == count && count <= LOGIT_ROWS;
  int begun = 0, committed = 0;
  while (begun < count && (status = oscar_sequence_begin(jobs[begun].sequence, jobs[begun].n)) == OSCAR_OK) begun++;
  if (status == OSCAR_OK) status = place_tokens(r);
  if (status == OSCAR_OK && sampling) status = place_sampling(r);
  if (status == OSCAR_OK) status = r->decodes ? decode(r) : run_layers(r, observer);
  if (status == OSCAR_OK && sampling) status = download_next(r, next);
  while (status == OSCAR_OK && committed < count) {
    status = oscar_sequence_commit(jobs[committed].sequence);
    committed += status == OSCAR_OK;
  }
  for (int i = committed; i < begun; i++) oscar_sequence_abort(jobs[i].sequence);
  r->model->backend->rounding = ROUND_BY_NUMBER;
  r->host_ns = time_ns() - started - r->waited_ns;
  team_before_openmp(r->model->context); /* with which callers look at the logits */
  return status;
}

oscar_status runner_forward_all(struct runner *r, int count, const struct forward_job *jobs) {
  return run_step(r, count, jobs, NULL, NULL, NULL);
}

bool runner_can_sample(const struct runner *r) { return !r->model->backend->ops->host_memory; }

oscar_status runner_sample_all(struct runner *r, int count, const struct forward_job *jobs, const struct sampling *sampling,
                               int32_t *next) {
  if (!runner_can_sample(r)) return set_error(r->model->context, OSCAR_UNSUPPORTED, "tokens are sampled on GPUs only");
  for (int i = 0; i < count; i++)
    if (jobs[i].outputs != 1)
      return set_error(r->model->context, OSCAR_INVALID_ARGUMENT, "a sampled step of %d outputs of a sequence; expected 1",
                       jobs[i].outputs);
  return run_step(r, count, jobs, NULL, sampling, next);
}

oscar_status runner_forward(struct runner *r, oscar_sequence *sequence, int n, const int32_t *ids, int outputs, float *logits,
                            const struct forward_observer *observer) {
  const struct forward_job job = {.sequence = sequence, .n = n, .ids = ids, .outputs = outputs, .logits = logits};
  return run_step(r, 1, &job, observer, NULL, NULL);
}
