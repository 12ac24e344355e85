/*
 * tokenizer_text.c - UTF-8 and normalization form C for the tokenizers.
 *
 * Normalization uses utf8proc's tables and its composition. The ordering of combining marks is done here, by counting: utf8proc
 * sorts them by exchanges, which takes quadratic time on a long run of marks.
 */
#include "model/tokenizer_impl.h"

#include <string.h>
#include <utf8proc.h>

size_t utf8_character(const char *text, size_t bytes) {
  const uint8_t *p = (const uint8_t *)text;
  if (p[0] < 0x80) return 1;
  /* Unicode 15, table 3-7: the second byte's range depends on the first */
  uint8_t low = p[0] == 0xE0 ? 0xA0 : p[0] == 0xF0 ? 0x90 : 0x80;
  uint8_t high = p[0] == 0xED ? 0x9F : p[0] == 0xF4 ? 0x8F : 0xBF;
  size_t length = p[0] < 0xC2 ? 0 : p[0] < 0xE0 ? 2 : p[0] < 0xF0 ? 3 : p[0] < 0xF5 ? 4 : 0;
  if (length == 0 || length > bytes || p[1] < low || p[1] > high) return 0;
  for (size_t i = 2; i < length; i++)
    if ((p[i] & 0xC0) != 0x80) return 0;
  return length;
}

uint32_t utf8_code_point(const char *text, size_t bytes) {
  const uint8_t *p = (const uint8_t *)text;
  if (bytes == 1) return p[0];
  uint32_t value = p[0] & (0x7Fu >> bytes);
  for (size_t i = 1; i < bytes; i++) value = value << 6 | (p[i] & 0x3Fu);
  return value;
}

size_t utf8_write(uint32_t c, char out[4]) {
  if (c < 0x80) {
    out[0] = (char)c;
    return 1;
  }
  size_t length = c < 0x800 ? 2 : c < 0x10000 ? 3 : 4;
  for (size_t i = length - 1; i > 0; i--, c >>= 6) out[i] = (char)(0x80 | (c & 0x3F));
  out[0] = (char)(0xF00u >> length | c); /* 110xxxxx, 1110xxxx, 11110xxx */
  return length;
}

/* ---- form C ---- */

#define FORM_C         (UTF8PROC_STABLE | UTF8PROC_COMPOSE)
#define PART_BYTES     4096
#define DECOMPOSED_MAX 4 /* code points that one code point's canonical decomposition has at most */

/* Sorts a run of combining marks by class, stable. `spare` has room for the run. */
static void order_marks(utf8proc_int32_t *marks, size_t count, utf8proc_int32_t *spare) {
  size_t place[257] = {0};
  for (size_t i = 0; i < count; i++) place[1 + utf8proc_get_property(marks[i])->combining_class % 256]++;
  for (size_t c = 1; c < 257; c++) place[c] += place[c - 1];
  for (size_t i = 0; i < count; i++) spare[place[utf8proc_get_property(marks[i])->combining_class % 256]++] = marks[i];
  memcpy(marks, spare, count * sizeof *marks);
}

static void order_all_marks(utf8proc_int32_t *points, size_t count, utf8proc_int32_t *spare) {
  for (size_t i = 0; i < count; i++) {
    size_t end = i;
    while (end < count && utf8proc_get_property(points[end])->combining_class != 0) end++;
    if (end - i > 1) order_marks(points + i, end - i, spare);
    if (end > i) i = end - 1;
  }
}

/* Composes the well-formed text [0, bytes) into out; returns the bytes written. points and spare have room for 4 code points a
 * character. Form C is never longer than three times the text (Unicode annex 15). */
static size_t compose_part(const char *text, size_t bytes, utf8proc_int32_t *points, utf8proc_int32_t *spare, char *out) {
  size_t count = 0, written = 0;
  for (size_t at = 0; at < bytes;) {
    size_t length = utf8_character(text + at, bytes - at);
    int boundary = 0;
    utf8proc_ssize_t n = utf8proc_decompose_char((utf8proc_int32_t)utf8_code_point(text + at, length), points + count,
                                                 DECOMPOSED_MAX, FORM_C, &boundary);
    count += n > 0 ? (size_t)n : 0;
    at += length;
  }
  order_all_marks(points, count, spare);
  utf8proc_ssize_t composed = utf8proc_normalize_utf32(points, (utf8proc_ssize_t)count, FORM_C);
  for (utf8proc_ssize_t i = 0; i < composed; i++) written += utf8_write((uint32_t)points[i], out + written);
  return written;
}

static bool may_need_composing(const char *text, size_t bytes) {
  for (size_t i = 0; i < bytes; i++)
    if ((uint8_t)text[i] >= 0xCC) return true; /* U+0300 is CC 80; nothing below decomposes or composes to the left */
  return false;
}

/* Where a part that starts at `at` ends: at a bad byte, or, once it is long enough, before an ASCII character, which neither
 * composes to the left nor is reordered. */
static size_t part_end(const char *text, size_t bytes, size_t at) {
  size_t end = at, length;
  while (end < bytes && (end - at < PART_BYTES || (uint8_t)text[end] >= 0x80) &&
         (length = utf8_character(text + end, bytes - end)) > 0)
    end += length;
  return end;
}

oscar_status text_compose(oscar_context *context, const char *text, size_t bytes, char **out, size_t *out_bytes) {
  *out = NULL;
  *out_bytes = bytes;
  if (!may_need_composing(text, bytes)) return OSCAR_OK;
  size_t longest = 0;
  for (size_t at = 0; at < bytes;) {
    size_t end = part_end(text, bytes, at);
    if (end - at > longest) longest = end - at;
    at = end > at ? end : at + 1;
  }
  oscar_status status = OSCAR_NO_MEMORY;
  char *result = mem_alloc(context, bytes, 3);
  utf8proc_int32_t *points = mem_alloc(context, longest, DECOMPOSED_MAX * sizeof *points);
  utf8proc_int32_t *spare = mem_alloc(context, longest, DECOMPOSED_MAX * sizeof *spare);
  if (!result || !points || !spare) goto out;
  size_t written = 0;
  for (size_t at = 0; at < bytes;) {
    size_t end = part_end(text, bytes, at);
    if (end == at) {
      result[written++] = text[at++]; /* a bad byte */
    } else if (may_need_composing(text + at, end - at)) {
      written += compose_part(text + at, end - at, points, spare, result + written);
    } else {
      memcpy(result + written, text + at, end - at);
      written += end - at;
    }
    at = end > at ? end : at;
  }
  *out = result;
  *out_bytes = written;
  result = NULL;
  status = OSCAR_OK;
out:
  mem_free(context, result);
  mem_free(context, points);
  mem_free(context, spare);
  return status;
}
