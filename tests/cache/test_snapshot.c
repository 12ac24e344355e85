/*
 * Saved sequences come back bit for bit, in every form of rows, at every kind of length, from forks and after rewinds, and go on
 * as the sequences that were saved; damaged, cut and foreign files are refused with a reason and change nothing.
 */
#include "../failing_alloc.h"
#include "support.h"

#include "cache/snapshot_format.h"

#include <dirent.h>
#include <errno.h>
#include <pthread.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <signal.h>

static char folder[64], path[96];

static int make_folder(void **state) {
  (void)state;
  snprintf(folder, sizeof folder, "/tmp/oscar_snapshot_XXXXXX");
  if (!mkdtemp(folder)) return -1;
  snprintf(path, sizeof path, "%s/a.snapshot", folder);
  return 0;
}

static int files_in_folder(void) {
  DIR *dir = opendir(folder);
  assert_non_null(dir);
  int n = 0;
  for (struct dirent *e; (e = readdir(dir));) n += e->d_name[0] != '.';
  closedir(dir);
  return n;
}

static int remove_folder(void **state) {
  (void)state;
  unlink(path);
  return rmdir(folder);
}

static void save(oscar_context *c, const oscar_sequence *s) {
  const int64_t n = oscar_sequence_length(s) + 1;
  int32_t *ids = malloc((size_t)n * sizeof *ids);
  assert_non_null(ids);
  for (int64_t i = 0; i < n; i++) ids[i] = (int32_t)(7 * i);
  const oscar_snapshot_contents contents = {.model = "a model", .ids = ids, .n_ids = n, .text = "a text", .text_bytes = 6};
  assert_ok(c, oscar_sequence_save(s, &contents, path));
  free(ids);
}

static oscar_status restore(oscar_context *c, oscar_cache *cache, const char *model, oscar_sequence **s) {
  oscar_snapshot *snapshot = NULL;
  *s = NULL;
  oscar_status status = oscar_snapshot_open(c, path, &snapshot);
  if (status == OSCAR_OK) status = oscar_snapshot_restore(snapshot, cache, model, s);
  oscar_snapshot_close(snapshot);
  return status;
}

/* A second world of the same geometry, and in it the twin of what was saved of t. */
static struct twin *restored_twin(struct world *into, const struct twin *t) {
  struct twin *copy = malloc(sizeof *copy);
  assert_non_null(copy);
  *copy = *t;
  assert_ok(into->context, restore(into->context, into->cache, "a model", &copy->sequence));
  return into->twins[0] = copy;
}

static void require_same_future(struct world *a, struct twin *t, struct world *b, struct twin *u) {
  const int steps[] = {1, 3, 64, 200, 1};
  compare_all(b);
  for (size_t i = 0; i < ARRAY_LENGTH(steps); i++) {
    a->next_tag = b->next_tag = 1000 + 100000 * (uint64_t)i;
    assert_true(twin_feed(a, t, steps[i]));
    assert_true(twin_feed(b, u, steps[i]));
    compare_all(a);
    compare_all(b);
  }
  const int64_t back = t->length / 2;
  assert_true(twin_truncate(b, u, back, OSCAR_REWIND_EXACT) && twin_truncate(a, t, back, OSCAR_REWIND_EXACT));
  assert_int_equal(t->length, u->length);
  compare_all(b);
}

static void a_sequence_comes_back(void **state) {
  (void)state;
  const int lengths[] = {0, 1, 63, 64, 65, 127, 128, 320, 321, 383, 384, 385, 511, 700};
  for (size_t g = 0; g < ARRAY_LENGTH(geometries); g++) {
    if (geometries[g].crumbs[0] < 0) continue; /* a filter has no codes */
    for (size_t i = 0; i < ARRAY_LENGTH(lengths); i++) {
      if (test_only_threads() && i % 6 != 5) continue; /* of three threads and of two */
      struct world a, b;
      open_world(&a, &geometries[g], 1 + (int)(i % 3));
      open_world(&b, &geometries[g], 1 + (int)(i % 2));
      struct twin *t = a.twins[0] = twin_create(&a);
      if (lengths[i]) assert_true(twin_feed(&a, t, lengths[i]));
      save(a.context, t->sequence);
      require_same_future(&a, t, &b, restored_twin(&b, t));
      close_world(&a);
      close_world(&b);
    }
  }
}

