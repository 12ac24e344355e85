#!/usr/bin/env python3
"""What is left of sessions when the server ends in the wrong way, or has nowhere to write.

test_crash.py PROGRAM MODEL [--kills 8]

Killed in the middle of writing, again and again: every session whose save had been answered is whole, no half file is taken for one,
and what was being written is gone after the next start. A full disk: an error that says so, the session goes on from memory and is
saved once there is room. SIGTERM during an answer: the session is in its file with what was said. SIGHUP: the access log is opened
again. Exit status 77 (skipped) where there is no model.
"""
import argparse
import asyncio
import contextlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time

from serving import Server, ask, open_request, read_head, skip_without, spoken


def chat(session, messages, **more):
    return {"session": session, "messages": messages, "temperature": 0, **more}


def user(text):
    return {"role": "user", "content": text}


def check(what, condition, *seen):
    if not condition:
        sys.exit(f"{what}: {seen}")


class Room:
    """A program, a model, a folder of sessions."""

    def __init__(self, options, folder):
        self.program = options.program
        self.model = options.model
        self.folder = os.path.join(folder, "sessions")
        self.log = os.path.join(folder, "log")

    def serve(self, limits=None, more=()):
        return Server(self.program, ["-m", self.model, "-c", "2048", "--dir", self.folder, *more], self.log, limits)

    def files(self):
        return sorted(os.listdir(self.folder)) if os.path.isdir(self.folder) else []

    def verify(self, name):
        """All checksums of a session, by the program's own command."""
        done = subprocess.run([self.program, "session", "info", name, "--dir", self.folder], capture_output=True, text=True, check=False)
        check(f"session {name} is not whole", done.returncode == 0, done.stdout, done.stderr)


# ---- killed ----


def save_without_end(port, names, saved, stop):
    """New turns of sessions, each saved; `saved` has the tokens that a save was answered for."""
    turn = 0
    with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, IndexError, ValueError, OSError):
        while not stop.is_set():
            turn += 1
            name = names[turn % len(names)]
            # Another beginning each time: the file is written anew as a whole.
            ask(port, "POST", "/v1/chat/completions", chat(name, [user(f"{turn} " + "word " * 150)], max_tokens=1))
            answer = ask(port, "POST", f"/v1/sessions/{name}/save")
            if answer.status == 200 and answer.json()["on_disk"]:
                saved[name] = answer.json()["tokens"]


def kill_again_and_again(room, kills):
    chance = random.Random(5)
    names = [f"s{i}" for i in range(4)]
    saved = {}
    halves = 0
    server = room.serve()
    for _ in range(kills):
        stop = threading.Event()
        saver = threading.Thread(target=save_without_end, args=(server.port, names, saved, stop))
        saver.start()
        time.sleep(0.3)
        # At a random moment; the file that is being written is waited for most times, for a little while.
        until = time.monotonic() + chance.random() * 0.5
        wait = chance.random() < 0.8
        while time.monotonic() < until + wait * 2:
            if wait and time.monotonic() > until and any(f.endswith(".tmp") for f in room.files()):
                break
        server.kill()
        stop.set()
        saver.join()
        halves += sum(f.endswith(".tmp") for f in room.files())
        for name in saved:
            room.verify(name)
        listed = subprocess.run([room.program, "session", "list", "--dir", room.folder], capture_output=True, text=True, check=True).stdout
        check("a half file is listed", ".tmp" not in listed, listed)
        server = room.serve()
        check("what killed writers left is gone", not any(f.endswith(".tmp") for f in room.files()), room.files())
        there = {x["id"]: x for x in ask(server.port, "GET", "/v1/sessions").json()["data"]}
        for name in saved:
            check(f"session {name} was saved", name in there and there[name]["tokens"] > 0, there)
        check("no session that nobody made", set(there) <= set(names), there)
    check("one of the sessions goes on", saved, saved)
    answer = ask(server.port, "POST", "/v1/chat/completions", chat(next(iter(saved)), [user("word")], max_tokens=2))
    check("after all this it answers", answer.status == 200, answer.body)
    check("the server stops", server.stop() == 0)
    print(f"{kills} kills, {halves} of them during a write; sessions saved: {saved}")
    for name in list(room.files()):
        os.unlink(os.path.join(room.folder, name))


# ---- a full disk ----


@contextlib.contextmanager
def small_disk(room):
    """A file system of 2 MiB where one may be mounted, else a limit on the size of files: (limits of the server, what makes room)."""
    os.makedirs(room.folder, exist_ok=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", room.folder], capture_output=True, check=False).returncode == 0
    if mounted:
        try:
            yield None, lambda: subprocess.run(["mount", "-o", "remount,size=64m", room.folder], check=True)
        finally:
            subprocess.run(["umount", room.folder], check=True)
        return

    def limits():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2 << 20, resource.RLIM_INFINITY))

    yield limits, None


