/*
 * tokenizer.c - a model's tokenizer: reading what both kinds share, cutting out the marked tokens, and ids back to bytes.
 *
 * Text is searched for marked tokens first (the leftmost, and of those the longest): user-defined ones always, control tokens
 * only where the caller says that they count. What is between them goes to the kind's own encoder. A control token can therefore
 * not come out of text that was not allowed to hold one: encoders emit normal, user-defined, byte and unknown tokens only.
 */
#include "model/tokenizer_impl.h"

#include <string.h>

/* ---- loading ---- */

/* Some files call the marks of turns "user-defined", which would let any text hold them. */
static bool marks_turns(struct gguf_string s) {
  static const char *const marks[] = {
      "<|im_start|>",    "<|im_end|>",    "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
      "<start_of_turn>", "<end_of_turn>", "<|begin_of_text|>",   "<|end_of_text|>",   "[INST]",
      "[/INST]"};
  for (size_t i = 0; i < ARRAY_LENGTH(marks); i++)
    if (s.bytes == strlen(marks[i]) && memcmp(s.text, marks[i], s.bytes) == 0) return true;
  return false;
}

static oscar_status read_vocabulary(struct tokenizer *t, const struct gguf *file) {
  const char *path = gguf_path(file);
  int64_t count = gguf_array_count(file, "tokenizer.ggml.tokens", GGUF_STRING), types = 0;
  if (count < 1 || count > (int64_t)1 << 28)
    return set_error(t->context, OSCAR_FORMAT, "%s: tokenizer.ggml.tokens is not an array of strings of a sensible length", path);
  const uint8_t *type = gguf_array_data(file, "tokenizer.ggml.token_type", GGUF_INT32, &types);
  if (!type || types != count)
    return set_error(t->context, OSCAR_FORMAT,
                     "%s: tokenizer.ggml.token_type does not have one integer for each of the %lld tokens", path,
                     (long long)count);
  uint64_t bytes = 0;
  for (int64_t i = 0; i < count; i++) bytes += gguf_array_string(file, "tokenizer.ggml.tokens", i).bytes;
  if (bytes > UINT32_MAX)
    return set_error(t->context, OSCAR_FORMAT, "%s: the tokens take %llu bytes; at most 4 GiB are expected", path,
                     (unsigned long long)bytes);
  oscar_status status = vocabulary_create(t->context, (int32_t)count, (size_t)bytes, &t->vocabulary);
  if (status) return status;
  for (int64_t i = 0; i < count; i++) {
    int32_t x;
    memcpy(&x, type + 4 * i, sizeof x);
    if (x < TOKEN_NORMAL || x > TOKEN_BYTE)
      return set_error(t->context, OSCAR_FORMAT, "%s: token %lld has type %d; 1 to 6 are known", path, (long long)i, x);
    if (x == TOKEN_USER_DEFINED && marks_turns(gguf_array_string(file, "tokenizer.ggml.tokens", i))) x = TOKEN_CONTROL;
    t->vocabulary.type[i] = (uint8_t)x;
  }
  return OSCAR_OK;
}

static oscar_status read_id(const struct tokenizer *t, const struct gguf *file, const char *key, int32_t *id) {
  int64_t value;
  *id = -1;
  if (!gguf_get_i64(file, key, &value)) return OSCAR_OK;
  if (value < 0 || value >= t->vocabulary.size)
    return set_error(t->context, OSCAR_FORMAT, "%s: %s is %lld, but ids go from 0 to %d", gguf_path(file), key, (long long)value,
                     t->vocabulary.size - 1);
  *id = (int32_t)value;
  return OSCAR_OK;
}

static oscar_status read_special_ids(struct tokenizer *t, const struct gguf *file) {
  int32_t eot, eom;
  oscar_status status = read_id(t, file, "tokenizer.ggml.bos_token_id", &t->bos);
  if (!status) status = read_id(t, file, "tokenizer.ggml.eos_token_id", &t->eos);
  if (!status) status = read_id(t, file, "tokenizer.ggml.unknown_token_id", &t->unknown);
  if (!status) status = read_id(t, file, "tokenizer.ggml.eot_token_id", &eot);
  if (!status) status = read_id(t, file, "tokenizer.ggml.eom_token_id", &eom);
  if (status) return status;
  t->is_end = mem_zalloc(t->context, (size_t)t->vocabulary.size, 1);
  if (!t->is_end) return OSCAR_NO_MEMORY;
  if (t->eos >= 0) t->is_end[t->eos] = 1;
  if (eot >= 0) t->is_end[eot] = 1;
  if (eom >= 0) t->is_end[eom] = 1;
  return OSCAR_OK;
}

/* Models end a turn with other tokens than the one that a file names as its end of text; these are the published spellings. */
static void mark_ends(struct tokenizer *t) {
  static const char *const spellings[] = {
      "<|endoftext|>", "<|im_end|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>",    "<end_of_turn>", "<eos>",
      "</s>",          "<|end|>",    "<|eot|>",         "<|return|>", "<|endofturn|>", "<EOT>"};
  for (size_t i = 0; i < ARRAY_LENGTH(spellings); i++) {
    size_t bytes = strlen(spellings[i]), length = 0;
    int32_t id = token_trie_match(&t->special, spellings[i], bytes, &length);
    if (id >= 0 && length == bytes && t->vocabulary.type[id] == TOKEN_CONTROL) t->is_end[id] = 1;
  }
}

