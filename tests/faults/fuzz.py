"""Thousands of wrong recipes, overrides and command lines, from a fixed seed, in one process.

`python tests/faults/fuzz.py` tries 1,000 recipes, 200 overrides and 1,600 argument lists (some ten minutes) and says
which did not end with exit code 0 or 2, took more than five seconds of processor time, or called themselves a bug.
`KDCLI_DEBUG=1 python tests/faults/fuzz.py --only recipe:17` repeats one and shows where it ended. Nothing is trained:
a recipe is planned (`--dry-run`), other commands get models that are tiny or not there.
"""

import argparse
import contextlib
import datetime
import io
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

os.environ["HF_HUB_OFFLINE"] = "1"

from pydantic import BaseModel

from kdcli.cli.app import run
from kdcli.methods import registry
from kdcli.recipe.schema import Recipe

SECONDS = 5
BLOCKED = 60
"""Seconds of wall time after which a command counts as waiting for ever; the machine may be busy with other work."""

STRINGS = [
    "",
    " ",
    "a",
    "kd",
    "makd",
    "dbkd",
    "theseus",
    "reviews",
    "sst2",
    "classification",
    "text",
    "label",
    "teacher",
    "rows.csv",
    "broken.csv",
    "empty.csv",
    "lines.txt",
    "folder",
    "missing.jsonl",
    "rows.parquet",
    "x" * 3000,
    "a/b",
    "../..",
    "/",
    ".",
    "~",
    "~nobody-of-that-name/x",
    "/dev/zero",
    "/dev/null",
    "pipe",
    "endless.csv",
    "-",
    "--help",
    "\x00",
    "\x1b[31m",
    "\u202eabc",
    "é",
    "日本語",
    "🤗/🤗",
    "\ud7ff",
    "14.5M",
    "inf",
    "1e400k",
    "nan",
    "module:function",
    "os.path:join",
    "a:b:c",
    "%s{}[x]",
    "none/such-model",
]
VALUES: list[Any] = [
    True,
    False,
    0,
    1,
    -1,
    2,
    3,
    7,
    64,
    100,
    1000,
    2**31,
    2**63,
    2**64,
    10**30,
    -(10**18),
    10**5000,
    0.0,
    0.5,
    1.0,
    -0.5,
    1e308,
    5e-324,
    float("nan"),
    float("inf"),
    float("-inf"),
    datetime.date(2024, 2, 29),
    datetime.datetime(2024, 2, 29, 12, 0, 0),
    datetime.time(12, 0),
    [],
    [1],
    [0, 1],
    [1, 0],
    [1, "a", 0.5],
    [[]],
    [[1, 2], [2, 3]],
    ["text"],
    ["text", "text"],
    ["no", "yes"],
    [{}],
    {},
    {"a": 1},
    {"name": "own"},
    {"name": {"name": "x"}},
    [{"task": "reviews"}],
    {"768": [32, 24]},
]
BASES: list[dict[str, Any]] = [
    {
        "method": "kd",
        "task": {"name": "own", "data": "rows.csv", "text": "text"},
        "teacher": {"model": "teacher"},
        "student": {"form": "depth", "layers": 1},
    },
    {
        "method": {"name": "makd", "schedule": "staged", "weights": {"layer": 0.5}},
        "task": {"name": "own", "train": "rows.csv", "validation": "rows.csv", "text": ["text", "label"]},
        "teacher": {"model": "teacher", "finetune": {"epochs": 1.0}},
        "student": {"rank": 4},
        "overparam": {"length": 1},
        "export": {"onnx": True},
    },
    {
        "method": {"name": "minilmv2", "relation_heads": 4},
        "task": {"name": "words", "type": "text", "data": "lines.txt", "max_length": 16},
        "teacher": {"scratch": {"layers": 2, "hidden_size": 32, "heads": 4, "intermediate_size": 64}},
        "student": {"form": "width", "hidden_size": 16, "heads": 4},
    },
    {
        "method": {"name": "dbkd", "copies": 2, "black_box": {"callable": "module:function"}},
        "task": {"name": "own", "data": "rows.csv", "text": "text"},
        "teacher": {"black_box": True, "tokenizer": "teacher"},
        "student": {"form": "checkpoint", "model": "teacher"},
        "train": {"batch_size": 8, "max_steps": 3},
        "evaluate": {"protocol": "half-dev", "fail_under": 0.5},
    },
    {
        "method": "theseus",
        "task": "reviews",
        "teacher": {
            "scratch": {"layers": 2, "hidden_size": 32, "heads": 4, "intermediate_size": 64, "vocab_size": 300}
        },
        "name": "n",
        "output": "out",
        "seed": 1,
    },
]


