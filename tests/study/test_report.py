"""The report: the announcement's charts, the raters' habits, and files that others read."""

import csv
import json
import re
import sqlite3
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from ksr_distill.study.findings import check_raters
from ksr_distill.study.report import write_report
from ksr_distill.study.schema import DATABASE_NAME, Pair, create_database
from ksr_distill.study.tally import Vote, count_votes, outcome_of, read_tally
from tests.study.studies import write_picture

NASTY = "<script>alert('$x^2$ & co')</script>"
SETTINGS = {
    "question": "Which is better?",
    "label_a": "before",
    "label_b": "after",
    "votes_per_pair": "1",
    "votes_per_rater": "0",
    "check_every": "20",
    "lease_seconds": "600",
}
# 28/15/19/37 % of 2100 votes, as whole votes that round to them.
ANNOUNCED = ["b"] * 597 + ["a"] * 322 + ["both"] * 404 + ["neither"] * 777


def study_of(
    folder: Path,
    votes: list[tuple[int, str, str, str]],
    *,
    categories: list[str],
    num_checks: int = 0,
) -> Path:
    """Write a study with these (pair, rater, left, outcome) votes, as the server stores them."""
    write_picture(folder / "pictures" / "x.jpg")
    pairs = [
        Pair(index + 1, "pair", f"p{index}", NASTY, category, 48, 32, "x.jpg", "x.jpg")
        for index, category in enumerate(categories)
    ]
    for index in range(num_checks):
        number = len(categories) + index + 1
        pairs.append(Pair(number, "blurred", "p0", NASTY, "c", 48, 32, "x.jpg", "x.jpg"))
    create_database(folder / DATABASE_NAME, pairs, SETTINGS)
    with sqlite3.connect(folder / DATABASE_NAME) as connection:
        for rater in sorted({vote[1] for vote in votes}):
            connection.execute("INSERT INTO rater VALUES (?, ?, 1, 0)", (rater, rater))
        for number, (pair, rater, left, outcome) in enumerate(votes):
            row = (pair, rater, left, number, 0)
            connection.execute("INSERT INTO assignment VALUES (?,?,?,?,?)", row)
            choice = outcome
            if outcome in "ab":
                choice = "left" if outcome == left else "right"
            row = (f"{number:032x}", pair, rater, choice, 2500, 1.7e9 + number)
            connection.execute("INSERT INTO vote VALUES (?,?,?,?,?,?)", row)
    return folder


