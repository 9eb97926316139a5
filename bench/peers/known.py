"""The peers by name, in the order of the table."""

from __future__ import annotations

from peers.registry import TORCH, TRANSFORMERS_4, Peer

TRANSFORMERS = [TORCH, TRANSFORMERS_4, "numpy"]

RUN = (
    Peer("headprune", "headprune", "run_headprune.py", options={"compensate": True}),
    Peer("headprune, cut only", "headprune", "run_headprune.py", options={"compensate": False}),
    Peer("torch-pruning", "torch-pruning", "run_torch_pruning.py"),
    Peer("prune_heads of transformers", "transformers", "run_transformers4.py", [TRANSFORMERS]),
    # Its own requirements name a numpy that has no wheel for this Python.
    Peer("textpruner", "textpruner", "run_textpruner.py", [TRANSFORMERS, ["--no-deps", "textpruner==1.1.post2"]]),
    Peer("nni", "nni", "run_nni.py", [TRANSFORMERS, ["nni==3.0"]]),
    # The last that prunes; pkg_resources and six are missing from its requirements.
    Peer(
        "neural-compressor", "neural-compressor", "run_neural_compressor.py",
        [TRANSFORMERS, ["neural-compressor==2.6"], ["setuptools<81", "six"]],
    ),
    # Its requirements hold torch below 2.8; it runs with the one that all others have.
    Peer(
        "fmchisel (OSSCAR)", "fmchisel", "run_fmchisel.py",
        [
            [*TRANSFORMERS, "accelerate", "datasets==4.4.1", "loguru", "pydantic", "nvidia-ml-py", "pandas", "dataclasses_json"],
            ["--no-deps", "fmchisel==0.1.2", "llmcompressor==0.5.1", "compressed-tensors==0.9.4"],
        ],
    ),
    Peer("nn_pruning", "nn-pruning", "run_nn_pruning.py", [TRANSFORMERS, ["nn-pruning==0.1.2"]]),
    Peer("optipfair", "optipfair", "run_optipfair.py", [TRANSFORMERS, ["--no-deps", "optipfair==0.4.2"]]),
    Peer("llm-pruner", "llm-pruner", None, [["llm-pruner"]], lacks="its name is on PyPI"),
    Peer("sparseml", "sparseml", None, [["sparseml==1.9.0"]], lacks="its modifiers prune weights, layers and channels"),
    Peer(
        "nncf", "nncf", None, [[TORCH, "nncf==3.4.0"]],
        lacks="nncf.PruneMode has three modes, all unstructured",
    ),
)  # fmt: skip

READ = (
    Peer(
        "nvidia-modelopt 0.47.0", "", None, lacks="its modes are fastnas (vision models) and mcore_minitron (Megatron-Core models)"
    ),
    Peer("pruna 0.3.4", "", None, lacks="torch_structured is Torch-Pruning, and takes OPT, ViT, ConvNeXt, ResNet and GLiNER alone"),
    Peer(
        "fasterai 0.4.1", "", None, lacks="its pruner is Torch-Pruning's with fused qkv projections on the list of what is ignored"
    ),
    Peer("tinyedgellm 0.1.0", "", None, lacks="AttentionHeadPruner looks for GPT2Attention, and passes other models over"),
    Peer("torch-kirigami 0.2.1", "", None, lacks="it narrows attention with the number of heads fixed"),
    Peer(
        "llmcompressor 0.14.0.1", "", None, lacks="its pruning modifiers are of weights (magnitude, SparseGPT, Wanda) and experts"
    ),
    Peer("optimum-intel 2.2.0", "", None, lacks="it holds no pruning"),
)

PEERS = {peer.name: peer for peer in (*RUN, *READ)}
