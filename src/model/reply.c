/*
 * reply.c - a machine over the bytes of an answer.
 *
 * Bytes that are not decided yet are held; everything before them was given to the sink. Each state looks at what is held and
 * either takes a prefix of it, moves to another state, or says that more must come. It decides on the held bytes alone and never
 * on how they came, so the answer may be cut anywhere.
 *
 * A call is over when its JSON closes; a closing mark after it is markup, and may be missing. What stands between a mark and the
 * end of its JSON is read once. Space that waits for a mark is bounded, so that feeding byte by byte stays linear.
 */
#include "model/reply.h"

#include "model/chat_private.h"

enum state {
  AT_START,       /* nothing but space yet: reasoning or a call may begin */
  THOUGHT_BEGINS, /* line breaks that belong to <think> */
  IN_THOUGHT,
  THOUGHT_ENDS, /* line breaks that belong to </think> */
  IN_CONTENT,
  IN_CALL,    /* its mark is held, and its JSON as far as it came */
  AFTER_CALL, /* space and closing marks that belong to the call */
};

struct reply_parser {
  oscar_context *context;
  enum chat_tool_style style; /* NONE where no calls are looked for */
  bool thinks;
  enum state state;
  char *buffer;
  size_t room;
  char *held; /* in the buffer */
  size_t bytes;
  size_t json, scan; /* of a call: where its JSON begins (at or after that while `opened` is false), how far it was read */
  int depth;
  bool opened, in_string, escaped;
};

enum { SPACE_MAX = 64, BREAKS_MAX = 2 };

static const char think_mark[] = "<think>", end_think_mark[] = "</think>";
/* Llama's calls may begin with a bare brace, too, where an answer begins. */
static const struct {
  const char *begin, *end;
} marks[] = {[CHAT_TOOLS_NONE] = {NULL, NULL},
             [CHAT_TOOLS_QWEN] = {"<tool_call>", "</tool_call>"},
             [CHAT_TOOLS_HERMES] = {"<tool_call>", "</tool_call>"},
             [CHAT_TOOLS_LLAMA3] = {"<|python_tag|>", ";"},
             [CHAT_TOOLS_MISTRAL] = {"[TOOL_CALLS]", NULL}};

/* One delta; the rest stays held. */
static oscar_status give(struct reply_parser *p, enum reply_kind kind, size_t bytes, reply_sink *sink, void *user) {
  if (bytes == 0) return OSCAR_OK;
  const struct reply_delta delta = {.kind = kind, .text = p->held, .bytes = bytes};
  p->held += bytes;
  p->bytes -= bytes;
  return sink(user, &delta);
}

/* ---- looking ---- */

static size_t count_of(const struct reply_parser *p, size_t from, const char *characters, size_t most) {
  size_t at = from;
  while (at < p->bytes && at - from < most && p->held[at] && strchr(characters, p->held[at])) at++;
  return at - from;
}
static size_t space_at(const struct reply_parser *p, size_t from) { return count_of(p, from, " \t\r\n", SPACE_MAX); }

/* All of a mark is there, or what is there may become it. */
enum match { NOT, UNDECIDED, WHOLE };
static enum match match_at(const struct reply_parser *p, size_t at, const char *mark) {
  if (!mark) return NOT;
  size_t length = strlen(mark), left = p->bytes - at, compared = left < length ? left : length;
  if (memcmp(p->held + at, mark, compared) != 0) return NOT;
  return compared == length ? WHOLE : UNDECIDED;
}

/* The first place where a mark is or may come to be; the end if there is none. */
static size_t find(const struct reply_parser *p, const char *mark, enum match *match) {
  *match = NOT;
  for (size_t at = 0; mark && at < p->bytes; at++) {
    const char *next = memchr(p->held + at, mark[0], p->bytes - at);
    if (!next) break;
    at = (size_t)(next - p->held);
    *match = match_at(p, at, mark);
    if (*match != NOT) return at;
  }
  return p->bytes;
}

/* ---- calls ---- */

/* A call whose mark, if it has one, ends at `at`. */
static void begin_call(struct reply_parser *p, size_t at) {
  p->state = IN_CALL;
  p->json = p->scan = at;
  p->depth = 0;
  p->opened = p->in_string = p->escaped = false;
}

/* Reads on; true once the JSON closed, at p->scan. */
static bool scan_json(struct reply_parser *p) {
  while (p->scan < p->bytes) {
    char c = p->held[p->scan++];
    if (p->escaped) {
      p->escaped = false;
    } else if (p->in_string) {
      p->escaped = c == '\\';
      p->in_string = c != '"';
    } else if (c == '"') {
      p->in_string = true;
    } else if (c == '{' || c == '[') {
      p->depth++;
    } else if ((c == '}' || c == ']') && --p->depth == 0) {
      return true;
    }
  }
  return false;
}

