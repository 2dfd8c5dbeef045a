import torch

from vizoo.backbones.ops import backend


def test_backends_give_reasons():
    found = {b.name: b for b in backend.backends()}
    assert list(found) == ["torch", "onednn", "cuda", "triton", "natten"]
    assert found["torch"].usable
    assert all(b.reason for b in found.values())
    assert found["cuda"].usable == torch.cuda.is_available()
