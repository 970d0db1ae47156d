"""Frozen teachers and the divergence of a student from them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


def frozen(model: nn.Module) -> nn.Module:
    """Return `model` itself as a teacher: eval mode, no parameter takes a gradient.

    Give a copy: a teacher must not share its storage with the student.
    """
    return model.eval().requires_grad_(False)


def divergence(teacher: Tensor, student: Tensor, temperature: float = 1.0) -> Tensor:
    """Return KL(q ‖ p) = Σ_k q_k (log q_k − log p_k) of every row, (B, K) logits to (B,).

    q and p are the softmax of the teacher's and the student's logits over `temperature`. Both stay
    logarithms, so that no logit is too large; half precision is widened first.

    >>> logits = torch.tensor([[200.0, -200.0]])
    >>> divergence(logits, logits).item()
    0.0
    >>> round(divergence(torch.zeros(1, 2), torch.tensor([[1.0, 0.0]]), temperature=2.0).item(), 4)
    0.0309
    """
    log_q, log_p = (
        functional.log_softmax(_wide(logits) / temperature, dim=1) for logits in (teacher, student)
    )
    return functional.kl_div(log_p, log_q, reduction="none", log_target=True).sum(dim=1)


def _wide(logits: Tensor) -> Tensor:
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
