/* report_json.c - results as JSON. A NULL from jansson means that memory ran out; it is passed on, never stored. */
#include "eval/report.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* JSON has no NaN and no infinity. */
static json_t *number(double x) { return isfinite(x) ? json_real(x) : json_null(); }

/* Names of files and models need not be UTF-8, which JSON is: then all bytes beyond ASCII become question marks. */
static json_t *text(const char *s) {
  json_t *string = json_string(s);
  char *plain = string ? NULL : strdup(s);
  if (!plain) return string;
  for (char *c = plain; *c; c++)
    if ((unsigned char)*c >= 0x80) *c = '?';
  string = json_string(plain);
  free(plain);
  return string;
}

static json_t *numbers(const double *x, int n) {
  json_t *list = json_array();
  for (int i = 0; list && i < n; i++)
    if (json_array_append_new(list, number(x[i])) != 0) {
      json_decref(list);
      list = NULL;
    }
  return list;
}

/* Appends `item` to *list; without memory for either, *list becomes NULL. */
static void append(json_t **list, json_t *item) {
  if (*list && json_array_append_new(*list, item) == 0) return;
  if (!*list) json_decref(item);
  json_decref(*list);
  *list = NULL;
}

json_t *eval_runs_to_json(const struct eval_result *r) {
  json_t *runs = json_array();
  for (int i = 0; i < r->runs; i++) {
    const struct eval_run *run = &r->run[i];
    append(&runs, json_pack("{s:s, s:o, s:o, s:o, s:o, s:o, s:o, s:o, s:o, s:I}", "kv", run->kv, "ppl", number(run->ppl),
                            "ppl_ratio", number(run->ppl_ratio), "kld_mean", number(run->kld_mean), "kld_se", number(run->kld_se),
                            "kld_p99", number(run->kld_p99), "kld_max", number(run->kld_max), "top1", number(run->top1),
                            "bits_per_element", number(run->bits_per_element), "cache_bytes", (json_int_t)run->cache_bytes));
  }
  return runs;
}

static json_t *quality_to_json(const struct report_quality *q) {
  const struct eval_result *r = q->result;
  return json_pack("{s:o, s:i, s:I, s:I, s:I, s:i, s:i, s:i, s:o}", "command", text(q->command), "context", r->context, "tokens",
                   (json_int_t)r->tokens, "scored", (json_int_t)r->scored, "counted", (json_int_t)r->counted, "first",
                   q->options.first_scored, "sink_tokens", q->options.sink_pages * OSCAR_PAGE_TOKENS, "recent_tokens",
                   q->options.recent_pages * OSCAR_PAGE_TOKENS, "runs", eval_runs_to_json(r));
}

/* ---- diagnostics ---- */

/* {NAME: index, queries, ...}; `name`: "layer" or "head" */
static json_t *errors_to_json(const char *name, int index, const struct head_sums *sums) {
  const struct head_errors e = head_errors_of(sums);
  return json_pack("{s:i, s:I, s:o, s:o, s:o, s:o, s:o}", name, index, "queries", (json_int_t)sums->queries, "logit_snr_db",
                   number(e.logit_snr), "output_snr_keys_db", number(e.output_snr_keys), "output_snr_values_db",
                   number(e.output_snr_values), "output_snr_db", number(e.output_snr_both), "coded_mass", number(e.coded_mass));
}

static json_t *layer_to_json(const struct diagnose_result *r, int kv, int layer) {
  const struct head_sums sums = diagnose_layer(r, kv, layer);
  const struct head_sums *heads = r->sums + ((size_t)kv * (size_t)r->layers + (size_t)layer) * (size_t)r->query_heads;
  json_t *list = json_array(), *object = errors_to_json("layer", layer, &sums);
  for (int h = 0; h < r->query_heads; h++) append(&list, errors_to_json("head", h, &heads[h]));
  if (object && json_object_set_new(object, "heads", list) == 0) return object;
  if (!object) json_decref(list);
  json_decref(object);
  return NULL;
}

