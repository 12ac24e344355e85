/*
 * session.c - one conversation or completion: a sequence in the cache, the tokens it stands for, the logits after the last of
 * them.
 *
 * The token that was sampled last is `pending`: it belongs to the session but is run through the model only when something
 * follows it, so that the last token of an answer costs nothing. Invariant: history = tokens in the sequence, then at most one
 * pending token; `logits` belong to the end of the sequence and are usable when nothing is pending. On a GPU the step of a
 * pending token gives the next one where that can be chosen there, and no logits. A grammar is asked here, so tokens that keep to
 * one are chosen here, too.
 *
 * With guesses (engine/speculate.h) the step of a pending token gives several rows of logits. Row i belongs to the end of the
 * history once i guesses have turned out right, and is looked at only when the next token is asked for: so the sampler goes
 * through the same logits with the same random numbers as without guesses, however many tokens the caller takes. Meanwhile the
 * sequence holds guesses that nobody has confirmed. Whatever else is to be done with the session, they are taken back first and
 * the newest token becomes a pending one, as it would be without guesses (settle).
 */
#include "engine/engine.h"
#include "engine/speculate.h"

#include <string.h>

struct session {
  struct engine *engine;
  oscar_sequence *sequence;
  struct sampler *sampler;
  float *logits; /* [1 + guesses][vocab] */
  bool logits_valid, pending;
  struct lookup *lookup;     /* NULL: none, or the draft guesses */
  struct draft_text *drafts; /* NULL: none, or lookup guesses */
  struct guess_rate rate;
  int32_t guesses[MOST_GUESSES]; /* of the last step */
  int guessed, right;            /* how many these were, and how many turned out right so far: `right` is the row to look at */
  int32_t *history;              /* [context] */
  int64_t length;
  struct session_timings timings;
  /* ---- of an answer that keeps to a grammar ---- */
  struct token_table *spellings; /* made when first needed */
  struct grammar_state *form;    /* NULL: anything goes */
  uint64_t *allowed;             /* [ceil(vocab / 64)] */
};

static oscar_status make_guesser(struct session *s) {
  struct engine *engine = s->engine;
  if (engine->options.guesses == 0) return OSCAR_OK;
  guess_rate_start(&s->rate, guess_cost(engine->model, engine->draft));
  return engine->draft ? draft_text_create(engine->draft, &s->drafts)
                       : lookup_create(engine->context, LOOKUP_SHORTEST, LOOKUP_LONGEST, &s->lookup);
}

oscar_status session_create(struct engine *engine, const struct sampler_options *sampling, struct session **session) {
  *session = NULL;
  oscar_context *context = engine->context;
  const int vocab = model_geometry_of(engine->model)->vocab;
  struct session *s = mem_zalloc(context, 1, sizeof *s);
  if (!s) return OSCAR_NO_MEMORY;
  s->engine = engine;
  oscar_status status = sampler_create(context, sampling, vocab, &s->sampler);
  if (status == OSCAR_OK) status = oscar_sequence_create(engine->cache, &s->sequence);
  if (status == OSCAR_OK) {
    s->logits = mem_alloc(context, (size_t)(1 + engine->options.guesses) * (size_t)vocab, sizeof *s->logits);
    s->history = mem_alloc(context, (size_t)engine->options.context, sizeof *s->history);
    status = s->logits && s->history ? make_guesser(s) : OSCAR_NO_MEMORY;
  }
  if (status != OSCAR_OK) {
    session_free(s);
    return status;
  }
  *session = s;
  return OSCAR_OK;
}

void session_free(struct session *s) {
  if (!s) return;
  oscar_context *context = s->engine->context;
  if (s->sequence) oscar_sequence_free(s->sequence);
  sampler_free(s->sampler);
  lookup_free(s->lookup);
  draft_text_free(s->drafts);
  grammar_state_free(s->form);
  token_table_free(s->spellings);
  mem_free(context, s->allowed);
  mem_free(context, s->logits);
  mem_free(context, s->history);
  mem_free(context, s);
}

size_t session_bytes(const struct model *model, int64_t context, int guesses) {
  const size_t vocab = (size_t)model_geometry_of(model)->vocab;
  return sizeof(struct session) + sampler_bytes((int)vocab) + (size_t)(1 + guesses) * vocab * sizeof(float) +
         (size_t)context * sizeof(int32_t);
}

/* ---- guesses ---- */

