"""vLLM's server as the generator: contract, weights that are refused, servers that die, and processes that are left.

Everything but vLLM itself runs against `vllm_stand_in.py`, a server process with the same routes. The real thing runs
where vLLM is: `python -m bench.vllm` makes build/vllm-venv, and `build/vllm-venv/bin/python -m pytest
tests/test_vllm_server.py` runs these tests there too.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from posttrain import api, config
from posttrain.config import RolloutConfig
from posttrain.models import lora
from posttrain.models.load import Policy, trainable
from posttrain.rollout.engines.vllm_server import RESTARTS, VLLMServerGenerator
from posttrain.rollout.servers import weights as servers_weights
from posttrain.rollout.servers.transfer import PACKAGE, Routes, Source, Transfer
from posttrain.rollout.servers.weights import AGREE, publish
from posttrain.store.durable import DiskError
from posttrain.store.run import Run
from posttrain.types import Completion, ConfigError, RolloutError, SamplingParams
from tests import tiny
from tests.test_vllm import distance, flat, nudge, real, requests_for

pytestmark = pytest.mark.filterwarnings("ignore")  # vLLM's own
ALLOWED = AGREE[torch.float32]
PARAMS = SamplingParams(max_tokens=12)


class Stand:
    """A stand-in for vLLM: an interpreter that runs vllm_stand_in.py, its faults and the calls it received."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        self.python = folder / "python"
        script = Path(__file__).parent / "vllm_stand_in.py"
        version = 'if [ "$1" = -c ]; then echo 0.0-stand-in; exit; fi'
        self.python.write_text(f'#!/bin/sh\n{version}\nSTAND_IN="{folder}" exec "{sys.executable}" "{script}" "$@"\n')
        self.python.chmod(0o755)

    def fault(self, text: str) -> None:
        """Puts a fault in force; empty: none."""
        part = self.folder / "part"
        part.write_text(text)
        part.replace(self.folder / "fault")

    def calls(self) -> list[str]:
        """The routes called since the last time."""
        path = self.folder / "calls"
        found = path.read_text().split() if path.exists() else []
        path.unlink(missing_ok=True)
        return found

    def settings(self, timeout: float = 120.0) -> RolloutConfig:
        return RolloutConfig(engine="vllm_server", slots=8, vllm_python=str(self.python), vllm_timeout=timeout)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    with tiny.threads(1):
        yield


@pytest.fixture
def stand(tmp_path: Path) -> Stand:
    return Stand(tmp_path / "stand")


@pytest.fixture(scope="module")
def common(tmp_path_factory: pytest.TempPathFactory) -> Stand:
    return Stand(tmp_path_factory.mktemp("common") / "stand")


@pytest.fixture(scope="module")
def keeper(model: Path, common: Stand) -> Iterator[VLLMServerGenerator]:
    """Keeps one server for the tests of this file, whose generators share it."""
    made = VLLMServerGenerator(tiny.load(model), common.settings())
    yield made
    made._host.close()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def policy(model: Path) -> Policy:
    return tiny.load(model)


@pytest.fixture
def generator(policy: Policy, common: Stand, keeper: VLLMServerGenerator) -> VLLMServerGenerator:
    common.fault("")
    made = VLLMServerGenerator(policy, common.settings())
    assert made._host is keeper._host
    return made


