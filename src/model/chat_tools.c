/*
 * chat_tools.c - tools, calls and their results in the forms that models were trained on.
 *
 * Each style follows one published template to the letter, its oddities included: names stand unescaped in JSON, a result is
 * quoted (Llama 3) or raw (Mistral), Hermes has no line break after a turn of results. Where a template would fail in Python
 * although nothing is wrong with the conversation (a description that is missing, the type null), the nearest sensible text is
 * written.
 */
#include "model/chat_private.h"

#include <stdlib.h>

/* ---- recognising ---- */

static void read_mistral_tools(struct gguf_string text, struct chat_template *chat) {
  char *tools = chat->mistral.tools_open, *calls = chat->mistral.calls_open, *result = chat->mistral.result_open;
  if (template_literal(text, "[AVAILABLE_TOOLS]", tools, sizeof chat->mistral.tools_open) &&
      template_literal(text, "[TOOL_CALLS]", calls, sizeof chat->mistral.calls_open) &&
      template_literal(text, "[TOOL_RESULTS]", result, sizeof chat->mistral.result_open) && tools[strlen(tools) - 1] == '[' &&
      calls[strlen(calls) - 1] == '[' && strstr(result, "{\"content\": "))
    chat->tools = CHAT_TOOLS_MISTRAL;
}

void chat_tools_read(struct gguf_string text, struct chat_template *chat) {
  switch (chat->family) {
  case CHAT_CHATML:
    if (!template_has(text, "<tool_call>") || !template_has(text, "<tool_response>")) return;
    if (template_has(text, "# Tools\\n\\nYou may call one or more functions")) {
      chat->tools = CHAT_TOOLS_QWEN;
      chat->tools_after_blank = !template_has(text, "\"# Tools");
    } else if (template_has(text, "You are a function calling AI model.")) {
      chat->tools = CHAT_TOOLS_HERMES;
    }
    break;
  case CHAT_LLAMA3:
    if (template_has(text, "Environment: ipython") && template_has(text, "Given the following functions, please respond"))
      chat->tools = CHAT_TOOLS_LLAMA3;
    break;
  case CHAT_MISTRAL:
    read_mistral_tools(text, chat);
    break;
  case CHAT_GEMMA:
  case CHAT_UNKNOWN:
    break;
  }
}

bool chat_template_has_tools(const struct chat_template *chat) { return chat->tools != CHAT_TOOLS_NONE; }

int chat_template_visible(const struct chat_template *chat, const struct tokenizer *tokenizer, int32_t *ids, int room) {
  static const char *const marks[][3] = {[CHAT_TOOLS_NONE] = {NULL},
                                         [CHAT_TOOLS_QWEN] = {"<tool_call>", "</tool_call>"},
                                         [CHAT_TOOLS_HERMES] = {"<tool_call>", "</tool_call>"},
                                         [CHAT_TOOLS_LLAMA3] = {"<|python_tag|>"},
                                         [CHAT_TOOLS_MISTRAL] = {"[TOOL_CALLS]"}};
  const char *spellings[5];
  int count = 0, written = 0;
  for (int i = 0; i < 3 && marks[chat->tools][i]; i++) spellings[count++] = marks[chat->tools][i];
  if (chat->thinks) spellings[count++] = "<think>", spellings[count++] = "</think>";
  for (int i = 0; i < count; i++) {
    int32_t id = tokenizer_find(tokenizer, spellings[i]);
    if (id >= 0 && tokenizer->vocabulary.type[id] == TOKEN_CONTROL && written < room) ids[written++] = id;
  }
  return written;
}

/* ---- JSON of tools and calls ---- */

