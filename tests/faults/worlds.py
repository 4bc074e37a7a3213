"""Small inputs for runs that are killed or whose files are damaged: models, data and a recipe for each kind of run."""

from dataclasses import dataclass
from pathlib import Path

from families import tiny, tokenizer

from kdcli.data.reviews import reviews
from kdcli.models.save import save_model

TASK = '[task]\nname = "reviews"\ntrain_samples = 48\nvalidation_samples = 24\nmax_length = 24\n'
TEACHER = '[teacher]\nmodel = "teacher"\n'
SCRATCH = (
    "[teacher]\nscratch = {layers = 2, hidden_size = 32, heads = 4, intermediate_size = 64, vocab_size = 220}\n"
    "finetune = {max_steps = 2, learning_rate = 1e-3, batch_size = 8}\n"
)
DEPTH = '[student]\nform = "depth"\nlayers = 1\n'


def _train(steps: int, select: str = "last", every: int = 1) -> str:
    return (
        f"[train]\nmax_steps = {steps}\nbatch_size = 8\nlearning_rate = 1e-3\nlog_every = 1\neval_every = {every}\n"
        f'select = "{select}"\nprecision = "fp32"\ndevice = "cpu"\n'
    )


@dataclass(frozen=True)
class Kind:
    """A recipe, and the command that runs it."""

    recipe: str
    command: str = "distill"


KINDS = {
    "makd": Kind('[method]\nname = "makd"\n' + TASK + SCRATCH + "[student]\nbudget = 0.6\n" + _train(5)),
    "opdf": Kind(
        '[method]\nname = "kd"\n' + TASK + TEACHER + DEPTH + "[overparam]\nlength = 1\n" + _train(5, "best", 2)
    ),
    "tinybert": Kind('[method]\nname = "tinybert"\nshares = [0.5, 0.5]\n' + TASK + TEACHER + DEPTH + _train(6)),
    "lgtm": Kind('[method]\nname = "lgtm"\n' + TASK + TEACHER + DEPTH + _train(5)),
    "theseus": Kind('[method]\nname = "theseus"\n' + TASK + TEACHER + DEPTH + _train(5, "best")),
    "dbkd": Kind('[method]\nname = "dbkd"\ncopies = 2\n' + TASK + SCRATCH + DEPTH + _train(4)),
    "minilmv2": Kind(
        '[method]\nname = "minilmv2"\n[task]\nname = "mine"\ntype = "text"\ndata = "text.txt"\nmax_length = 24\n'
        + SCRATCH
        + DEPTH
        + _train(4)
        + "[[finetune]]\nmax_steps = 2\nbatch_size = 8\nseeds = 1\n"
        + 'task = {name = "reviews", train_samples = 24, validation_samples = 16, max_length = 24}\n'
    ),
    "augment": Kind(
        '[method]\nname = "kd"\n'
        + TASK
        + '[task.augment]\nmodel = "filler"\ncopies = 1\ntop_k = 4\n'
        + TEACHER
        + DEPTH
        + _train(4)
    ),
    "compare": Kind('[method]\nname = "kd"\n' + TASK + SCRATCH + DEPTH + _train(3), "compare"),
    # Three rotations, the fewest other files.
    "rotations": Kind('[method]\nname = "kd"\n' + TASK + TEACHER + DEPTH + _train(5)),
    "export": Kind(
        '[method]\nname = "kd"\n'
        + TASK
        + TEACHER
        + DEPTH
        + _train(2)
        + "[export]\nonnx = true\nruns = 1\nbatch_sizes = [1]\nsequence_lengths = [16]\nthreads = 1\n"
    ),
}
"""name -> kind of run."""


def make_world(folder: Path) -> None:
    """Write the models, the data and the recipes of all kinds into `folder`."""
    from transformers import AutoModelForMaskedLM

    words = tokenizer()
    names = {"id2label": {0: "negative", 1: "positive"}, "label2id": {"negative": 0, "positive": 1}}
    teacher = tiny("bert", vocab_size=len(words), **names)
    filler = AutoModelForMaskedLM.from_config(teacher.config)
    for name, model in (("teacher", teacher), ("filler", filler)):
        (folder / name).mkdir()
        save_model(model.eval(), folder / name, words)
    (folder / "text.txt").write_text("\n\n".join(reviews()["train"]["text"][:60]), encoding="utf-8")
    for name, kind in KINDS.items():
        (folder / f"{name}.toml").write_text(kind.recipe, encoding="utf-8")


def arguments_of(name: str) -> list[str]:
    """Return the command line of a kind of run, to be called in its world's folder."""
    if KINDS[name].command == "compare":
        return ["compare", f"{name}.toml", "--seeds", "2", "--output", "runs"]
    return ["distill", f"{name}.toml", "--output", "runs"]
