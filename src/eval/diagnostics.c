/*
 * diagnostics.c - one head's errors, as matrix products.
 *
 * Sampled queries are taken in blocks; a block of R rows (query, query head) against the m keys up to its last position gives
 *     S = scale Q K',  E = scale Q dK'           dK, dV: decoded minus exact rows, of the coded range only
 *     P = softmax(S),  D = softmax(S + E) - P    row by row, with the row's own coded range and causality
 *     o = P V,  o'-o = D V (keys),  Pc dV (values),  D V + P'c dV (both)
 * where Pc and P'c are P and P' on the row's coded keys and zero elsewhere. Errors are computed as differences from the start, so
 * a high SNR is not lost in rounding. Products run in BLAS; entries outside a row's range are zero.
 */
#include "eval/diagnostics.h"

#include <cblas.h>
#include <math.h>
#include <string.h>

enum { BLOCK_SAMPLES = 16 };

/* What one row of a block adds to the sums of its head. */
struct row_sums {
  int64_t pairs;
  double logit_signal, logit_error, coded_mass;
};

struct head_work {
  oscar_context *context;
  const struct head_view *view;
  float scale;
  int coded_begin, coded_end; /* rows that some sampled query reads as codes */
  float *dk, *dv;             /* [coded_end - coded_begin][d] */
  float *p, *difference;      /* [rows][keys]: S, then P; D */
  float *e, *p_coded;         /* [rows][coded]: E, then P'c; Pc */
  float *o, *error[3];        /* [rows][d] output; its error by keys, values, both */
  struct row_sums *row;       /* [rows] */
};

enum { BY_KEYS, BY_VALUES, BY_BOTH };

/* The one place that codes rows: `position` is that of the first. */
static oscar_status code_and_decode(const oscar_codec *codec, int64_t position, int n, const float *x, int head_dim,
                                    uint8_t *rows, float *decoded) {
  oscar_status status = oscar_codec_encode(codec, position, n, x, (size_t)head_dim, rows);
  if (status == OSCAR_OK) oscar_codec_decode(codec, position, n, rows, decoded, (size_t)head_dim);
  return status;
}

/* delta [coded][d] = decoded rows - exact rows. */
static oscar_status rows_error(const struct head_work *w, const oscar_codec *codec, const char *side, const float *x,
                               float *delta) {
  const int d = w->view->head_dim, n = w->coded_end - w->coded_begin;
  const float *exact = x + (size_t)w->coded_begin * (size_t)d;
  uint8_t *rows = mem_alloc(w->context, (size_t)n, oscar_codec_row_bytes(codec));
  if (!rows) return OSCAR_NO_MEMORY;
  oscar_status status = code_and_decode(codec, w->coded_begin, n, exact, d, rows, delta);
  mem_free(w->context, rows);
  if (status != OSCAR_OK) return prefix_error(w->context, status, "%s", side);
  for (size_t i = 0; i < (size_t)n * (size_t)d; i++) delta[i] -= exact[i];
  return OSCAR_OK;
}

/* ---- the reading rule ---- */

/* The rows that a query at t reads as codes: *begin .. *end - 1. */
static void coded_range(const struct head_view *view, int t, int *begin, int *end) {
  *begin = view->sink_pages * OSCAR_PAGE_TOKENS;
  *end = (t / OSCAR_PAGE_TOKENS - view->recent_pages) * OSCAR_PAGE_TOKENS;
  if (view->window > 0 && t - view->window + 1 > *begin) *begin = t - view->window + 1;
  if (*end < *begin) *end = *begin;
}

static bool reads_codes(const struct head_view *view, int t) {
  int begin, end;
  coded_range(view, t, &begin, &end);
  return begin < end;
}

/* ---- a row: from S and E to P, D, Pc, P'c ---- */

static void measure_logits(const float *s, const float *e, int n, struct row_sums *row) {
  double mean = 0;
  for (int j = 0; j < n; j++) mean += (double)s[j];
  mean /= n;
  row->pairs = n;
  for (int j = 0; j < n; j++) {
    row->logit_signal += ((double)s[j] - mean) * ((double)s[j] - mean);
    row->logit_error += (double)e[j] * (double)e[j];
  }
}

