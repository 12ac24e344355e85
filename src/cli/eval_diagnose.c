/* eval_diagnose.c - `oscar eval --diagnose`: the errors of each layer and head, measured and printed. */
#include "cli/eval_job.h"
#include "eval/report.h"

#include <math.h>

enum { DEFAULT_CONTEXT = 4096 };

void job_diagnose_options(const struct job *job, int context, int64_t tokens, int every, struct diagnose_options *o) {
  const struct eval_request *r = job->request;
  diagnose_options_default(o);
  o->context = context;
  o->tokens = tokens;
  o->stride = every;
  o->chunk = r->chunk;
  o->sink_pages = r->sink / OSCAR_PAGE_TOKENS;
  o->recent_pages = r->recent / OSCAR_PAGE_TOKENS;
}

oscar_status job_diagnose(const struct job *job, const struct diagnose_options *o, struct diagnose_result *result) {
  progress_begin(job->line);
  return eval_diagnose(job->m->model, o, job->ids, job->count, job->list->count, job->list->names, job->list->sets,
                       &job->line->progress, result);
}

/* ---- --diagnose: printed ---- */

static void print_decibels(double x) {
  if (isfinite(x))
    printf(" %8.1f", x);
  else
    printf(" %8s", isnan(x) ? "-" : "exact");
}

static void print_type(const struct diagnose_result *r, int kv) {
  printf("\n%s\n%5s %8s %8s %8s %8s %16s %9s\n", r->kv[kv], "layer", "logits", "keys", "values", "both", "lowest head",
         "on codes");
  for (int layer = 0; layer < r->layers; layer++) {
    const struct head_sums *heads = r->sums + ((size_t)kv * (size_t)r->layers + (size_t)layer) * (size_t)r->query_heads;
    const struct head_sums sums = diagnose_layer(r, kv, layer);
    const struct head_errors e = head_errors_of(&sums);
    int worst = -1;
    double lowest = (double)NAN;
    for (int h = 0; h < r->query_heads; h++) {
      const double snr = head_errors_of(&heads[h]).output_snr_both;
      if (isnan(snr) || snr >= lowest) continue;
      lowest = snr;
      worst = h;
    }
    printf("%5d", layer);
    print_decibels(e.logit_snr);
    print_decibels(e.output_snr_keys);
    print_decibels(e.output_snr_values);
    print_decibels(e.output_snr_both);
    print_decibels(lowest);
    printf(" (%4d) %7.1f %%\n", worst, 100 * e.coded_mass);
  }
}

static void print_table(const struct job *job, const struct diagnose_options *o, const struct diagnose_result *r) {
  printf("%s, windows of %d tokens: %lld tokens, queries at every %d-th position that reads coded history (%lld)\n"
         "SNR in dB: logits over coded keys; attention output with keys, values and both as codes\n",
         model_geometry_of(job->m->model)->name, o->context, (long long)r->tokens, o->stride, (long long)r->samples);
  for (int i = 0; i < r->count; i++) print_type(r, i);
}

static void print_json(const struct job *job, const struct diagnose_options *o, const struct diagnose_result *r) {
  json_t *root = json_pack("{s:s, s:i, s:I, s:I, s:i, s:o}", "model", model_geometry_of(job->m->model)->name, "context",
                           o->context, "tokens", (json_int_t)r->tokens, "samples", (json_int_t)r->samples, "every", o->stride,
                           "errors", diagnose_errors_to_json(r));
  json_dumpf(root, stdout, JSON_INDENT(1) | JSON_REAL_PRECISION(8));
  putchar('\n');
  json_decref(root);
}

oscar_status job_print_diagnosis(const struct job *job, int every) {
  const struct eval_request *r = job->request;
  struct diagnose_options o;
  struct diagnose_result result;
  job_diagnose_options(job, r->context ? r->context : DEFAULT_CONTEXT, r->tokens, every, &o);
  oscar_status status = job_diagnose(job, &o, &result);
  progress_end(job->line);
  if (status != OSCAR_OK) return status;
  if (r->json)
    print_json(job, &o, &result);
  else
    print_table(job, &o, &result);
  diagnose_result_free(job->m->context, &result);
  return OSCAR_OK;
}
