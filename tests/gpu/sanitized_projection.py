"""Small awkward problems for compute-sanitizer to watch: ``compute-sanitizer --error-exitcode 1 python THIS_FILE``.

With PYTORCH_NO_CUDA_MEMORY_CACHING=1 every tensor is an allocation of its own, so that a step outside one is seen.
"""

import itertools

import torch

from pyattr import ops

SHAPES = [(1, 1, 1, 0), (9, 1300, 300, 77), (33, 129, 17, 641), (70, 2048, 256, 0)]  # B, P, D, column_offset

if __name__ == "__main__":
    kinds = itertools.product(
        ("rademacher_project", "gaussian_project"), (torch.float16, torch.bfloat16, torch.float32), SHAPES
    )
    for op, dtype, (num_samples, num_columns, proj_dim, offset) in kinds:
        grads = torch.randn(num_samples, num_columns, device="cuda").to(dtype)
        grads[0, -1] = float("inf")
        for view in (grads, grads.T.contiguous().T):
            getattr(ops, op)(view, proj_dim, column_offset=offset, backend="cuda")
    # Every number of samples that share a thread; 32 lanes and fewer; one range and several; more outputs than a thread
    # block has.
    for dtype, proj_dim in itertools.product((torch.float16, torch.bfloat16, torch.float32), (1, 45, 256, 288, 4128)):
        grads = torch.randn(15, 9000, device="cuda").to(dtype)
        for view in (grads, grads.T.contiguous().T):
            options = {"nonzeros": min(3, proj_dim), "column_offset": 77, "num_columns": 10_000}
            ops.sparse_project(view, proj_dim, **options, backend="cuda")
    # One block and several, one range and several, all rows.
    for dtype, (num_columns, proj_dim) in itertools.product(
        (torch.float16, torch.bfloat16, torch.float32), ((1, 1), (1300, 2048), (100_001, 300))
    ):
        grads = torch.randn(5, num_columns, device="cuda").to(dtype)
        for view in (grads, grads.T.contiguous().T):
            ops.hadamard_project(view, proj_dim, backend="cuda")
    # Interior, edges and corners, block sums, tensor cores and differences, a tile of distances outside shared memory.
    sizes = ((3, 9, 11, 4, False), (2, 12, 8, 6, True), (5, 3, 4, 7, False), (1, 70, 60, 3, False))
    for dtype, border, (channels, height, width, patch_size, lowres) in itertools.product(
        (torch.uint8, torch.float16, torch.float32), ("class", "zero"), sizes
    ):
        bank = torch.randint(0, 256, (3, channels, height, width), dtype=torch.uint8, device="cuda")
        bank = bank if dtype == torch.uint8 else (bank / 127.5 - 1).to(dtype)
        queries = torch.randn(1, channels, height, width, device="cuda")
        options = {"patch_size": patch_size, "sigma": 0.5, "scale": 0.8, "border": border, "backend": "cuda"}
        ops.patch_topk(queries, bank, k=5, lowres=lowres, return_winners=True, **options)
        ops.patch_mean(queries, bank, **options)
    # Part of a tile and several, every group of columns, all masks, tangents that are not there.
    sizes = ((1, 1, 1, 1, 1), (3, 70, 130, 20, 40), (2, 9, 65, 130, 300), (1, 130, 5, 3, 100))  # H, L, S, E, V
    for dtype, (heads, queries, keys, width, values) in itertools.product(
        (torch.float16, torch.bfloat16, torch.float32), sizes
    ):
        shapes = ((queries, width), (keys, width), (keys, values))
        arrays = [torch.randn(*lead, 2, heads, *s, device="cuda").to(dtype) for lead in ((), (3,)) for s in shapes]
        mask = torch.randn(queries, keys, device="cuda")
        for options in ({}, {"mask": mask}, {"mask": mask > 0, "causal": True}):
            ops.attention_jvp(*arrays, **options, backend="cuda")
        ops.attention_jvp(*arrays[:3], None, arrays[4], None, backend="cuda")
    torch.cuda.synchronize()
