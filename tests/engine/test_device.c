/* Names of devices, and what is said of those that are not there. */
#include "support.h"

#include "engine/engine.h"

static void names_are_told_apart(void **state) {
  (void)state;
  static const char *const good[] = {"cpu", "cuda", "cuda:0", "cuda:7", "cuda:123"};
  static const char *const bad[] = {"", "gpu", "CPU", "cuda:", "cuda0", "cuda:-1", "cuda:1x", "cuda: 1", "cuda:1234", "cpu:0"};
  for (size_t i = 0; i < ARRAY_LENGTH(good); i++) assert_true(device_is_known(good[i]));
  for (size_t i = 0; i < ARRAY_LENGTH(bad); i++) assert_false(device_is_known(bad[i]));
}

static void the_cpu_is_always_there(void **state) {
  (void)state;
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 1);
  oscar_cuda *cuda;
  struct backend *backend;
  assert_ok(c, device_open(c, "cpu", NULL, &cuda, &backend));
  assert_null(cuda);
  assert_null(backend->cuda);
  assert_true(backend->ops->host_memory);
  backend->ops->free(backend);
  oscar_context_free(c);
}

static void what_is_not_there_is_an_error_in_words(void **state) {
  (void)state;
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 1);
  oscar_cuda *cuda;
  struct backend *backend;
  assert_int_equal(device_open(c, "gpu", NULL, &cuda, &backend), OSCAR_INVALID_ARGUMENT);
  assert_non_null(strstr(oscar_last_error(c), "'gpu'; expected cpu, cuda"));
  assert_int_equal(device_open(c, "cuda:999", "bf16", &cuda, &backend), OSCAR_UNSUPPORTED);
  const char *words = oscar_last_error(c);
  assert_true(strstr(words, "no CUDA") || strstr(words, "no NVIDIA GPU") || strstr(words, "GPU 999"));
  assert_null(cuda);
  assert_null(backend);
  oscar_context_free(c);
}

static void weights_are_named_for_gpus_only(void **state) {
  (void)state;
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 1);
  oscar_cuda *cuda;
  struct backend *backend;
  static const char *const devices[] = {"cpu", "cuda", "cuda:999"};
  for (size_t i = 0; i < ARRAY_LENGTH(devices); i++) {
    assert_int_equal(device_open(c, devices[i], "int8", &cuda, &backend), OSCAR_INVALID_ARGUMENT);
    assert_non_null(strstr(oscar_last_error(c), "'int8'; expected bf16 or fp8"));
  }
  for (int i = 0; device_weights(i); i++) {
    assert_int_equal(device_open(c, "cpu", device_weights(i), &cuda, &backend), OSCAR_INVALID_ARGUMENT);
    assert_non_null(strstr(oscar_last_error(c), "are for GPUs"));
    assert_int_equal(device_open(c, "cuda:999", device_weights(i), &cuda, &backend), OSCAR_UNSUPPORTED);
  }
  assert_string_equal(device_weights(1), "fp8");
  assert_null(device_weights(2));
  assert_null(device_weights(-1));
  oscar_context_free(c);
}

static void a_gpu_is_opened_with_its_handle(void **state) {
  (void)state;
  if (oscar_cuda_count() == 0) skip();
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 1);
  oscar_cuda *cuda;
  struct backend *backend;
  assert_ok(c, device_open(c, "cuda", "fp8", &cuda, &backend));
  assert_non_null(cuda);
  assert_ptr_equal(backend->cuda, cuda);
  assert_false(backend->ops->host_memory);
  backend->ops->free(backend);
  oscar_cuda_free(cuda);
  oscar_context_free(c);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(names_are_told_apart),
      cmocka_unit_test(the_cpu_is_always_there),
      cmocka_unit_test(what_is_not_there_is_an_error_in_words),
      cmocka_unit_test(weights_are_named_for_gpus_only),
      cmocka_unit_test(a_gpu_is_opened_with_its_handle),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
