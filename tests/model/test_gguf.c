/*
 * The GGUF reader against files of another writer (corpus, real models), against files written here byte by byte, and against
 * every way a file can be wrong: cut off, corrupted, with counts that promise more than there is.
 */
#include "gguf_writer.h"

#include <openssl/evp.h>

#define CORPUS OSCAR_SOURCE_DIR "/tests/model/corpus/gguf/"

/* Two keys with arrays, two tensors: 2 x 3 F32 at 0, one Q8_0 block at 32; the file ends with the last byte of data. */
static struct gguf_writer small_file(uint32_t version) {
  struct gguf_writer w = {0};
  put_head(&w, version, 2, 4);
  put_string(&w, "general.architecture", "llama");
  put_integer(&w, "llama.block_count", GGUF_UINT32, 7, 4);
  put_array(&w, "words", GGUF_STRING, 3);
  put_text(&w, "one");
  put_text(&w, "");
  put_text(&w, "three");
  put_array(&w, "numbers", GGUF_INT32, 2);
  put_u32(&w, 5);
  put_u32(&w, (uint32_t)-6);
  put_tensor(&w, "a", 2, (uint64_t[]){3, 2}, WEIGHT_F32, 0);
  put_tensor(&w, "b", 1, (uint64_t[]){32}, WEIGHT_Q8_0, 32);
  put_padding(&w, 32);
  for (int i = 0; i < 6; i++) {
    float x = (float)i;
    put(&w, &x, sizeof x);
  }
  put_padding(&w, 32);
  for (int i = 0; i < 34; i++) put_number(&w, (uint64_t)i, 1);
  return w;
}

static oscar_status parse_status(oscar_context *c, const struct gguf_writer *w) {
  struct gguf *file;
  oscar_status status = gguf_parse(c, "made", w->data, w->bytes, &file);
  if (status) {
    assert_null(file);
    assert_memory_equal(oscar_last_error(c), "made: ", 6);
  }
  gguf_close(file);
  return status;
}

static bool text_is(struct gguf_string s, const char *text) {
  return s.bytes == strlen(text) && memcmp(s.text, text, s.bytes) == 0;
}

static void check_small_file(const struct gguf *file, const uint8_t *end) {
  int64_t blocks = 0, count = 0;
  struct gguf_string s;
  assert_true(gguf_get_string(file, "general.architecture", &s) && text_is(s, "llama"));
  assert_true(gguf_get_i64(file, "llama.block_count", &blocks) && blocks == 7);
  assert_int_equal(gguf_array_count(file, "words", GGUF_STRING), 3);
  assert_true(text_is(gguf_array_string(file, "words", 0), "one"));
  assert_true(text_is(gguf_array_string(file, "words", 1), ""));
  assert_true(text_is(gguf_array_string(file, "words", 2), "three"));
  const void *numbers = gguf_array_data(file, "numbers", GGUF_INT32, &count);
  int32_t got[2];
  assert_int_equal(count, 2);
  memcpy(got, numbers, sizeof got);
  assert_int_equal(got[0], 5);
  assert_int_equal(got[1], -6);
  assert_int_equal(gguf_tensor_count(file), 2);
  const struct gguf_tensor *a = gguf_find_tensor(file, "a"), *b = gguf_find_tensor(file, "b");
  assert_true(a == gguf_tensor_at(file, 0) && b == gguf_tensor_at(file, 1));
  assert_int_equal(a->dims, 2);
  assert_int_equal(a->shape[0], 3);
  assert_int_equal(a->shape[1], 2);
  assert_int_equal(a->shape[3], 1);
  assert_int_equal(a->bytes, 24);
  assert_int_equal(b->type, WEIGHT_Q8_0);
  assert_int_equal(b->bytes, 34);
  assert_ptr_equal(b->data + b->bytes, end);
  assert_ptr_equal(a->data + 32, b->data);
}

