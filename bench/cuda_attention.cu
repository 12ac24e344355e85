/*
 * bench/cuda_attention.cu - decode attention on a GPU beside a plain read of the same bytes.
 *
 *   bench_cuda_attention [--query-heads LIST] [--kv-heads N] [--head-dim N] [--layers N] [--case NAMES] \
 *     [--forms NAMES] [--csv FILE]
 *
 * LIST: numbers with commas between; --query-heads 32,48,56,64,96 runs groups of 4, 6, 7, 8 and 12. NAMES with commas between:
 * of cases as they are printed; of forms turning, most-turning, half-turning, quarter-turning, four, one-turning, one, bf16.
 *
 * As in a decode step, the layers have pages of their own and are launched one after the other in a CUDA graph; times are of one
 * layer: a replay over the number of layers, the median of several. In the same graph form, over the same buffers, `read` adds up
 * every byte that attention has to read (codes, metadata, exact pages), with nothing else to do: the floor. `map` is the product
 * that brings queries into the space of codes, which a step has besides; `enter` is that, the norms and rotation of new queries
 * and keys, and writing new keys and values, in the one launch that a decode step has for all of it.
 *
 * Pages are random bits with gains of the size that fits have; each sequence has a sink page and 4 full recent ones exactly.
 */
#include "attention/cuda/decode/line.h"
extern "C" {
#include "attention/cuda/decode/rope_tables.h"
}
#include "attention/cuda/decode/value_map.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <cuda_runtime.h>
#include <string>
#include <vector>

namespace {

struct options {
  std::vector<int> query_heads_list = {32};
  int query_heads = 32, kv_heads = 8, head_dim = 128, layers = 36;
  const char *only = nullptr, *only_forms = nullptr, *csv = nullptr;
};

oscar_context *context;
oscar_cuda *cuda;
cudaStream_t stream;

void check(oscar_status status) {
  if (status == OSCAR_OK) return;
  fprintf(stderr, "%s\n", oscar_last_error(context));
  exit(1);
}
void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  fprintf(stderr, "%s\n", cudaGetErrorString(error));
  exit(1);
}

/* ---- kernels of the bench itself ---- */

__global__ void fill_random(uint32_t *to, size_t words, uint32_t seed) {
  for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < words; i += (size_t)gridDim.x * blockDim.x) {
    uint32_t x = (uint32_t)i * 2654435761u + seed;
    x ^= x >> 15, x *= 2246822519u, x ^= x >> 13, x *= 3266489917u, x ^= x >> 16;
    to[i] = x;
  }
}

/* BF16 numbers of about unit size. */
__global__ void fill_bf16(uint16_t *to, size_t count, uint32_t seed) {
  for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < count; i += (size_t)gridDim.x * blockDim.x) {
    uint32_t x = (uint32_t)i * 2654435761u + seed;
    x ^= x >> 15, x *= 2246822519u, x ^= x >> 13;
    to[i] = (uint16_t)(__float_as_uint((float)(x & 0xFFFF) / 32768.0f - 1) >> 16);
  }
}

/* Metadata: log gains of 2^(-3/4) to 2^(3/4), or fp16 gains of the same size. */
__global__ void set_gains(uint8_t *pages, size_t page_bytes, int heads, size_t head_bytes, size_t offset, bool log_gains,
                          size_t count) {
  for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < count * heads * 64; i += (size_t)gridDim.x * blockDim.x) {
    const size_t page = i / 64 / heads, head = i / 64 % heads, token = i % 64;
    uint16_t *at = (uint16_t *)(pages + page * page_bytes + head * head_bytes + offset) + token;
    const uint32_t x = (uint32_t)i * 2654435761u >> 7;
    uint32_t word = 0;
    for (int p = 0; p < 4; p++) word |= (5 + (x >> 3 * p) % 7) << 4 * p;
    *at = log_gains ? (uint16_t)word : (uint16_t)(0x3800 + x % 0x800);
  }
}

