/* Any bytes, through small vocabularies that have a token for every byte: the pieces joined are the text again. The first byte of
 * the input chooses the vocabulary and whether control tokens count. */
#include "model/tokenizer.h"

#include <stdlib.h>
#include <string.h>

#define KINDS 5

static const char *const names[KINDS] = {"gpt-2", "llama-bpe", "qwen2", "spm-gemma", "smollm"};
static oscar_context *context;
static struct tokenizer *tokenizers[KINDS];

int LLVMFuzzerInitialize(int *argc, char ***argv);
int LLVMFuzzerInitialize(int *argc, char ***argv) {
  (void)argc, (void)argv;
  if (oscar_context_create(NULL, &context) != OSCAR_OK) abort();
  for (int i = 0; i < KINDS; i++) {
    char path[4096];
    struct gguf *file;
    snprintf(path, sizeof path, "%s/%s.tiny.gguf", OSCAR_TEST_DATA, names[i]);
    if (gguf_open(context, path, &file) != OSCAR_OK || tokenizer_create(context, file, &tokenizers[i]) != OSCAR_OK) abort();
    gguf_close(file);
  }
  return 0;
}

static char *joined(const struct tokenizer *t, const int32_t *ids, int count, size_t *bytes) {
  size_t room = 1, length;
  for (int i = 0; i < count; i++) {
    tokenizer_piece(t, ids[i], true, &length);
    room += length;
  }
  char *text = malloc(room);
  if (!text) abort();
  *bytes = 0;
  for (int i = 0; i < count; i++) {
    const char *piece = tokenizer_piece(t, ids[i], true, &length);
    memcpy(text + *bytes, piece, length);
    *bytes += length;
  }
  return text;
}

/* What an encoding stands for encodes to itself being read again: true of every kind whose text can be joined without loss. */
static void check_stable(const struct tokenizer *t, const char *text, size_t bytes) {
  int32_t *ids;
  int count;
  size_t again_bytes;
  if (tokenizer_encode(t, text, bytes, false, &ids, &count) != OSCAR_OK) abort();
  char *again = joined(t, ids, count, &again_bytes);
  if (again_bytes != bytes || memcmp(again, text, bytes) != 0) abort();
  free(again);
  mem_free(context, ids);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes) {
  if (bytes < 1) return 0;
  int kind = data[0] % KINDS;
  bool special = data[0] & 0x80;
  const struct tokenizer *t = tokenizers[kind];
  const char *text = (const char *)data + 1;
  bytes--;
  int32_t *ids;
  int count;
  size_t back_bytes;
  if (tokenizer_encode(t, text, bytes, special, &ids, &count) != OSCAR_OK) abort();
  for (int i = 0; i < count; i++)
    if (ids[i] < 0 || ids[i] >= tokenizer_vocab(t)) abort();
  char *back = joined(t, ids, count, &back_bytes);
  if (kind < 2 && (back_bytes != bytes || memcmp(back, text, bytes) != 0)) abort();
  if (kind == 2) check_stable(t, back, back_bytes); /* form C of form C */
  free(back);
  mem_free(context, ids);
  return 0;
}
