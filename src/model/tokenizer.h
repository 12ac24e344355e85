/*
 * model/tokenizer.h - text to token ids and back: byte-level BPE (pre-tokenizers smollm, qwen2, llama-bpe, gpt-2) and
 * SentencePiece BPE, as described by a GGUF file's tokenizer.ggml.* metadata. Private.
 */
#ifndef OSCAR_TOKENIZER_H
#define OSCAR_TOKENIZER_H

#include "model/gguf.h"

struct tokenizer;
/* Copies what it needs; the file may be closed afterwards. Errors: UNSUPPORTED (names the model or pre-tokenizer), FORMAT,
 * NO_MEMORY. */
oscar_status tokenizer_create(oscar_context *context, const struct gguf *file, struct tokenizer **tokenizer);
void tokenizer_free(struct tokenizer *tokenizer);

int tokenizer_vocab(const struct tokenizer *tokenizer);
/* -1 if the model has none */
int32_t tokenizer_bos(const struct tokenizer *tokenizer);
int32_t tokenizer_eos(const struct tokenizer *tokenizer);
bool tokenizer_adds_bos(const struct tokenizer *tokenizer);
/* End of a turn or of the text: eos, eot, <|im_end|>, <end_of_turn>, <|eot_id|>, ... */
bool tokenizer_is_end(const struct tokenizer *tokenizer, int32_t id);
/* The id of a token spelled exactly so (control tokens included), or -1. */
int32_t tokenizer_find(const struct tokenizer *tokenizer, const char *spelling);

/* Text (any bytes; invalid UTF-8 is handled as the reference tokenizers do: each bad byte becomes U+FFFD for splitting, byte
 * tokens for byte-level BPE keep the byte) -> ids, allocated with mem_alloc, freed by the caller with mem_free. parse_special:
 * control tokens spelled in the text become their ids; else they are text. BOS is never added here. */
oscar_status tokenizer_encode(const struct tokenizer *tokenizer, const char *text, size_t bytes, bool parse_special,
                              int32_t **ids, int *count);
/* Bytes of one token, possibly a fragment of a UTF-8 character. Control tokens give "" unless `special`. Returns a pointer valid
 * as long as the tokenizer and sets *bytes. For SentencePiece a leading "▁" is a space. Out of range ids give "". */
const char *tokenizer_piece(const struct tokenizer *tokenizer, int32_t id, bool special, size_t *bytes);

#endif