__global__ void __launch_bounds__(512) read_kernel(const uint4 *from, size_t count, uint32_t *out) {
  uint32_t sum = 0;
  const size_t stride = (size_t)gridDim.x * blockDim.x;
  size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x;
  for (; i + 3 * stride < count; i += 4 * stride) {
    const uint4 a = __ldcs(from + i), b = __ldcs(from + i + stride), c = __ldcs(from + i + 2 * stride),
                d = __ldcs(from + i + 3 * stride);
    sum += a.x ^ a.y ^ a.z ^ a.w ^ b.x ^ b.y ^ b.z ^ b.w ^ c.x ^ c.y ^ c.z ^ c.w ^ d.x ^ d.y ^ d.z ^ d.w;
  }
  for (; i < count; i += stride) sum += from[i].x ^ from[i].y ^ from[i].z ^ from[i].w;
  if (sum == 0x12345678) *out = sum;
}

/* ---- what is measured ---- */

struct setting {
  const char *name;
  std::vector<int> lengths; /* tokens of each sequence */
};

struct form {
  const char *short_name, *name;
  bool coded, log_gains;
  int turning; /* of 4 quarters of the pairs */
};

template <class T> T *device_copy(const std::vector<T> &from) {
  void *memory;
  check(cuda_alloc(cuda, from.size() * sizeof(T), &memory));
  check(cuda_upload(cuda, memory, from.data(), from.size() * sizeof(T)));
  return (T *)memory;
}

float normal(uint64_t *state) {
  auto next = [&] {
    uint64_t z = (*state += 0x9E3779B97F4A7C15u);
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return ((double)((z ^ (z >> 31)) >> 11) + 0.5) * 0x1p-53;
  };
  const double u = next(), v = next();
  return (float)(std::sqrt(-2 * std::log(u)) * std::cos(6.283185307179586 * v));
}

std::vector<float> normals(size_t n, float scale, uint64_t seed) {
  std::vector<float> x(n);
  for (float &value : x) value = scale * normal(&seed);
  return x;
}

/* Median time of a replay, in microseconds. */
template <class F> double time_graph(F enqueue) {
  cudaGraph_t graph;
  cudaGraphExec_t executable;
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  enqueue();
  check(cudaStreamEndCapture(stream, &graph));
  check(cudaGraphInstantiate(&executable, graph, 0));
  cudaEvent_t begin, end;
  check(cudaEventCreate(&begin));
  check(cudaEventCreate(&end));
  for (int i = 0; i < 2; i++) check(cudaGraphLaunch(executable, stream));
  std::vector<float> times;
  for (int i = 0; i < 11; i++) {
    float ms;
    check(cudaEventRecord(begin, stream));
    check(cudaGraphLaunch(executable, stream));
    check(cudaEventRecord(end, stream));
    check(cudaEventSynchronize(end));
    check(cudaEventElapsedTime(&ms, begin, end));
    times.push_back(ms);
  }
  std::sort(times.begin(), times.end());
  check(cudaGraphExecDestroy(executable));
  check(cudaGraphDestroy(graph));
  return times[times.size() / 2] * 1e3;
}

struct bench {
  const options &o;
  const setting &what;
  const form &how;
  decode_shape shape;
  decode_plan plan = {};
  decode_space space = {};
  std::vector<decode_layer> layers;
  std::vector<std::pair<void *, size_t>> memory;
  decode_rope rope = {};
  std::vector<uint16_t> own_pairs; /* of all heads */
  std::vector<uint32_t> own_curves;
  size_t bytes = 0; /* that a layer reads */
  float *q = nullptr, *out = nullptr;
  decode_rows rows = {};
  uint8_t *pages = nullptr;
  size_t layer_bytes = 0;

  bench(const options &o_, const setting &what_, const form &how_) : o(o_), what(what_), how(how_) {
    shape = {o.kv_heads, o.query_heads / o.kv_heads, o.head_dim, 1 / std::sqrt((float)o.head_dim), 0};
    make_rope();
    make_layers();
    make_plan();
  }

  template <class T> T *keep(const std::vector<T> &from) {
    T *at = device_copy(from);
    memory.push_back({at, from.size() * sizeof(T)});
    return at;
  }
  void *keep_empty(size_t size) {
    void *at;
    check(cuda_alloc(cuda, size, &at));
    memory.push_back({at, size});
    return at;
  }

