"""The section `flow_matching:` with the arms that change the loss: contrast and alignments."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from mmdit.diffusion import FlowMatchingConfig
from mmdit.diffusion.objective import Call, LossParts
from mmdit.interfaces import TextTokens
from mmdit.rng import Draws
from tests.drivers.arms.contrast import Contrast
from tests.drivers.arms.hidden import EARLY, reveal
from tests.drivers.arms.self_alignment import SelfAlignment
from tests.drivers.arms.token_times import at_two_times
from tests.drivers.arms.vtp_alignment import VTPAlignment


@dataclass(frozen=True)
class ArmsFlowMatchingConfig(FlowMatchingConfig):
    contrast: float = 0.0  # the weight of each arm; 0 is the plain loss
    self_alignment: float = 0.0
    vtp_alignment: float = 0.0
    token_times: float = 0.0  # the share of tokens at a second time, in alignment


class ArmsFlowMatching(nn.Module, Contrast):
    """Add to the loss what `config.flow_matching` names; a module, for its weights are trained."""

    def __init__(self, config, learner):
        nn.Module.__init__(self)
        Contrast.__init__(self, config.flow_matching)
        model, parts = learner.model, {}
        if self.config.self_alignment:
            parts["self_alignment"] = SelfAlignment(model, learner.objective)
        if self.config.vtp_alignment:
            parts["vtp_alignment"] = VTPAlignment(model, config.tokenizer, learner.spec)
        self.alignments = nn.ModuleDict(parts)
        if parts:
            reveal(model, max(1, round(EARLY * len(model.blocks))))

    def loss(
        self, model: Call, clean: Tensor, text: TextTokens, draws: Draws, given: int = 0, **inputs
    ) -> LossParts:
        if not (self.alignments and self.training):
            return super().loss(model, clean, text, draws, given, **inputs)
        clean, channels, hidden = clean.float(), clean.shape[-1], []

        def call(x, t, *words, **further) -> Tensor:
            x = at_two_times(self, x, t, clean, draws) if self.config.token_times else x
            output = model(x, t, *words, **further)
            hidden.append(output[..., channels:])
            return output[..., :channels]

        parts = super().loss(call, clean, text, draws, given, **inputs)
        losses, known = parts.per_sample, (hidden[0], clean, parts.t, text, draws)
        for name, align in self.alignments.items():
            losses = losses + getattr(self.config, name) * align(*known)
        return LossParts(losses, parts.t)
