/* Half floats against arithmetic on their definition, files against crashes half way, contexts against wrong options. */
#include "support.h"

#include <sched.h>

#include "base/file.h"
#include "base/user_folder.h"

#include <sys/mman.h>
#include <sys/stat.h>

/* The value of a 16-bit float from its fields (IEEE 754, 3.4), independent of the code under test. */
static double half_value(uint16_t h) {
  int exponent = h >> 10 & 31, mantissa = h & 1023;
  double magnitude = exponent ? ldexp(1 + mantissa / 1024.0, exponent - 15) : ldexp(mantissa / 1024.0, -14);
  return h >> 15 ? -magnitude : magnitude;
}

static void every_half_survives_a_round_trip(void **state) {
  (void)state;
  for (uint32_t h = 0; h < 0x10000; h++) {
    bool special = (h >> 10 & 31) == 31;
    float x = f16_to_f32((uint16_t)h);
    if (!special) {
      assert_true((double)x == half_value((uint16_t)h));
      assert_int_equal(f32_to_f16(x), h);
    } else if (h & 1023) {
      assert_true(isnan(x));
      assert_true(isnan(f16_to_f32(f32_to_f16(x))));
    } else {
      assert_true(isinf(x));
      assert_int_equal(f32_to_f16(x), h);
    }
    float b = bf16_to_f32((uint16_t)h);
    if (!isnan(b))
      assert_int_equal(f32_to_bf16(b), h);
    else
      assert_true(isnan(bf16_to_f32(f32_to_bf16(b))));
  }
}

static void halves_round_to_nearest_even(void **state) {
  (void)state;
  for (uint16_t h = 0; h < 0x7BFF; h++) {
    double low = half_value(h), high = half_value((uint16_t)(h + 1)), middle = (low + high) / 2;
    assert_int_equal(f32_to_f16((float)middle), h & 1 ? h + 1 : h);
    assert_int_equal(f32_to_f16(nextafterf((float)middle, 0)), h);
    assert_int_equal(f32_to_f16(nextafterf((float)middle, 1e9f)), h + 1);
  }
  assert_int_equal(f32_to_f16(65519.9f), 0x7BFF);
  assert_int_equal(f32_to_f16(65520.0f), 0x7C00);
  assert_int_equal(f32_to_bf16(1.00390625f), 0x3F80); /* a tie goes to even */
  assert_int_equal(f32_to_bf16(1.01171875f), 0x3F82);
}

static void put_siblings(const char *folder, int cpu, const char *list) {
  char path[512];
  snprintf(path, sizeof path, "mkdir -p %s/cpu%d/topology && printf '%s\\n' >%s/cpu%d/topology/thread_siblings_list", folder, cpu,
           list, folder, cpu);
  assert_int_equal(system(path), 0);
}

/* Two cores of two CPUs each, numbered side by side; two more, numbered far apart; one CPU that nothing is told of. */
static void cpus_that_share_a_core_count_once(void **state) {
  (void)state;
  char folder[] = "/tmp/oscar-cpus-XXXXXX", command[64];
  assert_non_null(mkdtemp(folder));
  put_siblings(folder, 0, "0-1");
  put_siblings(folder, 1, "0-1");
  put_siblings(folder, 2, "2-3");
  put_siblings(folder, 3, "2-3");
  put_siblings(folder, 4, "4,6");
  put_siblings(folder, 5, "5,7");
  put_siblings(folder, 6, "4,6");
  put_siblings(folder, 7, "5,7");
  const bool all[9] = {1, 1, 1, 1, 1, 1, 1, 1, 1}, some[9] = {0, 1, 1, 1, 0, 1, 1, 1, 0}, none[9] = {0};
  assert_int_equal(cpu_count_cores(folder, all, 9), 5);
  assert_int_equal(cpu_count_cores(folder, some, 9), 4); /* 1; 2 with 3; 6; 5 with 7 */
  assert_int_equal(cpu_count_cores(folder, none, 9), 0);
  assert_int_equal(cpu_count_cores("/nowhere", all, 9), 9);
  put_siblings(folder, 1, "nonsense");
  assert_int_equal(cpu_count_cores(folder, all, 9), 6);
  snprintf(command, sizeof command, "rm -r %s", folder);
  assert_int_equal(system(command), 0);
  assert_true(cpu_cores() >= 1 && cpu_cores() <= cpu_available());
}

