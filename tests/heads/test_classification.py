"""Probes: features against the model's own head, k-NN against a loop, attention that learns on a frozen backbone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tolerance import close
from zoo import build, each_kind, sample

from vizoo.heads.classification import AttentiveProbe, extract_features, knn_probe, linear_probe


@each_kind
def test_features_are_what_the_classifier_sees(name: str) -> None:
    model = build(name, num_classes=5)
    x, y = sample(model, batch=3), torch.tensor([1, 0, 4])
    found = extract_features(model, [(x[:2], y[:2]), (x[2:], y[2:])])
    assert found.x.shape == (3, model.head_hidden_size)
    assert found.x.dtype == np.float32
    assert found.y.tolist() == [1, 0, 4]
    with torch.no_grad():
        features = model.forward_features(x)
        close(torch.from_numpy(found.x), model.forward_head(features, pre_logits=True).flatten(1), "rerun")


def test_no_images() -> None:
    with pytest.raises(ValueError, match="without an image"):
        extract_features(build("test_litv2"), [])


def blobs(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.RandomState(seed)
    y = random.randint(0, 3, n)
    return (np.eye(3, 8)[y] + 0.3 * random.randn(n, 8)).astype(np.float32), y


def test_knn_against_a_loop() -> None:
    (x, y), (q, t) = blobs(60, 0), blobs(20, 1)
    probe = knn_probe(k=7, temperature=0.1).fit(x, y)
    expected = []
    for one in q:
        cosine = x @ one / np.linalg.norm(x, axis=1) / np.linalg.norm(one)
        near = np.argsort(-cosine)[:7]
        votes = np.bincount(y[near], weights=np.exp(cosine[near] / 0.1), minlength=3)
        expected.append(votes / votes.sum())
    np.testing.assert_allclose(probe.predict_proba(q), expected, rtol=1e-4, atol=1e-6)
    assert probe.score(q, t) > 0.8


def test_linear() -> None:
    train, held_out = blobs(200, 0), blobs(50, 1)
    assert linear_probe().fit(*train).score(*held_out) > 0.9


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: linear_probe(C=0), "C=0, need a number above 0"),
        (lambda: knn_probe(k=0), "k=0, need a whole number of at least 1"),
        (lambda: knn_probe(temperature=-1), "temperature=-1, need a number above 0"),
        (lambda: AttentiveProbe(build("test_litv2"), 3, num_heads=7), "num_heads=7, need a divisor of the"),
    ],
)
def test_errors(make, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        make()


@pytest.mark.parametrize("name", ["test_litv2", "test_ninformer", "test_vit", "test_overlock"])
def test_attentive_probe(name: str) -> None:
    """Learns, and leaves the backbone and its statistics as they were; works on all layouts of features."""
    probe = AttentiveProbe(build(name), 2, num_heads=4).train()
    before = {k: v.clone() for k, v in probe.model.state_dict().items()}
    x = sample(probe.model, batch=4)
    x[:2] += 2
    y = torch.tensor([0, 0, 1, 1])
    trained = [p for p in probe.parameters() if p.requires_grad]
    assert {id(p) for p in trained} == {id(p) for n, p in probe.named_parameters() if not n.startswith("model.")}
    assert probe.tokens(x).shape[::2] == (4, probe.model.num_features)
    optimizer = torch.optim.AdamW(trained, 1e-2)
    losses = []
    for _ in range(8):
        loss = torch.nn.functional.cross_entropy(probe(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
    assert all(torch.equal(v, before[k]) for k, v in probe.model.state_dict().items())