def gone(pid: int) -> bool:
    """Whether a process has ended; a zombie has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def wait_for(condition: Callable[[], bool], limit: float = 30.0) -> None:
    end = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < end, "what the test waits for did not happen"
        time.sleep(0.01)


# ------------------------------------------------------------------------------------------------ completions


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
def test_completions_obey_the_contract_and_have_the_learners_log_probabilities(
    policy: Policy, generator: VLLMServerGenerator, temperature: float
) -> None:
    requests = [replace(r, limits=(1, 2, 9, 64)) for r in requests_for(policy)]
    heard: dict[tuple[int, int], Completion] = {}
    spoken: dict[tuple[int, int], list[int]] = {}
    params = SamplingParams(temperature, max_tokens=12)
    groups = generator.generate(
        requests,
        params,
        on_token=lambda g, i, token: spoken.setdefault((g, i), []).append(token),
        on_done=lambda g, i, c: heard.update({(g, i): c}),
    )
    assert [len(group) for group in groups] == [4] * len(requests)
    for g, group in enumerate(groups):
        for i, (c, limit) in enumerate(zip(group, (1, 2, 9, 12), strict=True)):
            assert heard[g, i] is c and spoken[g, i] == c.tokens.tolist() and c.version == 0
            assert not set(c.tokens[:-1].tolist()) & set(policy.stop_ids)
            assert c.stop == ("stop" if int(c.tokens[-1]) in policy.stop_ids else "length")
            assert len(c.tokens) == limit or c.stop == "stop" and len(c.tokens) < limit
    assert distance(policy, requests, groups, temperature or 1.0) <= ALLOWED


def test_a_seed_gives_the_same_completion_again_and_no_requests_give_none(
    policy: Policy, generator: VLLMServerGenerator
) -> None:
    requests = requests_for(policy)
    first = flat(generator.generate(requests, PARAMS))
    assert flat(generator.generate(requests, PARAMS)) == first
    others = [replace(r, seeds=tuple(s + 1 for s in r.seeds)) for r in requests]
    assert flat(generator.generate(others, PARAMS)) != first
    assert generator.generate([], PARAMS) == []


@pytest.mark.parametrize(
    ("params", "says"),
    [
        (SamplingParams(top_p=0.9), "Sample the full distribution"),
        (SamplingParams(top_k=5), "Sample the full distribution"),
        (SamplingParams(0.001), r"vLLM would sample at 0\.01"),
        (SamplingParams(stop=("x",)), "does not end at strings"),
        (SamplingParams(max_tokens=500), "exceeds the model's context of 256"),
    ],
)
def test_what_it_cannot_honour_is_refused(
    policy: Policy, generator: VLLMServerGenerator, params: SamplingParams, says: str
) -> None:
    with pytest.raises((ConfigError, RolloutError), match=says):
        generator.generate(requests_for(policy), params)


ANSWERS = {
    "answers-from-other-weights": r"sampled from the weights 0-0123456789abcdef, not 0-",
    "changes-weights-within": r"sampled from the weights 0-\w+, 9-0123456789abcdef, not 0-",
    "names-no-weights": r"sampled from the weights \?, not 0-",
    "has-no-logprob": "a log-probability is missing",
    "names-other-tokens": "its token ids are not those of its log-probabilities",
    "stops-early": "its 1 tokens end neither at a stop token nor at the limit of 12",
    "answers-nothing": r"not in the documented format \(KeyError: 'token_ids'\)",
    "refuses": "refused /inference/v1/generate: HTTP 400: .*no such thing",
}


def test_an_answer_that_is_not_a_completion_of_these_weights_is_refused(
    policy: Policy, generator: VLLMServerGenerator, common: Stand
) -> None:
    for fault, says in ANSWERS.items():
        common.fault(fault)
        with pytest.raises(RolloutError, match=says):
            generator.generate(requests_for(policy), PARAMS)
    common.fault("")
    assert generator.generate(requests_for(policy), PARAMS)


# ------------------------------------------------------------------------------------------------ weights


def test_the_published_folder_is_the_merged_model_with_its_head_named(model: Path, tmp_path: Path) -> None:
    policy = tiny.load(model, lora_rank=4)
    nudge(policy)
    published = publish(policy, 3, tmp_path / "weights")
    saved = lora.merged(policy.model).state_dict()
    (file,) = published.folder.glob("*.safetensors")
    stored = load_file(file)
    assert stored.keys() == saved.keys() and "lm_head.weight" in stored, "a tied head has its own name"
    assert all(torch.equal(stored[name], tensor) for name, tensor in saved.items())
    assert published.label.startswith("3-")
    again = publish(policy, 4, tmp_path / "again")
    assert again.label.partition("-")[2] == published.label.partition("-")[2], "the label names the content"


def test_weights_are_split_into_files_that_transformers_reads(
    policy: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(servers_weights, "SHARD", 20_000)
    published = publish(policy, 0, tmp_path / "weights")
    assert len([*published.folder.glob("*.safetensors")]) > 2
    published.check_folder()
    read = type(policy.model).from_pretrained(published.folder).state_dict()
    assert all(torch.equal(read[name], tensor) for name, tensor in policy.model.state_dict().items())


def test_new_weights_are_the_ones_sampled_from(policy: Policy, generator: VLLMServerGenerator, common: Stand) -> None:
    requests = requests_for(policy)
    before = flat(generator.generate(requests, PARAMS))
    old = {name: tensor.clone() for name, tensor in generator.weights().items()}
    nudge(policy)
    stale = generator.generate(requests, PARAMS)
    assert flat(stale) == before, "the server has weights of its own"
    assert distance(policy, requests, stale) > 100 * ALLOWED, "which are no longer the policy's"
    common.calls()
    generator.load(trainable(policy), version=3)
    assert common.calls()[:5] == [
        "/pause?mode=wait", "/collective_rpc", "/reset_prefix_cache", "/update_weight_version", "/resume",
    ], "completions are never cut short, and no cached prompt survives"  # fmt: skip
    third = generator._weights.folder
    after = generator.generate(requests, PARAMS)
    assert {c.version for group in after for c in group} == {3} and distance(policy, requests, after) <= ALLOWED
    generator.load(old, version=4)
    assert flat(generator.generate(requests, PARAMS)) == before
    assert generator._weights.folder.exists() and not third.exists(), "folders are removed when they are replaced"


def test_adapters_are_merged_on_the_way(model: Path, stand: Stand) -> None:
    policy = tiny.load(model, lora_rank=4)
    generator = VLLMServerGenerator(policy, stand.settings())
    nudge(policy, 0.3)
    generator.load(trainable(policy), version=1)
    requests = requests_for(policy)
    assert distance(policy, requests, generator.generate(requests, PARAMS)) <= ALLOWED


def test_two_generators_share_a_server_and_keep_their_weights_apart(
    policy: Policy, model: Path, generator: VLLMServerGenerator, common: Stand
) -> None:
    other = tiny.load(model)
    nudge(other)
    starts = generator._host.starts
    lagging = VLLMServerGenerator(other, common.settings())
    assert lagging._host is generator._host
    requests = requests_for(policy)
    for _ in range(2):
        assert distance(policy, requests, generator.generate(requests, PARAMS)) <= ALLOWED
        assert distance(other, requests, lagging.generate(requests, PARAMS)) <= ALLOWED
    assert generator._host.starts == starts


SYNCS = {
    "drops-loads": "a token's log-probability differs by",
    "loads-half": "a token's log-probability differs by",
    "keeps-old-head": "a token's log-probability differs by",
    "states-old-version": "it states the version '0-",
    "alters-the-folder": "1 tensors of their folder are not what was written",
}


@pytest.mark.parametrize("fault", SYNCS)
def test_a_server_with_stale_or_half_loaded_weights_is_refused_and_ended(
    policy: Policy, generator: VLLMServerGenerator, common: Stand, fault: str
) -> None:
    server = generator._host.server
    assert server is not None
    common.fault(fault)
    nudge(policy)
    with pytest.raises(RolloutError, match=f"does not hold the weights 1-.*{SYNCS[fault]}"):
        generator.load(trainable(policy), version=1)
    assert gone(server.pid), "nothing can be sampled from it"
    common.fault("")
    requests = requests_for(policy)
    if fault == "alters-the-folder":  # which is what a new server would load as well
        with pytest.raises(RolloutError, match="not what was written"):
            generator.generate(requests, PARAMS)
        generator.load(trainable(policy), version=1)
    assert distance(policy, requests, generator.generate(requests, PARAMS)) <= ALLOWED


def test_a_change_of_any_tensor_is_found_and_of_its_last_bit_where_the_server_has_a_checksum(
    policy: Policy, generator: VLLMServerGenerator, common: Stand
) -> None:
    host, names, starts = generator._host, [*generator._weights.digests], generator._host.starts
    checksummed = {"model.embed_tokens.weight", "model.norm.weight"} | {n for n in names if "layernorm" in n}
    assert host.compared == len(checksummed) < len(names), "packed layers have hashes of nothing"
    for name in names:
        weights = host.publish(policy, 1)
        for fault in ["alters", *(["alters-a-bit"] if name in checksummed else [])]:
            common.fault(f"{fault} {name}")
            host._send(weights, policy)
            with pytest.raises(RolloutError, match="differs by|another checksum"):
                host._check(weights)
    common.fault("")
    host.hold(host.publish(policy, 2), policy)
    assert host.starts == starts


def test_weights_that_cannot_be_written_are_a_disk_error(policy: Policy, generator: VLLMServerGenerator) -> None:
    (generator._host.folder / f"weights-{generator._host._published + 1}").write_text("in the way")
    with pytest.raises(DiskError, match="cannot write the weights for vLLM's server"):
        generator.load(trainable(policy), version=1)


# ------------------------------------------------------------------------------------------------ deaths


def test_a_server_that_dies_in_the_middle_is_replaced_and_nothing_changes(
    policy: Policy, generator: VLLMServerGenerator, common: Stand
) -> None:
    requests = requests_for(policy)
    nudge(policy)
    generator.load(trainable(policy), version=5)
    undisturbed = flat(generator.generate(requests, PARAMS))
    nudge(policy)  # the learner goes on; a new server gets the weights of version 5 nevertheless
    host = generator._host
    for death in (1, 9, 16):
        host.kill()
        common.fault(f"dies-once {death}")
        before = host.starts
        announced: list[tuple[int, int]] = []
        again = generator.generate(requests, PARAMS, on_done=lambda g, i, c, heard=announced: heard.append((g, i)))
        assert flat(again) == undisturbed and host.starts == before + 2, "one that died, and one in its place"
        assert {c.version for group in again for c in group} == {5}
        assert sorted(announced) == [(g, i) for g in range(4) for i in range(4)], "each one is announced once"


def test_a_server_that_dies_anywhere_in_a_sync_is_replaced(
    policy: Policy, generator: VLLMServerGenerator, common: Stand
) -> None:
    requests = requests_for(policy, count=2, attempts=2)
    routes = ["/pause", "/collective_rpc", "/reset_prefix_cache", "/update_weight_version", "/resume"]
    for version, route in enumerate([*routes, "/weight_info", "/inference/v1/generate", "/weight_checker"], start=1):
        common.fault(f"dies-at {route}")
        starts = generator._host.starts
        nudge(policy)
        generator.load(trainable(policy), version)
        assert generator._host.starts == starts + 1, route
        groups = generator.generate(requests, PARAMS)
        assert distance(policy, requests, groups) <= ALLOWED and groups[0][0].version == version


def test_a_server_killed_from_outside_is_replaced_also_between_calls(
    policy: Policy, generator: VLLMServerGenerator
) -> None:
    requests = requests_for(policy)
    before, starts = flat(generator.generate(requests, PARAMS)), generator._host.starts
    assert generator._host.server is not None
    os.kill(generator._host.server.pid, signal.SIGKILL)
    assert flat(generator.generate(requests, PARAMS)) == before
    os.kill(generator._host.server.pid, signal.SIGKILL)
    nudge(policy)
    generator.load(trainable(policy), version=1)
    assert distance(policy, requests, generator.generate(requests, PARAMS)) <= ALLOWED
    assert generator._host.starts == starts + 2


@pytest.mark.parametrize("fault", ["dies 1", "fails"])
def test_servers_that_keep_failing_end_with_one_sentence(
    policy: Policy, generator: VLLMServerGenerator, common: Stand, fault: str
) -> None:
    common.fault(fault)
    starts = generator._host.starts
    with pytest.raises(RolloutError, match=f"lost {RESTARTS + 1} times in one call, the last time because"):
        generator.generate(requests_for(policy), PARAMS)
    assert generator._host.starts == starts + RESTARTS
    common.fault("")
    assert generator.generate(requests_for(policy), PARAMS), "it can be used again"


def test_a_server_that_hangs_is_noticed_within_its_deadline(
    policy: Policy, generator: VLLMServerGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests, host = requests_for(policy), generator._host
    before = flat(generator.generate(requests, PARAMS))
    hung = host.server
    assert hung is not None
    noticed: list[float] = []
    kill, limit = host.kill, host._limit

    def noted() -> str:
        noticed.append(time.monotonic() - begun)
        host._limit = limit  # the new server has time to start
        return kill()

    monkeypatch.setattr(host, "kill", noted)
    os.kill(hung.pid, signal.SIGSTOP)
    host._limit, begun = 1.5, time.monotonic()
    assert flat(generator.generate(requests, PARAMS)) == before
    assert gone(hung.pid) and 1.5 <= noticed[0] <= 1.5 + 2.0


def test_a_generation_that_is_given_up_leaves_no_open_request(
    policy: Policy, generator: VLLMServerGenerator, common: Stand
) -> None:
    before, starts = flat(generator.generate(requests_for(policy), PARAMS)), generator._host.starts
    common.calls()

    def give_up(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generator.generate(requests_for(policy), PARAMS, on_done=give_up)
    assert "/abort_requests" in common.calls()
    assert flat(generator.generate(requests_for(policy), PARAMS)) == before and generator._host.starts == starts


# ------------------------------------------------------------------------------------------------ start and end


def test_a_server_that_cannot_start_is_a_sentence_with_its_cause(policy: Policy, stand: Stand) -> None:
    stand.fault("cannot-start")
    with pytest.raises(ConfigError, match=r"cannot run .* here: .*exit status 1: ValueError: there is no such model"):
        VLLMServerGenerator(policy, stand.settings())
    stand.fault("")
    VLLMServerGenerator(policy, stand.settings())._host.close()  # the same settings, now that it can
    stand.fault("never-answers")
    with pytest.raises(ConfigError, match=r"cannot run .* here: it did not answer within 0\.5 s"):
        VLLMServerGenerator(policy, stand.settings(timeout=0.5))


def test_a_server_that_computes_another_model_is_refused_at_the_start(policy: Policy, stand: Stand) -> None:
    stand.fault("alters model.norm.weight")
    with pytest.raises(ConfigError, match="does not compute .* as the learner does"):
        VLLMServerGenerator(policy, stand.settings())


@pytest.mark.parametrize(
    ("python", "says"), [("/nowhere/python", "cannot be run"), ("", "needs vLLM, which .* does not have")]
)
def test_without_vllm_a_run_is_refused_before_it_begins(tmp_path: Path, python: str, says: str) -> None:
    if not python and importlib.util.find_spec("vllm"):
        pytest.skip("vLLM is installed here")
    settings = {"model.path": "abacus", "data.tasks": "sums", "rollout.engine": "vllm_server"}
    recipe = config.resolve("grpo", {}, settings | {"rollout.vllm_python": python, "run.out": str(tmp_path / "run")})
    with pytest.raises(ConfigError, match=says):
        api.start("grpo", recipe)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("inf"), float("nan")])
def test_a_deadline_that_is_none_is_refused(seconds: float) -> None:
    with pytest.raises(ConfigError, match="rollout.vllm_timeout"):
        config.resolve("grpo", {}, {"rollout.vllm_timeout": seconds})


PARENT = """
import os, sys, tempfile, time
from pathlib import Path
from posttrain.rollout.servers.process import Server
folder = Path(tempfile.mkdtemp())
server = Server([sys.argv[1], "--model", sys.argv[2]], folder, os.environ, "/health", 60.0)
print(server.pid, folder, flush=True)
if sys.argv[3] == "stay":
    time.sleep(600)
