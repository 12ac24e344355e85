/*
 * plot.c - pictures as gnuplot scripts.
 *
 * A script goes to gnuplot's standard input from an unnamed file and the picture comes back on its standard output, which is the
 * temporary file of a file_writer: no shell, no pipe that could fill up, no name that two programs could share. Settings of the
 * user are not read (-d).
 *
 * Texts come from outside (model names, KV types). They stand in single quotes, where gnuplot knows no escape but the doubled
 * quote, and the terminal is `noenhanced`, so nothing in them is markup or a command.
 */
#include "eval/plot.h"

#include "base/file.h"

#include <errno.h>
#include <math.h>
#include <spawn.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

/* Okabe and Ito's colours, told apart with any kind of colour vision (https://jfly.uni-koeln.de/color/). */
static const char *const colours[] = {"#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#404040"};
/* gnuplot's numbers of filled shapes first: disc, square, triangle, diamond, triangle down; then their outlines. */
static const int shapes[] = {7, 5, 9, 13, 11, 6, 4, 8, 12, 10};

/* ---- running gnuplot ---- */

static oscar_status missing(oscar_context *context) {
  return set_error(context, OSCAR_UNSUPPORTED, "pictures are drawn by gnuplot, which is not installed (Debian: gnuplot-nox)");
}

/* The first line that is not blank, without the script's line that gnuplot repeats before a message. */
static void first_message(FILE *errors, char *text, size_t room) {
  char line[256];
  snprintf(text, room, "no message");
  rewind(errors);
  while (fgets(line, sizeof line, errors)) {
    line[strcspn(line, "\n")] = '\0';
    if (strstr(line, "line ") && strchr(line, ':')) {
      snprintf(text, room, "%s", line);
      return;
    }
  }
}

static int start(const char *const *argv, FILE *input, FILE *output, FILE *errors, pid_t *child) {
  posix_spawn_file_actions_t actions;
  int error = posix_spawn_file_actions_init(&actions);
  if (error) return error;
  error = posix_spawn_file_actions_adddup2(&actions, fileno(input), STDIN_FILENO);
  if (!error) error = posix_spawn_file_actions_adddup2(&actions, fileno(output), STDOUT_FILENO);
  if (!error) error = posix_spawn_file_actions_adddup2(&actions, fileno(errors), STDERR_FILENO);
  if (!error) error = posix_spawnp(child, argv[0], &actions, NULL, (char *const *)(uintptr_t)argv, environ);
  posix_spawn_file_actions_destroy(&actions);
  return error;
}

/* gnuplot with `input` (read from its beginning) and its picture to `output`. */
static oscar_status run_gnuplot(oscar_context *context, const char *argument, FILE *input, FILE *output, FILE *errors) {
  const char *const argv[] = {"gnuplot", "-d", argument, NULL};
  pid_t child;
  int wait_status = 0;
  if (fflush(input) != 0 || ferror(input))
    return set_error(context, OSCAR_IO, "a temporary file for gnuplot: %s", strerror(errno));
  rewind(input);
  int error = start(argv, input, output, errors, &child);
  if (error == ENOENT) return missing(context);
  if (error) return set_error(context, OSCAR_IO, "gnuplot cannot be started: %s", strerror(error));
  while (waitpid(child, &wait_status, 0) < 0 && errno == EINTR) continue;
  if (WIFEXITED(wait_status) && WEXITSTATUS(wait_status) == 0) return OSCAR_OK;
  if (WIFSIGNALED(wait_status)) return set_error(context, OSCAR_IO, "gnuplot was ended by signal %d", WTERMSIG(wait_status));
  char message[256];
  first_message(errors, message, sizeof message);
  return set_error(context, OSCAR_FORMAT, "gnuplot: %s", message);
}

/* Two unnamed files; false after recording why not. */
static bool open_files(oscar_context *context, FILE **script, FILE **errors) {
  *script = tmpfile();
  *errors = *script ? tmpfile() : NULL;
  if (*errors) return true;
  if (*script) fclose(*script);
  set_error(context, OSCAR_IO, "a temporary file for gnuplot cannot be made: %s", strerror(errno));
  return false;
}

oscar_status plot_check(oscar_context *context) {
  FILE *script, *output;
  if (!open_files(context, &script, &output)) return OSCAR_IO;
  oscar_status status = run_gnuplot(context, "--version", script, output, output);
  fclose(script);
  fclose(output);
  return status;
}

/* ---- what scripts are made of ---- */

/* In single quotes. `format`: the place takes a format, in which % is doubled. */
static void put_text(FILE *out, const char *text, bool format) {
  fputc('\'', out);
  for (const char *c = text ? text : ""; *c; c++) {
    if (*c == '\'' || (*c == '%' && format)) fputc(*c, out);
    fputc((unsigned char)*c < ' ' ? ' ' : *c, out);
  }
  fputc('\'', out);
}

