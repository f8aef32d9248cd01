"""The settings of reinforcement learning, the section `config.rl` of a run (kimi_jax.rl).

Source: docs/rl.md. Values that the Kimi K2.5 report (arXiv 2602.02276) does not publish are guesses and marked there.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated
from urllib.parse import urlsplit

from kimi_jax.ranges import Count, Natural, NonNegative, OneOf, Positive, Range

SANDBOXES = ("auto", "bubblewrap", "lock", "none")  # walls that may be asked for; see `sandbox.walls.choose`

SUBAGENTS = ("script", "frozen", "trained")  # what plays the subagents of an orchestrator
LOSSES = ("k2_5", "k1_5", "ppo", "cispo", "gspo", "none")


def is_base_url(url: str) -> bool:
    """Whether it names a server and nothing on it."""
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0 and (
            url.rstrip("/") == f"{parts.scheme}://{parts.netloc}" and "@" not in parts.netloc
        )  # fmt: skip
    except ValueError:
        return False


@dataclass(frozen=True)
class PolicyConfig:
    """What is minimised (`kimi_jax.rl.losses`). The paper publishes no values: see `losses.policy_loss`."""

    loss: Annotated[str, OneOf(LOSSES)] = "k2_5"  # "none": K2.5's without bounds, plain importance sampling
    alpha: Annotated[float, Range(1e-6, 1.0)] = 0.5  # K2.5: lower bound of the ratio of probabilities
    beta: Annotated[float, Range(1.0, 1e6)] = 2.0  # K2.5, and CISPO's only one: upper bound
    tau: NonNegative = 1e-3  # K2.5, K1.5: weight of the squared log-ratio
    low: Annotated[float, Range(1e-6, 0.999999)] = 0.2  # PPO, GSPO: the ratio is clipped to 1 - low, 1 + high
    high: Annotated[float, Range(1e-6, 1e6)] = 0.2
    temperature: Positive = 1.0  # of the sampler; the trained policy is softmax(logits / temperature) as well
    deviation: bool = False  # advantages are also divided by the standard deviation of their group (GRPO)


@dataclass(frozen=True)
class TaskConfig:
    """A source of problems (`kimi_jax.rl.tasks`). `kind` names it; the other settings are those of files."""

    kind: str = "copy"
    weight: Positive = 1.0  # share of the prompts
    path: str = ""  # of a JSONL file; the family of reasoning-gym
    prompt: str = ""  # template of a JSONL line: {{field}}
    truth: str = ""
    verifier: str = ""
    raw: bool = False  # `truth` names a field whose value is JSON
    after: str = ""  # of the truth, only what follows this counts
    blank: bool = False  # the control: every image is white
    tools: tuple[str, ...] = ()  # that an answer may call (`kimi_jax.rl.episode`): "ipython", which has the images
    thinking: bool = False  # with tools: every reply begins with reasoning

    def conflict(self) -> str:
        """What does not go together; empty if all does."""
        return "thinking is for tasks with tools, whose prompts are conversations" * (self.thinking and not self.tools)


@dataclass(frozen=True)
class ToolConfig:
    """Bounds of the episodes of tasks that name tools, and of the interpreters that run their calls."""

    turns: Count = 4  # replies of the model; the last one must answer
    calls: Count = 4  # of one reply that are run
    characters: Annotated[int, Range(16, 1 << 20)] = 2000  # of a result; what is beyond is left out
    sessions: Annotated[int, Range(1, 1024)] = 4  # interpreters at once, each of one episode
    sandbox: Annotated[str, OneOf(SANDBOXES)] = "auto"
    timeout_seconds: Annotated[float, Range(above=0.0, high=86_400.0)] = 10.0  # of a call
    memory_mb: Annotated[int, Range(256, 1 << 20)] = 1024  # of an interpreter


@dataclass(frozen=True)
class ToggleConfig:
    """Phases with and without a length budget (`kimi_jax.rl.shaping.Toggle`)."""

    period: Count = 10  # learning iterations of a phase; longer than the run: the budget is never lifted
    threshold: Annotated[float, Range(-1e6, 1e6)] = 0.875
    percentile: Annotated[float, Range(0.0, 100.0)] = 90.0


@dataclass(frozen=True)
class RolloutConfig:
    """How answers are sampled (`kimi_jax.rl.rollout`). An iteration: rollouts of one set of weights, then updates."""

    prompts: Count = 64  # groups that an iteration trains on
    samples: Annotated[int, Range(2, 4096)] = 8  # answers to a prompt, a group
    max_new_tokens: Count = 64  # that are sampled of an answer, over all its parts and turns
    # an answer that is longer goes on in the next iteration, with its weights (a partial rollout); 0: never interrupted
    tokens_per_iteration: Natural = 0
    max_staleness: Natural = 0  # eta: answers may be begun so many iterations before they are needed
    updates: Count = 1  # training steps that share an iteration's groups between them
    passes: Count = 1  # times that they are trained on
    sync_interval: Count = 1  # iterations between two hand-overs of weights to the sampler
    drop_uninformative: bool = True  # groups of equal rewards are replaced by other prompts (dynamic sampling)
    max_draws: Annotated[float, Range(1.0, 1e6)] = 3.0  # times `prompts` that an iteration may draw in all
    replay_experts: bool = False  # training routes every token to the experts that the sampler chose for it
    # reward of an answer that reached max_new_tokens; None: it is scored as it stands
    truncation_penalty: Annotated[float, Range(-1e6, 0.0)] | None = None
    repeat_period: Natural = 16  # an answer ends that repeats up to so many tokens ...
    repeat_times: Annotated[int, Range(2, 1 << 20)] = 16  # ... so many times; period 0: never
    slots: Count = 64  # answers that are decoded together
    page_size: Annotated[int, Range(1, 1 << 16)] = 16  # tokens of a page of the cache
    tokens_per_call: Count = 16
    # servers of this project that draw instead of this process (`kimi_jax.rl.remote`): http://10.0.0.2:8000
    endpoints: tuple[str, ...] = ()
    endpoint_seconds: Annotated[float, Range(above=0.0, high=86_400.0)] = 600.0  # for one answer, or for new weights
    endpoint_tries: Count = 8  # that fail in a row at every one of them before the run ends

    def conflict(self) -> str:
        """What does not go together; empty if all does."""
        if self.page_size & (self.page_size - 1):
            return f"page_size = {self.page_size} is no power of two"
        if self.tokens_per_iteration and not self.max_staleness:
            return "tokens_per_iteration interrupts answers, so max_staleness must be at least 1"
        if self.endpoints and self.replay_experts:
            return "replay_experts needs an engine in this process; servers (endpoints) do not tell the experts"
        wrong = [url for url in self.endpoints if not is_base_url(url)]
        if wrong:
            return f"endpoints: {wrong[0]!r:.80} is no http://HOST:PORT or https://HOST:PORT without a path"
        if len(set(self.endpoints)) < len(self.endpoints):
            return "endpoints names a server twice"
        return ""


@dataclass(frozen=True)
class OrchestratorConfig:
    """Runs of an agent swarm as rollouts (`kimi_jax.rl.orchestrator`), their limits and auxiliary rewards (PARL)."""

    corpus: str = "runs/orchestrator/corpus"  # folder of the documents that subagents search
    critical_steps: Annotated[int, Range(2, 1 << 20)] = 14  # limit of a run
    turns: Count = 6  # most turns of the orchestrator
    width: Annotated[int, Range(2, 1024)] = 3  # useful subagents at work at once that earn all of r_parallel
    reward_useless: bool = False  # r_parallel counts subagents whose results are not used too: what not to do
    lambda_parallel: NonNegative = 0.3
    lambda_finish: NonNegative = 0.2
    anneal: Natural = 30  # iterations in which both weights fall to zero; 0: they stay
    # "script"; "frozen": the weights that the run began with; "trained": the policy, on its own reward
    subagents: Annotated[str, OneOf(SUBAGENTS)] = "script"
    # (iteration, share of briefs that scripted subagents are up to) from then on: weak ones first, stronger later
    reliability: tuple[tuple[int, float], ...] = ((0, 1.0),)

    def conflict(self) -> str:
        """What does not go together; empty if all does."""
        starts = [start for start, _ in self.reliability]
        fine = starts[:1] == [0] and sorted(set(starts)) == starts and all(0 <= r <= 1 for _, r in self.reliability)
        if not fine:
            return f"reliability = {self.reliability} begins at iteration 0, rises, and is between 0 and 1"
        if self.subagents != "script" and self.reliability != ((0, 1.0),):
            return f"reliability is that of scripted subagents; leave it out with subagents = {self.subagents!r}"
        return ""

    def reliability_at(self, iteration: int) -> float:
        """That of the subagents in one iteration."""
        return [r for start, r in self.reliability if start <= iteration][-1]


@dataclass(frozen=True)
class RLConfig:
    """Tasks, rollouts, loss, shaping of rewards, held-out evaluation."""

    tasks: dict[str, TaskConfig] = field(default_factory=dict)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    toggle: ToggleConfig | None = None
    tools: ToolConfig = field(default_factory=ToolConfig)
    orchestrator: OrchestratorConfig | None = None
