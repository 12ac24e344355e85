/*
 * engine/service/service_private.h - the state of a service, and what its files offer each other. Private to engine/service/.
 *
 *   service.c   the thread, what other threads hand it, creation and end
 *   request.c   a request's life: submitted, admitted, finished; its events
 *   text.c      from tokens to text: whole characters, stop strings
 *   users.c     whose turn it is
 *   step.c      what a step of the model is made of, and what comes of it
 *   guess.c     guesses of what comes next (engine/speculate.h)
 *   room.c      the budget: what goes when it is exhausted, and how it comes back
 *   sessions.c  sequences with a name; session_commands.c: what other threads ask of them
 *   tiers.c     where they are: device, host memory, files
 *   writer.c    their files, written by another thread
 *   stats.c     numbers
 *
 * Threads. Everything is the service's thread's alone but for what `lock` protects (struct shared) and the `cancelled` of
 * requests. Memory that other threads allocate or free is libc's; the service's thread takes its own from the context.
 *
 * Answers. A request has one or more answers, each a sequence with the tokens it stands for: ids [n], the first n_prompt of them
 * the prompt. Invariant: the sequence holds a beginning of ids; of an answer that decodes, all but the newest.
 */
#ifndef OSCAR_SERVICE_PRIVATE_H
#define OSCAR_SERVICE_PRIVATE_H

#include "engine/service.h"
#include "engine/speculate.h"

#include <pthread.h>
#include <stdatomic.h>

#define MOST_CHOICES       16
#define MOST_RANKED_TOKENS 20

enum answer_state {
  ANSWER_WAITS,   /* for its request, or for the prompt that another answer of it computes */
  ANSWER_FEEDS,   /* tokens that are known are computed */
  ANSWER_DECODES, /* each step gives the next token */
  ANSWER_AWAY,    /* begun, preempted or not: it has no sequence */
  ANSWER_FINISHED
};

/* Text on its way out (text.c). */
struct text_buffer {
  char *bytes;
  size_t n, room;
};

/* Pages in host memory. */
struct kept_pages {
  uint8_t *bytes;
  size_t n, room;
  size_t device_bytes; /* that they took of the budget, and will take again */
  int64_t tokens;
};

struct answer {
  struct request *request;
  int choice;
  enum answer_state state;
  uint64_t age; /* admitted later: greater */
  int chunk;    /* tokens of its prompt's next piece beside running answers */
  oscar_sequence *sequence;
  bool preempted;
  struct kept_pages kept;
  int32_t *ids; /* [n] */
  int64_t n, room;
  struct sampler *sampler;
  struct grammar_state *grammar; /* NULL: anything goes */
  struct sampling drawn;         /* what a GPU is to choose by: the random number is taken once, however often a step is tried */
  bool is_drawn;
  struct text_buffer held; /* bytes that have not gone out */
  struct token_report *reports;
  int n_reports, reports_room;
  struct ranked_token *ranked; /* [reports_room][logprobs] */
  int64_t generated, guessed, accepted;
  int64_t last_token_ns;
  struct lookup *lookup;     /* or NULL */
  struct draft_text *drafts; /* or NULL */
  struct guess_rate rate;
  int32_t guesses[MOST_GUESSES]; /* [n_guesses] of the step that is made; in ids they follow the newest token */
  int n_guesses;
  int64_t certain; /* tokens of the sequence that are the answer's while guesses are looked at; else INT64_MAX */
};

struct user {
  struct user *next;
  double served; /* tokens, of which older ones count less (users.c) */
  int64_t served_ns;
  int requests; /* that know it */
  char name[];
};

struct session;

struct request {
  struct request *next;                 /* in the inbox, or among those that wait */
  struct request *live_next, **live_at; /* among all, under the lock */
  uint64_t id;
  _Atomic bool cancelled;
  int32_t *ids; /* [n] */
  int n, choices, n_stops, logprobs;
  int64_t work; /* tokens of the prompt that would have to be computed, when that was first asked; -1: it was not yet */
  int64_t max_tokens;
  struct sampler_options sampling;
  struct token_bias *bias;
  char **stops;
  const struct grammar *grammar;
  bool ignore_end, return_tokens;
  char *user_name, *session_name, *session_text;
  int64_t deadline_ns;
  request_observer *observer;
  void *observer_user;

  int64_t submitted_ns;
  struct user *user;
  struct session *session; /* whose sequence it has */
  struct answer *answers;  /* [choices], from its admission on */
  int finished;            /* answers */
  struct request_usage usage;
};

/* What a call of another thread asks for; it is on that thread's stack, which waits. */
struct command {
  struct command *next;
  oscar_status (*run)(struct service *service, struct command *command);
  const char *name, *other;
  void *out;
  oscar_status status;
  struct service_error *error;
  enum { COMMAND_RUNS, COMMAND_PUT_OFF, COMMAND_HANDED_ON } state; /* set by run: try again; somebody else answers it */
  bool done;
};

struct shared { /* under the lock */
  pthread_mutex_t lock;
  pthread_cond_t work, answered;
  bool draining, stopping, ended;
  struct request *inbox, **inbox_end;
  struct request *live;
  struct command *commands, **commands_end;
  int waiting; /* requests submitted and not admitted */
  uint64_t last_id;
  struct service_stats stats;
};

struct session_store;

