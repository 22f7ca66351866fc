"""The peer's side of a comparison: TRL's trainers and transformers' generation, one step per turn.

    python -m bench.side_peer JOB.json

Run by the peer's Python, which has TRL. A turn is a whole step of `trainer.train()`: callbacks before and after each
optimizer step wait for the harness and report to it. Nothing is logged, saved or evaluated.
"""

# TRL is not installed where types are checked.
# pyright: reportMissingImports=false

from __future__ import annotations

import json
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import LogitsProcessorList, TrainerCallback

from bench.turns import Turns, reward

warnings.filterwarnings("ignore")
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

IGNORED = -100
Job = dict[str, Any]


class EndAt:
    """Logits processor that forces row i to end after exactly lengths[i] new tokens."""

    def __init__(self, lengths: Sequence[int], prompt: int, stop: int) -> None:
        self.prompt, self.stop = prompt, stop
        self.ends: dict[int, torch.Tensor] = {}
        for length in set(lengths):
            self.ends[length] = torch.tensor([i for i, n in enumerate(lengths) if n == length])

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores[:, self.stop] = -torch.inf
        ending = self.ends.get(input_ids.shape[1] - self.prompt + 1)
        if ending is not None:
            scores[ending] = -torch.inf
            scores[ending, self.stop] = 0.0
        return scores


def force_generate(model: Any, lengths: Sequence[int], stop: int) -> None:
    """Patches `model.generate` so that its rows have these lengths."""
    generate = model.generate

    def call(**inputs: Any) -> Any:
        ends = EndAt(lengths, inputs["input_ids"].shape[1], stop)
        return generate(**inputs, logits_processor=LogitsProcessorList([ends]))  # type: ignore[list-item]

    model.generate = call


def force_generate_batch(model: Any, lengths: Sequence[int]) -> None:
    """Patches `model.generate_batch` so that its rows have these lengths, with each request's `max_new_tokens`."""

    def call(inputs: list[list[int]], generation_config: Any, continuous_batching_config: Any = None, **_: Any) -> Any:
        done: dict[str, Any] = {}
        with model.continuous_batching_context_manager(
            generation_config=generation_config, continuous_batching_config=continuous_batching_config, timeout=5
        ) as manager:
            names = [
                manager.add_request(ids, max_new_tokens=length, eos_token_id=-1)
                for ids, length in zip(inputs, lengths, strict=True)
            ]
            while len(done) < len(names):
                result = manager.get_result(timeout=1)
                if result and result.is_finished():
                    done[result.request_id] = result
                elif not result and not manager.is_running():
                    raise SystemExit("the peer's continuous batching stopped before all requests were finished.")
        return {name: done[name] for name in names}

    model.generate_batch = call


def load(job: Job, turns: Turns) -> tuple[Any, Any]:
    dtype = getattr(torch, job["settings"]["dtype"])
    model = transformers.AutoModelForCausalLM.from_pretrained(job["folder"], dtype=dtype)
    tokenizer = transformers.AutoTokenizer.from_pretrained(job["folder"])
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    turns.loaded()
    return model, tokenizer


def data_set(rows: list[dict[str, Any]]) -> Any:
    """The rows as a Dataset, with progress bars disabled."""
    from datasets import Dataset, disable_progress_bars

    disable_progress_bars()
    return Dataset.from_list(rows)


class OneStepATurn(TrainerCallback):
    """Trainer callback that waits for a turn before each optimizer step and reports after it."""

    def __init__(self, turns: Turns, facts: dict[str, Any]) -> None:
        self.turns, self.facts = turns, facts

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.facts["loss"] = 0.0
        self.turns.wait()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.turns.done(**self.facts)


def arguments(kind: Any, job: Job, rows: int, folder: str, **more: Any) -> Any:
    """A trainer's config: one optimizer step over `rows` rows, in micro-batches of the side's `rows_per_pass`.

    Settings that change the result match our recipes: AdamW betas, no weight decay, constant learning rate, clipping
    at norm 1. Logging and saving are disabled.
    """
    a_pass = min(job["settings"].get("rows_per_pass", rows), rows)
    if rows % a_pass:
        raise SystemExit(f"{rows} rows cannot be divided into micro-batches of {a_pass}.")
    return kind(
        output_dir=folder,
        per_device_train_batch_size=a_pass,
        gradient_accumulation_steps=rows // a_pass,
        learning_rate=job["lr"],
        lr_scheduler_type="constant",
        adam_beta2=0.95,
        max_grad_norm=1.0,
        max_steps=1_000_000,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        logging_strategy="no",
        save_strategy="no",
        dataloader_pin_memory=False,
        **more,
    )


def train(trainer: Any, turns: Turns, facts: dict[str, Any]) -> None:
    """Trains without end, one step per turn. The loss of a step is the sum over its micro-batches."""
    step = trainer.training_step

    def counted(*args: Any, **kwargs: Any) -> Any:
        loss = step(*args, **kwargs)
        facts["loss"] += float(loss)
        return loss

    trainer.training_step = counted
    trainer.add_callback(OneStepATurn(turns, facts))
    trainer.train()


