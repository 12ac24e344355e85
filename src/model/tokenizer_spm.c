/*
 * tokenizer_spm.c - SentencePiece BPE: characters are the first symbols, and the pair whose concatenation is the token with the
 * highest score merges first (the leftmost of equals). What no token spells becomes its bytes' tokens, or the unknown token.
 *
 * SentencePiece writes a space as U+2581; so that a piece is the text it stands for, both are kept as a space here.
 * User-defined tokens are cut out first, the longest at each place, and never merge. Tokens of type "unused" never come out.
 *
 * SentencePiece merges over a whole text at once. Here the text is cut where no token has the two bytes on either side of the
 * cut in succession: no merge can cross such a place, so the result is the same and the pieces are short (words, as a rule).
 *
 * Source of the rules: github.com/google/sentencepiece, bpe_model.cc and normalizer.cc (identity normalization).
 */
#include "model/tokenizer_impl.h"

#include <string.h>

#define SPACE_MARK      "\xE2\x96\x81" /* U+2581 */
#define BAD_CHARACTER   "\xEF\xBF\xBD" /* U+FFFD */
#define MERGEABLE(type) ((type) == TOKEN_NORMAL || (type) == TOKEN_USER_DEFINED)

struct sentencepiece {
  const struct vocabulary *vocabulary; /* the tokenizer's */
  uint32_t *priority;                  /* [vocab] descending with the score */
  struct token_trie user_defined;
  int32_t byte_id[256];
  bool has_bytes;
  uint8_t adjacent[256][32]; /* bit b of row a: some token has byte b right after byte a */
};

/* ---- loading ---- */

/* Copies with U+2581 as a space. Returns the bytes written. */
static size_t copy_with_spaces(const char *text, size_t bytes, char *out) {
  size_t written = 0;
  for (size_t at = 0; at < bytes;) {
    if (bytes - at >= 3 && memcmp(text + at, SPACE_MARK, 3) == 0) {
      out[written++] = ' ';
      at += 3;
    } else {
      out[written++] = text[at++];
    }
  }
  return written;
}

static int hex_digit(char c) { return c >= '0' && c <= '9' ? c - '0' : c >= 'A' && c <= 'F' ? c - 'A' + 10 : -1; }

/* The byte that "<0xHH>" names, or -1. */
static int read_byte_name(struct gguf_string s) {
  if (s.bytes != 6 || memcmp(s.text, "<0x", 3) != 0 || s.text[5] != '>') return -1;
  int high = hex_digit(s.text[3]), low = hex_digit(s.text[4]);
  return high < 0 || low < 0 ? -1 : high * 16 + low;
}

static oscar_status read_pieces(struct tokenizer *t, const struct gguf *file) {
  struct sentencepiece *p = t->state;
  struct vocabulary *v = &t->vocabulary;
  uint32_t at = 0;
  int bytes_found = 0;
  memset(p->byte_id, 0xFF, sizeof p->byte_id);
  for (int32_t id = 0; id < v->size; id++) {
    struct gguf_string s = gguf_array_string(file, "tokenizer.ggml.tokens", id);
    v->offset[id] = at;
    if (v->type[id] == TOKEN_BYTE) {
      int byte = read_byte_name(s);
      if (byte < 0)
        return set_error(t->context, OSCAR_FORMAT, "%s: token %d is of type byte but spelled \"%.*s\", not <0x00> to <0xFF>",
                         gguf_path(file), id, (int)(s.bytes < 80 ? s.bytes : 80), s.text);
      bytes_found += p->byte_id[byte] < 0;
      p->byte_id[byte] = id;
      v->text[at++] = (char)byte;
    } else {
      at += (uint32_t)copy_with_spaces(s.text, s.bytes, v->text + at);
    }
  }
  v->offset[v->size] = at;
  p->has_bytes = bytes_found == 256;
  if (!p->has_bytes && t->unknown < 0)
    return set_error(t->context, OSCAR_FORMAT,
                     "%s: the vocabulary has neither a token for each byte nor an unknown token, so some text has no tokens",
                     gguf_path(file));
  return OSCAR_OK;
}

static void index_pieces(struct tokenizer *t) {
  struct sentencepiece *p = t->state;
  struct vocabulary *v = &t->vocabulary;
  for (int32_t id = 0; id < v->size; id++) {
    if (!MERGEABLE(v->type[id])) continue;
    vocabulary_index(v, id);
    size_t bytes;
    const uint8_t *piece = (const uint8_t *)vocabulary_piece(v, id, &bytes);
    for (size_t i = 1; i < bytes; i++) p->adjacent[piece[i - 1]][piece[i] / 8] |= (uint8_t)(1u << piece[i] % 8);
  }
}

