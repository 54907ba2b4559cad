import importlib.util
from pathlib import Path

import pytest

from learner.config import RunConfig
from learner.offline.config import SftConfig
from penstock import cli, config
from penstock.errors import ConfigError
from penstock.quickstart.settings import QuickstartConfig, make_folder, run_toml, warm_start_toml


def test_the_run_that_is_written_is_one_that_the_learner_reads(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(
        run_toml(
            QuickstartConfig(seed=7, max_lag=2, steps=30),
            policy=tmp_path / 'a "quoted" folder',
            folder=tmp_path,
            environment="127.0.0.1:7081",
            bind="127.0.0.1:7070",
            serve="penstock env serve ...",
        )
    )

    run = config.load(RunConfig, [str(path)], prog="test", description="")

    assert (run.seed, run.schedule.max_lag, run.schedule.num_steps) == (7, 2, 30)
    assert run.policy == tmp_path / 'a "quoted" folder'
    assert run.environments == ("127.0.0.1:7081",)


@pytest.mark.parametrize("max_lag", [0, 1, 2, 4, 9])
def test_the_pipeline_fits_every_bound_of_lag(tmp_path: Path, max_lag: int) -> None:
    path = tmp_path / "run.toml"
    path.write_text(
        run_toml(
            QuickstartConfig(max_lag=max_lag),
            policy=tmp_path,
            folder=tmp_path,
            environment="127.0.0.1:7081",
            bind="127.0.0.1:7070",
            serve="",
        )
    )

    assert config.load(RunConfig, [str(path)], prog="test", description="").schedule.depth <= max_lag + 1


def test_the_warm_start_that_is_written_is_one_that_sft_reads(tmp_path: Path) -> None:
    path = tmp_path / "warm-start.toml"
    path.write_text(
        warm_start_toml(
            QuickstartConfig(warm_start_steps=9),
            policy=tmp_path,
            data=tmp_path / "d.jsonl",
            out=tmp_path / "out",
        )
    )

    assert config.load(SftConfig, [str(path)], prog="test", description="").num_steps == 9


def test_runs_are_numbered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    assert [make_folder(None).name for _ in range(2)] == ["quickstart-1", "quickstart-2"]


def test_a_folder_that_holds_something_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()

    with pytest.raises(
        ConfigError, match="is not empty; give another, or go on with its run: penstock learner"
    ):
        make_folder(tmp_path)


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    with pytest.raises(ConfigError, match="cannot be used"):
        make_folder(tmp_path / "file" / "run")


def test_flags_out_of_range_end_with_status_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["quickstart", "--run-dir", str(tmp_path), "--actors", "0"])

    assert "actors is 0; expected at least 1" in capsys.readouterr().err


def test_vllm_that_is_missing_is_told_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="make setup-vllm"):
        QuickstartConfig(engine="vllm")
