/* The form of a page on a GPU: every crumb has a place of its own where the header says, and canonical rows survive the round
 * trip. */
#include "support.h"

#include "quant/device_form.h"

static const struct side_form forms[] = {{16, 1, 1, 0},  {32, 1, 2, 0},  {48, 3, 0, 0},  {64, 4, 0, 0},  {80, 4, 0, 0},
                                         {96, 4, 0, 0},  {112, 1, 2, 0}, {128, 4, 0, 0}, {144, 4, 1, 0}, {160, 1, 1, 0},
                                         {176, 4, 0, 0}, {192, 1, 2, 0}, {256, 2, 2, 0}, {512, 1, 2, 0}, {1024, 4, 1, 0}};

static size_t row_bytes_of(const struct side_form *f) { return side_bytes(f) / PAGE_TOKENS; }

static int canonical_crumb(const struct side_form *f, const uint8_t *row, int c) {
  return row[c % (f->crumbs / 4)] >> 2 * (c / (f->crumbs / 4)) & 3;
}

static void fill(uint8_t *bytes, size_t n, uint64_t *seed) {
  for (size_t i = 0; i < n; i++) bytes[i] = (uint8_t)test_random(seed);
}

static uint32_t word_of(const uint8_t *codes, size_t i) {
  uint32_t word;
  memcpy(&word, codes + 4 * i, sizeof word);
  return word;
}

static void rows_survive_the_round_trip(void **state) {
  (void)state;
  uint64_t seed = 1;
  for (size_t i = 0; i < ARRAY_LENGTH(forms); i++)
    for (int side = 0; side < 2; side++) {
      const struct side_form *f = &forms[i];
      uint8_t *rows = malloc(side_bytes(f)), *device = malloc(side_bytes(f)), *back = malloc(side_bytes(f));
      fill(rows, side_bytes(f), &seed);
      page_to_device(f, (oscar_side)side, rows, device);
      page_from_device(f, (oscar_side)side, device, back);
      assert_memory_equal(rows, back, side_bytes(f));
      free(rows);
      free(device);
      free(back);
    }
}

/* Words as the header lists them, read in the order in which a warp reads them. */
static void keys_lie_as_operands(void **state) {
  (void)state;
  uint64_t seed = 2;
  for (size_t n = 0; n < ARRAY_LENGTH(forms); n++) {
    const struct side_form *f = &forms[n];
    const int blocks = f->crumbs / 16, full = blocks / 4, over = blocks % 4;
    uint8_t *rows = malloc(side_bytes(f)), *device = malloc(side_bytes(f));
    fill(rows, side_bytes(f), &seed);
    page_to_device(f, OSCAR_KEYS, rows, device);
    for (int tile = 0; tile < 4; tile++)
      for (int lane = 0; lane < 32; lane++)
        for (int high = 0; high < 2; high++) {
          const uint8_t *row = rows + (size_t)(tile * 16 + lane / 4 + 8 * high) * row_bytes_of(f);
          for (int class = 0; class < 4; class ++) {
            const int begin = class * blocks / 4, count = (class + 1) * blocks / 4 - begin;
            for (int i = 0; i < count; i++)
              for (int k = 0; k < 4; k++) {
                const int crumb = 16 * (begin + i) + lane % 4 * 4 + k;
                size_t word;
                int shift = 8 * k + 2 * class;
                if (i < full - full % 2)
                  word = (size_t)(i / 2 * 512 + tile * 128 + lane * 4 + i % 2 * 2 + high);
                else if (i < full)
                  word = (size_t)(full / 2 * 512 + tile / 2 * 128 + lane * 4 + tile % 2 * 2 + high);
                else if (over > 1 && class % 2 == 1)
                  word = (size_t)(full * 256 + lane * 4 + tile), shift -= 2 * high;
                else
                  word = (size_t)(full * 256 + (over == 3) * 128 + lane * 2 + tile / 2),
                  shift = 8 * k + 4 * (tile % 2) + 2 * high;
                assert_int_equal(word_of(device, word) >> shift & 3, canonical_crumb(f, row, crumb));
              }
          }
        }
    free(rows);
    free(device);
  }
}

static void values_lie_as_operands(void **state) {
  (void)state;
  uint64_t seed = 3;
  for (size_t n = 0; n < ARRAY_LENGTH(forms); n++) {
    const struct side_form *f = &forms[n];
    uint8_t *rows = malloc(side_bytes(f)), *device = malloc(side_bytes(f));
    fill(rows, side_bytes(f), &seed);
    page_to_device(f, OSCAR_VALUES, rows, device);
    for (int block = 0; block < f->crumbs / 16; block++)
      for (int lane = 0; lane < 32; lane++)
        for (int u = 0; u < 2; u++)
          for (int k = 0; k < 4; k++)
            for (int h = 0; h < 2; h++)
              for (int j = 0; j < 2; j++) {
                const int token = 32 * u + 8 * k + lane % 4 * 2 + h, crumb = 16 * block + lane / 4 + 8 * j;
                const uint32_t word = word_of(device, (size_t)((block * 32 + lane) * 2 + u));
                assert_int_equal(word >> (4 * k + 16 * h + 2 * j) & 3,
                                 canonical_crumb(f, rows + (size_t)token * row_bytes_of(f), crumb));
              }
    free(rows);
    free(device);
  }
}

static void metadata_lies_by_token(void **state) {
  (void)state;
  uint64_t seed = 4;
  for (size_t n = 0; n < ARRAY_LENGTH(forms); n++) {
    const struct side_form *f = &forms[n];
    uint8_t *rows = malloc(side_bytes(f)), *device = malloc(side_bytes(f));
    fill(rows, side_bytes(f), &seed);
    page_to_device(f, OSCAR_VALUES, rows, device);
    for (int v = 0; v < side_meta_words(f); v++)
      for (int token = 0; token < PAGE_TOKENS; token++)
        assert_memory_equal(device + side_code_bytes(f) + 2 * (v * PAGE_TOKENS + token),
                            rows + (size_t)token * row_bytes_of(f) + f->crumbs / 4 + 2 * v, 2);
    free(rows);
    free(device);
  }
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(rows_survive_the_round_trip),
      cmocka_unit_test(keys_lie_as_operands),
      cmocka_unit_test(values_lie_as_operands),
      cmocka_unit_test(metadata_lies_by_token),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
