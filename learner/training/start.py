"""One rank of a run's trainer: puts the parts together, trains, and leaves in order."""

from __future__ import annotations

import argparse
import logging
import signal
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path

import torch

from learner.algorithms.preference_recipe import OnlineRecipe
from learner.config import RunConfig
from learner.training.checkpoint import Checkpoints
from learner.training.config import Precision, TrainingConfig
from learner.training.coordinator import Coordinator, GrpcCoordinator, Lineage
from learner.training.critic import CheckpointsWithCritic, Critic
from learner.training.loop import CheckpointLog, Position, Skips, Training, Versions
from learner.training.model import load_policy
from learner.training.online_dpo import OnlineDpo
from learner.training.optimizer import learning_rate, make_optimizer
from learner.training.orders import Orders, StopFlag
from learner.training.parallel import Ranks, open_ranks, place
from learner.training.policy import Policy
from learner.training.policy_gradient import PolicyGradient
from learner.training.publish import Publisher, Publishes
from learner.training.publish_adapters import AdapterPublisher
from learner.training.reference import Reference
from learner.training.retention import Retention
from learner.training.scalar import load_scalar_model
from learner.training.step import Algorithm
from learner.training.stopping import StopOnSignal
from learner.training.updater import Updater
from learner.training.watched import Watched
from penstock import config as configuration
from penstock import log, parent
from penstock.watchdog import Watchdog
from penstock.weights.adapted_log import AdaptedLog
from penstock.weights.segment import run_prefix
from penstock.weights.version_log import VersionLog

_log = logging.getLogger(__name__)


def main(argv: Sequence[str]) -> int:
    """`python -m learner.training RUN_DIR --coordinator HOST:PORT`. Raises PenstockError."""
    arguments = _parse(argv)
    stop = StopOnSignal()
    stop.listen()
    # A trainer without its supervisor must not go on; what is on disk is whole at any instant.
    parent.follow(signal.SIGKILL)
    log.configure()
    config = configuration.load(
        RunConfig, [str(arguments.run_dir / "config.toml")], prog="penstock learner", description="A run."
    )
    with ExitStack() as stack:
        ranks = join_ranks(config.training)
        stack.callback(ranks.close)
        coordinator = GrpcCoordinator(arguments.coordinator, stopping=stop.is_set)
        stack.callback(coordinator.close)
        train(config, ranks, coordinator, stop, stack)
    stop.finished()
    return 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m learner.training", description="One rank of a run's trainer."
    )
    parser.add_argument("run_dir", type=Path, help="the run's folder, with its config.toml")
    parser.add_argument(
        "--coordinator", required=True, metavar="HOST:PORT", help="where TrainerService listens"
    )
    return parser.parse_args(argv)


def train(
    config: RunConfig, ranks: Ranks, coordinator: Coordinator, stop: StopFlag, stack: ExitStack
) -> Position:
    """Resumes from the newest checkpoint and trains. Returns where it ended."""
    updater = make_updater(config, ranks)
    critic = make_critic(config, ranks)
    algorithm = make_algorithm(config, updater, critic)
    checkpoints = CheckpointLog(
        _checkpoints(config, updater, critic),
        coordinator,
        ranks,
        every_steps=config.training.checkpoint.every_steps,
        in_background=config.training.checkpoint.in_background,
        metric=config.training.checkpoint.metric if config.training.checkpoint.keep_best else "",
    )
    step = checkpoints.resume()
    lineage = coordinator.open_lineage(step) if ranks.is_first else Lineage(run_id="", epoch=0)
    position = Position(epoch=int(ranks.maximum(torch.tensor([lineage.epoch]))), step=step)
    publisher = _make_publisher(updater.policy, ranks, lineage, config.training.precision, stack)
    num_steps = config.schedule.num_steps
    training = Training(
        num_steps=num_steps,
        position=position,
        learning_rate=lambda at: learning_rate(config.training.optimizer, step=at, num_steps=num_steps),
        algorithm=Watched(algorithm, stack.enter_context(Watchdog())),
        orders=Orders(coordinator, ranks, position, stop),
        versions=Versions(publisher, coordinator, ranks, config.run_dir / "metrics.jsonl"),
        checkpoints=checkpoints,
        skips=Skips(coordinator, ranks),
    )
    _log.info(
        "training from version %s to step %d on %d rank(s)", position.version, num_steps, ranks.world_size
    )
    if training.run() and ranks.is_first:
        coordinator.finish_run(epoch=position.epoch, step=position.step)
    return position


