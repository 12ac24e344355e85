/* cache/cuda/write.h - the kernel that stores rows. Private; for C and CUDA. */
#ifndef OSCAR_CACHE_CUDA_WRITE_H
#define OSCAR_CACHE_CUDA_WRITE_H

#include "cuda/device.h"

#ifdef __cplusplus
extern "C" {
#endif

/* k, v [tokens][kv_heads][head_dim] floats, rounded to BF16 (to nearest even), to `positions` [tokens]: of each token the unit of
 * its exact page and its place in it. `bad`: the least (2 (token kv_heads + head) + side) whose row is not finite in BF16. */
struct write_place {
  int32_t unit, place;
};
oscar_status write_rows(struct oscar_cuda *cuda, uint8_t *memory, size_t unit_bytes, int kv_heads, int head_dim, int tokens,
                        const struct write_place *places, const float *k, const float *v, unsigned long long *bad);

#ifdef __cplusplus
}
#endif
#endif