static void both_versions_are_read(void **state) {
  (void)state;
  oscar_context *c = test_context(OSCAR_ISA_PORTABLE, 1);
  for (uint32_t version = 2; version <= 3; version++) {
    struct gguf_writer w = small_file(version);
    struct gguf *file;
    assert_ok(c, gguf_parse(c, "made", w.data, w.bytes, &file));
    check_small_file(file, w.data + w.bytes);
    gguf_close(file);
    writer_free(&w);
  }
  oscar_context_free(c);
}

static void what_is_not_there_is_not_found(void **state) {
  (void)state;
  oscar_context *c = test_context(OSCAR_ISA_PORTABLE, 1);
  struct gguf_writer w = small_file(3);
  struct gguf *file;
  assert_ok(c, gguf_parse(c, "made", w.data, w.bytes, &file));
  int64_t integer;
  double real;
  bool truth;
  struct gguf_string s;
  for (const char *const *key = (const char *const[]){"", "word", "wordss", "general.architecture2", "zzz", NULL}; *key; key++) {
    assert_false(gguf_get_i64(file, *key, &integer));
    assert_false(gguf_get_f64(file, *key, &real));
    assert_false(gguf_get_bool(file, *key, &truth));
    assert_false(gguf_get_string(file, *key, &s));
    assert_int_equal(gguf_array_count(file, *key, GGUF_STRING), -1);
    assert_null(gguf_array_data(file, *key, GGUF_INT32, &integer));
    assert_null(gguf_find_tensor(file, *key));
  }
  /* there, but of another type */
  assert_false(gguf_get_i64(file, "general.architecture", &integer));
  assert_false(gguf_get_string(file, "llama.block_count", &s));
  assert_false(gguf_get_bool(file, "llama.block_count", &truth));
  assert_false(gguf_get_i64(file, "words", &integer));
  assert_int_equal(gguf_array_count(file, "words", GGUF_INT32), -1);
  assert_null(gguf_array_data(file, "words", GGUF_STRING, &integer));
  assert_null(gguf_array_data(file, "numbers", GGUF_UINT32, &integer));
  assert_int_equal(gguf_array_string(file, "words", 3).bytes, 0);
  assert_int_equal(gguf_array_string(file, "words", -1).bytes, 0);
  assert_null(gguf_tensor_at(file, -1));
  assert_null(gguf_tensor_at(file, 2));
  gguf_close(file);
  writer_free(&w);
  oscar_context_free(c);
}