/* {"type": "function", "function": {...}}, NULL once something failed */
static json_t *tool_json(struct writer *w, const struct chat_tool *tool) {
  json_t *parameters = tool->parameters ? write_parse(w, tool->parameters, "parameters", tool->name) : NULL;
  if (w->status) return NULL;
  json_error_t error;
  json_t *value = json_pack_ex(&error, 0, "{s:s, s:{s:s, s:s*, s:o*}}", "type", "function", "function", "name", tool->name,
                               "description", tool->description, "parameters", parameters);
  if (value) return value;
  w->status = json_error_code(&error) == json_error_invalid_utf8
                  ? set_error(w->context, OSCAR_INVALID_ARGUMENT, "name or description of a tool are not UTF-8")
                  : set_error(w->context, OSCAR_NO_MEMORY, "no memory for the tool \"%.64s\"", tool->name);
  return NULL;
}

static void write_tool(struct writer *w, const struct chat_tool *tool, int indent) {
  json_t *value = tool_json(w, tool);
  if (value) write_json(w, value, indent);
  json_decref(value);
}

static void write_object(struct writer *w, const char *text, const char *what, const char *whose) {
  json_t *value = write_parse(w, text, what, whose);
  if (value) write_json(w, value, 0);
  json_decref(value);
}

/* {"name": "...", "arguments": {...}} with the name as it is, without the closing brace */
static void write_call(struct writer *w, const struct chat_tool_call *call, const char *arguments_key) {
  write_text(w, "{\"name\": \"");
  write_text(w, call->name);
  write_text(w, "\", \"");
  write_text(w, arguments_key);
  write_text(w, "\": ");
  write_object(w, call->arguments, "arguments", call->name);
}

static void write_quoted(struct writer *w, const char *text) {
  json_t *value = w->status ? NULL : json_string(text);
  if (value)
    write_json(w, value, 0);
  else if (!w->status)
    w->status = set_error(w->context, OSCAR_INVALID_ARGUMENT, "a text of the conversation is not UTF-8, or memory is out");
  json_decref(value);
}

/* ---- chatml: Qwen and Hermes ---- */

void write_qwen_tools(struct writer *w, const struct chat_template *chat, bool after_text, const struct chat_tool *tools,
                      int n_tools) {
  if (after_text || chat->tools_after_blank) write_text(w, "\n\n");
  write_literal(w,
                "# Tools\n\nYou may call one or more functions to assist with the user query.\n\nYou are provided with function "
                "signatures within <tools></tools> XML tags:\n<tools>");
  for (int i = 0; i < n_tools; i++) {
    write_text(w, "\n");
    write_tool(w, &tools[i], 0);
  }
  write_literal(w, "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
                   "<tool_call></tool_call> XML tags:\n<tool_call>\n{\"name\": <function-name>, \"arguments\": "
                   "<args-json-object>}\n</tool_call>");
}

/* Hermes' names of JSON types. Its template goes on to the items of an array by their pairs, not their schema, and so never finds
 * a type there; a type that is missing counts as none of several. */
static void write_python_type(struct writer *w, const json_t *schema, int depth) {
  static const char *const names[][2] = {{"string", "str"}, {"number", "float"}, {"integer", "int"}, {"boolean", "bool"}};
  const json_t *type = json_object_get(schema, "type"), *extra = json_object_get(schema, "additionalProperties");
  const char *name = json_string_value(type);
  for (size_t i = 0; name && i < ARRAY_LENGTH(names); i++)
    if (strcmp(name, names[i][0]) == 0) {
      write_text(w, names[i][1]);
      return;
    }
  if (name && strcmp(name, "array") == 0) {
    write_text(w, "list[Union[]]");
  } else if (name && strcmp(name, "object") == 0) {
    write_text(w, extra && depth < 64 ? "dict[str, " : "dict");
    if (!extra || depth >= 64) return;
    write_python_type(w, extra, depth + 1);
    write_text(w, "]");
  } else if (!type || json_is_array(type)) {
    write_text(w, "Union[");
    for (size_t i = 0; i < json_array_size(type); i++) {
      json_t *one = json_pack("{s:O}", "type", json_array_get(type, i));
      if (!one && !w->status) w->status = set_error(w->context, OSCAR_NO_MEMORY, "no memory for a type of a tool's parameter");
      if (i) write_text(w, ",");
      if (one && depth < 64) write_python_type(w, one, depth + 1);
      json_decref(one);
    }
    write_text(w, "]");
  } else {
    write_text(w, "Any");
  }
}