@pytest.fixture(scope="module")
def announced(tmp_path_factory) -> Path:
    """The announcement's study, reported: 21 categories of 100 prompts, 21 raters."""
    rng = np.random.default_rng(0)
    outcomes = rng.permutation(ANNOUNCED).tolist()
    sides = rng.permutation(["a", "b"] * 1050).tolist()
    votes = [
        (index + 1, f"rater {index % 21:02d}", sides[index], outcomes[index])
        for index in range(2100)
    ]
    folder = tmp_path_factory.mktemp("announced")
    names = [f"category {index:02d}" for index in range(20)] + [NASTY]
    study_of(folder, votes, categories=[names[index // 100] for index in range(2100)])
    write_report(folder, folder / "report")
    return folder / "report"


def test_the_announcements_votes_give_its_chart_and_its_difference(announced):
    report = json.loads((announced / "report.json").read_text())
    overall = report["overall"]
    shares = [round(100 * overall[outcome][0]) for outcome in ("b", "a", "both", "neither")]
    assert shares == [28, 15, 19, 37]
    estimate, low, high = (100 * value for value in overall["difference"])
    assert estimate == pytest.approx(13, abs=0.2)
    assert (high - low) / 2 == pytest.approx(2.7, abs=0.1)
    assert "Decided: raters prefer after" in report["verdicts"][0]
    chart = charts_in(announced)[0]
    texts = [element.text for element in chart.iter("{http://www.w3.org/2000/svg}text")]
    for label in ("28 %", "15 %", "19 %", "37 %", "after better", "neither"):
        assert label in texts


def charts_in(report: Path) -> list[ElementTree.Element]:
    html = (report / "report.html").read_text()
    return [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", html, re.DOTALL)]


def test_the_category_chart_shows_every_category_and_most_stay_open(announced):
    _, chart = charts_in(announced)
    texts = [element.text for element in chart.iter("{http://www.w3.org/2000/svg}text")]
    assert {f"category {index:02d}" for index in range(20)} <= set(texts)
    assert NASTY in texts  # text, not a tag, not mathematics
    report = json.loads((announced / "report.json").read_text())
    decided = [category["is_decided"] for category in report["categories"].values()]
    assert len(decided) == 21
    assert sum(decided) < 8
    verdicts = " ".join(report["verdicts"])
    assert "does not mean equal" in verdicts
    assert "Do not rank" in verdicts
    assert "No pair has two votes" in verdicts


def test_the_report_is_one_file_that_runs_nothing_and_loads_nothing(announced):
    html = (announced / "report.html").read_text()
    assert "<script" not in html
    assert not re.findall(r'(?:src|href)="(?!data:|#)', html)
    ids = re.findall(r'\sid="([^"]+)"', html)
    assert len(ids) == len(set(ids))


def test_the_same_votes_give_the_same_report(announced, tmp_path):
    write_report(announced.parent, tmp_path)
    for name in ("report.json", "votes.csv", "label_studio.json"):
        assert (tmp_path / name).read_bytes() == (announced / name).read_bytes()


def test_votes_csv_gives_back_the_announcements_counts(announced):
    with (announced / "votes.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    outcomes = [row["outcome"] for row in rows]
    assert [outcomes.count(outcome) for outcome in ("b", "a", "both", "neither")] == [
        597,
        322,
        404,
        777,
    ]
    for row in rows:
        assert outcome_of(row["left_is"], row["choice"]) == row["outcome"]


def test_label_studio_gets_a_choice_it_knows_for_every_vote(announced):
    tasks = json.loads((announced / "label_studio.json").read_text())
    config = ElementTree.parse(announced / "label_studio.xml")
    known = {choice.get("value") for choice in config.iter("Choice")}
    names = {element.get("name") for element in config.iter()}
    results = [r for task in tasks for note in task["annotations"] for r in note["result"]]
    assert len(tasks) == len(results) == 2100
    for result in results:
        assert set(result["value"]["choices"]) <= known
        assert {result["from_name"], result["to_name"]} <= names
    fields = re.findall(r"\$(\w+)", (announced / "label_studio.xml").read_text())
    assert set(fields) <= set(tasks[0]["data"])


def many_votes(
    rater: str, num_votes: int, left_share: float, rng: np.random.Generator
) -> list[Vote]:
    """A rater who looks at nothing but the side, with the given taste for the left one."""
    votes = []
    for index in range(num_votes):
        choice = "left" if rng.random() < left_share else "right"
        left = "ab"[index % 2]
        shown = (f"{rater}{index}", index, "pair", f"p{index}", "c", rater, rater, left)
        votes.append(Vote(*shown, choice, outcome_of(left, choice), 2500, 0.0))
    return votes


def test_a_rater_who_favours_a_side_is_flagged_and_fair_ones_are_not():
    rng = np.random.default_rng(0)
    votes = [vote for name in "abcdefghij" for vote in many_votes(name, 100, 0.5, rng)]
    votes += many_votes("lefty", 100, 0.8, rng)
    checks = check_raters(votes)
    assert checks[0].name == "lefty"
    assert checks[0].flags == ["prefers the left side"]
    assert not any(check.flags for check in checks[1:])


def test_fair_raters_are_rarely_accused():
    rng = np.random.default_rng(1)
    accused = 0
    for _ in range(100):
        votes = [vote for name in "abcdefghijkl" for vote in many_votes(name, 60, 0.5, rng)]
        accused += any(check.flags for check in check_raters(votes))
    assert accused <= 12  # 5 % of such studies, by Holm


def test_habits_and_failed_checks_are_flagged(tmp_path):
    votes = [(pair, "same", "ab"[pair % 2], "both") for pair in range(1, 31)]
    votes += [(pair, "blind", "ab"[pair % 2], "ab"[pair // 2 % 2]) for pair in range(1, 31)]
    votes += [(31 + check, "blind", "a", "b") for check in range(3)]  # prefers the blurred one
    votes += [(31 + check, "same", "b", "a") for check in range(3)]
    study = study_of(tmp_path, votes, categories=["c"] * 30, num_checks=3)
    flags = {check.name: check.flags for check in check_raters(read_tally(study).votes)}
    assert flags == {"same": ["answers both nearly always"], "blind": ["fails attention checks"]}
    findings = write_report(study, tmp_path / "report")
    assert findings.overall.num_votes == 60  # checks are no part of any share
    assert findings.side_total == 30
    assert findings.without_flagged is None  # nobody else is left


def test_the_most_disputed_pairs_come_first_with_their_pictures(tmp_path):
    votes = [(pair, f"r{n}", "a", "b") for pair in (1, 2, 3) for n in range(4)]
    votes += [(4, f"r{n}", "a", "ab"[n % 2]) for n in range(4)]
    votes += [(5, f"r{n}", "a", "a" if n else "b") for n in range(4)]
    study = study_of(tmp_path, votes, categories=["c"] * 5)
    findings = write_report(study, tmp_path / "report")
    assert [item.pair.id for item in findings.disputed] == [4, 5]
    html = (tmp_path / "report" / "report.html").read_text()
    assert html.count("data:image/jpeg;base64,") == 4
    assert NASTY not in html


def test_sides_are_mapped_back_to_the_pictures():
    assert outcome_of("a", "left") == outcome_of("b", "right") == "a"
    assert outcome_of("b", "left") == outcome_of("a", "right") == "b"
    assert outcome_of("a", "both") == outcome_of("b", "both") == "both"


def test_counts_follow_the_order_of_the_pairs(tmp_path):
    votes = [(1, "r", "a", "b"), (2, "r", "b", "a"), (2, "s", "a", "neither")]
    tally = read_tally(study_of(tmp_path, votes, categories=["y", "x"]))
    assert [pair.id for pair in tally.pairs] == [2, 1]  # by category
    assert count_votes(tally.pairs, tally.votes).tolist() == [[1, 0, 0, 1], [0, 1, 0, 0]]


def test_a_study_without_votes_is_told_what_to_do(tmp_path):
    with pytest.raises(ValueError, match="no votes to summarise; collect some"):
        write_report(study_of(tmp_path, [], categories=["c"]), tmp_path / "report")
    assert not (tmp_path / "report").exists()