static void a_file_of_another_writer_has_every_type(void **state) {
  (void)state;
  oscar_context *c = test_context(OSCAR_ISA_PORTABLE, 1);
  struct gguf *file;
  assert_ok(c, gguf_open(c, CORPUS "everything.gguf", &file));
  static const struct {
    const char *key;
    int64_t value;
  } integers[] = {{"t.uint8", 200},         {"t.int8", -100},         {"t.uint16", 60000},       {"t.int16", -30000},
                  {"t.uint32", 4000000000}, {"t.int32", -2000000000}, {"t.int64", -(1LL << 62)}, {"general.alignment", 64}};
  int64_t x, count;
  for (size_t i = 0; i < ARRAY_LENGTH(integers); i++)
    assert_true(gguf_get_i64(file, integers[i].key, &x) && x == integers[i].value);
  double real;
  assert_false(gguf_get_i64(file, "t.uint64", &x)); /* 2^63 is out of range */
  assert_false(gguf_get_f64(file, "t.uint64", &real));
  assert_false(gguf_get_f64(file, "t.int64", &real)); /* and -2^62 is not exact as far as a double's integers go */
  assert_true(gguf_get_f64(file, "t.int32", &real) && real == -2e9);
  assert_true(gguf_get_f64(file, "t.float32", &real) && (float)real == 0.1f);
  assert_true(gguf_get_f64(file, "t.float64", &real) && real == 0.1);
  assert_false(gguf_get_i64(file, "t.float32", &x));
  bool truth;
  assert_true(gguf_get_bool(file, "t.true", &truth) && truth);
  assert_true(gguf_get_bool(file, "t.false", &truth) && !truth);
  struct gguf_string s;
  assert_true(gguf_get_string(file, "t.string", &s) && text_is(s, "Grüße, 世界"));
  assert_int_equal(gguf_array_count(file, "t.strings", GGUF_STRING), 4);
  assert_true(text_is(gguf_array_string(file, "t.strings", 2), "\u0120the"));
  assert_int_equal(gguf_array_string(file, "t.strings", 3).bytes, 300);
  int32_t integer;
  memcpy(&integer, (const char *)gguf_array_data(file, "t.integers", GGUF_INT32, &count) + 4, sizeof integer);
  assert_true(count == 3 && integer == -2);
  assert_memory_equal(gguf_array_data(file, "t.bools", GGUF_BOOL, &count), "\1\0\1", 3);

  const struct gguf_tensor *f32 = gguf_find_tensor(file, "f32"), *f16 = gguf_find_tensor(file, "f16");
  const struct gguf_tensor *q8 = gguf_find_tensor(file, "q8_0"), *unknown = gguf_find_tensor(file, "q2_k");
  float first;
  memcpy(&first, f32->data, sizeof first);
  assert_true(fabsf(first - 0.00123015f) < 1e-8f); /* as the writer's own reader shows it */
  assert_true(f32->shape[0] == 5 && f32->shape[1] == 3 && f32->bytes == 60);
  assert_true(f16->dims == 3 && f16->shape[2] == 2 && f16->data == f32->data + 64);
  assert_true(q8->type == WEIGHT_Q8_0 && q8->shape[0] == 64 && q8->shape[1] == 2 && q8->bytes == 136);
  assert_true(q8->data[0] == 8 && q8->data[135] == 120);
  assert_true(unknown->type == 10 && unknown->shape[0] == 256 && !unknown->data && unknown->bytes == 0);
  gguf_close(file);
  assert_ok(c, gguf_open(c, CORPUS "no-tensors.gguf", &file));
  assert_int_equal(gguf_tensor_count(file), 0);
  assert_true(text_is(gguf_array_string(file, "tokenizer.ggml.tokens", 39), "t39"));
  gguf_close(file);
  oscar_context_free(c);
}

static void every_cut_is_refused_with_a_reason(void **state) {
  (void)state;
  oscar_context *c = test_context(OSCAR_ISA_PORTABLE, 1);
  struct gguf_writer w = small_file(3);
  size_t whole = w.bytes;
  for (size_t n = 0; n < whole; n++) {
    uint8_t *copy = malloc(n ? n : 1); /* exactly as long, so that a sanitizer sees every read behind the end */
    memcpy(copy, w.data, n);
    struct gguf_writer cut = {copy, n, n};
    assert_int_equal(parse_status(c, &cut), OSCAR_FORMAT);
    free(copy);
  }
  assert_int_equal(parse_status(c, &w), OSCAR_OK);
  writer_free(&w);
  oscar_context_free(c);
}

static void no_corrupted_byte_is_followed_blindly(void **state) {
  (void)state;
  oscar_context *c = test_context(OSCAR_ISA_PORTABLE, 1);
  struct gguf_writer w = small_file(3);
  int accepted = 0, refused = 0;
  for (size_t at = 0; at < w.bytes - 66; at++) {
    uint8_t right = w.data[at];
    for (int wrong = 0; wrong < 256; wrong++) {
      w.data[at] = (uint8_t)wrong;
      struct gguf *file;
      oscar_status status = gguf_parse(c, "made", w.data, w.bytes, &file);
      if (status) {
        assert_true(status == OSCAR_FORMAT || status == OSCAR_UNSUPPORTED);
        refused++;
        continue;
      }
      for (int64_t i = 0; i < gguf_tensor_count(file); i++) {
        const struct gguf_tensor *t = gguf_tensor_at(file, i);
        assert_true(!t->bytes || (t->data >= w.data && t->data + t->bytes <= w.data + w.bytes));
      }
      gguf_close(file);
      accepted++;
    }
    w.data[at] = right;
  }
  assert_true(accepted > 1000 && refused > 10000);
  writer_free(&w);
  oscar_context_free(c);
}

