"""Models of sentence embeddings: folders of sentence-transformers in and out, compared with that library itself."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from families import NAMES, tiny, tokenizer
from safetensors.torch import load_file

from kdcli.errors import InputError
from kdcli.models.capture import Capture
from kdcli.models.counts import count_parameters
from kdcli.models.embedding import ASSUMED, POOLING, append_dense, dimension_of, settings_of
from kdcli.models.hashing import hash_of_model, hash_of_weights
from kdcli.models.heads import BASE, SENTENCE_EMBEDDING, Labelling, head_of, with_new_head
from kdcli.models.load import has_head, load_any, load_model, load_tokenizer
from kdcli.models.overparam import contract_model, overparameterise
from kdcli.models.save import round_to_stored, save_model
from kdcli.models.sentence_folder import longest_text, prompt_of
from kdcli.models.student import build_student
from kdcli.models.vocabulary import trim_vocabulary, trimmed
from kdcli.recipe.schema import OverparamSection, StudentSection
from kdcli.signals import Request
from kdcli.tasks import registry

TEXTS = ["so dull", "a film that is far better than one might think, with great actors", "not at all a bad one"]


def embedder(family: str = "bert", settings: dict[str, Any] | None = None, **extra: Any) -> Any:
    """Return a tiny model of sentence embeddings, with a Dense module and a normalisation after other pooling."""
    body = with_new_head(tiny(family, **extra), BASE)
    return with_new_head(body, SENTENCE_EMBEDDING, {"sentence_embedding": {**ASSUMED, **(settings or {})}})


def encoded(model: Any, texts: list[str] = TEXTS, prompt: str = "") -> torch.Tensor:
    batch = tokenizer()([prompt + text for text in texts], padding=True, return_tensors="pt")
    types = {"token_type_ids": batch["token_type_ids"]} if getattr(model.config, "type_vocab_size", 0) > 1 else {}
    with torch.inference_mode():
        found = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], **types)
    return found.sentence_embedding


def library(folder: Path) -> Any:
    """Return what sentence-transformers loads."""
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(folder), device="cpu")


def test_the_real_folder_gives_what_the_library_gives_and_so_does_the_folder_that_is_written(
    encoder: Path, tmp_path: Path
):
    model, words = load_model(encoder, SENTENCE_EMBEDDING), load_tokenizer(encoder)
    batch = words(TEXTS, padding=True, return_tensors="pt")
    with torch.inference_mode():
        ours = model(**batch).sentence_embedding
    assert settings_of(model)["max_seq_length"] == 256
    assert longest_text(words, 512) == 256
    assert torch.allclose(ours, torch.tensor(library(encoder).encode(TEXTS)), atol=1e-6)
    save_model(model, tmp_path, words)
    again = library(tmp_path)
    assert torch.allclose(ours, torch.tensor(again.encode(TEXTS)), atol=1e-6)
    assert again.max_seq_length == 256
    assert torch.equal(load_model(tmp_path, SENTENCE_EMBEDDING)(**batch).sentence_embedding, ours)


@pytest.mark.parametrize("family", NAMES)
def test_every_family_is_written_as_the_library_reads_it(family: str, tmp_path: Path):
    torch.manual_seed(1)
    model = embedder(family, {"pooling": ["mean"], "modules": [{"type": "Normalize"}]})
    append_dense(model, torch.randn(24, 32), torch.randn(24))
    save_model(model, tmp_path, tokenizer())
    ours = encoded(model)
    assert ours.shape == (3, 24) and dimension_of(model) == 24
    assert torch.allclose(ours, torch.tensor(library(tmp_path).encode(TEXTS)), atol=1e-6)
    loaded = load_any(tmp_path, [SENTENCE_EMBEDDING])
    assert head_of(loaded, [SENTENCE_EMBEDDING]) == SENTENCE_EMBEDDING
    assert torch.equal(encoded(loaded), ours)
    assert settings_of(loaded) == settings_of(model)
    assert hash_of_weights(loaded) == hash_of_weights(model)


@pytest.mark.parametrize("modes", [*([mode] for mode in POOLING), ["cls", "mean"], ["mean", "cls"]])
def test_every_pooling_is_the_librarys(modes: list[str], tmp_path: Path):
    model = embedder(settings={"pooling": modes})
    save_model(model, tmp_path, tokenizer())
    ours = encoded(model)
    assert ours.shape == (3, 32 * len(modes))
    assert torch.allclose(ours, torch.tensor(library(tmp_path).encode(TEXTS)), atol=1e-6)
    assert settings_of(load_model(tmp_path, SENTENCE_EMBEDDING))["pooling"] == modes


def test_a_plain_body_gets_the_mean_as_in_the_library(tmp_path: Path):
    body = with_new_head(tiny("bert"), BASE)
    save_model(body, tmp_path, tokenizer())
    state = torch.random.get_rng_state()
    model = load_model(tmp_path, SENTENCE_EMBEDDING)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert (settings_of(model)["pooling"], settings_of(model)["modules"]) == (["mean"], [])
    assert torch.allclose(encoded(model), torch.tensor(library(tmp_path).encode(TEXTS)), atol=1e-6)
    assert has_head(tmp_path, SENTENCE_EMBEDDING)
    # A body is not taken for more than it is, unless that is asked for.
    assert head_of(load_any(tmp_path, [SENTENCE_EMBEDDING]), [SENTENCE_EMBEDDING]) == BASE


def test_prompts_length_and_similarity_are_kept(tmp_path: Path):
    settings = {
        "prompts": {"query": "find: ", "passage": "text: "},
        "default_prompt_name": "passage",
        "similarity_fn_name": "dot",
        "max_seq_length": 7,
        "do_lower_case": True,
    }
    model = embedder(settings=settings)
    save_model(model, tmp_path, tokenizer())
    read, again = load_tokenizer(tmp_path), library(tmp_path)
    assert [prompt_of(read), prompt_of(read, "query"), prompt_of(read, "document")] == ["text: ", "find: ", "text: "]
    assert longest_text(read, 100) == 7
    assert (again.similarity_fn_name, again.max_seq_length, again.default_prompt_name) == ("dot", 7, "passage")
    batch = read(["text: " + text for text in TEXTS], truncation=True, max_length=7, padding=True, return_tensors="pt")
    with torch.inference_mode():
        ours = model(**batch).sentence_embedding
    assert torch.allclose(ours, torch.tensor(again.encode(TEXTS)), atol=1e-6)
    assert settings_of(load_model(tmp_path, SENTENCE_EMBEDDING)) == settings_of(model)


def test_the_older_names_of_the_file_of_lengths_are_read_as_the_library_reads_them(tmp_path: Path):
    save_model(embedder(settings={"max_seq_length": 7, "do_lower_case": True}), tmp_path, tokenizer())
    usual = tmp_path / "sentence_bert_config.json"
    usual.rename(tmp_path / "sentence_xlm-roberta_config.json")
    # Of several the first holds that says anything.
    (tmp_path / "sentence_xlnet_config.json").write_text('{"max_seq_length": 9}')
    usual.write_text("{}")
    settings = settings_of(load_model(tmp_path, SENTENCE_EMBEDDING))
    assert (settings["max_seq_length"], settings["do_lower_case"]) == (7, True)
    assert longest_text(load_tokenizer(tmp_path), 100) == library(tmp_path).max_seq_length == 7


@pytest.mark.parametrize("newer", [False, True])
def test_the_librarys_own_folders_load(newer: bool, tmp_path: Path):
    from sentence_transformers import SentenceTransformer, models

    body = with_new_head(tiny("bert"), BASE)
    save_model(body, tmp_path / "body", tokenizer())
    parts = [models.Transformer(str(tmp_path / "body")), models.Pooling(32, "cls"), models.Dense(32, 8)]
    theirs = SentenceTransformer(modules=parts, device="cpu")
    folder = tmp_path / "folder"
    theirs.save(str(folder))
    if not newer:
        # As before 2021: the transformer has a folder of its own.
        inner = folder / "0_Transformer"
        inner.mkdir()
        for path in list(folder.iterdir()):
            if path.is_file() and path.name not in ("modules.json", "config_sentence_transformers.json"):
                path.rename(inner / path.name)
        lines = json.loads((folder / "modules.json").read_text())
        lines[0]["path"] = "0_Transformer"
        (folder / "modules.json").write_text(json.dumps(lines))
    model = load_model(folder, SENTENCE_EMBEDDING)
    assert torch.allclose(encoded(model), torch.tensor(theirs.encode(TEXTS)), atol=1e-6)
    assert load_tokenizer(folder)("so dull")["input_ids"] == tokenizer()("so dull")["input_ids"]
    assert [dict(module) for module in settings_of(model)["modules"]] == [
        {"type": "Dense", "out_features": 8, "bias": True, "activation": "Tanh"}
    ]


QUICK, SLOW = ("bert", "modernbert", "albert"), pytest.mark.slow

FORMS = {
    "depth": StudentSection(form="depth", layers=1),
    "width": StudentSection(form="width", hidden_size=16, layers=2),
    "low-rank": StudentSection(form="low-rank", rank=8, embedding_rank=8),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", [name if name in QUICK else pytest.param(name, marks=SLOW) for name in NAMES])
def test_students_of_every_form_keep_the_teachers_modules(family: str, form: str, tmp_path: Path):
    teacher = embedder(family, {"modules": [{"type": "Normalize"}]})
    append_dense(teacher, torch.randn(24, 32, generator=torch.Generator().manual_seed(0)))
    student = build_student(teacher, FORMS[form], seed=0).model
    assert settings_of(student) == settings_of(teacher) and dimension_of(student) == 24
    # ALBERT runs one block as often as it has blocks.
    assert count_parameters(student) < count_parameters(teacher) or (family, form) == ("albert", "depth")
    whole = student.after_pooling[1].linear.weight
    assert torch.equal(whole, teacher.after_pooling[1].linear.weight[:, : whole.shape[1]])
    save_model(student, tmp_path, tokenizer())
    ours = encoded(student)
    assert torch.equal(encoded(load_any(tmp_path, [SENTENCE_EMBEDDING])), ours)
    # Factors are read by kdcli's own classes, which its import adds to the library's.
    assert torch.allclose(ours, torch.tensor(library(tmp_path).encode(TEXTS)), atol=1e-6)


@pytest.mark.parametrize("family", ["bert", "modernbert", "albert"])
def test_chains_are_stored_and_contracted(family: str, tmp_path: Path):
    model = embedder(family)
    before = encoded(model)
    overparameterise(model, OverparamSection(length=3))
    save_model(model, tmp_path, tokenizer())
    loaded = load_any(tmp_path, [SENTENCE_EMBEDDING])
    assert torch.equal(encoded(loaded), encoded(model))
    contract_model(loaded)
    assert torch.allclose(encoded(loaded), before, atol=1e-5)


@pytest.mark.parametrize("family", NAMES)
def test_hidden_states_and_matrices_are_captured_as_below_any_head(family: str):
    model = embedder(family)
    request = Request(hidden=frozenset({0, 1, 2}), matrices=frozenset({(2, "query"), (1, "ffn_out")}))
    batch = dict(tokenizer()(TEXTS, padding=True, return_tensors="pt"))
    kind = registry.get("text")
    with torch.no_grad():
        found = []
        for one in (model, with_new_head(model, BASE)):
            capture = Capture(one, request, kind)
            with capture:
                found.append(capture.run(batch))
    for signals in found:
        assert sorted(signals.hidden) == [0, 1, 2] and len(signals.matrices) == 2
    assert all(torch.equal(found[0].hidden[layer], found[1].hidden[layer]) for layer in (0, 1, 2))
    assert all(torch.equal(found[0].matrices[key], found[1].matrices[key]) for key in found[0].matrices)


def test_what_makes_another_embedding_has_another_hash():
    models = [
        embedder(),
        embedder(settings={"pooling": ["cls"]}),
        embedder(settings={"modules": [{"type": "Normalize"}]}),
    ]
    assert len({hash_of_weights(model) for model in models}) == 1
    assert len({hash_of_model(model) for model in models}) == 3
    assert not hasattr(with_new_head(models[0], BASE).config, "sentence_embedding")


def test_a_map_that_is_added_is_one_models_own():
    model, other = (with_new_head(tiny("bert"), SENTENCE_EMBEDDING) for _ in range(2))
    weight, bias, before = torch.randn(8, 32), torch.randn(8), encoded(model)
    append_dense(model, weight, bias)
    assert torch.allclose(encoded(model), before @ weight.T + bias, atol=1e-5)
    assert [dimension_of(one) for one in (model, other, embedder())] == [8, 32, 32]
    append_dense(model, torch.eye(8), normalize=True)
    assert torch.allclose(encoded(model).norm(dim=1), torch.ones(3))
    with pytest.raises(InputError, match="a map of 32 features does not fit embeddings of 8"):
        append_dense(model, weight)


def test_half_precision_is_kept_in_all_files(tmp_path: Path):
    model = embedder()
    append_dense(model, torch.randn(8, 32))
    model.config.dtype = torch.bfloat16
    round_to_stored(model)
    save_model(model, tmp_path, tokenizer())
    assert load_file(tmp_path / "2_Dense" / "model.safetensors")["linear.weight"].dtype == torch.bfloat16
    loaded = load_model(tmp_path, SENTENCE_EMBEDDING)
    assert loaded.config.dtype == torch.bfloat16 and torch.equal(encoded(loaded), encoded(model))


def test_a_student_from_another_encoder_reads_texts_as_its_teacher_does(tmp_path: Path):
    reading = {"prompts": {"all": "find: "}, "default_prompt_name": "all", "max_seq_length": 9}
    teacher = embedder(settings={**reading, "pooling": ["cls"]})
    save_model(with_new_head(tiny("bert", seed=1), BASE), tmp_path, tokenizer())
    section = StudentSection(form="checkpoint", model=str(tmp_path))
    labelling = Labelling(SENTENCE_EMBEDDING, {}, lambda model, name: [])
    build = build_student(teacher, section, seed=0, labelling=labelling)
    assert {name: settings_of(build.model)[name] for name in reading} == reading
    assert settings_of(build.model)["pooling"] == ["mean"]
    assert any("has no modules.json: its embeddings are the mean" in note for note in build.notes)


def test_a_trimmed_model_gives_the_same_embeddings_to_the_library(tmp_path: Path):
    settings = {"prompts": {"all": "find: "}, "default_prompt_name": "all", "max_seq_length": 20}
    (tmp_path / "whole").mkdir()
    save_model(embedder(settings=settings), tmp_path / "whole", tokenizer())
    whole, words = load_model(tmp_path / "whole", SENTENCE_EMBEDDING), load_tokenizer(tmp_path / "whole")
    plan = trim_vocabulary(words, whole.config, TEXTS)
    assert len(plan.kept) < plan.pieces and prompt_of(plan.tokenizer) == "find: "
    (tmp_path / "small").mkdir()
    save_model(trimmed(whole, plan.kept), tmp_path / "small", plan.tokenizer)
    assert "sentence_prompts" not in (tmp_path / "small" / "tokenizer_config.json").read_text()
    found = [torch.tensor(library(tmp_path / name).encode(TEXTS, prompt="")) for name in ("whole", "small")]
    assert torch.allclose(*found, atol=1e-6)


SCRIPT = """
import sys
{imports}
from sentence_transformers import SentenceTransformer
print(SentenceTransformer(sys.argv[1], device="cpu").encode(["so dull"]).tolist())
"""


@pytest.mark.slow
def test_factors_are_read_by_the_library_after_kdcli_is_imported_and_else_named(tmp_path: Path):
    student = build_student(embedder(), FORMS["low-rank"], seed=0).model
    save_model(student, tmp_path, tokenizer())
    outcomes = [
        subprocess.run(
            [sys.executable, "-c", SCRIPT.format(imports=imports), str(tmp_path)], capture_output=True, text=True
        )
        for imports in ("", "import kdcli")
    ]
    assert outcomes[0].returncode != 0 and "pip install kdcli, then import kdcli" in outcomes[0].stderr
    assert outcomes[1].returncode == 0, outcomes[1].stderr
    assert torch.allclose(torch.tensor(json.loads(outcomes[1].stdout)), encoded(student, ["so dull"]), atol=1e-6)


@pytest.mark.slow
def test_real_sentences_have_the_librarys_embeddings(encoder: Path, data_dir: Path, tmp_path: Path):
    rows = pq.read_table(data_dir / "glue" / "stsb" / "validation.parquet").slice(0, 200).to_pydict()
    texts = [*rows["sentence1"], *rows["sentence2"]]
    words, teacher = load_tokenizer(encoder), load_model(encoder, SENTENCE_EMBEDDING)
    student = build_student(teacher, StudentSection(form="depth", layers=3), seed=0).model
    append_dense(student, torch.randn(256, 384, generator=torch.Generator().manual_seed(0)) / 20, normalize=True)
    save_model(student, tmp_path, words)
    for model, folder in ((teacher, encoder), (student, tmp_path)):
        found = []
        with torch.inference_mode():
            for start in range(0, len(texts), 16):
                batch = words(
                    texts[start : start + 16],
                    padding=True,
                    truncation=True,
                    max_length=longest_text(words, 512),
                    return_tensors="pt",
                )
                found.append(model(**batch).sentence_embedding)
        assert torch.allclose(torch.cat(found), torch.tensor(library(folder).encode(texts)), atol=1e-6)
