/* Fuzz target: grammars in their notation. What is compiled is walked with the bytes of its own text, and masks agree with single
 * questions. */
#include "fuzz_grammar.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n) {
  struct grammar *g = NULL;
  char error[200] = "";
  const oscar_status status = grammar_parse((const char *)data, n, &g, error, sizeof error);
  if ((status == OSCAR_OK) != (g != NULL) || (status != OSCAR_OK && !error[0])) __builtin_trap();
  if (g) walk_grammar(g, data, n);
  grammar_free(g);
  return 0;
}
