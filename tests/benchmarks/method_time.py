"""Seconds of a training step of every method, as a ratio to plain fine-tuning of the same student.

    python tests/benchmarks/method_time.py [--batch 32] [--sequence 64] [--rounds 8] [--only kd minilmv2]
        [--max-ratio 1.6] [--max-overhead 1.3] [--device cuda]

A method with stages has a row for each. Real modules, made-up text; all steps alternate in one process. "needs" is
the sum of the forward and backward passes that the algorithm cannot do without, each measured by itself in the same
rounds; "overhead" is the step over that sum, median over rounds. The teacher's cached logits cost nothing here: they
are computed before the first step.

Ends with 1, and a line for every limit that is broken: the ratio of minilmv2 on a task is at most --max-ratio times
that of kd, and no overhead is above --max-overhead.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import encoder, report
from rich.console import Console

from kdcli.distill.resolve import context_of, resolve
from kdcli.distill.states import teacher_request
from kdcli.distill.student import make_distiller
from kdcli.machine import resolve_precision
from kdcli.methods import registry
from kdcli.methods.base import Stage, Term
from kdcli.models.capture import Capture
from kdcli.models.load import load_tokenizer
from kdcli.models.student import build_student
from kdcli.objectives.gold import GoldObjective
from kdcli.recipe.schema import EvaluateSection, Recipe, StudentSection, TaskSection
from kdcli.signals import Request
from kdcli.tasks import registry as kinds
from kdcli.tasks.heads import load_model
from kdcli.tasks.load import load_task
from kdcli.training.schemes.base import Scheme, Setting
from kdcli.training.settings import LoopSettings
from kdcli.training.step import Distiller
from kdcli.training.teacher_states import KeptStates

Step = Callable[[int], None]
OPTIONS: dict[str, dict[str, Any]] = {"theseus": {"schedule": "constant", "replacing_rate": 0.5}}
"""Half of the modules replaced: the mean over a run is less work than this at its beginning, and more at its end."""


class World:
    """A teacher, a batch, and what passes cost; for tasks with labels or for plain text."""

    def __init__(self, kind: str, batch: int, sequence: int, *, bf16: bool, device: torch.device) -> None:
        head = "masked-lm" if kind == "text" else "sequence-classification"
        torch.manual_seed(0)
        self.bf16 = bf16
        self.device = device
        self.moves: list[Callable[[], Any]] = []
        self.tokenizer = load_tokenizer(encoder())
        labels = {} if kind == "text" else {"num_labels": 2}
        self.teacher = load_model(encoder(), head, new_head=labels)
        self.task = load_task(TaskSection(name="reviews", train_samples=4 * batch), EvaluateSection(), base=Path())
        # Sentences joined until they fill the sequence: no padding, so that FLOPs are what they seem.
        text = " ".join(list(self.task.train["text"]) * 40)
        words = text.split()
        rows = [" ".join(words[i * sequence : (i + 1) * sequence]) for i in range(4 * batch)]
        train = self.task.train.remove_columns("text").add_column("text", rows)  # type: ignore[call-arg]
        self.task = replace(self.task, train=train)
        if kind == "text":
            text_kind = kinds.get("text")
            self.task = replace(self.task, kind=text_kind, fields=text_kind.fields())
        self.encoded = self.task.kind.prepare(self.task, self.tokenizer, sequence)
        self.batch = self.encoded.collator([self.encoded.train[i] for i in range(batch)])

    def place(self) -> None:
        """Move all that was built to the device, as the Trainer does once a stage has begun."""
        self.batch = {name: values.to(self.device) for name, values in self.batch.items()}
        self.teacher.to(self.device)
        for move in self.moves:
            move()

    def autocast(self) -> Any:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bf16)

    def plain(self, student: Any) -> Step:
        """Return a step of fine-tuning."""
        gold = GoldObjective(self.task.kind.distribution)
        distiller = Distiller(student.train(), [Term("task", gold)], kind=self.task.kind)
        return self.step_of(distiller, Scheme())

    def step_of(self, distiller: Distiller, scheme: Scheme) -> Step:
        trained = [p for p in distiller.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-6, fused=True)

        def move() -> None:
            distiller.to(self.device)
            distiller.place(self.device)
            scheme.place(self.device)

        self.moves.append(move)

        def step(number: int) -> None:
            scheme.before_step(number, self.batch, optimizer)
            with self.autocast():
                loss = distiller(self.batch)["loss"]
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()

        return step

    def method(
        self, name: str, section: StudentSection, kept: Callable[[Request], KeptStates] | None = None
    ) -> dict[str, list[Step]]:
        """Return of every stage of a method a step, and the passes that it cannot do without (on plain text).

        kept: makes the states that a stage reads from the disk, in place of a teacher that runs.
        Stages are called "tinybert 1" and "tinybert 2", a single one as the method.
        """
        recipe = Recipe.model_validate(
            {
                "task": {"name": "made-up", "type": "text"} if self.task.kind.scored_by_loss else "reviews",
                "method": {"name": name, **OPTIONS.get(name, {})},
                "teacher": {"model": encoder()},
                "student": section.model_dump(exclude_unset=True),
                "train": {"max_steps": 10_000, "learning_rate": 1e-6, "batch_size": len(self.batch["input_ids"])},
            }
        )
        resolved = resolve(recipe, Path("made-up.toml"))
        shadow = build_student(self.teacher, resolved.student, seed=0)
        context = context_of(self.teacher, shadow, self.task, resolved.recipe)
        resolved.method.check(resolved.options, context)
        stages = resolved.method.build(resolved.options, context)
        found = {}
        for number, stage in enumerate(stages, 1):
            # Later stages do the same work on any student.
            student = build_student(self.teacher, resolved.student, seed=0).model
            steps = [self.step_of(*self.begun(student, stage, resolved.loop, kept))]
            if self.task.kind.scored_by_loss:
                steps += self.captured(build_student(self.teacher, resolved.student, seed=0).model, stage.terms)
            found[name if len(stages) == 1 else f"{name} {number}"] = steps
        return found

    def begun(
        self, student: Any, stage: Stage, loop: LoopSettings, kept: Callable[[Request], KeptStates] | None = None
    ) -> tuple[Distiller, Scheme]:
        """Return what trains in a stage."""
        scheme = stage.scheme or Scheme()
        rows = scheme.begin(
            Setting(
                student=student,
                teacher=self.teacher,
                processor=self.tokenizer,
                task=self.task,
                train=self.encoded.train,
                collator=self.encoded.collator,
                loop=loop,
                base=Path(),
                cache=True,
                console=Console(quiet=True),
            )
        )
        states = kept(teacher_request(list(stage.terms))) if kept is not None else None
        distiller = make_distiller(student, list(stage.terms), scheme, rows, states=states)
        distiller.student.train()
        return distiller, scheme

    def captured(self, student: Any, terms: list[Term]) -> list[Step]:
        """Return what it takes to capture all that `terms` ask for: a pass of the teacher, a step of the student."""
        request, teacher_request = Request(), Request()
        for term in terms:
            request |= term.objective.student_request()
            teacher_request |= term.objective.teacher_request()
        self.moves.append(lambda: student.to(self.device))
        capture, trained = Capture(student.train(), request, self.task.kind), list(student.parameters())
        optimizer = torch.optim.AdamW(trained, lr=1e-6, fused=True)

        def step(_: int) -> None:
            with self.autocast(), capture as running:
                signals = running.run(self.batch)
                said = [*signals.hidden.values(), *signals.matrices.values()]
                said += [table.logits for table in signals.predictions]
                total = torch.stack([values.float().square().mean() for values in said]).sum()
            total.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()

        return [self.teacher_pass(teacher_request), step]

    def teacher_pass(self, request: Request) -> Step:
        """Return a pass of the teacher that ends where nothing more is wanted."""
        capture = Capture(self.teacher, request, self.task.kind)

        def go(_: int) -> None:
            with torch.no_grad(), self.autocast(), capture as running:
                running.run(self.batch)

        return go

    def passes(self, student: Any) -> dict[str, Step]:
        """Return single passes: of the teacher (T) and the student (S); f forward, b backward, x to the input only."""
        self.moves.append(lambda: student.to(self.device))
        names = ("input_ids", "attention_mask", "token_type_ids")

        def run(model: Any, *, backward: bool, inward: bool = False, twice: bool = False) -> Step:
            model.train()

            def go(_: int) -> None:
                for p in model.parameters():
                    p.requires_grad_(backward and not inward)
                table = model.get_input_embeddings()
                fed = {name: self.batch[name] for name in names if name in self.batch}
                if inward or twice:
                    fed["inputs_embeds"] = table(fed.pop("input_ids")).detach().requires_grad_()
                math = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
                with self.autocast(), torch.set_grad_enabled(backward):
                    if twice:
                        with math:
                            logits = model(**fed).logits
                    else:
                        logits = model(**fed).logits
                if not backward:
                    return
                total = logits.float().square().sum()
                if twice:
                    (found,) = torch.autograd.grad(total, fed["inputs_embeds"], create_graph=True)
                    (total + found.square().sum()).backward()
                elif inward:
                    torch.autograd.grad(total, fed["inputs_embeds"])
                else:
                    total.backward()
                model.zero_grad()

            return go

        return {
            # Of a language model's head only the masked tokens are needed, where nothing else is asked.
            "Tf": self.teacher_pass(Request(logits=True)),
            "Tfa": run(self.teacher, backward=False),
            "Tfb": run(self.teacher, backward=True),
            "Tfx": run(self.teacher, backward=True, inward=True),
            "Sf": run(student, backward=False),
            "Sfb": run(student, backward=True),
            "Sfbb": run(student, backward=True, twice=True),
        }


def needs(name: str, t: dict[str, float], plain: float, *, text: bool) -> float:
    """Return the seconds of the passes that a step of a stage cannot do without; plain: of a fine-tuning step."""
    backward = {"T": t["Tfb"] - t["Tfa"], "S": t["Sfb"] - t["Sf"]}
    extra = {
        "kd": 0.0,
        "dbkd": 0.0,
        "minilmv2": 5 / 6 * t["Tf"],
        # The prediction stage: the teacher has spoken.
        "tinybert 2": 0.0,
        # The attribution pass of the student is a pass of its own kind, in place of the usual one.
        "adkd": t["Tfx"] + t["Sfbb"] - t["Sfb"],
        # Half of the time a predecessor pair runs, and gradients only pass through it.
        "theseus": 0.5 * (t["Tfx"] - t["Sfb"]),
        "lgtm": 3 * t["Tf"] + 2 * backward["T"] + 4 * t["Sf"] + 2 * backward["S"],
    }
    if text and name == "distilbert":
        # Predictions at all tokens, not at the masked ones alone.
        return t["Tfa"] + t["Sfb"]
    if text and name != "od":
        # No head is needed: both models run as far as their last block, or less.
        return t[f"{name} T"] + t[f"{name} S"]
    return plain + extra.get(name, t["Tf"])


def broken(rows: list[dict[str, Any]], max_ratio: float, max_overhead: float) -> list[str]:
    """Return a line for every limit that the rows break."""
    ratios = {row["method"]: row["ratio"] for row in rows}
    lines = [
        f"{row['method']}: overhead {row['overhead']:.3f} is above {max_overhead}"
        for row in rows
        if row["overhead"] > max_overhead
    ]
    if {"kd", "minilmv2"} <= set(ratios) and ratios["minilmv2"] > max_ratio * ratios["kd"]:
        against = ratios["minilmv2"] / ratios["kd"]
        lines.append(f"minilmv2: its ratio is {against:.3f} times that of kd, above {max_ratio}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--sequence", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--max-ratio", type=float, default=1.6, help="of minilmv2, in ratios of kd")
    parser.add_argument("--max-overhead", type=float, default=1.3, help="of every method")
    parser.add_argument("--only", nargs="*", default=None, help="names of methods")
    options = parser.parse_args()
    bf16 = resolve_precision(options.precision, options.device) == "bf16"
    device = torch.device(options.device)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as cache:
        os.environ["KDCLI_CACHE"] = cache
        for kind in ("classification", "text"):
            names = [n for n in registry.names() if registry.get(n).needs <= kinds.get(kind).provides]
            names = [n for n in names if options.only is None or n in options.only]
            if names:
                make = partial(World, kind, options.batch, options.sequence, bf16=bf16, device=device)
                rows += measure(make, names, options.rounds)
    print(f"precision {'bf16' if bf16 else 'fp32'}, {options.batch} x {options.sequence} tokens")
    report(rows, Path(tempfile.gettempdir()) / "method_time.json")
    if lines := broken(rows, options.max_ratio, options.max_overhead):
        print("\n".join(lines))
        sys.exit(1)


def measure(make: Callable[[], World], names: list[str], rounds: int) -> list[dict[str, Any]]:
    """Return a row a stage of a method."""
    world = make()
    depth, low = StudentSection(form="depth", layers=3), StudentSection(form="low-rank", budget=0.5)
    sections = {name: low if name == "makd" else StudentSection(layers=3) for name in names}
    references = {"depth": depth, **({"low-rank": low} if "makd" in names else {})}
    steps: dict[str, Step] = {}
    for form, section in references.items():
        steps[f"plain {form}"] = world.plain(build_student(world.teacher, section, seed=0).model)
    stages: dict[str, str] = {}
    for name, section in sections.items():
        for stage, found in world.method(name, section).items():
            stages[stage] = "low-rank" if name == "makd" else "depth"
            steps |= dict(zip((stage, f"{stage} T", f"{stage} S"), found, strict=False))
    # Schemes freeze the teacher and passes thaw it: each has a copy.
    others = make()
    steps |= others.passes(build_student(world.teacher, depth, seed=0).model)
    world.place()
    others.place()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 2):
        for name, step in steps.items():
            begun = time.perf_counter()
            step(number)
            if world.device.type == "cuda":
                # What the step does may still be in the GPU's queue.
                torch.cuda.synchronize()
            if number > 1:
                seconds[name].append(time.perf_counter() - begun)
    rows = []
    for name, form in stages.items():
        plain = seconds[f"plain {form}"]
        text = world.task.kind.scored_by_loss
        rounded = [{key: values[i] for key, values in seconds.items()} for i in range(rounds)]
        limits = [needs(name, found, plain[i], text=text) for i, found in enumerate(rounded)]
        rows.append(
            {
                "method": name + (" (text)" if world.task.kind.scored_by_loss else ""),
                "step ms": 1000 * statistics.median(seconds[name]),
                "fine-tuning ms": 1000 * statistics.median(plain),
                "ratio": statistics.median(a / b for a, b in zip(seconds[name], plain, strict=True)),
                "needs ms": 1000 * statistics.median(limits),
                "overhead": statistics.median(a / b for a, b in zip(seconds[name], limits, strict=True)),
            }
        )
    return rows


if __name__ == "__main__":
    main()
