/* A report of made-up results: what the files hold, that JSON parses and pictures are well formed, that files are whole or
 * absent, and that names from outside are neither markup nor paths. Needs gnuplot and python3. */
#include "failing_alloc.h"

#include "eval/plot.h"
#include "eval/report.h"

#include <dirent.h>
#include <errno.h>
#include <sys/stat.h>

enum { LAYERS = 3, HEADS = 4, KV_HEADS = 2, DIM = 16, TYPES = 2 };

static char folder[64];
static const char *kv_names[TYPES] = {"int2@1.75", "odd|na/me"};
static struct head_sums sums[TYPES * LAYERS * HEADS];
static double crumbs[TYPES * LAYERS * DIM], eigenvalues[SPECTRA * LAYERS * KV_HEADS * DIM];
static struct eval_run runs[] = {
    {"bf16", 10, 1, 0, 0, 0, 0, 1, 16, 1 << 20},
    {"int2@1.75", 10.5, 1.05, 0.0625, 0.001, 0.5, 1, 0.875, 2.25, 1 << 18},
    {"odd|na/me", INFINITY, INFINITY, 4.5, 0.1, 9, 12, 0.125, 2, 1 << 17},
};
static struct eval_result quality = {.context = 1024, .tokens = 2048, .scored = 1022, .counted = 1024, .runs = 3, .run = runs};
static struct diagnose_result diagnosis = {.layers = LAYERS,
                                           .query_heads = HEADS,
                                           .kv_heads = KV_HEADS,
                                           .head_dim = DIM,
                                           .tokens = 1024,
                                           .samples = 40,
                                           .count = TYPES,
                                           .kv = kv_names,
                                           .sums = sums,
                                           .crumbs = crumbs,
                                           .eigenvalues = eigenvalues};
static const struct report_task tasks[] = {
    {"needles", 4096, "int2@1.75", 39, 40, 0.87, 0.996, 40},
    {"needles", 1024, "int2@1.75", 40, 40, 0.91, 1, 40},
    {"needles", 4096, "odd|na/me", 0, 40, 0, 0.09, 40},
    {"copy", 1024, "int2@1.75", 20, 40, 0.35, 0.65, -1},
};

static struct report make_report(const struct report_quality *q) {
  for (int i = 0; i < TYPES * LAYERS * HEADS; i++)
    sums[i] = (struct head_sums){.queries = 10,
                                 .pairs = 1000,
                                 .logit_signal = 100,
                                 .logit_error = 1 + i,
                                 .output_signal = 50,
                                 .output_error_keys = 0.5,
                                 .output_error_values = 0.05,
                                 .output_error_both = 0.5 + 0.1 * i,
                                 .coded_mass = 5};
  /* the last layer of the second type measured nothing */
  for (int h = 0; h < HEADS; h++) sums[(TYPES * LAYERS - 1) * HEADS + h] = (struct head_sums){0};
  for (int i = 0; i < TYPES * LAYERS * DIM; i++) crumbs[i] = i < LAYERS * DIM ? i % 3 : 1;
  for (int i = 0; i < SPECTRA * LAYERS * KV_HEADS * DIM; i++) eigenvalues[i] = 1.0 / (1 + i % DIM);
  struct report report = {.suite = "quick",
                          .model_name = "A <b>model</b> | 1\n# injected",
                          .fingerprint = "0123456789abcdef0123456789abcdef",
                          .text_name = "te\xFFxt.txt",
                          .text_sha256 = "fedcba9876543210fedcba9876543210",
                          .text_bytes = 12345,
                          .qualities = 1,
                          .quality = q,
                          .diagnosis = &diagnosis,
                          .diagnose_command = "oscar eval --diagnose -c 1024",
                          .tasks = (int)ARRAY_LENGTH(tasks),
                          .task = tasks,
                          .task_command = "oscar eval --tasks needles"};
  diagnose_options_default(&report.diagnose_options);
  return report;
}

static struct report_quality make_quality(void) {
  struct report_quality q = {.result = &quality, .command = "oscar eval -c 1024"};
  eval_options_default(&q.options);
  return q;
}

static char *path_of(const char *name) {
  static char path[256];
  snprintf(path, sizeof path, "%s/%s", folder, name);
  return path;
}

static char *content_of(const char *name) {
  static char text[1 << 20];
  FILE *f = fopen(path_of(name), "r");
  if (!f) fail_msg("%s is not there", name);
  size_t n = fread(text, 1, sizeof text - 1, f);
  text[n] = '\0';
  fclose(f);
  return text;
}

/* Runs a line of Python in the folder; it must end well. */
static void python(const char *line) {
  char command[1024];
  snprintf(command, sizeof command, "cd %s && python3 -c '%s'", folder, line);
  if (system(command) != 0) fail_msg("%s", line);
}

