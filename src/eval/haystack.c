/*
 * haystack.c - making prompts of a wanted length.
 *
 * What can be asked about is a group: a key, its values, and the statements that tell them. Woven tasks have a fixed number of
 * groups and spread their statements over prose, the statements of one group in order; listed tasks are nothing but statements,
 * as many as fit, and a comment that takes up the last few tokens. The length is found by trying: the number that varies (groups,
 * then bytes of prose) is narrowed down by interpolation until the prompt is a few tokens below the wanted length.
 *
 * Invariants, which the tests look at: keys and values differ from each other and from everything in the prose, so a value is
 * written once, in its statement (names of `tracking` also where they are read), and no distractor equals an answer.
 */
#include "eval/haystack.h"

#include "eval/task_rules.h"

#include <string.h>
#include <strings.h>

/* A listed statement has more than LISTED_TOKENS tokens, prose fewer than BYTES_PER_TOKEN bytes a token; if not, the prompt has
 * more prose, or comes out short and is refused. */
enum { COMMENT_TOKENS = 24, BYTES_PER_TOKEN = 10, LISTED_TOKENS = 16 };

struct maker {
  oscar_context *context;
  const struct task_rules *rules;
  const struct haystack_spec *spec;
  const struct prompt_form *form;
  struct draw draw;
  struct text filler, message, begin;
  struct group *group;
  int groups;
  int *order;    /* [groups * statements] woven: the group of each statement */
  double *place; /* [the same] its place in the prose, 0 to 1, ascending */
  /* what fitting varies */
  int64_t used;        /* groups that are written */
  int64_t filler_used; /* bytes of prose */
};

const char *task_name(enum task task) { return task_rules_of[task].name; }
enum word_shape task_shape(enum task task) { return task_rules_of[task].shape; }

int haystack_questions(int tokens) {
  const int fit = tokens / HAYSTACK_LEAST;
  return fit < 1 ? 1 : fit > HAYSTACK_QUESTIONS ? HAYSTACK_QUESTIONS : fit;
}

/* ---- drawing the groups ---- */

/* A word is new if no earlier key or value is the same but for capitals and the prose does not have it. */
static bool is_new(const struct maker *m, const char *word, int groups) {
  for (int g = 0; g < groups; g++) {
    if (strcasecmp(word, m->group[g].key) == 0) return false;
    for (int i = 0; i < m->rules->values; i++)
      if (strcasecmp(word, m->group[g].value[i]) == 0) return false;
  }
  return !memmem(text_string(&m->filler), m->filler.bytes, word, strlen(word));
}

static bool group_is_new(const struct maker *m, const struct group *group, int groups) {
  if (!is_new(m, group->key, groups)) return false;
  for (int i = 0; i < m->rules->values; i++) {
    if (!is_new(m, group->value[i], groups)) return false;
    for (int k = 0; k < i; k++)
      if (strcmp(group->value[i], group->value[k]) == 0) return false;
  }
  return true;
}

static oscar_status draw_groups(struct maker *m) {
  enum { TRIES = 10000 }; /* of 2304 compounds and 13824 symbols */
  for (int g = 0; g < m->groups; g++) {
    int tries = 0;
    do {
      if (++tries > TRIES)
        return set_error(m->context, OSCAR_INVALID_ARGUMENT, "%s: only %d different keys can be made, %d tokens need %d",
                         m->rules->name, g, m->spec->tokens, m->groups);
      m->group[g] = (struct group){0};
      m->rules->draw_group(&m->draw, &m->group[g]);
    } while (!group_is_new(m, &m->group[g], g));
  }
  return OSCAR_OK;
}

/* Statements in random order; since a group's own come in order, it is enough to shuffle the groups they belong to. */
static void draw_places(struct maker *m) {
  const int statements = m->groups * m->rules->statements;
  for (int i = 0; i < statements; i++) m->order[i] = i / m->rules->statements;
  for (int i = statements - 1; i > 0; i--) {
    const uint32_t j = draw_below(&m->draw, (uint32_t)i + 1);
    const int moved = m->order[i];
    m->order[i] = m->order[j];
    m->order[j] = moved;
  }
  for (int i = 0; i < statements; i++) m->place[i] = (i + draw_unit(&m->draw)) / statements;
}

/* ---- writing ---- */

static void write_statement(struct maker *m, struct text *text, int g) {
  struct group *group = &m->group[g];
  if (group->written == 0) group->first_at = text->bytes;
  m->rules->write_statement(text, group, group->written++);
}

static bool sentence_ends(const char *prose, size_t at) {
  return at > 1 && (prose[at - 1] == '\n' || (prose[at - 1] == ' ' && strchr(".!?", prose[at - 2])));
}

