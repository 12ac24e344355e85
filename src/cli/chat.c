/*
 * chat.c - `oscar chat`: a conversation through the model's chat template.
 *
 * The whole conversation is encoded for every turn and the session is synced to it: what the cache already holds stays. Ctrl-C
 * ends an answer and keeps what was said; at the prompt it clears the line. Ctrl-D leaves.
 */
#include "cli/bias.h"
#include "cli/generate.h"
#include "cli/models.h"
#include "cli/options.h"
#include "cli/progress.h"
#include "cli/sessions.h"
#include "engine/json_text.h"

#include <errno.h>
#include <histedit.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>

static const struct usage usage = {
    .command = "chat",
    .operands = "",
    .about = "Talks with an instruction-tuned model through its chat template: one answer with -p or -f, else a conversation\n"
             "(/clear forgets it, /save and /load keep it, /help shows the commands, Ctrl-C stops an answer, Ctrl-D leaves).",
    .examples = "oscar chat -m smollm2-135m\n"
                "oscar chat -m smollm2-135m -p \"Why is the sky blue?\"\n"
                "oscar chat -m smollm2-135m --session trip\n"
                "oscar chat -m qwen2.5-coder-1.5b --system \"Answer briefly.\" --kv int2 -c 32768\n",
};

struct chat_arguments {
  const char *system, *template_name;
};

static const char *template_choice(int i) {
  static const char *const names[] = {"auto", "chatml", "llama3", "gemma", "mistral"};
  return (size_t)i < ARRAY_LENGTH(names) ? names[i] : NULL;
}

static const struct option_spec chat_options[] = {
    {"system", 0, OPTION_TEXT, offsetof(struct chat_arguments, system), "TEXT", .help = "the system message",
     .default_text = "the model's own, if it has one"},
    {"chat-template", 0, OPTION_TEXT, offsetof(struct chat_arguments, template_name), "NAME",
     .help = "auto, chatml, llama3, gemma or mistral", .choice = template_choice},
};

struct conversation {
  struct engine *engine;
  struct session *session;
  struct chat_template chat_template;
  struct chat_message *messages; /* contents malloc'ed */
  int count, room;
  int first;     /* messages that /clear keeps: the system message */
  json_t *about; /* what the session that was loaded has beside its messages; NULL: nothing */
  int limit;     /* tokens of an answer */
  const struct progress *progress;
  struct progress_line *line;
  const struct session_arguments *kept;
};

static oscar_status add_message(struct conversation *c, const char *role, const char *content) {
  if (c->count == c->room) {
    int room = c->room ? c->room * 2 : 8;
    struct chat_message *larger = realloc(c->messages, (size_t)room * sizeof *larger);
    if (!larger) return set_error(c->engine->context, OSCAR_NO_MEMORY, "out of memory for the conversation");
    c->messages = larger;
    c->room = room;
  }
  char *copy = strdup(content);
  if (!copy) return set_error(c->engine->context, OSCAR_NO_MEMORY, "out of memory for the conversation");
  c->messages[c->count++] = (struct chat_message){.role = role, .content = copy};
  return OSCAR_OK;
}

static void drop_messages(struct conversation *c, int keep) {
  while (c->count > keep) free((void *)(uintptr_t)c->messages[--c->count].content);
}

/* ---- kept conversations ---- */

/* [{"role": ..., "content": ...}, ...]; NULL when memory is out. */
static json_t *messages_json(const struct conversation *c) {
  json_t *list = json_array();
  for (int i = 0; i < c->count && list; i++) {
    json_t *content = json_text(c->messages[i].content, strlen(c->messages[i].content));
    json_t *message = content ? json_pack("{s:s, s:o}", "role", c->messages[i].role, "content", content) : NULL;
    if (message && json_array_append_new(list, message) == 0) continue;
    json_decref(list);
    list = NULL;
  }
  return list;
}

static oscar_status save_conversation(const struct conversation *c, const char *path) {
  json_t *about = c->about ? json_copy(c->about) : json_object();
  oscar_status status = json_object_set_new(about, "messages", messages_json(c)) == 0
                            ? session_file_save(c->engine, c->session, about, path)
                            : set_error(c->engine->context, OSCAR_NO_MEMORY, "out of memory for the conversation");
  json_decref(about);
  return status;
}

