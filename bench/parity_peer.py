"""The peer's side of `bench/parity.py`: computes losses and gradients with TRL's own trainers.

Run by the peer's Python, which has TRL but not posttrain: `python parity_peer.py FOLDER`. Reads FOLDER/rows.json,
FOLDER/batch.json and the models in FOLDER, and writes one loss per row to FOLDER/peer.json and each row's gradient to
FOLDER/gradients. Every loss comes from a trainer's own `compute_loss`. Only sampling is replaced by the completions in
the batch, and the older policy's log-probabilities by those in the batch.
"""

# TRL is not installed where types are checked.
# pyright: reportMissingImports=false

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
from datasets import Dataset, disable_progress_bars
from safetensors.torch import load_file, save_file

warnings.filterwarnings("ignore")
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
disable_progress_bars()

IGNORED = -100
Row = dict[str, Any]
Losses = list[torch.Tensor]


class World:
    """Models, tokenizer and batch of one comparison."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "policy")
        self.batch = json.loads((folder / "batch.json").read_text(encoding="utf-8"))

    def model(self, name: str = "policy") -> Any:
        return transformers.AutoModelForCausalLM.from_pretrained(self.folder / name, dtype=torch.float32)

    def scorer(self) -> Any:
        """The policy's body with the given scalar head, as the model class that RewardTrainer trains."""
        model = transformers.AutoModelForSequenceClassification.from_pretrained(
            self.folder / "policy", num_labels=1, dtype=torch.float32
        )
        with torch.no_grad():
            model.score.weight.copy_(load_file(self.folder / "score.safetensors")["weight"])
        return model

    def arguments(self, kind: Any, row: Row, rows: int) -> Any:
        """A trainer's config: fp32 on the CPU, then the row's own settings."""
        return kind(
            output_dir=str(self.folder / "trainer"),
            per_device_train_batch_size=rows,
            bf16=False,
            gradient_checkpointing=False,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            **row["config"],
        )


def sft(world: World, row: Row) -> tuple[Any, Losses]:
    pairs = world.batch["pairs"]
    dataset = Dataset.from_list([{"prompt": "a", "completion": "b"}])
    arguments = world.arguments(trl.SFTConfig, row, len(pairs))
    trainer = trl.SFTTrainer(world.model(), args=arguments, train_dataset=dataset, processing_class=world.tokenizer)
    examples = [
        {
            "input_ids": pair["prompt_ids"] + pair["chosen_ids"],
            "labels": [IGNORED] * len(pair["prompt_ids"]) + pair["chosen_ids"],
        }
        for pair in pairs
    ]
    return trainer.model, [trainer.compute_loss(trainer.model, trainer.data_collator(examples))]


def reward(world: World, row: Row) -> tuple[Any, Losses]:
    pairs = world.batch["pairs"]
    dataset = Dataset.from_list([{"chosen": "a", "rejected": "b"}])
    arguments = world.arguments(trl.RewardConfig, row, len(pairs))
    trainer = trl.RewardTrainer(world.scorer(), args=arguments, train_dataset=dataset, processing_class=world.tokenizer)
    examples = [
        {"chosen_ids": p["prompt_ids"] + p["chosen_ids"], "rejected_ids": p["prompt_ids"] + p["rejected_ids"]}
        | ({"margin": p["margin"]} if row["margin"] else {})
        for p in pairs
    ]
    return trainer.model, [trainer.compute_loss(trainer.model, trainer.data_collator(examples))]


PREFERENCE = [{"prompt": "a", "chosen": "b", "rejected": "c"}]


def dpo(world: World, row: Row) -> tuple[Any, Losses]:
    pairs = world.batch[row["data"]]
    trainer = trl.DPOTrainer(
        world.model(),
        ref_model=world.model("reference"),
        args=world.arguments(trl.DPOConfig, row, len(pairs)),
        train_dataset=Dataset.from_list(PREFERENCE),
        processing_class=world.tokenizer,
    )
    parts = [pairs] if not row["one_by_one"] else [[pair] for pair in pairs]
    losses = [trainer.compute_loss(trainer.model, trainer.data_collator(part)) / len(parts) for part in parts]
    return trainer.model, losses


def concatenated(world: World, trainer: Any) -> tuple[Any, Losses]:
    """Computes the loss of a CPO or ORPO trainer, which takes a padded batch of each side."""
    pairs = world.batch["pairs"]
    inputs: dict[str, torch.Tensor] = {}
    for side in ("chosen", "rejected"):
        rows = [(pair["prompt_ids"], pair[f"{side}_ids"]) for pair in pairs]
        width = max(len(prompt) + len(answer) for prompt, answer in rows)

        def padded(values: list[list[int]], fill: int, width: int = width) -> torch.Tensor:
            return torch.tensor([value + [fill] * (width - len(value)) for value in values])

        inputs[f"{side}_input_ids"] = padded([p + a for p, a in rows], world.tokenizer.pad_token_id)
        inputs[f"{side}_attention_mask"] = padded([[1] * len(p + a) for p, a in rows], 0)
        inputs[f"{side}_labels"] = padded([[IGNORED] * len(p) + a for p, a in rows], IGNORED)
    return trainer.model, [trainer.compute_loss(trainer.model, inputs)]


def cpo(world: World, row: Row) -> tuple[Any, Losses]:
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    arguments = world.arguments(CPOConfig, row, len(world.batch["pairs"]))
    data = Dataset.from_list(PREFERENCE)
    return concatenated(
        world, CPOTrainer(world.model(), args=arguments, train_dataset=data, processing_class=world.tokenizer)
    )