json_t *diagnose_errors_to_json(const struct diagnose_result *r) {
  json_t *types = json_array();
  for (int i = 0; i < r->count; i++) {
    json_t *layers = json_array();
    for (int layer = 0; layer < r->layers; layer++) append(&layers, layer_to_json(r, i, layer));
    append(&types, json_pack("{s:s, s:o}", "kv", r->kv[i], "layers", layers));
  }
  return types;
}

/* [layers][kv_heads][head_dim] */
static json_t *spectrum_to_json(const struct diagnose_result *r, enum spectrum which) {
  const size_t places = (size_t)r->layers * (size_t)r->kv_heads, d = (size_t)r->head_dim;
  json_t *layers = json_array();
  for (int layer = 0; layer < r->layers; layer++) {
    json_t *heads = json_array();
    for (int h = 0; h < r->kv_heads; h++) {
      const size_t place = (size_t)layer * (size_t)r->kv_heads + (size_t)h;
      append(&heads, numbers(r->eigenvalues + ((size_t)which * places + place) * d, r->head_dim));
    }
    append(&layers, heads);
  }
  return layers;
}

static json_t *crumbs_to_json(const struct diagnose_result *r) {
  json_t *types = json_array();
  for (int i = 0; i < r->count; i++) {
    json_t *layers = json_array();
    for (int layer = 0; layer < r->layers; layer++)
      append(&layers, numbers(r->crumbs + ((size_t)i * (size_t)r->layers + (size_t)layer) * (size_t)r->head_dim, r->head_dim));
    append(&types, json_pack("{s:s, s:o}", "kv", r->kv[i], "layers", layers));
  }
  return types;
}

static json_t *diagnosis_to_json(const struct report *report) {
  const struct diagnose_result *r = report->diagnosis;
  const struct diagnose_options *o = &report->diagnose_options;
  if (!r) return json_null();
  return json_pack("{s:o, s:i, s:I, s:I, s:i, s:i, s:i, s:o, s:o, s:{s:o, s:o, s:o, s:o}}", "command",
                   text(report->diagnose_command), "context", o->context, "tokens", (json_int_t)r->tokens, "samples",
                   (json_int_t)r->samples, "every", o->stride, "sink_tokens", o->sink_pages * OSCAR_PAGE_TOKENS, "recent_tokens",
                   o->recent_pages * OSCAR_PAGE_TOKENS, "errors", diagnose_errors_to_json(r), "key_crumbs", crumbs_to_json(r),
                   "eigenvalues", "queries", spectrum_to_json(r, SPECTRUM_QUERIES), "keys", spectrum_to_json(r, SPECTRUM_KEYS),
                   "logits", spectrum_to_json(r, SPECTRUM_LOGITS), "values", spectrum_to_json(r, SPECTRUM_VALUES));
}

/* ---- the whole ---- */

static json_t *task_to_json(const struct report_task *t) {
  return json_pack("{s:s, s:i, s:s, s:i, s:i, s:o, s:o, s:o}", "task", t->task, "length", t->length, "kv", t->kv, "right",
                   t->right, "total", t->total, "low", number(t->low), "high", number(t->high), "bf16_right",
                   t->bf16_right < 0 ? json_null() : json_integer(t->bf16_right));
}

json_t *report_to_json(const struct report *report) {
  json_t *qualities = json_array(), *tasks = json_array();
  for (int i = 0; i < report->qualities; i++) append(&qualities, quality_to_json(&report->quality[i]));
  for (int i = 0; i < report->tasks; i++) append(&tasks, task_to_json(&report->task[i]));
  return json_pack("{s:s, s:s, s:s, s:{s:o, s:s}, s:{s:o, s:I, s:s}, s:o, s:o, s:o, s:o}", "program", "oscar", "version",
                   oscar_version(), "suite", report->suite, "model", "name", text(report->model_name), "fingerprint",
                   report->fingerprint, "text", "name", text(report->text_name), "bytes", (json_int_t)report->text_bytes,
                   "sha256", report->text_sha256, "quality", qualities, "diagnostics", diagnosis_to_json(report), "task_command",
                   report->task_command ? text(report->task_command) : json_null(), "tasks", tasks);
}