struct service {
  struct engine *engine;
  oscar_context *context;
  const struct tokenizer *tokenizer;
  struct service_options options;
  int32_t *visible; /* what options.visible points to */
  char *folder;
  int vocab;
  int64_t context_tokens; /* of one sequence: the context, or as many as the budget has room for */
  oscar_cache_options cache_options;
  size_t coded_page_bytes;   /* of the budget, of a page that is not recent */
  size_t page_bytes;         /* of one that is */
  oscar_prefix *tree;        /* NULL: nothing is reused */
  struct token_table *table; /* made for the first grammar */
  uint64_t *allowed;         /* [ceil(vocab / 64)], of a grammar */
  pthread_t thread;
  bool started;
  struct shared shared;

  struct request *waiting;
  struct user *users;
  struct command *put_off;  /* until the writer of sessions is done */
  struct answer **admitted; /* [max_running]; room for as many requests' answers */
  int n_admitted;
  uint64_t last_age;
  int chunk;     /* that prompts begin with beside running answers */
  float *logits; /* [logit_rows][vocab] */
  int logit_rows;
  struct step *step;
  struct draft *draft; /* or NULL */
  size_t kept_bytes;   /* in host memory, of preempted answers */
  struct session_store *sessions;
  struct service_stats stats;
};

/* ---- service.c ---- */
/* Leaves the context's last error. */
void error_note(const struct service *s, oscar_status status, struct service_error *error);
/* Hands a command to the service's thread and waits for it. */
oscar_status service_command(struct service *s, struct command *command);
/* By the service's thread: its caller goes on, and the command is gone. */
void command_answer(struct service *s, struct command *command, oscar_status status);

/* ---- request.c ---- */
void requests_take(struct service *s, struct request *inbox); /* from other threads */
void requests_drop_ended(struct service *s);                  /* that were cancelled or are too late */
void requests_admit(struct service *s);
void requests_cancel_all(struct service *s);
void request_free(struct request *r);
/* The next token of an answer; logits NULL where a GPU chose. False: that was the last, and the answer may be gone. */
bool answer_take(struct service *s, struct answer *a, int32_t id, const float *logits);
/* Chooses it from its logits first. */
bool answer_choose(struct service *s, struct answer *a, const float *logits);
oscar_status answer_reserve(struct service *s, struct answer *a, int64_t tokens); /* so many more ids */
void answer_finish(struct service *s, struct answer *a, enum finish_reason reason, const char *stopped_by, oscar_status status);
/* Of an answer whose prompt has been computed: the other answers of its request begin. */
void answers_fork(struct service *s, struct answer *first, const float *logits);
bool answer_can_be_drawn(struct answer *a);
/* Tells the tree what an answer has computed. */
void answer_insert(struct service *s, struct answer *a);

/* ---- guess.c ---- */
oscar_status guesses_create(struct service *s);
void guesses_free(struct service *s);
oscar_status answer_guesses_begin(struct service *s, struct answer *a);
void answer_guesses_end(struct answer *a);
/* Guesses for all answers that decode, at most `most` tokens together. */
void guesses_make(struct service *s, int most);
/* The rows of a step with guesses, logits [1 + n_guesses][vocab]. */
void guesses_look_at(struct service *s, struct answer *a, const float *logits);
/* Wrong guesses leave the sequence. */
oscar_status answer_settle(struct service *s, struct answer *a);

/* ---- text.c ---- */
oscar_status text_append(oscar_context *context, struct text_buffer *text, const char *bytes, size_t n);
/* Where the first of the stop strings begins; *which is set. SIZE_MAX: none is there. */
size_t text_find_stop(const struct text_buffer *text, char *const *stops, int n_stops, int *which);
/* How many bytes can go out: not what may become a stop string or is a part of a character. */
size_t text_ready(const struct text_buffer *text, char *const *stops, int n_stops);
/* The first n bytes as whole characters, malloc'ed by the context, ended by a zero byte. */
char *text_characters(oscar_context *context, const char *bytes, size_t n, size_t *out);
void text_drop(struct text_buffer *text, size_t n);

/* ---- users.c ---- */
oscar_status user_find(struct service *s, const char *name, struct user **user);
void user_release(struct user *user);
void user_serve(struct user *user, int64_t tokens);
/* The request whose turn it is, in the list of those that wait and may begin now; NULL if none could. */
struct request **users_next(struct service *s, bool (*may_begin)(const struct service *s, struct request *r));
void users_free(struct service *s);

/* ---- step.c ---- */
oscar_status step_create(struct service *s);
void step_free(struct service *s);
/* false: there was nothing to do. */
bool step_run(struct service *s);
/* Tokens that are known and not computed, of an answer that feeds. */
int64_t answer_left(const struct answer *a);
/* Of those that feed: the one with the least left; NULL: none does. */
struct answer *answer_nearly_fed(const struct service *s);

/* ---- room.c ---- */
/* Frees something, best as much as the cache last lacked; false: nothing is left that could go without stopping an answer. */
bool room_make(struct service *s);
/* Whether it is worth trying again: there was no space, and something was freed. */
bool room_after(struct service *s, oscar_status status);
/* Whether a sequence that will take so many bytes may come without making others go. */
bool room_is_there(struct service *s, size_t bytes);
size_t room_for_tokens(const struct service *s, int64_t tokens);
/* The answer leaves the device. */
void answer_preempt(struct service *s, struct answer *a);
/* Between steps; false: fewer than `least` answers have pages. */
bool youngest_preempt(struct service *s, int least);
/* It comes back, or begins: with a sequence, as far as it is known. NO_SPACE: not now. */
oscar_status answer_return(struct service *s, struct answer *a);
oscar_status answer_begin(struct service *s, struct answer *a);
void kept_free(struct service *s, struct kept_pages *kept);

/* ---- stats.c ---- */
void stats_init(struct service_stats *stats);
void histogram_note(struct histogram *histogram, int64_t ns);
void stats_publish(struct service *s);

#endif
