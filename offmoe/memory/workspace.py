"""Memory that one forward pass needs beside weights and KV cache, from the model's shape.

An upper estimate, in bytes, of what is alive at once in the widest place of a layer. Measured peaks are below it
(benchmarks/ holds the comparison); the executor bounds its own part by computing expert by expert.
"""

from __future__ import annotations

from offmoe.memory.shape import MAX_ABSORBED_TOKENS, ModelShape

PREFILL_CHUNKS = (4096, 2048, 1024, 512, 256, 128, 64)
# Of what weights and KV leave, the share that a prefill chunk may take; the rest is for expert slots.
MAX_WORKSPACE_SHARE = 0.06


def workspace_bytes(shape: ModelShape, *, chunk: int, context_length: int, on_device: bool = False) -> int:
    """Peak of temporaries for `chunk` tokens against `context_length` cached ones, where the model computes."""
    item, width = shape.item_bytes, shape.width
    heads_width, groups_width = shape.num_heads * shape.head_width, shape.num_groups * shape.head_width
    # Hidden states: the residual, what a block is given and gives, their sum; and as many that were freed and kept
    # (measured: the same run's peak differs by up to 70 MiB at 1,900 tokens, and must not be above this).
    hidden = chunk * width * 8 * item
    # A normed copy in float32 and its square.
    norm = chunk * width * 3 * 4
    # Queries, keys, values before and after rotary embedding, attention output.
    attention = chunk * (5 * heads_width + 4 * groups_width) * item
    # The mask, as bool and as float; and the scores, where they are written out.
    mask = chunk * context_length * (1 + item)
    attention += chunk * context_length * (shape.device_score_bytes if on_device else shape.score_bytes)
    # Experts' outputs for every choice, the sort, and one expert's own activations for at most `chunk` rows.
    experts = chunk * shape.top_k * (width * item + 32) + chunk * (width + 4 * shape.expert_width) * item
    mlp = chunk * shape.dense_width * item * 3
    # Linear-attention and state-space layers run in float32 here.
    if shape.has_recurrence:
        attention += chunk * max(heads_width, 2 * width) * 4 * 12
    fixed = fixed_workspace_bytes(shape, chunk=chunk, context_length=context_length, on_device=on_device)
    # One is under way at a time; of what the one before has freed, the C library keeps pieces that fit nowhere.
    return hidden + mask + sum(sorted((norm, attention, experts, mlp))[-2:]) + fixed


def fixed_workspace_bytes(shape: ModelShape, *, chunk: int, context_length: int, on_device: bool) -> int:
    """The part of it that hardly depends on the chunk."""
    fixed = shape.vocab_size * (shape.item_bytes + 4 * 4)  # logits
    if not on_device:  # oneDNN reorders a matrix before a product of many rows: at most the largest resident one
        fixed += shape.largest_matrix_bytes
    # Keys and values that attention writes for the whole context; few tokens attend to latents as they are.
    if not shape.latent_width or chunk > MAX_ABSORBED_TOKENS:
        fixed += context_length * (shape.device_context_bytes if on_device else shape.context_bytes)
    return fixed


def host_workspace_bytes(shape: ModelShape, *, chunk: int) -> int:
    """Peak of temporaries in RAM when the model is on a device: states and results of experts computed on the CPU."""
    return chunk * (shape.top_k * shape.width + 2 * shape.width + 4 * shape.expert_width) * shape.item_bytes


def choose_chunk(shape: ModelShape, *, context_length: int, room_bytes: int, on_device: bool = False) -> int:
    """The largest prefill chunk whose workspace stays under its share of `room_bytes`; larger ones read fewer bytes.

    What nearly any chunk needs is not part of that share.
    """
    for chunk in PREFILL_CHUNKS:
        if chunk >= 2 * context_length:
            continue
        tokens = min(chunk, context_length)
        fixed = fixed_workspace_bytes(shape, chunk=tokens, context_length=context_length, on_device=on_device)
        whole = workspace_bytes(shape, chunk=tokens, context_length=context_length, on_device=on_device)
        if whole - fixed <= MAX_WORKSPACE_SHARE * (room_bytes - fixed):
            return tokens
    return min(PREFILL_CHUNKS[-1], context_length)
