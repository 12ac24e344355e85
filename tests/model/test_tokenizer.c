/* Tokenizers against Hugging Face's tokenizers and sentencepiece (stored ids), against the identity (there and back), against
 * wrong files, failing memory and texts made to take long. */
#include "vectors.h"

#include "gguf_writer.h"
#include "model/tokenizer_impl.h"

static const char *const byte_level[] = {"gpt-2", "smollm", "qwen2", "llama-bpe", "smollm2-135m"};
static const char *const sentencepiece[] = {"spm-gemma", "spm-mistral", "spm-inst"};

/* ---- stored truth ---- */

static void compare_with_truth(const char *name, const char *truth_name) {
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 1);
  struct tokenizer *t = test_tokenizer(c, name);
  if (t) {
    struct vectors corpus = vectors_open(c, "corpus", ".bin"), truth = vectors_open(c, truth_name, ".ids");
    uint32_t cases = next_u32(&corpus);
    assert_true(cases > 300);
    for (uint32_t i = 0; i < cases; i++) {
      size_t bytes;
      uint32_t plain_count, special_count;
      const char *text = next_bytes(&corpus, &bytes);
      const uint8_t *plain = next_ids(&truth, &plain_count), *special = next_ids(&truth, &special_count);
      if (special_count == SAME_AS_BEFORE) {
        special = plain;
        special_count = plain_count;
      }
      char what[256];
      int32_t *ids;
      int count;
      snprintf(what, sizeof what, "%s, case %u (%zu bytes: %.60s)", name, i, bytes, bytes ? text : "");
      assert_ok(c, tokenizer_encode(t, text, bytes, false, &ids, &count));
      expect_ids(what, ids, count, plain, plain_count);
      mem_free(c, ids);
      strcat(what, ", control tokens count");
      assert_ok(c, tokenizer_encode(t, text, bytes, true, &ids, &count));
      expect_ids(what, ids, count, special, special_count);
      mem_free(c, ids);
    }
    vectors_close(&corpus);
    vectors_close(&truth);
  }
  tokenizer_free(t);
  oscar_context_free(c);
}

static void byte_level_ids_are_those_of_the_reference(void **state) {
  (void)state;
  for (size_t i = 0; i < ARRAY_LENGTH(byte_level); i++) compare_with_truth(byte_level[i], byte_level[i]);
}

static void sentencepiece_ids_are_those_of_the_reference(void **state) {
  (void)state;
  for (size_t i = 0; i < ARRAY_LENGTH(sentencepiece); i++) compare_with_truth(sentencepiece[i], sentencepiece[i]);
}

static void ids_of_larger_models_are_those_of_the_reference(void **state) {
  (void)state;
  compare_with_truth("gemma3-270m", "gemma3-270m");
  compare_with_truth("qwen2.5-coder-0.5b", "qwen2.5-coder-0.5b");
  compare_with_truth("qwen2.5-coder-1.5b", "qwen2.5-coder-0.5b"); /* the same vocabulary */
}

/* Ids alone would not show where rare characters are cut: few of them have merges. */
static void words_end_where_the_published_patterns_end_them(void **state) {
  (void)state;
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 1);
  struct vectors truth = vectors_open(c, "splits", ".bin");
  for (size_t i = 0; i < 4; i++) {
    struct vectors corpus = vectors_open(c, "corpus", ".bin");
    struct splitter *splitter;
    assert_ok(c, splitter_create(c, (struct gguf_string){byte_level[i], strlen(byte_level[i])}, &splitter));
    for (uint32_t k = 0, cases = next_u32(&corpus); k < cases; k++) {
      size_t bytes, start, end;
      const char *text = next_bytes(&corpus, &bytes);
      struct split_pass pass;
      assert_ok(c, split_begin(splitter, text, bytes, &pass));
      for (uint16_t words = next_u16(&truth); words > 0; words--) {
        uint16_t expected = next_u16(&truth);
        assert_ok(c, split_next(&pass, &start, &end));
        if (end - start != expected)
          fail_msg("%s, case %u: the word at byte %zu has %zu bytes, not %u", byte_level[i], k, start, end - start, expected);
      }
      assert_ok(c, split_next(&pass, &start, &end));
      assert_int_equal(start, bytes);
      assert_int_equal(end, bytes);
      split_end(&pass);
    }
    splitter_free(splitter);
    vectors_close(&corpus);
  }
  vectors_close(&truth);
  oscar_context_free(c);
}