static void write_hermes_tool(struct writer *w, const struct chat_tool *tool) {
  json_t *parameters = write_parse(w, tool->parameters, "parameters", tool->name);
  if (!parameters) return;
  json_t *properties = json_object_get(parameters, "properties"), *property;
  const char *key;
  write_text(w, "{\"type\": \"function\", \"function\": {\"name\": \"");
  write_text(w, tool->name);
  write_text(w, "\", \"description\": \"");
  write_text(w, tool->name);
  write_text(w, "(");
  bool first = true;
  json_object_foreach(properties, key, property) {
    if (!first) write_text(w, ", ");
    first = false;
    write_text(w, key);
    write_text(w, ": ");
    write_python_type(w, property, 0);
  }
  write_text(w, ") - ");
  write_text(w, tool->description ? tool->description : "");
  write_text(w, "\n\n");
  first = true;
  json_object_foreach(properties, key, property) {
    if (first) write_text(w, "    Args:\n");
    first = false;
    write_text(w, "        ");
    write_text(w, key);
    write_text(w, "(");
    write_python_type(w, property, 0);
    write_text(w, "): ");
    const char *description = json_string_value(json_object_get(property, "description"));
    write_trimmed(w, description ? description : "");
  }
  write_text(w, "\", \"parameters\": ");
  if (json_object_size(properties))
    write_json(w, parameters, 0);
  else
    write_text(w, "{}");
  write_text(w, "}");
  json_decref(parameters);
}

void write_hermes_tools(struct writer *w, const struct chat_tool *tools, int n_tools) {
  write_literal(w, "<|im_start|>system\n");
  write_literal(w,
                "You are a function calling AI model. You are provided with function signatures within <tools></tools> XML tags. "
                "You may call one or more functions to assist with the user query. Don't make assumptions about what values "
                "to plug into functions. Here are the available tools: <tools> ");
  for (int i = 0; i < n_tools; i++) {
    if (i) write_text(w, "\n");
    write_hermes_tool(w, &tools[i]);
  }
  write_literal(w, " </tools>Use the following pydantic model json schema for each tool call you will make: {\"properties\": "
                   "{\"name\": {\"title\": \"Name\", \"type\": \"string\"}, \"arguments\": {\"title\": \"Arguments\", \"type\": "
                   "\"object\"}}, \"required\": [\"name\", \"arguments\"], \"title\": \"FunctionCall\", \"type\": \"object\"}}\n"
                   "For each function call return a json object with function name and arguments within <tool_call></tool_call> "
                   "XML tags as follows:\n<tool_call>\n{\"name\": <function-name>, \"arguments\": <args-dict>}\n"
                   "</tool_call><|im_end|>\n");
}

void write_chatml_calls(struct writer *w, const struct chat_template *chat, const struct chat_message *message) {
  write_literal(w, "<|im_start|>assistant");
  if (chat->tools == CHAT_TOOLS_QWEN && chat_content(message)[0]) {
    write_text(w, "\n");
    write_text(w, message->content);
  }
  for (int i = 0; i < message->n_calls; i++) {
    write_literal(w, "\n<tool_call>\n");
    write_call(w, &message->calls[i], "arguments");
    write_literal(w, "}\n</tool_call>");
  }
  write_literal(w, "<|im_end|>\n");
}

/* Results in a row share a turn. */
void write_chatml_result(struct writer *w, const struct chat_template *chat, const struct chat_message *messages, int count,
                         int at) {
  bool first = at == 0 || !chat_is_role(&messages[at - 1], "tool");
  bool last = at + 1 == count || !chat_is_role(&messages[at + 1], "tool");
  if (chat->tools == CHAT_TOOLS_QWEN) {
    write_literal(w, first ? "<|im_start|>user\n<tool_response>\n" : "\n<tool_response>\n");
    write_text(w, chat_content(&messages[at]));
    write_literal(w, last ? "\n</tool_response><|im_end|>\n" : "\n</tool_response>");
    return;
  }
  if (first && at > 0) write_literal(w, "<|im_start|>tool\n");
  write_literal(w, "<tool_response>\n");
  write_text(w, chat_content(&messages[at]));
  write_literal(w, at + 1 < count ? "\n</tool_response>\n" : "\n</tool_response>");
  if (last) write_literal(w, "<|im_end|>");
}

