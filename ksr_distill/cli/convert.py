"""``ksr convert``: released files to model folders, and back."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ksr_distill.cli.errors import one_line_errors

if TYPE_CHECKING:
    from collections.abc import Callable

    from diffusers import ModelMixin

convert = typer.Typer(
    no_args_is_help=True, help="Turn released files into model folders, and back."
)

File = Annotated[Path, typer.Argument(help="A .pt, .ckpt or .safetensors file.")]
Out = Annotated[Path, typer.Argument(help="The model folder to write.")]
NumGroups = Annotated[
    int | None,
    typer.Option(min=1, help="Groups of the group norms, if other than in the released model."),
]
HeadDim = Annotated[
    int | None, typer.Option(min=1, help="Channels of an attention head, if not 64.")
]
Half = Annotated[bool, typer.Option("--fp16", help="Add the fp16 variant to the folder.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]
Mask = Annotated[
    Path | None, typer.Option(help="context_mask.pt, if the padding rows are not all equal.")
]
SelfContained = Annotated[
    bool,
    typer.Option(
        "--self-contained",
        help="Add the code, so that diffusers loads the folder without this package.",
    ),
]


def register(app: typer.Typer) -> None:
    """Add the command to the console script."""
    app.add_typer(convert, name="convert")


@convert.command("sr-unet")
@one_line_errors
def sr_unet(
    file: File,
    out: Out,
    num_groups: NumGroups = None,
    fp16: Half = False,
    overwrite: Overwrite = False,
) -> None:
    """KandiSuperRes' U-Net: KSRUNet.from_pretrained(OUT) loads it."""
    from ksr_distill.inference.model_folders.conversion import read_sr_unet

    _write_model(lambda: read_sr_unet(file, num_groups=num_groups), out, fp16, overwrite)


@convert.command()
@one_line_errors
def refiner(
    file: File,
    out: Out,
    num_groups: NumGroups = None,
    head_dim: HeadDim = None,
    fp16: Half = False,
    overwrite: Overwrite = False,
) -> None:
    """Kandinsky 3.0 Flash: RefinerUNet.from_pretrained(OUT) loads it."""
    from ksr_distill.inference.model_folders.conversion import read_refiner

    _write_model(
        lambda: read_refiner(file, num_groups=num_groups, head_dim=head_dim), out, fp16, overwrite
    )


@convert.command()
@one_line_errors
def movq(
    file: File,
    out: Out,
    num_groups: NumGroups = None,
    fp16: Half = False,
    overwrite: Overwrite = False,
) -> None:
    """The refiner's autoencoder: diffusers' VQModel.from_pretrained(OUT) loads it."""
    from ksr_distill.inference.model_folders.conversion import read_movq

    _write_model(lambda: read_movq(file, num_groups=num_groups), out, fp16, overwrite)


@convert.command()
@one_line_errors
def context(
    file: File,
    out: Out,
    mask: Mask = None,
    fp16: Half = False,
    overwrite: Overwrite = False,
) -> None:
    """The refiner's empty prompt, cut to its one token: RefinerContext.from_pretrained(OUT)."""
    from ksr_distill.inference.model_folders.conversion import read_context

    _write_model(lambda: read_context(file, mask_path=mask), out, fp16, overwrite)


