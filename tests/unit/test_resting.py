"""A device's memory given back and taken again. Here the device is the CPU: the storages are emptied all the same."""

import gc

import pytest
import torch

from spin_ray.learner.resting import Resting

CPU = torch.device("cpu")


def test_every_tensor_holds_what_it_held_and_what_shares_memory_shares_it():
    flat = torch.arange(12.0)
    weight = torch.nn.Parameter(flat[:6].view(2, 3))  # as DeepSpeed does: parameters are views of a flat buffer
    half = torch.randn(5).to(torch.bfloat16)
    (weight * 2).sum().backward()
    moment, before = torch.ones(100), half.clone()
    expected = flat.clone()
    resting = Resting(CPU, [moment])
    assert flat.untyped_storage().nbytes() == moment.untyped_storage().nbytes() == half.untyped_storage().nbytes() == 0
    assert resting.num_bytes >= 4 * (12 + 6 + 100) + 2 * 5
    resting.end()
    assert torch.equal(flat, expected) and torch.equal(weight.detach().flatten(), expected[:6]) and torch.equal(half, before)
    assert torch.equal(weight.grad, torch.full((2, 3), 2.0)) and not moment.any()
    with torch.no_grad():
        weight[0, 0] = 7.0
    assert flat[0] == 7.0  # still the same memory


def test_a_model_trains_on_as_if_nothing_had_been():
    def losses(rests):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.BatchNorm1d(16), torch.nn.Linear(16, 1))
        optimizer, found = torch.optim.AdamW(model.parameters(), lr=0.1), []
        for _ in range(4):
            loss = model(torch.randn(32, 8)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            if rests:
                Resting(CPU).end()
            optimizer.step()
            found.append(loss.item())
        return found

    assert losses(False) == losses(True)


@pytest.mark.parametrize("make", [lambda: torch.randn(3).to_sparse(), lambda: torch.from_numpy(__import__("numpy").ones(3)), lambda: torch.empty(0)])
def test_what_has_no_memory_of_its_own_to_give_is_left_alone(make):
    strange = make()
    before = strange.to_dense().clone() if strange.is_sparse else strange.clone()
    Resting(CPU).end()
    assert torch.equal(strange.to_dense() if strange.is_sparse else strange, before)
    gc.collect()
