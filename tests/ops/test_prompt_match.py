import pytest
import torch
from tolerance import op_close
from torch.utils.flop_counter import FlopCounterMode

from vizoo.backbones.layers.prompt_attention import TCPA
from vizoo.backbones.ops import _prompt_match_kernels as kernels
from vizoo.backbones.ops.backend import HAS_TRITON, kernels_on
from vizoo.backbones.ops.prompt_match import Pool, kernel_takes, prompt_match

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="needs triton, which is not installed")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BF16 = pytest.param(torch.bfloat16, marks=pytest.mark.gpu)  # the interpreter is wrong in bfloat16
CASES = {  # channels, prefix tokens, sizes of both pools, choices of each, positions of a prompt
    "official": (32, 1, (18, 18), (10, 10), (1, 1)),
    "registers": (70, 3, (6, 5), (3, 2), (2, 1)),
    "no class token": (16, 0, (4, 5), (4, 2), (2, 3)),
    "everything": (20, 1, (20, 3), (20, 3), (1, 2)),
}


def layer(D, prefix, sizes, topk, length, dtype=torch.float32):
    settings = dict(zip(("cls_pool", "image_pool", "cls_topk", "image_topk"), (*sizes, *topk), strict=True))
    settings |= {"cls_len": length[0], "image_len": length[1], "prompt_drop": 0.0, "role_only": False}
    return TCPA(D, prefix, False, **settings, device=DEVICE, dtype=dtype).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BF16], ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_kernel(case, dtype, nan_empty):
    """Choice and matching loss are those of plain operators, for tokens of any length and strides."""
    tcpa = layer(*case, dtype=dtype)
    x = (torch.randn(3, case[0], 23) * torch.logspace(-2, 2, 23)).to(DEVICE, dtype).transpose(1, 2)
    with torch.no_grad():
        chosen, loss = tcpa.choose(x)
        with kernels_on("cpu"), FlopCounterMode(display=False) as counter:
            found, found_loss = tcpa.choose(x)
    assert "vizoo.prompt_match" in counter.get_flop_counts()["Global"].__repr__()
    assert torch.equal(found, chosen)
    op_close(found_loss, loss.double())


def test_ties_and_zeros():
    """Of equal cosines the first are taken; zero keys and zero tokens have the cosine 0."""
    keys = torch.eye(6)[[0, 1, 1, 0, 2, 3, 5, 4]]  # cosines without rounding
    keys[3] *= 2
    keys[5] = 0
    x = torch.randint(-2, 3, (2, 7, 6)).float()
    x[0, 2] = x[1] = 0
    cosine = x @ (keys / keys.norm(dim=1, keepdim=True).clamp_min(1e-12)).t()
    for topk in (1, 3, 8):
        first = cosine.sort(descending=True, stable=True)[1][..., :topk]
        chosen, loss = prompt_match(x.to(DEVICE), 0, [Pool(keys.to(DEVICE), topk, 1)])
        assert torch.equal(chosen.cpu(), torch.zeros(2, 7, 8, dtype=torch.bool).scatter(2, first, True))
        mean = (cosine.double() / x.norm(dim=2, keepdim=True).clamp_min(1e-12)).gather(2, first).mean()
        op_close(loss.cpu(), 1 - mean)


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_precision_of_products_reaches_the_kernel(precision, monkeypatch):
    found, kernel = [], kernels._prompt_match_kernel

    class Recorded:
        def __getitem__(self, grid):
            return lambda *args, **kwargs: found.append(kwargs["PRECISION"]) or kernel[grid](*args, **kwargs)

    monkeypatch.setattr(kernels, "product_precision", lambda device: precision)
    monkeypatch.setattr(kernels, "_prompt_match_kernel", Recorded())
    prompt_match(torch.randn(1, 3, 16, device=DEVICE), 0, [Pool(torch.randn(4, 16, device=DEVICE), 2, 1)])
    assert found == [precision]


def test_counts_do_not_depend_on_the_form():
    tcpa, found = layer(*CASES["registers"]), []
    x = torch.randn(2, 9, 70, device=DEVICE)
    with torch.no_grad():
        for device in ("no kernels", "cpu"):
            with kernels_on(device), FlopCounterMode(display=False) as counter:
                tcpa.choose(x)
            found.append(counter.get_total_flops())
    assert found[0] == found[1] == 2 * 2 * 70 * (3 * 6 + 6 * 5)


def test_opcheck():
    x, keys = torch.randn(2, 5, 16, device=DEVICE), torch.randn(4, 16, device=DEVICE)
    arguments = (x, 1, keys, 2, 1, keys, 3, 2)
    kinds = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.vizoo.prompt_match.default, arguments, test_utils=kinds)


def test_kernel_takes_what_it_can():
    """Not what needs a gradient, is of several dtypes or too large, or is seen by a transform."""
    x, keys = torch.randn(2, 5, 16, device=DEVICE), torch.randn(4, 16, device=DEVICE)
    pools = [Pool(keys, 2, 1)]
    with kernels_on("cpu"):
        assert kernel_takes(x, 0, pools)
        assert not kernel_takes(x.requires_grad_(), 0, pools)
        x = x.detach()
        assert not kernel_takes(x.half(), 0, pools)
        assert not kernel_takes(x.double(), 0, [Pool(keys.double(), 2, 1)])
        assert not kernel_takes(x, 0, [Pool(keys.expand(17, -1, -1).flatten(0, 1), 2, 1)])
        assert not kernel_takes(x[:0], 0, pools)
        assert not kernel_takes(x, 5, [*pools, *pools])
        torch.func.vmap(lambda x: x * (0 if kernel_takes(x[None], 0, pools) else 1))(x)
        seen = []
        torch.func.vmap(lambda x: seen.append(kernel_takes(x[None], 0, pools)) or x)(x)
        assert seen == [False]