def orpo(world: World, row: Row) -> tuple[Any, Losses]:
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    arguments = world.arguments(ORPOConfig, row, len(world.batch["pairs"]))
    data = Dataset.from_list(PREFERENCE)
    return concatenated(
        world, ORPOTrainer(world.model(), args=arguments, train_dataset=data, processing_class=world.tokenizer)
    )


def kto(world: World, row: Row) -> tuple[Any, Losses]:
    policy, reference = ("reference", "policy") if row["swap"] else ("policy", "reference")
    examples = world.batch["judgements"]
    trainer = trl.KTOTrainer(
        world.model(policy),
        ref_model=world.model(reference),
        args=world.arguments(trl.KTOConfig, row, len(examples)),
        train_dataset=Dataset.from_list([{"prompt": "a", "completion": "b", "label": i % 2 == 0} for i in range(4)]),
        processing_class=world.tokenizer,
    )
    return trainer.model, [trainer.compute_loss(trainer.model, trainer.data_collator(examples))]


def given_reward(completions: list[str], reward: list[float | None], **_: Any) -> list[float | None]:
    """Reward function for GRPO and RLOO: returns the rewards in the batch."""
    return reward


def completion_tensor(rows: list[list[float]]) -> torch.Tensor:
    width = max(len(row) for row in rows)
    return torch.tensor([row + [0.0] * (width - len(row)) for row in rows])


def online(world: World, row: Row, trainer: Any, *, tool_mask_and_sampler: bool) -> tuple[Any, Losses]:
    """Scores the given completions as if the trainer had sampled them; computes the loss of each micro-batch."""
    attempts = world.batch[row["data"]]
    prompts = [attempt["prompt_ids"] for attempt in attempts]
    answers = [attempt["completion_ids"] for attempt in attempts]
    texts = world.tokenizer.batch_decode(answers, skip_special_tokens=True)
    if tool_mask_and_sampler:
        tools = [attempt["tool_mask"] for attempt in attempts] if row["tools"] else None
        sampler = [attempt["sampler_logp"] for attempt in attempts] if row["sampler"] else None
        trainer._generate = lambda _: (prompts, answers, tools, texts, sampler, {}, None, None)
        trainer.use_vllm = row["sampler"]  # TRL only corrects samples from vLLM
    else:
        trainer._generate = lambda _: (prompts, answers, texts)
    trainer.current_gradient_accumulation_steps = row["micro_batches"]
    trainer.model.train()
    inputs = trainer._generate_and_score_completions([{"prompt": "a", "reward": a["reward"]} for a in attempts])
    if row["off_policy"]:
        old = completion_tensor([attempt["old_logp"] for attempt in attempts])
        inputs["old_per_token_logps"], inputs["old_logps"] = old, old.sum(1)
    size = len(attempts) // row["micro_batches"] // row["updates"]
    losses = []
    for start in range(0, len(attempts) // row["updates"], size):  # the first update only
        part = {k: v[start : start + size] if v.dim() else v for k, v in inputs.items() if torch.is_tensor(v)}
        losses.append(trainer.compute_loss(trainer.model, part))
    return trainer.model, losses


def grpo(world: World, row: Row) -> tuple[Any, Losses]:
    steps = row["micro_batches"] * row["updates"]
    rows = len(world.batch[row["data"]]) // steps
    row["config"] |= {"gradient_accumulation_steps": row["micro_batches"], "steps_per_generation": steps}
    trainer = trl.GRPOTrainer(
        str(world.folder / "policy"),
        reward_funcs=given_reward,
        args=world.arguments(trl.GRPOConfig, row, rows),
        train_dataset=Dataset.from_list([{"prompt": "a"}]),
        processing_class=world.tokenizer,
    )
    swap_reference(world, trainer)
    return online(world, row, trainer, tool_mask_and_sampler=True)


def rloo(world: World, row: Row) -> tuple[Any, Losses]:
    trainer = trl.RLOOTrainer(
        str(world.folder / "policy"),
        reward_funcs=given_reward,
        args=world.arguments(trl.RLOOConfig, row, len(world.batch[row["data"]])),
        train_dataset=Dataset.from_list([{"prompt": "a"}]),
        processing_class=world.tokenizer,
    )
    swap_reference(world, trainer)
    return online(world, row, trainer, tool_mask_and_sampler=False)


def swap_reference(world: World, trainer: Any) -> None:
    """Replaces the trainer's reference, which is its initial model, so that the KL is not 0."""
    if trainer.ref_model is not None:
        trainer.ref_model.load_state_dict(world.model("reference").state_dict())


TRAINERS: dict[str, Callable[[World, Row], tuple[Any, Losses]]] = {
    "sft": sft,
    "reward": reward,
    "dpo": dpo,
    "cpo": cpo,
    "orpo": orpo,
    "kto": kto,
    "grpo": grpo,
    "rloo": rloo,
}


def main(folder: Path) -> None:
    world = World(folder)
    (folder / "gradients").mkdir(exist_ok=True)
    rows = json.loads((folder / "rows.json").read_text(encoding="utf-8"))
    losses: dict[str, float] = {}
    for number, row in enumerate(rows):
        model, parts = TRAINERS[row["trainer"]](world, row)
        torch.stack(parts).sum().backward()
        losses[row["name"]] = sum(part.item() for part in parts)
        gradient = {name: p.grad.contiguous() for name, p in model.named_parameters() if p.grad is not None}
        save_file(gradient, folder / "gradients" / f"{number}.safetensors")
        print(f"{row['name']}: {losses[row['name']]:.6f}", flush=True)
    versions = {module.__name__: module.__version__ for module in (trl, torch, transformers)}
    (folder / "peer.json").write_text(json.dumps({"losses": losses, "versions": versions}), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
