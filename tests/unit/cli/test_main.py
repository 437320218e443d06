"""What the program promises whatever the command: exit codes, one line an error, nothing heavy for a help text."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from importlib import metadata

import click
import pytest

from llmscale.cli import main as program
from llmscale.errors import CheckpointError, ConfigError, DataError, LlmscaleError, Problem, UsageError


@pytest.fixture
def swap(monkeypatch: pytest.MonkeyPatch) -> Callable[[click.Command], None]:
    """Put a command in the place of `pretrain`."""

    def put(command: click.Command) -> None:
        monkeypatch.setattr("llmscale.cli.pretrain.command", command)

    return put


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as end:
        program.main(list(arguments))
    assert isinstance(end.value.code, int)
    return end.value.code


def raising(error: BaseException) -> click.Command:
    @click.command()
    def command() -> None:
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "code", "lines"),
    [
        (LlmscaleError("it broke"), 1, ["error: it broke"]),
        (DataError("data/train: two\nproblems"), 1, ["error: data/train: two", "error: problems"]),
        (CheckpointError("step_00000002: no manifest"), 1, ["error: step_00000002: no manifest"]),
        (UsageError("cannot be"), 2, ["error: cannot be"]),
        (
            ConfigError("run.yaml", [Problem("a.b", "too large", "use 2"), Problem("c", "unknown")]),
            2,
            ["error: run.yaml: a.b: too large; use 2", "error: run.yaml: c: unknown"],
        ),
        (LlmscaleError(), 1, ["error: LlmscaleError"]),
    ],
)
def test_own_errors_are_lines_and_an_exit_code(
    swap: Callable[[click.Command], None],
    capsys: pytest.CaptureFixture[str],
    error: LlmscaleError,
    code: int,
    lines: list[str],
) -> None:
    swap(raising(error))
    assert run("pretrain") == code
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.splitlines() == lines


def test_a_quiet_error_keeps_its_exit_code_and_says_nothing(
    swap: Callable[[click.Command], None], capsys: pytest.CaptureFixture[str]
) -> None:
    error = UsageError("another rank says it")
    error.quiet = True
    swap(raising(error))
    assert run("pretrain") == 2
    assert capsys.readouterr() == ("", "")


def test_an_interrupt_is_130_without_a_traceback(
    swap: Callable[[click.Command], None], capsys: pytest.CaptureFixture[str]
) -> None:
    swap(raising(KeyboardInterrupt()))
    assert run("pretrain") == 130
    assert capsys.readouterr().err.strip() == ""


@pytest.mark.parametrize("error", [ValueError("a defect"), EOFError("a pipe that ended"), OSError("disk")])
def test_a_defect_keeps_its_traceback(swap: Callable[[click.Command], None], error: Exception) -> None:
    swap(raising(error))
    with pytest.raises(type(error), match=str(error)):
        program.main(["pretrain"])


def test_a_commands_own_exit_code_is_the_programs(swap: Callable[[click.Command], None]) -> None:
    @click.command()
    @click.pass_context
    def command(context: click.Context) -> None:
        context.exit(3)

    swap(command)
    assert run("pretrain") == 3


def test_done_is_0(swap: Callable[[click.Command], None]) -> None:
    swap(click.Command("nothing", callback=lambda: None))
    assert run("pretrain") == 0


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["pretrian"], "error: no command 'pretrian'; did you mean pretrain? (see llmscale --help)"),
        (["checkpoints"], "error: no command 'checkpoints'; did you mean checkpoint? (see llmscale --help)"),
        (
            ["zzz"],
            "error: no command 'zzz'; there are pretrain, generate, evaluate, data, checkpoint, convert, slurm, doctor "
            "(see llmscale --help)",
        ),
        (["pretrain"], "error: Missing argument 'CONFIG' (see llmscale pretrain --help)"),
    ],
)
def test_wrong_usage_is_one_line_and_2(arguments: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*arguments) == 2
    assert capsys.readouterr() == ("", line + "\n")


@pytest.mark.parametrize("arguments", [["--nonsense"], ["pretrain", "--nonsense"], ["data", "build", "--nonsense"]])
def test_an_unknown_option_is_named(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert "--nonsense" in line


def test_without_a_command_it_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == 2
    assert "Usage: llmscale" in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--version") == 0
    assert capsys.readouterr().out == f"llmscale {metadata.version('llmscale')}\n"


def shown_commands(group: click.Command | None) -> list[str]:
    """The commands of a group that its help shows."""
    found = group.commands if isinstance(group, click.Group) else {}
    return [name for name, child in found.items() if not child.hidden]


@pytest.mark.parametrize("name", program.COMMANDS)
def test_every_command_has_help_with_an_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(name, "--help") == 0
    shown = capsys.readouterr().out
    assert f"Usage: llmscale {name}" in shown
    # A group's commands carry their own.
    group = program.group.get_command(click.Context(program.group), name)
    for path in [[name, child] for child in shown_commands(group)]:
        assert run(*path, "--help") == 0
        shown = capsys.readouterr().out
        assert "Example:" in shown
    assert "Example:" in shown


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0
    shown = capsys.readouterr().out
    for name in program.COMMANDS:
        assert f"\n  {name} " in shown


def test_help_imports_nothing_heavy() -> None:
    """What keeps `llmscale --help` under 0.3 s."""
    heavy = ("torch", "deepspeed", "megatron", "transformers", "matplotlib", "tokenizers", "numpy", "pydantic", "rich")
    code = (
        "import sys\n"
        "from llmscale.cli.main import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as end:\n    assert end.code == 0\n"
        f"print(sorted(set(sys.modules) & set({heavy!r})))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"
