"""The decoder of a vector-quantized autoencoder of masks, with its published names.

Source: google-research/big_vision, transfers/segmentation.py; Ning et al. 2023, "All in Tokens:
Unifying Output Space of Visual Tasks via Soft Token", arXiv:2301.02229.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import nn

from vlmport.contract import MASK_DECODER
from vlmport.export.tracing import GraphPort, TracedModule

__all__ = ["CODES_PER_MASK", "NUM_CODES", "MaskDecoder", "mask_decoder_module"]

NUM_CODES = 128
CODES_PER_MASK = 16
_CODE_LENGTH = 512
_WIDTH = 128
# Codes lie on a grid of 4 x 4; each of the four transposed convolutions doubles its sides.
_GRID = 4
_MASK_SIDE = 64


class MaskDecoder(nn.Module):
    """codes int64 [num_masks, 16] -> mask float32 [num_masks, 64, 64], above 0 inside."""

    def __init__(self) -> None:
        super().__init__()
        self._vq_vae = _Codebook()
        self.decoder = nn.Sequential(
            nn.Conv2d(_CODE_LENGTH, _WIDTH, 1),
            nn.ReLU(),
            _Residual(),
            _Residual(),
            *_doubling(_WIDTH, _WIDTH),
            *_doubling(_WIDTH, _WIDTH // 2),
            *_doubling(_WIDTH // 2, _WIDTH // 4),
            *_doubling(_WIDTH // 4, _WIDTH // 8),
            nn.Conv2d(_WIDTH // 8, 1, 1),
        )

    def forward(self, codes: torch.Tensor) -> torch.Tensor:
        """Looks the codes up, row by row of the grid, and decodes them."""
        vectors = self._vq_vae(codes).reshape(-1, _GRID, _GRID, _CODE_LENGTH)
        mask = cast("torch.Tensor", self.decoder(vectors.permute(0, 3, 1, 2)))
        return mask.squeeze(1)


class _Codebook(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self._embedding = nn.Parameter(torch.empty(NUM_CODES, _CODE_LENGTH))

    def forward(self, codes: torch.Tensor) -> torch.Tensor:
        return nn.functional.embedding(codes, self._embedding)


class _Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(_WIDTH, _WIDTH, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(_WIDTH, _WIDTH, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(_WIDTH, _WIDTH, 1),
        )

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return states + cast("torch.Tensor", self.net(states))


def _doubling(inner: int, outer: int) -> tuple[nn.Module, nn.Module]:
    # flax pads the widened input by 2; of a kernel of 4 that is a padding of 1 in PyTorch's terms.
    return nn.ConvTranspose2d(inner, outer, 4, stride=2, padding=1), nn.ReLU()


def mask_decoder_module() -> TracedModule:
    """The graph "mask_decoder"."""
    return TracedModule(
        name=MASK_DECODER,
        build=MaskDecoder,
        inputs=(GraphPort("codes", torch.int64, ("num_masks", CODES_PER_MASK)),),
        outputs=(GraphPort("mask", torch.float32, ("num_masks", _MASK_SIDE, _MASK_SIDE)),),
        single_inputs=1,
    )