/* s [keys] of a query at t, e and p_coded [coded] beginning at row coded_begin. */
static void finish_row(const struct head_work *w, int t, int keys, int coded, float *s, float *difference, float *e,
                       float *p_coded, struct row_sums *row) {
  const struct head_view *view = w->view;
  const int low = view->window > 0 && t - view->window + 1 > 0 ? t - view->window + 1 : 0, high = t + 1;
  int begin, end;
  coded_range(view, t, &begin, &end);
  *row = (struct row_sums){0};
  measure_logits(s + begin, e + (begin - w->coded_begin), end - begin, row);

  float top = s[low], top_coded = s[low];
  for (int j = low; j < high; j++) {
    if (s[j] > top) top = s[j];
    const float changed = j >= begin && j < end ? s[j] + e[j - w->coded_begin] : s[j];
    if (changed > top_coded) top_coded = changed;
  }
  double sum = 0, sum_coded = 0;
  for (int j = low; j < high; j++) {
    const float changed = j >= begin && j < end ? s[j] + e[j - w->coded_begin] : s[j];
    s[j] = expf(s[j] - top);
    difference[j] = expf(changed - top_coded); /* of p' for now */
    sum += (double)s[j];
    sum_coded += (double)difference[j];
  }
  const float share = (float)(1 / sum), share_coded = (float)(1 / sum_coded);
  memset(p_coded, 0, (size_t)coded * sizeof *p_coded);
  memset(e, 0, (size_t)coded * sizeof *e);
  for (int j = low; j < high; j++) {
    const float p = s[j] * share, changed = difference[j] * share_coded;
    s[j] = p;
    difference[j] = changed - p;
    if (j < begin || j >= end) continue;
    p_coded[j - w->coded_begin] = p;
    e[j - w->coded_begin] = changed;
    row->coded_mass += (double)p;
  }
  memset(s, 0, (size_t)low * sizeof *s);
  memset(difference, 0, (size_t)low * sizeof *difference);
  memset(s + high, 0, (size_t)(keys - high) * sizeof *s);
  memset(difference + high, 0, (size_t)(keys - high) * sizeof *difference);
}

/* ---- a block ---- */

/* s [rows][keys] = factor q k'; o [rows][d] = p v + beta o */
static void logits_of(float factor, int rows, int keys, int d, const float *q, const float *k, float *s) {
  cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, rows, keys, d, factor, q, d, k, d, 0, s, keys);
}
static void mix(int rows, int keys, int d, const float *p, const float *v, float beta, float *o) {
  cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, rows, d, keys, 1, p, keys, v, d, beta, o, d);
}

static double energy(const float *x, int n) {
  double sum = 0;
  for (int i = 0; i < n; i++) sum += (double)x[i] * (double)x[i];
  return sum;
}

static void add_row(const struct head_work *w, int r, struct head_sums *sums) {
  const int d = w->view->head_dim;
  const size_t at = (size_t)r * (size_t)d;
  sums->queries++;
  sums->pairs += w->row[r].pairs;
  sums->logit_signal += w->row[r].logit_signal;
  sums->logit_error += w->row[r].logit_error;
  sums->coded_mass += w->row[r].coded_mass;
  sums->output_signal += energy(w->o + at, d);
  sums->output_error_keys += energy(w->error[BY_KEYS] + at, d);
  sums->output_error_values += energy(w->error[BY_VALUES] + at, d);
  sums->output_error_both += energy(w->error[BY_BOTH] + at, d);
}

/* Samples first .. first + n - 1, all of which read codes. */
static void run_block(const struct head_work *w, int first, int n, struct head_sums *sums) {
  const struct head_view *view = w->view;
  const int d = view->head_dim, rows = n * view->group, keys = view->positions[first + n - 1] + 1;
  const int last = (keys - 1) / OSCAR_PAGE_TOKENS - view->recent_pages, coded = last * OSCAR_PAGE_TOKENS - w->coded_begin;
  const float *q = view->q + (size_t)first * (size_t)view->group * (size_t)d;
  logits_of(w->scale, rows, keys, d, q, view->k, w->p);
  logits_of(w->scale, rows, coded, d, q, w->dk, w->e);
#pragma omp parallel for schedule(static) num_threads(w->context->options.threads)
  for (int r = 0; r < rows; r++) {
    const size_t at = (size_t)r * (size_t)keys, coded_at = (size_t)r * (size_t)coded;
    finish_row(w, view->positions[first + r / view->group], keys, coded, w->p + at, w->difference + at, w->e + coded_at,
               w->p_coded + coded_at, &w->row[r]);
  }
  mix(rows, keys, d, w->p, view->v, 0, w->o);
  mix(rows, keys, d, w->difference, view->v, 0, w->error[BY_KEYS]);
  mix(rows, coded, d, w->p_coded, w->dv, 0, w->error[BY_VALUES]);
  memcpy(w->error[BY_BOTH], w->error[BY_KEYS], (size_t)rows * (size_t)d * sizeof *w->o);
  mix(rows, coded, d, w->e, w->dv, 1, w->error[BY_BOTH]);
  for (int r = 0; r < rows; r++) add_row(w, r, &sums[r % view->group]);
}

