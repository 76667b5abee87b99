"""Damage to files: at random, and along the structure of each format. All of it follows from the generator given."""

import json
import random
import struct
from collections.abc import Callable, Iterator
from typing import Any

Damage = Callable[[random.Random, bytes], bytes]

EDGES = [0, 1, 2, 127, 128, 255, 256, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1]
PLACES = [
    "../../etc/passwd",
    "/etc/passwd",
    "..\\..\\x",
    "C:\\x",
    "\0",
    "\x1b[2J",
    "file:///etc/passwd",
    "~nobody/x",
    "a" * 70_000,
]


def raw(rng: random.Random, data: bytes) -> bytes:
    """Bits flipped; bytes overwritten, cut out, doubled, moved; the end missing; edge values in little-endian."""
    damaged = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 3, 8])):
        if not damaged:
            return bytes(rng.randbytes(rng.randrange(20)))
        at = rng.randrange(len(damaged)) if rng.random() < 0.5 else rng.randrange(min(len(damaged), 256))
        end = min(len(damaged), at + rng.choice([1, 2, 4, 8, 32, 1000]))
        match rng.randrange(9):
            case 0:
                damaged[at] ^= 1 << rng.randrange(8)
            case 1:
                damaged[at:end] = rng.randbytes(end - at)
            case 2:
                damaged[at:end] = bytes([rng.choice([0, 255])]) * (end - at)
            case 3:
                del damaged[at:]
            case 4:
                del damaged[at:end]
            case 5:
                damaged[at:at] = damaged[at:end] * rng.choice([1, 2, 50])
            case 6:
                elsewhere = rng.randrange(len(damaged))
                damaged[at:end] = damaged[elsewhere : elsewhere + rng.randrange(64)]
            case 7:
                width = rng.choice([1, 2, 4, 8])
                damaged[at : at + width] = (rng.choice(EDGES) % 256**width).to_bytes(width, "little")
            case 8:
                damaged += rng.randbytes(rng.randrange(1, 40))
    return bytes(damaged)


# JSON


class _Pairs(dict):
    """An object that names a key twice."""

    def items(self):  # type: ignore[override]
        found = list(super().items())
        return found + found[:1]


