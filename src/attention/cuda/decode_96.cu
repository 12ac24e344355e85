/* decode_96.cu - decode attention for heads of 96 (decode.cuh). */
#include "attention/cuda/decode.cuh"
#include "attention/cuda/decode_variant.cuh"

const decode::variant decode::variant_96 = VARIANT(96, 6, WIDE(96, 6));
