import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("typer")
pytest.importorskip("transformers")

import torch
import transformers
from typer.testing import CliRunner

from examples.demo import __main__, data, evaluate, train
from examples.demo import model as models
from examples.demo.__main__ import app
from examples.demo.data import Example
from examples.demo.jsonl import MalformedLineError, read_pairs
from examples.demo.settings import parse_stages
from examples.demo.tokens import IGNORED, Batch, collate, encode, train_tokenizer

ROOT = Path(__file__).parents[3]
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "kernels")))}
MODULE = '''
class Shelf:
    @property
    def weight(self, unit="kg"):
        """Return the weight of all books.

        In kilograms, unless told otherwise.
        """
        # Books are weighed once.
        total = sum(book.weight for book in self.books)
        return convert(total, unit)

    def undocumented(self):
        return 1

async def {name}(x):
    """Do what the name {name} says."""
    return x
'''


@pytest.fixture
def library(tmp_path):
    for path in ("shelf.py", "pack/one.py", "pack/two.py", "test/skipped.py", "pack/tests/skipped.py"):
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(MODULE.format(name=file.stem))
    (tmp_path / "broken.py").write_text("def f(:\n")
    (tmp_path / "latin.py").write_bytes(b"# \xe9\n")
    return tmp_path


@pytest.fixture(scope="module")
def functions():
    return data.stdlib_functions()


@pytest.fixture
def demo(functions, monkeypatch):
    """Return a function that runs the demo with `--quick` and more arguments; the library is read once for all."""
    monkeypatch.setattr(data, "stdlib_functions", lambda: functions)
    return lambda *arguments: CliRunner().invoke(app(), ["--quick", "--device", "cpu", *map(str, arguments)])


def test_functions_are_read_in_order_without_docstring_tests_or_repeats(library):
    functions = data.stdlib_functions(library)
    assert [(function.module, function.docstring) for function in functions] == [
        ("shelf", "Return the weight of all books."),
        ("shelf", "Do what the name shelf says."),
        ("pack", "Do what the name one says."),
        ("pack", "Do what the name two says."),
    ]
    weight, shelf = functions[:2]
    assert weight.prompt == (
        'def weight(self, unit="kg"):\n    # Books are weighed once.\n'
        '    total = sum(book.weight for book in self.books)\n"""'
    )
    assert weight.code == "return convert(total, unit)"
    assert (shelf.prompt, shelf.code) == ('async def shelf(x):\n"""', "return x")
    assert data.stdlib_functions(library) == functions


def test_the_standard_library_is_found_in_one_order(functions):
    assert len(functions) > 2000
    assert len({function.module for function in functions}) > 50
    assert not any('"""\n' in function.prompt[:-3] and function.docstring in function.prompt for function in functions)


def test_answers_are_ranked_by_construction(functions):
    some = functions[::50]
    examples = data.rank_answers(some, random.Random(0), draws=2)
    by_docstring = {function.docstring: function for function in some}
    assert len(examples) == 2 * len(some)
    for function, example in zip(some * 2, examples, strict=True):
        own, other, shuffled, code = example.answers
        assert (example.prompt, own, code) == (function.prompt, function.docstring, function.code)
        assert by_docstring[other].module != function.module
        assert sorted(shuffled.split()) == sorted(own.split())
        assert shuffled != own or len(set(own.split())) == 1
    assert data.rank_answers(some, random.Random(0), draws=2) == examples


