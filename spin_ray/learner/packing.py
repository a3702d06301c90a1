"""Padding-free batches: many answers in one row of tokens, none of which attends to another.

A packed row is a sequence of *trees*: a trunk followed by its branches. With a shared prompt the trunk is the prompt and what
the answers begin with alike, the branches are the rest of each; without, every answer has a tree (and a copy of the prompt) of its
own. Where y' is y, the tree is only a trunk. The output layer has a row for every answer token, also for those that all begin with.

Shapes: T tokens in the row, A answer tokens, N pairs. Answers 3i, 3i + 1 and 3i + 2 are the real, the generated and the anchor of
pair i; an answer's two parts (records.py) are slots 2a and 2a + 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from spin_ray.records import NUM_ANSWERS, NUM_PARTS, Pair


@dataclass(frozen=True)
class Tree:
    """A trunk with its branches in the row."""

    start: int
    trunk: int
    branches: tuple[int, ...]
    """Tokens of each."""

    @property
    def length(self) -> int:
        return self.trunk + sum(self.branches)

    @property
    def forks(self) -> bool:
        """Whether plain causal attention is not enough."""
        return sum(length > 0 for length in self.branches) > 1

    @property
    def depth(self) -> int:
        """Tokens of the trunk with its longest branch: a sliding window that is not shorter hides nothing."""
        return self.trunk + max(self.branches, default=0)


@dataclass(frozen=True)
class Packed:
    input_ids: torch.Tensor
    """[T] int64."""
    position_ids: torch.Tensor
    """[T] int64; an answer's positions go on from its prompt's last."""
    trees: tuple[Tree, ...]
    starts: torch.Tensor
    """[num_trees + 1] int32, where each tree begins, and T: what variable-length kernels call cu_seqlens."""
    predictor: torch.Tensor
    """[A] int64, place in the row of the token whose output predicts this answer token."""
    targets: torch.Tensor
    """[A] int64, the answer tokens."""
    slot: torch.Tensor
    """[A] int64, which part of which of the 3N answers the token belongs to."""
    num_pairs: int

    @property
    def answer_of(self) -> torch.Tensor:
        """[A] int64, which of the 3N answers the token belongs to."""
        return self.slot // NUM_PARTS

    def sums(self, logps: torch.Tensor) -> torch.Tensor:
        """Log-probs of the answer tokens, [A] -> of the parts of every pair's answers, [N, 3, 2]."""
        shape = self.num_pairs, NUM_ANSWERS, NUM_PARTS
        return logps.new_zeros(math.prod(shape)).index_add(0, self.slot, logps).view(shape)

    def to(self, device: torch.device) -> Packed:
        tensors = ("input_ids", "position_ids", "starts", "predictor", "targets", "slot")
        return replace(self, **{name: getattr(self, name).to(device) for name in tensors})


def pack(pairs: Sequence[Pair], *, share_prompt: bool) -> Packed:
    """Lay pairs out in one row. A pair without a generated answer (SFT) has only its real branch.

    Raises ValueError for an empty prompt: nothing would predict the first token of its answers.
    """
    ids, positions, trees, predictor, targets, slots, place = [], [], [], [], [], [], 0
    for index, pair in enumerate(pairs):
        if not len(pair.prompt_ids):
            raise ValueError(f"pair {index} (prompt_id {pair.prompt_id}) has an empty prompt; a chat template gives at least one token")
        answers = [(NUM_ANSWERS * index + k, tokens) for k, tokens in enumerate(pair.answers) if len(tokens)]
        for branches in [answers] if share_prompt else [[answer] for answer in answers]:
            common = num_common(pair) if share_prompt else 0
            start, prompt, trunk = place, len(pair.prompt_ids), len(pair.prompt_ids) + common
            ids += [pair.prompt_ids, pair.real_ids[:common]]
            positions.append(np.arange(trunk))
            place += trunk
            for which, tokens in branches:
                rest = tokens[common:-1]  # the last token of an answer predicts nothing, so it is not fed
                ids.append(rest)
                positions.append(np.arange(trunk, trunk + len(rest)))
                predictor += [np.arange(start + prompt - 1, start + trunk), np.arange(place, place + len(rest))]
                targets.append(tokens)
                slots.append(NUM_PARTS * which + (np.arange(len(tokens)) >= pair.common_length))
                place += len(rest)
            lengths = [len(tokens) - 1 - common for _, tokens in branches]
            trees.append(Tree(start, trunk, tuple(lengths)))
    return Packed(
        _int64(ids), _int64(positions), tuple(trees), torch.tensor([*[t.start for t in trees], place], dtype=torch.int32),
        _int64(predictor), _int64(targets), _int64(slots), len(pairs),
    )


def num_common(pair: Pair) -> int:
    """How many of the tokens that are fed, all but the last of each, all answers begin with. Worked: abcd, abce -> 3; abcd alone -> 0."""
    first, *others = (answer for answer in pair.answers if len(answer))
    shortest = min(map(len, others), default=0)
    alike = max(0, min(len(first), shortest) - 1)
    for other in others:
        different = np.flatnonzero(first[:alike] != other[:alike])
        alike = int(different[0]) if len(different) else alike
    return alike


def _int64(parts: list[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.int64))


def row_tokens(pair: Pair, *, share_prompt: bool) -> int:
    """Tokens the pair takes in a packed row."""
    return sum(trunk + sum(branches) for trunk, branches in tree_lengths(pair, share_prompt=share_prompt))


def tree_lengths(pair: Pair, *, share_prompt: bool) -> list[tuple[int, list[int]]]:
    """The pair's trees as `pack` lays them out: tokens of the trunk, and of each branch."""
    prompt, fed = len(pair.prompt_ids), [len(answer) - 1 for answer in pair.answers if len(answer)]
    if not share_prompt:
        return [(prompt, [length]) for length in fed]
    common = num_common(pair)
    return [(prompt + common, [length - common for length in fed])]


def plan_micro_batches(lengths: Sequence[int], *, num_ranks: int, pack_tokens: int) -> list[list[list[int]]]:
    """Share a batch out: plan[rank][k] are the indices of the pairs in that rank's micro-batch k.

    Every rank computes the same plan from the same lengths, so the number of micro-batches agrees without a collective:
    ranks with fewer get empty ones at the end. Longest first, each to the rank with the fewest tokens so far; a
    micro-batch is closed when the next pair would not fit in `pack_tokens`, and pairs of similar length lie together.
    """
    ranks: list[list[int]] = [[] for _ in range(num_ranks)]
    load = [0] * num_ranks
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        rank = min(range(num_ranks), key=lambda r: (load[r], r))
        ranks[rank].append(index)
        load[rank] += lengths[index]
    plan = [_cut(indices, lengths, pack_tokens) for indices in ranks]
    most = max(len(micro_batches) for micro_batches in plan)
    return [micro_batches + [[]] * (most - len(micro_batches)) for micro_batches in plan]


def _cut(indices: list[int], lengths: Sequence[int], pack_tokens: int) -> list[list[int]]:
    micro_batches: list[list[int]] = []
    room = 0
    for index in indices:
        if not micro_batches or lengths[index] > room:
            micro_batches.append([])
            room = pack_tokens
        micro_batches[-1].append(index)
        room -= lengths[index]
    return micro_batches
