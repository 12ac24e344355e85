/*
 * attention/cuda/decode/variant.cuh - the kernels of one head dimension; heads_64.cu and its like compile them, side by side.
 * Private.
 */
#ifndef OSCAR_ATTENTION_CUDA_DECODE_VARIANT_CUH
#define OSCAR_ATTENTION_CUDA_DECODE_VARIANT_CUH

namespace decode {

constexpr int MOST_VALUE_BLOCKS = 32;

/* For what fits usually are, without a mean that turns and with one of one or two steps of curves, in both usual forms; for any
 * keys and forms; for any values besides; for caches without codes. */
constexpr int USUAL_KINDS = 5, USUAL_STEPS[USUAL_KINDS] = {0, 1, 2, 1, 2};
constexpr how_it_turns USUAL_TURNS[USUAL_KINDS] = {STAYS, BY_PAIRS, BY_PAIRS, BY_WAVES, BY_WAVES};
/* The first of them for 16 rows too, where heads are not so large that their sums would not fit registers. */
constexpr int WIDE_KINDS = 3;
struct variant {
  int head_dim, blocks;                                        /* of keys and of values that are usual */
  const void *usual[2][USUAL_KINDS][2], *any_keys[2], *any[2]; /* [kernel_form][kind][tiles of 4 rows - 1] */
  const void *no_codes[2];
  const void *wide[2][WIDE_KINDS], *wide_no_codes; /* of 16 rows; NULL: there is none */
};
extern const variant variant_64, variant_96, variant_128, variant_256;

} // namespace decode

#define KERNEL(d, keys, values, row_tiles, form, any_values, turns, steps)                                                       \
  ((const void *)&decode::kernel<decode::traits<d, keys, values, row_tiles, decode::form, any_values, turns, steps>>)
#define BOTH(d, keys, values, form, any_values, turns, steps)                                                                    \
  { KERNEL(d, keys, values, 1, form, any_values, turns, steps), KERNEL(d, keys, values, 2, form, any_values, turns, steps) }
#define KIND(d, blocks, form, kind) BOTH(d, blocks, blocks, form, false, decode::USUAL_TURNS[kind], decode::USUAL_STEPS[kind])
#define USUAL(d, blocks, form)                                                                                                   \
  {                                                                                                                              \
    KIND(d, blocks, form, 0), KIND(d, blocks, form, 1), KIND(d, blocks, form, 2), KIND(d, blocks, form, 3),                      \
        KIND(d, blocks, form, 4)                                                                                                 \
  }
#define WIDE_FORM(d, blocks, form)                                                                                               \
  {                                                                                                                              \
    KERNEL(d, blocks, blocks, 4, form, false, decode::USUAL_TURNS[0], decode::USUAL_STEPS[0]),                                   \
        KERNEL(d, blocks, blocks, 4, form, false, decode::USUAL_TURNS[1], decode::USUAL_STEPS[1]),                               \
        KERNEL(d, blocks, blocks, 4, form, false, decode::USUAL_TURNS[2], decode::USUAL_STEPS[2])                                \
  }
#define WIDE(d, blocks)                                                                                                          \
  {WIDE_FORM(d, blocks, FOUR_LOG_GAINS), WIDE_FORM(d, blocks, ONE_GAIN)},                                                        \
      KERNEL(d, blocks, blocks, 4, NO_CODES, false, decode::STAYS, 0)
#define VARIANT(d, blocks, ...)                                                                                                  \
  {                                                                                                                              \
    d, blocks, {USUAL(d, blocks, FOUR_LOG_GAINS), USUAL(d, blocks, ONE_GAIN)},                                                   \
        BOTH(d, 0, blocks, ANY_FORM, false, decode::STAYS, 0),                                                                   \
        BOTH(d, 0, decode::MOST_VALUE_BLOCKS, ANY_FORM, true, decode::STAYS, 0),                                                 \
        BOTH(d, blocks, blocks, NO_CODES, false, decode::STAYS, 0), __VA_ARGS__                                                  \
  }

#endif