def json_text(rng: random.Random, data: bytes) -> bytes:
    """Values of other types and sizes, keys gone, renamed or twice; sometimes damage to the text as well."""
    value = json.loads(data)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        value = _changed(rng, value, value)
    text = json.dumps(value, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
    if rng.random() < 0.05:
        deep = rng.choice([100, 2_000, 200_000])
        text = text.replace(b"null", b"[" * deep + b"]" * deep, 1) if b"null" in text else b"[" * deep
    return raw(rng, text) if rng.random() < 0.1 else text


def _changed(rng: random.Random, value: Any, root: Any) -> Any:
    """`value` with one place in it changed."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        match rng.randrange(20):
            case 0:
                return {k: v for k, v in value.items() if k != key}
            case 1:
                return value | {rng.choice(["", "x", "\ud800", "__proto__", "a" * 5_000]): value[key]}
            case 2:
                return _Pairs(value)
        return {k: _changed(rng, v, root) if k == key else v for k, v in value.items()}
    if isinstance(value, list) and value and rng.random() < 0.8:
        at = rng.randrange(len(value))
        match rng.randrange(8):
            case 0:
                return value[:at] + value[at + 1 :]
            case 1:
                return value[: at + 1] * rng.choice([2, 3, 50])
        return [*value[:at], _changed(rng, value[at], root), *value[at + 1 :]]
    return _other(rng, value, root)


def _other(rng: random.Random, value: Any, root: Any) -> Any:
    if isinstance(value, int | float) and rng.random() < 0.4:
        return rng.choice([-value, value + 1, value - 1, value * 1000, value * 10**9, str(value), [value], value // 2])
    if isinstance(value, str) and rng.random() < 0.4:
        ours = [
            value * 2,
            value[:-1],
            value.upper(),
            f" {value}",
            value[:100] * 1_000,
            list(value[:1_000]),
            value + "\ud800",
        ]
        return rng.choice([*ours, *PLACES])
    kinds: list[Any] = [
        None, True, False, "", "x", "\ud800", "\0", "x" * 100_000, [], {}, [None], [[]], {"a": 1}, {"": {}}, 0.5, -0.5,
        0, -1, 1, 1e308, 1e-308, float("nan"), float("inf"), float("-inf"), 10**30, -(10**30), 10**400, [0] * 5_000,
        [float("nan")], {"content": 1}, {"content": "x" * 10_000}, *EDGES, *PLACES,
    ]  # fmt: skip
    return _some_node(rng, root) if rng.random() < 0.1 else rng.choice(kinds)


def _some_node(rng: random.Random, value: Any) -> Any:
    while isinstance(value, dict | list) and value and rng.random() < 0.8:
        value = rng.choice(list(value.values()) if isinstance(value, dict) else value)
    return value


# TOML

_TOML = [
    "true", "-1", "0", "1", "9223372036854775808", "1e400", "nan", "-inf", "0.5", '""', '"x"', '"\\u0000"', "[]", "{}",
    "[[]]", "1979-05-27T07:32:00Z", "07:32:00", '"../../x"', '"~nobody/x"', '"hf://"', '"hf://a/b@c"', '"file:///x"', '["x", 1]',
    '{ name = "cosine" }', "{ a = { b = 1 } }", "9" * 5_000, f'"{"x" * 100_000}"', "[" * 50_000, "{a=" * 5_000,
    "[" * 500 + "]" * 500, '"kaggle://a/b/c/d"', '"https://x/y"', '{ name = "adamw", beta1 = "x" }', "'''",
]  # fmt: skip


def toml_text(rng: random.Random, data: bytes) -> bytes:
    """Other values behind the equals signs; lines gone, doubled and moved; keys renamed."""
    lines = data.decode().splitlines()
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        at = rng.randrange(len(lines))
        key, equals, _ = lines[at].partition("=")
        match rng.randrange(12):
            case 0:
                del lines[at]
                lines = lines or [""]
            case 1:
                lines.insert(rng.randrange(len(lines)), lines[at])
            case 2:
                lines[at] = rng.choice(
                    ["[sources]", "[[a]]", "[a.b]", "a." * 5_000 + "b = 1", "[fit]", "x = 1", "[lora]"]
                )
            case 3:
                lines[at] = f"{key[: rng.randrange(len(key) + 1)]}{equals} 1"
            case _ if equals:
                lines[at] = f"{key}= {rng.choice(_TOML)}"
    text = "\n".join(lines).encode()
    return raw(rng, text) if rng.random() < 0.2 else text


# Weights


def safetensors(rng: random.Random, data: bytes) -> bytes:
    """A changed header with a length that fits, or does not."""
    (length,) = struct.unpack("<Q", data[:8])
    header, body = data[8 : 8 + length], data[8 + length :]
    match rng.randrange(6):
        case 0:
            return raw(rng, data)
        case 1:
            return struct.pack("<Q", rng.choice([*EDGES, length + 1, length - 1, len(data)])) + data[8:]
        case 2:
            body = body[: rng.randrange(len(body))]
    header = json_text(rng, header)
    return struct.pack("<Q", len(header)) + header + body


def gguf(rng: random.Random, data: bytes) -> bytes:
    """Counts, lengths, types, sizes and offsets that lie."""
    if rng.random() < 0.3:
        return raw(rng, data)
    damaged = bytearray(data)
    fields = list(gguf_fields(data))
    for _ in range(rng.choice([1, 1, 2])):
        at, width = rng.choice(fields)
        old = int.from_bytes(data[at : at + width], "little")
        near = [old + 1, old - 1, old * 2, old << 32, rng.randrange(45)]
        damaged[at : at + width] = (rng.choice([*EDGES, *near, *near]) % 256**width).to_bytes(width, "little")
    return bytes(damaged)


def gguf_fields(data: bytes) -> Iterator[tuple[int, int]]:
    """Where the integers of a sound file's header are, and how wide: values, counts, lengths, types and offsets.

    Of a long array only the first items: else a vocabulary would get all the damage.
    """
    widths = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
    found: list[tuple[int, int]] = []
    at = 4

    def integer(width: int, kept: bool = True) -> int:
        nonlocal at
        if kept:
            found.append((at, width))
        at += width
        return int.from_bytes(data[at - width : at], "little")

    def value(kind: int, kept: bool = True) -> None:
        nonlocal at
        if kind == 8:
            length = integer(8, kept)
            at += length
        elif kind == 9:
            item, count = integer(4, kept), integer(8, kept)
            for i in range(count):
                value(item, kept and i < 4)
        else:
            integer(widths[kind], kept)

    integer(4)
    tensors, keys = integer(8), integer(8)
    for _ in range(keys):
        value(8)
        value(integer(4))
    for _ in range(tensors):
        value(8)
        for _ in range(integer(4)):
            integer(8)
        integer(4)
        integer(8)
    return iter(found)
