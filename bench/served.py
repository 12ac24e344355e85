#!/usr/bin/env python3
"""What `oscar serve` does for those it serves, over HTTP.

served.py turns   PROGRAM MODEL      first token of the second turn after a first one of 6000 tokens
served.py shared  PROGRAM MODEL      pages of 32 sessions that begin with the same 4000 tokens
served.py edited  PROGRAM MODEL      tokens computed after 50 were taken from the middle of 8000
served.py session PROGRAM MODEL      a session of 8000 tokens to its file and back
served.py behind  PROGRAM MODEL      first token of a prompt of 50 tokens that comes 0.2 s after one of 8000, of the same user and of another
served.py streams PROGRAM MODEL [LLAMA_SERVER]
                                     16 streams at once, 1000 tokens in, 256 out; the other server in turns with ours

--repeats N: medians of N. Prompts are pieces of this project's documents as token ids, all different where nothing is to be shared.
"""
import argparse
import asyncio
import json
import os
import pathlib
import random
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "server"))
from serving import Server, ask, metrics, request  # noqa: E402

THREADS = "2"


def corpus(port):
    text = "".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md")))
    return ask(port, "POST", "/v1/tokenize", {"content": text[:150000]}).json()["tokens"]


def pieces(ids, n, count, seed):
    """Different beginnings: the tree of one run knows nothing of another's."""
    chance = random.Random(seed)
    return [[chance.randrange(100, 40000), *ids[(at := chance.randrange(len(ids) - n)) : at + n - 1]] for _ in range(count)]


def complete(port, ids, n, **more):
    body = {"prompt": ids, "max_tokens": n, "temperature": 0, "ignore_eos": True, **more}
    begun = time.monotonic()
    answer = asyncio.run(request(port, "POST", "/v1/completions", body))
    if answer.status != 200:
        sys.exit(f"{answer.status} {answer.body}")
    return answer, begun


def first_token(port, ids, **more):
    answer, begun = complete(port, ids, 1, stream=True, **more)
    return answer.times[0] - begun


def cached(answer):
    usage = answer.json()["usage"]
    return usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"]


class Served:
    def __init__(self, options, *more):
        self.folder = tempfile.TemporaryDirectory()
        self.program = options.program
        self.options = ["-m", options.model, "-t", THREADS, "--dir", self.folder.name + "/sessions", *more]
        self.restart()

    def restart(self):
        self.server = Server(self.program, self.options, self.folder.name + "/log")
        self.process = self.server.process
        self.port = self.server.port

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.server.stop()
        self.folder.cleanup()


def turns(options):
    firsts, seconds = [], []
    with Served(options) as s:
        ids = corpus(s.port)
        for i, prompt in enumerate(pieces(ids, 6000, options.repeats, 11)):
            text = ask(s.port, "POST", "/v1/detokenize", {"tokens": prompt}).json()["content"]
            messages = [{"role": "user", "content": text}]
            first, seen = chat_turn(s.port, messages, f"turns.{i}")
            messages += [{"role": "assistant", "content": seen["text"]}, {"role": "user", "content": "And in one sentence?"}]
            second, then = chat_turn(s.port, messages, f"turns.{i}")
            firsts.append(first)
            seconds.append(second)
            known = seen["prompt"] + seen["generated"] - 1  # the newest token was chosen and never run
            print(f"  first {first:.3f} s for {seen['prompt']} tokens; second {second:.4f} s for {then['prompt']}, {then['cached']} of them cached, "
                  f"{known - then['cached']} recomputed")
    a, b = statistics.median(firsts), statistics.median(seconds)
    print(f"to the first token: {a:.3f} s, then {b:.4f} s: {a / b:.0f} times faster")


def chat_turn(port, messages, session):
    """(seconds to the first token, what was said and counted)."""
    body = {"messages": messages, "max_tokens": 24, "temperature": 0, "session": session, "stream": True, "stream_options": {"include_usage": True}}
    begun = time.monotonic()
    answer = asyncio.run(request(port, "POST", "/v1/chat/completions", body))
    text, first, usage = "", None, {}
    for event, at in zip(answer.events, answer.times):
        part = {} if event == b"[DONE]" else json.loads(event)
        said = "".join(c["delta"].get("content") or "" for c in part.get("choices", []))
        first = first or (at if said else None)
        text += said
        usage = part.get("usage") or usage
    return first - begun, {"text": text, "prompt": usage["prompt_tokens"], "generated": usage["completion_tokens"],
                           "cached": usage["prompt_tokens_details"]["cached_tokens"]}