/* ---- Llama 3.1 and later ---- */

void write_llama3_tools(struct writer *w, const struct chat_tool *tools, int n_tools) {
  write_text(w,
             "Given the following functions, please respond with a JSON for a function call with its proper arguments that best "
             "answers the given prompt.\n\nRespond in the format {\"name\": function name, \"parameters\": dictionary of "
             "argument name and its value}.Do not use variables.\n\n");
  for (int i = 0; i < n_tools; i++) {
    write_tool(w, &tools[i], 4);
    write_text(w, "\n\n");
  }
}

void write_llama3_call(struct writer *w, const struct chat_tool_call *call) {
  write_call(w, call, "parameters");
  write_text(w, "}");
}

void write_llama3_result(struct writer *w, const struct chat_message *message) { write_quoted(w, chat_content(message)); }

/* ---- Mistral ---- */

void write_mistral_tools(struct writer *w, const struct chat_template *chat, const struct chat_tool *tools, int n_tools) {
  write_literal(w, chat->mistral.tools_open);
  for (int i = 0; i < n_tools; i++) {
    write_text(w, i ? ", {\"type\": \"function\", \"function\": {\"name\": \""
                    : "{\"type\": \"function\", \"function\": {\"name\": \"");
    write_text(w, tools[i].name);
    write_text(w, "\"");
    if (tools[i].description) {
      write_text(w, ", \"description\": \"");
      write_text(w, tools[i].description);
      write_text(w, "\"");
    }
    if (tools[i].parameters) {
      write_text(w, ", \"parameters\": ");
      write_object(w, tools[i].parameters, "parameters", tools[i].name);
    }
    write_text(w, "}}");
  }
  write_literal(w, "][/AVAILABLE_TOOLS]");
}

/* The last nine letters and digits of an id, with zeros in front where it has fewer: a call and its result stay together. */
static void write_mistral_id(struct writer *w, const char *id) {
  char nine[] = "000000000";
  size_t left = id ? strlen(id) : 0;
  for (int at = 8; at >= 0 && left > 0; left--) {
    char c = id[left - 1];
    if ((c >= '0' && c <= '9') || (c >= 'A' && c <= 'Z') || (c >= 'a' && c <= 'z')) nine[at--] = c;
  }
  write_text(w, id && strlen(id) == 9 ? id : nine);
}

void write_mistral_calls(struct writer *w, const struct chat_template *chat, const struct chat_message *message) {
  write_literal(w, chat->mistral.calls_open);
  for (int i = 0; i < message->n_calls; i++) {
    write_text(w, i ? ", {\"name\": " : "{\"name\": ");
    write_quoted(w, message->calls[i].name);
    write_text(w, ", \"arguments\": ");
    write_object(w, message->calls[i].arguments, "arguments", message->calls[i].name);
    write_text(w, ", \"id\": \"");
    write_mistral_id(w, message->calls[i].id);
    write_text(w, "\"}");
  }
  write_text(w, "]");
  if (w->tokenizer->eos >= 0) write_id(w, w->tokenizer->eos);
}

void write_mistral_result(struct writer *w, const struct chat_template *chat, const struct chat_message *message) {
  write_literal(w, chat->mistral.result_open);
  write_text(w, chat_content(message));
  write_text(w, ", \"call_id\": \"");
  write_mistral_id(w, message->tool_call_id);
  write_literal(w, "\"}[/TOOL_RESULTS]");
}

/* ---- forms of an answer ---- */

