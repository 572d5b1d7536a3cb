"""Read a user's preference pairs from a JSONL file."""

from __future__ import annotations

import json
import re
from pathlib import Path

from examples.demo.data import Example

FIELDS = ("prompt", "chosen", "rejected")
WANTED = '{"prompt": "...", "chosen": "...", "rejected": "..."}'


class MalformedLineError(ValueError):
    """Raised for a line that is not an object with the wanted fields; names file, line and column, counted from 1."""

    def __init__(self, path: Path, line: int, column: int, problem: str) -> None:
        super().__init__(f"{path}, line {line}, column {column}: {problem}; each line must be {WANTED}")
        self.line = line
        self.column = column


def read_pairs(path: Path) -> list[Example]:
    """Read a file with one object a line, each with the strings `prompt`, `chosen` and `rejected`.

    Other fields are ignored, and blank lines are skipped. A prompt may repeat.

    Raises:
        MalformedLineError: at the first malformed line.
        ValueError: the file has no pair.
    """
    examples = []
    for number, raw in enumerate(path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if raw.strip():
            examples.append(_pair(raw, path, number))
    if not examples:
        raise ValueError(f"{path} holds no pair; each line must be {WANTED}")
    return examples


def _pair(raw: bytes, path: Path, number: int) -> Example:
    try:
        line = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        column = len(raw[: error.start].decode("utf-8")) + 1
        problem = f"the byte 0x{raw[error.start]:02x} is not UTF-8"
        raise MalformedLineError(path, number, column, problem) from None
    try:
        pair = json.loads(line)
    except json.JSONDecodeError as error:
        raise MalformedLineError(path, number, error.pos + 1, f"not JSON ({error.msg})") from None
    except (ValueError, RecursionError) as error:
        raise MalformedLineError(path, number, 1, f"not JSON that can be read ({error})") from None
    start = len(line) - len(line.lstrip()) + 1
    if not isinstance(pair, dict):
        raise MalformedLineError(path, number, start, f"not an object but {_type(pair)}")
    for field in FIELDS:
        if field not in pair:
            found = ", ".join(repr(name) for name in pair) or "no field"
            raise MalformedLineError(path, number, start, f"field {field!r} is missing (the object has {found})")
        if not isinstance(pair[field], str) or not pair[field].strip():
            problem = f"field {field!r} must be a string that is not blank; got {_type(pair[field])}"
            raise MalformedLineError(path, number, _column(line, field, start), problem)
        if any("\ud800" <= character <= "\udfff" for character in pair[field]):
            problem = f"field {field!r} must be text; it has half a surrogate pair, which no encoding holds"
            raise MalformedLineError(path, number, _column(line, field, start), problem)
    return Example(pair["prompt"], (pair["chosen"], pair["rejected"]), group=pair["prompt"])


def _column(line: str, field: str, otherwise: int) -> int:
    key = re.search(rf'"{field}"\s*:', line)
    return otherwise if key is None else key.start() + 1


def _type(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a blank string", bool: "true or false", type(None): "null"}
    return names.get(type(value), f"the number {value!r}")
