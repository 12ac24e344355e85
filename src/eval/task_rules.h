/*
 * eval/task_rules.h - what the tasks of a haystack are made of: keys, values, the statements that tell them, the questions.
 * Private to the room.
 */
#ifndef OSCAR_TASK_RULES_H
#define OSCAR_TASK_RULES_H

#include "eval/haystack.h"
#include "eval/text.h"

enum { KEY_ROOM = 48 };

/* What can be asked about: a key, its values, and the statements that tell them. */
struct group {
  char key[KEY_ROOM];
  char value[ANSWER_VALUES][ANSWER_WORD];
  int number;      /* what a chain of variables ends in; the form of a code symbol */
  int written;     /* statements so far, in the rendering at work */
  size_t first_at; /* byte where the first one is */
};

/* What is known of a task. Writers get the group and, for statements, which one. */
struct task_rules {
  const char *name;
  enum word_shape shape;
  int values, statements; /* of a group */
  int tokens_per_group;   /* woven; 0: listed */
  const char *separator;  /* around a woven statement */
  const char *introduction, *opening, *comment_open, *comment_close;
  void (*draw_group)(struct draw *draw, struct group *group);
  void (*write_statement)(struct text *text, const struct group *group, int which);
  void (*write_question)(struct text *text, const struct group *group);
  void (*write_begin)(struct text *text, const struct group *group);
  void (*write_answer)(struct text *text, const struct group *group); /* NULL: its values, separated by commas */
};

extern const struct task_rules task_rules_of[TASK_COUNT];

#endif
