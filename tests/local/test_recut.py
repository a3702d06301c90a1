"""What any number of ranks has saved, any other number takes up: masters and moments bit by bit, and the steps after it."""

import json
import math
import shutil

import pytest
import torch
from launched import run_ranks
from recut_ranks import SETUPS

from spin_ray.bench.tiny import save_tiny
from spin_ray.bench.workload import ADAPTER, save_adapter
from spin_ray.learner.engine import _load_known_types
from spin_ray.learner.recut import MASTERS, Shards, num_ranks

pytestmark = pytest.mark.slow

SHARDED = [name for name in SETUPS if name != "zero_0"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder in which three ranks have saved every setup, and two taken it up."""
    folder = tmp_path_factory.mktemp("recut")
    save_tiny("llama", folder / "model")
    save_adapter(folder, rank=4)
    for mode, world_size in (("write", 3), ("take", 2)):
        (logs := folder / mode).mkdir()
        run_ranks("recut_ranks.py", mode, folder, folder / "model", folder / ADAPTER, *SETUPS, world_size=world_size, logs=logs)
    return folder


def contents(folder):
    """(parameter, masters or a moment) -> all of it."""
    shards = Shards(folder / "state", _load_known_types)
    keys = [MASTERS, *(key for key, moment in shards.moments.items() if moment.ndim)]
    sizes = {name: sum(piece.count for _, piece in pieces) for name, pieces in shards._pieces.items()}
    return {(name, key): shards.read(key, name, 0, size) for name, size in sizes.items() for key in keys}, shards.moments


@pytest.mark.parametrize("name", SHARDED)
def test_masters_and_moments_are_the_same_bit_by_bit(saved, name):
    (before, moments), (after, again) = contents(saved / name), contents(saved / f"{name}_again")
    assert before.keys() == after.keys() and len(before) > 20
    assert all(torch.equal(tensor, after[key]) for key, tensor in before.items())
    assert moments["step"] == again["step"] == 2 and all(before[key].any() for key in before if key[1] != MASTERS)


@pytest.mark.parametrize("name", SETUPS)
def test_the_steps_after_it_are_those_of_the_ranks_that_saved_it(saved, name):
    three, two = (json.loads((saved / f"{name}_losses_{number}.json").read_text()) for number in (3, 2))
    assert two == pytest.approx(three, rel=2e-3 if "bf16" in name else 1e-5) and all(map(math.isfinite, two))


@pytest.mark.parametrize("name", ["zero_2", "zero_3"])
def test_a_rank_s_file_that_is_not_there_is_missed(saved, tmp_path, name):
    folder = shutil.copytree(saved / name, tmp_path / "checkpoint")
    [file] = (folder / "state").glob("*_rank_2_*optim_states.pt")
    shutil.copy(file, file.with_name(file.name.replace("_rank_2_", "_rank_7_")))  # of a larger group that died: nobody asks for it
    assert num_ranks(folder / "state", _load_known_types) == 3 and len(contents(folder)[0]) > 20
    file.unlink()
    with pytest.raises(ValueError, match="3 ranks wrote it, and the file of rank 2 is not there"):
        Shards(folder / "state", _load_known_types)
