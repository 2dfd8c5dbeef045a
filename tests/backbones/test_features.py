"""The contract of timm over every registered model: feature maps, their wrappers, and pruning to them."""

from __future__ import annotations

import copy

import pytest
import torch
from tolerance import close
from torch import Tensor, nn
from zoo import as_nchw, build, each_kind, each_map_kind, gradients, overlay, sample

WRAPPERS = (None, "getter", "hook", "fx")  # None: the one the family chose
MODELESS = (nn.Identity, nn.Sequential, nn.ModuleList)  # the same in training and evaluation

# timm still promises TorchScript, which torch announces to retire
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")


def wrap(name: str, wrapper: str | None, indices: tuple[int, ...], state: dict[str, Tensor], **kwargs) -> nn.Module:
    """A feature net with the given weights."""
    chosen = {} if wrapper is None else {"feature_cls": wrapper}
    return build(name, features_only=True, out_indices=indices, **chosen, **overlay(state), **kwargs)


def maps(net: nn.Module, x: Tensor) -> list[Tensor]:
    """The maps of a feature net, channels first."""
    return [as_nchw(t, net) for t in net(x)]


def every_index(name: str) -> range:
    return range(len(build(name, device="meta").feature_info))


@each_kind
def test_features_only(name: str) -> None:
    """The default feature net gives every level with the channels and size it announces."""
    net = build(name, features_only=True)
    x = sample(net)
    with torch.no_grad():
        out = net(x)
    assert isinstance(out, list)
    out = [as_nchw(t, net) for t in out]
    channels, reductions = net.feature_info.channels(), net.feature_info.reduction()
    assert len(out) == len(channels) == len(build(name, device="meta").feature_info) >= 3
    for tap, c, r in zip(out, channels, reductions, strict=True):
        assert tap.shape[:2] == (1, c)
        assert torch.isfinite(tap).all()
        for got, full in zip(tap.shape[2:], x.shape[2:], strict=True):
            assert full / (2 * r) < got <= -(-full // r) + 1, f"{tuple(tap.shape)} at reduction {r}"


@each_map_kind
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_wrappers_agree(name: str, training: bool) -> None:
    """Each way of tapping the net gives the values that ``forward_intermediates`` gives."""
    base = build(name, drop_path_rate=0.0)
    x, state = sample(base, batch=2), base.state_dict()
    for indices in (tuple(every_index(name)), (0, -1), (1,)):
        with torch.no_grad():
            expected = (
                copy.deepcopy(base).train(training).forward_intermediates(x, list(indices), intermediates_only=True)
            )
            for wrapper in WRAPPERS:
                positive = tuple(i % len(base.feature_info) for i in indices)
                net = wrap(name, wrapper, positive, state, drop_path_rate=0.0).train(training)
                got = maps(net, x)
                assert tuple(net.feature_info.out_indices) == positive, wrapper
                assert [t.shape[1] for t in got] == net.feature_info.channels(), wrapper
                for tap, reference in zip(got, expected, strict=True):
                    close(tap, reference, "graph", f"feature_cls={wrapper}, indices {indices}")


@each_kind
@pytest.mark.parametrize("wrapper", [None, "getter"], ids=["default", "getter"])
def test_wrapper_gradients(name: str, wrapper: str | None) -> None:
    """A pruned feature net leaves no parameter unused (DDP would stop), with and without checkpointing."""
    state, found = build(name, drop_path_rate=0.0).state_dict(), []
    for checkpointing in (False, True):
        net = wrap(name, wrapper, (0, 1), state, drop_path_rate=0.0).train()
        net.set_grad_checkpointing(checkpointing) if wrapper is None else net.model.set_grad_checkpointing(
            checkpointing
        )
        torch.manual_seed(1)
        sum(t.square().mean() for t in net(sample(net, batch=2))).backward()
        found.append(gradients(net))
    assert found[0].keys() == found[1].keys()
    for key, gradient in found[1].items():
        close(gradient, found[0][key], "gradient", key)


@each_kind
def test_getter_scripts(name: str) -> None:
    """The getter net scripts for the levels a detector takes, and for the last one alone."""
    state = build(name, scriptable=True).state_dict()
    last = every_index(name)[-1]
    for indices in ((0, 1, last), (last,), (0,)):
        net = wrap(name, "getter", indices, state, scriptable=True)
        x = sample(net)
        with torch.no_grad():
            for got, expected in zip(torch.jit.script(net)(x), net(x), strict=True):
                close(got, expected, "graph", f"indices {indices}")


@each_map_kind
def test_intermediates_forms(name: str) -> None:
    """Every form of ``forward_intermediates`` describes the same maps."""
    model = build(name)
    x, n = sample(model), len(model.feature_info)

    def taps(**kwargs) -> list[Tensor]:
        found = model.forward_intermediates(x, intermediates_only=True, **kwargs)
        assert isinstance(found, list)
        return found

    def same(found: list[Tensor], expected: list[Tensor]) -> None:
        for a, b in zip(found, expected, strict=True):
            close(a, b, "rerun")

    with torch.no_grad():
        final, every = model.forward_intermediates(x)
        assert len(every) == n
        close(final, model.forward_features(x), "rerun")
        close(model.forward_head(final), model(x), "rerun")
        same(taps(), every)
        same(taps(indices=2), every[-2:])
        same(taps(indices=[-2, -1]), every[-2:])
        same(taps(indices=[n - 1, 0]), [every[0], every[-1]])  # always in the order of the network
        same(taps(indices=[0], stop_early=True), every[:1])
        same(taps(norm=True)[:-1], every[:-1])
        assert taps(norm=True)[-1].shape == every[-1].shape
        early, second = model.forward_intermediates(x, indices=[1], stop_early=True)  # 0 may be inside a stem
        same(second, every[1:2])
        close(as_nchw(early, model), every[1], "rerun")
        if getattr(model, "output_fmt", "NCHW") == "NHWC":
            same([t.permute(0, 3, 1, 2) for t in taps(output_fmt="NHWC")], every)
    for bad in ([n], [-n - 1], n + 1):
        with pytest.raises((AssertionError, IndexError)):
            model.forward_intermediates(x, indices=bad)
    with pytest.raises((AssertionError, ValueError)):
        model.forward_intermediates(x, output_fmt="no_such_format")


@each_kind
def test_intermediates_checkpointing(name: str) -> None:
    """Checkpointing changes no map, training or not."""
    model = build(name, drop_path_rate=0.0).train()
    twin = copy.deepcopy(model)
    twin.set_grad_checkpointing()
    x = sample(model, batch=2)
    for got, expected in zip(*(m.forward_intermediates(x)[1] for m in (twin, model)), strict=True):
        close(got.detach(), expected.detach(), "rerun")


def prune_cases(name: str) -> list[tuple[int, bool, bool]]:
    return [(i, norm, head) for i in every_index(name) for norm in (False, True) for head in (False, True)]


@each_map_kind
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_prune_contract(name: str, training: bool) -> None:
    """For every index: taps stay, later layers go, attributes follow, the head is gone or bit-identical."""
    base = build(name, drop_path_rate=0.0)
    x, last = sample(base), len(base.feature_info) - 1
    with torch.no_grad():
        every, logits = base.forward_intermediates(x, intermediates_only=True), base(x)
    infos = copy.deepcopy(base.feature_info)
    for index, norm, head in prune_cases(name):
        model, what = copy.deepcopy(base).train(training), f"index {index}, prune_norm={norm}, prune_head={head}"
        assert model.prune_intermediate_layers([index - last - 1], norm, head) == [index], what
        assert all(m.training is training or isinstance(m, MODELESS) for m in model.modules()), what
        whole = index == last and not (norm or head)  # a convolution may stand between the last map and the pooling
        shape = (1, base.num_features if whole else infos[index]["num_chs"], *every[index].shape[2:])
        assert model.num_features == shape[1], what
        model.eval()
        with torch.no_grad():
            final, taps = model.forward_intermediates(x, indices=[index])
            close(taps[0], every[index], "rerun", what)
            features = model.forward_features(x)
            close(features, final, "rerun", what)
            assert as_nchw(features, model).shape == shape, what
            if norm or index < last:
                close(as_nchw(features, model), every[index], "rerun", what)
            if index == last and not head and not norm:
                close(model(x), logits, "same", what)
            if index < last or head:
                assert model.num_classes == 0, what
                assert not [n for n, _ in model.get_classifier().named_parameters()], what
                assert as_nchw(model(x), model).shape == every[index].shape, what
            if index < last:
                assert model.head_hidden_size == model.num_features, what
            model.reset_classifier(7, "avg")
            assert model(x).shape == (1, 7), what
        assert len(list(model.parameters())) <= len(list(base.parameters())), what


@each_kind
def test_pruned_parameters_are_used(name: str) -> None:
    """After pruning to a map, that map trains every parameter that is left."""
    base = build(name)
    for index in every_index(name):
        model = copy.deepcopy(base).train()
        model.prune_intermediate_layers([index], prune_norm=True)
        taps = model.forward_intermediates(sample(base, batch=2), indices=[index], intermediates_only=True)
        taps[0].square().mean().backward()
        gradients(model)
