"""bergson's tests of its projections, with pyattr.compat.bergson's functions in its modules."""

from ..peer import Adapted, Peer

# A block is made small so that there are several; theirs and ours alike.
SMALLER = 'monkeypatch.setattr(\n        collector_module, "CHUNKED_PROJECTION_INSTANTIATION_NUMEL", m * {}\n    )'


def smaller_blocks(columns: int) -> tuple[str, str]:
    theirs = SMALLER.format(columns)
    return theirs, f'{theirs}\n    monkeypatch.setattr("pyattr.compat.bergson.BLOCK_ENTRIES", m * {columns})'


PEER = Peer(
    distribution="bergson==2.5.1",
    skipped=17,
    # What importing it needs. Not what it only declares or uses on a GPU alone (bitsandbytes), and neither torchvision nor
    # torchaudio, whose builds for CUDA do not load beside a torch for the CPU.
    packages=(
        "numpy",
        "scipy",
        "pyyaml",
        "tqdm",
        "accelerate",
        "transformers>=5,<6",
        "peft>=0.17",
        "datasets",
        "jaxtyping>=0.3.3",
        "ml_dtypes",
        "natsort",
        "simple-parsing",
        "petname",
    ),
    tests=(
        Adapted(
            path="tests/test_projection_matrix.py",
            edits=(
                # Their Philox is a function on NumPy integers; ours takes torch's.
                (
                    "import philox4x32, random_matrix",
                    "import random_matrix\nfrom pyattr.reference.philox import philox4x32_10 as philox4x32",
                ),
                ("tuple(np.uint32(c) for c in counter)", "counter"),
                ("import numpy as np\n", ""),
            ),
        ),
        Adapted(path="tests/test_projection_inner_products.py"),
        Adapted(
            path="tests/test_global_projection.py",
            edits=(
                smaller_blocks(64),
                ('@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA not available")\n', ""),
                ("model=model.cuda()", "model=model"),
            ),
        ),
        Adapted(
            path="tests/test_outer_product_gradients.py",
            edits=(
                smaller_blocks(50),
                # The same network, from its configuration in place of a download.
                (
                    'AutoConfig.from_pretrained("trl-internal-testing/tiny-GPTNeoXForCausalLM")',
                    'AutoConfig.for_model("gpt_neox", vocab_size=32, hidden_size=8, intermediate_size=32,\n'
                    "        num_attention_heads=4, num_hidden_layers=2, max_position_embeddings=64)",
                ),
            ),
        ),
    ),
)
