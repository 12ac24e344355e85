/*
 * guess.c - guesses of what comes next, so that a step gives an answer more than one token.
 *
 * Before a step each answer that decodes gets as many guesses as pay for it: with many answers in a step a row more costs nearly
 * what a token does, with one much less. The sampler then goes through the rows in order, as it would have step by step; where it
 * chooses something else than the guess, the rest leaves the sequence. `certain` says how much of it is the answer's while that
 * goes on, because an answer may end in the middle.
 */
#include "engine/service/service_private.h"

#include <string.h>

enum { TOGETHER = 16 }; /* answers that a draft guesses for at a time */

oscar_status guesses_create(struct service *s) {
  const struct service_options *o = &s->options;
  if (o->speculation != SPECULATION_DRAFT) return OSCAR_OK;
  return draft_create(s->engine->model, o->draft_model, DRAFT_KV, s->context_tokens, o->max_running, &s->draft);
}

void guesses_free(struct service *s) { draft_free(s->draft); }

oscar_status answer_guesses_begin(struct service *s, struct answer *a) {
  if (s->options.speculation == SPECULATION_OFF) return OSCAR_OK;
  guess_rate_start(&a->rate, guess_cost(s->engine->model, s->draft));
  if (s->draft) return draft_text_create(s->draft, &a->drafts);
  return lookup_create(s->context, LOOKUP_SHORTEST, LOOKUP_LONGEST, &a->lookup);
}

void answer_guesses_end(struct answer *a) {
  lookup_free(a->lookup);
  draft_text_free(a->drafts);
  a->lookup = NULL;
  a->drafts = NULL;
}

/* With so many answers in a step, of which the first token is the dearest. */
static float cost_beside(float alone, int answers) { return alone * (float)answers / (1 - alone + alone * (float)answers); }

static int guesses_wanted(const struct service *s, struct answer *a, int most, int answers) {
  const int64_t left = a->request->max_tokens - a->generated - 1; /* this step gives one without a guess */
  a->n_guesses = 0;
  if (a->is_drawn) return 0;
  if (most > s->options.candidates) most = s->options.candidates;
  if (most > left) most = (int)left;
  most = guesses_possible(s->engine->model, a->sequence, most);
  if (most < 1) return 0;
  a->rate.cost = cost_beside(guess_cost(s->engine->model, s->draft), answers);
  return guess_rate_next(&a->rate, most);
}

static void look_up(struct service *s, struct answer *a, int most) {
  if (most < 1 || lookup_extend(a->lookup, a->ids, a->n) != OSCAR_OK) return;
  if (answer_reserve(s, a, MOST_GUESSES) == OSCAR_OK) a->n_guesses = lookup_guess(a->lookup, a->ids, a->n, most, a->guesses);
}

/* All at once. Where that fails there are no guesses in this step. */
static void ask_draft(struct service *s, struct answer **answers, const int *most, int count) {
  struct draft_text *texts[TOGETHER];
  const int32_t *ids[TOGETHER];
  int32_t *guesses[TOGETHER];
  int64_t n[TOGETHER];
  int got[TOGETHER];
  for (int first = 0, some; first < count; first += some) {
    some = count - first < TOGETHER ? count - first : TOGETHER;
    for (int i = 0; i < some; i++) {
      struct answer *a = answers[first + i];
      texts[i] = a->drafts;
      ids[i] = a->ids;
      n[i] = a->n;
      guesses[i] = a->guesses;
    }
    if (draft_guess(s->draft, some, texts, ids, n, most + first, guesses, got) != OSCAR_OK) return;
    for (int i = 0; i < some; i++)
      if (answer_reserve(s, answers[first + i], MOST_GUESSES) == OSCAR_OK) answers[first + i]->n_guesses = got[i];
  }
}

void guesses_make(struct service *s, int most) {
  struct answer *asking[TOGETHER];
  int wanted[TOGETHER], count = 0, decoding = 0;
  if (s->options.speculation == SPECULATION_OFF) return;
  for (int i = 0; i < s->n_admitted; i++) decoding += s->admitted[i]->state == ANSWER_DECODES;
  if (decoding == 0) return;
  for (int i = 0; i < s->n_admitted; i++) {
    struct answer *a = s->admitted[i];
    if (a->state != ANSWER_DECODES) continue;
    const int guesses = guesses_wanted(s, a, most / decoding - 1, decoding);
    if (a->lookup) {
      look_up(s, a, guesses);
    } else if (guesses > 0) {
      asking[count] = a;
      wanted[count++] = guesses;
    }
    if (count == TOGETHER) {
      ask_draft(s, asking, wanted, count);
      count = 0;
    }
  }
  if (count > 0) ask_draft(s, asking, wanted, count);
  for (int i = 0; i < s->n_admitted; i++) {
    struct answer *a = s->admitted[i];
    if (a->state == ANSWER_DECODES && a->n_guesses > 0) memcpy(a->ids + a->n, a->guesses, (size_t)a->n_guesses * sizeof *a->ids);
  }
}

oscar_status answer_settle(struct service *s, struct answer *a) {
  int64_t resume;
  const int64_t certain = a->certain;
  a->certain = INT64_MAX;
  if (!a->sequence || oscar_sequence_length(a->sequence) <= certain) return OSCAR_OK;
  oscar_status status;
  do status = oscar_sequence_truncate(a->sequence, certain, OSCAR_REWIND_REFILL, &resume);
  while (room_after(s, status));
  return status;
}

/* Its pages have gone, and its tokens are computed again. */
static void send_away(struct answer *a) {
  oscar_sequence_free(a->sequence);
  a->sequence = NULL;
  a->state = ANSWER_AWAY;
}

void guesses_look_at(struct service *s, struct answer *a, const float *logits) {
  struct request *r = a->request;
  const int guessed = a->n_guesses;
  const int64_t before = oscar_sequence_length(a->sequence) - guessed - 1;
  int right = 0;
  a->n_guesses = 0;
  a->guessed += guessed;
  r->usage.guessed += guessed;
  s->stats.guessed += guessed;
  for (int row = 0; row <= guessed; row++) {
    a->certain = before + 1 + row;
    if (row > 0) {
      a->accepted++;
      r->usage.accepted++;
      s->stats.accepted++;
    }
    if (!answer_choose(s, a, logits + (size_t)row * (size_t)s->vocab)) return;
    if (row == guessed || a->ids[a->n - 1] != a->guesses[row]) break;
    right++;
  }
  guess_rate_note(&a->rate, guessed, right);
  if (answer_settle(s, a) != OSCAR_OK)
    send_away(a);
  else if (oscar_sequence_length(a->sequence) / PAGE_TOKENS != before / PAGE_TOKENS)
    answer_insert(s, a);
}
