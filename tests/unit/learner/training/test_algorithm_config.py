"""Every setting does something, or is refused."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from learner.algorithms.preference_recipe import PreferenceLoss
from learner.algorithms.recipe import PRESETS, Correction, Preset, Proximal
from learner.config import RunConfig, ScheduleConfig
from learner.training.algorithm_config import AlgorithmConfig
from penstock import config as configuration
from penstock.errors import ConfigError


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_by_itself_is_its_recipe(preset: Preset) -> None:
    assert AlgorithmConfig(preset=preset).recipe() == PRESETS[preset]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"preset": "rloo", "clip_high": 0.3}, "clip_high has no effect on preset rloo: clip is none"),
        ({"preset": "cispo", "clip_low": 0.1}, "clip_low has no effect on preset cispo"),
        ({"preset": "decoupled_ppo", "clip_high": 0.3}, "ratio is always 1"),
        ({"preset": "grpo", "correction_high": 3.0}, "correction_high has no effect on preset grpo"),
        ({"preset": "grpo", "aggregation_tokens": 64}, "aggregation is sequence_mean"),
        ({"preset": "grpo", "kl_coefficient": 0.1}, "kl is none"),
        ({"preset": "grpo", "overlong_penalty": 1.0}, "overlong_share is 0"),
        ({"preset": "grpo", "gae_lambda": 0.9}, "advantage is group_std"),
        ({"preset": "grpo", "beta": 0.1}, "beta has no effect on preset grpo"),
        ({"preset": "online_dpo", "clip_high": 0.1}, "clip_high has no effect on preset online_dpo"),
        ({"preset": "online_dpo", "margin": 0.1}, "margin has no effect on loss sigmoid"),
        ({"preset": "grpo", "max_refills": 4}, "dynamic_sampling is off"),
        ({"preset": "dapo", "dynamic_sampling": False, "max_refills": 4}, "dynamic_sampling is off"),
    ],
)
def test_a_setting_that_the_preset_ignores_is_refused_by_name(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AlgorithmConfig(**(settings | {"preset": Preset(settings["preset"])}))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"correction": Correction.TRUNCATE}, "would count twice"),
        ({"correction": Correction.SECOND_MOMENT}, "needs a correction_threshold, usually 0.04"),
        ({"kl": "k3"}, "needs a kl_coefficient above 0"),
        ({"dual_clip": 0.5}, "expected more than 1"),
        ({"clip_low": 1.5}, "expected 0.0 to 1.0"),
        ({"updates_per_step": 0}, "expected at least 1"),
        ({"overlong_share": 0.1}, "needs an overlong_penalty above 0"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AlgorithmConfig(preset=Preset.GRPO, **settings)


def test_a_weighing_correction_needs_a_proximal_policy_of_its_own() -> None:
    recipe = AlgorithmConfig(
        preset=Preset.GRPO, proximal=Proximal.START, correction=Correction.MASK, correction_high=5.0
    ).recipe()
    assert recipe == replace(
        PRESETS[Preset.GRPO], proximal=Proximal.START, correction=Correction.MASK, correction_high=5.0
    )


def test_an_unknown_setting_ends_the_program_and_names_the_nearest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.toml"
    path.write_text('policy = "p"\nenvironments = ["e:1"]\nrun_dir = "r"\n[algorithm]\nclip_hihg = 0.3\n')
    with pytest.raises(SystemExit) as ended:
        configuration.load(RunConfig, [str(path)], prog="penstock learner", description="")
    assert ended.value.code == 2
    assert "--algorithm.clip-high" in capsys.readouterr().err.replace("_", "-")


@pytest.mark.parametrize("preset", PRESETS)
def test_what_is_written_beside_a_checkpoint_reads_back(tmp_path: Path, preset: Preset) -> None:
    config = RunConfig(
        policy=Path("p"),
        environments=("e:1",),
        run_dir=Path("r"),
        algorithm=AlgorithmConfig(preset=preset, updates_per_step=2),
        truncation_reward=0.0,
    )
    path = tmp_path / "config.toml"
    path.write_text(configuration.to_toml(config))
    assert configuration.load(RunConfig, [str(path)], prog="penstock learner", description="") == config


def test_dapo_needs_a_reward_for_answers_that_are_cut() -> None:
    with pytest.raises(ConfigError, match="truncation_reward is unset"):
        RunConfig(
            policy=Path("p"),
            environments=("e:1",),
            run_dir=Path("r"),
            algorithm=AlgorithmConfig(preset=Preset.DAPO),
        )


def test_kto_needs_answers_to_other_prompts() -> None:
    with pytest.raises(ConfigError, match=r"groups_per_step is 1, but algorithm\.loss is kto"):
        RunConfig(
            policy=Path("p"),
            environments=("e:1",),
            run_dir=Path("r"),
            algorithm=AlgorithmConfig(preset=Preset.ONLINE_DPO, loss=PreferenceLoss.KTO),
            schedule=ScheduleConfig(groups_per_step=1),
        )
