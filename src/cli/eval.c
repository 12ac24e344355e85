/*
 * eval.c - `oscar eval`: what each form of the cache costs in quality and saves in memory: on a text of the user's, with a report
 * (eval_report.c) and of where the errors arise (eval_diagnose.c), in finding things in long prompts (eval_tasks.c), or in long
 * texts that the model writes (eval_generation.c).
 */
#include "cli/eval_generation.h"
#include "cli/eval_report.h"
#include "cli/eval_tasks.h"
#include "cli/kv_list.h"
#include "cli/models.h"
#include "cli/options.h"
#include "cli/progress.h"
#include "eval/report.h"

#include <limits.h>
#include <stdlib.h>
#include <string.h>

static const struct usage usage = {
    .command = "eval",
    .operands = "",
    .about = "Runs the BF16 cache and every named cache side by side over the same tokens of a text and reports perplexity, KL "
             "divergence\n"
             "from BF16 and agreement on the most likely token. KL and top-1 count only positions that read coded history.\n"
             "With --tasks, instead: how many questions about long prompts each cache answers right. With --generate: how much "
             "long\n"
             "texts repeat themselves and how likely the BF16 model finds them, compared with its own from seed to seed.",
    .examples = "oscar eval -m smollm2-135m -f text.txt --kv int4,int2\n"
                "oscar eval -m qwen2.5-coder-1.5b -f text.txt -c 8192 --tokens 16384 --json\n"
                "oscar eval -m qwen2.5-coder-1.5b --tasks multikey,tracking --lengths 4096,8192 --kv int4,int2\n"
                "oscar eval -m qwen2.5-coder-1.5b --tasks all --lengths 8192 --questions 40 -f book.txt --kv int2 --json\n"
                "oscar eval -m smollm2-135m --generate 1024 --seeds 4 --kv int2\n"
                "oscar eval -m smollm2-135m -f text.txt --diagnose --kv int2\n"
                "oscar eval -m smollm2-135m -f text.txt --report quality --suite quick\n",
};

#define DEFAULT_KV "int4,int2,int2-oscar,int2-hadamard,int2-plain"
enum { DEFAULT_CONTEXT = 4096 };

/* 0 of context, -1 of first and NULL of kv: not given */
struct eval_arguments {
  const char *file, *kv, *rotation;
  int context, first, chunk, sink, recent;
  int64_t tokens;
};

#define AT(field) offsetof(struct eval_arguments, field)
static const struct option_spec eval_options[] = {
    {"file", 'f', OPTION_TEXT, AT(file), "FILE",
     .help = "the text; with --tasks the prose of the prompts, with --generate the prompts, one on a line; '-': standard input",
     .default_text = ""},
    {"ctx", 'c', OPTION_INT, AT(context), "N", .help = "tokens of a window", 2, 1 << 30, .default_text = "4096"},
    {"kv", 0, OPTION_TEXT, AT(kv), "LIST",
     .help = "forms of the cache to compare with bf16, separated by commas: those of 'oscar run', TYPE=FILE with the codecs of a "
             "file, int2@BITS, and for comparison only int2-kivi, q4_0, q4_0-hadamard",
     .default_text = DEFAULT_KV},
    {"tokens", 0, OPTION_INT64, AT(tokens), "N", .help = "most tokens to use", 0, 1e15,
     .default_text = "all whole windows of the text"},
    {"first", 0, OPTION_INT, AT(first), "N", .help = "positions of a window before this one are read but not scored", 0, 1 << 30,
     .default_text = "0"},
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
  json_t *root = json_pack("{s:s, s:i, s:I, s:I, s:I, s:s, s:o}", "model", model, "context", r->context, "tokens",
                           (json_int_t)r->tokens, "scored", (json_int_t)r->scored, "counted", (json_int_t)r->counted, "counts",
                           "KL and top-1: positions that read coded history; perplexity: all scored positions", "runs",
                           eval_runs_to_json(r));
  json_dumpf(root, stdout, JSON_INDENT(1) | JSON_REAL_PRECISION(8));
  putchar('\n');
  json_decref(root);
}

