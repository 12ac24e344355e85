/*
 * pickle.c - a stack machine for the part of pickle protocol 2 that torch.save needs for plain data.
 *
 * Bounds: an opcode makes at most two values, pushes at most one, and takes at least one byte, so values, stack and items are all
 * bounded by the length of the input; memo keys are bounded separately because a single opcode may name any. Values live until
 * the document is closed, whatever refers to them (a list may contain itself), and are never walked recursively.
 */
#include "rotation/pickle.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#define MAX_MEMO (1u << 20)

enum { /* opcodes that are understood */
       OP_MARK = '(',
       OP_STOP = '.',
       OP_POP = '0',
       OP_POP_MARK = '1',
       OP_BINFLOAT = 'G',
       OP_BININT = 'J',
       OP_BININT1 = 'K',
       OP_BININT2 = 'M',
       OP_NONE = 'N',
       OP_BINPERSID = 'Q',
       OP_REDUCE = 'R',
       OP_BINUNICODE = 'X',
       OP_APPEND = 'a',
       OP_GLOBAL = 'c',
       OP_APPENDS = 'e',
       OP_BINGET = 'h',
       OP_LONG_BINGET = 'j',
       OP_BINPUT = 'q',
       OP_LONG_BINPUT = 'r',
       OP_SETITEM = 's',
       OP_TUPLE = 't',
       OP_SETITEMS = 'u',
       OP_EMPTY_TUPLE = ')',
       OP_EMPTY_LIST = ']',
       OP_EMPTY_DICT = '}',
       OP_PROTO = 0x80,
       OP_TUPLE1 = 0x85,
       OP_TUPLE2 = 0x86,
       OP_TUPLE3 = 0x87,
       OP_NEWTRUE = 0x88,
       OP_NEWFALSE = 0x89,
       OP_LONG1 = 0x8A
};

/* Names of the opcodes that are refused, for the error. */
static const struct {
  uint8_t code;
  const char *name;
} refused[] = {{'2', "DUP"},
               {'F', "FLOAT"},
               {'I', "INT"},
               {'L', "LONG"},
               {'P', "PERSID"},
               {'S', "STRING"},
               {'T', "BINSTRING"},
               {'U', "SHORT_BINSTRING"},
               {'V', "UNICODE"},
               {'B', "BINBYTES"},
               {'C', "SHORT_BINBYTES"},
               {'b', "BUILD"},
               {'d', "DICT"},
               {'g', "GET"},
               {'i', "INST"},
               {'l', "LIST"},
               {'o', "OBJ"},
               {'p', "PUT"},
               {0x81, "NEWOBJ"},
               {0x82, "EXT1"},
               {0x83, "EXT2"},
               {0x84, "EXT4"},
               {0x8B, "LONG4"},
               {0x8C, "SHORT_BINUNICODE"},
               {0x8D, "BINUNICODE8"},
               {0x8E, "BINBYTES8"},
               {0x8F, "EMPTY_SET"},
               {0x90, "ADDITEMS"},
               {0x91, "FROZENSET"},
               {0x92, "NEWOBJ_EX"},
               {0x93, "STACK_GLOBAL"},
               {0x94, "MEMOIZE"},
               {0x95, "FRAME"},
               {0x96, "BYTEARRAY8"},
               {0x97, "NEXT_BUFFER"},
               {0x98, "READONLY_BUFFER"}};

/* The globals a pickle may mention. */
enum { NAME_REBUILD_TENSOR, NAME_ORDERED_DICT, NAME_STORAGE };
static const struct {
  const char *module, *name;
  int what;
  enum pickle_dtype dtype;
} names[] = {
    {"torch._utils", "_rebuild_tensor_v2", NAME_REBUILD_TENSOR, 0}, {"collections", "OrderedDict", NAME_ORDERED_DICT, 0},
    {"torch", "FloatStorage", NAME_STORAGE, PICKLE_FLOAT32},        {"torch", "DoubleStorage", NAME_STORAGE, PICKLE_FLOAT64},
    {"torch", "HalfStorage", NAME_STORAGE, PICKLE_FLOAT16},         {"torch", "BFloat16Storage", NAME_STORAGE, PICKLE_BFLOAT16},
    {"torch", "LongStorage", NAME_STORAGE, PICKLE_INT64},           {"torch", "IntStorage", NAME_STORAGE, PICKLE_INT32}};

