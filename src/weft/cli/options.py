"""Options that several commands share, and the checks of what users type. No torch here: help must be instant."""

from __future__ import annotations

import dataclasses
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from weft.cli.shipped import picture_model
from weft.errors import WeftError

if TYPE_CHECKING:
    from weft.api import Model
    from weft.api import Options as SampleOptions
    from weft.api_motion import MotionModel, MotionOptions

QUIET = tyro.conf.arg(help_behavior_hint="")  # the text says what the default is
Text = Annotated[str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="")]
File = Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")]

PICTURES = (".png", ".jpg", ".jpeg", ".webp")
MOVEMENTS = (".bvh", ".glb", ".npz", ".npy", ".gif", ".mp4")
"""What movements are written as; the suffix of -o chooses between a picture and a movement."""


@dataclass(kw_only=True)
class ModelOptions:
    """Which model, and how it is loaded."""

    model: Text = None
    """A model of the zoo, a folder in diffusers layout, or a hub id; default: tiny-kontext, with reference
    pictures tiny-omni (where it ships), for movements tiny-motion."""
    lora: Annotated[list[str], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="PATH[:SCALE]")] = field(
        default_factory=list
    )
    """An adapter and its strength, as style.safetensors:0.8; can be repeated."""
    adapters: Text = None
    """A folder with adapters that are switched by what is asked for, as DreamOmni2's edit_lora and gen_lora."""
    option: Annotated[list[str], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="NAME=VALUE")] = field(
        default_factory=list
    )
    """An option of the model's family, as reference_tokens=4096 or layout=mosaic; can be repeated."""
    file: Annotated[list[str], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="PART=PATH")] = field(
        default_factory=list
    )
    """Weights of a part that lie in one file, as transformer=flux1-kontext-dev.safetensors; can be repeated."""
    device: Text = None
    """cpu, cuda, cuda:1, mps; default: the best that is here."""
    dtype: Annotated[Literal["fp32", "bf16", "fp16"] | None, QUIET] = None
    """Precision of the weights; default: fp32 on the CPU, bf16 on an accelerator."""
    attention: Text = None
    """An attention backend of diffusers, such as native or flash."""
    tiling: bool = False
    """Decode large pictures in tiles."""
    slicing: bool = False
    """Decode a batch's pictures one by one."""
    offload: Literal["none", "model", "sequential"] = "none"
    """Keep idle networks (model) or layers (sequential) in main memory."""
    quantization: Annotated[Literal["8bit", "4bit"] | None, QUIET] = None
    """Load transformer and T5 in fewer bits (extra: quant)."""
    vram: Annotated[Literal[16, 24, 48, 80] | None, QUIET] = None
    """Choose --offload, --quantization, --tiling and --slicing for a GPU of so many GiB."""
    resolution: Annotated[int | None, tyro.conf.arg(metavar="PIXELS", help_behavior_hint="")] = None
    """The longer edge of pictures that no --size is given for; default: the model's."""
    rewriter: Annotated[str | None, tyro.conf.arg(metavar="FOLDER|URL", help_behavior_hint="")] = None
    """A VLM that puts the instruction into the form the adapters were trained on: a folder or hub id, or the address of
    an OpenAI-compatible server."""
    rewriter_model: Text = None
    """The VLM's name on that server."""
    rewriter_key_env: Text = None
    """The environment variable with that server's key."""
    rewrite: Literal["off", "on", "several"] = "several"
    """With a --rewriter: which requests it rewrites; several: those with two pictures or more."""
    strict_slice: bool = False
    """Cut the rewriter's tags off by length, as DreamOmni2's release does."""
    structured: bool = False
    """Hold the rewriter to a JSON object of instruction and caption (a server must offer structured output); one that
    was trained so says it itself."""

    def name(self, references: bool = False) -> str:
        """The picture model that is meant; `references`: whether a request has reference pictures."""
        return self.model or picture_model(references)

    def load_motion(self) -> MotionModel:
        """The loaded motion model. Raises `WeftError` for options that only picture models have."""
        import weft

        refuse(self, ("model", "lora", "device", "dtype"), "for movements")
        return weft.load_motion(self.model or "tiny-motion", device=self.device, dtype=self.dtype, lora=self.lora)

    def load(self, references: bool = False) -> Model:
        """The loaded model, by default the one for requests with or without `references`.

        Its licence and that of its rewriter, where they are known, go to stderr.
        """
        import sys

        import weft

        rewriter = None
        if self.rewriter is None:
            needs = ("rewriter_model", "rewriter_key_env", "rewrite", "strict_slice", "structured")
            refuse(self, tuple(f.name for f in dataclasses.fields(self) if f.name not in needs), "without --rewriter")
        elif self.rewrite != "off":
            from weft.models.rewriter import open_rewriter

            rewriter = open_rewriter(
                self.rewriter, when=self.rewrite, strict_slice=self.strict_slice, model=self.rewriter_model,
                key_env=self.rewriter_key_env, structured=self.structured or None,
                device=self.device, dtype=self.dtype,
            )  # fmt: skip
        name = self.name(references)
        model = weft.load(
            name,
            device=self.device,
            dtype=self.dtype,
            lora=self.lora,
            adapters=self.adapters,
            attention_backend=self.attention,
            tiling=self.tiling,
            slicing=self.slicing,
            offload=self.offload,
            quantization=self.quantization,
            resolution=self.resolution,
            options=dict(parse_option(text) for text in self.option),
            vram=self.vram,
            files=dict(parse_file(text) for text in self.file),
            rewriter=rewriter,
        )
        licence = getattr(model.flow, "licence", None)
        if licence:
            print(f"licence of {name}: {licence}", file=sys.stderr)
        if rewriter is not None and rewriter.licence:
            print(f"licence of {self.rewriter_model or self.rewriter}: {rewriter.licence}", file=sys.stderr)
        return model


