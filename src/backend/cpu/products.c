/*
 * products.c - products with weights: few tokens through the integer kernels here, many through panels.c; embedding rows.
 *
 * All weights of a call are one run of bytes that the threads divide into equal stretches of whole rows, or whole groups of
 * packed rows: reading them is what a product with few tokens costs. Which thread computes a row does not change it, so results
 * do not depend on their number.
 */
#include "backend/cpu/cpu.h"
#include "base/team.h"

#define ACTIVATION_BYTES ((size_t)1 << 20) /* of quantized activations that meet all rows of a thread at a time */

/* Products smaller than this are done before a second thread has woken up. */
#define THREADED_BYTES 32768

/* Threads share out pieces of at least so many bytes, up to so many pieces a thread: one that is slowed down, by another program
 * or by memory, does fewer. */
#define PIECE_BYTES       65536
#define PIECES_PER_THREAD 16

/* So many chunks of activations are quantized by the calling thread before the others begin: that is faster than one more
 * meeting of all. */
#define FEW_CHUNKS 16

oscar_status cpu_weight_check(struct backend *be, const struct weight *w) {
  return weight_check_layout(be, w, (unsigned)w->type < WEIGHT_TYPES && cpu_of(be)->kernels->rows[w->type]);
}

oscar_status cpu_embed(struct backend *be, const struct weight *w, int n, const int32_t *ids, float *y) {
  oscar_status status = cpu_weight_check(be, w);
  if (status != OSCAR_OK) return status;
  for (int t = 0; t < n; t++)
    if (ids[t] < 0 || ids[t] >= w->rows)
      return set_error(be->context, OSCAR_INVALID_ARGUMENT, "token id %d is not a row of %s, which has %lld", ids[t], w->name,
                       (long long)w->rows);
  expand_f32 *expand = cpu_of(be)->kernels->f32[w->type];
  for (int t = 0; t < n; t++) expand(w, ids[t], ids[t] + 1, y + t * w->cols);
  return OSCAR_OK;
}

/* First row of this weight, which begins at byte `offset` of the call, at or after byte `at`; of packed ones, first of a group.
 */
static int64_t row_at(const struct weight *w, size_t row_bytes, size_t offset, size_t at) {
  if (at <= offset) return 0;
  size_t row = (at - offset + row_bytes - 1) / row_bytes;
  if (w->packed) row = round_up(row, GROUP_ROWS);
  return row < (size_t)w->rows ? (int64_t)row : w->rows;
}

static void add_bias(const float *bias, int64_t rows, int64_t first, int64_t last, int n, float *y) {
  for (int t = 0; t < n; t++)
    for (int64_t r = first; r < last; r++) y[t * rows + r] += bias[r];
}

static size_t all_bytes(int count, const struct weight *const *w) {
  size_t total = 0;
  for (int i = 0; i < count; i++) total += (size_t)w[i]->rows * weight_row_bytes(w[i]);
  return total;
}

/* As many tokens at a time as a core's cache holds; a multiple of four, which the kernels take together. */
static void dot_range(dot_rows *rows, const struct weight *w, int64_t first, int64_t last, const struct dot_input *in, float *y) {
  size_t token_bytes = (size_t)in->chunks_per_token * sizeof(struct act_chunk);
  int step = ACTIVATION_BYTES / token_bytes >= 8 ? (int)(ACTIVATION_BYTES / token_bytes / 4 * 4) : 8;
  for (int t = 0; t < in->n; t += step) {
    struct dot_input part = *in;
    part.n = in->n - t < step ? in->n - t : step;
    part.x += t * in->cols;
    if (in->chunks) part.chunks += t * in->chunks_per_token;
    rows(w, first, last, &part, y + t * w->rows);
  }
}

struct few {
  const struct cpu_backend *cpu;
  int count;
  const struct weight *const *w;
  const float *const *bias;
  const struct dot_input *in;
  struct act_chunk *activations;
  float *const *y;
  size_t bytes; /* of all weights */
  int pieces;
  team_counter next;
};

static void quantize_chunks(const struct few *f, int64_t first, int64_t last) {
  const struct dot_input *in = f->in;
  for (int64_t c = first; c < last; c++) {
    int64_t token = c / in->chunks_per_token, at = c % in->chunks_per_token * CHUNK;
    int here = in->cols - at < CHUNK ? (int)(in->cols - at) : CHUNK;
    f->cpu->kernels->quantize(in->x + token * in->cols + at, here, f->activations + c);
  }
}

