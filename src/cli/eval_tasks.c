/* eval_tasks.c - see eval_tasks.h. */
#include "cli/eval_tasks.h"

#include "engine/json_text.h"

#include <string.h>

#define DEFAULT_LENGTHS "4096"
enum { DEFAULT_QUESTIONS = 100 };

#define AT(field) offsetof(struct tasks_arguments, field)

static const char *filler_choice(int i) {
  static const char *const names[] = {"made", "shipped"};
  return (size_t)i < ARRAY_LENGTH(names) ? names[i] : NULL;
}

static const struct option_spec tasks_options[] = {
    {"tasks", 0, OPTION_TEXT, AT(tasks), "LIST",
     .help = "find things in long prompts, greedily: multikey, multivalue, tracking, json, code, separated by commas, or all"},
    {"lengths", 0, OPTION_TEXT, AT(lengths), "LIST", .help = "tokens of a prompt, separated by commas",
     .default_text = DEFAULT_LENGTHS},
    {"questions", 0, OPTION_INT, AT(questions), "N", .help = "questions for every task and length", 1, 100000,
     .default_text = "100"},
    {"filler", 0, OPTION_TEXT, AT(filler), "WHICH",
     .help =
         "prose around what is to be found, unless -f has it: made from lists of words, or the shipped text, which codecs are "
         "fitted to by default",
     .choice = filler_choice, .default_text = "made"},
};

struct option_group eval_tasks_group(struct tasks_arguments *arguments) {
  return (struct option_group){"Retrieval", tasks_options, (int)ARRAY_LENGTH(tasks_options), arguments};
}

/* ---- parsing ---- */

static const char *task_item(const void *list, int i) {
  (void)list;
  return i < TASK_COUNT ? task_name((enum task)i) : NULL;
}

/* The next entry of a list separated by commas, cut off at `room`; false at the end. */
static bool next_entry(const char **list, char *entry, size_t room) {
  if (!**list) return false;
  const size_t length = strcspn(*list, ",");
  snprintf(entry, room, "%.*s", (int)(length < room ? length : room - 1), *list);
  *list += length + ((*list)[length] == ',');
  return true;
}

static int unknown_task(const char *name) {
  const char *near = nearest_name(name, task_item, NULL);
  if (near) return wrong_use("eval: --tasks does not know '%s'; did you mean '%s'?", name, near);
  return wrong_use("eval: --tasks does not know '%s' (known: multikey, multivalue, tracking, json, code, all)", name);
}

/* Every task once, in the order given. */
static int add_task(const char *name, struct tasks_options *options) {
  const bool all = strcmp(name, "all") == 0;
  bool found = false;
  for (int i = 0; i < TASK_COUNT; i++) {
    if (!all && strcmp(name, task_name((enum task)i)) != 0) continue;
    bool listed = false;
    for (int k = 0; k < options->tasks; k++) listed = listed || options->task[k] == (enum task)i;
    if (!listed) options->task[options->tasks++] = (enum task)i;
    found = true;
  }
  return found ? EXIT_DONE : unknown_task(name);
}

static int add_length(const char *text, struct tasks_options *options) {
  int64_t tokens;
  if (!parse_int64(text, &tokens) || tokens < HAYSTACK_LEAST || tokens > HAYSTACK_MOST)
    return wrong_use("eval: --lengths wants whole numbers from %d to %d, not '%s'", HAYSTACK_LEAST, HAYSTACK_MOST, text);
  if (options->lengths == TASKS_LENGTHS) return wrong_use("eval: --lengths has more than %d entries", TASKS_LENGTHS);
  options->length[options->lengths++] = (int)tokens;
  return EXIT_DONE;
}

int eval_tasks_parse(const struct tasks_arguments *arguments, struct tasks_options *options) {
  char entry[32];
  int code = EXIT_DONE;
  options->questions = arguments->questions ? arguments->questions : DEFAULT_QUESTIONS;
  if (strcmp(arguments->tasks, "none") == 0) return EXIT_DONE;
  for (const char *list = arguments->tasks; code == EXIT_DONE && next_entry(&list, entry, sizeof entry);)
    code = add_task(entry, options);
  for (const char *list = arguments->lengths ? arguments->lengths : DEFAULT_LENGTHS;
       code == EXIT_DONE && next_entry(&list, entry, sizeof entry);)
    code = add_length(entry, options);
  if (code != EXIT_DONE) return code;
  if (options->tasks == 0) return wrong_use("eval: --tasks needs at least one task");
  if (options->lengths == 0) return wrong_use("eval: --lengths needs at least one length");
  return EXIT_DONE;
}

/* ---- the report ---- */

static void print_scores(const struct tasks_result *r, const struct task_cell *cell) {
  char bytes[32], interval[32];
  for (int i = 0; i < r->caches; i++) {
    const struct task_score *s = &cell->score[i];
    snprintf(interval, sizeof interval, "%.1f to %.1f", 100 * s->low, 100 * s->high);
    printf("%-10s %7d  %-14s %5d/%-5d %6.1f%% %14s %11.5f", task_name(cell->task), cell->length, r->kv[i], s->right,
           cell->questions, 100 * s->share, interval, s->loss);
    if (i == 0)
      printf(" %10s %10s %8s", "-", "-", "-");
    else
      printf(" %10d %10d %8.4f", s->only_bf16, s->only_this, s->p);
    printf(" %9.3f %10s\n", s->bits_per_element, format_bytes((double)s->cache_bytes, bytes, sizeof bytes));
  }
}

