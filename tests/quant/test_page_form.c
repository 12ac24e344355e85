/* The packed page against the sentence that defines it, bit by bit, and round trips over forms. */
#include "support.h"

#include "quant/page_form.h"

static int canonical_crumb(const struct side_form *f, const uint8_t *row, int c) {
  return row[c % (f->crumbs / 4)] >> 2 * (c / (f->crumbs / 4)) & 3;
}

static const struct side_form forms[] = {{16, 1, 1, 0},   {32, 1, 2, 0},     {48, 1, 1, 0},  {48, 3, 2, 0},  {64, 2, 1, 0},
                                         {80, 1, 1, 0},   {112, 1, 2, 0},    {128, 1, 1, 0}, {128, 4, 1, 0}, {128, 8, 2, 0},
                                         {160, 1, 1, 0},  {192, 1, 2, 0},    {256, 2, 2, 0}, {512, 1, 2, 0}, {1024, 4, 1, 0},
                                         {4096, 1, 1, 0}, {4096, 256, 2, 0}, {48, 3, 0, 0},  {64, 4, 0, 0},  {80, 4, 0, 0}};

static size_t row_bytes_of(const struct side_form *f) {
  return (size_t)(f->crumbs / 4 + (f->meta_values ? 2 * f->groups * f->meta_values : 2));
}

static uint8_t *random_rows(const struct side_form *f, uint64_t *seed) {
  size_t bytes = PAGE_TOKENS * row_bytes_of(f);
  uint8_t *rows = malloc(bytes);
  assert_non_null(rows);
  for (size_t i = 0; i < bytes; i++) rows[i] = (uint8_t)test_random(seed);
  return rows;
}

static void a_packed_page_holds_every_crumb_where_the_header_says(void **state) {
  (void)state;
  uint64_t seed = 1;
  for (size_t n = 0; n < ARRAY_LENGTH(forms); n++) {
    const struct side_form *f = &forms[n];
    size_t row_bytes = row_bytes_of(f);
    assert_int_equal(side_bytes(f), PAGE_TOKENS * row_bytes);
    uint8_t *rows = random_rows(f, &seed), *packed = malloc(side_bytes(f));
    for (int side = OSCAR_KEYS; side <= OSCAR_VALUES; side++) {
      page_pack(f, (oscar_side)side, rows, packed);
      for (int t = 0; t < PAGE_TOKENS; t++) {
        const uint8_t *row = rows + (size_t)t * row_bytes;
        for (int c = 0; c < f->crumbs; c++) {
          /* the vector of (tile, group of 16 crumbs), then lane, byte and bits */
          const uint8_t *vector = packed + ((size_t)(t / 16) * (size_t)(f->crumbs / 16) + (size_t)(c / 16)) * 64;
          int lane = side == OSCAR_KEYS ? t % 16 : c % 16, inside = side == OSCAR_KEYS ? c % 16 : t % 16;
          assert_int_equal(vector[4 * lane + inside % 4] >> 2 * (inside / 4) & 3, canonical_crumb(f, row, c));
        }
        int words = f->meta_values ? f->groups * f->meta_values : 1;
        for (int v = 0; v < words; v++) {
          const uint8_t *meta = packed + side_code_bytes(f) + 2 * ((size_t)(t / 16 * words + v) * 16 + (size_t)(t % 16));
          assert_memory_equal(meta, row + f->crumbs / 4 + 2 * v, 2);
        }
      }
    }
    free(rows);
    free(packed);
  }
}

static void unpacking_undoes_packing(void **state) {
  (void)state;
  uint64_t seed = 2;
  for (size_t n = 0; n < ARRAY_LENGTH(forms); n++) {
    const struct side_form *f = &forms[n];
    size_t bytes = side_bytes(f);
    uint8_t *rows = random_rows(f, &seed), *packed = malloc(bytes), *back = malloc(bytes);
    for (int side = OSCAR_KEYS; side <= OSCAR_VALUES; side++) {
      memset(back, 0xA5, bytes);
      page_pack(f, (oscar_side)side, rows, packed);
      page_unpack(f, (oscar_side)side, packed, back);
      assert_memory_equal(rows, back, bytes);
    }
    free(rows);
    free(packed);
    free(back);
  }
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(a_packed_page_holds_every_crumb_where_the_header_says),
      cmocka_unit_test(unpacking_undoes_packing),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
