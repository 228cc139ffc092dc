"""`llmpy serve`: a model behind OpenAI's interface, over HTTP.

    GET  /health, /v1/models, /v1/models/NAME
    POST /v1/completions, /v1/chat/completions

On the loopback interface, requests for another host name and by pages of other sites are refused, as in `llmpy watch`.
With a key, every request but /health must carry it. One thread owns the model (`generate.batcher`); the event loop
passes its events to the requests. A request that ends early, by its client or its time limit, frees its places.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import importlib.util
import ipaddress
import json
import logging
import os
import socket
import time
import traceback
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

from ..backend.machine import Machine
from ..errors import LlmpyError
from ..generate.batcher import Batcher, Event
from ..generate.generation import Generation, Text, Token, load_model, open_run
from ..generate.sampling import Choice
from ..options.serve import ServeOptions
from ..rng import Xorshift64Star
from ..system.command import install
from ..system.interrupts import on_signal
from ..system.loopback import foreign_host, foreign_site
from .openai_requests import Job, Refusal, Served, parse

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.types import Receive, Scope, Send

KEY = "LLMPY_API_KEY"
LENGTH = 2048  # tokens of a text by default
LARGEST, DRAINED = 1 << 20, 64 << 20  # bytes of a request; read before it is refused, so that the client sees why
SLOWEST_BODY, SILENT = 60, 20  # seconds of a body; before the first byte of a connection
SLOWEST_READER = 10  # seconds of a client to read the rest of its answer, beyond the time limit
LEAST_LOGPROB = -9999.0  # OpenAI's
ANSWERS = {"/v1/completions": False, "/v1/chat/completions": True}  # path → of a chat
MODELS = "/v1/models"
Json = dict[str, Any]


class Api:
    """The ASGI application."""

    def __init__(self, served: Served, generation: Generation, options: ServeOptions, key: str, local: bool) -> None:
        self._served, self._options, self._key, self._local = served, options, key.encode(), local
        self.batcher = Batcher(generation, options.waiting, self._deliver)
        self.closing = False
        self._created = int(time.time())
        self._parsing = asyncio.Semaphore(1)  # a tokenizer may need a hundred times the memory of a request
        self._inboxes: dict[Text, asyncio.Queue[Event]] = {}
        self._loop: asyncio.AbstractEventLoop | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        from starlette.requests import ClientDisconnect, Request

        self._loop = asyncio.get_running_loop()
        request = Request(scope, receive)
        try:
            await self._respond(request, send)
        except ClientDisconnect:
            pass
        except Exception as error:
            await refused(error)(scope, receive, send)

    async def _respond(self, request: Request, send: Send) -> None:
        path, headers = request.scope["path"], request.headers
        if self._local and (
            foreign_host(headers.get("Host", ""), self._options.host)
            or foreign_host(headers.get("Origin", "//localhost").partition("//")[2], self._options.host)
            or foreign_site(headers.get("Sec-Fetch-Site", "none"))
        ):
            what = "llmpy serve answers requests to this machine's own names only, and of no other site"
            raise Refusal(what, code="foreign_host", status=403)
        given = headers.get("Authorization", "").encode()
        authorized = not self._key or hmac.compare_digest(given, b"Bearer " + self._key)
        if not authorized and path != "/health":
            raise Refusal("the key is missing or wrong: Authorization: Bearer KEY", code="invalid_api_key", status=401)
        if path in ANSWERS and request.method == "POST":
            await self._answer(request, ANSWERS[path], send)
            return
        own = f"{MODELS}/{self._served.name}"
        if path not in (*ANSWERS, "/health", MODELS, own):
            known = ", ".join((*ANSWERS, MODELS, own))
            raise Refusal(f"there is no {path[:100]}, only {known}", code="not_found", status=404)
        if request.method != "GET" or path in ANSWERS:
            raise Refusal(f"{request.method} {path} is not supported", code="method_not_allowed", status=405)
        model = {"id": self._served.name, "object": "model", "created": self._created, "owned_by": "llmpy"}
        if path == "/health":  # without the key, only that the server runs
            busy = dict(zip(("running", "waiting"), self.batcher.counts, strict=True)) if authorized else {}
            found: Json = {"status": "ok", **busy}
        elif path == MODELS:
            found = {"object": "list", "data": [model]}
        else:
            found = model
        await as_json(found)(request.scope, request.receive, send)

    async def _answer(self, request: Request, chat: bool, send: Send) -> None:
        """Continue the texts of a request, and send them as they come or at the end."""
        from starlette.responses import StreamingResponse

        try:
            async with asyncio.timeout(SLOWEST_BODY):
                data = await body_of(request)
        except TimeoutError:
            raise Refusal("the request is incomplete", code="timeout", status=408) from None
        async with self._parsing:
            job = await asyncio.to_thread(parse, data, chat, self._served)
        if self.closing:
            raise LlmpyError("serve.closing", "the server is shutting down", "Try again later")
        inbox: asyncio.Queue[Event] = asyncio.Queue()
        self.batcher.submit(job.texts)
        self._inboxes.update(dict.fromkeys(job.texts, inbox))
        limit = self._options.timeout
        late = Refusal(f"the request took more than {limit:g} s", code="timeout", status=503)
        timer = asyncio.get_running_loop().call_later(limit, inbox.put_nowait, Event(job.texts[0], error=late))
        reply = Reply(job, self._served, inbox)
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(limit + SLOWEST_READER):
                    response: Response
                    if job.stream:
                        response = StreamingResponse(reply.stream(), 200, NO_STORE, "text/event-stream")
                    else:
                        gone = asyncio.ensure_future(wait_for_disconnect(request, inbox, job.texts[0]))
                        try:
                            response = as_json(await reply.whole())
                        finally:
                            gone.cancel()
                    await response(request.scope, request.receive, send)
        finally:
            timer.cancel()
            self.batcher.cancel(job.texts)
            for text in job.texts:
                del self._inboxes[text]

    def _deliver(self, events: list[Event]) -> None:
        """Pass the events of a step to their requests; called by the batcher's thread."""
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                self._loop.call_soon_threadsafe(self._dispatch, events)

    def _dispatch(self, events: list[Event]) -> None:
        for event in events:
            if inbox := self._inboxes.get(event.text):
                inbox.put_nowait(event)


