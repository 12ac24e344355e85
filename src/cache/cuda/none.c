/* none.c - a build without CUDA: no handle of a GPU exists, so nothing here is ever called. */
#include "cache/cuda/store.h"

static oscar_status never(void) { return OSCAR_UNSUPPORTED; }

size_t device_store_bytes(const oscar_cache_options *options) {
  (void)options;
  return 0;
}
oscar_status device_store_create(oscar_cache *cache) {
  (void)cache;
  return never();
}
oscar_status device_store_layers(oscar_cache *cache) {
  (void)cache;
  return never();
}
void device_store_free(oscar_cache *cache) { (void)cache; }
void device_store_copy(const oscar_cache *cache, int32_t from, int32_t to, bool exact) {
  (void)cache, (void)from, (void)to, (void)exact;
}
oscar_status device_store_write(oscar_sequence *const *sequences, int count, int layer, const float *k, const float *v) {
  (void)sequences, (void)count, (void)layer, (void)k, (void)v;
  return never();
}
oscar_status device_store_make_ready(oscar_sequence *const *sequences, int count, struct device_step *step) {
  (void)sequences, (void)count, (void)step;
  return never();
}
oscar_status device_store_read(const oscar_sequence *sequence, struct page_entry entry, int layer, int kv_head, oscar_side side,
                               void *out) {
  (void)sequence, (void)entry, (void)layer, (void)kv_head, (void)side, (void)out;
  return never();
}
oscar_status device_store_download(const oscar_cache *cache, int32_t unit, bool coded, void *out) {
  (void)cache, (void)unit, (void)coded, (void)out;
  return never();
}
oscar_status device_store_upload(const oscar_cache *cache, int layer, int32_t unit, const void *from, size_t bytes) {
  (void)cache, (void)layer, (void)unit, (void)from, (void)bytes;
  return never();
}
oscar_status device_store_check(const oscar_cache *cache) {
  (void)cache;
  return never();
}
