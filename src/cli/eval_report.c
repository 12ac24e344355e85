/*
 * eval_report.c - `oscar eval --report`.
 *
 * A suite says what a report measures; options of the command line take the place of its numbers. Whether the report can be
 * written is asked before anything is measured.
 */
#include "cli/eval_job.h"
#include "eval/report.h"

#include <openssl/evp.h>
#include <stdlib.h>
#include <string.h>

enum { CONTEXTS = 4 };

struct suite {
  const char *name, *kv;
  int context[CONTEXTS]; /* windows of these lengths, ended by 0 */
  int64_t tokens;        /* of the text, for each */
  int first;             /* first scored position */
  int diagnose_context;
  const char *tasks, *lengths, *tasks_kv; /* tasks take longer: fewer types, unless the user has named some */
  int questions;
};
/* `first` 512 is past the beginning, where BF16 itself is poor and few positions read coded history. */
static const struct suite suites[] = {
    {"default",
     "int8,int4,q4_0,q4_0-hadamard,int2-kivi,int2@3,int2,int2@1.75,int2-centred,int2-oscar,int2-hadamard,int2-plain",
     {4096, 8192},
     8192,
     512,
     4096,
     "all",
     "2048,4096",
     "int4,int2,int2-oscar",
     40},
    {"quick", "int4,int2,int2-oscar,int2-hadamard", {1024}, 2048, 512, 1024, "multikey,json", "1024", "int4,int2", 8},
};

static const char *suite_name(int i) { return i < (int)ARRAY_LENGTH(suites) ? suites[i].name : NULL; }

#define AT(field) offsetof(struct report_arguments, field)
static const struct option_spec options[] = {
    {"diagnose", 0, OPTION_FLAG, AT(diagnose),
     .help = "instead: the errors of logits and attention outputs of each layer and head, on the exact model's queries, keys and "
             "values (without --tokens: of one window)"},
    {"every", 0, OPTION_INT, AT(every), "N", .help = "of the diagnostics: the queries at every N-th position", 1, 1 << 20},
    {"report", 0, OPTION_TEXT, AT(folder), "DIR",
     .help = "instead: all of a suite, written to DIR as report.md and report.json with pictures (drawn by gnuplot)",
     .default_text = ""},
    {"suite", 0, OPTION_TEXT, AT(suite), "NAME",
     .help = "what a report measures; -c, --tokens, --first, --kv, --tasks (or none), --lengths and --questions change it",
     .choice = suite_name, .default_text = "default"},
};

struct option_group report_group(struct report_arguments *arguments) {
  return (struct option_group){"Diagnostics and reports", options, (int)ARRAY_LENGTH(options), arguments};
}

static const struct suite *suite_of(const struct report_arguments *a) {
  for (size_t i = 0; i < ARRAY_LENGTH(suites); i++)
    if (a->suite && strcmp(a->suite, suites[i].name) == 0) return &suites[i];
  return &suites[0];
}

int report_check(struct report_arguments *a, bool json) {
  if (a->suite && !a->folder) return wrong_use("eval: --suite is for a report: --report DIR");
  if (a->folder && !*a->folder) return wrong_use("eval: --report needs the name of a folder");
  if (a->folder && a->diagnose) return wrong_use("eval: a report has the diagnostics: --report or --diagnose, not both");
  if (a->folder && json) return wrong_use("eval: --json prints results; a report has them in DIR/report.json");
  return EXIT_DONE;
}

bool report_is_wanted(const struct report_arguments *a) { return a->diagnose || a->folder; }

const char *report_kv_types(const struct report_arguments *a) { return a->folder ? suite_of(a)->kv : NULL; }

void report_fill_tasks(const struct report_arguments *a, bool own_kv, struct tasks_arguments *tasks) {
  const struct suite *suite = suite_of(a);
  if (!tasks->tasks) tasks->tasks = suite->tasks;
  if (!tasks->lengths) tasks->lengths = suite->lengths;
  if (!tasks->questions) tasks->questions = suite->questions;
  tasks->kv = own_kv ? NULL : suite->tasks_kv;
}

/* ---- the words in which a user would ask for a part ---- */

/* Text that a shell reads as one word. */
static void put_word(FILE *out, const char *word) {
  bool plain = *word != '\0';
  for (const char *c = word; *c; c++)
    plain =
        plain && ((*c >= 'a' && *c <= 'z') || (*c >= 'A' && *c <= 'Z') || (*c >= '0' && *c <= '9') || strchr("-._,@/+:=", *c));
  if (plain) {
    fputs(word, out);
    return;
  }
  fputc('\'', out);
  for (const char *c = word; *c; c++) fputs(*c == '\'' ? "'\\''" : (char[]){*c, '\0'}, out);
  fputc('\'', out);
}