const char *pickle_kind_name(enum pickle_kind kind) {
  static const char *const kinds[] = {"None", "bool", "int",   "float",   "str",   "tuple",
                                      "list", "dict", "class", "storage", "tensor"};
  return kinds[kind];
}

size_t pickle_dtype_bytes(enum pickle_dtype dtype) {
  static const size_t bytes[] = {4, 8, 2, 2, 8, 4};
  return bytes[dtype];
}

bool pickle_text_is(const struct pickle_text *text, const char *expected) {
  return text->n == strlen(expected) && memcmp(text->bytes, expected, text->n) == 0;
}

const struct pickle_value *pickle_find(const struct pickle_value *dict, const char *key) {
  if (!dict || dict->kind != PICKLE_DICT) return NULL;
  for (size_t i = dict->items.n; i >= 2; i -= 2) {
    const struct pickle_value *k = dict->items.item[i - 2];
    if (k->kind == PICKLE_TEXT && pickle_text_is(&k->text, key)) return dict->items.item[i - 1];
  }
  return NULL;
}

/* ---- the machine ---- */

struct machine {
  oscar_context *context;
  struct pickle *document;
  const uint8_t *bytes;
  size_t n, at, op_at;       /* op_at: the opcode being run, for errors */
  struct pickle_items stack; /* NULL entries are marks */
  struct pickle_items memo;  /* n: keys 0 .. n-1, NULL where unused */
};

static oscar_status fail(struct machine *m, oscar_status status, const char *format, ...) OSCAR_PRINTF(3, 4);
static oscar_status fail(struct machine *m, oscar_status status, const char *format, ...) {
  char text[512];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  return set_error(m->context, status, "pickle, byte %zu: %s", m->op_at, text);
}

/* ---- memory ---- */

static bool append(oscar_context *context, struct pickle_items *items, struct pickle_value *value) {
  if (items->n == items->room) {
    size_t room = items->room ? 2 * items->room : 8;
    void *grown = mem_resize(context, items->item, items->n * sizeof *items->item, room * sizeof *items->item);
    if (!grown) return false;
    items->item = grown;
    items->room = room;
  }
  items->item[items->n++] = value;
  return true;
}

static struct pickle_value *make_value(struct machine *m, enum pickle_kind kind) {
  struct pickle_value *value = mem_zalloc(m->context, 1, sizeof *value);
  if (!value) return NULL;
  value->kind = kind;
  value->next_made = m->document->made;
  m->document->made = value;
  return value;
}

static bool holds_items(const struct pickle_value *value) {
  return value->kind == PICKLE_TUPLE || value->kind == PICKLE_LIST || value->kind == PICKLE_DICT;
}

void pickle_close(struct pickle *pickle) {
  for (struct pickle_value *value = pickle->made, *next; value; value = next) {
    next = value->next_made;
    if (holds_items(value)) mem_free(pickle->context, value->items.item);
    mem_free(pickle->context, value);
  }
  *pickle = (struct pickle){0};
}

/* ---- input and stack ---- */

static oscar_status read_bytes(struct machine *m, size_t count, const uint8_t **bytes) {
  *bytes = NULL;
  if (m->n - m->at < count) return fail(m, OSCAR_FORMAT, "it ends inside an opcode");
  *bytes = m->bytes + m->at;
  m->at += count;
  return OSCAR_OK;
}

/* A little-endian number of 1 to 8 bytes. */
static oscar_status read_number(struct machine *m, size_t bytes, uint64_t *number) {
  const uint8_t *p;
  *number = 0;
  oscar_status status = read_bytes(m, bytes, &p);
  if (!p) return status;
  for (size_t i = bytes; i-- > 0;) *number = *number << 8 | p[i];
  return OSCAR_OK;
}

/* Text up to the next newline, which is skipped. */
static oscar_status read_line(struct machine *m, struct pickle_text *line) {
  *line = (struct pickle_text){"", 0};
  const uint8_t *start = m->bytes + m->at, *end = m->n > m->at ? memchr(start, '\n', m->n - m->at) : NULL;
  if (!end || end - start > 256) return fail(m, OSCAR_FORMAT, "a name does not end");
  *line = (struct pickle_text){(const char *)start, (uint32_t)(end - start)};
  m->at += line->n + 1;
  return OSCAR_OK;
}