static void allowed_cpus_are_told_as_ranges(void **state) {
  (void)state;
  cpu_set_t before, set;
  char text[512];
  int some[3], count = 0;
  assert_int_equal(sched_getaffinity(0, sizeof before, &before), 0);
  for (int cpu = 0; cpu < CPU_SETSIZE && count < 3; cpu++)
    if (CPU_ISSET((size_t)cpu, &before)) some[count++] = cpu;
  for (int subset = 1; subset < 1 << count; subset++) {
    CPU_ZERO(&set);
    for (int i = 0; i < count; i++)
      if (subset >> i & 1) CPU_SET((size_t)some[i], &set);
    assert_int_equal(sched_setaffinity(0, sizeof set, &set), 0);
    /* A range, one by one: the same set, if each CPU is told once. */
    cpu_allowed_text(text, sizeof text);
    int told = 0;
    for (char *at = text; *at;) {
      long low = strtol(at, &at, 10), high = low;
      if (*at == '-') high = strtol(at + 1, &at, 10);
      assert_true(!CPU_ISSET((size_t)high + 1, &set));
      for (long cpu = low; cpu <= high; cpu++, told++) assert_true(CPU_ISSET((size_t)cpu, &set));
      assert_true(*at == ',' || *at == '\0');
      if (*at == ',') at++;
    }
    assert_int_equal(told, CPU_COUNT(&set));
  }
  assert_int_equal(sched_setaffinity(0, sizeof before, &before), 0);
  assert_string_equal(cpu_allowed_text(text, 1), "");
}

static void wrong_context_options_are_refused(void **state) {
  (void)state;
  oscar_context_options o;
  oscar_context *context = NULL;
  int first = 0; /* CPU that is allowed */
  while (!cpu_is_allowed(first)) first++;
  oscar_context_options_default(&o);
  o.threads = -1;
  assert_int_equal(oscar_context_create(&o, &context), OSCAR_INVALID_ARGUMENT);
  assert_null(context);
  oscar_context_options_default(&o);
  o.isa = (oscar_isa)99;
  assert_int_equal(oscar_context_create(&o, &context), OSCAR_INVALID_ARGUMENT);
  const struct {
    int threads, cpus[2], n_cpus;
  } wrong[] = {{0, {first, first}, 2}, {0, {first, -1}, 2}, {0, {CPU_LIST_ROOM}, 1},
               {2, {first}, 1},        {0, {first}, 0},     {0, {first}, -1}};
  for (size_t i = 0; i < ARRAY_LENGTH(wrong); i++) {
    oscar_context_options_default(&o);
    o.threads = wrong[i].threads;
    o.cpus = wrong[i].cpus;
    o.n_cpus = wrong[i].n_cpus;
    assert_int_equal(oscar_context_create(&o, &context), OSCAR_INVALID_ARGUMENT);
    assert_null(context);
  }
  oscar_context_options_default(&o);
  o.n_cpus = 1;
  assert_int_equal(oscar_context_create(&o, &context), OSCAR_INVALID_ARGUMENT);
  assert_int_equal(oscar_context_create(NULL, &context), OSCAR_OK);
  assert_true(oscar_context_threads(context) >= 1);
  assert_int_not_equal(oscar_context_isa(context), OSCAR_ISA_AUTO);
  oscar_context_free(context);
}

