"""The peer of time_to_reward: TRL's GRPOTrainer on the quickstart's task, in this process.

    python benchmarks/harness/trl_grpo.py POLICY OUT.jsonl --seed 0 --steps 120 --threads 2

Writes one line a step: seconds since training began, and the mean reward.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from environments.reasoning_gym import ReasoningGym
from penstock.quickstart import task
from penstock.quickstart.settings import MAX_TOKENS
from penstock.trajectory import Task


class Recorder(TrainerCallback):  # type: ignore[misc]
    """Writes down when each step ended and what it earned."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._began = 0.0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._began = time.monotonic()

    def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
        if "reward" in logs:
            row = {"seconds": time.monotonic() - self._began, "reward": logs["reward"]}
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("policy", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    words: ReasoningGym = task.environment(seed=arguments.seed)

    def reward(completions: list[str], index: list[int], **_: Any) -> list[float]:
        results = [
            words.score(Task(task.ENVIRONMENT, "train", i, arguments.seed), text)
            for i, text in zip(index, completions, strict=True)
        ]
        return [float(result.reward.value or 0.0) for result in results]

    prompts = task.training_prompts(seed=arguments.seed)
    # The quickstart's learner takes 8 groups of 16 a step, once each, at this learning rate.
    config = GRPOConfig(
        output_dir=str(arguments.out.parent / "trl"),
        max_steps=arguments.steps,
        per_device_train_batch_size=128,
        num_generations=16,
        max_completion_length=MAX_TOKENS,
        learning_rate=5e-4,
        lr_scheduler_type="linear",
        warmup_steps=5,
        temperature=1.0,
        beta=0.0,
        seed=arguments.seed,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(arguments.policy, dtype=torch.float32),
        processing_class=AutoTokenizer.from_pretrained(arguments.policy),
        reward_funcs=reward,
        args=config,
        train_dataset=Dataset.from_dict({"prompt": prompts, "index": list(range(len(prompts)))}),
        callbacks=[Recorder(arguments.out)],
    )
    trainer.train()


if __name__ == "__main__":
    main()
