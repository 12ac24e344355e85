/*
 * bench/decode.c - whole decode steps of a model of a given shape, with random weights, over long histories.
 *
 *   bench_decode [--device cpu|cuda[:N]] [--weights bf16|fp8] [--shape NAME] [--kv bf16,int2] [--contexts 30000,60000,100000]
 *                [--batch 1,8,most] [--steps N] [--csv FILE] [--dir DIR]
 *
 * The weights go into a file in DIR (default: $TMPDIR or /tmp) that is unlinked as soon as it is open: Q8_0, which a GPU keeps in
 * BF16 or FP8. Histories are random keys and values that went through the cache as those of a prompt do: exact pages, then codes.
 * `int2` has the form that fits have: 2 bits, four log gains a row, a key mean that turns in half of the pairs. A step takes one
 * token of every sequence through the model and brings the logits back to the host. Steps are timed one by one; medians. `host`
 * is the time of a step in which the host did not wait; on a GPU steps are also timed as they are without being recorded
 * (`direct`), and choosing their tokens there (`sampled`). `most` sequences are as many as a GPU has memory for; where it does
 * not suffice for a number of them, the line says so and nothing else.
 */
#include "base/sort.h"
#include "engine/engine.h"
#include "model/gguf.h"
#include "quant/codec.h"
#include "rotation/hadamard.h"

#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define FILL_CHUNK 2048
#define MOST       256 /* sequences */
#define AS_FIT     0   /* in a list of numbers of sequences: as many as fit */

struct shape {
  const char *name;
  int layers, embedding, feed_forward, query_heads, kv_heads, head_dim, vocab;
};
/* Without norms of queries and keys, which cost next to nothing. */
static const struct shape shapes[] = {
    {"smollm2-135m", 30, 576, 1536, 9, 3, 64, 49152},   {"qwen2.5-1.5b", 28, 1536, 8960, 12, 2, 128, 151936},
    {"qwen3-4b", 36, 2560, 9728, 32, 8, 128, 151936},   {"qwen3-8b", 36, 4096, 12288, 32, 8, 128, 151936},
    {"qwen3-32b", 64, 5120, 25600, 64, 8, 128, 151936}, {"tiny", 2, 256, 512, 4, 2, 64, 512},
};

struct options {
  const char *device, *weights, *kv, *csv, *dir; /* csv: NULL for none */
  const struct shape *shape;
  int64_t contexts[16], batches[16];
  int n_contexts, n_batches, steps;
};

static oscar_context *context;

static void die(const char *what) {
  fprintf(stderr, "bench_decode: %s\n", what);
  exit(1);
}
static void die_of_file(const char *path) {
  fprintf(stderr, "bench_decode: %s: %s\n", path, strerror(errno));
  exit(1);
}
static void check(oscar_status status) {
  if (status != OSCAR_OK) die(oscar_last_error(context));
}

/* ---- a file of random weights ---- */

static uint64_t random_state = 1;
static uint64_t next_random(void) {
  uint64_t z = (random_state += 0x9E3779B97F4A7C15u);
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}
static float next_normal(void) {
  const double u = ((double)(next_random() >> 11) + .5) * 0x1p-53, v = ((double)(next_random() >> 11) + .5) * 0x1p-53;
  return (float)(sqrt(-2 * log(u)) * cos(6.283185307179586 * v));
}

struct out {
  FILE *file;
  uint64_t at; /* of tensor data */
};
static void put(struct out *o, const void *from, size_t bytes) {
  if (fwrite(from, 1, bytes, o->file) != bytes) die("the file of weights cannot be written: is there room?");
}
static void put_u32(struct out *o, uint32_t x) { put(o, &x, 4); }
static void put_u64(struct out *o, uint64_t x) { put(o, &x, 8); }
static void put_text(struct out *o, const char *text) {
  put_u64(o, strlen(text));
  put(o, text, strlen(text));
}
static void put_number(struct out *o, const char *key, uint32_t x) {
  put_text(o, key);
  put_u32(o, GGUF_UINT32);
  put_u32(o, x);
}
static void put_string(struct out *o, const char *key, const char *text) {
  put_text(o, key);
  put_u32(o, GGUF_STRING);
  put_text(o, text);
}

