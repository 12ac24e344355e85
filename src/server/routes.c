/* routes.c - what there is, in one table. */
#include "server/state.h"

const struct route *route_list(int *count) {
  static const struct route routes[] = {
      {"/v1/chat/completions", METHOD_POST, DIALECT_OPENAI, false, openai_chat},
      {"/v1/completions", METHOD_POST, DIALECT_OPENAI, false, openai_completions},
      {"/v1/models", METHOD_GET, DIALECT_OPENAI, false, openai_models},
      {"/v1/models/*", METHOD_GET, DIALECT_OPENAI, false, openai_model},
      {"/v1/responses", METHOD_POST, DIALECT_OPENAI, false, responses_make},
      {"/v1/responses/*", METHOD_GET, DIALECT_OPENAI, false, responses_get},
      {"/v1/responses/*", METHOD_DELETE, DIALECT_OPENAI, false, responses_delete},
      {"/v1/messages", METHOD_POST, DIALECT_ANTHROPIC, false, anthropic_messages},
      {"/v1/messages/count_tokens", METHOD_POST, DIALECT_ANTHROPIC, false, anthropic_count},
      {"/tokenize", METHOD_POST, DIALECT_OPENAI, false, tokens_encode},
      {"/detokenize", METHOD_POST, DIALECT_OPENAI, false, tokens_decode},
      {"/v1/tokenize", METHOD_POST, DIALECT_OPENAI, false, tokens_encode},
      {"/v1/detokenize", METHOD_POST, DIALECT_OPENAI, false, tokens_decode},
      {"/v1/sessions", METHOD_GET, DIALECT_OPENAI, false, sessions_list},
      {"/v1/sessions", METHOD_POST, DIALECT_OPENAI, false, sessions_make},
      {"/v1/sessions/*", METHOD_GET, DIALECT_OPENAI, false, sessions_get},
      {"/v1/sessions/*", METHOD_PATCH, DIALECT_OPENAI, false, sessions_change},
      {"/v1/sessions/*", METHOD_DELETE, DIALECT_OPENAI, false, sessions_delete},
      {"/v1/sessions/*/save", METHOD_POST, DIALECT_OPENAI, false, sessions_save},
      {"/v1/sessions/*/load", METHOD_POST, DIALECT_OPENAI, false, sessions_load},
      {"/v1/sessions/*/fork", METHOD_POST, DIALECT_OPENAI, false, sessions_fork},
      {"/v1/cache", METHOD_GET, DIALECT_OPENAI, false, cache_picture},
      {"/metrics", METHOD_GET, DIALECT_OPENAI, false, metrics_text},
      {"/health", METHOD_GET, DIALECT_OPENAI, true, health},
      {"/", METHOD_GET, DIALECT_OPENAI, true, page_file},
      {"/page/*", METHOD_GET, DIALECT_OPENAI, true, page_file},
  };
  *count = (int)ARRAY_LENGTH(routes);
  return routes;
}
