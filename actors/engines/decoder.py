"""Continuous batching: many sequences, one forward pass a step, in one thread.

    submit -> waiting -> [prefill] -> slot -> [decode, decode, ...] -> finished
                                               ^ install: between any two of them

A sequence holds a slot from its prefill to its last token. The first N slots decode, so
slots that fall free are filled by waiting sequences, and otherwise by moving the last
ones down. What is per slot lives in arrays, so that a step costs the same few array
operations for one sequence as for a hundred.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from actors.engines.base import GenerationChunk, GenerationRequest, StopReason
from actors.engines.policy import Architecture
from actors.engines.sampling import SamplingBatch, sample, uniforms
from actors.engines.slots import Decode, Prefill, SlotCache
from penstock.trajectory import InstallMode, PolicyVersion

NO_VERSION = PolicyVersion(0, 0)
"""The version of a chunk that holds no tokens, when none was ever installed."""

_PREFILL_TOKENS = 8192
"""Padded prompt tokens of one prefill; a longer prompt has one of its own."""
_WORTH_A_PREFILL = 1 / 8
"""Waiting sequences for each running one. A prefill of one short prompt takes as long as a decode step of all."""
_MOST_STEPS_WAITED = 3
"""Decode steps after which fewer are prefilled too."""

_SLOT = np.dtype(
    [
        ("sampled", np.int64),  # tokens sampled so far
        ("limit", np.int64),  # sampled tokens at which the sequence ends
        ("position", np.int64),  # of the newest token, whose keys are not cached yet
        ("token", np.int64),  # the newest token
        ("seed", np.uint64),
        ("top_k", np.int64),  # the vocabulary's size to keep all
        ("top_p", np.float32),
        ("temperature", np.float32),  # 0 for greedy
    ]
)


class Running:
    """One request, from its arrival to its last chunk."""

    __slots__ = ("limit", "num_sent", "request", "seed", "switches", "unread")

    def __init__(self, request: GenerationRequest, *, seed: int, limit: int) -> None:
        self.request = request
        self.seed = seed
        self.limit = limit
        """Tokens to sample at most."""
        self.num_sent = 0
        """Tokens that were handed out in chunks."""
        self.switches: list[tuple[int, PolicyVersion]] = []
        """Pairs of (number of the first token, version that sampled it and what follows)."""
        self.unread = False
        """Whether chunks wait for the reader. It gets no more before it took them, so that a
        slow reader costs no memory."""

    def spans(self, end: int) -> Iterator[tuple[int, int, PolicyVersion]]:
        """Of the tokens that are not sent, up to `end`: (first, behind the last, version)."""
        starts = [start for start, _ in self.switches[1:]] + [end]
        for (_, version), stop in zip(self.switches, starts, strict=True):
            if stop > self.num_sent:
                yield self.num_sent, stop, version
                self.num_sent = stop


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Emission:
    """What a sequence's reader is to be told."""

    sequence: Running
    chunks: tuple[GenerationChunk, ...]


