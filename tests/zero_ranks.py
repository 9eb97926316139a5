"""What each of two ranks does in test_deepspeed.py: `torchrun --nproc_per_node 2 zero_ranks.py FOLDER CASE`."""

import sys
from pathlib import Path

import torch.distributed as dist
from child_process import leave
from pruned_pairs import pruned_llama, text_batches
from safetensors.torch import save_file
from transformers import TrainerCallback

import headprune as hp
from headprune.errors import InvalidInput

STEPS = 6
STAGES = {"none": 0, "optimizer": 1, "gradients": 2, "partitioned": 3}


class Stop(TrainerCallback):
    """As a run that is killed after four steps."""

    def on_step_end(self, args, state, control, **_):
        if state.global_step == 4:
            raise KeyboardInterrupt


def zero(stage: int) -> dict:
    return {
        "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto", "gradient_clipping": "auto",
        "zero_allow_untested_optimizer": True, "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }  # fmt: skip


def main() -> None:
    folder, case = Path(sys.argv[1]), sys.argv[2]
    dense, model = pruned_llama()
    options = {"steps": STEPS, "lr": 1e-2, "teacher": dense}
    if case != "plain":
        options["deepspeed"] = zero(STAGES.get(case, 2))
    if case in ("stopped", "resumed"):
        options |= {"output_dir": folder / "run", "save_steps": 2}
    if case == "stopped":
        options["callbacks"] = [Stop()]
    said = "finished"
    try:
        hp.recover(model, text_batches(), **options)
    except KeyboardInterrupt:
        said = "stopped"
    except InvalidInput as error:
        said = str(error)
    rank = 0 if not dist.is_initialized() else dist.get_rank()
    (folder / f"{case}{rank}.txt").write_text(said)
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    save_file(weights, folder / f"{case}{rank}.safetensors")


if __name__ == "__main__":
    main()
    leave()
