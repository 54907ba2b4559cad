"""A whole run, as small as it can be read: GRPO in plain torch against penstock's real services.

    python examples/grpo_in_one_file.py            (about a minute on two CPU cores)

The environment and the trainer are in this file. Everything between them is the real thing:
an environment server, a coordinator with its durable ledger, and an actor that generates
while this process trains, and installs each new version in the middle of its answers.

    environment server  <-- reset, step --  actor  -- trajectories -->  coordinator
                                              ^                            |  ^
                                              +--- weights (shared memory) |  | batches, versions
                                                                           v  |
                                                                       this process
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from environments.base import Description, Message, StepResult
from environments.digest import settings_digest
from learner.config import RunConfig, ScheduleConfig
from learner.training.batch import Batch
from learner.training.coordinator import GrpcCoordinator
from penstock.config import to_toml
from penstock.quickstart.policy import make_policy
from penstock.trajectory import PolicyVersion, Reward, Sampling, Task, Trajectory
from penstock.weights.manifest import HostTensor
from penstock.weights.version_log import VersionLog

CHARACTERS = "abcdefgh="
MAX_LAG = 2
CLIP_LOW, CLIP_HIGH = 0.2, 0.28


class Vowels:
    """The policy is shown a letter, and rewarded for the share of vowels in its answer."""

    def describe(self) -> Description:
        digest = settings_digest({"version": 1})
        return Description(name="vowels", version="1", digest=digest, splits={"train": 0, "eval": 0})

    def prompt(self, task: Task) -> tuple[Message, ...]:
        return (Message(role="user", content=f"{CHARACTERS[task.index % 8]}="),)

    def score(self, task: Task, action: str) -> StepResult:
        share = sum(letter in "ae" for letter in action) / max(len(action), 1)
        return StepResult(done=True, reward=Reward.valid(share))


def main() -> None:
    parser = argparse.ArgumentParser(description="GRPO in one file.")
    parser.add_argument("--steps", type=int, default=60)
    steps: int = parser.parse_args().steps
    with tempfile.TemporaryDirectory() as name, ExitStack() as programs:
        folder = Path(name)
        policy = make_policy(
            folder / "policy", seed=0, characters=CHARACTERS,
            hidden_size=32, num_layers=2, intermediate_size=64, head_dim=16,
        )  # fmt: skip
        environment = programs.enter_context(program(
            folder, "env", "serve", "grpo_in_one_file:Vowels", "--bind", "127.0.0.1:0", "--workers", "1"
        ))  # fmt: skip
        served = ready(environment, "serving ").rpartition(" on ")[2]
        config = RunConfig(
            policy=policy,
            environments=(served,),
            run_dir=folder,
            schedule=ScheduleConfig(num_steps=steps, groups_per_step=4, group_size=8, max_lag=MAX_LAG),
            sampling=Sampling(max_tokens=8),
            truncation_reward=0.0,
            bind="127.0.0.1:0",
        )
        (folder / "config.toml").write_text(to_toml(config))
        command = [sys.executable, "-m", "learner.coordinator", str(folder / "config.toml")]
        coordinator = programs.enter_context(process(folder, command))
        address = ready(coordinator, "coordinator ready on ")
        programs.enter_context(program(folder, "actor", "--learner", address, "--name", "actor"))
        train(AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32), address, steps)


def train(model: PreTrainedModel, address: str, steps: int) -> None:
    """Publish, ask for a batch, take a step; the coordinator sees to the rest."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    coordinator = GrpcCoordinator(address)
    weights = VersionLog(name_prefix=f"one-file-{os.getpid()}")
    try:
        lineage = coordinator.open_lineage(0)
        version = PolicyVersion(lineage.epoch, 0)
        coordinator.publish_version(version, weights.write(version, tensors_of(model)), {}, ())
        while version.step < steps:
            batch = wait_for_batch(coordinator, version)
            loss = grpo_loss(model, batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            version = PolicyVersion(version.epoch, version.step + 1)
            measured = {"loss": loss.item(), "reward_mean": mean_reward(batch)}
            trained = [group.group_id for group in batch.groups]
            coordinator.publish_version(version, weights.write(version, tensors_of(model)), measured, trained)
            if version.step % 5 == 0 or version.step == steps:
                lag = max(batch.step - trajectory.oldest.step for trajectory in batch.trajectories())
                print(
                    f"step {version.step}: reward {measured['reward_mean']:.3f}, lag up to {lag}", flush=True
                )
        coordinator.finish_run(epoch=version.epoch, step=version.step)
    finally:
        weights.close()
        coordinator.close()


def wait_for_batch(coordinator: GrpcCoordinator, version: PolicyVersion) -> Batch:
    """Every answer without a batch says what is waited for: `penstock why` shows it too."""
    for _ in range(60):
        answer = coordinator.next_batch(epoch=version.epoch, step=version.step, wait_seconds=2.0)
        if answer.batch is not None:
            return answer.batch
    raise TimeoutError(f"no batch in two minutes: {answer.waiting}")


def grpo_loss(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """-1/N sum over tokens of min(r A, clip(r) A), r = policy / policy that sampled (Shao et al. 2024)."""
    num_tokens = sum(trajectory.num_sampled for trajectory in batch.trajectories())
    total = torch.zeros(())
    for group in batch.groups:
        rewards = torch.tensor([trajectory.reward.value for trajectory in group.trajectories])
        advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-6)
        for trajectory, advantage in zip(group.trajectories, advantages, strict=True):
            sampled = torch.from_numpy(trajectory.loss_mask.astype(bool))
            behaviour = torch.from_numpy(trajectory.logprobs.copy())[sampled]
            ratio = torch.exp(logprobs(model, trajectory, sampled) - behaviour)
            clipped = ratio.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH)
            total = total - torch.minimum(ratio * advantage, clipped * advantage).sum()
    return total / num_tokens


