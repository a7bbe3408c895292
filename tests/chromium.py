"""Pages of a small run in headless Chromium: served, static over HTTP, and from the disk.

Skips, saying why, where Chromium or Playwright is not there (`make install-browser` brings them).
"""

import functools
import importlib
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
NAMES = ("chromium", "chromium-browser", "chromium-headless-shell", "google-chrome")


def executable(own: str) -> str:
    """Where Chromium is: of this system, or Playwright's `own`; skips the test where it is not."""
    given = os.environ.get("SAE_CHROMIUM")
    found = given or next(filter(None, map(shutil.which, NAMES)), None)
    return found or (own if Path(own).exists() else missing("Chromium"))


def missing(name: str) -> Any:
    """Skip, saying why; where SAE_BROWSER_TESTS=required, fail."""
    reason = f"no {name} here: make install-browser"
    if os.environ.get("SAE_BROWSER_TESTS") == "required":
        pytest.fail(reason)
    pytest.skip(reason)


def wanted(module: str) -> Any:
    """A module that `make install` brings."""
    try:
        return importlib.import_module(module)
    except ImportError:
        return missing(module)


@contextmanager
def chromium() -> Iterator[Any]:
    """A headless browser."""
    api = wanted("playwright.sync_api")
    with api.sync_playwright() as playwright:
        path = executable(playwright.chromium.executable_path)
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


def until(holds: Callable[[], bool], seconds: float = 60) -> None:
    """Wait until something holds; the pages' policy forbids Playwright to wait inside them."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.02)


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""


@contextmanager
def http_server(folder: Path) -> Iterator[str]:
    """Any web server over a folder; yields its address."""
    handler = functools.partial(_Quiet, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


@contextmanager
def served(app_of: Any) -> Iterator[str]:
    """`app_of(port)` under uvicorn in a thread; yields its address."""
    import uvicorn

    from sae.browser.server import open_socket

    listening = open_socket(0)
    port = listening.getsockname()[1]
    config = uvicorn.Config(app_of(port), log_level="error", lifespan="off", ws="none")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    while not server.started:
        pass
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join(5)
    listening.close()
