/* cli/eval_tasks.h - `oscar eval --tasks`: its options, its run, its report. Private. */
#ifndef OSCAR_CLI_EVAL_TASKS_H
#define OSCAR_CLI_EVAL_TASKS_H

#include "cli/args.h"
#include "cli/kv_list.h"
#include "cli/models.h"
#include "cli/progress.h"
#include "eval/tasks.h"

struct tasks_arguments {
  const char *tasks, *lengths, *filler; /* as given, or NULL */
  int questions;                        /* 0: not given */
  const char *kv;                       /* of a report: the types the tasks are for; NULL: all */
};
struct option_group eval_tasks_group(struct tasks_arguments *arguments);

/* Fills in tasks, lengths and questions; "none" are no tasks, which only a report can do with. EXIT_DONE, or the exit code after
 * a message. */
int eval_tasks_parse(const struct tasks_arguments *arguments, struct tasks_options *options);

/* `filler_name` is what the report calls the prose. The codec sets of the list have been obtained. */
oscar_status eval_tasks_report(const struct loaded_model *m, const struct kv_list *list, const struct tasks_options *options,
                               const char *filler_name, bool json, struct progress_line *line);

#endif
