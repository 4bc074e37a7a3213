"""What a model writes to the prompts that it is scored on: shared out among processes, a teacher's kept on disk."""

from collections.abc import Collection, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch

from kdcli.files import cache_dir, fingerprint
from kdcli.models.generation import Sampling, generate
from kdcli.models.hashing import hash_of_model
from kdcli.models.placement import is_gathered
from kdcli.tasks.predict import placed
from kdcli.tensor_file import keep_tensors, kept_tensors
from kdcli.training.distributed import is_main, main_does, process, processes, shared

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedModel


def generate_together(
    model: "PreTrainedModel",
    prompts: Sequence[Sequence[int]],
    *,
    numbers: Sequence[int],
    device: str = "auto",
    use_cache: bool = False,
    console: "Console | None" = None,
    **options: Any,
) -> list[list[int]]:
    """Return what `generate` does; each of several processes, which all call this, writes a share of it.

    A model whose blocks are gathered from all of them writes everything in each. device: as in `predict`.
    use_cache: look it up in a file first, and keep it in one. Its name is made of the model's weights and
    configuration, the prompts and their numbers, and how texts are written, but for the size of batches.
    Raises NotFiniteError in all processes where it does so in one; nothing is kept then.
    """
    name = _name(model, prompts, numbers, **options) if use_cache else ""
    path = cache_dir() / "texts" / f"{name}.safetensors"
    kept = kept_tensors(path, None, of=name, console=console if is_main() else None) if use_cache else None
    # A process may find what another has just written: all of them go the same way.
    if all(shared(kept is not None)) and kept is not None:
        return [part.tolist() for part in kept["ids"].split(kept["lengths"].tolist())]
    together, found = is_gathered(model), list[list[int]]()
    own = slice(None) if together else slice(process(), None, processes())
    error: Exception | None = None
    try:
        told = console if is_main() else None
        with placed(model, device):
            found = generate(model, prompts[own], numbers=numbers[own], console=told, **options)
    except Exception as raised:
        # Raised at once, the other processes would wait for this one.
        error = raised
    for problem in shared(error):
        if problem is not None:
            raise problem
    texts = found
    if not together:
        texts = [[] for _ in prompts]
        for number, part in enumerate(shared(found)):
            texts[number :: processes()] = part
    if use_cache:
        ids = torch.tensor([token for text in texts for token in text], dtype=torch.int64)
        table = {"ids": ids, "lengths": torch.tensor([len(text) for text in texts])}
        main_does(lambda: keep_tensors(path, table, of=name))
    return texts


def _name(
    model: "PreTrainedModel",
    prompts: Sequence[Sequence[int]],
    numbers: Sequence[int],
    *,
    end: Collection[int],
    sampling: Sampling,
    batch_size: int = 0,
    owner: str = "",
    **options: Any,
) -> str:
    """Return what names the texts. options: `max_new_tokens`, `max_length`, `seed` and `pad`."""
    asked = {"prompts": prompts, "numbers": list(numbers) if sampling.temperature else None, "end": sorted(end)}
    return fingerprint({"model": hash_of_model(model), **asked, **asdict(sampling), **options, "format": 1})