/* Where a sentence or line ends: the first such place at or after `at`, else the last one from `done` on; in prose without any,
 * the end of what is used. */
static size_t sentence_end(const struct maker *m, size_t at, size_t done) {
  const size_t end = (size_t)m->filler_used;
  for (size_t p = at; p < end; p++)
    if (sentence_ends(m->filler.data, p)) return p;
  for (size_t p = at; p > done; p--)
    if (sentence_ends(m->filler.data, p)) return p;
  return done > 0 ? done : end;
}

static void weave(struct maker *m, struct text *text) {
  const int statements = m->groups * m->rules->statements;
  size_t done = 0;
  for (int i = 0; i < statements; i++) {
    const size_t wanted = (size_t)(m->place[i] * (double)m->filler_used),
                 at = sentence_end(m, wanted > done ? wanted : done, done);
    text_add_bytes(text, m->filler.data + done, at - done);
    done = at;
    if (text->failed) return;
    const char last = text->data[text->bytes - 1]; /* the introduction is there */
    if (last != '\n' && last != *m->rules->separator) text_add(text, "%s", m->rules->separator);
    write_statement(m, text, m->order[i]);
    text_add(text, "%s", m->rules->separator);
  }
  text_add_bytes(text, m->filler.data + done, (size_t)m->filler_used - done);
}

/* Prose as a comment: nothing in it may end the comment. */
static void write_comment(struct maker *m, struct text *text) {
  text_add(text, "%s", m->rules->comment_open);
  const size_t from = text->bytes;
  text_add_bytes(text, m->filler.data, (size_t)m->filler_used);
  for (size_t i = from; i < text->bytes; i++)
    if (strchr("\"\\\t\r\n*/", text->data[i])) text->data[i] = ' ';
  text_add(text, "%s", m->rules->comment_close);
}

static void write_haystack(struct maker *m, struct text *text) {
  for (int g = 0; g < m->groups; g++) m->group[g].written = 0;
  text_add(text, "%s", m->rules->introduction);
  if (m->rules->tokens_per_group) {
    weave(m, text);
    return;
  }
  text_add(text, "%s", m->rules->opening);
  for (int g = 0; g < m->used; g++) write_statement(m, text, g);
  write_comment(m, text);
}

/* The message with the question about a group, and the beginning of its answer, into m->message and m->begin. */
static oscar_status write_message(struct maker *m, int g) {
  text_clear(&m->message);
  text_clear(&m->begin);
  write_haystack(m, &m->message);
  text_add(&m->message, "\n\n");
  m->rules->write_question(&m->message, &m->group[g]);
  m->rules->write_begin(&m->begin, &m->group[g]);
  return m->message.failed || m->begin.failed ? OSCAR_NO_MEMORY : OSCAR_OK;
}

/* ---- fitting ---- */

/* Cuts prose where a word ends, and never inside a UTF-8 character. */
static int64_t word_end(const struct maker *m, int64_t at) {
  enum { LONGEST_WORD = 32 };
  const char *prose = m->filler.data;
  for (int64_t p = at; p > 0 && p > at - LONGEST_WORD; p--)
    if (prose[p] == ' ' || prose[p] == '\n') return p;
  while (at > 0 && ((unsigned char)prose[at] & 0xC0) == 0x80) at--;
  return at;
}

/* Tokens of the prompt about group `g` with *varied = value. */
static oscar_status measure(struct maker *m, int64_t *varied, int64_t value, int g, int *tokens) {
  *varied = varied == &m->filler_used ? word_end(m, value) : value;
  int32_t *ids = NULL;
  oscar_status status = write_message(m, g);
  if (status == OSCAR_OK) status = m->form->encode(m->form->user, m->message.data, text_string(&m->begin), &ids, tokens);
  mem_free(m->context, ids);
  return status;
}

/* Sets *varied to the largest value of `least` to `most` with which the prompt about group `g` has at most `limit` tokens, or a
 * little less when few tokens are missing. */
static oscar_status fit(struct maker *m, int64_t *varied, int64_t least, int64_t most, int g, int limit) {
  const int slack = limit / 512; /* 0.2 %: the rest of the 2 % is for questions of different lengths */
  int64_t low = least, high = most;
  int at_low, at_high;
  oscar_status status = measure(m, varied, high, g, &at_high);
  if (status != OSCAR_OK || at_high <= limit) return status;
  status = measure(m, varied, low, g, &at_low);
  if (status == OSCAR_OK && at_low > limit)
    return set_error(m->context, OSCAR_INVALID_ARGUMENT, "%s: a length of %d tokens is too short, the text needs %d",
                     m->rules->name, m->spec->tokens, at_low);
  for (int round = 0; status == OSCAR_OK && high - low > 1 && limit - at_low > slack; round++) {
    /* Interpolation finds the place soon; a halving now and then keeps it from creeping. */
    int64_t guess = low + (int64_t)((double)(high - low) * (limit - at_low) / (at_high - at_low));
    if (round % 4 == 3) guess = low + (high - low) / 2;
    guess = guess <= low ? low + 1 : guess >= high ? high - 1 : guess;
    int tokens = 0;
    status = measure(m, varied, guess, g, &tokens);
    if (tokens <= limit) {
      low = guess;
      at_low = tokens;
    } else {
      high = guess;
      at_high = tokens;
    }
  }
  *varied = varied == &m->filler_used ? word_end(m, low) : low;
  return status;
}

