/*
 * attention/cuda/decode_variant.cuh - the kernels of one head dimension; decode_64.cu and its like compile them, side by side.
 * Private.
 */
#ifndef OSCAR_ATTENTION_CUDA_DECODE_VARIANT_CUH
#define OSCAR_ATTENTION_CUDA_DECODE_VARIANT_CUH

namespace decode {

constexpr int MOST_VALUE_BLOCKS = 32;

/* For what fits usually are, without a mean that turns and with one of two or three steps of 16 curves; for any keys and forms;
 * for any values besides. */
constexpr int LEAST_STEPS = 2, USUAL_KINDS = 3;
struct variant {
  int head_dim, blocks;                                     /* of keys and of values that are usual */
  const void *usual[USUAL_KINDS][2], *any_keys[2], *any[2]; /* [kind][tiles of 4 rows - 1] */
};
extern const variant variant_64, variant_96, variant_128, variant_256;

} // namespace decode

#define KERNEL(d, keys, values, row_tiles, any, any_values, steps)                                                               \
  ((const void *)&decode::kernel<decode::traits<d, keys, values, row_tiles, any, any_values, steps>>)
#define BOTH(d, keys, values, any, any_values, steps)                                                                            \
  { KERNEL(d, keys, values, 1, any, any_values, steps), KERNEL(d, keys, values, 2, any, any_values, steps) }
#define VARIANT(d, blocks)                                                                                                       \
  {                                                                                                                              \
    d, blocks,                                                                                                                   \
        {BOTH(d, blocks, blocks, false, false, 0), BOTH(d, blocks, blocks, false, false, 2),                                     \
         BOTH(d, blocks, blocks, false, false, 3)},                                                                              \
        BOTH(d, 0, blocks, true, false, 0), BOTH(d, 0, decode::MOST_VALUE_BLOCKS, true, true, 0)                                 \
  }

#endif
