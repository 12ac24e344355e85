/* attention/cuda/decode/heads_256.cu - decode attention for heads of 256 (kernel.cuh). */
#include "attention/cuda/decode/kernel.cuh"
#include "attention/cuda/decode/variant.cuh"

const decode::variant decode::variant_256 = VARIANT(256, 16, {}, nullptr);