static void put_windows(FILE *out, const struct eval_request *r) {
  if (r->sink != 64) fprintf(out, " --sink %d", r->sink);
  if (r->recent != 256) fprintf(out, " --recent %d", r->recent);
  if (!r->rotation) return;
  fputs(" --rotation ", out);
  put_word(out, last_part(r->rotation));
}

static void put_types(FILE *out, const struct kv_list *list) {
  fputs(" --kv ", out);
  for (int i = 0; i < list->count; i++) {
    if (i) fputc(',', out);
    put_word(out, list->names[i]);
  }
}

/* A command that measures something alone, written to a stream of memory; folders of this machine are left out. */
struct command_text {
  char *text;
  size_t bytes;
  FILE *out; /* NULL: out of memory */
};

static void command_begin(struct command_text *c, const char *what, const struct eval_request *r) {
  *c = (struct command_text){0};
  c->out = open_memstream(&c->text, &c->bytes);
  if (!c->out) return;
  fprintf(c->out, "oscar eval%s -m ", what);
  put_word(c->out, last_part(r->model));
}

/* The command's end, the same for all. malloc'ed; NULL: out of memory. */
static char *command_end(struct command_text *c, const struct eval_request *r, const struct kv_list *types) {
  if (!c->out) return NULL;
  put_windows(c->out, r);
  put_types(c->out, types);
  if (fclose(c->out) == 0) return c->text;
  free(c->text);
  return NULL;
}

static char *command_of(const struct job *job, const char *what, int context, int64_t tokens, const char *number_name,
                        int number) {
  const struct eval_request *r = job->request;
  struct command_text c;
  command_begin(&c, what, r);
  if (c.out) {
    fputs(" -f ", c.out);
    put_word(c.out, last_part(r->file));
    fprintf(c.out, " -c %d", context);
    if (tokens > 0) fprintf(c.out, " --tokens %lld", (long long)tokens);
    fprintf(c.out, " %s %d", number_name, number);
  }
  return command_end(&c, r, job->list);
}

static oscar_status out_of_memory(const struct job *job) {
  return set_error(job->m->context, OSCAR_NO_MEMORY, "out of memory writing a command");
}

/* ---- --report: measured and written ---- */

struct measured {
  struct eval_result result[CONTEXTS];
  struct report_quality quality[CONTEXTS];
  char *command[CONTEXTS + 2]; /* the last ones: of the diagnostics, of the tasks */
  struct diagnose_result diagnosis;
  struct tasks_options tasks_options; /* no tasks: nothing to run */
  struct kv_list tasks_types;         /* names and sets, borrowed */
  struct tasks_result tasks;
  struct report_task *task;
  struct report report;
};

/* The contexts to measure: the user's, or those of the suite that model and text allow. */
static int choose_contexts(const struct job *job, const struct suite *suite, int contexts[CONTEXTS]) {
  const int64_t trained = model_geometry_of(job->m->model)->context_trained;
  int n = 0;
  if (job->request->context) {
    contexts[n++] = job->request->context;
    return n;
  }
  for (int i = 0; i < CONTEXTS && suite->context[i]; i++) {
    if (suite->context[i] > trained)
      note("suite %s: windows of %d tokens are left out: the model was trained for %lld", suite->name, suite->context[i],
           (long long)trained);
    else if (suite->context[i] > job->count)
      note("suite %s: windows of %d tokens are left out: the text has %d tokens", suite->name, suite->context[i], job->count);
    else
      contexts[n++] = suite->context[i];
  }
  return n;
}

static oscar_status measure_quality(const struct job *job, const struct suite *suite, int context, int index,
                                    struct measured *to) {
  const struct eval_request *r = job->request;
  struct report_quality *q = &to->quality[index];
  eval_options_default(&q->options);
  q->options.context = context;
  q->options.tokens = r->tokens > 0 ? r->tokens : suite->tokens;
  q->options.first_scored = r->first >= 0 ? r->first : suite->first < context ? suite->first : 0;
  q->options.chunk = r->chunk;
  q->options.sink_pages = r->sink / OSCAR_PAGE_TOKENS;
  q->options.recent_pages = r->recent / OSCAR_PAGE_TOKENS;
  q->command = to->command[index] = command_of(job, "", context, q->options.tokens, "--first", q->options.first_scored);
  if (!q->command) return out_of_memory(job);
  progress_begin(job->line);
  oscar_status status = eval_perplexity(job->m->model, &q->options, job->ids, job->count, job->list->count, job->list->names,
                                        job->list->sets, &job->line->progress, &to->result[index]);
  progress_end(job->line);
  q->result = &to->result[index];
  return status;
}

