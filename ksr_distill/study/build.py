"""Make a study folder from two folders of pictures and a basket of prompts."""

import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, NamedTuple

from ksr_distill.study.basket import Prompt
from ksr_distill.study.pictures import (
    PictureFormat,
    blur_heavily,
    find_pictures,
    read_pair,
    write_shown,
)
from ksr_distill.study.schema import DATABASE_NAME, Pair, create_database
from ksr_distill.study.statistics import rng_for
from ksr_distill.study.tokens import write_secret


class StudyPlan(NamedTuple):
    """A study's settings, which are stored in it.

    Attributes:
        votes_per_pair: Raters that judge each pair.
        votes_per_rater: Pairs and checks that one rater is given at most; 0 for no limit.
        check_every: Pairs between two attention checks.
        num_checks: Checks built of each kind, identical and blurred.
        lease_seconds: How long a pair stays reserved for the rater to whom it was given.
        first_view: One picture pixel per screen pixel, or the whole picture.
    """

    question: str = "Which picture has the better visual quality?"
    label_a: str = "A"
    label_b: str = "B"
    votes_per_pair: int = 3
    votes_per_rater: int = 0
    check_every: int = 20
    num_checks: int = 10
    lease_seconds: int = 600
    first_view: Literal["full", "fit"] = "full"
    prompts_shown: Literal["yes", "no"] = "yes"
    picture_format: PictureFormat = "jpeg"
    seed: int = 0

    def check(self) -> None:
        """Raise ValueError for a number out of range, or for equal labels."""
        least = {
            "votes_per_pair": 1,
            "votes_per_rater": 0,
            "check_every": 1,
            "num_checks": 0,
            "lease_seconds": 30,
            "seed": 0,
        }
        for key, lowest in least.items():
            if getattr(self, key) < lowest:
                raise ValueError(f"{key}={getattr(self, key)} is too small; use {lowest} or more")
        if self.label_a == self.label_b:
            raise ValueError(f"both sides are called {self.label_a!r}; give them different labels")


def build_study(
    folder_a: Path,
    folder_b: Path,
    prompts: list[Prompt],
    out: Path,
    *,
    plan: StudyPlan,
    on_picture: Callable[[], None] = lambda: None,
) -> None:
    """Write the study; the folders are not needed afterwards.

    Args:
        on_picture: Called after each pair, for a progress bar.

    Raises:
        ValueError: The folders do not match the basket, a picture cannot be shown, or the study
            exists. No partial study remains.
    """
    plan.check()
    if out.exists():
        raise ValueError(f"{out}: exists; a study is never overwritten, choose another folder")
    files_a, files_b = find_pictures(folder_a, prompts), find_pictures(folder_b, prompts)
    partial = out.with_name(out.name + ".partial")
    if partial.exists():
        shutil.rmtree(partial)
    (partial / "pictures").mkdir(parents=True)
    try:
        jobs = list(_jobs(prompts, plan))
        with ThreadPoolExecutor() as pool:
            pairs = []
            for pair in pool.map(lambda job: _write(job, files_a, files_b, partial, plan), jobs):
                pairs.append(pair)
                on_picture()
        settings = {key: str(value) for key, value in plan._asdict().items()}
        create_database(partial / DATABASE_NAME, pairs, settings)
        write_secret(partial)
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial)
        raise


class _Job(NamedTuple):
    number: int
    kind: str
    prompt: Prompt


def num_jobs(prompts: list[Prompt], plan: StudyPlan) -> int:
    """Return how many pairs ``build_study`` writes, checks included."""
    return len(prompts) + 2 * min(plan.num_checks, len(prompts))


def _jobs(prompts: list[Prompt], plan: StudyPlan) -> Iterator[_Job]:
    """Number pairs and checks in one shuffle, so that a number does not reveal its kind."""
    rng = rng_for(plan.seed, 0)
    numbers = iter((rng.permutation(num_jobs(prompts, plan)) + 1).tolist())
    for prompt in prompts:
        yield _Job(next(numbers), "pair", prompt)
    for kind in ("identical", "blurred"):
        chosen = rng.choice(len(prompts), size=min(plan.num_checks, len(prompts)), replace=False)
        for index in chosen.tolist():
            yield _Job(next(numbers), kind, prompts[index])


def _write(
    job: _Job, files_a: dict[str, Path], files_b: dict[str, Path], partial: Path, plan: StudyPlan
) -> Pair:
    picture_a, picture_b = read_pair(files_a[job.prompt.id], files_b[job.prompt.id])
    stem = partial / "pictures" / f"{job.number:06d}"
    if job.kind == "pair":
        pictures = (picture_a, picture_b)
    elif job.kind == "blurred":
        pictures = (picture_b, blur_heavily(picture_b))
    else:
        pictures = (picture_b, picture_b)
    names = [
        write_shown(picture, stem.with_name(f"{stem.name}_{side}"), plan.picture_format)
        for side, picture in zip("ab", pictures, strict=True)
    ]
    return Pair(job.number, job.kind, *job.prompt, *picture_b.size, names[0], names[1])


def expected_choice(kind: str, left: str) -> tuple[str, ...]:
    """Return the answers that pass an attention check; the sharp picture of a blurred one is A."""
    if kind == "identical":
        return ("both", "neither")
    return ("left",) if left == "a" else ("right",)