@convert.command()
@one_line_errors
def flash(
    out: Out,
    sr: Annotated[Path, typer.Option(help="KandiSuperRes_flash_x2.pt, or its folder.")],
    refiner: Annotated[Path | None, typer.Option(help="kandinsky3_flash.pt, or a folder.")] = None,
    movq: Annotated[Path | None, typer.Option(help="movq.pt, or a folder.")] = None,
    context: Annotated[Path | None, typer.Option(help="context.pt, or a folder.")] = None,
    context_mask: Mask = None,
    scale: Annotated[int, typer.Option(min=2, help="What the student was trained for.")] = 2,
    num_groups: NumGroups = None,
    fp16: Half = False,
    self_contained: SelfContained = False,
    overwrite: Overwrite = False,
) -> None:
    """A pipeline's folder for KSRFlashPipeline; without a refiner if only --sr is given."""
    from ksr_distill.inference.model_folders.conversion import (
        read_context,
        read_movq,
        read_refiner,
        read_sr_unet,
    )
    from ksr_distill.inference.model_folders.files import new_folder, save_pipeline
    from ksr_distill.inference.model_folders.self_contained import add_code
    from ksr_distill.inference.pipeline import KSRFlashPipeline

    parts = {"--refiner": refiner, "--movq": movq, "--context": context}
    missing = [option for option, path in parts.items() if path is None]
    if missing and len(missing) < len(parts):
        raise ValueError(f"{', '.join(missing)} missing: the refiner needs all of {list(parts)}")
    _without_progress_bars()
    with new_folder(out, overwrite=overwrite) as folder:
        pipeline = KSRFlashPipeline(
            sr=read_sr_unet(sr, num_groups=num_groups),
            refiner=None if refiner is None else read_refiner(refiner),
            movq=None if movq is None else read_movq(movq),
            context=None if context is None else read_context(context, mask_path=context_mask),
            scale=scale,
        )
        save_pipeline(pipeline, folder, with_half=fp16)
        if self_contained:
            add_code(folder)
    typer.echo(out.resolve())


@convert.command()
@one_line_errors
def teacher(
    file: File,
    out: Out,
    scale: Annotated[
        int | None, typer.Option(min=2, help="2 or 4; by default from the released file's name.")
    ] = None,
    num_groups: NumGroups = None,
    fp16: Half = False,
    self_contained: SelfContained = False,
    overwrite: Overwrite = False,
) -> None:
    """KandiSuperRes_x2.ckpt or KandiSuperRes.ckpt (×4), as a folder for KSRTeacherPipeline."""
    from ksr_distill.inference.model_folders.conversion import read_sr_unet
    from ksr_distill.inference.model_folders.files import new_folder, save_pipeline
    from ksr_distill.inference.model_folders.self_contained import add_code
    from ksr_distill.inference.teacher import KSRTeacherPipeline, scale_of_released_file

    if scale is None:
        scale = scale_of_released_file(file.name)
        typer.echo(f"scale {scale}, from the name {file.name}; --scale overrides it", err=True)
    _without_progress_bars()
    with new_folder(out, overwrite=overwrite) as folder:
        pipeline = KSRTeacherPipeline(sr=read_sr_unet(file, num_groups=num_groups), scale=scale)
        save_pipeline(pipeline, folder, with_half=fp16)
        if self_contained:
            add_code(folder)
    typer.echo(out.resolve())


@convert.command()
@one_line_errors
def original(
    folder: Annotated[Path, typer.Argument(help="A model folder, or a pipeline's.")],
    out: Annotated[Path, typer.Argument(help="The .pt file to write.")],
    component: Annotated[
        str | None, typer.Option(help="Of a pipeline: sr (the default), refiner or movq.")
    ] = None,
    null_embedding: Annotated[
        Path | None,
        typer.Option(help="kandinsky3_flash.pt, from which a refiner's null_embedding is copied."),
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """The reverse: a model folder as a file for the released code."""
    from ksr_distill.inference.model_folders.conversion import read_null_embedding, write_original
    from ksr_distill.inference.model_folders.files import load_model

    embedding = None if null_embedding is None else read_null_embedding(null_embedding)
    model = load_model(folder, component)
    write_original(model, out, null_embedding=embedding, overwrite=overwrite)
    typer.echo(out.resolve())


def _write_model(read: "Callable[[], ModelMixin]", out: Path, fp16: bool, overwrite: bool) -> None:
    from ksr_distill.inference.model_folders.files import new_folder, save_model

    with new_folder(out, overwrite=overwrite) as folder:
        save_model(read(), folder, with_half=fp16)
    typer.echo(out.resolve())


def _without_progress_bars() -> None:
    """Disable diffusers' progress bars, for components that load at once."""
    from diffusers.utils import logging

    logging.disable_progress_bar()
