/*
 * text.c - a growing text and filler prose.
 *
 * The prose made here is dull on purpose: it says nothing that a question could be about, has no digits and no hyphens, and no
 * text that a model or a codec was fitted to contains it. Prose with more life comes from a file of the user's.
 */
#include "eval/text.h"

#include <ctype.h>
#include <stdio.h>
#include <string.h>

/* ---- growing ---- */

static bool make_room(struct text *text, size_t bytes) {
  if (text->failed) return false;
  if (bytes < text->room - text->bytes) return true;
  const size_t room = 2 * (text->bytes + bytes) + 256;
  char *data = mem_resize(text->context, text->data, text->bytes, room);
  text->failed = !data;
  if (!data) return false;
  text->data = data;
  text->room = room;
  return true;
}

void text_add_bytes(struct text *text, const char *data, size_t bytes) {
  if (!make_room(text, bytes)) return;
  memcpy(text->data + text->bytes, data, bytes);
  text->bytes += bytes;
  text->data[text->bytes] = '\0';
}

void text_add(struct text *text, const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  const int bytes = vsnprintf(NULL, 0, format, arguments);
  va_end(arguments);
  if (bytes < 0 || !make_room(text, (size_t)bytes)) return;
  va_start(arguments, format);
  vsnprintf(text->data + text->bytes, (size_t)bytes + 1, format, arguments);
  va_end(arguments);
  text->bytes += (size_t)bytes;
}

const char *text_string(const struct text *text) { return text->data ? text->data : ""; }

void text_clear(struct text *text) {
  text->bytes = 0;
  if (text->data) text->data[0] = '\0';
}

void text_free(struct text *text) {
  mem_free(text->context, text->data);
  *text = (struct text){.context = text->context};
}

/* ---- sentences ---- */

/* No word of a list begins another of the same list, so that no compound contains another. */
static const char *const adjectives[] = {"amber",   "ancient", "bitter",  "brave",   "broken",   "calm",  "careful", "clumsy",
                                         "copper",  "crooked", "curious", "distant", "dusty",    "eager", "faded",   "gentle",
                                         "golden",  "hollow",  "humble",  "idle",    "ivory",    "jolly", "lonely",  "muddy",
                                         "narrow",  "nimble",  "patient", "plain",   "polished", "quiet", "rapid",   "rusty",
                                         "scarlet", "shallow", "silent",  "sleepy",  "solemn",   "spare", "sturdy",  "sudden",
                                         "tender",  "timid",   "velvet",  "violet",  "wooden",   "weary", "winding", "yellow"};
static const char *const things[] = {"anchor",  "barrel",  "basket",   "bell",   "bottle", "bridge",  "bucket",  "candle",
                                     "cart",    "compass", "curtain",  "drum",   "engine", "feather", "fence",   "garden",
                                     "glove",   "hammer",  "hinge",    "jacket", "kettle", "ladder",  "lantern", "letter",
                                     "mirror",  "needle",  "orchard",  "paddle", "pebble", "pillow",  "plough",  "quilt",
                                     "ribbon",  "saddle",  "shovel",   "spoon",  "stove",  "table",   "teapot",  "ticket",
                                     "trumpet", "tunnel",  "umbrella", "violin", "wagon",  "wheel",   "whistle", "window"};
static const char *const people[] = {"baker",   "boatman",  "carpenter", "clerk",  "cook",   "doctor",   "farmer", "ferryman",
                                     "fiddler", "gardener", "glazier",   "hunter", "lawyer", "mason",    "miller", "nurse",
                                     "painter", "pilot",    "porter",    "potter", "sailor", "shepherd", "smith",  "teacher"};
static const char *const deeds[] = {"admired", "borrowed", "carried", "cleaned",  "counted",  "described", "dropped", "examined",
                                    "fetched", "forgot",   "guarded", "hid",      "lifted",   "mended",    "moved",   "noticed",
                                    "ordered", "praised",  "pushed",  "returned", "sketched", "sold",      "traded",  "watched"};
static const char *const places[] = {"across the square",  "at the edge of the village", "behind the barn",
                                     "below the cliffs",   "beside the canal",           "by the old mill",
                                     "in the market hall", "near the lighthouse",        "on the upper landing",
                                     "outside the chapel", "under the arches",           "within sight of the harbour"};
static const char *const times[] = {"after supper",    "all through the winter", "at first light",          "before the rain",
                                    "during the fair", "every evening",          "in the last week of May", "long ago",
                                    "that afternoon",  "while the bells rang"};

#define PICK(draw, list) (list)[draw_below(draw, ARRAY_LENGTH(list))]

