"""A reward model that was trained here is served as an environment, and a policy is trained against it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from learner.coordinator import segments, tables
from learner.offline.main import main
from penstock.v1 import trajectory_pb2

from .cluster import Cluster, cluster

PROMPTS = ("ab=", "cd=", "ef=", "gh=")


def train_reward_model(run: Cluster) -> Path:
    """Prefers answers with many a's."""
    data, out = run.folder / "pairs.jsonl", run.folder / "rm"
    rows = [{"prompt": prompt, "chosen": "aaaa", "rejected": "hhhh"} for prompt in PROMPTS]
    data.write_text("\n".join(json.dumps(row) for row in rows))
    places = ["--policy", str(run.policy), "--data", str(data), "--out", str(out)]
    options = ["--num_steps", "8", "--optimizer.learning_rate", "1e-2", "--device", "cpu"]
    assert main(["rm", *places, *options]) == 0
    return out


def trained_rewards(run: Cluster, tokenizer_folder: Path) -> dict[tuple[str, str], float]:
    """What the ledger has for each prompt and answer that was trained on."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    found = {}
    kept = "SELECT segment, offset, num_bytes, checksum FROM trajectories WHERE state = 'trained'"
    for payload in segments.read(run.run_dir / segments.FOLDER, tables.places(run.rows(kept))):
        assert payload is not None
        trajectory = trajectory_pb2.Trajectory.FromString(payload)
        ids = torch.frombuffer(bytearray(trajectory.token_ids), dtype=torch.int32)
        sampled = torch.frombuffer(bytearray(trajectory.loss_mask), dtype=torch.uint8).bool()
        prompt = tokenizer.decode(ids[~sampled])
        found[prompt, tokenizer.decode(ids[sampled], skip_special_tokens=True)] = trajectory.reward.value
    return found


@pytest.mark.slow
def test_a_policy_trains_on_the_rewards_that_the_model_gives_directly(tmp_path: Path) -> None:
    with cluster(tmp_path) as run:
        model_folder = train_reward_model(run)
        prompts = ("--prompts", str(run.folder / "pairs.jsonl"), "--eval_fraction", "0", "--device", "cpu")
        run.environment(f"reward_model:{model_folder}", *prompts)
        learner = run.learner("--ledger.keep_payloads", "True", num_steps=3)
        run.actor("a1")
        assert learner.wait() == 0
        rewards = trained_rewards(run, run.policy)
        trained = run.rows("SELECT count(*) FROM trajectories WHERE state = 'trained'")
    assert trained == [(24,)]
    assert len({round(reward, 3) for reward in rewards.values()}) > 3
    model = AutoModelForSequenceClassification.from_pretrained(model_folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    for (prompt, answer), reward in rewards.items():
        ids = tokenizer(prompt).input_ids + tokenizer(answer).input_ids + [tokenizer.eos_token_id]
        with torch.no_grad():
            direct = float(model(input_ids=torch.tensor([ids])).logits[0, 0])
        assert reward == pytest.approx(direct, abs=1e-4), (prompt, answer)
