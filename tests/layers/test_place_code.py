"""Place codes: recorded official ones, and the Gaussian in closed form."""

import pytest
import torch
import torch.nn.functional as F
from golden import load
from tolerance import close, golden_close

from vizoo.backbones.layers import PlaceCode, step_code


def test_golden_place_codes():
    out = load("oat_pe").outputs
    coords = out["coords"]
    table = PlaceCode(256, (6, 14), table=out["learned_table"])
    golden_close(table(coords[:, :2], coords[:, 2])[:, ::4], out["learned_codes"], "learned")
    places = torch.cartesian_prod(torch.arange(3.0), torch.arange(11.0), torch.arange(2.0))
    for kind in ("original", "exp1", "exp2", "linear"):
        found = PlaceCode(48, (3, 11), kind)(places[:, :2], places[:, 2])
        golden_close(found, out[f"sin_{kind}"].flatten(0, 2), kind)
    found = PlaceCode(256, (3, 11), "original")(places[:, :2], places[:, 2])
    golden_close(found[:, ::4], out["sin_original_256"].flatten(0, 2), "256 channels")
    lookup = out["sin_lookup_coords"]
    golden_close(PlaceCode(48, (3, 11), "original")(lookup[:, :2], lookup[:, 2]), out["sin_lookup"], "row of zeros")
    golden_close(step_code(12, 64), out["step_64"], "steps")
    close(step_code(4, 64, start=8), step_code(12, 64)[8:], "same")


# the place code in closed form


@pytest.mark.parametrize("sigma", [1.5, 2.0, 2.5])
def test_gaussian_cosine(sigma):
    """Cosines of rows are the recorded Gaussian, and the norm is that of the official table."""
    code = PlaceCode(256, (6, 14), sigma=sigma)._one(torch.arange(14.0, dtype=torch.float64))
    assert (code.norm(dim=1) - 8.76).abs().max() < 1e-9
    cosine = F.cosine_similarity(code[:, None], code[None], dim=-1)
    expected = load("oat_pe").outputs[f"gauss_{sigma:g}"]
    assert (cosine - expected).abs().max() < 1e-7  # the record is in float32
    x = torch.tensor([0.37, 7.9, 12.01], dtype=torch.float64)
    for offset in (0.0, 0.5, 8.25):
        near, far = PlaceCode(256, (6, 14), sigma=sigma)._one(torch.stack((x, x + offset)))
        truth = torch.full((3,), -(offset**2) / (2 * sigma**2), dtype=torch.float64).exp()
        assert (F.cosine_similarity(near, far, dim=-1) - truth).abs().max() < 1e-12


def test_official_tables_are_of_this_kind():
    out = load("oat_pe").outputs
    for name, sigma in (
        ("amazon_learned_random_PE", "2"),
        ("learned_PE_random_2", "2"),
        ("learned_PE_random_2_5", "2.5"),
    ):
        recorded = out[f"official_cos_{name}"]
        n = len(recorded)
        assert (recorded - out[f"gauss_{sigma}"][:n, :n]).abs().max() < 2e-3


def test_too_few_channels():
    code = PlaceCode(64, (6, 14))._one(torch.arange(15.0))
    cosine = F.cosine_similarity(code[:1], code, dim=-1)
    assert (cosine - (-(torch.arange(15.0) ** 2) / 8).exp()).abs().max() < 2e-3
    with pytest.raises(ValueError, match="pe_sigma=1"):
        PlaceCode(24, (6, 14), sigma=1.0)
