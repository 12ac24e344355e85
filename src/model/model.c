/*
 * model.c - opening a model: the file is mapped, its numbers are checked, its tensors are bound to roles, its tokenizer is built.
 * Weights stay in the mapping for as long as the model lives, or move into the backend's layout and leave it.
 */
#include "model/model_private.h"

#include "backend/blocks.h"

static oscar_status open_file(struct model *m, const char *path) {
  oscar_context *context = m->context;
  oscar_status status = gguf_open(context, path, &m->file);
  if (status != OSCAR_OK) return status;
  struct gguf_string name;
  if (!gguf_get_string(m->file, "general.architecture", &name))
    return set_error(context, OSCAR_FORMAT, "%s: metadata key general.architecture is missing", path);
  m->architecture = architecture_find(name);
  if (!m->architecture) {
    char known[128];
    architecture_names(known, sizeof known);
    return set_error(context, OSCAR_UNSUPPORTED, "%s: architecture \"%.*s\" is not supported (supported: %s)", path,
                     (int)(name.bytes < 64 ? name.bytes : 64), name.text, known);
  }
  return hyperparameters_read(context, m->file, m->architecture, &m->parameters);
}

/* ---- the backend's layout ---- */

typedef oscar_status visit_weight(struct model *m, struct weight *w);

/* Matrices that the backend may have a layout for. An embedding that the host reads by rows stays in the file. */
static oscar_status visit_matrices(struct model *m, visit_weight *visit) {
  oscar_status status = OSCAR_OK;
  for (int i = 0; i < m->parameters.geometry.layers; i++) {
    struct layer_weights *l = &m->weights.layers[i];
    struct weight *weights[] = {&l->q, &l->k, &l->v, &l->output, &l->gate, &l->up, &l->down};
    for (size_t k = 0; k < ARRAY_LENGTH(weights) && status == OSCAR_OK; k++) status = visit(m, weights[k]);
  }
  if (status == OSCAR_OK) status = visit(m, &m->weights.output);
  if (status == OSCAR_OK && embedding_is_apart(m) && !m->backend->ops->host_memory) status = visit(m, &m->weights.embedding);
  return status;
}

static size_t packed_bytes(const struct model *m, const struct weight *w) {
  return round_up(m->backend->ops->packed_bytes(m->backend, w), 64);
}

static oscar_status count_packed(struct model *m, struct weight *w) {
  m->packed_bytes += packed_bytes(m, w);
  return OSCAR_OK;
}

static size_t file_bytes(const struct weight *w) { return (size_t)w->rows * weight_row_bytes(w); }

void release_if_packed(const struct model *m, const struct weight *w) {
  if (w->packed) gguf_release(m->file, w->data, file_bytes(w));
}

/* Rows that are packed at a time: the file's pages of them go before the next come, so that a model is in memory once. */
static int64_t packed_rows_at_a_time(const struct weight *w) {
  const size_t bytes = (size_t)4 << 20, rows = bytes / (weight_row_bytes(w) * PACKED_ROWS) * PACKED_ROWS;
  return rows > 0 ? (int64_t)rows : PACKED_ROWS;
}

static oscar_status pack(struct model *m, struct weight *w) {
  if (packed_bytes(m, w) == 0) return OSCAR_OK;
  uint8_t *memory = (uint8_t *)m->packed + m->packed_bytes, *at = memory;
  struct weight part = *w;
  for (int64_t left = w->rows, step = packed_rows_at_a_time(w); left > 0; left -= part.rows) {
    part.rows = left < step ? left : step;
    oscar_status status = m->backend->ops->pack(m->backend, &part, at);
    if (status != OSCAR_OK) return status;
    release_if_packed(m, &part);
    at += m->backend->ops->packed_bytes(m->backend, &part);
    part.data = (const uint8_t *)part.data + file_bytes(&part);
  }
  w->packed = memory;
  m->packed_bytes += packed_bytes(m, w);
  m->unpacked_bytes += file_bytes(w);
  return OSCAR_OK;
}

static oscar_status pack_weights(struct model *m) {
  (void)visit_matrices(m, count_packed);
  if (m->packed_bytes == 0) return OSCAR_OK;
  const struct backend_ops *ops = m->backend->ops;
  oscar_status status = ops->buffer_alloc(m->backend, m->packed_bytes / sizeof(float), &m->packed);
  if (status != OSCAR_OK) return status;
  if (ops->host_memory) mem_advise_large_pages(m->packed, m->packed_bytes);
  m->packed_bytes = 0;
  status = visit_matrices(m, pack);
  if (!embedding_is_apart(m) && !ops->host_memory) m->weights.embedding.packed = m->weights.output.packed;
  return status;
}

/* ---- norms and biases ---- */

/* Vectors begin at multiples of 64 bytes. */
#define VECTOR_FLOATS 16

/* Copies a vector to `at` floats into the buffer, if there is one already; gives the floats it takes. */
static oscar_status place_vector(struct model *m, struct weight *w, size_t *at) {
  if (!w->data) return OSCAR_OK;
  float *to = m->vectors ? m->vectors + *at : NULL;
  *at += round_up((size_t)w->rows, VECTOR_FLOATS);
  if (!to) return OSCAR_OK;
  w->packed = to;
  return m->backend->ops->upload(m->backend, to, w->data, (size_t)w->rows);
}

