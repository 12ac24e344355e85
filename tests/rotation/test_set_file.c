/* Our rotation file: what is saved comes back to the bit, the container's rules are enforced, damage is refused. */
#include "support.h"

#include "base/file.h"
#include "failing_alloc.h"
#include "quant/codec.h"
#include "rotation/safetensors.h"
#include "rotation/set_file.h"
#include <oscar/rotation.h>

enum { LAYERS = 3, HEADS = 2, DIM = 32 };

/* Keys: graded crumbs, steps, a mean and two unrelated matrices per head, 24 channels in layer 1; values: one plain codec for all
 * but layer 2, which has a rotated one per layer. */
static oscar_codec_set *make_set(oscar_context *c) {
  const oscar_codec_set_info info = {LAYERS, HEADS, DIM, "int2-test", "model 42", "{\"tokens\": 8192, \"text\": \"\xC3\xA9\"}"};
  oscar_codec_set *set = NULL;
  uint64_t seed = 1;
  assert_ok(c, oscar_codec_set_create(c, &info, &set));
  float encode[DIM * DIM], decode[DIM * DIM], mean[DIM], steps[DIM], hadamard[DIM * DIM];
  uint8_t crumbs[DIM];
  assert_ok(c, oscar_hadamard(c, DIM, hadamard));
  float frequencies[DIM / 2], rotating[DIM];
  uint16_t pairs[DIM / 2];
  oscar_rope *ropes[2];
  for (int r = 0; r < 2; r++) { /* layer 0 turns one way, layer 2 another with log gains, layer 1 not at all */
    for (int i = 0; i < DIM / 2; i++) frequencies[i] = (float)pow(100 + r, -2.0 * i / DIM);
    assert_ok(c, oscar_rope_create(c, &(oscar_rope_spec){(oscar_rope_layout)r, DIM - 8 * r, frequencies}, &ropes[r]));
  }
  for (int layer = 0; layer < LAYERS; layer++)
    for (int head = 0; head < HEADS; head++) {
      int m = layer == 1 ? 24 : DIM;
      for (int i = 0; i < DIM * DIM; i++) encode[i] = test_normal(&seed), decode[i] = test_normal(&seed);
      for (int i = 0; i < DIM; i++) {
        mean[i] = test_normal(&seed);
        steps[i] = 0.5f + (float)test_uniform(&seed);
        crumbs[i] = (uint8_t)(i < 8 ? 2 : i < 16 ? 1 : i < m - 8 ? 1 : i < m && layer == 1 ? 1 : 0);
      }
      for (int i = 0; i < DIM; i++) rotating[i] = test_normal(&seed);
      for (int i = 0; i < DIM / 2; i++) pairs[i] = (uint16_t)(i + head); /* one less than there are */
      oscar_codec_spec spec = {.head_dim = DIM,
                               .channels = m,
                               .form = layer == 2 ? OSCAR_ROW_LOG_GAINS : OSCAR_ROW_GAIN,
                               .groups = 2,
                               .clip_ratio = 0.5f,
                               .crumbs = crumbs,
                               .steps = steps,
                               .mean = mean,
                               .encode = encode,
                               .decode = decode,
                               .rope = layer == 1 ? NULL : ropes[layer / 2],
                               .rotating_pairs = layer == 1   ? 0
                                                 : layer == 0 ? DIM / 2 - 1
                                                              : 3,
                               .rotating_pair = pairs,
                               .rotating_mean = rotating};
      oscar_codec *codec = NULL;
      assert_ok(c, oscar_codec_create(c, &spec, &codec));
      assert_ok(c, oscar_codec_set_assign(set, layer, head, OSCAR_KEYS, codec));
      oscar_codec_release(codec);
    }
  oscar_rope_release(ropes[0]);
  oscar_rope_release(ropes[1]);
  oscar_codec_spec plain = {.head_dim = DIM, .channels = DIM, .form = OSCAR_ROW_SCALE_ZERO, .groups = 1, .clip_ratio = 0.92f};
  oscar_codec *shared = NULL, *rotated = NULL;
  assert_ok(c, oscar_codec_create(c, &plain, &shared));
  plain.encode = hadamard;
  assert_ok(c, oscar_codec_create(c, &plain, &rotated));
  for (int i = 0; i < LAYERS * HEADS; i++)
    assert_ok(c, oscar_codec_set_assign(set, i / HEADS, i % HEADS, OSCAR_VALUES, i / HEADS == 2 ? rotated : shared));
  oscar_codec_release(shared);
  oscar_codec_release(rotated);
  return set;
}

