/*
 * attention_facts.c - what a calibration wants to know of a layer's attention: how it rotates, what it sees, and how its output
 * goes on.
 */
#include "model/model_private.h"

#include "base/team.h"

#include <cblas.h>
#include <math.h>

int model_layer_window(const struct model *m, int layer) { return layer_window(m->architecture, &m->parameters, layer); }

oscar_status model_layer_rope(const struct model *m, int layer, oscar_rope **rope) {
  const struct rope_spec *r = model_layer_window(m, layer) ? &m->parameters.window_rope : &m->parameters.rope;
  float frequencies[OSCAR_MAX_HEAD_DIM / 2];
  *rope = NULL;
  if (r->rotary_dim > OSCAR_MAX_HEAD_DIM)
    return set_error(m->context, OSCAR_UNSUPPORTED, "RoPE over %d channels; at most %d can be coded", r->rotary_dim,
                     OSCAR_MAX_HEAD_DIM);
  for (int i = 0; i < r->rotary_dim / 2; i++) {
    double frequency = (double)r->linear_scale * pow((double)r->base, -2.0 * i / r->rotary_dim);
    frequencies[i] = (float)(r->factors ? frequency / (double)r->factors[i] : frequency);
  }
  const oscar_rope_layout layout = r->kind == ROPE_NEOX ? OSCAR_ROPE_HALVES : OSCAR_ROPE_ADJACENT;
  return oscar_rope_create(m->context, &(oscar_rope_spec){layout, r->rotary_dim, frequencies}, rope);
}

oscar_status model_output_gram(const struct model *m, int layer, float *gram) {
  const struct model_geometry *g = &m->parameters.geometry;
  const struct weight *w = &m->weights.layers[layer].output;
  size_t d = (size_t)g->head_dim;
  float *weights = mem_alloc(m->context, (size_t)(w->rows * w->cols), sizeof *weights);
  if (!weights) return OSCAR_NO_MEMORY;
  weight_dequantize(w->type, w->rows * w->cols, w->data, weights);
  release_if_packed(m, w);
  team_before_openmp(m->context);
  for (int h = 0; h < g->query_heads; h++)
    cblas_sgemm(CblasRowMajor, CblasTrans, CblasNoTrans, g->head_dim, g->head_dim, (int)w->rows, 1, weights + (size_t)h * d,
                (int)w->cols, weights + (size_t)h * d, (int)w->cols, 0, gram + (size_t)h * d * d, g->head_dim);
  mem_free(m->context, weights);
  return OSCAR_OK;
}
