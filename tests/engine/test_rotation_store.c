/* Where codec sets come from, on a fake model and a cache folder of the test's own: first use, reuse, damage, wrong files. */
#include "base/user_folder.h"
#include "failing_alloc.h"
#include "fake_model.h"

#include <dirent.h>
#include <fcntl.h>
#include <limits.h>
#include <oscar/rotation.h>
#include <sys/stat.h>

static const char *const fitted[] = {"int2", "int2-centred", "int2-oscar", "int4"};

/* One test's world: a fresh folder that XDG_CACHE_HOME names, a context that collects warnings, a model. */
struct world {
  char folder[PATH_MAX];
  oscar_context *context;
  struct model model;
  struct calibrate_options calibration;
  int warnings;
  char warning[1024]; /* the last */
};

static void collect(void *user, oscar_log_level level, const char *text) {
  struct world *w = user;
  if (level > OSCAR_LOG_WARNING) return;
  w->warnings++;
  snprintf(w->warning, sizeof w->warning, "%s", text);
}

static void remove_tree(const char *path) {
  DIR *folder = opendir(path);
  if (folder) {
    struct dirent *entry;
    while ((entry = readdir(folder)) != NULL) {
      if (strcmp(entry->d_name, ".") == 0 || strcmp(entry->d_name, "..") == 0) continue;
      char child[PATH_MAX];
      if (snprintf(child, sizeof child, "%s/%s", path, entry->d_name) < PATH_MAX) remove_tree(child);
    }
    closedir(folder);
    rmdir(path);
  } else {
    unlink(path);
  }
}

static void world_open(struct world *w) {
  *w = (struct world){.folder = "/tmp/oscar-test-XXXXXX"};
  assert_non_null(mkdtemp(w->folder));
  assert_int_equal(setenv("XDG_CACHE_HOME", w->folder, 1), 0);
  oscar_context_options options;
  oscar_context_options_default(&options);
  options.threads = 1;
  options.log = collect;
  options.log_user = w;
  assert_int_equal(oscar_context_create(&options, &w->context), OSCAR_OK);
  fake_model_init(&w->model, w->context);
  calibrate_options_default(&w->calibration);
  w->calibration.text = "A kettle, a key and a kingfisher walk into a library; only the kettle is asked to keep its voice down.";
  w->calibration.text_bytes = strlen(w->calibration.text);
}

static void world_close(struct world *w) {
  oscar_context_free(w->context);
  remove_tree(w->folder);
}

static oscar_status obtain(struct world *w, const char *kv, const char *file, oscar_codec_set **set) {
  return codec_sets_obtain_with(&w->model, 1, &kv, &file, &w->calibration, NULL, set);
}

static const char *stored_path(struct world *w, const char *kv) {
  static char path[PATH_MAX];
  assert_ok(w->context, rotation_cache_path(w->context, w->model.fingerprint, kv, path, sizeof path));
  return path;
}

static void fill_cache(struct world *w) {
  oscar_codec_set *set = NULL;
  assert_ok(w->context, obtain(w, "int2", NULL, &set));
  oscar_codec_set_free(set);
  w->model.fed = 0;
}

static int files_in(const char *path) {
  int count = 0;
  DIR *folder = opendir(path);
  if (!folder) return 0;
  for (struct dirent *entry; (entry = readdir(folder)) != NULL;) count += entry->d_name[0] != '.';
  closedir(folder);
  return count;
}

static int stored_files(const struct world *w) {
  char folder[PATH_MAX + 32];
  snprintf(folder, sizeof folder, "%s/oscar/rotations", w->folder);
  return files_in(folder);
}

static char *contents(const char *path, size_t *bytes) {
  FILE *file = fopen(path, "rb");
  assert_non_null(file);
  assert_int_equal(fseek(file, 0, SEEK_END), 0);
  *bytes = (size_t)ftell(file);
  rewind(file);
  char *text = malloc(*bytes);
  assert_int_equal(fread(text, 1, *bytes, file), *bytes);
  fclose(file);
  return text;
}

static void overwrite(const char *path, const char *text, size_t bytes) {
  FILE *file = fopen(path, "wb");
  assert_non_null(file);
  assert_int_equal(fwrite(text, 1, bytes, file), bytes);
  assert_int_equal(fclose(file), 0);
}