class Decoder:
    """Not thread-safe: one thread calls every method."""

    def __init__(
        self,
        model: PreTrainedModel,
        architecture: Architecture,
        *,
        num_slots: int,
        max_context: int,
    ) -> None:
        self._model = model
        self._device = model.device
        self._vocab_size = architecture.vocab_size
        self._is_stop = np.zeros(architecture.vocab_size, dtype=np.bool_)
        self._is_stop[list(architecture.stop_ids)] = True
        self._num_slots = num_slots
        self._cache = SlotCache(
            num_layers=architecture.config.get_text_config().num_hidden_layers,
            num_slots=num_slots,
            max_context=max_context,
        )
        self._waiting: deque[Running] = deque()
        self._slots: list[Running | None] = [None] * num_slots
        self._state = np.zeros(num_slots, dtype=_SLOT)
        self._tokens = np.zeros((num_slots, max_context), dtype=np.int32)
        self._logprobs = np.zeros((num_slots, max_context), dtype=np.float32)
        self._concerned: list[Running] = []
        self._outdated: list[int] = []
        self._num_steps_waited = 0
        self.version: PolicyVersion | None = None
        self.num_sampled = 0

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return self._num_slots - self._slots.count(None)

    @property
    def has_work(self) -> bool:
        return self.version is not None and (bool(self._waiting) or self.num_running > 0)

    def submit(self, sequence: Running) -> None:
        self._waiting.append(sequence)

    def abandon(self, sequence: Running) -> None:
        """Drops a sequence whose reader is gone: nothing more is emitted for it."""
        if sequence in self._slots:
            self._slots[self._slots.index(sequence)] = None
        elif sequence in self._waiting:
            self._waiting.remove(sequence)

    @property
    def has_outdated(self) -> bool:
        """Whether running sequences wait to be read again, before anything is sampled."""
        return bool(self._outdated)

    def switch_version(self, version: PolicyVersion, mode: InstallMode = InstallMode.KEEP) -> None:
        """Every token from here on is the new version's. Keys and values stay, until `recompute`."""
        self.version = version
        if mode is InstallMode.RECOMPUTE:
            lengths = self._state["position"]
            self._outdated = sorted(self._busy_slots(), key=lambda slot: int(lengths[slot]))
        for slot, sequence in enumerate(self._slots):
            if sequence is not None:
                sequence.switches.append((int(self._state["sampled"][slot]), version))

    @torch.inference_mode()
    def prefill(self) -> list[Emission]:
        """Gives free slots to waiting sequences, once enough wait, and samples their first tokens."""
        if not self._is_time_to_prefill():
            return []
        refused = self._refuse_full()
        slots = self._admit()
        if not slots:
            return refused
        admitted = [self._slots[slot] for slot in slots]
        self._concerned = [sequence for sequence in admitted if sequence is not None]
        logits_BV = self._prefill_logits([each.request.prompt_ids for each in self._concerned], slots)
        return refused + self._accept(np.asarray(slots), logits_BV)

    @torch.inference_mode()
    def recompute(self) -> list[Emission]:
        """Computes the keys and values of some outdated sequences again. Samples nothing."""
        slots = self._take_outdated()
        if not slots:
            return []
        self._concerned = [sequence for slot in slots if (sequence := self._slots[slot]) is not None]
        contexts = [self._context(slot) for slot in slots]
        self._cache.step = Prefill(
            rows_B=self._to_device(np.arange(len(slots))), slots_B=self._to_device(np.array(slots))
        )
        read_prompts(self._model, self._cache, contexts, np.zeros(1, dtype=np.int64))
        return []

    @torch.inference_mode()
    def decode(self) -> list[Emission]:
        """Samples the next token of every sequence that has a slot."""
        num_rows = self._compact()
        if num_rows == 0:
            return []
        self._concerned = [sequence for sequence in self._slots[:num_rows] if sequence is not None]
        return self._accept(np.arange(num_rows), self._decode_logits(num_rows))

    def flush(self) -> list[Emission]:
        """What was sampled and not handed out, for readers that wait."""
        emissions = []
        for slot, sequence in enumerate(self._slots):
            if sequence is not None and not sequence.unread and (chunks := self._chunks(slot, sequence)):
                sequence.unread = True
                emissions.append(Emission(sequence=sequence, chunks=chunks))
        return emissions

    def abort_all(self) -> list[Emission]:
        """Ends every sequence with ABORTED, and what it has."""
        emissions = [self._finish(slot, StopReason.ABORTED) for slot in self._busy_slots()]
        while self._waiting:
            emissions.append(self._end_empty(self._waiting.popleft(), StopReason.ABORTED))
        return emissions

    def drop_concerned(self) -> list[Running]:
        """After a failed step: frees the slots of the sequences that it was computing."""
        dropped = [sequence for sequence in self._concerned if sequence in self._slots]
        for sequence in dropped:
            self._slots[self._slots.index(sequence)] = None
        return dropped

    def _busy_slots(self) -> list[int]:
        return [slot for slot, sequence in enumerate(self._slots) if sequence is not None]

    # Admission

    def _is_time_to_prefill(self) -> bool:
        enough = min(_WORTH_A_PREFILL * self.num_running, self._num_slots - self.num_running)
        if self._waiting and len(self._waiting) < enough and self._num_steps_waited < _MOST_STEPS_WAITED:
            self._num_steps_waited += 1
            return False
        self._num_steps_waited = 0
        return bool(self._waiting)

    def _refuse_full(self) -> list[Emission]:
        """Sequences whose prompt leaves no room for a token end at once."""
        refused = []
        while self._waiting and self._waiting[0].limit <= 0:
            refused.append(self._end_empty(self._waiting.popleft(), StopReason.LENGTH))
        return refused

    def _admit(self) -> list[int]:
        """Takes waiting sequences in order, as many as there are slots and prefill tokens."""
        if not self._waiting:
            return []
        admitted: list[int] = []
        longest = 0
        for slot in (index for index, sequence in enumerate(self._slots) if sequence is None):
            if not self._waiting or self._waiting[0].limit <= 0:
                break
            longest = max(longest, len(self._waiting[0].request.prompt_ids))
            if admitted and longest * (len(admitted) + 1) > _PREFILL_TOKENS:
                break
            self._place(self._waiting.popleft(), slot)
            admitted.append(slot)
        return admitted

    def _take_outdated(self) -> list[int]:
        """The longest of the outdated sequences that are still there, as many as a prefill reads."""
        taken: list[int] = []
        while self._outdated:
            slot = self._outdated[-1]
            longest = int(self._state["position"][taken[0] if taken else slot])
            if taken and longest * (len(taken) + 1) > _PREFILL_TOKENS:
                break
            self._outdated.pop()
            if self._slots[slot] is not None:
                taken.append(slot)
        return taken

    def _context(self, slot: int) -> NDArray[np.int32]:
        """The tokens whose keys and values are in the cache: all but the newest."""
        sequence = self._slots[slot]
        assert sequence is not None
        prompt = sequence.request.prompt_ids
        num_sampled = int(self._state["position"][slot]) - len(prompt)
        return np.concatenate([prompt, self._tokens[slot, :num_sampled]])

    def _place(self, sequence: Running, slot: int) -> None:
        assert self.version is not None
        sequence.switches.append((0, self.version))
        sampling = sequence.request.sampling
        greedy = sampling.temperature == 0
        self._slots[slot] = sequence
        self._state[slot] = (
            0,
            sequence.limit,
            len(sequence.request.prompt_ids) - 1,
            0,
            sequence.seed,
            self._vocab_size if greedy or sampling.top_k == 0 else min(sampling.top_k, self._vocab_size),
            1.0 if greedy else sampling.top_p,
            sampling.temperature,
        )

    def _compact(self) -> int:
        """Moves the last sequences into free slots before them. Returns how many there are."""
        num_rows = self.num_running
        targets = [slot for slot in range(num_rows) if self._slots[slot] is None]
        if targets:
            busy = [slot for slot in range(num_rows, self._num_slots) if self._slots[slot] is not None]
            for source, target in zip(busy, targets, strict=True):
                self._slots[target], self._slots[source] = self._slots[source], None
            self._state[targets] = self._state[busy]
            self._tokens[targets] = self._tokens[busy]
            self._logprobs[targets] = self._logprobs[busy]
            length = int(self._state["position"][targets].max())
            self._cache.move(self._to_device(np.array(busy)), self._to_device(np.array(targets)), length)
        return num_rows

    # Computation

    def _prefill_logits(self, prompts: Sequence[NDArray[np.int32]], slots: list[int]) -> Tensor:
        """[B, V]: what follows each prompt. Equal prompts are computed once."""
        rows = {prompt.tobytes(): prompt for prompt in prompts}
        row_of = {key: row for row, key in enumerate(rows)}
        rows_B = self._to_device(np.array([row_of[prompt.tobytes()] for prompt in prompts]))
        self._cache.step = Prefill(rows_B=rows_B, slots_B=self._to_device(np.array(slots)))
        logits_RV = prompt_logits(self._model, self._cache, list(rows.values()))
        return logits_RV[rows_B]

    def _decode_logits(self, num_rows: int) -> Tensor:
        positions = self._state["position"][:num_rows]
        positions_N = self._to_device(positions.copy())
        self._cache.step = Decode(positions_N=positions_N, length=int(positions.max()) + 1)
        tokens_N1 = self._to_device(self._state["token"][:num_rows].copy())[:, None]
        output = self._model(
            input_ids=tokens_N1,
            position_ids=positions_N[:, None],
            past_key_values=self._cache,
            use_cache=True,
            slots=self._cache,
        )
        logits_NV: Tensor = output.logits[:, -1]
        return logits_NV

    def _accept(self, slots: NDArray[np.int64], logits_BV: Tensor) -> list[Emission]:
        """Samples, notes what was sampled, and ends the sequences that are complete."""
        state = self._state[slots]
        tokens_B, logprobs_B = sample(logits_BV, self._sampling(state))
        tokens, logprobs = tokens_B.cpu().numpy(), logprobs_B.cpu().numpy()
        self._tokens[slots, state["sampled"]] = tokens
        self._logprobs[slots, state["sampled"]] = logprobs
        state["sampled"] += 1
        state["position"] += 1
        state["token"] = tokens
        self._state[slots] = state
        self.num_sampled += len(slots)
        stopped = self._is_stop[tokens]
        return [
            self._finish(int(slots[row]), StopReason.STOP if stopped[row] else StopReason.LENGTH)
            for row in np.flatnonzero(stopped | (state["sampled"] >= state["limit"]))
        ]

    def _sampling(self, state: NDArray[np.void]) -> SamplingBatch:
        temperature, top_p, top_k = state["temperature"], state["top_p"], state["top_k"]
        greedy = temperature == 0
        return SamplingBatch(
            uniforms_B1=self._column(uniforms(state["seed"], state["position"])),
            temperature_B1=(
                self._column(np.where(greedy, np.float32(1), temperature))
                if (temperature != 1).any()
                else None
            ),
            top_p_B1=self._column(top_p) if (top_p < 1).any() else None,
            top_k_B1=self._column(top_k) if (top_k < self._vocab_size).any() else None,
            greedy_B1=self._column(greedy) if greedy.any() else None,
        )

    def _column(self, values: NDArray[np.generic]) -> Tensor:
        return self._to_device(np.ascontiguousarray(values))[:, None]

    def _to_device(self, values: NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(values).to(self._device)

    # Results

    def _finish(self, slot: int, reason: StopReason) -> Emission:
        sequence = self._slots[slot]
        assert sequence is not None
        chunks = self._chunks(slot, sequence)
        self._slots[slot] = None
        if not chunks:
            return self._end_empty(sequence, reason)
        last = chunks[-1]
        ended = GenerationChunk(
            token_ids=last.token_ids, logprobs=last.logprobs, version=last.version, stop_reason=reason
        )
        return Emission(sequence=sequence, chunks=(*chunks[:-1], ended))

    def _end_empty(self, sequence: Running, reason: StopReason) -> Emission:
        version = self.version or NO_VERSION
        chunk = GenerationChunk(token_ids=(), logprobs=(), version=version, stop_reason=reason)
        return Emission(sequence=sequence, chunks=(chunk,))

    def _chunks(self, slot: int, sequence: Running) -> tuple[GenerationChunk, ...]:
        """The tokens that were not handed out, cut where the version changed."""
        return tuple(
            GenerationChunk(
                token_ids=tuple(self._tokens[slot, start:stop].tolist()),
                logprobs=tuple(self._logprobs[slot, start:stop].tolist()),
                version=version,
            )
            for start, stop, version in sequence.spans(int(self._state["sampled"][slot]))
        )


def prompt_logits(model: PreTrainedModel, cache: SlotCache, prompts: Sequence[NDArray[np.int32]]) -> Tensor:
    """[R, V]: the logits behind each prompt."""
    lengths_R = np.array([len(prompt) for prompt in prompts])
    last_K, column_R = np.unique(lengths_R - 1, return_inverse=True)
    logits_RKV = read_prompts(model, cache, prompts, last_K)
    rows_R = torch.arange(len(prompts), device=logits_RKV.device)
    return logits_RKV[rows_R, torch.from_numpy(column_R).to(logits_RKV.device)]


def read_prompts(
    model: PreTrainedModel,
    cache: SlotCache,
    prompts: Sequence[NDArray[np.int32]],
    positions_K: NDArray[np.int64],
) -> Tensor:
    """[R, K, V]: the logits at some positions of every prompt, padded at the right to a common length."""
    tokens_RP = np.zeros((len(prompts), max(len(prompt) for prompt in prompts)), dtype=np.int64)
    for row, prompt in enumerate(prompts):
        tokens_RP[row, : len(prompt)] = prompt
    device = model.device
    logits_RKV: Tensor = model(
        input_ids=torch.from_numpy(tokens_RP).to(device),
        position_ids=torch.arange(tokens_RP.shape[1], device=device).expand(len(prompts), -1),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=torch.from_numpy(positions_K).to(device),
        slots=cache,
    ).logits
    return logits_RKV
