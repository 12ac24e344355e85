/*
 * backend/blocks.h - the layouts of quantized weights, byte for byte as they lie in a GGUF file. Private.
 *
 * Formats: ggml, ggml/src/ggml-common.h (https://github.com/ggml-org/ggml). Every member is a byte array, so the structs have
 * alignment 1 and may be laid over a mapping at any address; halves are little-endian IEEE binary16.
 */
#ifndef OSCAR_BLOCKS_H
#define OSCAR_BLOCKS_H

#include "backend/backend.h"

#define SMALL_BLOCK 32
#define SUPER_BLOCK 256

/* Nibbles: element i < 16 is the low half of qs[i], element i + 16 the high half of qs[i]. */
struct block_q4_0 { /* x = d (q - 8) */
  uint8_t d[2];
  uint8_t qs[16];
};
struct block_q4_1 { /* x = d q + m */
  uint8_t d[2], m[2];
  uint8_t qs[16];
};
/* The fifth bit of element i is bit i of the little-endian 32-bit word qh. */
struct block_q5_0 { /* x = d (q - 16) */
  uint8_t d[2];
  uint8_t qh[4];
  uint8_t qs[16];
};
struct block_q5_1 { /* x = d q + m */
  uint8_t d[2], m[2];
  uint8_t qh[4];
  uint8_t qs[16];
};
struct block_q8_0 { /* x = d q */
  uint8_t d[2];
  int8_t qs[32];
};

/*
 * Eight runs of 32 elements, each with a 6-bit scale s and a 6-bit minimum m: x = (d s) q - (dmin m).
 * Bytes of 64 elements are interleaved: qs[32c + l] holds element 64c + l in its low half, 64c + 32 + l in its high half.
 * The 16 six-bit numbers lie in 12 bytes; see block_scale_min.
 */
struct block_q4_k {
  uint8_t d[2], dmin[2];
  uint8_t scales[12];
  uint8_t qs[128];
};
/* As Q4_K; the fifth bit of element 32r + l is bit r of qh[l]. */
struct block_q5_k {
  uint8_t d[2], dmin[2];
  uint8_t scales[12];
  uint8_t qh[32];
  uint8_t qs[128];
};
/*
 * Sixteen runs of 16 elements with an 8-bit scale: x = (d s) (q - 32). Of each half h of 128 elements, quarter k (32 elements)
 * has its low four bits in ql[64h + 32(k & 1) + l], low half for k < 2, high half otherwise, and its upper two in bits 2k,
 * 2k + 1 of qh[32h + l].
 */
struct block_q6_k {
  uint8_t ql[128];
  uint8_t qh[64];
  int8_t scales[16];
  uint8_t d[2];
};

/* Scale and minimum of run r of a Q4_K or Q5_K block. Runs 0-3 are the low six bits of bytes r and r + 4; runs 4-7 have their low
 * four bits in the halves of byte r + 4 and their upper two at the top of bytes r - 4 and r. */
static inline void block_scale_min(const uint8_t scales[12], int r, int *scale, int *minimum) {
  if (r < 4) {
    *scale = scales[r] & 63;
    *minimum = scales[r + 4] & 63;
  } else {
    *scale = (scales[r + 4] & 15) | (scales[r - 4] >> 6) << 4;
    *minimum = scales[r + 4] >> 4 | (scales[r] >> 6) << 4;
  }
}

/* Bytes of one row in the file; 0 if the type is none that weight_block knows. */
static inline size_t weight_row_bytes(const struct weight *w) {
  int elements = 1;
  size_t bytes = 0;
  weight_block(w->type, &elements, &bytes);
  return (size_t)(w->cols / elements) * bytes;
}

static inline float block_half(const uint8_t bytes[2]) { return f16_to_f32((uint16_t)(bytes[0] | bytes[1] << 8)); }

#endif