static void put_number(FILE *out, double x) {
  if (isfinite(x))
    fprintf(out, "%.9g", x);
  else
    fputs("NaN", out);
}

static void put_setting(FILE *out, const char *what, const char *text) {
  fprintf(out, "set %s ", what);
  put_text(out, text, false);
  fputc('\n', out);
}

/* which: "x" or "y" */
static void put_axis(FILE *out, const char *which, const struct plot_axis *axis) {
  fprintf(out, "set %slabel ", which);
  put_text(out, axis->label, false);
  fputc('\n', out);
  if (axis->log) fprintf(out, "set logscale %s\nset format %s '%%g'\n", which, which);
  if (axis->low < axis->high) fprintf(out, "set %srange [%.9g:%.9g]\n", which, axis->low, axis->high);
  if (!axis->names) return;
  fprintf(out, "set %stics (", which);
  for (int i = 0; i < axis->n_names; i++) {
    if (i) fputs(", ", out);
    put_text(out, axis->names[i], true);
    fprintf(out, " %d", i);
  }
  fputs(")\n", out);
}

static void put_opening(FILE *out, const char *title, int width, int height) {
  fprintf(out,
          "set encoding utf8\n"
          "set terminal svg size %d,%d noenhanced font 'Helvetica,Arial,sans-serif,14' background '#ffffff'\n"
          "set tics out nomirror textcolor rgb '#333333'\n",
          width, height);
  put_setting(out, "title", title);
}

/* ---- charts ---- */

/* The lower end of an error bar. On a logarithmic axis one that reaches zero or below is drawn down to a tenth of the value. */
static double low_end(const struct plot_axis *axis, const struct plot_series *s, int i) {
  return axis->log && s->low[i] <= 0 ? s->y[i] / 10 : s->low[i];
}

static void put_data(FILE *out, const struct plot_chart *chart, int index) {
  const struct plot_series *s = &chart->series[index];
  fprintf(out, "$s%d << END\n", index);
  for (int i = 0; i < s->count; i++) {
    const double row[] = {s->x[i], s->y[i], s->low ? low_end(&chart->y, s, i) : s->y[i], s->high ? s->high[i] : s->y[i]};
    for (size_t k = 0; k < ARRAY_LENGTH(row); k++) {
      if (k) fputc(' ', out);
      put_number(out, row[k]);
    }
    fputc('\n', out);
  }
  fputs("END\n", out);
}

static int count_bars(const struct plot_chart *chart, int before) {
  int bars = 0;
  for (int i = 0; i < before; i++) bars += chart->series[i].style == PLOT_BARS;
  return bars;
}

static void put_title(FILE *out, const char *label) {
  if (!label) {
    fputs(" notitle", out);
    return;
  }
  fputs(" title ", out);
  put_text(out, label, false);
}

/* One or two plots of a series: its error bars without a title of their own, and itself. */
static void put_series(FILE *out, const struct plot_chart *chart, int i) {
  const struct plot_series *s = &chart->series[i];
  const char *colour = colours[(size_t)i % ARRAY_LENGTH(colours)];
  const int shape = shapes[(size_t)i % ARRAY_LENGTH(shapes)], dash = i / (int)ARRAY_LENGTH(colours) + 1;
  double shift = 0, width = 0;
  if (s->style == PLOT_BARS) {
    const int bars = count_bars(chart, chart->count);
    width = 0.8 / bars;
    shift = (count_bars(chart, i) - (bars - 1) / 2.0) * width;
  }
  fprintf(out, "%s $s%d ", i ? ", \\\n    " : "plot", i);
  if (s->style == PLOT_BARS)
    fprintf(out, "using ($1+%.6g):2:(%.6g) with boxes fs solid 0.85 noborder lc rgb '%s'", shift, width, colour);
  else if (s->style == PLOT_POINTS)
    fprintf(out, "using 1:2 with points pt %d ps 0.9 lc rgb '%s'", shape, colour);
  else if (s->style == PLOT_LINE)
    fprintf(out, "using 1:2 with lines lw 1.8 dt %d lc rgb '%s'", dash, colour);
  else
    fprintf(out, "using 1:2 with linespoints pt %d ps 0.7 lw 1.8 dt %d lc rgb '%s'", shape, dash, colour);
  put_title(out, s->label);
  if (!s->low && !s->high) return;
  /* An error bar comes with a point; where the series has one, it is the same. */
  if (s->style == PLOT_BARS)
    fprintf(out, ", \\\n     $s%d using ($1+%.6g):2:3:4 with yerrorbars pt 7 ps 0.1 lw 1.5 lc rgb '#404040' notitle", i, shift);
  else
    fprintf(out, ", \\\n     $s%d using 1:2:3:4 with yerrorbars pt %d ps 0.7 lw 1.5 lc rgb '%s' notitle", i,
            s->style == PLOT_LINE ? 7 : shape, colour);
}

