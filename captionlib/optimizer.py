"""Muon for the weight matrices, AdamW for the rest, as one optimizer that Trainer can use.

Muon (Jordan 2024; torch.optim.Muon) orthogonalises the update of a matrix. On the drawn scenes it
learns in 2 minutes what AdamW has not learnt in 5 (LOG.md); for pretrained halves AdamW alone,
transformers' default, is the safe choice. Used by the trainer.
"""

import torch
from torch import nn


class MuonAdamW(torch.optim.Optimizer):
    """Both optimizers over one model; the learning-rate schedule scales both rates alike.

    muon_lr: for 2-D weights, but embeddings and the output layer; lr: of AdamW, for all others.
    """

    def __init__(
        self,
        model: nn.Module,
        muon_lr: float,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
    ):
        matrices, others = _by_shape(model)
        self.parts = [
            torch.optim.Muon(matrices, lr=muon_lr, momentum=0.95, weight_decay=weight_decay),
            torch.optim.AdamW(others, lr=lr, betas=betas, weight_decay=weight_decay),
        ]
        super().__init__(self._groups(), {})

    def _groups(self) -> list[dict]:
        return [group for part in self.parts for group in part.param_groups]

    def step(self, closure=None):
        """One step of both; no closure."""
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict) -> None:
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = self._groups()  # loading made new ones; the schedule changes these


def _by_shape(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(matrices that map vectors to vectors, all other parameters) that are to be trained."""
    tables = {p for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    output = model.decoder.get_output_embeddings()
    tables |= set(output.parameters()) if output else set()
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.ndim == 2 and p not in tables]
    chosen = set(matrices)
    return matrices, [p for p in trained if p not in chosen]
