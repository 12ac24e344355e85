/* decode_256.cu - decode attention for heads of 256 (decode.cuh). */
#include "attention/cuda/decode.cuh"
#include "attention/cuda/decode_variant.cuh"

const decode::variant decode::variant_256 = VARIANT(256, 16, {});
