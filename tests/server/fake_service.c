/* fake_service.c - see fake_service.h. A thread for each request; one lock for everything. */
#include "fake_service.h"

#include "model/tokenizer.h"

#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

/* ---- a model of nothing but words ---- */

static const char template_text[] =
    "<|im_start|> # Tools\\n\\nYou may call one or more functions <tool_call> <tool_response> </think>";

void fake_model_write(const char *stored, const char *path) {
  static const char key[] = "tokenizer.chat_template";
  char head[24];
  FILE *from = fopen(stored, "rb"), *to = fopen(path, "wb");
  if (!from || !to || fread(head, 1, sizeof head, from) != sizeof head) abort();
  uint64_t keys, n = sizeof key - 1;
  uint32_t type = 8; /* a string */
  memcpy(&keys, head + 16, sizeof keys);
  keys++;
  memcpy(head + 16, &keys, sizeof keys);
  fwrite(head, 1, sizeof head, to);
  fwrite(&n, sizeof n, 1, to);
  fwrite(key, 1, n, to);
  fwrite(&type, sizeof type, 1, to);
  n = sizeof template_text - 1;
  fwrite(&n, sizeof n, 1, to);
  fwrite(template_text, 1, n, to);
  for (int c; (c = fgetc(from)) != EOF;) fputc(c, to);
  fclose(from);
  if (fclose(to) != 0) abort();
}

/* ---- grammars ---- */

#ifdef FAKE_GRAMMARS
struct grammar {
  char text[4096];
};

static oscar_status make(const char *before, const char *text, size_t bytes, const char *after, struct grammar **grammar) {
  *grammar = calloc(1, sizeof **grammar);
  if (!*grammar) return OSCAR_NO_MEMORY;
  snprintf((*grammar)->text, sizeof(*grammar)->text, "%s%.*s%s", before, (int)bytes, text, after);
  return OSCAR_OK;
}

oscar_status grammar_parse(const char *text, size_t bytes, struct grammar **grammar, char *error, size_t error_bytes) {
  if (strncmp(text, "root ::=", 8) == 0) return make("", "yes", 3, "", grammar);
  snprintf(error, error_bytes, "line 1, column 1: no rule 'root' (%zu bytes)", bytes);
  return OSCAR_FORMAT;
}
oscar_status grammar_of_schema(const char *schema, size_t bytes, struct grammar **grammar, char *error, size_t error_bytes) {
  if (!strstr(schema, "\"unsupported\"")) return make("{\"schema\":", schema, bytes, "}", grammar);
  snprintf(error, error_bytes, "the keyword 'unsupported' is not supported");
  return OSCAR_UNSUPPORTED;
}
oscar_status grammar_of_forms(const struct grammar_form *forms, int n_forms, struct grammar **grammar, char *error,
                              size_t error_bytes) {
  (void)error, (void)error_bytes;
  if (n_forms < 1) return OSCAR_INVALID_ARGUMENT;
  oscar_status status = make("", "", 0, "", grammar);
  for (int i = 0; i < forms[0].n_parts && status == OSCAR_OK; i++)
    strncat((*grammar)->text, forms[0].parts[i].literal ? forms[0].parts[i].literal : "{}",
            sizeof(*grammar)->text - strlen((*grammar)->text) - 1);
  return status;
}
oscar_status grammar_of_json(struct grammar **grammar) { return make("{\"json\":true}", "", 0, "", grammar); }
void grammar_free(struct grammar *grammar) { free(grammar); }
static const char *grammar_sentence(const struct grammar *grammar) { return grammar->text; }
#else
static const char *grammar_sentence(const struct grammar *grammar) { return grammar ? "{\"json\":true}" : ""; }
#endif

/* ---- the service ---- */

enum { MOST_SESSIONS = 64, BUDGET_BYTES = 1 << 20, UNIT_BYTES = 2176 };
struct kept {
  struct session_entry entry;
  int32_t *ids;
  int n;
};
struct job {
  struct service *service;
  struct job *next;
  struct request_options options;
  uint64_t id;
  char *script, *answer, *stop, *session;
  bool cancelled;
};
struct service {
  pthread_mutex_t lock;
  pthread_cond_t changed;
  oscar_context *context;
  struct tokenizer *tokenizer;
  struct job *jobs;
  uint64_t ids;
  int running, most;
  bool stopping;
  struct kept sessions[MOST_SESSIONS];
  int n_sessions;
  struct service_stats stats;
};