/* A file with one key or one tensor that is wrong in one way; the message must name it. */
static void expect_refusal(oscar_context *c, struct gguf_writer *w, oscar_status status, const char *part) {
  assert_int_equal(parse_status(c, w), status);
  if (!strstr(oscar_last_error(c), part)) fail_msg("'%s' does not mention '%s'", oscar_last_error(c), part);
  writer_free(w);
}

static void wrong_heads_are_refused(void **state) {
  (void)state;
  oscar_context *c = test_context(OSCAR_ISA_PORTABLE, 1);
  struct gguf_writer w = {0};
  put(&w, "GGML and more bytes than a head has", 35);
  expect_refusal(c, &w, OSCAR_FORMAT, "not a GGUF file");
  put_head(&w, 1, 0, 0);
  expect_refusal(c, &w, OSCAR_UNSUPPORTED, "version 1");
  put_head(&w, 4, 0, 0);
  expect_refusal(c, &w, OSCAR_UNSUPPORTED, "version 4");
  put_head(&w, 0x03000000, 0, 0);
  expect_refusal(c, &w, OSCAR_UNSUPPORTED, "big-endian");
  const uint64_t counts[] = {1, 1000, UINT32_MAX, INT64_MAX, UINT64_MAX, UINT64_MAX / 33 + 1};
  for (size_t i = 0; i < ARRAY_LENGTH(counts); i++) {
    put_head(&w, 3, counts[i], 0);
    expect_refusal(c, &w, OSCAR_FORMAT, "the head claims");
    put_head(&w, 3, 0, counts[i]);
    expect_refusal(c, &w, OSCAR_FORMAT, "the head claims");
  }
  put_head(&w, 3, 0, 0);
  assert_int_equal(parse_status(c, &w), OSCAR_OK); /* empty, but well formed */
  writer_free(&w);
  oscar_context_free(c);
}

static void wrong_keys_are_refused_by_name(void **state) {
  (void)state;
  oscar_context *c = test_context(OSCAR_ISA_PORTABLE, 1);
  struct gguf_writer w = {0};
  put_head(&w, 3, 0, 2);
  put_integer(&w, "twice", GGUF_UINT8, 1, 1);
  put_integer(&w, "twice", GGUF_UINT16, 1, 2);
  expect_refusal(c, &w, OSCAR_FORMAT, "key 'twice' appears twice");
  put_head(&w, 3, 0, 1);
  put_integer(&w, "odd", 13, 0, 8);
  expect_refusal(c, &w, OSCAR_FORMAT, "key 'odd': value type 13");
  put_head(&w, 3, 0, 1);
  put_integer(&w, "maybe", GGUF_BOOL, 2, 1);
  expect_refusal(c, &w, OSCAR_FORMAT, "key 'maybe': a bool is 2");
  put_head(&w, 3, 0, 1);
  put_integer(&w, "", GGUF_UINT64, 2, 8);
  expect_refusal(c, &w, OSCAR_FORMAT, "expected 1 to 65535");
  put_head(&w, 3, 0, 1);
  put_u64(&w, 3);
  put(&w, "a\0b", 3);
  put_u32(&w, GGUF_UINT64);
  put_u64(&w, 0);
  expect_refusal(c, &w, OSCAR_FORMAT, "'a?b' holds a zero byte");
  put_head(&w, 3, 0, 1);
  put_array(&w, "nested", GGUF_ARRAY, 1);
  put_u32(&w, GGUF_ARRAY);
  put_u64(&w, 0);
  expect_refusal(c, &w, OSCAR_UNSUPPORTED, "key 'nested' is an array of arrays");
  put_head(&w, 3, 0, 1);
  put_array(&w, "odd", 77, 1);
  expect_refusal(c, &w, OSCAR_FORMAT, "key 'odd': element type 77");
  const uint64_t counts[] = {1, 2, 3, 1000, INT64_MAX, UINT64_MAX, UINT64_MAX / 8 + 2, (uint64_t)1 << 61};
  for (size_t i = 0; i < ARRAY_LENGTH(counts); i++)
    for (uint32_t type = GGUF_UINT32; type <= GGUF_FLOAT64; type++) {
      if (type == GGUF_ARRAY || (type == GGUF_BOOL && counts[i] <= 2)) continue; /* two bools fit */
      put_head(&w, 3, 0, 1);
      put_array(&w, "many", type, counts[i]);
      put(&w, "\0\0", 2); /* less than even the three bools of the smallest count */
      expect_refusal(c, &w, OSCAR_FORMAT, "key 'many' claims");
    }
  put_head(&w, 3, 0, 1);
  put_array(&w, "words", GGUF_STRING, 2);
  put_text(&w, "first");
  put_u64(&w, UINT64_MAX - 8);
  expect_refusal(c, &w, OSCAR_FORMAT, "a string of key 'words'");
  oscar_context_free(c);
}

