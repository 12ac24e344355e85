/*
 * quant/device_form.h - the form of a coded page on a GPU (64 tokens of one KV head, one side), and canonical rows to and from
 * it. Private; for C and CUDA.
 *
 * A side has as many bytes as in any form (page_form.h): codes, 64 C/4 bytes, then metadata, [word of a row][64 tokens].
 * The codes are 32-bit words of 16 crumbs, in the order in which the 32 lanes of a warp want them as operand A of matrix
 * instructions (PTX ISA, "matrix fragments for mma"): lane 4 g + q holds row g, and row g + 8, of a tile.
 *
 * Keys are the rows of m16n8k32 products of bytes. Blocks of 16 crumbs are dealt to four classes, class p having blocks p B/4 to
 * (p + 1) B/4 - 1 of all B = C/16: the rule by which groups of metadata are cut, so that a class has one gain. The crumbs of
 * class p are bits 2p and 2p + 1 of the bytes of a word: one AND, and the word is an operand whose numbers are 4^p times the
 * crumbs. With Q = B div 4, every class has Q blocks; a word has four crumbs, 4q .. 4q + 3 of a block, of each class. What is
 * over, R = B mod 4 blocks, belongs to classes {3}, {1, 3} or {1, 2, 3}; words that would be part empty hold more tokens instead:
 *     [pair of blocks of a class][tile of 16 tokens][lane][block of the pair][token g, g + 8]       Q/2 pairs
 *     [2 tiles][lane][tile][token g, g + 8]                                                         if Q is odd
 *     [lane][4 tiles]      classes 1 and 3, token g at its class's bits, token g + 8 two bits lower  if R is 2 or 3
 *     [lane][2 tiles of 2] class 3 (R = 1) or 2 (R = 3): bits 2j are token g + 8 (j % 2) of the (j/2)-th tile   if R is 1 or 3
 *
 * Values are the transposed rows of m16n8k16 products of fp16: rows are crumbs, the sum runs over tokens.
 *     [block of 16 crumbs][lane][32 tokens]   bits 4 k + 16 h + 2 j of a word: crumb g + 8 j of token 8 k + 2 q + h
 * Crumbs in bits 0 to 3 of a half word, or in bits 4 to 7, and nothing else set, are a subnormal fp16 number: the crumb times
 * 2^-24, 2^-22, 2^-20 or 2^-18, exactly.
 */
#ifndef OSCAR_DEVICE_FORM_H
#define OSCAR_DEVICE_FORM_H

#ifdef __CUDACC__
#define ON_BOTH __host__ __device__
#else
#define ON_BOTH
#endif

#define KEY_CLASSES 4

/* Where a crumb's two bits are: a word of the side's codes, and the shift. */
struct crumb_place {
  int word, shift;
};

/* The first block of a class. */
ON_BOTH static inline int class_begin(int blocks, int class_) { return class_ * blocks / KEY_CLASSES; }
ON_BOTH static inline int class_of_block(int blocks, int block) {
  int class_ = KEY_CLASSES - 1;
  while (class_begin(blocks, class_) > block) class_--;
  return class_;
}

ON_BOTH static inline struct crumb_place place_of_key_crumb(int blocks, int token, int crumb) {
  const int block = crumb / 16, class_ = class_of_block(blocks, block), i = block - class_begin(blocks, class_);
  const int full = blocks / KEY_CLASSES, over = blocks % KEY_CLASSES;
  const int tile = token / 16, high = token % 16 / 8, lane = token % 8 * 4 + crumb % 16 / 4, byte = 8 * (crumb % 4);
  struct crumb_place place;
  place.shift = byte + 2 * class_;
  if (i < full / 2 * 2) {
    place.word = i / 2 * 512 + tile * 128 + lane * 4 + i % 2 * 2 + high;
  } else if (i < full) {
    place.word = full / 2 * 512 + tile / 2 * 128 + lane * 4 + tile % 2 * 2 + high;
  } else if (over >= 2 && class_ != 2) {
    place.word = full * 256 + lane * 4 + tile;
    place.shift -= 2 * high;
  } else {
    place.word = full * 256 + (over == 3 ? 128 : 0) + lane * 2 + tile / 2;
    place.shift = byte + 2 * (tile % 2 * 2 + high);
  }
  return place;
}

ON_BOTH static inline struct crumb_place place_of_value_crumb(int token, int crumb) {
  const int lane = crumb % 8 * 4 + token % 8 / 2;
  struct crumb_place place;
  place.word = crumb / 16 * 64 + lane * 2 + token / 32;
  place.shift = token % 2 * 16 + token % 32 / 8 * 4 + crumb % 16 / 8 * 2;
  return place;
}

#ifndef __CUDACC__
#include "quant/page_form.h"

/* canonical: [64][row_bytes]; device: side_bytes(f) bytes, 4-byte aligned. For tests and exchange. */
void page_to_device(const struct side_form *f, oscar_side side, const uint8_t *canonical, uint8_t *device);
void page_from_device(const struct side_form *f, oscar_side side, const uint8_t *device, uint8_t *canonical);
#endif

#endif