static json_t *arguments_of(const json_t *call) {
  json_t *arguments = json_object_get(call, "arguments");
  return arguments ? arguments : json_object_get(call, "parameters");
}
static bool is_call(const json_t *value) {
  return json_string_length(json_object_get(value, "name")) > 0 && json_is_object(arguments_of(value));
}
static bool are_calls(const json_t *value) {
  if (!json_is_array(value)) return is_call(value);
  for (size_t i = 0; i < json_array_size(value); i++)
    if (!is_call(json_array_get(value, i))) return false;
  return json_array_size(value) > 0;
}

static oscar_status give_call(struct reply_parser *p, const json_t *call, size_t bytes, reply_sink *sink, void *user) {
  struct writer w = {.context = p->context};
  write_json(&w, arguments_of(call), 0);
  write_text_bytes(&w, "", 1);
  const struct reply_delta delta = {.kind = REPLY_CALL,
                                    .text = p->held,
                                    .bytes = bytes,
                                    .name = json_string_value(json_object_get(call, "name")),
                                    .arguments = w.text,
                                    .id = json_string_value(json_object_get(call, "id"))};
  if (!w.status) {
    p->held += bytes;
    p->bytes -= bytes;
    w.status = sink(user, &delta);
  }
  mem_free(p->context, w.text);
  return w.status;
}

/* The held text up to where the JSON closed: one call, a list of calls, or content after all. */
static oscar_status finish_call(struct reply_parser *p, reply_sink *sink, void *user) {
  json_error_t error;
  json_t *value = json_loadb(p->held + p->json, p->scan - p->json, 0, &error);
  oscar_status status = OSCAR_OK;
  if (!value && json_error_code(&error) == json_error_out_of_memory)
    return set_error(p->context, OSCAR_NO_MEMORY, "no memory for the call of a tool");
  if (!value || !are_calls(value)) {
    p->state = IN_CONTENT;
    status = give(p, REPLY_CONTENT, p->scan, sink, user);
  } else {
    p->state = AFTER_CALL;
    p->thinks = false; /* no thoughts behind a call */
    size_t count = json_is_array(value) ? json_array_size(value) : 1;
    for (size_t i = 0; i < count && !status; i++)
      status = give_call(p, json_is_array(value) ? json_array_get(value, i) : value, i == 0 ? p->scan : 0, sink, user);
  }
  json_decref(value);
  return status;
}

/* ---- states: each takes a step; *more: nothing can be decided until more comes ---- */

static oscar_status step_start(struct reply_parser *p, bool *more, reply_sink *sink, void *user) {
  size_t space = space_at(p, 0);
  *more = space == p->bytes && space < SPACE_MAX;
  if (*more) return OSCAR_OK;
  enum match thought = p->thinks ? match_at(p, space, think_mark) : NOT, call = match_at(p, space, marks[p->style].begin);
  if (thought == WHOLE) {
    p->state = THOUGHT_BEGINS;
    return give(p, REPLY_MARKUP, space + sizeof think_mark - 1, sink, user);
  }
  if (call == WHOLE)
    begin_call(p, space + strlen(marks[p->style].begin));
  else if (p->style == CHAT_TOOLS_LLAMA3 && space < p->bytes && p->held[space] == '{')
    begin_call(p, space);
  else if (thought == UNDECIDED || call == UNDECIDED)
    *more = true;
  else
    p->state = IN_CONTENT;
  return OSCAR_OK;
}

static oscar_status step_breaks(struct reply_parser *p, enum state next, reply_sink *sink, void *user) {
  size_t breaks = count_of(p, 0, "\n", p->bytes);
  if (breaks < p->bytes) p->state = next;
  return give(p, REPLY_MARKUP, breaks, sink, user);
}

static oscar_status step_thought(struct reply_parser *p, bool *more, reply_sink *sink, void *user) {
  enum match match;
  size_t at = find(p, end_think_mark, &match), breaks = 0;
  while (breaks < at && breaks < BREAKS_MAX && p->held[at - breaks - 1] == '\n') breaks++;
  oscar_status status = give(p, REPLY_REASONING, at - breaks, sink, user);
  *more = match != WHOLE;
  if (status || *more) return status;
  p->state = THOUGHT_ENDS;
  p->thinks = false;
  return give(p, REPLY_MARKUP, breaks + sizeof end_think_mark - 1, sink, user);
}

