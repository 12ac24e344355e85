/* server/buffer.h - bytes that grow. A failed allocation is remembered: whoever needs all of them asks once, at the end. Private.
 */
#ifndef OSCAR_SERVER_BUFFER_H
#define OSCAR_SERVER_BUFFER_H

#include "base/base.h"
#include <jansson.h>

struct buffer {
  char *data;
  size_t bytes, room;
  bool failed; /* something is missing */
};
void buffer_add(struct buffer *buffer, const void *data, size_t bytes);
void buffer_text(struct buffer *buffer, const char *text);
void buffer_format(struct buffer *buffer, const char *format, ...) OSCAR_PRINTF(2, 3);
/* Compact JSON; takes the reference. NULL counts as failed. */
void buffer_json(struct buffer *buffer, json_t *value);
/* The first `bytes` go. */
void buffer_drop(struct buffer *buffer, size_t bytes);
void buffer_free(struct buffer *buffer);
/* The bytes as a text of the caller's to free(), the buffer is empty then; NULL if something is missing. */
char *buffer_take(struct buffer *buffer);

#endif
