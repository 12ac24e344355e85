/* run.c - `oscar run`: continues a raw text. */
#include "cli/bias.h"
#include "cli/generate.h"
#include "cli/models.h"
#include "cli/options.h"
#include "cli/progress.h"
#include "cli/sessions.h"

#include <limits.h>
#include <stdlib.h>
#include <string.h>

static const struct usage usage = {
    .command = "run",
    .operands = "",
    .about = "Continues a raw text. The prompt is not put into a chat template; control tokens spelled in it count.",
    .examples =
        "oscar run -m smollm2-135m -p \"The lighthouse keeper\" -n 64\n"
        "oscar run -m model.gguf -f prompt.txt --kv bf16 --temp 0 --json\n"
        "oscar run -m qwen2.5-coder-1.5b -f long.txt -c 32768 --kv-memory 512M\n"
        "oscar run -m qwen2.5-coder-1.5b -f code.txt --speculate lookup\n"
        "oscar run -m qwen2.5-coder-1.5b -p \"Ada Lovelace as JSON: \" --json-schema person.json --temp 0\n"
        "oscar run -m smollm2-135m -f story.txt -n 200 --session story; oscar run -m smollm2-135m --session story -n 200\n",
};

struct completion {
  struct engine *engine;
  struct session *session;
  const char *text; /* the prompt; NULL: goes on where the session ended */
  size_t bytes;
  int limit;
  bool json;
  const char *saved;             /* file of the session; NULL: none */
  const struct grammar *grammar; /* NULL: any text */
  const struct progress *progress;
};

/* The session as it was saved, and how far it goes with the prompt. */
static oscar_status take_up(const struct completion *c, const int32_t *ids, int count) {
  json_t *about;
  oscar_status status = session_file_load(c->engine, c->session, c->saved, &about);
  if (status != OSCAR_OK) return status;
  json_decref(about);
  int64_t held, same = 0;
  const int32_t *tokens = session_tokens(c->session, &held);
  while (same < held && same < count && tokens[same] == ids[same]) same++;
  if (ids && same < held)
    note("the session has %lld tokens; the first %lld are those of the prompt, and it goes on from there", (long long)held,
         (long long)same);
  return OSCAR_OK;
}

static oscar_status feed(const struct completion *c, const int32_t *ids, int count) {
  if (ids) return session_sync(c->session, ids, count, c->progress);
  int64_t held;
  const int32_t *tokens = session_tokens(c->session, &held);
  int32_t *copy = mem_alloc(c->engine->context, (size_t)held, sizeof *copy);
  if (!copy) return OSCAR_NO_MEMORY;
  memcpy(copy, tokens, (size_t)held * sizeof *copy);
  oscar_status status = session_sync(c->session, copy, (int)held, c->progress); /* the last token gives the logits */
  mem_free(c->engine->context, copy);
  return status;
}

static oscar_status complete(struct completion *c, const struct sampling_arguments *sampling, enum stop_reason *stop) {
  struct generation generation = {0};
  struct sampler_options sampler = sampling->options;
  struct token_bias *bias;
  int32_t *ids = NULL;
  int count = 0;
  oscar_status status =
      bias_read(c->engine->context, sampling->logit_bias, model_tokenizer(c->engine->model), &bias, &sampler.n_bias);
  sampler.bias = bias;
  if (status == OSCAR_OK && c->text) status = prompt_ids(c->engine, c->text, c->bytes, &ids, &count);
  if (status == OSCAR_OK) status = session_create(c->engine, &sampler, &c->session);
  if (status == OSCAR_OK && c->saved && session_exists(c->saved)) status = take_up(c, ids, count);
  const bool ready = status == OSCAR_OK;
  if (status == OSCAR_OK) status = feed(c, ids, count);
  if (status == OSCAR_OK) status = session_follow(c->session, c->grammar);
  if (status == OSCAR_OK) {
    if (!c->json && c->text) fwrite(c->text, 1, c->bytes, stdout);
    status = generate(c->engine, c->session, c->limit, c->json ? NULL : stdout, &generation);
  }
  if (status == OSCAR_OK && c->json) print_generation_json(ids, count, &generation, c->session);
  if (status == OSCAR_OK && !c->json) {
    putchar('\n');
    fflush(stdout);
    print_generation_numbers(&generation, c->session);
  }
  /* After Ctrl-C, too, in an answer or in the prompt: what was read is not read again. */
  if (ready && c->saved && (status == OSCAR_OK || (status == OSCAR_CANCELLED && session_length(c->session) > 0))) {
    const oscar_status saved = session_file_save(c->engine, c->session, NULL, c->saved);
    if (saved != OSCAR_OK) status = saved;
    if (status == OSCAR_CANCELLED) set_error(c->engine->context, status, "stopped while reading the prompt");
  }
  *stop = generation.stop;
  generation_free(&generation);
  session_free(c->session);
  mem_free(c->engine->context, ids);
  free(bias);
  return status;
}

