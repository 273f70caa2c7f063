"""How fast a token could be at most: the bytes it must move, over bandwidths measured on the machine. Pure arithmetic.

A decoded token is bound by the resource that its bytes keep busy longest, at bandwidths measured apart from offmoe and
with everything in RAM; a prompt by its arithmetic, or by the bytes that it brought to the device.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True, kw_only=True)
class Bandwidths:
    """What the machine does, each measured alone. Bytes a second; `layer_s` is a layer's cost whatever its bytes.

    device        device memory, bytes read plus bytes written by a large copy
    link          host to device from page-locked memory
    cpu           experts computed on the CPU: weights read by matrix-vector products
    host          host memory, read
    device_flops  dense matrix products on the device, operations a second
    """

    device_bytes_per_s: float
    link_bytes_per_s: float
    cpu_bytes_per_s: float
    host_bytes_per_s: float
    device_flops: float
    layer_s: float = 0.0

    def as_dict(self) -> dict[str, float]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class TokenBytes:
    """What one decoded token reads: weights outside the routed experts, and those of its top-k in every layer."""

    dense_bytes: int
    expert_bytes: int
    num_layers: int
    top_k: int

    @property
    def routed_bytes(self) -> int:
        """R: bytes of the experts that a token is routed to, all layers."""
        return self.expert_bytes * self.num_layers * self.top_k

    @property
    def active_parameters(self) -> int:
        """Weights that take part in a token, two bytes each."""
        return (self.dense_bytes + self.routed_bytes) // 2


@dataclass(frozen=True, kw_only=True)
class Bound:
    """The least seconds a step may take, and which of the four sets it."""

    gpu_s: float
    link_s: float
    cpu_s: float
    host_s: float

    @property
    def seconds(self) -> float:
        """The longest of the four: all overlap."""
        return max(self.gpu_s, self.link_s, self.cpu_s, self.host_s)

    @property
    def tok_per_s(self) -> float:
        """Tokens a second at the bound, for a step of one token."""
        return 1 / self.seconds

    @property
    def limit(self) -> str:
        """What limits: gpu, link, cpu or host."""
        times = {"gpu": self.gpu_s, "link": self.link_s, "cpu": self.cpu_s, "host": self.host_s}
        return max(times, key=lambda name: times[name])


def streamed_share(miss: str, speeds: Bandwidths) -> float:
    """x: 1 when all misses are streamed, 0 when all are computed, else the share where link and CPU end together."""
    if miss == "stream":
        return 1.0
    if miss == "cpu":
        return 0.0
    if miss != "auto":
        raise ValueError(f"miss is {miss!r}; known: auto, stream, cpu")
    return speeds.link_bytes_per_s / (speeds.link_bytes_per_s + speeds.cpu_bytes_per_s)


def decode_bound(token: TokenBytes, speeds: Bandwidths, *, hit_rate: float, miss: str) -> Bound:
    """The bound of one decoded token at a device hit rate (0 to 1), misses served as `miss` says."""
    if not 0 <= hit_rate <= 1:
        raise ValueError(f"hit_rate is {hit_rate}; it is between 0 and 1")
    missed_bytes = (1 - hit_rate) * token.routed_bytes
    streamed_bytes = streamed_share(miss, speeds) * missed_bytes
    device_bytes = token.dense_bytes + hit_rate * token.routed_bytes
    return Bound(
        gpu_s=device_bytes / speeds.device_bytes_per_s + token.num_layers * speeds.layer_s,
        link_s=streamed_bytes / speeds.link_bytes_per_s,
        cpu_s=(missed_bytes - streamed_bytes) / speeds.cpu_bytes_per_s,
        host_s=missed_bytes / speeds.host_bytes_per_s,
    )


def prefill_bound(token: TokenBytes, speeds: Bandwidths, *, num_tokens: int, link_bytes: int) -> Bound:
    """The bound of a prompt of `num_tokens` that had to bring `link_bytes` to the device. Attention is not counted."""
    flops = 2 * token.active_parameters * num_tokens
    return Bound(
        gpu_s=flops / speeds.device_flops + token.num_layers * speeds.layer_s,
        link_s=link_bytes / speeds.link_bytes_per_s,
        cpu_s=0.0,
        host_s=link_bytes / speeds.host_bytes_per_s,
    )
