/* cli/eval_report.h - what `oscar eval` does besides the comparison of one list: diagnostics and reports. Private. */
#ifndef OSCAR_CLI_EVAL_REPORT_H
#define OSCAR_CLI_EVAL_REPORT_H

#include "cli/args.h"
#include "cli/eval_tasks.h"
#include "cli/kv_list.h"
#include "cli/models.h"
#include "cli/progress.h"

struct report_arguments {
  bool diagnose;
  const char *suite, *folder; /* NULL: not given */
  int every;
};
/* --diagnose, --every, --suite, --report */
struct option_group report_group(struct report_arguments *arguments);

/* What else the user said. Numbers below zero and a context of 0: not given. */
struct eval_request {
  const char *model, *file, *rotation; /* as given; rotation may be NULL */
  const char *text;
  size_t bytes;
  int context, first, chunk, sink, recent;
  int64_t tokens;
  const struct tasks_options *tasks; /* of a report; without tasks: none */
  const char *tasks_kv;              /* the types they are for, separated by commas; NULL: all */
  bool json;
};

/* EXIT_DONE, or the exit code after a message. `json`: whether --json was given. */
int report_check(struct report_arguments *arguments, bool json);
/* Whether eval_report is to be called in place of the plain comparison. */
bool report_is_wanted(const struct report_arguments *arguments);
/* The KV types to compare when the user names none; NULL: as without a report. */
const char *report_kv_types(const struct report_arguments *arguments);

/* What a report asks of the tasks, where the user has not said it. own_kv: the user has named the KV types. */
void report_fill_tasks(const struct report_arguments *arguments, bool own_kv, struct tasks_arguments *tasks);

/* Measures and prints (--diagnose) or writes (--report). */
oscar_status eval_report(const struct loaded_model *m, struct kv_list *list, const struct eval_request *request,
                         const struct report_arguments *arguments, struct progress_line *line);

#endif