static oscar_status place_all_vectors(struct model *m, size_t *floats) {
  oscar_status status = place_vector(m, &m->weights.output_norm, floats);
  for (int i = 0; i < m->parameters.geometry.layers; i++) {
    struct layer_weights *l = &m->weights.layers[i];
    struct weight *vectors[] = {&l->attention_norm,
                                &l->q_bias,
                                &l->k_bias,
                                &l->v_bias,
                                &l->q_norm,
                                &l->k_norm,
                                &l->post_attention_norm,
                                &l->feed_forward_norm,
                                &l->post_feed_forward_norm};
    for (size_t k = 0; k < ARRAY_LENGTH(vectors) && status == OSCAR_OK; k++) status = place_vector(m, vectors[k], floats);
  }
  return status;
}

static oscar_status place_vectors(struct model *m) {
  if (m->backend->ops->host_memory) return OSCAR_OK;
  size_t floats = 0, placed = 0;
  oscar_status status = place_all_vectors(m, &floats);
  if (status == OSCAR_OK) status = m->backend->ops->buffer_alloc(m->backend, floats, &m->vectors);
  return status == OSCAR_OK ? place_all_vectors(m, &placed) : status;
}

oscar_status model_load(oscar_context *context, struct backend *backend, const char *path, struct model **model) {
  *model = NULL;
  struct model *m = mem_zalloc(context, 1, sizeof *m);
  if (!m) return OSCAR_NO_MEMORY;
  m->context = context;
  m->backend = backend;
  oscar_status status = open_file(m, path);
  if (status == OSCAR_OK) status = weights_bind(context, m->file, m->architecture, &m->parameters, backend, &m->weights);
  if (status == OSCAR_OK) status = tokenizer_create(context, m->file, &m->tokenizer);
  if (status == OSCAR_OK) status = gguf_fingerprint(m->file, m->fingerprint);
  if (status == OSCAR_OK && tokenizer_vocab(m->tokenizer) > m->parameters.geometry.vocab)
    status = set_error(context, OSCAR_MISMATCH, "%s: the tokenizer has %d tokens but the model has rows for %d", path,
                       tokenizer_vocab(m->tokenizer), m->parameters.geometry.vocab);
  if (status != OSCAR_OK) {
    model_free(m);
    return status;
  }
  m->parameters.rope.factors = m->weights.rope_factors.data;
  for (int64_t i = 0; i < gguf_tensor_count(m->file); i++) {
    const struct gguf_tensor *t = gguf_tensor_at(m->file, i);
    int64_t elements = 1;
    for (int k = 0; k < t->dims; k++) elements *= t->shape[k];
    m->parameters.geometry.parameters += elements;
    m->weight_bytes += t->bytes;
  }
  status = pack_weights(m);
  if (status == OSCAR_OK) status = place_vectors(m);
  if (status != OSCAR_OK) {
    model_free(m);
    return status;
  }
  *model = m;
  return OSCAR_OK;
}

void model_free(struct model *m) {
  if (!m) return;
  tokenizer_free(m->tokenizer);
  mem_free(m->context, m->weights.layers);
  if (m->packed) m->backend->ops->buffer_free(m->backend, m->packed);
  if (m->vectors) m->backend->ops->buffer_free(m->backend, m->vectors);
  gguf_close(m->file);
  mem_free(m->context, m);
}

oscar_context *model_context(const struct model *m) { return m->context; }
struct backend *model_backend(const struct model *m) {
  return m->backend;
}
const struct model_geometry *model_geometry_of(const struct model *m) { return &m->parameters.geometry; }
const struct tokenizer *model_tokenizer(const struct model *m) { return m->tokenizer; }
const struct gguf *model_file(const struct model *m) { return m->file; }
const char *model_fingerprint(const struct model *m) { return m->fingerprint; }
size_t model_weight_bytes(const struct model *m) { return m->weight_bytes; }

size_t embedding_bytes(const struct model *m) { return file_bytes(&m->weights.embedding); }

size_t model_read_bytes_per_token(const struct model *m) {
  const struct weight *table = &m->weights.embedding;
  if (table->packed && embedding_is_apart(m)) return m->packed_bytes - packed_bytes(m, table);
  if (table->packed) return m->packed_bytes;
  return embedding_is_apart(m) ? m->weight_bytes - embedding_bytes(m) + weight_row_bytes(&m->weights.embedding) : m->weight_bytes;
}

size_t model_resident_bytes(const struct model *m) {
  const size_t table = embedding_bytes(m), rows = EMBEDDED_TOKENS * NEIGHBOUR_BYTES;
  size_t file = gguf_bytes(m->file) - m->unpacked_bytes;
  if (m->weights.embedding.packed) return file + m->packed_bytes;
  if (embedding_is_apart(m)) file -= table;
  if (embedding_is_read_by_rows(m)) file += table < rows ? table : rows;
  return file + m->packed_bytes;
}

size_t model_packed_bytes(const struct model *m) { return m->packed_bytes; }

void model_cache_options(const struct model *m, oscar_cache_options *options) {
  const struct model_geometry *g = &m->parameters.geometry;
  oscar_cache_options_default(options);
  options->cuda = m->backend->cuda;
  options->layers = g->layers;
  options->kv_heads = g->kv_heads;
  options->head_dim = g->head_dim;
}
