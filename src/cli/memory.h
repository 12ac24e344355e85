/* cli/memory.h - the memory of this machine. Private. */
#ifndef OSCAR_CLI_MEMORY_H
#define OSCAR_CLI_MEMORY_H

#include "cli/cli.h"

/* Bytes that can be taken without swapping, now; 0 if the system does not say. */
double memory_available(void);

#endif
