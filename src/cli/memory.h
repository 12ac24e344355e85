/* cli/memory.h - the memory of this machine. Private. */
#ifndef OSCAR_CLI_MEMORY_H
#define OSCAR_CLI_MEMORY_H

#include "cli/cli.h"

/* Bytes that can be taken without swapping, now; 0 if the system does not say. */
double memory_available(void);

/* Bytes of this process that are in memory now, other than the mapping of `path`: libraries, tokenizer, tables. 0 if the system
 * does not say. */
double memory_besides(const char *path);

#endif
