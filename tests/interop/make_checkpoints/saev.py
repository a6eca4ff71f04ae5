"""saev: a line of JSON and a state dict in one file, written by `saev.nn.dump`."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from .common import Cases, Compute

D_IN, FACTOR = 16, 2


def make(out: Path) -> None:
    """Make the case."""
    import saev.config
    import saev.nn

    case = Cases(out, "saev", "saev")("relu")
    sae = saev.nn.SparseAutoencoder(saev.config.SparseAutoencoder(d_vit=D_IN, exp_factor=FACTOR))
    n = D_IN * FACTOR
    sae.W_enc.data = case.encoder(n, D_IN).t().contiguous()
    sae.W_dec.data = case.rows(n, D_IN)
    sae.b_enc.data = case.randn(n) + 0.3
    sae.b_dec.data = case.randn(D_IN)
    file = str(case.folder / "sae.pt")
    saev.nn.dump(file, sae)

    def at(dtype: str) -> Compute:
        loaded = getattr(saev.nn.load(file), dtype)()

        def compute(x: Tensor) -> tuple[Tensor, Tensor]:
            out, code, _ = loaded(x)
            return code, out

        return compute

    case.expect(case.x(D_IN), at("float"), at("double"), "saev checkpoint, ReLU, d_vit 16")
