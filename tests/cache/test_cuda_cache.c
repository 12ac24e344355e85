/*
 * A cache on a GPU through random operations beside one in host memory: the same statuses, lengths and pages, to the bit, while
 * pages are shared, cut, moved and given back, by way of a prefix tree, too; and what it says of numbers that cannot be stored.
 */
#include "support.h"

#include "cuda/device.h"

#include <oscar/cache.h>
#include <oscar/prefix.h>
#include <oscar/snapshot.h>

#define KV_HEADS    2
#define D           64
#define LAYERS      2
#define MOST        6
#define MOST_TOKENS 32768
#define HOST_FLOATS (200 * KV_HEADS * D)

static oscar_cuda *gpu;
static oscar_context *contexts[2]; /* host, GPU */

struct pair {
  oscar_codec_set *codecs[2];
  oscar_cache *cache[2];
  oscar_prefix *tree[2];
  oscar_sequence *s[2][MOST];
  int32_t *tokens[MOST]; /* [MOST_TOKENS] of each sequence; every token that is fed is a new one */
  int32_t next_token;
  int32_t *asked; /* [MOST_TOKENS] of a sequence that entered the tree */
  int64_t asked_count;
  int n;
};

static struct pair open_pair(size_t budget) {
  struct pair p = {.n = 0};
  const oscar_codec_set_info info = {LAYERS, KV_HEADS, D, "test", "", ""};
  const oscar_plain_options plain = {.rotate = true, .crumbs_per_channel = 1, .clip_keys = .96f, .clip_values = .92f};
  for (int i = 0; i < 2; i++) {
    assert_ok(contexts[i], oscar_codec_set_create_plain(contexts[i], &info, &plain, &p.codecs[i]));
    oscar_cache_options options;
    oscar_cache_options_default(&options);
    options.layers = LAYERS, options.kv_heads = KV_HEADS, options.head_dim = D;
    options.recent_pages = 1;
    options.codecs = p.codecs[i];
    options.budget_bytes = budget;
    options.cuda = i ? gpu : NULL;
    /* With as many units on both sides operations run out alike; what a cache takes besides differs. */
    if (i) {
      options.budget_bytes += oscar_cache_bytes_for(&options, 64, 1, 1);
      options.cuda = NULL;
      options.budget_bytes -= oscar_cache_bytes_for(&options, 64, 1, 1);
      options.cuda = gpu;
    }
    assert_ok(contexts[i], oscar_cache_create(contexts[i], &options, &p.cache[i]));
    assert_ok(contexts[i], oscar_prefix_create(p.cache[i], &p.tree[i]));
  }
  for (int i = 0; i < MOST; i++) p.tokens[i] = calloc(MOST_TOKENS, sizeof *p.tokens[i]);
  p.asked = calloc(MOST_TOKENS, sizeof *p.asked);
  return p;
}

static void close_pair(struct pair *p) {
  for (int i = 0; i < 2; i++) {
    oscar_cache_free(p->cache[i]);
    oscar_codec_set_free(p->codecs[i]);
  }
  for (int i = 0; i < MOST; i++) free(p->tokens[i]);
  free(p->asked);
}

static void write_layers(struct pair *p, int which, const float *x, size_t floats) {
  void *device;
  assert_ok(contexts[1], cuda_alloc(gpu, floats * sizeof *x, &device));
  assert_ok(contexts[1], cuda_upload(gpu, device, x, floats * sizeof *x));
  for (int layer = 0; layer < LAYERS; layer++) {
    assert_ok(contexts[0], oscar_sequence_write(p->s[0][which], layer, x, x));
    assert_ok(contexts[1], oscar_sequence_write(p->s[1][which], layer, device, device));
  }
  assert_ok(contexts[1], oscar_cuda_wait(gpu));
  cuda_release(gpu, device, floats * sizeof *x);
}

