"""The objectives against numbers worked out by hand, and against TRL's DPO loss."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from spin_ray.losses import LOSS_AT_ZERO, LOSSES, PairLogps, sft_loss, spin_loss


def logps(policy_real, policy_generated, opponent_real, opponent_generated, tokens=4, **options):
    columns = [torch.tensor(c, dtype=torch.float64, **options) for c in (policy_real, policy_generated, opponent_real, opponent_generated)]
    return PairLogps(*columns, torch.full((len(policy_real),), tokens))


def test_hand_computed_numbers():
    # real +10 nats, generated -10 nats, beta 0.1: z = 0.1 * (10 + 10) = 2; real +2, generated +4, beta 0.1: z = -0.2
    loss, metrics = spin_loss(logps([-10.0, -8.0], [-40.0, -6.0], [-20.0, -10.0], [-30.0, -10.0]), beta=0.1)
    assert loss.tolist() == pytest.approx([math.log(1 + math.exp(-2)), math.log(1 + math.exp(0.2))])
    assert metrics["margin"].tolist() == pytest.approx([2.0, -0.2])
    assert metrics["accuracy"].tolist() == [1, 0]
    assert metrics["real_logp_change_nats"].tolist() == [10, 2]
    assert metrics["generated_logp_change_nats"].tolist() == [-10, 4]


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("beta", [0.05, 0.1, 5.0])
def test_policy_equal_to_opponent_gives_the_loss_at_zero_whatever_beta(kind, beta):
    same = [-3.0, -50.0]
    loss, metrics = spin_loss(logps(same, [-7.0, -9.0], same, [-7.0, -9.0]), beta=beta, loss=kind)
    assert loss.tolist() == pytest.approx([LOSS_AT_ZERO[kind]] * 2)
    assert metrics["margin"].tolist() == [0, 0]


def test_every_loss_against_its_formula_at_z_one_half():
    record = logps([-5.0], [-10.0], [-10.0], [-10.0])
    values = {kind: spin_loss(record, beta=0.1, loss=kind)[0].item() for kind in LOSSES}
    assert values == pytest.approx({
        "logistic": math.log(1 + math.exp(-0.5)), "hinge": 0.5, "exponential": math.exp(-0.5), "correlation": 0.5,
    })


@pytest.mark.parametrize("kind", LOSSES)
def test_gradient_raises_real_and_lowers_generated(kind):
    record = logps([-10.0], [-12.0], [-10.0], [-12.0], requires_grad=True)
    spin_loss(record, beta=0.1, loss=kind)[0].sum().backward()
    assert record.policy_real.grad.item() < 0 < record.policy_generated.grad.item()
    assert record.policy_real.grad.item() == -record.policy_generated.grad.item()


@pytest.mark.parametrize("kind", LOSSES)
def test_gradcheck(kind):
    generator = torch.Generator().manual_seed(0)
    real, generated = (-20 * torch.rand(5, dtype=torch.float64, generator=generator) for _ in range(2))
    opponent = [-20 * torch.rand(5, dtype=torch.float64, generator=generator) for _ in range(2)]

    def loss(policy_real, policy_generated):
        return spin_loss(PairLogps(policy_real, policy_generated, *opponent, torch.arange(1, 6)), beta=0.3, loss=kind, nll_weight=0.7)[0]

    assert torch.autograd.gradcheck(loss, (real.requires_grad_(), generated.requires_grad_()))


def test_nll_weight_adds_the_mean_per_token():
    plain, _ = spin_loss(logps([-8.0], [-9.0], [-8.0], [-9.0], tokens=4), beta=0.1)
    with_nll, metrics = spin_loss(logps([-8.0], [-9.0], [-8.0], [-9.0], tokens=4), beta=0.1, nll_weight=0.5)
    assert (with_nll - plain).item() == pytest.approx(0.5 * 8 / 4)
    assert metrics["spin_loss"].item() == pytest.approx(math.log(2))


def test_displaced_is_a_higher_reward_with_a_lower_likelihood():
    _, metrics = spin_loss(logps([-12.0, -8.0], [-20.0, -20.0], [-10.0, -10.0], [-10.0, -10.0]), beta=0.1)
    assert metrics["displaced_share"].tolist() == [1, 0]


def test_pairs_do_not_influence_each_other():
    rng = np.random.default_rng(0)
    columns = -20 * rng.random((4, 6))
    together, _ = spin_loss(logps(*columns.tolist()), beta=0.1)
    order = rng.permutation(6)
    shuffled, _ = spin_loss(logps(*columns[:, order].tolist()), beta=0.1)
    assert torch.equal(shuffled, together[order])


def test_sft_loss_is_the_summed_nll():
    loss, metrics = sft_loss(logps([-8.0], [0.0], [0.0], [0.0], tokens=4))
    assert loss.item() == 8
    assert metrics["real_nll_nats_per_token"].item() == 2


def test_parity_with_trl_dpo_sigmoid(tiny_model, make_pairs, tmp_path):
    """The same token ids, policy and reference through TRL's DPOTrainer and through packing + spin_loss: the same loss."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    from spin_ray.learner import attention
    from spin_ray.learner.logps import PolicyLogps
    from spin_ray.learner.packing import pack

    folder = tiny_model(tied=True)
    policy, reference = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for _ in range(2))
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    policy.save_pretrained(tmp_path / "policy")
    trainer = DPOTrainer(
        model=policy, ref_model=reference, processing_class=AutoTokenizer.from_pretrained(folder),
        args=DPOConfig(output_dir=str(tmp_path), use_cpu=True, report_to=[], beta=0.3, loss_type="sigmoid", bf16=False),
        train_dataset=Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}]),
    )
    pairs = make_pairs(6)
    examples = [{"prompt_ids": p.prompt_ids.tolist(), "chosen_ids": p.real_ids.tolist(), "rejected_ids": p.generated_ids.tolist()} for p in pairs]
    theirs = trainer.compute_loss(policy, trainer.data_collator(examples))

    def answer_sums(path):
        model = PolicyLogps(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation=attention.NAME))
        packed = pack(pairs, share_prompt=True)
        return torch.zeros(2 * len(pairs)).index_add(0, packed.answer_of, model(packed)).view(-1, 2)

    ours, known = answer_sums(tmp_path / "policy"), answer_sums(folder)
    num_real = torch.tensor([len(pair.real_ids) for pair in pairs])
    loss, _ = spin_loss(PairLogps(ours[:, 0], ours[:, 1], known[:, 0], known[:, 1], num_real), beta=0.3)
    assert loss.mean().item() != pytest.approx(math.log(2), abs=1e-2)
    assert loss.mean().item() == pytest.approx(theirs.item(), abs=1e-5)


def test_records_are_frozen():
    record = logps([0.0], [0.0], [0.0], [0.0])
    with pytest.raises(AttributeError):
        record.policy_real = None
    assert replace(record, policy_real=torch.ones(1)).policy_real.item() == 1
