/*
 * model/architecture.h - what distinguishes one transformer from another, as data. Private.
 *
 * A decoder layer here is always
 *     h = norm(x); q, k, v = h W + b; [q, k normed per head]; rope; a = attention; x += [post norm] a W_o
 *     h = norm(x); x += [post norm] ((activation(h W_gate) * (h W_up)) W_down)
 * and an architecture says which parts are there, how RoPE pairs dimensions and which layers see a window. Adding one means
 * adding a row to the table in architecture.c.
 */
#ifndef OSCAR_ARCHITECTURE_H
#define OSCAR_ARCHITECTURE_H

#include "backend/backend.h"
#include "model/gguf.h"
#include "model/model.h"

enum presence { ABSENT, OPTIONAL, REQUIRED };

struct architecture {
  const char *name; /* general.architecture; also the prefix of its metadata keys */
  enum rope_kind rope;
  enum presence qkv_bias;
  enum presence qk_norm;    /* RMS norm of each head of q and k before RoPE */
  enum presence post_norms; /* RMS norm of what attention and feed-forward add */
  enum activation activation;
  bool scaled_embedding;   /* embeddings times sqrt(embedding length) */
  int window_period;       /* every window_period-th layer sees everything, the others a window; 0: no windows */
  double window_rope_base; /* RoPE base of the layers with a window */
};

/* NULL if there is no such architecture. */
const struct architecture *architecture_find(struct gguf_string name);
/* "llama, qwen2, ..." for messages. */
void architecture_names(char *text, size_t bytes);

/* ---- what the file says, read and checked once ---- */

struct hyperparameters {
  struct model_geometry geometry;
  float norm_eps;
  struct rope_spec rope, window_rope;
  int window; /* tokens; 0: none */
};
oscar_status hyperparameters_read(oscar_context *context, const struct gguf *file, const struct architecture *architecture,
                                  struct hyperparameters *out);
/* Window of a layer in tokens; 0: the layer sees everything. */
int layer_window(const struct architecture *architecture, const struct hyperparameters *h, int layer);

/* ---- weights by role ---- */

struct layer_weights {
  struct weight attention_norm, q, k, v, q_bias, k_bias, v_bias, q_norm, k_norm, output, post_attention_norm;
  struct weight feed_forward_norm, gate, up, down, post_feed_forward_norm;
};
struct model_weights {
  struct weight embedding, output_norm, output; /* output is the embedding where the file has none */
  struct weight rope_factors;
  struct layer_weights *layers;
};
/* Finds and checks every tensor; data stays in the file's mapping. weights->layers is allocated with mem_alloc. */
oscar_status weights_bind(oscar_context *context, const struct gguf *file, const struct architecture *architecture,
                          const struct hyperparameters *h, struct backend *backend, struct model_weights *weights);

#endif
