/* cli/eval_generation.h - `oscar eval --generate`: its options, its run, its report. Private. */
#ifndef OSCAR_CLI_EVAL_GENERATION_H
#define OSCAR_CLI_EVAL_GENERATION_H

#include "cli/args.h"
#include "cli/kv_list.h"
#include "cli/models.h"
#include "cli/progress.h"
#include "eval/generation.h"

struct generation_arguments {
  int tokens; /* 0: another measure is wanted */
  int seeds;
};
struct option_group eval_generation_group(struct generation_arguments *arguments);

/* `text` (NULL: prompts of our own) has a prompt on each line that is not empty; it is cut into them. The codec sets of the list
 * have been obtained. */
oscar_status eval_generation_report(const struct loaded_model *m, const struct kv_list *list, struct generation_options *options,
                                    char *text, bool json, struct progress_line *line);

#endif
