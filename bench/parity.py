"""Compares losses and gradients with TRL's, on the same weights and the same batch.

    python -m bench.parity

creates a second environment in build/ that adds TRL to this one's torch and transformers, computes the losses of TRL's
own trainers there (`parity_peer.py`) and ours from the same tokens (`parity_ours.py`), and prints a table with the rows
of `parity_rows.py`. It exits with code 1 if a number exceeds the tolerance without a stated reason, or if a stated
reason no longer applies.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

from bench.environment import FOLDER, ROOT, TRL, environment
from bench.parity_ours import World, sample
from bench.parity_rows import ROWS, Quantity, Row
from posttrain.config import ModelConfig
from posttrain.models.heads import attach_scalar
from posttrain.models.load import Policy, load_policy, save_pretrained, trainable
from posttrain.train.forward import sample_logprobs

BAR = 1e-5
SEED = 0
NOISE = 0.05  # of the reference's weights, relative to each tensor's standard deviation
OUTLIER = 1.5  # log-ratio of policy to older policy at the first token of completions with reward 0
DRIFT = 0.3  # standard deviation of the log-ratios to the older policy and to the sampler

# question, chosen, rejected, margin
PAIRS = [
    ("What is 47*6?", "<think>40*6=240, 7*6=42, 240+42=282</think>282", "388", 1.0),
    ("What is 12+30?", "42", "<think>12+30=41</think>41", 0.0),
    ("How do I crack a nut?", "Press it in a nutcracker.", "I will not tell you that.", 0.5),
    ("Name two colours.", "red, blue", "red and red and once more red, no more", 2.0),
]
# question, then completions with their rewards; "…" marks a truncated completion without a stop token
ATTEMPTS = [
    (
        "What is 25+18?",
        [("<think>20+10=30, 5+8=13, 30+13=43</think>43", 1.0), ("44", 0.0), ("43", 1.0), ("<think>25+1…", 0.0)],
    ),
    ("What is 8*7?", [("56", 1.0), ("<think>8*7=56</think>56", 1.0), ("It is 56", 1.0), ("56", 1.0)]),
    (
        "Help me chop an onion.",
        [("Cut it in half and slice it thin.", 0.9), ("No.", 0.0), ("Use a long warm knife.", 0.4), ("Cut it.", 0.5)],
    ),
]


@dataclass(frozen=True)
class Measured:
    """One row of the table: both losses, both gradient norms, and the norm of the gradients' difference."""

    row: Row
    loss: float
    peer_loss: float
    norm: float
    peer_norm: float
    apart: float  # ‖g − g'‖

    def over(self, quantity: Quantity) -> bool:
        """Whether this quantity exceeds the tolerance: 1e-5, relative for gradients and for losses above 1."""
        if quantity == "loss":
            return not abs(self.loss - self.peer_loss) <= BAR * max(1.0, abs(self.peer_loss))
        return not max(abs(self.norm - self.peer_norm), self.apart) <= BAR * self.peer_norm

    @property
    def failures(self) -> list[str]:
        """Problems of the row: differences without a stated reason, and stated reasons that no longer apply."""
        out: list[str] = []
        quantities: tuple[Quantity, ...] = ("loss", "gradient")
        for quantity in quantities:
            if quantity in self.row.differs and not self.over(quantity):
                out.append(f"the {quantity} was expected to differ and does not")
            elif quantity not in self.row.differs and self.over(quantity):
                out.append(f"the {quantity} differs")
        return out

    @property
    def verdict(self) -> str:
        if self.failures:
            return "**FAILS**: " + " and ".join(self.failures)
        return f"differs: {self.row.reason}" if self.row.differs else "equal"


def noisy(policy: Policy) -> Policy:
    """Adds fixed random noise to a policy's weights, to make the reference of the comparison."""
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for parameter in trainable(policy).values():
            scale = NOISE * parameter.std(correction=0)
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return policy


