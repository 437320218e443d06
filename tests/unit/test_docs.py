"""The pages that are made from the code are what the code makes of them: `make docs` writes them anew."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from llmscale.config import reference
from llmscale.config.schema import Model, RunConfig
from llmscale.distributed import rules
from llmscale.models.family import families

ROOT = Path(__file__).resolve().parents[2]
RULES = re.compile(r"(?<=<!-- rules -->\n).*(?=<!-- end of the rules -->)", re.DOTALL)


def parameters(model: Model) -> int:
    assert model.vocab_size is not None
    return sum(weight.numel for weight in families()[model.family].parameters(model, model.vocab_size))


def config_page() -> str:
    return reference.markdown(parameters)


def layouts_page() -> str:
    """The page as it is, with the table of rules as it should be."""
    return RULES.sub(lambda _: f"\n{rules.table()}\n", (ROOT / "docs/layouts.md").read_text(encoding="utf-8"))


PAGES = {"docs/config.md": config_page, "docs/layouts.md": layouts_page}


@pytest.mark.parametrize("name", PAGES)
def test_the_page_says_what_the_code_does(name: str) -> None:
    written = (ROOT / name).read_text(encoding="utf-8")
    assert written == PAGES[name](), f"{name} is out of date; run: make docs"


def test_every_key_stands_in_the_config_page() -> None:
    page = config_page()
    for section in RunConfig.model_fields.values():
        for key in getattr(section.annotation, "model_fields", {}):
            assert f"| `{key}` | " in page


def test_the_table_of_rules_is_in_its_page() -> None:
    assert len(RULES.findall((ROOT / "docs/layouts.md").read_text(encoding="utf-8"))) == 1
    assert rules.table().count("\n") == len(rules.RULES) + 2


@pytest.mark.parametrize(
    "page", [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md"], ids=lambda page: page.name
)
def test_what_a_page_links_to_exists(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


if __name__ == "__main__":
    for name, make in PAGES.items():
        (ROOT / name).write_text(make(), encoding="utf-8")
