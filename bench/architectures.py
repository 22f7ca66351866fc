"""Tries every architecture of bench/zoo.py: our log-probabilities, tokens, steps and exports against transformers'.

    python -m bench.architectures [--only TEXT] [--json FILE] [--write]

builds a tiny random model of each and prints one line: right, refused (with the sentence), traceback or wrong. Exits
with code 1 on the last two. `--write` puts the table into docs/guides/models.md.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import posttrain as pt
from bench.zoo import ZOO
from posttrain import api
from posttrain.config import ModelConfig
from posttrain.data import batching
from posttrain.models.load import load_policy
from posttrain.models.policy import Policy, learner_mode
from posttrain.rollout.engines.embedded import EmbeddedGenerator
from posttrain.rollout.generator import Request
from posttrain.store.run import Run
from posttrain.train import forward
from posttrain.types import Batch, PosttrainError, Sample, SamplingParams

PAGE = Path(__file__).parents[1] / "docs" / "guides" / "models.md"
BEGIN, END = "<!-- architectures -->\n", "<!-- end -->\n"
PROMPT, LENGTHS, ALONE = 20, (14, 9), 75  # two rows that share a prompt, and a longer one
NEW = 12  # tokens that are decoded
CLOSE = 2e-3  # nats; tiny models with large random weights amplify float32 rounding
TEMPLATE = (
    "<bos>{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


class Wrong(AssertionError):
    """A result differs from transformers'."""


@dataclass
class Outcome:
    """What came of one architecture. `path`: how it is computed; `mates`: what is bit-exact whatever is beside it."""

    name: str
    result: str = "right"  # right, refused, traceback, wrong, absent
    path: str = ""
    mates: str = ""
    said: str = ""  # the refusal, the first difference, or the note
    lora: str = ""
    seconds: float = 0.0
    gaps: dict[str, float] = field(default_factory=dict[str, float])


def save(config: Any, folder: Path) -> Path:
    """A model with random weights as large as a trained model's, a character tokenizer and a chat template."""
    torch.manual_seed(0)
    model: Any = transformers.AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() >= 2:
                size = 0.5 if any(part in name for part in ("embed", "wte", "wpe")) else 1.5 / math.sqrt(p.shape[-1])
                p.copy_(torch.randn(p.shape, generator=generator) * size)
    model.generation_config.eos_token_id, model.generation_config.bos_token_id = 2, None
    model.eval().save_pretrained(folder)
    special = ["<pad>", "<bos>", "<eos>", "<user>", "<assistant>", "<system>"]
    vocab = {text: i for i, text in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    backend.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    names = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, additional_special_tokens=special[3:], chat_template=TEMPLATE, **names
    ).save_pretrained(folder)
    return folder


def rows(limit: int) -> list[np.ndarray]:
    """Two rows with a common prompt and one that is longer than every window of the zoo."""
    draw = np.random.default_rng(0)
    prompt = draw.integers(6, 262, PROMPT)
    near = [np.concatenate([prompt, draw.integers(6, 262, n)]).astype(np.int32) for n in LENGTHS]
    return [*near, draw.integers(6, 262, min(ALONE, limit)).astype(np.int32)]


def batch_of(tokens: Sequence[np.ndarray]) -> Batch:
    """One micro-batch whose rows train everything after the prompt (after half of it in the last row)."""
    zeros = [np.zeros(len(t), np.float32) for t in tokens]
    samples = [Sample(t, np.arange(len(t)) >= PROMPT, z, z) for t, z in zip(tokens, zeros, strict=True)]
    return batching.pad(samples, batching.loss_masks(samples).float())


def theirs(model: Any, row: np.ndarray) -> torch.Tensor:
    """Log-probabilities (n − PROMPT,) of a row's trained tokens by transformers, the row alone."""
    ids = torch.from_numpy(row.astype(np.int64))
    logp = torch.log_softmax(model(input_ids=ids.unsqueeze(0), use_cache=False).logits[0].float(), -1)
    return logp[PROMPT - 1 : -1].gather(1, ids[PROMPT:].unsqueeze(1))[:, 0]


