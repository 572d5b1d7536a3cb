"""Test what both trainers share: the check of the installed TRL, and training on two ranks."""

from __future__ import annotations

import importlib
import os
import pickle
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch
from packaging.version import Version

from fastpref.integrations import _replace
from fastpref.integrations import trl as ours
from tests.fastpref.integrations.trl.runs import (
    Run,
    assert_alike,
    fast,
    ranked,
    reward,
    train,
)

trl = pytest.importorskip("trl", minversion="0.29")
pytestmark = pytest.mark.filterwarnings("ignore")  # TRL and PEFT warn of things that are not tested here

VERSION = Version(trl.__version__)


@pytest.mark.parametrize("name", ["FastDPOTrainer", "FastRewardTrainer"])
def test_another_trl_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_trl(name: str) -> str:
        raise PackageNotFoundError

    with monkeypatch.context() as patch:
        patch.setattr(_replace, "version", no_trl)
        with pytest.raises(ImportError, match=rf"{name} needs trl>=0.29; found no trl.* pip install 'trl>=0.29,<1.17'"):
            getattr(ours, name)
        patch.setattr(_replace, "version", lambda name: "0.28.1")
        with pytest.raises(
            NotImplementedError,
            match=rf"{name} needs trl>=0\.29, .* found trl 0\.28\.1.* pip install 'trl>=0\.29,<1\.17'",
        ):
            getattr(ours, name)
    kind, method = {"FastDPOTrainer": ("dpo", "_compute_loss"), "FastRewardTrainer": ("reward", "compute_loss")}[name]
    own = importlib.import_module(f"trl.trainer.{kind}_trainer")
    trainer = getattr(trl, name.removeprefix("Fast"))
    with monkeypatch.context() as patch:
        patch.setattr(trainer, method, lambda self, model, batch: None)
        with pytest.raises(
            NotImplementedError,
            match=rf"found trl {VERSION}, whose .*\.{method} takes \(self, model, batch\), not \(self, ",
        ):
            getattr(ours, name)
    used = "use_adapter" if kind == "dpo" else "DataCollatorForPreference"
    monkeypatch.delattr(own, used)
    with pytest.raises(NotImplementedError, match=rf"which lacks {own.__name__}\.{used}"):
        getattr(ours, name)
    with pytest.raises(AttributeError, match="has no attribute 'FastPPOTrainer'"):
        _ = ours.FastPPOTrainer


@pytest.mark.parametrize("name", ["FastDPOTrainer", "FastRewardTrainer"])
def test_a_trainers_class_is_pickled_by_its_name(name: str) -> None:
    trainer = getattr(ours, name)
    assert getattr(ours, name) is trainer
    assert pickle.loads(pickle.dumps(trainer)) is trainer


ON_TWO_RANKS = """
import sys
import torch
import trl
from fastpref.integrations.trl import FastDPOTrainer, FastRewardTrainer
from tests.fastpref.integrations.trl import runs as tests

def save(kind, run):
    full = {k: x.full_tensor() if hasattr(x, "full_tensor") else x.clone() for k, x in run.parameters.items()}
    torch.save([run.metrics, full], f"{folder}/{kind}{torch.distributed.get_rank()}.pt")

wrapper, folder = sys.argv[1:]
fsdp = {"version": 2, "fsdp_version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
options = {"fsdp": "full_shard auto_wrap", "fsdp_config": fsdp} if wrapper == "FSDP2" else {}
trl.DPOTrainer._compute_loss = None  # it must not be called
save("DPO", tests.train("DPO", folder, trainer=FastDPOTrainer, per_device_train_batch_size=2, **options))
if wrapper == "DDP":
    sizes = {f"per_device_{name}_batch_size": 2 for name in ("train", "eval")}
    save("ranking", tests.reward(folder, FastRewardTrainer, tests.ranked(), **sizes))
"""


@pytest.mark.parametrize("wrapper", ["DDP", "FSDP2"])
def test_two_ranks_train_as_one_process(wrapper: str, tmp_path: Path) -> None:
    """The loss is computed in the wrapper's forward; the ranks have different numbers of tokens and answers."""
    (tmp_path / "run.py").write_text(ON_TWO_RANKS)
    root = Path(__file__).parents[4]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    paths = os.pathsep.join([str(root), str(root / "kernels"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    command = [*launch, str(tmp_path / "run.py"), wrapper, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    expected = {"DPO": lambda: train("DPO", tmp_path)}
    if wrapper == "DDP":
        expected["ranking"] = lambda: reward(tmp_path, fast(), ranked(), per_device_eval_batch_size=4)
    for kind, make in expected.items():
        wanted = make()
        (metrics, parameters), (_, others) = (torch.load(tmp_path / f"{kind}{rank}.pt") for rank in range(2))
        torch.testing.assert_close(parameters, others, rtol=0, atol=0)
        assert_alike(Run(wanted.losses, metrics, wanted.start, parameters), wanted)
