/*
 * sensitivity.c - what an error in a layer's attention costs, measured by making one.
 *
 * A short text is run once as it is and then once per layer with Gaussian noise added to that layer's attention output, a
 * twentieth of its size, at the tokens whose predictions are compared. The first tokens of a text get none: they are where models
 * keep what their later layers lean on (attention sinks), and they never read codes. The divergence of the model's predictions
 * from the undisturbed ones, over the squared noise that reached the residual stream, is the layer's cost: both grow with the
 * square of the noise as long as it is small. Noise comes from a generator with a fixed seed, so costs are the same every time.
 */
#include "engine/sensitivity.h"

#include "base/draw.h"
#include "engine/logits.h"

#include <math.h>
#include <string.h>

#define RELATIVE_NOISE 0.05

struct probe {
  const struct model *model;
  int layer;
  int quiet; /* tokens at the beginning that get no noise */
  struct draw draw;
  double energy;     /* out: squared noise in the residual stream, over all tokens that got some */
  const float *gram; /* [query_heads][d][d] of the layer */
};

/* The same variance in all channels of a layer: its error in the residual stream is then expected from the trace of W_O'W_O. */
static oscar_status disturb(void *user, int layer, int n, const float *q, const float *k, const float *v, float *o) {
  (void)q, (void)k, (void)v;
  struct probe *p = user;
  if (layer != p->layer) return OSCAR_OK;
  const struct model_geometry *g = model_geometry_of(p->model);
  size_t d = (size_t)g->head_dim, width = (size_t)g->query_heads * d, first = (size_t)p->quiet * width;
  size_t count = (size_t)(n - p->quiet) * width;
  double squares = 0, trace = 0;
  o += first;
  for (size_t i = 0; i < count; i++) squares += (double)o[i] * (double)o[i];
  double variance = RELATIVE_NOISE * RELATIVE_NOISE * squares / (double)count, sigma = sqrt(variance);
  for (size_t i = 0; i < count; i++) o[i] += (float)(sigma * draw_normal(&p->draw));
  for (size_t h = 0; h < (size_t)g->query_heads; h++)
    for (size_t i = 0; i < d; i++) trace += (double)p->gram[h * d * d + i * (d + 1)];
  p->energy += variance * trace * (double)(n - p->quiet);
  return OSCAR_OK;
}

/* Mean KL(a || b) of `rows` predictions. */
static double divergence(int rows, int vocab, int threads, const float *a, const float *b) {
  double sum = 0, rows_kl[SENSITIVITY_OUTPUTS];
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int r = 0; r < rows; r++) {
    const float *x = a + (size_t)r * (size_t)vocab, *y = b + (size_t)r * (size_t)vocab;
    double zx, zy, kl = 0;
    int32_t best;
    logits_summary(x, vocab, &zx, &best);
    logits_summary(y, vocab, &zy, &best);
    for (int i = 0; i < vocab; i++) kl += exp((double)x[i] - zx) * (((double)x[i] - zx) - ((double)y[i] - zy));
    rows_kl[r] = kl;
  }
  for (int r = 0; r < rows; r++) sum += rows_kl[r]; /* in order: the same whatever the threads */
  return sum / rows;
}

static oscar_status run(struct runner *runner, oscar_cache *cache, const int32_t *ids, int n, int outputs, float *logits,
                        const struct forward_observer *observer) {
  oscar_sequence *sequence = NULL;
  oscar_status status = oscar_sequence_create(cache, &sequence);
  if (status == OSCAR_OK) status = runner_forward(runner, sequence, n, ids, outputs, logits, observer);
  if (sequence) oscar_sequence_free(sequence);
  return status;
}

int64_t sensitivity_tokens(const struct model *model, int64_t n) { return n * (model_geometry_of(model)->layers + 1); }

oscar_status sensitivity_measure(struct model *model, struct runner *runner, oscar_cache *cache, const int32_t *ids, int n,
                                 bool (*report)(void *user, int tokens), void *user, double *costs) {
  oscar_context *context = model_context(model);
  const struct model_geometry *g = model_geometry_of(model);
  int outputs = n < SENSITIVITY_OUTPUTS ? n : SENSITIVITY_OUTPUTS;
  size_t d = (size_t)g->head_dim, count = (size_t)outputs * (size_t)g->vocab;
  float *gram = mem_alloc(context, (size_t)g->query_heads * d * d, sizeof *gram);
  float *plain = gram ? mem_alloc(context, count, sizeof *plain) : NULL;
  float *disturbed = plain ? mem_alloc(context, count, sizeof *disturbed) : NULL;
  oscar_status status = disturbed ? run(runner, cache, ids, n, outputs, plain, NULL) : OSCAR_NO_MEMORY;
  for (int layer = 0; status == OSCAR_OK && layer < g->layers; layer++) {
    struct probe probe = {.model = model, .layer = layer, .quiet = n - outputs, .draw = {(uint64_t)layer + 1}, .gram = gram};
    const struct forward_observer observer = {disturb, &probe};
    if (report && !report(user, n)) status = set_error(context, OSCAR_CANCELLED, "stopped while measuring layers");
    if (status == OSCAR_OK) status = model_output_gram(model, layer, gram);
    if (status == OSCAR_OK) status = run(runner, cache, ids, n, outputs, disturbed, &observer);
    double kl = status == OSCAR_OK ? divergence(outputs, g->vocab, context->options.threads, plain, disturbed) : 0;
    costs[layer] = probe.energy > 0 && kl > 0 ? kl / probe.energy : 0;
  }
  if (status == OSCAR_OK && report) report(user, n);
  mem_free(context, disturbed);
  mem_free(context, plain);
  mem_free(context, gram);
  return status;
}
