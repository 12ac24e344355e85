/*
 * chat_writer.c - the ids of a conversation as it is written: control tokens, and stretches of text between them that are encoded
 * as plain text. JSON is written as Python writes it, because templates are run by Python where models are trained.
 */
#include "model/chat_private.h"

#include <stdlib.h>

void write_text_bytes(struct writer *w, const char *text, size_t bytes) {
  if (w->status) return;
  if (bytes > w->capacity - w->bytes) {
    size_t capacity = 2 * (w->bytes + bytes) + 256;
    char *grown = mem_resize(w->context, w->text, w->bytes, capacity);
    if (!grown) {
      w->status = OSCAR_NO_MEMORY;
      return;
    }
    w->text = grown;
    w->capacity = capacity;
  }
  memcpy(w->text + w->bytes, text, bytes);
  w->bytes += bytes;
}

void write_text(struct writer *w, const char *text) { write_text_bytes(w, text, strlen(text)); }

/* A space prefix (SentencePiece) separates a text from a token before it; a template that writes the space has it already. */
void write_flush(struct writer *w) {
  if (w->status || w->bytes == 0) return;
  bool space_prefix = w->tokenizer->space_prefix && w->text[0] != ' ';
  w->status = tokenizer_append_text(w->tokenizer, w->text, w->bytes, space_prefix, &w->ids);
  w->bytes = 0;
}

void write_id(struct writer *w, int32_t id) {
  write_flush(w);
  if (!w->status) w->status = id_list_add(w->context, &w->ids, id);
}

void write_literal(struct writer *w, const char *text) {
  const struct tokenizer *t = w->tokenizer;
  for (size_t left = strlen(text), length; left > 0; text += length, left -= length) {
    int32_t id = token_trie_match(&t->special, text, left, &length);
    if (id >= 0 && t->vocabulary.type[id] == TOKEN_CONTROL) {
      write_id(w, id);
    } else {
      length = 1;
      write_text_bytes(w, text, 1);
    }
  }
}

/* What Python's str.strip(), and so Jinja's trim, takes for space. */
static bool is_space(uint32_t c) {
  return (c >= 0x09 && c <= 0x0D) || (c >= 0x1C && c <= 0x20) || c == 0x85 || c == 0xA0 || c == 0x1680 ||
         (c >= 0x2000 && c <= 0x200A) || c == 0x2028 || c == 0x2029 || c == 0x202F || c == 0x205F || c == 0x3000;
}

void write_trimmed(struct writer *w, const char *text) {
  size_t bytes = strlen(text), start = 0, end = 0;
  bool begun = false;
  for (size_t at = 0; at < bytes;) {
    size_t length = utf8_character(text + at, bytes - at);
    bool space = length > 0 && is_space(utf8_code_point(text + at, length));
    at += length ? length : 1;
    if (space && !begun) start = at;
    if (space) continue;
    begun = true;
    end = at;
  }
  if (begun) write_text_bytes(w, text + start, end - start);
}

/* ---- JSON ---- */

static void quoted(struct writer *w, const char *text, size_t bytes) {
  static const char escaped[] = "\"\\\b\f\n\r\t", letters[] = "\"\\bfnrt";
  write_text(w, "\"");
  for (size_t i = 0, from = 0; i <= bytes; i++) {
    if (i < bytes && (unsigned char)text[i] >= 0x20 && text[i] != '"' && text[i] != '\\') continue;
    write_text_bytes(w, text + from, i - from);
    from = i + 1;
    if (i == bytes) break;
    const char *known = text[i] ? strchr(escaped, text[i]) : NULL;
    char code[8];
    if (known)
      snprintf(code, sizeof code, "\\%c", letters[known - escaped]);
    else
      snprintf(code, sizeof code, "\\u%04x", (unsigned)text[i]);
    write_text(w, code);
  }
  write_text(w, "\"");
}

/* Python's repr of a float: the fewest digits that read back as the same number, an exponent below 1e-4 and from 1e16. */
static void real(struct writer *w, double value) {
  char digits[32], out[48];
  for (int precision = 0; precision <= 16; precision++) {
    snprintf(digits, sizeof digits, "%.*e", precision, value);
    if (strtod(digits, NULL) == value) break;
  }
  char *e = strchr(digits, 'e');
  int exponent = atoi(e + 1), kept = (int)(e - digits) - (digits[0] == '-') - 1; /* digits behind the first, and the point */
  int decimals = kept > 1 ? kept - 1 : 0;
  if (exponent < -4 || exponent >= 16) {
    write_text(w, digits);
    return;
  }
  snprintf(out, sizeof out, "%.*f", decimals > exponent ? decimals - exponent : 1, value);
  write_text(w, out);
}

static void json_break(struct writer *w, int indent, int depth) {
  static const char spaces[] = "                ";
  if (!indent) return;
  write_text(w, "\n");
  for (int left = indent * depth; left > 0; left -= (int)sizeof spaces - 1)
    write_text_bytes(w, spaces, (size_t)left < sizeof spaces - 1 ? (size_t)left : sizeof spaces - 1);
}

static void json_value(struct writer *w, const json_t *value, int indent, int depth) {
  const char *between = indent ? "," : ", ", *key;
  size_t i, key_bytes;
  json_t *inner;
  char number[24];
  bool first = true;
  switch (json_typeof(value)) {
  case JSON_OBJECT:
    write_text(w, "{");
    json_object_keylen_foreach((json_t *)(uintptr_t)value, key, key_bytes, inner) {
      if (!first) write_text(w, between);
      first = false;
      json_break(w, indent, depth + 1);
      quoted(w, key, key_bytes);
      write_text(w, ": ");
      json_value(w, inner, indent, depth + 1);
    }
    if (!first) json_break(w, indent, depth);
    write_text(w, "}");
    break;
  case JSON_ARRAY:
    write_text(w, "[");
    json_array_foreach(value, i, inner) {
      if (i) write_text(w, between);
      json_break(w, indent, depth + 1);
      json_value(w, inner, indent, depth + 1);
    }
    if (json_array_size(value)) json_break(w, indent, depth);
    write_text(w, "]");
    break;
  case JSON_STRING:
    quoted(w, json_string_value(value), json_string_length(value));
    break;
  case JSON_INTEGER:
    snprintf(number, sizeof number, "%" JSON_INTEGER_FORMAT, json_integer_value(value));
    write_text(w, number);
    break;
  case JSON_REAL:
    real(w, json_real_value(value));
    break;
  case JSON_TRUE:
    write_text(w, "true");
    break;
  case JSON_FALSE:
    write_text(w, "false");
    break;
  case JSON_NULL:
    write_text(w, "null");
    break;
  }
}

void write_json(struct writer *w, const json_t *value, int indent) { json_value(w, value, indent, 0); }

json_t *write_parse(struct writer *w, const char *text, const char *what, const char *whose) {
  if (w->status) return NULL;
  json_error_t error;
  json_t *value = json_loads(text && text[0] ? text : "{}", 0, &error);
  if (json_is_object(value)) return value;
  if (!value && json_error_code(&error) == json_error_out_of_memory)
    w->status = set_error(w->context, OSCAR_NO_MEMORY, "no memory for the %s of \"%.64s\"", what, whose);
  else
    w->status = set_error(w->context, OSCAR_INVALID_ARGUMENT, "the %s of \"%.64s\" are not a JSON object%s%.120s", what, whose,
                          value ? "" : ": ", value ? "" : error.text);
  json_decref(value);
  return NULL;
}