  void make_rope() {
    if (!how.turning) return;
    std::vector<float> frequencies(o.head_dim / 2);
    for (size_t i = 0; i < frequencies.size(); i++) frequencies[i] = (float)std::pow(1e6, -2.0 * (double)i / o.head_dim);
    const oscar_rope_spec spec = {OSCAR_ROPE_HALVES, o.head_dim, frequencies.data()};
    oscar_rope *r;
    check(oscar_rope_create(context, &spec, &r));
    oscar_status status;
    const rope_table_sizes sizes = rope_table_sizes_of(context, r, &status);
    check(status);
    const int64_t table_pages = *std::max_element(what.lengths.begin(), what.lengths.end()) / 64 + 1;
    std::vector<float> series(sizes.series / 4), turns(sizes.turns / 4 * table_pages);
    std::vector<uint32_t> curves(sizes.curve_words / 4), angles(sizes.angles / 4 * table_pages);
    check(rope_tables_fill(context, r, &sizes, series.data(), curves.data()));
    rope_angles_fill(r, &sizes, 0, table_pages, angles.data(), turns.data());
    rope = {sizes.pairs, sizes.fast, sizes.steps, table_pages, keep(angles), keep(turns), keep(series), keep(curves)};
    make_own_curves(r);
    oscar_rope_release(r);
  }

  /* Of pairs spread over all, where so few turn that each has curves of its own. */
  void make_own_curves(oscar_rope *r) {
    const int pairs = how.turning * o.head_dim / 8;
    std::vector<uint16_t> numbers(pairs);
    for (int i = 0; i < pairs; i++) numbers[i] = (uint16_t)(i * 4 / how.turning);
    oscar_codec_spec keys = {};
    keys.rope = r, keys.rotating_pairs = pairs, keys.rotating_pair = numbers.data();
    if (!has_own_curves(&keys)) return;
    const size_t count = own_curves_pairs(&keys), words = own_curves_bytes(&keys) / 4;
    own_pairs.resize(count * o.kv_heads), own_curves.resize(words * o.kv_heads);
    for (int head = 0; head < o.kv_heads; head++)
      own_curves_fill(&keys, own_pairs.data() + head * count, own_curves.data() + head * words);
  }

  void make_layers() {
    const int d = o.head_dim, pairs = how.turning * d / 8;
    const size_t exact_page = (size_t)o.kv_heads * 2 * 64 * d * 2;
    decode_layer l = {};
    size_t coded_head = 0;
    if (how.coded) {
      const int form_of = how.log_gains ? OSCAR_ROW_LOG_GAINS : OSCAR_ROW_GAIN, groups = how.log_gains ? 4 : 1;
      const size_t side = 16 * (size_t)d + 128;
      coded_head = 2 * side;
      l.keys = l.values = {d, groups, form_of};
      l.head_bytes = (int)coded_head;
      l.value_offset = (int)side;
      l.key_rows = (d + groups + 1 + 2 * pairs + 15) / 16 * 16;
      l.key_map = keep(normals((size_t)o.kv_heads * d * l.key_rows, 0.12f, 1));
      const size_t value_rows = d + groups + 1, words = value_map_words(d, d);
      const std::vector<float> values = normals(o.kv_heads * d * value_rows, 0.1f, 2);
      std::vector<uint32_t> value_map(o.kv_heads * words);
      for (int head = 0; head < o.kv_heads; head++)
        value_map_fill(values.data() + head * d * value_rows, d, d, groups, value_map.data() + head * words);
      l.value_map = keep(value_map);
      l.rotating_pairs = pairs;
      if (pairs > 0) {
        l.own_curves = !own_pairs.empty();
        l.turning_pairs = l.own_curves ? (int)own_pairs.size() / o.kv_heads : pairs;
        std::vector<uint16_t> rows((size_t)o.kv_heads * l.turning_pairs);
        for (size_t i = 0; i < rows.size(); i++) {
          const int pair = (int)i % l.turning_pairs;
          rows[i] = (uint16_t)(pair < pairs ? d + groups + 1 + pair : 0xFFFF);
        }
        l.wave_rows = keep(rows);
        if (l.own_curves) l.pairs = keep(own_pairs), l.curves = keep(own_curves);
      }
    }
    l.unit_bytes = how.coded ? (size_t)o.kv_heads * coded_head : exact_page;
    size_t coded_pages = 0, exact_pages = 0;
    for (int length : what.lengths) {
      const size_t all = (length + 63) / 64, exact = how.coded ? std::min<size_t>(all, 6) : all;
      coded_pages += all - exact, exact_pages += exact;
    }
    bytes = coded_pages * o.kv_heads * coded_head + exact_pages * exact_page;
    const size_t run = (exact_page + l.unit_bytes - 1) / l.unit_bytes, units = coded_pages + exact_pages * run;
    layer_bytes = units * l.unit_bytes;
    pages = (uint8_t *)keep_empty(layer_bytes * o.layers);
    for (int i = 0; i < o.layers; i++) {
      uint8_t *at = pages + layer_bytes * i;
      fill_random<<<2048, 256, 0, stream>>>((uint32_t *)at, coded_pages * l.unit_bytes / 4, (uint32_t)i);
      fill_bf16<<<2048, 256, 0, stream>>>((uint16_t *)(at + coded_pages * l.unit_bytes), exact_pages * run * l.unit_bytes / 2,
                                          (uint32_t)i);
      if (how.coded && coded_pages)
        for (int side = 0; side < 2; side++)
          set_gains<<<2048, 256, 0, stream>>>(at, l.unit_bytes, o.kv_heads, coded_head, side * coded_head / 2 + 16 * d,
                                              how.log_gains, coded_pages);
      l.memory = at;
      layers.push_back(l);
    }
    check(cudaGetLastError());
    for (decode_layer &each : layers) each.rope = how.turning ? &rope : nullptr;
    int rows;
    check(decode_check(cuda, &shape, &layers[0], &rows));
  }