static void wrong_tensors_are_refused_by_name(void **state) {
  (void)state;
  oscar_context *c = test_context(OSCAR_ISA_PORTABLE, 1);
  static const struct {
    int dims;
    uint64_t shape[5];
    uint32_t type;
    uint64_t offset;
    const char *part;
  } wrong[] = {
      {0, {0}, WEIGHT_F32, 0, "has 0 dimensions"},
      {5, {1, 1, 1, 1, 1}, WEIGHT_F32, 0, "has 5 dimensions"},
      {2, {4, 0}, WEIGHT_F32, 0, "dimension 1 is 0"},
      {1, {UINT64_MAX}, WEIGHT_F32, 0, "dimension 0 is"},
      {2, {1ull << 32, 1ull << 31}, WEIGHT_F32, 0, "dimension 1 is"},
      {4, {1ull << 20, 1ull << 20, 1ull << 20, 1ull << 4}, WEIGHT_Q8_0, 0, "dimension 3 is"},
      {1, {INT64_MAX}, WEIGHT_F32, 0, "overflows"},
      {2, {33, 32}, WEIGHT_Q4_0, 0, "multiple of 32 for Q4_0"},
      {2, {128, 2}, WEIGHT_Q6_K, 0, "multiple of 256 for Q6_K"},
      {1, {4}, WEIGHT_F32, 16, "multiple of 32"},
      {1, {4}, WEIGHT_F32, 64, "ends after the file"},
      {1, {17}, WEIGHT_F32, 0, "ends after the file"},
      {1, {9}, WEIGHT_F32, 32, "ends after the file"},
      {1, {4}, WEIGHT_F32, UINT64_MAX - 31, "ends after the file"},
      {1, {4}, 10, 96, "ends after the file"},
      {1, {4}, UINT32_MAX, 0, "has type 4294967295"},
  };
  struct gguf_writer w = {0};
  for (size_t i = 0; i < ARRAY_LENGTH(wrong); i++) {
    put_head(&w, 3, 1, 0);
    put_tensor(&w, "odd.weight", wrong[i].dims, wrong[i].shape, wrong[i].type, wrong[i].offset);
    put_padding(&w, 32);
    for (int k = 0; k < 64; k++) put_number(&w, 0, 1);
    assert_int_equal(parse_status(c, &w), OSCAR_FORMAT);
    assert_non_null(strstr(oscar_last_error(c), "'odd.weight'"));
    expect_refusal(c, &w, OSCAR_FORMAT, wrong[i].part);
  }
  put_head(&w, 3, 2, 0);
  for (int i = 0; i < 2; i++) put_tensor(&w, "same", 1, (uint64_t[]){8}, WEIGHT_F32, 0);
  put_padding(&w, 32);
  for (int k = 0; k < 32; k++) put_number(&w, 0, 1);
  expect_refusal(c, &w, OSCAR_FORMAT, "tensor 'same' appears twice");
  char name[129];
  memset(name, 'n', 128);
  name[128] = '\0';
  put_head(&w, 3, 1, 0);
  put_tensor(&w, name, 1, (uint64_t[]){8}, WEIGHT_F32, 0);
  expect_refusal(c, &w, OSCAR_FORMAT, "expected 1 to 127");
  oscar_context_free(c);
}

