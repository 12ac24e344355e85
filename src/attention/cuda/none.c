/* none.c - a build without CUDA: no handle of a GPU exists, so nothing here is ever called. */
#include "attention/cuda/device.h"

oscar_status device_attention_create(oscar_cache *cache, int query_heads, float scale, struct device_attention **attention) {
  (void)cache, (void)query_heads, (void)scale;
  *attention = NULL;
  return OSCAR_UNSUPPORTED;
}
void device_attention_free(struct device_attention *attention) { (void)attention; }
oscar_status device_attention_run(struct device_attention *attention, int layer, int window, const oscar_attention_job *jobs,
                                  int n_jobs) {
  (void)attention, (void)layer, (void)window, (void)jobs, (void)n_jobs;
  return OSCAR_UNSUPPORTED;
}
oscar_status device_attention_make_ready(struct device_attention *attention, const int *windows, int n_windows,
                                         oscar_sequence *const *sequences, int count, int *kernels) {
  (void)attention, (void)windows, (void)n_windows, (void)sequences, (void)count, (void)kernels;
  return OSCAR_UNSUPPORTED;
}
oscar_status device_attention_step(struct device_attention *attention, int layer, int window, const struct decode_rows *rows,
                                   float *out) {
  (void)attention, (void)layer, (void)window, (void)rows, (void)out;
  return OSCAR_UNSUPPORTED;
}
void device_attention_choose(struct device_attention *attention, enum attention_way way) { (void)attention, (void)way; }