  void make_plan() {
    std::vector<decode_tile> tiles;
    std::vector<decode_page> list;
    std::vector<write_place> places;
    std::vector<int32_t> positions;
    const size_t unit = layers[0].unit_bytes, exact_page = (size_t)o.kv_heads * 2 * 64 * o.head_dim * 2;
    const int run = (int)((exact_page + unit - 1) / unit);
    int next_coded = 0, next_exact = 0, most_rows = 0;
    if (decode_check(cuda, &shape, &layers[0], &most_rows) != OSCAR_OK) {
      fprintf(stderr, "there is no kernel for this\n");
      exit(1);
    }
    if (most_rows > 8) {
      int64_t pages = 0;
      for (int length : what.lengths) pages += (length + 63) / 64 * o.kv_heads;
      if (!line_wide_pays(pages * ((shape.group + 7) / 8), pages * ((shape.group + 15) / 16), decode_blocks(cuda))) most_rows = 8;
    }
    for (int length : what.lengths) {
      const int all = (length + 63) / 64, exact = how.coded ? std::min(all, 6) : all;
      if (how.coded) next_exact += all - exact;
    }
    for (size_t s = 0; s < what.lengths.size(); s++) {
      const int length = what.lengths[s], all = (length + 63) / 64, exact = how.coded ? std::min(all, 6) : all;
      decode_tile first = {};
      first.token = (int)s;
      first.position = length - 1;
      first.exact_first = (int)list.size();
      first.exact_pages = exact;
      for (int i = 0; i < exact; i++, next_exact += run) list.push_back({next_exact, i == 0 ? 0 : all - exact + i});
      places.push_back({next_exact - run, (length - 1) % 64});
      positions.push_back(length - 1);
      first.coded_first = (int)list.size();
      first.coded_pages = all - exact;
      for (int i = 0; i < all - exact; i++) list.push_back({next_coded++, 1 + i});
      first.exact_tiles = (exact - 1) * 4 + (length - 1) % 64 / 16 + 1;
      const int cuts = (shape.group + most_rows - 1) / most_rows;
      for (int i = 0; i < cuts; i++) {
        decode_tile tile = first;
        tile.first_row = shape.group * i / cuts;
        tile.rows = shape.group * (i + 1) / cuts - tile.first_row;
        plan.rows = std::max(plan.rows, tile.rows);
        tiles.push_back(tile);
      }
    }
    decode_line line;
    if (!line_lay(tiles.data(), (int)tiles.size(), o.kv_heads, decode_blocks(cuda), &line)) {
      fprintf(stderr, "too much for one launch\n");
      exit(1);
    }
    plan.tiles = keep(tiles);
    plan.pages = keep(list);
    plan.tile_count = (int)tiles.size();
    plan.line = keep(std::vector<decode_line>(1, line));
    const size_t items = tiles.size() * o.kv_heads, width = (size_t)o.query_heads * o.head_dim * what.lengths.size();
    if (how.coded) space.prepared = keep_empty(items * decode_prepared_bytes(&layers[0], plan.rows));
    space.parts = keep(std::vector<float>((items + decode_blocks(cuda)) * decode_part_bytes(&shape) / sizeof(float), 0));
    q = keep(normals(width, 1, 3));
    out = (float *)keep_empty(width * 4);
    std::vector<double> frequencies(o.head_dim / 2);
    for (size_t i = 0; i < frequencies.size(); i++) frequencies[i] = std::pow(1e6, -2.0 * (double)i / o.head_dim);
    const size_t narrow = width / (size_t)shape.group;
    rows.q = q;
    rows.q_pitch = (int64_t)o.query_heads * o.head_dim;
    rows.kv_pitch = (int64_t)o.kv_heads * o.head_dim;
    rows.k = keep(normals(narrow, 1, 4));
    rows.v = keep(normals(narrow, 1, 5));
    rows.q_norm = rows.k_norm = keep(std::vector<float>(o.head_dim, 1));
    rows.eps = 1e-6f;
    rows.rotation = {o.head_dim / 2, o.head_dim / 2, 1, keep(frequencies)};
    rows.positions = keep(positions);
    rows.places = keep(places);
    rows.bad = keep(std::vector<unsigned long long>(1, ~0ull));
    rows.rotated = (float *)keep_empty(width * 4);
  }