struct service *fake_service_create(const char *model_path) {
  struct service *s = calloc(1, sizeof *s);
  struct gguf *file;
  if (!s || oscar_context_create(NULL, &s->context) != OSCAR_OK || gguf_open(s->context, model_path, &file) != OSCAR_OK ||
      tokenizer_create(s->context, file, &s->tokenizer) != OSCAR_OK)
    abort();
  gguf_close(file);
  pthread_mutex_init(&s->lock, NULL);
  pthread_cond_init(&s->changed, NULL);
  s->most = 1000;
  struct histogram *all[] = {&s->stats.queue, &s->stats.first_token, &s->stats.between_tokens, &s->stats.step};
  for (size_t h = 0; h < ARRAY_LENGTH(all); h++)
    for (int i = 0; i < SERVICE_BUCKETS; i++) all[h]->upper[i] = i + 1 < SERVICE_BUCKETS ? 0.001 * (1 << i) : (double)INFINITY;
  s->stats.cache.budget_bytes = BUDGET_BYTES;
  s->stats.cache.coded_bits_per_element = 2.125;
  return s;
}

void fake_service_limit(struct service *s, int most) {
  pthread_mutex_lock(&s->lock);
  s->most = most;
  pthread_mutex_unlock(&s->lock);
}

int fake_service_running(struct service *s) {
  pthread_mutex_lock(&s->lock);
  const int running = s->running;
  pthread_mutex_unlock(&s->lock);
  return running;
}

int64_t fake_service_cancelled(struct service *s) {
  pthread_mutex_lock(&s->lock);
  const int64_t cancelled = s->stats.finished[FINISH_CANCELLED];
  pthread_mutex_unlock(&s->lock);
  return cancelled;
}

void service_drain(struct service *s) {
  pthread_mutex_lock(&s->lock);
  s->stopping = true;
  for (struct job *j = s->jobs; j; j = j->next) j->cancelled = true;
  pthread_cond_broadcast(&s->changed);
  while (s->running) pthread_cond_wait(&s->changed, &s->lock);
  pthread_mutex_unlock(&s->lock);
}

void service_stop(struct service *s) { service_drain(s); }

void service_free(struct service *s) {
  if (!s) return;
  service_stop(s);
  for (int i = 0; i < s->n_sessions; i++) {
    free(s->sessions[i].entry.text);
    free(s->sessions[i].ids);
  }
  tokenizer_free(s->tokenizer);
  oscar_context_free(s->context);
  pthread_mutex_destroy(&s->lock);
  pthread_cond_destroy(&s->changed);
  free(s);
}

void service_options_default(struct service_options *options) {
  *options = (struct service_options){.max_running = 64, .max_waiting = 256};
}
void request_options_default(struct request_options *options) {
  *options = (struct request_options){.choices = 1, .logprobs = -1};
  sampler_options_default(&options->sampling);
}
const char *finish_reason_name(enum finish_reason reason) {
  static const char *const names[] = {"stop", "sequence", "length", "cancelled", "error"};
  return names[reason];
}

static oscar_status fail(struct service_error *error, oscar_status status, const char *text) {
  error->status = status;
  snprintf(error->text, sizeof error->text, "%s", text);
  return status;
}

/* What the user said last; of a raw text all of it. */
static char *last_words(struct service *s, const int32_t *ids, int n) {
  size_t room = 1, used = 0, bytes;
  for (int i = 0; i < n; i++) {
    tokenizer_piece(s->tokenizer, ids[i], true, &bytes);
    room += bytes;
  }
  char *text = malloc(room);
  if (!text) abort();
  for (int i = 0; i < n; i++) {
    const char *piece = tokenizer_piece(s->tokenizer, ids[i], true, &bytes);
    memcpy(text + used, piece, bytes);
    used += bytes;
  }
  text[used] = '\0';
  static const char user[] = "<|im_start|>user\n";
  char *last = NULL;
  for (char *at = text; (at = strstr(at, user)); at++) last = at + sizeof user - 1;
  if (!last) return text;
  memmove(text, last, strlen(last) + 1);
  char *end = strstr(text, "<|im_end|>");
  if (end) *end = '\0';
  return text;
}