"""
REAL_PARENT = """
import sys, time
from pathlib import Path
from posttrain.config import RolloutConfig
from posttrain.rollout.engines.vllm_server import VLLMServerGenerator
from tests import tiny
generator = VLLMServerGenerator(tiny.load(Path("abacus")), RolloutConfig(slots=4))
print(generator._host.server.pid, generator._host.folder, flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("end", ["stay", "leave"])
def test_the_server_and_its_folder_do_not_outlive_their_process(
    policy: Policy, stand: Stand, tmp_path: Path, end: str
) -> None:
    published = publish(policy, 0, tmp_path / "weights")
    command = [sys.executable, "-c", PARENT, str(stand.python), str(published.folder), end]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1]) as parent:
        assert parent.stdout is not None
        pid, folder = parent.stdout.readline().split()
        if end == "stay":
            assert not gone(int(pid)) and Path(folder).stat().st_mode & 0o77 == 0, "others cannot reach the socket"
            parent.kill()
        parent.wait()
        wait_for(lambda: gone(int(pid)) and not Path(folder).exists())


def test_a_run_trains_on_it_and_a_killed_server_changes_nothing(tmp_path: Path, stand: Stand) -> None:
    model = tiny.stopping(tiny.chatty(tmp_path / "chatty"))
    settings = {
        "model.path": str(model), "data.tasks": "sums", "data.count": 16, "rollout.engine": "vllm_server",
        "rollout.vllm_python": str(stand.python), "rollout.max_tokens": 6, "algo.prompts": 2, "algo.group_size": 4,
        "reward.name": str(Path(__file__).parent / "vowels.py") + ":vowels", "eval.problems": 4, "train.steps": 3,
        "train.lr": 1e-3, "train.threads": 1,
    }  # fmt: skip
    digests: list[str] = []
    for name, fault in (("whole", ""), ("killed", "dies-once 11")):
        stand.fault(fault)
        done = api.start("grpo", config.resolve("grpo", {}, settings | {"run.out": str(tmp_path / name)}))
        with Run.read(done.folder) as run:
            digests.append(run.digest())
            assert run.header["fingerprint"]["vllm"] == "0.0-stand-in"
            assert max(run.curve("mismatch")[1]) <= ALLOWED
    assert digests[0] == digests[1]