  void attention() {
    for (const decode_layer &l : layers) check(decode_run(cuda, &shape, &l, &plan, q, &space, out));
  }
  void prepare() {
    for (const decode_layer &l : layers) check(decode_prepare(cuda, &shape, &l, &plan, q, &space));
  }
  void enter() {
    for (const decode_layer &l : layers) check(decode_enter(cuda, &shape, &l, &plan, &rows, &space));
  }
  void read() {
    for (int i = 0; i < o.layers; i++)
      read_kernel<<<2 * decode_blocks(cuda), 512, 0, stream>>>((const uint4 *)(pages + layer_bytes * i), bytes / 16,
                                                               (uint32_t *)out);
    check(cudaGetLastError());
  }

  ~bench() {
    check(cudaStreamSynchronize(stream));
    for (auto &m : memory) cuda_release(cuda, m.first, m.second);
  }
};

std::vector<setting> settings() {
  std::vector<int> ragged;
  uint64_t seed = 4;
  for (int i = 0; i < 64; i++) {
    seed = seed * 6364136223846793005u + 1442695040888963407u;
    ragged.push_back((int)(1024 * std::pow(100.0, (double)(seed >> 40) / (double)(1 << 24))));
  }
  return {{"1 x 1024", std::vector<int>(1, 1024)},       {"1 x 8192", std::vector<int>(1, 8192)},
          {"1 x 29952", std::vector<int>(1, 29952)},     {"1 x 32768", std::vector<int>(1, 32768)},
          {"1 x 59968", std::vector<int>(1, 59968)},     {"1 x 102400", std::vector<int>(1, 102400)},
          {"1 x 131072", std::vector<int>(1, 131072)},   {"8 x 1024", std::vector<int>(8, 1024)},
          {"8 x 8192", std::vector<int>(8, 8192)},       {"8 x 32768", std::vector<int>(8, 32768)},
          {"8 x 102400", std::vector<int>(8, 102400)},   {"32 x 32768", std::vector<int>(32, 32768)},
          {"64 x 1024", std::vector<int>(64, 1024)},     {"28 x 102400", std::vector<int>(28, 102400)},
          {"32 x 102400", std::vector<int>(32, 102400)}, {"64 ragged", ragged}};
}

const form forms[] = {{"turning", "int2, four gains, turning mean", true, true, 4},
                      {"most-turning", "int2, four gains, three quarters turning", true, true, 3},
                      {"half-turning", "int2, four gains, half of the pairs turning", true, true, 2},
                      {"quarter-turning", "int2, four gains, a quarter turning", true, true, 1},
                      {"four", "int2, four gains", true, true, 0},
                      {"one-turning", "int2, one gain, turning mean", true, false, 4},
                      {"one", "int2, one gain", true, false, 0},
                      {"bf16", "bf16", false, false, 0}};