static oscar_status evaluate(const struct loaded_model *m, struct kv_list *list, const struct eval_arguments *a, const char *text,
                             size_t bytes, bool json, struct progress_line *line) {
  struct eval_options options;
  eval_options_default(&options);
  options.context = a->context ? a->context : DEFAULT_CONTEXT;
  options.tokens = a->tokens;
  options.first_scored = a->first < 0 ? 0 : a->first;
  options.chunk = a->chunk;
  options.sink_pages = a->sink / OSCAR_PAGE_TOKENS;
  options.recent_pages = a->recent / OSCAR_PAGE_TOKENS;
  const struct model_geometry *g = model_geometry_of(m->model);
  int32_t *ids = NULL;
  int count = 0;
  struct eval_result result = {0};
  oscar_status status = OSCAR_OK;
  if (options.context > g->context_trained)
    status = set_error(m->context, OSCAR_INVALID_ARGUMENT, "windows of %d tokens; this model was trained for %lld",
                       options.context, (long long)g->context_trained);
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

/* ---- the measures ---- */

struct measures {
  struct eval_arguments text;
  struct tasks_arguments tasks;
  struct generation_arguments generation;
  struct report_arguments report;
  struct sampler_options sampling;
  struct tasks_options tasks_options;
};

/* What the tables cannot check: one measure at a time, and nothing that another one would need. */
static int check_measures(struct measures *m, bool json) {
  const struct eval_arguments *a = &m->text;
  const bool report = m->report.folder;
  const bool tasks = m->tasks.tasks && !report, generation = m->generation.tokens > 0; /* a report has tasks of its own */
  if (tasks && generation) return wrong_use("eval: --tasks and --generate are two measures; run them one after the other");
  int code = report_check(&m->report, json);
  if (code != EXIT_DONE) return code;
  if ((tasks || generation) && report_is_wanted(&m->report))
    return wrong_use("eval: --report and --diagnose are for a text, not for %s", tasks ? "--tasks" : "--generate");
  if (report && m->tasks.filler) return wrong_use("eval: the prompts of a report have made prose; --filler is for --tasks alone");
  if (report) {
    report_fill_tasks(&m->report, a->kv != NULL, &m->tasks);
    code = eval_tasks_parse(&m->tasks, &m->tasks_options);
  }
  if (code != EXIT_DONE) return code;
  if (!tasks && !generation) return a->file ? EXIT_DONE : wrong_use("eval: which text? -f FILE");
  if (a->context || a->tokens || a->first >= 0)
    return wrong_use("eval: --ctx, --tokens and --first are for a text, not for %s", tasks ? "--tasks" : "--generate");
  if (tasks && a->file && m->tasks.filler) return wrong_use("eval: the prose is in -f FILE or --filler, not in both");
  if (generation && m->sampling.temperature == 0 && m->generation.seeds > 1)
    return wrong_use("eval: with --temp 0 every seed gives the same text; use --seeds 1");
  if (!tasks) return EXIT_DONE;
  if (strcmp(m->tasks.tasks, "none") == 0) return wrong_use("eval: --tasks none is for a report; name tasks, or all");
  return eval_tasks_parse(&m->tasks, &m->tasks_options);
}

/* What the tasks take from options that are not theirs. */
static void complete_tasks(struct measures *measures) {
  const struct eval_arguments *a = &measures->text;
  struct tasks_options *o = &measures->tasks_options;
  o->seed = measures->sampling.seed;
  o->sink_pages = a->sink / OSCAR_PAGE_TOKENS;
  o->recent_pages = a->recent / OSCAR_PAGE_TOKENS;
  o->chunk = a->chunk;
}

static oscar_status run_tasks(const struct loaded_model *m, struct kv_list *list, struct measures *measures, const char *text,
                              size_t bytes, bool json, struct progress_line *line) {
  const struct eval_arguments *a = &measures->text;
  struct tasks_options *o = &measures->tasks_options;
  const bool shipped = !text && measures->tasks.filler && strcmp(measures->tasks.filler, "shipped") == 0;
  complete_tasks(measures);
  o->filler = shipped ? calibration_text(&bytes) : text;
  o->filler_bytes = bytes;
  oscar_status status = tasks_options_check(m->model, o);
  if (status == OSCAR_OK) status = kv_list_obtain(list, m->model, a->rotation, &line->progress);
  if (status != OSCAR_OK) return status;
  const char *name = shipped ? "shipped, which codecs are fitted to by default" : "made";
  if (text) name = strcmp(a->file, "-") == 0 ? "from standard input" : a->file;
  return eval_tasks_report(m, list, o, name, json, line);
}

static oscar_status run_generation(const struct loaded_model *m, struct kv_list *list, const struct measures *measures,
                                   char *text, bool json, struct progress_line *line) {
  const struct eval_arguments *a = &measures->text;
  struct generation_options o;
  generation_options_default(&o);
  o.tokens = measures->generation.tokens;
  o.seeds = measures->generation.seeds;
  o.sampling = measures->sampling;
  o.sink_pages = a->sink / OSCAR_PAGE_TOKENS;
  o.recent_pages = a->recent / OSCAR_PAGE_TOKENS;
  o.chunk = a->chunk;
  oscar_status status = generation_options_check(m->model, &o);
  if (status == OSCAR_OK) status = kv_list_obtain(list, m->model, a->rotation, &line->progress);
  return status == OSCAR_OK ? eval_generation_report(m, list, &o, text, json, line) : status;
}

static oscar_status run_report(const struct loaded_model *m, struct kv_list *list, struct measures *measures, const char *model,
                               const char *text, size_t bytes, bool json, struct progress_line *line) {
  const struct eval_arguments *a = &measures->text;
  complete_tasks(measures);
  const struct eval_request request = {.model = model,
                                       .file = a->file,
                                       .rotation = a->rotation,
                                       .text = text,
                                       .bytes = bytes,
                                       .context = a->context,
                                       .first = a->first,
                                       .chunk = a->chunk,
                                       .sink = a->sink,
                                       .recent = a->recent,
                                       .tokens = a->tokens,
                                       .tasks = &measures->tasks_options,
                                       .tasks_kv = measures->tasks.kv,
                                       .json = json};
  return eval_report(m, list, &request, &measures->report, line);
}

static int run_measure(const struct engine_options *engine, const char *model, struct kv_list *list, struct measures *measures,
                       char *text, size_t bytes, bool json) {
  interrupt_watch();
  struct progress_line line;
  progress_begin(&line);
  struct loaded_model m;
  int code = loaded_model_open(engine, &m);
  if (code != EXIT_DONE) return code;
  oscar_status status;
  if (measures->tasks.tasks && !measures->report.folder)
    status = run_tasks(&m, list, measures, text, bytes, json, &line);
  else if (measures->generation.tokens > 0)
    status = run_generation(&m, list, measures, text, json, &line);
  else if (report_is_wanted(&measures->report))
    status = run_report(&m, list, measures, model, text, bytes, json, &line);
  else
    status = evaluate(&m, list, &measures->text, text, bytes, json, &line);
  progress_end(&line);
  if (status != OSCAR_OK) code = failed_with(status, oscar_last_error(m.context));
  kv_list_free(list); /* before the context that its codecs belong to */
  loaded_model_close(&m);
  return code;
}

int command_eval(int argc, char **argv) {
  struct engine_options engine;
  struct measures measures = {
      .text = {.first = -1, .chunk = 256, .sink = 64, .recent = 256}, .generation = {.seeds = 2}, .report = {.every = 16}};
  struct eval_arguments *a = &measures.text;
  struct output_arguments output = {0};
  engine_options_default(&engine);
  tasks_options_default(&measures.tasks_options);
  sampler_options_default(&measures.sampling);
  measures.sampling.seed = 1;
  const struct option_group groups[] = {model_group(&engine),
                                        {"Evaluation", eval_options, (int)ARRAY_LENGTH(eval_options), &measures.text},
                                        report_group(&measures.report),
                                        eval_tasks_group(&measures.tasks),
                                        eval_generation_group(&measures.generation),
                                        sampling_group(&measures.sampling),
                                        output_group(&output)};
  int first, code;
  if (!args_parse(&usage, groups, (int)ARRAY_LENGTH(groups), argc, argv, &first, &code)) return code;
  if ((code = check_measures(&measures, output.json)) != EXIT_DONE) return code;
  if (!a->kv) a->kv = report_kv_types(&measures.report) ? report_kv_types(&measures.report) : DEFAULT_KV;
  struct kv_list list;
  const char *model = engine.model_path; /* as given */
  char path[PATH_MAX], *text = NULL;
  size_t bytes = 0;
  code = kv_list_parse("eval", a->kv, &list);
  if (code == EXIT_DONE) code = engine_options_resolve("eval", &engine, path, sizeof path);
  if (code == EXIT_DONE && a->file && !read_text(a->file, &text, &bytes)) code = EXIT_FAILED;
  if (code == EXIT_DONE) code = run_measure(&engine, model, &list, &measures, text, bytes, output.json);
  kv_list_free(&list);
  free(text);
  return code;
}
