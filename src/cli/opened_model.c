/* opened_model.c - see opened_model.h. */
#include "cli/opened_model.h"

oscar_status opened_model_open(const char *path, int threads, struct opened_model *m, char *error, size_t error_bytes) {
  *m = (struct opened_model){0};
  const oscar_context_options options = {.threads = threads};
  oscar_status status = oscar_context_create(&options, &m->context);
  if (status != OSCAR_OK) {
    snprintf(error, error_bytes, "the library could not be started: %s", oscar_status_name(status));
    return status;
  }
  status = backend_create_cpu(m->context, &m->backend);
  if (status == OSCAR_OK) status = model_load(m->context, m->backend, path, &m->model);
  if (status != OSCAR_OK) {
    snprintf(error, error_bytes, "%s", oscar_last_error(m->context));
    opened_model_close(m);
  }
  return status;
}

void opened_model_close(struct opened_model *m) {
  model_free(m->model);
  if (m->backend) m->backend->ops->free(m->backend);
  oscar_context_free(m->context);
  *m = (struct opened_model){0};
}