static void so_do_forks_and_rewound_sequences(void **state) {
  (void)state;
  uint64_t seed = 5;
  for (int round = 0; round < rounds(20, 60); round++) {
    const struct geometry *g = &geometries[round % (int)ARRAY_LENGTH(geometries)];
    if (g->crumbs[0] < 0) continue;
    struct world a, b;
    open_world(&a, g, 2);
    open_world(&b, g, 2);
    for (int i = 0; i < 40; i++) operate(&a, choose_random, &seed);
    for (size_t i = 0; i < ARRAY_LENGTH(a.twins); i++) {
      struct twin *t = a.twins[i];
      if (!t || t->length + 300 > MODEL_TOKENS) continue;
      if (t->step) twin_abort(&a, t);
      save(a.context, t->sequence);
      struct twin *u = restored_twin(&b, t);
      compare_all(&b);
      if (twin_feed(&a, t, 130)) { /* its cache may be full */
        memcpy(u->tags, t->tags, sizeof u->tags);
        b.next_tag = t->tags[u->length];
        assert_true(twin_feed(&b, u, 130));
        assert_memory_equal(u->coded, t->coded, sizeof u->coded);
        compare_all(&b);
      }
      twin_free(u);
      b.twins[0] = NULL;
    }
    assert_ok(b.context, oscar_cache_check(b.cache));
    assert_int_equal(usage_of(&b).exact_pages + usage_of(&b).coded_pages, 0);
    close_world(&a);
    close_world(&b);
  }
}

/* ---- log gains and a mean that turns ---- */

static oscar_codec_set *turning_codecs(oscar_context *c, float first_step) {
  enum { D = 64, LAYERS = 2, HEADS = 2 };
  const oscar_codec_set_info info = {LAYERS, HEADS, D, "turning", "", ""};
  float frequencies[D / 2], steps[D], turning[2 * 8];
  uint16_t pairs[8];
  for (int i = 0; i < D / 2; i++) frequencies[i] = powf(10000, -(float)i / (D / 2));
  for (int i = 0; i < D; i++) steps[i] = 1 + 0.01f * (float)i;
  for (int i = 0; i < 16; i++) turning[i] = (float)i - 7;
  for (int i = 0; i < 8; i++) pairs[i] = (uint16_t)(3 * i);
  steps[0] = first_step;
  const oscar_rope_spec turn = {OSCAR_ROPE_HALVES, D, frequencies};
  oscar_rope *rope;
  oscar_codec_set *set;
  assert_ok(c, oscar_rope_create(c, &turn, &rope));
  assert_ok(c, oscar_codec_set_create(c, &info, &set));
  for (int i = 0; i < LAYERS * HEADS * 2; i++) {
    const bool keys = i % 2 == 0;
    oscar_codec_spec spec = {.head_dim = D, .channels = D, .form = OSCAR_ROW_LOG_GAINS, .groups = 4, .steps = steps};
    if (keys) spec.rope = rope, spec.rotating_pairs = 8, spec.rotating_pair = pairs, spec.rotating_mean = turning;
    oscar_codec *codec;
    assert_ok(c, oscar_codec_create(c, &spec, &codec));
    assert_ok(c, oscar_codec_set_assign(set, i / 4, i / 2 % 2, (oscar_side)(i % 2), codec));
    oscar_codec_release(codec);
  }
  oscar_rope_release(rope);
  return set;
}

static oscar_cache *turning_cache(oscar_context *c, const oscar_codec_set *codecs, int recent) {
  oscar_cache_options o = {.layers = 2, .kv_heads = 2, .head_dim = 64, .sink_pages = 1, .recent_pages = recent, .codecs = codecs};
  o.budget_bytes = oscar_cache_bytes_for(&o, 2048, 2, 1024);
  oscar_cache *cache;
  assert_ok(c, oscar_cache_create(c, &o, &cache));
  return cache;
}