struct tensor {
  char name[64];
  uint64_t rows, cols; /* rows 1: a vector of ones */
};
static int list_tensors(const struct shape *s, struct tensor *list) {
  int n = 0;
  const uint64_t e = (uint64_t)s->embedding, f = (uint64_t)s->feed_forward, d = (uint64_t)s->head_dim,
                 q = (uint64_t)s->query_heads * d, kv = (uint64_t)s->kv_heads * d;
  list[n++] = (struct tensor){"token_embd.weight", (uint64_t)s->vocab, e};
  list[n++] = (struct tensor){"output.weight", (uint64_t)s->vocab, e};
  list[n++] = (struct tensor){"output_norm.weight", 1, e};
  const struct tensor each[] = {{"attn_norm", 1, e}, {"attn_q", q, e},      {"attn_k", kv, e},
                                {"attn_v", kv, e},   {"attn_output", e, q}, {"ffn_norm", 1, e},
                                {"ffn_gate", f, e},  {"ffn_up", f, e},      {"ffn_down", e, f}};
  for (int layer = 0; layer < s->layers; layer++)
    for (size_t i = 0; i < ARRAY_LENGTH(each); i++, n++) {
      list[n] = each[i];
      snprintf(list[n].name, sizeof list->name, "blk.%d.%.32s.weight", layer, each[i].name);
    }
  return n;
}
static uint64_t tensor_bytes(const struct tensor *t) { return t->rows == 1 ? 4 * t->cols : t->rows * (t->cols / 32) * 34; }

static void write_head(struct out *o, const struct shape *s, const struct tensor *list, int n) {
  static const char *const tokens[] = {"a", "b", "ab"};
  put(o, "GGUF", 4);
  put_u32(o, 3);
  put_u64(o, (uint64_t)n);
  put_u64(o, 2 + 9 + 5);
  put_string(o, "general.architecture", "llama");
  put_string(o, "general.name", s->name);
  put_number(o, "llama.block_count", (uint32_t)s->layers);
  put_number(o, "llama.embedding_length", (uint32_t)s->embedding);
  put_number(o, "llama.feed_forward_length", (uint32_t)s->feed_forward);
  put_number(o, "llama.attention.head_count", (uint32_t)s->query_heads);
  put_number(o, "llama.attention.head_count_kv", (uint32_t)s->kv_heads);
  put_number(o, "llama.attention.key_length", (uint32_t)s->head_dim);
  put_number(o, "llama.context_length", 1 << 20);
  put_text(o, "llama.rope.freq_base");
  put_u32(o, GGUF_FLOAT32);
  put(o, &(float){1e6f}, 4);
  put_text(o, "llama.attention.layer_norm_rms_epsilon");
  put_u32(o, GGUF_FLOAT32);
  put(o, &(float){1e-6f}, 4);
  put_string(o, "tokenizer.ggml.model", "gpt2");
  put_string(o, "tokenizer.ggml.pre", "gpt-2");
  put_text(o, "tokenizer.ggml.tokens");
  put_u32(o, GGUF_ARRAY);
  put_u32(o, GGUF_STRING);
  put_u64(o, 3);
  for (int i = 0; i < 3; i++) put_text(o, tokens[i]);
  put_text(o, "tokenizer.ggml.token_type");
  put_u32(o, GGUF_ARRAY);
  put_u32(o, GGUF_INT32);
  put_u64(o, 3);
  for (int i = 0; i < 3; i++) put_u32(o, 1);
  put_text(o, "tokenizer.ggml.merges");
  put_u32(o, GGUF_ARRAY);
  put_u32(o, GGUF_STRING);
  put_u64(o, 1);
  put_text(o, "a b");
  for (int i = 0; i < n; i++) {
    put_text(o, list[i].name);
    put_u32(o, list[i].rows == 1 ? 1 : 2);
    put_u64(o, list[i].cols);
    if (list[i].rows > 1) put_u64(o, list[i].rows);
    put_u32(o, list[i].rows == 1 ? WEIGHT_F32 : WEIGHT_Q8_0);
    put_u64(o, o->at);
    o->at += round_up(tensor_bytes(&list[i]), 32);
  }
  while (ftell(o->file) % 32) put(o, "", 1);
}

