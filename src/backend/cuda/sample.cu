/*
 * sample.cu - the next token of every row of logits (backend/sampling.h).
 *
 * First, SPLITS blocks share out a row and each leaves its k best. A number of a block's threads that is not less than k has each
 * a best one as large as the k-th largest of these, so what is smaller cannot be among the k best of the block: the rest, k or a
 * little more, is sorted. Then a block puts those of a row together, sorts them, and one thread draws. Candidates are ordered by
 * whole numbers: the bits of the logit, made to grow with it, above those of the id, made to fall with it.
 */
#include "backend/cuda/cuda_backend.h"
#include "backend/sampling.h"

namespace {

constexpr int SPLITS = 16, THREADS = 1024, ROOM = SPLITS * MOST_RANKED;
static_assert(MOST_RANKED <= THREADS && ROOM % THREADS == 0, "a thread has one of the ranked, and as many to sort as others");

typedef unsigned long long candidate; /* 0: none */

/* Logits that are not finite are never chosen; both zeros are equal. */
__device__ candidate candidate_of(float logit, int id) {
  if (!(fabsf(logit) <= 3.402823466e38f)) return 0;
  const uint32_t bits = __float_as_uint(logit == 0 ? 0.0f : logit), order = bits >> 31 ? ~bits : bits | 0x80000000u;
  return (candidate)order << 32 | (0xFFFFFFFFu - (uint32_t)id);
}
__device__ int id_of(candidate c) { return (int)(0xFFFFFFFFu - (uint32_t)c); }
__device__ double logit_of(candidate c) {
  const uint32_t order = (uint32_t)(c >> 32);
  return (double)__uint_as_float(order >> 31 ? order & 0x7FFFFFFFu : ~order);
}

/* The first `count` of a list, a power of two, sorted: largest first. By the whole block. */
__device__ void sort_candidates(candidate *list, int count) {
  for (int size = 2; size <= count; size *= 2)
    for (int step = size / 2; step > 0; step /= 2) {
      for (int i = (int)threadIdx.x; i < count; i += THREADS) {
        const int other = i ^ step;
        if (other < i) continue;
        const candidate a = list[i], b = list[other];
        if (i & size ? a > b : a < b) list[i] = b, list[other] = a;
      }
      __syncthreads();
    }
}

__device__ int ranked_of(const struct sampling &s) {
  return s.temperature == 0 ? 1 : s.top_k < MOST_RANKED ? s.top_k : MOST_RANKED;
}

/* found [rows][SPLITS][MOST_RANKED], of which as many are written as the row ranks. */
__global__ void __launch_bounds__(THREADS)
    find_best(int vocab, const float *logits, const struct sampling *each, candidate *found) {
  extern __shared__ candidate list[]; /* [room_of(vocab)] */
  __shared__ candidate largest[THREADS];
  __shared__ int kept;
  const int row = (int)blockIdx.y, split = (int)blockIdx.x, k = ranked_of(each[row]);
  const int first = (int)((int64_t)vocab * split / SPLITS), end = (int)((int64_t)vocab * (split + 1) / SPLITS);
  const float *from = logits + (int64_t)row * vocab;
  candidate *to = found + ((int64_t)row * SPLITS + split) * MOST_RANKED, best = 0;
  if (threadIdx.x == 0) kept = 0;
  wait_for_input();
  for (int i = first + (int)threadIdx.x; i < end; i += THREADS) {
    const candidate c = candidate_of(from[i], i);
    best = c > best ? c : best;
  }
  if (k == 1) {
    for (int step = 16; step > 0; step /= 2) {
      const candidate other = __shfl_xor_sync(~0u, best, step);
      best = other > best ? other : best;
    }
    if (threadIdx.x % 32 == 0) largest[threadIdx.x / 32] = best;
    __syncthreads();
    if (threadIdx.x > 0) return;
    for (int i = 1; i < THREADS / 32; i++) best = largest[i] > best ? largest[i] : best;
    to[0] = best;
    return;
  }
  largest[threadIdx.x] = best;
  __syncthreads();
  sort_candidates(largest, THREADS);
  const candidate least = largest[k - 1] > 0 ? largest[k - 1] : 1;
  for (int i = first + (int)threadIdx.x; i < end; i += THREADS) {
    const candidate c = candidate_of(from[i], i);
    if (c >= least) list[atomicAdd(&kept, 1)] = c;
  }
  __syncthreads();
  int count = MOST_RANKED;
  while (count < kept) count *= 2;
  for (int i = kept + (int)threadIdx.x; i < count; i += THREADS) list[i] = 0;
  __syncthreads();
  sort_candidates(list, count);
  if ((int)threadIdx.x < k) to[threadIdx.x] = list[threadIdx.x];
}

/* ids [rows]: -1 where no logit is finite. */
__global__ void __launch_bounds__(THREADS) choose(const candidate *found, const struct sampling *each, int32_t *ids) {
  __shared__ candidate list[ROOM];
  __shared__ double weights[2][MOST_RANKED];
  const int row = (int)blockIdx.x, thread = (int)threadIdx.x;
  const struct sampling s = each[row];
  const int k = ranked_of(s);
  const candidate *from = found + (int64_t)row * ROOM;
  int count = 1;
  while (count < SPLITS * k) count *= 2;
  wait_for_input();
  for (int i = thread; i < count; i += THREADS) list[i] = i < SPLITS * k ? from[i / k * MOST_RANKED + i % k] : 0;
  __syncthreads();
  sort_candidates(list, count);
  if (thread < k && list[thread] > 0) {
    const double below = logit_of(list[thread]) - logit_of(list[0]);
    weights[0][thread] = sampling_exponential(below);
    weights[1][thread] = s.temperature > 0 ? sampling_exponential(below / (double)s.temperature) : 1;
  }
  __syncthreads();
  if (thread > 0) return;
  int n = 0;
  while (n < k && list[n] > 0) n++;
  int rank = 0;
  if (s.temperature > 0 && n > 0)
    rank = sampling_draw(sampling_keep(n, weights[0], (double)s.top_p, (double)s.min_p), weights[1], s.random);
  ids[row] = n > 0 ? id_of(list[rank]) : -1;
}

size_t found_bytes(int rows) { return (size_t)rows * ROOM * sizeof(candidate); }

/* Candidates that a block may have to sort: k threads have no more. A power of two. */
int room_of(int vocab) {
  const int each = (vocab / SPLITS + 1 + THREADS - 1) / THREADS;
  int room = MOST_RANKED;
  while (room < each * MOST_RANKED) room *= 2;
  return room;
}

} // namespace