static int files_like(const char *ending) {
  DIR *d = opendir(folder);
  assert_non_null(d);
  int count = 0;
  for (const struct dirent *e; (e = readdir(d));) {
    size_t n = strlen(e->d_name), m = strlen(ending);
    count += n >= m && strcmp(e->d_name + n - m, ending) == 0 && e->d_name[0] != '.';
  }
  closedir(d);
  return count;
}

static void empty_folder(void) {
  char command[256];
  snprintf(command, sizeof command, "rm -rf %s && mkdir %s", folder, folder);
  assert_int_equal(system(command), 0);
}

static void assert_has(const char *text, const char *piece) {
  if (!strstr(text, piece)) fail_msg("'%s' is missing in: %.3000s", piece, text);
}

static void a_report_has_all_that_was_measured(void **state) {
  (void)state;
  empty_folder();
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 1);
  const struct report_quality q = make_quality();
  const struct report report = make_report(&q);
  assert_ok(c, report_prepare(c, folder));
  assert_int_equal(files_like(""), 0); /* asking leaves nothing behind */
  assert_ok(c, report_write(c, &report, folder));
  assert_int_equal(files_like(".tmp"), 0);

  const char *text = content_of("report.md");
  assert_has(text, "    oscar eval -c 1024\n");
  assert_has(text, "    oscar eval --diagnose -c 1024\n");
  assert_has(text, "    oscar eval --tasks needles\n");
  assert_has(text, "| int2@1.75 | 10.500 | 1.0500 | 0.06250 ± 0.00100 | 0.5000 | 87.50 % | 2.25 | 0.2 MiB |");
  assert_has(text, "| odd\\|na/me | inf |");
  assert_has(text, "| needles | 4096 | int2@1.75 | 39 of 40 | 97.5 % | 87.0 to 99.6 % | 40 of 40 |");
  assert_has(text, "| copy | 1024 | int2@1.75 | 20 of 40 | 50.0 % | 35.0 to 65.0 % | – |");
  assert_has(text, "| 2 | 9.8 / 15.4 | – / – |"); /* hand: logits 400/42, output 200/5.8 */
  assert_has(text, "participation ratio");
  assert_null(strstr(text, "\n# injected"));
  assert_null(strstr(text, "<b>"));
  /* every picture that the text shows is there, and none besides */
  python("import re, os; t = open(\"report.md\", errors=\"replace\").read(); "
         "assert sorted(re.findall(r\"\\]\\(([^)]*[.]svg)\\)\", t)) == sorted(f for f in os.listdir(\".\") if "
         "f.endswith(\".svg\"))");
  assert_int_equal(files_like(".svg"), 1 + 2 + TYPES + 1 + 1 + 2); /* crumbs of the graded type only */
  assert_int_equal(access(path_of("heads-odd_na_me.svg"), R_OK), 0);
  assert_int_equal(access(path_of("crumbs-int2@1.75.svg"), R_OK), 0);
  python("import os, xml.dom.minidom as m; [m.parse(f) for f in os.listdir(\".\") if f.endswith(\".svg\")]");
  text = content_of("task-needles.svg");
  assert_has(text, "int2@1.75");
  assert_has(text, "bf16");
  assert_has(text, "4096");
  assert_has(content_of("quality-1024.svg"), "odd|na/me");

  python("import json; d = json.load(open(\"report.json\")); q = d[\"quality\"][0]; "
         "assert q[\"runs\"][1][\"kld_mean\"] == 0.0625 and q[\"runs\"][2][\"ppl\"] is None; "
         "assert q[\"command\"] == \"oscar eval -c 1024\" and d[\"text\"][\"name\"] == \"te?xt.txt\"; "
         "e = d[\"diagnostics\"][\"errors\"]; assert len(e) == 2 and len(e[0][\"layers\"]) == 3; "
         "l = e[0][\"layers\"][1]; assert len(l[\"heads\"]) == 4 and l[\"queries\"] == 40 and l[\"coded_mass\"] == 0.5; "
         "assert abs(l[\"heads\"][0][\"output_snr_keys_db\"] - 20) < 1e-6; "
         "assert e[1][\"layers\"][2][\"output_snr_db\"] is None; "
         "assert len(d[\"diagnostics\"][\"eigenvalues\"][\"logits\"][2][1]) == 16; "
         "assert [t[\"right\"] for t in d[\"tasks\"]] == [39, 40, 0, 20] and d[\"tasks\"][3][\"bf16_right\"] is None");
  oscar_context_free(c);
}

