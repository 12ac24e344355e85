/*
 * model/chat_template.h - turning a conversation into the text a model was trained on. Private.
 * Templates of the common families are recognised from the model's own (Jinja) template text and control tokens; others are
 * refused, with the flag that chooses one.
 */
#ifndef OSCAR_CHAT_TEMPLATE_H
#define OSCAR_CHAT_TEMPLATE_H

#include "model/gguf.h"
#include "model/tokenizer.h"

enum chat_family { CHAT_UNKNOWN, CHAT_CHATML, CHAT_LLAMA3, CHAT_GEMMA, CHAT_MISTRAL };
/* How a template shows tools and their calls. */
enum chat_tool_style {
  CHAT_TOOLS_NONE,
  CHAT_TOOLS_QWEN,    /* chatml: <tools> with one JSON text a line, <tool_call>, <tool_response> in a user's turn */
  CHAT_TOOLS_HERMES,  /* chatml: <tools> with signatures of Python, <tool_call>, turns of the role tool */
  CHAT_TOOLS_LLAMA3,  /* 3.1 and later: tools in the first message, an answer that is one JSON text, turns of the role ipython */
  CHAT_TOOLS_MISTRAL, /* [AVAILABLE_TOOLS], [TOOL_CALLS], [TOOL_RESULTS] */
};

struct chat_tool_call {
  const char *id; /* NULL where the family has none; Mistral's are nine letters and digits: others are cut or filled to that */
  const char *name;
  const char *arguments; /* JSON text of an object */
};
struct chat_message {
  const char *role;         /* "system", "user", "assistant", "tool" */
  const char *content;      /* may be NULL if there are calls */
  const char *name;         /* of a tool whose result this is, or NULL; no template shows it */
  const char *tool_call_id; /* of the call whose result this is, or NULL */
  const struct chat_tool_call *calls;
  int n_calls; /* by an assistant */
};
struct chat_tool {
  const char *name;
  const char *description; /* or NULL */
  const char *parameters;  /* JSON schema text, or NULL */
};

struct chat_template {
  enum chat_family family;
  enum chat_tool_style tools;
  char default_system[256];  /* the model's own default system message; "" if none */
  char system_preamble[256]; /* what the template puts before any system text (Llama 3.1: dates); "" if nothing */
  bool writes_bos;           /* chatml: the template begins with BOS, whatever the tokenizer says */
  bool refuses_system;       /* the template knows no system messages */
  bool thinks;               /* answers may begin with <think> ... </think> */
  bool opens_thinking;       /* <think> ends the prompt: answers begin inside */
  bool tools_after_blank;    /* Qwen: "\n\n" precedes the tools even where no system text does */
  struct {
    char user_open[16], user_close[16], assistant_open[8]; /* "[INST] ", " [/INST]", "" or " " */
    char tools_open[32], calls_open[32], result_open[32];  /* "[AVAILABLE_TOOLS] [", "[TOOL_CALLS] [", ... */
    bool system_last, trims_assistant;                     /* system text goes before the last user message, not the first */
  } mistral;
};
/* name: "chatml", "llama3", "gemma", "mistral", or NULL / "auto" to recognise. Errors: INVALID_ARGUMENT (unknown name),
 * UNSUPPORTED (not recognised: says which flag and names exist). */
oscar_status chat_template_choose(oscar_context *context, const struct gguf *file, const char *name,
                                  struct chat_template *chosen);
const char *chat_family_name(enum chat_family family);

/* Whether the model's template defines tools. Where it does not, tools, calls and results are refused. */
bool chat_template_has_tools(const struct chat_template *chat);

/* The conversation as text with control tokens spelled out (encode with parse_special for the template's parts only):
 * returns token ids directly, so that text inside messages and tools can never become a control token. add_generation_prompt
 * opens the assistant's turn. The ids include BOS where the model wants it. JSON is written as Python's json.dumps writes it,
 * because that is what models saw. Errors: INVALID_ARGUMENT (roles, JSON texts, a conversation that the template refuses),
 * UNSUPPORTED (tools, and the template has none). */
oscar_status chat_template_encode(const struct chat_template *chat, oscar_context *context, const struct tokenizer *tokenizer,
                                  const struct chat_message *messages, int n_messages, const struct chat_tool *tools, int n_tools,
                                  bool add_generation_prompt, int32_t **ids, int *count);

/* Control tokens that answers may hold and whose spelling is part of the answer's text, because model/reply.h looks for it:
 * [TOOL_CALLS], <|python_tag|>, ... Writes at most `room`; returns how many were written. */
int chat_template_visible(const struct chat_template *chat, const struct tokenizer *tokenizer, int32_t *ids, int room);

/* ---- answers that must be a call ---- */
struct chat_form_part {
  const char *literal; /* or, if it is NULL, */
  const char *schema;  /* a JSON schema text */
};
struct chat_form {
  struct chat_form_part parts[3];
  int n_parts;
};
struct chat_tool_forms {
  struct chat_form *forms;
  int n_forms;
};
/* How a call of one of the tools is spelled, a form for each; of the tool `name` alone if that is not NULL. Freed with
 * chat_tool_forms_free. Errors: UNSUPPORTED (no tools in the template), INVALID_ARGUMENT (no such tool, bad JSON). */
oscar_status chat_tool_forms_create(const struct chat_template *chat, oscar_context *context, const struct chat_tool *tools,
                                    int n_tools, const char *name, struct chat_tool_forms **forms);
void chat_tool_forms_free(oscar_context *context, struct chat_tool_forms *forms);
#endif
