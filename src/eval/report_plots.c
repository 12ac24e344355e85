/* report_plots.c - which pictures a report has, and the numbers that go into each. */
#include "eval/report.h"

#include "base/sort.h"
#include "eval/plot.h"

#include <limits.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { SERIES_ROOM = 24 };

struct drawing {
  oscar_context *context;
  const struct report *report;
  const char *folder;
  struct picture_list *drawn;
};

oscar_status report_path(oscar_context *context, const char *folder, const char *name, char *path, size_t room) {
  int n = snprintf(path, room, "%s/%s", folder, name);
  if (n >= 0 && (size_t)n < room) return OSCAR_OK;
  return set_error(context, OSCAR_IO, "%s: the path of %s in it is longer than %zu bytes", folder, name, room - 1);
}

/* Names of KV types and tasks become parts of file names. */
static void file_name(const char *prefix, const char *text, char *name, size_t room) {
  int used = snprintf(name, room, "%s", prefix);
  for (const char *c = text; *c && (size_t)used + 5 < room; c++) {
    const bool plain = (*c >= 'a' && *c <= 'z') || (*c >= 'A' && *c <= 'Z') || (*c >= '0' && *c <= '9') || strchr("-.@_", *c);
    name[used++] = plain ? *c : '_';
  }
  snprintf(name + used, room - (size_t)used, ".svg");
}

static void keep(const struct drawing *x, enum picture what, int index, const char *name, const char *title) {
  struct picture_list *list = x->drawn;
  if (list->count == (int)ARRAY_LENGTH(list->picture)) return;
  list->picture[list->count].what = what;
  list->picture[list->count].index = index;
  snprintf(list->picture[list->count].name, sizeof list->picture[0].name, "%s", name);
  snprintf(list->picture[list->count].title, sizeof list->picture[0].title, "%s", title);
  list->count++;
}

static oscar_status draw_chart(const struct drawing *x, enum picture what, int index, const char *name,
                               const struct plot_chart *chart) {
  char path[PATH_MAX];
  oscar_status status = report_path(x->context, x->folder, name, path, sizeof path);
  if (status == OSCAR_OK) status = plot_chart_write(x->context, chart, path);
  if (status == OSCAR_OK) keep(x, what, index, name, chart->title);
  return status;
}

static oscar_status draw_heatmap(const struct drawing *x, enum picture what, int index, const char *name,
                                 const struct plot_heatmap *map) {
  char path[PATH_MAX];
  oscar_status status = report_path(x->context, x->folder, name, path, sizeof path);
  if (status == OSCAR_OK) status = plot_heatmap_write(x->context, map, path);
  if (status == OSCAR_OK) keep(x, what, index, name, map->title);
  return status;
}

/* ---- quality: KL against bits ---- */

static oscar_status draw_quality(const struct drawing *x, int index) {
  const struct eval_result *r = x->report->quality[index].result;
  struct plot_series series[SERIES_ROOM];
  double ends[SERIES_ROOM][2];
  char name[96], title[96];
  int count = 0;
  for (int i = 0; i < r->runs && count < SERIES_ROOM; i++) {
    const struct eval_run *run = &r->run[i];
    if (!(run->kld_mean > 0)) continue; /* bf16 */
    ends[count][0] = run->kld_mean - run->kld_se;
    ends[count][1] = run->kld_mean + run->kld_se;
    series[count] =
        (struct plot_series){run->kv, PLOT_POINTS, 1, &run->bits_per_element, &run->kld_mean, &ends[count][0], &ends[count][1]};
    count++;
  }
  if (count == 0) return OSCAR_OK;
  snprintf(name, sizeof name, "quality-%d.svg", r->context);
  snprintf(title, sizeof title, "KL divergence against cache size, windows of %d tokens", r->context);
  const struct plot_chart chart = {.title = title,
                                   .x = {.label = "bits per element, everything counted"},
                                   .y = {.label = "mean KL from BF16 [nats]", .log = true},
                                   .count = count,
                                   .series = series};
  return draw_chart(x, PICTURE_QUALITY, index, name, &chart);
}

/* ---- diagnostics ---- */

static double logit_snr(const struct head_sums *sums) { return head_errors_of(sums).logit_snr; }
static double output_snr(const struct head_sums *sums) { return head_errors_of(sums).output_snr_both; }

