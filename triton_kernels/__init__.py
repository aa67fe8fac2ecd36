"""Triton kernels: one module per op, named as the op; imported only as ``pyattr.triton_kernels``."""

if __name__ != "pyattr.triton_kernels":
    # Triton ships a package of this very name. Python started in the repository root would find this folder in its place.
    raise ImportError(
        "this folder is pyattr.triton_kernels; a bare `import triton_kernels` means Triton's own package: "
        "start Python outside pyattr's source tree to get that one"
    )
