/*
 * eval/report.h - results of an evaluation as files: report.md to read, report.json to compute with, pictures. Private.
 *
 * The texts name no machine, path or time: the same results give the same files. Each is written beside its place, synced and
 * renamed; report.md comes last, so whoever sees a new one finds what it refers to.
 */
#ifndef OSCAR_REPORT_H
#define OSCAR_REPORT_H

#include "eval/diagnostics.h"
#include "eval/eval.h"

#include <jansson.h>

struct report_quality {
  const struct eval_result *result;
  struct eval_options options;
  const char *command; /* that gives these numbers */
};

/* One task at one length with one form of the cache. */
struct report_task {
  const char *task;
  int length; /* tokens */
  const char *kv;
  int right, total;
  double low, high; /* of the share that is right: Wilson's interval */
  int bf16_right;   /* of the same questions with the exact cache; -1: not asked */
};

/* Everything is borrowed. Parts that were not measured are left out of the files. */
struct report {
  const char *suite;
  const char *model_name, *fingerprint;
  const char *text_name, *text_sha256;
  size_t text_bytes;
  int qualities;
  const struct report_quality *quality;    /* [qualities] */
  const struct diagnose_result *diagnosis; /* NULL: none */
  struct diagnose_options diagnose_options;
  const char *diagnose_command;
  int tasks;
  const struct report_task *task; /* [tasks], in the order to show them */
  const char *task_command;
};

/* Makes the folder if need be and asks whether a report can be written into it: call before long work.
 * Errors: IO, UNSUPPORTED (no gnuplot), NO_MEMORY. */
oscar_status report_prepare(oscar_context *context, const char *folder);
/* Errors: as above. Files that were written before an error stay. */
oscar_status report_write(oscar_context *context, const struct report *report, const char *folder);

/* ---- as JSON (report_json.c); NULL: out of memory. Numbers that are not finite are null. ---- */
json_t *eval_runs_to_json(const struct eval_result *result);
/* [{kv, layers: [{layer, logit_snr_db, ..., heads: [...]}]}] */
json_t *diagnose_errors_to_json(const struct diagnose_result *result);
json_t *report_to_json(const struct report *report);

/* ---- parts of report_write (report_plots.c) ---- */
/* The pictures; names are given to `drawn` in the order they belong, so that the text can refer to those that exist. */
enum picture { PICTURE_QUALITY, PICTURE_LAYERS, PICTURE_HEADS, PICTURE_CRUMBS, PICTURE_SPECTRA, PICTURE_TASK };
struct picture_list {
  int count;
  struct {
    enum picture what;
    int index; /* of the quality, KV type or task (its first) that it shows */
    char name[96], title[96];
  } picture[96];
};
oscar_status report_draw(oscar_context *context, const struct report *report, const char *folder, struct picture_list *drawn);

/* folder/name into path; IO if it is too long. */
oscar_status report_path(oscar_context *context, const char *folder, const char *name, char *path, size_t room);

/* (sum of eigenvalues)^2 / sum of their squares: how many axes carry a spectrum; the median over layers and heads. */
double spectrum_participation(const struct diagnose_result *result, enum spectrum which);

#endif
