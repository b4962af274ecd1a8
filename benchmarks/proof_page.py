"""Fills docs/results.md from docs/results.json, so that no number in a table is typed.

Every part between <!-- begin SECTION PART --> and <!-- end --> is generated from that section:

    python -m benchmarks.proof_page

With --check it writes nothing and exits with 1 where page and numbers disagree.
"""

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

DOCS = Path(__file__).parents[1] / "docs"
PART = re.compile(r"(<!-- begin (\w+) (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
COLUMNS = (
    ("psnr_y", "PSNR-Y, dB", 2),
    ("top_octave_power_ratio", "top octave", 2),
    ("swd", "SWD", 1),
    ("lowres_consistency_psnr", "lowres, dB", 1),
    ("checkerboard_peak", "peak", 2),
    ("worst_checkerboard_peak", "worst peak", 2),
)

COUNTED = re.compile(r"(teacher|teacher_dpm|student)_\d+")
SAMPLERS = {"teacher_dpm": "teacher by DPM-Solver++"}

Models = Mapping[str, Mapping[str, Any]]


class Claim(NamedTuple):
    """A requirement on the models.

    Attributes:
        values: What was measured, with its unit.
    """

    text: str
    values: str
    is_kept: bool


def fill(page: str, results: Mapping[str, Any]) -> str:
    """Return the page with every generated part replaced.

    Raises:
        ValueError: If nothing makes a part of that name, or its section was not measured.
    """
    makers = {
        "how": how,
        "tables": tables,
        "counts": counts,
        "steps": steps,
        "claims": claims_table,
        "spread": spread,
        "commands": commands,
    }

    def made(match: re.Match[str]) -> str:
        begin, section, name, end = match.groups()
        if name not in makers:
            raise ValueError(f"{name} is no part of the page; use one of {', '.join(makers)}")
        if section not in results:
            raise ValueError(
                f"the page has a section {section} and the results have {', '.join(results)}; "
                f"measure it by benchmarks.proof --section {section}"
            )
        return f"{begin}{makers[name](results[section])}\n{end}"

    return PART.sub(made, page)


def how(results: Mapping[str, Any]) -> str:
    """Return the sentence on how the numbers were measured."""
    settings = results["settings"]
    commit = f", commit {settings['commit'][:7]}" if settings.get("commit") else ""
    return (
        f"Measured on {settings['device']} with {settings['software']}{commit}; "
        f"×{settings['scale']}, {settings['seeds']} seeds of the noise."
    )


def tables(results: Mapping[str, Any]) -> str:
    """Return a table for each set."""
    blocks = []
    for name, one in results["sets"].items():
        head = [f"**{name}**, {one['num_images']} images", *(title for _, title, _ in COLUMNS)]
        rows = [head, ["---"] * len(head)]
        rows += [[in_words(model), *cells_of(found)] for model, found in one["models"].items()]
        blocks.append(as_table(rows))
    return "\n\n".join(blocks)


def cells_of(found: Mapping[str, float], columns: int = len(COLUMNS)) -> list[str]:
    """Return the first columns of a table's row."""
    return [f"{found[key]:.{digits}f}" for key, _, digits in COLUMNS[:columns]]


def as_table(rows: Sequence[Sequence[str]]) -> str:
    """Return rows of cells in Markdown; the first two are the head and its rule."""
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def counts(results: Mapping[str, Any]) -> str:
    """Return teacher and students by the number of their steps, all sets side by side.

    Only those that were measured on every set.
    """
    titles = " · ".join(title for _, title, _ in COLUMNS[:3])
    sets = results["sets"]
    rows = [["evaluations of the network", *(f"{name}: {titles}" for name in sets)]]
    rows.append(["---"] * len(rows[0]))
    for model in next(iter(sets.values()))["models"]:
        if COUNTED.fullmatch(model) and all(model in one["models"] for one in sets.values()):
            found = (one["models"][model] for one in sets.values())
            rows.append([in_words(model), *(" · ".join(cells_of(values, 3)) for values in found)])
    return as_table(rows)


def steps(results: Mapping[str, Any]) -> str:
    """Return the metrics of each student's estimate after each of its steps."""
    rows = [["set", "student", "after step", *(title for _, title, _ in COLUMNS[:3])]]
    rows.append(["---"] * len(rows[0]))
    for name, one in results["sets"].items():
        for model, values in one["models"].items():
            if not model.startswith("teacher"):
                for step, found in values.get("after_step", {}).items():
                    rows.append([name, in_words(model), step, *cells_of(found, 3)])
    return as_table(rows)


def spread(results: Mapping[str, Any]) -> str:
    """Return the largest deviation over seeds of any model's mean over a set."""
    deviations = [
        values["seed_spread"]
        for one in results["sets"].values()
        for values in one["models"].values()
        if "seed_spread" in values
    ]
    if not deviations:
        return "One seed."
    worst = {key: max(one[key] for one in deviations) for key, _, _ in COLUMNS[:5]}
    words = ", ".join(f"{title} {worst[key]:.2g}" for key, title, _ in COLUMNS[:5])
    return (
        f"Standard deviation of a set's mean over {results['settings']['seeds']} seeds of the "
        f"sampling noise, the largest of all models and sets: {words}."
    )


def commands(results: Mapping[str, Any]) -> str:
    """Return the command that measured, an option a line."""
    command = results["settings"]["command"].replace(" --", " \\\n    --")
    return f"```bash\n{command}\n```"


def claims_table(results: Mapping[str, Any]) -> str:
    """Return the requirements on the models, and what was measured."""
    rows = [["asked", "measured", "kept"], ["---"] * 3]
    rows += [[c.text, c.values, "yes" if c.is_kept else "**no**"] for c in claims(results)]
    return as_table(rows)


def claims(results: Mapping[str, Any]) -> list[Claim]:
    """Return each claim about teacher and four-step student with its numbers."""
    sets: dict[str, Models] = {name: one["models"] for name, one in results["sets"].items()}
    found: list[Claim] = []

    def at_least(text: str, model: str, key: str, limits: Mapping[str, float], digits: int) -> None:
        limits = {name: limit for name, limit in limits.items() if name in sets}
        if limits and all(model in sets[name] for name in limits):
            got = {name: sets[name][model][key] for name in limits}
            words = " / ".join(f"{value:.{digits}f}" for value in got.values())
            found.append(Claim(text, words, all(got[n] >= limit for n, limit in limits.items())))

    at_least(
        "teacher, one step: PSNR-Y ≥ 37.8 on Set5, 33.3 on Set14",
        "teacher_1", "psnr_y", {"Set5": 37.8, "Set14": 33.3}, 2,
    )  # fmt: skip
    at_least(
        "teacher, 100 steps: top octave ≥ 0.7 on Set14",
        "teacher_100", "top_octave_power_ratio", {"Set14": 0.7}, 2,
    )  # fmt: skip
    at_least(
        "student, four steps: PSNR-Y ≥ 35.0 on Set5, 31.0 on Set14",
        "student_4", "psnr_y", {"Set5": 35.0, "Set14": 31.0}, 2,
    )  # fmt: skip
    at_least(
        "student, four steps: lowres consistency ≥ 40 dB on every set",
        "student_4", "lowres_consistency_psnr", dict.fromkeys(sets, 40.0), 1,
    )  # fmt: skip
    return found + student_claims(sets)


def student_claims(sets: Mapping[str, Models]) -> list[Claim]:
    """Return the claims that compare the four-step student with 1 or with its teacher."""
    having = {name: models for name, models in sets.items() if "student_4" in models}
    found = []
    ratios = {
        name: models["student_4"]["top_octave_power_ratio"]
        for name, models in having.items()
        if name != "Set5"
    }
    if ratios:
        found.append(
            Claim(
                f"student, four steps: top octave within 0.8–1.2 on {' and '.join(ratios)}",
                " / ".join(f"{ratio:.2f}" for ratio in ratios.values()),
                all(0.8 <= ratio <= 1.2 for ratio in ratios.values()),
            )
        )
    for other, factor, text in (
        ("teacher_100", 1.0, "SWD at most the teacher's in 100 steps"),
        ("teacher_5", 0.7, "SWD at least 30 % below the teacher's in five steps"),
    ):
        pairs = {
            name: (models["student_4"]["swd"], models[other]["swd"])
            for name, models in having.items()
            if other in models
        }
        if pairs:
            words = " / ".join(
                f"{name} {ours:.1f} against {theirs:.1f}" for name, (ours, theirs) in pairs.items()
            )
            kept = all(ours <= factor * theirs for ours, theirs in pairs.values())
            found.append(Claim(f"student, four steps: {text}", words, kept))
    peaks = {name: models["student_4"]["checkerboard_peak"] for name, models in having.items()}
    if peaks:
        words = " / ".join(f"{name} {peak:.2f}" for name, peak in peaks.items())
        text = "student, four steps: no checkerboard peak above twice its neighbours (means)"
        found.append(Claim(text, words, all(peak <= 2 for peak in peaks.values())))
    return found


def in_words(model: str) -> str:
    """Return teacher_100 as `teacher, 100 steps`, and without_features as `without features`."""
    match = re.fullmatch(r"(.*)_(\d+)", model)
    if match is None:
        return model.replace("_", " ")
    name, count = match.groups()
    called = SAMPLERS.get(name, name.replace("_", " "))
    return f"{called}, {count} step{'' if count == '1' else 's'}"


def main() -> None:
    """Fill the page, or check it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--page", type=Path, default=DOCS / "results.md")
    parser.add_argument("--json", type=Path, default=DOCS / "results.json")
    options = parser.parse_args()
    page = options.page.read_text(encoding="utf-8")
    filled = fill(page, json.loads(options.json.read_text(encoding="utf-8")))
    if options.check:
        raise SystemExit(page != filled)
    options.page.write_text(filled, encoding="utf-8")
    print(options.page.resolve())


if __name__ == "__main__":
    main()
