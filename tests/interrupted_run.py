"""`headprune` on a task that waits for a signal when output projections are re-solved: `interrupted_run.py run recipe.yaml`."""

import time

from small_states import SmallStates

from headprune.cli import main
from headprune.evaluation.tasks import register_task


@register_task
class Waiting(SmallStates):
    def forward(self, model, batch):
        print("re-solving", flush=True)
        time.sleep(600)


if __name__ == "__main__":
    main()