void measure(const options &o, const setting &what, const form &how, const char *gpu, FILE *csv) {
  size_t free_bytes, total, tokens = 0;
  check(cudaMemGetInfo(&free_bytes, &total));
  for (int length : what.lengths) tokens += (size_t)length + 64;
  const size_t needed = tokens * o.kv_heads * (size_t)(how.coded ? 70 * o.head_dim / 128 : 4 * o.head_dim) * o.layers;
  options fitting = o;
  while ((double)needed / o.layers * fitting.layers > 0.9 * (double)free_bytes && fitting.layers > 1) fitting.layers--;
  bench b(fitting, what, how);
  const double read = time_graph([&] { b.read(); }) / fitting.layers;
  const double map = how.coded ? time_graph([&] { b.prepare(); }) / fitting.layers : 0;
  const double enter = time_graph([&] { b.enter(); }) / fitting.layers;
  const double attention = time_graph([&] { b.attention(); }) / fitting.layers;
  printf("%-12s %-32s %9.2f %9.2f %7.2f %8.2f %9.2f %8.3f %8.0f%s\n", what.name, how.name, (double)b.bytes / 1e6, attention, map,
         enter, read, attention / read, (double)b.bytes / attention / 1e3, fitting.layers < o.layers ? "  (fewer layers)" : "");
  if (csv)
    fprintf(csv, "%s,%d,%d,%d,%s,\"%s\",%zu,%.3f,%.3f,%.3f,%.3f\n", gpu, o.query_heads, o.kv_heads, o.head_dim, what.name,
            how.name, b.bytes, attention, map, read, enter);
  fflush(stdout);
}

/* Whether `name` stands in a list with commas between; without a list all do. */
bool named(const char *list, const char *name) {
  if (!list) return true;
  const std::string all = std::string(",") + list + ",", one = std::string(",") + name + ",";
  return all.find(one) != std::string::npos;
}

bool parse(int argc, char **argv, options *o) {
  for (int i = 1; i < argc; i++) {
    const std::string name = argv[i];
    if (i + 1 == argc) return false;
    const char *value = argv[++i];
    if (name == "--query-heads") {
      o->query_heads_list.clear();
      for (const char *at = value; *at; at += *at == ',') o->query_heads_list.push_back((int)strtol(at, (char **)&at, 10));
    } else if (name == "--kv-heads")
      o->kv_heads = atoi(value);
    else if (name == "--head-dim")
      o->head_dim = atoi(value);
    else if (name == "--layers")
      o->layers = atoi(value);
    else if (name == "--case")
      o->only = value;
    else if (name == "--forms")
      o->only_forms = value;
    else if (name == "--csv")
      o->csv = value;
    else
      return false;
  }
  for (int heads : o->query_heads_list)
    if (heads <= 0 || o->kv_heads <= 0 || heads % o->kv_heads != 0 || heads / o->kv_heads > 16) return false;
  return !o->query_heads_list.empty() && o->head_dim > 0 && o->layers > 0;
}

} // namespace

int main(int argc, char **argv) {
  options o;
  if (!parse(argc, argv, &o)) {
    fprintf(stderr, "usage: bench_cuda_attention [--query-heads LIST] [--kv-heads N] [--head-dim N] [--layers N] [--case NAMES] "
                    "[--forms NAMES] [--csv FILE]\n");
    return 2;
  }
  if (oscar_context_create(nullptr, &context) != OSCAR_OK) return 1;
  check(oscar_cuda_create(context, nullptr, &cuda));
  stream = (cudaStream_t)oscar_cuda_stream(cuda);
  oscar_cuda_info info;
  oscar_cuda_describe(cuda, &info);
  FILE *csv = o.csv ? fopen(o.csv, "w") : nullptr;
  if (csv) fprintf(csv, "gpu,query_heads,kv_heads,head_dim,sequences,form,bytes,attention_us,map_us,read_us,enter_us\n");
  for (int query_heads : o.query_heads_list) {
    o.query_heads = query_heads;
    printf("%s, %d query and %d KV heads of %d, %d layers\n", info.name, o.query_heads, o.kv_heads, o.head_dim, o.layers);
    printf("%-12s %-32s %9s %9s %7s %8s %9s %8s %8s\n", "sequences", "form", "MB", "us", "map us", "enter us", "read us",
           "x floor", "GB/s");
    for (const setting &what : settings())
      for (const form &how : forms)
        if (named(o.only, what.name) && named(o.only_forms, how.short_name)) measure(o, what, how, info.name, csv);
  }
  if (csv) fclose(csv);
  oscar_cuda_free(cuda);
  oscar_context_free(context);
  return 0;
}
