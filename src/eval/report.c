/*
 * report.c - the Markdown of a report, and the order in which its files are written: pictures, JSON, text.
 *
 * Names from outside (a model's, a text's) can hold anything; put_name keeps them from being markup or from breaking a table.
 */
#include "eval/report.h"

#include "base/file.h"
#include "base/sort.h"
#include "eval/plot.h"

#include <errno.h>
#include <limits.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

/* ---- pieces of Markdown ---- */

static void put_name(FILE *out, const char *text) {
  for (const char *c = text; *c; c++) {
    if (strchr("\\`*_<>[]|#!&", *c)) fputc('\\', out);
    fputc((unsigned char)*c < ' ' || *c == 0x7F ? ' ' : *c, out);
  }
}

/* An indented block: verbatim in Markdown. */
static void put_command(FILE *out, const char *command) {
  fputs("    ", out);
  for (const char *c = command; *c; c++) fputc((unsigned char)*c < ' ' ? ' ' : *c, out);
  fputs("\n\n", out);
}

static void put_picture(FILE *out, const struct picture_list *drawn, int i) {
  fputs("![", out);
  put_name(out, drawn->picture[i].title);
  fprintf(out, "](%s)\n\n", drawn->picture[i].name);
}

static void put_pictures(FILE *out, const struct picture_list *drawn, enum picture what) {
  for (int i = 0; i < drawn->count; i++)
    if (drawn->picture[i].what == what) put_picture(out, drawn, i);
}

static void put_decibels(FILE *out, double x) {
  if (isfinite(x))
    fprintf(out, "%.1f", x);
  else
    fputs(isnan(x) ? "–" : "exact", out);
}

/* ---- quality ---- */

static void put_run(FILE *out, const struct eval_run *run) {
  fputs("| ", out);
  put_name(out, run->kv);
  fprintf(out, " | %.3f | %.4f | %.5f ± %.5f | %.4f | %.2f %% | %.2f | %.1f MiB |\n", run->ppl, run->ppl_ratio, run->kld_mean,
          run->kld_se, run->kld_p99, 100 * run->top1, run->bits_per_element, (double)run->cache_bytes / (1 << 20));
}

static void put_quality(FILE *out, const struct report *report, int index, const struct picture_list *drawn) {
  const struct report_quality *q = &report->quality[index];
  const struct eval_result *r = q->result;
  const int recent = q->options.recent_pages * OSCAR_PAGE_TOKENS;
  fprintf(out, "### Windows of %d tokens\n\n", r->context);
  put_command(out, q->command);
  fprintf(
      out,
      "%lld tokens read, %lld positions scored, %lld of them counted for KL and top-1: those that read coded history. The first "
      "%d and\nthe last %d to %d tokens are exact.\n\n",
      (long long)r->tokens, (long long)r->scored, (long long)r->counted, q->options.sink_pages * OSCAR_PAGE_TOKENS, recent + 1,
      recent + OSCAR_PAGE_TOKENS);
  fputs("| cache | perplexity | ratio | mean KL ± standard error | 99 % KL | top-1 | bits | cache size |\n"
        "|---|---|---|---|---|---|---|---|\n",
        out);
  for (int i = 0; i < r->runs; i++) put_run(out, &r->run[i]);
  fputc('\n', out);
  for (int i = 0; i < drawn->count; i++)
    if (drawn->picture[i].what == PICTURE_QUALITY && drawn->picture[i].index == index) put_picture(out, drawn, i);
}

static void put_qualities(FILE *out, const struct report *report, const struct picture_list *drawn) {
  if (report->qualities == 0) return;
  fputs("## Perplexity and KL divergence\n\n"
        "Against the same model with a BF16 cache, over the same tokens, side by side in one pass: every layer sees the error of "
        "the\n"
        "layers below, as in real use. KL is in nats. `bits` counts everything that the cache holds at the end of a window, per "
        "element\nof K and V: codes, metadata and the exact windows. The standard error treats positions as independent.\n\n",
        out);
  for (int i = 0; i < report->qualities; i++) put_quality(out, report, i, drawn);
}

/* ---- diagnostics ---- */

enum { MEASURES = 5 };

static void measures_of(const struct head_sums *sums, double out[MEASURES]) {
  const struct head_errors e = head_errors_of(sums);
  const double all[MEASURES] = {e.logit_snr, e.output_snr_keys, e.output_snr_values, e.output_snr_both, e.coded_mass};
  memcpy(out, all, sizeof all);
}

/* The median over the layers where there is something to measure. scratch [layers] */
static double median_over_layers(const struct diagnose_result *r, int kv, int which, double *scratch) {
  size_t n = 0;
  for (int layer = 0; layer < r->layers; layer++) {
    const struct head_sums sums = diagnose_layer(r, kv, layer);
    double measures[MEASURES];
    measures_of(&sums, measures);
    if (!isnan(measures[which])) scratch[n++] = measures[which];
  }
  if (n == 0) return (double)NAN;
  sort_doubles(scratch, n);
  return n % 2 ? scratch[n / 2] : (scratch[n / 2 - 1] + scratch[n / 2]) / 2;
}

