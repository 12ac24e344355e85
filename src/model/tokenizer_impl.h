/*
 * model/tokenizer_impl.h - what the files of the tokenizer share. Private to model/tokenizer*.c and chat_template.c.
 */
#ifndef OSCAR_TOKENIZER_IMPL_H
#define OSCAR_TOKENIZER_IMPL_H

#include "model/tokenizer.h"

/* tokenizer.ggml.token_type, numbered as in sentencepiece_model.proto */
enum token_type { TOKEN_NORMAL = 1, TOKEN_UNKNOWN, TOKEN_CONTROL, TOKEN_USER_DEFINED, TOKEN_UNUSED, TOKEN_BYTE };

#define TEXT_BYTES_MAX ((size_t)1 << 29) /* offsets inside a text are 32 bits, and one bad byte may become three */

/* ---- growing lists ---- */
struct id_list {
  int32_t *ids;
  size_t count, capacity;
};
oscar_status id_list_add(oscar_context *context, struct id_list *list, int32_t id);

/* ---- UTF-8 ---- */
/* Bytes of the well-formed character at text[0] (no surrogates, no overlong forms), or 0 if there is none. bytes > 0. */
size_t utf8_character(const char *text, size_t bytes);
uint32_t utf8_code_point(const char *text, size_t bytes); /* of a well-formed character of so many bytes */
size_t utf8_write(uint32_t code_point, char out[4]);

/* Normalization form C of the well-formed parts; bad bytes stay where they are. *out is NULL if the text is in that form anyway
 * (always so below U+0300); else allocated, owned by the caller. */
oscar_status text_compose(oscar_context *context, const char *text, size_t bytes, char **out, size_t *out_bytes);

/* ---- the vocabulary: bytes and type of every token, and ids by bytes ---- */
struct vocabulary_slot {
  uint32_t hash;
  int32_t id; /* -1: free */
};
struct vocabulary {
  int32_t size;
  char *text;       /* all pieces after one another */
  uint32_t *offset; /* [size + 1] */
  uint8_t *type;
  struct vocabulary_slot *slots;
  uint32_t mask;
};
/* Reserves room for `size` tokens of text_bytes in all; pieces are then added in order. */
oscar_status vocabulary_create(oscar_context *context, int32_t size, size_t text_bytes, struct vocabulary *vocabulary);
void vocabulary_free(oscar_context *context, struct vocabulary *vocabulary);
/* Makes `id` findable by its bytes; of two with the same bytes the first stays. */
void vocabulary_index(struct vocabulary *vocabulary, int32_t id);
int32_t vocabulary_find(const struct vocabulary *vocabulary, const char *text, size_t bytes); /* -1: none */
static inline const char *vocabulary_piece(const struct vocabulary *v, int32_t id, size_t *bytes) {
  *bytes = v->offset[id + 1] - v->offset[id];
  return v->text + v->offset[id];
}

/* ---- tokens looked for inside text: the longest at the leftmost place ---- */
struct trie_node {
  int32_t child, sibling, id; /* 0 none, 0 none, -1 none */
  uint8_t byte;
};
struct token_trie {
  struct trie_node *nodes; /* nodes[1 + b] start the spellings whose first byte is b */
  int32_t count, capacity;
};
/* A trie of the tokens whose type is in `types` (bits 1 << type); empty spellings are left out. */
oscar_status token_trie_create(oscar_context *context, const struct vocabulary *vocabulary, unsigned types,
                               struct token_trie *trie);
void token_trie_free(oscar_context *context, struct token_trie *trie);
/* The longest token that text starts with: its id, its length in *bytes; or -1. */
int32_t token_trie_match(const struct token_trie *trie, const char *text, size_t left, size_t *bytes);

/* ---- pair merging, shared by both kinds of BPE ---- */
struct merge_symbol {
  uint32_t start, bytes; /* bytes == 0: merged into its left neighbour */
  int32_t id;
  int32_t previous, next; /* -1 at the ends */
  bool frozen;            /* never merges */
};
struct merge_candidate {
  uint64_t order; /* priority << 32 | index of the left symbol: the smallest is merged first */
  uint32_t bytes;
  int32_t id;
};
struct merge_work {
  struct merge_symbol *symbols;
  struct merge_candidate *heap;
  size_t count, capacity, heap_count;
};
/* Whether the two symbols merge: what into, and how early (smaller is earlier). */
typedef bool merge_rule(const void *rules, const char *text, const struct merge_symbol *left, const struct merge_symbol *right,
                        uint32_t *priority, int32_t *id);
/* Empties the work and makes room for `symbols` of them. */
oscar_status merge_begin(oscar_context *context, struct merge_work *work, size_t symbols);
void merge_add(struct merge_work *work, size_t start, size_t bytes, int32_t id, bool frozen);
/* Merges until nothing merges; the result is the chain of `next` from symbol 0. */
void merge_run(struct merge_work *work, const char *text, merge_rule *rule, const void *rules);
void merge_free(oscar_context *context, struct merge_work *work);

/* ---- splitting text into words ---- */
struct splitter;
/* `name` as in tokenizer.ggml.pre. UNSUPPORTED names it. */
oscar_status splitter_create(oscar_context *context, struct gguf_string name, struct splitter **splitter);
void splitter_free(struct splitter *splitter);
bool splitter_composes(const struct splitter *splitter);          /* text is brought to form C first */
bool splitter_takes_whole_words(const struct splitter *splitter); /* a word that is a token is not merged from bytes */
bool splitter_wants_bos(const struct splitter *splitter);         /* what add_bos_token is when a file does not say */
/* One pass over one text, which must stay valid. */
struct split_pass {
  const struct splitter *splitter;
  const char *text;
  char *shown; /* the text with bad bytes made harmless, or NULL if it has none */
  size_t bytes, at;
  void *match;
};
oscar_status split_begin(const struct splitter *splitter, const char *text, size_t bytes, struct split_pass *pass);
/* The next word [*start, *end); *start == *end at the end of the text. */
oscar_status split_next(struct split_pass *pass, size_t *start, size_t *end);
void split_end(struct split_pass *pass);

/* ---- the kinds of tokenizer ---- */
/* Appends the ids of a stretch of text without control tokens. space_prefix matters to SentencePiece alone. */
struct tokenizer_kind {
  oscar_status (*load)(struct tokenizer *tokenizer, const struct gguf *file);
  void (*free)(struct tokenizer *tokenizer);
  oscar_status (*encode)(const struct tokenizer *tokenizer, const char *text, size_t bytes, bool space_prefix,
                         struct id_list *list);
};
extern const struct tokenizer_kind tokenizer_byte_level, tokenizer_sentencepiece;

struct tokenizer {
  oscar_context *context;
  const struct tokenizer_kind *kind;
  void *state; /* the kind's own */
  struct vocabulary vocabulary;
  struct token_trie always, special; /* looked for in any text; in text whose control tokens count */
  int32_t bos, eos, unknown;
  bool adds_bos, space_prefix;
  uint8_t *is_end; /* [vocab] */
};

/* Text whose control tokens do not count. tokenizer_encode's space prefix is `space_prefix` here. */
oscar_status tokenizer_append_text(const struct tokenizer *tokenizer, const char *text, size_t bytes, bool space_prefix,
                                   struct id_list *list);

#endif
