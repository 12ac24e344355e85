/* Any answer, taken apart whole and in pieces: both give the same deltas, whose texts joined are the answer, and whose calls
 * bring JSON objects. The first byte of the input chooses the style and how the answer is cut. */
#include "base/base.h"
#include "model/reply.h"

#include <jansson.h>
#include <stdlib.h>
#include <string.h>

static oscar_context *context;

int LLVMFuzzerInitialize(int *argc, char ***argv);
int LLVMFuzzerInitialize(int *argc, char ***argv) {
  (void)argc, (void)argv;
  if (oscar_context_create(NULL, &context) != OSCAR_OK) abort();
  return 0;
}

/* The text that was seen, the kind of every byte of it, and a sum over the calls. */
struct seen {
  const uint8_t *text;
  uint8_t *kinds;
  size_t at, bytes;
  uint64_t calls;
};

static oscar_status see(void *user, const struct reply_delta *delta) {
  struct seen *seen = user;
  if (delta->bytes > seen->bytes - seen->at) abort();
  if (delta->bytes && memcmp(seen->text + seen->at, delta->text, delta->bytes) != 0) abort();
  memset(seen->kinds + seen->at, (int)delta->kind, delta->bytes);
  seen->at += delta->bytes;
  if (delta->kind != REPLY_CALL) return OSCAR_OK;
  json_t *arguments = json_loads(delta->arguments, 0, NULL);
  if (!json_is_object(arguments) || !delta->name[0]) abort();
  json_decref(arguments);
  for (const char *c = delta->arguments; *c; c++) seen->calls = 31 * seen->calls + (unsigned char)*c;
  return OSCAR_OK;
}

static struct seen take_apart(const struct chat_template *chat, const uint8_t *text, size_t bytes, size_t step) {
  struct seen seen = {.text = text, .bytes = bytes, .kinds = malloc(bytes + 1)};
  struct reply_parser *parser;
  if (!seen.kinds || reply_parser_create(chat, context, true, &parser) != OSCAR_OK) abort();
  for (size_t at = 0; at < bytes; at += step) {
    size_t piece = step < bytes - at ? step : bytes - at;
    if (reply_feed(parser, (const char *)text + at, piece, see, &seen) != OSCAR_OK) abort();
  }
  if (reply_end(parser, see, &seen) != OSCAR_OK || seen.at != bytes) abort();
  reply_parser_free(parser);
  return seen;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes) {
  if (bytes < 1) return 0;
  const struct chat_template chat = {.family = CHAT_CHATML,
                                     .tools = (enum chat_tool_style)((data[0] & 7) % (CHAT_TOOLS_MISTRAL + 1)),
                                     .thinks = data[0] & 8,
                                     .opens_thinking = (data[0] & 24) == 24};
  size_t step = 1 + (data[0] >> 5);
  struct seen whole = take_apart(&chat, data + 1, bytes - 1, bytes), pieces = take_apart(&chat, data + 1, bytes - 1, step);
  if (whole.calls != pieces.calls || memcmp(whole.kinds, pieces.kinds, bytes - 1) != 0) abort();
  free(whole.kinds);
  free(pieces.kinds);
  return 0;
}