def toml(value: Any) -> str:
    """Return a value as TOML, in one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(str(key))} = {toml(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value).replace("\x7f", "\\u007f")
    if isinstance(value, int) and abs(value) > 10**4000:
        return hex(value)
    if isinstance(value, int):
        return str(value)
    return repr(value) if isinstance(value, float) else value.isoformat()


def text_of(document: dict[str, Any]) -> str:
    """Return a document as TOML with a header for each table."""
    tables = {key: value for key, value in document.items() if isinstance(value, dict)}
    lines = [f"{json.dumps(key)} = {toml(value)}" for key, value in document.items() if key not in tables]
    for key, table in tables.items():
        lines += [f"[{json.dumps(key)}]", *(f"{json.dumps(name)} = {toml(value)}" for name, value in table.items())]
    return "\n".join(lines) + "\n"


def fields(schema: type[BaseModel], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield (path, annotation) of every field of a recipe, of the tables inside it, too."""
    for name, field in schema.model_fields.items():
        yield (*path, name), field.annotation
        for kind in _inside(field.annotation):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from fields(kind, (*path, name))


def _inside(annotation: Any) -> Iterator[Any]:
    yield annotation
    if get_origin(annotation) is not None:
        for part in get_args(annotation):
            yield from _inside(part)


FIELDS = [*fields(Recipe)]
OPTIONS = {name: [*fields(registry.get(name).options, ("method",))] for name in registry.BUILT_IN}


def any_value(dice: random.Random, annotation: Any = None) -> Any:
    """Return a value: for the most part of a type that the field takes, though hardly ever one that it should have."""
    if annotation is not None and dice.random() < 0.85:
        return _typed(dice, annotation)
    value = dice.choice(STRINGS) if dice.random() < 0.4 else dice.choice(VALUES)
    if dice.random() < 0.05:
        for _ in range(dice.choice([2, 10, 31, 40])):
            value = [value] if dice.random() < 0.5 else {"a": value}
    return value


def _typed(dice: random.Random, annotation: Any) -> Any:
    origin, parts = get_origin(annotation), [part for part in get_args(annotation) if part is not type(None)]
    if origin is Literal:
        return dice.choice(parts)
    if origin is list:
        return [_typed(dice, parts[0]) for _ in range(dice.choice([0, 1, 1, 2, 2, 3, 5]))]
    if origin is dict:
        return {
            dice.choice(["768", "32", "64", "a", ""]): _typed(dice, parts[1]) for _ in range(dice.choice([0, 1, 2]))
        }
    if parts:
        # Annotated, or one of several types.
        return _typed(dice, parts[0] if origin is Annotated else dice.choice(parts))
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        names = list(annotation.model_fields)
        chosen = dice.sample(names, k=min(len(names), dice.choice([0, 1, 2, 3])))
        needed = [name for name, field in annotation.model_fields.items() if field.is_required()]
        return {name: _typed(dice, annotation.model_fields[name].annotation) for name in {*chosen, *needed}}
    if annotation is bool:
        return dice.random() < 0.5
    if annotation is int:
        return dice.choice([0, 1, 1, 2, 2, 3, 4, 5, 8, 16, 32, 33, 64, 100, 1000, 10**6, 10**9, -1, -2])
    if annotation is float:
        return dice.choice([0.0, 0.01, 0.1, 0.3, 0.5, 0.5, 0.9, 1.0, 1.0, 2.0, 10.0, 1e-5, 1e6, 1e-300, -1.0])
    return dice.choice(STRINGS)