static void assert_same_codec(oscar_context *c, const oscar_codec *a, const oscar_codec *b) {
  const oscar_codec_spec *x = oscar_codec_describe(a), *y = oscar_codec_describe(b);
  size_t d = (size_t)x->head_dim, m = (size_t)x->channels, bytes = oscar_codec_row_bytes(a);
  assert_int_equal(x->head_dim, y->head_dim);
  assert_int_equal(x->channels, y->channels);
  assert_int_equal(x->form, y->form);
  assert_int_equal(x->groups, y->groups);
  if (x->form == OSCAR_ROW_SCALE_ZERO) assert_true(x->clip_ratio == y->clip_ratio);
  assert_memory_equal(x->crumbs, y->crumbs, m);
  assert_memory_equal(x->steps, y->steps, m * sizeof(float));
  assert_memory_equal(x->mean, y->mean, d * sizeof(float));
  assert_memory_equal(x->encode, y->encode, d * m * sizeof(float));
  assert_memory_equal(x->decode, y->decode, d * m * sizeof(float));
  assert_int_equal(x->rotating_pairs, y->rotating_pairs);
  assert_memory_equal(x->rotating_pair, y->rotating_pair, (size_t)x->rotating_pairs * sizeof *x->rotating_pair);
  assert_memory_equal(x->rotating_mean, y->rotating_mean, 2 * (size_t)x->rotating_pairs * sizeof(float));
  assert_true(rope_equal(x->rope, y->rope));
  assert_int_equal(a->map_rows, b->map_rows);
  assert_memory_equal(a->map, b->map, (size_t)a->map_rows * d * sizeof(float));
  uint64_t seed = 7;
  float rows[5 * DIM];
  uint8_t first[5 * 64], second[5 * 64];
  for (int i = 0; i < 5 * DIM; i++) rows[i] = test_normal(&seed);
  assert_ok(c, oscar_codec_encode(a, 1000, 5, rows, DIM, first));
  assert_ok(c, oscar_codec_encode(b, 1000, 5, rows, DIM, second));
  assert_memory_equal(first, second, 5 * bytes);
}

struct folder {
  char path[64], file[96], other[96];
};

static void open_folder(struct folder *f) {
  strcpy(f->path, "/tmp/oscar-test-XXXXXX");
  assert_non_null(mkdtemp(f->path));
  snprintf(f->file, sizeof f->file, "%s/set", f->path);
  snprintf(f->other, sizeof f->other, "%s/other", f->path);
}

/* Fails if anything but the two files was left. */
static void close_folder(struct folder *f) {
  unlink(f->file);
  unlink(f->other);
  assert_int_equal(rmdir(f->path), 0);
}

