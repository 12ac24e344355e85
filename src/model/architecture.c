/*
 * architecture.c - the table of architectures and the reading of a file's hyperparameters.
 *
 * Key names are those of the GGUF specification ("<architecture>.block_count", ...). Every number is range-checked before
 * anything is sized by it.
 */
#include "model/architecture.h"

#include <math.h>
#include <string.h>

static const struct architecture table[] = {
    {.name = "llama", .rope = ROPE_NORMAL, .qkv_bias = OPTIONAL, .activation = ACTIVATION_SILU},
    {.name = "qwen2", .rope = ROPE_NEOX, .qkv_bias = REQUIRED, .activation = ACTIVATION_SILU},
    {.name = "gemma3",
     .rope = ROPE_NEOX,
     .qk_norm = REQUIRED,
     .post_norms = REQUIRED,
     .activation = ACTIVATION_GELU,
     .scaled_embedding = true,
     .window_period = 6,
     .window_rope_base = 10000},
};

const struct architecture *architecture_find(struct gguf_string name) {
  for (size_t i = 0; i < ARRAY_LENGTH(table); i++)
    if (strlen(table[i].name) == name.bytes && memcmp(table[i].name, name.text, name.bytes) == 0) return &table[i];
  return NULL;
}

void architecture_names(char *text, size_t bytes) {
  size_t used = 0;
  text[0] = '\0';
  for (size_t i = 0; i < ARRAY_LENGTH(table) && used < bytes; i++)
    used += (size_t)snprintf(text + used, bytes - used, "%s%s", i ? ", " : "", table[i].name);
}

struct reader {
  oscar_context *context;
  const struct gguf *file;
  const char *prefix;
};

static void key_name(const struct reader *r, const char *name, char key[160]) { snprintf(key, 160, "%s.%s", r->prefix, name); }

/* An integer in low..high; `fallback` >= 0 stands in when the key is absent. */
static oscar_status read_integer(const struct reader *r, const char *name, int64_t low, int64_t high, int64_t fallback,
                                 int64_t *out) {
  char key[160];
  key_name(r, name, key);
  if (!gguf_get_i64(r->file, key, out)) {
    if (fallback < 0)
      return set_error(r->context, OSCAR_FORMAT, "%s: metadata key %s is missing or not a whole number", gguf_path(r->file), key);
    *out = fallback;
  }
  if (*out < low || *out > high)
    return set_error(r->context, OSCAR_FORMAT, "%s: %s is %lld; expected %lld to %lld", gguf_path(r->file), key, (long long)*out,
                     (long long)low, (long long)high);
  return OSCAR_OK;
}

static oscar_status read_real(const struct reader *r, const char *name, double fallback, double *out) {
  char key[160];
  key_name(r, name, key);
  if (!gguf_get_f64(r->file, key, out)) *out = fallback;
  if (!isfinite(*out) || *out <= 0)
    return set_error(r->context, OSCAR_FORMAT, "%s: %s is %g; expected a positive number", gguf_path(r->file), key, *out);
  return OSCAR_OK;
}

static oscar_status read_rope(const struct reader *r, const struct architecture *a, struct hyperparameters *h) {
  double base, factor = 1;
  int64_t rotary;
  oscar_status status;
  if ((status = read_real(r, "rope.freq_base", 10000, &base)) != OSCAR_OK) return status;
  if ((status = read_integer(r, "rope.dimension_count", 2, h->geometry.head_dim, h->geometry.head_dim, &rotary)) != OSCAR_OK)
    return status;
  if (rotary % 2) return set_error(r->context, OSCAR_FORMAT, "%s: rope.dimension_count is odd", gguf_path(r->file));
  char key[160];
  struct gguf_string kind;
  key_name(r, "rope.scaling.type", key);
  if (gguf_get_string(r->file, key, &kind) && !(kind.bytes == 4 && memcmp(kind.text, "none", 4) == 0)) {
    if (kind.bytes != 6 || memcmp(kind.text, "linear", 6) != 0)
      return set_error(r->context, OSCAR_UNSUPPORTED, "%s: RoPE scaling \"%.*s\" is not supported (only none and linear)",
                       gguf_path(r->file), (int)kind.bytes, kind.text);
    if ((status = read_real(r, "rope.scaling.factor", 1, &factor)) != OSCAR_OK) return status;
  }
  h->rope =
      (struct rope_spec){.kind = a->rope, .rotary_dim = (int)rotary, .base = (float)base, .linear_scale = (float)(1 / factor)};
  h->window_rope = h->rope;
  if (a->window_period) {
    h->window_rope.base = (float)a->window_rope_base;
    h->window_rope.linear_scale = 1;
  }
  return OSCAR_OK;
}