/* Unsigned numbers in the opposite order of the floats. */
static uint32_t descending(float score) {
  uint32_t bits;
  memcpy(&bits, &score, sizeof bits);
  return bits >> 31 ? bits : 0x7FFFFFFFu - bits;
}

static oscar_status read_scores(struct tokenizer *t, const struct gguf *file) {
  struct sentencepiece *p = t->state;
  int64_t count;
  const uint8_t *scores = gguf_array_data(file, "tokenizer.ggml.scores", GGUF_FLOAT32, &count);
  if (!scores || count != t->vocabulary.size)
    return set_error(t->context, OSCAR_FORMAT, "%s: tokenizer.ggml.scores does not have one float for each of the %d tokens",
                     gguf_path(file), t->vocabulary.size);
  p->priority = mem_alloc(t->context, (size_t)count, sizeof *p->priority);
  if (!p->priority) return OSCAR_NO_MEMORY;
  for (int64_t i = 0; i < count; i++) {
    float score;
    memcpy(&score, scores + 4 * i, sizeof score);
    if (score != score)
      return set_error(t->context, OSCAR_FORMAT, "%s: the score of token %lld is not a number", gguf_path(file), (long long)i);
    p->priority[i] = descending(score + 0.0f); /* + 0: a negative zero is a zero */
  }
  return OSCAR_OK;
}

/* Normalizations other than the identity are not written here; a file that asks for one must not be read as if it did not. */
static oscar_status check_normalization(struct tokenizer *t, const struct gguf *file) {
  bool strips = false;
  if (gguf_get_bool(file, "tokenizer.ggml.remove_extra_whitespaces", &strips) && strips)
    return set_error(t->context, OSCAR_UNSUPPORTED,
                     "%s: the tokenizer removes extra spaces (tokenizer.ggml.remove_extra_whitespaces), which is not supported",
                     gguf_path(file));
  if (gguf_array_count(file, "tokenizer.ggml.precompiled_charsmap", GGUF_UINT8) > 0 ||
      gguf_array_count(file, "tokenizer.ggml.precompiled_charsmap", GGUF_INT8) > 0)
    return set_error(
        t->context, OSCAR_UNSUPPORTED,
        "%s: the tokenizer normalizes text by a table of its own (tokenizer.ggml.precompiled_charsmap), which is not "
        "supported",
        gguf_path(file));
  return OSCAR_OK;
}

static oscar_status sentencepiece_load(struct tokenizer *t, const struct gguf *file) {
  struct sentencepiece *p = mem_zalloc(t->context, 1, sizeof *p);
  if (!p) return OSCAR_NO_MEMORY;
  t->state = p;
  p->vocabulary = &t->vocabulary;
  t->adds_bos = true;
  t->space_prefix = true;
  gguf_get_bool(file, "tokenizer.ggml.add_space_prefix", &t->space_prefix);
  for (int32_t id = 0; id < t->vocabulary.size && t->unknown < 0; id++)
    if (t->vocabulary.type[id] == TOKEN_UNKNOWN) t->unknown = id;
  oscar_status status = check_normalization(t, file);
  if (!status) status = read_pieces(t, file);
  if (!status) status = read_scores(t, file);
  if (status) return status;
  index_pieces(t);
  /* User-defined tokens are found after the space prefix is there, so by this kind itself. */
  return token_trie_create(t->context, &t->vocabulary, 1u << TOKEN_USER_DEFINED, &p->user_defined) ||
                 token_trie_create(t->context, &t->vocabulary, 0, &t->always) ||
                 token_trie_create(t->context, &t->vocabulary, 1u << TOKEN_CONTROL, &t->special)
             ? OSCAR_NO_MEMORY
             : OSCAR_OK;
}

static void sentencepiece_free(struct tokenizer *t) {
  struct sentencepiece *p = t->state;
  if (!p) return;
  mem_free(t->context, p->priority);
  token_trie_free(t->context, &p->user_defined);
  mem_free(t->context, p);
}

/* ---- encoding ---- */

