/*
 * cli/kv_list.h - "bf16,int4,int2" on the command line, and the codec sets these names mean for a model. Private.
 * An entry TYPE=FILE takes its codecs from a file of 'oscar calibrate'.
 */
#ifndef OSCAR_CLI_KV_LIST_H
#define OSCAR_CLI_KV_LIST_H

#include "cli/cli.h"
#include "engine/engine.h"

enum { KV_LIST_ROOM = 16 };

struct kv_list {
  int count;
  char *text;                      /* the list, cut into its entries */
  const char *names[KV_LIST_ROOM]; /* entries as they were written: what reports call them */
  char type[KV_LIST_ROOM][24];
  const char *files[KV_LIST_ROOM]; /* NULL: none was named */
  oscar_codec_set *sets[KV_LIST_ROOM];
};

/* EXIT_DONE, or the exit code after a message that names the unknown entry. Free with kv_list_free in any case. */
int kv_list_parse(const char *command, const char *text, struct kv_list *list);
/* EXIT_DONE, or the exit code after a message that names an entry that exists for evaluation only. */
int kv_list_check_runnable(const char *command, const struct kv_list *list);
/* Fills sets; `rotation_file` (may be NULL) serves the entries of its recipe. Entries for evaluation only have no set. Free with
 * kv_list_free. */
oscar_status kv_list_obtain(struct kv_list *list, struct model *model, const char *rotation_file,
                            const struct progress *progress);
void kv_list_free(struct kv_list *list);

#endif
