/* rotation/hadamard.h - Hadamard matrices as signs, for code that wants to scale them itself. Private. */
#ifndef OSCAR_ROTATION_HADAMARD_H
#define OSCAR_ROTATION_HADAMARD_H

#include "base/base.h"
#include <oscar/rotation.h>

/* signs [d][d], entries +1 and -1. Errors: UNSUPPORTED for an order that is not built. */
oscar_status hadamard_signs(oscar_context *context, int d, int8_t *signs);

#endif
