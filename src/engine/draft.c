/*
 * draft.c - a smaller model guesses what the larger one will choose: always what it finds most likely itself.
 *
 * A text's place in the draft is a sequence of its own cache and the ids that it holds: the text as it was last seen, and guesses
 * after it. The next time it is cut back to where the text went on otherwise and reads what is new. All texts go through
 * shared steps: in a round each reads more of its text, or its newest guess, and those that have come to their end are given
 * one guess more. A wrong guess costs time only, so nothing here needs to be exact; answers are the larger model's.
 */
#include "engine/engine.h"
#include "engine/speculate.h"

#include <string.h>

#define DRAFT_CHUNK 512 /* tokens of a step */

struct draft {
  oscar_context *context;
  struct model *model;
  oscar_codec_set *codecs; /* NULL: BF16 */
  oscar_cache *cache;
  struct runner *runner;
  size_t cache_bytes;
  float cost;
  int64_t tokens; /* of a text, at most */
  int sequences, chunk, vocab;
  int usable; /* ids below are ids of the larger model, too */
  /* of a round, [sequences] each */
  struct forward_job *jobs;
  struct sampling *sampling; /* greedy */
  int *whose;                /* text of a job */
  int32_t *next;
  float *logits; /* [sequences][vocab]; NULL where the backend chooses */
};

struct draft_text {
  struct draft *draft;
  oscar_sequence *sequence;
  int32_t *ids; /* [draft->tokens], of the sequence */
};

/* ---- the model ---- */

static oscar_status compare_vocabularies(oscar_context *context, const struct model *model, const struct model *draft,
                                         const char *path) {
  const struct tokenizer *a = model_tokenizer(model), *b = model_tokenizer(draft);
  if (tokenizer_vocab(a) != tokenizer_vocab(b))
    return set_error(context, OSCAR_MISMATCH, "%s: a draft model of %d tokens, for one of %d; they must have one vocabulary",
                     path, tokenizer_vocab(b), tokenizer_vocab(a));
  for (int32_t id = 0; id < tokenizer_vocab(a); id++) {
    size_t a_bytes, b_bytes;
    const char *a_text = tokenizer_piece(a, id, true, &a_bytes), *b_text = tokenizer_piece(b, id, true, &b_bytes);
    if (a_bytes != b_bytes || memcmp(a_text, b_text, a_bytes) != 0)
      return set_error(context, OSCAR_MISMATCH,
                       "%s: token %d of the draft model is \"%.*s\", of the model \"%.*s\"; they must have one vocabulary", path,
                       (int)id, (int)b_bytes, b_text, (int)a_bytes, a_text);
  }
  return OSCAR_OK;
}

static oscar_status make_cache(struct draft *d, const char *kv) {
  oscar_status status = kv_type_check(d->context, kv);
  if (status == OSCAR_OK) status = codec_set_obtain(d->model, kv, NULL, NULL, &d->codecs);
  if (status != OSCAR_OK) return status;
  oscar_cache_options options;
  model_cache_options(d->model, &options);
  options.codecs = d->codecs;
  options.budget_bytes = d->cache_bytes = oscar_cache_bytes_for(&options, d->tokens, d->sequences, d->chunk);
  return oscar_cache_create(d->context, &options, &d->cache);
}

static oscar_status make_round(struct draft *d) {
  const size_t n = (size_t)d->sequences;
  d->jobs = mem_alloc(d->context, n, sizeof *d->jobs);
  d->whose = d->jobs ? mem_alloc(d->context, n, sizeof *d->whose) : NULL;
  d->next = d->whose ? mem_alloc(d->context, n, sizeof *d->next) : NULL;
  d->sampling = d->next ? mem_zalloc(d->context, n, sizeof *d->sampling) : NULL;
  if (!d->sampling) return OSCAR_NO_MEMORY;
  if (!runner_can_sample(d->runner)) {
    d->logits = mem_alloc(d->context, n * (size_t)d->vocab, sizeof *d->logits);
    if (!d->logits) return OSCAR_NO_MEMORY;
  }
  return OSCAR_OK;
}

