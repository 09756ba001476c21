"""The table over seeds: what `make results` reached, from the report of each seed.

    python -m tools.results docs/results/costly
"""

import json
from pathlib import Path

from config import cli, run, settings
import numpy as np
from tyro.conf import Positional

from lib.report import table_rows


@settings
class ResultsConfig:
    folder: Positional[str] = "docs/results/costly"       # with a report.json of each seed, as NAME.json


FORMS = {"val_loss": ".4f", "gap": ".4f", "kl": ".4f", "top1": ".1%"}


def read_report(path: Path) -> dict | None:
    """A distillation's report; None for another JSON file.

    Raises ValueError, with the path, for a damaged one.
    """
    try:
        report = json.loads(path.read_bytes())
        if not isinstance(report, dict) or not report.get("stages") or isinstance(report["stages"], str):
            return None                                    # settings.json names its stages in a text
        numbers = [row[key] for row in table_rows(report) for key in (*FORMS, "tokens")]
        for x in (*numbers, report["teacher"]["val_loss"]):
            format(x, ",.4f")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as e:
        raise ValueError(f"{path} is damaged ({type(e).__name__}: {e}): remove it and make it anew") from None
    return report


def collect(folder: Path) -> str:
    """A table of several seeds' reports: per stage and control, median and range."""
    reports = list(filter(None, map(read_report, sorted(folder.glob("*.json")))))
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
    for name, group in rows.items():
        cells = [cell([row[key] for row in group], form) for key, form in FORMS.items()]
        lines.append(f"| {name} | {group[0]['tokens']:,} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    print(collect(Path(cli(ResultsConfig, argv).folder)))


if __name__ == "__main__":
    run(main)