/* What role a message of a file has, in words that live as long as the program; NULL: none that there is. */
static const char *role_named(const char *name) {
  static const char *const roles[] = {"system", "user", "assistant"};
  for (size_t i = 0; i < ARRAY_LENGTH(roles); i++)
    if (name && strcmp(roles[i], name) == 0) return roles[i];
  return name && strcmp(name, "developer") == 0 ? roles[0] : NULL;
}

/* What a message says, malloc'ed: a text, or a list of parts that are texts, as clients of `oscar serve` may send it. NULL: it is
 * neither, or memory is out. */
static char *content_text(const json_t *content) {
  size_t i, bytes = 0;
  json_t *part;
  if (json_is_string(content)) return strdup(json_string_value(content));
  if (!json_is_array(content)) return NULL;
  json_array_foreach(content, i, part) {
    if (!json_is_string(json_object_get(part, "text"))) return NULL;
    bytes += json_string_length(json_object_get(part, "text"));
  }
  char *text = malloc(bytes + 1), *end = text;
  if (!text) return NULL;
  *end = '\0';
  json_array_foreach(content, i, part) end = stpcpy(end, json_string_value(json_object_get(part, "text")));
  return text;
}

static oscar_status take_messages(struct conversation *c, const json_t *list, const char *path) {
  size_t i;
  json_t *message;
  json_array_foreach(list, i, message) {
    const char *role = role_named(json_string_value(json_object_get(message, "role")));
    char *content = json_object_get(message, "tool_calls") ? NULL : content_text(json_object_get(message, "content"));
    oscar_status status = role && content ? add_message(c, role, content)
                                          : set_error(c->engine->context, OSCAR_FORMAT,
                                                      "%s: message %zu is none that chat can go on from: it is of a tool or has "
                                                      "no text",
                                                      path, i);
    free(content);
    if (status != OSCAR_OK) return status;
  }
  c->first = c->count > 0 && strcmp(c->messages[0].role, "system") == 0;
  return OSCAR_OK;
}

/* The conversation becomes the one that was saved, or stays what it was. */
static oscar_status load_conversation(struct conversation *c, const char *path) {
  json_t *about;
  oscar_status status = session_file_load(c->engine, c->session, path, &about);
  if (status != OSCAR_OK) return status;
  struct conversation before = *c;
  c->messages = NULL;
  c->count = c->room = 0;
  status = take_messages(c, json_object_get(about, "messages"), path);
  struct conversation *old = status == OSCAR_OK ? &before : c; /* the session is synced to what is said next in any case */
  drop_messages(old, 0);
  free(old->messages);
  json_decref(status == OSCAR_OK ? before.about : about);
  if (status == OSCAR_OK) {
    c->about = about;
    return OSCAR_OK;
  }
  c->messages = before.messages;
  c->count = before.count, c->room = before.room, c->first = before.first;
  return status;
}

/* /save and /load, with a name or with that of --session. */
static void keep_or_load(struct conversation *c, const char *line) {
  const bool saving = strncmp(line, "/save", 5) == 0;
  const char *name = line + 5 + strspn(line + 5, " ");
  char path[PATH_MAX];
  if (!*name) name = c->kept->name;
  if (!name) {
    fprintf(stderr, "[which session? %.5s NAME]\n", line);
    return;
  }
  if (session_path("chat", name, c->kept->folder, path, sizeof path) != EXIT_DONE) return;
  oscar_status status = saving ? save_conversation(c, path) : load_conversation(c, path);
  if (status != OSCAR_OK)
    failed_with(status, oscar_last_error(c->engine->context));
  else
    fprintf(stderr, "[%s: %lld tokens %s]\n", name, (long long)session_length(c->session), saving ? "saved" : "loaded");
}

/* ---- turns ---- */

/* One question and its answer. An error leaves the conversation as it was before the question. */
static oscar_status exchange(struct conversation *c, const char *question, bool json, enum stop_reason *stop) {
  oscar_context *context = c->engine->context;
  const int before = c->count;
  int32_t *ids = NULL;
  int n = 0;
  struct generation answer = {0};
  oscar_status status = add_message(c, "user", question);
  if (status == OSCAR_OK)
    status = chat_template_encode(&c->chat_template, context, model_tokenizer(c->engine->model), c->messages, c->count, NULL, 0,
                                  true, &ids, &n);
  if (status == OSCAR_OK) status = session_sync(c->session, ids, n, c->progress);
  progress_end(c->line);
  if (status == OSCAR_OK) status = generate(c->engine, c->session, c->limit, json ? NULL : stdout, &answer);
  if (status == OSCAR_OK) status = add_message(c, "assistant", answer.text);
  if (status == OSCAR_OK && json) print_generation_json(ids, n, &answer, c->session);
  if (!json && answer.count) putchar('\n');
  fflush(stdout);
  if (status == OSCAR_OK && !json) print_generation_numbers(&answer, c->session);
  if (status != OSCAR_OK) drop_messages(c, before);
  *stop = answer.stop;
  generation_free(&answer);
  mem_free(context, ids);
  return status;
}