def run_grpo(job: Job, turns: Turns, folder: str) -> None:
    import trl

    model, tokenizer = load(job, turns)
    facts: dict[str, Any] = {}

    def even(completions: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
        facts["tokens"] = sum(len(ids) for ids in completion_ids)
        return [reward(text) for text in completions]

    rows, settings = len(job["lengths"]), job["settings"]
    continuous = settings.get("continuous", False)
    a_pass = min(settings.get("rows_per_pass", rows), rows)
    trainer = trl.GRPOTrainer(
        model,
        reward_funcs=even,
        args=arguments(
            trl.GRPOConfig,
            job,
            rows,
            folder,
            num_generations=job["group"],
            steps_per_generation=rows // a_pass,
            max_completion_length=max(job["lengths"]),
            use_transformers_continuous_batching=continuous,
            shuffle_dataset=False,
        ),
        train_dataset=data_set([{"prompt": text} for text in job["prompts"]]),
        processing_class=tokenizer,
    )
    if continuous:
        force_generate_batch(model, job["lengths"])
    else:
        force_generate(model, job["lengths"], tokenizer.eos_token_id)
    train(trainer, turns, facts)


def run_generate(job: Job, turns: Turns, folder: str) -> None:
    """Sampling only: one padded batch, or continuous batching."""
    model, tokenizer = load(job, turns)
    model.eval()
    texts = [text for text in job["prompts"] for _ in range(job["group"])]
    sampling = transformers.GenerationConfig(
        do_sample=True,
        top_k=0,
        max_new_tokens=max(job["lengths"]),
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        disable_compile=True,
    )
    continuous = job["settings"].get("continuous", False)
    if continuous:
        force_generate_batch(model, job["lengths"])
    else:
        force_generate(model, job["lengths"], tokenizer.eos_token_id)
    while True:
        turns.wait()
        with torch.no_grad():
            if continuous:
                done = model.generate_batch([tokenizer.encode(text) for text in texts], sampling)
                tokens = sum(len(row.generated_tokens) for row in done.values())
            else:
                inputs = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
                ids = {name: inputs[name] for name in ("input_ids", "attention_mask")}
                out = model.generate(**ids, generation_config=sampling)[:, ids["input_ids"].shape[1] :]
                after = (out == tokenizer.eos_token_id).int().cumsum(1).cumsum(1)
                tokens = int((after <= 1).sum())
        turns.done(tokens=tokens)


def run_sft(job: Job, turns: Turns, folder: str) -> None:
    import trl

    model, tokenizer = load(job, turns)
    rows: list[dict[str, list[int]]] = []
    for row in job["rows"]:
        labels = [i if trained else IGNORED for i, trained in zip(row["ids"], row["trained"], strict=True)]
        rows.append({"input_ids": row["ids"], "labels": labels})
    settings = job["settings"]
    longest = max(len(row["input_ids"]) for row in rows)
    options: dict[str, Any] = {"max_length": longest, "shuffle_dataset": False}
    if settings.get("packing"):
        options |= {"packing": True, "packing_strategy": "bfd", "max_length": settings["packing"]}
    trainer = trl.SFTTrainer(
        model,
        args=arguments(trl.SFTConfig, job, len(rows), folder, **options),
        train_dataset=data_set(rows),
        processing_class=tokenizer,
    )
    packed = len(trainer.train_dataset)
    if packed != len(rows):  # a step covers the whole data set, packed or not
        trainer = trl.SFTTrainer(
            model,
            args=arguments(trl.SFTConfig, job, packed, folder, **options),
            train_dataset=data_set(rows),
            processing_class=tokenizer,
        )
    train(trainer, turns, {"tokens": sum(len(row["input_ids"]) for row in rows)})


def run_dpo(job: Job, turns: Turns, folder: str) -> None:
    import trl

    model, tokenizer = load(job, turns)
    pairs = [
        {"prompt": tokenizer.decode(pair["prompt"])}
        | {side: " " + tokenizer.decode(pair[side], skip_special_tokens=True) for side in ("chosen", "rejected")}
        for pair in job["pairs"]
    ]
    options = {"precompute_ref_log_probs": True, "max_length": None}
    trainer = trl.DPOTrainer(
        model,
        args=arguments(trl.DPOConfig, job, len(pairs), folder, **options),
        train_dataset=data_set(pairs),
        processing_class=tokenizer,
    )
    for given, row in zip(job["pairs"], trainer.train_dataset, strict=True):
        if any(given[name] != row[f"{name}_ids"] for name in ("prompt", "chosen", "rejected")):
            raise SystemExit("the peer tokenizes a pair differently from the tokens in the job.")
    rows = [pair["prompt"] + pair[side] for pair in job["pairs"] for side in ("chosen", "rejected")]
    train(trainer, turns, {"tokens": sum(len(row) for row in rows)})


KINDS = {"grpo": run_grpo, "generate": run_generate, "sft": run_sft, "dpo": run_dpo}


def main(path: Path) -> None:
    turns = Turns()
    job: Job = json.loads(path.read_text(encoding="utf-8"))
    torch.set_num_threads(job["threads"])
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        KINDS[job["kind"]](job, turns, folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
