/*
 * bench/weight_forms.c - what FP8 weights cost in logits: a model with rounded weights beside the same with exact ones, on the
 * CPU.
 *
 *     bench_weight_forms MODEL.gguf TEXT [TOKENS]
 *
 * Weights are rounded as a GPU keeps them with --weights fp8, and otherwise, to see what its choices are worth: output and
 * embedding in FP8 too, a scale for every 128 inputs of a row, scales that take the largest magnitude elsewhere. Both models read
 * the same windows of 1024 tokens with a BF16 cache. KL is in nats, over all positions, with p of the exact weights. Embeddings
 * that are a tensor of their own stay exact.
 */
#include "backend/e4m3.h"
#include "model/model_private.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#define WINDOW 1024
#define CHUNK  256

enum rounding { TO_BF16, TO_E4M3 };

static const struct variant {
  const char *name;
  enum rounding layers, output;
  int group;   /* inputs that share a scale; 0: all of a row */
  float above; /* scales are so many times what takes the largest magnitude to 448 */
} variants[] = {
    {"bf16", TO_BF16, TO_BF16, 0, 1},
    {"fp8", TO_E4M3, TO_BF16, 0, 1},
    {"fp8, output too", TO_E4M3, TO_E4M3, 0, 1},
    {"fp8, scales x 1.13", TO_E4M3, TO_BF16, 0, 1.13f},
    {"fp8, scales x 1.3", TO_E4M3, TO_BF16, 0, 1.3f},
    {"fp8, scales x 1.6", TO_E4M3, TO_BF16, 0, 1.6f},
    {"fp8, groups of 128", TO_E4M3, TO_BF16, 128, 1},
    {"the same x 1.13", TO_E4M3, TO_BF16, 128, 1.13f},
    {"the same x 1.3", TO_E4M3, TO_BF16, 128, 1.3f},
    {"the same x 1.6", TO_E4M3, TO_BF16, 128, 1.6f},
};

static oscar_context *context;

static void die(const char *what) {
  fprintf(stderr, "bench_weight_forms: %s\n", what);
  exit(1);
}
static void check(oscar_status status) {
  if (status != OSCAR_OK) die(oscar_last_error(context));
}
static void *allocate(size_t bytes) {
  void *memory = malloc(bytes);
  if (!memory) die("out of memory");
  return memory;
}

/* ---- weights ---- */

/* Elements that share a scale. */
static void round_group(const struct variant *v, enum rounding rounding, int64_t n, float *x) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < n; i++) {
    const uint32_t bits = e4m3_float_bits(fabsf(x[i]));
    if (bits > largest) largest = bits;
  }
  const float scale = e4m3_scale(largest) * v->above;
  for (int64_t i = 0; i < n; i++)
    x[i] = rounding == TO_E4M3 ? e4m3_to_f32(f32_to_e4m3(x[i] / scale)) * scale : bf16_to_f32(f32_to_bf16(x[i]));
}

/* The weight becomes one of floats in memory that `held` lists; v NULL: exact ones. Sums squares of errors and of elements. */
struct floats {
  struct floats *next;
  float x[];
};
static void replace(struct weight *w, const struct variant *v, enum rounding rounding, struct floats **held, double sums[2]) {
  const int64_t count = w->rows * w->cols, group = v && v->group ? v->group : w->cols;
  struct floats *made = allocate(sizeof *made + (size_t)count * sizeof(float));
  float *exact = allocate((size_t)count * sizeof *exact);
  made->next = *held;
  *held = made;
  weight_dequantize(w->type, count, w->data, exact);
  for (int64_t i = 0; i < count; i++) made->x[i] = exact[i];
  for (int64_t r = 0; v && r < w->rows; r++)
    for (int64_t c = 0; c < w->cols; c += group)
      round_group(v, rounding, w->cols - c < group ? w->cols - c : group, made->x + r * w->cols + c);
  for (int64_t i = 0; i < count; i++) {
    sums[0] += pow((double)made->x[i] - (double)exact[i], 2);
    sums[1] += pow((double)exact[i], 2);
  }
  free(exact);
  w->type = WEIGHT_F32;
  w->data = made->x;
  w->packed = NULL;
}

static double round_model(struct model *m, const struct variant *v, struct floats **held) {
  double sums[2] = {0};
  for (int i = 0; i < m->parameters.geometry.layers; i++) {
    struct layer_weights *l = &m->weights.layers[i];
    struct weight *const weights[] = {&l->q, &l->k, &l->v, &l->output, &l->gate, &l->up, &l->down};
    for (size_t k = 0; k < ARRAY_LENGTH(weights); k++) replace(weights[k], v, v ? v->layers : TO_BF16, held, sums);
  }
  const bool apart = embedding_is_apart(m);
  replace(&m->weights.output, v, v ? v->output : TO_BF16, held, (double[2]){0});
  if (!apart) m->weights.embedding = m->weights.output;
  return sqrt(sums[0] / sums[1]);
}

/* ---- models ---- */

struct side {
  struct backend *backend;
  struct model *model;
  oscar_cache *cache;
  struct runner *runner;
  oscar_sequence *sequence;
  struct floats *held;
  double error; /* of the layers' weights, of their size */
  float *logits;
};