static char *prompt_text(EditLine *editor) {
  (void)editor;
  static char text[] = "> ";
  return text;
}

/* Reads lines with editing and history from a terminal, plainly from anything else. */
struct line_reader {
  EditLine *editor;
  History *history;
  char *plain;
  size_t plain_room;
};

static void line_reader_open(struct line_reader *r) {
  *r = (struct line_reader){0};
  if (!terminal_is(stdin)) return;
  r->editor = el_init("oscar", stdin, stdout, stderr);
  r->history = history_init();
  if (!r->editor || !r->history) return;
  HistEvent event;
  history(r->history, &event, H_SETSIZE, 1000);
  el_set(r->editor, EL_PROMPT, prompt_text);
  el_set(r->editor, EL_EDITOR, "emacs");
  el_set(r->editor, EL_HIST, history, r->history);
  el_set(r->editor, EL_SIGNAL, 1);
}

static void line_reader_close(struct line_reader *r) {
  if (r->editor) el_end(r->editor);
  if (r->history) history_end(r->history);
  free(r->plain);
}

/* A line without its newline, malloc'ed; NULL at the end of input. */
static char *line_reader_next(struct line_reader *r) {
  const char *line;
  int length = 0;
  if (r->editor && r->history) {
    line = el_gets(r->editor, &length);
    if (line && length > 1) {
      HistEvent event;
      history(r->history, &event, H_ENTER, line);
    }
  } else {
    ssize_t n = getline(&r->plain, &r->plain_room, stdin);
    line = n < 0 ? NULL : r->plain;
    length = (int)n;
  }
  if (!line || length <= 0) return NULL;
  size_t bytes = (size_t)length;
  while (bytes && (line[bytes - 1] == '\n' || line[bytes - 1] == '\r')) bytes--;
  return strndup(line, bytes);
}

/* true: the line was a command of the program. */
static bool handle_command(struct conversation *c, const char *line) {
  if (strcmp(line, "/clear") == 0) {
    drop_messages(c, c->first);
    json_decref(c->about);
    c->about = NULL;
    fprintf(stderr, "[the conversation is forgotten]\n");
    return true;
  }
  if (*line != '/') return false;
  if ((strncmp(line, "/save", 5) == 0 || strncmp(line, "/load", 5) == 0) && (line[5] == '\0' || line[5] == ' ')) {
    keep_or_load(c, line);
    return true;
  }
  if (strcmp(line, "/help") != 0) fprintf(stderr, "[there is no command %s]\n", line);
  fprintf(stderr, "[/clear forgets the conversation, /save NAME keeps it, /load NAME goes on with one, /exit or Ctrl-D leaves, "
                  "Ctrl-C stops an answer]\n");
  return true;
}

static void converse(struct conversation *c) {
  struct line_reader reader;
  line_reader_open(&reader);
  for (;;) {
    char *line = line_reader_next(&reader);
    if (!line && interrupt_requested() && terminal_is(stdin)) { /* Ctrl-C at the prompt */
      interrupt_clear();
      putchar('\n');
      continue;
    }
    if (!line || strcmp(line, "/exit") == 0) {
      free(line);
      break;
    }
    if (*line && !handle_command(c, line)) {
      enum stop_reason stop;
      oscar_status status = exchange(c, line, false, &stop);
      interrupt_clear();
      /* What one question ran into does not end the conversation. */
      if (status != OSCAR_OK) failed_with(status, oscar_last_error(c->engine->context));
    }
    free(line);
  }
  line_reader_close(&reader);
}

