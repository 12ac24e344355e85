/*
 * eval/plot.h - pictures as SVG files, drawn by gnuplot. Private.
 *
 * gnuplot (a program, Debian: gnuplot-nox) reads what a picture holds and writes it; nothing here draws. Text in the files is
 * text, labels are taken literally (no markup), and a file appears whole or not at all (base/file.h). Numbers that are not
 * finite, and on a logarithmic axis numbers <= 0, are left out.
 */
#ifndef OSCAR_PLOT_H
#define OSCAR_PLOT_H

#include "base/base.h"

struct plot_axis {
  const char *label;
  bool log;
  double low, high;         /* the range; equal: from the data */
  const char *const *names; /* [n_names] of the places 0, 1, ...; NULL: numbers */
  int n_names;
};

enum plot_style { PLOT_POINTS, PLOT_LINE, PLOT_LINE_POINTS, PLOT_BARS };

struct plot_series {
  const char *label; /* in the legend; NULL: none */
  enum plot_style style;
  int count;
  const double *x, *y;      /* [count]; bars of several series at one x stand side by side, x in steps of 1 */
  const double *low, *high; /* [count] ends of error bars; NULL: none */
};

struct plot_chart {
  const char *title;
  struct plot_axis x, y;
  int count;
  const struct plot_series *series; /* [count] */
};

/* A cell for each row (downwards) and column; cells that are not finite stay empty. */
struct plot_heatmap {
  const char *title;
  struct plot_axis x, y; /* of columns and rows; `log` and the range are not used */
  const char *scale;     /* what the colours mean */
  int rows, columns;
  const double *values; /* [rows][columns] */
};

/* OSCAR_UNSUPPORTED with what to install, if there is no gnuplot: ask before long work. */
oscar_status plot_check(oscar_context *context);

/* Errors: IO, NO_MEMORY, UNSUPPORTED (as plot_check), INVALID_ARGUMENT (nothing to draw), FORMAT (gnuplot
 * refuses; with its message). */
oscar_status plot_chart_write(oscar_context *context, const struct plot_chart *chart, const char *path);
oscar_status plot_heatmap_write(oscar_context *context, const struct plot_heatmap *map, const char *path);

#endif
