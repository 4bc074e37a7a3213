"""Models that read images of other sizes: their own interpolation, made once."""

from pathlib import Path

import pytest
import torch
from families import IMAGES, tiny
from transformers import AutoModelForImageClassification, ViTImageProcessor

from kdcli.errors import InputError
from kdcli.models.image_size import fit_images, reads_size
from kdcli.models.processors import check_processor
from kdcli.models.shape import shape_of

INTERPOLATES = {"dinov2", "dinov2_with_registers"}


@pytest.mark.parametrize("family", sorted(INTERPOLATES))
@pytest.mark.parametrize("size", [(24, 24), (8, 8)])
def test_a_fitted_model_computes_what_it_computed(family: str, size: tuple[int, int], tmp_path: Path):
    model, other = tiny(family, layers=1), tiny(family, layers=1)
    pixels = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    drawn = torch.random.get_rng_state()
    note = fit_images(model, *size)
    assert note is not None and "16 x 16" in note
    assert torch.equal(torch.random.get_rng_state(), drawn)
    with torch.no_grad():
        hidden = model(pixel_values=pixels, output_hidden_states=True)
        expected = other(pixel_values=pixels, output_hidden_states=True)
        assert torch.equal(hidden.logits, expected.logits)
        assert shape_of(model.config).tokens == hidden.hidden_states[-1].shape[1] == expected.hidden_states[-1].shape[1]
        model.save_pretrained(tmp_path)
        loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
        assert torch.equal(loaded(pixel_values=pixels).logits, expected.logits)
    assert fit_images(model, *size) is None


@pytest.mark.parametrize("family", sorted(set(IMAGES) - INTERPOLATES))
def test_others_read_images_of_their_own_size(family: str):
    model = tiny(family, layers=1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert not reads_size(model, 24, 24)
    assert fit_images(model, 24, 24) is None
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(InputError, match="makes images of 24 x 24 pixels, and the model reads 16 x 16"):
        check_processor(model, ViTImageProcessor(size={"height": 24, "width": 24}))


def test_images_that_are_no_squares_are_refused():
    model = tiny("dinov2", layers=1)
    assert fit_images(model, 12, 20) is None
    with pytest.raises(InputError, match="12 x 20"):
        check_processor(model, ViTImageProcessor(size={"height": 12, "width": 20}))


def test_a_processor_of_another_size_fits_what_interpolates():
    check_processor(tiny("dinov2", layers=1), ViTImageProcessor(size={"height": 24, "width": 24}))