/* Numbers of variance 1 / cols, so that activations stay where they are in trained models. */
static void write_tensor(struct out *o, const struct tensor *t, uint8_t *block, size_t block_bytes) {
  static const uint8_t zeros[32] = {0};
  uint64_t bytes = tensor_bytes(t);
  if (t->rows == 1) {
    for (uint64_t i = 0; i < t->cols; i++) put(o, &(float){1}, 4);
  } else {
    const uint16_t scale = f32_to_f16((float)(1 / (74 * sqrt((double)t->cols))));
    for (size_t i = 0; i < block_bytes; i += 34) memcpy(block + i, &scale, 2);
    for (uint64_t done = 0; done < bytes; done += block_bytes)
      put(o, block, (size_t)(bytes - done < block_bytes ? bytes - done : block_bytes));
  }
  put(o, zeros, (size_t)(round_up(bytes, 32) - bytes));
}

/* The path of the file, which lives until it is unlinked. */
static void write_weights(const struct shape *s, const char *dir, char *path, size_t room) {
  snprintf(path, room, "%s/bench-decode-XXXXXX.gguf", dir);
  const int file = mkstemps(path, 5);
  if (file < 0) die("no file of weights can be made: see --dir");
  struct out o = {.file = fdopen(file, "wb")};
  struct tensor *list = calloc((size_t)s->layers * 9 + 3, sizeof *list);
  const size_t block_bytes = 34 << 20;
  uint8_t *block = malloc(block_bytes);
  if (!o.file || !list || !block) die("out of memory");
  for (size_t i = 0; i + 8 <= block_bytes; i += 8) memcpy(block + i, &(uint64_t){next_random()}, 8);
  const int n = list_tensors(s, list);
  write_head(&o, s, list, n);
  for (int i = 0; i < n; i++) write_tensor(&o, &list[i], block, block_bytes);
  if (fclose(o.file)) die("the file of weights cannot be written: is there room?");
  free(list);
  free(block);
}

/* ---- codecs in the form of fitted ones ---- */

static oscar_codec *make_codec(const struct shape *s, oscar_side side, oscar_rope *rope) {
  const int d = s->head_dim, pairs = rope ? d / 4 : 0;
  float *encode = malloc(sizeof(float) * (size_t)(d * d)), *steps = malloc(sizeof(float) * (size_t)d);
  float *mean = malloc(sizeof(float) * (size_t)d), *rotating = malloc(sizeof(float) * (size_t)d);
  uint16_t *pair = malloc(sizeof(uint16_t) * (size_t)d);
  int8_t *signs = malloc((size_t)(d * d));
  if (!encode || !steps || !mean || !rotating || !pair || !signs) die("out of memory");
  check(hadamard_signs(context, d, signs));
  for (int i = 0; i < d * d; i++) encode[i] = signs[i] / sqrtf((float)d);
  for (int i = 0; i < d; i++) {
    steps[i] = codec_gaussian_step(1);
    mean[i] = 0.1f * next_normal();
    rotating[i] = 0.5f * next_normal();
    pair[i] = (uint16_t)(2 * i + i % 2); /* any of them, in order */
  }
  const oscar_codec_spec spec = {.head_dim = d,
                                 .channels = d,
                                 .form = OSCAR_ROW_LOG_GAINS,
                                 .groups = 4,
                                 .steps = steps,
                                 .mean = mean,
                                 .encode = encode,
                                 .rope = side == OSCAR_KEYS ? rope : NULL,
                                 .rotating_pairs = side == OSCAR_KEYS ? pairs : 0,
                                 .rotating_pair = pair,
                                 .rotating_mean = rotating};
  oscar_codec *codec;
  check(oscar_codec_create(context, &spec, &codec));
  free(encode), free(steps), free(mean), free(rotating), free(pair), free(signs);
  return codec;
}

