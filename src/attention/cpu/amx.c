/*
 * amx.c - attention of many rows with AMX: products of 16 x 32 and 32 x 16 BF16 numbers in one instruction.
 *
 * Tiles 0..3 are the sums of two by two blocks, 4 and 5 blocks of rows on the left, 6 and 7 blocks of columns on the right. The
 * instructions are written out because the compiler's intrinsics do not say that loads and stores of tiles touch memory, which
 * lets it move them across the stores that they depend on.
 */
#include "attention/cpu/matrix_kernels.h"

#define TILE_LOAD(tile, from, stride)                                                                                            \
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #tile : : "r"(from), "r"((size_t)(stride)) : "memory")
#define TILE_STORE(tile, to, stride)                                                                                             \
  __asm__ volatile("tilestored %%tmm" #tile ", (%0,%1,1)" : : "r"(to), "r"((size_t)(stride)) : "memory")
#define TILE_ZERO(tile)            __asm__ volatile("tilezero %%tmm" #tile : :)
#define TILE_DOT(sum, left, right) __asm__ volatile("tdpbf16ps %%tmm" #right ", %%tmm" #left ", %%tmm" #sum : :)

INLINE void product(int row_blocks, int col_blocks, int chunks, const struct term *terms, int n, int a_stride, int b_stride,
                    float *c, int c_stride, bool add) {
  size_t a_bytes = sizeof(uint16_t) * (size_t)a_stride, c_bytes = sizeof(float) * (size_t)c_stride;
  bool rows = row_blocks == 2, cols = col_blocks == 2;
  float *c_next = c + 16 * c_stride;
  if (add) {
    TILE_LOAD(0, c, c_bytes);
    if (cols) TILE_LOAD(1, c + 16, c_bytes);
    if (rows) TILE_LOAD(2, c_next, c_bytes);
    if (rows && cols) TILE_LOAD(3, c_next + 16, c_bytes);
  } else {
    TILE_ZERO(0);
    if (cols) TILE_ZERO(1);
    if (rows) TILE_ZERO(2);
    if (rows && cols) TILE_ZERO(3);
  }
  for (int i = 0; i < chunks; i++)
    for (int t = 0; t < n; t++) {
      const uint16_t *a = terms[t].a + i * 32, *b = terms[t].b + i * b_stride;
      TILE_LOAD(4, a, a_bytes);
      if (rows) TILE_LOAD(5, a + 16 * a_stride, a_bytes);
      TILE_LOAD(6, b, 64);
      if (cols) TILE_LOAD(7, b + TILE, 64);
      TILE_DOT(0, 4, 6);
      if (cols) TILE_DOT(1, 4, 7);
      if (rows) TILE_DOT(2, 5, 6);
      if (rows && cols) TILE_DOT(3, 5, 7);
    }
  TILE_STORE(0, c, c_bytes);
  if (cols) TILE_STORE(1, c + 16, c_bytes);
  if (rows) TILE_STORE(2, c_next, c_bytes);
  if (rows && cols) TILE_STORE(3, c_next + 16, c_bytes);
}

/* Tiles belong to a thread and are released after use: while they hold anything, every switch of threads saves 8 KiB. */
static void begin(void) {
  static const struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
  } config __attribute__((aligned(64))) = {
      .palette = 1, .bytes = {64, 64, 64, 64, 64, 64, 64, 64}, .rows = {16, 16, 16, 16, 16, 16, 16, 16}};
  __asm__ volatile("ldtilecfg %0" : : "m"(config));
}

static void end(void) { __asm__ volatile("tilerelease" : :); }

const struct page_kernels page_kernels_amx = MATRIX_KERNELS("AMX BF16", begin, end);
