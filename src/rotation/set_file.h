/* rotation/set_file.h - a rotation file of ours, from memory. Private. docs/formats.md has the format. */
#ifndef OSCAR_SET_FILE_H
#define OSCAR_SET_FILE_H

#include "base/base.h"
#include <oscar/rotation.h>

/* Errors as oscar_codec_set_load, without the file's name. */
oscar_status codec_set_from_memory(oscar_context *context, const uint8_t *bytes, size_t n, oscar_codec_set **set);

#endif
