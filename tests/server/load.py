#!/usr/bin/env python3
"""Many clients at once against `oscar serve`: nobody's answer may differ from what it is alone.

load.py PROGRAM MODEL [--seconds 20] [--connections 16] [--longest 700] [--kv-memory 24M] [--host-memory 8M] ...

Requests are greedy. Each is first asked of an idle server with room and without reuse, one after the other; then a server with
little room, which has to evict, preempt and move sessions to host memory and files, is asked the same by many at a time. Some
read as fast as they can, some slowly; some leave before the end, some before the beginning; some keep sessions, fork and delete
them; some ask for what does not exist. The run fails if an answer differs, if a status is not the one that docs/serving.md
promises for the request, if a request takes longer than --patience, if the server's memory goes on growing, or if anything
is left when all have gone. Exit status 77 (skipped) where there is no model.
"""
import argparse
import asyncio
import collections
import json
import os
import random
import sys
import tempfile
import time

from serving import Server, metrics, request, skip_without, spoken

BEGINNING = 320  # tokens that some prompts share
LONG = "OSCAR_TEST_LONG" in os.environ  # ./test long: a minute, and what each prompt costs alone


def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("program")
    p.add_argument("model")
    p.add_argument("--seconds", type=float, default=60 if LONG else 5)
    p.add_argument("--connections", type=int, default=12)
    p.add_argument("--prompts", type=int, default=8 if LONG else 5, help="different ones")
    p.add_argument("--longest", type=int, default=600 if LONG else 400, help="tokens of a prompt")
    p.add_argument("--answer", type=int, default=24, help="most tokens of an answer")
    p.add_argument("--long", type=int, default=3, help="how many of the prompts have long answers, which outgrow the room that they began in")
    p.add_argument("--long-answer", type=int, default=260 if LONG else 140, help="their tokens")
    p.add_argument("--kv-memory", default="24M")
    p.add_argument("--host-memory", default="8M")
    p.add_argument("--context", type=int, default=2048)
    p.add_argument("--patience", type=float, default=300, help="seconds for a request")
    p.add_argument("--kv", default="int2")
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--option", action="append", default=[], help="a further option of the server that is loaded, such as --option=--speculate=lookup")
    return p.parse_args()


