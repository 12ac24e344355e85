/*
 * session.c - one conversation or completion: a sequence in the cache, the tokens it stands for, the logits after the last of
 * them.
 *
 * The token that was sampled last is `pending`: it belongs to the session but is run through the model only when something
 * follows it, so that the last token of an answer costs nothing. Invariant: history = tokens in the sequence, then at most one
 * pending token; `logits` belong to the end of the sequence and are usable when nothing is pending. On a GPU the step of a
 * pending token gives the next one where that can be chosen there, and no logits. A grammar is asked here, so tokens that keep to
 * one are chosen here, too.
 */
#include "engine/engine.h"

#include <string.h>

struct session {
  struct engine *engine;
  oscar_sequence *sequence;
  struct sampler *sampler;
  float *logits; /* [vocab] */
  bool logits_valid, pending;
  int32_t *history; /* [context] */
  int64_t length;
  struct session_timings timings;
  /* ---- of an answer that keeps to a grammar ---- */
  struct token_table *spellings; /* made when first needed */
  struct grammar_state *form;    /* NULL: anything goes */
  uint64_t *allowed;             /* [ceil(vocab / 64)] */
};

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
    s->logits = mem_alloc(context, (size_t)vocab, sizeof *s->logits);
    s->history = mem_alloc(context, (size_t)engine->options.context, sizeof *s->history);
    if (!s->logits || !s->history) status = OSCAR_NO_MEMORY;
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
  grammar_state_free(s->form);
  token_table_free(s->spellings);
  mem_free(context, s->allowed);
  mem_free(context, s->logits);
  mem_free(context, s->history);
  mem_free(context, s);
}

size_t session_bytes(const struct model *model, int64_t context) {
  const int vocab = model_geometry_of(model)->vocab;
  return sizeof(struct session) + sampler_bytes(vocab) + (size_t)vocab * sizeof(float) + (size_t)context * sizeof(int32_t);
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
  *sampled = !s->form && runner_can_sample(runner) && sampler_describe(s->sampler, &sampling);
  if (!*sampled) return run_unfed(s, NULL);
  s->logits_valid = false;
  const struct forward_job job = {
      .sequence = s->sequence, .n = 1, .ids = s->history + oscar_sequence_length(s->sequence), .outputs = 1};
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
  memcpy(s->history + s->length, ids, (size_t)n * sizeof *ids);
  s->length += n;
  s->pending = false;
  const int64_t begun = time_ns(), before = oscar_sequence_length(s->sequence);
  oscar_status status = run_unfed(s, progress);
  s->timings.prompt_ns += time_ns() - begun;
  s->timings.prompt_tokens += oscar_sequence_length(s->sequence) - before;
  if (status != OSCAR_OK) forget_unfed(s);
  return status;
}

oscar_status session_sync(struct session *s, const int32_t *ids, int n, const struct progress *progress) {
  if (n < 1) return set_error(s->engine->context, OSCAR_INVALID_ARGUMENT, "there are no tokens to feed");
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

/* The next token from the logits. */
static oscar_status choose(struct session *s, int32_t *id) {
  if (!s->logits_valid) return set_error(s->engine->context, OSCAR_INVALID_ARGUMENT, "nothing was fed yet");
  oscar_status status = s->form ? grammar_allowed(s->form, s->allowed) : OSCAR_OK;
  if (status != OSCAR_OK) return grammar_failed(s, status);
  status = sampler_choose(s->sampler, s->logits, s->history, s->length, s->form ? s->allowed : NULL, id);
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
  bool sampled = false;
  if (s->pending) {
    s->pending = false;
    if ((status = run_pending(s, id, &sampled)) != OSCAR_OK) {
      forget_unfed(s);
      return status;
    }
    s->timings.decoded_tokens++;
  }
  if (!sampled && (status = choose(s, id)) != OSCAR_OK) return status;
  *end = tokenizer_is_end(model_tokenizer(s->engine->model), *id);
  if (!*end) {
    if (s->length >= s->engine->options.context)
      return set_error(s->engine->context, OSCAR_NO_SPACE, "the context of %lld tokens is full (see -c)",
                       (long long)s->engine->options.context);
    s->history[s->length++] = *id;
    s->pending = true;
    s->logits_valid = false;
  }
  s->timings.decode_ns += time_ns() - begun;
  return OSCAR_OK;
}

const int32_t *session_tokens(const struct session *s, int64_t *n) {
  *n = s->length;
  return s->history;
}

oscar_status session_save(const struct session *s, const char *text, const char *path) {
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
  oscar_status status = restore_sequence(s, snapshot, &restored);
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
