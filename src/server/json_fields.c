/* json_fields.c - see json_fields.h. */
#include "server/json_fields.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

bool refuse(struct refusal *r, int status, const char *code, const char *field_name, const char *format, ...) {
  if (r->status) return false;
  r->status = status;
  r->code = code;
  snprintf(r->field, sizeof r->field, "%s", field_name ? field_name : "");
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(r->text, sizeof r->text, format, arguments);
  va_end(arguments);
  return false;
}

bool refuse_memory(struct refusal *r) { return refuse(r, 500, "out_of_memory", NULL, "the server is out of memory"); }

static void full_name(const struct fields *f, const char *name, char *out, size_t room) {
  snprintf(out, room, "%s%s%s", f->path, *f->path && *name && *name != '[' ? "." : "", name);
}

bool field_refuse(const struct fields *f, const char *name, const char *format, ...) {
  char path[128], text[512];
  full_name(f, name, path, sizeof path);
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  return refuse(f->refusal, 400, NULL, path, "%s %s", path, text);
}

bool fields_parse(const char *text, size_t bytes, json_t **body, struct fields *fields, struct refusal *refusal) {
  json_error_t error;
  *body = json_loadb(text, bytes, JSON_REJECT_DUPLICATES, &error);
  if (!*body)
    return refuse(refusal, 400, "invalid_json", NULL, "the body is no valid JSON: line %d, column %d: %s", error.line,
                  error.column, error.text);
  *fields = (struct fields){*body, "", refusal};
  if (!json_is_object(*body)) return refuse(refusal, 400, "invalid_json", NULL, "the body must be a JSON object");
  return true;
}

bool fields_enter(const struct fields *from, const json_t *value, const char *path, struct fields *inside) {
  *inside = (struct fields){value, path, from->refusal};
  return json_is_object(value) || field_refuse(inside, "", "must be an object");
}

bool fields_enter_field(const struct fields *from, const char *name, char path[FIELD_PATH], struct fields *inside) {
  full_name(from, name, path, FIELD_PATH);
  return fields_enter(from, field(from, name), path, inside);
}

bool fields_enter_item(const struct fields *from, const char *list, size_t i, const json_t *item, char path[FIELD_PATH],
                       struct fields *inside) {
  char name[64];
  snprintf(name, sizeof name, "%s[%zu]", list, i);
  full_name(from, name, path, FIELD_PATH);
  return fields_enter(from, item, path, inside);
}

json_t *field(const struct fields *f, const char *name) {
  json_t *value = json_object_get(f->object, name);
  return json_is_null(value) ? NULL : value;
}

bool field_text(const struct fields *f, const char *name, const char **value) {
  const json_t *v = field(f, name);
  if (!v) return f->refusal->status == 0;
  if (!json_is_string(v)) return field_refuse(f, name, "must be a string");
  *value = json_string_value(v);
  return true;
}

bool field_needed_text(const struct fields *f, const char *name, const char **value) {
  if (!field(f, name)) return field_refuse(f, name, "is missing");
  return field_text(f, name, value);
}

bool field_flag(const struct fields *f, const char *name, bool *value) {
  const json_t *v = field(f, name);
  if (!v) return f->refusal->status == 0;
  if (!json_is_boolean(v)) return field_refuse(f, name, "must be true or false");
  *value = json_is_true(v);
  return true;
}

bool field_integer(const struct fields *f, const char *name, int64_t least, int64_t most, int64_t *value) {
  const json_t *v = field(f, name);
  if (!v) return f->refusal->status == 0;
  int64_t n = json_is_integer(v) ? json_integer_value(v) : 0;
  if (json_is_real(v) && json_real_value(v) == floor(json_real_value(v)) && fabs(json_real_value(v)) < 0x1p53)
    n = (int64_t)json_real_value(v); /* 64.0 */
  else if (!json_is_integer(v))
    return field_refuse(f, name, "must be a whole number");
  if (n < least || n > most)
    return field_refuse(f, name, "must be from %lld to %lld, not %lld", (long long)least, (long long)most, (long long)n);
  *value = n;
  return true;
}

bool field_int(const struct fields *f, const char *name, int least, int most, int *value) {
  int64_t wide = *value;
  bool good = field_integer(f, name, least, most, &wide);
  if (good) *value = (int)wide;
  return good;
}

bool field_float(const struct fields *f, const char *name, double least, double most, float *value) {
  const json_t *v = field(f, name);
  if (!v) return f->refusal->status == 0;
  if (!json_is_number(v)) return field_refuse(f, name, "must be a number");
  double x = json_number_value(v);
  if (!(x >= least && x <= most)) return field_refuse(f, name, "must be from %g to %g, not %g", least, most, x);
  *value = (float)x;
  return true;
}

bool field_array(const struct fields *f, const char *name, const json_t **value) {
  const json_t *v = field(f, name);
  if (!v) return f->refusal->status == 0;
  if (!json_is_array(v)) return field_refuse(f, name, "must be a list");
  *value = v;
  return true;
}

bool field_needed_array(const struct fields *f, const char *name, const json_t **value) {
  if (!field(f, name)) return field_refuse(f, name, "is missing");
  if (!field_array(f, name, value)) return false;
  return json_array_size(*value) > 0 || field_refuse(f, name, "is empty");
}

bool field_object(const struct fields *f, const char *name, const json_t **value) {
  const json_t *v = field(f, name);
  if (!v) return f->refusal->status == 0;
  if (!json_is_object(v)) return field_refuse(f, name, "must be an object");
  *value = v;
  return true;
}

static const struct field_rule *find_rule(const struct field_rule *rules, const char *name) {
  for (const struct field_rule *r = rules; r && r->name; r++)
    if (strcmp(r->name, name) == 0) return r;
  return NULL;
}

static bool is_plain(const struct field_rule *rule, const json_t *value) {
  if (json_is_null(value) || json_is_false(value)) return true;
  if ((json_is_array(value) && json_array_size(value) == 0) || (json_is_object(value) && json_object_size(value) == 0))
    return true;
  return rule->plain && json_is_string(value) && strcmp(json_string_value(value), rule->plain) == 0;
}

bool fields_obey(const struct fields *f, const struct field_rule *rules, const struct field_rule *more) {
  const char *name;
  json_t *value;
  json_object_foreach((json_t *)(uintptr_t)f->object, name, value) {
    const struct field_rule *rule = find_rule(rules, name);
    if (!rule) rule = find_rule(more, name);
    char shown[72];
    snprintf(shown, sizeof shown, "%.64s", name);
    if (!rule) return field_refuse(f, shown, "is not a field of this request");
    if (rule->use == FIELD_PLAIN && !is_plain(rule, value)) return field_refuse(f, shown, "is not supported by this server");
  }
  return f->refusal->status == 0;
}