class Reply:
    """A job's events as OpenAI's objects."""

    def __init__(self, job: Job, served: Served, inbox: asyncio.Queue[Event]) -> None:
        self._job, self._served, self._inbox = job, served, inbox
        self._numbers = {text: i for i, text in enumerate(job.texts)}
        self._shown = [0] * len(job.texts)  # characters of tokens with log-probabilities
        kind = "chat.completion" if job.chat else "text_completion"
        name = f"{'chatcmpl' if job.chat else 'cmpl'}-{uuid.uuid4().hex}"
        chunk = ".chunk" if job.chat and job.stream else ""
        self._head = {"id": name, "object": kind + chunk, "created": int(time.time()), "model": served.name}

    async def _events(self) -> AsyncIterator[tuple[int, Event]]:
        """Yield text number and event until all texts have ended. Raises what ends them."""
        left = len(self._job.texts)
        while left:
            event = await self._inbox.get()
            if event.error is not None:
                raise event.error
            left -= bool(event.ended)
            yield self._numbers[event.text], event

    async def whole(self) -> Json:
        """Return the answer that is not streamed."""
        added = self._job.texts
        texts, ends = [""] * len(added), [""] * len(added)
        async for i, event in self._events():
            texts[i], ends[i] = texts[i] + event.piece, event.ended
        choices = [self._choice(i, texts[i], text.added, ends[i]) for i, text in enumerate(added)]
        return {**self._head, "choices": choices, "usage": self._usage()}

    async def stream(self) -> AsyncIterator[str]:
        """Yield the lines of server-sent events; an error ends them."""
        job = self._job
        usage = {"usage": None} if job.usage else {}

        def line(choices: list[Json], more: Json = usage) -> str:
            return f"data: {json.dumps({**self._head, 'choices': choices, **more})}\n\n"

        for i in range(len(job.texts) * job.chat):
            yield line([{**self._choice(i, ""), "delta": {"role": "assistant", "content": ""}}])
        try:
            async for i, event in self._events():
                if event.piece or event.ended or job.logprobs:
                    yield line([self._choice(i, event.piece, [event.token] if event.token else [], event.ended)])
            if job.usage:
                yield line([], {"usage": self._usage()})
            yield "data: [DONE]\n\n"
        except Exception as error:
            yield f"data: {json.dumps(refusal_of(error).body)}\n\n"

    def _choice(self, i: int, piece: str, tokens: Sequence[Token] = (), ended: str = "") -> Json:
        """Return what was added to text i: all of it, or in a stream the last of it."""
        said: Json = {"text": piece}
        if self._job.chat and self._job.stream:
            said = {"delta": {"content": piece}}
        elif self._job.chat:
            said = {"message": {"role": "assistant", "content": piece, "refusal": None}}
        shown = tokens[: -1 if ended == "eot" else None]
        logprobs = self._logprobs(i, shown) if self._job.logprobs and shown else None
        reason = "stop" if ended == "eot" else ended or None
        return {"index": i, **said, "logprobs": logprobs, "finish_reason": reason}

    def _usage(self) -> Json:
        prompt, added = self._job.prompt_tokens, sum(len(text.added) for text in self._job.texts)
        return {"prompt_tokens": prompt, "completion_tokens": added, "total_tokens": prompt + added}

    def _logprobs(self, i: int, tokens: Sequence[Token]) -> Json:
        """Return the log-probabilities of the next tokens of text i."""
        decode = self._served.tokenizer.decode

        def entry(id: int, value: float) -> Json:
            text = decode([id])
            whole = None if "\ufffd" in text else list(text.encode())
            return {"token": text, "logprob": max(value, LEAST_LOGPROB), "bytes": whole}

        found = [(entry(t.id, t.logprob), [entry(*one) for one in t.likeliest]) for t in tokens]
        if self._job.chat:
            return {"content": [{**token, "top_logprobs": top} for token, top in found], "refusal": None}
        offsets = []
        for token, _ in found:
            offsets.append(self._shown[i])
            self._shown[i] += len(token["token"])
        return {
            "tokens": [token["token"] for token, _ in found],
            "token_logprobs": [token["logprob"] for token, _ in found],
            "top_logprobs": [{one["token"]: one["logprob"] for one in top} for _, top in found],
            "text_offset": offsets,
        }


