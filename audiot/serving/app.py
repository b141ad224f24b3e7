"""The web page and the JSON API of a fine-tuned model, as an ASGI application."""

from __future__ import annotations

import asyncio
import ipaddress
import shutil
import time
from collections.abc import Callable, Collection
from html import escape
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Annotated, Any
from urllib.parse import urlsplit

import anyio
from fastapi import FastAPI, HTTPException, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from starlette.datastructures import Headers, MutableHeaders, UploadFile
from starlette.exceptions import HTTPException as AnyHTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from audiot.data.audio import BadAudioError
from audiot.serving.answering import TAKEN, Answering, Late, Question

FORM_BYTES = 2**14  # of a form around its file
LONGEST_NAME = 200
KINDS = {
    "label": "A label of each recording",
    "slots": "A label of each recording for every slot",
    "segments": "Labels along each recording",
    "text": "The transcript of each recording",
    "embedding": "How alike the speakers of recordings are",
}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "media-src blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Permissions-Policy": "microphone=(self)",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}


def serving_app(answering: Answering, name: str, hosts: Collection[str], log: Callable[[str], None]) -> ASGIApp:
    """An application that answers ``GET /``, ``GET /health`` and ``POST /predict``.

    Args:
        answering: What predicts.
        name: Name of the model, for readers.
        hosts: Names by which the server may be called, besides localhost and addresses of numbers.
        log: A function that is called with a line for each prediction.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)  # its pages would be fetched from elsewhere
    classifier, limits = answering.classifier, answering.limits
    page = _page(answering, name)

    @app.get("/")
    async def index() -> Response:
        return HTMLResponse(page)

    @app.get("/page.css")
    async def style() -> Response:
        return Response(_content("page.css"), media_type="text/css")

    @app.get("/page.js")
    async def script() -> Response:
        return Response(_content("page.js"), media_type="text/javascript")

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {
            "status": "ok",
            "model": name,
            "gives": answering.kind,
            "classes": len(classifier.classes),
            "sample_rate": classifier.sample_rate,
            "device": str(classifier.device),
            "max_mb": limits.max_bytes / 10**6,
            "max_s": limits.max_s,
            "timeout_s": limits.timeout_s,
            "audiot": version("audiot"),
        }

    @app.post("/predict")
    async def predict(
        request: Request,
        top: Annotated[int, Query(ge=1)] = 5,
        spectrogram: Annotated[int | None, Query(ge=240, le=4000)] = None,
    ) -> Response:
        began = time.monotonic()
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "multipart/form-data":
            raise HTTPException(415, "send the file as a form: curl -F file=@recording.wav …/predict")
        if not answering.take_place():
            raise HTTPException(503, f"{limits.queue} requests are at work or wait already: try again soon", {"Retry-After": "2"})
        job, path = None, answering.new_path()
        try:
            with anyio.fail_after(limits.timeout_s):
                called = await _received(request, limits.max_bytes, path)
                job = answering.submit(Question(path, called, top, spectrogram, began + limits.timeout_s))
                row = await asyncio.wrap_future(job)
        except (TimeoutError, Late):
            raise HTTPException(504, f"no answer within {limits.timeout_s:g} s: send a shorter file, or try again") from None
        except BadAudioError as error:
            raise HTTPException(422, str(error)) from None
        except ClientDisconnect:
            raise HTTPException(400, "the upload broke off") from None
        except OSError as error:
            raise HTTPException(507, f"the server can't keep the file: {error.strerror}") from error
        finally:
            if job is None:
                answering.leave_place()
                path.unlink(missing_ok=True)
        log(f"200  {row['seconds']:.2f} s of audio in {time.monotonic() - began:.2f} s")
        return JSONResponse(row)

    @app.exception_handler(AnyHTTPException)
    async def refuse(request: Request, error: AnyHTTPException) -> Response:
        if request.url.path == "/predict":
            log(f"{error.status_code}  {_shown(error.detail)}")
        return JSONResponse({"error": error.detail}, error.status_code, error.headers)

    @app.exception_handler(RequestValidationError)
    async def refuse_arguments(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        return JSONResponse({"error": f"{first['loc'][-1]}: {first['msg']}, found {_shown(str(first['input']))}"}, 422)

    @app.exception_handler(Exception)
    async def fail(request: Request, error: Exception) -> Response:
        return JSONResponse({"error": "the server failed; what it printed says why"}, 500)  # the trace is printed there

    return Guard(app, hosts)


async def _received(request: Request, max_bytes: int, path: Path) -> str:
    """Write the upload of a form to a path, and say what its sender calls it. More than its limit is not read."""
    too_large = HTTPException(413, f"the file is larger than the {max_bytes / 10**6:g} MB that are taken here")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > max_bytes + FORM_BYTES:
        raise too_large
    count = 0

    async def receive() -> Message:
        nonlocal count
        message = await request.receive()
        count += len(message.get("body", b""))
        if count > max_bytes + FORM_BYTES:
            raise too_large
        return message

    async with Request(request.scope, receive).form(max_files=1, max_fields=1, max_part_size=FORM_BYTES) as form:
        upload = form.get("file")
        if not isinstance(upload, UploadFile):
            raise HTTPException(422, "the form has no file in its field 'file': curl -F file=@recording.wav …/predict")
        if (upload.size or 0) > max_bytes:
            raise too_large
        await anyio.to_thread.run_sync(_copy, upload, path)
    return _shown((upload.filename or "").replace("\\", "/").rpartition("/")[2])


def _copy(upload: UploadFile, path: Path) -> None:
    with path.open("xb") as stream:
        shutil.copyfileobj(upload.file, stream)


def _shown(text: str) -> str:
    """A client's text for a terminal or a page: printable, and not long."""
    return "".join(letter if letter.isprintable() else "·" for letter in text)[:LONGEST_NAME]


