/*
 * model/reply.h - an answer's text taken apart as it arrives: words for the reader, reasoning, calls of tools. Private.
 *
 * The text is that of the answer's tokens with the tokens of chat_template_visible spelled out. Deltas come in order, and their
 * texts after one another are the text that was fed: nothing is lost, nothing is shown twice. What may yet become a mark is held
 * back until it is decided. A call that is malformed is content, verbatim; names are not compared
 * with the tools that were offered.
 */
#ifndef OSCAR_REPLY_H
#define OSCAR_REPLY_H

#include "model/chat_template.h"

enum reply_kind {
  REPLY_CONTENT,
  REPLY_REASONING, /* inside <think> ... </think> */
  REPLY_CALL,      /* a whole call */
  REPLY_MARKUP,    /* what stands around reasoning and calls; nobody's words */
};
/* Valid during the call of the sink. */
struct reply_delta {
  enum reply_kind kind;
  const char *text;             /* the part of the answer that this is, not terminated */
  size_t bytes;                 /* 0 for the second and later calls of a list of calls */
  const char *name, *arguments; /* of a call: arguments are one JSON object */
  const char *id;               /* of a call that brought its own, else NULL */
};
/* A status other than OK ends the feeding and is returned by it. */
typedef oscar_status reply_sink(void *user, const struct reply_delta *delta);

struct reply_parser;
/* calls: tools were offered, calls are looked for; without, only reasoning is. One parser follows one answer. */
oscar_status reply_parser_create(const struct chat_template *chat, oscar_context *context, bool calls,
                                 struct reply_parser **parser);
void reply_parser_free(struct reply_parser *parser);
oscar_status reply_feed(struct reply_parser *parser, const char *text, size_t bytes, reply_sink *sink, void *user);
/* The answer is over: what was held back is content, unless it is a whole call. */
oscar_status reply_end(struct reply_parser *parser, reply_sink *sink, void *user);

#endif
