"""Dependencies of tokens: trees, parts and saliency."""

import itertools

import pytest
import torch
from golden import image
from tolerance import op_close
from zoo import build, spread

from vizoo.backbones.layers import Dependency, dependency_tree, saliency, subtrees
from vizoo.backbones.layers.dependency import Tree


def random_dependency(B, N, seed=0, size=None):
    generator = torch.Generator().manual_seed(seed)
    masks = torch.rand(B, 2, N, N, generator=generator, dtype=torch.float64)
    reached = torch.randint(1, 3, (B, N), generator=generator)
    reached[:, 0] = 2
    return Dependency(masks, torch.rand(B, N, generator=generator, dtype=torch.float64), reached, size or (1, N))


def check_tree(tree, b):
    """One root, no cycle, depth and rank as defined."""
    parents = tree.parents[b].tolist()
    assert parents.count(-1) == 1
    root = parents.index(-1)
    assert tree.rank[b, root] == 0
    assert sorted(tree.rank[b].tolist()) == list(range(len(parents)))
    for node in range(len(parents)):
        steps, above = 0, node
        while parents[above] >= 0:
            steps, above = steps + 1, parents[above]
            assert steps < len(parents), "a cycle"
        assert above == root
        assert tree.depth[b, node] == steps


@pytest.mark.parametrize("N", [1, 2, 7, 33])
@pytest.mark.parametrize("method", ["greedy", "edmonds"])
def test_parents_form_a_tree(method, N):
    found = random_dependency(3, N)
    before = found.masks.clone()
    tree = dependency_tree(found, method)
    assert tree.parents.dtype == tree.rank.dtype == tree.depth.dtype == torch.int64
    assert torch.equal(found.masks, before)
    for b in range(3):
        check_tree(tree, b)


def test_greedy_is_the_definition():
    found = random_dependency(2, 13)
    tree = dependency_tree(found)
    for b in range(2):
        key = [(-int(found.reached[b, i]), -float(found.message[b, i]), i) for i in range(13)]
        order = sorted(range(13), key=lambda i: key[i])
        assert tree.rank[b].tolist() == [order.index(i) for i in range(13)]
        D = found.masks[b].mean(0)
        for place, child in enumerate(order):
            best = max(order[:place], key=lambda j: (float(D[j, child]), -j), default=-1)
            assert tree.parents[b, child] == best


def test_equal_tokens_hang_under_the_lowest_position():
    equal = Dependency(torch.ones(1, 1, 4, 4), torch.ones(1, 4), torch.ones(1, 4, dtype=torch.int64), (2, 2))
    assert dependency_tree(equal).parents.tolist() == [[-1, 0, 0, 0]]
    assert dependency_tree(equal).rank.tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize("N", [2, 3, 4, 5, 6])
def test_edmonds_is_the_best_of_all_trees(N):
    found = random_dependency(12 if N < 6 else 4, N, seed=N)
    tree = dependency_tree(found, "edmonds")
    for b in range(len(found.message)):
        weight = (found.masks[b].mean(0) + 1e-12).log()
        root = int((tree.rank[b] == 0).nonzero())

        def total(parents, weight=weight, root=root):
            return sum(float(weight[j, i]) for i, j in enumerate(parents) if i != root)

        def is_tree(parents, root=root):
            for node in range(N):
                for _ in range(N):
                    node = parents[node] if node != root else root
                if node != root:
                    return False
            return True

        choices = [[-1] if i == root else [j for j in range(N) if j != i] for i in range(N)]
        best = max(total(p) for p in itertools.product(*choices) if is_tree(p))
        assert total(tree.parents[b].tolist()) == pytest.approx(best, abs=1e-9)


