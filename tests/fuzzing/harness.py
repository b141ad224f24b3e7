"""Cases in processes of their own: what each came to, and what no file may do.

A process that has imported audiot makes the specimens of a kind, then forks for every case. So a crash, a hang or a lack of
memory is the case's own, and a case costs what its reader costs.
"""

from __future__ import annotations

import contextlib
import faulthandler
import io
import json
import os
import random
import resource
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

HANGS_S = 60  # a case that takes longer hangs: on an idle core the slowest takes some seconds
MEMORY = 2 * 2**30  # bytes beyond what the imported libraries have
LARGEST_FILE = 2**28  # bytes
LONGEST_LINE = 2000  # characters of a message
OUTSIDE = "outside"  # a file beside a case's folder, which nothing may change
RUNS = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.startfile", "subprocess.Popen", "pty.spawn")
REACHES = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "urllib.Request", "http.client.connect")
CHANGES = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod", "shutil.rmtree")


class Forbidden(BaseException):
    """What a case did and may not: no handler of errors catches it."""


class Watch:
    """Looks at what the process does, from the moment it is armed.

    Args:
        caches: Where libraries may write at any time.
    """

    def __init__(self, caches):
        caches.mkdir()
        self.caches = os.path.realpath(caches)
        self.home = None
        self.seen = []
        sys.addaudithook(self._look)

    def arm(self, home):
        self.home = os.path.realpath(home)

    def _look(self, event, arguments):
        if self.home is None:
            return
        if event in RUNS or event in REACHES:
            self._refuse(f"{event}{arguments!r:.200}")
        elif event == "open":
            path, mode, flags = arguments
            writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC) if mode is None else set(mode) & set("wax+")
            if writes:
                self._check(event, path)
        elif event in CHANGES:
            for path in arguments[: 2 if event in ("os.rename", "os.link") else 1]:
                self._check(event, path)

    def _check(self, event, path):
        if isinstance(path, int):
            return
        place = os.path.realpath(os.fsdecode(path))
        allowed = (self.home, self.caches, "/dev", "/proc/self")
        if not any(place == root or place.startswith(root + os.sep) for root in allowed):
            self._refuse(f"{event} {place}")

    def _refuse(self, what):
        self.seen.append(what)
        raise Forbidden(what)


def run_case(kind, number, folder, watch):
    """One case, in this process: writes the damaged files, reads them as a command does. Gives a dict with its ``fate``."""
    from audiot.commands.launch import one_line_errors, quieten_libraries

    home = folder / "home"
    home.mkdir()
    (folder / OUTSIDE).write_text("as it was\n")
    os.chdir(home)
    case = kind.plant(random.Random(f"{kind.name} {number}"), home, number)
    out, err = io.StringIO(), io.StringIO()
    result = {"what": case.what}
    tempfile.tempdir = str(home)
    os.environ["TMPDIR"] = str(home)
    watch.arm(home)
    fates = {}
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
            quieten_libraries()
            with one_line_errors(debug=False):
                found = case.read()
        fates = found if isinstance(found, dict) else {}
        result["fate"] = "accepted"
    except SystemExit as stop:
        result |= {"fate": "rejected", "message": stop.code if isinstance(stop.code, str) else err.getvalue().strip()}
    except BaseException:
        result |= {"fate": "fault", "why": "an error that no command turns into a line", "trace": traceback.format_exc()}
    result["fates"] = fates
    why = None
    if watch.seen:
        why = f"it did what no file may: {'; '.join(watch.seen[:3])}"
    elif any(home.rglob("fired")):
        why = "something in it was run"
    elif (folder / OUTSIDE).read_text() != "as it was\n":
        why = "a file outside was changed"
    elif "Traceback (most recent call last)" in out.getvalue() + err.getvalue():
        why = "a traceback was printed"
        result["trace"] = err.getvalue()[-3000:]
    elif result["fate"] == "rejected":
        why = wrong_with(result["message"], case)
    if why and (result["fate"] != "fault" or watch.seen):
        result |= {"fate": "fault", "why": why}
    return result


def wrong_with(message, case):
    """What keeps a refusal from being a clear line; None if nothing does."""
    text = message.removeprefix("audiot: error: ")
    if text == message:
        return "its refusal is not a command's"
    if not text.strip() or "Traceback" in text:
        return "its refusal says nothing"
    if len(text.splitlines()) > 1 + case.lines:
        return "its refusal takes several lines"
    if len(text) > LONGEST_LINE:
        return f"its refusal takes {len(text):,} characters"
    if not any(name in text for name in case.names):
        return f"its refusal names none of {', '.join(case.names)}"
    return None


