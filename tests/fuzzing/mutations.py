"""Ways to damage a file. Each takes a generator of random numbers, so that a case is the same every time."""

from __future__ import annotations

import json
import os
import shutil

import canary

RAN = "fired"  # what a case leaves behind whose file was run
SHELL = f"touch {RAN}"

NUMBERS = (0, 1, -1, 0.5, 2, 1000, 2**31 - 1, 2**31, -(2**31), 2**32, 2**63, 10**30, 1e-30, 1e308, -1e308)
ODD_NUMBERS = (float("nan"), float("inf"), float("-inf"))
TEXTS = (
    "",
    " ",
    "x",
    "12",
    "nan",
    "null",
    "true",
    "é✓𝔸",
    "\u202eabc",
    "a\nb",
    "\r",
    "\x00",
    "\x1b[31m",
    "\ud800",
    "x" * 5000,
    "/nowhere/there",
    "../outside",
    "/dev/zero",
    "~",
    ".",
    "-rf",
    "%s%n",
    "a,b;c\td",
    '"',
)
CODE = (
    *canary.PAYLOADS,
    {"_target_": "os.system", "command": SHELL},
    {"_target_": "builtins.eval", "_args_": ["__import__('canary').fire()"]},
    {"_target_": "canary.fire", "_partial_": True},
    {"part": "os:system", "command": SHELL},
    {"part": "builtins:exec"},
    {"_partial_": True, "_target_": "subprocess.Popen"},
    "${oc.env:HOME}",
    "${oc.decode:${mark:}}",
    "${..}",
    "${x}",
    f"$({SHELL})",
    f"; {SHELL}",
    f"| {SHELL}",
    f"`{SHELL}`",
)
YAML = (
    "!!python/object/apply:canary.fire []",
    f'!!python/object/apply:os.system ["{SHELL}"]',
    "!!python/name:canary.fire",
    "&a [*a]",
    "*nowhere",
    "<<: {a: 1}",
    "2020-01-01",
    "0o17",
    "1_000",
    "12:30:45",
    "[" * 1000 + "]" * 1000,
    "{a: " * 1000 + "}" * 1000,
    "? [a]\n: b",
    "|\n  text",
    "@",
    "\t- x",
)
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{','.join(['*' + before] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


def payload(rng, code=True):
    """A value that does not belong where it is put."""
    kinds = [NUMBERS, ODD_NUMBERS, TEXTS, (None, True, False, [], {}, [[]], {"": 0}, [None, {}], list(range(50)))]
    return copied_tree(rng.choice(rng.choice([*kinds, CODE] if code else kinds)))


def copied_tree(value):
    """Its dicts and lists are copies; what stands in them is not: to copy a pickle that runs something would run it."""
    if isinstance(value, dict):
        return type(value)((key, copied_tree(each)) for key, each in value.items())
    return [copied_tree(each) for each in value] if isinstance(value, list) else value


def deep(depth, inner=1):
    """Lists in lists."""
    for _ in range(depth):
        inner = [inner]
    return inner


# Bytes


def truncate(rng, data):
    return data[: rng.randrange(len(data))] if data else data


def flip(rng, data):
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8, 64)) if data else 0):
        place = _place(rng, changed)
        changed[place] ^= 1 << rng.randrange(8)
    return bytes(changed)


def header(rng, data):
    """A field among the first bytes gets an extreme value."""
    size = rng.choice((1, 2, 4, 8))
    value = rng.choice((0, 1, 2 ** (8 * size) - 1, 2 ** (8 * size - 1) - 1, 2 ** (8 * size - 1), rng.randrange(2 ** (8 * size))))
    place = rng.randrange(max(1, min(len(data), rng.choice((16, 64, 256)))))
    return data[:place] + value.to_bytes(size, rng.choice(("little", "big"))) + data[place + size :]


def block(rng, data):
    """A block is zeroed, made random, deleted, doubled or moved."""
    size = min(len(data), rng.choice((1, 2, 4, 16, 100, 1000, 4096)))
    start, other = (_place(rng, data) for _ in range(2))
    piece = data[start : start + size]
    behind = data[start + size :]
    return rng.choice(
        (
            lambda: data[:start] + bytes(len(piece)) + behind,
            lambda: data[:start] + rng.randbytes(len(piece)) + behind,
            lambda: data[:start] + b"\xff" * len(piece) + behind,
            lambda: data[:start] + behind,
            lambda: data[:start] + piece * rng.choice((2, 3, 100)) + behind,
            lambda: data[:other] + piece + data[other:],
            lambda: data[:other] + piece + data[other + size :],
        )
    )()


def ends(rng, data):
    """Something stands before or behind."""
    noise = rng.randbytes(rng.choice((1, 3, 1000, 100_000)))
    junk = rng.choice((noise, bytes(5000), data, b"ID3\x04\x00\x00\x7f\x7f\x7f\x7f", b"\n"))
    return rng.choice((data + junk, junk + data))


def other(rng, data):
    """Something else altogether."""
    return rng.choice(
        (
            b"",
            b"\x00",
            b"hello\n",
            data[:4],
            data[:12],
            data[:100],
            bytes(len(data)),
            rng.randbytes(3000),
            data[::-1],
            b"\x1f\x8b\x08\x00" + data[:1000],
            b"PK\x03\x04" + data[:1000],
            b"<html><body>404 Not Found</body></html>",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n",
        )
    )


