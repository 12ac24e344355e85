/*
 * panels.c - products with many tokens through oneDNN, over panels of expanded weights.
 *
 * A panel is a few hundred rows of a weight, expanded to BF16 (on CPUs that multiply it) or float into one buffer of fixed size
 * and multiplied while it is in the cache: the expanded model never exists, and the memory does not grow with it.
 *
 * BF16 rounds both factors to 8 bits and adds up in float: a result differs from the exact product by less than 2^-8 of the root
 * sum of squares of its terms as a rule, by 2^-7 of the sum of their magnitudes at most; tests/backend/test_products.c holds it
 * to that. With F32 only the additions round.
 *
 * oneDNN works in OpenMP's threads, as everything here does: their number is set for the duration of a call, because oneDNN
 * takes it from the runtime when it plans and when it works. Plans (primitives) are expensive to make and are kept by shape.
 */
#include "backend/cpu/cpu.h"

#include <omp.h>
#include <oneapi/dnnl/dnnl.h>
#include <stdio.h>

#define PANEL_BYTES   ((size_t)8 << 20)
#define PANEL_ROWS    64 /* rows of a panel are a multiple of this, and at least this */
#define KEPT_PRODUCTS 48 /* distinct shapes of one model are about ten per number of tokens */

/* y [n][stride], the first `rows` of each row = x [n][cols] times the panel [rows][cols], transposed */
struct shape {
  int64_t n, rows, cols, stride;
};
struct product {
  struct shape shape;
  uint64_t used; /* 0: free */
  dnnl_primitive_t primitive;
  dnnl_memory_t x, panel, y, scratch;
  size_t scratch_bytes;
};

struct panels {
  oscar_context *context;
  bool bf16;
  dnnl_engine_t engine;
  dnnl_stream_t stream;
  uint64_t clock;
  struct product products[KEPT_PRODUCTS];
  struct scratch panel, tokens, library;
};

static oscar_status library_error(oscar_context *context, dnnl_status_t status, const char *what) {
  return set_error(context, status == dnnl_out_of_memory ? OSCAR_NO_MEMORY : OSCAR_UNSUPPORTED, "oneDNN could not %s (status %d)",
                   what, (int)status);
}

static void product_clear(struct product *p) {
  if (p->primitive) dnnl_primitive_destroy(p->primitive);
  dnnl_memory_t memories[] = {p->x, p->panel, p->y, p->scratch};
  for (size_t i = 0; i < ARRAY_LENGTH(memories); i++)
    if (memories[i]) dnnl_memory_destroy(memories[i]);
  *p = (struct product){0};
}

void panels_free(struct cpu_backend *cpu) {
  struct panels *panels = cpu->panels;
  if (!panels) return;
  oscar_context *context = panels->context;
  for (int i = 0; i < KEPT_PRODUCTS; i++) product_clear(&panels->products[i]);
  if (panels->stream) dnnl_stream_destroy(panels->stream);
  if (panels->engine) dnnl_engine_destroy(panels->engine);
  scratch_free(context, &panels->panel);
  scratch_free(context, &panels->tokens);
  scratch_free(context, &panels->library);
  mem_free(context, panels);
  cpu->panels = NULL;
}

bool panels_use_bf16(const struct cpu_backend *cpu) {
  const struct cpu_features *features = &cpu->base.context->cpu;
  return cpu->kernels->round_bf16 && (features->avx512_bf16 || features->amx_bf16);
}

void panels_library(char *text, size_t bytes) {
  const dnnl_version_t *version = dnnl_version();
  snprintf(text, bytes, "oneDNN %d.%d.%d", version->major, version->minor, version->patch);
}

static oscar_status panels_create(struct cpu_backend *cpu) {
  oscar_context *context = cpu->base.context;
  struct panels *panels = mem_zalloc(context, 1, sizeof *panels);
  if (!panels) return OSCAR_NO_MEMORY;
  panels->context = context;
  panels->bf16 = panels_use_bf16(cpu);
  cpu->panels = panels;
  dnnl_status_t status = dnnl_engine_create(&panels->engine, dnnl_cpu, 0);
  if (status == dnnl_success) status = dnnl_stream_create(&panels->stream, panels->engine, dnnl_stream_default_flags);
  if (status == dnnl_success) return OSCAR_OK;
  panels_free(cpu);
  return library_error(context, status, "start on this CPU");
}

