"""``audiot serve RUN``: a web page and a JSON API of a fine-tuned model."""

from __future__ import annotations

import argparse
import signal
import socket
import sys
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

MOST_CONNECTIONS = 100
GOODBYE_S = 5  # for the answers that are on their way when it ends


def main(options: argparse.Namespace) -> None:
    """Serve until Ctrl-C or SIGTERM."""
    uvicorn = _uvicorn()
    listening = _bound(options.host, options.port)  # tells what is wrong before the model is loaded
    from audiot.downstream.classifier import load_classifier
    from audiot.serving.answering import Answering, Limits
    from audiot.serving.app import serving_app

    limits = Limits(round(options.max_mb * 10**6), options.max_s, options.timeout_s, options.queue)
    classifier = load_classifier(options.run, options.device, options.trust)
    answering = Answering(classifier, limits, options.silence_dbfs)
    app = serving_app(answering, Path(options.run).resolve().name, [options.host, *options.allow_host], _log)
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        ws="none",
        lifespan="off",
        proxy_headers=False,
        limit_concurrency=MOST_CONNECTIONS,
        timeout_graceful_shutdown=GOODBYE_S,
    )
    listening.listen()
    host, port = listening.getsockname()[:2]
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    print(f"model   {options.run} on {classifier.device}, one file at a time")
    sizes = f"{options.max_mb:g} MB, {options.max_s:g} s of audio, {options.timeout_s:g} s a request"
    print(f"limits  {sizes}, {options.queue} requests at a time")
    if host in ("0.0.0.0", "::"):
        print("open    every machine that reaches this one can use it, without a password or encryption")
    print(f"next:   open http://{shown}:{port} in a browser, or curl -F file=@recording.wav http://{shown}:{port}/predict")
    print("Ctrl-C ends", flush=True)
    before = signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGINT))  # ends it as Ctrl-C does
    try:
        with suppress(KeyboardInterrupt):  # uvicorn ends in good order, and raises it again
            uvicorn.Server(config).run(sockets=[listening])
    finally:
        signal.signal(signal.SIGTERM, before)
        answering.close()
    print("ended")


def _uvicorn() -> Any:
    try:
        import fastapi  # noqa: F401 - told here, in one line
        import python_multipart  # noqa: F401
        import uvicorn
    except ImportError as error:
        message = "audiot serve needs fastapi, uvicorn and python-multipart: pip install 'audiot[serve]'"
        raise ModuleNotFoundError(message, name=error.name) from error
    return uvicorn


def _bound(host: str, port: int) -> socket.socket:
    """A socket of the address that does not listen yet."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        bound = socket.socket(family, kind, protocol)
        try:
            if sys.platform != "win32":  # there it would share the port
                bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
        except BaseException:
            bound.close()
            raise
    except (OSError, OverflowError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(
            f"can't serve at {host}, port {port}: {reason}; choose another --port (0: a free one) or --host"
        ) from None
    return bound


def _log(line: str) -> None:
    print(f"{datetime.now():%H:%M:%S}  {line}", flush=True)
