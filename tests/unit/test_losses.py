"""The objectives against numbers worked out by hand, and against TRL's DPO loss."""

import math
from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from spin_ray.config import Config
from spin_ray.losses import LOSSES, MARGIN_EDGES, LikelihoodObjective, PairLogps, PairObjective
from spin_ray.records import Pair


def parts(*answers):
    """[N, 3, 2] float64 of up to three columns; an entry is a number, all of it in the first part, or both parts."""
    columns = [*answers, *([[0.0] * len(answers[0])] * (3 - len(answers)))]
    both = [[entry if isinstance(entry, tuple) else (entry, 0.0) for entry in column] for column in columns]
    return torch.tensor(both, dtype=torch.float64).transpose(0, 1).contiguous()


def logps(policy, opponent, *, tokens=(4, 4, 0), base=None):
    """Columns of real, generated and perhaps anchor log-probs."""
    policy = parts(*policy)
    return PairLogps(policy, parts(*opponent), torch.tensor([tokens] * len(policy)), None if base is None else parts(*base))


ZERO = {"logistic": math.log(2), "hinge": 1.0, "exponential": 1.0, "correlation": 1.0, "space": 2 * math.log(2)}
"""What a loss is where policy == opponent, by hand; the triplet's depends on the opponent."""


def test_hand_computed_numbers():
    # real +10 nats, generated -10 nats, beta 0.1: z = 0.1 * (10 + 10) = 2; real +2, generated +4, beta 0.1: z = -0.2
    loss, metrics = PairObjective(0.1)(logps([[-10.0, -8.0], [-40.0, -6.0]], [[-20.0, -10.0], [-30.0, -10.0]]))
    assert loss.tolist() == pytest.approx([math.log(1 + math.exp(-2)), math.log(1 + math.exp(0.2))])
    assert metrics["margin"].tolist() == pytest.approx([2.0, -0.2])
    assert metrics["accuracy"].tolist() == [1, 0]
    assert metrics["real_logp_change_nats"].tolist() == [10, 2]
    assert metrics["generated_logp_change_nats"].tolist() == [-10, 4]


@pytest.mark.parametrize("kind", ZERO)
@pytest.mark.parametrize("beta", [0.05, 0.1, 5.0])
@pytest.mark.parametrize("companions", [
    {}, {"label_smoothing": 0.2}, {"length": "mean"}, {"length": "desensitised", "tail_weight": 0.3}, {"positive_weight": 5.0}, {"nll_weight": 2.0},
])
def test_policy_equal_to_opponent_gives_the_known_loss_whatever_beta(kind, beta, companions):
    same = [[-3.0, (-50.0, -2.0)], [-7.0, -9.0]]
    _, metrics = PairObjective(beta, loss=kind, **companions)(logps(same, same))
    assert metrics["pair_loss"].tolist() == pytest.approx([ZERO[kind]] * 2) == metrics["expected_pair_loss"].tolist()
    assert metrics["margin"].tolist() == [0, 0]


def test_every_loss_against_its_formula():
    # beta 0.1: r(y) = 5 nats -> 0.5, r(y') = -2 nats -> -0.2, z = 0.7
    record = logps([[-5.0], [-12.0], [-15.0]], [[-10.0], [-10.0], [-10.0]], tokens=(4, 4, 4))
    values = {kind: PairObjective(0.1, loss=kind)(record)[0].item() for kind in LOSSES}
    assert values == pytest.approx({
        "logistic": math.log(1 + math.exp(-0.7)), "hinge": 0.3, "exponential": math.exp(-0.7), "correlation": 0.3,
        "space": math.log(1 + math.exp(-0.5)) + math.log(1 + math.exp(-0.2)),
        # u(y) = -0.5, u(y') = -1.2, u(y'_0) = -1.5
        "triplet": math.log(1 + math.exp(-0.7)) + math.log(1 + math.exp(-0.3)),
    })


def test_the_config_knows_every_loss():
    [choices] = [entry.metadata["choices"] for entry in fields(Config().spin) if entry.name == "loss"]
    assert set(choices) == set(LOSSES)


def test_space_with_more_noise_than_answers():
    # mu 3, beta 1, r(y) = 2, r(y') = -1: s(r) = 1 / (1 + 3 e^-r); at r = 0: ln 4 + 3 ln(4/3)
    objective = PairObjective(1.0, loss="space", noise_ratio=3.0)
    loss, metrics = objective(logps([[-8.0], [-11.0]], [[-10.0], [-10.0]]))
    s = [1 / (1 + 3 * math.exp(-r)) for r in (2, -1)]
    assert loss.item() == pytest.approx(-math.log(s[0]) - 3 * math.log(1 - s[1]))
    assert metrics["expected_pair_loss"].item() == pytest.approx(math.log(4) + 3 * math.log(4 / 3))


