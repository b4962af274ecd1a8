import tomllib
from pathlib import Path

import pytest
import torch
import yaml

from benchmarks.ship_model import card_of
from ksr_distill.export import model_card

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]


def exported_card():
    record = {
        "kind": "student", "student_timesteps": [979], "scale": 2, "update": 3, "metrics": {},
        "config": {"name": "tiny", "data": {}},
    }  # fmt: skip
    weights = {"student_ema.weight": torch.zeros(1)}
    return model_card({"ksr": record, "state_dict": weights}, Path("last.ckpt"), None)


def shipped_card():
    facts = {"what": "a student", "data": "Noise.", "commands": [], "commit": "abc", "note": ""}
    return card_of("tiny", "student", facts, {"sets": {}})


@pytest.mark.parametrize("card_from", [exported_card, shipped_card])
def test_a_card_begins_with_what_the_hub_reads_and_the_licence_of_the_project(card_from):
    before, front, text = card_from().split("---\n", 2)
    facts = yaml.safe_load(front)
    assert not before
    assert facts["license"] == PROJECT["license"].lower()
    assert facts["library_name"] == "diffusers"
    assert facts["pipeline_tag"] == "image-to-image"
    assert text.startswith("\n# tiny: ")