static void alignments_other_than_powers_of_two_are_refused(void **state) {
  (void)state;
  oscar_context *c = test_context(OSCAR_ISA_PORTABLE, 1);
  static const struct {
    uint64_t alignment;
    bool ok;
  } cases[] = {{0, false}, {1, false}, {4, false}, {8, true}, {24, false}, {32, true}, {4096, true}, {UINT32_MAX, false}};
  for (size_t i = 0; i < ARRAY_LENGTH(cases); i++) {
    struct gguf_writer w = {0};
    put_head(&w, 3, 1, 1);
    put_integer(&w, "general.alignment", GGUF_UINT32, cases[i].alignment, 4);
    put_tensor(&w, "x", 1, (uint64_t[]){2}, WEIGHT_F32, 0);
    put_padding(&w, cases[i].ok ? (size_t)cases[i].alignment : 32);
    size_t start = w.bytes;
    put_u64(&w, 0);
    struct gguf *file;
    oscar_status status = gguf_parse(c, "made", w.data, w.bytes, &file);
    assert_int_equal(status, cases[i].ok ? OSCAR_OK : OSCAR_FORMAT);
    if (cases[i].ok) assert_ptr_equal(gguf_find_tensor(file, "x")->data, w.data + start);
    gguf_close(file);
    writer_free(&w);
  }
  struct gguf_writer w = {0};
  put_head(&w, 3, 0, 1);
  put_string(&w, "general.alignment", "32");
  expect_refusal(c, &w, OSCAR_FORMAT, "general.alignment");
  oscar_context_free(c);
}

/* ---- memory ---- */

struct rationed {
  long left, live;
};
static void *rationed_alloc(void *user, size_t bytes, size_t alignment) {
  struct rationed *r = user;
  if (r->left-- <= 0) return NULL;
  r->live++;
  return aligned_alloc(alignment, round_up(bytes, alignment));
}
static void rationed_free(void *user, void *pointer) {
  struct rationed *r = user;
  r->live--;
  free(pointer);
}

static void every_failed_allocation_is_survived(void **state) {
  (void)state;
  struct rationed ration = {.left = 1000};
  oscar_context_options options;
  oscar_context_options_default(&options);
  options.alloc = rationed_alloc;
  options.free = rationed_free;
  options.alloc_user = &ration;
  oscar_context *c;
  assert_int_equal(oscar_context_create(&options, &c), OSCAR_OK);
  struct gguf_writer w = small_file(3);
  long before = ration.live, n = 0;
  for (;; n++) {
    ration.left = n;
    struct gguf *file;
    oscar_status status = gguf_parse(c, "made", w.data, w.bytes, &file);
    if (status == OSCAR_OK) gguf_close(file);
    assert_int_equal(ration.live, before);
    if (status == OSCAR_OK) break;
    assert_int_equal(status, OSCAR_NO_MEMORY);
    assert_null(file);
  }
  assert_in_range(n, 5, 20);
  writer_free(&w);
  oscar_context_free(c);
  assert_int_equal(ration.live, 0);
}

/* ---- fingerprint ---- */

static void fingerprint_of(oscar_context *c, const struct gguf_writer *w, char hex[65]) {
  struct gguf *file;
  assert_ok(c, gguf_parse(c, "made", w->data, w->bytes, &file));
  assert_ok(c, gguf_fingerprint(file, hex));
  gguf_close(file);
}