NO_STORE = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}


def as_json(content: Json, status: int = 200, headers: dict[str, str] = NO_STORE) -> Response:
    """Return a response of JSON in ASCII: a text may have halves of characters."""
    from starlette.responses import Response

    return Response(json.dumps(content), status, headers, "application/json")


def refusal_of(error: Exception) -> Refusal:
    """Return an error as OpenAI's; print those that are not about the request."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, LlmpyError):
        status = {"serve.busy": 429, "serve.closing": 503}.get(error.code, 500)
        return Refusal(str(error), code=error.code, status=status)
    traceback.print_exception(error)
    return Refusal("an error in the server", code="internal_error", status=500)


def refused(error: Exception) -> Response:
    """Return the response of an error."""
    refusal = refusal_of(error)
    headers = {"Retry-After": "1"} if refusal.status in (429, 503) else {}
    headers |= {"WWW-Authenticate": "Bearer"} if refusal.status == 401 else {}
    return as_json(refusal.body, refusal.status, NO_STORE | headers)


async def body_of(request: Request) -> bytes:
    """Return the body of a request. Raises Refusal if it is too large."""
    data, size = bytearray(), 0
    async for chunk in request.stream():
        size += len(chunk)
        if size <= LARGEST:
            data += chunk
        elif size > DRAINED:
            break
    if size > LARGEST:
        raise Refusal(f"the request has more than {LARGEST:,} bytes", code="request_too_large", status=413)
    return bytes(data)


async def wait_for_disconnect(request: Request, inbox: asyncio.Queue[Event], text: Text) -> None:
    """End a request whose client goes away."""
    from starlette.requests import ClientDisconnect

    while (await request.receive())["type"] != "http.disconnect":
        pass
    inbox.put_nowait(Event(text, error=ClientDisconnect()))


def listen(host: str, port: int) -> tuple[socket.socket, bool]:
    """Return a socket that listens, and whether only this machine can reach it. Raises LlmpyError."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family), ipaddress.ip_address(address[0]).is_loopback
    except OSError as error:
        what = f"cannot listen on {host} port {port}: {error.strerror or error}"
        raise LlmpyError("serve.no-port", what, "Choose another one: --host, --port") from None


