/*
 * panels.c - products with many tokens through oneDNN, over panels of expanded weights.
 *
 * A panel is a few hundred rows of a weight, expanded into one buffer of fixed size and multiplied while it is in the cache: the
 * expanded model never exists, and the memory does not grow with it.
 *
 * Panels are float, and only additions round, except where BF16 is faster: many times with AMX, and 1.75 times with AMD's
 * AVX512-BF16 (Zen 4, two threads: 375 GFLOP/s in BF16, 215 in float). Intel's without AMX is slower than float (Sapphire
 * Rapids, one thread: 84 and 148 GFLOP/s). BF16 rounds both factors to 8 bits and adds up in float: a result differs from the
 * exact product by less than 2^-8 of the root sum of squares of its terms as a rule, by 2^-7 of the sum of their magnitudes at
 * most; tests/backend/test_products.c holds it to that.
 *
 * A token's results must not depend on how many are multiplied with it where the backend's rounding says so: prompts that are cut
 * anywhere rely on it. With float and with AVX512-BF16 they do not in oneDNN, nor on threads. With AMX they do (Sapphire Rapids:
 * for 1 to 4 tokens, and here and there up to 124), so blocks of one size are multiplied then, the last filled up with zeros.
 * tests/backend/test_products.c holds all of this to it.
 *
 * oneDNN works in OpenMP's threads: their number is set for the duration of a call, because oneDNN takes it from the runtime when
 * it plans and when it works. Plans (primitives) are expensive to make and are kept by shape.
 */
#include "backend/cpu/cpu.h"
#include "base/team.h"

#include <omp.h>
#include <oneapi/dnnl/dnnl.h>
#include <stdio.h>
#include <string.h>

#define PANEL_BYTES   ((size_t)8 << 20)
#define PART_TOKENS   512 /* tokens that are multiplied with a panel at a time */
#define BLOCK_TOKENS  64  /* where a token's results must not depend on their number, with AMX */
#define KEPT_PRODUCTS 48  /* distinct shapes of one model are about ten per number of tokens */

/* y [n][rows] = x [n][cols] times the panel [rows][cols], transposed. All are dense: for a y with gaps oneDNN 2.6 has no fast
 * kernel. */
struct shape {
  int64_t n, rows, cols;
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
  struct scratch panel, tokens, results, library;
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
  scratch_free(context, &panels->results);
  scratch_free(context, &panels->library);
  mem_free(context, panels);
  cpu->panels = NULL;
}

