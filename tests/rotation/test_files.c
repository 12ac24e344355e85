/*
 * Published rotation files: small ones written by tools/make_rotation_vectors.py whose numbers follow formulas, real ones beside
 * the checkout, and files that are cut, changed or hostile.
 */
#include "support.h"

#include "base/file.h"
#include "failing_alloc.h"
#include "quant/codec.h"
#include "rotation/torch_file.h"

#define D 16

static const char *data(const char *name) {
  static char path[4096];
  snprintf(path, sizeof path, "%s/%s", OSCAR_TEST_DATA, name);
  return path;
}

static double h16(int i, int j) { return __builtin_parity((unsigned)(i & j)) ? -.25 : .25; }

static void version_1_is_read_with_int_and_str_keys(void **state) {
  (void)state;
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 1);
  for (int text = 0; text < 2; text++) {
    oscar_rotation_file *file = NULL;
    assert_ok(c, oscar_rotation_file_read(c, data(text ? "v1_text_keys.pt" : "v1.pt"), &file));
    assert_string_equal(file->format_version, "1");
    assert_string_equal(file->objective, "qqt_r_h_pbr");
    assert_string_equal(file->source_grouping, "layer");
    assert_int_equal(file->head_dim, D);
    assert_int_equal(file->layers, 2);
    for (int l = 0; l < 2; l++) {
      const oscar_rotation_layer *layer = &file->layer[l];
      assert_int_equal(layer->layer_id, l);
      assert_int_equal(layer->heads, 1);
      assert_null(layer->mean);
      assert_null(layer->q_rotation);
      assert_null(layer->o_rotation);
      for (int i = 0; i < D; i++) {
        assert_true(layer->eigenvalues[i] == (float)(i + l));
        for (int j = 0; j < D; j++) assert_true((double)layer->rotation[i * D + j] == (i == l ? -1 : 1) * h16(i, j));
      }
    }
    oscar_rotation_file_free(c, file);
  }
  oscar_context_free(c);
}

static void version_2_has_heads_means_and_companions_in_any_layout(void **state) {
  (void)state;
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 1);
  oscar_rotation_file *file = NULL;
  assert_ok(c, oscar_rotation_file_read(c, data("v2.pt"), &file));
  assert_string_equal(file->format_version, "2");
  assert_int_equal(file->layers, 2);
  for (int l = 0; l < 2; l++) {
    const oscar_rotation_layer *layer = &file->layer[l];
    assert_int_equal(layer->layer_id, l ? 7 : 3);
    assert_int_equal(layer->heads, 2);
    assert_null(layer->o_rotation);
    for (int h = 0; h < 2; h++)
      for (int i = 0; i < D; i++) {
        assert_true((double)layer->mean[h * D + i] == h - i / 8.0);
        assert_true(layer->eigenvalues[h * D + i] == (float)i);
        for (int k = 0; k < D; k++) {
          double s = 1 + h + k / 16.0;
          assert_true(layer->rotation[(h * D + i) * D + k] == (float)(h16(i, k) * s));
          assert_true(layer->q_rotation[(h * D + i) * D + k] == (float)(h16(i, k) / s));
        }
      }
  }
  oscar_rotation_file_free(c, file);
  oscar_context_free(c);
}

static void an_identity_file_is_read(void **state) {
  (void)state;
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 1);
  oscar_rotation_file *file = NULL;
  assert_ok(c, oscar_rotation_file_read(c, data("identity.pt"), &file));
  assert_string_equal(file->format_version, "identity-v1");
  assert_int_equal(file->layers, 3);
  assert_null(file->layer[2].eigenvalues);
  for (int i = 0; i < D * D; i++) assert_true(file->layer[2].rotation[i] == (i % (D + 1) == 0));
  oscar_rotation_file_free(c, file);
  oscar_context_free(c);
}

