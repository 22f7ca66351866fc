"""Writes a trained model as a Hugging Face folder, completely or not at all, also after a power cut."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError

from posttrain.models.heads import save_head
from posttrain.models.load import save_pretrained
from posttrain.models.policy import Policy
from posttrain.store import durable
from posttrain.store.durable import DiskError


def export(policy: Policy, target: Path) -> None:
    """Writes the model, its tokenizer and its scalar head, if any, to the folder `target`, which is replaced.

    Files are written to a hidden folder beside it and fsynced before it gets its name. Raises DiskError if the disk is
    full or failing; what was written is then removed, and the run can be resumed.
    """
    hidden = target.with_name(f".tmp-{target.name}")
    try:
        if hidden.exists():  # of a process that was killed here
            durable.remove_folder(hidden)
        save_pretrained(policy, hidden)
        if policy.scalar is not None:
            save_head(policy, hidden)
        for path in sorted(hidden.rglob("*")):
            (durable.sync_folder if path.is_dir() else durable.sync_file)(path)
        durable.sync_folder(hidden)
        if target.is_dir():
            durable.remove_folder(target)
        durable.rename(hidden, target)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):  # the first error is the one to report; the next export cleans up again
            durable.remove_folder(hidden)
        why = (isinstance(error, OSError) and error.strerror) or error
        raise DiskError(
            f"writing the trained model to {target} failed: {why}. Checkpoints are intact. Free some space or check "
            "the folder, then resume."
        ) from error