static char *answer_to(const struct job *j) {
  char name[64], *answer = NULL;
  int n = 0, used = 0;
  const char *script = j->script;
  if (j->options.grammar) {
    answer = strdup(grammar_sentence(j->options.grammar));
  } else if (sscanf(script, "!long %d", &n) == 1 || sscanf(script, "!slow %d", &n) == 1) {
    answer = calloc((size_t)n + 1, 5);
    for (int i = 0; i < n && answer; i++) memcpy(answer + 5 * (size_t)i, "word ", 5);
  } else if (sscanf(script, "!call %63s %n", name, &used) == 1) {
    if (asprintf(&answer, "I look.\n<tool_call>\n{\"name\": \"%s\", \"arguments\": %s}\n</tool_call>", name, script + used) < 0)
      abort();
  } else if (strncmp(script, "!think ", 7) == 0 && strchr(script, '|')) {
    if (asprintf(&answer, "<think>\n%.*s\n</think>\n\n%s", (int)strcspn(script + 7, "|"), script + 7, strchr(script, '|') + 1) <
        0)
      abort();
  } else if (strcmp(script, "!broken") == 0) {
    answer = strdup("a\xEF\xBF\xBD");
  } else {
    answer = strdup(script);
  }
  if (!answer) abort();
  return answer;
}

/* ---- one request ---- */

static void send(struct job *j, const struct request_event *event) { j->options.observer(j->options.observer_user, event); }

static bool is_cancelled(struct job *j, int wait_ms) {
  struct timespec until;
  clock_gettime(CLOCK_REALTIME, &until);
  until.tv_nsec += (long)(wait_ms % 1000) * 1000000;
  until.tv_sec += wait_ms / 1000 + until.tv_nsec / 1000000000;
  until.tv_nsec %= 1000000000;
  pthread_mutex_lock(&j->service->lock);
  while (wait_ms && !j->cancelled && pthread_cond_timedwait(&j->service->changed, &j->service->lock, &until) == 0) continue;
  const bool cancelled = j->cancelled || (j->options.deadline_ns && time_ns() >= j->options.deadline_ns);
  pthread_mutex_unlock(&j->service->lock);
  return cancelled;
}

/* Whole characters, at most five bytes a token. */
static size_t token_bytes(const char *at) {
  size_t n = strlen(at) < 5 ? strlen(at) : 5;
  while (n > 1 && ((unsigned char)at[n] & 0xC0) == 0x80) n--;
  return n;
}

static enum finish_reason say_choice(struct job *j, int choice, const char *answer, int64_t *generated) {
  int count, ms = 0;
  if (sscanf(j->script, "!slow %d %d", &count, &ms) != 2) ms = 0;
  const char *end = j->stop ? strstr(answer, j->stop) : NULL;
  int64_t n = 0;
  for (const char *at = answer; *at && at != end; n++) {
    if (j->options.max_tokens && n >= j->options.max_tokens) return FINISH_LENGTH;
    if (is_cancelled(j, ms)) return FINISH_CANCELLED;
    size_t bytes = token_bytes(at);
    if (end && at + bytes > end) bytes = (size_t)(end - at);
    struct ranked_token ranked[2] = {{0, -0.5f}, {1, -1.5f}};
    struct token_report report = {.id = 0, .text = at, .bytes = bytes, .logprob = -0.5f, .ranked = ranked};
    if (strcmp(j->script, "!broken") == 0) report.text = "\xF0\x9F", report.bytes = 2;
    report.n_ranked = j->options.logprobs > 2 ? 2 : j->options.logprobs;
    const bool tokens = j->options.logprobs >= 0;
    if (!tokens) report.n_ranked = 0;
    send(j, &(struct request_event){.kind = EVENT_TEXT,
                                    .choice = choice,
                                    .text = at,
                                    .bytes = bytes,
                                    .tokens = tokens ? &report : NULL,
                                    .n_tokens = tokens});
    at += bytes;
    (*generated)++;
  }
  return end ? FINISH_SEQUENCE : FINISH_STOP;
}

static void keep(struct job *j, int64_t generated);