static void bad_files_are_refused_with_a_reason(void **state) {
  (void)state;
  static const struct {
    const char *name;
    oscar_status status;
    const char *reason;
  } bad[] = {{"hostile.pt", OSCAR_UNSUPPORTED, "system"},
             {"protocol4.pt", OSCAR_UNSUPPORTED, "protocol 4"},
             {"old_stream.pt", OSCAR_FORMAT, "zip"},
             {"compressed.pt", OSCAR_UNSUPPORTED, "compressed"},
             {"missing_storage.pt", OSCAR_FORMAT, "data/1 is not in the archive"},
             {"short_storage.pt", OSCAR_FORMAT, "1020 bytes where 1024"},
             {"big_endian.pt", OSCAR_UNSUPPORTED, "little-endian"},
             {"not_finite.pt", OSCAR_NUMERIC, "layer 1: rotation"},
             {"layer_twice.pt", OSCAR_FORMAT, "layer 1 is there twice"},
             {"no such file", OSCAR_IO, "cannot be opened"}};
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 1);
  for (size_t n = 0; n < ARRAY_LENGTH(bad); n++) {
    oscar_rotation_file *file = NULL;
    assert_int_equal(oscar_rotation_file_read(c, data(bad[n].name), &file), bad[n].status);
    assert_null(file);
    if (!strstr(oscar_last_error(c), bad[n].reason)) fail_msg("%s: %s", bad[n].name, oscar_last_error(c));
    assert_non_null(strstr(oscar_last_error(c), bad[n].name));
  }
  oscar_context_free(c);
}

static uint8_t *copy_of(oscar_context *c, const char *name, size_t *bytes) {
  struct file_map map;
  assert_ok(c, file_map_open(c, data(name), &map));
  uint8_t *copy = malloc(map.bytes);
  memcpy(copy, map.data, map.bytes);
  *bytes = map.bytes;
  file_map_close(&map);
  return copy;
}

static void cut_files_are_refused(void **state) {
  (void)state;
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 1);
  size_t bytes;
  uint8_t *whole = copy_of(c, "v1.pt", &bytes);
  for (size_t n = 1; n < bytes; n += n < 64 || n + 512 > bytes ? 1 : 37) {
    uint8_t *cut = malloc(n); /* its own block, so that reading past the end is seen */
    memcpy(cut, whole, n);
    oscar_rotation_file *file = NULL;
    assert_int_not_equal(rotation_from_memory(c, cut, n, &file), OSCAR_OK);
    assert_null(file);
    free(cut);
  }
  free(whole);
  oscar_context_free(c);
}

/* Checksums see a changed byte of an entry; changes elsewhere may not matter, but nothing may break. */
static void changed_bytes_never_give_other_numbers(void **state) {
  (void)state;
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 1);
  size_t bytes;
  uint8_t *whole = copy_of(c, "identity.pt", &bytes);
  for (size_t n = 0; n < bytes; n += 3) {
    whole[n] ^= 0x55;
    oscar_rotation_file *file = NULL;
    if (rotation_from_memory(c, whole, bytes, &file) == OSCAR_OK) {
      assert_int_equal(file->layers, 3);
      for (int l = 0; l < 3; l++)
        for (int i = 0; i < D * D; i++) assert_true(file->layer[l].rotation[i] == (i % (D + 1) == 0));
    }
    oscar_rotation_file_free(c, file);
    whole[n] ^= 0x55;
  }
  free(whole);
  oscar_context_free(c);
}

/* ---- pickles by hand ---- */

static oscar_status zero_check(void *user, const char *key, uint32_t n, size_t bytes) {
  (void)key;
  (void)n;
  return bytes <= 4096 ? OSCAR_OK : set_error(user, OSCAR_FORMAT, "too much");
}

static oscar_status zero_read(void *user, const char *key, uint32_t n, void *to, size_t bytes) {
  (void)user;
  (void)key;
  (void)n;
  memset(to, 0, bytes);
  return OSCAR_OK;
}

static oscar_status parse(oscar_context *c, const char *pickle, size_t n, oscar_rotation_file **file) {
  const struct storage_source source = {zero_read, zero_check, c};
  return rotation_from_pickle(c, (const uint8_t *)pickle, n, &source, file);
}