def test_no_module_and_no_docstring_is_on_both_sides(functions, monkeypatch):
    monkeypatch.setattr(data, "stdlib_functions", lambda: functions)
    dataset = data.stdlib_dataset(held_out=0.12, seed=3)
    assert {example.group for example in dataset.train}.isdisjoint(example.group for example in dataset.held_out)
    seen = {example.answers[rank] for example in dataset.train for rank in (0, 1)}
    assert seen.isdisjoint(example.answers[rank] for example in dataset.held_out for rank in (0, 1))
    share = len(dataset.held_out) / (len(dataset.train) + len(dataset.held_out))
    assert share == pytest.approx(0.12, abs=0.07)
    assert dataset.pairs == [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
    assert dataset.pair_name((0, 3)) == "own > code"


def test_pairs_of_one_prompt_stay_together():
    examples = [Example(f"prompt {i % 5}", (f"good {i}", f"bad {i}"), f"prompt {i % 5}") for i in range(40)]
    dataset = data.pairs_dataset(examples, held_out=0.2, seed=0)
    assert {example.group for example in dataset.train}.isdisjoint(example.group for example in dataset.held_out)
    assert len(dataset.train) + len(dataset.held_out) == 40
    assert dataset.held_out
    with pytest.raises(ValueError, match="at least two different groups"):
        data.pairs_dataset(examples[:1], held_out=0.2, seed=0)


GOOD = '{"prompt": "p", "chosen": "c", "rejected": "r"}'


@pytest.mark.parametrize(
    ("line", "column", "problem"),
    [
        ('{"prompt": "p", "chosen": "c" "rejected": "r"}', 31, "not JSON"),
        ('{"prompt": "p", "chosen": "c", "rejected": "r"', 47, "not JSON"),
        ('{"prompt": "p", "chosen": "c"}', 1, "field 'rejected' is missing"),
        ('{"prompt": "p", "chosen": 3, "rejected": "r"}', 17, "field 'chosen' must be a string"),
        ('{"prompt": "p", "chosen": "c", "rejected": null}', 32, "got null"),
        ('{"prompt": " ", "chosen": "c", "rejected": "r"}', 2, "got a blank string"),
        ('{"prompt": "chosen", "chosen": "\\ud800", "rejected": "r"}', 22, "half a surrogate pair"),
        pytest.param("[" * 200_000, 1, "not JSON that can be read", id="nested too deep"),
        ('  ["p", "c", "r"]', 3, "not an object but a list"),
        (b'{"prompt": "\xc3\xa9\xff"}', 14, "0xff is not UTF-8"),
    ],
)
def test_a_malformed_line_is_named_and_nothing_is_trained(tmp_path, line, column, problem):
    path = tmp_path / "prefs.jsonl"
    line = line if isinstance(line, bytes) else line.encode()
    path.write_bytes(b"\n".join([GOOD.encode(), b"", line, GOOD.encode()]))
    with pytest.raises(MalformedLineError, match=problem) as raised:
        read_pairs(path)
    assert (raised.value.line, raised.value.column) == (3, column)
    out = tmp_path / "out"
    result = CliRunner().invoke(app(), ["--quick", "--data", str(path), "--out", str(out)])
    assert result.exit_code == 1
    assert f"{path}, line 3, column {column}: " in result.output
    assert not out.exists()


def test_pairs_are_read_whole(tmp_path):
    path = tmp_path / "prefs.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD.encode() + b"\r\n\n" + GOOD.replace('"p"', '"q"').encode())
    assert [example.answers for example in read_pairs(path)] == [("c", "r"), ("c", "r")]
    path.write_text("\n\n")
    with pytest.raises(ValueError, match="holds no pair"):
        read_pairs(path)


def test_labels_are_the_answer_and_the_prompt_gives_way_first():
    tokenizer = train_tokenizer(["a line of text"], 300)
    examples = [Example("x" * 40, ("a line", "b" * 40), "x"), Example("y", ("c", "d"), "y")]
    long, short = encode(examples, tokenizer, 16)
    assert [len(answer) for answer in long.answers][1] == 8
    assert len(long.prompt) + 8 == 16
    assert all(answer[-1] == tokenizer.eos_token_id for answer in long.answers)
    assert tokenizer.decode(short.answers[0][:-1]) == "c"
    batch = collate([(long.prompt, long.answers[1]), (short.prompt, short.answers[0])], 0, torch.device("cpu"))
    assert batch.input_ids.shape == (2, 16)
    assert batch.attention_mask[1].sum() == len(short.prompt) + 2
    assert batch.labels[0, :8].eq(IGNORED).all()
    assert batch.labels[0, 8:].tolist() == long.answers[1]
    assert (batch.labels[1] != IGNORED).sum() == 2
    whole = collate([(short.prompt, short.answers[0])], 0, torch.device("cpu"), score_prompt=True)
    assert torch.equal(whole.labels, whole.input_ids)


SMALL = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LLAMA = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
# The heads of these models add nothing, a bias, a cap, a factor or a divisor to the product.
HEADS = {
    "llama": LLAMA | {"tie_word_embeddings": True},
    "gpt2": {"n_embd": 32, "n_layer": 1, "n_head": 2},
    "phi": LLAMA,
    "gemma2": LLAMA | {"num_key_value_heads": 1, "head_dim": 16, "final_logit_softcapping": 0.5},
    "cohere": LLAMA | {"logit_scale": 0.25},
    "granite": LLAMA | {"logits_scaling": 3.0},
}


def small_model(kind):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(kind, **SMALL, **HEADS[kind])
    )
    with torch.no_grad():
        for parameter in model.get_output_embeddings().parameters():
            parameter.normal_()
    return model