/* Takes back what the sequence holds beyond `length` tokens: guesses of the last step, after the first of which it began anew. */
static oscar_status take_back(struct session *s, int64_t length) {
  int64_t resume = length;
  s->guessed = s->right = 0;
  if (oscar_sequence_length(s->sequence) == length) return OSCAR_OK;
  oscar_status status = oscar_sequence_truncate(s->sequence, length, OSCAR_REWIND_REFILL, &resume);
  if (status == OSCAR_OK && resume != length)
    status = set_error(s->engine->context, OSCAR_INVALID_ARGUMENT, "a guess at token %lld cannot be taken back exactly",
                       (long long)length);
  return status;
}

/* As it would be without guesses: no token of the sequence is unconfirmed, and the newest one is yet to run. */
static oscar_status settle(struct session *s) {
  if (s->guessed == 0) return OSCAR_OK;
  const bool waits = s->right > 0; /* else nothing was chosen from the step */
  s->pending = waits;
  s->logits_valid = false;
  return take_back(s, waits ? s->length - 1 : s->length);
}

/* Guesses of what follows the pending token, as many as pay and are possible. */
static oscar_status guess(struct session *s, int *count) {
  const struct engine_options *o = &s->engine->options;
  *count = 0;
  int most = o->guesses < o->chunk - 1 ? o->guesses : o->chunk - 1;
  if (most > o->context - s->length) most = (int)(o->context - s->length);
  most = guesses_possible(s->engine->model, s->sequence, most);
  if (most < 1) return OSCAR_OK;
  if (s->lookup) {
    oscar_status status = lookup_extend(s->lookup, s->history, s->length);
    if (status != OSCAR_OK) return status;
    most = lookup_guess(s->lookup, s->history, s->length, most, s->guesses);
    *count = most > 0 ? guess_rate_next(&s->rate, most) : 0;
    return OSCAR_OK;
  }
  most = guess_rate_next(&s->rate, most);
  const int32_t *ids = s->history;
  int32_t *to = s->guesses;
  return draft_guess(s->engine->draft, 1, &s->drafts, &ids, &s->length, &most, &to, count);
}

/* Tokens that were generated, or guessed, with logits of all: a token's do not depend on the others'. */
static oscar_status run_generated(struct session *s, int n, const int32_t *ids) {
  const struct forward_job job = {
      .sequence = s->sequence, .n = n, .ids = ids, .outputs = n, .logits = s->logits, .kind = TOKENS_GENERATED};
  s->logits_valid = false;
  oscar_status status = runner_forward_all(s->engine->runner, 1, &job);
  s->logits_valid = status == OSCAR_OK;
  return status;
}

/* The step of the pending token and its guesses; *ran is false where there are none, or no room for them. */
static oscar_status run_guesses(struct session *s, bool *ran) {
  int count = 0;
  *ran = false;
  if (!s->lookup && !s->drafts) return OSCAR_OK;
  oscar_status status = guess(s, &count);
  if (status != OSCAR_OK || count == 0) return status;
  int32_t ids[1 + MOST_GUESSES];
  ids[0] = s->history[s->length - 1];
  memcpy(ids + 1, s->guesses, (size_t)count * sizeof *ids);
  status = run_generated(s, 1 + count, ids);
  if (status == OSCAR_NO_SPACE) return OSCAR_OK;
  if (status != OSCAR_OK) return status;
  *ran = true;
  s->guessed = count;
  s->right = 0;
  s->timings.guessed += count;
  return OSCAR_OK;
}

/* Runs history[sequence length .. length) through the model; the last chunk gives the logits. */
static oscar_status run_unfed(struct session *s, const struct progress *progress) {
  const int64_t start = oscar_sequence_length(s->sequence), total = s->length - start;
  s->logits_valid = false;
  for (int64_t done = 0; done < total;) {
    if (progress && !progress->report(progress->user, "prompt", done, total))
      return set_error(s->engine->context, OSCAR_CANCELLED, "stopped while reading the prompt");
    const int64_t left = total - done;
    const int n = left < s->engine->options.chunk ? (int)left : s->engine->options.chunk;
    const bool last = n == left;
    oscar_status status = runner_forward(s->engine->runner, s->sequence, n, s->history + start + done, last, s->logits, NULL);
    if (status != OSCAR_OK) return status;
    done += n;
    s->logits_valid = last;
  }
  if (progress && total > 0) progress->report(progress->user, "prompt", total, total);
  return OSCAR_OK;
}

/* Runs the pending token; gives the one after it, or logits. */
static oscar_status run_pending(struct session *s, int32_t *id, bool *sampled) {
  struct runner *runner = s->engine->runner;
  struct sampling sampling;
  bool ran;
  *sampled = false;
  oscar_status status = run_guesses(s, &ran);
  if (status != OSCAR_OK || ran) return status;
  *sampled = !s->form && runner_can_sample(runner) && sampler_describe(s->sampler, &sampling);
  const int32_t *pending = s->history + oscar_sequence_length(s->sequence);
  if (!*sampled) return run_generated(s, 1, pending);
  s->logits_valid = false;
  const struct forward_job job = {.sequence = s->sequence, .n = 1, .ids = pending, .outputs = 1, .kind = TOKENS_GENERATED};
  return runner_sample_all(runner, 1, &job, &sampling, id);
}

