/*
 * schema_exclude.c - whether two schemas can be seen to exclude each other, which is what makes oneOf the same as anyOf.
 *
 * That a value fits exactly one of several schemas is no matter for a grammar in general: it would take the complement of each.
 * Where alternatives are told apart by their types, by constants, by a property of theirs that they all have, by bounds, or by
 * properties that one needs and another does not write, nothing has to be excluded. Everything here errs on the side of "may
 * fit".
 *
 * What a grammar gives is narrower than what the standard allows (schema.c): a value without a type is of the types that its
 * keywords are about, and an object has no properties beside the described ones. The other side is judged by the standard.
 */
#include "engine/grammar/schema_impl.h"

#include <math.h>
#include <string.h>

#define MOST_LOOKS 12 /* steps down into schemas, references too */

struct side { /* what is known of the values of a schema; their grammar's, or all that are valid */
  json_t *schema;
  bool written; /* the grammar's, of a schema that is merged with no other */
};

static bool excludes(struct schema *s, struct side a, json_t *b, int looks);

static bool goes_on(struct schema *s, int looks) { return ++s->work <= MOST_WORK && looks > 0 && s->b->status == OSCAR_OK; }

/* ---- values ---- */

/* 1 and 1.0 are the same. */
static bool same_value(json_t *a, json_t *b) {
  const char *name;
  json_t *part;
  size_t i;
  if (json_is_number(a) && json_is_number(b)) return json_number_value(a) == json_number_value(b);
  if (json_typeof(a) != json_typeof(b)) return false;
  if (json_is_array(a)) {
    if (json_array_size(a) != json_array_size(b)) return false;
    json_array_foreach(a, i, part) {
      if (!same_value(part, json_array_get(b, i))) return false;
    }
    return true;
  }
  if (!json_is_object(a)) return json_equal(a, b);
  if (json_object_size(a) != json_object_size(b)) return false;
  json_object_foreach(a, name, part) {
    json_t *other = json_object_get(b, name);
    if (!other || !same_value(part, other)) return false;
  }
  return true;
}

static bool is_among(json_t *list, json_t *value) {
  size_t i;
  json_t *one;
  json_array_foreach(list, i, one) {
    if (same_value(one, value)) return true;
  }
  return false;
}

static double bound(json_t *schema, const char *keyword, double otherwise) {
  json_t *value = json_object_get(schema, keyword);
  return json_is_number(value) ? json_number_value(value) : otherwise;
}

static double characters(const char *text) {
  double n = 0;
  for (; *text; text++) n += ((unsigned char)*text & 0xC0) != 0x80;
  return n;
}

static bool lacks_type(struct schema *s, json_t *value, json_t *schema) {
  json_t *type = json_object_get(schema, "type");
  if (!type) return false;
  const bool whole = json_is_real(value) && floor(json_real_value(value)) == json_real_value(value);
  const int types = schema_types_listed(s, type);
  return !schema_has_type(value, types) && !(whole && (types & INTEGER));
}

static bool fits_not(struct schema *s, json_t *value, json_t *schema, int looks);

static bool object_fits_not(struct schema *s, json_t *value, json_t *schema, int looks) {
  json_t *properties = json_object_get(schema, "properties"), *others = json_object_get(schema, "additionalProperties"), *part,
         *by;
  const char *name;
  size_t i;
  json_array_foreach(json_object_get(schema, "required"), i, part) {
    if (json_is_string(part) && !json_object_get(value, json_string_value(part))) return true;
  }
  json_object_foreach(value, name, part) {
    if (!(by = json_object_get(properties, name))) by = others;
    if (by && fits_not(s, part, by, looks)) return true;
  }
  return false;
}