static oscar_codec_set *make_codecs(const struct shape *s, const struct model *model) {
  const oscar_codec_set_info info = {s->layers, s->kv_heads, s->head_dim, "int2", "", ""};
  oscar_codec_set *set;
  oscar_rope *rope;
  check(model_layer_rope(model, 0, &rope));
  check(oscar_codec_set_create(context, &info, &set));
  for (int side = 0; side < 2; side++) {
    oscar_codec *codec = make_codec(s, (oscar_side)side, side == OSCAR_KEYS ? rope : NULL);
    for (int i = 0; i < s->layers * s->kv_heads; i++)
      check(oscar_codec_set_assign(set, i / s->kv_heads, i % s->kv_heads, (oscar_side)side, codec));
    oscar_codec_release(codec);
  }
  oscar_rope_release(rope);
  return set;
}

/* ---- steps ---- */

static void fill(oscar_sequence *sequence, const struct shape *s, int64_t tokens, const float *k, const float *v) {
  for (int64_t done = 0; done < tokens; done += FILL_CHUNK) {
    const int n = (int)(tokens - done < FILL_CHUNK ? tokens - done : FILL_CHUNK);
    check(oscar_sequence_begin(sequence, n));
    for (int layer = 0; layer < s->layers; layer++) check(oscar_sequence_write(sequence, layer, k, v));
    check(oscar_sequence_commit(sequence));
  }
}

/* The buffer of the backend with random floats. */
static float *random_buffer(struct backend *be, size_t floats) {
  float *host = malloc(floats * sizeof *host), *buffer;
  if (!host) die("out of memory");
  for (size_t i = 0; i < floats; i++) host[i] = next_normal();
  check(be->ops->buffer_alloc(be, floats, &buffer));
  check(be->ops->upload(be, buffer, host, floats));
  free(host);
  return buffer;
}

/* Median seconds of a step, and of its part on the host. */
struct step_times {
  double step, host;
};

#define UNTIMED 3 /* steps, before some are timed */

static struct step_times time_some(struct runner *runner, int batch, const struct forward_job *jobs, int steps, bool sampled) {
  double *times = calloc(2 * (size_t)steps, sizeof *times), *host = times + steps;
  if (!times) die("out of memory");
  for (int i = -UNTIMED; i < steps; i++) {
    struct sampling sampling[MOST];
    int32_t next[MOST];
    for (int k = 0; k < batch; k++) sampling[k] = (struct sampling){0.8f, 40, 0.95f, 0.05f, 0.5};
    const int64_t begun = time_ns();
    check(sampled ? runner_sample_all(runner, batch, jobs, sampling, next) : runner_forward_all(runner, batch, jobs));
    if (i < 0) continue;
    times[i] = 1e-9 * (double)(time_ns() - begun);
    host[i] = 1e-9 * (double)runner_host_ns(runner);
  }
  sort_doubles(times, (size_t)steps);
  sort_doubles(host, (size_t)steps);
  const struct step_times medians = {times[steps / 2], host[steps / 2]};
  free(times);
  return medians;
}

/* A GPU that had little to do takes a while until its clock is up: steps until some time has passed. */
#define WARMING_STEPS 40
#define WARMING_NS    250000000
static void warm_up(struct runner *runner, int batch, const struct forward_job *jobs) {
  const int64_t begun = time_ns();
  for (int i = 0; i < WARMING_STEPS && time_ns() - begun < WARMING_NS; i++) check(runner_forward_all(runner, batch, jobs));
}

#define DEMOTIONS 3

/* Median seconds of a step that demotes a page of every sequence. */
static double time_demotions(struct runner *runner, int batch, const struct forward_job *jobs) {
  double times[DEMOTIONS];
  for (int seen = 0; seen < DEMOTIONS;) {
    const bool demotes = oscar_sequence_length(jobs[0].sequence) % OSCAR_PAGE_TOKENS == 0;
    const int64_t begun = time_ns();
    check(runner_forward_all(runner, batch, jobs));
    if (demotes) times[seen++] = 1e-9 * (double)(time_ns() - begun);
  }
  sort_doubles(times, DEMOTIONS);
  return times[DEMOTIONS / 2];
}