def _put(document: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    for part in path[:-1]:
        inner = document.get(part)
        document[part] = dict(inner) if isinstance(inner, dict) else {"name": inner} if isinstance(inner, str) else {}
        document = document[part]
    document[path[-1]] = value


def _mutated(dice: random.Random) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(json.dumps(dice.choice(BASES)))
    for _ in range(dice.choice([1, 1, 1, 1, 2, 3])):
        action = dice.random()
        if action < 0.05:
            document.pop(dice.choice(list(document)), None)
        elif action < 0.1:
            where = dice.choice([document, *(part for part in document.values() if isinstance(part, dict))])
            where[dice.choice(["", "budjet", "a.b", "x" * 2000, "\x1b[1m", "日本", "name", "[0]"])] = any_value(dice)
        elif action < 0.45:
            method = document.get("method", "kd")
            name = method.get("name") if isinstance(method, dict) else method
            path, kind = dice.choice(OPTIONS.get(name, FIELDS) if isinstance(name, str) else FIELDS)
            _put(document, path, any_value(dice, kind))
        else:
            path, kind = dice.choice(FIELDS)
            # Below a list of tables there is no path.
            path, kind = (
                (path, kind) if path[0] != "finetune" else (("finetune",), Recipe.model_fields["finetune"].annotation)
            )
            _put(document, path, any_value(dice, kind))
    return document


def _torn(dice: random.Random, text: str) -> bytes:
    """Return a text with some bytes lost, doubled or replaced."""
    content = bytearray(text.encode("utf-8", "surrogatepass"))
    for _ in range(dice.choice([1, 2, 5])):
        at = dice.randrange(len(content) + 1)
        what = dice.random()
        if what < 0.3:
            del content[at : at + dice.choice([1, 2, 10, 50])]
        elif what < 0.6:
            content[at:at] = dice.choice([b"[", b"]]", b'"', b"=", b"\n", b"\x00", b"\xff", b"'''", b"{", b"#", b"."])
        elif what < 0.8:
            content[at:at] = content[: dice.choice([5, 40, 200])]
        else:
            content[at : at + 1] = bytes([dice.randrange(256)])
    return bytes(content)


HOSTILE: list[Callable[[], bytes]] = [
    lambda: b"a = " + b"[" * 100_000,
    lambda: b"[" * 100_000,
    lambda: b"a = " + b"{a = " * 20_000,
    lambda: b".".join([b"a"] * 400_000) + b" = 1",
    lambda: b"".join(b"a%d = 1\n" % i for i in range(40_000)),
    lambda: b"[[finetune]]\n" * 40_000,
    lambda: b"[method]\n" + b"".join(b"a%d = 1\n" % i for i in range(40_000)),
    lambda: b"#" * 10_000_000,
    lambda: b'task = "reviews"\nmethod = "' + b"x" * 900_000 + b'"\n[teacher]\nmodel = "teacher"\n',
    lambda: b'task = "reviews"\n"' + b"x" * 900_000 + b'" = 1\n',
    lambda: b"seed = " + b"9" * 900_000,
    lambda: b"seed = 0x" + b"f" * 900_000,
    lambda: b"seed = [" + b"1," * 120_000 + b"]",
    lambda: b"student = {layers = [" + b"-1," * 100_000 + b"]}",
    lambda: b'a = """' + b"\\" * 900_000,
    lambda: b"\xff\xfe" + "task = 1".encode("utf-16-le"),
    lambda: b"\xef\xbb\xbf" + text_of(BASES[0]).encode(),
    lambda: text_of(BASES[0]).replace("\n", "\r\n").encode(),
    lambda: b"",
    lambda: b"\x00" * 1000,
]
"""Files that once made the program hang, crash or fill the memory, and their kind."""


@dataclass(frozen=True)
class Case:
    """A command line, and the recipe that it finds as `recipe.toml`."""

    name: str
    arguments: list[str]
    recipe: bytes = b""


def recipes(count: int, seed: int = 0) -> Iterator[Case]:
    """Yield the hostile files, then recipes with wrong values and torn texts; each is only planned."""
    for number in range(count):
        dice = random.Random(f"recipe {seed} {number}")
        if number < len(HOSTILE):
            content = HOSTILE[number]()
        else:
            text = text_of(_mutated(dice))
            content = _torn(dice, text) if dice.random() < 0.15 else text.encode("utf-8", "surrogatepass")
        yield Case(f"recipe:{number}", ["distill", "recipe.toml", "--dry-run", *_maybe_json(dice)], content)


def overrides(count: int, seed: int = 0) -> Iterator[Case]:
    """Yield sound recipes with `--set` options that are not."""
    for number in range(count):
        dice = random.Random(f"override {seed} {number}")
        options = []
        for _ in range(dice.choice([1, 1, 2, 4])):
            kind = dice.random()
            if kind < 0.6:
                path, annotation = dice.choice(FIELDS)
                value = any_value(dice, annotation)
                written = value if isinstance(value, str) and dice.random() < 0.7 else toml(value)
                option = f"{'.'.join(path)}={written}"
            elif kind < 0.8:
                option = dice.choice(
                    [
                        "",
                        "=",
                        "=1",
                        "a",
                        ".=1",
                        "a..b=1",
                        "task=",
                        "student=5",
                        "finetune[0].epochs=2",
                        "finetune[99999999999]=1",
                        '"=1',
                        "a=[" * 500,
                        ".".join("ab" * 5000) + "=1",
                        "x" * 3000 + "=1",
                        "student.layers=" + "[" * 3000,
                        "seed=" + "9" * 5000,
                        "a b=1",
                        "task.name='''",
                        "task = 1 = 2",
                        "student.budget=0.5\nseed=3",
                    ]
                )
            else:
                option = "".join(dice.choice("abst.=[]{}\"'0 \n\t#é\x01") for _ in range(dice.choice([3, 10, 60])))
            options += ["--set", option]
        base = text_of(dice.choice(BASES)).encode()
        yield Case(f"override:{number}", ["distill", "recipe.toml", "--dry-run", *options, *_maybe_json(dice)], base)


MODELS = ["teacher", "teacher", "broken", "runs/none", "recipe.toml", *STRINGS]
NEEDED = {
    "distill": ("",),
    "compare": ("", ""),
    "overparam": ("", "--out"),
    "contract": ("", "--out"),
    "eval": ("",),
    "methods": ("",),
}
COMMANDS: dict[str, dict[str, list[str] | None]] = {
    "distill": {
        "": ["recipe.toml", *STRINGS],
        "--set": ["seed=1", "student.layers=2", *STRINGS],
        "--output": STRINGS,
        "--force": None,
        "--resume": None,
        "--refresh": None,
        "--fail-under": ["0.5", "nan", "-1", "inf", *STRINGS],
    },
    "compare": {
        "": ["recipe.toml", "second.toml", *STRINGS],
        "--seeds": ["1", "2", "0", "99999999999", *STRINGS],
        "--set": ["seed=1", "student.layers=2", *STRINGS],
        "--task": ["reviews", *STRINGS],
        "--baseline": ["recipe", "second", *STRINGS],
        "--output": STRINGS,
        "--allow-unequal": None,
    },
    "overparam": {
        "": MODELS,
        "--out": ["", "o", "a/b", "x" * 3000, "rows.csv", "rows.csv/x", "é", "\x00", *(f"o{i}" for i in range(20))],
        "--length": ["0", "1", "-1", "33", "99999999999", *STRINGS],
        "--scale": ["2", "1", "nan", "inf", "1e9", *STRINGS],
        "--factorization": ["mpo", "svd", "svd-plain", *STRINGS],
        "--targets": ["ffn", "attention,ffn", ",", *STRINGS],
        "--layers": ["all", "0", "0,1", "-1", "9999999999999", *STRINGS],
        "--factors": STRINGS,
        "--gauge": ["left", *STRINGS],
        "--svd-dtype": ["float32", *STRINGS],
    },
    "contract": {"": MODELS, "--out": ["", "c", "x" * 3000, "rows.csv/x", "\x00"], "--merge-lowrank": None},
    "eval": {
        "": MODELS,
        "--task": ["reviews", *STRINGS],
        "--data": STRINGS,
        "--text": ["text", "text,label", ",", *STRINGS],
        "--label": ["label", *STRINGS],
        "--labels": ["no,yes", "yes,no", ",", *STRINGS],
        "--teacher": MODELS,
        "--protocol": ["dev", "half-dev", *STRINGS],
        "--batch-size": ["1", "0", "99999999999", *STRINGS],
        "--max-samples": ["1", "0", "99999999999", *STRINGS],
        "--fail-under-retention": ["0.5", "nan", *STRINGS],
    },
    "export": {
        # No model that could be exported: that takes longer than a wrong command may.
        "": ["broken", *(name for name in MODELS if name != "teacher")],
        "--onnx": None,
        "--out": ["", "e", "x" * 3000, "rows.csv/x", "\x00"],
        "--task": ["reviews", *STRINGS],
        "--teacher": MODELS,
        "--opset": ["20", "23", "19", "99999999999", *STRINGS],
        "--no-latency": None,
        "--batch-sizes": ["1", "1,8", "0", "99999999999", "1,,2", *STRINGS],
        "--sequence-lengths": ["16", "-1", "99999999999", *STRINGS],
        "--threads": ["1", "0", "99999999999", *STRINGS],
        "--runs": ["1", "0", "99999999999", *STRINGS],
        "--max-latency-ms": ["1", "nan", *STRINGS],
    },
    "methods": {"": ["kd", "makd", *STRINGS]},
    "env": {"": STRINGS},
}


def argument_lists(count: int, seed: int = 0) -> Iterator[Case]:
    """Yield command lines of words that belong there, that do not, and of options without values."""
    base = text_of(BASES[0]).encode()
    for number in range(count):
        dice = random.Random(f"arguments {seed} {number}")
        command = dice.choice(list(COMMANDS))
        table = COMMANDS[command]
        words: list[str] = []
        chosen = dice.choices(list(table), k=dice.choice([0, 1, 2, 3, 5]))
        if dice.random() < 0.85:
            chosen = [*NEEDED.get(command, ()), *chosen]
        for option in chosen:
            values = table[option]
            words += [option] if option else []
            if values is not None and dice.random() < 0.95:
                # For the most part such as the option is made for.
                own = values[: len(values) - len(STRINGS)] if len(values) > len(STRINGS) else values
                words.append(dice.choice([*own, dice.choice(values)]))
        if command == "export":
            words = [word for word in words if word != "teacher"] + ["--out", "exported"]
        if dice.random() < 0.1:
            words.append(dice.choice(["--help", "-h", "--hlep", "--", "-x", "--version", "--json", "--debug", "", "é"]))
        if command == "eval" and dice.random() < 0.5:
            words += dice.choice([["--task", "reviews"], ["--data", "rows.csv", "--text", "text"]])
        if dice.random() < 0.1:
            dice.shuffle(words)
        if dice.random() < 0.05:
            command = dice.choice(["", "distil", "--version", "-h", "x" * 3000, "\x00", "--json", "evla"])
        words = [word for word in words if word != "--debug"]
        # First, so that no other word can be taken for its value or end the options before it.
        planned = ["--dry-run"] if command in ("distill", "compare") else []
        yield Case(f"arguments:{number}", [command, *planned, *words, *_maybe_json(dice)], base)


def _maybe_json(dice: random.Random) -> list[str]:
    return ["--json"] if dice.random() < 0.3 else []


def furnish(folder: Path, save_teacher: Callable[[Path], None]) -> None:
    """Put into an empty folder what the cases name."""
    rows = "".join(f'"a fine and moving film {i}",yes\n"a dull and empty film {i}",no\n' for i in range(20))
    (folder / "second.toml").write_text(text_of({**BASES[0], "method": "makd", "student": {"budget": 0.5}}))
    (folder / "rows.csv").write_text("text,label\n" + rows)
    (folder / "broken.csv").write_bytes(b'text,label\n"a,yes\n\xff\xfe,no\n')
    (folder / "empty.csv").write_text("")
    (folder / "lines.txt").write_text("a fine and moving film\n\n" * 60)
    (folder / "folder").mkdir()
    (folder / "broken").mkdir()
    (folder / "broken" / "config.json").write_text('{"model_type": "bert", "hidden_size": "wide"')
    (folder / "module.py").write_text("def function(texts): pass\nraise SystemExit('user code was run')\n")
    os.mkfifo(folder / "pipe")
    (folder / "endless.csv").symlink_to("/dev/zero")
    save_teacher(folder / "teacher")


class _TooLong(BaseException):
    """The case took more than its time."""


def _stop(*_: object) -> None:
    raise _TooLong


def problem_of(case: Case, folder: Path) -> str | None:
    """Run a case in `folder`, the working folder; return what is wrong with how it ended."""
    (folder / "recipe.toml").write_bytes(case.recipe)
    out, err = io.StringIO(), io.StringIO()
    signal.signal(signal.SIGPROF, _stop)
    signal.signal(signal.SIGALRM, _stop)
    code: object = None
    try:
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        signal.alarm(BLOCKED)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = run(case.arguments)
    except _TooLong:
        return f"more than {SECONDS} s of processor time, or {BLOCKED} s of waiting"
    except BaseException as error:
        if os.environ.get("KDCLI_DEBUG"):
            traceback.print_exc()
        return f"ended with {type(error).__name__}: {str(error)[:200]}"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
    said = out.getvalue() + err.getvalue()
    if code not in (0, 2):
        return f"exit code {code}: {err.getvalue()[-600:]}"
    if "Traceback (most recent call last)" in said or "this is a bug" in said:
        return f"exit code {code}, but: {said[-600:]}"
    if code == 2 and not said.strip():
        return "exit code 2 without a word"
    return None


def _save_teacher(folder: Path) -> None:
    from families import tiny, tokenizer

    from kdcli.models.save import save_model

    folder.mkdir()
    names = {"id2label": {0: "no", 1: "yes"}, "label2id": {"no": 0, "yes": 1}}
    save_model(tiny("bert", **names), folder, tokenizer())


def main() -> int:
    """Try the cases, print what is wrong with each, and return 1 when something is."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipes", type=int, default=1000)
    parser.add_argument("--overrides", type=int, default=200)
    parser.add_argument("--arguments", type=int, default=1600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="one case, such as recipe:17")
    parser.add_argument("--verbose", action="store_true", help="name every case before it is tried")
    options = parser.parse_args()
    cases = [
        *recipes(options.recipes, options.seed),
        *overrides(options.overrides, options.seed),
        *argument_lists(options.arguments, options.seed),
    ]
    if options.only:
        cases = [case for case in cases if case.name == options.only]
    failures, slowest = 0, (0.0, "")
    with tempfile.TemporaryDirectory() as place:
        os.chdir(place)
        os.environ["KDCLI_CACHE"] = str(Path(place) / "cache")
        os.environ.pop("KDCLI_DATA_DIR", None)
        furnish(Path(place), _save_teacher)
        # The libraries' import is no case's own time.
        import kdcli.distill.prepare  # noqa: F401

        for case in cases:
            if options.only:
                print(case.arguments, case.recipe[:3000].decode(errors="replace"), sep="\n")
            if options.verbose:
                print(case.name, flush=True)
            begun = time.process_time()
            problem = problem_of(case, Path(place))
            slowest = max(slowest, (time.process_time() - begun, case.name))
            if problem is not None:
                failures += 1
                print(f"{case.name} {[word[:60] for word in case.arguments]}\n    {problem}", flush=True)
        os.chdir("/")
    print(f"{len(cases)} cases, {failures} failed; the slowest took {slowest[0]:.1f} s ({slowest[1]})")
    return int(failures > 0)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    sys.exit(main())
