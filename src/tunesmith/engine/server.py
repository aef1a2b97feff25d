"""An OpenAI-compatible server (vLLM, SGLang, llama.cpp, ...) that answers by URL: /chat/completions and /models.

Several questions are under way at once. What may pass (no connection, lateness, 408, 409, 429, 5xx, an answer that is no
JSON) is tried again with growing pauses; everything else ends the work at once. Nothing is sent anywhere but to the URL.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import random
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

import numpy as np

from tunesmith.core.errors import RunError, SpecError
from tunesmith.core.progress import Quiet, Reporter
from tunesmith.core.record import Message
from tunesmith.engine.asking import Answered, OnText, Progress, Question, Reply, cut_note
from tunesmith.engine.journal import Journal, digest
from tunesmith.engine.sampler import Sampling

if TYPE_CHECKING:
    import openai

LONGEST_PAUSE = 60.0
_PASSING = {408, 409, 429}
_SENT = ("role", "content", "name", "tool_calls", "tool_call_id")

T = TypeVar("T")


class _Passing(Exception):
    """A failure that may pass. what: for the user. after: seconds that the server asks to wait."""

    def __init__(self, what: str, after: float | None = None) -> None:
        super().__init__(what)
        self.what, self.after = what, after


@dataclass(slots=True)
class Server:
    """url: up to and with /v1. model: the name that requests carry. concurrency: questions under way at once.

    timeout: seconds for one whole answer. attempts: how often one question is tried. key: sent to `url` as bearer token.
    reporter: told when something is tried again. pause, draw: waiting, and a random number in [0, 1) for the jitter.
    """

    url: str
    model: str = ""
    concurrency: int = 8
    timeout: float = 300.0
    attempts: int = 5
    key: str = field(default="none", repr=False)
    reporter: Reporter = field(default_factory=Quiet, repr=False)
    pause: Callable[[float], Awaitable[None]] = field(default=asyncio.sleep, repr=False)
    draw: Callable[[], float] = field(default=random.random, repr=False)
    _journal: Journal | None = field(default=None, repr=False)
    _said: str = field(default="", repr=False)

    @property
    def name(self) -> str:
        return f"{self.model} at {self.url}"

    def names(self) -> list[str]:
        """The models that the server offers. Raises RunError where it does not say."""

        async def ask() -> list[str]:
            async with self._client() as client:
                return await self._retry(lambda: self._list(client))

        return _run(ask())

    @contextmanager
    def session(self) -> Iterator[None]:
        """Answers within it are kept on disk until it ends well; the next session after a failure takes them up."""
        self._journal = journal = Journal(f"{self.url} {self.model}")
        try:
            yield
            journal.forget()
        finally:
            journal.close()
            self._journal = None

    def answer(
        self, asked: Sequence[Question], sampling: Sampling, *, progress: Progress | None = None, on_text: OnText | None = None
    ) -> Answered:
        """Ask several questions at once. Raises RunError, naming the URL, where one cannot be answered; the others are kept.

        on_text: the answers are streamed, one after another, and not kept.
        """
        requests = [self._request(question, sampling, place) for place, question in enumerate(asked)]
        if on_text is not None:
            replies, kept = _run(self._stream_all(requests, on_text, progress)), 0
        else:
            replies, kept = _run(self._ask_all(asked, requests, progress))
        notes = cut_note(replies, sampling.max_new_tokens)
        if kept:
            notes.append(f"{kept} of {len(replies)} answers were kept from an earlier call that did not end; their time is not counted")
        if mute := sum(not reply.prompt_tokens for reply in replies):
            notes.append(f"the server counted no tokens for {mute} of {len(replies)} answers")
        return Answered(replies, _as_text(asked[0].messages) if asked else "", notes)

    def _request(self, question: Question, sampling: Sampling, place: int) -> dict[str, Any]:
        """The body of a request. What is at its default is left out, since not every server knows every option."""
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [_message(message) for message in question.messages],
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
        }
        if question.tools:
            body["tools"] = list(question.tools)
        if sampling.stop:
            body["stop"] = list(sampling.stop)
        if sampling.temperature:
            body["seed"] = int(np.random.SeedSequence([sampling.seed, place]).generate_state(1)[0] >> 1)
            body |= {"top_p": sampling.top_p} if sampling.top_p < 1 else {}
            extra = {name: value for name, value in (("top_k", sampling.top_k), ("min_p", sampling.min_p)) if value}
            body |= {"extra_body": extra} if extra else {}
        return body

    async def _ask_all(
        self, asked: Sequence[Question], requests: Sequence[dict[str, Any]], progress: Progress | None
    ) -> tuple[list[Reply], int]:
        """Replies, and how many were kept from before. The first failure lets what is under way end, and starts nothing more."""
        journal, keys = self._journal, [digest(request) for request in requests]
        found = {place: kept for place, key in enumerate(keys) if journal and (kept := journal.get(key))}
        before, failures = len(found), list[RunError]()
        if progress and before:
            progress(before)
        waiting = iter([place for place in range(len(requests)) if place not in found])

        async def work(client: openai.AsyncOpenAI) -> None:
            for place in waiting:
                if failures:
                    return
                try:
                    found[place] = reply = await self._retry(partial(self._ask, client, requests[place]), asked[place].where)
                    if journal:
                        journal.keep(keys[place], reply)
                except RunError as failure:
                    failures.append(failure)
                    return
                if progress:
                    progress(1)

        async with self._client() as client:
            await asyncio.gather(*(work(client) for _ in range(min(self.concurrency, len(requests) - before))))
        if failures:
            raise self._ended(failures[0], len(found), len(requests))
        return [found[place] for place in range(len(requests))], before

    def _ended(self, failure: RunError, done: int, total: int) -> RunError:
        hints = list(failure.hints)
        if self._journal and done:
            hints.append(f"{done:,} of {total:,} answers are kept; the same call goes on there.")
        return RunError(failure.what, where=failure.where, hints=hints)

    async def _stream_all(self, requests: Sequence[dict[str, Any]], on_text: OnText, progress: Progress | None) -> list[Reply]:
        replies = []
        async with self._client() as client:
            for place, request in enumerate(requests):
                replies.append(await self._stream(client, request, partial(on_text, place)))
                if progress:
                    progress(1)
        return replies

    async def _ask(self, client: openai.AsyncOpenAI, request: Mapping[str, Any]) -> Reply:
        answer = await client.chat.completions.with_raw_response.create(**request)
        return self._parsed(answer.status_code, answer.text, _reply)

    async def _list(self, client: openai.AsyncOpenAI) -> list[str]:
        answer = await client.models.with_raw_response.list()
        return self._parsed(answer.status_code, answer.text, lambda values: [str(one["id"]) for one in values["data"]])

    def _parsed(self, status: int, text: str, read: Callable[[Any], T]) -> T:
        try:
            return read(json.loads(text))
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
            raise _Passing(f"the server answers {status} with what is no answer of this interface: {_beginning(text)}") from None

    async def _stream(self, client: openai.AsyncOpenAI, request: dict[str, Any], say: Callable[[str], None]) -> Reply:
        """One answer, said as it comes. It is tried again only as long as nothing was said."""
        parts: list[str] = []

        async def attempt() -> Reply:
            finished, usage = "", None
            try:
                async for chunk in await client.chat.completions.create(**request, stream=True, stream_options={"include_usage": True}):
                    usage = chunk.usage or usage
                    for choice in chunk.choices or []:
                        finished = choice.finish_reason or finished
                        if choice.delta and choice.delta.content:
                            parts.append(choice.delta.content)
                            say(choice.delta.content)
            except (ValueError, TypeError, AttributeError):
                raise _Passing("the server streams what is no answer of this interface") from None
            if not finished:
                raise _Passing("the server ended its answer before the answer's end")
            counts = (usage.prompt_tokens or 0, usage.completion_tokens or 0) if usage else (0, 0)
            return Reply("".join(parts), _finish(finished), *counts)

        return await self._retry(attempt, again=lambda: not parts)

    async def _retry(self, attempt: Callable[[], Awaitable[T]], where: str = "", again: Callable[[], bool] = lambda: True) -> T:
        """Try until it works, `attempts` times at most. Raises RunError with the last failure."""
        for number in range(1, self.attempts + 1):
            try:
                return await self._once(attempt, where)
            except _Passing as failure:
                if number == self.attempts or not again():
                    raise self._error(failure.what, where, number) from None
                grown = min(LONGEST_PAUSE, 0.5 * 2 ** (number - 1)) * (1 - 0.25 * self.draw())
                wait = grown if failure.after is None else max(failure.after, grown)
                self._say_again(failure.what, f"{wait:.1f} s, attempt {number + 1} of {self.attempts}")
                await self.pause(wait)
        raise AssertionError("attempts are at least 1")

    def _say_again(self, what: str, when: str) -> None:
        """Once a cause: many questions under way fail alike."""
        if what != self._said:
            self._said = what
            self.reporter.line("server", f"{what}; again in {when}")

    async def _once(self, attempt: Callable[[], Awaitable[T]], where: str) -> T:
        """One attempt, its failures sorted into those that may pass (_Passing) and those that will not (RunError)."""
        import httpx2
        import openai

        late = f"no whole answer came within {self.timeout:g} s"
        try:
            async with asyncio.timeout(self.timeout):
                return await attempt()
        except (TimeoutError, openai.APITimeoutError):
            raise _Passing(late) from None
        except openai.APIStatusError as error:
            what = f"the server answers {error.status_code}: {_beginning(error.response.text)}"
            if error.status_code in _PASSING or error.status_code >= 500:
                raise _Passing(what, _after(error.response.headers.get("retry-after"))) from None
            raise self._error(what, where, 1, _STATUS_HINTS.get(error.status_code, ())) from None
        except openai.APIConnectionError as error:
            raise _Passing(f"no connection: {error.__cause__ or error}") from None
        except httpx2.HTTPError as error:
            raise _Passing(f"the connection broke: {str(error) or type(error).__name__}") from None
        except openai.APIError as error:  # an error in the midst of a stream
            raise _Passing(f"the server breaks off: {error.message}") from None

    def _error(self, what: str, where: str, tries: int, hints: Sequence[str] = ()) -> RunError:
        often = f" ({tries} attempts)" if tries > 1 else ""
        place = f" It was to answer {where}." if where else ""
        more = hints or ["Is it running, and does its address end like this?  http://HOST:PORT/v1"]
        return RunError(f"{what}{often}.{place}", where=self.url, hints=more)

    def _client(self) -> openai.AsyncOpenAI:
        """Redirections are not followed: they would send the questions elsewhere."""
        import openai

        limits = openai.Timeout(self.timeout, connect=min(10.0, self.timeout))
        http = openai.DefaultAsyncHttpxClient(follow_redirects=False, timeout=limits)
        client = openai.AsyncOpenAI(api_key=self.key, base_url=self.url, timeout=limits, max_retries=0, http_client=http)
        client.organization = client.project = None  # the library reads them from the environment; nobody named them for this URL
        return client


_STATUS_HINTS = {
    400: ["Does the question fit into the context of the server's model, and does the server know the options sent?"],
    401: ["Name the variable that holds the key:  --key-env NAME"],
    403: ["Name the variable that holds the key:  --key-env NAME"],
    404: ["Does the address end in /v1, and does the server have this model?  URL#MODEL"],
}


def is_server(source: Any) -> bool:
    """Does this name a server, by URL?"""
    return isinstance(source, str) and source.startswith(("http://", "https://"))


def connect(
    source: str,
    *,
    key_env: str | None = None,
    concurrency: int = 8,
    timeout: float = 300.0,
    attempts: int = 5,
    reporter: Reporter | None = None,
) -> Server:
    """The server at "http://HOST:PORT/v1", or "...#MODEL"; without a name it is asked which model it has.

    key_env: the environment variable that holds the key; without it no key is sent, whatever the environment holds.
    Raises SpecError for what cannot be an address, an unset variable, an unknown or ambiguous model; RunError where the
    server does not answer.
    """
    url, _, model = source.partition("#")
    parts = urlsplit(url)
    if not parts.hostname or parts.username or parts.password or parts.query:
        raise SpecError("the address has to be a plain one.", hints=["Form:  http://HOST:PORT/v1  or  http://HOST:PORT/v1#MODEL"])
    if concurrency < 1 or attempts < 1 or not 0 < timeout < math.inf:
        raise SpecError("concurrency and attempts are at least 1, timeout is a number of seconds.", where=url)
    key = os.environ.get(key_env, "") if key_env else ""
    if key_env and not key:
        raise SpecError(f"the environment variable '{key_env}' that is to hold the key is not set.", where=url)
    server = Server(url.rstrip("/"), model, concurrency, timeout, attempts, key or "none", reporter or Quiet())
    return server if model else choose_model(server)


def choose_model(server: Server) -> Server:
    """The server with the name of its only model. Raises SpecError where it has several."""
    names = server.names()
    if not names:
        raise RunError("the server has no model.", where=server.url, hints=[f"Name one:  {server.url}#MODEL"])
    if len(names) > 1:
        hints = [f"Name one:  {server.url}#{names[0]}", f"Known: {', '.join(names)}"]
        raise SpecError(f"the server has {len(names)} models.", where=server.url, hints=hints)
    server.model = names[0]
    return server


def _run(work: Coroutine[Any, Any, T]) -> T:
    """Run to the end, from a notebook too, whose loop is busy with the cell that calls."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, work).result()


