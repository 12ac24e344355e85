/* eval/text.h - a text that grows, and the prose that surrounds what is to be found. Private to the room. */
#ifndef OSCAR_TEXT_H
#define OSCAR_TEXT_H

#include "base/base.h"
#include "base/draw.h"

/* The first failure stays: adding after it does nothing, and who needs the text looks at `failed` (the error is recorded). */
struct text {
  oscar_context *context;
  char *data; /* ended by a zero byte; NULL while nothing was added */
  size_t bytes, room;
  bool failed;
};
void text_add_bytes(struct text *text, const char *data, size_t bytes);
void text_add(struct text *text, const char *format, ...) OSCAR_PRINTF(2, 3);
const char *text_string(const struct text *text); /* never NULL */
void text_clear(struct text *text);               /* keeps the memory */
void text_free(struct text *text);

/* Adds `wanted` bytes or a little more of prose. From `source`: its paragraphs (separated by empty lines) in random order, again
 * and again in new orders; zero bytes become spaces. Without a source (NULL): sentences made from lists of words, without digits.
 * Errors: INVALID_ARGUMENT (a source without a paragraph), NO_MEMORY. */
oscar_status filler_write(struct text *text, const char *source, size_t source_bytes, struct draw *draw, size_t wanted);

/* "amber-lantern": an adjective and a noun of the lists; the prose made from them never has a hyphen. */
void draw_compound(struct draw *draw, char *word, size_t room);

#endif
