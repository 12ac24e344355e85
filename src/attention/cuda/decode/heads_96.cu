/* attention/cuda/decode/heads_96.cu - decode attention for heads of 96 (kernel.cuh). */
#include "attention/cuda/decode/kernel.cuh"
#include "attention/cuda/decode/variant.cuh"

const decode::variant decode::variant_96 = VARIANT(96, 6, WIDE(96, 6));