# ------------------------------------------------------------------------------------------------ NCCL


def test_nccl_is_refused_where_it_cannot_work(policy: Policy, stand: Stand) -> None:
    with pytest.raises(ConfigError, match=r'"nccl" cannot be used: the policy is on cpu, and NCCL needs a GPU'):
        VLLMServerGenerator(policy, replace(stand.settings(), vllm_sync="nccl"))
    with pytest.raises(ConfigError, match="the server needs a GPU of its own"):
        Transfer.check(RolloutConfig(vllm_sync="nccl"), torch.device("cuda"))


@real
def test_the_names_that_nccl_uses_exist_in_this_vllm(policy: Policy) -> None:
    """This is all that is known of it: no GPU has run it."""
    nccl = importlib.import_module(f"{PACKAGE}.nccl_engine")
    base = importlib.import_module(f"{PACKAGE}.base")
    about = nccl.NCCLTrainerInitInfo(master_address="127.0.0.1", master_port=1, world_size=2, rank=0)
    assert about.is_sender
    assert {"client", "source"} <= inspect.signature(
        nccl.NCCLTrainerWeightTransferEngine.trainer_init
    ).parameters.keys()
    called: list[tuple[str, object]] = []
    routes = Routes(lambda route, body: called.append((route, body)))
    assert isinstance(routes, base.VLLMWeightSyncClient)
    source = Source(policy.model)
    meta = source.metadata()
    assert [(m.name, tuple(m.shape)) for m in meta] == [(name, tuple(tensor.shape)) for name, tensor in source]