oscar_status tokenizer_create(oscar_context *context, const struct gguf *file, struct tokenizer **tokenizer) {
  struct gguf_string model;
  if (!gguf_get_string(file, "tokenizer.ggml.model", &model))
    return set_error(context, OSCAR_FORMAT, "%s has no tokenizer (tokenizer.ggml.model is missing)", gguf_path(file));
  const struct tokenizer_kind *kind = NULL;
  if (model.bytes == 4 && memcmp(model.text, "gpt2", 4) == 0) kind = &tokenizer_byte_level;
  if (model.bytes == 5 && memcmp(model.text, "llama", 5) == 0) kind = &tokenizer_sentencepiece;
  if (!kind)
    return set_error(context, OSCAR_UNSUPPORTED,
                     "%s: tokenizer \"%.*s\" (tokenizer.ggml.model) is not supported; gpt2 and llama are", gguf_path(file),
                     (int)(model.bytes < 64 ? model.bytes : 64), model.text);
  struct tokenizer *t = mem_zalloc(context, 1, sizeof *t);
  if (!t) return OSCAR_NO_MEMORY;
  t->context = context;
  t->kind = kind;
  oscar_status status = read_vocabulary(t, file);
  if (!status) status = read_special_ids(t, file);
  if (!status) status = kind->load(t, file);
  if (status) {
    tokenizer_free(t);
    return status;
  }
  gguf_get_bool(file, "tokenizer.ggml.add_bos_token", &t->adds_bos);
  if (t->bos < 0) t->adds_bos = false;
  mark_ends(t);
  *tokenizer = t;
  return OSCAR_OK;
}

void tokenizer_free(struct tokenizer *tokenizer) {
  if (!tokenizer) return;
  tokenizer->kind->free(tokenizer);
  token_trie_free(tokenizer->context, &tokenizer->always);
  token_trie_free(tokenizer->context, &tokenizer->special);
  vocabulary_free(tokenizer->context, &tokenizer->vocabulary);
  mem_free(tokenizer->context, tokenizer->is_end);
  mem_free(tokenizer->context, tokenizer);
}

/* ---- asking ---- */

int tokenizer_vocab(const struct tokenizer *tokenizer) { return tokenizer->vocabulary.size; }
int32_t tokenizer_bos(const struct tokenizer *tokenizer) { return tokenizer->bos; }
int32_t tokenizer_eos(const struct tokenizer *tokenizer) { return tokenizer->eos; }
bool tokenizer_adds_bos(const struct tokenizer *tokenizer) { return tokenizer->adds_bos; }

static bool in_vocabulary(const struct tokenizer *t, int32_t id) { return id >= 0 && id < t->vocabulary.size; }

bool tokenizer_is_end(const struct tokenizer *tokenizer, int32_t id) {
  return in_vocabulary(tokenizer, id) && tokenizer->is_end[id];
}

int32_t tokenizer_find(const struct tokenizer *tokenizer, const char *spelling) {
  size_t bytes = strlen(spelling), length = 0;
  if (bytes == 0) return -1;
  int32_t id = token_trie_match(&tokenizer->special, spelling, bytes, &length);
  return id >= 0 && length == bytes ? id : vocabulary_find(&tokenizer->vocabulary, spelling, bytes);
}

const char *tokenizer_piece(const struct tokenizer *tokenizer, int32_t id, bool special, size_t *bytes) {
  *bytes = 0;
  if (!in_vocabulary(tokenizer, id)) return "";
  uint8_t type = tokenizer->vocabulary.type[id];
  if (!special && (type == TOKEN_CONTROL || type == TOKEN_UNKNOWN)) return "";
  return vocabulary_piece(&tokenizer->vocabulary, id, bytes);
}

/* ---- encoding ---- */

/* Cuts the tokens of `marks` out of the text and encodes what is between them. */
static oscar_status append(const struct tokenizer *t, const struct token_trie *marks, const char *text, size_t bytes,
                           bool space_prefix, struct id_list *list) {
  if (bytes > TEXT_BYTES_MAX)
    return set_error(t->context, OSCAR_INVALID_ARGUMENT,
                     "a text of %zu bytes is too long to encode at once; at most %zu are possible", bytes, TEXT_BYTES_MAX);
  oscar_status status = OSCAR_OK;
  size_t start = 0;
  for (size_t at = 0; at <= bytes && !status;) {
    size_t length = 0;
    int32_t id = at < bytes ? token_trie_match(marks, text + at, bytes - at, &length) : -1;
    if (id < 0 && at < bytes) {
      at++;
      continue;
    }
    if (at > start) status = t->kind->encode(t, text + start, at - start, space_prefix, list);
    if (!status && id >= 0) status = id_list_add(t->context, list, id);
    at += at < bytes ? length : 1;
    start = at;
  }
  return status;
}

oscar_status tokenizer_append_text(const struct tokenizer *tokenizer, const char *text, size_t bytes, bool space_prefix,
                                   struct id_list *list) {
  return append(tokenizer, &tokenizer->always, text, bytes, space_prefix, list);
}

oscar_status tokenizer_encode(const struct tokenizer *tokenizer, const char *text, size_t bytes, bool parse_special,
                              int32_t **ids, int *count) {
  struct id_list list = {0};
  oscar_status status =
      append(tokenizer, parse_special ? &tokenizer->special : &tokenizer->always, text, bytes, tokenizer->space_prefix, &list);
  if (!status && !list.ids) { /* no tokens are still an allocated list */
    list.ids = mem_alloc(tokenizer->context, 1, sizeof *list.ids);
    if (!list.ids) status = OSCAR_NO_MEMORY;
  }
  if (status) {
    mem_free(tokenizer->context, list.ids);
    return status;
  }
  *ids = list.ids;
  *count = (int)list.count;
  return OSCAR_OK;
}