/* ---- a head ---- */

static bool allocate(struct head_work *w) {
  const struct head_view *view = w->view;
  const size_t d = (size_t)view->head_dim, coded = (size_t)(w->coded_end - w->coded_begin);
  const size_t rows = (size_t)BLOCK_SAMPLES * (size_t)view->group, keys = (size_t)view->positions[view->samples - 1] + 1;
  bool all = (w->dk = mem_alloc(w->context, coded * d, sizeof *w->dk)) &&
             (w->dv = mem_alloc(w->context, coded * d, sizeof *w->dv)) &&
             (w->p = mem_alloc(w->context, rows * keys, sizeof *w->p)) &&
             (w->difference = mem_alloc(w->context, rows * keys, sizeof *w->difference)) &&
             (w->e = mem_alloc(w->context, rows * coded, sizeof *w->e)) &&
             (w->p_coded = mem_alloc(w->context, rows * coded, sizeof *w->p_coded)) &&
             (w->o = mem_alloc(w->context, rows * d, sizeof *w->o)) && (w->row = mem_alloc(w->context, rows, sizeof *w->row));
  for (int i = 0; all && i < 3; i++) all = (w->error[i] = mem_alloc(w->context, rows * d, sizeof *w->error[i]));
  return all;
}

static void release(struct head_work *w) {
  void *const owned[] = {w->dk, w->dv,  w->p,        w->difference, w->e,       w->p_coded,
                         w->o,  w->row, w->error[0], w->error[1],   w->error[2]};
  for (size_t i = 0; i < ARRAY_LENGTH(owned); i++) mem_free(w->context, owned[i]);
}

static void run_blocks(const struct head_work *w, struct head_sums *sums) {
  const struct head_view *view = w->view;
  int first = 0;
  while (first < view->samples) {
    if (!reads_codes(view, view->positions[first])) {
      first++;
      continue;
    }
    int n = 1;
    while (n < BLOCK_SAMPLES && first + n < view->samples && reads_codes(view, view->positions[first + n])) n++;
    run_block(w, first, n, sums);
    first += n;
  }
}

oscar_status diagnose_head(oscar_context *context, const struct head_view *view, const oscar_codec *keys,
                           const oscar_codec *values, struct head_sums *sums) {
  struct head_work w = {.context = context, .view = view, .scale = view->scale};
  if (w.scale == 0) w.scale = 1 / sqrtf((float)view->head_dim);
  if (view->samples < 1) return OSCAR_OK;
  w.coded_begin = view->sink_pages * OSCAR_PAGE_TOKENS;
  w.coded_end = (view->positions[view->samples - 1] / OSCAR_PAGE_TOKENS - view->recent_pages) * OSCAR_PAGE_TOKENS;
  if (w.coded_end <= w.coded_begin) return OSCAR_OK;
  oscar_status status = allocate(&w) ? OSCAR_OK : OSCAR_NO_MEMORY;
  if (status == OSCAR_OK) status = rows_error(&w, keys, "keys", view->k, w.dk);
  if (status == OSCAR_OK) status = rows_error(&w, values, "values", view->v, w.dv);
  if (status == OSCAR_OK) run_blocks(&w, sums);
  release(&w);
  return status;
}

/* ---- sums ---- */

void head_sums_add(struct head_sums *to, const struct head_sums *from) {
  to->queries += from->queries;
  to->pairs += from->pairs;
  to->logit_signal += from->logit_signal;
  to->logit_error += from->logit_error;
  to->output_signal += from->output_signal;
  to->output_error_keys += from->output_error_keys;
  to->output_error_values += from->output_error_values;
  to->output_error_both += from->output_error_both;
  to->coded_mass += from->coded_mass;
}

static double decibels(double signal, double error) {
  if (error > 0) return 10 * log10(signal / error);
  return signal > 0 ? (double)INFINITY : (double)NAN;
}

struct head_errors head_errors_of(const struct head_sums *s) {
  if (s->queries == 0) return (struct head_errors){(double)NAN, (double)NAN, (double)NAN, (double)NAN, (double)NAN};
  return (struct head_errors){
      .logit_snr = decibels(s->logit_signal, s->logit_error),
      .output_snr_keys = decibels(s->output_signal, s->output_error_keys),
      .output_snr_values = decibels(s->output_signal, s->output_error_values),
      .output_snr_both = decibels(s->output_signal, s->output_error_both),
      .coded_mass = s->coded_mass / (double)s->queries,
  };
}