/* ---- plans ---- */

static dnnl_status_t describe_matrix(dnnl_memory_desc_t *desc, int64_t rows, int64_t cols, dnnl_data_type_t type,
                                     int64_t row_stride, int64_t col_stride) {
  dnnl_dims_t dims = {rows, cols}, strides = {row_stride, col_stride};
  return dnnl_memory_desc_init_by_strides(desc, 2, dims, type, strides);
}

static dnnl_status_t plan(struct panels *panels, struct product *p, dnnl_primitive_attr_t attributes) {
  const struct shape *s = &p->shape;
  dnnl_data_type_t type = panels->bf16 ? dnnl_bf16 : dnnl_f32;
  dnnl_memory_desc_t x, panel, y;
  dnnl_matmul_desc_t product;
  dnnl_primitive_desc_t desc = NULL;
  dnnl_status_t status = describe_matrix(&x, s->n, s->cols, type, s->cols, 1);
  if (status == dnnl_success) status = describe_matrix(&panel, s->cols, s->rows, type, 1, s->cols);
  if (status == dnnl_success) status = describe_matrix(&y, s->n, s->rows, dnnl_f32, s->stride, 1);
  if (status == dnnl_success) status = dnnl_matmul_desc_init(&product, &x, &panel, NULL, &y);
  if (status == dnnl_success) status = dnnl_primitive_attr_set_scratchpad_mode(attributes, dnnl_scratchpad_mode_user);
  if (status == dnnl_success) status = dnnl_primitive_desc_create(&desc, &product, attributes, panels->engine, NULL);
  if (status != dnnl_success) return status;
  const dnnl_memory_desc_t *scratch = dnnl_primitive_desc_query_md(desc, dnnl_query_scratchpad_md, 0);
  p->scratch_bytes = dnnl_memory_desc_get_size(scratch);
  status = dnnl_primitive_create(&p->primitive, desc);
  if (status == dnnl_success) status = dnnl_memory_create(&p->x, &x, panels->engine, DNNL_MEMORY_NONE);
  if (status == dnnl_success) status = dnnl_memory_create(&p->panel, &panel, panels->engine, DNNL_MEMORY_NONE);
  if (status == dnnl_success) status = dnnl_memory_create(&p->y, &y, panels->engine, DNNL_MEMORY_NONE);
  if (status == dnnl_success) status = dnnl_memory_create(&p->scratch, scratch, panels->engine, DNNL_MEMORY_NONE);
  dnnl_primitive_desc_destroy(desc);
  return status;
}

static bool same_shape(const struct shape *a, const struct shape *b) {
  return a->n == b->n && a->rows == b->rows && a->cols == b->cols && a->stride == b->stride;
}

/* The plan of a shape: a kept one, or a new one in the place of the longest unused. */
static oscar_status find_product(struct panels *panels, const struct shape *shape, struct product **product) {
  struct product *oldest = panels->products;
  for (struct product *p = panels->products; p < panels->products + KEPT_PRODUCTS; p++) {
    if (p->used && same_shape(&p->shape, shape)) {
      p->used = ++panels->clock;
      *product = p;
      return OSCAR_OK;
    }
    if (p->used < oldest->used) oldest = p;
  }
  product_clear(oldest);
  oldest->shape = *shape;
  dnnl_primitive_attr_t attributes = NULL;
  dnnl_status_t status = dnnl_primitive_attr_create(&attributes);
  if (status == dnnl_success) status = plan(panels, oldest, attributes);
  if (attributes) dnnl_primitive_attr_destroy(attributes);
  if (status != dnnl_success) {
    product_clear(oldest);
    return library_error(panels->context, status, "plan a matrix product");
  }
  oldest->used = ++panels->clock;
  *product = oldest;
  return OSCAR_OK;
}