/* "X" with its length, for short strings */
#define TEXT(n, s) "X" n "\0\0\0" s
#define STORAGE                                                                                                                  \
  "(" TEXT("\7", "storage") "ctorch\nFloatStorage\n" TEXT("\1", "0") TEXT("\3", "cpu") "M\0\1"                                   \
                                                                                       "tQ"
#define TENSOR(offset, sizes, strides)                                                                                           \
  "ctorch._utils\n_rebuild_tensor_v2\n(" STORAGE offset sizes strides "\x89"                                                     \
  "N"                                                                                                                            \
  "tR"
static void hand_written_pickles_are_checked(void **state) {
  (void)state;
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 1);
  oscar_rotation_file *file = NULL;
#define PARSE(s) parse(c, s, sizeof(s) - 1, &file)
#define REFUSED(status, reason, s)                                                                                               \
  do {                                                                                                                           \
    assert_int_equal(PARSE(s), status);                                                                                          \
    assert_null(file);                                                                                                           \
    if (!strstr(oscar_last_error(c), reason)) fail_msg("%s: %s", reason, oscar_last_error(c));                                   \
  } while (0)
  static const char good[] = "\x80\2}(" TEXT("\x0e", "format_version") "K\1" TEXT("\6", "layers") "}K\0}" TEXT("\x08", "rotation")
      TENSOR("K\0", "K\x10K\x10\x86", "K\x10K\1\x86") "ssu.";
  assert_ok(c, parse(c, good, sizeof good - 1, &file));
  assert_int_equal(file->head_dim, 16);
  oscar_rotation_file_free(c, file);
  file = NULL;
#define WITH(tensor)                                                                                                             \
  "\x80\2}(" TEXT("\x0e", "format_version") "K\1" TEXT("\6", "layers") "}K\0}" TEXT("\x08", "rotation") tensor "ssu."
  REFUSED(OSCAR_FORMAT, "outside its storage", WITH(TENSOR("K\1", "K\x10K\x10\x86", "K\x10K\1\x86")));
  REFUSED(OSCAR_FORMAT, "outside its storage", WITH(TENSOR("K\0", "K\x10K\x10\x86", "K\x11K\1\x86")));
  REFUSED(OSCAR_FORMAT, "outside its storage",
          WITH(TENSOR("K\0", "K\x10K\x10\x86", "\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x7fK\1\x86")));
  REFUSED(OSCAR_FORMAT, "none negative", WITH(TENSOR("K\0", "K\x10K\x10\x86", "J\xff\xff\xff\xffK\1\x86")));
  REFUSED(OSCAR_FORMAT, "none negative", WITH(TENSOR("K\0", "K\x10K\x10\x86", "K\1\x85")));
  REFUSED(OSCAR_FORMAT, "a tensor that is not", WITH(TENSOR("J\xff\xff\xff\xff", "K\x10K\x10\x86", "K\x10K\1\x86")));
  REFUSED(OSCAR_FORMAT, "columns", WITH(TENSOR("K\0", "K\x10K\0\x86", "K\x10K\1\x86")));
  REFUSED(OSCAR_FORMAT, "does not fit", WITH(TENSOR("K\0", "K\x08K\x10\x86", "K\x10K\1\x86")));
  REFUSED(OSCAR_FORMAT, "does not fit", WITH(TENSOR("K\0", "K\x10\x85", "K\1\x85")));
  REFUSED(OSCAR_FORMAT, "not a tensor", WITH("K\1"));