static void feed_random(oscar_context *c, oscar_sequence *s, int n, uint64_t seed) {
  float *x = malloc((size_t)n * 128 * sizeof *x);
  assert_non_null(x);
  for (int i = 0; i < n * 128; i++) x[i] = test_normal(&seed);
  assert_ok(c, oscar_sequence_begin(s, n));
  for (int layer = 0; layer < 2; layer++) assert_ok(c, oscar_sequence_write(s, layer, x, x));
  assert_ok(c, oscar_sequence_commit(s));
  free(x);
}

static void require_same_pages(oscar_context *c, const oscar_sequence *a, const oscar_sequence *b) {
  static uint8_t page[2][2][64 * 128];
  memset(page, 0, sizeof page);
  assert_int_equal(oscar_sequence_length(a), oscar_sequence_length(b));
  for (int p = 0; p < (int)page_count(oscar_sequence_length(a)); p++)
    for (int i = 0; i < 4; i++) {
      bool coded[2];
      assert_ok(c, oscar_sequence_read_page(a, p, i / 2, i % 2, &coded[0], page[0][0], page[0][1]));
      assert_ok(c, oscar_sequence_read_page(b, p, i / 2, i % 2, &coded[1], page[1][0], page[1][1]));
      assert_int_equal(coded[0], coded[1]);
      assert_memory_equal(page[0], page[1], sizeof page[0]);
    }
}

static void rows_with_log_gains_and_turning_means_come_back(void **state) {
  (void)state;
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 2);
  oscar_codec_set *codecs = turning_codecs(c, 1);
  oscar_cache *cache = turning_cache(c, codecs, 2), *other = turning_cache(c, codecs, 2);
  oscar_sequence *s, *r;
  assert_ok(c, oscar_sequence_create(cache, &s));
  feed_random(c, s, 700, 1);
  save(c, s);
  assert_ok(c, restore(c, other, "a model", &r));
  require_same_pages(c, s, r);
  feed_random(c, s, 300, 2);
  feed_random(c, r, 300, 2);
  require_same_pages(c, s, r);
  assert_ok(c, oscar_cache_check(other));
  oscar_cache_free(cache);
  oscar_cache_free(other);
  oscar_codec_set_free(codecs);
  oscar_context_free(c);
}

/* ---- what is refused ---- */

#define assert_refused(c, call, status, words)                                                                                   \
  do {                                                                                                                           \
    (c)->error[0] = '\0';                                                                                                        \
    assert_int_equal((call), (status));                                                                                          \
    if (!strstr(oscar_last_error(c), words)) fail_msg("'%s' is not in: %s", words, oscar_last_error(c));                         \
  } while (0)

static void foreign_files_are_refused(void **state) {
  (void)state;
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 1);
  oscar_codec_set *codecs = turning_codecs(c, 1), *others = turning_codecs(c, 1.5f);
  oscar_cache *cache = turning_cache(c, codecs, 2), *windows = turning_cache(c, codecs, 3),
              *rotated = turning_cache(c, others, 2), *plain = turning_cache(c, NULL, 2);
  oscar_sequence *s, *r;
  assert_ok(c, oscar_sequence_create(cache, &s));
  feed_random(c, s, 500, 1);
  save(c, s);
  assert_refused(c, restore(c, cache, "another model", &r), OSCAR_MISMATCH, "another model");
  assert_refused(c, restore(c, windows, NULL, &r), OSCAR_MISMATCH, "128 latest tokens; this cache has 64 and 192");
  assert_refused(c, restore(c, rotated, NULL, &r), OSCAR_MISMATCH, "other codecs");
  assert_refused(c, restore(c, plain, NULL, &r), OSCAR_MISMATCH, "form turning; this one is bf16");
  struct world small;
  open_world(&small, &geometries[0], 1);
  oscar_snapshot *snapshot;
  assert_ok(small.context, oscar_snapshot_open(small.context, path, &snapshot));
  assert_refused(small.context, oscar_snapshot_restore(snapshot, small.cache, NULL, &r), OSCAR_MISMATCH, "head dimension 64");
  oscar_snapshot_close(snapshot);
  close_world(&small);
  oscar_sequence *full; /* a cache without room */
  assert_ok(c, oscar_sequence_create(cache, &full));
  oscar_cache_usage before, after;
  while (oscar_sequence_begin(full, 64) == OSCAR_OK) {
    oscar_sequence_abort(full);
    feed_random(c, full, 64, 3);
  }
  oscar_cache_usage_get(cache, &before);
  assert_refused(c, restore(c, cache, NULL, &r), OSCAR_NO_SPACE, "the cache is full");
  assert_null(r);
  oscar_cache_usage_get(cache, &after);
  assert_memory_equal(&before, &after, sizeof before);
  assert_ok(c, oscar_sequence_begin(s, 1));
  const oscar_snapshot_contents none = {0};
  assert_refused(c, oscar_sequence_save(s, &none, path), OSCAR_INVALID_ARGUMENT, "step is open");
  oscar_sequence_abort(s);
  assert_refused(c, oscar_sequence_save(s, &none, path), OSCAR_INVALID_ARGUMENT, "0 token ids");
  oscar_cache_free(cache), oscar_cache_free(windows), oscar_cache_free(rotated), oscar_cache_free(plain);
  oscar_codec_set_free(codecs), oscar_codec_set_free(others);
  oscar_context_free(c);
}

