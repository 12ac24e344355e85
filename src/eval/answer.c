/* answer.c - see answer.h. */
#include "eval/answer.h"

#include <string.h>

static bool digit(char c) { return c >= '0' && c <= '9'; }
static bool capital(char c) { return c >= 'A' && c <= 'Z'; }

static bool in_word(enum word_shape shape, char c) {
  return digit(c) || capital(c) || (c >= 'a' && c <= 'z') || c == '_' || (shape == WORD_ID && c == '-');
}

static bool may_have(enum word_shape shape, char c) {
  switch (shape) {
  case WORD_DIGITS:
    return digit(c);
  case WORD_NAME:
    return capital(c);
  case WORD_ID:
    return digit(c) || (c >= 'a' && c <= 'f') || c == '-';
  }
  return false;
}

static bool is_candidate(enum word_shape shape, const char *word, size_t bytes) {
  static const size_t least[] = {[WORD_DIGITS] = 4, [WORD_NAME] = 3, [WORD_ID] = 8};
  if (bytes < least[shape]) return false;
  for (size_t i = 0; i < bytes; i++)
    if (!may_have(shape, word[i])) return false;
  if (shape == WORD_NAME) return !(bytes == 3 && memcmp(word, "VAR", 3) == 0);
  return shape != WORD_ID || memchr(word, '-', bytes);
}

/* Which of the expected values the word is, or -1. */
static int value_of(const char *word, size_t bytes, int count, const char (*expected)[ANSWER_WORD]) {
  for (int i = 0; i < count; i++)
    if (strlen(expected[i]) == bytes && memcmp(expected[i], word, bytes) == 0) return i;
  return -1;
}

struct answer_state answer_judge(enum word_shape shape, const char *text, size_t bytes, bool ended, int count,
                                 const char (*expected)[ANSWER_WORD]) {
  bool given[ANSWER_VALUES] = {false};
  int left = count;
  for (size_t at = 0; at < bytes && left > 0;) {
    size_t end = at;
    while (end < bytes && in_word(shape, text[end])) end++;
    if (end == bytes && !ended) break; /* it may go on */
    if (is_candidate(shape, text + at, end - at)) {
      const int value = value_of(text + at, end - at, count, expected);
      if (value < 0) return (struct answer_state){.decided = true};
      left -= !given[value];
      given[value] = true;
    }
    at = end > at ? end : at + 1;
  }
  return (struct answer_state){.decided = left == 0 || ended, .right = left == 0};
}