/* ---- questions ---- */

/* The right answer as a model would write it after the beginning: " 1, 2, 3", or in the form that was asked for. */
static void write_gold(struct maker *m, const struct group *group, struct text *text) {
  if (m->rules->write_answer) {
    m->rules->write_answer(text, group);
    return;
  }
  for (int i = 0; i < m->rules->values; i++) text_add(text, "%s%s", i ? ", " : " ", group->value[i]);
}

/* Prompt and gold are cut out of one encoding, the prompt where it stops being the same without the answer: whatever the
 * tokenizer does at the border, they follow each other. */
static oscar_status encode_question(struct maker *m, const struct group *group, struct haystack_question *q) {
  int32_t *whole = NULL;
  int whole_count = 0;
  oscar_status status = m->form->encode(m->form->user, m->message.data, q->begin, &q->ids, &q->count);
  write_gold(m, group, &m->begin);
  if (status == OSCAR_OK && m->begin.failed) status = OSCAR_NO_MEMORY;
  if (status == OSCAR_OK) status = m->form->encode(m->form->user, m->message.data, m->begin.data, &whole, &whole_count);
  if (status == OSCAR_OK) {
    int same = 0;
    while (same < q->count && same < whole_count && q->ids[same] == whole[same]) same++;
    q->count = same;
    q->gold_count = whole_count - same;
    q->gold = mem_alloc(m->context, (size_t)q->gold_count, sizeof *q->gold);
    if (q->gold)
      memcpy(q->gold, whole + same, (size_t)q->gold_count * sizeof *whole);
    else
      status = OSCAR_NO_MEMORY;
  }
  mem_free(m->context, whole);
  return status;
}

static oscar_status make_question(struct maker *m, int g, struct haystack_question *q) {
  const struct group *group = &m->group[g];
  struct text asked = {.context = m->context};
  oscar_status status = write_message(m, g);
  m->rules->write_question(&asked, group);
  if (status != OSCAR_OK || asked.failed) {
    text_free(&asked);
    return OSCAR_NO_MEMORY;
  }
  q->text = asked.data;
  q->begin = mem_strdup(m->context, m->begin.data);
  q->values = m->rules->values;
  memcpy(q->expected, group->value, sizeof q->expected);
  q->depth = (double)group->first_at / (double)m->message.bytes;
  return q->begin ? encode_question(m, group, q) : OSCAR_NO_MEMORY;
}

/* `questions` different groups of those that are written. */
static void choose_groups(struct maker *m, int *chosen) {
  for (int i = 0; i < m->spec->questions; i++) {
    bool taken;
    do {
      chosen[i] = (int)draw_below(&m->draw, (uint32_t)m->used);
      taken = false;
      for (int k = 0; k < i; k++) taken = taken || chosen[k] == chosen[i];
    } while (taken);
  }
}

static int count_common(const struct haystack *h) {
  const struct haystack_question *first = &h->question[0];
  int common = first->count - 1;
  for (int i = 1; i < h->questions; i++) {
    const struct haystack_question *q = &h->question[i];
    int same = 0;
    while (same < common && same < q->count - 1 && q->ids[same] == first->ids[same]) same++;
    common = same;
  }
  return common;
}

static void free_questions(oscar_context *context, struct haystack *h) {
  for (int i = 0; i < HAYSTACK_QUESTIONS; i++) {
    struct haystack_question *q = &h->question[i];
    void *const owned[] = {q->text, q->begin, q->ids, q->gold};
    for (size_t k = 0; k < ARRAY_LENGTH(owned); k++) mem_free(context, owned[k]);
    *q = (struct haystack_question){0};
  }
}

static oscar_status make_questions(struct maker *m, const int *chosen, struct haystack *h, int *longest) {
  free_questions(m->context, h);
  h->questions = m->spec->questions;
  *longest = 0;
  for (int i = 0; i < h->questions; i++) {
    oscar_status status = make_question(m, chosen[i], &h->question[i]);
    if (status != OSCAR_OK) return status;
    if (h->question[i].count > *longest) *longest = h->question[i].count;
  }
  return OSCAR_OK;
}

