/*
 * engine/engine.h - a loaded model with its cache, and the sessions that run on it. Private.
 *
 * engine_open does what every command needs: context, backend, model, codec set for the wanted KV type (fitting it on first use),
 * cache. `kv` names: bf16, int8, int4, int2, int2@BITS, int2-centred, int2-oscar, int2-hadamard, int2-plain; for
 * evaluation only: int2-kivi, q4_0, q4_0-hadamard.
 */
#ifndef OSCAR_ENGINE_H
#define OSCAR_ENGINE_H

#include "base/base.h"
#include "engine/grammar.h"
#include "engine/sampler.h"
#include "model/model.h"
#include <oscar/prefix.h>
#include <oscar/snapshot.h>

/* ---- KV types ---- */
enum kv_kind {
  KV_EXACT,
  KV_PLAIN,     /* a codec that needs no data */
  KV_FITTED,    /* a codec that needs a rotation file */
  KV_EVALUATION /* no codec: a published quantizer to compare with (eval/baselines.h), which only evaluation can run */
};
struct kv_type {
  const char *name, *summary;
  enum kv_kind kind;
  bool in_bits; /* the name may end in "@BITS" */
};
/* NULL if unknown. "int2@BITS" is int2 with so many bits of codes on average, keys and values, KV_LEAST_BITS to KV_MOST_BITS;
 * int2 alone is int2@2. */
#define KV_LEAST_BITS 1.5f
#define KV_MOST_BITS  4.0f
const struct kv_type *kv_type_find(const char *name);
float kv_type_bits(const char *name); /* of a name: after the @, or 2; 0 if they are out of range */
const struct kv_type *kv_type_list(int *count);
/* The name of a type with so many bits (0: as it is) in name [room]. INVALID_ARGUMENT if the type does not come in bits or not in
 * so many. */
oscar_status kv_type_with_bits(oscar_context *context, const char *kv, float bits, char *name, size_t room);
/* INVALID_ARGUMENT, with the reason, unless a model can be run with this type. */
oscar_status kv_type_check(oscar_context *context, const char *name);

/* Progress of anything long: done of total, in units of `what`. Returning false cancels (OSCAR_CANCELLED). */
struct progress {
  bool (*report)(void *user, const char *what, int64_t done, int64_t total);
  void *user;
};

/* ---- calibration of a model (engine/calibrate.c) ---- */
struct calibrate_options {
  const char *text; /* NULL: the text that ships with the program */
  size_t text_bytes;
  int max_tokens;    /* 0: whole text */
  int window;        /* tokens per independent sequence; 0: 4096 or the trained context if smaller */
  bool proxy_values; /* second pass, proxy objective for the values of int2-oscar */
  /* int2: spread the keys' crumbs over layers by what errors in each cost, measured; else all get the same */
  bool measure_layers;
};
void calibrate_options_default(struct calibrate_options *options);
/* Runs the text through the BF16 model and fits the sets of the named KV types (of kind KV_FITTED); sets[i] belongs to the
 * caller.
 */
oscar_status calibrate_model(struct model *model, const struct calibrate_options *options, const struct progress *progress,
                             int count, const char *const *kv, oscar_codec_set **sets);
/* What it holds for that, with default options, beside the model, a chunk's buffers and the sets. */
size_t calibrate_bytes(const struct model *model);
/* The shipped text. */
const char *calibration_text(size_t *bytes);

/* Where fitted sets live: rotations/<fingerprint>-<kv>.safetensors in the user's cache folder (base/user_folder.h). */
oscar_status rotation_cache_path(oscar_context *context, const char *fingerprint, const char *kv, char *path, size_t bytes);

/* The codec set of a KV type for a model: data-free types are built; fitted ones come from `rotation_file` if given (checked
 * against the fingerprint: MISMATCH), else from the user's cache folder, else they are fitted now from the shipped text and
 * stored there. *set is NULL for bf16; types for evaluation only have none (INVALID_ARGUMENT). A cache folder that cannot be
 * written is an error before anything is fitted (IO); a file that cannot be stored after the fit (a full disk) is a warning: the
 * fit is used for this run. */
oscar_status codec_set_obtain(struct model *model, const char *kv, const char *rotation_file, const struct progress *progress,
                              oscar_codec_set **set);

/* The same for several types at once: what has to be fitted is fitted in one pass over the text. rotation_files may be NULL, and
 * each of them. A type that has to be fitted may be named only once (INVALID_ARGUMENT). All sets are NULL after an error. */
oscar_status codec_sets_obtain(struct model *model, int count, const char *const *kv, const char *const *rotation_files,
                               const struct progress *progress, oscar_codec_set **sets);

/* ---- devices (engine/device.c) ---- */
/* What a model runs on: "cpu", or "cuda" or "cuda:N", the GPU of that number; and what a GPU keeps weights as: "bf16" or "fp8",
 * NULL: bf16. *cuda is NULL for the CPU; it is freed after the backend. Errors: INVALID_ARGUMENT (no such name, weights named for
 * the CPU), UNSUPPORTED (no CUDA in this build, no GPU, no such GPU), NO_MEMORY. */