# ------------------------------------------------------------------------------------------------ with vLLM


@pytest.fixture(scope="module")
def abacus() -> Policy:
    return tiny.load(Path("abacus"))


@pytest.fixture(scope="module")
def served(abacus: Policy) -> Iterator[VLLMServerGenerator]:
    made = VLLMServerGenerator(abacus, RolloutConfig(engine="vllm_server", slots=32))
    yield made
    made._host.close()


@real
def test_vllm_samples_the_same_twice_and_agrees_with_the_learner(abacus: Policy, served: VLLMServerGenerator) -> None:
    requests, params = requests_for(abacus, count=8), SamplingParams(max_tokens=16)
    groups = served.generate(requests, params)
    assert {c.stop for group in groups for c in group} == {"stop", "length"}, "both kinds occur"
    assert flat(served.generate(requests, params)) == flat(groups), "to the bit"
    assert distance(abacus, requests, groups) <= ALLOWED
    greedy = SamplingParams(0.0, max_tokens=24)
    assert distance(abacus, requests, served.generate(requests, greedy)) <= ALLOWED


@real
def test_vllm_samples_from_new_weights(abacus: Policy, served: VLLMServerGenerator) -> None:
    requests, params = requests_for(abacus), SamplingParams(max_tokens=24)
    before = flat(served.generate(requests, params))
    old = {name: tensor.clone() for name, tensor in served.weights().items()}
    nudge(abacus)
    served.load(trainable(abacus), version=3)
    after = served.generate(requests, params)
    assert {c.version for group in after for c in group} == {3} and distance(abacus, requests, after) <= ALLOWED
    served.load(old, version=0)
    assert flat(served.generate(requests, params)) == before