static oscar_status make_parts(struct draft *d, struct model *model, const char *path, const char *kv, int64_t context) {
  oscar_status status = model_load(d->context, model_backend(model), path, &d->model);
  if (status == OSCAR_OK) status = compare_vocabularies(d->context, model, d->model, path);
  if (status != OSCAR_OK) return status;
  const struct model_geometry *g = model_geometry_of(d->model);
  d->vocab = g->vocab;
  d->usable = g->vocab < model_geometry_of(model)->vocab ? g->vocab : model_geometry_of(model)->vocab;
  d->cost = (float)model_read_bytes_per_token(d->model) / (float)model_read_bytes_per_token(model);
  d->tokens = context < g->context_trained ? context : g->context_trained;
  d->chunk = d->tokens < DRAFT_CHUNK ? (int)d->tokens : DRAFT_CHUNK;
  if (d->chunk < d->sequences) d->chunk = d->sequences;
  status = make_cache(d, kv);
  if (status == OSCAR_OK) status = runner_create(d->model, d->cache, d->chunk, &d->runner);
  return status == OSCAR_OK ? make_round(d) : status;
}

oscar_status draft_create(struct model *model, const char *draft_path, const char *kv, int64_t context, int sequences,
                          struct draft **draft) {
  *draft = NULL;
  oscar_context *c = model_context(model);
  if (context < 1 || sequences < 1)
    return set_error(c, OSCAR_INVALID_ARGUMENT, "a draft for %d texts of %lld tokens; expected at least 1", sequences,
                     (long long)context);
  struct draft *d = mem_zalloc(c, 1, sizeof *d);
  if (!d) return OSCAR_NO_MEMORY;
  d->context = c;
  d->sequences = sequences;
  oscar_status status = make_parts(d, model, draft_path, kv, context);
  if (status != OSCAR_OK) {
    draft_free(d);
    return status;
  }
  *draft = d;
  return OSCAR_OK;
}

void draft_free(struct draft *d) {
  if (!d) return;
  runner_free(d->runner);
  oscar_cache_free(d->cache);
  oscar_codec_set_free(d->codecs);
  model_free(d->model);
  mem_free(d->context, d->jobs);
  mem_free(d->context, d->whose);
  mem_free(d->context, d->next);
  mem_free(d->context, d->sampling);
  mem_free(d->context, d->logits);
  mem_free(d->context, d);
}

size_t draft_bytes(const struct draft *d) {
  const size_t rows = d->logits ? (size_t)d->sequences * (size_t)d->vocab * sizeof *d->logits : 0;
  const size_t weights =
      model_backend(d->model)->ops->host_memory ? model_resident_bytes(d->model) : model_packed_bytes(d->model);
  return weights + d->cache_bytes + model_scratch_bytes(d->model, d->chunk, 0) + rows;
}

float draft_cost(const struct draft *d) { return d->cost; }

/* ---- texts ---- */

oscar_status draft_text_create(struct draft *d, struct draft_text **text) {
  *text = NULL;
  struct draft_text *t = mem_zalloc(d->context, 1, sizeof *t);
  if (!t) return OSCAR_NO_MEMORY;
  t->draft = d;
  t->ids = mem_alloc(d->context, (size_t)d->tokens, sizeof *t->ids);
  oscar_status status = t->ids ? oscar_sequence_create(d->cache, &t->sequence) : OSCAR_NO_MEMORY;
  if (status != OSCAR_OK) {
    draft_text_free(t);
    return status;
  }
  *text = t;
  return OSCAR_OK;
}

void draft_text_free(struct draft_text *t) {
  if (!t) return;
  oscar_sequence_free(t->sequence);
  mem_free(t->draft->context, t->ids);
  mem_free(t->draft->context, t);
}

/* ---- guessing ---- */

/* What the texts of a call want and have. */
struct round {
  int texts;
  struct draft_text *const *text;
  const int32_t *const *ids;
  const int64_t *n;
  const int *most;
  int32_t *const *guesses;
  int *count;
};

static bool wants_guesses(const struct round *r, int i) {
  return r->count[i] < r->most[i] && r->n[i] > 0 && r->n[i] + r->most[i] <= r->text[i]->draft->tokens;
}