static oscar_status push(struct machine *m, struct pickle_value *value) {
  return value && append(m->context, &m->stack, value) ? OSCAR_OK : OSCAR_NO_MEMORY;
}

/* The top of the stack, which must be a value. */
static oscar_status pop(struct machine *m, struct pickle_value **value) {
  *value = NULL;
  if (m->stack.n == 0 || !m->stack.item[m->stack.n - 1]) return fail(m, OSCAR_FORMAT, "nothing is on the stack");
  *value = m->stack.item[--m->stack.n];
  return OSCAR_OK;
}

/* Index of the first value above the topmost mark. */
static oscar_status find_mark(struct machine *m, size_t *first) {
  *first = 0;
  for (size_t i = m->stack.n; i > 0; i--)
    if (!m->stack.item[i - 1]) {
      *first = i;
      return OSCAR_OK;
    }
  return fail(m, OSCAR_FORMAT, "no mark is on the stack");
}

/* ---- opcodes ---- */

static oscar_status push_integer(struct machine *m, int64_t integer) {
  struct pickle_value *value = make_value(m, PICKLE_INT);
  if (value) value->integer = integer;
  return push(m, value);
}

static oscar_status push_bool(struct machine *m, bool boolean) {
  struct pickle_value *value = make_value(m, PICKLE_BOOL);
  if (value) value->boolean = boolean;
  return push(m, value);
}

static oscar_status op_unsigned(struct machine *m, size_t bytes) {
  uint64_t number;
  oscar_status status = read_number(m, bytes, &number);
  return status == OSCAR_OK ? push_integer(m, (int64_t)number) : status;
}

static oscar_status op_binint(struct machine *m) {
  uint64_t number;
  oscar_status status = read_number(m, 4, &number);
  return status == OSCAR_OK ? push_integer(m, (int32_t)(uint32_t)number) : status;
}

/* A length byte, then that many bytes of a two's complement number. */
static oscar_status op_long1(struct machine *m) {
  uint64_t length, number = 0;
  oscar_status status = read_number(m, 1, &length);
  if (status == OSCAR_OK && length > 8) return fail(m, OSCAR_UNSUPPORTED, "an integer of %d bytes", (int)length);
  if (status == OSCAR_OK) status = read_number(m, (size_t)length, &number);
  if (status != OSCAR_OK) return status;
  if (length > 0 && length < 8 && number >> (8 * length - 1)) number |= UINT64_MAX << 8 * length;
  return push_integer(m, (int64_t)number);
}

static oscar_status op_binfloat(struct machine *m) { /* big-endian */
  const uint8_t *p;
  oscar_status status = read_bytes(m, 8, &p);
  if (status != OSCAR_OK) return status;
  uint64_t bits = 0;
  for (int i = 0; i < 8; i++) bits = bits << 8 | p[i];
  struct pickle_value *value = make_value(m, PICKLE_FLOAT);
  if (value) memcpy(&value->number, &bits, sizeof bits);
  return push(m, value);
}

static oscar_status op_binunicode(struct machine *m) {
  uint64_t n;
  const uint8_t *p;
  oscar_status status = read_number(m, 4, &n);
  if (status == OSCAR_OK) status = read_bytes(m, (size_t)n, &p);
  if (status != OSCAR_OK) return status;
  struct pickle_value *value = make_value(m, PICKLE_TEXT);
  if (value) value->text = (struct pickle_text){(const char *)p, (uint32_t)n};
  return push(m, value);
}

static oscar_status op_put(struct machine *m, size_t key_bytes) {
  uint64_t key;
  oscar_status status = read_number(m, key_bytes, &key);
  if (status != OSCAR_OK) return status;
  if (key >= MAX_MEMO) return fail(m, OSCAR_FORMAT, "memo key %" PRIu64 " is too large", key);
  if (m->stack.n == 0 || !m->stack.item[m->stack.n - 1]) return fail(m, OSCAR_FORMAT, "nothing is on the stack");
  while (m->memo.n <= key)
    if (!append(m->context, &m->memo, NULL)) return OSCAR_NO_MEMORY;
  m->memo.item[key] = m->stack.item[m->stack.n - 1];
  return OSCAR_OK;
}

