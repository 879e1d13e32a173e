"""What is known about the licences of public checkpoints: shown when one is loaded, and by `weft doctor --licences`.

Notes for orientation, read from the model cards; the licence texts themselves decide.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

STABILITY = "Stability AI Community License (commercial use is limited by revenue)"
FLUX_DEV = "FLUX.1 [dev] Non-Commercial License of Black Forest Labs: no commercial use of the weights"


@dataclass(frozen=True, slots=True)
class Licence:
    """Of a checkpoint: its `weights`, the `base` that they derive from, the `code` beside them, and the training
    `data`. "" where there is nothing to say."""

    weights: str
    base: str = ""
    code: str = ""
    data: str = ""

    def __str__(self) -> str:
        parts = [("weights", self.weights), ("base", self.base), ("code", self.code), ("data", self.data)]
        return "; ".join(f"{name}: {text}" for name, text in parts if text)


SD35 = f"Stable Diffusion 3.5 Medium, {STABILITY}"
UNIPIC = Licence("MIT as published by Skywork", SD35, "MIT", "5.6 M of 11 M samples are internal")
UNIPIC_VLM = Licence(
    "MIT as published by Skywork", f"{SD35}; read by Qwen2.5-VL-7B-Instruct, Apache-2.0", "MIT", "partly internal"
)
QWEN_EDIT = Licence("Apache-2.0", code="Apache-2.0", data="not published")
LICENCES: dict[str, Licence] = {
    "UniPic2-SD3.5M-Kontext-2B": UNIPIC,
    "UniPic2-SD3.5M-Kontext-GRPO-2B": UNIPIC,
    "UniPic2-Metaquery-9B": UNIPIC_VLM,
    "UniPic2-Metaquery-GRPO-9B": UNIPIC_VLM,
    "UniPic2-Metaquery-Flash": UNIPIC_VLM,
    "stable-diffusion-3.5-medium": Licence(STABILITY),
    "stable-diffusion-3-medium-diffusers": Licence(STABILITY),
    "FLUX.1-Kontext-dev": Licence(FLUX_DEV, data="not published"),
    "DreamOmni2": Licence(
        "Apache-2.0 as published",
        "its adapters run on FLUX.1 Kontext [dev], whose licence is non-commercial",
        "Apache-2.0",
        "not published",
    ),
    "UniWorld-FLUX.1-Kontext-Dev": Licence(
        FLUX_DEV, "an adapter of FLUX.1 Kontext [dev]", "Apache-2.0", "not published"
    ),
    "UniWorld-Qwen-Image-Edit-2509": Licence(
        "not stated beside the code", "an adapter of Qwen-Image-Edit-2509, Apache-2.0", "Apache-2.0", "not published"
    ),
    "Qwen-Image-Edit": QWEN_EDIT,
    "Qwen-Image-Edit-2509": QWEN_EDIT,
    "Qwen-Image-Edit-2511": QWEN_EDIT,
    "Qwen2.5-VL-7B-Instruct": Licence("Apache-2.0", data="not published"),
    "Qwen2.5-VL-3B-Instruct": Licence("Qwen Research License: no commercial use", data="not published"),
}
"""By the repository's own name."""


def find_licence(name: str | Path) -> Licence | None:
    """The licence of a public checkpoint, by its hub id, folder or place in the hub's cache; None if unknown."""
    for part in reversed(Path(name).parts):  # the cache's folders are models--OWNER--NAME/snapshots/COMMIT
        if part.split("--")[-1] in LICENCES:
            return LICENCES[part.split("--")[-1]]
    return None
