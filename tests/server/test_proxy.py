#!/usr/bin/env python3
"""The proxies of examples/serve, in front of a server that repeats its users (serve_fake). test_proxy.py SERVE_FAKE STORED_MODEL [--silence 2]

The example itself is run, with other names, ports and a certificate made for the occasion, and asked with curl over HTTP/2 and
HTTP/1.1: answers arrive as they are made, whoever leaves gives its place back, bodies may be as large as the server takes them, the
page is the server's own. --silence: seconds for which an answer says nothing; more than 60 show that the proxy's time-out is ours.
Skipped (77) where there is no nginx and no Caddy, no curl or no openssl.
"""
import argparse
import contextlib
import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import tempfile
import time

EXAMPLES = pathlib.Path(__file__).resolve().parents[2] / "examples" / "serve"
KEY = "sk-behind-a-proxy"
HTTP = ["--http2", "--http1.1"]


def check(what, condition, *seen):
    if not condition:
        sys.exit(f"{what}: {seen}")


def program(name):
    return shutil.which(name) or shutil.which(name, path="/usr/sbin:/usr/local/sbin")


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def example(name, replaced):
    """The text of an example with some of it replaced; all of that must be there."""
    text = (EXAMPLES / name).read_text(encoding="utf-8")
    for old, new in replaced.items():
        check(f"{name} says '{old}'", old in text)
        text = text.replace(old, new)
    return text


def certificate(folder):
    subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2", "-subj", "/CN=localhost",
                    "-addext", "subjectAltName=DNS:localhost", "-keyout", f"{folder}/key.pem", "-out", f"{folder}/certificate.pem"],
                   check=True, capture_output=True)


def nginx(folder, port, behind):
    site = example("nginx.conf", {"127.0.0.1:8080": f"127.0.0.1:{behind}", "listen 443": f"listen 127.0.0.1:{port}", "llm.example.org;": "localhost;",
                                  "/etc/ssl/llm.example.org.pem": f"{folder}/certificate.pem",
                                  "/etc/ssl/private/llm.example.org.key": f"{folder}/key.pem"})
    kinds = "client_body proxy fastcgi uwsgi scgi".split()
    main = "".join(f"{kind}_temp_path {folder}/{kind};\n" for kind in kinds)
    user = "user root;\n" if os.geteuid() == 0 else ""
    pathlib.Path(folder, "nginx.conf").write_text(f"{user}daemon off;\nworker_processes 1;\npid {folder}/pid;\nerror_log stderr;\nevents {{}}\n"
                                                  f"http {{\naccess_log off;\n{main}{site}}}\n", encoding="utf-8")
    return [program("nginx"), "-e", "stderr", "-p", folder, "-c", f"{folder}/nginx.conf"]


def caddy(folder, port, behind):
    site = example("Caddyfile", {"127.0.0.1:8080": f"127.0.0.1:{behind}",
                                 "llm.example.org {": f"https://localhost:{port} {{\n\tbind 127.0.0.1\n\ttls {folder}/certificate.pem {folder}/key.pem"})
    pathlib.Path(folder, "Caddyfile").write_text(f"{{\n\tadmin off\n\tauto_https disable_redirects\n}}\n{site}", encoding="utf-8")
    return [program("caddy"), "run", "--adapter", "caddyfile", "--config", f"{folder}/Caddyfile"]