static oscar_status op_get(struct machine *m, size_t key_bytes) {
  uint64_t key;
  oscar_status status = read_number(m, key_bytes, &key);
  if (status != OSCAR_OK) return status;
  if (key >= m->memo.n || !m->memo.item[key]) return fail(m, OSCAR_FORMAT, "memo key %" PRIu64 " was never put", key);
  return push(m, m->memo.item[key]);
}

/* Moves the values from `first` up into `items`. */
static oscar_status move_items(struct machine *m, size_t first, struct pickle_items *items) {
  for (size_t i = first; i < m->stack.n; i++)
    if (!append(m->context, items, m->stack.item[i])) return OSCAR_NO_MEMORY;
  m->stack.n = first;
  return OSCAR_OK;
}

static oscar_status op_tuple(struct machine *m) {
  size_t first;
  oscar_status status = find_mark(m, &first);
  if (status != OSCAR_OK) return status;
  struct pickle_value *tuple = make_value(m, PICKLE_TUPLE);
  status = tuple ? move_items(m, first, &tuple->items) : OSCAR_NO_MEMORY;
  if (status != OSCAR_OK) return status;
  m->stack.n--; /* the mark */
  return push(m, tuple);
}

static oscar_status op_short_tuple(struct machine *m, size_t n) {
  for (size_t i = 0; i < n; i++)
    if (m->stack.n < n || !m->stack.item[m->stack.n - 1 - i]) return fail(m, OSCAR_FORMAT, "nothing is on the stack");
  struct pickle_value *tuple = make_value(m, PICKLE_TUPLE);
  oscar_status status = tuple ? move_items(m, m->stack.n - n, &tuple->items) : OSCAR_NO_MEMORY;
  return status == OSCAR_OK ? push(m, tuple) : status;
}

/* Values from `first` up go into the list or dict below them (`below` entries further down). */
static oscar_status add_to_container(struct machine *m, enum pickle_kind kind, size_t first, size_t below) {
  struct pickle_value *container = first > below ? m->stack.item[first - 1 - below] : NULL;
  if (!container || container->kind != kind)
    return fail(m, OSCAR_FORMAT, "items are added to something that is not a %s", pickle_kind_name(kind));
  if (kind == PICKLE_DICT && (m->stack.n - first) % 2) return fail(m, OSCAR_FORMAT, "a dict gets a key without a value");
  oscar_status status = move_items(m, first, &container->items);
  m->stack.n = first - below; /* without the mark */
  return status;
}

static oscar_status op_add_one(struct machine *m, enum pickle_kind kind, size_t values) {
  for (size_t i = 0; i < values; i++)
    if (m->stack.n < values || !m->stack.item[m->stack.n - 1 - i]) return fail(m, OSCAR_FORMAT, "nothing is on the stack");
  return add_to_container(m, kind, m->stack.n - values, 0);
}

static oscar_status op_add_many(struct machine *m, enum pickle_kind kind) {
  size_t first;
  oscar_status status = find_mark(m, &first);
  return status == OSCAR_OK ? add_to_container(m, kind, first, 1) : status;
}

static oscar_status op_pop_mark(struct machine *m) {
  size_t first;
  oscar_status status = find_mark(m, &first);
  if (status == OSCAR_OK) m->stack.n = first - 1;
  return status;
}

static oscar_status op_global(struct machine *m) {
  struct pickle_text module, name = {"", 0};
  oscar_status status = read_line(m, &module);
  if (status == OSCAR_OK) status = read_line(m, &name);
  if (status != OSCAR_OK) return status;
  for (size_t i = 0; i < ARRAY_LENGTH(names); i++) {
    if (!pickle_text_is(&module, names[i].module) || !pickle_text_is(&name, names[i].name)) continue;
    struct pickle_value *value = make_value(m, PICKLE_NAME);
    if (value) value->name = (int)i;
    return push(m, value);
  }
  return fail(m, OSCAR_UNSUPPORTED, "it wants %.*s.%.*s, which data does not need; nothing was run", (int)module.n, module.bytes,
              (int)name.n, name.bytes);
}

