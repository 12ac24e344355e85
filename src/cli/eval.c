/* eval.c - `oscar eval`: what each form of the cache costs in quality and saves in memory, on a text of the user's. */
#include "cli/kv_list.h"
#include "cli/models.h"
#include "cli/options.h"
#include "cli/progress.h"
#include "eval/eval.h"

#include <jansson.h>
#include <limits.h>
#include <stdlib.h>

static const struct usage usage = {
    .command = "eval",
    .operands = "",
    .about = "Runs the BF16 cache and every named cache side by side over the same tokens of a text and reports perplexity, KL "
             "divergence\n"
             "from BF16 and agreement on the most likely token. KL and top-1 count only positions that read coded history.",
    .examples = "oscar eval -m smollm2-135m -f text.txt --kv int4,int2\n"
                "oscar eval -m qwen2.5-coder-1.5b -f text.txt -c 8192 --tokens 16384 --json\n",
};

struct eval_arguments {
  const char *file, *kv, *rotation;
  int context, first, chunk, sink, recent;
  int64_t tokens;
};

#define AT(field) offsetof(struct eval_arguments, field)
static const struct option_spec eval_options[] = {
    {"file", 'f', OPTION_TEXT, AT(file), "FILE", .help = "the text; '-': standard input", .default_text = ""},
    {"ctx", 'c', OPTION_INT, AT(context), "N", .help = "tokens of a window", 2, 1 << 30},
    {"kv", 0, OPTION_TEXT, AT(kv), "LIST",
     .help = "forms of the cache to compare with bf16, separated by commas: those of 'oscar run', and for comparison only "
             "int2-kivi, q4_0, q4_0-hadamard"},
    {"tokens", 0, OPTION_INT64, AT(tokens), "N", .help = "most tokens to use", 0, 1e15,
     .default_text = "all whole windows of the text"},
    {"first", 0, OPTION_INT, AT(first), "N", .help = "positions of a window before this one are read but not scored", 0, 1 << 30},
    {"rotation", 0, OPTION_TEXT, AT(rotation), "FILE",
     .help = "fitted codecs from 'oscar calibrate', for the type they were fitted for",
     .default_text = "the user's cache folder, fitted on first use"},
    {"sink", 0, OPTION_INT, AT(sink), "N", .help = "first tokens that stay exact", 0, 1 << 30, 64},
    {"recent", 0, OPTION_INT, AT(recent), "N", .help = "latest tokens that stay exact", 0, 1 << 30, 64},
    {"chunk", 0, OPTION_INT, AT(chunk), "N", .help = "tokens per forward pass", 1, 8192},
};

static void print_table(const char *model, const struct eval_result *r, const struct eval_options *o) {
  char bytes[32];
  printf("%s, windows of %d tokens: %lld tokens, %lld scored, %lld counted for KL and top-1 (positions that read coded history:\n"
         "from %d on), first %d and last %d to %d tokens exact\n\n",
         model, r->context, (long long)r->tokens, (long long)r->scored, (long long)r->counted,
         (o->sink_pages + o->recent_pages + 1) * OSCAR_PAGE_TOKENS, o->sink_pages * OSCAR_PAGE_TOKENS,
         o->recent_pages * OSCAR_PAGE_TOKENS + 1, (o->recent_pages + 1) * OSCAR_PAGE_TOKENS);
  printf("%-14s %9s %9s %20s %9s %9s %7s %9s %10s\n", "cache", "ppl", "ratio", "mean KL", "99% KL", "max KL", "top-1", "bits/elt",
         "cache");
  for (int i = 0; i < r->runs; i++) {
    const struct eval_run *run = &r->run[i];
    printf("%-14s %9.4f %9.4f %10.5f +- %.5f %9.4f %9.4f %6.2f%% %9.3f %10s\n", run->kv, run->ppl, run->ppl_ratio, run->kld_mean,
           run->kld_se, run->kld_p99, run->kld_max, 100 * run->top1, run->bits_per_element,
           format_bytes((double)run->cache_bytes, bytes, sizeof bytes));
  }
}

