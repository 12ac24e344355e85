/* Pages that a GPU encodes against those of the CPU: the same bytes, nothing beside them, and the first row that cannot be.
 * With an argument n only every n-th case is run, which is for compute-sanitizer. */
#include "coder_cases.h"

#include "quant/cuda/encode.h"

enum { PAGES = 5 };

static oscar_context *context;
static oscar_cuda *cuda;
static size_t case_step = 1;

/* An arena of two layers on the device and what it holds, as the host knows it. Units are coded pages. */
struct arena_case {
  oscar_codec_set *set;
  struct cuda_codecs *codecs;
  struct cuda_layer layers[CASE_LAYERS];  /* memory on the device */
  size_t bytes[CASE_LAYERS], exact_bytes; /* of a layer; of an exact page */
  uint8_t *host[CASE_LAYERS];             /* before encoding */
  struct cuda_demotion jobs[PAGES];
  void *device_layers, *device_jobs, *device_bad;
};

static void *on_device(const void *from, size_t bytes) {
  void *memory;
  assert_ok(context, cuda_alloc(cuda, bytes, &memory));
  assert_ok(context, cuda_upload(cuda, memory, from, bytes));
  return memory;
}

/* Exact pages take runs of units, coded ones lie in between in another order. */
static void lay_out(struct arena_case *a, const struct coder_case *k) {
  const int64_t pages[PAGES] = {0, 1, 63, 123456789, ((int64_t)1 << 40) - 1};
  a->exact_bytes = (size_t)CASE_HEADS * 2 * PAGE_TOKENS * 2 * (size_t)k->d;
  int most = 0;
  for (int layer = 0; layer < CASE_LAYERS; layer++) {
    struct cuda_layer *l = &a->layers[layer];
    for (int side = 0; side < 2; side++) {
      l->form[side] = side_form_of(oscar_codec_set_get(a->set, layer, 0, (oscar_side)side));
      l->side_bytes[side] = side_bytes(&l->form[side]);
    }
    l->head_bytes = l->side_bytes[0] + l->side_bytes[1];
    l->unit_bytes = l->head_bytes * CASE_HEADS;
    const int run = (int)((a->exact_bytes + l->unit_bytes - 1) / l->unit_bytes);
    most = run > most ? run : most;
  }
  for (int i = 0; i < PAGES; i++) a->jobs[i] = (struct cuda_demotion){i * (most + 1), (PAGES - i) * (most + 1) - 1, pages[i]};
  for (int layer = 0; layer < CASE_LAYERS; layer++)
    a->bytes[layer] = (size_t)PAGES * (size_t)(most + 1) * a->layers[layer].unit_bytes;
}

static uint16_t *exact_side(const struct arena_case *a, int job, int layer, int head, int side) {
  const struct cuda_layer *l = &a->layers[layer];
  return (uint16_t *)(void *)(a->host[layer] + (size_t)a->jobs[job].exact * l->unit_bytes +
                              (size_t)(2 * head + side) * (a->exact_bytes / CASE_HEADS / 2));
}

static size_t coded_offset(const struct arena_case *a, int job, int layer, int head, int side) {
  const struct cuda_layer *l = &a->layers[layer];
  return (size_t)a->jobs[job].coded * l->unit_bytes + (size_t)head * l->head_bytes + (side ? l->side_bytes[0] : 0);
}

/* A side whose rows can all be encoded: those that the CPU refuses become zeros. */
static void fill_side(const struct arena_case *a, const struct coder_case *k, int job, int layer, int head, int side,
                      uint64_t *seed) {
  uint16_t *exact = exact_side(a, job, layer, head, side);
  const oscar_codec *codec = oscar_codec_set_get(a->set, layer, head, (oscar_side)side);
  uint8_t *device = malloc(a->layers[layer].side_bytes[side]);
  case_page(k, exact, seed);
  for (int bad; (bad = case_expected(codec, (oscar_side)side, a->jobs[job].page, exact, device)) < PAGE_TOKENS;)
    memset(exact + bad * k->d, 0, 2 * (size_t)k->d);
  free(device);
}

static struct arena_case make_arena(const struct coder_case *k, uint64_t *seed) {
  struct arena_case a = {.set = case_set(context, k, seed)};
  const size_t before = cuda->info.allocated_bytes;
  assert_ok(context, cuda_codecs_create(cuda, a.set, &a.codecs));
  assert_int_equal(cuda->info.allocated_bytes - before, cuda_codecs_bytes(a.set));
  lay_out(&a, k);
  for (int layer = 0; layer < CASE_LAYERS; layer++) {
    a.host[layer] = malloc(a.bytes[layer]);
    memset(a.host[layer], 0xA5, a.bytes[layer]);
    for (int i = 0; i < PAGES * CASE_HEADS * 2; i++) fill_side(&a, k, i / 2 / CASE_HEADS, layer, i / 2 % CASE_HEADS, i % 2, seed);
  }
  return a;
}

