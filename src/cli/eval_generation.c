/* eval_generation.c - see eval_generation.h. */
#include "cli/eval_generation.h"

#include "engine/json_text.h"

#include <math.h>
#include <string.h>

#define AT(field) offsetof(struct generation_arguments, field)
static const struct option_spec generation_options[] = {
    {"generate", 0, OPTION_INT, AT(tokens), "N", .help = "write texts of N tokens and measure how they degrade", 1, 65536,
     .default_text = ""},
    {"seeds", 0, OPTION_INT, AT(seeds), "K", .help = "texts of every prompt", 1, 1000},
};

struct option_group eval_generation_group(struct generation_arguments *arguments) {
  return (struct option_group){"Long texts", generation_options, (int)ARRAY_LENGTH(generation_options), arguments};
}

/* ---- the report ---- */

/* Right-aligned, "-" for what is not known. */
static void print_number(const char *format, int width, double value) {
  char text[32];
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wformat-nonliteral"
  snprintf(text, sizeof text, isfinite(value) ? format : "-", value);
#pragma GCC diagnostic pop
  printf(" %*s", width, text);
}

static void print_measure(const struct generation_result *r, enum written_measure measure) {
  for (int i = 0; i < r->runs; i++) {
    const struct written_summary *s = &r->run[i].summary[measure];
    printf("%-11s %-14s", written_measure_name(measure), r->run[i].kv);
    print_number("%.4f", 10, s->mean);
    print_number("%.4f", 10, s->deviation);
    print_number("%+.2f", 8, i ? s->shift : (double)NAN);
    print_number("%.4f", 8, i ? s->p : (double)NAN);
    putchar('\n');
  }
}

static void print_table(const char *model, const struct generation_result *r, const struct generation_options *o) {
  char bytes[32];
  printf(
      "%s, %d prompts (%s) with %d seeds from %llu, %d tokens each, temperature %g\n"
      "sd: between seeds of a prompt. shift: from bf16, in its sd. p: sign-flip test of the texts paired by prompt and seed.\n\n",
      model, r->prompts, r->form, r->seeds, (unsigned long long)o->sampling.seed, r->tokens, (double)o->sampling.temperature);
  printf("%-11s %-14s %10s %10s %8s %8s\n", "measure", "cache", "mean", "sd", "shift", "p");
  for (int m = 0; m < WRITTEN_MEASURES; m++) print_measure(r, (enum written_measure)m);
  printf("\n%-14s %24s %9s %10s\n", "cache", "differs from bf16 at", "bits/elt", "cache");
  for (int i = 0; i < r->runs; i++) {
    const struct written_run *run = &r->run[i];
    printf("%-14s", run->kv);
    print_number("token %.1f", 24, i ? run->differs_at : (double)NAN);
    printf(" %9.3f %10s\n", run->bits_per_element, format_bytes((double)run->cache_bytes, bytes, sizeof bytes));
  }
  if (isfinite(r->seeds_differ_at)) printf("bf16 texts of two seeds differ at token %.1f\n", r->seeds_differ_at);
}

static json_t *json_summaries(const struct written_run *run) {
  json_t *all = json_object();
  for (int m = 0; m < WRITTEN_MEASURES; m++) {
    const struct written_summary *s = &run->summary[m];
    json_object_set_new(all, written_measure_name((enum written_measure)m),
                        json_pack("{s:o, s:o, s:o, s:o}", "mean", json_number(s->mean), "deviation", json_number(s->deviation),
                                  "shift", json_number(s->shift), "p", json_number(s->p)));
  }
  return all;
}

static json_t *json_texts(const struct written_run *run, int texts) {
  json_t *all = json_array();
  for (int i = 0; i < texts; i++) {
    const struct written_text *text = &run->text[i];
    json_t *one =
        json_pack("{s:i, s:I, s:i}", "prompt", text->prompt, "seed", (json_int_t)text->seed, "differs_at", text->differs_at);
    for (int m = 0; m < WRITTEN_MEASURES; m++)
      json_object_set_new(one, written_measure_name((enum written_measure)m), json_number(text->measure[m]));
    json_object_set_new(one, "text", json_text(text->text, strlen(text->text)));
    json_array_append_new(all, one);
  }
  return all;
}

static void print_json(const char *model, const struct generation_result *r, const struct generation_options *o) {
  json_t *runs = json_array();
  for (int i = 0; i < r->runs; i++) {
    const struct written_run *run = &r->run[i];
    json_array_append_new(runs, json_pack("{s:s, s:o, s:f, s:f, s:I, s:o}", "kv", run->kv, "measures", json_summaries(run),
                                          "differs_at", run->differs_at, "bits_per_element", run->bits_per_element, "cache_bytes",
                                          (json_int_t)run->cache_bytes, "texts", json_texts(run, r->texts)));
  }
  json_t *root = json_pack("{s:s, s:s, s:s, s:i, s:i, s:i, s:I, s:f, s:o, s:o}", "model", model, "measure", "generation",
                           "prompt_form", r->form, "tokens", r->tokens, "prompts", r->prompts, "seeds", r->seeds, "seed",
                           (json_int_t)o->sampling.seed, "temperature", (double)o->sampling.temperature, "bf16_seeds_differ_at",
                           json_number(r->seeds_differ_at), "runs", runs);
  json_dumpf(root, stdout, JSON_INDENT(1) | JSON_REAL_PRECISION(8));
  putchar('\n');
  json_decref(root);
}

/* ---- the run ---- */

/* Cuts the text at line ends; empty lines are no prompts. */
static int cut_prompts(char *text, const char **prompt) {
  int count = 0;
  char *rest = text;
  for (char *line; (line = strsep(&rest, "\r\n"));)
    if (*line) {
      if (prompt) prompt[count] = line;
      count++;
    }
  return count;
}

oscar_status eval_generation_report(const struct loaded_model *m, const struct kv_list *list, struct generation_options *options,
                                    char *text, bool json, struct progress_line *line) {
  const char **prompt = NULL;
  if (text) {
    const size_t room = strlen(text) / 2 + 1; /* a prompt and a line's end are two bytes at least */
    prompt = mem_alloc(m->context, room, sizeof *prompt);
    if (!prompt) return OSCAR_NO_MEMORY;
    options->prompts = cut_prompts(text, prompt);
    options->prompt = prompt;
  }
  struct generation_result result = {0};
  const char *model = model_geometry_of(m->model)->name;
  oscar_status status = OSCAR_OK;
  if (text && options->prompts == 0)
    status = set_error(m->context, OSCAR_INVALID_ARGUMENT, "there is no prompt in the file: expected one on each line");
  if (status == OSCAR_OK)
    status = eval_generation(m->model, options, list->count, list->names, list->sets, &line->progress, &result);
  progress_end(line);
  if (status == OSCAR_OK && json) print_json(model, &result, options);
  if (status == OSCAR_OK && !json) print_table(model, &result, options);
  generation_result_free(m->context, &result);
  mem_free(m->context, prompt);
  return status;
}
