/*
 * chat.c - `oscar chat`: a conversation through the model's chat template.
 *
 * The whole conversation is encoded for every turn and the session is synced to it: what the cache already holds stays. Ctrl-C
 * ends an answer and keeps what was said; at the prompt it clears the line. Ctrl-D leaves.
 */
#include "cli/generate.h"
#include "cli/models.h"
#include "cli/options.h"
#include "cli/progress.h"

#include <errno.h>
#include <histedit.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>

static const struct usage usage = {
    .command = "chat",
    .operands = "",
    .about = "Talks with an instruction-tuned model through its chat template: one answer with -p or -f, else a conversation\n"
             "(/clear forgets it, /help shows the commands, Ctrl-C stops an answer, Ctrl-D leaves).",
    .examples = "oscar chat -m smollm2-135m\n"
                "oscar chat -m smollm2-135m -p \"Why is the sky blue?\"\n"
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
  int first; /* messages that /clear keeps: the system message */
  int limit; /* tokens of an answer */
  const struct progress *progress;
  struct progress_line *line;
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
  c->messages[c->count++] = (struct chat_message){role, copy};
  return OSCAR_OK;
}

static void drop_messages(struct conversation *c, int keep) {
  while (c->count > keep) free((void *)(uintptr_t)c->messages[--c->count].content);
}

/* One question and its answer. An error leaves the conversation as it was before the question. */
static oscar_status exchange(struct conversation *c, const char *question, bool json, enum stop_reason *stop) {
  oscar_context *context = c->engine->context;
  const int before = c->count;
  int32_t *ids = NULL;
  int n = 0;
  struct generation answer = {0};
  oscar_status status = add_message(c, "user", question);
  if (status == OSCAR_OK)
    status = chat_template_encode(&c->chat_template, context, model_tokenizer(c->engine->model), c->messages, c->count, true,
                                  &ids, &n);
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
    fprintf(stderr, "[the conversation is forgotten]\n");
    return true;
  }
  if (*line != '/') return false;
  if (strcmp(line, "/help") != 0) fprintf(stderr, "[there is no command %s]\n", line);
  fprintf(stderr, "[/clear forgets the conversation, /exit or Ctrl-D leaves, Ctrl-C stops an answer]\n");
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
                                      const struct sampler_options *sampling, const char *question, bool json,
                                      enum stop_reason *stop) {
  struct engine *engine = c->engine;
  oscar_status status =
      chat_template_choose(engine->context, model_file(engine->model), arguments->template_name, &c->chat_template);
  if (status == OSCAR_OK) status = session_create(engine, sampling, &c->session);
  if (status == OSCAR_OK && arguments->system) status = add_message(c, "system", arguments->system);
  c->first = c->count;
  if (status == OSCAR_OK && question)
    status = exchange(c, question, json, stop);
  else if (status == OSCAR_OK)
    converse(c);
  drop_messages(c, 0);
  free(c->messages);
  session_free(c->session);
  return status;
}

int command_chat(int argc, char **argv) {
  struct engine_options options;
  struct sampler_options sampling;
  struct text_arguments text = {.tokens = 1024};
  struct chat_arguments chat = {.template_name = "auto"};
  struct output_arguments output = {0};
  engine_options_default(&options);
  sampler_options_default(&sampling);
  const struct option_group groups[] = {
      model_group(&options), text_group(&text),         {"Chat", chat_options, (int)ARRAY_LENGTH(chat_options), &chat},
      cache_group(&options), sampling_group(&sampling), output_group(&output)};
  int first, code;
  if (!args_parse(&usage, groups, (int)ARRAY_LENGTH(groups), argc, argv, &first, &code)) return code;
  if (text.prompt && text.file) return wrong_use("chat: give the question with -p TEXT or -f FILE, not both");
  if (output.json && !text.prompt && !text.file) return wrong_use("chat: --json needs a question (-p TEXT or -f FILE)");
  char path[PATH_MAX];
  if ((code = engine_options_resolve("chat", &options, path, sizeof path)) != EXIT_DONE) return code;

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
    struct conversation c = {.engine = &engine, .limit = text.tokens, .progress = &line.progress, .line = &line};
    status = hold_conversation(&c, &chat, &sampling, question ? question : text.prompt, output.json, &stop);
    if (status != OSCAR_OK) snprintf(error, sizeof error, "%s", oscar_last_error(engine.context));
    engine_close(&engine);
  }
  progress_end(&line);
  free(question);
  if (status != OSCAR_OK) return failed_with(status, error);
  return stop == STOP_INTERRUPTED ? EXIT_INTERRUPTED : EXIT_DONE;
}
