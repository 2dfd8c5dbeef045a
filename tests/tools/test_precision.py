"""Products of float32: what is asked for holds in every state of PyTorch's settings, which come back as they were."""

import contextlib
import itertools
import multiprocessing
import random
from concurrent.futures import ProcessPoolExecutor

import torch

from vizoo.tools.profiling import precision
from vizoo.tools.profiling.timing import Conditions

KEYS = [("generic", "all"), *itertools.product(("cuda", "mkldnn"), ("all", "matmul", "conv", "rnn"))]
OLD = (torch._C._get_cublas_allow_tf32, torch._C._get_cudnn_allow_tf32, torch.get_float32_matmul_precision)


def settle(key, value):
    precision.set_precision(*key, value)


def matmul(value):
    torch.backends.cuda.matmul.allow_tf32 = value


def cudnn(value):
    torch.backends.cudnn.allow_tf32 = value


NEW_WAYS = [
    (settle, key, value)
    for key, value in itertools.product(KEYS, ("none", "ieee", "tf32", "bf16"))
    if (key[0], value) != ("cuda", "bf16")
]
OLD_WAYS = [(matmul, value) for value in (True, False)]
OLD_WAYS += [(torch.set_float32_matmul_precision, value) for value in ("highest", "high", "medium")]
CUDNN = [(cudnn, value) for value in (True, False)]


def old_answers():
    """What the older functions answer; they refuse to in a mix."""
    found = []
    for ask in OLD:
        try:
            found.append(ask())
        except RuntimeError:
            found.append("refused")
    return found


def answers():
    return [precision.get_precision(*key) for key in KEYS], old_answers()


def snapshot():
    """All answers, as things are and with each of the settings above changed: what is inherited shows."""
    found, everything = [answers()], precision.get_precision("generic", "all")
    for value in ("none", "ieee", "tf32"):
        settle(("generic", "all"), value)
        found.append(answers())
    settle(("generic", "all"), "none")
    for backend in ("cuda", "mkldnn"):
        own = precision.get_precision(backend, "all")
        for value in ("none", "ieee", "tf32"):
            settle((backend, "all"), value)
            found.append(answers())
        settle((backend, "all"), own)
    settle(("generic", "all"), everything)
    return found


def walk(ways, steps):
    """Change settings at random; after each step ask for both precisions. The number of refusals by cuDNN inside."""
    refused, rng = 0, random.Random(0)
    for _ in range(steps):
        way, *args = rng.choice(ways)
        way(*args)
        before = snapshot()
        assert snapshot() == before
        for tf32 in (True, False):
            with contextlib.suppress(KeyError), precision.float32_products(tf32):
                values, (blas, dnn, products) = answers()
                assert set(values) == {"tf32" if tf32 else "ieee"}
                assert (blas, products) == (tf32, "high" if tf32 else "highest")
                assert dnn in (tf32, "refused")
                refused += dnn == "refused"
                for backend in ("cuda", "mkldnn"):  # as dynamo does, which sets what results as if it had been said
                    settle((backend, "matmul"), "none")
                raise KeyError
            assert snapshot() == before, (way, args)
    return refused


def forked(function, *args):
    """A call in a process of its own with the settings of this one: PyTorch's default for cuDNN never comes back."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as pool:
        return pool.submit(function, *args).result()


def test_every_setting_holds_and_comes_back():
    forked(walk, NEW_WAYS + OLD_WAYS, 400)
    assert forked(walk, [*NEW_WAYS, *OLD_WAYS, *CUDNN * 8], 400) < 40  # only until cuDNN's old setting is made once


def mixed(first, second):
    for way, *args in (first, second):
        way(*args)
    before = snapshot()
    with Conditions().entered():
        assert precision.float32_precision(torch.device("cpu")) == "ieee"
        assert precision.float32_precision(torch.device("cuda")) == "ieee"
    with Conditions(dtype="tf32").entered():
        assert precision.float32_precision(torch.device("cuda")) == "tf32"
    return snapshot() == before


def every_mixture():
    return all(mixed(*pair) for pair in itertools.permutations([*NEW_WAYS, *OLD_WAYS, *CUDNN], 2))


def test_any_two_ways_may_be_mixed():
    assert forked(every_mixture)


def told_by_operator():
    with precision.float32_products(tf32=False):
        settle(("mkldnn", "conv"), "bf16")
        return precision.float32_precision(torch.device("cpu")), precision.float32_precision(torch.device("cuda", 1))


def test_the_record_tells_operators_apart():
    assert forked(told_by_operator) == ("matmul ieee, conv bf16, rnn ieee", "ieee")