#undef WITH
  REFUSED(OSCAR_UNSUPPORTED, "os.system",
          "\x80\2"
          "cos\nsystem\n.");
  REFUSED(OSCAR_UNSUPPORTED, "builtins.eval",
          "\x80\2"
          "cbuiltins\neval\n" TEXT("\1", "1") "\x85R.");
  REFUSED(OSCAR_UNSUPPORTED, "BUILD", "\x80\2}}b.");
  REFUSED(OSCAR_UNSUPPORTED, "INST", "\x80\2(ios\nsystem\n.");
  REFUSED(OSCAR_UNSUPPORTED, "NEWOBJ", "\x80\2})\x81.");
  REFUSED(OSCAR_UNSUPPORTED, "STACK_GLOBAL", "\x80\2\x93.");
  REFUSED(OSCAR_FORMAT, "is no opcode", "\x80\2\xff.");
  REFUSED(OSCAR_UNSUPPORTED, "OrderedDict",
          "\x80\2"
          "ccollections\nOrderedDict\nK\1\x85R.");
  REFUSED(OSCAR_FORMAT, "called", "\x80\2K\1)R.");
  REFUSED(OSCAR_FORMAT, "persistent id", "\x80\2)Q.");
  REFUSED(OSCAR_FORMAT, "ends inside", "\x80\2X\xff\xff\xff\xff");
  REFUSED(OSCAR_FORMAT, "ends inside", "\x80\2}");
  REFUSED(OSCAR_FORMAT, "nothing is on the stack", "\x80\2.");
  REFUSED(OSCAR_FORMAT, "nothing is on the stack", "\x80\2(.");
  REFUSED(OSCAR_FORMAT, "nothing is on the stack", "\x80\2K\1\x86.");
  REFUSED(OSCAR_FORMAT, "nothing is on the stack", "\x80\2(q\0.");
  REFUSED(OSCAR_FORMAT, "no mark", "\x80\2}u.");
  REFUSED(OSCAR_FORMAT, "not a dict", "\x80\2(u.");
  REFUSED(OSCAR_FORMAT, "not a dict", "\x80\2](K\1K\2u.");
  REFUSED(OSCAR_FORMAT, "not a list",
          "\x80\2}K\1"
          "a.");
  REFUSED(OSCAR_FORMAT, "without a value", "\x80\2}(K\1u.");
  REFUSED(OSCAR_FORMAT, "never put", "\x80\2h\0.");
  REFUSED(OSCAR_FORMAT, "too large", "\x80\2}r\xff\xff\xff\xff.");
  REFUSED(OSCAR_FORMAT, "does not end",
          "\x80\2"
          "ctorch");
  REFUSED(OSCAR_FORMAT, "format_version",
          "\x80\2]q\0h\0"
          "a."); /* a list that contains itself */
  REFUSED(OSCAR_FORMAT, "format_version", "\x80\2}.");
  REFUSED(OSCAR_UNSUPPORTED, "format_version 9", "\x80\2}" TEXT("\x0e", "format_version") "K\x09s.");
  REFUSED(OSCAR_FORMAT, "no layers", "\x80\2}" TEXT("\x0e", "format_version") "K\1s.");
#undef REFUSED
#undef PARSE
  oscar_context_free(c);
}

/* ---- import ---- */

static void a_pair_of_files_becomes_a_codec_set(void **state) {
  (void)state;
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 1);
  oscar_rotation_file *file = NULL;
  oscar_codec_set *set = NULL;
  assert_ok(c, oscar_rotation_file_read(c, data("v1.pt"), &file));
  oscar_codec_set_info info = {.layers = 2, .kv_heads = 4, .head_dim = D, .recipe = "int2-published"};
  assert_ok(c, oscar_codec_set_import(c, &info, file, file, 0, .96f, .92f, &set));
  assert_ok(c, oscar_codec_set_check(set));
  const oscar_codec *keys = oscar_codec_set_get(set, 1, 0, OSCAR_KEYS);
  assert_ptr_equal(keys, oscar_codec_set_get(set, 1, 3, OSCAR_KEYS)); /* shared by the heads of a layer */
  assert_ptr_not_equal(keys, oscar_codec_set_get(set, 0, 0, OSCAR_KEYS));
  assert_memory_equal(oscar_codec_describe(keys)->encode, file->layer[1].rotation, D * D * sizeof(float));
  assert_true(oscar_codec_describe(keys)->clip_ratio == .96f);
  assert_true(oscar_codec_describe(oscar_codec_set_get(set, 0, 2, OSCAR_VALUES))->clip_ratio == .92f);
  oscar_codec_set_free(set);

  info.layers = 3;
  assert_int_equal(oscar_codec_set_import(c, &info, file, file, 0, 1, 1, &set), OSCAR_MISMATCH);
  assert_non_null(strstr(oscar_last_error(c), "2 layers, but the model has 3"));
  info.layers = 2, info.head_dim = 32;
  assert_int_equal(oscar_codec_set_import(c, &info, file, file, 0, 1, 1, &set), OSCAR_MISMATCH);
  oscar_rotation_file_free(c, file);

  info.head_dim = D, info.kv_heads = 2; /* sparse ids */
  assert_ok(c, oscar_rotation_file_read(c, data("v2.pt"), &file));
  assert_int_equal(oscar_codec_set_import(c, &info, file, file, 0, 1, 1, &set), OSCAR_MISMATCH);
  assert_non_null(strstr(oscar_last_error(c), "layer id 3"));
  assert_null(set);
  oscar_rotation_file_free(c, file);
  oscar_context_free(c);
}

