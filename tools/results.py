"""The table over seeds: what `make results` reached, from the report of each seed.

    python -m tools.results docs/results
"""

import json
from pathlib import Path

import numpy as np
from tyro.conf import Positional

from config import cli, run, settings
from lib.report import table_rows


@settings
class ResultsConfig:
    folder: Positional[str] = "docs/results"       # with a report.json of each seed, as NAME.json

    def __post_init__(self):
        if not self.folder:                        # an unset "$FOLDER" in the shell
            raise ValueError("the folder is empty: name one, or omit it")


def collect(folder: Path) -> str:
    """A table over the reports of several seeds: per stage and control the median, and
    the range.
    """
    reports = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    reports = [report for report in reports if isinstance(report, dict) and report.get("stages")]
    if not reports:
        raise ValueError(f"no reports in {folder}: run make results first")
    rows: dict[str, list[dict]] = {}
    for report in reports:
        for row in table_rows(report):
            rows.setdefault(row["name"], []).append(row)

    def cell(values: list[float], form: str) -> str:
        low, middle, high = (format(f(values), form) for f in (min, np.median, max))
        return middle if len(values) == 1 else f"{middle} ({low} ... {high})"

    teacher = reports[0]["teacher"]["val_loss"]
    lines = [f"Teacher: {teacher:.4f} nats per token. {len(reports)} seeds; median (least ... most).", "",
             "| | tokens | val loss | gap | KL | top-1 |",
             "|---|---:|---:|---:|---:|---:|"]
    forms = {"val_loss": ".4f", "gap": ".4f", "kl": ".4f", "top1": ".1%"}
    for name, group in rows.items():
        cells = [cell([row[key] for row in group], form) for key, form in forms.items()]
        lines.append(f"| {name} | {group[0]['tokens']:,} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    print(collect(Path(cli(ResultsConfig, argv).folder)))


if __name__ == "__main__":
    run(main)