static void assert_same_codecs(const oscar_codec_set *a, const oscar_codec_set *b) {
  for (int l = 0; l < FAKE_LAYERS; l++)
    for (int h = 0; h < FAKE_KV_HEADS; h++)
      for (int side = 0; side < 2; side++) {
        const oscar_codec_spec *x = oscar_codec_describe(oscar_codec_set_get(a, l, h, (oscar_side)side));
        const oscar_codec_spec *y = oscar_codec_describe(oscar_codec_set_get(b, l, h, (oscar_side)side));
        assert_memory_equal(x->encode, y->encode, sizeof(float) * FAKE_DIM * FAKE_DIM);
        assert_memory_equal(x->mean, y->mean, sizeof(float) * FAKE_DIM);
        assert_true(x->clip_ratio == y->clip_ratio);
      }
}

static void the_cache_folder_follows_the_standard(void **state) {
  (void)state;
  struct world w;
  world_open(&w);
  char path[PATH_MAX], small[8];
  setenv("XDG_CACHE_HOME", "/x/cache", 1);
  assert_ok(w.context, user_folder(w.context, USER_CACHE, path, sizeof path));
  assert_string_equal(path, "/x/cache/oscar");
  assert_ok(w.context, rotation_cache_path(w.context, "f00d", "int2", path, sizeof path));
  assert_string_equal(path, "/x/cache/oscar/rotations/f00d-int2.safetensors");
  assert_int_equal(user_folder(w.context, USER_CACHE, small, sizeof small), OSCAR_IO);
  assert_int_equal(rotation_cache_path(w.context, "f00d", "int2", small, sizeof small), OSCAR_IO);
  char *home = strdup(getenv("HOME") ? getenv("HOME") : "");
  setenv("HOME", "/home/someone", 1);
  static const char *const ignored[] = {"", "relative/cache"};
  for (size_t i = 0; i < ARRAY_LENGTH(ignored); i++) {
    setenv("XDG_CACHE_HOME", ignored[i], 1);
    assert_ok(w.context, user_folder(w.context, USER_CACHE, path, sizeof path));
    assert_string_equal(path, "/home/someone/.cache/oscar");
  }
  unsetenv("HOME");
  assert_int_equal(user_folder(w.context, USER_CACHE, path, sizeof path), OSCAR_IO);
  setenv("HOME", home, 1);
  free(home);
  world_close(&w);
}

static void types_without_data_are_built_at_once(void **state) {
  (void)state;
  static const struct {
    const char *kv;
    int crumbs;
    float clip_keys;
  } plain[] = {{"int8", 4, 1.0f}, {"int2-hadamard", 1, 0.96f}, {"int2-plain", 1, 1.0f}};
  struct world w;
  world_open(&w);
  oscar_codec_set *set = NULL;
  assert_ok(w.context, obtain(&w, "bf16", NULL, &set));
  assert_null(set);
  for (size_t i = 0; i < ARRAY_LENGTH(plain); i++) {
    assert_ok(w.context, obtain(&w, plain[i].kv, NULL, &set));
    assert_ok(w.context, oscar_codec_set_check(set));
    const oscar_codec *codec = oscar_codec_set_get(set, 1, 1, OSCAR_KEYS);
    assert_int_equal(oscar_codec_crumbs(codec), plain[i].crumbs * FAKE_DIM);
    assert_true(oscar_codec_describe(codec)->clip_ratio == plain[i].clip_keys);
    assert_string_equal(oscar_codec_set_describe(set)->recipe, plain[i].kv);
    assert_string_equal(oscar_codec_set_describe(set)->fingerprint, "");
    oscar_codec_set_free(set);
    assert_int_equal(obtain(&w, plain[i].kv, "/some/file", &set), OSCAR_INVALID_ARGUMENT); /* it would not be used */
    assert_null(set);
  }
  assert_int_equal(obtain(&w, "int3", NULL, &set), OSCAR_INVALID_ARGUMENT);
  assert_int_equal(obtain(&w, "q4_0", NULL, &set), OSCAR_INVALID_ARGUMENT); /* nothing that a cache could hold */
  assert_non_null(strstr(oscar_last_error(w.context), "saves no memory"));
  assert_null(set);
  assert_int_equal(w.model.fed, 0);
  assert_int_equal(stored_files(&w), 0);
  world_close(&w);
}