/* Drops from the history what did not get into the sequence. */
static void forget_unfed(struct session *s) { s->length = oscar_sequence_length(s->sequence); }

oscar_status session_feed(struct session *s, const int32_t *ids, int n, const struct progress *progress) {
  const int64_t context = s->engine->options.context;
  if (n < 1) return set_error(s->engine->context, OSCAR_INVALID_ARGUMENT, "there are no tokens to feed");
  if (s->length + n > context)
    return set_error(s->engine->context, OSCAR_INVALID_ARGUMENT, "%lld tokens do not fit a context of %lld (see -c)",
                     (long long)(s->length + n), (long long)context);
  oscar_status status = settle(s);
  if (status != OSCAR_OK) return status;
  memcpy(s->history + s->length, ids, (size_t)n * sizeof *ids);
  s->length += n;
  s->pending = false;
  const int64_t begun = time_ns(), before = oscar_sequence_length(s->sequence);
  status = run_unfed(s, progress);
  s->timings.prompt_ns += time_ns() - begun;
  s->timings.prompt_tokens += oscar_sequence_length(s->sequence) - before;
  if (status != OSCAR_OK) forget_unfed(s);
  return status;
}

oscar_status session_sync(struct session *s, const int32_t *ids, int n, const struct progress *progress) {
  if (n < 1) return set_error(s->engine->context, OSCAR_INVALID_ARGUMENT, "there are no tokens to feed");
  oscar_status settled = settle(s);
  if (settled != OSCAR_OK) return settled;
  int64_t same = 0;
  while (same < s->length && same < n && s->history[same] == ids[same]) same++;
  if (same == n) same = n - 1; /* the last token gives the logits */
  int64_t keep = oscar_sequence_length(s->sequence);
  if (same < keep) {
    oscar_status status = oscar_sequence_truncate(s->sequence, same, OSCAR_REWIND_REFILL, &keep);
    if (status != OSCAR_OK) return status;
  }
  s->length = keep;
  s->pending = s->logits_valid = false;
  return session_feed(s, ids + keep, (int)(n - keep), progress);
}

/* A token was chosen from row `right`: is it what was guessed to follow? Then its own row comes next; else what was guessed is
 * taken back. */
static oscar_status compare_guess(struct session *s, int32_t id, bool end, bool *ran) {
  *ran = !end && s->right < s->guessed && s->guesses[s->right] == id;
  if (*ran) {
    s->right++;
    s->timings.accepted++;
    return OSCAR_OK;
  }
  if (s->guessed) guess_rate_note(&s->rate, s->guessed, s->right);
  return s->guessed ? take_back(s, s->length) : OSCAR_OK;
}

static oscar_status grammar_failed(struct session *s, oscar_status status) {
  if (status == OSCAR_NO_MEMORY) return set_error(s->engine->context, status, "out of memory for a grammar");
  return set_error(s->engine->context, status, "this grammar leaves too many ways open at once; write it with fewer ambiguities");
}

oscar_status session_follow(struct session *s, const struct grammar *grammar) {
  const struct tokenizer *tokenizer = model_tokenizer(s->engine->model);
  const size_t words = ((size_t)model_geometry_of(s->engine->model)->vocab + 63) / 64;
  grammar_state_free(s->form);
  s->form = NULL;
  if (!grammar) return OSCAR_OK;
  if (!s->allowed && !(s->allowed = mem_zalloc(s->engine->context, words, sizeof *s->allowed))) return OSCAR_NO_MEMORY;
  oscar_status status = s->spellings ? OSCAR_OK : token_table_create(tokenizer, NULL, 0, &s->spellings);
  if (status == OSCAR_OK) status = grammar_state_create(grammar, s->spellings, &s->form);
  return status == OSCAR_OK ? OSCAR_OK : grammar_failed(s, status);
}

/* The next token from the row of logits that belongs to the end of the history. */
static oscar_status choose(struct session *s, int32_t *id) {
  if (!s->logits_valid) return set_error(s->engine->context, OSCAR_INVALID_ARGUMENT, "nothing was fed yet");
  const size_t vocab = (size_t)model_geometry_of(s->engine->model)->vocab;
  oscar_status status = s->form ? grammar_allowed(s->form, s->allowed) : OSCAR_OK;
  if (status != OSCAR_OK) return grammar_failed(s, status);
  status =
      sampler_choose(s->sampler, s->logits + (size_t)s->right * vocab, s->history, s->length, s->form ? s->allowed : NULL, id);
  if (status != OSCAR_OK || !s->form) return status;
  status = grammar_accept(s->form, *id);
  return status == OSCAR_OK ? OSCAR_OK : grammar_failed(s, status);
}

