"""`kdcli overparam` and `kdcli contract` on folders: there and back, and what they refuse."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification

from kdcli.cli.app import run
from kdcli.models.lowrank import factorise
from kdcli.models.probe import probe
from kdcli.models.save import save_model
from kdcli.recipe.schema import StudentSection
from kdcli.tasks.heads import load_model
from kdcli.tensors.parametrization import chain_of, is_overparameterised


def write(folder: Path, encoder: Path, *, rank: int | None = None, width: int = 32) -> Path:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=30522,
        hidden_size=width,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=2 * width,
        max_position_embeddings=64,
    )
    model = BertForSequenceClassification(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)
    if rank is not None:
        factorise(model, StudentSection(form="low-rank", rank=rank))
    folder.mkdir()
    save_model(model, folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json"):
        if (encoder / name).exists():
            shutil.copy(encoder / name, folder / name)
    return folder


@pytest.fixture
def plain(tmp_path: Path, encoder: Path) -> Path:
    return write(tmp_path / "plain", encoder)


def call(*arguments: object, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    capsys.readouterr()
    code = run([str(a) for a in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def document(*arguments: object, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    code, out, err = call(*arguments, "--json", capsys=capsys)
    assert code == 0, err
    return json.loads(out)


def test_there_and_back_is_the_same_folder(plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    wide = document("overparam", plain, "--out", tmp_path / "wide", capsys=capsys)
    assert len(wide["matrices"]) == 12 and wide["max_abs_difference"] <= 1e-4
    assert wide["matrices"][0] == {
        "block": 1,
        "matrix": "query",
        "shape": [32, 32],
        "out_factors": [8, 1, 1, 1, 4],
        "in_factors": [8, 1, 1, 1, 4],
        "bonds": [1, 16, 16, 16, 16, 1],
        "dense": 1024,
        "chain": 64 * 16 + 3 * 256 + 16 * 16,
    }
    added = sum(m["chain"] - m["dense"] for m in wide["matrices"])
    assert wide["parameters_after"] == wide["parameters_before"] + added

    back = document("contract", tmp_path / "wide", "--out", tmp_path / "back", capsys=capsys)
    assert back["parameters_after"] == wide["parameters_before"] and back["max_abs_difference"] <= 1e-4
    before, after = (load_file(folder / "model.safetensors") for folder in (plain, tmp_path / "back"))
    assert {k: v.shape for k, v in before.items()} == {k: v.shape for k, v in after.items()}
    for key, value in before.items():
        torch.testing.assert_close(after[key], value, atol=1e-5, rtol=1e-4)
    ours = AutoModelForSequenceClassification.from_pretrained(tmp_path / "back").eval()
    torch.testing.assert_close(probe(ours), probe(load_model(plain)), atol=1e-4, rtol=0)


def test_a_folder_of_chains_reloads_to_the_bit(plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    document("overparam", plain, "--out", tmp_path / "wide", "--length", 1, capsys=capsys)
    first, second = (load_model(tmp_path / "wide") for _ in range(2))
    assert is_overparameterised(first)
    assert torch.equal(probe(first), probe(second))
    stored = load_file(tmp_path / "wide" / "model.safetensors")
    assert all(torch.equal(value, stored[key]) for key, value in first.state_dict().items())
    save_model(first, tmp_path)
    again = load_file(tmp_path / "model.safetensors")
    assert set(again) == set(stored) and all(torch.equal(again[key], stored[key]) for key in stored)


def test_a_plain_loader_gives_the_model_of_chains(plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    document("overparam", plain, "--out", tmp_path / "wide", capsys=capsys)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "wide")
    assert is_overparameterised(loaded) and torch.equal(probe(loaded), probe(load_model(tmp_path / "wide")))


def test_options_reach_the_chains(plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    factors = tmp_path / "factors.toml"
    factors.write_text('"32" = [4, 2, 2, 2]\n"64" = [4, 4, 2, 2]\n')
    result = document(
        "overparam", plain, "--out", tmp_path / "wide", "--factors", factors, "--targets", "ffn", "--layers", "1",
        "--gauge", "left", "--svd-dtype", "float32", capsys=capsys,
    )  # fmt: skip
    assert [(m["block"], m["matrix"]) for m in result["matrices"]] == [(2, "ffn_in"), (2, "ffn_out")]
    assert result["matrices"][0]["out_factors"] == [4, 4, 2, 2]
    model = load_model(tmp_path / "wide")
    assert {c.gauge for m in model.modules() if (c := chain_of(m)) is not None} == {"left"}


@pytest.mark.parametrize(
    ("option", "length"), [(("--factorization", "svd"), 2), (("--scale", "3"), 3), (("--length", "0"), 2)]
)
def test_lengths(option: tuple[str, str], length: int, plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    result = document("overparam", plain, "--out", tmp_path / "wide", *option, capsys=capsys)
    # 32 x 32 has sizes 64 and 16, so a middle tensor adds a quarter: scale 3 is the nearest at L = 7.
    assert len(result["matrices"][0]["out_factors"]) == (9 if option[0] == "--scale" else length)


def test_a_table_for_people(plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    code, out, err = call("overparam", plain, "--out", tmp_path / "wide", capsys=capsys)
    assert code == 0 and "ffn_out" in out and "8x1x1x1x4" in out and "1,16,16,16,16,1" in out
    assert "within" in err and "within" not in out
    code, out, _ = call("contract", tmp_path / "wide", "--out", tmp_path / "back", capsys=capsys)
    assert code == 0 and "2.ffn_out" in out and "2,048" in out


def test_contracting_a_plain_model_copies_it(plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    result = document("contract", plain, "--out", tmp_path / "copy", capsys=capsys)
    assert result["matrices"] == [] and result["max_abs_difference"] == 0.0
    before, after = (load_file(folder / "model.safetensors") for folder in (plain, tmp_path / "copy"))
    assert all(torch.equal(before[key], after[key]) for key in before) and set(before) == set(after)


def test_low_rank_factors_are_kept_unless_merging_is_asked_for(
    tmp_path: Path, encoder: Path, capsys: pytest.CaptureFixture[str]
):
    student = write(tmp_path / "student", encoder, rank=8)
    logits = probe(load_model(student))
    wide = document("overparam", student, "--out", tmp_path / "wide", "--length", 1, capsys=capsys)
    assert len(wide["matrices"]) == 24
    kept = document("contract", tmp_path / "wide", "--out", tmp_path / "kept", capsys=capsys)
    assert kept["parameters_after"] == wide["parameters_before"]
    torch.testing.assert_close(probe(load_model(tmp_path / "kept")), logits, atol=1e-4, rtol=0)
    merged = document("contract", tmp_path / "wide", "--out", tmp_path / "merged", "--merge-lowrank", capsys=capsys)
    assert merged["parameters_after"] > kept["parameters_after"]
    dense = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(probe(dense), logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--layers", "2"), "blocks 0 to 1, not 2"),
        (("--layers", "first"), "--layers"),
        (("--targets", "heads"), "targets"),
        (("--scale", "0.5"), "scale"),
        (("--svd-dtype", "float16"), "--svd-dtype"),
        (("--factors", "nowhere.toml"), "nowhere.toml"),
        (("--factorization", "svd", "--scale", "3"), "scale"),
        (("--factorization", "tucker"), "tucker"),
    ],
)
def test_wrong_options_are_input_errors(
    options: tuple[str, ...], words: str, plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    code, out, err = call("overparam", plain, "--out", tmp_path / "new" / "wide", *options, capsys=capsys)
    assert code == 2 and words in err and out == "" and "Traceback" not in err
    assert [path.name for path in tmp_path.iterdir()] == ["plain"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("f.toml", '"32" = [5, 6]'),
        ("f.toml", '"32" = "8x4"'),
        ("f.toml", '"32" = '),
        ("f.json", "[32, 24]"),
        ("f.json", '{"33": [11, 3]}'),
    ],
)
def test_wrong_factor_files_are_input_errors(
    name: str, text: str, plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / name).write_text(text)
    code, out, err = call("overparam", plain, "--out", tmp_path / "wide", "--factors", tmp_path / name, capsys=capsys)
    assert code == 2 and "factors" in err and out == "" and not (tmp_path / "wide").exists()


def test_a_prime_width_is_an_input_error(tmp_path: Path, encoder: Path, capsys: pytest.CaptureFixture[str]):
    odd = write(tmp_path / "odd", encoder, width=116)
    code, _, err = call("overparam", odd, "--out", tmp_path / "wide", capsys=capsys)
    assert code == 2 and "116 cannot be split" in err and not (tmp_path / "wide").exists()


@pytest.mark.parametrize("command", ["overparam", "contract"])
def test_a_folder_is_replaced_only_by_force(
    command: str, plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    code, _, err = call(command, plain, "--out", out, capsys=capsys)
    assert code == 2 and "exists already" in err and (out / "precious.txt").exists()
    code, _, err = call(command, plain, "--out", out, "--force", capsys=capsys)
    assert code == 2 and "was not written by kdcli" in err and (out / "precious.txt").exists()
    # What kdcli wrote it replaces, whole.
    (out / "precious.txt").rename(tmp_path / "precious.txt")
    assert call(command, plain, "--out", out, capsys=capsys)[0] == 0
    (out / "vocab.txt").write_text("old")
    assert call(command, plain, "--out", out, capsys=capsys)[0] == 2
    assert call(command, plain, "--out", out, "--force", capsys=capsys)[0] == 0
    assert (out / "config.json").exists() and not (out / "vocab.txt").exists()


def test_over_parameterising_twice_is_an_input_error(plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    document("overparam", plain, "--out", tmp_path / "wide", capsys=capsys)
    code, _, err = call("overparam", tmp_path / "wide", "--out", tmp_path / "wider", capsys=capsys)
    assert code == 2 and "already" in err and not (tmp_path / "wider").exists()


def test_a_model_that_is_not_there_is_an_input_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for command in ("overparam", "contract"):
        code, _, err = call(command, tmp_path / "none", "--out", tmp_path / "out", capsys=capsys)
        assert code == 2 and "none" in err and not (tmp_path / "out").exists()
    assert list(tmp_path.iterdir()) == []


def test_outputs_that_moved_are_a_gate(
    plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("kdcli.export.parity.TOLERANCE", -1.0)
    for command in ("overparam", "contract"):
        code, out, err = call(command, plain, "--out", tmp_path / "out", capsys=capsys)
        assert code == 1 and "outputs" in err and out == "" and not (tmp_path / "out").exists()


def test_help_shows_examples(capsys: pytest.CaptureFixture[str]):
    for command in ("overparam", "contract"):
        code, out, _ = call(command, "--help", capsys=capsys)
        assert code == 0 and "Examples" in out and f"kdcli {command}" in out