@contextlib.contextmanager
def served(options):
    with tempfile.TemporaryDirectory() as folder:
        with subprocess.Popen([options.program, options.model, folder, KEY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            yield int(process.stdout.readline().strip().rsplit(":", 1)[1])
            process.stdin.close()
            check("the server ends well", process.wait(20) == 0)


class Site:
    """The proxy at its port, as curl sees it."""

    def __init__(self, folder, port):
        self.url = f"https://localhost:{port}"
        self.curl = ["curl", "-sN", "--cacert", f"{folder}/certificate.pem"]
        self.key = ["-H", f"Authorization: Bearer {KEY}"]

    def ask(self, path, *arguments, body=None, key=True):
        """(status, body)."""
        given = self.key * key
        # As most libraries do, a body is sent without asking first.
        given += [] if body is None else ["-H", "Expect:", "-H", "Content-Type: application/json", "--data-binary", "@-"]
        done = subprocess.run([*self.curl, *arguments, *given, "-w", "\n%{http_code}", self.url + path], input=json.dumps(body).encode(), capture_output=True,
                              timeout=600, check=False)
        text, status = done.stdout.rsplit(b"\n", 1)
        return int(status), text

    def chat(self, said, *arguments, **more):
        """curl, at work on a request."""
        body = json.dumps({"messages": [{"role": "user", "content": said}], **more})
        return subprocess.Popen([*self.curl, *self.key, *arguments, "-H", "Content-Type: application/json", "-d", body, self.url + "/v1/chat/completions"],
                                stdout=subprocess.PIPE, bufsize=0)

    def running(self):
        return json.loads(self.ask("/v1/cache")[1])["requests"]["running"]

    def comes_to_run(self, n):
        until = time.monotonic() + 20
        while self.running() != n and time.monotonic() < until:
            time.sleep(0.05)
        return self.running() == n


@contextlib.contextmanager
def proxied(make, behind):
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        certificate(folder)
        log = pathlib.Path(folder, "log")
        with open(log, "wb") as file:
            process = subprocess.Popen(make(folder, port, behind), stdin=subprocess.DEVNULL, stdout=file, stderr=file,
                                       env={**os.environ, "HOME": folder, "XDG_DATA_HOME": folder, "XDG_CONFIG_HOME": folder})
        try:
            site = Site(folder, port)
            until = time.monotonic() + 10
            while site.ask("/health")[0] != 200:
                check("the proxy starts", process.poll() is None and time.monotonic() < until, log.read_text(encoding="utf-8"))
                time.sleep(0.05)
            yield site
        finally:
            process.terminate()
            process.wait()


def check_streams(site):
    """30 words, one each 30 ms, do not come together; on a busy machine some may."""
    for version in HTTP:
        with site.chat("!slow 30 30", version, stream=True) as request:
            begun, times, last = time.monotonic(), [], b""
            for line in request.stdout:
                if line.startswith(b"data: "):
                    times.append(time.monotonic() - begun)
                    last = line
        check("a stream ends", last == b"data: [DONE]\n", version, last)
        check("it comes as it is made", times[-1] - times[0] > 0.3, version, times)
        print(f"  {version[2:]}: first event after {times[0] * 1e3:.0f} ms, the last after {times[-1] * 1e3:.0f} ms")


def check_leaving(site):
    for version in HTTP:
        for stream in (True, False):
            with site.chat("!slow 1000 30" if stream else "!wait", version, stream=stream) as request:
                check("it runs", site.comes_to_run(1), version, stream)
                if stream:
                    request.stdout.read(1)
                request.kill()
            check("a client that leaves gives its place back", site.comes_to_run(0), version, stream)


def check_bodies(site):
    for version in HTTP:
        message = {"messages": [{"role": "user", "content": "Hello"}]}
        status, body = site.ask("/v1/chat/completions", version, body={**message, "metadata": "x" * (7 << 20)})
        check("a body of 7 MiB is taken", status == 200 and b"Hello" in body, version, status, body[:200])
        status, body = site.ask("/v1/chat/completions", version, body={**message, "metadata": "x" * (9 << 20)})
        check("one of 9 MiB is not", status == 413, version, status, body[:200])


def check_access(site):
    message = {"messages": [{"role": "user", "content": "Hello"}]}
    for version in HTTP:
        check("no key", site.ask("/v1/models", version, key=False)[0] == 401, version)
        check("the page", b"<title>" in site.ask("/", version, key=False)[1], version)
        status, body = site.ask("/v1/chat/completions", version, "-H", f"Origin: {site.url}", body=message)
        check("the page may ask", status == 200, version, status, body)
        status, body = site.ask("/v1/chat/completions", version, "-H", "Origin: https://elsewhere.example", body=message)
        check("another's may not", status == 403, version, status, body)
        check("errors are the server's", json.loads(body)["error"]["code"] == "origin_not_allowed", version, body)


def check_silence(site, seconds):
    with site.chat(f"!slow 1 {seconds * 1000}") as request:
        body = request.stdout.read()
    check(f"an answer after {seconds} s of silence", json.loads(body)["choices"][0]["message"]["content"] == "word ", body)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("program")
    p.add_argument("model")
    p.add_argument("--silence", type=int, default=2)
    options = p.parse_args()
    there = [make for make in (nginx, caddy) if program(make.__name__)]
    if not there or not program("curl") or not program("openssl"):
        print("skipped: this needs curl, openssl and one of nginx, caddy")
        sys.exit(77)
    with served(options) as behind:
        for make in there:
            print(make.__name__)
            with proxied(make, behind) as site:
                check_streams(site)
                check_leaving(site)
                check_bodies(site)
                check_access(site)
                check_silence(site, options.silence)


if __name__ == "__main__":
    main()