static oscar_status hold_conversation(struct conversation *c, const struct chat_arguments *arguments,
                                      const struct sampling_arguments *sampling, const char *question, const char *saved,
                                      bool json, enum stop_reason *stop) {
  struct engine *engine = c->engine;
  struct sampler_options sampler = sampling->options;
  struct token_bias *bias;
  oscar_status status = bias_read(engine->context, sampling->logit_bias, model_tokenizer(engine->model), &bias, &sampler.n_bias);
  sampler.bias = bias;
  if (status == OSCAR_OK)
    status = chat_template_choose(engine->context, model_file(engine->model), arguments->template_name, &c->chat_template);
  if (status == OSCAR_OK) status = session_create(engine, &sampler, &c->session);
  const bool goes_on = saved && session_exists(saved);
  if (status == OSCAR_OK && goes_on && arguments->system)
    note("the session keeps the system message that it was saved with; --system is for new ones");
  if (status == OSCAR_OK && goes_on) status = load_conversation(c, saved);
  if (status == OSCAR_OK && !goes_on && arguments->system) status = add_message(c, "system", arguments->system);
  if (!goes_on) c->first = c->count;
  const bool ready = status == OSCAR_OK;
  if (status == OSCAR_OK && question)
    status = exchange(c, question, json, stop);
  else if (status == OSCAR_OK)
    converse(c);
  /* After Ctrl-C, too, in an answer or in the prompt: what was read is not read again. */
  if (ready && saved && session_length(c->session) > 0 && (status == OSCAR_OK || status == OSCAR_CANCELLED)) {
    const oscar_status kept = save_conversation(c, saved);
    if (kept != OSCAR_OK) status = kept;
    if (status == OSCAR_CANCELLED) set_error(engine->context, status, "stopped while reading the prompt");
  }
  drop_messages(c, 0);
  json_decref(c->about);
  free(c->messages);
  session_free(c->session);
  free(bias);
  return status;
}

int command_chat(int argc, char **argv) {
  struct engine_options options;
  struct sampling_arguments sampling = {0};
  struct text_arguments text = {.tokens = 1024};
  struct chat_arguments chat = {.template_name = "auto"};
  struct output_arguments output = {0};
  struct session_arguments kept = {0};
  struct speculation_arguments speculation;
  engine_options_default(&options);
  sampler_options_default(&sampling.options);
  const struct option_group groups[] = {model_group(&options),
                                        text_group(&text),
                                        {"Chat", chat_options, (int)ARRAY_LENGTH(chat_options), &chat},
                                        cache_group(&options),
                                        biased_sampling_group(&sampling),
                                        speculation_group(&speculation),
                                        session_group(&kept),
                                        output_group(&output)};
  int first, code;
  if (!args_parse(&usage, groups, (int)ARRAY_LENGTH(groups), argc, argv, &first, &code)) return code;
  if (text.prompt && text.file) return wrong_use("chat: give the question with -p TEXT or -f FILE, not both");
  if (output.json && !text.prompt && !text.file) return wrong_use("chat: --json needs a question (-p TEXT or -f FILE)");
  char path[PATH_MAX], draft_path[PATH_MAX], saved[PATH_MAX];
  if (kept.name && (code = session_path("chat", kept.name, kept.folder, saved, sizeof saved)) != EXIT_DONE) return code;
  if ((code = engine_options_resolve("chat", &options, path, sizeof path)) != EXIT_DONE) return code;
  if ((code = speculation_resolve("chat", &speculation, &options, draft_path, sizeof draft_path)) != EXIT_DONE) return code;

  char *question = NULL;
  size_t bytes = 0;
  if (text.file && !read_text(text.file, &question, &bytes)) return EXIT_FAILED;
  if (question && strlen(question) != bytes) {
    free(question);
    return failed("%s: the question holds a zero byte; it must be text", text.file);
  }
  interrupt_watch();
  struct progress_line line;
  progress_begin(&line);
  options.progress = &line.progress;
  struct engine engine;
  char error[1024];
  enum stop_reason stop = STOP_LIMIT;
  oscar_status status = engine_open(&options, &engine, error, sizeof error);
  if (status == OSCAR_OK) {
    struct conversation c = {.engine = &engine, .limit = text.tokens, .progress = &line.progress, .line = &line, .kept = &kept};
    status =
        hold_conversation(&c, &chat, &sampling, question ? question : text.prompt, kept.name ? saved : NULL, output.json, &stop);
    if (status != OSCAR_OK) snprintf(error, sizeof error, "%s", oscar_last_error(engine.context));
    engine_close(&engine);
  }
  progress_end(&line);
  free(question);
  if (status != OSCAR_OK) return failed_with(status, error);
  return stop == STOP_INTERRUPTED ? EXIT_INTERRUPTED : EXIT_DONE;
}
