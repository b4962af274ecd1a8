"""``ksr study``: side-by-side studies with human raters."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ksr_distill.cli.errors import one_line_errors

study = typer.Typer(no_args_is_help=True, help="Ask people which of two pictures is better.")

Basket = Annotated[Path, typer.Option(help="CSV file with the columns id, prompt, category.")]
StudyFolder = Annotated[Path, typer.Argument(help="A study that ksr study build made.")]


class View(StrEnum):
    """How a pair is shown at first."""

    FULL = "full"
    FIT = "fit"


class Format(StrEnum):
    """File format of the study's pictures."""

    JPEG = "jpeg"
    PNG = "png"


class Precision(StrEnum):
    """The model's floating-point type."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"


def register(app: typer.Typer) -> None:
    """Add the command to the console script."""
    app.add_typer(study, name="study")


@contextmanager
def _progress(title: str, total: int) -> Iterator[Callable[[], None]]:
    """Show a bar with the time left on stderr; yield the function that advances it by one."""
    from ksr_distill.cli.progress import counting_bar

    with counting_bar(title, total) as move:
        yield lambda: move(advance=1)


@study.command()
@one_line_errors
def build(
    a: Annotated[Path, typer.Argument(help="Side A: a folder with a picture ID.png for each id.")],
    b: Annotated[Path, typer.Argument(help="Side B: the same ids.")],
    prompts: Basket,
    out: Annotated[Path, typer.Option("-o", "--out", help="The study's folder; must not exist.")],
    label_a: Annotated[str, typer.Option(help="A's name in the report; else the folder's.")] = "",
    label_b: Annotated[str, typer.Option(help="B's name in the report; else the folder's.")] = "",
    question: Annotated[str, typer.Option(help="The question that raters read.")] = (
        "Which picture has the better visual quality?"
    ),
    votes_per_pair: Annotated[int, typer.Option(help="Raters for each pair.")] = 3,
    votes_per_rater: Annotated[int, typer.Option(help="Limit for one rater; 0: none.")] = 0,
    difference: Annotated[float, typer.Option(help="Difference to detect, in points.")] = 13.0,
    agreement: Annotated[float, typer.Option(help="Expected correlation of two raters.")] = 0.3,
    view: Annotated[View, typer.Option(help="At first: true size, or whole picture.")] = View.FULL,
    picture_format: Annotated[
        Format, typer.Option(help="png is lossless and twice as large.")
    ] = Format.JPEG,
    show_prompts: Annotated[bool, typer.Option(help="Show the prompt to raters.")] = True,
    checks: Annotated[int, typer.Option(help="Attention checks of each kind.")] = 10,
    check_every: Annotated[int, typer.Option(help="Pairs per attention check.")] = 20,
    lease_minutes: Annotated[float, typer.Option(help="How long a pair is reserved.")] = 10.0,
    seed: Annotated[int, typer.Option(help="Seed of order and checks.")] = 0,
) -> None:
    """Check two folders of pictures and make a study of them."""
    from ksr_distill.study.basket import read_basket
    from ksr_distill.study.build import StudyPlan, build_study, num_jobs
    from ksr_distill.study.planning import Assumptions, plan_lines

    basket = read_basket(prompts)
    plan = StudyPlan(
        question=question,
        label_a=label_a or a.resolve().name,
        label_b=label_b or b.resolve().name,
        votes_per_pair=votes_per_pair,
        votes_per_rater=votes_per_rater,
        check_every=check_every,
        num_checks=checks,
        lease_seconds=round(60 * lease_minutes),
        first_view=view.value,
        prompts_shown="yes" if show_prompts else "no",
        picture_format=picture_format.value,
        seed=seed,
    )
    plan.check()
    assumed = Assumptions(difference=difference / 100, agreement=agreement)
    lines = plan_lines(basket, votes_per_pair, assumed)
    with _progress("Copying pictures", num_jobs(basket, plan)) as advance:
        build_study(a, b, basket, out, plan=plan, on_picture=advance)
    for line in lines:
        typer.echo(line)
    typer.echo(out)


@study.command()
@one_line_errors
def serve(
    folder: StudyFolder,
    host: Annotated[str, typer.Option(help="0.0.0.0: reachable from elsewhere.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    address: Annotated[str, typer.Option(help="For raters, e.g. https://study.org")] = "",
) -> None:
    """Serve the study to raters until Ctrl-C; run it again to continue."""
    import uvicorn

    from ksr_distill.study.server import make_app
    from ksr_distill.study.tokens import invitation, read_secret

    app = make_app(folder)
    place = address.rstrip("/") or f"http://{host}:{port}"
    typer.echo(f"Invite raters by this link: {place}/join/{invitation(read_secret(folder))}")
    uvicorn.run(app, host=host, port=port, log_level="warning", server_header=False)


@study.command()
@one_line_errors
def report(
    folder: StudyFolder,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Default: STUDY/report.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap.")] = 0,
) -> None:
    """Write what the votes decide and what they leave open: HTML, JSON, CSV, Label Studio."""
    from ksr_distill.study.report import write_report

    out = out or folder / "report"
    for line in write_report(folder, out, seed=seed).verdicts:
        typer.echo(line)
    typer.echo(out / "report.html")


@study.command()
@one_line_errors
def generate(
    prompts: Basket,
    model: Annotated[Path, typer.Option(help="diffusers text-to-image folder.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for ID.png.")],
    seed: Annotated[int, typer.Option(help="Seed of the noise, with the id.")] = 0,
    num_inference_steps: Annotated[int, typer.Option(min=0, help="0: the pipeline's own.")] = 0,
    guidance_scale: Annotated[float, typer.Option(help="Negative: the pipeline's own.")] = -1.0,
    size: Annotated[int, typer.Option(min=0, help="Side in pixels; 0: the pipeline's own.")] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    precision: Annotated[Precision, typer.Option()] = Precision.FLOAT32,
    trust_remote_code: Annotated[bool, typer.Option(help="Run the folder's own Python.")] = False,
) -> None:
    """Generate pictures for side A from the prompts; run it again to continue."""
    import torch

    from ksr_distill.study.basket import read_basket
    from ksr_distill.study.generate import Recipe, generate_pictures, load_text_to_image

    basket = read_basket(prompts)
    call: dict[str, int | float | str] = {}
    if num_inference_steps:
        call["num_inference_steps"] = num_inference_steps
    if guidance_scale >= 0:
        call["guidance_scale"] = guidance_scale
    if size:
        call |= {"width": size, "height": size}
    recipe = Recipe(model=model.resolve().name, seed=seed, call=call)
    pipe = load_text_to_image(
        model,
        dtype=getattr(torch, precision.value),
        device=device,
        trust_remote_code=trust_remote_code,
    )
    with _progress("Making pictures", len(basket)) as advance:
        generate_pictures(pipe, basket, out, recipe=recipe, on_picture=advance)
    typer.echo(out)