static void errors_nest_and_never_overflow(void **state) {
  (void)state;
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 1);
  set_error(c, OSCAR_FORMAT, "tensor %d", 3);
  assert_int_equal(prefix_error(c, OSCAR_FORMAT, "file %s", "x"), OSCAR_FORMAT);
  assert_string_equal(oscar_last_error(c), "file x: tensor 3");
  char longer[4096];
  memset(longer, 'a', sizeof longer - 1);
  longer[sizeof longer - 1] = '\0';
  for (int i = 0; i < 5; i++) prefix_error(c, OSCAR_IO, "%s", i & 1 ? longer : "p");
  assert_true(strlen(oscar_last_error(c)) < 1024);
  oscar_context_free(c);
}

static void impossible_sizes_are_out_of_memory(void **state) {
  (void)state;
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 1);
  volatile size_t huge = SIZE_MAX / 2;
  assert_null(mem_alloc(c, huge, 3));
  assert_null(mem_alloc(c, huge, 2));
  assert_string_not_equal(oscar_last_error(c), "");
  void *nothing = mem_alloc(c, 0, 8);
  assert_non_null(nothing);
  assert_int_equal((uintptr_t)nothing % 64, 0);
  mem_free(c, nothing);
  oscar_context_free(c);
}

static void the_peak_of_memory_can_be_counted_anew(void **state) {
  (void)state;
  const size_t bytes = (size_t)64 << 20;
  uint8_t *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0); /* no allocator keeps it */
  assert_true(memory != MAP_FAILED);
  for (size_t i = 0; i < bytes; i += 4096) ((volatile uint8_t *)memory)[i] = 1;
  assert_int_equal(munmap(memory, bytes), 0);
  size_t before = mem_peak_bytes();
  if (before == 0 || !mem_peak_restart()) skip();
  assert_true(before > bytes);
  assert_true(mem_peak_bytes() < before - bytes / 2);
}

static void an_aborted_write_leaves_the_old_file(void **state) {
  (void)state;
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 1);
  char folder[] = "/tmp/oscar-test-XXXXXX", path[128], deep[128];
  assert_non_null(mkdtemp(folder));
  snprintf(path, sizeof path, "%s/file", folder);
  struct file_writer w;
  struct file_map map;
  assert_ok(c, file_writer_open(c, path, &w));
  fputs("first", w.stream);
  assert_ok(c, file_writer_commit(c, &w));
  assert_ok(c, file_writer_open(c, path, &w));
  fputs("second", w.stream);
  file_writer_abort(c, &w);
  assert_ok(c, file_map_open(c, path, &map));
  assert_int_equal(map.bytes, 5);
  assert_memory_equal(map.data, "first", 5);
  file_map_close(&map);
  assert_int_equal(unlink(path), 0);
  snprintf(deep, sizeof deep, "%s/a/b", folder);
  assert_ok(c, file_make_folders(c, deep));
  assert_ok(c, file_make_folders(c, deep));
  assert_int_equal(rmdir(deep), 0);
  snprintf(deep, sizeof deep, "%s/a", folder);
  assert_int_equal(rmdir(deep), 0);
  assert_int_equal(rmdir(folder), 0); /* nothing temporary was left */

  assert_int_equal(file_map_open(c, "/nonexistent/file", &map), OSCAR_IO);
  assert_int_equal(file_map_open(c, "/tmp", &map), OSCAR_IO);
  assert_int_equal(file_writer_open(c, "/nonexistent/file", &w), OSCAR_IO);
  assert_int_equal(file_writer_open(c, "/tmp", &w), OSCAR_IO);
  assert_non_null(strstr(oscar_last_error(c), "a folder"));
  assert_int_equal(file_writer_open(c, "/dev/null", &w), OSCAR_IO); /* it would be replaced */
  assert_int_equal(file_make_folders(c, "/dev/null/x"), OSCAR_IO);
  oscar_context_free(c);
}

static void touch(const char *path) {
  FILE *file = fopen(path, "w");
  assert_non_null(file);
  fclose(file);
}