def pair_batch():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 64, (4, 9), generator=generator)
    labels = ids.clone()
    labels[:, :4] = IGNORED
    return train.PairBatch(Batch(ids, torch.ones_like(ids), labels), torch.tensor([-20.0, -21.0, -19.0, -22.0]))


@pytest.mark.parametrize("kind", HEADS)
def test_dpo_from_hidden_states_trains_the_model_as_its_own_logits_would(kind):
    model, pairs = small_model(kind).eval(), pair_batch()
    models.check_head(model)
    logps = models.logits(model, pairs.batch)[:, :-1].log_softmax(-1)
    labels = pairs.batch.labels[:, 1:]
    token = logps.gather(-1, labels.clamp(min=0)[..., None])[..., 0] * (labels != IGNORED)
    chosen, rejected = (token.sum(1) - pairs.ref_logps).chunk(2)
    loss = -torch.nn.functional.logsigmoid(0.7 * (chosen - rejected)).mean()
    loss.backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert torch.allclose(models.answer_logps(model, pairs.batch), token.sum(1), atol=1e-4)
    for pair_loss in (train.linear_loss, train.logits_loss, train.eager_loss):
        model.zero_grad()
        step = train.dpo_step(model, pairs, pair_loss=pair_loss, beta=0.7)
        assert step.loss.item() == pytest.approx(loss.item(), abs=1e-5)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-3, atol=1e-5)


def test_a_head_that_is_more_than_a_product_is_refused_before_the_training():
    model = small_model("llama")
    model.lm_head.register_forward_hook(lambda module, inputs, output: 2 * output)
    with pytest.raises(ValueError, match="LlamaForCausalLM's are not"):
        models.check_head(model)


def test_a_step_of_dpo_from_hidden_states_needs_no_logits_in_memory():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**LLAMA | {"vocab_size": 16384, "tie_word_embeddings": True})
    model, pairs = transformers.LlamaForCausalLM(config), pair_batch()
    wide = Batch(*(tensor.repeat(1, 40) for tensor in pairs.batch))
    wide.labels[:, :-8] = IGNORED
    pairs = train.PairBatch(wide, pairs.ref_logps)
    logits = 4 * wide.input_ids.numel() * 16384
    measured = {
        name: train.step_memory(model, pairs, pair_loss=loss, beta=0.1)
        for name, loss in (("linear", train.linear_loss), ("logits", train.logits_loss), ("eager", train.eager_loss))
    }
    if measured["linear"] is None:
        pytest.skip("nothing here counts memory")
    assert measured["linear"].loss < 0.3 * logits < 0.9 * logits < measured["logits"].loss < 1.5 * logits
    assert measured["eager"].loss > 2.9 * logits
    assert all(memory.step >= 0.9 * memory.loss for memory in measured.values())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_tie_counts_one_half():
    scores = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 2.0], [3.0, 1.0]])
    assert evaluate.pair_accuracy(scores, (0, 1)) == 0.625
    assert evaluate.pair_margin(scores, (0, 1)) == 0.5


def test_stages_are_checked():
    assert parse_stages("dpo, ppo,sft") == ("sft", "ppo", "dpo")
    with pytest.raises(ValueError, match="got 'sft,grpo'"):
        parse_stages("sft,grpo")


