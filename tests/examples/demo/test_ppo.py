import copy
import json
import os
import shutil
import signal
from itertools import repeat

import pytest

pytest.importorskip("typer")
pytest.importorskip("transformers")

import torch
import transformers
from typer.testing import CliRunner

from examples.demo import model as models
from examples.demo import ppo
from examples.demo.__main__ import app
from examples.demo.sample import Samples, check_sampling, sample
from examples.demo.settings import Settings
from examples.demo.stop import Stop
from examples.demo.tokens import IGNORED, collate, shorten

CPU = torch.device("cpu")
PAD, EOS = 0, 2
LLAMA = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
MODELS = {
    "llama": LLAMA | {"tie_word_embeddings": True},
    "gpt2": {"n_embd": 32, "n_layer": 1, "n_head": 2},
    "gemma2": LLAMA | {"num_key_value_heads": 1, "head_dim": 16, "final_logit_softcapping": 0.5},
    "cohere": LLAMA | {"logit_scale": 0.25},
}
PROMPTS = [[1, 5, 6, 7], [1, 8], [1, 9, 9], [1, 5, 7, 9, 11, 13]]


def small_model(kind, vocabulary=16):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        kind, vocab_size=vocabulary, pad_token_id=PAD, bos_token_id=1, eos_token_id=EOS, **MODELS[kind]
    )
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.get_output_embeddings().parameters():
            parameter.normal_(std=0.1)
    return model


def sampler(seed, length=6):
    generator = torch.Generator().manual_seed(seed)
    return lambda model, prompts: sample(model, prompts, length=length, pad=PAD, eos=EOS, generator=generator)


@pytest.mark.parametrize("kind", MODELS)
def test_samples_have_the_log_probs_that_the_model_gives_them(kind):
    model = small_model(kind)
    prompts = PROMPTS * 8
    samples = sampler(0)(model, prompts)
    assert not samples.ended.all()
    assert samples.ended.any()
    for row, (prompt, answer) in enumerate(zip(prompts, samples.answers, strict=True)):
        assert answer[-1] == EOS
        assert EOS not in answer[:-1]
        # An end that was appended was not sampled.
        sampled = answer if samples.ended[row] else answer[:-1]
        assert len(sampled) <= 6
        assert samples.batch.input_ids[row, : len(prompt) + len(answer)].tolist() == prompt + answer
        first = len(prompt) - 1
        assert samples.mask[row].nonzero()[:, 0].tolist() == list(range(first, first + len(sampled)))
        ids = torch.tensor([prompt + sampled])
        expected = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[first:, 0]
        torch.testing.assert_close(samples.logps[row][samples.mask[row]], expected, rtol=1e-4, atol=1e-5)
    assert samples.logps[~samples.mask].eq(0).all()
    torch.testing.assert_close(models.token_logps(model, samples.batch), samples.logps, rtol=1e-4, atol=1e-5)


def test_sampling_is_from_the_models_own_distribution():
    model = small_model("llama")
    first = torch.tensor([answer[0] for answer in sampler(0, length=1)(model, [[1, 5]] * 4000).answers])
    probabilities = model(input_ids=torch.tensor([[1, 5]])).logits[0, -1].softmax(-1)
    found = torch.bincount(first, minlength=16) / 4000
    assert ((found - probabilities).abs() < 5 * (probabilities / 4000).sqrt() + 1e-3).all()


def test_a_model_that_cannot_be_sampled_from_is_refused_before_the_training():
    check_sampling(small_model("gpt2"))
    config = transformers.BloomConfig(vocab_size=16, hidden_size=32, n_layer=1, n_head=2)
    with pytest.raises(ValueError, match="position_ids, which BloomForCausalLM"):
        check_sampling(transformers.BloomForCausalLM(config))


def test_a_long_prompt_loses_its_beginning_but_not_the_beginning_of_text():
    assert shorten([1, 2, 3], 3, 1) == [1, 2, 3]
    assert shorten([1, 2, 3, 4], 3, 1) == [1, 3, 4]
    assert shorten([1, 2, 3, 4], 1, 1) == [1]
    assert shorten([1, 2, 3, 4], 3, None) == [2, 3, 4]


def hand_made():
    """Return two answers: one of 3 sampled tokens, and one of 1 with an end that was appended."""
    batch = collate([([1, 5], [7, 8, EOS]), ([1, 6, 6], [9, EOS])], PAD, CPU)
    batch.labels[1, 4] = IGNORED
    mask = batch.labels[:, 1:] != IGNORED
    return Samples(batch, mask, torch.tensor([[0.0, -1.0, -2.0, -3.0], [0.0, 0.0, -4.0, 0.0]]), [], torch.ones(2))


