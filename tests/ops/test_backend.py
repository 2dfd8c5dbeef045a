import os
import subprocess
import sys

import torch

from vizoo.backbones.ops import backend


def test_backends_give_reasons():
    found = {b.name: b for b in backend.backends()}
    assert list(found) == ["torch", "onednn", "cuda", "triton", "natten"]
    assert found["torch"].usable
    assert all(b.reason for b in found.values())
    assert found["cuda"].usable == torch.cuda.is_available()


WITHOUT_TRITON = """
import sys, torch, timm
import importlib.util as u; found = u.find_spec
u.find_spec = lambda name, *a: None if name in ("triton", "natten") else found(name, *a)
from vizoo.backbones.ops import halo, na2d_av, neighborhood, reversed_attention
from vizoo.backbones.ops import _contmix_kernels, _halo_kernels, _na2d_av_kernels, _neighborhood_kernels
from vizoo.backbones.ops import _reversed_attention_kernels, _ulsam_kernels
for kernels in (_contmix_kernels, _halo_kernels, _na2d_av_kernels, _neighborhood_kernels, _reversed_attention_kernels,
                _ulsam_kernels):
    assert not hasattr(kernels, "triton"), kernels

def check(module, name, *args):
    leaves = [a.requires_grad_() if isinstance(a, torch.Tensor) else a for a in args]
    out = getattr(module, name)(*leaves)
    assert torch.allclose(out, getattr(module, "reference_" + name)(*leaves), atol=1e-6), name
    out.sum().backward()

maps = [torch.rand(1, 3, 5, 1, 2) for _ in range(3)]
check(halo, "halo_attention", *maps, torch.rand(7, 2), torch.rand(7, 2), 2, 1)
check(na2d_av, "na2d_av", torch.rand(1, 1, 4, 5, 9), torch.rand(1, 1, 4, 5, 2), 3)
check(neighborhood, "neighborhood_attention", *[m.detach() for m in maps], 3)
check(reversed_attention, "reversed_attention", *[torch.rand(1, 2, 5, 4) for _ in range(3)])
assert "natten" not in sys.modules
"""


def test_works_without_triton_and_natten():
    """Modules of kernels define none where triton is missing, the operators work, and none imports NATTEN."""
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True, check=False, env=os.environ
    )
    assert done.returncode == 0, done.stderr