def plain(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def expect(outcome: Outcome, what: str, gap: float, limit: float = CLOSE) -> None:
    """Records a difference, and raises Wrong if it is above the limit."""
    outcome.gaps[what] = gap
    if not gap <= limit:
        raise Wrong(f"{what}: differs by {gap:.2g} (allowed: {limit:.2g})")


@torch.no_grad()
def log_probabilities(policy: Policy, model: Any, outcome: Outcome) -> None:
    """The learner's log-probabilities of a batch are transformers' for each row alone; also compares batch-mates."""
    tokens = rows(512)
    ours = forward.logprobs(policy, batch_of(tokens))
    gaps = [float((ours[i, PROMPT : len(t)] - theirs(model, t)).abs().max()) for i, t in enumerate(tokens)]
    expect(outcome, "log-probabilities", max(gaps))
    alone = forward.logprobs(policy, batch_of(tokens[:1]))[0]
    same = torch.equal(alone[: len(tokens[0])], ours[0, : len(tokens[0])])
    outcome.mates = "learner to the bit" if same else "learner to rounding"


def gradient(policy: Policy, model: Any, outcome: Outcome) -> None:
    """The gradient of the summed log-probabilities, in the learner's mode, is transformers' in evaluation mode."""
    tokens = rows(512)
    learner_mode(policy)
    forward.token_stats(policy, batch_of(tokens), 1.0)[0].sum().backward()
    sum(theirs(model, row).sum() for row in tokens).backward()  # type: ignore[union-attr]
    wanted = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    found = {name: p.grad for name, p in policy.model.named_parameters() if p.grad is not None}
    if wanted.keys() != found.keys():
        raise Wrong(f"gradient: other parameters have one: {sorted(wanted.keys() ^ found.keys())[:3]}")
    norm = float(torch.stack([g.norm() for g in wanted.values()]).norm())
    off = float(torch.stack([(g - found[name]).norm() for name, g in wanted.items()]).norm())
    expect(outcome, "gradient", off / norm, 1e-3)
    policy.model.zero_grad()


@torch.no_grad()
def greedy(policy: Policy, model: Any, outcome: Outcome) -> None:
    """Greedy tokens are those of transformers' `generate`, but for ties; a sequence does not depend on others."""
    turn = policy.route.turn
    prompts = [row[:n] for row, n in zip(rows(512), (5, PROMPT, (turn or 40) + 2), strict=True)]
    generator = EmbeddedGenerator(policy, 32)
    requests = [Request(p, (i,) * (2 if i == 1 else 1)) for i, p in enumerate(prompts)]
    params = SamplingParams(temperature=0.0, max_tokens=NEW)
    groups = generator.generate(requests, params)
    for prompt, group in zip(prompts, groups, strict=True):
        ids = torch.from_numpy(prompt.astype(np.int64)).unsqueeze(0)
        told = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=NEW,
            eos_token_id=2,
            pad_token_id=0,
        )[0, len(prompt) :].numpy()
        ours = group[0].tokens
        parted = next((i for i, (a, b) in enumerate(zip(ours, told, strict=False)) if a != b), None)
        if parted is None:
            if len(ours) != len(told):
                raise Wrong(f"greedy tokens: {len(ours)} against {len(told)} of generate")
            continue
        whole = torch.from_numpy(np.concatenate([prompt, ours[:parted]]).astype(np.int64)).unsqueeze(0)
        logits = model(input_ids=whole, use_cache=False).logits[0, -1]
        # generate itself may be wrong: what counts is that ours is the likeliest token by a whole forward pass
        expect(outcome, "greedy tokens", float(logits.max() - logits[int(ours[parted])]))
    params = SamplingParams(temperature=1.0, max_tokens=NEW)
    beside, alone = generator.generate(requests, params), [generator.generate([r], params)[0] for r in requests]
    pairs = [(a, b) for one, other in zip(beside, alone, strict=True) for a, b in zip(one, other, strict=True)]
    exact = all(np.array_equal(a.tokens, b.tokens) and np.array_equal(a.logprobs, b.logprobs) for a, b in pairs)
    for a, b in pairs:
        parted = next((i for i, (x, y) in enumerate(zip(a.tokens, b.tokens, strict=False)) if x != y), len(a.tokens))
        expect(outcome, "batch-mates", float(np.abs(a.logprobs[:parted] - b.logprobs[:parted]).max(initial=0)))
    outcome.mates = f"sampler {'to the bit' if exact else 'to rounding'}, {outcome.mates}"


def steps(folder: Path, root: Path, outcome: Outcome, **more: Any) -> None:
    """Two GRPO steps; sampler and learner agree, and the exported folder is the model that was trained."""

    def reward(completion: str, answer: str, **task: Any) -> float:
        return sum(completion.encode()) % 7 / 6

    small: dict[str, Any] = {
        "rollout__max_tokens": 6, "rollout__slots": 32, "prompts": 2, "group_size": 4, "problems": 2, "count": 32,
        "steps": 2, "threads": 1, **more,
    }  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()):
        out = pt.grpo(str(folder), "sums", reward, root, **small).folder
    what = "LoRA" if "model__lora_rank" in more else "GRPO"
    with Run.read(out) as run:
        if not (measured := run.curve("mismatch")[1]):
            raise Wrong(f"{what}: no step had two different rewards")
        expect(outcome, f"{what} mismatch", max(measured), 5e-3)
    trained, exported = api.open_policy(str(out)), plain(out / "model")
    row = rows(512)[0]
    with torch.no_grad():
        ours = forward.logprobs(trained, batch_of([row]))[0, PROMPT : len(row)]
        expect(outcome, f"{what} export", float((ours - theirs(exported, row)).abs().max()))
        before = theirs(plain(folder), row)
        if torch.equal(before, theirs(exported, row)):
            raise Wrong(f"{what}: two steps changed nothing")