/* A line break before a mark belongs to it: templates write it there. */
static oscar_status step_content(struct reply_parser *p, bool *more, reply_sink *sink, void *user) {
  const char *mark = marks[p->style].begin;
  enum match match;
  size_t at = find(p, mark, &match);
  size_t breaks = mark && at > 0 && p->held[at - 1] == '\n';
  *more = match != WHOLE;
  oscar_status status = give(p, REPLY_CONTENT, at - breaks, sink, user);
  if (!status && match == WHOLE) begin_call(p, breaks + strlen(mark));
  return status;
}

static oscar_status step_call(struct reply_parser *p, bool *more, reply_sink *sink, void *user) {
  if (!p->opened) {
    size_t at = p->json + space_at(p, p->json);
    *more = at == p->bytes;
    if (*more) return OSCAR_OK;
    p->opened = p->held[at] == '{' || (p->held[at] == '[' && p->style == CHAT_TOOLS_MISTRAL);
    if (!p->opened) {
      p->state = IN_CONTENT;
      return give(p, REPLY_CONTENT, p->json, sink, user);
    }
    p->json = p->scan = at;
  }
  if (scan_json(p)) return finish_call(p, sink, user);
  *more = true;
  return OSCAR_OK;
}

static oscar_status step_after(struct reply_parser *p, bool *more, reply_sink *sink, void *user) {
  const char *end = marks[p->style].end;
  size_t space = space_at(p, 0);
  *more = space == p->bytes && space < SPACE_MAX;
  if (*more) return OSCAR_OK;
  enum match ended = match_at(p, space, end);
  if (ended == WHOLE) return give(p, REPLY_MARKUP, space + strlen(end), sink, user);
  *more = ended == UNDECIDED;
  return *more ? OSCAR_OK : step_start(p, more, sink, user);
}

static oscar_status step(struct reply_parser *p, bool *more, reply_sink *sink, void *user) {
  switch (p->state) {
  case AT_START:
    return step_start(p, more, sink, user);
  case THOUGHT_BEGINS:
    return step_breaks(p, IN_THOUGHT, sink, user);
  case IN_THOUGHT:
    return step_thought(p, more, sink, user);
  case THOUGHT_ENDS:
    return step_breaks(p, AT_START, sink, user);
  case IN_CALL:
    return step_call(p, more, sink, user);
  case AFTER_CALL:
    return step_after(p, more, sink, user);
  case IN_CONTENT:
    break;
  }
  return step_content(p, more, sink, user);
}

/* ---- the parser ---- */

oscar_status reply_parser_create(const struct chat_template *chat, oscar_context *context, bool calls,
                                 struct reply_parser **parser) {
  struct reply_parser *p = *parser = mem_zalloc(context, 1, sizeof *p);
  if (!p) return OSCAR_NO_MEMORY;
  p->context = context;
  p->style = calls ? chat->tools : CHAT_TOOLS_NONE;
  p->thinks = chat->thinks;
  p->state = chat->opens_thinking ? THOUGHT_BEGINS : AT_START;
  return OSCAR_OK;
}

void reply_parser_free(struct reply_parser *parser) {
  if (!parser) return;
  mem_free(parser->context, parser->buffer);
  mem_free(parser->context, parser);
}

static oscar_status hold(struct reply_parser *p, const char *text, size_t bytes) {
  if (p->bytes) memmove(p->buffer, p->held, p->bytes);
  if (bytes > p->room - p->bytes) {
    size_t room = 2 * (p->bytes + bytes) + 256;
    char *larger = mem_resize(p->context, p->buffer, p->bytes, room);
    p->held = larger ? larger : p->buffer;
    if (!larger) return OSCAR_NO_MEMORY;
    p->buffer = larger;
    p->room = room;
  }
  p->held = p->buffer;
  memcpy(p->held + p->bytes, text, bytes);
  p->bytes += bytes;
  return OSCAR_OK;
}

oscar_status reply_feed(struct reply_parser *parser, const char *text, size_t bytes, reply_sink *sink, void *user) {
  if (bytes == 0) return OSCAR_OK;
  oscar_status status = hold(parser, text, bytes);
  for (bool more = false; !status && !more && parser->bytes > 0;) status = step(parser, &more, sink, user);
  return status;
}

oscar_status reply_end(struct reply_parser *parser, reply_sink *sink, void *user) {
  enum reply_kind kind = REPLY_CONTENT;
  if (parser->state == IN_THOUGHT) kind = REPLY_REASONING;
  if (parser->state == AFTER_CALL && space_at(parser, 0) == parser->bytes) kind = REPLY_MARKUP;
  return give(parser, kind, parser->bytes, sink, user);
}
