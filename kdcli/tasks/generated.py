"""What kinds of tasks share whose models write texts: how these are written, shown, compared and scored."""

import json
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from kdcli.models.heads import CAUSAL_LM
from kdcli.recipe.schema import Fraction, NonNegativeInt, PositiveFloat, PositiveInt, Section, Seed, TaskSection
from kdcli.tasks.kind import Fields, TaskKind

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset
    from rich.console import Console
    from torch import Tensor

    from kdcli.models.generation import Sampling
    from kdcli.objectives.distribution import Distribution
    from kdcli.signals import Prediction

ENDLESS = 10**9
"""Tokens that no prompt has."""
SEEDS = (10, 20, 30, 40, 50)
"""Of sampled texts. Source: Gu et al. 2023, MiniLLM (arXiv 2306.08543), section 3.1."""


class SamplingSection(Section):
    """`[task.sampling]`: texts are drawn, in place of the most probable token each time."""

    temperature: PositiveFloat = Field(default=1.0, description="Logits are divided by it; below 1 draws safer tokens.")
    top_k: NonNegativeInt = Field(default=0, description="Draw from as many most probable tokens. 0 draws from all.")
    top_p: Fraction = Field(
        default=1.0, description="Draw from the fewest tokens that have this share of the probability together."
    )


class GenerationFields(Fields):
    """How the texts that are scored are written."""

    max_new_tokens: PositiveInt | None = Field(
        default=None,
        description="Tokens of a generated text. Left out, as many as max_length leaves after its prompt.",
    )
    sampling: SamplingSection | None = Field(
        default=None,
        description="Draw the texts that are scored. Left out, the most probable token is taken each time (greedy).",
    )
    seeds: Annotated[list[Seed], Field(min_length=1, max_length=1000)] | None = Field(
        default=None,
        description="Seeds of texts that are drawn; their scores are averaged. Left out, 10, 20, 30, 40 and 50.",
    )

    def check(self, task: TaskSection) -> None:
        super().check(task)
        if self.seeds is not None and self.sampling is None:
            raise ValueError("seeds are of texts that are drawn: add sampling = {}, or leave them out")
        if self.seeds is not None and len(set(self.seeds)) < len(self.seeds):
            raise ValueError("seeds takes each seed once")

    @property
    def writings(self) -> "list[Writing]":
        """How the texts of a score are written: greedily once, or drawn once a seed."""
        if self.sampling is None:
            return [Writing(self.max_new_tokens)]
        drawn = Writing(self.max_new_tokens, **self.sampling.model_dump())
        return [replace(drawn, seed=seed) for seed in self.seeds or SEEDS]


SCRIPT = """\
{layout}ins = session.get_inputs()
names = [n.name for n in ins if "." not in n.name]
past = {{n.name: np.zeros((1, n.shape[1], 0, {size}), "f2" if "16" in n.type else "f4") for n in ins if "." in n.name}}
for text in sys.argv[1:]:
    cache, seen, ids = past, 0, (prompt := [{first}*tokenizer.encode({text}, add_special_tokens=False).ids])
    while len(ids) < {limit} and (not seen or ids[-1] not in {ends}):
        values = [ids[seen:]], [[1] * len(ids)], [range(seen, len(ids))], [-1]
        logits, *presents = session.run(None, cache | {{name: np.array(value) for name, value in zip(names, values)}})
        cache, seen, ids = dict(zip(past, presents)), len(ids), [*ids, int(logits[0, -1].argmax())]
    seen or print(f"no room for a {answer}: the prompt has {{len(prompt)}} tokens", file=sys.stderr)
    print(json.dumps({{"{answer}": {written}}}))
"""
"""What writes text with an exported graph: greedily, each token with the cache of those before it."""

WIDTH = 90
"""Characters of a string in a line of a script."""