/* Cuts the sequence to what the text begins with, less its last token at least, which gives the first guess. */
static oscar_status cut_back(struct draft_text *t, const int32_t *ids, int64_t n) {
  const int64_t held = oscar_sequence_length(t->sequence), most = held < n ? held : n - 1;
  int64_t same = 0, resume;
  while (same < most && t->ids[same] == ids[same]) same++; /* little beside a step of the model */
  return same < held ? oscar_sequence_truncate(t->sequence, same, OSCAR_REWIND_REFILL, &resume) : OSCAR_OK;
}

static int64_t unread(const struct round *r, int i) {
  return r->n[i] + r->count[i] - oscar_sequence_length(r->text[i]->sequence);
}

/* The next n tokens of a text: of what it has not read, then its newest guess. */
static void add_job(struct draft *d, const struct round *r, int i, int n, int outputs, int job) {
  struct draft_text *t = r->text[i];
  const int64_t held = oscar_sequence_length(t->sequence);
  for (int64_t k = held; k < held + n; k++) t->ids[k] = k < r->n[i] ? r->ids[i][k] : r->guesses[i][k - r->n[i]];
  float *logits = outputs && d->logits ? d->logits + (size_t)job * (size_t)d->vocab : NULL;
  d->jobs[job] = (struct forward_job){t->sequence, n, t->ids + held, outputs, logits};
  d->whose[job] = i;
}

/* One step: if all texts come to their end in it, each is to give a guess; else the longer ones read. Returns its jobs. */
static int plan_step(struct draft *d, const struct round *r, bool *guess) {
  int jobs = 0, room = d->chunk;
  int64_t all = 0;
  for (int i = 0; i < r->texts; i++)
    if (wants_guesses(r, i)) all += unread(r, i);
  *guess = all <= d->chunk;
  for (int i = 0; i < r->texts; i++) {
    if (!wants_guesses(r, i)) continue;
    const int64_t wanted = *guess ? unread(r, i) : unread(r, i) - 1;
    const int n = wanted < room ? (int)wanted : room;
    if (n > 0) add_job(d, r, i, n, *guess, jobs++);
    room -= n;
  }
  return jobs;
}

static int32_t likeliest(const float *logits, int vocab) {
  int32_t best = 0;
  for (int i = 1; i < vocab; i++)
    if (logits[i] > logits[best]) best = i;
  return best;
}

static oscar_status run_step(struct draft *d, int jobs, bool guess) {
  if (guess && !d->logits) return runner_sample_all(d->runner, jobs, d->jobs, d->sampling, d->next);
  oscar_status status = runner_forward_all(d->runner, jobs, d->jobs);
  for (int j = 0; guess && j < jobs && status == OSCAR_OK; j++) d->next[j] = likeliest(d->jobs[j].logits, d->vocab);
  return status;
}

oscar_status draft_guess(struct draft *d, int texts, struct draft_text *const *text, const int32_t *const *ids, const int64_t *n,
                         const int *most, int32_t *const *guesses, int *count) {
  if (texts < 0 || texts > d->sequences)
    return set_error(d->context, OSCAR_INVALID_ARGUMENT, "guesses for %d texts of a draft for %d", texts, d->sequences);
  const struct round r = {texts, text, ids, n, most, guesses, count};
  oscar_status status = OSCAR_OK;
  for (int i = 0; i < texts; i++) {
    count[i] = 0;
    if (status == OSCAR_OK && wants_guesses(&r, i)) status = cut_back(text[i], ids[i], n[i]);
  }
  bool guess;
  for (int jobs; status == OSCAR_OK && (jobs = plan_step(d, &r, &guess)) > 0;) {
    status = run_step(d, jobs, guess);
    for (int j = 0; guess && j < jobs && status == OSCAR_OK; j++) {
      const int i = d->whose[j];
      guesses[i][count[i]++] = d->next[j] < d->usable ? d->next[j] : 0; /* any guess is as good as one that cannot be */
    }
  }
  for (int i = 0; status != OSCAR_OK && i < texts; i++) count[i] = 0;
  return status;
}