/* The place with the lowest SNR of the output; -1: none. */
static int worst_layer(const struct diagnose_result *r, int kv, double *snr) {
  int worst = -1;
  for (int layer = 0; layer < r->layers; layer++) {
    const struct head_sums sums = diagnose_layer(r, kv, layer);
    const double x = head_errors_of(&sums).output_snr_both;
    if (isnan(x) || (worst >= 0 && x >= *snr)) continue;
    worst = layer;
    *snr = x;
  }
  return worst;
}

static void put_type(FILE *out, const struct diagnose_result *r, int kv, double *scratch) {
  fputs("| ", out);
  put_name(out, r->kv[kv]);
  for (int i = 0; i < MEASURES - 1; i++) {
    fputs(" | ", out);
    put_decibels(out, median_over_layers(r, kv, i, scratch));
  }
  double snr = 0;
  const int worst = worst_layer(r, kv, &snr);
  fputs(" | ", out);
  put_decibels(out, worst < 0 ? (double)NAN : snr);
  if (worst >= 0) fprintf(out, " (layer %d)", worst);
  const double mass = median_over_layers(r, kv, MEASURES - 1, scratch);
  fputs(" | ", out);
  if (isnan(mass))
    fputs("–", out);
  else
    fprintf(out, "%.1f %%", 100 * mass);
  fputs(" |\n", out);
}

static void put_layers(FILE *out, const struct diagnose_result *r) {
  fputs("SNR of each layer in dB, logits / attention output:\n\n| layer |", out);
  for (int i = 0; i < r->count; i++) {
    fputc(' ', out);
    put_name(out, r->kv[i]);
    fputs(" |", out);
  }
  fputs("\n|---|", out);
  for (int i = 0; i < r->count; i++) fputs("---|", out);
  fputc('\n', out);
  for (int layer = 0; layer < r->layers; layer++) {
    fprintf(out, "| %d |", layer);
    for (int i = 0; i < r->count; i++) {
      const struct head_sums sums = diagnose_layer(r, i, layer);
      const struct head_errors e = head_errors_of(&sums);
      fputc(' ', out);
      put_decibels(out, e.logit_snr);
      fputs(" / ", out);
      put_decibels(out, e.output_snr_both);
      fputs(" |", out);
    }
    fputc('\n', out);
  }
  fputc('\n', out);
}

static void put_spectra(FILE *out, const struct diagnose_result *r, const struct picture_list *drawn) {
  static const char *const what[SPECTRA] = {"queries: second moment M, not centred", "keys: covariance C",
                                            "logits: C (M + 5 % ridge), what each axis of the keys contributes to the logits",
                                            "values: covariance"};
  fprintf(out,
          "### Spectra\n\n"
          "Eigenvalues per layer and KV head, over the sampled queries and all keys and values behind the exact beginning. The\n"
          "participation ratio, (Σλ)² / Σλ², says how many of the %d axes carry a spectrum; medians over layers and heads.\n\n"
          "| spectrum | participation ratio |\n|---|---|\n",
          r->head_dim);
  for (int i = 0; i < SPECTRA; i++) fprintf(out, "| %s | %.1f |\n", what[i], spectrum_participation(r, (enum spectrum)i));
  fputc('\n', out);
  put_pictures(out, drawn, PICTURE_SPECTRA);
  put_pictures(out, drawn, PICTURE_CRUMBS);
}

static void put_diagnosis(FILE *out, const struct report *report, const struct picture_list *drawn, double *scratch) {
  const struct diagnose_result *r = report->diagnosis;
  const struct diagnose_options *o = &report->diagnose_options;
  if (!r) return;
  fputs("## Where the errors arise\n\n", out);
  put_command(out, report->diagnose_command);
  fprintf(
      out,
      "Measured on the exact model's queries, keys and values, so no layer sees the error of another: %lld tokens in windows of "
      "%d,\nevery %d-th position that reads coded history (%lld). Logits: variance over a query's coded keys against the mean "
      "squared error.\nAttention output: its energy against that of its error, with only the keys, only the values, and both as "
      "codes. In dB: 10 dB\nare an error of a tenth of the energy. A layer is the sum of its heads; the table has medians over "
      "layers.\n\n",
      (long long)r->tokens, o->context, o->stride, (long long)r->samples);
  fputs("| cache | logits | output, keys coded | output, values coded | output | lowest output | attention on codes |\n"
        "|---|---|---|---|---|---|---|\n",
        out);
  for (int i = 0; i < r->count; i++) put_type(out, r, i, scratch);
  fputc('\n', out);
  put_pictures(out, drawn, PICTURE_LAYERS);
  put_layers(out, r);
  put_pictures(out, drawn, PICTURE_HEADS);
  put_spectra(out, r, drawn);
}