static void upload_arena(struct arena_case *a) {
  const unsigned long long none = CUDA_BAD_NONE;
  for (int layer = 0; layer < CASE_LAYERS; layer++) a->layers[layer].memory = on_device(a->host[layer], a->bytes[layer]);
  a->device_layers = on_device(a->layers, sizeof a->layers);
  a->device_jobs = on_device(a->jobs, sizeof a->jobs);
  a->device_bad = on_device(&none, sizeof none);
}

static void free_arena(struct arena_case *a) {
  for (int layer = 0; layer < CASE_LAYERS; layer++) {
    cuda_release(cuda, a->layers[layer].memory, a->bytes[layer]);
    free(a->host[layer]);
  }
  cuda_release(cuda, a->device_layers, sizeof a->layers);
  cuda_release(cuda, a->device_jobs, sizeof a->jobs);
  cuda_release(cuda, a->device_bad, sizeof(unsigned long long));
  cuda_codecs_free(a->codecs);
  oscar_codec_set_free(a->set);
  assert_int_equal(cuda->info.allocated_bytes, 0);
}

/* A layer's memory after encoding layers begin .. end - 1. */
static uint8_t *encoded(const struct arena_case *a, int layer) {
  uint8_t *out = malloc(a->bytes[layer]);
  assert_ok(context, cuda_download(cuda, out, a->layers[layer].memory, a->bytes[layer]));
  return out;
}

static unsigned long long encode(const struct arena_case *a, int begin, int end) {
  unsigned long long bad;
  assert_ok(context, cuda_encode(a->codecs, a->device_layers, begin, end, CASE_HEADS, a->device_jobs, PAGES, a->device_bad));
  assert_ok(context, cuda_download(cuda, &bad, a->device_bad, sizeof bad));
  return bad;
}

/* What the host's memory of a layer has to become. */
static void expect_layer(const struct arena_case *a, int layer) {
  for (int i = 0; i < PAGES * CASE_HEADS * 2; i++) {
    const int job = i / 2 / CASE_HEADS, head = i / 2 % CASE_HEADS, side = i % 2;
    assert_int_equal(case_expected(oscar_codec_set_get(a->set, layer, head, (oscar_side)side), (oscar_side)side,
                                   a->jobs[job].page, exact_side(a, job, layer, head, side),
                                   a->host[layer] + coded_offset(a, job, layer, head, side)),
                     PAGE_TOKENS);
  }
}

static void pages_have_the_bytes_of_the_cpu(void **state) {
  (void)state;
  for (size_t n = 0; n < ARRAY_LENGTH(coder_cases); n += case_step) {
    uint64_t seed = n;
    struct arena_case a = make_arena(&coder_cases[n], &seed);
    upload_arena(&a);
    /* the second layer alone, then both: what is there is written over */
    for (int begin = 1; begin >= 0; begin--) {
      assert_true(encode(&a, begin, CASE_LAYERS) == CUDA_BAD_NONE);
      for (int layer = 0; layer < CASE_LAYERS; layer++) {
        if (layer == begin) expect_layer(&a, layer);
        uint8_t *got = encoded(&a, layer);
        size_t differs = 0;
        while (differs < a.bytes[layer] && got[differs] == a.host[layer][differs]) differs++;
        if (differs < a.bytes[layer])
          fail_msg("case %zu, layer %d: byte %zu of %zu (units of %zu, heads of %zu)", n, layer, differs, a.bytes[layer],
                   a.layers[layer].unit_bytes, a.layers[layer].head_bytes);
        free(got);
      }
    }
    free_arena(&a);
  }
}

/* Rows of a side in canonical order. */
static uint8_t *rows_of(const struct cuda_layer *l, int side, const uint8_t *device) {
  uint8_t *rows = malloc(l->side_bytes[side]);
  page_from_device(&l->form[side], (oscar_side)side, device, rows);
  return rows;
}