static void a_saved_set_comes_back_to_the_bit(void **state) {
  (void)state;
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 1);
  struct folder f;
  open_folder(&f);
  oscar_codec_set *set = make_set(c), *back = NULL;
  assert_ok(c, oscar_codec_set_save(set, f.file));
  assert_ok(c, oscar_codec_set_load(c, f.file, &back));
  const oscar_codec_set_info *x = oscar_codec_set_describe(set), *y = oscar_codec_set_describe(back);
  assert_int_equal(y->layers, LAYERS);
  assert_int_equal(y->kv_heads, HEADS);
  assert_int_equal(y->head_dim, DIM);
  assert_string_equal(x->recipe, y->recipe);
  assert_string_equal(x->fingerprint, y->fingerprint);
  assert_string_equal(x->provenance, y->provenance);
  for (int p = 0; p < LAYERS * HEADS * 2; p++)
    for (int q = 0; q < LAYERS * HEADS * 2; q++) {
      const oscar_codec *a = oscar_codec_set_get(set, p / 4, p / 2 % 2, (oscar_side)(p % 2)),
                        *b = oscar_codec_set_get(back, p / 4, p / 2 % 2, (oscar_side)(p % 2));
      if (p == q) assert_same_codec(c, a, b);
      assert_int_equal(a == oscar_codec_set_get(set, q / 4, q / 2 % 2, (oscar_side)(q % 2)), /* shared as before */
                       b == oscar_codec_set_get(back, q / 4, q / 2 % 2, (oscar_side)(q % 2)));
    }

  struct file_map first, second;
  assert_ok(c, oscar_codec_set_save(back, f.other));
  assert_ok(c, file_map_open(c, f.file, &first));
  assert_ok(c, file_map_open(c, f.other, &second));
  assert_int_equal(first.bytes, second.bytes);
  assert_memory_equal(first.data, second.data, first.bytes);
  /* 6 key codecs of d x m twice, two value codecs of which one has a matrix: nothing is stored twice */
  size_t matrices = (4 * 2 * DIM * DIM + 2 * 2 * DIM * 24 + DIM * DIM) * sizeof(float);
  assert_true(first.bytes > matrices && first.bytes < matrices + 8192);
  file_map_close(&first);
  file_map_close(&second);
  oscar_codec_set_free(set);
  oscar_codec_set_free(back);
  close_folder(&f);
  oscar_context_free(c);
}

static void a_file_is_what_the_format_says(void **state) {
  (void)state;
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 1);
  struct folder f;
  open_folder(&f);
  oscar_codec_set *set = make_set(c);
  assert_ok(c, oscar_codec_set_save(set, f.file));
  struct file_map map;
  struct safetensors st;
  assert_ok(c, file_map_open(c, f.file, &map));
  assert_ok(c, safetensors_open(c, map.data, map.bytes, &st));
  assert_string_equal(safetensors_metadata(&st, "format"), "oscar-codec-set");
  assert_string_equal(safetensors_metadata(&st, "version"), "2");
  assert_string_equal(safetensors_metadata(&st, "kv_heads"), "2");
  const struct safetensor *places = safetensors_find(&st, "places");
  static const int32_t expected[] = {0, 1, 2, 1, 3, 1, 4, 1, 5, 6, 7, 6};
  assert_int_equal(places->dims, 3);
  assert_memory_equal(places->data, expected, sizeof expected);
  assert_int_equal(((uintptr_t)places->data - (uintptr_t)map.data) % 64, 0);
  assert_non_null(safetensors_find(&st, "layers.0.heads.1.keys.encode"));
  assert_non_null(safetensors_find(&st, "layers.1.heads.0.keys.decode"));
  assert_int_equal(safetensors_find(&st, "layers.1.heads.0.keys.decode")->shape[0], 24);
  assert_int_equal(safetensors_find(&st, "layers.0.heads.0.keys.crumbs")->dtype, SAFETENSOR_U8);
  assert_null(safetensors_find(&st, "layers.0.heads.0.values.encode")); /* identity */
  assert_non_null(safetensors_find(&st, "layers.2.heads.0.values.encode"));
  assert_null(safetensors_find(&st, "layers.2.heads.0.values.decode")); /* transposed */
  assert_null(safetensors_find(&st, "layers.2.heads.1.values.encode")); /* shared */
  assert_null(safetensors_metadata(&st, "nothing"));
  safetensors_close(&st);
  file_map_close(&map);
  oscar_codec_set_free(set);
  close_folder(&f);
  oscar_context_free(c);
}