def _reply(values: Any) -> Reply:
    choice, usage = values["choices"][0], values.get("usage") or {}
    text = choice["message"].get("content") or ""
    if not isinstance(text, str):
        raise TypeError("content is no text")
    counts = (int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0))
    return Reply(text, _finish(choice.get("finish_reason")), *counts)


def _finish(reason: Any) -> str:
    return "end" if reason in ("stop", None) else str(reason)


def _message(message: Message) -> dict[str, Any]:
    """A message as servers take it: known keys, and the arguments of calls as JSON text."""
    sent = {name: message[name] for name in _SENT if name in message}
    if sent.get("tool_calls"):
        sent["tool_calls"] = [_call(call, place) for place, call in enumerate(sent["tool_calls"])]
    return sent


def _call(call: Mapping[str, Any], place: int) -> dict[str, Any]:
    function = dict(call.get("function", call))
    if not isinstance(function.get("arguments"), str):
        function["arguments"] = json.dumps(function.get("arguments") or {}, ensure_ascii=False)
    return {"id": call.get("id") or f"call_{place}", "type": "function", "function": function}


def _as_text(messages: Sequence[Message]) -> str:
    """What a server was sent, for reading; the template is the server's own."""
    return "\n".join(f"{message.get('role')}: {message.get('content') or ''}" for message in messages)


def _after(header: str | None) -> float | None:
    """Seconds of a Retry-After header (RFC 9110, 10.2.3), at most a minute; None where there is none to be read."""
    from email.utils import parsedate_to_datetime
    from time import time

    if header is None:
        return None
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(header).timestamp() - time()
        except ValueError:
            return None
    return min(max(seconds, 0.0), LONGEST_PAUSE) if math.isfinite(seconds) else None


def _beginning(text: str, limit: int = 200) -> str:
    folded = " ".join(text.split())
    return f"'{folded[:limit]}{'…' if len(folded) > limit else ''}'" if folded else "nothing"
