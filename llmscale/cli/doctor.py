"""`llmscale doctor`: what this machine can do, what it lacks, and what that costs."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from rich.text import Text

    from llmscale.doctor import Finding


@click.command(epilog="Example: llmscale doctor --json")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(as_json: bool) -> None:
    """Look at devices, process groups, kernels and versions, and say what is missing and what it costs.

    Always exits with 0: what is missing is a finding.
    """
    from llmscale import doctor

    findings = doctor.examine()
    if as_json:
        click.echo(json.dumps(doctor.as_json(findings), indent=2))
    else:
        _show(findings)


def _show(findings: list[Finding]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    for section in dict.fromkeys(finding.section for finding in findings):
        table = Table(title=section, title_justify="left", title_style="bold", show_header=False, box=None)
        table.add_column(width=1)
        table.add_column(style="cyan", min_width=24, no_wrap=True)
        table.add_column(overflow="fold")
        for finding in findings:
            if finding.section == section:
                table.add_row(_mark(finding), finding.name, Text(finding.detail))
        console.print(table)
        console.print()
    lacking = [finding for finding in findings if finding.costs]
    if not lacking:
        console.print(Text("Nothing is missing.", style="bold green"))
        return
    console.print(Text("What is missing, and what it costs", style="bold"))
    for finding in lacking:
        fix = f"; {finding.fix}" if finding.fix else ""
        console.print(Text(f"  {finding.name}: {finding.detail}: {finding.costs}{fix}"), soft_wrap=True)


def _mark(finding: Finding) -> Text:
    from rich.text import Text

    if finding.costs:
        return Text("!", style="bold yellow")
    return Text("✓", style="green") if finding.found else Text("–", style="dim")
