/* cli/eval_job.h - what the parts of a report share: the model, the KV types, what the user asked for. Private. */
#ifndef OSCAR_CLI_EVAL_JOB_H
#define OSCAR_CLI_EVAL_JOB_H

#include "cli/eval_report.h"
#include "eval/diagnostics.h"

struct job {
  const struct loaded_model *m;
  const struct kv_list *list;
  const struct eval_request *request;
  struct progress_line *line;
  int32_t *ids; /* [count] the text */
  int count;
};

/* ---- eval_diagnose.c ---- */
void job_diagnose_options(const struct job *job, int context, int64_t tokens, int every, struct diagnose_options *options);
oscar_status job_diagnose(const struct job *job, const struct diagnose_options *options, struct diagnose_result *result);
/* Measures and prints. */
oscar_status job_print_diagnosis(const struct job *job, int every);

#endif