/* ---- tasks ---- */

static void put_tasks(FILE *out, const struct report *report, const struct picture_list *drawn) {
  if (report->tasks == 0) return;
  fputs("## Retrieval\n\n", out);
  if (report->task_command) put_command(out, report->task_command);
  fputs("Intervals are Wilson's.\n\n| task | length | cache | right | share | interval | bf16 |\n|---|---|---|---|---|---|---|\n",
        out);
  for (int i = 0; i < report->tasks; i++) {
    const struct report_task *t = &report->task[i];
    fputs("| ", out);
    put_name(out, t->task);
    fprintf(out, " | %d | ", t->length);
    put_name(out, t->kv);
    fprintf(out, " | %d of %d | %.1f %% | %.1f to %.1f %% | ", t->right, t->total, t->total ? 100.0 * t->right / t->total : 0,
            100 * t->low, 100 * t->high);
    if (t->bf16_right >= 0)
      fprintf(out, "%d of %d |\n", t->bf16_right, t->total);
    else
      fputs("– |\n", out);
  }
  fputc('\n', out);
  put_pictures(out, drawn, PICTURE_TASK);
}

/* ---- files ---- */

static void put_report(FILE *out, const struct report *report, const struct picture_list *drawn, double *scratch) {
  fputs("# Quality of the cache forms: ", out);
  put_name(out, report->model_name);
  fprintf(out, "\n\nWritten by oscar %s, suite `%s`. Model: ", oscar_version(), report->suite);
  put_name(out, report->model_name);
  fprintf(out, " (fingerprint %.16s). Text: ", report->fingerprint);
  put_name(out, report->text_name);
  fprintf(out, " (%zu bytes, SHA-256 %.16s). All numbers are in [report.json](report.json).\n\n", report->text_bytes,
          report->text_sha256);
  put_qualities(out, report, drawn);
  put_diagnosis(out, report, drawn, scratch);
  put_tasks(out, report, drawn);
}

static oscar_status write_markdown(oscar_context *context, const struct report *report, const struct picture_list *drawn,
                                   const char *folder) {
  char path[PATH_MAX];
  struct file_writer writer;
  double *scratch = mem_alloc(context, report->diagnosis ? (size_t)report->diagnosis->layers : 1, sizeof *scratch);
  if (!scratch) return OSCAR_NO_MEMORY;
  oscar_status status = report_path(context, folder, "report.md", path, sizeof path);
  if (status == OSCAR_OK) status = file_writer_open(context, path, &writer);
  if (status == OSCAR_OK) {
    put_report(writer.stream, report, drawn, scratch);
    status = file_writer_commit(context, &writer);
  }
  mem_free(context, scratch);
  return status;
}

static oscar_status write_json(oscar_context *context, const struct report *report, const char *folder) {
  char path[PATH_MAX];
  struct file_writer writer;
  json_t *root = report_to_json(report);
  if (!root) return set_error(context, OSCAR_NO_MEMORY, "out of memory writing report.json");
  oscar_status status = report_path(context, folder, "report.json", path, sizeof path);
  if (status == OSCAR_OK) status = file_writer_open(context, path, &writer);
  if (status == OSCAR_OK) {
    if (json_dumpf(root, writer.stream, JSON_INDENT(1) | JSON_REAL_PRECISION(8)) == 0) {
      fputc('\n', writer.stream);
      status = file_writer_commit(context, &writer);
    } else {
      status = set_error(context, OSCAR_IO, "%s: cannot be written: %s", path, strerror(errno));
      file_writer_abort(context, &writer);
    }
  }
  json_decref(root);
  return status;
}

oscar_status report_prepare(oscar_context *context, const char *folder) {
  char path[PATH_MAX];
  struct file_writer writer;
  oscar_status status = file_make_folders(context, folder);
  if (status == OSCAR_OK) status = report_path(context, folder, "report.md", path, sizeof path);
  if (status == OSCAR_OK) status = file_writer_open(context, path, &writer);
  if (status != OSCAR_OK) return status;
  file_writer_abort(context, &writer);
  return plot_check(context);
}

oscar_status report_write(oscar_context *context, const struct report *report, const char *folder) {
  struct picture_list *drawn = mem_alloc(context, 1, sizeof *drawn);
  if (!drawn) return OSCAR_NO_MEMORY;
  oscar_status status = report_draw(context, report, folder, drawn);
  if (status == OSCAR_OK) status = write_json(context, report, folder);
  if (status == OSCAR_OK) status = write_markdown(context, report, drawn, folder);
  mem_free(context, drawn);
  return status;
}
