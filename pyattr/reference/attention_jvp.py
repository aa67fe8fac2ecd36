"""Attention and its tangents by definition, in float64.

P = softmax(S) over keys, S = scale q k^T + mask; S_dot = scale (q_dot k^T + q k_dot^T); P_dot = P * (S_dot - rowsum(P
* S_dot)); y = P v and y_dot = P_dot v + P v_dot. A pair that the mask forbids has P = P_dot = 0, and so has every pair
of a row whose scores are all -inf. One tangent at a time: O(B H L S) memory.
"""

import torch


def allowed_pairs(shape, mask, causal, device):
    """[..., L, S] bool: which keys a query may attend to; None where all may."""
    allowed = None
    if mask is not None:
        allowed = mask if mask.dtype == torch.bool else mask != -torch.inf
    if causal:
        past = torch.ones(shape[-2:], dtype=torch.bool, device=device).tril()
        allowed = past if allowed is None else allowed & past
    return allowed


def attention_jvp(query, key, value, query_dot, key_dot, value_dot, mask, causal, scale):
    """See :func:`pyattr.ops.attention_jvp`. Returns y [B, H, L, V] and y_dot [K, B, H, L, V], float64."""
    query, key, value = query.double(), key.double(), value.double()
    scores = scale * (query @ key.mT)  # [B, H, L, S]
    allowed = allowed_pairs(scores.shape, mask, causal, query.device)
    if mask is not None and mask.dtype != torch.bool:
        scores = scores + mask.double()
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -torch.inf)
    nowhere = (scores == -torch.inf).all(-1, keepdim=True)
    probabilities = scores.softmax(-1).masked_fill(nowhere, 0.0)
    y = probabilities @ value
    tangents = []
    given = [t for t in (query_dot, key_dot, value_dot) if t is not None]
    for k in range(len(given[0])):
        y_dot = torch.zeros_like(y)
        if query_dot is not None or key_dot is not None:
            scores_dot = torch.zeros_like(scores)
            if query_dot is not None:
                scores_dot += scale * (query_dot[k].double() @ key.mT)
            if key_dot is not None:
                scores_dot += scale * (query @ key_dot[k].double().mT)
            if allowed is not None:
                scores_dot = scores_dot.masked_fill(~allowed, 0.0)
            mean = (probabilities * scores_dot).sum(-1, keepdim=True)
            weights_dot = probabilities * (scores_dot - mean)
            if allowed is not None:
                weights_dot = weights_dot.masked_fill(~allowed, 0.0)
            y_dot += weights_dot @ value
        if value_dot is not None:
            y_dot += probabilities @ value_dot[k].double()
        tangents.append(y_dot)
    return y, torch.stack(tangents) if tangents else y.new_empty(0, *y.shape)