static void the_first_use_fits_and_stores_all_types_and_later_ones_read(void **state) {
  (void)state;
  struct world w;
  world_open(&w);
  oscar_codec_set *first = NULL, *again = NULL;
  assert_ok(w.context, obtain(&w, "int4", NULL, &first));
  assert_string_equal(oscar_codec_set_describe(first)->recipe, "int4");
  assert_int_equal(w.model.fed, w.calibration.text_bytes);
  assert_int_equal(stored_files(&w), 4);
  w.model.fed = 0;
  assert_ok(w.context, obtain(&w, "int4", NULL, &again));
  assert_same_codecs(first, again);
  oscar_codec_set_free(again);
  for (size_t i = 0; i < ARRAY_LENGTH(fitted); i++) {
    assert_ok(w.context, obtain(&w, fitted[i], NULL, &again));
    assert_string_equal(oscar_codec_set_describe(again)->recipe, fitted[i]);
    assert_string_equal(oscar_codec_set_describe(again)->fingerprint, w.model.fingerprint);
    oscar_codec_set_free(again);
  }
  assert_int_equal(w.model.fed, 0);
  assert_int_equal(w.warnings, 0);
  memset(w.model.fingerprint, 'b', 64); /* another model has its own files */
  assert_ok(w.context, obtain(&w, "int2", NULL, &again));
  assert_int_equal(w.model.fed, w.calibration.text_bytes);
  assert_int_equal(stored_files(&w), 8);
  oscar_codec_set_free(again);
  oscar_codec_set_free(first);
  world_close(&w);
}

static void two_fits_store_the_same_bytes(void **state) {
  (void)state;
  struct world w;
  char *kept[3];
  size_t bytes[3];
  for (int round = 0; round < 2; round++) {
    world_open(&w);
    fill_cache(&w);
    for (int i = 0; i < 3; i++) {
      size_t n;
      char *text = contents(stored_path(&w, fitted[i]), &n);
      if (round == 0) {
        kept[i] = text;
        bytes[i] = n;
      } else {
        assert_int_equal(n, bytes[i]);
        assert_memory_equal(text, kept[i], n);
        free(text);
        free(kept[i]);
      }
    }
    world_close(&w);
  }
}

static void a_damaged_stored_file_is_reported_and_replaced(void **state) {
  (void)state;
  struct world w;
  world_open(&w);
  fill_cache(&w);
  size_t bytes;
  char *good = contents(stored_path(&w, "int2"), &bytes);
  for (int kind = 0; kind < 4; kind++) {
    char path[PATH_MAX];
    snprintf(path, sizeof path, "%s", stored_path(&w, "int2"));
    if (kind == 0) overwrite(path, "not a safetensors file", 22);
    if (kind == 1) overwrite(path, good, bytes / 2);
    if (kind == 2) overwrite(path, good, 0);
    if (kind == 3) { /* another KV type's codecs under this name */
      size_t n;
      char *other = contents(stored_path(&w, "int4"), &n);
      overwrite(path, other, n);
      free(other);
    }
    w.model.fed = 0;
    w.warnings = 0;
    oscar_codec_set *set = NULL;
    assert_ok(w.context, obtain(&w, "int2", NULL, &set));
    oscar_codec_set_free(set);
    assert_int_equal(w.model.fed, w.calibration.text_bytes);
    assert_int_equal(w.warnings, 1);
    assert_non_null(strstr(w.warning, path));
    size_t n;
    char *now = contents(path, &n);
    assert_int_equal(n, bytes);
    assert_memory_equal(now, good, n);
    free(now);
  }
  free(good);
  world_close(&w);
}

/* Saves the set of `kv` with another description under path. */
static void save_as(struct world *w, const char *kv, const oscar_codec_set_info *info, const char *path) {
  oscar_codec_set *set = NULL, *copy = NULL;
  assert_ok(w->context, obtain(w, kv, NULL, &set));
  assert_ok(w->context, oscar_codec_set_create(w->context, info, &copy));
  for (int l = 0; l < info->layers; l++)
    for (int h = 0; h < info->kv_heads; h++)
      for (int side = 0; side < 2; side++) {
        oscar_codec *codec = NULL;
        const oscar_codec *from = oscar_codec_set_get(set, l % FAKE_LAYERS, h % FAKE_KV_HEADS, (oscar_side)side);
        assert_ok(w->context, oscar_codec_create(w->context, oscar_codec_describe(from), &codec));
        assert_ok(w->context, oscar_codec_set_assign(copy, l, h, (oscar_side)side, codec));
        oscar_codec_release(codec);
      }
  assert_ok(w->context, oscar_codec_set_save(copy, path));
  oscar_codec_set_free(copy);
  oscar_codec_set_free(set);
}

