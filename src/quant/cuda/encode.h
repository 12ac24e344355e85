/*
 * quant/cuda/encode.h - exact pages become coded ones on a GPU. Private; for C and CUDA, builds with CUDA only.
 *
 * The codes are those of page_encode (quant/page_form.h), to the bit, in the device form (quant/device_form.h).
 */
#ifndef OSCAR_QUANT_CUDA_ENCODE_H
#define OSCAR_QUANT_CUDA_ENCODE_H

#include "cuda/device.h"
#include "quant/page_form.h"

#ifdef __cplusplus
extern "C" {
#endif

/* A codec set on a GPU: what encoding reads of it. It does not keep the set. */
struct cuda_codecs;

/* Device memory that cuda_codecs_create takes; of a complete set (oscar_codec_set_check). */
size_t cuda_codecs_bytes(const oscar_codec_set *set);
/* Enqueues the copy. Errors: INVALID_ARGUMENT (an incomplete set), UNSUPPORTED (heads too large for this GPU's shared memory, or
 * what the driver says), NO_MEMORY. */
oscar_status cuda_codecs_create(struct oscar_cuda *cuda, const oscar_codec_set *set, struct cuda_codecs **codecs);
void cuda_codecs_free(struct cuda_codecs *codecs); /* may be NULL */

/* Where the pages of a layer are: unit u at memory + u * unit_bytes. An exact page has for each KV head K [64][head_dim] then V
 * [64][head_dim], BF16; a coded one for each KV head, head_bytes apart, the keys and, side_bytes[0] behind them, the values. All
 * of them multiples of 16. */
struct cuda_layer {
  uint8_t *memory;
  size_t unit_bytes, head_bytes, side_bytes[2];
  struct side_form form[2];
};

struct cuda_demotion {
  int32_t exact, coded; /* units */
  int64_t page;         /* number of the page in its sequence, below 2^40 */
};

/* Enqueues: pages `exact` of n jobs become pages `coded`, in layers layer_begin .. layer_end - 1. `layers` [layer_end] and `jobs`
 * [n] are on the device.
 * A row that cannot be encoded (a number in it is not finite, or its metadata leave fp16) leaves bits of no meaning in its place;
 * the other rows are written. The least of such rows, as cuda_bad_row packs it, is put into *bad (on the device; the caller
 * sets it to all ones) if it is less than what is there.
 * Errors: INVALID_ARGUMENT, UNSUPPORTED (what the driver says). */
oscar_status cuda_encode(struct cuda_codecs *codecs, const struct cuda_layer *layers, int layer_begin, int layer_end,
                         int kv_heads, const struct cuda_demotion *jobs, int n, unsigned long long *bad);

/* A row: compared by layer, then job, then place in the page, then KV head, then keys before values. */
struct cuda_bad_row {
  int layer, job, row, head, side;
};
#define CUDA_BAD_NONE      (~0ull)
#define CUDA_MOST_LAYERS   (1 << 15)
#define CUDA_MOST_JOBS     (1 << 26)
#define CUDA_MOST_KV_HEADS (1 << 15)
static inline struct cuda_bad_row cuda_bad_row(unsigned long long bad) {
  struct cuda_bad_row row;
  row.layer = (int)(bad >> 48);
  row.job = (int)(bad >> 22 & (CUDA_MOST_JOBS - 1));
  row.row = (int)(bad >> 16 & (PAGE_TOKENS - 1));
  row.head = (int)(bad >> 1 & (CUDA_MOST_KV_HEADS - 1));
  row.side = (int)(bad & 1);
  return row;
}

#ifdef __cplusplus
}
#endif
#endif