/* Tokens that a sequence comes to have. */
static int64_t longest_of(const struct options *o, int64_t tokens) {
  return tokens + WARMING_STEPS + 3 * (UNTIMED + o->steps) + (DEMOTIONS + 1) * OSCAR_PAGE_TOKENS;
}

/* Of so many sequences with so many tokens each. */
struct measurement {
  struct step_times normal, direct, sampled; /* direct, sampled: on a GPU */
  double demoting;                           /* what a step takes more that demotes a page of every sequence; seconds */
  size_t held_bytes;
};

/* Of a cache for `batch` sequences; one at a time is filled by chunks. */
static size_t budget_for(const oscar_cache_options *options, int64_t longest, int batch) {
  return oscar_cache_bytes_for(options, longest, batch, 1) + oscar_cache_bytes_for(options, longest, 1, FILL_CHUNK) -
         oscar_cache_bytes_for(options, longest, 1, 1);
}

/* What all measurements have: k and v are what caches are filled with, [FILL_CHUNK][kv_heads][head_dim]. */
struct subject {
  const struct options *options;
  struct backend *be;
  struct model *model;
  float *k, *v;
};

/* False where memory does not suffice. */
static bool time_steps(const struct subject *subject, const oscar_cache_options *form, int64_t tokens, int batch,
                       struct measurement *m) {
  const struct options *o = subject->options;
  const struct shape *s = o->shape;
  oscar_cache_options options = *form;
  oscar_cache *cache;
  struct runner *runner = NULL;
  bool room = false;
  float *logits = malloc(sizeof(float) * (size_t)batch * (size_t)s->vocab);
  struct forward_job *jobs = calloc((size_t)batch, sizeof *jobs);
  if (!logits || !jobs) die("out of memory");
  const int32_t id = 1;
  options.budget_bytes = budget_for(form, longest_of(o, tokens), batch);
  if (oscar_cache_create(context, &options, &cache) != OSCAR_OK) goto free_host;
  if (runner_create(subject->model, cache, batch, &runner) != OSCAR_OK) goto free_cache;
  for (int i = 0; i < batch; i++) {
    oscar_sequence *sequence;
    check(oscar_sequence_create(cache, &sequence));
    fill(sequence, s, tokens, subject->k, subject->v);
    jobs[i] = (struct forward_job){
        .sequence = sequence, .n = 1, .ids = &id, .outputs = 1, .logits = logits + (size_t)i * (size_t)s->vocab};
  }
  *m = (struct measurement){0};
  if (subject->be->cuda) warm_up(runner, batch, jobs);
  m->normal = time_some(runner, batch, jobs, o->steps, false);
  if (form->codecs) m->demoting = time_demotions(runner, batch, jobs) - m->normal.step;
  if (runner_can_sample(runner)) m->sampled = time_some(runner, batch, jobs, o->steps, true);
  runner_record(runner, false);
  if (subject->be->cuda) m->direct = time_some(runner, batch, jobs, o->steps, false);
  room = true;
  oscar_cache_usage usage;
  oscar_cache_usage_get(cache, &usage);
  m->held_bytes = usage.held_bytes;
free_cache:
  runner_free(runner);
  oscar_cache_free(cache);
free_host:
  free(jobs);
  free(logits);
  return room;
}

/* The same of as many sequences as fit a GPU, where `batch` is AS_FIT; it becomes their number. */
static bool time_most(const struct subject *subject, const oscar_cache_options *form, int64_t tokens, int *batch,
                      struct measurement *m) {
  if (*batch != AS_FIT) return time_steps(subject, form, tokens, *batch, m);
  const size_t free_bytes = backend_cuda_free_bytes(subject->be);
  *batch = MOST;
  while (*batch > 0 && budget_for(form, longest_of(subject->options, tokens), *batch) > free_bytes) --*batch;
  while (*batch > 0 && !time_steps(subject, form, tokens, *batch, m)) --*batch; /* steps need memory too */
  return *batch > 0;
}

/* ---- tables ---- */

/* Of demotion in the steps of a page. */
static double demoting_share(const struct measurement *m) { return m->demoting / (OSCAR_PAGE_TOKENS * m->normal.step); }

