/*
 * attention/cuda/decode_variant.cuh - the kernels of one head dimension; decode_64.cu and its like compile them, side by side.
 * Private.
 */
#ifndef OSCAR_ATTENTION_CUDA_DECODE_VARIANT_CUH
#define OSCAR_ATTENTION_CUDA_DECODE_VARIANT_CUH

namespace decode {

constexpr int MOST_VALUE_BLOCKS = 32;

/* For what fits usually are, without a mean that turns and with one of one or two steps of curves, in both usual forms; for any
 * keys and forms; for any values besides. A kind is a number of steps. */
constexpr int USUAL_KINDS = 3;
struct variant {
  int head_dim, blocks;                                        /* of keys and of values that are usual */
  const void *usual[2][USUAL_KINDS][2], *any_keys[2], *any[2]; /* [kernel_form][kind][tiles of 4 rows - 1] */
  const void *few_warps[2]; /* [kernel_form] of kind 1 and one tile of 4 rows: for short stretches */
};
extern const variant variant_64, variant_96, variant_128, variant_256;

} // namespace decode

#define KERNEL(d, keys, values, row_tiles, form, any_values, steps)                                                              \
  ((const void *)&decode::kernel<decode::traits<d, keys, values, row_tiles, decode::form, any_values, steps>>)
#define BOTH(d, keys, values, form, any_values, steps)                                                                           \
  { KERNEL(d, keys, values, 1, form, any_values, steps), KERNEL(d, keys, values, 2, form, any_values, steps) }
#define USUAL(d, blocks, form)                                                                                                   \
  { BOTH(d, blocks, blocks, form, false, 0), BOTH(d, blocks, blocks, form, false, 1), BOTH(d, blocks, blocks, form, false, 2) }
#define FEW(d, blocks, form) ((const void *)&decode::kernel<decode::traits<d, blocks, blocks, 1, decode::form, false, 1, true>>)
#define VARIANT(d, blocks)                                                                                                       \
  {                                                                                                                              \
    d, blocks, {USUAL(d, blocks, FOUR_LOG_GAINS), USUAL(d, blocks, ONE_GAIN)}, BOTH(d, 0, blocks, ANY_FORM, false, 0),           \
        BOTH(d, 0, decode::MOST_VALUE_BLOCKS, ANY_FORM, true, 0), {                                                              \
      FEW(d, blocks, FOUR_LOG_GAINS), FEW(d, blocks, ONE_GAIN)                                                                   \
    }                                                                                                                            \
  }

#endif