static void print_json(const char *model, const struct eval_result *r) {
  json_t *runs = json_array();
  for (int i = 0; i < r->runs; i++) {
    const struct eval_run *run = &r->run[i];
    json_array_append_new(runs, json_pack("{s:s, s:f, s:f, s:f, s:f, s:f, s:f, s:f, s:f, s:I}", "kv", run->kv, "ppl", run->ppl,
                                          "ppl_ratio", run->ppl_ratio, "kld_mean", run->kld_mean, "kld_se", run->kld_se,
                                          "kld_p99", run->kld_p99, "kld_max", run->kld_max, "top1", run->top1, "bits_per_element",
                                          run->bits_per_element, "cache_bytes", (json_int_t)run->cache_bytes));
  }
  json_t *root = json_pack("{s:s, s:i, s:I, s:I, s:I, s:s, s:o}", "model", model, "context", r->context, "tokens",
                           (json_int_t)r->tokens, "scored", (json_int_t)r->scored, "counted", (json_int_t)r->counted, "counts",
                           "KL and top-1: positions that read coded history; perplexity: all scored positions", "runs", runs);
  json_dumpf(root, stdout, JSON_INDENT(1) | JSON_REAL_PRECISION(8));
  putchar('\n');
  json_decref(root);
}

static oscar_status evaluate(const struct loaded_model *m, struct kv_list *list, const struct eval_arguments *a, const char *text,
                             size_t bytes, bool json, struct progress_line *line) {
  struct eval_options options;
  eval_options_default(&options);
  options.context = a->context;
  options.tokens = a->tokens;
  options.first_scored = a->first;
  options.chunk = a->chunk;
  options.sink_pages = a->sink / OSCAR_PAGE_TOKENS;
  options.recent_pages = a->recent / OSCAR_PAGE_TOKENS;
  const struct model_geometry *g = model_geometry_of(m->model);
  int32_t *ids = NULL;
  int count = 0;
  struct eval_result result = {0};
  oscar_status status = OSCAR_OK;
  if (a->context > g->context_trained)
    status = set_error(m->context, OSCAR_INVALID_ARGUMENT, "windows of %d tokens; this model was trained for %lld", a->context,
                       (long long)g->context_trained);
  if (status == OSCAR_OK) status = tokenizer_encode(model_tokenizer(m->model), text, bytes, false, &ids, &count);
  if (status == OSCAR_OK) status = kv_list_obtain(list, m->model, a->rotation, &line->progress);
  if (status == OSCAR_OK)
    status = eval_perplexity(m->model, &options, ids, count, list->count, list->names, list->sets, &line->progress, &result);
  progress_end(line);
  if (status == OSCAR_OK) {
    if (json)
      print_json(g->name, &result);
    else
      print_table(g->name, &result, &options);
  }
  eval_result_free(m->context, &result);
  mem_free(m->context, ids);
  return status;
}

int command_eval(int argc, char **argv) {
  struct engine_options engine;
  struct eval_arguments a = {
      .kv = "int4,int2,int2-oscar,int2-hadamard,int2-plain", .context = 4096, .chunk = 256, .sink = 64, .recent = 256};
  struct output_arguments output = {0};
  engine_options_default(&engine);
  const struct option_group groups[] = {
      model_group(&engine), {"Evaluation", eval_options, (int)ARRAY_LENGTH(eval_options), &a}, output_group(&output)};
  int first, code;
  if (!args_parse(&usage, groups, (int)ARRAY_LENGTH(groups), argc, argv, &first, &code)) return code;
  if (!a.file) return wrong_use("eval: which text? -f FILE");
  struct kv_list list;
  if ((code = kv_list_parse("eval", a.kv, &list)) != EXIT_DONE) return code;
  char path[PATH_MAX], *text;
  if ((code = engine_options_resolve("eval", &engine, path, sizeof path)) != EXIT_DONE) return code;
  size_t bytes;
  if (!read_text(a.file, &text, &bytes)) return EXIT_FAILED;

  interrupt_watch();
  struct progress_line line;
  progress_begin(&line);
  struct loaded_model m;
  if ((code = loaded_model_open(path, engine.threads, &m)) == EXIT_DONE) {
    oscar_status status = evaluate(&m, &list, &a, text, bytes, output.json, &line);
    progress_end(&line);
    if (status != OSCAR_OK) code = failed_with(status, oscar_last_error(m.context));
    kv_list_free(&list);
    loaded_model_close(&m);
  }
  free(text);
  return code;
}
