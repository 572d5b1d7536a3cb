"""Read failures, counts and figures from the files that the parts of `benchmarks/gpu.sh` write."""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import store
from benchmarks.report import data

SWEEP = "sweep.csv"
BESTS = 12  # lines of the sweep among the figures


class Failure(NamedTuple):
    """A case and why it failed."""

    case: str
    reason: str


Said = Sequence[str]  # the lines that a part printed into log.txt


def lines(path: Path) -> list[str]:
    """Return the complete lines of a file, or none if there is no file."""
    try:
        text = path.read_text(errors="replace")
    except OSError:
        return []
    return text[: text.rfind("\n") + 1].split("\n")[:-1]


def table(path: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV file."""
    return list(csv.DictReader(f"{line}\n" for line in lines(path)))


def records(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a file of JSON lines."""
    return [json.loads(line) for line in lines(path)]


def first_line(text: str) -> str:
    """Return the first line of a text."""
    return text.strip().partition("\n")[0]


def verdicts(path: Path, words: Iterable[str]) -> list[tuple[str, str]]:
    """Return (word, rest) of each line that begins with one of the words."""
    pairs = (line.partition(" ") for line in lines(path))
    return [(word, rest) for word, _, rest in pairs if word in words]


def _smoke(folder: Path) -> list[tuple[str, str]]:
    return verdicts(folder / "smoke.txt", ("PASS", "FAIL", "SKIP"))


def _smoke_failures(folder: Path, said: Said) -> list[Failure]:
    found = (rest.partition(" ") for word, rest in _smoke(folder) if word == "FAIL")
    return [Failure(name, reason) for name, _, reason in found]


def _smoke_counts(folder: Path, said: Said) -> Counter[str]:
    return Counter(word for word, _ in _smoke(folder))


def _sweep_failures(folder: Path, said: Said) -> list[Failure]:
    rows = [row for row in table(folder / SWEEP) if row.get("status") not in ("ok", None)]
    return [Failure(f"{shape(row)} {row.get('config', '')}".strip(), first_line(row["status"])) for row in rows]


def _sweep_counts(folder: Path, said: Said) -> Counter[str]:
    return Counter("ok" if row.get("status") == "ok" else "not ok" for row in table(folder / SWEEP))


def _tests(folder: Path) -> list[tuple[str, str]]:
    return verdicts(folder / "tests.txt", ("PASSED", "FAILED", "SKIPPED"))


def _tests_failures(folder: Path, said: Said) -> list[Failure]:
    found = (re.fullmatch(r"(.*?) [\d.]+ s(?:: (.*))?", rest) for word, rest in _tests(folder) if word == "FAILED")
    return [Failure(match[1], match[2] or "") for match in found if match]


def _tests_counts(folder: Path, said: Said) -> Counter[str]:
    return Counter(word.lower() for word, _ in _tests(folder))


def bench(folder: Path) -> list[store.Row]:
    """Return the rows of every machine that `fastpref bench` has measured."""
    rows = []
    for path in sorted(folder.glob("*.csv")):
        found = lines(path)
        if found and "subject" in found[0].split(","):
            rows += store.parse(f"{line}\n" for line in found)
    return rows


def _bench_failures(folder: Path, said: Said) -> list[Failure]:
    rows = [row for row in bench(folder) if row["gate"] == "failed"]
    rows.sort(key=lambda row: not data.ours(row))
    return [Failure(f"{row['subject']} {shape(row)} {row['name']}", first_line(row["problem"])) for row in rows]


def _bench_counts(folder: Path, said: Said) -> Counter[str]:
    rows = bench(folder)
    found = Counter({"shapes": len({store.key(row) for row in rows})} if rows else {})
    return found + Counter("timed" if "ms" in row else row["gate"] for row in rows)


def _check_failures(folder: Path, said: Said) -> list[Failure]:
    rows = [row for row in records(folder / "check.jsonl") if not row["ok"]]
    return [
        Failure(f"{row['case']} {row['dtype']} {row['output'] or ''}".strip(), first_line(row["fault"])) for row in rows
    ]


def _check_counts(folder: Path, said: Said) -> Counter[str]:
    rows = records(folder / "check.jsonl")
    found = Counter("right" if row["ok"] else "wrong" for row in rows)
    return found + Counter(calls=len({(row["case"], row["device"], row["dtype"]) for row in rows}))


def _profile_rows(folder: Path) -> list[dict[str, str]]:
    """Return the counters of each launch, found among the other output of `ncu`."""
    found: list[dict[str, str]] = []
    names: list[str] = []
    call = ""
    for line in lines(folder / "profile.txt"):
        row = next(csv.reader([line])) if line.startswith('"') else []
        if line.startswith("-- "):
            call = line.removeprefix("-- ")
        elif row[:1] == ["ID"]:
            names = row
        elif names and len(row) == len(names) and row[0].isdigit():
            found.append({**dict(zip(names, row, strict=True)), "call": call})
    return found


def _profile_counts(folder: Path, said: Said) -> Counter[str]:
    return +Counter(launches=len(_profile_rows(folder)))


def _sanitizer(said: Said) -> list[tuple[str, str]]:
    """Return (tool, line) of every line that compute-sanitizer printed."""
    tool, found = "", []
    for line in said:
        if line.startswith("-- "):
            tool = line.removeprefix("-- ")
        elif line.startswith("========= "):
            found.append((tool, line.removeprefix("========= ")))
    return found


def _sanitizer_failures(folder: Path, said: Said) -> list[Failure]:
    found = [(tool, line) for tool, line in _sanitizer(said) if not line.startswith((" ", "COMPUTE-SANITIZER"))]
    return [Failure(tool, line.strip()) for tool, line in found if "SUMMARY" not in line]


def _sanitizer_counts(folder: Path, said: Said) -> Counter[str]:
    found = Counter()
    for tool, line in _sanitizer(said):
        if match := re.search(r"SUMMARY: (\d+) ", line):
            found[f"errors of {tool}"] = int(match[1])
    return found


FAILURES: dict[str, Callable[[Path, Said], list[Failure]]] = {
    "smoke": _smoke_failures,
    "sweep": _sweep_failures,
    "tests": _tests_failures,
    "bench": _bench_failures,
    "check": _check_failures,
    "sanitizer": _sanitizer_failures,
}
COUNTS: dict[str, Callable[[Path, Said], Counter[str]]] = {
    "smoke": _smoke_counts,
    "sweep": _sweep_counts,
    "tests": _tests_counts,
    "bench": _bench_counts,
    "check": _check_counts,
    "profile": _profile_counts,
    "sanitizer": _sanitizer_counts,
}


def shape(row: dict[str, Any]) -> str:
    """Return the kernel, dtype and shape of a row of the sweep or the bench."""
    axes = (name for name in ("B", "T", "R", "C", "V", "H", "masked", "logits") if row.get(name) not in (None, "", "0"))
    words = [str(row[name]) for name in ("kernel", "dtype") if row.get(name)]
    return " ".join([*words, *(f"{name}={row[name]}" for name in axes)])


def figures(folder: Path) -> list[str]:
    """Return the figures of the sweep, the bench, the check and the profile, one a line."""
    return [*_sweep_figures(folder), *_bench_figures(folder), *_check_figures(folder), *_profile_figures(folder)]


def _sweep_figures(folder: Path) -> list[str]:
    """Return the fastest configuration of each kernel and shape, beside the one in use."""
    groups: dict[str, list[dict[str, str]]] = {}
    for row in table(folder / SWEEP):
        if row.get("status") == "ok" and row.get("us"):
            groups.setdefault(shape(row), []).append(row)
    text = []
    for name, rows in list(groups.items())[:BESTS]:
        best = min(rows, key=lambda row: float(row["us"]))
        used = next((row for row in rows if row.get("current") == "1"), None)
        shares = {of: best.get(f"of_{of}") for of in ("copy", "product")}
        rates = [f", {float(share):.0%} of {of}" for of, share in shares.items() if share not in (None, "", "nan")]
        beside = f"; in use {used['config']} {_rounded(used['us'])}" if used and used is not best else ""
        config = f"{best['config']} " if best.get("config") else ""
        text.append(f"- sweep {name}: {config}{_rounded(best['us'])} µs{''.join(rates)}{beside}")
    return text


def _rounded(text: str) -> str:
    """Return four digits of a number, without an exponent if it is large."""
    return f"{float(text):.0f}" if float(text) >= 1000 else f"{float(text):.4g}"


def _bench_figures(folder: Path) -> list[str]:
    """Return the times of fastpref at each shape beside the fastest peer."""
    points: dict[tuple[str, ...], list[store.Row]] = {}
    for row in bench(folder):
        if "ms" in row:
            points.setdefault(store.key(row), []).append(row)
    text = []
    for rows in points.values():
        passes = {row.get("pass") for row in rows if data.ours(row)}
        timed = [row for row in rows if data.ours(row) and row.get("pass") != "forward"]
        ours = ", ".join(f"{row['name'].removeprefix('fastpref, ')} {row['ms']:.4g}" for row in timed)
        peer = data.fastest([row for row in rows if row.get("pass") in passes and row.get("pass") != "forward"])
        beside = f"; {peer['name']} {peer['ms']:.4g}" if peer else ""
        text.append(f"- bench {rows[0]['subject']} {shape(rows[0])}: {ours} ms{beside}")
    return text


def _check_figures(folder: Path) -> list[str]:
    rows = [row for row in records(folder / "check.jsonl") if row["error"] is not None and row["allowance"]]
    if not rows:
        return []
    worst = max(rows, key=lambda row: row["error"] / row["allowance"])
    share, name = worst["error"] / worst["allowance"], f"{worst['case']} {worst['dtype']} {worst['output']}"
    return [f"- check: the largest error is {share:.2f} of the allowance, {name}"]


def _profile_figures(folder: Path) -> list[str]:
    """Return the counters of the last launch of each call."""
    last: dict[str, dict[str, str]] = {}
    for row in _profile_rows(folder):
        last[f"{row['call']} {row.get('Kernel Name', '').partition('(')[0]}".strip()] = row
    text = []
    for name, row in last.items():
        counters = {metric.partition(".")[0]: value for metric, value in row.items() if "__" in metric}
        shown = ", ".join(f"{metric.partition('__')[2]} {value}" for metric, value in counters.items())
        text.append(f"- profile {name}: {shown}")
    return text