BYTES = (truncate, flip, flip, header, header, block, block, ends, other)


def mutated(rng, data):
    """Bytes that were damaged once, twice or three times."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        data = rng.choice(BYTES)(rng, data)
    return data


def _place(rng, data):
    """A place, among the first bytes as likely as not."""
    return rng.randrange(max(1, min(len(data), rng.choice((64, 1024, 2**30)))))


# Text


def text(rng, data, separators=",\t ", values=()):
    """Lines of text that were damaged.

    Args:
        rng: Random numbers.
        data: The file.
        separators: What stands between the fields of a line.
        values: More values that a field may get.
    """
    content = data.decode()
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        lines = content.splitlines(keepends=True) or [""]
        one, two = (rng.randrange(len(lines)) for _ in range(2))
        fields = (
            lines[one].rstrip("\n").split(separator := rng.choice([each for each in separators if each in lines[one]] or [" "]))
        )
        at, to = (rng.randrange(len(fields)) for _ in range(2))
        what = rng.randrange(12)
        if what == 0:
            del lines[one]
        elif what == 1:
            lines.insert(two, lines[one])
        elif what == 2:
            rng.shuffle(lines)
        elif what == 3:
            lines[one], lines[two] = lines[two], lines[one]
        elif what == 4:
            lines[one] = lines[one].rstrip("\n")
        elif what == 5:
            lines[one] = lines[one][: rng.randrange(len(lines[one]) + 1)]
        elif what == 6:
            lines = lines[: one + 1]
        else:
            if what == 7:
                fields[at], fields[to] = fields[to], fields[at]
            elif what == 8:
                del fields[at]
            elif what == 9:
                fields.insert(at, fields[to])
            else:
                fields[at] = str(rng.choice((*NUMBERS, *ODD_NUMBERS, *TEXTS, *TEXTS, *values)))
            lines[one] = separator.join(fields) + "\n"
        content = "".join(lines)
    return encoded(rng, content)


def encoded(rng, content):
    """Text as bytes: mostly UTF-8 as it should be, at times in another form."""
    plain = content.encode("utf-8", "surrogatepass")
    what = rng.randrange(30)
    if what == 0:
        return content.encode("utf-16", "surrogatepass")
    if what == 1:
        return b"\xef\xbb\xbf" + plain
    if what == 2:
        return plain.replace(b"\n", b"\r\n")
    if what == 3:
        return plain.replace(b"\n", b"\r")
    if what == 4:
        return content.encode("latin-1", "replace") + b"\xe9"
    if what == 5:
        return plain.replace(b"\n", b"\x00\n", 1)
    if what == 6:
        return mutated(rng, plain)
    return plain


# Trees of dicts, lists and values


def places(tree, path=()):
    """Every place of a tree below its top."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))


def tree(rng, content, values=()):
    """A damaged copy of a tree of dicts and lists.

    Args:
        rng: Random numbers.
        content: The tree, a dict or a list.
        values: More values that may be planted.
    """
    content = copied_tree(content)
    for _ in range(rng.choice((1, 1, 1, 1, 2))):
        there = list(places(content))
        if not there:
            return content
        *path, key = rng.choice(there)
        node = content
        for step in path:
            node = node[step]
        what = rng.randrange(12)
        if what == 0:
            del node[key]
        elif what == 1 and isinstance(node, dict):
            node[rng.choice((f"{key}s", "", "_target_", "part", "_recursive_", "trusted", " ", str(key).upper()))] = node[key]
        elif what == 2 and isinstance(node, list):
            node.extend(node * rng.choice((1, 20)))
        elif what == 3:
            node[key] = [node[key]]
        elif what == 4 and isinstance(node[key], (int, float)):
            node[key] = str(node[key])
        elif what == 5:
            *_, last = rng.choice(there)
            node[key] = copied_tree(node.get(last, node[key]) if isinstance(node, dict) else node[key])
        elif what == 6:
            node[key] = deep(rng.choice((3, 40, 300)))
        elif what == 7 and isinstance(node[key], (int, float)):
            node[key] = rng.choice((-node[key], node[key] * 1000, node[key] / 3, node[key] + 1, 0))
        elif what == 8 and values:
            node[key] = copied_tree(rng.choice(values))
        else:
            node[key] = payload(rng)
    return content


def as_json(rng, content):
    """A tree as the bytes of a JSON file."""
    return encoded(rng, json.dumps(content, indent=rng.choice((None, 2))))


# Files


def planted(rng, path, data):
    """Write a damaged file; now and then there is none, or something else in its place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    what = rng.randrange(40)
    if what == 0:
        return "missing"
    if what == 1:
        path.mkdir()
        return "a folder"
    if what == 2:
        os.mkfifo(path)
        return "a named pipe"
    if what == 3:
        to = rng.choice(("nowhere", path.name, "../outside", "/dev/zero", "/dev/null", ".."))
        path.symlink_to(to)
        return f"a link to {to}"
    path.write_bytes(data)
    return "written"


def copied(folder, to):
    """A copy of a specimen."""
    shutil.copytree(folder, to, symlinks=True, dirs_exist_ok=True)