def attempt(outcome: Outcome, job: Callable[[], None]) -> bool:
    """Runs one check and notes how it ended; whether to go on."""
    try:
        job()
    except Wrong as error:
        outcome.result, outcome.said = "wrong", str(error)
    except PosttrainError as error:
        outcome.result, outcome.said = "refused", str(error)
    except Exception as error:
        outcome.result, outcome.said = "traceback", f"{type(error).__name__}: {error}"[:300]
    return outcome.result == "right"


def check(name: str, root: Path, whole: bool = True) -> Outcome:
    """Builds one model of the zoo and tries everything; with `whole` false no GRPO steps and no LoRA."""
    started, outcome = time.perf_counter(), Outcome(name)
    of, settings = ZOO[name]
    if not hasattr(transformers, of):
        outcome.result, outcome.said = "absent", f"{of} is not in transformers {transformers.__version__}"
        return outcome
    folder = save(getattr(transformers, of)(**settings), root / "model")

    def compare() -> None:
        policy, model = load_policy(ModelConfig(path=str(folder))), plain(folder)
        route = policy.route
        outcome.path = "packed" if route.reach == math.inf else f"packed up to {route.reach} tokens, then by row"
        outcome.path = outcome.path if route.reach else ("by row" if route.cached else "by row, without a cache")
        log_probabilities(policy, model, outcome)
        greedy(policy, model, outcome)
        gradient(policy, model, outcome)
        outcome.said = " ".join(policy.notes)

    if attempt(outcome, compare) and whole:
        attempt(outcome, lambda: steps(folder, root / "grpo", outcome))
    if outcome.result == "right" and whole:
        adapters = Outcome(name)
        attempt(adapters, lambda: steps(folder, root / "lora", adapters, model__lora_rank=4))
        outcome.lora, outcome.gaps = adapters.result, outcome.gaps | adapters.gaps
        if adapters.result != "right":
            outcome.said = f"{outcome.said} LoRA: {adapters.said}".strip().replace(str(root), "FOLDER")
        if adapters.result in ("wrong", "traceback"):
            outcome.result = adapters.result
    outcome.seconds = round(time.perf_counter() - started, 2)
    return outcome


def table(outcomes: Sequence[Outcome]) -> str:
    """The table of docs/guides/models.md."""
    lines = ["| architecture | computed | the same beside any other row | LoRA | note |", "|---|---|---|---|---|"]
    for o in outcomes:
        said = o.said.replace("|", "/").replace("\n", " ")
        path = o.path if o.result == "right" else o.result
        lines.append(f"| {o.name} | {path} | {o.mates} | {o.lora} | {said} |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Tries the architectures and prints one line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="only architectures whose name contains this text")
    parser.add_argument("--json", type=Path, help="write the outcomes to this file")
    parser.add_argument("--quick", action="store_true", help="no GRPO steps and no LoRA")
    parser.add_argument("--write", action="store_true", help="put the table into docs/guides/models.md")
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    outcomes: list[Outcome] = []
    for name in (n for n in ZOO if given.only in n):
        with tempfile.TemporaryDirectory() as root:
            try:
                outcome = check(name, Path(root), not given.quick)
            except Exception as error:  # the model itself cannot be built
                outcome = Outcome(name, "absent", said=f"cannot be built: {type(error).__name__}: {error}"[:200])
        outcomes.append(outcome)
        print(
            f"{name:22s} {outcome.result:9s} {outcome.path:38s} {outcome.seconds:5.1f} s  {outcome.said[:300]}",
            flush=True,
        )
    counts = {
        kind: sum(o.result == kind for o in outcomes) for kind in ("right", "refused", "traceback", "wrong", "absent")
    }
    print(", ".join(f"{count} {kind}" for kind, count in counts.items()))
    if given.json:
        given.json.write_text(json.dumps([asdict(o) for o in outcomes], indent=1))
    if given.write:
        text = PAGE.read_text(encoding="utf-8")
        head, rest = text.split(BEGIN, 1)
        PAGE.write_text(head + BEGIN + "\n" + table(outcomes) + "\n" + END + rest.split(END, 1)[1], encoding="utf-8")
    return int(counts["traceback"] + counts["wrong"] > 0)


if __name__ == "__main__":
    sys.exit(main())
