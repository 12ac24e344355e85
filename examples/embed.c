/*
 * embed.c - liboscar inside an engine of your own, in one file.
 *
 * An engine has queries, keys and values; here they are random, with the traits of real ones: a few strong directions and an
 * offset that all keys share. The example feeds them to a 2-bit cache chunk by chunk, lets the library attend over the codes, and
 * compares with exact attention over the same numbers: once with a rotation that needs no data, once with fitted ones.
 *
 *     cc -std=c17 embed.c $(pkg-config --cflags --libs oscar) -lm && ./a.out
 */
#include <math.h>
#include <oscar/attention.h>
#include <oscar/calib.h>
#include <stdio.h>
#include <stdlib.h>

enum { LAYERS = 2, QUERY_HEADS = 8, KV_HEADS = 2, DIM = 64, TOKENS = 1000, CHUNK = 150 };
enum { Q_ROW = QUERY_HEADS * DIM, KV_ROW = KV_HEADS * DIM }; /* floats of a token */

/* All numbers of the run, [layer][token][head][channel]. */
static float q[LAYERS][TOKENS * Q_ROW], k[LAYERS][TOKENS * KV_ROW], v[LAYERS][TOKENS * KV_ROW];
static float exact[LAYERS][TOKENS * Q_ROW], coded[LAYERS][TOKENS * Q_ROW];

static float uniform(void) { /* -1 .. 1; any generator will do */
  static unsigned long long state = 1;
  state = state * 6364136223846793005u + 1442695040888963407u;
  return (float)((double)(state >> 33) / 1073741824.0 - 1.0);
}

/* Rows with spectrum 1/sqrt(channel), mixed by a random map that all heads of a layer share, plus an offset. */
static void fill(float *x, int rows, float offset) {
  static float map[DIM][DIM];
  for (int i = 0; i < DIM; i++)
    for (int j = 0; j < DIM; j++) map[i][j] = uniform() / sqrtf(1.0f + (float)i);
  for (int r = 0; r < rows; r++)
    for (int j = 0; j < DIM; j++) x[r * DIM + j] = offset * map[0][j];
  for (int r = 0; r < rows; r++)
    for (int i = 0; i < DIM; i++) {
      float strength = uniform();
      for (int j = 0; j < DIM; j++) x[r * DIM + j] += strength * map[i][j];
    }
}

/* out = softmax(q k' / sqrt(d)) v, causal, written down as it is defined. */
static void attend_exactly(int layer) {
  static double score[TOKENS];
  for (int t = 0; t < TOKENS; t++)
    for (int h = 0; h < QUERY_HEADS; h++) {
      const float *query = &q[layer][t * Q_ROW + h * DIM];
      int kv = h / (QUERY_HEADS / KV_HEADS) * DIM; /* query heads share KV heads in runs */
      double sum = 0, out[DIM] = {0};
      for (int s = 0; s <= t; s++) {
        score[s] = 0;
        for (int j = 0; j < DIM; j++) score[s] += query[j] * k[layer][s * KV_ROW + kv + j];
        sum += score[s] = exp(score[s] / sqrt(DIM)); /* scores are small here: no maximum is taken off */
        for (int j = 0; j < DIM; j++) out[j] += score[s] * v[layer][s * KV_ROW + kv + j];
      }
      for (int j = 0; j < DIM; j++) exact[layer][t * Q_ROW + h * DIM + j] = (float)(out[j] / sum);
    }
}

/* Every call says how it went; the sentence is in the context. */
static void must(oscar_context *context, oscar_status status) {
  if (status == OSCAR_OK) return;
  fprintf(stderr, "embed: %s: %s\n", oscar_status_name(status), oscar_last_error(context));
  exit(1);
}