/* Whether the value is certainly not valid. */
static bool fits_not(struct schema *s, json_t *value, json_t *schema, int looks) {
  static const char *const ways[] = {"anyOf", "oneOf"};
  json_t *part;
  size_t i, fits;
  if (!goes_on(s, looks--)) return false;
  if (json_is_false(schema)) return true;
  if (!json_is_object(schema)) return false;
  json_t *target = json_object_get(schema, "$ref") ? schema_resolve(s, json_object_get(schema, "$ref")) : NULL;
  if (target && fits_not(s, value, target, looks)) return true;
  if (lacks_type(s, value, schema)) return true;
  if (json_object_get(schema, "const") && !same_value(json_object_get(schema, "const"), value)) return true;
  if (json_object_get(schema, "enum") && !is_among(json_object_get(schema, "enum"), value)) return true;
  json_array_foreach(json_object_get(schema, "allOf"), i, part) {
    if (fits_not(s, value, part, looks)) return true;
  }
  for (size_t k = 0; k < ARRAY_LENGTH(ways); k++) {
    json_t *list = json_object_get(schema, ways[k]);
    fits = 0;
    json_array_foreach(list, i, part) fits += !fits_not(s, value, part, looks);
    if (list && !fits) return true;
  }
  if (json_is_number(value)) {
    const double x = json_number_value(value);
    return x < bound(schema, "minimum", x) || x > bound(schema, "maximum", x) ||
           x <= bound(schema, "exclusiveMinimum", -INFINITY) || x >= bound(schema, "exclusiveMaximum", INFINITY);
  }
  if (json_is_string(value)) {
    const double n = characters(json_string_value(value));
    return n < bound(schema, "minLength", n) || n > bound(schema, "maxLength", n);
  }
  return json_is_object(value) && object_fits_not(s, value, schema, looks);
}

/* The values that `a` lists, if it lists values: none of them fits b. */
static bool values_exclude(struct schema *s, json_t *a, json_t *b, int looks) {
  json_t *list = json_object_get(a, "enum"), *only = json_object_get(a, "const"), *value;
  size_t i;
  if (only) return lacks_type(s, only, a) || fits_not(s, only, b, looks);
  json_array_foreach(list, i, value) {
    if (!lacks_type(s, value, a) && !fits_not(s, value, b, looks)) return false;
  }
  return true;
}

static bool lists_values(json_t *schema) { return json_object_get(schema, "enum") || json_object_get(schema, "const"); }

/* ---- types ---- */

static bool has_name(json_t *list, const char *name) {
  size_t i;
  json_t *one;
  json_array_foreach(list, i, one) {
    if (json_is_string(one) && strcmp(json_string_value(one), name) == 0) return true;
  }
  return false;
}

/* A property that every object of a has is none for b; or b needs one that a does not write. */
static bool objects_exclude(struct schema *s, struct side a, json_t *b, int looks) {
  json_t *of_a = json_object_get(a.schema, "properties"), *of_b = json_object_get(b, "properties"), *name, *others_b;
  json_t *needed = json_object_get(a.schema, "required"), *others = json_object_get(a.schema, "additionalProperties");
  size_t i;
  others_b = json_object_get(b, "additionalProperties");
  json_array_foreach(needed, i, name) {
    if (!json_is_string(name)) continue;
    json_t *mine = json_object_get(of_a, json_string_value(name)), *its = json_object_get(of_b, json_string_value(name));
    if (!mine) mine = others;
    if (!its) its = others_b;
    if (json_is_false(its)) return true;
    if (mine && its && excludes(s, (struct side){mine, a.written}, its, looks)) return true;
  }
  const bool closed = a.written && (others ? json_is_false(others) : of_a != NULL);
  json_array_foreach(json_object_get(b, "required"), i, name) {
    if (closed && json_is_string(name) && !json_object_get(of_a, json_string_value(name)) &&
        !has_name(needed, json_string_value(name)))
      return true;
  }
  s->work += (int)(json_array_size(needed) / 64 + 1) * (int)json_array_size(json_object_get(b, "required"));
  return false;
}

static bool apart(double most_a, double least_b, double most_b, double least_a) { return most_a < least_b || most_b < least_a; }

static bool counts_exclude(json_t *a, json_t *b, const char *least, const char *most) {
  return apart(bound(a, most, INFINITY), bound(b, least, 0), bound(b, most, INFINITY), bound(a, least, 0));
}

/* Bounds that meet are apart where one of them is exclusive. */
static bool numbers_exclude(json_t *a, json_t *b) {
  const double least_a = bound(a, "minimum", -INFINITY), least_b = bound(b, "minimum", -INFINITY),
               most_a = bound(a, "maximum", INFINITY), most_b = bound(b, "maximum", INFINITY),
               above_a = bound(a, "exclusiveMinimum", -INFINITY), above_b = bound(b, "exclusiveMinimum", -INFINITY),
               below_a = bound(a, "exclusiveMaximum", INFINITY), below_b = bound(b, "exclusiveMaximum", INFINITY);
  const double far = 0x1p53; /* beyond, integers that differ may be the same number here */
  if (apart(fmin(most_a, below_a), fmax(least_b, above_b), fmin(most_b, below_b), fmax(least_a, above_a))) return true;
  const double ends[][2] = {{below_a, fmax(least_b, above_b)},
                            {fmin(most_a, below_a), above_b},
                            {below_b, fmax(least_a, above_a)},
                            {fmin(most_b, below_b), above_a}};
  for (size_t i = 0; i < ARRAY_LENGTH(ends); i++)
    if (ends[i][0] == ends[i][1] && fabs(ends[i][0]) < far) return true;
  return false;
}