oscar_status hyperparameters_read(oscar_context *context, const struct gguf *file, const struct architecture *a,
                                  struct hyperparameters *h) {
  *h = (struct hyperparameters){0};
  struct reader r = {context, file, a->name};
  struct model_geometry *g = &h->geometry;
  int64_t layers, embedding, feed_forward, heads, kv_heads, key_length, value_length, window = 0;
  double eps;
  oscar_status status;
  if ((status = read_integer(&r, "block_count", 1, 1000, -1, &layers)) != OSCAR_OK) return status;
  if ((status = read_integer(&r, "embedding_length", 16, 1 << 17, -1, &embedding)) != OSCAR_OK) return status;
  if ((status = read_integer(&r, "feed_forward_length", 16, 1 << 20, -1, &feed_forward)) != OSCAR_OK) return status;
  if ((status = read_integer(&r, "attention.head_count", 1, 1024, -1, &heads)) != OSCAR_OK) return status;
  if ((status = read_integer(&r, "attention.head_count_kv", 1, heads, heads, &kv_heads)) != OSCAR_OK) return status;
  if ((status = read_integer(&r, "attention.key_length", 16, OSCAR_MAX_HEAD_DIM, embedding / heads, &key_length)) != OSCAR_OK)
    return status;
  if ((status = read_integer(&r, "attention.value_length", 16, OSCAR_MAX_HEAD_DIM, key_length, &value_length)) != OSCAR_OK)
    return status;
  if ((status = read_integer(&r, "context_length", 1, INT32_MAX, -1, &g->context_trained)) != OSCAR_OK) return status;
  if ((status = read_real(&r, "attention.layer_norm_rms_epsilon", 1e-5, &eps)) != OSCAR_OK) return status;
  if (a->window_period && (status = read_integer(&r, "attention.sliding_window", 1, INT32_MAX, -1, &window)) != OSCAR_OK)
    return status;
  if (heads % kv_heads || heads / kv_heads > 16)
    return set_error(context, OSCAR_UNSUPPORTED, "%s: %lld query heads over %lld KV heads; expected a whole ratio of at most 16",
                     gguf_path(file), (long long)heads, (long long)kv_heads);
  if (key_length != value_length || key_length % 16)
    return set_error(context, OSCAR_UNSUPPORTED, "%s: head sizes %lld (keys) and %lld (values); expected equal multiples of 16",
                     gguf_path(file), (long long)key_length, (long long)value_length);

  const struct gguf_tensor *embeddings = gguf_find_tensor(file, "token_embd.weight");
  if (!embeddings || embeddings->dims != 2 || embeddings->shape[1] > INT32_MAX)
    return set_error(context, OSCAR_FORMAT, "%s: tensor token_embd.weight is missing or not a matrix", gguf_path(file));

  snprintf(g->architecture, sizeof g->architecture, "%s", a->name);
  struct gguf_string name = {"", 0};
  (void)gguf_get_string(file, "general.name", &name);
  snprintf(g->name, sizeof g->name, "%.*s", (int)(name.bytes < 127 ? name.bytes : 127), name.text);
  g->layers = (int)layers;
  g->embedding = (int)embedding;
  g->feed_forward = (int)feed_forward;
  g->query_heads = (int)heads;
  g->kv_heads = (int)kv_heads;
  g->head_dim = (int)key_length;
  g->vocab = (int)embeddings->shape[1];
  h->norm_eps = (float)eps;
  h->window = (int)window;
  return read_rope(&r, a, h);
}

int layer_window(const struct architecture *a, const struct hyperparameters *h, int layer) {
  return a->window_period && (layer + 1) % a->window_period != 0 ? h->window : 0;
}
