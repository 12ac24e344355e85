/* attention/cuda/decode/heads_64.cu - decode attention for heads of 64 (kernel.cuh). */
#include "attention/cuda/decode/kernel.cuh"
#include "attention/cuda/decode/variant.cuh"

const decode::variant decode::variant_64 = VARIANT(64, 4, WIDE(64, 4));