static void *run(void *argument) {
  struct job *j = argument;
  struct service *s = j->service;
  struct request_usage usage = {.prompt_tokens = j->options.n, .reused_exact = j->options.n > 64 ? 64 : 0};
  usage.computed = usage.prompt_tokens - usage.reused_exact;
  enum finish_reason reason = FINISH_STOP;
  for (int c = 0; c < j->options.choices; c++) {
    struct request_event end = {.kind = EVENT_FINISHED, .choice = c, .usage = &usage};
    if (strcmp(j->script, "!error") == 0) {
      reason = FINISH_ERROR;
      end.status = OSCAR_NUMERIC;
      end.error = "no logit is finite";
    } else if (strcmp(j->script, "!wait") == 0) {
      while (!is_cancelled(j, 1000)) continue;
      reason = FINISH_CANCELLED;
    } else {
      reason = say_choice(j, c, j->answer, &usage.generated);
    }
    end.reason = reason;
    if (reason == FINISH_SEQUENCE) end.stopped_by = j->stop;
    send(j, &end);
  }
  keep(j, usage.generated);
  send(j, &(struct request_event){.kind = EVENT_DONE, .usage = &usage});
  pthread_mutex_lock(&s->lock);
  s->stats.finished[reason]++;
  s->stats.generated += usage.generated;
  s->stats.prompt_tokens += usage.prompt_tokens;
  s->stats.reused_exact += usage.reused_exact;
  s->stats.computed += usage.computed;
  s->stats.first_token.count[2]++;
  s->stats.first_token.count[5]++;
  s->stats.first_token.sum += 0.04;
  for (struct job **at = &s->jobs; *at; at = &(*at)->next)
    if (*at == j) {
      *at = j->next;
      break;
    }
  s->running--;
  pthread_cond_broadcast(&s->changed);
  pthread_mutex_unlock(&s->lock);
  free(j->script);
  free(j->answer);
  free(j->stop);
  free(j->session);
  free(j);
  return NULL;
}

static struct kept *find(struct service *s, const char *name) {
  for (int i = 0; i < s->n_sessions; i++)
    if (strcmp(s->sessions[i].entry.name, name) == 0) return &s->sessions[i];
  return NULL;
}

static void keep(struct job *j, int64_t generated) {
  if (!j->session) return;
  pthread_mutex_lock(&j->service->lock);
  struct kept *k = find(j->service, j->session);
  if (k) {
    k->entry.tier = TIER_DEVICE;
    k->entry.tokens = j->options.n + generated;
    k->entry.exact_pages = 1;
    k->entry.coded_pages = k->entry.tokens / 64;
    k->entry.device_bytes = (size_t)(8 * k->entry.exact_pages + k->entry.coded_pages) * UNIT_BYTES;
  }
  pthread_mutex_unlock(&j->service->lock);
}

/* Under the lock. */
static void open_session(struct service *s, const struct request_options *o) {
  struct kept *k = find(s, o->session);
  if (!k) {
    if (s->n_sessions == MOST_SESSIONS) abort();
    k = &s->sessions[s->n_sessions++];
    *k = (struct kept){.entry = {.created_at = time(NULL)}};
    snprintf(k->entry.name, sizeof k->entry.name, "%s", o->session);
  }
  k->entry.tier = TIER_RUNNING;
  k->entry.used_at = time(NULL);
  if (!o->session_text) return;
  free(k->entry.text);
  k->entry.text = strdup(o->session_text);
}

oscar_status service_submit(struct service *s, const struct request_options *options, uint64_t *id, struct service_error *error) {
  if (options->n < 1) return fail(error, OSCAR_INVALID_ARGUMENT, "a prompt has at least one token");
  struct job *j = calloc(1, sizeof *j);
  if (!j) abort();
  j->service = s;
  j->options = *options;
  j->script = last_words(s, options->ids, options->n);
  oscar_status status = OSCAR_OK;
  if (strcmp(j->script, "!full") == 0) status = fail(error, OSCAR_NO_SPACE, "256 requests wait already");
  if (strcmp(j->script, "!stopping") == 0) status = fail(error, OSCAR_CANCELLED, "the service is stopping");
  if (strcmp(j->script, "!impossible") == 0)
    status = fail(error, OSCAR_INVALID_ARGUMENT, "the prompt has 9 tokens; the context has room for 8");
  pthread_mutex_lock(&s->lock);
  if (status == OSCAR_OK && s->running >= s->most) status = fail(error, OSCAR_NO_SPACE, "too many wait");
  if (status == OSCAR_OK && s->stopping) status = fail(error, OSCAR_CANCELLED, "the service is stopping");
  if (status == OSCAR_OK) {
    j->answer = answer_to(j);
    if (options->n_stops) j->stop = strdup(options->stops[0]);
    if (options->session) {
      j->session = strdup(options->session);
      open_session(s, options);
    }
    *id = j->id = ++s->ids;
    s->running++;
    s->stats.requests++;
    j->next = s->jobs;
    s->jobs = j;
  } else {
    s->stats.refused++;
  }
  pthread_mutex_unlock(&s->lock);
  if (status != OSCAR_OK) {
    free(j->script);
    free(j);
    return status;
  }
  pthread_attr_t detached;
  pthread_t thread;
  pthread_attr_init(&detached);
  pthread_attr_setdetachstate(&detached, PTHREAD_CREATE_DETACHED);
  if (pthread_create(&thread, &detached, run, j) != 0) abort();
  pthread_attr_destroy(&detached);
  return OSCAR_OK;
}