/* ---- there and back ---- */

static char *decode(oscar_context *c, const struct tokenizer *t, const int32_t *ids, int count, bool special, size_t *bytes) {
  size_t piece_bytes, room = 1;
  for (int i = 0; i < count; i++) {
    tokenizer_piece(t, ids[i], special, &piece_bytes);
    room += piece_bytes;
  }
  char *text = mem_alloc(c, room, 1);
  assert_non_null(text);
  *bytes = 0;
  for (int i = 0; i < count; i++) {
    const char *piece = tokenizer_piece(t, ids[i], special, &piece_bytes);
    memcpy(text + *bytes, piece, piece_bytes);
    *bytes += piece_bytes;
  }
  return text;
}

static bool is_text(const char *text, size_t bytes, uint8_t limit) {
  for (size_t i = 0; i < bytes; i++)
    if ((uint8_t)text[i] >= limit) return false;
  return true;
}

/* limit: only texts whose bytes are all below; `prefix`: bytes the tokenizer puts in front of any text */
static void compare_with_itself(const char *name, uint8_t limit, size_t prefix) {
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 1);
  struct tokenizer *t = test_tokenizer(c, name);
  struct vectors corpus = vectors_open(c, "corpus", ".bin");
  uint32_t cases = t ? next_u32(&corpus) : 0, compared = 0;
  for (uint32_t i = 0; i < cases; i++) {
    size_t bytes, back;
    const char *text = next_bytes(&corpus, &bytes);
    if (bytes == 0 || !is_text(text, bytes, limit)) continue;
    int32_t *ids;
    int count;
    assert_ok(c, tokenizer_encode(t, text, bytes, false, &ids, &count));
    char *again = decode(c, t, ids, count, false, &back);
    assert_int_equal(back, bytes + prefix);
    assert_memory_equal(again + prefix, text, bytes);
    for (int k = 0; k < count; k++) assert_false(tokenizer_is_end(t, ids[k]));
    mem_free(c, again);
    mem_free(c, ids);
    compared++;
  }
  assert_true(!t || compared > 100);
  file_map_close(&corpus.map);
  tokenizer_free(t);
  oscar_context_free(c);
}

static void text_comes_back_as_it_was(void **state) {
  (void)state;
  compare_with_itself("gpt-2", 0xFF, 0);
  compare_with_itself("llama-bpe", 0xFF, 0);
  compare_with_itself("qwen2", 0xCC, 0); /* above, text is brought to form C */
  compare_with_itself("qwen2.5-coder-0.5b", 0xCC, 0);
  compare_with_itself("spm-gemma", 0x80, 0);
  compare_with_itself("spm-mistral", 0x80, 1);
}

static void bytes_without_a_token_are_left_out(void **state) {
  (void)state;
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 1);
  struct tokenizer *t = test_tokenizer(c, "smollm"); /* lacks 04, 06, FF */
  int32_t *ids;
  int count;
  assert_ok(c, tokenizer_encode(t, "a\x04\xFFz\x06", 5, false, &ids, &count));
  size_t bytes;
  char *text = decode(c, t, ids, count, false, &bytes);
  assert_int_equal(bytes, 2);
  assert_memory_equal(text, "az", 2);
  mem_free(c, text);
  mem_free(c, ids);
  assert_ok(c, tokenizer_encode(t, "\xFF\xFF", 2, false, &ids, &count));
  assert_int_equal(count, 0);
  assert_non_null(ids);
  mem_free(c, ids);
  tokenizer_free(t);
  oscar_context_free(c);
}

/* ---- pieces and special ids ---- */

