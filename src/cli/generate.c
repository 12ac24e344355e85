/* generate.c - the loop that turns a fed session into text, and the two ways of reporting it. */
#include "cli/generate.h"
#include "engine/json_text.h"

#include <stdlib.h>
#include <string.h>

/* Room for one more token and its text; false when memory is out. */
static bool grow(struct generation *g, size_t *id_room, size_t *text_room, size_t piece_bytes) {
  if ((size_t)g->count == *id_room) {
    size_t room = *id_room ? *id_room * 2 : 64;
    int32_t *ids = realloc(g->ids, room * sizeof *ids);
    if (!ids) return false;
    g->ids = ids;
    *id_room = room;
  }
  if (g->text_bytes + piece_bytes + 1 > *text_room) {
    size_t room = (g->text_bytes + piece_bytes + 1) * 2;
    char *text = realloc(g->text, room);
    if (!text) return false;
    g->text = text;
    *text_room = room;
  }
  return true;
}

oscar_status prompt_ids(struct engine *engine, const char *text, size_t bytes, int32_t **ids, int *count) {
  const struct tokenizer *tokenizer = model_tokenizer(engine->model);
  int32_t *body = NULL;
  oscar_status status = tokenizer_encode(tokenizer, text, bytes, true, &body, count);
  if (status != OSCAR_OK) return status;
  const int32_t bos = tokenizer_bos(tokenizer);
  const int first = tokenizer_adds_bos(tokenizer) && bos >= 0 && !(*count > 0 && body[0] == bos);
  *ids = mem_alloc(engine->context, (size_t)(*count + first), sizeof **ids);
  if (*ids) {
    if (first) (*ids)[0] = bos;
    memcpy(*ids + first, body, (size_t)*count * sizeof **ids);
    *count += first;
  }
  mem_free(engine->context, body);
  if (!*ids) return OSCAR_NO_MEMORY;
  if (*count > 0) return OSCAR_OK;
  mem_free(engine->context, *ids);
  *ids = NULL;
  return set_error(engine->context, OSCAR_INVALID_ARGUMENT, "the prompt is empty and this model has no token to begin with");
}

oscar_status generate(struct engine *engine, struct session *session, int limit, FILE *stream, struct generation *out) {
  *out = (struct generation){.stop = STOP_LIMIT};
  size_t id_room = 0, text_room = 0;
  const struct tokenizer *tokenizer = model_tokenizer(engine->model);
  if (!grow(out, &id_room, &text_room, 0))
    return set_error(engine->context, OSCAR_NO_MEMORY, "out of memory for the generated text");
  out->text[0] = '\0';
  while (out->count < limit) {
    if (interrupt_requested()) {
      out->stop = STOP_INTERRUPTED;
      break;
    }
    if (session_length(session) >= engine->options.context) {
      out->stop = STOP_CONTEXT_FULL;
      break;
    }
    int32_t id;
    bool end;
    oscar_status status = session_next(session, &id, &end);
    if (status != OSCAR_OK) return status;
    if (end) {
      out->stop = STOP_END_OF_TURN;
      break;
    }
    size_t bytes;
    const char *piece = tokenizer_piece(tokenizer, id, false, &bytes);
    if (!grow(out, &id_room, &text_room, bytes))
      return set_error(engine->context, OSCAR_NO_MEMORY, "out of memory for the generated text");
    out->ids[out->count++] = id;
    memcpy(out->text + out->text_bytes, piece, bytes);
    out->text_bytes += bytes;
    out->text[out->text_bytes] = '\0';
    if (stream) {
      fwrite(piece, 1, bytes, stream);
      fflush(stream);
      if (ferror(stream)) return set_error(engine->context, OSCAR_IO, "the output cannot be written");
    }
  }
  return OSCAR_OK;
}

void generation_free(struct generation *g) {
  free(g->ids);
  free(g->text);
  *g = (struct generation){0};
}

static json_t *json_ids(const int32_t *ids, int count) {
  json_t *array = json_array();
  for (int i = 0; i < count; i++) json_array_append_new(array, json_integer(ids[i]));
  return array;
}

static double per_second(int64_t count, int64_t ns) { return ns > 0 ? (double)count * 1e9 / (double)ns : 0; }

void print_generation_json(const int32_t *prompt, int n_prompt, const struct generation *g, const struct session *session) {
  const struct session_timings *t = session_timings_of(session);
  const oscar_sequence *sequence = session_sequence(session);
  json_t *root =
      json_pack("{s:o, s:o, s:o, s:{s:f, s:f}, s:{s:I, s:I}, s:{s:I, s:f}}", "prompt_ids", json_ids(prompt, n_prompt), "ids",
                json_ids(g->ids, g->count), "text", json_text(g->text, g->text_bytes), "timings", "prompt_tokens_per_s",
                per_second(t->prompt_tokens, t->prompt_ns), "decode_tokens_per_s", per_second(t->decoded_tokens, t->decode_ns),
                "speculation", "guessed", (json_int_t)t->guessed, "accepted", (json_int_t)t->accepted, "cache", "bytes",
                (json_int_t)oscar_sequence_bytes(sequence), "bits_per_element", oscar_sequence_bits_per_element(sequence));
  json_dumpf(root, stdout, JSON_COMPACT | JSON_REAL_PRECISION(6));
  putchar('\n');
  json_decref(root);
}

void print_generation_numbers(const struct generation *g, const struct session *session) {
  const struct session_timings *t = session_timings_of(session);
  const oscar_sequence *sequence = session_sequence(session);
  char bytes[32], guesses[64] = "";
  if (t->guessed)
    snprintf(guesses, sizeof guesses, ", %lld of %lld guesses right", (long long)t->accepted, (long long)t->guessed);
  fprintf(stderr, "[prompt %lld tokens, %.1f tokens/s; answer %d tokens, %.1f tokens/s%s; cache %s, %.2f bits per element%s]\n",
          (long long)t->prompt_tokens, per_second(t->prompt_tokens, t->prompt_ns), g->count,
          per_second(t->decoded_tokens, t->decode_ns), guesses,
          format_bytes((double)oscar_sequence_bytes(sequence), bytes, sizeof bytes), oscar_sequence_bits_per_element(sequence),
          g->stop == STOP_CONTEXT_FULL  ? "; the context is full"
          : g->stop == STOP_INTERRUPTED ? "; interrupted"
                                        : "");
}