oscar_status session_next(struct session *s, int32_t *id, bool *end) {
  if (s->form && grammar_must_end(s->form)) {
    *id = tokenizer_eos(model_tokenizer(s->engine->model));
    *end = true;
    return OSCAR_OK;
  }
  const int64_t begun = time_ns();
  oscar_status status = OSCAR_OK;
  bool sampled = false, ran = false;
  if (s->pending) {
    s->pending = false;
    if ((status = run_pending(s, id, &sampled)) != OSCAR_OK) {
      forget_unfed(s);
      return status;
    }
    s->timings.decoded_tokens++;
  } else if (s->right > 0) {
    s->timings.decoded_tokens++; /* it ran as a guess */
  }
  if (!sampled && (status = choose(s, id)) != OSCAR_OK) return status;
  *end = tokenizer_is_end(model_tokenizer(s->engine->model), *id);
  if ((status = compare_guess(s, *id, *end, &ran)) != OSCAR_OK) return status;
  if (!*end) {
    if (s->length >= s->engine->options.context)
      return set_error(s->engine->context, OSCAR_NO_SPACE, "the context of %lld tokens is full (see -c)",
                       (long long)s->engine->options.context);
    s->history[s->length++] = *id;
    s->pending = !ran;
  }
  s->logits_valid = ran;
  s->timings.decode_ns += time_ns() - begun;
  return OSCAR_OK;
}

const int32_t *session_tokens(const struct session *s, int64_t *n) {
  *n = s->length;
  return s->history;
}

oscar_status session_save(struct session *s, const char *text, const char *path) {
  oscar_status status = settle(s);
  if (status != OSCAR_OK) return status;
  const oscar_snapshot_contents contents = {.model = model_fingerprint(s->engine->model),
                                            .ids = s->history,
                                            .n_ids = s->length,
                                            .text = text,
                                            .text_bytes = strlen(text)};
  return oscar_sequence_save(s->sequence, &contents, path);
}

/* Beside the sequence that is there, if the cache has room for both, so that a failure leaves that; else in its place. */
static oscar_status restore_sequence(struct session *s, const oscar_snapshot *snapshot, oscar_sequence **restored) {
  const char *model = model_fingerprint(s->engine->model);
  oscar_status status = oscar_snapshot_restore(snapshot, s->engine->cache, model, restored);
  if (status != OSCAR_NO_SPACE) return status;
  int64_t nothing;
  status = oscar_sequence_truncate(s->sequence, 0, OSCAR_REWIND_EXACT, &nothing);
  if (status != OSCAR_OK) return status;
  s->length = 0;
  s->pending = s->logits_valid = false;
  return oscar_snapshot_restore(snapshot, s->engine->cache, model, restored);
}

oscar_status session_restore(struct session *s, const oscar_snapshot *snapshot) {
  const oscar_snapshot_info *info = oscar_snapshot_describe(snapshot);
  oscar_context *context = s->engine->context;
  const int vocab = model_geometry_of(s->engine->model)->vocab;
  if (info->n_ids > s->engine->options.context)
    return set_error(context, OSCAR_INVALID_ARGUMENT, "the %lld tokens that were saved do not fit a context of %lld (see -c)",
                     (long long)info->n_ids, (long long)s->engine->options.context);
  for (int64_t i = 0; i < info->n_ids; i++)
    if (info->ids[i] < 0 || info->ids[i] >= vocab)
      return set_error(context, OSCAR_MISMATCH, "token %lld of what was saved is %d; this model has tokens 0 to %d", (long long)i,
                       (int)info->ids[i], vocab - 1);
  oscar_sequence *restored;
  oscar_status status = settle(s);
  if (status == OSCAR_OK) status = restore_sequence(s, snapshot, &restored);
  if (status != OSCAR_OK) return status;
  oscar_sequence_free(s->sequence);
  s->sequence = restored;
  if (info->n_ids) memcpy(s->history, info->ids, (size_t)info->n_ids * sizeof *info->ids);
  s->length = info->n_ids;
  s->pending = info->n_ids > info->tokens;
  s->logits_valid = false;
  return OSCAR_OK;
}

int64_t session_length(const struct session *s) { return s->length; }
const oscar_sequence *session_sequence(const struct session *s) { return s->sequence; }
const struct session_timings *session_timings_of(const struct session *s) { return &s->timings; }