def held(port):
    m = metrics(port)
    return {"bytes": m['cache_held_bytes{tier="device"}'], "exact": m['cache_pages{form="exact"}'], "coded": m['cache_pages{form="coded"}']}


def shared(options):
    """A page that sessions share counts once."""
    with Served(options, "--kv-memory", "512M") as s:
        ids = corpus(s.port)
        beginning = pieces(ids, 4096, 1, 21)[0]
        complete(s.port, beginning + ids[:40], 16, session="s0")
        one = held(s.port)
        for i in range(1, 32):
            complete(s.port, beginning + ids[50 * i : 50 * i + 40], 16, session=f"s{i}")
            if i == 1:
                two = held(s.port)
        all32 = held(s.port)
        own = two["bytes"] - one["bytes"]
        print(f"one session {one}\ntwo {two}\n32 {all32}")
        print(f"32 sessions: {all32['bytes'] / 2**20:.1f} MiB; the first and 31 times what the second added: {(one['bytes'] + 31 * own) / 2**20:.1f} MiB; "
              f"32 times the first: {32 * one['bytes'] / 2**20:.1f} MiB")


def edited(options):
    """50 tokens are taken out at the beginning of a page (4096) and inside one (4000)."""
    for at in (4096, 4000):
        more, wholes, changes = [], [], []
        with Served(options, "--prefix-reuse", "refill", "-c", "8192") as s:
            ids = corpus(s.port)
            for prompt in pieces(ids, 8000, options.repeats, 31):
                short = prompt[:at] + prompt[at + 50 :]
                same = next(i for i, (a, b) in enumerate(zip(prompt, short)) if a != b)  # the edit, or later by chance
                wholes.append(first_token(s.port, prompt))
                before = refilled(s.port)
                answer, begun = complete(s.port, short, 1)
                changes.append(time.monotonic() - begun)
                n, known = cached(answer)
                more.append(same - known)
                print(f"  {n} tokens, the first {same} as before, {known} cached: {n - known} computed, {more[-1]} of them before the edit ({refilled(s.port) - before:.0f} refilled); "
                      f"{wholes[-1]:.2f} s before the edit, {changes[-1]:.2f} s after it")
        print(f"50 tokens out at {at}: {statistics.median(more)} computed beside those that follow; {statistics.median(wholes):.2f} s, then {statistics.median(changes):.2f} s")


def refilled(port):
    return metrics(port)['prompt_tokens_total{source="refilled"}']


def session(options):
    saves, loads = [], []
    with Served(options) as s:
        ids = corpus(s.port)
        for i, prompt in enumerate(pieces(ids, 8000, options.repeats, 41)):
            whole = first_token(s.port, prompt, session=f"session.{i}")
            begun = time.monotonic()
            # The service may have begun to write it by itself: then this waits for it.
            saved = ask(s.port, "POST", f"/v1/sessions/session.{i}/save").json()
            saves.append(time.monotonic() - begun)
            s.server.stop()
            s.restart()
            begun = time.monotonic()
            loaded = ask(s.port, "POST", f"/v1/sessions/session.{i}/load").json()
            loads.append(time.monotonic() - begun)
            print(f"  computed in {whole:.2f} s; {saved['tokens']} tokens, {saved['bytes']['disk'] / 2**20:.2f} MiB; saved in {saves[-1] * 1e3:.1f} ms, "
                  f"loaded in {loads[-1] * 1e3:.1f} ms: {loaded['tier']}")
    print(f"save {statistics.median(saves) * 1e3:.1f} ms, load {statistics.median(loads) * 1e3:.1f} ms")


async def run_behind(port, long, short, user):
    async def one(ids, who, wait):
        await asyncio.sleep(wait)
        begun = time.monotonic()
        body = {"prompt": ids, "max_tokens": 1, "temperature": 0, "ignore_eos": True, "stream": True, "user": who}
        answer = await request(port, "POST", "/v1/completions", body)
        return answer.times[0] - begun

    return await asyncio.gather(one(long, "a", 0), one(short, user, 0.2))


