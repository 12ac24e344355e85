/*
 * oscar/cache.h - a paged key/value cache with one budget, exact (BF16) and coded pages, and many sequences.
 *
 * A page is 64 consecutive positions of one sequence: page p holds positions 64p .. 64p+63, for all layers and KV heads.
 *
 * Reading rule. A query at position t, in page T = t/64, reads page p <= T
 *     exactly   if p < sink_pages or p + recent_pages >= T
 *     as codes  otherwise
 * and never a position after t. It depends on t and p alone, so results do not depend on how a prompt was cut into chunks. A page
 * turns from exact into codes when its sequence enters page p + recent_pages + 1; it is quantized once, whole, and is immutable
 * from then on. Without codecs (and without a filter) nothing is ever demoted: a plain BF16 cache.
 *
 * Ownership rule. All memory of a cache is one arena with one budget in bytes: codes, metadata, exact pages, page tables. It is
 * cut into units of one coded page; an exact page takes a run of k consecutive units. Pages are reference counted: full sink
 * pages and coded pages are immutable and may be shared by any number of sequences; a page that is still being filled belongs to
 * exactly one. Running out is OSCAR_NO_SPACE and changes nothing. A prefix tree (prefix.h) is one more owner of pages.
 *
 * Use, for every chunk of new tokens of a sequence:
 *     oscar_sequence_begin(seq, n)                          reserves everything the step needs, or fails whole
 *     for each layer: oscar_sequence_write(seq, layer, k, v)  then attention over that layer (attention.h)
 *     oscar_sequence_commit(seq)                            or oscar_sequence_abort(seq): as if begin had not been called
 */
#ifndef OSCAR_CACHE_H
#define OSCAR_CACHE_H

#include <oscar/codec.h>
#include <oscar/cuda.h>
#include <oscar/oscar.h>