static void print_heads(bool on_gpu) {
  printf("%-6s %8s %6s %10s %11s %10s %10s %18s", "kv", "context", "batch", "ms/step", "tokens/s", "cache GB", "host ms",
         "demote ms (share)");
  if (on_gpu) printf(" %10s %10s %10s %10s", "direct ms", "host ms", "sampled ms", "host ms");
  printf("\n");
}

static void print_row(const char *kv, int64_t tokens, int batch, bool on_gpu, const struct measurement *m) {
  printf("%-6s %8lld %6d %10.3f %11.1f %10.2f %10.3f %8.3f (%5.2f %%)", kv, (long long)tokens, batch, 1e3 * m->normal.step,
         batch / m->normal.step, 1e-9 * (double)m->held_bytes, 1e3 * m->normal.host, 1e3 * m->demoting, 100 * demoting_share(m));
  if (on_gpu)
    printf(" %10.3f %10.3f %10.3f %10.3f", 1e3 * m->direct.step, 1e3 * m->direct.host, 1e3 * m->sampled.step,
           1e3 * m->sampled.host);
  printf("\n");
  fflush(stdout);
}

static const char *const csv_heads =
    "device,shape,kv,context,sequences,step_ms,sampled_ms,direct_ms,host_ms,demoting_ms,demoting_share,cache_bytes\n";
static void write_row(FILE *csv, const struct options *o, const char *device, const char *kv, int64_t tokens, int batch,
                      const struct measurement *m) {
  fprintf(csv, "\"%s\",%s,%s,%lld,%d,%.4f,%.4f,%.4f,%.4f,%.4f,%.6f,%zu\n", device, o->shape->name, kv, (long long)tokens, batch,
          1e3 * m->normal.step, 1e3 * m->sampled.step, 1e3 * m->direct.step, 1e3 * m->normal.host, 1e3 * m->demoting,
          demoting_share(m), m->held_bytes);
  fflush(csv);
}

/* ---- the command line ---- */

/* Whether a list goes on with this word. */
static bool is_next(const char *list, const char *word) {
  const size_t length = strcspn(list, ",");
  return length == strlen(word) && strncmp(list, word, length) == 0;
}
static const char *after_next(const char *list) {
  const size_t length = strcspn(list, ",");
  return list + length + (list[length] == ',');
}

/* Numbers, or "most", which is AS_FIT. Their count, 0 for anything else. */
static int parse_list(const char *text, int64_t *list) {
  int n = 0;
  for (; *text && n < 16; text = after_next(text), n++) {
    list[n] = AS_FIT;
    if (is_next(text, "most")) continue;
    char *end;
    list[n] = strtoll(text, &end, 10);
    if (list[n] < 1 || end != text + strcspn(text, ",")) return 0;
  }
  return n;
}

static bool parse(int argc, char **argv, struct options *o) {
  for (int i = 1; i < argc; i += 2) {
    const char *name = argv[i], *value = i + 1 < argc ? argv[i + 1] : "";
    if (strcmp(name, "--device") == 0) {
      o->device = value;
    } else if (strcmp(name, "--weights") == 0) {
      o->weights = value;
    } else if (strcmp(name, "--kv") == 0) {
      o->kv = value;
    } else if (strcmp(name, "--csv") == 0) {
      o->csv = value;
    } else if (strcmp(name, "--dir") == 0) {
      o->dir = value;
    } else if (strcmp(name, "--contexts") == 0) {
      o->n_contexts = parse_list(value, o->contexts);
    } else if (strcmp(name, "--batch") == 0) {
      o->n_batches = parse_list(value, o->batches);
    } else if (strcmp(name, "--steps") == 0) {
      o->steps = atoi(value);
    } else if (strcmp(name, "--shape") == 0) {
      o->shape = NULL;
      for (size_t k = 0; k < ARRAY_LENGTH(shapes); k++)
        if (strcmp(shapes[k].name, value) == 0) o->shape = &shapes[k];
    } else {
      return false;
    }
  }
  for (int i = 0; i < o->n_batches; i++)
    if (o->batches[i] > MOST) return false;
  for (int i = 0; i < o->n_contexts; i++)
    if (o->contexts[i] == AS_FIT) return false;
  return o->shape && o->n_contexts > 0 && o->n_batches > 0 && o->steps > 0;
}