def serve(wanted, folder):
    """Run cases one after the other, and print each outcome as a line of JSON.

    Args:
        wanted: Name of each kind → the numbers of its cases.
        folder: An empty folder.
    """
    sys.dont_write_bytecode = True
    watch = Watch(folder / "caches")
    os.environ |= dict.fromkeys(("HOME", "MPLCONFIGDIR"), str(watch.caches)) | {"WANDB_MODE": "disabled"}
    from fuzzing.kinds import KINDS

    for name, numbers in wanted.items():
        (folder / name).mkdir()
        serve_kind(KINDS[name], folder / name, numbers, watch)


def serve_kind(kind, folder, numbers, watch):
    """Make the specimens of a kind, and run its cases."""
    home = folder / "home"  # one path for all cases: what is prepared holds where its sources are
    home.mkdir()
    os.chdir(home)
    kind.make()
    os.chdir(folder)
    kind.folder = home.rename(folder / "specimens")
    waiting = [numbers[at : at + kind.together] for at in range(0, len(numbers), kind.together)]
    while waiting:
        batch = waiting.pop(0)
        kind.batch = batch
        outcome = forked(kind, batch[0], folder, watch)
        if outcome["fate"] == "fault" and len(batch) > 1:  # which of them?
            waiting = [[number] for number in batch] + waiting
            continue
        fates = outcome.pop("fates", {})
        for number in batch:
            own = outcome | fates.get(str(number), {})
            print(json.dumps({"kind": kind.name, "number": number} | own), flush=True)


def forked(kind, number, folder, watch):
    """The outcome of a case in a process of its own."""
    trace = folder / "hang.txt"
    read, write = os.pipe()
    sys.stdout.flush()
    process = os.fork()
    if process == 0:
        os.close(read)
        os.setsid()
        code = 1
        try:
            with trace.open("w") as stream:
                faulthandler.dump_traceback_later(HANGS_S - 5, file=stream)
                _limit()
                result = run_case(kind, number, folder, watch)
                watch.home = None
                faulthandler.cancel_dump_traceback_later()
            with open(write, "w", closefd=False) as stream:
                stream.write(json.dumps(result))
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(write)
    begin = time.monotonic()
    text = _all(read, HANGS_S)
    hung = text is None
    if hung:
        os.killpg(process, signal.SIGKILL)
    _, status, usage = os.wait4(process, 0)
    with contextlib.suppress(ProcessLookupError):  # what it started and left
        os.killpg(process, signal.SIGKILL)
    shutil.rmtree(folder / "home", ignore_errors=True)
    if hung:
        result = {"fate": "fault", "why": f"it takes longer than {HANGS_S} s", "trace": trace.read_text()}
    elif not text:
        result = {"fate": "fault", "why": f"the process died ({os.waitstatus_to_exitcode(status)})"}
    else:
        result = json.loads(text)
    return result | {"mb": usage.ru_maxrss // 1024, "s": round(time.monotonic() - begin, 2)}


def _all(descriptor, seconds):
    """All that comes through a pipe; None if it stays open too long."""
    until, found = time.monotonic() + seconds, b""
    with open(descriptor, "rb", buffering=0) as stream:
        while True:
            ready, _, _ = select.select([stream], [], [], max(0, until - time.monotonic()))
            if not ready:
                return None
            piece = stream.read(2**16)
            if not piece:
                return found.decode()
            found += piece


def _limit():
    """Bound memory, files and time of this process."""
    with open("/proc/self/statm") as stream:
        now = int(stream.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, now + MEMORY))
    resource.setrlimit(resource.RLIMIT_FSIZE, (LARGEST_FILE, LARGEST_FILE))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def outcomes(wanted, folder):
    """The outcome of each case, from a process that ends with the call. Arguments are those of `serve`."""
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "MALLOC_ARENA_MAX": "2",  # each further one takes 64 MiB of addresses
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")]),
    }
    cases = json.dumps({kind: [*numbers] for kind, numbers in wanted.items()})
    command = [sys.executable, "-m", "fuzzing.harness", str(folder), cases]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, check=False)
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"kind"')]
    if done.returncode or len(found) < sum(map(len, wanted.values())):
        raise RuntimeError(f"after {len(found)} cases: {done.stderr[-3000:]}")
    return found


if __name__ == "__main__":
    serve(json.loads(sys.argv[2]), Path(sys.argv[1]).absolute())
