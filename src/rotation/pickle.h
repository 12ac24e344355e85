/*
 * rotation/pickle.h - the data inside the pickles that torch.save writes. Private.
 *
 * Only data comes out: None, bool, int, float, str, tuple, list, dict and tensors (a view of a storage). Nothing is imported or
 * called: the names a pickle may mention are a fixed table, and what it "calls" are two constructors known to this file.
 * Pickle protocol 2; opcodes as documented in CPython's pickletools.
 */
#ifndef OSCAR_PICKLE_H
#define OSCAR_PICKLE_H

#include "base/base.h"

enum pickle_kind {
  PICKLE_NONE,
  PICKLE_BOOL,
  PICKLE_INT,
  PICKLE_FLOAT,
  PICKLE_TEXT,
  PICKLE_TUPLE,
  PICKLE_LIST,
  PICKLE_DICT, /* OrderedDict too */
  PICKLE_NAME, /* a known global, not yet called */
  PICKLE_STORAGE,
  PICKLE_TENSOR
};

/* "None", "str", "tensor", ... */
const char *pickle_kind_name(enum pickle_kind kind);

enum pickle_dtype { PICKLE_FLOAT32, PICKLE_FLOAT64, PICKLE_FLOAT16, PICKLE_BFLOAT16, PICKLE_INT64, PICKLE_INT32 };
size_t pickle_dtype_bytes(enum pickle_dtype dtype);

#define PICKLE_MAX_DIMS 4

struct pickle_value;

struct pickle_text {
  const char *bytes; /* in the pickle, not terminated */
  uint32_t n;
};

struct pickle_items { /* of a dict: key, value, key, value ... */
  struct pickle_value **item;
  size_t n, room;
};

struct pickle_storage {
  struct pickle_text key; /* the entry data/<key> of the archive */
  enum pickle_dtype dtype;
  int64_t elements;
};

struct pickle_tensor {
  const struct pickle_storage *storage;
  int64_t offset; /* elements */
  int dims;
  int64_t size[PICKLE_MAX_DIMS], stride[PICKLE_MAX_DIMS]; /* every index lies inside the storage: checked */
};

struct pickle_value {
  enum pickle_kind kind;
  union {
    bool boolean;
    int64_t integer;
    double number;
    int name;
    struct pickle_text text;
    struct pickle_items items;
    struct pickle_storage storage;
    struct pickle_tensor tensor;
  };
  struct pickle_value *next_made; /* all values of a document, to free them */
};

struct pickle {
  oscar_context *context;
  struct pickle_value *made;
  const struct pickle_value *root;
};

/* bytes must outlive the document. Errors: FORMAT, UNSUPPORTED (by name), NO_MEMORY. Close in every case. */
oscar_status pickle_open(oscar_context *context, const uint8_t *bytes, size_t n, struct pickle *pickle);
void pickle_close(struct pickle *pickle);

/* The value of a str key, NULL if there is none or `dict` is no dict; the last one wins. */
const struct pickle_value *pickle_find(const struct pickle_value *dict, const char *key);
bool pickle_text_is(const struct pickle_text *text, const char *expected);

#endif
