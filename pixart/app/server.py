"""Serving the page: addresses, passwords, limits, and what may be asked for. Nothing is loaded from elsewhere."""

import hmac
import os
import re
import signal
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from pixart.app.drawing import Store
from pixart.app.events import Events
from pixart.app.models import Models, Shelf
from pixart.app.page import STYLE, build_page
from pixart.app.settings import Limits
from pixart.app.worker import Pool
from pixart.errors import InputError, missing_extra

LOOPBACK = ("127.0.0.1", "localhost", "::1")
UPLOAD = 64 << 20  # bytes of one request
# seconds between two looks of Gradio's queue for work, and for the progress of functions, which the page does not use:
# its own 0.001 and 0.01 take some 6 % of a core from what is being drawn
IDLE, PROGRESS = 0.05, 1.0
# what the page itself asks for, after /gradio_api/; all other of Gradio's addresses are refused
ASKED = re.compile(
    r"(queue/(join|data)|run/\w+|call/\w+(/\w+)?|cancel|reset|upload|upload_progress|heartbeat/\w+|startup-events|info|"
    r"config|theme\.css|user|login_check|token|app_id|file=(?!https?:).*)/?"
)
PLAIN = re.compile(
    r"/|/(config|theme\.css|login|logout|favicon\.ico|manifest\.json|robots\.txt)/?|/(assets|static|svelte)/.*"
)
# Gradio's page has scripts of its own within it, and compiles templates
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; worker-src 'self' blob:; "
    "object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'self'"
)
ELSEWHERE = re.compile(rb"""<(?:meta|link|script)\b[^>]*?["']https?://[^>]*>(?:\s*</script>)?""", re.IGNORECASE)


@dataclass(frozen=True)
class Address:
    """Where the page listens, and who may see it."""

    host: str = "127.0.0.1"
    port: int = 7860
    password: str | None = None

    @property
    def local(self) -> bool:
        return self.host in LOOPBACK


