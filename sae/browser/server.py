"""The pages served on this machine: the same parts as in the static folder, made when asked for.

What a page of another origin could try is refused before anything is computed: a Host that is not
ours (DNS rebinding), reading our parts as scripts (Sec-Fetch-Site, Cross-Origin-Resource-Policy),
posting without JSON, our Origin and the token that stands in our own page. No path of a file is
ever made from an address: assets are a fixed list, parts are numbers.
"""

import base64
import hmac
import io
import json
import secrets
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import lru_cache
from threading import Lock, Thread
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from sae import labels
from sae.browser.history import Training
from sae.browser.pages import NUMBERS, Pages, script
from sae.browser.search import mentions
from sae.browser.static import ASSETS, asset_names
from sae.errors import RunError, SAEError
from sae.labels import Label
from sae.records import Change, Probe

HOST = "127.0.0.1"
PORT = 8765
BODY_BYTES = 1 << 24
"""Enough for the numbers of a million features."""
PARTS_KEPT = 256
FIXED = ("columns", "more", "rows-", "features-", "text-", "compare-", "map")
"""Parts that labels and a training run do not change."""
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
}

Question = Callable[[dict[str, Any]], dict[str, Any]]
ProbeOf = Callable[[Pages], Probe]
"""Loads the model behind a dictionary."""
TEXT_CHARACTERS = 20_000
FEATURES_PER_TOKEN = 8


class Guard:
    """Lets only requests of our own pages through; answers the others with 403."""

    def __init__(self, app: ASGIApp, token: str, port: int) -> None:
        self.app, self.token = app, token
        self.hosts = frozenset(f"{name}:{port}" for name in (HOST, "localhost"))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            return
        refusal = self.refusal(Request(scope))
        app = JSONResponse({"error": refusal}, 403, HEADERS) if refusal else self.app
        await app(scope, receive, send)

    def refusal(self, request: Request) -> str | None:
        """Why a request is not answered, None where it is."""
        given = request.headers
        if len(given.getlist("host")) != 1 or given["host"] not in self.hosts:
            return "this server answers to its own address only"
        if request.method == "POST":
            if given.get("content-type") != "application/json":
                return "Content-Type must be application/json"
            if given.get("origin") != f"http://{given['host']}":
                return "this page is of another origin"
            if not hmac.compare_digest(given.get("x-sae-token", "").encode(), self.token.encode()):
                return "the token is not this server's; load the page again"
        elif request.url.path != "/" and given.get("sec-fetch-site", "none") not in (
            "same-origin",
            "none",
        ):
            return "this page is of another origin"
        return None