def serve(options: ServeOptions, log: Callable[[str], None], machine: Machine | None = None) -> None:
    """Serve a model until SIGTERM or Ctrl-C. Raises LlmpyError if it cannot be loaded, or a package is missing."""
    for package in ("starlette", "uvicorn"):
        if importlib.util.find_spec(package) is None:
            hint = f"Install it: {install('llmpy[serve]')}"
            raise LlmpyError("package.missing", f"llmpy serve needs {package}", hint)
    import uvicorn
    from uvicorn.protocols.http.h11_impl import H11Protocol

    o, key = options, options.api_key or os.environ.get(KEY, "")
    if not key.isascii() or not key.isprintable() or o.api_key == "":
        raise LlmpyError("serve.key-invalid", "the key is empty or not printable ASCII", "Choose another one")
    sock, local = listen(o.host, o.port)
    with sock:
        if not local and not key:
            hint = f"Add --api-key KEY, or set {KEY}"
            raise LlmpyError("serve.key-missing", f"others can reach {o.host}, which needs a key", hint)
        api = Api(*prepared(o, machine), o, key, local)

        class Server(uvicorn.Server):
            async def startup(self, sockets: list[socket.socket] | None = None) -> None:
                await super().startup(sockets)
                where = f"[{o.host}]" if ":" in o.host else o.host
                log(f"http://{where}:{sock.getsockname()[1]}/v1  (Ctrl-C stops)")

            async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
                api.closing = True
                asyncio.get_running_loop().call_later(o.grace, api.batcher.close)
                await super().shutdown(sockets)

        class Impatient(H11Protocol):
            """Closes a connection that sends nothing."""

            def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
                super().connection_made(transport)
                self.timeout_keep_alive_task = self.loop.call_later(SILENT, self.timeout_keep_alive_handler)

        config = uvicorn.Config(
            cast(Any, api), http=Impatient, ws="none", lifespan="off", loop="asyncio", log_config=None,
            access_log=False, proxy_headers=False, server_header=False,
            limit_concurrency=100 + 2 * (o.texts + o.waiting), timeout_graceful_shutdown=int(o.grace) + 5,
        )  # fmt: skip
        logging.getLogger("asyncio").setLevel(logging.ERROR)  # warns of every write to a client that has left
        server = Server(config)
        try:
            with on_signal(server.handle_exit):
                server.run([sock])
        finally:
            api.batcher.close()
            api.batcher.thread.join()


def prepared(options: ServeOptions, machine: Machine | None = None) -> tuple[Served, Generation]:
    """Load the model, compile its kernels and continue a first text, so that requests wait for none of it."""
    o = options
    source, tokenizer = open_run(o.run)
    reach = source.trained_length
    length = o.length or min(reach, LENGTH)
    if length > reach:
        what = f"--length {length:,} exceeds the trained length of {reach:,}"
        raise LlmpyError("option.invalid", what, f"Use {reach:,} or less")
    model = load_model(source, o.texts, length, threads=o.threads, dtype=o.dtype, machine=machine)
    generation = Generation(model, o.texts, length, reach, tokens=tokenizer.vocab_size)
    text = Text([tokenizer.eot], 2, Xorshift64Star(1), Choice(0))
    generation.join(text)
    while generation.texts:
        generation.step()
    name = o.name or o.run.as_posix()
    most = o.texts + o.waiting
    longest = int(tokenizer.byte_lengths().max())  # of a token; normalizers make texts shorter, JSON longer
    characters = 4 * length * longest
    return Served(name, tokenizer, tokenizer.vocab_size, length, characters, length == reach, most), generation