/* Written by the safetensors package, after docs/formats.md. */
static void a_file_made_by_another_program_is_read(void **state) {
  (void)state;
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 1);
  oscar_codec_set *set = NULL;
  assert_ok(c, oscar_codec_set_load(c, OSCAR_TEST_DATA "/set.safetensors", &set));
  assert_string_equal(oscar_codec_set_describe(set)->recipe, "by-hand");
  const oscar_codec_spec *keys = oscar_codec_describe(oscar_codec_set_get(set, 0, 0, OSCAR_KEYS)),
                         *plain = oscar_codec_describe(oscar_codec_set_get(set, 0, 1, OSCAR_KEYS)),
                         *values = oscar_codec_describe(oscar_codec_set_get(set, 0, 0, OSCAR_VALUES));
  assert_int_equal(keys->form, OSCAR_ROW_GAIN);
  assert_int_equal(values->form, OSCAR_ROW_SCALE_ZERO);
  assert_true(values->clip_ratio == 0.75f);
  assert_ptr_equal(oscar_codec_set_get(set, 0, 0, OSCAR_VALUES), oscar_codec_set_get(set, 0, 1, OSCAR_VALUES));
  for (int i = 0; i < 16; i++) {
    assert_true(keys->steps[i] == 0.5f && keys->mean[i] == (float)i / 4 && keys->crumbs[i] == 1);
    for (int j = 0; j < 16; j++) {
      assert_true(keys->encode[16 * i + j] == (__builtin_parity((unsigned)(i & j)) ? -.25f : .25f));
      assert_true(keys->decode[16 * i + j] == keys->encode[16 * j + i]);
      assert_true(plain->encode[16 * i + j] == (i == j));
    }
  }
  oscar_codec_set_free(set);
  oscar_context_free(c);
}

static void what_cannot_be_saved_leaves_no_file(void **state) {
  (void)state;
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 1);
  struct folder f;
  open_folder(&f);
  oscar_codec_set_info info = {1, 1, DIM, "int2", "", ""};
  oscar_codec_set *empty = NULL, *set = make_set(c);
  assert_ok(c, oscar_codec_set_create(c, &info, &empty));
  assert_int_equal(oscar_codec_set_save(empty, f.file), OSCAR_INVALID_ARGUMENT);
  assert_non_null(strstr(oscar_last_error(c), "no codec is assigned"));
  oscar_codec_set_free(empty);
  assert_int_equal(oscar_codec_set_save(set, "/nonexistent/folder/set"), OSCAR_IO);
  oscar_codec_set_free(set);

  oscar_plain_options plain = {.crumbs_per_channel = 1, .clip_keys = 1, .clip_values = 1};
  info.provenance = "\xFF\xFE";
  assert_ok(c, oscar_codec_set_create_plain(c, &info, &plain, &set));
  assert_int_equal(oscar_codec_set_save(set, f.file), OSCAR_INVALID_ARGUMENT);
  assert_non_null(strstr(oscar_last_error(c), "provenance"));
  oscar_codec_set_free(set);
  oscar_codec_set *back = NULL;
  assert_int_equal(oscar_codec_set_load(c, f.file, &back), OSCAR_IO);
  assert_null(back);
  close_folder(&f);
  oscar_context_free(c);
}

/* ---- the container ---- */

/* A file of a header given as text and `data_bytes` zero bytes. */
static oscar_status open_text(oscar_context *c, const char *header, size_t data_bytes, uint8_t **bytes, struct safetensors *st) {
  size_t n = strlen(header);
  *bytes = calloc(8 + n + data_bytes, 1);
  for (int i = 0; i < 8; i++) (*bytes)[i] = (uint8_t)(n >> 8 * i);
  memcpy(*bytes + 8, header, n);
  return safetensors_open(c, *bytes, 8 + n + data_bytes, st);
}