def test_a_rollout_scores_the_last_sampled_token_and_nothing_else(monkeypatch):
    samples = hand_made()
    assert samples.mask.tolist() == [[False, True, True, True], [False, False, True, False]]
    values = torch.tensor([[50.0, 1.0, 2.0, 3.0, 50.0], [50.0, 50.0, 4.0, 50.0, 50.0]])
    monkeypatch.setattr(models, "values", lambda model, batch: values)
    ref = torch.where(samples.mask, samples.logps - 1, 9.0)
    part = ppo.rollout(samples, torch.tensor([10.0, 20.0]), ref, torch.nn.Module(), kl_coef=0.5)
    # A log-prob of one nat above the reference costs a half at every token: rewards −½, −½, 9½ and 19½.
    errors = [6.5, -0.5 + 3 - 2, -0.5 + 2 - 1]
    last = errors[0]
    middle = errors[1] + 0.95 * last
    first = errors[2] + 0.95 * middle
    advantages = torch.tensor([first, middle, last, 15.5])
    expected = (advantages - advantages.mean()) / advantages.std(correction=0)
    torch.testing.assert_close(part.advantages[samples.mask], expected)
    torch.testing.assert_close(part.returns[samples.mask], advantages + torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert part.advantages[~samples.mask].eq(0).all()
    assert ppo.sequence_kl(samples.logps, ref, samples.mask).tolist() == pytest.approx([3 / torch.e, 1 / torch.e])


def test_minibatches_are_the_whole_rollout_without_padding():
    policy = small_model("llama")
    samples = sampler(0)(policy, PROMPTS * 2)
    step = ppo.rollout(samples, torch.arange(8.0), samples.logps, models.reward_model(policy).eval(), kl_coef=0.1)
    parts = list(step.minibatches(torch.Generator().manual_seed(0)))
    assert len(parts) == ppo.MINIBATCHES
    for name in ("logps", "values", "advantages", "returns"):
        whole = getattr(step, name)[step.mask]
        assert torch.equal(torch.cat([getattr(part, name)[part.mask] for part in parts]).sort()[0], whole.sort()[0])
    assert all(part.batch.attention_mask[:, -1].any() for part in parts)
    assert all(part.batch.input_ids.shape[1] == part.mask.shape[1] + 1 for part in parts)


def test_policy_and_value_losses_reach_only_their_own_model():
    policy = small_model("llama")
    value_model = models.reward_model(policy).eval()
    samples = sampler(0)(policy, PROMPTS)
    part = ppo.rollout(samples, torch.arange(4.0), samples.logps, value_model, kl_coef=0.1)
    losses = ppo.ppo_losses(policy, value_model, part, samples.batch)
    # On the samples' own policy the ratio is 1, and whitened advantages have the mean 0.
    assert losses["loss"].item() == pytest.approx(0, abs=1e-4)
    assert losses["clip_fraction"] == 0
    expected = 0.5 * (part.values - part.returns)[part.mask].pow(2).mean()
    assert losses["value_loss"].item() == pytest.approx(expected.item(), rel=1e-4)
    assert losses["ptx"].item() == pytest.approx(-samples.logps[samples.mask].mean().item(), rel=1e-4)

    logps = models.token_logps(policy, part.batch)
    loss = -(part.advantages * (logps - part.logps).exp())[part.mask].mean() - ppo.PTX_GAMMA * logps[part.mask].mean()
    for parameter, gradient in zip(
        policy.parameters(), torch.autograd.grad(loss, list(policy.parameters())), strict=True
    ):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-5)
    assert all(parameter.grad is not None for parameter in value_model.parameters())


def first_token(model):
    with torch.no_grad():
        return model(input_ids=torch.tensor([PROMPTS[1]])).logits[0, -1].softmax(-1)


def test_ppo_raises_the_probability_of_what_is_rewarded(monkeypatch):
    reference = small_model("llama")
    policy, before = copy.deepcopy(reference), first_token(reference)
    rewarded, other = before[3:].topk(3).indices[1:].add(3).tolist()
    reward_model = models.reward_model(policy)
    torch.nn.init.zeros_(models.score_head(reward_model).weight)
    monkeypatch.setattr(models, "rewards", lambda model, batch: 3.0 * (batch.input_ids[:, 2] == rewarded))
    curves = ppo.PPOCurves()
    ppo.train(
        policy,
        reference,
        reward_model,
        [[PROMPTS[1]] * 64] * 8,
        repeat(collate([(PROMPTS[1], [other, EOS])], PAD, CPU)),
        draw=sampler(0, length=2),
        settings=Settings(ppo_rate=3e-3, kl_target=2.0, seed=0),
        curves=curves,
        stop=Stop(),
        show=lambda curves: None,
    )
    after = first_token(policy)
    assert before[rewarded] < 0.1
    assert after[rewarded] > 0.5
    assert curves.score[-1] > 2 * curves.score[0]
    assert curves.kl[0] == pytest.approx(0, abs=1e-6)
    assert curves.kl[-1] > 0.3
    # The first samples come from the reference, with a KL below the target, so the coefficient falls.
    assert curves.kl_coef[1] < curves.kl_coef[0] == ppo.KL_COEF


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """Return a function that runs the demo with `--quick` on pairs of the user's."""
    pairs = tmp_path_factory.mktemp("data") / "prefs.jsonl"
    lines = ({"prompt": f"Add {i}.", "chosen": f"{i} + 1", "rejected": "I would not"} for i in range(40))
    pairs.write_text("\n".join(map(json.dumps, lines)))
    arguments = ("--quick", "--device", "cpu", "--data", str(pairs), "--no-eager")
    return lambda *more: CliRunner().invoke(app(), [*arguments, *map(str, more)])