/* What stands before and after the arguments of a call of `name`. */
static oscar_status form_words(const struct chat_template *chat, oscar_context *context, const char *name, char **before,
                               const char **after) {
  json_t *quoted = json_string(name);
  char *spelled = quoted ? json_dumps(quoted, JSON_ENCODE_ANY) : NULL;
  json_decref(quoted);
  if (!spelled) return set_error(context, OSCAR_INVALID_ARGUMENT, "the name of a tool is not UTF-8, or memory is out");
  bool mistral = chat->tools == CHAT_TOOLS_MISTRAL, llama3 = chat->tools == CHAT_TOOLS_LLAMA3;
  const char *open = mistral ? chat->mistral.calls_open : llama3 ? "" : "<tool_call>\n";
  size_t room = strlen(open) + strlen(spelled) + 64;
  *before = mem_alloc(context, room, 1);
  if (*before) snprintf(*before, room, "%s{\"name\": %s, \"%s\": ", open, spelled, llama3 ? "parameters" : "arguments");
  *after = mistral ? "}]" : llama3 ? "}" : "}\n</tool_call>";
  free(spelled);
  return *before ? OSCAR_OK : OSCAR_NO_MEMORY;
}

static oscar_status make_form(const struct chat_template *chat, oscar_context *context, const struct chat_tool *tool,
                              struct chat_form *form) {
  struct writer check = {.context = context};
  json_decref(write_parse(&check, tool->parameters, "parameters", tool->name));
  if (check.status) return check.status;
  char *before = NULL,
       *schema = mem_strdup(context, tool->parameters && tool->parameters[0] ? tool->parameters : "{\"type\":\"object\"}");
  const char *after = NULL;
  oscar_status status = schema ? form_words(chat, context, tool->name, &before, &after) : OSCAR_NO_MEMORY;
  if (status) {
    mem_free(context, schema);
    return status;
  }
  *form = (struct chat_form){{{before, NULL}, {NULL, schema}, {after, NULL}}, 3};
  return OSCAR_OK;
}

oscar_status chat_tool_forms_create(const struct chat_template *chat, oscar_context *context, const struct chat_tool *tools,
                                    int n_tools, const char *name, struct chat_tool_forms **forms) {
  *forms = NULL;
  if (!chat_template_has_tools(chat))
    return set_error(context, OSCAR_UNSUPPORTED, "the model's chat template (%s) defines no tools",
                     chat_family_name(chat->family));
  struct chat_tool_forms *made = mem_zalloc(context, 1, sizeof *made);
  if (!made) return OSCAR_NO_MEMORY;
  made->forms = mem_zalloc(context, (size_t)(n_tools > 0 ? n_tools : 1), sizeof *made->forms);
  oscar_status status = made->forms ? OSCAR_OK : OSCAR_NO_MEMORY;
  for (int i = 0; i < n_tools && !status; i++) {
    if (!tools[i].name)
      status = set_error(context, OSCAR_INVALID_ARGUMENT, "tool %d has no name", i + 1);
    else if (!name || strcmp(tools[i].name, name) == 0)
      status = make_form(chat, context, &tools[i], &made->forms[made->n_forms]);
    else
      continue;
    if (!status) made->n_forms++;
  }
  if (!status && made->n_forms == 0)
    status = name ? set_error(context, OSCAR_INVALID_ARGUMENT, "there is no tool \"%.64s\" to be called", name)
                  : set_error(context, OSCAR_INVALID_ARGUMENT, "a call is required and there are no tools");
  if (status) {
    chat_tool_forms_free(context, made);
    return status;
  }
  *forms = made;
  return OSCAR_OK;
}

void chat_tool_forms_free(oscar_context *context, struct chat_tool_forms *forms) {
  if (!forms) return;
  for (int i = 0; i < forms->n_forms; i++) {
    mem_free(context, (char *)(uintptr_t)forms->forms[i].parts[0].literal);
    mem_free(context, (char *)(uintptr_t)forms->forms[i].parts[1].schema);
  }
  mem_free(context, forms->forms);
  mem_free(context, forms);
}