static void the_container_is_checked(void **state) {
  (void)state;
  static const struct {
    oscar_status status;
    size_t data_bytes;
    const char *header, *reason;
  } cases[] = {
      {OSCAR_OK, 0, "{}", ""},
      {OSCAR_OK, 0, "{}      ", ""},
      {OSCAR_OK, 12,
       "{\"b\":{\"dtype\":\"F32\",\"shape\":[1,2],\"data_offsets\":[4,12]},\"a\":{\"dtype\":\"F32\",\"shape\":[],\"data_"
       "offsets\":[0,4]}}",
       ""},
      {OSCAR_OK, 4,
       "{\"e\":{\"dtype\":\"F64\",\"shape\":[3,0],\"data_offsets\":[4,4]},\"a\":{\"dtype\":\"BF16\",\"shape\":[2],\"data_"
       "offsets\":[0,4]}}",
       ""},
      {OSCAR_FORMAT, 0, "", "no JSON object"},
      {OSCAR_FORMAT, 0, "[]", "no JSON object"},
      {OSCAR_FORMAT, 0, " {}", "no JSON object"},
      {OSCAR_FORMAT, 0, "{\"a\":", "no JSON object"},
      {OSCAR_FORMAT, 0, "{\"a\":1}", "dtype, shape, data_offsets"},
      {OSCAR_FORMAT, 0, "{\"__metadata__\":{\"a\":1}}", "not a text"},
      {OSCAR_FORMAT, 0, "{\"__metadata__\":[]}", "map of texts"},
      {OSCAR_FORMAT, 4,
       "{\"a\":{\"dtype\":\"U8\",\"shape\":[2],\"data_offsets\":[0,2]},\"a\":{\"dtype\":\"U8\",\"shape\":[2],\"data_offsets\":[2,"
       "4]}}",
       "duplicate"},
      {OSCAR_UNSUPPORTED, 1, "{\"a\":{\"dtype\":\"Q4\",\"shape\":[1],\"data_offsets\":[0,1]}}", "dtype"},
      {OSCAR_FORMAT, 4, "{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4],\"x\":1}}", "entry"},
      {OSCAR_FORMAT, 4, "{\"a\":{\"dtype\":\"F32\",\"shape\":[-1],\"data_offsets\":[0,4]}}", "shape is not possible"},
      {OSCAR_FORMAT, 4, "{\"a\":{\"dtype\":\"F32\",\"shape\":[1.0],\"data_offsets\":[0,4]}}", "shape is not possible"},
      {OSCAR_FORMAT, 4, "{\"a\":{\"dtype\":\"F32\",\"shape\":[4294967296,4294967296],\"data_offsets\":[0,4]}}",
       "shape is not possible"},
      {OSCAR_FORMAT, 4, "{\"a\":{\"dtype\":\"F32\",\"shape\":[1,1,1,1,1,1,1,1,1],\"data_offsets\":[0,4]}}", "at most 8"},
      {OSCAR_FORMAT, 4, "{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0]}}", "data_offsets"},
      {OSCAR_FORMAT, 4, "{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[4,0]}}", "bytes 4 to 0"},
      {OSCAR_FORMAT, 4, "{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}}", "bytes 0 to 8 of 4"},
      {OSCAR_FORMAT, 4, "{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[-4,0]}}", "data_offsets"},
      {OSCAR_FORMAT, 8, "{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,8]}}", "8 bytes where its shape needs 4"},
      {OSCAR_FORMAT, 6,
       "{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]},\"b\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":["
       "2,6]}}",
       "overlap"},
      {OSCAR_FORMAT, 9,
       "{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]},\"b\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":["
       "5,9]}}",
       "gap"},
      {OSCAR_FORMAT, 5, "{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}}", "belong to none"}};
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 1);
  for (size_t n = 0; n < ARRAY_LENGTH(cases); n++) {
    uint8_t *bytes;
    struct safetensors st;
    oscar_status status = open_text(c, cases[n].header, cases[n].data_bytes, &bytes, &st);
    if (status != cases[n].status || (status != OSCAR_OK && !strstr(oscar_last_error(c), cases[n].reason)))
      fail_msg("%s: %s: %s", cases[n].header, oscar_status_name(status), oscar_last_error(c));
    if (n == 2) {
      assert_int_equal(st.n, 2);
      assert_string_equal(st.tensor[0].name, "a");
      assert_ptr_equal(safetensors_find(&st, "b")->data, bytes + 8 + strlen(cases[n].header) + 4);
      assert_null(safetensors_find(&st, "c"));
    }
    safetensors_close(&st);
    free(bytes);
  }
  struct safetensors st;
  const uint8_t huge[16] = {0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, '{', '}'};
  assert_int_equal(safetensors_open(c, huge, sizeof huge, &st), OSCAR_FORMAT);
  safetensors_close(&st);
  assert_int_equal(safetensors_open(c, huge, 7, &st), OSCAR_FORMAT);
  safetensors_close(&st);
  oscar_context_free(c);
}

/* ---- damage ---- */

static uint8_t *saved_bytes(oscar_context *c, size_t *n) {
  struct folder f;
  struct file_map map;
  open_folder(&f);
  oscar_codec_set *set = make_set(c);
  assert_ok(c, oscar_codec_set_save(set, f.file));
  assert_ok(c, file_map_open(c, f.file, &map));
  uint8_t *bytes = malloc(map.bytes);
  memcpy(bytes, map.data, map.bytes);
  *n = map.bytes;
  file_map_close(&map);
  oscar_codec_set_free(set);
  close_folder(&f);
  return bytes;
}

static void cut_files_are_refused(void **state) {
  (void)state;
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 1);
  size_t n;
  uint8_t *bytes = saved_bytes(c, &n);
  for (size_t cut = 0; cut < n; cut += cut < 32 || cut + 8 > n ? 1 : 613) {
    uint8_t *part = malloc(cut + !cut);
    memcpy(part, bytes, cut);
    oscar_codec_set *set = NULL;
    assert_int_equal(codec_set_from_memory(c, part, cut, &set), OSCAR_FORMAT);
    assert_null(set);
    free(part);
  }
  free(bytes);
  oscar_context_free(c);
}

