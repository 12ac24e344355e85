/*
 * The program at length: what `oscar info` says a run will hold, against what `oscar run` has held at its peak (the kernel's
 * ru_maxrss); and a prompt of 32K tokens on a 2-bit cache, whose answer shows that it can still be read.
 *
 * The prompt is the beginning of the shipped text twice or more, the last time without its last 200 bytes: a model that
 * remembers goes on with those. The context is as long as prompt and answer, so that the cache is full at the end, as `oscar
 * info` supposes.
 *
 * TOLERANCE is what the prediction promises (docs/performance.md). It leaves room for what differs between machines: how much of
 * the libraries the loader touches, what malloc keeps, the pages that Linux maps around one that is read.
 */
#include "support.h"

#include "engine/engine.h"

#include <fcntl.h>
#include <jansson.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#define TOLERANCE 0.05

enum { ANSWER = 16, HELD_BACK = 200 /* bytes */ };
/* Tokens of a context, and of the text that codecs are fitted to: their size does not depend on it, what they keep does. */
enum { SHORT = 4096, LONG = 32768, FIT_FOR_SIZE = 1024, FIT_FOR_ANSWERS = 4096 };

/* ---- running the program ---- */

struct work {
  char folder[64], model[4096], text[128], out[128], context[16];
  const char *rest; /* what the second copy lacks */
  char *prompt;
  int prompt_tokens;
};

/* Runs a program with stdout into w->out; returns the most bytes that it had in memory. Fails the test if it does not exit with
 * 0. Its cache folder is one of our own, so that nothing of the user's is touched. */
static double run(const struct work *w, const char *const *argv) {
  fflush(stdout);
  pid_t child = fork();
  assert_true(child >= 0);
  if (child == 0) {
    int fd = open(w->out, O_WRONLY | O_CREAT | O_TRUNC, 0600);
    if (fd >= 0 && dup2(fd, STDOUT_FILENO) >= 0 && setenv("XDG_CACHE_HOME", w->folder, 1) == 0)
      execvp(argv[0], (char *const *)(uintptr_t)argv);
    _exit(127);
  }
  int status;
  struct rusage usage;
  assert_int_equal(wait4(child, &status, 0, &usage), child);
  if (!WIFEXITED(status) || WEXITSTATUS(status) != 0) fail_msg("%s %s: wait status %d", argv[0], argv[1], status);
  return 1024.0 * (double)usage.ru_maxrss;
}

static json_t *output(const struct work *w) {
  json_error_t error;
  json_t *root = json_load_file(w->out, 0, &error);
  if (!root) fail_msg("%s: %s", w->out, error.text);
  return root;
}

/* ---- the prompt ---- */

static int count_tokens(const struct model *model, const char *text, size_t bytes) {
  int32_t *ids;
  int count;
  const struct tokenizer *t = model_tokenizer(model);
  assert_ok(model_context(model), tokenizer_encode(t, text, bytes, true, &ids, &count));
  mem_free(model_context(model), ids);
  return count + (tokenizer_adds_bos(t) ? 1 : 0);
}

/* text[0, end) as often as is wanted, the last time without its last HELD_BACK bytes, cut before a word; the bytes of all. */
static size_t repeat_text(struct work *w, const char *text, size_t end, int copies) {
  size_t cut = end - HELD_BACK;
  while (cut > 0 && text[cut] != ' ') cut--;
  for (int i = 0; i < copies; i++) memcpy(w->prompt + (size_t)i * end, text, i < copies - 1 ? end : cut);
  w->rest = text + cut;
  return (size_t)(copies - 1) * end + cut;
}

/* The longest prompt of this form that leaves room for the answer among `tokens`; its bytes. */
static size_t make_prompt(struct work *w, const struct model *model, int tokens) {
  size_t room;
  const char *text = calibration_text(&room);
  const int enough = (tokens + HELD_BACK) / count_tokens(model, text, room) + 1, copies = enough > 2 ? enough : 2;
  w->prompt = malloc((size_t)copies * room);
  assert_non_null(w->prompt);
  size_t fits = 2 * HELD_BACK;
  for (size_t too_long = room; fits + 1 < too_long;) {
    size_t middle = (fits + too_long) / 2;
    if (count_tokens(model, w->prompt, repeat_text(w, text, middle, copies)) + ANSWER <= tokens)
      fits = middle;
    else
      too_long = middle;
  }
  size_t bytes = repeat_text(w, text, fits, copies);
  w->prompt_tokens = count_tokens(model, w->prompt, bytes);
  assert_true(w->prompt_tokens > tokens - 8 * ANSWER);
  return bytes;
}

/* false: the model is not fetched */
static bool open_work(struct work *w, const char *name, int tokens) {
  const char *path = test_model(name);
  if (!path) return false;
  *w = (struct work){.folder = "/tmp/oscar-test-XXXXXX"};
  assert_non_null(mkdtemp(w->folder));
  snprintf(w->model, sizeof w->model, "%s/model.gguf", w->folder);
  snprintf(w->text, sizeof w->text, "%s/prompt.txt", w->folder);
  snprintf(w->out, sizeof w->out, "%s/out.json", w->folder);
  snprintf(w->context, sizeof w->context, "%d", tokens);
  const char *copy[] = {"cp", path, w->model, NULL};
  run(w, copy);

  oscar_context *context = test_context(OSCAR_ISA_AUTO, 1);
  struct backend *backend;
  struct model *model;
  assert_ok(context, backend_create_cpu(context, &backend));
  assert_ok(context, model_load(context, backend, path, &model));
  size_t bytes = make_prompt(w, model, tokens);
  model_free(model);
  backend->ops->free(backend);
  oscar_context_free(context);

  FILE *file = fopen(w->text, "wb");
  assert_non_null(file);
  assert_int_equal(fwrite(w->prompt, 1, bytes, file), bytes);
  assert_int_equal(fclose(file), 0);
  return true;
}

