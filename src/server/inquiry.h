/*
 * server/inquiry.h - one request to the model and its answer, in whatever dialect. Private to the room.
 *
 * An endpoint reads its fields into an inquiry, the shared part of which is here, and names the form that the answer has. The
 * answer's events are then taken one after another: what is said is collected, and for a stream written at once.
 */
#ifndef OSCAR_SERVER_INQUIRY_H
#define OSCAR_SERVER_INQUIRY_H

#include "model/reply.h"
#include "server/state.h"

enum tool_use { TOOLS_AUTO, TOOLS_NONE, TOOLS_REQUIRED };

struct choice {
  int index;
  struct buffer text, reasoning; /* so far */
  json_t *calls;                 /* [{"id", "name", "arguments"}] */
  json_t *logprobs;              /* [{"token", "logprob", "bytes", "top_logprobs"}] */
  struct reply_parser *parser;   /* NULL: the text is all content */
  bool finished;
  enum finish_reason reason;
  char *stopped_by;
  /* of streams */
  bool begun;
  int block;      /* Anthropic, responses: which is open, or would be next */
  int block_kind; /* 0: none is open */
  int calls_written;
  size_t block_start; /* in text: where the open block's begins */
};

/* How a dialect writes an answer. `out` gets the bytes of a stream. */
struct answer_form {
  const char *id_prefix;
  const char *call_prefix; /* of ids of calls; NULL: there are none */
  const char *ping;        /* what a stream says when there is nothing to say */
  void (*begin)(struct inquiry *g, struct buffer *out);
  void (*text)(struct inquiry *g, struct choice *choice, const char *text, size_t bytes, json_t *logprobs, struct buffer *out);
  void (*reasoning)(struct inquiry *g, struct choice *choice, const char *text, size_t bytes, struct buffer *out); /* or NULL */
  void (*call)(struct inquiry *g, struct choice *choice, const json_t *call, struct buffer *out);
  void (*finish)(struct inquiry *g, struct choice *choice, struct buffer *out);
  void (*end)(struct inquiry *g, struct buffer *out);
  void (*fail)(struct inquiry *g, const struct refusal *refusal, struct buffer *out); /* instead of end */
  json_t *(*whole)(struct inquiry *g);                                                /* the answer of one that does not stream */
};

struct inquiry {
  struct server *server;
  const struct answer_form *form;
  json_t *body; /* the request; texts below point into it */
  void **kept;  /* [n_kept], what had to be made besides */
  int n_kept;
  struct chat_message *messages;
  int n_messages, room_messages;
  struct chat_tool *tools;
  int n_tools;
  enum tool_use tool_use;
  const char *tool_name; /* with TOOLS_REQUIRED: this one */
  struct request_options options;
  int32_t *ids;
  const char **stops;
  struct token_bias *bias;
  struct grammar *grammar;
  bool stream, include_usage, thinking;
  const char *model; /* as the client called it */
  const char *session;
  char *user, *session_text;
  json_t *session_messages; /* of the request, as a session keeps them */
  /* of /v1/responses */
  json_t *echo;         /* fields of the request that the response repeats */
  json_t *conversation; /* what a next request continues */
  json_t *output;       /* items */
  bool store;
  int64_t sequence;
  /* the answer */
  char id[48];
  int64_t created;
  oscar_context *parsing; /* of the parsers */
  struct choice *choices; /* [options.choices] */
  struct request_usage usage;
  bool done;
  oscar_status status; /* of a choice that failed */
  char error[512];
  bool cancelled;
};

/* NULL when memory is out. Takes the reference of the body. */
struct inquiry *inquiry_create(struct server *server, const struct answer_form *form, json_t *body);
void inquiry_free(struct inquiry *g);
/* Kept until the inquiry is freed; returns `pointer`; NULL (and nothing is kept) when memory is out or it was NULL. */
void *inquiry_keep(struct inquiry *g, void *pointer);

