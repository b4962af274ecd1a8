"""Tiny studies, and a real server process to talk to."""

import csv
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import numpy as np
from PIL import Image

from ksr_distill.study.basket import Prompt, read_basket
from ksr_distill.study.build import StudyPlan, build_study


def write_basket(path: Path, rows: list[tuple[str, str, str]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("id", "prompt", "category"), *rows])
    return path


def write_picture(path: Path, size: tuple[int, int] = (48, 32), seed: int = 0) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def make_study_of(
    folder: Path,
    prompts: list[Prompt],
    small: tuple[int, int] = (24, 16),
    large: tuple[int, int] = (48, 32),
    **plan: object,
) -> Path:
    for seed, prompt in enumerate(prompts):
        write_picture(folder / "before" / f"{prompt.id}.png", small, seed)
        write_picture(folder / "after" / f"{prompt.id}.png", large, seed)
    basket = read_basket(write_basket(folder / "basket.csv", prompts))
    plan = {"num_checks": 0, "label_a": "before", "label_b": "after", **plan}
    build_study(
        folder / "before", folder / "after", basket, folder / "study", plan=StudyPlan(**plan)
    )
    return folder / "study"


class Server:
    """``ksr study serve`` in a process of its own, which can be killed and started again."""

    def __init__(self, study: Path) -> None:
        self.study = study
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[str] | None = None
        self.invitation = ""

    def start(self) -> None:
        command = [sys.executable, "-c", "from ksr_distill.cli import main; main()"]
        command += ["study", "serve", str(self.study), "--port", str(self.port)]
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        line = self.process.stdout.readline()
        self.invitation = re.search(r"/join/\w+", line).group()
        for _ in range(300):
            try:
                httpx.get(self.url, timeout=5)
                return
            except httpx.TransportError:
                time.sleep(0.05)
        raise TimeoutError(f"{self.url} does not answer")

    def kill(self) -> None:
        """End the process at once, as a power cut does."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        self.process.stdout.close()

    def join(self, name: str) -> httpx.Client:
        client = httpx.Client(base_url=self.url, timeout=30)
        answer = client.post(self.invitation, data={"name": name})
        assert answer.status_code == 303, answer.text
        return client