def test_triplet_in_iteration_0_moves_only_real_and_generated():
    """There y' is y'_0, so no anchor comes with the pair: the historical term is ln 2 times its weight."""
    record = logps([[-5.0], [-12.0]], [[-10.0], [-10.0]])
    record.policy.requires_grad_()
    loss, _ = PairObjective(0.1, loss="triplet", anchor_weight=2.0)(record)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-0.7)) + 2 * math.log(2))
    with_anchor = PairObjective(0.1, loss="triplet", anchor_weight=2.0)(logps([[-5.0], [-12.0], [-12.0]], [[-10.0], [-10.0], [-10.0]], tokens=(4, 4, 4)))[0]
    loss.sum().backward()
    current = torch.autograd.functional.jacobian(lambda x: PairObjective(0.1, loss="triplet", anchor_weight=0.0)(replace(record, policy=x))[0].sum(), record.policy.detach())
    assert with_anchor.item() == pytest.approx(loss.item()) and torch.allclose(record.policy.grad, current)


def test_triplet_at_policy_equal_to_opponent_is_what_the_opponent_gives():
    same = [[-5.0], [-12.0], [-15.0]]
    _, metrics = PairObjective(0.1, loss="triplet")(logps(same, same, tokens=(4, 4, 4)))
    expected = math.log(1 + math.exp(-0.7)) + math.log(1 + math.exp(-0.3))
    assert metrics["pair_loss"].item() == pytest.approx(expected) == metrics["expected_pair_loss"].item()


def test_label_smoothing():
    # z = 2: 0.9 ln(1 + e^-2) + 0.1 ln(1 + e^2)
    loss, _ = PairObjective(0.1, label_smoothing=0.1)(logps([[-10.0], [-40.0]], [[-20.0], [-30.0]]))
    assert loss.item() == pytest.approx(0.9 * math.log(1 + math.exp(-2)) + 0.1 * math.log(1 + math.exp(2)))


def test_length_mean_divides_every_log_prob_by_its_answer_s_tokens():
    # r(y) = 10 nats over 5 tokens = 2, r(y') = -12 nats over 4 tokens = -3: z = 0.1 * 5
    _, metrics = PairObjective(0.1, length="mean")(logps([[-10.0], [-42.0]], [[-20.0], [-30.0]], tokens=(5, 4, 0)))
    assert metrics["margin"].item() == pytest.approx(0.5)
    assert metrics["real_logp_change_nats"].item() == 10


def test_length_desensitised_weighs_what_the_longer_answer_has_more():
    # y: 4 nats up to the border, 6 behind it, weight 0.25 -> 5.5; y' = -2 -> z = 0.1 * 7.5
    record = logps([[(-6.0, -4.0)], [-32.0]], [[(-10.0, -10.0)], [-30.0]])
    assert PairObjective(0.1, length="desensitised", tail_weight=0.25)(record)[1]["margin"].item() == pytest.approx(0.75)
    assert PairObjective(0.1, length="desensitised", tail_weight=1.0)(record)[1]["margin"].item() == PairObjective(0.1)(record)[1]["margin"].item()


@pytest.mark.parametrize("real, z", [(-14.0, 0.1 * (-4 + 6) - 0.1 * 5 * 4), (-8.0, 0.1 * (2 + 6))])
def test_dpo_positive_counts_the_fall_of_the_real_answer_alone(real, z):
    loss, metrics = PairObjective(0.1, positive_weight=5.0)(logps([[real], [-16.0]], [[-10.0], [-10.0]]))
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-z)))
    assert metrics["margin"].item() == pytest.approx(0.1 * (real + 10 + 6))


def test_base_share_mixes_theta_0_into_the_reference_geometrically():
    # reference of y: 0.75 * -20 + 0.25 * -12 = -18, of y': 0.75 * -30 + 0.25 * -34 = -31: z = 0.1 * (8 + 9)
    record = logps([[-10.0], [-40.0]], [[-20.0], [-30.0]], base=[[-12.0], [-34.0]])
    _, metrics = PairObjective(0.1, base_share=0.25)(record)
    assert metrics["margin"].item() == pytest.approx(1.7)
    # policy == opponent: r(y) = -20 + 18, r(y') = -30 + 31: z = -0.3
    assert metrics["expected_pair_loss"].item() == pytest.approx(math.log(1 + math.exp(0.3)))
    assert metrics["real_logp_change_nats"].item() == 10  # since theta_t, whatever the reference