def logprobs(model: PreTrainedModel, trajectory: Trajectory, sampled: torch.Tensor) -> torch.Tensor:
    """log of the probability that the policy gives to each sampled token."""
    tokens = torch.from_numpy(trajectory.token_ids.astype("int64"))
    scores = model(tokens[None]).logits[0, :-1].log_softmax(-1)
    return scores.gather(1, tokens[1:, None])[:, 0][sampled[1:]]


def mean_reward(batch: Batch) -> float:
    rewards = [trajectory.reward.value or 0.0 for trajectory in batch.trajectories()]
    return sum(rewards) / len(rewards)


def tensors_of(model: PreTrainedModel) -> list[HostTensor]:
    """Tied parameters once, under the names of the Hugging Face model."""
    return [
        HostTensor(
            name=name,
            dtype="F32",
            shape=tuple(parameter.shape),
            data=parameter.detach().contiguous().reshape(-1).view(torch.uint8).numpy(),
        )
        for name, parameter in model.named_parameters()
    ]


def program(folder: Path, *arguments: str):  # type: ignore[no-untyped-def]
    """`penstock ARGUMENTS`, until the block ends."""
    return process(folder, [sys.executable, "-m", "penstock.cli", *arguments])


@contextmanager
def process(folder: Path, command: Sequence[str]) -> Iterator[subprocess.Popen[str]]:
    here = str(Path(__file__).parent)
    path = os.pathsep.join([here, str(Path(here).parent), os.environ.get("PYTHONPATH", "")])
    environ = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with (folder / "programs.log").open("ab") as log:
        child = subprocess.Popen(
            command, cwd=folder, env=environ, stdout=subprocess.PIPE, stderr=log, text=True
        )
    try:
        yield child
    finally:
        child.terminate()
        child.communicate(timeout=30)


def ready(child: subprocess.Popen[str], prefix: str) -> str:
    """The rest of the line that a server prints once it serves."""
    assert child.stdout is not None
    for line in child.stdout:
        if line.startswith(prefix):
            return line.removeprefix(prefix).strip()
    raise RuntimeError(f"{child.args} ended before it was ready")


if __name__ == "__main__":
    main()