static void step(struct pair *p, int which, int n, bool abort, uint64_t *seed) {
  oscar_status status[2];
  const int64_t length = oscar_sequence_length(p->s[0][which]);
  if (length + n > MOST_TOKENS) return;
  for (int64_t i = length; i < length + n; i++) p->tokens[which][i] = p->next_token++;
  for (int i = 0; i < 2; i++) status[i] = oscar_sequence_begin(p->s[i][which], n);
  assert_int_equal(status[0], status[1]);
  if (status[0] != OSCAR_OK) return;
  float *x = malloc(HOST_FLOATS * sizeof *x);
  const size_t floats = (size_t)(n * KV_HEADS * D);
  for (size_t i = 0; i < floats; i++) x[i] = test_normal(seed);
  write_layers(p, which, x, floats);
  free(x);
  for (int i = 0; i < 2; i++) {
    if (abort)
      oscar_sequence_abort(p->s[i][which]);
    else
      assert_ok(contexts[i], oscar_sequence_commit(p->s[i][which]));
  }
}

static void compare(const struct pair *p) {
  const size_t bytes = (size_t)64 * D * 2;
  uint8_t *page[2][2];
  for (int i = 0; i < 4; i++) page[i / 2][i % 2] = calloc(bytes, 1);
  for (int which = 0; which < p->n; which++) {
    const int64_t length = oscar_sequence_length(p->s[0][which]);
    assert_int_equal(length, oscar_sequence_length(p->s[1][which]));
    for (int at = 0; at < (length + 63) / 64; at++)
      for (int i = 0; i < LAYERS * KV_HEADS; i++) {
        bool coded[2];
        for (int side = 0; side < 2; side++)
          assert_ok(contexts[side], oscar_sequence_read_page(p->s[side][which], at, i / KV_HEADS, i % KV_HEADS, &coded[side],
                                                             page[side][0], page[side][1]));
        assert_int_equal(coded[0], coded[1]);
        for (int kv = 0; kv < 2; kv++) assert_memory_equal(page[0][kv], page[1][kv], bytes);
      }
  }
  for (int i = 0; i < 4; i++) free(page[i / 2][i % 2]);
  for (int i = 0; i < 2; i++) assert_ok(contexts[i], oscar_cache_check(p->cache[i]));
}

static void forget(struct pair *p, int which) {
  p->n--;
  for (int i = 0; i < 2; i++) p->s[i][which] = p->s[i][p->n];
  int32_t *tokens = p->tokens[which];
  p->tokens[which] = p->tokens[p->n];
  p->tokens[p->n] = tokens;
}

static void enter_tree(struct pair *p, int which, bool park) {
  oscar_status status[2];
  p->asked_count = oscar_sequence_length(p->s[0][which]);
  memcpy(p->asked, p->tokens[which], (size_t)p->asked_count * sizeof *p->asked);
  for (int i = 0; i < 2; i++)
    status[i] = (park ? oscar_prefix_park : oscar_prefix_insert)(p->tree[i], p->s[i][which], p->tokens[which]);
  assert_int_equal(status[0], status[1]);
  if (park && status[0] == OSCAR_OK) forget(p, which);
}

static void take_from_tree(struct pair *p, uint64_t *seed) {
  oscar_status status[2];
  oscar_prefix_match match[2] = {0};
  const int64_t count = test_random(seed) % 2 ? p->asked_count : (int64_t)(test_random(seed) % (uint64_t)(p->asked_count + 1));
  const oscar_prefix_reuse reuse = test_random(seed) % 2 ? OSCAR_PREFIX_EXACT : OSCAR_PREFIX_REFILL;
  for (int i = 0; i < 2; i++) status[i] = oscar_prefix_take(p->tree[i], p->asked, count, reuse, &p->s[i][p->n], &match[i]);
  assert_int_equal(status[0], status[1]);
  if (status[0] != OSCAR_OK) return;
  assert_int_equal(match[0].reused_tokens, match[1].reused_tokens);
  assert_int_equal(match[0].refill_tokens, match[1].refill_tokens);
  memcpy(p->tokens[p->n++], p->asked, (size_t)match[0].reused_tokens * sizeof *p->asked);
}