static void settings_of_another_program_are_fitted_again(void **state) {
  (void)state;
  struct world w;
  world_open(&w);
  fill_cache(&w);
  char path[PATH_MAX];
  snprintf(path, sizeof path, "%s", stored_path(&w, "int2"));
  oscar_codec_set_info info = {FAKE_LAYERS, FAKE_KV_HEADS, FAKE_DIM, "int2", w.model.fingerprint, "{\"fit\":{\"rank\":3}}"};
  save_as(&w, "int2", &info, path);
  w.model.fed = 0;
  oscar_codec_set *set = NULL;
  assert_ok(w.context, obtain(&w, "int2", NULL, &set));
  assert_int_equal(w.model.fed, w.calibration.text_bytes);
  assert_true(calibrate_is_current("int2", oscar_codec_set_describe(set)));
  oscar_codec_set_free(set);
  world_close(&w);
}

static void a_fit_of_the_users_own_survives_the_fit_of_another_type(void **state) {
  (void)state;
  struct world w;
  world_open(&w);
  oscar_codec_set *set = NULL;
  struct calibrate_options shipped = w.calibration;
  w.calibration.text_bytes -= 10; /* another text */
  fill_cache(&w);
  size_t before, after;
  char *mine = contents(stored_path(&w, "int2"), &before);
  assert_int_equal(unlink(stored_path(&w, "int4")), 0);
  w.calibration = shipped;
  assert_ok(w.context, obtain(&w, "int4", NULL, &set));
  assert_int_equal(w.model.fed, shipped.text_bytes);
  oscar_codec_set_free(set);
  char *still = contents(stored_path(&w, "int2"), &after);
  assert_int_equal(before, after);
  assert_memory_equal(mine, still, before);
  free(mine);
  free(still);
  world_close(&w);
}

static void a_named_file_is_used_or_refused_but_never_replaced(void **state) {
  (void)state;
  struct world w;
  world_open(&w);
  fill_cache(&w);
  char path[PATH_MAX + 16];
  snprintf(path, sizeof path, "%s/mine", w.folder);
  oscar_codec_set *set = NULL;
  oscar_codec_set_info info = {FAKE_LAYERS, FAKE_KV_HEADS, FAKE_DIM, "int2", w.model.fingerprint, ""};
  save_as(&w, "int2", &info, path);
  assert_ok(w.context, obtain(&w, "int2", path, &set));
  assert_string_equal(oscar_codec_set_describe(set)->provenance, "");
  oscar_codec_set_free(set);
  info.fingerprint = ""; /* fits any model of this shape */
  info.recipe = "imported";
  save_as(&w, "int2", &info, path);
  assert_ok(w.context, obtain(&w, "int2", path, &set));
  oscar_codec_set_free(set);

  assert_int_equal(obtain(&w, "int2", "/nonexistent/file", &set), OSCAR_IO);
  info.recipe = "int2";
  info.fingerprint = "0123456789abcdef0123456789abcdef";
  save_as(&w, "int2", &info, path);
  assert_int_equal(obtain(&w, "int2", path, &set), OSCAR_MISMATCH);
  assert_non_null(strstr(oscar_last_error(w.context), "0123456789abcdef..., that of Fake is aaaaaaaaaaaaaaaa..."));
  assert_null(set);
  info.fingerprint = w.model.fingerprint;
  info.layers = FAKE_LAYERS + 1;
  save_as(&w, "int2", &info, path);
  assert_int_equal(obtain(&w, "int2", path, &set), OSCAR_MISMATCH);
  assert_non_null(strstr(oscar_last_error(w.context), "3 layers"));
  assert_int_equal(obtain(&w, "int4", stored_path(&w, "int2"), &set), OSCAR_MISMATCH);
  assert_non_null(strstr(oscar_last_error(w.context), "int2, but int4"));

  size_t before, after;
  overwrite(path, "rubbish", 7);
  assert_int_equal(obtain(&w, "int2", path, &set), OSCAR_FORMAT);
  free(contents(path, &after));
  before = 7;
  assert_int_equal(after, before);
  assert_null(set);
  assert_int_equal(w.model.fed, 0);
  assert_int_equal(w.warnings, 0);
  world_close(&w);
}