static oscar_status multiply(struct panels *panels, const struct shape *shape, const void *x, float *y) {
  struct product *p = NULL;
  oscar_status status = find_product(panels, shape, &p);
  if (status == OSCAR_OK) status = scratch_reserve(panels->context, &panels->library, p->scratch_bytes, 1);
  if (status != OSCAR_OK) return status;
  const struct {
    dnnl_memory_t memory;
    const void *data;
  } buffers[] = {{p->x, x}, {p->panel, panels->panel.data}, {p->y, y}, {p->scratch, panels->library.data}};
  dnnl_status_t result = dnnl_success;
  for (size_t i = 0; i < ARRAY_LENGTH(buffers) && result == dnnl_success; i++)
    result = dnnl_memory_set_data_handle(buffers[i].memory, (void *)(uintptr_t)buffers[i].data);
  const dnnl_exec_arg_t arguments[] = {
      {DNNL_ARG_SRC, p->x}, {DNNL_ARG_WEIGHTS, p->panel}, {DNNL_ARG_DST, p->y}, {DNNL_ARG_SCRATCHPAD, p->scratch}};
  if (result == dnnl_success) result = dnnl_primitive_execute(p->primitive, panels->stream, ARRAY_LENGTH(arguments), arguments);
  if (result == dnnl_success) result = dnnl_stream_wait(panels->stream);
  return result == dnnl_success ? OSCAR_OK : library_error(panels->context, result, "multiply matrices");
}

/* ---- expansion ---- */

static int64_t panel_rows(const struct panels *panels, const struct weight *w) {
  size_t row_bytes = (size_t)w->cols * (panels->bf16 ? sizeof(uint16_t) : sizeof(float));
  int64_t rows = (int64_t)(PANEL_BYTES / row_bytes) / PANEL_ROWS * PANEL_ROWS;
  if (rows < PANEL_ROWS) rows = PANEL_ROWS;
  return rows < w->rows ? rows : w->rows;
}

static void expand(const struct cpu_backend *cpu, const struct weight *w, int64_t first, int64_t last) {
  const struct panels *panels = cpu->panels;
  const struct dot_kernels *kernels = cpu->kernels;
#pragma omp parallel num_threads(cpu->threads)
  {
    int64_t threads = omp_get_num_threads(), thread = omp_get_thread_num();
    int64_t from = first + (last - first) * thread / threads, to = first + (last - first) * (thread + 1) / threads;
    size_t at = (size_t)(from - first) * (size_t)w->cols;
    if (panels->bf16)
      kernels->bf16[w->type](w, from, to, (uint16_t *)panels->panel.data + at);
    else
      kernels->f32[w->type](w, from, to, (float *)panels->panel.data + at);
  }
}

static void round_tokens(const struct cpu_backend *cpu, int n, int64_t cols, const float *x, uint16_t *out) {
#pragma omp parallel for num_threads(cpu->threads) schedule(static)
  for (int t = 0; t < n; t++) cpu->kernels->round_bf16(x + t * cols, (size_t)cols, out + t * cols);
}

static oscar_status multiply_weight(struct cpu_backend *cpu, const struct weight *w, int n, const void *x, float *y) {
  struct panels *panels = cpu->panels;
  int64_t step = panel_rows(panels, w);
  size_t element_bytes = panels->bf16 ? sizeof(uint16_t) : sizeof(float);
  oscar_status status = scratch_reserve(panels->context, &panels->panel, (size_t)(step * w->cols), element_bytes);
  for (int64_t first = 0; first < w->rows && status == OSCAR_OK; first += step) {
    int64_t last = first + step < w->rows ? first + step : w->rows;
    expand(cpu, w, first, last);
    status = multiply(panels, &(struct shape){n, last - first, w->cols, w->rows}, x, y + first);
  }
  return status;
}

oscar_status panels_matmul(struct cpu_backend *cpu, int count, const struct weight *const *w, int n, const float *x,
                           float *const *y) {
  oscar_status status = cpu->panels ? OSCAR_OK : panels_create(cpu);
  if (status != OSCAR_OK) return status;
  struct panels *panels = cpu->panels;
  int64_t cols = w[0]->cols;
  const void *tokens = x;
  if (panels->bf16) {
    status = scratch_reserve(panels->context, &panels->tokens, (size_t)n * (size_t)cols, sizeof(uint16_t));
    if (status != OSCAR_OK) return status;
    round_tokens(cpu, n, cols, x, panels->tokens.data);
    tokens = panels->tokens.data;
  }
  int before = omp_get_max_threads();
  omp_set_num_threads(cpu->threads);
  for (int i = 0; i < count && status == OSCAR_OK; i++) status = multiply_weight(cpu, w[i], n, tokens, y[i]);
  omp_set_num_threads(before);
  return status;
}