static void random_operation(struct pair *p, uint64_t *seed) {
  const int which = p->n ? (int)(test_random(seed) % (uint64_t)p->n) : -1, kind = (int)(test_random(seed) % 16);
  oscar_status status[2] = {OSCAR_OK, OSCAR_OK};
  if (which < 0 || (kind == 0 && p->n < MOST)) {
    for (int i = 0; i < 2; i++) status[i] = oscar_sequence_create(p->cache[i], &p->s[i][p->n]);
    assert_int_equal(status[0], status[1]);
    p->n += status[0] == OSCAR_OK;
  } else if (kind <= 2 && p->n < MOST) {
    for (int i = 0; i < 2; i++) status[i] = oscar_sequence_fork(p->s[i][which], &p->s[i][p->n]);
    assert_int_equal(status[0], status[1]);
    if (status[0] == OSCAR_OK) memcpy(p->tokens[p->n++], p->tokens[which], MOST_TOKENS * sizeof *p->asked);
  } else if (kind <= 4) {
    const int64_t length = (int64_t)(test_random(seed) % (uint64_t)(oscar_sequence_length(p->s[0][which]) + 1));
    const oscar_rewind mode = kind == 3 ? OSCAR_REWIND_EXACT : OSCAR_REWIND_REFILL;
    int64_t resume[2] = {0, 0};
    for (int i = 0; i < 2; i++) status[i] = oscar_sequence_truncate(p->s[i][which], length, mode, &resume[i]);
    assert_int_equal(status[0], status[1]);
    assert_int_equal(resume[0], resume[1]);
  } else if (kind == 5 && p->n > 2) {
    for (int i = 0; i < 2; i++) oscar_sequence_free(p->s[i][which]);
    forget(p, which);
  } else if (kind == 7) {
    const bool park = test_random(seed) % 2;
    enter_tree(p, which, park);
  } else if (kind <= 9 && p->n < MOST) {
    take_from_tree(p, seed);
  } else if (kind == 10) {
    const size_t bytes = (size_t)(test_random(seed) % (1 << 19));
    for (int i = 0; i < 2; i++) oscar_prefix_evict(p->tree[i], bytes, NULL);
  } else {
    step(p, which, 1 + (int)(test_random(seed) % (kind < 13 ? 4 : 190)), kind == 6, seed);
  }
}

static void operations_leave_the_same_pages(void **state) {
  (void)state;
  for (uint64_t round = 0; round < 8; round++) {
    uint64_t seed = round + 1;
    struct pair p = open_pair((size_t)(1 + round % 4) << 20);
    for (int i = 0; i < 300; i++) {
      random_operation(&p, &seed);
      if (i % 10 == 9) compare(&p);
    }
    close_pair(&p);
  }
}

static void numbers_that_cannot_be_are_refused_by_commit(void **state) {
  (void)state;
  struct pair p = open_pair((size_t)4 << 20);
  uint64_t seed = 1;
  assert_ok(contexts[0], oscar_sequence_create(p.cache[0], &p.s[0][0]));
  assert_ok(contexts[1], oscar_sequence_create(p.cache[1], &p.s[1][0]));
  p.n = 1;
  step(&p, 0, 70, false, &seed);
  float x[KV_HEADS * D];
  for (int i = 0; i < KV_HEADS * D; i++) x[i] = i == 77 ? NAN : 1;
  void *device;
  assert_ok(contexts[1], cuda_alloc(gpu, sizeof x, &device));
  assert_ok(contexts[1], cuda_upload(gpu, device, x, sizeof x));
  assert_ok(contexts[1], oscar_sequence_begin(p.s[1][0], 1));
  for (int layer = 0; layer < LAYERS; layer++) assert_ok(contexts[1], oscar_sequence_write(p.s[1][0], layer, device, device));
  assert_int_equal(oscar_sequence_commit(p.s[1][0]), OSCAR_NUMERIC);
  assert_non_null(strstr(oscar_last_error(contexts[1]), "not finite"));
  oscar_sequence_abort(p.s[1][0]);
  step(&p, 0, 150, false, &seed); /* and on as if nothing had been */
  compare(&p);
  cuda_release(gpu, device, sizeof x);
  close_pair(&p);
}

