/* device_form.c - canonical rows <-> the form of a page on a GPU (quant/device_form.h). */
#include "quant/device_form.h"

#include <string.h>

static size_t row_bytes_of(const struct side_form *f) { return (size_t)f->crumbs / 4 + (size_t)2 * (size_t)side_meta_words(f); }

/* A word of metadata of a token in the device form. */
static size_t meta_offset(const struct side_form *f, int word, int token) {
  return side_code_bytes(f) + (size_t)2 * (size_t)(word * PAGE_TOKENS + token);
}

/* Crumbs c .. c + 3 of a row, c a multiple of four, one in each byte: they lie alike in four bytes that follow each other. */
#define FOUR_CRUMBS 0x03030303u
static uint32_t four_of_row(const uint8_t *row, int quarter, int c) {
  uint32_t word;
  memcpy(&word, row + c % quarter, sizeof word);
  return word >> c / quarter * 2 & FOUR_CRUMBS;
}

static void four_into_row(uint8_t *row, int quarter, int c, uint32_t four) {
  uint32_t word;
  memcpy(&word, row + c % quarter, sizeof word);
  word |= four << c / quarter * 2;
  memcpy(row + c % quarter, &word, sizeof word);
}

/* Of keys four such crumbs lie alike in the four bytes of a word, too. */
static void keys_to_device(int crumbs, int token, const uint8_t *row, uint32_t *codes) {
  for (int c = 0; c < crumbs; c += 4) {
    const struct crumb_place place = place_of_key_crumb(crumbs / 16, token, c);
    codes[place.word] |= four_of_row(row, crumbs / 4, c) << place.shift;
  }
}

static void keys_from_device(int crumbs, int token, const uint32_t *codes, uint8_t *row) {
  for (int c = 0; c < crumbs; c += 4) {
    const struct crumb_place place = place_of_key_crumb(crumbs / 16, token, c);
    four_into_row(row, crumbs / 4, c, codes[place.word] >> place.shift & FOUR_CRUMBS);
  }
}

/* Of values crumbs g and g + 8 of a block are four bits of one word, and the words of g + 1, g + 2 ... are 8 words apart: eight
 * words of a block get their share of a token. */
static void values_to_device(int crumbs, int token, const uint8_t *row, uint32_t *codes) {
  for (int c = 0; c < crumbs; c += 16) {
    const struct crumb_place place = place_of_value_crumb(token, c);
    for (int i = 0; i < 8; i += 4) {
      const uint32_t pairs = four_of_row(row, crumbs / 4, c + i) | four_of_row(row, crumbs / 4, c + i + 8) << 2;
      for (int k = 0; k < 4; k++) codes[place.word + 8 * (i + k)] |= (pairs >> 8 * k & 15) << place.shift;
    }
  }
}

static void values_from_device(int crumbs, int token, const uint32_t *codes, uint8_t *row) {
  for (int c = 0; c < crumbs; c += 16) {
    const struct crumb_place place = place_of_value_crumb(token, c);
    for (int i = 0; i < 8; i += 4) {
      uint32_t pairs = 0;
      for (int k = 0; k < 4; k++) pairs |= (codes[place.word + 8 * (i + k)] >> place.shift & 15) << 8 * k;
      four_into_row(row, crumbs / 4, c + i, pairs & FOUR_CRUMBS);
      four_into_row(row, crumbs / 4, c + i + 8, pairs >> 2 & FOUR_CRUMBS);
    }
  }
}

void page_to_device(const struct side_form *f, oscar_side side, const uint8_t *canonical, uint8_t *device) {
  const int quarter = f->crumbs / 4;
  uint32_t *codes = (uint32_t *)(void *)device;
  memset(device, 0, side_code_bytes(f));
  for (int token = 0; token < PAGE_TOKENS; token++) {
    const uint8_t *row = canonical + (size_t)token * row_bytes_of(f);
    if (side == OSCAR_KEYS)
      keys_to_device(f->crumbs, token, row, codes);
    else
      values_to_device(f->crumbs, token, row, codes);
    for (int v = 0; v < side_meta_words(f); v++) memcpy(device + meta_offset(f, v, token), row + quarter + 2 * v, 2);
  }
}

void page_from_device(const struct side_form *f, oscar_side side, const uint8_t *device, uint8_t *canonical) {
  const int quarter = f->crumbs / 4;
  const uint32_t *codes = (const uint32_t *)(const void *)device;
  for (int token = 0; token < PAGE_TOKENS; token++) {
    uint8_t *row = canonical + (size_t)token * row_bytes_of(f);
    memset(row, 0, (size_t)quarter);
    if (side == OSCAR_KEYS)
      keys_from_device(f->crumbs, token, codes, row);
    else
      values_from_device(f->crumbs, token, codes, row);
    for (int v = 0; v < side_meta_words(f); v++) memcpy(row + quarter + 2 * v, device + meta_offset(f, v, token), 2);
  }
}
