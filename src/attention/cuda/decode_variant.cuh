/*
 * attention/cuda/decode_variant.cuh - the kernels of one head dimension; decode_64.cu and its like compile them, side by side.
 * Private.
 */
#ifndef OSCAR_ATTENTION_CUDA_DECODE_VARIANT_CUH
#define OSCAR_ATTENTION_CUDA_DECODE_VARIANT_CUH

namespace decode {

constexpr int MOST_VALUE_BLOCKS = 32;

/* For what fits usually are, without and with a mean that turns; for any keys and forms; for any values besides. */
struct variant {
  int head_dim, blocks;                           /* of keys and of values that are usual */
  const void *usual[2][2], *any_keys[2], *any[2]; /* [turning][tiles of 4 rows - 1] */
};
extern const variant variant_64, variant_96, variant_128, variant_256;

} // namespace decode

#define KERNEL(d, keys, values, row_tiles, any, any_values, waves)                                                               \
  ((const void *)&decode::kernel<decode::traits<d, keys, values, row_tiles, any, any_values, waves>>)
#define VARIANT(d, blocks)                                                                                                       \
  {                                                                                                                              \
    d, blocks,                                                                                                                   \
        {{KERNEL(d, blocks, blocks, 1, false, false, false), KERNEL(d, blocks, blocks, 2, false, false, false)},                 \
         {KERNEL(d, blocks, blocks, 1, false, false, true), KERNEL(d, blocks, blocks, 2, false, false, true)}},                  \
        {KERNEL(d, 0, blocks, 1, true, false, true), KERNEL(d, 0, blocks, 2, true, false, true)}, {                              \
      KERNEL(d, 0, decode::MOST_VALUE_BLOCKS, 1, true, true, true), KERNEL(d, 0, decode::MOST_VALUE_BLOCKS, 2, true, true, true) \
    }                                                                                                                            \
  }

#endif
