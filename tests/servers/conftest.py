"""A server that speaks OpenAI's interface on this machine, and misbehaves when told to."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest


class FakeServer:
    """answer: what is said to a request's last message. plans: what becomes of the next requests, one after another; then "ok".

    requests, headers: what came, in the order in which it came.
    """

    def __init__(self, models: list[str] | None = None, answer: Callable[[str], str] = lambda text: f"echo {text}") -> None:
        self.models, self.answer = ["tiny"] if models is None else models, answer
        self.plans: list[str] = []
        self.always = "ok"
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.most_at_once = 0
        self.released = threading.Event()  # lets silent requests go when the test is over
        self._now = 0
        self._lock = threading.Lock()
        self.url = ""

    def asked(self) -> list[str]:
        return [request["messages"][-1]["content"] for request in self.requests]

    @contextmanager
    def counted(self) -> Iterator[None]:
        with self._lock:
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
        try:
            yield
        finally:
            with self._lock:
                self._now -= 1

    def next_plan(self, text: str) -> str:
        with self._lock:
            if text.startswith("!"):  # a question that always meets with the same fate
                return text[1:]
            return self.plans.pop(0) if self.plans else self.always


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Any

    def log_message(self, *args: object) -> None:
        """Nothing to stderr."""

    def do_GET(self) -> None:
        fake: FakeServer = self.server.fake
        fake.paths.append(self.path)
        plan = fake.next_plan("")
        if plan == "ok":
            self._send(200, json.dumps({"object": "list", "data": [{"id": name, "object": "model"} for name in fake.models]}))
        else:
            self._misbehave(fake, plan)

    def do_POST(self) -> None:
        fake: FakeServer = self.server.fake
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = str(body["messages"][-1]["content"])
        with fake._lock:
            fake.requests.append(body)
            fake.headers.append({name.lower(): value for name, value in self.headers.items()})
            fake.paths.append(self.path)
        with fake.counted():
            plan = fake.next_plan(text)
            if plan.startswith("slow"):
                time.sleep(float(plan[4:] or 0.02))
                plan = "ok"
            if plan == "ok" and body.get("stream"):
                self._stream(fake.answer(text))
            elif plan == "ok":
                message = {"role": "assistant", "content": fake.answer(text)}
                usage = {"prompt_tokens": len(text.split()), "completion_tokens": 2, "total_tokens": 0}
                choice = {"index": 0, "message": message, "finish_reason": "stop"}
                self._send(200, json.dumps({"id": "1", "object": "chat.completion", "choices": [choice], "usage": usage}))
            else:
                self._misbehave(fake, plan)

    def _misbehave(self, fake: FakeServer, plan: str) -> None:
        if plan == "garbage":
            self._send(200, "<html>Welcome to the router</html>", "text/html")
        elif plan == "cut json":
            self._send(200, '{"id": "1", "choices": [{"mess')
        elif plan == "other json":
            self._send(200, '{"status": "fine"}')
        elif plan == "close":
            self.close_connection = True
            self.connection.close()
        elif plan == "never":
            fake.released.wait(10)
            self.close_connection = True
        elif plan.startswith("redirect "):
            self._send(307, "", more={"Location": plan.split()[1]})
        else:
            status, _, after = plan.partition(" after ")
            self._send(int(status), json.dumps({"error": {"message": f"no, {status}"}}), more={"Retry-After": after} if after else {})

    def _stream(self, text: str) -> None:
        pieces = [text[:2], text[2:]]
        chunks = [{"choices": [{"index": 0, "delta": {"content": piece}, "finish_reason": None}]} for piece in pieces]
        chunks.append({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
        chunks.append({"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}})
        lines = [f"data: {json.dumps({'id': '1', 'object': 'chat.completion.chunk', **chunk})}\n\n" for chunk in chunks]
        self._send(200, "".join([*lines, "data: [DONE]\n\n"]), "text/event-stream")

    def _send(self, status: int, text: str, kind: str = "application/json", more: dict[str, str] | None = None) -> None:
        body = text.encode()
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **(more or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def serving(fake: FakeServer) -> Iterator[FakeServer]:
    """The fake, at `fake.url` on a free port of this machine, until the block ends."""
    http = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    http.daemon_threads = True
    http.block_on_close = False
    http.fake = fake  # type: ignore[attr-defined]
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    fake.url = f"http://127.0.0.1:{http.server_port}/v1"
    try:
        yield fake
    finally:
        fake.released.set()
        http.shutdown()
        http.server_close()


@pytest.fixture(autouse=True)
def own_surroundings(tmp_path, monkeypatch) -> None:
    """A cache and a folder of its own, no key, and no proxy between a test and its server."""
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("OPENAI_API_KEY", "not-for-you")  # what nobody named is sent nowhere


@pytest.fixture
def fake() -> Iterator[FakeServer]:
    with serving(FakeServer()) as running:
        yield running


@pytest.fixture
def other_fake() -> Iterator[FakeServer]:
    with serving(FakeServer(["other"])) as running:
        yield running
