/*
 * attention/cuda/decode/arguments.cuh - what the kernel is given, and how rows of queries are columns of products. Private.
 */
#ifndef OSCAR_ATTENTION_CUDA_DECODE_ARGUMENTS_CUH
#define OSCAR_ATTENTION_CUDA_DECODE_ARGUMENTS_CUH

#include "attention/cuda/decode/data.cuh"

namespace decode {

/* A mean does not turn; by polynomials and fast pairs; by pairs that have curves of their own (decode.h). */
enum how_it_turns { STAYS, BY_WAVES, BY_PAIRS };

/* Forms that kernels are compiled for: both sides with four log gains, or with one fp16 gain; any; or exact pages alone. */
enum kernel_form { FOUR_LOG_GAINS, ONE_GAIN, ANY_FORM, NO_CODES };

/* Forms of the two sides. */
struct page_forms {
  int key_crumbs, key_groups, key_form, value_crumbs, value_groups, value_form;
};

/* Of the kernel. */
struct arguments {
  const struct decode_tile *tiles;
  const struct decode_page *pages;
  const float *q;
  const uint8_t *memory;
  size_t unit_bytes;
  const uint8_t *prepared;
  const uint32_t *value_map; /* of decode_layer */
  float *parts, *out;
  struct decode_rope rope;
  const uint16_t *pairs; /* of decode_layer, as curves */
  const uint8_t *curves;
  struct page_forms forms;
  const struct decode_line *line;
  int tile_count, kv_heads, group, head_dim, window;
  int turns;               /* how_it_turns */
  int turning_pairs, fast; /* of decode_layer; curved_pairs */
  int head_bytes, value_offset;
  int page_bytes, slot_bytes; /* what is copied of a coded page for one head; of a slot of a ring */
  int angle_bytes;            /* of rope.turns for a page and the pairs of a head, where they are copied */
  bool coded;
  bool map_is_here;  /* a KV head's map of values is copied to shared memory */
  bool copies_ahead; /* queries and curves of the next item, while one is worked on */
  float scale;
};

/* Columns of a product are eight: of a row each, or of four rows each twice, where there are no more. Of 16 rows there are two
 * such tiles of columns. */
__host__ __device__ constexpr int column_tiles_of(int row_tiles) { return row_tiles > 2 ? row_tiles / 2 : 1; }
/* Column c is row c / 2 of a tile of 4 rows, of two such in turn. */
template <int NT> __device__ __forceinline__ int row_of_column(int c) { return c / 2 + (NT > 1 ? c % 2 * 4 : 0); }
/* The tile of 4 rows of a lane's column u, 0 or 1, of a tile of columns. */
template <int NT> __device__ __forceinline__ constexpr int row_tile_of(int columns, int u) {
  return NT > 1 ? 2 * columns + u : 0;
}

} // namespace decode

#endif