static void a_folder_that_cannot_be_written_is_refused_before_the_fit(void **state) {
  (void)state;
  struct world w;
  world_open(&w);
  for (int kind = 0; kind < 2; kind++) {
    oscar_codec_set *set = NULL;
    char *home = getenv("HOME") ? strdup(getenv("HOME")) : NULL;
    if (kind == 0) setenv("XDG_CACHE_HOME", "/dev/null", 1); /* not even root can make a folder there */
    if (kind == 1) {
      setenv("XDG_CACHE_HOME", "", 1);
      unsetenv("HOME");
    }
    w.warnings = 0;
    w.model.fed = 0;
    assert_int_equal(obtain(&w, "int2", NULL, &set), OSCAR_IO);
    if (home) setenv("HOME", home, 1);
    free(home);
    assert_null(set);
    assert_non_null(strstr(oscar_last_error(w.context), "cache folder"));
    assert_int_equal(w.warnings, 0);
    assert_int_equal(w.model.fed, 0);
  }
  world_close(&w);
}

static bool refuse(void *user, const char *what, int64_t done, int64_t total) {
  (void)what;
  (void)total;
  return done < *(const int64_t *)user;
}

static void a_cancelled_fit_leaves_nothing_behind(void **state) {
  (void)state;
  struct world w;
  world_open(&w);
  const char *kv = "int2";
  for (int64_t limit = 0; limit <= 103; limit += 50) {
    struct progress progress = {refuse, &limit};
    oscar_codec_set *set = NULL;
    assert_int_equal(codec_sets_obtain_with(&w.model, 1, &kv, NULL, &w.calibration, &progress, &set), OSCAR_CANCELLED);
    assert_null(set);
    assert_int_equal(stored_files(&w), 0);
  }
  w.model.broken = true; /* a model that gives NaN is not stored either */
  oscar_codec_set *set = NULL;
  assert_int_equal(obtain(&w, "int2", NULL, &set), OSCAR_NUMERIC);
  assert_int_equal(stored_files(&w), 0);
  world_close(&w);
}

static oscar_status read_and_free(struct model *m, const struct calibrate_options *calibration) {
  const char *kv = "int2";
  oscar_codec_set *set = NULL;
  oscar_status status = codec_sets_obtain_with(m, 1, &kv, NULL, calibration, NULL, &set);
  oscar_codec_set_free(set);
  return status;
}

static void running_out_of_memory_while_reading_leaks_nothing(void **state) {
  (void)state;
  struct world w;
  world_open(&w);
  fill_cache(&w);
  struct failing_alloc f;
  oscar_context *c = failing_context(&f);
  struct model m;
  fake_model_init(&m, c);
  sweep_allocations(c, &f, read_and_free(&m, &w.calibration));
  assert_int_equal(m.fed, 0); /* a short memory is no reason to fit again */
  failing_context_free(c, &f);
  world_close(&w);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(the_cache_folder_follows_the_standard),
      cmocka_unit_test(types_without_data_are_built_at_once),
      cmocka_unit_test(the_first_use_fits_and_stores_all_types_and_later_ones_read),
      cmocka_unit_test(two_fits_store_the_same_bytes),
      cmocka_unit_test(a_damaged_stored_file_is_reported_and_replaced),
      cmocka_unit_test(settings_of_another_program_are_fitted_again),
      cmocka_unit_test(a_fit_of_the_users_own_survives_the_fit_of_another_type),
      cmocka_unit_test(a_named_file_is_used_or_refused_but_never_replaced),
      cmocka_unit_test(a_folder_that_cannot_be_written_is_refused_before_the_fit),
      cmocka_unit_test(a_cancelled_fit_leaves_nothing_behind),
      cmocka_unit_test(running_out_of_memory_while_reading_leaks_nothing),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
