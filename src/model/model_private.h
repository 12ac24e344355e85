/* model/model_private.h - what model.c and forward.c share. */
#ifndef OSCAR_MODEL_PRIVATE_H
#define OSCAR_MODEL_PRIVATE_H

#include "model/architecture.h"
#include "model/model.h"

struct model {
  oscar_context *context;
  struct backend *backend;
  struct gguf *file;
  const struct architecture *architecture;
  struct hyperparameters parameters;
  struct model_weights weights;
  struct tokenizer *tokenizer;
  char fingerprint[65];
  size_t weight_bytes;
  /* Products read weights in the backend's own layout where it has one: all of them in one buffer, and the bytes of the file that
   * they stand for. */
  float *packed;
  size_t packed_bytes, unpacked_bytes;
  float *vectors; /* norms and biases, where buffers are not host memory */
};

/*
 * An embedding that no product reads is read by rows, and every row brings its neighbours into memory. So that what a process
 * holds does not depend on the text it has read, the table is released after every EMBEDDED_TOKENS.
 */
#define EMBEDDED_TOKENS 64
#define NEIGHBOUR_BYTES ((size_t)64 << 10) /* Linux maps that much around a page that is read (fault_around_bytes) */
/* The output's weight is another tensor. */
static inline bool embedding_is_apart(const struct model *m) { return m->weights.output.data != m->weights.embedding.data; }
static inline bool embedding_is_read_by_rows(const struct model *m) { return embedding_is_apart(m) || m->weights.output.packed; }
/* Norms and biases, where operations read them. */
static inline const float *vector_of(const struct weight *w) { return w->packed ? w->packed : w->data; }
size_t embedding_bytes(const struct model *m);
/* Lets the file's pages of a weight go again that products do not read there. */
void release_if_packed(const struct model *m, const struct weight *w);

#endif
