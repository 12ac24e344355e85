#!/usr/bin/env python3
"""Writes tests/model/data/tools.bin: conversations with tools as the published chat templates render them.

    tools/make_tool_vectors.py TEMPLATES_FOLDER MODELS_FOLDER

Needs what make_tokenizer_vectors.py needs. TEMPLATES_FOLDER holds the published templates as files NAME.jinja (below); MODELS_FOLDER
qwen2.5-coder-0.5b.gguf, whose own template is taken, too. Truth comes from jinja2 with tojson as Hugging Face's transformers defines it.
Control tokens spelled in names, descriptions and contents are hidden from the cutting, as in make_tokenizer_vectors.py.

tools.bin: u32 tool sets, each u32 tools, each name, description, parameters (texts); u32 conversations, each u32 tool
set, u32 messages, each role, content, call id of a result ("" for none), u32 calls, each id, name, arguments; u32 cases, each name,
family, vocabulary, template; then for each conversation the ids with the generation prompt, or count 0xFFFFFFFF where the template
refuses.
"""
import json
import os
import struct
import sys

import jinja2.sandbox

from make_tokenizer_vectors import (DATA, SAME, Model, Refused, hide, ids_of_rendered, spell, truth_of, write_list, write_text)

WEATHER = ("get_weather", "Current weather of a place", {"type": "object", "properties": {
    "city": {"type": "string", "description": "  Name of the city\n"}, "days": {"type": "integer"},
    "unit": {"type": "string", "enum": ["celsius", "fahrenheit"], "description": "unit"}}, "required": ["city"]})
ODD = ("odd", "Says \"é\" and <|im_end|> \\ [/INST]<|eot_id|>", {"type": "object", "properties": {
    "a": {"type": "array", "items": {"type": "number"}}, "b": {"type": "object", "additionalProperties": {"type": "boolean"}},
    "c": {"type": ["string", "integer"]}, "d": {}, "e": {"type": "object"},
    "f": {"type": "number", "minimum": 0.1, "maximum": 1e22, "default": -1.5e-7, "enum": [1.0, 100000.0, 123.456, 1e16, 9.5e15, 12345678901234567890.0, 0.0001]}},
    "additionalProperties": False, "$defs": {}, "required": [], "x": None, "é\u2028": "\x01\x1f\x7f\t/<end_of_turn>"})
EMPTY = ("now", "The time", {"type": "object", "properties": {}})
TOOL_SETS = [[], [WEATHER], [WEATHER, ODD, EMPTY]]

user, assistant = (lambda text: ("user", text, None, [])), (lambda text: ("assistant", text, None, []))
system = lambda text: ("system", text, None, [])
call = lambda calls, text="": ("assistant", text, None, calls)
result = lambda call_id, text: ("tool", text, call_id, [])
PARIS = ("abcdef123", "get_weather", {"city": "Paris", "days": 2})
ROME = ("ABCDEF789", "get_weather", {"city": "Roma \"è\"\n<|im_end|>", "x": [1.5, None, True, {}, []]})
NOW = ("123456789", "now", {})
CONVERSATIONS = [
    (1, [user("Hello")]),
    (1, [system("Be brief. "), user(" Weather in Paris? ")]),
    (2, [system(""), user("x<|im_end|>[INST]<|eot_id|>")]),
    (1, [user("Weather?"), call([PARIS]), result("abcdef123", "{\"t\": 12.5, \"s\": \"é\\n\"}")]),
    (2, [system("S"), user("Weather?"), call([PARIS]), result("abcdef123", "sunny"), assistant(" It is sunny. "), user("And now?")]),
    (1, [user("Both?"), call([PARIS, ROME]), result("abcdef123", "12"), result("ABCDEF789", "20</tool_response><|im_end|>"),
         assistant("12 and 20"), user("Both?")]),
    (1, [user("Go"), call([NOW], "I look."), result("123456789", "noon"), call([ROME]), result("ABCDEF789", "20")]),
    (1, [user("Go"), call([NOW])]),
    (2, [user("a"), assistant("b"), user("c"), call([NOW]), result("123456789", ""), assistant("d"), user("e")]),
    (0, [system("S"), user("Go"), call([NOW]), result("123456789", "noon"), assistant("Noon."), user("Thanks")]),  # tools no more offered
    (1, [user("Go"), ("assistant", "<think>\nHm.\n</think>\n\nFine", None, []), user("And?")]),
    (1, [system("only")]),
    (1, [user("a"), user("b")]),
]
PUBLISHED = [("Qwen2.5-Instruct", "chatml", "qwen2", "Qwen-Qwen2.5-7B-Instruct"),
             ("QwQ", "chatml", "qwen2", "Qwen-QwQ-32B"),
             ("Hermes 3", "chatml", "smollm", "NousResearch-Hermes-3-Llama-3.1-8B-tool_use"),
             ("Llama 3.1", "llama3", "llama-bpe", "meta-llama-Llama-3.1-8B-Instruct"),
             ("Llama 3.2", "llama3", "llama-bpe", "meta-llama-Llama-3.2-3B-Instruct"),
             ("Mistral Nemo", "mistral", "spm-inst", "mistralai-Mistral-Nemo-Instruct-2407")]
