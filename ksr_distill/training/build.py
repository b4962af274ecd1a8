"""Builds the two LightningModules from a config: the `_target_`s of conf/module."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from diffusers import ModelMixin

from ksr_distill.config import model_folder
from ksr_distill.diffusion import (
    FIRST_STUDENT_TIMESTEP,
    are_falling_timesteps,
    student_timesteps,
)
from ksr_distill.models import Critic, KSRUNet
from ksr_distill.models.critic import HEAD_GROUPS
from ksr_distill.randomness import Stream, generator_for
from ksr_distill.training.distillation import DistillationModule
from ksr_distill.training.settings import require
from ksr_distill.training.teacher import TeacherModule

N = TypeVar("N", bound=torch.nn.Module)


def teacher_module(
    *,
    model: dict[str, Any],
    teacher: str | None,
    channels_last: bool,
    gradient_checkpointing: bool,
    **rest: Any,
) -> TeacherModule:
    """Return the module of a teacher run: a new network, initialised from the seed alone.

    Args:
        teacher: A model folder to start from instead; its layout must be the config's.
    """
    with seeded_initialisation(rest["seed"]):
        unet = KSRUNet(**model) if teacher is None else loaded_unet(teacher, model)
    if gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    return TeacherModule(unet=in_memory_format(unet, channels_last), **rest)


def distillation_module(
    *,
    teacher: str,
    dropout: float,
    head_channels: int,
    normalise_features: bool,
    num_inference_steps: int,
    timesteps: Sequence[int] | None,
    channels_last: bool,
    gradient_checkpointing: bool,
    **rest: Any,
) -> DistillationModule:
    """Return the module of a distillation: student and critic's trunk start from the teacher.

    Args:
        teacher: A model folder.
        timesteps: The student's, falling; None: ``num_inference_steps`` evenly spread ones.
        dropout: Of the student. Not 0 would make its training steps differ from inference.
        gradient_checkpointing: In the student and in the trunk, which its gradient passes through.
    """
    is_whole = head_channels > 0 and head_channels % HEAD_GROUPS == 0
    require(is_whole, "critic.head_channels", head_channels, f"a multiple of {HEAD_GROUPS}")
    folder = model_folder(teacher, key="teacher")
    timesteps = chosen_timesteps(num_inference_steps, timesteps)
    trunk = KSRUNet.from_pretrained(folder, dropout=0.0)
    student = KSRUNet.from_pretrained(folder, dropout=dropout)
    if gradient_checkpointing:
        trunk.enable_gradient_checkpointing()
        student.enable_gradient_checkpointing()
    with seeded_initialisation(rest["seed"]):
        critic = Critic(trunk, head_channels=head_channels, normalise_features=normalise_features)
    rest["record"] = {**rest["record"], "teacher_fingerprint": fingerprint(trunk)}
    in_memory_format(critic, channels_last)
    return DistillationModule(
        student=in_memory_format(student, channels_last).train(),
        critic=critic,
        timesteps=timesteps,
        **rest,
    )


def chosen_timesteps(num_inference_steps: int, timesteps: Any) -> tuple[int, ...]:
    """Return the student's timesteps: the given ones, or evenly spread ones.

    Raises:
        ValueError: If the given ones do not fall from the timestep at which sampling starts.
    """
    if timesteps is None:
        return student_timesteps(num_inference_steps)
    starts = are_falling_timesteps(timesteps) and timesteps[0] == FIRST_STUDENT_TIMESTEP
    allowed = f"null, or whole numbers that fall from {FIRST_STUDENT_TIMESTEP} to 0 or more"
    require(starts, "diffusion.timesteps", timesteps, allowed)
    return tuple(timesteps)


def loaded_unet(teacher: str, model: dict[str, Any]) -> KSRUNet:
    """Return the network of a model folder, in float32.

    Raises:
        ValueError: If its layout is not the config's; names the first key that differs.
    """
    unet = KSRUNet.from_pretrained(model_folder(teacher, key="teacher"), dropout=model["dropout"])
    for key, value in model.items():
        if unet.config[key] != value:
            raise ValueError(
                f"model.{key}={value} is not that of teacher={teacher}, {unet.config[key]}; choose "
                "the model that it was trained as, or teacher=null for a new one"
            )
    return unet


@contextmanager
def seeded_initialisation(seed: int) -> Iterator[None]:
    """Make new weights depend on the seed alone; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator_for(seed, Stream.INITIALISATION).initial_seed())
        yield


def in_memory_format(network: N, channels_last: bool) -> N:
    """Return the network with its convolutions' weights in the format asked for."""
    if channels_last:
        network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    return network


def fingerprint(network: ModelMixin) -> str:
    """Return a hash of the weights, by which a resumed run recognises its teacher."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