static void open_side(struct side *s, const char *path, const struct variant *v) {
  oscar_cache_options options;
  *s = (struct side){0};
  check(backend_create_cpu(context, &s->backend));
  check(model_load(context, s->backend, path, &s->model));
  s->error = round_model(s->model, v, &s->held);
  model_cache_options(s->model, &options);
  options.budget_bytes = oscar_cache_bytes_for(&options, WINDOW, 1, CHUNK);
  check(oscar_cache_create(context, &options, &s->cache));
  check(runner_create(s->model, s->cache, CHUNK, &s->runner));
  s->logits = allocate(sizeof(float) * CHUNK * (size_t)model_geometry_of(s->model)->vocab);
}

static void close_side(struct side *s) {
  free(s->logits);
  runner_free(s->runner);
  oscar_cache_free(s->cache);
  model_free(s->model);
  s->backend->ops->free(s->backend);
  for (struct floats *next; s->held; s->held = next) {
    next = s->held->next;
    free(s->held);
  }
}

static void run_chunk(struct side *s, const int32_t *ids, bool first) {
  if (first && s->sequence) oscar_sequence_free(s->sequence);
  if (first) check(oscar_sequence_create(s->cache, &s->sequence));
  check(runner_forward(s->runner, s->sequence, CHUNK, ids, CHUNK, s->logits, NULL));
}

/* ---- logits ---- */

static double log_sum(int n, const float *x, int *most) {
  double sum = 0;
  *most = 0;
  for (int i = 1; i < n; i++)
    if (x[i] > x[*most]) *most = i;
  for (int i = 0; i < n; i++) sum += exp((double)x[i] - (double)x[*most]);
  return log(sum) + (double)x[*most];
}

struct totals {
  double kl, squares, same;
  int64_t count;
};
static void add_position(int n, const float *a, const float *b, struct totals *t) {
  int most_a, most_b;
  const double za = log_sum(n, a, &most_a), zb = log_sum(n, b, &most_b);
  double kl = 0;
  for (int i = 0; i < n; i++) kl += exp((double)a[i] - za) * (((double)a[i] - za) - ((double)b[i] - zb));
  t->kl += kl;
  t->squares += kl * kl;
  t->same += most_a == most_b;
  t->count++;
}

static void compare(const char *path, const struct variant *v, const int32_t *ids, int64_t tokens) {
  struct side exact, rounded;
  struct totals t = {0};
  open_side(&exact, path, NULL);
  open_side(&rounded, path, v);
  const int vocab = model_geometry_of(exact.model)->vocab;
  const size_t row = (size_t)vocab;
  for (int64_t done = 0; done + CHUNK <= tokens; done += CHUNK) {
    run_chunk(&exact, ids + done, done % WINDOW == 0);
    run_chunk(&rounded, ids + done, done % WINDOW == 0);
    for (int i = 0; i < CHUNK; i++) add_position(vocab, exact.logits + (size_t)i * row, rounded.logits + (size_t)i * row, &t);
  }
  const double count = (double)t.count, mean = t.kl / count;
  printf("%-20s %8.2f %% %10.5f +- %.5f %9.2f %%\n", v->name, 100 * rounded.error, mean,
         sqrt((t.squares / count - mean * mean) / count), 100 * t.same / count);
  fflush(stdout);
  oscar_sequence_free(exact.sequence);
  oscar_sequence_free(rounded.sequence);
  close_side(&exact);
  close_side(&rounded);
}

/* Ids of the text's beginning; the caller frees them with mem_free. */
static int32_t *read_text(const char *model_path, const char *path, int64_t tokens) {
  const size_t most = (size_t)tokens * 16;
  char *text = allocate(most);
  FILE *file = fopen(path, "rb");
  if (!file) die("the text cannot be read");
  const size_t bytes = fread(text, 1, most, file);
  fclose(file);
  struct backend *backend;
  struct model *model;
  int32_t *ids;
  int count;
  check(backend_create_cpu(context, &backend));
  check(model_load(context, backend, model_path, &model));
  check(tokenizer_encode(model_tokenizer(model), text, bytes, false, &ids, &count));
  if (count < tokens) die("the text has fewer tokens");
  model_free(model);
  backend->ops->free(backend);
  free(text);
  return ids;
}

int main(int argc, char **argv) {
  const int64_t tokens = argc > 3 ? atoll(argv[3]) : 2 * WINDOW;
  if (argc < 3 || argc > 4 || tokens < CHUNK) {
    fprintf(stderr, "usage: bench_weight_forms MODEL.gguf TEXT [TOKENS]\n");
    return 2;
  }
  if (oscar_context_create(NULL, &context) != OSCAR_OK) die("the library could not be started");
  int32_t *ids = read_text(argv[1], argv[2], tokens);
  printf("%-20s %10s %21s %11s\n", "weights", "error", "mean KL", "top-1");
  for (size_t i = 0; i < ARRAY_LENGTH(variants); i++) compare(argv[1], &variants[i], ids, tokens);
  mem_free(context, ids);
  oscar_context_free(context);
  return 0;
}