static void control_tokens_have_no_text_unless_asked_for(void **state) {
  (void)state;
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 1);
  struct tokenizer *t = test_tokenizer(c, "smollm");
  int32_t end = tokenizer_find(t, "<|im_end|>");
  size_t bytes;
  assert_true(end >= 0);
  assert_int_equal(end, tokenizer_eos(t));
  assert_int_equal(tokenizer_bos(t), tokenizer_find(t, "<|im_start|>"));
  assert_false(tokenizer_adds_bos(t));
  assert_true(tokenizer_is_end(t, end));
  assert_true(tokenizer_is_end(t, tokenizer_find(t, "<|endoftext|>")));
  assert_false(tokenizer_is_end(t, tokenizer_find(t, "<|im_start|>")));
  tokenizer_piece(t, end, false, &bytes);
  assert_int_equal(bytes, 0);
  const char *piece = tokenizer_piece(t, end, true, &bytes);
  assert_int_equal(bytes, 10);
  assert_memory_equal(piece, "<|im_end|>", 10);
  const int32_t outside[] = {-1, INT32_MIN, INT32_MAX, tokenizer_vocab(t)};
  for (size_t i = 0; i < ARRAY_LENGTH(outside); i++) {
    assert_string_equal(tokenizer_piece(t, outside[i], true, &bytes), "");
    assert_int_equal(bytes, 0);
    assert_false(tokenizer_is_end(t, outside[i]));
  }
  assert_int_equal(tokenizer_find(t, "<|im_en"), -1);
  assert_int_equal(tokenizer_find(t, "<|im_end|> "), -1);
  assert_int_equal(tokenizer_find(t, ""), -1);
  tokenizer_free(t);
  t = test_tokenizer(c, "llama-bpe");
  assert_true(tokenizer_adds_bos(t)); /* the file does not say; this pre-tokenizer's models want it */
  assert_true(tokenizer_is_end(t, tokenizer_find(t, "<|end_of_text|>")));
  tokenizer_free(t);
  t = test_tokenizer(c, "spm-mistral");
  assert_true(tokenizer_adds_bos(t));
  int32_t a = tokenizer_find(t, "<0xC3>");
  assert_int_equal(a, -1); /* a byte's token is not spelled in text */
  tokenizer_free(t);
  oscar_context_free(c);
}

/* ---- texts made to take long ---- */

static void a_long_text_without_a_break_takes_seconds_at_most(void **state) {
  (void)state;
  static const char *const units[] = {"ab",   " ",       "\n", "<", "!", "7", "\xC3\xA9", "e\xCC\xA3\xCC\x81", "\xCC\xA3\xCC\x81",
                                      "\xFF", "<unused1"};
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 1);
  size_t most = 1 << 20;
  char *text = malloc(most);
  assert_non_null(text);
  for (size_t i = 0; i < ARRAY_LENGTH(byte_level) + ARRAY_LENGTH(sentencepiece); i++) {
    const char *name = i < ARRAY_LENGTH(byte_level) ? byte_level[i] : sentencepiece[i - ARRAY_LENGTH(byte_level)];
    if (access(test_data(name, ".tiny.gguf"), R_OK) != 0) continue; /* small ones show as much */
    struct tokenizer *t = test_tokenizer(c, name);
    for (size_t k = 0; k < ARRAY_LENGTH(units); k++) {
      size_t unit = strlen(units[k]), bytes = k < 2 ? most : most / 16;
      for (size_t b = 0; b < bytes; b++) text[b] = units[k][b % unit];
      int32_t *ids;
      int count;
      int64_t start = time_ns();
      assert_ok(c, tokenizer_encode(t, text, bytes, true, &ids, &count));
      assert_true(count > 0 || strcmp(name, "smollm") == 0);
      assert_true(time_ns() - start < 10 * INT64_C(1000000000));
      mem_free(c, ids);
    }
    tokenizer_free(t);
  }
  free(text);
  oscar_context_free(c);
}

/* ---- wrong files ---- */

struct recipe {
  const char *model, *pre;
  const char *tokens[8];
  int32_t types[8], n_types;
  const char *merge;
  int32_t n_scores, bos;
  float last_score;
  bool strips;
};