def _content(name: str) -> str:
    return files("audiot.serving").joinpath(name).read_text(encoding="utf-8")


def _page(answering: Answering, name: str) -> str:
    limits, classifier = answering.limits, answering.classifier
    is_open = answering.kind == "embedding"  # its classes are those of training
    facts = [KINDS[answering.kind], *([] if is_open else [f"{len(classifier.classes):,}\N{NO-BREAK SPACE}classes"])]
    return Template(_content("page.html")).substitute(
        title=escape(name),
        facts=escape(" · ".join([*facts, f"{classifier.sample_rate:,}\N{NO-BREAK SPACE}Hz", str(classifier.device)])),
        taken=escape(TAKEN),
        max_mb=f"{limits.max_bytes / 10**6:g}",
        max_bytes=limits.max_bytes,
        max_s=f"{limits.max_s:g}",
    )


class Guard:
    """Refuses requests that other web pages make through a visitor's browser, and sets the headers of all answers.

    A page of another site may send requests to this machine (CSRF), or give itself this machine's address (DNS rebinding). The
    first has another ``Origin``, the second a name as ``Host`` that is not the server's. Addresses of numbers can't be rebound.

    Args:
        app: The application.
        hosts: Names by which the server may be called, besides localhost and addresses of numbers.
    """

    def __init__(self, app: ASGIApp, hosts: Collection[str]) -> None:
        self.app = app
        self.hosts = {"localhost", *(host.lower() for host in hosts)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, as ASGI has it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        refusal = self._refusal(scope["method"], Headers(scope=scope))
        await (self.app if refusal is None else refusal)(scope, receive, send_guarded)

    def _refusal(self, method: str, headers: Headers) -> Response | None:
        host = headers.getlist("host")
        if len(host) != 1 or not self._is_ours(host[0]):
            named = _shown(host[0]) if host else "nothing"
            words = f"this server is not called {named}: give it --allow-host NAME, or use its address"
            return JSONResponse({"error": words}, 421)
        origin = headers.get("origin", f"http://{host[0]}").lower()
        is_own = origin in (f"http://{host[0]}".lower(), f"https://{host[0]}".lower())  # TLS may end in front of this server
        if method in ("GET", "HEAD") or (is_own and headers.get("sec-fetch-site", "none") in ("none", "same-origin")):
            return None
        return JSONResponse({"error": "other sites may not ask this server"}, 403)

    def _is_ours(self, host: str) -> bool:
        try:
            name = (urlsplit(f"//{host}").hostname or "").rstrip(".")
            return name in self.hosts or bool(ipaddress.ip_address(name))
        except ValueError:
            return False
