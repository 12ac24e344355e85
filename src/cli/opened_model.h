/* cli/opened_model.h - a model without a cache of its own, for commands that make several. Private. */
#ifndef OSCAR_CLI_OPENED_MODEL_H
#define OSCAR_CLI_OPENED_MODEL_H

#include "cli/cli.h"
#include "model/model.h"

struct opened_model {
  oscar_context *context;
  struct backend *backend;
  struct model *model;
};
/* Context, backend and model; on failure `error` has the sentence and everything is closed. */
oscar_status opened_model_open(const char *path, int threads, struct opened_model *m, char *error, size_t error_bytes);
void opened_model_close(struct opened_model *m);

#endif
