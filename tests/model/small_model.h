/*
 * tests/model/small_model.h - a model file with random weights of many types, small enough to run anywhere in milliseconds.
 *
 * Elements have about the variance 1 / columns, so that activations stay where those of trained models are.
 */
#ifndef OSCAR_TEST_SMALL_MODEL_H
#define OSCAR_TEST_SMALL_MODEL_H

#include "backend/random_weights.h"
#include "gguf_writer.h"

enum {
  SMALL_LAYERS = 3,
  SMALL_EMBEDDING = 256,
  SMALL_FEED_FORWARD = 512,
  SMALL_HEADS = 4,
  SMALL_KV_HEADS = 2,
  SMALL_HEAD_DIM = 64,
  SMALL_VOCAB = 300,
  SMALL_WINDOW = 96 /* of gemma3's layers that have one */
};

struct small_model {
  struct gguf_writer table, data;
  uint64_t tensors, random;
  int heads; /* of queries */
  char path[64];
};

/* Standard deviation of an element when the block's first scale is 1; offsets are chosen so that the mean is 0. */
static inline double block_deviation(enum weight_type type) {
  switch (type) {
  case WEIGHT_Q4_0:
  case WEIGHT_Q4_1:
    return 4.6; /* q of 16 values */
  case WEIGHT_Q5_0:
  case WEIGHT_Q5_1:
    return 9.2;
  case WEIGHT_Q8_0:
    return 74;
  case WEIGHT_Q4_K:
    return 300; /* with a random scale of 6 bits, and a random minimum */
  case WEIGHT_Q5_K:
    return 600;
  case WEIGHT_Q6_K:
    return 1370; /* with a random scale of 8 bits */
  default:
    return 1;
  }
}

static inline struct block_numbers small_numbers(enum weight_type type, double deviation, uint64_t *random) {
  const float scale = (float)(deviation / block_deviation(type));
  struct block_numbers numbers = {test_normal(random) * (float)deviation, scale, 0};
  if (type == WEIGHT_Q4_1) numbers.minimum = -7.5f * scale;
  if (type == WEIGHT_Q5_1) numbers.minimum = -15.5f * scale;
  if (type == WEIGHT_Q4_K) numbers.minimum = 7.5f * scale;
  if (type == WEIGHT_Q5_K) numbers.minimum = 15.5f * scale;
  return numbers;
}

static inline void small_tensor(struct small_model *m, const char *name, uint64_t rows, uint64_t cols, enum weight_type type) {
  int elements;
  size_t block_bytes;
  uint8_t block[512];
  assert_true(weight_block(type, &elements, &block_bytes) && block_bytes <= sizeof block);
  put_padding(&m->data, 32);
  put_tensor(&m->table, name, 2, (const uint64_t[]){cols, rows}, (uint32_t)type, m->data.bytes);
  for (uint64_t i = 0; i < rows * (cols / (uint64_t)elements); i++) {
    random_block(type, block, block_bytes, small_numbers(type, 1 / sqrt((double)cols), &m->random), &m->random);
    put(&m->data, block, block_bytes);
  }
  m->tensors++;
}

/* Values around `centre`. */
static inline void small_vector(struct small_model *m, const char *name, uint64_t count, float centre) {
  put_padding(&m->data, 32);
  put_tensor(&m->table, name, 1, &count, WEIGHT_F32, m->data.bytes);
  for (uint64_t i = 0; i < count; i++) {
    float x = centre + 0.2f * test_normal(&m->random);
    put(&m->data, &x, sizeof x);
  }
  m->tensors++;
}

static inline void small_layer(struct small_model *m, int layer, const char *architecture) {
  const uint64_t e = SMALL_EMBEDDING, f = SMALL_FEED_FORWARD, d = SMALL_HEAD_DIM, q = (uint64_t)m->heads * d,
                 kv = SMALL_KV_HEADS * d;
  const bool qwen = strcmp(architecture, "qwen2") == 0, gemma = strcmp(architecture, "gemma3") == 0;
  const struct {
    const char *name;
    uint64_t rows, cols;
  } matrices[] = {{"attn_q", q, e},   {"attn_k", kv, e}, {"attn_v", kv, e}, {"attn_output", e, q},
                  {"ffn_gate", f, e}, {"ffn_up", f, e},  {"ffn_down", e, f}};
  const struct {
    const char *name;
    uint64_t count;
    bool there;
    float centre;
  } vectors[] = {{"attn_norm.weight", e, true, 1},     {"ffn_norm.weight", e, true, 1},
                 {"attn_q.bias", q, qwen, 0},          {"attn_k.bias", kv, qwen, 0},
                 {"attn_v.bias", kv, qwen, 0},         {"attn_q_norm.weight", d, gemma, 1},
                 {"attn_k_norm.weight", d, gemma, 1},  {"post_attention_norm.weight", e, gemma, 1},
                 {"post_ffw_norm.weight", e, gemma, 1}};
  char name[64];
  for (size_t i = 0; i < ARRAY_LENGTH(matrices); i++) {
    snprintf(name, sizeof name, "blk.%d.%s.weight", layer, matrices[i].name);
    small_tensor(m, name, matrices[i].rows, matrices[i].cols, all_types[(i + 7 * (size_t)layer) % ARRAY_LENGTH(all_types)]);
  }
  for (size_t i = 0; i < ARRAY_LENGTH(vectors); i++) {
    snprintf(name, sizeof name, "blk.%d.%s", layer, vectors[i].name);
    if (vectors[i].there) small_vector(m, name, vectors[i].count, vectors[i].centre);
  }
}