def fill_the_disk(room):
    long = [user("A long text begins. " + "It goes on and on. " * 120)]
    with small_disk(room) as (limits, make_room):
        server = room.serve(limits)
        answer = ask(server.port, "POST", "/v1/chat/completions", chat("long", long, max_tokens=8))
        check("an answer on a full disk", answer.status == 200, answer.body)
        said = spoken(answer)[0][0]
        answer = ask(server.port, "POST", "/v1/sessions/long/save")
        check("a save without room is an error that says so", answer.status == 500, answer.status, answer.body)
        check("the error names the reason", any(w in answer.json()["error"]["message"] for w in ("No space", "too large")), answer.body)
        check("no half file", not [f for f in room.files() if f.startswith("long")], room.files())
        more = [*long, {"role": "assistant", "content": said}, user("Go on.")]
        answer = ask(server.port, "POST", "/v1/chat/completions", chat("long", more, max_tokens=8))
        check("the service goes on", answer.status == 200, answer.body)
        check("the session is there still", answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"] > 400, answer.body)
        answer = ask(server.port, "POST", "/v1/chat/completions", chat("short", [user("Hi")], max_tokens=2))
        answer = ask(server.port, "POST", "/v1/sessions/short/save")
        check("what fits is saved", answer.status == (200 if make_room else answer.status), answer.status, answer.body)
        if make_room:
            make_room()
            answer = ask(server.port, "POST", "/v1/sessions/long/save")
            check("with room it is saved", answer.status == 200 and answer.json()["on_disk"], answer.body)
            room.verify("long")
        check("the server stops", server.stop() == 0)
    print("a full disk:", "a small file system" if make_room else "a limit on files")


# ---- stopped ----


async def stop_during_an_answer(server, room):
    body = chat("stopped", [user("Count for as long as you can.")], max_tokens=1500, ignore_eos=True, stream=True)
    reader, writer = await open_request(server.port, "POST", "/v1/chat/completions", body)
    status, _ = await read_head(reader)
    check("a stream", status == 200, status)
    got = b""
    while got.count(b"data: ") < 20:
        got += await reader.read(4096)
    server.process.send_signal(signal.SIGTERM)
    got += await reader.read()
    writer.close()
    events = [line[6:] for line in got.splitlines() if line.startswith(b"data: ")]
    check("the stream ends with an error or a reason", any(b'"error"' in e or b'"finish_reason":"' in e for e in events[-2:]), events[-3:])
    check("the server stops", server.process.wait(timeout=60) == 0)
    room.verify("stopped")


def stop_and_go_on(room):
    server = room.serve()
    asyncio.run(stop_during_an_answer(server, room))
    access = room.log + ".access"
    server = room.serve(more=("--access-log", "json", "--access-log-file", access))
    found = ask(server.port, "GET", "/v1/sessions/stopped").json()
    while os.path.getsize(access) == 0:  # its line comes after the answer
        time.sleep(0.02)
    os.rename(access, access + ".1")
    server.process.send_signal(signal.SIGHUP)
    while not os.path.exists(access):
        time.sleep(0.02)
    check("the session is found again", found["tier"] == "disk" and found["tokens"] > 20, found)
    roles = [m["role"] for m in found["messages"]]
    check("with what there was of the answer", roles == ["user", "assistant"] and len(found["messages"][1]["content"]) > 20, found)
    answer = ask(server.port, "POST", "/v1/chat/completions", chat("stopped", [user("Count for as long as you can.")], max_tokens=2))
    check("and goes on", answer.status == 200 and answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"] > 0, answer.body)
    check("the server stops", server.stop() == 0)
    with open(access, encoding="utf-8") as file:
        lines = [json.loads(line) for line in file]
    check("the access log after SIGHUP has the request", [line["status"] for line in lines] == [200], lines)
    check("and its numbers", lines[0]["generated_tokens"] == 2 and lines[0]["cached_tokens"] > 0 and 0 < lines[0]["first_token_ms"] <= lines[0]["total_ms"], lines)
    print("stopped during an answer:", json.dumps({k: found[k] for k in ("tier", "tokens", "bytes")}))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("program")
    p.add_argument("model")
    p.add_argument("--kills", type=int, default=8)
    options = p.parse_args()
    skip_without(options.model)
    with tempfile.TemporaryDirectory() as folder:
        room = Room(options, folder)
        kill_again_and_again(room, options.kills)
        fill_the_disk(room)
        stop_and_go_on(room)


if __name__ == "__main__":
    main()