static void print_table(const char *model, const struct tasks_result *r, const struct tasks_options *o, const char *filler) {
  printf(
      "%s, %d questions for every task and length, seed %llu, prompts %s, prose %s, first %d and last %d to %d tokens exact\n"
      "Right: greedy answers. NLL: of the right answer, per token, nats. Only: questions that one of the two caches got right, "
      "with McNemar's exact p.\n\n",
      model, o->questions, (unsigned long long)o->seed, r->prompts, filler, o->sink_pages * OSCAR_PAGE_TOKENS,
      o->recent_pages * OSCAR_PAGE_TOKENS + 1, (o->recent_pages + 1) * OSCAR_PAGE_TOKENS);
  printf("%-10s %7s  %-14s %11s %7s %14s %11s %10s %10s %8s %9s %10s\n", "task", "tokens", "cache", "right", "share",
         "95% interval", "NLL", "only bf16", "only this", "p", "bits/elt", "cache");
  for (int i = 0; i < r->cells; i++) print_scores(r, &r->cell[i]);
}

static json_t *json_scores(const struct tasks_result *r, const struct task_cell *cell) {
  json_t *scores = json_array();
  for (int i = 0; i < r->caches; i++) {
    const struct task_score *s = &cell->score[i];
    json_array_append_new(scores,
                          json_pack("{s:s, s:i, s:i, s:f, s:f, s:f, s:f, s:i, s:i, s:f, s:f, s:I}", "kv", r->kv[i], "right",
                                    s->right, "total", cell->questions, "share", s->share, "low", s->low, "high", s->high,
                                    "loss_per_token", s->loss, "only_bf16", s->only_bf16, "only_this", s->only_this, "mcnemar_p",
                                    s->p, "bits_per_element", s->bits_per_element, "cache_bytes", (json_int_t)s->cache_bytes));
  }
  return scores;
}

static json_t *json_question(const struct tasks_result *r, const struct task_question *q) {
  json_t *answers = json_object();
  for (int i = 0; i < r->caches; i++) {
    const struct task_reply *reply = &q->reply[i];
    json_object_set_new(answers, r->kv[i],
                        json_pack("{s:b, s:f, s:o}", "right", reply->right, "loss", reply->loss, "text",
                                  json_text(reply->text, strlen(reply->text))));
  }
  return json_pack("{s:i, s:f, s:s, s:s, s:i, s:o}", "haystack", q->haystack, "depth", q->depth, "question", q->asked, "expected",
                   q->expected, "expected_tokens", q->gold_tokens, "answers", answers);
}

static json_t *json_cell(const struct tasks_result *r, const struct task_cell *cell) {
  json_t *questions = json_array();
  for (int i = 0; i < cell->questions; i++) json_array_append_new(questions, json_question(r, &cell->question[i]));
  return json_pack("{s:s, s:i, s:i, s:i, s:i, s:o, s:o}", "task", task_name(cell->task), "length", cell->length,
                   "shortest_prompt", cell->shortest, "longest_prompt", cell->longest, "haystacks", cell->haystacks, "scores",
                   json_scores(r, cell), "questions", questions);
}

static void print_json(const char *model, const struct tasks_result *r, const struct tasks_options *o, const char *filler) {
  json_t *cells = json_array();
  for (int i = 0; i < r->cells; i++) json_array_append_new(cells, json_cell(r, &r->cell[i]));
  json_t *root =
      json_pack("{s:s, s:s, s:s, s:s, s:I, s:i, s:i, s:b, s:o}", "model", model, "measure", "tasks", "prompts", r->prompts,
                "filler", filler, "seed", (json_int_t)o->seed, "sink_tokens", o->sink_pages * OSCAR_PAGE_TOKENS, "recent_tokens",
                o->recent_pages * OSCAR_PAGE_TOKENS, "complete", r->cells == o->tasks * o->lengths, "cells", cells);
  json_dumpf(root, stdout, JSON_INDENT(1) | JSON_REAL_PRECISION(8));
  putchar('\n');
  json_decref(root);
}

oscar_status eval_tasks_report(const struct loaded_model *m, const struct kv_list *list, const struct tasks_options *options,
                               const char *filler_name, bool json, struct progress_line *line) {
  struct tasks_result result;
  const char *model = model_geometry_of(m->model)->name;
  oscar_status status = eval_tasks(m->model, options, list->count, list->names, list->sets, &line->progress, &result);
  progress_end(line);
  if (status != OSCAR_OK && result.cells == 0) return status;
  if (json) /* when interrupted, what there is */
    print_json(model, &result, options, filler_name);
  else
    print_table(model, &result, options, filler_name);
  tasks_result_free(m->context, &result);
  return status;
}
