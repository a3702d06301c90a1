"""A judge that nobody trained: how near a model's held-out answers are to the human ones, by a small sentence encoder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoModel, AutoTokenizer

from spin_ray.errors import BadInput
from spin_ray.exchange.pairs import read_pairs
from spin_ray.manifest import RunDir
from spin_ray.records import Pair, from_table

BATCH = 64


def judged(run: RunDir, version: int) -> dict[str, float]:
    """Of what theta_version answered at temperature 1, beside the human answers to the same prompts.

    `human_similarity`: mean cosine of an answer with the human one to its prompt. `human_distance`: energy distance (Székely and Rizzo)
    between the two clouds of answers, 0 if they cannot be told apart.
    """
    config = json.loads((run.path / "config.json").read_text())
    pairs = from_table(read_pairs(run.heldout_answers(version), run.storage), Pair)
    decode = AutoTokenizer.from_pretrained(config["model"]["path"]).decode
    encoder = Encoder(encoder_beside(config["data"]["eval"]))
    real, generated = (
        encoder([decode(ids, skip_special_tokens=True) for ids in answers])
        for answers in ([pair.real_ids for pair in pairs], [pair.generated_ids for pair in pairs])
    )
    return {"human_similarity": float((real * generated).sum(1).mean()), "human_distance": energy_distance(real, generated)}


def encoder_beside(rows: str) -> Path:
    """The encoder's folder, beside a file of rows. Raises BadInput if there is none."""
    folder = Path(rows).with_name("minilm")
    if not folder.is_dir():
        raise BadInput(f"{folder}: no such folder; `python -m spin_ray.demo.real` makes it, with the model and the rows")
    return folder


class Encoder:
    """Mean of the last hidden states, at length 1, as sentence-transformers uses this model."""

    def __init__(self, folder: Path):
        self._tokenizer, self._model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> torch.Tensor:
        """Texts -> [N, D] float32."""
        found = []
        for begin in range(0, len(texts), BATCH):
            inputs = self._tokenizer(list(texts[begin : begin + BATCH]), padding=True, truncation=True, return_tensors="pt")
            weights = inputs["attention_mask"].unsqueeze(-1).float()
            states = self._model(**inputs).last_hidden_state
            found.append(F.normalize((states * weights).sum(1) / weights.sum(1), dim=1))
        return torch.cat(found)


def energy_distance(x: torch.Tensor, y: torch.Tensor) -> float:
    """2 E|X - Y| - E|X - X'| - E|Y - Y'| of two samples [N, D], unbiased; near 0, perhaps below it, for equal distributions."""

    def within(z: torch.Tensor) -> torch.Tensor:
        return torch.cdist(z, z).sum() / (len(z) * (len(z) - 1))

    return float(2 * torch.cdist(x, y).mean() - within(x) - within(y))