/* *made, if wanted, is freed by the caller. */
static oscar_status create_from(oscar_context *c, const struct recipe *r, struct tokenizer **made) {
  struct gguf_writer body = {0}, w = {0};
  uint64_t keys = 0, tokens = 0;
  if (r->model) put_string(&body, "tokenizer.ggml.model", r->model), keys++;
  if (r->pre) put_string(&body, "tokenizer.ggml.pre", r->pre), keys++;
  while (tokens < 8 && r->tokens[tokens]) tokens++;
  if (tokens) {
    put_array(&body, "tokenizer.ggml.tokens", GGUF_STRING, tokens), keys++;
    for (uint64_t i = 0; i < tokens; i++) put_text(&body, r->tokens[i]);
  }
  if (r->n_types) {
    put_array(&body, "tokenizer.ggml.token_type", GGUF_INT32, (uint64_t)r->n_types), keys++;
    for (int i = 0; i < r->n_types; i++) put_u32(&body, (uint32_t)r->types[i]);
  }
  if (r->merge) {
    put_array(&body, "tokenizer.ggml.merges", GGUF_STRING, 1), keys++;
    put_text(&body, r->merge);
  }
  if (r->n_scores) {
    put_array(&body, "tokenizer.ggml.scores", GGUF_FLOAT32, (uint64_t)r->n_scores), keys++;
    for (int i = 0; i < r->n_scores; i++) put(&body, i + 1 == r->n_scores ? &r->last_score : &(float){0}, 4);
  }
  if (r->bos) put_integer(&body, "tokenizer.ggml.bos_token_id", GGUF_UINT32, (uint64_t)r->bos, 4), keys++;
  if (r->strips) put_integer(&body, "tokenizer.ggml.remove_extra_whitespaces", GGUF_BOOL, 1, 1), keys++;
  put_head(&w, 3, 0, keys);
  put(&w, body.data, body.bytes);
  put_padding(&w, 32);
  struct gguf *file;
  struct tokenizer *t = NULL;
  assert_ok(c, gguf_parse(c, "made.gguf", w.data, w.bytes, &file));
  c->error[0] = '\0';
  oscar_status status = tokenizer_create(c, file, &t);
  assert_int_equal(status == OSCAR_OK, t != NULL);
  if (made)
    *made = t;
  else
    tokenizer_free(t);
  gguf_close(file);
  writer_free(&w);
  writer_free(&body);
  return status;
}

static void wrong_files_are_refused_with_the_reason(void **state) {
  (void)state;
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 1);
  const struct recipe good = {
      .model = "gpt2", .pre = "gpt-2", .tokens = {"a", "b", "ab"}, .types = {1, 1, 1}, .n_types = 3, .merge = "a b"};
  const struct recipe good_spm = {
      .model = "llama", .tokens = {"<unk>", "a", "b"}, .types = {2, 1, 1}, .n_types = 3, .n_scores = 3};
  assert_int_equal(create_from(c, &good, NULL), OSCAR_OK);
  assert_int_equal(create_from(c, &good_spm, NULL), OSCAR_OK);
  struct recipe r;
#define REFUSED(base, expected, word, ...)                                                                                       \
  do {                                                                                                                           \
    r = base;                                                                                                                    \
    __VA_ARGS__;                                                                                                                 \
    assert_int_equal(create_from(c, &r, NULL), expected);                                                                        \
    if (!strstr(oscar_last_error(c), word)) fail_msg("no \"%s\" in: %s", word, oscar_last_error(c));                             \
  } while (0)
  REFUSED(good, OSCAR_FORMAT, "tokenizer.ggml.model", r.model = NULL);
  REFUSED(good, OSCAR_UNSUPPORTED, "\"bert\"", r.model = "bert");
  REFUSED(good, OSCAR_UNSUPPORTED, "\"default\"", r.pre = "default");
  REFUSED(good, OSCAR_UNSUPPORTED, "\"falcon\"", r.pre = "falcon");
  REFUSED(good, OSCAR_UNSUPPORTED, "tokenizer.ggml.pre is missing", r.pre = NULL);
  REFUSED(good, OSCAR_FORMAT, "tokenizer.ggml.tokens", r.tokens[0] = NULL);
  REFUSED(good, OSCAR_FORMAT, "token_type", r.n_types = 2);
  REFUSED(good, OSCAR_FORMAT, "token_type", r.n_types = 0);
  REFUSED(good, OSCAR_FORMAT, "type 7", r.types[2] = 7);
  REFUSED(good, OSCAR_FORMAT, "type 0", r.types[0] = 0);
  REFUSED(good, OSCAR_FORMAT, "merges", r.merge = NULL);
  REFUSED(good, OSCAR_FORMAT, "\"ab\"", r.merge = "ab");
  REFUSED(good, OSCAR_FORMAT, "\" b\"", r.merge = " b");
  REFUSED(good, OSCAR_FORMAT, "\"a \"", r.merge = "a ");
  REFUSED(good, OSCAR_FORMAT, "not in the vocabulary", r.merge = "b a");
  REFUSED(good, OSCAR_FORMAT, "bos_token_id is 3", r.bos = 3);
  REFUSED(good_spm, OSCAR_FORMAT, "scores", r.n_scores = 2);
  REFUSED(good_spm, OSCAR_FORMAT, "not a number", r.last_score = NAN);
  REFUSED(good_spm, OSCAR_FORMAT, "unknown token", r.types[0] = 1);
  REFUSED(good_spm, OSCAR_FORMAT, "<0x00>", r.types[1] = 6);
  REFUSED(good_spm, OSCAR_UNSUPPORTED, "extra spaces", r.strips = true);