/* Runs all tokens through a cache with these codecs; returns the error of the attention output relative to its own size. */
static double run(oscar_context *context, const oscar_codec_set *codecs, const char *name) {
  oscar_cache_options options;
  oscar_cache_options_default(&options); /* the first 64 tokens and the latest 256 stay exact */
  options.layers = LAYERS;
  options.kv_heads = KV_HEADS;
  options.head_dim = DIM;
  options.codecs = codecs; /* NULL would be a plain BF16 cache */
  options.budget_bytes = oscar_cache_bytes_for(&options, TOKENS, 1, CHUNK);

  oscar_cache *cache;
  oscar_sequence *sequence;
  oscar_attention *attention;
  must(context, oscar_cache_create(context, &options, &cache));
  must(context, oscar_sequence_create(cache, &sequence));
  must(context, oscar_attention_create(cache, &(oscar_attention_options){.query_heads = QUERY_HEADS}, &attention));

  for (int at = 0; at < TOKENS; at += CHUNK) {
    int n = TOKENS - at < CHUNK ? TOKENS - at : CHUNK;
    must(context, oscar_sequence_begin(sequence, n)); /* reserves all that the step needs: nothing below can run out */
    for (int layer = 0; layer < LAYERS; layer++) {
      must(context, oscar_sequence_write(sequence, layer, &k[layer][at * KV_ROW], &v[layer][at * KV_ROW]));
      oscar_attention_job job = {sequence, n, &q[layer][at * Q_ROW], &coded[layer][at * Q_ROW], OSCAR_ATTENTION_BY_NUMBER};
      must(context, oscar_attention_run(attention, layer, 0, &job, 1));
    }
    must(context, oscar_sequence_commit(sequence));
  }

  double error = 0, size = 0;
  for (int layer = 0; layer < LAYERS; layer++)
    for (int i = 0; i < TOKENS * Q_ROW; i++) {
      error += pow(coded[layer][i] - exact[layer][i], 2);
      size += pow(exact[layer][i], 2);
    }
  double bf16 = 2.0 * 2 * LAYERS * TOKENS * KV_ROW;
  oscar_cache_usage usage;
  oscar_cache_usage_get(cache, &usage);
  printf("%-14s %5.2f bits where coded, %5.1f %% of BF16's memory at %d tokens, error %.2f %%\n", name,
         codecs ? usage.coded_bits_per_element : 16.0, 100 * (double)oscar_sequence_bytes(sequence) / bf16, TOKENS,
         100 * sqrt(error / size));
  oscar_attention_free(attention);
  oscar_sequence_free(sequence);
  oscar_cache_free(cache);
  return sqrt(error / size);
}

int main(void) {
  oscar_context *context;
  if (oscar_context_create(NULL, &context) != OSCAR_OK) return 1;
  oscar_calib *calib;
  must(context, oscar_calib_create(context, &(oscar_calib_geometry){LAYERS, QUERY_HEADS, KV_HEADS, DIM}, &calib));
  for (int layer = 0; layer < LAYERS; layer++) {
    fill(q[layer], TOKENS * QUERY_HEADS, 0);
    fill(k[layer], TOKENS * KV_HEADS, 2);
    fill(v[layer], TOKENS * KV_HEADS, 0);
    attend_exactly(layer);
    /* Calibration sees what attention saw and gave; an engine would use a text of its own, once per model. */
    must(context, oscar_calib_add(calib, layer, TOKENS, q[layer], k[layer], v[layer], exact[layer]));
  }

  oscar_codec_set *plain, *fitted;
  oscar_plain_options hadamard = {.rotate = true, .crumbs_per_channel = 1, .clip_keys = 0.96f, .clip_values = 0.92f};
  oscar_fit_options fit;
  oscar_fit_options_default(&fit);
  oscar_codec_set_info info = {LAYERS, KV_HEADS, DIM, "int2", "", ""};
  must(context, oscar_codec_set_create_plain(context, &info, &hadamard, &plain));
  must(context, oscar_calib_fit(calib, &info, &fit, &fitted)); /* oscar_codec_set_save would keep it in a file */
  oscar_calib_free(calib);

  double best = run(context, NULL, "bf16");
  double data_free = run(context, plain, "int2-hadamard");
  double learned = run(context, fitted, "int2");
  oscar_codec_set_free(plain);
  oscar_codec_set_free(fitted);
  oscar_context_free(context);
  return best < 0.01 && learned < data_free ? 0 : 1; /* as it should be */
}