class Plan:
    """What is asked, and what the answers are."""

    def __init__(self, options, corpus):
        self.random = random.Random(options.seed)
        self.bodies = []
        for i in range(options.prompts):
            # From 20 tokens on, in equal factors.
            n = round(20 * (options.longest / 20) ** (i / max(1, options.prompts - 1)))
            at = self.random.randrange(len(corpus) - n)
            self.bodies.append(self.body(corpus[at : at + n], options))
        beginning = corpus[: min(BEGINNING, options.longest // 2)]
        for i in range(4):
            at = self.random.randrange(len(corpus) - 100)
            self.bodies.append(self.body(beginning + corpus[at : at + 30 + 20 * i], options))
        for i in range(options.long):
            at = self.random.randrange(len(corpus) - 100)
            self.bodies.append({"prompt": corpus[at : at + 20 + i], "max_tokens": options.long_answer - 10 * (i % 3), "temperature": 0, "ignore_eos": True})
        self.talks = [self.talk(i) for i in range(4)]
        self.answers = []
        self.said = []

    def body(self, ids, options):
        n = self.random.randrange(2, options.answer + 1)
        return {"prompt": ids, "max_tokens": n, "temperature": 0, "ignore_eos": self.random.random() < 0.5}

    def talk(self, i):
        """What a user says in a session: first, then, and then in a fork of it."""
        things = ["the sea", "a letter to a friend", "how bread is made", "the history of bridges"]
        first = f"Tell me about {things[i]}. " + " ".join(self.random.choice(things) for _ in range(10 * i))
        return [first, "Say more, please.", "Say that in one sentence."]


def chat(messages, session):
    return {"messages": messages, "max_tokens": 12, "temperature": 0, "session": session}


class Failure(Exception):
    pass


def expect(answer, status, what):
    if answer.status != status:
        raise Failure(f"{what}: status {answer.status}, expected {status}: {answer.body[:300]}")
    return answer


async def hold_talk(port, talk, name, between):
    """A session from its first turn to its end; all that was answered. `between` turns the client may do something else."""
    messages = [{"role": "user", "content": talk[0]}]
    answers = []

    async def turn(session):
        answer = expect(await request(port, "POST", "/v1/chat/completions", chat(messages, session)), 200, f"a turn of {session}")
        answers.append(spoken(answer)[0])
        messages.append({"role": "assistant", "content": answers[-1][0]})

    await turn(name)
    before = list(messages)
    await between(name)
    messages.append({"role": "user", "content": talk[1]})
    expect(await request(port, "POST", f"/v1/sessions/{name}/fork", {"id": name + ".fork"}), 201, "a fork")
    await turn(name)
    await between(name)
    messages[:] = before + [{"role": "user", "content": talk[2]}]
    await turn(name + ".fork")
    for end in ("", ".fork"):
        expect(await request(port, "DELETE", f"/v1/sessions/{name}{end}"), 200, "the end of a session")
    return answers


async def nothing(_name):
    pass


async def find_answers(port, plan):
    for body in plan.bodies:
        plan.answers.append(spoken(expect(await request(port, "POST", "/v1/completions", body), 200, "a request alone"))[0])
    for i, talk in enumerate(plan.talks):
        plan.said.append(await hold_talk(port, talk, f"alone.{i}", nothing))


class Load:
    def __init__(self, server, plan, options):
        self.server = server
        self.port = server.port
        self.plan = plan
        self.options = options
        self.random = random.Random(options.seed + 1)
        self.count = collections.Counter()
        self.compared = 0  # answers, each the same as alone
        self.failures = []
        self.names = 0
        self.rss = []
        self.end = 0.0

    # Each of these is what a client does.

    def check(self, got, i):
        if got != self.plan.answers[i]:
            raise Failure(f"prompt {i} of {len(self.plan.bodies[i]['prompt'])} tokens: {got!r}, alone {self.plan.answers[i]!r}")
        self.compared += 1

    async def complete(self):
        i = self.random.randrange(len(self.plan.bodies))
        n = self.random.choice([1, 1, 1, 3])
        body = dict(self.plan.bodies[i], stream=self.random.random() < 0.5, n=n)
        answers = spoken(expect(await request(self.port, "POST", "/v1/completions", body), 200, "a completion"))
        if len(answers) != n:
            raise Failure(f"{len(answers)} answers, {n} asked for")
        for answer in answers:
            self.check(answer, i)

    async def read_slowly(self):
        i = self.random.randrange(len(self.plan.bodies))
        body = dict(self.plan.bodies[i], stream=True)
        answer = await request(self.port, "POST", "/v1/completions", body, pause=0.2)
        self.check(spoken(expect(answer, 200, "a slow reader"))[0], i)

    async def leave(self):
        body = dict(self.random.choice(self.plan.bodies), stream=True, max_tokens=500, ignore_eos=True)
        await request(self.port, "POST", "/v1/completions", body, leave_after=self.random.randrange(1, 20))

    async def vanish(self):
        body = dict(self.random.choice(self.plan.bodies), stream=self.random.random() < 0.5, max_tokens=500, ignore_eos=True)
        await request(self.port, "POST", "/v1/completions", body, leave_after=0, pause=self.random.random())

    async def talk(self):
        i = self.random.randrange(len(self.plan.talks))
        self.names += 1
        said = await hold_talk(self.port, self.plan.talks[i], f"talk.{self.names}", self.between)
        if said != self.plan.said[i]:
            raise Failure(f"talk {i}: {said!r}, alone {self.plan.said[i]!r}")
        self.compared += len(said)

    async def between(self, name):
        """A session waits for its user; meanwhile it may be written or brought back, as somebody likes."""
        what = self.random.choice(["", "", "save", "load"])
        if what:
            expect(await request(self.port, "POST", f"/v1/sessions/{name}/{what}"), 200, f"to {what} a session")
        await asyncio.sleep(self.random.random() * 2)

    async def ask_wrongly(self):
        method, path, body, status = self.random.choice([
            ("POST", "/v1/completions", {"prompt": "x", "max_tokens": -1}, 400),
            ("POST", "/v1/completions", {"prompt": "x", "unheard_of": 1}, 400),
            ("POST", "/v1/completions", {"prompt": [1] * (self.options.context + 1)}, 400),
            ("POST", "/v1/chat/completions", {"messages": "x"}, 400),
            ("POST", "/v1/chat/completions", {"model": "another", "messages": []}, 404),
            ("GET", "/v1/sessions/none", None, 404),
            ("DELETE", "/v1/sessions/none", None, 404),
            ("POST", "/v1/sessions/none/save", None, 404),
            ("PUT", "/v1/models", None, 405),
            ("GET", "/nowhere", None, 404),
        ])
        expect(await request(self.port, method, path, body), status, f"{method} {path}")

    async def look(self):
        path = self.random.choice(["/metrics", "/v1/cache", "/v1/sessions", "/v1/models", "/health"])
        expect(await request(self.port, "GET", path), 200, path)

    async def client(self):
        kinds = [self.complete, self.read_slowly, self.leave, self.vanish, self.talk, self.ask_wrongly, self.look]
        while time.monotonic() < self.end:
            kind = self.random.choices(kinds, weights=[50, 5, 8, 6, 20, 5, 6])[0]
            try:
                await asyncio.wait_for(kind(), self.options.patience)
                self.count[kind.__name__] += 1
            except Exception as error:  # whatever it was, the run goes on and tells of it at the end
                self.failures.append(f"{kind.__name__}: {type(error).__name__}: {error}")
                print(self.failures[-1], flush=True)
                if self.server.process.poll() is not None:
                    return

    async def watch_memory(self):
        while True:
            await asyncio.sleep(1)
            self.rss.append(self.server.rss_kb())

    async def run(self):
        self.end = time.monotonic() + self.options.seconds
        watcher = asyncio.create_task(self.watch_memory())
        await asyncio.gather(*(self.client() for _ in range(self.options.connections)))
        watcher.cancel()


def check_rest(load, port):
    """Everybody has gone: nothing runs, waits, or is kept for them."""
    deadline = time.monotonic() + 30
    while True:
        m = metrics(port)
        left = {k: m[k] for k in ("requests_running", "requests_waiting", 'sessions{tier="device"}', 'sessions{tier="host"}', 'sessions{tier="disk"}')
                if m[k]}
        if not left:
            return m
        if time.monotonic() > deadline:
            load.failures.append(f"left behind: {left}")
            return m
        time.sleep(0.1)


def check_memory(load):
    """Flat: what the second half of the run needed at most is what the first half had needed, but for a tenth."""
    half = len(load.rss) // 2
    if half < 30:
        return
    before, after = max(load.rss[:half]), max(load.rss[half:])
    print(f"memory: at most {before >> 10} MiB in the first half, {after >> 10} MiB in the second, {load.rss[-1] >> 10} MiB at the end")
    if after > before * 1.1:
        load.failures.append(f"memory grows: {before} KiB, then {after} KiB")


def read_corpus(port):
    text = ""
    docs = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", "docs")
    for name in sorted(os.listdir(docs)):
        if name.endswith(".md"):
            with open(os.path.join(docs, name), encoding="utf-8") as file:
                text += file.read()
    return asyncio.run(request(port, "POST", "/v1/tokenize", {"content": text[:80000]})).json()["tokens"]


def main():
    options = arguments()
    skip_without(options.model)
    common = ["-m", options.model, "-t", str(options.threads), "--kv", options.kv, "-c", str(options.context)]
    with tempfile.TemporaryDirectory() as folder:
        log = os.path.join(folder, "log")
        server = Server(options.program, [*common, "--prefix-reuse", "off", "--dir", "none"], log)
        plan = Plan(options, read_corpus(server.port))
        asyncio.run(find_answers(server.port, plan))
        if server.stop() != 0:
            sys.exit("the idle server has not stopped well")
        server = Server(options.program, [*common, "--prefix-reuse", "exact", "--dir", os.path.join(folder, "sessions"), "--kv-memory", options.kv_memory,
                                          "--host-memory", options.host_memory, *options.option], log)
        load = Load(server, plan, options)
        begun = time.monotonic()
        asyncio.run(load.run())
        seconds = time.monotonic() - begun
        if server.process.poll() is None:
            m = check_rest(load, server.port)
            check_memory(load)
            names = ("requests_total", "generated_tokens_total", "prompt_tokens_total", "cache_evictions_total", "preemptions_total", "preempted_returned_total",
                     "sessions_brought_back_total", "answers_total")
            print(json.dumps({k: int(v) for k, v in m.items() if k.startswith(names) and v}))
        status = server.stop() if server.process.poll() is None else server.process.returncode
        if status != 0:
            load.failures.append(f"the server ended with status {status}: {server.text()[-2000:]}")
        print(f"{seconds:.0f} s, {options.connections} connections: {dict(load.count)}; {load.compared} answers were compared")
        if load.failures:
            sys.exit(f"{len(load.failures)} failures, the first: {load.failures[0]}")


if __name__ == "__main__":
    main()