static void non_orthogonal_rotations_decode_through_their_companion(void **state) {
  (void)state;
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 1);
  oscar_rotation_file *file = NULL;
  oscar_codec_set *set = NULL;
  assert_ok(c, oscar_rotation_file_read(c, data("v2.pt"), &file));
  oscar_rotation_layer layers[2] = {file->layer[0], file->layer[1]};
  layers[0].layer_id = 0, layers[1].layer_id = 1;
  oscar_rotation_file dense = *file;
  dense.layer = layers;
  oscar_codec_set_info info = {.layers = 2, .kv_heads = 2, .head_dim = D, .recipe = "int2"};
  assert_ok(c, oscar_codec_set_import(c, &info, &dense, &dense, 0, 1, 1, &set));
  for (int h = 0; h < 2; h++) {
    const oscar_codec *codec = oscar_codec_set_get(set, 1, h, OSCAR_KEYS);
    const oscar_codec_spec *spec = oscar_codec_describe(codec);
    float y[D], back[D] = {0};
    for (int i = 0; i < D; i++) back[i] = (float)(i * i % 7) - 3;
    codec_project(codec, 0, 1, back, D, y);
    for (int k = 0; k < D; k++) {
      double x = (double)spec->mean[k];
      assert_true(x == h - k / 8.0);
      for (int i = 0; i < D; i++) x += (double)y[i] * (double)spec->decode[i * D + k];
      assert_true(fabs(x - (double)back[k]) < 1e-4);
    }
  }
  oscar_codec_set_free(set);
  layers[1].q_rotation = NULL; /* now nothing undoes the rotation */
  assert_int_equal(oscar_codec_set_import(c, &info, &dense, &dense, 0, 1, 1, &set), OSCAR_FORMAT);
  assert_non_null(strstr(oscar_last_error(c), "key rotations, layer 1: head 0"));
  assert_null(set);
  oscar_rotation_file_free(c, file);
  oscar_context_free(c);
}

static void running_out_of_memory_loses_nothing(void **state) {
  (void)state;
  struct failing_alloc f;
  oscar_context *c = failing_context(&f);
  oscar_rotation_file *file = NULL;
  oscar_codec_set *set = NULL;
  oscar_codec_set_info info = {.layers = 2, .kv_heads = 2, .head_dim = D, .recipe = "int2"};
  sweep_allocations(c, &f, oscar_rotation_file_read(c, data("v2.pt"), &file));
  oscar_rotation_file_free(c, file);
  sweep_allocations(c, &f, oscar_rotation_file_read(c, data("v1.pt"), &file));
  sweep_allocations(c, &f, oscar_codec_set_import(c, &info, file, file, 0, 1, 1, &set));
  oscar_codec_set_free(set);
  oscar_rotation_file_free(c, file);
  failing_context_free(c, &f);
}

/* ---- real files ---- */

struct sample { /* entries of one row and of the eigenvalues, unpacked from the storage's bytes by another program */
  const char *name;
  int layers, head_dim, layer, layer_id, row, columns[4];
  float entries[4], lowest, highest;
};

