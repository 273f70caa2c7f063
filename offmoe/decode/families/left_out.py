"""Families of transformers that the fused step does not compute, by model type, each with what it lacks for it.

A model of these decodes by transformers' modules, and `decode_path_reason` says why.
"""

from __future__ import annotations

_INDEX = "an index chooses the keys of each query"
_LINEAR = "linear attention of another kind than the gated delta net"
_TWO_PARTS = "an encoder and a decoder"

LEFT_OUT: dict[str, str] = {
    "axk2": _INDEX,
    "bailing_hybrid": _LINEAR,
    "beam": "sums that are weighted by depth, queries that grow with the position",
    "dbrx": "one matrix for queries, keys and values",
    "deepseek_v32": _INDEX,
    "deepseek_v4": "compressed keys, several streams of states",
    "dots3_note_text": _INDEX,
    "ernie4_5_vl_moe_text": "two kinds of experts in a layer",
    "glm5_next_text": f"{_INDEX}, several streams of states",
    "glm_moe_dsa": _INDEX,
    "hy_v4": f"{_INDEX}, several streams of states",
    "inkling_text": "relative positions in the scores",
    "inkling2_text": "relative positions in the scores",
    "jamba": "Mamba layers of the first kind",
    "jetmoe": "experts in attention",
    "kimi_linear": "a delta net with a decay for each channel",
    "llama4_text": "attention in chunks, weights on the experts' inputs",
    "longcat_flash": "two attentions in a layer, experts that compute nothing",
    "minimax": _LINEAR,
    "minimax_m3_vl_text": _INDEX,
    "mistral_large4_text": _INDEX,
    "muse_spark_text": "experts on a narrower state, with norms of their own",
    "nllb-moe": _TWO_PARTS,
    "qwen4_exp_text": f"{_INDEX}, several streams of states",
    "switch_transformers": _TWO_PARTS,
    "unlimited_ocr_text": "a window that keeps the prompt",
    "zaya": "attention between convolutions, a router with a state",
}
