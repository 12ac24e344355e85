/* engine/calibrate.h - what calibrate.c and rotation_store.c share, and tests reach. Private to the room. */
#ifndef OSCAR_CALIBRATE_H
#define OSCAR_CALIBRATE_H

#include "engine/engine.h"

/* Whether a set with this recipe and provenance was fitted with the settings this program uses for the KV type. A program that
 * fits differently from the one that stored a file must not take it for its own. */
bool calibrate_is_current(const char *kv, const oscar_codec_set_info *info);

/* codec_sets_obtain with a calibration of the caller's choice where one is needed. */
oscar_status codec_sets_obtain_with(struct model *model, int count, const char *const *kv, const char *const *rotation_files,
                                    const struct calibrate_options *calibration, const struct progress *progress,
                                    oscar_codec_set **sets);

#endif