def test_a_run_from_end_to_end_and_another_on_the_users_own(demo, tmp_path):
    out = tmp_path / "out"
    result = demo("--out", out)
    assert result.exit_code == 0, result.output
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["stopped"] is None
    assert {name: len(curve["loss"]) for name, curve in metrics["curves"].items()} == dict.fromkeys(
        ("sft", "reward", "ppo", "dpo", "logits", "eager"), 4
    )
    compared = metrics["comparison"]
    assert list(compared) == ["dpo", "logits", "eager"]
    for found in compared.values():
        assert found["steps"] == 4
        assert found["largest_loss_difference"] < 1e-5
        assert 0 < found["median_loss_seconds"] < found["median_step_seconds"]
    for part in ("step", "loss"):
        assert compared["dpo"][f"median_{part}_seconds_ratio"] == 1
    assert set(metrics["held_out"]["reward_after"]) == set(metrics["held_out"]["implicit"])
    assert len(metrics["held_out"]["implicit"]) == 6
    assert (out / "curves.png").stat().st_size > 10_000
    assert (out / "comparison.png").stat().st_size > 10_000
    assert list(metrics["samples"]) == ["before", "after", "change"]
    assert "Reward model: held-out pair accuracy" in result.output
    assert "DPO: the same steps in three ways" in result.output

    pairs = tmp_path / "prefs.jsonl"
    pairs.write_text(
        "\n".join(
            json.dumps({"prompt": f"Add {i}.", "chosen": f"{i} + 1", "rejected": "I would not"}) for i in range(40)
        )
    )
    mine = tmp_path / "mine"
    result = demo("--out", mine, "--data", pairs, "--model", out / "dpo", "--stages", "reward,dpo", "--no-eager")
    assert result.exit_code == 0, result.output
    metrics = json.loads((mine / "metrics.json").read_text())
    assert list(metrics["curves"]) == ["reward", "dpo"]
    assert metrics["comparison"] == {}
    assert list(metrics["held_out"]["reward_after"]) == ["chosen > rejected"]
    assert metrics["data"]["vocabulary"] == 512
    assert {path.name for path in mine.iterdir()} == {"reward", "dpo", "metrics.json", "curves.png"}


def test_a_folder_that_cannot_be_written_is_known_before_the_training(demo, tmp_path):
    (tmp_path / "file").touch()
    result = demo("--out", tmp_path / "file")
    assert result.exit_code == 1
    assert "File exists" in result.output
    assert "supervised training" not in result.output


def test_the_same_seed_trains_the_same(demo, tmp_path):
    losses = []
    for name in ("one", "two"):
        assert demo("--out", tmp_path / name, "--stages", "sft,reward").exit_code == 0
        losses.append(json.loads((tmp_path / name / "metrics.json").read_text())["curves"]["reward"]["loss"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_ctrl_c_keeps_what_was_trained(demo, tmp_path, monkeypatch):
    step, made = train.reward_step, []

    def interrupted_step(*arguments, **options):
        made.append(1)
        if len(made) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return step(*arguments, **options)

    monkeypatch.setattr(train, "reward_step", interrupted_step)
    before = signal.getsignal(signal.SIGINT)
    result = demo("--out", tmp_path)
    assert result.exit_code == 130, result.output
    assert signal.getsignal(signal.SIGINT) is before
    assert "Stopped at: reward model, 2 of 4." in result.output
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert {name: len(curve["loss"]) for name, curve in metrics["curves"].items()} == {"sft": 4, "reward": 2}
    for stage in ("sft", "reward"):
        assert (tmp_path / stage / "model.safetensors").exists()
    assert (tmp_path / "curves.png").exists()
    assert not (tmp_path / "dpo").exists()


def test_a_missing_package_is_one_line(monkeypatch):
    line = "demo: {} is not installed: pip install '.[demo]'"
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "typer", None)
        with pytest.raises(SystemExit) as raised:
            __main__.main()
    assert raised.value.code == line.format("typer")

    def missing(name):
        def run(**options):
            raise ModuleNotFoundError(name=name)

        return lambda: run

    monkeypatch.setattr(__main__, "app", missing("transformers.models"))
    with pytest.raises(SystemExit) as raised:
        __main__.main()
    assert raised.value.code == line.format("transformers")
    monkeypatch.setattr(__main__, "app", missing("fastpref_kernels"))
    with pytest.raises(ModuleNotFoundError):
        __main__.main()


def test_runs_as_a_module_of_the_checkout(tmp_path):
    """Start the demo as `make demo` does, with a malformed file that ends it before the training."""
    pairs = tmp_path / "prefs.jsonl"
    pairs.write_text("[]")
    command = [sys.executable, "-W", "ignore", "-m", "examples.demo", "--data", str(pairs), "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stderr.startswith(f"demo: {pairs}, line 1, column 1: not an object but a list")
