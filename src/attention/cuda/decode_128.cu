/* decode_128.cu - decode attention for heads of 128 (decode.cuh). */
#include "attention/cuda/decode.cuh"
#include "attention/cuda/decode_variant.cuh"

const decode::variant decode::variant_128 = VARIANT(128, 8, WIDE(128, 8));