static inline void small_keys(struct gguf_writer *w, const char *architecture, int heads, uint64_t *keys) {
  const struct {
    const char *name;
    uint32_t value;
  } numbers[] = {{"block_count", SMALL_LAYERS},
                 {"embedding_length", SMALL_EMBEDDING},
                 {"feed_forward_length", SMALL_FEED_FORWARD},
                 {"attention.head_count", (uint32_t)heads},
                 {"attention.head_count_kv", SMALL_KV_HEADS},
                 {"attention.key_length", SMALL_HEAD_DIM},
                 {"attention.sliding_window", SMALL_WINDOW},
                 {"context_length", 2048}};
  static const char *const tokens[] = {"a", "b", "ab"};
  char key[64];
  put_string(w, "general.architecture", architecture);
  put_string(w, "general.name", "Small");
  for (size_t i = 0; i < ARRAY_LENGTH(numbers); i++) {
    snprintf(key, sizeof key, "%s.%s", architecture, numbers[i].name);
    put_integer(w, key, GGUF_UINT32, numbers[i].value, 4);
  }
  put_string(w, "tokenizer.ggml.model", "gpt2");
  put_string(w, "tokenizer.ggml.pre", "gpt-2");
  put_array(w, "tokenizer.ggml.tokens", GGUF_STRING, 3);
  for (int i = 0; i < 3; i++) put_text(w, tokens[i]);
  put_array(w, "tokenizer.ggml.token_type", GGUF_INT32, 3);
  for (int i = 0; i < 3; i++) put_u32(w, 1);
  put_array(w, "tokenizer.ggml.merges", GGUF_STRING, 1);
  put_text(w, "a b");
  *keys = 2 + ARRAY_LENGTH(numbers) + 5;
}

/* Writes the file; its path is valid until small_model_free. tied: the output is the embedding. */
static inline void small_model_make_of(struct small_model *m, const char *architecture, int heads, bool tied, uint64_t seed) {
  *m = (struct small_model){.random = seed, .heads = heads, .path = "/tmp/oscar-small-XXXXXX.gguf"};
  struct gguf_writer keys = {0}, head = {0};
  uint64_t n_keys;
  small_keys(&keys, architecture, heads, &n_keys);
  small_tensor(m, "token_embd.weight", SMALL_VOCAB, SMALL_EMBEDDING, WEIGHT_Q8_0);
  if (!tied) small_tensor(m, "output.weight", SMALL_VOCAB, SMALL_EMBEDDING, WEIGHT_Q6_K);
  small_vector(m, "output_norm.weight", SMALL_EMBEDDING, 1);
  for (int layer = 0; layer < SMALL_LAYERS; layer++) small_layer(m, layer, architecture);
  put_head(&head, 3, m->tensors, n_keys);
  put(&head, keys.data, keys.bytes);
  put(&head, m->table.data, m->table.bytes);
  put_padding(&head, 32);
  put(&head, m->data.data, m->data.bytes);
  int file = mkstemps(m->path, 5);
  assert_true(file >= 0);
  assert_int_equal(write(file, head.data, head.bytes), head.bytes);
  assert_int_equal(close(file), 0);
  writer_free(&head);
  writer_free(&keys);
  writer_free(&m->data);
  writer_free(&m->table);
}

static inline void small_model_make(struct small_model *m, const char *architecture, bool tied, uint64_t seed) {
  small_model_make_of(m, architecture, SMALL_HEADS, tied, seed);
}

static inline void small_model_free(struct small_model *m) { assert_int_equal(unlink(m->path), 0); }

#endif