/* A line of `measure` over the layers for each KV type. */
static oscar_status draw_layers(const struct drawing *x, const char *name, const char *title,
                                double (*measure)(const struct head_sums *)) {
  const struct diagnose_result *r = x->report->diagnosis;
  const size_t layers = (size_t)r->layers;
  const int count = r->count < SERIES_ROOM ? r->count : SERIES_ROOM;
  struct plot_series series[SERIES_ROOM];
  double *at = mem_alloc(x->context, layers * ((size_t)count + 1), sizeof *at);
  if (!at) return OSCAR_NO_MEMORY;
  for (int layer = 0; layer < r->layers; layer++) at[layer] = layer;
  for (int i = 0; i < count; i++) {
    double *y = at + layers * ((size_t)i + 1);
    for (int layer = 0; layer < r->layers; layer++) {
      const struct head_sums sums = diagnose_layer(r, i, layer);
      y[layer] = measure(&sums);
    }
    series[i] = (struct plot_series){r->kv[i], PLOT_LINE_POINTS, r->layers, at, y, NULL, NULL};
  }
  const struct plot_chart chart = {.title = title,
                                   .x = {.label = "layer", .low = -0.5, .high = r->layers - 0.5},
                                   .y = {.label = "SNR [dB]"},
                                   .count = count,
                                   .series = series};
  oscar_status status = draw_chart(x, PICTURE_LAYERS, 0, name, &chart);
  mem_free(x->context, at);
  return status;
}

static oscar_status draw_heads(const struct drawing *x, int kv) {
  const struct diagnose_result *r = x->report->diagnosis;
  const size_t cells = (size_t)r->layers * (size_t)r->query_heads;
  char name[96], title[96];
  double *values = mem_alloc(x->context, cells, sizeof *values);
  if (!values) return OSCAR_NO_MEMORY;
  for (size_t i = 0; i < cells; i++) values[i] = output_snr(&r->sums[(size_t)kv * cells + i]);
  file_name("heads-", r->kv[kv], name, sizeof name);
  snprintf(title, sizeof title, "%s: attention output", r->kv[kv]);
  const struct plot_heatmap map = {.title = title,
                                   .x = {.label = "query head"},
                                   .y = {.label = "layer"},
                                   .scale = "SNR [dB]",
                                   .rows = r->layers,
                                   .columns = r->query_heads,
                                   .values = values};
  oscar_status status = draw_heatmap(x, PICTURE_HEADS, kv, name, &map);
  mem_free(x->context, values);
  return status;
}

/* Where all channels have the same number of crumbs there is nothing to see. */
static oscar_status draw_crumbs(const struct drawing *x, int kv) {
  const struct diagnose_result *r = x->report->diagnosis;
  const size_t cells = (size_t)r->layers * (size_t)r->head_dim;
  const double *crumbs = r->crumbs + (size_t)kv * cells;
  char name[96], title[96];
  bool even = true;
  for (size_t i = 1; i < cells && even; i++) even = crumbs[i] == crumbs[0];
  if (even) return OSCAR_OK;
  file_name("crumbs-", r->kv[kv], name, sizeof name);
  snprintf(title, sizeof title, "%s: 2-bit digits of each key channel, mean over the KV heads", r->kv[kv]);
  const struct plot_heatmap map = {.title = title,
                                   .x = {.label = "channel of the code"},
                                   .y = {.label = "layer"},
                                   .scale = "crumbs",
                                   .rows = r->layers,
                                   .columns = r->head_dim,
                                   .values = crumbs};
  return draw_heatmap(x, PICTURE_CRUMBS, kv, name, &map);
}

/* Sorts. */
static double median(double *x, size_t n) {
  if (n == 0) return (double)NAN;
  sort_doubles(x, n);
  return n % 2 ? x[n / 2] : (x[n / 2 - 1] + x[n / 2]) / 2;
}

static size_t places_of(const struct diagnose_result *r) { return (size_t)r->layers * (size_t)r->kv_heads; }
static const double *eigenvalues_of(const struct diagnose_result *r, enum spectrum which, size_t place) {
  return r->eigenvalues + ((size_t)which * places_of(r) + place) * (size_t)r->head_dim;
}

