/*
 * engine/service.h - many requests at once on one engine: continuous batching over one cache with one budget. Private.
 *
 * One thread, the service's own, runs the model; every other may submit, cancel and ask at any time. A step of the model takes
 * one token (or a few candidates, when it speculates) of every sequence that generates, and one chunk of one prompt: nobody's
 * answer waits longer than a chunk for somebody's prompt. Users take turns: of those who wait, the one who has had the fewest
 * tokens so far is next; and a short prompt does not wait for a long one, whoever's they are.
 *
 * What has been processed is not processed again: prompts and answers go into the prefix tree (oscar/prefix.h), finished
 * sequences are parked there, and a prompt begins where the tree's knowledge of it ends. A session (below) keeps its sequence by
 * name; it moves from the device to host memory and from there to a file as room is needed, and comes back bit for bit.
 *
 * When the budget is exhausted: leaves of the tree go first, then sessions that nobody uses move to host memory, then the
 * youngest sequence is preempted: its pages go to host memory and it waits to return, or, where there is no room for them, its
 * tokens are computed again. Nothing that was accepted is aborted for want of memory; a request that could not fit alone is
 * refused when it is submitted.
 *
 * Greedy answers. On the CPU a request's tokens depend, bit for bit, on its prompt and options alone and not on what else runs,
 * provided that what it reuses was computed as it would compute it: prefix reuse "exact" or "off", and what was generated is
 * reused as generated text. docs/serving.md says what holds on a GPU.
 */
#ifndef OSCAR_SERVICE_H
#define OSCAR_SERVICE_H

#include "engine/engine.h"
#include "engine/grammar.h"
#include "engine/session_files.h"
#include <oscar/prefix.h>

enum speculation { SPECULATION_OFF, SPECULATION_LOOKUP, SPECULATION_DRAFT };

struct service_options {
  int max_running;    /* sequences in a step; default 64 */
  int max_waiting;    /* requests that wait, sessions' too; default 256. More are refused (OSCAR_NO_SPACE) */
  int chunk;          /* prompt tokens of a step beside running answers; 0: what suits the device */
  size_t host_bytes;  /* for preempted sequences and sessions; default 1 GiB */
  size_t disk_bytes;  /* for sessions in files; 0: no limit */
  const char *folder; /* of sessions' files; NULL: sessions live as long as the service */
  oscar_prefix_reuse reuse;
  const int32_t *visible; /* [n_visible] control tokens whose spelling is part of texts: those that mark calls of tools; copied */
  int n_visible;
  enum speculation speculation;
  int candidates;          /* most tokens that are guessed at a time, 1 .. 15; default 4 */
  const char *draft_model; /* GGUF of the same vocabulary, with SPECULATION_DRAFT */
};
void service_options_default(struct service_options *options);

/* ---- requests ---- */

/* Of one token of the answer. */
struct token_report {
  int32_t id;
  const char *text; /* its bytes, possibly a fragment of a character */
  size_t bytes;
  float logprob;               /* natural, of the model's own distribution before any option of sampling; 0 if not asked for */
  struct ranked_token *ranked; /* [n_ranked], the most likely first */
  int n_ranked;
};

enum finish_reason {
  FINISH_STOP,      /* the model ended, or its grammar was complete */
  FINISH_SEQUENCE,  /* a stop string; it is not part of the text */
  FINISH_LENGTH,    /* max_tokens, or the context is full */
  FINISH_CANCELLED, /* service_cancel, its deadline, or the service stopped */
  FINISH_ERROR
};
const char *finish_reason_name(enum finish_reason reason); /* "stop", "sequence", "length", "cancelled", "error" */

struct request_usage {
  int64_t prompt_tokens;
  int64_t reused_exact, refilled, computed;    /* of the prompt's */
  int64_t generated;                           /* of all choices */
  int64_t guessed, accepted;                   /* candidates of speculation */
  int64_t preempted;                           /* times */
  int64_t queued_ns, first_token_ns, total_ns; /* since it was submitted */
};

enum request_event_kind {
  EVENT_TEXT,     /* more of the answer */
  EVENT_FINISHED, /* of this choice nothing follows */
  EVENT_DONE      /* of this request nothing follows */
};
struct request_event {
  enum request_event_kind kind;
  int choice;       /* TEXT, FINISHED */
  const char *text; /* TEXT: whole UTF-8 characters (a broken one as U+FFFD), without what may become a stop string */
  size_t bytes;     /* of it; may be 0 where only tokens are new */
  const struct token_report *tokens; /* TEXT: the tokens since the last event, where logprobs or return_tokens ask for them */
  int n_tokens;
  enum finish_reason reason;         /* FINISHED */
  const char *stopped_by;            /* FINISHED by FINISH_SEQUENCE: which */
  oscar_status status;               /* FINISHED by FINISH_ERROR */
  const char *error;                 /* its sentence */
  const struct request_usage *usage; /* DONE; FINISHED, of the choice */
};
/* Called by the service's thread, which waits for it: it copies what it wants and returns. It must not call the service. */
typedef void request_observer(void *user, const struct request_event *event);

