/* What --logit-bias takes, and how it says what it does not. */
#include "cli/bias.h"
#include "../failing_alloc.h"
#include "model/gguf.h"

#include <math.h>

struct world {
  oscar_context *context;
  struct tokenizer *tokenizer;
  int32_t a; /* the id of "a" */
};

static void open_world(struct world *w, oscar_context *context) {
  struct gguf *file;
  int32_t *ids;
  int n;
  w->context = context;
  assert_ok(context, gguf_open(context, OSCAR_SOURCE_DIR "/tests/model/data/qwen2.tiny.gguf", &file));
  assert_ok(context, tokenizer_create(context, file, &w->tokenizer));
  gguf_close(file);
  assert_ok(context, tokenizer_encode(w->tokenizer, "a", 1, false, &ids, &n));
  assert_int_equal(n, 1);
  w->a = ids[0];
  mem_free(context, ids);
}

static void lists_are_read(void **state) {
  (void)state;
  struct world w;
  struct token_bias *list;
  int n;
  open_world(&w, test_context(OSCAR_ISA_AUTO, 1));
  assert_ok(w.context, bias_read(w.context, NULL, w.tokenizer, &list, &n));
  assert_true(!list && n == 0);
  assert_ok(w.context, bias_read(w.context, "12=2.5,'a'=-100,\"a\"=1e1,7=-99.5,\"\\n\"=0", w.tokenizer, &list, &n));
  assert_int_equal(n, 5);
  assert_true(list[0].id == 12 && list[0].bias == 2.5F);
  assert_true(list[1].id == w.a && list[1].bias == -INFINITY);
  assert_true(list[2].id == w.a && list[2].bias == 10);
  assert_true(list[3].id == 7 && list[3].bias == -99.5F);
  size_t bytes;
  const char *piece = tokenizer_piece(w.tokenizer, list[4].id, true, &bytes);
  assert_true(bytes == 1 && *piece == '\n');
  free(list);
  /* Control tokens count, commas and quotes within quotes are text. */
  assert_ok(w.context, bias_read(w.context, "'<|im_end|>'=-5,','=1,'='=2,'\\''=3", w.tokenizer, &list, &n));
  assert_int_equal(n, 4);
  assert_int_equal(list[0].id, tokenizer_find(w.tokenizer, "<|im_end|>"));
  piece = tokenizer_piece(w.tokenizer, list[3].id, true, &bytes);
  assert_true(bytes == 1 && *piece == '\'');
  free(list);
  tokenizer_free(w.tokenizer);
  oscar_context_free(w.context);
}

static void wrong_lists_are_refused(void **state) {
  (void)state;
  static const struct {
    const char *text, *words;
  } cases[] = {{"", "nothing at ''"},
               {"12", "no '=' at ''"},
               {"12=", "no bias from -100 to 100 at '='"},
               {"12=x", "no bias"},
               {"12= 1", "no bias"},
               {"12=101", "no bias"},
               {"12=-100.5", "no bias"},
               {"12=nan", "no bias"},
               {"12=inf", "no bias"},
               {"12=1,", "no further token at ','"},
               {"12=1;13=1", "no further token"},
               {"12=1,,13=1", "no number of a token"},
               {"-1=1", "no number of a token"},
               {"99999999=1", "no token of this model, which has 0 to"},
               {"99999999999999999999999=1", "no token of this model, which has 0 to"},
               {"word=1", "no number of a token and no text in quotes at 'word=1'"},
               {"'a", "a quote without its end at ''a'"},
               {"'a\\'=1", "a quote without its end"},
               {"''=1", "'' is 0 tokens"},
               {"'a and b'=1", "tokens of this model, not one"}};
  struct world w;
  struct token_bias *list;
  int n;
  open_world(&w, test_context(OSCAR_ISA_AUTO, 1));
  for (size_t i = 0; i < ARRAY_LENGTH(cases); i++) {
    assert_int_equal(bias_read(w.context, cases[i].text, w.tokenizer, &list, &n), OSCAR_INVALID_ARGUMENT);
    if (!strstr(oscar_last_error(w.context), cases[i].words)) fail_msg("%s: %s", cases[i].text, oscar_last_error(w.context));
    assert_true(!list && n == 0);
  }
  tokenizer_free(w.tokenizer);
  oscar_context_free(w.context);
}

static void memory_may_run_out(void **state) {
  (void)state;
  struct failing_alloc f;
  struct world w;
  struct token_bias *list;
  int n;
  open_world(&w, failing_context(&f));
  sweep_allocations(w.context, &f, bias_read(w.context, "'a'=1,5=2", w.tokenizer, &list, &n));
  assert_int_equal(n, 2);
  free(list);
  tokenizer_free(w.tokenizer);
  failing_context_free(w.context, &f);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(lists_are_read),
      cmocka_unit_test(wrong_lists_are_refused),
      cmocka_unit_test(memory_may_run_out),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