double spectrum_participation(const struct diagnose_result *r, enum spectrum which) {
  const size_t places = places_of(r);
  double *ratio = malloc(places * sizeof *ratio), result;
  size_t n = 0;
  if (!ratio) return (double)NAN;
  for (size_t place = 0; place < places; place++) {
    const double *values = eigenvalues_of(r, which, place);
    double sum = 0, squares = 0;
    for (int i = 0; i < r->head_dim; i++) {
      sum += values[i];
      squares += values[i] * values[i];
    }
    if (squares > 0) ratio[n++] = sum * sum / squares;
  }
  result = median(ratio, n);
  free(ratio);
  return result;
}

/* y [d]: the median over layers and heads of each eigenvalue, relative to the mean of its head. */
static void median_spectrum(const struct diagnose_result *r, enum spectrum which, double *scratch, double *y) {
  const size_t places = places_of(r);
  for (int i = 0; i < r->head_dim; i++) {
    size_t n = 0;
    for (size_t place = 0; place < places; place++) {
      const double *values = eigenvalues_of(r, which, place);
      double sum = 0;
      for (int k = 0; k < r->head_dim; k++) sum += values[k];
      if (sum > 0) scratch[n++] = values[i] * r->head_dim / sum;
    }
    y[i] = median(scratch, n);
  }
}

static oscar_status draw_spectra(const struct drawing *x) {
  static const char *const labels[SPECTRA] = {"queries", "keys", "logits", "values"};
  const struct diagnose_result *r = x->report->diagnosis;
  const size_t d = (size_t)r->head_dim;
  struct plot_series series[SPECTRA];
  double *at = mem_alloc(x->context, d * (SPECTRA + 1) + places_of(r), sizeof *at);
  if (!at) return OSCAR_NO_MEMORY;
  for (int i = 0; i < r->head_dim; i++) at[i] = i + 1;
  bool any = false;
  for (int s = 0; s < SPECTRA; s++) {
    double *y = at + d * ((size_t)s + 1);
    median_spectrum(r, (enum spectrum)s, at + d * (SPECTRA + 1), y);
    series[s] = (struct plot_series){labels[s], PLOT_LINE, r->head_dim, at, y, NULL, NULL};
    any = any || y[0] > 0;
  }
  const struct plot_chart chart = {.title = "Eigenvalues, median over layers and heads",
                                   .x = {.label = "eigenvalue", .low = 0, .high = r->head_dim + 1},
                                   .y = {.label = "relative to the mean of the head", .log = true},
                                   .count = SPECTRA,
                                   .series = series};
  oscar_status status = any ? draw_chart(x, PICTURE_SPECTRA, 0, "spectra.svg", &chart) : OSCAR_OK;
  mem_free(x->context, at);
  return status;
}

static oscar_status draw_diagnosis(const struct drawing *x) {
  const struct diagnose_result *r = x->report->diagnosis;
  oscar_status status = draw_layers(x, "layers-output.svg", "Attention output", output_snr);
  if (status == OSCAR_OK) status = draw_layers(x, "layers-logits.svg", "Logits over coded keys", logit_snr);
  for (int i = 0; i < r->count && status == OSCAR_OK; i++) status = draw_heads(x, i);
  for (int i = 0; i < r->count && status == OSCAR_OK; i++) status = draw_crumbs(x, i);
  return status == OSCAR_OK ? draw_spectra(x) : status;
}

/* ---- tasks: share right against length ---- */

enum { LENGTH_ROOM = 32 };

struct task_chart {
  const struct drawing *drawing;
  const char *task;
  int lengths, length[LENGTH_ROOM];
  char text[LENGTH_ROOM][16];
  const char *names[LENGTH_ROOM];
  int count;
  struct plot_series series[SERIES_ROOM];
  double x[SERIES_ROOM][LENGTH_ROOM], y[SERIES_ROOM][LENGTH_ROOM], low[SERIES_ROOM][LENGTH_ROOM], high[SERIES_ROOM][LENGTH_ROOM];
};

static int compare_ints(const void *a, const void *b) {
  const int x = *(const int *)a, y = *(const int *)b;
  return (x > y) - (x < y);
}

static bool is_of(const struct task_chart *c, int i) {
  const struct report_task *t = &c->drawing->report->task[i];
  return strcmp(t->task, c->task) == 0 && t->total > 0;
}

