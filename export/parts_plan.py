"""The export plan of a model with a tower, a connector and a language model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vlmport.contract import AttentionForm, GenerationDefaults, ModelDimensions
from vlmport.export.adapters import ADAPTER_CONFIG
from vlmport.export.family import ExportPlan
from vlmport.export.parts import graph_store
from vlmport.export.processor_files import fast_tokenizer, image_preprocessing, load_tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

    from vlmport.contract import PromptFormat, SpecialTokens
    from vlmport.export.checkpoint import Checkpoint
    from vlmport.export.parts import Parts
    from vlmport.export.reference import Reference
    from vlmport.export.tensor_store import TensorStore, WeightFile

__all__ = ["PartsPlan"]


class PartsPlan:
    """What the layouts of a checkpoint have in common, until `finish` makes the plan of it.

    Args:
        checkpoint: the folder.
        parts: the model.
        processor: a transformers image processor.
        store: the checkpoint's tensors under parameter names.
        files: the files that they come from.
        pads: whether pictures are made square first.

    Attributes:
        parts: the model.
        tokenizer: the checkpoint's.
        image: image preprocessing.
        max_length: most tokens of a sequence that the language model supports.

    Raises:
        CheckpointError: if tokenizer or image processor cannot be used with the model.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        parts: Parts,
        processor: Any,  # transformers' image processors share no useful static type
        store: TensorStore,
        files: Sequence[WeightFile],
        *,
        pads: bool,
    ) -> None:
        self.parts = parts
        self.tokenizer = load_tokenizer(checkpoint.path)
        side: int = parts.side or parts.tower.image_size
        self.image = image_preprocessing(processor, pad_to_square=pads, side=side)
        self.max_length: int = parts.text.max_position_embeddings
        self._store = graph_store(parts, store)
        settings = [checkpoint.path / name for name in ("config.json", ADAPTER_CONFIG)]
        present = [path for path in settings if path.is_file()]
        self._source_files = (*present, *(file.path for file in files))

    def finish(
        self,
        layout: str,
        variant: str,
        prompt: PromptFormat,
        tokens: SpecialTokens,
        reference: Callable[[torch.dtype], Reference],
    ) -> ExportPlan:
        """The plan, with what the layout decided.

        Args:
            layout: its name.
            variant: the parts, for people.
            prompt: prompt form.
            tokens: ids with a meaning.
            reference: loads the PyTorch model in a dtype.
        """
        text = self.parts.text
        return ExportPlan(
            variant=variant,
            layout=layout,
            graphs=self.parts.graphs(),
            store=self._store,
            dimensions=ModelDimensions(text.hidden_size, text.vocab_size, self.max_length),
            kv_layout=self.parts.kv_layout,
            attention=AttentionForm("causal", first_position=0),
            image=self.image,
            prompt=prompt,
            special_tokens=tokens,
            generation=GenerationDefaults(max_new_tokens=256, stop_strings=()),
            tokenizer=fast_tokenizer(self.tokenizer),
            source_files=self._source_files,
            reference=reference,
        )
