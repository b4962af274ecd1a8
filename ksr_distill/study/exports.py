"""The votes as other programs read them: votes.csv and Label Studio's JSON."""

import csv
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ksr_distill.study.tally import Tally, Vote

CSV_COLUMNS = (
    "vote_id", "rater", "kind", "pair", "prompt_id", "category", "left_is", "choice", "outcome",
    "seconds", "at",
)  # fmt: skip

# The labelling interface that fits the exported tasks: paste it into the project's settings.
LABEL_STUDIO_CONFIG = """<View>
  <Header value="$question"/>
  <Text name="prompt" value="$prompt"/>
  <View style="display: flex">
    <Image name="a" value="$image_a" zoom="true" zoomControl="true"/>
    <Image name="b" value="$image_b" zoom="true" zoomControl="true"/>
  </View>
  <Choices name="preference" toName="a" choice="single" required="true">
    <Choice value="a"/> <Choice value="b"/> <Choice value="both"/> <Choice value="neither"/>
  </Choices>
</View>
"""


def write_votes_csv(path: Path, votes: list[Vote]) -> None:
    """Write one line for each vote, attention checks included."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(CSV_COLUMNS)
        for vote in votes:
            about = (vote.id, vote.name, vote.kind, vote.pair, vote.prompt_id, _cell(vote.category))
            seconds = f"{vote.milliseconds / 1000:.3f}"
            answer = (vote.left, vote.choice, vote.outcome, seconds, _iso(vote.at))
            writer.writerow([*about, *answer])


def _cell(text: str) -> str:
    """Return the text so that a spreadsheet does not run it as a formula."""
    return "'" + text if text.startswith(("=", "+", "-", "@", "\t")) else text


def _iso(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds")


def label_studio_tasks(tally: Tally) -> list[dict[str, Any]]:
    """Return one task for each pair, its votes as annotations; pictures are relative paths."""
    annotations: dict[int, list[dict[str, Any]]] = {}
    for vote in tally.votes:
        annotations.setdefault(vote.pair, []).append(_annotation(vote))
    return [
        {
            "data": {
                "question": tally.settings["question"],
                "prompt": pair.prompt,
                "prompt_id": pair.prompt_id,
                "category": pair.category,
                "image_a": f"pictures/{pair.picture_a}",
                "image_b": f"pictures/{pair.picture_b}",
            },
            "annotations": annotations.get(pair.id, []),
        }
        for pair in tally.pairs
        if pair.kind == "pair"
    ]


def _annotation(vote: Vote) -> dict[str, Any]:
    result = {
        "from_name": "preference",
        "to_name": "a",
        "type": "choices",
        "value": {"choices": [vote.outcome]},
    }
    return {
        "unique_id": vote.id,
        "completed_by": {"email": f"{vote.rater}@raters.invalid"},
        "lead_time": vote.milliseconds / 1000,
        "created_at": _iso(vote.at),
        "result": [result],
    }


def write_label_studio(folder: Path, tally: Tally) -> None:
    """Write the tasks and the labelling interface that shows them."""
    tasks = json.dumps(label_studio_tasks(tally), ensure_ascii=False, indent=1)
    (folder / "label_studio.json").write_text(tasks, encoding="utf-8")
    (folder / "label_studio.xml").write_text(LABEL_STUDIO_CONFIG, encoding="utf-8")
