"""DPO with the Trainer of transformers: a subclass overrides compute_loss, and no logits are materialized.

Needs `pip install . transformers accelerate`, and downloads nothing. A prompt counts up from a random token.
The chosen answer continues the count, and the rejected one is random. Prompts that start at 16 of the 64 tokens are
held out.
"""

from __future__ import annotations

import argparse
import copy
import tempfile

import torch
from transformers import EvalPrediction, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

import fastpref

VOCABULARY, PROMPT, ANSWER = 64, 4, 8


def preference_pairs(n: int, starts: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    """Return n pairs of input ids and labels, (2, T) each, the chosen answer first; labels of -100 are not scored."""
    ids = (starts[torch.randint(len(starts), (n, 1, 1))] + torch.arange(PROMPT + ANSWER).expand(2, -1)) % VOCABULARY
    ids[:, 1, PROMPT:] = torch.randint(VOCABULARY, (n, ANSWER))
    labels = ids.index_fill(-1, torch.arange(PROMPT), -100)
    return [{"input_ids": pair, "labels": scored} for pair, scored in zip(ids, labels, strict=True)]


def dpo(policy: torch.nn.Module, reference: torch.nn.Module, batch: dict[str, torch.Tensor]) -> fastpref.PreferenceLoss:
    """Return the loss and the implicit rewards of B pairs, whose tensors are (B, 2, T)."""
    flat = {name: x.transpose(0, 1).flatten(0, 1) for name, x in batch.items()}  # (2B, T): chosen, then rejected
    logps = policy(**flat, fastpref=True, reduction="sum").logprobs
    with torch.no_grad():
        ref = reference(**flat, fastpref=True, reduction="sum").logprobs
    return fastpref.dpo_loss(*logps.chunk(2), *ref.chunk(2), beta=0.1)


class DPOTrainer(Trainer):
    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.reference = copy.deepcopy(self.model).eval().requires_grad_(False)
        # Makes the Trainer divide the mean of each batch by the number of accumulated batches.
        self.model_accepts_loss_kwargs = False

    def compute_loss(self, model, inputs, return_outputs=False, **_):
        outputs = dpo(model, self.reference, inputs)
        return (outputs.loss, outputs) if return_outputs else outputs.loss


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Return the share of pairs whose chosen answer has the larger implicit reward; a tie counts half."""
    chosen, rejected = map(torch.as_tensor, prediction.predictions)
    return {"accuracy": ((chosen - rejected).sign() / 2 + 0.5).mean().item()}


def main() -> None:
    parser = argparse.ArgumentParser(description="DPO on a tiny Llama with transformers' Trainer.")
    for name, default in {"steps": 30, "batch": 4, "accumulation": 2, "seed": 0}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    set_seed(args.seed)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    policy = fastpref.attach(LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, use_cache=False, **shape)))
    held, trained = torch.randperm(VOCABULARY).split((16, VOCABULARY - 16))
    train, test = preference_pairs(args.steps * args.batch * args.accumulation, trained), preference_pairs(128, held)
    with tempfile.TemporaryDirectory() as folder:
        options = TrainingArguments(
            folder,
            per_device_train_batch_size=args.batch,
            gradient_accumulation_steps=args.accumulation,
            num_train_epochs=1,
            learning_rate=1e-3,
            seed=args.seed,
            save_strategy="no",
            report_to="none",
        )
        trainer = DPOTrainer(policy, options, train_dataset=train, eval_dataset=test, compute_metrics=accuracy)
        before = trainer.evaluate()["eval_accuracy"]
        trainer.train()
        after = trainer.evaluate()["eval_accuracy"]
    print(f"held-out preference accuracy: {before:.1%} before, {after:.1%} after {args.steps} steps")


if __name__ == "__main__":
    main()
