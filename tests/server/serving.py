"""`oscar serve` as a child, and requests to it over plain sockets: what load.py and test_crash.py share."""
import asyncio
import json
import os
import signal
import subprocess
import sys
import time


class Server:
    """A server with its log in a file. `limits` are called in the child before the program."""

    def __init__(self, program, options, log, limits=None):
        self.log = log
        with open(log, "ab") as file:
            begin = file.tell()
            self.process = subprocess.Popen([program, "serve", "--port", "0", *options], stdin=subprocess.DEVNULL, stderr=file,
                                            preexec_fn=limits)
        self.port = None
        deadline = time.monotonic() + 300
        while self.port is None:
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the server has not started: {self.text(begin)}")
            for line in self.text(begin).splitlines():
                if line.startswith("listening at "):
                    self.port = int(line.split()[-1].rsplit(":", 1)[1].rstrip("/"))
            time.sleep(0.02)

    def text(self, begin=0):
        with open(self.log, encoding="utf-8", errors="replace") as file:
            file.seek(begin)
            return file.read()

    def rss_kb(self):
        with open(f"/proc/{self.process.pid}/status", encoding="ascii") as file:
            for line in file:
                if line.startswith("VmRSS:"):
                    return int(line.split()[1])
        return 0

    def kill(self):
        self.process.kill()
        self.process.wait()

    def stop(self, timeout=120):
        """In order; its exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=timeout)


class Answer:
    """Status and body; of a stream its events, with the time at which each came."""

    def __init__(self, status):
        self.status = status
        self.body = b""
        self.events = []
        self.times = []

    def json(self):
        return json.loads(self.body)


async def chunks(reader):
    """The pieces of a body in chunked transfer encoding."""
    while True:
        size = int((await reader.readline()).split(b";")[0], 16)
        data = await reader.readexactly(size + 2)
        if size == 0:
            return
        yield data[:-2]


async def open_request(port, method, path, body=None):
    data = b"" if body is None else json.dumps(body).encode()
    head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n"
    if body is not None:
        head += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n"
    # A small limit: a reader that is slow is then slow at the socket, too.
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 16)
    writer.write(head.encode() + b"\r\n" + data)
    await writer.drain()
    return reader, writer


async def read_head(reader):
    status = int((await reader.readline()).split()[1])
    headers = {}
    while (line := await reader.readline()) not in (b"\r\n", b""):
        name, value = line.decode().split(":", 1)
        headers[name.strip().lower()] = value.strip()
    return status, headers


async def request(port, method, path, body=None, leave_after=None, pause=0.0):
    """`leave_after` events the client is gone (0: without having read anything), and the answer is None; it sleeps for `pause` before each
    piece that it reads."""
    reader, writer = await open_request(port, method, path, body)
    try:
        if leave_after == 0:
            await asyncio.sleep(pause)
            writer.transport.abort()
            return None
        status, headers = await read_head(reader)
        answer = Answer(status)
        if headers.get("transfer-encoding") != "chunked":
            answer.body = await (reader.readexactly(int(headers["content-length"])) if "content-length" in headers else reader.read())
            return answer
        left = b""
        async for piece in chunks(reader):
            answer.body += piece
            left += piece
            while b"\n\n" in left:
                event, left = left.split(b"\n\n", 1)
                for line in event.splitlines():
                    if line.startswith(b"data: "):
                        answer.events.append(line[6:])
                        answer.times.append(time.monotonic())
            if leave_after is not None and len(answer.events) >= leave_after:
                writer.transport.abort()
                return None
            if pause:
                await asyncio.sleep(pause)
        return answer
    finally:
        writer.close()


def ask(port, method, path, body=None):
    """One request, outside of a loop."""
    return asyncio.run(request(port, method, path, body))


def spoken(answer):
    """(text, why it ended) of each choice of an answer of completions or chat completions; an error of a stream raises."""
    made = {}
    parts = [json.loads(e) for e in answer.events if e != b"[DONE]"] if answer.events else [answer.json()]
    for part in parts:
        if "error" in part:
            raise RuntimeError(part["error"])
        for choice in part.get("choices", []):
            text, reason = made.get(choice["index"], ("", None))
            said = choice.get("delta") or choice.get("message") or {"content": choice.get("text", "")}
            made[choice["index"]] = (text + (said.get("content") or ""), choice.get("finish_reason") or reason)
    return [made[i] for i in sorted(made)]


def metrics(port):
    """{'name{labels}': value} of the server's numbers, without 'oscar_'."""
    found = {}
    for line in ask(port, "GET", "/metrics").body.decode().splitlines():
        if line.startswith("oscar_"):
            name, value = line[6:].rsplit(" ", 1)
            found[name] = float(value)
    return found


def skip_without(*paths):
    for path in paths:
        if not os.path.exists(path):
            print(f"skipped: there is no {path}")
            sys.exit(77)
