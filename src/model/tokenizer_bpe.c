/*
 * tokenizer_bpe.c - byte-level BPE, as GPT-2 began it: text is cut into words, a word's bytes are the first symbols, and pairs
 * are merged in the order of the model's merge list.
 *
 * Files spell a token's bytes as printable characters (33-126, 161-172, 174-255 stand for themselves, the other bytes for
 * U+0100 and up, in order); here pieces are kept as the bytes they mean. A byte that has no token of its own (SmolLM2 lacks 21,
 * most of them impossible in UTF-8) is left out, as the reference does.
 */
#include "model/tokenizer_impl.h"

#include <string.h>

struct merge_entry {
  uint64_t pair; /* left id << 32 | right id */
  uint32_t rank;
  int32_t id; /* -1: free */
};

struct byte_level {
  struct splitter *splitter;
  struct merge_entry *merges;
  uint32_t mask;
  int32_t byte_id[256]; /* -1: none */
};

/* ---- spelling ---- */

#define SPELLED_POINTS 324 /* 256 + the 68 bytes that are not spelled as themselves */

/* byte_of[code point] is the byte it spells, or -1. */
static void spelling_table(int16_t byte_of[SPELLED_POINTS]) {
  int next = 256;
  for (int i = 0; i < SPELLED_POINTS; i++) byte_of[i] = -1;
  for (int b = 0; b < 256; b++) {
    bool itself = (b >= 33 && b <= 126) || (b >= 161 && b != 173);
    byte_of[itself ? b : next++] = (int16_t)b;
  }
}

/* The bytes a spelling means; a spelling with other characters in it means itself. Returns the bytes written to out, which has
 * room for spelling.bytes. */
static size_t read_spelling(const int16_t byte_of[SPELLED_POINTS], struct gguf_string spelling, char *out) {
  size_t written = 0;
  for (size_t at = 0; at < spelling.bytes;) {
    size_t length = utf8_character(spelling.text + at, spelling.bytes - at);
    uint32_t point = length > 0 ? utf8_code_point(spelling.text + at, length) : UINT32_MAX;
    if (point >= SPELLED_POINTS || byte_of[point] < 0) {
      memcpy(out, spelling.text, spelling.bytes);
      return spelling.bytes;
    }
    out[written++] = (char)byte_of[point];
    at += length;
  }
  return written;
}

static void decode_pieces(struct vocabulary *v, const struct gguf *file, const int16_t byte_of[SPELLED_POINTS]) {
  uint32_t at = 0;
  for (int32_t id = 0; id < v->size; id++) {
    struct gguf_string s = gguf_array_string(file, "tokenizer.ggml.tokens", id);
    v->offset[id] = at;
    if (v->type[id] == TOKEN_NORMAL) {
      at += (uint32_t)read_spelling(byte_of, s, v->text + at);
    } else {
      memcpy(v->text + at, s.text, s.bytes);
      at += (uint32_t)s.bytes;
    }
  }
  v->offset[v->size] = at;
  for (int32_t id = 0; id < v->size; id++)
    if (v->type[id] == TOKEN_NORMAL) vocabulary_index(v, id);
  for (int32_t id = 0; id < v->size; id++) /* some vocabularies mark products of merges as user-defined */
    if (v->type[id] == TOKEN_USER_DEFINED) vocabulary_index(v, id);
}

/* ---- merges ---- */

static struct merge_entry *merge_slot(const struct byte_level *b, uint64_t pair) {
  uint64_t h = pair * 0x9E3779B97F4A7C15u;
  uint32_t i = (uint32_t)(h >> 32) & b->mask;
  while (b->merges[i].id >= 0 && b->merges[i].pair != pair) i = (i + 1) & b->mask;
  return &b->merges[i];
}

static uint64_t pair_of(int32_t left, int32_t right) { return (uint64_t)(uint32_t)left << 32 | (uint32_t)right; }

static oscar_status read_merge(struct tokenizer *t, const struct gguf *file, const int16_t byte_of[SPELLED_POINTS], int64_t rank,
                               char *scratch) {
  const struct byte_level *b = t->state;
  struct gguf_string s = gguf_array_string(file, "tokenizer.ggml.merges", rank);
  const char *space = s.bytes > 2 ? memchr(s.text + 1, ' ', s.bytes - 2) : NULL;
  int shown = (int)(s.bytes < 80 ? s.bytes : 80);
  if (!space)
    return set_error(t->context, OSCAR_FORMAT, "merge %lld (\"%.*s\") is not two tokens with a space between", (long long)rank,
                     shown, s.text);
  size_t left_bytes = (size_t)(space - s.text);
  size_t left = read_spelling(byte_of, (struct gguf_string){s.text, left_bytes}, scratch);
  size_t both = left + read_spelling(byte_of, (struct gguf_string){space + 1, s.bytes - left_bytes - 1}, scratch + left);
  int32_t left_id = vocabulary_find(&t->vocabulary, scratch, left);
  int32_t right_id = vocabulary_find(&t->vocabulary, scratch + left, both - left);
  int32_t id = vocabulary_find(&t->vocabulary, scratch, both);
  if (left_id < 0 || right_id < 0 || id < 0)
    return set_error(t->context, OSCAR_FORMAT, "merge %lld (\"%.*s\") names a token that is not in the vocabulary",
                     (long long)rank, shown, s.text);
  *merge_slot(b, pair_of(left_id, right_id)) = (struct merge_entry){pair_of(left_id, right_id), (uint32_t)rank, id};
  return OSCAR_OK;
}

