"""The interfaces of TRAK, fast_jl, dattri, sjlt and bergson on our kernels: one module per peer, each without needing it."""
