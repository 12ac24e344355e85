#!/usr/bin/env python3
"""Writes what `transformers` in float32 computes for a GGUF model: the truth of tests/model/test_logits.c.

    python tools/make_logit_vectors.py MODEL.gguf NAME tests/model/data

needs torch, transformers and gguf. For each prompt: its ids, 64 greedily decoded ids with the gap between the two best logits at each
step, and the logits after the prompt at the 32 best and 32 evenly spread ids. "bf16_rms" is the root mean square distance over the whole
vocabulary, of the same model run in bfloat16 by the same library: the tolerance of the test, since our products round activations about as much.
"""
import json
import os
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

PROMPTS = [
    "The lighthouse keeper climbed the stairs every evening, and",
    "def fibonacci(n):\n    \"\"\"Return the n-th Fibonacci number.\"\"\"\n",
    "Question: A train travels 120 km in 1.5 hours. What is its average speed?\nAnswer:",
    "<|im_start|>user\nName three uses of copper.<|im_end|>\n<|im_start|>assistant\n",
    "Die wichtigsten Zutaten für ein gutes Brot sind",
    "Here is a list of planets in order of distance from the sun:\n1. Mercury\n2.",
    "{\"name\": \"Ada\", \"born\": 1815, \"field\": \"mathematics\"}\n{\"name\": \"Alan\", \"born\": 1912,",
    "#include <stdio.h>\n\nint main(void) {\n    for (int i = 0; i < 10; i++) {\n",
]
STEPS = 64


def run(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0, -1].float()


def greedy(model, ids):
    out, gaps, past, step = [], [], None, torch.tensor([ids])
    with torch.no_grad():
        for _ in range(STEPS):
            r = model(step, past_key_values=past, use_cache=True)
            past, best = r.past_key_values, torch.topk(r.logits[0, -1].float(), 2)
            out.append(int(best.indices[0]))
            gaps.append(round(float(best.values[0] - best.values[1]), 4))
            step = best.indices[:1][None]
    return out, gaps


def main():
    path, name, folder = sys.argv[1:4]
    source, file = os.path.split(os.path.abspath(path))
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=file)
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=file, dtype=torch.float32).eval()
    entries = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        logits = run(model, ids)
        out, gaps = greedy(model, ids)
        spread = torch.linspace(0, logits.numel() - 1, 32).long()
        chosen = torch.cat([torch.topk(logits, 32).indices, spread])
        entries.append({"prompt": prompt, "ids": ids, "greedy": out, "gaps": gaps, "logit_ids": chosen.tolist(),
                        "logits": [round(float(logits[i]), 5) for i in chosen], "full": logits})
        print(prompt[:40], flush=True)
    model = model.to(torch.bfloat16)
    for e in entries:
        e["bf16_rms"] = round(float((run(model, e["ids"]) - e.pop("full")).pow(2).mean().sqrt()), 5)
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, name + ".logits.json"), "w") as f:
        json.dump({"model": name, "steps": STEPS, "prompts": entries}, f, ensure_ascii=True, separators=(",", ":"))
        f.write("\n")


main()