int main(int argc, char **argv) {
  const char *temporary = getenv("TMPDIR");
  struct options o = {.device = "cpu",
                      .kv = "bf16,int2",
                      .dir = temporary && *temporary ? temporary : "/tmp",
                      .shape = &shapes[3],
                      .contexts = {30000, 60000, 100000},
                      .batches = {1, 8},
                      .n_contexts = 3,
                      .n_batches = 2,
                      .steps = 20};
  if (!parse(argc, argv, &o)) {
    fprintf(stderr, "usage: bench_decode [--device cpu|cuda[:N]] [--weights bf16|fp8] [--shape NAME] [--kv bf16,int2] "
                    "[--contexts LIST] [--batch LIST] [--steps N] [--csv FILE] [--dir DIR]\nshapes:");
    for (size_t i = 0; i < ARRAY_LENGTH(shapes); i++) fprintf(stderr, " %s", shapes[i].name);
    fprintf(stderr, "; at most %d sequences, or `most`: as many as a GPU has memory for\n", MOST);
    return 2;
  }
  if (oscar_context_create(NULL, &context) != OSCAR_OK) die("the library could not be started");
  oscar_cuda *cuda = NULL;
  struct backend *be;
  struct model *model;
  char path[4096], text[256];
  FILE *csv = o.csv ? fopen(o.csv, "w") : NULL;
  if (o.csv && !csv) die_of_file(o.csv);
  check(device_open(context, o.device, o.weights, &cuda, &be));
  for (int i = 0; i < o.n_batches; i++)
    if (o.batches[i] == AS_FIT && !cuda) die("--batch most: as many as fit are counted on a GPU");
  write_weights(o.shape, o.dir, path, sizeof path);
  const oscar_status status = model_load(context, be, path, &model);
  unlink(path);
  check(status);
  be->ops->describe(be, text, sizeof text);
  printf("%s with random weights, %.2f GB read for a token; %s\n", o.shape->name,
         1e-9 * (double)model_read_bytes_per_token(model), text);
  oscar_cuda_info info = {.name = "CPU"};
  if (cuda) oscar_cuda_describe(cuda, &info);
  const size_t floats = (size_t)FILL_CHUNK * (size_t)(o.shape->kv_heads * o.shape->head_dim);
  const struct subject subject = {&o, be, model, random_buffer(be, floats), random_buffer(be, floats)};
  if (csv) fputs(csv_heads, csv);
  print_heads(cuda);
  for (const char *at = o.kv; *at; at = after_next(at)) {
    const bool coded = is_next(at, "int2");
    if (!coded && !is_next(at, "bf16")) die("--kv takes bf16 and int2");
    const char *kv = coded ? "int2" : "bf16";
    oscar_cache_options form;
    model_cache_options(model, &form);
    oscar_codec_set *codecs = coded ? make_codecs(o.shape, model) : NULL;
    form.codecs = codecs;
    for (int i = 0; i < o.n_contexts; i++)
      for (int j = 0; j < o.n_batches; j++) {
        struct measurement m;
        int batch = (int)o.batches[j];
        if (!time_most(&subject, &form, o.contexts[i], &batch, &m)) {
          printf("%-6s %8lld %6lld %10s\n", kv, (long long)o.contexts[i], (long long)(batch == AS_FIT ? 1 : batch), "no room");
          fflush(stdout);
          continue;
        }
        print_row(kv, o.contexts[i], batch, cuda, &m);
        if (csv) write_row(csv, &o, info.name, kv, o.contexts[i], batch, &m);
      }
    oscar_codec_set_free(codecs);
  }
  if (csv && (ferror(csv) || fclose(csv) != 0)) die_of_file(o.csv);
  be->ops->buffer_free(be, subject.k);
  be->ops->buffer_free(be, subject.v);
  model_free(model);
  be->ops->free(be);
  oscar_cuda_free(cuda);
  oscar_context_free(context);
  return 0;
}
