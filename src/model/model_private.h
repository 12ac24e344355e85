/* model/model_private.h - what model.c and forward.c share. */
#ifndef OSCAR_MODEL_PRIVATE_H
#define OSCAR_MODEL_PRIVATE_H

#include "model/architecture.h"
#include "model/model.h"

struct model {
  oscar_context *context;
  struct backend *backend;
  struct gguf *file;
  const struct architecture *architecture;
  struct hyperparameters parameters;
  struct model_weights weights;
  struct tokenizer *tokenizer;
  char fingerprint[65];
  size_t weight_bytes;
};

#endif
