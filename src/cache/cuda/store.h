/*
 * cache/cuda/store.h - pages in the memory of a GPU: what cache.c, step.c and sequence.c do there instead of in host memory.
 * Private to the room.
 *
 * Units, page tables and all bookkeeping stay on the host; memory is touched by copies and kernels on the handle's stream only. A
 * coded page has the form of quant/device_form.h, an exact page is laid out as in host memory.
 */
#ifndef OSCAR_CACHE_CUDA_STORE_H
#define OSCAR_CACHE_CUDA_STORE_H

#include "cache/device_step.h"
#include "cache/state.h"

struct device_store;

/* Bytes of the GPU's memory that a store takes besides its pages. */
size_t device_store_bytes(const oscar_cache_options *options);
/* Memory for the arena's units; cache->memory and cache->store are set. The layers' parts are cut by the caller, who then says
 * so: kernels read where layers are. Errors: NO_MEMORY, UNSUPPORTED. */
oscar_status device_store_create(oscar_cache *cache);
oscar_status device_store_layers(oscar_cache *cache);
void device_store_free(oscar_cache *cache);

/* Copies `bytes` of every layer from one unit on to another. Enqueued; a failure shows at the next call that can fail. */
void device_store_copy(const oscar_cache *cache, int32_t from, int32_t to, bool exact);

/* The rows of open steps into their exact pages, and the pages that these demote into codes, in one layer. k, v: device memory.
 */
oscar_status device_store_write(oscar_sequence *const *sequences, int count, int layer, const float *k, const float *v);
/* As sequences_make_ready. */
oscar_status device_store_make_ready(oscar_sequence *const *sequences, int count, struct device_step *step);
/* One side of a page in canonical form (coded) or as BF16 (exact), in host memory. Waits. */
oscar_status device_store_read(const oscar_sequence *sequence, struct page_entry entry, int layer, int kv_head, oscar_side side,
                               void *out);
/* A page as it is, all layers one after the other, into host memory; waits. */
oscar_status device_store_download(const oscar_cache *cache, int32_t unit, bool coded, void *out);
/* Bytes of a unit of one layer from host memory, which may be used again at once. */
oscar_status device_store_upload(const oscar_cache *cache, int layer, int32_t unit, const void *from, size_t bytes);
/* NUMERIC if a row that was written since the last call could not be represented; waits if there was one. */
oscar_status device_store_check(const oscar_cache *cache);

#endif