/* ---- the whole ---- */

static oscar_status check_spec(oscar_context *context, const struct haystack_spec *s) {
  if (s->tokens < HAYSTACK_LEAST || s->tokens > HAYSTACK_MOST)
    return set_error(context, OSCAR_INVALID_ARGUMENT, "a prompt of %d tokens; expected %d to %d", s->tokens, HAYSTACK_LEAST,
                     HAYSTACK_MOST);
  if (s->questions < 1 || s->questions > haystack_questions(s->tokens))
    return set_error(context, OSCAR_INVALID_ARGUMENT, "%d questions in %d tokens; expected 1 to %d", s->questions, s->tokens,
                     haystack_questions(s->tokens));
  return OSCAR_OK;
}

static oscar_status prepare(struct maker *m) {
  const struct haystack_spec *s = m->spec;
  const struct task_rules *r = m->rules;
  m->groups = s->tokens / (r->tokens_per_group ? r->tokens_per_group : LISTED_TOKENS);
  if (m->groups < s->questions) m->groups = s->questions;
  m->used = m->groups;
  const size_t statements = (size_t)m->groups * (size_t)r->statements;
  m->group = mem_zalloc(m->context, (size_t)m->groups, sizeof *m->group);
  m->order = mem_alloc(m->context, statements, sizeof *m->order);
  m->place = mem_alloc(m->context, statements, sizeof *m->place);
  if (!m->group || !m->order || !m->place) return OSCAR_NO_MEMORY;
  oscar_status status = filler_write(&m->filler, s->filler, s->filler_bytes, &m->draw, (size_t)s->tokens * BYTES_PER_TOKEN);
  if (status == OSCAR_OK) status = draw_groups(m);
  if (status == OSCAR_OK && r->tokens_per_group) draw_places(m);
  return status;
}

/* Fits to the first question, then by what the longest of them has too much. */
static oscar_status fit_questions(struct maker *m, struct haystack *h) {
  const int limit = m->spec->tokens;
  int chosen[HAYSTACK_QUESTIONS] = {0}, longest = 0, excess = 0;
  oscar_status status = OSCAR_OK;
  /* The comment of a listed task takes up what is kept free here; questions differ by less. */
  if (m->rules->tokens_per_group == 0) status = fit(m, &m->used, m->spec->questions, m->groups, 0, limit - COMMENT_TOKENS);
  if (status != OSCAR_OK) return status;
  choose_groups(m, chosen);
  do {
    if (status == OSCAR_OK) status = fit(m, &m->filler_used, 0, (int64_t)m->filler.bytes - 1, chosen[0], limit - excess);
    if (status == OSCAR_OK) status = make_questions(m, chosen, h, &longest);
    excess += longest - limit;
  } while (status == OSCAR_OK && longest > limit);
  if (status == OSCAR_OK && longest < limit - (limit / 50 > HAYSTACK_MISSING ? limit / 50 : HAYSTACK_MISSING))
    return set_error(m->context, OSCAR_INVALID_ARGUMENT,
                     "%s: a prompt came out at %d tokens instead of %d; the filler has long "
                     "stretches without a space or too few tokens",
                     m->rules->name, longest, limit);
  return status;
}

oscar_status haystack_make(oscar_context *context, const struct prompt_form *form, const struct haystack_spec *spec,
                           struct haystack *haystack) {
  *haystack = (struct haystack){0};
  oscar_status status = check_spec(context, spec);
  if (status != OSCAR_OK) return status;
  struct maker m = {.context = context, .rules = &task_rules_of[spec->task], .spec = spec, .form = form};
  m.filler.context = m.message.context = m.begin.context = context;
  m.draw = draw_begin(spec->seed, (uint64_t)spec->task, (uint64_t)spec->tokens, (uint64_t)spec->index);
  status = prepare(&m);
  if (status == OSCAR_OK) status = fit_questions(&m, haystack);
  if (status == OSCAR_OK) {
    text_clear(&m.message);
    write_haystack(&m, &m.message);
    haystack->text = mem_strdup(context, text_string(&m.message));
    if (!haystack->text) status = OSCAR_NO_MEMORY;
    haystack->common = count_common(haystack);
  }
  void *const owned[] = {m.group, m.order, m.place};
  for (size_t i = 0; i < ARRAY_LENGTH(owned); i++) mem_free(context, owned[i]);
  text_free(&m.filler);
  text_free(&m.message);
  text_free(&m.begin);
  if (status != OSCAR_OK) haystack_free(context, haystack);
  return status;
}

void haystack_free(oscar_context *context, struct haystack *h) {
  free_questions(context, h);
  mem_free(context, h->text);
  *h = (struct haystack){0};
}
