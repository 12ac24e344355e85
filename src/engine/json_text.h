/* engine/json_text.h - values that JSON has no place for. Private. */
#ifndef OSCAR_ENGINE_JSON_TEXT_H
#define OSCAR_ENGINE_JSON_TEXT_H

#include <jansson.h>

/* JSON strings are UTF-8: bytes that are not become U+FFFD, one each. NULL when memory is out. */
json_t *json_text(const char *text, size_t bytes);
/* null for what is not finite */
json_t *json_number(double value);

#endif