def _assignment(**values: str) -> str:
    """Return Python that gives names their texts, in lines that are not too long; nothing where all are empty."""
    texts = []
    for text in values.values():
        parts = [json.dumps(text[at : at + WIDTH], ensure_ascii=False) for at in range(0, max(1, len(text)), WIDTH)]
        texts.append(parts[0] if len(parts) == 1 else "(" + "\n    ".join(parts) + ")")
    return f"{', '.join(values)} = {', '.join(texts)}\n" if any(values.values()) else ""


@dataclass(frozen=True)
class Writing:
    """How texts are written. max_new_tokens: of each; None: as many as the longest input leaves after its prompt.

    temperature: 0 takes the most probable token each time; the others as `Sampling` has them. first: the number of the
    first prompt: what is drawn depends on the seed and a prompt's number.
    """

    max_new_tokens: int | None = None
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    first: int = 0

    @property
    def sampling(self) -> "Sampling":
        from kdcli.models.generation import Sampling

        return Sampling(self.temperature, self.top_k, self.top_p)


class GeneratingKind(TaskKind):
    """A kind whose models predict each next token, and so continue a prompt."""

    head = CAUSAL_LM
    errors = frozenset({"perplexity"})
    generates = True
    written = "tokenizer.decode(ids[len(prompt) :]).strip()"
    """`text_of` as Python of the exported script."""
    scored_by_outputs = False
    outputs_are_kept = False
    tokens_weigh_equally = True

    @property
    def distribution(self) -> "Distribution":
        from kdcli.objectives.distribution import Categorical

        return Categorical()

    def configure(self, labels: Sequence[str]) -> dict[str, Any]:
        return {}

    def collator(self, processor: Any) -> "Callable[[list[dict[str, Any]]], dict[str, Tensor]]":
        from kdcli.tasks.next_tokens import NextTokenCollator

        return NextTokenCollator(processor)

    def token_counts(self, features: "Dataset") -> "np.ndarray":
        from kdcli.tasks.next_tokens import counts_of

        return counts_of(features)

    def positions(self, batch: "Mapping[str, Tensor]", *, everywhere: bool = False) -> "Tensor":
        """Return the positions whose next token is predicted, or all real ones."""
        from kdcli.tasks.next_tokens import positions_of

        return positions_of(batch, everywhere=everywhere)

    def predictions(
        self, output: Any, batch: "Mapping[str, Tensor]", *, everywhere: bool = False
    ) -> "list[Prediction]":
        """Return one table with a row a predicted token, or a real one, over the vocabulary."""
        from kdcli.tasks.next_tokens import predictions_of

        return predictions_of(output, batch, everywhere=everywhere)

    @abstractmethod
    def prompts(self, rows: "Dataset", processor: Any, max_length: int) -> list[list[int]]:
        """Return the tokens of each row after which a model writes, where prompt and text have `max_length` in all."""

    @abstractmethod
    def prompts_of(self, rows: "Dataset", processor: Any, room: int) -> list[list[int]]:
        """Return the same of rows that are no training data: all tokens, where these are at most `room`."""

    @abstractmethod
    def end_tokens(self, processor: Any, config: Any) -> set[int]:
        """Return the tokens that end a text."""

    @abstractmethod
    def layout(self, processor: Any) -> tuple[list[int], str, str] | None:
        """Return what stands around a text in a prompt: tokens before, text before and after; None: not so simply."""

    def script(self, fields: Any, config: Any, processor: Any, max_length: int) -> str | None:
        from kdcli.models.shape import longest_input, shape_of

        if (layout := self.layout(processor)) is None:
            return None
        first, before, after = layout
        given, positions = getattr(fields, "max_new_tokens", None), longest_input(config)
        limit = f"len(prompt) + {given}" if given else str(max_length)
        if given and positions is not None:
            limit = f"min({positions}, {limit})"
        return SCRIPT.format(
            layout=_assignment(BEFORE=before, AFTER=after),
            first="".join(f"{number}, " for number in first),
            text=" + ".join([*["BEFORE"] * bool(before), "text", *["AFTER"] * bool(after)]),
            size=shape_of(config).head,
            limit=limit,
            ends="{" + ", ".join(map(str, sorted(self.end_tokens(processor, config)))) + "}",
            answer=self.answer,
            written=self.written,
        )

    def write(
        self,
        model: Any,
        prompts: list[list[int]],
        processor: Any,
        writing: Writing,
        *,
        max_length: int,
        batch_size: int,
        device: str = "auto",
        owner: str = "the model",
        generate: Callable[..., list[list[int]]] | None = None,
        console: "Console | None" = None,
    ) -> list[dict[str, Any]]:
        """Return the text that a model writes after each prompt, its number of tokens, and whether it came to an end.

        generate: as in `evaluate`. Raises NotFiniteError where logits contain NaN or inf.
        """
        from kdcli.models import generation
        from kdcli.models.shape import longest_input
        from kdcli.tasks.predict import placed
        from kdcli.tasks.text_score import tokens_of_text

        end, given = self.end_tokens(processor, model.config), writing.max_new_tokens
        limits = [limit for limit in (longest_input(model.config), None if given else max_length) if limit is not None]
        how: dict[str, Any] = {
            "max_new_tokens": given or max_length,
            "end": end,
            "pad": processor.pad_token_id,
            "sampling": writing.sampling,
            "seed": writing.seed,
            "numbers": range(writing.first, writing.first + len(prompts)),
            "batch_size": batch_size,
            "max_length": min(limits, default=None),
            "owner": owner,
            "console": console,
        }
        if generate is not None:
            found = generate(model, prompts, device=device, **how)
        else:
            with placed(model, device):
                found = generation.generate(model, prompts, **how)
        return [
            {
                self.answer: self.text_of(prompt, tokens_of_text(ids, end), processor),
                "tokens": len(ids),
                "finished": bool(ids) and ids[-1] in end,
            }
            for prompt, ids in zip(prompts, found, strict=True)
        ]

    def text_of(self, prompt: list[int], ids: list[int], processor: Any) -> str:
        """Return tokens that a model wrote after a prompt as a text."""
        return processor.decode(ids, skip_special_tokens=True).strip()

    def replies(
        self,
        model: Any,
        rows: "Dataset",
        processor: Any,
        *,
        top: int | None = None,
        writing: Writing | None = None,
        ask: Any = None,
        **options: Any,
    ) -> list[dict[str, Any]]:
        """Return what a model writes for each row, and whether its prompt was too long, and cut.

        writing: how; None: greedily.
        """
        writing, max_length = writing or Writing(), options["max_length"]
        room = max(max_length - (writing.max_new_tokens or max_length), max_length // 2)
        prompts, whole = (self.prompts_of(rows, processor, limit) for limit in (room, ENDLESS))
        replies = self.write(model, prompts, processor, writing, **options)
        cut = (len(prompt) < len(every) for prompt, every in zip(prompts, whole, strict=True))
        return [{**reply, "cut": shorter} for reply, shorter in zip(replies, cut, strict=True)]

    def beside(self, reply: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
        """Return whether two texts are the same, and the ROUGE-L between them."""
        from kdcli.tasks.text_score import rouge_l

        text, second = reply[self.answer], other[self.answer]
        return {"agree": text == second, "rouge_l": rouge_l(text, [second])}


def score_texts(texts: Sequence[Sequence[str]], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Return ROUGE-L and exact match of texts, (seeds, rows), means over rows and seeds.

    Of several seeds there is the standard deviation (n - 1) over them, too, as `rouge_l/std` and `exact_match/std`.
    """
    import numpy as np

    from kdcli.tasks.metrics import DEVIATION
    from kdcli.tasks.text_score import exact_match, rouge_l

    found = {}
    for name, score in (("rouge_l", rouge_l), ("exact_match", exact_match)):
        each = [np.mean([score(*pair) for pair in zip(one, references, strict=True)]) for one in texts]
        found[name] = float(np.mean(each))
        if len(each) > 1:
            found[f"{name}{DEVIATION}"] = float(np.std(each, ddof=1))
    return found