static void the_first_bad_row_is_named_and_the_others_are_written(void **state) {
  (void)state;
  const struct cuda_bad_row broken[] = {
      {1, 0, 3, 0, OSCAR_KEYS},    {0, 4, 2, 0, OSCAR_KEYS},  {0, 3, 63, 0, OSCAR_KEYS},
      {0, 3, 17, 1, OSCAR_VALUES}, {0, 3, 17, 1, OSCAR_KEYS}, /* the first */
  };
  for (size_t n = 0; n < ARRAY_LENGTH(coder_cases); n += case_step) {
    const struct coder_case *k = &coder_cases[n];
    uint64_t seed = 100 + n;
    struct arena_case a = make_arena(k, &seed);
    for (size_t i = 0; i < ARRAY_LENGTH(broken); i++) {
      const struct cuda_bad_row *b = &broken[i];
      uint16_t *row = exact_side(&a, b->job, b->layer, b->head, b->side) + b->row * k->d;
      row[test_random(&seed) % (uint64_t)k->d] = i % 2 ? 0x7FC0 : 0xFF80;
    }
    upload_arena(&a);
    const struct cuda_bad_row first = cuda_bad_row(encode(&a, 0, CASE_LAYERS));
    assert_int_equal(first.layer, 0);
    assert_int_equal(first.job, 3);
    assert_int_equal(first.row, 17);
    assert_int_equal(first.head, 1);
    assert_int_equal(first.side, OSCAR_KEYS);
    uint8_t *got = encoded(&a, 0);
    for (size_t i = 1; i < ARRAY_LENGTH(broken); i++) {
      const struct cuda_bad_row *b = &broken[i];
      const struct cuda_layer *l = &a.layers[0];
      uint16_t *exact = exact_side(&a, b->job, 0, b->head, b->side);
      memset(exact + b->row * k->d, 0, 2 * (size_t)k->d); /* for the CPU, which stops at a bad row */
      uint8_t *expected = malloc(l->side_bytes[b->side]);
      assert_int_equal(case_expected(oscar_codec_set_get(a.set, 0, b->head, (oscar_side)b->side), (oscar_side)b->side,
                                     a.jobs[b->job].page, exact, expected),
                       PAGE_TOKENS);
      uint8_t *want = rows_of(l, b->side, expected),
              *have = rows_of(l, b->side, got + coded_offset(&a, b->job, 0, b->head, b->side));
      const size_t row_bytes = l->side_bytes[b->side] / PAGE_TOKENS;
      for (int t = 0; t < PAGE_TOKENS; t++)
        if (t != b->row) assert_memory_equal(want + (size_t)t * row_bytes, have + (size_t)t * row_bytes, row_bytes);
      free(want);
      free(have);
      free(expected);
    }
    free(got);
    free_arena(&a);
  }
}

static void wrong_calls_are_refused(void **state) {
  (void)state;
  uint64_t seed = 9;
  const oscar_codec_set_info info = {1, 1, 64, "test", "", ""};
  oscar_codec_set *empty;
  struct cuda_codecs *codecs;
  assert_ok(context, oscar_codec_set_create(context, &info, &empty));
  assert_int_equal(cuda_codecs_create(cuda, empty, &codecs), OSCAR_INVALID_ARGUMENT);
  assert_null(codecs);
  oscar_codec_set_free(empty);
  struct arena_case a = make_arena(&coder_cases[0], &seed);
  assert_int_equal(cuda_encode(a.codecs, NULL, 0, CASE_LAYERS + 1, CASE_HEADS, NULL, 1, NULL), OSCAR_INVALID_ARGUMENT);
  assert_int_equal(cuda_encode(a.codecs, NULL, 0, CASE_LAYERS, CASE_HEADS + 1, NULL, 1, NULL), OSCAR_INVALID_ARGUMENT);
  assert_ok(context, cuda_encode(a.codecs, NULL, 0, CASE_LAYERS, CASE_HEADS, NULL, 0, NULL));
  assert_ok(context, cuda_encode(a.codecs, NULL, 1, 1, CASE_HEADS, NULL, 1, NULL));
  upload_arena(&a);
  free_arena(&a);
}

int main(int argc, char **argv) {
  if (argc > 1 && atoi(argv[1]) > 0) case_step = (size_t)atoi(argv[1]);
  if (oscar_cuda_count() == 0) {
    printf("skipped: no GPU\n");
    return SKIPPED;
  }
  context = test_context(OSCAR_ISA_AUTO, 1);
  if (oscar_cuda_create(context, NULL, &cuda) != OSCAR_OK) {
    printf("%s\n", oscar_last_error(context));
    return 1;
  }
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(pages_have_the_bytes_of_the_cpu),
      cmocka_unit_test(the_first_bad_row_is_named_and_the_others_are_written),
      cmocka_unit_test(wrong_calls_are_refused),
  };
  int failed = cmocka_run_group_tests(tests, NULL, NULL);
  oscar_cuda_free(cuda);
  oscar_context_free(context);
  return failed;
}
