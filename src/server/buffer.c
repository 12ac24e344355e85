/* buffer.c - see buffer.h. */
#include "server/buffer.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static bool make_room(struct buffer *b, size_t more) {
  if (b->failed) return false;
  if (b->room - b->bytes > more) return true; /* one byte is left for the end of a text */
  size_t room = b->room ? b->room : 256;
  while (room - b->bytes <= more && room <= SIZE_MAX / 2) room *= 2;
  char *larger = room - b->bytes > more ? realloc(b->data, room) : NULL;
  if (!larger) {
    b->failed = true;
    return false;
  }
  b->data = larger;
  b->room = room;
  return true;
}

void buffer_add(struct buffer *b, const void *data, size_t bytes) {
  if (!make_room(b, bytes)) return;
  if (bytes) memcpy(b->data + b->bytes, data, bytes);
  b->bytes += bytes;
  b->data[b->bytes] = '\0';
}

void buffer_text(struct buffer *b, const char *text) { buffer_add(b, text, strlen(text)); }

void buffer_format(struct buffer *b, const char *format, ...) {
  char text[1024];
  va_list arguments;
  va_start(arguments, format);
  int n = vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  if (n < 0 || (size_t)n >= sizeof text)
    b->failed = true;
  else
    buffer_add(b, text, (size_t)n);
}

static int add_dumped(const char *text, size_t bytes, void *user) {
  struct buffer *b = user;
  buffer_add(b, text, bytes);
  return b->failed ? -1 : 0;
}

void buffer_json(struct buffer *b, json_t *value) {
  if (!value || json_dump_callback(value, add_dumped, b, JSON_COMPACT | JSON_ENCODE_ANY) != 0) b->failed = true;
  json_decref(value);
}

void buffer_drop(struct buffer *b, size_t bytes) {
  memmove(b->data, b->data + bytes, b->bytes - bytes);
  b->bytes -= bytes;
}

void buffer_free(struct buffer *b) {
  free(b->data);
  *b = (struct buffer){0};
}

char *buffer_take(struct buffer *b) {
  buffer_add(b, "", 0); /* also an empty one is a text */
  char *text = b->failed ? NULL : b->data;
  if (b->failed) free(b->data);
  *b = (struct buffer){0};
  return text;
}
