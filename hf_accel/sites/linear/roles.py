"""What a linear does in its block, told by its name and by what it stands in."""

from __future__ import annotations

import torch

ROLES = ("query", "key", "value", "qkv", "output", "gate", "up", "gate_up", "down", "head", "router", "other")
"""``qkv`` and ``gate_up`` are fused projections; ``output`` is the one after attention; ``router`` chooses experts."""

# Names that mean one thing wherever they stand in a block.
_NAMES = {
    "query": "q_proj to_q add_q_proj q_lin query wq",
    "key": "k_proj to_k add_k_proj k_lin key wk",
    "value": "v_proj to_v add_v_proj v_lin value wv",
    "qkv": "qkv qkv_proj to_qkv to_added_qkv to_kv query_key_value Wqkv W_pack c_attn in_proj_qkv att_proj",
    "output": "o_proj to_out to_add_out out_lin attn_out",
    "gate": "gate_proj w1 wi_0 ff_proj",
    "up": "up_proj fc1 c_fc fc_in wi wi_1 w3 lin1 linear_fc1 dense_h_to_4h proj_mlp",
    "gate_up": "gate_up_proj gate_and_up_proj",
    "down": "down_proj fc2 fc_out w2 lin2 linear_fc2 dense_4h_to_h ff_out",
    "head": "lm_head embed_out output_projection",
}
_ROLE_OF_NAME = {name: role for role, names in _NAMES.items() for name in names.split()}
_ROUTERS = ("router", "gate", "shared_expert_gate")

# Names whose meaning depends on whether they stand in an attention or in a feed-forward.
_IN_ATTENTION = {"q": "query", "k": "key", "v": "value", "o": "output"} | dict.fromkeys(
    ("dense", "c_proj", "out_proj", "proj", "wo"), "output"
)
_IN_FEED_FORWARD = {"c_proj": "down", "dense": "down", "wo": "down", "out_proj": "down"}

# Classes of diffusers that compute the gate and the value of a feed-forward with one projection.
_FUSED_GATES = ("GEGLU", "SwiGLU")


def role_of(name: str, module: torch.nn.Module, parent: torch.nn.Module) -> str:
    """The role of a linear.

    Args:
        name: its dotted name in the model.
        module: the linear.
        parent: the module that it stands in.

    Returns:
        One of :data:`ROLES`.
    """
    parts = name.split(".")
    if len(parts) > 1 and (parts[-1].isdigit() or parts[-1] == "linear"):  # to_out.0; a linear with clipped inputs
        at_place, parts = parts[-1], parts[:-1]
    else:
        at_place = ""
    leaf, around = parts[-1], parts[-3:-1]
    if leaf in _ROUTERS or around[-1:] == ["router"]:
        return "router"
    if leaf == "net":  # FeedForward of diffusers: net.0.proj, net.1 dropout, net.2
        return "down" if at_place == "2" else "other"
    if leaf == "proj" and around[-1:] == ["0"] and around[:1] == ["net"]:
        return "gate_up" if type(parent).__name__ in _FUSED_GATES else "up"
    if leaf in _ROLE_OF_NAME:
        return _ROLE_OF_NAME[leaf]
    kinds = [type(parent).__name__, *around]
    if any("attn" in kind.lower() or "attention" in kind.lower() for kind in kinds):
        return _IN_ATTENTION.get(leaf, "other")
    if leaf == "dense" and around[-1:] == ["intermediate"]:
        return "up"
    if leaf == "dense" and around[-1:] != ["output"]:  # a pooler, a prediction head
        return "other"
    return _IN_FEED_FORWARD.get(leaf, "other")
