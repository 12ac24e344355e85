/* attention/cuda/decode/heads_128.cu - decode attention for heads of 128 (kernel.cuh). */
#include "attention/cuda/decode/kernel.cuh"
#include "attention/cuda/decode/variant.cuh"

const decode::variant decode::variant_128 = VARIANT(128, 8, WIDE(128, 8));
