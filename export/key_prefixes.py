"""Names that tower, connector and language model have in known layouts of checkpoints.

Each layout is a table of prefixes: in the checkpoint -> among the parameters that are exported. The
first that fits decides.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vlmport.export.weight_match import PrefixRule

__all__ = [
    "LANGUAGE_MODEL",
    "LLAVA_PARTS",
    "SEPARATE_FOLDERS",
    "TOWER",
    "TOWER_2",
    "UNDERSCORED_PARTS",
    "UNIFIED_MODEL",
]

TOWER, TOWER_2, LANGUAGE_MODEL = "vision_tower.", "vision_tower_2.", "language_model."
# One file, each part below a wrapper of its own.
UNDERSCORED_PARTS: tuple[PrefixRule, ...] = (
    ("vision_tower._vision_tower.clip.vision_model.", TOWER),
    ("vision_tower._vision_tower.clip.", TOWER),
    ("vision_tower._vision_tower.dinov2.", TOWER_2),
    ("vision_tower._vision_tower.vision_model.", TOWER),
    ("vision_tower._vision_tower.", TOWER),
    ("connector._connector.", "connector."),
)
# A folder for each part.
SEPARATE_FOLDERS: dict[str, tuple[PrefixRule, ...]] = {
    "language_model": (("", LANGUAGE_MODEL),),
    "vision_tower": (
        ("clip.vision_model.", TOWER),
        ("clip.", TOWER),
        ("dinov2.", TOWER_2),
        ("_vision_tower.vision_model.", TOWER),
        ("_vision_tower.", TOWER),
        ("vision_model.", TOWER),
        ("", TOWER),
    ),
    "connector": (("_connector.", "connector."), ("", "connector.")),
}
# The language model's class with the other parts inside its body.
UNIFIED_MODEL: tuple[PrefixRule, ...] = (
    ("model.vision_tower.vision_tower.vision_model.", TOWER),
    ("model.vision_tower.vision_tower.", TOWER),
    ("model.mm_projector.", "connector."),
    ("model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
)
_PROJECTOR = (("linear_1.", "connector.0."), ("linear_2.", "connector.2."))
# transformers' LlavaForConditionalGeneration, versions 4 and 5.
LLAVA_PARTS: tuple[PrefixRule, ...] = (
    ("model.vision_tower.vision_model.", TOWER),
    ("model.vision_tower.", TOWER),
    ("vision_tower.vision_model.", TOWER),
    *((f"{m}multi_modal_projector.{o}", n) for m in ("model.", "") for o, n in _PROJECTOR),
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
)
