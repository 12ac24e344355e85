/*
 * model/model.h - a model: weights in their blocks, an architecture described by data, and the forward pass over a backend.
 * Private.
 */
#ifndef OSCAR_MODEL_H
#define OSCAR_MODEL_H

#include "backend/backend.h"
#include "model/chat_template.h"
#include "model/gguf.h"
#include "model/tokenizer.h"
#include <oscar/attention.h>
#include <oscar/cache.h>

struct model_geometry {
  char architecture[32]; /* "llama", "qwen2" */
  char name[128];        /* general.name */
  int layers, query_heads, kv_heads, head_dim, embedding, feed_forward, vocab;
  int64_t context_trained;
  int64_t parameters;
};

struct model;
/* Opens, validates every tensor the architecture needs (presence, type, shape) and prepares the tokenizer.
 * Errors: IO, FORMAT, UNSUPPORTED (architecture, tensor type), MISMATCH (tensor shape), NO_MEMORY. backend is borrowed. */
oscar_status model_load(oscar_context *context, struct backend *backend, const char *path, struct model **model);
void model_free(struct model *model);

oscar_context *model_context(const struct model *model);
struct backend *model_backend(const struct model *model);
const struct model_geometry *model_geometry_of(const struct model *model);
const struct tokenizer *model_tokenizer(const struct model *model);
const struct gguf *model_file(const struct model *model);
const char *model_fingerprint(const struct model *model);
size_t model_weight_bytes(const struct model *model);
/* Weight bytes that one decoded token reads, in the form they have on the device: all but the rows of the embedding that are not
 * the token's. */
size_t model_read_bytes_per_token(const struct model *model);
/* Bytes of weights and of the rest of the file that are in memory while the model runs: of an embedding that is read by rows, a
 * few pages. */
size_t model_resident_bytes(const struct model *model);
/* Of them in memory of the backend, in its layout; the rest is the file's mapping. */
size_t model_packed_bytes(const struct model *model);
/* Bytes the forward pass allocates for chunks of n tokens and `outputs` rows of logits (scratch, excluding attention's and the
 * cache's). */
size_t model_scratch_bytes(const struct model *model, int n, int outputs);

/* Cache options for this model, in the backend's memory, with defaults for the rest. */
void model_cache_options(const struct model *model, oscar_cache_options *options);

/* ---- what a calibration wants to know of a layer (model/attention_facts.c) ---- */
/* The sliding window of its attention in tokens; 0: none. */
int model_layer_window(const struct model *model, int layer);
/* How its queries and keys are rotated; the caller releases it. */
oscar_status model_layer_rope(const struct model *model, int layer, oscar_rope **rope);
/* gram [query_heads][head_dim][head_dim] = W_O' W_O of each query head's part of the output projection. */
oscar_status model_output_gram(const struct model *model, int layer, float *gram);

/* Sees q, k, v (after RoPE) and the attention output of each layer while a chunk runs; host memory, copies of a GPU's. What it
 * changes in o is what the layer goes on with. A status other than OK stops. */
struct forward_observer {
  oscar_status (*attention)(void *user, int layer, int n, const float *q, const float *k, const float *v, float *o);
  void *user;
};

/* A runner: scratch memory of one stream of forward passes over one cache. */
struct runner;
oscar_status runner_create(struct model *model, oscar_cache *cache, int max_chunk, struct runner **runner);
void runner_free(struct runner *runner);
/* On a GPU, steps of one token of each sequence, with logits or samples of all, are recorded and replayed (CUDA graphs), with the
 * same results, unless they are not to be. */
void runner_record(struct runner *runner, bool records);
/* Of the last step, the time in which the host did not wait for a GPU. */
int64_t runner_host_ns(const struct runner *runner);
/* Of the last step, the time that attention took; 0 on a GPU, where nothing waits for it. */
int64_t runner_attention_ns(const struct runner *runner);

/* What tokens are, by which the CPU chooses kernels, which round differently. By number: the fastest for so many, in one call.
 * Tokens of a prompt get the same bits however the prompt is cut and whatever else is in the step, and so do generated ones,
 * alone or several at a time. */
enum token_kind { TOKENS_BY_NUMBER, TOKENS_OF_PROMPT, TOKENS_GENERATED };

/* The next n tokens of a sequence, and where the logits of the last `outputs` of them go: [outputs][vocab], host memory,
 * allocated by the caller; outputs may be 0. */
struct forward_job {
  oscar_sequence *sequence;
  int n;
  const int32_t *ids;
  int outputs;
  float *logits;
  enum token_kind kind;
};

/* One step of several different sequences at once (begin, all layers, commit), at most max_chunk tokens in all. Logits are those
 * of single calls, on the CPU to the bit. Where those of all jobs lie after each other a GPU copies them at once. On error all
 * sequences are as before. Errors: as runner_forward. */
oscar_status runner_forward_all(struct runner *runner, int count, const struct forward_job *jobs);

/* The same with one output of each job, of which not the logits are given but the token that is chosen from them: next [count],
 * as sampling [count] says. On a GPU only (runner_can_sample): there logits stay where they are. Errors: as runner_forward, and
 * NUMERIC if a job's logits are none of them finite. */
bool runner_can_sample(const struct runner *runner);
oscar_status runner_sample_all(struct runner *runner, int count, const struct forward_job *jobs, const struct sampling *sampling,
                               int32_t *next);

/* Appends n tokens (1 .. max_chunk) to the sequence (begin, all layers, commit) and gives logits of the last `outputs` of them,
 * [outputs][vocab], host memory, allocated by the caller; outputs may be 0. On error the step is aborted.
 * Errors: NO_SPACE (cache), INVALID_ARGUMENT (id out of range), NUMERIC. */
oscar_status runner_forward(struct runner *runner, oscar_sequence *sequence, int n, const int32_t *ids, int outputs,
                            float *logits, const struct forward_observer *observer);

#endif