static oscar_status read_merges(struct tokenizer *t, const struct gguf *file, const int16_t byte_of[SPELLED_POINTS]) {
  struct byte_level *b = t->state;
  int64_t count = gguf_array_count(file, "tokenizer.ggml.merges", GGUF_STRING);
  if (count < 0 || count > (int64_t)1 << 28)
    return set_error(t->context, OSCAR_FORMAT, "%s: tokenizer.ggml.merges is not an array of strings of a sensible length",
                     gguf_path(file));
  uint32_t slots = 64;
  while (slots < 2 * (uint64_t)count) slots *= 2;
  b->mask = slots - 1;
  b->merges = mem_alloc(t->context, slots, sizeof *b->merges);
  if (!b->merges) return OSCAR_NO_MEMORY;
  memset(b->merges, 0xFF, slots * sizeof *b->merges);
  size_t longest = 0;
  for (int64_t i = 0; i < count; i++) {
    size_t bytes = gguf_array_string(file, "tokenizer.ggml.merges", i).bytes;
    if (bytes > longest) longest = bytes;
  }
  char *scratch = mem_alloc(t->context, longest, 1);
  if (!scratch) return OSCAR_NO_MEMORY;
  oscar_status status = OSCAR_OK;
  for (int64_t i = 0; i < count && !status; i++) status = read_merge(t, file, byte_of, i, scratch);
  mem_free(t->context, scratch);
  return status ? prefix_error(t->context, status, "%s", gguf_path(file)) : OSCAR_OK;
}

/* ---- kind ---- */

static oscar_status byte_level_load(struct tokenizer *t, const struct gguf *file) {
  struct byte_level *b = mem_zalloc(t->context, 1, sizeof *b);
  if (!b) return OSCAR_NO_MEMORY;
  t->state = b;
  struct gguf_string pre;
  if (!gguf_get_string(file, "tokenizer.ggml.pre", &pre))
    return set_error(
        t->context, OSCAR_UNSUPPORTED,
        "%s does not say how text is cut into words (tokenizer.ggml.pre is missing); convert it again with a current "
        "converter",
        gguf_path(file));
  oscar_status status = splitter_create(t->context, pre, &b->splitter);
  if (status) return prefix_error(t->context, status, "%s", gguf_path(file));
  int16_t byte_of[SPELLED_POINTS];
  spelling_table(byte_of);
  decode_pieces(&t->vocabulary, file, byte_of);
  for (int byte = 0; byte < 256; byte++) {
    char c = (char)byte;
    b->byte_id[byte] = vocabulary_find(&t->vocabulary, &c, 1);
  }
  status = read_merges(t, file, byte_of);
  if (status) return status;
  t->adds_bos = splitter_wants_bos(b->splitter);
  return token_trie_create(t->context, &t->vocabulary, 1u << TOKEN_USER_DEFINED, &t->always) ||
                 token_trie_create(t->context, &t->vocabulary, 1u << TOKEN_USER_DEFINED | 1u << TOKEN_CONTROL, &t->special)
             ? OSCAR_NO_MEMORY
             : OSCAR_OK;
}

static void byte_level_free(struct tokenizer *t) {
  struct byte_level *b = t->state;
  if (!b) return;
  splitter_free(b->splitter);
  mem_free(t->context, b->merges);
  mem_free(t->context, b);
}

static bool pair_rule(const void *rules, const char *text, const struct merge_symbol *left, const struct merge_symbol *right,
                      uint32_t *priority, int32_t *id) {
  (void)text;
  const struct merge_entry *entry = merge_slot(rules, pair_of(left->id, right->id));
  *priority = entry->rank;
  *id = entry->id;
  return entry->id >= 0;
}

static oscar_status encode_word(const struct tokenizer *t, const char *word, size_t bytes, struct merge_work *work,
                                struct id_list *list) {
  const struct byte_level *b = t->state;
  if (splitter_takes_whole_words(b->splitter)) {
    int32_t id = vocabulary_find(&t->vocabulary, word, bytes);
    if (id >= 0) return id_list_add(t->context, list, id);
  }
  oscar_status status = merge_begin(t->context, work, bytes);
  if (status) return status;
  for (size_t i = 0; i < bytes; i++) {
    int32_t id = b->byte_id[(uint8_t)word[i]];
    if (id >= 0) merge_add(work, i, 1, id, false);
  }
  merge_run(work, word, pair_rule, b);
  for (int32_t i = work->count > 0 ? 0 : -1; i >= 0 && !status; i = work->symbols[i].next)
    status = id_list_add(t->context, list, work->symbols[i].id);
  return status;
}

static oscar_status byte_level_encode(const struct tokenizer *t, const char *text, size_t bytes, bool space_prefix,
                                      struct id_list *list) {
  (void)space_prefix;
  const struct byte_level *b = t->state;
  char *composed = NULL;
  struct split_pass pass = {0};
  struct merge_work work = {0};
  oscar_status status = OSCAR_OK;
  if (splitter_composes(b->splitter)) status = text_compose(t->context, text, bytes, &composed, &bytes);
  if (composed) text = composed;
  if (!status) status = split_begin(b->splitter, text, bytes, &pass);
  for (size_t start, end; !status;) {
    status = split_next(&pass, &start, &end);
    if (status || start == end) break;
    status = encode_word(t, text + start, end - start, &work, list);
  }
  split_end(&pass);
  merge_free(t->context, &work);
  mem_free(t->context, composed);
  return status;
}

const struct tokenizer_kind tokenizer_byte_level = {byte_level_load, byte_level_free, byte_level_encode};
