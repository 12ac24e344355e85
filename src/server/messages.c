/* messages.c - conversations and tools, from any dialect into what a chat template takes. */
#include "server/inquiry.h"

#include <stdio.h>
#include <string.h>

enum { MOST_MESSAGES = 65536, MOST_TOOLS = 256 };

const char *template_role(const char *role) {
  static const char *const roles[][2] = {
      {"system", "system"}, {"developer", "system"}, {"user", "user"}, {"assistant", "assistant"}, {"tool", "tool"}};
  for (size_t i = 0; i < ARRAY_LENGTH(roles); i++)
    if (strcmp(roles[i][0], role) == 0) return roles[i][1];
  return NULL;
}

struct chat_message *add_message(struct inquiry *g, const char *role, const char *content, const struct fields *f) {
  if (g->n_messages == g->room_messages) {
    const int room = g->room_messages ? 2 * g->room_messages : 16;
    struct chat_message *larger = room <= MOST_MESSAGES ? realloc(g->messages, (size_t)room * sizeof *larger) : NULL;
    if (!larger) {
      refuse(f->refusal, 400, NULL, f->path, "the conversation has more messages than are possible");
      return NULL;
    }
    g->messages = larger;
    g->room_messages = room;
  }
  struct chat_message *message = &g->messages[g->n_messages++];
  *message = (struct chat_message){.role = role, .content = content};
  return message;
}

bool add_call(struct inquiry *g, struct chat_message *message, const char *id, const char *name, const char *arguments,
              const struct fields *f) {
  /* The list of one message's calls is made anew for each: messages have few. */
  struct chat_tool_call *calls = inquiry_keep(g, calloc((size_t)message->n_calls + 1, sizeof *calls));
  if (!calls) return refuse_memory(f->refusal);
  if (message->n_calls) memcpy(calls, message->calls, (size_t)message->n_calls * sizeof *calls);
  json_t *parsed = json_loads(arguments, JSON_REJECT_DUPLICATES, NULL);
  const bool good = json_is_object(parsed);
  json_decref(parsed);
  if (!good) return field_refuse(f, "arguments", "must be the JSON text of an object");
  calls[message->n_calls++] = (struct chat_tool_call){.id = id, .name = name, .arguments = arguments};
  message->calls = calls;
  return true;
}

bool parts_text(struct inquiry *g, const struct fields *f, const char *name, const char *types, const char **text) {
  const json_t *value = field(f, name);
  if (json_is_string(value)) {
    *text = json_string_value(value);
    return true;
  }
  if (!json_is_array(value)) return field_refuse(f, name, value ? "must be a string or a list of parts" : "is missing");
  struct buffer joined = {0};
  size_t i;
  json_t *part;
  json_array_foreach(value, i, part) {
    char path[FIELD_PATH];
    struct fields inside;
    const char *type = NULL, *piece = NULL;
    bool good = fields_enter_item(f, name, i, part, path, &inside) && field_needed_text(&inside, "type", &type);
    if (good && !in_list(types, type))
      good = field_refuse(&inside, "type", "'%.40s' is not supported: this model reads text", type);
    if (!good || !field_needed_text(&inside, "text", &piece)) {
      buffer_free(&joined);
      return false;
    }
    buffer_text(&joined, piece);
  }
  *text = inquiry_keep(g, buffer_take(&joined));
  return *text || refuse_memory(f->refusal);
}

bool add_tool(struct inquiry *g, const char *name, const char *description, const json_t *parameters, const struct fields *f) {
  if (g->n_tools >= MOST_TOOLS) return refuse(f->refusal, 400, NULL, "tools", "tools has more than %d tools", MOST_TOOLS);
  if (!*name || strlen(name) > 128 ||
      strspn(name, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-.") != strlen(name))
    return field_refuse(f, "name", "must have 1 to 128 letters, digits, '_', '-' or '.'");
  for (int i = 0; i < g->n_tools; i++)
    if (strcmp(g->tools[i].name, name) == 0) return field_refuse(f, "name", "'%s' is the name of another tool, too", name);
  if (parameters && !json_is_object(parameters)) return field_refuse(f, "parameters", "must be a JSON schema");
  char *schema = parameters ? inquiry_keep(g, json_dumps(parameters, JSON_COMPACT)) : NULL;
  struct chat_tool *larger = realloc(g->tools, ((size_t)g->n_tools + 1) * sizeof *larger);
  if (larger) g->tools = larger;
  if (!larger || (parameters && !schema)) return refuse_memory(f->refusal);
  g->tools[g->n_tools++] = (struct chat_tool){.name = name, .description = description, .parameters = schema};
  return true;
}

bool read_flat_tools(struct inquiry *g, const struct fields *f, const char *served, const char *unsaid, const char *schema) {
  const json_t *tools = NULL;
  if (!field_array(f, "tools", &tools) || !tools) return tools == NULL && f->refusal->status == 0;
  size_t i;
  json_t *tool;
  json_array_foreach(tools, i, tool) {
    char path[FIELD_PATH];
    struct fields inside;
    const char *type = unsaid, *name = NULL, *description = NULL;
    if (!fields_enter_item(f, "tools", i, tool, path, &inside)) return false;
    if (!(unsaid ? field_text(&inside, "type", &type) : field_needed_text(&inside, "type", &type))) return false;
    if (strcmp(type, served) != 0) return field_refuse(&inside, "type", "'%.40s' is a tool that this server does not run", type);
    if (!field_needed_text(&inside, "name", &name) || !field_text(&inside, "description", &description) ||
        !add_tool(g, name, description, field(&inside, schema), &inside))
      return false;
  }
  return true;
}

bool encode_conversation(struct inquiry *g, struct frontend *frontend, struct refusal *refusal) {
  const bool offered = g->n_tools > 0 && g->tool_use != TOOLS_NONE;
  if (offered && !chat_template_has_tools(&frontend->chat))
    return refuse(refusal, 400, "no_tools", "tools", "tools: the chat template of this model knows no tools");
  if (g->tool_use == TOOLS_REQUIRED && !g->n_tools)
    return refuse(refusal, 400, NULL, "tool_choice", "tool_choice: there are no tools to choose from");
  if (offered && g->grammar)
    return refuse(refusal, 400, NULL, "tools",
                  "tools: an answer that has to keep to a form cannot call tools; tool_choice \"none\" forbids them");
  if (offered && g->tool_use == TOOLS_REQUIRED &&
      !frontend_call_grammar(frontend, g->tools, g->n_tools, g->tool_name, &g->grammar, refusal))
    return false;
  return frontend_conversation(frontend, g->messages, g->n_messages, g->tools, offered ? g->n_tools : 0, "messages", &g->ids,
                               &g->options.n, refusal);
}