/* Piece `part` of `parts` of all weights. */
static void dot_part(const struct few *f, int part, int parts) {
  size_t share = f->bytes / (size_t)parts, offset = 0;
  size_t begin = share * (size_t)part, end = part == parts - 1 ? f->bytes : begin + share;
  for (int i = 0; i < f->count; i++) {
    const struct weight *w = f->w[i];
    size_t row_bytes = weight_row_bytes(w);
    int64_t first = row_at(w, row_bytes, offset, begin), last = row_at(w, row_bytes, offset, end);
    offset += (size_t)w->rows * row_bytes;
    if (first >= last) continue;
    dot_range(rows_kernel(f->cpu, w), w, first, last, f->in, f->y[i]);
    if (f->bias && f->bias[i]) add_bias(f->bias[i], w->rows, first, last, f->in->n, f->y[i]);
  }
}

static void few_part(void *arg, int member, int members) {
  struct few *f = arg;
  int64_t chunks = f->activations ? f->in->n * f->in->chunks_per_token : 0;
  if (chunks > FEW_CHUNKS) {
    quantize_chunks(f, chunks * member / members, chunks * (member + 1) / members);
    team_barrier(f->cpu->base.context, member);
  }
  for (int64_t piece; (piece = team_take(&f->next)) < f->pieces;) dot_part(f, (int)piece, f->pieces);
}

static oscar_status few_tokens(struct cpu_backend *cpu, int count, const struct weight *const *w, const float *const *bias, int n,
                               const float *x, float *const *y) {
  struct dot_input in = {.cols = w[0]->cols, .n = n, .x = x, .chunks_per_token = (w[0]->cols + CHUNK - 1) / CHUNK};
  bool quantized = false;
  for (int i = 0; i < count; i++) quantized = quantized || !weight_is_float(w[i]->type);
  int64_t chunks = quantized ? n * in.chunks_per_token : 0;
  oscar_status status = scratch_reserve(cpu->base.context, &cpu->activations, (size_t)chunks, sizeof(struct act_chunk));
  if (status != OSCAR_OK) return status;
  in.chunks = cpu->activations.data;
  const size_t bytes = all_bytes(count, w), pieces = bytes / PIECE_BYTES, most = (size_t)cpu->threads * PIECES_PER_THREAD;
  const int threads = bytes >= THREADED_BYTES ? cpu->threads : 1;
  struct few few = {.cpu = cpu,
                    .count = count,
                    .w = w,
                    .bias = bias,
                    .in = &in,
                    .activations = quantized ? cpu->activations.data : NULL,
                    .y = y,
                    .bytes = bytes,
                    .pieces = threads == 1               ? 1
                              : pieces > most            ? (int)most
                              : pieces > (size_t)threads ? (int)pieces
                                                         : threads};
  if (chunks <= FEW_CHUNKS) quantize_chunks(&few, 0, chunks);
  team_run(cpu->base.context, threads, few_part, &few);
  return OSCAR_OK;
}

oscar_status cpu_matmul(struct backend *be, int count, const struct weight *const *w, const float *const *bias, int n,
                        const float *x, float *const *y) {
  struct cpu_backend *cpu = cpu_of(be);
  if (count < 1 || n < 0)
    return set_error(be->context, OSCAR_INVALID_ARGUMENT, "a product of %d weights with %d tokens is not possible", count, n);
  for (int i = 0; i < count; i++) {
    oscar_status status = cpu_weight_check(be, w[i]);
    if (status != OSCAR_OK) return status;
    if (w[i]->cols != w[0]->cols)
      return set_error(be->context, OSCAR_INVALID_ARGUMENT, "%s has %lld columns, but shares its input with %s, which has %lld",
                       w[i]->name, (long long)w[i]->cols, w[0]->name, (long long)w[0]->cols);
  }
  if (n == 0) return OSCAR_OK;
  const bool many = be->rounding == ROUND_BY_NUMBER ? n >= cpu->kernels->many_tokens : be->rounding == ROUND_AS_MANY;
  return many ? panels_matmul(cpu, count, w, bias, n, x, y) : few_tokens(cpu, count, w, bias, n, x, y);
}

oscar_status cpu_feed_forward(struct backend *be, const struct feed_forward *f, int n, const float *x, float *between, float *y) {
  const struct weight *const both[] = {f->gate, f->up};
  const size_t count = n > 0 ? (size_t)n * (size_t)f->gate->rows : 0;
  float *const results[] = {between, between + count};
  const oscar_status status = cpu_matmul(be, 2, both, NULL, n, x, results);
  if (status != OSCAR_OK) return status;
  if (f->activation == ACTIVATION_SILU)
    cpu_silu_mul(be, count, results[0], results[1]);
  else
    cpu_gelu_mul(be, count, results[0], results[1]);
  return cpu_matmul(be, 1, &f->down, NULL, n, results[0], &y);
}