static void fingerprints_tell_files_apart(void **state) {
  (void)state;
  oscar_context *c = test_context(OSCAR_ISA_PORTABLE, 1);
  struct gguf_writer w = {0};
  put_head(&w, 3, 1, 1);
  put_string(&w, "general.architecture", "llama");
  put_tensor(&w, "x", 1, (uint64_t[]){32768}, WEIGHT_F32, 0);
  put_padding(&w, 32);
  size_t start = w.bytes, data_bytes = 4 * 32768;
  for (size_t i = 0; i < data_bytes; i++) put_number(&w, i * 7 >> 3, 1);
  char first[65], again[65], other[65];
  fingerprint_of(c, &w, first);
  fingerprint_of(c, &w, again);
  assert_string_equal(first, again);
  assert_int_equal(strlen(first), 64);

  /* The same by hand: everything before the data, then the first, a middle and the last 4 KiB. */
  EVP_MD_CTX *hash = EVP_MD_CTX_new();
  EVP_DigestInit_ex(hash, EVP_sha256(), NULL);
  EVP_DigestUpdate(hash, w.data, start + 4096);
  EVP_DigestUpdate(hash, w.data + start + data_bytes / 2, 4096);
  EVP_DigestUpdate(hash, w.data + start + data_bytes - 4096, 4096);
  unsigned char digest[32];
  EVP_DigestFinal_ex(hash, digest, NULL);
  EVP_MD_CTX_free(hash);
  for (int i = 0; i < 32; i++) snprintf(again + 2 * i, 3, "%02x", digest[i]);
  assert_string_equal(first, again);

  const size_t sampled[] = {40 /* the architecture */, start, start + 4095, start + data_bytes / 2, w.bytes - 1};
  for (size_t i = 0; i < ARRAY_LENGTH(sampled); i++) {
    w.data[sampled[i]] ^= 1;
    fingerprint_of(c, &w, other);
    assert_string_not_equal(first, other);
    w.data[sampled[i]] ^= 1;
  }
  w.data[start + 5000] ^= 1; /* between the samples: by design not seen */
  fingerprint_of(c, &w, other);
  assert_string_equal(first, other);
  writer_free(&w);
  oscar_context_free(c);
}

/* ---- real models; the facts are those that the PyPI package gguf 0.19 reads ---- */

static void smollm2_reads_as_another_reader_reads_it(void **state) {
  (void)state;
  const char *path = test_model("smollm2-135m");
  if (!path) skip();
  oscar_context *c = test_context(OSCAR_ISA_PORTABLE, 1);
  struct gguf *file;
  assert_ok(c, gguf_open(c, path, &file));
  assert_string_equal(gguf_path(file), path);
  assert_int_equal(gguf_bytes(file), 98362432);
  assert_int_equal(gguf_tensor_count(file), 272);
  struct gguf_string s;
  int64_t x;
  double real;
  bool truth;
  assert_true(gguf_get_string(file, "general.architecture", &s) && text_is(s, "llama"));
  assert_true(gguf_get_i64(file, "llama.block_count", &x) && x == 30);
  assert_true(gguf_get_i64(file, "llama.embedding_length", &x) && x == 576);
  assert_true(gguf_get_f64(file, "llama.rope.freq_base", &real) && real == 100000);
  assert_true(gguf_get_f64(file, "llama.attention.layer_norm_rms_epsilon", &real) && real == 9.999999747378752e-06);
  assert_true(gguf_get_bool(file, "tokenizer.ggml.add_bos_token", &truth) && !truth);
  assert_int_equal(gguf_array_count(file, "tokenizer.ggml.tokens", GGUF_STRING), 49152);
  assert_int_equal(gguf_array_count(file, "tokenizer.ggml.merges", GGUF_STRING), 48900);
  assert_int_equal(gguf_array_count(file, "tokenizer.ggml.token_type", GGUF_INT32), 49152);
  assert_true(text_is(gguf_array_string(file, "tokenizer.ggml.tokens", 1234), "Ġredu"));
  assert_true(text_is(gguf_array_string(file, "tokenizer.ggml.tokens", 49151), "ectable"));
  assert_true(text_is(gguf_array_string(file, "tokenizer.ggml.merges", 48899), "ect able"));
  const struct gguf_tensor *embedding = gguf_find_tensor(file, "token_embd.weight"), *norm;
  assert_true(embedding == gguf_tensor_at(file, 0) && embedding->type == WEIGHT_Q8_0 && embedding->bytes == 30081024);
  assert_true(embedding->dims == 2 && embedding->shape[0] == 576 && embedding->shape[1] == 49152);
  norm = gguf_tensor_at(file, 271);
  assert_string_equal(norm->name, "output_norm.weight");
  assert_int_equal(norm->data - embedding->data, 98360128 - 1785664);
  norm = gguf_find_tensor(file, "blk.0.ffn_norm.weight");
  unsigned char digest[32];
  assert_int_equal(EVP_Digest(norm->data, norm->bytes, digest, NULL, EVP_sha256(), NULL), 1);
  char hex[65];
  for (int i = 0; i < 32; i++) snprintf(hex + 2 * i, 3, "%02x", digest[i]);
  assert_string_equal(hex, "4ed890f0c04c89985ebab38ff3703c2a9dcb2eacfdeff5fd194ba76193234b2b");
  gguf_close(file);
  oscar_context_free(c);
}