static void what_killed_writers_left_is_removed(void **state) {
  (void)state;
  static const char *const abandoned[] = {"a.session.123.tmp", "a.b.session.4.tmp"};
  static const char *const others[] = {"a.session", "b.session.tmp", "c.session.12x.tmp", ".session.1.tmp", "d.other.1.tmp"};
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 1);
  char folder[] = "/tmp/oscar-test-XXXXXX", path[128];
  assert_non_null(mkdtemp(folder));
  for (size_t i = 0; i < ARRAY_LENGTH(abandoned); i++) {
    snprintf(path, sizeof path, "%s/%s", folder, abandoned[i]);
    touch(path);
  }
  for (size_t i = 0; i < ARRAY_LENGTH(others); i++) {
    snprintf(path, sizeof path, "%s/%s", folder, others[i]);
    touch(path);
  }
  struct file_writer w;
  snprintf(path, sizeof path, "%s/written.session", folder);
  assert_ok(c, file_writer_open(c, path, &w));
  fputs("whole", w.stream);
  file_remove_abandoned(c, folder, ".session");
  assert_ok(c, file_writer_commit(c, &w)); /* it was there still */
  assert_int_equal(unlink(path), 0);
  for (size_t i = 0; i < ARRAY_LENGTH(others); i++) {
    snprintf(path, sizeof path, "%s/%s", folder, others[i]);
    assert_int_equal(unlink(path), 0);
  }
  assert_int_equal(rmdir(folder), 0);
  file_remove_abandoned(c, folder, ".session"); /* there is none: no harm */
  oscar_context_free(c);
}

static void the_folder_of_a_file_is_made(void **state) {
  (void)state;
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 1);
  char folder[] = "/tmp/oscar-test-XXXXXX", file[64], between[64];
  assert_non_null(mkdtemp(folder));
  snprintf(file, sizeof file, "%s/a/file", folder);
  snprintf(between, sizeof between, "%s/a", folder);
  assert_ok(c, file_make_folder_of(c, file));
  assert_int_equal(rmdir(between), 0);
  assert_int_equal(rmdir(folder), 0);
  assert_ok(c, file_make_folder_of(c, "file"));
  assert_ok(c, file_make_folder_of(c, "/file"));
  assert_int_equal(file_make_folder_of(c, "/dev/null/x/file"), OSCAR_IO);
  oscar_context_free(c);
}

static void a_users_folders_follow_the_standard(void **state) {
  (void)state;
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 1);
  static const struct {
    enum user_folder which;
    const char *variable, *in_home;
  } folders[] = {{USER_CACHE, "XDG_CACHE_HOME", "/home/someone/.cache/oscar"},
                 {USER_DATA, "XDG_DATA_HOME", "/home/someone/.local/share/oscar"}};
  char *home = strdup(getenv("HOME") ? getenv("HOME") : "/"), path[64], small[8];
  for (size_t i = 0; i < ARRAY_LENGTH(folders); i++) {
    const char *before = getenv(folders[i].variable);
    char *kept = before ? strdup(before) : NULL;
    setenv("HOME", "/home/someone", 1);
    setenv(folders[i].variable, "/x/y", 1);
    assert_ok(c, user_folder(c, folders[i].which, path, sizeof path));
    assert_string_equal(path, "/x/y/oscar");
    assert_int_equal(user_folder(c, folders[i].which, small, sizeof small), OSCAR_IO);
    setenv(folders[i].variable, "relative", 1);
    assert_ok(c, user_folder(c, folders[i].which, path, sizeof path));
    assert_string_equal(path, folders[i].in_home);
    setenv("HOME", "relative", 1);
    assert_int_equal(user_folder(c, folders[i].which, path, sizeof path), OSCAR_IO);
    assert_non_null(strstr(oscar_last_error(c), folders[i].variable));
    if (kept)
      setenv(folders[i].variable, kept, 1);
    else
      unsetenv(folders[i].variable);
    free(kept);
  }
  setenv("HOME", home, 1);
  free(home);
  oscar_context_free(c);
}