static uint8_t *read_file(size_t *bytes) {
  struct stat info;
  assert_int_equal(stat(path, &info), 0);
  *bytes = (size_t)info.st_size;
  uint8_t *data = malloc(*bytes);
  FILE *file = fopen(path, "rb");
  assert_true(data && file && fread(data, 1, *bytes, file) == *bytes);
  fclose(file);
  return data;
}

static oscar_status parse_and_restore(oscar_context *c, oscar_cache *cache, const uint8_t *data, size_t bytes) {
  oscar_snapshot *snapshot = NULL;
  oscar_sequence *r = NULL;
  oscar_status status = snapshot_parse(c, "file", data, bytes, &snapshot);
  if (status == OSCAR_OK) status = oscar_snapshot_restore(snapshot, cache, NULL, &r);
  if (status != OSCAR_OK) assert_null(r);
  oscar_snapshot_close(snapshot);
  oscar_sequence_free(r);
  return status;
}

static void every_flipped_byte_and_every_cut_is_found(void **state) {
  (void)state;
  struct world w;
  open_world(&w, &geometries[4], 1); /* without recent pages: most are codes */
  struct twin *t = w.twins[0] = twin_create(&w);
  assert_true(twin_feed(&w, t, 64 * 3 + 5));
  save(w.context, t->sequence);
  size_t bytes;
  uint8_t *data = read_file(&bytes);
  assert_int_equal(parse_and_restore(w.context, w.cache, data, bytes), OSCAR_OK);
  const struct picture before = picture_of(&w);
  uint64_t seed = 9;
  for (size_t at = 0; at < bytes; at += at < 2000 ? 1 : 1 + (size_t)(test_random(&seed) % 40)) {
    const uint8_t flip = (uint8_t)(1u << test_random(&seed) % 8);
    data[at] ^= flip;
    w.context->error[0] = '\0';
    oscar_status status = parse_and_restore(w.context, w.cache, data, bytes);
    if (status != OSCAR_FORMAT && status != OSCAR_UNSUPPORTED) fail_msg("byte %zu flipped: %s", at, oscar_status_name(status));
    assert_non_null(strstr(oscar_last_error(w.context), "file: "));
    require_unchanged(&w, &before);
    data[at] ^= flip;
  }
  for (size_t cut = 0; cut < bytes; cut += cut < 1000 ? 1 : 1 + (size_t)(test_random(&seed) % 100)) {
    uint8_t *copy = malloc(cut + 1); /* nothing behind the last byte */
    assert_non_null(copy);
    memcpy(copy, data, cut);
    assert_int_equal(parse_and_restore(w.context, w.cache, copy, cut), OSCAR_FORMAT);
    free(copy);
  }
  uint8_t *longer = calloc(bytes + 1, 1);
  assert_non_null(longer);
  memcpy(longer, data, bytes);
  assert_int_equal(parse_and_restore(w.context, w.cache, longer, bytes + 1), OSCAR_FORMAT);
  free(longer);
  require_unchanged(&w, &before);
  compare_all(&w);
  free(data);
  close_world(&w);
}

