/*
 * bench/snapshot.c - saving and restoring a sequence, beside a plain write and read of as many bytes.
 *
 *   bench_snapshot MODEL.gguf [--kv TYPE] [--tokens N] [--repeats N] [--dir DIR]
 *
 * The text that ships with the program is read by the model, N tokens of it. Then, in turn: the sequence is saved; the bytes of
 * that file are written to another, synced and renamed; the sequence is restored; the file is read; the sequence is copied, for a
 * file that another thread writes. Milliseconds (median, least),
 * MB/s (of 10^6 bytes of the file). Files are in the page cache when they are read. DIR: default $TMPDIR or /tmp.
 */
#include "base/file.h"
#include "base/sort.h"
#include "engine/engine.h"
#include <oscar/snapshot.h>

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define MOST 101

static oscar_context *context;

static void check(oscar_status status) {
  if (status == OSCAR_OK) return;
  fprintf(stderr, "bench_snapshot: %s\n", oscar_last_error(context));
  exit(1);
}

static void print_times(const char *what, double *ms, int n, size_t bytes) {
  sort_doubles(ms, (size_t)n);
  printf("%s,%zu,%.2f,%.2f,%.0f\n", what, bytes, ms[n / 2], ms[0], (double)bytes / 1e3 / ms[n / 2]);
}

static void write_plain(const char *path, const uint8_t *data, size_t bytes) {
  struct file_writer writer;
  check(file_writer_open(context, path, &writer));
  if (fwrite(data, 1, bytes, writer.stream) != bytes) fprintf(stderr, "bench_snapshot: %s cannot be written\n", path);
  check(file_writer_commit(context, &writer));
}

static void read_plain(const char *path, uint8_t *data, size_t bytes) {
  FILE *file = fopen(path, "rb");
  if (!file || fread(data, 1, bytes, file) != bytes) {
    fprintf(stderr, "bench_snapshot: %s cannot be read\n", path);
    exit(1);
  }
  fclose(file);
}

static void measure(struct engine *engine, const oscar_sequence *sequence, const int32_t *ids, const char *dir, int repeats) {
  char saved[4096], plain[4096];
  double times[5][MOST];
  snprintf(saved, sizeof saved, "%s/bench_snapshot.%ld", dir, (long)getpid());
  snprintf(plain, sizeof plain, "%s/bench_snapshot_plain.%ld", dir, (long)getpid());
  const oscar_snapshot_contents contents = {
      .model = model_fingerprint(engine->model), .ids = ids, .n_ids = oscar_sequence_length(sequence)};
  size_t bytes = 0;
  uint8_t *data = NULL;
  for (int r = 0; r < repeats; r++) {
    int64_t begun = time_ns();
    check(oscar_sequence_save(sequence, &contents, saved));
    times[0][r] = (double)(time_ns() - begun) / 1e6;
    if (!data) {
      struct file_map map;
      check(file_map_open(context, saved, &map));
      bytes = map.bytes;
      if (!(data = malloc(bytes))) exit(1);
      file_map_close(&map);
      read_plain(saved, data, bytes);
    }
    begun = time_ns();
    write_plain(plain, data, bytes);
    times[1][r] = (double)(time_ns() - begun) / 1e6;
    oscar_snapshot *snapshot;
    oscar_sequence *restored;
    begun = time_ns();
    check(oscar_snapshot_open(context, saved, &snapshot));
    check(oscar_snapshot_restore(snapshot, engine->cache, contents.model, &restored));
    oscar_snapshot_close(snapshot);
    times[2][r] = (double)(time_ns() - begun) / 1e6;
    oscar_sequence_free(restored);
    begun = time_ns();
    read_plain(plain, data, bytes);
    times[3][r] = (double)(time_ns() - begun) / 1e6;
    oscar_capture *capture;
    begun = time_ns();
    check(oscar_sequence_capture(sequence, &contents, &capture));
    times[4][r] = (double)(time_ns() - begun) / 1e6;
    oscar_capture_free(capture);
  }
  static const char *const names[] = {"save", "plain write", "restore", "plain read", "copy"};
  printf("what,bytes,ms,least_ms,mb_per_s\n");
  for (int i = 0; i < 5; i++) print_times(names[i], times[i], repeats, bytes);
  free(data);
  unlink(saved);
  unlink(plain);
}

int main(int argc, char **argv) {
  struct engine_options options;
  engine_options_default(&options);
  int repeats = 15, tokens = 8192;
  const char *dir = getenv("TMPDIR") ? getenv("TMPDIR") : "/tmp";
  for (int i = 1; i < argc; i++) {
    const bool more = i + 1 < argc;
    if (argv[i][0] != '-')
      options.model_path = argv[i];
    else if (more && !strcmp(argv[i], "--kv"))
      options.kv = argv[++i];
    else if (more && !strcmp(argv[i], "--tokens"))
      tokens = atoi(argv[++i]);
    else if (more && !strcmp(argv[i], "--repeats"))
      repeats = atoi(argv[++i]);
    else if (more && !strcmp(argv[i], "--dir"))
      dir = argv[++i];
    else
      options.model_path = NULL, i = argc;
  }
  if (!options.model_path || tokens < 1 || repeats < 1 || repeats > MOST) {
    fprintf(stderr, "usage: bench_snapshot MODEL.gguf [--kv TYPE] [--tokens N] [--repeats 1..%d] [--dir DIR]\n", MOST);
    return 1;
  }
  options.context = tokens;
  struct engine engine;
  char error[1024];
  if (engine_open(&options, &engine, error, sizeof error) != OSCAR_OK) {
    fprintf(stderr, "bench_snapshot: %s\n", error);
    return 1;
  }
  context = engine.context;
  oscar_cache_options cache; /* another, with room for what is restored beside the sequence */
  check(engine_cache_options(context, engine.model, &engine.options, engine.codecs, &cache));
  cache.budget_bytes = oscar_cache_bytes_for(&cache, tokens, 2, engine.options.chunk);
  runner_free(engine.runner);
  oscar_cache_free(engine.cache);
  engine.runner = NULL, engine.cache = NULL;
  check(oscar_cache_create(context, &cache, &engine.cache));
  check(runner_create(engine.model, engine.cache, engine.options.chunk, &engine.runner));

  size_t bytes;
  const char *text = calibration_text(&bytes);
  int32_t *ids;
  int count;
  check(tokenizer_encode(model_tokenizer(engine.model), text, bytes, true, &ids, &count));
  if (count < tokens) {
    fprintf(stderr, "bench_snapshot: the text has %d tokens only\n", count);
    return 1;
  }
  oscar_sequence *sequence;
  check(oscar_sequence_create(engine.cache, &sequence));
  for (int at = 0; at < tokens; at += engine.options.chunk) {
    const int n = tokens - at < engine.options.chunk ? tokens - at : engine.options.chunk;
    check(runner_forward(engine.runner, sequence, n, ids + at, 0, NULL, NULL));
  }
  measure(&engine, sequence, ids, dir, repeats);
  mem_free(context, ids);
  engine_close(&engine);
  return 0;
}
