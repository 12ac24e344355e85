/*
 * tokenizer_split.c - cutting text into the words that byte-level BPE merges inside, with the published patterns and PCRE2.
 *
 * The patterns are those of the models' tokenizer.json files, with three changes that keep their meaning: \s is written out as
 * Unicode's White_Space (PCRE2's own \s also takes U+180E), quantifiers that can never give anything back are possessive, and
 * SmolLM's two steps (every number character by itself, then the GPT-2 pattern on what is between) are one pattern.
 *
 * A byte that is not part of a well-formed character is shown to the pattern as '#', which the patterns cannot tell from U+FFFD:
 * neither letter, number nor space. The words are cut from the original bytes.
 */
#include "model/tokenizer_impl.h"

#include <string.h>

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#define SPACES   "\\t-\\r\\x20\\x85\\xA0\\x{1680}\\x{2000}-\\x{200A}\\x{2028}\\x{2029}\\x{202F}\\x{205F}\\x{3000}"
#define SPACE    "[" SPACES "]"
#define NO_SPACE "[^" SPACES "]"
#define SYMBOL   "[^" SPACES "\\p{L}\\p{N}]" /* neither space, letter nor number */

#define GPT2_CONTRACTION "'s|'t|'re|'ve|'m|'ll|'d"
#define GPT2_PATTERN     GPT2_CONTRACTION "| ?\\p{L}++| ?\\p{N}++| ?" SYMBOL "++|" SPACE "+(?!" NO_SPACE ")|" SPACE "++"
/* A space before a digit stays alone, and a run of spaces before one is whole: digits are cut out before spaces are looked at. */
#define SMOLLM_PATTERN "\\p{N}|" GPT2_CONTRACTION "| ?\\p{L}++| ?" SYMBOL "++|" SPACE "+(?![^" SPACES "\\p{N}])|" SPACE "++"
#define CL100K_PATTERN(digits)                                                                                                   \
  "(?i:" GPT2_CONTRACTION ")|[^\\r\\n\\p{L}\\p{N}]?+\\p{L}++|\\p{N}" digits "| ?" SYMBOL "++[\\r\\n]*+|" SPACE                   \
  "*[\\r\\n]++|" SPACE "+(?!" NO_SPACE ")|" SPACE "++"

static const struct recipe {
  const char *name, *pattern;
  bool composes, whole_words, wants_bos;
} recipes[] = {
    {.name = "gpt-2", .pattern = GPT2_PATTERN},
    {.name = "smollm", .pattern = SMOLLM_PATTERN},
    {.name = "qwen2", .pattern = CL100K_PATTERN(""), .composes = true},
    {.name = "llama-bpe", .pattern = CL100K_PATTERN("{1,3}+"), .whole_words = true, .wants_bos = true},
};

struct splitter {
  oscar_context *context;
  const struct recipe *recipe;
  pcre2_general_context *memory;
  pcre2_code *code;
  pcre2_match_context *limits;
};

/* PCRE2's allocator callbacks have the size first and the user pointer last. */
static void *pcre_alloc(size_t bytes, void *context) { return mem_alloc(context, bytes, 1); }
static void pcre_free(void *pointer, void *context) { mem_free(context, pointer); }

static oscar_status pattern_error(oscar_context *context, const char *name, int error) {
  char text[128] = "";
  if (error == PCRE2_ERROR_NOMEMORY || error == PCRE2_ERROR_HEAPLIMIT)
    return set_error(context, OSCAR_NO_MEMORY, "out of memory in the splitting pattern of pre-tokenizer \"%s\"", name);
  pcre2_get_error_message(error, (PCRE2_UCHAR *)text, sizeof text);
  return set_error(context, OSCAR_UNSUPPORTED, "the splitting pattern of pre-tokenizer \"%s\" failed: %s", name, text);
}