oscar_status cuda_reserve_samples(struct backend *be, int rows, int vocab) {
  struct cuda_backend *b = cuda_of(be);
  const size_t shared = (size_t)room_of(vocab) * sizeof(candidate);
  if (shared + THREADS * sizeof(candidate) + 256 > b->cuda->shared_bytes)
    return set_error(be->context, OSCAR_UNSUPPORTED, "a vocabulary of %d tokens is too large to be sampled on GPU %d", vocab,
                     b->cuda->info.ordinal);
  oscar_status status = cuda_result(
      b->cuda, cudaFuncSetAttribute((const void *)find_best, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared),
      "asking for shared memory");
  return status == OSCAR_OK ? device_scratch_reserve(b, &b->samples, found_bytes(rows)) : status;
}

oscar_status cuda_sample(struct backend *be, int rows, int vocab, const float *logits, const struct sampling *each,
                         int32_t *ids) {
  struct cuda_backend *b = cuda_of(be);
  if (found_bytes(rows) > b->samples.bytes)
    return set_error(be->context, OSCAR_INVALID_ARGUMENT, "%d rows are more than there is room for to sample", rows);
  if (rows == 0) return OSCAR_OK;
  cudaError_t error =
      launch_kernel(b->cuda, find_best, dim3(SPLITS, (unsigned)rows), THREADS, (size_t)room_of(vocab) * sizeof(candidate), vocab,
                    logits, each, (candidate *)b->samples.data);
  if (error == cudaSuccess)
    error = launch_kernel(b->cuda, choose, dim3((unsigned)rows), THREADS, 0, (const candidate *)b->samples.data, each, ids);
  return cuda_result(b->cuda, error, "sampling");
}