/* Replaces the first occurrence of a word in the header by one as long. */
static void replace(uint8_t *bytes, size_t n, const char *word, const char *by) {
  assert_int_equal(strlen(word), strlen(by));
  uint8_t *at = memmem(bytes, n, word, strlen(word));
  assert_non_null(at);
  memcpy(at, by, strlen(by));
}

static void changed_headers_are_refused(void **state) {
  (void)state;
  static const struct {
    const char *word, *by;
    oscar_status status;
    const char *reason;
  } changes[] = {
      {"oscar-codec-set", "other-codec-set", OSCAR_FORMAT, "format"},
      {"\"version\":\"2\"", "\"version\":\"3\"", OSCAR_UNSUPPORTED, "version \"3\""},
      {"\"codecs.rope\"", "\"codecs.ropf\"", OSCAR_FORMAT, "codecs.rope is missing"},
      {"\"ropes.layout\"", "\"ropes.lajout\"", OSCAR_FORMAT, "no part of the format"},
      {"\"ropes.1.freq", "\"ropes.2.freq", OSCAR_FORMAT, "ropes.1.frequencies is missing"},
      {"layers.2.heads.1.keys.rotating_pairs", "layers.2.heads.1.keys.rotating_peers", OSCAR_FORMAT, "rotating_pairs is missing"},
      {"layers.0.heads.1.keys.rotating_mean", "layers.0.heads.1.keys.rotating_meat", OSCAR_FORMAT, "without rotating_mean"},
      {"\"layers\":\"3\"", "\"layers\":\"4\"", OSCAR_FORMAT, "places is not I32 [4, 2, 2]"},
      {"\"layers\":\"3\"", "\"layers\":\"x\"", OSCAR_FORMAT, "layers"},
      {"\"layers\":\"3\"", "\"lajers\":\"3\"", OSCAR_FORMAT, "layers"},
      {"\"head_dim\":\"32\"", "\"head_dim\":\"16\"", OSCAR_FORMAT, ""},
      {"\"recipe\"", "\"reZipe\"", OSCAR_FORMAT, "recipe"},
      {"\"places\"", "\"plazes\"", OSCAR_FORMAT, "places is missing"},
      {"\"codecs.form\"", "\"codecs.farm\"", OSCAR_FORMAT, "codecs.form is missing"},
      {"layers.0.heads.0.keys.mean", "layers.0.heads.0.keys.maen", OSCAR_FORMAT, "no part of the format"},
      {"layers.0.heads.0.keys.decode", "layers.0.heads.1.values.tail", OSCAR_FORMAT, "no part of the format"},
      {"\"codecs.clip_ratio\":{\"data_offsets\":[112,144],\"dtype\":\"F32\"",
       "\"codecs.clip_ratio\":{\"data_offsets\":[112,144],\"dtype\":\"U32\"", OSCAR_FORMAT, "codecs.clip_ratio is not F32 [8]"}};
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 1);
  for (size_t k = 0; k < ARRAY_LENGTH(changes); k++) {
    size_t n;
    uint8_t *bytes = saved_bytes(c, &n);
    oscar_codec_set *set = NULL;
    replace(bytes, n, changes[k].word, changes[k].by);
    oscar_status status = codec_set_from_memory(c, bytes, n, &set);
    if (status != changes[k].status || !strstr(oscar_last_error(c), changes[k].reason))
      fail_msg("%s: %s: %s", changes[k].by, oscar_status_name(status), oscar_last_error(c));
    assert_null(set);
    free(bytes);
  }
  oscar_context_free(c);
}

