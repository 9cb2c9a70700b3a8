"""Inputs that are almost right: valid files and texts with edits that know their structure, then a few blind ones."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Sequence
from typing import Any

ODD_NUMBERS = (0, 1, -1, 7, 2**31, 2**32, 2**53, 2**62, 2**63 - 1, 2**63, 2**64, -(2**63), 10**30, 10**400)
ODD: tuple[Any, ...] = (
    None, True, False, "", "x", "F32", "__metadata__", "\x00", "\x1b[2J", "\u202e", "\U0001f600", "../../x", 0.0, -0.0,
    1.5, 1e308, [], {}, [0], [[]], {"": ""}, "9" * 400, [1] * 70, *ODD_NUMBERS,
)  # fmt: skip
TOKENS = (
    b"NaN", b"Infinity", b"-Infinity", b"1e999", b"-0", b"\\ud800", b"\\u0000", b'"', b"'", b"{", b"}", b"[", b"]",
    b",", b":", b"null", b"true", b"\xff", b"\xc0\xaf", b"\xef\xbb\xbf", b"\x00", b"\n", b" ", b"[" * 300,
    b"{\"a\":" * 1200,
    b"[]," * 5000, b"9" * 5000, b"\\", b"\xf0\x9f\x98\x80",
)  # fmt: skip
SIGNS = "=:,/<>-+.e_0123456789 \t\n\x00\x1b\u202e\ud800'\"{}[]()%$abcxyzNaNinf"


def edited(tree: Any, draw: random.Random) -> Any:
    """A copy of a JSON value with one to three edits: values replaced, keys renamed, dropped, copied, nested."""
    tree = json.loads(json.dumps(tree))
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        place = _container(tree, draw)
        if place is None:
            return odd(draw)
        _edit(place, draw)
    return tree


def odd(draw: random.Random) -> Any:
    """A value that is rarely what is expected, of its own: later edits may change it."""
    return copy.deepcopy(draw.choice(ODD))


def _container(tree: Any, draw: random.Random) -> Any:
    """A table or list somewhere inside; None where there is none."""
    found, at = None, tree
    while isinstance(at, (dict, list)):
        found = at
        inner = [v for v in (at.values() if isinstance(at, dict) else at) if isinstance(v, (dict, list))]
        if not inner or draw.random() < 0.3:
            break
        at = draw.choice(inner)
    return found


def _edit(place: Any, draw: random.Random) -> None:
    keys: Sequence[Any] = list(place) if isinstance(place, dict) else range(len(place))
    if not keys:
        if isinstance(place, dict):
            place["x"] = odd(draw)
        else:
            place.append(odd(draw))
        return
    key = draw.choice(keys)
    action = draw.randrange(8)
    if action <= 2:
        place[key] = odd(draw)
    elif action == 3:
        place[key] = nudged(place[key], draw)
    elif action == 4:
        del place[key]
    elif action == 5:
        place[key] = copy.deepcopy(place[draw.choice(keys)])
    elif action == 6 and isinstance(place, dict):
        place[str(draw.choice(ODD))] = place.pop(key)
    elif action == 6:
        place.insert(key, odd(draw))
    else:
        for _ in range(draw.choice((1, 2, 100))):
            place[key] = [place[key]]


def nudged(value: Any, draw: random.Random) -> Any:
    """A number a little, or much, off; anything else in another type."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or abs(value) > 1e300:
        return draw.choice((str(value)[:50], [value], {"x": value}))
    return draw.choice(
        (value + 1, value - 1, value + 4, value * 2, -value, float(value), value + 2**32, str(value))
    )


def blurred(content: bytes, draw: random.Random) -> bytes:
    """Bytes with one to four blind edits: flipped, inserted, cut out, doubled."""
    made = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 4))):
        at = draw.randrange(len(made) + 1)
        action = draw.randrange(5)
        if action == 0 and at < len(made):
            made[at] ^= 1 << draw.randrange(8)
        elif action == 1:
            made[at:at] = draw.choice(TOKENS)
        elif action == 2:
            del made[at : at + draw.choice((1, 1, 4, 30))]
        elif action == 3:
            made[at:at] = made[at : at + draw.choice((1, 8, 60))]
        elif at < len(made):
            made[at] = draw.randrange(256)
    return bytes(made)


def respelled(text: str, draw: random.Random) -> str:
    """A text with one to four edits of its characters or of what stands between its signs."""
    for _ in range(draw.choice((1, 1, 2, 4))):
        at = draw.randrange(len(text) + 1)
        action = draw.randrange(5)
        if action == 0:
            text = text[:at] + draw.choice(SIGNS) + text[at:]
        elif action == 1:
            text = text[:at] + text[at + draw.choice((1, 1, 5)) :]
        elif action == 2:
            text = text[:at] + draw.choice(("nan", "1e999", "9" * 400, "-1", "0x10", "None", "٣")) + text[at:]
        elif action == 3:
            text = text[:at] + text[max(0, at - draw.choice((1, 6))) : at] + text[at:]
        else:
            text = text[:at] + draw.choice(SIGNS) + text[at + 1 :]
    return text


def tensor_file(table: dict[str, Any], data: bytes, draw: random.Random) -> bytes:
    """A safetensors file whose header, length or data was edited; one in 1,000 is a bomb of some megabytes."""
    if draw.random() < 1 / 1000:
        text = draw.choice(BOMBS)()
    else:
        ascii_only = draw.random() < 0.5
        text = json.dumps(edited(table, draw), ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
        if draw.random() < 0.3:
            text = blurred(text, draw)
    length = len(text)
    if draw.random() < 0.05:
        length = draw.choice(
            (length + 1, max(0, length - 1), 0, 2**63, 2**64 - 1, 99_999_999, length + len(data))
        )
    if draw.random() < 0.1:
        data = draw.choice((data[:-1], data + b"x", b"", data * 2, bytes(len(data))))
    return length.to_bytes(8, "little") + text + data


BOMBS: tuple[Callable[[], bytes], ...] = (
    lambda: b"[" + b"[]," * 300_000 + b"[]]",
    lambda: b'{"a":' * 200_000,
    lambda: b'{"__metadata__":{"x":"' + b"y" * 4_000_000 + b'\xf0\x9f\x98\x80"}}',
    lambda: b"{" + b",".join(b'"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}' % n for n in range(19_000)) + b"}",
    lambda: b'{"a":{"dtype":"U8","shape":[' + b"1," * 500_000 + b'1],"data_offsets":[0,0]}}',
    lambda: b'{"a":{"dtype":"U8","shape":[' + b"9" * 4_000_000 + b'],"data_offsets":[0,0]}}',
    lambda: b'{"' + b"\\u0061" * 600_000 + b'":1}',
)  # fmt: skip
