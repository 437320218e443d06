"""What a config comes from: file, preset, overrides, defaults; and that a dumped one is the same again."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmscale.config import shipped, yaml_text
from llmscale.config.load import dump, load, preset, preset_names
from llmscale.config.schema import DataSource, RunConfig
from llmscale.errors import ConfigError

TEXT = """\
model: {preset: llama-7b, num_layers: 3}
data: {train: [{path: a}, {path: b, weight: 2}], sequence_length: 64}
training: {steps: 10, global_batch_size: 8}
optimizer: {lr: 1e-3}
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(TEXT)
    return path


def test_the_file_wins_over_its_preset_and_the_preset_over_the_defaults(path: Path) -> None:
    model = load(path).model
    assert model.num_layers == 3
    assert model.ffn_hidden_size == 11008
    assert model.dropout == 0.0


def test_overrides_win_over_all(path: Path) -> None:
    config = load(path, ["model.num_layers=5", "training.steps=1e3", "optimizer.lr=2", "parallel.tensor=2"])
    assert (config.model.num_layers, config.training.steps, config.optimizer.lr) == (5, 1000, 2.0)
    assert config.parallel.tensor == 2


def test_the_last_of_two_overrides_wins(path: Path) -> None:
    assert load(path, ["training.steps=5", "training.steps=6"]).training.steps == 6


def test_an_override_may_name_a_preset(path: Path) -> None:
    config = load(path, ["model={preset: gpt2-xl}"])
    assert (config.model.family, config.model.num_layers) == ("gpt2", 48)


def test_null_takes_a_presets_key_back(path: Path) -> None:
    assert load(path).model.vocab_size == 32000
    assert load(path, ["model.vocab_size=null"]).model.vocab_size is None


def test_an_override_may_set_a_whole_section_or_empty_it(path: Path) -> None:
    assert load(path, ["training={steps: 1, global_batch_size: 2}"]).training.global_batch_size == 2
    assert load(path, ["optimizer=null"]).optimizer.lr == 3e-4
    assert load(path, ["data.train=[{path: c}]"]).data.train == (DataSource(path="c"),)


@pytest.mark.parametrize("text", ["a=b", "a b", "2026-01-31", "1:30", "日本", "'1e3'", "a#b", "~/runs", "0x10"])
def test_a_value_may_be_any_text(text: str, path: Path) -> None:
    assert load(path, [f"run.name={text}"]).run.name == text.strip("'")


@pytest.mark.parametrize(
    ("text", "number"), [("1e-3", 1e-3), ("1E+2", 100), (".5", 0.5), ("5.", 5), ("010", 10), ("1_000", 1000), ("+3", 3)]
)
def test_numbers_are_read_as_they_are_meant(text: str, number: float, path: Path) -> None:
    assert load(path, [f"optimizer.lr={text}"]).optimizer.lr == number


def test_an_override_changes_one_of_two_sections_that_share_an_alias(path: Path) -> None:
    path.write_text(TEXT + "checkpoint: &shared {interval: 5}\nlogging: *shared\n")
    config = load(path, ["logging.interval=3"])
    assert (config.checkpoint.interval, config.logging.interval) == (5, 3)


def test_a_config_survives_json(path: Path) -> None:
    """Checkpoints keep the config of their run so."""
    config = load(path, ["parallel={pipeline: 3, stage_layers: [1, 1, 1]}"])
    assert RunConfig.model_validate_json(config.model_dump_json()) == config


def test_spaces_around_a_key_do_not_matter(path: Path) -> None:
    assert load(path, [" training.steps = 5 "]).training.steps == 5


def test_a_config_is_frozen(path: Path) -> None:
    with pytest.raises(ValueError, match="frozen"):
        load(path).training.steps = 3  # type: ignore[misc]


def test_a_dumped_config_is_the_same_again(path: Path, tmp_path: Path) -> None:
    config = load(path, ["parallel={pipeline: 2, stage_layers: [1, 2]}", "logging.wandb=project"])
    dump(config, tmp_path / "out" / "config.yaml")
    assert load(tmp_path / "out" / "config.yaml") == config
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["config.yaml"]


@pytest.mark.parametrize(
    "name", ["1e3", "010", "0x1", "1:30", "2026-01-31", "null", "yes", "<<", "a: b", "日本", "\x85"]
)
def test_a_dumped_text_stays_a_text(name: str, path: Path, tmp_path: Path) -> None:
    config = load(path)
    config = config.model_copy(update={"run": config.run.model_copy(update={"name": name})})
    dump(config, tmp_path / "config.yaml")
    assert load(tmp_path / "config.yaml") == config


@settings(max_examples=200, deadline=None)
@given(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(allow_nan=False),
        st.text(st.characters(exclude_categories=["Cs"])),
        st.from_regex(r"[-+]?[0-9_.:eExX-]{1,10}", fullmatch=True),
    )
)
def test_whatever_is_written_is_read_back(value: object) -> None:
    again = yaml_text.parse(yaml_text.write({"key": [value]}))["key"][0]
    assert (type(again), again) == (type(value), value)


def test_the_rules_of_layouts_see_the_stage_and_the_world_size(path: Path) -> None:
    seen: list[object] = []

    def check(*facts: object) -> list[object]:
        seen.append(facts[-2:])
        return []

    load(path, ["deepspeed=zero3.json"], 8, check)  # type: ignore[arg-type]
    assert seen == [(3, 8)]


def test_every_file_of_the_presets_folder_is_a_preset() -> None:
    assert len(preset_names()) == len(list(shipped.folder("presets").iterdir())) == 22
    for name in preset_names():
        assert RunConfig.model_fields["model"].annotation.model_validate(preset(name))  # type: ignore[union-attr]


def test_what_is_shipped_is_found_and_nothing_else() -> None:
    for name in ("ds_configs", "presets", "slurm"):
        assert any(shipped.folder(name).iterdir())
    with pytest.raises(FileNotFoundError, match="nothing: not among the installed files"):
        shipped.folder("nothing")


def test_the_error_carries_the_file_and_each_problem(path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        load(path, ["training.steps=x", "optimizer.lr=0"])
    assert error.value.source == str(path)
    assert [problem.where for problem in error.value.problems] == ["training.steps", "optimizer.lr"]