@real
def test_vllm_with_any_tensor_tampered_or_the_head_left_out_is_found(
    abacus: Policy, served: VLLMServerGenerator, tmp_path: Path
) -> None:
    host = served._host
    assert host.compared > 0
    names = [*served._weights.digests]
    nudge(abacus, 1e-2)
    weights = host.publish(abacus, 1)
    (file,) = weights.folder.glob("*.safetensors")
    good = load_file(file)
    for name in [*names, "no head"]:
        bad = {n: t for n, t in good.items() if (n, name) != ("lm_head.weight", "no head")}
        if name != "no head":
            bad[name] = bad[name] * 1.01
        save_file(bad, file, metadata={"format": "pt"})
        host._send(weights, abacus)
        save_file(good, file, metadata={"format": "pt"})  # so that only the server's own tensors can show it
        with pytest.raises(RolloutError, match="differs by|another checksum"):
            host._check(weights)
        if name == "no head":
            served.load(trainable(abacus), version=2)  # the head is named again
    assert host.starts == 1


@real
def test_vllm_killed_in_the_middle_is_replaced_with_the_newest_weights(
    abacus: Policy, served: VLLMServerGenerator
) -> None:
    requests, params = requests_for(abacus, count=8), SamplingParams(max_tokens=24)
    nudge(abacus, 1e-2)
    served.load(trainable(abacus), version=7)
    undisturbed = flat(served.generate(requests, params))
    ended: list[float] = []

    def kill(*_: object) -> None:
        if not ended and served._host.server is not None:
            ended.append(time.monotonic())
            os.kill(served._host.server.pid, signal.SIGKILL)

    again = served.generate(requests, params, on_done=kill)
    assert flat(again) == undisturbed and served._host.starts == 2
    assert {c.version for group in again for c in group} == {7}
    assert distance(abacus, requests, again) <= ALLOWED


@real
def test_vllm_and_its_worker_end_with_their_parent() -> None:
    command = [sys.executable, "-c", REAL_PARENT]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1]) as parent:
        assert parent.stdout is not None
        pid, folder = parent.stdout.readline().split()
        session = [int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit() and _session(p) == int(pid)]
        assert len(session) > 1, "the API server has a worker"
        parent.kill()
        parent.wait()
        wait_for(lambda: all(gone(p) for p in session) and not Path(folder).exists())


def _session(process: Path) -> int:
    try:
        return int(re.split(r"\) ", (process / "stat").read_text())[-1].split()[3])
    except (FileNotFoundError, ProcessLookupError):
        return -1
