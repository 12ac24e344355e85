/*
 * Any bytes as a saved sequence: refused with a reason, or restored into a cache whose invariants hold and read page by page. The
 * sums of a file would keep a fuzzer out, so every input is tried a second time with its sums put right.
 */
#include "cache/snapshot_format.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define REQUIRE(condition)                                                                                                       \
  do {                                                                                                                           \
    if (!(condition)) {                                                                                                          \
      fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition);                                                            \
      abort();                                                                                                                   \
    }                                                                                                                            \
  } while (0)

static void ignore_log(void *user, oscar_log_level level, const char *text) { (void)user, (void)level, (void)text; }

static void read_back(oscar_cache *cache, const oscar_sequence *s) {
  static uint8_t k[64 * 64], v[64 * 64];
  REQUIRE(oscar_cache_check(cache) == OSCAR_OK);
  for (int p = 0; p < (int)pages_of(oscar_sequence_length(s)); p++) {
    bool coded;
    REQUIRE(oscar_sequence_read_page(s, p, 0, 0, &coded, k, v) == OSCAR_OK);
  }
  (void)!(oscar_sequence_begin((oscar_sequence *)(uintptr_t)s, 70) == OSCAR_OK);
  REQUIRE(oscar_cache_check(cache) == OSCAR_OK);
  oscar_sequence_abort((oscar_sequence *)(uintptr_t)s);
}

static void try_bytes(oscar_context *context, oscar_cache *const *caches, const uint8_t *data, size_t bytes) {
  oscar_snapshot *snapshot;
  context->error[0] = '\0';
  if (snapshot_parse(context, "fuzz", data, bytes, &snapshot) != OSCAR_OK) {
    REQUIRE(*oscar_last_error(context));
    return;
  }
  const oscar_snapshot_info *info = oscar_snapshot_describe(snapshot);
  REQUIRE(strlen(info->text) <= info->text_bytes && strlen(info->model) <= 64 && strlen(info->recipe) <= 64);
  int64_t sum = 0;
  for (int64_t i = 0; i < info->n_ids; i++) sum += info->ids[i];
  static volatile int64_t sink; /* keeps the reads */
  sink = sum;
  (void)sink;
  const bool sound = oscar_snapshot_check(snapshot) == OSCAR_OK;
  for (int i = 0; i < 2; i++) {
    oscar_sequence *s;
    const oscar_status status = oscar_snapshot_restore(snapshot, caches[i], NULL, &s);
    REQUIRE((status == OSCAR_OK) == (s != NULL) && (sound || !s));
    if (s) read_back(caches[i], s);
    oscar_sequence_free(s);
    REQUIRE(oscar_cache_check(caches[i]) == OSCAR_OK);
  }
  oscar_snapshot_close(snapshot);
}

/* Sums as a writer would have made them, as far as the sections lie in the file; the codecs are those of the cache. */
static void put_sums_right(uint8_t *data, size_t bytes, const oscar_codec_set *codecs) {
  struct snapshot_header h;
  if (bytes < sizeof h) return;
  memcpy(&h, data, sizeof h);
  memcpy(h.magic, SNAPSHOT_MAGIC, sizeof h.magic);
  h.version = SNAPSHOT_VERSION, h.byte_order = SNAPSHOT_BYTE_ORDER, h.file_bytes = bytes, h.page_tokens = PAGE_TOKENS;
  snapshot_codecs_fingerprint(codecs, h.codecs);
  const int64_t most = (int64_t)bytes;
  if (h.layers <= 64 && h.text_bytes >= 0 && h.text_bytes <= most && h.ids >= 0 && h.ids <= most && h.tokens >= 0 &&
      h.tokens <= most) {
    const size_t table = sizeof h + snapshot_forms_bytes(&h) + round_up((size_t)h.text_bytes, 8) + round_up((size_t)h.ids * 4, 8);
    const size_t pages = (size_t)snapshot_pages(&h), end = table + pages * sizeof(struct snapshot_page);
    if (end <= bytes) {
      struct snapshot_page page;
      for (size_t p = 0, at = end; p < pages; p++, at += (size_t)page.bytes) {
        memcpy(&page, data + table + p * sizeof page, sizeof page);
        if (page.bytes > bytes - at) break;
        page.checksum = snapshot_checksum(data + at, (size_t)page.bytes);
        memcpy(data + table + p * sizeof page, &page, sizeof page);
      }
      h.sections = snapshot_checksum(data + sizeof h, end - sizeof h);
    }
  }
  h.checksum = snapshot_checksum(&h, offsetof(struct snapshot_header, checksum));
  memcpy(data, &h, sizeof h);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes) {
  oscar_context_options options;
  oscar_context_options_default(&options);
  options.threads = 1;
  options.log = ignore_log;
  oscar_context *context;
  REQUIRE(oscar_context_create(&options, &context) == OSCAR_OK);
  const oscar_codec_set_info info = {1, 1, 16, "fuzz", "", ""};
  const oscar_plain_options plain = {.crumbs_per_channel = 1, .clip_keys = 1, .clip_values = 1};
  oscar_codec_set *codecs;
  oscar_cache *caches[2];
  REQUIRE(oscar_codec_set_create_plain(context, &info, &plain, &codecs) == OSCAR_OK);
  for (int i = 0; i < 2; i++) {
    oscar_cache_options o = {.layers = 1, .kv_heads = 1, .head_dim = 16, .sink_pages = 1, .recent_pages = 1};
    o.codecs = i ? NULL : codecs;
    o.budget_bytes = oscar_cache_bytes_for(&o, 2048, 1, 512);
    REQUIRE(oscar_cache_create(context, &o, &caches[i]) == OSCAR_OK);
  }
  uint8_t *copy = mem_alloc(context, bytes, 1); /* aligned as a mapping is */
  REQUIRE(copy);
  if (bytes) memcpy(copy, data, bytes);
  try_bytes(context, caches, copy, bytes);
  put_sums_right(copy, bytes, codecs);
  try_bytes(context, caches, copy, bytes);
  mem_free(context, copy);
  for (int i = 0; i < 2; i++) oscar_cache_free(caches[i]);
  oscar_codec_set_free(codecs);
  oscar_context_free(context);
  return 0;
}