bool device_is_known(const char *device); /* as a name */
const char *device_weights(int i);        /* a name of what weights are kept as, NULL past the last */
oscar_status device_open(oscar_context *context, const char *device, const char *weights, oscar_cuda **cuda,
                         struct backend **backend);

/* ---- a session: one conversation or completion ---- */
struct engine_options {
  const char *model_path;
  const char *kv;                 /* default "int2" */
  float bits;                     /* of int2's codes, 0: 2; as if the name ended in "@BITS" */
  const char *rotation_file;      /* NULL: automatic */
  int sink_tokens, recent_tokens; /* multiples of 64; -1: default (64, 256) */
  int64_t context;                /* tokens; 0: the model's trained context */
  size_t kv_memory_bytes;         /* 0: what `context` tokens of one sequence need */
  bool knows_prefixes;            /* with that, and a prefix tree that knows them */
  int chunk;                      /* prompt chunk; 0: engine_chunk's choice */
  int threads;                    /* 0: one per core, or per CPU of `cpus` */
  struct cpu_list cpus;           /* that threads are pinned to; empty: none */
  const char *device;             /* default "cpu"; see device_open */
  const char *weights;            /* of a GPU; NULL: its default */
  int guesses;                    /* most tokens guessed at a time, 0: none; the answers are the same (engine/speculate.h) */
  const char *draft_path;         /* a GGUF file of the same vocabulary that guesses; NULL: prompt lookup does */
  const struct progress *progress;
};
void engine_options_default(struct engine_options *options);
/* The prompt chunk in effect: what was asked for, or for 0 as many tokens as suit the device; cuda NULL: the CPU. */
int engine_chunk(int asked, const oscar_cuda *cuda);
/* What a context wants of them: threads and CPUs, which are borrowed. */
oscar_context_options engine_context_options(const struct engine_options *options);

struct draft;
struct engine {
  oscar_context *context;
  oscar_cuda *cuda; /* NULL: the CPU */
  struct backend *backend;
  struct model *model;
  oscar_codec_set *codecs; /* NULL: bf16 */
  oscar_cache *cache;
  struct runner *runner;
  struct draft *draft;           /* NULL: none */
  struct engine_options options; /* effective */
  char kv[32];                   /* what options.kv points to */
};
/* On failure *error_text (256 bytes or more, caller's) has the sentence; everything is freed. */
oscar_status engine_open(const struct engine_options *options, struct engine *engine, char *error_text, size_t error_bytes);
void engine_close(struct engine *engine);
/* The cache options a configuration means (windows in pages, codecs); budget not set. Errors: INVALID_ARGUMENT. */
oscar_status engine_cache_options(oscar_context *context, const struct model *model, const struct engine_options *options,
                                  const oscar_codec_set *codecs, oscar_cache_options *cache);

struct session_timings {
  int64_t prompt_tokens, prompt_ns, decoded_tokens, decode_ns;
  int64_t guessed, accepted; /* tokens, of which the accepted ones were decoded beside others */
};
struct session;
oscar_status session_create(struct engine *engine, const struct sampler_options *sampling, struct session **session);
void session_free(struct session *session);
/* That a session holds beside the cache: its sampler, logits (a row more for each guess at a time) and history; what finds the
 * guesses comes on top. */
size_t session_bytes(const struct model *model, int64_t context, int guesses);
/* Appends n >= 1 tokens, in chunks; afterwards session_next can be called. INVALID_ARGUMENT if they do not fit the context.
 * On an error (OSCAR_CANCELLED too) the session keeps the chunks that were done. */
oscar_status session_feed(struct session *session, const int32_t *ids, int n, const struct progress *progress);
/* Makes the session hold exactly these tokens: what it already holds of them is kept (rewinding if it holds other tokens after a
 * common beginning), the rest is fed. This is how a conversation continues: encode it whole, then sync. */
oscar_status session_sync(struct session *session, const int32_t *ids, int n, const struct progress *progress);
/* The next token. *end is set when it ends the turn; such a token is not part of the session, and something has to be fed after
 * it. With guesses some calls run a step of several tokens and the next ones none; the tokens are the same. */
oscar_status session_next(struct session *session, int32_t *id, bool *end);
/* An answer begins here that keeps to the grammar, which is borrowed (NULL: an answer of any form): session_next gives tokens
 * that it allows, and the end of the turn where nothing but that may come. */
oscar_status session_follow(struct session *session, const struct grammar *grammar);
int64_t session_length(const struct session *session); /* tokens held, the newest included */
/* The tokens held; valid until the session changes. */
const int32_t *session_tokens(const struct session *session, int64_t *n);
/* The session into a file (oscar/snapshot.h) with a text of the caller's; errors as oscar_sequence_save. */
oscar_status session_save(struct session *session, const char *text, const char *path);
/* The session becomes what was saved; session_sync with its tokens or more goes on from there, and session_next does if a token
 * was left to run. Errors: as oscar_snapshot_restore, INVALID_ARGUMENT (more tokens than the context), MISMATCH (no tokens of
 * this model): the session is as before, or empty if its own pages had to make room first. */
oscar_status session_restore(struct session *session, const oscar_snapshot *snapshot);
const oscar_sequence *session_sequence(const struct session *session);
const struct session_timings *session_timings_of(const struct session *session);

#endif