static void gemma_has_scores_and_a_large_vocabulary(void **state) {
  (void)state;
  const char *path = test_model("gemma3-270m");
  if (!path) skip();
  oscar_context *c = test_context(OSCAR_ISA_PORTABLE, 1);
  struct gguf *file;
  assert_ok(c, gguf_open(c, path, &file));
  int64_t count;
  const char *scores = gguf_array_data(file, "tokenizer.ggml.scores", GGUF_FLOAT32, &count);
  assert_int_equal(count, 262144);
  float score;
  memcpy(&score, scores + sizeof score * 1234, sizeof score);
  assert_true(score == -740.0f);
  assert_true(text_is(gguf_array_string(file, "tokenizer.ggml.tokens", 1234), "tern"));
  const struct gguf_tensor *t = gguf_find_tensor(file, "blk.7.ffn_down.weight");
  assert_true(t && t->type == WEIGHT_Q6_K && t->shape[0] == 2048 && t->shape[1] == 640 && t->bytes == 1075200);
  gguf_close(file);
  oscar_context_free(c);
}

static void the_largest_model_opens_quickly(void **state) {
  (void)state;
  const char *path = test_model("qwen2.5-coder-1.5b");
  if (!path) skip();
  oscar_context *c = test_context(OSCAR_ISA_PORTABLE, 1);
  char first[65], second[65];
  for (int round = 0; round < 2; round++) {
    struct gguf *file;
    int64_t start = time_ns();
    assert_ok(c, gguf_open(c, path, &file));
    int64_t opened = time_ns();
    assert_ok(c, gguf_fingerprint(file, round ? second : first));
    int64_t hashed = time_ns();
    printf("open %.1f ms, fingerprint %.1f ms\n", (double)(opened - start) / 1e6, (double)(hashed - opened) / 1e6);
    gguf_close(file);
  }
  assert_string_equal(first, second);
  oscar_context_free(c);
}

int main(int argc, char **argv) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(both_versions_are_read),
      cmocka_unit_test(what_is_not_there_is_not_found),
      cmocka_unit_test(a_file_of_another_writer_has_every_type),
      cmocka_unit_test(every_cut_is_refused_with_a_reason),
      cmocka_unit_test(no_corrupted_byte_is_followed_blindly),
      cmocka_unit_test(wrong_heads_are_refused),
      cmocka_unit_test(wrong_keys_are_refused_by_name),
      cmocka_unit_test(wrong_tensors_are_refused_by_name),
      cmocka_unit_test(alignments_other_than_powers_of_two_are_refused),
      cmocka_unit_test(every_failed_allocation_is_survived),
      cmocka_unit_test(fingerprints_tell_files_apart),
      cmocka_unit_test(smollm2_reads_as_another_reader_reads_it),
  };
  const struct CMUnitTest larger[] = {cmocka_unit_test(gemma_has_scores_and_a_large_vocabulary),
                                      cmocka_unit_test(the_largest_model_opens_quickly)};
  if (test_larger(argc, argv)) return cmocka_run_group_tests(larger, NULL, NULL);
  return cmocka_run_group_tests(tests, NULL, NULL);
}