/* One window, of the suite's length or the longest that was measured. */
static oscar_status measure_errors(const struct job *job, const struct suite *suite, const struct report_arguments *a,
                                   int longest, struct measured *to) {
  struct diagnose_options *o = &to->report.diagnose_options;
  const int context = longest < suite->diagnose_context ? longest : suite->diagnose_context;
  job_diagnose_options(job, context, context, a->every, o);
  to->command[CONTEXTS] = command_of(job, " --diagnose", context, context, "--every", a->every);
  if (!to->command[CONTEXTS]) return out_of_memory(job);
  oscar_status status = job_diagnose(job, o, &to->diagnosis);
  progress_end(job->line);
  to->report.diagnosis = &to->diagnosis;
  to->report.diagnose_command = to->command[CONTEXTS];
  return status;
}

/* ---- tasks ---- */

static bool is_listed(const char *list, const char *name) {
  const size_t bytes = strlen(name);
  for (const char *at = list; at; at = strchr(at, ',')) {
    at += *at == ',';
    if (strncmp(at, name, bytes) == 0 && (at[bytes] == ',' || at[bytes] == '\0')) return true;
  }
  return false;
}

/* The types of the list that the tasks are for; an empty place where there are none. */
static void choose_types(const struct job *job, struct kv_list *to) {
  const struct kv_list *from = job->list;
  const char *wanted = job->request->tasks_kv;
  *to = (struct kv_list){0};
  for (int i = 0; i < from->count; i++) {
    if (wanted && !is_listed(wanted, from->names[i])) continue;
    to->names[to->count] = from->names[i];
    to->sets[to->count++] = from->sets[i];
  }
}

static void choose_lengths(const struct job *job, struct tasks_options *o) {
  const int64_t trained = model_geometry_of(job->m->model)->context_trained;
  int n = 0;
  for (int i = 0; i < o->lengths; i++) {
    if (o->length[i] <= trained)
      o->length[n++] = o->length[i];
    else
      note("tasks: prompts of %d tokens are left out: the model was trained for %lld", o->length[i], (long long)trained);
  }
  o->lengths = n;
}

static char *tasks_command_of(const struct job *job, const struct tasks_options *o, const struct kv_list *types) {
  struct command_text c;
  command_begin(&c, "", job->request);
  if (c.out) {
    for (int i = 0; i < o->tasks; i++) fprintf(c.out, "%s%s", i ? "," : " --tasks ", task_name(o->task[i]));
    for (int i = 0; i < o->lengths; i++) fprintf(c.out, "%s%d", i ? "," : " --lengths ", o->length[i]);
    fprintf(c.out, " --questions %d --seed %llu", o->questions, (unsigned long long)o->seed);
  }
  return command_end(&c, job->request, types);
}

static void list_scores(const struct tasks_result *r, struct report *report, struct report_task *to) {
  report->task = to;
  for (int c = 0; c < r->cells; c++)
    for (int i = 1; i < r->caches; i++) {
      const struct task_cell *cell = &r->cell[c];
      const struct task_score *s = &cell->score[i];
      to[report->tasks++] = (struct report_task){task_name(cell->task), cell->length, r->kv[i], s->right,
                                                 cell->questions,       s->low,       s->high,  cell->score[0].right};
    }
}

/* What will be asked, and whether it can be: before anything is measured. */
static oscar_status prepare_tasks(const struct job *job, struct measured *to) {
  struct tasks_options *o = &to->tasks_options;
  *o = *job->request->tasks;
  choose_types(job, &to->tasks_types);
  choose_lengths(job, o);
  if (o->lengths == 0 || to->tasks_types.count == 0) o->tasks = 0;
  return o->tasks ? tasks_options_check(job->m->model, o) : OSCAR_OK;
}

