/*
 * weights.c - binds the tensors of a file to their roles.
 *
 * One table says, for every role, the name in the file, whether it must be there, and its shape; so a model that lacks a tensor,
 * or has one of another shape or an unknown type, is refused with that tensor's name before anything runs. Data is never copied.
 */
#include "model/architecture.h"

#include <string.h>

struct binder {
  oscar_context *context;
  const struct gguf *file;
  struct backend *backend;
};

/* cols == 1: a vector of `rows` floats. */
static oscar_status bind(const struct binder *b, const char *name, enum presence presence, int64_t rows, int64_t cols,
                         struct weight *w) {
  *w = (struct weight){0};
  if (presence == ABSENT) return OSCAR_OK;
  const struct gguf_tensor *t = gguf_find_tensor(b->file, name);
  if (!t) {
    if (presence == OPTIONAL) return OSCAR_OK;
    return set_error(b->context, OSCAR_FORMAT, "%s: tensor %s is missing", gguf_path(b->file), name);
  }
  bool vector = cols == 1;
  int64_t fastest = vector ? rows : cols, slow = vector ? 1 : rows;
  int64_t found_slow = t->dims > 1 ? t->shape[1] : 1;
  bool deeper = (t->dims > 2 && t->shape[2] != 1) || (t->dims > 3 && t->shape[3] != 1);
  if (t->shape[0] != fastest || found_slow != slow || deeper)
    return set_error(b->context, OSCAR_MISMATCH, "%s: tensor %s has shape %lld x %lld; expected %lld x %lld", gguf_path(b->file),
                     name, (long long)found_slow, (long long)t->shape[0], (long long)slow, (long long)fastest);
  if (vector && t->type != WEIGHT_F32)
    return set_error(b->context, OSCAR_UNSUPPORTED, "%s: tensor %s is %s; expected F32", gguf_path(b->file), name,
                     weight_type_name(t->type));
  *w = (struct weight){.name = t->name, .type = (enum weight_type)t->type, .rows = rows, .cols = cols, .data = t->data};
  if (vector) return OSCAR_OK;
  oscar_status status = b->backend->ops->weight_check(b->backend, w);
  return status == OSCAR_OK ? status : prefix_error(b->context, status, "%s", gguf_path(b->file));
}

struct role {
  const char *name; /* after "blk.N." */
  size_t offset;    /* in struct layer_weights */
  enum presence presence;
  int64_t rows, cols;
};

static oscar_status bind_layer(const struct binder *b, int layer, const struct role *roles, size_t count,
                               struct layer_weights *out) {
  for (size_t i = 0; i < count; i++) {
    char name[128];
    snprintf(name, sizeof name, "blk.%d.%s", layer, roles[i].name);
    struct weight *w = (struct weight *)(void *)((char *)out + roles[i].offset);
    oscar_status status = bind(b, name, roles[i].presence, roles[i].rows, roles[i].cols, w);
    if (status != OSCAR_OK) return status;
  }
  return OSCAR_OK;
}

oscar_status weights_bind(oscar_context *context, const struct gguf *file, const struct architecture *a,
                          const struct hyperparameters *h, struct backend *backend, struct model_weights *weights) {
  *weights = (struct model_weights){0};
  const struct binder b = {context, file, backend};
  const struct model_geometry *g = &h->geometry;
  const int64_t e = g->embedding, f = g->feed_forward, d = g->head_dim, q = g->query_heads * d, kv = g->kv_heads * d;
#define ROLE(member) offsetof(struct layer_weights, member)
  const struct role roles[] = {
      {"attn_norm.weight", ROLE(attention_norm), REQUIRED, e, 1},
      {"attn_q.weight", ROLE(q), REQUIRED, q, e},
      {"attn_k.weight", ROLE(k), REQUIRED, kv, e},
      {"attn_v.weight", ROLE(v), REQUIRED, kv, e},
      {"attn_q.bias", ROLE(q_bias), a->qkv_bias, q, 1},
      {"attn_k.bias", ROLE(k_bias), a->qkv_bias, kv, 1},
      {"attn_v.bias", ROLE(v_bias), a->qkv_bias, kv, 1},
      {"attn_q_norm.weight", ROLE(q_norm), a->qk_norm, d, 1},
      {"attn_k_norm.weight", ROLE(k_norm), a->qk_norm, d, 1},
      {"attn_output.weight", ROLE(output), REQUIRED, e, q},
      {"post_attention_norm.weight", ROLE(post_attention_norm), a->post_norms, e, 1},
      {"ffn_norm.weight", ROLE(feed_forward_norm), REQUIRED, e, 1},
      {"ffn_gate.weight", ROLE(gate), REQUIRED, f, e},
      {"ffn_up.weight", ROLE(up), REQUIRED, f, e},
      {"ffn_down.weight", ROLE(down), REQUIRED, e, f},
      {"post_ffw_norm.weight", ROLE(post_feed_forward_norm), a->post_norms, e, 1},
  };
#undef ROLE
  oscar_status status;
  if ((status = bind(&b, "token_embd.weight", REQUIRED, g->vocab, e, &weights->embedding)) != OSCAR_OK) return status;
  if ((status = bind(&b, "output_norm.weight", REQUIRED, e, 1, &weights->output_norm)) != OSCAR_OK) return status;
  if ((status = bind(&b, "output.weight", OPTIONAL, g->vocab, e, &weights->output)) != OSCAR_OK) return status;
  /* What is rounded here no later layer makes good: with both in FP8 too, SmolLM2's logits are half as far again from BF16's (KL
   * 0.029 instead of 0.018), for a twelfth of what a model of 8B reads for a token. */
  weights->embedding.fine = weights->output.fine = true;
  if (!weights->output.data) weights->output = weights->embedding;
  if ((status = bind(&b, "rope_freqs.weight", OPTIONAL, h->rope.rotary_dim / 2, 1, &weights->rope_factors)) != OSCAR_OK)
    return status;
  weights->layers = mem_zalloc(context, (size_t)g->layers, sizeof *weights->layers);
  if (!weights->layers) return OSCAR_NO_MEMORY;
  for (int i = 0; i < g->layers; i++)
    if ((status = bind_layer(&b, i, roles, ARRAY_LENGTH(roles), &weights->layers[i])) != OSCAR_OK) break;
  if (status != OSCAR_OK) {
    mem_free(context, weights->layers);
    weights->layers = NULL;
  }
  return status;
}