void draw_compound(struct draw *draw, char *word, size_t room) {
  const char *adjective = PICK(draw, adjectives);
  snprintf(word, room, "%s-%s", adjective, PICK(draw, things));
}

/* The order in which a compiler evaluates arguments is its own choice: draws come first, one by one. */
static void add_sentence(struct text *text, struct draw *draw) {
  const char *adjective = PICK(draw, adjectives), *other = PICK(draw, adjectives), *thing = PICK(draw, things);
  const char *person = PICK(draw, people), *second = PICK(draw, people), *deed = PICK(draw, deeds);
  const char *place = PICK(draw, places), *time = PICK(draw, times);
  switch (draw_below(draw, 5)) {
  case 0:
    text_add(text, "The %s %s %s the %s %s %s.", adjective, person, deed, other, thing, place);
    break;
  case 1:
    text_add(text, "Nobody knew why the %s %s the %s %s %s.", person, deed, adjective, thing, time);
    break;
  case 2:
    text_add(text, "The %s and the %s talked %s about the %s %s.", person, second, place, adjective, thing);
    break;
  case 3:
    text_add(text, "It was the %s who %s the %s %s, and %s the %s heard of it.", person, deed, adjective, thing, time, second);
    break;
  default:
    text_add(text, "Somewhere %s a %s %s was waiting for the %s.", place, strchr("aeiou", other[0]) ? "plain" : other, thing,
             person);
    break;
  }
}

static void add_sentences(struct text *text, struct draw *draw, size_t wanted) {
  const size_t end = text->bytes + wanted;
  while (text->bytes < end && !text->failed) {
    const uint32_t sentences = 4 + draw_below(draw, 4);
    for (uint32_t i = 0; i < sentences; i++) {
      add_sentence(text, draw);
      text_add(text, "%s", i + 1 < sentences ? " " : "\n\n");
    }
  }
}

/* ---- paragraphs ---- */

struct stretch {
  const char *at;
  size_t bytes;
};

static bool blank_line(const char *line, const char *end) {
  while (line < end && *line != '\n' && isspace((unsigned char)*line)) line++;
  return line == end || *line == '\n';
}

/* The next paragraph from *at on, without the empty lines around it; false at the end. */
static bool next_paragraph(const char **at, const char *end, struct stretch *paragraph) {
  const char *p = *at;
  while (p < end && isspace((unsigned char)*p)) p++;
  if (p == end) return false;
  const char *begin = p;
  while (p < end && !(*p == '\n' && blank_line(p + 1, end))) p++;
  *paragraph = (struct stretch){begin, (size_t)(p - begin)};
  *at = p;
  return true;
}

static int count_paragraphs(const char *source, size_t bytes) {
  struct stretch ignored;
  int count = 0;
  for (const char *at = source; next_paragraph(&at, source + bytes, &ignored);) count++;
  return count;
}

static void shuffle(struct stretch *list, int count, struct draw *draw) {
  for (int i = count - 1; i > 0; i--) {
    const uint32_t j = draw_below(draw, (uint32_t)i + 1);
    const struct stretch moved = list[i];
    list[i] = list[j];
    list[j] = moved;
  }
}

static void add_stretch(struct text *text, struct stretch stretch) {
  const size_t from = text->bytes;
  text_add_bytes(text, stretch.at, stretch.bytes);
  for (size_t i = from; i < text->bytes; i++)
    if (text->data[i] == '\0') text->data[i] = ' ';
  text_add(text, "\n\n");
}

static oscar_status add_paragraphs(struct text *text, const char *source, size_t bytes, struct draw *draw, size_t wanted) {
  const int count = count_paragraphs(source, bytes);
  if (count == 0) return set_error(text->context, OSCAR_INVALID_ARGUMENT, "the filler text is empty");
  struct stretch *list = mem_alloc(text->context, (size_t)count, sizeof *list);
  if (!list) return OSCAR_NO_MEMORY;
  const char *at = source;
  for (int i = 0; i < count; i++) next_paragraph(&at, source + bytes, &list[i]);
  const size_t end = text->bytes + wanted;
  while (text->bytes < end && !text->failed) {
    shuffle(list, count, draw);
    for (int i = 0; i < count && text->bytes < end && !text->failed; i++) add_stretch(text, list[i]);
  }
  mem_free(text->context, list);
  return OSCAR_OK;
}

oscar_status filler_write(struct text *text, const char *source, size_t source_bytes, struct draw *draw, size_t wanted) {
  oscar_status status = OSCAR_OK;
  if (source)
    status = add_paragraphs(text, source, source_bytes, draw, wanted);
  else
    add_sentences(text, draw, wanted);
  return status == OSCAR_OK && text->failed ? OSCAR_NO_MEMORY : status;
}
