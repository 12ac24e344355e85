/* run.c - `oscar run`: continues a raw text. */
#include "cli/generate.h"
#include "cli/models.h"
#include "cli/options.h"
#include "cli/progress.h"

#include <limits.h>
#include <stdlib.h>
#include <string.h>

static const struct usage usage = {
    .command = "run",
    .operands = "",
    .about = "Continues a raw text. The prompt is not put into a chat template; control tokens spelled in it count.",
    .examples = "oscar run -m smollm2-135m -p \"The lighthouse keeper\" -n 64\n"
                "oscar run -m model.gguf -f prompt.txt --kv bf16 --temp 0 --json\n"
                "oscar run -m qwen2.5-coder-1.5b -f long.txt -c 32768 --kv-memory 512M\n",
};

/* BOS where the model wants it, then the prompt. */
static oscar_status prompt_ids(struct engine *engine, const char *text, size_t bytes, int32_t **ids, int *count) {
  const struct tokenizer *tokenizer = model_tokenizer(engine->model);
  int32_t *body = NULL;
  oscar_status status = tokenizer_encode(tokenizer, text, bytes, true, &body, count);
  if (status != OSCAR_OK) return status;
  const int32_t bos = tokenizer_bos(tokenizer);
  const int first = tokenizer_adds_bos(tokenizer) && bos >= 0 && !(*count > 0 && body[0] == bos);
  *ids = mem_alloc(engine->context, (size_t)(*count + first), sizeof **ids);
  if (*ids) {
    if (first) (*ids)[0] = bos;
    memcpy(*ids + first, body, (size_t)*count * sizeof **ids);
    *count += first;
  }
  mem_free(engine->context, body);
  return *ids ? OSCAR_OK : OSCAR_NO_MEMORY;
}

static oscar_status complete(struct engine *engine, const struct sampler_options *sampling, const char *text, size_t bytes,
                             int limit, bool json, const struct progress *progress, enum stop_reason *stop) {
  struct session *session = NULL;
  struct generation generation = {0};
  int32_t *ids = NULL;
  int count = 0;
  oscar_status status = prompt_ids(engine, text, bytes, &ids, &count);
  if (status == OSCAR_OK && count == 0)
    status = set_error(engine->context, OSCAR_INVALID_ARGUMENT, "the prompt is empty and this model has no token to begin with");
  if (status == OSCAR_OK) status = session_create(engine, sampling, &session);
  if (status == OSCAR_OK) status = session_feed(session, ids, count, progress);
  if (status == OSCAR_OK) {
    if (!json) fwrite(text, 1, bytes, stdout);
    status = generate(engine, session, limit, json ? NULL : stdout, &generation);
  }
  if (status == OSCAR_OK && json) print_generation_json(ids, count, &generation, session);
  if (status == OSCAR_OK && !json) {
    putchar('\n');
    fflush(stdout);
    print_generation_numbers(&generation, session);
  }
  *stop = generation.stop;
  generation_free(&generation);
  session_free(session);
  mem_free(engine->context, ids);
  return status;
}

int command_run(int argc, char **argv) {
  struct engine_options options;
  struct sampler_options sampling;
  struct text_arguments text = {.tokens = 256};
  struct output_arguments output = {0};
  engine_options_default(&options);
  sampler_options_default(&sampling);
  const struct option_group groups[] = {model_group(&options), text_group(&text), cache_group(&options),
                                        sampling_group(&sampling), output_group(&output)};
  int first, code;
  if (!args_parse(&usage, groups, (int)ARRAY_LENGTH(groups), argc, argv, &first, &code)) return code;
  if ((text.prompt != NULL) == (text.file != NULL))
    return wrong_use("run: give the prompt with -p TEXT or -f FILE (one of them)");
  char path[PATH_MAX];
  if ((code = engine_options_resolve("run", &options, path, sizeof path)) != EXIT_DONE) return code;

  char *prompt = NULL;
  size_t bytes = text.prompt ? strlen(text.prompt) : 0;
  if (text.file && !read_text(text.file, &prompt, &bytes)) return EXIT_FAILED;
  interrupt_watch();
  struct progress_line line;
  progress_begin(&line);
  options.progress = &line.progress;
  struct engine engine;
  char error[1024];
  enum stop_reason stop = STOP_LIMIT;
  oscar_status status = engine_open(&options, &engine, error, sizeof error);
  if (status == OSCAR_OK) {
    status =
        complete(&engine, &sampling, text.prompt ? text.prompt : prompt, bytes, text.tokens, output.json, &line.progress, &stop);
    if (status != OSCAR_OK) snprintf(error, sizeof error, "%s", oscar_last_error(engine.context));
    engine_close(&engine);
  }
  progress_end(&line);
  free(prompt);
  if (status != OSCAR_OK) return failed_with(status, error);
  return stop == STOP_INTERRUPTED ? EXIT_INTERRUPTED : EXIT_DONE;
}
