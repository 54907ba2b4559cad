"""An engine that writes what it is told to, and an environment without a network."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Sequence

from actors.engines.base import EngineStats, GenerationChunk, GenerationRequest, InstallReport, StopReason
from environments.base import Description, Message, StepResult
from environments.digest import observation_digest
from penstock.errors import EnvironmentFault
from penstock.trajectory import PolicyVersion, Reward, Task
from penstock.weights.staged import StagedWeights


class ScriptedEngine:
    """Each request gets the next of `turns`: chunks of (token ids, version), ended by a stop token."""

    num_slots = 4
    verifies = False
    max_context = 64

    def __init__(self, turns: Sequence[Sequence[GenerationChunk]]) -> None:
        self.turns = list(turns)
        self.requests: list[GenerationRequest] = []
        self.installed: PolicyVersion | None = PolicyVersion(1, 0)
        self.installs: list[StagedWeights] = []

    async def start(self) -> None: ...

    async def generate(self, request: GenerationRequest) -> AsyncIterator[GenerationChunk]:
        self.requests.append(request)
        for chunk in self.turns.pop(0):
            yield chunk

    async def install(self, staged: StagedWeights) -> InstallReport:
        self.installs.append(staged)
        self.installed = staged.manifest.version
        return InstallReport(
            version=staged.manifest.version,
            digest=staged.manifest.digest,
            pause_seconds=0.0,
            tensors_seconds=0.0,
        )

    def stats(self) -> EngineStats:
        return EngineStats(
            num_running=0,
            num_waiting=0,
            num_tokens=0,
            tokens_per_second=0.0,
            num_installs=len(self.installs),
            max_install_seconds=0.0,
        )

    async def stop(self) -> None: ...


FIRST = PolicyVersion(1, 0)


def chunk(*token_ids: int, version: PolicyVersion = FIRST, stop: StopReason | None = None) -> GenerationChunk:
    """Log-probabilities are -0.1 times the token's id."""
    return GenerationChunk(
        token_ids=token_ids,
        logprobs=tuple(-0.1 * token for token in token_ids),
        version=version,
        stop_reason=stop,
    )


class ScriptedEpisode:
    def __init__(self, client: ScriptedClient, messages: tuple[Message, ...]) -> None:
        self.messages = messages
        self.observation_digest = observation_digest(messages)
        self._client = client

    async def step(self, action: str) -> StepResult:
        self._client.actions.append(action)
        result = self._client.results.pop(0)
        if isinstance(result, EnvironmentFault):
            raise result
        return result


class ScriptedClient:
    """An EnvironmentClient whose steps give the next of `results`."""

    address = "127.0.0.1:1"
    reset_timeout_seconds = step_timeout_seconds = 30.0

    def __init__(
        self, prompt: str, results: Sequence[StepResult | EnvironmentFault], *, max_turns: int = 1
    ) -> None:
        self.prompt = prompt
        self.results = list(results)
        self.actions: list[str] = []
        self.sessions: list[tuple[str, int, Task]] = []
        self.num_open = 0
        self.description = Description(
            name="words", version="3", digest="ab", splits={"train": 5}, max_turns=max_turns
        )

    async def describe(self) -> Description:
        return self.description

    @contextlib.asynccontextmanager
    async def session(self, *, session_id: str, fence: int, task: Task) -> AsyncIterator[ScriptedEpisode]:
        self.sessions.append((session_id, fence, task))
        self.num_open += 1
        try:
            yield ScriptedEpisode(self, (Message(role="user", content=self.prompt),))
        finally:
            self.num_open -= 1


def done(reward: float) -> StepResult:
    return StepResult(done=True, reward=Reward.valid(reward), metrics={"length": 3.0})


def says(text: str) -> StepResult:
    return StepResult(done=False, messages=(Message(role="user", content=text),))
