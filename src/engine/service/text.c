/*
 * text.c - from tokens to text: whole characters go out, and nothing that may turn out to be a stop string.
 *
 * Bytes of tokens are held until it is certain what they are. Stop strings are looked for among all that is held, so one that is
 * spread over tokens is found; what may be the beginning of one stays.
 */
#include "engine/service/service_private.h"

#include <string.h>

#define REPLACEMENT "\xEF\xBF\xBD" /* U+FFFD */

oscar_status text_append(oscar_context *context, struct text_buffer *text, const char *bytes, size_t n) {
  if (text->n + n > text->room) {
    const size_t room = 2 * (text->n + n) + 64;
    char *larger = mem_resize(context, text->bytes, text->room, room);
    if (!larger) return OSCAR_NO_MEMORY;
    text->bytes = larger;
    text->room = room;
  }
  if (n) memcpy(text->bytes + text->n, bytes, n);
  text->n += n;
  return OSCAR_OK;
}

void text_drop(struct text_buffer *text, size_t n) {
  if (n == 0) return;
  memmove(text->bytes, text->bytes + n, text->n - n);
  text->n -= n;
}

size_t text_find_stop(const struct text_buffer *text, char *const *stops, int n_stops, int *which) {
  size_t first = SIZE_MAX;
  for (int i = 0; i < n_stops; i++) {
    const size_t length = strlen(stops[i]);
    for (size_t at = 0; length && at + length <= text->n && at < first; at++)
      if (memcmp(text->bytes + at, stops[i], length) == 0) {
        first = at;
        *which = i;
      }
  }
  return first;
}

/* Bytes of the character that begins here: 1 to 4; of what cannot begin one 0. */
static size_t character_bytes(unsigned char first) {
  if (first < 0x80) return 1;
  if (first >= 0xC2 && first < 0xE0) return 2;
  if (first >= 0xE0 && first < 0xF0) return 3;
  return first >= 0xF0 && first < 0xF5 ? 4 : 0;
}

/* Whether byte i of a character may follow those before it (Unicode 15, table 3-7): neither surrogates nor longer forms. */
static bool may_follow(const unsigned char *c, size_t i) {
  if (i == 1 && c[0] == 0xE0) return c[1] >= 0xA0 && c[1] < 0xC0;
  if (i == 1 && c[0] == 0xED) return c[1] >= 0x80 && c[1] < 0xA0;
  if (i == 1 && c[0] == 0xF0) return c[1] >= 0x90 && c[1] < 0xC0;
  if (i == 1 && c[0] == 0xF4) return c[1] >= 0x80 && c[1] < 0x90;
  return (c[i] & 0xC0) == 0x80;
}

/* How many of n bytes from here on are the beginning of a character, or all of one; *whole says which. 0: none can begin so. */
static size_t scan_character(const char *bytes, size_t n, bool *whole) {
  const unsigned char *c = (const unsigned char *)bytes;
  const size_t length = character_bytes(c[0]);
  size_t i = 1;
  if (length == 0) return 0;
  while (i < length && i < n && may_follow(c, i)) i++;
  *whole = i == length;
  return i;
}

size_t text_ready(const struct text_buffer *text, char *const *stops, int n_stops) {
  size_t ready = text->n;
  for (int i = 0; i < n_stops; i++) {
    const size_t length = strlen(stops[i]);
    for (size_t at = text->n >= length ? text->n - length + 1 : 0; length && at < ready; at++)
      if (memcmp(text->bytes + at, stops[i], text->n - at) == 0) ready = at;
  }
  for (size_t back = 1; back <= 3 && back <= ready; back++) { /* a character that is not whole yet */
    bool whole = false;
    const size_t found = scan_character(text->bytes + ready - back, back, &whole);
    if (found == back && !whole) return ready - back;
  }
  return ready;
}

char *text_characters(oscar_context *context, const char *bytes, size_t n, size_t *out) {
  char *text = mem_alloc(context, 3 * n + 1, 1);
  if (!text) return NULL;
  size_t to = 0;
  for (size_t at = 0, length; at < n; at += length) {
    bool whole = false;
    length = scan_character(bytes + at, n - at, &whole);
    const char *from = whole ? bytes + at : REPLACEMENT;
    const size_t count = whole ? length : strlen(REPLACEMENT);
    if (length == 0) length = 1;
    memcpy(text + to, from, count);
    to += count;
  }
  text[to] = '\0';
  *out = to;
  return text;
}