static void changed_numbers_are_refused_or_loaded_whole(void **state) {
  (void)state;
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 1);
  size_t n;
  uint8_t *bytes = saved_bytes(c, &n);
  struct safetensors st;
  oscar_codec_set *set = NULL;
  assert_ok(c, safetensors_open(c, bytes, n, &st));
  size_t mean = (size_t)((const uint8_t *)safetensors_find(&st, "layers.0.heads.1.keys.mean")->data - bytes),
         place = (size_t)((const uint8_t *)safetensors_find(&st, "places")->data - bytes),
         form = (size_t)((const uint8_t *)safetensors_find(&st, "codecs.form")->data - bytes);
  safetensors_close(&st);
  const float nan = NAN;
  uint8_t kept[4];
  memcpy(kept, bytes + mean, 4);
  memcpy(bytes + mean, &nan, 4);
  assert_int_equal(codec_set_from_memory(c, bytes, n, &set), OSCAR_NUMERIC);
  assert_non_null(strstr(oscar_last_error(c), "layers.0.heads.1.keys: "));
  assert_non_null(strstr(oscar_last_error(c), "mean[0]"));
  memcpy(bytes + mean, kept, 4);
  bytes[place + 4] = 9; /* a codec before its turn */
  assert_int_equal(codec_set_from_memory(c, bytes, n, &set), OSCAR_FORMAT);
  assert_non_null(strstr(oscar_last_error(c), "places[1]"));
  bytes[place + 4] = 1;
  bytes[form] = 3;
  assert_int_equal(codec_set_from_memory(c, bytes, n, &set), OSCAR_FORMAT);
  assert_non_null(strstr(oscar_last_error(c), "form 3"));
  bytes[form] = 0;
  for (size_t at = 0; at < n; at += 97) { /* anything may happen but a crash, a leak, or half a set */
    bytes[at] ^= 0x41;
    oscar_status status = codec_set_from_memory(c, bytes, n, &set);
    assert_int_equal(status == OSCAR_OK, set != NULL);
    if (set) assert_ok(c, oscar_codec_set_check(set));
    oscar_codec_set_free(set);
    set = NULL;
    bytes[at] ^= 0x41;
  }
  assert_ok(c, codec_set_from_memory(c, bytes, n, &set));
  oscar_codec_set_free(set);
  free(bytes);
  oscar_context_free(c);
}

