/* json_text.c - see json_text.h. */
#include "engine/json_text.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <utf8proc.h>

json_t *json_text(const char *text, size_t bytes) {
  json_t *whole = json_stringn(text, bytes);
  if (whole) return whole;
  static const char replacement[] = "\xEF\xBF\xBD";
  char *clean = malloc(bytes * 3 + 1);
  if (!clean) return NULL;
  size_t used = 0;
  for (size_t i = 0; i < bytes;) {
    utf8proc_int32_t point;
    utf8proc_ssize_t n = utf8proc_iterate((const utf8proc_uint8_t *)text + i, (utf8proc_ssize_t)(bytes - i), &point);
    const char *from = n > 0 ? text + i : replacement;
    size_t length = n > 0 ? (size_t)n : 3;
    memcpy(clean + used, from, length);
    used += length;
    i += n > 0 ? (size_t)n : 1;
  }
  json_t *value = json_stringn(clean, used);
  free(clean);
  return value;
}

json_t *json_number(double value) { return isfinite(value) ? json_real(value) : json_null(); }