/* A persistent id is the tuple ('storage', class, key, location, elements). */
static oscar_status op_binpersid(struct machine *m) {
  struct pickle_value *id;
  oscar_status status = pop(m, &id);
  if (status != OSCAR_OK) return status;
  struct pickle_value **part = id->items.item;
  bool good = id->kind == PICKLE_TUPLE && id->items.n == 5 && part[0]->kind == PICKLE_TEXT && part[1]->kind == PICKLE_NAME &&
              part[2]->kind == PICKLE_TEXT && part[4]->kind == PICKLE_INT;
  if (!good || !pickle_text_is(&part[0]->text, "storage") || names[part[1]->name].what != NAME_STORAGE)
    return fail(m, OSCAR_FORMAT, "a persistent id that is no ('storage', class, key, location, elements)");
  if (part[4]->integer < 0) return fail(m, OSCAR_FORMAT, "a storage of %" PRId64 " elements", part[4]->integer);
  struct pickle_value *value = make_value(m, PICKLE_STORAGE);
  if (value) value->storage = (struct pickle_storage){part[2]->text, names[part[1]->name].dtype, part[4]->integer};
  return push(m, value);
}

/* Sizes or strides: a tuple of non-negative ints. */
static bool read_dims(const struct pickle_value *tuple, int64_t *dims) {
  if (tuple->kind != PICKLE_TUPLE || tuple->items.n > PICKLE_MAX_DIMS) return false;
  for (size_t i = 0; i < tuple->items.n; i++) {
    const struct pickle_value *dim = tuple->items.item[i];
    if (dim->kind != PICKLE_INT || dim->integer < 0) return false;
    dims[i] = dim->integer;
  }
  return true;
}

/* False if some index of the tensor lies outside its storage, or counting them overflows. */
static bool tensor_fits(const struct pickle_tensor *t) {
  int64_t last = t->offset, elements = 1, reach;
  bool empty = false, overflow = false;
  for (int i = 0; i < t->dims; i++) empty |= t->size[i] == 0;
  for (int i = 0; i < t->dims && !empty; i++) {
    overflow |= __builtin_mul_overflow(elements, t->size[i], &elements);
    overflow |= __builtin_mul_overflow(t->size[i] - 1, t->stride[i], &reach);
    overflow |= __builtin_add_overflow(last, reach, &last);
  }
  return !overflow && (empty ? t->offset <= t->storage->elements : last < t->storage->elements);
}

/* _rebuild_tensor_v2(storage, offset, size, stride, requires_grad, backward_hooks) */
static oscar_status rebuild_tensor(struct machine *m, const struct pickle_items *arguments) {
  struct pickle_value **part = arguments->item;
  if (arguments->n != 6 || part[0]->kind != PICKLE_STORAGE || part[1]->kind != PICKLE_INT || part[1]->integer < 0)
    return fail(m, OSCAR_FORMAT, "a tensor that is not (storage, offset, size, stride, requires_grad, hooks)");
  struct pickle_tensor t = {.storage = &part[0]->storage, .offset = part[1]->integer};
  if (!read_dims(part[2], t.size) || !read_dims(part[3], t.stride) || part[2]->items.n != part[3]->items.n)
    return fail(m, OSCAR_FORMAT, "a tensor whose size and stride are not as many numbers, at most %d, none negative",
                PICKLE_MAX_DIMS);
  t.dims = (int)part[2]->items.n;
  if (!tensor_fits(&t))
    return fail(m, OSCAR_FORMAT, "a tensor that reaches outside its storage of %" PRId64 " elements", t.storage->elements);
  struct pickle_value *value = make_value(m, PICKLE_TENSOR);
  if (value) value->tensor = t;
  return push(m, value);
}

static oscar_status op_reduce(struct machine *m) {
  struct pickle_value *arguments, *function = NULL;
  oscar_status status = pop(m, &arguments);
  if (status == OSCAR_OK) status = pop(m, &function);
  if (status != OSCAR_OK) return status;
  if (function->kind != PICKLE_NAME || arguments->kind != PICKLE_TUPLE)
    return fail(m, OSCAR_FORMAT, "a %s is called with a %s", pickle_kind_name(function->kind), pickle_kind_name(arguments->kind));
  int what = names[function->name].what;
  if (what == NAME_REBUILD_TENSOR) return rebuild_tensor(m, &arguments->items);
  if (what == NAME_ORDERED_DICT && arguments->items.n == 0) return push(m, make_value(m, PICKLE_DICT));
  return fail(m, OSCAR_UNSUPPORTED, "%s.%s is called with %zu arguments", names[function->name].module,
              names[function->name].name, arguments->items.n);
}