/* 1,000 codecs of 1024 channels that are all defaults: a few kilobytes that would become 16 GB. */
static void a_small_file_cannot_ask_for_all_memory(void **state) {
  (void)state;
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 1);
  enum { N = 1000 };
  static int32_t places[N], groups[N], channels[N];
  static float clip[N];
  static uint8_t form[N];
  for (int i = 0; i < N; i++) places[i] = i, groups[i] = 1, channels[i] = 1024, clip[i] = 1, form[i] = 1;
  const struct safetensor tensors[] = {{"places", SAFETENSOR_I32, 3, {N / 2, 1, 2}, places, sizeof places},
                                       {"codecs.groups", SAFETENSOR_I32, 1, {N}, groups, sizeof groups},
                                       {"codecs.channels", SAFETENSOR_I32, 1, {N}, channels, sizeof channels},
                                       {"codecs.clip_ratio", SAFETENSOR_F32, 1, {N}, clip, sizeof clip},
                                       {"codecs.form", SAFETENSOR_U8, 1, {N}, form, sizeof form}};
  const struct safetensors_text metadata[] = {
      {"format", "oscar-codec-set"}, {"version", "1"}, {"layers", "500"},   {"kv_heads", "1"},
      {"head_dim", "1024"},          {"recipe", "x"},  {"fingerprint", ""}, {"provenance", ""}};
  char *bytes = NULL;
  size_t n = 0;
  FILE *stream = open_memstream(&bytes, &n);
  assert_ok(c, safetensors_write(c, stream, tensors, ARRAY_LENGTH(tensors), metadata, ARRAY_LENGTH(metadata)));
  fclose(stream);
  oscar_codec_set *set = NULL;
  assert_int_equal(codec_set_from_memory(c, (const uint8_t *)bytes, n, &set), OSCAR_UNSUPPORTED);
  assert_non_null(strstr(oscar_last_error(c), "describes codecs of more than"));
  assert_null(set);
  free(bytes);
  oscar_context_free(c);
}

static void running_out_of_memory_loses_nothing(void **state) {
  (void)state;
  struct failing_alloc f;
  oscar_context *c = failing_context(&f);
  struct folder folder;
  open_folder(&folder);
  oscar_codec_set *set = make_set(c), *back = NULL;
  sweep_allocations(c, &f, oscar_codec_set_save(set, folder.file));
  sweep_allocations(c, &f, oscar_codec_set_load(c, folder.file, &back));
  oscar_codec_set_free(set);
  oscar_codec_set_free(back);
  close_folder(&folder);
  failing_context_free(c, &f);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(a_saved_set_comes_back_to_the_bit),
      cmocka_unit_test(a_file_is_what_the_format_says),
      cmocka_unit_test(a_file_made_by_another_program_is_read),
      cmocka_unit_test(what_cannot_be_saved_leaves_no_file),
      cmocka_unit_test(the_container_is_checked),
      cmocka_unit_test(cut_files_are_refused),
      cmocka_unit_test(changed_headers_are_refused),
      cmocka_unit_test(changed_numbers_are_refused_or_loaded_whole),
      cmocka_unit_test(a_small_file_cannot_ask_for_all_memory),
      cmocka_unit_test(running_out_of_memory_loses_nothing),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