static void real_files_hold_what_they_should(void **state) {
  (void)state;
  static const struct sample samples[] = {{"rotations/qwen3-4b-thinking-2507/k_rotation_qqt_r_h_pbr.pt",
                                           36,
                                           128,
                                           5,
                                           5,
                                           7,
                                           {0, 1, 63, 127},
                                           {0x1.6d41c2p-4f, -0x1.4c64c2p-4f, -0x1.1ce26ap-4f, 0x1.72ab9cp-4f},
                                           0x1.5a21bep-10f,
                                           0x1.011438p+7f},
                                          {"rotations/qwen3-4b-thinking-2507/v_rotation_sst_r_h_pbr.pt",
                                           36,
                                           128,
                                           35,
                                           35,
                                           127,
                                           {0, 1, 63, 127},
                                           {-0x1.590c12p-5f, 0x1.7afe12p-6f, -0x1.1692bap-6f, 0x1.3274ecp-5f},
                                           0x1.34eef6p+2f,
                                           0x1.fa0364p+5f},
                                          {"rotations/qwen3.5-4b/k_rotation.pt",
                                           8,
                                           256,
                                           7,
                                           31,
                                           200,
                                           {0, 1, 63, 255},
                                           {-0x1.28fc6p-4f, 0x1.769fc4p-5f, -0x1.4d4b28p-5f, -0x1.c8b878p-5f},
                                           0x1.e666fep-3f,
                                           0x1.528ef8p+6f}};
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 1);
  int seen = 0;
  for (size_t n = 0; n < ARRAY_LENGTH(samples); n++) {
    const struct sample *s = &samples[n];
    const char *path = test_reference(s->name);
    if (!path) continue;
    seen++;
    oscar_rotation_file *file = NULL;
    assert_ok(c, oscar_rotation_file_read(c, path, &file));
    assert_string_equal(file->format_version, "1");
    assert_int_equal(file->layers, s->layers);
    assert_int_equal(file->head_dim, s->head_dim);
    for (int l = 0; l < file->layers; l++) {
      assert_int_equal(file->layer[l].layer_id, s->layers == 8 ? 4 * l + 3 : l);
      assert_int_equal(file->layer[l].heads, 1);
      if (l % 4 == 3) assert_true(oscar_rotation_orthogonality(file->head_dim, file->layer[l].rotation) < 1e-5);
      for (int i = 1; i < file->head_dim; i++) assert_true(file->layer[l].eigenvalues[i] >= file->layer[l].eigenvalues[i - 1]);
    }
    const oscar_rotation_layer *layer = &file->layer[s->layer];
    assert_int_equal(layer->layer_id, s->layer_id);
    for (int k = 0; k < 4; k++) assert_true(layer->rotation[s->row * s->head_dim + s->columns[k]] == s->entries[k]);
    assert_true(layer->eigenvalues[0] == s->lowest && layer->eigenvalues[s->head_dim - 1] == s->highest);
    oscar_rotation_file_free(c, file);
  }
  oscar_context_free(c);
  if (!seen) skip();
}

static int by_size(const void *a, const void *b) {
  const float x = *(const float *)a, y = *(const float *)b;
  return (x > y) - (x < y);
}

/* The published formula, in single precision as the reference computes it: clip, uniform codes, scale and zero as stored. */
static void reference_row(float *y, int d, float ratio, float *decoded) {
  float size[256], low = INFINITY, high = -INFINITY;
  for (int i = 0; i < d; i++) size[i] = fabsf(y[i]);
  qsort(size, (size_t)d, sizeof *size, by_size);
  const int place = (int)(ratio * (float)d);
  const float tau = size[place < d ? place : d - 1];
  for (int i = 0; i < d; i++) {
    y[i] = y[i] < -tau ? -tau : y[i] > tau ? tau : y[i];
    low = y[i] < low ? y[i] : low;
    high = y[i] > high ? y[i] : high;
  }
  const float scale = f16_to_f32(f32_to_f16((high - low < 1e-8f ? 1e-8f : high - low) / 3));
  const float zero = f16_to_f32(f32_to_f16(-low / ((high - low < 1e-8f ? 1e-8f : high - low) / 3)));
  for (int i = 0; i < d; i++) {
    const float code = floorf(y[i] / scale + zero + 0.5f);
    decoded[i] = ((code < 0 ? 0 : code > 3 ? 3 : code) - zero) * scale;
  }
}