def read_password(path: str | Path) -> str:
    """The first line of a file.

    Raises:
        InputError: it cannot be read, or has none.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise InputError(f"password file {path}: cannot be read ({error})") from None
    if not lines or not lines[0].strip():
        raise InputError(f"password file {path}: its first line is empty; write the password there")
    return lines[0].strip()


def bind(address: Address) -> socket.socket:
    """A socket that listens there.

    Raises:
        InputError: the port is in use, or the address is not one of this machine.
    """
    try:
        family = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address.host, address.port))
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"port {address.port} of {address.host}: {reason}; take another with --port") from None
    return listener


def make_app(
    models: Models, shelves: Sequence[Shelf], address: Address, limits: Limits, home: Path
) -> tuple[Callable, Pool]:
    """The page as an ASGI application, and the pool that draws for it; to be closed in the end.

    Args:
        shelves: the loaded models of each device; one worker each.
        home: a temporary folder; no other file is written, or served.

    Raises:
        InputError: gradio is not installed.
    """
    # read by gradio: no reports, nothing kept in the browser, and its files within `home`
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_RUN_HISTORY": "False", "GRADIO_TEMP_DIR": str(home)}
    try:
        import gradio as gr
        from fastapi import FastAPI
    except ImportError:
        raise missing_extra("gradio", "app", "the page") from None
    pool = Pool(shelves)
    page = build_page(models, Events(models, pool, Store(home), limits), limits)
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    auth = None if address.password is None else lambda _user, given: _same(given, address.password)
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    gr.mount_gradio_app(
        app, page, path="/", auth=auth, auth_message="Any user name, and the password of --password-file",
        show_error=True, max_file_size=UPLOAD, ssr_mode=False, footer_links=[], mcp_server=False,
        theme=gr.themes.Default(**fonts), css=STYLE,
    )  # fmt: skip
    page._queue.sleep_when_free, page._queue.progress_update_sleep_when_free = IDLE, PROGRESS
    return Guard(app, hosts=LOOPBACK if address.local else None), pool


def serve(
    models: Models,
    shelves: Sequence[Shelf],
    address: Address,
    limits: Limits,
    say: Callable[[str], None] = print,
) -> None:
    """Serve the page until the process is interrupted.

    Raises:
        InputError: as in `bind` and `make_app`.
    """
    listener = bind(address)
    with _ended_in_order(), tempfile.TemporaryDirectory(prefix="pixart-app-") as home, listener:
        app, pool = make_app(models, shelves, address, limits, Path(home))
        import uvicorn

        if not address.local and address.password is None:
            say("warning: whoever reaches this address can draw; --password-file asks for a password")
        shown = f"[{address.host}]" if ":" in address.host else address.host
        say(f"the page is at http://{shown}:{listener.getsockname()[1]} (Ctrl+C ends it)")
        config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=2)
        try:
            uvicorn.Server(config).run(sockets=[listener])
        finally:
            pool.close()


@contextmanager
def _ended_in_order() -> Iterator[None]:
    """A context in which SIGTERM (of `docker stop`) and SIGHUP (of a closed terminal) end the process as Ctrl+C does:
    no images are left behind. In a thread the surrounding program decides what a signal means."""
    numbers = (getattr(signal, name, None) for name in ("SIGTERM", "SIGHUP"))
    main = threading.current_thread() is threading.main_thread()
    before = {n: signal.getsignal(n) for n in numbers if main and n and signal.getsignal(n) is not signal.SIG_IGN}

    def end(number: int, _frame) -> None:
        raise SystemExit(128 + number)

    for number in before:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Guard:
    """Refuses requests that the page does not make, and keeps browsers from loading anything from elsewhere.

    Args:
        hosts: names by which the page may be reached. For a local page these are the local ones: a website that
            resolves its own name to this machine (DNS rebinding) gets nothing.
    """

    def __init__(self, app: Callable, hosts: Sequence[str] | None):
        self.app, self.hosts = app, hosts

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return  # no web sockets
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        if refused := self.refuse(scope["path"], headers):
            await _answer(send, *refused)
            return
        left, refused = UPLOAD, False

        async def limited():
            nonlocal left, refused
            message = await receive()
            left -= len(message.get("body", b""))
            if left < 0 and not refused:
                refused = True
                await _answer(send, 413, f"more than {UPLOAD} bytes")
            return {"type": "http.disconnect"} if refused else message

        async def answer(message):
            if not refused:
                await send(message)

        await self.app(scope, limited, Rewriter(answer))

    def refuse(self, path: str, headers: dict[bytes, str]) -> tuple[int, str] | None:
        """Status and reason if a request is not taken."""
        name = re.sub(r":\d+$", "", headers.get(b"host", "")).strip("[]").lower()
        if self.hosts is not None and name not in self.hosts:
            return 403, "this page is for this machine only; see --host"
        length = headers.get(b"content-length", "0")
        if not length.isdecimal() or int(length) > UPLOAD:
            return 413, f"more than {UPLOAD} bytes"
        plain, api = path, path.removeprefix("/gradio_api/")
        while (decoded := unquote(plain)) != plain:
            plain = decoded
        if "\0" in plain or ".." in plain.replace("\\", "/").split("/"):
            return 403, "no such address"
        known = PLAIN.fullmatch(path) if api == path else ASKED.fullmatch(api)
        return None if known else (404, "no such address")


class Rewriter:
    """Sends an answer with the page's policy; what HTML refers to on other hosts is taken out."""

    def __init__(self, send: Callable):
        self.send, self.start, self.body = send, None, b""

    async def __call__(self, message) -> None:
        if message["type"] == "http.response.start":
            headers = [(n, v) for n, v in message["headers"] if n.lower() != b"server"]
            headers += [(n.encode(), v.encode()) for n, v in SAFETY.items()]
            message = {**message, "headers": headers}
            if any(n.lower() == b"content-type" and b"text/html" in v for n, v in headers):
                self.start = message
                return
        elif self.start is not None and message["type"] == "http.response.body":
            self.body += message.get("body", b"")
            if message.get("more_body"):
                return
            body = ELSEWHERE.sub(b"", self.body)
            headers = [(n, v) for n, v in self.start["headers"] if n.lower() != b"content-length"]
            await self.send({**self.start, "headers": [*headers, (b"content-length", str(len(body)).encode())]})
            message = {"type": "http.response.body", "body": body}
        await self.send(message)


SAFETY = {
    "content-security-policy": POLICY,
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


async def _answer(send: Callable, status: int, text: str) -> None:
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": text.encode()})


def _same(given: str, password: str) -> bool:
    return hmac.compare_digest(given.encode(), password.encode())
