/*
 * eval/answer.h - what counts as a right answer. Private.
 *
 * An answer is cut into words: longest runs of letters, digits and '_' (for ids also '-'). Some words are candidates, by the
 * shape of what was asked for: WORD_DIGITS   at least 4 characters, digits only        7301945 WORD_NAME     at least 3
 * characters, A to Z only, not VAR   QXZPA WORD_ID       at least 8 characters, 0-9, a-f and '-' only, with a '-'
 * 3f2a9c1e-7b4d-42a0 With n values expected, the answer is right if its first n different candidates are these values, in any
 * order. What comes later is not looked at; a missing value, a wrong one among them and a value with anything added or cut off
 * are wrong.
 */
#ifndef OSCAR_ANSWER_H
#define OSCAR_ANSWER_H

#include <stdbool.h>
#include <stddef.h>

enum { ANSWER_VALUES = 8, ANSWER_WORD = 40 }; /* most values, room of one with its zero byte */

enum word_shape { WORD_DIGITS, WORD_NAME, WORD_ID };

struct answer_state {
  bool decided; /* nothing that follows could change the outcome */
  bool right;
};
/* `ended`: no more text will come, so that a word at the end is whole. An answer that ended is always decided. */
struct answer_state answer_judge(enum word_shape shape, const char *text, size_t bytes, bool ended, int count,
                                 const char (*expected)[ANSWER_WORD]);

#endif