/* An imported codec against the formula: the projection within rounding, and from its result on the same numbers, exactly. */
static void check_reference_rows(const oscar_codec *codec, const float *rotation, float ratio, uint64_t seed) {
  enum { HEAD = 128, ROWS = 200 };
  float x[HEAD], y[HEAD], expected[HEAD], given[HEAD];
  uint8_t row[HEAD];
  assert_true(oscar_codec_row_bytes(codec) <= sizeof row);
  for (int r = 0; r < ROWS; r++) {
    for (int i = 0; i < HEAD; i++) x[i] = test_normal(&seed) * (i % 9 == 4 ? 6 : 1) + (i % 31 == 7 ? 3 : 0);
    codec_project(codec, 0, 1, x, HEAD, y);
    for (int j = 0; j < HEAD; j++) {
      double sum = 0;
      for (int i = 0; i < HEAD; i++) sum += (double)x[i] * (double)rotation[i * HEAD + j];
      assert_true(fabs((double)y[j] - sum) < 2e-5);
    }
    memcpy(given, y, sizeof given);
    assert_true(codec_quantize_row(codec, given, row));
    codec_decode_row(codec, row, given);
    reference_row(y, HEAD, ratio, expected);
    for (int i = 0; i < HEAD; i++) assert_true(given[i] == expected[i]);
  }
}

static void a_real_pair_is_imported(void **state) {
  (void)state;
  char keys_path[4096];
  const char *path = test_reference("rotations/qwen3-4b-thinking-2507/k_rotation_qqt_r_h_pbr.pt");
  if (!path) skip();
  snprintf(keys_path, sizeof keys_path, "%s", path);
  path = test_reference("rotations/qwen3-4b-thinking-2507/v_rotation_sst_r_h_pbr.pt");
  if (!path) skip();
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 1);
  oscar_rotation_file *keys = NULL, *values = NULL;
  oscar_codec_set *set = NULL;
  assert_ok(c, oscar_rotation_file_read(c, keys_path, &keys));
  assert_ok(c, oscar_rotation_file_read(c, path, &values));
  oscar_codec_set_info info = {.layers = 36, .kv_heads = 8, .head_dim = 128, .recipe = "int2-published"};
  assert_ok(c, oscar_codec_set_import(c, &info, keys, values, 0, .96f, .92f, &set));
  assert_ok(c, oscar_codec_set_check(set));
  for (int layer = 0; layer < 36; layer += 7) {
    check_reference_rows(oscar_codec_set_get(set, layer, layer % 8, OSCAR_KEYS), keys->layer[layer].rotation, .96f, 5);
    check_reference_rows(oscar_codec_set_get(set, layer, 7, OSCAR_VALUES), values->layer[layer].rotation, .92f, 6);
  }
  oscar_codec_set_free(set);
  oscar_rotation_file_free(c, keys);
  oscar_rotation_file_free(c, values);
  oscar_context_free(c);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(version_1_is_read_with_int_and_str_keys),
      cmocka_unit_test(version_2_has_heads_means_and_companions_in_any_layout),
      cmocka_unit_test(an_identity_file_is_read),
      cmocka_unit_test(bad_files_are_refused_with_a_reason),
      cmocka_unit_test(cut_files_are_refused),
      cmocka_unit_test(changed_bytes_never_give_other_numbers),
      cmocka_unit_test(hand_written_pickles_are_checked),
      cmocka_unit_test(a_pair_of_files_becomes_a_codec_set),
      cmocka_unit_test(non_orthogonal_rotations_decode_through_their_companion),
      cmocka_unit_test(running_out_of_memory_loses_nothing),
      cmocka_unit_test(real_files_hold_what_they_should),
      cmocka_unit_test(a_real_pair_is_imported),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
