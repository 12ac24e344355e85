/*
 * server/json_fields.h - typed reading of requests. Private.
 *
 * A reader stands on one JSON object and knows its path, so that every complaint names the field as the client wrote it
 * ("messages[2].content"). The first complaint stays; functions return false from then on. A field that is null is as absent.
 */
#ifndef OSCAR_SERVER_JSON_FIELDS_H
#define OSCAR_SERVER_JSON_FIELDS_H

#include "base/base.h"
#include <jansson.h>

/* Why a request is not answered. */
struct refusal {
  int status;       /* of HTTP; 0: there is none */
  const char *code; /* a word for programs, or NULL */
  char field[128];  /* "" if it is about none */
  char text[640];
  int retry_after; /* seconds; 0: not said */
};
/* Returns false. The first refusal stays. */
bool refuse(struct refusal *refusal, int status, const char *code, const char *field, const char *format, ...) OSCAR_PRINTF(5, 6);
bool refuse_memory(struct refusal *refusal);

struct fields {
  const json_t *object;
  const char *path; /* "" for the request itself */
  struct refusal *refusal;
};
/* The body as an object; false: a refusal with the place of the mistake. *body is the caller's to json_decref. */
bool fields_parse(const char *text, size_t bytes, json_t **body, struct fields *fields, struct refusal *refusal);
/* An object inside, with its path; false if the value is no object. */
bool fields_enter(const struct fields *from, const json_t *value, const char *path, struct fields *inside);
/* The same for what a field of the reader's object holds, and for item i of a list there; the path, which has to live as long as
 * `inside`, is written. */
#define FIELD_PATH 160
bool fields_enter_field(const struct fields *from, const char *name, char path[FIELD_PATH], struct fields *inside);
bool fields_enter_item(const struct fields *from, const char *list, size_t i, const json_t *item, char path[FIELD_PATH],
                       struct fields *inside);
bool field_refuse(const struct fields *fields, const char *name, const char *format, ...) OSCAR_PRINTF(3, 4);

/* A field's value, NULL if it is absent or null. */
json_t *field(const struct fields *fields, const char *name);
/* What is absent leaves *value as it is. */
bool field_text(const struct fields *fields, const char *name, const char **value);
bool field_needed_text(const struct fields *fields, const char *name, const char **value);
bool field_flag(const struct fields *fields, const char *name, bool *value);
bool field_integer(const struct fields *fields, const char *name, int64_t least, int64_t most, int64_t *value);
bool field_int(const struct fields *fields, const char *name, int least, int most, int *value);
bool field_float(const struct fields *fields, const char *name, double least, double most, float *value);
bool field_array(const struct fields *fields, const char *name, const json_t **value);
bool field_needed_array(const struct fields *fields, const char *name, const json_t **value); /* one that is not empty */
bool field_object(const struct fields *fields, const char *name, const json_t **value);

/* Names that an object may have. READ: somebody looks at them. HARMLESS: they change nothing about the answer. PLAIN: only their
 * plain value (false, an empty list, or the text beside it) is served. */
enum field_use { FIELD_READ, FIELD_HARMLESS, FIELD_PLAIN };
struct field_rule {
  const char *name;
  enum field_use use;
  const char *plain; /* a text that is served, too, or NULL */
};
/* Refuses names without a rule and what is not served. Two lists, either may be NULL; both end with a NULL name. */
bool fields_obey(const struct fields *fields, const struct field_rule *rules, const struct field_rule *more);

#endif
