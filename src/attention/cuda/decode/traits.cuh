/*
 * attention/cuda/decode/traits.cuh - what is known when a kernel is compiled. Private.
 */
#ifndef OSCAR_ATTENTION_CUDA_DECODE_TRAITS_CUH
#define OSCAR_ATTENTION_CUDA_DECODE_TRAITS_CUH

#include "attention/cuda/decode/page_ring.cuh"

namespace decode {

/* Where a multiprocessor has 100 KB of shared memory instead of 160 or more. */
__host__ __device__ constexpr bool has_little_memory(int capability) {
  return capability == 86 || capability == 89 || capability >= 120;
}
/* Warps of a block, of which a multiprocessor has one: as many as registers and shared memory allow. turns, steps: of a mean
 * that turns; any: kernels for any form. */
__host__ __device__ constexpr int warps_of(int value_blocks, int row_tiles, how_it_turns turns, int steps, bool any,
                                           int capability) {
  int warps = value_blocks > 6 ? 8 : 12;
  if (value_blocks > 16)
    warps = 4;
  else if (value_blocks > 8)
    warps = turns != STAYS || any ? 4 : 6;
  else if (any)
    warps = row_tiles == 2 ? 6 : 8;
  else if (row_tiles > 1)
    warps = turns == BY_WAVES && steps > 1 ? 6 : 8;
  return has_little_memory(capability) ? warps * 5 / 8 : warps;
}

/* What is known when a kernel is compiled. */
template <int D_, int KEY_BLOCKS_, int VALUE_BLOCKS_, int NT_, int FORM_, bool ANY_VALUES_, how_it_turns TURNS_, int STEPS_>
struct traits {
  static constexpr int D = D_, KEY_BLOCKS = KEY_BLOCKS_, VALUE_BLOCKS = VALUE_BLOCKS_, NT = NT_;
  static constexpr int FORM = FORM_;
  static constexpr bool ANY = FORM_ == ANY_FORM;   /* and any number of blocks of keys, a window, or waves */
  static constexpr bool ANY_VALUES = ANY_VALUES_;  /* any number of blocks of values, up to VALUE_BLOCKS */
  static constexpr how_it_turns TURNS = TURNS_;    /* the mean; ANY: in whatever way */
  static constexpr int STEPS = STEPS_;             /* of its curves; ANY: as many as there are */
  static constexpr bool CODED = FORM_ != NO_CODES; /* ANY: perhaps */
  static constexpr bool WIDE = NT_ == 4;           /* 16 rows */
#ifdef __CUDA_ARCH__
  static constexpr int WARPS = warps_of(VALUE_BLOCKS_, NT_, TURNS_, STEPS_, ANY, __CUDA_ARCH__ / 10);
#else
  static constexpr int WARPS = 1; /* the host asks for those of its device */
#endif
  /* of pages, where not ANY */
  static constexpr int GROUPS = FORM == FOUR_LOG_GAINS ? GAIN_CLASSES : 1;
  static constexpr int ROW_FORM = FORM == FOUR_LOG_GAINS ? OSCAR_ROW_LOG_GAINS : OSCAR_ROW_GAIN;
  static constexpr int KEY_BYTES = 256 * KEY_BLOCKS + 128, VALUE_BYTES = 256 * VALUE_BLOCKS + 128;
};

/* The arguments, with what is known when the kernel is compiled in its place: that takes neither registers nor instructions. */
template <class T> __device__ __forceinline__ arguments known_arguments(const arguments &given) {
  arguments a = given;
  if constexpr (T::ANY) return a;
  a.head_dim = T::D;
  a.coded = T::CODED;
  a.turns = T::TURNS;
  if constexpr (T::TURNS != BY_PAIRS) a.angle_bytes = 0;
  if constexpr (T::TURNS == STAYS) a.turning_pairs = a.fast = 0;
  if constexpr (!T::CODED) {
    a.forms = {};
    a.page_bytes = 0;
    a.slot_bytes = EXACT_TOKENS * T::D * 2;
    a.map_is_here = a.copies_ahead = false;
  } else {
    a.window = 0;
    a.forms = {16 * T::KEY_BLOCKS, T::GROUPS, T::ROW_FORM, 16 * T::VALUE_BLOCKS, T::GROUPS, T::ROW_FORM};
    a.value_offset = T::KEY_BYTES;
    a.head_bytes = a.page_bytes = T::KEY_BYTES + T::VALUE_BYTES;
    a.slot_bytes = max(T::KEY_BYTES + T::VALUE_BYTES, EXACT_TOKENS * T::D * 2);
    if (T::TURNS == BY_PAIRS)
      a.rope.pairs = T::D / 2, a.turning_pairs = a.fast = T::STEPS * CURVE_STEP, a.angle_bytes = a.turning_pairs * 8;
    if (T::TURNS == BY_WAVES) a.rope.steps = T::STEPS;
  }
  return a;
}

} // namespace decode

#endif