static void require_is_one(oscar_context *c, bool expected) {
  bool is = !expected;
  assert_ok(c, oscar_snapshot_is_one(c, path, &is));
  assert_int_equal(is, expected);
}

static void write_bytes(const void *data, size_t bytes) {
  FILE *f = fopen(path, "wb");
  assert_non_null(f);
  assert_int_equal(fwrite(data, 1, bytes, f), bytes);
  assert_int_equal(fclose(f), 0);
}

/* A damaged one still is one; what is shorter than its beginning, or begins otherwise, is none. */
static void a_snapshot_is_known_by_its_beginning(void **state) {
  (void)state;
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 1);
  bool is;
  unlink(path);
  assert_int_equal(oscar_snapshot_is_one(c, path, &is), OSCAR_IO);
  assert_non_null(strstr(oscar_last_error(c), path));
  assert_int_equal(oscar_snapshot_is_one(c, folder, &is), OSCAR_IO);
  write_bytes("\x89OSCARKV and then nothing of the kind", 38);
  require_is_one(c, true);
  write_bytes("\x89OSCARKV", 8);
  require_is_one(c, true);
  write_bytes("\x89OSCARKV", 7);
  require_is_one(c, false);
  write_bytes("", 0);
  require_is_one(c, false);
  write_bytes("once upon a time", 16);
  require_is_one(c, false);
  oscar_context_free(c);
}

static void damage_is_named(void **state) {
  (void)state;
  struct world w;
  open_world(&w, &geometries[4], 1);
  struct twin *t = w.twins[0] = twin_create(&w);
  assert_true(twin_feed(&w, t, 64 * 3 + 5));
  save(w.context, t->sequence);
  size_t bytes;
  uint8_t *data = read_file(&bytes);
  data[100] ^= 1;
  assert_refused(w.context, parse_and_restore(w.context, w.cache, data, bytes), OSCAR_FORMAT, "the header is damaged");
  data[100] ^= 1;
  data[260] ^= 1;
  assert_refused(w.context, parse_and_restore(w.context, w.cache, data, bytes), OSCAR_FORMAT,
                 "forms, text, token ids or page table");
  data[260] ^= 1;
  data[bytes - 1] ^= 1;
  assert_refused(w.context, parse_and_restore(w.context, w.cache, data, bytes), OSCAR_FORMAT, "page 3 of 4 (exact) is damaged");
  data[bytes - 1] ^= 1;
  assert_refused(w.context, parse_and_restore(w.context, w.cache, data, bytes - 1), OSCAR_FORMAT, "expected");
  data[8] = 3;
  assert_refused(w.context, parse_and_restore(w.context, w.cache, data, bytes), OSCAR_UNSUPPORTED, "version 3");
  free(data);
  close_world(&w);
}

/* ---- what fails on the way ---- */

static oscar_status save_once(const oscar_sequence *s, const int32_t *ids) {
  const oscar_snapshot_contents contents = {.ids = ids, .n_ids = oscar_sequence_length(s), .text = "x", .text_bytes = 1};
  return oscar_sequence_save(s, &contents, path);
}

static oscar_status capture_once(const oscar_sequence *s, oscar_capture **capture) {
  enum { N = 701 };
  int32_t ids[N];
  for (int i = 0; i < N; i++) ids[i] = 7 * i;
  const oscar_snapshot_contents contents = {
      .model = "a model", .ids = ids, .n_ids = oscar_sequence_length(s) + 1, .text = "a text", .text_bytes = 6};
  const oscar_status status = oscar_sequence_capture(s, &contents, capture);
  if (status == OSCAR_OK) assert_int_equal(oscar_capture_bytes(*capture), oscar_sequence_capture_bytes(s, &contents));
  return status;
}