bool panels_use_bf16(const struct cpu_backend *cpu) {
  const struct cpu_features *features = &cpu->base.context->cpu;
  return cpu->kernels->round_bf16 && features->avx512_bf16 && (features->amx_bf16 || features->wide_bf16);
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

/* BF16: the layout of dot.h. F32: rows after each other. */
static dnnl_status_t describe_panel(dnnl_memory_desc_t *desc, const struct shape *s, bool bf16) {
  dnnl_dims_t dims = {s->cols, s->rows};
  if (bf16) return dnnl_memory_desc_init_by_tag(desc, 2, dims, dnnl_bf16, dnnl_BA16a64b2a);
  return describe_matrix(desc, s->cols, s->rows, dnnl_f32, 1, s->cols);
}

/* The reference implementations are a hundred times slower, and nothing else would tell. */
static void warn_if_slow(const oscar_context *context, const_dnnl_primitive_desc_t desc) {
  const char *name = NULL;
  if (dnnl_primitive_desc_query(desc, dnnl_query_impl_info_str, 0, &name) == dnnl_success && name && !strncmp(name, "ref", 3))
    log_line(context, OSCAR_LOG_WARNING, "oneDNN has only its reference matrix product (%s) for this CPU; prompts will be slow",
             name);
}

static dnnl_status_t plan(struct panels *panels, struct product *p, dnnl_primitive_attr_t attributes) {
  const struct shape *s = &p->shape;
  dnnl_data_type_t type = panels->bf16 ? dnnl_bf16 : dnnl_f32;
  dnnl_memory_desc_t x, panel, y;
  dnnl_matmul_desc_t product;
  dnnl_primitive_desc_t desc = NULL;
  dnnl_status_t status = describe_matrix(&x, s->n, s->cols, type, s->cols, 1);
  if (status == dnnl_success) status = describe_panel(&panel, s, panels->bf16);
  if (status == dnnl_success) status = describe_matrix(&y, s->n, s->rows, dnnl_f32, s->rows, 1);
  if (status == dnnl_success) status = dnnl_matmul_desc_init(&product, &x, &panel, NULL, &y);
  if (status == dnnl_success) status = dnnl_primitive_attr_set_scratchpad_mode(attributes, dnnl_scratchpad_mode_user);
  if (status == dnnl_success) status = dnnl_primitive_desc_create(&desc, &product, attributes, panels->engine, NULL);
  if (status != dnnl_success) return status;
  const dnnl_memory_desc_t *scratch = dnnl_primitive_desc_query_md(desc, dnnl_query_scratchpad_md, 0);
  p->scratch_bytes = dnnl_memory_desc_get_size(scratch);
  warn_if_slow(panels->context, desc);
  status = dnnl_primitive_create(&p->primitive, desc);
  if (status == dnnl_success) status = dnnl_memory_create(&p->x, &x, panels->engine, DNNL_MEMORY_NONE);
  if (status == dnnl_success) status = dnnl_memory_create(&p->panel, &panel, panels->engine, DNNL_MEMORY_NONE);
  if (status == dnnl_success) status = dnnl_memory_create(&p->y, &y, panels->engine, DNNL_MEMORY_NONE);
  if (status == dnnl_success) status = dnnl_memory_create(&p->scratch, scratch, panels->engine, DNNL_MEMORY_NONE);
  dnnl_primitive_desc_destroy(desc);
  return status;
}

static bool same_shape(const struct shape *a, const struct shape *b) {
  return a->n == b->n && a->rows == b->rows && a->cols == b->cols;
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
  team_before_openmp(panels->context);
  if (result == dnnl_success) result = dnnl_primitive_execute(p->primitive, panels->stream, ARRAY_LENGTH(arguments), arguments);
  if (result == dnnl_success) result = dnnl_stream_wait(panels->stream);
  return result == dnnl_success ? OSCAR_OK : library_error(panels->context, result, "multiply matrices");
}

/* ---- expansion ---- */

/* Bytes of a panel of `rows` rows, with what its layout pads. */
static size_t panel_bytes(const struct panels *panels, int64_t rows, int64_t cols) {
  if (!panels->bf16) return (size_t)rows * (size_t)cols * sizeof(float);
  return round_up((size_t)rows, PANEL_ROWS) * round_up((size_t)cols, PANEL_COLS) * sizeof(uint16_t);
}

static int64_t panel_rows(const struct panels *panels, const struct weight *w) {
  int64_t groups = (int64_t)(PANEL_BYTES / panel_bytes(panels, PANEL_ROWS, w->cols));
  int64_t rows = groups > 1 ? groups * PANEL_ROWS : PANEL_ROWS;
  return rows < w->rows ? rows : w->rows;
}

size_t panels_scratch(const struct cpu_backend *cpu, const struct weight *w, int n) {
  const struct panels layout = {.bf16 = panels_use_bf16(cpu)};
  const int64_t rows = panel_rows(&layout, w), part = n < PART_TOKENS ? n : PART_TOKENS;
  const size_t results = rows < w->rows ? (size_t)(part * rows) * sizeof(float) : 0;
  const size_t tokens = layout.bf16 ? round_up((size_t)n, BLOCK_TOKENS) : 0;
  return panel_bytes(&layout, rows, w->cols) + results + tokens * (size_t)w->cols * sizeof(uint16_t);
}

/* What a loop over a panel needs. */
struct expansion {
  const struct cpu_backend *cpu;
  const struct weight *w;
  int64_t first, last; /* rows of the panel */
};

/* Stripes from..to - 1 of a float panel. */
static void expand_f32_stripes(void *arg, int64_t from, int64_t to) {
  const struct expansion *e = arg;
  float *panel = e->cpu->panels->panel.data;
  int64_t first = e->first + from * STRIPE_ROWS, last = e->first + to * STRIPE_ROWS;
  if (last > e->last) last = e->last;
  expand_f32 *expand = f32_kernel(e->cpu, e->w);
  expand(e->w, first, last, panel + from * STRIPE_ROWS * e->w->cols);
}

static void expand_bf16_stripes(void *arg, int64_t from, int64_t to) {
  const struct expansion *e = arg;
  uint16_t *panel = e->cpu->panels->panel.data;
  const int64_t in_group = PANEL_ROWS / STRIPE_ROWS;
  int64_t group_elements = (int64_t)round_up((size_t)e->w->cols, PANEL_COLS) * PANEL_ROWS;
  expand_stripe *expand = stripe_kernel(e->cpu, e->w);
  for (int64_t s = from; s < to; s++) {
    int64_t row = e->first + s * STRIPE_ROWS, left = e->last - row;
    int count = left >= STRIPE_ROWS ? STRIPE_ROWS : left > 0 ? (int)left : 0;
    expand(e->w, row, count, panel + s / in_group * group_elements + s % in_group * STRIPE_ROWS * 2);
  }
}

static void expand_panel(const struct cpu_backend *cpu, const struct weight *w, int64_t first, int64_t last) {
  struct expansion e = {cpu, w, first, last};
  int64_t unit = cpu->panels->bf16 ? PANEL_ROWS : STRIPE_ROWS, stripes = (last - first + unit - 1) / unit * (unit / STRIPE_ROWS);
  team_split(cpu->base.context, cpu->threads, stripes, cpu->panels->bf16 ? expand_bf16_stripes : expand_f32_stripes, &e);
}

struct rounding {
  const struct cpu_backend *cpu;
  int64_t cols;
  const float *x;
  uint16_t *out;
};

static void round_tokens(void *arg, int64_t first, int64_t last) {
  const struct rounding *r = arg;
  for (int64_t t = first; t < last; t++) r->cpu->kernels->round_bf16(r->x + t * r->cols, (size_t)r->cols, r->out + t * r->cols);
}

/* to [n][to_stride] = from [n][rows] + bias; in place where they are the same. */
struct placing {
  int64_t rows, to_stride;
  const float *from, *bias;
  float *to;
};

static void place_results(void *arg, int64_t first, int64_t last) {
  const struct placing *p = arg;
  for (int64_t t = first; t < last; t++) {
    const float *in = p->from + t * p->rows;
    float *out = p->to + t * p->to_stride;
    if (in != out) memcpy(out, in, (size_t)p->rows * sizeof *out);
    for (int64_t r = 0; p->bias && r < p->rows; r++) out[r] += p->bias[r];
  }
}

/* Where a token's bits must not depend on how many there are, AMX gets blocks of so many and always the same; else 0. */
static int64_t block_tokens(const struct cpu_backend *cpu) {
  return cpu->panels->bf16 && cpu->base.context->cpu.amx_bf16 && cpu->base.rounding == ROUND_AS_MANY ? BLOCK_TOKENS : 0;
}

/* One weight; x is in the panel's type, whole blocks of it where there are blocks. */
static oscar_status multiply_weight(struct cpu_backend *cpu, const struct weight *w, const float *bias, int64_t n, const void *x,
                                    float *y) {
  struct panels *panels = cpu->panels;
  const int64_t block = block_tokens(cpu), most = n < PART_TOKENS ? n : PART_TOKENS;
  int64_t step = panel_rows(panels, w), part = block ? block : most;
  size_t token_bytes = (size_t)w->cols * (panels->bf16 ? sizeof(uint16_t) : sizeof(float));
  bool in_place = step == w->rows;
  oscar_status status = scratch_reserve(panels->context, &panels->panel, panel_bytes(panels, step, w->cols), 1);
  if (status == OSCAR_OK && (!in_place || n % part))
    status = scratch_reserve(panels->context, &panels->results, (size_t)(part * step), sizeof *y);
  for (int64_t first = 0; first < w->rows && status == OSCAR_OK; first += step) {
    int64_t rows = w->rows - first < step ? w->rows - first : step;
    expand_panel(cpu, w, first, first + rows);
    for (int64_t t = 0; t < n && status == OSCAR_OK; t += part) {
      const int64_t here = n - t < part ? n - t : part, together = block ? block : here;
      float *to = y + t * w->rows + first, *results = in_place && together == here ? to : panels->results.data;
      status = multiply(panels, &(struct shape){together, rows, w->cols}, (const uint8_t *)x + (size_t)t * token_bytes, results);
      struct placing placing = {rows, w->rows, results, bias ? bias + first : NULL, to};
      if (status == OSCAR_OK && (bias || results != to)) team_split(panels->context, cpu->threads, here, place_results, &placing);
    }
  }
  return status;
}

oscar_status panels_matmul(struct cpu_backend *cpu, int count, const struct weight *const *w, const float *const *bias, int n,
                           const float *x, float *const *y) {
  oscar_status status = cpu->panels ? OSCAR_OK : panels_create(cpu);
  if (status != OSCAR_OK) return status;
  struct panels *panels = cpu->panels;
  int64_t cols = w[0]->cols;
  const void *tokens = x;
  if (panels->bf16) {
    const size_t padded = block_tokens(cpu) ? round_up((size_t)n, BLOCK_TOKENS) : (size_t)n;
    status = scratch_reserve(panels->context, &panels->tokens, padded * (size_t)cols, sizeof(uint16_t));
    if (status != OSCAR_OK) return status;
    uint16_t *rounded = panels->tokens.data;
    memset(rounded + (size_t)n * (size_t)cols, 0, (padded - (size_t)n) * (size_t)cols * sizeof *rounded);
    struct rounding rounding = {cpu, cols, x, rounded};
    team_split(panels->context, cpu->threads, n, round_tokens, &rounding);
    tokens = panels->tokens.data;
  }
  int before = omp_get_max_threads();
  omp_set_num_threads(cpu->threads);
  for (int i = 0; i < count && status == OSCAR_OK; i++)
    status = multiply_weight(cpu, w[i], bias ? bias[i] : NULL, n, tokens, y[i]);
  omp_set_num_threads(before);
  return status;
}