def join_ranks(training: TrainingConfig) -> Ranks:
    """Raises ConfigError."""
    return open_ranks(
        training.device,
        training.precision,
        num_replicas=training.num_replicas,
        context_ranks=training.context_ranks,
        tensor_ranks=training.tensor_ranks,
        pipeline_ranks=training.pipeline_ranks,
        cpu_offload=training.cpu_offload,
    )


def make_updater(config: RunConfig, ranks: Ranks) -> Updater:
    """Loads the run's initial policy onto the ranks, with its optimiser. Raises ConfigError."""
    training = config.training
    torch.manual_seed(config.seed + ranks.rank)
    policy = load_policy(
        config.policy,
        activation_checkpointing=training.activation_checkpointing,
        lora=training.lora,
        seed=config.seed,
        deferred=True,
    )
    place(policy, ranks, training.precision, compiled=training.compile)
    return Updater(
        policy,
        make_optimizer(policy, training.optimizer),
        ranks,
        row_tokens=training.row_tokens,
        rows_per_pass=training.rows_per_pass,
        max_grad_norm=training.optimizer.max_grad_norm,
        temperature=config.sampling.temperature,
    )


def make_critic(config: RunConfig, ranks: Ranks) -> Critic | None:
    """A second model, where the run's algorithm wants one. Raises ConfigError."""
    training, recipe = config.training, config.algorithm.recipe()
    if isinstance(recipe, OnlineRecipe) or not recipe.has_critic:
        return None
    model = load_scalar_model(
        config.policy,
        activation_checkpointing=training.activation_checkpointing,
        lora=training.lora,
        seed=config.seed,
        deferred=True,
    )
    place(model, ranks, training.precision)
    updater = Updater(
        model,
        make_optimizer(model, training.optimizer),
        ranks,
        row_tokens=training.row_tokens,
        rows_per_pass=training.rows_per_pass,
        max_grad_norm=training.optimizer.max_grad_norm,
    )
    rate = recipe.critic_learning_rate
    return Critic(updater, learning_rate=rate, gamma=recipe.gae_gamma, lam=recipe.gae_lambda)


def _checkpoints(config: RunConfig, updater: Updater, critic: Critic | None) -> Checkpoints:
    folder, retention = (
        config.run_dir / "checkpoints",
        Retention.of(config.training.checkpoint, config.run_dir),
    )
    if critic is None:
        return Checkpoints(folder, updater, retention=retention)
    return CheckpointsWithCritic(folder, updater, critic, retention=retention)


def make_algorithm(config: RunConfig, updater: Updater, critic: Critic | None = None) -> Algorithm:
    """What the run's `[algorithm]` says. Call it before a checkpoint is loaded: a reference is the initial policy."""
    recipe = config.algorithm.recipe()
    reference = Reference(updater) if recipe.has_reference else None
    if isinstance(recipe, OnlineRecipe):
        return OnlineDpo(updater, recipe, seed=config.seed, reference=reference)
    max_tokens = config.sampling.max_tokens
    return PolicyGradient(
        updater, recipe, max_tokens=max_tokens, seed=config.seed, reference=reference, critic=critic
    )


def _make_publisher(
    policy: Policy, ranks: Ranks, lineage: Lineage, precision: Precision, stack: ExitStack
) -> Publishes:
    """With rank 0's segments, which end with the stack."""
    prefix = run_prefix(lineage.run_id)
    if policy.adapters is not None:
        adapted = stack.enter_context(closing(AdaptedLog(name_prefix=prefix))) if ranks.is_first else None
        return AdapterPublisher(policy, ranks, adapted, precision)
    versions = stack.enter_context(closing(VersionLog(name_prefix=prefix))) if ranks.is_first else None
    return Publisher(policy, ranks, versions, precision)