@pytest.fixture(scope="module")
def trained(demo, tmp_path_factory):
    """Return the folder, the metrics and the output of a run of SFT, the reward model and PPO."""
    out = tmp_path_factory.mktemp("trained")
    result = demo("--out", out, "--stages", "ppo,sft,reward")
    assert result.exit_code == 0, result.output
    return out, json.loads((out / "metrics.json").read_text()), result.output


def test_ppo_reports_scores_kl_and_what_is_sampled(trained):
    out, metrics, output = trained
    assert list(metrics["curves"]) == ["sft", "reward", "ppo"]
    curves = metrics["curves"]["ppo"]
    for name in ("loss", "value_loss", "score", "kl", "kl_coef", "length", "clip_fraction", "ptx", "seconds"):
        assert len(curves[name]) == 4
    before, after, change = (metrics["samples"][name] for name in ("before", "after", "change"))
    assert change["score"] == pytest.approx(after["score"] - before["score"], abs=1e-5)
    assert change["score_standard_error"] > 0
    assert before["kl_k3"] == pytest.approx(0, abs=1e-4) != after["kl_k3"]
    assert after["kl_k3"] > 0
    assert "reward-model score" in output
    assert f"{change['score']:.2f} ± {change['score_standard_error']:.2f}" in output
    assert "before PPO" in output
    assert (out / "ppo" / "model.safetensors").exists()
    assert (out / "ppo.png").stat().st_size > 10_000


def test_a_stage_builds_on_what_an_earlier_run_left(demo, trained, tmp_path):
    earlier, metrics, _ = trained
    shutil.copytree(earlier, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "ppo")
    result = demo("--out", tmp_path, "--stages", "ppo")
    assert result.exit_code == 0, result.output
    again = json.loads((tmp_path / "metrics.json").read_text())
    assert list(again["curves"]) == ["ppo"]
    # It does the same as in a run of all stages.
    for name in ("score", "kl", "loss", "value_loss"):
        assert again["curves"]["ppo"][name] == pytest.approx(metrics["curves"]["ppo"][name], abs=1e-5)
    assert again["samples"]["after"] == pytest.approx(metrics["samples"]["after"], abs=1e-5)
    result = demo("--out", tmp_path, "--stages", "ppo", "--seed", "1")
    assert result.exit_code == 1
    assert "of a run with seed 0, not 1" in " ".join(result.output.split())


def test_a_stage_says_what_it_lacks(demo, trained, tmp_path):
    earlier, _, _ = trained
    for stages, needed, stage in (("ppo", "sft", "ppo"), ("sft,ppo", "reward", "ppo"), ("reward", "sft", "reward")):
        result = demo("--out", tmp_path, "--stages", stages)
        assert result.exit_code == 1
        assert f"the stage {stage} builds on {needed}, which is neither picked nor in" in result.output
    result = demo("--out", tmp_path, "--sample-length", 25)
    assert result.exit_code == 1
    assert "at most half of max_length, 48" in result.output
    shutil.copytree(earlier / "reward", tmp_path / "reward")
    result = demo("--out", tmp_path, "--stages", "sft,ppo", "--vocabulary", 300)
    assert result.exit_code == 1
    assert "another tokenizer" in result.output
    assert {path.name for path in tmp_path.iterdir()} == {"reward"}


def test_ctrl_c_keeps_the_steps_that_ppo_made(demo, trained, tmp_path, monkeypatch):
    earlier, _, _ = trained
    shutil.copytree(earlier, tmp_path, dirs_exist_ok=True)
    rollout, made = ppo.rollout, []

    def interrupted(*arguments, **options):
        made.append(1)
        if len(made) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return rollout(*arguments, **options)

    monkeypatch.setattr(ppo, "rollout", interrupted)
    result = demo("--out", tmp_path, "--stages", "ppo")
    assert result.exit_code == 130, result.output
    assert "Stopped at: PPO, 2 of 4." in result.output
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert len(metrics["curves"]["ppo"]["score"]) == 2
    assert list(metrics["samples"]) == ["before"]