def parse_option(text: str) -> tuple[str, Any]:
    """Name and value of "name=value"; values are written as in YAML."""
    from weft.settings import parse_yaml

    name, equals, value = text.partition("=")
    if not equals or not name:
        raise WeftError(f"--option {text}: not of the form name=value, as layout=mosaic")
    return name, parse_yaml(value, f"--option {text}")


def parse_file(text: str) -> tuple[str, str]:
    """Part and path of "part=path"."""
    name, equals, path = text.partition("=")
    if not equals or not name or not path:
        raise WeftError(f"--file {text}: not of the form part=path, as transformer=flux1-kontext-dev.safetensors")
    return name, path


@dataclass(kw_only=True)
class SamplingOptions:
    """How pictures are sampled."""

    seed: int = 0
    """The seed of the first picture; picture k has seed + k."""
    steps: Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="")] = None
    """Sampling steps; default: the model's."""
    guidance: Annotated[float | None, tyro.conf.arg(metavar="FLOAT", help_behavior_hint="")] = None
    """Classifier-free guidance; 1 switches it off and halves the time; default: the model's."""
    negative: Annotated[str, tyro.conf.arg(metavar="TEXT", help_behavior_hint="")] = ""
    """What the picture should not be (used by the guidance)."""
    solver: Literal["euler", "ab2", "dpmpp_2m", "dpmpp_2m_heun", "dpmpp_2m_release"] = "euler"
    """The solver of the steps (docs/sampling.md); those of second order need fewer steps."""
    size: Annotated[str | None, tyro.conf.arg(metavar="WxH", help_behavior_hint="")] = None
    """Width x height in pixels, as 96x64; default: the model's, for an edit the source's."""
    batch: int = 8
    """Pictures computed at once; it changes the speed and the memory, never the pictures."""

    def options(self, progress: bool = False) -> SampleOptions:
        """The API's options; raises WeftError for numbers out of range."""
        from weft.api import Options

        return Options(self.steps, self.guidance, self.negative, self.batch, progress, self.solver)


@dataclass(kw_only=True)
class MovementOptions:
    """How movements are sampled; --seed, --guidance and --batch count, too."""

    seconds: Annotated[float | None, tyro.conf.arg(metavar="FLOAT", help_behavior_hint="")] = None
    """How long the movement is; default: as long as the model finds right."""
    temperature: Annotated[float | None, tyro.conf.arg(metavar="FLOAT", help_behavior_hint="")] = None
    """How freely tokens are drawn; 0 takes the likeliest; default: the model's."""
    top_k: Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="")] = None
    """Draw from the so many likeliest tokens only; default: the model's."""
    top_p: Annotated[float | None, tyro.conf.arg(metavar="FLOAT", help_behavior_hint="")] = None
    """Draw from the likeliest tokens that hold this share of the probability; default: the model's."""
    rounds: int = 0
    """Let the model judge its movement in words and make it again, at most so often."""

    def options(self, sampling: SamplingOptions) -> MotionOptions:
        """The API's options. Raises `WeftError` for numbers out of range, and for options of pictures."""
        from weft.api_motion import MotionOptions

        refuse(sampling, ("seed", "guidance", "batch"), "for movements")
        return MotionOptions(
            self.seconds, self.temperature, self.top_k, self.top_p, sampling.guidance, sampling.batch, self.rounds
        )


def refuse(options: Any, allowed: tuple[str, ...], where: str) -> None:
    """Raise `WeftError` for an option that was given and would do nothing."""
    for field_ in dataclasses.fields(options):
        default = field_.default_factory() if callable(field_.default_factory) else field_.default
        name, given = field_.name, getattr(options, field_.name)
        if name not in allowed and given != default:
            if dataclasses.is_dataclass(given):  # a group of options
                name = next(f.name for f in dataclasses.fields(given) if vars(given)[f.name] != vars(default)[f.name])
            raise WeftError(f"--{name.replace('_', '-')} does nothing {where}; leave it out")


def is_movement(path: Path) -> bool:
    """Whether an output of this name is a movement. Raises `WeftError` if it is neither that nor a picture."""
    if path.is_dir():
        raise WeftError(f"{path} is a folder; name a file in it")
    if path.suffix.lower() not in PICTURES + MOVEMENTS:
        raise WeftError(
            f"{path}: unknown suffix {path.suffix!r}; write a picture ({', '.join(PICTURES)}) or a movement "
            f"({', '.join(MOVEMENTS)})"
        )
    return path.suffix.lower() in MOVEMENTS


def parse_size(text: str | None) -> tuple[int, int] | None:
    """'96x64' (width x height) or '64' as (height, width)."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d+)(?:[x×](\d+))?", text.strip().lower())
    if not match or not all(int(side) for side in match.groups() if side):
        raise WeftError(f"--size {text!r} is not a size; write WIDTHxHEIGHT in pixels, such as 96x64")
    width = int(match[1])
    return int(match[2] or width), width


def check_folder(folder: Path) -> None:
    """Create the folder of the outputs and make sure that it can be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WeftError(f"cannot create the folder {folder}: {error.strerror}; choose another -o") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise WeftError(f"the folder {folder} cannot be written; choose another -o or change its permissions")


def check_file(path: Path, what: str) -> None:
    """Refuse a missing input by name."""
    if path.is_dir():
        raise WeftError(f"{what} {path} is a folder; name a file")
    if not path.is_file():
        near = sorted(p.name for p in path.parent.glob(f"*{path.suffix}"))[:5] if path.parent.is_dir() else []
        hint = f"; in that folder: {', '.join(near)}" if near else ""
        raise WeftError(f"{what} {path} does not exist{hint}")