#ifdef __cplusplus
extern "C" {
#endif

#define OSCAR_PAGE_TOKENS 64

typedef struct oscar_cache oscar_cache;
typedef struct oscar_sequence oscar_sequence;

/*
 * A page filter stands for a quantizer that has no codec, so that it can be evaluated under the same reading rule: the coded form
 * of a page is then what that quantizer's decoder would give back, kept as BF16. It saves no memory. For evaluation only.
 */
typedef struct oscar_page_filter {
  /* rows and out: [64][head_dim], one side of one KV head of a full page, the K after RoPE or V that an exact page holds. `out`
   * is rounded to BF16. Returns the first row that the quantizer cannot represent (the write is then NUMERIC), or 64. Must depend
   * on its arguments alone; called by one thread at a time for each cache. */
  int (*apply)(const void *user, int layer, int kv_head, oscar_side side, int head_dim, const float *rows, float *out);
  const void *user;
  double bits_per_element; /* what the quantizer would take, metadata included; oscar_cache_usage reports it */
} oscar_page_filter;

typedef struct oscar_cache_options {
  int layers, kv_heads, head_dim;  /* head_dim a multiple of 16 */
  int sink_pages, recent_pages;    /* default 1 and 4; sink_pages >= 0, recent_pages >= 0 */
  size_t budget_bytes;             /* everything the cache holds; see oscar_cache_bytes_for */
  const oscar_codec_set *codecs;   /* borrowed, must outlive the cache; NULL: BF16 */
  const oscar_page_filter *filter; /* in the place of codecs, for evaluation; borrowed likewise; NULL: none */
  /* NULL: pages are in host memory. Else in the memory of this GPU (borrowed likewise), and so are k and v of
   * oscar_sequence_write and q and out of oscar_attention_run; the context must be that of the handle, and there can be no
   * filter. */
  oscar_cuda *cuda;
} oscar_cache_options;

OSCAR_API void oscar_cache_options_default(oscar_cache_options *options);

/* Bytes of budget that `sequences` sequences of `tokens` tokens each need when they are fed in chunks of at most `chunk` tokens.
 * 0 if the options are invalid, a number is below 1, or the result exceeds size_t. */
OSCAR_API size_t oscar_cache_bytes_for(const oscar_cache_options *options, int64_t tokens, int sequences, int chunk);

/* Errors: INVALID_ARGUMENT, MISMATCH (codec set of another geometry), NO_SPACE (a budget too small for one page, with the least
 * that would do), NO_MEMORY. */
OSCAR_API oscar_status oscar_cache_create(oscar_context *context, const oscar_cache_options *options, oscar_cache **cache);
/* Frees all of its sequences too. */
OSCAR_API void oscar_cache_free(oscar_cache *cache);

typedef struct oscar_cache_usage {
  size_t budget_bytes; /* as given */
  size_t held_bytes;   /* units in use + page tables + the prefix tree: what is held now */
  size_t peak_held_bytes;
  int64_t exact_pages, coded_pages, free_units;
  int64_t demoted_pages;         /* since the cache was made; a page that several sequences share counts once for each */
  double coded_bits_per_element; /* of a coded page, metadata included; of a filter what it says */
} oscar_cache_usage;
OSCAR_API void oscar_cache_usage_get(const oscar_cache *cache, oscar_cache_usage *usage);

/* Bytes of the budget that were missing when an operation on this cache last failed with NO_SPACE; 0 if none has. */
OSCAR_API size_t oscar_cache_shortfall(const oscar_cache *cache);

/* ---- sequences ---- */

OSCAR_API oscar_status oscar_sequence_create(oscar_cache *cache, oscar_sequence **sequence);
OSCAR_API void oscar_sequence_free(oscar_sequence *sequence);

/* A copy that shares every immutable page; the page being filled is copied. Not between begin and commit.
 * Errors: INVALID_ARGUMENT, NO_SPACE, NO_MEMORY. */
OSCAR_API oscar_status oscar_sequence_fork(const oscar_sequence *sequence, oscar_sequence **copy);

/* Tokens committed. */
OSCAR_API int64_t oscar_sequence_length(const oscar_sequence *sequence);
/* Bytes this sequence's pages take, shared pages counted whole, page table included. */
OSCAR_API size_t oscar_sequence_bytes(const oscar_sequence *sequence);
/* The same, per element of K and V held: windows, metadata and tables included. 0 for an empty sequence. */
OSCAR_API double oscar_sequence_bits_per_element(const oscar_sequence *sequence);

typedef enum oscar_rewind {
  OSCAR_REWIND_EXACT, /* resume where what follows equals a cold run */
  OSCAR_REWIND_REFILL /* resume as late as possible; recomputed recent pages read older pages as codes */
} oscar_rewind;

/* Shortens the sequence so that it can continue at `length`: the sequence becomes *resume <= length tokens long, and the caller
 * feeds tokens *resume .. length-1 again before new ones. *resume == length when the exact pages the reading rule wants are still
 * there. Errors: INVALID_ARGUMENT (length > current, or a step is open), NO_SPACE (a shared page has to be copied). */
OSCAR_API oscar_status oscar_sequence_truncate(oscar_sequence *sequence, int64_t length, oscar_rewind mode, int64_t *resume);

/* Opens a step of n >= 1 tokens: afterwards positions length .. length+n-1 can be written in every layer. All pages, exact and
 * coded, that the step will need are reserved here. Errors: INVALID_ARGUMENT, NO_SPACE, NO_MEMORY: nothing changed. */
OSCAR_API oscar_status oscar_sequence_begin(oscar_sequence *sequence, int n);
/* K after RoPE and V of the step's tokens in one layer, [n][kv_heads][head_dim] floats, rounded to BF16 (to nearest even).
 * Pages that this step demotes are encoded here. Each layer exactly once per step, any order.
 * Errors: INVALID_ARGUMENT, NUMERIC (non-finite input, named by layer, head and position): the step must then be aborted. */
OSCAR_API oscar_status oscar_sequence_write(oscar_sequence *sequence, int layer, const float *k, const float *v);
/* The same of `count` different sequences of one cache, their rows after each other: one launch on a GPU. After NUMERIC the steps
 * of all must be aborted. */
OSCAR_API oscar_status oscar_sequences_write(oscar_sequence *const *sequences, int count, int layer, const float *k,
                                             const float *v);
/* All layers written: the step becomes part of the sequence, exact forms that are not read any more are released. Cannot run out.
 * On a GPU, where writes are only enqueued, this is what reports NUMERIC, and it waits for them; the step must then be aborted.
 */
OSCAR_API oscar_status oscar_sequence_commit(oscar_sequence *sequence);
OSCAR_API void oscar_sequence_abort(oscar_sequence *sequence);

/* One page of one layer and KV head in canonical form, for tests and exchange. page < ceil(length / 64).
 * *coded tells the form. Exact, or coded by a filter: k, v receive [64][head_dim] BF16 (as uint16_t); coded: canonical rows
 * [64][row_bytes].
 * Buffers may be NULL to ask for the form only. */
OSCAR_API oscar_status oscar_sequence_read_page(const oscar_sequence *sequence, int page, int layer, int kv_head, bool *coded,
                                                void *k, void *v);

/* Walks every invariant: each unit is free or referenced, counts match the tables, the budget holds. OSCAR_INVALID_ARGUMENT with
 * the violation named. Debug builds run it after every operation. */
OSCAR_API oscar_status oscar_cache_check(const oscar_cache *cache);

#ifdef __cplusplus
}
#endif
#endif