void service_cancel(struct service *s, uint64_t id) {
  pthread_mutex_lock(&s->lock);
  for (struct job *j = s->jobs; j; j = j->next)
    if (j->id == id) j->cancelled = true;
  pthread_cond_broadcast(&s->changed);
  pthread_mutex_unlock(&s->lock);
}

/* ---- sessions ---- */

static void copy_entry(const struct kept *from, struct session_entry *to) {
  *to = from->entry;
  to->text = from->entry.text ? strdup(from->entry.text) : NULL;
}

oscar_status service_sessions(struct service *s, struct session_entry **entries, int *count, struct service_error *error) {
  (void)error;
  pthread_mutex_lock(&s->lock);
  *count = s->n_sessions;
  *entries = calloc((size_t)s->n_sessions + 1, sizeof **entries);
  for (int i = 0; i < s->n_sessions; i++) copy_entry(&s->sessions[s->n_sessions - 1 - i], &(*entries)[i]);
  pthread_mutex_unlock(&s->lock);
  return OSCAR_OK;
}

void service_sessions_free(struct session_entry *entries, int count) {
  for (int i = 0; i < count; i++) free(entries[i].text);
  free(entries);
}

/* Does something with a session, under the lock. */
#define WITH_SESSION(s, name, error, action)                                                                                     \
  do {                                                                                                                           \
    pthread_mutex_lock(&(s)->lock);                                                                                              \
    struct kept *k = find(s, name);                                                                                              \
    oscar_status status = k ? OSCAR_OK : fail(error, OSCAR_INVALID_ARGUMENT, "there is no such session");                        \
    if (k) action;                                                                                                               \
    pthread_mutex_unlock(&(s)->lock);                                                                                            \
    return status;                                                                                                               \
  } while (0)

oscar_status service_session_find(struct service *s, const char *name, struct session_entry *entry, struct service_error *error) {
  WITH_SESSION(s, name, error, copy_entry(k, entry));
}

oscar_status service_session_save(struct service *s, const char *name, struct service_error *error) {
  WITH_SESSION(s, name, error, (k->entry.on_disk = true, k->entry.disk_bytes = 4096));
}

oscar_status service_session_load(struct service *s, const char *name, struct service_error *error) {
  WITH_SESSION(s, name, error, k->entry.tier = TIER_DEVICE);
}

static void copy_session(struct service *s, const struct kept *from, const char *copy) {
  struct kept *k = &s->sessions[s->n_sessions++];
  *k = (struct kept){0};
  copy_entry(from, &k->entry);
  snprintf(k->entry.name, sizeof k->entry.name, "%s", copy);
}

oscar_status service_session_fork(struct service *s, const char *name, const char *copy, struct service_error *error) {
  WITH_SESSION(s, name, error, copy_session(s, k, copy));
}

oscar_status service_session_rename(struct service *s, const char *name, const char *to, struct service_error *error) {
  WITH_SESSION(s, name, error, snprintf(k->entry.name, sizeof k->entry.name, "%s", to));
}

static void annotate(struct kept *k, const char *text) {
  free(k->entry.text);
  k->entry.text = strdup(text);
}

oscar_status service_session_annotate(struct service *s, const char *name, const char *text, struct service_error *error) {
  WITH_SESSION(s, name, error, annotate(k, text));
}

static void drop(struct service *s, struct kept *k) {
  free(k->entry.text);
  free(k->ids);
  *k = s->sessions[--s->n_sessions];
}

oscar_status service_session_delete(struct service *s, const char *name, struct service_error *error) {
  WITH_SESSION(s, name, error, drop(s, k));
}

void service_stats_get(struct service *s, struct service_stats *stats) {
  pthread_mutex_lock(&s->lock);
  *stats = s->stats;
  stats->running = s->running;
  stats->sessions_device = s->n_sessions;
  for (int i = 0; i < s->n_sessions; i++) {
    stats->cache.exact_pages += s->sessions[i].entry.exact_pages;
    stats->cache.coded_pages += s->sessions[i].entry.coded_pages;
    stats->cache.held_bytes += s->sessions[i].entry.device_bytes;
  }
  stats->cache.free_units = (int64_t)(BUDGET_BYTES - stats->cache.held_bytes) / UNIT_BYTES;
  pthread_mutex_unlock(&s->lock);
}