static oscar_status measure_tasks(const struct job *job, struct measured *to) {
  const struct kv_list *types = &to->tasks_types;
  if (to->tasks_options.tasks == 0) return OSCAR_OK;
  to->report.task_command = to->command[CONTEXTS + 1] = tasks_command_of(job, &to->tasks_options, types);
  if (!to->report.task_command) return out_of_memory(job);
  progress_begin(job->line);
  oscar_status status =
      eval_tasks(job->m->model, &to->tasks_options, types->count, types->names, types->sets, &job->line->progress, &to->tasks);
  progress_end(job->line);
  if (status != OSCAR_OK) return status;
  to->task = mem_alloc(job->m->context, (size_t)to->tasks.cells * (size_t)to->tasks.caches, sizeof *to->task);
  if (!to->task) return OSCAR_NO_MEMORY;
  list_scores(&to->tasks, &to->report, to->task);
  return OSCAR_OK;
}

static oscar_status hash_text(const struct job *job, char hex[65]) {
  unsigned char digest[EVP_MAX_MD_SIZE];
  unsigned int bytes = 0;
  if (EVP_Digest(job->request->text, job->request->bytes, digest, &bytes, EVP_sha256(), NULL) != 1 || bytes != 32)
    return set_error(job->m->context, OSCAR_NO_MEMORY, "the SHA-256 of the text could not be computed");
  for (unsigned int i = 0; i < bytes; i++) snprintf(hex + 2 * i, 3, "%02x", digest[i]);
  return OSCAR_OK;
}

static oscar_status measure_suite(const struct job *job, const struct suite *suite, const struct report_arguments *a,
                                  struct measured *to) {
  int contexts[CONTEXTS], longest = 0;
  const int n = choose_contexts(job, suite, contexts);
  if (n == 0)
    return set_error(job->m->context, OSCAR_INVALID_ARGUMENT, "suite %s: no window fits the model and the text", suite->name);
  oscar_status status = OSCAR_OK;
  for (int i = 0; i < n && status == OSCAR_OK; i++) {
    status = measure_quality(job, suite, contexts[i], i, to);
    if (contexts[i] > longest) longest = contexts[i];
  }
  to->report.qualities = n;
  to->report.quality = to->quality;
  if (status == OSCAR_OK) status = measure_errors(job, suite, a, longest, to);
  return status == OSCAR_OK ? measure_tasks(job, to) : status;
}

static oscar_status make_report(const struct job *job, const struct report_arguments *a) {
  oscar_context *context = job->m->context;
  const struct suite *suite = suite_of(a);
  char sha256[65];
  struct measured *to = mem_zalloc(context, 1, sizeof *to);
  if (!to) return OSCAR_NO_MEMORY;
  to->report = (struct report){.suite = suite->name,
                               .model_name = model_geometry_of(job->m->model)->name,
                               .fingerprint = model_fingerprint(job->m->model),
                               .text_name = last_part(job->request->file),
                               .text_sha256 = sha256,
                               .text_bytes = job->request->bytes};
  oscar_status status = prepare_tasks(job, to);
  if (status == OSCAR_OK) status = hash_text(job, sha256);
  if (status == OSCAR_OK) status = measure_suite(job, suite, a, to);
  if (status == OSCAR_OK) status = report_write(context, &to->report, a->folder);
  if (status == OSCAR_OK) printf("%s/report.md\n", a->folder);
  for (int i = 0; i < CONTEXTS; i++) eval_result_free(context, &to->result[i]);
  for (size_t i = 0; i < ARRAY_LENGTH(to->command); i++) free(to->command[i]);
  diagnose_result_free(context, &to->diagnosis);
  tasks_result_free(context, &to->tasks);
  mem_free(context, to->task);
  mem_free(context, to);
  return status;
}

oscar_status eval_report(const struct loaded_model *m, struct kv_list *list, const struct eval_request *request,
                         const struct report_arguments *a, struct progress_line *line) {
  struct job job = {.m = m, .list = list, .request = request, .line = line};
  const int64_t trained = model_geometry_of(m->model)->context_trained;
  if (request->context > trained)
    return set_error(m->context, OSCAR_INVALID_ARGUMENT, "windows of %d tokens; this model was trained for %lld",
                     request->context, (long long)trained);
  oscar_status status = a->folder ? report_prepare(m->context, a->folder) : OSCAR_OK;
  if (status == OSCAR_OK)
    status = tokenizer_encode(model_tokenizer(m->model), request->text, request->bytes, false, &job.ids, &job.count);
  if (status == OSCAR_OK) status = kv_list_obtain(list, m->model, request->rotation, &line->progress);
  if (status == OSCAR_OK) status = a->folder ? make_report(&job, a) : job_print_diagnosis(&job, a->every);
  progress_end(line);
  mem_free(m->context, job.ids);
  return status;
}