/* What the text has to keep to; *grammar is NULL if nothing was asked for. */
static int load_form(const struct form_arguments *form, struct grammar **grammar) {
  const char *file = form->grammar ? form->grammar : form->json_schema;
  char *text, reason[512], error[1024];
  size_t bytes;
  *grammar = NULL;
  if (!file) return EXIT_DONE;
  if (form->grammar && form->json_schema) return wrong_use("run: --grammar and --json-schema: one of them");
  if (!read_text(file, &text, &bytes)) return EXIT_FAILED;
  const oscar_status status = form->grammar ? grammar_parse(text, bytes, grammar, reason, sizeof reason)
                                            : grammar_of_schema(text, bytes, grammar, reason, sizeof reason);
  free(text);
  if (status == OSCAR_OK) return EXIT_DONE;
  snprintf(error, sizeof error, "%s: %s", file, reason);
  return failed_with(status, error);
}

int command_run(int argc, char **argv) {
  struct engine_options options;
  struct sampling_arguments sampling = {0};
  struct text_arguments text = {.tokens = 256};
  struct output_arguments output = {0};
  struct session_arguments kept = {0};
  struct speculation_arguments speculation;
  struct form_arguments form = {0};
  engine_options_default(&options);
  sampler_options_default(&sampling.options);
  const struct option_group groups[] = {model_group(&options), text_group(&text),
                                        cache_group(&options), biased_sampling_group(&sampling),
                                        form_group(&form),     speculation_group(&speculation),
                                        session_group(&kept),  output_group(&output)};
  int first, code;
  if (!args_parse(&usage, groups, (int)ARRAY_LENGTH(groups), argc, argv, &first, &code)) return code;
  char path[PATH_MAX], draft_path[PATH_MAX], saved[PATH_MAX];
  if (kept.name && (code = session_path("run", kept.name, kept.folder, saved, sizeof saved)) != EXIT_DONE) return code;
  const bool goes_on = kept.name && !text.prompt && !text.file && session_exists(saved);
  if (!goes_on && (text.prompt != NULL) == (text.file != NULL))
    return wrong_use("run: give the prompt with -p TEXT or -f FILE (one of them), or the --session of one that was saved");
  if ((code = engine_options_resolve("run", &options, path, sizeof path)) != EXIT_DONE) return code;
  if ((code = speculation_resolve("run", &speculation, &options, draft_path, sizeof draft_path)) != EXIT_DONE) return code;

  char *prompt = NULL;
  size_t bytes = text.prompt ? strlen(text.prompt) : 0;
  struct grammar *grammar;
  if ((code = load_form(&form, &grammar)) != EXIT_DONE) return code;
  if (text.file && !read_text(text.file, &prompt, &bytes)) {
    grammar_free(grammar);
    return EXIT_FAILED;
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
    struct completion c = {.engine = &engine,
                           .text = text.prompt ? text.prompt : prompt,
                           .bytes = bytes,
                           .limit = text.tokens,
                           .json = output.json,
                           .saved = kept.name ? saved : NULL,
                           .grammar = grammar,
                           .progress = &line.progress};
    status = complete(&c, &sampling, &stop);
    if (status != OSCAR_OK) snprintf(error, sizeof error, "%s", oscar_last_error(engine.context));
    engine_close(&engine);
  }
  progress_end(&line);
  grammar_free(grammar);
  free(prompt);
  if (status != OSCAR_OK) return failed_with(status, error);
  return stop == STOP_INTERRUPTED ? EXIT_INTERRUPTED : EXIT_DONE;
}