#undef REFUSED
  oscar_context_free(c);
}

static void marks_of_turns_are_control_tokens_whatever_the_file_says(void **state) {
  (void)state;
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 1);
  const struct recipe r = {.model = "llama",
                           .tokens = {"<unk>", "<end_of_turn>", "<b>", "a"},
                           .types = {TOKEN_UNKNOWN, TOKEN_USER_DEFINED, TOKEN_USER_DEFINED, TOKEN_NORMAL},
                           .n_types = 4,
                           .n_scores = 4};
  struct tokenizer *t;
  int32_t *ids;
  int count;
  assert_ok(c, create_from(c, &r, &t));
  assert_true(tokenizer_is_end(t, 1));
  assert_ok(c, tokenizer_encode(t, "a<end_of_turn><b>", 17, false, &ids, &count));
  const int32_t expected[] = {0, 3, 0, 2}; /* the space prefix and the mark are unknown text here */
  assert_int_equal(count, 4);
  assert_memory_equal(ids, expected, sizeof expected);
  mem_free(c, ids);
  assert_ok(c, tokenizer_encode(t, "<end_of_turn>", 13, true, &ids, &count));
  assert_int_equal(count, 1);
  assert_int_equal(ids[0], 1);
  mem_free(c, ids);
  tokenizer_free(t);
  oscar_context_free(c);
}

/* ---- failing memory ---- */

static oscar_status create_and_encode(oscar_context *c, const struct gguf *file) {
  static const char text[] = "It's 2024\xFF: e\xCC\x81 <|im_end|> <|user_def|>\n\n";
  struct tokenizer *t = NULL;
  int32_t *ids = NULL;
  int count;
  oscar_status status = tokenizer_create(c, file, &t);
  if (!status) status = tokenizer_encode(t, text, sizeof text - 1, true, &ids, &count);
  if (!status) mem_free(c, ids);
  tokenizer_free(t);
  return status;
}

static void any_allocation_may_fail(void **state) {
  (void)state;
  static const char *const names[] = {"qwen2", "smollm", "spm-gemma", "spm-inst"};
  for (size_t k = 0; k < ARRAY_LENGTH(names); k++) {
    struct scarce memory = {.left = 1000};
    struct gguf *file;
    oscar_context *c = scarce_context(&memory);
    assert_ok(c, gguf_open(c, test_data(names[k], ".tiny.gguf"), &file));
    int live = memory.live;
    oscar_status status = OSCAR_NO_MEMORY;
    int allowed = 0;
    for (; status != OSCAR_OK && allowed < 500; allowed++) {
      memory.left = allowed;
      status = create_and_encode(c, file);
      assert_true(status == OSCAR_OK || status == OSCAR_NO_MEMORY);
      assert_int_equal(memory.live, live);
    }
    assert_true(allowed > 10 && allowed < 500);
    memory.left = 1000;
    gguf_close(file);
    oscar_context_free(c);
    assert_int_equal(memory.live, 0);
  }
}

int main(int argc, char **argv) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(byte_level_ids_are_those_of_the_reference),
      cmocka_unit_test(sentencepiece_ids_are_those_of_the_reference),
      cmocka_unit_test(words_end_where_the_published_patterns_end_them),
      cmocka_unit_test(text_comes_back_as_it_was),
      cmocka_unit_test(bytes_without_a_token_are_left_out),
      cmocka_unit_test(control_tokens_have_no_text_unless_asked_for),
      cmocka_unit_test(a_long_text_without_a_break_takes_seconds_at_most),
      cmocka_unit_test(wrong_files_are_refused_with_the_reason),
      cmocka_unit_test(marks_of_turns_are_control_tokens_whatever_the_file_says),
      cmocka_unit_test(any_allocation_may_fail),
  };
  const struct CMUnitTest larger[] = {cmocka_unit_test(ids_of_larger_models_are_those_of_the_reference)};
  if (test_larger(argc, argv)) return cmocka_run_group_tests(larger, NULL, NULL);
  return cmocka_run_group_tests(tests, NULL, NULL);
}
