"""A web server with ranges of bytes, which can be told to misbehave."""

from __future__ import annotations

import re
import socket
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Server(ThreadingHTTPServer):
    """Serves a folder with ranges of bytes. ``faults`` names what becomes of a file's next requests."""

    daemon_threads = True

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.faults = {}
        self.asked = Counter()
        self.sent = 0
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def root(self):
        return f"http://127.0.0.1:{self.server_port}/data"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def do_GET(self):
        name = self.path.rpartition("/")[2]
        self.server.asked[name] += 1
        planned = self.server.faults.get(name, [])
        fault = planned.pop(0) if planned else None
        path = self.server.folder / name
        if isinstance(fault, int):
            return self.answer(fault, b"")
        if not name:
            links = "".join(f'<a href="{each.name}">{each.name}</a>' for each in sorted(self.server.folder.iterdir()))
            return self.answer(200, links.encode())
        if not path.is_file():
            return self.answer(404, b"")
        data, status = path.read_bytes(), 200
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if found and fault != "whole":
            if int(found[1]) >= len(data):
                return self.answer(416, b"")
            data, status = data[int(found[1]) : int(found[2]) + 1], 206
        self.server.sent += len(data)
        return self.answer(status, data, fault)

    def answer(self, status, data, fault=None):
        self.send_response(status)
        self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if fault == "drop":
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
        else:
            self.wfile.write(data)
