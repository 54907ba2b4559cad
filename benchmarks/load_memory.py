"""How much memory a rank needs to get its share of a policy: whole folders are read, or each rank's part alone.

    OMP_NUM_THREADS=1 python benchmarks/load_memory.py [--num-ranks 2] [--json FILE]

Writes a Qwen3-shaped policy of about 130 million parameters in bfloat16, and starts that many ranks
for each way. Prints the growth of a rank's peak of resident memory, mapped files included,
from before the policy is loaded until it is sharded, and what share of the float32 masters that is.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
from pathlib import Path

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from learner.training.config import Device, Precision
from learner.training.launch import RENDEZVOUS_VARIABLE
from learner.training.model import load_policy
from learner.training.parallel import local, open_ranks, place

CONFIG = Qwen3Config(
    vocab_size=32_768,
    hidden_size=1024,
    intermediate_size=3072,
    num_hidden_layers=8,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=64,
    tie_word_embeddings=True,
)
MIB = 1 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-ranks", type=int, default=2)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        policy = Qwen3ForCausalLM(CONFIG).to(torch.bfloat16)
        num_parameters = sum(parameter.numel() for parameter in policy.parameters())
        policy.save_pretrained(f"{folder}/policy", max_shard_size="100MB")
        del policy
        found = {"num_parameters": num_parameters, "masters_mib": 4 * num_parameters / MIB}
        for way in ("whole", "deferred"):
            found |= measure(Path(folder), way, arguments.num_ranks)
    sys.stdout.write(json.dumps(found, indent=1) + "\n")
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1))


def measure(folder: Path, way: str, num_ranks: int) -> dict[str, float]:
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=load, args=(rank, num_ranks, str(folder), way)) for rank in range(num_ranks)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        if process.exitcode:
            raise SystemExit(f"a rank ended with status {process.exitcode}")
    peaks = [json.loads((folder / f"{way}-{rank}").read_text()) for rank in range(num_ranks)]
    return {
        f"{way}_peak_mib": max(peak["peak_mib"] for peak in peaks),
        f"{way}_share_mib": max(peak["share_mib"] for peak in peaks),
    }


def load(rank: int, num_ranks: int, folder: str, way: str) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(num_ranks), LOCAL_RANK="0")
    os.environ[RENDEZVOUS_VARIABLE] = f"{folder}/{way}.rendezvous"
    ranks = open_ranks(Device.CPU, Precision.BFLOAT16)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what is resident now
    before = peak_mib()
    policy = load_policy(Path(folder) / "policy", deferred=way == "deferred")
    place(policy, ranks, Precision.BFLOAT16)
    share = sum(local(parameter).nbytes for parameter in policy.parameters()) / MIB
    Path(f"{folder}/{way}-{rank}").write_text(
        json.dumps({"peak_mib": peak_mib() - before, "share_mib": share})
    )
    ranks.barrier()
    ranks.close()


def peak_mib() -> float:
    """Of this process's resident memory."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


if __name__ == "__main__":
    main()