static void what_cannot_be_made_is_refused(void **state) {
  (void)state;
  oscar_cache_options options;
  oscar_cache_options_default(&options);
  options.layers = LAYERS, options.kv_heads = KV_HEADS, options.head_dim = D;
  options.cuda = gpu;
  options.budget_bytes = (size_t)1 << 50;
  oscar_cache *cache;
  assert_int_equal(oscar_cache_create(contexts[1], &options, &cache), OSCAR_NO_MEMORY);
  options.budget_bytes = 1 << 20;
  assert_int_equal(oscar_cache_create(contexts[0], &options, &cache), OSCAR_INVALID_ARGUMENT); /* another context's handle */
  oscar_cuda *other;
  assert_int_equal(oscar_cuda_create(contexts[1], &(oscar_cuda_options){.ordinal = 99}, &other), OSCAR_UNSUPPORTED);
}

/* Each side's sequence saved and restored on the other side: afterwards both sides have both, and go on alike. */
static void saved_sequences_go_both_ways(void **state) {
  (void)state;
  char path[] = "/tmp/oscar_snapshot_XXXXXX";
  const int fd = mkstemp(path);
  assert_true(fd >= 0);
  close(fd);
  static const int32_t ids[1000];
  const int lengths[] = {1, 64, 130, 500, 777};
  for (size_t l = 0; l < ARRAY_LENGTH(lengths); l++) {
    struct pair p = open_pair((size_t)8 << 20);
    uint64_t seed = l + 1;
    for (int i = 0; i < 2; i++) assert_ok(contexts[i], oscar_sequence_create(p.cache[i], &p.s[i][0]));
    p.n = 1;
    for (int done = 0; done < lengths[l];) {
      const int n = lengths[l] - done < 190 ? lengths[l] - done : 190;
      step(&p, 0, n, false, &seed);
      done += n;
    }
    for (int i = 0; i < 2; i++) {
      const oscar_snapshot_contents contents = {.ids = ids, .n_ids = lengths[l]};
      oscar_snapshot *snapshot;
      assert_ok(contexts[i], oscar_sequence_save(p.s[i][0], &contents, path));
      assert_ok(contexts[1 - i], oscar_snapshot_open(contexts[1 - i], path, &snapshot));
      assert_ok(contexts[1 - i], oscar_snapshot_restore(snapshot, p.cache[1 - i], NULL, &p.s[1 - i][1]));
      oscar_snapshot_close(snapshot);
    }
    p.n = 2;
    compare(&p);
    for (int which = 0; which < 2; which++) step(&p, which, 150, false, &seed);
    compare(&p);
    close_pair(&p);
  }
  unlink(path);
}

int main(void) {
  assert_int_equal(oscar_context_create(NULL, &contexts[1]), OSCAR_OK);
  if (oscar_cuda_create(contexts[1], NULL, &gpu) != OSCAR_OK) {
    fprintf(stderr, "skipped: %s\n", oscar_last_error(contexts[1]));
    oscar_context_free(contexts[1]);
    return SKIPPED;
  }
  assert_int_equal(oscar_context_create(NULL, &contexts[0]), OSCAR_OK);
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(operations_leave_the_same_pages),
      cmocka_unit_test(saved_sequences_go_both_ways),
      cmocka_unit_test(numbers_that_cannot_be_are_refused_by_commit),
      cmocka_unit_test(what_cannot_be_made_is_refused),
  };
  const int failed = cmocka_run_group_tests(tests, NULL, NULL);
  oscar_cuda_info info;
  oscar_cuda_describe(gpu, &info);
  if (info.allocated_bytes) fprintf(stderr, "%zu bytes of the GPU's memory were not given back\n", info.allocated_bytes);
  oscar_cuda_free(gpu);
  for (int i = 0; i < 2; i++) oscar_context_free(contexts[i]);
  return failed || info.allocated_bytes > 0;
}