def test_a_replayed_pair_weighs_less_with_every_iteration():
    pairs = [Pair(0, 3, version, 3, *[np.ones(1, np.int32)] * 3, *[np.zeros(1, np.float32)] * 2, "stop") for version in (3, 2, 1)]
    objective = PairObjective(0.1, replay_weight=0.5)
    assert objective.weights(pairs) == [1.0, 0.5, 0.25] and objective.normalizer(pairs) == 1.75
    assert PairObjective(0.1).normalizer(pairs) == 3


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("companions", [{}, {"length": "mean", "nll_weight": 0.7}, {"length": "desensitised", "base_share": 0.3}])
def test_gradcheck(kind, companions):
    generator = torch.Generator().manual_seed(0)
    policy, opponent, base = (-20 * torch.rand(5, 3, 2, dtype=torch.float64, generator=generator) for _ in range(3))
    tokens = torch.tensor([[1, 2, 3], [4, 5, 6], [3, 3, 0], [7, 1, 2], [2, 2, 2]])

    def loss(policy):
        return PairObjective(0.3, loss=kind, **companions)(PairLogps(policy, opponent, tokens, base))[0]

    assert torch.autograd.gradcheck(loss, (policy.requires_grad_(),))


@pytest.mark.parametrize("kind", LOSSES)
def test_gradient_raises_real_and_lowers_generated(kind):
    record = logps([[-10.0], [-12.0]], [[-10.0], [-12.0]])
    record.policy.requires_grad_()
    PairObjective(0.1, loss=kind)(record)[0].sum().backward()
    real, generated = record.policy.grad[0, :2, 0].tolist()
    assert real < 0 < generated and (kind == "space" or real == pytest.approx(-generated))


def test_nll_weight_adds_the_mean_per_token():
    record = logps([[(-6.0, -2.0)], [-9.0]], [[-8.0], [-9.0]])
    plain, with_nll = PairObjective(0.1)(record)[0], PairObjective(0.1, nll_weight=0.5)(record)
    assert (with_nll[0] - plain).item() == pytest.approx(0.5 * 8 / 4)
    assert with_nll[1]["pair_loss"].item() == pytest.approx(math.log(2))


def test_displaced_is_a_higher_reward_with_a_falling_likelihood_and_lower_likelihood_one_below_the_generated_answer_s():
    _, metrics = PairObjective(0.1)(logps([[-12.0, -8.0], [-20.0, -7.0]], [[-10.0, -10.0], [-10.0, -1.0]]))
    assert metrics["displaced_share"].tolist() == [1, 0] and metrics["lower_likelihood_share"].tolist() == [0, 1]


def test_margin_histogram_has_every_pair_in_one_bin():
    margins = [-100.0, -8.0, -0.5, 0.0, 0.999, 8.0]
    _, metrics = PairObjective(1.0)(logps([margins, [0.0] * 6], [[0.0] * 6, [0.0] * 6]))
    histogram = metrics["margin_histogram"]
    assert histogram.shape == (6, len(MARGIN_EDGES) + 1) and histogram.sum(1).tolist() == [1] * 6
    assert histogram.argmax(1).tolist() == [0, 1, 4, 5, 5, 9]


def test_pairs_do_not_influence_each_other():
    rng = np.random.default_rng(0)
    columns = -20 * rng.random((4, 6))
    order = rng.permutation(6)
    together, shuffled = (PairObjective(0.1)(logps(c[:2].tolist(), c[2:].tolist()))[0] for c in (columns, columns[:, order]))
    assert torch.equal(shuffled, together[order])


def test_likelihood_is_the_summed_nll():
    objective = LikelihoodObjective()
    loss, metrics = objective(logps([[(-6.0, -2.0)]], [[0.0]]))
    assert loss.item() == 8
    assert metrics["real_nll_nats_per_token"].item() == 2


@pytest.mark.parametrize("objective", [PairObjective(0.1), LikelihoodObjective()])
def test_objectives_are_frozen_and_answer_what_the_learner_asks(objective):
    with pytest.raises(AttributeError):
        objective.beta = 1
    assert {"weights", "normalizer", "terms", "sensitivity"} <= set(dir(objective))


def test_parity_with_trl_dpo_sigmoid(tiny_model, make_pairs, tmp_path):
    """The same token ids, policy and reference through TRL's DPOTrainer and through packing + objective: the same loss."""
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
        return packed.sums(model(packed))

    num_tokens = torch.tensor([[len(answer) for answer in pair.answers] for pair in pairs])
    loss, _ = PairObjective(0.3)(PairLogps(answer_sums(tmp_path / "policy"), answer_sums(folder), num_tokens))
    assert loss.mean().item() != pytest.approx(math.log(2), abs=1e-2)
    assert loss.mean().item() == pytest.approx(theirs.item(), abs=1e-5)