struct request_options {
  const int32_t *ids; /* [n] prompt, copied; n >= 1 */
  int n;
  int choices;                     /* answers to the same prompt, 1 .. 16: the prompt is computed once, sequences are forked */
  int max_tokens;                  /* 0: as many as the context has room for */
  struct sampler_options sampling; /* choice i takes seed + i */
  const char *const *stops;        /* [n_stops] */
  int n_stops;
  const struct grammar *grammar; /* NULL: anything; borrowed until EVENT_DONE */
  bool ignore_end;               /* a token that ends a turn does not (benchmarks) */
  int logprobs;                  /* -1: none; else each token's, and so many of the most likely at its place, at most 20 */
  bool return_tokens;
  const char *user;         /* whose turn this takes; NULL: everybody who is not told apart */
  const char *session;      /* NULL: none; else the session that keeps the prompt and the answer, made if there is none */
  const char *session_text; /* what to keep beside the pages, from now on; NULL: as it was. Replaced after the answer by
                             * service_session_annotate */
  int64_t deadline_ns;      /* of time_ns; 0: none */
  request_observer *observer;
  void *observer_user;
};
void request_options_default(struct request_options *options);

/* ---- the service ---- */

struct service;
/* The engine is the service's alone from here on and is closed by the caller after service_free. Sessions of the folder are
 * found. Errors: INVALID_ARGUMENT, NO_SPACE, NO_MEMORY, IO, and those of opening a draft model. */
oscar_status service_create(struct engine *engine, const struct service_options *options, struct service **service);
/* Requests that run or wait have finished as CANCELLED when it returns, and new ones are refused; what is asked of sessions is
 * still done. */
void service_drain(struct service *service);
/* Stops: the same; then sessions are saved to the folder. */
void service_stop(struct service *service);
void service_free(struct service *service); /* stops, too */

/* What calls of other threads leave instead of oscar_last_error. */
struct service_error {
  oscar_status status;
  char text[512];
};

/* *id is not 0. After OSCAR_OK the observer gets EVENT_DONE, once, whatever happens; after an error it is never called.
 * Errors: INVALID_ARGUMENT (tokens, options; a prompt that does not fit the context or could never fit the budget), NO_SPACE (too
 * many wait), CANCELLED (the service stops), NO_MEMORY. */
oscar_status service_submit(struct service *service, const struct request_options *options, uint64_t *id,
                            struct service_error *error);
/* Its end is still told by events, soon. Unknown or finished ids are ignored. */
void service_cancel(struct service *service, uint64_t id);

/* ---- sessions ---- */

enum session_tier { TIER_DEVICE, TIER_HOST, TIER_DISK, TIER_RUNNING };
struct session_entry {
  char name[SESSION_NAME_ROOM];
  enum session_tier tier;
  bool on_disk; /* its file is as new as the session is */
  int64_t tokens, exact_pages, coded_pages;
  size_t device_bytes, host_bytes, disk_bytes;
  int64_t created_at, used_at; /* seconds since 1970 */
  char *text;                  /* session_text; malloc'ed */
};
/* Newest first; freed with service_sessions_free. */
oscar_status service_sessions(struct service *service, struct session_entry **entries, int *count, struct service_error *error);
void service_sessions_free(struct session_entry *entries, int count);
/* One by name; INVALID_ARGUMENT if there is none. entry->text is the caller's to free(). */
oscar_status service_session_find(struct service *service, const char *name, struct session_entry *entry,
                                  struct service_error *error);
/* The tokens that it holds, malloc'ed. */
oscar_status service_session_tokens(struct service *service, const char *name, int32_t **ids, int *n,
                                    struct service_error *error);
/* Into its file now; on return the file is there. UNSUPPORTED without a folder. */
oscar_status service_session_save(struct service *service, const char *name, struct service_error *error);
/* Its pages back onto the device now. */
oscar_status service_session_load(struct service *service, const char *name, struct service_error *error);
oscar_status service_session_fork(struct service *service, const char *name, const char *copy, struct service_error *error);
oscar_status service_session_rename(struct service *service, const char *name, const char *to, struct service_error *error);
oscar_status service_session_annotate(struct service *service, const char *name, const char *text, struct service_error *error);
/* All tiers. A running request of it goes on without it. */
oscar_status service_session_delete(struct service *service, const char *name, struct service_error *error);

/* ---- numbers ---- */

#define SERVICE_BUCKETS 16
struct histogram {
  double upper[SERVICE_BUCKETS];  /* seconds; the last is infinite */
  int64_t count[SERVICE_BUCKETS]; /* of each bucket alone */
  double sum;
};
struct service_stats {
  /* now */
  int running, waiting, prefilling;
  oscar_cache_usage cache;
  oscar_prefix_stats prefix;
  int sessions_device, sessions_host, sessions_disk;
  size_t host_bytes, disk_bytes; /* held by tiers */
  /* since the start */
  int64_t requests, finished[FINISH_ERROR + 1], refused;
  int64_t prompt_tokens, reused_exact, refilled, computed, generated, guessed, accepted;
  int64_t steps, demoted_pages;
  int64_t evicted_leaves, evicted_parked, moved_to_host, moved_to_disk, brought_back, dropped; /* sessions, but for leaves */
  int64_t preempted_kept, preempted_recomputed, returned;
  double attention_bytes, attention_s; /* read by attention, and the time of the steps' attention (of whole steps on a GPU) */
  struct histogram queue, first_token, between_tokens, step;
};
void service_stats_get(struct service *service, struct service_stats *stats);

#endif