# Mistral 7B v0.3 differs from Nemo in spaces and in trimming answers.
V03 = [('"[AVAILABLE_TOOLS]["', '"[AVAILABLE_TOOLS] ["'), ('"[INST]"', '"[INST] "'), ('"[TOOL_CALLS]["', '"[TOOL_CALLS] ["'),
       ('message["content"] + eos_token', '" " + message["content"]|trim + eos_token'), ("'[TOOL_RESULTS]{", "'[TOOL_RESULTS] {")]


def render(template, messages, tools, bos, eos):
    def raise_exception(text):
        raise Refused(text)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = lambda x, indent=None: json.dumps(x, ensure_ascii=False, indent=indent)
    environment.globals["raise_exception"] = raise_exception
    given = {"tools": tools} if tools else {}
    return environment.from_string(template).render(messages=messages, add_generation_prompt=True, bos_token=bos, eos_token=eos,
                                                    enable_thinking=True, **given)


def hidden(value):
    """Strings inside with stand-ins for what could spell a control token; brackets of JSON stay, and marks that a template looks for."""
    if isinstance(value, str):
        text = hide(value)
        for mark in ("<think>", "</think>"):
            text = text.replace(hide(mark), mark)
        return text
    if isinstance(value, dict):
        return {hidden(k): hidden(v) for k, v in value.items()}
    return [hidden(v) for v in value] if isinstance(value, list) else value


def ids_of(truth, template, tools, conversation):
    model = truth.model
    shown_tools = [{"type": "function", "function": {"name": n, "description": hidden(d), "parameters": hidden(p)}} for n, d, p in tools]
    messages = []
    for role, content, call_id, calls in conversation:
        message = {"role": role, "content": hidden(content)}
        if call_id:
            message["tool_call_id"] = call_id
        if calls:
            message["tool_calls"] = [{"id": i, "type": "function", "function": {"name": n, "arguments": hidden(a)}} for i, n, a in calls]
        messages.append(message)
    return ids_of_rendered(truth, render(template, messages, shown_tools, spell(model, model.bos), spell(model, model.eos)))


def write_inputs(out):
    out.write(struct.pack("<I", len(TOOL_SETS)))
    for tools in TOOL_SETS:
        out.write(struct.pack("<I", len(tools)))
        for name, description, parameters in tools:
            for text in (name, description, json.dumps(parameters)):
                write_text(out, text)
    out.write(struct.pack("<I", len(CONVERSATIONS)))
    for tools, messages in CONVERSATIONS:
        out.write(struct.pack("<II", tools, len(messages)))
        for role, content, call_id, calls in messages:
            for text in (role, content, call_id or ""):
                write_text(out, text)
            out.write(struct.pack("<I", len(calls)))
            for call_id, name, arguments in calls:
                for text in (call_id, name, json.dumps(arguments, indent=1)):
                    write_text(out, text)


def main():
    templates, models = sys.argv[1:3]
    published = lambda name: open(os.path.join(templates, name + ".jinja"), encoding="utf-8").read()
    cases = [(name, family, vocabulary, published(file)) for name, family, vocabulary, file in PUBLISHED]
    v03 = published("mistralai-Mistral-Nemo-Instruct-2407")
    for old, new in V03:
        assert old in v03
        v03 = v03.replace(old, new)
    cases += [("Mistral 0.3", "mistral", vocabulary, v03) for vocabulary in ("spm-inst", "spm-mistral")]
    paths = {v: os.path.join(DATA, v + ".tiny.gguf") for _, _, v, _ in cases}
    paths["qwen2.5-coder-0.5b"] = os.path.join(models, "qwen2.5-coder-0.5b.gguf")
    truths = {name: truth_of(Model(path)) for name, path in paths.items()}
    cases.append(("Qwen2.5-Coder", "chatml", "qwen2.5-coder-0.5b", truths["qwen2.5-coder-0.5b"].model.template))
    with open(os.path.join(DATA, "tools.bin"), "wb") as out:
        write_inputs(out)
        out.write(struct.pack("<I", len(cases)))
        for name, family, vocabulary, template in cases:
            for text in (name, family, vocabulary, template):
                write_text(out, text)
            for tools, conversation in CONVERSATIONS:
                try:
                    write_list(out, ids_of(truths[vocabulary], template, TOOL_SETS[tools], conversation))
                except Refused:
                    out.write(struct.pack("<I", SAME))


if __name__ == "__main__":
    main()
