/* Pictures: well-formed XML that has the series, their texts taken literally; whole files or none. Needs gnuplot and python3. */
#include "support.h"

#include "eval/plot.h"

#include <dirent.h>
#include <sys/stat.h>

static char folder[64];
static oscar_context *context;

static char *path_of(const char *name) {
  static char path[256];
  snprintf(path, sizeof path, "%s/%s", folder, name);
  return path;
}

static int files_in_folder(void) {
  DIR *d = opendir(folder);
  assert_non_null(d);
  int count = 0;
  for (const struct dirent *e; (e = readdir(d));) count += e->d_name[0] != '.';
  closedir(d);
  return count;
}

/* The file's text nodes, one a line, by Python's XML parser: fails the test if the file is not well formed. */
static char *texts_of(const char *path) {
  static char text[1 << 16];
  char command[1024];
  snprintf(command, sizeof command,
           "python3 -c 'import sys, xml.dom.minidom as m\n"
           "for t in m.parse(sys.argv[1]).getElementsByTagName(\"text\"):\n"
           "  print(\"\".join(n.data if n.nodeType == 3 else n.firstChild.data for n in t.childNodes if n.nodeType == 3 or "
           "n.firstChild).strip())' %s",
           path);
  FILE *pipe = popen(command, "r");
  assert_non_null(pipe);
  size_t n = fread(text, 1, sizeof text - 1, pipe);
  text[n] = '\0';
  assert_int_equal(pclose(pipe), 0);
  return text;
}

static int count_of(const char *path, const char *word) {
  FILE *f = fopen(path, "r");
  assert_non_null(f);
  static char text[1 << 20];
  size_t n = fread(text, 1, sizeof text - 1, f);
  text[n] = '\0';
  fclose(f);
  int count = 0;
  for (const char *p = text; (p = strstr(p, word)); p++) count++;
  return count;
}

static void a_chart_has_its_series_and_texts_taken_literally(void **state) {
  (void)state;
  const double x[] = {1, 2, 3}, y[] = {0.1, 0.01, 0.001}, low[] = {0.05, -1, 0.0005}, high[] = {0.2, 0.02, 0.002};
  const struct plot_series series[] = {
      {"int2@1.75", PLOT_LINE_POINTS, 3, x, y, low, high},
      {"it's <b> & 50%", PLOT_POINTS, 3, x, high, NULL, NULL},
      {"`date` $(date) \"x_1^2\"", PLOT_LINE, 3, x, low, NULL, NULL},
  };
  const struct plot_chart chart = {.title = "KL & \"bits\"\nnext {/Bold b}",
                                   .x = {.label = "bits per element"},
                                   .y = {.label = "mean KL [nats]", .log = true},
                                   .count = 3,
                                   .series = series};
  const char *path = path_of("chart.svg");
  assert_ok(context, plot_chart_write(context, &chart, path));
  const char *texts = texts_of(path);
  for (int i = 0; i < 3; i++) assert_non_null(strstr(texts, series[i].label));
  assert_non_null(strstr(texts, "KL & \"bits\" next {/Bold b}"));
  assert_non_null(strstr(texts, "bits per element"));
  assert_non_null(strstr(texts, "mean KL [nats]"));
  assert_non_null(strstr(texts, "0.001"));
  assert_int_equal(count_of(path, "<g id=\"gnuplot_plot_"), 4); /* three series and the error bars of one */
  assert_int_equal(files_in_folder(), 1);
}

static void bars_stand_side_by_side_at_named_places(void **state) {
  (void)state;
  const double x[] = {0, 1}, y[] = {0.9, 0.5}, z[] = {0.8, NAN};
  const char *const names[] = {"4096", "100%"};
  const struct plot_series series[] = {{"one", PLOT_BARS, 2, x, y, NULL, NULL}, {"two", PLOT_BARS, 2, x, z, z, z}};
  const struct plot_chart chart = {
      .title = "bars", .x = {.names = names, .n_names = 2}, .y = {.low = 0, .high = 1}, .count = 2, .series = series};
  const char *path = path_of("bars.svg");
  assert_ok(context, plot_chart_write(context, &chart, path));
  assert_non_null(strstr(texts_of(path), "100%\n"));
}