/* Bytes of a mapping that this process has in memory (/proc/self/pagemap, bit 63: present). */
static size_t present_bytes(const struct file_map *map) {
  const size_t page = (size_t)sysconf(_SC_PAGESIZE);
  FILE *file = fopen("/proc/self/pagemap", "rb");
  if (!file) skip();
  size_t present = 0;
  uint64_t entry;
  assert_int_equal(fseek(file, (long)((uintptr_t)map->data / page * sizeof entry), SEEK_SET), 0);
  for (size_t at = 0; at < map->bytes && fread(&entry, sizeof entry, 1, file) == 1; at += page) present += page * (entry >> 63);
  fclose(file);
  return present;
}

static void released_pages_leave_and_come_back(void **state) {
  (void)state;
  enum { BYTES = 1 << 20, FROM = 100001, RELEASED = 500000 };
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 1);
  char path[] = "/tmp/oscar-test-XXXXXX";
  int fd = mkstemp(path);
  assert_true(fd >= 0);
  uint8_t *bytes = malloc(BYTES);
  assert_non_null(bytes);
  for (size_t i = 0; i < BYTES; i++) bytes[i] = (uint8_t)(i * 7 + i / 4096);
  assert_int_equal(write(fd, bytes, BYTES), BYTES);
  close(fd);
  struct file_map map;
  assert_ok(c, file_map_open(c, path, &map));
  assert_memory_equal(map.data, bytes, BYTES);
  assert_int_equal(present_bytes(&map), BYTES);
  file_map_release(&map, map.data + FROM, RELEASED);
  const size_t page = (size_t)sysconf(_SC_PAGESIZE), whole = (FROM + RELEASED) / page - (FROM + page - 1) / page;
  assert_int_equal(present_bytes(&map), BYTES - whole * page);
  file_map_release(&map, map.data + 5000, 100); /* within a page: nothing to release */
  file_map_release(&map, map.data + 4097, 4096);
  file_map_release(&map, map.data + BYTES, 0);
  assert_memory_equal(map.data, bytes, BYTES);
  assert_int_equal(present_bytes(&map), BYTES);
  file_map_close(&map);
  assert_int_equal(unlink(path), 0);
  free(bytes);
  oscar_context_free(c);
}

static void a_full_disk_is_reported_and_changes_nothing(void **state) {
  (void)state;
  if (access("/dev/full", W_OK) != 0) skip();
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 1);
  char folder[] = "/tmp/oscar-test-XXXXXX", path[128];
  assert_non_null(mkdtemp(folder));
  snprintf(path, sizeof path, "%s/file", folder);
  struct file_writer w;
  assert_ok(c, file_writer_open(c, path, &w));
  assert_non_null(freopen("/dev/full", "wb", w.stream)); /* every write now fails as on a full disk */
  fputs("data", w.stream);
  assert_int_equal(file_writer_commit(c, &w), OSCAR_IO);
  assert_non_null(strstr(oscar_last_error(c), "No space"));
  assert_int_equal(access(path, F_OK), -1);
  assert_int_equal(rmdir(folder), 0);
  oscar_context_free(c);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(every_half_survives_a_round_trip),
      cmocka_unit_test(halves_round_to_nearest_even),
      cmocka_unit_test(cpus_that_share_a_core_count_once),
      cmocka_unit_test(allowed_cpus_are_told_as_ranges),
      cmocka_unit_test(wrong_context_options_are_refused),
      cmocka_unit_test(errors_nest_and_never_overflow),
      cmocka_unit_test(impossible_sizes_are_out_of_memory),
      cmocka_unit_test(the_peak_of_memory_can_be_counted_anew),
      cmocka_unit_test(an_aborted_write_leaves_the_old_file),
      cmocka_unit_test(released_pages_leave_and_come_back),
      cmocka_unit_test(a_full_disk_is_reported_and_changes_nothing),
      cmocka_unit_test(what_killed_writers_left_is_removed),
      cmocka_unit_test(the_folder_of_a_file_is_made),
      cmocka_unit_test(a_users_folders_follow_the_standard),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
