"""About the lowest loss that a frozen head allows: how large its logits can be.

No logit is larger than its row and the hidden state are long, and the last norm fixes the state's length. In a small or
untrained model that keeps every probability well below 1, however well the layers learn; in a trained one it hardly
matters. An estimate: a last norm of uneven gains lets the state be longer in some directions, and the loss fall lower.
"""

from __future__ import annotations

import torch
from torch import Tensor

from decal.checks.untouched import without_dropout
from decal.data.batch import Batch
from decal.training import head, losses
from decal.training.job import Job

ROUNDS = 8  # of the fixed point below; random heads of 48 to 49,152 rows settle within 1e-3 in 5


@torch.no_grad()
def least_loss(job: Job, batch: Batch) -> float:
    """Return the mean loss of the batch's learnt tokens if every hidden state pointed where its token is likeliest.

    0.0 where the head is trained, too, or is no plain linear layer over the hidden state.
    """
    if not (isinstance(job.loss, losses.SFT) and job.loss.chunked):
        return 0.0
    body, linear = head.parts(job.model)
    if linear.weight.requires_grad:
        return 0.0
    device = linear.weight.device
    labels = losses.shifted(batch.labels).to(device)
    with without_dropout(job.model), job.numbers.autocast():
        inputs = {"input_ids": batch.input_ids.to(device), "use_cache": False}
        hidden = body(**inputs).last_hidden_state.flatten(0, 1)[labels >= 0].float()
    tokens, counts = torch.unique(labels[labels >= 0], return_counts=True)
    lowest = _least(head.dense(linear), tokens, float(hidden.norm(dim=1).max()))
    return float((lowest * counts).sum() / counts.sum())


def _least(W_VD: Tensor, tokens: Tensor, length: float) -> Tensor:
    """Return the least cross entropy of each token over hidden states of that length.

    On a sphere the optimum points along the gradient of its own log-probability, W[y] - p·W: iterate that.
    """
    h_ND = W_VD[tokens] - W_VD.mean(0)
    lowest = torch.full((len(tokens),), torch.inf, device=W_VD.device)
    for _ in range(ROUNDS):
        h_ND = length * torch.nn.functional.normalize(h_ND, dim=1)
        p_NV = (h_ND @ W_VD.T).log_softmax(1)
        lowest = torch.minimum(lowest, -p_NV.gather(1, tokens[:, None]).flatten())
        h_ND = W_VD[tokens] - p_NV.exp() @ W_VD
    return lowest