static void a_heat_map_has_a_cell_for_each_number(void **state) {
  (void)state;
  double values[6 * 4];
  for (int i = 0; i < 24; i++) values[i] = i;
  const struct plot_heatmap map = {.title = "heads",
                                   .x = {.label = "query head"},
                                   .y = {.label = "layer"},
                                   .scale = "SNR [dB]",
                                   .rows = 6,
                                   .columns = 4,
                                   .values = values};
  const char *path = path_of("map.svg");
  assert_ok(context, plot_heatmap_write(context, &map, path));
  const char *texts = texts_of(path);
  assert_non_null(strstr(texts, "query head"));
  assert_non_null(strstr(texts, "SNR [dB]"));
  int cells = count_of(path, "<polygon");
  values[5] = NAN;
  assert_ok(context, plot_heatmap_write(context, &map, path));
  assert_int_equal(count_of(path, "<polygon"), cells - 1);
}

static void what_cannot_be_drawn_leaves_no_file(void **state) {
  (void)state;
  const double x[] = {1, 2}, none[] = {NAN, 0};
  const struct plot_series series = {"nothing", PLOT_LINE, 2, x, none, NULL, NULL};
  const struct plot_chart chart = {.title = "t", .y = {.log = true}, .count = 1, .series = &series};
  int before = files_in_folder();
  assert_int_equal(plot_chart_write(context, &chart, path_of("nothing.svg")), OSCAR_INVALID_ARGUMENT);
  const struct plot_heatmap map = {.title = "t", .rows = 1, .columns = 1, .values = none};
  assert_int_equal(plot_heatmap_write(context, &map, path_of("nothing.svg")), OSCAR_INVALID_ARGUMENT);
  const struct plot_heatmap cell = {.title = "t", .rows = 1, .columns = 1, .values = x};
  assert_int_equal(plot_heatmap_write(context, &cell, path_of("no-such-folder/x.svg")), OSCAR_IO);
  assert_non_null(strstr(oscar_last_error(context), "no-such-folder/x.svg"));
  assert_int_equal(files_in_folder(), before);
}

/* A program in place of gnuplot that fails: what it says is in the message and the old picture stays. */
static void a_failing_gnuplot_keeps_the_old_picture(void **state) {
  (void)state;
  const double one = 1;
  const struct plot_heatmap map = {.title = "t", .rows = 1, .columns = 1, .values = &one};
  assert_ok(context, plot_heatmap_write(context, &map, path_of("kept.svg")));
  char old_path[4096], *fake = path_of("gnuplot");
  snprintf(old_path, sizeof old_path, "%s", getenv("PATH"));
  FILE *f = fopen(fake, "w");
  assert_non_null(f);
  fputs("#!/bin/sh\necho half a picture\necho 'line 3: no such terminal' >&2\nexit 1\n", f);
  fclose(f);
  assert_int_equal(chmod(fake, 0755), 0);
  setenv("PATH", folder, 1);
  int before = files_in_folder();
  assert_int_equal(plot_heatmap_write(context, &map, path_of("kept.svg")), OSCAR_FORMAT);
  assert_non_null(strstr(oscar_last_error(context), "kept.svg: gnuplot: line 3: no such terminal"));
  assert_int_equal(files_in_folder(), before);
  unlink(path_of("gnuplot"));
  assert_int_equal(plot_check(context), OSCAR_UNSUPPORTED);
  assert_non_null(strstr(oscar_last_error(context), "gnuplot-nox"));
  assert_int_equal(plot_heatmap_write(context, &map, path_of("kept.svg")), OSCAR_UNSUPPORTED);
  setenv("PATH", old_path, 1);
  assert_true(count_of(path_of("kept.svg"), "</svg>") == 1);
}

int main(void) {
  context = test_context(OSCAR_ISA_AUTO, 1);
  if (plot_check(context) != OSCAR_OK) {
    printf("skipped: %s\n", oscar_last_error(context));
    oscar_context_free(context);
    return SKIPPED;
  }
  snprintf(folder, sizeof folder, "/tmp/oscar-plot-XXXXXX");
  if (!mkdtemp(folder)) return 1;
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(a_chart_has_its_series_and_texts_taken_literally),
      cmocka_unit_test(bars_stand_side_by_side_at_named_places), cmocka_unit_test(a_heat_map_has_a_cell_for_each_number),
      cmocka_unit_test(what_cannot_be_drawn_leaves_no_file), cmocka_unit_test(a_failing_gnuplot_keeps_the_old_picture)};
  int failed = cmocka_run_group_tests(tests, NULL, NULL);
  char command[128];
  snprintf(command, sizeof command, "rm -r %s", folder);
  if (system(command) != 0) failed++;
  oscar_context_free(context);
  return failed;
}