oscar_status splitter_create(oscar_context *context, struct gguf_string name, struct splitter **splitter) {
  const struct recipe *recipe = NULL;
  for (size_t i = 0; i < ARRAY_LENGTH(recipes); i++)
    if (name.bytes == strlen(recipes[i].name) && memcmp(name.text, recipes[i].name, name.bytes) == 0) recipe = &recipes[i];
  if (!recipe)
    return set_error(context, OSCAR_UNSUPPORTED,
                     "pre-tokenizer \"%.*s\" (tokenizer.ggml.pre) is not supported; smollm, qwen2, llama-bpe and gpt-2 are",
                     (int)(name.bytes < 64 ? name.bytes : 64), name.text);
  struct splitter *s = mem_zalloc(context, 1, sizeof *s);
  if (!s) return OSCAR_NO_MEMORY;
  s->context = context;
  s->recipe = recipe;
  s->memory = pcre2_general_context_create(pcre_alloc, pcre_free, context);
  pcre2_compile_context *compile = s->memory ? pcre2_compile_context_create(s->memory) : NULL;
  oscar_status status = OSCAR_NO_MEMORY;
  s->limits = s->memory ? pcre2_match_context_create(s->memory) : NULL;
  if (!compile || !s->limits) goto out;
  /* The patterns step back at most once over each character, so a long run of spaces is no reason to give up. */
  pcre2_set_match_limit(s->limits, UINT32_MAX);
  int error;
  PCRE2_SIZE where;
  s->code = pcre2_compile((PCRE2_SPTR)recipe->pattern, PCRE2_ZERO_TERMINATED, PCRE2_UTF | PCRE2_UCP | PCRE2_ANCHORED, &error,
                          &where, compile);
  if (!s->code) {
    /* compile errors are positive; memory ran out for 121 (ERR21) */
    status = pattern_error(context, recipe->name, error == 121 ? PCRE2_ERROR_NOMEMORY : error);
    goto out;
  }
  (void)pcre2_jit_compile(s->code, PCRE2_JIT_COMPLETE); /* where there is no JIT, PCRE2 interprets: same words, more time */
  *splitter = s;
  s = NULL;
  status = OSCAR_OK;
out:
  pcre2_compile_context_free(compile);
  splitter_free(s);
  return status;
}

void splitter_free(struct splitter *splitter) {
  if (!splitter) return;
  pcre2_match_context_free(splitter->limits);
  pcre2_code_free(splitter->code);
  pcre2_general_context_free(splitter->memory);
  mem_free(splitter->context, splitter);
}

bool splitter_composes(const struct splitter *splitter) { return splitter->recipe->composes; }
bool splitter_takes_whole_words(const struct splitter *splitter) { return splitter->recipe->whole_words; }
bool splitter_wants_bos(const struct splitter *splitter) { return splitter->recipe->wants_bos; }

/* A copy with every bad byte replaced; NULL in *shown if there is none. */
static oscar_status show(oscar_context *context, const char *text, size_t bytes, char **shown) {
  *shown = NULL;
  for (size_t at = 0; at < bytes;) {
    size_t length = utf8_character(text + at, bytes - at);
    if (length == 0 && !*shown) {
      *shown = mem_alloc(context, bytes, 1);
      if (!*shown) return OSCAR_NO_MEMORY;
      memcpy(*shown, text, bytes);
    }
    if (length == 0) (*shown)[at] = '#';
    at += length ? length : 1;
  }
  return OSCAR_OK;
}

oscar_status split_begin(const struct splitter *splitter, const char *text, size_t bytes, struct split_pass *pass) {
  *pass = (struct split_pass){.splitter = splitter, .text = text, .bytes = bytes};
  oscar_status status = show(splitter->context, text, bytes, &pass->shown);
  if (status) return status;
  pass->match = pcre2_match_data_create(1, splitter->memory);
  if (!pass->match) {
    split_end(pass);
    return OSCAR_NO_MEMORY;
  }
  return OSCAR_OK;
}

oscar_status split_next(struct split_pass *pass, size_t *start, size_t *end) {
  *start = *end = pass->at;
  if (pass->at == pass->bytes) return OSCAR_OK;
  const char *subject = pass->shown ? pass->shown : pass->text;
  int found = pcre2_match(pass->splitter->code, (PCRE2_SPTR)subject, pass->bytes, pass->at, PCRE2_NO_UTF_CHECK, pass->match,
                          pass->splitter->limits);
  if (found < 0) return pattern_error(pass->splitter->context, pass->splitter->recipe->name, found);
  pass->at = *end = pcre2_get_ovector_pointer(pass->match)[1];
  return OSCAR_OK;
}

void split_end(struct split_pass *pass) {
  pcre2_match_data_free(pass->match);
  if (pass->shown) mem_free(pass->splitter->context, pass->shown);
  *pass = (struct split_pass){0};
}
