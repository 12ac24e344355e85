/*
 * engine.c - opening everything a run needs, in order: context, device, model, codecs, cache, runner.
 *
 * A failure anywhere frees what was made and leaves one sentence. The cache budget defaults to what one sequence of the whole
 * context needs, so that running out can only mean that the user asked for less.
 */
#include "engine/engine.h"
#include "engine/speculate.h"

#include <string.h>

/* Products of a GPU want more tokens at once before weights cost nothing beside them. */
#define CPU_CHUNK 512
#define GPU_CHUNK 2048

void engine_options_default(struct engine_options *options) {
  *options = (struct engine_options){.kv = "int2", .sink_tokens = -1, .recent_tokens = -1, .device = "cpu"};
}

/* Windows are given in tokens and held in pages. */
static oscar_status window_pages(oscar_context *context, const char *what, int tokens, int *pages) {
  if (tokens < 0) return OSCAR_OK;
  if (tokens % OSCAR_PAGE_TOKENS)
    return set_error(context, OSCAR_INVALID_ARGUMENT, "the %s window is %d tokens; expected a multiple of %d", what, tokens,
                     OSCAR_PAGE_TOKENS);
  *pages = tokens / OSCAR_PAGE_TOKENS;
  return OSCAR_OK;
}

oscar_status engine_cache_options(oscar_context *context, const struct model *model, const struct engine_options *options,
                                  const oscar_codec_set *codecs, oscar_cache_options *cache) {
  model_cache_options(model, cache);
  cache->codecs = codecs;
  oscar_status status = window_pages(context, "sink", options->sink_tokens, &cache->sink_pages);
  if (status == OSCAR_OK) status = window_pages(context, "recent", options->recent_tokens, &cache->recent_pages);
  return status;
}

int engine_chunk(int asked, const oscar_cuda *cuda) { return asked ? asked : cuda ? GPU_CHUNK : CPU_CHUNK; }

static oscar_status effective_context(struct engine *e) {
  const struct model_geometry *g = model_geometry_of(e->model);
  struct engine_options *o = &e->options;
  if (o->context == 0) o->context = g->context_trained;
  if (o->context < 1 || o->context > g->context_trained)
    return set_error(e->context, OSCAR_INVALID_ARGUMENT, "a context of %lld tokens; this model was trained for 1 to %lld",
                     (long long)o->context, (long long)g->context_trained);
  o->chunk = engine_chunk(o->chunk, e->cuda);
  if (o->chunk < 1) return set_error(e->context, OSCAR_INVALID_ARGUMENT, "a chunk of %d tokens; expected at least 1", o->chunk);
  if (o->chunk > o->context) o->chunk = (int)o->context;
  return OSCAR_OK;
}

static oscar_status open_cache(struct engine *e) {
  struct engine_options *o = &e->options;
  oscar_cache_options cache;
  oscar_status status = engine_cache_options(e->context, e->model, o, e->codecs, &cache);
  if (status != OSCAR_OK) return status;
  if (o->kv_memory_bytes == 0)
    o->kv_memory_bytes =
        oscar_cache_bytes_for(&cache, o->context, 1, o->chunk) + (o->knows_prefixes ? oscar_prefix_bytes_for(o->context, 1) : 0);
  cache.budget_bytes = o->kv_memory_bytes;
  return oscar_cache_create(e->context, &cache, &e->cache);
}

static oscar_status check_guesses(struct engine *e) {
  const struct engine_options *o = &e->options;
  if (o->guesses >= 0 && o->guesses <= MOST_GUESSES) return OSCAR_OK;
  return set_error(e->context, OSCAR_INVALID_ARGUMENT, "%d guesses at a time; expected 0 (none) to %d", o->guesses, MOST_GUESSES);
}

static oscar_status open_draft(struct engine *e) {
  const struct engine_options *o = &e->options;
  if (o->guesses == 0 || !o->draft_path) return OSCAR_OK;
  return draft_create(e->model, o->draft_path, DRAFT_KV, o->context, 1, &e->draft);
}

static oscar_status open_parts(struct engine *e) {
  struct engine_options *o = &e->options;
  oscar_status status = kv_type_with_bits(e->context, o->kv, o->bits, e->kv, sizeof e->kv);
  if (status != OSCAR_OK) return status;
  o->kv = e->kv;
  if ((status = kv_type_check(e->context, o->kv)) != OSCAR_OK) return status;
  if ((status = check_guesses(e)) != OSCAR_OK) return status;
  if ((status = device_open(e->context, o->device, o->weights, &e->cuda, &e->backend)) != OSCAR_OK) return status;
  if ((status = model_load(e->context, e->backend, o->model_path, &e->model)) != OSCAR_OK) return status;
  if ((status = effective_context(e)) != OSCAR_OK) return status;
  if ((status = codec_set_obtain(e->model, o->kv, o->rotation_file, o->progress, &e->codecs)) != OSCAR_OK) return status;
  if ((status = open_cache(e)) != OSCAR_OK) return status;
  if ((status = runner_create(e->model, e->cache, o->chunk, &e->runner)) != OSCAR_OK) return status;
  return open_draft(e);
}

oscar_context_options engine_context_options(const struct engine_options *options) {
  return (oscar_context_options){
      .threads = options->threads, .cpus = options->cpus.count ? options->cpus.cpu : NULL, .n_cpus = options->cpus.count};
}

oscar_status engine_open(const struct engine_options *options, struct engine *engine, char *error_text, size_t error_bytes) {
  *engine = (struct engine){.options = *options};
  const oscar_context_options context = engine_context_options(options);
  oscar_status status = oscar_context_create(&context, &engine->context);
  if (status != OSCAR_OK) {
    snprintf(error_text, error_bytes, "the library could not be started: %s", oscar_status_name(status));
    return status;
  }
  status = open_parts(engine);
  if (status == OSCAR_OK) return status;
  snprintf(error_text, error_bytes, "%s", oscar_last_error(engine->context));
  engine_close(engine);
  return status;
}

void engine_close(struct engine *engine) {
  draft_free(engine->draft);
  runner_free(engine->runner);
  oscar_cache_free(engine->cache);
  oscar_codec_set_free(engine->codecs);
  model_free(engine->model);
  if (engine->backend) engine->backend->ops->free(engine->backend);
  oscar_cuda_free(engine->cuda);
  oscar_context_free(engine->context);
  *engine = (struct engine){0};
}