/* The text with U+2581 as a space, bad bytes as U+FFFD and the prefix; allocated. */
static oscar_status canonical(oscar_context *context, const char *text, size_t bytes, bool space_prefix, char **out,
                              size_t *out_bytes) {
  char *to = *out = mem_alloc(context, 3 * bytes + 1, 1);
  if (!to) return OSCAR_NO_MEMORY;
  if (space_prefix && bytes > 0) *to++ = ' ';
  for (size_t at = 0; at < bytes;) {
    size_t length = utf8_character(text + at, bytes - at);
    if (length == 0) {
      memcpy(to, BAD_CHARACTER, 3);
      to += 3;
      at++;
    } else if (length == 3 && memcmp(text + at, SPACE_MARK, 3) == 0) {
      *to++ = ' ';
      at += 3;
    } else {
      memcpy(to, text + at, length);
      to += length;
      at += length;
    }
  }
  *out_bytes = (size_t)(to - *out);
  return OSCAR_OK;
}

static bool score_rule(const void *rules, const char *text, const struct merge_symbol *left, const struct merge_symbol *right,
                       uint32_t *priority, int32_t *id) {
  const struct sentencepiece *p = rules;
  *id = vocabulary_find(p->vocabulary, text + left->start, (size_t)left->bytes + right->bytes);
  if (*id < 0) return false;
  *priority = p->priority[*id];
  return true;
}

/* A symbol that is no token: its bytes' tokens, or one unknown token for a run of such symbols. */
static oscar_status emit_unknown(const struct tokenizer *t, const char *text, size_t bytes, bool after_unknown,
                                 struct id_list *list) {
  const struct sentencepiece *p = t->state;
  if (!p->has_bytes) return after_unknown ? OSCAR_OK : id_list_add(t->context, list, t->unknown);
  if (bytes == 1 && text[0] == ' ') {
    text = SPACE_MARK;
    bytes = 3;
  }
  oscar_status status = OSCAR_OK;
  for (size_t i = 0; i < bytes && !status; i++) status = id_list_add(t->context, list, p->byte_id[(uint8_t)text[i]]);
  return status;
}

static bool can_cross(const struct sentencepiece *p, uint8_t left, uint8_t right) {
  return p->adjacent[left][right / 8] >> right % 8 & 1;
}

/* The next symbol at text[at]: a user-defined token or one character. Returns its bytes. */
static size_t next_symbol(const struct tokenizer *t, const char *text, size_t bytes, size_t at, int32_t *id, bool *frozen) {
  const struct sentencepiece *p = t->state;
  size_t length;
  *id = token_trie_match(&p->user_defined, text + at, bytes - at, &length);
  *frozen = *id >= 0;
  if (*frozen) return length;
  length = utf8_character(text + at, bytes - at);
  *id = vocabulary_find(p->vocabulary, text + at, length);
  return length;
}

static oscar_status encode_canonical(const struct tokenizer *t, const char *text, size_t bytes, struct id_list *list) {
  struct merge_work work = {0};
  oscar_status status = OSCAR_OK;
  bool after_unknown = false;
  for (size_t at = 0; at < bytes && !status;) {
    size_t end = at + 1;
    while (end < bytes && can_cross(t->state, (uint8_t)text[end - 1], (uint8_t)text[end])) end++;
    while (end < bytes && ((uint8_t)text[end] & 0xC0) == 0x80) end++; /* a character without a token is not cut */
    status = merge_begin(t->context, &work, end - at);
    if (status) break;
    while (at < end) { /* a user-defined token may reach beyond the cut: nothing merges with it */
      int32_t id;
      bool frozen;
      size_t length = next_symbol(t, text, bytes, at, &id, &frozen);
      merge_add(&work, at, length, id, frozen);
      at += length;
    }
    merge_run(&work, text, score_rule, t->state);
    for (int32_t i = 0; i >= 0 && !status; i = work.symbols[i].next) {
      const struct merge_symbol *s = &work.symbols[i];
      status =
          s->id >= 0 ? id_list_add(t->context, list, s->id) : emit_unknown(t, text + s->start, s->bytes, after_unknown, list);
      after_unknown = s->id < 0;
    }
  }
  merge_free(t->context, &work);
  return status;
}

static oscar_status sentencepiece_encode(const struct tokenizer *t, const char *text, size_t bytes, bool space_prefix,
                                         struct id_list *list) {
  char *clean = NULL;
  size_t clean_bytes = 0;
  oscar_status status = canonical(t->context, text, bytes, space_prefix, &clean, &clean_bytes);
  if (!status) status = encode_canonical(t, clean, clean_bytes, list);
  mem_free(t->context, clean);
  return status;
}

const struct tokenizer_kind tokenizer_sentencepiece = {sentencepiece_load, sentencepiece_free, sentencepiece_encode};