def test_edmonds_leaves_the_greedy_order():
    """0 is the root; 1 and 2 send most to each other, and 2 more to 0 than 1 does: 2 hangs under 0 and 1 under 2."""
    D = torch.tensor([[0.0, 0.1, 0.4], [0.0, 0.0, 0.9], [0.0, 0.8, 0.0]])
    found = Dependency(D[None, None], torch.tensor([[0.9, 0.8, 0.7]]), torch.ones(1, 3, dtype=torch.int64), (1, 3))
    assert dependency_tree(found).parents.tolist() == [[-1, 0, 1]]
    assert dependency_tree(found, "edmonds").parents.tolist() == [[-1, 2, 0]]


def test_unknown_methods_and_too_many_tokens():
    with pytest.raises(ValueError, match="got method='prim', need 'greedy' or 'edmonds'"):
        dependency_tree(random_dependency(1, 3), "prim")
    many = Dependency(torch.zeros(1, 1, 1025, 1025), torch.ones(1, 1025), torch.ones(1, 1025).long(), (1, 1025))
    with pytest.raises(ValueError, match="got method='edmonds' for 1025 tokens, need at most 1024"):
        dependency_tree(many, "edmonds")


def test_subtrees_cut_the_weakest_edges_with_enough_below():
    #        0
    #     1     2
    #    3 4   5 6     and 7 under 3
    parents = torch.tensor([[-1, 0, 0, 1, 1, 2, 2, 3]])
    strength = [0, 0.5, 0.3, 0.2, 0.1, 0.1, 0.1, 0.05]  # of the edge above each token
    D = torch.zeros(1, 1, 8, 8)
    for child in range(1, 8):
        D[0, 0, parents[0, child], child] = strength[child]
    found = Dependency(D, torch.ones(1, 8), torch.ones(1, 8).long(), (2, 4))
    tree = Tree(parents, torch.arange(8)[None], torch.tensor([[0, 1, 1, 2, 2, 2, 2, 3]]))
    cut = {
        (1, 1): [0, 0, 0, 0, 0, 0, 0, 0],
        (2, 1): [0, 0, 0, 0, 0, 0, 0, 1],  # the edge of 7 is the weakest
        (2, 2): [0, 0, 0, 1, 0, 0, 0, 1],  # with two tokens below: that of 3
        (3, 2): [0, 0, 1, 2, 0, 1, 1, 2],
        (9, 3): [0, 1, 2, 1, 1, 2, 2, 1],  # only 1 and 2 have three
        (9, 9): [0, 0, 0, 0, 0, 0, 0, 0],
    }
    for (k, least), labels in cut.items():
        found_labels = subtrees(found, tree, k, least)
        assert found_labels.shape == (1, 2, 4)
        assert found_labels.flatten().tolist() == labels, (k, least)
    for k, least in ((0, 1), (1, 0)):
        with pytest.raises(ValueError, match=f"got {'min_size' if k else 'k'}=0, need a whole number of at least 1"):
            subtrees(found, tree, k, least)


def test_saliency_is_what_a_token_receives_in_the_last_layer():
    found = random_dependency(2, 6, size=(2, 3))
    scaled, foreground = saliency(found)
    received = found.masks[:, -1].sum(2)
    for b in range(2):
        expected = (received[b] - received[b].min()) / (received[b].max() - received[b].min())
        op_close(scaled[b].flatten(), expected)
        assert foreground[b].flatten().tolist() == (received[b] > received[b].mean()).tolist()
    flat, nothing = saliency(found._replace(masks=torch.ones(2, 1, 6, 6)))
    assert not flat.any()
    assert not nothing.any()


@torch.no_grad()
@pytest.mark.parametrize("name", ["test_dependencyvit", "test_dependencyvit_lite"])
def test_tree_of_a_model(name):
    model = spread(build(name, gate_init=0.0))
    model.set_record_dependency()
    model(image((2, 3, 64, 96)))
    found = model.get_dependency()
    for method in ("greedy", "edmonds"):
        tree = dependency_tree(found, method)
        for b in range(2):
            check_tree(tree, b)
        deepest = found.reached.max()
        assert (found.reached.gather(1, tree.rank.argmin(1, keepdim=True)) == deepest).all()
        parts = subtrees(found, tree, 3)
        assert parts.shape == (2, 4, 6)
        assert parts.amax() <= 2