static void put_chart(FILE *out, const struct plot_chart *chart) {
  put_opening(out, chart->title, 820, 460);
  fputs("set border 3 lc rgb '#808080'\nset grid lc rgb '#e0e0e0' lt 1 lw 0.8\nset key outside right top Left reverse\n"
        "set offsets graph 0.03, graph 0.03, 0, 0\n",
        out);
  put_axis(out, "x", &chart->x);
  put_axis(out, "y", &chart->y);
  for (int i = 0; i < chart->count; i++) put_data(out, chart, i);
  for (int i = 0; i < chart->count; i++) put_series(out, chart, i);
  fputc('\n', out);
}

/* ---- heat maps ---- */

static void put_heatmap(FILE *out, const struct plot_heatmap *map) {
  const int height = 160 + 18 * map->rows;
  put_opening(out, map->title, 820, height < 360 ? 360 : height > 1000 ? 1000 : height);
  /* viridis (matplotlib, CC0): even steps of lightness, so that it reads in grey too */
  fputs("set border lc rgb '#808080'\nunset key\n"
        "set palette defined (0 '#440154', 1 '#3b528b', 2 '#21918c', 3 '#5ec962', 4 '#fde725')\n",
        out);
  /* few cells: every one is named, and none between them */
  if (map->columns <= 20) fputs("set xtics 1\n", out);
  if (map->rows <= 20) fputs("set ytics 1\n", out);
  put_axis(out, "x", &map->x);
  put_axis(out, "y", &map->y);
  put_setting(out, "cblabel", map->scale);
  fprintf(out, "set xrange [-0.5:%d.5]\nset yrange [%d.5:-0.5]\n$m << END\n", map->columns - 1, map->rows - 1);
  for (int r = 0; r < map->rows; r++)
    for (int c = 0; c < map->columns; c++) {
      put_number(out, map->values[(size_t)r * (size_t)map->columns + (size_t)c]);
      fputc(c + 1 < map->columns ? ' ' : '\n', out);
    }
  fputs("END\nplot $m matrix with image pixels\n", out);
}

/* ---- files ---- */

/* Whether gnuplot could say what is in the picture; it refuses a chart without a single point. */
static bool chart_has_points(const struct plot_chart *chart) {
  for (int i = 0; i < chart->count; i++) {
    const struct plot_series *s = &chart->series[i];
    for (int k = 0; k < s->count; k++) {
      const bool x = isfinite(s->x[k]) && (!chart->x.log || s->x[k] > 0), y = isfinite(s->y[k]) && (!chart->y.log || s->y[k] > 0);
      if (x && y) return true;
    }
  }
  return false;
}

static bool map_has_cells(const struct plot_heatmap *map) {
  for (int i = 0; i < map->rows * map->columns; i++)
    if (isfinite(map->values[i])) return true;
  return false;
}

static oscar_status draw(oscar_context *context, FILE *script, FILE *errors, const char *path) {
  struct file_writer writer;
  oscar_status status = file_writer_open(context, path, &writer);
  if (status != OSCAR_OK) return status;
  status = run_gnuplot(context, "-", script, writer.stream, errors);
  if (status == OSCAR_OK) return file_writer_commit(context, &writer);
  file_writer_abort(context, &writer);
  return prefix_error(context, status, "%s", path);
}

oscar_status plot_chart_write(oscar_context *context, const struct plot_chart *chart, const char *path) {
  FILE *script, *errors;
  if (!chart_has_points(chart)) return set_error(context, OSCAR_INVALID_ARGUMENT, "%s: the chart has no point to draw", path);
  if (!open_files(context, &script, &errors)) return OSCAR_IO;
  put_chart(script, chart);
  oscar_status status = draw(context, script, errors, path);
  fclose(script);
  fclose(errors);
  return status;
}

oscar_status plot_heatmap_write(oscar_context *context, const struct plot_heatmap *map, const char *path) {
  FILE *script, *errors;
  if (!map_has_cells(map)) return set_error(context, OSCAR_INVALID_ARGUMENT, "%s: the heat map has no cell to draw", path);
  if (!open_files(context, &script, &errors)) return OSCAR_IO;
  put_heatmap(script, map);
  oscar_status status = draw(context, script, errors, path);
  fclose(script);
  fclose(errors);
  return status;
}
