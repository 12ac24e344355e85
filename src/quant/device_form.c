/* device_form.c - canonical rows <-> the form of a page on a GPU (quant/device_form.h). */
#include "quant/device_form.h"

#include <string.h>

static struct crumb_place place_of(const struct side_form *f, oscar_side side, int token, int crumb) {
  return side == OSCAR_KEYS ? place_of_key_crumb(f->crumbs / 16, token, crumb) : place_of_value_crumb(token, crumb);
}

static size_t row_bytes_of(const struct side_form *f) { return (size_t)f->crumbs / 4 + (size_t)2 * (size_t)side_meta_words(f); }

/* A word of metadata of a token in the device form. */
static size_t meta_offset(const struct side_form *f, int word, int token) {
  return side_code_bytes(f) + (size_t)2 * (size_t)(word * PAGE_TOKENS + token);
}

void page_to_device(const struct side_form *f, oscar_side side, const uint8_t *canonical, uint8_t *device) {
  const int quarter = f->crumbs / 4;
  uint32_t word;
  memset(device, 0, side_code_bytes(f));
  for (int token = 0; token < PAGE_TOKENS; token++) {
    const uint8_t *row = canonical + (size_t)token * row_bytes_of(f);
    for (int crumb = 0; crumb < f->crumbs; crumb++) {
      const struct crumb_place place = place_of(f, side, token, crumb);
      memcpy(&word, device + (size_t)place.word * 4, sizeof word);
      word |= (uint32_t)(row[crumb % quarter] >> crumb / quarter * 2 & 3) << place.shift;
      memcpy(device + (size_t)place.word * 4, &word, sizeof word);
    }
    for (int v = 0; v < side_meta_words(f); v++) memcpy(device + meta_offset(f, v, token), row + quarter + 2 * v, 2);
  }
}

void page_from_device(const struct side_form *f, oscar_side side, const uint8_t *device, uint8_t *canonical) {
  const int quarter = f->crumbs / 4;
  uint32_t word;
  for (int token = 0; token < PAGE_TOKENS; token++) {
    uint8_t *row = canonical + (size_t)token * row_bytes_of(f);
    memset(row, 0, (size_t)quarter);
    for (int crumb = 0; crumb < f->crumbs; crumb++) {
      const struct crumb_place place = place_of(f, side, token, crumb);
      memcpy(&word, device + (size_t)place.word * 4, sizeof word);
      row[crumb % quarter] = (uint8_t)(row[crumb % quarter] | (word >> place.shift & 3) << crumb / quarter * 2);
    }
    for (int v = 0; v < side_meta_words(f); v++) memcpy(row + quarter + 2 * v, device + meta_offset(f, v, token), 2);
  }
}