/* ---- reading requests (request_fields.c) ---- */
extern const struct field_rule common_rules[];
/* Sampling, limits, seed, penalties, bias, user, session, ignore_eos, grammar. */
bool read_common(struct inquiry *g, const struct fields *fields);
bool read_stops(struct inquiry *g, const struct fields *fields, const char *name);
bool read_stream(struct inquiry *g, const struct fields *fields);
/* A schema that the answer has to obey; `name` for complaints. */
bool obey_schema(struct inquiry *g, const json_t *schema, const struct fields *fields, const char *name);
bool obey_json(struct inquiry *g, const struct fields *fields, const char *name);
/* {"type": "text" | "json_object" | "json_schema", ...}; nested: the schema is under "json_schema". */
bool read_format(struct inquiry *g, const struct fields *fields, const char *name, bool nested);

/* ---- conversations (messages.c) ---- */
struct chat_message *add_message(struct inquiry *g, const char *role, const char *content, const struct fields *fields);
bool add_call(struct inquiry *g, struct chat_message *message, const char *id, const char *name, const char *arguments,
              const struct fields *fields);
/* The texts of a list of parts joined; types: those that are texts, by commas. */
bool parts_text(struct inquiry *g, const struct fields *fields, const char *name, const char *types, const char **text);
bool add_tool(struct inquiry *g, const char *name, const char *description, const json_t *parameters,
              const struct fields *fields);
/* `tools` whose name, description and schema lie beside their type, which is to be `served`; unsaid: the type of one that says
 * none, or NULL: it has to. */
bool read_flat_tools(struct inquiry *g, const struct fields *fields, const char *served, const char *unsaid, const char *schema);
/* A client's role in the words of templates (developer: system); NULL: there is no such role. */
const char *template_role(const char *role);
/* ids of the conversation, what an answer must be that has to call a tool. */
bool encode_conversation(struct inquiry *g, struct frontend *frontend, struct refusal *refusal);

/* ---- running (inquiry.c) ---- */
/* How an endpoint reads a request; false: a refusal. */
typedef bool read_request(struct inquiry *g, const struct fields *fields, struct frontend *frontend);
/* A request's body, read; NULL: a refusal. */
struct inquiry *inquiry_parse(struct server *server, struct frontend *frontend, const struct answer_form *form,
                              read_request *read, const char *body, size_t bytes, struct refusal *refusal);
/* Reads the exchange's body and submits what it asks, or replies why not. */
void inquiry_run(struct exchange *exchange, struct frontend *frontend, const struct answer_form *form, read_request *read);

/* Gives the request to the service: the exchange streams or works from here on, or is ready with a refusal. The inquiry is the
 * exchange's. */
void inquiry_submit(struct exchange *exchange, struct inquiry *g, const struct frontend *frontend);
/* Takes the events that are there; `out` is NULL for an answer that does not stream. True: EVENT_DONE was among them. */
bool inquiry_take(struct exchange *exchange, struct buffer *out);
void inquiry_begin(struct exchange *exchange, struct buffer *out);
/* After EVENT_DONE: what the service keeps besides. For workers. */
bool inquiry_has_more_to_do(const struct inquiry *g);
void inquiry_finish(struct inquiry *g);
void inquiry_end(struct inquiry *g, struct buffer *out);
void inquiry_reply(struct exchange *exchange); /* of one that does not stream */
void queued_events_free(struct exchange *exchange);
bool events_waiting(const struct exchange *exchange);
/* false: why the answer is none (an error, a deadline, the server's stop) */
bool inquiry_succeeded(const struct inquiry *g, struct refusal *refusal);

/* {"role", "content", "tool_calls"} of an answer, as OpenAI has it. */
json_t *choice_message(const struct choice *choice);
json_t *openai_usage(const struct inquiry *g);
/* A chunk "data: {...}\n\n", and with its type "event: TYPE\n" before it; take the reference. */
void write_data(struct buffer *out, json_t *value);
void write_event(struct buffer *out, const char *type, json_t *value);

/* Of each dialect, for tests: what inquiry_run reads. */
struct inquiry *openai_chat_parse(struct server *server, struct frontend *frontend, const char *body, size_t bytes,
                                  struct refusal *refusal);
struct inquiry *openai_completions_parse(struct server *server, struct frontend *frontend, const char *body, size_t bytes,
                                         struct refusal *refusal);
struct inquiry *responses_parse(struct server *server, struct frontend *frontend, const char *body, size_t bytes,
                                struct refusal *refusal);
struct inquiry *anthropic_parse(struct server *server, struct frontend *frontend, const char *body, size_t bytes,
                                struct refusal *refusal);

#endif