static void parts_that_were_not_measured_are_left_out(void **state) {
  (void)state;
  empty_folder();
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 1);
  const struct report_quality q = make_quality();
  struct report report = make_report(&q);
  report.diagnosis = NULL;
  report.tasks = 0;
  report.task_command = NULL;
  assert_ok(c, report_write(c, &report, folder));
  const char *text = content_of("report.md");
  assert_null(strstr(text, "Where the errors"));
  assert_null(strstr(text, "Retrieval"));
  python("import json; d = json.load(open(\"report.json\")); assert d[\"diagnostics\"] is None and d[\"tasks\"] == []");
  assert_int_equal(files_like(".svg"), 1);
  oscar_context_free(c);
}

static void the_same_results_give_the_same_text(void **state) {
  (void)state;
  static char first[1 << 20];
  snprintf(first, sizeof first, "%s", content_of("report.md"));
  parts_that_were_not_measured_are_left_out(state);
  assert_string_equal(first, content_of("report.md"));
}

static void a_folder_that_cannot_be_written_is_one_clear_line(void **state) {
  (void)state;
  empty_folder();
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 1);
  FILE *f = fopen(path_of("file"), "w");
  assert_non_null(f);
  fclose(f);
  static const char *const bad[] = {"file", "file/sub", "file/sub/sub"};
  for (int i = 0; i < 3; i++) {
    assert_int_equal(report_prepare(c, path_of(bad[i])), OSCAR_IO);
    assert_has(oscar_last_error(c), path_of("file"));
    assert_has(oscar_last_error(c), strerror(ENOTDIR));
    assert_null(strchr(oscar_last_error(c), '\n'));
  }
  const struct report_quality q = make_quality();
  const struct report report = make_report(&q);
  assert_int_equal(report_write(c, &report, path_of("file")), OSCAR_IO);
  assert_int_equal(files_like(""), 1);
  assert_ok(c, report_prepare(c, path_of("new/folders")));
  assert_int_equal(access(path_of("new/folders"), W_OK), 0);
  oscar_context_free(c);
}

/* A text that cannot take the place of the old one leaves that one, and nothing half. */
static void an_old_report_stays_until_the_new_one_is_whole(void **state) {
  (void)state;
  empty_folder();
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 1);
  const struct report_quality q = make_quality();
  struct report report = make_report(&q);
  report.diagnosis = NULL;
  assert_int_equal(mkdir(path_of("report.md"), 0755), 0); /* a folder cannot be replaced by a file */
  assert_int_equal(report_write(c, &report, folder), OSCAR_IO);
  assert_has(oscar_last_error(c), "report.md");
  assert_int_equal(files_like(".tmp"), 0);
  assert_int_equal(rmdir(path_of("report.md")), 0);
  assert_ok(c, report_write(c, &report, folder));
  char old_path[4096];
  snprintf(old_path, sizeof old_path, "%s", getenv("PATH"));
  setenv("PATH", "/nowhere", 1);
  assert_int_equal(report_prepare(c, folder), OSCAR_UNSUPPORTED);
  report.suite = "another";
  assert_int_equal(report_write(c, &report, folder), OSCAR_UNSUPPORTED);
  setenv("PATH", old_path, 1);
  assert_has(content_of("report.md"), "suite `quick`");
  oscar_context_free(c);
}

static void running_out_of_memory_leaves_nothing(void **state) {
  (void)state;
  empty_folder();
  struct failing_alloc f;
  oscar_context *c = failing_context(&f);
  const struct report_quality q = make_quality();
  struct report report = make_report(&q);
  report.tasks = 1;
  diagnosis.count = 1; /* fewer pictures: each round draws those before the failure */
  sweep_allocations(c, &f, report_write(c, &report, folder));
  diagnosis.count = TYPES;
  assert_int_equal(files_like(".tmp"), 0);
  failing_context_free(c, &f);
}

int main(void) {
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 1);
  oscar_status status = plot_check(c);
  if (status != OSCAR_OK) printf("skipped: %s\n", oscar_last_error(c));
  oscar_context_free(c);
  if (status != OSCAR_OK) return SKIPPED;
  snprintf(folder, sizeof folder, "/tmp/oscar-report-XXXXXX");
  if (!mkdtemp(folder)) return 1;
  const struct CMUnitTest tests[] = {cmocka_unit_test(a_report_has_all_that_was_measured),
                                     cmocka_unit_test(parts_that_were_not_measured_are_left_out),
                                     cmocka_unit_test(the_same_results_give_the_same_text),
                                     cmocka_unit_test(a_folder_that_cannot_be_written_is_one_clear_line),
                                     cmocka_unit_test(an_old_report_stays_until_the_new_one_is_whole),
                                     cmocka_unit_test(running_out_of_memory_leaves_nothing)};
  int failed = cmocka_run_group_tests(tests, NULL, NULL);
  char command[128];
  snprintf(command, sizeof command, "rm -r %s", folder);
  if (system(command) != 0) failed++;
  return failed;
}