class Site:
    """What the server answers; `shown` are the dictionaries by their number in addresses."""

    def __init__(
        self, shown: Sequence[Pages | Training], token: str, probe_of: ProbeOf | None = None
    ) -> None:
        self.shown, self.token = shown, token
        self._probe_of, self._probes, self._asking = probe_of, {}, Lock()
        self.questions: dict[str, Question] = {
            "label": self.label,
            "search": self.search,
            "export": self.export,
            "read": self.read,
            "steer": self.steer,
        }
        self._script, self._making = lru_cache(maxsize=PARTS_KEPT)(self._part), Lock()

    def index(self, request: Request) -> Response:
        """The page, with the token that its requests must bring."""
        page = (ASSETS / "index.html").read_text(encoding="utf-8")
        page = page.replace(
            'name="sae-token" content=""', f'name="sae-token" content="{self.token}"'
        )
        return Response(page.replace(" file:", ""), headers=HEADERS, media_type=TYPES[".html"])

    def asset(self, request: Request) -> Response:
        """A file of the page code."""
        name = request.path_params["name"]
        if name not in asset_names():
            return _missing()
        file = ASSETS / name
        return Response(file.read_bytes(), headers=HEADERS, media_type=TYPES[file.suffix])

    def data(self, request: Request) -> Response:
        """A part, as the script that it is in the static folder."""
        key = request.path_params["key"].removesuffix(".js")
        try:
            if key == "index":
                text = script("index", [pages.about() for pages in self.shown])
            else:
                number, _, part = key.partition("/")
                text = self._columns(number) if part == "columns" else self._text(number, part)
        except SAEError as error:
            return Response(str(error), 404, HEADERS, "text/plain")
        return Response(text, headers=HEADERS, media_type=TYPES[".js"])

    def warm(self) -> None:
        """Make what the list begins with before it is asked for."""
        for number, pages in enumerate(self.shown):
            if isinstance(pages, Pages):
                self._columns(str(number))

    def _columns(self, number: str) -> str:
        """The largest part, made once though many ask for it at the same time."""
        with self._making:
            return self._script(number, "columns")

    def _text(self, number: str, part: str) -> str:
        return (self._script if part.startswith(FIXED) else self._part)(number, part)

    def _part(self, number: str, part: str) -> str:
        name, _, other = part.partition("-")
        if name == "compare":
            value = self.pages(number).compare(self.pages(other))
        else:
            value = self._at(number).part(part)
        return script(f"{number}/{part}", value)

    def pages(self, number: object) -> Pages:
        """The dictionary of a number as it stands in an address; RunError where there is none."""
        found = self._at(number)
        if not isinstance(found, Pages):
            raise RunError(f"{found.name} has no dictionary yet")
        return found

    def _at(self, number: object) -> Pages | Training:
        text = str(number)
        if not text.isdecimal() or len(text) > 4 or int(text) >= len(self.shown):
            raise RunError(f"there is no dictionary {text[:20]}")
        return self.shown[int(text)]

    async def ask(self, request: Request) -> Response:
        """A question with a JSON body, answered in a thread."""
        question = self.questions.get(request.path_params["what"])
        if question is None:
            return _missing()
        try:
            body = json.loads(await _body(request))
            if not isinstance(body, dict):
                raise RunError("expected a JSON object")
            answer = await run_in_threadpool(question, body)
        except (SAEError, ValueError, KeyError, TypeError) as error:
            said = str(error) if isinstance(error, SAEError) else f"not understood: {error!r}"[:200]
            return JSONResponse({"error": said}, 400, HEADERS)
        return JSONResponse(answer, 200, HEADERS)

    def label(self, body: dict[str, Any]) -> dict[str, Any]:
        """Give a feature a label of a person, or take it away where the text is empty."""
        pages, feature, text = self.pages(body["dictionary"]), body["feature"], body["text"]
        if pages.run is None:
            raise RunError("this dictionary is not in a run; labels are kept in a run's folder")
        if type(feature) is not int or not 0 <= feature < pages.d_sae or not isinstance(text, str):
            raise RunError(f"there is no feature {feature!r:.40}")
        label = Label(text) if text.strip() else None
        labels.write(pages.run, pages.manifest["sae_sha256"], feature, label)
        given = pages.dictionary.labels().get(feature)
        return {"text": given.text if given else None}

    def search(self, body: dict[str, Any]) -> dict[str, Any]:
        """The features that mention a text."""
        text = body["text"]
        if not isinstance(text, str) or len(text) > 1000:
            raise RunError("search for a text of at most 1,000 characters")
        wanted = text.encode(errors="replace").decode()
        folder = self.pages(body["dictionary"]).folder
        return {"features": mentions(folder, wanted, examples=body.get("examples") is True)}

    def export(self, body: dict[str, Any]) -> dict[str, Any]:
        """The numbers and labels of some features as a Parquet file, in their order."""
        columns = ["feature", "n_fired", *NUMBERS, "label"]
        table = self.pages(body["dictionary"]).dictionary.table(columns)
        place = {feature: i for i, feature in enumerate(table["feature"].to_pylist())}
        chosen = [place[feature] for feature in body["features"]]
        file = io.BytesIO()
        pq.write_table(table.take(pa.array(chosen, pa.int64())), file)
        return {"parquet": base64.b64encode(file.getvalue()).decode()}

    def read(self, body: dict[str, Any]) -> dict[str, Any]:
        """A text's tokens with their strongest features."""
        text = _text(body)
        with self._probe(body) as probe:
            found = probe.read(text, FEATURES_PER_TOKEN)
        return {"tokens": [[r.piece, r.features] for r in found]}

    def steer(self, body: dict[str, Any]) -> dict[str, Any]:
        """How the model goes on with a text: as it is, and with some features changed."""
        text = _text(body)
        changes = {
            int(c["feature"]): Change(_finite(c["scale"]), _finite(c["add"]))
            for c in body["changes"]
        }
        how: Any = {
            "tokens": int(body["tokens"]),
            "temperature": _finite(body["temperature"]),
            "seed": int(body["seed"]) % 2**32,
        }
        with self._probe(body) as probe:
            sides = {"plain": {}, "changed": changes}
            found = {name: probe.steer(text, own, **how) for name, own in sides.items()}
        return {name: asdict(continuation) for name, continuation in found.items()}

    @contextmanager
    def _probe(self, body: dict[str, Any]) -> Iterator[Probe]:
        """The loaded model of a dictionary, for one question at a time."""
        pages = self.pages(body["dictionary"])
        if self._probe_of is None or pages.run is None:
            raise RunError("this dictionary is not in a run, so its model is not known")
        with self._asking:
            if pages not in self._probes:
                self._probes[pages] = self._probe_of(pages)
            yield self._probes[pages]