static void find_lengths(struct task_chart *c) {
  for (int i = 0; i < c->drawing->report->tasks; i++) {
    const int length = c->drawing->report->task[i].length;
    bool known = !is_of(c, i) || c->lengths == LENGTH_ROOM;
    for (int k = 0; k < c->lengths && !known; k++) known = c->length[k] == length;
    if (!known) c->length[c->lengths++] = length;
  }
  qsort(c->length, (size_t)c->lengths, sizeof *c->length, compare_ints);
  for (int k = 0; k < c->lengths; k++) {
    snprintf(c->text[k], sizeof c->text[k], "%d", c->length[k]);
    c->names[k] = c->text[k];
  }
}

static int place_of_length(const struct task_chart *c, int length) {
  for (int k = 0; k < c->lengths; k++)
    if (c->length[k] == length) return k;
  return -1;
}

/* A series whose numbers are still to come. */
static int open_series(struct task_chart *c, const char *label, bool intervals) {
  const int s = c->count++;
  for (int k = 0; k < c->lengths; k++) {
    c->x[s][k] = k;
    c->y[s][k] = c->low[s][k] = c->high[s][k] = (double)NAN;
  }
  c->series[s] = (struct plot_series){
      label, PLOT_LINE_POINTS, c->lengths, c->x[s], c->y[s], intervals ? c->low[s] : NULL, intervals ? c->high[s] : NULL};
  return s;
}

static void gather_bf16(struct task_chart *c) {
  const int s = open_series(c, "bf16", false);
  for (int i = 0; i < c->drawing->report->tasks; i++) {
    const struct report_task *t = &c->drawing->report->task[i];
    const int k = is_of(c, i) ? place_of_length(c, t->length) : -1;
    if (k >= 0 && t->bf16_right >= 0) c->y[s][k] = (double)t->bf16_right / t->total;
  }
}

static void gather_type(struct task_chart *c, const char *kv) {
  for (int s = 0; s < c->count; s++)
    if (strcmp(c->series[s].label, kv) == 0) return;
  if (c->count == SERIES_ROOM) return;
  const int s = open_series(c, kv, true);
  for (int i = 0; i < c->drawing->report->tasks; i++) {
    const struct report_task *t = &c->drawing->report->task[i];
    const int k = is_of(c, i) && strcmp(t->kv, kv) == 0 ? place_of_length(c, t->length) : -1;
    if (k < 0) continue;
    c->y[s][k] = (double)t->right / t->total;
    c->low[s][k] = t->low;
    c->high[s][k] = t->high;
  }
}

static oscar_status draw_task(const struct drawing *x, int first) {
  struct task_chart *c = mem_zalloc(x->context, 1, sizeof *c);
  if (!c) return OSCAR_NO_MEMORY;
  c->drawing = x;
  c->task = x->report->task[first].task;
  find_lengths(c);
  gather_bf16(c);
  for (int i = 0; i < x->report->tasks; i++)
    if (is_of(c, i)) gather_type(c, x->report->task[i].kv);
  /* beside each other, so that intervals can be told apart */
  for (int s = 0; s < c->count; s++)
    for (int k = 0; k < c->lengths; k++) c->x[s][k] += 0.05 * (s - (c->count - 1) / 2.0);
  char name[96];
  file_name("task-", c->task, name, sizeof name);
  const struct plot_chart chart = {
      .title = c->task,
      .x = {.label = "length [tokens]", .low = -0.5, .high = c->lengths - 0.5, .names = c->names, .n_names = c->lengths},
      .y = {.label = "share right", .low = 0, .high = 1.02},
      .count = c->count,
      .series = c->series};
  oscar_status status = c->lengths ? draw_chart(x, PICTURE_TASK, first, name, &chart) : OSCAR_OK;
  mem_free(x->context, c);
  return status;
}

static bool is_first_of_task(const struct report *report, int i) {
  for (int k = 0; k < i; k++)
    if (strcmp(report->task[k].task, report->task[i].task) == 0) return false;
  return true;
}

oscar_status report_draw(oscar_context *context, const struct report *report, const char *folder, struct picture_list *drawn) {
  const struct drawing x = {context, report, folder, drawn};
  drawn->count = 0;
  oscar_status status = OSCAR_OK;
  for (int i = 0; i < report->qualities && status == OSCAR_OK; i++) status = draw_quality(&x, i);
  if (status == OSCAR_OK && report->diagnosis) status = draw_diagnosis(&x);
  for (int i = 0; i < report->tasks && status == OSCAR_OK; i++)
    if (is_first_of_task(report, i)) status = draw_task(&x, i);
  return status;
}