static void no_allocation_may_fail_unnoticed(void **state) {
  (void)state;
  struct failing_alloc f;
  oscar_context *c = failing_context(&f);
  struct world w;
  world_open(&w, c, &geometries[1], 1024, 3, 512);
  struct twin *t = w.twins[0] = twin_create(&w);
  assert_true(twin_feed(&w, t, 500));
  const int32_t ids[500] = {0};
  sweep_allocations(c, &f, save_once(t->sequence, ids));
  assert_int_equal(files_in_folder(), 1); /* and no temporary one */
  oscar_capture *capture;
  sweep_allocations(c, &f, capture_once(t->sequence, &capture));
  oscar_capture_free(capture);
  oscar_sequence *r;
  sweep_allocations(c, &f, restore(c, w.cache, NULL, &r));
  require_same_pages(c, t->sequence, r);
  assert_ok(c, oscar_cache_check(w.cache));
  world_close(&w);
  failing_context_free(c, &f);
}

static void a_full_disk_leaves_the_old_file(void **state) {
  (void)state;
  struct world w;
  open_world(&w, &geometries[0], 1);
  struct twin *t = w.twins[0] = twin_create(&w);
  assert_true(twin_feed(&w, t, 100));
  save(w.context, t->sequence);
  size_t bytes, after;
  uint8_t *data = read_file(&bytes);
  assert_true(twin_feed(&w, t, 1000));
  struct rlimit limit, small;
  assert_int_equal(getrlimit(RLIMIT_FSIZE, &limit), 0);
  signal(SIGXFSZ, SIG_IGN);
  const int32_t ids[1100] = {0};
  for (rlim_t room = 0; room < 400000; room += 50000) {
    small = (struct rlimit){room, limit.rlim_max};
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &small), 0);
    const oscar_status status = save_once(t->sequence, ids);
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &limit), 0);
    assert_int_equal(status, OSCAR_IO);
    assert_non_null(strstr(oscar_last_error(w.context), path));
  }
  assert_int_equal(files_in_folder(), 1);
  uint8_t *again = read_file(&after);
  assert_int_equal(bytes, after);
  assert_memory_equal(data, again, bytes);
  free(data), free(again);
  close_world(&w);
}

static void *save_again_and_again(void *arg) {
  const struct twin *t = arg;
  const int32_t ids[400] = {0};
  bool all = true;
  for (int i = 0; i < 30; i++) all = all && save_once(t->sequence, ids) == OSCAR_OK;
  return all ? arg : NULL;
}

/* A copy is written by another thread with a context of its own, when its sequence has gone on, or gone. */
struct late {
  oscar_context *context;
  oscar_capture *capture;
  oscar_status status;
};

static void *write_late(void *arg) {
  struct late *late = arg;
  late->status = oscar_capture_save(late->capture, late->context, path);
  return NULL;
}

static void write_on_another_thread(struct late *late) {
  pthread_t thread;
  late->context = test_context(OSCAR_ISA_AUTO, 1);
  assert_int_equal(pthread_create(&thread, NULL, write_late, late), 0);
  assert_int_equal(pthread_join(thread, NULL), 0);
  assert_ok(late->context, late->status);
  oscar_context_free(late->context);
  oscar_capture_free(late->capture);
}

static void a_copy_can_be_written_later(void **state) {
  (void)state;
  const int lengths[] = {0, 1, 64, 100, 450, 700};
  for (size_t g = 0; g < ARRAY_LENGTH(geometries); g++)
    for (size_t i = 0; i < ARRAY_LENGTH(lengths) && geometries[g].crumbs[0] >= 0; i++) {
      struct world a, b;
      struct late late;
      size_t bytes, later;
      open_world(&a, &geometries[g], 2);
      open_world(&b, &geometries[g], 1);
      struct twin *t = a.twins[0] = twin_create(&a);
      if (lengths[i]) assert_true(twin_feed(&a, t, lengths[i]));
      save(a.context, t->sequence);
      uint8_t *whole = read_file(&bytes);
      assert_ok(a.context, capture_once(t->sequence, &late.capture));
      assert_true(twin_feed(&a, t, 300));
      twin_free(t);
      a.twins[0] = twin_create(&a);
      assert_true(twin_feed(&a, a.twins[0], 500)); /* where its pages were */
      write_on_another_thread(&late);
      uint8_t *written = read_file(&later);
      assert_int_equal(later, bytes);
      const size_t header = sizeof(struct snapshot_header); /* with the time */
      assert_memory_equal(written + header, whole + header, bytes - header);
      oscar_sequence *s;
      assert_ok(b.context, restore(b.context, b.cache, "a model", &s));
      assert_int_equal(oscar_sequence_length(s), lengths[i]);
      oscar_sequence_free(s);
      free(whole);
      free(written);
      close_world(&a);
      close_world(&b);
    }
}