static int with_integers(int types) { return types & NUMBER ? types | INTEGER : types; }

static bool types_exclude(struct schema *s, struct side a, json_t *b, int looks) {
  json_t *type_a = json_object_get(a.schema, "type"), *type_b = json_object_get(b, "type");
  const int of_a = type_a      ? schema_types_listed(s, type_a)
                   : a.written ? schema_types_of(s, a.schema)
                               : ANY_TYPE,
            of_b = type_b ? schema_types_listed(s, type_b) : ANY_TYPE, both = with_integers(of_a) & with_integers(of_b);
  if (both & (BOOLEAN | NULLS)) return false;
  if (both & OBJECT && !objects_exclude(s, a, b, looks)) return false;
  if (both & ARRAY && !counts_exclude(a.schema, b, "minItems", "maxItems")) return false;
  if (both & STRING && !counts_exclude(a.schema, b, "minLength", "maxLength")) return false;
  return !(both & (INTEGER | NUMBER)) || numbers_exclude(a.schema, b);
}

/* ---- schemas ---- */

/* Every value of b is one of some parts: all of them are excluded. */
static bool excludes_each(struct schema *s, struct side a, json_t *parts, int looks) {
  size_t i;
  json_t *part;
  json_array_foreach(parts, i, part) {
    if (!excludes(s, a, part, looks)) return false;
  }
  return json_is_array(parts);
}

static bool each_excludes(struct schema *s, json_t *parts, bool written, json_t *b, int looks) {
  size_t i;
  json_t *part;
  json_array_foreach(parts, i, part) {
    if (!excludes(s, (struct side){part, written}, b, looks)) return false;
  }
  return json_is_array(parts);
}

/* By what b is made of. */
static bool parts_are_excluded(struct schema *s, struct side a, json_t *b, int looks) {
  json_t *target = json_object_get(b, "$ref") ? schema_resolve(s, json_object_get(b, "$ref")) : NULL, *part;
  size_t i;
  if (target && excludes(s, a, target, looks)) return true;
  json_array_foreach(json_object_get(b, "allOf"), i, part) {
    if (excludes(s, a, part, looks)) return true;
  }
  return excludes_each(s, a, json_object_get(b, "anyOf"), looks) || excludes_each(s, a, json_object_get(b, "oneOf"), looks);
}

/* By what a is made of: one thing alone is written as it is, several are merged. */
static bool parts_exclude(struct schema *s, struct side a, json_t *b, int looks) {
  json_t *target = json_object_get(a.schema, "$ref") ? schema_resolve(s, json_object_get(a.schema, "$ref")) : NULL, *part;
  const bool alone = a.written && schema_count_restrictions(a.schema) == 1;
  size_t i;
  if (target && excludes(s, (struct side){target, alone}, b, looks)) return true;
  json_array_foreach(json_object_get(a.schema, "allOf"), i, part) {
    if (excludes(s, (struct side){part, false}, b, looks)) return true;
  }
  return each_excludes(s, json_object_get(a.schema, "anyOf"), alone, b, looks) ||
         each_excludes(s, json_object_get(a.schema, "oneOf"), alone, b, looks);
}

static bool is_made_of_others(json_t *schema) {
  return json_object_get(schema, "$ref") || json_object_get(schema, "allOf") || json_object_get(schema, "anyOf") ||
         json_object_get(schema, "oneOf");
}

static bool excludes(struct schema *s, struct side a, json_t *b, int looks) {
  if (!goes_on(s, looks--)) return false;
  if (json_is_false(a.schema) || json_is_false(b)) return true;
  if (!json_is_object(b) || (!json_is_object(a.schema) && !json_is_true(a.schema))) return false;
  if (is_made_of_others(b) && parts_are_excluded(s, a, b, looks)) return true;
  if (!json_is_object(a.schema)) return false;
  if (is_made_of_others(a.schema)) {
    if (parts_exclude(s, a, b, looks)) return true;
    a.written = false;
  }
  if (lists_values(a.schema)) return values_exclude(s, a.schema, b, looks);
  if (lists_values(b)) return values_exclude(s, b, a.schema, looks);
  return types_exclude(s, a, b, looks);
}

bool schema_excludes(struct schema *s, json_t *a, json_t *b) { return excludes(s, (struct side){a, true}, b, MOST_LOOKS); }
