"""Dependency trees, parts and saliency from the soft masks of reversed attention (DependencyViT).

The parser of the paper is not published.  Ours follows its description: leaves stop sending first and the root sends
longest, so the messages order the tokens from root to leaf, and a token hangs under the token it sends most to.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .checks import checked

__all__ = ["Dependency", "Tree", "dependency_tree", "saliency", "subtrees"]


class Dependency(NamedTuple):
    """What a model recorded of its last pass, at the positions of the whole map of ``N = H * W`` tokens.

    Attributes:
        masks: Soft dependency masks of the chosen layers ``[B, layers, N (parent), N (child)]``; the column of a child
            sums to its message, and is zero in layers that the child did not reach.
        message: Message of every token in the last layer that it reached ``[B, N]``.
        reached: How many layers every token reached ``[B, N]`` (int64).
        size: Rows and columns of the map.
    """

    masks: Tensor
    message: Tensor
    reached: Tensor
    size: tuple[int, int]


class Tree(NamedTuple):
    """A tree over the tokens of every image.

    Attributes:
        parents: Parent of every token ``[B, N]`` (int64), -1 for the root.
        rank: Place of every token in the order from the root, which has 0, to the last leaf ``[B, N]`` (int64).
        depth: Edges between every token and the root ``[B, N]`` (int64).
    """

    parents: Tensor
    rank: Tensor
    depth: Tensor


def _strength(dependency: Dependency) -> Tensor:
    """Mean mask of the chosen layers with a zero diagonal: ``[B, N (parent), N (child)]``."""
    strength = dependency.masks.mean(1)
    strength.diagonal(dim1=1, dim2=2).zero_()
    return strength


def _ranks(dependency: Dependency) -> Tensor:
    order = dependency.message.sort(dim=1, descending=True, stable=True)[1]
    reached = dependency.reached.gather(1, order)
    order = order.gather(1, reached.sort(dim=1, descending=True, stable=True)[1])
    return order.argsort(dim=1)


def _greedy(strength: Tensor, rank: Tensor) -> Tensor:
    above = rank.unsqueeze(2) < rank.unsqueeze(1)  # [B, parent, child]
    parents = strength.masked_fill(~above, -1.0).argmax(1)
    return parents.masked_fill(rank == 0, -1)


def _cycles(parents: list[int]) -> list[list[int]]:
    """Cycles of the graph in which every node has one parent, or -1."""
    seen = [0] * len(parents)
    found = []
    for start in range(len(parents)):
        node = start
        while node >= 0 and not seen[node]:
            seen[node] = start + 1
            node = parents[node]
        if node >= 0 and seen[node] == start + 1:
            cycle = [node]
            while parents[cycle[-1]] != node:
                cycle.append(parents[cycle[-1]])
            found.append(cycle)
    return found


def _arborescence(weight: Tensor, root: int) -> list[int]:
    """Maximum spanning arborescence (Chu-Liu, Edmonds) of a dense graph.

    Args:
        weight: Of the edge from parent to child ``[n (parent), n (child)]``.
        root: Node without a parent.

    Returns:
        Parent of every node, -1 for the root.
    """
    levels = []
    while True:
        weight = weight.clone().fill_diagonal_(-torch.inf)
        best, parent = weight.max(0)
        parents: list[int] = parent.tolist()
        parents[root] = -1
        cycles = _cycles(parents)
        if not cycles:
            break
        # every cycle becomes one node; entering it at a node saves the edge of the cycle that this replaces
        single = sorted(set(range(len(parents))).difference(*cycles))
        for cycle in cycles:
            weight[:, cycle] -= best[cycle]
        into = [weight[:, cycle].max(1) for cycle in cycles]
        weight = torch.cat([torch.stack([m.values for m in into], 1), weight[:, single]], 1)  # [n, groups]
        out_of = [weight[cycle].max(0) for cycle in cycles]
        weight = torch.cat([torch.stack([m.values for m in out_of]), weight[single]])  # [groups, groups]
        levels.append((parents, cycles, single, [m.indices for m in into], [m.indices for m in out_of]))
        root = len(cycles) + single.index(root)
    for whole, cycles, single, into_nodes, out_nodes in reversed(levels):
        for group, above in enumerate(parents):
            if above < 0:
                continue
            last = cycles[above][int(out_nodes[above][group])] if above < len(cycles) else single[above - len(cycles)]
            if group < len(cycles):
                whole[cycles[group][int(into_nodes[group][last])]] = last
            else:
                whole[single[group - len(cycles)]] = last
        parents = whole
    return parents


@checked(method=("greedy", "edmonds"))
def dependency_tree(dependency: Dependency, method: str = "greedy") -> Tree:
    """Parse the masks into a tree.

    The root is the token that reached most layers and, of those, has the largest message; ties go to the lower
    position.  Strengths are the mean of the masks without their diagonals.

    Args:
        dependency: Of :meth:`DependencyViT.get_dependency`.
        method: ``greedy``: the parent is the one of all higher-ranked tokens that the token sends most to.
            ``edmonds``: the spanning tree from that root with the largest sum of the logarithms of the strengths,
            for up to 1,024 tokens.

    Returns:
        The tree of every image.

    Raises:
        ValueError: If ``method`` is unknown, or ``edmonds`` gets too many tokens.
    """
    strength, rank = _strength(dependency), _ranks(dependency)
    N = rank.shape[1]
    if method == "greedy":
        parents = _greedy(strength, rank)
    else:
        if N > 1024:
            raise ValueError(f"got method='edmonds' for {N} tokens, need at most 1024; use method='greedy'")
        weight = (strength.double() + 1e-12).log().cpu()
        found = [_arborescence(w, int(r.argmin())) for w, r in zip(weight, rank, strict=True)]
        parents = torch.tensor(found, device=rank.device)
    depth = (parents >= 0).long()
    jump = torch.where(parents >= 0, parents, rank.argmin(1, keepdim=True))  # the root jumps to itself
    for _ in range(N.bit_length()):
        depth, jump = depth + depth.gather(1, jump), jump.gather(1, jump)
    return Tree(parents, rank, depth)


@checked()
def subtrees(dependency: Dependency, tree: Tree, k: int, min_size: int = 4) -> Tensor:
    """Cut the tree into parts: the ``k - 1`` weakest edges with enough tokens below them go.

    Args:
        dependency: That the tree was parsed from.
        tree: Of :func:`dependency_tree`.
        k: Number of parts; fewer where too few edges qualify.
        min_size: Tokens that the subtree below a cut edge must have.

    Returns:
        Part of every token ``[B, H, W]`` (int64): 0 for that of the root, the others in the order of their top tokens.

    Raises:
        ValueError: If ``k`` or ``min_size`` is below 1.
    """
    strength = _strength(dependency).cpu()
    labels = torch.zeros_like(tree.parents)
    for b, parents in enumerate(tree.parents.tolist()):
        rank, depth = tree.rank[b].tolist(), tree.depth[b].tolist()
        outward = sorted(range(len(parents)), key=lambda n: (depth[n], rank[n]))  # parents before children
        below = [1] * len(parents)
        for node in reversed(outward[1:]):
            below[parents[node]] += below[node]
        edges = [node for node in outward[1:] if below[node] >= min_size]
        cuts = sorted(edges, key=lambda n: strength[b, parents[n], n].item())[: k - 1]
        tops = {node: part for part, node in enumerate(sorted(cuts, key=outward.index), 1)}
        part = [0] * len(parents)
        for node in outward[1:]:
            part[node] = tops.get(node, part[parents[node]])
        labels[b] = torch.tensor(part, device=labels.device)
    return labels.reshape(-1, *dependency.size)


def saliency(dependency: Dependency) -> tuple[Tensor, Tensor]:
    """What every token receives in the last chosen layer: the row sum of its mask.

    Args:
        dependency: Of :meth:`DependencyViT.get_dependency`.

    Returns:
        The received mass, scaled to 0 to 1 in every image, ``[B, H, W]``; and the foreground, where it is above its
        mean ``[B, H, W]`` (bool).
    """
    received = dependency.masks[:, -1].sum(2)
    low, high = received.amin(1, keepdim=True), received.amax(1, keepdim=True)
    scaled = (received - low) / (high - low).clamp_min(torch.finfo(received.dtype).tiny)
    foreground = scaled > scaled.mean(1, keepdim=True)
    return scaled.reshape(-1, *dependency.size), foreground.reshape(-1, *dependency.size)
