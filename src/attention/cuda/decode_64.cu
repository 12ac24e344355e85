/* decode_64.cu - decode attention for heads of 64 (decode.cuh). */
#include "attention/cuda/decode.cuh"
#include "attention/cuda/decode_variant.cuh"

const decode::variant decode::variant_64 = VARIANT(64, 4, WIDE(64, 4));
