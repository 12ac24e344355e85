/* The small parts: buffers, reading fields, kept responses. */
#include "support.h"

#include "server/json_fields.h"
#include "server/buffer.h"
#include "server/response_store.h"

static void buffers(void **state) {
  (void)state;
  struct buffer b = {0};
  for (int i = 0; i < 1000; i++) buffer_format(&b, "%d,", i);
  assert_int_equal(b.bytes, 10 * 2 + 90 * 3 + 900 * 4);
  assert_int_equal(strlen(b.data), b.bytes);
  buffer_drop(&b, 4);
  assert_int_equal(strncmp(b.data, "2,3,", 4), 0);
  buffer_json(&b, NULL); /* what could not be made */
  assert_true(b.failed);
  assert_null(buffer_take(&b));
  char *empty = buffer_take(&b);
  assert_string_equal(empty, "");
  free(empty);
}

static struct fields on(json_t *object, struct refusal *refusal) {
  *refusal = (struct refusal){0};
  return (struct fields){object, "a[1]", refusal};
}

static void fields(void **state) {
  (void)state;
  json_t *object = json_pack("{s:s, s:i, s:f, s:f, s:n, s:b, s:[]}", "text", "x", "int", 7, "whole", 64.0, "real", 1.5, "null",
                             "flag", 1, "list");
  struct refusal refusal;
  struct fields f = on(object, &refusal);
  const char *text = "before";
  int64_t n = 3;
  float x = 2;
  bool flag = false;
  const json_t *list = NULL;
  assert_true(field_text(&f, "null", &text) && field_text(&f, "absent", &text));
  assert_string_equal(text, "before");
  assert_true(field_text(&f, "text", &text));
  assert_string_equal(text, "x");
  assert_true(field_integer(&f, "whole", 0, 100, &n));
  assert_int_equal(n, 64);
  assert_true(field_float(&f, "int", 0, 10, &x) && x == 7);
  assert_true(field_flag(&f, "flag", &flag) && flag);
  assert_true(field_array(&f, "list", &list) && list);
  assert_false(field_integer(&f, "real", 0, 100, &n));
  assert_string_equal(refusal.field, "a[1].real");
  assert_int_equal(refusal.status, 400);
  /* the first complaint stays, and what follows fails */
  assert_false(field_text(&f, "int", &text));
  assert_string_equal(refusal.field, "a[1].real");
  assert_false(field_text(&f, "absent", &text));
  f = on(object, &refusal);
  assert_false(field_integer(&f, "int", 8, 9, &n));
  assert_int_equal(n, 64);
  f = on(object, &refusal);
  assert_false(field_needed_text(&f, "null", &text));
  json_decref(object);
}

static void rules(void **state) {
  (void)state;
  static const struct field_rule list[] = {{"read", FIELD_READ, NULL}, {"plain", FIELD_PLAIN, "none"}, {NULL, FIELD_READ, NULL}};
  static const struct {
    const char *text;
    bool good;
  } cases[] = {{"{}", true},
               {"{\"read\":{\"x\":1},\"plain\":null}", true},
               {"{\"plain\":\"none\"}", true},
               {"{\"plain\":[]}", true},
               {"{\"plain\":false}", true},
               {"{\"plain\":\"other\"}", false},
               {"{\"plain\":true}", false},
               {"{\"plain\":0}", false},
               {"{\"other\":null}", false}};
  for (size_t i = 0; i < ARRAY_LENGTH(cases); i++) {
    json_t *object = json_loads(cases[i].text, 0, NULL);
    struct refusal refusal;
    struct fields f = on(object, &refusal);
    assert_int_equal(fields_obey(&f, list, NULL), cases[i].good);
    assert_int_equal(refusal.status, cases[i].good ? 0 : 400);
    json_decref(object);
  }
}

static void stored(void **state) {
  (void)state;
  struct response_store *s = response_store_create(3, 1000);
  json_t *small = json_pack("{s:s}", "k", "v"), *items = json_array(), *got, *kept;
  char id[16];
  for (int i = 0; i < 5; i++) {
    snprintf(id, sizeof id, "r%d", i);
    response_store_put(s, id, small, items);
  }
  assert_false(response_store_get(s, "r1", &got, NULL)); /* three are kept */
  assert_true(response_store_get(s, "r2", &got, &kept));
  assert_true(json_equal(got, small) && json_equal(kept, items));
  json_decref(got);
  json_decref(kept);
  assert_true(response_store_remove(s, "r3"));
  assert_false(response_store_remove(s, "r3"));
  assert_true(response_store_get(s, "r4", &got, NULL));
  json_decref(got);
  /* by bytes: one of 900 leaves no room for others, one of 2000 is not kept */
  char text[2001];
  memset(text, 'a', 2000);
  text[900] = '\0';
  json_t *large = json_string(text), *wrapped = json_pack("{s:o}", "t", large);
  response_store_put(s, "large", wrapped, items);
  assert_true(response_store_get(s, "large", &got, NULL));
  json_decref(got);
  json_decref(wrapped);
  text[900] = 'a';
  text[2000] = '\0';
  wrapped = json_pack("{s:s}", "t", text);
  response_store_put(s, "huge", wrapped, items);
  assert_false(response_store_get(s, "huge", NULL, NULL));
  assert_true(response_store_get(s, "large", NULL, NULL));
  json_decref(wrapped);
  json_decref(small);
  json_decref(items);
  response_store_free(s);
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(buffers), cmocka_unit_test(fields), cmocka_unit_test(rules),
                                     cmocka_unit_test(stored)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