def behind(options):
    with Served(options, "-c", "8192") as s:
        ids = corpus(s.port)
        for begin, user in ((100, "a"), (200, "b")):
            times = [asyncio.run(run_behind(s.port, *pieces(ids, 8000, 1, seed), *pieces(ids, 50, 1, seed + 50), user))
                     for seed in range(begin, begin + options.repeats)]
            long, short = (statistics.median(t) for t in zip(*times))
            print(f"{'the same user' if user == 'a' else 'another user'}: first token of 50 tokens after {short:.2f} s, of 8000 after {long:.1f} s")


async def run_streams(port, prompts, answer_tokens):
    """(tokens a second of all, seconds to the first token of each, the longest wait between tokens)."""
    begun = time.monotonic()

    async def one(ids):
        body = {"prompt": ids, "max_tokens": answer_tokens, "temperature": 0, "ignore_eos": True, "stream": True}
        answer = await request(port, "POST", "/v1/completions", body)
        if answer.status != 200:
            sys.exit(f"{answer.status} {answer.body}")
        return answer.times

    times = await asyncio.gather(*(one(p) for p in prompts))
    end = max(t[-1] for t in times)
    gaps = [b - a for t in times for a, b in zip(t, t[1:])]
    return len(prompts) * answer_tokens / (end - begun), [t[0] - begun for t in times], max(gaps)


def cpu_seconds(server):
    """Of the program, in user and system: what says something on a machine that others use, too."""
    with open(f"/proc/{server.process.pid}/stat", encoding="ascii") as file:
        fields = file.read().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Llama:
    def __init__(self, options, count):
        with open(os.devnull, "wb") as nowhere:
            self.process = subprocess.Popen([options.llama_server, "-m", options.model, "-np", str(count), "-c", str(2048 * count), "-t", THREADS, "-tb",
                                             THREADS, "--no-webui", "--no-cache-prompt", "-cram", "0", "--port", "18099"], stdout=nowhere, stderr=nowhere)
        self.port = 18099
        while True:
            try:
                urllib.request.urlopen("http://127.0.0.1:18099/health")
                return
            except OSError:
                time.sleep(0.1)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait()


def streams(options):
    with Served(options) as s:
        ids = corpus(s.port)
    makers = {"oscar": lambda: Served(options, "--kv-memory", "1G", "--parallel", str(options.streams))}
    if options.llama_server:
        makers["llama.cpp"] = lambda: Llama(options, options.streams)
    rates, firsts = {k: [] for k in makers}, {k: [] for k in makers}
    for i in range(options.repeats):
        for name, make in makers.items():
            with make() as server:
                asyncio.run(run_streams(server.port, pieces(ids, 100, 2, 50), 8))  # warm
                before = cpu_seconds(server)
                rate, first, gap = asyncio.run(run_streams(server.port, pieces(ids, options.prompt, options.streams, 100 + i), options.answer))
                rates[name].append(rate)
                firsts[name] += first
                print(f"  {name}: {rate:.1f} tokens/s, first token after {statistics.median(first):.2f} s (median) {max(first):.2f} s (most), longest wait {gap:.2f} s; "
                      f"{cpu_seconds(server) - before:.0f} s of CPU, load {os.getloadavg()[0]:.1f}", flush=True)
    for name, rate in rates.items():
        print(f"{name}: {statistics.median(rate):.1f} tokens/s, first token {statistics.median(firsts[name]):.2f} s, mean {statistics.mean(firsts[name]):.2f} s")
    if options.llama_server:
        print(f"ratio {statistics.median(rates['oscar']) / statistics.median(rates['llama.cpp']):.2f}")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", choices=["turns", "shared", "edited", "session", "behind", "streams"])
    p.add_argument("program")
    p.add_argument("model")
    p.add_argument("llama_server", nargs="?")
    p.add_argument("--repeats", type=int, default=3)
    p.add_argument("--streams", type=int, default=16)
    p.add_argument("--prompt", type=int, default=1000)
    p.add_argument("--answer", type=int, default=256)
    options = p.parse_args()
    print(f"load {os.getloadavg()[0]:.1f}")
    {"turns": turns, "shared": shared, "edited": edited, "session": session, "behind": behind, "streams": streams}[options.what](options)
    print(f"load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