static void of_two_writers_one_wins(void **state) {
  (void)state;
  struct world w[2];
  pthread_t threads[2];
  for (int i = 0; i < 2; i++) {
    open_world(&w[i], &geometries[1], 1);
    w[i].twins[0] = twin_create(&w[i]);
    assert_true(twin_feed(&w[i], w[i].twins[0], 200 + 200 * i));
  }
  for (int i = 0; i < 2; i++) assert_int_equal(pthread_create(&threads[i], NULL, save_again_and_again, w[i].twins[0]), 0);
  for (int i = 0; i < 2; i++) {
    void *result;
    assert_int_equal(pthread_join(threads[i], &result), 0);
    assert_non_null(result);
  }
  assert_int_equal(files_in_folder(), 1);
  oscar_sequence *r;
  assert_ok(w[0].context, restore(w[0].context, w[0].cache, NULL, &r));
  const int64_t length = oscar_sequence_length(r);
  assert_true(length == 200 || length == 400);
  for (int i = 0; i < 2; i++) close_world(&w[i]);
}

/* ---- to and from memory; with another text ---- */

struct bytes {
  uint8_t *data;
  size_t n;
  uint64_t next; /* offset that is expected, but for the front's second time */
  int calls, fails_at;
};

static bool collect(void *user, uint64_t offset, const void *data, size_t bytes) {
  struct bytes *b = user;
  if (b->fails_at && ++b->calls >= b->fails_at) {
    errno = ENOMEM;
    return false;
  }
  assert_true(offset == b->next || offset == 0);
  b->next = offset + bytes;
  if (b->next > b->n) {
    uint8_t *data_now = aligned_alloc(64, round_up((size_t)b->next, 64));
    if (b->n) memcpy(data_now, b->data, b->n);
    free(b->data);
    b->data = data_now;
    b->n = (size_t)b->next;
  }
  memcpy(b->data + offset, data, bytes);
  return true;
}

static struct bytes file_bytes(const char *from) {
  FILE *f = fopen(from, "rb");
  assert_non_null(f);
  assert_int_equal(fseek(f, 0, SEEK_END), 0);
  struct bytes b = {.n = (size_t)ftell(f)};
  rewind(f);
  b.data = aligned_alloc(64, round_up(b.n, 64));
  assert_int_equal(fread(b.data, 1, b.n, f), b.n);
  fclose(f);
  return b;
}

/* Everything but when it was saved and the sums over that. */
static void forget_time(struct bytes *b) {
  memset(b->data + offsetof(struct snapshot_header, saved_at), 0, 8);
  memset(b->data + offsetof(struct snapshot_header, checksum), 0, 8);
}