static oscar_status op_proto(struct machine *m) {
  uint64_t version;
  oscar_status status = read_number(m, 1, &version);
  if (status == OSCAR_OK && version != 2)
    return fail(m, OSCAR_UNSUPPORTED, "protocol %d; files of this kind have 2", (int)version);
  return status;
}

static oscar_status op_refused(struct machine *m, uint8_t code) {
  for (size_t i = 0; i < ARRAY_LENGTH(refused); i++)
    if (refused[i].code == code) return fail(m, OSCAR_UNSUPPORTED, "opcode %s, which data does not need", refused[i].name);
  return fail(m, OSCAR_FORMAT, "0x%02x is no opcode", code);
}

static oscar_status run_one(struct machine *m, uint8_t code) {
  struct pickle_value *value;
  switch (code) {
  case OP_PROTO:
    return op_proto(m);
  case OP_MARK:
    return append(m->context, &m->stack, NULL) ? OSCAR_OK : OSCAR_NO_MEMORY;
  case OP_POP:
    return pop(m, &value);
  case OP_POP_MARK:
    return op_pop_mark(m);
  case OP_NONE:
    return push(m, make_value(m, PICKLE_NONE));
  case OP_NEWTRUE:
    return push_bool(m, true);
  case OP_NEWFALSE:
    return push_bool(m, false);
  case OP_BININT:
    return op_binint(m);
  case OP_BININT1:
    return op_unsigned(m, 1);
  case OP_BININT2:
    return op_unsigned(m, 2);
  case OP_LONG1:
    return op_long1(m);
  case OP_BINFLOAT:
    return op_binfloat(m);
  case OP_BINUNICODE:
    return op_binunicode(m);
  case OP_EMPTY_TUPLE:
    return push(m, make_value(m, PICKLE_TUPLE));
  case OP_EMPTY_LIST:
    return push(m, make_value(m, PICKLE_LIST));
  case OP_EMPTY_DICT:
    return push(m, make_value(m, PICKLE_DICT));
  case OP_TUPLE:
    return op_tuple(m);
  case OP_TUPLE1:
    return op_short_tuple(m, 1);
  case OP_TUPLE2:
    return op_short_tuple(m, 2);
  case OP_TUPLE3:
    return op_short_tuple(m, 3);
  case OP_APPEND:
    return op_add_one(m, PICKLE_LIST, 1);
  case OP_APPENDS:
    return op_add_many(m, PICKLE_LIST);
  case OP_SETITEM:
    return op_add_one(m, PICKLE_DICT, 2);
  case OP_SETITEMS:
    return op_add_many(m, PICKLE_DICT);
  case OP_BINPUT:
    return op_put(m, 1);
  case OP_LONG_BINPUT:
    return op_put(m, 4);
  case OP_BINGET:
    return op_get(m, 1);
  case OP_LONG_BINGET:
    return op_get(m, 4);
  case OP_GLOBAL:
    return op_global(m);
  case OP_BINPERSID:
    return op_binpersid(m);
  case OP_REDUCE:
    return op_reduce(m);
  default:
    return op_refused(m, code);
  }
}

oscar_status pickle_open(oscar_context *context, const uint8_t *bytes, size_t n, struct pickle *pickle) {
  *pickle = (struct pickle){.context = context};
  struct machine m = {.context = context, .document = pickle, .bytes = bytes, .n = n};
  oscar_status status = OSCAR_OK;
  while (status == OSCAR_OK) {
    m.op_at = m.at;
    const uint8_t *code;
    status = read_bytes(&m, 1, &code);
    if (status != OSCAR_OK) break;
    if (*code == OP_STOP) {
      struct pickle_value *root = NULL;
      status = pop(&m, &root);
      pickle->root = root;
      break;
    }
    status = run_one(&m, *code);
  }
  mem_free(context, m.stack.item);
  mem_free(context, m.memo.item);
  return status;
}
