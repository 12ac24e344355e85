/*
 * tests/server/fake_service.h - a service (engine/service.h) without a model, which says what it is told to.
 *
 * It says again what the user said last, a token at a time; a text that begins with one of these words does something else:
 *   !long N        N times "word "            !slow N MS     the same with a pause before each
 *   !wait          nothing until cancelled    !error         an answer that fails
 *   !full          refused: too many wait     !stopping      refused: the service stops
 *   !impossible    refused: does not fit      !call NAME ARGUMENTS   a call of a tool, in Qwen's form
 *   !think A|B     thinks A, says B           !broken        bytes that are no UTF-8 in the tokens
 * A grammar is obeyed by the one sentence that it is made of: of a schema {"schema":...}, of JSON {"json":true}, of forms the
 * first one's literals with {} for schemas.
 */
#ifndef OSCAR_TEST_FAKE_SERVICE_H
#define OSCAR_TEST_FAKE_SERVICE_H

#include "engine/service.h"

/* A GGUF file of a tokenizer with a template that knows tools and thoughts, from a stored one, at `path`. */
void fake_model_write(const char *stored, const char *path);
struct service *fake_service_create(const char *model_path);
void fake_service_limit(struct service *service, int most_running); /* more are refused */
int fake_service_running(struct service *service);
int64_t fake_service_cancelled(struct service *service); /* since the start */

#endif