static void memory_holds_what_files_do(void **state) {
  (void)state;
  for (size_t g = 0; g < ARRAY_LENGTH(geometries); g++) {
    if (geometries[g].crumbs[0] < 0) continue;
    struct world a, b;
    open_world(&a, &geometries[g], 2);
    open_world(&b, &geometries[g], 1);
    struct twin *t = a.twins[0] = twin_create(&a);
    assert_true(twin_feed(&a, t, 450));
    const int64_t n = oscar_sequence_length(t->sequence) + 1;
    int32_t *ids = malloc((size_t)n * sizeof *ids);
    for (int64_t i = 0; i < n; i++) ids[i] = (int32_t)(7 * i);
    const oscar_snapshot_contents contents = {.model = "a model", .ids = ids, .n_ids = n, .text = "a text", .text_bytes = 6};
    struct bytes memory = {0}, again = {0}, broken = {.fails_at = 3};
    save(a.context, t->sequence);
    assert_ok(a.context, oscar_sequence_save_to(t->sequence, &contents, collect, &memory));
    assert_int_equal(oscar_sequence_save_to(t->sequence, &contents, collect, &broken), OSCAR_NO_MEMORY);
    free(broken.data);
    oscar_snapshot *snapshot;
    assert_int_equal(oscar_snapshot_open_bytes(b.context, "odd", memory.data + 1, memory.n - 1, &snapshot),
                     OSCAR_INVALID_ARGUMENT);
    assert_int_equal(oscar_snapshot_open_bytes(b.context, "short", memory.data, memory.n - 8, &snapshot), OSCAR_FORMAT);
    assert_ok(b.context, oscar_snapshot_open_bytes(b.context, "memory", memory.data, memory.n, &snapshot));

    /* With a longer text, and back to the first one: the same bytes. */
    struct bytes longer = {0};
    static const char text[] = "a text that is longer";
    assert_ok(b.context, oscar_snapshot_copy_to(snapshot, text, sizeof text - 1, collect, &longer));
    oscar_snapshot *other;
    assert_ok(b.context, oscar_snapshot_open_bytes(b.context, "longer", longer.data, longer.n, &other));
    assert_ok(b.context, oscar_snapshot_check(other));
    assert_string_equal(oscar_snapshot_describe(other)->text, text);
    assert_int_equal(oscar_snapshot_describe(other)->n_ids, n);
    assert_memory_equal(oscar_snapshot_describe(other)->ids, ids, (size_t)n * sizeof *ids);
    assert_ok(b.context, oscar_snapshot_copy_to(other, "a text", 6, collect, &again));
    assert_int_equal(again.n, memory.n);
    assert_memory_equal(again.data, memory.data, memory.n);
    oscar_snapshot_close(other);

    struct twin *copy = malloc(sizeof *copy);
    *copy = *t;
    assert_ok(b.context, oscar_snapshot_restore(snapshot, b.cache, "a model", &copy->sequence));
    b.twins[0] = copy;
    oscar_snapshot_close(snapshot);
    require_same_future(&a, t, &b, copy);

    struct bytes file = file_bytes(path);
    assert_int_equal(file.n, memory.n);
    forget_time(&file);
    forget_time(&memory);
    assert_memory_equal(file.data, memory.data, memory.n);

    /* In its own place. */
    assert_ok(a.context, oscar_snapshot_open(a.context, path, &snapshot));
    assert_ok(a.context, oscar_snapshot_copy(snapshot, NULL, 0, path));
    oscar_snapshot_close(snapshot);
    assert_ok(a.context, oscar_snapshot_open(a.context, path, &snapshot));
    assert_ok(a.context, oscar_snapshot_check(snapshot));
    assert_int_equal(oscar_snapshot_describe(snapshot)->text_bytes, 0);
    oscar_snapshot_close(snapshot);
    assert_int_equal(files_in_folder(), 1);

    free(file.data);
    free(memory.data);
    free(again.data);
    free(longer.data);
    free(ids);
    close_world(&a);
    close_world(&b);
  }
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(a_sequence_comes_back),
      cmocka_unit_test(so_do_forks_and_rewound_sequences),
      cmocka_unit_test(rows_with_log_gains_and_turning_means_come_back),
      cmocka_unit_test(foreign_files_are_refused),
      cmocka_unit_test(every_flipped_byte_and_every_cut_is_found),
      cmocka_unit_test(a_snapshot_is_known_by_its_beginning),
      cmocka_unit_test(damage_is_named),
      cmocka_unit_test(no_allocation_may_fail_unnoticed),
      cmocka_unit_test(a_full_disk_leaves_the_old_file),
      cmocka_unit_test(memory_holds_what_files_do),
      cmocka_unit_test(a_copy_can_be_written_later),
      cmocka_unit_test(of_two_writers_one_wins),
  };
  return cmocka_run_group_tests(tests, make_folder, remove_folder);
}