def make_batch(policy: Policy) -> dict[str, Any]:
    """The token ids, rewards and log-probabilities given to both sides."""
    draw = random.Random(SEED)
    tokenizer = policy.tokenizer

    def prompt(question: str) -> list[int]:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
        )
        return tokenizer.encode(text, add_special_tokens=False)

    def answer(text: str) -> list[int]:
        ids = tokenizer.encode(text.removesuffix("…"), add_special_tokens=False)
        return ids if text.endswith("…") else [*ids, tokenizer.eos_token_id]

    pairs = [
        {"prompt_ids": prompt(q), "chosen_ids": answer(good), "rejected_ids": answer(bad), "margin": margin}
        for q, good, bad, margin in PAIRS
    ]
    cut = [
        {"prompt_ids": [], "margin": 0.0} | {s: p["prompt_ids"] + p[s] for s in ("chosen_ids", "rejected_ids")}
        for p in pairs
    ]
    judgements = [
        {"prompt_ids": p["prompt_ids"], "completion_ids": p[f"{side}_ids"], "label": side == "chosen"}
        for p in pairs
        for side in ("chosen", "rejected")
    ][:-1]  # so that the two labels are not equally frequent
    for i, row in enumerate(judgements):  # TRL's pairing: each prompt with the previous completion
        row["KL_completion_ids"] = judgements[i - 1]["completion_ids"]

    attempts: list[dict[str, Any]] = []
    for question, answers in ATTEMPTS:
        for text, reward in answers:
            row = {"prompt_ids": prompt(question), "completion_ids": answer(text), "reward": reward}
            row["cut"] = text.endswith("…")
            own = sample_logprobs(policy, [sample(row["prompt_ids"], row["completion_ids"])], 1 << 20)[0]
            known = own[len(row["prompt_ids"]) :].tolist()
            row["old_logp"] = [x + draw.gauss(0, DRIFT) for x in known]
            row["old_logp"][0] -= OUTLIER * (reward == 0)
            row["sampler_logp"] = [x + draw.gauss(0, DRIFT) for x in known]
            n = len(known)
            row["tool_mask"] = [int(not n // 3 <= t < 2 * n // 3) for t in range(n)]
            attempts.append(row)
    unscored = [row | ({"reward": None} if i == 1 else {}) for i, row in enumerate(attempts)]
    size = len(ATTEMPTS[0][1])
    return {
        "pairs": pairs,
        "cut_pairs": cut,
        "judgements": judgements,
        "attempts": attempts,
        "unscored_attempts": unscored,
        "group_size": size,
    }


def gradient(world: World) -> dict[str, torch.Tensor]:
    """Gradients that the last loss left in either model, under the peer's parameter names; clears them.

    The peer's scalar head has no bias, so the bias of ours (0 here) is excluded.
    """
    out: dict[str, torch.Tensor] = {}
    for policy in (world.policy, world.reference):
        named = dict(policy.model.named_parameters())
        if policy.scalar is not None:
            policy.scalar.bias.grad = None
            named["score.weight"] = policy.scalar.weight
        for name, parameter in named.items():
            if parameter.grad is not None:
                out[name] = parameter.grad
                parameter.grad = None
    return out


def norm(tensors: Mapping[str, torch.Tensor]) -> float:
    return sum(float(t.double().square().sum()) for t in tensors.values()) ** 0.5


def compare(world: World, rows: Sequence[Row], folder: Path) -> list[Measured]:
    """Computes our side of every row and compares it with the peer's results in the folder."""
    losses = json.loads((folder / "peer.json").read_text(encoding="utf-8"))["losses"]
    measured = []
    for number, row in enumerate(rows):
        for policy in (world.policy, world.reference):
            policy.model.train()
        loss = row.ours(world)
        ours, theirs = gradient(world), load_file(folder / "gradients" / f"{number}.safetensors")
        none = torch.zeros(())
        apart = {name: ours.get(name, none) - theirs.get(name, none) for name in {*ours, *theirs}}
        measured.append(Measured(row, loss, losses[row.name], norm(ours), norm(theirs), norm(apart)))
    return measured


def table(measured: Sequence[Measured]) -> str:
    """The comparison as a Markdown table."""
    lines = [
        "| objective | loss | TRL's | difference | gradient norm | TRL's | relative difference | ‖g − g'‖ / ‖g'‖ | |",
        "|---|--:|--:|--:|--:|--:|--:|--:|---|",
    ]
    for m in measured:
        relative, apart = (m.norm - m.peer_norm) / m.peer_norm, m.apart / m.peer_norm
        lines.append(
            f"| {m.row.name} | {m.loss:.6f} | {m.peer_loss:.6f} | {m.loss - m.peer_loss:.1e} | "
            f"{m.norm:.5f} | {m.peer_norm:.5f} | {relative:.1e} | {apart:.1e} | {m.verdict} |"
        )
    return "\n".join(lines)


def run(folder: Path, python: Path, model: str, rows: Sequence[Row]) -> list[Measured]:
    """Writes weights and batch to a folder, runs the peer on them, and compares."""
    policy, reference = (load_policy(ModelConfig(path=model)) for _ in range(2))
    noisy(reference)
    for name, which in (("policy", policy), ("reference", reference)):
        save_pretrained(which, folder / name)
    attach_scalar(policy, 1, SEED)
    assert policy.scalar is not None
    save_file({"weight": policy.scalar.weight.detach().contiguous()}, folder / "score.safetensors")
    world = World(policy, reference, make_batch(policy))
    (folder / "batch.json").write_text(json.dumps(world.batch), encoding="utf-8")
    (folder / "rows.json").write_text(json.dumps([row.for_peer() for row in rows]), encoding="utf-8")
    done = subprocess.run([str(python), str(ROOT / "bench" / "parity_peer.py"), str(folder)], stdout=subprocess.DEVNULL)
    if done.returncode:
        raise SystemExit(f"the peer failed with exit code {done.returncode}; see its own messages above.")
    return compare(world, rows, folder)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compare losses and gradients of all shared objectives with TRL's.")
    parser.add_argument("--venv", type=Path, default=FOLDER, help="where TRL is installed")
    parser.add_argument("--model", default="abacus", help="abacus or a model folder")
    parser.add_argument("--only", default="", help="only rows whose name contains this text")
    options = parser.parse_args(argv)
    rows = [row for row in ROWS if options.only in row.name]
    if not rows:
        parser.error(f"no row's name contains {options.only!r}")
    python = environment(options.venv)
    with tempfile.TemporaryDirectory() as folder:
        measured = run(Path(folder), python, options.model, rows)
    print(f"TRL {TRL}, torch {torch.__version__}, transformers {transformers.__version__}, fp32, tolerance {BAR:g}\n")
    print(table(measured))
    failed = [m.row.name for m in measured if m.failures]
    print(f"\n{len(measured)} rows, {len(failed)} failed" + (f": {'; '.join(failed)}" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