static void fit_codecs(const struct work *w, int fitted_on) {
  char tokens[16];
  snprintf(tokens, sizeof tokens, "%d", fitted_on);
  const char *argv[] = {OSCAR_PROGRAM, "calibrate", "-m", w->model, "--tokens", tokens, NULL};
  run(w, argv);
}

static void close_work(struct work *w) {
  const char *argv[] = {"rm", "-rf", w->folder, NULL};
  run(w, argv);
  free(w->prompt);
}

/* ---- comparing ---- */

static double predicted_bytes(const struct work *w, const char *kv) {
  const char *argv[] = {OSCAR_PROGRAM, "info", w->model, "-c", w->context, "--json", NULL};
  run(w, argv);
  json_t *root = output(w), *entry;
  double bytes = 0;
  size_t i;
  json_array_foreach(json_object_get(root, "kv"), i, entry) {
    if (strcmp(json_string_value(json_object_get(entry, "kv")), kv) == 0)
      bytes = (double)json_integer_value(json_object_get(entry, "total_bytes"));
  }
  json_decref(root);
  return bytes;
}

/* Takes a file out of the page cache, so that it comes back as a program reads it. What others have left there may lie in large
 * pieces, which Linux maps as a whole when a page of them is read: then a run of the default model has held 245 MiB instead of
 * 182. Nothing leaves the cache while somebody maps it, as other tests may do, so the file is a copy of our own. */
static void forget(const char *path) {
  const int fd = open(path, O_RDONLY);
  assert_true(fd >= 0);
  assert_int_equal(fsync(fd), 0);
  assert_int_equal(posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED), 0);
  close(fd);
}

/* Runs the prompt and compares; the JSON of the run stays in w->out. */
static void compare(const struct work *w, const char *kv) {
  const double predicted = predicted_bytes(w, kv);
  const char *argv[] = {OSCAR_PROGRAM, "run", "-m",   w->model, "-f",     w->text, "-c",     w->context,
                        "-n",          "16",  "--kv", kv,       "--temp", "0",     "--json", NULL};
  forget(w->model);
  const double measured = run(w, argv);
  json_t *root = output(w), *timings = json_object_get(root, "timings");
  assert_int_equal(json_array_size(json_object_get(root, "prompt_ids")), w->prompt_tokens);
  printf("  %s, %s tokens: predicted %.1f MiB, measured %.1f MiB (%+.1f %%); prompt %.1f, answer %.1f tokens/s\n", kv, w->context,
         predicted / 1048576, measured / 1048576, 100 * (predicted / measured - 1),
         json_number_value(json_object_get(timings, "prompt_tokens_per_s")),
         json_number_value(json_object_get(timings, "decode_tokens_per_s")));
  fflush(stdout);
  json_decref(root);
  assert_true(fabs(predicted / measured - 1) <= TOLERANCE);
}

static void prediction_holds(const char *model, int tokens) {
  struct work w;
  if (!open_work(&w, model, tokens)) skip();
  fit_codecs(&w, FIT_FOR_SIZE);
  printf("%s\n", model);
  compare(&w, "bf16");
  compare(&w, "int2");
  close_work(&w);
}

static void info_predicts_what_the_default_model_takes(void **state) {
  (void)state;
  prediction_holds("smollm2-135m", test_at_length() ? SHORT : SHORT / 2);
}

static void info_predicts_what_half_a_billion_parameters_take(void **state) {
  (void)state;
  prediction_holds("qwen2.5-coder-0.5b", SHORT);
}

static void info_predicts_what_a_billion_and_a_half_take(void **state) {
  (void)state;
  prediction_holds("qwen2.5-coder-1.5b", SHORT);
}

static void a_text_of_32k_tokens_is_remembered_in_2_bits(void **state) {
  (void)state;
  struct work w;
  if (!open_work(&w, "qwen2.5-coder-1.5b", LONG)) skip();
  fit_codecs(&w, FIT_FOR_ANSWERS);
  compare(&w, "int2");
  json_t *root = output(&w);
  const char *answer = json_string_value(json_object_get(root, "text"));
  printf("  answer:   %s\n  expected: %.*s\n", answer, (int)strlen(answer), w.rest);
  assert_true(strlen(answer) > ANSWER);
  assert_memory_equal(answer, w.rest, ANSWER); /* the first few tokens, word for word, from 11,000 tokens ago */
  json_decref(root);
  close_work(&w);
}

int main(int argc, char **argv) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(info_predicts_what_the_default_model_takes)};
  const struct CMUnitTest larger[] = {cmocka_unit_test(info_predicts_what_half_a_billion_parameters_take),
                                      cmocka_unit_test(info_predicts_what_a_billion_and_a_half_take)};
  const struct CMUnitTest longest[] = {cmocka_unit_test(a_text_of_32k_tokens_is_remembered_in_2_bits)};
  if (argc > 1 && strcmp(argv[1], "context_32k") == 0) return cmocka_run_group_tests(longest, NULL, NULL);
  if (test_larger(argc, argv)) return cmocka_run_group_tests(larger, NULL, NULL);
  return cmocka_run_group_tests(tests, NULL, NULL);
}