def app(
    shown: Sequence[Pages | Training],
    port: int,
    token: str | None = None,
    probe_of: ProbeOf | None = None,
) -> ASGIApp:
    """The server as an ASGI application that answers to `port` of this machine."""
    token = token or secrets.token_urlsafe(32)
    return _guarded(Site(shown, token, probe_of), port)


def _guarded(site: Site, port: int) -> ASGIApp:
    routes = [
        Route("/", site.index),
        Route("/assets/{name}", site.asset),
        Route("/data/{key:path}", site.data),
        Route("/api/{what}", site.ask, methods=["POST"]),
    ]
    routed = Starlette(routes=routes, exception_handlers={404: _lost, 405: _lost})
    return Guard(routed, site.token, port)


def open_socket(port: int | None = None) -> socket.socket:
    """A listening socket on 127.0.0.1: at `port`, or at PORT or the next free one.

    Raises RunError where `port` is taken.
    """
    for candidate in [port] if port is not None else [*range(PORT, PORT + 50), 0]:
        # asyncio sends at once only what it knows to be TCP; else every answer on a connection that
        # is used again waits 40 ms for the acknowledgement of its head.
        listening = socket.socket(proto=socket.IPPROTO_TCP)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((HOST, candidate))
            listening.listen()  # a browser opened at once waits, instead of being refused
            return listening
        except (OSError, OverflowError):
            listening.close()
    raise RunError(f"--port {port}: it is taken or not allowed; give another, or leave it out")


def serve(
    shown: Sequence[Pages | Training], listening: socket.socket, probe_of: ProbeOf | None = None
) -> None:
    """Answer until Ctrl-C; `probe_of` loads a model when it is first asked for."""
    site = Site(shown, secrets.token_urlsafe(32), probe_of)
    port = listening.getsockname()[1]
    Thread(target=site.warm, daemon=True).start()
    settings = uvicorn.Config(
        _guarded(site, port), log_level="warning", access_log=False, lifespan="off",
        server_header=False, ws="none", timeout_graceful_shutdown=2,
    )  # fmt: skip
    uvicorn.Server(settings).run(sockets=[listening])


def _text(body: dict[str, Any]) -> str:
    text = body["text"]
    if not isinstance(text, str) or not 0 < len(text) <= TEXT_CHARACTERS:
        raise RunError(f"give a text of 1 to {TEXT_CHARACTERS:,} characters")
    return text.encode(errors="replace").decode()


def _finite(value: Any) -> float:
    number = float(value)
    if not abs(number) < 1e6:
        raise RunError(f"{value!r:.40} is no number to change a feature by")
    return number


async def _body(request: Request) -> bytes:
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > BODY_BYTES:
            raise RunError(f"the request has more than {BODY_BYTES:,} bytes")
    return body


def _missing() -> Response:
    return Response("not here", 404, HEADERS, "text/plain")


async def _lost(request: Request, error: Exception) -> Response:
    return _missing()
